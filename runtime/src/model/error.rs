use candor_kernels::DeviceError;

use super::{AdapterError, ConfigError, DecodeError};
use crate::weights::WeightsError;

/// Why a model could not be opened or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The configuration is at fault.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights are at fault.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The adapter is at fault, or belongs to another model.
    #[error(transparent)]
    Adapter(Box<AdapterError>),
    /// The device did not take a weight.
    #[error("{tensor}: {source}")]
    Upload {
        /// The tensor.
        tensor: String,
        /// Why.
        source: DeviceError,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The decoder could not go on.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// What was given to the model does not fit it.
    #[error("{what}: {reason}")]
    Input {
        /// Which input.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A buffer's size cannot be computed without overflow.
    #[error(
        "a buffer of {0:?} elements is too large to address; the sizes in config.json are far from any real model's"
    )]
    Overflow(Vec<usize>),
}

impl ModelError {
    pub(super) fn input(what: &'static str, reason: impl Into<String>) -> Self {
        ModelError::Input { what, reason: reason.into() }
    }
}
