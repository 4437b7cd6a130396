//! Puts the stages together: a window in, an observation out.

pub mod policy;
pub mod report;
pub mod watcher;

pub use policy::{Policy, PolicyError};
pub use report::{Report, ReportError};
pub use watcher::{WatchError, WatchSettings, Watcher};
