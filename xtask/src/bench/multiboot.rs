//! Guests of some hundred bytes: 32-bit machine code that a QEMU loads through a Multiboot header, in
//! protected mode without paging, with interrupts off.

/// Where an image is loaded.
pub(super) const LOAD_AT: u32 = 1 << 20;

const MAGIC: u32 = 0x1bad_b002;
/// The header says where to load, so that the image needs no other format.
const ADDRESSES: u32 = 1 << 16;
const HEADER_BYTES: u32 = 32;

/// The image of this code, as a kernel for QEMU; memory from its end to `zero_to` is made zero.
pub(super) fn image(code: &Code, zero_to: u32) -> Vec<u8> {
    let header = [
        MAGIC,
        ADDRESSES,
        0_u32.wrapping_sub(MAGIC).wrapping_sub(ADDRESSES), // checksum
        LOAD_AT,                                           // this header
        LOAD_AT,                                           // the first byte to load
        code.address(),                                    // behind the last
        zero_to,                                           // behind what is to be zero
        LOAD_AT + HEADER_BYTES,                            // where to begin
    ];
    header.into_iter().flat_map(u32::to_le_bytes).chain(code.0.iter().copied()).collect()
}

/// Machine code as it grows.
#[derive(Debug, Default)]
pub(super) struct Code(Vec<u8>);

impl Code {
    /// Appends bytes as they are.
    pub(super) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend(bytes);
        self
    }

    /// Appends an operand or a word of data.
    pub(super) fn word(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// How long it is: what a jump back to here is told.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Where the next byte will lie in the guest's memory.
    pub(super) fn address(&self) -> u32 {
        LOAD_AT + HEADER_BYTES + u32::try_from(self.0.len()).expect("the guest is short")
    }

    /// The operand of a near jump, counted from behind it.
    pub(super) fn back_to(&mut self, target: usize) {
        let distance = u32::try_from(self.0.len() + 4 - target).expect("the guest is short");
        self.word(0_u32.wrapping_sub(distance));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_one() {
        let mut code = Code::default();
        code.raw(&[0xf4]).word(7);
        let image = image(&code, LOAD_AT + 4096);
        let words: Vec<u32> = image[..32]
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
            .collect();
        assert_eq!(words[0].wrapping_add(words[1]).wrapping_add(words[2]), 0);
        assert_eq!(words[5] - words[4], u32::try_from(image.len()).unwrap());
        assert_eq!(image[32..], [0xf4, 7, 0, 0, 0]);
    }
}
