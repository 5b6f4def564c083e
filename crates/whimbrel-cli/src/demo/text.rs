//! What a demo has to tell, for people at a terminal of 80 columns.

use super::chart::{COLUMNS, duration, histogram, over_time};
use super::outcome::{Outcome, Postcopy};
use super::record::rates;
use crate::progress::mib;

/// So few faults say little.
const FEW: u64 = 20;
const MORE: &str = "(to see more: --postcopy-after 0, a slower --bandwidth, more --memory)";

/// The summary, charts included.
pub(super) fn summary(outcome: &Outcome) -> String {
    let info = &outcome.source.info;
    let ram = info.ram.clone().unwrap_or_default();
    let postcopy_time = outcome.postcopy.as_ref().and_then(|postcopy| postcopy.time);
    let postcopy_time = postcopy_time
        .map(|time| format!(", postcopy {}", duration(time.as_micros() as f64)))
        .unwrap_or_default();
    let (total, setup) = (info.total_time.unwrap_or(0), info.setup_time.unwrap_or(0));
    let mut text = row("status", outcome.source.status.name());
    text += &row("total time", &format!("{total} ms (setup {setup} ms{postcopy_time})"));
    text += &row("downtime", &format!("{} ms", info.downtime.unwrap_or(0)));
    let sent = format!(
        "{} of {} sent: {} pages, {} zero pages, {} passes",
        mib(ram.transferred),
        mib(ram.total),
        ram.normal,
        ram.duplicate,
        ram.dirty_sync_count,
    );
    text += &row("RAM", &sent);
    if let Some(postcopy) = &outcome.postcopy {
        text += &faults(postcopy);
    }
    let rates = rates(&outcome.samples, COLUMNS);
    if outcome.postcopy.is_some() && !rates.is_empty() {
        text += "\nMB/s over time, on all channels; the bold part of the axis is postcopy\n";
        text += &over_time(&rates, outcome.observed_us());
        text.push('\n');
    }
    text + &row("verified", &outcome.verdict.to_string())
}

fn faults(postcopy: &Postcopy) -> String {
    if postcopy.time.is_none() {
        return row("faults", "none: precopy was done before postcopy could begin");
    }
    let count = postcopy.faults.count;
    let latency = postcopy.faults.latency_us;
    let guest = format!(
        "{} updates before its RAM was whole, {} at most between two",
        postcopy.updates_meanwhile,
        duration(postcopy.gap_max.as_micros() as f64),
    );
    if count == 0 {
        return row("faults", "none: no page that the guest touched was missing")
            + &row("guest", &guest)
            + &row("", MORE);
    }
    let latencies = format!(
        "{count}: mean {}, p50 {}, p90 {}, p99 {}, max {}",
        duration(latency.mean),
        duration(latency.p50),
        duration(latency.p90),
        duration(latency.p99),
        duration(latency.max),
    );
    let parts = postcopy.split();
    let parts: Vec<String> =
        parts.iter().map(|part| format!("{} {}", part.name, duration(part.us))).collect();
    let text = row("faults", &latencies) + &row("of which", &parts.join(", "));
    let text = text + &row("guest", &guest);
    let text = text + &format!("\nfaults by latency\n{}", histogram(&postcopy.dist));
    if count < FEW { text + &row("", MORE) } else { text }
}

/// A name and what there is to say, in lines that stand under each other.
fn row(name: &str, text: &str) -> String {
    const WIDTH: usize = 80 - 12;
    let (mut lines, mut line) = (Vec::new(), String::new());
    for word in text.split_whitespace() {
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > WIDTH {
            lines.push(std::mem::take(&mut line));
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines.push(line);
    format!("{name:12}{}\n", lines.join(&format!("\n{:12}", "")))
}

#[cfg(test)]
mod tests {
    use super::super::outcome::samples::outcome;
    use super::*;

    #[test]
    fn everything_fits_into_80_columns() {
        let outcomes = [outcome(&[]), outcome(&[1]), outcome(&[10, 600, 123_456, 25, 5, 0, 0, 1])];
        for outcome in outcomes {
            let text = summary(&outcome);
            for line in text.lines() {
                assert!(line.chars().count() <= 80, "{line}\n{text}");
                assert_eq!(line, line.trim_end(), "{text}");
                assert!(!line.contains('\x1b'), "no colours: {text}");
            }
        }
    }

    #[test]
    fn the_figures_are_there() {
        let text = summary(&outcome(&[10, 60, 25, 5]));
        for part in [
            "total time  1412 ms (setup 3 ms, postcopy 962 ms)",
            "faults      100: mean 96 us, p50 76.8 us",
            "asked 9 us, queued 12 us, wire 59 us, placed 16 us",
            "1800 updates before its RAM was whole, 1.53 ms at most between two",
            "verified    65234 pages identical, 318 written by the guest since and",
        ] {
            assert!(text.contains(part), "{part}:\n{text}");
        }
        assert!(!text.contains("more to see"), "{text}");
        let mut none = outcome(&[]);
        assert!(summary(&none).contains("none: no page that the guest touched"));
        if let Some(postcopy) = &mut none.postcopy {
            postcopy.time = None;
        }
        assert!(summary(&none).contains("precopy was done before postcopy could begin"));
        none.postcopy = None;
        assert!(!summary(&none).contains("faults"));
    }
}
