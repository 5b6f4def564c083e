//! Whatever the bench makes outside its own process is unmade, however the bench ends.
//!
//! A process of its own is told of everything before it is made, and undoes it all, the last
//! first, when the bench is gone: its standard input ends then, also after Ctrl-C or a SIGKILL,
//! which nothing in the bench could answer. It is in a process group of its own, so that a
//! terminal's Ctrl-C does not reach it.

use std::fmt;
use std::fs;
use std::io::{BufRead as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

/// The pages of 2 MiB that the kernel keeps for those who ask: all, unused, and unused but promised.
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const HUGE_PAGES_FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
const HUGE_PAGES_PROMISED: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages";
/// The congestion controls that a network namespace may be set to.
const ALLOWED_CONGESTION: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";

/// How long killed processes may take to leave their namespace.
const LEAVE_MAX: Duration = Duration::from_secs(20);

/// Something to undo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Trace {
    /// A network namespace, with what still runs in it.
    Namespace(String),
    /// A folder of files.
    Folder(PathBuf),
    /// So many huge pages more than there were. By how many, not from how many: others change the
    /// number too.
    HugePages(u32),
    /// A setting of the kernel's, and what it was before.
    Setting { path: PathBuf, before: String },
}

impl fmt::Display for Trace {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Namespace(name) => write!(formatter, "namespace {name}"),
            Self::Folder(path) => write!(formatter, "folder {}", path.display()),
            Self::HugePages(more) => write!(formatter, "huge-pages {more}"),
            Self::Setting { path, before } => {
                write!(formatter, "setting {} {before}", path.display())
            }
        }
    }
}

impl Trace {
    fn parse(line: &str) -> Result<Self> {
        match line.split_once(' ') {
            Some(("namespace", name)) => Ok(Self::Namespace(name.to_owned())),
            Some(("folder", path)) => Ok(Self::Folder(path.into())),
            Some(("huge-pages", more)) => Ok(Self::HugePages(more.parse()?)),
            Some(("setting", setting)) => {
                let (path, before) = setting.split_once(' ').context("a setting has a value")?;
                Ok(Self::Setting { path: path.into(), before: before.to_owned() })
            }
            Some(_) | None => bail!("nothing that can be undone: {line:?}"),
        }
    }

    fn undo(&self) -> Result<()> {
        match self {
            Self::Namespace(name) => remove_namespace(name),
            // One that is gone was removed by its owner.
            Self::Folder(path) if !path.exists() => Ok(()),
            Self::Folder(path) => Ok(fs::remove_dir_all(path)?),
            Self::HugePages(more) => {
                let left = count(HUGE_PAGES)?.saturating_sub(*more);
                Ok(fs::write(HUGE_PAGES, left.to_string())?)
            }
            Self::Setting { path, before } => Ok(fs::write(path, before)?),
        }
    }
}

fn remove_namespace(name: &str) -> Result<()> {
    let inside = || -> Result<Vec<String>> {
        let output = Command::new("ip").args(["netns", "pids", name]).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text.split_whitespace().map(str::to_owned).collect())
    };
    let processes = inside()?;
    if !processes.is_empty() {
        // Only what the bench started is in a namespace of the bench.
        Command::new("kill").arg("-KILL").args(&processes).stderr(Stdio::null()).status()?;
    }
    whimbrel_peers::wait::until("processes to leave", LEAVE_MAX, || {
        Ok(inside()?.is_empty().then_some(()))
    })?;
    // It may never have been made, or be gone already.
    Command::new("ip").args(["netns", "delete", name]).stderr(Stdio::null()).status()?;
    Ok(())
}

/// The janitor's own process.
pub(crate) fn run() -> Result<bool> {
    let mut traces = Vec::new();
    for line in std::io::stdin().lock().lines() {
        traces.push(Trace::parse(&line?)?);
    }
    let mut whole = true;
    for trace in traces.iter().rev() {
        if let Err(error) = trace.undo() {
            eprintln!("still there: {trace}: {error:#}");
            whole = false;
        }
    }
    Ok(whole)
}

/// The bench's end of it. Dropped, everything is undone.
#[derive(Debug)]
pub(super) struct Janitor {
    child: Child,
    tell: Option<ChildStdin>,
}

impl Janitor {
    pub(super) fn start() -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["bench", "janitor"])
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn()
            .context("the process that undoes everything did not start")?;
        let tell = child.stdin.take();
        Ok(Self { child, tell })
    }

    /// Says what is about to be made.
    pub(super) fn will_make(&mut self, trace: &Trace) -> Result<()> {
        let tell = self.tell.as_mut().context("the janitor has been sent home")?;
        writeln!(tell, "{trace}").context("the process that undoes everything is gone")
    }

    /// Has the kernel keep more huge pages, until the end, if there are not so many to be had. Says
    /// whether it had to: somebody else may change their number at any time.
    pub(super) fn keep_huge_pages(&mut self, needed: u32) -> Result<bool> {
        let lacking = || -> Result<u32> {
            let free = count(HUGE_PAGES_FREE)?.saturating_sub(count(HUGE_PAGES_PROMISED)?);
            Ok(needed.saturating_sub(free))
        };
        let more = lacking()?;
        if more == 0 {
            return Ok(false);
        }
        let all = count(HUGE_PAGES)? + more;
        self.will_make(&Trace::HugePages(more))?;
        fs::write(HUGE_PAGES, all.to_string())
            .with_context(|| format!("{HUGE_PAGES} (this needs root)"))?;
        let short = lacking()?;
        let now = count(HUGE_PAGES)?;
        ensure!(short == 0, "the kernel keeps {now} huge pages: {short} more are needed");
        Ok(true)
    }

    /// Lets namespaces be set to this congestion control, until the end.
    pub(super) fn allow_congestion(&mut self, name: &str) -> Result<()> {
        let before = fs::read_to_string(ALLOWED_CONGESTION).context(ALLOWED_CONGESTION)?;
        let before = before.trim();
        if before.split_whitespace().any(|allowed| allowed == name) {
            return Ok(());
        }
        self.will_make(&Trace::Setting {
            path: ALLOWED_CONGESTION.into(),
            before: before.to_owned(),
        })?;
        fs::write(ALLOWED_CONGESTION, format!("{before} {name}"))
            .with_context(|| format!("{ALLOWED_CONGESTION} (this needs root)"))
    }
}

fn count(path: &str) -> Result<u32> {
    let text = fs::read_to_string(path).with_context(|| path.to_owned())?;
    text.trim().parse().with_context(|| format!("{path}: {text:?}"))
}

impl Drop for Janitor {
    fn drop(&mut self) {
        self.tell = None;
        // It has said itself what it could not do.
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_understood() {
        for trace in [
            Trace::Namespace("a-b".into()),
            Trace::Folder("/dev/shm/a b".into()),
            Trace::HugePages(12),
            Trace::Setting { path: "/proc/sys/net/x".into(), before: "reno bbr".into() },
        ] {
            assert_eq!(Trace::parse(&trace.to_string()).unwrap(), trace);
        }
        assert!(Trace::parse("file /etc/passwd").is_err());
    }

    #[test]
    fn a_folder_is_removed_once() {
        let path = std::env::temp_dir().join(format!("whimbrel-janitor-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        let trace = Trace::Folder(path.clone());
        trace.undo().unwrap();
        assert!(!path.exists());
        trace.undo().unwrap();
    }
}
