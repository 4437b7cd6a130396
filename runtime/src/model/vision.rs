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
    /// States of a run, where there are several.
    run: D::Buffer,
    /// States of the frames that differ, where others are their equals.
    distinct: Rows<D>,
    /// Frames that went through the layers.
    pub(super) encoded: u64,
}

/// Puts the patches of frames into a tower's columns.
type Columns<D, F> = fn(&mut VisionTower<D>, &D, &[F]) -> Result<(), ModelError>;

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
        let frames: Vec<&[f32]> = pixels.chunks_exact(frame).collect();
        self.forward_distinct(device, &frames, Self::columns_of_planes, out)
    }

    /// Packed 8-bit RGB frames `[side, side, 3]` each, normalised to -1..1 → states as in [`Self::forward`].
    pub(super) fn forward_rgb(&mut self, device: &D, frames: &[&[u8]], out: &mut Rows<D>) -> Result<(), ModelError> {
        let side = self.config.image;
        let bytes = COLOURS * side * side;
        if frames.iter().any(|f| f.len() != bytes) {
            let reason = format!("each frame must be {side} x {side} packed RGB");
            return Err(ModelError::input("frames", reason));
        }
        let pictures: Vec<Picture<'_>> = frames.iter().map(|frame| Picture::of_rgb(frame, side)).collect();
        self.forward_pictures(device, &pictures, out)
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
        self.forward_distinct(device, pictures, Self::columns_of_pictures, out)
    }

    /// Frames, of which equal ones are computed once. `columns` puts some of them into `self.columns`.
    fn forward_distinct<F: PartialEq + Copy>(
        &mut self,
        device: &D,
        frames: &[F],
        columns: Columns<D, F>,
        out: &mut Rows<D>,
    ) -> Result<(), ModelError> {
        let first_equal = |i: usize| (0..i).find(|&j| frames[i] == frames[j]).unwrap_or(i);
        let first: Vec<usize> = (0..frames.len()).map(first_equal).collect();
        let distinct: Vec<usize> = (0..frames.len()).filter(|&i| first[i] == i).collect();
        if distinct.len() == frames.len() {
            return self.encode(device, frames, columns, out);
        }
        let different: Vec<F> = distinct.iter().map(|&i| frames[i]).collect();
        let mut states = std::mem::replace(&mut self.distinct, Rows::empty(device)?);
        let encoded = self.encode(device, &different, columns, &mut states);
        self.distinct = states;
        encoded?;
        let (patches, width) = (self.config.patches(), self.config.width);
        out.resize(device, frames.len() * patches, width)?;
        let size = patches * width;
        for (to, first) in first.into_iter().enumerate() {
            let from = distinct.partition_point(|&place| place < first);
            device.copy(&self.distinct.buffer, from * size, &mut out.buffer, to * size, size)?;
        }
        Ok(())
    }

    /// Frames, a run after the other.
    fn encode<F: Copy>(
        &mut self,
        device: &D,
        frames: &[F],
        columns: Columns<D, F>,
        out: &mut Rows<D>,
    ) -> Result<(), ModelError> {
        let (patches, width) = (self.config.patches(), self.config.width);
        out.resize(device, frames.len() * patches, width)?;
        self.encoded += frames.len() as u64;
        let a_run = (RUN / patches).clamp(1, frames.len());
        if a_run == frames.len() {
            columns(self, device, frames)?;
            return self.encode_run(device, frames.len(), &mut out.buffer);
        }
        let mut states = std::mem::replace(&mut self.run, allocate(device, &[0])?);
        grow(device, &mut states, &[a_run * patches, width])?;
        for (i, run) in frames.chunks(a_run).enumerate() {
            columns(self, device, run)?;
            self.encode_run(device, run.len(), &mut states)?;
            let first = i * a_run * patches * width;
            device.copy(&states, 0, &mut out.buffer, first, run.len() * patches * width)?;
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

    /// Normalised frames `[3, side, side]` → columns.
    fn columns_of_planes(&mut self, device: &D, frames: &[&[f32]]) -> Result<(), ModelError> {
        let (plane, unfold) = (self.config.image * self.config.image, self.unfold(frames.len()));
        self.host.clear();
        self.host.extend(
            frames
                .iter()
                .flat_map(|frame| (0..plane).flat_map(move |i| (0..COLOURS).map(move |c| frame[c * plane + i]))),
        );
        grow(device, &mut self.pixels, &[self.host.len()])?;
        grow(device, &mut self.columns, &[frames.len() * self.config.patches(), unfold.column()])?;
        device.write(&self.host, &mut self.pixels, 0)?;
        Ok(device.unfold(&self.pixels, unfold, &mut self.columns)?)
    }

    /// Pictures → columns, on the device.
    fn columns_of_pictures(&mut self, device: &D, pictures: &[Picture<'_>]) -> Result<(), ModelError> {
        let (patches, column) = (self.config.patches(), self.unfold(1).column());
        grow(device, &mut self.columns, &[pictures.len() * patches, column])?;
        for (i, picture) in pictures.iter().enumerate() {
            device.picture_patches(picture, self.config.patch, &mut self.columns, i * patches * column)?;
        }
        Ok(())
    }

    /// The columns of some frames → states `[frames · patches, width]`.
    fn encode_run(&mut self, device: &D, frames: usize, states: &mut D::Buffer) -> Result<(), ModelError> {
        let patches = self.config.patches();
        let rows = frames * patches;
        self.patch_embedding.forward(device, &self.columns, rows, Activation::Identity, states)?;
        device.add_positions(states, rows, &self.positions, 0)?;
        self.encoder.forward(device, states, frames, patches)
    }

    /// Bytes of host memory that are kept between windows.
    pub(super) fn host_bytes(&self) -> usize {
        self.host.capacity() * size_of::<f32>()
    }
}
