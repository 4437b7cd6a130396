//! The key-value cache of one layer: as f32, as f16, or as bytes with one scale a head and position.

use crate::cpu::attention::{self, Inputs, Strides};
use crate::cpu::gemm::with_panels;
use crate::cpu::pool::{SharedSlice, ThreadPool};
use crate::cpu::quantised::attention::{HeadRows, HeadValues, KEYS, panel_bytes, put_key, round_to_bytes};
use crate::cpu::simd::Level;
use crate::cpu::zeros;
use crate::device::{AttentionShape, CacheType, DeviceError, Result};
use half::f16;
use std::cell::Cell;

/// Keys whose mean stands for that of all: what follows must not change it, and does not much.
const MEAN_OF: usize = 16;
/// Rows (queries of heads) of a task over bytes.
const TASK_ROWS: usize = 64;

/// Keys and values of one layer. Each part lies head by head: `[key heads, capacity, head_dim]`, keys as bytes in panels.
#[derive(Debug)]
pub struct CpuCache {
    capacity: usize,
    key_heads: usize,
    head_dim: usize,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    F32 { keys: Vec<f32>, values: Vec<f32> },
    F16 { keys: Vec<u16>, values: Vec<u16> },
    I8(Bytes),
}

#[derive(Debug)]
struct Bytes {
    /// What is taken off every key, `[key heads, head_dim]`: scores of a query change by a constant, which softmax does
    /// not see, and large means no longer take up the bytes' range.
    mean: Vec<f32>,
    keys: Vec<u8>,
    key_scales: Vec<f32>,
    values: Vec<i8>,
    value_scales: Vec<f32>,
}

thread_local! {
    /// Keys and values of a layer as f32.
    static WIDE: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

impl CpuCache {
    /// Positions in whole panels, so that one may be read to its end; an error where sizes overflow.
    fn room(capacity: usize, key_heads: usize, head_dim: usize) -> Result<usize> {
        let room = capacity.checked_next_multiple_of(KEYS).filter(|&capacity| {
            let elements = capacity.checked_mul(key_heads).and_then(|n| n.checked_mul(head_dim.next_multiple_of(4)));
            elements.is_some_and(|n| n.checked_mul(8).is_some())
        });
        room.ok_or(DeviceError::OutOfMemory { bytes: usize::MAX })
    }

    /// Bytes that a cache of these sizes takes.
    pub(crate) fn bytes(kind: CacheType, capacity: usize, key_heads: usize, head_dim: usize) -> Result<usize> {
        let capacity = Self::room(capacity, key_heads, head_dim)?;
        let elements = key_heads * capacity * head_dim;
        Ok(match kind {
            CacheType::F32 => 2 * size_of::<f32>() * elements,
            CacheType::F16 => 2 * size_of::<u16>() * elements,
            CacheType::I8 => {
                let floats = key_heads * head_dim + 2 * key_heads * capacity;
                floats * size_of::<f32>() + key_heads * panel_bytes(capacity, head_dim) + elements
            }
        })
    }

    pub(crate) fn new(kind: CacheType, capacity: usize, key_heads: usize, head_dim: usize) -> Result<Self> {
        let capacity = Self::room(capacity, key_heads, head_dim)?;
        let (elements, scales) = (key_heads * capacity * head_dim, key_heads * capacity);
        let kind = match kind {
            CacheType::F32 => Kind::F32 { keys: zeros(elements)?, values: zeros(elements)? },
            CacheType::F16 => Kind::F16 { keys: zeros(elements)?, values: zeros(elements)? },
            CacheType::I8 => Kind::I8(Bytes {
                mean: zeros(key_heads * head_dim)?,
                keys: zeros(key_heads * panel_bytes(capacity, head_dim))?,
                key_scales: zeros(scales)?,
                values: zeros(elements)?,
                value_scales: zeros(scales)?,
            }),
        };
        Ok(CpuCache { capacity, key_heads, head_dim, kind })
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes that it takes.
    #[cfg(test)]
    pub(crate) fn held(&self) -> usize {
        match &self.kind {
            Kind::F32 { keys, values } => size_of_val(&keys[..]) + size_of_val(&values[..]),
            Kind::F16 { keys, values } => size_of_val(&keys[..]) + size_of_val(&values[..]),
            Kind::I8(Bytes { mean, keys, key_scales, values, value_scales }) => {
                let floats = mean.len() + key_scales.len() + value_scales.len();
                floats * size_of::<f32>() + keys.len() + values.len()
            }
        }
    }

    pub(crate) fn is_of(&self, key_heads: usize, head_dim: usize) -> bool {
        (self.key_heads, self.head_dim) == (key_heads, head_dim)
    }

    /// Elements of a row of keys.
    pub(crate) fn width(&self) -> usize {
        self.key_heads * self.head_dim
    }

    /// Keys and values `[rows, key heads · head_dim]` for positions `first ..`, which lie in the capacity.
    pub(crate) fn write(&mut self, k: &[f32], v: &[f32], rows: usize, first: usize) {
        let &mut CpuCache { capacity, key_heads, head_dim, .. } = self;
        let width = key_heads * head_dim;
        if let Kind::I8(Bytes { mean, .. }) = &mut self.kind
            && first == 0
        {
            let count = rows.min(MEAN_OF);
            mean.fill(0.0);
            for k in k.chunks_exact(width.max(1)).take(count) {
                mean.iter_mut().zip(k).for_each(|(mean, k)| *mean += k / count as f32);
            }
        }
        for row in 0..rows {
            for head in 0..key_heads {
                let from = row * width + head * head_dim;
                let (k, v) = (&k[from..from + head_dim], &v[from..from + head_dim]);
                let at = head * capacity + first + row;
                let place = at * head_dim..(at + 1) * head_dim;
                match &mut self.kind {
                    Kind::F32 { keys, values } => {
                        keys[place.clone()].copy_from_slice(k);
                        values[place].copy_from_slice(v);
                    }
                    Kind::F16 { keys, values } => {
                        let store = |to: &mut [u16], from: &[f32]| {
                            to.iter_mut().zip(from).for_each(|(to, &from)| *to = f16::from_f32(from).to_bits());
                        };
                        store(&mut keys[place.clone()], k);
                        store(&mut values[place], v);
                    }
                    Kind::I8(bytes) => {
                        let a_head = panel_bytes(capacity, head_dim);
                        let panels = &mut bytes.keys[head * a_head..(head + 1) * a_head];
                        let mean = &bytes.mean[head * head_dim..(head + 1) * head_dim];
                        bytes.key_scales[at] = put_key(panels, first + row, k, mean);
                        bytes.value_scales[at] = round_to_bytes(v, &mut bytes.values[place]);
                    }
                }
            }
        }
    }

    /// Takes the first `positions` positions of another cache of the same kind and sizes but for the capacity; false if it
    /// is of others.
    pub(crate) fn copy_from(&mut self, from: &CpuCache, positions: usize) -> bool {
        if (self.key_heads, self.head_dim) != (from.key_heads, from.head_dim)
            || positions > self.capacity.min(from.capacity)
        {
            return false;
        }
        let heads = self.key_heads;
        let rows = positions * self.head_dim;
        match (&mut self.kind, &from.kind) {
            (Kind::F32 { keys, values }, Kind::F32 { keys: k, values: v }) => {
                copy_heads(k, keys, heads, rows);
                copy_heads(v, values, heads, rows);
            }
            (Kind::F16 { keys, values }, Kind::F16 { keys: k, values: v }) => {
                copy_heads(k, keys, heads, rows);
                copy_heads(v, values, heads, rows);
            }
            (Kind::I8(to), Kind::I8(from)) => {
                to.mean.copy_from_slice(&from.mean);
                copy_heads(&from.keys, &mut to.keys, heads, panel_bytes(positions, self.head_dim));
                copy_heads(&from.key_scales, &mut to.key_scales, heads, positions);
                copy_heads(&from.values, &mut to.values, heads, rows);
                copy_heads(&from.value_scales, &mut to.value_scales, heads, positions);
            }
            _ => return false,
        }
        true
    }

    /// Attention of q `[queries, heads · head_dim]` to the first `shape.keys` positions, out as q.
    pub(crate) fn attention(
        &self,
        level: Level,
        pool: &ThreadPool,
        serial: &ThreadPool,
        q: &[f32],
        shape: AttentionShape,
        out: &mut [f32],
    ) -> Result<()> {
        let &CpuCache { capacity, key_heads, head_dim, .. } = self;
        let strides = Strides { key: head_dim, head: capacity * head_dim };
        match &self.kind {
            Kind::F32 { keys, values } => {
                attention::attention(level, pool, serial, Inputs { q, k: keys, v: values, strides, shape }, out)
            }
            Kind::F16 { keys, values } => {
                let rows = shape.keys * head_dim;
                let strides = Strides { key: head_dim, head: rows };
                with_panels(&WIDE, 2 * key_heads * rows, |wide| {
                    let (k, v) = wide.split_at_mut(key_heads * rows);
                    for (from, to) in [(keys, &mut *k), (values, &mut *v)] {
                        pool.run_chunks(to, rows, |head, to| {
                            attention::widen_f16(level, &from[head * capacity * head_dim..][..rows], to);
                        });
                    }
                    attention::attention(level, pool, serial, Inputs { q, k, v, strides, shape }, out)
                })
            }
            Kind::I8(bytes) => {
                let group = shape.heads / key_heads;
                let rows = shape.queries * group;
                let tasks = rows.div_ceil(TASK_ROWS);
                let shared = SharedSlice::new(out);
                pool.run(key_heads * tasks, |task| {
                    let (head, first) = (task / tasks, task % tasks * TASK_ROWS);
                    let of_head = head * capacity..(head + 1) * capacity;
                    let a_head = panel_bytes(capacity, head_dim);
                    level.run_integer(HeadRows {
                        level,
                        shape,
                        rows: first..rows.min(first + TASK_ROWS),
                        q: &q[head * group * head_dim..],
                        panels: &bytes.keys[head * a_head..(head + 1) * a_head],
                        key_scales: &bytes.key_scales[of_head.clone()],
                        values: HeadValues {
                            elements: &bytes.values[of_head.start * head_dim..of_head.end * head_dim],
                            stride: head_dim,
                            scales: Some(&bytes.value_scales[of_head]),
                        },
                        out: &shared,
                        out_start: head * group * head_dim,
                    });
                });
                Ok(())
            }
        }
    }
}

/// The first `count` elements of each head's part.
fn copy_heads<T: Copy>(from: &[T], to: &mut [T], heads: usize, count: usize) {
    if heads == 0 || from.is_empty() || to.is_empty() {
        return;
    }
    let (of_from, of_to) = (from.len() / heads, to.len() / heads);
    for (from, to) in from.chunks_exact(of_from).zip(to.chunks_exact_mut(of_to)) {
        to[..count].copy_from_slice(&from[..count]);
    }
}
