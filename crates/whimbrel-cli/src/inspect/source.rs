//! Reading what is inspected: a file, a pipe or the standard input, compressed with zstd or not.
//!
//! Nothing is held but a window of the bytes that no decoder has consumed, so a file of any size
//! is read in constant memory. Parts that nobody looks at are left out by seeking where that is
//! possible.

use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::Path;

use crate::failure::Failure;

/// How much is read at once.
const CHUNK: usize = 256 << 10;

/// The first bytes of a zstd frame. No channel begins like this.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// The bytes of a recording, in their order.
#[derive(Debug)]
pub(super) struct Source {
    reader: Reader,
    window: Vec<u8>,
    /// Where the bytes not consumed begin in the window.
    start: usize,
}

enum Reader {
    /// A regular file, in which parts can be left out; its length when it was opened.
    File { file: File, len: u64 },
    /// Anything else.
    Stream(Box<dyn Read>),
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Reader::File { .. } => "File",
            Reader::Stream(_) => "Stream",
        })
    }
}

impl Source {
    /// Opens a file, or the standard input when the path is `-`.
    pub(super) fn open(path: &Path) -> Result<Source, Failure> {
        let reader = if path.as_os_str() == "-" {
            Reader::Stream(Box::new(io::stdin()))
        } else {
            open_file(path)?
        };
        let mut source = Source { reader, window: Vec::new(), start: 0 };
        while source.pending().len() < ZSTD_MAGIC.len() {
            match source.fill() {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    return Err(Failure::new(format!(
                        "{}: cannot be read: {error}",
                        path.display()
                    )));
                }
            }
        }
        if source.pending().starts_with(&ZSTD_MAGIC) {
            source = source.decompressing(path)?;
        }
        Ok(source)
    }

    /// The same bytes, decompressed.
    fn decompressing(self, path: &Path) -> Result<Source, Failure> {
        let begun = Cursor::new(self.window);
        let packed: Box<dyn Read> = match self.reader {
            Reader::File { file, .. } => Box::new(begun.chain(file)),
            Reader::Stream(stream) => Box::new(begun.chain(stream)),
        };
        let decoder = zstd::Decoder::new(packed).map_err(|error| {
            Failure::new(format!("{}: cannot be decompressed: {error}", path.display()))
        })?;
        Ok(Source { reader: Reader::Stream(Box::new(decoder)), window: Vec::new(), start: 0 })
    }

    /// The bytes read and not consumed.
    pub(super) fn pending(&self) -> &[u8] {
        &self.window[self.start..]
    }

    /// Takes bytes from the front of [`pending`](Source::pending).
    pub(super) fn consume(&mut self, len: usize) {
        self.start += len;
        assert!(self.start <= self.window.len(), "no more than was read is consumed");
    }

    /// Reads more; `false` at the end.
    pub(super) fn fill(&mut self) -> io::Result<bool> {
        self.window.drain(..self.start);
        self.start = 0;
        let before = self.window.len();
        self.window.resize(before + CHUNK, 0);
        let free = &mut self.window[before..];
        let outcome = loop {
            let read = match &mut self.reader {
                Reader::File { file, .. } => file.read(free),
                Reader::Stream(stream) => stream.read(free),
            };
            match read {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        let read = outcome.as_ref().map_or(0, |read| *read);
        self.window.truncate(before + read);
        outcome.map(|read| read > 0)
    }

    /// Leaves bytes out; returns how many, which are fewer than asked for only at the end.
    pub(super) fn skip(&mut self, len: u64) -> io::Result<u64> {
        let mut left = len;
        loop {
            let here = usize::try_from(left).unwrap_or(usize::MAX).min(self.pending().len());
            self.consume(here);
            left -= here as u64;
            if left > CHUNK as u64 {
                left -= self.seek_ahead(left)?;
            }
            if left == 0 || !self.fill()? {
                return Ok(len - left);
            }
        }
    }

    /// Goes on in a regular file, though not behind its end.
    fn seek_ahead(&mut self, len: u64) -> io::Result<u64> {
        let Reader::File { file, len: file_len } = &mut self.reader else { return Ok(0) };
        let here = file.stream_position()?;
        let ahead = len.min(file_len.saturating_sub(here));
        file.seek(SeekFrom::Start(here + ahead))?;
        Ok(ahead)
    }
}

fn open_file(path: &Path) -> Result<Reader, Failure> {
    let hint = "give the path of a recorded stream or of a kept VM";
    let cannot = |error: io::Error| {
        Failure::new(format!("{}: cannot be opened: {error}; {hint}", path.display()))
    };
    let file = File::open(path).map_err(cannot)?;
    let metadata = file.metadata().map_err(cannot)?;
    if metadata.is_dir() {
        return Err(Failure::new(format!("{}: is a directory; {hint}", path.display())));
    }
    if metadata.is_file() {
        return Ok(Reader::File { file, len: metadata.len() });
    }
    Ok(Reader::Stream(Box::new(file)))
}
