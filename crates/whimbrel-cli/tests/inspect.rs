//! `whimbrel inspect` as a user runs it: on every golden file, and on damaged ones.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use whimbrel_wire::{
    BlockInfo, BlockList, BlockOffset, Configuration, DeviceSection, FileHeader, Name,
    RecordEncoder, SectionHeader, SectionId, encode_end_of_section, encode_eof,
    encode_vm_description, vmdesc,
};

fn golden_directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../whimbrel-wire/tests/golden")
}

fn golden(name: &str) -> PathBuf {
    golden_directory().join(format!("{name}.zst"))
}

fn raw(name: &str) -> Vec<u8> {
    let packed = std::fs::read(golden(name)).unwrap();
    zstd::decode_all(packed.as_slice()).unwrap()
}

fn manifest() -> Vec<Value> {
    let text = std::fs::read(golden_directory().join("manifest.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn inspect(file: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_whimbrel"))
        .arg("inspect")
        .arg(file)
        .args(arguments)
        .output()
        .unwrap()
}

fn text_of(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn json_of(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", text_of(output)))
}

/// The one line of an error; a panic would have written more, or a status of its own.
fn error_line(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("whimbrel: "), "{text}");
    text
}

fn inspect_bytes(bytes: &[u8], arguments: &[&str]) -> Output {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    inspect(file.path(), arguments)
}

/// What a golden file holds, by its name.
fn kind_of(stem: &str) -> &'static str {
    if stem.ends_with("rp") || stem.ends_with(".reply") {
        "return-path"
    } else if stem.ends_with("preempt") {
        "preempt"
    } else if stem.contains(".conn") {
        "multifd"
    } else if stem.ends_with(".2-main") {
        "recovery"
    } else {
        "main"
    }
}

fn list<'v>(report: &'v Value, name: &str) -> &'v [Value] {
    report[name].as_array().unwrap()
}

fn devices(report: &Value) -> Vec<(String, u64, u64)> {
    let full = list(report, "sections").iter().filter(|section| section["type"] == "full");
    full.map(|section| {
        let number = |key: &str| section[key].as_u64().unwrap();
        (section["name"].as_str().unwrap().to_owned(), number("instance-id"), number("version-id"))
    })
    .collect()
}

/// The status and the error are those of a whole recording, or of one that was cut.
fn check_end(entry: &Value, stem: &str, output: &Output, report: &Value) {
    // The main channels before a recovery end in the middle of RAM.
    if stem.ends_with(".1-main") {
        let line = error_line(output);
        let end = entry["raw_size"].as_u64().unwrap();
        assert!(line.contains(&format!("byte {end}: the stream ends here, expected")), "{line}");
        assert_eq!(report["error"]["offset"], end, "{stem}");
        assert_eq!(report["complete"], false);
    } else {
        assert!(output.status.success() && output.stderr.is_empty(), "{stem}");
        assert!(report["error"].is_null(), "{stem}");
        assert_eq!(report["complete"], true, "{stem}");
        assert_eq!(report["bytes"], entry["raw_size"], "{stem}: all of it is understood");
    }
}

#[test]
fn every_golden_file_is_shown() {
    for entry in manifest() {
        let stem = entry["file"].as_str().unwrap().trim_end_matches(".zst");
        let output = inspect(&golden(stem), &["--json"]);
        let report = json_of(&output);
        assert_eq!(report["kind"], kind_of(stem), "{stem}");
        check_end(&entry, stem, &output, &report);
        for (key, counted) in [
            ("zero", "duplicate"),
            ("page", "normal"),
            ("xbzrle", "xbzrle"),
            ("eos", "end-of-section"),
            ("multifd_flush", "multifd-flush"),
        ] {
            if let Some(expected) = entry["counts"].get(key) {
                assert_eq!(report["ram"][counted], *expected, "{stem}: {key}");
            }
        }
        let of_blocks = |kind: &str| -> u64 {
            list(&report, "blocks").iter().map(|block| block[kind].as_u64().unwrap()).sum()
        };
        for kind in ["normal", "duplicate", "xbzrle"] {
            assert_eq!(report["ram"][kind], of_blocks(kind), "{stem}: the blocks' sum of {kind}");
        }
        let text = text_of(&inspect(&golden(stem), &[]));
        for named in list(&report, "sections").iter().chain(list(&report, "blocks")) {
            let name = named["name"].as_str().unwrap();
            assert!(!name.is_empty() && text.contains(name), "{stem}: the text names {name}");
        }
    }
}

/// QEMU's own description, found without our decoder: the JSON object that ends the recording.
fn description_at_the_end(bytes: &[u8]) -> Value {
    let devices = bytes.windows(11).position(|window| window == b"\"devices\": ").unwrap();
    let braces = (0..devices).rev().filter(|&at| bytes[at] == b'{');
    braces.take(100).find_map(|at| serde_json::from_slice(&bytes[at..]).ok()).unwrap()
}

/// The description that QEMU put behind its device state lists what we must have found.
#[test]
fn device_sections_are_those_that_qemu_describes() {
    for name in ["precopy-10.0.2.stream", "precopy-7.2.22.stream", "mapped-ram-11.1.3.file"] {
        let bytes = raw(name);
        let described: Vec<(String, u64, u64)> = list(&description_at_the_end(&bytes), "devices")
            .iter()
            .map(|device| {
                let number = |key: &str| device[key].as_u64();
                let name = device["name"].as_str().unwrap().to_owned();
                (name, number("instance_id").unwrap(), number("version").unwrap_or(u64::MAX))
            })
            .collect();
        let report = json_of(&inspect(&golden(name), &["--json"]));
        let found = devices(&report);
        assert_eq!(found.len(), described.len(), "{name}");
        for (found, described) in found.iter().zip(&described) {
            assert_eq!((&found.0, found.1), (&described.0, described.1), "{name}");
            // Old-style devices are described without a version.
            assert!([found.2, u64::MAX].contains(&described.2), "{name}: {}", found.0);
        }
        assert_eq!(report["vm-description"]["devices"], described.len() as u64);
        // Each section's mark and number stand at its offset.
        for section in list(&report, "sections").iter().filter(|one| one["type"] == "full") {
            let at = usize::try_from(section["offset"].as_u64().unwrap()).unwrap();
            let id = u32::try_from(section["id"].as_u64().unwrap()).unwrap();
            assert_eq!(bytes[at], 4, "{section}");
            assert_eq!(bytes[at + 1..at + 5], id.to_be_bytes(), "{section}");
        }
    }
}

#[test]
fn a_package_holds_the_devices_of_a_precopy() {
    let sorted = |mut devices: Vec<_>| {
        devices.sort();
        devices
    };
    let precopy = json_of(&inspect(&golden("precopy-10.0.2.stream"), &["--json"]));
    let postcopy = json_of(&inspect(&golden("postcopy-preempt-10.0.2.main"), &["--json"]));
    assert_eq!(devices(&precopy).len(), 29);
    assert_eq!(sorted(devices(&postcopy)), sorted(devices(&precopy)));
    let commands: Vec<(&str, bool)> = list(&postcopy, "commands")
        .iter()
        .map(|one| (one["name"].as_str().unwrap(), one["inside"] == "package"))
        .collect();
    let package = commands.iter().position(|one| one.0 == "PACKAGED").unwrap();
    let expected =
        [("POSTCOPY_LISTEN", true), ("PING", true), ("POSTCOPY_RUN", true), ("PING", false)];
    assert_eq!(commands[package + 1..], expected);
    // Every command stands where the report says: its mark is 8.
    let bytes = raw("postcopy-preempt-10.0.2.main");
    for command in list(&postcopy, "commands") {
        let at = usize::try_from(command["offset"].as_u64().unwrap()).unwrap();
        assert_eq!(bytes[at], 8, "{command}");
    }
}

#[test]
fn the_text_says_what_it_is() {
    let shown = |name: &str, arguments: &[&str], parts: &[&str]| {
        let text = text_of(&inspect(&golden(name), arguments));
        for part in parts {
            assert!(text.contains(part), "{name} is shown with \"{part}\": {text}");
        }
    };
    shown(
        "precopy-10.0.2.stream",
        &["--devices"],
        &[
            "main channel of a migration",
            "machine        pc-q35-10.0",
            "pc.ram                     0x800000",
            "section ram: start",
            "SWITCHOVER_START",
            "device 0000:00:1f.2/ich9_ahci",
            "env.regs: uint64, 8 bytes x16",
            "143 normal, 2051 zero",
            "EOF",
        ],
    );
    shown("validate-uuid-10.0.2.stream", &[], &["00112233-4455-6677-8899-aabbccddeeff"]);
    shown(
        "recovery-preempt-10.0.2.2-main-rp",
        &[],
        &["return path", "RECV_BITMAP pc.ram", "RESUME_ACK 1", "REQ_PAGES x", "SHUT 0"],
    );
    shown("multifd-zstd-10.0.2.connA", &[], &["channel        1", "zstd: 4 packets", "with SYNC"]);
    shown(
        "colo-11.1.3.main",
        &[],
        &["CHECKPOINT_REQUEST", "VMSTATE_SEND", "VMSTATE_SIZE: 31.7 KiB"],
    );
    shown("ignore-shared-10.0.2.stream", &[], &["x-ignore-shared", "0xffff0000"]);
}

/// A kept VM is read from a file by seeking, and from a pipe: both see the same.
#[test]
fn a_kept_vm_is_read_by_seeking_and_from_a_pipe() {
    let bytes = raw("mapped-ram-10.0.2.file");
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&bytes).unwrap();
    let mut from_file = json_of(&inspect(file.path(), &["--json", "--pages"]));
    let mut child = Command::new(env!("CARGO_BIN_EXE_whimbrel"))
        .args(["inspect", "-", "--json", "--pages"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let mut from_pipe = json_of(&output);
    for report in [&mut from_file, &mut from_pipe] {
        report.as_object_mut().unwrap().remove("file").unwrap();
    }
    assert_eq!(from_file, from_pipe);
    // The guest fills 8 pages at 6 MiB and counts in 64 from 1 MiB on.
    let of_ram: Vec<(u64, u64)> = list(&from_file, "pages")
        .iter()
        .filter(|run| run["block"] == "pc.ram")
        .map(|run| (run["start"].as_u64().unwrap(), run["bytes"].as_u64().unwrap()))
        .collect();
    assert_eq!(of_ram, [(1 << 20, 64 * 4096), (6 << 20, 8 * 4096)]);
    assert_eq!(from_file["blocks"][0]["mapped-ram"]["present"], 72);
    assert_eq!(from_file["mapped-ram"], true);
}

/// A bitmap is of whole words, and may not tell of pages that the block has not.
#[test]
fn a_page_beyond_its_kept_block_is_told() {
    let mut bytes = raw("mapped-ram-10.0.2.file");
    let report = json_of(&inspect(&golden("mapped-ram-10.0.2.file"), &["--json"]));
    let blocks = list(&report, "blocks");
    let bios = blocks.iter().find(|block| block["name"] == "pc.bios").unwrap();
    assert_eq!(bios["length"], 16 * 4096);
    let bitmap = usize::try_from(bios["mapped-ram"]["bitmap-offset"].as_u64().unwrap()).unwrap();
    bytes[bitmap + 2] = 2;
    let line = error_line(&inspect_bytes(&bytes, &["--json"]));
    let expected = format!("byte {}: RAM block \"pc.bios\"", bitmap + 2);
    assert!(line.contains(&expected) && line.contains("found page 17"), "{line}");
}

#[test]
fn pages_are_listed_as_runs() {
    let report = json_of(&inspect(&golden("xbzrle-10.0.2.stream"), &["--json", "--pages"]));
    for kind in ["normal", "duplicate", "xbzrle"] {
        let runs = list(&report, "pages").iter().filter(|run| run["kind"] == kind);
        let listed: u64 = runs.map(|run| run["bytes"].as_u64().unwrap() / 4096).sum();
        assert_eq!(report["ram"][kind], listed, "{kind}");
    }
    let text = text_of(&inspect(&golden("xbzrle-10.0.2.stream"), &["--pages"]));
    assert!(text.contains("xbzrle     0x"), "{text}");
}

/// Wherever a recording is cut, what came before is shown and the error names the cut.
#[test]
fn cut_recordings_are_one_line_and_say_where() {
    for name in [
        "precopy-10.0.2.stream",
        "postcopy-preempt-10.0.2.main",
        "mapped-ram-10.0.2.file",
        "multifd-zstd-10.0.2.connB",
        "recovery-preempt-10.0.2.2-main-rp",
    ] {
        let bytes = raw(name);
        let places = [5, 30, 100, 700, bytes.len() / 3, bytes.len() / 2, bytes.len() - 3];
        for place in places {
            let output = inspect_bytes(&bytes[..place], &["--json"]);
            let report = json_of(&output);
            // A return path may end between any two messages.
            if kind_of(name) == "return-path" && output.status.success() {
                assert_eq!(report["bytes"], place, "{name} cut at {place}");
                continue;
            }
            let line = error_line(&output);
            assert!(line.contains("the stream ends here, expected"), "{name} at {place}: {line}");
            assert_eq!(report["error"]["offset"], place, "{name}: {line}");
            assert_eq!(report["complete"], false);
        }
    }
}

#[test]
fn what_came_before_a_cut_is_shown() {
    // All RAM, although the devices are cut off.
    let bytes = raw("precopy-10.0.2.stream");
    let output = inspect_bytes(&bytes[..bytes.len() - 50_000], &[]);
    error_line(&output);
    let text = text_of(&output);
    assert!(text.contains("143 normal, 2051 zero"), "{text}");
    assert!(text.contains("device state that cannot be told apart"), "{text}");
    assert!(text.contains("and not to its end"), "{text}");
    // The blocks of a kept VM whose last pages are missing.
    let bytes = raw("mapped-ram-10.0.2.file");
    let text = text_of(&inspect_bytes(&bytes[..4 << 20], &[]));
    assert!(text.contains("72 of 2048 present"), "{text}");
}

#[test]
fn a_flipped_byte_is_one_line() {
    let bytes = raw("precopy-10.0.2.stream");
    let report = json_of(&inspect(&golden("precopy-10.0.2.stream"), &["--json"]));
    let end = list(&report, "sections").iter().find(|one| one["type"] == "end").unwrap();
    let end = usize::try_from(end["offset"].as_u64().unwrap()).unwrap();
    // The version of the format, the mark of the configuration, that of the first section and
    // that of RAM's end.
    for place in [7, 8, 0x18, end] {
        let mut damaged = bytes.clone();
        damaged[place] ^= 0x40;
        let line = error_line(&inspect_bytes(&damaged, &[]));
        assert!(line.contains(": byte ") && line.contains("expected"), "{place}: {line}");
    }
    // Anywhere else it may be the content of a page; but never a panic, never two lines.
    let mut place = 9;
    while place < bytes.len() {
        let mut damaged = bytes.clone();
        damaged[place] ^= 0xff;
        let output = inspect_bytes(&damaged, &["--json"]);
        if !output.status.success() {
            error_line(&output);
        }
        json_of(&output);
        place = place * 3 / 2 + 1;
    }
}

#[test]
fn bytes_behind_the_end_are_told() {
    for name in ["precopy-10.0.2.stream", "postcopy-10.0.2.main", "postcopy-10.0.2.rp"] {
        let mut bytes = raw(name);
        let end = bytes.len();
        bytes.extend_from_slice(b"more");
        let line = error_line(&inspect_bytes(&bytes, &["--json"]));
        let expected = format!("byte {end}: expected the end of the stream, found the byte 0x6d");
        assert!(line.contains(&expected), "{name}: {line}");
    }
}

#[test]
fn what_is_no_migration_is_one_line() {
    let missing = error_line(&inspect(Path::new("no/such/file"), &[]));
    assert!(missing.contains("no/such/file: cannot be opened"), "{missing}");
    assert!(missing.contains("give the path"), "{missing}");
    let directory = error_line(&inspect(&golden_directory(), &[]));
    assert!(directory.contains("is a directory"), "{directory}");
    for bytes in [&b"GET / HTTP/1.1\r\n"[..], &[0; 4096], b"\x08\xff\xff\xff\xff", b"QEV", b""] {
        let output = inspect_bytes(bytes, &[]);
        let line = error_line(&output);
        assert!(line.contains("byte "), "{line}");
        assert!(text_of(&output).is_empty(), "{}", text_of(&output));
    }
}

#[test]
fn a_kind_that_was_told_is_believed() {
    let output = inspect(&golden("postcopy-10.0.2.rp"), &["--as", "preempt"]);
    let line = error_line(&output);
    assert!(line.contains("byte 0: expected"), "{line}");
    let output = inspect(&golden("postcopy-10.0.2.rp"), &["--as", "return-path", "--json"]);
    assert!(output.status.success());
    let output = inspect(&golden("precopy-10.0.2.stream"), &["--as", "multifd"]);
    assert!(error_line(&output).contains("expected the multifd magic"), "{output:?}");
}

/// A compressed file that is cut off is not taken for a whole one.
#[test]
fn a_cut_compressed_file_is_told() {
    let packed = std::fs::read(golden("precopy-10.0.2.stream")).unwrap();
    let line = error_line(&inspect_bytes(&packed[..packed.len() / 2], &["--json"]));
    assert!(line.contains("cannot be read from here on"), "{line}");
}

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// A stream as whimbrel's own machines send it, with a block of this name.
fn own_stream(block: &str) -> Vec<u8> {
    let mut out = Vec::new();
    FileHeader.encode(&mut out);
    Configuration::new(name("whimbrel-1")).encode(&mut out);
    let header = |id, of: &str, version_id| SectionHeader {
        id: SectionId(id),
        name: name(of),
        instance_id: 0,
        version_id,
    };
    let blocks = BlockList::new([BlockInfo::new(name(block), 0x4000)]).unwrap();
    let index = blocks.find(block.as_bytes()).unwrap();
    header(1, "ram", 4).encode_start(&mut out);
    blocks.encode(&mut out);
    encode_end_of_section(&mut out);
    SectionId(1).encode_footer(&mut out);
    SectionId(1).encode_end(&mut out);
    let mut records = RecordEncoder::new(std::sync::Arc::new(blocks));
    records.zero_page(index, BlockOffset(0), &mut out);
    records.page_header(index, BlockOffset(0x1000), &mut out);
    out.extend_from_slice(&[7; 4096]);
    encode_end_of_section(&mut out);
    SectionId(1).encode_footer(&mut out);
    let sections = [
        DeviceSection::with_own_length(header(2, "cpu", 1), &[1; 300]),
        DeviceSection::with_own_length(header(3, "serial", 1), &[2; 12]),
    ];
    sections.iter().for_each(|section| section.encode(&mut out));
    encode_eof(&mut out);
    encode_vm_description(&vmdesc::describe(4096, &sections), &mut out);
    out
}

#[test]
fn a_machine_of_our_own_is_shown() {
    let bytes = own_stream("ram0");
    let output = inspect_bytes(&bytes, &["--json", "--devices"]);
    assert!(output.status.success(), "{output:?}");
    let report = json_of(&output);
    assert_eq!(report["machine"], "whimbrel-1");
    let (cpu, serial) = (("cpu".to_owned(), 0, 1), ("serial".to_owned(), 0, 1));
    assert_eq!(devices(&report), [cpu, serial]);
    assert_eq!(report["vm-description"]["devices"], 2);
    let serial = list(&report, "sections").last().unwrap();
    assert_eq!(serial["bytes"], 16);
    assert_eq!(serial["fields"][1]["size"], 12);
    // Its device sections tell their own length, so that those before a cut are shown.
    let cut = bytes.len() - vmdesc::describe(4096, &[]).len() - 400;
    let output = inspect_bytes(&bytes[..cut], &["--json"]);
    error_line(&output);
    assert!(!devices(&json_of(&output)).is_empty(), "{output:?}");
}

/// Names are a peer's to choose: they must not write to the terminal.
#[test]
fn names_cannot_write_to_a_terminal() {
    for arguments in [&["--pages"][..], &["--json", "--pages"]] {
        let output = inspect_bytes(&own_stream("\u{1b}[2J\nram"), arguments);
        assert!(output.status.success());
        assert!(!output.stdout.contains(&0x1b));
        assert!(text_of(&output).contains("u{1b}[2J"), "{}", text_of(&output));
    }
}
