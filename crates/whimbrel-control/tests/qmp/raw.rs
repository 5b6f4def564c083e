//! A client that sends whatever a test wants and shows whatever comes back.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

pub(crate) struct Raw {
    pub(crate) stream: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Raw {
    pub(crate) fn connect(path: &Path) -> Raw {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let reader = BufReader::new(stream.try_clone().unwrap());
        Raw { stream, reader }
    }

    /// Connected, greeted and negotiated.
    pub(crate) fn negotiated(path: &Path) -> Raw {
        Raw::enabling(path, &[])
    }

    /// The same, and allowed to have commands overtake others.
    pub(crate) fn out_of_band(path: &Path) -> Raw {
        Raw::enabling(path, &["oob"])
    }

    fn enabling(path: &Path, capabilities: &[&str]) -> Raw {
        let mut raw = Raw::connect(path);
        assert!(raw.line().contains("\"QMP\""));
        let enable = json!({ "enable": capabilities });
        raw.send(&json!({ "execute": "qmp_capabilities", "arguments": enable }).to_string());
        assert_eq!(raw.value(), json!({ "return": {} }));
        raw
    }

    pub(crate) fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).unwrap();
    }

    /// The next line, without its end; empty at the end of the stream.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub(crate) fn value(&mut self) -> Value {
        let line = self.line();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }

    /// Sends a line and returns the next one.
    pub(crate) fn ask(&mut self, request: &str) -> String {
        self.send(&format!("{request}\n"));
        self.line()
    }

    /// Sends a line that is refused: class and text.
    pub(crate) fn refused(&mut self, request: &str) -> (String, String) {
        self.send(&format!("{request}\n"));
        let reply = self.value();
        let text = |name: &str| reply["error"][name].as_str().unwrap_or("").to_owned();
        assert!(reply.get("error").is_some(), "{request}: {reply}");
        (text("class"), text("desc"))
    }
}
