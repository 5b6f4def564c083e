//! A guest that dirties memory at a steady rate: a few hundred bytes without an operating system that
//! write to pages at random, a batch on every tick of the timer, and sleep in between, so that what
//! is measured is the migration and not the guest.

use super::super::multiboot::{self, Code};

/// Where its record lies: a magic, and how many ticks there have been.
pub(in crate::bench) const RECORD_AT: u32 = 2 << 20;
pub(in crate::bench) const RECORD_BYTES: u32 = 8;
const MAGIC: u32 = 0x6b63_6974;

const WORKING_SET_AT: u32 = 256 << 20;
/// Between the image and the record.
const STACK: u32 = RECORD_AT - 4096;
const TICKS_PER_SECOND: u32 = 100;
/// The timer's own rate, in Hz.
const TIMER_RATE: u32 = 1_193_182;
/// The step of the pseudo-random sequence: x -> x * MULTIPLIER + INCREMENT (Numerical Recipes).
const MULTIPLIER: u32 = 1_664_525;
const INCREMENT: u32 = 1_013_904_223;

const CODE_SEGMENT: u16 = 8;
const DATA_SEGMENT: u8 = 16;
/// The interrupts of the first controller begin at this vector.
const FIRST_VECTOR: u8 = 32;
const VECTORS: usize = 48;

/// How many ticks its record, as read out of its memory, says; `None` before it has begun.
pub(in crate::bench) fn ticks(record: &[u8]) -> Option<u32> {
    let word = |at: usize| Some(u32::from_le_bytes(record.get(at..at + 4)?.try_into().ok()?));
    (word(0)? == MAGIC).then(|| word(4))?
}

/// A guest that writes to so many pages a second, of a working set of so many MiB.
pub(in crate::bench) fn image(pages_per_second: u32, working_set_mib: u32) -> Vec<u8> {
    let mut code = Code::default();
    let tables = tables(&mut code);
    prepare(&mut code, &tables);
    write_for_ever(&mut code, (pages_per_second / TICKS_PER_SECOND).max(1), working_set_mib * 256);
    multiboot::image(&code, RECORD_AT + RECORD_BYTES)
}

/// A guest that says that it has begun, and then does nothing at all.
pub(in crate::bench) fn still() -> Vec<u8> {
    let mut code = Code::default();
    code.raw(&[0xfa]); //                                 cli
    code.raw(&[0xc7, 0x05]).word(RECORD_AT + 4).word(1); // mov dword [RECORD_AT+4], 1
    code.raw(&[0xc7, 0x05]).word(RECORD_AT).word(MAGIC); // mov dword [RECORD_AT], MAGIC
    let halt = code.len();
    code.raw(&[0xf4, 0xe9]).back_to(halt); //             hlt; jmp halt
    multiboot::image(&code, RECORD_AT + RECORD_BYTES)
}

/// Where the descriptions of the two tables lie.
struct Tables {
    segments: u32,
    interrupts: u32,
}

/// A jump over the tables, and the tables. A Multiboot loader's own are gone once it has jumped.
fn tables(code: &mut Code) -> Tables {
    const SEGMENTS: [u32; 6] = [0, 0, 0x0000_ffff, 0x00cf_9a00, 0x0000_ffff, 0x00cf_9200];
    const HANDLER: [u8; 7] = [
        0x50, //       push eax
        0xb0, 0x20, // mov al, 0x20
        0xe6, 0x20, // out 0x20, al: the interrupt is served
        0x58, //       pop eax
        0xcf, //       iretd
    ];
    let over = size_of_val(&SEGMENTS) + HANDLER.len() + VECTORS * 8 + 2 * 6;
    code.raw(&[0xe9]).word(u32::try_from(over).expect("short")); // jmp
    let segments_at = code.address();
    for word in SEGMENTS {
        code.word(word);
    }
    let handler = code.address();
    code.raw(&HANDLER);
    let vectors_at = code.address();
    for vector in 0..VECTORS {
        if vector < usize::from(FIRST_VECTOR) {
            code.word(0).word(0); // an exception ends the guest
        } else {
            code.word(u32::from(CODE_SEGMENT) << 16 | handler & 0xffff);
            code.word(handler & 0xffff_0000 | 0x8e00);
        }
    }
    let mut described = |at: u32, bytes: usize| {
        let description = code.address();
        code.raw(&u16::try_from(bytes - 1).expect("short").to_le_bytes()).word(at);
        description
    };
    Tables {
        segments: described(segments_at, size_of_val(&SEGMENTS)),
        interrupts: described(vectors_at, VECTORS * 8),
    }
}

fn prepare(code: &mut Code, tables: &Tables) {
    code.raw(&[0xfa]); //                                 cli
    code.raw(&[0x0f, 0x01, 0x15]).word(tables.segments); // lgdt [segments]
    let next = code.address() + 7;
    code.raw(&[0xea]).word(next).raw(&CODE_SEGMENT.to_le_bytes()); // jmp CODE_SEGMENT:next
    code.raw(&[0x66, 0xb8, DATA_SEGMENT, 0]); //          mov ax, DATA_SEGMENT
    code.raw(&[0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0]); //   mov ds, ax; mov es, ax; mov ss, ax
    code.raw(&[0xbc]).word(STACK); //                     mov esp, STACK
    let [low, high, ..] = (TIMER_RATE / TICKS_PER_SECOND).to_le_bytes();
    // The interrupt controller: vectors from FIRST_VECTOR on, nothing but the timer; the timer: periodic.
    let ports = [
        (0x20, 0x11),
        (0x21, FIRST_VECTOR),
        (0x21, 0x04),
        (0x21, 0x01),
        (0x21, 0xfe),
        (0xa1, 0xff),
        (0x43, 0x34),
        (0x40, low),
        (0x40, high),
    ];
    for (port, value) in ports {
        code.raw(&[0xb0, value, 0xe6, port]); //          mov al, value; out port, al
    }
    code.raw(&[0x0f, 0x01, 0x1d]).word(tables.interrupts); // lidt [interrupts]
    code.raw(&[0x0f, 0x31, 0x89, 0xc6]); //               rdtsc; mov esi, eax
    code.raw(&[0xc7, 0x05]).word(RECORD_AT + 4).word(0); // mov dword [RECORD_AT+4], 0
    code.raw(&[0xc7, 0x05]).word(RECORD_AT).word(MAGIC); // mov dword [RECORD_AT], MAGIC
}

fn write_for_ever(code: &mut Code, pages_per_tick: u32, pages: u32) {
    let tick = code.len();
    code.raw(&[0xff, 0x05]).word(RECORD_AT + 4); //       inc dword [RECORD_AT+4]
    code.raw(&[0xbd]).word(pages_per_tick); //            mov ebp, pages_per_tick
    let write = code.len();
    code.raw(&[0x69, 0xf6]).word(MULTIPLIER); //          imul esi, esi, MULTIPLIER
    code.raw(&[0x81, 0xc6]).word(INCREMENT); //           add esi, INCREMENT
    code.raw(&[0xb8]).word(pages); //                     mov eax, pages
    code.raw(&[0xf7, 0xe6]); //                           mul esi: edx is below pages
    code.raw(&[0xc1, 0xe2, 12]); //                       shl edx, 12
    code.raw(&[0x89, 0xb2]).word(WORKING_SET_AT); //      mov [edx+WORKING_SET_AT], esi
    code.raw(&[0x4d]); //                                 dec ebp
    code.raw(&[0x0f, 0x85]).back_to(write); //            jnz write
    code.raw(&[0xfb, 0xf4]); //                           sti; hlt
    code.raw(&[0xe9]).back_to(tick); //                   jmp tick
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_fits_below_its_record() {
        let image = image(20_000, 128);
        assert!(multiboot::LOAD_AT + u32::try_from(image.len()).unwrap() <= STACK - 4096);
        // The first jump ends where the interrupts are switched off.
        let over = u32::from_le_bytes(image[33..37].try_into().unwrap()) as usize;
        assert_eq!((image[32], image[37 + over]), (0xe9, 0xfa));
    }

    #[test]
    fn a_record_is_told_from_what_lay_there() {
        let record = |magic: u32, ticks: u32| [magic.to_le_bytes(), ticks.to_le_bytes()].concat();
        assert_eq!(ticks(&record(MAGIC, 7)), Some(7));
        assert_eq!(ticks(&record(0, 7)), None);
        assert_eq!(ticks(&record(MAGIC, 7)[..6]), None);
    }
}
