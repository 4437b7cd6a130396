//! Workstation tools of Candor: data sets, fine-tuning, conversion and evaluation.
#![forbid(unsafe_code)]
#![allow(clippy::result_large_err)] // candle's errors are large, and none is on a hot path

pub mod data;
pub mod dataset;
pub mod eval;
pub mod eval_verifier;
pub mod files;
pub mod folder;
pub mod http;
pub mod judge;
pub mod merge;
pub mod quantize;
pub mod rate;
pub mod reward;
pub mod sentences;
pub mod synthesize;
pub mod tensor_file;
pub mod train;
pub mod workers;
