//! A step of `cargo xtask test`: what it ran, how it ended, and the one line said about it.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::ops::AddAssign;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::workspace::Workspace;

/// How many of a step's last lines are shown when it fails; the log has them all.
const SHOWN_LINES_MAX: usize = 80;

/// What was counted. A step without tests of its own counts as one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// How a step ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// All is well.
    Passed(Tally),
    /// Something is wrong, and the log says what.
    Failed(Tally),
    /// It could not run here, for this reason.
    Skipped {
        why: String,
        /// A skipped essential step fails CI. Only what no machine of ours can change is not.
        essential: bool,
    },
}

/// A step: its name on the command line, and what it does.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) run: fn(&Workspace, &mut Log) -> Result<Outcome>,
}

impl Step {
    /// Runs the step and says how it went in one line.
    pub(crate) fn report(&self, workspace: &Workspace, ci: bool) -> Tally {
        let begun = Instant::now();
        let path = workspace.target(&format!("xtask/{}.log", self.name));
        let outcome = Log::create(&path).and_then(|mut log| (self.run)(workspace, &mut log));
        let seconds = begun.elapsed().as_secs_f64();
        let name = self.name;
        match outcome {
            Ok(Outcome::Passed(tally)) => {
                let line = format!("{name:<12} ok      {seconds:>7.1} s  {}", counts(tally));
                println!("{}", line.trim_end());
                tally
            }
            Ok(Outcome::Skipped { why, essential }) => {
                let fatal = essential && ci;
                let verdict = if fatal { "FAILED " } else { "skipped" };
                let rule = if fatal { "essential, and CI skips nothing essential: " } else { "" };
                println!("{name:<12} {verdict} {seconds:>7.1} s  {rule}{why}");
                Tally { passed: 0, failed: u64::from(fatal), skipped: u64::from(!fatal) }
            }
            Ok(Outcome::Failed(mut tally)) => {
                println!("{name:<12} FAILED  {seconds:>7.1} s  {}", path.display());
                print_tail(&path);
                // A step that fails without naming a test (it did not compile) is one failure.
                tally.failed = tally.failed.max(1);
                tally
            }
            Err(error) => {
                println!("{name:<12} FAILED  {seconds:>7.1} s  {error:#}");
                print_tail(&path);
                Tally { failed: 1, ..Tally::default() }
            }
        }
    }
}

fn counts(tally: Tally) -> String {
    if tally == (Tally { passed: 1, ..Tally::default() }) {
        return String::new();
    }
    format!("{} passed, {} skipped", tally.passed, tally.skipped)
}

fn print_tail(path: &Path) {
    let Ok(log) = fs::read(path) else { return };
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<&str> = log.lines().collect();
    for line in &lines[lines.len().saturating_sub(SHOWN_LINES_MAX)..] {
        println!("    {line}");
    }
}

/// Where a step's commands write: a file that stays, under the target directory.
#[derive(Debug)]
pub(crate) struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    pub(crate) fn create(path: &Path) -> Result<Self> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        let file = File::options()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(path)
            .with_context(|| path.display().to_string())?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Runs one command to its end, its output going to the log. Says whether it succeeded, and
    /// what it printed.
    pub(crate) fn capture(&mut self, command: &mut Command) -> Result<(bool, String)> {
        let begin = self.file.seek(SeekFrom::End(0))?;
        let status = command
            .stdin(std::process::Stdio::null())
            .stdout(self.file.try_clone()?)
            .stderr(self.file.try_clone()?)
            .status()
            .with_context(|| format!("{} did not start", command.get_program().display()))?;
        self.file.seek(SeekFrom::Start(begin))?;
        let mut printed = Vec::new();
        self.file
            .read_to_end(&mut printed)
            .with_context(|| format!("reading {}", self.path.display()))?;
        Ok((status.success(), String::from_utf8_lossy(&printed).into_owned()))
    }

    /// A check: it passes or it fails, and counts as one.
    pub(crate) fn check(&mut self, command: &mut Command) -> Result<Outcome> {
        let (success, _) = self.capture(command)?;
        Ok(match success {
            true => Outcome::Passed(Tally { passed: 1, ..Tally::default() }),
            false => Outcome::Failed(Tally::default()),
        })
    }

    /// A command that runs libtest: its own counts are taken over.
    pub(crate) fn tests(&mut self, command: &mut Command) -> Result<Outcome> {
        let (success, printed) = self.capture(command)?;
        let tally = count_tests(&printed);
        // `cargo test` that ran nothing at all is a mistake in the step, not a success.
        Ok(match success && tally.passed > 0 {
            true => Outcome::Passed(tally),
            false => Outcome::Failed(tally),
        })
    }
}

/// Adds up libtest's `test result: ok. 3 passed; 0 failed; 1 ignored; ..` lines.
fn count_tests(printed: &str) -> Tally {
    let mut sum = Tally::default();
    for line in printed.lines() {
        let Some((_, counts)) = line.split_once("test result: ") else { continue };
        for part in counts.split([';', '.']) {
            let mut words = part.split_whitespace();
            let (Some(count), Some(what)) = (words.next(), words.next()) else { continue };
            let Ok(count) = count.parse::<u64>() else { continue };
            match what {
                "passed" => sum.passed += count,
                "failed" => sum.failed += count,
                "ignored" => sum.skipped += count,
                _ => {}
            }
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtest_results_are_added_up() {
        let printed = "running 4 tests\n\
            test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 9 filtered out; finished in 0.00s\n\
            noise 7 passed\n\
            test result: FAILED. 10 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.50s\n";
        assert_eq!(count_tests(printed), Tally { passed: 13, failed: 2, skipped: 1 });
    }

    #[test]
    fn a_command_without_tests_is_not_a_success() {
        let folder = std::env::temp_dir().join(format!("xtask-step-{}", std::process::id()));
        let mut log = Log::create(&folder.join("step.log")).unwrap();
        let outcome = log.tests(&mut Command::new("true")).unwrap();
        assert!(matches!(outcome, Outcome::Failed(_)), "{outcome:?}");
        fs::remove_dir_all(folder).unwrap();
    }
}
