//! The decision against channels that are simulated: processors and a link that they share, and
//! sockets that hold some of what is sent.
#![expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "numbers of tests")]

use super::*;

const STEP: Duration = Duration::from_micros(250);
const PACKET: f64 = (512 << 10) as f64;
const MB: f64 = 1e6;

/// What packing does at one rung: bytes of pages a second and processor, and the part of them
/// that is left.
#[derive(Clone, Copy)]
struct Way {
    speed: f64,
    ratio: f64,
}

type Content = [Way; 4];

const fn way(speed: f64, ratio: f64) -> Way {
    Way { speed: speed * MB, ratio }
}

/// As measured: the memory of a Linux guest, and noise. The first rung costs the system calls.
const GUEST: Content = [way(4500.0, 1.0), way(750.0, 0.51), way(600.0, 0.42), way(230.0, 0.39)];
const TEXT: Content = [way(4500.0, 1.0), way(690.0, 0.21), way(650.0, 0.165), way(500.0, 0.11)];
const NOISE: Content = [way(4500.0, 1.0), way(3400.0, 1.0), way(3200.0, 1.0), way(2500.0, 1.0)];

/// The world around the channels, at a time in seconds.
struct World {
    channels: usize,
    processors: f64,
    /// Wire bytes a second.
    link: fn(f64) -> f64,
    /// Pages' bytes a second that the other side can take.
    other_side: f64,
    /// Wire bytes that a channel's sockets hold.
    buffer: f64,
    /// What the packet of this number holds.
    content: fn(u64) -> Content,
}

impl Default for World {
    fn default() -> World {
        World {
            channels: 2,
            processors: 2.0,
            link: |_| 1200.0 * MB,
            other_side: 1e12,
            buffer: 4.0 * MB,
            content: |_| GUEST,
        }
    }
}

struct Channel {
    rung: usize,
    began: f64,
    /// Seconds of a processor until it is packed.
    packing: f64,
    wire: f64,
    /// Of it not yet in the socket.
    unsent: f64,
    /// In the sockets: wire bytes, and the bytes of pages that they are.
    held: (f64, f64),
}

/// Pages' bytes a second over a time; `chosen` says the rung.
fn run(world: &World, seconds: f64, mut plan: Option<&mut Effort>, fixed: usize) -> f64 {
    let (mut now, mut pages, mut number) = (0.0, 0.0, 0u64);
    let dt = STEP.as_secs_f64();
    let mut start = |rung: usize, now: f64| {
        let way = (world.content)(number)[rung];
        number += 1;
        let wire = PACKET * way.ratio;
        Channel {
            rung,
            began: now,
            packing: PACKET / way.speed,
            wire,
            unsent: wire,
            held: (0.0, 0.0),
        }
    };
    let rung = |plan: &Option<&mut Effort>| plan.as_ref().map_or(fixed, |plan| plan.rung());
    let mut channels: Vec<Channel> = (0..world.channels).map(|_| start(rung(&plan), 0.0)).collect();
    while now < seconds {
        now += dt;
        let busy = channels.iter().filter(|channel| channel.packing > 0.0).count() as f64;
        let share = dt * (world.processors / busy.max(1.0)).min(1.0);
        let full = channels.iter().filter(|channel| channel.held.0 > 1.0).count() as f64;
        let drain = (world.link)(now) * dt / full.max(1.0);
        let place = world.other_side * dt / full.max(1.0);
        for channel in &mut channels {
            // The link and the other side, whichever is slower.
            let (wire, held) = channel.held;
            if wire > 1.0 {
                let part = (drain / wire).min(place / held).min(1.0);
                channel.held = (wire * (1.0 - part), held * (1.0 - part));
                pages += held * part;
            }
            // What is left of this step's time goes into the next packets.
            let mut share = share;
            loop {
                let worked = share.min(channel.packing);
                channel.packing -= worked;
                share -= worked;
                if channel.packing > 0.0 {
                    break;
                }
                let room = (world.buffer - channel.held.0).max(0.0);
                let sent = channel.unsent.min(room);
                channel.unsent -= sent;
                channel.held.0 += sent;
                channel.held.1 += sent / channel.wire * PACKET;
                if channel.unsent > 1.0 {
                    break;
                }
                if let Some(plan) = &mut plan {
                    let took = Duration::from_secs_f64(now - share - channel.began);
                    let (rung, wire) = (channel.rung, channel.wire as u64);
                    let gone = Gone { rung, pages: PACKET as u64, wire, took };
                    plan.gone(gone, Duration::from_secs_f64(now));
                }
                let held = channel.held;
                *channel = Channel { held, ..start(rung(&plan), now - share) };
            }
        }
    }
    pages / seconds
}

/// What the plan reaches, as a part of what the better of none and level 1 does all of the time;
/// and where it ended.
fn compared(world: &World, seconds: f64) -> (f64, usize) {
    let mut plan = Effort::new(4, 0);
    (0..world.channels).for_each(|_| plan.join());
    let reached = run(world, seconds, Some(&mut plan), 0);
    let fixed = [0, 2].map(|rung| run(world, seconds, None, rung));
    let best = fixed.into_iter().fold(0.0, f64::max);
    (reached / best, plan.rung)
}

#[test]
fn noise_is_not_compressed_on_a_fast_link() {
    for channels in [1, 2, 4, 8] {
        let world =
            World { channels, link: |_| 8000.0 * MB, content: |_| NOISE, ..World::default() };
        let (part, rung) = compared(&world, 5.0);
        assert!(part > 0.95 && rung == 0, "{channels} channels: {part}, rung {rung}");
    }
}

#[test]
fn a_slow_link_gets_all_the_effort_that_there_is_time_for() {
    for link in [(|_| 12.0 * MB) as fn(f64) -> f64, |_| 60.0 * MB] {
        for content in [(|_| GUEST) as fn(u64) -> Content, |_| TEXT] {
            for channels in [1, 2, 8] {
                let world = World { channels, link, content, ..World::default() };
                // What the sockets of many channels take in at the beginning, not compressed, is
                // the more the more there are.
                let (part, rung) = compared(&world, 40.0 * channels as f64);
                assert!(part > 0.92 && rung == 3, "{channels} channels: {part}, rung {rung}");
            }
        }
    }
}

#[test]
fn between_the_two_it_finds_the_best_rung() {
    for link in [
        (|_| 200.0 * MB) as fn(f64) -> f64,
        |_| 400.0 * MB,
        |_| 600.0 * MB,
        |_| 800.0 * MB,
        |_| 1200.0 * MB,
        |_| 2500.0 * MB,
        |_| 5000.0 * MB,
    ] {
        for content in [(|_| GUEST) as fn(u64) -> Content, |_| TEXT, |_| NOISE] {
            for channels in [1, 2, 4] {
                let world = World { channels, link, content, ..World::default() };
                let (part, rung) = compared(&world, 10.0);
                assert!(part > 0.92, "{channels} channels, {}: {part}, rung {rung}", link(0.0));
            }
        }
    }
}

#[test]
fn another_side_that_is_slow_is_kept_busy() {
    for other_side in [50.0, 500.0, 1500.0] {
        let world =
            World { other_side: other_side * MB, link: |_| 5000.0 * MB, ..World::default() };
        let (part, rung) = compared(&world, 10.0);
        assert!(part > 0.95, "{other_side}: {part}, rung {rung}");
    }
}

#[test]
fn mixed_content_is_little_worse_than_with_one_rung() {
    // By turns, packet by packet and in stretches. Where a stretch is about as long as a trial, what
    // is judged is as much the content as the rung: that may cost a little more.
    for (content, least) in [
        ((|number| if number % 2 == 0 { GUEST } else { NOISE }) as fn(u64) -> Content, 0.9),
        (|number| if number % 400 < 200 { TEXT } else { NOISE }, 0.8),
        (|number| if number % 10_000 < 5000 { GUEST } else { NOISE }, 0.8),
    ] {
        for link in
            [(|_| 60.0 * MB) as fn(f64) -> f64, |_| 500.0 * MB, |_| 1200.0 * MB, |_| 4000.0 * MB]
        {
            let world = World { content, link, ..World::default() };
            let (part, rung) = compared(&world, 20.0);
            assert!(part > least, "link {}: {part}, rung {rung}", link(0.0));
        }
    }
}

#[test]
fn a_link_that_changes_is_followed() {
    let slower =
        World { link: |now| if now < 5.0 { 5000.0 * MB } else { 100.0 * MB }, ..World::default() };
    let faster =
        World { link: |now| if now < 5.0 { 100.0 * MB } else { 5000.0 * MB }, ..World::default() };
    for (world, wanted) in [(slower, 2..4), (faster, 0..1)] {
        let mut plan = Effort::new(4, 0);
        (0..2).for_each(|_| plan.join());
        run(&world, 12.0, Some(&mut plan), 0);
        assert!(wanted.contains(&plan.rung), "{} instead of {wanted:?}", plan.rung);
    }
}

#[test]
fn trials_go_on_but_cost_little() {
    let world = World { link: |_| 5000.0 * MB, ..World::default() };
    let mut plan = Effort::new(4, 0);
    (0..2).for_each(|_| plan.join());
    run(&world, 5.0, Some(&mut plan), 0);
    let (rung, rests) = (plan.rung, plan.rests);
    // Still the same a minute later, but looked at again.
    let best = run(&world, 60.0, None, rung);
    let reached = run(&world, 60.0, Some(&mut plan), 0);
    assert_eq!(plan.rung, rung);
    let latest = |rests: [Rest; 2]| rests[0].until.max(rests[1].until);
    let (first, last) = (latest(rests), latest(plan.rests));
    assert!(last > first + Duration::from_secs(40), "{last:?} after {first:?}");
    assert!(reached > 0.96 * best, "{}", reached / best);
}
