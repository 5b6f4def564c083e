//! All that a demo has to tell, before it is put as JSON, text or a page.

use std::time::Duration;

use serde_json::{Value, json};
use whimbrel::{AnswerStats, FaultStats};
use whimbrel_control::MigrationReport;

use super::record::Sample;
use super::verdict::Verdict;

/// A migration that came to its end, and what it was of.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) mode: String,
    pub(super) vm: VmFacts,
    pub(super) source: MigrationReport,
    pub(super) postcopy: Option<Postcopy>,
    pub(super) samples: Vec<Sample>,
    pub(super) verdict: Verdict,
    /// The command line.
    pub(super) command: Vec<String>,
}

/// What was moved.
#[derive(Clone, Debug, Default)]
pub(super) struct VmFacts {
    pub(super) accel: String,
    pub(super) dirty_log: String,
    pub(super) workload: String,
    pub(super) vcpus: u32,
    pub(super) memory: u64,
    pub(super) page_size: usize,
}

/// What there is to tell of postcopy: all zero when precopy was done before it could begin.
#[derive(Clone, Debug, Default)]
pub(super) struct Postcopy {
    /// From the guest's leaving to the last page, as the source has it.
    pub(super) time: Option<Duration>,
    pub(super) faults: FaultStats,
    pub(super) answers: AnswerStats,
    /// Faults by how long they took, in QEMU's buckets.
    pub(super) dist: Vec<u64>,
    /// Updates the guest had done at the destination before all of its RAM was there.
    pub(super) updates_meanwhile: u64,
    /// The longest time between two updates of a vCPU at the destination, by the guest's clock.
    pub(super) gap_max: Duration,
    /// What the destination tells beside: `postcopy-blocktime` and the like.
    pub(super) blocktime: Vec<(String, Value)>,
}

/// A part of a fault's time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Part {
    pub(super) name: &'static str,
    pub(super) what: &'static str,
    /// On average, in µs.
    pub(super) us: f64,
}

impl Postcopy {
    /// From what the two sides report at their ends.
    pub(super) fn of(source: &MigrationReport, destination: &MigrationReport) -> Postcopy {
        let names = [
            "postcopy-blocktime",
            "postcopy-vcpu-blocktime",
            "postcopy-latency",
            "postcopy-vcpu-latency",
            "postcopy-non-vcpu-latency",
        ];
        let told = |name: &str| Some((name.to_owned(), destination.raw.get(name)?.clone()));
        Postcopy {
            faults: destination.info.faults.clone().unwrap_or_default(),
            answers: source.info.answers.clone().unwrap_or_default(),
            dist: destination.info.postcopy_latency_dist.clone().unwrap_or_default(),
            blocktime: names.into_iter().filter_map(told).collect(),
            ..Postcopy::default()
        }
    }

    /// Where a fault's time goes. What is queued is told by the source, of those requests that it
    /// answered by a page of their own; the rest of what the destination waited is the wire's.
    /// Without such answers the two cannot be told apart.
    pub(super) fn split(&self) -> Vec<Part> {
        let part = |name, what, us| Part { name, what, us };
        let waited = self.faults.waited_us.mean;
        let queued = self.answers.queued_us.mean.min(waited);
        let mut parts = vec![part(
            "asked",
            "at the destination, until the request was written",
            self.faults.asked_us.mean,
        )];
        if self.answers.count == 0 {
            parts.push(part(
                "waited",
                "at the source, behind other pages, and on the wire",
                waited,
            ));
        } else {
            let what = "at the source, from reading the request to the page being with its kernel";
            parts.push(part("queued", what, queued));
            parts.push(part(
                "wire",
                "both ways, and in the kernels of both sides",
                waited - queued,
            ));
        }
        parts.push(part(
            "placed",
            "at the destination, from the page's first byte to the guest going on",
            self.faults.placed_us.mean,
        ));
        parts
    }
}

impl Outcome {
    /// How long the migration was watched, in µs.
    pub(super) fn observed_us(&self) -> f64 {
        let ends = self.samples.first().zip(self.samples.last());
        ends.map_or(0.0, |(first, last)| (last.after - first.after).as_micros() as f64)
    }

    /// `--json`: one object, under QMP's names.
    pub(super) fn to_json(&self) -> Value {
        let report = &self.source.raw;
        let mut object = json!({
            "mode": self.mode,
            "accel": self.vm.accel,
            "dirty-log": self.vm.dirty_log,
            "workload": self.vm.workload,
            "vcpus": self.vm.vcpus,
            "memory-bytes": self.vm.memory,
            "page-size": self.vm.page_size,
            "status": report["status"],
            "total-time": report["total-time"],
            "setup-time": report["setup-time"],
            "downtime": report["downtime"],
            "ram": report["ram"],
            "verified": self.verdict.failure.is_none(),
            "pages-identical": self.verdict.identical,
            "pages-written-since": self.verdict.written,
            "guest-updates": self.verdict.updates,
        });
        if let Some(postcopy) = &self.postcopy {
            let ms = postcopy.time.unwrap_or_default().as_micros() as f64 / 1000.0;
            object["postcopy-time"] = ms.into();
            object["faults"] = postcopy.faults.count.into();
            object["fault-latency-us"] = json!(postcopy.faults.latency_us);
            object["fault-split-us"] = json!({});
            for part in postcopy.split() {
                object["fault-split-us"][part.name] = part.us.into();
            }
            object["postcopy-latency-dist"] = json!(postcopy.dist);
            object["x-faults"] = json!(postcopy.faults);
            object["x-answers"] = json!(postcopy.answers);
            object["guest-updates-in-postcopy"] = postcopy.updates_meanwhile.into();
            object["guest-gap-max-us"] =
                u64::try_from(postcopy.gap_max.as_micros()).unwrap_or(u64::MAX).into();
            for (name, value) in &postcopy.blocktime {
                object[name] = value.clone();
            }
        }
        if let Some(why) = &self.verdict.failure {
            object["error-desc"] = why.as_str().into();
        }
        object
    }
}

/// Outcomes to draw, in tests: real types, made-up figures.
#[cfg(test)]
pub(super) mod samples {
    use whimbrel::Latency;

    use super::super::pages::Compared;
    use super::super::verdict::Checks;
    use super::*;

    fn latency(mean: f64) -> Latency {
        Latency { mean, p50: mean * 0.8, p90: mean * 1.5, p99: mean * 4.0, max: mean * 9.5 }
    }

    fn report(raw: Value) -> MigrationReport {
        let info = serde_json::from_value(raw.clone()).unwrap();
        let status = whimbrel_control::PeerStatus::Known(whimbrel::MigrationStatus::Completed);
        MigrationReport { status, info, raw }
    }

    pub(in super::super) fn verdict() -> Verdict {
        let check = |updates: u64| json!({ "passed": true, "updates": updates, "failure": null });
        let compared =
            Compared { identical: 65_234, written: 318, updated: 300, ..Compared::default() };
        let checks = Checks { before: check(2_400), after: check(3_400) };
        Verdict::running(&compared, &check(2_000), 1, &checks)
    }

    /// A migration in postcopy with this many faults, in the buckets from 32 µs on.
    pub(in super::super) fn outcome(faults: &[u64]) -> Outcome {
        let mut dist = vec![0; 24];
        dist[5..5 + faults.len()].copy_from_slice(faults);
        let source = report(json!({
            "status": "completed", "total-time": 1412, "setup-time": 3, "downtime": 4,
            "ram": { "transferred": 300 << 20, "remaining": 0, "total": 256 << 20, "normal": 16_500,
                     "duplicate": 49_000, "dirty-sync-count": 2, "postcopy-requests": 100,
                     "page-size": 4096, "postcopy-bytes": 200 << 20, "mbps": 1000.0 },
            "x-answers": AnswerStats { count: 90, queued_us: latency(12.0), already_sent: 10 },
        }));
        let stats = FaultStats {
            count: faults.iter().sum(),
            latency_us: latency(96.0),
            asked_us: latency(9.0),
            waited_us: latency(71.0),
            placed_us: latency(16.0),
            asked_again: 0,
            came_twice: 1,
        };
        let destination = report(json!({
            "status": "completed", "postcopy-blocktime": 9, "postcopy-vcpu-blocktime": [9],
            "postcopy-latency": 96_000, "postcopy-latency-dist": dist, "x-faults": stats,
        }));
        let sample = |step: u64| Sample {
            after: Duration::from_millis(step * 10),
            bytes: step.min(40) * (1 << 20) + step.saturating_sub(45) * (3 << 20),
            postcopy: step >= 45,
        };
        Outcome {
            mode: "preempt".into(),
            vm: VmFacts {
                accel: "kvm".into(),
                dirty_log: "kvm-log".into(),
                workload: "uniform,rate=2000,seed=1".into(),
                vcpus: 1,
                memory: 256 << 20,
                page_size: 4096,
            },
            postcopy: Some(Postcopy {
                time: Some(Duration::from_micros(962_300)),
                updates_meanwhile: 1_800,
                gap_max: Duration::from_micros(1_530),
                ..Postcopy::of(&source, &destination)
            }),
            source,
            samples: (0..=141).map(sample).collect(),
            verdict: verdict(),
            command: ["whimbrel", "demo", "--report", "a&b<c>.html"].map(str::to_owned).into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_object_has_what_was_promised() {
        let object = samples::outcome(&[10, 60, 25, 5]).to_json();
        for name in ["mode", "accel", "memory-bytes", "page-size", "status", "total-time"] {
            assert!(!object[name].is_null(), "{name}: {object}");
        }
        assert_eq!((&object["faults"], &object["verified"]), (&json!(100), &json!(true)));
        for name in ["mean", "p50", "p90", "p99", "max"] {
            assert!(object["fault-latency-us"][name].as_f64() > Some(0.0), "{name}: {object}");
        }
        let dist = object["postcopy-latency-dist"].as_array().unwrap();
        assert_eq!(dist.iter().filter_map(Value::as_u64).sum::<u64>(), 100);
        assert_eq!(object["postcopy-time"], 962.3);
        assert_eq!(object["postcopy-vcpu-blocktime"], json!([9]));
        let split = object["fault-split-us"].as_object().unwrap();
        let sum: f64 = split.values().filter_map(Value::as_f64).sum();
        assert!((sum - 96.0).abs() < 1e-6, "the parts of a fault are all of it: {object}");
        assert_eq!(object["fault-split-us"]["wire"], 59.0);

        let precopy = Outcome { postcopy: None, ..samples::outcome(&[]) }.to_json();
        assert!(precopy.get("faults").is_none() && precopy.get("fault-latency-us").is_none());
    }

    #[test]
    fn no_part_of_a_fault_is_less_than_nothing() {
        let mut postcopy = samples::outcome(&[1]).postcopy.unwrap();
        let split = |postcopy: &Postcopy| -> Vec<(&str, f64)> {
            postcopy.split().iter().map(|part| (part.name, part.us)).collect()
        };
        postcopy.answers.queued_us.mean = 1e6;
        assert_eq!(
            split(&postcopy),
            [("asked", 9.0), ("queued", 71.0), ("wire", 0.0), ("placed", 16.0)]
        );
        postcopy.answers = AnswerStats::default();
        assert_eq!(split(&postcopy), [("asked", 9.0), ("waited", 71.0), ("placed", 16.0)]);
    }
}
