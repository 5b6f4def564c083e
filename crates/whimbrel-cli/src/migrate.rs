//! `whimbrel migrate`: drive a migration between two QMP sockets.

use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};
use whimbrel::MigrationInfo;
use whimbrel_control::{Client, Endpoint};
use whimbrel_vm::parse_size;

use crate::failure::Failure;
use crate::progress::{Shown, describe};

/// How long a QMP command may take.
pub(crate) const COMMAND: Duration = Duration::from_secs(10);
/// Between two looks at a migration.
const LOOK: Duration = Duration::from_millis(50);

/// Drive a migration between two QMP sockets.
#[derive(Debug, Args)]
pub(crate) struct Migrate {
    /// QMP of the VM to move: unix:PATH or tcp:HOST:PORT
    from: Endpoint,
    /// QMP of the VM that waits for it (started with '--incoming defer')
    to: Endpoint,
    /// Over which address
    #[arg(long, default_value = "tcp:127.0.0.1:0", value_name = "URI")]
    via: String,
    /// Bytes a second at most, with k, M, G; 0 is without limit
    #[arg(long, value_parser = parse_size, value_name = "RATE")]
    bandwidth: Option<u64>,
    /// How long the guest may stand still, in ms
    #[arg(long, value_name = "MS")]
    downtime_limit: Option<u64>,
    /// Do not slow down a guest that dirties memory faster than the link
    #[arg(long)]
    no_auto_converge: bool,
    /// Give up after so many seconds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Print one JSON object at the end
    #[arg(long)]
    json: bool,
}

impl Migrate {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let mut from = Client::connect(self.from.clone(), COMMAND)?;
        let mut to = Client::connect(self.to.clone(), COMMAND)?;
        let mut run =
            Run { from: &mut from, to: &mut to, timeout: self.timeout.map(Duration::from_secs) };
        run.from.set_capability_named("return-path", true)?;
        run.from.set_capability_named("auto-converge", !self.no_auto_converge)?;
        let mut parameters = json!({});
        if let Some(bandwidth) = self.bandwidth {
            parameters["max-bandwidth"] = bandwidth.into();
        }
        if let Some(limit) = self.downtime_limit {
            parameters["downtime-limit"] = limit.into();
        }
        run.from.set_parameters(parameters)?;
        let report = run.go(&self.via)?;
        if self.json {
            println!("{report}");
        } else {
            let ms = |name: &str| report[name].as_u64().unwrap_or(0);
            println!(
                "migrated {} to {}: {} ms, downtime {} ms",
                self.from,
                self.to,
                ms("total-time"),
                ms("downtime")
            );
        }
        Ok(())
    }
}

/// A migration between two VMs, seen through their QMP.
#[derive(Debug)]
pub(crate) struct Run<'c> {
    pub(crate) from: &'c mut Client,
    pub(crate) to: &'c mut Client,
    pub(crate) timeout: Option<Duration>,
}

impl Run<'_> {
    /// Has the destination listen, the source migrate, and waits for the end on both sides.
    /// Gives the source's `query-migrate`.
    pub(crate) fn go(&mut self, via: &str) -> Result<Value, Failure> {
        self.to.migrate_incoming(via)?;
        let address = self.listening(via)?;
        self.from.migrate(&address)?;
        let mut shown = Shown::new();
        let ended = self.watch(&mut shown);
        shown.clear();
        ended
    }

    /// Where the destination really listens.
    fn listening(&mut self, via: &str) -> Result<String, Failure> {
        let report = self.to.query_migrate()?;
        let first = &report.raw["socket-address"][0];
        match (first["host"].as_str(), first["port"].as_str()) {
            (Some(host), Some(port)) if host.contains(':') => Ok(format!("tcp:[{host}]:{port}")),
            (Some(host), Some(port)) => Ok(format!("tcp:{host}:{port}")),
            _ => Ok(via.into()),
        }
    }

    fn watch(&mut self, shown: &mut Shown) -> Result<Value, Failure> {
        let started = Instant::now();
        let mut looks = 0u32;
        loop {
            let report = self.from.query_migrate()?;
            let status = report.raw["status"].as_str().unwrap_or("none").to_owned();
            match status.as_str() {
                "completed" => {
                    self.arrived()?;
                    return Ok(report.raw);
                }
                "failed" | "cancelled" => return Err(self.failed(&status, &report.raw)),
                _ => {}
            }
            if self.timeout.is_some_and(|limit| started.elapsed() > limit) {
                return Err(self.give_up(&report.raw, started.elapsed()));
            }
            // Fewer lines where they are not redrawn in place: 'show' drops equal ones.
            if looks.is_multiple_of(if shown.is_terminal() { 2 } else { 20 })
                && let Ok(info) = serde_json::from_value::<MigrationInfo>(report.raw.clone())
                && let Some(text) = describe(&info)
            {
                shown.show(&text);
            }
            looks += 1;
            std::thread::sleep(LOOK);
        }
    }

    /// The source is done: so is the destination in a moment.
    fn arrived(&mut self) -> Result<(), Failure> {
        let until = Instant::now() + COMMAND;
        loop {
            let report = self.to.query_migrate()?;
            match report.raw["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed") => return Err(self.failed("failed", &report.raw)),
                status if Instant::now() > until => {
                    let status = status.unwrap_or("none");
                    return Err(Failure::new(format!(
                        "{}: the source is done, and the destination is still {status}",
                        self.to.endpoint()
                    )));
                }
                _ => std::thread::sleep(LOOK),
            }
        }
    }

    fn failed(&mut self, status: &str, report: &Value) -> Failure {
        let why = report["error-desc"].as_str().unwrap_or("see what the source says");
        // A destination that ended with the error cannot be asked any more.
        let there = self.to.query_migrate().ok();
        let there = there.as_ref().and_then(|report| report.raw["error-desc"].as_str());
        let there = there.map(|text| format!("; the destination says: {text}")).unwrap_or_default();
        Failure::new(format!("the migration {status}: {why}{there}"))
    }

    /// It takes too long: undoes it, and says what stood in the way.
    fn give_up(&mut self, report: &Value, after: Duration) -> Failure {
        if let Err(error) = self.from.migrate_cancel() {
            return error.into();
        }
        let number = |value: &Value| value.as_f64().unwrap_or(0.0);
        let ram = &report["ram"];
        let dirtied = number(&ram["dirty-pages-rate"]) * number(&ram["page-size"]) / 1e6;
        let throttle = number(&report["cpu-throttle-percentage"]);
        Failure::new(format!(
            "not converged within {} s, cancelled: the guest dirties {dirtied:.1} MB/s (slowed by \
             {throttle:.0} %), the link takes {:.1} MB/s and {:.1} MB were left, {} ms at that \
             rate; allow more bandwidth or downtime",
            after.as_secs(),
            number(&ram["mbps"]) / 8.0,
            number(&ram["remaining"]) / 1e6,
            report["expected-downtime"].as_u64().unwrap_or(0),
        ))
    }
}
