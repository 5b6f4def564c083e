//! Feeding a decoder in pieces, whatever the decoder.

use whimbrel_wire::Error;

/// What one call of a decoder did.
pub(crate) enum Step<M> {
    Message(M),
    /// So many bytes must be there at the next call.
    NeedMore(usize),
}

/// A decoder, as the driver sees it.
pub(crate) trait Decode {
    type Message: PartialEq + std::fmt::Debug;
    fn decode(&mut self, input: &[u8]) -> Result<(usize, Step<Self::Message>), Error>;
    fn payload_left(&self) -> u64;
    fn payload_taken(&mut self, len: u64);
    fn offset(&self) -> u64;
}

/// Most bytes any decoder may ask for at a time.
const NEED_MAX: usize = 8192;

/// How a stream ended: its messages with their offsets, how many bytes were not consumed, and
/// the error if there was one.
#[derive(Debug, PartialEq)]
pub(crate) struct Outcome<M> {
    pub(crate) messages: Vec<(u64, M)>,
    pub(crate) consumed: usize,
    pub(crate) error: Option<Error>,
}

/// Feeds all of `stream` in pieces of `piece` bytes. Payloads that are longer than what is left
/// of the stream end it: the caller of a decoder would wait for more.
pub(crate) fn drive<D: Decode>(
    decoder: &mut D,
    stream: &[u8],
    piece: usize,
) -> Outcome<D::Message> {
    let mut outcome = Outcome { messages: Vec::new(), consumed: 0, error: None };
    let (mut at, mut end, base) = (0, 0, decoder.offset());
    let mut idle = 0;
    loop {
        let left = decoder.payload_left();
        if left > 0 {
            let take = left.min((end - at) as u64);
            decoder.payload_taken(take);
            at += usize::try_from(take).expect("no more than the input");
        } else {
            match decoder.decode(&stream[at..end]) {
                Ok((taken, step)) => {
                    assert!(taken <= end - at, "consumed more than there is");
                    at += taken;
                    idle = if taken == 0 { idle + 1 } else { 0 };
                    assert_eq!(
                        decoder.offset(),
                        base + at as u64,
                        "the offset is that of the stream"
                    );
                    match step {
                        Step::Message(message) => {
                            assert!(idle < 4, "messages without end out of no bytes");
                            outcome.messages.push((decoder.offset(), message));
                            continue;
                        }
                        Step::NeedMore(need) => {
                            idle = 0;
                            assert!(need <= NEED_MAX, "asked for {need} bytes");
                            assert!(need > end - at, "asked for what is there");
                        }
                    }
                }
                Err(error) => {
                    assert!(error.offset <= base + stream.len() as u64, "error: {error}");
                    let _ = error.to_string();
                    outcome.consumed = at;
                    outcome.error = Some(error);
                    return outcome;
                }
            }
        }
        if decoder.payload_left() > 0 && at < end {
            continue;
        }
        if decoder.payload_left() == 0 && left > 0 {
            continue;
        }
        if end == stream.len() {
            outcome.consumed = at;
            return outcome;
        }
        end = stream.len().min(end + piece);
    }
}

/// Feeds the stream whole and in pieces, whose size is drawn from the stream itself, and checks
/// that the outcome is the same. Where the pieces were consumed may differ at an error.
pub(crate) fn drive_twice<D: Decode>(
    new: impl Fn() -> D,
    stream: &[u8],
) -> (D, Outcome<D::Message>) {
    let mut decoder = new();
    let whole = drive(&mut decoder, stream, stream.len().max(1));
    let seed = stream.iter().fold(stream.len(), |sum, byte| sum.wrapping_add(usize::from(*byte)));
    // Byte by byte only what is short: a run should take no longer than a millisecond or so.
    let small = if stream.len() > 2048 { 64 } else { 1 };
    for piece in [small, small + 1 + seed % 61] {
        let pieces = drive(&mut new(), stream, piece);
        assert_eq!(whole.messages, pieces.messages, "in pieces of {piece}");
        assert_eq!(whole.error, pieces.error, "in pieces of {piece}");
        if whole.error.is_none() {
            assert_eq!(whole.consumed, pieces.consumed, "in pieces of {piece}");
        }
    }
    (decoder, whole)
}
