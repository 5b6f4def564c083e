//! Whether the guest arrived as it left.

use std::fmt;

use serde_json::Value;

use super::pages::Compared;

/// What both sides say of RAM, and what the guest says of itself.
#[derive(Clone, Debug)]
pub(super) struct Verdict {
    /// What is wrong, if anything.
    pub(super) failure: Option<String>,
    /// Pages that are the same on both sides.
    pub(super) identical: u64,
    /// Pages that the guest has written since it left.
    pub(super) written: u64,
    /// Page updates the guest has done in its life, on both sides.
    pub(super) updates: u64,
    /// Those it did when all was there, before it was asked again.
    went_on: u64,
}

/// What the guest says of itself (`x-self-check`).
#[derive(Debug)]
pub(super) struct Checks {
    /// After it had arrived, stopped.
    pub(super) before: Value,
    /// After it had run on.
    pub(super) after: Value,
}

impl Checks {
    fn failure(&self) -> Option<String> {
        failed_check("on arrival", &self.before).or(failed_check("running on", &self.after))
    }
}

fn failed_check(when: &str, check: &Value) -> Option<String> {
    if check["passed"] != true {
        return Some(format!("the guest's self-check {when}: {check}"));
    }
    let failure = check["failure"].as_str();
    failure.map(|failure| format!("a vCPU failed {when}: {failure}"))
}

fn updates(check: &Value) -> u64 {
    check["updates"].as_u64().unwrap_or(0)
}

impl Verdict {
    fn new(failure: Option<String>, checks: &Checks) -> Verdict {
        let failure = failure.or_else(|| checks.failure());
        Verdict {
            failure: failure.map(|what| format!("not verified: {what}")),
            identical: 0,
            written: 0,
            updates: updates(&checks.after),
            went_on: updates(&checks.after).saturating_sub(updates(&checks.before)),
        }
    }

    /// Of a guest that stood still until all of its RAM had been compared: `left` and `arrived` are
    /// what the two sides answered to `x-ram-digest`.
    pub(super) fn standing(left: &Value, arrived: &Value, checks: &Checks) -> Verdict {
        let blocks = left["blocks"].as_array().filter(|_| left["blocks"] == arrived["blocks"]);
        let differs = || format!("RAM differs: {left} left, {arrived} arrived");
        let failure = blocks.is_none().then(differs);
        let blocks = blocks.into_iter().flatten();
        let identical = blocks.filter_map(|block| block["pages"].as_u64()).sum();
        Verdict { identical, ..Verdict::new(failure, checks) }
    }

    /// Of a guest that ran on: how each page compares with what it was at the source, where the
    /// guest's check of itself was `at_source`; `vcpus` of its updates may have been under way.
    pub(super) fn running(
        compared: &Compared,
        at_source: &Value,
        vcpus: u32,
        checks: &Checks,
    ) -> Verdict {
        let (then, now) = (updates(at_source), updates(&checks.before));
        let failure = if compared.strayed > 0 {
            let first = compared.first_strayed.as_deref().unwrap_or("?");
            let (pages, first) = (compared.strayed, first);
            Some(format!("{pages} pages differ that the guest never writes, the first: {first}"))
        } else if now < then {
            Some(format!("the guest has gone back: {now} updates, {then} at the source"))
        } else if compared.updated > now - then + u64::from(vcpus) {
            let (pages, since) = (compared.updated, now - then);
            Some(format!("{pages} pages of the working set differ after {since} updates"))
        } else {
            failed_check("at the source", at_source)
        };
        let Compared { identical, written, .. } = *compared;
        Verdict { identical, written, ..Verdict::new(failure, checks) }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Verdict { failure, identical, written, went_on, .. } = self;
        if let Some(failure) = failure {
            return f.write_str(failure);
        }
        match written {
            0 => write!(f, "all {identical} pages identical; ")?,
            _ => write!(
                f,
                "{identical} pages identical, {written} written by the guest since and checked by \
                 it; "
            )?,
        }
        write!(f, "the guest went on ({went_on} updates), checked itself and found no error")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(updates: u64) -> Value {
        json!({ "passed": true, "updates": updates, "failure": null })
    }

    fn checks(before: u64, after: u64) -> Checks {
        Checks { before: check(before), after: check(after) }
    }

    #[test]
    fn a_guest_that_stood_still_is_compared_block_by_block() {
        let ram =
            |digest: &str| json!({ "blocks": [{"name": "ram", "pages": 8, "digest": digest}] });
        let good = Verdict::standing(&ram("1"), &ram("1"), &checks(5, 12));
        assert_eq!(good.failure, None);
        assert_eq!(
            good.to_string(),
            "all 8 pages identical; the guest went on (7 updates), checked itself and found no error"
        );
        let bad = Verdict::standing(&ram("1"), &ram("2"), &checks(5, 12));
        assert!(bad.failure.unwrap().starts_with("not verified: RAM differs: "));
        let empty = Verdict::standing(&json!({}), &json!({}), &checks(5, 12));
        assert!(empty.failure.is_some(), "nothing was compared");
    }

    #[test]
    fn a_guest_that_ran_on_may_have_changed_what_it_can_have_changed() {
        let compared = Compared { identical: 90, written: 10, updated: 7, ..Compared::default() };
        let judged = |compared: &Compared, then: u64, checks: &Checks| {
            Verdict::running(compared, &check(then), 2, checks)
        };
        let good = judged(&compared, 100, &checks(105, 120));
        assert_eq!(good.failure, None, "5 updates, and 2 vCPUs in the midst of one");
        assert_eq!((good.identical, good.written, good.updates), (90, 10, 120));
        assert!(good.to_string().starts_with("90 pages identical, 10 written by the guest since"));

        let failure = |verdict: Verdict| verdict.failure.expect("not verified");
        let text = failure(judged(&compared, 101, &checks(105, 120)));
        assert_eq!(text, "not verified: 7 pages of the working set differ after 4 updates");
        let text = failure(judged(&compared, 106, &checks(105, 120)));
        assert_eq!(text, "not verified: the guest has gone back: 105 updates, 106 at the source");
        let strayed =
            Compared { strayed: 1, first_strayed: Some("ram, page 3".into()), ..compared.clone() };
        let text = failure(judged(&strayed, 100, &checks(105, 120)));
        assert!(
            text.ends_with("1 pages differ that the guest never writes, the first: ram, page 3")
        );
    }

    #[test]
    fn what_the_guest_finds_counts_whenever_it_finds_it() {
        let bad = json!({ "passed": false, "updates": 105, "first-error": "stale" });
        let hung = json!({ "passed": true, "updates": 105, "failure": "vcpu-0: no" });
        for (checks, expected) in [
            (Checks { before: bad.clone(), after: check(120) }, "self-check on arrival"),
            (Checks { before: check(105), after: bad.clone() }, "self-check running on"),
            (Checks { before: check(105), after: hung }, "a vCPU failed running on: vcpu-0: no"),
        ] {
            let verdict = Verdict::running(&Compared::default(), &check(100), 1, &checks);
            assert!(verdict.failure.unwrap().contains(expected), "{expected}");
        }
        let verdict = Verdict::running(&Compared::default(), &bad, 1, &checks(105, 120));
        assert!(verdict.failure.unwrap().contains("self-check at the source"));
    }
}
