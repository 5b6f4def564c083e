//! A client's session, without its socket: a request in, a line out.

use serde_json::{Map, Value, json};

use super::arguments::Arguments;
use super::command;
use crate::framing::FrameError;
use crate::{Backend, ErrorClass, QmpError};

/// What to do about a request.
pub(super) struct Answer {
    /// The reply.
    pub(super) line: Vec<u8>,
    /// Once the reply is out, the VMM shall end.
    pub(super) quit: bool,
}

/// What is remembered of a client between its requests.
#[derive(Debug)]
pub(super) struct Session {
    negotiated: bool,
}

/// A request whose envelope is right.
struct Request {
    command: String,
    arguments: Arguments,
}

impl Session {
    pub(super) fn new() -> Session {
        Session { negotiated: false }
    }

    /// The line a client is greeted with.
    pub(super) fn greeting() -> Vec<u8> {
        line(&json!({ "QMP": { "version": command::version(), "capabilities": [] } }))
    }

    /// Whether the client has been through `qmp_capabilities`.
    pub(super) fn is_negotiated(&self) -> bool {
        self.negotiated
    }

    /// Answers what the client sent.
    pub(super) fn answer(
        &mut self,
        request: Result<Value, FrameError>,
        backend: &dyn Backend,
    ) -> Answer {
        let mut id = None;
        let outcome = request
            .map_err(QmpError::generic)
            .and_then(|request| read_envelope(request, &mut id))
            .and_then(|request| self.execute(request, backend));
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
        request: Request,
        backend: &dyn Backend,
    ) -> Result<(Value, bool), QmpError> {
        let Request { command, arguments } = request;
        match (self.negotiated, command.as_str()) {
            (false, "qmp_capabilities") => {
                negotiate(arguments)?;
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
            (true, _) => Ok((command::execute(&command, arguments, backend)?, false)),
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

/// Takes a request apart. The id is found even if the rest is wrong.
fn read_envelope(request: Value, id: &mut Option<Value>) -> Result<Request, QmpError> {
    let Value::Object(mut members) = request else {
        return Err(QmpError::generic("QMP input must be a JSON object"));
    };
    *id = members.remove("id");
    let command = match members.remove("execute") {
        Some(Value::String(command)) => Some(command),
        Some(_) => return Err(QmpError::generic("QMP input member 'execute' must be a string")),
        None => None,
    };
    let arguments = match members.remove("arguments") {
        None => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(_) => {
            return Err(QmpError::generic("QMP input member 'arguments' must be an object"));
        }
    };
    if let Some(member) = members.keys().next() {
        return Err(QmpError::generic(format_args!("QMP input member '{member}' is unexpected")));
    }
    let command = command.ok_or_else(|| QmpError::generic("QMP input lacks member 'execute'"))?;
    Ok(Request { command, arguments: Arguments::new(arguments) })
}

/// `qmp_capabilities`: none is offered, so none can be enabled.
fn negotiate(mut arguments: Arguments) -> Result<(), QmpError> {
    let enable = arguments.optional_strings("enable")?.unwrap_or_default();
    arguments.finish()?;
    match enable.first() {
        None => Ok(()),
        Some(name) => Err(QmpError::generic(format_args!("QMP capability '{name}' not available"))),
    }
}
