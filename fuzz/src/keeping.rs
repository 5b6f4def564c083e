//! VMs that are kept: a whole stream that is taken into a file, and a file that is opened and sent
//! on.

use std::fs;
use std::num::NonZeroU8;
use std::path::Path;
use std::thread;
use std::time::Duration;

use whimbrel::kept::{Access, DirectIo, KeptVm, Receiver, Touch};
use whimbrel::{Address, Error};
use whimbrel_ram::TargetPage;

use crate::choices::Choices;
use crate::ends::{patience, within};
use crate::guest::{Alone, expect_one_line, scratch};
use crate::speaker::Speaker;
use crate::telling::{Step, steps};

/// The keeper's own settings, a bit each in the first byte of an input.
mod set {
    pub(super) const PREEMPT: u8 = 2;
    pub(super) const MULTIFD: u8 = 4;
    pub(super) const TOUCH: u8 = 8;
    pub(super) const THREADS: u8 = 16;
    /// It is told to end while the source has still to say something.
    pub(super) const ENDS_EARLY: u8 = 64;
}

/// How many bytes of settings an input of either target begins with.
pub(crate) const SETTINGS: usize = 1;

/// How long a keeper to which nothing more comes may take to see that.
const SEES_THE_END: Duration = patience(25);

/// The settings for one of [`crate::telling::migrations`].
pub(crate) fn settings_for(name: &str) -> u8 {
    match name {
        "preempt" | "cut" | "recovery" => set::PREEMPT,
        "multifd" | "multifd-zstd" | "multifd-goes-on" => set::MULTIFD,
        "run-apart" => set::TOUCH,
        _ => 0,
    }
}

fn access(settings: u8) -> Access {
    let threads = if settings & set::THREADS != 0 { 2 } else { 1 };
    Access { threads: NonZeroU8::new(threads).expect("not zero"), direct: DirectIo::Off }
}

/// The target that takes a stream in: what it keeps can be opened, and what it does not keep leaves
/// nothing.
pub fn receive(data: &[u8]) {
    let _ = take_in(data);
}

/// What came of it; the text of an error.
fn take_in(data: &[u8]) -> Result<(), String> {
    let alone = Alone::begin();
    let mut choices = Choices::new(data);
    let settings = choices.byte();
    let steps = steps(&mut choices);

    let (path, file) = (scratch("keep"), scratch("kept"));
    let multifd = settings & set::MULTIFD != 0;
    let receiver = Receiver::bind(&Address::Unix(path.clone()))
        .expect("a free address")
        .with_preempt(settings & set::PREEMPT != 0)
        .with_multifd(if multifd { 2 } else { 0 })
        .touching(if settings & set::TOUCH != 0 { Touch::Sequential } else { Touch::Nothing })
        .writing_by(access(settings));
    let stop = receiver.stopper();
    let received = thread::scope(|scope| {
        let receiving = scope.spawn(|| receiver.receive(&file));
        let channels = if multifd { 3 } else { 1 };
        let mut speaker = Speaker::connect(path, channels);
        for step in steps {
            // Nobody can say to it where to wait.
            speaker.go(step, || None);
        }
        if settings & set::ENDS_EARLY == 0 {
            speaker.close();
            within(SEES_THE_END, || receiving.is_finished());
        }
        stop.stop();
        receiving.join().expect("it does not panic")
    });
    drop(stop);
    let result = match received {
        Ok(summary) => {
            let vm = KeptVm::open(&file).expect("what was kept can be opened");
            assert_eq!((vm.machine(), vm.ram_bytes()), (summary.machine, summary.ram_bytes));
            assert_eq!(walk(&vm) * 4096, summary.stored_bytes);
            drop(vm);
            fs::remove_file(&file).expect("it was kept");
            Ok(())
        }
        Err(error) => {
            expect_one_line(&error.to_string());
            assert!(!file.exists(), "what was not kept leaves nothing: {error}");
            Err(error.to_string())
        }
    };
    alone.expect_nothing_left();
    result
}

/// How many pages are in the file. Reads each.
fn walk(vm: &KeptVm) -> u64 {
    let mut there = 0;
    for (index, block) in vm.ram().blocks() {
        for page in (0..block.target_pages()).map(TargetPage) {
            if vm.is_present(index, page) {
                there += 1;
                let mut word = [0; 8];
                block.read(page.0 * 4096, &mut word).expect("inside");
            }
        }
    }
    there
}

/// Most RAM of a file that is sent on.
const SENT_MAX: u64 = 16 << 20;

/// The target that opens a file: whatever is in it. What can be opened can be sent.
pub fn kept_file(data: &[u8]) {
    let alone = Alone::begin();
    let mut choices = Choices::new(data);
    let settings = choices.byte();
    let bytes = file_of(&mut choices);
    let _ = open_all_of(&bytes, settings);
    alone.expect_nothing_left();
}

fn file_of(choices: &mut Choices<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for step in steps(choices) {
        if let Step::Send(0, said) = step {
            bytes.extend(said);
        }
    }
    bytes
}

/// What comes of a file of these bytes; the text of an error.
fn open_all_of(bytes: &[u8], settings: u8) -> Result<(), String> {
    let path = scratch("file");
    fs::write(&path, bytes).expect("there is room");
    let result = open(&path, settings);
    fs::remove_file(&path).expect("written above");
    result
}

fn open(path: &Path, settings: u8) -> Result<(), String> {
    let text = |error: Error| {
        expect_one_line(&error.to_string());
        error.to_string()
    };
    let vm = KeptVm::open(path).map_err(text)?;
    if vm.ram_bytes() > SENT_MAX {
        return Ok(());
    }
    walk(&vm);
    assert!(vm.ram().block_count() == 0 || !vm.largest_block().is_empty());
    let restoring = vm.restoring().expect("descriptors").reading_by(access(settings));
    let nowhere = Address::File { path: "/dev/null".into(), offset: 0 };
    restoring.send(&vm, &nowhere).map(|_| ()).map_err(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choices::Op;
    use crate::telling::migrations;

    /// What a fuzzer begins from goes as far as it is meant to.
    #[test]
    fn whole_migrations_are_kept_and_files_are_opened() {
        for (name, ops) in migrations() {
            let mut input = vec![settings_for(name)];
            ops.iter().for_each(|op| op.write(&mut input));
            let kept = take_in(&input);
            let is_file = name.starts_with("file");
            // Nobody tells a keeper to wait for a QEMU that comes back.
            let breaks = ["cut", "recovery-qemu"].contains(&name);
            assert_eq!(kept.is_ok(), !is_file && !breaks, "{name}: {kept:?}");
            let opened = open_all_of(&file_of(&mut Choices::new(&input[1..])), 0);
            assert_eq!(opened.is_ok(), is_file, "{name}: {opened:?}");
        }
    }
}
