//! What a VMM gives the server.

use std::fmt;

use serde_json::{Map, Value};
use whimbrel::{
    Address, Capabilities, Capability, ColoStatus, Event, MigrationInfo, MigrationStatus, Object,
    Parameters, RunState,
};

use crate::QmpError;

/// Receives events, from any thread.
pub type EventListener = Box<dyn Fn(&Event) + Send + Sync>;

/// A change of parameters: it is given the present ones, and leaves them as they shall be or says
/// why it cannot.
pub type ParameterChange<'c> = &'c mut dyn FnMut(&mut Parameters) -> Result<(), QmpError>;

/// What the server's commands act on.
///
/// Several client threads call at the same time. Every method returns at once: what takes long
/// (connecting, migrating) is begun, and its outcome is found in [`Backend::migration_info`] and
/// in events. A method that waited for a migration would make its client wait, not the others.
pub trait Backend: Send + Sync {
    /// The guest's name, for `query-name`.
    fn name(&self) -> Option<String> {
        None
    }

    /// The guest's state.
    fn run_state(&self) -> RunState;

    /// Stops the guest. No error if it stands still already.
    fn stop(&self) -> Result<(), QmpError>;

    /// Runs the guest. No error if it runs already.
    fn cont(&self) -> Result<(), QmpError>;

    /// Asks the VMM to end. The reply has gone out before this is called, by a thread that the
    /// server joins when it is dropped: so this must not drop the server, only cause it.
    fn quit(&self);

    /// Which capabilities are on.
    fn capabilities(&self) -> Capabilities;

    /// Sets all of the given capabilities or, with an error, none.
    fn set_capabilities(&self, changes: &[(Capability, bool)]) -> Result<(), QmpError>;

    /// The parameters.
    fn parameters(&self) -> Parameters;

    /// Applies `change` to the parameters, with no other change between its reading and its
    /// writing. With an error, from it or from a check of its outcome, none changes.
    fn update_parameters(&self, change: ParameterChange<'_>) -> Result<(), QmpError>;

    /// Adds what parameters can name by `id`, such as TLS credentials.
    fn add_object(&self, id: &str, object: Object) -> Result<(), QmpError> {
        let _ = (id, object);
        Err(QmpError::generic("this VMM takes no objects"))
    }

    /// Removes it.
    fn remove_object(&self, id: &str) -> Result<(), QmpError> {
        Err(QmpError::generic(format_args!("object '{id}' not found")))
    }

    /// Begins a migration to `destination`.
    fn migrate(&self, destination: Address) -> Result<(), QmpError>;

    /// Goes on with a migration that is paused in postcopy: connects to `destination`, and sends what
    /// that side does not have.
    fn migrate_resume(&self, destination: Address) -> Result<(), QmpError>;

    /// Waits once more, at `source`, for a migration that is paused in postcopy.
    fn migrate_recover(&self, source: Address) -> Result<(), QmpError>;

    /// Begins to wait for a migration at `source`; with `exit_on_error`, the VMM ends should that
    /// migration fail.
    fn migrate_incoming(&self, source: Address, exit_on_error: bool) -> Result<(), QmpError>;

    /// Begins to undo the migration under way. No error without one.
    fn migrate_cancel(&self) -> Result<(), QmpError>;

    /// Has the migration under way go over to postcopy as soon as it can.
    fn migrate_start_postcopy(&self) -> Result<(), QmpError>;

    /// Breaks the connections of a migration in postcopy, on purpose.
    fn migrate_pause(&self) -> Result<(), QmpError>;

    /// Which part the VM has in COLO, or had.
    fn colo_status(&self) -> ColoStatus {
        ColoStatus::default()
    }

    /// The other side of COLO is gone: goes on alone.
    fn colo_lost_heartbeat(&self) -> Result<(), QmpError> {
        Err(QmpError::generic("VM is not in COLO mode"))
    }

    /// Takes a checkpoint now.
    fn colo_checkpoint(&self) -> Result<(), QmpError> {
        Err(QmpError::generic("VM is not in COLO mode"))
    }

    /// Shuts down every connection of the migration under way, whoever waits on it; an error when
    /// there is none.
    fn yank(&self) -> Result<(), QmpError>;

    /// Goes on from `state`, at which the migration waits.
    fn migrate_continue(&self, state: MigrationStatus) -> Result<(), QmpError>;

    /// The report on the migration under way or on the last one.
    fn migration_info(&self) -> MigrationInfo;

    /// Has `listener` called for every event until the subscription is dropped. It may call back
    /// into the backend and never blocks.
    fn subscribe(&self, listener: EventListener) -> Subscription;

    /// The names of the commands [`Backend::extra`] knows. QMP wants `x-` before what it does
    /// not define.
    fn extra_commands(&self) -> Vec<String> {
        Vec::new()
    }

    /// A command the server does not know; `None` if the backend does not know it either.
    fn extra(
        &self,
        command: &str,
        arguments: &Map<String, Value>,
    ) -> Option<Result<Value, QmpError>> {
        let _ = (command, arguments);
        None
    }
}

/// Ends the delivery of events when dropped.
#[must_use = "dropped, no more events are delivered"]
pub struct Subscription {
    end: Option<Box<dyn FnOnce() + Send + Sync>>,
}

impl Subscription {
    /// A subscription that calls `end` when it is dropped.
    pub fn new(end: impl FnOnce() + Send + Sync + 'static) -> Subscription {
        Subscription { end: Some(Box::new(end)) }
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription").finish_non_exhaustive()
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        if let Some(end) = self.end.take() {
            end();
        }
    }
}
