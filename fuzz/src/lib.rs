//! The bodies of the fuzz targets, as plain functions: libfuzzer calls them with bytes of its
//! own, and a test on stable Rust replays the seeds, the corpus that is kept, and what was found.
//!
//! Each checks more than that nothing panics: a stream gives the same outcome whole and in
//! pieces, what was understood is written back to the same bytes, an engine that was told anything
//! ends, says why in one line, leaves no thread behind, and never runs a guest that is elsewhere.
//! And none takes more memory than [`limited`] allows.
#![forbid(unsafe_code)]

mod answering;
mod asking;
mod choices;
pub mod corpus;
mod destination;
mod drive;
mod ends;
mod guest;
mod keeping;
mod limits;
mod mutate;
mod qmp;
pub mod seeds;
mod source;
mod speaker;
mod targets;
mod telling;
mod unpack;

pub use destination::destination;
pub use keeping::{kept_file, receive};
pub use limits::limited;
pub use mutate::mutate;
pub use qmp::{qmp_client, qmp_server};
pub use source::source;
pub use targets::{
    answers, channels, device_tail, main_stream, mapped_ram, multifd, ram_records, return_path,
    vmdesc, xbzrle,
};
pub use unpack::unpack;

/// A fuzz target's name and body.
pub type Target = (&'static str, fn(&[u8]));

/// All targets: those of one decoder each, then those of operations, and of whole machines.
pub const TARGETS: [Target; 17] = [
    ("main_stream", main_stream),
    ("device_tail", device_tail),
    ("ram_records", ram_records),
    ("return_path", return_path),
    ("xbzrle", xbzrle),
    ("mapped_ram", mapped_ram),
    ("multifd", multifd),
    ("vmdesc", vmdesc),
    ("unpack", unpack),
    ("channels", channels),
    ("answers", answers),
    ("destination", destination),
    ("source", source),
    ("receive", receive),
    ("kept_file", kept_file),
    ("qmp_server", qmp_server),
    ("qmp_client", qmp_client),
];
