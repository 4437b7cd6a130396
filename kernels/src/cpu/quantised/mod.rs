//! Linear layers over quantised weights: activations are quantised too, and bytes are multiplied.
//!
//! A block of [`BLOCK`] activations of a row becomes signed bytes with one f32 scale (largest magnitude / 127, to nearest,
//! ties to even). Products are summed in integers for as long as weights and activations share a scale, and in f32 beyond.
//! Few rows are dot products that read the weight once, as it is stored, and are bound by memory; more rows are a
//! blocked product whose panels of codes are packed while they are used.

mod activations;
pub(crate) mod attention;
mod dots;
#[cfg(test)]
mod plain;
mod product;

use crate::cpu::elementwise::Finish;
use crate::cpu::pool::{SharedSlice, ThreadPool};
use crate::cpu::simd::Level;
use crate::cpu::stored::widen_scales;
use crate::device::Activation;
use crate::scales::Scales;
use crate::tensor::{DType, HostTensor};
use activations::{Order, with_quantised};

/// Activations that share a scale. Every group of weights lies within a block.
const BLOCK: usize = 128;
/// Up to this many rows the dot products are at least as fast: a blocked product first has to pack the weight.
const DOT_ROWS: usize = 8;

/// A quantised weight `[outputs, depth]`.
#[derive(Clone, Copy)]
pub(crate) struct Codes<'a> {
    bits: Bits,
    bytes: &'a [u8],
    row_bytes: usize,
    outputs: usize,
    depth: usize,
    scales: &'a Scales,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Bits {
    Four,
    Eight,
}

impl<'a> Codes<'a> {
    /// Elements of a row.
    pub(crate) fn depth(&self) -> usize {
        self.depth
    }

    /// Whether layers of these weights can be computed of one x at once.
    pub(crate) fn goes_with(&self, other: &Codes<'_>) -> bool {
        self.bits == other.bits && self.depth == other.depth
    }

    /// The codes of a tensor of integers.
    pub(crate) fn of(tensor: &'a HostTensor) -> Option<Self> {
        let bits = match tensor.dtype() {
            DType::I4 => Bits::Four,
            DType::I8 => Bits::Eight,
            _ => return None,
        };
        let (outputs, depth) = (tensor.rows(), tensor.row_len());
        let row_bytes = tensor.dtype().row_bytes(depth)?;
        Some(Codes { bits, bytes: tensor.bytes(), row_bytes, outputs, depth, scales: tensor.scales()? })
    }

    fn row(&self, row: usize) -> &'a [u8] {
        &self.bytes[row * self.row_bytes..][..self.row_bytes]
    }

    /// Blocks a row takes.
    fn blocks(&self) -> usize {
        self.depth.div_ceil(BLOCK)
    }

    /// Scales of a block; none where a row has but one.
    fn scales_a_block(&self) -> usize {
        self.scales.group().map_or(0, |group| BLOCK / group)
    }

    /// The scales of row `first` and of those behind it as f32, as many rows as `out` holds: `scales_a_block` for each
    /// block, zeros behind the last of a row.
    fn scales_of(&self, level: Level, first: usize, out: &mut [f32]) {
        let (count, room) = (self.scales.per_row(), self.blocks() * self.scales_a_block());
        let Some((bytes, dtype)) = self.scales.of_groups() else { return };
        for (row, out) in (first..).zip(out.chunks_exact_mut(room)) {
            widen_scales(level, bytes, dtype, row * count, &mut out[..count]);
            out[count..].fill(0.0);
        }
    }
}

/// A layer and where its output goes: `activation(x · weightᵀ + bias)`, `[rows, outputs]`.
pub(crate) struct Layer<'a> {
    codes: Codes<'a>,
    bias: Option<&'a [f32]>,
    activation: Activation,
    out: SharedSlice<'a, f32>,
}

impl<'a> Layer<'a> {
    /// `bias` has as many elements as there are outputs, `out` as many times `rows`.
    pub(crate) fn new(codes: Codes<'a>, bias: Option<&'a [f32]>, activation: Activation, out: &'a mut [f32]) -> Self {
        Layer { codes, bias, activation, out: SharedSlice::new(out) }
    }

    /// Bias and activation of outputs `first .. first + count` of some rows, whose sums are there.
    fn finish(&self, level: Level, rows: std::ops::Range<usize>, first: usize, count: usize) {
        let bias = self.bias.map(|bias| &bias[first..first + count]);
        if bias.is_none() && self.activation == Activation::Identity {
            return;
        }
        for row in rows {
            // SAFETY: each task has outputs of its own.
            let piece = unsafe { self.out.range(row * self.codes.outputs + first, count) };
            level.run(Finish { row: piece, bias, activation: self.activation });
        }
    }
}

/// What several layers of equal bits make of one x `[rows, depth]`.
pub(crate) fn linear(level: Level, pool: &ThreadPool, x: &[f32], rows: usize, layers: &[Layer<'_>]) {
    let Some(Layer { codes: Codes { bits, depth, .. }, .. }) = layers.first() else { return };
    debug_assert!(layers.iter().all(|layer| layer.codes.bits == *bits && layer.codes.depth == *depth));
    let few = rows <= DOT_ROWS;
    let order = match (bits, few) {
        (Bits::Eight, _) => Order::Natural,
        (Bits::Four, true) => Order::Halves,
        (Bits::Four, false) => Order::Words,
    };
    with_quantised(level, pool, x, rows, *depth, order, |x| {
        if few {
            dots::dots(level, pool, x, layers);
        } else {
            product::product(level, pool, x, layers);
        }
    });
}

/// The layer of task `task`, and which of its tasks this is, where each layer has `tasks(layer)` tasks.
fn layer_of<'a, 'b>(
    layers: &'a [Layer<'b>],
    mut task: usize,
    tasks: impl Fn(&Layer<'b>) -> usize,
) -> Option<(&'a Layer<'b>, usize)> {
    for layer in layers {
        let own = tasks(layer);
        if task < own {
            return Some((layer, task));
        }
        task -= own;
    }
    None
}

#[cfg(test)]
mod tests;
