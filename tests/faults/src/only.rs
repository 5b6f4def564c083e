//! `--mode`: what all runs have in common.

use std::str::FromStr;

use crate::plan::{Transport, Way};

/// What is not drawn, because it was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Only {
    pub(crate) way: Option<Way>,
    pub(crate) tls: bool,
    pub(crate) huge: bool,
    pub(crate) transport: Option<Transport>,
}

/// Words with commas between them: a way, `tls`, `huge`, `tcp`, `unix`.
impl FromStr for Only {
    type Err = String;

    fn from_str(text: &str) -> Result<Only, String> {
        let mut only = Only::default();
        for word in text.split(',') {
            match word {
                "tls" => only.tls = true,
                "huge" => only.huge = true,
                "tcp" => only.transport = Some(Transport::Tcp),
                "unix" => only.transport = Some(Transport::Unix),
                _ => {
                    let way = Way::ALL.into_iter().find(|way| way.name() == word);
                    only.way = Some(way.ok_or_else(|| {
                        let ways: Vec<&str> = Way::ALL.iter().map(|way| way.name()).collect();
                        format!(
                            "expected {}, tls, huge, tcp or unix, not '{word}'",
                            ways.join(", ")
                        )
                    })?);
                }
            }
        }
        Ok(only)
    }
}
