//! A source that falls silent, at any byte: whatever its destination is asked over QMP it answers at
//! once, and it can be told to give up.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::process::VmProcess;
use crate::stream::{Stream, TINY, What};

/// What an answer may take on a machine that is busy with other tests. Whatever waited for a byte
/// that does not come would take for ever.
const ANSWER: Duration = Duration::from_secs(10);
/// What giving up may take.
const END: Duration = Duration::from_secs(5);

/// How a migration that hangs is ended.
#[derive(Clone, Copy, Debug)]
enum Way {
    Cancel,
    Yank,
    Quit,
}

/// How a destination stands that has heard so much: who says nothing may be anybody.
fn status_after(bytes: &[u8]) -> &'static str {
    if bytes.is_empty() { "setup" } else { "active" }
}

/// A destination that has heard so much of a stream, and nothing since.
fn stalled(bytes: &[u8]) -> (VmProcess, TcpStream) {
    let mut vm = VmProcess::destination(&TINY);
    let address = vm.listen("tcp:127.0.0.1:0");
    let address = address.strip_prefix("tcp:").expect("it was asked for");
    let mut source = TcpStream::connect(address).expect("it listens");
    source.write_all(bytes).expect("it hears");
    vm.reaches(status_after(bytes), "a source has come");
    (vm, source)
}

fn at_once<T>(what: &str, limit: Duration, ask: impl FnOnce() -> T) -> T {
    let asked = Instant::now();
    let answer = ask();
    assert!(asked.elapsed() < limit, "{what}: took {:?}", asked.elapsed());
    answer
}

/// Everything that can be asked of it, several times: it may still be reading what has come.
fn expect_answers(vm: &mut VmProcess, stands: &str, what: &str) {
    for _ in 0..20 {
        let state = at_once(&format!("{what}: query-status"), ANSWER, || vm.run_state());
        assert_eq!(state, "inmigrate", "{what}");
        let status = at_once(&format!("{what}: query-migrate"), ANSWER, || vm.status());
        assert_eq!(status, stands, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
    at_once(&format!("{what}: stop"), ANSWER, || vm.qmp.stop()).expect("nothing to stop");
    at_once(&format!("{what}: cont"), ANSWER, || vm.qmp.cont()).expect_err("it has not come");
}

fn expect_end(mut vm: VmProcess, way: Way, what: &str) {
    match way {
        Way::Cancel => {
            at_once(&format!("{what}: migrate_cancel"), ANSWER, || vm.qmp.migrate_cancel())
                .expect("it is no postcopy");
            at_once(what, END, || vm.reaches("cancelled", what));
            vm.quit(what);
        }
        Way::Yank => {
            at_once(&format!("{what}: yank"), ANSWER, || vm.qmp.yank_migration())
                .expect("there is something to be yanked");
            // With it ends the VMM, as after every incoming migration that fails.
            let ended = at_once(what, END, || vm.process.ended(what));
            ended.expect_line(what, &["main channel, byte", "shut down on request (yank)"]);
        }
        Way::Quit => at_once(what, END, || vm.quit(what)),
    }
}

#[test]
fn a_source_that_falls_silent_at_any_byte_holds_up_nothing() {
    let stream = Stream::record();
    let ways = [Way::Cancel, Way::Yank, Way::Quit];
    let mut turn = 0;
    for what in [
        What::Header,
        What::Configuration,
        What::RamStart,
        What::BlockList,
        What::RamPart,
        What::Page,
        What::Zero,
        What::RamEnd,
        What::Footer,
        What::Device,
    ] {
        let at = stream.first(what);
        for cut in [at.start, at.start.midpoint(at.end), at.end - 1] {
            let way = ways[turn % ways.len()];
            turn += 1;
            let what = format!("silent at byte {cut}, {what:?}, {way:?}");
            let heard = &stream.bytes[..cut];
            let (mut vm, _source) = stalled(heard);
            expect_answers(&mut vm, status_after(heard), &what);
            expect_end(vm, way, &what);
        }
    }
    // All that was sent, and not the mark that lets the guest run.
    let last = stream.all(What::Device).last().expect("devices").end;
    for way in ways {
        let what = format!("silent before the end mark, {way:?}");
        let (mut vm, _source) = stalled(&stream.bytes[..last]);
        expect_answers(&mut vm, "active", &what);
        expect_end(vm, way, &what);
    }
}

/// One that goes on so slowly that it never ends.
#[test]
fn a_source_that_trickles_holds_up_nothing() {
    let stream = Stream::record();
    let devices = stream.first(What::Device).start;
    let (mut vm, mut source) = stalled(&stream.bytes[..devices]);
    let began = Instant::now();
    for byte in stream.bytes[devices..].iter().take(200) {
        source.write_all(&[*byte]).expect("it hears");
        let asked = format!("trickling for {:?}", began.elapsed());
        at_once(&asked, ANSWER, || vm.run_state());
    }
    expect_answers(&mut vm, "active", "trickling");
    expect_end(vm, Way::Cancel, "trickling");
}
