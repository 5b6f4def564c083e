//! Errors as QMP tells them: a class a program can act on, and a text for its user.

use std::fmt;

use serde_json::{Value, json};

/// What kind of error it is (`QapiErrorClass`). Nearly all are [`ErrorClass::GenericError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorClass {
    /// Whatever has no class of its own.
    GenericError,
    /// No such command, or not in this phase of the session.
    CommandNotFound,
    /// The device exists and does not work at present.
    DeviceNotActive,
    /// No such device.
    DeviceNotFound,
}

impl ErrorClass {
    /// QMP's name.
    pub fn name(self) -> &'static str {
        match self {
            ErrorClass::GenericError => "GenericError",
            ErrorClass::CommandNotFound => "CommandNotFound",
            ErrorClass::DeviceNotActive => "DeviceNotActive",
            ErrorClass::DeviceNotFound => "DeviceNotFound",
        }
    }
}

/// Why a command was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{desc}")]
pub struct QmpError {
    /// For a program.
    pub class: ErrorClass,
    /// For its user: one line, without the class.
    pub desc: String,
}

impl QmpError {
    /// An error of a given class.
    pub fn new(class: ErrorClass, desc: impl Into<String>) -> QmpError {
        QmpError { class, desc: desc.into() }
    }

    /// An error without a class of its own, from a text or from another error.
    pub fn generic(desc: impl fmt::Display) -> QmpError {
        QmpError { class: ErrorClass::GenericError, desc: desc.to_string() }
    }

    pub(crate) fn command_not_found(command: &str) -> QmpError {
        let desc = format!("The command {command} has not been found");
        QmpError { class: ErrorClass::CommandNotFound, desc }
    }

    pub(crate) fn instance_not_found() -> QmpError {
        QmpError::new(ErrorClass::DeviceNotFound, "Instance not found")
    }

    pub(crate) fn missing(parameter: &str) -> QmpError {
        QmpError::generic(format_args!("Parameter '{parameter}' is missing"))
    }

    pub(crate) fn unexpected(parameter: &str) -> QmpError {
        QmpError::generic(format_args!("Parameter '{parameter}' is unexpected"))
    }

    pub(crate) fn wrong_type(parameter: &str, expected: &str) -> QmpError {
        QmpError::generic(format_args!(
            "Invalid parameter type for '{parameter}', expected: {expected}"
        ))
    }

    pub(crate) fn wrong_value(parameter: &str, value: &str) -> QmpError {
        QmpError::generic(format_args!("Parameter '{parameter}' does not accept value '{value}'"))
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({ "class": self.class.name(), "desc": self.desc })
    }
}
