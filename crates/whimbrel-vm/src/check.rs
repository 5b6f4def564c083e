//! Whether the guest's memory is what the guest left there.

use std::fmt;
use std::time::Duration;

use whimbrel_ram::{GuestRam, RamBlock};

use crate::guarded::{self, Ended};
use crate::layout::{CONSTANTS, FIRMWARE, Layout, MAGIC, RAM, cpu_page};
use crate::pattern::{Constants, Mismatch, MismatchKind, Page};

/// What the guest's checks of itself found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SelfCheck {
    /// Page updates the guest has done since it was built, on any host.
    pub updates: u64,
    /// Pages looked at: by the guest at its updates while it runs; when it is stopped, these and
    /// every page of the working set once.
    pub pages_checked: u64,
    /// Pages that were not as the guest left them, and registers that were not.
    pub errors: u64,
    /// The first of these.
    pub first_error: Option<CheckError>,
    /// The longest time between two updates of a vCPU. Across a migration it holds the downtime,
    /// as far as the two hosts' clocks agree.
    pub gap_max: Duration,
}

impl SelfCheck {
    /// Whether nothing was found.
    pub fn passed(&self) -> bool {
        self.errors == 0
    }

    fn error(&mut self, vcpu: u32, page: u64, mismatch: Mismatch) {
        self.errors += 1;
        self.first_error.get_or_insert(CheckError::new(vcpu, page, mismatch));
    }
}

/// Something in the guest's memory is not as the guest left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckError {
    /// The vCPU whose page it is.
    pub vcpu: u32,
    /// The page's number in the working set.
    pub page: u64,
    /// What differs.
    pub kind: MismatchKind,
    /// As the guest remembers it.
    pub expected: u64,
    /// As it is.
    pub found: u64,
}

impl CheckError {
    fn new(vcpu: u32, page: u64, mismatch: Mismatch) -> CheckError {
        let Mismatch { kind, expected, found } = mismatch;
        CheckError { vcpu, page, kind, expected, found }
    }
}

impl fmt::Display for CheckError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CheckError { vcpu, page, kind, expected, found } = self;
        let what = match kind {
            MismatchKind::Number => "another page lies here",
            MismatchKind::Count if found < expected => "stale",
            MismatchKind::Count => "newer than the guest's table",
            MismatchKind::Seed => "of another workload",
            MismatchKind::Checksum => "torn or corrupt",
            MismatchKind::Payload => "corrupt",
            MismatchKind::Updates => "vCPU state and memory are of different moments",
            MismatchKind::Register => "a floating point register was lost",
            MismatchKind::Lost => return write!(f, "vcpu-{vcpu}, page {page}: lost for ever"),
        };
        write!(f, "vcpu-{vcpu}, page {page}: {what} (expected {expected:#x}, found {found:#x})")
    }
}

/// What is found of a page that is lost.
const LOST: Mismatch = Mismatch { kind: MismatchKind::Lost, expected: 0, found: 0 };

/// The words of one vCPU's page. They all lie inside it, and it inside the memory.
fn cpu_word(ram: &GuestRam, layout: &Layout, cpu: u32, word: u64) -> Result<u64, Ended> {
    guarded::load(ram.block(RAM), layout.cpu_page(cpu) + word)
}

pub(crate) fn ram_word(block: &RamBlock, offset: u64) -> u64 {
    block.load_u64(offset).expect("inside the memory, as laid out")
}

/// The constants in the firmware.
fn constants(ram: &GuestRam) -> Result<Constants, Ended> {
    let load = |offset| guarded::load(ram.block(FIRMWARE), offset);
    Ok(Constants { multiplier: load(CONSTANTS)?, increment: load(CONSTANTS + 8)? })
}

/// What the guest itself has found so far.
pub(crate) fn guest_counters(ram: &GuestRam, layout: &Layout) -> SelfCheck {
    let mut found = SelfCheck::default();
    for cpu in 0..layout.vcpus {
        if add_counters(ram, layout, cpu, &mut found).is_err() {
            found.error(cpu, 0, LOST);
        }
    }
    found
}

fn add_counters(
    ram: &GuestRam,
    layout: &Layout,
    cpu: u32,
    found: &mut SelfCheck,
) -> Result<(), Ended> {
    let word = |word| cpu_word(ram, layout, cpu, word);
    found.updates += word(cpu_page::UPDATES)?;
    found.pages_checked += word(cpu_page::CHECKED)?;
    let errors = word(cpu_page::ERRORS)?;
    found.errors += errors;
    if let Some(kind) = MismatchKind::from_code(word(cpu_page::ERROR_KIND)?)
        && errors > 0
    {
        let (expected, page) = (word(cpu_page::ERROR_EXPECTED)?, word(cpu_page::ERROR_PAGE)?);
        let mismatch = Mismatch { kind, expected, found: word(cpu_page::ERROR_FOUND)? };
        found.first_error.get_or_insert(CheckError::new(cpu, page, mismatch));
    }
    Ok(())
}

/// Looks at every page of the working set, while the guest is stopped.
pub(crate) fn full(ram: &GuestRam, layout: &Layout) -> SelfCheck {
    let mut found = guest_counters(ram, layout);
    for cpu in 0..layout.vcpus {
        // What of its own a vCPU has lost is found above.
        let _ = check_cpu(ram, layout, cpu, &mut found);
    }
    found
}

fn check_cpu(
    ram: &GuestRam,
    layout: &Layout,
    cpu: u32,
    found: &mut SelfCheck,
) -> Result<(), Ended> {
    let constants = constants(ram).inspect_err(|_| found.error(cpu, 0, LOST))?;
    let magic = cpu_word(ram, layout, cpu, 0)?;
    if magic != MAGIC {
        let mismatch = Mismatch { kind: MismatchKind::Register, expected: MAGIC, found: magic };
        found.error(cpu, 0, mismatch);
    }
    check_pages(ram, layout, constants, cpu, found)
}

fn check_pages(
    ram: &GuestRam,
    layout: &Layout,
    constants: Constants,
    cpu: u32,
    found: &mut SelfCheck,
) -> Result<(), Ended> {
    let block = ram.block(RAM);
    // What a KVM guest was stopped in the middle of is for the guest itself to check.
    let writing = cpu_word(ram, layout, cpu, cpu_page::WRITING)?.checked_sub(1);
    let mut copy = Page::zeroed();
    let (mut counts, mut lost) = (0u64, false);
    for index in 0..layout.owned(cpu) {
        let page = layout.page(cpu, index);
        let Ok(count) = guarded::load(block, layout.count_offset(cpu, index)) else {
            found.error(cpu, page, LOST);
            lost = true;
            continue;
        };
        counts = counts.wrapping_add(count);
        if writing == Some(page) {
            continue;
        }
        found.pages_checked += 1;
        if guarded::read(block, layout.page_offset(page), &mut copy.0).is_err() {
            found.error(cpu, page, LOST);
            continue;
        }
        if let Err(mismatch) = copy.check_all(constants, layout.workload.seed, page, count) {
            found.error(cpu, page, mismatch);
        }
    }
    let updates = cpu_word(ram, layout, cpu, cpu_page::UPDATES)?;
    // The guest adds to the table first and to the sum a few instructions later.
    let in_between = writing.is_some() && counts == updates.wrapping_add(1);
    if counts != updates && !in_between && !lost {
        let kind = MismatchKind::Updates;
        found.error(cpu, 0, Mismatch { kind, expected: updates, found: counts });
    }
    Ok(())
}
