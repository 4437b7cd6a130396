//! GPTQ (Frantar and others 2022, arXiv:2210.17323): a matrix is rounded column by column, and the error of each column
//! is made up for by those that are not rounded yet, as far as the layer's inputs let them.
//!
//! Columns go in the order of how much goes through them. The scales are found before, for the matrix as it is, so that
//! a group's columns may be rounded at any time and nothing of the order has to be stored.

use anyhow::{Context, ensure};
use candor_kernels::cpu::CpuDevice;
use candor_kernels::cpu::gemm::{MatrixRef, Precision, gemm};

use super::factor::inverse_factor;
use super::format::Scheme;
use super::observe::Inputs;
use super::stored::{Integers, code};

/// Columns whose errors are handed on to all behind them at once.
const BLOCK: usize = 128;
/// What is added to the sums' diagonal, as a share of its mean: inputs that were seldom seen must not be relied on.
const DAMPING: f64 = 0.01;
/// How often the damping is made ten times stronger where the sums are not positive definite.
const TRIES: u32 = 4;

/// Rounds a matrix `[rows, columns]` for inputs like those seen.
pub(super) fn quantise(
    device: &CpuDevice,
    values: &[f32],
    columns: usize,
    scheme: Scheme,
    inputs: &Inputs,
) -> anyhow::Result<Integers> {
    ensure!(inputs.sums.len() == columns * columns, "the inputs' sums are not of {columns} columns");
    let rows = values.len() / columns.max(1);
    let power: Vec<f32> = (0..columns).map(|i| inputs.sums[i * columns + i]).collect();
    let mut order: Vec<usize> = (0..columns).collect();
    order.sort_by(|&a, &b| power[b].total_cmp(&power[a]));
    let mut integers = Integers::nearest(values, columns, scheme, Some(&importance(&power)));
    let factor = damped_factor(inputs, &order)?;
    // A column a row, in the order of rounding.
    let mut left: Vec<f32> = order.iter().flat_map(|&i| (0..rows).map(move |row| values[row * columns + i])).collect();
    let group = scheme.group.size().unwrap_or(columns).max(1);
    let per_row = integers.per_row();
    for start in (0..columns).step_by(BLOCK) {
        let end = (start + BLOCK).min(columns);
        let mut errors = vec![0.0f32; (end - start) * rows];
        for column in start..end {
            let (own, behind) = left[column * rows..end * rows].split_at_mut(rows);
            let error = &mut errors[(column - start) * rows..][..rows];
            let place = order[column];
            let pivot = factor[column * columns + column];
            for (row, (value, error)) in own.iter().zip(error.iter_mut()).enumerate() {
                let scale = integers.scales[row * per_row + place / group];
                let rounded = code(*value, scale, scheme.bits);
                integers.codes[row * columns + place] = rounded;
                *error = (f32::from(rounded) * scale - value) / pivot;
            }
            for (other, behind) in behind.chunks_exact_mut(rows).enumerate() {
                let share = factor[column * columns + column + 1 + other];
                behind.iter_mut().zip(&*error).for_each(|(value, error)| *value += share * error);
            }
        }
        if end < columns && rows > 0 {
            let shares = MatrixRef::new(&factor[start * columns + end..], columns - end, end - start, 1, columns)?;
            let errors = MatrixRef::row_major(&errors, end - start, rows)?;
            gemm(device.pool(), shares, errors, &mut left[end * rows..], true, Precision::F32)?;
        }
    }
    Ok(integers)
}

/// Powers with a mean of one, and none of them zero: what never saw an input is to be rounded well all the same.
fn importance(power: &[f32]) -> Vec<f32> {
    let mean = power.iter().sum::<f32>() / power.len().max(1) as f32;
    if mean > 0.0 { power.iter().map(|power| power / mean + DAMPING as f32).collect() } else { vec![1.0; power.len()] }
}

/// [`inverse_factor`] of the sums with some damping, in this order of columns.
fn damped_factor(inputs: &Inputs, order: &[usize]) -> anyhow::Result<Vec<f32>> {
    let columns = order.len();
    let at = |i: usize, j: usize| f64::from(inputs.sums[i * columns + j]);
    let mean = (0..columns).map(|i| at(i, i)).sum::<f64>() / columns.max(1) as f64;
    let mean = if mean > 0.0 { mean } else { 1.0 };
    let sums: Vec<f64> = order.iter().flat_map(|&i| order.iter().map(move |&j| 0.5 * (at(i, j) + at(j, i)))).collect();
    for attempt in 0..TRIES {
        let mut damped = sums.clone();
        let damping = DAMPING * 10f64.powi(attempt as i32) * mean;
        (0..columns).for_each(|i| damped[i * columns + i] += damping);
        if let Some(factor) = inverse_factor(&damped, columns) {
            return Ok(factor.iter().map(|&value| value as f32).collect());
        }
    }
    None.context("the inputs' sums are not finite numbers")
}

/// Root mean square of what the change of a matrix does to its outputs, relative to the outputs.
pub(super) fn output_error(device: &CpuDevice, stored: &[f32], values: &[f32], inputs: &Inputs) -> anyhow::Result<f64> {
    let change: Vec<f32> = stored.iter().zip(values).map(|(stored, value)| stored - value).collect();
    let (error, whole) = (energy(device, &change, inputs)?, energy(device, values, inputs)?);
    Ok(if whole > 0.0 { (error / whole).max(0.0).sqrt() } else { 0.0 })
}

/// The sum of squares of a matrix' outputs.
fn energy(device: &CpuDevice, values: &[f32], inputs: &Inputs) -> anyhow::Result<f64> {
    let columns = inputs.sums.len().isqrt();
    let rows = values.len() / columns.max(1);
    let mut products = vec![0.0; values.len()];
    let (a, b) = (MatrixRef::row_major(values, rows, columns)?, MatrixRef::row_major(&inputs.sums, columns, columns)?);
    gemm(device.pool(), a, b, &mut products, false, Precision::F32)?;
    Ok(products.iter().zip(values).map(|(product, value)| f64::from(*product) * f64::from(*value)).sum())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::format::{Bits, Group};
    use super::*;

    /// Sums of inputs that are mixtures of a few.
    fn correlated(columns: usize, rows: usize, seed: u64) -> Inputs {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let hidden = columns.div_ceil(4);
        let mixture: Vec<f32> = (0..hidden * columns).map(|_| random.random_range(-1.0f32..1.0)).collect();
        let mut sums = vec![0.0; columns * columns];
        for _ in 0..rows {
            let factors: Vec<f32> = (0..hidden).map(|_| random.random_range(-1.0f32..1.0)).collect();
            let noise = |random: &mut ChaCha8Rng| random.random_range(-0.1f32..0.1);
            let x: Vec<f32> = (0..columns)
                .map(|i| (0..hidden).map(|k| factors[k] * mixture[k * columns + i]).sum::<f32>() + noise(&mut random))
                .collect();
            x.iter().enumerate().for_each(|(i, a)| {
                x.iter().zip(&mut sums[i * columns..][..columns]).for_each(|(b, sum)| *sum += a * b);
            });
        }
        Inputs { rows, sums }
    }

    fn matrix(count: usize, seed: u64) -> Vec<f32> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        (0..count).map(|_| random.random_range(-1.0f32..1.0)).collect()
    }

    #[test]
    fn the_outputs_change_less_than_with_the_nearest() {
        let device = CpuDevice::new(Some(1));
        for (rows, columns, group) in [
            (16, 128, Group::Of(32)),
            (7, 130, Group::Of(64)),
            (5, 300, Group::Of(128)),
            (9, 77, Group::Row),
            (1, 33, Group::Of(32)),
        ] {
            let scheme = Scheme { bits: Bits::Four, group };
            let (values, inputs) = (matrix(rows * columns, 3), correlated(columns, 4 * columns, 4));
            let own = quantise(&device, &values, columns, scheme, &inputs).unwrap();
            let nearest = Integers::nearest(&values, columns, scheme, None);
            let error = |integers: &Integers| output_error(&device, &integers.values(), &values, &inputs).unwrap();
            assert!(error(&own) < 0.75 * error(&nearest), "{} {}", error(&own), error(&nearest));
            assert_eq!((own.rows(), own.codes.len()), (rows, values.len()));
        }
    }

    #[test]
    fn inputs_that_tell_nothing_give_the_nearest() {
        let device = CpuDevice::new(Some(1));
        let scheme = Scheme { bits: Bits::Four, group: Group::Of(32) };
        let values = matrix(6 * 70, 5);
        let nothing = Inputs { rows: 0, sums: vec![0.0; 70 * 70] };
        let nearest = Integers::nearest(&values, 70, scheme, None);
        assert_eq!(quantise(&device, &values, 70, scheme, &nothing).unwrap(), nearest);
        assert_eq!(output_error(&device, &nearest.values(), &values, &nothing).unwrap(), 0.0);
        let mut wrong = nothing.clone();
        wrong.sums[0] = f32::NAN;
        assert!(quantise(&device, &values, 70, scheme, &wrong).is_err());
        assert!(quantise(&device, &values, 69, scheme, &nothing).is_err());
    }

    /// The definition: one column at a time, everything behind it corrected at once, in double precision.
    #[test]
    fn blocks_change_nothing() {
        let device = CpuDevice::new(Some(1));
        let (rows, columns) = (3, 290);
        let scheme = Scheme { bits: Bits::Four, group: Group::Of(64) };
        let (values, inputs) = (matrix(rows * columns, 6), correlated(columns, 500, 7));
        let own = quantise(&device, &values, columns, scheme, &inputs).unwrap();
        let mut order: Vec<usize> = (0..columns).collect();
        let power = |i: usize| inputs.sums[i * columns + i];
        order.sort_by(|&a, &b| power(b).total_cmp(&power(a)));
        let factor = damped_factor(&inputs, &order).unwrap();
        let mut same = 0;
        for row in 0..rows {
            let mut left: Vec<f64> = order.iter().map(|&i| f64::from(values[row * columns + i])).collect();
            for column in 0..columns {
                let scale = own.scales[row * own.per_row() + order[column] / 64];
                let rounded = code(left[column] as f32, scale, Bits::Four);
                same += usize::from(rounded == own.codes[row * columns + order[column]]);
                let error = (f64::from(rounded) * f64::from(scale) - left[column])
                    / f64::from(factor[column * columns + column]);
                for other in column + 1..columns {
                    left[other] += f64::from(factor[column * columns + other]) * error;
                }
            }
        }
        assert!(same * 100 > rows * columns * 98, "{same} of {}", rows * columns);
    }
}
