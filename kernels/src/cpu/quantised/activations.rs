//! Activations as bytes.

use super::BLOCK;
use crate::cpu::pool::{SharedSlice, ThreadPool};
use crate::cpu::simd::{Level, Operation, Simd};
use std::cell::Cell;

/// Activations that have a sum of their own: the smallest group of weights.
pub(super) const PART: usize = 32;
/// Parts of a block.
pub(super) const PARTS: usize = BLOCK / PART;
/// Elements that are worth a thread of their own.
const GRAIN: usize = 16 * 1024;

/// Where the elements of a block lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) enum Order {
    /// In their order.
    #[default]
    Natural,
    /// The even ones, then the odd ones: as the lower and upper halves of packed bytes come.
    Halves,
    /// Of every eight the even ones, then the odd ones: as the lower and upper halves of packed words come.
    Words,
}

/// Rows of activations as bytes, in blocks that are filled up with zeros.
#[derive(Default)]
pub(super) struct Quantised {
    pub(super) rows: usize,
    /// Blocks a row.
    pub(super) blocks: usize,
    /// `[rows, blocks, BLOCK]`
    pub(super) codes: Vec<i8>,
    /// `[rows, blocks]`
    pub(super) scales: Vec<f32>,
    /// Sums of the codes of each part, `[rows, blocks, PARTS]`.
    pub(super) sums: Vec<i32>,
}

thread_local! {
    static QUANTISED: Cell<Quantised> = Cell::default();
}

/// Runs `code` with the rows of x `[rows, depth]` as bytes, in memory that the thread keeps.
pub(super) fn with_quantised<R>(
    level: Level,
    pool: &ThreadPool,
    x: &[f32],
    rows: usize,
    depth: usize,
    order: Order,
    code: impl FnOnce(&Quantised) -> R,
) -> R {
    // Taken out, so that a product within a product gets memory of its own.
    let mut quantised = QUANTISED.take();
    quantised.fill(level, pool, x, rows, depth, order);
    let result = code(&quantised);
    QUANTISED.set(quantised);
    result
}

impl Quantised {
    fn fill(&mut self, level: Level, pool: &ThreadPool, x: &[f32], rows: usize, depth: usize, order: Order) {
        let blocks = depth.div_ceil(BLOCK);
        (self.rows, self.blocks) = (rows, blocks);
        grow(&mut self.codes, rows * blocks * BLOCK);
        grow(&mut self.scales, rows * blocks);
        grow(&mut self.sums, rows * blocks * PARTS);
        let codes = SharedSlice::new(&mut self.codes);
        let scales = SharedSlice::new(&mut self.scales);
        let sums = SharedSlice::new(&mut self.sums);
        let share = (GRAIN / depth.max(1)).max(1);
        pool.run(rows.div_ceil(share), |task| {
            for row in task * share..rows.min((task + 1) * share) {
                // SAFETY: each task has rows of its own.
                let (codes, scales, sums) = unsafe {
                    (
                        codes.range(row * blocks * BLOCK, blocks * BLOCK),
                        scales.range(row * blocks, blocks),
                        sums.range(row * blocks * PARTS, blocks * PARTS),
                    )
                };
                level.run(QuantiseRow { x: &x[row * depth..][..depth], order, codes, scales, sums });
            }
        });
    }

    /// The bytes of a row.
    #[inline(always)]
    pub(super) fn codes_of(&self, row: usize) -> &[i8] {
        &self.codes[row * self.blocks * BLOCK..][..self.blocks * BLOCK]
    }

    /// The scales of a row.
    #[inline(always)]
    pub(super) fn scales_of(&self, row: usize) -> &[f32] {
        &self.scales[row * self.blocks..][..self.blocks]
    }

    /// The sums of a row.
    #[inline(always)]
    pub(super) fn sums_of(&self, row: usize) -> &[i32] {
        &self.sums[row * self.blocks * PARTS..][..self.blocks * PARTS]
    }
}

/// At least `len` elements; what stood there may stay.
fn grow<T: Clone + Default>(vector: &mut Vec<T>, len: usize) {
    if vector.len() < len {
        vector.resize(len, T::default());
    }
}

struct QuantiseRow<'a> {
    x: &'a [f32],
    order: Order,
    codes: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [i32],
}

impl Operation for QuantiseRow<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (x, last) = self.x.as_chunks::<BLOCK>();
        let mut padded = [0.0; BLOCK];
        padded[..last.len()].copy_from_slice(last);
        let padded = (!last.is_empty()).then_some(&padded);
        let codes = self.codes.as_chunks_mut::<BLOCK>().0;
        let sums = self.sums.as_chunks_mut::<PARTS>().0;
        for (((x, codes), scale), sums) in x.iter().chain(padded).zip(codes).zip(self.scales).zip(sums) {
            *scale = block(simd, x, self.order, codes, sums);
        }
    }
}

/// Quantises a block; the result is its scale.
#[inline(always)]
fn block<S: Simd>(simd: S, x: &[f32; BLOCK], order: Order, codes: &mut [i8; BLOCK], sums: &mut [i32; PARTS]) -> f32 {
    let mut largest = simd.splat(0.0);
    let mut broken = simd.splat(0.0);
    for x in x.chunks_exact(S::LANES) {
        let x = simd.load(x);
        largest = simd.max(largest, simd.abs(x));
        // Nothing times zero is zero, unless it is infinite or no number.
        broken = simd.mul_add(x, simd.splat(0.0), broken);
    }
    let largest = simd.largest(largest);
    if simd.sum(broken) != 0.0 || !largest.is_finite() {
        // Whatever is computed with it is no number either.
        codes.fill(0);
        sums.fill(0);
        return f32::NAN;
    }
    // A block this small is zero: its scale would have no inverse.
    let factor = if largest > 1e-30 { 127.0 / largest } else { 0.0 };
    // 1.5 · 2²³: behind it a single has no room for a fraction, and its lowest byte is the integer's.
    const SHIFT: f32 = 12_582_912.0;
    let mut natural = [0i8; BLOCK];
    for i in 0..BLOCK {
        natural[i] = (x[i] * factor + SHIFT).to_bits() as i8;
    }
    for (sum, part) in sums.iter_mut().zip(natural.as_chunks::<PART>().0) {
        *sum = part.iter().map(|&code| i32::from(code)).sum();
    }
    match order {
        Order::Natural => *codes = natural,
        Order::Halves => {
            for i in 0..BLOCK / 2 {
                codes[i] = natural[2 * i];
                codes[BLOCK / 2 + i] = natural[2 * i + 1];
            }
        }
        Order::Words => {
            for (to, from) in codes.as_chunks_mut::<8>().0.iter_mut().zip(natural.as_chunks::<8>().0) {
                *to = [from[0], from[2], from[4], from[6], from[1], from[3], from[5], from[7]];
            }
        }
    }
    largest / 127.0
}
