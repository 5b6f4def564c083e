//! zstd: a frame a packet when sending, whatever is legal when receiving.

use zstd::zstd_safe::{self, CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer};

use super::UnpackError;

const METHOD: &str = "zstd";

/// The largest window that a frame may ask for, as a power of two: what level 20, the highest
/// there is a parameter for, uses.
const WINDOW_LOG_MAX: u32 = 25;

/// Makes frames.
pub(super) struct Compressor {
    context: CCtx<'static>,
    level: i32,
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compressor").field("level", &self.level).finish_non_exhaustive()
    }
}

impl Compressor {
    /// At a level as zstd counts them; 0 is zstd's own default.
    pub(super) fn new(level: i32) -> Compressor {
        let mut compressor = Compressor { context: CCtx::create(), level };
        compressor.set_level(level);
        compressor
    }

    /// Changes the level of the frames to come.
    pub(super) fn set_level(&mut self, level: i32) {
        self.level = level;
        let set = self.context.set_parameter(CParameter::CompressionLevel(level));
        set.expect("zstd takes any level, clamped");
    }

    /// Writes one frame of `pages`; `None` when `out` is too small for it.
    pub(super) fn pack(&mut self, pages: &[u8], out: &mut [u8]) -> Option<usize> {
        self.context.compress2(out, pages).ok()
    }
}

/// Reads frames, and parts of frames.
pub(super) struct Decompressor(DCtx<'static>);

impl std::fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decompressor").finish_non_exhaustive()
    }
}

impl Decompressor {
    pub(super) fn new() -> Decompressor {
        let mut context = DCtx::create();
        let set = context.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX));
        set.expect("a window that zstd knows");
        Decompressor(context)
    }

    /// Decodes `data` to the first `expected` bytes of `out`, which is at least one longer.
    ///
    /// A frame that lies whole in `data` is decoded straight to `out`, without a window.
    pub(super) fn unpack(
        &mut self,
        data: &[u8],
        expected: usize,
        out: &mut [u8],
    ) -> Result<(), UnpackError> {
        let mut input = InBuffer::around(data);
        let mut output = OutBuffer::around(&mut out[..=expected]);
        loop {
            let step = self.0.decompress_stream(&mut output, &mut input);
            if let Err(code) = step {
                let reason = zstd_safe::get_error_name(code);
                return Err(UnpackError::Corrupt { expected, method: METHOD, reason });
            }
            if output.pos() > expected {
                return Err(UnpackError::Long { expected, method: METHOD });
            }
            // With room left in the output, zstd has given all that the input holds.
            if input.pos() == data.len() {
                break;
            }
        }
        match output.pos() {
            found if found < expected => {
                Err(UnpackError::Short { expected, method: METHOD, found })
            }
            _ => Ok(()),
        }
    }
}
