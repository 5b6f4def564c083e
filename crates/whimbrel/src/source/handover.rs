//! The guest changes hands.
//!
//! With a return path the hand-over has two steps. A PING behind the last device is answered when
//! everything before it has been loaded (by a stock QEMU as well); up to then any failure leaves
//! the guest here. Then the right to run it is given up, and only then does the EOF mark go out,
//! without which no destination starts. From there on the guest is the destination's: if its SHUT
//! does not come, nobody here can know whether it runs there, and it stays stopped.

use std::time::Duration;

use whimbrel_wire::vmdesc::describe;
use whimbrel_wire::{Command, DeviceSection, encode_eof, encode_vm_description};

use super::setup::Stream;
use super::{Held, Job};
use crate::error::Error;
use crate::report::{add, set};
use crate::status::RunState;
use crate::worker::Cancel;

/// The PING behind the last device.
pub(crate) const PING_LOADED: u32 = 0x4c4f_4144;

/// How long a destination that has everything may take to say so to a source that was cancelled.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Sends the devices, gives up the right, and waits for the destination's last word.
pub(super) fn hand_over(
    job: &Job,
    held: &mut Held,
    mut stream: Stream,
    devices: &[DeviceSection],
) -> Result<(), Error> {
    let before = stream.out.bytes();
    for device in devices {
        device.encode(stream.out.words());
    }
    confirm_loaded(&mut stream)?;
    let description = describe(4096, devices);
    let kept = stream.out.channel().is_kept();
    let sent_before = stream.out.channel().bytes_out();
    let mut given_up_in = None;
    if !kept && let Held::Stopped { right, before } = std::mem::replace(held, Held::GivenUp) {
        job.guest.give_up_right(right);
        given_up_in = Some(before);
    }
    let answered = stream.answers.is_some();
    let mut result = commit(&mut stream, &description);
    if let Err(error) = result {
        if stream.out.channel().bytes_out() == sent_before
            && let Some(before) = given_up_in
            && let Some(right) = job.guest.right_is_returned()
        {
            // Not a byte of the mark went out: nobody was given anything.
            *held = Held::Stopped { right, before };
            return Err(error);
        }
        result = too_late_to_cancel(&mut stream, error);
    }
    add(&job.report.counters.downtime_bytes, stream.out.bytes() - before);
    set(&job.report.counters.transferred, stream.out.bytes());
    let finished = result.and_then(|()| stream.out.into_channel().finish());
    job.report.guest_has_gone();
    match finished {
        Ok(()) if kept => {
            if let Held::Stopped { right, .. } = std::mem::replace(held, Held::GivenUp) {
                job.guest.put_right(right, RunState::Postmigrate);
            }
            Ok(())
        }
        Ok(()) => {
            // Without a return path all was sent, and whether it arrived only a human can tell.
            if answered {
                job.guest.right_is_taken();
            }
            Ok(())
        }
        Err(cause) if kept => Err(cause),
        Err(cause) => Err(Error::InDoubt { cause: Box::new(cause) }),
    }
}

/// Waits until the destination has loaded all that was sent, where it can say so.
pub(crate) fn confirm_loaded(stream: &mut Stream) -> Result<(), Error> {
    if stream.answers.is_some() {
        Command::Ping(PING_LOADED).encode(stream.out.words());
    }
    stream.flush()?;
    match &mut stream.answers {
        Some(answers) => answers.wait_for_pong(stream.out.channel(), PING_LOADED),
        None => Ok(()),
    }
}

/// Cancelled when the end mark was out already: the destination most likely runs the guest and is
/// about to say so, which is better to know than to doubt.
fn too_late_to_cancel(stream: &mut Stream, error: Error) -> Result<(), Error> {
    let (Error::Cancelled, Some(answers)) = (&error, &mut stream.answers) else {
        return Err(error);
    };
    let channel = stream.out.channel();
    channel.heed(Cancel::new().map_err(Error::system("making an eventfd"))?);
    match answers.shut_within(channel, LAST_WORD) {
        Ok(Some(0)) => Ok(()),
        _ => Err(error),
    }
}

/// The end mark, on which the destination starts its guest, and the wait for its SHUT.
pub(crate) fn commit(stream: &mut Stream, description: &[u8]) -> Result<(), Error> {
    encode_eof(stream.out.words());
    // In one write with the mark: a stock QEMU answers a stream without it as if it had failed.
    encode_vm_description(description, stream.out.words());
    stream.flush()?;
    match &mut stream.answers {
        Some(answers) => match answers.wait_for_shut(stream.out.channel())? {
            0 => Ok(()),
            _ => Err(Error::PeerFailed),
        },
        None => Ok(()),
    }
}
