//! Collecting QEMU's device state at the end of a precopy stream.
//!
//! The state's sections cannot be told apart until the description behind EOF has arrived, so
//! they are kept until then. The end is recognised by `00 06 length {`, and believed when the
//! description is whole and its lengths cut all that was collected at footers.

use alloc::vec::Vec;

use crate::cut::{Delimit, Ending, Item, cut};
use crate::device::DeviceState;
use crate::section::{FOOTER_LEN, mark};
use crate::vmdesc::{VM_DESCRIPTION_MAX, VmDescription};
use crate::{Error, ErrorKind};

/// Bytes by which a possible end is recognised: EOF, the mark, a length, an opening brace.
const PATTERN_LEN: usize = 7;

/// Bytes of a PING command: mark, number, length, value.
const PING_LEN: usize = 9;

/// Most possible ends that are waited for at a time, or have turned out to be none. State made
/// to hold more of them is not worth the time.
const CANDIDATES_MAX: usize = 16;

/// Collects device state until its end is certain.
#[derive(Debug)]
pub struct DeviceTail {
    bytes: Vec<u8>,
    base: u64,
    limit: usize,
    /// Up to where ends were looked for.
    scanned: usize,
    pending: Vec<Candidate>,
    refused: usize,
}

/// A place where the state may end.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    /// The EOF byte.
    eof: usize,
    /// The end of the description.
    end: usize,
}

impl DeviceTail {
    /// Begins at the mark of the first FULL section, at `base` of the stream, and holds no more
    /// than `limit` bytes.
    #[must_use]
    pub const fn new(base: u64, limit: usize) -> Self {
        Self { bytes: Vec::new(), base, limit, scanned: 0, pending: Vec::new(), refused: 0 }
    }

    /// Takes more of the stream. Returns how many bytes it took (all, unless the state ends
    /// before) and the state once it is complete.
    ///
    /// # Errors
    /// When the state is longer than the limit, or its description does not fit it.
    pub fn feed(&mut self, input: &[u8]) -> Result<(usize, Option<DeviceState>), Error> {
        let before = self.bytes.len();
        let room = self.limit.saturating_sub(before);
        let (taken, beyond) = input.split_at_checked(room).unwrap_or((input, &[]));
        self.bytes.extend_from_slice(taken);
        if let Some((end, state)) = self.look_for_end()? {
            self.bytes.truncate(end);
            return Ok((end - before, Some(state)));
        }
        if !beyond.is_empty() {
            let (found, limit) = (self.limit as u64 + 1, self.limit as u64);
            let what = "bytes of device state";
            return Err(self.error(self.limit, ErrorKind::TooLarge { what, found, limit }));
        }
        Ok((taken.len(), None))
    }

    /// Bytes held.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether no byte was taken yet.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The value of a PING that is the last thing taken, behind a section's footer. A source that
    /// waits for the answer before it goes on is a whimbrel that sends a kept VM; bytes of a
    /// device's state that look the same cost an answer that nobody waits for.
    #[must_use]
    pub fn ends_with_ping(&self) -> Option<u32> {
        let (before, ping) = self.bytes.split_last_chunk::<PING_LEN>()?;
        let (_, [footer, ..]) = before.split_last_chunk::<FOOTER_LEN>()?;
        let [command, number @ .., a, b, c, d] = *ping;
        let is_ping = command == mark::COMMAND && number == [0, 2, 0, 4];
        (is_ping && *footer == mark::FOOTER).then(|| u32::from_be_bytes([a, b, c, d]))
    }

    /// The stream has ended without a description that fits: cuts the state at the footers of
    /// its sections.
    ///
    /// # Errors
    /// When that cannot be done up to an EOF mark as the last byte.
    pub fn finish_at_close(self) -> Result<DeviceState, Error> {
        if self.bytes.last() == Some(&mark::EOF) {
            let items = cut(&self.bytes, self.base, Delimit::Footer, Ending::Eof)?;
            return Ok(state_of(items, None));
        }
        let expected = "the end of the device state (EOF, and its description)";
        Err(self.error(self.bytes.len(), ErrorKind::Truncated { expected }))
    }

    /// Follows the bytes in their order, as if they came one at a time, so that the outcome does
    /// not depend on the pieces.
    fn look_for_end(&mut self) -> Result<Option<(usize, DeviceState)>, Error> {
        loop {
            let found = self.next_candidate();
            let seen = found.map_or(self.bytes.len(), |found| found.eof + PATTERN_LEN);
            if let Some(done) = self.try_ends_before(seen)? {
                return Ok(Some(done));
            }
            let Some(found) = found else { return Ok(None) };
            if self.pending.len() + self.refused >= CANDIDATES_MAX {
                let problem = "too much of it looks like its end";
                return Err(self.error(found.eof, ErrorKind::DeviceState { problem }));
            }
            self.pending.push(found);
        }
    }

    /// Tries the candidates whose description is complete within `seen` bytes.
    fn try_ends_before(&mut self, seen: usize) -> Result<Option<(usize, DeviceState)>, Error> {
        loop {
            let first = self.pending.iter().enumerate().min_by_key(|(_, one)| one.end);
            let Some((place, one)) = first.map(|(place, one)| (place, *one)) else {
                return Ok(None);
            };
            if one.end > seen {
                return Ok(None);
            }
            self.pending.swap_remove(place);
            if let Some(state) = self.try_end(one)? {
                return Ok(Some((one.end, state)));
            }
            self.refused += 1;
        }
    }

    fn try_end(&self, Candidate { eof, end }: Candidate) -> Result<Option<DeviceState>, Error> {
        let sections = self.bytes.get(..=eof).unwrap_or_default();
        let json = self.bytes.get(eof + PATTERN_LEN - 1..end).unwrap_or_default();
        let description = match VmDescription::parse(json) {
            Ok(description) => description,
            // If everything before it is in order this is the end, and the description is bad.
            Err(kind) => {
                return match cut(sections, self.base, Delimit::Footer, Ending::Eof) {
                    Ok(_) => Err(self.error(eof + PATTERN_LEN - 1, kind)),
                    Err(_) => Ok(None),
                };
            }
        };
        let delimit = Delimit::Described(&description);
        match cut(sections, self.base, delimit, Ending::Eof) {
            Ok(items) => Ok(Some(state_of(items, Some(json.to_vec())))),
            // Two bytes of JSON that describe nothing may stand anywhere.
            Err(_) if description.is_empty() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The next place not looked at yet where the state may end.
    fn next_candidate(&mut self) -> Option<Candidate> {
        loop {
            let tail = self.bytes.get(self.scanned..)?;
            let zero = tail.iter().position(|byte| *byte == mark::EOF);
            let Some(eof) = zero.map(|zero| self.scanned + zero) else {
                self.scanned = self.bytes.len();
                return None;
            };
            self.scanned = eof;
            let pattern = self.bytes.get(eof..eof + PATTERN_LEN)?;
            self.scanned += 1;
            if let &[_, mark::VM_DESCRIPTION, a, b, c, d, b'{'] = pattern {
                let len = usize::try_from(u32::from_be_bytes([a, b, c, d])).ok()?;
                let fits = (2..=VM_DESCRIPTION_MAX).contains(&len);
                if fits && ends_item(self.bytes.get(..eof)?) {
                    return Some(Candidate { eof, end: eof + PATTERN_LEN - 1 + len });
                }
            }
        }
    }

    const fn error(&self, at: usize, kind: ErrorKind) -> Error {
        Error::new(self.base.saturating_add(at as u64), kind)
    }
}

/// Whether the bytes can end with a footer or a command that may stand among device sections.
fn ends_item(before: &[u8]) -> bool {
    let footer = before.last_chunk::<FOOTER_LEN>();
    if let Some(&[mark::FOOTER, ..] | &[mark::COMMAND, _, _, 0, 0]) = footer {
        return true;
    }
    matches!(before.last_chunk::<9>(), Some(&[mark::COMMAND, 0, 2, 0, 4, ..]))
}

pub(crate) fn state_of(items: Vec<Item>, vmdesc: Option<Vec<u8>>) -> DeviceState {
    let mut state = DeviceState { vmdesc, ..DeviceState::default() };
    for item in items {
        match item {
            Item::Section(section) => state.sections.push(section),
            Item::Command(command) => state.commands.push((state.sections.len(), command)),
        }
    }
    state
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::section::encode_eof;
    use crate::vmdesc::encode_vm_description;
    use crate::{Command, DeviceSection, Name, SectionHeader, SectionId};
    use alloc::string::ToString as _;

    fn section(id: u32, payload: &[u8]) -> DeviceSection {
        let name = Name::new(alloc::format!("device{id}")).unwrap();
        let header = SectionHeader { id: SectionId(id), name, instance_id: 0, version_id: 1 };
        DeviceSection { header, payload: payload.to_vec() }
    }

    fn json(lengths: &[(u32, usize)]) -> Vec<u8> {
        let device = |(id, len): &(u32, usize)| {
            alloc::format!("{{\"name\": \"device{id}\", \"instance_id\": 0, \"size\": {len}}}")
        };
        let devices: Vec<_> = lengths.iter().map(device).collect();
        alloc::format!("{{\"devices\": [{}]}}", devices.join(",")).into_bytes()
    }

    fn bytes(state: &DeviceState) -> Vec<u8> {
        let mut out = Vec::new();
        state.encode(&mut out);
        out
    }

    fn feed(bytes: &[u8]) -> Result<(usize, Option<DeviceState>), Error> {
        DeviceTail::new(1000, 1 << 16).feed(bytes)
    }

    /// A payload that holds its own footer and what looks like the section after it.
    fn deceiving() -> Vec<u8> {
        let mut payload = SectionId(1).footer().to_vec();
        section(2, &[9]).encode(&mut payload);
        payload
    }

    #[test]
    fn a_description_finds_seams_that_footers_do_not() {
        let payload = deceiving();
        let state = DeviceState {
            sections: alloc::vec![section(1, &payload), section(3, b"x")],
            commands: alloc::vec![(1, Command::SwitchoverStart), (2, Command::Ping(1))],
            vmdesc: Some(json(&[(1, payload.len()), (3, 1)])),
        };
        let all = bytes(&state);
        assert_eq!(feed(&all), Ok((all.len(), Some(state))));
    }

    #[test]
    fn an_end_inside_a_payload_is_not_passed_over_in_silence() {
        let with_end = |json: &[u8]| {
            let mut payload = deceiving();
            encode_eof(&mut payload);
            encode_vm_description(json, &mut payload);
            let described = Some(self::json(&[(1, payload.len()), (3, 1)]));
            let sections = alloc::vec![section(1, &payload), section(3, b"x")];
            bytes(&DeviceState { sections, vmdesc: described, ..DeviceState::default() })
        };
        // All before it is in order, so what stands there must be a description.
        let error = feed(&with_end(b"{?")).unwrap_err();
        assert!(matches!(error.kind, ErrorKind::VmDescription { .. }), "{error}");
        // It describes other lengths: whichever of the two is the end, the state is not whole.
        let error = feed(&with_end(&json(&[(1, 1)]))).unwrap_err();
        assert!(matches!(error.kind, ErrorKind::DeviceSection { .. }), "{error}");
        // It fits: it is the end, and the bytes after it are too many.
        let all = with_end(b"{}");
        assert!(feed(&all).unwrap().0 < all.len());
    }

    #[test]
    fn a_description_that_does_not_fit_is_refused() {
        let mut state = DeviceState {
            sections: alloc::vec![section(1, b"abc"), section(3, b"x")],
            commands: alloc::vec![],
            vmdesc: Some(json(&[(1, 4), (3, 1)])),
        };
        let error = feed(&bytes(&state)).unwrap_err();
        let problem = "expected its footer after the length described";
        assert_eq!(
            error.to_string(),
            alloc::format!("byte 1025: device section \"device1\": {problem}")
        );
        state.vmdesc = Some(json(&[(1, usize::MAX), (3, 1)]));
        assert!(feed(&bytes(&state)).is_err());
        // One that is silent about a section leaves it to its footer.
        state.vmdesc = Some(json(&[(3, 1)]));
        assert_eq!(feed(&bytes(&state)).unwrap().1, Some(state.clone()));
        state.vmdesc = Some(b"{}".to_vec());
        assert_eq!(feed(&bytes(&state)).unwrap().1, Some(state));
    }

    #[test]
    fn a_state_without_description_ends_with_the_stream() {
        let state = DeviceState {
            sections: alloc::vec![section(1, &[0x7e; 40]), section(3, b"x")],
            ..DeviceState::default()
        };
        let all = bytes(&state);
        let mut tail = DeviceTail::new(0, 1 << 16);
        assert_eq!(tail.feed(&all), Ok((all.len(), None)));
        assert_eq!(tail.finish_at_close(), Ok(state));
        let mut tail = DeviceTail::new(0, 1 << 16);
        let (_, cut) = all.split_last().unwrap();
        tail.feed(cut).unwrap();
        let error = tail.finish_at_close().unwrap_err();
        assert_eq!(error.offset, all.len() as u64 - 1);
    }

    #[test]
    fn a_ping_behind_a_footer_is_seen_while_the_source_waits() {
        let mut all = Vec::new();
        section(1, b"abc").encode(&mut all);
        Command::Ping(0x1234).encode(&mut all);
        let mut tail = DeviceTail::new(0, 1 << 16);
        for byte in &all {
            assert_eq!(tail.ends_with_ping(), None);
            assert_eq!(tail.feed(&[*byte]), Ok((1, None)));
        }
        assert_eq!(tail.ends_with_ping(), Some(0x1234));
        tail.feed(&[mark::EOF]).unwrap();
        assert_eq!(tail.ends_with_ping(), None);
        assert_eq!(tail.finish_at_close().unwrap().commands, [(1, Command::Ping(0x1234))]);
    }

    #[test]
    fn no_more_than_the_limit_is_held() {
        let mut tail = DeviceTail::new(0, 100);
        assert_eq!(tail.feed(&[1; 60]), Ok((60, None)));
        let error = tail.feed(&[1; 60]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "byte 100: bytes of device state: 101 is more than the 100 allowed"
        );
    }

    #[test]
    fn what_looks_like_an_end_over_and_over_is_refused() {
        let mut all = Vec::new();
        section(1, b"").header.encode_full(&mut all);
        for _ in 0..=CANDIDATES_MAX {
            all.extend_from_slice(&SectionId(2).footer());
            all.extend_from_slice(&[0, mark::VM_DESCRIPTION, 0, 0, 0xf0, 0, b'{']);
        }
        let error = feed(&all).unwrap_err();
        assert!(matches!(error.kind, ErrorKind::DeviceState { .. }), "{error}");
    }
}
