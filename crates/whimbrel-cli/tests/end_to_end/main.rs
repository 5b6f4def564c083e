//! The command, from outside: processes, QMP, exit statuses and what they leave behind.

mod bad_input;
mod broken_link;
mod by_hand;
mod cancel;
mod colo;
mod colo_network;
mod demo;
mod kept;
mod kept_in_parallel;
mod postcopy;
mod process;
mod qmp;
mod recovery;
mod rescue;
mod security;
mod stalled;
mod stream;
