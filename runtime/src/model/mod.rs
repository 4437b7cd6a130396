//! The model family: towers, projectors, gate and decoder, written once over [`candor_kernels::Device`].

pub mod language_model;

pub use language_model::{DecodeError, LanguageModel};
