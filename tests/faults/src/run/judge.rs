//! What came of a run, and whether that is one of the things that may come of it.
//!
//! Every expectation is here. The first is the same for all: one guest, whole, that runs or can be
//! had to run, on a side that says so truthfully; or a guest that was with a process that was killed.

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::time::{Duration, Instant};

use super::Run;
use super::pages::{Pages, written};
use crate::phase::Phase;
use crate::plan::{Action, Fault, Side, Trigger};
use crate::vm::Vm;

/// How long a guest may take to show that it runs.
const PROGRESS: Duration = Duration::from_secs(10);

/// Where the guest is, and how it came there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Outcome {
    /// It runs at the destination, and nothing was lost on the way.
    Moved,
    /// The same, after the link had been lost in postcopy.
    Recovered,
    /// The same, after somebody resumed it.
    Resumed,
    /// It runs at the destination; the source was not told, and leaves it to a human.
    MovedUntold,
    /// It runs at the source: the migration ended before the guest was given away.
    Stayed,
    /// It stood still at the source, which could not know whether it had gone, and a human had it run
    /// on.
    StayedInDoubt,
    /// It is at the destination, and part of its memory at the source: both wait for a recovery.
    Paused,
    /// The same, and one of the two processes was killed: what is left is kept.
    HalfKilled,
    /// It was in a process that was killed.
    Killed,
    /// Bytes were changed where nothing protects them: nothing is known of the guest but that it is
    /// one at most, and nobody hangs.
    Unprotected,
}

impl Outcome {
    pub(crate) const ALL: [Outcome; 10] = [
        Outcome::Moved,
        Outcome::Recovered,
        Outcome::Resumed,
        Outcome::MovedUntold,
        Outcome::Stayed,
        Outcome::StayedInDoubt,
        Outcome::Paused,
        Outcome::HalfKilled,
        Outcome::Killed,
        Outcome::Unprotected,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Outcome::Moved => "moved",
            Outcome::Recovered => "recovered",
            Outcome::Resumed => "resumed",
            Outcome::MovedUntold => "moved, source not told",
            Outcome::Stayed => "stayed",
            Outcome::StayedInDoubt => "stayed, by a human's word",
            Outcome::Paused => "paused",
            Outcome::HalfKilled => "half killed",
            Outcome::Killed => "killed",
            Outcome::Unprotected => "unprotected",
        }
    }
}

/// What a side is left with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// No process.
    Gone,
    /// The migration is over, and well.
    Completed,
    /// The migration is over, and not well.
    Ended,
    /// It waits for the other side, with half a guest.
    Paused,
    /// It waits for a source that never came.
    Waits,
}

fn left(vm: &Vm) -> Result<Left> {
    Ok(match vm.seen.status.as_str() {
        _ if vm.is_gone() => Left::Gone,
        "completed" => Left::Completed,
        _ if super::ended(vm) => Left::Ended,
        _ if super::is_paused(vm) => Left::Paused,
        _ if super::waits(vm) => Left::Waits,
        status => bail!("the {} still is {status}", vm.side.name()),
    })
}

/// Judges, and ends both processes.
pub(super) fn judge(run: &mut Run<'_>) -> Result<Outcome> {
    let sides = [left(run.source())?, left(run.destination())?];
    check_words(run)?;
    let corrupt = changed_unnoticed(run);
    let outcome = match corrupt {
        true => Outcome::Unprotected,
        false => guest(run, sides)?,
    };
    let guest_kib = run.plan.scene.memory >> 10;
    let over = |left| matches!(left, Left::Completed | Left::Ended);
    if run.abilities.recovers && sides[1] == Left::Completed {
        // A source that had not heard of it would be waited for.
        let soon = json!({ "recover-time-limit": 1 });
        run.destination().execute("migrate-set-parameters", soon)?;
    }
    // Nothing is awaited from the link any more: who has ended has let go of it.
    for (side, left) in Side::BOTH.into_iter().zip(sides) {
        if over(left) {
            let more = if side == Side::Destination { guest_kib } else { 0 };
            run.vms[side as usize].check_leaks(more)?;
        }
    }
    run.destination().quit()?;
    run.source().quit()?;
    Ok(outcome)
}

/// A side that did not end well says why.
fn check_words(run: &mut Run<'_>) -> Result<()> {
    for vm in &run.vms {
        let bad = ["failed", "postcopy-paused"].contains(&vm.seen.status.as_str());
        if !vm.is_gone() && bad {
            let error = vm.seen.error.as_deref().unwrap_or("");
            ensure!(!error.is_empty(), "the {} says no reason", vm.side.name());
            ensure!(!error.contains("panicked"), "the {} panicked: {error}", vm.side.name());
        }
    }
    Ok(())
}

/// Whether bytes were changed with nothing to protect them. Where something does, that they were has
/// to have been noticed.
pub(super) fn changed_unnoticed(run: &Run<'_>) -> bool {
    let flipped = |fired: &super::Fired| run.plan.faults[fired.fault].action == Action::Flip;
    run.plan.may_corrupt() && run.fired.iter().any(flipped)
}

/// Where the guest is, that it is whole, and that it is nowhere else.
fn guest(run: &mut Run<'_>, [source, destination]: [Left; 2]) -> Result<Outcome> {
    use Left::{Completed, Ended, Gone, Paused, Waits};
    match (source, destination) {
        (Completed, Completed) => {
            check_noticed(run)?;
            check_moved(run)?;
            refuses_cont(run)?;
            Ok(match (has_lost_link(run), run.by_hand) {
                (false, _) => Outcome::Moved,
                (true, false) => Outcome::Recovered,
                (true, true) => Outcome::Resumed,
            })
        }
        // It did not hear that its guest arrived; it must not run it without being told to.
        (Ended | Paused, Completed) => {
            ensure!(!runs(run.source()), "two guests run");
            check_moved(run)?;
            Ok(Outcome::MovedUntold)
        }
        (Gone, Completed) => {
            check_runs_well(run.destination())?;
            Ok(Outcome::Moved)
        }
        (Ended, Ended | Waits | Gone) => {
            ensure!(
                destination == Gone || !has_guest(run.destination()),
                "two guests: the destination's is {}",
                run.destination().seen.run_state
            );
            stayed(run)
        }
        (Paused, Paused) => {
            ensure!(
                !run.abilities.recovers,
                "not to be resumed: the source says {}, the destination {}",
                said(run.source()),
                said(run.destination())
            );
            refuses_cont(run)?;
            has_half(run.destination())?;
            Ok(Outcome::Paused)
        }
        (Paused, Gone) => {
            refuses_cont(run)?;
            Ok(Outcome::HalfKilled)
        }
        (Gone, Paused) if has_guest(run.destination()) => {
            has_half(run.destination())?;
            Ok(Outcome::HalfKilled)
        }
        (Gone, Paused) => {
            has_none(run.destination())?;
            Ok(Outcome::Killed)
        }
        (Completed, Gone) => {
            refuses_cont(run)?;
            Ok(Outcome::Killed)
        }
        (Gone, Ended | Waits) => {
            ensure!(!has_guest(run.destination()), "it has a guest and says that it has none");
            Ok(Outcome::Killed)
        }
        (Gone, Gone) => Ok(Outcome::Killed),
        (Completed | Paused, Ended | Waits) | (Completed, Paused) => bail!(
            "the guest is lost: the source says {}, the destination {}",
            said(run.source()),
            said(run.destination())
        ),
        // All but the last command of the package came; without it the destination runs nothing.
        (Ended, Paused) => {
            has_none(run.destination())?;
            stayed(run)
        }
        (Waits, _) => unreachable!("only a destination waits"),
    }
}

fn said(vm: &Vm) -> String {
    let error = vm.seen.error.as_deref().unwrap_or("");
    format!("{}, {} {error}", vm.seen.status, vm.seen.run_state)
}

fn runs(vm: &Vm) -> bool {
    vm.seen.run_state == "running"
}

fn has_guest(vm: &Vm) -> bool {
    !["inmigrate", "postmigrate"].contains(&vm.seen.run_state.as_str())
}

/// A destination in postcopy has a guest, and does not say that it is whole.
fn has_half(vm: &mut Vm) -> Result<()> {
    ensure!(
        ["running", "paused"].contains(&vm.seen.run_state.as_str()),
        "half a guest, {}",
        said(vm)
    );
    let refused = vm.execute("x-self-check", json!({}));
    ensure!(refused.is_err(), "half a guest was taken for a whole one");
    Ok(())
}

/// Whether the link was lost in postcopy.
fn has_lost_link(run: &Run<'_>) -> bool {
    Side::BOTH.into_iter().any(|side| run.watch.has_told(side, "postcopy-paused"))
}

/// A destination that the guest was not given to runs none, and cannot be made to.
fn has_none(vm: &mut Vm) -> Result<()> {
    ensure!(!has_guest(vm), "two guests: the destination has one, {}", said(vm));
    ensure!(vm.execute("cont", json!({})).is_err(), "it ran a guest that it was not given");
    Ok(())
}

/// A bit that was changed under TLS, while anything was still to come, broke the connection.
fn check_noticed(run: &Run<'_>) -> Result<()> {
    /// The first records of a connection are not protected themselves: what they say is, but not
    /// the version in front of it, which nobody looks at.
    const HANDSHAKE: u64 = 2 << 10;
    let changed = run.fired.iter().find(|fired| {
        let Fault { trigger, action } = run.plan.faults[fired.fault];
        let in_handshake = matches!(trigger, Trigger::Byte(_, _, at) if at < HANDSHAKE);
        action == Action::Flip && fired.phase < Phase::HandOver && !in_handshake
    });
    match changed {
        Some(fired) if run.plan.scene.tls && !has_lost_link(run) => {
            bail!("a bit was changed in phase {}, and nobody noticed", fired.phase.name())
        }
        _ => Ok(()),
    }
}

/// The guest is at the source: it runs, or a human has it run.
fn stayed(run: &mut Run<'_>) -> Result<Outcome> {
    let outcome = match run.source().seen.run_state.as_str() {
        "running" => Outcome::Stayed,
        // It may have gone, as far as the source knows: whoever knows better says so.
        "postmigrate" => {
            run.source().execute("cont", json!({})).context("the guest is nowhere")?;
            Outcome::StayedInDoubt
        }
        other => bail!("the guest is at the source, and {other}"),
    };
    run.source().look()?;
    check_runs_well(run.source())?;
    Ok(outcome)
}

/// A source whose guest has gone does not run it.
fn refuses_cont(run: &mut Run<'_>) -> Result<()> {
    let state = run.source().seen.run_state.clone();
    ensure!(state == "postmigrate", "the guest has gone, and the source's is {state}");
    ensure!(
        run.source().execute("cont", json!({})).is_err(),
        "the source ran a guest that has gone"
    );
    Ok(())
}

/// The guest is at the destination, with every page as the source had it, and runs on.
fn check_moved(run: &mut Run<'_>) -> Result<()> {
    let folder = run.folder;
    let whole = !super::is_paused(run.source());
    let paused = run.plan.scene.paused;
    let state = run.destination().seen.run_state.clone();
    // A guest that was stopped before is not run by anybody.
    ensure!(
        state == if paused { "paused" } else { "running" },
        "the guest has come, and is {state}"
    );
    if !paused {
        run.destination().execute("stop", json!({}))?;
    }
    let done = self_check(run.destination())?;
    if whole {
        let then = self_check(run.source())?;
        ensure!(done >= then, "the guest went back: {done} updates, {then} at the source");
        let (left, came) =
            (Pages::of(run.source(), folder)?, Pages::of(run.destination(), folder)?);
        let ranges = if paused { Vec::new() } else { written(run.destination())? };
        left.check_same(&came, &ranges)?;
    }
    run.destination().execute("cont", json!({}))?;
    goes_on(run.destination())
}

/// The guest runs, has lost nothing, and goes on.
fn check_runs_well(vm: &mut Vm) -> Result<()> {
    vm.look()?;
    if runs(vm) {
        goes_on(vm)?;
        vm.execute("stop", json!({}))?;
    }
    self_check(vm)?;
    vm.execute("cont", json!({}))?;
    goes_on(vm)
}

/// What the guest finds when it looks at every page it writes; gives its updates so far.
fn self_check(vm: &mut Vm) -> Result<u64> {
    let check = vm.execute("x-self-check", json!({}))?;
    let name = vm.side.name();
    ensure!(check["passed"] == true, "the guest's check of itself at the {name}: {check}");
    ensure!(check["failure"].is_null(), "a vCPU failed at the {name}: {check}");
    check["updates"].as_u64().context("no number of updates")
}

fn goes_on(vm: &mut Vm) -> Result<()> {
    let (before, begun) = (vm.updates()?, Instant::now());
    while vm.updates()? == before {
        ensure!(begun.elapsed() < PROGRESS, "the guest at the {} does nothing", vm.side.name());
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
