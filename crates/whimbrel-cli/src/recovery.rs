//! A link that broke in postcopy, seen through nothing but QMP: what is to be done about it, and what
//! to say when nothing helps.

use std::time::Duration;

use whimbrel::Address;
use whimbrel_control::{Client, ClientError, MigrationReport};

use crate::drive::{listening, said};
use crate::failure::Failure;
use crate::progress::mib;

/// For how long a recovery is tried if nobody says otherwise: as long as a whimbrel does by itself.
pub(crate) const LIMIT: Duration = Duration::from_secs(300);
/// How long a side may take to find out what the other knows already.
const NOTICE: Duration = Duration::from_secs(2);
/// How long both may be about to go on: whom each has found then is not the other. A stock QEMU waits
/// for ever for the first words of whoever connects.
const STUCK: Duration = Duration::from_secs(15);
/// Between two attempts, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));

/// What is wanted should the link break in postcopy.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Whether anything is to be done.
    pub(crate) recover: bool,
    /// Where the destination is to wait again, if not where both sides agree by themselves.
    pub(crate) uri: Option<String>,
    /// For how long; `None` is without end.
    pub(crate) limit: Option<Duration>,
}

impl Default for Plan {
    fn default() -> Plan {
        Plan { recover: true, uri: None, limit: Some(LIMIT) }
    }
}

/// Who does it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Way {
    /// Nobody.
    Not,
    /// Both sides, by themselves.
    Themselves,
    /// We do, with the destination waiting at this address.
    ByHand(String),
    /// We would, and do not know of an address that could be waited at once more.
    NoAddress,
}

/// A migration's link, from the moment at which it is in postcopy.
#[derive(Debug)]
pub(crate) struct Recovery {
    way: Way,
    limit: Option<Duration>,
    /// At which time of the migration the link was found to be lost; `None` while it is not.
    lost: Option<Duration>,
    steps: Steps,
    /// Where the destination waits by our doing.
    waits_at: Option<String>,
    /// Why a side did not do what it was told last.
    refused: Option<String>,
}

impl Recovery {
    /// For a migration to `address`. Both sides are asked what they would do by themselves.
    pub(crate) fn new(
        plan: &Plan,
        address: &str,
        from: &mut Client,
        to: &mut Client,
    ) -> Result<Recovery, ClientError> {
        let way = match (plan.recover, &plan.uri) {
            (false, _) => Way::Not,
            (true, Some(uri)) => Way::ByHand(uri.clone()),
            (true, None) if recovers_itself(from)? && recovers_itself(to)? => Way::Themselves,
            (true, None) => another_place(address).map_or(Way::NoAddress, Way::ByHand),
        };
        Ok(Recovery {
            way,
            limit: plan.limit,
            lost: None,
            steps: Steps::new(),
            waits_at: None,
            refused: None,
        })
    }

    /// Does what is to be done `now`, a time since the migration began; the destination may be silent.
    /// Gives for how long the link has been lost, `None` while it is not; an error when there is
    /// nothing to be hoped for any more.
    pub(crate) fn step(
        &mut self,
        from: &mut Client,
        to: &mut Client,
        (source, destination): (&MigrationReport, Option<&MigrationReport>),
        now: Duration,
    ) -> Result<Option<Duration>, Failure> {
        let here = Side::of(source.status.name());
        let there = destination.map_or(Side::Silent, |report| Side::of(report.status.name()));
        // One that is silent may only be busy: it is no news while the other has found nothing.
        let unknown = there == Side::Silent && self.lost.is_none();
        if here.is_linked() && (there.is_linked() || unknown) {
            (self.lost, self.steps, self.refused) = (None, Steps::new(), None);
            return Ok(None);
        }
        let lost = now.saturating_sub(*self.lost.get_or_insert(now));
        let noticed = lost > NOTICE;
        if there == Side::Done && noticed {
            return Err(Failure::new(format!(
                "the guest is whole at the destination, and the source, which did not hear of it, \
                 says {}: all that is left to do is to quit it",
                said(source),
            )));
        }
        let hopeless = match self.way {
            Way::Not | Way::NoAddress => noticed || (here, there) == (Side::Paused, Side::Paused),
            Way::Themselves | Way::ByHand(_) => self.limit.is_some_and(|limit| lost > limit),
        };
        if hopeless || there == Side::Failed {
            return Err(self.broke(source, destination, &self.missing(here, there)));
        }
        if let Way::ByHand(uri) = self.way.clone() {
            match self.steps.next(here, there, now) {
                Step::Wait => {}
                Step::BreakSource => self.told("the source", from.migrate_pause())?,
                Step::BreakDestination => self.told("the destination", to.migrate_pause())?,
                Step::Reconnect => self.reconnect(from, to, &uri)?,
            }
        }
        Ok(Some(lost))
    }

    fn reconnect(&mut self, from: &mut Client, to: &mut Client, uri: &str) -> Result<(), Failure> {
        self.refused = None;
        match to.migrate_recover(uri) {
            Ok(()) => {
                self.waits_at = match listening(to, uri) {
                    Ok(address) => Some(address),
                    // It has done it, and is too busy to say where.
                    Err(ClientError::TimedOut { .. }) if !is_any_port(uri) => Some(uri.into()),
                    Err(error) => {
                        self.told("the destination", Err(error))?;
                        None
                    }
                }
            }
            // It may wait already, from an attempt before.
            Err(error) => self.told("the destination", Err(error))?,
        }
        if let Some(address) = &self.waits_at {
            let outcome = from.migrate_resume(address);
            self.told("the source", outcome)?;
        }
        Ok(())
    }

    /// Remembers a refusal, which may be over by the next attempt. A side that has gone is none.
    fn told(&mut self, whose: &str, outcome: Result<(), ClientError>) -> Result<(), Failure> {
        match outcome {
            Ok(()) => Ok(()),
            Err(error) if error.is_disconnect() => {
                Err(Failure::new(format!("in postcopy, with the link lost: {whose}: {error}")))
            }
            Err(error) => {
                self.refused = Some(error.to_string());
                Ok(())
            }
        }
    }

    fn broke(
        &self,
        source: &MigrationReport,
        destination: Option<&MigrationReport>,
        missing: &str,
    ) -> Failure {
        Failure::new(format!(
            "the migration broke in postcopy, with the guest at the destination and {} of its RAM \
             still at the source: the source says {}; the destination {}; {missing}",
            source.info.ram.as_ref().map_or_else(|| "part".into(), |ram| mib(ram.remaining)),
            said(source),
            match destination {
                Some(report) => format!("says {}", said(report)),
                None => "does not answer".into(),
            },
        ))
    }

    /// What has to be done for the migration to go on, and on which side.
    fn missing(&self, here: Side, there: Side) -> String {
        let mut parts = Vec::new();
        if let Some(refused) = &self.refused {
            parts.push(refused.clone());
        }
        let (source, destination) = match (here, there) {
            (Side::Paused, Side::Paused) => (Some(RESUME), Some(RECOVER)),
            (Side::Paused, Side::Linked) => (Some(RESUME), Some(BREAK_AND_RECOVER)),
            (Side::Linked, Side::Paused) => (Some(BREAK_AND_RESUME), Some(RECOVER)),
            (Side::Paused, Side::Recovering | Side::Silent) => (Some(RESUME), None),
            (Side::Connecting | Side::Recovering, Side::Paused) => (None, Some(RECOVER)),
            (_, _) => (None, None),
        };
        parts.extend(destination.map(|what| format!("the destination needs {what}")));
        parts.extend(source.map(|what| format!("the source needs {what}")));
        if self.way == Way::NoAddress {
            parts.push("'--recover URI' does both".into());
        }
        match (parts.is_empty(), there) {
            (false, _) => parts.join("; "),
            (true, Side::Failed) => "what the destination had is gone".into(),
            (true, _) => "a recovery is under way, and takes longer than it may".into(),
        }
    }
}

const RECOVER: &str = "'migrate-recover' with an address";
const RESUME: &str = "'migrate' with 'resume' to where the destination waits";
const BREAK_AND_RECOVER: &str = "'migrate-pause', and 'migrate-recover' with an address";
const BREAK_AND_RESUME: &str =
    "'migrate-pause', and 'migrate' with 'resume' to where the destination waits";

/// Whether it is a whimbrel that has not been told to leave a recovery to others.
fn recovers_itself(client: &mut Client) -> Result<bool, ClientError> {
    let parameters = client.query_parameters()?;
    Ok(parameters["auto-recover"].as_str().is_some_and(|when| when != "off"))
}

/// Where the same destination can wait once more: its first place may still be taken.
fn another_place(address: &str) -> Option<String> {
    match address.parse() {
        Ok(Address::Tcp { host, .. }) => Some(Address::Tcp { host, port: 0 }.to_string()),
        Ok(Address::Unix(path)) => Some(Address::Unix(path).to_string()),
        Ok(Address::Fd(_) | Address::Exec(_) | Address::File { .. }) | Err(_) => None,
    }
}

/// Whether only the destination knows where it is.
fn is_any_port(uri: &str) -> bool {
    matches!(uri.parse(), Ok(Address::Tcp { port: 0, .. }))
}

/// How a side stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    /// It knows of no broken link.
    Linked,
    /// It waits to be told how to go on, or for what it has been told to come.
    Paused,
    /// It looks for the other side.
    Connecting,
    /// It has begun to go on.
    Recovering,
    /// It is done.
    Done,
    Failed,
    /// It does not answer.
    Silent,
}

impl Side {
    fn of(status: &str) -> Side {
        match status {
            "postcopy-paused" => Side::Paused,
            "postcopy-recover-setup" => Side::Connecting,
            "postcopy-recover" => Side::Recovering,
            "completed" => Side::Done,
            "failed" | "cancelled" => Side::Failed,
            _ => Side::Linked,
        }
    }

    fn is_linked(self) -> bool {
        matches!(self, Side::Linked | Side::Done)
    }
}

/// What to do next when it is done by hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Wait,
    /// `migrate-pause`: it has not noticed.
    BreakSource,
    BreakDestination,
    /// `migrate-recover` there, `migrate` with `resume` here.
    Reconnect,
}

/// Decides what to do next, from how both sides stand and for how long they have.
#[derive(Debug)]
struct Steps {
    /// How they stand, and since when.
    seen: Option<(Side, Side, Duration)>,
    /// Not before this time.
    next: Duration,
    pause: Duration,
}

impl Steps {
    fn new() -> Steps {
        Steps { seen: None, next: Duration::ZERO, pause: PAUSE.0 }
    }

    fn next(&mut self, here: Side, there: Side, now: Duration) -> Step {
        let since = match self.seen {
            Some((source, destination, since)) if (source, destination) == (here, there) => since,
            _ => now,
        };
        self.seen = Some((here, there, since));
        let step = match (here, there) {
            (Side::Paused, Side::Paused | Side::Silent) => Step::Reconnect,
            (Side::Paused, Side::Linked | Side::Recovering) => Step::BreakDestination,
            (Side::Linked | Side::Recovering, Side::Paused) => Step::BreakSource,
            (Side::Recovering, Side::Recovering) => Step::BreakDestination,
            (_, _) => Step::Wait,
        };
        let due = match step {
            Step::Wait => false,
            Step::Reconnect => now >= self.next,
            Step::BreakSource | Step::BreakDestination => {
                let both = (here, there) == (Side::Recovering, Side::Recovering);
                let patience = if both { STUCK } else { NOTICE };
                now >= self.next && now.saturating_sub(since) >= patience
            }
        };
        if !due {
            return Step::Wait;
        }
        self.next = now + self.pause;
        if step == Step::Reconnect {
            self.pause = (self.pause * 2).min(PAUSE.1);
        }
        step
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn both_sides_are_told_at_once_when_both_are_paused_and_again_after_a_while() {
        let mut steps = Steps::new();
        let mut told = Vec::new();
        for ms in (0..30_000).step_by(50) {
            let step = steps.next(Side::Paused, Side::Paused, Duration::from_millis(ms));
            match step {
                Step::Reconnect => told.push(ms),
                Step::Wait => {}
                Step::BreakSource | Step::BreakDestination => panic!("{step:?} after {ms} ms"),
            }
        }
        assert_eq!(told, [0, 1000, 3000, 7000, 15_000, 25_000]);
    }

    #[test]
    fn a_side_that_does_not_notice_is_told_to_pause() {
        for (here, there, step) in [
            (Side::Paused, Side::Linked, Step::BreakDestination),
            (Side::Paused, Side::Recovering, Step::BreakDestination),
            (Side::Linked, Side::Paused, Step::BreakSource),
            (Side::Recovering, Side::Paused, Step::BreakSource),
        ] {
            let mut steps = Steps::new();
            assert_eq!(steps.next(here, there, seconds(10)), Step::Wait);
            assert_eq!(steps.next(here, there, seconds(11)), Step::Wait);
            assert_eq!(steps.next(here, there, seconds(12)), step);
            assert_eq!(steps.next(here, there, Duration::from_millis(12_100)), Step::Wait);
            // Both have noticed by now.
            assert_eq!(steps.next(Side::Paused, Side::Paused, seconds(13)), Step::Reconnect);
        }
    }

    #[test]
    fn two_that_are_about_to_go_on_for_long_have_not_found_each_other() {
        let mut steps = Steps::new();
        for second in 0..15 {
            assert_eq!(steps.next(Side::Recovering, Side::Recovering, seconds(second)), Step::Wait);
        }
        let step = steps.next(Side::Recovering, Side::Recovering, seconds(15));
        assert_eq!(step, Step::BreakDestination);
    }

    #[test]
    fn nothing_is_done_while_a_side_is_about_to_go_on() {
        let mut steps = Steps::new();
        for second in 0..60 {
            for (here, there) in [
                (Side::Connecting, Side::Paused),
                (Side::Connecting, Side::Recovering),
                (Side::Recovering, Side::Silent),
                (Side::Linked, Side::Silent),
                (Side::Paused, Side::Done),
            ] {
                assert_eq!(steps.next(here, there, seconds(second)), Step::Wait);
            }
        }
        assert_eq!(steps.next(Side::Paused, Side::Silent, seconds(60)), Step::Reconnect);
    }

    #[test]
    fn the_destination_waits_at_the_same_host_again() {
        for (address, place) in [
            ("tcp:10.0.0.2:4444", Some("tcp:10.0.0.2:0")),
            ("tcp:[::1]:7", Some("tcp:[::1]:0")),
            ("unix:/run/m", Some("unix:/run/m")),
            ("fd:7", None),
            ("exec:nc -l 5", None),
            ("file:/x", None),
        ] {
            assert_eq!(another_place(address).as_deref(), place, "{address}");
        }
    }

    #[test]
    fn what_is_missing_is_said_for_each_side() {
        let recovery = |way, refused: Option<&str>| Recovery {
            way,
            limit: None,
            lost: None,
            steps: Steps::new(),
            waits_at: None,
            refused: refused.map(Into::into),
        };
        let missing = |here, there| recovery(Way::Not, None).missing(here, there);
        for (here, there, source, destination) in [
            (Side::Paused, Side::Paused, Some(RESUME), Some(RECOVER)),
            (Side::Paused, Side::Linked, Some(RESUME), Some(BREAK_AND_RECOVER)),
            (Side::Linked, Side::Paused, Some(BREAK_AND_RESUME), Some(RECOVER)),
            (Side::Recovering, Side::Paused, None, Some(RECOVER)),
            (Side::Paused, Side::Silent, Some(RESUME), None),
        ] {
            let text = missing(here, there);
            let needs = |whose: &str, what: Option<&str>| match what {
                Some(what) => text.contains(&format!("the {whose} needs {what}")),
                None => !text.contains(&format!("the {whose} needs")),
            };
            assert!(needs("source", source) && needs("destination", destination), "{text}");
        }
        let stuck = missing(Side::Recovering, Side::Recovering);
        assert!(stuck.contains("a recovery is under way"), "{stuck}");
        let refused =
            recovery(Way::NoAddress, Some("refused: why")).missing(Side::Paused, Side::Paused);
        assert!(refused.starts_with("refused: why; "), "{refused}");
        assert!(refused.ends_with("'--recover URI' does both"), "{refused}");
    }
}
