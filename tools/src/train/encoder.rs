//! A transformer encoder's layers, forward and backward, for one worker's share of a batch: SigLIP's
//! (norm before each branch) and BERT's (norm behind each residual sum). Used by the tower and the verifier.

use super::ops::{self, SelfAttention};
use super::parameters::{Plan, Treatment, two};
use std::ops::Range;

/// Where the layer norms stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlace {
    /// `x + branch(norm(x))`: SigLIP.
    Before,
    /// `norm(x + branch(x))`: BERT.
    After,
}

/// Sizes of an encoder.
#[derive(Clone, Copy, Debug)]
pub struct EncoderSize {
    /// Width of the residual stream.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of the hidden layer of the feed-forward branch.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Epsilon of the norms.
    pub eps: f32,
    /// Where the norms stand.
    pub norm: NormPlace,
}

/// Names of a layer's tensors behind its prefix, in the order they are laid out.
pub struct LayerNames {
    /// Query, key and value projections.
    pub qkv: [&'static str; 3],
    /// The attention's output projection.
    pub out: &'static str,
    /// The attention's norm.
    pub norm1: &'static str,
    /// The feed-forward branch, first and second.
    pub feed: [&'static str; 2],
    /// The feed-forward branch's norm.
    pub norm2: &'static str,
}

/// SigLIP's names.
pub const SIGLIP_NAMES: LayerNames = LayerNames {
    qkv: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    out: "self_attn.out_proj",
    norm1: "layer_norm1",
    feed: ["mlp.fc1", "mlp.fc2"],
    norm2: "layer_norm2",
};

/// BERT's names.
pub const BERT_NAMES: LayerNames = LayerNames {
    qkv: ["attention.self.query", "attention.self.key", "attention.self.value"],
    out: "attention.output.dense",
    norm1: "attention.output.LayerNorm",
    feed: ["intermediate.dense", "output.dense"],
    norm2: "output.LayerNorm",
};

/// Weight and bias of a projection or norm. The bias always lies behind the weight in the plan.
#[derive(Clone, Debug)]
pub struct Affine {
    /// Place of the weight.
    pub weight: Range<usize>,
    /// Place of the bias.
    pub bias: Range<usize>,
}

impl Affine {
    /// A projection `[outputs, inputs]` with decay on its weight.
    pub fn projection(plan: &mut Plan, name: &str, outputs: usize, inputs: usize, rate: f32) -> Self {
        let weight = plan.add(format!("{name}.weight"), &[outputs, inputs], Treatment { decay: true, rate });
        let bias = plan.add(format!("{name}.bias"), &[outputs], Treatment { decay: false, rate });
        Self { weight, bias }
    }

    /// A layer norm.
    pub fn norm(plan: &mut Plan, name: &str, width: usize, rate: f32) -> Self {
        let weight = plan.add(format!("{name}.weight"), &[width], Treatment { decay: false, rate });
        let bias = plan.add(format!("{name}.bias"), &[width], Treatment { decay: false, rate });
        Self { weight, bias }
    }

    /// [`ops::linear`].
    pub fn linear(&self, values: &[f32], x: &[f32], rows: usize, out: &mut [f32]) {
        ops::linear(x, rows, &values[self.weight.clone()], &values[self.bias.clone()], out);
    }

    /// [`ops::linear_backward`].
    pub fn linear_backward(
        &self,
        values: &[f32],
        gradients: &mut [f32],
        x: &[f32],
        rows: usize,
        out_gradient: &[f32],
        x_gradient: Option<&mut [f32]>,
    ) {
        let (weight_gradient, bias_gradient) = two(gradients, &self.weight, &self.bias);
        let weight = &values[self.weight.clone()];
        ops::linear_backward(x, rows, weight, out_gradient, weight_gradient, bias_gradient, x_gradient);
    }

    /// [`ops::layer_norm`].
    pub fn layer_norm(&self, values: &[f32], x: &[f32], eps: f32, out: &mut [f32], statistics: &mut [f32]) {
        ops::layer_norm(x, &values[self.weight.clone()], &values[self.bias.clone()], eps, out, statistics);
    }

    /// [`ops::layer_norm_backward`]; adds to `x_gradient`.
    pub fn layer_norm_backward(
        &self,
        values: &[f32],
        gradients: &mut [f32],
        x: &[f32],
        statistics: &[f32],
        out_gradient: &[f32],
        x_gradient: &mut [f32],
    ) {
        let (weight_gradient, bias_gradient) = two(gradients, &self.weight, &self.bias);
        let weight = &values[self.weight.clone()];
        ops::layer_norm_backward(x, weight, statistics, out_gradient, weight_gradient, bias_gradient, x_gradient);
    }
}

/// Places of one layer's parameters. The three projections of the attention lie side by side, so that one product
/// does all of them.
#[derive(Clone, Debug)]
struct Layer {
    qkv: Affine,
    out: Affine,
    norm1: Affine,
    first: Affine,
    second: Affine,
    norm2: Affine,
}

/// An encoder's layers: sizes and the places of their parameters.
#[derive(Clone, Debug)]
pub struct Encoder {
    size: EncoderSize,
    layers: Vec<Layer>,
}

/// What a layer's forward pass keeps for its backward pass.
#[derive(Default)]
struct Kept {
    normal1: Vec<f32>,
    statistics1: Vec<f32>,
    qkv: Vec<f32>,
    scores: Vec<f32>,
    mixed: Vec<f32>,
    middle: Vec<f32>,
    normal2: Vec<f32>,
    statistics2: Vec<f32>,
    before: Vec<f32>,
    hidden: Vec<f32>,
    out: Vec<f32>,
}

/// Buffers of one worker; they grow to the largest batch seen and are then reused.
#[derive(Default)]
pub struct EncoderBuffers {
    /// Dropout on each branch, for training: the rate, and a seed that must differ from batch to batch.
    pub dropout: Option<(f32, u32)>,
    kept: Vec<Kept>,
    wide: Vec<f32>,
    narrow: Vec<f32>,
    branch: Vec<f32>,
    qkv: Vec<f32>,
    scratch: Vec<f32>,
}

impl EncoderBuffers {
    /// The last layer's output.
    pub fn output(&self) -> &[f32] {
        self.kept.last().map_or(&[], |kept| &kept.out)
    }
}

/// The sequences of one call.
#[derive(Clone, Copy)]
pub struct Sequences<'a> {
    /// Rows a sequence, padding included.
    pub tokens: usize,
    /// Rows of each sequence that are no padding.
    pub visible: &'a [usize],
}

impl Sequences<'_> {
    /// Rows of all sequences, padding included.
    pub fn rows(&self) -> usize {
        self.tokens * self.visible.len()
    }
}

impl Encoder {
    /// Adds the layers' tensors to the plan. `prefix` stands before the layer's number, `rate` gives each layer's
    /// factor on the learning rate.
    pub fn new(
        plan: &mut Plan,
        prefix: &str,
        names: &LayerNames,
        size: EncoderSize,
        rate: impl Fn(usize) -> f32,
    ) -> Self {
        let EncoderSize { width, hidden, .. } = size;
        let layers = (0..size.layers)
            .map(|index| {
                let rate = rate(index);
                let name = |part: &str| format!("{prefix}.{index}.{part}");
                let part = |plan: &mut Plan, part: &str, shape: &[usize], decay| {
                    plan.add(name(part), shape, Treatment { decay, rate })
                };
                let weights = names.qkv.map(|n| part(plan, &format!("{n}.weight"), &[width, width], true));
                let biases = names.qkv.map(|n| part(plan, &format!("{n}.bias"), &[width], false));
                Layer {
                    qkv: Affine { weight: weights[0].start..weights[2].end, bias: biases[0].start..biases[2].end },
                    out: Affine::projection(plan, &name(names.out), width, width, rate),
                    norm1: Affine::norm(plan, &name(names.norm1), width, rate),
                    first: Affine::projection(plan, &name(names.feed[0]), hidden, width, rate),
                    second: Affine::projection(plan, &name(names.feed[1]), width, hidden, rate),
                    norm2: Affine::norm(plan, &name(names.norm2), width, rate),
                }
            })
            .collect();
        Self { size, layers }
    }

    fn attention(&self) -> SelfAttention {
        let EncoderSize { width, heads, .. } = self.size;
        SelfAttention { heads, key_heads: heads, head_dim: width / heads, causal: false }
    }

    /// x `[sequences, tokens, width]` → [`EncoderBuffers::output`], of the same shape.
    pub fn forward(&self, values: &[f32], x: &[f32], sequences: Sequences, buffers: &mut EncoderBuffers) {
        let EncoderSize { width, heads, hidden, eps, norm, .. } = self.size;
        let (rows, tokens) = (sequences.rows(), sequences.tokens);
        let EncoderBuffers { kept: all, branch, dropout, .. } = buffers;
        all.resize_with(self.layers.len(), Kept::default);
        branch.resize(rows * width, 0.0);
        for (index, layer) in self.layers.iter().enumerate() {
            let (before, rest) = all.split_at_mut(index);
            let x = before.last().map_or(x, |kept| &kept.out);
            let kept = &mut rest[0];
            for (buffer, per_row) in [
                (&mut kept.normal1, width),
                (&mut kept.statistics1, 2),
                (&mut kept.qkv, 3 * width),
                (&mut kept.scores, heads * tokens),
                (&mut kept.mixed, width),
                (&mut kept.middle, width),
                (&mut kept.normal2, width),
                (&mut kept.statistics2, 2),
                (&mut kept.before, hidden),
                (&mut kept.hidden, hidden),
                (&mut kept.out, width),
            ] {
                buffer.resize(rows * per_row, 0.0);
            }
            if norm == NormPlace::Before {
                layer.norm1.layer_norm(values, x, eps, &mut kept.normal1, &mut kept.statistics1);
            }
            let input: &[f32] = if norm == NormPlace::Before { &kept.normal1 } else { x };
            layer.qkv.linear(values, input, rows, &mut kept.qkv);
            for (sequence, visible) in sequences.visible.iter().enumerate() {
                self.attention().forward(
                    &kept.qkv[sequence * tokens * 3 * width..][..tokens * 3 * width],
                    tokens,
                    *visible,
                    &mut kept.mixed[sequence * tokens * width..][..tokens * width],
                    &mut kept.scores[sequence * heads * tokens * tokens..][..heads * tokens * tokens],
                );
            }
            layer.out.linear(values, &kept.mixed, rows, branch);
            drop_out(*dropout, 2 * index, branch);
            // `middle` is what the second norm (before) or the first norm (after) reads.
            add(x, branch, &mut kept.middle);
            match norm {
                NormPlace::Before => {
                    layer.norm2.layer_norm(values, &kept.middle, eps, &mut kept.normal2, &mut kept.statistics2);
                    layer.first.linear(values, &kept.normal2, rows, &mut kept.before);
                    ops::gelu(&kept.before, &mut kept.hidden);
                    layer.second.linear(values, &kept.hidden, rows, branch);
                    drop_out(*dropout, 2 * index + 1, branch);
                    add(&kept.middle, branch, &mut kept.out);
                }
                NormPlace::After => {
                    layer.norm1.layer_norm(values, &kept.middle, eps, &mut kept.normal1, &mut kept.statistics1);
                    layer.first.linear(values, &kept.normal1, rows, &mut kept.before);
                    ops::gelu(&kept.before, &mut kept.hidden);
                    layer.second.linear(values, &kept.hidden, rows, branch);
                    drop_out(*dropout, 2 * index + 1, branch);
                    // `normal2` keeps the sum that the second norm reads.
                    add(&kept.normal1, branch, &mut kept.normal2);
                    layer.norm2.layer_norm(values, &kept.normal2, eps, &mut kept.out, &mut kept.statistics2);
                }
            }
        }
    }

    /// Backward of [`Encoder::forward`] with the same arguments: adds to `gradients`; `gradient` is that of the
    /// output on entry and that of `x` on return, `[sequences, tokens, width]`.
    pub fn backward(
        &self,
        values: &[f32],
        gradients: &mut [f32],
        x: &[f32],
        sequences: Sequences,
        buffers: &mut EncoderBuffers,
        gradient: &mut [f32],
    ) {
        let EncoderSize { width, heads, hidden, norm, .. } = self.size;
        let (rows, tokens) = (sequences.rows(), sequences.tokens);
        let EncoderBuffers { kept: all, wide, narrow, branch, qkv, scratch, dropout } = buffers;
        wide.resize(rows * hidden, 0.0);
        narrow.resize(rows * width, 0.0);
        branch.resize(rows * width, 0.0);
        qkv.resize(rows * 3 * width, 0.0);
        scratch.resize(tokens * tokens, 0.0);
        for (index, layer) in self.layers.iter().enumerate().rev() {
            let x = if index == 0 { x } else { &all[index - 1].out };
            let kept = &all[index];
            // Through the feed-forward branch; afterwards `gradient` is that of `middle` (before) or of `normal1`
            // (after).
            if norm == NormPlace::After {
                branch.fill(0.0);
                layer.norm2.layer_norm_backward(values, gradients, &kept.normal2, &kept.statistics2, gradient, branch);
                gradient.copy_from_slice(branch);
            }
            let input = if norm == NormPlace::Before { &kept.normal2 } else { &kept.normal1 };
            branch.copy_from_slice(gradient);
            drop_out(*dropout, 2 * index + 1, branch);
            layer.second.linear_backward(values, gradients, &kept.hidden, rows, branch, Some(wide));
            ops::gelu_backward(&kept.before, wide);
            layer.first.linear_backward(values, gradients, input, rows, wide, Some(narrow));
            match norm {
                NormPlace::Before => {
                    let (middle, statistics) = (&kept.middle, &kept.statistics2);
                    layer.norm2.layer_norm_backward(values, gradients, middle, statistics, narrow, gradient);
                }
                NormPlace::After => {
                    accumulate(gradient, narrow);
                    branch.fill(0.0);
                    let (middle, statistics) = (&kept.middle, &kept.statistics1);
                    layer.norm1.layer_norm_backward(values, gradients, middle, statistics, gradient, branch);
                    gradient.copy_from_slice(branch);
                }
            }
            // Through the attention; afterwards `gradient` is that of the layer's input.
            narrow.copy_from_slice(gradient);
            drop_out(*dropout, 2 * index, narrow);
            layer.out.linear_backward(values, gradients, &kept.mixed, rows, narrow, Some(branch));
            for sequence in 0..sequences.visible.len() {
                self.attention().backward(
                    &kept.qkv[sequence * tokens * 3 * width..][..tokens * 3 * width],
                    tokens,
                    &kept.scores[sequence * heads * tokens * tokens..][..heads * tokens * tokens],
                    &branch[sequence * tokens * width..][..tokens * width],
                    &mut qkv[sequence * tokens * 3 * width..][..tokens * 3 * width],
                    scratch,
                );
            }
            let input: &[f32] = if norm == NormPlace::Before { &kept.normal1 } else { x };
            layer.qkv.linear_backward(values, gradients, input, rows, qkv, Some(narrow));
            match norm {
                NormPlace::Before => {
                    layer.norm1.layer_norm_backward(values, gradients, x, &kept.statistics1, narrow, gradient);
                }
                NormPlace::After => accumulate(gradient, narrow),
            }
        }
    }
}

/// Dropout on a branch; each of the encoder's branches has a place of its own in the hash's sequence.
fn drop_out(dropout: Option<(f32, u32)>, place: usize, branch: &mut [f32]) {
    if let Some((rate, seed)) = dropout {
        ops::dropout(branch, rate, seed.wrapping_mul(64).wrapping_add(place as u32));
    }
}

fn add(x: &[f32], y: &[f32], out: &mut [f32]) {
    for ((out, x), y) in out.iter_mut().zip(x).zip(y) {
        *out = x + y;
    }
}

fn accumulate(sum: &mut [f32], x: &[f32]) {
    sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::train::parameters::check_gradients;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn check(norm: NormPlace) {
        let size = EncoderSize { width: 12, heads: 3, hidden: 20, layers: 2, eps: 1e-6, norm };
        let mut plan = Plan::default();
        let encoder = Encoder::new(&mut plan, "layer", &BERT_NAMES, size, |_| 1.0);
        let input = plan.add("input", &[2, 5, 12], Treatment { decay: false, rate: 1.0 });
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut values: Vec<f32> = (0..plan.len()).map(|_| rng.random_range(-0.5..0.5)).collect();
        let sequences = Sequences { tokens: 5, visible: &[5, 3] };
        let mut weights: Vec<f32> = (0..2 * 5 * 12).map(|_| rng.random_range(-1.0..1.0)).collect();
        weights[8 * 12..].fill(0.0);
        let mut gradients = vec![0.0; plan.len()];
        let mut buffers = EncoderBuffers { dropout: Some((0.2, 5)), ..EncoderBuffers::default() };
        let x = values[input.clone()].to_vec();
        encoder.forward(&values, &x, sequences, &mut buffers);
        let mut gradient = weights.clone();
        encoder.backward(&values, &mut gradients, &x, sequences, &mut buffers, &mut gradient);
        gradients[input.clone()].copy_from_slice(&gradient);
        check_gradients(&plan, &mut values, &gradients, |values| {
            encoder.forward(values, &values[input.clone()], sequences, &mut buffers);
            buffers.output().iter().zip(&weights).map(|(x, w)| f64::from(x * w)).sum()
        });
    }

    #[test]
    fn gradients_equal_finite_differences_with_norms_before() {
        check(NormPlace::Before);
    }

    #[test]
    fn gradients_equal_finite_differences_with_norms_after() {
        check(NormPlace::After);
    }
}
