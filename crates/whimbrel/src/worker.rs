//! Threads with a name, an owner that joins them, and a way to be woken.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::{self, JoinHandle, Scope, ScopedJoinHandle};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// What a thread is for; gives it its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Drives a migration out of here.
    SourceMain,
    /// Drives a migration into here.
    DestinationMain,
    /// Reads the return path and sends the pages that a guest waits for.
    SourceUrgent,
    /// Sends the pages of a multifd channel.
    SourceSend(u8),
    /// Takes in the pages of a multifd channel.
    DestinationReceive(u8),
    /// Takes memory from the host ahead of the pages that come.
    DestinationPopulate,
    /// Asks for the pages that the guest touches; writes the return path.
    DestinationFault,
    /// Takes in the pages that were asked for.
    DestinationUrgent,
    /// Loads the devices, and runs the guest.
    DestinationLoad,
    /// Loads devices beside the thread that began to.
    DestinationLoader(u8),
    /// Looks who comes back when the link has broken.
    DestinationDoor,
    /// Copies a checkpoint to the guest, beside `dest/main`.
    DestinationFlush(u8),
    /// Makes huge pages of small ones that have all arrived.
    DestinationRestore,
    /// Touches pages in the place of a guest that is only kept.
    DestinationTouch,
    /// Writes RAM into the file of a guest that is only kept.
    DestinationWrite,
    /// Reads the file of a kept guest ahead of what is sent.
    SourceRead,
}

impl Role {
    /// 15 bytes at most, or the kernel cuts it.
    pub(crate) fn name(self) -> Cow<'static, str> {
        Cow::Borrowed(match self {
            Role::SourceMain => "source/main",
            Role::DestinationMain => "dest/main",
            Role::SourceUrgent => "source/urgent",
            Role::SourceSend(number) => return format!("source/send-{number}").into(),
            Role::DestinationReceive(number) => return format!("dest/recv-{number}").into(),
            Role::DestinationPopulate => "dest/populate",
            Role::DestinationFault => "dest/fault",
            Role::DestinationUrgent => "dest/urgent",
            Role::DestinationLoad => "dest/load",
            Role::DestinationLoader(number) => return format!("dest/load-{number}").into(),
            Role::DestinationDoor => "dest/door",
            Role::DestinationFlush(number) => return format!("dest/flush-{number}").into(),
            Role::DestinationRestore => "dest/restore",
            Role::DestinationTouch => "dest/touch",
            Role::DestinationWrite => "dest/write",
            Role::SourceRead => "source/read",
        })
    }
}

/// Ends every wait of one migration, or of a part of it. Cheap to clone; once set it stays set.
#[derive(Clone, Debug)]
pub(crate) struct Cancel {
    shared: Arc<Shared>,
    /// What ends the whole of which this is a part.
    whole: Option<Arc<Shared>>,
}

#[derive(Debug)]
struct Shared {
    set: AtomicBool,
    wake: OwnedFd,
}

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    /// The descriptor is ready.
    Ready,
    /// The time is over.
    TimedOut,
    /// The migration is cancelled.
    Cancelled,
}

impl Woken {
    /// Whether a descriptor is ready.
    pub(crate) fn is_ready(self) -> bool {
        self == Woken::Ready
    }
}

impl Cancel {
    pub(crate) fn new() -> io::Result<Cancel> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared { set: AtomicBool::new(false), wake });
        Ok(Cancel { shared, whole: None })
    }

    /// What ends a part of what `self` ends: set by itself, or with the whole.
    pub(crate) fn part(&self) -> io::Result<Cancel> {
        assert!(self.whole.is_none(), "parts have no parts");
        Ok(Cancel { whole: Some(self.shared.clone()), ..Cancel::new()? })
    }

    /// Another part of the same whole.
    pub(crate) fn beside(&self) -> io::Result<Cancel> {
        Ok(Cancel { whole: self.whole.clone(), ..Cancel::new()? })
    }

    /// Wakes whatever waits, now and later.
    pub(crate) fn set(&self) {
        self.shared.set.store(true, Ordering::SeqCst);
        // The counter is never read: the descriptor stays readable. A full counter is, too.
        let _ = rustix::io::write(&self.shared.wake, &1u64.to_ne_bytes());
    }

    pub(crate) fn is_set(&self) -> bool {
        let mut all = std::iter::once(&self.shared).chain(&self.whole);
        all.any(|shared| shared.set.load(Ordering::SeqCst))
    }

    /// Readable once it is set by itself.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.wake.as_fd()
    }

    /// Waits until `fd` is ready for `what`, for `timeout` at most.
    pub(crate) fn wait(
        &self,
        fd: BorrowedFd<'_>,
        what: PollFlags,
        timeout: Option<Duration>,
    ) -> io::Result<Woken> {
        self.poll([PollFd::from_borrowed_fd(fd, what)], timeout)
    }

    /// The same, also until `beside` is set: then the descriptor counts as ready.
    pub(crate) fn wait_or<'f>(
        &'f self,
        beside: &'f Cancel,
        fd: BorrowedFd<'f>,
        what: PollFlags,
        timeout: Option<Duration>,
    ) -> io::Result<Woken> {
        let beside = PollFd::from_borrowed_fd(beside.shared.wake.as_fd(), PollFlags::IN);
        self.poll([beside, PollFd::from_borrowed_fd(fd, what)], timeout)
    }

    /// Waits until one of `fds` can be read, for `timeout` at most.
    pub(crate) fn wait_any(&self, fds: &[BorrowedFd<'_>], timeout: Duration) -> io::Result<Woken> {
        let fds = fds.iter().map(|&fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        self.poll(fds, Some(timeout))
    }

    /// The same, also until the peer of one of `open` has closed its direction, however much of
    /// what it sent has still to be read.
    pub(crate) fn wait_any_or_close(
        &self,
        fds: &[BorrowedFd<'_>],
        open: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> io::Result<Woken> {
        let fds = fds.iter().map(|&fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let open = open.iter().map(|&fd| PollFd::from_borrowed_fd(fd, PollFlags::RDHUP));
        self.poll(fds.chain(open), Some(timeout))
    }

    /// Waits for `time`, or until cancelled.
    pub(crate) fn sleep(&self, time: Duration) -> io::Result<Woken> {
        self.poll([], Some(time))
    }

    /// Waits until one of `fds` is ready for what it says, for `timeout` at most.
    pub(crate) fn poll<'f>(
        &'f self,
        fds: impl IntoIterator<Item = PollFd<'f>>,
        timeout: Option<Duration>,
    ) -> io::Result<Woken> {
        let own = std::iter::once(&self.shared).chain(&self.whole);
        let own = own.map(|shared| PollFd::from_borrowed_fd(shared.wake.as_fd(), PollFlags::IN));
        let mut fds: Vec<PollFd<'f>> = own.chain(fds).collect();
        let timeout = timeout.map(|time| Timespec {
            tv_sec: time.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: time.subsec_nanos().into(),
        });
        loop {
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return Ok(Woken::TimedOut),
                Ok(_) if self.is_set() => return Ok(Woken::Cancelled),
                Ok(_) => return Ok(Woken::Ready),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// What a migration's peer is at the other end of, or will be.
pub(crate) trait Shut: fmt::Debug + Send + Sync {
    /// Ends every wait on it, at once, and has every later one fail.
    fn shut_down(&self);
}

/// Wakes one thread, again and again.
#[derive(Debug)]
pub(crate) struct Bell(OwnedFd);

impl Bell {
    pub(crate) fn new() -> io::Result<Bell> {
        Ok(Bell(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Wakes the thread that waits, or that waits next.
    pub(crate) fn ring(&self) {
        // A full counter is as readable as any.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// It has been heard: from here on it has to be rung again.
    pub(crate) fn heed(&self) {
        // Nobody else reads it; not rung is as good.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }

    /// Waits until it is rung, for `timeout` at most.
    pub(crate) fn wait(&self, cancel: &Cancel, timeout: Option<Duration>) -> io::Result<Woken> {
        let woken = cancel.wait(self.0.as_fd(), PollFlags::IN, timeout)?;
        if woken == Woken::Ready {
            self.heed();
        }
        Ok(woken)
    }
}

impl AsFd for Bell {
    /// Readable when it has been rung.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The connections of a migration as one thing that can be broken: on request (`migrate-pause`),
/// by the first thread that meets an error, or at the end of it all. And as sockets that can be shut
/// down under whoever waits on them (`yank`), which is as if the peer or the network had done it.
#[derive(Clone, Debug)]
pub(crate) struct Links {
    current: Arc<Mutex<Cancel>>,
    ended: Cancel,
    /// Broken on request: nothing goes on by itself.
    held: Arc<AtomicBool>,
    ends: Arc<Mutex<Vec<Weak<dyn Shut>>>>,
}

impl Links {
    pub(crate) fn new() -> io::Result<Links> {
        let current = Arc::new(Mutex::new(Cancel::new()?));
        let (held, ends) = (Arc::default(), Arc::default());
        Ok(Links { current, ended: Cancel::new()?, held, ends })
    }

    /// From now on, for as long as it is there, `end` is one of those to be shut down.
    pub(crate) fn join(&self, end: Weak<dyn Shut>) {
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        ends.retain(|other| other.strong_count() > 0);
        ends.push(end);
    }

    /// Shuts down every connection there is.
    pub(crate) fn shut_down(&self) {
        let ends: Vec<Arc<dyn Shut>> = {
            let ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
            ends.iter().filter_map(Weak::upgrade).collect()
        };
        // Without the lock: the kernel may have to wait for one that is just being used.
        ends.iter().for_each(|end| end.shut_down());
    }

    /// What ends the waits on the connections there are now.
    pub(crate) fn current(&self) -> Cancel {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Wakes whoever waits on them.
    pub(crate) fn break_now(&self) {
        self.current().set();
    }

    /// Breaks them, until somebody lets it go on (`migrate-pause`).
    pub(crate) fn hold(&self) {
        self.held.store(true, Ordering::SeqCst);
        self.break_now();
    }

    /// It may go on.
    pub(crate) fn let_go(&self) {
        self.held.store(false, Ordering::SeqCst);
    }

    /// Whether it was broken on request, and nobody has let it go on.
    pub(crate) fn are_held(&self) -> bool {
        self.held.load(Ordering::SeqCst)
    }

    /// There are other connections from now on: gives what ends the waits on them. What was broken
    /// before stays so.
    pub(crate) fn renew(&self) -> io::Result<Cancel> {
        let fresh = Cancel::new()?;
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = fresh.clone();
        if self.ended.is_set() {
            fresh.set(); // Whoever ended it may have broken those before.
        }
        Ok(fresh)
    }

    /// Ends the migration, also one that is paused.
    pub(crate) fn end(&self) {
        self.ended.set();
        self.break_now();
    }

    /// What is set at the end.
    pub(crate) fn ended(&self) -> &Cancel {
        &self.ended
    }

    /// Waits for the end.
    pub(crate) fn wait_for_end(&self) {
        // Without a descriptor to wait on there is nothing to be done but to end at once.
        let _ = self.ended.sleep(Duration::MAX);
    }
}

/// Runs `work` on a thread of its own inside `scope`, which joins it.
pub(crate) fn scoped<'s, T: Send + 's>(
    scope: &'s Scope<'s, '_>,
    role: Role,
    work: impl FnOnce() -> T + Send + 's,
) -> io::Result<ScopedJoinHandle<'s, T>> {
    thread::Builder::new().name(role.name().into_owned()).spawn_scoped(scope, work)
}

/// A running thread. Dropping it wakes it and waits for its end.
#[derive(Debug)]
pub(crate) struct Worker {
    handle: Option<JoinHandle<()>>,
    cancel: Cancel,
}

impl Worker {
    /// Starts `work` on a thread of its own; it must end soon after `cancel` is set.
    pub(crate) fn start(
        role: Role,
        cancel: Cancel,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<Worker> {
        let handle = thread::Builder::new().name(role.name().into_owned()).spawn(work)?;
        Ok(Worker { handle: Some(handle), cancel })
    }

    /// Waits for its end without waking it.
    pub(crate) fn join(mut self) {
        self.wait();
    }

    fn wait(&mut self) {
        if let Some(handle) = self.handle.take()
            // A subscriber on this very thread may have been the last to hold it.
            && handle.thread().id() != thread::current().id()
            && handle.join().is_err()
        {
            // The panic's message is out already, and `EndsFailed` has told of its outcome.
            self.cancel.set();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.cancel.set();
        self.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_into_the_kernels_15_bytes() {
        for role in [
            Role::SourceMain,
            Role::SourceUrgent,
            Role::SourceSend(255),
            Role::DestinationReceive(255),
            Role::DestinationMain,
            Role::DestinationPopulate,
            Role::DestinationFault,
            Role::DestinationUrgent,
            Role::DestinationLoad,
            Role::DestinationLoader(255),
            Role::DestinationDoor,
            Role::DestinationFlush(255),
            Role::DestinationRestore,
            Role::DestinationTouch,
            Role::DestinationWrite,
            Role::SourceRead,
        ] {
            assert!(role.name().len() <= 15);
        }
    }

    #[test]
    fn dropping_a_worker_wakes_it_and_joins_it() {
        let cancel = Cancel::new().unwrap();
        let inner = cancel.clone();
        let ended = Arc::new(AtomicBool::new(false));
        let flag = ended.clone();
        let worker = Worker::start(Role::SourceMain, cancel, move || {
            assert_eq!(inner.sleep(Duration::from_secs(3600)).unwrap(), Woken::Cancelled);
            flag.store(true, Ordering::SeqCst);
        });
        drop(worker.unwrap());
        assert!(ended.load(Ordering::SeqCst));
    }
}
