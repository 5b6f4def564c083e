//! The peers folder: QEMUs, the kernel and busybox, fetched once and unpacked side by side.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::apt::Apt;

/// Where the folder is: set by `cargo xtask`.
pub const FOLDER_VARIABLE: &str = "WHIMBREL_PEERS";
/// A QEMU of the user's own, for the tests named `given`: set by `cargo xtask peers --qemu`.
pub const GIVEN_VARIABLE: &str = "WHIMBREL_PEER_QEMU";

const PACKAGE: &str = "qemu-system-x86";
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
/// The loader of the unpacked C library, which must be the one that goes with it.
const LOADER: &str = "ld-linux-x86-64.so.2";
const LIBRARY_FOLDERS: [&str; 3] = [
    "lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu",
    // Reached by absolute paths inside the libraries, which lead out of the folder.
    "usr/lib/x86_64-linux-gnu/pulseaudio",
];

/// A stock QEMU to test against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// QEMU 7.2, Debian bookworm's own.
    V7_2,
    /// QEMU 10.0, from bookworm's backports.
    V10_0,
    /// The one the user gave.
    Given,
}

impl Peer {
    /// Those that [`install`] fetches.
    pub const FETCHED: [Self; 2] = [Self::V7_2, Self::V10_0];

    /// The version's beginning; the module name of its tests is `v` and this, with `_` for `.`.
    #[must_use]
    pub const fn version(self) -> &'static str {
        match self {
            Self::V7_2 => "7.2",
            Self::V10_0 => "10.0",
            Self::Given => "given",
        }
    }

    /// The machine type of this version; for a given QEMU, its newest.
    #[must_use]
    pub const fn machine(self) -> &'static str {
        match self {
            Self::V7_2 => "pc-q35-7.2",
            Self::V10_0 => "pc-q35-10.0",
            Self::Given => "q35",
        }
    }

    /// Whether it writes and reads the mapped-ram file format (QEMU 9.0 and later).
    #[must_use]
    pub const fn knows_mapped_ram(self) -> bool {
        !matches!(self, Self::V7_2)
    }

    /// Whether it can be told who looks for pages of zeros (QEMU 9.0 and later).
    #[must_use]
    pub const fn knows_zero_page_detection(self) -> bool {
        !matches!(self, Self::V7_2)
    }

    /// The command that starts it, without arguments.
    ///
    /// # Errors
    /// It is not there; says what to do.
    pub fn command(self) -> Result<Command> {
        if self == Self::Given {
            let path = std::env::var_os(GIVEN_VARIABLE).with_context(|| {
                format!("{GIVEN_VARIABLE} is not set: cargo xtask peers --qemu")
            })?;
            return Ok(Command::new(path));
        }
        self.command_in(&folder()?)
    }

    /// The same for a fetched one, in this peers folder.
    ///
    /// # Errors
    /// It is not there; says what to do.
    pub fn command_in(self, folder: &Path) -> Result<Command> {
        unpacked_command(&folder.join(format!("qemu-{}", self.version())))
    }
}

/// The peers folder: as `cargo xtask` set it, or below the target directory this runs from.
///
/// # Errors
/// Neither is known.
pub fn folder() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os(FOLDER_VARIABLE) {
        return Ok(folder.into());
    }
    // target/debug/deps/NAME
    let program = std::env::current_exe()?;
    let target = program.ancestors().nth(3).context("no target directory above this program")?;
    Ok(target.join("peers"))
}

/// The kernel and busybox of the Linux guest.
#[derive(Debug, Clone)]
pub struct LinuxParts {
    /// A bzImage.
    pub kernel: PathBuf,
    /// A static busybox.
    pub busybox: PathBuf,
}

impl LinuxParts {
    /// Where [`install`] put them.
    ///
    /// # Errors
    /// They are not there.
    pub fn find() -> Result<Self> {
        let folder = folder()?.join("linux");
        let parts = Self { kernel: folder.join("vmlinuz"), busybox: folder.join("busybox") };
        for part in [&parts.kernel, &parts.busybox] {
            ensure!(part.is_file(), "{} is missing: run cargo xtask peers", part.display());
        }
        Ok(parts)
    }
}

/// What [`install`] could not fetch, each with its reason in one line.
#[derive(Debug, Default)]
pub struct Missing {
    /// QEMUs, and why.
    pub peers: Vec<(Peer, String)>,
    /// The Linux guest's parts, and why.
    pub linux: Option<String>,
}

/// Fetches into `folder` what is not there yet. What cannot be had is in the answer.
#[must_use]
pub fn install(folder: &Path) -> Missing {
    let wanted: Vec<Peer> = Peer::FETCHED
        .into_iter()
        .filter(|peer| !folder.join(format!("qemu-{}", peer.version())).is_dir())
        .collect();
    let linux_wanted = !folder.join("linux").is_dir();
    let mut missing = Missing::default();
    if wanted.is_empty() && !linux_wanted {
        return missing;
    }
    let apt = match Apt::new(&folder.join("apt")) {
        Ok(apt) => apt,
        Err(error) => {
            let why = format!("{error:#}");
            missing.peers = wanted.into_iter().map(|peer| (peer, why.clone())).collect();
            missing.linux = linux_wanted.then_some(why);
            return missing;
        }
    };
    for peer in wanted {
        if let Err(error) = install_qemu(&apt, folder, peer) {
            missing.peers.push((peer, format!("{error:#}")));
        }
    }
    if linux_wanted {
        missing.linux = install_linux(&apt, folder).err().map(|error| format!("{error:#}"));
    }
    missing
}

fn install_qemu(apt: &Apt, folder: &Path, peer: Peer) -> Result<()> {
    let offers = apt.offers(PACKAGE)?;
    let offer = offers
        .iter()
        .find(|offer| is_version(offer.upstream(), peer.version()))
        .with_context(|| {
            let all: Vec<&str> = offers.iter().map(|offer| offer.upstream()).collect();
            format!("this machine's release offers no QEMU {}: {}", peer.version(), all.join(", "))
        })?;
    let name = format!("qemu-{}", peer.version());
    whole_or_not_at_all(folder, &name, |root| {
        apt.unpack_closure(PACKAGE, offer, root)?;
        let output = unpacked_command(root)?.arg("--version").output()?;
        ensure!(
            output.status.success(),
            "the unpacked QEMU does not start: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    })
}

fn is_version(offered: &str, wanted: &str) -> bool {
    offered
        .strip_prefix(wanted)
        .is_some_and(|rest| !rest.starts_with(|next: char| next.is_ascii_digit()))
}

fn install_linux(apt: &Apt, folder: &Path) -> Result<()> {
    let image = apt
        .depends(KERNEL_PACKAGE)?
        .into_iter()
        .find(|package| package.starts_with("linux-image-"))
        .with_context(|| format!("{KERNEL_PACKAGE} depends on no kernel image"))?;
    whole_or_not_at_all(folder, "linux", |root| {
        let unpacked = root.join("unpacked");
        apt.unpack_alone(&[&image, "busybox-static"], &unpacked)?;
        let kernel = fs::read_dir(unpacked.join("boot"))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| {
                path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-"))
            })
            .with_context(|| format!("{image} holds no vmlinuz"))?;
        fs::rename(kernel, root.join("vmlinuz"))?;
        let busybox = ["bin/busybox", "usr/bin/busybox"].map(|path| unpacked.join(path));
        let busybox = busybox.iter().find(|path| path.is_file()).context("no busybox in it")?;
        fs::rename(busybox, root.join("busybox"))?;
        fs::remove_dir_all(unpacked)?;
        Ok(())
    })
}

/// Fills a folder under another name first: one that was interrupted is never taken for a whole.
fn whole_or_not_at_all(
    folder: &Path,
    name: &str,
    fill: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let filling = folder.join(format!("{name}.filling-{}", std::process::id()));
    fs::create_dir_all(&filling)?;
    let filled = fill(&filling).and_then(|()| Ok(fs::rename(&filling, folder.join(name))?));
    if filled.is_err() {
        // The first error is the one that matters.
        let _ = fs::remove_dir_all(&filling);
    }
    filled
}

/// QEMU under the loader and the libraries it was built with, with its own firmware and modules:
/// the rest of the machine, and what QEMU itself starts, see nothing of them.
fn unpacked_command(root: &Path) -> Result<Command> {
    ensure!(root.is_dir(), "{} is missing: run cargo xtask peers", root.display());
    let libraries = LIBRARY_FOLDERS.map(|below| root.join(below));
    let loader = libraries
        .iter()
        .map(|folder| folder.join(LOADER))
        .find(|loader| loader.is_file())
        .with_context(|| format!("no {LOADER} in {}", root.display()))?;
    let mut command = Command::new(loader);
    command
        .arg("--library-path")
        .arg(std::env::join_paths(&libraries)?)
        .arg(root.join("usr/bin/qemu-system-x86_64"))
        .arg("-L")
        .arg(root.join("usr/share/seabios"))
        .arg("-L")
        .arg(root.join("usr/share/qemu"))
        .env("QEMU_MODULE_DIR", root.join("usr/lib/x86_64-linux-gnu/qemu"));
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_not_its_longer_neighbour() {
        assert!(is_version("7.2+dfsg-7+deb12u18", "7.2"));
        assert!(is_version("10.0.2+ds-2", "10.0"));
        assert!(!is_version("7.20", "7.2"));
        assert!(!is_version("1:7.2", "7.2"));
    }

    #[test]
    fn a_folder_is_whole_or_absent() {
        let folder = tempfile::tempdir().unwrap();
        let failed = whole_or_not_at_all(folder.path(), "it", |_| anyhow::bail!("cut off"));
        assert!(failed.is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        whole_or_not_at_all(folder.path(), "it", |root| Ok(fs::write(root.join("file"), "")?))
            .unwrap();
        assert!(folder.path().join("it/file").is_file());
    }
}
