//! The arguments of a command, taken one by one, with QEMU's texts for what is wrong with them.

use serde_json::{Map, Value};

use crate::QmpError;

/// Members of an object that have not been taken yet. Whoever has taken all that the command
/// knows calls [`Arguments::finish`].
#[derive(Debug)]
pub(super) struct Arguments {
    /// Before the names of members in errors: empty, or such as `channels[0].addr.`.
    prefix: String,
    members: Map<String, Value>,
}

impl Arguments {
    pub(super) fn new(members: Map<String, Value>) -> Arguments {
        Arguments { prefix: String::new(), members }
    }

    fn nested(path: String, value: Value) -> Result<Arguments, QmpError> {
        match value {
            Value::Object(members) => Ok(Arguments { prefix: path + ".", members }),
            _ => Err(QmpError::wrong_type(&path, "object")),
        }
    }

    /// A member's name as errors have it.
    pub(super) fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// What has not been taken.
    pub(super) fn rest(self) -> Map<String, Value> {
        self.members
    }

    /// Nothing may be left.
    pub(super) fn finish(self) -> Result<(), QmpError> {
        match self.members.keys().next() {
            None => Ok(()),
            Some(name) => Err(QmpError::unexpected(&self.path(name))),
        }
    }

    fn required<T>(&self, name: &str, taken: Option<T>) -> Result<T, QmpError> {
        taken.ok_or_else(|| QmpError::missing(&self.path(name)))
    }

    pub(super) fn string(&mut self, name: &str) -> Result<String, QmpError> {
        let taken = self.optional_string(name)?;
        self.required(name, taken)
    }

    pub(super) fn optional_string(&mut self, name: &str) -> Result<Option<String>, QmpError> {
        match self.members.remove(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(QmpError::wrong_type(&self.path(name), "string")),
        }
    }

    pub(super) fn bool(&mut self, name: &str) -> Result<bool, QmpError> {
        let taken = self.optional_bool(name)?;
        self.required(name, taken)
    }

    pub(super) fn optional_bool(&mut self, name: &str) -> Result<Option<bool>, QmpError> {
        match self.members.remove(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(_) => Err(QmpError::wrong_type(&self.path(name), "boolean")),
        }
    }

    pub(super) fn optional_u64(&mut self, name: &str) -> Result<Option<u64>, QmpError> {
        match self.members.remove(name) {
            None => Ok(None),
            Some(value) => value.as_u64().map(Some).ok_or_else(|| {
                QmpError::generic(format_args!("Parameter '{}' expects uint64", self.path(name)))
            }),
        }
    }

    pub(super) fn object(&mut self, name: &str) -> Result<Arguments, QmpError> {
        let taken = self.members.remove(name);
        Arguments::nested(self.path(name), self.required(name, taken)?)
    }

    pub(super) fn objects(&mut self, name: &str) -> Result<Vec<Arguments>, QmpError> {
        let taken = self.optional_objects(name)?;
        self.required(name, taken)
    }

    pub(super) fn optional_objects(
        &mut self,
        name: &str,
    ) -> Result<Option<Vec<Arguments>>, QmpError> {
        let path = self.path(name);
        let Some(items) = self.optional_list(name)? else { return Ok(None) };
        items
            .into_iter()
            .enumerate()
            .map(|(index, item)| Arguments::nested(format!("{path}[{index}]"), item))
            .collect::<Result<_, _>>()
            .map(Some)
    }

    pub(super) fn strings(&mut self, name: &str) -> Result<Vec<String>, QmpError> {
        let taken = self.optional_strings(name)?;
        self.required(name, taken)
    }

    pub(super) fn optional_strings(&mut self, name: &str) -> Result<Option<Vec<String>>, QmpError> {
        let path = self.path(name);
        let Some(items) = self.optional_list(name)? else { return Ok(None) };
        items
            .into_iter()
            .enumerate()
            .map(|(index, item)| match item {
                Value::String(text) => Ok(text),
                _ => Err(QmpError::wrong_type(&format!("{path}[{index}]"), "string")),
            })
            .collect::<Result<_, _>>()
            .map(Some)
    }

    fn optional_list(&mut self, name: &str) -> Result<Option<Vec<Value>>, QmpError> {
        match self.members.remove(name) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(_) => Err(QmpError::wrong_type(&self.path(name), "array")),
        }
    }
}
