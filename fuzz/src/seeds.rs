//! Seeds: small pieces of the golden streams, one file each, made when fuzzing starts.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::json;
use whimbrel_wire::{
    BlockList, Configuration, Decoded, DeviceSection, DeviceState, FileHeader, MainDecoder,
    MainOptions, Name, RamRecord, SectionHeader, SectionId, encode_end_of_section, encode_eof,
    encode_vm_description, vmdesc,
};

use crate::choices::Op;
use crate::telling::Said;
use crate::{answering, asking, destination, keeping, qmp, telling};

/// Longest seed in bytes.
const SEED_MAX: usize = (64 << 10) - 1;

/// Where the golden streams are.
#[must_use]
pub fn golden_directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/whimbrel-wire/tests/golden")
}

/// Seeds for every target: its name, the seed's name, its bytes.
///
/// # Errors
/// When a golden stream cannot be read.
pub fn all() -> io::Result<Vec<(&'static str, String, Vec<u8>)>> {
    let mut seeds = Vec::new();
    let mut files: Vec<PathBuf> = fs::read_dir(golden_directory())?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<_>>()?;
    files.sort();
    for file in files.iter().filter(|file| file.extension().is_some_and(|end| end == "zst")) {
        let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or("stream").to_owned();
        let stream = zstd::decode_all(fs::read(file)?.as_slice())?;
        let mut add = |target, bytes: Vec<u8>| seeds.push((target, stem.clone(), bytes));
        match stream.first_chunk::<4>() {
            Some(b"QEVM") => seed_main(&stream, &mut add),
            Some([8, ..]) => add("main_stream", head(&stream).to_vec()),
            Some([0x11, 0x22, 0x33, 0x44]) => {
                add("multifd", head(&stream).to_vec());
                crate::unpack::seed(&stream, &mut add);
            }
            Some([0, 0, 0, _]) | None if stem.contains("preempt") && !stem.ends_with("rp") => {
                let mut records = vec![1];
                records.extend_from_slice(head(&stream));
                add("ram_records", records);
            }
            Some(_) | None => add("return_path", head(&stream).to_vec()),
        }
    }
    seed_operations(&mut |target, name, bytes| seeds.push((target, name, bytes)));
    seeds.push(("main_stream", "whimbrel".to_owned(), own_stream()));
    seeds.push(("xbzrle", "two-runs".to_owned(), vec![3, 1, 7, 0x81, 1, 2, 8, 9]));
    seeds.push(("xbzrle", "first-byte".to_owned(), vec![0, 1, 7]));
    Ok(seeds)
}

fn written<O: Op>(settings: &[u8], ops: &[O]) -> Vec<u8> {
    let mut bytes = settings.to_vec();
    ops.iter().for_each(|op| op.write(&mut bytes));
    bytes
}

/// Seeds of targets whose inputs are operations.
fn seed_operations(add: &mut dyn FnMut(&'static str, String, Vec<u8>)) {
    for (name, ops) in telling::migrations() {
        add("channels", name.into(), written(&[], &ops));
        add("destination", name.into(), written(&[destination::settings_for(name)], &ops));
        add("receive", name.into(), written(&[keeping::settings_for(name)], &ops));
        if name.starts_with("file") {
            add("kept_file", name.into(), written(&[0], &ops));
        }
    }
    for (name, settings, ops) in answering::conversations() {
        add("answers", name.into(), written(&[], &ops));
        add("source", name.into(), written(&[settings], &ops));
    }
    for (name, ops) in asking::sessions() {
        add("qmp_server", name, written(&[0], &ops));
    }
    add("qmp_server", "no-json".into(), b"\x01{\"execute\": \"qmp_capabilities\"}\n[1, {".to_vec());
    for (name, bytes) in qmp::answers() {
        add("qmp_client", name.into(), bytes);
    }
}

/// The seeds of one target: names and bytes.
///
/// # Errors
/// When a golden stream cannot be read.
pub fn of(target: &str) -> io::Result<Vec<(String, Vec<u8>)>> {
    let of_it = all()?.into_iter().filter(|(of, _, _)| *of == target);
    Ok(of_it.map(|(_, name, bytes)| (name, bytes)).collect())
}

/// A stream of whimbrel's own kind of machine, without RAM.
fn own_stream() -> Vec<u8> {
    let name = |text| Name::new(text).expect("a short name");
    let header = |id, text, version_id| SectionHeader {
        id: SectionId(id),
        name: name(text),
        instance_id: 0,
        version_id,
    };
    let mut out = Vec::new();
    FileHeader.encode(&mut out);
    Configuration::new(name("whimbrel-1")).encode(&mut out);
    header(1, "ram", 4).encode_start(&mut out);
    BlockList::default().encode(&mut out);
    for end in [false, true] {
        if end {
            SectionId(1).encode_end(&mut out);
        }
        encode_end_of_section(&mut out);
        SectionId(1).encode_footer(&mut out);
    }
    let sections = [(2, "cpu"), (3, "serial")]
        .map(|(id, text)| DeviceSection::with_own_length(header(id, text, 1), text.as_bytes()));
    sections.iter().for_each(|section| section.encode(&mut out));
    encode_eof(&mut out);
    encode_vm_description(&vmdesc::describe(4096, &sections), &mut out);
    out
}

/// Bytes as operations that say just them.
fn raw(bytes: &[u8]) -> impl Iterator<Item = Said> {
    bytes.chunks(1 << 15).map(|piece| Said::Raw { bytes: piece.to_vec() })
}

fn head(stream: &[u8]) -> &[u8] {
    stream.get(..SEED_MAX).unwrap_or(stream)
}

/// The first sections of a device state with a description of their own: the whole is too long
/// for a seed.
fn small_tail(state: &DeviceState) -> Vec<u8> {
    let mut small = state.clone();
    small.sections.truncate(4);
    small.sections.retain(|section| section.payload.len() < 4096);
    small.commands.clear();
    let devices: Vec<_> = small
        .sections
        .iter()
        .map(|section| {
            let fields = [json!({ "name": "data", "size": section.payload.len() })];
            json!({
                "name": section.header.name.to_string(),
                "instance_id": section.header.instance_id,
                "fields": fields,
            })
        })
        .collect();
    small.vmdesc = Some(json!({ "page_size": 4096, "devices": devices }).to_string().into_bytes());
    let mut tail = Vec::new();
    small.encode(&mut tail);
    tail
}

/// Cuts a main stream into what matters: its beginning, a stream without most of its pages, its
/// device state, its description, its package, its deltas.
fn seed_main(stream: &[u8], add: &mut dyn FnMut(&'static str, Vec<u8>)) {
    let mut decoder = MainDecoder::new(MainOptions { colo: true, ..MainOptions::default() });
    let (mut at, mut short, mut records, mut pages) = (0, Vec::new(), 0, 0);
    // The same in the pieces that it is made of.
    let mut pieces: Vec<Said> = Vec::new();
    let mapped = loop {
        let Ok((taken, decoded)) = decoder.decode(&stream[at..]) else { return };
        let before = at;
        at += taken;
        let payload = usize::try_from(decoder.payload_left()).unwrap_or(usize::MAX);
        let payload = payload.min(stream.len() - at);
        let body = &stream[at..at + payload];
        decoder.payload_taken(payload as u64);
        at += payload;
        let keep = match &decoded {
            Decoded::NeedMore(_) => break false,
            Decoded::MappedBlock { .. } => break true,
            Decoded::Ram(RamRecord::PageFollows { .. }) => {
                pages += 1;
                pages < 3
            }
            Decoded::Ram(RamRecord::Zero { .. }) => {
                records += 1;
                records < 20
            }
            Decoded::Ram(RamRecord::XbzrleFollows { .. }) => {
                add("xbzrle", body.to_vec());
                true
            }
            Decoded::PackageFollows { .. } => {
                add("device_tail", body.to_vec());
                true
            }
            Decoded::DeviceState(state) => {
                let tail = small_tail(state);
                add("device_tail", tail.clone());
                short.extend_from_slice(&tail);
                pieces.extend(raw(&tail));
                if let Some(json) = &state.vmdesc {
                    add("vmdesc", head(json).to_vec());
                }
                false
            }
            _ => true,
        };
        if keep {
            short.extend_from_slice(&stream[before..at]);
            pieces.extend(raw(&stream[before..at]));
        }
        if short.len() > 2 * SEED_MAX {
            break false;
        }
    };
    let mut operations = vec![0];
    pieces
        .iter()
        .take_while(|piece| {
            piece.write(&mut operations);
            operations.len() < SEED_MAX
        })
        .for_each(drop);
    add("receive", operations.clone());
    add("channels", operations.split_off(1));
    if mapped {
        add("kept_file", written(&[0], &raw(head(stream)).collect::<Vec<_>>()));
        add("mapped_ram", head(stream)[..1024].to_vec());
    }
    add("main_stream", head(&short).to_vec());
    add("ram_records", [&[0], head(&short)].concat());
}
