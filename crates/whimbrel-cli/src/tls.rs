//! `whimbrel tls`: a CA and certificates, in directories as QEMU and libvirt want them.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use time::OffsetDateTime;

use crate::failure::Failure;

const CA_CERT: &str = "ca-cert.pem";
const CA_KEY: &str = "ca-key.pem";

/// A certificate is valid from so long before it is made: clocks differ.
const BEFORE: Duration = Duration::from_secs(24 * 3600);

/// Make a CA, and certificates for hosts.
#[derive(Debug, Args)]
pub(crate) struct Tls {
    #[command(subcommand)]
    command: Make,
}

#[derive(Debug, Subcommand)]
enum Make {
    /// Make a CA: a directory with its certificate, and the key that signs others
    Ca(Ca),
    /// Make a directory for a host: the CA's certificate, and a certificate and key for each side of
    /// a migration, the destination's (server) and the source's (client)
    Host(Host),
}

/// A new CA.
#[derive(Debug, Args)]
struct Ca {
    /// Where ca-cert.pem and ca-key.pem go; made if it is not there. Keep it where no VM runs
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// What the CA is called
    #[arg(long, default_value = "whimbrel CA", value_name = "NAME")]
    name: String,
    /// For how many days it is valid
    #[arg(long, default_value_t = 3650, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=36500))]
    days: u32,
}

/// A new host.
#[derive(Debug, Args)]
struct Host {
    /// The CA's directory, from 'whimbrel tls ca', or with a ca-cert.pem and ca-key.pem of another
    /// origin
    #[arg(long, value_name = "DIR")]
    ca: PathBuf,
    /// Where the host's files go; made if it is not there
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// The host's name, by which others connect to it; may be given several times. The first is its
    /// common name, for tls-authz
    #[arg(long, required = true, value_name = "NAME")]
    name: Vec<String>,
    /// An address by which others connect to it; may be given several times
    #[arg(long, value_name = "ADDRESS")]
    ip: Vec<IpAddr>,
    /// The organization in its name, for tls-authz
    #[arg(long, value_name = "NAME")]
    organization: Option<String>,
    /// For how many days it is valid
    #[arg(long, default_value_t = 825, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=36500))]
    days: u32,
}

impl Tls {
    pub(crate) fn run(self) -> Result<(), Failure> {
        match self.command {
            Make::Ca(ca) => ca.make(),
            Make::Host(host) => host.make(),
        }
    }
}

impl Ca {
    fn make(&self) -> Result<(), Failure> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, &*self.name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        valid_for(&mut params, self.days);
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        make_folder(&self.dir)?;
        write_new(&self.dir.join(CA_KEY), &key.serialize_pem(), Secret::Yes)?;
        write_new(&self.dir.join(CA_CERT), &certificate.pem(), Secret::No)?;
        println!(
            "{}: CA '{}'; {CA_KEY} signs certificates: it need not, and should not, be on any host",
            self.dir.display(),
            self.name
        );
        Ok(())
    }
}

impl Host {
    fn make(&self) -> Result<(), Failure> {
        let ca = read(&self.ca.join(CA_CERT))?;
        let key = read(&self.ca.join(CA_KEY))?;
        let unusable = |file: &str, error: rcgen::Error| {
            Failure::new(format!("{}: {error}", self.ca.join(file).display()))
        };
        let key = KeyPair::from_pem(&key).map_err(|error| unusable(CA_KEY, error))?;
        let issuer =
            Issuer::from_ca_cert_pem(&ca, key).map_err(|error| unusable(CA_CERT, error))?;
        make_folder(&self.dir)?;
        for (endpoint, purpose) in [
            ("server", ExtendedKeyUsagePurpose::ServerAuth),
            ("client", ExtendedKeyUsagePurpose::ClientAuth),
        ] {
            let key = KeyPair::generate()?;
            let certificate = self.params(purpose)?.signed_by(&key, &issuer)?;
            let file = |what: &str| self.dir.join(format!("{endpoint}-{what}.pem"));
            write_new(&file("key"), &key.serialize_pem(), Secret::Yes)?;
            write_new(&file("cert"), &certificate.pem(), Secret::No)?;
        }
        write_new(&self.dir.join(CA_CERT), &ca, Secret::No)?;
        println!("{}: for {}", self.dir.display(), self.name[0]);
        Ok(())
    }

    /// No key usage is named: a QEMU of version 10 wants one for a server that keys on elliptic
    /// curves cannot have, and takes a certificate that names none.
    fn params(&self, purpose: ExtendedKeyUsagePurpose) -> Result<CertificateParams, Failure> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        if let Some(organization) = &self.organization {
            params.distinguished_name.push(DnType::OrganizationName, &**organization);
        }
        params.distinguished_name.push(DnType::CommonName, &*self.name[0]);
        for name in &self.name {
            let name = name
                .clone()
                .try_into()
                .map_err(|_| Failure::new(format!("'{name}' is no host name")))?;
            params.subject_alt_names.push(SanType::DnsName(name));
        }
        params.subject_alt_names.extend(self.ip.iter().copied().map(SanType::IpAddress));
        params.is_ca = IsCa::ExplicitNoCa;
        params.extended_key_usages = vec![purpose];
        params.use_authority_key_identifier_extension = true;
        valid_for(&mut params, self.days);
        Ok(params)
    }
}

fn valid_for(params: &mut CertificateParams, days: u32) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - BEFORE;
    params.not_after = now + Duration::from_secs(u64::from(days) * 24 * 3600);
}

fn make_folder(path: &Path) -> Result<(), Failure> {
    fs::create_dir_all(path)
        .map_err(|error| Failure::new(format!("cannot make {}: {error}", path.display())))
}

fn read(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}

/// Who may read a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Secret {
    /// Its owner.
    Yes,
    /// Everybody.
    No,
}

/// Writes a file that is not there yet: keys are not overwritten.
fn write_new(path: &Path, content: &str, secret: Secret) -> Result<(), Failure> {
    let mode = if secret == Secret::Yes { 0o600 } else { 0o644 };
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    file.and_then(|mut file| file.write_all(content.as_bytes()))
        .map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}
