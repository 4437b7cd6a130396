//! Operations on elements, and the bias and activation behind a product.

use crate::cpu::CpuBuffer;
use crate::cpu::math;
use crate::cpu::pool::ThreadPool;
use crate::cpu::simd::{Level, Operation, Simd};
use crate::device::Activation;

/// Elements a task handles at least: fewer are not worth waking a thread.
pub(crate) const GRAIN: usize = 16 * 1024;

/// Elements a task of a pass over `len` elements takes.
pub(crate) fn chunk(pool: &ThreadPool, len: usize) -> usize {
    len.div_ceil(4 * pool.threads()).max(GRAIN)
}

/// Rows a task of a pass over rows of `width` elements takes.
pub(crate) fn chunk_rows(pool: &ThreadPool, rows: usize, width: usize) -> usize {
    rows.div_ceil(4 * pool.threads()).max(GRAIN / width.max(1)).max(1)
}

/// `x = activation(x)`.
pub(crate) fn activate(level: Level, pool: &ThreadPool, activation: Activation, x: &mut [f32]) {
    if activation == Activation::Identity {
        return;
    }
    let chunk = chunk(pool, x.len());
    pool.run_chunks(x, chunk, |_, piece| level.run(Finish { row: piece, bias: None, activation }));
}

/// What a linear layer does to a piece of a row of its product: `row = activation(row + bias)`.
pub(crate) struct Finish<'a> {
    pub(crate) row: &'a mut [f32],
    /// As long as `row`.
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) activation: Activation,
}

impl Operation for Finish<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if let Some(bias) = self.bias {
            self.row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
        }
        if self.activation == Activation::Identity {
            return;
        }
        let mut pieces = self.row.chunks_exact_mut(S::LANES);
        for piece in &mut pieces {
            simd.store(math::activate(simd, self.activation, simd.load(piece)), piece);
        }
        let rest = pieces.into_remainder();
        if !rest.is_empty() {
            let vector = simd.load_part(rest, 0.0);
            simd.store_part(math::activate(simd, self.activation, vector), rest);
        }
    }
}

/// Loops that the compiler vectorises by itself for each instruction set.
enum Plain<'a> {
    Add(&'a mut [f32], &'a [f32]),
    Multiply(&'a mut [f32], &'a [f32]),
    /// `x += factor · y`
    AddScaled(&'a mut [f32], &'a [f32], f32),
}

impl Operation for Plain<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        match self {
            Plain::Add(x, y) => x.iter_mut().zip(y).for_each(|(x, y)| *x += y),
            Plain::Multiply(x, y) => x.iter_mut().zip(y).for_each(|(x, y)| *x *= y),
            Plain::AddScaled(x, y, factor) => x.iter_mut().zip(y).for_each(|(x, y)| *x += factor * y),
        }
    }
}

/// `x += y`, of equal lengths.
pub(crate) fn add(level: Level, pool: &ThreadPool, x: &mut [f32], y: &[f32]) {
    let chunk = chunk(pool, x.len());
    pool.run_chunks(x, chunk, |index, piece| level.run(Plain::Add(piece, &y[index * chunk..])));
}

/// `x *= y`, of equal lengths.
pub(crate) fn multiply(level: Level, pool: &ThreadPool, x: &mut [f32], y: &[f32]) {
    let chunk = chunk(pool, x.len());
    pool.run_chunks(x, chunk, |index, piece| level.run(Plain::Multiply(piece, &y[index * chunk..])));
}

/// `out = Σ weights[j] · parts[j]`, parts at least as long as `out`.
pub(crate) fn weighted_sum(level: Level, pool: &ThreadPool, parts: &[&CpuBuffer], weights: &[f32], out: &mut [f32]) {
    let chunk = chunk(pool, out.len());
    pool.run_chunks(out, chunk, |index, piece| {
        piece.fill(0.0);
        for (part, &weight) in parts.iter().zip(weights) {
            level.run(Plain::AddScaled(piece, &part.0[index * chunk..], weight));
        }
    });
}

/// `x[g, r, :] *= factor[g, :]` for x `[groups, per_group, width]`.
pub(crate) fn scale_groups(
    level: Level,
    pool: &ThreadPool,
    x: &mut [f32],
    per_group: usize,
    width: usize,
    factor: &[f32],
) {
    if x.is_empty() {
        return;
    }
    let rows = chunk_rows(pool, x.len() / width, width);
    pool.run_chunks(x, rows * width, |index, piece| {
        for (r, row) in piece.chunks_exact_mut(width).enumerate() {
            let group = (index * rows + r) / per_group;
            level.run(Plain::Multiply(row, &factor[group * width..]));
        }
    });
}

/// Mean over runs of `per_group` rows: x `[groups, per_group, width]`, out `[groups, width]`.
pub(crate) fn mean_rows(level: Level, pool: &ThreadPool, x: &[f32], per_group: usize, width: usize, out: &mut [f32]) {
    if out.is_empty() {
        return;
    }
    pool.run_chunks(out, width, |group, out| {
        out.fill(0.0);
        for row in x[group * per_group * width..].chunks_exact(width).take(per_group) {
            level.run(Plain::Add(out, row));
        }
        let count = per_group as f32;
        out.iter_mut().for_each(|sum| *sum /= count);
    });
}
