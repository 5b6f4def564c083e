//! What a client of QMP asks, as values: commands and arguments that exist, put together in any
//! way, and text that is no JSON between them.

use serde_json::{Map, Value, json};

use crate::choices::{Choices, language, read_all};

language! {
    /// What is said. A choice is taken modulo the number of choices.
    pub(crate) enum Asked {
        /// A command, with the arguments that follow.
        Command { command: u8, id: u8 },
        Argument { name: u8, value: u8, number: u32 },
        /// An argument that is a list of objects with two members.
        Entries { name: u8, keys: u8, value: u8, count: u8 },
        Raw { bytes: Vec<u8> },
        /// Changes a byte of what was said before.
        Damage { back: u16, value: u8 },
        /// Opens so many lists.
        Deep { depth: u16 },
    }
}

const COMMANDS: [&str; 28] = [
    "qmp_capabilities",
    "quit",
    "cont",
    "stop",
    "migrate",
    "migrate-incoming",
    "migrate-continue",
    "migrate-pause",
    "migrate-recover",
    "migrate-set-capabilities",
    "migrate-set-parameters",
    "migrate-start-postcopy",
    "migrate_cancel",
    "object-add",
    "object-del",
    "query-commands",
    "query-migrate",
    "query-migrate-capabilities",
    "query-migrate-parameters",
    "query-migrationthreads",
    "query-name",
    "query-status",
    "query-version",
    "query-yank",
    "yank",
    "x-whimbrel-checksum",
    "x-unknown",
    "",
];

const NAMES: [&str; 48] = [
    "uri",
    "channels",
    "detach",
    "resume",
    "exit-on-error",
    "state",
    "capabilities",
    "capability",
    "instances",
    "type",
    "id",
    "enable",
    "qom-type",
    "endpoint",
    "verify-peer",
    "sanity-check",
    "dir",
    "identity",
    "policy",
    "rules",
    "match",
    "format",
    "channel-type",
    "addr",
    "transport",
    "host",
    "port",
    "path",
    "args",
    "filename",
    "offset",
    "str",
    "max-bandwidth",
    "downtime-limit",
    "multifd-channels",
    "multifd-compression",
    "multifd-zlib-level",
    "multifd-zstd-level",
    "tls-creds",
    "tls-hostname",
    "tls-authz",
    "cpu-throttle-initial",
    "cpu-throttle-increment",
    "max-cpu-throttle",
    "throttle-trigger-threshold",
    "xbzrle-cache-size",
    "max-postcopy-bandwidth",
    "zero-page-detection",
];

const WORDS: [&str; 32] = [
    "tcp:127.0.0.1:4444",
    "tcp:[::1]:0",
    "unix:/tmp/a",
    "fd:7",
    "exec:true",
    "file:/tmp/x,offset=0x10",
    "file:,offset=",
    "rdma:x",
    "",
    "main",
    "socket",
    "inet",
    "unix",
    "fd",
    "exec",
    "file",
    "migration",
    "block-node",
    "chardev",
    "postcopy-ram",
    "multifd",
    "xbzrle",
    "pre-switchover",
    "tls-creds-x509",
    "authz-simple",
    "authz-list",
    "server",
    "deny",
    "glob",
    "zstd",
    "multifd",
    "\u{0}\u{7f}\u{e9}\u{1f600}\"\\\n",
];

fn one_of<T: Copy>(all: &[T], choice: u8) -> T {
    all[usize::from(choice) % all.len()]
}

fn value(choice: u8, number: u32) -> Value {
    match choice % 16 {
        0..=5 => Value::from(one_of(&WORDS, number.to_le_bytes()[0])),
        6 => number.into(),
        7 => (u64::from(number) << 32).into(),
        8 => Value::from(-i64::from(number)),
        9 => (f64::from(number) / 3.0).into(),
        10 => true.into(),
        11 => false.into(),
        12 => Value::Null,
        13 => json!([one_of(&WORDS, choice), number]),
        14 => json!({ one_of(&NAMES, choice): one_of(&WORDS, number.to_le_bytes()[0]) }),
        _ => json!({
            "transport": "socket",
            "type": "inet",
            "host": one_of(&WORDS, number.to_le_bytes()[1]),
            "port": one_of(&WORDS, number.to_le_bytes()[0]),
        }),
    }
}

/// The text of an input.
pub(crate) fn text(from: &mut Choices<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    let mut command: Option<(u8, u8, Map<String, Value>)> = None;
    let finish = |command: &mut Option<(u8, u8, Map<String, Value>)>, out: &mut Vec<u8>| {
        let Some((number, id, arguments)) = command.take() else { return };
        let mut request = json!({ "execute": one_of(&COMMANDS, number) });
        if !arguments.is_empty() || id & 1 != 0 {
            request["arguments"] = arguments.into();
        }
        if id & 2 != 0 {
            request["id"] = value(id >> 2, id.into());
        }
        out.extend(request.to_string().bytes());
        out.push(b'\n');
    };
    for op in read_all(from) {
        match op {
            Asked::Command { command: number, id } => {
                finish(&mut command, &mut out);
                command = Some((number, id, Map::new()));
            }
            Asked::Argument { name, value: choice, number } => {
                if let Some((_, _, arguments)) = &mut command {
                    arguments.insert(one_of(&NAMES, name).into(), value(choice, number));
                }
            }
            Asked::Entries { name, keys, value: choice, count } => {
                let [one, other] = match keys % 4 {
                    0 => ["capability", "state"],
                    1 => ["channel-type", "addr"],
                    2 => ["match", "policy"],
                    _ => ["type", "id"],
                };
                let entry = json!({
                    one: value(0, keys.into()),
                    other: value(choice, choice.into()),
                });
                if let Some((_, _, arguments)) = &mut command {
                    let entries = vec![entry; usize::from(count % 8)];
                    arguments.insert(one_of(&NAMES, name).into(), entries.into());
                }
            }
            Asked::Raw { bytes } => {
                finish(&mut command, &mut out);
                out.extend(bytes);
            }
            Asked::Damage { back, value } => {
                finish(&mut command, &mut out);
                if let Some(at) = out.len().checked_sub(usize::from(back) + 1) {
                    out[at] = value;
                }
            }
            Asked::Deep { depth } => {
                finish(&mut command, &mut out);
                out.resize(out.len() + usize::from(depth), b'[');
            }
        }
    }
    finish(&mut command, &mut out);
    out
}

/// Sessions, from which a fuzzer begins: every command, with some arguments.
pub(crate) fn sessions() -> Vec<(String, Vec<Asked>)> {
    let begin = Asked::Command { command: 0, id: 3 };
    let names = |wanted: &str| {
        let at = NAMES.iter().position(|name| *name == wanted).expect("one of the names");
        u8::try_from(at).expect("few")
    };
    let mut sessions = Vec::new();
    for (command, text) in (0u8..).zip(COMMANDS) {
        let mut ops = vec![begin.clone(), Asked::Command { command, id: 6 }];
        match text {
            "migrate" | "migrate-incoming" | "migrate-recover" => {
                ops.push(Asked::Argument { name: names("uri"), value: 0, number: 2 });
                ops.push(Asked::Command { command, id: 0 });
                ops.push(Asked::Entries { name: names("channels"), keys: 9, value: 15, count: 1 });
            }
            "migrate-set-capabilities" => {
                ops.push(Asked::Entries {
                    name: names("capabilities"),
                    keys: 20,
                    value: 10,
                    count: 2,
                });
            }
            "migrate-set-parameters" => {
                ops.push(Asked::Argument { name: names("max-bandwidth"), value: 6, number: 4096 });
                ops.push(Asked::Argument { name: names("tls-creds"), value: 12, number: 0 });
            }
            "yank" => ops.push(Asked::Entries { name: 8, keys: 3, value: 10, count: 1 }),
            "object-add" => {
                ops.push(Asked::Argument { name: names("qom-type"), value: 0, number: 25 });
                ops.push(Asked::Argument { name: names("id"), value: 0, number: 9 });
                ops.push(Asked::Entries { name: names("rules"), keys: 2, value: 27, count: 1 });
            }
            _ => {}
        }
        ops.push(Asked::Damage { back: 3, value: b'}' });
        sessions.push((if text.is_empty() { "none".into() } else { text.into() }, ops));
    }
    sessions.push(("deep".into(), vec![begin, Asked::Deep { depth: 300 }]));
    sessions
}
