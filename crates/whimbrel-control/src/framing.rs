//! Where one JSON value of a stream ends and the next begins.
//!
//! A value may come in pieces, several may come at once, and one may be spread over lines. After
//! what is no JSON the next line is a new beginning: one mistake costs one line.

use std::mem;

use serde_json::Value;

use crate::json;

/// Why a part of the stream is no value. The stream goes on after it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    /// Not JSON.
    #[error("JSON parse error, {0}")]
    Syntax(String),
    /// A string with a control character in it, most likely one that was never closed.
    #[error("JSON parse error, a string holds the control character {0:#04x}: is its end missing?")]
    OpenString(u8),
    /// Longer than whoever reads is willing to keep.
    #[error("JSON token size limit exceeded: a message has at most {0} bytes")]
    TooLong(usize),
    /// Deeper than anything that QMP knows.
    #[error("JSON nesting depth limit exceeded: at most {MAX_DEPTH} are expected")]
    TooDeep,
}

/// How deeply a value may be nested. QMP's own stay below 10.
const MAX_DEPTH: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Before a value.
    Between,
    /// Inside an object or a list.
    Nested { depth: usize, string: StringPlace },
    /// Inside what begins with neither `{` nor `[`: it ends with its line.
    Line,
    /// After an error: skipping the rest of the line.
    Skip,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StringPlace {
    Outside,
    Inside,
    AfterBackslash,
}

/// Cuts a stream of bytes into JSON values.
#[derive(Debug)]
pub(crate) struct Framing {
    max_len: usize,
    place: Place,
    /// What was fed and not scanned yet.
    input: Vec<u8>,
    scanned: usize,
    /// What belongs to the value being scanned.
    value: Vec<u8>,
}

impl Framing {
    /// Values have at most `max_len` bytes.
    pub(crate) fn new(max_len: usize) -> Framing {
        let place = Place::Between;
        Framing { max_len, place, input: Vec::new(), scanned: 0, value: Vec::new() }
    }

    /// Takes in what was read. Feed no more before [`Framing::next_value`] has returned `None`,
    /// and what is kept stays below one value and one feed.
    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        self.input.drain(..self.scanned);
        self.scanned = 0;
        self.input.extend_from_slice(bytes);
    }

    /// The next value, or what is wrong with it; `None` until more is fed.
    pub(crate) fn next_value(&mut self) -> Option<Result<Value, FrameError>> {
        while let Some(&byte) = self.input.get(self.scanned) {
            self.scanned += 1;
            match self.step(byte) {
                Ok(false) => {}
                Ok(true) => {
                    self.place = Place::Between;
                    return Some(self.finish());
                }
                Err(error) => {
                    self.value.clear();
                    self.place = if byte == b'\n' { Place::Between } else { Place::Skip };
                    return Some(Err(error));
                }
            }
        }
        None
    }

    /// Scans one byte; true if it is the last one of a value.
    fn step(&mut self, byte: u8) -> Result<bool, FrameError> {
        self.place = match self.place {
            Place::Between if byte.is_ascii_whitespace() => return Ok(false),
            Place::Between if byte == b'{' || byte == b'[' => {
                Place::Nested { depth: 1, string: StringPlace::Outside }
            }
            Place::Between => Place::Line,
            Place::Line if byte == b'\n' => return Ok(true),
            Place::Line => Place::Line,
            Place::Skip if byte == b'\n' => {
                self.place = Place::Between;
                return Ok(false);
            }
            Place::Skip => return Ok(false),
            Place::Nested { depth, string } => nested(depth, string, byte)?,
        };
        if self.value.len() == self.max_len {
            return Err(FrameError::TooLong(self.max_len));
        }
        self.value.push(byte);
        Ok(matches!(self.place, Place::Nested { depth: 0, .. }))
    }

    fn finish(&mut self) -> Result<Value, FrameError> {
        let text = mem::take(&mut self.value);
        json::parse(&text).map_err(|error| FrameError::Syntax(error.to_string()))
    }
}

fn nested(depth: usize, string: StringPlace, byte: u8) -> Result<Place, FrameError> {
    let (depth, string) = match (string, byte) {
        (StringPlace::Inside | StringPlace::AfterBackslash, 0..=0x1f) => {
            return Err(FrameError::OpenString(byte));
        }
        (StringPlace::AfterBackslash, _) => (depth, StringPlace::Inside),
        (StringPlace::Inside, b'\\') => (depth, StringPlace::AfterBackslash),
        (StringPlace::Inside, b'"') => (depth, StringPlace::Outside),
        (StringPlace::Inside, _) => (depth, StringPlace::Inside),
        (StringPlace::Outside, b'"') => (depth, StringPlace::Inside),
        (StringPlace::Outside, b'{' | b'[') if depth == MAX_DEPTH => {
            return Err(FrameError::TooDeep);
        }
        (StringPlace::Outside, b'{' | b'[') => (depth + 1, StringPlace::Outside),
        // Which bracket closes which is the parser's to say.
        (StringPlace::Outside, b'}' | b']') => (depth - 1, StringPlace::Outside),
        (StringPlace::Outside, _) => (depth, StringPlace::Outside),
    };
    Ok(Place::Nested { depth, string })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn all(framing: &mut Framing, bytes: &[u8]) -> Vec<Result<Value, FrameError>> {
        framing.feed(bytes);
        std::iter::from_fn(|| framing.next_value()).collect()
    }

    #[test]
    fn pieces_of_any_size_give_the_same_values() {
        let text = b"{\"a\":\n \"}\\\"{\"}\r\n [1]{\"b\":[{}]}\nnull\n 12 \n\"x\"\n";
        let whole = all(&mut Framing::new(64), text);
        let values: Vec<_> = whole.iter().map(|value| value.clone().unwrap()).collect();
        let expected = [
            json!({"a": "}\"{"}),
            json!([1]),
            json!({"b": [{}]}),
            json!(null),
            json!(12),
            json!("x"),
        ];
        assert_eq!(values, expected);
        for size in 1..text.len() {
            let mut framing = Framing::new(64);
            let cut: Vec<_> =
                text.chunks(size).flat_map(|piece| all(&mut framing, piece)).collect();
            assert_eq!(cut, whole, "in pieces of {size}");
        }
    }

    #[test]
    fn after_a_mistake_the_next_line_is_a_new_beginning() {
        for mistake in [
            "nonsense",
            "}}}",
            "{\"a\":1,}",
            "{\"a\" 1}",
            "{\"a\":1]",
            "{\"a",
            "GET / HTTP/1.1",
            "{\"a\":1,\"a\":1}",
            "\u{ff}\u{fe}",
            "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
        ] {
            let mut framing = Framing::new(100);
            let got = all(&mut framing, format!("{mistake}\n{{\"b\":2}}\n").as_bytes());
            assert_eq!(got.len(), 2, "{mistake}: {got:?}");
            assert!(got[0].is_err(), "{mistake}");
            assert_eq!(got[1], Ok(json!({"b": 2})), "{mistake}");
        }
    }

    #[test]
    fn no_more_is_kept_than_one_message_may_have() {
        let mut framing = Framing::new(100);
        let mut errors = Vec::new();
        errors.extend(all(&mut framing, b"{\"a\":\""));
        for _ in 0..1000 {
            errors.extend(all(&mut framing, &[b'x'; 64]));
            assert!(framing.value.len() <= 100 && framing.input.len() <= 64);
        }
        assert_eq!(errors, [Err(FrameError::TooLong(100))]);
        assert_eq!(all(&mut framing, b"\"}\n{}\n"), [Ok(json!({}))]);
    }
}
