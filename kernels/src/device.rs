//! The list of operations that a device gives: the only seam between models and hardware.
//!
//! A model is written once, generic over [`Device`]. All activations are f32, row-major and contiguous; weights
//! stay in the type they are stored in and every product is accumulated in f32. A new operation goes into this
//! trait, every device, and the conformance test in one change.

use crate::choice::{Allowed, Choice, ChoiceError};
use crate::pixels::{Picture, PictureError};
use crate::tensor::HostTensor;

/// Why an operation could not be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A buffer or weight is too short, or of another shape than the operation was told.
    #[error("{op}: {what} has {actual} elements, {expected} are needed")]
    Size {
        /// The operation.
        op: &'static str,
        /// Which argument.
        what: &'static str,
        /// Elements needed.
        expected: usize,
        /// Elements there are.
        actual: usize,
    },
    /// An argument makes no sense (an id outside its table, heads not divisible by key heads, ...).
    #[error("{op}: {reason}")]
    Argument {
        /// The operation.
        op: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The device has no memory left.
    #[error("out of memory: {bytes} bytes were asked for")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
    },
    /// A GPU has no memory left.
    #[error("{source}: {bytes} bytes were asked for")]
    GpuOutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// [`CudaError::OutOfMemory`](crate::cuda::CudaError::OutOfMemory).
        source: crate::cuda::CudaError,
    },
    /// A picture that cannot be read.
    #[error("picture_patches: {0}")]
    Picture(#[from] PictureError),
    /// The GPU or its driver failed.
    #[error("{op}: {source}")]
    Cuda {
        /// The operation.
        op: &'static str,
        /// What is wrong.
        source: crate::cuda::CudaError,
    },
    /// No token could be chosen.
    #[error(transparent)]
    Choice(#[from] ChoiceError),
}

/// Result of a device operation.
pub type Result<T> = std::result::Result<T, DeviceError>;

/// Element-wise functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activation {
    /// x
    Identity,
    /// x·Φ(x), the exact (erf) form.
    Gelu,
    /// GELU's tanh approximation (SigLIP).
    GeluTanh,
    /// x·sigmoid(x)
    Silu,
    /// 1 / (1 + exp(-x))
    Sigmoid,
    /// tanh(x)
    Tanh,
    /// max(x, 0)
    Relu,
}

impl Activation {
    /// Every one of them.
    pub const ALL: [Activation; 7] = [
        Activation::Identity,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Silu,
        Activation::Sigmoid,
        Activation::Tanh,
        Activation::Relu,
    ];
}

/// The frequencies of rotary positions, one for each pair of a head, as transformers has them: the exponent and the power are
/// f32.
pub(crate) fn rope_frequencies(head_dim: usize, theta: f32) -> impl Iterator<Item = f32> {
    (0..head_dim / 2).map(move |pair| {
        let exponent = (2 * pair) as f32 / head_dim as f32;
        1.0 / (f64::from(theta).powf(f64::from(exponent)) as f32)
    })
}

/// Sizes of an attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Independent sequences, one behind the other in every buffer.
    pub batch: usize,
    /// Queries a sequence.
    pub queries: usize,
    /// Keys (and values) a sequence.
    pub keys: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; `heads` is a multiple of it (grouped-query attention).
    pub key_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Query `i` sees keys `0 ..= keys - queries + i` only.
    pub causal: bool,
    /// Factor on q·k, mostly `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// How far queries and keys may be rounded (see [`Device::rounding`]). In a cache of bytes or halves they are anyway.
    pub rounding: Rounding,
}

/// What numbers become before they are multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// They stay f32.
    None,
    /// f16.
    Halves,
    /// Bytes with a scale.
    Bytes,
}

/// A layer of a decoder of Qwen2's kind: RMS norms before attention and MLP, grouped-query attention with rotary positions, a gated
/// MLP with SiLU.
#[derive(Clone, Copy, Debug)]
pub struct DecoderLayer<'a, W> {
    /// Weight of the norm before the attention, `[width]`.
    pub attention_norm: &'a W,
    /// Weights `[heads · head_dim, width]` of query, key and value, and their biases.
    pub projections: [(&'a W, Option<&'a W>); 3],
    /// `[width, heads · head_dim]`
    pub output: &'a W,
    /// Weight of the norm before the MLP, `[width]`.
    pub mlp_norm: &'a W,
    /// `[mlp, width]`
    pub gate: &'a W,
    /// `[mlp, width]`
    pub up: &'a W,
    /// `[width, mlp]`
    pub down: &'a W,
    /// Query heads and key/value heads.
    pub heads: [usize; 2],
    /// Width of a head.
    pub head_dim: usize,
    /// What norms add to the mean of squares.
    pub eps: f32,
    /// Base of the rotary positions.
    pub theta: f32,
    /// Factor on q·k.
    pub scale: f32,
}

/// Buffers of one position on its way through a [`DecoderLayer`]. All but x are overwritten.
#[derive(Debug)]
pub struct DecoderBuffers<'a, B> {
    /// The residual stream, `[width]`.
    pub x: &'a mut B,
    /// `[heads · head_dim]`
    pub query: &'a mut B,
    /// `[key heads · head_dim]`
    pub key: &'a mut B,
    /// `[key heads · head_dim]`
    pub value: &'a mut B,
    /// `[heads · head_dim]`
    pub attended: &'a mut B,
    /// `[mlp]`
    pub gate: &'a mut B,
}

/// How a key-value cache keeps its elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheType {
    /// f32.
    F32,
    /// f16.
    F16,
    /// Signed bytes with one f32 scale a head and position; keys without a mean that softmax does not see.
    I8,
}

impl CacheType {
    /// Bytes of an element, without scales.
    pub fn element_bytes(self) -> usize {
        match self {
            CacheType::F32 => size_of::<f32>(),
            CacheType::F16 => size_of::<u16>(),
            CacheType::I8 => 1,
        }
    }

    /// Bytes that a key and a value of one position take in a layer.
    pub fn position_bytes(self, key_heads: usize, head_dim: usize) -> usize {
        let scale = if self == CacheType::I8 { size_of::<f32>() } else { 0 };
        2 * key_heads * (self.element_bytes() * head_dim + scale)
    }
}

/// How [`Device::unfold`] walks over a channels-last volume. Axes are (time, row, column).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unfold {
    /// Size of the input, without channels.
    pub size: [usize; 3],
    /// Channels of the input.
    pub channels: usize,
    /// Size of the kernel.
    pub kernel: [usize; 3],
    /// Step of the kernel.
    pub stride: [usize; 3],
    /// Zeros before the first element of each axis.
    pub pad_before: [usize; 3],
    /// Zeros behind the last element of each axis.
    pub pad_after: [usize; 3],
}

impl Unfold {
    /// Positions of the kernel on each axis.
    pub fn output(&self) -> [usize; 3] {
        std::array::from_fn(|i| {
            (self.size[i] + self.pad_before[i] + self.pad_after[i]).saturating_sub(self.kernel[i]) / self.stride[i] + 1
        })
    }

    /// Elements of a column: `channels · kernel volume`.
    pub fn column(&self) -> usize {
        self.channels * self.kernel.iter().product::<usize>()
    }
}

/// Every arithmetic operation of the model family.
///
/// Buffers hold f32 and may be longer than an operation needs; what lies behind is left alone. Sizes are checked
/// on every call: a mismatch is a [`DeviceError::Size`], never a panic. `&Buffer` arguments of one call may be the
/// same buffer, an output never is one of the inputs.
pub trait Device: Clone + Send + Sync + 'static {
    /// f32 activations on the device.
    type Buffer: Send + Sync;
    /// Keys and values of one layer.
    type Cache: Send + Sync;
    /// A weight ready for use: on the CPU a view of the mapped file, elsewhere an upload.
    type Weight: Clone + Send + Sync;
    /// What [`Device::replay`] keeps of a run of operations.
    type Replay: Default + Send;

    /// What the device is, for logs: instruction set and threads, or GPU name and driver.
    fn describe(&self) -> String;

    /// `len` zeros.
    fn allocate(&self, len: usize) -> Result<Self::Buffer>;
    /// Elements of a buffer.
    fn len(&self, buffer: &Self::Buffer) -> usize;
    /// Host to device: `to[offset ..] = data`.
    fn write(&self, data: &[f32], to: &mut Self::Buffer, offset: usize) -> Result<()>;
    /// Device to host: `out = from[offset ..]`.
    fn read(&self, from: &Self::Buffer, offset: usize, out: &mut [f32]) -> Result<()>;
    /// Waits until every operation so far is done. Operations may be under way when their call returns; what they read of the
    /// host's memory they have read by then, and [`Device::read`] waits by itself.
    fn wait(&self) -> Result<()> {
        Ok(())
    }
    /// Runs `operations`, which were the same calls when `replay` was last used but for the numbers and buffers in them. A device may
    /// put them off until all are known, and begin them all at once: they neither read, write nor wait, nor copy caches
    /// ([`DeviceError::Argument`]).
    fn replay(&self, replay: &mut Self::Replay, operations: impl FnOnce() -> Result<()>) -> Result<()> {
        let _ = replay;
        operations()
    }
    /// `to[to_offset .. +len] = from[from_offset .. +len]`.
    fn copy(
        &self,
        from: &Self::Buffer,
        from_offset: usize,
        to: &mut Self::Buffer,
        to_offset: usize,
        len: usize,
    ) -> Result<()>;
    /// Weights of about `bytes` bytes, each at a multiple of 256, are about to come; [`Device::loaded`] follows however that ends.
    fn loading(&self, bytes: usize) {
        let _ = bytes;
    }
    /// The weights that [`Device::loading`] announced are there, or will not come.
    fn loaded(&self) -> Result<()> {
        Ok(())
    }
    /// Makes a stored weight usable. On the CPU this copies nothing.
    fn weight(&self, tensor: &HostTensor) -> Result<Self::Weight>;
    /// Rows `first .. first + count` of a weight `[rows, in…]` as a weight `[count, in…]` of their own. Its values are not
    /// copied. [`DeviceError::Argument`] where there are fewer rows.
    fn weight_rows(&self, weight: &Self::Weight, first: usize, count: usize) -> Result<Self::Weight>;

    /// `out[offset + i·width ..] = table[ids[i]]`; table `[rows, width]`.
    fn embed(&self, table: &Self::Weight, ids: &[u32], out: &mut Self::Buffer, offset: usize) -> Result<()>;
    /// `out = activation(x · weightᵀ + bias)`: x `[rows, in]`, weight `[out, in…]` (trailing dimensions are one),
    /// bias `[out]`, out `[rows, out]`.
    fn linear(
        &self,
        x: &Self::Buffer,
        rows: usize,
        weight: &Self::Weight,
        bias: Option<&Self::Weight>,
        activation: Activation,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// [`Device::linear`] of several layers over one x: each layer is a weight, a bias and an activation, and has the out
    /// of the same index. Where a device can it reads x once.
    #[allow(clippy::type_complexity)] // a layer's three parts
    fn linear_each(
        &self,
        x: &Self::Buffer,
        rows: usize,
        layers: &[(&Self::Weight, Option<&Self::Weight>, Activation)],
        outs: &mut [&mut Self::Buffer],
    ) -> Result<()> {
        for (&(weight, bias, activation), out) in layers.iter().zip(outs) {
            self.linear(x, rows, weight, bias, activation, out)?;
        }
        Ok(())
    }
    /// `x[i] += (y · weightᵀ + bias)[i]` for the `len` elements of the layer's output, `[rows, out]`: what a layer adds to the
    /// residual stream. `scratch` has room for them.
    #[allow(clippy::too_many_arguments)] // what a layer has, and the two that are added
    fn linear_add(
        &self,
        y: &Self::Buffer,
        rows: usize,
        weight: &Self::Weight,
        bias: Option<&Self::Weight>,
        len: usize,
        scratch: &mut Self::Buffer,
        x: &mut Self::Buffer,
    ) -> Result<()> {
        self.linear(y, rows, weight, bias, Activation::Identity, scratch)?;
        self.add(x, scratch, len)
    }
    /// `out[i] = activation(x · gateᵀ)[i] · (x · upᵀ)[i]` for the `len` elements of each layer's output, `[rows, out]`: a gated
    /// MLP's (Shazeer 2020). `scratch` has room for them.
    #[allow(clippy::too_many_arguments)] // two layers, and what is shared
    fn linear_gated(
        &self,
        x: &Self::Buffer,
        rows: usize,
        gate: &Self::Weight,
        up: &Self::Weight,
        activation: Activation,
        len: usize,
        scratch: &mut Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        let layers = [(gate, None, activation), (up, None, Activation::Identity)];
        self.linear_each(x, rows, &layers, &mut [&mut *out, &mut *scratch])?;
        self.multiply(out, scratch, len)
    }
    /// `out = (x - mean) / sqrt(variance + eps) · weight + bias` over each row of `[rows, width]`, width from `weight`.
    fn layer_norm(
        &self,
        x: &Self::Buffer,
        rows: usize,
        weight: &Self::Weight,
        bias: &Self::Weight,
        eps: f32,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// `out = x / sqrt(mean(x²) + eps) · weight` over each row of `[rows, width]`.
    fn rms_norm(
        &self,
        x: &Self::Buffer,
        rows: usize,
        weight: &Self::Weight,
        eps: f32,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// `x[i] = activation(x[i])` for the first `len` elements.
    fn activate(&self, activation: Activation, x: &mut Self::Buffer, len: usize) -> Result<()>;
    /// `x[i] += y[i]` for the first `len` elements.
    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer, len: usize) -> Result<()>;
    /// `x[i] *= y[i]` for the first `len` elements.
    fn multiply(&self, x: &mut Self::Buffer, y: &Self::Buffer, len: usize) -> Result<()>;
    /// `x[r, :] += table[(first + r) mod table rows, :]`: position embeddings over `rows` rows of `x`.
    fn add_positions(&self, x: &mut Self::Buffer, rows: usize, table: &Self::Weight, first: usize) -> Result<()>;
    /// `out = softmax` over each row of `[rows, width]`.
    fn softmax(&self, x: &Self::Buffer, rows: usize, width: usize, out: &mut Self::Buffer) -> Result<()>;
    /// Rotary positions in the half-split form of Qwen2 (Su et al. 2021): `x [rows, heads · head_dim]`, row `r` at
    /// position `first + r`.
    fn rope(
        &self,
        x: &mut Self::Buffer,
        rows: usize,
        heads: usize,
        head_dim: usize,
        first: usize,
        theta: f32,
    ) -> Result<()>;
    /// Softmax attention. q `[batch, queries, heads · head_dim]`, k and v `[batch, keys, key_heads · head_dim]`,
    /// out as q. With `batch = 1`, k and v may be caches longer than `keys`.
    fn attention(
        &self,
        q: &Self::Buffer,
        k: &Self::Buffer,
        v: &Self::Buffer,
        shape: AttentionShape,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// How activations are rounded for products with this weight: then those of attention may be too.
    fn rounding(&self, weight: &Self::Weight) -> Rounding {
        let _ = weight;
        Rounding::None
    }

    /// An empty cache for `capacity` positions of `key_heads` heads.
    fn cache(&self, kind: CacheType, capacity: usize, key_heads: usize, head_dim: usize) -> Result<Self::Cache>;
    /// Puts k and v, `[rows, key_heads · head_dim]`, at positions `first ..`. Positions are written in their order; position
    /// 0 begins a sequence.
    fn cache_write(
        &self,
        k: &Self::Buffer,
        v: &Self::Buffer,
        rows: usize,
        cache: &mut Self::Cache,
        first: usize,
    ) -> Result<()>;
    /// Turns q `[rows, heads · head_dim]` and k to positions `first ..` ([`Device::rope`]), and puts k and v there
    /// ([`Device::cache_write`]). Afterwards nobody reads k.
    #[allow(clippy::too_many_arguments)] // those of the three operations that it is
    fn rope_and_write(
        &self,
        q: &mut Self::Buffer,
        k: &mut Self::Buffer,
        v: &Self::Buffer,
        rows: usize,
        heads: [usize; 2],
        head_dim: usize,
        cache: &mut Self::Cache,
        first: usize,
        theta: f32,
    ) -> Result<()> {
        self.rope(q, rows, heads[0], head_dim, first, theta)?;
        self.rope(k, rows, heads[1], head_dim, first, theta)?;
        self.cache_write(k, v, rows, cache, first)
    }
    /// Makes the first `positions` positions those of another cache of the same type, heads and width.
    fn cache_copy(&self, from: &Self::Cache, to: &mut Self::Cache, positions: usize) -> Result<()>;
    /// [`Device::attention`] of one sequence to the first `shape.keys` positions of a cache.
    fn cache_attention(
        &self,
        q: &Self::Buffer,
        cache: &Self::Cache,
        shape: AttentionShape,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// Takes one position, `position`, through a whole layer, where the device has that as one step: false says that it has not for
    /// this layer and cache, and that nothing was done. x becomes what the layer adds to it, the cache gets the position's key and
    /// value, as by [`Device::rms_norm`], [`Device::linear_each`], [`Device::rope_and_write`], [`Device::cache_attention`],
    /// [`Device::linear_add`], [`Device::linear_gated`] one after the other.
    fn decoder_layer(
        &self,
        layer: &DecoderLayer<'_, Self::Weight>,
        buffers: DecoderBuffers<'_, Self::Buffer>,
        cache: &mut Self::Cache,
        position: usize,
    ) -> Result<bool> {
        let _ = (layer, buffers, cache, position);
        Ok(false)
    }

    /// Turns a convolution into [`Device::linear`]: channels-last input `[t, h, w, channels]` to columns
    /// `[t', h', w', channels · kt · kh · kw]` in the order of PyTorch's convolution weights (channel first).
    fn unfold(&self, x: &Self::Buffer, unfold: Unfold, out: &mut Self::Buffer) -> Result<()>;
    /// Whether cutting and scaling pictures is better left to [`Device::picture_patches`] than done beforehand by [`Picture::rgb`].
    fn makes_pictures(&self) -> bool {
        false
    }

    /// Camera pixels to a vision tower's patches: the bytes that [`Picture::rgb`] defines, from -1 to 1
    /// ([`normalisation`](crate::pixels::normalisation)), in the columns that [`Device::unfold`] makes of them,
    /// `out[offset ..] = [patches, 3 · patch · patch]`. Rows and columns that no whole patch has are left out. The bytes are the
    /// same on every device. [`DeviceError::Picture`] where there are not the pixels that the picture says.
    fn picture_patches(&self, picture: &Picture<'_>, patch: usize, out: &mut Self::Buffer, offset: usize)
    -> Result<()>;
    /// Depthwise 3×3 convolution, stride 1, one zero around: x and out `[frames, height, width, channels]`, weight
    /// `[channels, 1, 3, 3]`, bias `[channels]` or none.
    fn depthwise3x3(
        &self,
        x: &Self::Buffer,
        size: [usize; 3],
        weight: &Self::Weight,
        bias: Option<&Self::Weight>,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// Mean over each of `groups` runs of `per_group` rows: x `[groups, per_group, width]` → out `[groups, width]`.
    fn mean_rows(
        &self,
        x: &Self::Buffer,
        groups: usize,
        per_group: usize,
        width: usize,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// `x[g, r, :] *= factor[g, :]`: x `[groups, per_group, width]`, factor `[groups, width]`.
    fn scale_groups(
        &self,
        x: &mut Self::Buffer,
        groups: usize,
        per_group: usize,
        width: usize,
        factor: &Self::Buffer,
    ) -> Result<()>;
    /// Bilinear resize as torch's `interpolate(align_corners=False, antialias=False)`: x `[frames, from.0, from.1,
    /// channels]` → out `[frames, to.0, to.1, channels]`.
    fn bilinear(
        &self,
        x: &Self::Buffer,
        frames: usize,
        from: (usize, usize),
        to: (usize, usize),
        channels: usize,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// `out[i] = Σ_j weights[j] · parts[j][i]` for the first `len` elements.
    fn weighted_sum(&self, parts: &[&Self::Buffer], weights: &[f32], len: usize, out: &mut Self::Buffer) -> Result<()>;
    /// Squared sizes of complex numbers, real parts before imaginary parts: `out[r, i] = x[r, 0, i]² + x[r, 1, i]²` for x
    /// `[rows, 2, width]` and out `[rows, width]`.
    fn power(&self, x: &Self::Buffer, rows: usize, width: usize, out: &mut Self::Buffer) -> Result<()>;
    /// The first `len` elements, powers of mel bands, on Whisper's scale (Radford et al. 2022): `l = log10(max(x, 10⁻¹⁰))`, then
    /// `x = (max(l, most - 8) + 4) / 4` where `most` is the largest `l` of all. What is no number stays none, and does not count as
    /// the largest.
    fn log_mel(&self, x: &mut Self::Buffer, len: usize) -> Result<()>;

    /// Chooses one of the allowed tokens by their logits `[vocabulary]`, as [`crate::choice::choose`] has it: `forbidden`
    /// tokens are not chosen even where they are allowed. Waits for the token, and copies no more than that.
    ///
    /// # Errors
    /// [`DeviceError::Choice`]: a setting or an id out of range, any logit that is no number, nothing allowed.
    fn choose(
        &self,
        logits: &Self::Buffer,
        vocabulary: usize,
        allowed: Allowed<'_>,
        forbidden: &[u32],
        choice: Choice,
    ) -> Result<u32>;
}
