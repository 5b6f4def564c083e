//! The vCPU threads of a VM: started, kicked, told to end, joined.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::signal::Killable;
use whimbrel::VmError;

use crate::error::Error;
use crate::gate::Gate;
use crate::guarded;
use crate::machine::Machine;

/// How long a pause waits for a vCPU. It takes well under a millisecond on native threads and a
/// few on KVM, also when it waits for a page that is missing; but for a KVM that cannot be woken
/// from that (Linux before 6.2, and where KVM itself does what the guest's instruction does).
const PAUSE_LIMIT: Duration = Duration::from_secs(10);

/// The threads, which are joined when the value is dropped.
pub(crate) struct Vcpus {
    gate: Arc<Gate>,
    machine: Arc<dyn Machine>,
    /// The kernel's number of each thread.
    ids: Arc<[AtomicU32]>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Vcpus {
    /// Starts a thread for each of `count` vCPUs, and one more for the driver of the guest's network
    /// if it has one. When this returns, all of them wait at the gate.
    pub(crate) fn start(
        count: u32,
        network: bool,
        machine: Arc<dyn Machine>,
    ) -> Result<Vcpus, Error> {
        guarded::install();
        let vcpus = Vcpus {
            gate: Arc::new(Gate::new(count as usize + usize::from(network))),
            machine,
            ids: (0..count).map(|_| AtomicU32::new(0)).collect(),
            threads: Mutex::default(),
        };
        for cpu in 0..count {
            vcpus.start_one(cpu, format!("vcpu-{cpu}"))?;
        }
        if network {
            vcpus.start_one(count, "guest-net".into())?;
        }
        vcpus.pause().map_err(Error::Start)?;
        Ok(vcpus)
    }

    fn start_one(&self, cpu: u32, name: String) -> Result<(), Error> {
        let (gate, machine) = (Arc::clone(&self.gate), Arc::clone(&self.machine));
        let ids = Arc::clone(&self.ids);
        let work = move || {
            let id = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
            if let Some(own) = ids.get(cpu as usize) {
                own.store(id, Ordering::Release);
            }
            vcpu_thread(cpu, &gate, &*machine);
        };
        let thread = Builder::new().name(name.clone()).spawn(work);
        self.lock().push(thread.map_err(|source| Error::Thread { name, source })?);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        // The list is whole after every statement.
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// The kernel's numbers of the threads (`gettid`), in the order of the vCPUs.
    pub(crate) fn ids(&self) -> Vec<u32> {
        self.ids.iter().map(|id| id.load(Ordering::Acquire)).collect()
    }

    /// Holds all vCPUs at the gate. When one does not come, the gate stays closed.
    pub(crate) fn pause(&self) -> Result<(), VmError> {
        match self.gate.close(PAUSE_LIMIT, || self.kick()) {
            0 => Ok(()),
            left => {
                let limit = PAUSE_LIMIT.as_secs();
                Err(VmError::new(format!("{left} vCPUs did not stop within {limit} s")))
            }
        }
    }

    /// Tells the threads to end, waits at most for `limit`, and gives how many have not.
    pub(crate) fn end(&self, limit: Duration) -> usize {
        /// A kick between two of a thread's system calls is repeated.
        const KICK_AGAIN: Duration = Duration::from_millis(1);
        let until = Instant::now() + limit;
        self.gate.quit();
        loop {
            self.kick();
            let left = self.lock().iter().filter(|thread| !thread.is_finished()).count();
            if left == 0 || Instant::now() > until {
                return left;
            }
            std::thread::sleep(KICK_AGAIN);
        }
    }

    /// Gets the threads out of the guest.
    fn kick(&self) {
        let signal = self.machine.kick();
        for thread in self.lock().iter() {
            // A thread that has ended needs no kick.
            let _ended = thread.kill(signal);
        }
    }
}

/// Runs a vCPU whenever the gate is open.
fn vcpu_thread(cpu: u32, gate: &Gate, machine: &dyn Machine) {
    /// A vCPU whose thread panics is held for good, so that nobody waits for it.
    struct Ended<'a>(u32, &'a Gate);
    impl Drop for Ended<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                self.1.fail(format!("vcpu-{}: its thread panicked", self.0));
                self.1.pass();
            }
        }
    }
    let _ended = Ended(cpu, gate);
    while gate.pass() {
        if let Err(error) = machine.run(cpu, gate) {
            gate.fail(format!("vcpu-{cpu}: {error}"));
            gate.sleep(None);
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        while self.end(Duration::from_secs(3600)) > 0 {}
        for thread in self.lock().drain(..) {
            // The gate knows of its panic, if it had one.
            let _panicked = thread.join();
        }
    }
}
