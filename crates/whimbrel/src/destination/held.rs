//! Device sections that have come whole and are not loaded yet: no more than can be held.

use whimbrel_wire::DeviceSection;

use crate::error::Error;

/// Most bytes of a machine's devices that are held: as many as the largest package has. One section
/// has 64 MiB at most, which the decoder sees to; how many there are is the source's to say.
const DEVICES_MAX: usize = 1 << 30;

/// What a section takes beside its payload.
const OVERHEAD: usize = size_of::<DeviceSection>() + 256;

/// Sections in the order in which they came.
#[derive(Debug)]
pub(super) struct HeldSections {
    sections: Vec<DeviceSection>,
    bytes: usize,
    max: usize,
}

impl Default for HeldSections {
    fn default() -> HeldSections {
        HeldSections { sections: Vec::new(), bytes: 0, max: DEVICES_MAX }
    }
}

impl HeldSections {
    /// Takes one that ends at byte `end` of the main channel.
    pub(super) fn push(&mut self, section: DeviceSection, end: u64) -> Result<(), Error> {
        self.bytes = self.bytes.saturating_add(section.payload.len() + OVERHEAD);
        if self.bytes > self.max {
            return Err(Error::Refused(format!(
                "main channel, byte {end}: device section {} is one too many: a machine's devices \
                 have {} bytes at most",
                section.header.name, self.max
            )));
        }
        self.sections.push(section);
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sections.is_empty()
    }

    /// All of them, to be loaded.
    pub(super) fn take(&mut self) -> Vec<DeviceSection> {
        self.bytes = 0;
        std::mem::take(&mut self.sections)
    }
}

#[cfg(test)]
mod tests {
    use whimbrel_wire::{Name, SectionHeader, SectionId};

    use super::*;

    fn section(payload: usize) -> DeviceSection {
        let name = Name::new("disk").unwrap();
        let header = SectionHeader { id: SectionId(7), name, instance_id: 0, version_id: 1 };
        DeviceSection { header, payload: vec![0; payload] }
    }

    #[test]
    fn no_more_is_held_than_fits_in_few_sections_or_in_many() {
        for payload in [0, 1000] {
            let mut held = HeldSections { max: 100_000, ..HeldSections::default() };
            let fit = 100_000 / (payload + OVERHEAD);
            for _ in 0..fit {
                held.push(section(payload), 1).unwrap();
            }
            let error = held.push(section(payload), 4711).unwrap_err().to_string();
            let expected = "main channel, byte 4711: device section disk is one too many: \
                            a machine's devices have 100000 bytes at most";
            assert_eq!(error, expected);
            assert_eq!(held.take().len(), fit);
            assert!(held.is_empty());
            held.push(section(payload), 1).unwrap();
        }
    }
}
