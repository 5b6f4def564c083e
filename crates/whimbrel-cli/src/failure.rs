//! What ends the command without success: one line.

use std::fmt;

/// Why the command failed, as one line.
#[derive(Debug)]
pub(crate) struct Failure(String);

impl Failure {
    /// A failure with a text of its own.
    pub(crate) fn new(text: impl Into<String>) -> Failure {
        Failure(text.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // One line, whatever a peer's message holds.
        for (at, line) in self.0.lines().filter(|line| !line.trim().is_empty()).enumerate() {
            if at > 0 {
                f.write_str("; ")?;
            }
            f.write_str(line.trim())?;
        }
        Ok(())
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure(error.to_string())
    }
}
