//! Puts the stages together: a window in, an observation out.

pub mod policy;

pub use policy::{Policy, PolicyError};
