//! Operations over whole rows: layer norm, RMS norm, softmax.

use crate::cpu::elementwise::chunk_rows;
use crate::cpu::math;
use crate::cpu::pool::ThreadPool;
use crate::cpu::simd::{Level, Operation, Simd};

/// Layer norm of rows as wide as `weight`.
pub(crate) fn layer_norm(
    level: Level,
    pool: &ThreadPool,
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    by_rows(pool, x, weight.len(), out, |x, out| level.run(LayerNorm { x, weight, bias, eps, out }));
}

/// RMS norm of rows as wide as `weight`.
pub(crate) fn rms_norm(level: Level, pool: &ThreadPool, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    by_rows(pool, x, weight.len(), out, |x, out| level.run(RmsNorm { x, weight, eps, out }));
}

/// Softmax of rows of `width`.
pub(crate) fn softmax(level: Level, pool: &ThreadPool, x: &[f32], width: usize, out: &mut [f32]) {
    by_rows(pool, x, width, out, |x, out| {
        out.copy_from_slice(x);
        softmax_in_place(level, out, 1.0);
    });
}

/// `row = softmax(factor · row)`; the row is not empty.
pub(crate) fn softmax_in_place(level: Level, row: &mut [f32], factor: f32) {
    level.run(Softmax { row, factor });
}

fn by_rows(pool: &ThreadPool, x: &[f32], width: usize, out: &mut [f32], operation: impl Fn(&[f32], &mut [f32]) + Sync) {
    if out.is_empty() {
        return;
    }
    let rows = chunk_rows(pool, out.len() / width, width);
    pool.run_chunks(out, rows * width, |index, piece| {
        let x = &x[index * rows * width..];
        x.chunks_exact(width).zip(piece.chunks_exact_mut(width)).for_each(|(x, out)| operation(x, out));
    });
}

/// Σ (x - shift)² with `square`, else Σ (x - shift).
#[inline(always)]
fn sum<S: Simd>(simd: S, x: &[f32], shift: f32, square: bool) -> f32 {
    // Four sums hide the latency of the additions.
    let shifts = simd.splat(shift);
    let one = simd.splat(1.0);
    let mut sums = [simd.splat(0.0); 4];
    let blocks = x.chunks_exact(4 * S::LANES);
    let rest = blocks.remainder();
    for block in blocks {
        for i in 0..4 {
            let d = simd.sub(simd.load(&block[i * S::LANES..]), shifts);
            sums[i] = simd.mul_add(d, if square { d } else { one }, sums[i]);
        }
    }
    let pieces = rest.chunks_exact(S::LANES);
    let tail = pieces.remainder();
    for piece in pieces {
        let d = simd.sub(simd.load(piece), shifts);
        sums[0] = simd.mul_add(d, if square { d } else { one }, sums[0]);
    }
    let total = simd.sum(simd.add(simd.add(sums[0], sums[1]), simd.add(sums[2], sums[3])));
    total + tail.iter().map(|x| if square { (x - shift) * (x - shift) } else { x - shift }).sum::<f32>()
}

struct LayerNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Operation for LayerNorm<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.x.len() as f32;
        let mean = sum(simd, self.x, 0.0, false) / width;
        let variance = sum(simd, self.x, mean, true) / width;
        let factor = 1.0 / (variance + self.eps).sqrt();
        let parameters = self.weight.iter().zip(self.bias);
        for ((out, x), (weight, bias)) in self.out.iter_mut().zip(self.x).zip(parameters) {
            *out = (x - mean) * factor * weight + bias;
        }
    }
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Operation for RmsNorm<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let factor = 1.0 / (sum(simd, self.x, 0.0, true) / self.x.len() as f32 + self.eps).sqrt();
        for ((out, x), weight) in self.out.iter_mut().zip(self.x).zip(self.weight) {
            *out = x * factor * weight;
        }
    }
}

struct Softmax<'a> {
    row: &'a mut [f32],
    factor: f32,
}

impl Operation for Softmax<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let factor = simd.splat(self.factor);
        let whole = self.row.len() / S::LANES * S::LANES;
        let (body, tail) = self.row.split_at_mut(whole);
        // Scaled first, so that the maximum is the right one for any sign of the factor.
        let mut largest = simd.splat(f32::NEG_INFINITY);
        for piece in body.chunks_exact_mut(S::LANES) {
            let scaled = simd.mul(simd.load(piece), factor);
            simd.store(scaled, piece);
            largest = simd.max(scaled, largest);
        }
        for value in tail.iter_mut() {
            *value *= self.factor;
        }
        largest = simd.max(simd.load_part(tail, f32::NEG_INFINITY), largest);
        let largest = simd.splat(simd.largest(largest));

        let mut sums = simd.splat(0.0);
        for piece in body.chunks_exact_mut(S::LANES) {
            let e = math::exp(simd, simd.sub(simd.load(piece), largest));
            simd.store(e, piece);
            sums = simd.add(sums, e);
        }
        if !tail.is_empty() {
            let e = math::exp(simd, simd.sub(simd.load_part(tail, f32::NEG_INFINITY), largest));
            simd.store_part(e, tail);
            sums = simd.add(sums, e);
        }
        let factor = 1.0 / simd.sum(sums);
        self.row.iter_mut().for_each(|value| *value *= factor);
    }
}
