//! Debian's cloud kernel with a busybox, under TCG: a real operating system's devices, timers and
//! random numbers. Twice a second it writes its uptime, its boot id (made from the kernel's
//! randomness), and the checksum of 8 MiB it took from the kernel's random numbers at boot.

use std::fs;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use super::cpio::Archive;
use super::{Guest, both_sides};
use crate::console::Report;
use crate::install::LinuxParts;

const INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev
$b mount -t tmpfs -o size=32m tmpfs /tmp
exec >/dev/ttyS0 2>&1
$b dd if=/dev/urandom of=/tmp/random bs=64k count=128 2>/dev/null
while true; do
    read up idle </proc/uptime
    read id </proc/sys/kernel/random/boot_id
    sum=$($b md5sum </tmp/random)
    echo "uptime=$up boot_id=$id sum=${sum%% *}"
    $b sleep 0.5
done
"#;

/// The longest a guest's own clock may seem to jump over a move. It stands while the guest is
/// stopped; what is left is half a second of sleep and a TCG guest short of processor time.
const UPTIME_STEP_MAX: f64 = 10.0;

/// The guest.
#[derive(Debug, Clone)]
pub struct Linux {
    parts: LinuxParts,
}

impl Linux {
    /// The guest made of what `cargo xtask peers` fetched.
    ///
    /// # Errors
    /// It was not fetched.
    pub fn new() -> Result<Self> {
        Ok(Self { parts: LinuxParts::find()? })
    }

    fn initrd(&self) -> Result<Vec<u8>> {
        let busybox = fs::read(&self.parts.busybox)
            .with_context(|| self.parts.busybox.display().to_string())?;
        let mut archive = Archive::default();
        for folder in ["bin", "dev", "proc", "tmp"] {
            archive.directory(folder);
        }
        archive.executable("bin/busybox", &busybox);
        archive.executable("init", INIT.as_bytes());
        Ok(archive.finish())
    }
}

impl Guest for Linux {
    fn arguments(&self, folder: &Path) -> Result<Vec<String>> {
        let initrd = folder.join("initrd.cpio");
        if !initrd.exists() {
            fs::write(&initrd, self.initrd()?).with_context(|| initrd.display().to_string())?;
        }
        let (kernel, initrd) = (self.parts.kernel.display(), initrd.display());
        let line = "console=ttyS0 quiet panic=-1 rdinit=/init";
        let mut arguments: Vec<String> = ["-append", line].map(str::to_owned).to_vec();
        arguments.extend(["-kernel".to_owned(), kernel.to_string()]);
        arguments.extend(["-initrd".to_owned(), initrd.to_string()]);
        // More RAM blocks and more device state than the bare machine has.
        arguments.extend(["-device", "VGA", "-device", "virtio-rng-pci"].map(str::to_owned));
        Ok(arguments)
    }

    fn mebibytes(&self) -> u32 {
        160
    }

    fn settled_lines(&self) -> usize {
        2
    }

    fn written(&self) -> Option<Vec<Range<u32>>> {
        None
    }

    fn check_continues(&self, before: &str, after: &str) -> Result<()> {
        let (before, after) = both_sides(before, after)?;
        let first = &before[0];
        let mut last_uptime = uptime(first)?;
        // A line cut by the move is whole on neither side, so the sides are read apart.
        for report in before[1..].iter().chain(&after) {
            for field in ["boot_id", "sum"] {
                let (expected, found) = (first.get(field)?, report.get(field)?);
                ensure!(found == expected, "{field}: {expected} before, now {found}");
            }
            let uptime = uptime(report)?;
            let step = uptime - last_uptime;
            ensure!(step > 0.0, "the uptime went from {last_uptime} to {uptime}");
            ensure!(step < UPTIME_STEP_MAX, "the uptime leapt from {last_uptime} to {uptime}");
            last_uptime = uptime;
        }
        Ok(())
    }
}

fn uptime(report: &Report) -> Result<f64> {
    report.get("uptime")?.parse().with_context(|| format!("uptime in {report:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(uptime: f64, id: &str, sum: &str) -> String {
        format!("uptime={uptime:.2} boot_id={id} sum={sum}\r\n")
    }

    #[test]
    fn every_loss_is_noticed() {
        let parts = LinuxParts { kernel: "vmlinuz".into(), busybox: "busybox".into() };
        let guest = Linux { parts };
        let before = line(3.0, "id", "sum") + &line(3.5, "id", "sum") + "upti";
        guest.check_continues(&before, &line(4.5, "id", "sum")).unwrap();
        for bad in [
            line(0.5, "id", "sum"),   // started again
            line(60.0, "id", "sum"),  // its clock ran on while it was kept
            line(4.0, "new", "sum"),  // another boot
            line(4.0, "id", "other"), // memory changed
            String::new(),            // never ran
        ] {
            assert!(guest.check_continues(&before, &bad).is_err(), "{bad}");
        }
    }
}
