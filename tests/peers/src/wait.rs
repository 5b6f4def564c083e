//! Bounded waiting: nothing in a test waits for ever, and what it waited for is in the error.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often a condition is looked at: short beside any wait here, long beside a look.
const POLL: Duration = Duration::from_millis(20);

/// Asks `ready` until it gives a value.
///
/// # Errors
/// The error of `ready`, or that `what` did not happen within `limit`.
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut ready: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let begun = Instant::now();
    loop {
        if let Some(value) = ready()? {
            return Ok(value);
        }
        if begun.elapsed() > limit {
            bail!("waited {} s in vain for {what}", limit.as_secs());
        }
        std::thread::sleep(POLL);
    }
}
