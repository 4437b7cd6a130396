//! The SigLIP vision tower: a picture's patches to one state a patch.

use std::ops::Range;

use candor_kernels::{Activation, Device, Unfold};

use super::config::VisionConfig;
use super::encoder::{Encoder, EncoderShape, Names, NormOrder};
use super::layers::{Bias, Linear, Loader};
use super::rows::{allocate, grow};
use super::{ModelError, Rows};

const COLOURS: usize = 3;
/// Patches that go through the layers at once. The frames of a window that has more go in runs, which bounds the buffers;
/// weights are unpacked anew for each run, so that runs half as long take a tenth more time with four bits.
const RUN: usize = 1600;

const NAMES: Names = Names {
    query: "self_attn.q_proj",
    key: "self_attn.k_proj",
    value: "self_attn.v_proj",
    output: "self_attn.out_proj",
    attention_norm: "layer_norm1",
    up: "mlp.fc1",
    down: "mlp.fc2",
    mlp_norm: "layer_norm2",
};

/// The tower with the buffers of its forward pass.
pub struct VisionTower<D: Device> {
    config: VisionConfig,
    patch_embedding: Linear<D>,
    positions: D::Weight,
    encoder: Encoder<D>,
    host: Vec<f32>,
    pixels: D::Buffer,
    columns: D::Buffer,
    /// A run's way through the tower.
    replay: D::Replay,
    /// States of a run, where there are several.
    run: D::Buffer,
    /// States of the frames that differ, where others are their equals.
    distinct: Rows<D>,
    /// Frames that went through the layers.
    pub(super) encoded: u64,
}

impl<D: Device> VisionTower<D> {
    pub(super) fn load(device: &D, loader: &Loader<'_, D>, config: &VisionConfig) -> Result<Self, ModelError> {
        let embeddings = loader.under("embeddings");
        let VisionConfig { width, patch, .. } = *config;
        let patch_embedding = embeddings.convolution("patch_embedding", &[width, COLOURS, patch, patch], Bias::Each)?;
        let positions = embeddings.weight("position_embedding.weight", &[config.patches(), width])?;
        let shape = EncoderShape {
            width,
            heads: config.heads,
            mlp: config.mlp,
            layers: config.used_layers,
            eps: config.eps,
            activation: config.activation,
            order: NormOrder::Before,
            key_bias: Bias::Each,
        };
        let encoder = Encoder::load(device, &loader.under("encoder").under("layers"), &NAMES, shape)?;
        let none = || allocate(device, &[0]);
        Ok(VisionTower {
            config: config.clone(),
            patch_embedding,
            positions,
            encoder,
            host: Vec::new(),
            pixels: none()?,
            columns: none()?,
            replay: D::Replay::default(),
            run: none()?,
            distinct: Rows::empty(device)?,
            encoded: 0,
        })
    }

    /// Normalised frames `[frames, 3, side, side]` → states `[frames · patches, width]` behind the selected layer.
    pub(super) fn forward(&mut self, device: &D, pixels: &[f32], out: &mut Rows<D>) -> Result<(), ModelError> {
        let side = self.config.image;
        let frame = COLOURS * side * side;
        let frames = pixels.len() / frame;
        if frames == 0 || !pixels.len().is_multiple_of(frame) {
            let reason = format!("{} values are no whole number of frames of [3, {side}, {side}]", pixels.len());
            return Err(ModelError::input("pixel values", reason));
        }
        self.host.clear();
        self.host.extend(pixels.chunks_exact(frame).flat_map(|frame| {
            let plane = side * side;
            (0..plane).flat_map(move |i| (0..COLOURS).map(move |c| frame[c * plane + i]))
        }));
        self.forward_host(device, frames, out)
    }

    /// Packed 8-bit RGB frames `[side, side, 3]` each, normalised to -1..1 → states as in [`Self::forward`].
    pub(super) fn forward_rgb(&mut self, device: &D, frames: &[&[u8]], out: &mut Rows<D>) -> Result<(), ModelError> {
        let side = self.config.image;
        let bytes = COLOURS * side * side;
        if frames.is_empty() || frames.iter().any(|f| f.len() != bytes) {
            let reason = format!("each frame must be {side} x {side} packed RGB, and there must be one");
            return Err(ModelError::input("frames", reason));
        }
        self.host.clear();
        let normalise = |v: u8| (f32::from(v) / 255.0 - 0.5) / 0.5;
        self.host.extend(frames.iter().flat_map(|f| f.iter().copied().map(normalise)));
        self.forward_host(device, frames.len(), out)
    }

    /// The frames in `self.host`, channels last. Frames that are equal (a still, a clip shorter than the window) are
    /// computed once.
    fn forward_host(&mut self, device: &D, frames: usize, out: &mut Rows<D>) -> Result<(), ModelError> {
        let frame = self.host.len() / frames;
        let equal = |i: usize, j: usize| self.host[i * frame..][..frame] == self.host[j * frame..][..frame];
        let first_equal = |i: usize| (0..i).find(|&j| equal(i, j)).unwrap_or(i);
        if (0..frames).all(|i| first_equal(i) == i) {
            return self.encode(device, frames, out);
        }
        let first: Vec<usize> = (0..frames).map(first_equal).collect();
        let distinct: Vec<usize> = (0..frames).filter(|&i| first[i] == i).collect();
        for (to, &from) in distinct.iter().enumerate() {
            self.host.copy_within(from * frame..(from + 1) * frame, to * frame);
        }
        self.host.truncate(distinct.len() * frame);
        let mut states = std::mem::replace(&mut self.distinct, Rows::empty(device)?);
        let encoded = self.encode(device, distinct.len(), &mut states);
        self.distinct = states;
        encoded?;
        let (patches, width) = (self.config.patches(), self.config.width);
        out.resize(device, frames * patches, width)?;
        let size = patches * width;
        for (to, first) in first.into_iter().enumerate() {
            let from = distinct.partition_point(|&place| place < first);
            device.copy(&self.distinct.buffer, from * size, &mut out.buffer, to * size, size)?;
        }
        Ok(())
    }

    /// The first `frames` frames in `self.host`, a run after the other.
    fn encode(&mut self, device: &D, frames: usize, out: &mut Rows<D>) -> Result<(), ModelError> {
        let (patches, width) = (self.config.patches(), self.config.width);
        out.resize(device, frames * patches, width)?;
        self.encoded += frames as u64;
        let a_run = (RUN / patches).clamp(1, frames);
        if a_run == frames {
            return self.encode_run(device, 0..frames, &mut out.buffer);
        }
        let mut states = std::mem::replace(&mut self.run, allocate(device, &[0])?);
        grow(device, &mut states, &[a_run * patches, width])?;
        for first in (0..frames).step_by(a_run) {
            let run = first..frames.min(first + a_run);
            self.encode_run(device, run.clone(), &mut states)?;
            device.copy(&states, 0, &mut out.buffer, first * patches * width, run.len() * patches * width)?;
        }
        self.run = states;
        Ok(())
    }

    /// Some frames in `self.host` → states `[frames · patches, width]`.
    fn encode_run(&mut self, device: &D, frames: Range<usize>, states: &mut D::Buffer) -> Result<(), ModelError> {
        let VisionConfig { image, patch, .. } = self.config;
        let patches = self.config.patches();
        let unfold = Unfold {
            size: [frames.len(), image, image],
            channels: COLOURS,
            kernel: [1, patch, patch],
            stride: [1, patch, patch],
            pad_before: [0; 3],
            pad_after: [0; 3],
        };
        let (rows, frame) = (frames.len() * patches, COLOURS * image * image);
        let host = &self.host[frames.start * frame..frames.end * frame];
        grow(device, &mut self.pixels, &[host.len()])?;
        grow(device, &mut self.columns, &[rows, unfold.column()])?;
        device.write(host, &mut self.pixels, 0)?;
        self.encoder.prepare(device, frames.len(), patches)?;
        device.replay(&mut self.replay, || {
            device.unfold(&self.pixels, unfold, &mut self.columns)?;
            self.patch_embedding.forward(device, &self.columns, rows, Activation::Identity, states)?;
            device.add_positions(states, rows, &self.positions, 0)?;
            self.encoder.run(device, states, frames.len(), patches)
        })?;
        Ok(())
    }

    /// Bytes of host memory that are kept between windows.
    pub(super) fn host_bytes(&self) -> usize {
        self.host.capacity() * size_of::<f32>()
    }
}
