//! `uri` or `channels`: where a migration goes to or comes from.

use whimbrel::{Address, MigrationAddress, SocketAddress};

use super::arguments::Arguments;
use crate::QmpError;

/// What was said of the address, to be made one of once all arguments are found to be known.
pub(super) struct Place {
    uri: Option<String>,
    channels: Vec<MigrationAddress>,
}

impl Place {
    /// Takes `uri` and `channels`.
    pub(super) fn take(arguments: &mut Arguments) -> Result<Place, QmpError> {
        let uri = arguments.optional_string("uri")?;
        let channels = arguments.optional_objects("channels")?.unwrap_or_default();
        let channels = channels.into_iter().map(take_channel).collect::<Result<_, _>>()?;
        Ok(Place { uri, channels })
    }

    /// The address. Exactly one of the two has to be there; an empty list of channels is none.
    pub(super) fn address(self) -> Result<Address, QmpError> {
        let mut channels = self.channels.into_iter();
        match (self.uri, channels.next(), channels.next()) {
            (Some(uri), None, _) => uri.parse().map_err(QmpError::generic),
            (None, Some(channel), None) => channel.try_into().map_err(QmpError::generic),
            (None, Some(_), Some(_)) => {
                Err(QmpError::generic("Channel list has more than one main entry"))
            }
            (None, None, _) | (Some(_), Some(_), _) => {
                Err(QmpError::generic("need either 'uri' or 'channels' argument"))
            }
        }
    }
}

fn take_channel(mut channel: Arguments) -> Result<MigrationAddress, QmpError> {
    let kind = channel.string("channel-type")?;
    if kind != "main" {
        return Err(QmpError::wrong_value("channel-type", &kind));
    }
    let mut address = channel.object("addr")?;
    channel.finish()?;
    let transport = address.string("transport")?;
    let taken = match transport.as_str() {
        "socket" => MigrationAddress::Socket(take_socket(&mut address)?),
        "exec" => MigrationAddress::Exec { args: address.strings("args")? },
        "file" => MigrationAddress::File {
            filename: address.string("filename")?,
            offset: address.optional_u64("offset")?.unwrap_or(0),
        },
        _ => return Err(QmpError::wrong_value("transport", &transport)),
    };
    address.finish()?;
    Ok(taken)
}

fn take_socket(address: &mut Arguments) -> Result<SocketAddress, QmpError> {
    let kind = address.string("type")?;
    match kind.as_str() {
        "inet" => {
            Ok(SocketAddress::Inet { host: address.string("host")?, port: address.string("port")? })
        }
        "unix" => Ok(SocketAddress::Unix { path: address.string("path")? }),
        "fd" => Ok(SocketAddress::Fd { str: address.string("str")? }),
        _ => Err(QmpError::wrong_value("type", &kind)),
    }
}
