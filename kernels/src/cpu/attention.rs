//! Softmax attention. Many queries are two products a block of queries with the scores between them in a core's
//! cache; few queries (a decoding step) are dot products over the cache of keys.

use crate::cpu::gemm::{MatrixRef, Precision, product_at, with_panels};
use crate::cpu::norm::softmax_in_place;
use crate::cpu::pool::{SharedSlice, ThreadPool};
use crate::cpu::simd::{Level, Operation, Simd};
use crate::device::{AttentionShape, Result};
use std::cell::Cell;
use std::sync::OnceLock;

/// Queries of one head a task handles: the scores of 96 · 1000 keys stay in level 2, and packing the keys costs little.
const QUERY_BLOCK: usize = 96;
/// Up to this many queries, packing keys and values costs more than the products.
const FEW_QUERIES: usize = 4;
/// Multiplications below which one thread does all of it.
const GRAIN: usize = 128 * 1024;

thread_local! {
    /// Scores of a task, and its output before it is spread to the heads' places.
    static SCORES: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// What an attention reads.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(crate) q: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    pub(crate) strides: Strides,
    pub(crate) shape: AttentionShape,
}

/// Elements between the keys (and values) of a head, and between the heads.
#[derive(Clone, Copy)]
pub(crate) struct Strides {
    pub(crate) key: usize,
    pub(crate) head: usize,
}

/// Halves as f32.
pub(crate) fn widen_f16(level: Level, from: &[u16], to: &mut [f32]) {
    struct Widen<'a>(&'a [u16], &'a mut [f32]);
    impl Operation for Widen<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            let whole = self.0.len() / S::LANES * S::LANES;
            for (from, to) in self.0.chunks_exact(S::LANES).zip(self.1.chunks_exact_mut(S::LANES)) {
                simd.store(simd.load_f16(from), to);
            }
            for (from, to) in self.0[whole..].iter().zip(&mut self.1[whole..]) {
                *to = half::f16::from_bits(*from).to_f32();
            }
        }
    }
    level.run(Widen(from, to));
}

/// Attention over buffers of just the sizes of the shape, none of them empty; with `causal` there are at least as many
/// keys as queries.
pub(crate) fn attention(
    level: Level,
    pool: &ThreadPool,
    serial: &ThreadPool,
    inputs: Inputs<'_>,
    out: &mut [f32],
) -> Result<()> {
    let Inputs { q, k, v, strides, shape } = inputs;
    let AttentionShape { batch, queries, keys, heads, key_heads, head_dim, .. } = shape;
    let blocks = queries.div_ceil(QUERY_BLOCK);
    let block = queries.div_ceil(blocks);
    let (q_width, k_width) = (heads * head_dim, strides.key);
    let shared = SharedSlice::new(out);
    let failed = OnceLock::new();
    let small = q.len().saturating_mul(keys) < GRAIN;
    let pool = if small { serial } else { pool };
    pool.run(batch * heads * blocks, |task| {
        let (sequence, head, first) = (task / blocks / heads, task / blocks % heads, task % blocks * block);
        let key_head = head / (heads / key_heads);
        let part = HeadPart {
            shape,
            q: &q[(sequence * queries * heads + head) * head_dim..],
            k: &k[sequence * keys * key_heads * head_dim + key_head * strides.head..],
            v: &v[sequence * keys * key_heads * head_dim + key_head * strides.head..],
            first,
            count: block.min(queries - first),
        };
        let out_start = (sequence * queries * heads + head) * head_dim;
        let write = |query: usize, values: &[f32]| {
            // SAFETY: each task has queries of a head of its own.
            unsafe { shared.range(out_start + query * q_width, head_dim) }.copy_from_slice(values);
        };
        if part.count <= FEW_QUERIES {
            part.few(level, q_width, k_width, write);
        } else if let Err(error) = part.many(level, serial, q_width, k_width, write) {
            failed.set(error).ok();
        }
    });
    failed.into_inner().map_or(Ok(()), Err)
}

/// A block of queries of one head; slices start at the head's first element.
struct HeadPart<'a> {
    shape: AttentionShape,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    first: usize,
    count: usize,
}

impl HeadPart<'_> {
    /// Keys that query `query` sees.
    fn visible(&self, query: usize) -> usize {
        if self.shape.causal { self.shape.keys - self.shape.queries + query + 1 } else { self.shape.keys }
    }

    /// Two blocked products; `write(query, output)` for each query.
    fn many(
        &self,
        level: Level,
        serial: &ThreadPool,
        q_width: usize,
        k_width: usize,
        write: impl Fn(usize, &[f32]),
    ) -> Result<()> {
        let head_dim = self.shape.head_dim;
        let keys = self.visible(self.first + self.count - 1);
        let q = MatrixRef::new(&self.q[self.first * q_width..], self.count, head_dim, q_width, 1)?;
        let k = MatrixRef::new(self.k, keys, head_dim, k_width, 1)?;
        let v = MatrixRef::new(self.v, keys, head_dim, k_width, 1)?;
        with_panels(&SCORES, self.count * (keys + head_dim), |scratch| {
            let (scores, outputs) = scratch.split_at_mut(self.count * keys);
            product_at(level, serial, q, k, scores, false, Precision::F32, |_, _| ());
            for (r, row) in scores.chunks_exact_mut(keys).enumerate() {
                let (seen, unseen) = row.split_at_mut(self.visible(self.first + r));
                softmax_in_place(level, seen, self.shape.scale);
                unseen.fill(0.0);
            }
            let weights = MatrixRef::row_major(scores, self.count, keys)?;
            product_at(level, serial, weights, v.transposed(), outputs, false, Precision::F32, |_, _| ());
            for (r, output) in outputs.chunks_exact(head_dim).enumerate() {
                write(self.first + r, output);
            }
            Ok(())
        })
    }

    /// Dot products; `write(query, output)` for each query.
    fn few(&self, level: Level, q_width: usize, k_width: usize, write: impl Fn(usize, &[f32])) {
        let head_dim = self.shape.head_dim;
        for query in self.first..self.first + self.count {
            let keys = self.visible(query);
            with_panels(&SCORES, keys + head_dim, |scratch| {
                let (scores, output) = scratch.split_at_mut(keys);
                let q = &self.q[query * q_width..][..head_dim];
                level.run(Scores { q, k: self.k, stride: k_width, scores });
                softmax_in_place(level, scores, self.shape.scale);
                output.fill(0.0);
                level.run(Mix { scores, v: self.v, stride: k_width, output });
                write(query, output);
            });
        }
    }
}

/// `scores[i] = q · k[i]`
struct Scores<'a> {
    q: &'a [f32],
    k: &'a [f32],
    stride: usize,
    scores: &'a mut [f32],
}

impl Operation for Scores<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let whole = self.q.len() / S::LANES * S::LANES;
        for (key, score) in self.scores.iter_mut().enumerate() {
            let k = &self.k[key * self.stride..][..self.q.len()];
            let mut sum = simd.splat(0.0);
            for (q, k) in self.q.chunks_exact(S::LANES).zip(k.chunks_exact(S::LANES)) {
                sum = simd.mul_add(simd.load(q), simd.load(k), sum);
            }
            let rest = self.q[whole..].iter().zip(&k[whole..]).map(|(q, k)| q * k).sum::<f32>();
            *score = simd.sum(sum) + rest;
        }
    }
}

/// `output += Σ scores[i] · v[i]`
struct Mix<'a> {
    scores: &'a [f32],
    v: &'a [f32],
    stride: usize,
    output: &'a mut [f32],
}

impl Operation for Mix<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        for (key, score) in self.scores.iter().enumerate() {
            let v = &self.v[key * self.stride..][..self.output.len()];
            self.output.iter_mut().zip(v).for_each(|(output, v)| *output += score * v);
        }
    }
}
