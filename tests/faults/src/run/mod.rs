//! One run: two processes, a link that fails between them, and what came of it.

mod judge;
mod pages;
mod watch;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::census::stacks;
use crate::phase::Phase;
use crate::plan::{Action, Begin, Plan, Side, Transport, Trigger};
use crate::proxy::{Fired, Place, Proxy};
use crate::vm::{Abilities, Making, Vm, What};
pub(crate) use judge::Outcome;
use watch::Watch;

/// Nothing has changed for so long: nothing is going to, by itself.
const QUIET: Duration = Duration::from_millis(1500);
/// No part of a run takes so long on the slowest machine, unless it hangs.
const HANGS: Duration = Duration::from_secs(30);

/// States between which a side goes to and fro that tries to reach the other one.
const TRIES: [&str; 3] = ["postcopy-paused", "postcopy-recover-setup", "postcopy-recover"];

/// What all runs have in common.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    pub(crate) binary: PathBuf,
    /// Credentials for both endpoints.
    pub(crate) credentials: PathBuf,
    /// Where the files of runs are that failed.
    pub(crate) kept: PathBuf,
    /// Whether there are huge pages to be had. Without, a guest that should lie in them does not.
    pub(crate) huge: bool,
}

/// What came of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Verdict {
    pub(crate) seed: u64,
    pub(crate) index: u64,
    pub(crate) way: String,
    pub(crate) tls: bool,
    pub(crate) huge: bool,
    /// Kind of each fault, and the phase in which it happened, if it did.
    pub(crate) faults: Vec<(String, Option<Phase>)>,
    /// All that failed was the link, and it is to be recovered without a human.
    pub(crate) of_link: bool,
    pub(crate) outcome: Option<Outcome>,
    /// The link was lost when each side had a part of the guest.
    pub(crate) paused: bool,
    /// Somebody had to end or resume it.
    pub(crate) by_hand: bool,
    pub(crate) millis: u64,
    pub(crate) failure: Option<String>,
    /// What happened, in words.
    #[serde(skip)]
    pub(crate) story: String,
}

/// Does what the plan says. A failure is in the verdict, and what it was seen by stays.
pub(crate) fn run(setting: &Setting, plan: &Plan) -> Verdict {
    let begun = Instant::now();
    let huge = setting.huge && plan.scene.huge;
    let mut verdict = Verdict {
        seed: plan.seed,
        index: plan.index,
        way: plan.scene.way.name().to_owned(),
        tls: plan.scene.tls,
        huge,
        faults: plan.faults.iter().map(|fault| (fault.action.kind().to_owned(), None)).collect(),
        of_link: !plan.scene.by_hand,
        outcome: None,
        paused: false,
        by_hand: false,
        millis: 0,
        failure: None,
        story: String::new(),
    };
    let folder = match tempfile::Builder::new().prefix("wf-").tempdir() {
        Ok(folder) => folder,
        Err(error) => {
            verdict.failure = Some(format!("no folder: {error}"));
            return verdict;
        }
    };
    let mut story = format!("{plan}\n\n");
    let result = Run::start(setting, plan, folder.path(), huge).and_then(|mut run| {
        let result = run.all();
        verdict.paused = run.watch.has_told(Side::Source, "postcopy-paused");
        verdict.by_hand = run.by_hand;
        verdict.of_link &= !judge::changed_unnoticed(&run);
        for fired in &run.fired {
            verdict.faults[fired.fault].1 = Some(fired.phase);
            verdict.of_link &= plan.faults[fired.fault].action.is_of_link();
        }
        if result.is_err() {
            run.tell_all();
        }
        story.push_str(&run.story);
        result
    });
    match result {
        Ok(outcome) => verdict.outcome = Some(outcome),
        Err(error) => {
            verdict.failure = Some(format!("{error:#}"));
            let _ = writeln!(story, "\nFAILED: {error:#}");
            keep(setting, plan, folder.path(), &story);
        }
    }
    verdict.story = story;
    verdict.millis = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    verdict
}

/// Keeps the logs and the story of a run.
fn keep(setting: &Setting, plan: &Plan, folder: &Path, story: &str) {
    let to = setting.kept.join(format!("{}-{}", plan.seed, plan.index));
    let kept = fs::create_dir_all(&to).and_then(|()| {
        for side in Side::BOTH {
            let log = format!("{}.log", side.name());
            fs::copy(folder.join(&log), to.join(&log))?;
        }
        fs::write(to.join("story.txt"), story)
    });
    if let Err(error) = kept {
        eprintln!("{}: {error}", to.display());
    }
}

/// A run under way.
struct Run<'r> {
    plan: &'r Plan,
    folder: &'r Path,
    abilities: Abilities,
    vms: [Vm; 2],
    proxy: Proxy,
    watch: Watch,
    fired: Vec<Fired>,
    /// Which of the plan's faults have been begun from here.
    begun: Vec<bool>,
    /// When `migrate` was told.
    start: Instant,
    /// When anything was last seen to change.
    changed: Instant,
    moved: u64,
    /// The link does not fail any more.
    healed: bool,
    /// The guest was told to go first.
    sent_first: bool,
    /// It may stand still for longer than was asked for at first.
    eased: bool,
    by_hand: bool,
    story: String,
}

impl<'r> Run<'r> {
    /// Everything up to `migrate`.
    fn start(setting: &Setting, plan: &'r Plan, folder: &'r Path, huge: bool) -> Result<Run<'r>> {
        let making =
            Making { binary: &setting.binary, credentials: &setting.credentials, folder, huge };
        let mut source = Vm::start(Side::Source, &plan.scene, making)?;
        let mut destination = Vm::start(Side::Destination, &plan.scene, making)?;
        let abilities = source.abilities()?;
        source.set_up(&plan.scene, &abilities)?;
        destination.set_up(&plan.scene, &abilities)?;
        let place = |name: &str| match plan.scene.transport {
            Transport::Tcp => Place::Tcp(0),
            Transport::Unix => Place::Unix(folder.join(name)),
        };
        let upstream = destination.listen("migrate-incoming", &place("there"))?;
        let pids = [source.pid(), destination.pid()];
        let proxy = Proxy::start(plan, &place("link"), upstream, pids)?;
        Ok(Run {
            plan,
            folder,
            abilities,
            vms: [source, destination],
            proxy,
            watch: Watch::default(),
            fired: Vec::new(),
            begun: vec![false; plan.faults.len()],
            start: Instant::now(),
            changed: Instant::now(),
            moved: 0,
            healed: false,
            sent_first: false,
            eased: false,
            by_hand: false,
            story: String::new(),
        })
    }

    fn source(&mut self) -> &mut Vm {
        &mut self.vms[Side::Source as usize]
    }

    fn destination(&mut self) -> &mut Vm {
        &mut self.vms[Side::Destination as usize]
    }

    fn all(&mut self) -> Result<Outcome> {
        let to = self.proxy.place().to_string();
        self.start = Instant::now();
        // A source that was killed or stopped before it could answer is a fault as any other.
        if let Err(error) = self.source().execute("migrate", json!({ "uri": to })) {
            self.note(&format!("migrate: {error:#}"));
        }
        if !self.settle()? {
            self.end_by_hand()?;
        }
        // Whoever is stopped goes on, and finds the world as it is now.
        self.proxy.heal();
        self.healed = true;
        self.note("the link is a good one now");
        if !self.settle()? {
            self.end_by_hand()?;
        }
        if self.abilities.recovers && self.vms.iter().all(|vm| !vm.is_gone() && has_lost(vm)) {
            self.recover_by_hand()?;
        }
        // The sides were looked at one after the other, and what the link held back may have come.
        self.look()?;
        if !self.settle()? {
            self.end_by_hand()?;
        }
        judge::judge(self)
    }

    fn note(&mut self, what: &str) {
        let at = self.start.elapsed().as_secs_f64() * 1000.0;
        let _ = writeln!(self.story, "{at:9.2} ms  {what}");
    }

    /// Looks at everything once, and does what is due.
    fn look(&mut self) -> Result<()> {
        for side in [Side::Destination, Side::Source] {
            if self.proxy.has_stopped(side) {
                continue;
            }
            let vm = &mut self.vms[side as usize];
            let (was_gone, before) = (vm.is_gone(), vm.seen.clone());
            let heard = vm.look()?;
            let (is_gone, seen) = (vm.is_gone(), vm.seen.clone());
            if is_gone && !was_gone {
                self.changed = Instant::now();
                let killed = self.proxy.has_killed(side);
                self.note(&format!("the {} is gone", side.name()));
                if !killed {
                    let ended = self.vms[side as usize].ended;
                    bail!("the {} ended by itself: {ended:?}", side.name());
                }
                self.watch.gone(side);
            }
            for heard in heard {
                self.note(&format!("{} tells {:?}", side.name(), heard.what));
                if let What::Migration(status) = &heard.what {
                    let status = status.clone();
                    self.told(side, &status);
                }
                self.watch.heard(side, heard);
            }
            if (&before.status, &before.run_state) != (&seen.status, &seen.run_state) {
                // To try in vain again and again is no change.
                if ![&before, &seen].into_iter().all(|seen| TRIES.contains(&seen.status.as_str())) {
                    self.changed = Instant::now();
                }
                let why = seen.error.as_deref().unwrap_or("");
                let line = format!("{}: {}, {} {why}", side.name(), seen.status, seen.run_state);
                self.note(&line);
            }
            if side == Side::Source && !is_gone {
                self.proxy.set_phase(Phase::of_status(&seen.status));
            }
        }
        // What a process that is stopped has told is still to be read.
        if !self.someone_is_stopped() {
            self.watch.check()?;
        }
        self.look_at_link();
        self.fire_late();
        self.send_first()?;
        self.let_it_converge()
    }

    /// A state that may have been over before anybody could ask for it.
    fn told(&mut self, side: Side, status: &str) {
        if !TRIES.contains(&status) {
            self.changed = Instant::now();
        }
        if side == Side::Source {
            self.proxy.set_phase(Phase::of_status(status));
        }
        for (at, fault) in self.plan.faults.iter().enumerate() {
            if let Trigger::Status(of, name, after) = fault.trigger
                && of == side
                && name == status
            {
                self.watch.arm(at, Instant::now() + after);
            }
        }
    }

    fn look_at_link(&mut self) {
        let moved = self.proxy.moved();
        if moved != std::mem::replace(&mut self.moved, moved) || self.proxy.is_busy() {
            self.changed = Instant::now();
        }
        for fired in self.proxy.fired() {
            self.changed = Instant::now();
            let fault = self.plan.faults[fired.fault];
            let late = fired.at.elapsed().as_secs_f64() * 1000.0;
            self.note(&format!("{fault} ({}, {late:.2} ms ago)", fired.phase.name()));
            self.fired.push(fired);
            if let Action::Pause(side) = fault.action
                && !self.proxy.has_stopped(side)
                && !self.vms[side as usize].is_gone()
            {
                let answer = self.vms[side as usize].execute("migrate-pause", json!({}));
                self.note(&format!("migrate-pause at the {}: {answer:?}", side.name()));
            }
        }
    }

    /// Faults that wait for what QMP tells.
    fn fire_late(&mut self) {
        for fault in self.watch.due(Instant::now()) {
            if !std::mem::replace(&mut self.begun[fault], true) {
                self.proxy.fire(fault);
            }
        }
    }

    /// Has the guest go first, in postcopy, when it is time to.
    fn send_first(&mut self) -> Result<()> {
        let scene = &self.plan.scene;
        let running = ["setup", "active"].contains(&self.vms[0].seen.status.as_str());
        if !scene.way.is_postcopy()
            || self.sent_first
            || !running
            || self.proxy.has_stopped(Side::Source)
            || self.source().is_gone()
        {
            return Ok(());
        }
        let due = match scene.begin {
            Begin::AtOnce => true,
            Begin::Halfway => self.moved > scene.memory / 2,
            Begin::FirstPass => self.moved > scene.memory,
        };
        // What is all zeros or compressed never comes so far.
        if due || self.start.elapsed() > Duration::from_millis(200) {
            self.sent_first = true;
            if let Err(error) = self.source().execute("migrate-start-postcopy", json!({})) {
                self.note(&format!("migrate-start-postcopy: {error:#}"));
            }
        }
        Ok(())
    }

    /// A guest in huge pages may dirty them faster than they go: then it may stand still for longer.
    fn let_it_converge(&mut self) -> Result<()> {
        const LONG: Duration = Duration::from_secs(2);
        let active = self.vms[0].seen.status == "active" && !self.source().is_gone();
        if self.eased || !active || self.start.elapsed() < LONG {
            return Ok(());
        }
        if !self.proxy.has_stopped(Side::Source) {
            self.eased = true;
            let ease = json!({ "downtime-limit": 2000, "max-bandwidth": 0 });
            let answer = self.source().execute("migrate-set-parameters", ease);
            self.note(&format!("it may take longer: {answer:?}"));
        }
        Ok(())
    }

    /// Waits until nothing moves any more; says whether both sides have come to rest.
    fn settle(&mut self) -> Result<bool> {
        let until = Instant::now() + HANGS;
        self.changed = Instant::now();
        loop {
            self.look()?;
            if self.is_at_rest() {
                return Ok(true);
            }
            if self.changed.elapsed() > QUIET {
                return Ok(false);
            }
            if Instant::now() > until {
                bail!("still under way after {} s", HANGS.as_secs());
            }
        }
    }

    /// Whether both sides have ended as far as they do by themselves.
    fn is_at_rest(&self) -> bool {
        if Side::BOTH.into_iter().any(|side| self.proxy.has_stopped(side)) {
            return false;
        }
        let [source, destination] = &self.vms;
        let over = |vm: &Vm| vm.is_gone() || ended(vm);
        if over(source) && (over(destination) || waits(destination)) {
            return true;
        }
        // What recovers is not at rest while the other side is there and may yet come.
        let alone = destination.is_gone() || (over(source) && source.seen.status != "completed");
        let stays = !self.abilities.recovers || alone;
        let rests = |vm: &Vm| over(vm) || is_paused(vm);
        stays && rests(source) && rests(destination) && !self.proxy.is_busy()
    }

    /// What an operator does with a migration that does not go on: ends it where that can be, and
    /// has it pause where it cannot.
    fn end_by_hand(&mut self) -> Result<()> {
        self.note("nothing goes on");
        let mut ended_any = false;
        let waited_for = self.vms.iter().all(|vm| !vm.is_gone() && !ended(vm));
        for side in Side::BOTH {
            let vm = &mut self.vms[side as usize];
            if vm.is_gone() || self.proxy.has_stopped(side) {
                continue;
            }
            let command = match (side, vm.seen.status.as_str()) {
                (Side::Source, "setup" | "active" | "pre-switchover" | "device") => {
                    "migrate_cancel"
                }
                (_, "postcopy-active") => "migrate-pause",
                (_, "postcopy-device") | (Side::Destination, "active") => "yank",
                // Over a link that does not let them they try in vain, and are right to.
                (_, "postcopy-recover" | "postcopy-recover-setup") if self.healed && waited_for => {
                    "yank"
                }
                _ => continue,
            };
            (self.by_hand, ended_any) = (true, true);
            let arguments = match command {
                "yank" => json!({ "instances": [{ "type": "migration" }] }),
                _ => json!({}),
            };
            let answer = vm.execute(command, arguments);
            self.note(&format!("{command} at the {}: {answer:?}", side.name()));
        }
        if ended_any && !self.settle()? && !self.someone_is_stopped() {
            let hangs = |vm: &&Vm| !vm.is_gone() && !ended(vm) && !has_lost(vm) && !waits(vm);
            if let Some(vm) = self.vms.iter().find(hangs) {
                bail!("the {} does not end when it is told to: {}", vm.side.name(), vm.seen.status);
            }
        }
        Ok(())
    }

    fn someone_is_stopped(&self) -> bool {
        Side::BOTH.into_iter().any(|side| self.proxy.has_stopped(side))
    }

    /// `migrate-recover` and `migrate` with `resume`, over a good link. What is refused because it is
    /// under way already is as good; what is not shows in what comes of it.
    fn recover_by_hand(&mut self) -> Result<()> {
        self.by_hand = true;
        self.note("recovering by hand");
        let place = match self.plan.scene.transport {
            Transport::Tcp => Place::Tcp(0),
            Transport::Unix => Place::Unix(self.folder.join("again")),
        };
        match self.destination().listen("migrate-recover", &place) {
            Ok(upstream) => self.proxy.lead_to(upstream),
            Err(error) => self.note(&format!("migrate-recover: {error:#}")),
        }
        let resume = json!({ "uri": self.proxy.place().to_string(), "resume": true });
        if let Err(error) = self.source().execute("migrate", resume) {
            self.note(&format!("migrate with resume: {error:#}"));
        }
        self.settle()?;
        Ok(())
    }

    /// All that is known of a run that failed, while its processes are still there.
    fn tell_all(&mut self) {
        for side in Side::BOTH {
            let vm = &mut self.vms[side as usize];
            let (id, gone) = (vm.id(), vm.is_gone());
            let report = match gone || self.proxy.has_stopped(side) {
                true => String::from("not to be asked"),
                false => vm.report(),
            };
            let stacks = stacks(id);
            let _ = write!(self.story, "\n{} (process {id}): {report}\n{stacks}", side.name());
        }
    }
}

/// The migration is over at this side.
fn ended(vm: &Vm) -> bool {
    ["completed", "failed", "cancelled"].contains(&vm.seen.status.as_str())
}

/// It waits for the other side, with half a guest.
fn is_paused(vm: &Vm) -> bool {
    vm.seen.status == "postcopy-paused"
}

/// The same, or it tries to reach the other side.
fn has_lost(vm: &Vm) -> bool {
    TRIES.contains(&vm.seen.status.as_str())
}

/// It waits for a source that never came.
fn waits(vm: &Vm) -> bool {
    vm.side == Side::Destination && ["none", "setup"].contains(&vm.seen.status.as_str())
}
