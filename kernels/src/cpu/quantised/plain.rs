//! The definition that the kernels are compared with.

use super::BLOCK;
use crate::tensor::HostTensor;

/// `x · weightᵀ` of quantised activations, x `[rows, depth]`, in f64 where the kernels sum in f32.
pub(super) fn linear(x: &[f32], rows: usize, weight: &HostTensor) -> Vec<f64> {
    let (outputs, depth) = (weight.rows(), weight.row_len());
    let weight = weight.to_f32();
    let mut out = Vec::with_capacity(rows * outputs);
    for row in x.chunks_exact(depth) {
        let mut rounded = Vec::with_capacity(depth);
        for block in row.chunks(BLOCK) {
            let largest = block.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let factor = if largest > 0.0 { 127.0 / largest } else { 0.0 };
            let scale = f64::from(largest / 127.0);
            rounded.extend(block.iter().map(|x| f64::from((x * factor).round_ties_even()) * scale));
        }
        let product = |weight: &[f32]| weight.iter().zip(&rounded).map(|(w, x)| f64::from(*w) * x).sum::<f64>();
        out.extend(weight.chunks_exact(depth).map(product));
    }
    out
}
