//! The guest: one vCPU that writes at random, for ever, and times every single touch.
//!
//! QEMU before 10.1 does not say how long a fault takes, and a figure of the guest's own is the
//! same for every pair of contenders: what is measured is what a guest feels. It is some 200
//! bytes of machine code without an operating system, loaded through a Multiboot header, in
//! protected mode without paging.
//!
//! First it fills its working set, so that no page of it is zero. Then it touches a page of it at
//! random, over and over: it stores a word there, reads when it touched that host page last, and
//! stores the time instead. A touch that takes long goes into a log beside the code, with when that
//! host page was touched last: [`super::clock`] tells by it which of them were faults.

use super::clock;
use super::pair::Pages;
use crate::bench::multiboot::{self, Code};

/// Where its record is.
pub(super) const RECORD_AT: u32 = 2 << 20;
/// The working set begins here, at a boundary of every page size but 1 GiB.
const WORKING_SET_AT: u32 = 256 << 20;

/// The step of the pseudo-random sequence: x -> x * MULTIPLIER + INCREMENT (Numerical Recipes).
const MULTIPLIER: u32 = 1_664_525;
const INCREMENT: u32 = 1_013_904_223;
const PAGE_BYTES: u32 = 4096;

/// The guest, with the size of what it writes to.
#[derive(Debug, Clone, Copy)]
pub(in crate::bench) struct Writer {
    /// Of 4 KiB.
    pages: u32,
}

impl Writer {
    /// What lies below and above the working set: the guest itself, and what the firmware keeps.
    const BESIDE_MIB: u32 = 512;

    /// A writer for a guest of so much memory; `None` if that is too little, or more than lies
    /// below the 32-bit devices.
    pub(in crate::bench) fn in_memory(mib: u32) -> Option<Self> {
        let working_set = mib.checked_sub(Self::BESIDE_MIB).filter(|mib| *mib > 0)?;
        (mib <= 2048).then_some(Self { pages: working_set * 256 })
    }

    /// How much it writes to.
    pub(super) fn working_set_mib(self) -> u32 {
        self.pages / 256
    }

    /// The image, as a kernel for QEMU, for memory of these host pages.
    pub(super) fn image(self, host_pages: Pages) -> Vec<u8> {
        let mut code = Code::default();
        self.fill(&mut code);
        self.write_for_ever(&mut code, host_pages);
        multiboot::image(&code, RECORD_AT + clock::RECORD_BYTES)
    }

    fn fill(self, code: &mut Code) {
        code.raw(&[0xfc]); //                            cld
        code.raw(&[0x0f, 0x31]); //                      rdtsc
        code.raw(&[0x89, 0xc6]); //                      mov esi, eax: where the sequence begins
        code.raw(&[0x0f, 0xac, 0xd0, clock::STAMP_SHIFT]); // shrd eax, edx, STAMP_SHIFT
        code.raw(&[0x83, 0xc8, 1]); //                   or eax, 1
        code.raw(&[0xbf]).word(WORKING_SET_AT); //       mov edi, WORKING_SET_AT
        code.raw(&[0xb9]).word(self.pages * (PAGE_BYTES / 4)); // mov ecx, words
        code.raw(&[0xf3, 0xab]); //                      rep stosd
    }

    /// esi: the sequence. ebx: the record.
    fn write_for_ever(self, code: &mut Code, host_pages: Pages) {
        code.raw(&[0xbb]).word(RECORD_AT); //            mov ebx, RECORD_AT
        code.raw(&[0xc7, 0x03]).word(clock::MAGIC); //   mov dword [ebx], MAGIC
        let next = code.len();
        code.raw(&[0x69, 0xf6]).word(MULTIPLIER); //     imul esi, esi, MULTIPLIER
        code.raw(&[0x81, 0xc6]).word(INCREMENT); //      add esi, INCREMENT
        code.raw(&[0xb8]).word(self.pages); //           mov eax, pages
        code.raw(&[0xf7, 0xe6]); //                      mul esi: edx is below pages
        code.raw(&[0xc1, 0xe2, 12]); //                  shl edx, 12
        code.raw(&[0x8d, 0xba]).word(WORKING_SET_AT + 8); // lea edi, [edx+WORKING_SET_AT+8]
        code.raw(&[0x0f, 0x31]); //                      rdtsc
        code.raw(&[0x89, 0xc1]); //                      mov ecx, eax
        code.raw(&[0x89, 0xd5]); //                      mov ebp, edx
        code.raw(&[0x0f, 0xac, 0xd0, clock::STAMP_SHIFT]); // shrd eax, edx, STAMP_SHIFT
        code.raw(&[0x89, 0x07]); //                      mov [edi], eax: faults
        code.raw(&[0x81, 0xe7]).word(0_u32.wrapping_sub(host_pages.bytes())); // and edi, -bytes
        code.raw(&[0x8b, 0x17]); //                      mov edx, [edi]
        code.raw(&[0x89, 0x07]); //                      mov [edi], eax
        code.raw(&[0x89, 0xd7]); //                      mov edi, edx
        code.raw(&[0x0f, 0x31]); //                      rdtsc
        code.raw(&[0x89, 0x43, clock::NOW_AT]); //       mov [ebx+NOW_AT], eax
        code.raw(&[0x89, 0x53, clock::NOW_AT + 4]); //   mov [ebx+NOW_AT+4], edx
        code.raw(&[0x29, 0xc8]); //                      sub eax, ecx
        code.raw(&[0x19, 0xea]); //                      sbb edx, ebp
        code.raw(&[0x0f, 0xac, 0xd0, clock::UNIT_SHIFT]); // shrd eax, edx, UNIT_SHIFT
        code.raw(&[0x3d]).word(clock::SLOW_UNITS); //    cmp eax, SLOW_UNITS
        code.raw(&[0x0f, 0x82]).back_to(next); //        jb next
        code.raw(&[0x8b, 0x4b, clock::COUNT_AT]); //     mov ecx, [ebx+COUNT_AT]
        code.raw(&[0x89, 0xca]); //                      mov edx, ecx
        code.raw(&[0x81, 0xe1]).word(clock::ENTRIES - 1); // and ecx, ENTRIES - 1
        code.raw(&[0x89, 0x44, 0xcb, clock::LOG_AT]); // mov [ebx+ecx*8+LOG_AT], eax
        code.raw(&[0x89, 0x7c, 0xcb, clock::LOG_AT + 4]); // mov [ebx+ecx*8+LOG_AT+4], edi
        code.raw(&[0x42]); //                            inc edx
        code.raw(&[0x89, 0x53, clock::COUNT_AT]); //     mov [ebx+COUNT_AT], edx
        code.raw(&[0xe9]).back_to(next); //              jmp next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_lies_below_its_record() {
        let image = Writer::in_memory(2048).unwrap().image(Pages::Huge);
        assert!(multiboot::LOAD_AT + u32::try_from(image.len()).unwrap() <= RECORD_AT);
    }

    #[test]
    fn the_working_set_leaves_room() {
        assert_eq!(Writer::in_memory(2048).unwrap().working_set_mib(), 1536);
        assert!(Writer::in_memory(512).is_none());
        assert!(Writer::in_memory(4096).is_none());
    }
}
