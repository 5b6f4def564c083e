//! What a rescue does with the guest and the right to run it.

use std::path::Path;
use std::sync::Arc;

use super::fill::{Filled, fill};
use super::keep::{KeptPart, Origin, keep};
use super::{Lost, Orders, Part};
use crate::error::Error;
use crate::guest::{Guest, Taken};
use crate::status::RunState;

/// Keeps what a paused source has, in `path`. Its guest has gone, and its RAM stays as it is.
pub(crate) fn keep_source(
    guest: &Guest,
    migration: Option<[u8; 16]>,
    path: &Path,
) -> Result<KeptPart, Error> {
    // Where it runs on, from a file that is rolled back to, is decided then; that it ran here before
    // it was stopped is the usual case.
    keep(&Origin { vm: guest.vm(), runs: true, migration, absent: None }, path)
}

/// Stops the guest of a paused destination, and keeps what has come of it in `path`. From then on
/// whoever restores it runs it; here only a human can say that nobody does (`cont`). On an error it
/// runs on.
pub(crate) fn keep_destination(
    guest: &Arc<Guest>,
    orders: &Orders,
    migration: Option<[u8; 16]>,
    path: &Path,
) -> Result<KeptPart, Error> {
    let Taken::Right(right) = guest.take_right() else {
        return Err(Error::Refused("the guest is not here to be kept".into()));
    };
    let before = guest.state();
    // Who wants to stop it, or run it, is told so meanwhile.
    guest.set_state(RunState::FinishMigrate);
    let ran = before == RunState::Running;
    if ran && let Err(error) = guest.pause(&right) {
        guest.put_right(right, before);
        return Err(error);
    }
    let (inner, path) = (guest.clone(), path.to_owned());
    let kept = orders.give(move |absent| {
        keep(&Origin { vm: inner.vm(), runs: ran, migration, absent: Some(absent) }, &path)
    });
    match kept {
        Ok(kept) => {
            let handing_over = guest.handing_over();
            guest.give_up_right(right);
            drop(handing_over); // Nobody will tell who took it.
            Ok(kept)
        }
        Err(error) => {
            let stays = guest.take_asked() == Some(RunState::Paused);
            let runs_on = ran && !stays && guest.resume(&right).is_ok();
            guest.put_right(right, if ran && !runs_on { RunState::Paused } else { before });
            Err(error)
        }
    }
}

/// Fills what is missing at a paused destination from `part`. Its guest runs meanwhile.
pub(crate) fn fill_destination(
    guest: &Arc<Guest>,
    orders: &Orders,
    part: Option<Part>,
    lost: Lost,
) -> Result<Filled, Error> {
    let inner = guest.clone();
    let filled = orders.give(move |absent| {
        let filled = fill(absent, &inner.vm().machine(), part.as_ref(), lost)?;
        inner.add_lost(filled.lost_pages);
        Ok(filled)
    })?;
    Ok(filled)
}
