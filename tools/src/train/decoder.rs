//! A Qwen2-shaped decoder's layers and last norm, forward and backward, for one worker's share of a batch. Embeddings,
//! head and loss are the caller's: see [`super::ops`].

use super::encoder::{Affine, Sequences};
use super::ops::{self, SelfAttention};
use super::parameters::{Plan, Treatment};
use std::ops::Range;

/// Sizes of a decoder.
#[derive(Clone, Copy, Debug)]
pub struct DecoderSize {
    /// Width of the residual stream.
    pub width: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub key_heads: usize,
    /// Width of the hidden layer of the feed-forward branch.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Epsilon of the norms.
    pub eps: f32,
    /// Base of the rotary positions.
    pub theta: f32,
}

/// Places of one layer's parameters. Queries, keys and values lie side by side, as do gate and up.
#[derive(Clone, Debug)]
struct Layer {
    norm1: Range<usize>,
    qkv: Affine,
    out: Range<usize>,
    norm2: Range<usize>,
    gate: Range<usize>,
    up: Range<usize>,
    down: Range<usize>,
}

/// A decoder's layers: sizes and the places of their parameters.
#[derive(Clone, Debug)]
pub struct Decoder {
    size: DecoderSize,
    layers: Vec<Layer>,
    norm: Range<usize>,
}

/// What a layer's forward pass keeps for its backward pass.
#[derive(Default)]
struct Kept {
    normal1: Vec<f32>,
    scales1: Vec<f32>,
    qkv: Vec<f32>,
    scores: Vec<f32>,
    mixed: Vec<f32>,
    middle: Vec<f32>,
    normal2: Vec<f32>,
    scales2: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    hidden: Vec<f32>,
    out: Vec<f32>,
}

/// Buffers of one worker; they take the size of the last batch.
#[derive(Default)]
pub struct DecoderBuffers {
    kept: Vec<Kept>,
    output: Vec<f32>,
    scales: Vec<f32>,
    branch: Vec<f32>,
    wide: [Vec<f32>; 3],
    qkv: Vec<f32>,
    scratch: Vec<f32>,
}

impl DecoderBuffers {
    /// The normed output, `[sequences, tokens, width]`.
    pub fn output(&self) -> &[f32] {
        &self.output
    }
}

impl Decoder {
    /// Adds the layers' and the last norm's tensors to the plan, under Qwen2's names.
    pub fn new(plan: &mut Plan, size: DecoderSize) -> Self {
        let DecoderSize { width, heads, key_heads, hidden, .. } = size;
        let head_dim = width / heads;
        let plain = Treatment { decay: false, rate: 1.0 };
        let decayed = Treatment { decay: true, rate: 1.0 };
        let layers = (0..size.layers)
            .map(|index| {
                let name = |part: &str| format!("model.layers.{index}.{part}");
                let norm1 = plan.add(name("input_layernorm.weight"), &[width], plain);
                let rows = [("q", heads), ("k", key_heads), ("v", key_heads)].map(|(part, n)| (part, n * head_dim));
                let weights = rows.map(|(part, rows)| {
                    plan.add(name(&format!("self_attn.{part}_proj.weight")), &[rows, width], decayed)
                });
                let biases =
                    rows.map(|(part, rows)| plan.add(name(&format!("self_attn.{part}_proj.bias")), &[rows], plain));
                Layer {
                    norm1,
                    qkv: Affine { weight: weights[0].start..weights[2].end, bias: biases[0].start..biases[2].end },
                    out: plan.add(name("self_attn.o_proj.weight"), &[width, width], decayed),
                    norm2: plan.add(name("post_attention_layernorm.weight"), &[width], plain),
                    gate: plan.add(name("mlp.gate_proj.weight"), &[hidden, width], decayed),
                    up: plan.add(name("mlp.up_proj.weight"), &[hidden, width], decayed),
                    down: plan.add(name("mlp.down_proj.weight"), &[width, hidden], decayed),
                }
            })
            .collect();
        Self { size, layers, norm: plan.add("model.norm.weight", &[width], plain) }
    }

    fn attention(&self) -> SelfAttention {
        let DecoderSize { width, heads, key_heads, .. } = self.size;
        SelfAttention { heads, key_heads, head_dim: width / heads, causal: true }
    }

    fn turn(&self, qkv: &mut [f32], tokens: usize, turn: f32) {
        let SelfAttention { heads, key_heads, head_dim, .. } = self.attention();
        let row = self.attention().row();
        for sequence in qkv.chunks_exact_mut(tokens * row) {
            // Queries and keys stand first in a row.
            ops::rope(sequence, row, heads + key_heads, head_dim, self.size.theta, turn);
        }
    }

    /// x `[sequences, tokens, width]` → [`DecoderBuffers::output`], of the same shape. Rows behind a sequence's
    /// visible ones are padding: nothing before them sees them.
    pub fn forward(&self, values: &[f32], x: &[f32], sequences: Sequences, buffers: &mut DecoderBuffers) {
        let DecoderSize { width, heads, hidden, eps, .. } = self.size;
        let (rows, tokens) = (sequences.rows(), sequences.tokens);
        let attention = self.attention();
        buffers.kept.resize_with(self.layers.len(), Kept::default);
        buffers.branch.resize(rows * width, 0.0);
        for (index, layer) in self.layers.iter().enumerate() {
            let (before, rest) = buffers.kept.split_at_mut(index);
            let x = before.last().map_or(x, |kept| &kept.out);
            let kept = &mut rest[0];
            for (buffer, per_row) in [
                (&mut kept.normal1, width),
                (&mut kept.scales1, 1),
                (&mut kept.qkv, attention.row()),
                (&mut kept.scores, heads * tokens),
                (&mut kept.mixed, width),
                (&mut kept.middle, width),
                (&mut kept.normal2, width),
                (&mut kept.scales2, 1),
                (&mut kept.gate, hidden),
                (&mut kept.up, hidden),
                (&mut kept.hidden, hidden),
                (&mut kept.out, width),
            ] {
                buffer.resize(rows * per_row, 0.0);
            }
            ops::rms_norm(x, &values[layer.norm1.clone()], eps, &mut kept.normal1, &mut kept.scales1);
            layer.qkv.linear(values, &kept.normal1, rows, &mut kept.qkv);
            self.turn(&mut kept.qkv, tokens, 1.0);
            for (sequence, visible) in sequences.visible.iter().enumerate() {
                attention.forward(
                    &kept.qkv[sequence * tokens * attention.row()..][..tokens * attention.row()],
                    tokens,
                    *visible,
                    &mut kept.mixed[sequence * tokens * width..][..tokens * width],
                    &mut kept.scores[sequence * heads * tokens * tokens..][..heads * tokens * tokens],
                );
            }
            ops::project(&kept.mixed, rows, &values[layer.out.clone()], width, &mut buffers.branch);
            add(x, &buffers.branch, &mut kept.middle);
            ops::rms_norm(&kept.middle, &values[layer.norm2.clone()], eps, &mut kept.normal2, &mut kept.scales2);
            ops::project(&kept.normal2, rows, &values[layer.gate.clone()], width, &mut kept.gate);
            ops::project(&kept.normal2, rows, &values[layer.up.clone()], width, &mut kept.up);
            ops::gated_silu(&kept.gate, &kept.up, &mut kept.hidden);
            ops::project(&kept.hidden, rows, &values[layer.down.clone()], hidden, &mut buffers.branch);
            add(&kept.middle, &buffers.branch, &mut kept.out);
        }
        buffers.output.resize(rows * width, 0.0);
        buffers.scales.resize(rows, 0.0);
        let last = buffers.kept.last().map_or(x, |kept| &kept.out);
        ops::rms_norm(last, &values[self.norm.clone()], eps, &mut buffers.output, &mut buffers.scales);
    }

    /// Backward of [`Decoder::forward`] with the same arguments: adds to `gradients`; `gradient` is that of the output
    /// on entry and that of `x` on return, `[sequences, tokens, width]`.
    pub fn backward(
        &self,
        values: &[f32],
        gradients: &mut [f32],
        x: &[f32],
        sequences: Sequences,
        buffers: &mut DecoderBuffers,
        gradient: &mut [f32],
    ) {
        let DecoderSize { width, heads, hidden, .. } = self.size;
        let (rows, tokens) = (sequences.rows(), sequences.tokens);
        let attention = self.attention();
        let DecoderBuffers { kept: all, scales, branch, wide: [wide, gates, ups], qkv, scratch, .. } = buffers;
        for buffer in [&mut *wide, &mut *gates, &mut *ups] {
            buffer.resize(rows * hidden, 0.0);
        }
        qkv.resize(rows * attention.row(), 0.0);
        scratch.resize(tokens * tokens, 0.0);
        branch.clear();
        branch.resize(rows * width, 0.0);
        let last = all.last().map_or(x, |kept| &kept.out);
        let (weight, slot) = (&values[self.norm.clone()], self.norm.clone());
        ops::rms_norm_backward(last, weight, scales, gradient, &mut gradients[slot], branch);
        gradient.copy_from_slice(branch);
        for (index, layer) in self.layers.iter().enumerate().rev() {
            let x = if index == 0 { x } else { &all[index - 1].out };
            let kept = &all[index];
            let weight = |range: &Range<usize>| &values[range.clone()];
            let mut project = |x: &[f32], range: &Range<usize>, inputs, g: &[f32], out: &mut [f32], more| {
                let slot = &mut gradients[range.clone()];
                ops::project_backward(x, rows, weight(range), inputs, g, slot, Some(out), more);
            };
            // Through the feed-forward branch; afterwards `gradient` is that of `middle`.
            project(&kept.hidden, &layer.down, hidden, gradient, wide, false);
            ops::gated_silu_backward(&kept.gate, &kept.up, wide, gates, ups);
            project(&kept.normal2, &layer.gate, width, gates, branch, false);
            project(&kept.normal2, &layer.up, width, ups, branch, true);
            let slot = &mut gradients[layer.norm2.clone()];
            ops::rms_norm_backward(&kept.middle, weight(&layer.norm2), &kept.scales2, branch, slot, gradient);
            // Through the attention; afterwards `gradient` is that of the layer's input.
            let slot = &mut gradients[layer.out.clone()];
            ops::project_backward(&kept.mixed, rows, weight(&layer.out), width, gradient, slot, Some(branch), false);
            for sequence in 0..sequences.visible.len() {
                attention.backward(
                    &kept.qkv[sequence * tokens * attention.row()..][..tokens * attention.row()],
                    tokens,
                    &kept.scores[sequence * heads * tokens * tokens..][..heads * tokens * tokens],
                    &branch[sequence * tokens * width..][..tokens * width],
                    &mut qkv[sequence * tokens * attention.row()..][..tokens * attention.row()],
                    scratch,
                );
            }
            self.turn(qkv, tokens, -1.0);
            layer.qkv.linear_backward(values, gradients, &kept.normal1, rows, qkv, Some(branch));
            let slot = &mut gradients[layer.norm1.clone()];
            ops::rms_norm_backward(x, weight(&layer.norm1), &kept.scales1, branch, slot, gradient);
        }
    }
}

fn add(x: &[f32], y: &[f32], out: &mut [f32]) {
    for ((out, x), y) in out.iter_mut().zip(x).zip(y) {
        *out = x + y;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::train::parameters::check_gradients;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn gradients_equal_finite_differences() {
        let size = DecoderSize { width: 16, heads: 4, key_heads: 2, hidden: 20, layers: 2, eps: 1e-6, theta: 10_000.0 };
        let mut plan = Plan::default();
        let decoder = Decoder::new(&mut plan, size);
        let input = plan.add("input", &[2, 5, 16], Treatment { decay: false, rate: 1.0 });
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        let mut values: Vec<f32> = (0..plan.len()).map(|_| rng.random_range(-0.5..0.5)).collect();
        let wanted: Vec<f32> = (0..2 * 5 * 16).map(|_| rng.random_range(-1.0..1.0)).collect();
        let sequences = Sequences { tokens: 5, visible: &[5, 3] };
        // A weighted sum of the visible outputs stands for the loss.
        let weights: Vec<f32> = (0..wanted.len()).map(|i| if i / 16 < 8 { wanted[i] } else { 0.0 }).collect();
        let mut gradients = vec![0.0; plan.len()];
        let mut buffers = DecoderBuffers::default();
        let x = values[input.clone()].to_vec();
        decoder.forward(&values, &x, sequences, &mut buffers);
        let mut gradient = weights.clone();
        decoder.backward(&values, &mut gradients, &x, sequences, &mut buffers, &mut gradient);
        gradients[input.clone()].copy_from_slice(&gradient);
        check_gradients(&plan, &mut values, &gradients, |values| {
            decoder.forward(values, &values[input.clone()], sequences, &mut buffers);
            buffers.output().iter().zip(&weights).map(|(x, w)| f64::from(x * w)).sum()
        });
    }
}
