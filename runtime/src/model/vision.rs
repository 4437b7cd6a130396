//! The SigLIP vision tower: a picture's patches to one state a patch.

use candor_kernels::pixels::Picture;
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
    /// Frames of f32, channels last, here and on the device. Pictures in bytes need neither.
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

/// A frame of a form that a tower takes.
trait Frame<D: Device>: PartialEq + Copy {
    /// Puts the patches of frames into a tower's columns.
    fn columns(
        tower: &mut VisionTower<D>,
        device: &D,
        frames: impl ExactSizeIterator<Item = Self>,
    ) -> Result<(), ModelError>;
}

/// Normalised, `[3, side, side]`.
impl<D: Device> Frame<D> for &[f32] {
    fn columns(
        tower: &mut VisionTower<D>,
        device: &D,
        frames: impl ExactSizeIterator<Item = Self>,
    ) -> Result<(), ModelError> {
        let (patches, unfold) = (tower.config.patches(), tower.unfold(frames.len()));
        tower.host.clear();
        for frame in frames {
            let plane = frame.len() / COLOURS;
            tower.host.extend((0..plane).flat_map(|i| (0..COLOURS).map(move |c| frame[c * plane + i])));
        }
        grow(device, &mut tower.pixels, &[tower.host.len()])?;
        grow(device, &mut tower.columns, &[unfold.size[0] * patches, unfold.column()])?;
        device.write(&tower.host, &mut tower.pixels, 0)?;
        Ok(device.unfold(&tower.pixels, unfold, &mut tower.columns)?)
    }
}

/// In bytes, made on the device.
impl<D: Device> Frame<D> for Picture<'_> {
    fn columns(
        tower: &mut VisionTower<D>,
        device: &D,
        frames: impl ExactSizeIterator<Item = Self>,
    ) -> Result<(), ModelError> {
        let (patches, column) = (tower.config.patches(), tower.unfold(1).column());
        grow(device, &mut tower.columns, &[frames.len() * patches, column])?;
        for (i, picture) in frames.enumerate() {
            device.picture_patches(&picture, tower.config.patch, &mut tower.columns, i * patches * column)?;
        }
        Ok(())
    }
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

    /// Normalised frames `[frames, 3, side, side]` → states `[frames · patches, width]` behind the selected layer. Frames that
    /// are equal (a still, a clip shorter than the window) are computed once.
    pub(super) fn forward(&mut self, device: &D, pixels: &[f32], out: &mut Rows<D>) -> Result<(), ModelError> {
        let side = self.config.image;
        let frame = COLOURS * side * side;
        let frames = pixels.len() / frame;
        if frames == 0 || !pixels.len().is_multiple_of(frame) {
            let reason = format!("{} values are no whole number of frames of [3, {side}, {side}]", pixels.len());
            return Err(ModelError::input("pixel values", reason));
        }
        self.forward_distinct(device, frames, |i| &pixels[i * frame..][..frame], out)
    }

    /// Packed 8-bit RGB frames `[side, side, 3]` each, normalised to -1..1 → states as in [`Self::forward`].
    pub(super) fn forward_rgb(&mut self, device: &D, frames: &[&[u8]], out: &mut Rows<D>) -> Result<(), ModelError> {
        let side = self.config.image;
        let bytes = COLOURS * side * side;
        if frames.is_empty() || frames.iter().any(|f| f.len() != bytes) {
            let reason = format!("each frame must be {side} x {side} packed RGB, and there must be one");
            return Err(ModelError::input("frames", reason));
        }
        self.forward_distinct(device, frames.len(), |i| Picture::of_rgb(frames[i], side), out)
    }

    /// Pictures of the tower's side that are made on the device → states as in [`Self::forward`].
    pub(super) fn forward_pictures(
        &mut self,
        device: &D,
        pictures: &[Picture<'_>],
        out: &mut Rows<D>,
    ) -> Result<(), ModelError> {
        let side = self.config.image;
        if pictures.is_empty() || pictures.iter().any(|picture| picture.side != side) {
            let reason = format!("each must be {side} x {side}, and there must be one");
            return Err(ModelError::input("frames", reason));
        }
        self.forward_distinct(device, pictures.len(), |i| pictures[i], out)
    }

    /// Frames, of which equal ones are computed once. `at` gives them by their number.
    fn forward_distinct<F: Frame<D>>(
        &mut self,
        device: &D,
        frames: usize,
        at: impl Fn(usize) -> F,
        out: &mut Rows<D>,
    ) -> Result<(), ModelError> {
        let first_equal = |i: usize| (0..i).find(|&j| at(i) == at(j)).unwrap_or(i);
        if (0..frames).all(|i| first_equal(i) == i) {
            return self.encode(device, frames, at, out);
        }
        let first: Vec<usize> = (0..frames).map(first_equal).collect();
        let distinct: Vec<usize> = (0..frames).filter(|&i| first[i] == i).collect();
        let mut states = std::mem::replace(&mut self.distinct, Rows::empty(device)?);
        let encoded = self.encode(device, distinct.len(), |i| at(distinct[i]), &mut states);
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

    /// Frames, a run after the other.
    fn encode<F: Frame<D>>(
        &mut self,
        device: &D,
        frames: usize,
        at: impl Fn(usize) -> F,
        out: &mut Rows<D>,
    ) -> Result<(), ModelError> {
        let (patches, width) = (self.config.patches(), self.config.width);
        out.resize(device, frames * patches, width)?;
        self.encoded += frames as u64;
        let a_run = (RUN / patches).clamp(1, frames);
        if a_run == frames {
            F::columns(self, device, (0..frames).map(at))?;
            return self.encode_run(device, frames, &mut out.buffer);
        }
        let mut states = std::mem::replace(&mut self.run, allocate(device, &[0])?);
        grow(device, &mut states, &[a_run * patches, width])?;
        for first in (0..frames).step_by(a_run) {
            let run = first..frames.min(first + a_run);
            let size = run.len();
            F::columns(self, device, run.map(&at))?;
            self.encode_run(device, size, &mut states)?;
            device.copy(&states, 0, &mut out.buffer, first * patches * width, size * patches * width)?;
        }
        self.run = states;
        Ok(())
    }

    /// How planes, or some of them, become columns.
    fn unfold(&self, frames: usize) -> Unfold {
        let VisionConfig { image, patch, .. } = self.config;
        Unfold {
            size: [frames, image, image],
            channels: COLOURS,
            kernel: [1, patch, patch],
            stride: [1, patch, patch],
            pad_before: [0; 3],
            pad_after: [0; 3],
        }
    }

    /// The columns of some frames → states `[frames · patches, width]`.
    fn encode_run(&mut self, device: &D, frames: usize, states: &mut D::Buffer) -> Result<(), ModelError> {
        let patches = self.config.patches();
        let rows = frames * patches;
        self.encoder.prepare(device, frames, patches)?;
        device.replay(&mut self.replay, || {
            self.patch_embedding.forward(device, &self.columns, rows, Activation::Identity, states)?;
            device.add_positions(states, rows, &self.positions, 0)?;
            self.encoder.run(device, states, frames, patches)
        })?;
        Ok(())
    }

    /// Bytes of host memory that are kept between windows.
    pub(super) fn host_bytes(&self) -> usize {
        self.host.capacity() * size_of::<f32>()
    }
}
