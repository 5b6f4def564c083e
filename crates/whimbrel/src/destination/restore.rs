//! The thread that makes huge pages of small ones that have all arrived, while others arrive.

use std::time::Duration;

use whimbrel_ram::AbsentRam;

use crate::error::Error;
use crate::worker::{Cancel, Woken};

/// How long it rests when there is nothing to do. Nobody waits for it.
const REST: Duration = Duration::from_millis(5);

/// It has nothing to do with pages that somebody waits for, and is not to take a processor from
/// those that have.
const NICE: i32 = 10;

/// Whether there are huge pages that are placed in small pieces.
pub(super) fn is_of_use(absent: &AbsentRam) -> bool {
    let mut blocks = absent.ram().blocks();
    blocks.any(|(index, block)| block.host_page_size() > absent.unit(index))
}

/// Restores until it is stopped; what is left then is done at the end.
pub(super) fn run(absent: &AbsentRam, stop: &Cancel) -> Result<(), Error> {
    // Of this thread alone, on Linux. Where it may not be changed, it stays.
    let _ = rustix::process::nice(NICE);
    loop {
        let restored = absent.restore_next().map_err(Error::system("restoring huge pages"))?;
        let rest = if restored { Duration::ZERO } else { REST };
        if stop.sleep(rest).map_err(Error::system("waiting"))? == Woken::Cancelled {
            return Ok(());
        }
    }
}
