//! The transformer encoder that SigLIP, Whisper and BERT share: they differ in names, in which biases there are,
//! and in whether a layer normalises before (SigLIP, Whisper) or after (BERT) its two halves.

use candor_kernels::{Activation, AttentionShape, Device, DeviceError};

use super::ModelError;
use super::layers::{Bias, LayerNorm, Linear, Loader};
use super::rows::{allocate, grow};

/// Where a layer normalises.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum NormOrder {
    /// `x + f(norm(x))`
    Before,
    /// `norm(x + f(x))`
    After,
}

/// What a checkpoint family calls the parts of a layer.
pub(super) struct Names {
    pub(super) query: &'static str,
    pub(super) key: &'static str,
    pub(super) value: &'static str,
    pub(super) output: &'static str,
    pub(super) attention_norm: &'static str,
    pub(super) up: &'static str,
    pub(super) down: &'static str,
    pub(super) mlp_norm: &'static str,
}

/// Sizes and kinds of an encoder.
#[derive(Clone, Copy)]
pub(super) struct EncoderShape {
    pub(super) width: usize,
    pub(super) heads: usize,
    pub(super) mlp: usize,
    pub(super) layers: usize,
    pub(super) eps: f32,
    pub(super) activation: Activation,
    pub(super) order: NormOrder,
    /// Whisper's keys have none.
    pub(super) key_bias: Bias,
}

struct Layer<D: Device> {
    query: Linear<D>,
    key: Linear<D>,
    value: Linear<D>,
    output: Linear<D>,
    attention_norm: LayerNorm<D>,
    up: Linear<D>,
    down: Linear<D>,
    mlp_norm: LayerNorm<D>,
}

/// A stack of layers with the buffers of its forward pass.
pub(super) struct Encoder<D: Device> {
    shape: EncoderShape,
    layers: Vec<Layer<D>>,
    normed: D::Buffer,
    query: D::Buffer,
    key: D::Buffer,
    value: D::Buffer,
    attended: D::Buffer,
    inner: D::Buffer,
}

impl<D: Device> Encoder<D> {
    /// Loads layers `0 .. shape.layers` of a part whose children are numbered.
    pub(super) fn load(
        device: &D,
        loader: &Loader<'_, D>,
        names: &Names,
        shape: EncoderShape,
    ) -> Result<Self, ModelError> {
        let EncoderShape { width, mlp, eps, .. } = shape;
        let mut layers = Vec::new();
        for i in 0..shape.layers {
            let l = loader.under(&i.to_string());
            layers.push(Layer {
                query: l.linear(names.query, width, width, Bias::Each)?,
                key: l.linear(names.key, width, width, shape.key_bias)?,
                value: l.linear(names.value, width, width, Bias::Each)?,
                output: l.linear(names.output, width, width, Bias::Each)?,
                attention_norm: l.layer_norm(names.attention_norm, width, eps)?,
                up: l.linear(names.up, width, mlp, Bias::Each)?,
                down: l.linear(names.down, mlp, width, Bias::Each)?,
                mlp_norm: l.layer_norm(names.mlp_norm, width, eps)?,
            });
        }
        let none = || allocate(device, &[0]);
        let (normed, query, key, value, attended, inner) = (none()?, none()?, none()?, none()?, none()?, none()?);
        Ok(Encoder { shape, layers, normed, query, key, value, attended, inner })
    }

    /// Runs every layer over `batch` sequences of `length` positions, in place: x `[batch · length, width]`.
    pub(super) fn forward(
        &mut self,
        device: &D,
        x: &mut D::Buffer,
        batch: usize,
        length: usize,
    ) -> Result<(), ModelError> {
        self.prepare(device, batch, length)?;
        Ok(self.run(device, x, batch, length)?)
    }

    /// Makes the buffers large enough for `batch` sequences of `length` positions.
    pub(super) fn prepare(&mut self, device: &D, batch: usize, length: usize) -> Result<(), ModelError> {
        let rows = batch.checked_mul(length).ok_or_else(|| ModelError::Overflow(vec![batch, length]))?;
        for buffer in [&mut self.normed, &mut self.query, &mut self.key, &mut self.value, &mut self.attended] {
            grow(device, buffer, &[rows, self.shape.width])?;
        }
        grow(device, &mut self.inner, &[rows, self.shape.mlp])
    }

    /// [`Encoder::forward`] with the buffers of [`Encoder::prepare`].
    pub(super) fn run(
        &mut self,
        device: &D,
        x: &mut D::Buffer,
        batch: usize,
        length: usize,
    ) -> Result<(), DeviceError> {
        for i in 0..self.layers.len() {
            match self.shape.order {
                NormOrder::Before => self.layer_norm_before(device, i, x, batch, length)?,
                NormOrder::After => self.layer_norm_after(device, i, x, batch, length)?,
            }
        }
        Ok(())
    }

    fn layer_norm_before(
        &mut self,
        device: &D,
        i: usize,
        x: &mut D::Buffer,
        batch: usize,
        length: usize,
    ) -> Result<(), DeviceError> {
        let (rows, len) = (batch * length, batch * length * self.shape.width);
        let Self { shape, layers, normed, query, key, value, attended, inner } = self;
        let layer = &layers[i];
        layer.attention_norm.forward(device, x, rows, normed)?;
        let each = [&layer.query, &layer.key, &layer.value].map(|linear| linear.with(Activation::Identity));
        device.linear_each(normed, rows, &each, &mut [query, key, value])?;
        device.attention(query, key, value, attention(device, shape, layer, batch, length), attended)?;
        layer.output.add(device, attended, rows, len, normed, x)?;
        layer.mlp_norm.forward(device, x, rows, normed)?;
        layer.up.forward(device, normed, rows, shape.activation, inner)?;
        layer.down.add(device, inner, rows, len, normed, x)
    }

    fn layer_norm_after(
        &mut self,
        device: &D,
        i: usize,
        x: &mut D::Buffer,
        batch: usize,
        length: usize,
    ) -> Result<(), DeviceError> {
        let (rows, len) = (batch * length, batch * length * self.shape.width);
        let Self { shape, layers, normed, query, key, value, attended, inner } = self;
        let layer = &layers[i];
        let each = [&layer.query, &layer.key, &layer.value].map(|linear| linear.with(Activation::Identity));
        device.linear_each(x, rows, &each, &mut [query, key, value])?;
        device.attention(query, key, value, attention(device, shape, layer, batch, length), attended)?;
        layer.output.add(device, attended, rows, len, normed, x)?;
        layer.attention_norm.forward(device, x, rows, normed)?;
        layer.up.forward(device, normed, rows, shape.activation, inner)?;
        layer.down.add(device, inner, rows, len, attended, normed)?;
        layer.mlp_norm.forward(device, normed, rows, x)
    }
}

fn attention<D: Device>(
    device: &D,
    shape: &EncoderShape,
    layer: &Layer<D>,
    batch: usize,
    length: usize,
) -> AttentionShape {
    let head_dim = shape.width / shape.heads;
    AttentionShape {
        batch,
        queries: length,
        keys: length,
        heads: shape.heads,
        key_heads: shape.heads,
        head_dim,
        causal: false,
        scale: 1.0 / (head_dim as f32).sqrt(),
        rounding: device.rounding(layer.query.with(Activation::Identity).0),
    }
}
