//! What a QEMU's machine type says of how its migrations are to be spoken.

use crate::settings::ZeroPageDetection;
use crate::source::multifd::Dialect;

/// Whether a machine type is of QEMU `version` or before, by the version its name ends in.
pub(super) fn is_up_to(version: (u32, u32), machine: &str) -> bool {
    let found = machine.rsplit('-').next().and_then(|text| {
        let (major, minor) = text.split_once('.')?;
        Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))
    });
    found.is_some_and(|found| found <= version)
}

/// How its multifd channels are to be spoken to.
pub(super) fn dialect(machine: &str, zeros: Option<ZeroPageDetection>) -> Dialect {
    let usual = match is_up_to((8, 2), machine) {
        true => ZeroPageDetection::Legacy,
        false => ZeroPageDetection::Multifd,
    };
    Dialect { mark_each_section: is_up_to((8, 0), machine), zeros: zeros.unwrap_or(usual) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_are_told_apart_by_their_version() {
        for old in ["pc-q35-7.2", "pc-i440fx-6.0", "virt-5.12"] {
            assert!(is_up_to((7, 2), old), "{old}");
        }
        for new in ["pc-q35-8.0", "pc-q35-10.0", "microvm", "whimbrel-vm-1", "pc-q35-7.10"] {
            assert!(!is_up_to((7, 2), new), "{new}");
        }
    }

    #[test]
    fn multifd_changed_twice() {
        for (machine, mark_each_section, zeros) in [
            ("pc-q35-7.2", true, ZeroPageDetection::Legacy),
            ("pc-q35-8.0", true, ZeroPageDetection::Legacy),
            ("pc-q35-8.1", false, ZeroPageDetection::Legacy),
            ("pc-q35-9.0", false, ZeroPageDetection::Multifd),
            ("whimbrel-vm-1", false, ZeroPageDetection::Multifd),
        ] {
            assert_eq!(dialect(machine, None), Dialect { mark_each_section, zeros }, "{machine}");
        }
        let asked = dialect("pc-q35-7.2", Some(ZeroPageDetection::None));
        assert_eq!(asked.zeros, ZeroPageDetection::None);
    }
}
