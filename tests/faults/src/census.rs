//! What a process has: threads, descriptors, memory.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

/// Descriptors that a VM may have more of after a migration than before: what its report and its
/// wakers are, until the next migration takes their place.
const FDS_KEPT: usize = 8;
/// Memory that it may have more of, in KiB: stacks and arenas of threads that are gone, tables as
/// large as the guest's memory wants.
const RSS_KEPT: u64 = 12 << 10;

/// How the names of the threads begin that a migration has.
const ENGINES: [&str; 2] = ["source/", "dest/"];

/// Counted at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Census {
    /// By their names.
    threads: BTreeMap<String, usize>,
    fds: usize,
    rss_kib: u64,
}

impl Census {
    pub(crate) fn take(pid: u32) -> Result<Census> {
        let process = PathBuf::from(format!("/proc/{pid}"));
        let mut threads = BTreeMap::new();
        for task in fs::read_dir(process.join("task"))?.flatten() {
            // It may have ended since the directory was read.
            if let Ok(name) = fs::read_to_string(task.path().join("comm")) {
                *threads.entry(name.trim_end().to_owned()).or_insert(0) += 1;
            }
        }
        let fds = fs::read_dir(process.join("fd"))?.count();
        let status = fs::read_to_string(process.join("status"))?;
        let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let rss = rss.and_then(|line| line.trim().strip_suffix("kB")).context("no VmRSS")?;
        Ok(Census { threads, fds, rss_kib: rss.trim().parse()? })
    }

    /// What is more now than it was `before`, the guest's memory (in KiB) aside.
    pub(crate) fn leaked_since(&self, before: &Census, guest_kib: u64) -> Option<String> {
        let more = self
            .threads
            .iter()
            .filter(|(name, count)| before.threads.get(*name).copied().unwrap_or(0) < **count);
        let threads: Vec<&str> = more.map(|(name, _)| name.as_str()).collect();
        // One that had just begun had no name of its own yet.
        let count = |census: &Census| census.threads.values().sum::<usize>();
        let engines = threads.iter().any(|name| ENGINES.iter().any(|of| name.starts_with(of)));
        if engines || count(self) > count(before) {
            return Some(format!("threads that were not there before: {}", threads.join(", ")));
        }
        if self.fds > before.fds + FDS_KEPT {
            return Some(format!("{} descriptors, {} before", self.fds, before.fds));
        }
        if self.rss_kib > before.rss_kib + guest_kib + RSS_KEPT {
            return Some(format!(
                "{} KiB of memory, {} before, {guest_kib} of it the guest's",
                self.rss_kib, before.rss_kib
            ));
        }
        None
    }

    #[cfg(test)]
    pub(crate) fn fds(&self) -> usize {
        self.fds
    }
}

/// Where each thread of a process is, for a report on what hangs.
pub(crate) fn stacks(pid: u32) -> String {
    let mut text = String::new();
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return format!("process {pid} is gone\n");
    };
    for task in tasks.flatten() {
        // Each of them may be kept from us.
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let state = read("status");
        let state = state.lines().find(|line| line.starts_with("State:")).unwrap_or("");
        text.push_str(&format!("{} {}: {}", pid, task.file_name().display(), read("comm")));
        text.push_str(&format!("    {state}, wchan {}\n", read("wchan")));
        for line in read("stack").lines() {
            text.push_str(&format!("    {line}\n"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_behind_is_found() {
        let before = Census {
            threads: BTreeMap::from([("main".into(), 1), ("vcpu-0".into(), 1)]),
            fds: 10,
            rss_kib: 5000,
        };
        let leaked = |change: fn(&mut Census)| {
            let mut after = before.clone();
            change(&mut after);
            after.leaked_since(&before, 8192)
        };
        assert_eq!(leaked(|_| {}), None);
        assert_eq!(leaked(|after| after.fds = 9), None);
        assert_eq!(leaked(|after| after.rss_kib += 8192 + RSS_KEPT), None);
        let text = leaked(|after| after.threads.extend([("dest/main".into(), 1)]));
        assert_eq!(text.as_deref(), Some("threads that were not there before: dest/main"));
        let renamed = |after: &mut Census| {
            after.threads.remove("main");
            after.threads.insert("signals".into(), 1);
        };
        assert_eq!(leaked(renamed), None);
        let text = leaked(|after| after.threads.extend([("vcpu-0".into(), 2)]));
        assert_eq!(text.as_deref(), Some("threads that were not there before: vcpu-0"));
        assert!(leaked(|after| after.fds += FDS_KEPT + 1).is_some());
        assert!(leaked(|after| after.rss_kib += 8192 + RSS_KEPT + 1).is_some());
    }

    #[test]
    fn a_process_can_be_counted() {
        let here = Census::take(std::process::id()).unwrap();
        assert!(here.fds() > 2 && here.rss_kib > 100 && !here.threads.is_empty(), "{here:?}");
        assert!(stacks(std::process::id()).contains("State:"));
    }
}
