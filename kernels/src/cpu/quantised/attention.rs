//! Attention over keys that are bytes: q·k is summed in integers, and the keys' scales go onto the scores. The weights,
//! the scales of the values folded in, then multiply values that are bytes or f32.
//!
//! Keys lie in panels: for each [`KEYS`] of them, four bytes of each key, then the next four. A panel is read once for all
//! query heads that share it.
#![allow(clippy::needless_range_loop)] // several register tiles run by one index

use crate::cpu::norm::softmax_in_place;
use crate::cpu::pool::{SharedSlice, ThreadPool};
use crate::cpu::simd::integer::{Integer, IntegerOperation, lanes};
use crate::cpu::simd::{Level, Operation, Simd};
use crate::cpu::stored::Stored;
use crate::device::AttentionShape;
use std::cell::Cell;

/// Keys of a panel.
pub(crate) const KEYS: usize = 16;
/// Rows (queries of heads) that go over the keys together.
const ROWS: usize = 8;
/// Bytes of the widest vector.
const WIDEST: usize = 64;
/// The widest head whose keys are made bytes.
pub(crate) const WIDEST_HEAD: usize = 256;

/// Four bytes of a key that are multiplied at once: as many of them as a head has.
pub(crate) fn units(head_dim: usize) -> usize {
    head_dim.div_ceil(4)
}

/// Bytes of the panels of `keys` keys.
pub(crate) fn panel_bytes(keys: usize, head_dim: usize) -> usize {
    keys.div_ceil(KEYS) * KEYS * units(head_dim) * 4
}

/// Rounds `values`, at most [`WIDEST_HEAD`] of them, to signed bytes: `codes[i] = values[i] / scale`. The result is the
/// scale; whatever is no number makes it none.
#[inline(always)]
pub(crate) fn round_to_bytes(values: &[f32], codes: &mut [i8]) -> f32 {
    // Bits, as those of magnitudes are in the order of the numbers, and loops over integers become vectors.
    let largest = values.iter().fold(0, |largest: u32, value| largest.max(value.to_bits() & 0x7fff_ffff));
    let largest = f32::from_bits(largest);
    if !largest.is_finite() {
        codes.fill(0);
        return f32::NAN;
    }
    let factor = if largest > 1e-30 { 127.0 / largest } else { 0.0 };
    for (code, value) in codes.iter_mut().zip(values) {
        // See `activations`: the lowest byte of the sum is the integer's.
        *code = (value * factor + 12_582_912.0).to_bits() as i8;
    }
    largest / 127.0
}

/// Puts key `at` of a head into its panels; the result is its scale.
#[inline(always)]
pub(crate) fn put_key(panels: &mut [u8], at: usize, key: &[f32], mean: &[f32]) -> f32 {
    let (mut centred, mut codes) = ([0.0f32; WIDEST_HEAD], [0i8; WIDEST_HEAD]);
    let centred = &mut centred[..key.len()];
    for ((centred, key), mean) in centred.iter_mut().zip(key).zip(mean) {
        *centred = key - mean;
    }
    let scale = round_to_bytes(centred, &mut codes);
    let panel = &mut panels[at / KEYS * KEYS * units(key.len()) * 4..];
    for (unit, codes) in panel.chunks_exact_mut(4 * KEYS).zip(codes.as_chunks::<4>().0).take(units(key.len())) {
        unit[at % KEYS * 4..][..4].copy_from_slice(&codes.map(|code| code as u8));
    }
    scale
}

/// Values of one head: `value(j) = elements[j · stride ..]`, times `scales[j]` where there are scales.
#[derive(Clone, Copy)]
pub(crate) struct HeadValues<'a, T> {
    pub(crate) elements: &'a [T],
    pub(crate) stride: usize,
    pub(crate) scales: Option<&'a [f32]>,
}

/// Rows `rows` of the queries of one key head. Row `r` is head `r mod group` of query `r / group`.
pub(crate) struct HeadRows<'a, T> {
    pub(crate) level: Level,
    pub(crate) shape: AttentionShape,
    pub(crate) rows: std::ops::Range<usize>,
    /// Queries `[queries, heads · head_dim]`, from the key head's first head on.
    pub(crate) q: &'a [f32],
    pub(crate) panels: &'a [u8],
    /// One a key, up to the end of the last panel.
    pub(crate) key_scales: &'a [f32],
    pub(crate) values: HeadValues<'a, T>,
    pub(crate) out: &'a SharedSlice<'a, f32>,
    /// Where in `out` the first head's first query goes; rows lie as in q.
    pub(crate) out_start: usize,
}

/// What an attention reads, as [`crate::cpu::attention::Inputs`] without a cache.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(crate) q: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    pub(crate) shape: AttentionShape,
}

/// Attention over buffers of just the sizes of the shape, none of them empty; the keys become bytes here, and the values of a
/// head are brought together.
pub(crate) fn attention(level: Level, pool: &ThreadPool, inputs: Inputs<'_>, out: &mut [f32]) {
    let Inputs { q, k, v, shape } = inputs;
    let AttentionShape { batch, queries, keys, heads, key_heads, head_dim, .. } = shape;
    let group = heads / key_heads;
    let (width, rows) = (key_heads * head_dim, queries * group);
    // Every task makes bytes of the keys of a head: more tasks than threads only where there are few heads.
    let wanted = (2 * pool.threads()).div_ceil(batch * key_heads);
    let rows_a_task = rows.div_ceil(wanted).next_multiple_of(ROWS);
    let tasks = rows.div_ceil(rows_a_task);
    let shared = SharedSlice::new(out);
    pool.run(batch * key_heads * tasks, |task| {
        let (sequence, head, first) = (task / tasks / key_heads, task / tasks % key_heads, task % tasks * rows_a_task);
        let from = sequence * keys * width + head * head_dim;
        let q_from = sequence * queries * heads * head_dim + head * group * head_dim;
        let (mut panels, mut scales, mut values) = (PANELS.take(), KEY_SCALES.take(), VALUES.take());
        panels.resize(panel_bytes(keys, head_dim), 0);
        scales.resize(keys.next_multiple_of(KEYS), 0.0);
        values.clear();
        for value in v[from..].chunks(width).take(keys) {
            values.extend_from_slice(&value[..head_dim]);
        }
        level.run(CentredKeys {
            keys: &k[from..],
            stride: width,
            count: keys,
            head_dim,
            panels: &mut panels,
            scales: &mut scales,
        });
        level.run_integer(HeadRows {
            level,
            shape,
            rows: first..rows.min(first + rows_a_task),
            q: &q[q_from..],
            panels: &panels,
            key_scales: &scales,
            values: HeadValues { elements: &values, stride: head_dim, scales: None },
            out: &shared,
            out_start: q_from,
        });
        PANELS.set(panels);
        KEY_SCALES.set(scales);
        VALUES.set(values);
    });
}

/// Keys of a head as bytes, their mean taken out.
struct CentredKeys<'a> {
    keys: &'a [f32],
    stride: usize,
    count: usize,
    head_dim: usize,
    panels: &'a mut [u8],
    scales: &'a mut [f32],
}

impl Operation for CentredKeys<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let mut mean = [0.0f32; WIDEST_HEAD];
        let mean = &mut mean[..self.head_dim];
        let part = 1.0 / self.count as f32;
        for key in self.keys.chunks(self.stride).take(self.count) {
            mean.iter_mut().zip(key).for_each(|(mean, key)| *mean += key * part);
        }
        for (at, key) in self.keys.chunks(self.stride).take(self.count).enumerate() {
            self.scales[at] = put_key(self.panels, at, &key[..self.head_dim], mean);
        }
    }
}

thread_local! {
    /// Keys of a head as bytes, and their scales.
    static PANELS: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    static KEY_SCALES: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// Values of a head, one behind the other.
    static VALUES: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// Scores of a few rows.
    static SCORES: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// Bytes of a few queries.
    static QUERIES: Cell<Vec<i8>> = const { Cell::new(Vec::new()) };
}

impl<T: Stored> IntegerOperation for HeadRows<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<I: Integer>(self, set: I) {
        let AttentionShape { heads, key_heads, head_dim, .. } = self.shape;
        let group = heads / key_heads;
        let mut scores = SCORES.take();
        let mut queries = QUERIES.take();
        queries.resize(ROWS * units(head_dim) * 4, 0);
        for first in self.rows.clone().step_by(ROWS) {
            let count = ROWS.min(self.rows.end - first);
            let place = |row: usize| (row / group * heads + row % group) * head_dim;
            // Keys that the last of the rows sees, and room for them in whole panels.
            let keys = self.visible((first + count - 1) / group);
            let room = keys.next_multiple_of(KEYS);
            scores.resize(ROWS * room, 0.0);
            let mut factors = [0.0; ROWS];
            let mut starts = [0; ROWS];
            for (r, codes) in queries.chunks_exact_mut(units(head_dim) * 4).enumerate() {
                // The last row again in the place of rows that are missing.
                let q = &self.q[place(first + r.min(count - 1))..][..head_dim];
                let scale = round_to_bytes(q, codes);
                factors[r] = scale * self.shape.scale;
                starts[r] = -I::OFFSET8 * codes.iter().map(|&code| i32::from(code)).sum::<i32>();
            }
            let panels = &self.panels[..panel_bytes(keys, head_dim)];
            if lanes::<I>() == KEYS {
                self.scores::<I, 2, 1>(set, panels, &queries, factors, starts, &mut scores, room);
            } else {
                self.scores::<I, 1, 2>(set, panels, &queries, factors, starts, &mut scores, room);
            }
            for (r, row) in scores.chunks_exact_mut(room).enumerate().take(count) {
                let seen = self.visible((first + r) / group);
                // Whole vectors; what is not seen gets no weight.
                row[seen..].fill(f32::NEG_INFINITY);
                softmax_in_place(self.level, row, 1.0);
                if let Some(scales) = self.values.scales {
                    row[..seen].iter_mut().zip(scales).for_each(|(weight, scale)| *weight *= scale);
                }
            }
            let mut r = 0;
            while r + 4 <= count {
                self.mix::<I, 4>(set, &scores[r * room..], room, keys, std::array::from_fn(|i| place(first + r + i)));
                r += 4;
            }
            while r < count {
                self.mix::<I, 1>(set, &scores[r * room..], room, keys, [place(first + r)]);
                r += 1;
            }
        }
        SCORES.set(scores);
        QUERIES.set(queries);
    }
}

impl<T: Stored> HeadRows<'_, T> {
    /// Keys that a query sees.
    #[inline(always)]
    fn visible(&self, query: usize) -> usize {
        if self.shape.causal { self.shape.keys - self.shape.queries + query + 1 } else { self.shape.keys }
    }

    /// Scores of [`ROWS`] rows, `P` panels at a time, each of them `H` vectors wide.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // the operands of a product and where it goes
    fn scores<I: Integer, const P: usize, const H: usize>(
        &self,
        set: I,
        panels: &[u8],
        queries: &[i8],
        factors: [f32; ROWS],
        starts: [i32; ROWS],
        scores: &mut [f32],
        room: usize,
    ) {
        let panel = panel_bytes(KEYS, self.shape.head_dim);
        let mut done = 0;
        let count = panels.len() / panel;
        while done < count {
            let panels = &panels[done * panel..];
            if P == 2 && done + 2 <= count {
                let both = [&panels[..panel], &panels[panel..2 * panel]];
                self.some_panels::<I, 2>(set, both, [0, 0], queries, factors, starts, scores, room, done * KEYS);
                done += 2;
            } else if H == 2 {
                let both = [&panels[..panel], &panels[..panel]];
                self.some_panels::<I, 2>(
                    set,
                    both,
                    [0, WIDEST / 2],
                    queries,
                    factors,
                    starts,
                    scores,
                    room,
                    done * KEYS,
                );
                done += 1;
            } else {
                self.some_panels::<I, 1>(
                    set,
                    [&panels[..panel]],
                    [0],
                    queries,
                    factors,
                    starts,
                    scores,
                    room,
                    done * KEYS,
                );
                done += 1;
            }
        }
    }

    /// Scores of [`ROWS`] rows with the keys of `V` vectors, the first of which is key `first`.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // as above
    fn some_panels<I: Integer, const V: usize>(
        &self,
        set: I,
        panels: [&[u8]; V],
        offsets: [usize; V],
        queries: &[i8],
        factors: [f32; ROWS],
        starts: [i32; ROWS],
        scores: &mut [f32],
        room: usize,
        first: usize,
    ) {
        let simd = set.float();
        let units = units(self.shape.head_dim);
        let queries = queries.as_chunks::<4>().0;
        let mut sums = [[set.splat_sum(0); V]; ROWS];
        for r in 0..ROWS {
            sums[r] = [set.splat_sum(starts[r]); V];
        }
        for u in 0..units {
            let mut keys = [set.splat_bytes(&[0; 4]); V];
            for v in 0..V {
                keys[v] = set.codes8(&panels[v][u * WIDEST + offsets[v]..]);
            }
            for r in 0..ROWS {
                let query = set.splat_bytes(&queries[r * units + u]);
                for v in 0..V {
                    sums[r][v] = set.dot8(sums[r][v], keys[v], query);
                }
            }
        }
        for v in 0..V {
            let at = first + v * lanes::<I>();
            let scale = simd.load(&self.key_scales[at..]);
            for r in 0..ROWS {
                let score = simd.mul(simd.mul(set.to_float(sums[r][v]), scale), simd.splat(factors[r]));
                simd.store(score, &mut scores[r * room + at..]);
            }
        }
    }

    /// `out = Σ weights[j] · value(j)` of `R` rows, whose outputs start at `places`.
    #[inline(always)]
    fn mix<I: Integer, const R: usize>(&self, set: I, weights: &[f32], room: usize, keys: usize, places: [usize; R]) {
        let head_dim = self.shape.head_dim;
        let mut at = 0;
        // As many vectors of sums as there are registers for.
        while at < head_dim {
            let left = head_dim - at;
            if lanes::<I>() == 16 && left >= 64 {
                self.mix_vectors::<I, R, 4>(set, weights, room, keys, places, at);
                at += 64;
            } else if left >= 2 * lanes::<I>() {
                self.mix_vectors::<I, R, 2>(set, weights, room, keys, places, at);
                at += 2 * lanes::<I>();
            } else if left >= lanes::<I>() {
                self.mix_vectors::<I, R, 1>(set, weights, room, keys, places, at);
                at += lanes::<I>();
            } else {
                self.mix_rest::<I, R>(set, weights, room, keys, places, at);
                at = head_dim;
            }
        }
    }

    #[inline(always)]
    fn mix_vectors<I: Integer, const R: usize, const V: usize>(
        &self,
        set: I,
        weights: &[f32],
        room: usize,
        keys: usize,
        places: [usize; R],
        at: usize,
    ) {
        let simd = set.float();
        let mut sums = [[simd.splat(0.0); V]; R];
        let mut of_rows: [&[f32]; R] = [&[]; R];
        for r in 0..R {
            of_rows[r] = &weights[r * room..][..keys];
        }
        for (key, value) in self.values.elements[at..].chunks(self.values.stride).take(keys).enumerate() {
            let value = &value[..V * lanes::<I>()];
            let mut columns = [simd.splat(0.0); V];
            for v in 0..V {
                columns[v] = T::load(simd, &value[v * lanes::<I>()..]);
            }
            for r in 0..R {
                let weight = simd.splat(of_rows[r][key]);
                for v in 0..V {
                    sums[r][v] = simd.mul_add(weight, columns[v], sums[r][v]);
                }
            }
        }
        for r in 0..R {
            // SAFETY: each task has rows of its own.
            let out = unsafe { self.out.range(self.out_start + places[r] + at, V * lanes::<I>()) };
            for v in 0..V {
                simd.store(sums[r][v], &mut out[v * lanes::<I>()..]);
            }
        }
    }

    /// The last few elements of a head whose width is no multiple of a vector's.
    #[inline(always)]
    fn mix_rest<I: Integer, const R: usize>(
        &self,
        set: I,
        weights: &[f32],
        room: usize,
        keys: usize,
        places: [usize; R],
        at: usize,
    ) {
        let simd = set.float();
        let count = self.shape.head_dim - at;
        let mut sums = [simd.splat(0.0); R];
        for key in 0..keys {
            let value = &self.values.elements[key * self.values.stride + at..][..count];
            let value = T::load_part(simd, value);
            for r in 0..R {
                sums[r] = simd.mul_add(simd.splat(weights[r * room + key]), value, sums[r]);
            }
        }
        for r in 0..R {
            // SAFETY: each task has rows of its own.
            let out = unsafe { self.out.range(self.out_start + places[r] + at, count) };
            simd.store_part(sums[r], out);
        }
    }
}
