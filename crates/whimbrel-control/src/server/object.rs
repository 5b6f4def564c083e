//! `object-add` and `object-del`: what parameters name by an identifier.

use std::path::Path;

use serde_json::{Value, json};
use whimbrel::{
    Authorization, AuthorizationFormat as Format, AuthorizationPolicy as Policy, Object,
    TlsCredentials, TlsEndpoint, TlsOptions,
};

use super::arguments::Arguments;
use crate::{Backend, QmpError};

pub(super) fn add(mut arguments: Arguments, backend: &dyn Backend) -> Result<Value, QmpError> {
    let kind = arguments.string("qom-type")?;
    let id = arguments.string("id")?;
    let object = match &*kind {
        "tls-creds-x509" => credentials(arguments)?.into(),
        "authz-simple" => {
            let identity = arguments.string("identity")?;
            arguments.finish()?;
            Authorization::only([identity]).into()
        }
        "authz-list" => list(arguments)?,
        "tls-creds-psk" | "tls-creds-anon" => {
            return Err(QmpError::generic(format_args!(
                "'{kind}': rustls has neither pre-shared keys nor anonymous sessions: use \
                 tls-creds-x509 ('whimbrel tls' makes certificates)"
            )));
        }
        other => return Err(QmpError::generic(format_args!("invalid object type: {other}"))),
    };
    backend.add_object(&id, object).map(|()| json!({}))
}

pub(super) fn delete(mut arguments: Arguments, backend: &dyn Backend) -> Result<Value, QmpError> {
    let id = arguments.string("id")?;
    arguments.finish()?;
    backend.remove_object(&id).map(|()| json!({}))
}

fn credentials(mut arguments: Arguments) -> Result<TlsCredentials, QmpError> {
    let folder = arguments.string("dir")?;
    // QEMU's default.
    let endpoint = match arguments.optional_string("endpoint")?.as_deref() {
        None | Some("client") => TlsEndpoint::Client,
        Some("server") => TlsEndpoint::Server,
        Some(other) => return Err(QmpError::wrong_value("endpoint", other)),
    };
    let options = TlsOptions {
        verify_peer: arguments.optional_bool("verify-peer")?.unwrap_or(true),
        sanity_check: arguments.optional_bool("sanity-check")?.unwrap_or(true),
    };
    for (name, why) in [
        ("priority", "it is for GnuTLS: here it is always TLS 1.2 or 1.3 with AEAD suites"),
        ("passwordid", "encrypted private keys are not supported"),
    ] {
        if arguments.optional_string(name)?.is_some() {
            return Err(QmpError::generic(format_args!(
                "Parameter '{name}' is not supported: {why}"
            )));
        }
    }
    arguments.finish()?;
    TlsCredentials::load_with(Path::new(&folder), endpoint, options).map_err(QmpError::generic)
}

fn list(mut arguments: Arguments) -> Result<Object, QmpError> {
    let otherwise = policy(&mut arguments)?.unwrap_or(Policy::Deny);
    let rules = arguments.optional_objects("rules")?.unwrap_or_default();
    arguments.finish()?;
    let mut list = Authorization::otherwise(otherwise);
    for mut rule in rules {
        let pattern = rule.string("match")?;
        let policy = policy(&mut rule)?.ok_or_else(|| QmpError::missing("policy"))?;
        let format = match rule.optional_string("format")?.as_deref() {
            None | Some("exact") => Format::Exact,
            Some("glob") => Format::Glob,
            Some(other) => return Err(QmpError::wrong_value("format", other)),
        };
        rule.finish()?;
        list = list.rule(pattern, format, policy);
    }
    Ok(list.into())
}

fn policy(arguments: &mut Arguments) -> Result<Option<Policy>, QmpError> {
    match arguments.optional_string("policy")?.as_deref() {
        None => Ok(None),
        Some("allow") => Ok(Some(Policy::Allow)),
        Some("deny") => Ok(Some(Policy::Deny)),
        Some(other) => Err(QmpError::wrong_value("policy", other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(value: Value) -> Arguments {
        let Value::Object(members) = value else { panic!("an object") };
        Arguments::new(members)
    }

    #[test]
    fn a_list_is_taken_as_it_is_written() {
        let object = list(arguments(json!({
            "policy": "deny",
            "rules": [
                { "match": "CN=bad", "policy": "deny" },
                { "match": "CN=*", "policy": "allow", "format": "glob" },
            ],
        })));
        let Ok(Object::Authorization(list)) = object else { panic!("{object:?}") };
        assert_eq!(list.of("CN=bad"), Policy::Deny);
        assert_eq!(list.of("CN=good"), Policy::Allow);
        assert_eq!(list.of("O=x"), Policy::Deny);
        let error = super::list(arguments(json!({ "policy": "maybe" }))).unwrap_err();
        assert!(error.desc.contains("maybe"), "{error:?}");
    }

    #[test]
    fn what_rustls_has_not_is_refused_in_words() {
        for name in ["priority", "passwordid"] {
            let given = arguments(json!({ "dir": "/nowhere", "endpoint": "server", name: "x" }));
            let error = credentials(given).unwrap_err();
            assert!(error.desc.contains(name) && error.desc.contains("not supported"), "{error:?}");
        }
        let missing = credentials(arguments(json!({ "dir": "/nowhere" }))).unwrap_err();
        assert_eq!(missing.desc, "/nowhere/ca-cert.pem: no such file");
    }
}
