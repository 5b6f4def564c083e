//! Everything over TLS, between whimbrel (rustls) and stock QEMUs (GnuTLS), with the certificates
//! that `whimbrel tls` makes.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use whimbrel_peers::guest::BootSector;
use whimbrel_peers::install::Peer;
use whimbrel_peers::journey::{Journey, MIGRATION_MAX, Transport};
use whimbrel_peers::multifd::Multifd;
use whimbrel_peers::on_each_peer;
use whimbrel_peers::qemu::Qemu;

/// How long a migration in clear text may take to be refused.
const REFUSAL_MAX: Duration = Duration::from_secs(30);

/// The only source that may come in.
const SOURCE: &str = r"O=Example\, Inc.,CN=localhost";

/// Makes a CA and a host's certificates; gives the host's directory.
fn certificates(journey: &Journey<'_>, name: &str) -> Result<String> {
    let text = |below: &str| {
        let path = journey.file(&format!("{name}-{below}"));
        Ok::<_, anyhow::Error>(path.to_str().context("a path in UTF-8")?.to_owned())
    };
    let (ca, host) = (text("ca")?, text("host")?);
    journey.whimbrel(&["tls", "ca", "--dir", &ca])?.succeeded()?;
    let named = ["--name", "localhost", "--ip", "127.0.0.1", "--organization", "Example, Inc."];
    let host_of = ["tls", "host", "--ca", &ca, "--dir", &host];
    journey.whimbrel(&[&host_of[..], &named].concat())?.succeeded()?;
    Ok(host)
}

fn secure(qemu: &mut Qemu, folder: &str, endpoint: &str) -> Result<()> {
    let object = json!({
        "qom-type": "tls-creds-x509", "id": "tls0", "dir": folder, "endpoint": endpoint,
    });
    qemu.qmp.execute("object-add", &object)?;
    // A destination on a Unix socket has no host in its address.
    let names = match endpoint {
        "client" => json!({ "tls-creds": "tls0", "tls-hostname": "localhost" }),
        _ => json!({ "tls-creds": "tls0" }),
    };
    qemu.qmp.execute("migrate-set-parameters", &names).map(drop)
}

/// How a guest moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Precopy,
    Multifd,
    Preempt,
}

const PREEMPT: [&str; 2] = ["postcopy-ram", "postcopy-preempt"];

fn keep(
    journey: &Journey<'_>,
    source: &mut Qemu,
    way: Way,
    folder: &str,
    at: Transport,
) -> Result<()> {
    let multifd = Multifd::of(3);
    let mut arguments: Vec<String> =
        ["--tls-creds", folder, "--tls-authz", SOURCE].map(str::to_owned).into();
    match way {
        Way::Precopy => {}
        Way::Multifd => arguments.extend(multifd.receive()),
        Way::Preempt => arguments.extend(["--preempt", "--touch", "random"].map(str::to_owned)),
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (mut receiver, uri) = journey.receiving_with(at, &journey.file("kept"), &arguments)?;
    match way {
        Way::Precopy => source.qmp.enable(&["return-path"])?,
        Way::Multifd => multifd.set(source)?,
        Way::Preempt => {
            source.qmp.enable(&PREEMPT)?;
            let slow = json!({ "downtime-limit": 1, "max-bandwidth": 1_000_000 });
            source.qmp.execute("migrate-set-parameters", &slow)?;
        }
    }
    source.qmp.migrate(&uri)?;
    if way == Way::Preempt {
        source.qmp.execute("migrate-start-postcopy", &json!({}))?;
    }
    source.wait_migrated(MIGRATION_MAX)?;
    receiver.wait(MIGRATION_MAX)?.succeeded().map(drop)
}

fn restore(
    journey: &Journey<'_>,
    peer: Peer,
    way: Way,
    folder: &str,
    at: Transport,
) -> Result<Qemu> {
    let multifd = Multifd::of(3);
    let mut destination = journey.incoming_stopped(peer)?;
    secure(&mut destination, folder, "server")?;
    let capabilities: &[&str] = if way == Way::Preempt { &PREEMPT } else { &[] };
    if way == Way::Multifd {
        multifd.agree(&mut destination)?;
    }
    let uri = journey.listen(&mut destination, at, capabilities)?;
    let kept = journey.file("kept");
    let mut arguments: Vec<String> = ["restore", text(&kept)?, &uri].map(str::to_owned).into();
    arguments.extend(["--tls-creds", folder, "--tls-hostname", "localhost"].map(str::to_owned));
    match way {
        Way::Precopy => {}
        Way::Multifd => arguments.extend(multifd.restore()),
        Way::Preempt => arguments.extend(["--postcopy", "--preempt"].map(str::to_owned)),
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    journey
        .whimbrel(&arguments)?
        .succeeded()
        .with_context(|| format!("QEMU says {:?}", destination.complaint()))?;
    destination.wait_migrated(MIGRATION_MAX)?;
    Ok(destination)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path in UTF-8")
}

/// Out of a QEMU into a file, and out of the file into a QEMU: both over TLS.
fn there_and_back(peer: Peer, way: Way, at: Transport, seed: u32) -> Result<()> {
    let guest = BootSector { seed };
    let journey = Journey::new(peer.machine(), &guest)?;
    let folder = certificates(&journey, "good")?;
    let mut source = journey.boot(peer)?;
    secure(&mut source, &folder, "client")?;
    keep(&journey, &mut source, way, &folder, at)?;
    let mut destination = restore(&journey, peer, way, &folder, at)?;
    if way != Way::Preempt {
        // In postcopy the source's memory is that from before the last pages were touched.
        source.memory()?.check_same(&destination.memory()?, &[])?;
    }
    destination.qmp.execute("cont", &json!({}))?;
    journey.check_arrived(&source, &destination)
}

fn by_precopy(peer: Peer) -> Result<()> {
    there_and_back(peer, Way::Precopy, Transport::Tcp, 201)?;
    there_and_back(peer, Way::Precopy, Transport::Unix, 202)
}

fn by_multifd(peer: Peer) -> Result<()> {
    there_and_back(peer, Way::Multifd, Transport::Tcp, 203)
}

fn by_postcopy_with_preempt(peer: Peer) -> Result<()> {
    there_and_back(peer, Way::Preempt, Transport::Tcp, 204)
}

/// Neither side takes the other's certificate when it is of another CA, and a QEMU that speaks in
/// the clear gets nothing.
fn strangers_stay_out(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 205 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let good = certificates(&journey, "good")?;
    let other = certificates(&journey, "other")?;
    let mut source = journey.boot(peer)?;
    let kept = journey.file("kept");
    let (receiver, uri) = journey.receiving_with(Transport::Tcp, &kept, &["--tls-creds", &good])?;
    source.qmp.migrate(&uri)?;
    let refused = source.qmp.wait_migrated(REFUSAL_MAX);
    ensure!(refused.is_err(), "it went in the clear: {refused:?}");
    secure(&mut source, &other, "client")?;
    source.qmp.migrate(&uri)?;
    let refused = source.qmp.wait_migrated(REFUSAL_MAX);
    ensure!(refused.is_err(), "it went to somebody else's CA: {refused:?}");
    drop(receiver);
    ensure!(!kept.exists(), "something was kept");
    source.qmp.execute("migrate-set-parameters", &json!({ "tls-creds": "" }))?;
    let kept = journey.keep(&mut source, Transport::Unix, &[])?;
    let mut destination = journey.incoming_stopped(peer)?;
    secure(&mut destination, &good, "server")?;
    let uri = journey.listen(&mut destination, Transport::Tcp, &[])?;
    let said =
        journey.whimbrel(&["restore", text(&kept)?, &uri, "--tls-creds", &other])?.refused()?;
    ensure!(said.contains("main channel, TLS: the destination's certificate"), "{said}");
    Ok(())
}

on_each_peer!(by_precopy, by_multifd, by_postcopy_with_preempt, strangers_stay_out);
