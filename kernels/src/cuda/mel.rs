//! Log-mel features on Whisper's scale.

use std::sync::PoisonError;

use super::arena::Memory;
use super::launch::{Argument, Grid, launch};
use super::layers::grown;
use super::{CudaDevice, address};
use crate::device::Result;

/// Blocks that look for the largest value: enough to read at full speed.
const BLOCKS: usize = 128;
/// Threads of a block of cuda/mel.cu.
const THREADS: u32 = 256;

/// The largest value that each block saw.
pub(super) type Parts = Option<Memory<f32>>;

/// [`crate::Device::log_mel`] of the `len` values at `x`.
pub(super) fn log_mel(device: &CudaDevice, x: u64, len: usize) -> Result<()> {
    const OP: &str = "log_mel";
    let _sequence = device.sequence();
    let mut kept = device.inner.mel.lock().unwrap_or_else(PoisonError::into_inner);
    let parts = address(grown(device, &mut kept, Some(BLOCKS))?, 0);
    let blocks = len.div_ceil(THREADS as usize).min(BLOCKS);
    run!(device, OP, log_mel_most, Grid::blocks([blocks, 1, 1], THREADS), x, len, parts)?;
    run!(device, OP, log_mel, Grid::each(len), x, len, parts, blocks as i32)
}
