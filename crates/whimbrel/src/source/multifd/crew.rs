//! All senders of one map, as `source/main` sees them: turns are given, waited for, halted.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use whimbrel_ram::dirty::{DirtyBits, DirtyLog};
use whimbrel_ram::{BlockIndex, Claim, GuestRam, PageMap, Sweep, TARGET_PAGE, TargetPage};

use super::Dialect;
use super::sender::Sender;
use crate::error::Error;
use crate::hello::Features;
use crate::packing::{Packing, Peer};
use crate::plan::Pace;
use crate::report::{Report, add};
use crate::settings::ZeroPageDetection;
use crate::source::out::Out;
use crate::source::wanted::Wanted;
use crate::worker::{Bell, Cancel, Woken};

/// What is claimed at once stays inside one stretch of so many pages (2 MiB): the destination
/// takes memory from its host in huge pages, and no two channels should want the same one.
const STRETCH: u64 = 512;

/// How long senders step back at once.
const STEP_BACK: Duration = Duration::from_millis(5);

/// What the senders of a crew are given.
#[derive(Debug)]
pub(crate) struct Terms<'a> {
    pub(crate) ram: &'a GuestRam,
    pub(crate) report: &'a Report,
    /// The log of a guest that runs.
    pub(crate) log: Option<Log<'a>>,
    /// Pages that may hold something else than zeros, where that is known.
    pub(crate) content: Option<DirtyBits>,
    /// Where the pages come from that are not in memory: who knows which of them are zero.
    pub(crate) supply: Option<&'a dyn Supply>,
    /// In postcopy: they send beside the main channel, as far as nobody waits.
    pub(crate) beside: Option<Beside<'a>>,
}

/// Guest RAM that is not in memory by itself, but when it is asked for.
pub(crate) trait Supply: std::fmt::Debug + Sync {
    /// Has pages in memory, up to when they have been sent.
    fn have(&self, block: BlockIndex, pages: Range<u64>) -> Result<(), Error>;

    /// The content of these pages has gone out.
    fn sent(&self, block: BlockIndex, pages: Range<u64>);
}

/// What senders heed that send beside the main channel.
#[derive(Clone, Copy)]
pub(crate) struct Beside<'a> {
    /// Who waits.
    pub(in crate::source) wanted: &'a Wanted,
    /// Whether the background may be as fast as it can.
    pub(in crate::source) unpaced: &'a (dyn Fn() -> bool + Sync),
}

impl Beside<'_> {
    fn may_go(self) -> bool {
        self.wanted.is_quiet() && (self.unpaced)()
    }
}

impl std::fmt::Debug for Beside<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Beside").field("wanted", self.wanted).finish_non_exhaustive()
    }
}

/// A dirty log, for senders to watch a page again before they read it.
#[derive(Clone, Copy)]
pub(crate) struct Log<'a>(pub(crate) &'a dyn DirtyLog);

impl std::fmt::Debug for Log<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Log")
    }
}

/// The senders, and what they share.
#[derive(Debug)]
pub(crate) struct Crew<'a> {
    map: &'a PageMap,
    terms: Terms<'a>,
    dialect: Dialect,
    packing: Packing,
    stop: Cancel,
    members: usize,
    walk: Mutex<Walk>,
    /// What the log said to be untouched before the first turn may have been touched since.
    content_is_known: AtomicBool,
    halted: AtomicBool,
    orders: Mutex<Orders>,
    ordered: Condvar,
    /// Wakes `source/main`.
    bell: Bell,
    failure: Mutex<Option<Error>>,
    pace: Mutex<Option<Pace>>,
    bytes: AtomicU64,
    /// Pages of zeros to be told of on the main channel.
    zeros: Mutex<Vec<(BlockIndex, TargetPage)>>,
}

/// Where all senders together stand.
#[derive(Debug)]
struct Walk {
    sweep: Sweep,
    ended: bool,
}

#[derive(Debug, Default)]
struct Orders {
    turns: u64,
    busy: usize,
    over: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain values, whole after every statement: a panic elsewhere leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Crew<'a> {
    pub(super) fn new(
        map: &'a PageMap,
        terms: Terms<'a>,
        (dialect, packing): (Dialect, Packing),
        stop: Cancel,
        members: usize,
    ) -> Result<Crew<'a>, Error> {
        Ok(Crew {
            map,
            content_is_known: AtomicBool::new(terms.content.is_some()),
            terms,
            dialect,
            packing,
            stop,
            members,
            walk: Mutex::new(Walk { sweep: map.sweep(), ended: false }),
            halted: AtomicBool::new(false),
            orders: Mutex::default(),
            ordered: Condvar::new(),
            bell: Bell::new().map_err(Error::system("making an eventfd"))?,
            failure: Mutex::default(),
            pace: Mutex::default(),
            bytes: AtomicU64::new(0),
            zeros: Mutex::default(),
        })
    }

    // What `source/main` calls.

    pub(crate) fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// What the destination is known to take beyond QEMU's protocol.
    pub(crate) fn set_agreed(&self, agreed: Features) {
        if agreed.has(Features::ANY_METHOD) {
            self.packing.set_peer(Peer::Whimbrel);
        }
    }

    /// Has everything sent that is on the map from where the walk stands: a new one, if the last
    /// has come to its end.
    pub(crate) fn begin(&self) {
        let mut walk = lock(&self.walk);
        if std::mem::replace(&mut walk.ended, false) {
            walk.sweep = self.map.sweep();
        }
        drop(walk);
        self.halted.store(false, Ordering::SeqCst);
        let mut orders = lock(&self.orders);
        assert_eq!(orders.busy, 0, "one turn after the other");
        orders.turns += 1;
        orders.busy = self.members;
        self.ordered.notify_all();
    }

    /// Has the walk begin at the start again: what a halted turn gave back lies behind it.
    pub(crate) fn rewind(&self) {
        lock(&self.walk).ended = true;
    }

    /// Has every sender end its turn as soon as it can.
    pub(crate) fn halt(&self) {
        self.halted.store(true, Ordering::SeqCst);
    }

    /// Waits for the end of the turn, for `time` at most; says whether it has ended: every channel
    /// has delivered its pages and a SYNC behind them.
    pub(crate) fn wait(&self, time: Duration) -> Result<bool, Error> {
        let end = Instant::now() + time;
        loop {
            let busy = lock(&self.orders).busy;
            // Behind the count of those that are busy: a sender says why it fails before it is not.
            if let Some(error) = self.take_failure() {
                return Err(error);
            }
            if busy == 0 {
                // One that was ended in its turn is no failure of its own, and has not sent it all.
                return if self.stop.is_set() { Err(Error::Cancelled) } else { Ok(true) };
            }
            let left = end.saturating_duration_since(Instant::now());
            let woken = self.bell.wait(&self.stop, Some(left));
            match woken.map_err(Error::system("waiting for the senders"))? {
                Woken::Ready => {}
                Woken::TimedOut => return Ok(false),
                Woken::Cancelled => return Err(self.take_failure().unwrap_or(Error::Cancelled)),
            }
        }
    }

    /// Whether the walk has come to its end: every page that was on the map has been claimed.
    pub(crate) fn has_walked(&self) -> bool {
        lock(&self.walk).ended
    }

    /// Bytes that have been sent on all channels.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Tells of pages of zeros on the main channel, where that is the way.
    pub(crate) fn push_zeros(&self, out: &mut Out) {
        let zeros = std::mem::take(&mut *lock(&self.zeros));
        zeros.into_iter().for_each(|(block, page)| out.push_zero(block, page));
    }

    /// A turn has ended: appends all that the main channel has to say of it.
    pub(crate) fn mark(&self, out: &mut Out) {
        self.push_zeros(out);
        self.dialect.encode_mark(out.words());
    }

    /// Every page has been sent once: what was never touched up to then may have been since.
    pub(crate) fn first_pass_is_over(&self) {
        self.content_is_known.store(false, Ordering::SeqCst);
    }

    /// Bytes a second at most; `None` is not to look at the time at all.
    pub(crate) fn set_rate(&self, rate: Option<u64>) {
        let now = self.now();
        let mut pace = lock(&self.pace);
        match (&mut *pace, rate) {
            (Some(pace), Some(rate)) => pace.set_rate(rate, now),
            (pace, rate) => *pace = rate.map(|rate| Pace::new(rate, now)),
        }
    }

    /// Why a sender has failed.
    pub(super) fn take_failure(&self) -> Option<Error> {
        lock(&self.failure).take()
    }

    /// Ends the threads when it is dropped, also by a panic.
    pub(super) fn over_when_dropped(&self) -> Over<'_, 'a> {
        Over(self)
    }

    // What a sender calls.

    pub(super) fn ram(&self) -> &'a GuestRam {
        self.terms.ram
    }

    pub(super) fn is_halted(&self) -> bool {
        self.halted.load(Ordering::Relaxed)
    }

    /// The body of `source/send-N`.
    pub(super) fn work(&self, sender: &mut Sender, packets: &AtomicU64) {
        let mut turn = 0;
        while let Some(next) = self.next_turn(turn) {
            turn = next;
            let mut busy = Busy { crew: self, result: None };
            let result = self.turn(sender, packets);
            self.went(sender.take_bytes());
            busy.result = Some(result);
        }
    }

    fn turn(&self, sender: &mut Sender, packets: &AtomicU64) -> Result<(), Error> {
        sender.turn(self, packets)?;
        if sender.settle()? {
            add(&self.terms.report.counters.missed_zero_copy, 1);
        }
        sender.send_sync(packets)
    }

    fn next_turn(&self, last: u64) -> Option<u64> {
        let mut orders = lock(&self.orders);
        loop {
            if orders.over {
                return None;
            }
            if orders.turns != last {
                return Some(orders.turns);
            }
            orders = self.ordered.wait(orders).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Who waits, where senders are beside the main channel.
    pub(super) fn wanted(&self) -> Option<&'a Wanted> {
        self.terms.beside.map(|beside| beside.wanted)
    }

    /// Waits until the link may be taken; false when there is nothing left to be sent.
    pub(super) fn wait_until_quiet(&self) -> Result<bool, Error> {
        let Some(beside) = self.terms.beside else { return Ok(true) };
        while !beside.may_go() {
            if self.map.pending() == 0 {
                return Ok(false);
            }
            match self.stop.sleep(STEP_BACK).map_err(Error::system("waiting"))? {
                Woken::Cancelled => return Err(Error::Cancelled),
                Woken::Ready | Woken::TimedOut => {}
            }
        }
        Ok(true)
    }

    /// Claims what is next in the walk: up to the end of a stretch, or `piece` bytes beside the main
    /// channel.
    pub(super) fn claim(&self, claims: &mut impl Extend<Claim<'a>>, piece: usize) {
        let mut walk = lock(&self.walk);
        if self.terms.beside.is_some() {
            // What is under way when somebody begins to wait is in the way.
            let pages = u32::try_from(piece / TARGET_PAGE.bytes()).unwrap_or(u32::MAX);
            walk.sweep.set_batch(pages.clamp(1, u64::BITS));
            let claim = self.map.claim_next(&mut walk.sweep);
            walk.ended = claim.is_none();
            claims.extend(claim);
            return;
        }
        let mut stretch = None;
        while !walk.ended {
            let Some(claim) = self.map.claim_next(&mut walk.sweep) else {
                walk.ended = true;
                return;
            };
            let (block, span) = (claim.block(), claim.span());
            claims.extend([claim]);
            let here = (block, span.start / STRETCH);
            let is_last = span.end.is_multiple_of(STRETCH);
            if is_last || stretch.replace(here).is_some_and(|before| before != here) {
                return;
            }
        }
    }

    /// Has the log watch the claim's pages again; must come before their content is read.
    pub(super) fn rearm(&self, claim: &Claim<'_>) -> Result<(), Error> {
        let span = claim.span();
        if let Some(supply) = self.terms.supply {
            supply.have(claim.block(), span.clone())?;
        }
        let Some(Log(log)) = self.terms.log else { return Ok(()) };
        log.rearm(claim.block(), TargetPage(span.start), span.end - span.start)
            .map_err(Error::DirtyLog)
    }

    /// Whether a page is known to be zero without looking at it.
    pub(super) fn is_untouched(&self, block: BlockIndex, page: TargetPage) -> bool {
        self.content_is_known.load(Ordering::Relaxed)
            && self.terms.content.as_ref().is_some_and(|content| !content.contains(block, page))
    }

    /// Whether a page is to be looked at, for it may be zero.
    pub(super) fn may_be_zero(&self) -> bool {
        self.terms.supply.is_none()
    }

    /// The content of these pages has gone out.
    pub(super) fn needs_no_more(&self, block: BlockIndex, pages: &[TargetPage]) {
        if let Some(supply) = self.terms.supply {
            pages.iter().for_each(|page| supply.sent(block, page.0..page.0 + 1));
        }
    }

    /// Whether pages of zeros are told of on the main channel. Never behind a guest that has gone: it
    /// may wait for one of them, and only a whimbrel, which knows them in packets, is there then.
    pub(super) fn tells_zeros_apart(&self) -> bool {
        self.dialect.zeros == ZeroPageDetection::Legacy && self.terms.beside.is_none()
    }

    /// Pages of zeros that are to be told of on the main channel.
    pub(super) fn tell_zeros(&self, block: BlockIndex, pages: impl Iterator<Item = TargetPage>) {
        lock(&self.zeros).extend(pages.map(|page| (block, page)));
    }

    /// How many bytes a packet may have now.
    pub(super) fn packet_max(&self, most: usize) -> usize {
        lock(&self.pace).as_ref().map_or(most, |pace| pace.batch(most))
    }

    /// `bytes` have gone out; gives how long the pace has the sender wait.
    pub(super) fn sent(&self, bytes: u64, (normal, duplicate): (u64, u64)) -> Duration {
        self.went(bytes);
        add(&self.terms.report.counters.normal, normal);
        add(&self.terms.report.counters.duplicate, duplicate);
        let now = self.now();
        lock(&self.pace).as_mut().map_or(Duration::ZERO, |pace| pace.sent(bytes, now))
    }

    fn went(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        add(&self.terms.report.counters.multifd_bytes, bytes);
    }

    pub(super) fn now(&self) -> Duration {
        self.terms.report.started().elapsed()
    }
}

/// A sender in its turn.
struct Busy<'c, 'a> {
    crew: &'c Crew<'a>,
    /// How the turn ended; nothing when the thread panics.
    result: Option<Result<(), Error>>,
}

impl Drop for Busy<'_, '_> {
    fn drop(&mut self) {
        let failure = match self.result.take() {
            Some(Ok(())) => None,
            Some(Err(error)) => Some(error),
            None => Some(Error::Refused("a bug in whimbrel: a sender's thread panicked".into())),
        };
        if let Some(error) = failure {
            // One that was ended is not the reason.
            if !matches!(error, Error::Cancelled) {
                lock(&self.crew.failure).get_or_insert(error);
            }
            self.crew.stop.set();
        }
        lock(&self.crew.orders).busy -= 1;
        self.crew.bell.ring();
    }
}

/// See [`Crew::over_when_dropped`].
pub(super) struct Over<'c, 'a>(&'c Crew<'a>);

impl Drop for Over<'_, '_> {
    fn drop(&mut self) {
        let mut orders = lock(&self.0.orders);
        if orders.busy > 0 {
            self.0.stop.set();
        }
        orders.over = true;
        self.0.ordered.notify_all();
    }
}
