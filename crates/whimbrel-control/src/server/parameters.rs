//! `migrate-set-parameters`: any subset of the parameters, all of it or none.

use serde_json::{Map, Value};
use whimbrel::{Parameters, SettingError};

use crate::QmpError;

/// Texts that are unset by null, which is the same as an empty one.
const RESET_BY_NULL: [&str; 4] = ["tls-creds", "tls-hostname", "tls-authz", "recover-uri"];

/// Puts `changes` over `parameters`. Names, types and ranges are those of [`Parameters`], so
/// that one added there is known here.
pub(super) fn merge(
    parameters: &mut Parameters,
    changes: &Map<String, Value>,
) -> Result<(), QmpError> {
    let Value::Object(mut merged) =
        serde_json::to_value(&*parameters).map_err(QmpError::generic)?
    else {
        return Err(QmpError::generic("the parameters are no JSON object"));
    };
    let mut outcome = parameters.clone();
    for (name, value) in changes {
        let Some(present) = merged.get(name) else { return Err(QmpError::unexpected(name)) };
        // QEMU's way to unset a text.
        let unset = Value::String(String::new());
        let value =
            if value.is_null() && RESET_BY_NULL.contains(&&**name) { &unset } else { value };
        check_type(name, present, value)?;
        merged.insert(name.clone(), value.clone());
        outcome = serde_json::from_value(Value::Object(merged.clone()))
            .map_err(|_| refused(name, value))?;
    }
    outcome.check().map_err(|error| out_of_range(&error))?;
    *parameters = outcome;
    Ok(())
}

fn check_type(name: &str, present: &Value, value: &Value) -> Result<(), QmpError> {
    match (present, value) {
        (Value::Bool(_), Value::Bool(_)) | (Value::String(_), Value::String(_)) => Ok(()),
        (Value::Number(_), number) if number.is_u64() => Ok(()),
        (Value::Number(_), _) => {
            Err(QmpError::generic(format_args!("Parameter '{name}' expects uint64")))
        }
        (Value::Bool(_), _) => Err(QmpError::wrong_type(name, "boolean")),
        (Value::String(_), _) => Err(QmpError::wrong_type(name, "string")),
        // What is shaped otherwise is for its own deserialiser to judge.
        (Value::Null | Value::Array(_) | Value::Object(_), _) => Ok(()),
    }
}

/// Of the right kind, and yet not taken: a number too large for its field, or an unknown word.
fn refused(name: &str, value: &Value) -> QmpError {
    match value {
        Value::Number(_) => QmpError::generic(format_args!("Parameter '{name}' expects uint8_t")),
        Value::String(word) => QmpError::wrong_value(name, word),
        other => QmpError::wrong_value(name, &other.to_string()),
    }
}

/// QEMU's texts, in which these names have underscores.
fn out_of_range(error: &SettingError) -> QmpError {
    match error {
        SettingError::Range { name, .. } => {
            let expected = match *name {
                "throttle-trigger-threshold" => "an integer in the range of 1 to 100",
                "cpu-throttle-initial" | "cpu-throttle-increment" => {
                    "an integer in the range of 1 to 99"
                }
                "max-cpu-throttle" => "an integer in the range of cpu_throttle_initial to 99",
                "downtime-limit" => "an integer in the range of 0 to (2000 * 1000) ms",
                "multifd-channels" => "a value between 1 and 255",
                "multifd-zlib-level" => "a value between 0 and 9",
                "multifd-zstd-level" => "a value between 0 and 20",
                "silence-limit" => "0, or 100 ms or more",
                "xbzrle-cache-size" => "a power of two no less than the target page size",
                _ => return QmpError::generic(error),
            };
            let name = name.replace('-', "_");
            QmpError::generic(format_args!("Parameter '{name}' expects {expected}"))
        }
        SettingError::Running
        | SettingError::Needs { .. }
        | SettingError::Excludes { .. }
        | SettingError::Address { .. } => QmpError::generic(error),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use whimbrel::AutoRecover;

    use super::*;

    fn try_merge(changes: Value) -> Result<Parameters, String> {
        let mut parameters = Parameters::default();
        let before = parameters.clone();
        match merge(&mut parameters, changes.as_object().unwrap()) {
            Ok(()) => Ok(parameters),
            Err(error) => {
                assert_eq!(parameters, before, "a refused change must change nothing");
                Err(error.desc)
            }
        }
    }

    #[test]
    fn a_subset_changes_what_it_names() {
        let changed = try_merge(json!({"max-bandwidth": 7, "cpu-throttle-tailslow": true}));
        let expected =
            Parameters { max_bandwidth: 7, cpu_throttle_tailslow: true, ..Parameters::default() };
        assert_eq!(changed, Ok(expected));
    }

    #[test]
    fn what_a_recovery_does_is_set_like_any_parameter() {
        let changed = try_merge(json!({
            "auto-recover": "on", "recover-time-limit": 0, "recover-uri": "tcp:other:7",
            "silence-limit": 100,
        }));
        let expected = Parameters {
            auto_recover: AutoRecover::On,
            recover_time_limit: 0,
            recover_uri: "tcp:other:7".into(),
            silence_limit: 100,
            ..Parameters::default()
        };
        assert_eq!(changed.as_ref(), Ok(&expected));
        let mut parameters = expected;
        let unset = json!({"recover-uri": null, "silence-limit": 0, "auto-recover": "auto"});
        merge(&mut parameters, unset.as_object().unwrap()).unwrap();
        let left = Parameters { recover_time_limit: 0, silence_limit: 0, ..Parameters::default() };
        assert_eq!(parameters, left);
    }

    #[test]
    fn null_unsets_the_names_of_tls() {
        let set = try_merge(json!({"tls-creds": "tls0", "tls-hostname": "a"}));
        assert_eq!(set.map(|set| set.tls_creds), Ok("tls0".into()));
        let mut parameters = Parameters { tls_creds: "tls0".into(), ..Parameters::default() };
        let unset = json!({"tls-creds": null, "tls-authz": ""});
        merge(&mut parameters, unset.as_object().unwrap()).unwrap();
        assert_eq!(parameters, Parameters::default());
    }

    #[test]
    fn two_that_depend_on_each_other_are_judged_together() {
        let both = json!({"cpu-throttle-initial": 60, "max-cpu-throttle": 70});
        let mut parameters = Parameters { max_cpu_throttle: 50, ..Parameters::default() };
        merge(&mut parameters, both.as_object().unwrap()).unwrap();
        assert_eq!((parameters.cpu_throttle_initial, parameters.max_cpu_throttle), (60, 70));
    }

    #[test]
    fn what_is_refused_is_refused_in_qemus_words() {
        let cases = [
            (json!({"bogus": 1}), "Parameter 'bogus' is unexpected"),
            (json!({"max-bandwidth": "x"}), "Parameter 'max-bandwidth' expects uint64"),
            (json!({"max-bandwidth": 1.5}), "Parameter 'max-bandwidth' expects uint64"),
            (json!({"max-bandwidth": null}), "Parameter 'max-bandwidth' expects uint64"),
            (json!({"max-cpu-throttle": 1000}), "Parameter 'max-cpu-throttle' expects uint8_t"),
            (
                json!({"cpu-throttle-tailslow": 3}),
                "Invalid parameter type for 'cpu-throttle-tailslow', expected: boolean",
            ),
            (
                json!({"downtime-limit": 100, "cpu-throttle-initial": 0}),
                "Parameter 'cpu_throttle_initial' expects an integer in the range of 1 to 99",
            ),
            (
                json!({"auto-recover": "yes"}),
                "Parameter 'auto-recover' does not accept value 'yes'",
            ),
            (
                json!({"auto-recover": true}),
                "Invalid parameter type for 'auto-recover', expected: string",
            ),
            (
                json!({"auto-recover": null}),
                "Invalid parameter type for 'auto-recover', expected: string",
            ),
            (json!({"recover-time-limit": -1}), "Parameter 'recover-time-limit' expects uint64"),
            (
                json!({"silence-limit": 99}),
                "Parameter 'silence_limit' expects 0, or 100 ms or more",
            ),
            (
                json!({"recover-uri": 4}),
                "Invalid parameter type for 'recover-uri', expected: string",
            ),
            (
                json!({"recover-uri": "tcp:h"}),
                "parameter 'recover-uri': 'tcp:h' is no migration address: expected HOST:PORT",
            ),
            (
                json!({"recover-uri": "fd:3"}),
                "parameter 'recover-uri': 'fd:3' cannot be connected to again and again: \
                 expected tcp: or unix:",
            ),
        ];
        for (changes, expected) in cases {
            assert_eq!(try_merge(changes), Err(expected.into()));
        }
    }
}
