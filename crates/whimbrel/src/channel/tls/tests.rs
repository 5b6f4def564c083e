//! Two ends of a connection in one process.

use std::fs::Permissions;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustls::{ClientConnection, ServerConnection, SupportedProtocolVersion, version};
use whimbrel_ram::kernel_copy::{Gather, Scatter};

use super::pki::{Authority, Folder, Who};
use super::*;
use crate::address::Address;
use crate::channel::{Channel, Kind};
use crate::error::Error;
use crate::worker::Cancel;

fn cancel() -> Cancel {
    Cancel::new().unwrap()
}

fn channel(name: &'static str, socket: impl Into<OwnedFd>) -> Channel {
    Channel::new(name, socket.into(), Kind::Socket, &cancel()).unwrap()
}

fn pair() -> (Channel, Channel) {
    let (near, far) = UnixStream::pair().unwrap();
    (channel("near", near), channel("far", far))
}

fn credentials(folder: &Folder, endpoint: TlsEndpoint) -> TlsCredentials {
    let options = TlsOptions { sanity_check: false, ..TlsOptions::default() };
    TlsCredentials::load_with(folder.path(), endpoint, options).unwrap()
}

fn address() -> Address {
    "tcp:localhost:1".parse().unwrap()
}

fn client(folder: &Folder) -> TlsClient {
    credentials(folder, TlsEndpoint::Client).client(&address(), None).unwrap()
}

fn server(folder: &Folder) -> TlsServer {
    credentials(folder, TlsEndpoint::Server).server(None).unwrap()
}

/// Both ends' handshakes: how each went.
fn shake(
    client: &TlsClient,
    server: &TlsServer,
) -> (Result<Channel, Error>, Result<Channel, Error>) {
    let (mut near, mut far) = pair();
    near.secure_as_client(client).unwrap();
    far.secure_as_server(server).unwrap();
    thread::scope(|scope| {
        let far = scope.spawn(move || far.finish_handshake().map(|()| far));
        let near = near.finish_handshake().map(|()| near);
        (near, far.join().unwrap())
    })
}

fn secret_pair() -> (Channel, Channel) {
    let folder = Authority::new("CA").folder(&Who::localhost());
    let (near, far) = shake(&client(&folder), &server(&folder));
    (near.unwrap(), far.unwrap())
}

fn receive_exactly(channel: &mut Channel, bytes: &mut [u8]) {
    let mut pieces = Scatter::new();
    pieces.push_buffer(bytes);
    while pieces.bytes_left() > 0 {
        assert_ne!(channel.receive(&mut pieces).unwrap(), 0);
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..=250u8).cycle().zip((0..=255u8).cycle()).map(|(a, b)| a ^ b).take(len).collect()
}

#[test]
fn bytes_arrive_as_they_were_sent_in_pieces_of_any_size() {
    let (mut near, mut far) = secret_pair();
    let sent = pattern(3_000_000);
    let expected = sent.clone();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut found = vec![0; expected.len()];
            let mut at = 0;
            for len in [1, 8, 4096, 100_000, 3].into_iter().cycle() {
                let end = expected.len().min(at + len);
                receive_exactly(&mut far, &mut found[at..end]);
                at = end;
                if at == expected.len() {
                    break;
                }
            }
            assert!(found == expected);
            let mut pieces = Scatter::new();
            let mut byte = [0];
            pieces.push_buffer(&mut byte);
            assert_eq!(far.receive(&mut pieces).unwrap(), 0, "close_notify is the end");
        });
        let mut rest = &*sent;
        for len in [0, 1, 16_384, 16_385, 5, 700_000].into_iter().cycle() {
            let (now, later) = rest.split_at(len.min(rest.len()));
            let mut pieces = Gather::new();
            now.chunks(1000).for_each(|chunk| pieces.push_bytes(chunk));
            near.send(&mut pieces).unwrap();
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        assert_eq!(near.bytes_out(), 3_000_000);
        near.finish().unwrap();
    });
}

#[test]
fn both_directions_go_at_the_same_time() {
    let (mut near, mut far) = secret_pair();
    let mut answers = far.other_direction("answers");
    let mut questions = near.other_direction("questions");
    thread::scope(|scope| {
        scope.spawn(|| (0..200).for_each(|_| near.send_bytes(&pattern(50_000)).unwrap()));
        scope.spawn(|| (0..20_000u32).for_each(|n| answers.send_bytes(&n.to_be_bytes()).unwrap()));
        scope.spawn(|| {
            let (expected, mut found) = (pattern(50_000), vec![0; 50_000]);
            for _ in 0..200 {
                receive_exactly(&mut far, &mut found);
                assert!(found == expected);
            }
        });
        let mut found = [0; 4];
        for n in 0..20_000u32 {
            receive_exactly(&mut questions, &mut found);
            assert_eq!(u32::from_be_bytes(found), n);
        }
    });
}

#[test]
fn what_is_peeked_at_is_still_to_be_received() {
    let (mut near, mut far) = secret_pair();
    let mut first = [0; 64];
    assert_eq!(far.peek(&mut first).unwrap(), None);
    // Each in a record of its own.
    for byte in 1..=70u8 {
        near.send_bytes(&[byte]).unwrap();
    }
    assert_eq!(far.peek(&mut first[..4]).unwrap(), Some(4));
    assert_eq!(first[..4], [1, 2, 3, 4]);
    assert_eq!(far.peek(&mut first).unwrap(), Some(64));
    assert_eq!(first.to_vec(), (1..=64).collect::<Vec<u8>>());
    let mut all = [0; 70];
    receive_exactly(&mut far, &mut all);
    assert_eq!(all.to_vec(), (1..=70).collect::<Vec<u8>>());
    near.finish().unwrap();
    assert_eq!(far.peek(&mut first).unwrap(), Some(0), "the end");
}

#[test]
fn readiness_is_not_what_the_descriptor_says() {
    let (mut near, mut far) = secret_pair();
    near.send_bytes(b"one record, of which some is taken").unwrap();
    let mut some = [0; 3];
    assert_eq!(far.receive_until(&mut some, Instant::now()).unwrap(), Some(3));
    // Nothing is left in the socket, and yet there is something.
    assert_eq!(far.receive_until(&mut some, Instant::now()).unwrap(), Some(3));
    let mut rest = [0; 100];
    assert_eq!(far.receive_until(&mut rest, Instant::now()).unwrap(), Some(28));
    let soon = Instant::now() + Duration::from_millis(20);
    assert_eq!(far.receive_until(&mut rest, soon).unwrap(), None);
}

/// Plain bytes between two ends, one of which is a channel: what goes to it can be changed.
fn tapped(folder: &Folder) -> (Channel, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let outside = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (inside, _) = listener.accept().unwrap();
    let mut far = channel("far", inside);
    far.secure_as_server(&server(folder)).unwrap();
    (far, outside)
}

fn stock_client(folder: &Folder) -> ClientConnection {
    let TlsClient { config, name } = client(folder);
    ClientConnection::new(config, name).unwrap()
}

/// Shakes hands with rustls's own client.
fn with_stock_client(folder: &Folder) -> (Channel, ClientConnection, TcpStream) {
    let (mut far, mut outside) = tapped(folder);
    let mut stock = stock_client(folder);
    let far = thread::scope(|scope| {
        let far = scope.spawn(move || far.finish_handshake().map(|()| far));
        while stock.is_handshaking() || stock.wants_write() {
            stock.complete_io(&mut outside).unwrap();
        }
        far.join().unwrap().unwrap()
    });
    (far, stock, outside)
}

#[test]
fn a_connection_that_is_cut_has_not_ended() {
    let folder = Authority::new("CA").folder(&Who::localhost());
    for goodbye in [false, true] {
        let (mut far, mut stock, mut outside) = with_stock_client(&folder);
        stock.writer().write_all(b"last words").unwrap();
        if goodbye {
            stock.send_close_notify();
        }
        while stock.wants_write() {
            stock.write_tls(&mut outside).unwrap();
        }
        drop(outside);
        let mut found = [0; 10];
        receive_exactly(&mut far, &mut found);
        assert_eq!(&found, b"last words");
        let mut pieces = Scatter::new();
        pieces.push_buffer(&mut found);
        match far.receive(&mut pieces) {
            Ok(0) => assert!(goodbye),
            Err(Error::Truncated { channel: "far", offset: 10 }) => assert!(!goodbye),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_changed_or_repeated_or_missing_record_is_seen() {
    type Change = fn(&mut Vec<u8>);
    let changes: [(&str, Change); 5] = [
        ("a bit", |bytes| bytes[35] ^= 1),
        ("its type", |bytes| bytes[0] = 22),
        ("repeated", |bytes| bytes.extend_from_within(..)),
        ("missing", |bytes| drop(bytes.drain(..27))),
        ("none of TLS", |bytes| bytes[0] = b'Q'),
    ];
    let folder = Authority::new("CA").folder(&Who::localhost());
    for (what, change) in changes {
        let (mut far, mut stock, mut outside) = with_stock_client(&folder);
        let mut bytes = Vec::new();
        for text in [b"first", b"other"] {
            stock.writer().write_all(text).unwrap();
            stock.write_tls(&mut bytes).unwrap();
        }
        change(&mut bytes);
        outside.write_all(&bytes).unwrap();
        drop(outside);
        let result = loop {
            let mut found = [0; 100];
            let mut pieces = Scatter::new();
            pieces.push_buffer(&mut found);
            match far.receive(&mut pieces) {
                Ok(1..) => {}
                other => break other,
            }
        };
        assert!(matches!(result, Err(Error::Tls { .. })), "{what}: {result:?}");
    }
}

#[test]
fn a_record_that_says_it_is_too_long_is_not_waited_for() {
    let folder = Authority::new("CA").folder(&Who::localhost());
    let (mut far, _stock, mut outside) = with_stock_client(&folder);
    outside.write_all(&[23, 3, 3, 0xff, 0xff]).unwrap();
    let mut found = [0; 10];
    let mut pieces = Scatter::new();
    pieces.push_buffer(&mut found);
    let error = far.receive(&mut pieces).unwrap_err().to_string();
    assert!(error.contains("far channel") && error.contains("65535"), "{error}");
}

#[test]
fn keys_are_renewed_on_request_and_when_they_are_used_up() {
    let folder = Authority::new("CA").folder(&Who::localhost());
    let (mut far, mut stock, mut outside) = with_stock_client(&folder);
    for round in 0..5u8 {
        // It renews its key, and asks for ours to be renewed.
        stock.refresh_traffic_keys().unwrap();
        stock.writer().write_all(&[round; 100]).unwrap();
        while stock.wants_write() {
            stock.write_tls(&mut outside).unwrap();
        }
        let mut found = [0; 100];
        receive_exactly(&mut far, &mut found);
        assert_eq!(found, [round; 100]);
        let answer = pattern(100_000);
        let mut heard = Vec::new();
        thread::scope(|scope| {
            scope.spawn(|| far.send_bytes(&answer).unwrap());
            while heard.len() < answer.len() {
                stock.read_tls(&mut outside).unwrap();
                stock.process_new_packets().unwrap();
                let mut some = [0; 1 << 16];
                while let Ok(bytes @ 1..) = stock.reader().read(&mut some) {
                    heard.extend_from_slice(&some[..bytes]);
                }
            }
        });
        assert!(heard == answer, "round {round}");
    }
}

#[test]
fn tls_1_2_and_every_suite_work_with_rustls_both_ways() {
    let folder = Authority::new("CA").folder(&Who::localhost());
    let versions: [&'static SupportedProtocolVersion; 2] = [&version::TLS12, &version::TLS13];
    for version in versions {
        let all = super::credentials::provider().cipher_suites.clone();
        for suite in all.into_iter().filter(|suite| suite.version() == version) {
            let mut provider = (*super::credentials::provider()).clone();
            provider.cipher_suites = vec![suite];
            if suite.usable_for_signature_algorithm(rustls::SignatureAlgorithm::ECDSA) {
                let TlsClient { config, name } = client(&folder);
                let stock = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
                    .with_protocol_versions(&[version])
                    .unwrap()
                    .dangerous()
                    .with_custom_certificate_verifier(Arc::new(super::unverified::Unverified::new(
                        super::credentials::provider(),
                    )))
                    .with_client_cert_resolver(config.client_auth_cert_resolver.clone());
                let (mut far, mut outside) = tapped(&folder);
                let mut stock = ClientConnection::new(Arc::new(stock), name).unwrap();
                let mut far = thread::scope(|scope| {
                    let far = scope.spawn(move || far.finish_handshake().map(|()| far));
                    while stock.is_handshaking() || stock.wants_write() {
                        stock.complete_io(&mut outside).unwrap();
                    }
                    far.join().unwrap().unwrap()
                });
                let sent = pattern(300_000);
                echo(&mut far, &mut stock, &mut outside, &sent);
            }
        }
    }
}

/// What the stock end says comes back.
fn echo(far: &mut Channel, stock: &mut ClientConnection, outside: &mut TcpStream, sent: &[u8]) {
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut found = vec![0; sent.len()];
            receive_exactly(far, &mut found);
            far.send_bytes(&found).unwrap();
        });
        let mut stream = rustls::Stream::new(stock, outside);
        stream.write_all(sent).unwrap();
        stream.flush().unwrap();
        let mut back = vec![0; sent.len()];
        stream.read_exact(&mut back).unwrap();
        assert!(back == sent);
    });
}

#[test]
fn the_client_works_with_rustlss_own_server() {
    let folder = Authority::new("CA").folder(&Who::localhost());
    let TlsServer { config, .. } = server(&folder);
    let (inside, mut outside) = UnixStream::pair().unwrap();
    let mut near = channel("near", inside);
    near.secure_as_client(&client(&folder)).unwrap();
    let mut stock = ServerConnection::new(config).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut stream = rustls::Stream::new(&mut stock, &mut outside);
            let mut found = vec![0; 100_000];
            stream.read_exact(&mut found).unwrap();
            stream.write_all(&found).unwrap();
            assert_eq!(stream.read(&mut found).unwrap(), 0, "close_notify has come");
        });
        near.finish_handshake().unwrap();
        near.send_bytes(&pattern(100_000)).unwrap();
        let mut back = vec![0; 100_000];
        receive_exactly(&mut near, &mut back);
        assert!(back == pattern(100_000));
        near.finish().unwrap();
    });
}

/// What each side says when they do not agree.
fn complaints(client: &TlsClient, server: &TlsServer) -> (String, String) {
    let (near, far) = shake(client, server);
    let far = far.map(drop).expect_err("the server has to refuse").to_string();
    // In TLS 1.3 a client is done before the server has looked at its certificate.
    let near = near.and_then(|mut near| {
        let (mut byte, mut pieces) = ([0], Scatter::new());
        pieces.push_buffer(&mut byte);
        near.receive(&mut pieces)
    });
    (near.expect_err("the client has to fail").to_string(), far)
}

#[test]
fn a_clients_certificate_has_to_be_of_the_ca_in_time_and_there() {
    let ca = Authority::new("CA");
    let good = ca.folder(&Who::localhost());
    let (server, good_client) = (server(&good), client(&good));
    let other = Authority::new("CA").folder(&Who::localhost());
    other.write("ca-cert.pem", &std::fs::read_to_string(good.file("ca-cert.pem")).unwrap());
    let expired = ca.folder(&Who { until: 2023, ..Who::localhost() });
    let nobody = ca.folder(&Who::localhost());
    nobody.remove(&["client-cert.pem", "client-key.pem"]);
    for (folder, here, there) in [
        (&other, "it cannot verify our certificate", "the source's certificate is not what the CA"),
        (&expired, "certificate_expired", "the source's certificate has expired, on 2023-12-31"),
        (&nobody, "it wants a certificate", "the source shows no certificate"),
    ] {
        let (near, far) = complaints(&client(folder), &server);
        assert!(near.starts_with("near channel") && near.contains(here), "{near}");
        assert!(far.starts_with("far channel, TLS:") && far.contains(there), "{far}");
    }
    let (near, far) = shake(&good_client, &server);
    assert!(near.is_ok() && far.is_ok());
}

#[test]
fn a_servers_certificate_has_to_be_of_the_ca_in_time_and_for_the_host() {
    let ca = Authority::new("CA");
    let good = ca.folder(&Who::localhost());
    let client = client(&good);
    let other = Authority::new("other CA").folder(&Who::localhost());
    let expired = ca.folder(&Who { until: 2023, ..Who::localhost() });
    let elsewhere = ca.folder(&Who { hosts: vec!["elsewhere".into()], ..Who::localhost() });
    let nameless = ca.folder(&Who { hosts: vec![], ..Who::localhost() });
    for (folder, here, there) in [
        (&other, "the destination's certificate is not of the CA", "certificate is not of its CA"),
        (&expired, "the destination's certificate has expired", "certificate_expired"),
        (&elsewhere, "is not for localhost: set tls-hostname", "bad_certificate"),
        (&elsewhere, "elsewhere", "bad_certificate"),
        (&nameless, "it has no subjectAltName", "bad_certificate"),
    ] {
        let (near, far) = complaints(&client, &server(folder));
        assert!(near.contains(here), "{near}");
        assert!(far.contains(there), "{far}");
    }
    let named = credentials(&good, TlsEndpoint::Client);
    let named = named.client(&address(), Some("elsewhere")).unwrap();
    let (near, far) = shake(&named, &server(&elsewhere));
    assert!(near.is_ok() && far.is_ok());
}

#[test]
fn whoever_is_not_on_the_list_stays_out() {
    let folder = Authority::new("CA").folder(&Who::localhost());
    let (client, all) = (client(&folder), credentials(&folder, TlsEndpoint::Server));
    let name = r"O=Example\, Inc.,CN=localhost";
    let allowed = all.server(Some(Authorization::only([name]))).unwrap();
    let (near, far) = shake(&client, &allowed);
    near.unwrap();
    far.unwrap();
    let others = all.server(Some(Authorization::only(["CN=localhost"]))).unwrap();
    let (near, far) = complaints(&client, &others);
    assert!(near.contains("tls-authz does not allow us in"), "{near}");
    assert!(far.contains(name), "{far}");
}

#[test]
fn what_is_revoked_is_refused_and_an_old_list_is_none() {
    let ca = Authority::new("CA");
    let folder = ca.folder(&Who { serial: 7, ..Who::localhost() });
    for (serials, until, refused) in
        [(&[7][..], 2095, Some("revoked")), (&[8], 2095, None), (&[8], 2022, Some("out of date"))]
    {
        ca.revoke(&folder, serials, until);
        let (near, far) = shake(&client(&folder), &server(&folder));
        match refused {
            None => assert!(near.is_ok() && far.is_ok()),
            Some(why) => {
                let near = near.unwrap_err().to_string();
                assert!(near.contains(why), "{near}");
            }
        }
    }
}

#[test]
fn a_second_identity_is_there_for_a_peer_that_cannot_verify_the_first() {
    let ca = Authority::new("CA");
    let folder = ca.folder(&Who::localhost());
    ca.certify_ed25519(&folder, &Who::localhost(), "server");
    let server = server(&folder);
    let mut provider = (*super::credentials::provider()).clone();
    let all = provider.signature_verification_algorithms.mapping;
    let ed25519 = all.iter().filter(|(scheme, _)| *scheme == rustls::SignatureScheme::ED25519);
    // The chain is signed by the CA's ECDSA key: that has to be verified, too.
    let chain = provider.signature_verification_algorithms.all;
    let only: &'static [_] = Box::leak(ed25519.copied().collect::<Vec<_>>().into_boxed_slice());
    provider.signature_verification_algorithms =
        rustls::crypto::WebPkiSupportedAlgorithms { all: chain, mapping: only };
    let mut roots = rustls::RootCertStore::empty();
    let pem = std::fs::read(folder.file("ca-cert.pem")).unwrap();
    use rustls::pki_types::pem::PemObject as _;
    roots.add(rustls::pki_types::CertificateDer::from_pem_slice(&pem).unwrap()).unwrap();
    let TlsClient { config, name } = client(&folder);
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_cert_resolver(config.client_auth_cert_resolver.clone());
    config.enable_secret_extraction = true;
    let (near, far) = shake(&TlsClient { config: Arc::new(config), name }, &server);
    near.unwrap();
    far.unwrap();
}

#[test]
fn without_verification_nobody_has_to_show_anything() {
    let folder = Authority::new("CA").folder(&Who { hosts: vec!["x".into()], ..Who::localhost() });
    let anybody = TlsOptions { verify_peer: false, sanity_check: true };
    let load = |path: &Path, endpoint| TlsCredentials::load_with(path, endpoint, anybody).unwrap();
    let server = load(folder.path(), TlsEndpoint::Server).server(None).unwrap();
    folder.remove(&["client-cert.pem", "client-key.pem"]);
    let client = load(folder.path(), TlsEndpoint::Client).client(&address(), None).unwrap();
    let (near, far) = shake(&client, &server);
    assert!(near.is_ok() && far.is_ok());
    let only = Some(Authorization::only(["CN=localhost"]));
    let picky = load(folder.path(), TlsEndpoint::Server).server(only).unwrap();
    let (_, far) = complaints(&client, &picky);
    assert!(far.contains("shows no certificate"), "{far}");
}

#[test]
fn a_plain_peer_is_told_nothing_and_a_silent_one_not_waited_for() {
    let folder = Authority::new("CA").folder(&Who::localhost());
    let (mut far, mut outside) = tapped(&folder);
    outside.write_all(b"QEVM\0\0\0\x03").unwrap();
    let error = far.finish_handshake().unwrap_err().to_string();
    assert!(error.contains("the source does not speak TLS: set tls-creds there"), "{error}");
    drop(far);
    let mut heard = Vec::new();
    let _ = outside.read_to_end(&mut heard);
    assert_eq!(heard, b"");

    let (mut far, _outside) = tapped(&folder);
    assert!(matches!(far.handshake(), Ok(Some(_))), "it waits, and does not block");
    assert!(far.handshake_deadline().unwrap() > Instant::now());

    let (mut far, outside) = tapped(&folder);
    drop(outside);
    let error = far.finish_handshake().unwrap_err().to_string();
    assert!(error.contains("closed the connection during the handshake"), "{error}");
}

/// Whoever waits for several connections asks each of them again and again.
#[test]
fn a_handshake_that_has_failed_fails_whenever_it_is_asked() {
    let folder = Authority::new("CA").folder(&Who::localhost());
    let (mut far, mut outside) = tapped(&folder);
    let mut hello = Vec::new();
    stock_client(&folder).write_tls(&mut hello).unwrap();
    outside.write_all(&hello).unwrap();
    outside.write_all(&hello).unwrap();
    let first = far.finish_handshake().unwrap_err().to_string();
    let again = far.handshake().unwrap_err().to_string();
    assert_eq!(first, again);
    assert!(far.peek(&mut [0; 4]).is_err());
}

#[test]
fn a_handshake_can_be_cancelled() {
    let folder = Authority::new("CA").folder(&Who::localhost());
    let (mut far, _outside) = tapped(&folder);
    let cancel = cancel();
    far.heed(cancel.clone());
    thread::scope(|scope| {
        let waiting = scope.spawn(|| far.finish_handshake());
        thread::sleep(Duration::from_millis(20));
        cancel.set();
        assert!(matches!(waiting.join().unwrap(), Err(Error::Cancelled)));
    });
}

#[test]
fn what_is_wrong_with_a_directory_is_said() {
    let ca = Authority::new("CA");
    let load = |folder: &Folder, endpoint| {
        TlsCredentials::load(folder.path(), endpoint).map(drop).map_err(|error| error.to_string())
    };
    let (server, client) = (TlsEndpoint::Server, TlsEndpoint::Client);
    type Break = fn(&Folder);
    let cases: [(Break, TlsEndpoint, &str); 8] = [
        (|f| f.remove(&["ca-cert.pem"]), client, "ca-cert.pem: no such file"),
        (|f| f.write("ca-cert.pem", "x"), server, "ca-cert.pem: no certificate in PEM format"),
        (|f| f.remove(&["server-cert.pem"]), server, "server-cert.pem: no such file"),
        (|f| f.remove(&["client-key.pem"]), client, "client-key.pem: no such file"),
        (|f| f.write("server-key.pem", "x"), server, "server-key.pem: no private key"),
        (|f| f.write("ca-crl.pem", ""), server, "ca-crl.pem: no 'X509 CRL'"),
        (
            |f| f.copy("client-key.pem", "server-key.pem"),
            server,
            "server-key.pem: not the private key of server-cert.pem",
        ),
        (
            |f| f.copy("client-cert.pem", "server-cert.pem"),
            server,
            "server-cert.pem: this certificate is not for this endpoint",
        ),
    ];
    for (change, endpoint, expected) in cases {
        let folder = ca.folder(&Who::localhost());
        assert_eq!(load(&folder, endpoint), Ok(()));
        change(&folder);
        let error = load(&folder, endpoint).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    for mode in [0o604, 0o602, 0o666] {
        let folder = ca.folder(&Who::localhost());
        let permissions = Permissions::from_mode(mode);
        std::fs::set_permissions(folder.file("server-key.pem"), permissions).unwrap();
        assert_eq!(load(&folder, client), Ok(()), "it reads its own key alone");
        let error = load(&folder, server).unwrap_err();
        assert!(error.contains("server-key.pem: every user of this host can"), "{error}");
        let trusting = TlsOptions { sanity_check: false, ..TlsOptions::default() };
        assert!(TlsCredentials::load_with(folder.path(), server, trusting).is_ok());
    }
    let expired = ca.folder(&Who { until: 2023, ..Who::localhost() });
    for endpoint in [server, client] {
        let error = load(&expired, endpoint).unwrap_err();
        assert!(error.contains("this certificate has expired, on 2023-12-31"), "{error}");
    }
    let other = Authority::new("another").folder(&Who::localhost());
    other.write("ca-cert.pem", &std::fs::read_to_string(expired.file("ca-cert.pem")).unwrap());
    for endpoint in [server, client] {
        let error = load(&other, endpoint).unwrap_err();
        assert!(error.contains("is not of the CA in ca-cert.pem"), "{error}");
    }
}

#[test]
fn credentials_are_for_one_endpoint_and_one_host() {
    let folder = Authority::new("CA").folder(&Who::localhost());
    let client = credentials(&folder, TlsEndpoint::Client);
    let error = client.server(None).unwrap_err().to_string();
    assert!(error.contains("are for endpoint 'client'"), "{error}");
    let unix = "unix:/tmp/x".parse().unwrap();
    let error = client.client(&unix, None).unwrap_err().to_string();
    assert!(error.contains("set tls-hostname"), "{error}");
    assert!(client.client(&unix, Some("localhost")).is_ok());
    assert!(client.client(&unix, Some("127.0.0.1")).is_ok());
    let error = client.client(&unix, Some("no host")).unwrap_err().to_string();
    assert!(error.contains("'no host' is no host name"), "{error}");
    let server = credentials(&folder, TlsEndpoint::Server);
    assert!(server.client(&unix, None).unwrap_err().to_string().contains("'server'"));
}
