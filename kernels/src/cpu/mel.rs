//! The parts of log-mel features of sound that are no linear layers.

use crate::cpu::elementwise::{chunk, chunk_rows};
use crate::cpu::pool::ThreadPool;

/// What a logarithm is taken of at least.
const LEAST: f32 = 1e-10;

/// `out = real² + imaginary²`: x `[rows, 2, width]`, out `[rows, width]`, of just these sizes.
pub(crate) fn power(pool: &ThreadPool, x: &[f32], width: usize, out: &mut [f32]) {
    if out.is_empty() {
        return;
    }
    let rows = chunk_rows(pool, out.len() / width, width);
    pool.run_chunks(out, rows * width, |index, piece| {
        let x = x[index * rows * 2 * width..].chunks_exact(2 * width);
        for (out, x) in piece.chunks_exact_mut(width).zip(x) {
            let (real, imaginary) = x.split_at(width);
            out.iter_mut().zip(real.iter().zip(imaginary)).for_each(|(out, (a, b))| *out = a * a + b * b);
        }
    });
}

/// Powers to Whisper's scale.
pub(crate) fn log_mel(pool: &ThreadPool, x: &mut [f32]) {
    // `max` leaves out what is no number, and the comparisons below leave it as it is.
    let least = decades(x.iter().copied().fold(LEAST, f32::max)) - 8.0;
    let chunk = chunk(pool, x.len());
    pool.run_chunks(x, chunk, |_, piece| {
        for x in piece {
            let value = decades(*x);
            *x = (if value < least { least } else { value } + 4.0) / 4.0;
        }
    });
}

fn decades(x: f32) -> f32 {
    if x < LEAST { LEAST } else { x }.log10()
}
