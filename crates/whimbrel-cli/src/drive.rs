//! Driving a migration between two VMs, seen through nothing but their QMP.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde_json::Value;
use whimbrel_control::{Client, ClientError, MigrationReport};

use crate::failure::Failure;
use crate::progress::{Shown, describe, describe_lost, mib};
use crate::recovery::{Plan, Recovery};

/// How long a QMP command may take.
pub(crate) const COMMAND: Duration = Duration::from_secs(10);
/// Between two looks at a migration.
const LOOK: Duration = Duration::from_millis(50);
/// The same while every look is recorded, at the very least: more often would be a load.
const LOOK_SOON: Duration = Duration::from_millis(4);

/// When to go over to postcopy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// When every page has been sent once.
    FirstPass,
    /// So long after the start.
    Time(Duration),
}

/// `first-pass`, or milliseconds.
impl FromStr for After {
    type Err = String;

    fn from_str(text: &str) -> Result<After, String> {
        match (text, text.parse()) {
            ("first-pass", _) => Ok(After::FirstPass),
            (_, Ok(ms)) => Ok(After::Time(Duration::from_millis(ms))),
            _ => Err("expected 'first-pass' or milliseconds".into()),
        }
    }
}

impl fmt::Display for After {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            After::FirstPass => f.write_str("first-pass"),
            After::Time(time) => write!(f, "{}", time.as_millis()),
        }
    }
}

/// Switches postcopy on, at one side; it has to be done at both.
pub(crate) fn allow_postcopy(client: &mut Client, preempt: bool) -> Result<(), ClientError> {
    let mut changes = vec![("return-path", true), ("postcopy-ram", true)];
    // A QEMU before 7.1 does not know it, and need not be told that it is off.
    if preempt || knows_capability(client, "postcopy-preempt")? {
        changes.push(("postcopy-preempt", preempt));
    }
    client.set_capabilities_named(&changes)
}

fn knows_capability(client: &mut Client, name: &str) -> Result<bool, ClientError> {
    let list = client.execute("query-migrate-capabilities", Value::Object(Default::default()))?;
    let mut names = list.as_array().into_iter().flatten().map(|entry| &entry["capability"]);
    Ok(names.any(|known| known == name))
}

/// A migration under way, at one moment.
#[derive(Debug)]
pub(crate) struct Look<'l> {
    /// Since it was begun.
    pub(crate) after: Duration,
    pub(crate) source: &'l MigrationReport,
    /// In postcopy only, when it has more to tell than that it waits, and if it answers.
    pub(crate) destination: Option<&'l MigrationReport>,
}

/// How a migration ended: well.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) source: MigrationReport,
    pub(crate) destination: MigrationReport,
}

impl Ended {
    /// Whether anything was left for postcopy.
    pub(crate) fn by_postcopy(&self) -> bool {
        let ram = self.source.info.ram.as_ref();
        ram.is_some_and(|ram| ram.postcopy_bytes > 0 || ram.postcopy_requests > 0)
    }
}

/// A migration between two VMs.
pub(crate) struct Run<'c> {
    pub(crate) from: &'c mut Client,
    pub(crate) to: &'c mut Client,
    pub(crate) timeout: Option<Duration>,
    /// Whether to go over to postcopy, which both sides have been allowed.
    pub(crate) postcopy: Option<After>,
    /// What to do should the link break in postcopy.
    pub(crate) plan: Plan,
    /// Who wants to know of every look, which is then taken more often.
    pub(crate) record: Option<&'c mut dyn FnMut(&Look<'_>)>,
}

impl Run<'_> {
    /// Has the destination listen, the source migrate, and waits for the end on both sides.
    pub(crate) fn go(&mut self, via: &str) -> Result<Ended, Failure> {
        self.to.migrate_incoming(via)?;
        let address = listening(self.to, via)?;
        let recovery = Recovery::new(&self.plan, &address, self.from, self.to)?;
        self.from.migrate(&address)?;
        let mut shown = Shown::new();
        let ended = self.watch(recovery, &mut shown);
        shown.clear();
        ended
    }

    fn watch(&mut self, mut recovery: Recovery, shown: &mut Shown) -> Result<Ended, Failure> {
        let started = Instant::now();
        let mut wanted = self.postcopy;
        let mut last = None;
        loop {
            // Before the first look: with 'after 0 ms', precopy is to send nothing if it can.
            if let Some(After::Time(time)) = wanted
                && started.elapsed() >= time
            {
                self.from.migrate_start_postcopy()?;
                wanted = None;
            }
            let source = self.source(last.take())?;
            let destination = match source.status.is_postcopy() {
                true => self.destination_in_postcopy()?,
                false => None,
            };
            let after = started.elapsed();
            if let Some(record) = &mut self.record {
                record(&Look { after, source: &source, destination: destination.as_ref() });
            }
            match source.status.name() {
                "completed" => {
                    let destination = self.arrived()?;
                    return Ok(Ended { source, destination });
                }
                "failed" | "cancelled" => return Err(self.failed(&source)),
                _ => {}
            }
            let lost = match source.status.is_postcopy() {
                true => {
                    let both = (&source, destination.as_ref());
                    recovery.step(self.from, self.to, both, after)?
                }
                false => None,
            };
            if wanted == Some(After::FirstPass)
                && source.info.ram.as_ref().is_some_and(|ram| ram.dirty_sync_count >= 2)
            {
                self.from.migrate_start_postcopy()?;
                wanted = None;
            }
            if self.timeout.is_some_and(|limit| after > limit) {
                return Err(self.give_up(&source, after));
            }
            shown.show_now_and_then(|| match lost {
                Some(lost) => Some(describe_lost(&source, destination.as_ref(), lost)),
                None => describe(&source.info),
            });
            last = Some(source);
            std::thread::sleep(self.next_look(after));
        }
    }

    /// A look costs both sides a little: the longer it takes, the fewer a second.
    fn next_look(&self, after: Duration) -> Duration {
        match self.record {
            Some(_) => (after / 50).clamp(LOOK_SOON, LOOK),
            None => LOOK,
        }
    }

    /// How the source stands. In postcopy one that does not answer stands as it did at the `last`
    /// look: its guest has left, and a recovery may need nothing but time.
    fn source(&mut self, last: Option<MigrationReport>) -> Result<MigrationReport, Failure> {
        match (self.from.query_migrate(), last.filter(|last| last.status.is_postcopy())) {
            (Ok(report), _) => Ok(report),
            (Err(ClientError::TimedOut { .. }), Some(last)) => Ok(last),
            (Err(error), Some(last)) => {
                let left = last.info.ram.as_ref().map(|ram| mib(ram.remaining));
                Err(Failure::new(format!(
                    "in postcopy, with the guest at the destination and {} of its RAM still at the \
                     source: the source: {error}",
                    left.unwrap_or_else(|| "part".into()),
                )))
            }
            (Err(error), None) => Err(error.into()),
        }
    }

    /// How the destination stands, where the guest is by now; `None` if it does not answer, as a QEMU
    /// whose guest holds up all else.
    fn destination_in_postcopy(&mut self) -> Result<Option<MigrationReport>, Failure> {
        match self.to.query_migrate() {
            Ok(report) => Ok(Some(report)),
            Err(ClientError::TimedOut { .. }) => Ok(None),
            Err(error) => Err(Failure::new(format!(
                "in postcopy, with the guest there: the destination: {error}"
            ))),
        }
    }

    /// The source is done: so is the destination in a moment.
    fn arrived(&mut self) -> Result<MigrationReport, Failure> {
        let until = Instant::now() + COMMAND;
        loop {
            let report = self.to.query_migrate()?;
            match report.status.name() {
                "completed" => return Ok(report),
                "failed" => return Err(self.failed(&report)),
                status if Instant::now() > until => {
                    return Err(Failure::new(format!(
                        "{}: the source is done, and the destination is still {status}",
                        self.to.endpoint()
                    )));
                }
                _ => std::thread::sleep(LOOK_SOON),
            }
        }
    }

    fn failed(&mut self, report: &MigrationReport) -> Failure {
        let why = report.info.error_desc.as_deref().unwrap_or("see what the source says");
        // A destination that ended with the error cannot be asked any more.
        let there = self.to.query_migrate().ok().and_then(|report| report.info.error_desc);
        let there = there.map(|text| format!("; the destination says: {text}")).unwrap_or_default();
        Failure::new(format!("the migration {}: {why}{there}", report.status))
    }

    /// It takes too long: undoes it, and says what stood in the way.
    fn give_up(&mut self, report: &MigrationReport, after: Duration) -> Failure {
        let ram = report.info.ram.clone().unwrap_or_default();
        let (rate, left) = (ram.mbps / 8.0, ram.remaining as f64 / 1e6);
        if report.status.is_postcopy() {
            return Failure::new(format!(
                "not done within {} s, and in postcopy nothing can be undone: the guest is at the \
                 destination, and {left:.1} MB of its RAM still at the source",
                after.as_secs(),
            ));
        }
        if let Err(error) = self.from.migrate_cancel() {
            return error.into();
        }
        let dirtied = (ram.dirty_pages_rate * ram.page_size) as f64 / 1e6;
        Failure::new(format!(
            "not converged within {} s, cancelled: the guest dirties {dirtied:.1} MB/s (slowed by \
             {} %), the link takes {rate:.1} MB/s and {left:.1} MB were left, {} ms at that rate; \
             allow more bandwidth or downtime",
            after.as_secs(),
            report.info.cpu_throttle_percentage.unwrap_or(0),
            report.info.expected_downtime.unwrap_or(0),
        ))
    }
}

/// Where `to` really listens, which has been told to do so at `via`.
pub(crate) fn listening(to: &mut Client, via: &str) -> Result<String, ClientError> {
    let report = to.query_migrate()?;
    let first = &report.raw["socket-address"][0];
    match (first["host"].as_str(), first["port"].as_str()) {
        (Some(host), Some(port)) if host.contains(':') => Ok(format!("tcp:[{host}]:{port}")),
        (Some(host), Some(port)) => Ok(format!("tcp:{host}:{port}")),
        _ => Ok(via.into()),
    }
}

/// A side's state, and why it is in it.
pub(crate) fn said(report: &MigrationReport) -> String {
    match &report.info.error_desc {
        Some(why) => format!("{} ({why})", report.status),
        None => report.status.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_postcopy_begins_is_written_as_it_is_read() {
        for (text, after) in [
            ("first-pass", After::FirstPass),
            ("0", After::Time(Duration::ZERO)),
            ("1500", After::Time(Duration::from_millis(1500))),
        ] {
            assert_eq!(text.parse(), Ok(after));
            assert_eq!(after.to_string(), text);
        }
        for bad in ["", "soon", "-1", "1.5", "10ms"] {
            assert!(bad.parse::<After>().is_err(), "{bad}");
        }
    }
}
