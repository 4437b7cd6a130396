//! What the GPU gives: the roofs that the speed of everything else is measured against.

use std::time::Instant;

use super::arena::Memory;
use super::driver::failed;
use super::launch::{Argument, Grid, launch};
use super::{CudaDevice, address, zeros};
use crate::device::{Device, Result};

/// Passes; the median of their speeds counts.
const PASSES: usize = 7;
/// Blocks of 256 threads: several for each multiprocessor of the largest GPU.
const BLOCKS: usize = 2048;

impl CudaDevice {
    /// Speed in GB/s (10⁹ bytes) at which a buffer of `bytes` bytes is read, which should be several times larger than
    /// the caches. [`crate::DeviceError::GpuOutOfMemory`] where there is no room for it.
    pub fn measure_read_bandwidth(&self, bytes: usize) -> Result<f64> {
        let data: Memory<u8> = zeros(self, "roof", Some(bytes))?;
        let out: Memory<u32> = zeros(self, "roof", Some(256 * BLOCKS))?;
        let (data, count, out) = (address(&data, 0), bytes / 16, address(&out, 0));
        let grid = Grid::blocks([BLOCKS, 1, 1], 256);
        let seconds = self.median(|| run!(self, "roof", read_all, grid, data, count, out))?;
        Ok(bytes as f64 / seconds / 1e9)
    }

    /// Billions of multiplications and additions of f32 a second.
    pub fn measure_arithmetic(&self) -> Result<f64> {
        const ROUNDS: i32 = 1024;
        let out: Memory<f32> = zeros(self, "roof", Some(256 * BLOCKS))?;
        let (factor, out) = (0.5f32, address(&out, 0));
        let grid = Grid::blocks([BLOCKS, 1, 1], 256);
        let seconds = self.median(|| run!(self, "roof", multiply_all, grid, ROUNDS, factor, out))?;
        Ok(2.0 * 16.0 * f64::from(ROUNDS) * (256 * BLOCKS) as f64 / seconds / 1e9)
    }

    /// The median of the seconds that a launch takes.
    fn median(&self, launch: impl Fn() -> Result<()>) -> Result<f64> {
        let once = || {
            self.wait()?;
            let start = Instant::now();
            launch()?;
            self.wait()?;
            Ok(start.elapsed().as_secs_f64().max(1e-9))
        };
        once()?;
        let mut seconds = (0..PASSES).map(|_| once()).collect::<Result<Vec<f64>>>()?;
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[PASSES / 2])
    }

    /// Whether the GPU's memory is the processor's.
    pub fn is_integrated(&self) -> bool {
        self.inner.gpu.integrated
    }

    /// Bytes of the GPU's memory that nobody uses, and all of them.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.inner.gpu.context.mem_get_info().map_err(failed("memory", 0))
    }
}
