//! What to do next, decided without doing it: plain types that are given time and facts and
//! return an action, so that every decision is tested without a thread or a clock.
//!
//! Time is a [`Duration`](std::time::Duration) since the migration began.

mod ahead;
mod downtime;
mod effort;
mod pace;
mod rate;
mod retry;
mod share;
mod throttle;
mod window;

pub(crate) use ahead::Ahead;
pub(crate) use downtime::{Convergence, Next};
pub(crate) use effort::{Effort, Gone};
pub(crate) use pace::Pace;
pub(crate) use rate::Rate;
pub(crate) use retry::Retry;
pub(crate) use share::Share;
pub(crate) use throttle::Throttle;
pub(crate) use window::{Outflow, Window};
