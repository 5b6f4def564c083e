//! Who we are: one certificate, or several with keys of different kinds, of which the peer gets one
//! that it can verify.

use std::sync::Arc;

use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

/// Our certificates, the preferred one first. At least one.
#[derive(Debug)]
pub(super) struct Identities(Vec<Arc<CertifiedKey>>);

impl Identities {
    pub(super) fn new(keys: Vec<Arc<CertifiedKey>>) -> Identities {
        assert!(!keys.is_empty(), "asked before");
        Identities(keys)
    }

    /// The first whose key can sign as the peer wants it. Where none can, the first, so that the
    /// handshake fails for the reason it has.
    fn choose(&self, schemes: &[SignatureScheme]) -> Arc<CertifiedKey> {
        let fits = |key: &&Arc<CertifiedKey>| key.key.choose_scheme(schemes).is_some();
        self.0.iter().find(fits).unwrap_or(&self.0[0]).clone()
    }
}

impl ResolvesServerCert for Identities {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.choose(hello.signature_schemes()))
    }
}

impl ResolvesClientCert for Identities {
    fn resolve(&self, _: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.choose(schemes))
    }

    fn has_certs(&self) -> bool {
        true
    }
}
