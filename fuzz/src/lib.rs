//! The bodies of the fuzz targets, as plain functions: libfuzzer calls them with bytes of its
//! own, and a test on stable Rust replays the seeds.
//!
//! Each checks more than that nothing panics: a stream gives the same outcome whole and in
//! pieces, and what was understood is written back to the same bytes.
#![forbid(unsafe_code)]

mod drive;
pub mod seeds;
mod targets;
mod unpack;

pub use targets::{
    device_tail, main_stream, mapped_ram, multifd, ram_records, return_path, vmdesc, xbzrle,
};
pub use unpack::unpack;

/// A fuzz target's name and body.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 9] = [
    ("main_stream", main_stream),
    ("device_tail", device_tail),
    ("ram_records", ram_records),
    ("return_path", return_path),
    ("xbzrle", xbzrle),
    ("mapped_ram", mapped_ram),
    ("multifd", multifd),
    ("vmdesc", vmdesc),
    ("unpack", unpack),
];
