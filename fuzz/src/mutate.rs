//! Changing an input where its operations are: what libFuzzer, which knows only bytes, rarely hits
//! upon.

use crate::answering::Answered;
use crate::asking::Asked;
use crate::choices::{Choices, Op, read_all};
use crate::telling::Said;

/// Changes the first `size` bytes of `data`, an input of `target`, into at most `max_size`; gives
/// how many they are now. `None` where this is left to libFuzzer, every other time: it knows what
/// the code compares its inputs with.
#[must_use]
pub fn mutate(
    target: &str,
    data: &mut [u8],
    size: usize,
    max_size: usize,
    seed: u32,
) -> Option<usize> {
    if seed & 1 == 0 {
        return None;
    }
    let (input, seed) = (&data[..size], seed >> 1);
    let changed = match target {
        "channels" => operations::<Said>(input, 0, seed),
        "destination" => operations::<Said>(input, crate::destination::SETTINGS, seed),
        "receive" | "kept_file" => operations::<Said>(input, crate::keeping::SETTINGS, seed),
        "answers" => operations::<Answered>(input, 0, seed),
        "source" => operations::<Answered>(input, crate::source::SETTINGS, seed),
        "qmp_server" => operations::<Asked>(input, 1, seed),
        _ => None,
    }?;
    let len = changed.len().min(max_size).min(data.len());
    data[..len].copy_from_slice(&changed[..len]);
    Some(len)
}

/// A reproducible sequence of numbers (splitmix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.roll() % end as u64).expect("below a length")
    }

    fn byte(&mut self) -> u8 {
        self.roll().to_le_bytes()[0]
    }
}

/// Changes operations of an input of `header` bytes and a list of them: removes, repeats, moves or
/// invents one, or changes a byte of one. `None` where nothing can be.
pub(crate) fn operations<O: Op>(data: &[u8], header: usize, seed: u32) -> Option<Vec<u8>> {
    let mut dice = Dice(seed.into());
    let (head, rest) = data.split_at(header.min(data.len()));
    let mut ops: Vec<Vec<u8>> = read_all::<O>(&mut Choices::new(rest))
        .iter()
        .map(|op| {
            let mut bytes = Vec::new();
            op.write(&mut bytes);
            bytes
        })
        .collect();
    for _ in 0..=dice.below(3) {
        let len = ops.len();
        match (dice.below(6), len) {
            (0, 1..) => {
                ops.remove(dice.below(len));
            }
            (1, 1..) => {
                let again = ops[dice.below(len)].clone();
                ops.insert(dice.below(len + 1), again);
            }
            (2, 2..) => ops.swap(dice.below(len), dice.below(len)),
            (3, 1..) => {
                // A run of them, elsewhere.
                let from = dice.below(len);
                let run = ops[from..len.min(from + 1 + dice.below(8))].to_vec();
                let to = dice.below(len + 1);
                ops.splice(to..to, run);
            }
            (4, 1..) => {
                let op = &mut ops[dice.below(len)];
                let at = dice.below(op.len());
                op[at] = match dice.below(3) {
                    0 => dice.byte(),
                    1 => op[at] ^ 1 << dice.below(8),
                    _ => op[at].wrapping_add(dice.byte() % 16).wrapping_sub(8),
                };
            }
            _ => {
                let mut op = vec![dice.byte() % O::KINDS];
                op.extend((0..8).map(|_| if dice.below(2) == 0 { 0 } else { dice.byte() }));
                // Only as much of it as belongs to the operation.
                let invented = read_all::<O>(&mut Choices::new(&op)).into_iter().next()?;
                op.clear();
                invented.write(&mut op);
                ops.insert(dice.below(len + 1), op);
            }
        }
    }
    let mut out = head.to_vec();
    if dice.below(8) == 0 && !out.is_empty() {
        let at = dice.below(out.len());
        out[at] ^= 1 << dice.below(8);
    }
    out.extend(ops.concat());
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telling::Said;

    #[test]
    fn what_is_changed_is_still_a_list_of_operations() {
        let mut data = vec![0x80];
        for op in [Said::Header { variant: 0 }, Said::Raw { bytes: vec![1, 2, 3] }, Said::Eof {}] {
            op.write(&mut data);
        }
        let mut changed = 0;
        for seed in 0..1000 {
            let Some(other) = operations::<Said>(&data, 1, seed) else { continue };
            changed += usize::from(other != data);
            let mut again = other[..1].to_vec();
            read_all::<Said>(&mut Choices::new(&other[1..]))
                .iter()
                .for_each(|op| op.write(&mut again));
            // The last operand may have been longer than what was left.
            assert!(again.len() >= other.len());
        }
        assert!(changed > 900, "{changed}");
    }
}
