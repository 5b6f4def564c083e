//! XBZRLE: a page as what changed since it was sent last.
//!
//! A delta is a row of pairs: a count of unchanged bytes, then a count of changed bytes and the
//! bytes themselves. Counts are LEB128 of at most two bytes. Unchanged bytes at the end are
//! left out. Both sides hold the same old page.

use alloc::vec::Vec;

/// Largest run that a count of two bytes can say. A longer page is no use with XBZRLE.
const RUN_MAX: usize = 0x3fff;

/// What [`encode`] made of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delta {
    /// The page is as it was: nothing has to be sent.
    Unchanged,
    /// So many bytes were appended.
    Encoded(usize),
    /// The delta would be no smaller than the page: send the page.
    TooLong,
}

/// A delta is not one of a page of this size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// It ends inside a pair.
    #[error("the delta ends at byte {at}, expected {expected}")]
    Truncated {
        /// Its length.
        at: usize,
        /// What is missing.
        expected: &'static str,
    },
    /// A count is longer than two bytes.
    #[error("byte {at} of the delta: expected a count below 16384")]
    Count {
        /// Where it stands.
        at: usize,
    },
    /// Two runs follow each other that should be one.
    #[error("byte {at} of the delta: expected a run that is not empty")]
    EmptyRun {
        /// Where its count stands.
        at: usize,
    },
    /// It goes past the end of the page.
    #[error("byte {at} of the delta: expected a run inside the page of {page} bytes, found {end}")]
    PastPage {
        /// Where the run's count stands.
        at: usize,
        /// Where the run would end.
        end: usize,
        /// The size of the page.
        page: usize,
    },
}

/// Appends what changed from `old` to `new`.
///
/// # Panics
/// When the pages differ in size, or are larger than 16 KiB less one byte can count.
pub fn encode(old: &[u8], new: &[u8], out: &mut Vec<u8>) -> Delta {
    assert!(old.len() == new.len() && new.len() <= RUN_MAX, "two pages of one size, below 16 KiB");
    let start = out.len();
    let mut at = 0;
    loop {
        let same = run(old, new, at, true);
        at += same;
        if at == new.len() {
            let len = out.len() - start;
            return if len == 0 { Delta::Unchanged } else { Delta::Encoded(len) };
        }
        let changed = run(old, new, at, false);
        push_count(same, out);
        push_count(changed, out);
        out.extend_from_slice(new.get(at..at + changed).unwrap_or_default());
        at += changed;
        if out.len() - start >= new.len() {
            out.truncate(start);
            return Delta::TooLong;
        }
    }
}

/// Length of the run of equal, or of differing, bytes from `at` on.
fn run(old: &[u8], new: &[u8], at: usize, equal: bool) -> usize {
    const WORD: usize = size_of::<u64>();
    let (old, new) = (old.get(at..).unwrap_or_default(), new.get(at..).unwrap_or_default());
    let mut len = 0;
    let words = old.chunks_exact(WORD).zip(new.chunks_exact(WORD));
    for (old, new) in words {
        let whole =
            if equal { old == new } else { old.iter().zip(new).all(|(old, new)| old != new) };
        if !whole {
            break;
        }
        len += WORD;
    }
    let rest = old.iter().zip(new).skip(len);
    len + rest.take_while(|(old, new)| (old == new) == equal).count()
}

#[expect(clippy::cast_possible_truncation, reason = "runs are at most 14 bits: asserted")]
fn push_count(count: usize, out: &mut Vec<u8>) {
    if count < 0x80 {
        out.push(count as u8);
    } else {
        out.push((count & 0x7f) as u8 | 0x80);
        out.push((count >> 7) as u8);
    }
}

/// Applies a delta to the page as it was.
///
/// # Errors
/// When it is no delta, or one of a larger page. The page may then be half changed.
pub fn decode(delta: &[u8], page: &mut [u8]) -> Result<(), DeltaError> {
    let mut rest = delta;
    let (mut at, mut first) = (0, true);
    while !rest.is_empty() {
        let place = delta.len() - rest.len();
        if rest.len() < 2 {
            let expected = "a count of unchanged bytes and a count of changed bytes";
            return Err(DeltaError::Truncated { at: delta.len(), expected });
        }
        let same = take_count(&mut rest, delta.len())?;
        if same == 0 && !first {
            return Err(DeltaError::EmptyRun { at: place });
        }
        first = false;
        at += same;
        let place = delta.len() - rest.len();
        if rest.len() < 2 {
            let expected = "a count of changed bytes, and the bytes";
            return Err(DeltaError::Truncated { at: delta.len(), expected });
        }
        let changed = take_count(&mut rest, delta.len())?;
        if changed == 0 {
            return Err(DeltaError::EmptyRun { at: place });
        }
        let Some((bytes, after)) = rest.split_at_checked(changed) else {
            let expected = "the changed bytes";
            return Err(DeltaError::Truncated { at: delta.len(), expected });
        };
        let (end, size) = (at + changed, page.len());
        let Some(to) = page.get_mut(at..end) else {
            return Err(DeltaError::PastPage { at: place, end, page: size });
        };
        to.copy_from_slice(bytes);
        at = end;
        rest = after;
    }
    Ok(())
}

fn take_count(rest: &mut &[u8], len: usize) -> Result<usize, DeltaError> {
    let at = len - rest.len();
    let (count, after) = match **rest {
        [low @ 0..0x80, ref after @ ..] => (usize::from(low), after),
        [low, high @ 0..0x80, ref after @ ..] => {
            (usize::from(low & 0x7f) | usize::from(high) << 7, after)
        }
        [_, _, ..] => return Err(DeltaError::Count { at }),
        [_] | [] => return Err(DeltaError::Truncated { at: len, expected: "a count" }),
    };
    *rest = after;
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta(old: &[u8], new: &[u8]) -> (Delta, Vec<u8>) {
        let mut out = Vec::new();
        (encode(old, new, &mut out), out)
    }

    #[test]
    fn encodes_pairs_of_runs() {
        let old = [0; 300];
        assert_eq!(delta(&old, &old), (Delta::Unchanged, alloc::vec![]));
        let mut new = old;
        new[0] = 7;
        assert_eq!(delta(&old, &new).1, [0, 1, 7]);
        new[0] = 0;
        new[200] = 8;
        new[201] = 9;
        assert_eq!(delta(&old, &new).1, [200 & 0x7f | 0x80, 1, 2, 8, 9]);
    }

    #[test]
    fn a_delta_as_long_as_the_page_is_none() {
        let old = [0; 64];
        let new: Vec<u8> = (0..64).map(|at| at % 2).collect();
        assert_eq!(delta(&old, &new), (Delta::TooLong, alloc::vec![]));
        assert_eq!(delta(&old, &[1; 64]).0, Delta::TooLong);
    }

    #[test]
    fn refuses_what_is_no_delta() {
        let page = || [0; 32];
        let truncated =
            |delta: &[u8]| matches!(decode(delta, &mut page()), Err(DeltaError::Truncated { .. }));
        assert!(decode(&[], &mut page()).is_ok());
        assert!(truncated(&[0]));
        assert!(truncated(&[0, 1]));
        assert!(truncated(&[0, 2, 5]));
        assert!(truncated(&[0x80, 0x01, 0x01]));
        assert_eq!(decode(&[0x80, 0x80, 1, 1], &mut page()), Err(DeltaError::Count { at: 0 }));
        assert_eq!(decode(&[1, 0, 5], &mut page()), Err(DeltaError::EmptyRun { at: 1 }));
        assert_eq!(decode(&[0, 1, 5, 0, 1, 6], &mut page()), Err(DeltaError::EmptyRun { at: 3 }));
        let past = DeltaError::PastPage { at: 1, end: 33, page: 32 };
        assert_eq!(decode(&[32, 1, 5], &mut page()), Err(past));
        let mut page = page();
        assert_eq!(decode(&[30, 2, 5, 6], &mut page), Ok(()));
        assert_eq!(page[29..], [0, 5, 6]);
    }
}
