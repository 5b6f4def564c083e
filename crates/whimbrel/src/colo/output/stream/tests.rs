use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

const NOW: Duration = Duration::from_secs(1);

fn say(stream: &mut Stream, side: Side, at: u64, words: &str) -> Result<(), u64> {
    stream.say(NOW, side, at, Kind::Byte, words.as_bytes())
}

#[test]
fn both_have_said_what_both_have_said() {
    let mut stream = Stream::default();
    say(&mut stream, Side::Guest, 100, "abcdef").expect("nobody has spoken");
    assert!(!stream.is_agreed(&(100..101)));
    say(&mut stream, Side::Copy, 102, "cd").expect("it is the same");
    assert!(stream.is_agreed(&(102..104)));
    assert!(!stream.is_agreed(&(101..104)) && !stream.is_agreed(&(102..105)));
    say(&mut stream, Side::Copy, 98, "__abcdefgh").expect("it is the same");
    assert!(stream.is_agreed(&(100..106)));
    assert!(!stream.is_settled(), "the copy is ahead at both ends");
    say(&mut stream, Side::Guest, 98, "__abcdefgh").expect("it is the same");
    assert!(stream.is_settled() && stream.is_agreed(&(98..108)));
    assert_eq!(stream.cost(), PART);
}

#[test]
fn what_differs_is_told_by_its_place() {
    let mut stream = Stream::default();
    say(&mut stream, Side::Guest, 100, "abcdef").expect("nobody has spoken");
    assert_eq!(say(&mut stream, Side::Copy, 98, "__abcxef"), Err(103));
    assert!(stream.is_agreed(&(100..103)) && !stream.is_agreed(&(100..104)));
    assert_eq!(say(&mut stream, Side::Guest, 103, "dx"), Err(104), "with itself");
    assert_eq!(stream.say(NOW, Side::Copy, 103, Kind::Fin, b"d"), Err(103));
}

#[test]
fn a_restart_makes_the_copy_the_guest() {
    let mut stream = Stream::default();
    say(&mut stream, Side::Guest, 100, "abcdef").expect("nobody has spoken");
    say(&mut stream, Side::Copy, 102, "cd").expect("it is the same");
    say(&mut stream, Side::Copy, 200, "copy").expect("nobody has spoken");
    stream.restart();
    assert!(stream.is_agreed(&(100..106)) && stream.is_settled());
    assert_eq!((stream.ahead(), stream.cost()), (None, PART));
    say(&mut stream, Side::Guest, 200, "else").expect("the copy never spoke");
}

#[test]
fn holes_are_forgotten_at_a_restart() {
    let mut stream = Stream::default();
    for at in 0..100 {
        say(&mut stream, Side::Guest, 2 * at, "x").expect("nobody has spoken");
    }
    stream.restart();
    assert_eq!(stream.cost(), STRETCHES_KEPT * PART);
    assert!(stream.is_agreed(&(198..199)) && !stream.is_agreed(&(0..1)));
}

/// The same by a table of every position.
#[derive(Default)]
struct Model(HashMap<u64, (bool, bool, u8)>);

impl Model {
    fn say(&mut self, side: Side, at: u64, words: &[u8]) -> Result<(), u64> {
        for (position, &byte) in (at..).zip(words) {
            let said = self.0.entry(position).or_insert((false, false, byte));
            let both = said.0 && said.1;
            if said.2 != byte && !both {
                return Err(position);
            }
            match side {
                Side::Guest => said.0 = true,
                Side::Copy => said.1 = true,
            }
        }
        Ok(())
    }
}

proptest! {
    #[test]
    fn it_is_as_a_table_of_positions(
        said in proptest::collection::vec(
            (any::<bool>(), 0..40_u64, 1..12_usize, proptest::option::weighted(0.1, 0..12_usize)),
            1..60,
        ),
    ) {
        let (mut stream, mut model) = (Stream::default(), Model::default());
        for (is_guest, at, len, flip) in said {
            let side = if is_guest { Side::Guest } else { Side::Copy };
            let mut words: Vec<u8> = (at..).take(len).map(|at| at.to_le_bytes()[0]).collect();
            if let Some(byte) = flip.and_then(|flip| words.get_mut(flip)) {
                *byte ^= 0x80;
            }
            prop_assert_eq!(
                stream.say(NOW, side, at, Kind::Byte, &words),
                model.say(side, at, &words)
            );
            let mut pending = 0;
            for at in 0..60 {
                let said = model.0.get(&at).copied().unwrap_or_default();
                prop_assert_eq!(stream.is_agreed(&(at..at + 1)), said.0 && said.1, "at {}", at);
                pending += usize::from(said.0 != said.1);
            }
            prop_assert_eq!(stream.is_settled(), pending == 0);
            prop_assert_eq!(stream.bytes, pending);
            let ahead = model.0.values().any(|said| said.1 && !said.0);
            prop_assert_eq!(stream.ahead().is_some(), ahead);
        }
    }
}
