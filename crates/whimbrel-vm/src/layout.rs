//! What lies where in the guest's memory: the same on KVM and on native threads, so that one
//! check serves both.
//!
//! ```text
//! vm.ram        0x00000  header page: magic, console lock
//!               0x01000  a page per vCPU: its orders, its counters, its stack
//!               0x09000  the native guest's network, if it has one
//!               0x10000  page tables of the KVM guest
//!               ..       per vCPU: how often each of its pages has been updated
//!               ..       page picks (zipf)
//!               ..       working set: page p belongs to vCPU p % vcpus
//!               ..       the rest, filled as asked
//! vm.firmware   0x00000  guest code on KVM
//!               0x0f000  constants of the page pattern
//! ```

use std::ops::Range;

use whimbrel_ram::{BlockIndex, TARGET_PAGE};

use crate::error::{Error, Size};
use crate::net::NET_BYTES;
use crate::pattern::PAGE_BYTES;
use crate::workload::{Workload, WorkloadKind};

/// The most vCPUs a reference VM has.
pub(crate) const VCPUS_MAX: u32 = 8;
/// The most memory it has: what one page of page directory pointers reaches, less the firmware's.
pub(crate) const MEMORY_MAX: u64 = 256 << 30;

/// Name of the block that holds the memory.
pub const RAM_NAME: &str = "vm.ram";
/// Name of the block that holds the guest's code and constants.
pub const FIRMWARE_NAME: &str = "vm.firmware";
pub(crate) const RAM: BlockIndex = BlockIndex(0);
pub(crate) const FIRMWARE: BlockIndex = BlockIndex(1);

/// The memory lies above 4 GiB in one piece, clear of the APICs and what KVM reserves below.
pub(crate) const RAM_ADDRESS: u64 = 4 << 30;
pub(crate) const FIRMWARE_ADDRESS: u64 = 0x10_0000;
pub(crate) const FIRMWARE_BYTES: u64 = 64 << 10;
/// Where the constants begin in the firmware.
pub(crate) const CONSTANTS: u64 = 0xf000;

/// Offset of the lock that one vCPU holds while it prints (KVM guest).
pub(crate) const CONSOLE_LOCK: u64 = 0x40;
/// Where the native guest's network begins.
pub(crate) const NET: u64 = 0x9000;
const _: () = assert!(NET >= PAGE_BYTES * (1 + VCPUS_MAX as u64) && NET + NET_BYTES <= PAGE_TABLES);
/// First word of the header page and of each vCPU's page: `whimbrel`.
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"whimbrel");

/// Offsets of the words in a vCPU's page. `ORDERS` are written when the VM is built, the rest by
/// the vCPU. The guest's assembly uses the same names.
pub(crate) mod cpu_page {
    pub(crate) const ID: u64 = 0x08;
    pub(crate) const VCPUS: u64 = 0x10;
    pub(crate) const KIND: u64 = 0x18;
    pub(crate) const SEED: u64 = 0x20;
    /// How many pages of the working set are this vCPU's.
    pub(crate) const OWNED: u64 = 0x28;
    /// How many of these, from the first on, are hot.
    pub(crate) const HOT: u64 = 0x30;
    /// Guest addresses: the first page owned, its table of counts, the picks, the constants.
    pub(crate) const FIRST: u64 = 0x38;
    pub(crate) const STRIDE: u64 = 0x40;
    pub(crate) const TABLE: u64 = 0x48;
    pub(crate) const PICKS: u64 = 0x50;
    pub(crate) const HEADER: u64 = 0x58;
    /// 16 bytes that the KVM guest keeps in an SSE register, to see that it is carried along.
    pub(crate) const SSE_IN: u64 = 0x80;
    pub(crate) const SSE_OUT: u64 = 0x90;

    pub(crate) const UPDATES: u64 = 0x100;
    pub(crate) const CHECKED: u64 = 0x108;
    pub(crate) const ERRORS: u64 = 0x110;
    /// The first error: kind, page, expected, found.
    pub(crate) const ERROR_KIND: u64 = 0x118;
    pub(crate) const ERROR_PAGE: u64 = 0x120;
    pub(crate) const ERROR_EXPECTED: u64 = 0x128;
    pub(crate) const ERROR_FOUND: u64 = 0x130;
    /// One more than the page that is being written, 0 for none.
    pub(crate) const WRITING: u64 = 0x138;
}

/// How many page picks a zipf workload goes by: a power of two.
pub(crate) const PICKS: u64 = 1 << 16;

/// What the guest writes to pages for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WritableKind {
    /// Counters and stack of each vCPU.
    Vcpus,
    /// What the guest knows of its connections.
    Network,
    /// How often each page of the working set has been updated.
    Counts,
    /// The working set itself.
    WorkingSet,
}

impl WritableKind {
    /// `vcpus`, `network`, `counts` or `working-set`.
    pub fn name(self) -> &'static str {
        match self {
            WritableKind::Vcpus => "vcpus",
            WritableKind::Network => "network",
            WritableKind::Counts => "counts",
            WritableKind::WorkingSet => "working-set",
        }
    }
}

/// Pages that the guest writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WritablePages {
    /// What for.
    pub kind: WritableKind,
    /// The block they are in.
    pub block: &'static str,
    /// Their numbers in it, in target pages.
    pub pages: Range<u64>,
}

/// A guest's memory, divided up. Offsets are into `vm.ram`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) memory: u64,
    pub(crate) vcpus: u32,
    pub(crate) workload: Workload,
    /// Whether the guest has a network.
    pub(crate) network: bool,
    /// How many pages the working set has.
    pub(crate) pages: u64,
    tables: u64,
    table_bytes: u64,
    pub(crate) picks: u64,
    pub(crate) working_set: u64,
}

impl Layout {
    /// Divides `memory` bytes up for that many vCPUs.
    pub(crate) fn new(memory: u64, vcpus: u32, workload: Workload) -> Result<Layout, Error> {
        if !(1..=VCPUS_MAX).contains(&vcpus) {
            return Err(Error::Vcpus(vcpus));
        }
        let problem = |problem: String| Error::Memory { bytes: memory, problem };
        if memory > MEMORY_MAX {
            return Err(problem(format!("at most {} can be built", Size(MEMORY_MAX))));
        }
        let tables = PAGE_TABLES + page_table_bytes(memory);
        let picks_bytes = if workload.kind == WorkloadKind::Zipf { PICKS * 4 } else { 0 };
        let asked = match workload.working_set {
            0 => memory / 4,
            asked => asked,
        };
        let pages = (asked / PAGE_BYTES).max(u64::from(vcpus));
        let table_bytes = (pages.div_ceil(u64::from(vcpus)) * 8).next_multiple_of(PAGE_BYTES);
        let picks = tables + table_bytes * u64::from(vcpus);
        let working_set = picks + picks_bytes;
        // A page of the working set needs its own bytes and 8 in a table, which is rounded up.
        let room = memory.saturating_sub(tables + picks_bytes + u64::from(vcpus) * PAGE_BYTES)
            / (PAGE_BYTES + 8)
            * PAGE_BYTES;
        if working_set + pages * PAGE_BYTES > memory {
            if room < u64::from(vcpus) * PAGE_BYTES {
                return Err(problem("too little for this VM and its workload: 4M at least".into()));
            }
            return Err(Error::WorkingSet {
                asked: Size(asked),
                memory: Size(memory),
                room: Size(room),
            });
        }
        let network = false;
        Ok(Layout {
            memory,
            vcpus,
            workload,
            network,
            pages,
            tables,
            table_bytes,
            picks,
            working_set,
        })
    }

    /// The same with a network, or without.
    pub(crate) fn with_network(self, network: bool) -> Layout {
        Layout { network, ..self }
    }

    /// The page of a vCPU.
    pub(crate) fn cpu_page(&self, cpu: u32) -> u64 {
        assert!(cpu < self.vcpus, "a vCPU of this VM");
        PAGE_BYTES * (1 + u64::from(cpu))
    }

    /// How many pages of the working set are `cpu`'s.
    pub(crate) fn owned(&self, cpu: u32) -> u64 {
        (self.pages - u64::from(cpu)).div_ceil(u64::from(self.vcpus))
    }

    /// How many of these are hot.
    pub(crate) fn hot(&self, cpu: u32) -> u64 {
        self.owned(cpu).div_ceil(10)
    }

    /// The number in the working set of the `index`-th page of a vCPU.
    pub(crate) fn page(&self, cpu: u32, index: u64) -> u64 {
        index * u64::from(self.vcpus) + u64::from(cpu)
    }

    /// Where that page lies.
    pub(crate) fn page_offset(&self, page: u64) -> u64 {
        assert!(page < self.pages, "a page of the working set");
        self.working_set + page * PAGE_BYTES
    }

    /// Where a vCPU's table of counts begins.
    pub(crate) fn table(&self, cpu: u32) -> u64 {
        self.tables + self.table_bytes * u64::from(cpu)
    }

    /// Where a vCPU keeps the count of its `index`-th page.
    pub(crate) fn count_offset(&self, cpu: u32, index: u64) -> u64 {
        self.table(cpu) + index * 8
    }

    /// What the guest writes: nothing else of its memory changes while it runs.
    pub(crate) fn writable(&self) -> Vec<WritablePages> {
        let range = |kind, bytes: Range<u64>| WritablePages {
            kind,
            block: RAM_NAME,
            pages: bytes.start / PAGE_BYTES..bytes.end / PAGE_BYTES,
        };
        let own = self.cpu_page(0)..self.cpu_page(self.vcpus - 1) + PAGE_BYTES;
        let mut all = vec![range(WritableKind::Vcpus, own)];
        if self.network {
            all.push(range(WritableKind::Network, NET..NET + NET_BYTES));
        }
        if self.workload.kind != WorkloadKind::Idle {
            all.push(range(WritableKind::Counts, self.tables..self.picks));
            all.push(range(WritableKind::WorkingSet, self.working_set..self.rest().start));
        }
        all
    }

    /// What lies after the working set.
    pub(crate) fn rest(&self) -> Range<u64> {
        self.working_set + self.pages * PAGE_BYTES..self.memory
    }
}

/// Where the KVM guest's page tables begin.
pub(crate) const PAGE_TABLES: u64 = 0x1_0000;

/// Bytes of page tables that reach the firmware and `memory` above 4 GiB in pages of 2 MiB: the
/// root, one page of pointers, and a directory per GiB.
fn page_table_bytes(memory: u64) -> u64 {
    (2 + 1 + memory.div_ceil(1 << 30)) * TARGET_PAGE.bytes() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zipf(working_set: u64) -> Workload {
        Workload { kind: WorkloadKind::Zipf, working_set, ..Workload::default() }
    }

    #[test]
    fn nothing_overlaps() {
        for vcpus in 1..=VCPUS_MAX {
            for working_set in [0, 4096, 1 << 20, 3 << 20] {
                let layout = Layout::new(8 << 20, vcpus, zipf(working_set)).unwrap();
                let owned: u64 = (0..vcpus).map(|cpu| layout.owned(cpu)).sum();
                assert_eq!(owned, layout.pages);
                for cpu in 0..vcpus {
                    let end = layout.count_offset(cpu, layout.owned(cpu));
                    let next = if cpu + 1 < vcpus { layout.table(cpu + 1) } else { layout.picks };
                    assert!(end <= next);
                    assert!(layout.cpu_page(cpu) + PAGE_BYTES <= PAGE_TABLES);
                    let last = layout.page(cpu, layout.owned(cpu) - 1);
                    assert!(layout.page_offset(last) + PAGE_BYTES <= layout.rest().start);
                }
                assert!(layout.picks + PICKS * 4 <= layout.working_set);
                assert!(layout.rest().start <= layout.memory);
            }
        }
    }

    #[test]
    fn what_is_said_to_fit_fits() {
        let error = Layout::new(8 << 20, 2, zipf(1 << 30)).unwrap_err();
        let Error::WorkingSet { room, .. } = error else { panic!("{error}") };
        Layout::new(8 << 20, 2, zipf(room.0)).unwrap();
        assert!(Layout::new(8 << 20, 2, zipf(room.0 + 64 * 4096)).is_err());
        assert!(matches!(Layout::new(64 << 10, 1, zipf(0)), Err(Error::Memory { .. })));
        assert!(matches!(Layout::new(8 << 20, 9, zipf(0)), Err(Error::Vcpus(9))));
    }
}
