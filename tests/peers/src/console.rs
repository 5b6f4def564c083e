//! What a guest says on its serial port: lines of `name=value`, kept in a file.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::wait;

/// One complete line of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report(Vec<(String, String)>);

impl Report {
    /// A line whose every word is `name=value`; anything else (firmware, a kernel) is not ours.
    fn parse(line: &str) -> Option<Self> {
        let fields: Option<Vec<(String, String)>> = line
            .split_whitespace()
            .map(|word| word.split_once('=').map(|(name, value)| (name.into(), value.into())))
            .collect();
        fields.filter(|fields| !fields.is_empty()).map(Self)
    }

    /// The value of a field.
    ///
    /// # Errors
    /// The guest's line has no such field.
    pub fn get(&self, name: &str) -> Result<&str> {
        self.0
            .iter()
            .find(|(field, _)| field == name)
            .map(|(_, value)| value.as_str())
            .with_context(|| format!("no {name} in the guest's line {:?}", self.0))
    }
}

/// The reports in what a guest wrote, the line under way left out.
#[must_use]
pub fn reports(written: &str) -> Vec<Report> {
    let complete = written.rfind('\n').map_or("", |end| &written[..end]);
    complete.lines().filter_map(Report::parse).collect()
}

/// The file behind a serial port.
#[derive(Debug, Clone)]
pub struct Console {
    path: PathBuf,
}

impl Console {
    /// The console kept at `path`, which need not exist yet.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Where it is kept.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Everything written so far.
    #[must_use]
    pub fn written(&self) -> String {
        fs::read(&self.path)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Waits for `count` reports.
    ///
    /// # Errors
    /// They did not come within `limit`.
    pub fn wait_for(&self, count: usize, limit: Duration) -> Result<Vec<Report>> {
        wait::until(&format!("{count} lines from the guest"), limit, || {
            let reports = reports(&self.written());
            Ok((reports.len() >= count).then_some(reports))
        })
        .with_context(|| {
            let written = self.written();
            let end: String = written.chars().rev().take(400).collect();
            let end: String = end.chars().rev().collect();
            format!("the guest's last words: {end:?}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_complete_lines_of_ours_count() {
        let written =
            "SeaBIOS (version)\r\npass=01 sum=ab\n[ 0.1] kernel\npass=02 sum=ab\npass=03 su";
        let reports = reports(written);
        assert_eq!(reports.len(), 2);
        assert_eq!(reports[1].get("pass").unwrap(), "02");
        assert!(reports[1].get("errors").is_err());
    }
}
