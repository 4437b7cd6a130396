//! Embedding rows and positions, learnt and rotary.

use crate::cpu::elementwise::chunk_rows;
use crate::cpu::gemm::with_panels;
use crate::cpu::pool::ThreadPool;
use crate::cpu::simd::Level;
use crate::cpu::stored::{Values, widen_row};
use crate::device::rope_frequencies;
use std::cell::Cell;

thread_local! {
    /// A row of the position table.
    static POSITION: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// Of the pairs of a head: the last that were asked for, as every layer asks for the same.
    static FREQUENCIES: Cell<Frequencies> = Cell::default();
    /// Sines and cosines of the pairs at a position.
    static ROTATIONS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

#[derive(Default)]
struct Frequencies {
    head_dim: usize,
    theta: f32,
    pairs: Vec<f32>,
}

impl Frequencies {
    fn fill(&mut self, head_dim: usize, theta: f32) {
        if (self.head_dim, self.theta.to_bits()) == (head_dim, theta.to_bits()) {
            return;
        }
        (self.head_dim, self.theta) = (head_dim, theta);
        self.pairs.clear();
        self.pairs.extend(rope_frequencies(head_dim, theta));
    }
}

/// `out[i] = table[ids[i]]` for rows of `width`; ids lie within the table.
pub(crate) fn embed(level: Level, table: Values<'_>, width: usize, ids: &[u32], out: &mut [f32]) {
    if width == 0 {
        return;
    }
    for (&id, out) in ids.iter().zip(out.chunks_exact_mut(width)) {
        widen_row(level, table, id as usize, width, 0, out);
    }
}

/// `x[r] += table[(first + r) mod table_rows]` for rows of `width`.
pub(crate) fn add_positions(
    level: Level,
    pool: &ThreadPool,
    x: &mut [f32],
    table: Values<'_>,
    table_rows: usize,
    width: usize,
    first: usize,
) {
    if x.is_empty() {
        return;
    }
    let rows = chunk_rows(pool, x.len() / width, width);
    pool.run_chunks(x, rows * width, |index, piece| {
        with_panels(&POSITION, width, |position| {
            for (r, x) in piece.chunks_exact_mut(width).enumerate() {
                let row = (first % table_rows + (index * rows + r) % table_rows) % table_rows;
                widen_row(level, table, row, width, 0, position);
                x.iter_mut().zip(&*position).for_each(|(x, position)| *x += position);
            }
        });
    });
}

/// Rotates pairs (i, i + head_dim / 2) of each head of row `r` by the angle of position `first + r`.
///
/// Frequencies and angles are rounded to f32 where transformers rounds them: at position 1000 and beyond, exact ones
/// would differ from what the model was trained with.
pub(crate) fn rope(pool: &ThreadPool, x: &mut [f32], heads: usize, head_dim: usize, first: usize, theta: f32) {
    if x.is_empty() {
        return;
    }
    let half = head_dim / 2;
    let width = heads * head_dim;
    let rows = chunk_rows(pool, x.len() / width, width);
    let mut frequencies = FREQUENCIES.take();
    frequencies.fill(head_dim, theta);
    pool.run_chunks(x, rows * width, |index, piece| {
        with_panels(&ROTATIONS, 2 * half, |rotations| {
            let (sines, cosines) = rotations.split_at_mut(half);
            for (r, row) in piece.chunks_exact_mut(width).enumerate() {
                let position = (first + index * rows + r) as f32;
                for ((sine, cosine), frequency) in sines.iter_mut().zip(&mut *cosines).zip(&frequencies.pairs) {
                    let (sin, cos) = f64::from(position * frequency).sin_cos();
                    (*sine, *cosine) = (sin as f32, cos as f32);
                }
                for head in row.chunks_exact_mut(head_dim) {
                    let (low, high) = head.split_at_mut(half);
                    for (((a, b), sin), cos) in low.iter_mut().zip(high).zip(&*sines).zip(&*cosines) {
                        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                    }
                }
            }
        });
    });
    FREQUENCIES.set(frequencies);
}
