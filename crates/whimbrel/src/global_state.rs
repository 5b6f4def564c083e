//! The section `globalstate`: whether the guest ran when it was stopped for its switchover.

use crate::error::Error;
use crate::vm::DeviceState;

const NAME: &str = "globalstate";
const VERSION: u32 = 1;
/// be32 length, 32 bytes of name, two flags, 66 unused.
const BYTES: usize = 104;

/// The section for a guest that runs, or stands still, at the destination.
pub(crate) fn section(runs: bool) -> DeviceState {
    let name: &[u8] = if runs { b"running" } else { b"paused" };
    let mut bytes = vec![0; BYTES];
    bytes[3] = if runs { 8 } else { 7 }; // With the zero byte behind it.
    bytes[4..4 + name.len()].copy_from_slice(name);
    DeviceState { name: NAME.into(), instance_id: 0, version_id: VERSION, bytes }
}

/// Takes the section out of `devices`; says whether the guest is to run. Without one it is.
pub(crate) fn take(devices: &mut Vec<DeviceState>) -> Result<bool, Error> {
    let Some(at) = devices.iter().position(|device| device.name == NAME) else { return Ok(true) };
    let section = devices.remove(at);
    if section.version_id != VERSION || section.bytes.len() != BYTES {
        return Err(Error::Mismatch {
            what: format!("device section {NAME}"),
            source_has: format!("version {}, {} bytes", section.version_id, section.bytes.len()),
            here: format!("version {VERSION}, {BYTES} bytes"),
        });
    }
    let name = &section.bytes[4..36];
    Ok(name.split(|&byte| byte == 0).next() == Some(b"running"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_whether_the_guest_runs() {
        for runs in [true, false] {
            let mut devices = vec![section(runs)];
            assert_eq!(devices[0].bytes.len(), BYTES);
            assert_eq!(take(&mut devices).unwrap(), runs);
            assert!(devices.is_empty());
        }
        assert!(take(&mut Vec::new()).unwrap());
    }

    #[test]
    fn one_of_a_newer_version_is_refused() {
        let newer = DeviceState { version_id: 2, ..section(true) };
        let error = take(&mut vec![newer]).unwrap_err().to_string();
        assert!(error.contains("version 2, 104 bytes"), "{error}");
    }
}
