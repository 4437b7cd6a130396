//! The small layers every part is made of, and how they are loaded.

use candor_kernels::{Activation, Device, DeviceError};

use super::ModelError;
use crate::weights::Part;

/// Loads the layers of one part of a model onto a device.
pub(super) struct Loader<'a, D: Device> {
    device: &'a D,
    part: Part<'a>,
}

impl<'a, D: Device> Loader<'a, D> {
    pub(super) fn new(device: &'a D, part: Part<'a>) -> Self {
        Loader { device, part }
    }

    pub(super) fn under(&self, name: &str) -> Self {
        Loader { device: self.device, part: self.part.under(name) }
    }

    pub(super) fn part(&self) -> &Part<'a> {
        &self.part
    }

    /// A tensor of the given shape.
    pub(super) fn weight(&self, name: &str, shape: &[usize]) -> Result<D::Weight, ModelError> {
        let tensor = self.part.tensor(name, shape)?;
        self.device.weight(&tensor).map_err(|source| ModelError::Upload { tensor: name.to_owned(), source })
    }

    /// `name.weight` `[to, from]` and, where there is one, `name.bias` `[to]`.
    pub(super) fn linear(&self, name: &str, from: usize, to: usize, bias: Bias) -> Result<Linear<D>, ModelError> {
        self.convolution(name, &[to, from], bias)
    }

    /// A convolution's weight `[to, …]`, used as a matrix with one row an output channel.
    pub(super) fn convolution(&self, name: &str, shape: &[usize], bias: Bias) -> Result<Linear<D>, ModelError> {
        let weight = self.weight(&format!("{name}.weight"), shape)?;
        let bias = match bias {
            Bias::None => None,
            Bias::Each => Some(self.weight(&format!("{name}.bias"), &shape[..1])?),
        };
        Ok(Linear { weight, bias })
    }

    /// `name.weight` and `name.bias`, both `[width]`.
    pub(super) fn layer_norm(&self, name: &str, width: usize, eps: f32) -> Result<LayerNorm<D>, ModelError> {
        Ok(LayerNorm {
            weight: self.weight(&format!("{name}.weight"), &[width])?,
            bias: self.weight(&format!("{name}.bias"), &[width])?,
            eps,
        })
    }
}

/// What `load` makes of weights of about `bytes` bytes, which the device is told of.
pub(super) fn loading<D: Device, T>(
    device: &D,
    bytes: usize,
    load: impl FnOnce() -> Result<T, ModelError>,
) -> Result<T, ModelError> {
    device.loading(bytes);
    let loaded = load();
    let done = device.loaded();
    let loaded = loaded?;
    done?;
    Ok(loaded)
}

/// Whether a linear layer adds a bias.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Bias {
    None,
    Each,
}

/// `x · weightᵀ + bias`.
#[derive(Clone)]
pub(super) struct Linear<D: Device> {
    weight: D::Weight,
    bias: Option<D::Weight>,
}

impl<D: Device> Linear<D> {
    /// x `[rows, from]` → out `[rows, to]`.
    pub(super) fn forward(
        &self,
        device: &D,
        x: &D::Buffer,
        rows: usize,
        activation: Activation,
        out: &mut D::Buffer,
    ) -> Result<(), DeviceError> {
        device.linear(x, rows, &self.weight, self.bias.as_ref(), activation, out)
    }

    /// [`Device::linear_add`]: y `[rows, from]`, x `[rows, to]` of `len` elements.
    pub(super) fn add(
        &self,
        device: &D,
        y: &D::Buffer,
        rows: usize,
        len: usize,
        scratch: &mut D::Buffer,
        x: &mut D::Buffer,
    ) -> Result<(), DeviceError> {
        device.linear_add(y, rows, &self.weight, self.bias.as_ref(), len, scratch, x)
    }

    /// What it is for [`Device::linear_each`].
    pub(super) fn with(&self, activation: Activation) -> (&D::Weight, Option<&D::Weight>, Activation) {
        (&self.weight, self.bias.as_ref(), activation)
    }

    /// Weight and bias, to be put another in place of.
    pub(super) fn parts(&mut self) -> (&mut D::Weight, Option<&mut D::Weight>) {
        (&mut self.weight, self.bias.as_mut())
    }
}

/// Layer normalisation with a bias.
pub(super) struct LayerNorm<D: Device> {
    weight: D::Weight,
    bias: D::Weight,
    eps: f32,
}

impl<D: Device> LayerNorm<D> {
    /// x and out `[rows, width]`.
    pub(super) fn forward(
        &self,
        device: &D,
        x: &D::Buffer,
        rows: usize,
        out: &mut D::Buffer,
    ) -> Result<(), DeviceError> {
        device.layer_norm(x, rows, &self.weight, &self.bias, self.eps, out)
    }
}
