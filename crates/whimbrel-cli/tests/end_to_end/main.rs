//! The command, from outside: processes, QMP, exit statuses and what they leave behind.

mod bad_input;
mod cancel;
mod demo;
mod kept;
mod kept_in_parallel;
mod postcopy;
mod process;
mod qmp;
mod recovery;
mod security;
mod stalled;
mod stream;
