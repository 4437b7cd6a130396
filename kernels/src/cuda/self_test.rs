//! Whether a GPU computes what the CPU does: every kernel once, on small inputs. A GPU that does not is not used.

use super::{CudaDevice, CudaError};
use crate::choice::{Allowed, Choice};
use crate::cpu::CpuDevice;
use crate::device::{
    Activation, AttentionShape, CacheType, DecoderBuffers, DecoderLayer, Device, DeviceError, Result, Rounding, Unfold,
};
use crate::pixels::{Cut, Format, Outside, Picture, Pixels, Yuv};
use crate::scales::Scales;
use crate::tensor::{DType, HostTensor};

/// Error allowed, relative to the largest value of an output. Wrong kernels are off by far more; queries that are rounded to
/// bytes on one side alone, by some thousandths.
const ALLOWED: f32 = 2e-2;

impl CudaDevice {
    /// Runs every kernel once, and holds the results against the CPU's.
    ///
    /// # Errors
    /// [`CudaError::SelfTest`] names the first operation that differs or fails; a GPU without memory, or one that is lost, is told
    /// as that.
    pub fn self_test(&self) -> std::result::Result<(), CudaError> {
        let failed = |what: &str| CudaError::SelfTest { what: what.to_owned() };
        let stopped = |error: DeviceError| match error {
            // No fault of a kernel.
            DeviceError::GpuOutOfMemory { source, .. }
            | DeviceError::Cuda { source: source @ CudaError::Lost(_), .. } => source,
            error => failed(&error.to_string()),
        };
        let expected = outputs(&CpuDevice::new(Some(1))).map_err(stopped)?;
        for device in [self.clone(), self.clone().exact()] {
            let found = outputs(&device).map_err(stopped)?;
            for ((name, found), (_, expected)) in found.iter().zip(&expected) {
                if !are_near(found, expected) {
                    return Err(failed(name));
                }
            }
        }
        for dtype in [DType::I4, DType::I8] {
            // The steps were held against the CPU's above.
            let outputs = decoder_layer(self, dtype).map_err(stopped)?;
            if outputs.is_some_and(|[at_once, in_steps]| !are_near(&at_once, &in_steps)) {
                return Err(failed(&format!("a decoder layer of {dtype}")));
            }
        }
        Ok(())
    }
}

/// Whether all differences are small. What is no number is not near either.
fn are_near(found: &[f32], expected: &[f32]) -> bool {
    let size = expected.iter().fold(1e-3f32, |size, value| size.max(value.abs()));
    found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| (a - b).abs() <= ALLOWED * size)
}

/// What a decoder layer makes of a position at once, and in its steps; none if the GPU has no such launch.
fn decoder_layer(device: &CudaDevice, dtype: DType) -> Result<Option<[Vec<f32>; 2]>> {
    let (heads, key_heads, head_dim, mlp, position, theta, eps) = (3, 1, 64, 160, 130, 1e4, 1e-6);
    let (width, keys) = (heads * head_dim, key_heads * head_dim);
    let weight = |rows, depth| stored(dtype, rows, depth).map(|tensor| device.weight(&tensor)).transpose();
    let norm = HostTensor::from_f32(&vec![0.1; width], &[width]).ok();
    let norm = norm.map(|tensor| device.weight(&tensor)).transpose()?;
    let square = weight(width, width)?;
    let (narrow, gate, down) = (weight(keys, width)?, weight(mlp, width)?, weight(width, mlp)?);
    let (Some(norm), Some(square), Some(narrow), Some(gate), Some(down)) = (norm, square, narrow, gate, down) else {
        return Ok(None);
    };
    let scale = 0.125;
    let layer = DecoderLayer {
        attention_norm: &norm,
        projections: [(&square, Some(&norm)), (&narrow, None), (&narrow, None)],
        output: &square,
        mlp_norm: &norm,
        gate: &gate,
        up: &gate,
        down: &down,
        heads: [heads, key_heads],
        head_dim,
        eps,
        theta,
        scale,
    };
    let mut found = [Vec::new(), Vec::new()];
    for (in_steps, found) in found.iter_mut().enumerate() {
        let mut cache = device.cache(CacheType::I8, position + 1, key_heads, head_dim)?;
        let mut before = device.allocate(position * keys)?;
        device.write(&numbers(position * keys, 5), &mut before, 0)?;
        device.cache_write(&before, &before, position, &mut cache, 0)?;
        let mut x = device.allocate(width)?;
        device.write(&numbers(width, 6), &mut x, 0)?;
        let of = |len: usize| device.allocate(len);
        let (mut query, mut key, mut value) = (of(width)?, of(keys)?, of(keys)?);
        let (mut attended, mut gated, mut normed, mut scratch) = (of(width)?, of(mlp)?, of(width)?, of(width)?);
        if in_steps == 0 {
            let (x, query, key, value) = (&mut x, &mut query, &mut key, &mut value);
            let buffers = DecoderBuffers { x, query, key, value, attended: &mut attended, gate: &mut gated };
            if !device.decoder_layer(&layer, buffers, &mut cache, position)? {
                return Ok(None);
            }
        } else {
            device.rms_norm(&x, 1, &norm, eps, &mut normed)?;
            let each = layer.projections.map(|(weight, bias)| (weight, bias, Activation::Identity));
            device.linear_each(&normed, 1, &each, &mut [&mut query, &mut key, &mut value])?;
            let of_heads = [heads, key_heads];
            device.rope_and_write(&mut query, &mut key, &value, 1, of_heads, head_dim, &mut cache, position, theta)?;
            let (queries, keys, causal, rounding) = (1, position + 1, true, Rounding::None);
            let shape = AttentionShape { batch: 1, queries, keys, heads, key_heads, head_dim, causal, scale, rounding };
            device.cache_attention(&query, &cache, shape, &mut attended)?;
            device.linear_add(&attended, 1, &square, None, width, &mut scratch, &mut x)?;
            device.rms_norm(&x, 1, &norm, eps, &mut normed)?;
            device.linear_gated(&normed, 1, &gate, &gate, Activation::Silu, mlp, &mut scratch, &mut gated)?;
            device.linear_add(&gated, 1, &down, None, width, &mut scratch, &mut x)?;
        }
        *found = vec![0.0; width];
        device.read(&x, 0, found)?;
    }
    Ok(Some(found))
}

/// Numbers between -1 and 1 that repeat themselves (Knuth's multiplicative hash).
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    (0..count as u32).map(|i| ((i ^ seed).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0).collect()
}

/// A weight `[rows, depth]` of a type; none where the type has no such weight.
fn stored(dtype: DType, rows: usize, depth: usize) -> Option<HostTensor> {
    let values = numbers(rows * depth, 7);
    let half = |bits: fn(f32) -> u16| values.iter().flat_map(|&value| bits(value).to_le_bytes()).collect::<Vec<u8>>();
    let (bytes, scales) = match dtype {
        DType::F32 => return HostTensor::from_f32(&values, &[rows, depth]).ok(),
        DType::F16 => (half(|value| half::f16::from_f32(value).to_bits()), None),
        DType::BF16 => (half(|value| half::bf16::from_f32(value).to_bits()), None),
        DType::I8 => {
            let codes = values.iter().map(|value| (value * 127.0) as i8 as u8).collect();
            (codes, Some(Scales::rows(numbers(rows, 3).iter().map(|scale| 0.01 + 0.001 * scale).collect::<Vec<f32>>())))
        }
        DType::I4 => {
            let codes = values.iter().step_by(2).map(|value| (value.to_bits() >> 7) as u8).collect();
            let scales = numbers(rows * depth / 32, 3).iter().map(|scale| 0.1 + 0.01 * scale).collect();
            (codes, Some(Scales::groups_from_f32(scales, 32, rows).ok()?))
        }
    };
    let mut padded = vec![0; bytes.len() + 8];
    let start = padded.as_ptr().align_offset(8);
    padded[start..start + bytes.len()].copy_from_slice(&bytes);
    HostTensor::new(std::sync::Arc::new(padded), start, bytes.len(), dtype, vec![rows, depth], scales).ok()
}

/// What a device makes of each operation.
fn outputs<D: Device>(device: &D) -> Result<Vec<(String, Vec<f32>)>> {
    let mut found = Vec::new();
    let buffer = |count: usize, seed: u32| {
        let mut buffer = device.allocate(count)?;
        device.write(&numbers(count, seed), &mut buffer, 0)?;
        Ok(buffer)
    };
    let mut keep = |name: &str, buffer: &D::Buffer| {
        let mut values = vec![0.0; device.len(buffer)];
        device.read(buffer, 0, &mut values)?;
        found.push((name.to_owned(), values));
        Ok(())
    };
    for dtype in [DType::F32, DType::F16, DType::BF16, DType::I8, DType::I4] {
        layers(device, dtype, &buffer, &mut keep)?;
    }
    for kind in [CacheType::F32, CacheType::F16, CacheType::I8] {
        attention(device, kind, &buffer, &mut keep)?;
    }
    elementwise(device, &buffer, &mut keep)?;
    volumes(device, &buffer, &mut keep)?;
    pictures(device, &mut keep)?;
    choices(device, &buffer, &mut keep)?;
    Ok(found)
}

fn layers<D: Device>(
    device: &D,
    dtype: DType,
    buffer: &impl Fn(usize, u32) -> Result<D::Buffer>,
    keep: &mut impl FnMut(&str, &D::Buffer) -> Result<()>,
) -> Result<()> {
    let (outputs, depth) = (40, 192);
    let Some(tensor) = stored(dtype, outputs, depth) else { return Ok(()) };
    let weight = device.weight(&tensor)?;
    for rows in [1, 5, 70] {
        let (x, len) = (buffer(rows * depth, 1)?, rows * outputs);
        let (mut out, mut scratch) = (buffer(len, 2)?, device.allocate(len)?);
        device.linear_add(&x, rows, &weight, None, len, &mut scratch, &mut out)?;
        keep(&format!("a layer of {dtype}, {rows} rows"), &out)?;
        device.linear_gated(&x, rows, &weight, &weight, Activation::Silu, len, &mut scratch, &mut out)?;
        keep(&format!("a gated layer of {dtype}, {rows} rows"), &out)?;
    }
    let mut out = device.allocate(2 * depth)?;
    device.embed(&weight, &[3, 1], &mut out, 0)?;
    keep(&format!("a table of {dtype}"), &out)
}

fn attention<D: Device>(
    device: &D,
    kind: CacheType,
    buffer: &impl Fn(usize, u32) -> Result<D::Buffer>,
    keep: &mut impl FnMut(&str, &D::Buffer) -> Result<()>,
) -> Result<()> {
    let (heads, key_heads, head_dim, rows, theta) = (6, 2, 64, 140, 1e4);
    let mut cache = device.cache(kind, 160, key_heads, head_dim)?;
    let (mut q, mut k) = (buffer(rows * heads * head_dim, 1)?, buffer(rows * key_heads * head_dim, 2)?);
    let v = buffer(rows * key_heads * head_dim, 3)?;
    device.cache_write(&k, &v, rows, &mut cache, 0)?;
    device.rope_and_write(&mut q, &mut k, &v, rows, [heads, key_heads], head_dim, &mut cache, 0, theta)?;
    keep("rotary positions", &q)?;
    let mut copy = device.cache(kind, 150, key_heads, head_dim)?;
    device.cache_copy(&cache, &mut copy, rows)?;
    for (queries, causal) in [(1, true), (3, true)] {
        let (keys, scale, rounding) = (rows, 0.125, Rounding::None);
        let shape = AttentionShape { batch: 1, queries, keys, heads, key_heads, head_dim, causal, scale, rounding };
        let mut out = device.allocate(queries * heads * head_dim)?;
        device.cache_attention(&q, &copy, shape, &mut out)?;
        keep(&format!("attention of {queries} to a cache of {kind:?}"), &out)?;
    }
    Ok(())
}

fn elementwise<D: Device>(
    device: &D,
    buffer: &impl Fn(usize, u32) -> Result<D::Buffer>,
    keep: &mut impl FnMut(&str, &D::Buffer) -> Result<()>,
) -> Result<()> {
    let (rows, width) = (3, 130);
    let len = rows * width;
    let Some(tensor) = stored(DType::F16, 1, width) else { return Ok(()) };
    let weight = device.weight(&tensor)?;
    let (x, mut out) = (buffer(len, 1)?, device.allocate(len)?);
    device.layer_norm(&x, rows, &weight, &weight, 1e-5, &mut out)?;
    keep("layer norm", &out)?;
    device.rms_norm(&x, rows, &weight, 1e-5, &mut out)?;
    keep("RMS norm", &out)?;
    device.softmax(&x, rows, width, &mut out)?;
    keep("softmax", &out)?;
    device.weighted_sum(&[&x, &x], &[0.25, 0.5], len, &mut out)?;
    device.add(&mut out, &x, len)?;
    device.multiply(&mut out, &x, len)?;
    device.add_positions(&mut out, rows, &weight, 0)?;
    keep("sums and products", &out)?;
    device.power(&x, 1, len / 2, &mut out)?;
    device.log_mel(&mut out, len)?;
    keep("log-mel features", &out)?;
    for activation in Activation::ALL {
        let mut out = buffer(len, 4)?;
        device.activate(activation, &mut out, len)?;
        keep(&format!("{activation:?}"), &out)?;
    }
    let mut turned = buffer(2 * 64, 5)?;
    device.rope(&mut turned, 2, 1, 64, 9, 1e6)?;
    keep("rope", &turned)
}

fn pictures<D: Device>(device: &D, keep: &mut impl FnMut(&str, &D::Buffer) -> Result<()>) -> Result<()> {
    let (width, height, pitch, patch) = (46, 60, 48, 6);
    let bytes: Vec<u8> = numbers(height * 3 * pitch, 8).iter().map(|value| (value * 127.0) as i8 as u8).collect();
    let (luma, chroma) = bytes.split_at(height * pitch);
    let yuv = Yuv::of_height(height);
    let nv12 = Format::Nv12 { luma, luma_pitch: pitch, chroma, chroma_pitch: pitch, yuv };
    let cut = Cut { x: 9, y: -8, width: 41, height: 70, outside: Outside::Edge };
    for (format, grey, detail) in
        [(nv12, false, None), (Format::Rgb { data: &bytes, pitch: 3 * pitch }, true, Some(13))]
    {
        let picture = Picture { pixels: Pixels { width, height, format }, cut, grey, detail, side: 20 };
        let mut out = device.allocate(9 * 3 * patch * patch)?;
        device.picture_patches(&picture, patch, &mut out, 0)?;
        keep("patches of a picture", &out)?;
    }
    Ok(())
}

fn volumes<D: Device>(
    device: &D,
    buffer: &impl Fn(usize, u32) -> Result<D::Buffer>,
    keep: &mut impl FnMut(&str, &D::Buffer) -> Result<()>,
) -> Result<()> {
    let channels = 5;
    let x = buffer(2 * 6 * 4 * channels, 1)?;
    let unfold = Unfold {
        size: [2, 6, 4],
        channels,
        kernel: [2, 2, 3],
        stride: [1, 2, 1],
        pad_before: [1, 0, 1],
        pad_after: [0, 0, 1],
    };
    let mut out = device.allocate(unfold.output().iter().product::<usize>() * unfold.column())?;
    device.unfold(&x, unfold, &mut out)?;
    keep("columns of a convolution", &out)?;
    let Some(tensor) = stored(DType::F32, channels, 9) else { return Ok(()) };
    let mut out = device.allocate(2 * 6 * 4 * channels)?;
    device.depthwise3x3(&x, [2, 6, 4], &device.weight(&tensor)?, None, &mut out)?;
    keep("a depthwise convolution", &out)?;
    let mut mean = device.allocate(2 * channels)?;
    device.mean_rows(&x, 2, 24, channels, &mut mean)?;
    device.scale_groups(&mut out, 2, 24, channels, &mean)?;
    keep("means", &out)?;
    let mut out = device.allocate(2 * 9 * 3 * channels)?;
    device.bilinear(&x, 2, (6, 4), (9, 3), channels, &mut out)?;
    keep("bilinear", &out)?;
    for rounding in [Rounding::None, Rounding::Halves, Rounding::Bytes] {
        for head_dim in [16, 80, 100] {
            let (batch, queries, keys, heads) = (2, 5, 7, 2);
            let (q, k) = (buffer(batch * queries * heads * head_dim, 6)?, buffer(batch * keys * heads * head_dim, 7)?);
            let (key_heads, causal, scale) = (heads, false, 0.25);
            let shape = AttentionShape { batch, queries, keys, heads, key_heads, head_dim, causal, scale, rounding };
            let mut out = device.allocate(batch * queries * heads * head_dim)?;
            device.attention(&q, &k, &k, shape, &mut out)?;
            keep("attention", &out)?;
        }
    }
    Ok(())
}

fn choices<D: Device>(
    device: &D,
    buffer: &impl Fn(usize, u32) -> Result<D::Buffer>,
    keep: &mut impl FnMut(&str, &D::Buffer) -> Result<()>,
) -> Result<()> {
    // More than a block takes. Some hundreds of tokens are likely, none of the points is near a border.
    let vocabulary = 5000;
    let (logits, bits) = (buffer(vocabulary, 8)?, vec![!0; vocabulary / 64]);
    let drawn = |top_p, point| Choice::Drawn { temperature: 0.01, top_p, point };
    for (name, choice) in [
        ("the greatest logit", Choice::Greedy),
        ("a token drawn", drawn(1.0, 0.7)),
        ("a token drawn from a nucleus", drawn(0.9, 0.7)),
    ] {
        let chosen = device.choose(&logits, vocabulary, Allowed::Bits(&bits), &[], choice)?;
        let mut out = device.allocate(vocabulary)?;
        device.write(&[1.0], &mut out, chosen as usize)?;
        keep(name, &out)?;
    }
    Ok(())
}
