//! How far a target came, as libFuzzer tells it.

use std::fmt;

/// A target's run.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) target: String,
    /// It ended as it should have.
    pub(super) success: bool,
    pub(super) progress: Progress,
}

impl Row {
    /// Nothing was found. A target that executed nothing has not been fuzzed, whatever it exits with.
    pub(super) fn is_clean(&self) -> bool {
        self.success && self.progress.executions > 0 && self.progress.findings == 0
    }

    fn verdict(&self) -> String {
        match self.progress.findings {
            0 if self.is_clean() => "nothing found".into(),
            0 => "FAILED".into(),
            count => format!("FAILED: {count} found"),
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Progress { executions, coverage, corpus, peak_mib, .. } = self.progress;
        write!(
            f,
            "{}: {executions} executions, coverage {coverage}, corpus {corpus}, {peak_mib} MiB: {}",
            self.target,
            self.verdict()
        )
    }
}

/// All runs as a table, in Markdown.
pub(super) fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "| target | executions | a second | coverage (edges) | features | corpus | peak RSS (MiB) \
         | found |\n|---|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    for Row { target, progress, .. } in rows {
        let Progress { executions, per_second, coverage, features, corpus, peak_mib, findings } =
            progress;
        text += &format!(
            "| `{target}` | {executions} | {per_second} | {coverage} | {features} | {corpus} \
             | {peak_mib} | {findings} |\n"
        );
    }
    text
}

/// What libFuzzer counts.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    pub(super) executions: u64,
    pub(super) per_second: u64,
    /// Edges of the program.
    pub(super) coverage: u64,
    /// The same with how often, and what was compared.
    pub(super) features: u64,
    pub(super) corpus: u64,
    pub(super) peak_mib: u64,
    /// Inputs that were written down because something was wrong with them.
    pub(super) findings: u64,
}

impl Progress {
    /// From libFuzzer's lines `#2048 pulse cov: 12 ft: 34 corp: 5/67b ..` and its final counts.
    pub(super) fn parse(text: &str) -> Self {
        let mut progress = Self::default();
        for line in text.lines() {
            if line.contains("Test unit written to") {
                progress.findings += 1;
            }
            let mut words = line.split_whitespace();
            while let Some(word) = words.next() {
                let value = match word {
                    "cov:" => &mut progress.coverage,
                    "ft:" => &mut progress.features,
                    "corp:" => &mut progress.corpus,
                    "stat::number_of_executed_units:" => &mut progress.executions,
                    "stat::average_exec_per_sec:" => &mut progress.per_second,
                    "stat::peak_rss_mb:" => &mut progress.peak_mib,
                    _ => continue,
                };
                let number = words.next().and_then(|word| word.split('/').next()?.parse().ok());
                *value = number.unwrap_or(*value);
            }
        }
        progress
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "#2\tINITED cov: 10 ft: 11 corp: 1/1b exec/s: 0 rss: 40Mb\n\
        #4096\tpulse  cov: 120 ft: 340 corp: 25/670b lim: 4096\n\
        stat::number_of_executed_units: 5000\n\
        stat::average_exec_per_sec:     833\n\
        stat::peak_rss_mb:              412\n";

    #[test]
    fn libfuzzers_last_word_counts() {
        let progress = Progress::parse(TEXT);
        let expected = Progress {
            executions: 5000,
            per_second: 833,
            coverage: 120,
            features: 340,
            corpus: 25,
            peak_mib: 412,
            findings: 0,
        };
        assert_eq!(progress, expected);
        let row = Row { target: "t".into(), success: true, progress };
        assert!(row.is_clean());
        assert!(table(&[row]).ends_with("| `t` | 5000 | 833 | 120 | 340 | 25 | 412 | 0 |\n"));
    }

    #[test]
    fn what_was_written_down_was_found_and_what_did_not_run_is_not_clean() {
        let found = format!("{TEXT}artifact_prefix='x/'; Test unit written to x/crash-1\n");
        let row =
            |text, success| Row { target: "t".into(), success, progress: Progress::parse(text) };
        assert_eq!(row(&found, true).verdict(), "FAILED: 1 found");
        assert_eq!(row(TEXT, false).verdict(), "FAILED");
        assert_eq!(row("", true).verdict(), "FAILED");
    }
}
