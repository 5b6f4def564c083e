//! zlib: one stream a channel, flushed at the end of each packet.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::UnpackError;

const METHOD: &str = "zlib";

/// The sending end of a channel's stream.
#[derive(Debug)]
pub(super) struct Deflate(Compress);

impl Deflate {
    /// A new stream, at a level from 0 (stored) to 9.
    pub(super) fn new(level: u8) -> Deflate {
        Deflate(Compress::new(Compression::new(level.into()), true))
    }

    /// Goes on with the stream by `pages`, so that what is written to `out` gives all of them;
    /// `None` when `out` is too small for that.
    pub(super) fn pack(&mut self, pages: &[u8], out: &mut [u8]) -> Option<usize> {
        let (read, written) = (self.0.total_in(), self.0.total_out());
        // With room to spare, one call takes all and flushes all.
        self.0.compress(pages, out, FlushCompress::Sync).ok()?;
        let written = usize::try_from(self.0.total_out() - written).ok()?;
        let all = self.0.total_in() - read == pages.len() as u64 && written < out.len();
        all.then_some(written)
    }
}

/// The receiving end of a channel's stream.
#[derive(Debug)]
pub(super) struct Inflate(Decompress);

impl Inflate {
    pub(super) fn new() -> Inflate {
        Inflate(Decompress::new(true))
    }

    /// Decodes `data` to the first `expected` bytes of `out`, which is at least one longer.
    pub(super) fn unpack(
        &mut self,
        mut data: &[u8],
        expected: usize,
        out: &mut [u8],
    ) -> Result<(), UnpackError> {
        let mut found = 0;
        while found <= expected {
            let (read, written) = (self.0.total_in(), self.0.total_out());
            let status = self.0.decompress(data, &mut out[found..=expected], FlushDecompress::Sync);
            let read = usize::try_from(self.0.total_in() - read).unwrap_or(usize::MAX);
            let wrote = usize::try_from(self.0.total_out() - written).unwrap_or(usize::MAX);
            (data, found) = (&data[read..], found + wrote);
            match status {
                // A sender may end a stream and begin another.
                Ok(Status::StreamEnd) => self.0.reset(true),
                Ok(Status::Ok | Status::BufError) if read == 0 && wrote == 0 => break,
                Ok(Status::Ok | Status::BufError) => {}
                Err(error) => {
                    let reason = if error.needs_dictionary().is_some() {
                        "it needs a dictionary"
                    } else {
                        "its bytes make no sense"
                    };
                    return Err(UnpackError::Corrupt { expected, method: METHOD, reason });
                }
            }
        }
        match found {
            _ if found > expected => Err(UnpackError::Long { expected, method: METHOD }),
            _ if found < expected => Err(UnpackError::Short { expected, method: METHOD, found }),
            _ => Ok(()),
        }
    }
}
