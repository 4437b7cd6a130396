//! The Qwen2-shaped decoder, forward and backward, over one worker's share of a batch. Sequences of any length lie one
//! behind the other without padding; each branches into continuations of one prompt, so that the prompt and its video
//! tokens are computed once for all of them. Its weights are trained, or stay and have low-rank factors beside them that
//! are.

use super::layers::{GroupedAttention, Projection, Rotary, Tree, accumulate, fit, zeros};
use super::lora::{Lora, LoraSettings, Module, Pair};
use super::ops::{self, Matrix};
use super::parameters::{Plan, Treatment};
use std::ops::Range;

/// Elements of logits that are computed at once: vocabularies are large.
const LOGITS: usize = 1 << 22;

/// Sizes of a decoder.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecoderSize {
    /// Width of the residual stream.
    pub width: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub key_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the feed-forward branch.
    pub hidden: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Base of the rotary frequencies.
    pub theta: f32,
    /// Epsilon of the norms.
    pub eps: f32,
    /// Whether the embedding is the output head too.
    pub tied: bool,
}

/// A projection and the factors beside it.
struct Adapted {
    projection: Projection,
    pairs: Vec<Pair>,
}

struct Layer {
    norm1: Range<usize>,
    qkv: Adapted,
    qkv_bias: Range<usize>,
    out: Adapted,
    norm2: Range<usize>,
    /// Gate and up projections side by side.
    wide: Adapted,
    down: Adapted,
}

/// The decoder: sizes and the places of its parameters.
pub struct Decoder {
    /// Sizes.
    pub size: DecoderSize,
    /// Place of the embedding, `[vocabulary, width]`.
    pub embedding: Range<usize>,
    layers: Vec<Layer>,
    norm: Range<usize>,
    /// Place of the output head, `[vocabulary, width]`.
    head: Range<usize>,
    rotary: Rotary,
    lora: Option<Lora>,
    temperature: f32,
}

/// Values of the parameters: those of the decoder, and those of the factors beside it; without these the decoder is as
/// if it had none.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    /// The decoder's, in the order of its plan.
    pub base: &'a [f32],
    /// The factors', in the order of [`Lora::plan`].
    pub low_rank: Option<&'a [f32]>,
}

impl<'a> Weights<'a> {
    /// The decoder alone.
    pub fn base(base: &'a [f32]) -> Self {
        Weights { base, low_rank: None }
    }
}

/// Where gradients are added to; what is not there is not computed.
pub struct Gradients<'a> {
    /// Of the decoder.
    pub base: Option<&'a mut [f32]>,
    /// Of the factors.
    pub low_rank: Option<&'a mut [f32]>,
}

/// What a layer's forward pass keeps.
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
    wide: Vec<f32>,
    gated: Vec<f32>,
}

/// Buffers of one worker.
#[derive(Default)]
pub struct DecoderBuffers {
    /// Keep no more than each layer's input and compute the rest anew in the backward pass (Chen et al. 2016): a third
    /// more time for a fraction of the memory.
    pub checkpointing: bool,
    inputs: Vec<Vec<f32>>,
    kept: Vec<Kept>,
    last: Vec<f32>,
    normal: Vec<f32>,
    scales: Vec<f32>,
    logits: Vec<f32>,
    picked: Vec<f32>,
    picked_gradient: Vec<f32>,
    gradient: Vec<f32>,
    again: Vec<f32>,
    branch: Vec<f32>,
    wide: Vec<f32>,
    gated: Vec<f32>,
    qkv: Vec<f32>,
    scratch: Vec<f32>,
    unused: Vec<f32>,
    low_rank: LowRankScratch,
}

#[derive(Default)]
struct LowRankScratch {
    inner: Vec<f32>,
    inner_gradient: Vec<f32>,
    branch: Vec<f32>,
}

/// A token to predict: after which row of the batch, which id, with what weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// Row of the whole batch.
    pub row: usize,
    /// Id of the next token.
    pub id: u32,
    /// Weight of its loss.
    pub weight: f32,
}

impl Adapted {
    /// x `[rows, inputs]` → out `[rows, outputs]`.
    fn forward(
        &self,
        weights: Weights<'_>,
        x: &[f32],
        rows: usize,
        scale: f32,
        scratch: &mut LowRankScratch,
        out: &mut [f32],
    ) {
        self.projection.forward(weights.base, x, rows, out);
        let Some(low_rank) = weights.low_rank else { return };
        let (inputs, outputs) = (self.projection.inputs, self.projection.outputs);
        for pair in &self.pairs {
            let (rank, own) = (pair.rank, pair.outputs);
            let inner = fit(&mut scratch.inner, rows * rank);
            let a = Matrix::transposed(&low_rank[pair.a.clone()], inputs);
            ops::multiply(inner, rows, rank, inputs, Matrix::new(x, inputs), a, false);
            let branch = fit(&mut scratch.branch, rows * own);
            let b = Matrix::transposed(&low_rank[pair.b.clone()], rank);
            ops::multiply(branch, rows, own, rank, Matrix::new(inner, rank), b, false);
            for (out, branch) in out.chunks_exact_mut(outputs).zip(branch.chunks_exact(own)) {
                out[pair.offset..][..own].iter_mut().zip(branch).for_each(|(out, branch)| *out += scale * branch);
            }
        }
    }

    /// Adds to the gradients that are wanted, and writes that of `x`.
    #[allow(clippy::too_many_arguments)]
    fn backward(
        &self,
        weights: Weights<'_>,
        gradients: &mut Gradients<'_>,
        x: &[f32],
        rows: usize,
        scale: f32,
        out_gradient: &[f32],
        scratch: &mut LowRankScratch,
        x_gradient: &mut [f32],
    ) {
        let (inputs, outputs) = (self.projection.inputs, self.projection.outputs);
        match &mut gradients.base {
            Some(base) => {
                self.projection.backward(weights.base, base, x, rows, out_gradient, Some(&mut *x_gradient), false)
            }
            None => {
                let weight = Matrix::new(&weights.base[self.projection.weight.clone()], inputs);
                ops::multiply(x_gradient, rows, inputs, outputs, Matrix::new(out_gradient, outputs), weight, false);
            }
        }
        let (Some(low_rank), Some(sums)) = (weights.low_rank, &mut gradients.low_rank) else { return };
        for pair in &self.pairs {
            let (rank, own) = (pair.rank, pair.outputs);
            let (a, b) = (&low_rank[pair.a.clone()], &low_rank[pair.b.clone()]);
            let out_gradient = &out_gradient[pair.offset..];
            let inner = fit(&mut scratch.inner, rows * rank);
            ops::multiply(inner, rows, rank, inputs, Matrix::new(x, inputs), Matrix::transposed(a, inputs), false);
            inner.iter_mut().for_each(|value| *value *= scale);
            let b_sum = &mut sums[pair.b.clone()];
            ops::multiply(
                b_sum,
                own,
                rank,
                rows,
                Matrix::transposed(out_gradient, outputs),
                Matrix::new(inner, rank),
                true,
            );
            let inner_gradient = fit(&mut scratch.inner_gradient, rows * rank);
            ops::multiply(
                inner_gradient,
                rows,
                rank,
                own,
                Matrix::new(out_gradient, outputs),
                Matrix::new(b, rank),
                false,
            );
            inner_gradient.iter_mut().for_each(|value| *value *= scale);
            let a_sum = &mut sums[pair.a.clone()];
            ops::multiply(
                a_sum,
                rank,
                inputs,
                rows,
                Matrix::transposed(inner_gradient, rank),
                Matrix::new(x, inputs),
                true,
            );
            ops::multiply(
                x_gradient,
                rows,
                inputs,
                rank,
                Matrix::new(inner_gradient, rank),
                Matrix::new(a, inputs),
                true,
            );
        }
    }
}

impl Decoder {
    /// Adds the tensors to the plan under the names of the published checkpoints. Sequences have at most `positions`
    /// rows.
    pub fn new(plan: &mut Plan, size: DecoderSize, positions: usize) -> Self {
        let DecoderSize { width, hidden, .. } = size;
        let (queries, keys) = (size.heads * size.head_dim, size.key_heads * size.head_dim);
        let plain = Treatment { decay: false, rate: 1.0 };
        let embedding = plan.add("model.embed_tokens.weight", &[size.vocabulary, width], plain);
        let adapted = |projection: Projection| Adapted { projection, pairs: Vec::new() };
        let layers = (0..size.layers)
            .map(|index| {
                let name = |part: &str| format!("model.layers.{index}.{part}");
                let norm1 = plan.add(name("input_layernorm.weight"), &[width], plain);
                let parts = [("q", queries), ("k", keys), ("v", keys)];
                let weights = parts.map(|(part, rows)| {
                    Projection::new(plan, &name(&format!("self_attn.{part}_proj.weight")), &[rows, width]).weight
                });
                let biases =
                    parts.map(|(part, rows)| plan.add(name(&format!("self_attn.{part}_proj.bias")), &[rows], plain));
                let out = Projection::new(plan, &name("self_attn.o_proj.weight"), &[width, queries]);
                let norm2 = plan.add(name("post_attention_layernorm.weight"), &[width], plain);
                let wide = ["gate", "up"].map(|part| {
                    Projection::new(plan, &name(&format!("mlp.{part}_proj.weight")), &[hidden, width]).weight
                });
                Layer {
                    norm1,
                    qkv: adapted(Projection {
                        weight: weights[0].start..weights[2].end,
                        outputs: queries + 2 * keys,
                        inputs: width,
                    }),
                    qkv_bias: biases[0].start..biases[2].end,
                    out: adapted(out),
                    norm2,
                    wide: adapted(Projection {
                        weight: wide[0].start..wide[1].end,
                        outputs: 2 * hidden,
                        inputs: width,
                    }),
                    down: adapted(Projection::new(plan, &name("mlp.down_proj.weight"), &[width, hidden])),
                }
            })
            .collect();
        let norm = plan.add("model.norm.weight", &[width], plain);
        let head = match size.tied {
            true => embedding.clone(),
            false => plan.add("lm_head.weight", &[size.vocabulary, width], Treatment { decay: true, rate: 1.0 }),
        };
        let rotary = Rotary::new(positions, size.head_dim, size.theta);
        Self { size, embedding, layers, norm, head, rotary, lora: None, temperature: 1.0 }
    }

    /// Puts low-rank factors beside the projections that the settings name.
    pub fn with_lora(mut self, settings: LoraSettings) -> Self {
        let mut lora = Lora::new(settings);
        let DecoderSize { width, hidden, heads, key_heads, head_dim, .. } = self.size;
        let (queries, keys) = (heads * head_dim, key_heads * head_dim);
        for (index, layer) in self.layers.iter_mut().enumerate() {
            let mut beside = |adapted: &mut Adapted, modules: &[(Module, usize)]| {
                let (inputs, mut offset) = (adapted.projection.inputs, 0);
                for &(module, outputs) in modules {
                    adapted.pairs.extend(lora.beside(index, module, inputs, outputs, offset));
                    offset += outputs;
                }
            };
            beside(&mut layer.qkv, &[(Module::Query, queries), (Module::Key, keys), (Module::Value, keys)]);
            beside(&mut layer.out, &[(Module::Output, width)]);
            beside(&mut layer.wide, &[(Module::Gate, hidden), (Module::Up, hidden)]);
            beside(&mut layer.down, &[(Module::Down, width)]);
        }
        self.lora = Some(lora);
        self
    }

    /// Takes the decoder for the policy that divides its logits by `temperature`, as rollouts are drawn from.
    pub fn set_temperature(&mut self, temperature: f32) {
        self.temperature = temperature;
    }

    /// The factors beside the weights.
    pub fn lora(&self) -> Option<&Lora> {
        self.lora.as_ref()
    }

    fn scale(&self) -> f32 {
        self.lora.as_ref().map_or(0.0, Lora::scale)
    }

    fn attention(&self) -> GroupedAttention {
        GroupedAttention { heads: self.size.heads, key_heads: self.size.key_heads, head_dim: self.size.head_dim }
    }

    /// One layer over the residual stream `x` `[rows, width]`, in place; what its backward pass needs stays in `kept`.
    #[allow(clippy::too_many_arguments)]
    fn layer(
        &self,
        weights: Weights<'_>,
        layer: &Layer,
        x: &mut [f32],
        trees: &[Tree],
        kept: &mut Kept,
        branch: &mut Vec<f32>,
        scratch: &mut LowRankScratch,
    ) {
        let DecoderSize { width, hidden, heads, head_dim, eps, .. } = self.size;
        let rows = x.len() / width;
        let (attention, stride, scale) = (self.attention(), self.attention().stride(), self.scale());
        let values = weights.base;
        let normal1 = fit(&mut kept.normal1, rows * width);
        ops::rms_norm(x, &values[layer.norm1.clone()], eps, normal1, fit(&mut kept.scales1, rows));
        let qkv = fit(&mut kept.qkv, rows * stride);
        layer.qkv.forward(weights, normal1, rows, scale, scratch, qkv);
        let bias = &values[layer.qkv_bias.clone()];
        qkv.chunks_exact_mut(stride).for_each(|row| accumulate(row, bias));
        let mixed = fit(&mut kept.mixed, rows * heads * head_dim);
        let scores = fit(&mut kept.scores, heads * trees.iter().map(Tree::scores).sum::<usize>());
        let (mut first, mut place) = (0, 0);
        for tree in trees {
            let own = &mut qkv[first * stride..][..tree.rows() * stride];
            attention.turn(&self.rotary, tree, own, 1.0);
            attention.forward(own, tree, &mut mixed[first * heads * head_dim..], &mut scores[place * heads..]);
            first += tree.rows();
            place += tree.scores();
        }
        let branch = fit(branch, rows * width);
        layer.out.forward(weights, mixed, rows, scale, scratch, branch);
        accumulate(x, branch);
        fit(&mut kept.middle, rows * width).copy_from_slice(x);
        let normal2 = fit(&mut kept.normal2, rows * width);
        ops::rms_norm(x, &values[layer.norm2.clone()], eps, normal2, fit(&mut kept.scales2, rows));
        let wide = fit(&mut kept.wide, rows * 2 * hidden);
        layer.wide.forward(weights, normal2, rows, scale, scratch, wide);
        let gated = fit(&mut kept.gated, rows * hidden);
        for (wide, gated) in wide.chunks_exact(2 * hidden).zip(gated.chunks_exact_mut(hidden)) {
            let (gate, up) = wide.split_at(hidden);
            ops::gated_silu(gate, up, gated);
        }
        layer.down.forward(weights, gated, rows, scale, scratch, branch);
        accumulate(x, branch);
    }

    /// Runs the layers over `trees`, whose rows lie one behind the other in `x` `[rows, width]`; the normalised last
    /// states stay in the buffers, see `DecoderBuffers`.
    pub fn forward(&self, weights: Weights<'_>, x: &[f32], trees: &[Tree], buffers: &mut DecoderBuffers) {
        let DecoderSize { width, eps, .. } = self.size;
        let rows: usize = trees.iter().map(Tree::rows).sum();
        let DecoderBuffers { checkpointing, inputs, kept: all, last, normal, scales, branch, low_rank, .. } = buffers;
        all.resize_with(if *checkpointing { 1 } else { self.layers.len() }, Kept::default);
        inputs.resize_with(self.layers.len(), Vec::new);
        fit(last, rows * width).copy_from_slice(&x[..rows * width]);
        for (index, (layer, input)) in self.layers.iter().zip(inputs).enumerate() {
            let x = &mut last[..rows * width];
            fit(input, rows * width).copy_from_slice(x);
            let kept = &mut all[if *checkpointing { 0 } else { index }];
            self.layer(weights, layer, x, trees, kept, branch, low_rank);
        }
        let last = &last[..rows * width];
        let (normal, scales) = (fit(normal, rows * width), fit(scales, rows));
        ops::rms_norm(last, &weights.base[self.norm.clone()], eps, normal, scales);
    }

    /// Logits after some rows of the last forward pass, divided by the temperature, `[picked, vocabulary]`.
    pub fn logits<'a>(&self, weights: Weights<'_>, rows: &[usize], buffers: &'a mut DecoderBuffers) -> &'a mut [f32] {
        let (width, vocabulary) = (self.size.width, self.size.vocabulary);
        let picked = fit(&mut buffers.picked, rows.len() * width);
        for (out, &row) in picked.chunks_exact_mut(width).zip(rows) {
            out.copy_from_slice(&buffers.normal[row * width..][..width]);
        }
        self.cool(picked);
        let logits = fit(&mut buffers.logits, rows.len() * vocabulary);
        let table = Matrix::transposed(&weights.base[self.head.clone()], width);
        ops::multiply(logits, rows.len(), vocabulary, width, Matrix::new(picked, width), table, false);
        logits
    }

    /// Divides by the temperature: states before the head, which divides the logits too, and their gradient.
    fn cool(&self, states: &mut [f32]) {
        if self.temperature != 1.0 {
            states.iter_mut().for_each(|value| *value /= self.temperature);
        }
    }

    /// Targets whose logits are computed at once.
    fn head_run(&self) -> usize {
        (LOGITS / self.size.vocabulary).max(1)
    }

    /// Log-probability of each target after [`Decoder::forward`], and the entropy of what could stand there.
    pub fn log_probabilities(
        &self,
        weights: Weights<'_>,
        targets: &[Target],
        buffers: &mut DecoderBuffers,
    ) -> Vec<(f32, f32)> {
        let mut out = Vec::with_capacity(targets.len());
        for targets in targets.chunks(self.head_run()) {
            let rows: Vec<usize> = targets.iter().map(|target| target.row).collect();
            let logits = self.logits(weights, &rows, buffers);
            let logits = logits.chunks_exact(self.size.vocabulary);
            out.extend(logits.zip(targets).map(|(logits, target)| ops::log_probability(logits, target.id as usize)));
        }
        out
    }

    /// Cross-entropy of the targets after [`Decoder::forward`] and everything backward from it: adds to `gradients`
    /// and writes `x_gradient` `[rows, width]`. Returns the weighted loss and, for each target, whether it was the
    /// likeliest.
    pub fn backward(
        &self,
        weights: Weights<'_>,
        mut gradients: Gradients<'_>,
        trees: &[Tree],
        targets: &[Target],
        buffers: &mut DecoderBuffers,
        x_gradient: &mut [f32],
    ) -> (f64, Vec<bool>) {
        let DecoderSize { width, hidden, heads, vocabulary, head_dim, .. } = self.size;
        let rows: usize = trees.iter().map(Tree::rows).sum();
        let mut loss = 0.0;
        let mut right = Vec::with_capacity(targets.len());
        zeros(&mut buffers.branch, rows * width);
        for targets in targets.chunks(self.head_run()) {
            let picked_rows: Vec<usize> = targets.iter().map(|target| target.row).collect();
            let logits = self.logits(weights, &picked_rows, buffers);
            for (logits, target) in logits.chunks_exact_mut(vocabulary).zip(targets) {
                let id = target.id as usize;
                right.push(logits.iter().all(|&l| l <= logits[id]));
                loss += f64::from(ops::cross_entropy(logits, id, 0.0, target.weight));
            }
            let DecoderBuffers { logits, picked, picked_gradient, branch, .. } = &mut *buffers;
            let count = targets.len();
            let (logits, picked) = (&logits[..count * vocabulary], &picked[..count * width]);
            let picked_gradient = fit(picked_gradient, count * width);
            let table = Matrix::new(&weights.base[self.head.clone()], width);
            ops::multiply(picked_gradient, count, width, vocabulary, Matrix::new(logits, vocabulary), table, false);
            if let Some(base) = &mut gradients.base {
                let along = Matrix::transposed(logits, vocabulary);
                let table = &mut base[self.head.clone()];
                ops::multiply(table, vocabulary, width, count, along, Matrix::new(picked, width), true);
            }
            self.cool(picked_gradient);
            for (row, picked) in picked_rows.iter().zip(picked_gradient.chunks_exact(width)) {
                accumulate(&mut branch[row * width..][..width], picked);
            }
        }
        let DecoderBuffers {
            checkpointing,
            inputs,
            kept: all,
            last,
            scales,
            gradient,
            again,
            branch,
            wide,
            gated,
            qkv,
            scratch,
            unused,
            low_rank,
            ..
        } = buffers;
        let scale = self.scale();
        let gradient = zeros(gradient, rows * width);
        let weight = &weights.base[self.norm.clone()];
        let sums = sums(&mut gradients, &self.norm, unused);
        ops::rms_norm_backward(&last[..rows * width], weight, &scales[..rows], &branch[..rows * width], sums, gradient);

        let (attention, stride) = (self.attention(), self.attention().stride());
        for (index, layer) in self.layers.iter().enumerate().rev() {
            let input = &inputs[index][..rows * width];
            let kept = &mut all[if *checkpointing { 0 } else { index }];
            if *checkpointing {
                let x = fit(again, rows * width);
                x.copy_from_slice(input);
                self.layer(weights, layer, x, trees, kept, branch, low_rank);
            }
            let gated_gradient = fit(gated, rows * hidden.max(heads * head_dim));
            let inner = &mut gated_gradient[..rows * hidden];
            layer.down.backward(weights, &mut gradients, &kept.gated, rows, scale, gradient, low_rank, inner);
            let wide_gradient = fit(wide, rows * 2 * hidden);
            let each = wide_gradient.chunks_exact_mut(2 * hidden).zip(kept.wide.chunks_exact(2 * hidden));
            for ((out, wide), gated) in each.zip(inner.chunks_exact(hidden)) {
                let ((gate_gradient, up_gradient), (gate, up)) = (out.split_at_mut(hidden), wide.split_at(hidden));
                ops::gated_silu_backward(gate, up, gated, gate_gradient, up_gradient);
            }
            let branch = fit(branch, rows * width);
            layer.wide.backward(weights, &mut gradients, &kept.normal2, rows, scale, wide_gradient, low_rank, branch);
            let (weight, middle) = (&weights.base[layer.norm2.clone()], &kept.middle[..rows * width]);
            let norm_sums = self::sums(&mut gradients, &layer.norm2, unused);
            ops::rms_norm_backward(middle, weight, &kept.scales2[..rows], branch, norm_sums, gradient);

            let mixed_gradient = &mut gated_gradient[..rows * heads * head_dim];
            layer.out.backward(weights, &mut gradients, &kept.mixed, rows, scale, gradient, low_rank, mixed_gradient);
            let qkv_gradient = fit(qkv, rows * stride);
            let (mut first, mut place) = (0, 0);
            for tree in trees {
                let n = tree.rows();
                let own = &mut qkv_gradient[first * stride..][..n * stride];
                let scores = &kept.scores[place * heads..][..tree.scores() * heads];
                let mixed = &mixed_gradient[first * heads * head_dim..][..n * heads * head_dim];
                attention.backward(&kept.qkv[first * stride..], tree, scores, mixed, own, scratch);
                attention.turn(&self.rotary, tree, own, -1.0);
                first += n;
                place += tree.scores();
            }
            if let Some(base) = &mut gradients.base {
                let bias = &mut base[layer.qkv_bias.clone()];
                qkv_gradient.chunks_exact(stride).for_each(|row| accumulate(bias, row));
            }
            layer.qkv.backward(weights, &mut gradients, &kept.normal1, rows, scale, qkv_gradient, low_rank, branch);
            let weight = &weights.base[layer.norm1.clone()];
            let norm_sums = self::sums(&mut gradients, &layer.norm1, unused);
            ops::rms_norm_backward(input, weight, &kept.scales1[..rows], branch, norm_sums, gradient);
        }
        x_gradient[..rows * width].copy_from_slice(gradient);
        (loss, right)
    }
}

/// Where a norm's gradient is added to: its place, or where nobody looks.
fn sums<'a>(gradients: &'a mut Gradients<'_>, place: &Range<usize>, unused: &'a mut Vec<f32>) -> &'a mut [f32] {
    match &mut gradients.base {
        Some(base) => &mut base[place.clone()],
        None => fit(unused, place.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::gradient_check::{check, random};
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    const SIZE: DecoderSize = DecoderSize {
        width: 12,
        layers: 2,
        heads: 4,
        key_heads: 2,
        head_dim: 6,
        hidden: 20,
        vocabulary: 17,
        theta: 1e4,
        eps: 1e-6,
        tied: true,
    };

    fn tree(shared: usize, branches: &[usize]) -> Tree {
        Tree { shared, branches: branches.to_vec() }
    }

    const TARGETS: [Target; 4] = [
        Target { row: 2, id: 5, weight: 0.5 },
        Target { row: 4, id: 1, weight: 1.0 },
        Target { row: 8, id: 16, weight: -2.0 },
        Target { row: 12, id: 3, weight: 0.7 },
    ];

    #[test]
    fn gradients_equal_finite_differences() {
        for (tied, checkpointing, temperature) in [(true, false, 1.0), (false, true, 1.0), (true, false, 0.7)] {
            let mut plan = Plan::default();
            let mut decoder = Decoder::new(&mut plan, DecoderSize { tied, ..SIZE }, 16);
            decoder.set_temperature(temperature);
            let trees = [tree(3, &[3, 3]), tree(4, &[])];
            // The input rows are a tensor of the plan too, so that their gradient is checked with the others.
            let input = plan.add("x", &[13, SIZE.width], Treatment { decay: false, rate: 1.0 });
            let mut values = random(plan.len(), 0.6, &mut ChaCha8Rng::seed_from_u64(1));
            let mut buffers = DecoderBuffers { checkpointing, ..DecoderBuffers::default() };
            let mut gradients = vec![0.0; plan.len()];
            let mut x_gradient = vec![0.0; 13 * SIZE.width];
            let mut run = |values: &[f32], gradients: &mut [f32], x_gradient: &mut [f32]| {
                let weights = Weights::base(values);
                decoder.forward(weights, &values[input.clone()], &trees, &mut buffers);
                let gradients = Gradients { base: Some(gradients), low_rank: None };
                decoder.backward(weights, gradients, &trees, &TARGETS, &mut buffers, x_gradient).0
            };
            run(&values, &mut gradients, &mut x_gradient);
            gradients[input.clone()].copy_from_slice(&x_gradient);
            let mut unused = vec![0.0; plan.len()];
            check(&plan, &mut values, &gradients, |values| run(values, &mut unused, &mut x_gradient));
        }
    }

    #[test]
    fn gradients_of_the_factors_equal_finite_differences() {
        let mut plan = Plan::default();
        let settings = LoraSettings { rank: 3, alpha: 4.5, stabilised: false, modules: Module::ALL.to_vec() };
        let decoder = Decoder::new(&mut plan, SIZE, 16).with_lora(settings);
        let factors = decoder.lora().map(|lora| lora.plan.clone()).unwrap_or_default();
        assert_eq!(factors.entries().len(), 2 * 7 * SIZE.layers);
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let base = random(plan.len(), 0.6, &mut rng);
        let mut values = random(factors.len(), 0.6, &mut rng);
        let x = random(13 * SIZE.width, 1.0, &mut rng);
        let trees = [tree(3, &[3, 3]), tree(4, &[])];
        for checkpointing in [false, true] {
            let mut buffers = DecoderBuffers { checkpointing, ..DecoderBuffers::default() };
            let mut x_gradient = vec![0.0; x.len()];
            let mut run = |values: &[f32], gradients: &mut [f32]| {
                let weights = Weights { base: &base, low_rank: Some(values) };
                decoder.forward(weights, &x, &trees, &mut buffers);
                let gradients = Gradients { base: None, low_rank: Some(gradients) };
                decoder.backward(weights, gradients, &trees, &TARGETS, &mut buffers, &mut x_gradient).0
            };
            let mut gradients = vec![0.0; factors.len()];
            run(&values, &mut gradients);
            let mut unused = vec![0.0; factors.len()];
            check(&factors, &mut values, &gradients, |values| run(values, &mut unused));
        }
    }

    /// Log-probabilities are those of what rollouts at a temperature draw from.
    #[test]
    fn a_temperature_divides_the_logits() {
        let mut plan = Plan::default();
        let mut decoder = Decoder::new(&mut plan, SIZE, 16);
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let values = random(plan.len(), 0.6, &mut rng);
        let (weights, mut buffers) = (Weights::base(&values), DecoderBuffers::default());
        decoder.forward(weights, &random(3 * SIZE.width, 1.0, &mut rng), &[tree(3, &[])], &mut buffers);
        let logits: Vec<f32> = decoder.logits(weights, &[2], &mut buffers).iter().map(|logit| logit / 0.4).collect();
        let total: f32 = logits.iter().map(|logit| logit.exp()).sum();
        decoder.set_temperature(0.4);
        let target = Target { row: 2, id: 6, weight: 1.0 };
        let log_probability = decoder.log_probabilities(weights, &[target], &mut buffers)[0].0;
        assert!((log_probability - (logits[6] - total.ln())).abs() < 1e-5);
    }

    /// Each branch gives what the same tokens give as a sequence of their own.
    #[test]
    fn branches_are_sequences_of_their_own() {
        let mut plan = Plan::default();
        let decoder = Decoder::new(&mut plan, SIZE, 16);
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let values = random(plan.len(), 0.6, &mut rng);
        let weights = Weights::base(&values);
        let x = random(9 * SIZE.width, 1.0, &mut rng);
        let mut buffers = DecoderBuffers::default();
        let whole = tree(3, &[3, 2, 1]);
        decoder.forward(weights, &x, std::slice::from_ref(&whole), &mut buffers);
        let branched = decoder.logits(weights, &[5, 7, 8], &mut buffers).to_vec();
        for (branch, logits) in branched.chunks_exact(17).enumerate() {
            let start = whole.start(branch);
            let own = start * SIZE.width..(start + whole.branches[branch]) * SIZE.width;
            let alone = [&x[..3 * SIZE.width], &x[own]].concat();
            let rows = alone.len() / SIZE.width;
            decoder.forward(weights, &alone, &[tree(rows, &[])], &mut buffers);
            for (a, b) in decoder.logits(weights, &[rows - 1], &mut buffers).iter().zip(logits) {
                assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
            let target = Target { row: rows - 1, id: 4, weight: 1.0 };
            let log_probability = decoder.log_probabilities(weights, &[target], &mut buffers)[0].0;
            let total: f32 = logits.iter().map(|logit| logit.exp()).sum();
            assert!((log_probability - (logits[4] - total.ln())).abs() < 1e-5);
        }
    }
}
