//! Whimbrel held against stock QEMUs.
//!
//! What lives here: fetching the QEMUs of the distribution without installing them
//! ([`install`]), running them ([`qemu`], driven over [`qmp`]), and guests that check themselves
//! and say so on their serial port ([`guest`], read through [`console`]), their memory from outside
//! ([`memory`]), and the ways of a guest
//! from one QEMU through whimbrel into another ([`journey`], and on several channels [`multifd`]). The tests are under
//! `tests/`; they are `#[ignore]`d because they need the QEMUs, and `cargo xtask peers` fetches
//! those and runs them.

#![forbid(unsafe_code)]

pub mod apt;
pub mod console;
pub mod guest;
pub mod install;
pub mod journey;
pub mod memory;
pub mod multifd;
pub mod qemu;
pub mod qmp;
pub mod wait;
pub mod whimbrel;

/// Makes each of these functions of a [`Peer`](install::Peer) a test per peer, in a module named
/// after it, by which `cargo xtask peers` chooses.
#[macro_export]
macro_rules! on_each_peer {
    ($($test:ident),+ $(,)?) => {
        $crate::on_each_peer!(@one v7_2 V7_2 $($test)+);
        $crate::on_each_peer!(@one v10_0 V10_0 $($test)+);
        $crate::on_each_peer!(@one given Given $($test)+);
    };
    (@one $module:ident $peer:ident $($test:ident)+) => {
        mod $module {
            $(
                #[test]
                #[ignore = "needs stock QEMUs: cargo xtask peers"]
                fn $test() -> anyhow::Result<()> {
                    super::$test($crate::install::Peer::$peer)
                }
            )+
        }
    };
}
