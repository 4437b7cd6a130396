//! Candor's arithmetic: every operation of the model family, once per device.
//!
//! [`Device`] is the list of operations; [`cpu`] implements it on the CPU, [`cuda`] on NVIDIA's
//! GPUs. Nothing here knows of models.
#![deny(clippy::undocumented_unsafe_blocks)]

mod check;
pub mod choice;
pub mod cpu;
pub mod cuda;
pub mod device;
pub mod pixels;
pub mod scales;
pub mod tensor;

pub use choice::{Allowed, AllowedIds, Choice, ChoiceError};
pub use device::{
    Activation, AttentionShape, CacheType, DecoderBuffers, DecoderLayer, Device, DeviceError, Rounding, Unfold,
};
pub use scales::Scales;
pub use tensor::{DType, HostTensor};
