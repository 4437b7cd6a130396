//! CUDA.

mod compile;
pub mod images;

pub use compile::CompileError;
