//! Certificates for tests, in directories as QEMU's are laid out.

#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test binary uses the part it needs of what they share"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer,
    DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, RevokedCertParams, SerialNumber,
    SignatureAlgorithm, date_time_ymd,
};
use tempfile::TempDir;

/// Whose certificate it is.
#[derive(Clone, Debug)]
pub(crate) struct Who {
    /// The common name.
    pub name: &'static str,
    /// The host names and addresses it is for.
    pub hosts: Vec<String>,
    /// The last year of its validity.
    pub until: i32,
    pub serial: u64,
}

impl Who {
    pub(crate) fn localhost() -> Who {
        let hosts = vec!["localhost".into(), "127.0.0.1".into()];
        Who { name: "localhost", hosts, until: 2095, serial: 1 }
    }
}

/// A CA.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Authority {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("a key");
        Authority { issuer: CertifiedIssuer::self_signed(params, key).expect("a CA") }
    }

    /// A directory with certificates for both endpoints of `who`.
    pub(crate) fn folder(&self, who: &Who) -> Folder {
        let folder = Folder(tempfile::tempdir().expect("a directory"));
        folder.write("ca-cert.pem", &self.issuer.pem());
        for endpoint in ["server", "client"] {
            self.certify(&folder, who, endpoint, "", &PKCS_ECDSA_P256_SHA256);
        }
        folder
    }

    /// A certificate and its key, for `endpoint`, with `number` in the files' names.
    pub(crate) fn certify(
        &self,
        folder: &Folder,
        who: &Who,
        endpoint: &str,
        number: &str,
        algorithm: &'static SignatureAlgorithm,
    ) {
        let mut params = CertificateParams::new(who.hosts.clone()).expect("host names");
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "Example, Inc.");
        params.distinguished_name.push(DnType::CommonName, who.name);
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(who.until, 12, 31);
        params.serial_number = Some(SerialNumber::from(who.serial));
        params.extended_key_usages = vec![match endpoint {
            "server" => ExtendedKeyUsagePurpose::ServerAuth,
            _ => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        let key = KeyPair::generate_for(algorithm).expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        folder.write(&format!("{endpoint}-cert{number}.pem"), &certificate.pem());
        folder.write(&format!("{endpoint}-key{number}.pem"), &key.serialize_pem());
    }

    /// A certificate beside the first, with a key of another kind.
    pub(crate) fn certify_ed25519(&self, folder: &Folder, who: &Who, endpoint: &str) {
        self.certify(folder, who, endpoint, "-0", &PKCS_ED25519);
    }

    /// The list of what this CA has revoked.
    pub(crate) fn revoke(&self, folder: &Folder, serials: &[u64], next_update: i32) {
        let revoked = |&serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(serial),
            revocation_time: date_time_ymd(2021, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2021, 1, 1),
            next_update: date_time_ymd(next_update, 12, 31),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.issuer).expect("a list");
        folder.write("ca-crl.pem", &list.pem().expect("in PEM"));
    }
}

/// A directory of credentials.
#[derive(Debug)]
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, content: &str) {
        fs::write(self.file(name), content).expect("a file");
        let mode = if name.contains("-key") { 0o600 } else { 0o644 };
        fs::set_permissions(self.file(name), fs::Permissions::from_mode(mode)).expect("ours");
    }

    pub(crate) fn copy(&self, from: &str, to: &str) {
        std::fs::copy(self.file(from), self.file(to)).expect("it is there");
    }

    pub(crate) fn remove(&self, names: &[&str]) {
        names.iter().for_each(|name| fs::remove_file(self.file(name)).expect("it was there"));
    }
}
