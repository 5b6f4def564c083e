//! Commands of the source and words of COLO as entries of the report.

use whimbrel_wire::{ColoMessage, Command};

use super::report::Entry;

/// A command that begins at `at`.
pub(super) fn entry(command: &Command, at: u64) -> Entry {
    let mut entry = Entry::new(command.name(), at);
    match command {
        Command::Ping(value) => entry.value = Some((*value).into()),
        Command::PostcopyAdvise(sizes) => entry.value = sizes.map(|sizes| sizes.host_summary),
        Command::RamDiscard(discard) => {
            entry.block = Some(discard.block.to_string());
            entry.ranges = Some(discard.ranges.len() as u64);
            let bytes = discard.ranges.iter().map(|range| range.length);
            entry.bytes = Some(bytes.fold(0, u64::saturating_add));
        }
        Command::RecvBitmap(block) => entry.block = Some(block.to_string()),
        Command::Packaged { len } => entry.bytes = Some((*len).into()),
        Command::OpenReturnPath
        | Command::PostcopyListen
        | Command::PostcopyRun
        | Command::EnableColo
        | Command::PostcopyResume
        | Command::SwitchoverStart
        | Command::Identity(_) => {}
    }
    entry
}

/// A word of COLO that begins at `at`.
pub(super) fn colo_entry(message: ColoMessage, at: u64) -> Entry {
    let name = match message {
        ColoMessage::CheckpointReady => "CHECKPOINT_READY",
        ColoMessage::CheckpointRequest => "CHECKPOINT_REQUEST",
        ColoMessage::CheckpointReply => "CHECKPOINT_REPLY",
        ColoMessage::VmstateSend => "VMSTATE_SEND",
        ColoMessage::VmstateSize(_) => "VMSTATE_SIZE",
        ColoMessage::VmstateReceived => "VMSTATE_RECEIVED",
        ColoMessage::VmstateLoaded => "VMSTATE_LOADED",
        ColoMessage::PagesAhead => "WHIMBREL_PAGES_AHEAD",
    };
    let mut entry = Entry::new(name, at);
    if let ColoMessage::VmstateSize(size) = message {
        entry.bytes = Some(size);
    }
    entry
}
