//! Comparing RAM page by page, where the guest has run on at the destination.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

use serde::Deserialize;

/// Pages that the guest writes (`x-vm-info`).
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Writable {
    kind: String,
    block: String,
    first: u64,
    pages: u64,
}

impl Writable {
    fn has(&self, block: &str, page: u64) -> bool {
        self.block == block && page.checked_sub(self.first).is_some_and(|at| at < self.pages)
    }
}

/// A block of RAM (`x-ram-digest`).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Block {
    pub(super) name: String,
    pub(super) pages: u64,
}

/// What came of comparing each page with what it was.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Compared {
    /// Pages that are the same.
    pub(super) identical: u64,
    /// Pages that differ, and that the guest writes.
    pub(super) written: u64,
    /// Those of them that belong to the working set: one update changes one of them.
    pub(super) updated: u64,
    /// Pages that differ though the guest never writes them.
    pub(super) strayed: u64,
    /// The first of these.
    pub(super) first_strayed: Option<String>,
}

/// Compares two files of page digests, as `x-ram-digest` writes them, of these blocks.
pub(super) fn compare(
    blocks: &[Block],
    writable: &[Writable],
    left: &Path,
    arrived: &Path,
) -> io::Result<Compared> {
    let open = |path| File::open(path).map(BufReader::new);
    let (mut left, mut arrived) = (open(left)?, open(arrived)?);
    let mut compared = Compared::default();
    for block in blocks {
        for page in 0..block.pages {
            if next(&mut left)? == next(&mut arrived)? {
                compared.identical += 1;
            } else {
                compared.differs(&block.name, page, writable);
            }
        }
    }
    Ok(compared)
}

fn next(digests: &mut impl Read) -> io::Result<[u8; 8]> {
    let mut digest = [0; 8];
    digests.read_exact(&mut digest)?;
    Ok(digest)
}

impl Compared {
    fn differs(&mut self, block: &str, page: u64, writable: &[Writable]) {
        match writable.iter().find(|range| range.has(block, page)) {
            Some(range) => {
                self.written += 1;
                self.updated += u64::from(range.kind == "working-set");
            }
            None => {
                self.strayed += 1;
                self.first_strayed.get_or_insert_with(|| format!("{block}, page {page}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writable() -> Vec<Writable> {
        serde_json::from_str(
            r#"[{"kind": "vcpus", "block": "ram", "first": 1, "pages": 1},
                {"kind": "working-set", "block": "ram", "first": 4, "pages": 4}]"#,
        )
        .unwrap()
    }

    fn compared(left: &[u64], arrived: &[u64]) -> io::Result<Compared> {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, digests: &[u64]| {
            let path = folder.path().join(name);
            let bytes: Vec<u8> = digests.iter().flat_map(|digest| digest.to_le_bytes()).collect();
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let block = |name: &str, pages| Block { name: name.into(), pages };
        let blocks = [block("ram", 8), block("rom", 2)];
        compare(&blocks, &writable(), &write("left", left), &write("arrived", arrived))
    }

    #[test]
    fn what_the_guest_writes_may_differ_and_nothing_else() {
        let left = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10];
        let same = compared(&left, &left).unwrap();
        assert_eq!(same, Compared { identical: 10, ..Compared::default() });

        let found = compared(&left, &[1, 20, 3, 4, 50, 6, 7, 80, 9, 10]).unwrap();
        assert_eq!((found.identical, found.written, found.updated, found.strayed), (7, 3, 2, 0));

        // A page before the ranges, one between them, and one of another block at the same place.
        let found = compared(&left, &[11, 2, 3, 44, 5, 6, 7, 8, 9, 100]).unwrap();
        assert_eq!((found.identical, found.written, found.strayed), (7, 0, 3));
        assert_eq!(found.first_strayed.as_deref(), Some("ram, page 0"));
    }

    #[test]
    fn a_file_that_is_too_short_is_an_error() {
        let error = compared(&[0; 10], &[0; 9]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
