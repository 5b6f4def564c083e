//! Replays the seeds, the corpus that is kept, and inputs that fuzzing once found, through every
//! target on stable Rust.

use std::fs;
use std::path::Path;

use whimbrel_fuzz::{TARGETS, limited};

/// The seeds of a target, then its part of the corpus.
fn replay(target: &str) {
    let (_, body) = TARGETS.into_iter().find(|(name, _)| *name == target).unwrap();
    let seeds = whimbrel_fuzz::seeds::of(target).unwrap();
    assert!(!seeds.is_empty(), "{target} has seeds");
    for (name, bytes) in seeds {
        println!("{name}");
        limited(body, &bytes);
    }
    for (number, bytes) in whimbrel_fuzz::corpus::read(target).unwrap().iter().enumerate() {
        println!("{number}");
        limited(body, bytes);
    }
}

macro_rules! replay {
    ($($target:ident),* $(,)?) => {
        $(#[test] fn $target() { replay(stringify!($target)); })*

        #[test]
        fn every_target_is_replayed() {
            assert_eq!(TARGETS.map(|(name, _)| name), [$(stringify!($target)),*]);
        }
    };
}

replay! {
    main_stream,
    device_tail,
    ram_records,
    return_path,
    xbzrle,
    mapped_ram,
    multifd,
    vmdesc,
    unpack,
    channels,
    answers,
    destination,
    source,
    receive,
    kept_file,
    qmp_server,
    qmp_client,
}

/// What a seed of another target holds is as good an input as any.
#[test]
fn seeds_of_other_targets() {
    let seeds = whimbrel_fuzz::seeds::all().unwrap();
    for (_, body) in TARGETS {
        for (_, _, bytes) in seeds.iter().step_by(5) {
            limited(body, bytes.get(..4096).unwrap_or(bytes));
        }
    }
}

#[test]
fn past_findings() {
    let findings = Path::new(env!("CARGO_MANIFEST_DIR")).join("findings");
    let Ok(directory) = fs::read_dir(findings) else { return };
    for file in directory {
        let bytes = fs::read(file.unwrap().path()).unwrap();
        TARGETS.iter().for_each(|(_, body)| limited(*body, &bytes));
    }
}
