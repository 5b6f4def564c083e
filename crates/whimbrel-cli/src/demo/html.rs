//! `--report`: one page that needs nothing but a browser.

use super::chart::duration;
use super::outcome::{Outcome, Part, Postcopy};
use super::record::rates;
use super::svg::{self, add, escape};
use crate::progress::mib;

/// Columns of the chart over time.
const COLUMNS: usize = 160;

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1b2530; --soft: #5b6876; --paper: #fbfaf7; --card: #fff;
  --line: #e2ded5; --blue: #2f6f9f; --shade: #2f6f9f1a; --good: #2c7a4b; --bad: #b3362b;
  --asked: #8aa4b8; --queued: #d98e2b; --wire: #2f6f9f; --placed: #5a9e6f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa7b3; --paper: #14191f;
  --card: #1c232b; --line: #303a45; --blue: #6fb1e0; --shade: #6fb1e01f; --good: #63bd86;
  --bad: #ee7b70; --asked: #64798a; --queued: #e0a352; --wire: #6fb1e0; --placed: #78bd8c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 820px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; }
h2 { font-size: 18px; margin: 0 0 4px; }
p { margin: 0 0 14px; }
.soft, figcaption { color: var(--soft); }
.verdict { display: inline-block; margin: 14px 0 22px; padding: 4px 12px; border-radius: 999px;
  border: 1px solid currentColor; font-weight: 600; font-size: 14px; }
.good { color: var(--good); } .bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); gap: 10px;
  margin-bottom: 22px; }
.tile, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 14px; } .tile b { display: block; font-size: 21px; line-height: 1.25;
  font-variant-numeric: tabular-nums; white-space: nowrap; } .tile span { color: var(--soft);
  font-size: 13px; }
section { padding: 20px 22px; margin-bottom: 16px; }
svg { display: block; width: 100%; height: auto; margin-top: 8px;
  font: 11px system-ui, sans-serif; fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: 1; } .end { text-anchor: end; }
.middle { text-anchor: middle; } .bar { fill: var(--blue); }
.area { fill: var(--blue); fill-opacity: 0.45; stroke: var(--blue); stroke-width: 1.5; } .count { fill: var(--ink); }
.shade { fill: var(--shade); } .label { fill: var(--blue); font-weight: 600; }
.on { fill: #fff; font-size: 13px; font-weight: 600; }
.asked { fill: var(--asked); } .queued { fill: var(--queued); } .wire, .waited { fill: var(--wire); }
.placed { fill: var(--placed); }
i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 8px; }
i.asked { background: var(--asked); } i.queued { background: var(--queued); }
i.wire, i.waited { background: var(--wire); } i.placed { background: var(--placed); }
table { border-collapse: collapse; width: 100%; font-size: 15px; margin-top: 10px;
  font-variant-numeric: tabular-nums; }
td, th { text-align: left; font-weight: normal; padding: 5px 12px 5px 0; vertical-align: top;
  border-top: 1px solid var(--line); }
th { color: var(--soft); white-space: nowrap; } tr:first-child > * { border-top: 0; }
td.n { text-align: right; white-space: nowrap; padding-right: 16px; }
code { display: block; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 14px;
  font-family: ui-monospace, monospace; background: var(--paper); border: 1px solid var(--line);
  border-radius: 6px; padding: 10px 12px; }
";

/// The whole page.
pub(super) fn page(outcome: &Outcome) -> String {
    let title = format!("A running guest moved by {}", how(outcome));
    let mut html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{0}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{0}</h1>\n",
        escape(&title)
    );
    head(outcome, &mut html);
    if let Some(postcopy) = &outcome.postcopy {
        faults(postcopy, &mut html);
    }
    over_time(outcome, &mut html);
    verification(outcome, &mut html);
    details(outcome, &mut html);
    html + "</main>\n</body>\n</html>\n"
}

fn how(outcome: &Outcome) -> &str {
    match outcome.mode.as_str() {
        "preempt" => "postcopy with preemption",
        mode => mode,
    }
}

fn head(outcome: &Outcome, html: &mut String) {
    let vm = &outcome.vm;
    let cpus = if vm.vcpus == 1 { "vCPU" } else { "vCPUs" };
    let facts = format!(
        "{} of RAM in pages of {}, {} {cpus} on {}, workload {}",
        mib(vm.memory),
        mib(vm.page_size as u64),
        vm.vcpus,
        vm.accel,
        vm.workload
    );
    add!(html, "<p class=\"soft\">{}</p>\n", escape(&facts));
    let (class, text) = match outcome.verdict.failure {
        None => ("good", "verified"),
        Some(_) => ("bad", "not verified"),
    };
    add!(html, "<div class=\"verdict {class}\">{text}</div>\n<div class=\"tiles\">\n");
    // No more digits than were measured.
    let ms = |time: Option<u64>| match time.unwrap_or(0) {
        ms @ 0..1000 => format!("{ms} ms"),
        ms => duration(ms as f64 * 1e3),
    };
    let mut tile = |value: &str, what: &str| {
        add!(html, "<div class=\"tile\"><b>{}</b><span>{what}</span></div>\n", escape(value));
    };
    tile(&ms(outcome.source.info.downtime), "downtime");
    tile(&ms(outcome.source.info.total_time), "total time");
    if let Some(postcopy) = &outcome.postcopy {
        let time = postcopy.time.unwrap_or_default().as_micros() as f64;
        tile(&duration(time), "in postcopy");
        tile(&postcopy.faults.count.to_string(), "faults");
        tile(&duration(postcopy.faults.latency_us.mean), "a fault, on average");
        tile(&duration(postcopy.faults.latency_us.p99), "99 of 100 below");
    }
    html.push_str("</div>\n");
}

fn faults(postcopy: &Postcopy, html: &mut String) {
    html.push_str("<section>\n<h2>How long the guest waited for a page</h2>\n");
    if postcopy.faults.count == 0 {
        html.push_str("<p class=\"soft\">It never had to: no page it touched was missing.</p>\n");
        html.push_str("</section>\n");
        return;
    }
    html.push_str(
        "<p class=\"soft\">Faults by their latency; each column stands for a range twice \
                   as wide as the one before it.</p>\n",
    );
    html.push_str(&svg::histogram(&postcopy.dist));
    html.push_str(
        "\n<table>\n<tr><th>mean</th><th>median</th><th>9 of 10</th><th>99 of 100</th>\
                   <th>longest</th></tr>\n<tr>",
    );
    let latency = postcopy.faults.latency_us;
    for us in [latency.mean, latency.p50, latency.p90, latency.p99, latency.max] {
        add!(html, "<td>{}</td>", duration(us));
    }
    html.push_str(
        "</tr>\n</table>\n</section>\n<section>\n<h2>Where the time of a fault goes</h2>\n",
    );
    let split = postcopy.split();
    html.push_str(&svg::split(&split));
    html.push_str("\n<table>\n");
    let all: f64 = split.iter().map(|part| part.us).sum();
    for Part { name, what, us } in split {
        let share = if all > 0.0 { us / all * 100.0 } else { 0.0 };
        add!(
            html,
            "<tr><th><i class=\"{name}\"></i>{name}</th><td class=\"n\">{}</td>\
             <td class=\"n\">{share:.0} %</td><td>{what}</td></tr>\n",
            duration(us)
        );
    }
    html.push_str("</table>\n</section>\n");
}

fn over_time(outcome: &Outcome, html: &mut String) {
    html.push_str("<section>\n<h2>RAM over time</h2>\n");
    let rates = rates(&outcome.samples, COLUMNS);
    if rates.is_empty() {
        html.push_str("<p class=\"soft\">It was over before it could be looked at twice.</p>\n");
    } else {
        html.push_str("<p class=\"soft\">Megabytes a second, on all channels.</p>\n");
        html.push_str(&svg::over_time(&rates, outcome.observed_us()));
    }
    html.push_str("\n</section>\n");
}

fn verification(outcome: &Outcome, html: &mut String) {
    add!(
        html,
        "<section>\n<h2>Verification</h2>\n<p>{}</p>\n",
        escape(&outcome.verdict.to_string())
    );
    if let Some(postcopy) = &outcome.postcopy {
        add!(
            html,
            "<p class=\"soft\">By the guest&#39;s own clock: {} updates done before all of its RAM \
             was there; the longest time between two of them {}.</p>\n",
            postcopy.updates_meanwhile,
            duration(postcopy.gap_max.as_micros() as f64)
        );
    }
    html.push_str("</section>\n");
}

fn details(outcome: &Outcome, html: &mut String) {
    html.push_str("<section>\n<h2>Details</h2>\n<table>\n");
    let mut row = |name: &str, value: &str| {
        add!(html, "<tr><th>{name}</th><td>{}</td></tr>\n", escape(value));
    };
    let ram = outcome.source.info.ram.clone().unwrap_or_default();
    row("RAM sent", &format!("{} of {}", mib(ram.transferred), mib(ram.total)));
    row("pages", &format!("{} with content, {} zero", ram.normal, ram.duplicate));
    row("passes over the dirty log", &ram.dirty_sync_count.to_string());
    row("dirty log", &outcome.vm.dirty_log);
    if let Some(postcopy) = &outcome.postcopy {
        row("pages asked for", &ram.postcopy_requests.to_string());
        let (faults, answers) = (&postcopy.faults, &postcopy.answers);
        row(
            "requests",
            &format!(
                "{} answered by a page of their own, {} for pages that were on their way, {} sent \
                 again",
                answers.count, answers.already_sent, faults.asked_again
            ),
        );
        for (name, value) in &postcopy.blocktime {
            let unit = if name.ends_with("latency") { "ns" } else { "ms" };
            row(name, &format!("{value} {unit}"));
        }
    }
    let command = outcome.command.join(" ");
    add!(
        html,
        "</table>\n</section>\n<section>\n<h2>Command</h2>\n<code>{}</code>\n",
        escape(&command)
    );
    let version = env!("CARGO_PKG_VERSION");
    add!(html, "</section>\n<p class=\"soft\">whimbrel {version}</p>\n");
}

#[cfg(test)]
mod tests {
    use super::super::outcome::samples::outcome;
    use super::*;

    /// Every element that is begun is ended, in order.
    fn expect_balanced(html: &str) {
        const EMPTY: [&str; 4] = ["!DOCTYPE", "meta", "rect/", "line"];
        let mut open = Vec::new();
        for tag in html.split('<').skip(1) {
            let (tag, _) = tag.split_once('>').expect("a tag has an end");
            let name = tag.split_whitespace().next().expect("a tag has a name");
            if let Some(name) = name.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name), "{tag}");
            } else if !EMPTY.contains(&name) && !tag.ends_with('/') {
                open.push(name);
            }
        }
        assert!(open.is_empty(), "{open:?}");
    }

    fn expect_sound(html: &str) {
        expect_balanced(html);
        for foreign in ["http", "src=", "href=", "<script", "url(", "@import", "NaN", "inf"] {
            assert!(!html.contains(foreign), "{foreign} in {html}");
        }
    }

    #[test]
    fn the_page_is_whole_and_needs_nothing_else() {
        let html = page(&outcome(&[10, 60, 25, 5]));
        expect_sound(&html);
        for text in ["A running guest moved by postcopy with preemption", ">verified<", "962 ms"] {
            assert!(html.contains(text), "{text}: {html}");
        }
        assert!(html.contains("whimbrel demo --report a&amp;b&lt;c&gt;.html"), "{html}");
        assert_eq!(html.matches("<svg").count(), 3);
        assert!(html.contains("65234 pages identical, 318 written by the guest since"), "{html}");
    }

    #[test]
    fn also_when_there_is_little_to_show() {
        let html = page(&outcome(&[]));
        expect_sound(&html);
        assert!(html.contains("It never had to"), "{html}");

        let mut precopy = outcome(&[]);
        precopy.postcopy = None;
        precopy.samples.clear();
        precopy.mode = "precopy".into();
        precopy.verdict.failure = Some("not verified: RAM differs: <none>".into());
        let html = page(&precopy);
        expect_sound(&html);
        assert!(html.contains("not verified: RAM differs: &lt;none&gt;"), "{html}");
        assert!(html.contains("over before it could be looked at") && !html.contains("<svg"));
    }

    #[test]
    fn one_fault_is_a_histogram_too() {
        for bucket in [0, 12, 18] {
            let mut faults = vec![0; bucket];
            faults.push(1);
            expect_sound(&page(&outcome(&faults)));
        }
    }
}
