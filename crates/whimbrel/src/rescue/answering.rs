//! Answering faults on pages that have come, while RAM of a paused destination is read.
//!
//! Not every page that has come is mapped: one of zeros that nobody touched, one of shared memory.
//! Whoever touches such a page waits until somebody answers.

use std::thread;
use std::time::Duration;

use whimbrel_ram::{AbsentRam, Fault, TargetPage};

use crate::error::Error;
use crate::worker::{Cancel, Role, scoped};

/// Runs `work`, which touches no page that is missing, and answers its faults meanwhile.
pub(super) fn answering<T>(
    absent: &AbsentRam,
    work: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    let done = Cancel::new().map_err(Error::system("making an eventfd"))?;
    thread::scope(|scope| {
        let answering = scoped(scope, Role::DestinationFault, || run(absent, &done))
            .map_err(Error::system("starting a thread"))?;
        /// Ends the thread however the work ends.
        struct Ends<'c>(&'c Cancel);
        impl Drop for Ends<'_> {
            fn drop(&mut self) {
                self.0.set();
            }
        }
        let ends = Ends(&done);
        let result = work();
        drop(ends);
        match answering.join() {
            Ok(answered) => result.and_then(|value| answered.map(|()| value)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn run(absent: &AbsentRam, done: &Cancel) -> Result<(), Error> {
    use std::os::fd::AsFd;
    let mut faults = Vec::new();
    while !done.is_set() {
        let woken = done.wait_any(&[absent.as_fd()], Duration::MAX);
        woken.map_err(Error::system("waiting for page faults"))?;
        take(absent, &mut faults)?;
        for fault in faults.drain(..) {
            // Who touches what is missing waits for whoever brings it.
            answer(absent, &fault)?;
        }
    }
    Ok(())
}

/// Appends the faults that wait to be read.
pub(super) fn take(absent: &AbsentRam, faults: &mut Vec<Fault>) -> Result<(), Error> {
    absent.read_faults(faults).map_err(Error::system("reading page faults"))
}

/// Answers a fault, if its page has come; true when it had.
pub(super) fn answer(absent: &AbsentRam, fault: &Fault) -> Result<bool, Error> {
    let has_come = absent.received().contains(fault.block, TargetPage::containing(fault.offset));
    if has_come {
        absent.settle(fault).map_err(Error::system("answering page faults"))?;
    }
    Ok(has_come)
}
