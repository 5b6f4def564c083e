//! What is refused is refused in QEMU's classes and words: the same table is held against our
//! server and against the QEMU at hand.

use std::time::Duration;

use crate::fake::Served;
use crate::qemu::Qemu;
use crate::raw::Raw;

/// Requests after the negotiation, and how QEMU 10.0 refuses them.
pub(crate) const REFUSALS: [(&str, &str, &str); 61] = [
    (r#"{"execute":"nope"}"#, "CommandNotFound", "The command nope has not been found"),
    (
        r#"{"execute":"qmp_capabilities"}"#,
        "CommandNotFound",
        "Capabilities negotiation is already complete, command ignored",
    ),
    (
        r#"{"execute":"query-status","arguments":{"x":1}}"#,
        "GenericError",
        "Parameter 'x' is unexpected",
    ),
    (
        r#"{"execute":"query-status","arguments":3}"#,
        "GenericError",
        "QMP input member 'arguments' must be an object",
    ),
    (
        r#"{"execute":"query-status","foo":3}"#,
        "GenericError",
        "QMP input member 'foo' is unexpected",
    ),
    (r#"{"execute":3}"#, "GenericError", "QMP input member 'execute' must be a string"),
    (r#"{"exec-oob":"query-status"}"#, "GenericError", "QMP input member 'exec-oob' is unexpected"),
    (r#"{}"#, "GenericError", "QMP input lacks member 'execute'"),
    (r#"[1,2]"#, "GenericError", "QMP input must be a JSON object"),
    (r#""abc""#, "GenericError", "QMP input must be a JSON object"),
    (r#"12"#, "GenericError", "QMP input must be a JSON object"),
    (r#"{"execute":"yank"}"#, "GenericError", "Parameter 'instances' is missing"),
    (
        r#"{"execute":"yank","arguments":{"instances":{"type":"migration"}}}"#,
        "GenericError",
        "Invalid parameter type for 'instances', expected: array",
    ),
    (
        r#"{"execute":"yank","arguments":{"instances":[{}]}}"#,
        "GenericError",
        "Parameter 'instances[0].type' is missing",
    ),
    (
        r#"{"execute":"yank","arguments":{"instances":[{"type":"bogus"}]}}"#,
        "GenericError",
        "Parameter 'type' does not accept value 'bogus'",
    ),
    (
        r#"{"execute":"yank","arguments":{"instances":[{"type":"migration","id":"x"}]}}"#,
        "GenericError",
        "Parameter 'instances[0].id' is unexpected",
    ),
    (
        r#"{"execute":"yank","arguments":{"instances":[{"type":"chardev","id":"x"}]}}"#,
        "DeviceNotFound",
        "Instance not found",
    ),
    (
        r#"{"execute":"yank","arguments":{"instances":[{"type":"migration"}]}}"#,
        "DeviceNotFound",
        "Instance not found",
    ),
    (r#"{"execute":"migrate"}"#, "GenericError", "need either 'uri' or 'channels' argument"),
    (
        r#"{"execute":"migrate","arguments":{"channels":[]}}"#,
        "GenericError",
        "need either 'uri' or 'channels' argument",
    ),
    (
        r#"{"execute":"migrate","arguments":{"uri":3}}"#,
        "GenericError",
        "Invalid parameter type for 'uri', expected: string",
    ),
    (
        r#"{"execute":"migrate","arguments":{"uri":"tcp:1:2","bad":1}}"#,
        "GenericError",
        "Parameter 'bad' is unexpected",
    ),
    (
        r#"{"execute":"migrate","arguments":{"uri":"tcp:127.0.0.1:4","resume":true}}"#,
        "GenericError",
        "Cannot resume if there is no paused migration",
    ),
    (
        r#"{"execute":"migrate-recover","arguments":{"uri":"tcp:127.0.0.1:0"}}"#,
        "GenericError",
        "Migrate recover can only be run when postcopy is paused.",
    ),
    (
        r#"{"execute":"migrate-recover","arguments":{"uri":3}}"#,
        "GenericError",
        "Invalid parameter type for 'uri', expected: string",
    ),
    (
        r#"{"execute":"migrate-recover","arguments":{"uri":"tcp:127.0.0.1:0","bad":1}}"#,
        "GenericError",
        "Parameter 'bad' is unexpected",
    ),
    (
        r#"{"execute":"migrate","arguments":{"uri":"tcp:127.0.0.1:4","detach":1}}"#,
        "GenericError",
        "Invalid parameter type for 'detach', expected: boolean",
    ),
    (
        r#"{"execute":"migrate","arguments":{"channels":[3]}}"#,
        "GenericError",
        "Invalid parameter type for 'channels[0]', expected: object",
    ),
    (
        r#"{"execute":"migrate","arguments":{"channels":3}}"#,
        "GenericError",
        "Invalid parameter type for 'channels', expected: array",
    ),
    (
        r#"{"execute":"migrate","arguments":{"channels":[{"channel-type":"main","addr":{"transport":"socket","type":"inet","host":"127.0.0.1"}}]}}"#,
        "GenericError",
        "Parameter 'channels[0].addr.port' is missing",
    ),
    (
        r#"{"execute":"migrate","arguments":{"channels":[{"channel-type":"main","addr":{"transport":"socket","type":"inet","host":"h","port":"1","x":1}}]}}"#,
        "GenericError",
        "Parameter 'channels[0].addr.x' is unexpected",
    ),
    (
        r#"{"execute":"migrate","arguments":{"channels":[{"channel-type":"main","addr":{"transport":"socket","type":"bla"}}]}}"#,
        "GenericError",
        "Parameter 'type' does not accept value 'bla'",
    ),
    (
        r#"{"execute":"migrate","arguments":{"channels":[{"channel-type":"main","addr":{"transport":"bla"}}]}}"#,
        "GenericError",
        "Parameter 'transport' does not accept value 'bla'",
    ),
    (
        r#"{"execute":"migrate","arguments":{"channels":[{"channel-type":"main","addr":{"transport":"exec","args":"x"}}]}}"#,
        "GenericError",
        "Invalid parameter type for 'channels[0].addr.args', expected: array",
    ),
    (
        r#"{"execute":"migrate","arguments":{"channels":[{"channel-type":"main","addr":{"transport":"exec","args":[3]}}]}}"#,
        "GenericError",
        "Invalid parameter type for 'channels[0].addr.args[0]', expected: string",
    ),
    (
        r#"{"execute":"migrate","arguments":{"channels":[{"channel-type":"main","addr":{"transport":"file","filename":"x","offset":"y"}}]}}"#,
        "GenericError",
        "Parameter 'channels[0].addr.offset' expects uint64",
    ),
    (
        r#"{"execute":"migrate","arguments":{"channels":[{"channel-type":"mainx","addr":{"transport":"exec","args":["x"]}}]}}"#,
        "GenericError",
        "Parameter 'channel-type' does not accept value 'mainx'",
    ),
    (
        r#"{"execute":"migrate","arguments":{"channels":[{"channel-type":"main","addr":{"transport":"exec","args":["x"]}},{"channel-type":"main","addr":{"transport":"exec","args":["x"]}}]}}"#,
        "GenericError",
        "Channel list has more than one main entry",
    ),
    (
        r#"{"execute":"migrate-incoming","arguments":{"uri":"tcp:127.0.0.1:0","exit-on-error":"x"}}"#,
        "GenericError",
        "Invalid parameter type for 'exit-on-error', expected: boolean",
    ),
    (
        r#"{"execute":"migrate-set-capabilities"}"#,
        "GenericError",
        "Parameter 'capabilities' is missing",
    ),
    (
        r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"bogus","state":true}]}}"#,
        "GenericError",
        "Parameter 'capability' does not accept value 'bogus'",
    ),
    (
        r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"xbzrle"}]}}"#,
        "GenericError",
        "Parameter 'capabilities[0].state' is missing",
    ),
    (
        r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"xbzrle","state":1}]}}"#,
        "GenericError",
        "Invalid parameter type for 'capabilities[0].state', expected: boolean",
    ),
    (
        r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"xbzrle","state":true,"x":1}]}}"#,
        "GenericError",
        "Parameter 'capabilities[0].x' is unexpected",
    ),
    (
        r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":{"capability":"xbzrle"}}}"#,
        "GenericError",
        "Invalid parameter type for 'capabilities', expected: array",
    ),
    (
        r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":3,"state":true}]}}"#,
        "GenericError",
        "Invalid parameter type for 'capabilities[0].capability', expected: string",
    ),
    (
        r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":["xbzrle"]}}"#,
        "GenericError",
        "Invalid parameter type for 'capabilities[0]', expected: object",
    ),
    (
        r#"{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":"x"}}"#,
        "GenericError",
        "Parameter 'max-bandwidth' expects uint64",
    ),
    (
        r#"{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":1.5}}"#,
        "GenericError",
        "Parameter 'max-bandwidth' expects uint64",
    ),
    (
        r#"{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":null}}"#,
        "GenericError",
        "Parameter 'max-bandwidth' expects uint64",
    ),
    (
        r#"{"execute":"migrate-set-parameters","arguments":{"bogus":1}}"#,
        "GenericError",
        "Parameter 'bogus' is unexpected",
    ),
    (
        r#"{"execute":"migrate-set-parameters","arguments":{"max-cpu-throttle":1000}}"#,
        "GenericError",
        "Parameter 'max-cpu-throttle' expects uint8_t",
    ),
    (
        r#"{"execute":"migrate-set-parameters","arguments":{"max-cpu-throttle":100}}"#,
        "GenericError",
        "Parameter 'max_cpu_throttle' expects an integer in the range of cpu_throttle_initial to 99",
    ),
    (
        r#"{"execute":"migrate-set-parameters","arguments":{"cpu-throttle-initial":0}}"#,
        "GenericError",
        "Parameter 'cpu_throttle_initial' expects an integer in the range of 1 to 99",
    ),
    (
        r#"{"execute":"migrate-set-parameters","arguments":{"cpu-throttle-increment":100}}"#,
        "GenericError",
        "Parameter 'cpu_throttle_increment' expects an integer in the range of 1 to 99",
    ),
    (
        r#"{"execute":"migrate-set-parameters","arguments":{"cpu-throttle-tailslow":3}}"#,
        "GenericError",
        "Invalid parameter type for 'cpu-throttle-tailslow', expected: boolean",
    ),
    (
        r#"{"execute":"migrate-set-parameters","arguments":{"downtime-limit":2000001}}"#,
        "GenericError",
        "Parameter 'downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms",
    ),
    (
        r#"{"execute":"migrate-set-parameters","arguments":{"xbzrle-cache-size":5}}"#,
        "GenericError",
        "Parameter 'xbzrle_cache_size' expects a power of two no less than the target page size",
    ),
    (
        r#"{"execute":"migrate-set-parameters","arguments":{"throttle-trigger-threshold":0}}"#,
        "GenericError",
        "Parameter 'throttle_trigger_threshold' expects an integer in the range of 1 to 100",
    ),
    (r#"{"execute":"migrate-continue"}"#, "GenericError", "Parameter 'state' is missing"),
    (
        r#"{"execute":"migrate-continue","arguments":{"state":"bogus"}}"#,
        "GenericError",
        "Parameter 'state' does not accept value 'bogus'",
    ),
];

/// The same of a client that has negotiated `oob`.
const REFUSALS_OUT_OF_BAND: [(&str, &str, &str); 12] = [
    (
        r#"{"exec-oob":"query-status","id":2}"#,
        "GenericError",
        "The command query-status does not support OOB",
    ),
    (
        r#"{"exec-oob":"qmp_capabilities","id":2}"#,
        "GenericError",
        "The command qmp_capabilities does not support OOB",
    ),
    (r#"{"exec-oob":"nope"}"#, "CommandNotFound", "The command nope has not been found"),
    (r#"{"exec-oob":3}"#, "GenericError", "QMP input member 'exec-oob' must be a string"),
    (
        r#"{"exec-oob":"yank","execute":"yank"}"#,
        "GenericError",
        "QMP input member 'execute' clashes with 'exec-oob'",
    ),
    (
        r#"{"exec-oob":"yank","arguments":3}"#,
        "GenericError",
        "QMP input member 'arguments' must be an object",
    ),
    (r#"{"exec-oob":"yank","foo":3}"#, "GenericError", "QMP input member 'foo' is unexpected"),
    (r#"{"exec-oob":"yank"}"#, "GenericError", "Parameter 'instances' is missing"),
    (
        r#"{"exec-oob":"migrate-recover","arguments":{"uri":"tcp:127.0.0.1:0"}}"#,
        "GenericError",
        "Migrate recover can only be run when postcopy is paused.",
    ),
    (
        r#"{"exec-oob":"migrate-pause","arguments":{"x":1}}"#,
        "GenericError",
        "Parameter 'x' is unexpected",
    ),
    (r#"{"foo":1}"#, "GenericError", "QMP input member 'foo' is unexpected"),
    (r#"{"id":1}"#, "GenericError", "QMP input lacks member 'execute'"),
];

fn check(raw: &mut Raw, refusals: &[(&str, &str, &str)], whose: &str) {
    for &(request, class, desc) in refusals {
        assert_eq!(raw.refused(request), (class.into(), desc.into()), "{whose}: {request}");
    }
}

#[test]
fn refusals_have_qemus_classes_and_words() {
    let served = Served::new();
    check(&mut Raw::negotiated(&served.path()), &REFUSALS, "whimbrel");
    check(&mut Raw::out_of_band(&served.path()), &REFUSALS_OUT_OF_BAND, "whimbrel");
    assert_eq!(served.fake.calls(), Vec::<String>::new());
}

/// QEMU before 8.2 has no `channels` and words some refusals in another way, so the table is held
/// against 10.0 and later only.
#[test]
fn refusals_of_the_qemu_at_hand_are_the_same() {
    let Some(qemu) = Qemu::start(&["-m", "16M"]) else { return };
    let version = qemu.client(Duration::from_secs(20)).version()["qemu"]["major"].as_u64().unwrap();
    if version < 10 {
        eprintln!("skipped: QEMU {version} words its refusals in another way");
        return;
    }
    check(&mut Raw::negotiated(qemu.socket()), &REFUSALS, "QEMU");
    check(&mut Raw::out_of_band(qemu.socket()), &REFUSALS_OUT_OF_BAND, "QEMU");
}
