//! Device state: each section with its place, at the end of a stream or in a package.

use whimbrel_wire::{Command, DeviceSection, DeviceState, Package};

use super::command;
use super::report::{Report, Section};

/// Notes sections and commands that stand one after the other.
struct Walk<'r> {
    report: &'r mut Report,
    inside: Option<&'static str>,
    at: u64,
    scratch: Vec<u8>,
}

impl Walk<'_> {
    fn section(&mut self, section: &DeviceSection) {
        let bytes = section.payload.len() as u64;
        let mut entry = Section::device(&section.header, bytes, self.at);
        entry.inside = self.inside;
        self.report.section(entry);
        self.scratch.clear();
        section.header.encode_full(&mut self.scratch);
        section.header.id.encode_footer(&mut self.scratch);
        self.at += self.scratch.len() as u64 + bytes;
    }

    fn command(&mut self, command: &Command) {
        let mut entry = command::entry(command, self.at);
        entry.inside = self.inside;
        self.report.command(entry, false);
        self.scratch.clear();
        command.encode(&mut self.scratch);
        self.at += self.scratch.len() as u64;
    }
}

/// Notes device state that begins at `at`; returns where its EOF is.
pub(super) fn note(
    report: &mut Report,
    state: &DeviceState,
    at: u64,
    inside: Option<&'static str>,
) -> u64 {
    let mut walk = Walk { report, inside, at, scratch: Vec::new() };
    let mut commands = state.commands.iter().peekable();
    for (place, section) in state.sections.iter().enumerate() {
        while let Some((_, command)) = commands.next_if(|(before, _)| *before <= place) {
            walk.command(command);
        }
        walk.section(section);
    }
    commands.for_each(|(_, command)| walk.command(command));
    walk.at
}

/// Notes a package that begins at `at`.
pub(super) fn note_package(report: &mut Report, package: &Package, at: u64) {
    let mut walk = Walk { report, inside: Some("package"), at, scratch: Vec::new() };
    walk.command(&Command::PostcopyListen);
    package.sections.iter().for_each(|section| walk.section(section));
    package.pings.iter().for_each(|value| walk.command(&Command::Ping(*value)));
    walk.command(&Command::PostcopyRun);
}
