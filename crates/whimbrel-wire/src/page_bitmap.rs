//! Bitmaps of the pages of a block: page `n` is bit `n % 8` of byte `n / 8`, in whole 64-bit words.
//!
//! Mapped RAM keeps one in the file (in words of the source's byte order: little-endian on all
//! hosts supported here), and a recovering destination sends one on the return path.

use crate::TargetPage;

/// Bytes of the bitmap of a block of `used_length` bytes.
#[must_use]
pub const fn bitmap_len(used_length: u64, page: TargetPage) -> u64 {
    used_length.div_ceil(page.size()).div_ceil(64) * 8
}

/// Whether the bit of a page is set; pages beyond the bitmap have none.
#[must_use]
pub fn is_set(bitmap: &[u8], page_number: u64) -> bool {
    usize::try_from(page_number / 8)
        .ok()
        .and_then(|byte| bitmap.get(byte))
        .is_some_and(|byte| byte >> (page_number % 8) & 1 == 1)
}

/// Sets or clears the bit of a page.
///
/// # Panics
/// When the page lies beyond the bitmap.
pub fn set(bitmap: &mut [u8], page_number: u64, present: bool) {
    let byte = usize::try_from(page_number / 8).ok().and_then(|byte| bitmap.get_mut(byte));
    let byte = byte.expect("a page of the block that the bitmap was made for");
    let mask = 1 << (page_number % 8);
    if present {
        *byte |= mask;
    } else {
        *byte &= !mask;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn length_is_whole_words() {
        let page = TargetPage::FOUR_KIB;
        assert_eq!(bitmap_len(0, page), 0);
        assert_eq!(bitmap_len(0x1000, page), 8);
        assert_eq!(bitmap_len(64 * 0x1000, page), 8);
        assert_eq!(bitmap_len(64 * 0x1000 + 1, page), 16);
        assert_eq!(bitmap_len(8 << 20, page), 256);
        assert_eq!(bitmap_len(u64::MAX, page), 1 << 49);
    }

    #[test]
    fn bits_are_lowest_first() {
        let mut bitmap = [0; 8];
        set(&mut bitmap, 0, true);
        set(&mut bitmap, 9, true);
        assert_eq!(bitmap, [1, 2, 0, 0, 0, 0, 0, 0]);
        assert!(is_set(&bitmap, 9) && !is_set(&bitmap, 8) && !is_set(&bitmap, 64));
        set(&mut bitmap, 9, false);
        assert_eq!(bitmap, [1, 0, 0, 0, 0, 0, 0, 0]);
    }
}
