//! Few rows: every output is a dot product, and the weight is read once, as it is stored.
#![allow(clippy::needless_range_loop)] // several sums run by one index

use super::activations::{PARTS, Quantised};
use super::{BLOCK, Bits, Layer, layer_of};
use crate::cpu::pool::ThreadPool;
use crate::cpu::simd::integer::{Integer, IntegerOperation, OFFSET4, lanes};
use crate::cpu::simd::{Level, Simd, fetch_ahead};
use crate::cpu::stored::{F16, cast, widen_scales};
use crate::tensor::DType;
use std::cell::Cell;

/// Weights that a task reads at least: fewer are not worth waking a thread.
const GRAIN: usize = 64 * 1024;
/// Tasks a thread, so that none waits long for the last one.
const TASKS: usize = 4;
/// Rows of the weight that one pass over x handles.
const OUTPUTS: usize = 4;
/// Rows of the weight whose scales are widened at once, where they have to be; they stay in level 1.
const WIDENED: usize = 8 * OUTPUTS;
/// Scales that a block has at most.
const MOST_SCALES: usize = 4;

thread_local! {
    /// Scales of a few rows of the weight.
    static SCALES: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// What a sum of each lane starts from.
    static STARTS: Cell<Vec<i32>> = const { Cell::new(Vec::new()) };
}

pub(super) fn dots(level: Level, pool: &ThreadPool, x: &Quantised, layers: &[Layer<'_>]) {
    let threads = pool.threads();
    let share = |layer: &Layer<'_>| {
        let fewest = GRAIN / (x.rows * layer.codes.depth.max(1)).max(1);
        layer.codes.outputs.div_ceil(TASKS * threads).max(fewest).next_multiple_of(OUTPUTS)
    };
    let tasks = |layer: &Layer<'_>| layer.codes.outputs.div_ceil(share(layer));
    let mut starts = STARTS.take();
    level.run_integer(Starts { x, layers, starts: &mut starts });
    pool.run(layers.iter().map(tasks).sum(), |task| {
        let Some((layer, task)) = layer_of(layers, task, tasks) else { return };
        let first = task * share(layer);
        let count = share(layer).min(layer.codes.outputs - first);
        level.run_integer(Dots { level, x, layer, starts: &starts, first, count });
        layer.finish(level, 0..x.rows, first, count);
    });
    STARTS.set(starts);
}

/// What takes the codes' offset off again: for each part the whole of it, in the first of the part's lanes.
struct Starts<'a> {
    x: &'a Quantised,
    layers: &'a [Layer<'a>],
    starts: &'a mut Vec<i32>,
}

impl IntegerOperation for Starts<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Integer>(self, _: I) {
        let Some(bits) = self.layers.first().map(|layer| layer.codes.bits) else { return };
        let (offset, lanes) = match bits {
            Bits::Four => (OFFSET4, BLOCK / 8 / PARTS),
            Bits::Eight => (I::OFFSET8, BLOCK / 4 / PARTS),
        };
        let sums = self.x.sums_of_parts();
        self.starts.clear();
        self.starts.resize(sums.len() * lanes, 0);
        for (start, sum) in self.starts.chunks_exact_mut(lanes).zip(sums) {
            start[0] = -offset * sum;
        }
    }
}

struct Dots<'a> {
    level: Level,
    x: &'a Quantised,
    layer: &'a Layer<'a>,
    starts: &'a [i32],
    first: usize,
    count: usize,
}

impl IntegerOperation for Dots<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Integer>(self, set: I) {
        // Lanes that share a scale; none where a row has one scale.
        let each = self.layer.codes.scales.group().map_or(0, |group| match self.layer.codes.bits {
            Bits::Four => group / 8,
            Bits::Eight => group / 4,
        });
        match (self.layer.codes.bits, each) {
            (Bits::Four, 0) => self.all::<I, 4, 0>(set),
            (Bits::Four, 4) => self.all::<I, 4, 4>(set),
            (Bits::Four, 8) => self.all::<I, 4, 8>(set),
            (Bits::Four, _) => self.all::<I, 4, 16>(set),
            (Bits::Eight, 0) => self.all::<I, 8, 0>(set),
            (Bits::Eight, 8) => self.all::<I, 8, 8>(set),
            (Bits::Eight, 16) => self.all::<I, 8, 16>(set),
            (Bits::Eight, _) => self.all::<I, 8, 32>(set),
        }
    }
}

impl Dots<'_> {
    #[inline(always)]
    fn all<I: Integer, const BITS: usize, const EACH: usize>(&self, set: I) {
        // No closures here and below: they would not be compiled with the set's features.
        let per_row = self.layer.codes.scales.per_row();
        let Some((bytes, dtype)) = self.layer.codes.scales.of_groups() else {
            return self.range::<I, f32, BITS, EACH>(set, &[], 0, 0, self.count);
        };
        match dtype {
            DType::F16 => {
                let scales = &cast::<F16>(bytes)[self.first * per_row..];
                self.range::<I, F16, BITS, EACH>(set, scales, per_row, 0, self.count);
            }
            DType::F32 => {
                let scales = &cast::<f32>(bytes)[self.first * per_row..];
                self.range::<I, f32, BITS, EACH>(set, scales, per_row, 0, self.count);
            }
            _ => {
                let mut wide = SCALES.take();
                wide.resize(WIDENED * per_row, 0.0);
                for from in (0..self.count).step_by(WIDENED) {
                    let count = WIDENED.min(self.count - from);
                    widen_scales(self.level, bytes, dtype, (self.first + from) * per_row, &mut wide[..count * per_row]);
                    self.range::<I, f32, BITS, EACH>(set, &wide, per_row, from, count);
                }
                SCALES.set(wide);
            }
        }
    }

    /// Outputs `from .. from + count` of the task; `scales` are theirs, `per_row` each.
    #[inline(always)]
    fn range<I: Integer, E: Scale, const BITS: usize, const EACH: usize>(
        &self,
        set: I,
        scales: &[E],
        per_row: usize,
        from: usize,
        count: usize,
    ) {
        let mut done = 0;
        while done + OUTPUTS <= count {
            self.some::<I, E, OUTPUTS, BITS, EACH>(set, from + done, &scales[done * per_row..], per_row);
            done += OUTPUTS;
        }
        while done < count {
            self.some::<I, E, 1, BITS, EACH>(set, from + done, &scales[done * per_row..], per_row);
            done += 1;
        }
    }

    /// `O` outputs from the task's output `from` on, for every row of x.
    #[inline(always)]
    fn some<I: Integer, E: Scale, const O: usize, const BITS: usize, const EACH: usize>(
        &self,
        set: I,
        from: usize,
        scales: &[E],
        per_row: usize,
    ) {
        let codes = self.layer.codes;
        let bytes_a_block = BLOCK * BITS / 8;
        let a_block = (BLOCK * BITS / 32).checked_div(EACH).unwrap_or(0);
        let mut weights: [&[u8]; O] = [&[]; O];
        let mut of_rows: [&[E]; O] = [&[]; O];
        for o in 0..O {
            weights[o] = codes.row(self.first + from + o);
            of_rows[o] = &scales[o * per_row..][..per_row];
            for at in (0..per_row).step_by(32) {
                fetch_ahead(&of_rows[o][at..]);
            }
        }
        // The last block, filled up.
        let whole = codes.row_bytes / bytes_a_block;
        let (mut last, mut last_scales) = ([[0u8; BLOCK]; O], [[E::default(); MOST_SCALES]; O]);
        if whole < self.x.blocks {
            for o in 0..O {
                let rest = &weights[o][whole * bytes_a_block..];
                last[o][..rest.len()].copy_from_slice(rest);
                let rest = &of_rows[o][(whole * a_block).min(per_row)..];
                last_scales[o][..rest.len().min(a_block)].copy_from_slice(&rest[..rest.len().min(a_block)]);
            }
        }
        let starts_a_row = self.x.blocks * BLOCK * BITS / 32;
        let row_scales = codes.scales.of_rows().map(|scales| &scales[self.first + from..][..O]);
        let simd = set.float();
        for row in 0..self.x.rows {
            let x = self.x.codes_of(row).as_chunks::<BLOCK>().0;
            let factors = self.x.scales_of(row);
            let starts = &self.starts[row * starts_a_row..][..starts_a_row];
            let mut sums = [simd.splat(0.0); O];
            for b in 0..self.x.blocks {
                let (mut block, mut scales): ([&[u8]; O], [&[E]; O]) = ([&[]; O], [&[]; O]);
                for o in 0..O {
                    (block[o], scales[o]) = if b < whole {
                        (&weights[o][b * bytes_a_block..][..bytes_a_block], &of_rows[o][b * a_block..][..a_block])
                    } else {
                        (&last[o][..bytes_a_block], &last_scales[o][..a_block])
                    };
                }
                let block = Block { weights: block, scales, x: &x[b], factor: factors[b] };
                block.add::<I, BITS, EACH>(set, &starts[b * BLOCK * BITS / 32..], &mut sums);
            }
            // SAFETY: each task has outputs of its own.
            let out = unsafe { self.layer.out.range(row * codes.outputs + self.first + from, O) };
            let sums = simd.sums(sums);
            match row_scales {
                Some(scales) => {
                    for o in 0..O {
                        out[o] = sums[o] * scales[o];
                    }
                }
                None => out.copy_from_slice(&sums),
            }
        }
    }
}

/// A block of `O` rows of the weight and of one row of x.
struct Block<'a, E, const O: usize> {
    weights: [&'a [u8]; O],
    scales: [&'a [E]; O],
    x: &'a [i8; BLOCK],
    factor: f32,
}

impl<E: Scale, const O: usize> Block<'_, E, O> {
    /// Adds what it gives to the sums of the outputs.
    #[inline(always)]
    fn add<I: Integer, const BITS: usize, const EACH: usize>(
        &self,
        set: I,
        starts: &[i32],
        sums: &mut [<I::Float as Simd>::Vector; O],
    ) {
        let simd = set.float();
        let bytes = 4 * lanes::<I>();
        // SAFETY: i8 and u8 have the same layout.
        let x: &[u8; BLOCK] = unsafe { &*std::ptr::from_ref(self.x).cast() };
        let factor = simd.splat(self.factor);
        let starts = &starts[..BLOCK * BITS / 32];
        for chunk in 0..BLOCK * BITS / 8 / bytes {
            let start = match BITS == 8 && I::OFFSET8 == 0 {
                true => set.splat_sum(0),
                false => set.load_sums(&starts[chunk * lanes::<I>()..]),
            };
            let even = set.bytes(&x[chunk * bytes..]);
            let odd = if BITS == 4 { set.bytes(&x[BLOCK / 2 + chunk * bytes..]) } else { even };
            for o in 0..O {
                let weights = &self.weights[o][chunk * bytes..];
                fetch_ahead(weights);
                let products = if BITS == 4 {
                    let [low, high] = set.nibbles(weights);
                    set.dot4(set.dot4(start, low, even), high, odd)
                } else {
                    set.dot8(start, set.codes8(weights), even)
                };
                let scale = match (chunk * lanes::<I>()).checked_div(EACH) {
                    None => factor,
                    Some(at) => simd.mul(E::spread(set, &self.scales[o][at..], EACH), factor),
                };
                sums[o] = simd.mul_add(set.to_float(products), scale, sums[o]);
            }
        }
    }
}

/// A stored scale that kernels read as it is.
trait Scale: Copy + Default {
    /// Lane `i` is `from[i / each]`.
    fn spread<I: Integer>(set: I, from: &[Self], each: usize) -> <I::Float as Simd>::Vector;
}

impl Scale for f32 {
    #[inline(always)]
    fn spread<I: Integer>(set: I, from: &[f32], each: usize) -> <I::Float as Simd>::Vector {
        set.spread(from, each)
    }
}

impl Scale for F16 {
    #[inline(always)]
    fn spread<I: Integer>(set: I, from: &[F16], each: usize) -> <I::Float as Simd>::Vector {
        set.spread_halves(F16::bits(from), each)
    }
}
