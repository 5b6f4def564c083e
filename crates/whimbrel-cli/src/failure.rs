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
            f.write_str(&harmless(line.trim()))?;
        }
        Ok(())
    }
}

/// `text` without what could have a terminal do something: it may hold a peer's words.
pub(crate) fn harmless(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character.is_control() {
            true => out.extend(character.escape_default()),
            false => out.push(character),
        }
    }
    out
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line_that_does_nothing_to_a_terminal() {
        let failure = Failure::new("it says: a\x1b[2Jb\u{9b}31m\r\n\n  and \u{e4}, too\n");
        assert_eq!(failure.to_string(), "it says: a\\u{1b}[2Jb\\u{9b}31m; and \u{e4}, too");
    }
}
