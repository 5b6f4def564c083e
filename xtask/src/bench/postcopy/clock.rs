//! What the guest recorded: reading it, and telling faults from the rest.
//!
//! The record is [`MAGIC`] (once the working set is filled), how many touches were slow, the time
//! stamp counter after the last touch, and a ring of the slow ones: for each, how long it took in
//! units of 64 ticks, and a stamp of when the host page was touched before, in units of 1024 ticks.
//!
//! By that stamp a fault is told from the rest: in postcopy a host page can be missing only when it is
//! touched for the first time since the guest stopped at its source. A vCPU thread that lost its
//! processor for a while, to a timer or to another process, is slow as well, but mostly with a
//! page that it has had before. Some first touches of pages that are there are slow too (up to 100
//! of 20 to 100 us in a run, most of all with huge pages), and there the number of requests that
//! the source saw decides.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::figures::Faults;

/// The first word, as soon as there is something to read.
pub(super) const MAGIC: u32 = 0x6261_6c65;
/// Where the number of slow touches is.
pub(super) const COUNT_AT: u8 = 4;
/// Where the counter's last value is.
pub(super) const NOW_AT: u8 = 8;
/// Where the ring begins, and how many touches it holds: a power of two, and more than the guest has
/// pages that can be faults.
pub(super) const LOG_AT: u8 = 16;
pub(super) const ENTRIES: u32 = 1 << 19;
/// From ticks to units, and to stamps.
pub(super) const UNIT_SHIFT: u8 = 6;
pub(super) const STAMP_SHIFT: u8 = 10;
/// What is slow enough for the ring: 6 us at 2.6 GHz.
pub(super) const SLOW_UNITS: u32 = 256;
/// All of it.
pub(super) const RECORD_BYTES: u32 = LOG_AT as u32 + ENTRIES * ENTRY_BYTES;
const ENTRY_BYTES: u32 = 8;

/// A first touch that takes longer was a fault. Without a migration one touch in 15,000 takes
/// longer, for other reasons; no page comes over a network in less.
const FAULT_US: f64 = 16.0;

/// How long a second is on the guest's clock.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rate {
    ticks_per_us: f64,
}

/// A touch that took long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Slow {
    units: u32,
    /// When the host page was touched before.
    before: u32,
}

/// The record at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    count: u32,
    now: u64,
    ring: Vec<Slow>,
}

impl Record {
    /// From the bytes of guest memory; `None` while the guest still fills its memory.
    pub(super) fn parse(bytes: &[u8]) -> Result<Option<Self>> {
        ensure!(
            bytes.len() == usize::try_from(RECORD_BYTES)?,
            "{} bytes of the guest's record, not {RECORD_BYTES}",
            bytes.len()
        );
        let (words, _) = bytes.as_chunks();
        let mut words = words.iter().copied().map(u32::from_le_bytes);
        if words.next() != Some(MAGIC) {
            return Ok(None);
        }
        let mut word = || words.next();
        let (Some(count), Some(low), Some(high)) = (word(), word(), word()) else {
            return Ok(None);
        };
        let mut ring = Vec::new();
        while let (Some(units), Some(before)) = (word(), word()) {
            ring.push(Slow { units, before });
        }
        Ok(Some(Self { count, now: u64::from(high) << 32 | u64::from(low), ring }))
    }

    /// The clock's rate, if an earlier record was read so long before.
    pub(super) fn rate(&self, earlier: &Self, apart: Duration) -> Result<Rate> {
        let ticks_per_us = float(self.now.wrapping_sub(earlier.now)) / 1e6 / apart.as_secs_f64();
        ensure!(ticks_per_us > 1.0, "the guest's clock stands still: did it start?");
        Ok(Rate { ticks_per_us })
    }

    /// The faults of a guest since an earlier record of it: the last at its source. The source
    /// may know how many pages it was asked for: these were the slowest, and what else was slow
    /// did not wait for the network.
    pub(super) fn faults(&self, source: &Self, asked: Option<usize>, rate: Rate) -> Result<Faults> {
        let slow = self.since(source)?;
        let left = source.stamp();
        let first = slow.iter().filter(|slow| is_earlier(slow.before, left));
        let mut times: Vec<f64> =
            first.map(|slow| rate.us(*slow)).filter(|time| *time >= FAULT_US).collect();
        times.sort_by(f64::total_cmp);
        times.drain(..times.len().saturating_sub(asked.unwrap_or(usize::MAX)));
        let rank = |percent: usize| times[(times.len() * percent).div_ceil(100).max(1) - 1];
        let max_us = *times.last().context("the guest saw no fault")?;
        let count = u64::try_from(times.len())?;
        Ok(Faults {
            count,
            mean_us: times.iter().sum::<f64>() / float(count),
            p50_us: rank(50),
            p90_us: rank(90),
            p99_us: rank(99),
            max_us,
        })
    }

    /// How many touches since were as slow as a fault, though none was.
    pub(super) fn stray(&self, earlier: &Self, rate: Rate) -> Result<usize> {
        let slow = self.since(earlier)?;
        Ok(slow.iter().filter(|slow| rate.us(**slow) >= FAULT_US).count())
    }

    /// The slow touches since an earlier record.
    fn since(&self, earlier: &Self) -> Result<Vec<Slow>> {
        let more = self.count.wrapping_sub(earlier.count);
        ensure!(more <= ENTRIES, "{more} slow touches, more than the guest has room for");
        let entries = (0..more).map(|nth| earlier.count.wrapping_add(nth) % ENTRIES);
        entries.map(|entry| Ok(self.ring[usize::try_from(entry)?])).collect()
    }

    /// The moment of the record as a stamp.
    #[expect(clippy::cast_possible_truncation, reason = "a stamp is the low half, and wraps")]
    fn stamp(&self) -> u32 {
        (self.now >> STAMP_SHIFT) as u32
    }
}

impl Rate {
    fn us(self, slow: Slow) -> f64 {
        f64::from(slow.units) * f64::from(1_u32 << UNIT_SHIFT) / self.ticks_per_us
    }
}

/// Stamps wrap, in half an hour: what is less than half of that before is earlier.
fn is_earlier(stamp: u32, than: u32) -> bool {
    stamp.wrapping_sub(than) > u32::MAX / 2
}

#[expect(clippy::cast_precision_loss, reason = "times and counts here are far below 2^53")]
fn float(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 64 ticks to the microsecond: a unit is one.
    const RATE: Rate = Rate { ticks_per_us: 64.0 };

    /// A record at this stamp with these slow touches, kept as the guest keeps it.
    fn record(stamp: u64, slow: &[(u32, u32)]) -> Vec<u8> {
        let mut words = vec![MAGIC, u32::try_from(slow.len()).unwrap()];
        words.extend([0_u32, 0]);
        words.resize(usize::try_from(RECORD_BYTES / 4).unwrap(), 0);
        for (nth, (units, before)) in slow.iter().enumerate() {
            let at = 4 + 2 * (nth % (1 << 19));
            words[at] = *units;
            words[at + 1] = *before;
        }
        let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        bytes[8..16].copy_from_slice(&(stamp << STAMP_SHIFT).to_le_bytes());
        bytes
    }

    fn parsed(stamp: u64, slow: &[(u32, u32)]) -> Record {
        Record::parse(&record(stamp, slow)).unwrap().unwrap()
    }

    #[test]
    fn nothing_is_read_before_the_guest_is_ready() {
        let mut bytes = record(1, &[]);
        bytes[..4].fill(0);
        assert_eq!(Record::parse(&bytes).unwrap(), None);
        assert!(Record::parse(&bytes[8..]).is_err());
    }

    #[test]
    fn the_rate_is_ticks_over_time() {
        let (earlier, later) = (parsed(1000, &[]), parsed(6000, &[]));
        let rate = later.rate(&earlier, Duration::from_millis(2)).unwrap();
        assert_eq!(rate, Rate { ticks_per_us: 2560.0 });
        assert!(later.rate(&later, Duration::from_secs(1)).is_err());
    }

    #[test]
    fn a_fault_is_slow_and_the_first_touch_since() {
        let left = 500;
        let mut slow = vec![(7000, 499), (90, 100)];
        let source = parsed(left, &slow);
        slow.extend([(100, 499); 97]);
        slow.extend([(2000, 1), (3000, 2), (90_000, 3)]);
        // Touched before at the destination; not slow enough.
        slow.extend([(50_000, 501), (50_000, 9000), (9, 4)]);
        let faults = parsed(9999, &slow).faults(&source, None, RATE).unwrap();
        assert_eq!(faults.count, 100);
        assert_eq!(faults.mean_us, 1047.0);
        assert_eq!((faults.p50_us, faults.p90_us), (100.0, 100.0));
        assert_eq!((faults.p99_us, faults.max_us), (3000.0, 90_000.0));
        assert!(source.faults(&source, None, RATE).is_err());
        let asked = parsed(9999, &slow).faults(&source, Some(2), RATE).unwrap();
        assert_eq!((asked.count, asked.p50_us, asked.mean_us), (2, 3000.0, 46_500.0));
        assert_eq!(parsed(9999, &slow).faults(&source, Some(101), RATE).unwrap(), faults);
        assert!(parsed(9999, &slow).faults(&source, Some(0), RATE).is_err());
    }

    #[test]
    fn stamps_wrap() {
        assert!(is_earlier(u32::MAX, 3));
        assert!(!is_earlier(3, u32::MAX));
        assert!(!is_earlier(3, 3));
    }

    #[test]
    fn a_ring_goes_round_once() {
        let entries = usize::try_from(ENTRIES).unwrap();
        let slow = vec![(100, 1); entries + 5];
        let source = parsed(10, &slow[..5]);
        let faults = parsed(20, &slow).faults(&source, None, RATE).unwrap();
        assert_eq!(faults.count, u64::from(ENTRIES));
        let error = parsed(20, &slow).faults(&parsed(10, &slow[..4]), None, RATE).unwrap_err();
        assert!(error.to_string().contains("room"), "{error}");
    }

    #[test]
    fn strays_are_slow_whatever_they_touched() {
        let earlier = parsed(5, &[(90, 1)]);
        assert_eq!(
            parsed(9, &[(90, 1), (17, 7), (15, 1), (40, 2)]).stray(&earlier, RATE).unwrap(),
            2
        );
    }
}
