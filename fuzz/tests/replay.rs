//! Replays the seeds, and inputs that fuzzing once found, through every target on stable Rust.

use std::fs;
use std::path::Path;

use whimbrel_fuzz::TARGETS;

#[test]
fn seeds_of_every_target() {
    let seeds = whimbrel_fuzz::seeds::all().unwrap();
    for (target, body) in TARGETS {
        let mut replayed = 0;
        for (_, _, bytes) in seeds.iter().filter(|(of, _, _)| *of == target) {
            body(bytes);
            replayed += 1;
        }
        assert!(replayed > 0, "{target} has seeds");
    }
}

/// What a seed of another target holds is as good an input as any.
#[test]
fn seeds_of_other_targets() {
    let seeds = whimbrel_fuzz::seeds::all().unwrap();
    for (_, body) in TARGETS {
        for (_, _, bytes) in seeds.iter().step_by(5) {
            body(bytes.get(..4096).unwrap_or(bytes));
        }
    }
}

#[test]
fn past_findings() {
    let findings = Path::new(env!("CARGO_MANIFEST_DIR")).join("findings");
    let Ok(directory) = fs::read_dir(findings) else { return };
    for file in directory {
        let bytes = fs::read(file.unwrap().path()).unwrap();
        TARGETS.iter().for_each(|(_, body)| body(&bytes));
    }
}
