//! What a reference VM is made of, and how its parts are written on a command line.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use whimbrel_ram::PageSize;

use crate::net::NetConfig;
use crate::workload::Workload;

/// What a reference VM is made of.
#[derive(Clone, Debug)]
pub struct Config {
    /// The guest's memory, in bytes: a multiple of `page_size`.
    pub memory: u64,
    /// How many vCPUs, 1 to 8.
    pub vcpus: u32,
    /// What runs them.
    pub accel: AccelChoice,
    /// The host pages behind the memory: 4 KiB, 2 MiB or 1 GiB.
    pub page_size: PageSize,
    /// Whether the memory is a memfd that others can map, and not private. Huge pages are always
    /// shared.
    pub shared: bool,
    /// A file, which must not be there yet, to be the memory: shared, so that it outlives the process.
    /// It is described beside it ([`whimbrel::rescue::describe`]), unless its content is still to come,
    /// and never removed.
    pub memory_path: Option<PathBuf>,
    /// How written pages are found.
    pub dirty: DirtyKind,
    /// What the guest does.
    pub workload: Workload,
    /// What the memory outside the working set holds.
    pub fill: Fill,
    /// Whether every page is taken from the host before the guest starts.
    pub prefault: bool,
    /// Whether memory and device state are to come from a migration: nothing is written to the
    /// memory, and the guest runs only after [`load`](whimbrel::Vm::load).
    pub incoming: bool,
    /// Where the serial port's output goes, beside the buffer that is always kept.
    pub serial: SerialOutput,
    /// The VM's UUID, for capability `validate-uuid`.
    pub uuid: Option<[u8; 16]>,
    /// The network device, if there is to be one: native only. A VM that waits takes the guest's own
    /// names from its RAM.
    pub network: Option<NetConfig>,
}

impl Config {
    /// One idle vCPU with `memory` bytes of private 4 KiB pages on whatever accelerator there is.
    pub fn new(memory: u64) -> Config {
        Config {
            memory,
            vcpus: 1,
            accel: AccelChoice::Auto,
            page_size: PageSize::SIZE_4K,
            shared: false,
            memory_path: None,
            dirty: DirtyKind::Auto,
            workload: Workload::default(),
            fill: Fill::Zero,
            prefault: false,
            incoming: false,
            serial: SerialOutput::Buffer,
            uuid: None,
            network: None,
        }
    }
}

/// What runs the vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// Real vCPUs on `/dev/kvm`.
    Kvm,
    /// Threads of this process that do what the guest would do.
    Native,
}

impl Accel {
    /// `kvm` or `native`.
    pub fn name(self) -> &'static str {
        match self {
            Accel::Kvm => "kvm",
            Accel::Native => "native",
        }
    }
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is to run the vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AccelChoice {
    /// KVM where it is usable, else native.
    #[default]
    Auto,
    /// KVM, or an error.
    Kvm,
    /// Native.
    Native,
}

/// How written pages are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirtyKind {
    /// On KVM its log; on native threads a scan of the page tables, or where that is impossible
    /// the threads' own account of what they wrote.
    #[default]
    Auto,
    /// KVM's bitmap, with manual clearing. KVM only.
    KvmLog,
    /// KVM's ring per vCPU. KVM only.
    KvmRing,
    /// `PAGEMAP_SCAN` with asynchronous write protection. Native only: on KVM it would not see
    /// what the guest writes through its own mapping.
    PagemapScan,
    /// The vCPU threads' own account. Native only.
    OwnWrites,
}

impl DirtyKind {
    /// As on the command line: `auto`, `kvm-log`, `kvm-ring`, `pagemap-scan`, `own-writes`.
    pub fn name(self) -> &'static str {
        match self {
            DirtyKind::Auto => "auto",
            DirtyKind::KvmLog => "kvm-log",
            DirtyKind::KvmRing => "kvm-ring",
            DirtyKind::PagemapScan => "pagemap-scan",
            DirtyKind::OwnWrites => "own-writes",
        }
    }
}

/// What the memory outside the working set holds when a VM is built.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Fill {
    /// Zero pages, not populated.
    #[default]
    Zero,
    /// Bytes that no compressor makes smaller, the same for the same workload seed.
    Random,
    /// What a file holds at the same place, over and over again if it is shorter.
    File(PathBuf),
}

/// Where the serial port's output goes, beside the buffer that is always kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SerialOutput {
    /// Nowhere else.
    #[default]
    Buffer,
    /// To standard output.
    Stdout,
    /// To standard error.
    Stderr,
    /// To the end of a file, created when it is not there.
    File(PathBuf),
}

/// A value on the command line that names nothing we know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} {found:?}: expected {expected}")]
pub struct ParseError {
    pub(crate) what: &'static str,
    pub(crate) found: String,
    pub(crate) expected: &'static str,
}

impl ParseError {
    pub(crate) fn new(what: &'static str, found: &str, expected: &'static str) -> ParseError {
        ParseError { what, found: found.to_owned(), expected }
    }
}

impl FromStr for AccelChoice {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        match text {
            "auto" => Ok(AccelChoice::Auto),
            "kvm" => Ok(AccelChoice::Kvm),
            "native" => Ok(AccelChoice::Native),
            _ => Err(ParseError::new("accelerator", text, "kvm, native or auto")),
        }
    }
}

impl FromStr for DirtyKind {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        use DirtyKind::{Auto, KvmLog, KvmRing, OwnWrites, PagemapScan};
        [Auto, KvmLog, KvmRing, PagemapScan, OwnWrites]
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or_else(|| {
                let expected = "auto, kvm-log, kvm-ring, pagemap-scan or own-writes";
                ParseError::new("dirty log", text, expected)
            })
    }
}

impl FromStr for Fill {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        match text {
            "zero" => Ok(Fill::Zero),
            "random" => Ok(Fill::Random),
            _ => match text.strip_prefix("file:").filter(|path| !path.is_empty()) {
                Some(path) => Ok(Fill::File(path.into())),
                None => Err(ParseError::new("fill", text, "zero, random or file:PATH")),
            },
        }
    }
}

impl FromStr for SerialOutput {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        match text {
            "none" => Ok(SerialOutput::Buffer),
            "stdout" => Ok(SerialOutput::Stdout),
            "stderr" => Ok(SerialOutput::Stderr),
            _ => match text.strip_prefix("file:").filter(|path| !path.is_empty()) {
                Some(path) => Ok(SerialOutput::File(path.into())),
                None => {
                    let expected = "none, stdout, stderr or file:PATH";
                    Err(ParseError::new("serial output", text, expected))
                }
            },
        }
    }
}

/// Bytes from a number with one of QEMU's suffixes (`k`, `M`, `G`, `T`, of 1024 each): `512M`.
/// Without one it is bytes.
pub fn parse_size(text: &str) -> Result<u64, ParseError> {
    let error = || {
        ParseError::new("size", text, "a whole number of bytes, or one with k, M, G or T: 512M, 1G")
    };
    let unit = text.bytes().last().ok_or_else(error)?;
    let shift = match unit.to_ascii_uppercase() {
        b'0'..=b'9' => None,
        b'K' => Some(10),
        b'M' => Some(20),
        b'G' => Some(30),
        b'T' => Some(40),
        _ => return Err(error()),
    };
    let digits = if shift.is_some() { &text[..text.len() - 1] } else { text };
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(error());
    }
    let number: u64 = digits.parse().map_err(|_| error())?;
    number.checked_mul(1 << shift.unwrap_or(0)).ok_or_else(error)
}

/// `4k`, `2M` or `1G`.
pub fn parse_page_size(text: &str) -> Result<PageSize, ParseError> {
    [PageSize::SIZE_4K, PageSize::SIZE_2M, PageSize::SIZE_1G]
        .into_iter()
        .find(|size| parse_size(text) == Ok(size.bytes() as u64))
        .ok_or_else(|| ParseError::new("page size", text, "4k, 2M or 1G"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_qemus_suffixes() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("64k"), Ok(64 << 10));
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("1G"), Ok(1 << 30));
        for bad in ["", "G", "1.5G", "-1", "+1", "1GB", "99999999999T", "1 G", "0x10", "1é"] {
            assert!(parse_size(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn errors_say_what_is_expected() {
        let error = "tcg".parse::<AccelChoice>().unwrap_err();
        assert_eq!(error.to_string(), "accelerator \"tcg\": expected kvm, native or auto");
        assert!(parse_page_size("8k").is_err());
        assert_eq!(parse_page_size("2M"), Ok(PageSize::SIZE_2M));
        assert_eq!("kvm-ring".parse(), Ok(DirtyKind::KvmRing));
        assert_eq!("file:/a b".parse(), Ok(Fill::File("/a b".into())));
        let error = "file:".parse::<Fill>().unwrap_err();
        assert_eq!(error.to_string(), "fill \"file:\": expected zero, random or file:PATH");
    }
}
