//! A guest of 512 bytes: no kernel, only memory that must arrive as it was.
//!
//! It fills 8 MiB with pseudo-random words. Then, for ever: it increments the first word of each
//! of 256 pages and compares it with the number of the pass (a page that arrived stale, or not at
//! all, no longer agrees), sums the 8 MiB up again, and writes
//! `pass=XXXXXXXX sum=XXXXXXXX errors=XXXXXXXX` to the first serial port.
//!
//! The passes it reports have no gap and no repetition, so what two sides of a migration wrote,
//! put together, must read like one guest that never moved, to the very character.

use std::fs;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use super::{Guest, both_sides};
use crate::console::{Report, reports};

/// Where the firmware loads a boot sector.
const ORIGIN: u32 = 0x7c00;
const SECTOR_BYTES: usize = 512;
/// The firmware boots from no disk that is smaller than a cylinder.
const DISK_BYTES: usize = 1 << 20;
const COUNTERS_AT: u32 = 8 << 20;
const COUNTER_PAGES: u32 = 256;
const RANDOM_AT: u32 = 16 << 20;
const RANDOM_WORDS: u32 = (8 << 20) / 4;
/// The step of the pseudo-random sequence: x -> x * MULTIPLIER + INCREMENT (Numerical Recipes).
const MULTIPLIER: u32 = 1_664_525;
const INCREMENT: u32 = 1_013_904_223;

/// The guest, with the seed of its memory.
#[derive(Debug, Clone, Copy)]
pub struct BootSector {
    /// Decides the content of the 8 MiB.
    pub seed: u32,
}

impl Guest for BootSector {
    fn arguments(&self, folder: &Path) -> Result<Vec<String>> {
        let image = folder.join("boot-sector.img");
        if !image.exists() {
            let mut disk = self.sector();
            disk.resize(DISK_BYTES, 0);
            fs::write(&image, disk).with_context(|| image.display().to_string())?;
        }
        let drive = format!("if=virtio,format=raw,readonly=on,file={}", image.display());
        Ok(["-drive", &drive].map(str::to_owned).to_vec())
    }

    fn mebibytes(&self) -> u32 {
        32
    }

    fn settled_lines(&self) -> usize {
        10
    }

    fn written(&self) -> Option<Vec<Range<u32>>> {
        // The stack, which ends where the code begins, and the counters.
        Some(vec![0x7000..0x8000, COUNTERS_AT..COUNTERS_AT + COUNTER_PAGES * 4096])
    }

    fn check_continues(&self, before: &str, after: &str) -> Result<()> {
        both_sides(before, after)?;
        let said = reports(&format!("{before}{after}"));
        let expected_sum = format!("{:08X}", self.sum());
        for (report, expected) in said.iter().zip(1_u32..) {
            let pass = hex(report, "pass")?;
            ensure!(pass == expected, "pass {expected} expected, the guest said {report:?}");
            ensure!(hex(report, "errors")? == 0, "the guest found errors: {report:?}");
            let sum = report.get("sum")?;
            ensure!(sum == expected_sum, "sum {expected_sum} expected in {report:?}");
        }
        Ok(())
    }
}

fn hex(report: &Report, field: &str) -> Result<u32> {
    let value = report.get(field)?;
    u32::from_str_radix(value, 16).with_context(|| format!("{field} in {report:?}"))
}

impl BootSector {
    /// What the guest's sum over its memory must be.
    fn sum(&self) -> u32 {
        let mut word = self.seed;
        let mut sum = 0_u32;
        for _ in 0..RANDOM_WORDS {
            word = word.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT);
            sum = sum.wrapping_add(word).rotate_left(5);
        }
        sum
    }

    /// The sector's bytes.
    fn sector(&self) -> Vec<u8> {
        let mut code = Code::default();
        enter_protected_mode(&mut code);
        self.fill_memory(&mut code);
        passes(&mut code);
        let Code { mut bytes, patches } = code;
        let routines = routines(&mut bytes);
        for (at, routine) in patches {
            patch_near(&mut bytes, at, routine.of(&routines));
        }
        assert!(bytes.len() <= SECTOR_BYTES - 2, "the sector is full: {} bytes", bytes.len());
        bytes.resize(SECTOR_BYTES - 2, 0);
        bytes.extend([0x55, 0xaa]);
        bytes
    }

    fn fill_memory(&self, code: &mut Code) {
        code.load_edi(RANDOM_AT);
        code.load_ecx(RANDOM_WORDS);
        code.raw(&[0xb8]).word(self.seed); //        mov eax, seed
        let next = code.here();
        code.raw(&[0x69, 0xc0]).word(MULTIPLIER); // imul eax, eax, MULTIPLIER
        code.raw(&[0x05]).word(INCREMENT); //        add eax, INCREMENT
        code.raw(&[0xab]); //                        stosd
        code.loop_to(next);
        code.load_edi(COUNTERS_AT);
        code.load_ecx(COUNTER_PAGES * 1024);
        code.raw(&[0x31, 0xc0]); //                  xor eax, eax
        code.raw(&[0xf3, 0xab]); //                  rep stosd
    }
}

fn enter_protected_mode(code: &mut Code) {
    code.raw(&[0xfa]); //                            cli
    code.raw(&[0x31, 0xc0, 0x8e, 0xd8]); //          xor ax, ax; mov ds, ax
    code.raw(&[0x0f, 0x01, 0x16]); //                lgdt [pointer]
    let pointer_operand = code.here();
    code.raw(&[0, 0]);
    code.raw(&[0x0f, 0x20, 0xc0]); //                mov eax, cr0
    code.raw(&[0x0c, 0x01]); //                      or al, 1
    code.raw(&[0x0f, 0x22, 0xc0]); //                mov cr0, eax
    code.raw(&[0xea]); //                            jmp 0x08:flat
    let flat_operand = code.here();
    code.raw(&[0, 0, 0x08, 0x00]);

    let table = code.here();
    code.raw(&[0; 8]);
    code.raw(&[0xff, 0xff, 0, 0, 0, 0x9a, 0xcf, 0]); // 0x08: code, 4 GiB
    code.raw(&[0xff, 0xff, 0, 0, 0, 0x92, 0xcf, 0]); // 0x10: data, 4 GiB
    let pointer = code.here();
    code.raw(&[23, 0]).word(address(table)); //      limit, base

    let flat = code.here();
    code.raw(&[0x66, 0xb8, 0x10, 0x00]); //          mov ax, 0x10
    code.raw(&[0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0]); // mov ds, ax; mov es, ax; mov ss, ax
    code.raw(&[0xbc]).word(ORIGIN); //               mov esp, ORIGIN
    code.raw(&[0xfc]); //                            cld
    for (operand, target) in [(pointer_operand, pointer), (flat_operand, flat)] {
        code.bytes[operand..operand + 2].copy_from_slice(&address(target).to_le_bytes()[..2]);
    }
}

/// The endless part. ebx: the pass, ebp: errors found, edx: the sum.
fn passes(code: &mut Code) {
    code.raw(&[0x31, 0xdb, 0x31, 0xed]); //          xor ebx, ebx; xor ebp, ebp
    let pass = code.here();
    code.raw(&[0x43]); //                            inc ebx
    code.load_edi(COUNTERS_AT);
    code.load_ecx(COUNTER_PAGES);
    let next_page = code.here();
    code.raw(&[0xff, 0x07]); //                      inc dword [edi]
    code.raw(&[0x39, 0x1f]); //                      cmp [edi], ebx
    code.raw(&[0x74, 0x01]); //                      je over the next instruction
    code.raw(&[0x45]); //                            inc ebp
    code.raw(&[0x81, 0xc7]).word(4096); //           add edi, 4096
    code.loop_to(next_page);
    code.raw(&[0xbe]).word(RANDOM_AT); //            mov esi, RANDOM_AT
    code.load_ecx(RANDOM_WORDS);
    code.raw(&[0x31, 0xd2]); //                      xor edx, edx
    let next_word = code.here();
    code.raw(&[0xad]); //                            lodsd
    code.raw(&[0x01, 0xc2]); //                      add edx, eax
    code.raw(&[0xc1, 0xc2, 0x05]); //                rol edx, 5
    code.loop_to(next_word);
    for (text, value) in [
        ("pass=", [0x89, 0xd8]),    //               mov eax, ebx
        (" sum=", [0x89, 0xd0]),    //               mov eax, edx
        (" errors=", [0x89, 0xe8]), //               mov eax, ebp
    ] {
        code.call(Routine::Text);
        code.raw(text.as_bytes()).raw(&[0]);
        code.raw(&value);
        code.call(Routine::Hex);
    }
    code.raw(&[0xb0, b'\n']); //                     mov al, '\n'
    code.call(Routine::Byte);
    code.raw(&[0xe9]); //                            jmp pass
    let operand = code.here();
    code.raw(&[0; 4]);
    patch_near(&mut code.bytes, operand, pass);
}

/// What writes to the serial port.
#[derive(Debug, Clone, Copy)]
enum Routine {
    Byte,
    Hex,
    Text,
}

impl Routine {
    fn of(self, at: &Routines) -> usize {
        match self {
            Self::Byte => at.put_byte,
            Self::Hex => at.put_hex,
            Self::Text => at.put_text,
        }
    }
}

struct Routines {
    put_byte: usize,
    put_hex: usize,
    put_text: usize,
}

fn routines(bytes: &mut Vec<u8>) -> Routines {
    // al to the serial port, once its transmitter is free. Keeps every register.
    let put_byte = bytes.len();
    bytes.extend([0x52, 0x50]); //                   push edx; push eax
    bytes.extend([0x66, 0xba, 0xfd, 0x03]); //       mov dx, 0x3fd
    bytes.extend([0xec, 0xa8, 0x20]); //             wait: in al, dx; test al, 0x20
    bytes.extend([0x74, 0xfb]); //                   jz wait
    bytes.extend([0x58]); //                         pop eax
    bytes.extend([0x66, 0xba, 0xf8, 0x03, 0xee]); // mov dx, 0x3f8; out dx, al
    bytes.extend([0x5a, 0xc3]); //                   pop edx; ret

    // eax as eight digits.
    let put_hex = bytes.len();
    bytes.extend([0xb9, 8, 0, 0, 0]); //             mov ecx, 8
    let digit = bytes.len();
    bytes.extend([0xc1, 0xc0, 0x04, 0x50]); //       rol eax, 4; push eax
    bytes.extend([0x24, 0x0f, 0x3c, 0x0a]); //       and al, 15; cmp al, 10
    bytes.extend([0x72, 0x02, 0x04, 0x07]); //       jb over; add al, 'A' - '9' - 1
    bytes.extend([0x04, 0x30]); //                   add al, '0'
    call_back(bytes, put_byte);
    bytes.extend([0x58]); //                         pop eax
    loop_back(bytes, digit);
    bytes.extend([0xc3]); //                         ret

    // The text that follows the call, up to its zero; returns behind it.
    let put_text = bytes.len();
    bytes.extend([0x5e]); //                         pop esi
    let character = bytes.len();
    bytes.extend([0xac, 0x84, 0xc0]); //             lodsb; test al, al
    bytes.extend([0x74, 0x07]); //                   jz end
    call_back(bytes, put_byte);
    bytes.extend([0xeb, short(bytes.len() + 2, character)]); // jmp character
    bytes.extend([0xff, 0xe6]); //                   end: jmp esi
    Routines { put_byte, put_hex, put_text }
}

fn call_back(bytes: &mut Vec<u8>, target: usize) {
    bytes.push(0xe8);
    let operand = bytes.len();
    bytes.extend([0; 4]);
    patch_near(bytes, operand, target);
}

fn loop_back(bytes: &mut Vec<u8>, target: usize) {
    let operand = short(bytes.len() + 2, target);
    bytes.extend([0xe2, operand]);
}

/// Fills in a 32-bit relative operand, counted from behind it.
fn patch_near(bytes: &mut [u8], operand: usize, target: usize) {
    let distance = address(target).wrapping_sub(address(operand + 4));
    bytes[operand..operand + 4].copy_from_slice(&distance.to_le_bytes());
}

/// An 8-bit relative operand, counted from `behind` it.
fn short(behind: usize, target: usize) -> u8 {
    let [distance, sign @ ..] = address(target).wrapping_sub(address(behind)).to_le_bytes();
    assert!(sign == [0xff; 3] && distance >= 0x80, "only short jumps back are encoded");
    distance
}

fn address(offset: usize) -> u32 {
    ORIGIN + u32::try_from(offset).expect("a sector is short")
}

/// Bytes with calls to routines whose place is not known yet.
#[derive(Default)]
struct Code {
    bytes: Vec<u8>,
    patches: Vec<(usize, Routine)>,
}

impl Code {
    fn here(&self) -> usize {
        self.bytes.len()
    }

    fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend(bytes);
        self
    }

    fn word(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    fn load_edi(&mut self, value: u32) {
        self.raw(&[0xbf]).word(value);
    }

    fn load_ecx(&mut self, value: u32) {
        self.raw(&[0xb9]).word(value);
    }

    fn loop_to(&mut self, target: usize) {
        loop_back(&mut self.bytes, target);
    }

    fn call(&mut self, routine: Routine) {
        self.raw(&[0xe8]);
        self.patches.push((self.here(), routine));
        self.raw(&[0; 4]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(pass: u32, sum: u32, errors: u32) -> String {
        format!("pass={pass:08X} sum={sum:08X} errors={errors:08X}\n")
    }

    #[test]
    fn a_sector_is_a_sector() {
        let sector = BootSector { seed: 1 }.sector();
        assert_eq!(sector.len(), SECTOR_BYTES);
        assert_eq!(sector[510..], [0x55, 0xaa]);
    }

    #[test]
    fn a_move_inside_a_line_is_seamless() {
        let guest = BootSector { seed: 7 };
        let whole: String = (1..5).map(|pass| line(pass, guest.sum(), 0)).collect();
        for cut in 43..100 {
            guest.check_continues(&whole[..cut], &whole[cut..]).unwrap();
        }
    }

    #[test]
    fn every_loss_is_noticed() {
        let guest = BootSector { seed: 7 };
        let good = line(1, guest.sum(), 0);
        for bad in [
            line(1, guest.sum(), 0),     // started again
            line(3, guest.sum(), 0),     // lost a pass
            line(2, guest.sum() ^ 1, 0), // memory changed
            line(2, guest.sum(), 1),     // a counter was stale
            String::new(),               // never ran
        ] {
            assert!(guest.check_continues(&good, &bad).is_err(), "{bad}");
        }
    }
}
