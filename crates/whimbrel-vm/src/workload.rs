//! What the guest does: which pages it updates, in what order and how fast.

use std::fmt;
use std::str::FromStr;

use crate::config::{ParseError, parse_size};

/// Which page of the working set is updated next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WorkloadKind {
    /// None at all.
    #[default]
    Idle,
    /// One after the other, and over again.
    Sequential,
    /// Any, all as likely.
    Uniform,
    /// Few often and many seldom: the k-th most popular with a weight of 1/k.
    Zipf,
    /// Nine times out of ten one of the first tenth.
    HotCold,
}

impl WorkloadKind {
    pub(crate) const ALL: [WorkloadKind; 5] = [
        WorkloadKind::Idle,
        WorkloadKind::Sequential,
        WorkloadKind::Uniform,
        WorkloadKind::Zipf,
        WorkloadKind::HotCold,
    ];

    /// As on the command line: `idle`, `sequential`, `uniform`, `zipf`, `hot-cold`.
    pub fn name(self) -> &'static str {
        match self {
            WorkloadKind::Idle => "idle",
            WorkloadKind::Sequential => "sequential",
            WorkloadKind::Uniform => "uniform",
            WorkloadKind::Zipf => "zipf",
            WorkloadKind::HotCold => "hot-cold",
        }
    }

    /// As the guest and the device state know it.
    pub(crate) fn code(self) -> u64 {
        match self {
            WorkloadKind::Idle => 0,
            WorkloadKind::Sequential => 1,
            WorkloadKind::Uniform => 2,
            WorkloadKind::Zipf => 3,
            WorkloadKind::HotCold => 4,
        }
    }

    pub(crate) fn from_code(code: u64) -> Option<WorkloadKind> {
        WorkloadKind::ALL.into_iter().find(|kind| kind.code() == code)
    }
}

impl fmt::Display for WorkloadKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A guest's workload. Two guests of the same workload update the same pages in the same order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Which page is next.
    pub kind: WorkloadKind,
    /// What payloads and page choices derive from.
    pub seed: u64,
    /// The pages that are updated, in bytes; 0 for a quarter of the memory.
    pub working_set: u64,
    /// Page updates per second and vCPU; 0 for as fast as it goes.
    pub rate: u64,
}

impl Default for Workload {
    fn default() -> Workload {
        Workload { kind: WorkloadKind::Idle, seed: 1, working_set: 0, rate: 0 }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Workload { kind, seed, working_set, rate } = self;
        write!(f, "{kind},rate={rate},seed={seed}")?;
        match working_set {
            0 => Ok(()), // A share of a memory whose size is not known here.
            bytes => write!(f, ",working-set={bytes}"),
        }
    }
}

/// `KIND[,rate=N][,working-set=SIZE][,seed=N]`.
impl FromStr for Workload {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Workload, ParseError> {
        let mut parts = text.split(',');
        let kind = parts.next().unwrap_or_default();
        let kind =
            WorkloadKind::ALL.into_iter().find(|known| known.name() == kind).ok_or_else(|| {
                let expected = "idle, sequential, uniform, zipf or hot-cold";
                ParseError::new("workload", kind, expected)
            })?;
        let mut workload = Workload { kind, ..Workload::default() };
        for part in parts {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let number = |what| {
                value.parse().map_err(|_| ParseError::new(what, value, "a whole number from 0 on"))
            };
            match key {
                "rate" => workload.rate = number("workload rate")?,
                "seed" => workload.seed = number("workload seed")?,
                "working-set" => workload.working_set = parse_size(value)?,
                _ => {
                    let expected = "rate=N, working-set=SIZE or seed=N";
                    return Err(ParseError::new("workload option", part, expected));
                }
            }
        }
        Ok(workload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        let workload: Workload = "uniform,rate=1000,working-set=64M,seed=7".parse().unwrap();
        let Workload { kind, seed, working_set, rate } = workload;
        assert_eq!((kind, seed, working_set, rate), (WorkloadKind::Uniform, 7, 64 << 20, 1000));
        assert_eq!(workload.to_string().parse(), Ok(workload));
        assert_eq!("idle".parse(), Ok(Workload::default()));
    }

    #[test]
    fn says_what_it_does_not_know() {
        for bad in ["", "busy", "zipf,", "zipf,rate", "zipf,rate=-1", "zipf,speed=1", "zipf,seed="]
        {
            assert!(bad.parse::<Workload>().is_err(), "{bad:?}");
        }
        assert_eq!(
            "zipf,speed=1".parse::<Workload>().unwrap_err().to_string(),
            "workload option \"speed=1\": expected rate=N, working-set=SIZE or seed=N"
        );
    }
}
