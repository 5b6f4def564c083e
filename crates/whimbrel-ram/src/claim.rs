//! Claims: the right to send pages, as values.

use std::ops::Range;

use crate::map::PageMap;
use crate::{BlockIndex, HostPage, TargetPage};

/// The right, and the duty, to send one version of the pages in it.
///
/// Where host pages are target pages it holds up to 64 neighbours, all taken off the map
/// already. Where they are larger it holds one host page: its target pages are taken off the map
/// as they are asked for, and nobody else can begin the host page meanwhile.
///
/// It cannot be copied: one owner. Its end is [`spend`](Claim::spend); dropped, whatever it took
/// goes back on the map.
#[derive(Debug)]
#[must_use = "dropped unsent, its pages go back on the page map"]
pub struct Claim<'m> {
    map: &'m PageMap,
    block: BlockIndex,
    /// Which word of the map `left` and `taken` are of.
    word: usize,
    /// Off the map, not given to the sender yet.
    left: u64,
    /// Given to the sender.
    taken: u64,
    /// The host page it owns, where that is larger than a target page.
    host: Option<HostPage>,
    /// The sender has asked for a page.
    begun: bool,
    /// The sender has asked until there was nothing more.
    finished: bool,
    /// The pages have been sent.
    spent: bool,
}

/// What became of asking for one page.
#[derive(Debug)]
#[must_use = "a claim in it is dropped, and its page goes back on the map"]
pub enum Asked<'m> {
    /// It is the asker's to send, now.
    Claimed(Claim<'m>),
    /// It is not on the map: it was sent, or (where host pages are target pages) it is in the
    /// batch that another sender is sending, see [`Sweep::set_batch`](crate::Sweep::set_batch).
    AlreadySent,
    /// Another sender has begun this host page and finishes it. It was told that somebody waits
    /// ([`Claim::is_urgent`]).
    UnderWay,
}

impl<'m> Claim<'m> {
    pub(crate) fn of_batch(
        map: &'m PageMap,
        block: BlockIndex,
        word: usize,
        left: u64,
    ) -> Claim<'m> {
        let (host, begun, finished, spent) = (None, false, false, false);
        Claim { map, block, word, left, taken: 0, host, begun, finished, spent }
    }

    /// The claim of the thread that has just become the page's owner; `None` when there is
    /// nothing to be sent of it.
    pub(crate) fn of_host_page(map: &'m PageMap, page: HostPage) -> Option<Claim<'m>> {
        let mut words = map.host_words(page);
        let (word, left) = words.find_map(|word| {
            let left = map.take(page.block, word, map.host_mask(page, word));
            (left != 0).then_some((word, left))
        })?;
        let host = Some(page);
        let block = page.block;
        let (begun, finished, spent) = (false, false, false);
        Some(Claim { map, block, word, left, taken: 0, host, begun, finished, spent })
    }

    /// The block its pages are of.
    pub fn block(&self) -> BlockIndex {
        self.block
    }

    /// The target pages among which its own are: the host page, or up to 64 neighbours. What to
    /// watch again before the first is read ([`DirtyLog::rearm`](crate::dirty::DirtyLog::rearm)).
    pub fn span(&self) -> Range<u64> {
        match self.host {
            Some(host) => self.map.host_range(host),
            None => {
                let first = self.word as u64 * 64;
                first..self.map.pages(self.block).min(first + 64)
            }
        }
    }

    /// Takes the next target page to be sent, in ascending order; `None` when all are taken.
    ///
    /// What is marked again after it was taken stays on the map for another claim.
    #[inline]
    pub fn next_page(&mut self) -> Option<TargetPage> {
        self.begun = true;
        while self.left == 0 {
            if !self.next_word() {
                return None;
            }
        }
        let bit = self.left & self.left.wrapping_neg();
        self.left ^= bit;
        self.taken |= bit;
        Some(TargetPage(self.word as u64 * 64 + u64::from(bit.trailing_zeros())))
    }

    /// Whether a page has been asked for.
    pub fn is_begun(&self) -> bool {
        self.begun
    }

    /// How many pages are left to take, as far as is known now.
    pub fn remaining(&self) -> u64 {
        let here = u64::from(self.left.count_ones());
        match self.host {
            Some(_) if self.finished => 0,
            Some(host) => here + self.map.pending_from(host, self.word + 1),
            None => here,
        }
    }

    /// Whether somebody waits for the host page it owns: it has been asked for by name. Then it
    /// is finished before anything else, and unpaced.
    pub fn is_urgent(&self) -> bool {
        self.host.is_some_and(|host| self.map.is_urgent(host))
    }

    /// All pages taken were handed to the wire. What was not taken is on the map again.
    pub fn spend(mut self) {
        self.spent = true;
    }

    fn next_word(&mut self) -> bool {
        let Some(host) = self.host else { return false };
        if self.word + 1 == self.map.host_words(host).end {
            self.finished = true;
            return false;
        }
        self.map.remember(self.block, self.word, std::mem::take(&mut self.taken));
        self.word += 1;
        self.left = self.map.take(self.block, self.word, self.map.host_mask(host, self.word));
        true
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let unsent = if self.spent { self.left } else { self.left | self.taken };
        self.map.add(self.block, self.word, unsent);
        let Some(host) = self.host else { return };
        for word in self.map.host_words(host).start..self.word {
            let taken = self.map.forget(host, word);
            if !self.spent {
                self.map.add(self.block, word, taken);
            }
        }
        // Only now: the next owner must find every page that went back.
        self.map.release(host, self.spent && self.remaining() == 0);
    }
}
