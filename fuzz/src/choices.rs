//! Inputs as values: a fuzzer's bytes read as a list of operations, each an opcode and operands of
//! fixed places, and written back.
//!
//! Any bytes are a list of operations, and a byte that is inserted or lost shifts little: so what
//! libFuzzer does to bytes changes what is said, and seldom only how it is spelled.

/// The bytes that have not been read yet. Behind their end there are zeros.
#[derive(Debug)]
pub(crate) struct Choices<'d>(&'d [u8]);

impl<'d> Choices<'d> {
    pub(crate) fn new(data: &'d [u8]) -> Choices<'d> {
        Choices(data)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// At most so many bytes.
    pub(crate) fn bytes(&mut self, len: usize) -> &'d [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }
}

/// An operand.
pub(crate) trait Field: Sized {
    fn read(from: &mut Choices<'_>) -> Self;
    fn write(&self, out: &mut Vec<u8>);
}

impl Field for u8 {
    fn read(from: &mut Choices<'_>) -> u8 {
        from.byte()
    }
    fn write(&self, out: &mut Vec<u8>) {
        out.push(*self);
    }
}

impl Field for u16 {
    fn read(from: &mut Choices<'_>) -> u16 {
        u16::from_le_bytes([from.byte(), from.byte()])
    }
    fn write(&self, out: &mut Vec<u8>) {
        out.extend(self.to_le_bytes());
    }
}

impl Field for u32 {
    fn read(from: &mut Choices<'_>) -> u32 {
        u32::from_le_bytes([from.byte(), from.byte(), from.byte(), from.byte()])
    }
    fn write(&self, out: &mut Vec<u8>) {
        out.extend(self.to_le_bytes());
    }
}

/// Up to 65,535 bytes, behind their length.
impl Field for Vec<u8> {
    fn read(from: &mut Choices<'_>) -> Vec<u8> {
        let len = u16::read(from);
        from.bytes(len.into()).to_vec()
    }
    fn write(&self, out: &mut Vec<u8>) {
        let len = u16::try_from(self.len()).expect("no operand is longer");
        len.write(out);
        out.extend_from_slice(self);
    }
}

/// An operation of a language.
pub(crate) trait Op: Sized {
    /// How many there are.
    const KINDS: u8;
    /// The operands of the operation of this number.
    fn read(kind: u8, from: &mut Choices<'_>) -> Self;
    /// Number and operands.
    fn write(&self, out: &mut Vec<u8>);
}

/// All that is left, as operations.
pub(crate) fn read_all<O: Op>(from: &mut Choices<'_>) -> Vec<O> {
    let mut ops = Vec::new();
    while !from.is_empty() {
        let kind = from.byte() % O::KINDS;
        ops.push(O::read(kind, from));
    }
    ops
}

/// A language: an enum whose variants are operations with named operands.
macro_rules! language {
    ($(#[$meta:meta])* $vis:vis enum $name:ident {
        $($(#[$doc:meta])* $op:ident { $($field:ident: $type:ty),* $(,)? }),* $(,)?
    }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        $vis enum $name { $($(#[$doc])* $op { $($field: $type),* }),* }

        const _: () = {
            use $crate::choices::{Choices, Field, Op};
            enum Kind { $($op),* }
            impl Op for $name {
                const KINDS: u8 = [$(Kind::$op as u8),*].len() as u8;
                fn read(kind: u8, from: &mut Choices<'_>) -> Self {
                    let _ = &from;
                    $(if kind == Kind::$op as u8 {
                        return Self::$op { $($field: Field::read(from)),* };
                    })*
                    unreachable!("below the number of kinds")
                }
                fn write(&self, out: &mut Vec<u8>) {
                    match self {
                        $(Self::$op { $($field),* } => {
                            out.push(Kind::$op as u8);
                            $($field.write(out);)*
                        })*
                    }
                }
            }
        };
    };
}
pub(crate) use language;

#[cfg(test)]
mod tests {
    use super::*;

    language! {
        enum Word {
            Nothing {},
            Number { small: u8, large: u32 },
            Text { bytes: Vec<u8> },
        }
    }

    #[test]
    fn what_is_written_is_read_again_and_anything_can_be_read() {
        let words = vec![
            Word::Text { bytes: b"abc".to_vec() },
            Word::Nothing {},
            Word::Number { small: 7, large: 0x0102_0304 },
        ];
        let mut bytes = Vec::new();
        words.iter().for_each(|word| word.write(&mut bytes));
        assert_eq!(read_all::<Word>(&mut Choices::new(&bytes)), words);
        bytes.truncate(bytes.len() - 2);
        let cut = read_all::<Word>(&mut Choices::new(&bytes));
        assert_eq!(cut[2], Word::Number { small: 7, large: 0x0304 });
        assert_eq!(
            read_all::<Word>(&mut Choices::new(&[3, 4])),
            [Word::Nothing {}, Word::Number { small: 0, large: 0 },]
        );
    }
}
