//! The Qwen2-shaped decoder, forward and backward, over one worker's share of a batch. Sequences of any length lie one
//! behind the other without padding; each forks into the rationale with its answer and the fast answer, so that the
//! prompt and its video tokens are computed once for both.

use super::layers::{Fork, GroupedAttention, Projection, Rotary, accumulate, fit, zeros};
use super::ops::{self, Matrix};
use super::parameters::{Plan, Treatment};
use std::ops::Range;

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
    /// Rows of the embedding, which is the output head too.
    pub vocabulary: usize,
    /// Base of the rotary frequencies.
    pub theta: f32,
    /// Epsilon of the norms.
    pub eps: f32,
}

struct Layer {
    norm1: Range<usize>,
    qkv: Projection,
    qkv_bias: Range<usize>,
    out: Projection,
    norm2: Range<usize>,
    /// Gate and up projections side by side.
    wide: Projection,
    down: Projection,
}

/// The decoder: sizes and the places of its parameters.
pub struct Decoder {
    /// Sizes.
    pub size: DecoderSize,
    /// Place of the embedding, `[vocabulary, width]`.
    pub embedding: Range<usize>,
    layers: Vec<Layer>,
    norm: Range<usize>,
    rotary: Rotary,
}

/// What a layer's forward pass keeps.
#[derive(Default)]
struct Kept {
    input: Vec<f32>,
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
    kept: Vec<Kept>,
    last: Vec<f32>,
    normal: Vec<f32>,
    scales: Vec<f32>,
    logits: Vec<f32>,
    picked: Vec<f32>,
    picked_gradient: Vec<f32>,
    gradient: Vec<f32>,
    branch: Vec<f32>,
    wide: Vec<f32>,
    gated: Vec<f32>,
    qkv: Vec<f32>,
    scratch: Vec<f32>,
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

impl Decoder {
    /// Adds the tensors to the plan under the names of the published checkpoints. Sequences have at most `positions`
    /// rows.
    pub fn new(plan: &mut Plan, size: DecoderSize, positions: usize) -> Self {
        let DecoderSize { width, hidden, .. } = size;
        let (queries, keys) = (size.heads * size.head_dim, size.key_heads * size.head_dim);
        let plain = Treatment { decay: false, rate: 1.0 };
        let embedding = plan.add("model.embed_tokens.weight", &[size.vocabulary, width], plain);
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
                    qkv: Projection {
                        weight: weights[0].start..weights[2].end,
                        outputs: queries + 2 * keys,
                        inputs: width,
                    },
                    qkv_bias: biases[0].start..biases[2].end,
                    out,
                    norm2,
                    wide: Projection { weight: wide[0].start..wide[1].end, outputs: 2 * hidden, inputs: width },
                    down: Projection::new(plan, &name("mlp.down_proj.weight"), &[width, hidden]),
                }
            })
            .collect();
        let norm = plan.add("model.norm.weight", &[width], plain);
        Self { size, embedding, layers, norm, rotary: Rotary::new(positions, size.head_dim, size.theta) }
    }

    fn attention(&self) -> GroupedAttention {
        GroupedAttention { heads: self.size.heads, key_heads: self.size.key_heads, head_dim: self.size.head_dim }
    }

    /// Runs the layers over `forks`, whose rows lie one behind the other in `x` `[rows, width]`; the normalised last
    /// states stay in the buffers, see `DecoderBuffers`.
    pub fn forward(&self, values: &[f32], x: &[f32], forks: &[Fork], buffers: &mut DecoderBuffers) {
        let DecoderSize { width, hidden, heads, key_heads, eps, .. } = self.size;
        let rows: usize = forks.iter().map(|f| f.rows).sum();
        let (attention, stride) = (self.attention(), self.attention().stride());
        let squares: usize = forks.iter().map(|f| f.rows * f.rows).sum();
        let DecoderBuffers { kept: all, last, normal, scales, branch, .. } = buffers;
        all.resize_with(self.layers.len(), Kept::default);
        fit(last, rows * width).copy_from_slice(&x[..rows * width]);
        for (layer, kept) in self.layers.iter().zip(all) {
            fit(&mut kept.input, rows * width).copy_from_slice(&last[..rows * width]);
            let x = &mut last[..rows * width];
            let normal1 = fit(&mut kept.normal1, rows * width);
            ops::rms_norm(x, &values[layer.norm1.clone()], eps, normal1, fit(&mut kept.scales1, rows));
            let qkv = fit(&mut kept.qkv, rows * stride);
            layer.qkv.forward(values, normal1, rows, qkv);
            let bias = &values[layer.qkv_bias.clone()];
            qkv.chunks_exact_mut(stride).for_each(|row| accumulate(row, bias));
            let mixed = fit(&mut kept.mixed, rows * heads * self.size.head_dim);
            let scores = fit(&mut kept.scores, squares * heads);
            let (mut first, mut square) = (0, 0);
            for fork in forks {
                let own = &mut qkv[first * stride..][..fork.rows * stride];
                for (row, qkv) in own.chunks_exact_mut(stride).enumerate() {
                    self.rotary.turn(qkv, heads + key_heads, fork.position(row), 1.0);
                }
                let mixed = &mut mixed[first * heads * self.size.head_dim..];
                attention.forward(own, *fork, mixed, &mut scores[square * heads..]);
                first += fork.rows;
                square += fork.rows * fork.rows;
            }
            let branch = fit(branch, rows * width);
            layer.out.forward(values, mixed, rows, branch);
            accumulate(x, branch);
            fit(&mut kept.middle, rows * width).copy_from_slice(x);
            let normal2 = fit(&mut kept.normal2, rows * width);
            ops::rms_norm(x, &values[layer.norm2.clone()], eps, normal2, fit(&mut kept.scales2, rows));
            let wide = fit(&mut kept.wide, rows * 2 * hidden);
            layer.wide.forward(values, normal2, rows, wide);
            let gated = fit(&mut kept.gated, rows * hidden);
            for (wide, gated) in wide.chunks_exact(2 * hidden).zip(gated.chunks_exact_mut(hidden)) {
                let (gate, up) = wide.split_at(hidden);
                ops::gated_silu(gate, up, gated);
            }
            layer.down.forward(values, gated, rows, branch);
            accumulate(x, branch);
        }
        let last = &last[..rows * width];
        ops::rms_norm(last, &values[self.norm.clone()], eps, fit(normal, rows * width), fit(scales, rows));
    }

    /// Logits after some rows of the last forward pass, `[picked, vocabulary]`.
    pub fn logits<'a>(&self, values: &[f32], rows: &[usize], buffers: &'a mut DecoderBuffers) -> &'a mut [f32] {
        let (width, vocabulary) = (self.size.width, self.size.vocabulary);
        let picked = fit(&mut buffers.picked, rows.len() * width);
        for (out, &row) in picked.chunks_exact_mut(width).zip(rows) {
            out.copy_from_slice(&buffers.normal[row * width..][..width]);
        }
        let logits = fit(&mut buffers.logits, rows.len() * vocabulary);
        let table = Matrix::transposed(&values[self.embedding.clone()], width);
        ops::multiply(logits, rows.len(), vocabulary, width, Matrix::new(picked, width), table, false);
        logits
    }

    /// Cross-entropy of the targets after [`Decoder::forward`] and everything backward from it: adds to `gradients`
    /// and writes `x_gradient` `[rows, width]`. Returns the weighted loss and, for each target, whether it was the
    /// likeliest.
    pub fn backward(
        &self,
        values: &[f32],
        gradients: &mut [f32],
        forks: &[Fork],
        targets: &[Target],
        buffers: &mut DecoderBuffers,
        x_gradient: &mut [f32],
    ) -> (f64, Vec<bool>) {
        let DecoderSize { width, hidden, heads, key_heads, vocabulary, head_dim, .. } = self.size;
        let rows: usize = forks.iter().map(|f| f.rows).sum();
        let picked_rows: Vec<usize> = targets.iter().map(|t| t.row).collect();
        let mut loss = 0.0;
        let mut right = Vec::with_capacity(targets.len());
        let logits = self.logits(values, &picked_rows, buffers);
        for (logits, target) in logits.chunks_exact_mut(vocabulary).zip(targets) {
            let id = target.id as usize;
            right.push(logits.iter().all(|&l| l <= logits[id]));
            loss += f64::from(ops::cross_entropy(logits, id, 0.0, target.weight));
        }
        let DecoderBuffers {
            kept: all,
            last,
            normal: _,
            scales,
            logits,
            picked,
            picked_gradient,
            gradient,
            branch,
            wide,
            gated,
            qkv,
            scratch,
        } = buffers;
        let count = targets.len();
        let (logits, picked) = (&logits[..count * vocabulary], &picked[..count * width]);
        let picked_gradient = fit(picked_gradient, count * width);
        let table = Matrix::new(&values[self.embedding.clone()], width);
        ops::multiply(picked_gradient, count, width, vocabulary, Matrix::new(logits, vocabulary), table, false);
        let along = Matrix::transposed(logits, vocabulary);
        let table = &mut gradients[self.embedding.clone()];
        ops::multiply(table, vocabulary, width, count, along, Matrix::new(picked, width), true);
        let normal_gradient = zeros(branch, rows * width);
        for (row, picked) in picked_rows.iter().zip(picked_gradient.chunks_exact(width)) {
            accumulate(&mut normal_gradient[row * width..][..width], picked);
        }
        let gradient = zeros(gradient, rows * width);
        let (weight, sums) = (&values[self.norm.clone()], &mut gradients[self.norm.clone()]);
        ops::rms_norm_backward(&last[..rows * width], weight, &scales[..rows], normal_gradient, sums, gradient);

        let (attention, stride) = (self.attention(), self.attention().stride());
        for (layer, kept) in self.layers.iter().zip(all).rev() {
            let gated_gradient = fit(gated, rows * hidden);
            layer.down.backward(values, gradients, &kept.gated, rows, gradient, Some(gated_gradient), false);
            let wide_gradient = fit(wide, rows * 2 * hidden);
            let each = wide_gradient.chunks_exact_mut(2 * hidden).zip(kept.wide.chunks_exact(2 * hidden));
            for ((out, wide), gated) in each.zip(gated_gradient.chunks_exact(hidden)) {
                let ((gate_gradient, up_gradient), (gate, up)) = (out.split_at_mut(hidden), wide.split_at(hidden));
                ops::gated_silu_backward(gate, up, gated, gate_gradient, up_gradient);
            }
            let branch = fit(branch, rows * width);
            layer.wide.backward(values, gradients, &kept.normal2, rows, wide_gradient, Some(branch), false);
            let (weight, sums) = (&values[layer.norm2.clone()], &mut gradients[layer.norm2.clone()]);
            ops::rms_norm_backward(&kept.middle[..rows * width], weight, &kept.scales2[..rows], branch, sums, gradient);

            let mixed_gradient = fit(gated, rows * heads * head_dim);
            layer.out.backward(values, gradients, &kept.mixed, rows, gradient, Some(mixed_gradient), false);
            let qkv_gradient = fit(qkv, rows * stride);
            let (mut first, mut square) = (0, 0);
            for fork in forks {
                let (n, squares) = (fork.rows, fork.rows * fork.rows);
                let own = &mut qkv_gradient[first * stride..][..n * stride];
                let scores = &kept.scores[square * heads..][..squares * heads];
                let mixed = &mixed_gradient[first * heads * head_dim..][..n * heads * head_dim];
                let scratch = fit(scratch, squares);
                attention.backward(&kept.qkv[first * stride..], *fork, scores, mixed, own, scratch);
                for (row, qkv) in own.chunks_exact_mut(stride).enumerate() {
                    self.rotary.turn(qkv, heads + key_heads, fork.position(row), -1.0);
                }
                first += n;
                square += squares;
            }
            let bias = &mut gradients[layer.qkv_bias.clone()];
            qkv_gradient.chunks_exact(stride).for_each(|row| accumulate(bias, row));
            layer.qkv.backward(values, gradients, &kept.normal1, rows, qkv_gradient, Some(branch), false);
            let (weight, sums) = (&values[layer.norm1.clone()], &mut gradients[layer.norm1.clone()]);
            ops::rms_norm_backward(&kept.input[..rows * width], weight, &kept.scales1[..rows], branch, sums, gradient);
        }
        x_gradient[..rows * width].copy_from_slice(gradient);
        (loss, right)
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
    };

    #[test]
    fn gradients_equal_finite_differences() {
        let mut plan = Plan::default();
        let decoder = Decoder::new(&mut plan, SIZE, 16);
        let forks = [Fork { rows: 9, fork: 3, second: 6 }, Fork { rows: 4, fork: 4, second: 4 }];
        // The input rows are a tensor of the plan too, so that their gradient is checked with the others.
        let input = plan.add("x", &[13, SIZE.width], Treatment { decay: false, rate: 1.0 });
        let mut values = random(plan.len(), 0.6, &mut ChaCha8Rng::seed_from_u64(1));
        let target = |row, id, weight| Target { row, id, weight };
        let targets = [target(2, 5, 0.5), target(4, 1, 1.0), target(8, 16, 2.0), target(12, 3, 0.7)];
        let mut buffers = DecoderBuffers::default();
        let mut gradients = vec![0.0; plan.len()];
        let mut x_gradient = vec![0.0; 13 * SIZE.width];
        let mut run = |values: &[f32], gradients: &mut [f32], x_gradient: &mut [f32]| {
            decoder.forward(values, &values[input.clone()], &forks, &mut buffers);
            decoder.backward(values, gradients, &forks, &targets, &mut buffers, x_gradient).0
        };
        run(&values, &mut gradients, &mut x_gradient);
        gradients[input.clone()].copy_from_slice(&x_gradient);
        let mut unused = vec![0.0; plan.len()];
        check(&plan, &mut values, &gradients, |values| run(values, &mut unused, &mut x_gradient));
    }

    /// The second continuation of a fork gives what the same tokens give as a sequence of their own.
    #[test]
    fn a_fork_is_two_sequences() {
        let mut plan = Plan::default();
        let decoder = Decoder::new(&mut plan, SIZE, 16);
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let values = random(plan.len(), 0.6, &mut rng);
        let x = random(8 * SIZE.width, 1.0, &mut rng);
        let mut buffers = DecoderBuffers::default();
        decoder.forward(&values, &x, &[Fork { rows: 8, fork: 3, second: 6 }], &mut buffers);
        let forked = decoder.logits(&values, &[5, 7], &mut buffers).to_vec();
        for (range, row, logits) in [(3..6, 5, &forked[..17]), (6..8, 4, &forked[17..])] {
            let alone = [&x[..3 * SIZE.width], &x[range.start * SIZE.width..range.end * SIZE.width]].concat();
            let rows = alone.len() / SIZE.width;
            decoder.forward(&values, &alone, &[Fork { rows, fork: rows, second: rows }], &mut buffers);
            for (a, b) in decoder.logits(&values, &[row], &mut buffers).iter().zip(logits) {
                assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
        }
    }
}
