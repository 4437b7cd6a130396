//! Activations as bytes.
#![allow(clippy::needless_range_loop)] // several arrays run by one index

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
    /// Sums of the codes of each part, `[rows, blocks, PARTS]`, of each half of a block and of each block.
    sums: [Vec<i32>; 3],
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
        let [parts, halves, wholes] = &mut self.sums;
        grow(parts, rows * blocks * PARTS);
        grow(halves, rows * blocks * 2);
        grow(wholes, rows * blocks);
        let codes = SharedSlice::new(&mut self.codes);
        let scales = SharedSlice::new(&mut self.scales);
        let [parts, halves, wholes] = [parts, halves, wholes].map(|sums| SharedSlice::new(sums));
        let share = (GRAIN / depth.max(1)).max(1);
        pool.run(rows.div_ceil(share), |task| {
            for row in task * share..rows.min((task + 1) * share) {
                // SAFETY: each task has rows of its own.
                let (codes, scales, parts, halves, wholes) = unsafe {
                    (
                        codes.range(row * blocks * BLOCK, blocks * BLOCK),
                        scales.range(row * blocks, blocks),
                        parts.range(row * blocks * PARTS, blocks * PARTS),
                        halves.range(row * blocks * 2, blocks * 2),
                        wholes.range(row * blocks, blocks),
                    )
                };
                level.run(QuantiseRow { x: &x[row * depth..][..depth], order, codes, scales, parts });
                for (half, parts) in halves.iter_mut().zip(parts.as_chunks::<{ PARTS / 2 }>().0) {
                    *half = parts.iter().sum();
                }
                for (whole, halves) in wholes.iter_mut().zip(halves.as_chunks::<2>().0) {
                    *whole = halves.iter().sum();
                }
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

    /// The sums of every part of every row.
    pub(super) fn sums_of_parts(&self) -> &[i32] {
        &self.sums[0][..self.rows * self.blocks * PARTS]
    }

    /// The sums of a row over each `depth` bytes: a part, half a block or a block.
    #[inline(always)]
    pub(super) fn sums_of(&self, row: usize, depth: usize) -> &[i32] {
        let (sums, count) = match BLOCK / depth {
            1 => (&self.sums[2], self.blocks),
            2 => (&self.sums[1], self.blocks * 2),
            _ => (&self.sums[0], self.blocks * PARTS),
        };
        &sums[row * count..][..count]
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
    parts: &'a mut [i32],
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
        let parts = self.parts.as_chunks_mut::<PARTS>().0;
        for (((x, codes), scale), parts) in x.iter().chain(padded).zip(codes).zip(self.scales).zip(parts) {
            *scale = block(simd, x, self.order, codes, parts);
        }
    }
}

/// Quantises a block; the result is its scale.
#[inline(always)]
fn block<S: Simd>(simd: S, x: &[f32; BLOCK], order: Order, codes: &mut [i8; BLOCK], sums: &mut [i32; PARTS]) -> f32 {
    // Bits, as those of magnitudes are in the order of the numbers, and loops over integers become vectors.
    let mut largest = 0;
    for x in x {
        largest = largest.max(x.to_bits() & 0x7fff_ffff);
    }
    let largest = f32::from_bits(largest);
    if !largest.is_finite() {
        // Whatever is computed with it is no number either.
        codes.fill(0);
        sums.fill(0);
        return f32::NAN;
    }
    // A block this small is zero: its scale would have no inverse.
    let factor = if largest > 1e-30 { 127.0 / largest } else { 0.0 };
    // 1.5 · 2²³: behind it a single has no room for a fraction, and and its lowest byte is the integer's.
    const SHIFT: f32 = 12_582_912.0;
    let (factor, shift) = (simd.splat(factor), simd.splat(SHIFT));
    let mut shifted = [0.0f32; BLOCK];
    let mut parts = [simd.splat(0.0); PARTS];
    for p in 0..PARTS {
        for at in (p * PART..(p + 1) * PART).step_by(S::LANES) {
            let value = simd.add(simd.mul(simd.load(&x[at..]), factor), shift);
            simd.store(value, &mut shifted[at..]);
            parts[p] = simd.add(parts[p], simd.sub(value, shift));
        }
    }
    for (sum, part) in sums.iter_mut().zip(simd.sums(parts)) {
        *sum = part as i32;
    }
    let mut natural = [0i8; BLOCK];
    for i in 0..BLOCK {
        natural[i] = shifted[i].to_bits() as i8;
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
