//! The section `globalstate`: whether the guest ran when it was stopped for its switchover.

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
pub(crate) fn take(devices: &mut Vec<DeviceState>) -> bool {
    let Some(at) = devices.iter().position(|device| device.name == NAME) else { return true };
    let section = devices.remove(at);
    let name = section.bytes.get(4..36).unwrap_or_default();
    name.split(|&byte| byte == 0).next() == Some(b"running")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_whether_the_guest_runs() {
        for runs in [true, false] {
            let mut devices = vec![section(runs)];
            assert_eq!(devices[0].bytes.len(), BYTES);
            assert_eq!(take(&mut devices), runs);
            assert!(devices.is_empty());
        }
        assert!(take(&mut Vec::new()));
    }
}
