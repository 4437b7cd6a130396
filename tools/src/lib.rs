//! Workstation tools of Candor: data sets, fine-tuning, conversion and evaluation.
#![forbid(unsafe_code)]

pub mod data;
pub mod files;
pub mod quantise;
pub mod train;
