//! The report's charts, as inline SVG whose colours are the page's.

use super::chart::{bucket_start, ceiling, duration, occupied};
use super::outcome::Part;
use super::record::Rate;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 230.0;
/// Room for the labels at the left, at the top and at the bottom.
const LEFT: f64 = 52.0;
const TOP: f64 = 18.0;
const BOTTOM: f64 = 34.0;

/// Text as it stands in HTML and SVG, in an attribute too.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// Adds to a text what `format!` makes of the rest.
macro_rules! add {
    ($text:expr, $($argument:tt)*) => {
        $text.push_str(&format!($($argument)*))
    };
}
pub(super) use add;

fn begin(title: &str, height: f64) -> String {
    let title = escape(title);
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}\">\
         <title>{title}</title>\n"
    )
}

/// The place of a value between 0 and `top`, from above.
fn y(value: f64, top: f64) -> f64 {
    HEIGHT - BOTTOM - value / top * (HEIGHT - BOTTOM - TOP)
}

/// Lines across the chart with what they stand for.
fn grid(svg: &mut String, top: f64, unit: &str) {
    for step in 0..=4 {
        let value = top * f64::from(step) / 4.0;
        let y = y(value, top);
        add!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{WIDTH}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>"
        );
        let value =
            if value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.1}") };
        let unit = if step == 4 { unit } else { "" };
        add!(
            svg,
            "<text class=\"end\" x=\"{:.1}\" y=\"{:.1}\">{value}{unit}</text>\n",
            LEFT - 6.0,
            y + 4.0
        );
    }
}

/// Faults by how long they took, a column for each of QEMU's buckets.
pub(super) fn histogram(dist: &[u64]) -> String {
    let buckets = occupied(dist);
    // One more at each side, and never so few that a column becomes a wall.
    let first = buckets.start.saturating_sub(1);
    let last = (buckets.end + 1).max(first + 8).min(dist.len().max(8));
    let most = dist.iter().copied().max().unwrap_or(0) as f64;
    let top = (ceiling(most / 4.0) * 4.0).max(4.0);
    let mut svg = begin("How many faults took how long", HEIGHT);
    grid(&mut svg, top, "");
    let step = (WIDTH - LEFT) / (last - first) as f64;
    for bucket in first..last {
        let x = LEFT + (bucket - first) as f64 * step;
        let (from, to) = (duration(bucket_start(bucket)), duration(bucket_start(bucket + 1)));
        let count = dist.get(bucket).copied().unwrap_or(0);
        if count > 0 {
            // A single one is still to be seen.
            let height = (HEIGHT - BOTTOM - y(count as f64, top)).max(2.0);
            let above = HEIGHT - BOTTOM - height;
            let range =
                if bucket == 23 { format!("{from} or more") } else { format!("{from} to {to}") };
            add!(
                svg,
                "<rect class=\"bar\" x=\"{:.1}\" y=\"{above:.1}\" width=\"{:.1}\" \
                 height=\"{height:.1}\" rx=\"2\"><title>{range}: {count}</title></rect>",
                x + 3.0,
                step - 6.0,
            );
            add!(
                svg,
                "<text class=\"middle count\" x=\"{:.1}\" y=\"{:.1}\">{count}</text>\n",
                x + step / 2.0,
                above - 5.0
            );
        }
        // Where a bucket begins, under its left edge.
        add!(
            svg,
            "<text class=\"middle\" x=\"{x:.1}\" y=\"{:.1}\">{from}</text>\n",
            HEIGHT - BOTTOM + 17.0
        );
    }
    svg + "</svg>"
}

/// The parts of a fault's time, as one bar.
pub(super) fn split(parts: &[Part]) -> String {
    let all: f64 = parts.iter().map(|part| part.us).sum();
    let mut svg = begin("Where the time of a fault goes", 44.0);
    let mut x = 0.0;
    for Part { name, us, .. } in parts {
        let width = if all > 0.0 { us / all * WIDTH } else { 0.0 };
        add!(
            svg,
            "<rect class=\"{name}\" x=\"{x:.1}\" y=\"4\" width=\"{width:.1}\" height=\"36\">\
             <title>{name}: {}</title></rect>",
            duration(*us)
        );
        // Where there is room for it.
        if width > 70.0 {
            let middle = x + width / 2.0;
            add!(svg, "<text class=\"middle on\" x=\"{middle:.1}\" y=\"27\">{name}</text>");
        }
        x += width;
    }
    svg + "\n</svg>"
}

/// Megabytes a second over the time, with postcopy in another shade. `total` is how long it was,
/// in µs.
pub(super) fn over_time(rates: &[Rate], total: f64) -> String {
    let mb = |rate: &Rate| rate.bytes_per_second / 1e6;
    let top = ceiling(rates.iter().map(mb).fold(0.0, f64::max));
    let mut svg = begin("Rate of RAM over time, in MB/s", HEIGHT);
    let step = (WIDTH - LEFT) / rates.len().max(1) as f64;
    let x = |at: usize| LEFT + at as f64 * step;
    if let Some(from) = rates.iter().position(|rate| rate.postcopy) {
        let (x, height) = (x(from), HEIGHT - BOTTOM - TOP);
        add!(
            svg,
            "<rect class=\"shade\" x=\"{x:.1}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{height:.1}\"/>\
             <text class=\"label\" x=\"{:.1}\" y=\"{:.1}\">postcopy</text>\n",
            WIDTH - x,
            x + 6.0,
            TOP + 14.0
        );
    }
    grid(&mut svg, top, "");
    if !rates.is_empty() {
        let mut line = format!("M{LEFT:.1} {:.1}", y(0.0, top));
        for (at, rate) in rates.iter().enumerate() {
            let y = y(mb(rate), top);
            add!(line, " L{:.1} {y:.1} L{:.1} {y:.1}", x(at), x(at + 1));
        }
        add!(line, " L{WIDTH:.1} {:.1} Z", y(0.0, top));
        add!(svg, "<path class=\"area\" d=\"{line}\"/>\n");
    }
    for (quarter, class) in (0..).zip(["start", "middle", "middle", "middle", "end"]) {
        let part = f64::from(quarter) / 4.0;
        add!(
            svg,
            "<text class=\"{class}\" x=\"{:.1}\" y=\"{:.1}\">{}</text>\n",
            LEFT + part * (WIDTH - LEFT),
            HEIGHT - BOTTOM + 17.0,
            duration(total * part)
        );
    }
    svg + "</svg>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_text_is_taken_for_markup() {
        assert_eq!(escape("a<b>&\"c'"), "a&lt;b&gt;&amp;&quot;c&#39;");
    }

    #[test]
    fn a_column_for_each_bucket_that_is_not_empty() {
        let mut dist = [0; 24];
        (dist[6], dist[7], dist[23]) = (10, 5, 1);
        let svg = histogram(&dist);
        assert_eq!(svg.matches("class=\"bar\"").count(), 3);
        assert!(svg.contains("64 us to 128 us: 10") && svg.contains("8.39 s or more: 1"), "{svg}");
        assert_eq!(histogram(&[]).matches("class=\"bar\"").count(), 0);
    }

    #[test]
    fn the_parts_fill_the_bar() {
        let parts = [("asked", 1.0), ("queued", 1.0), ("wire", 5.0), ("placed", 1.0)];
        let svg = split(&parts.map(|(name, us)| Part { name, what: "", us }));
        for (part, width) in [("asked", "90.0"), ("wire", "450.0")] {
            let rect = svg.split("<rect ").find(|rect| rect.contains(&format!("\"{part}\"")));
            assert!(rect.unwrap().contains(&format!("width=\"{width}\"")), "{svg}");
        }
        assert!(!split(&[Part { name: "asked", what: "", us: 0.0 }]).contains("NaN"));
    }
}
