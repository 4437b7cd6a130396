//! The projector `all_in_one_small` and the gate that mixes its branches, forward and backward, over one worker's
//! share of a batch. What depends on one frame alone is computed once for each distinct frame of the batch.

use super::encoder::Affine;
use super::layers::{
    Clips, Projection, accumulate, depthwise, depthwise_backward, fit, sigmoids, silu, silu_backward, unfold,
    unfold_backward, zeros,
};
use super::ops;
use super::parameters::{Plan, Treatment};
use std::ops::Range;

/// Epsilon of the norms.
const EPS: f32 = 1e-5;
/// Blocks of a stage.
const DEPTH: usize = 2;
/// Names of the two convolutional branches.
const BRANCHES: [&str; 2] = ["video", "body"];

/// Places of one block of a RegStage (Radosavovic et al. 2020, with squeeze and excitation).
struct Block {
    first: Projection,
    norm1: Affine,
    depthwise: Range<usize>,
    norm2: Affine,
    squeeze: Affine,
    excite: Affine,
    last: Projection,
    norm3: Affine,
    shortcut: Option<(Projection, Affine)>,
}

#[derive(Default)]
struct BlockKept {
    first: Vec<f32>,
    statistics1: Vec<f32>,
    before1: Vec<f32>,
    active1: Vec<f32>,
    spread: Vec<f32>,
    statistics2: Vec<f32>,
    before2: Vec<f32>,
    active2: Vec<f32>,
    mean: Vec<f32>,
    squeezed: Vec<f32>,
    squeezed_active: Vec<f32>,
    excited: Vec<f32>,
    factor: Vec<f32>,
    scaled: Vec<f32>,
    last: Vec<f32>,
    statistics3: Vec<f32>,
    sum: Vec<f32>,
    short: Vec<f32>,
    short_statistics: Vec<f32>,
    short_normal: Vec<f32>,
    out: Vec<f32>,
}

#[derive(Default)]
struct Scratch {
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
    factor: Vec<f32>,
    squeezed: Vec<f32>,
    mean: Vec<f32>,
}

impl Block {
    fn new(plan: &mut Plan, name: &str, inputs: usize, width: usize) -> Self {
        let conv = |plan: &mut Plan, part: &str, inputs: usize| {
            Projection::new(plan, &format!("{name}.{part}.conv.weight"), &[width, inputs, 1, 1])
        };
        let norm = |plan: &mut Plan, part: &str| Affine::norm(plan, &format!("{name}.{part}.bn"), width, 1.0);
        // Half to even, as Python rounds.
        let hidden = (inputs as f64 * 0.25).round_ties_even() as usize;
        let squeeze = |plan: &mut Plan, part: &str, outputs: usize, inputs: usize| {
            let name = format!("{name}.se.{part}");
            let decay = Treatment { decay: true, rate: 1.0 };
            let weight = plan.add(format!("{name}.weight"), &[outputs, inputs, 1, 1], decay);
            Affine { weight, bias: plan.add(format!("{name}.bias"), &[outputs], Treatment { decay: false, ..decay }) }
        };
        Block {
            first: conv(plan, "conv1", inputs),
            norm1: norm(plan, "conv1"),
            depthwise: plan.add(
                format!("{name}.conv2.conv.weight"),
                &[width, 1, 3, 3],
                Treatment { decay: true, rate: 1.0 },
            ),
            norm2: norm(plan, "conv2"),
            squeeze: squeeze(plan, "fc1", hidden, width),
            excite: squeeze(plan, "fc2", width, hidden),
            last: conv(plan, "conv3", width),
            norm3: norm(plan, "conv3"),
            shortcut: (inputs != width).then(|| (conv(plan, "downsample", inputs), norm(plan, "downsample"))),
        }
    }

    /// x `[frames, side², inputs]` → kept.out `[frames, side², width]`.
    fn forward(&self, values: &[f32], x: &[f32], frames: usize, side: usize, kept: &mut BlockKept) {
        let (width, hidden) = (self.first.outputs, self.squeeze.bias.len());
        let (cells, rows) = (side * side, frames * side * side);
        let all = rows * width;
        let first = fit(&mut kept.first, all);
        self.first.forward(values, x, rows, first);
        let before1 = fit(&mut kept.before1, all);
        self.norm1.layer_norm(values, first, EPS, before1, fit(&mut kept.statistics1, 2 * rows));
        let active1 = fit(&mut kept.active1, all);
        silu(before1, active1);
        let spread = fit(&mut kept.spread, all);
        depthwise(active1, side, &values[self.depthwise.clone()], spread);
        let before2 = fit(&mut kept.before2, all);
        self.norm2.layer_norm(values, spread, EPS, before2, fit(&mut kept.statistics2, 2 * rows));
        let active2 = fit(&mut kept.active2, all);
        silu(before2, active2);
        let mean = zeros(&mut kept.mean, frames * width);
        for (mean, frame) in mean.chunks_exact_mut(width).zip(active2.chunks_exact(cells * width)) {
            frame.chunks_exact(width).for_each(|row| accumulate(mean, row));
            mean.iter_mut().for_each(|m| *m /= cells as f32);
        }
        let squeezed = fit(&mut kept.squeezed, frames * hidden);
        self.squeeze.linear(values, mean, frames, squeezed);
        let active = fit(&mut kept.squeezed_active, frames * hidden);
        silu(squeezed, active);
        let excited = fit(&mut kept.excited, frames * width);
        self.excite.linear(values, active, frames, excited);
        let factor = fit(&mut kept.factor, frames * width);
        sigmoids(excited, factor);
        let scaled = fit(&mut kept.scaled, all);
        for (index, (out, x)) in scaled.chunks_exact_mut(width).zip(active2.chunks_exact(width)).enumerate() {
            let factor = &factor[index / cells * width..][..width];
            for i in 0..width {
                out[i] = x[i] * factor[i];
            }
        }
        let last = fit(&mut kept.last, all);
        self.last.forward(values, scaled, rows, last);
        let sum = fit(&mut kept.sum, all);
        self.norm3.layer_norm(values, last, EPS, sum, fit(&mut kept.statistics3, 2 * rows));
        match &self.shortcut {
            None => accumulate(sum, x),
            Some((projection, norm)) => {
                let short = fit(&mut kept.short, all);
                projection.forward(values, x, rows, short);
                let normal = fit(&mut kept.short_normal, all);
                norm.layer_norm(values, short, EPS, normal, fit(&mut kept.short_statistics, 2 * rows));
                accumulate(sum, normal);
            }
        }
        silu(sum, fit(&mut kept.out, all));
    }

    /// `gradient` is that of the output; `x_gradient` is written if wanted.
    #[allow(clippy::too_many_arguments)]
    fn backward(
        &self,
        values: &[f32],
        gradients: &mut [f32],
        x: &[f32],
        frames: usize,
        side: usize,
        kept: &BlockKept,
        gradient: &mut [f32],
        x_gradient: Option<&mut [f32]>,
        scratch: &mut Scratch,
    ) {
        let (width, hidden) = (self.first.outputs, self.squeeze.bias.len());
        let (cells, rows) = (side * side, frames * side * side);
        let all = rows * width;
        let gradient = &mut gradient[..all];
        silu_backward(&kept.sum[..all], gradient);
        // Through the last convolution and the excitation.
        let last = zeros(&mut scratch.a, all);
        self.norm3.layer_norm_backward(values, gradients, &kept.last[..all], &kept.statistics3, gradient, last);
        let scaled = fit(&mut scratch.b, all);
        self.last.backward(values, gradients, &kept.scaled, rows, last, Some(scaled), false);
        let factor = zeros(&mut scratch.factor, frames * width);
        for (index, (scaled, active)) in
            scaled.chunks_exact_mut(width).zip(kept.active2.chunks_exact(width)).enumerate()
        {
            let at = index / cells * width;
            let (sum, factor) = (&mut factor[at..][..width], &kept.factor[at..][..width]);
            for i in 0..width {
                sum[i] += scaled[i] * active[i];
                scaled[i] *= factor[i];
            }
        }
        for (gradient, f) in factor.iter_mut().zip(&kept.factor) {
            *gradient *= f * (1.0 - f);
        }
        let squeezed = fit(&mut scratch.squeezed, frames * hidden);
        self.excite.linear_backward(values, gradients, &kept.squeezed_active, frames, factor, Some(squeezed));
        silu_backward(&kept.squeezed[..frames * hidden], squeezed);
        let mean = fit(&mut scratch.mean, frames * width);
        self.squeeze.linear_backward(values, gradients, &kept.mean, frames, squeezed, Some(mean));
        for (index, row) in scaled.chunks_exact_mut(width).enumerate() {
            let mean = &mean[index / cells * width..][..width];
            row.iter_mut().zip(mean).for_each(|(g, m)| *g += m / cells as f32);
        }
        // Through the depthwise and the first convolution.
        silu_backward(&kept.before2[..all], scaled);
        let spread = zeros(&mut scratch.a, all);
        self.norm2.layer_norm_backward(values, gradients, &kept.spread[..all], &kept.statistics2, scaled, spread);
        let active1 = fit(&mut scratch.b, all);
        let (weight, sums) = (&values[self.depthwise.clone()], &mut gradients[self.depthwise.clone()]);
        depthwise_backward(&kept.active1[..all], side, weight, spread, sums, active1);
        silu_backward(&kept.before1[..all], active1);
        let first = zeros(&mut scratch.a, all);
        self.norm1.layer_norm_backward(values, gradients, &kept.first[..all], &kept.statistics1, active1, first);
        match (&self.shortcut, x_gradient) {
            (None, Some(x_gradient)) => {
                self.first.backward(values, gradients, x, rows, first, Some(&mut *x_gradient), false);
                accumulate(x_gradient, gradient);
            }
            (None, None) => self.first.backward(values, gradients, x, rows, first, None, false),
            (Some((projection, norm)), x_gradient) => {
                let short = zeros(&mut scratch.c, all);
                let (before, statistics) = (&kept.short[..all], &kept.short_statistics);
                norm.layer_norm_backward(values, gradients, before, statistics, gradient, short);
                let mut x_gradient = x_gradient;
                self.first.backward(values, gradients, x, rows, first, x_gradient.as_deref_mut(), false);
                projection.backward(values, gradients, x, rows, short, x_gradient, true);
            }
        }
    }
}

/// Two GELU-separated projections.
struct Mlp {
    first: Affine,
    second: Affine,
}

#[derive(Default)]
struct MlpKept {
    before: Vec<f32>,
    hidden: Vec<f32>,
    out: Vec<f32>,
}

impl Mlp {
    fn new(plan: &mut Plan, name: &str, inputs: usize, hidden: usize, outputs: usize) -> Self {
        Mlp {
            first: Affine::projection(plan, &format!("{name}.0"), hidden, inputs, 1.0),
            second: Affine::projection(plan, &format!("{name}.2"), outputs, hidden, 1.0),
        }
    }

    fn forward(&self, values: &[f32], x: &[f32], rows: usize, kept: &mut MlpKept) {
        let (hidden, outputs) = (self.first.bias.len(), self.second.bias.len());
        let before = fit(&mut kept.before, rows * hidden);
        self.first.linear(values, x, rows, before);
        let active = fit(&mut kept.hidden, rows * hidden);
        ops::gelu(before, active);
        self.second.linear(values, active, rows, fit(&mut kept.out, rows * outputs));
    }

    #[allow(clippy::too_many_arguments)]
    fn backward(
        &self,
        values: &[f32],
        gradients: &mut [f32],
        x: &[f32],
        rows: usize,
        kept: &MlpKept,
        gradient: &[f32],
        x_gradient: Option<&mut [f32]>,
        scratch: &mut Scratch,
    ) {
        let hidden = self.first.bias.len();
        let inner = fit(&mut scratch.a, rows * hidden);
        self.second.linear_backward(values, gradients, &kept.hidden, rows, gradient, Some(inner));
        ops::gelu_backward(&kept.before[..rows * hidden], inner);
        self.first.linear_backward(values, gradients, x, rows, inner, x_gradient);
    }
}

/// RegStage → 2×2×2 convolution → SiLU → RegStage → MLP.
struct Branch {
    before: Vec<Block>,
    /// Laid out `[width, 2, 2, 2, width]`; see [`Projector::checkpoint_layout`].
    sampler: Projection,
    sampler_bias: Range<usize>,
    after: Vec<Block>,
    readout: Mlp,
}

#[derive(Default)]
struct BranchKept {
    before: Vec<BlockKept>,
    columns: Vec<f32>,
    sampled: Vec<f32>,
    active: Vec<f32>,
    after: Vec<BlockKept>,
    readout: MlpKept,
}

/// The projector and the gate: sizes and places of the parameters.
pub struct Projector {
    inputs: usize,
    width: usize,
    side: usize,
    branches: Vec<Branch>,
    face: Mlp,
    gate: Mlp,
}

/// Buffers of one worker.
#[derive(Default)]
pub struct ProjectorBuffers {
    branches: Vec<BranchKept>,
    face: MlpKept,
    gate: MlpKept,
    weights: [f32; 3],
    tokens: Vec<f32>,
    pooled: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    scratch: Scratch,
}

impl ProjectorBuffers {
    /// The video tokens of the last forward pass, `[clips · frames · (side/2)², width]`.
    pub fn tokens(&self) -> &[f32] {
        &self.tokens
    }

    /// The gate's weights of the video, body and face branches.
    pub fn gate(&self) -> [f32; 3] {
        self.weights
    }
}

impl Projector {
    /// Adds the tensors to the plan under the names of the published checkpoints: features of `inputs` channels on a
    /// grid of `side` (even) become tokens of `width`; the gate reads a state of `state` channels.
    pub fn new(plan: &mut Plan, inputs: usize, width: usize, side: usize, state: usize, gate: usize) -> Self {
        let branches = BRANCHES.map(|branch| {
            let stage = |plan: &mut Plan, stage: &str, inputs: usize| {
                let block = |i: usize| format!("model.mm_projector.{stage}_{branch}.b{}", i + 1);
                (0..DEPTH).map(|i| Block::new(plan, &block(i), if i == 0 { inputs } else { width }, width)).collect()
            };
            let before = stage(plan, "s1", inputs);
            let name = format!("model.mm_projector.sampler_{branch}.0");
            let sampler = Projection::new(plan, &format!("{name}.weight"), &[width, 2, 2, 2, width]);
            let sampler_bias = plan.add(format!("{name}.bias"), &[width], Treatment { decay: false, rate: 1.0 });
            let after = stage(plan, "s2", width);
            let readout = Mlp::new(plan, &format!("model.mm_projector.readout_{branch}"), width, width, width);
            Branch { before, sampler, sampler_bias, after, readout }
        });
        let face = Mlp::new(plan, "model.mm_projector.mlp_2xgelu_face", inputs, width, width);
        let gate = Mlp::new(plan, "model.bert_gate", state, gate, 3);
        Self { inputs, width, side, branches: branches.into(), face, gate }
    }

    /// Whether a tensor of this name reads the tower's features: its last dimension is then their channels.
    pub fn reads_features(name: &str) -> bool {
        let name = name.strip_prefix("model.mm_projector.").unwrap_or_default();
        let first = |branch: &str| {
            let block = name.strip_prefix(branch).unwrap_or_default();
            block == ".b1.conv1.conv.weight" || block == ".b1.downsample.conv.weight"
        };
        name == "mlp_2xgelu_face.0.weight" || first("s1_video") || first("s1_body")
    }

    /// A tensor of the plan in the shape and order of the published checkpoints: the 2×2×2 convolutions are kept with
    /// their channels innermost, files have them outermost.
    pub fn checkpoint_layout(name: &str, shape: &[usize], values: &[f32]) -> (Vec<usize>, Vec<f32>) {
        match shape {
            &[outputs, 2, 2, 2, inputs] if name.contains(".sampler_") => {
                let at = |i: usize| {
                    let (out, rest) = (i / (8 * inputs), i % (8 * inputs));
                    values[out * 8 * inputs + rest % 8 * inputs + rest / 8]
                };
                (vec![outputs, inputs, 2, 2, 2], (0..values.len()).map(at).collect())
            }
            _ => (shape.to_vec(), values.to_vec()),
        }
    }

    /// Tokens a clip of `frames` frames becomes.
    pub fn tokens(&self, frames: usize) -> usize {
        frames * self.side * self.side / 4
    }

    /// features `[distinct frames, side², inputs]` and the instruction's state → tokens in the buffers.
    pub fn forward(
        &self,
        values: &[f32],
        features: &[f32],
        clips: Clips<'_>,
        state: &[f32],
        buffers: &mut ProjectorBuffers,
    ) {
        let (width, side, half) = (self.width, self.side, self.side / 2);
        let distinct = features.len() / (side * side * self.inputs);
        let frames: usize = clips.iter().map(Vec::len).sum();
        let rows = frames * half * half;
        let ProjectorBuffers { branches, face, gate, weights, tokens, pooled, .. } = buffers;
        branches.resize_with(self.branches.len(), BranchKept::default);
        for (branch, kept) in self.branches.iter().zip(branches.iter_mut()) {
            let x = stage_forward(&branch.before, values, features, distinct, side, &mut kept.before);
            let columns = fit(&mut kept.columns, rows * 8 * width);
            unfold(x, side, width, clips, columns);
            let sampled = fit(&mut kept.sampled, rows * width);
            branch.sampler.forward(values, columns, rows, sampled);
            let bias = &values[branch.sampler_bias.clone()];
            sampled.chunks_exact_mut(width).for_each(|row| accumulate(row, bias));
            let active = fit(&mut kept.active, rows * width);
            silu(sampled, active);
            let x = stage_forward(&branch.after, values, active, frames, half, &mut kept.after);
            branch.readout.forward(values, x, rows, &mut kept.readout);
        }
        self.face.forward(values, features, distinct * side * side, face);
        let pooled = fit(pooled, distinct * half * half * width);
        pool(&face.out[..distinct * side * side * width], side, width, pooled);
        self.gate.forward(values, state, 1, gate);
        weights.copy_from_slice(&gate.out[..3]);
        ops::softmax(weights);
        let frame = half * half * width;
        tokens.resize(rows * width, 0.0);
        let mut outs = tokens.chunks_exact_mut(frame);
        let each = branches.iter().map(|kept| kept.readout.out.chunks_exact(frame)).collect::<Vec<_>>();
        let [mut video, mut body] = <[_; 2]>::try_from(each).unwrap_or_else(|_| unreachable!("two branches"));
        for &from in clips.iter().flatten() {
            let (Some(out), Some(video), Some(body)) = (outs.next(), video.next(), body.next()) else { return };
            let face = &pooled[from * frame..][..frame];
            for i in 0..frame {
                out[i] = weights[0] * video[i] + weights[1] * body[i] + weights[2] * face[i];
            }
        }
    }

    /// Backward of [`Projector::forward`]: `gradient` is that of the tokens; adds to `gradients`. The features get
    /// none: the tower stays as it is.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        values: &[f32],
        gradients: &mut [f32],
        features: &[f32],
        clips: Clips<'_>,
        state: &[f32],
        gradient: &[f32],
        buffers: &mut ProjectorBuffers,
    ) {
        let (width, side, half) = (self.width, self.side, self.side / 2);
        let distinct = features.len() / (side * side * self.inputs);
        let frames: usize = clips.iter().map(Vec::len).sum();
        let (rows, frame) = (frames * half * half, half * half * width);
        let ProjectorBuffers { branches, face, gate, weights, pooled, a, b, scratch, .. } = buffers;
        let mut along = [0.0f32; 3];
        for (index, (branch, kept)) in self.branches.iter().zip(branches.iter_mut()).enumerate() {
            along[index] = ops::sum(kept.readout.out[..rows * width].iter().zip(gradient).map(|(x, g)| x * g));
            let own = fit(a, rows * width);
            own.iter_mut().zip(gradient).for_each(|(own, g)| *own = g * weights[index]);
            let input = &kept.after[DEPTH - 1].out;
            let inner = fit(b, rows * width);
            branch.readout.backward(values, gradients, input, rows, &kept.readout, own, Some(inner), scratch);
            stage_backward(
                &branch.after,
                values,
                gradients,
                &kept.active,
                frames,
                half,
                &kept.after,
                inner,
                Some(own),
                scratch,
            );
            silu_backward(&kept.sampled[..rows * width], own);
            let bias = &mut gradients[branch.sampler_bias.clone()];
            own.chunks_exact(width).for_each(|row| accumulate(bias, row));
            let columns = fit(b, rows * 8 * width);
            branch.sampler.backward(values, gradients, &kept.columns, rows, own, Some(columns), false);
            let spread = zeros(a, distinct * side * side * width);
            unfold_backward(columns, side, width, clips, spread);
            stage_backward(
                &branch.before,
                values,
                gradients,
                features,
                distinct,
                side,
                &kept.before,
                spread,
                None,
                scratch,
            );
        }
        let own = zeros(a, distinct * frame);
        for (&from, gradient) in clips.iter().flatten().zip(gradient.chunks_exact(frame)) {
            along[2] += ops::sum(pooled[from * frame..][..frame].iter().zip(gradient).map(|(x, g)| x * g));
            let own = &mut own[from * frame..][..frame];
            own.iter_mut().zip(gradient).for_each(|(own, g)| *own += g * weights[2]);
        }
        let cells = fit(b, distinct * side * side * width);
        pool_backward(own, side, width, cells);
        self.face.backward(values, gradients, features, distinct * side * side, face, cells, None, scratch);
        let expected: f32 = along.iter().zip(&*weights).map(|(g, w)| g * w).sum();
        let logits: Vec<f32> = along.iter().zip(&*weights).map(|(g, w)| w * (g - expected)).collect();
        self.gate.backward(values, gradients, state, 1, gate, &logits, None, scratch);
    }
}

fn stage_forward<'a>(
    blocks: &[Block],
    values: &[f32],
    x: &[f32],
    frames: usize,
    side: usize,
    kept: &'a mut Vec<BlockKept>,
) -> &'a [f32] {
    kept.resize_with(blocks.len(), BlockKept::default);
    for (index, block) in blocks.iter().enumerate() {
        let (done, rest) = kept.split_at_mut(index);
        let x = done.last().map_or(x, |kept| &kept.out);
        block.forward(values, x, frames, side, &mut rest[0]);
    }
    kept.last().map_or(&[], |kept| &kept.out)
}

/// `gradient` is that of the last block's output; that of `x` is written if wanted.
#[allow(clippy::too_many_arguments)]
fn stage_backward(
    blocks: &[Block],
    values: &[f32],
    gradients: &mut [f32],
    x: &[f32],
    frames: usize,
    side: usize,
    kept: &[BlockKept],
    gradient: &mut [f32],
    x_gradient: Option<&mut [f32]>,
    scratch: &mut Scratch,
) {
    let width = blocks[0].first.outputs;
    let mut own = gradient[..frames * side * side * width].to_vec();
    for index in (1..blocks.len()).rev() {
        let mut inner = vec![0.0; own.len()];
        let x = &kept[index - 1].out;
        blocks[index].backward(values, gradients, x, frames, side, &kept[index], &mut own, Some(&mut inner), scratch);
        own = inner;
    }
    blocks[0].backward(values, gradients, x, frames, side, &kept[0], &mut own, x_gradient, scratch);
}

/// Means of 2×2 cells: `[frames, side, side, width]` → `[frames, side/2, side/2, width]`, as torch's bilinear
/// interpolation to half of an even side.
fn pool(x: &[f32], side: usize, width: usize, out: &mut [f32]) {
    let half = side / 2;
    out.fill(0.0);
    for (row, x) in x.chunks_exact(width).enumerate() {
        let to = pooled_row(row, side, half);
        out[to * width..][..width].iter_mut().zip(x).for_each(|(out, x)| *out += 0.25 * x);
    }
}

fn pool_backward(out_gradient: &[f32], side: usize, width: usize, x_gradient: &mut [f32]) {
    let half = side / 2;
    for (row, x) in x_gradient.chunks_exact_mut(width).enumerate() {
        let from = pooled_row(row, side, half);
        x.iter_mut().zip(&out_gradient[from * width..][..width]).for_each(|(x, g)| *x = 0.25 * g);
    }
}

fn pooled_row(row: usize, side: usize, half: usize) -> usize {
    let (frame, y, x) = (row / (side * side), row / side % side, row % side);
    (frame * half + y / 2) * half + x / 2
}

#[cfg(test)]
mod tests {
    use super::super::gradient_check::{check, random};
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn gradients_equal_finite_differences() {
        let mut plan = Plan::default();
        let projector = Projector::new(&mut plan, 10, 6, 4, 5, 7);
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let mut values = random(plan.len(), 0.7, &mut rng);
        let features = random(3 * 16 * 10, 1.0, &mut rng);
        let state = random(5, 1.0, &mut rng);
        let clips = [vec![0, 0, 1], vec![2, 1, 2]];
        let along = random(6 * 4 * 6, 1.0, &mut rng);
        let mut buffers = ProjectorBuffers::default();
        let mut gradients = vec![0.0; plan.len()];
        projector.forward(&values, &features, &clips, &state, &mut buffers);
        projector.backward(&values, &mut gradients, &features, &clips, &state, &along, &mut buffers);
        check(&plan, &mut values, &gradients, |values| {
            projector.forward(values, &features, &clips, &state, &mut buffers);
            buffers.tokens().iter().zip(&along).map(|(x, g)| f64::from(x * g)).sum()
        });
    }

    #[test]
    fn files_have_the_channels_of_a_convolution_outermost() {
        let (shape, values) = Projector::checkpoint_layout(
            "model.mm_projector.sampler_video.0.weight",
            &[1, 2, 2, 2, 3],
            &(0..24).map(|v| v as f32).collect::<Vec<_>>(),
        );
        assert_eq!(shape, [1, 3, 2, 2, 2]);
        // Channel 1 at time 0, row 0, column 1 was element 1 · 3 + 1.
        assert_eq!((values[0], values[8 + 1], values[23]), (0.0, 4.0, 23.0));
    }
}
