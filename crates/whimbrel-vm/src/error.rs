//! Why a reference VM could not be made.

use std::fmt;
use std::io;
use std::path::PathBuf;

use whimbrel::VmError;
use whimbrel_ram::{BlockError, PageSize};

/// Why a reference VM could not be made. Each is one line that says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A number of vCPUs outside 1 to 8.
    #[error("{0} vCPUs asked for: the reference VM has 1 to {max}", max = crate::layout::VCPUS_MAX)]
    Vcpus(u32),
    /// The memory's size is none that can be built.
    #[error("memory of {bytes} bytes: {problem}")]
    Memory {
        /// As asked for.
        bytes: u64,
        /// What is wrong with it.
        problem: String,
    },
    /// The host has less memory than was asked for.
    #[error(
        "too little memory: {asked} asked for, {available} available; ask for less (--memory) or \
         free some"
    )]
    TooLittleMemory {
        /// As asked for.
        asked: Size,
        /// `MemAvailable` of the host.
        available: Size,
    },
    /// The host has fewer free huge pages than the memory needs.
    #[error(
        "too few huge pages: {asked} asked for, {available} free in pages of {page}; reserve more \
         (write the number to {knob}) or take 4k pages"
    )]
    TooFewHugePages {
        /// As asked for.
        asked: Size,
        /// Free on the host.
        available: Size,
        /// Their size.
        page: PageSize,
        /// The file that reserves them.
        knob: PathBuf,
    },
    /// The working set does not fit.
    #[error(
        "the workload's working set of {asked} does not fit into a memory of {memory}: {room} at \
         most"
    )]
    WorkingSet {
        /// As asked for.
        asked: Size,
        /// The VM's.
        memory: Size,
        /// What is left for a working set.
        room: Size,
    },
    /// The file that is to be the memory cannot be.
    #[error("memory in {path}: {source}{}", exists_hint(source), path = path.display())]
    MemoryFile {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file that is the memory cannot be described.
    #[error(transparent)]
    Describe(whimbrel::Error),
    /// The kernel refused the memory.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// `/dev/kvm` cannot be used.
    #[error("/dev/kvm cannot be used: {problem}; {remedy}")]
    Kvm {
        /// What failed.
        problem: String,
        /// What the user can do.
        remedy: &'static str,
    },
    /// The dirty log asked for cannot be had.
    #[error("dirty log {log}: {problem}")]
    DirtyLog {
        /// Which one, by its name in [`DirtyKind`](crate::DirtyKind).
        log: &'static str,
        /// What is missing and what to do.
        problem: String,
    },
    /// The serial port's output cannot be opened.
    #[error("serial port output {path}: {source}", path = path.display())]
    Serial {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file that is to fill the memory cannot be read.
    #[error("cannot fill the memory from {path}: {source}", path = path.display())]
    Fill {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A network was asked for on KVM.
    #[error("the guest on KVM has no driver for a network: take '--accel native', or no '--net'")]
    NoDriver,
    /// The network device cannot be plugged in.
    #[error("network {plug}: {source}")]
    Network {
        /// Where, as on the command line.
        plug: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The vCPU threads did not come up.
    #[error(transparent)]
    Start(VmError),
    /// The kernel refused a thread.
    #[error("cannot start thread {name}: {source}")]
    Thread {
        /// Its name.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
}

fn exists_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AlreadyExists => {
            ": it may be what is left of a guest; when nobody needs it any more, remove it"
        }
        _ => "",
    }
}

/// A number of bytes, shown with the largest unit that divides it, or in tenths of a MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u32, char); 3] = [(40, 'T'), (30, 'G'), (20, 'M')];
        let bytes = self.0;
        let exact = UNITS.into_iter().find(|(shift, _)| bytes.trailing_zeros() >= *shift);
        match exact {
            Some((shift, unit)) if bytes != 0 => write!(f, "{}{unit}", bytes >> shift),
            _ if bytes >= 1 << 20 => {
                // Rounded down: what is said to be there is there.
                let tenths = ((bytes & ((1 << 20) - 1)) * 10) >> 20;
                write!(f, "{}.{tenths}M", bytes >> 20)
            }
            _ => write!(f, "{bytes} bytes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Size;

    #[test]
    fn sizes_are_short() {
        let text = |bytes| Size(bytes).to_string();
        assert_eq!(text(3 << 30), "3G");
        assert_eq!(text(1536 << 20), "1536M");
        assert_eq!(text(20_143_540 << 10), "19671.4M");
        assert_eq!(text((1 << 20) + 1), "1.0M");
        assert_eq!(text(0), "0 bytes");
        assert_eq!(text(65_536), "65536 bytes");
    }
}
