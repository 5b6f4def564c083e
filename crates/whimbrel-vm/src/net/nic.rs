//! The network device: frames for the guest wait in it, and frames of the guest's leave through it.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use whimbrel::{DeviceState, VmError};

use super::{FRAME_MAX, NetConfig};
use crate::gate::Gate;
use crate::state::{Fields, Tag, Writer};

/// Its name as a device with state.
pub(crate) const DEVICE: &str = "nic";

const MAC: Tag = Tag(1, "mac");
const IP: Tag = Tag(2, "ip");

/// Most frames that wait for the guest: what comes then is dropped, as by any device.
const WAITING_MAX: usize = 512;

/// Where frames of the guest's go.
type Sink = Arc<dyn Fn(Vec<u8>) + Send + Sync>;

/// A VM's network device.
pub struct Nic {
    config: NetConfig,
    waiting: Mutex<VecDeque<Vec<u8>>>,
    sink: Mutex<Option<Sink>>,
    /// What wakes the guest; there is none before it has threads.
    gate: Mutex<Option<Arc<Gate>>>,
}

impl Nic {
    pub(crate) fn new(config: NetConfig) -> Nic {
        Nic { config, waiting: Mutex::default(), sink: Mutex::default(), gate: Mutex::default() }
    }

    /// Who the guest is in its network, if it is built here.
    pub fn config(&self) -> NetConfig {
        self.config
    }

    /// A frame has come for the guest. It is dropped if it is too long, or too many wait already.
    pub fn receive(&self, frame: Vec<u8>) {
        {
            let mut waiting = lock(&self.waiting);
            if frame.len() > FRAME_MAX || waiting.len() >= WAITING_MAX {
                return;
            }
            waiting.push_back(frame);
        }
        self.rouse();
    }

    /// From now on frames of the guest's go to `sink`: called by the guest's thread, which waits for
    /// it.
    pub fn on_send(&self, sink: impl Fn(Vec<u8>) + Send + Sync + 'static) {
        *lock(&self.sink) = Some(Arc::new(sink));
    }

    /// Nothing goes out any more.
    pub fn unplug(&self) {
        *lock(&self.sink) = None;
    }

    pub(crate) fn wakes(&self, gate: &Arc<Gate>) {
        *lock(&self.gate) = Some(Arc::clone(gate));
    }

    fn rouse(&self) {
        if let Some(gate) = &*lock(&self.gate) {
            gate.rouse();
        }
    }

    pub(super) fn next(&self) -> Option<Vec<u8>> {
        lock(&self.waiting).pop_front()
    }

    /// One that was not handled after all.
    pub(super) fn put_back(&self, frame: Vec<u8>) {
        lock(&self.waiting).push_front(frame);
    }

    pub(super) fn send(&self, frame: Vec<u8>) {
        let sink = lock(&self.sink).clone();
        if let Some(sink) = sink {
            sink(frame);
        }
    }

    /// Frames on their way are not part of the state: a network may lose them.
    pub(crate) fn save(&self) -> DeviceState {
        let mut writer = Writer::new();
        writer.bytes(MAC, &self.config.mac);
        writer.bytes(IP, &self.config.ip);
        writer.device(DEVICE, 0)
    }

    /// What comes is a network device. Who the guest is is in its RAM.
    pub(crate) fn check(device: &DeviceState) -> Result<(), VmError> {
        let fields = Fields::read(device, &[MAC, IP])?;
        fields.array::<6>(MAC)?;
        fields.array::<4>(IP).map(drop)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whole after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Nic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nic").field("config", &self.config).finish_non_exhaustive()
    }
}
