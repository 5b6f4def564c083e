//! The thread that makes huge pages of small ones that have all arrived, while others arrive.

use std::time::Duration;

use whimbrel_ram::AbsentRam;

use crate::error::Error;
use crate::worker::{Cancel, Woken};

/// How long it rests when there is nothing to do. Nobody waits for it.
const REST: Duration = Duration::from_millis(5);

/// Whether there are huge pages that are placed in small pieces.
pub(super) fn is_of_use(absent: &AbsentRam) -> bool {
    let mut blocks = absent.ram().blocks();
    blocks.any(|(index, block)| block.host_page_size() > absent.unit(index))
}

/// Restores until it is stopped; what is left then is done at the end.
///
/// At the priority of all others: a thread that were set aside while it changes the address space
/// would hold up everybody who places a page.
pub(super) fn run(absent: &AbsentRam, stop: &Cancel) -> Result<(), Error> {
    loop {
        let restored = absent.restore_next().map_err(Error::system("restoring huge pages"))?;
        let rest = if restored { Duration::ZERO } else { REST };
        if stop.sleep(rest).map_err(Error::system("waiting"))? == Woken::Cancelled {
            return Ok(());
        }
    }
}
