//! The options that say how channels are made secret, and a word where they are not.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args;
use whimbrel::kept::{Receiver, Restoring};
use whimbrel::{Authorization, Error, Migrator, SocketAddressInfo, TlsCredentials, TlsEndpoint};

/// How a source makes its channels secret.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct TlsOfSource {
    /// Send over TLS, with ca-cert.pem, client-cert.pem and client-key.pem in this directory
    #[arg(long, value_name = "DIR")]
    tls_creds: Option<PathBuf>,
    /// Whom the destination's certificate is for, if not the host in the address
    #[arg(long, requires = "tls_creds", value_name = "NAME")]
    tls_hostname: Option<String>,
}

impl TlsOfSource {
    pub(crate) fn secure(&self, restoring: Restoring) -> Result<Restoring, Error> {
        let Some(folder) = &self.tls_creds else { return Ok(restoring) };
        let credentials = TlsCredentials::load(folder, TlsEndpoint::Client)?;
        Ok(restoring.with_tls(credentials, self.tls_hostname.clone()))
    }
}

/// How a destination makes its channels secret.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct TlsOfDestination {
    /// Take in only what comes over TLS, with ca-cert.pem, server-cert.pem and server-key.pem in this
    /// directory
    #[arg(long, value_name = "DIR")]
    tls_creds: Option<PathBuf>,
    /// Only from a source whose certificate is for this name, such as 'O=Example,CN=host'; may be
    /// given several times
    #[arg(long, requires = "tls_creds", value_name = "NAME")]
    tls_authz: Vec<String>,
}

impl TlsOfDestination {
    fn authorization(&self) -> Option<Authorization> {
        (!self.tls_authz.is_empty()).then(|| Authorization::only(self.tls_authz.clone()))
    }

    /// Says so where anybody may come.
    pub(crate) fn warn(&self, waits_at: Option<&SocketAddressInfo>) {
        warn_of_strangers(waits_at, self.tls_creds.is_some());
    }

    pub(crate) fn secure(&self, receiver: Receiver) -> Result<Receiver, Error> {
        let Some(folder) = &self.tls_creds else { return Ok(receiver) };
        let credentials = TlsCredentials::load(folder, TlsEndpoint::Server)?;
        receiver.with_tls(&credentials, self.authorization())
    }
}

/// How a VM makes its channels secret, wherever it goes.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct TlsOfVm {
    /// Migrate over TLS: with ca-cert.pem, and server-cert.pem and server-key.pem for the way in
    /// (--incoming) or client-cert.pem and client-key.pem for the way out, in this directory. QMP can
    /// change it (object-add, tls-creds)
    #[arg(long, value_name = "DIR")]
    tls_creds: Option<PathBuf>,
    /// On the way out: whom the destination's certificate is for, if not the host in the address
    #[arg(long, requires = "tls_creds", value_name = "NAME")]
    tls_hostname: Option<String>,
    /// On the way in: only from a source whose certificate is for this name; may be given several
    /// times
    #[arg(long, requires = "tls_creds", value_name = "NAME")]
    tls_authz: Vec<String>,
}

impl TlsOfVm {
    /// What the options make is called like this in QMP.
    const CREDENTIALS: &str = "tls0";
    const AUTHORIZATION: &str = "authz0";

    /// Says so where anybody may come.
    pub(crate) fn warn(&self, waits_at: Option<&SocketAddressInfo>) {
        warn_of_strangers(waits_at, self.tls_creds.is_some());
    }

    pub(crate) fn secure(&self, migrator: &Migrator, incoming: bool) -> Result<(), Error> {
        let Some(folder) = &self.tls_creds else { return Ok(()) };
        let endpoint = if incoming { TlsEndpoint::Server } else { TlsEndpoint::Client };
        migrator.add_object(Self::CREDENTIALS, TlsCredentials::load(folder, endpoint)?)?;
        let authz = incoming && !self.tls_authz.is_empty();
        if authz {
            let only = Authorization::only(self.tls_authz.clone());
            migrator.add_object(Self::AUTHORIZATION, only)?;
        }
        migrator.update_parameters(|parameters| {
            parameters.tls_creds = Self::CREDENTIALS.into();
            parameters.tls_hostname = self.tls_hostname.clone().unwrap_or_default();
            parameters.tls_authz = if authz { Self::AUTHORIZATION.into() } else { String::new() };
        })
    }
}

/// An address without a host is all of this host's, as in QEMU, and one that names none is no proof.
fn warn_of_strangers(waits_at: Option<&SocketAddressInfo>, secret: bool) {
    if !secret && waits_at.is_some_and(is_open_to_all) {
        eprintln!(
            "whimbrel: warning: this waits on every address of this host, and without TLS takes \
             whoever connects first for the source: name an address, or use --tls-creds"
        );
    }
}

fn is_open_to_all(waits_at: &SocketAddressInfo) -> bool {
    match waits_at {
        SocketAddressInfo::Inet { host, .. } => {
            host.parse().is_ok_and(|address: IpAddr| address.is_unspecified())
        }
        SocketAddressInfo::Unix { .. } | SocketAddressInfo::Fd { .. } => false,
    }
}
