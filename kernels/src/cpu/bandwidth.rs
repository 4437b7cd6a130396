//! What this machine's memory gives: the roof that decoding speed is measured against.

use crate::cpu::pool::ThreadPool;
use crate::cpu::simd::{Level, Operation, Simd, fetch_ahead};
use std::hint::black_box;
use std::time::Instant;

/// Passes over the buffer; the median of their speeds counts.
const PASSES: usize = 7;
/// f32 a task reads: large against the cost of claiming it, small against the buffer.
const TASK: usize = 256 * 1024;

/// Speed in GB/s (10⁹ bytes) at which the pool's threads together read a buffer of `bytes` bytes, which should be
/// several times larger than the caches.
pub fn measure_read_bandwidth(pool: &ThreadPool, bytes: usize) -> f64 {
    let level = Level::chosen();
    // At least one element, and each page written, so that it is memory of its own.
    let mut buffer = vec![0.0f32; (bytes / size_of::<f32>()).max(1)];
    pool.run_chunks(&mut buffer, TASK, |_, piece| piece.fill(1.0));
    let mut speeds: [f64; PASSES] = std::array::from_fn(|_| {
        let start = Instant::now();
        pool.run(buffer.len().div_ceil(TASK), |task| {
            let first = task * TASK;
            black_box(level.run(Sum(&buffer[first..buffer.len().min(first + TASK)])));
        });
        let bytes = (buffer.len() * size_of::<f32>()) as f64;
        bytes / start.elapsed().as_secs_f64().max(1e-9) / 1e9
    });
    speeds.sort_by(f64::total_cmp);
    speeds[PASSES / 2]
}

struct Sum<'a>(&'a [f32]);

impl Operation for Sum<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let mut sums = [simd.splat(0.0); 8];
        for block in self.0.chunks_exact(8 * S::LANES) {
            for i in 0..8 {
                let at = &block[i * S::LANES..];
                fetch_ahead(at);
                sums[i] = simd.add(sums[i], simd.load(at));
            }
        }
        sums.into_iter().map(|sum| simd.sum(sum)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidth_is_a_speed() {
        let speed = measure_read_bandwidth(&ThreadPool::new(Some(2)), 4 << 20);
        assert!(speed.is_finite() && speed > 0.0);
        assert!(measure_read_bandwidth(&ThreadPool::new(Some(1)), 0) > 0.0);
    }
}
