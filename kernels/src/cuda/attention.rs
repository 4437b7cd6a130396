//! Attention: as it is defined, of one query to a cache, and of many by tensor cores.

use cudarc::driver::DeviceRepr;
use std::sync::PoisonError;

use super::arena::Memory;
use super::launch::{Argument, Grid, launch};
use super::layers::{grown, scratch};
use super::{CudaBuffer, CudaCache, CudaDevice, address};
use crate::check;
use crate::device::{AttentionShape, CacheType, DeviceError, Result, Rounding};

/// The widest head; cuda/attention.cu has the same number.
pub(super) const WIDEST_HEAD: usize = 512;
/// Keys of a block, the most heads that share a key head, and the widest; cuda/decode.cu has the same numbers, and
/// cuda/flash.cu the last.
const CHUNK: usize = 128;
const GROUP: usize = 16;
const WIDEST: usize = 128;
/// The widest heads of the narrower kernels of cuda/flash.cu, the second of them over buffers alone.
const NARROW: usize = 64;
const MIDDLE: usize = 96;

/// What the blocks of one decoding step leave for the last of them.
#[derive(Debug, Default)]
pub(super) struct Parts {
    partial: Option<Memory<f32>>,
    /// One a key head; zero between launches.
    counters: Option<Memory<i32>>,
}

/// Bytes of [`Parts`] that are large enough for a step of `heads` heads to a cache of `capacity` positions.
pub(crate) fn parts_bytes(capacity: usize, heads: usize, head_dim: usize) -> usize {
    capacity.div_ceil(CHUNK).saturating_mul(heads).saturating_mul((head_dim + 2) * size_of::<f32>())
}

arguments! {
    /// `Shape` of cuda/attention.cuh.
    Shape { queries: i32, keys: i32, heads: i32, key_heads: i32, head_dim: i32, causal: i32, scale: f32 }
    /// `Strides` of cuda/attention.cuh.
    Strides { batches: i64, heads: i64, keys: i64 }
    /// `Decode` of cuda/decode.cu.
    Decode { keys: i32, group: i32, head_dim: i32, gap: i32, head_stride: i64, scale: f32, end: i32 }
}

impl Shape {
    fn new(device: &CudaDevice, op: &'static str, shape: &AttentionShape) -> Result<Shape> {
        let AttentionShape { queries, keys, heads, key_heads, head_dim, causal, scale, .. } = *shape;
        check::argument(op, head_dim <= WIDEST_HEAD, || {
            format!("heads of {head_dim} are too wide; {WIDEST_HEAD} is the most")
        })?;
        Ok(Shape {
            queries: device.small(op, "queries", queries)?,
            keys: device.small(op, "keys", keys)?,
            heads: device.small(op, "heads", heads)?,
            key_heads: device.small(op, "key heads", key_heads)?,
            head_dim: head_dim as i32,
            causal: i32::from(causal),
            scale,
        })
    }
}

/// A block for each query of each head of each sequence.
fn grid(shape: &AttentionShape) -> Grid {
    let blocks = [shape.queries, shape.heads, shape.batch];
    Grid { shared: shape.head_dim * size_of::<f32>(), ..Grid::blocks(blocks, 128) }
}

/// Elements of an attention's keys that become bytes, and how many scales they have.
pub(crate) fn rounded_keys(shape: &AttentionShape) -> Option<[usize; 2]> {
    let scales = shape.batch.checked_mul(shape.keys)?.checked_mul(shape.key_heads)?;
    Some([scales.checked_mul(shape.head_dim)?, scales])
}

/// How wide cuda/flash.cu computes a head.
pub(crate) fn flash_width(head_dim: usize, in_cache: bool) -> usize {
    match head_dim {
        0..=NARROW => NARROW,
        0..=MIDDLE if !in_cache => MIDDLE,
        _ => WIDEST,
    }
}

/// The grid of cuda/flash.cu for this shape, where its kernels do this.
fn flash_grid(device: &CudaDevice, shape: &AttentionShape) -> Option<Grid> {
    const QUERIES: usize = 64;
    let tensor_cores = device.inner.gpu.capability.0 >= 8;
    let fits = !device.exact && tensor_cores && shape.queries > 1 && shape.head_dim <= WIDEST;
    let blocks = [shape.queries.div_ceil(QUERIES), shape.heads, shape.batch];
    fits.then(|| Grid::blocks(blocks, 128))
}

const OP: &str = "attention";

/// Attention over buffers whose sizes were checked.
pub(super) fn attention(
    device: &CudaDevice,
    [q, k, v]: [&CudaBuffer; 3],
    shape: AttentionShape,
    out: &mut CudaBuffer,
) -> Result<()> {
    let width = shape.key_heads * shape.head_dim;
    let (heads, keys) = (shape.head_dim as i64, width as i64);
    let strides = Strides { batches: (shape.keys * width) as i64, heads, keys };
    let width = shape.head_dim;
    let [q, k, v, out] = [&q.data, &k.data, &v.data, &out.data].map(|slice| address(slice, 0));
    match (flash_grid(device, &shape), shape.rounding) {
        (Some(grid), Rounding::Bytes) => {
            let _sequence = device.sequence();
            let [codes, scales] = round_keys(device, k, &shape)?;
            let shape = Shape::new(device, OP, &shape)?;
            match flash_width(width, false) {
                NARROW => run!(device, OP, flash_keys_i8_64, grid, q, codes, v, scales, shape, strides, out),
                MIDDLE => run!(device, OP, flash_keys_i8_96, grid, q, codes, v, scales, shape, strides, out),
                _ => run!(device, OP, flash_keys_i8_128, grid, q, codes, v, scales, shape, strides, out),
            }
        }
        (Some(grid), Rounding::Halves) => {
            let shape = Shape::new(device, OP, &shape)?;
            match flash_width(width, false) {
                NARROW => run!(device, OP, flash_f32_64, grid, q, k, v, shape, strides, out),
                MIDDLE => run!(device, OP, flash_f32_96, grid, q, k, v, shape, strides, out),
                _ => run!(device, OP, flash_f32_128, grid, q, k, v, shape, strides, out),
            }
        }
        _ => {
            let (grid, shape) = (grid(&shape), Shape::new(device, OP, &shape)?);
            run!(device, OP, attention_f32, grid, q, k, v, shape, strides, out)
        }
    }
}

/// Addresses of the keys as bytes, and of their scales.
fn round_keys(device: &CudaDevice, k: u64, shape: &AttentionShape) -> Result<[u64; 2]> {
    let [codes, scales] = match rounded_keys(shape) {
        Some([elements, count]) => scratch(device, Some(elements), Some(count))?,
        None => return Err(DeviceError::OutOfMemory { bytes: usize::MAX }),
    };
    let grid = Grid::blocks([shape.key_heads, shape.batch, 1], 256);
    let Shape { keys, key_heads, head_dim, .. } = Shape::new(device, OP, shape)?;
    run!(device, OP, round_keys, grid, k, keys, key_heads, head_dim, codes, scales)?;
    Ok([codes, scales])
}

/// Attention to a cache that holds what the shape says.
pub(super) fn cache_attention(
    device: &CudaDevice,
    q: &CudaBuffer,
    cache: &CudaCache,
    shape: AttentionShape,
    out: &mut CudaBuffer,
) -> Result<()> {
    const OP: &str = "cache_attention";
    let AttentionShape { queries, heads, key_heads, head_dim, .. } = shape;
    if queries == 1 && is_decoded(heads / key_heads, head_dim) && !device.exact && cache.kind != CacheType::F32 {
        return decode(device, q, cache, shape, out);
    }
    let strides = Strides { batches: 0, heads: (cache.capacity * head_dim) as i64, keys: head_dim as i64 };
    let flash = flash_grid(device, &shape).filter(|_| cache.kind != CacheType::F32);
    let (narrow, plain, shape) = (head_dim <= NARROW, grid(&shape), Shape::new(device, OP, &shape)?);
    let (q, out, [k, v]) = (address(&q.data, 0), address(&out.data, 0), cache.elements());
    let [k_scales, v_scales] = cache.scales();
    if let Some(grid) = flash {
        return match (cache.kind, narrow) {
            (CacheType::I8, true) => {
                run!(device, OP, flash_i8_64, grid, q, k, v, k_scales, v_scales, shape, strides, out)
            }
            (CacheType::I8, false) => {
                run!(device, OP, flash_i8_128, grid, q, k, v, k_scales, v_scales, shape, strides, out)
            }
            (_, true) => run!(device, OP, flash_f16_64, grid, q, k, v, shape, strides, out),
            (_, false) => run!(device, OP, flash_f16_128, grid, q, k, v, shape, strides, out),
        };
    }
    let grid = plain;
    match cache.kind {
        CacheType::F32 => run!(device, OP, attention_f32, grid, q, k, v, shape, strides, out),
        CacheType::F16 => run!(device, OP, attention_f16, grid, q, k, v, shape, strides, out),
        CacheType::I8 => {
            run!(device, OP, attention_i8, grid, q, k, v, k_scales, v_scales, shape, strides, out)
        }
    }
}

/// Whether cuda/decode.cuh has room for a group of heads of a width.
pub(super) fn is_decoded(group: usize, head_dim: usize) -> bool {
    group <= GROUP && head_dim <= WIDEST && head_dim.is_multiple_of(4)
}

/// Addresses of what blocks leave for the last of them, for heads that attend to a cache, and of counters.
pub(super) fn parts(device: &CudaDevice, cache: &CudaCache, heads: usize) -> Result<[u64; 2]> {
    let mut parts = device.inner.parts.lock().unwrap_or_else(PoisonError::into_inner);
    let Parts { partial, counters } = &mut *parts;
    // As large as a full cache needs, so that it does not grow with every position.
    let most = cache.capacity.div_ceil(CHUNK);
    let partial = address(grown(device, partial, Some(most * heads * (cache.head_dim + 2)))?, 0);
    Ok([partial, address(grown(device, counters, Some(cache.key_heads))?, 0)])
}

/// One query: every key and value is read once.
fn decode(
    device: &CudaDevice,
    q: &CudaBuffer,
    cache: &CudaCache,
    shape: AttentionShape,
    out: &mut CudaBuffer,
) -> Result<()> {
    const OP: &str = "cache_attention";
    let AttentionShape { keys, heads, key_heads, head_dim, scale, .. } = shape;
    let chunks = keys.div_ceil(CHUNK);
    let [partial, counters] = parts(device, cache, heads)?;
    let shape = Decode {
        keys: device.small(OP, "keys", keys)?,
        group: device.small(OP, "heads", heads / key_heads)?,
        head_dim: head_dim as i32,
        head_stride: (cache.capacity * head_dim) as i64,
        scale,
        gap: 0,
        end: 0,
    };
    let grid = Grid::blocks([chunks, key_heads, 1], CHUNK as u32);
    let (q, out, [k, v]) = (address(&q.data, 0), address(&out.data, 0), cache.elements());
    match cache.kind {
        CacheType::I8 => {
            let [k_scales, v_scales] = cache.scales();
            run!(device, OP, decode_i8, grid, q, k, v, k_scales, v_scales, shape, partial, counters, out)
        }
        _ => run!(device, OP, decode_f16, grid, q, k, v, shape, partial, counters, out),
    }
}
