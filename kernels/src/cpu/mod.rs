//! The CPU device.

pub mod gemm;
pub mod pool;
mod simd;
