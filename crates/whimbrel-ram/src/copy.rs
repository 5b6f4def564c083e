//! Copies to and from memory that somebody else writes at the same time.
//!
//! To Rust a racing access is undefined behaviour, to the processor it is not: it may only tear
//! what is copied. So the processor does it, in an instruction that the compiler cannot see
//! through; where there is none, volatile words do.
#![expect(unsafe_code, reason = "copies between raw addresses")]

/// Copies `len` bytes.
///
/// # Safety
/// `from..from+len` is readable, `to..to+len` writable, and they do not overlap. One side may be
/// written by others meanwhile; no Rust reference to that side lives.
pub(crate) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: by the caller's promise; the ABI guarantees that the direction flag is clear.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags)
        );
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    // SAFETY: by the caller's promise.
    unsafe {
        words::copy(from, to, len);
    }
}

/// Makes `len` bytes zero.
///
/// # Safety
/// `to..to+len` is writable, and no Rust reference to it lives.
pub(crate) unsafe fn zero(to: *mut u8, len: usize) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: by the caller's promise; the ABI guarantees that the direction flag is clear.
    unsafe {
        std::arch::asm!(
            "rep stosb",
            inout("rcx") len => _,
            inout("rdi") to => _,
            in("al") 0u8,
            options(nostack, preserves_flags)
        );
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    // SAFETY: by the caller's promise.
    unsafe {
        words::zero(to, len);
    }
}

/// Volatile words where both sides are aligned, volatile bytes for the rest.
#[cfg(any(test, miri, not(target_arch = "x86_64")))]
mod words {
    use std::ptr;

    const WORD: usize = size_of::<u64>();

    /// # Safety
    /// As for [`super::copy`].
    pub(super) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
        let mut at = 0;
        while at < len {
            let (from, to) = (from.wrapping_add(at), to.wrapping_add(at));
            let aligned = (from.addr() | to.addr()).is_multiple_of(WORD);
            if aligned && len - at >= WORD {
                // SAFETY: readable by the caller's promise, and aligned as just seen.
                let word = unsafe { ptr::read_volatile(from.cast::<u64>()) };
                // SAFETY: writable by the caller's promise, and aligned as just seen.
                unsafe { ptr::write_volatile(to.cast::<u64>(), word) };
                at += WORD;
            } else {
                // SAFETY: readable by the caller's promise.
                let byte = unsafe { ptr::read_volatile(from) };
                // SAFETY: writable by the caller's promise.
                unsafe { ptr::write_volatile(to, byte) };
                at += 1;
            }
        }
    }

    /// # Safety
    /// As for [`super::zero`].
    pub(super) unsafe fn zero(to: *mut u8, len: usize) {
        for at in 0..len {
            // SAFETY: writable by the caller's promise.
            unsafe { ptr::write_volatile(to.wrapping_add(at), 0) };
        }
    }
}

#[cfg(test)]
mod tests {
    type Copy = unsafe fn(*const u8, *mut u8, usize);
    type Zero = unsafe fn(*mut u8, usize);

    #[test]
    fn copies_exactly_what_it_should() {
        let ways: [(Copy, Zero); 2] =
            [(super::copy, super::zero), (super::words::copy, super::words::zero)];
        let source: Vec<u8> = (0..200u8).collect();
        for (copy, zero) in ways {
            for (from, to, len) in [(0, 0, 200), (1, 9, 100), (3, 5, 64), (8, 16, 7), (5, 5, 0)] {
                let mut target = [0xee; 200];
                // SAFETY: both ends are inside their vectors.
                unsafe {
                    copy(source[from..][..len].as_ptr(), target[to..][..len].as_mut_ptr(), len)
                };
                assert_eq!(target[to..to + len], source[from..from + len]);
                assert!(target[..to].iter().chain(&target[to + len..]).all(|&byte| byte == 0xee));
                // SAFETY: inside the vector.
                unsafe { zero(target[to..][..len].as_mut_ptr(), len) };
                assert!(target[to..to + len].iter().all(|&byte| byte == 0));
                assert!(target[..to].iter().chain(&target[to + len..]).all(|&byte| byte == 0xee));
            }
        }
    }
}
