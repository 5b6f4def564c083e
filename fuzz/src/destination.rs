//! A whole destination: what an input says on its channels is taken in by the real engine, with
//! all of its threads, for a guest of 8 MiB.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use whimbrel::{
    Address, AutoRecover, Capability, MigrationInfo, MigrationStatus, Migrator, RunState, Start,
};

use crate::choices::Choices;
use crate::ends::{patience, within};
use crate::guest::{Alone, FuzzVm, expect_one_line, scratch};
use crate::speaker::Speaker;
use crate::telling::steps;

/// The destination's own settings, a bit each in the first byte of an input.
mod set {
    pub(super) const POSTCOPY: u8 = 1;
    pub(super) const PREEMPT: u8 = 2;
    pub(super) const MULTIFD: u8 = 4;
    pub(super) const BLOCKTIME: u8 = 8;
    /// From a QEMU's broken link as well. That it goes with another is to have one byte of settings.
    pub(super) const RECOVERS: u8 = BLOCKTIME;
    pub(super) const UUID: u8 = 16;
    pub(super) const STAYS_PAUSED: u8 = 32;
    /// It is told to end while the source has still to say something.
    pub(super) const ENDS_EARLY: u8 = 64;
    pub(super) const YANKED: u8 = 128;
}

/// How many bytes of settings an input begins with.
pub(crate) const SETTINGS: usize = 1;

/// How long a destination to which nothing more comes may take to see that.
const SEES_THE_END: Duration = patience(15);

/// The settings for one of [`crate::telling::migrations`].
pub(crate) fn settings_for(name: &str) -> u8 {
    match name {
        "postcopy" | "loading" | "run-apart" | "recovery-qemu" => set::POSTCOPY | set::BLOCKTIME,
        "preempt" | "cut" | "recovery" => set::POSTCOPY | set::PREEMPT,
        "multifd" | "multifd-zstd" => set::MULTIFD,
        "multifd-goes-on" => set::POSTCOPY | set::MULTIFD,
        _ => 0,
    }
}

fn capabilities(settings: u8) -> Vec<(Capability, bool)> {
    let preempt = settings & set::PREEMPT != 0;
    let chosen = [
        (Capability::PostcopyRam, settings & set::POSTCOPY != 0 || preempt),
        (Capability::PostcopyPreempt, preempt),
        (Capability::Multifd, settings & set::MULTIFD != 0),
        (Capability::PostcopyBlocktime, settings & set::BLOCKTIME != 0),
        (Capability::ValidateUuid, settings & set::UUID != 0),
    ];
    chosen.into_iter().filter(|(_, on)| *on).collect()
}

/// The target.
pub fn destination(data: &[u8]) {
    run(data);
}

/// How the migration ended.
fn run(data: &[u8]) -> MigrationInfo {
    let alone = Alone::begin();
    let mut choices = Choices::new(data);
    let settings = choices.byte();
    let steps = steps(&mut choices);

    let vm = FuzzVm::new((settings & set::UUID != 0).then_some([1; 16]));
    let autostart = settings & set::STAYS_PAUSED == 0;
    let migrator = Migrator::new(vm.clone(), Start::Incoming { autostart });
    migrator.set_capabilities(&capabilities(settings)).expect("nothing runs");
    migrator
        .update_parameters(|parameters| {
            if settings & set::RECOVERS != 0 {
                parameters.auto_recover = AutoRecover::On;
            }
        })
        .expect("allowed");
    let path = scratch("in");
    migrator.incoming(&Address::Unix(path.clone()), false).expect("a free address");

    let channels = if settings & set::MULTIFD != 0 { 3 } else { 1 };
    let mut speaker = Speaker::connect(path, channels);
    for step in steps {
        speaker.go(step, || recover(&migrator));
    }
    if settings & set::YANKED != 0 {
        // Refused where it has ended already.
        let _ = migrator.yank();
    }
    if settings & set::ENDS_EARLY == 0 {
        speaker.close();
        within(SEES_THE_END, || {
            speaker.receive();
            // One that is ended in the moment between its pause and its RUN was ended before it.
            let paused = migrator.info().status == Some(MigrationStatus::PostcopyPaused);
            let may_run = paused && autostart && vm.done().resumed == 0;
            !is_under_way(&migrator) && !may_run
        });
    }
    // It may have been left waiting for whoever comes next; now it must end.
    migrator.end();
    let info = migrator.info();
    expect_sound(&vm, &migrator);
    // A destination that paused keeps watch over its guest's RAM for as long as there is a process.
    whimbrel::fuzzing::let_go();
    vm.end();
    drop((migrator, speaker));
    assert_eq!(Arc::strong_count(&vm), 1, "nobody holds the VM");
    drop(vm);
    alone.expect_nothing_left();
    info
}

/// Has a destination wait elsewhere for its source, if its migration is paused, or soon is.
fn recover(migrator: &Migrator) -> Option<PathBuf> {
    let paused = || migrator.info().status == Some(MigrationStatus::PostcopyPaused);
    let path = scratch("again");
    let recovers =
        within(SEES_THE_END, paused) && migrator.recover(&Address::Unix(path.clone())).is_ok();
    recovers.then_some(path)
}

fn is_under_way(migrator: &Migrator) -> bool {
    migrator
        .info()
        .status
        .is_some_and(|status| status.is_running() && status != MigrationStatus::PostcopyPaused)
}

fn expect_sound(vm: &FuzzVm, migrator: &Migrator) {
    let (info, done) = (migrator.info(), vm.done());
    let status = info.status.expect("one was begun");
    let here = matches!(status, MigrationStatus::Completed | MigrationStatus::PostcopyPaused);
    match status {
        MigrationStatus::Completed | MigrationStatus::Cancelled => {}
        _ => expect_one_line(info.error_desc.as_deref().expect("it says why it failed")),
    }
    assert!(here || done.resumed == 0, "{status}: a guest that has not come does not run");
    assert!(done.loaded == 1 || done.resumed == 0, "{status}: a guest that runs has been loaded");
    assert!(status != MigrationStatus::Completed || done.loaded == 1, "and one that has come");
    assert!(done.resumed <= 1, "a guest is run once: {done:?}");
    let says = migrator.run_state();
    assert_eq!(says == RunState::Running, done.running, "{status}: it says {says:?}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choices::Op;
    use crate::telling::migrations;

    /// What a fuzzer begins from goes as far as it is meant to.
    #[test]
    fn whole_migrations_arrive_and_others_do_not() {
        for (name, ops) in migrations() {
            let expected = match name {
                "cut" => MigrationStatus::PostcopyPaused,
                "file" | "file-aligned" | "file-sparse" | "qemu" => MigrationStatus::Failed,
                _ => MigrationStatus::Completed,
            };
            let mut input = vec![settings_for(name)];
            ops.iter().for_each(|op| op.write(&mut input));
            let info = run(&input);
            assert_eq!(info.status, Some(expected), "{name}: {:?}", info.error_desc);
        }
    }
}
