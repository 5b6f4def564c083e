//! Where a migration goes to or comes from: QEMU's URIs and `channels`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;

/// One end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `tcp:HOST:PORT`. Port 0 at a destination is any free one.
    Tcp {
        /// Name or address; empty at a destination means all addresses.
        host: String,
        /// The port.
        port: u16,
    },
    /// `unix:PATH`.
    Unix(PathBuf),
    /// `fd:N`, a descriptor inherited from whoever started us.
    Fd(i32),
    /// `exec:CMD`, the standard input (or output) of a command.
    Exec(Vec<String>),
    /// `file:PATH[,offset=N]`.
    File {
        /// The file.
        path: PathBuf,
        /// Where the stream begins in it, in bytes.
        offset: u64,
    },
}

/// Why an address is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is no migration address: {reason}")]
pub struct AddressError {
    text: String,
    reason: &'static str,
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Address, AddressError> {
        let error = |reason| AddressError { text: text.into(), reason };
        let Some((scheme, rest)) = text.split_once(':') else {
            return Err(error("expected tcp:HOST:PORT, unix:PATH, fd:N, exec:CMD or file:PATH"));
        };
        match scheme {
            "tcp" => {
                // Options of QEMU's such as `,ipv4=on` follow a comma; none changes the bytes.
                let place = rest.split(',').next().unwrap_or(rest);
                let (host, port) = place.rsplit_once(':').ok_or(error("expected HOST:PORT"))?;
                let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
                let port = port.parse().map_err(|_| error("the port is a number up to 65535"))?;
                Ok(Address::Tcp { host: host.into(), port })
            }
            "unix" if rest.is_empty() => Err(error("expected a path")),
            "unix" => Ok(Address::Unix(rest.into())),
            "fd" => match rest.parse() {
                Ok(number) if number >= 0 => Ok(Address::Fd(number)),
                _ => Err(error("expected the number of an open descriptor")),
            },
            "exec" if rest.trim().is_empty() => Err(error("expected a command")),
            "exec" => Ok(Address::Exec(vec!["/bin/sh".into(), "-c".into(), rest.into()])),
            "file" => {
                let (path, offset) = match rest.rsplit_once(",offset=") {
                    Some((path, number)) => (path, parse_offset(number)),
                    None => (rest, Some(0)),
                };
                let offset =
                    offset.ok_or(error("the offset is a number of bytes, 0x… or decimal"))?;
                if path.is_empty() {
                    return Err(error("expected a path"));
                }
                Ok(Address::File { path: path.into(), offset })
            }
            "rdma" | "vsock" => Err(error("this transport is not supported")),
            _ => Err(error("expected tcp:HOST:PORT, unix:PATH, fd:N, exec:CMD or file:PATH")),
        }
    }
}

fn parse_offset(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Fd(number) => write!(f, "fd:{number}"),
            Address::Exec(words) => match words.as_slice() {
                [sh, c, command] if sh == "/bin/sh" && c == "-c" => write!(f, "exec:{command}"),
                words => write!(f, "exec:{}", words.join(" ")),
            },
            Address::File { path, offset: 0 } => write!(f, "file:{}", path.display()),
            Address::File { path, offset } => write!(f, "file:{},offset={offset}", path.display()),
        }
    }
}

/// One entry of the `channels` argument of `migrate` and `migrate-incoming`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct MigrationChannel {
    /// Only `main` is known.
    pub channel_type: String,
    /// Where to.
    pub addr: MigrationAddress,
}

/// QMP's `MigrationAddress`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "transport", rename_all = "kebab-case")]
pub enum MigrationAddress {
    /// A socket.
    Socket(SocketAddress),
    /// A command.
    Exec {
        /// The command and its arguments.
        args: Vec<String>,
    },
    /// A file.
    File {
        /// Its path.
        filename: String,
        /// Where the stream begins, in bytes.
        #[serde(default)]
        offset: u64,
    },
}

/// QMP's `SocketAddress`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum SocketAddress {
    /// TCP.
    Inet {
        /// Name or address.
        host: String,
        /// Port, as text.
        port: String,
    },
    /// A Unix socket.
    Unix {
        /// Its path.
        path: String,
    },
    /// An inherited descriptor.
    Fd {
        /// Its number, as text.
        str: String,
    },
}

impl TryFrom<MigrationAddress> for Address {
    type Error = AddressError;

    fn try_from(address: MigrationAddress) -> Result<Address, AddressError> {
        match address {
            MigrationAddress::Exec { args } if args.is_empty() => {
                Err(AddressError { text: "exec".into(), reason: "expected a command" })
            }
            MigrationAddress::Exec { args } => Ok(Address::Exec(args)),
            MigrationAddress::File { filename, offset } => {
                Ok(Address::File { path: filename.into(), offset })
            }
            MigrationAddress::Socket(SocketAddress::Unix { path }) => {
                Ok(Address::Unix(path.into()))
            }
            MigrationAddress::Socket(SocketAddress::Fd { str }) => format!("fd:{str}").parse(),
            MigrationAddress::Socket(SocketAddress::Inet { host, port }) => {
                format!("tcp:{host}:{port}").parse()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_read_and_written_back() {
        for text in [
            "tcp:127.0.0.1:4444",
            "tcp:[::1]:0",
            "tcp::4444",
            "unix:/run/a,b",
            "fd:7",
            "exec:cat > /dev/null; echo a:b",
            "file:/tmp/x",
            "file:/tmp/x,offset=4096",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        let hex: Address = "file:x,offset=0x10".parse().unwrap();
        assert_eq!(hex, Address::File { path: "x".into(), offset: 16 });
    }

    #[test]
    fn what_is_no_address_says_what_was_expected() {
        for text in
            ["", "tcp:", "tcp:host", "tcp:host:99999", "unix:", "fd:x", "exec: ", "file:", "ftp:x"]
        {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains("is no migration address"), "{error}");
        }
    }
}
