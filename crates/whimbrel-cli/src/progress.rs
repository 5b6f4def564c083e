//! How long work goes: a line that is redrawn on a terminal, plain lines elsewhere.

use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use whimbrel::MigrationInfo;
use whimbrel_control::MigrationReport;

use crate::failure::harmless;

/// Between two looks on a terminal.
const REDRAW: Duration = Duration::from_millis(100);
/// Between two plain lines.
const PLAIN: Duration = Duration::from_secs(1);

/// Shows progress on the standard error until dropped.
#[derive(Debug)]
pub(crate) struct Line {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Line {
    /// Shows what `now` says again and again; nothing while it says nothing.
    pub(crate) fn start(now: impl Fn() -> Option<String> + Send + 'static) -> io::Result<Line> {
        let (end, ended) = mpsc::channel();
        let thread = thread::Builder::new().name("progress".into()).spawn(move || {
            let mut shown = Shown::new();
            while ended.recv_timeout(shown.period()) == Err(RecvTimeoutError::Timeout) {
                if let Some(text) = now() {
                    shown.show(&text);
                }
            }
            shown.clear();
        })?;
        Ok(Line { end: Some(end), thread: Some(thread) })
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // A progress line that could not be drawn is no reason to fail.
            let _ = thread.join();
        }
    }
}

/// What stands on the standard error now.
#[derive(Debug)]
pub(crate) struct Shown {
    terminal: bool,
    drawn: bool,
    last: String,
    next: Instant,
}

impl Shown {
    pub(crate) fn new() -> Shown {
        let terminal = io::stderr().is_terminal();
        Shown { terminal, drawn: false, last: String::new(), next: Instant::now() }
    }

    /// Shows what `now` says when it is time for it: less often where lines are not redrawn in
    /// place.
    pub(crate) fn show_now_and_then(&mut self, now: impl FnOnce() -> Option<String>) {
        if Instant::now() < self.next {
            return;
        }
        self.next = Instant::now() + self.period();
        if let Some(text) = now() {
            self.show(&text);
        }
    }

    fn period(&self) -> Duration {
        if self.terminal { REDRAW } else { PLAIN }
    }

    /// Shows `text`, in place of what was shown before where that is possible.
    pub(crate) fn show(&mut self, text: &str) {
        let text = &*harmless(text);
        let mut out = io::stderr().lock();
        // A standard error that is gone is no reason to fail.
        if self.terminal {
            let _ = write!(out, "\r\x1b[2K{text}");
            let _ = out.flush();
            self.drawn = true;
        } else if self.last != text {
            let _ = writeln!(out, "{text}");
            self.last = text.into();
        }
    }

    /// Removes what is redrawn in place.
    pub(crate) fn clear(&mut self) {
        if self.drawn {
            let _ = write!(io::stderr().lock(), "\r\x1b[2K");
            self.drawn = false;
        }
    }
}

/// A source's report as one line: bytes, rate, remaining; before the guest has left, dirty rate and
/// expected downtime; after it has, how many pages it had to wait for.
pub(crate) fn describe(info: &MigrationInfo) -> Option<String> {
    let status = info.status?;
    let Some(ram) = &info.ram else { return Some(status.to_string()) };
    if status.is_postcopy() {
        return Some(format!(
            "{status}: sent {}, {:.0} MB/s, remaining {}, {} faults",
            mib(ram.transferred),
            ram.mbps / 8.0,
            mib(ram.remaining),
            ram.postcopy_requests,
        ));
    }
    let mut text = format!(
        "{status}: sent {}, {:.0} MB/s, dirtied {:.1} MB/s, remaining {}",
        mib(ram.transferred),
        ram.mbps / 8.0,
        (ram.dirty_pages_rate * ram.page_size) as f64 / 1e6,
        mib(ram.remaining),
    );
    if let Some(expected) = info.expected_downtime {
        text += &format!(", expected downtime {expected} ms");
    }
    if let Some(percent) = info.cpu_throttle_percentage {
        text += &format!(", guest slowed by {percent} %");
    }
    Some(text)
}

/// The same while the link is lost: how long it has been, and how far a recovery is on either side.
pub(crate) fn describe_lost(
    source: &MigrationReport,
    destination: Option<&MigrationReport>,
    lost: Duration,
) -> String {
    format!(
        "link lost, recovering for {} s: the source is {}, the destination {}, remaining {}",
        lost.as_secs(),
        source.status,
        destination.map_or("silent", |report| report.status.name()),
        source.info.ram.as_ref().map_or_else(|| "unknown".into(), |ram| mib(ram.remaining)),
    )
}

/// Bytes for people.
pub(crate) fn mib(bytes: u64) -> String {
    match bytes {
        0..0x0010_0000 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

#[cfg(test)]
mod tests {
    use whimbrel::{MigrationStats, MigrationStatus};

    use super::*;

    #[test]
    fn a_line_says_what_matters_at_the_time() {
        let ram = MigrationStats {
            transferred: 3 << 20,
            remaining: 512 << 10,
            mbps: 80.0,
            postcopy_requests: 7,
            page_size: 4096,
            ..MigrationStats::default()
        };
        let line = |status| {
            let info = MigrationInfo {
                status: Some(status),
                ram: Some(ram.clone()),
                expected_downtime: Some(5),
                ..MigrationInfo::default()
            };
            describe(&info).unwrap()
        };
        assert_eq!(
            line(MigrationStatus::PostcopyActive),
            "postcopy-active: sent 3 MiB, 10 MB/s, remaining 512 KiB, 7 faults"
        );
        let precopy = line(MigrationStatus::Active);
        assert!(precopy.contains("dirtied 0.0 MB/s") && precopy.ends_with("downtime 5 ms"));
        assert_eq!(describe(&MigrationInfo::default()), None);
    }
}
