//! Few rows: every output is a dot product, and the weight is read once, as it is stored.
#![allow(clippy::needless_range_loop)] // several sums run by one index

use super::activations::{PARTS, Quantised};
use super::{BLOCK, Bits, Layer, layer_of};
use crate::cpu::pool::ThreadPool;
use crate::cpu::simd::integer::{Integer, IntegerOperation, OFFSET4, lanes};
use crate::cpu::simd::{Level, Simd, fetch_ahead};
use std::cell::Cell;

/// Weights that a task reads at least: fewer are not worth waking a thread.
const GRAIN: usize = 64 * 1024;
/// Tasks a thread, so that none waits long for the last one.
const TASKS: usize = 4;
/// Rows of the weight that one pass over x handles.
const OUTPUTS: usize = 4;
/// Rows of the weight whose scales are widened at once; they stay in level 1.
const SCALED: usize = 8 * OUTPUTS;

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
        let count = self.x.rows * self.x.blocks * PARTS;
        self.starts.clear();
        self.starts.resize(count * lanes, 0);
        for (start, sum) in self.starts.chunks_exact_mut(lanes).zip(&self.x.sums[..count]) {
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
        let scales_a_row = self.layer.codes.blocks() * self.layer.codes.scales_a_block();
        let mut scales = SCALES.take();
        scales.resize(SCALED * scales_a_row, 0.0);
        let mut done = 0;
        while done < self.count {
            let outputs = OUTPUTS.min(self.count - done);
            if scales_a_row > 0 && done % SCALED == 0 {
                let rows = SCALED.min(self.count - done);
                self.layer.codes.scales_of(self.level, self.first + done, &mut scales[..rows * scales_a_row]);
            }
            let scales = &scales[done % SCALED * scales_a_row..];
            if outputs == OUTPUTS {
                self.some::<I, OUTPUTS, BITS, EACH>(set, done, scales, scales_a_row);
            } else {
                for o in 0..outputs {
                    self.some::<I, 1, BITS, EACH>(set, done + o, &scales[o * scales_a_row..], scales_a_row);
                }
            }
            done += outputs;
        }
        SCALES.set(scales);
    }

    /// `O` outputs from the task's output `from` on, for every row of x.
    #[inline(always)]
    fn some<I: Integer, const O: usize, const BITS: usize, const EACH: usize>(
        &self,
        set: I,
        from: usize,
        scales: &[f32],
        scales_a_row: usize,
    ) {
        let bytes_a_block = BLOCK * BITS / 8;
        let weights: [&[u8]; O] = std::array::from_fn(|o| self.layer.codes.row(self.first + from + o));
        let scales: [&[f32]; O] = std::array::from_fn(|o| &scales[o * scales_a_row..][..scales_a_row]);
        // The last block, filled up.
        let whole = self.layer.codes.row_bytes / bytes_a_block;
        let mut last = [[0u8; BLOCK]; O];
        if whole < self.x.blocks {
            for o in 0..O {
                let rest = &weights[o][whole * bytes_a_block..];
                last[o][..rest.len()].copy_from_slice(rest);
            }
        }
        let starts_a_row = self.x.blocks * BLOCK / 4 / (8 / BITS);
        let row_scales = self.layer.codes.scales.of_rows().map(|scales| &scales[self.first + from..][..O]);
        let simd = set.float();
        for row in 0..self.x.rows {
            let codes = self.x.codes_of(row).as_chunks::<BLOCK>().0;
            let factors = self.x.scales_of(row);
            let starts = &self.starts[row * starts_a_row..][..starts_a_row];
            let mut sums = [simd.splat(0.0); O];
            for b in 0..whole {
                let block: [&[u8]; O] = std::array::from_fn(|o| &weights[o][b * bytes_a_block..][..bytes_a_block]);
                add_block::<I, O, BITS, EACH>(set, &mut sums, b, block, &scales, &codes[b], factors[b], starts);
            }
            if whole < self.x.blocks {
                let b = whole;
                let last: [&[u8]; O] = std::array::from_fn(|o| &last[o][..bytes_a_block]);
                add_block::<I, O, BITS, EACH>(set, &mut sums, b, last, &scales, &codes[b], factors[b], starts);
            }
            // SAFETY: each task has outputs of its own.
            let out = unsafe { self.layer.out.range(row * self.layer.codes.outputs + self.first + from, O) };
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

/// Adds what block `b` gives to the sums of `O` outputs.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // the operands of a product and where they are
fn add_block<I: Integer, const O: usize, const BITS: usize, const EACH: usize>(
    set: I,
    sums: &mut [<I::Float as Simd>::Vector; O],
    b: usize,
    weights: [&[u8]; O],
    scales: &[&[f32]; O],
    x: &[i8; BLOCK],
    factor: f32,
    starts: &[i32],
) {
    let simd = set.float();
    let bytes = 4 * lanes::<I>();
    // SAFETY: i8 and u8 have the same layout.
    let x: &[u8; BLOCK] = unsafe { &*std::ptr::from_ref(x).cast() };
    let factor = simd.splat(factor);
    let sums_a_block = BLOCK / 4 / (8 / BITS);
    let starts = &starts[b * sums_a_block..][..sums_a_block];
    if BITS == 4 {
        for chunk in 0..BLOCK / 2 / bytes {
            let even = set.bytes(&x[chunk * bytes..]);
            let odd = set.bytes(&x[BLOCK / 2 + chunk * bytes..]);
            let start = set.load_sums(&starts[chunk * lanes::<I>()..]);
            for o in 0..O {
                fetch_ahead(&weights[o][chunk * bytes..]);
                let [low, high] = set.nibbles(&weights[o][chunk * bytes..]);
                let products = set.dot4(set.dot4(start, low, even), high, odd);
                sums[o] = simd.mul_add(
                    set.to_float(products),
                    scale_of::<I, EACH>(set, scales[o], b * sums_a_block + chunk * lanes::<I>(), factor),
                    sums[o],
                );
            }
        }
        return;
    }
    let chunks = BLOCK / bytes;
    for chunk in 0..chunks {
        let x = set.bytes(&x[chunk * bytes..]);
        let start = if I::OFFSET8 == 0 { set.splat_sum(0) } else { set.load_sums(&starts[chunk * lanes::<I>()..]) };
        for o in 0..O {
            fetch_ahead(&weights[o][chunk * bytes..]);
            let products = set.dot8(start, set.codes8(&weights[o][chunk * bytes..]), x);
            let scale = scale_of::<I, EACH>(set, scales[o], b * sums_a_block + chunk * lanes::<I>(), factor);
            sums[o] = simd.mul_add(set.to_float(products), scale, sums[o]);
        }
    }
}

/// What the sums of the lanes from lane `first` of a row on are multiplied by.
#[inline(always)]
fn scale_of<I: Integer, const EACH: usize>(
    set: I,
    scales: &[f32],
    first: usize,
    factor: <I::Float as Simd>::Vector,
) -> <I::Float as Simd>::Vector {
    match first.checked_div(EACH) {
        None => factor,
        Some(at) => set.float().mul(set.spread(&scales[at..], EACH), factor),
    }
}
