//! The name in a certificate as text, as QEMU shows it and compares it with `tls-authz`: the
//! attributes in the order they have in the certificate, escaped as in RFC 4514 (checked against
//! QEMU 7.2 and 10.0 with GnuTLS 3.7; see docs/tls.md).

/// The attributes that have a name, by the last numbers of their object identifiers.
const NAMED: [(&str, &str); 28] = [
    ("2.5.4.3", "CN"),
    ("2.5.4.4", "surName"),
    ("2.5.4.5", "serialNumber"),
    ("2.5.4.6", "C"),
    ("2.5.4.7", "L"),
    ("2.5.4.8", "ST"),
    ("2.5.4.9", "street"),
    ("2.5.4.10", "O"),
    ("2.5.4.11", "OU"),
    ("2.5.4.12", "title"),
    ("2.5.4.13", "description"),
    ("2.5.4.15", "businessCategory"),
    ("2.5.4.16", "postalAddress"),
    ("2.5.4.17", "postalCode"),
    ("2.5.4.20", "telephoneNumber"),
    ("2.5.4.41", "name"),
    ("2.5.4.42", "givenName"),
    ("2.5.4.43", "initials"),
    ("2.5.4.44", "generationQualifier"),
    ("2.5.4.45", "X500UniqueIdentifier"),
    ("2.5.4.46", "dnQualifier"),
    ("2.5.4.65", "pseudonym"),
    ("0.9.2342.19200300.100.1.1", "UID"),
    ("0.9.2342.19200300.100.1.25", "DC"),
    ("1.2.840.113549.1.9.1", "EMAIL"),
    ("1.3.6.1.4.1.311.60.2.1.1", "jurisdictionOfIncorporationLocalityName"),
    ("1.3.6.1.4.1.311.60.2.1.2", "jurisdictionOfIncorporationStateOrProvinceName"),
    ("1.3.6.1.4.1.311.60.2.1.3", "jurisdictionOfIncorporationCountryName"),
];

/// Tags of DER.
const INTEGER: u8 = 0x02;
const OBJECT_IDENTIFIER: u8 = 0x06;
const UTF8_STRING: u8 = 0x0c;
const NUMERIC_STRING: u8 = 0x12;
const PRINTABLE_STRING: u8 = 0x13;
const TELETEX_STRING: u8 = 0x14;
const IA5_STRING: u8 = 0x16;
const UNIVERSAL_STRING: u8 = 0x1c;
const BMP_STRING: u8 = 0x1e;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
/// The version of a certificate.
const VERSION: u8 = 0xa0;

/// The name of whom `certificate` (in DER) is for; `None` for what is no certificate.
pub(super) fn of(certificate: &[u8]) -> Option<String> {
    let mut outer = Der(certificate);
    let mut certificate = Der(outer.expect(SEQUENCE)?);
    let mut content = Der(certificate.expect(SEQUENCE)?);
    if content.0.first() == Some(&VERSION) {
        content.expect(VERSION)?;
    }
    content.expect(INTEGER)?; // The serial number.
    content.expect(SEQUENCE)?; // How it is signed.
    content.expect(SEQUENCE)?; // By whom.
    content.expect(SEQUENCE)?; // From when until when.
    name(content.expect(SEQUENCE)?)
}

fn name(der: &[u8]) -> Option<String> {
    let (mut names, mut text) = (Der(der), String::new());
    while !names.0.is_empty() {
        let mut set = Der(names.expect(SET)?);
        let mut joint = if text.is_empty() { "" } else { "," };
        while !set.0.is_empty() {
            let mut pair = Der(set.expect(SEQUENCE)?);
            text.push_str(joint);
            attribute(pair.expect(OBJECT_IDENTIFIER)?, pair.0, &mut text)?;
            joint = "+";
        }
    }
    Some(text)
}

fn attribute(identifier: &[u8], value: &[u8], out: &mut String) -> Option<()> {
    let identifier = dotted(identifier)?;
    let known = NAMED.iter().find(|(dotted, _)| *dotted == identifier);
    let (tag, content, _) = Der(value).next()?;
    match (known, string(tag, content)) {
        (Some((_, name)), Some(text)) => {
            out.push_str(name);
            out.push('=');
            escape(&text, out);
        }
        (known, _) => {
            out.push_str(known.map_or(&identifier, |(_, name)| name));
            out.push_str("=#");
            value.iter().for_each(|byte| *out += &format!("{byte:02x}"));
        }
    }
    Some(())
}

/// Special characters get a backslash.
fn escape(text: &str, out: &mut String) {
    let last = text.chars().count().saturating_sub(1);
    for (at, character) in text.chars().enumerate() {
        let special = match character {
            ',' | '+' | '"' | '\\' | '<' | '>' | ';' => true,
            '#' => at == 0,
            ' ' => at == 0 || at == last,
            _ => false,
        };
        if special {
            out.push('\\');
        }
        out.push(character);
    }
}

fn string(tag: u8, content: &[u8]) -> Option<String> {
    match tag {
        UTF8_STRING | PRINTABLE_STRING | IA5_STRING | NUMERIC_STRING => {
            String::from_utf8(content.to_vec()).ok()
        }
        TELETEX_STRING => Some(content.iter().copied().map(char::from).collect()),
        BMP_STRING => {
            let units = content.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]]));
            content.len().is_multiple_of(2).then_some(())?;
            char::decode_utf16(units).collect::<Result<_, _>>().ok()
        }
        UNIVERSAL_STRING => {
            let (units, rest) = content.as_chunks::<4>();
            rest.is_empty().then_some(())?;
            units.iter().map(|unit| char::from_u32(u32::from_be_bytes(*unit))).collect()
        }
        _ => None,
    }
}

/// An object identifier as numbers and dots.
fn dotted(bytes: &[u8]) -> Option<String> {
    let mut numbers = Vec::new();
    let mut number: u64 = 0;
    for byte in bytes {
        number = number.checked_mul(128)?.checked_add(u64::from(byte & 0x7f))?;
        if byte & 0x80 == 0 {
            numbers.push(std::mem::take(&mut number));
        }
    }
    let first = *numbers.first()?;
    let root = (first / 40).min(2);
    let mut text = format!("{root}.{}", first - 40 * root);
    numbers[1..].iter().for_each(|number| text += &format!(".{number}"));
    Some(text)
}

/// What is left to be read of DER.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// The content of the next value, which has to be of this kind.
    fn expect(&mut self, tag: u8) -> Option<&'a [u8]> {
        let (found, content, rest) = self.next()?;
        (found == tag).then_some(())?;
        self.0 = rest;
        Some(content)
    }

    /// The next value's tag and content, and what is behind it.
    fn next(&self) -> Option<(u8, &'a [u8], &'a [u8])> {
        let (&[tag, first], rest) = self.0.split_first_chunk::<2>()?;
        let (len, rest) = match first {
            0..0x80 => (usize::from(first), rest),
            _ => {
                let (bytes, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
                (1..=4).contains(&bytes.len()).then_some(())?;
                let len = bytes.iter().fold(0, |len, byte| len << 8 | usize::from(*byte));
                (len, rest)
            }
        };
        let (content, rest) = rest.split_at_checked(len)?;
        Some((tag, content, rest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn der(tag: u8, content: &[u8]) -> Vec<u8> {
        let len = u8::try_from(content.len()).unwrap();
        match len {
            0..0x80 => [&[tag, len], content].concat(),
            _ => [&[tag, 0x81, len], content].concat(),
        }
    }

    fn pair(identifier: &[u8], tag: u8, value: &[u8]) -> Vec<u8> {
        let both = [der(OBJECT_IDENTIFIER, identifier), der(tag, value)].concat();
        der(SEQUENCE, &both)
    }

    fn text_of(pairs: &[&[Vec<u8>]]) -> String {
        let sets: Vec<u8> = pairs.iter().flat_map(|set| der(SET, &set.concat())).collect();
        name(&sets).unwrap()
    }

    /// What QEMU 7.2.22 and 10.0.2 have printed for the same names.
    #[test]
    fn names_are_written_as_qemu_writes_them() {
        let id = |last: u8| [0x55, 4, last];
        assert_eq!(
            text_of(&[
                &[pair(&id(6), PRINTABLE_STRING, b"GB")],
                &[pair(&id(8), UTF8_STRING, b"London")],
                &[pair(&id(3), UTF8_STRING, b"laptop.example.com")],
            ]),
            "C=GB,ST=London,CN=laptop.example.com"
        );
        assert_eq!(
            text_of(&[
                &[pair(&id(10), UTF8_STRING, br#"A, B+C "q" <x>;y\z=1"#)],
                &[pair(&id(3), UTF8_STRING, b"#lead trail ")],
            ]),
            r#"O=A\, B\+C \"q\" \<x\>\;y\\z=1,CN=\#lead trail\ "#
        );
        assert_eq!(
            text_of(&[
                &[pair(&id(10), UTF8_STRING, b"multi"), pair(&id(11), UTF8_STRING, b"valued")],
                &[pair(&id(3), UTF8_STRING, "Jürgen".as_bytes())],
            ]),
            "O=multi+OU=valued,CN=Jürgen"
        );
        let uid = [0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 1, 1];
        let email = [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 1];
        let unstructured = [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 2];
        assert_eq!(
            text_of(&[
                &[pair(&uid, UTF8_STRING, b"joe")],
                &[pair(&email, IA5_STRING, b"a@b.c")],
                &[pair(&id(97), UTF8_STRING, b"oi")],
                &[pair(&unstructured, UTF8_STRING, b"un")],
            ]),
            "UID=joe,EMAIL=a@b.c,2.5.4.97=#0c026f69,1.2.840.113549.1.9.2=#0c02756e"
        );
        assert_eq!(text_of(&[&[pair(&id(3), BMP_STRING, &[0, b'a', 1, 0x31])]]), "CN=a\u{131}");
    }

    #[test]
    fn what_is_no_certificate_has_no_name() {
        for bytes in [&b""[..], b"\x30", b"\x30\x84\xff\xff\xff\xff", b"\x30\x00", b"\x30\x80\x00"]
        {
            assert_eq!(of(bytes), None);
        }
        let lone = der(SET, &[0x30, 5, 6, 9]);
        assert_eq!(name(&lone), None);
    }
}
