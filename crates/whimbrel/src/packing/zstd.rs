//! zstd: a frame a packet, or one frame a channel, when sending; whatever is legal when receiving.

use zstd::zstd_safe::zstd_sys::ZSTD_EndDirective;
use zstd::zstd_safe::{self, CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer};

use super::UnpackError;

const METHOD: &str = "zstd";

/// The largest window that a frame may ask for, as a power of two: what level 20, the highest
/// there is a parameter for, uses.
const WINDOW_LOG_MAX: u32 = 25;

/// The window of a frame that is one packet, as a power of two: half a packet. All of it would
/// make packets smaller by less than a hundredth, but take a tenth longer.
const PACKET_WINDOW_LOG: u32 = 18;

/// The highest level at which a packet is a frame: those above find more in a window that is
/// larger than a packet.
const PACKET_LEVEL_MAX: u8 = 2;

/// Makes frames, or one frame.
pub(super) struct Compressor {
    context: CCtx<'static>,
    level: i32,
    /// One frame goes on from packet to packet.
    goes_on: bool,
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Compressor { level, goes_on, .. } = self;
        f.debug_struct("Compressor")
            .field("level", level)
            .field("goes_on", goes_on)
            .finish_non_exhaustive()
    }
}

impl Compressor {
    /// At the level that a user has asked for; 0 is zstd's own default, 3.
    pub(super) fn new(level: u8) -> Compressor {
        if (1..=PACKET_LEVEL_MAX).contains(&level) {
            return Compressor::of_frames(level.into());
        }
        let mut compressor = Compressor { context: CCtx::create(), level: 0, goes_on: true };
        compressor.set_level(level.into());
        compressor
    }

    /// Each packet a frame, at a level as zstd counts them: those below 0 are faster than 1.
    pub(super) fn of_frames(level: i32) -> Compressor {
        let mut context = CCtx::create();
        let set = context.set_parameter(CParameter::WindowLog(PACKET_WINDOW_LOG));
        set.expect("a window that zstd knows");
        let mut compressor = Compressor { context, level: 0, goes_on: false };
        compressor.set_level(level);
        compressor
    }

    /// Changes the level of the frames to come.
    pub(super) fn set_level(&mut self, level: i32) {
        if level != self.level {
            self.level = level;
            let set = self.context.set_parameter(CParameter::CompressionLevel(level));
            set.expect("zstd takes any level, clamped");
        }
    }

    /// Packs `pages` to `out`, which has room for more than them; gives the length. `None` when
    /// they are shorter as they are.
    pub(super) fn pack(&mut self, pages: &[u8], out: &mut [u8]) -> Option<usize> {
        if !self.goes_on {
            return self.context.compress2(&mut out[..pages.len()], pages).ok();
        }
        let mut output = OutBuffer::around(out);
        let mut input = InBuffer::around(pages);
        loop {
            let flush = ZSTD_EndDirective::ZSTD_e_flush;
            let left = self.context.compress_stream2(&mut output, &mut input, flush);
            let left = left.expect("zstd has a context and room for what it makes");
            if left == 0 && input.pos() == pages.len() {
                return Some(output.pos());
            }
        }
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
