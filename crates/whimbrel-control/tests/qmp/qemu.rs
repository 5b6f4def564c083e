//! A stock QEMU without a guest of its own, to hold our protocol against.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use whimbrel_control::{Client, ClientError, Endpoint};

pub(crate) struct Qemu {
    child: Child,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Qemu {
    /// Starts the QEMU that `WHIMBREL_QEMU` names or that is found; `None`, with a line that says
    /// so, if there is none.
    pub(crate) fn start(arguments: &[&str]) -> Option<Qemu> {
        let Some(binary) = find() else {
            assert!(
                env::var_os("WHIMBREL_QEMU").is_none(),
                "WHIMBREL_QEMU names no qemu-system-x86_64"
            );
            eprintln!("skipped: no qemu-system-x86_64 (name one in WHIMBREL_QEMU)");
            return None;
        };
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let mut command = Command::new(&binary);
        if let Some(root) = unpacked_root(&binary) {
            command.env("LD_LIBRARY_PATH", library_path(&root));
            for data in ["usr/share/qemu", "usr/share/seabios"] {
                command.arg("-L").arg(root.join(data));
            }
        }
        let child = command
            .args(["-nodefaults", "-display", "none", "-machine", "pc", "-accel", "tcg"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .args(arguments)
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", binary.display()));
        Some(Qemu { child, socket, _dir: dir })
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn endpoint(&self) -> Endpoint {
        Endpoint::Unix(self.socket.clone())
    }

    /// A client, once QEMU listens.
    pub(crate) fn client(&self, patience: Duration) -> Client {
        let deadline = Instant::now() + patience;
        loop {
            match Client::connect(self.endpoint(), Duration::from_secs(10)) {
                Err(ClientError::Connect { .. }) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                outcome => return outcome.unwrap(),
            }
        }
    }

    /// Waits until it has ended by itself.
    pub(crate) fn wait_end(mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "QEMU does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn find() -> Option<PathBuf> {
    const NAME: &str = "qemu-system-x86_64";
    if let Some(named) = env::var_os("WHIMBREL_QEMU") {
        return Some(PathBuf::from(named)).filter(|path| path.is_file());
    }
    let peers = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/peers");
    let unpacked = fs::read_dir(peers).into_iter().flatten().flatten();
    let mut candidates: Vec<PathBuf> = unpacked
        .flat_map(|entry| {
            let dir = entry.path();
            [dir.join("usr/bin").join(NAME), dir.join(NAME)]
        })
        .collect();
    candidates.sort();
    let path = env::var_os("PATH").unwrap_or_default();
    candidates.extend(env::split_paths(&path).map(|dir| dir.join(NAME)));
    candidates.into_iter().find(|path| path.is_file())
}

/// The directory into which packages were unpacked rather than installed, if that was so.
fn unpacked_root(binary: &Path) -> Option<PathBuf> {
    let root = binary.parent()?.parent()?.parent()?;
    (binary.ends_with("usr/bin/qemu-system-x86_64") && root != Path::new("/")).then(|| root.into())
}

/// All directories below `root/usr/lib` with libraries in them.
fn library_path(root: &Path) -> OsString {
    let mut found = Vec::new();
    let mut left = vec![root.join("usr/lib"), root.join("lib")];
    while let Some(dir) = left.pop() {
        let mut holds_libraries = false;
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_dir {
                left.push(entry.path());
            }
            holds_libraries |= entry.file_name().to_string_lossy().contains(".so");
        }
        if holds_libraries {
            found.push(dir);
        }
    }
    env::join_paths(found).unwrap()
}
