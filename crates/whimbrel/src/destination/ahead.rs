//! Reading ahead, into place: while pages come one after the other, the next ones are received
//! straight into guest memory, each with its record word before it, before the words have been
//! seen. A word that is not the one expected says where the guess was wrong: what lies behind it
//! is taken back out of guest memory, which was zero there and is made so again.
//!
//! This saves the copy from the buffer, and so about a third of a destination's work.

use whimbrel_ram::TARGET_PAGE;
use whimbrel_ram::kernel_copy::Scatter;
use whimbrel_wire::{BlockOffset, Decoded, RamRecord, continued_page_word};

use super::input::Input;
use super::placing::{Place, Placing};
use crate::error::Error;

const PAGE: usize = TARGET_PAGE.bytes();
const WORD: usize = 8;

/// Pages read ahead at most: what is taken back has to fit into the buffer.
const PAGES_MAX: usize = super::input::BUFFER / (PAGE + WORD);

/// What reading ahead needs again and again.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    places: Vec<Place>,
    words: Vec<[u8; WORD]>,
}

impl Ahead {
    /// Reads once, ahead, if the next pages are known and nothing else is at hand. Gives how many
    /// pages it placed; 0 means that the stream has to be read in the ordinary way.
    pub(super) fn read(
        &mut self,
        input: &mut Input,
        placing: &mut Placing,
    ) -> Result<usize, Error> {
        let Some(held) = input.held_below(WORD) else { return Ok(0) };
        self.places.clear();
        self.places.extend(placing.expected(PAGES_MAX));
        if self.places.is_empty() {
            return Ok(0);
        }
        self.words.clear();
        self.words.resize(self.places.len(), [0; WORD]);
        let (first, rest) = self.words.split_first_mut().expect("as many as places");
        first[..held.len()].copy_from_slice(held);
        let held = held.len();
        let mut pieces = Scatter::new();
        pieces.push_buffer(&mut first[held..]);
        pieces.push_guest(placing.block(self.places[0]), self.places[0].offset, PAGE)?;
        for (word, place) in rest.iter_mut().zip(&self.places[1..]) {
            pieces.push_buffer(word);
            pieces.push_guest(placing.block(*place), place.offset, PAGE)?;
        }
        let got = input.receive(&mut pieces)?;
        drop(pieces);
        input.forget_held();
        let bytes = held + got;
        if got == 0 {
            // The end of the stream, perhaps within a word: for the ordinary way to tell.
            input.put_back(&self.words[0][..held]);
            return Ok(0);
        }
        self.check(input, placing, bytes)
    }

    /// `bytes` of words and pages, alternating, have come: what of them are the pages expected?
    fn check(
        &self,
        input: &mut Input,
        placing: &mut Placing,
        bytes: usize,
    ) -> Result<usize, Error> {
        let mut left = bytes;
        let mut placed = 0;
        for (at, place) in self.places.iter().enumerate() {
            let word = &self.words[at];
            if left < WORD {
                input.put_back(&word[..left]);
                return Ok(placed);
            }
            if *word != continued_page_word(BlockOffset(place.offset)) {
                self.take_back(input, placing, at, left)?;
                return Ok(placed);
            }
            input.decode_expected(word, |decoded| {
                matches!(decoded, Decoded::Ram(RamRecord::PageFollows { block, offset, .. })
                    if block.get() == place.block && offset.0 == place.offset)
            })?;
            left -= WORD;
            let here = left.min(PAGE);
            input.rest_of_page(placing.block(*place), place.offset, here)?;
            placing.placed(*place);
            placed += 1;
            left -= here;
            if left == 0 {
                break;
            }
        }
        Ok(placed)
    }

    /// From word `at` on, `left` bytes lie where they do not belong.
    fn take_back(
        &self,
        input: &mut Input,
        placing: &Placing,
        at: usize,
        left: usize,
    ) -> Result<(), Error> {
        let mut bytes = Vec::with_capacity(left);
        for (word, place) in self.words[at..].iter().zip(&self.places[at..]) {
            let of_word = (left - bytes.len()).min(WORD);
            bytes.extend_from_slice(&word[..of_word]);
            let of_page = (left - bytes.len()).min(PAGE);
            if of_page == 0 {
                break;
            }
            let from = bytes.len();
            bytes.resize(from + of_page, 0);
            let block = placing.block(*place);
            block.read(place.offset, &mut bytes[from..])?;
            block.write_zeros(place.offset, PAGE)?;
        }
        input.put_back(&bytes);
        Ok(())
    }
}
