//! The corpus that is kept in the repository: for each target the inputs that, together, reach
//! what all inputs of all runs so far have reached. One compressed file each.
//!
//! A file is the inputs behind each other, the shortest first, each behind its length (four bytes,
//! little-endian).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Most bytes of a target's file, and so of the repository.
const FILE_MAX: usize = 100 << 10;

/// Most inputs of a target: all of them are replayed by every test run.
const INPUTS_MAX: usize = 600;

/// Most bytes of an input: a longer one seldom says more.
const INPUT_MAX: usize = 64 << 10;

/// Where the files are.
#[must_use]
pub fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus-min")
}

fn file(target: &str) -> PathBuf {
    directory().join(format!("{target}.zst"))
}

/// The inputs that are kept for a target; none when there is no file of it.
///
/// # Errors
/// When there is one and it cannot be read.
pub fn read(target: &str) -> io::Result<Vec<Vec<u8>>> {
    let packed = match fs::read(file(target)) {
        Ok(packed) => packed,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    unpack(&zstd::decode_all(packed.as_slice())?)
}

fn unpack(mut bytes: &[u8]) -> io::Result<Vec<Vec<u8>>> {
    let mut inputs = Vec::new();
    while let Some((len, rest)) = bytes.split_first_chunk() {
        let len = usize::try_from(u32::from_le_bytes(*len)).map_err(io::Error::other)?;
        let input = rest.get(..len).ok_or(io::ErrorKind::UnexpectedEof)?;
        inputs.push(input.to_vec());
        bytes = &rest[len..];
    }
    Ok(inputs)
}

fn pack(inputs: &[Vec<u8>]) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for input in inputs {
        let len = u32::try_from(input.len()).map_err(io::Error::other)?;
        bytes.extend(len.to_le_bytes());
        bytes.extend(input);
    }
    zstd::encode_all(bytes.as_slice(), 19)
}

/// Leaves at most so many, of all lengths.
fn thin(inputs: &mut Vec<Vec<u8>>, most: usize) {
    let len = inputs.len();
    let mut at = 0;
    inputs.retain(|_| {
        at += 1;
        len <= most || at * most / len > (at - 1) * most / len
    });
}

/// Keeps the inputs in `folder`, which were minimised before: as many of them, short and long, as
/// there is room for. Gives how many, and the bytes of their file.
///
/// # Errors
/// When they cannot be read, or their file not written.
pub fn keep(target: &str, folder: &Path) -> io::Result<(usize, usize)> {
    let mut inputs = Vec::new();
    for entry in fs::read_dir(folder)? {
        let input = fs::read(entry?.path())?;
        if input.len() <= INPUT_MAX {
            inputs.push(input);
        }
    }
    inputs.sort_by(|one, other| (one.len(), one).cmp(&(other.len(), other)));
    thin(&mut inputs, INPUTS_MAX);
    let mut packed = pack(&inputs)?;
    while packed.len() > FILE_MAX {
        let fewer = inputs.len() * 15 / 16;
        thin(&mut inputs, fewer);
        packed = pack(&inputs)?;
    }
    fs::create_dir_all(directory())?;
    fs::write(file(target), &packed)?;
    Ok((inputs.len(), packed.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fewer_inputs_are_short_and_long_ones() {
        let all: Vec<Vec<u8>> = (0..100).map(|len| vec![0; len]).collect();
        for most in [0, 1, 7, 99, 100, 200] {
            let mut some = all.clone();
            thin(&mut some, most);
            assert_eq!(some.len(), most.min(100));
            assert_eq!(some.last().map(Vec::len), (most > 0).then_some(99));
        }
    }

    #[test]
    fn what_is_packed_is_unpacked() {
        let inputs = vec![vec![], vec![1], vec![0; 70_000]];
        let packed = pack(&inputs).unwrap();
        assert!(packed.len() < 1000);
        let bytes = zstd::decode_all(packed.as_slice()).unwrap();
        assert_eq!(unpack(&bytes).unwrap(), inputs);
        assert!(unpack(&bytes[..bytes.len() - 1]).is_err());
    }
}
