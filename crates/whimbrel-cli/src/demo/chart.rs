//! Charts of characters: plain Unicode, 80 columns, no colour.

use super::record::Rate;

/// Columns for the bars of a histogram.
const BARS: usize = 48;
/// Columns and lines of a chart over time.
pub(super) const COLUMNS: usize = 64;
const LINES: usize = 6;

/// A duration of so many microseconds, in three digits.
pub(super) fn duration(us: f64) -> String {
    let (value, unit) = match us {
        us if us < 1e3 => (us, "us"),
        us if us < 1e6 => (us / 1e3, "ms"),
        us => (us / 1e6, "s"),
    };
    let digits = match value {
        value if value >= 100.0 || (unit == "us" && value.fract() == 0.0) => 0,
        value if value >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$} {unit}")
}

/// Where a bucket of QEMU's begins: the n-th holds what took 2^n to 2^(n+1) µs, the first also
/// what was shorter.
pub(super) fn bucket_start(bucket: usize) -> f64 {
    if bucket == 0 { 0.0 } else { (bucket as f64).exp2() }
}

/// The buckets from the first that is not empty to the last.
pub(super) fn occupied(dist: &[u64]) -> std::ops::Range<usize> {
    let used = |count: &u64| *count > 0;
    let first = dist.iter().position(used).unwrap_or(0);
    first..dist.iter().rposition(used).map_or(0, |last| last + 1)
}

/// How many faults took how long, as horizontal bars; nothing when there were none.
pub(super) fn histogram(dist: &[u64]) -> String {
    let most = dist.iter().copied().max().unwrap_or(0);
    let mut text = String::new();
    for bucket in occupied(dist) {
        let (from, to) = (duration(bucket_start(bucket)), duration(bucket_start(bucket + 1)));
        let count = dist[bucket];
        let bar = bar(count as f64 / most as f64);
        let line = match bucket {
            23 => format!("{from:>9} or more   {bar} {count}"),
            _ => format!("{from:>9} - {to:<8} {bar} {count}"),
        };
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// A bar of this share of the width: nothing only for nothing.
fn bar(share: f64) -> String {
    let eighths = rounded(share * (BARS * 8) as f64, BARS * 8).max(usize::from(share > 0.0));
    let mut bar = "█".repeat(eighths / 8);
    bar.extend(['▏', '▎', '▍', '▌', '▋', '▊', '▉'].get((eighths % 8).wrapping_sub(1)));
    bar
}

/// The nearest whole number from 0 to `most`.
fn rounded(value: f64, most: usize) -> usize {
    (1..=most).take_while(|&number| number as f64 - 0.5 <= value).count()
}

/// The rate over time, in MB/s; postcopy has a bold axis. `total` is how long it was, in µs.
pub(super) fn over_time(rates: &[Rate], total: f64) -> String {
    let top = ceiling(rates.iter().map(|rate| rate.bytes_per_second / 1e6).fold(0.0, f64::max));
    let mut text = String::new();
    for line in (0..LINES).rev() {
        let label = if line == LINES - 1 { format!("{top:.0}") } else { String::new() };
        let column = |rate: &Rate| {
            let height = rate.bytes_per_second / 1e6 / top * LINES as f64 - line as f64;
            [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'][rounded(height * 8.0, 8)]
        };
        let columns: String = rates.iter().map(column).collect();
        text += format!("{label:>9} │{columns}").trim_end();
        text.push('\n');
    }
    let axis: String = rates.iter().map(|rate| if rate.postcopy { '━' } else { '─' }).collect();
    // Under the axis: its beginning and its end.
    let end = format!("{:>1$}", duration(total), rates.len().saturating_sub(4));
    text + &format!("{:>9} └{axis}\n{:>11}0 us{end}\n", 0, "")
}

/// A round number that is not less, and more than nothing.
pub(super) fn ceiling(value: f64) -> f64 {
    let power = 10f64.powf(value.max(1.0).log10().floor());
    let steps = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0];
    steps.iter().map(|step| step * power).find(|&top| top >= value).unwrap_or(10.0 * power)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_three_digits() {
        for (us, text) in [
            (0.0, "0 us"),
            (2.0, "2 us"),
            (9.46, "9.46 us"),
            (96.4, "96.4 us"),
            (512.0, "512 us"),
            (1024.0, "1.02 ms"),
            (524_288.0, "524 ms"),
            (8_388_608.0, "8.39 s"),
        ] {
            assert_eq!(duration(us), text);
        }
    }

    #[test]
    fn bars_are_in_proportion_and_nothing_is_overlooked() {
        let mut dist = [0; 24];
        (dist[5], dist[6], dist[8]) = (1, 48_000, 24_000);
        let text = histogram(&dist);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        let bar = |line: &str| line.chars().filter(|c| ('█'..='▏').contains(c)).count();
        assert_eq!(lines.iter().map(|line| bar(line)).collect::<Vec<_>>(), [1, 48, 0, 24]);
        assert!(lines[0].starts_with("    32 us - 64 us") && lines[0].ends_with(" 1"), "{text}");
        assert!(lines.iter().all(|line| line.chars().count() <= 80), "{text}");
        assert_eq!(histogram(&[0; 24]), "");
        let ends = histogram(&[&[3][..], &[0; 22], &[4]].concat());
        let lines: Vec<&str> = ends.lines().collect();
        assert!(lines[0].starts_with("     0 us - 2 us"), "{ends}");
        assert!(lines[23].starts_with("   8.39 s or more"), "{ends}");
    }

    #[test]
    fn a_chart_over_time_fits_and_marks_postcopy() {
        let rates: Vec<Rate> = (0..COLUMNS)
            .map(|at| Rate { bytes_per_second: at as f64 * 1e6, postcopy: at >= 32 })
            .collect();
        let text = over_time(&rates, 412_000.0);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), LINES + 2, "{text}");
        assert!(lines.iter().all(|line| line.chars().count() <= 80), "{text}");
        assert!(lines[0].starts_with("       80 │"), "{text}");
        assert_eq!(lines[LINES].chars().filter(|c| *c == '━').count(), 32, "{text}");
        assert!(lines[LINES + 1].ends_with("412 ms"), "{text}");
        assert_eq!(over_time(&rates[..1], 1.0).lines().count(), LINES + 2);
    }

    #[test]
    fn a_ceiling_is_round_and_above() {
        for (value, top) in [(0.0, 1.0), (1.0, 1.0), (7.1, 8.0), (95.0, 100.0), (1234.0, 1500.0)] {
            assert!((ceiling(value) - top).abs() < 1e-9, "{value}: {}", ceiling(value));
        }
    }
}
