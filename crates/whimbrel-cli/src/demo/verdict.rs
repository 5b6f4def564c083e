//! Whether the guest arrived as it left.

use std::fmt;

use serde_json::Value;

/// What both sides say of RAM, and what the guest says of itself.
#[derive(Debug)]
pub(super) struct Verdict {
    /// Digests of every block at the source, after the guest had stopped.
    pub(super) left: Value,
    /// The same at the destination, before it ran.
    pub(super) arrived: Value,
    /// The guest's check of itself before it ran on.
    pub(super) before: Value,
    /// And after it had.
    pub(super) after: Value,
}

impl Verdict {
    /// What is wrong, if anything.
    pub(super) fn failure(&self) -> Option<String> {
        if self.left["blocks"] != self.arrived["blocks"] || !self.left["blocks"].is_array() {
            return Some(format!(
                "not verified: RAM differs: {} left, {} arrived",
                self.left, self.arrived
            ));
        }
        for (when, check) in [("on arrival", &self.before), ("running on", &self.after)] {
            if check["passed"] != true {
                return Some(format!("not verified: the guest's self-check {when}: {check}"));
            }
            if let Some(failure) = check["failure"].as_str() {
                return Some(format!("not verified: a vCPU failed {when}: {failure}"));
            }
        }
        None
    }

    /// Page updates the guest has done in its life, on both sides.
    pub(super) fn updates(&self) -> u64 {
        self.after["updates"].as_u64().unwrap_or(0)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.failure() {
            Some(why) => f.write_str(&why),
            None => {
                let pages: u64 = self.left["blocks"]
                    .as_array()
                    .map(|blocks| blocks.iter().filter_map(|b| b["pages"].as_u64()).sum())
                    .unwrap_or(0);
                let there = self.updates() - self.before["updates"].as_u64().unwrap_or(0);
                write!(
                    f,
                    "all {pages} pages identical; the guest went on ({there} updates there), \
                     checked itself and found no error"
                )
            }
        }
    }
}
