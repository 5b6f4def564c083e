//! VMDESCRIPTION: the JSON behind EOF that says how long each device's state is.

use alloc::collections::BTreeMap;
use alloc::string::{String, ToString as _};
use alloc::vec::Vec;
use core::fmt::Write as _;

use serde::Deserialize;

use crate::device::DeviceSection;
use crate::section::mark;
use crate::{ErrorKind, Name};

/// Longest description that is read; a guest of hundreds of vCPUs has a few MiB.
pub const VM_DESCRIPTION_MAX: usize = 64 << 20;

/// Bytes before a subsection's own: its mark, the length byte of its name, its version.
const SUBSECTION_OVERHEAD: u64 = 6;

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    devices: Vec<Device>,
}

#[derive(Deserialize)]
struct Device {
    name: String,
    instance_id: u32,
    #[serde(default)]
    fields: Option<Vec<Field>>,
    #[serde(default)]
    subsections: Vec<Subsection>,
    /// Old-style devices say their size here, beside a single field.
    #[serde(default)]
    size: Option<u64>,
}

#[derive(Deserialize)]
struct Subsection {
    vmsd_name: String,
    #[serde(default)]
    fields: Vec<Field>,
    #[serde(default)]
    subsections: Vec<Subsection>,
}

#[derive(Deserialize)]
struct Field {
    size: u64,
    #[serde(default)]
    array_len: Option<u64>,
}

/// The lengths of device sections, by name and instance.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VmDescription {
    lengths: BTreeMap<(Name, u32), u64>,
}

impl VmDescription {
    /// Reads the JSON text.
    ///
    /// # Errors
    /// When it is not JSON of this shape, is nested deeper than 128 levels, or describes
    /// lengths that overflow.
    pub fn parse(json: &[u8]) -> Result<Self, ErrorKind> {
        let wrong = |problem: String| ErrorKind::VmDescription { problem };
        if json.len() > VM_DESCRIPTION_MAX {
            let (found, limit) = (json.len() as u64, VM_DESCRIPTION_MAX as u64);
            let what = "bytes of the description of the device state";
            return Err(ErrorKind::TooLarge { what, found, limit });
        }
        let document: Document =
            serde_json::from_slice(json).map_err(|error| wrong(error.to_string()))?;
        let mut lengths = BTreeMap::new();
        for device in &document.devices {
            let name = Name::new(&device.name).map_err(|error| wrong(error.to_string()))?;
            let length = device.length().ok_or_else(|| {
                wrong(alloc::format!("the length of \"{name}\" is missing or overflows"))
            })?;
            if lengths.insert((name, device.instance_id), length).is_some() {
                let name = device.name.escape_default();
                return Err(wrong(alloc::format!("device \"{name}\" comes twice")));
            }
        }
        Ok(Self { lengths })
    }

    /// Length in bytes of the payload of a device's section.
    #[must_use]
    pub fn payload_len(&self, name: &Name, instance_id: u32) -> Option<u64> {
        self.lengths.get(&(name.clone(), instance_id)).copied()
    }

    /// Number of devices described.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lengths.len()
    }

    /// Whether no device is described.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lengths.is_empty()
    }
}

impl Device {
    fn length(&self) -> Option<u64> {
        match &self.fields {
            Some(fields) => payload_len(fields, &self.subsections),
            None => self.size?.checked_add(payload_len(&[], &self.subsections)?),
        }
    }
}

/// The rule of the format: a field's size, which includes all that is nested in it, times the
/// number of its elements; and of each subsection its overhead, its name and its own payload.
fn payload_len(fields: &[Field], subsections: &[Subsection]) -> Option<u64> {
    let fields = fields.iter().try_fold(0_u64, |sum, field| {
        sum.checked_add(field.size.checked_mul(field.array_len.unwrap_or(1))?)
    })?;
    subsections.iter().try_fold(fields, |sum, subsection| {
        let inside = payload_len(&subsection.fields, &subsection.subsections)?;
        sum.checked_add(SUBSECTION_OVERHEAD + subsection.vmsd_name.len() as u64)?
            .checked_add(inside)
    })
}

/// Appends VMDESCRIPTION with a JSON text.
///
/// # Panics
/// When the text is longer than a length of 32 bits can say.
pub fn encode_vm_description(json: &[u8], out: &mut Vec<u8>) {
    let len = u32::try_from(json.len()).expect("a description of less than 4 GiB");
    out.push(mark::VM_DESCRIPTION);
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(json);
}

/// Makes the description of whimbrel's own sections, whose payload is a length of 32 bits and
/// so many bytes: by the format's rule it gives the length of each section.
///
/// A name that is not text is described lossily; whimbrel's own names are.
#[must_use]
pub fn describe<'a>(
    page_size: u64,
    sections: impl IntoIterator<Item = &'a DeviceSection>,
) -> Vec<u8> {
    let mut json = alloc::format!("{{\"page_size\": {page_size}, \"devices\": [");
    for (place, section) in sections.into_iter().enumerate() {
        let name = String::from_utf8_lossy(section.header.name.as_bytes());
        let name = serde_json::Value::from(name.as_ref());
        let (instance, version) = (section.header.instance_id, section.header.version_id);
        let data = section.payload.len().saturating_sub(4);
        let comma = if place == 0 { "" } else { ", " };
        // Writing to a string cannot fail.
        let _ = write!(
            json,
            "{comma}{{\"name\": {name}, \"instance_id\": {instance}, \"vmsd_name\": {name}, \
             \"version\": {version}, \"fields\": [{{\"name\": \"length\", \"type\": \"uint32\", \
             \"size\": 4}}, {{\"name\": \"data\", \"type\": \"buffer\", \"size\": {data}}}]}}"
        );
    }
    json.push_str("]}");
    json.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(devices: &str) -> Result<VmDescription, ErrorKind> {
        VmDescription::parse(alloc::format!("{{\"devices\": [{devices}]}}").as_bytes())
    }

    fn length(device: &str) -> Option<u64> {
        let description = parse(&alloc::format!("{{\"name\": \"d\", {device}}}")).unwrap();
        description.payload_len(&Name::new("d").unwrap(), 7)
    }

    #[test]
    fn fields_count_by_their_elements_and_subsections_by_their_names() {
        let plain = r#""instance_id": 7, "fields": [{"size": 4}, {"size": 8, "array_len": 3}]"#;
        assert_eq!(length(plain), Some(28));
        let indexed =
            r#""instance_id": 7, "fields": [{"size": 4, "index": 0}, {"size": 4, "index": 1}]"#;
        assert_eq!(length(indexed), Some(8));
        // What a struct holds is in its own size.
        let nested = r#""instance_id": 7, "fields": [{"size": 9, "type": "struct",
            "struct": {"fields": [{"size": 5}, {"size": 4}]}}]"#;
        assert_eq!(length(nested), Some(9));
        let subsections = r#""instance_id": 7, "fields": [], "subsections": [{"vmsd_name": "d/ab",
            "fields": [{"size": 2}], "subsections": [{"vmsd_name": "d/ab/c", "fields": []}]}]"#;
        assert_eq!(length(subsections), Some(6 + 4 + 2 + 6 + 6));
        assert_eq!(length(r#""instance_id": 7, "size": 77"#), Some(77));
        assert_eq!(length(r#""instance_id": 8, "size": 77"#), None);
    }

    #[test]
    fn hostile_descriptions_are_refused() {
        let device =
            |rest: &str| parse(&alloc::format!("{{\"name\": \"d\", \"instance_id\": 7{rest}}}"));
        assert!(device("").is_err(), "no length");
        assert!(device(r#", "fields": [{"size": 18446744073709551615}, {"size": 1}]"#).is_err());
        assert!(device(r#", "fields": [{"size": 4294967296, "array_len": 4294967296}]"#).is_err());
        assert!(device(r#", "fields": [{"size": -1}]"#).is_err());
        assert!(device(r#", "fields": [{"size": 1.5}]"#).is_err());
        assert!(device(r#", "fields": [{}]"#).is_err());
        let twice = r#"{"name": "d", "instance_id": 7, "size": 1}"#;
        assert!(parse(&alloc::format!("{twice}, {twice}")).is_err());
        assert!(parse(r#"{"name": "", "instance_id": 7, "size": 1}"#).is_err());
        assert!(VmDescription::parse(b"{").is_err());
        assert!(VmDescription::parse(b"{\"devices\": [\"\xff\"]}").is_err());
        let mut deep =
            String::from(r#"{"name": "d", "instance_id": 7, "size": 1, "subsections": "#);
        deep.push_str(&r#"[{"vmsd_name": "s", "subsections": "#.repeat(10_000));
        assert!(parse(&deep).is_err(), "nested too deep, and the stack held");
        let mut deep = String::from(r#"{"name": "d", "instance_id": 7, "size": 1, "other": "#);
        deep.push_str(&"[".repeat(100_000));
        assert!(parse(&deep).is_err());
    }
}
