//! Embedding rows and positions, learnt and rotary.

use crate::cpu::elementwise::chunk_rows;
use crate::cpu::pool::ThreadPool;
use crate::cpu::simd::Level;
use crate::cpu::stored::{Values, widen_row};

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
        let mut position = vec![0.0; width];
        for (r, x) in piece.chunks_exact_mut(width).enumerate() {
            let row = (first % table_rows + (index * rows + r) % table_rows) % table_rows;
            widen_row(level, table, row, width, 0, &mut position);
            x.iter_mut().zip(&position).for_each(|(x, position)| *x += position);
        }
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
    let frequencies: Vec<f32> = (0..half)
        .map(|i| {
            let exponent = (2 * i) as f32 / head_dim as f32;
            1.0 / (f64::from(theta).powf(f64::from(exponent)) as f32)
        })
        .collect();
    let width = heads * head_dim;
    let rows = chunk_rows(pool, x.len() / width, width);
    pool.run_chunks(x, rows * width, |index, piece| {
        let mut rotations = vec![(0.0f32, 0.0f32); half];
        for (r, row) in piece.chunks_exact_mut(width).enumerate() {
            let position = (first + index * rows + r) as f32;
            for (rotation, frequency) in rotations.iter_mut().zip(&frequencies) {
                let (sin, cos) = f64::from(position * frequency).sin_cos();
                *rotation = (sin as f32, cos as f32);
            }
            for head in row.chunks_exact_mut(head_dim) {
                let (low, high) = head.split_at_mut(half);
                for ((a, b), (sin, cos)) in low.iter_mut().zip(high).zip(&rotations) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
    });
}
