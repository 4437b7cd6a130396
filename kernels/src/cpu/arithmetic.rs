//! What this machine's arithmetic gives: the roof that the speed of large products is measured against.

use crate::cpu::pool::ThreadPool;
use crate::cpu::simd::{Level, Operation, Simd};
use std::hint::black_box;
use std::time::Instant;

/// Passes; the median of their speeds counts.
const PASSES: usize = 7;
/// Sums side by side: more than the latency of a multiply-add times the units that do them.
const CHAINS: usize = 10;
/// Multiply-adds of each chain in a task.
const STEPS: usize = 1 << 18;
/// Tasks for each thread, so that one that is slower for a moment does less.
const TASKS: usize = 4;

/// Speed in GFLOP/s (10⁹ additions and multiplications) at which the pool's threads together multiply and add f32 in
/// registers, with the instructions that the kernels use.
pub fn measure_arithmetic(pool: &ThreadPool) -> f64 {
    let level = Level::chosen();
    let tasks = TASKS * pool.threads();
    let mut speeds: [f64; PASSES] = std::array::from_fn(|_| {
        let (start, lanes) = (Instant::now(), level.run(Lanes));
        pool.run(tasks, |_| {
            black_box(level.run(MultiplyAdd(black_box(0.5))));
        });
        let operations = (2 * tasks * STEPS * CHAINS * lanes) as f64;
        operations / start.elapsed().as_secs_f64().max(1e-9) / 1e9
    });
    speeds.sort_by(f64::total_cmp);
    speeds[PASSES / 2]
}

struct Lanes;

impl Operation for Lanes {
    type Output = usize;
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) -> usize {
        S::LANES
    }
}

struct MultiplyAdd(f32);

impl Operation for MultiplyAdd {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        // x ← x / 2 + 1/2 stays near 1.
        let half = simd.splat(self.0);
        let mut sums = [half; CHAINS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = simd.mul_add(*sum, half, half);
            }
        }
        sums.into_iter().map(|sum| simd.sum(sum)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_is_a_speed() {
        let speed = measure_arithmetic(&ThreadPool::new(Some(1)));
        // What an emulated processor on a busy machine gives, and some less.
        assert!(speed.is_finite() && speed > 0.001, "{speed} GFLOP/s");
    }
}
