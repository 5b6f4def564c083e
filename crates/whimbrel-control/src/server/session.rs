//! A client's session, without its socket: a request in, a line out.

use serde_json::{Map, Value, json};

use super::arguments::Arguments;
use super::command;
use crate::framing::FrameError;
use crate::{Backend, ErrorClass, QmpError};

/// The one capability of QMP itself.
const OUT_OF_BAND: &str = "oob";

/// What to do about a request.
pub(super) struct Answer {
    /// The reply.
    pub(super) line: Vec<u8>,
    /// Once the reply is out, the VMM shall end.
    pub(super) quit: bool,
}

/// What is remembered of a client between its requests.
#[derive(Clone, Debug)]
pub(super) struct Session {
    negotiated: bool,
    out_of_band: bool,
}

/// What a client sent, taken apart.
#[derive(Debug)]
pub(super) struct Request {
    id: Option<Value>,
    /// The client has negotiated it, and wants this one to overtake others.
    out_of_band: bool,
    /// The command and its arguments, or what is wrong with the request.
    content: Result<(String, Arguments), QmpError>,
}

impl Request {
    /// Whether it may overtake those that came before it.
    pub(super) fn overtakes(&self) -> bool {
        self.out_of_band
    }
}

impl Session {
    pub(super) fn new() -> Session {
        Session { negotiated: false, out_of_band: false }
    }

    /// The line a client is greeted with.
    pub(super) fn greeting() -> Vec<u8> {
        line(&json!({ "QMP": { "version": command::version(), "capabilities": [OUT_OF_BAND] } }))
    }

    /// Whether the client has been through `qmp_capabilities`. From then on a session stays as it
    /// is.
    pub(super) fn is_negotiated(&self) -> bool {
        self.negotiated
    }

    /// Whether the client may have some commands overtake others.
    pub(super) fn is_out_of_band(&self) -> bool {
        self.out_of_band
    }

    /// Takes apart what the client sent. The id is found even if the rest is wrong.
    pub(super) fn read(&self, message: Result<Value, FrameError>) -> Request {
        let mut request = Request { id: None, out_of_band: false, content: Err(no_object()) };
        request.content = match message {
            Ok(Value::Object(members)) => self.read_envelope(members, &mut request),
            Ok(_) => Err(no_object()),
            Err(error) => Err(QmpError::generic(error)),
        };
        request
    }

    fn read_envelope(
        &self,
        mut members: Map<String, Value>,
        request: &mut Request,
    ) -> Result<(String, Arguments), QmpError> {
        request.id = members.remove("id");
        let in_order = take_command(&mut members, "execute")?;
        // Without the capability it is a member like any other that is unknown.
        let overtaking = match self.out_of_band {
            true => take_command(&mut members, "exec-oob")?,
            false => None,
        };
        request.out_of_band = overtaking.is_some();
        let arguments = match members.remove("arguments") {
            None => Map::new(),
            Some(Value::Object(arguments)) => arguments,
            Some(_) => {
                return Err(QmpError::generic("QMP input member 'arguments' must be an object"));
            }
        };
        if let Some(member) = members.keys().next() {
            let text = format_args!("QMP input member '{member}' is unexpected");
            return Err(QmpError::generic(text));
        }
        let command = match (in_order, overtaking) {
            (Some(command), None) | (None, Some(command)) => command,
            (None, None) => return Err(QmpError::generic("QMP input lacks member 'execute'")),
            (Some(_), Some(_)) => {
                let text = "QMP input member 'execute' clashes with 'exec-oob'";
                return Err(QmpError::generic(text));
            }
        };
        Ok((command, Arguments::new(arguments)))
    }

    /// Does what the client asks for.
    pub(super) fn answer(&mut self, request: Request, backend: &dyn Backend) -> Answer {
        let Request { id, out_of_band, content } = request;
        let outcome = content.and_then(|(command, arguments)| match out_of_band {
            true => command::execute_out_of_band(&command, arguments, backend)
                .map(|value| (value, false)),
            false => self.execute(&command, arguments, backend),
        });
        match outcome {
            Ok((value, quit)) => {
                let mut reply = json!({ "return": value });
                if let Some(id) = id {
                    reply["id"] = id;
                }
                Answer { line: line(&reply), quit }
            }
            Err(error) => Answer { line: error_line(&error, id), quit: false },
        }
    }

    fn execute(
        &mut self,
        command: &str,
        arguments: Arguments,
        backend: &dyn Backend,
    ) -> Result<(Value, bool), QmpError> {
        match (self.negotiated, command) {
            (false, "qmp_capabilities") => {
                self.out_of_band = negotiate(arguments)?;
                self.negotiated = true;
                Ok((json!({}), false))
            }
            (false, _) => Err(QmpError::new(
                ErrorClass::CommandNotFound,
                "Expecting capabilities negotiation with 'qmp_capabilities'",
            )),
            (true, "qmp_capabilities") => Err(QmpError::new(
                ErrorClass::CommandNotFound,
                "Capabilities negotiation is already complete, command ignored",
            )),
            (true, "quit") => {
                arguments.finish()?;
                Ok((json!({}), true))
            }
            (true, _) => Ok((command::execute(command, arguments, backend)?, false)),
        }
    }
}

/// The line for an error.
pub(super) fn error_line(error: &QmpError, id: Option<Value>) -> Vec<u8> {
    let mut reply = json!({ "error": error.to_json() });
    if let Some(id) = id {
        reply["id"] = id;
    }
    line(&reply)
}

fn line(reply: &Value) -> Vec<u8> {
    let mut line = reply.to_string().into_bytes();
    line.push(b'\n');
    line
}

fn no_object() -> QmpError {
    QmpError::generic("QMP input must be a JSON object")
}

fn take_command(
    members: &mut Map<String, Value>,
    member: &str,
) -> Result<Option<String>, QmpError> {
    match members.remove(member) {
        None => Ok(None),
        Some(Value::String(command)) => Ok(Some(command)),
        Some(_) => {
            Err(QmpError::generic(format_args!("QMP input member '{member}' must be a string")))
        }
    }
}

/// `qmp_capabilities`: whether the client wants commands to overtake others.
fn negotiate(mut arguments: Arguments) -> Result<bool, QmpError> {
    let enable = arguments.optional_strings("enable")?.unwrap_or_default();
    arguments.finish()?;
    match enable.iter().find(|name| *name != OUT_OF_BAND) {
        None => Ok(!enable.is_empty()),
        Some(name) => Err(QmpError::generic(format_args!("QMP capability '{name}' not available"))),
    }
}
