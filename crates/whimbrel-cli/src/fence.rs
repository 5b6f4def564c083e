//! `--fence`: a command that makes sure that the primary runs no more.

use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use whimbrel::VmError;

/// How long it may take. One that hangs has not made sure of anything.
const LIMIT: Duration = Duration::from_secs(60);

/// Runs `command` by the shell; it succeeded only if it said so within the time.
pub(crate) fn run(command: &str) -> Result<(), VmError> {
    let failed = |why: String| VmError::new(format!("'{command}': {why}"));
    let mut child = Command::new("/bin/sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    let begun = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(failed(status.to_string())),
            Ok(None) if begun.elapsed() < LIMIT => sleep(Duration::from_millis(5)),
            Ok(None) => {
                // Gone meanwhile is too late as well.
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed(format!("not done within {} s", LIMIT.as_secs())));
            }
            Err(error) => return Err(failed(error.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fence_holds_if_it_says_so() {
        run("exit 0").expect("it says so");
        let error = run("exit 3").expect_err("it does not").to_string();
        assert_eq!(error, "'exit 3': exit status: 3");
    }
}
