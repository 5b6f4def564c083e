//! Is a page all zero? At the speed at which memory can be read.
//!
//! Most pages that are not zero say so in their first, middle or last word, which are looked at
//! first. All loads are volatile: the guest may write meanwhile, and then either answer is right,
//! since the dirty log knows of the write.
#![expect(unsafe_code, reason = "reads guest pages with vector loads")]

use std::ptr;
use std::sync::LazyLock;

use crate::{RamBlock, TARGET_PAGE, TargetPage};

const PAGE: usize = TARGET_PAGE.bytes();

/// One way to test a page.
struct Implementation {
    name: &'static str,
    /// Safe to call with the address of a readable page, aligned to 4096.
    test: unsafe fn(*const u8) -> bool,
}

static BEST: LazyLock<Implementation> =
    LazyLock::new(|| available().next().expect("the portable one is always there"));

/// What this processor can run, the fastest first.
fn available() -> impl Iterator<Item = Implementation> {
    let portable = Implementation { name: "portable", test: zero_portable };
    #[cfg(target_arch = "x86_64")]
    let vectors = [
        is_x86_feature_detected!("avx512f")
            .then_some(Implementation { name: "avx512", test: x86::zero_avx512 }),
        is_x86_feature_detected!("avx2")
            .then_some(Implementation { name: "avx2", test: x86::zero_avx2 }),
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let vectors: [Option<Implementation>; 0] = [];
    vectors.into_iter().flatten().chain([portable])
}

/// Which instructions the test uses on this processor: `avx512`, `avx2` or `portable`.
pub fn implementation() -> &'static str {
    BEST.name
}

impl RamBlock {
    /// Whether a target page holds nothing but zeros. A page never touched is zero, and reading
    /// it here maps the kernel's zero page (on hugetlb and shared memory: allocates it).
    ///
    /// # Panics
    /// When the page is outside the block.
    pub fn is_zero(&self, page: TargetPage) -> bool {
        let address = self.range(page.offset(), PAGE).expect("a page of the block").as_ptr();
        let words = [0, PAGE / 2, PAGE - 8].map(|at| {
            // SAFETY: within the page that `range` checked.
            let word = unsafe { address.add(at) };
            // SAFETY: readable and aligned, as blocks are page aligned.
            unsafe { ptr::read_volatile(word.cast::<u64>()) }
        });
        // SAFETY: a whole page of the block, as `range` checked; blocks are page aligned.
        words == [0; 3] && unsafe { (BEST.test)(address) }
    }
}

/// # Safety
/// `page` is a readable page, aligned to 4096.
unsafe fn zero_portable(page: *const u8) -> bool {
    let words = page.cast::<[u64; 8]>();
    (0..PAGE / 64).all(|at| {
        // SAFETY: inside the page.
        let line = unsafe { words.add(at) };
        // SAFETY: readable and aligned, by the caller's promise.
        let line = unsafe { ptr::read_volatile(line) };
        line.iter().fold(0, |all, word| all | word) == 0
    })
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256i, __m512i, _mm256_or_si256, _mm256_testz_si256, _mm512_or_si512,
        _mm512_test_epi64_mask,
    };
    use std::ptr;

    use super::PAGE;

    /// # Safety
    /// `page` is a readable page, aligned to 4096, and the processor has AVX-512F.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn zero_avx512(page: *const u8) -> bool {
        let vectors = page.cast::<[__m512i; 4]>();
        (0..PAGE / 256).all(|at| {
            // SAFETY: inside the page.
            let four = unsafe { vectors.add(at) };
            // SAFETY: readable and aligned, by the caller's promise.
            let [a, b, c, d] = unsafe { ptr::read_volatile(four) };
            let all = _mm512_or_si512(_mm512_or_si512(a, b), _mm512_or_si512(c, d));
            _mm512_test_epi64_mask(all, all) == 0
        })
    }

    /// # Safety
    /// `page` is a readable page, aligned to 4096, and the processor has AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn zero_avx2(page: *const u8) -> bool {
        let vectors = page.cast::<[__m256i; 4]>();
        (0..PAGE / 128).all(|at| {
            // SAFETY: inside the page.
            let four = unsafe { vectors.add(at) };
            // SAFETY: readable and aligned, by the caller's promise.
            let [a, b, c, d] = unsafe { ptr::read_volatile(four) };
            let all = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
            _mm256_testz_si256(all, all) == 1
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{PAGE, available};
    use crate::{RamBlock, TargetPage};

    #[test]
    fn every_byte_counts_in_every_implementation() {
        #[repr(align(4096))]
        struct Page([u8; PAGE]);
        let mut page = Box::new(Page([0; PAGE]));
        for way in available() {
            // SAFETY: a page, aligned, and nobody else's.
            assert!(unsafe { (way.test)(page.0.as_ptr()) }, "{}", way.name);
            for at in 0..PAGE {
                page.0[at] = 1 << (at % 8);
                // SAFETY: as above.
                assert!(!unsafe { (way.test)(page.0.as_ptr()) }, "{} at {at}", way.name);
                page.0[at] = 0;
            }
        }
    }

    #[test]
    fn a_page_is_told_from_its_neighbours() {
        let block = RamBlock::anonymous("ram", 0, 3 * 4096).unwrap();
        block.write(4096, &[0xff; 4096]).unwrap();
        assert_eq!([0, 1, 2].map(|page| block.is_zero(TargetPage(page))), [true, false, true]);
        for at in 4096..8192 {
            block.write_zeros(4096, 4096).unwrap();
            block.write(at, &[0x80]).unwrap();
            assert!(!block.is_zero(TargetPage(1)), "byte {at}");
        }
    }
}
