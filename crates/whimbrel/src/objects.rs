//! What parameters name by an identifier (`object-add`): TLS credentials, and who is let in.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::address::Address;
use crate::channel::Route;
use crate::channel::tls::{Authorization, TlsClient, TlsCredentials, TlsServer};
use crate::error::Error;
use crate::recovery;
use crate::settings::{Current, Parameters};

/// One of them.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Object {
    /// Certificates and keys, for parameter `tls-creds`.
    TlsCredentials(TlsCredentials),
    /// Who may migrate into here, for parameter `tls-authz`.
    Authorization(Authorization),
}

impl From<TlsCredentials> for Object {
    fn from(credentials: TlsCredentials) -> Object {
        Object::TlsCredentials(credentials)
    }
}

impl From<Authorization> for Object {
    fn from(authorization: Authorization) -> Object {
        Object::Authorization(authorization)
    }
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Objects(BTreeMap<String, Object>);

impl Objects {
    pub(crate) fn add(&mut self, id: &str, object: Object) -> Result<(), Error> {
        if self.0.contains_key(id) {
            return Err(Error::Refused(format!("there is an object with id '{id}' already")));
        }
        self.0.insert(id.into(), object);
        Ok(())
    }

    /// A migration under way keeps what it has taken.
    pub(crate) fn remove(&mut self, id: &str) -> Result<(), Error> {
        match self.0.remove(id) {
            Some(_) => Ok(()),
            None => Err(Error::Refused(format!("object '{id}' not found"))),
        }
    }

    /// How a source is to connect to `address`; `None` is without TLS.
    pub(crate) fn client(
        &self,
        address: &Address,
        parameters: &Parameters,
    ) -> Result<Option<TlsClient>, Error> {
        let Some(credentials) = self.credentials(parameters)? else { return Ok(None) };
        let hostname = Some(&*parameters.tls_hostname).filter(|name| !name.is_empty());
        credentials.client(address, hostname).map(Some)
    }

    /// How a destination is to be connected to; `None` is without TLS.
    pub(crate) fn server(&self, parameters: &Parameters) -> Result<Option<TlsServer>, Error> {
        let Some(credentials) = self.credentials(parameters)? else { return Ok(None) };
        let authorization = match &*parameters.tls_authz {
            "" => None,
            id => match self.0.get(id) {
                Some(Object::Authorization(authorization)) => Some(authorization.clone()),
                _ => {
                    return Err(Error::Refused(format!(
                        "parameter 'tls-authz': no authorization with id '{id}': add it with \
                         object-add"
                    )));
                }
            },
        };
        credentials.server(authorization).map(Some)
    }

    fn credentials(&self, parameters: &Parameters) -> Result<Option<&TlsCredentials>, Error> {
        match (&*parameters.tls_creds, self.0.get(&parameters.tls_creds)) {
            ("", _) => Ok(None),
            (_, Some(Object::TlsCredentials(credentials))) => Ok(Some(credentials)),
            (id, _) => Err(Error::Refused(format!(
                "No TLS credentials with id '{id}': add them with object-add"
            ))),
        }
    }
}

/// Makes ways to destinations out of what the objects and parameters are at the time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Router {
    pub(crate) objects: Arc<Mutex<Objects>>,
    parameters: Arc<Current>,
}

impl Router {
    /// The objects.
    pub(crate) fn objects(&self) -> MutexGuard<'_, Objects> {
        // Whole values are stored under the lock.
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The parameters, as they are now.
    pub(crate) fn parameters(&self) -> &Current {
        &self.parameters
    }

    /// The way to `address`.
    pub(crate) fn route(&self, address: Address) -> Result<Route, Error> {
        let parameters = self.parameters.get();
        let tls = self.objects().client(&address, &parameters)?;
        Ok(Route { address, tls, silence: recovery::silence(&parameters) })
    }

    /// The way to `recover-uri`, if there is one that can be gone.
    pub(crate) fn other(&self) -> Option<Route> {
        let uri = self.parameters.with(|p| p.recover_uri.clone());
        (!uri.is_empty()).then(|| self.route(uri.parse().ok()?).ok()).flatten()
    }
}
