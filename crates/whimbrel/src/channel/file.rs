//! `file:PATH[,offset=N]`: a stream that is kept.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A file being written. Dropped before [`keep`](Target::keep), what was written is undone.
#[derive(Debug)]
pub(super) struct Target {
    undo: Undo,
}

#[derive(Debug)]
enum Undo {
    /// A new file beside the one asked for, renamed to it at the end.
    Rename { partial: PathBuf, path: PathBuf },
    /// A file that was there before the stream, and how long it was up to it.
    Truncate { path: PathBuf, len: u64 },
    /// No regular file (a device, a pipe): nothing can be undone.
    Nothing,
}

impl Target {
    /// Opens `path` for a stream that begins at `offset`. Up to the offset the file is left as it
    /// is; without one it is replaced as a whole, once the stream is complete.
    pub(super) fn create(path: &Path, offset: u64) -> io::Result<(OwnedFd, Target)> {
        let special = fs::metadata(path).is_ok_and(|m| !m.file_type().is_file());
        if special {
            let file = OpenOptions::new().write(true).open(path)?;
            return Ok((file.into(), Target { undo: Undo::Nothing }));
        }
        if offset == 0 {
            let (partial, file) = create_partial(path)?;
            return Ok((file.into(), Target { undo: Undo::Rename { partial, path: path.into() } }));
        }
        let mut file = private().create(true).truncate(false).open(path)?;
        file.set_len(offset)?;
        file.seek(SeekFrom::Start(offset))?;
        Ok((file.into(), Target { undo: Undo::Truncate { path: path.into(), len: offset } }))
    }

    /// The stream is complete: it reaches the disk and gets its name.
    pub(super) fn keep(mut self, fd: &impl AsFd) -> io::Result<()> {
        match &self.undo {
            Undo::Rename { partial, path } => {
                rustix::fs::fsync(fd)?;
                fs::rename(partial, path)?;
            }
            Undo::Truncate { .. } => rustix::fs::fsync(fd)?,
            Undo::Nothing => {}
        }
        self.undo = Undo::Nothing;
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // Best effort by nature: the error that brought us here is the one to report.
        match &self.undo {
            Undo::Rename { partial, .. } => drop(fs::remove_file(partial)),
            Undo::Truncate { path, len } => {
                if let Ok(file) = OpenOptions::new().write(true).open(path) {
                    drop(file.set_len(*len));
                }
            }
            Undo::Nothing => {}
        }
    }
}

/// How many names are tried: each that is taken was left behind by a process that was killed.
const NAMES_MAX: u32 = 1000;

/// For writing a guest's memory: a file that this makes is its owner's alone.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).mode(0o600);
    options
}

/// Creates a file beside `path`, under a name that says whose half-written work it is.
pub(crate) fn create_partial(path: &Path) -> io::Result<(PathBuf, File)> {
    let mut number = 0;
    loop {
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".partial-{}-{number}", std::process::id()));
        let partial = path.with_file_name(name);
        match private().create_new(true).open(&partial) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < NAMES_MAX => {
                number += 1;
            }
            result => return result.map(|file| (partial, file)),
        }
    }
}

/// Opens `path` for reading a stream that begins at `offset`.
pub(super) fn open(path: &Path, offset: u64) -> io::Result<OwnedFd> {
    let mut file = File::open(path)?;
    if offset > 0 {
        file.seek(SeekFrom::Start(offset))?;
    }
    let fd = file.as_fd().try_clone_to_owned()?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_holds_a_guests_memory_is_its_owners_alone() {
        let folder = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let path = folder.path().join("whole");
        let (fd, target) = Target::create(&path, 0).unwrap();
        target.keep(&fd).unwrap();
        assert_eq!(mode(&path), 0o600);
        let path = folder.path().join("behind");
        let (fd, target) = Target::create(&path, 4096).unwrap();
        target.keep(&fd).unwrap();
        assert_eq!(mode(&path), 0o600);

        // One that somebody has made for it stays as it was made.
        let path = folder.path().join("shared");
        fs::write(&path, "before").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let (fd, target) = Target::create(&path, 4).unwrap();
        target.keep(&fd).unwrap();
        assert_eq!((mode(&path), fs::read(&path).unwrap()), (0o640, b"befo".to_vec()));
    }
}
