//! Puts the stages together: a window in, an observation out.

pub mod report;

pub use report::{Report, ReportError};
