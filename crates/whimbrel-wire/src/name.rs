//! Names on the wire: one length byte and at most 255 bytes of anything.

use alloc::boxed::Box;
use core::borrow::Borrow;
use core::fmt::{self, Write as _};

/// A name of 1 to 255 bytes: of a RAM block, a section, a machine type, a capability.
///
/// QEMU's are ASCII, but a peer may send any bytes. They are kept as they came; `Display`
/// escapes what is not text, so that a hostile name cannot write to a terminal.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Box<[u8]>);

/// The name of a RAM block.
pub type BlockName = Name;

/// A name was empty or longer than 255 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a name on the wire has 1 to 255 bytes, this one has {0}")]
pub struct NameLength(pub usize);

impl Name {
    /// The longest name in bytes.
    pub const MAX: usize = 255;

    /// Takes a name.
    ///
    /// # Errors
    /// When it is empty or longer than [`Name::MAX`].
    pub fn new(bytes: impl AsRef<[u8]>) -> Result<Self, NameLength> {
        let bytes = bytes.as_ref();
        match bytes.len() {
            1..=Self::MAX => Ok(Self(bytes.into())),
            other => Err(NameLength(other)),
        }
    }

    /// The bytes as they are on the wire.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The name as text, if it is.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        core::str::from_utf8(&self.0).ok()
    }

    /// Appends the length byte and the name.
    pub fn encode(&self, out: &mut alloc::vec::Vec<u8>) {
        out.push(self.length_byte());
        out.extend_from_slice(&self.0);
    }

    /// The length, which by construction fits the one byte it has on the wire.
    pub(crate) fn length_byte(&self) -> u8 {
        u8::try_from(self.0.len()).unwrap_or(u8::MAX)
    }
}

impl TryFrom<&str> for Name {
    type Error = NameLength;

    fn try_from(text: &str) -> Result<Self, NameLength> {
        Self::new(text)
    }
}

impl AsRef<[u8]> for Name {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Lets maps keyed by name be asked with the bytes of a record, without an allocation.
impl Borrow<[u8]> for Name {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl PartialEq<str> for Name {
    fn eq(&self, other: &str) -> bool {
        *self.0 == *other.as_bytes()
    }
}

impl PartialEq<&str> for Name {
    fn eq(&self, other: &&str) -> bool {
        *self.0 == *other.as_bytes()
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for character in chunk.valid().chars() {
                if character.is_control() || character == '"' || character == '\\' {
                    write!(f, "{}", character.escape_default())?;
                } else {
                    f.write_char(character)?;
                }
            }
            write!(f, "{}", chunk.invalid().escape_ascii())?;
        }
        Ok(())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn length_is_one_to_255() {
        assert_eq!(Name::new(""), Err(NameLength(0)));
        assert_eq!(Name::new([b'a'; 256]), Err(NameLength(256)));
        assert!(Name::new([b'a'; 255]).is_ok());
    }

    #[test]
    fn hostile_bytes_are_escaped() {
        let name = Name::new(b"a\x1b[2J\xff\"\xc3\xa9").unwrap();
        assert_eq!(name.to_string(), "a\\u{1b}[2J\\xff\\\"é");
    }
}
