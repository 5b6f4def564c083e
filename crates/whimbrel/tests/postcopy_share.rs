//! A guest that never stops asking starves neither the rest of its memory nor the page that the
//! background has begun.

#[path = "support/far_destination.rs"]
mod far_destination;
#[path = "support/huge_pages.rs"]
mod huge_pages;
#[path = "support/vms.rs"]
mod vms;

use std::io::Read;
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use far_destination::{FarDestination, Main};
use huge_pages::HugePages;
use vms::{Alone, Side, until};
use whimbrel::{Capability, MigrationStatus};
use whimbrel_ram::PageSize;
use whimbrel_vm::{AccelChoice, Config, Fill, ReferenceVm};
use whimbrel_wire::Decoded;

const RAM: &str = "vm.ram";
const HUGE: u64 = 2 << 20;

/// The part of the urgent channel's bytes that the background may have beside it: one in so many.
const PART: u64 = 8;

/// A guest that stands still, given to a destination that asks for pages; both its channels.
fn give_away(config: &Config, there: &FarDestination, bandwidth: u64) -> (Side, Main, TcpStream) {
    let vm = ReferenceVm::new(config.clone()).expect("a VM");
    let migrator = whimbrel::Migrator::new(vm.clone(), whimbrel::Start::Paused);
    let source = Side { vm, migrator };
    source.switch_on(&[Capability::PostcopyRam, Capability::PostcopyPreempt]);
    let limit = |p: &mut whimbrel::Parameters| p.max_postcopy_bandwidth = bandwidth;
    source.migrator.update_parameters(limit).expect("allowed");
    source.migrator.migrate(there.address.clone()).expect("it starts");
    source.migrator.start_postcopy().expect("allowed");
    let mut main = there.main(None);
    main.guest();
    let urgent = there.accept();
    (source, main, urgent)
}

fn config(memory: u64) -> Config {
    Config { accel: AccelChoice::Native, fill: Fill::Random, ..Config::new(memory) }
}

/// The urgent channel is never idle: its every byte waits for the destination to read. What the
/// background then gets follows from what the urgent channel got, and not from time.
#[test]
fn the_background_gets_its_part_beside_requests_without_end() {
    const MEMORY: u64 = 64 << 20;
    let alone = Alone::begin();
    {
        let there = FarDestination::listen();
        let (source, mut main, mut urgent) = give_away(&config(MEMORY), &there, 0);
        let background = AtomicU64::new(0);
        thread::scope(|scope| {
            let mut answers = main.stream.try_clone().expect("a descriptor");
            scope.spawn(move || {
                use std::io::Write;
                let mut bytes = Vec::new();
                // From the end on: the background begins at the other one.
                for page in (0..MEMORY / 4096).rev() {
                    let block = whimbrel_wire::Name::new(RAM).expect("a name");
                    let start = whimbrel_wire::BlockOffset(page * 4096);
                    whimbrel_wire::ReturnMessage::RequestPagesOf { block, start, len: 4096 }
                        .encode(&mut bytes);
                }
                let _ = answers.write_all(&bytes);
            });
            let background = &background;
            scope.spawn(move || {
                let end = |decoded: &Decoded| {
                    let pages = matches!(decoded, Decoded::Ram(_));
                    background.fetch_add(if pages { 4104 } else { 0 }, Ordering::SeqCst);
                    matches!(decoded, Decoded::Eof)
                };
                main.until("its end", end);
                main.say(&whimbrel_wire::ReturnMessage::Shut(0)).expect("the source listens");
            });
            let mut buffer = vec![0; 256 << 10];
            let mut read = 0;
            loop {
                let bytes = urgent.read(&mut buffer).expect("it goes on") as u64;
                if bytes == 0 {
                    break;
                }
                read += bytes;
                // A piece is owed for before the next goes.
                until("the background's part", || {
                    background.load(Ordering::SeqCst) + (256 << 10) >= read / PART
                });
            }
            let had = background.load(Ordering::SeqCst);
            eprintln!("{read} urgent bytes, and {had} of the background");
            assert!(read > MEMORY / 4, "most of it went as asked for: {read}");
        });
        assert_eq!(source.ended("its end").status, Some(MigrationStatus::Completed));
    }
    alone.expect_nothing_left("the background's part");
}

/// Of a host page that it has begun, the background sends the rest at once when that is asked for:
/// whatever its rate, and although the urgent channel has more than it can send.
#[test]
fn a_host_page_that_was_begun_and_is_asked_for_is_finished_first() {
    const PAGES: u64 = 8;
    let alone = Alone::begin();
    let Some(_huge) = HugePages::reserve(PAGES) else {
        eprintln!("not run: there are no huge pages to be had");
        return;
    };
    {
        let page_size = PageSize::new(2 << 20).expect("a page size");
        let config = Config { page_size, ..config(PAGES * HUGE) };
        let there = FarDestination::listen();
        // One byte a second: what it has begun it does not finish by itself.
        let (source, mut main, _never_read) = give_away(&config, &there, 1);
        let mut begun = None;
        while begun.is_none() {
            main.next().expect("the background begins");
            begun = main.came.0.keys().find(|(block, _)| block == RAM).cloned();
        }
        let (_, offset) = begun.expect("found");
        let begun = offset / HUGE;
        main.ask(Some(RAM), begun * HUGE, u32::try_from(HUGE).expect("32 bits"));
        for page in (0..PAGES).filter(|page| *page != begun) {
            main.ask(None, page * HUGE, u32::try_from(HUGE).expect("32 bits"));
        }
        let of_it = |main: &Main| {
            let inside = |(block, offset): &&(String, u64)| block == RAM && offset / HUGE == begun;
            main.came.0.keys().filter(inside).count() as u64
        };
        while of_it(&main) < HUGE / 4096 {
            main.next().expect("the rest of it comes");
        }
        let other = main.came.0.keys().filter(|(block, _)| block == RAM).count() as u64;
        assert_eq!(other, HUGE / 4096, "and nothing before it was whole");
        source.migrator.end();
    }
    alone.expect_nothing_left("a host page");
}

/// Eight vCPUs touch all of their memory at once, and all of it comes.
#[test]
fn eight_vcpus_that_never_stop_faulting_get_everything() {
    let alone = Alone::begin();
    let folder = tempfile::tempdir().expect("a folder");
    for unix in [true, false] {
        let workload = "uniform,rate=0,working-set=24M".parse().expect("a workload");
        let config = Config { vcpus: 8, workload, ..config(32 << 20) };
        {
            let (source, destination) = (Side::running(&config), Side::waiting(&config, true));
            for side in [&source, &destination] {
                side.switch_on(&[Capability::PostcopyRam, Capability::PostcopyPreempt]);
            }
            let address = match unix {
                true => destination.listen(&format!("unix:{}", folder.path().join("to").display())),
                false => destination.listen("tcp:127.0.0.1:0"),
            };
            source.migrator.migrate(address).expect("it starts");
            source.migrator.start_postcopy().expect("allowed");
            let info = source.ended("its end");
            assert_eq!(info.status, Some(MigrationStatus::Completed), "{:?}", info.error_desc);
            let info = (info.ram.expect("told"), info.answers.expect("told"));
            let urgent = info.1.count * 4104;
            let background = info.0.postcopy_bytes - urgent;
            eprintln!("unix {unix}: {urgent} urgent bytes, {background} of the background");
            let faults = destination.ended("its end");
            assert_eq!(faults.status, Some(MigrationStatus::Completed), "{:?}", faults.error_desc);
            assert_eq!(faults.faults.expect("told").came_twice, 0);
            assert!(urgent > 0 && background > 0);
            destination.expect_healthy("eight vCPUs");
        }
        alone.expect_nothing_left("eight vCPUs");
    }
}
