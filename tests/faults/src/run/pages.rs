//! Comparing all of RAM, page by page, as both sides have it.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::vm::Vm;

/// A page's digest in the files that `x-ram-digest` writes.
const DIGEST: usize = 8;

/// What a side's RAM is: a digest of each page.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Pages {
    /// Name and pages of each block, one after the other.
    blocks: Vec<(String, usize)>,
    digests: Vec<u8>,
}

impl Pages {
    /// Of a guest that stands still.
    pub(super) fn of(vm: &mut Vm, folder: &Path) -> Result<Pages> {
        let file = folder.join(format!("{}.pages", vm.side.name()));
        let told = vm.execute("x-ram-digest", json!({ "file": file }))?;
        let blocks = told["blocks"].as_array().context("no blocks")?.iter();
        let block = |block: &Value| {
            let pages = block["pages"].as_u64().context("a block without pages")?;
            Ok((
                block["name"].as_str().context("a block without a name")?.into(),
                pages.try_into()?,
            ))
        };
        let blocks: Vec<(String, usize)> = blocks.map(block).collect::<Result<_>>()?;
        let digests = fs::read(&file)?;
        let pages: usize = blocks.iter().map(|(_, pages)| pages).sum();
        ensure!(
            pages > 0 && digests.len() == pages * DIGEST,
            "{} bytes for the digests of {pages} pages",
            digests.len()
        );
        Ok(Pages { blocks, digests })
    }

    /// That `later` is the same, but for the pages that the guest writes (`written`: block, first
    /// page, pages).
    pub(super) fn check_same(&self, later: &Pages, written: &[(String, u64, u64)]) -> Result<()> {
        ensure!(self.blocks == later.blocks, "{:?}, then {:?}", self.blocks, later.blocks);
        let digests = self.digests.chunks(DIGEST).zip(later.digests.chunks(DIGEST));
        let places =
            self.blocks.iter().flat_map(|(name, pages)| (0..*pages).map(move |at| (name, at)));
        let differs = places.zip(digests).filter(|(_, (left, came))| left != came);
        let strayed: Vec<String> = differs
            .filter(|((name, page), _)| {
                !written.iter().any(|(block, first, pages)| {
                    block == *name
                        && (*page as u64).checked_sub(*first).is_some_and(|at| at < *pages)
                })
            })
            .map(|((name, page), _)| format!("{name} {page:#x}"))
            .collect();
        let first = &strayed[..strayed.len().min(8)];
        ensure!(
            strayed.is_empty(),
            "{} pages are not as they were at the source: {}",
            strayed.len(),
            first.join(", ")
        );
        Ok(())
    }
}

/// The pages that the guest writes, whatever it does.
pub(super) fn written(vm: &mut Vm) -> Result<Vec<(String, u64, u64)>> {
    let info = vm.execute("x-vm-info", json!({}))?;
    let ranges = info["writable-pages"].as_array().context("no writable-pages")?.iter();
    let range = |range: &Value| {
        let number = |name: &str| range[name].as_u64().context("no number");
        Ok((
            range["block"].as_str().context("no block")?.into(),
            number("first")?,
            number("pages")?,
        ))
    };
    ranges.map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(digests: &[u64]) -> Pages {
        let blocks = vec![("ram".into(), 4), ("rom".into(), 2)];
        Pages { blocks, digests: digests.iter().flat_map(|digest| digest.to_le_bytes()).collect() }
    }

    #[test]
    fn a_page_that_strayed_is_found_and_one_that_the_guest_writes_is_none() {
        let left = pages(&[1, 2, 3, 4, 5, 6]);
        let written = [("ram".to_owned(), 1, 2)];
        left.check_same(&left, &written).unwrap();
        left.check_same(&pages(&[1, 20, 30, 4, 5, 6]), &written).unwrap();
        for at in [0, 3, 4, 5] {
            let mut came = [1, 2, 3, 4, 5, 6];
            came[at] = 99;
            assert!(left.check_same(&pages(&came), &written).is_err(), "{at}");
        }
        assert!(left.check_same(&pages(&[1, 20, 3, 4, 5, 6]), &[]).is_err());
        let text = left.check_same(&pages(&[1, 2, 3, 4, 5, 7]), &written).unwrap_err().to_string();
        assert_eq!(text, "1 pages are not as they were at the source: rom 0x1");
    }
}
