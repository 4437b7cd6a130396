//! Layers that the projector and the decoder are built of, forward and backward, beyond what [`super::ops`] has:
//! projections without bias, depthwise and strided convolutions on channels-last volumes, gates, and the decoder's
//! norm, rotary positions and grouped attention.

use super::ops::{self, Matrix, exponential};
use super::parameters::{Plan, Treatment};
use std::ops::Range;

/// The first `len` elements of a buffer that grows to the largest size asked for. What was in it stays.
pub fn fit(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// As [`fit`], all zero.
pub fn zeros(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    let slice = fit(buffer, len);
    slice.fill(0.0);
    slice
}

/// `sum += x`.
pub fn accumulate(sum: &mut [f32], x: &[f32]) {
    sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
}

/// A projection without bias, `[outputs, inputs]`.
#[derive(Clone, Debug)]
pub struct Projection {
    /// Place of the weight.
    pub weight: Range<usize>,
    /// Rows.
    pub outputs: usize,
    /// Columns.
    pub inputs: usize,
}

impl Projection {
    /// Adds the weight to the plan under `name` with the given stored shape (of `outputs · inputs` elements).
    pub fn new(plan: &mut Plan, name: &str, shape: &[usize]) -> Self {
        let weight = plan.add(name, shape, Treatment { decay: true, rate: 1.0 });
        let outputs = shape[0];
        Self { inputs: weight.len() / outputs, outputs, weight }
    }

    /// x `[rows, inputs]` → out `[rows, outputs]`.
    pub fn forward(&self, values: &[f32], x: &[f32], rows: usize, out: &mut [f32]) {
        let weight = Matrix::transposed(&values[self.weight.clone()], self.inputs);
        ops::multiply(out, rows, self.outputs, self.inputs, Matrix::new(x, self.inputs), weight, false);
    }

    /// Adds to the weight's gradient; writes that of `x` if wanted, or adds to it with `add`.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        values: &[f32],
        gradients: &mut [f32],
        x: &[f32],
        rows: usize,
        out_gradient: &[f32],
        x_gradient: Option<&mut [f32]>,
        add: bool,
    ) {
        let (outputs, inputs) = (self.outputs, self.inputs);
        if let Some(x_gradient) = x_gradient {
            let weight = Matrix::new(&values[self.weight.clone()], inputs);
            ops::multiply(x_gradient, rows, inputs, outputs, Matrix::new(out_gradient, outputs), weight, add);
        }
        let gradient = Matrix::transposed(out_gradient, outputs);
        let weight_gradient = &mut gradients[self.weight.clone()];
        ops::multiply(weight_gradient, outputs, inputs, rows, gradient, Matrix::new(x, inputs), true);
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exponential(-x))
}

/// `out = x·sigmoid(x)`.
pub fn silu(x: &[f32], out: &mut [f32]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = x * sigmoid(x);
    }
}

/// Backward of [`silu`], in place.
pub fn silu_backward(x: &[f32], gradient: &mut [f32]) {
    for (gradient, &x) in gradient.iter_mut().zip(x) {
        let s = sigmoid(x);
        *gradient *= s * (1.0 + x * (1.0 - s));
    }
}

/// `out = sigmoid(x)`.
pub fn sigmoids(x: &[f32], out: &mut [f32]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = sigmoid(x);
    }
}

/// Weight `[channels, 9]` as `[9, channels]`, so that channels lie side by side.
fn taps(weight: &[f32], channels: usize) -> Vec<f32> {
    (0..9 * channels).map(|i| weight[i % channels * 9 + i / channels]).collect()
}

/// Rows and columns that tap `tap` of a 3×3 kernel reads for each output inside a grid of `side`: (output, input).
fn tap_pairs(tap: usize, side: usize) -> impl Iterator<Item = (usize, usize)> {
    let (dy, dx) = (tap / 3, tap % 3);
    let range = move |d: usize| (1usize.saturating_sub(d))..(side + 1 - d).min(side);
    range(dy).flat_map(move |y| range(dx).map(move |x| (y * side + x, (y + dy - 1) * side + x + dx - 1)))
}

/// Depthwise 3×3 convolution, stride 1, one zero around: x and out `[frames, side, side, channels]`, weight
/// `[channels, 1, 3, 3]`.
pub fn depthwise(x: &[f32], side: usize, weight: &[f32], out: &mut [f32]) {
    let channels = weight.len() / 9;
    let (taps, frame) = (taps(weight, channels), side * side * channels);
    out.fill(0.0);
    for (x, out) in x.chunks_exact(frame).zip(out.chunks_exact_mut(frame)) {
        for (tap, weight) in taps.chunks_exact(channels).enumerate() {
            for (to, from) in tap_pairs(tap, side) {
                let (out, x) = (&mut out[to * channels..][..channels], &x[from * channels..][..channels]);
                for c in 0..channels {
                    out[c] += weight[c] * x[c];
                }
            }
        }
    }
}

/// Backward of [`depthwise`]: adds to `weight_gradient`, writes `x_gradient`.
pub fn depthwise_backward(
    x: &[f32],
    side: usize,
    weight: &[f32],
    out_gradient: &[f32],
    weight_gradient: &mut [f32],
    x_gradient: &mut [f32],
) {
    let channels = weight.len() / 9;
    let (taps, frame) = (taps(weight, channels), side * side * channels);
    let mut sums = vec![0.0; 9 * channels];
    x_gradient.fill(0.0);
    let frames = x.chunks_exact(frame).zip(out_gradient.chunks_exact(frame)).zip(x_gradient.chunks_exact_mut(frame));
    for ((x, gradient), x_gradient) in frames {
        for (tap, (weight, sum)) in taps.chunks_exact(channels).zip(sums.chunks_exact_mut(channels)).enumerate() {
            for (to, from) in tap_pairs(tap, side) {
                let gradient = &gradient[to * channels..][..channels];
                let x = &x[from * channels..][..channels];
                let x_gradient = &mut x_gradient[from * channels..][..channels];
                for c in 0..channels {
                    x_gradient[c] += weight[c] * gradient[c];
                    sum[c] += x[c] * gradient[c];
                }
            }
        }
    }
    for (i, sum) in sums.iter().enumerate() {
        weight_gradient[i % channels * 9 + i / channels] += sum;
    }
}

/// The frames each clip takes out of the distinct ones, in order of time.
pub type Clips<'a> = &'a [Vec<usize>];

/// Columns of a 2×2×2 convolution with strides (1, 2, 2), no padding in space, one zero frame before: x
/// `[distinct frames, side, side, channels]` → out `[clips, frames, (side/2)², 2·2·2·channels]`, channels innermost.
pub fn unfold(x: &[f32], side: usize, channels: usize, clips: Clips<'_>, out: &mut [f32]) {
    let half = side / 2;
    let mut columns = out.chunks_exact_mut(8 * channels);
    for clip in clips {
        for time in 0..clip.len() {
            for position in 0..half * half {
                let Some(column) = columns.next() else { return };
                for (part, out) in column.chunks_exact_mut(2 * channels).enumerate() {
                    match unfold_source(clip, time, position, part, side) {
                        Some(from) => out.copy_from_slice(&x[from * channels..][..2 * channels]),
                        None => out.fill(0.0),
                    }
                }
            }
        }
    }
}

/// Row of x where two neighbouring cells of a column lie: `part` counts (earlier or same frame, upper or lower row).
fn unfold_source(clip: &[usize], time: usize, position: usize, part: usize, side: usize) -> Option<usize> {
    let half = side / 2;
    let frame = *clip.get((time + part / 2).checked_sub(1)?)?;
    Some(frame * side * side + (position / half * 2 + part % 2) * side + position % half * 2)
}

/// Backward of [`unfold`]: adds to `x_gradient`.
pub fn unfold_backward(out_gradient: &[f32], side: usize, channels: usize, clips: Clips<'_>, x_gradient: &mut [f32]) {
    let half = side / 2;
    let mut columns = out_gradient.chunks_exact(8 * channels);
    for clip in clips {
        for time in 0..clip.len() {
            for position in 0..half * half {
                let Some(column) = columns.next() else { return };
                for (part, gradient) in column.chunks_exact(2 * channels).enumerate() {
                    if let Some(to) = unfold_source(clip, time, position, part, side) {
                        accumulate(&mut x_gradient[to * channels..][..2 * channels], gradient);
                    }
                }
            }
        }
    }
}

/// Cosine and sine of every rotary angle, `[positions, head_dim / 2]` each (Su et al. 2021, half-split form).
pub struct Rotary {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Rotary {
    /// A table for positions below `positions`.
    pub fn new(positions: usize, head_dim: usize, theta: f32) -> Self {
        let half = head_dim / 2;
        let angle = |i: usize| {
            let frequency = f64::from(theta).powf(-((i % half) as f64) / half as f64);
            (i / half) as f64 * frequency
        };
        let angles: Vec<f64> = (0..positions * half).map(angle).collect();
        let cos = angles.iter().map(|a| a.cos() as f32).collect();
        Self { cos, sin: angles.iter().map(|a| a.sin() as f32).collect(), half }
    }

    /// Turns the first `heads` heads of a row at `position`; back with `sign` -1.
    pub fn turn(&self, row: &mut [f32], heads: usize, position: usize, sign: f32) {
        let half = self.half;
        let (cos, sin) = (&self.cos[position * half..][..half], &self.sin[position * half..][..half]);
        for head in row.chunks_exact_mut(2 * half).take(heads) {
            let (low, high) = head.split_at_mut(half);
            for i in 0..half {
                let (a, b, s) = (low[i], high[i], sin[i] * sign);
                low[i] = a * cos[i] - b * s;
                high[i] = b * cos[i] + a * s;
            }
        }
    }
}

/// One sequence that branches: `shared` rows, then continuations of them that do not see each other, one behind the
/// other. The positions of every branch go on from the shared rows'.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    /// Rows that all branches see.
    pub shared: usize,
    /// Rows of each branch.
    pub branches: Vec<usize>,
}

/// Rows that lie one behind the other and see each other and the shared rows: the shared rows themselves, or a branch.
#[derive(Clone, Copy)]
struct Segment {
    start: usize,
    rows: usize,
    /// Shared rows before its own that it sees.
    before: usize,
    /// Where its scores begin.
    scores: usize,
}

impl Segment {
    fn keys(&self) -> usize {
        self.before + self.rows
    }
}

impl Tree {
    /// Rows of all together.
    pub fn rows(&self) -> usize {
        self.shared + self.branches.iter().sum::<usize>()
    }

    /// Elements of one head's attention scores.
    pub fn scores(&self) -> usize {
        self.segments().map(|segment| segment.rows * segment.keys()).sum()
    }

    /// First row of a branch.
    pub fn start(&self, branch: usize) -> usize {
        self.shared + self.branches[..branch].iter().sum::<usize>()
    }

    fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        let lengths = std::iter::once((0, self.shared)).chain(self.branches.iter().map(|&rows| (self.shared, rows)));
        let (mut start, mut scores) = (0, 0);
        lengths.filter(|&(_, rows)| rows > 0).map(move |(before, rows)| {
            let segment = Segment { start, rows, before, scores };
            start += rows;
            scores += rows * segment.keys();
            segment
        })
    }

    /// Calls `turn(row, position)` for each row.
    fn positions(&self, mut turn: impl FnMut(usize, usize)) {
        for segment in self.segments() {
            (0..segment.rows).for_each(|row| turn(segment.start + row, segment.before + row));
        }
    }
}

/// Grouped-query attention over one branching sequence whose queries, keys and values lie side by side in each row.
#[derive(Clone, Copy, Debug)]
pub struct GroupedAttention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub key_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl GroupedAttention {
    /// Elements of a row of queries, keys and values.
    pub fn stride(&self) -> usize {
        (self.heads + 2 * self.key_heads) * self.head_dim
    }

    fn offsets(&self, head: usize) -> (usize, usize, usize) {
        let key = self.heads + head / (self.heads / self.key_heads);
        (head * self.head_dim, key * self.head_dim, (key + self.key_heads) * self.head_dim)
    }

    /// Turns queries and keys of `qkv` `[rows, stride]` to their positions; back with `sign` -1.
    pub fn turn(&self, rotary: &Rotary, tree: &Tree, qkv: &mut [f32], sign: f32) {
        let stride = self.stride();
        tree.positions(|row, position| {
            rotary.turn(&mut qkv[row * stride..][..stride], self.heads + self.key_heads, position, sign);
        });
    }

    /// qkv `[rows, stride]`, already turned → out `[rows, heads · head_dim]`; `scores` keeps the probabilities,
    /// `[heads, tree.scores()]`.
    pub fn forward(&self, qkv: &[f32], tree: &Tree, out: &mut [f32], scores: &mut [f32]) {
        let (d, stride, width, all) = (self.head_dim, self.stride(), self.heads * self.head_dim, tree.scores());
        let scale = 1.0 / (d as f32).sqrt();
        for head in 0..self.heads {
            let (q, k, v) = self.offsets(head);
            for Segment { start, rows, before, scores: at } in tree.segments() {
                let keys = before + rows;
                let scores = &mut scores[head * all + at..][..rows * keys];
                let queries = Matrix::new(&qkv[start * stride + q..], stride);
                let shared_keys = Matrix::transposed(&qkv[k..], stride);
                let own_keys = Matrix::transposed(&qkv[start * stride + k..], stride);
                ops::multiply_exact(scores, keys, rows, before, d, queries, shared_keys, false);
                ops::multiply_exact(&mut scores[before..], keys, rows, rows, d, queries, own_keys, false);
                for (row, scores) in scores.chunks_exact_mut(keys).enumerate() {
                    let (seen, hidden) = scores.split_at_mut(before + row + 1);
                    seen.iter_mut().for_each(|s| *s *= scale);
                    ops::softmax(seen);
                    hidden.fill(0.0);
                }
                let out = &mut out[start * width + head * d..];
                let shared_values = Matrix::new(&qkv[v..], stride);
                let own_values = Matrix::new(&qkv[start * stride + v..], stride);
                let own = Matrix::new(&scores[before..], keys);
                ops::multiply_exact(out, width, rows, d, rows, own, own_values, false);
                if before > 0 {
                    let p = Matrix::new(scores, keys);
                    ops::multiply_exact(out, width, rows, d, before, p, shared_values, true);
                }
            }
        }
    }

    /// Backward of [`GroupedAttention::forward`]: writes `qkv_gradient` `[rows, stride]`; `scratch` grows to the
    /// largest segment's scores.
    pub fn backward(
        &self,
        qkv: &[f32],
        tree: &Tree,
        scores: &[f32],
        out_gradient: &[f32],
        qkv_gradient: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        let (d, stride, width, all) = (self.head_dim, self.stride(), self.heads * self.head_dim, tree.scores());
        let scale = 1.0 / (d as f32).sqrt();
        qkv_gradient.fill(0.0);
        for head in 0..self.heads {
            let (q, k, v) = self.offsets(head);
            for Segment { start, rows, before, scores: at } in tree.segments() {
                let (keys, first) = (before + rows, start * stride);
                let probabilities = &scores[head * all + at..][..rows * keys];
                let along = Matrix::new(&out_gradient[start * width + head * d..], width);
                let inner = fit(scratch, rows * keys);
                // The shared rows as keys and values, then the segment's own.
                let parts = [(0, 0, before), (first, before, rows)];
                for (row, column, count) in parts.into_iter().filter(|part| part.2 > 0) {
                    let p = Matrix::transposed(&probabilities[column..], keys);
                    ops::multiply_exact(&mut qkv_gradient[row + v..], stride, count, d, rows, p, along, true);
                    let values = Matrix::transposed(&qkv[row + v..], stride);
                    ops::multiply_exact(&mut inner[column..], keys, rows, count, d, along, values, false);
                }
                for (row, p) in inner.chunks_exact_mut(keys).zip(probabilities.chunks_exact(keys)) {
                    let expected = ops::sum(row.iter().zip(p).map(|(g, p)| g * p));
                    row.iter_mut().zip(p).for_each(|(g, p)| *g = (*g - expected) * p * scale);
                }
                for (row, column, count) in parts.into_iter().filter(|part| part.2 > 0) {
                    let (s, key) = (Matrix::new(&inner[column..], keys), Matrix::new(&qkv[row + k..], stride));
                    ops::multiply_exact(&mut qkv_gradient[first + q..], stride, rows, d, count, s, key, true);
                    let (s, query) =
                        (Matrix::transposed(&inner[column..], keys), Matrix::new(&qkv[first + q..], stride));
                    ops::multiply_exact(&mut qkv_gradient[row + k..], stride, count, d, rows, s, query, true);
                }
            }
        }
    }
}
