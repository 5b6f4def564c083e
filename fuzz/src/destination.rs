//! A whole destination: what an input says on its channels is taken in by the real engine, with
//! all of its threads, for a guest of 8 MiB.

use std::sync::Arc;
use std::time::Duration;

use whimbrel::{Address, Capability, MigrationInfo, MigrationStatus, Migrator, RunState, Start};

use crate::choices::Choices;
use crate::ends::{End, patience, within};
use crate::guest::{Alone, FuzzVm, expect_one_line, scratch};
use crate::telling::{CHANNELS, Step, URGENT, steps};

/// The destination's own settings, a bit each in the first byte of an input.
mod set {
    pub(super) const POSTCOPY: u8 = 1;
    pub(super) const PREEMPT: u8 = 2;
    pub(super) const MULTIFD: u8 = 4;
    pub(super) const BLOCKTIME: u8 = 8;
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
        "postcopy" | "loading" | "run-apart" => set::POSTCOPY | set::BLOCKTIME,
        "preempt" | "cut" => set::POSTCOPY | set::PREEMPT,
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
    let path = scratch("in");
    migrator.incoming(&Address::Unix(path.clone()), false).expect("a free address");

    let channels = if settings & set::MULTIFD != 0 { 3 } else { 1 };
    let mut ends: Vec<Option<End>> = (0..CHANNELS)
        .map(|channel| if channel < channels { End::connect(&path) } else { None })
        .collect();
    let mut more = Vec::new();
    for step in steps {
        match step {
            Step::Send(channel, bytes) => {
                let end = &mut ends[channel];
                if end.is_none() && channel == URGENT {
                    *end = End::connect(&path);
                }
                if let Some(end) = end {
                    end.send(&bytes);
                }
            }
            Step::Connect if ends[URGENT].is_none() => ends[URGENT] = End::connect(&path),
            Step::Connect if more.len() < 8 => more.push(End::connect(&path)),
            Step::Connect => {}
            Step::Close(channel) => {
                if let Some(end) = &mut ends[channel] {
                    end.close();
                }
            }
            Step::Settle => ends.iter_mut().flatten().for_each(End::settle),
        }
        ends.iter_mut().flatten().for_each(|end| {
            end.receive();
        });
    }
    if settings & set::YANKED != 0 {
        // Refused where it has ended already.
        let _ = migrator.yank();
    }
    if settings & set::ENDS_EARLY == 0 {
        ends.iter_mut().flatten().for_each(|end| {
            end.settle();
            end.close();
        });
        within(SEES_THE_END, || {
            ends.iter_mut().flatten().for_each(|end| {
                end.receive();
            });
            !is_under_way(&migrator)
        });
    }
    // It may have been left waiting for whoever comes next; now it must end.
    migrator.end();
    let info = migrator.info();
    expect_sound(&vm, &migrator);
    // A destination that paused keeps watch over its guest's RAM for as long as there is a process.
    whimbrel::fuzzing::let_go();
    vm.end();
    drop((migrator, ends, more));
    assert_eq!(Arc::strong_count(&vm), 1, "nobody holds the VM");
    drop(vm);
    alone.expect_nothing_left();
    info
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
    assert!(!here || done.loaded == 1, "{status}: a guest that came has been loaded");
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
