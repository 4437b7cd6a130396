//! Many rows: a blocked product. A task packs the codes of a few outputs into panels that lie in memory in the order the
//! innermost loop reads them, and goes over its rows with them.
#![allow(clippy::needless_range_loop)] // several register tiles run by one index

use super::activations::Quantised;
use super::{BLOCK, Bits, Layer, layer_of};
use crate::cpu::elementwise::Finish;
use crate::cpu::pool::ThreadPool;
use crate::cpu::simd::integer::{Integer, IntegerOperation, OFFSET4, Tiles, lanes};
use crate::cpu::simd::{Level, MAX_LANES, Operation, Simd};
use std::cell::Cell;

/// Fewer rows than this are not split among tasks, as each of them packs its panels anew.
const TASK_ROWS: usize = 128;
/// Tasks a thread.
const TASKS: usize = 8;
/// A multiple of the rows of every set's tiles.
const ROWS: usize = 28;
/// Vectors of outputs that a panel has.
const VECTORS: usize = 2;
/// Outputs of the widest panel.
const MAX_COLUMNS: usize = VECTORS * MAX_LANES;

thread_local! {
    /// Codes of a panel.
    static PANEL: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    /// Scales of a panel's outputs, and those of one of them.
    static SCALES: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

pub(super) fn product(level: Level, pool: &ThreadPool, x: &Quantised, layers: &[Layer<'_>]) {
    let columns = level.run_integer(PanelColumns);
    let panels = |layer: &Layer<'_>| layer.codes.outputs.div_ceil(columns);
    let threads = pool.threads();
    // Enough tasks that no thread waits long for the last one.
    let wanted = if threads == 1 { 1 } else { TASKS * threads };
    let row_tasks = wanted.div_ceil(layers.iter().map(panels).sum()).clamp(1, (x.rows / TASK_ROWS).max(1));
    let rows_a_task = x.rows.div_ceil(row_tasks).next_multiple_of(ROWS);
    let row_tasks = x.rows.div_ceil(rows_a_task);
    let tasks = |layer: &Layer<'_>| panels(layer) * row_tasks;
    pool.run(layers.iter().map(tasks).sum(), |task| {
        let Some((layer, task)) = layer_of(layers, task, tasks) else { return };
        let first = task / row_tasks * columns;
        let first_row = task % row_tasks * rows_a_task;
        let rows = first_row..x.rows.min(first_row + rows_a_task);
        let count = columns.min(layer.codes.outputs - first);
        level.run_integer(Task { level, x, layer, rows, first, count });
    });
}

/// Outputs of a panel.
struct PanelColumns;

impl IntegerOperation for PanelColumns {
    type Output = usize;
    #[inline(always)]
    fn run<I: Integer>(self, _: I) -> usize {
        VECTORS * lanes::<I>()
    }
}

/// Outputs `first .. first + count` of some rows.
struct Task<'a> {
    level: Level,
    x: &'a Quantised,
    layer: &'a Layer<'a>,
    rows: std::ops::Range<usize>,
    first: usize,
    count: usize,
}

impl IntegerOperation for Task<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Integer>(self, set: I) {
        set.tiles(self);
    }
}

impl Tiles for Task<'_> {
    #[inline(always)]
    fn run<I: Integer, const R: usize>(self, set: I) {
        let columns = VECTORS * lanes::<I>();
        let blocks = self.layer.codes.blocks();
        let mut panel = PANEL.take();
        let len = blocks * BLOCK * columns;
        if panel.len() < len {
            panel.resize(len, 0);
        }
        self.pack::<I>(columns, &mut panel[..len]);
        let a_block = self.layer.codes.scales_a_block();
        let mut scales = SCALES.take();
        scales.resize(blocks * a_block * (columns + 1), 0.0);
        let (of_columns, one) = scales.split_at_mut(blocks * a_block * columns);
        self.pack_scales(columns, of_columns, one);
        let of_columns = &*of_columns;
        // The depth of a step, all of which has one scale, and whether a weight has scales for its steps.
        match (self.layer.codes.bits, a_block) {
            (Bits::Four, 0) => self.rows::<I, R, VECTORS, 4, BLOCK, false>(set, &panel, of_columns),
            (Bits::Four, 1) => self.rows::<I, R, VECTORS, 4, BLOCK, true>(set, &panel, of_columns),
            (Bits::Four, 2) => self.rows::<I, R, VECTORS, 4, { BLOCK / 2 }, true>(set, &panel, of_columns),
            (Bits::Four, _) => self.rows::<I, R, VECTORS, 4, { BLOCK / 4 }, true>(set, &panel, of_columns),
            (Bits::Eight, 0) => self.rows::<I, R, VECTORS, 8, BLOCK, false>(set, &panel, of_columns),
            (Bits::Eight, 1) => self.rows::<I, R, VECTORS, 8, BLOCK, true>(set, &panel, of_columns),
            (Bits::Eight, 2) => self.rows::<I, R, VECTORS, 8, { BLOCK / 2 }, true>(set, &panel, of_columns),
            (Bits::Eight, _) => self.rows::<I, R, VECTORS, 8, { BLOCK / 4 }, true>(set, &panel, of_columns),
        }
        SCALES.set(scales);
        PANEL.set(panel);
    }
}

impl Task<'_> {
    /// Codes `[blocks, BLOCK / TOGETHER, columns, TOGETHER]`; of outputs that are missing, and behind the end of a row,
    /// anything.
    #[inline(always)]
    fn pack<I: Integer>(&self, columns: usize, panel: &mut [u8]) {
        let row = |column: usize| self.layer.codes.row(self.first + column);
        let mut column = 0;
        while I::TOGETHER == 4 && column + 4 <= self.count {
            let rows = [row(column), row(column + 1), row(column + 2), row(column + 3)];
            match self.layer.codes.bits {
                Bits::Four => pack_four_rows::<4>(rows, 0, columns, column, panel),
                Bits::Eight => pack_four_rows::<8>(rows, flip::<I>(), columns, column, panel),
            }
            column += 4;
        }
        for column in column..self.count {
            match (self.layer.codes.bits, I::TOGETHER) {
                (Bits::Four, 8) => pack_words::<8>(row(column), columns, column, panel),
                (Bits::Four, _) => pack_words::<4>(row(column), columns, column, panel),
                (Bits::Eight, 8) => pack_bytes::<8>(row(column), flip::<I>(), columns, column, panel),
                (Bits::Eight, _) => pack_bytes::<4>(row(column), flip::<I>(), columns, column, panel),
            }
        }
    }

    /// Scales `[blocks · a block, columns]`.
    fn pack_scales(&self, columns: usize, scales: &mut [f32], one: &mut [f32]) {
        if scales.is_empty() {
            return;
        }
        for column in 0..self.count {
            self.layer.codes.scales_of(self.level, self.first + column, one);
            for (to, &scale) in scales.chunks_exact_mut(columns).zip(&*one) {
                to[column] = scale;
            }
        }
    }

    /// All rows; the sums over each `D` bytes of depth are scaled each on its own.
    #[inline(always)]
    fn rows<I: Integer, const R: usize, const V: usize, const BITS: usize, const D: usize, const GROUPS: bool>(
        &self,
        set: I,
        panel: &[u8],
        scales: &[f32],
    ) {
        let simd = set.float();
        let columns = V * lanes::<I>();
        let offset = if BITS == 4 { OFFSET4 } else { I::OFFSET8 };
        let a_block = BLOCK / D;
        let steps = self.x.blocks * a_block;
        let outputs = self.first..self.first + self.count;
        let of_rows = self.layer.codes.scales.of_rows().map(|scales| &scales[outputs.clone()]);
        let bias = self.layer.bias.map(|bias| &bias[outputs]);
        let mut tile = [[0.0f32; MAX_COLUMNS]; R];
        for first in self.rows.clone().step_by(R) {
            let height = R.min(self.rows.end - first);
            let mut codes: [&[[i8; D]]; R] = [&[]; R];
            let mut factors: [&[f32]; R] = [&[]; R];
            let mut starts: [&[i32]; R] = [&[]; R];
            for r in 0..R {
                // The last row again in the place of rows that are missing.
                let row = first + r.min(height - 1);
                codes[r] = &self.x.codes_of(row).as_chunks().0[..steps];
                factors[r] = &self.x.scales_of(row)[..self.x.blocks];
                starts[r] = &self.x.sums_of(row, D)[..steps];
            }
            let mut sums = [[simd.splat(0.0); V]; R];
            for (s, panel) in panel.chunks_exact(D * columns).take(steps).enumerate() {
                let (mut x, mut start) = ([&[0; D]; R], [0; R]);
                for r in 0..R {
                    x[r] = &codes[r][s];
                    start[r] = -offset * starts[r][s];
                }
                let products = set.tile::<BITS, D, R, V>(start, panel, x);
                let mut scale = [simd.splat(1.0); V];
                if GROUPS {
                    let scales = &scales[s * columns..][..columns];
                    for v in 0..V {
                        scale[v] = simd.load(&scales[v * lanes::<I>()..]);
                    }
                }
                for r in 0..R {
                    let factor = simd.splat(factors[r][s / a_block]);
                    for v in 0..V {
                        let factor = if GROUPS { simd.mul(scale[v], factor) } else { factor };
                        sums[r][v] = simd.mul_add(set.to_float(products[r][v]), factor, sums[r][v]);
                    }
                }
            }
            for r in 0..R {
                for v in 0..V {
                    simd.store(sums[r][v], &mut tile[r][v * lanes::<I>()..]);
                }
            }
            for (r, row) in tile.iter_mut().enumerate().take(height) {
                let row = &mut row[..self.count];
                if let Some(scales) = of_rows {
                    row.iter_mut().zip(scales).for_each(|(sum, scale)| *sum *= scale);
                }
                Finish { row: &mut *row, bias, activation: self.layer.activation }.run(simd);
                // SAFETY: each task has outputs of its own.
                let out =
                    unsafe { self.layer.out.range((first + r) * self.layer.codes.outputs + self.first, self.count) };
                out.copy_from_slice(row);
            }
        }
    }
}

/// Codes of 4 bits of one output into its column of a panel: of every word the lower halves, then the upper ones, as
/// [`Order::Words`](super::activations::Order) has the activations.
#[inline(always)]
fn pack_words<const TOGETHER: usize>(row: &[u8], columns: usize, column: usize, panel: &mut [u8]) {
    for (units, word) in panel.chunks_exact_mut(columns * 8).zip(row.as_chunks::<4>().0) {
        let word = u32::from_le_bytes(*word);
        let (low, high) = ((word & 0x0f0f_0f0f).to_le_bytes(), (word >> 4 & 0x0f0f_0f0f).to_le_bytes());
        // The upper halves follow the lower ones, in this unit or in the next.
        let behind = if TOGETHER == 8 { 4 } else { columns * 4 };
        units[column * TOGETHER..][..4].copy_from_slice(&low);
        units[column * TOGETHER + behind..][..4].copy_from_slice(&high);
    }
}

/// Codes of 8 bits of one output into its column of a panel.
#[inline(always)]
fn pack_bytes<const TOGETHER: usize>(row: &[u8], flip: u8, columns: usize, column: usize, panel: &mut [u8]) {
    let (whole, rest) = row.as_chunks::<TOGETHER>();
    let mut last = [0; TOGETHER];
    last[..rest.len()].copy_from_slice(rest);
    let whole = whole.iter().chain((!rest.is_empty()).then_some(&last));
    for (unit, bytes) in panel.chunks_exact_mut(columns * TOGETHER).zip(whole) {
        unit[column * TOGETHER..][..TOGETHER].copy_from_slice(&bytes.map(|byte| byte ^ flip));
    }
}

/// What makes bytes codes of the set.
#[inline(always)]
fn flip<I: Integer>() -> u8 {
    if I::OFFSET8 == 0 { 0 } else { 0x80 }
}

/// As [`pack_words`] or [`pack_bytes`] of four outputs, four units at once, which are transposed in registers.
#[inline(always)]
fn pack_four_rows<const BITS: usize>(rows: [&[u8]; 4], flip: u8, columns: usize, column: usize, panel: &mut [u8]) {
    // Bytes of a panel that 16 bytes of each row fill.
    let step = columns * 4 * 4 * 8 / BITS;
    let whole = rows[0].len() / 16;
    for at in 0..whole {
        let mut words = [[0u32; 4]; 4];
        for (words, row) in words.iter_mut().zip(rows) {
            for (word, bytes) in words.iter_mut().zip(row[16 * at..16 * at + 16].as_chunks().0) {
                *word = u32::from_le_bytes(*bytes);
            }
        }
        let panel = &mut panel[at * step..(at + 1) * step];
        for (i, units) in panel.chunks_exact_mut(columns * 4 * 8 / BITS).enumerate() {
            for (r, words) in words.iter().enumerate() {
                let place = (column + r) * 4;
                if BITS == 4 {
                    units[place..place + 4].copy_from_slice(&(words[i] & 0x0f0f_0f0f).to_le_bytes());
                    let high = place + columns * 4;
                    units[high..high + 4].copy_from_slice(&(words[i] >> 4 & 0x0f0f_0f0f).to_le_bytes());
                } else {
                    let flips = u32::from_le_bytes([flip; 4]);
                    units[place..place + 4].copy_from_slice(&(words[i] ^ flips).to_le_bytes());
                }
            }
        }
    }
    let panel = &mut panel[whole * step..];
    for (r, row) in rows.into_iter().enumerate() {
        match BITS {
            4 => pack_words::<4>(&row[whole * 16..], columns, column + r, panel),
            _ => pack_bytes::<4>(&row[whole * 16..], flip, columns, column + r, panel),
        }
    }
}
