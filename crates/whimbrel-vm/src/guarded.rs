//! Reads of guest memory that end: when the thread is kicked while it waits for a page that is
//! missing, and when it meets one that is lost.
//!
//! Both come as a signal. Its handler looks whether the thread is at the one instruction of a read
//! that touches guest memory, and if so sends it to the read's end with the reason. At any other
//! place a kick does nothing, and a page that is lost is what it is to everybody else (SIGBUS).
#![expect(unsafe_code, reason = "changes where a thread goes on after a signal")]

use std::arch::global_asm;
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::SIGRTMIN;
use whimbrel_ram::RamBlock;

/// Why a read of guest memory has ended before it was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The thread was kicked while the page was missing.
    Kicked,
    /// The page is lost for ever.
    Lost,
}

const KICKED: u64 = 1;
const LOST: u64 = 2;

global_asm!(
    ".pushsection .text.whimbrel_guarded, \"ax\"",
    ".balign 16",
    ".global whimbrel_guarded_copy",
    ".global whimbrel_guarded_copying",
    ".global whimbrel_guarded_load",
    ".global whimbrel_guarded_loading",
    ".global whimbrel_guarded_ended",
    // (to, from, length): 0, or why it ended.
    "whimbrel_guarded_copy:",
    "    mov    rcx, rdx",
    "whimbrel_guarded_copying:",
    "    rep movsb",
    "    xor    eax, eax",
    "    ret",
    // (to, from): 0, or why it ended.
    "whimbrel_guarded_load:",
    "whimbrel_guarded_loading:",
    "    mov    rdx, [rsi]",
    "    mov    [rdi], rdx",
    "    xor    eax, eax",
    "whimbrel_guarded_ended:",
    "    ret",
    ".popsection",
);

unsafe extern "C" {
    fn whimbrel_guarded_copy(to: *mut u8, from: *const u8, len: usize) -> u64;
    fn whimbrel_guarded_load(to: *mut u64, from: *const u8) -> u64;
    // Labels, of which only the addresses count.
    fn whimbrel_guarded_copying();
    fn whimbrel_guarded_loading();
    fn whimbrel_guarded_ended();
}

thread_local! {
    /// Where the guest that this thread runs on KVM met a page that is lost: its address in this
    /// process. `None` on threads that run none.
    static MET: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Copies from `block` at `offset` into `out`.
///
/// # Panics
/// When that is outside the block, as the layout never is.
pub(crate) fn read(block: &RamBlock, offset: u64, out: &mut [u8]) -> Result<(), Ended> {
    let from = block.range(offset, out.len()).expect("inside the memory, as laid out");
    // SAFETY: `range` checked the source, which is mapped as long as the block; `out` is ours alone.
    // A racing store of the guest's tears bytes, no more.
    ended(unsafe { whimbrel_guarded_copy(out.as_mut_ptr(), from.as_ptr(), out.len()) })
}

/// One 64-bit load from `block` at `offset`, a multiple of 8.
///
/// # Panics
/// As [`read`].
pub(crate) fn load(block: &RamBlock, offset: u64) -> Result<u64, Ended> {
    assert!(offset.is_multiple_of(8), "an aligned access");
    let from = block.range(offset, 8).expect("inside the memory, as laid out");
    let mut value = 0;
    // SAFETY: as in `read`.
    ended(unsafe { whimbrel_guarded_load(&raw mut value, from.as_ptr()) })?;
    Ok(value)
}

fn ended(reason: u64) -> Result<(), Ended> {
    match reason {
        0 => Ok(()),
        KICKED => Err(Ended::Kicked),
        _ => Err(Ended::Lost),
    }
}

/// What handled SIGBUS before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Has signals handled: kicks, and the touch of pages that are lost. Once is enough.
pub(crate) fn install() {
    BEFORE.get_or_init(|| {
        handle(signal(), kicked);
        handle(libc::SIGBUS, lost)
    });
}

/// The signal that ends a run.
pub(crate) fn signal() -> c_int {
    SIGRTMIN() + 1
}

/// From here on the thread runs a guest on KVM, and [`met`] tells of lost pages.
pub(crate) fn runs_guest() {
    MET.set(Some(0));
}

/// The address of the lost page that the guest of this thread has met since it was last asked.
pub(crate) fn met() -> Option<usize> {
    let met = MET.get().filter(|&address| address != 0)?;
    MET.set(Some(0));
    Some(met)
}

type Handler = extern "C" fn(c_int, *mut siginfo_t, *mut c_void);

/// Sets a handler; gives what was there.
fn handle(signal: c_int, handler: Handler) -> libc::sigaction {
    // SAFETY: plain data, of which zero is a valid value.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    let mut before = action;
    // SAFETY: both are valid for the call; the handler does only what a handler may.
    let result = unsafe { libc::sigaction(signal, &raw const action, &raw mut before) };
    assert_eq!(result, 0, "signal {signal} can be handled");
    before
}

extern "C" fn kicked(_: c_int, _: *mut siginfo_t, context: *mut c_void) {
    end_read(context, KICKED);
}

extern "C" fn lost(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    if end_read(context, LOST) {
        return;
    }
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid one.
    let info = unsafe { &*info };
    if info.si_code == libc::BUS_MCEERR_AR && MET.get().is_some() {
        // SAFETY: a SIGBUS has an address.
        let address = unsafe { info.si_addr() };
        MET.set(Some(address.addr()));
        return;
    }
    // Not ours: what was there before handles it, when the thread touches the page again.
    // SAFETY: plain data, of which zero is a valid value.
    let usual: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    let before = BEFORE.get().unwrap_or(&usual);
    // SAFETY: valid for the call; it was in force before.
    unsafe { libc::sigaction(signal, ptr::from_ref(before), ptr::null_mut()) };
}

/// Ends the guarded read that the thread is in; false when it is in none.
fn end_read(context: *mut c_void, reason: u64) -> bool {
    let context = context.cast::<libc::ucontext_t>();
    const RIP: usize = libc::REG_RIP as usize;
    const RAX: usize = libc::REG_RAX as usize;
    // SAFETY: the kernel gives a handler with SA_SIGINFO its thread's registers, to read and change.
    let registers = unsafe { &mut (*context).uc_mcontext.gregs };
    let at = registers[RIP].cast_unsigned();
    let reads = [whimbrel_guarded_copying as *const (), whimbrel_guarded_loading as *const ()];
    if !reads.iter().any(|read| read.addr() as u64 == at) {
        return false;
    }
    // The function's end: its registers are the caller's to lose, and its stack is as it was.
    registers[RIP] = ((whimbrel_guarded_ended as *const ()).addr() as u64).cast_signed();
    registers[RAX] = reason.cast_signed();
    true
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use whimbrel_ram::{AbsentRam, BlockIndex, GuestRam, Received, Split, TargetPage};

    use super::*;

    #[test]
    fn what_is_there_is_read() {
        let block = RamBlock::anonymous("ram", 0, 8192).unwrap();
        block.write(4090, b"whimbrel").unwrap();
        let mut out = [0; 8];
        assert_eq!(read(&block, 4090, &mut out), Ok(()));
        assert_eq!(&out, b"whimbrel");
        block.store_u64(8, 7).unwrap();
        assert_eq!(load(&block, 8), Ok(7));
    }

    #[test]
    fn a_page_that_is_lost_ends_a_read() {
        install();
        let ram = GuestRam::new(vec![RamBlock::anonymous("ram", 0, 8192).unwrap()]);
        let (ram_block, index) = (ram.block(BlockIndex(0)), BlockIndex(0));
        ram_block.write(0, &[5; 8192]).unwrap();
        let received = Arc::new(Received::new(&ram));
        received.set(index, TargetPage(0));
        let watched = AbsentRam::watch(&ram, received, Split::Whole);
        let absent = match watched {
            Ok(absent) => absent,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        if let Err(error) = absent.poison(index, 4096, 4096) {
            return eprintln!("skipped: {error}");
        }
        assert_eq!(load(ram_block, 4096), Err(Ended::Lost));
        let mut out = [0; 8192];
        assert_eq!(read(ram_block, 0, &mut out), Err(Ended::Lost));
        assert_eq!(out[..4096], [5; 4096], "up to there it is whole");
        assert_eq!(load(ram_block, 4088), Ok(0x0505_0505_0505_0505));
    }
}
