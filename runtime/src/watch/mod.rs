//! Puts the stages together: a window in, an observation out.

pub mod anywhere;
mod frames;
pub mod plan;
pub mod policy;
pub mod report;
pub mod reuse;
pub mod watcher;

pub use anywhere::{AnyWatcher, AnyWatcherError, Order};
pub use plan::{GpuMemory, Pictures, Plan, PlanError};
pub use policy::{Policy, PolicyError};
pub use report::{Report, ReportError};
pub use reuse::{ParseReuseError, Reuse, Work};
pub use watcher::{WatchError, WatchSettings, Watcher};
