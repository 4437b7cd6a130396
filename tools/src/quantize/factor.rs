//! The triangular factor of an inverse, in double precision: of a symmetric positive definite H the upper U with
//! `H⁻¹ = Uᵀ · U`.
//!
//! With rows and columns in reverse order H is `L · Lᵀ`, and then U is L's inverse, reversed again: one Cholesky
//! factorisation and the inverse of one triangle, and never the inverse of H itself. Both go in blocks of rows that
//! threads share.

use rayon::prelude::*;

/// Columns that are factorised at once.
const BLOCK: usize = 64;
/// Sums that a product keeps at once.
const LANES: usize = 8;
/// Rows that are inverted together, so that what they are made of is read once for all of them.
const TOGETHER: usize = 4;

/// U, row-major `[n, n]`; none where H is not positive definite.
pub(super) fn inverse_factor(h: &[f64], n: usize) -> Option<Vec<f64>> {
    let mut reversed: Vec<f64> = h.iter().rev().copied().collect();
    cholesky(&mut reversed, n)?;
    let mut inverse = invert_lower(&reversed, n);
    inverse.reverse();
    Some(inverse)
}

/// Puts L of `L · Lᵀ` into the lower triangle of a matrix; what is above it is left alone.
fn cholesky(a: &mut [f64], n: usize) -> Option<()> {
    for start in (0..n).step_by(BLOCK) {
        let end = (start + BLOCK).min(n);
        let panel: Vec<f64> = (start..end).flat_map(|row| a[row * n..][..start].iter().copied()).collect();
        let rows = &mut a[start * n..];
        rows.par_chunks_exact_mut(n).for_each(|row| {
            let (before, own) = row.split_at_mut(start);
            for (column, value) in own[..end - start].iter_mut().enumerate() {
                *value -= dot(before, &panel[column * start..][..start]);
            }
        });
        let (diagonal, below) = a[start * n..].split_at_mut((end - start) * n);
        for row in 0..end - start {
            let (above, own) = diagonal.split_at_mut(row * n);
            let own = &mut own[start..end];
            for column in 0..row {
                let other = &above[column * n + start..][..column + 1];
                own[column] = (own[column] - dot(&own[..column], &other[..column])) / other[column];
            }
            let square = own[row] - dot(&own[..row], &own[..row]);
            if !(square > 0.0 && square.is_finite()) {
                return None;
            }
            own[row] = square.sqrt();
        }
        let diagonal = &*diagonal;
        below.par_chunks_exact_mut(n).for_each(|row| {
            let own = &mut row[start..end];
            for column in 0..own.len() {
                let other = &diagonal[column * n + start..][..column + 1];
                own[column] = (own[column] - dot(&own[..column], &other[..column])) / other[column];
            }
        });
    }
    Some(())
}

/// The inverse of a lower triangle, zeros above it.
fn invert_lower(l: &[f64], n: usize) -> Vec<f64> {
    let mut inverse = vec![0.0; n * n];
    for start in (0..n).step_by(BLOCK) {
        let end = (start + BLOCK).min(n);
        let (done, rest) = inverse.split_at_mut(start * n);
        let block = &mut rest[..(end - start) * n];
        // What the finished rows give to those of the block.
        block.par_chunks_mut(TOGETHER * n).enumerate().for_each(|(index, rows)| {
            let first = start + index * TOGETHER;
            for (p, finished) in done.chunks_exact(n).enumerate() {
                for (row, out) in rows.chunks_exact_mut(n).enumerate() {
                    subtract(&mut out[..=p], l[(first + row) * n + p], &finished[..=p]);
                }
            }
        });
        for row in start..end {
            let (above, own) = block.split_at_mut((row - start) * n);
            let own = &mut own[..n];
            for p in start..row {
                subtract(&mut own[..=p], l[row * n + p], &above[(p - start) * n..][..=p]);
            }
            let pivot = l[row * n + row];
            own[..row].iter_mut().for_each(|value| *value /= pivot);
            own[row] = 1.0 / pivot;
        }
    }
    inverse
}

/// `out -= factor · x`
fn subtract(out: &mut [f64], factor: f64, x: &[f64]) {
    out.iter_mut().zip(x).for_each(|(out, x)| *out -= factor * x);
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; LANES];
    let (a, b) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.0.iter().zip(b.0) {
        (0..LANES).for_each(|lane| sums[lane] += a[lane] * b[lane]);
    }
    sums.iter().sum::<f64>() + a.1.iter().zip(b.1).map(|(a, b)| a * b).sum::<f64>()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn the_factor_is_upper_and_gives_the_inverse() {
        for n in [1, 2, 5, 63, 64, 65, 200] {
            let mut random = ChaCha8Rng::seed_from_u64(n as u64);
            let x: Vec<f64> = (0..2 * n * n).map(|_| random.random_range(-1.0..1.0)).collect();
            let at = |row: usize, column: usize| -> f64 {
                let sum: f64 = (0..2 * n).map(|k| x[k * n + row] * x[k * n + column]).sum();
                sum + if row == column { 0.1 } else { 0.0 }
            };
            let h: Vec<f64> = (0..n * n).map(|i| at(i / n, i % n)).collect();
            let u = inverse_factor(&h, n).unwrap();
            for row in 0..n {
                assert!(u[row * n..][..row].iter().all(|&value| value == 0.0) && u[row * n + row] > 0.0);
            }
            // H · Uᵀ · U is the identity.
            let inverse =
                |row: usize, column: usize| -> f64 { (0..n).map(|k| u[k * n + row] * u[k * n + column]).sum() };
            for row in 0..n.min(9) {
                for column in 0..n {
                    let product: f64 = (0..n).map(|k| h[row * n + k] * inverse(k, column)).sum();
                    let expected = if row == column { 1.0 } else { 0.0 };
                    assert!((product - expected).abs() < 1e-7, "{n} {row} {column} {product}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_positive_definite_has_none() {
        assert!(inverse_factor(&[1.0, 2.0, 2.0, 1.0], 2).is_none());
        assert!(inverse_factor(&[0.0], 1).is_none());
        assert!(inverse_factor(&[f64::NAN], 1).is_none());
        assert_eq!(inverse_factor(&[], 0), Some(Vec::new()));
    }
}
