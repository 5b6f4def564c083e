//! Credentials from a directory laid out as QEMU's and libvirt's.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::ServerCertVerifier;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::{Error as PemError, PemObject};
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, Error as TlsError, InconsistentKeys, RootCertStore, ServerConfig};

use super::authorization::Authorization;
use super::identity::Identities;
use super::unverified::Unverified;
use super::words;
use crate::address::Address;
use crate::error::Error;

/// The CA's certificate; it may be several.
const CA: &str = "ca-cert.pem";
/// Certificates that the CA has revoked. Need not be there.
const REVOKED: &str = "ca-crl.pem";
/// Identities beside the first, of other kinds of keys (QEMU 10.2): `server-cert-0.pem` and so on.
const NUMBERED: u32 = 4;

/// The provider of all cryptography here. AES-GCM, which every peer has, is twice as fast with it
/// as with ring where the processor has VAES and AVX-512.
pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// Which side of a connection credentials are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsEndpoint {
    /// The source, which connects.
    Client,
    /// The destination, which is connected to.
    Server,
}

impl TlsEndpoint {
    /// QMP's name, and what its files' names begin with.
    pub fn name(self) -> &'static str {
        match self {
            TlsEndpoint::Client => "client",
            TlsEndpoint::Server => "server",
        }
    }
}

/// What can be chosen about credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlsOptions {
    /// A server wants a certificate of the client, a client checks that of the server. Switched
    /// off, a client talks to anybody, and so to whoever sits between.
    pub verify_peer: bool,
    /// Our own certificate has to be of the CA, in time, and for this endpoint, and its key not open
    /// to every user of the host, or loading fails.
    pub sanity_check: bool,
}

impl Default for TlsOptions {
    /// Everything is checked.
    fn default() -> TlsOptions {
        TlsOptions { verify_peer: true, sanity_check: true }
    }
}

/// The certificates and keys of one endpoint (`tls-creds-x509`). Cheap to clone.
#[derive(Clone, Debug)]
pub struct TlsCredentials {
    folder: PathBuf,
    side: Side,
}

#[derive(Clone, Debug)]
enum Side {
    Client(Arc<ClientConfig>),
    Server(Arc<ServerConfig>),
}

/// What a source needs to connect.
#[derive(Clone, Debug)]
pub(crate) struct TlsClient {
    pub(super) config: Arc<ClientConfig>,
    /// Whom the destination's certificate has to be for.
    pub(super) name: ServerName<'static>,
}

/// What a destination needs to be connected to.
#[derive(Clone, Debug)]
pub(crate) struct TlsServer {
    pub(super) config: Arc<ServerConfig>,
    pub(super) authorization: Option<Authorization>,
}

impl TlsCredentials {
    /// Loads `ca-cert.pem`, `ca-crl.pem` if it is there, and the endpoint's certificate and key
    /// (`server-cert.pem`, `server-key.pem`, or `client-…`, which a client may do without) from
    /// `folder`. Both sides verify each other.
    pub fn load(folder: &Path, endpoint: TlsEndpoint) -> Result<TlsCredentials, Error> {
        TlsCredentials::load_with(folder, endpoint, TlsOptions::default())
    }

    /// The same, with other options.
    pub fn load_with(
        folder: &Path,
        endpoint: TlsEndpoint,
        options: TlsOptions,
    ) -> Result<TlsCredentials, Error> {
        let files = Files { folder, endpoint };
        let side = match endpoint {
            TlsEndpoint::Client => Side::Client(Arc::new(files.client(options)?)),
            TlsEndpoint::Server => Side::Server(Arc::new(files.server(options)?)),
        };
        Ok(TlsCredentials { folder: folder.into(), side })
    }

    /// Which endpoint they are for.
    pub fn endpoint(&self) -> TlsEndpoint {
        match self.side {
            Side::Client(_) => TlsEndpoint::Client,
            Side::Server(_) => TlsEndpoint::Server,
        }
    }

    /// For connecting to `address`, whose certificate has to be for `hostname`, or else for the
    /// host in the address.
    pub(crate) fn client(
        &self,
        address: &Address,
        hostname: Option<&str>,
    ) -> Result<TlsClient, Error> {
        let Side::Client(config) = &self.side else {
            return Err(self.wrong_endpoint("a source", TlsEndpoint::Client));
        };
        let host = match (hostname, address) {
            (Some(name), _) => name,
            (None, Address::Tcp { host, .. }) if host.is_empty() => "localhost",
            (None, Address::Tcp { host, .. }) => host,
            (None, _) => {
                return Err(Error::Refused(format!(
                    "{address}: whom is the destination's certificate for? This address names no \
                     host: set tls-hostname"
                )));
            }
        };
        let name = ServerName::try_from(host.to_owned()).map_err(|_| {
            Error::Refused(format!(
                "'{host}' is no host name or address that a certificate can be for: set tls-hostname"
            ))
        })?;
        Ok(TlsClient { config: config.clone(), name })
    }

    /// For being connected to by whom `authorization` lets in: without it, by everybody with a
    /// certificate of the CA.
    pub(crate) fn server(&self, authorization: Option<Authorization>) -> Result<TlsServer, Error> {
        match &self.side {
            Side::Server(config) => Ok(TlsServer { config: config.clone(), authorization }),
            Side::Client(_) => Err(self.wrong_endpoint("a destination", TlsEndpoint::Server)),
        }
    }

    fn wrong_endpoint(&self, who: &str, needed: TlsEndpoint) -> Error {
        Error::Refused(format!(
            "the TLS credentials of {} are for endpoint '{}', and {who} needs '{}'",
            self.folder.display(),
            self.endpoint().name(),
            needed.name()
        ))
    }
}

/// A directory, seen from one endpoint.
struct Files<'f> {
    folder: &'f Path,
    endpoint: TlsEndpoint,
}

impl Files<'_> {
    fn client(&self, options: TlsOptions) -> Result<ClientConfig, Error> {
        let (provider, roots) = (provider(), Arc::new(self.roots()?));
        let verifier: Arc<dyn ServerCertVerifier> = match options.verify_peer {
            true => self.server_verifier(roots.clone(), provider.clone())?,
            false => Arc::new(Unverified::new(provider.clone())),
        };
        let identities = self.identities(&roots, options)?;
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| self.error(CA, &error.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match identities {
            Some(identities) => builder.with_client_cert_resolver(Arc::new(identities)),
            None => builder.with_no_client_auth(),
        };
        config.resumption = Resumption::disabled();
        config.enable_secret_extraction = true;
        Ok(config)
    }

    fn server(&self, options: TlsOptions) -> Result<ServerConfig, Error> {
        let (provider, roots) = (provider(), Arc::new(self.roots()?));
        let verifier = match options.verify_peer {
            true => self.client_verifier(roots.clone(), provider.clone())?,
            false => WebPkiClientVerifier::no_client_auth(),
        };
        let identities = self.identities(&roots, options)?.ok_or_else(|| {
            self.error("server-cert.pem", "no such file, and a destination needs one")
        })?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| self.error(CA, &error.to_string()))?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(identities));
        // A session is as long as its migration. Without tickets nothing comes back on a channel
        // that only goes one way.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.enable_secret_extraction = true;
        Ok(config)
    }

    fn server_verifier(
        &self,
        roots: Arc<RootCertStore>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Arc<WebPkiServerVerifier>, Error> {
        let mut builder = WebPkiServerVerifier::builder_with_provider(roots, provider);
        if let Some(revoked) = self.revoked()? {
            builder = builder
                .with_crls(revoked)
                .allow_unknown_revocation_status()
                .enforce_revocation_expiration();
        }
        builder.build().map_err(|error| self.error(REVOKED, &error.to_string()))
    }

    fn client_verifier(
        &self,
        roots: Arc<RootCertStore>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Arc<dyn ClientCertVerifier>, Error> {
        let mut builder = WebPkiClientVerifier::builder_with_provider(roots, provider);
        if let Some(revoked) = self.revoked()? {
            builder = builder
                .with_crls(revoked)
                .allow_unknown_revocation_status()
                .enforce_revocation_expiration();
        }
        builder.build().map_err(|error| self.error(REVOKED, &error.to_string()))
    }

    fn roots(&self) -> Result<RootCertStore, Error> {
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates(CA)? {
            roots.add(certificate).map_err(|error| self.error(CA, &words::of_own(&error)))?;
        }
        Ok(roots)
    }

    fn revoked(&self) -> Result<Option<Vec<CertificateRevocationListDer<'static>>>, Error> {
        let Some(pem) = self.read(REVOKED)? else { return Ok(None) };
        let lists: Result<Vec<_>, PemError> =
            CertificateRevocationListDer::pem_slice_iter(&pem).collect();
        match lists {
            Ok(lists) if lists.is_empty() => {
                Err(self.error(REVOKED, "no 'X509 CRL' in PEM format is in it"))
            }
            Ok(lists) => Ok(Some(lists)),
            Err(error) => Err(self.error(REVOKED, &error.to_string())),
        }
    }

    /// Who we are; a client may be nobody.
    fn identities(
        &self,
        roots: &RootCertStore,
        options: TlsOptions,
    ) -> Result<Option<Identities>, Error> {
        let mut keys = Vec::new();
        let numbers = std::iter::once(String::new()).chain((0..NUMBERED).map(|n| format!("-{n}")));
        for number in numbers {
            let cert = format!("{}-cert{number}.pem", self.endpoint.name());
            if !self.folder.join(&cert).exists() {
                continue;
            }
            let key = format!("{}-key{number}.pem", self.endpoint.name());
            keys.push(Arc::new(self.identity(&cert, &key, roots, options)?));
        }
        Ok((!keys.is_empty()).then(|| Identities::new(keys)))
    }

    fn identity(
        &self,
        cert: &str,
        key: &str,
        roots: &RootCertStore,
        options: TlsOptions,
    ) -> Result<CertifiedKey, Error> {
        let chain = self.certificates(cert)?;
        let pem = self
            .read(key)?
            .ok_or_else(|| self.error(key, "no such file, and its certificate is there"))?;
        let private = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| match error {
            PemError::NoItemsFound => {
                self.error(key, "no private key in PEM format is in it that is not encrypted")
            }
            other => self.error(key, &other.to_string()),
        })?;
        let private = provider()
            .key_provider
            .load_private_key(private)
            .map_err(|_| self.error(key, "a private key of a kind that is not known here"))?;
        if options.sanity_check {
            self.check_secrecy(key)?;
            self.check(&chain, roots).map_err(|error| self.error(cert, &words::of_own(&error)))?;
        }
        let identity = CertifiedKey::new(chain, private);
        match identity.keys_match() {
            Ok(()) | Err(TlsError::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(identity),
            Err(TlsError::InconsistentKeys(_)) => {
                Err(self.error(key, &format!("not the private key of {cert}")))
            }
            Err(error) => Err(self.error(cert, &words::of_own(&error))),
        }
    }

    /// A key that everybody on this host can read proves nothing.
    fn check_secrecy(&self, key: &str) -> Result<(), Error> {
        const BY_EVERYBODY: u32 = 0o006;
        let mode = fs::metadata(self.folder.join(key)).map(|found| found.permissions().mode());
        match mode.map_err(|error| self.error(key, &error.to_string()))? & BY_EVERYBODY {
            0 => Ok(()),
            _ => Err(self.error(
                key,
                "every user of this host can read or change it: take that from them (chmod o=)",
            )),
        }
    }

    /// Whether a peer with the same CA would take our certificate.
    fn check(
        &self,
        chain: &[CertificateDer<'static>],
        roots: &RootCertStore,
    ) -> Result<(), TlsError> {
        let [own, others @ ..] = chain else {
            return Err(TlsError::NoCertificatesPresented);
        };
        let (provider, now) = (provider(), UnixTime::now());
        match self.endpoint {
            TlsEndpoint::Server => rustls::client::verify_server_cert_signed_by_trust_anchor(
                &ParsedCertificate::try_from(own)?,
                roots,
                others,
                now,
                provider.signature_verification_algorithms.all,
            ),
            TlsEndpoint::Client => {
                let roots = Arc::new(roots.clone());
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
                let verifier = verifier.map_err(|error| TlsError::General(error.to_string()))?;
                verifier.verify_client_cert(own, others, now).map(drop)
            }
        }
    }

    fn certificates(&self, name: &str) -> Result<Vec<CertificateDer<'static>>, Error> {
        let pem = self.read(name)?.ok_or_else(|| self.error(name, "no such file"))?;
        let found: Result<Vec<_>, PemError> = CertificateDer::pem_slice_iter(&pem).collect();
        match found {
            Ok(found) if found.is_empty() => {
                Err(self.error(name, "no certificate in PEM format is in it"))
            }
            Ok(found) => Ok(found),
            Err(error) => Err(self.error(name, &error.to_string())),
        }
    }

    /// A file's content; `None` where there is none.
    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        match fs::read(self.folder.join(name)) {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.error(name, &error.to_string())),
        }
    }

    fn error(&self, name: &str, reason: &str) -> Error {
        Error::Credentials { path: self.folder.join(name), reason: reason.into() }
    }
}
