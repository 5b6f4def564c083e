//! The description of the device state: how many devices it tells of, and `--devices`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use whimbrel_wire::VmDescription;

use super::feed::Fault;
use super::report::{Description, Report};

/// One field of a device's state, as its source describes it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Field {
    #[serde(default)]
    pub(super) name: String,
    #[serde(default, rename = "type")]
    pub(super) kind: String,
    /// Bytes of one element.
    pub(super) size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) array_len: Option<u64>,
}

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
    fields: Vec<Field>,
    #[serde(default)]
    subsections: Vec<Subsection>,
}

#[derive(Deserialize)]
struct Subsection {
    vmsd_name: String,
    #[serde(default)]
    fields: Vec<Field>,
    #[serde(default)]
    subsections: Vec<Subsection>,
}

/// Notes the description, which stands at `offset`, and with `fields` what it says of each
/// device's section.
pub(super) fn note(
    report: &mut Report,
    json: &[u8],
    offset: u64,
    fields: bool,
) -> Result<(), Fault> {
    let known =
        VmDescription::parse(json).map_err(|kind| Fault { offset, message: kind.to_string() })?;
    report.vm_description =
        Some(Description { bytes: json.len() as u64, devices: known.len() as u64 });
    if !fields {
        return Ok(());
    }
    let document: Document = serde_json::from_slice(json).map_err(|error| Fault {
        offset,
        message: format!("expected the fields of the devices, found {error}"),
    })?;
    let devices = document.devices.into_iter();
    let mut devices: BTreeMap<_, _> =
        devices.map(|device| ((device.name.clone(), device.instance_id), device)).collect();
    for section in &mut report.sections {
        let Some(instance) = section.instance_id else { continue };
        let Some(device) = devices.remove(&(section.name.clone(), instance)) else { continue };
        let mut all = device.fields;
        device.subsections.into_iter().for_each(|one| flatten(one, "", &mut all));
        section.fields = Some(all);
    }
    Ok(())
}

/// Appends the fields of a subsection under its name.
fn flatten(subsection: Subsection, above: &str, all: &mut Vec<Field>) {
    let path = format!("{above}{}/", subsection.vmsd_name);
    all.extend(
        subsection
            .fields
            .into_iter()
            .map(|field| Field { name: format!("{path}{}", field.name), ..field }),
    );
    subsection.subsections.into_iter().for_each(|inner| flatten(inner, &path, all));
}
