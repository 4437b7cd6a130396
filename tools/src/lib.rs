//! Workstation tools of Candor: data sets, fine-tuning, conversion and evaluation.
#![forbid(unsafe_code)]

pub mod data;
pub mod eval;
pub mod eval_verifier;
pub mod files;
pub mod quantise;
pub mod train;
pub mod workers;
