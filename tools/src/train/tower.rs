//! `candor-tools train tower`: tunes a pretrained vision transformer on photographs of faces, for the label and for
//! the measured cues at once, so that its patch features hold what a rationale needs. The pictures may grow from stage
//! to stage; the tower is written for the last stage's size. Each step's batch is split over threads that do not meet before the update.

use super::checkpoint;
use super::curves::RunLog;
use super::encoder::{Affine, Encoder, EncoderBuffers, EncoderSize, NormPlace, SIGLIP_NAMES, Sequences};
use super::faces::{CLASSES, CUES, Enlarger, Faces, Jitter};
use super::ops::{self, Matrix};
use super::optimiser::AdamW;
use super::parameters::{Plan, Treatment, two};
use super::products::TrainDevice;
use super::schedule::{Decay, Schedule};
use anyhow::{Context, bail, ensure};
use candle_core::{DType, Device, Tensor};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::json;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Name of the table of positions.
const POSITIONS: &str = "vision_model.embeddings.position_embedding.weight";
/// Pictures a step.
const BATCH: usize = 64;
/// Pictures a worker takes at a time: their activations fit in the caches' reach and the products stay large.
const MICRO_BATCH: usize = 16;
/// Side of the grid of cells that the cue head reads.
const CELLS: usize = 4;
/// Steps over which the rate rises.
const WARM_UP: u64 = 60;
/// Largest norm of a step's gradient.
const CLIP: f32 = 1.0;
/// Factor on the learning rate of the label head, which starts from nothing.
const LABEL_RATE: f32 = 5.0;
/// Factor on the learning rate of the cue head: so many inputs move together that larger steps would shake the tower.
const CUES_RATE: f32 = 0.3;
/// Steps between two validations.
const VALIDATE_EVERY: u64 = 100;
/// Time between two checkpoints.
const SAVE_EVERY: Duration = Duration::from_secs(180);

/// A stretch of training at one picture size: `SIDE:PASSES`, as `84:1.5`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stage {
    /// Side of the pictures in pixels.
    pub side: usize,
    /// Passes over the training part.
    pub passes: f64,
}

impl FromStr for Stage {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once(':').and_then(|(side, passes)| Some((side.parse().ok()?, passes.parse().ok()?)));
        match parsed {
            Some((side @ 48..=1024, passes)) if (0.0..=1000.0).contains(&passes) => Ok(Self { side, passes }),
            _ => Err(format!("{text:?} is no stage; write SIDE:PASSES as 84:1.5, with a side from 48 to 1024")),
        }
    }
}

/// Arguments of `candor-tools train tower`.
#[derive(clap::Args, Debug)]
pub struct TowerArgs {
    /// Faces, laid out as faces48.safetensors (parts `train` and `val`).
    #[arg(long)]
    faces: PathBuf,
    /// Folder of the pretrained tower: config.json and one .safetensors file in SiglipVisionModel's layout.
    #[arg(long)]
    base: PathBuf,
    /// Folder of the run; the tuned tower ends up in its `tower`. A run cut off goes on from its last checkpoint.
    #[arg(long)]
    out: PathBuf,
    /// Stretches of training, SIDE:PASSES each.
    #[arg(long, value_delimiter = ',', default_value = "84:4.0")]
    stages: Vec<Stage>,
    /// Layers of the base that are kept.
    #[arg(long, default_value_t = 11)]
    layers: usize,
    /// Learning rate at its peak.
    #[arg(long, default_value_t = 1e-4)]
    rate: f32,
    /// Factor on the learning rate from each layer to the one below.
    #[arg(long, default_value_t = 0.9)]
    layer_decay: f32,
    /// Weight decay.
    #[arg(long, default_value_t = 0.05)]
    weight_decay: f32,
    /// Share of a label spread over all labels.
    #[arg(long, default_value_t = 0.1)]
    smoothing: f32,
    /// Weight of the cues' loss beside the label's.
    #[arg(long, default_value_t = 0.3)]
    cue_weight: f32,
    /// Seed of orders, jitter and heads.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Threads, each with its share of every batch. The result depends on it in the last digits.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    #[command(flatten)]
    device: TrainDevice,
    /// Photographs of the validation part that are measured during training; all of them at the end.
    #[arg(long, default_value_t = 768)]
    validate: usize,
    /// Stop after this many steps, as if cut off (for tests and timings).
    #[arg(long)]
    stop_after: Option<u64>,
}

/// What is read of config.json.
#[derive(Clone, Debug, Deserialize)]
pub struct TowerConfig {
    pub(super) hidden_size: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) num_attention_heads: usize,
    pub(super) intermediate_size: usize,
    pub(super) image_size: usize,
    pub(super) patch_size: usize,
    pub(super) hidden_act: String,
    pub(super) layer_norm_eps: f64,
}

impl TowerConfig {
    fn check(&self) -> anyhow::Result<()> {
        ensure!(self.hidden_act == "gelu", "hidden_act is {:?}; only \"gelu\" (exact) can be trained", self.hidden_act);
        let sizes = [self.hidden_size, self.num_hidden_layers, self.num_attention_heads, self.intermediate_size];
        ensure!(
            sizes.iter().chain([&self.image_size, &self.patch_size]).all(|size| (1..=65_536).contains(size)),
            "a size is zero or beyond reason: {self:?}"
        );
        ensure!(
            self.hidden_size.is_multiple_of(self.num_attention_heads),
            "hidden_size is not divisible by the number of heads"
        );
        ensure!(self.image_size >= self.patch_size, "image_size is smaller than patch_size");
        Ok(())
    }
}

/// The tower and its heads: places of all parameters, and the sizes.
pub(super) struct Tower {
    pub(super) config: TowerConfig,
    pub(super) plan: Plan,
    patch: Affine,
    positions: Range<usize>,
    encoder: Encoder,
    norm: Affine,
    label: Affine,
    cues: Affine,
}

/// Fixed maps of one picture size.
pub(super) struct Geometry {
    side: usize,
    grid: usize,
    pub(super) enlarger: Enlarger,
    /// Position rows of this grid from the stored grid, `[grid², stored²]`.
    positions: Vec<f32>,
    /// Share of each patch in each cell of the cue head, `[cells², grid²]`.
    cells: Vec<f32>,
}

/// Buffers of one worker.
#[derive(Default)]
pub(super) struct Worker {
    pub(super) pixels: Vec<f32>,
    patches: Vec<f32>,
    embedded: Vec<f32>,
    pub(super) encoder: EncoderBuffers,
    normal: Vec<f32>,
    statistics: Vec<f32>,
    pooled: Vec<f32>,
    cells: Vec<f32>,
    logits: Vec<f32>,
    cues: Vec<f32>,
    gradient: Vec<f32>,
    normal_gradient: Vec<f32>,
    pooled_gradient: Vec<f32>,
    cells_gradient: Vec<f32>,
    folded: Vec<f32>,
}

/// Sums over a batch.
#[derive(Clone, Copy, Debug, Default)]
struct Losses {
    label: f64,
    cues: f64,
    right: usize,
}

impl std::ops::Add for Losses {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { label: self.label + other.label, cues: self.cues + other.cues, right: self.right + other.right }
    }
}

/// One-dimensional linear interpolation from `from` to `to` points, `[to, from]`, as torch's `align_corners=False`.
fn interpolation(from: usize, to: usize) -> Vec<f32> {
    let mut weights = vec![0.0; from * to];
    for i in 0..to {
        let at = ((i as f32 + 0.5) * from as f32 / to as f32 - 0.5).clamp(0.0, (from - 1) as f32);
        let low = at.floor() as usize;
        let share = at - low as f32;
        weights[i * from + low] += 1.0 - share;
        weights[i * from + (low + 1).min(from - 1)] += share;
    }
    weights
}

/// Share of each of `from` intervals in each of `to` equal ones, `[to, from]`, rows summing to one.
fn overlap(from: usize, to: usize) -> Vec<f32> {
    let mut weights = vec![0.0; from * to];
    for i in 0..to {
        let (start, end) = (i as f32 / to as f32, (i + 1) as f32 / to as f32);
        for j in 0..from {
            let shared = end.min((j + 1) as f32 / from as f32) - start.max(j as f32 / from as f32);
            weights[i * from + j] = shared.max(0.0) * to as f32;
        }
    }
    weights
}

/// The two-dimensional map of a one-dimensional one: `[to, from]` → `[to², from²]`.
fn square(weights: &[f32], from: usize, to: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(from * from * to * to);
    for y in 0..to {
        for x in 0..to {
            for v in 0..from {
                out.extend((0..from).map(|u| weights[y * from + v] * weights[x * from + u]));
            }
        }
    }
    out
}

impl Geometry {
    pub(super) fn new(config: &TowerConfig, side: usize) -> anyhow::Result<Self> {
        let (stored, grid) = (config.image_size / config.patch_size, side / config.patch_size);
        ensure!(side >= super::faces::SIDE && grid > 0, "pictures of {side} pixels are too small");
        Ok(Self {
            side,
            grid,
            enlarger: Enlarger::new(side),
            positions: square(&interpolation(stored, grid), stored, grid),
            cells: square(&overlap(grid, CELLS), grid, CELLS),
        })
    }

    pub(super) fn patches(&self) -> usize {
        self.grid * self.grid
    }
}

impl Tower {
    pub(super) fn new(mut config: TowerConfig, layers: usize, layer_decay: f32) -> anyhow::Result<Self> {
        config.check()?;
        let present = config.num_hidden_layers;
        ensure!((1..=present).contains(&layers), "{layers} layers are asked for, the base has {present}");
        config.num_hidden_layers = layers;
        let (width, grid) = (config.hidden_size, config.image_size / config.patch_size);
        let rate = |depth: usize| layer_decay.powi(i32::try_from(layers - depth).unwrap_or(0));
        let mut plan = Plan::default();
        let name = "vision_model.embeddings.patch_embedding";
        let shape = [width, 3, config.patch_size, config.patch_size];
        let treatment = Treatment { decay: true, rate: rate(0) };
        let weight = plan.add(format!("{name}.weight"), &shape, treatment);
        let bias = plan.add(format!("{name}.bias"), &[width], Treatment { decay: false, ..treatment });
        let positions = plan.add(POSITIONS, &[grid * grid, width], Treatment { decay: false, ..treatment });
        let size = EncoderSize {
            width,
            heads: config.num_attention_heads,
            hidden: config.intermediate_size,
            layers,
            eps: config.layer_norm_eps as f32,
            norm: NormPlace::Before,
        };
        let encoder =
            Encoder::new(&mut plan, "vision_model.encoder.layers", &SIGLIP_NAMES, size, |layer| rate(layer + 1));
        let norm = Affine::norm(&mut plan, "vision_model.post_layernorm", width, 1.0);
        let label = Affine::projection(&mut plan, "heads.label", CLASSES, width, LABEL_RATE);
        let cues = Affine::projection(&mut plan, "heads.cues", CUES, CELLS * CELLS * width, CUES_RATE);
        let patch = Affine { weight, bias };
        Ok(Self { config, plan, patch, positions, encoder, norm, label, cues })
    }

    /// Parameters from the base's file. The heads start small and random; the last norm starts as none, since the
    /// base's belongs behind a layer that is dropped.
    fn initial(&self, base: &Path, seed: u64) -> anyhow::Result<Vec<f32>> {
        let mut values = vec![0.0; self.plan.len()];
        let of_base = |name: &str| name.starts_with("vision_model.") && !name.contains("post_layernorm");
        self.plan.load(base, &mut values, |name| of_base(name).then(|| name.to_owned()))?;
        values[self.norm.weight.clone()].fill(1.0);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for range in [&self.label.weight, &self.cues.weight] {
            values[range.clone()].iter_mut().for_each(|value| *value = rng.random_range(-0.01..0.01));
        }
        Ok(values)
    }

    /// Fits the body's rates to its initial weights; the heads keep theirs.
    fn scale_rates(&mut self, values: &[f32]) {
        self.plan.scale_rates(values, |name| name.starts_with("vision_model."));
    }

    /// [`Tower::forward`] of photographs as they are.
    fn look(&self, values: &[f32], geometry: &Geometry, faces: &Faces, indices: &[usize], worker: &mut Worker) {
        let area = geometry.side * geometry.side;
        worker.pixels.resize(indices.len() * area, 0.0);
        for (index, out) in indices.iter().zip(worker.pixels.chunks_exact_mut(area)) {
            geometry.enlarger.exact(faces.image(*index), out);
        }
        self.forward(values, geometry, indices.len(), worker);
    }

    /// Weight of the patch embedding for grey pictures: the sum over its three channels, `[width, patch²]`.
    fn grey_weight(&self, values: &[f32]) -> Vec<f32> {
        let area = self.config.patch_size * self.config.patch_size;
        let weight = &values[self.patch.weight.clone()];
        let rows = weight.chunks_exact(3 * area);
        rows.flat_map(|row| (0..area).map(move |i| row[i] + row[area + i] + row[2 * area + i])).collect()
    }

    /// The positions of a geometry's grid, from the stored grid's: `[grid², width]`.
    fn grid_positions(&self, values: &[f32], geometry: &Geometry) -> Vec<f32> {
        let (width, patches) = (self.config.hidden_size, geometry.patches());
        let stored = self.positions.len() / width;
        let mut positions = vec![0.0; patches * width];
        let (map, table) =
            (Matrix::new(&geometry.positions, stored), Matrix::new(&values[self.positions.clone()], width));
        ops::multiply_exact(&mut positions, width, patches, width, stored, map, table, false);
        positions
    }

    /// Features, logits and cues of the pictures in `worker.pixels`, which stay in the worker.
    pub(super) fn forward(&self, values: &[f32], geometry: &Geometry, count: usize, worker: &mut Worker) {
        let (width, patch) = (self.config.hidden_size, self.config.patch_size);
        let (patches, area) = (geometry.patches(), patch * patch);
        let rows = count * patches;
        worker.patches.resize(rows * area, 0.0);
        for (picture, out) in worker
            .pixels
            .chunks_exact(geometry.side * geometry.side)
            .zip(worker.patches.chunks_exact_mut(patches * area))
        {
            for (index, out) in out.chunks_exact_mut(area).enumerate() {
                let corner = index / geometry.grid * patch * geometry.side + index % geometry.grid * patch;
                for (y, out) in out.chunks_exact_mut(patch).enumerate() {
                    out.copy_from_slice(&picture[corner + y * geometry.side..][..patch]);
                }
            }
        }
        worker.embedded.resize(rows * width, 0.0);
        ops::linear(
            &worker.patches,
            rows,
            &self.grey_weight(values),
            &values[self.patch.bias.clone()],
            &mut worker.embedded,
        );
        let positions = self.grid_positions(values, geometry);
        for picture in worker.embedded.chunks_exact_mut(patches * width) {
            picture.iter_mut().zip(&positions).for_each(|(x, p)| *x += p);
        }
        let visible = vec![patches; count];
        let sequences = Sequences { tokens: patches, visible: &visible };
        self.encoder.forward(values, &worker.embedded, sequences, &mut worker.encoder);
        let features = &worker.encoder.output()[..rows * width];
        worker.normal.resize(rows * width, 0.0);
        worker.statistics.resize(rows * 2, 0.0);
        let eps = self.config.layer_norm_eps as f32;
        self.norm.layer_norm(values, features, eps, &mut worker.normal, &mut worker.statistics);
        worker.pooled.clear();
        worker.pooled.resize(count * width, 0.0);
        for (pooled, normal) in worker.pooled.chunks_exact_mut(width).zip(worker.normal.chunks_exact(patches * width)) {
            for row in normal.chunks_exact(width) {
                pooled.iter_mut().zip(row).for_each(|(sum, x)| *sum += x / patches as f32);
            }
        }
        let cells = CELLS * CELLS;
        worker.cells.resize(count * cells * width, 0.0);
        for (out, normal) in
            worker.cells.chunks_exact_mut(cells * width).zip(worker.normal.chunks_exact(patches * width))
        {
            let (map, normal) = (Matrix::new(&geometry.cells, patches), Matrix::new(normal, width));
            ops::multiply_exact(out, width, cells, width, patches, map, normal, false);
        }
        worker.logits.resize(count * CLASSES, 0.0);
        worker.cues.resize(count * CUES, 0.0);
        self.label.linear(values, &worker.pooled, count, &mut worker.logits);
        self.cues.linear(values, &worker.cells, count, &mut worker.cues);
    }

    /// Backward from the gradients that stand in `worker.logits` and `worker.cues`; adds to `gradients`.
    fn backward(&self, values: &[f32], gradients: &mut [f32], geometry: &Geometry, count: usize, worker: &mut Worker) {
        let (width, area) = (self.config.hidden_size, self.config.patch_size * self.config.patch_size);
        let (patches, cells) = (geometry.patches(), CELLS * CELLS);
        let rows = count * patches;
        worker.pooled_gradient.resize(count * width, 0.0);
        worker.cells_gradient.resize(count * cells * width, 0.0);
        let (pooled, spread) = (&mut worker.pooled_gradient, &mut worker.cells_gradient);
        self.label.linear_backward(values, gradients, &worker.pooled, count, &worker.logits, Some(pooled));
        self.cues.linear_backward(values, gradients, &worker.cells, count, &worker.cues, Some(spread));
        worker.normal_gradient.resize(rows * width, 0.0);
        for (index, out) in worker.normal_gradient.chunks_exact_mut(patches * width).enumerate() {
            let pooled = &worker.pooled_gradient[index * width..][..width];
            let spread = &worker.cells_gradient[index * cells * width..][..cells * width];
            let (map, spread) = (Matrix::transposed(&geometry.cells, patches), Matrix::new(spread, width));
            ops::multiply_exact(out, width, patches, width, cells, map, spread, false);
            for row in out.chunks_exact_mut(width) {
                row.iter_mut().zip(pooled).for_each(|(x, g)| *x += g / patches as f32);
            }
        }
        worker.gradient.clear();
        worker.gradient.resize(rows * width, 0.0);
        let features = &worker.encoder.output()[..rows * width];
        let (normal, statistics) = (&worker.normal_gradient, &worker.statistics);
        self.norm.layer_norm_backward(values, gradients, features, statistics, normal, &mut worker.gradient);
        let visible = vec![patches; count];
        let sequences = Sequences { tokens: patches, visible: &visible };
        let (x, gradient) = (&worker.embedded, &mut worker.gradient);
        self.encoder.backward(values, gradients, x, sequences, &mut worker.encoder, gradient);
        // Positions: the sum over pictures, back through the map.
        let mut positions = vec![0.0; patches * width];
        for picture in worker.gradient.chunks_exact(patches * width) {
            positions.iter_mut().zip(picture).for_each(|(sum, g)| *sum += g);
        }
        let stored = self.positions.len() / width;
        let (map, positions) = (Matrix::transposed(&geometry.positions, stored), Matrix::new(&positions, width));
        let out = &mut gradients[self.positions.clone()];
        ops::multiply_exact(out, width, stored, width, patches, map, positions, true);
        // The patch embedding: each channel's gradient is that of the channels' sum.
        worker.folded.clear();
        worker.folded.resize(width * area, 0.0);
        let (weight, bias) = two(gradients, &self.patch.weight, &self.patch.bias);
        ops::linear_backward(&worker.patches, rows, &[], &worker.gradient, &mut worker.folded, bias, None);
        for (row, folded) in weight.chunks_exact_mut(3 * area).zip(worker.folded.chunks_exact(area)) {
            for channel in row.chunks_exact_mut(area) {
                channel.iter_mut().zip(folded).for_each(|(sum, g)| *sum += g);
            }
        }
    }

    /// Losses of the pictures in the worker; puts their gradients into `worker.logits` and `worker.cues`. `valid` is
    /// the number of photographs of the whole batch whose cues count, `batch` that of all.
    fn losses(&self, faces: &Faces, indices: &[usize], share: Share, worker: &mut Worker) -> Losses {
        let mut losses = Losses::default();
        for (slot, index) in indices.iter().enumerate() {
            let target = usize::from(faces.labels[*index]);
            let logits = &mut worker.logits[slot * CLASSES..][..CLASSES];
            losses.right += usize::from(best(logits) == target);
            losses.label += f64::from(ops::cross_entropy(logits, target, share.smoothing, 1.0 / share.batch as f32));
            let cues = &mut worker.cues[slot * CUES..][..CUES];
            match &faces.cues[*index] {
                None => cues.fill(0.0),
                Some(measured) => {
                    let weight = share.cue_weight / (share.valid * CUES) as f32;
                    for (cue, measured) in cues.iter_mut().zip(measured) {
                        let (loss, gradient) = ops::smooth_l1(*cue - measured);
                        losses.cues += f64::from(loss * weight);
                        *cue = gradient * weight;
                    }
                }
            }
        }
        losses
    }
}

/// What a picture's losses are divided by.
#[derive(Clone, Copy)]
struct Share {
    batch: usize,
    valid: usize,
    smoothing: f32,
    cue_weight: f32,
}

/// Index of the largest.
pub(super) fn best(values: &[f32]) -> usize {
    (0..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}

/// Which photographs stand in a batch, for every step: a new order each pass.
pub(super) struct Order {
    seed: u64,
    count: usize,
    pass: u64,
    order: Vec<usize>,
}

impl Order {
    pub(super) fn new(seed: u64, count: usize) -> Self {
        Self { seed, count, pass: u64::MAX, order: Vec::new() }
    }

    /// Pass and photograph of a place in the endless sequence.
    pub(super) fn at(&mut self, place: u64) -> (u64, usize) {
        let pass = place / self.count as u64;
        if pass != self.pass {
            self.pass = pass;
            self.order = (0..self.count).collect();
            self.order.shuffle(&mut ChaCha8Rng::seed_from_u64(self.seed ^ (pass << 32)));
        }
        (pass, self.order[(place % self.count as u64) as usize])
    }
}

/// Figures of one validation.
struct Validation {
    accuracy: f64,
    /// Mean over the classes of the share that is recognised.
    recall: f64,
    correlations: [f64; CUES],
}

fn validate(
    tower: &Tower,
    values: &[f32],
    faces: &Faces,
    geometry: &Geometry,
    count: usize,
    workers: &mut [Worker],
) -> Validation {
    let count = count.clamp(1, faces.len());
    let indices: Vec<usize> = (0..count).map(|i| i * faces.len() / count).collect();
    let share = indices.len().div_ceil(workers.len());
    let results: Vec<(Vec<f32>, Vec<f32>)> = workers
        .par_iter_mut()
        .zip(indices.par_chunks(share))
        .map(|(worker, indices)| {
            let (mut logits, mut cues) = (Vec::new(), Vec::new());
            for indices in indices.chunks(MICRO_BATCH) {
                tower.look(values, geometry, faces, indices, worker);
                logits.extend_from_slice(&worker.logits[..indices.len() * CLASSES]);
                cues.extend_from_slice(&worker.cues[..indices.len() * CUES]);
            }
            (logits, cues)
        })
        .collect();
    let (logits, cues): (Vec<_>, Vec<_>) = results.into_iter().unzip();
    let (logits, cues) = (logits.concat(), cues.concat());
    let (mut right, mut seen) = ([0usize; CLASSES], [0usize; CLASSES]);
    for (index, logits) in indices.iter().zip(logits.chunks_exact(CLASSES)) {
        let target = usize::from(faces.labels[*index]);
        seen[target] += 1;
        right[target] += usize::from(best(logits) == target);
    }
    let recalls: Vec<f64> = (0..CLASSES).filter(|c| seen[*c] > 0).map(|c| right[c] as f64 / seen[c] as f64).collect();
    let correlations = std::array::from_fn(|cue| {
        let pairs: Vec<(f64, f64)> = indices
            .iter()
            .zip(cues.chunks_exact(CUES))
            .filter_map(|(index, cues)| Some((f64::from(cues[cue]), f64::from(faces.cues[*index]?[cue]))))
            .collect();
        correlation(&pairs)
    });
    Validation {
        accuracy: right.iter().sum::<usize>() as f64 / count as f64,
        recall: recalls.iter().sum::<f64>() / recalls.len() as f64,
        correlations,
    }
}

/// Pearson's; 0 where one side does not vary.
fn correlation(pairs: &[(f64, f64)]) -> f64 {
    let n = pairs.len().max(1) as f64;
    let (mx, my) = (pairs.iter().map(|p| p.0).sum::<f64>() / n, pairs.iter().map(|p| p.1).sum::<f64>() / n);
    let xy: f64 = pairs.iter().map(|p| (p.0 - mx) * (p.1 - my)).sum();
    let xx: f64 = pairs.iter().map(|p| (p.0 - mx) * (p.0 - mx)).sum();
    let yy: f64 = pairs.iter().map(|p| (p.1 - my) * (p.1 - my)).sum();
    if xx > 0.0 && yy > 0.0 { xy / (xx * yy).sqrt() } else { 0.0 }
}

/// The one .safetensors file of a folder.
pub(super) fn only_safetensors(folder: &Path) -> anyhow::Result<PathBuf> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("{}", folder.display()))?;
    let mut found: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    found.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    match found.as_slice() {
        [path] => Ok(path.clone()),
        _ => bail!("{} holds {} .safetensors files, one is needed", folder.display(), found.len()),
    }
}

/// Runs `candor-tools train tower`.
pub fn run(args: &TowerArgs) -> anyhow::Result<()> {
    ensure!((1..=BATCH).contains(&args.threads), "--threads must lie between 1 and {BATCH}");
    let config_path = args.base.join("config.json");
    let text = std::fs::read_to_string(&config_path).with_context(|| format!("{}", config_path.display()))?;
    let config: TowerConfig = serde_json::from_str(&text).with_context(|| format!("{}", config_path.display()))?;
    let mut tower =
        Tower::new(config, args.layers, args.layer_decay).with_context(|| format!("{}", config_path.display()))?;
    let train = Faces::open(&args.faces, "train")?;
    let val = Faces::open(&args.faces, "val")?;
    std::fs::create_dir_all(&args.out).with_context(|| format!("{}", args.out.display()))?;

    let steps_of = |stage: &Stage| (stage.passes * train.len() as f64 / BATCH as f64).round() as u64;
    let total: u64 = args.stages.iter().map(steps_of).sum();
    ensure!(total > 0, "the stages are empty");
    let products = args.device.choose(false)?;
    // The stages are left out: a run may go on with other ones, to end sooner or later.
    let recipe = format!(
        "tower layers {} rate {} layer decay {} weight decay {} smoothing {} cues {} seed {} threads {} faces {}{products}",
        args.layers,
        args.rate,
        args.layer_decay,
        args.weight_decay,
        args.smoothing,
        args.cue_weight,
        args.seed,
        args.threads,
        train.len()
    );
    let schedule = Schedule { peak: args.rate, warm_up: WARM_UP, total, decay: Decay::Cosine };
    let mut values = tower.initial(&only_safetensors(&args.base)?, args.seed)?;
    tower.scale_rates(&values);
    let mut optimiser = AdamW::new(&tower.plan, args.weight_decay);
    let mut workers: Vec<Worker> = (0..args.threads).map(|_| Worker::default()).collect();
    let state = args.out.join("state.safetensors");
    checkpoint::resume(&state, &recipe, &mut values, &mut optimiser)?;

    let stop = stop_on_interrupt();
    let mut log = RunLog::open(&args.out, optimiser.steps, total)?;
    log.say(&format!("{} parameters, {total} steps, {} done", tower.plan.len(), optimiser.steps));
    let mut gradients = vec![vec![0.0; tower.plan.len()]; args.threads];
    let mut order = Order::new(args.seed, train.len());
    let mut saved = Instant::now();
    let mut end = 0;
    for stage in &args.stages {
        let geometry = Geometry::new(&tower.config, stage.side)?;
        end += steps_of(stage);
        while optimiser.steps < end {
            let step = optimiser.steps;
            let started = Instant::now();
            let places: Vec<(u64, usize)> = (0..BATCH as u64).map(|i| order.at(step * BATCH as u64 + i)).collect();
            let valid = places.iter().filter(|(_, index)| train.cues[*index].is_some()).count().max(1);
            let share = Share { batch: BATCH, valid, smoothing: args.smoothing, cue_weight: args.cue_weight };
            let losses = workers
                .par_iter_mut()
                .zip(gradients.par_iter_mut())
                .zip(places.par_chunks(BATCH.div_ceil(args.threads)))
                .map(|((worker, gradients), places)| {
                    let mut losses = Losses::default();
                    for places in places.chunks(MICRO_BATCH) {
                        let area = geometry.side * geometry.side;
                        worker.pixels.resize(places.len() * area, 0.0);
                        for ((pass, index), out) in places.iter().zip(worker.pixels.chunks_exact_mut(area)) {
                            let jitter = Jitter::draw(args.seed, *pass, *index);
                            geometry.enlarger.jittered(train.image(*index), &jitter, out);
                        }
                        tower.forward(&values, &geometry, places.len(), worker);
                        let indices: Vec<usize> = places.iter().map(|place| place.1).collect();
                        losses = losses + tower.losses(&train, &indices, share, worker);
                        tower.backward(&values, gradients, &geometry, places.len(), worker);
                    }
                    losses
                })
                .reduce(Losses::default, |a, b| a + b);
            let rate = schedule.rate(step);
            let norm = optimiser.step(&mut values, &mut gradients, rate, CLIP);
            ensure!(norm.is_finite(), "step {step}: the gradient is not finite; a lower --rate may help");
            let step = optimiser.steps;
            let speed = BATCH as f64 / started.elapsed().as_secs_f64();
            let accuracy = losses.right as f64 / BATCH as f64;
            let loss = losses.label + losses.cues;
            log.write(
                step,
                json!({"loss": loss, "label_loss": losses.label, "cue_loss": losses.cues, "accuracy": accuracy,
                    "rate": rate, "norm": norm, "side": stage.side, "pictures_per_s": speed}),
            )?;
            log.show(step, format!("loss {loss:.3} {speed:.1} pictures/s"));
            if step.is_multiple_of(10) {
                log.say(&format!("step {step}/{total} side {} loss {loss:.3} label {:.3} cues {:.3} accuracy {accuracy:.2} norm {norm:.2} {speed:.1}/s",
                    stage.side, losses.label, losses.cues));
            }
            if step.is_multiple_of(VALIDATE_EVERY) || step == total {
                let count = if step == total { val.len() } else { args.validate };
                let validation = validate(&tower, &values, &val, &geometry, count, &mut workers);
                let correlation = validation.correlations.iter().sum::<f64>() / CUES as f64;
                log.write(
                    step,
                    json!({"val_n": count, "val_accuracy": validation.accuracy, "val_recall": validation.recall,
                        "val_cue_correlation": correlation, "val_cue_correlations": validation.correlations}),
                )?;
                log.say(&format!(
                    "step {step}/{total}: validation accuracy {:.4} recall {:.4} cue correlation {correlation:.3} {:.2?}",
                    validation.accuracy, validation.recall, validation.correlations
                ));
                log.draw("tower", &["val_accuracy", "val_recall", "val_cue_correlation"])?;
            }
            let cut = stop.load(Ordering::Relaxed) || args.stop_after.is_some_and(|stop| step >= stop);
            if saved.elapsed() > SAVE_EVERY || cut || step == total {
                checkpoint::save(&state, &recipe, &values, &optimiser)?;
                saved = Instant::now();
            }
            if cut && step < total {
                bail!("stopped at step {step} of {total}; the same command goes on from there");
            }
        }
    }
    let last = args.stages.last().map_or(tower.config.image_size, |stage| stage.side);
    write_tower(&tower, &values, &Geometry::new(&tower.config, last)?, &args.out.join("tower"))?;
    log.say(&format!("wrote {}", args.out.join("tower").display()));
    Ok(())
}

/// The tuned tower in SiglipVisionModel's layout, for pictures of the geometry's size; its heads in a file of their own.
fn write_tower(tower: &Tower, values: &[f32], geometry: &Geometry, folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)?;
    let of_body = |name: &str| name.starts_with("vision_model.").then(|| name.to_owned());
    let mut body = tower.plan.tensors(values, DType::F32, of_body)?;
    let (width, patches) = (tower.config.hidden_size, geometry.patches());
    let positions = Tensor::from_vec(tower.grid_positions(values, geometry), (patches, width), &Device::Cpu)?;
    body.insert(POSITIONS.into(), positions);
    checkpoint::write_tensors(&folder.join("model.safetensors"), &body)?;
    let heads = tower.plan.tensors(values, DType::F32, |name| name.starts_with("heads.").then(|| name.to_owned()))?;
    checkpoint::write_tensors(&folder.join("heads.safetensors"), &heads)?;
    let config = &tower.config;
    let config = json!({
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "num_channels": 3,
        "image_size": geometry.grid * config.patch_size,
        "patch_size": config.patch_size,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "vision_use_head": false,
    });
    checkpoint::write_atomically(&folder.join("config.json"), serde_json::to_string_pretty(&config)?.as_bytes())?;
    Ok(())
}

/// A flag that the first interrupt sets; the second ends the program.
pub fn stop_on_interrupt() -> &'static AtomicBool {
    static STOP: AtomicBool = AtomicBool::new(false);
    let handler = ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("stopping as soon as what is at hand is done; a second interrupt ends the program at once");
    });
    if let Err(error) = handler {
        log::warn!("an interrupt will lose the steps since the last checkpoint: {error}");
    }
    &STOP
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::train::parameters::check_gradients;
    use std::collections::HashMap;

    fn config() -> TowerConfig {
        TowerConfig {
            hidden_size: 12,
            num_hidden_layers: 2,
            num_attention_heads: 3,
            intermediate_size: 20,
            image_size: 112,
            patch_size: 14,
            hidden_act: "gelu".into(),
            layer_norm_eps: 1e-6,
        }
    }

    fn random(len: usize, scale: f32, rng: &mut ChaCha8Rng) -> Vec<f32> {
        (0..len).map(|_| rng.random_range(-scale..scale)).collect()
    }

    fn faces(count: usize) -> Faces {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("faces.safetensors");
        candle_core::safetensors::save(&tensors_of_faces(count), &path).unwrap();
        Faces::open(&path, "train").unwrap()
    }

    fn tensors_of_faces(count: usize) -> HashMap<String, Tensor> {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut all = HashMap::new();
        for part in ["train", "val"] {
            let images: Vec<u8> = (0..count * 48 * 48).map(|_| rng.random()).collect();
            let labels: Vec<u8> = (0..count).map(|i| (i % 7) as u8).collect();
            let valid: Vec<u8> = (0..count).map(|i| u8::from(i % 3 != 0)).collect();
            let cues = random(count * 9, 2.0, &mut rng);
            let device = &Device::Cpu;
            all.insert(format!("{part}.images"), Tensor::from_vec(images, (count, 48, 48), device).unwrap());
            all.insert(format!("{part}.labels"), Tensor::from_vec(labels, count, device).unwrap());
            all.insert(format!("{part}.cues"), Tensor::from_vec(cues, (count, 9), device).unwrap());
            all.insert(format!("{part}.cues_valid"), Tensor::from_vec(valid, count, device).unwrap());
        }
        all
    }

    /// The whole chain, from pixels to losses, against finite differences, at both grids.
    #[test]
    fn gradients_equal_finite_differences() {
        let tower = Tower::new(config(), 2, 0.9).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut values = random(tower.plan.len(), 0.4, &mut rng);
        let faces = faces(3);
        let share = Share { batch: 3, valid: 2, smoothing: 0.1, cue_weight: 0.7 };
        for side in [84, 112] {
            let geometry = Geometry::new(&tower.config, side).unwrap();
            let pixels = random(3 * side * side, 1.0, &mut rng);
            let mut worker = Worker { pixels, ..Worker::default() };
            let loss = |values: &[f32], worker: &mut Worker| {
                tower.forward(values, &geometry, 3, worker);
                let losses = tower.losses(&faces, &[0, 1, 2], share, worker);
                losses.label + losses.cues
            };
            loss(&values, &mut worker);
            let mut gradients = vec![0.0; values.len()];
            tower.backward(&values, &mut gradients, &geometry, 3, &mut worker);
            check_gradients(&tower.plan, &mut values, &gradients, |values| loss(values, &mut worker));
        }
    }

    /// A run folder with a small base and faces; returns the command's arguments for it.
    fn small_run(folder: &Path, out: &str, more: &[&str]) -> TowerArgs {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: TowerArgs,
        }
        let base = folder.join("base");
        if !base.exists() {
            std::fs::create_dir(&base).unwrap();
            let tower = Tower::new(config(), 2, 1.0).unwrap();
            let values = random(tower.plan.len(), 0.1, &mut ChaCha8Rng::seed_from_u64(2));
            let body = |name: &str| name.starts_with("vision_model.").then(|| name.to_owned());
            let tensors = tower.plan.tensors(&values, DType::F16, body).unwrap();
            checkpoint::write_tensors(&base.join("base.safetensors"), &tensors).unwrap();
            let config = json!({"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3,
                "intermediate_size": 20, "image_size": 112, "patch_size": 14, "hidden_act": "gelu",
                "layer_norm_eps": 1e-6});
            std::fs::write(base.join("config.json"), config.to_string()).unwrap();
            candle_core::safetensors::save(&tensors_of_faces(70), folder.join("faces.safetensors")).unwrap();
        }
        let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
        let line = ["tower", "--faces", &path("faces.safetensors"), "--base", &path("base"), "--out", &path(out)];
        let fixed = ["--stages", "56:2.0,84:2.0", "--layers", "2"];
        clap::Parser::try_parse_from(line.iter().chain(&fixed).chain(more)).map(|line: Line| line.args).unwrap()
    }

    #[test]
    fn a_run_cut_off_goes_on_to_the_same_result() {
        let folder = tempfile::tempdir().unwrap();
        run(&small_run(folder.path(), "whole", &[])).unwrap();
        let stopped = run(&small_run(folder.path(), "cut", &["--stop-after", "1"])).unwrap_err();
        assert!(stopped.to_string().contains("stopped at step 1 of 4"), "{stopped}");
        run(&small_run(folder.path(), "cut", &["--stop-after", "3"])).unwrap_err();
        run(&small_run(folder.path(), "cut", &[])).unwrap();
        for file in ["tower/model.safetensors", "tower/heads.safetensors", "tower/config.json"] {
            let bytes = |run: &str| std::fs::read(folder.path().join(run).join(file)).unwrap();
            assert_eq!(bytes("whole"), bytes("cut"), "{file}");
        }
        let metrics = std::fs::read_to_string(folder.path().join("cut/metrics.jsonl")).unwrap();
        let steps = metrics.lines().filter(|line| line.contains("\"loss\"")).count();
        assert_eq!(steps, 4, "each step stands once in the log");
        assert!(folder.path().join("cut/curves.svg").exists());
        // The tower is written for the last stage's pictures: 84 pixels, 6 by 6 patches.
        let config = std::fs::read_to_string(folder.path().join("cut/tower/config.json")).unwrap();
        assert_eq!(serde_json::from_str::<serde_json::Value>(&config).unwrap()["image_size"], 84);
        let tensors = candle_core::safetensors::load(folder.path().join("cut/tower/model.safetensors"), &Device::Cpu);
        assert_eq!(tensors.unwrap()[POSITIONS].dims(), [36, 12]);
        // Another recipe must not go on from this state.
        let foreign = run(&small_run(folder.path(), "cut", &["--seed", "9"])).unwrap_err();
        assert!(foreign.to_string().contains("is no state of this training"), "{foreign}");
    }

    #[test]
    fn a_base_of_another_shape_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let args = small_run(folder.path(), "run", &[]);
        let path = folder.path().join("base/config.json");
        let good = std::fs::read_to_string(&path).unwrap();
        for (from, to, wanted) in [
            ("\"hidden_size\":12", "\"hidden_size\":15", "patch_embedding"),
            ("\"hidden_size\":12", "\"hidden_size\":0", "a size is zero"),
            ("\"hidden_size\":12", "\"hidden_size\":13", "not divisible"),
            ("\"image_size\":112", "\"image_size\":7", "smaller than patch_size"),
            ("\"num_hidden_layers\":2", "\"num_hidden_layers\":1", "2 layers are asked for"),
            ("\"gelu\"", "\"relu\"", "hidden_act"),
            ("{", "", "config.json"),
        ] {
            assert!(good.contains(from));
            std::fs::write(&path, good.replacen(from, to, 1)).unwrap();
            let error = format!("{:#}", run(&args).unwrap_err());
            assert!(error.contains(wanted), "{to}: {error}");
        }
    }

    #[test]
    fn faces_of_another_layout_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("faces.safetensors");
        let tensor = |values: Vec<f32>, shape: &[usize]| Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        let cases: [(&str, Option<Tensor>, &str); 6] = [
            ("train.images", None, "there is no such tensor"),
            ("train.images", Some(tensor(vec![0.0; 5 * 48 * 48], &[5, 48, 48])), "its type is F32"),
            ("train.labels", Some(Tensor::from_vec(vec![0u8; 4], 4, &Device::Cpu).unwrap()), "it has 4 rows"),
            ("train.labels", Some(Tensor::from_vec(vec![7u8; 5], 5, &Device::Cpu).unwrap()), "has label 7"),
            ("train.cues", Some(tensor(vec![0.0; 40], &[5, 8])), "its shape is [5, 8]"),
            (
                "train.images",
                Some(Tensor::zeros((0, 48, 48), candle_core::DType::U8, &Device::Cpu).unwrap()),
                "holds no",
            ),
        ];
        for (name, tensor, wanted) in cases {
            let mut tensors = tensors_of_faces(5);
            tensors.remove(name);
            tensors.extend(tensor.map(|tensor| (name.to_owned(), tensor)));
            candle_core::safetensors::save(&tensors, &path).unwrap();
            let error = Faces::open(&path, "train").err().map(|error| error.to_string()).unwrap();
            assert!(error.contains(wanted), "{name}: {error}");
        }
        std::fs::write(&path, b"\xff\xff\xff\xff\xff\xff\xff\x7f{}").unwrap();
        assert!(Faces::open(&path, "train").is_err());
    }

    #[test]
    fn stages_are_read_or_refused() {
        assert_eq!("84:1.5".parse(), Ok(Stage { side: 84, passes: 1.5 }));
        for text in ["84", "84:x", "40:1", "84:-1", "84:NaN", "4000:1", ":"] {
            assert!(text.parse::<Stage>().is_err(), "{text}");
        }
    }

    #[test]
    fn grids_are_mapped_without_loss() {
        for (from, to) in [(8, 6), (8, 8), (6, 4), (9, 4)] {
            for map in [interpolation(from, to), overlap(from, to)] {
                for row in map.chunks_exact(from) {
                    assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-5, "{from} to {to}: {row:?}");
                }
            }
        }
        let same = interpolation(8, 8);
        assert!((0..64).all(|i| same[i] == f32::from(u8::from(i / 8 == i % 8))));
    }
}
