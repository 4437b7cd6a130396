//! The model family: towers, projectors, gate and decoder, written once over [`candor_kernels::Device`].
//!
//! [`Model::open`] builds everything from a folder. Pixels go through [`vision`] and [`projector`] (mixed by the
//! [`gate`]) to video tokens, sound through [`mel`] and [`audio`] to audio tokens, and both with the prompt's text into a
//! [`decoder`] session that generation drives as a [`LanguageModel`]. [`Classifier`] is the verifier's network.

pub mod adapter;
pub mod audio;
pub mod batch;
pub mod bert;
mod checkpoint;
pub mod classifier;
pub mod config;
pub mod decoder;
mod encoder;
mod error;
pub mod gate;
mod head;
mod held;
mod kept;
pub mod language_model;
mod layers;
pub mod mel;
#[allow(clippy::module_inception)] // the model itself, beside its parts
mod model;
pub mod projector;
mod rows;
pub mod trace;
pub mod vision;

pub use adapter::{Adapter, AdapterError};
pub use batch::Batch;
pub use classifier::Classifier;
pub use config::{ConfigError, ModelConfig};
pub use decoder::{Piece, Reading, Session};
pub use error::ModelError;
pub use language_model::{DecodeError, LanguageModel};
pub use model::{Counts, Model};
pub use rows::Rows;
