//! The linear layer in f32. Few rows are dot products that read the stored weight once, in its own type, and are bound by
//! memory; more rows are a blocked product whose panels are widened to f32 while they are packed.
#![allow(clippy::needless_range_loop)] // several register tiles run by one index

use crate::cpu::elementwise::Finish;
use crate::cpu::gemm::{Columns, MatrixRef, Part, Precision, Tile, product_at};
use crate::cpu::pool::{SharedSlice, ThreadPool};
use crate::cpu::simd::{Level, Operation, Simd};
use crate::cpu::stored::{Stored, Values, widen_row};
use crate::device::{Activation, Result};
use std::cell::Cell;

/// Up to this many rows the dot products are at least as fast: a blocked product first has to pack the weight.
pub(crate) const DOT_ROWS: usize = 32;
/// Multiplications a task of dot products does at least: fewer are not worth waking a thread.
const DOT_GRAIN: usize = 64 * 1024;
/// Outputs of one task are a multiple of this, the most weight rows that one pass over x handles.
const OUTPUTS: usize = 4;

/// The parameters of a linear layer.
#[derive(Clone, Copy)]
pub(crate) struct Layer<'a> {
    /// `[outputs, depth]`
    pub(crate) weight: Values<'a>,
    pub(crate) outputs: usize,
    pub(crate) depth: usize,
    /// `[outputs]`
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) activation: Activation,
}

/// `out = activation(x · weightᵀ + bias)`: x `[rows, depth]`, weight `[outputs, depth]`, out `[rows, outputs]`, of
/// just these sizes.
pub(crate) fn linear(
    level: Level,
    pool: &ThreadPool,
    x: &[f32],
    rows: usize,
    layer: Layer<'_>,
    out: &mut [f32],
) -> Result<()> {
    let Layer { weight, outputs, depth, bias, activation } = layer;
    let finish = |piece: &mut [f32], first: usize| {
        let bias = bias.map(|bias| &bias[first..first + piece.len()]);
        if bias.is_some() || activation != Activation::Identity {
            level.run(Finish { row: piece, bias, activation });
        }
    };
    if rows == 0 || outputs == 0 {
        return Ok(());
    }
    if depth == 0 || rows > DOT_ROWS {
        let a = MatrixRef::row_major(x, rows, depth)?;
        let b = StoredMatrix { level, values: weight, rows: outputs, depth };
        product_at(level, pool, a, b, out, false, Precision::F32, finish);
        return Ok(());
    }
    let share = outputs.div_ceil(4 * pool.threads()).max(DOT_GRAIN / (rows * depth));
    let share = share.next_multiple_of(OUTPUTS);
    let shared = SharedSlice::new(out);
    pool.run(outputs.div_ceil(share), |task| {
        let first = task * share;
        let count = share.min(outputs - first);
        let range = first * depth..(first + count) * depth;
        let (out, width) = (&shared, outputs);
        match weight {
            Values::F32(w) => level.run(Dots { x, depth, weight: &w[range], scales: None, out, first, width }),
            Values::F16(w) => level.run(Dots { x, depth, weight: &w[range], scales: None, out, first, width }),
            Values::Bf16(w) => level.run(Dots { x, depth, weight: &w[range], scales: None, out, first, width }),
            Values::I8(w, scales) => {
                let scales = Some(&scales[first..first + count]);
                level.run(Dots { x, depth, weight: &w[range], scales, out, first, width });
            }
            Values::Codes(_) => {
                let mut widened = WIDENED.take();
                for few in (first..first + count).step_by(OUTPUTS) {
                    let rows = OUTPUTS.min(first + count - few);
                    widened.resize(rows * depth, 0.0);
                    for (r, to) in widened.chunks_exact_mut(depth).enumerate() {
                        widen_row(level, weight, few + r, depth, 0, to);
                    }
                    level.run(Dots { x, depth, weight: &widened[..], scales: None, out, first: few, width });
                }
                WIDENED.set(widened);
            }
        }
        for r in 0..rows {
            // SAFETY: each task has outputs of its own.
            finish(unsafe { shared.range(r * outputs + first, count) }, first);
        }
    });
    Ok(())
}

/// A stored weight as the right operand of a product, transposed.
#[derive(Clone, Copy)]
struct StoredMatrix<'a> {
    level: Level,
    values: Values<'a>,
    rows: usize,
    depth: usize,
}

thread_local! {
    /// A few rows of the weight as f32.
    static WIDENED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

impl Columns for StoredMatrix<'_> {
    fn columns(&self) -> usize {
        self.rows
    }

    fn pack<T: Tile>(self, tile: T, part: Part, panels: &mut [f32]) {
        if let Values::F32(data) = self.values {
            // Shapes were checked, so this is the whole weight.
            if let Ok(matrix) = MatrixRef::row_major(data, self.rows, self.depth) {
                tile.pack_columns(matrix, part, panels);
            }
            return;
        }
        let panel = T::COLUMNS * part.depth.div_ceil(T::PER_LANE);
        let mut widened = WIDENED.take();
        widened.resize(T::COLUMNS * part.depth, 0.0);
        for (index, panel) in panels.chunks_exact_mut(panel).enumerate() {
            let first = part.first + index * T::COLUMNS;
            let count = T::COLUMNS.min(part.first + part.count - first);
            for (r, to) in widened.chunks_exact_mut(part.depth).take(count).enumerate() {
                widen_row(self.level, self.values, first + r, self.depth, part.from, to);
            }
            if let Ok(matrix) = MatrixRef::row_major(&widened, count, part.depth) {
                tile.pack_columns(matrix, Part { first: 0, count, from: 0, depth: part.depth }, panel);
            }
        }
        WIDENED.set(widened);
    }
}

/// `out[r · width + first + o] = x[r] · weight[o] · scales[o]`.
struct Dots<'a, T> {
    x: &'a [f32],
    depth: usize,
    weight: &'a [T],
    scales: Option<&'a [f32]>,
    out: &'a SharedSlice<'a, f32>,
    first: usize,
    width: usize,
}

impl<T: Stored> Operation for Dots<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut first = 0;
        for weight in self.weight.chunks(OUTPUTS * self.depth) {
            // The rows of x go over a few rows of the weight, which stay in level 1.
            if weight.len() == OUTPUTS * self.depth {
                self.all_rows::<S, OUTPUTS>(simd, weight, first);
            } else {
                for (o, row) in weight.chunks_exact(self.depth).enumerate() {
                    self.all_rows::<S, 1>(simd, row, first + o);
                }
            }
            first += OUTPUTS;
        }
    }
}

impl<T: Stored> Dots<'_, T> {
    #[inline(always)]
    fn all_rows<S: Simd, const O: usize>(&self, simd: S, weight: &[T], first: usize) {
        let rows = self.x.len() / self.depth;
        let mut r = 0;
        // As many sums as there are registers for: 16 of AVX-512's 32, 8 of AVX2's 16.
        while S::LANES == 16 && r + 4 <= rows {
            self.some_rows::<S, 4, O>(simd, weight, r, first);
            r += 4;
        }
        while r + 2 <= rows {
            self.some_rows::<S, 2, O>(simd, weight, r, first);
            r += 2;
        }
        if r < rows {
            self.some_rows::<S, 1, O>(simd, weight, r, first);
        }
    }

    /// Rows `row .. row + R` of x by `O` rows of the weight.
    #[inline(always)]
    fn some_rows<S: Simd, const R: usize, const O: usize>(&self, simd: S, weight: &[T], row: usize, first: usize) {
        let depth = self.depth;
        let x: [&[f32]; R] = std::array::from_fn(|r| &self.x[(row + r) * depth..][..depth]);
        let w: [&[T]; O] = std::array::from_fn(|o| &weight[o * depth..][..depth]);
        let mut sums = [[simd.splat(0.0); O]; R];
        let whole = depth / S::LANES * S::LANES;
        let mut at = 0;
        while at < whole {
            let mut columns = [simd.splat(0.0); O];
            for o in 0..O {
                columns[o] = T::load(simd, &w[o][at..]);
            }
            for r in 0..R {
                let x = simd.load(&x[r][at..]);
                for o in 0..O {
                    sums[r][o] = simd.mul_add(x, columns[o], sums[r][o]);
                }
            }
            at += S::LANES;
        }
        if whole < depth {
            for r in 0..R {
                let x = simd.load_part(&x[r][whole..], 0.0);
                for o in 0..O {
                    sums[r][o] = simd.mul_add(x, T::load_part(simd, &w[o][whole..]), sums[r][o]);
                }
            }
        }
        for r in 0..R {
            // SAFETY: each task has outputs of its own.
            let out = unsafe { self.out.range((row + r) * self.width + self.first + first, O) };
            for o in 0..O {
                out[o] = simd.sum(sums[r][o]) * self.scales.map_or(1.0, |scales| scales[first + o]);
            }
        }
    }
}
