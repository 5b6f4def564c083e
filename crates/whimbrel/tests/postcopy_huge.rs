//! A destination whose memory is in 2 MiB pages, and a source that sends them in parts that make no
//! sense: what is not whole is not placed, and the guest runs on.

#[path = "support/far_source.rs"]
mod far_source;
#[path = "support/huge_pages.rs"]
mod huge_pages;
#[path = "support/vms.rs"]
mod vms;

use std::io::Write;
use std::net::{Shutdown, TcpStream};

use far_source::FarSource;
use huge_pages::HugePages;
use vms::{Alone, Side, until};
use whimbrel::{Capability, MigrationStatus, Vm};
use whimbrel_ram::{PageSize, TargetPage};
use whimbrel_vm::{AccelChoice, Config, Fill};
use whimbrel_wire::{RecordEncoder, encode_end_of_section};

const RAM: &str = "vm.ram";
const PAGES: u64 = 3;
/// Parts of a host page.
const PARTS: u64 = 512;

/// A guest that touches nothing by itself.
fn config() -> Config {
    let page_size = PageSize::new(2 << 20).expect("a page size");
    let memory = PAGES * (2 << 20);
    Config { accel: AccelChoice::Native, fill: Fill::Random, page_size, ..Config::new(memory) }
}

/// The guest runs, and has of its memory only the first host page.
fn begin(preempt: bool) -> (Side, FarSource, Option<TcpStream>) {
    let destination = Side::waiting(&config(), true);
    destination.switch_on(&[Capability::PostcopyRam]);
    if preempt {
        destination.switch_on(&[Capability::PostcopyPreempt]);
    }
    let address = destination.listen("tcp:127.0.0.1:0");
    let mut source = FarSource::connect(&address, &config());
    source.begin().part();
    (0..PARTS).for_each(|page| drop_it(source.page(RAM, page)));
    source.end_section();
    let package = source.package();
    source.packaged(&package).send();
    let urgent = preempt.then(|| source.urgent());
    until("it runs", || destination.status() == Some(MigrationStatus::PostcopyActive));
    (destination, source, urgent)
}

fn drop_it(_: &mut FarSource) {}

/// Parts of a host page, one after the other.
fn parts(source: &mut FarSource, host: u64, parts: std::ops::Range<u64>) {
    parts.for_each(|part| drop_it(source.page(RAM, host * PARTS + part)));
}

type Says = (&'static str, fn(&mut FarSource), &'static str);

const WRONG: [Says; 5] = [
    (
        "half of one and then another",
        |s| {
            parts(s, 1, 0..256);
            parts(s, 2, 0..1);
        },
        "main channel: of host page 1 of block vm.ram only 256 of 512 parts",
    ),
    (
        "half of one and then a small one",
        |s| {
            parts(s, 1, 0..256);
            drop_it(s.page("vm.firmware", 0));
        },
        "of host page 1 of block vm.ram only 256 of 512 parts",
    ),
    (
        "half of one and then the end",
        |s| {
            parts(s, 1, 0..256);
            s.end_section().eof();
        },
        "of host page 1 of block vm.ram only 256 of 512 parts",
    ),
    (
        "half of one and then nothing",
        |s| {
            parts(s, 1, 0..256);
            s.send();
            s.main.shutdown(Shutdown::Write).expect("open");
        },
        "main channel, byte",
    ),
    (
        "a part twice, and one never",
        |s| {
            parts(s, 1, 0..511);
            parts(s, 1, 7..8);
        },
        "main channel: of host page 1 of block vm.ram part 7 comes twice",
    ),
];

fn expect_paused(destination: &Side, source: &FarSource, part: &str, what: &str) {
    until(&format!("{what}: it pauses"), || {
        destination.status() == Some(MigrationStatus::PostcopyPaused)
    });
    destination.expect_reason(&[part], what);
    assert!(destination.runs(), "{what}");
    expect_pages(destination, source, 0..PARTS, what);
    destination.migrator.end();
}

fn expect_pages(side: &Side, source: &FarSource, pages: std::ops::Range<u64>, what: &str) {
    let digest = |vm: &dyn Vm, page| {
        let (_, block) = vm.ram().find(RAM).expect("a block");
        block.page_digest(TargetPage(page))
    };
    for page in pages {
        let (here, there) = (digest(side.migrator.vm(), page), digest(&*source.model, page));
        assert_eq!(here, there, "{what}: page {page}");
    }
}

/// Both VMs' memory and firmware.
fn reserve() -> Option<HugePages> {
    let held = HugePages::reserve(2 * (PAGES + 1) * 4);
    if held.is_none() {
        eprintln!("not run: there are no huge pages to be had");
    }
    held
}

#[test]
fn parts_that_make_no_sense_pause_it() {
    let mut alone = Alone::begin();
    let Some(_held) = reserve() else { return };
    for preempt in [true, false] {
        for (name, says, part) in WRONG {
            let what = format!("preempt {preempt}: {name}");
            {
                let (destination, mut source, _urgent) = begin(preempt);
                source.part();
                says(&mut source);
                source.send();
                expect_paused(&destination, &source, part, &what);
            }
            alone.keeps_one();
            alone.expect_nothing_left(&what);
        }
    }
}

#[test]
fn parts_of_one_page_on_two_channels_pause_it() {
    let mut alone = Alone::begin();
    let Some(_held) = reserve() else { return };
    {
        let (destination, mut source, urgent) = begin(true);
        source.part();
        parts(&mut source, 1, 0..256);
        source.send();
        let mut urgent = urgent.expect("there is one");
        urgent.write_all(&source.named_page(RAM, PARTS + 256)).expect("open");
        let parts = "parts of host page 1 of block vm.ram come on two channels";
        expect_paused(&destination, &source, parts, "two channels");
        alone.keeps_one();
    }
    alone.expect_nothing_left("two channels");
}

/// Parts in any order, zeros among them, on both channels, and one host page on each: all of it is
/// as it was sent.
#[test]
fn parts_may_come_in_any_order() {
    let alone = Alone::begin();
    let Some(_held) = reserve() else { return };
    {
        let (destination, mut source, urgent) = begin(true);
        source.part();
        (0..PARTS).rev().for_each(|part| drop_it(source.page(RAM, PARTS + part)));
        let mut bytes = Vec::new();
        let mut records = RecordEncoder::new(source.blocks.clone());
        let place = source.block(RAM);
        for part in (0..PARTS).step_by(2).chain((1..PARTS).step_by(2)) {
            let offset = whimbrel_wire::BlockOffset((2 * PARTS + part) * 4096);
            let (_, block) = source.model.ram().find(RAM).expect("a block");
            let mut content = [0; 4096];
            block.read(offset.0, &mut content).expect("inside");
            records.page_header(place, offset, &mut bytes);
            bytes.extend_from_slice(&content);
        }
        encode_end_of_section(&mut bytes);
        urgent.expect("there is one").write_all(&bytes).expect("open");
        source.pages("vm.firmware", &[]).end_section().eof().send();
        let info = destination.ended("any order");
        assert_eq!(info.status, Some(MigrationStatus::Completed), "{:?}", info.error_desc);
        expect_pages(&destination, &source, 0..PAGES * PARTS, "any order");
    }
    alone.expect_nothing_left("any order");
}
