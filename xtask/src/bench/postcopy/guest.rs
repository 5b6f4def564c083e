//! The two guests: the command lines they are started with, and how a QEMU's is read.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use whimbrel_peers::qmp::Qmp;
use whimbrel_peers::wait;

use super::clock::{NOW_AT, RECORD_BYTES, Rate, Record};
use super::pair::Pages;
use super::writer::{RECORD_AT, Writer};
use crate::bench::contender::{Memory, Qemu};

/// From power on to random stores: the firmware, and filling the memory, without KVM.
const FILL_MAX: Duration = Duration::from_secs(120);
/// How far two looks at the guest's clock are apart, to know its rate to a thousandth.
const CLOCK_APART: Duration = Duration::from_secs(1);

/// The guest of the bench, in the shape of a QEMU's.
#[derive(Debug)]
pub(in crate::bench) struct QemuGuest {
    qemu: Qemu,
    memory: Memory,
    /// Where its images are.
    folder: PathBuf,
    /// Where QEMU puts pieces of guest memory.
    piece: PathBuf,
}

/// What is known of a running guest before it moves.
#[derive(Debug, Clone, Copy)]
pub(in crate::bench) struct Settled {
    pub(super) rate: Rate,
    /// How many touches a second are as slow as a fault while there is no migration.
    pub(super) stray_per_s: f64,
}

impl QemuGuest {
    /// Writes the guest's images into this folder.
    pub(in crate::bench) fn new(
        qemu: Qemu,
        memory: Memory,
        writer: Writer,
        folder: &Path,
    ) -> Result<Self> {
        let guest = Self { qemu, memory, folder: folder.to_owned(), piece: folder.join("piece") };
        for pages in [Pages::Small, Pages::Huge] {
            let image = guest.image(pages);
            let written = fs::write(&image, writer.image(pages));
            written.with_context(|| image.display().to_string())?;
        }
        Ok(guest)
    }

    fn image(&self, pages: Pages) -> PathBuf {
        self.folder.join(format!("writer-{}", pages.name()))
    }

    /// A QEMU that boots it, or waits for it.
    pub(in crate::bench) fn command(&self, pages: Pages, incoming: bool) -> Result<Command> {
        let bytes = self.memory.bytes();
        let backend = match pages {
            Pages::Small => format!("memory-backend-ram,id=ram,size={bytes}"),
            Pages::Huge => {
                format!("memory-backend-memfd,id=ram,size={bytes},hugetlb=on,hugetlbsize=2M")
            }
        };
        let mut command = self.qemu.command()?;
        command
            .args(["-accel", "tcg", "-machine", "q35,memory-backend=ram", "-nodefaults"])
            .args(["-no-user-config", "-display", "none", "-m", &self.memory.argument()])
            .args(["-object", &backend, "-kernel"])
            .arg(self.image(pages));
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        command.arg("-qmp");
        Ok(command)
    }

    /// Waits until the guest writes at random, and gets to know its clock.
    pub(in crate::bench) fn settle(&self, qmp: &mut Qmp) -> Result<Settled> {
        let (begun, first) = wait::until("the guest to fill its memory", FILL_MAX, || {
            let at = Instant::now();
            Ok(self.record(qmp)?.map(|record| (at, record)))
        })?;
        std::thread::sleep(CLOCK_APART);
        let apart = begun.elapsed();
        let later = self.whole_record(qmp)?;
        let rate = later.rate(&first, apart)?;
        let stray = u32::try_from(later.stray(&first, rate)?)?;
        let stray_per_s = f64::from(stray) / apart.as_secs_f64();
        Ok(Settled { rate, stray_per_s })
    }

    /// The record of a guest that has long been ready.
    pub(super) fn whole_record(&self, qmp: &mut Qmp) -> Result<Record> {
        self.record(qmp)?.context("the guest's record is gone: its memory is not what it was")
    }

    /// The guest's clock after its last touch: it stands still while the guest waits for a page.
    pub(in crate::bench) fn last_touch(qmp: &mut Qmp) -> Result<u64> {
        let look = format!("xp /2xw {:#x}", RECORD_AT + u32::from(NOW_AT));
        let said = qmp.execute("human-monitor-command", &json!({ "command-line": look }))?;
        two_words(said.as_str().unwrap_or_default())
    }

    fn record(&self, qmp: &mut Qmp) -> Result<Option<Record>> {
        let arguments = json!({ "val": RECORD_AT, "size": RECORD_BYTES, "filename": self.piece });
        qmp.execute("pmemsave", &arguments)?;
        Record::parse(&fs::read(&self.piece)?)
    }
}

/// The reference VM with a workload that does the same.
pub(in crate::bench) fn whimbrel_command(
    binary: &Path,
    memory: Memory,
    writer: Writer,
    pages: Pages,
    incoming: bool,
) -> Command {
    let mut command = Command::new(binary);
    let workload = format!("uniform,rate=0,working-set={}M", writer.working_set_mib());
    command
        .args(["vm", "--accel", "native", "--vcpus", "1", "--serial", "none"])
        .args(["--memory", &memory.argument(), "--page-size", pages.name()])
        .args(["--workload", &workload]);
    if incoming {
        command.args(["--incoming", "defer"]);
    }
    command.arg("--qmp");
    command
}

/// From a line like `0000000000200008: 0x00000001 0x00000002`, the low word first.
fn two_words(said: &str) -> Result<u64> {
    let mut words = said.split_whitespace().filter_map(|word| word.strip_prefix("0x"));
    let (Some(low), Some(high)) = (words.next(), words.next()) else {
        bail!("no two words of guest memory in {said:?}")
    };
    let word = |text| u32::from_str_radix(text, 16).with_context(|| said.to_owned());
    Ok(u64::from(word(high)?) << 32 | u64::from(word(low)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_read_from_what_the_monitor_says() {
        let said = "0000000000200008: 0x89abcdef 0x00000012\r\n";
        assert_eq!(two_words(said).unwrap(), 0x12_89ab_cdef);
        assert!(two_words("Cannot access memory").is_err());
    }
}
