//! `whimbrel migrate`: drive a migration between two QMP sockets.

use std::time::Duration;

use clap::Args;
use serde_json::json;
use whimbrel_control::{Client, Endpoint};
use whimbrel_vm::parse_size;

use crate::drive::{After, COMMAND, Ended, Run, allow_postcopy};
use crate::failure::Failure;
use crate::recover_options::RecoverByHand;

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
    /// Let the guest run at the destination before all of its RAM is there
    #[arg(long)]
    postcopy: bool,
    /// With --postcopy: give the pages that the guest waits for a connection of their own
    #[arg(long, requires = "postcopy")]
    preempt: bool,
    /// With --postcopy: so many ms after the start, or when every page has been sent once
    #[arg(long, requires = "postcopy", default_value_t = After::FirstPass, value_name = "MS|first-pass")]
    postcopy_after: After,
    #[command(flatten)]
    recovery: RecoverByHand,
    /// Give up after so many seconds; in postcopy only to watch, for nothing can be undone there
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
        if self.postcopy {
            allow_postcopy(&mut from, self.preempt)?;
            allow_postcopy(&mut to, self.preempt)?;
        } else {
            from.set_capability_named("return-path", true)?;
        }
        from.set_capability_named("auto-converge", !self.no_auto_converge)?;
        let mut parameters = json!({});
        if let Some(bandwidth) = self.bandwidth {
            parameters["max-bandwidth"] = bandwidth.into();
            if self.postcopy {
                parameters["max-postcopy-bandwidth"] = bandwidth.into();
            }
        }
        if let Some(limit) = self.downtime_limit {
            parameters["downtime-limit"] = limit.into();
        }
        from.set_parameters(parameters)?;
        let mut run = Run {
            from: &mut from,
            to: &mut to,
            timeout: self.timeout.map(Duration::from_secs),
            postcopy: self.postcopy.then_some(self.postcopy_after),
            plan: self.recovery.plan(),
            record: None,
        };
        let ended = run.go(&self.via)?;
        self.tell(&ended);
        Ok(())
    }

    fn tell(&self, ended: &Ended) {
        let Ended { source, destination } = ended;
        if self.json {
            let mut report = source.raw.clone();
            if self.postcopy {
                // What it has to tell of faults only the destination knows.
                report["x-destination"] = destination.raw.clone();
            }
            return println!("{report}");
        }
        let mut text = format!(
            "migrated {} to {}: {} ms, downtime {} ms",
            self.from,
            self.to,
            source.info.total_time.unwrap_or(0),
            source.info.downtime.unwrap_or(0),
        );
        if self.postcopy && !ended.by_postcopy() {
            text += ", precopy was done before postcopy could begin";
        } else if self.postcopy {
            let requests = source.info.ram.as_ref().map_or(0, |ram| ram.postcopy_requests);
            text += &format!(", {requests} pages asked for in postcopy");
            let faults = destination.info.faults.as_ref().map(|faults| faults.latency_us.mean);
            let told = || destination.info.postcopy_latency.map(|ns| ns as f64 / 1000.0);
            if let Some(mean) = faults.or_else(told) {
                text += &format!(", {mean:.0} us on average for each");
            }
        }
        println!("{text}");
    }
}
