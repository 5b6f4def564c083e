//! The decisions against a link that is simulated: a rate, a round trip, and a queue.

use super::*;

const GIGABIT: u64 = 125_000_000;
const SHORT: Duration = Duration::from_micros(50);
const NOW: Option<Duration> = Some(Duration::ZERO);

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// A link with a queue of 20 ms, and a sender that always has something to send.
struct Link {
    plan: Window,
    rate: u64,
    base: Duration,
    /// Thousandths of the rate set at which the kernel sends.
    promptness: u64,
    now: Duration,
    ask_at: Duration,
    outflow: Option<Outflow>,
    queue: u64,
    /// What left the queue, and when it is acknowledged.
    flying: VecDeque<(Duration, u64)>,
    in_flight: u64,
    acked: u64,
    credit: u64,
    min_rtt: Duration,
}

/// What was seen over a time.
#[derive(Debug)]
struct Seen {
    /// Of what the link could have carried.
    used: f64,
    mean_queue: Duration,
    worst_queue: Duration,
}

impl Link {
    fn new(rate: u64, base: Duration) -> Link {
        Link {
            plan: Window::new(),
            rate,
            base,
            promptness: 1000,
            now: Duration::ZERO,
            ask_at: Duration::ZERO,
            outflow: None,
            queue: 0,
            flying: VecDeque::new(),
            in_flight: 0,
            acked: 0,
            credit: 0,
            min_rtt: Duration::MAX,
        }
    }

    fn queued(&self) -> Duration {
        time(self.queue, self.rate)
    }

    fn step(&mut self, step: Duration, waited: Option<Duration>) {
        let rtt = self.base + self.queued();
        self.min_rtt = self.min_rtt.min(rtt);
        if self.now >= self.ask_at {
            let facts = Facts { acked: self.acked, outstanding: 1, rtt, min_rtt: self.min_rtt };
            let outflow = self.plan.next(self.now, &facts, waited);
            self.ask_at = self.now + outflow.again;
            self.outflow = Some(outflow);
        }
        let flow = self.outflow.unwrap().flow;
        let capacity = bytes(self.rate, self.base + millis(20));
        let window = flow.window.map_or(capacity, |window| window.min(capacity));
        let mut sent = window.saturating_sub(self.in_flight);
        if let Some(rate) = flow.rate {
            self.credit += share(bytes(rate, step), self.promptness);
            sent = sent.min(self.credit);
            self.credit = (self.credit - sent).min(rate / 1000);
        }
        self.in_flight += sent;
        self.queue += sent;
        let carried = self.queue.min(bytes(self.rate, step));
        self.queue -= carried;
        self.flying.push_back((self.now + self.base, carried));
        self.now += step;
        while self.flying.front().is_some_and(|&(at, _)| at <= self.now) {
            let (_, bytes) = self.flying.pop_front().unwrap();
            self.in_flight -= bytes;
            self.acked += bytes;
        }
    }

    fn run(&mut self, time: Duration, waited: Option<Duration>) -> Seen {
        let step = Duration::from_micros(20).max(self.base / 50);
        let (start, acked) = (self.now, self.acked);
        let (mut steps, mut total, mut worst) = (0, Duration::ZERO, Duration::ZERO);
        while self.now < start + time {
            self.step(step, waited);
            steps += 1;
            total += self.queued();
            worst = worst.max(self.queued());
        }
        let could = bytes(self.rate, self.now - start);
        let used = (self.acked - acked) as f64 / could as f64;
        Seen { used, mean_queue: total / steps, worst_queue: worst }
    }
}

#[test]
fn from_cold_the_rate_is_found_and_the_queue_stays_short() {
    for rate in [GIGABIT, 5 * GIGABIT / 2, 10 * GIGABIT] {
        for base in [SHORT, millis(1), millis(50)] {
            let mut link = Link::new(rate, base);
            link.run(millis(60) + 40 * base, NOW);
            let found = link.plan.link_rate() as f64 / rate as f64;
            assert!((0.97..1.05).contains(&found), "{rate} {base:?}: {found}");
            let seen = link.run(millis(2000) + 100 * base, NOW);
            assert!(seen.used > 0.955, "{rate} {base:?}: {seen:?}");
            assert!(seen.worst_queue <= base / 3 + FAST_QUEUE, "{rate} {base:?}: {seen:?}");
            let mean = match rate > PACED_LINK_MOST && base < FAST_LINK_RTT {
                true => base / 4 + FAST_QUEUE,
                false => base / 10 + QUEUE / 4,
            };
            assert!(seen.mean_queue <= mean, "{rate} {base:?}: {seen:?}");
        }
    }
}

#[test]
fn nothing_is_given_up_while_nobody_waits() {
    for (rate, base) in [(GIGABIT, SHORT), (10 * GIGABIT, SHORT), (GIGABIT, millis(50))] {
        for waited in [None, Some(PATIENCE)] {
            let mut link = Link::new(rate, base);
            link.run(millis(60) + 40 * base, waited);
            let seen = link.run(millis(1000), waited);
            assert!(seen.used > 0.995, "{rate} {base:?}: {seen:?}");
            assert!(seen.worst_queue <= base / 4 + IDLE_QUEUE, "{rate} {base:?}: {seen:?}");
        }
    }
}

#[test]
fn the_first_who_waits_finds_the_queue_gone_soon() {
    let mut link = Link::new(GIGABIT, SHORT);
    link.run(millis(500), None);
    link.run(millis(8), NOW);
    let seen = link.run(millis(100), NOW);
    assert!(seen.mean_queue < QUEUE / 2, "{seen:?}");
}

#[test]
fn a_queue_that_precopy_left_is_drained() {
    let mut link = Link::new(GIGABIT, SHORT);
    link.min_rtt = SHORT;
    link.queue = bytes(link.rate, millis(20));
    link.in_flight = link.queue;
    link.run(millis(60), NOW);
    let seen = link.run(millis(1000), NOW);
    assert!(seen.used > 0.955 && seen.worst_queue <= PACED_QUEUE, "{seen:?}");
}

#[test]
fn a_link_that_halves_or_doubles_is_found_again() {
    let mut link = Link::new(2 * GIGABIT, SHORT);
    link.run(millis(500), NOW);
    for rate in [GIGABIT, 2 * GIGABIT, 4 * GIGABIT] {
        link.rate = rate;
        let change = link.run(millis(1000), NOW);
        assert!(change.worst_queue <= 3 * PACED_QUEUE, "{rate}: {change:?}");
        let seen = link.run(millis(1000), NOW);
        assert!(seen.used > 0.955, "{rate}: {seen:?}");
        assert!(seen.mean_queue <= QUEUE / 4, "{rate}: {seen:?}");
    }
}

#[test]
fn a_kernel_that_sends_late_is_given_a_higher_rate() {
    let mut link = Link::new(4 * GIGABIT, SHORT);
    link.promptness = 870;
    link.run(millis(1000), NOW);
    let seen = link.run(millis(2000), NOW);
    assert!(seen.used > 0.955 && seen.worst_queue <= PACED_QUEUE, "{seen:?}");
}

#[test]
fn where_others_fill_the_queue_nothing_is_held_back() {
    let mut plan = Window::new();
    let (mut now, mut acked, mut released) = (Duration::ZERO, 0, Duration::ZERO);
    let (rtt, min_rtt) = (millis(20), SHORT);
    while now < millis(10_000) {
        let outflow = plan.next(now, &Facts { acked, outstanding: 1, rtt, min_rtt }, NOW);
        // What is under way at a time takes a round trip, however little it is.
        let window = outflow.flow.window.unwrap_or(1 << 20);
        acked += bytes(window * 50, outflow.again);
        now += outflow.again;
        if outflow.flow == (Flow { window: None, rate: None }) {
            released += outflow.again;
        }
    }
    assert!(released > millis(5_000), "{released:?}");
}

#[test]
fn facts_that_make_no_sense_do_no_harm() {
    let mut plan = Window::new();
    let times = [Duration::ZERO, Duration::from_micros(1), millis(50), Duration::MAX];
    let mut now = Duration::ZERO;
    for round in 0..4_000 {
        let facts = Facts {
            acked: [0, u64::MAX, 1 << 40, 7][round % 4],
            outstanding: [0, u64::MAX][round % 2],
            rtt: times[round % 4],
            min_rtt: times[round / 4 % 4],
        };
        let outflow = plan.next(now, &facts, times.get(round / 7 % 5).copied());
        assert!((PIECE_LEAST..=IDLE_PIECE_MOST).contains(&outflow.piece), "{outflow:?}");
        let window = outflow.flow.window.unwrap_or(WINDOW_MOST);
        assert!((WINDOW_LEAST..=WINDOW_MOST).contains(&window), "{outflow:?}");
        assert!(outflow.flow.rate.is_none_or(|rate| rate >= RATE_LEAST), "{outflow:?}");
        assert!(outflow.again > Duration::ZERO && outflow.again <= PROBE * 4, "{outflow:?}");
        // A clock that goes back, too.
        now = if round % 11 == 0 { now / 2 } else { now + outflow.again };
    }
}
