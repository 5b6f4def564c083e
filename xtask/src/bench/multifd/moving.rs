//! One migration between two fresh processes, and what it is measured by.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use whimbrel_peers::qmp::{Event, Qmp};

use super::engine::{Engine, Setup};
use super::figures::Figures;
use super::scenario::{Method, Scenario};
use crate::bench::network::{End, Way};

/// Compressing 4 GiB with one slow method on a processor that is not alone.
const MIGRATION_MAX: Duration = Duration::from_secs(150);

/// Moves one guest.
pub(super) fn run(
    engine: &Engine,
    (scenario, method): (Scenario, Method),
    setup: &Setup,
    (content, way): (&Path, Way<'_>),
) -> Result<Figures> {
    let what = (scenario, method);
    let mut source = engine.start(End::Source, scenario, setup, (content, way))?;
    let mut destination = engine.start(End::Destination, scenario, setup, (content, way))?;
    Engine::configure(&mut source.qmp, End::Source, what, setup)?;
    Engine::configure(&mut destination.qmp, End::Destination, what, setup)?;
    let uri = json!({ "uri": format!("tcp:{}:0", way.destination()) });
    destination.qmp.execute("migrate-incoming", &uri)?;
    let report = destination.qmp.execute("query-migrate", &json!({}))?;
    let port = report["socket-address"][0]["port"].as_str().context("no port to go to")?;
    let uri = format!("tcp:{}:{port}", way.destination());
    engine.settle(scenario, &mut source.qmp, setup)?;

    let before = (source.cpu()?, destination.cpu()?);
    let begun = Instant::now();
    source.qmp.migrate(&uri)?;
    let sent = until_completed(&mut source.qmp, "the source")?;
    let seconds = begun.elapsed().as_secs_f64();
    let arrived = until_completed(&mut destination.qmp, "the destination")?;
    let cpu_s = (source.cpu()? - before.0, destination.cpu()? - before.1);

    let report = source.qmp.execute("query-migrate", &json!({}))?;
    let number = |name: &str| report[name].as_f64().with_context(|| format!("no {name}"));
    let seen = |events: &[Event], name: &str| {
        events.iter().find(|event| event.name == name).map(|event| event.at)
    };
    // What a guest that runs feels; of one that does not the source's own account is all there is.
    let downtime_ms = match (seen(&sent, "STOP"), seen(&arrived, "RESUME")) {
        (Some(stopped), Some(resumed)) => resumed.saturating_sub(stopped).as_secs_f64() * 1e3,
        _ => number("downtime")?,
    };
    Ok(Figures {
        gigabytes_per_second: setup.memory.gigabytes() / seconds,
        source_cpu_per_gib: cpu_s.0 / setup.memory.gib(),
        destination_cpu_per_gib: cpu_s.1 / setup.memory.gib(),
        downtime_ms: Some(downtime_ms),
        total_ms: number("total-time")?,
        sent_gib: report["ram"]["transferred"].as_f64().map(|bytes| bytes / f64::from(1 << 30)),
    })
}

/// Everything up to the end of the migration.
fn until_completed(qmp: &mut Qmp, who: &str) -> Result<Vec<Event>> {
    let mut seen = Vec::new();
    loop {
        let event = qmp.next_event(MIGRATION_MAX).with_context(|| who.to_owned())?;
        let status = (event.name == "MIGRATION").then(|| event.data["status"].clone());
        seen.push(event);
        match status.as_ref().and_then(serde_json::Value::as_str) {
            Some("completed") => return Ok(seen),
            Some(ended @ ("failed" | "cancelled")) => {
                let report = qmp.execute("query-migrate", &json!({}))?;
                bail!("{who} says {ended}: {}", report["error-desc"].as_str().unwrap_or("no why"))
            }
            Some(_) | None => {}
        }
    }
}
