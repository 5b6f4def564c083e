//! How device state is written down: tagged fields, each once, each of its own length.
//!
//! ```text
//! field: tag (u16) length (u32) bytes          all little-endian, in any order
//! ```
//!
//! What is read comes from the network: every field that is missing, twice there, unknown or of
//! the wrong length is refused with its name.

use whimbrel::{DeviceState, VmError};

/// The version of every device's format so far.
const VERSION: u32 = 1;

/// A field: its number on the wire and its name in errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tag(pub(crate) u16, pub(crate) &'static str);

/// Writes fields.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    pub(crate) fn new() -> Writer {
        Writer::default()
    }

    pub(crate) fn bytes(&mut self, tag: Tag, bytes: &[u8]) {
        let len = u32::try_from(bytes.len()).expect("a device's field is below 4 GiB");
        self.bytes.extend(tag.0.to_le_bytes());
        self.bytes.extend(len.to_le_bytes());
        self.bytes.extend(bytes);
    }

    pub(crate) fn u64(&mut self, tag: Tag, value: u64) {
        self.bytes(tag, &value.to_le_bytes());
    }

    pub(crate) fn device(self, name: &str, instance_id: u32) -> DeviceState {
        DeviceState { name: name.to_owned(), instance_id, version_id: VERSION, bytes: self.bytes }
    }
}

/// The fields of one device's state. Errors leave it to others to name the device.
#[derive(Debug)]
pub(crate) struct Fields<'a> {
    fields: Vec<(Tag, &'a [u8])>,
}

impl<'a> Fields<'a> {
    /// Takes a device's state apart; it may hold the fields `known` and no others.
    pub(crate) fn read(device: &'a DeviceState, known: &[Tag]) -> Result<Fields<'a>, VmError> {
        let mut read = Fields { fields: Vec::new() };
        if device.version_id != VERSION {
            let found = device.version_id;
            return Err(VmError::new(format!("version {VERSION} expected, found {found}")));
        }
        let mut rest = &device.bytes[..];
        while !rest.is_empty() {
            let at = device.bytes.len() - rest.len();
            let (tag, bytes);
            ((tag, bytes), rest) = split_field(rest)
                .ok_or_else(|| VmError::new(format!("the field at byte {at} is cut off")))?;
            let tag = known
                .iter()
                .find(|known| known.0 == tag)
                .ok_or_else(|| VmError::new(format!("unknown field {tag} at byte {at}")))?;
            if read.find(*tag).is_some() {
                return Err(VmError::new(format!("field {} is there twice", tag.1)));
            }
            read.fields.push((*tag, bytes));
        }
        Ok(read)
    }

    fn find(&self, tag: Tag) -> Option<&'a [u8]> {
        self.fields.iter().find(|(there, _)| *there == tag).map(|(_, bytes)| *bytes)
    }

    pub(crate) fn bytes(&self, tag: Tag) -> Result<&'a [u8], VmError> {
        self.find(tag).ok_or_else(|| VmError::new(format!("field {} is missing", tag.1)))
    }

    pub(crate) fn array<const N: usize>(&self, tag: Tag) -> Result<[u8; N], VmError> {
        let bytes = self.bytes(tag)?;
        bytes.try_into().map_err(|_| {
            let found = bytes.len();
            VmError::new(format!("field {} has {found} bytes, expected {N}", tag.1))
        })
    }

    pub(crate) fn u64(&self, tag: Tag) -> Result<u64, VmError> {
        self.array(tag).map(u64::from_le_bytes)
    }

    pub(crate) fn u32(&self, tag: Tag) -> Result<u32, VmError> {
        let value = self.u64(tag)?;
        u32::try_from(value)
            .map_err(|_| VmError::new(format!("field {} has the value {value:#x}", tag.1)))
    }
}

type Field<'a> = (u16, &'a [u8]);

fn split_field(bytes: &[u8]) -> Option<(Field<'_>, &[u8])> {
    let (tag, bytes) = bytes.split_first_chunk()?;
    let (len, bytes) = bytes.split_first_chunk()?;
    let len = usize::try_from(u32::from_le_bytes(*len)).ok()?;
    let (field, rest) = bytes.split_at_checked(len)?;
    Some(((u16::from_le_bytes(*tag), field), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Tag = Tag(1, "a");
    const B: Tag = Tag(2, "b");

    fn device() -> DeviceState {
        let mut writer = Writer::new();
        writer.u64(A, 7);
        writer.bytes(B, b"xyz");
        writer.device("thing", 3)
    }

    fn error(device: &DeviceState, known: &[Tag]) -> String {
        Fields::read(device, known).unwrap_err().to_string()
    }

    #[test]
    fn reads_what_was_written() {
        let device = device();
        let fields = Fields::read(&device, &[A, B]).unwrap();
        assert_eq!(fields.u64(A).unwrap(), 7);
        assert_eq!(fields.bytes(B).unwrap(), b"xyz");
        assert_eq!(fields.u64(B).unwrap_err().to_string(), "field b has 3 bytes, expected 8");
    }

    #[test]
    fn refuses_what_was_not() {
        let mut device = device();
        assert_eq!(error(&device, &[A]), "unknown field 2 at byte 14");
        device.bytes.extend(device.bytes.clone());
        assert_eq!(error(&device, &[A, B]), "field a is there twice");
        for len in (1..14).rev() {
            device.bytes.truncate(len);
            assert!(error(&device, &[A, B]).ends_with("the field at byte 0 is cut off"));
        }
        device.bytes.clear();
        let fields = Fields::read(&device, &[A]).unwrap();
        assert_eq!(fields.u64(A).unwrap_err().to_string(), "field a is missing");
        device.version_id = 2;
        assert_eq!(error(&device, &[A]), "version 1 expected, found 2");
    }
}
