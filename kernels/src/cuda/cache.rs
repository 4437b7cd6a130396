//! Key-value caches on the GPU, `[key heads, capacity, head_dim]`.

use super::arena::Memory;
use super::{CudaDevice, address, zeros};
use crate::device::{CacheType, Result};

/// Keys and values of one layer.
#[derive(Debug)]
pub struct CudaCache {
    pub(super) capacity: usize,
    pub(super) key_heads: usize,
    pub(super) head_dim: usize,
    pub(super) kind: CacheType,
    keys: Memory<u8>,
    values: Memory<u8>,
    /// What is taken off every key, `[key heads, head_dim]`, and the scales of keys and values, `[key heads, capacity]`; for
    /// bytes.
    mean: Memory<u8>,
    key_scales: Memory<u8>,
    value_scales: Memory<u8>,
}

impl CudaCache {
    pub(super) fn new(
        device: &CudaDevice,
        kind: CacheType,
        capacity: usize,
        key_heads: usize,
        head_dim: usize,
    ) -> Result<Self> {
        let floats = |count: usize| if kind == CacheType::I8 { count.checked_mul(4) } else { Some(0) };
        let bytes = |count: Option<usize>| zeros(device, "cache", count);
        let heads = capacity.checked_mul(key_heads);
        let elements = heads.and_then(|n| n.checked_mul(head_dim)).and_then(|n| n.checked_mul(kind.element_bytes()));
        Ok(CudaCache {
            capacity,
            key_heads,
            head_dim,
            kind,
            keys: bytes(elements)?,
            values: bytes(elements)?,
            mean: bytes(key_heads.checked_mul(head_dim).and_then(floats))?,
            key_scales: bytes(heads.and_then(floats))?,
            value_scales: bytes(heads.and_then(floats))?,
        })
    }

    /// Bytes that such a cache takes.
    pub(crate) fn bytes(kind: CacheType, capacity: usize, key_heads: usize, head_dim: usize) -> usize {
        let mean = if kind == CacheType::I8 { key_heads * head_dim * size_of::<f32>() } else { 0 };
        capacity.saturating_mul(kind.position_bytes(key_heads, head_dim)).saturating_add(mean)
    }

    /// Elements of a row of keys.
    pub(super) fn width(&self) -> usize {
        self.key_heads * self.head_dim
    }

    /// Whether another one holds its elements in the same way.
    pub(super) fn is_like(&self, other: &CudaCache) -> bool {
        (self.kind, self.key_heads, self.head_dim) == (other.kind, other.key_heads, other.head_dim)
    }

    /// Addresses of keys and values.
    pub(super) fn elements(&self) -> [u64; 2] {
        [address(&self.keys, 0), address(&self.values, 0)]
    }

    /// Address of the mean.
    pub(super) fn mean(&self) -> u64 {
        address(&self.mean, 0)
    }

    /// Addresses of the scales of keys and values.
    pub(super) fn scales(&self) -> [u64; 2] {
        [address(&self.key_scales, 0), address(&self.value_scales, 0)]
    }

    /// The parts that a copy takes over: from, to, and bytes of a head and of a position in a head.
    pub(super) fn parts<'a>(&'a self, to: &'a mut CudaCache) -> [Part<'a>; 5] {
        let row = self.kind.element_bytes() * self.head_dim;
        let (scale, mean) = if self.kind == CacheType::I8 { (4, 4 * self.head_dim) } else { (0, 0) };
        [
            Part { from: &self.keys, to: &mut to.keys, position: row, whole: false },
            Part { from: &self.values, to: &mut to.values, position: row, whole: false },
            Part { from: &self.key_scales, to: &mut to.key_scales, position: scale, whole: false },
            Part { from: &self.value_scales, to: &mut to.value_scales, position: scale, whole: false },
            Part { from: &self.mean, to: &mut to.mean, position: mean, whole: true },
        ]
    }
}

/// A part of a cache that is copied.
pub(super) struct Part<'a> {
    pub(super) from: &'a Memory<u8>,
    pub(super) to: &'a mut Memory<u8>,
    /// Bytes of a position in a head.
    pub(super) position: usize,
    /// It has one position a head, whatever is copied.
    pub(super) whole: bool,
}
