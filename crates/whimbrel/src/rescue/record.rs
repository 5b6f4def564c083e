//! What the file of a part says behind its stream: which pages are missing, and of what it is a
//! part.
//!
//! | bytes | |
//! |---|---|
//! | 8 | `whimpart` |
//! | be32 | version: 1 |
//! | 1 | 1: of a source, 2: of a destination |
//! | 1 | 1: the migration's identifier follows, 0: zeros do |
//! | 16 | it |
//! | be32 | how many blocks; then for each: |
//! | 1, n | its name |
//! | be64 | its length in bytes |
//! | m | its bitmap, as in mapped RAM: the pages that are missing |
//! | 32 | SHA-256 of all that |
//! | be64 | where all that begins in the file |
//! | 8 | `whimends` |

use aws_lc_rs::digest::{SHA256, digest};
use whimbrel_wire::{TargetPage, page_bitmap as bitmap};

use super::Side;
use super::missing::Missing;

const BEGINS: [u8; 8] = *b"whimpart";
const ENDS: [u8; 8] = *b"whimends";
const VERSION: u32 = 1;
const CHECKSUM: usize = 32;

/// The last bytes of the file: where the record begins, and a mark.
pub(super) const TRAILER: usize = 16;

/// The longest record that is read: the map of 8 TiB of RAM has half of that.
pub(super) const RECORD_MAX: u64 = 512 << 20;

/// What a part says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) side: Side,
    pub(super) migration: Option<[u8; 16]>,
    /// Name and length in bytes of each block.
    pub(super) blocks: Vec<(String, u64)>,
    pub(super) missing: Missing,
}

impl Record {
    /// As it is in a file from byte `at` on.
    pub(super) fn encode(&self, at: u64) -> Vec<u8> {
        let mut bytes = BEGINS.to_vec();
        bytes.extend_from_slice(&VERSION.to_be_bytes());
        bytes.push(match self.side {
            Side::Source => 1,
            Side::Destination => 2,
        });
        bytes.push(u8::from(self.migration.is_some()));
        bytes.extend_from_slice(&self.migration.unwrap_or_default());
        let count = u32::try_from(self.blocks.len()).expect("at most 65,535 blocks");
        bytes.extend_from_slice(&count.to_be_bytes());
        for ((name, len), bits) in self.blocks.iter().zip(&self.missing.blocks) {
            bytes.push(u8::try_from(name.len()).expect("names have at most 255 bytes"));
            bytes.extend_from_slice(name.as_bytes());
            bytes.extend_from_slice(&len.to_be_bytes());
            bytes.extend_from_slice(bits);
        }
        let checksum = digest(&SHA256, &bytes);
        bytes.extend_from_slice(checksum.as_ref());
        bytes.extend_from_slice(&at.to_be_bytes());
        bytes.extend_from_slice(&ENDS);
        bytes
    }

    /// Where the record begins in a file of so many bytes that ends in `trailer`.
    pub(super) fn begins_at(trailer: &[u8; TRAILER], file_len: u64) -> Result<u64, String> {
        let (at, mark) = trailer.split_at(8);
        if mark != ENDS {
            return Err("the record of what is missing is not at its end: it is cut off".into());
        }
        let at = u64::from_be_bytes(at.try_into().expect("8 bytes"));
        let len = file_len.checked_sub(TRAILER as u64).and_then(|end| end.checked_sub(at));
        match len {
            Some(len) if len <= RECORD_MAX => Ok(at),
            _ => Err(format!("its record of what is missing cannot begin at byte {at}")),
        }
    }

    /// Reads what lies between where it begins and the trailer.
    pub(super) fn decode(bytes: &[u8]) -> Result<Record, String> {
        let unsummed = bytes.len().checked_sub(CHECKSUM).ok_or_else(too_short)?;
        let (bytes, checksum) = bytes.split_at(unsummed);
        let mut rest = bytes;
        if take(&mut rest, 8)? != BEGINS {
            return Err("there is no record of what is missing where it should begin".into());
        }
        let version = take_be32(&mut rest)?;
        if version != VERSION {
            return Err(format!(
                "its record of what is missing has version {version}, expected {VERSION}"
            ));
        }
        if digest(&SHA256, bytes).as_ref() != checksum {
            return Err("its record of what is missing is damaged (SHA-256)".into());
        }
        let side = match take_byte(&mut rest)? {
            1 => Side::Source,
            2 => Side::Destination,
            other => return Err(format!("it says that it is of side {other}, expected 1 or 2")),
        };
        let has_migration = take_byte(&mut rest)? != 0;
        let migration: [u8; 16] = take(&mut rest, 16)?.try_into().expect("16 bytes");
        let migration = has_migration.then_some(migration);
        let (mut blocks, mut missing) = (Vec::new(), Missing { blocks: Vec::new() });
        for _ in 0..take_be32(&mut rest)? {
            let len = usize::from(take_byte(&mut rest)?);
            let name = String::from_utf8(take(&mut rest, len)?.to_vec());
            let name = name.map_err(|_| "a block's name in its record is no text")?;
            let len: [u8; 8] = take(&mut rest, 8)?.try_into().expect("8 bytes");
            let len = u64::from_be_bytes(len);
            let bitmap_len = bitmap::bitmap_len(len, TargetPage::FOUR_KIB);
            let bits = take(&mut rest, usize::try_from(bitmap_len).map_err(|_| too_short())?)?;
            let pages = len / TargetPage::FOUR_KIB.size();
            if (pages..bitmap_len * 8).any(|page| bitmap::is_set(bits, page)) {
                return Err(format!("pages beyond the end of RAM block {name} are missing"));
            }
            missing.blocks.push(bits.to_vec());
            blocks.push((name, len));
        }
        if !rest.is_empty() {
            return Err(format!("its record of what is missing has {} bytes more", rest.len()));
        }
        Ok(Record { side, migration, blocks, missing })
    }
}

fn too_short() -> String {
    "its record of what is missing is too short".into()
}

/// Takes so many bytes off the front.
fn take<'b>(rest: &mut &'b [u8], len: usize) -> Result<&'b [u8], String> {
    let (taken, after) = rest.split_at_checked(len).ok_or_else(too_short)?;
    *rest = after;
    Ok(taken)
}

fn take_byte(rest: &mut &[u8]) -> Result<u8, String> {
    Ok(take(rest, 1)?[0])
}

fn take_be32(rest: &mut &[u8]) -> Result<u32, String> {
    Ok(u32::from_be_bytes(take(rest, 4)?.try_into().expect("4 bytes")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        let mut missing = Missing::nothing([70 * 4096, 4096]);
        bitmap::set(&mut missing.blocks[0], 3, true);
        bitmap::set(&mut missing.blocks[0], 69, true);
        Record {
            side: Side::Destination,
            migration: Some([7; 16]),
            blocks: vec![("vm.ram".into(), 70 * 4096), ("b".into(), 4096)],
            missing,
        }
    }

    fn decode(file: &[u8]) -> Result<Record, String> {
        let trailer = file.last_chunk().ok_or("short")?;
        let at = Record::begins_at(trailer, file.len() as u64)?;
        Record::decode(&file[usize::try_from(at).expect("small")..file.len() - TRAILER])
    }

    #[test]
    fn what_was_written_is_read() {
        for record in [record(), Record { side: Side::Source, migration: None, ..record() }] {
            let mut file = vec![b'x'; 100];
            let bytes = record.encode(100);
            file.extend_from_slice(&bytes);
            assert_eq!(decode(&file), Ok(record));
        }
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let file = record().encode(0);
        for at in 0..file.len() * 8 {
            let mut damaged = file.clone();
            damaged[at / 8] ^= 1 << (at % 8);
            assert!(decode(&damaged).is_err(), "bit {at}");
        }
        for len in 0..file.len() {
            assert!(decode(&file[..len]).is_err(), "{len} bytes");
        }
    }

    /// Encoded with a sum that is right.
    fn summed(body: &[u8]) -> Vec<u8> {
        let mut file = body.to_vec();
        file.extend_from_slice(digest(&SHA256, body).as_ref());
        file.extend_from_slice(&0u64.to_be_bytes());
        file.extend_from_slice(&ENDS);
        file
    }

    #[test]
    fn what_is_hostile_is_refused_however_well_summed() {
        let good = record().encode(0);
        let body = &good[..good.len() - CHECKSUM - TRAILER];
        assert_eq!(decode(&summed(body)), Ok(record()));
        // Where things are: mark 8, version 4, side 1, flag 1, identifier 16, count 4, name 7.
        let length_at = 34 + 7;
        let change = |at: usize, bytes: &[u8], text: &str| {
            let mut body = body.to_vec();
            body[at..at + bytes.len()].copy_from_slice(bytes);
            let error = decode(&summed(&body)).expect_err(text);
            assert!(error.contains(text), "{error}");
        };
        change(8, &9u32.to_be_bytes(), "version 9, expected 1");
        change(12, &[3], "side 3");
        change(30, &u32::MAX.to_be_bytes(), "too short");
        change(length_at, &u64::MAX.to_be_bytes(), "too short");
        change(length_at, &(1u64 << 50).to_be_bytes(), "too short");
        change(length_at + 8 + 15, &[1], "beyond the end of RAM block vm.ram");
        change(35, &[0xff], "no text");
        let mut longer = body.to_vec();
        longer.push(0);
        assert!(decode(&summed(&longer)).unwrap_err().contains("1 bytes more"));
        let beyond = |at: u64| {
            Record::begins_at(&[at.to_be_bytes(), ENDS].concat().try_into().unwrap(), 100)
        };
        assert_eq!(beyond(84), Ok(84));
        assert!(beyond(85).is_err() && beyond(u64::MAX).is_err());
    }
}
