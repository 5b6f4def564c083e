//! Where a QMP socket is.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// A QMP socket: `unix:PATH` or `tcp:HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// TCP. There is no authentication: whoever can connect controls the VM, and runs commands as
    /// its user.
    Tcp {
        /// Name or address; empty is this host. For all addresses a server wants `0.0.0.0` or `::`,
        /// where QEMU's takes none for all.
        host: String,
        /// The port; 0 is any free one, for a server.
        port: u16,
    },
}

/// Why a text is no endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is no QMP socket: {reason}")]
pub struct EndpointError {
    text: String,
    reason: &'static str,
}

/// Options of QEMU's `-qmp` that say what is the case here anyway.
const IMPLIED: [&str; 6] =
    [",server=on", ",server", ",wait=off", ",nowait", ",nodelay=on", ",nodelay"];

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Endpoint, EndpointError> {
        let error = |reason| EndpointError { text: text.into(), reason };
        let Some((scheme, mut place)) = text.split_once(':') else {
            return Err(error("expected unix:PATH or tcp:HOST:PORT"));
        };
        while let Some(shorter) = IMPLIED.iter().find_map(|option| place.strip_suffix(option)) {
            place = shorter;
        }
        match scheme {
            "unix" if place.is_empty() => Err(error("expected a path")),
            "unix" => Ok(Endpoint::Unix(place.into())),
            "tcp" => {
                let (host, port) = place.rsplit_once(':').ok_or(error("expected HOST:PORT"))?;
                let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
                let port = port.parse().map_err(|_| error("the port is a number up to 65535"))?;
                Ok(Endpoint::Tcp { host: host.into(), port })
            }
            _ => Err(error("expected unix:PATH or tcp:HOST:PORT")),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Unix(path) => write!(f, "unix:{}", path.display()),
            Endpoint::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Endpoint::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_and_written_back() {
        for text in ["unix:/run/a:b", "tcp:127.0.0.1:4444", "tcp:[::1]:0", "tcp::4444"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn options_of_qemus_that_change_nothing_are_dropped() {
        let endpoint: Endpoint = "unix:/run/q,server=on,wait=off".parse().unwrap();
        assert_eq!(endpoint, Endpoint::Unix("/run/q".into()));
    }

    #[test]
    fn what_is_no_endpoint_says_what_was_expected() {
        for text in ["", "unix:", "tcp:4444", "tcp:x:70000", "vsock:1:2", "/run/q"] {
            let error = text.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains("is no QMP socket: "), "{error}");
        }
    }
}
