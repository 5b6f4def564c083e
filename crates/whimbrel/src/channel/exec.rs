//! `exec:CMD`: the standard input, or output, of a command.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::time::Duration;

use super::end::shut_on_request;
use crate::address::Address;
use crate::error::Error;
use crate::worker::{Cancel, Woken};

/// A running command. Dropped before [`finish`](Command::finish), it and its children are killed.
#[derive(Debug)]
pub(super) struct Command {
    address: Address,
    child: Child,
    ended: bool,
}

impl Command {
    /// Starts a command that reads what we write.
    pub(super) fn reader(address: &Address, words: &[String]) -> io::Result<(OwnedFd, Command)> {
        let mut child = command(words)?.stdin(Stdio::piped()).spawn()?;
        let fd = OwnedFd::from(child.stdin.take().expect("asked for above"));
        Ok((fd, Command { address: address.clone(), child, ended: false }))
    }

    /// Starts a command that writes what we read.
    pub(super) fn writer(address: &Address, words: &[String]) -> io::Result<(OwnedFd, Command)> {
        let mut child = command(words)?.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let fd = OwnedFd::from(child.stdout.take().expect("asked for above"));
        Ok((fd, Command { address: address.clone(), child, ended: false }))
    }

    /// Waits for the command's end, or for `yanked`; one that fails fails the migration.
    pub(super) fn finish(mut self, cancel: &Cancel, yanked: &Cancel) -> Result<(), Error> {
        loop {
            if let Some(status) =
                self.child.try_wait().map_err(Error::system("waiting for exec"))?
            {
                self.ended = true;
                return match status.success() {
                    true => Ok(()),
                    false => Err(Error::Command {
                        address: self.address.clone(),
                        status: status.to_string(),
                    }),
                };
            }
            let nap = cancel.sleep(Duration::from_millis(2));
            if nap.map_err(Error::system("waiting for exec"))? == Woken::Cancelled {
                return Err(Error::Cancelled);
            }
            if yanked.is_set() {
                return Err(Error::System { doing: "waiting for exec", source: shut_on_request() });
            }
        }
    }
}

fn command(words: &[String]) -> io::Result<std::process::Command> {
    let (program, arguments) = words.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = std::process::Command::new(program);
    // A group of its own, so that what a shell starts can be ended with it.
    command.args(arguments).process_group(0);
    Ok(command)
}

impl Drop for Command {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        if let Ok(number) = i32::try_from(self.child.id())
            && let Some(group) = rustix::process::Pid::from_raw(number)
        {
            // Gone already is as good.
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        let _ = self.child.wait();
    }
}
