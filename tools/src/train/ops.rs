//! The arithmetic of training on plain slices: every operation forward and backward, each on one thread, or on a GPU where
//! it is a large product. The
//! trainers split a batch over threads and call these from each, so that no barrier stands inside a step.
//!
//! Buffers are f32, row-major and contiguous unless a stride is named. Backward functions *add* to gradients of
//! parameters and *write* gradients of activations, unless their documentation says otherwise.

use candor_kernels::DeviceError;
use candor_kernels::cpu::gemm::{MatrixRef, Precision, gemm};
use candor_kernels::cpu::pool::ThreadPool;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Lanes that sums run in, so that the compiler can vectorise them in a fixed order.
const LANES: usize = 16;
/// Rows of a register tile of [`multiply_exact`].
const TILE_ROWS: usize = 8;
/// Columns of a register tile of [`multiply_exact`].
const TILE_COLUMNS: usize = 32;

/// A matrix in a slice: rows of `stride` elements, read as it lies or transposed.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    /// The elements.
    pub data: &'a [f32],
    /// Elements from one stored row to the next.
    pub stride: usize,
    /// Whether the product reads it transposed.
    pub transposed: bool,
}

impl<'a> Matrix<'a> {
    /// Rows of `stride` elements, read as they lie.
    pub fn new(data: &'a [f32], stride: usize) -> Self {
        Self { data, stride, transposed: false }
    }

    /// The same elements, read transposed.
    pub fn transposed(data: &'a [f32], stride: usize) -> Self {
        Self { data, stride, transposed: true }
    }

    fn strided(&self, rows: usize, columns: usize) -> Result<MatrixRef<'a>, DeviceError> {
        let (row, column) = if self.transposed { (1, self.stride) } else { (self.stride, 1) };
        MatrixRef::new(self.data, rows, columns, row, column)
    }

    /// Packs `width` (at most `PANEL`) columns from `column` on as `[depth, PANEL]`, zeros behind them.
    fn pack_columns<const PANEL: usize>(&self, column: usize, width: usize, depth: usize, panel: &mut Vec<f32>) {
        panel.clear();
        panel.resize(depth * PANEL, 0.0);
        if self.transposed {
            for j in 0..width {
                let source = &self.data[(column + j) * self.stride..][..depth];
                for (p, value) in source.iter().enumerate() {
                    panel[p * PANEL + j] = *value;
                }
            }
        } else {
            for (p, row) in panel.chunks_exact_mut(PANEL).enumerate() {
                row[..width].copy_from_slice(&self.data[p * self.stride + column..][..width]);
            }
        }
    }
}

#[inline(always)]
fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
    // Without the instruction `mul_add` is a slow library call.
    if cfg!(target_feature = "fma") { a.mul_add(b, c) } else { a * b + c }
}

/// `c = a · b` (or `c += a · b`): a `[rows, depth]`, b `[depth, columns]`, c `[rows, columns]` with rows `stride` apart.
/// In f32; meant for the small products of attention, and for exactness in tests.
#[allow(clippy::too_many_arguments)]
pub fn multiply_exact(
    c: &mut [f32],
    stride: usize,
    rows: usize,
    columns: usize,
    depth: usize,
    a: Matrix,
    b: Matrix,
    accumulate: bool,
) {
    // a's rows are packed like columns of its transpose.
    let a = Matrix { transposed: !a.transposed, ..a };
    let mut left = Vec::new();
    let mut panels: Vec<f32> = Vec::with_capacity(depth * columns.next_multiple_of(TILE_COLUMNS));
    let mut panel = Vec::new();
    for column in (0..columns).step_by(TILE_COLUMNS) {
        b.pack_columns::<TILE_COLUMNS>(column, TILE_COLUMNS.min(columns - column), depth, &mut panel);
        panels.extend_from_slice(&panel);
    }
    for row in (0..rows).step_by(TILE_ROWS) {
        let height = TILE_ROWS.min(rows - row);
        a.pack_columns::<TILE_ROWS>(row, height, depth, &mut left);
        for (index, panel) in panels.chunks_exact(depth * TILE_COLUMNS).enumerate() {
            let column = index * TILE_COLUMNS;
            let width = TILE_COLUMNS.min(columns - column);
            let tile = multiply_tile(&left, panel);
            for (i, sums) in tile.iter().enumerate().take(height) {
                let out = &mut c[(row + i) * stride + column..][..width];
                if accumulate {
                    out.iter_mut().zip(sums).for_each(|(o, s)| *o += s);
                } else {
                    out.copy_from_slice(&sums[..width]);
                }
            }
        }
    }
}

#[inline(never)]
fn multiply_tile(left: &[f32], right: &[f32]) -> [[f32; TILE_COLUMNS]; TILE_ROWS] {
    let mut sums = [[0.0f32; TILE_COLUMNS]; TILE_ROWS];
    for (l, r) in left.chunks_exact(TILE_ROWS).zip(right.chunks_exact(TILE_COLUMNS)) {
        for i in 0..TILE_ROWS {
            for j in 0..TILE_COLUMNS {
                sums[i][j] = multiply_add(l[i], r[j], sums[i][j]);
            }
        }
    }
    sums
}

/// Whether the large products take f32 operands. Tests compare with finite differences, which needs them.
static EXACT: AtomicBool = AtomicBool::new(cfg!(test));

/// Lets the large products of this process take f32 operands, or bf16: twice the speed where the processor has them.
/// Sums, parameters and all else are f32 either way.
pub fn set_exact(exact: bool) {
    EXACT.store(exact, Ordering::Relaxed);
}

/// `c = a · b` (or `c += a · b`), contiguous: a `[rows, depth]`, b `[depth, columns]`, c `[rows, columns]`; on the
/// calling thread, or on the GPU that was chosen ([`products`](super::products)).
pub fn multiply(c: &mut [f32], rows: usize, columns: usize, depth: usize, a: Matrix, b: Matrix, accumulate: bool) {
    static ALONE: LazyLock<ThreadPool> = LazyLock::new(|| ThreadPool::new(Some(1)));
    let on_gpu = super::products::for_product(rows * columns * depth);
    if on_gpu.is_some_and(|gpu| gpu.multiply(c, rows, columns, depth, a, b, accumulate)) {
        return;
    }
    let precision = if EXACT.load(Ordering::Relaxed) { Precision::F32 } else { Precision::Bf16 };
    let product = a.strided(rows, depth).and_then(|a| {
        let b = b.strided(depth, columns)?;
        gemm(&ALONE, a, b, &mut c[..rows * columns], accumulate, precision)
    });
    // Sizes come from a checked configuration, so this is a mistake in the caller, as an index out of bounds is.
    if let Err(error) = product {
        panic!("{error}");
    }
}

/// `out = x · weightᵀ + bias`: x `[rows, in]`, weight `[out, in]`, bias `[out]`, out `[rows, out]`.
pub fn linear(x: &[f32], rows: usize, weight: &[f32], bias: &[f32], out: &mut [f32]) {
    let (outputs, inputs) = (bias.len(), weight.len() / bias.len());
    multiply(out, rows, outputs, inputs, Matrix::new(x, inputs), Matrix::transposed(weight, inputs), false);
    for row in out[..rows * outputs].chunks_exact_mut(outputs) {
        row.iter_mut().zip(bias).for_each(|(o, b)| *o += b);
    }
}

/// Backward of [`linear`]: adds to `weight_gradient` and `bias_gradient`; writes `x_gradient` `[rows, in]` if wanted
/// (`weight` is read for that only).
#[allow(clippy::too_many_arguments)]
pub fn linear_backward(
    x: &[f32],
    rows: usize,
    weight: &[f32],
    out_gradient: &[f32],
    weight_gradient: &mut [f32],
    bias_gradient: &mut [f32],
    x_gradient: Option<&mut [f32]>,
) {
    let (outputs, inputs) = (bias_gradient.len(), weight_gradient.len() / bias_gradient.len());
    let gradient = &out_gradient[..rows * outputs];
    if let Some(x_gradient) = x_gradient {
        multiply(x_gradient, rows, inputs, outputs, Matrix::new(gradient, outputs), Matrix::new(weight, inputs), false);
    }
    multiply(
        weight_gradient,
        outputs,
        inputs,
        rows,
        Matrix::transposed(gradient, outputs),
        Matrix::new(x, inputs),
        true,
    );
    for row in gradient.chunks_exact(outputs) {
        bias_gradient.iter_mut().zip(row).for_each(|(b, g)| *b += g);
    }
}

/// Sum in `LANES` partial sums.
pub fn sum(values: impl ExactSizeIterator<Item = f32>) -> f32 {
    let mut lanes = [0.0f32; LANES];
    for (i, value) in values.enumerate() {
        lanes[i % LANES] += value;
    }
    lanes.iter().sum()
}

#[allow(clippy::needless_range_loop)] // by index it vectorises
fn lane_sums<const N: usize>(width: usize, terms: impl Fn(usize) -> [f32; N]) -> [f32; N] {
    let mut lanes = [[0.0f32; LANES]; N];
    let whole = width / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        for lane in 0..LANES {
            let values = terms(start + lane);
            for n in 0..N {
                lanes[n][lane] += values[n];
            }
        }
    }
    let mut sums = lanes.map(|lane| lane.iter().sum::<f32>());
    for i in whole..width {
        let values = terms(i);
        for n in 0..N {
            sums[n] += values[n];
        }
    }
    sums
}

/// `out = (x - mean) / sqrt(variance + eps) · weight + bias` over each row of `[rows, width]`; keeps mean and
/// reciprocal deviation of each row in `statistics` `[rows, 2]`.
pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32], statistics: &mut [f32]) {
    let width = weight.len();
    for ((row, out), statistics) in
        x.chunks_exact(width).zip(out.chunks_exact_mut(width)).zip(statistics.chunks_exact_mut(2))
    {
        let [total] = lane_sums(width, |i| [row[i]]);
        let mean = total / width as f32;
        let [squares] = lane_sums(width, |i| [(row[i] - mean) * (row[i] - mean)]);
        let scale = 1.0 / (squares / width as f32 + eps).sqrt();
        for i in 0..width {
            out[i] = (row[i] - mean) * scale * weight[i] + bias[i];
        }
        statistics.copy_from_slice(&[mean, scale]);
    }
}

/// Backward of [`layer_norm`]: *adds* to `x_gradient` (a residual path is already in it), `weight_gradient` and
/// `bias_gradient`.
pub fn layer_norm_backward(
    x: &[f32],
    weight: &[f32],
    statistics: &[f32],
    out_gradient: &[f32],
    weight_gradient: &mut [f32],
    bias_gradient: &mut [f32],
    x_gradient: &mut [f32],
) {
    let width = weight.len();
    let rows = x.chunks_exact(width).zip(out_gradient.chunks_exact(width));
    for (((row, gradient), statistics), x_gradient) in
        rows.zip(statistics.chunks_exact(2)).zip(x_gradient.chunks_exact_mut(width))
    {
        let (mean, scale) = (statistics[0], statistics[1]);
        let [total, along] = lane_sums(width, |i| {
            let inner = gradient[i] * weight[i];
            [inner, inner * (row[i] - mean) * scale]
        });
        let (total, along) = (total / width as f32, along / width as f32);
        for i in 0..width {
            let normal = (row[i] - mean) * scale;
            x_gradient[i] += scale * (gradient[i] * weight[i] - total - normal * along);
            weight_gradient[i] += gradient[i] * normal;
            bias_gradient[i] += gradient[i];
        }
    }
}

/// e^x to about 2 units in the last place, written so that loops over it vectorise; 0 below -87, finite above 88.
#[inline(always)]
pub fn exponential(x: f32) -> f32 {
    // Adding 1.5·2^23 rounds to the nearest integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let power = shifted - ROUND;
    let r = x - power * 0.693_359_4 + power * 2.121_944_4e-4;
    let series = 1.0
        + r * (1.0
            + r * (0.5
                + r * (0.166_666_55 + r * (0.041_665_795 + r * (8.333_452e-3 + r * (1.398_2e-3 + r * 1.987_569e-4))))));
    series * f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000))
}

/// Φ(x) and φ(x) of the normal distribution; erf by Abramowitz and Stegun 7.1.26 (error below 1.5e-7).
#[inline(always)]
fn normal(x: f32) -> (f32, f32) {
    let bell = exponential(-0.5 * x * x);
    let t = 1.0 / (1.0 + 0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2 * x.abs());
    let series =
        t * (0.254_829_6 + t * (-0.284_496_74 + t * (1.421_413_7 + t * (-1.453_152 + t * 1.061_405_4)))) * bell;
    let upper = 1.0 - 0.5 * series;
    (if x >= 0.0 { upper } else { 1.0 - upper }, bell * 0.398_942_3)
}

/// `out = x·Φ(x)`, the exact GELU.
pub fn gelu(x: &[f32], out: &mut [f32]) {
    for (o, &x) in out.iter_mut().zip(x) {
        *o = x * normal(x).0;
    }
}

/// Backward of [`gelu`], in place: `gradient *= Φ(x) + x·φ(x)`.
pub fn gelu_backward(x: &[f32], gradient: &mut [f32]) {
    for (g, &x) in gradient.iter_mut().zip(x) {
        let (cumulative, density) = normal(x);
        *g *= cumulative + x * density;
    }
}

/// In-place softmax of one row.
pub fn softmax(row: &mut [f32]) {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for (i, value) in row.iter().enumerate() {
        lanes[i % LANES] = lanes[i % LANES].max(*value);
    }
    let top = lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for value in row.iter_mut() {
        *value = exponential(*value - top);
    }
    let [total] = lane_sums(row.len(), |i| [row[i]]);
    let scale = 1.0 / total;
    row.iter_mut().for_each(|value| *value *= scale);
}

/// Self-attention over one sequence. In each row of `qkv` lie the queries of all heads, then the keys, then the values;
/// with fewer key heads than heads each serves a group (grouped-query attention).
#[derive(Clone, Copy, Debug)]
pub struct SelfAttention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; `heads` is a multiple of it.
    pub key_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Whether a token sees only itself and those before it.
    pub causal: bool,
}

impl SelfAttention {
    /// Elements of a row of `qkv`.
    pub fn row(&self) -> usize {
        (self.heads + 2 * self.key_heads) * self.head_dim
    }

    /// Elements of a row of the output.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Where a head's query, key and value start in a row.
    fn places(&self, head: usize) -> [usize; 3] {
        let group = head / (self.heads / self.key_heads);
        [head, self.heads + group, self.heads + self.key_heads + group].map(|place| place * self.head_dim)
    }

    /// qkv `[tokens, row]` → out `[tokens, width]`; keys from `visible` on are hidden. `scores` keeps the
    /// probabilities, `[heads, tokens, tokens]`.
    pub fn forward(&self, qkv: &[f32], tokens: usize, visible: usize, out: &mut [f32], scores: &mut [f32]) {
        let (head_dim, stride, scale) = (self.head_dim, self.row(), self.scale());
        for head in 0..self.heads {
            let [query, key, value] = self.places(head);
            let scores = &mut scores[head * tokens * tokens..][..tokens * tokens];
            let (q, k) = (Matrix::new(&qkv[query..], stride), Matrix::transposed(&qkv[key..], stride));
            multiply_exact(scores, tokens, tokens, tokens, head_dim, q, k, false);
            for (index, row) in scores.chunks_exact_mut(tokens).enumerate() {
                let seen = if self.causal { visible.min(index + 1) } else { visible };
                row[..seen].iter_mut().for_each(|value| *value *= scale);
                row[seen..].fill(0.0);
                softmax(&mut row[..seen]);
            }
            let (p, v) = (Matrix::new(scores, tokens), Matrix::new(&qkv[value..], stride));
            multiply_exact(&mut out[head * head_dim..], self.width(), tokens, head_dim, tokens, p, v, false);
        }
    }

    /// Backward of [`SelfAttention::forward`]: writes `qkv_gradient` `[tokens, row]`; `scratch` holds `tokens²`
    /// elements.
    pub fn backward(
        &self,
        qkv: &[f32],
        tokens: usize,
        scores: &[f32],
        out_gradient: &[f32],
        qkv_gradient: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (head_dim, stride, scale) = (self.head_dim, self.row(), self.scale());
        qkv_gradient.fill(0.0);
        for head in 0..self.heads {
            let [q, k, v] = self.places(head);
            let probabilities = &scores[head * tokens * tokens..][..tokens * tokens];
            let along = Matrix::new(&out_gradient[head * head_dim..], self.width());
            let inner = &mut scratch[..tokens * tokens];
            // Values: Pᵀ · dO. Probabilities: dO · Vᵀ, then through the softmax.
            let p = Matrix::transposed(probabilities, tokens);
            multiply_exact(&mut qkv_gradient[v..], stride, tokens, head_dim, tokens, p, along, true);
            let value = Matrix::transposed(&qkv[v..], stride);
            multiply_exact(inner, tokens, tokens, tokens, head_dim, along, value, false);
            for (row, p) in inner.chunks_exact_mut(tokens).zip(probabilities.chunks_exact(tokens)) {
                let [expected] = lane_sums(tokens, |i| [row[i] * p[i]]);
                row.iter_mut().zip(p).for_each(|(g, p)| *g = (*g - expected) * p * scale);
            }
            let (s, key) = (Matrix::new(inner, tokens), Matrix::new(&qkv[k..], stride));
            multiply_exact(&mut qkv_gradient[q..], stride, tokens, head_dim, tokens, s, key, true);
            let (s, query) = (Matrix::transposed(inner, tokens), Matrix::new(&qkv[q..], stride));
            multiply_exact(&mut qkv_gradient[k..], stride, tokens, head_dim, tokens, s, query, true);
        }
    }
}

/// `out = x / sqrt(mean(x²) + eps) · weight` over each row of `[rows, width]`; keeps each row's factor in `scales`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32], scales: &mut [f32]) {
    let width = weight.len();
    for ((row, out), scale) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)).zip(scales) {
        let [squares] = lane_sums(width, |i| [row[i] * row[i]]);
        *scale = 1.0 / (squares / width as f32 + eps).sqrt();
        for i in 0..width {
            out[i] = row[i] * *scale * weight[i];
        }
    }
}

/// Backward of [`rms_norm`]: *adds* to `x_gradient` and `weight_gradient`.
pub fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    scales: &[f32],
    out_gradient: &[f32],
    weight_gradient: &mut [f32],
    x_gradient: &mut [f32],
) {
    let width = weight.len();
    let rows = x.chunks_exact(width).zip(out_gradient.chunks_exact(width));
    for (((row, gradient), scale), x_gradient) in rows.zip(scales).zip(x_gradient.chunks_exact_mut(width)) {
        let [along] = lane_sums(width, |i| [gradient[i] * weight[i] * row[i]]);
        let along = along * scale * scale / width as f32;
        for i in 0..width {
            x_gradient[i] += scale * (gradient[i] * weight[i] - row[i] * along);
            weight_gradient[i] += gradient[i] * row[i] * scale;
        }
    }
}

/// `out = silu(gate) · up`, the gated linear unit of Qwen2.
pub fn gated_silu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + exponential(-gate)) * up;
    }
}

/// Backward of [`gated_silu`]: writes the gradients of `gate` and `up`.
pub fn gated_silu_backward(
    gate: &[f32],
    up: &[f32],
    out_gradient: &[f32],
    gate_gradient: &mut [f32],
    up_gradient: &mut [f32],
) {
    let out = gate_gradient.iter_mut().zip(up_gradient);
    for ((((gate_gradient, up_gradient), gate), up), g) in out.zip(gate).zip(up).zip(out_gradient) {
        let sigmoid = 1.0 / (1.0 + exponential(-gate));
        *up_gradient = g * gate * sigmoid;
        *gate_gradient = g * up * sigmoid * (1.0 + gate * (1.0 - sigmoid));
    }
}

/// Dropout in place: every element is kept with probability `1 - rate` and scaled up, or set to zero. Which ones follows
/// from `seed` alone, so that the same call on the gradient is the backward.
pub fn dropout(x: &mut [f32], rate: f32, seed: u32) {
    let bound = (f64::from(rate) * f64::from(u32::MAX)) as u32;
    let scale = 1.0 / (1.0 - rate);
    for (i, value) in x.iter_mut().enumerate() {
        // An integer hash (Wellons' lowbias32).
        let mut bits = (i as u32).wrapping_add(seed.wrapping_mul(0x9e37_79b9));
        bits = (bits ^ bits >> 16).wrapping_mul(0x7feb_352d);
        bits = (bits ^ bits >> 15).wrapping_mul(0x846c_a68b);
        bits ^= bits >> 16;
        *value *= if bits < bound { 0.0 } else { scale };
    }
}

/// `out[i] = table[ids[i]]`: table `[rows, width]`, out `[ids, width]`. An id outside of the table is the caller's mistake.
pub fn embed(table: &[f32], width: usize, ids: &[u32], out: &mut [f32]) {
    for (id, out) in ids.iter().zip(out.chunks_exact_mut(width)) {
        out.copy_from_slice(&table[*id as usize * width..][..width]);
    }
}

/// Backward of [`embed`]: adds to `table_gradient`.
pub fn embed_backward(width: usize, ids: &[u32], out_gradient: &[f32], table_gradient: &mut [f32]) {
    for (id, gradient) in ids.iter().zip(out_gradient.chunks_exact(width)) {
        let row = &mut table_gradient[*id as usize * width..][..width];
        row.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g);
    }
}

/// Cross-entropy of one row of logits against a target with label smoothing, scaled by `weight`: returns the loss
/// and writes the gradient over `logits`.
pub fn cross_entropy(logits: &mut [f32], target: usize, smoothing: f32, weight: f32) -> f32 {
    let classes = logits.len() as f32;
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let [total] = lane_sums(logits.len(), |i| [exponential(logits[i] - top)]);
    let log_total = total.ln() + top;
    let mut loss = (smoothing - 1.0) * (logits[target] - log_total);
    if smoothing > 0.0 {
        loss -= smoothing / classes * sum(logits.iter().map(|logit| logit - log_total));
    }
    for logit in logits.iter_mut() {
        *logit = (exponential(*logit - log_total) - smoothing / classes) * weight;
    }
    logits[target] -= (1.0 - smoothing) * weight;
    loss * weight
}

/// The log-probability of `target` under the softmax of one row of logits, and the entropy of that softmax.
pub fn log_probability(logits: &[f32], target: usize) -> (f32, f32) {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let [total, along] = lane_sums(logits.len(), |i| {
        let e = exponential(logits[i] - top);
        [e, e * (logits[i] - top)]
    });
    (logits[target] - top - total.ln(), total.ln() - along / total)
}

/// Binary cross-entropy of one logit against a target in {0, 1}: the loss and its gradient.
pub fn binary_cross_entropy(logit: f32, target: f32) -> (f32, f32) {
    let probability = 1.0 / (1.0 + (-logit).exp());
    (logit.max(0.0) - logit * target + (-logit.abs()).exp().ln_1p(), probability - target)
}

/// Smooth L1 (Huber with threshold 1) of a difference: the loss and its gradient.
pub fn smooth_l1(difference: f32) -> (f32, f32) {
    if difference.abs() < 1.0 {
        (0.5 * difference * difference, difference)
    } else {
        (difference.abs() - 0.5, difference.signum())
    }
}
