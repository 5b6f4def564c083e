//! What TLS complains about, in words: what it is, and what to do.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::UnixTime;
use rustls::{AlertDescription, CertificateError, Error, InvalidMessage};

use super::credentials::TlsEndpoint;
use super::receiving::Broken;
use super::record::Wrong;
use super::session::Fault;

/// Why a handshake failed here, at `endpoint`.
pub(super) fn of_handshake(error: &Error, endpoint: TlsEndpoint) -> String {
    let peer = match endpoint {
        TlsEndpoint::Client => "the destination",
        TlsEndpoint::Server => "the source",
    };
    match error {
        Error::InvalidCertificate(problem) => {
            format!("{peer}'s certificate {}", of_certificate(problem))
        }
        Error::NoCertificatesPresented => format!(
            "{peer} shows no certificate: it needs {}-cert.pem and {}-key.pem, or set \
             verify-peer=no here",
            other(endpoint).name(),
            other(endpoint).name()
        ),
        Error::AlertReceived(alert) => of_alert(*alert, Some(endpoint)),
        Error::InvalidMessage(InvalidMessage::InvalidContentType)
        | Error::InvalidMessage(InvalidMessage::UnknownProtocolVersion) => {
            format!("{peer} does not speak TLS: set tls-creds there, too")
        }
        Error::PeerIncompatible(problem) => {
            format!("{peer} and this have no version or cipher in common ({problem:?})")
        }
        other => format!("{peer} breaks the handshake: {other}"),
    }
}

/// What is wrong with a certificate of our own.
pub(super) fn of_own(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(problem) => {
            format!("this certificate {}", of_certificate(problem))
        }
        other => other.to_string(),
    }
}

fn of_certificate(problem: &CertificateError) -> String {
    match problem {
        CertificateError::UnknownIssuer => {
            "is not of the CA in ca-cert.pem: the same CA has to sign both sides'".into()
        }
        CertificateError::BadSignature => {
            "is not what the CA in ca-cert.pem has signed: it may be of another CA of the same name"
                .into()
        }
        CertificateError::Expired => "has expired".into(),
        CertificateError::ExpiredContext { time, not_after } => format!(
            "has expired, on {} (it is {} here): make a new one, or check the clocks",
            date(*not_after),
            date(*time)
        ),
        CertificateError::NotValidYet => "is not valid yet: check the clocks".into(),
        CertificateError::NotValidYetContext { time, not_before } => format!(
            "is valid only from {} on (it is {} here): check the clocks",
            date(*not_before),
            date(*time)
        ),
        CertificateError::Revoked => "has been revoked, by ca-crl.pem".into(),
        CertificateError::ExpiredRevocationList
        | CertificateError::ExpiredRevocationListContext { .. } => {
            "cannot be checked: ca-crl.pem is out of date".into()
        }
        CertificateError::NotValidForName => {
            "is not for the host connected to: set tls-hostname to a name that it is for".into()
        }
        CertificateError::NotValidForNameContext { expected, presented } => {
            let presented = match presented.as_slice() {
                [] => "none, since it has no subjectAltName".into(),
                names => names.join(", "),
            };
            format!(
                "is not for {}: set tls-hostname to a name that it is for ({presented})",
                expected.to_str()
            )
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "is not for this endpoint: its extended key usage forbids it".into()
        }
        CertificateError::BadEncoding => "is none, or damaged".into(),
        other => format!("is not taken: {other}"),
    }
}

/// What the peer says when it gives up; `during` a handshake, what it complains about is ours.
fn of_alert(alert: AlertDescription, during: Option<TlsEndpoint>) -> String {
    let own = during.map_or("our", |endpoint| match endpoint {
        TlsEndpoint::Client => "the source's",
        TlsEndpoint::Server => "the destination's",
    });
    let hint = match alert {
        AlertDescription::UnknownCA => format!(": {own} certificate is not of its CA"),
        AlertDescription::CertificateExpired => format!(": {own} certificate has expired"),
        AlertDescription::CertificateRevoked => format!(": {own} certificate has been revoked"),
        AlertDescription::CertificateRequired => {
            format!(": it wants a certificate, and {own} credentials have none")
        }
        AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::CertificateUnknown => {
            format!(": it does not take {own} certificate")
        }
        AlertDescription::DecryptError => {
            format!(": it cannot verify {own} certificate: the same CA has to sign both sides'")
        }
        AlertDescription::AccessDenied => ": its tls-authz does not allow us in".into(),
        AlertDescription::ProtocolVersion | AlertDescription::HandshakeFailure => {
            ": it has no version or cipher in common with this, or wants what this has not".into()
        }
        _ => String::new(),
    };
    format!("the other side gave up, with alert '{}'{hint}; see what it says", name(alert))
}

/// An alert's name as in the standards.
fn name(alert: AlertDescription) -> String {
    let camel = format!("{alert:?}");
    let mut name = String::new();
    let mut before = '_';
    for character in camel.chars() {
        if character.is_ascii_uppercase() && before.is_ascii_lowercase() {
            name.push('_');
        }
        name.push(character.to_ascii_lowercase());
        before = character;
    }
    name
}

/// Why a session does not go on.
pub(super) fn of_fault(fault: &Fault) -> String {
    match fault {
        Fault::System(error) => error.to_string(),
        Fault::Truncated => "the connection ended without close_notify".into(),
        Fault::Broken(Broken::Alert(alert)) => of_alert(*alert, None),
        Fault::Broken(Broken::Message(what)) => format!("the other side sends {what}"),
        Fault::Broken(Broken::Record(wrong)) => match wrong {
            Wrong::Header(bytes) => format!("expected a record of TLS, found {bytes:02x?}"),
            Wrong::Length(len) => format!("a record says that it has {len} bytes, too many"),
            Wrong::Unprotected => "a record came that is not encrypted".into(),
            Wrong::Forged => "a record was changed on its way, or is not from the peer".into(),
            Wrong::Content => "a record holds too much, or nothing".into(),
            Wrong::Exhausted => "more records came than one key is good for".into(),
        },
        Fault::Key(error) => format!("no new key could be made: {error}"),
        Fault::KeyUsedUp => "TLS 1.2 cannot send more with one key: both sides need TLS 1.3".into(),
    }
}

fn other(endpoint: TlsEndpoint) -> TlsEndpoint {
    match endpoint {
        TlsEndpoint::Client => TlsEndpoint::Server,
        TlsEndpoint::Server => TlsEndpoint::Client,
    }
}

/// A day and a time, in UTC.
fn date(time: UnixTime) -> String {
    let time: SystemTime = UNIX_EPOCH + Duration::from_secs(time.as_secs());
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, rest) = (seconds / 86400, seconds % 86400);
    let (year, month, day) = civil(days);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", rest / 3600, rest / 60 % 60)
}

/// The day that is so many days after 1 January 1970.
fn civil(days: u64) -> (u64, u64, u64) {
    // Counted from 1 March of year 0, so that a leap day is the last of its year.
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_have_dates() {
        for (days, date) in [
            (0, (1970, 1, 1)),
            (59, (1970, 3, 1)),
            (11_016, (2000, 2, 29)),
            (11_017, (2000, 3, 1)),
            (20_778, (2026, 11, 21)),
        ] {
            assert_eq!(civil(days), date);
        }
        assert_eq!(
            date(UnixTime::since_unix_epoch(Duration::from_secs(86399))),
            "1970-01-01 23:59 UTC"
        );
    }

    #[test]
    fn alerts_have_the_names_of_the_standards() {
        assert_eq!(name(AlertDescription::BadCertificate), "bad_certificate");
        assert_eq!(name(AlertDescription::UnknownCA), "unknown_ca");
        assert_eq!(name(AlertDescription::BadRecordMac), "bad_record_mac");
    }
}
