//! General matrix product, for training and for layers with many rows.
//!
//! The scheme is that of Goto and van de Geijn (2008): both operands are copied into panels that lie in memory in the
//! order the innermost loop reads them, cut so that they stay in the caches, and a register tile of C is built from
//! them. Any strides are taken; packing makes them the same.
#![allow(clippy::needless_range_loop)] // several register tiles run by one index

use crate::cpu::pool::{SharedSlice, ThreadPool};
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::Avx512Bf16;
use crate::cpu::simd::{Level, Operation, Portable, Simd};
use crate::device::{DeviceError, Result};
use std::cell::Cell;

/// Depth of a panel in packed lanes. Behind each of so many C is read and written again, which for a tower's rows goes to
/// memory: the models' widths are mostly multiples of it or not much larger.
const DEPTH: usize = 768;
/// Rows of A a task packs and works through, a multiple of every tile's rows: 96 · `DEPTH` · 4 bytes stay in level 2.
const TASK_ROWS: usize = 96;
/// Columns of B packed at a time: 1536 · `DEPTH` · 4 bytes stay in level 3.
const BLOCK_COLUMNS: usize = 1536;

/// A read-only matrix of f32 with any strides.
#[derive(Clone, Copy, Debug)]
pub struct MatrixRef<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> MatrixRef<'a> {
    /// The matrix whose element (r, c) is `data[r · row_stride + c · col_stride]`.
    ///
    /// # Errors
    /// [`DeviceError::Size`] when an element would lie outside of `data`.
    pub fn new(data: &'a [f32], rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Result<Self> {
        let needed = if rows == 0 || cols == 0 {
            Some(0)
        } else {
            let last_row = (rows - 1).checked_mul(row_stride);
            let last_col = (cols - 1).checked_mul(col_stride);
            last_row.zip(last_col).and_then(|(r, c)| r.checked_add(c)).and_then(|last| last.checked_add(1))
        };
        match needed {
            Some(needed) if needed <= data.len() => Ok(MatrixRef { data, rows, cols, row_stride, col_stride }),
            _ => Err(DeviceError::Size {
                op: "gemm",
                what: "a matrix",
                expected: needed.unwrap_or(usize::MAX),
                actual: data.len(),
            }),
        }
    }

    /// A contiguous row-major matrix.
    ///
    /// # Errors
    /// [`DeviceError::Size`] when `data` is shorter than `rows · cols`.
    pub fn row_major(data: &'a [f32], rows: usize, cols: usize) -> Result<Self> {
        Self::new(data, rows, cols, cols, 1)
    }

    /// The transpose, `[cols, rows]`; nothing is copied.
    pub fn transposed(self) -> Self {
        MatrixRef {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
}

/// Precision of the products of a [`gemm`]; sums are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// f32 operands.
    F32,
    /// Operands rounded to bf16 (to nearest, ties to even) where the processor multiplies those (AVX512-BF16);
    /// elsewhere the same as [`Precision::F32`].
    Bf16,
}

/// C = A · B, or C += A · B with `accumulate`: A `[m, k]`, B `[k, n]`, C `[m, n]` row-major.
///
/// # Errors
/// [`DeviceError::Size`] when the operands' inner sizes differ or `c` is not of `m · n` elements.
pub fn gemm(
    pool: &ThreadPool,
    a: MatrixRef<'_>,
    b: MatrixRef<'_>,
    c: &mut [f32],
    accumulate: bool,
    precision: Precision,
) -> Result<()> {
    gemm_at(Level::chosen(), pool, a, b, c, accumulate, precision)
}

pub(crate) fn gemm_at(
    level: Level,
    pool: &ThreadPool,
    a: MatrixRef<'_>,
    b: MatrixRef<'_>,
    c: &mut [f32],
    accumulate: bool,
    precision: Precision,
) -> Result<()> {
    if a.cols != b.rows {
        return Err(DeviceError::Size { op: "gemm", what: "the depth of B", expected: a.cols, actual: b.rows });
    }
    let expected = a.rows.saturating_mul(b.cols);
    if c.len() != expected {
        return Err(DeviceError::Size { op: "gemm", what: "C", expected, actual: c.len() });
    }
    product_at(level, pool, a, b.transposed(), c, accumulate, precision, |_, _| ());
    Ok(())
}

/// The right operand of a product, transposed: `columns` rows as deep as the left operand's.
pub(crate) trait Columns: Copy + Sync {
    /// Columns of the product.
    fn columns(&self) -> usize;
    /// Packs a part (rows are columns of the product) into panels.
    fn pack<T: Tile>(self, tile: T, part: Part, panels: &mut [f32]);
}

impl Columns for MatrixRef<'_> {
    fn columns(&self) -> usize {
        self.rows
    }
    fn pack<T: Tile>(self, tile: T, part: Part, panels: &mut [f32]) {
        tile.pack_columns(self, part, panels);
    }
}

/// [`gemm`] with B transposed and of any kind; `finish(piece, column)` is called once on each finished piece of a row
/// of C, with the column it starts at. Sizes must fit.
#[allow(clippy::too_many_arguments)] // the operands of a product and how to make it
pub(crate) fn product_at<B: Columns>(
    level: Level,
    pool: &ThreadPool,
    a: MatrixRef<'_>,
    b: B,
    c: &mut [f32],
    accumulate: bool,
    precision: Precision,
    finish: impl Fn(&mut [f32], usize) + Sync,
) {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = level.avx512() {
        match Avx512Bf16::new().filter(|_| precision == Precision::Bf16) {
            Some(pairs) => product(Bf16Tile { pairs }, pool, a, b, c, accumulate, finish),
            None => product(F32Tile::<_, 12, 2, 32> { simd }, pool, a, b, c, accumulate, finish),
        }
        return;
    } else if let Some(simd) = level.avx2() {
        product(F32Tile::<_, 6, 2, 16> { simd }, pool, a, b, c, accumulate, finish);
        return;
    }
    #[cfg(target_arch = "aarch64")]
    if let Some(simd) = level.neon() {
        // 24 registers of sums, 2 of B and 3 of A.
        product(F32Tile::<_, 12, 1, 8> { simd }, pool, a, b, c, accumulate, finish);
        return;
    }
    let _ = (level, precision); // there is but one way left
    product(F32Tile::<_, 4, 1, 8> { simd: Portable }, pool, a, b, c, accumulate, finish);
}

/// The innermost product: a register tile of C from a panel of A and a panel of B.
///
/// A panel holds, for each step of depth, one packed lane (four bytes) for each row of the tile; lanes hold one f32 or
/// two bf16 that follow each other in depth. bf16 pairs travel as the bits of an f32.
pub(crate) trait Tile: Copy + Send + Sync {
    /// Rows of the tile: lanes a step of a panel of A.
    const ROWS: usize;
    /// Columns of the tile: lanes a step of a panel of B.
    const COLUMNS: usize;
    /// Elements of depth a lane holds.
    const PER_LANE: usize;

    /// Runs an operation with the instruction set switched on.
    fn enter<O: TileOperation>(self, operation: O);
    /// One lane, from `PER_LANE` elements that follow each other in depth.
    fn lane(self, first: f32, second: f32) -> f32;
    /// Eight lanes, from elements that follow each other in depth.
    fn lanes(self, from: &[f32]) -> [f32; 8];
    /// Lanes side by side, from elements of one depth and those of the next (none behind the last).
    fn pair_up(self, first: &[f32], second: &[f32], to: &mut [f32]);
    /// `to[i · stride + r] = block[r][i]`
    fn transpose(self, block: &[[f32; 8]; 4], to: &mut [f32], stride: usize);
    /// Panels of `ROWS` rows of a part of A.
    fn pack_rows(self, a: MatrixRef<'_>, part: Part, panels: &mut [f32]);
    /// Panels of `COLUMNS` rows of a part of B's transpose.
    fn pack_columns(self, b: MatrixRef<'_>, part: Part, panels: &mut [f32]);
    /// `out[r · COLUMNS + c] = Σ a · b` over the panels' depth.
    fn multiply(self, a: &[f32], b: &[f32], out: &mut [f32; MAX_TILE]);
}

/// Elements of the largest tile.
const MAX_TILE: usize = MAX_TILE_ROWS * MAX_TILE_COLUMNS;
const MAX_TILE_ROWS: usize = 12;
const MAX_TILE_COLUMNS: usize = 32;

/// Rows `first .. first + count` and columns `from .. from + depth` of a matrix.
#[derive(Clone, Copy)]
pub(crate) struct Part {
    pub(crate) first: usize,
    pub(crate) count: usize,
    pub(crate) from: usize,
    pub(crate) depth: usize,
}

pub(crate) trait TileOperation {
    fn run<T: Tile>(self, tile: T);
}

/// f32 operands, a tile of `R` rows and `N` columns in `V` vectors.
#[derive(Clone, Copy)]
struct F32Tile<S, const R: usize, const V: usize, const N: usize> {
    simd: S,
}

impl<S: Simd, const R: usize, const V: usize, const N: usize> Tile for F32Tile<S, R, V, N> {
    const ROWS: usize = R;
    const COLUMNS: usize = N;
    const PER_LANE: usize = 1;

    #[inline(always)]
    fn enter<O: TileOperation>(self, operation: O) {
        struct Entered<O, const R: usize, const V: usize, const N: usize>(O);
        impl<O: TileOperation, const R: usize, const V: usize, const N: usize> Operation for Entered<O, R, V, N> {
            type Output = ();
            #[inline(always)]
            fn run<S: Simd>(self, simd: S) {
                self.0.run(F32Tile::<S, R, V, N> { simd });
            }
        }
        self.simd.enter(Entered::<O, R, V, N>(operation));
    }
    #[inline(always)]
    fn lane(self, first: f32, _second: f32) -> f32 {
        first
    }
    #[inline(always)]
    fn lanes(self, from: &[f32]) -> [f32; 8] {
        let mut lanes = [0.0; 8];
        lanes.copy_from_slice(&from[..8]);
        lanes
    }
    #[inline(always)]
    fn pair_up(self, first: &[f32], _second: &[f32], to: &mut [f32]) {
        to.copy_from_slice(first);
    }
    #[inline(always)]
    fn transpose(self, block: &[[f32; 8]; 4], to: &mut [f32], stride: usize) {
        self.simd.transpose(block, to, stride);
    }
    fn pack_rows(self, a: MatrixRef<'_>, part: Part, panels: &mut [f32]) {
        self.enter(PackPanels::<R> { m: a, part, panels });
    }
    fn pack_columns(self, b: MatrixRef<'_>, part: Part, panels: &mut [f32]) {
        self.enter(PackPanels::<N> { m: b, part, panels });
    }
    #[inline(always)]
    fn multiply(self, a: &[f32], b: &[f32], out: &mut [f32; MAX_TILE]) {
        let simd = self.simd;
        let mut sums = [[simd.splat(0.0); V]; R];
        for (a, b) in a.as_chunks::<R>().0.iter().zip(b.chunks_exact(N)) {
            let mut columns = [simd.splat(0.0); V];
            for v in 0..V {
                columns[v] = simd.load(&b[v * S::LANES..]);
            }
            simd.add_products(&mut sums, a, columns);
        }
        for r in 0..R {
            for v in 0..V {
                simd.store(sums[r][v], &mut out[(r * V + v) * S::LANES..]);
            }
        }
    }
}

/// bf16 operands on AVX512-BF16.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Bf16Tile {
    pairs: Avx512Bf16,
}

#[cfg(target_arch = "x86_64")]
impl Tile for Bf16Tile {
    const ROWS: usize = 12;
    const COLUMNS: usize = 32;
    const PER_LANE: usize = 2;

    #[inline(always)]
    fn enter<O: TileOperation>(self, operation: O) {
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
        fn run<O: TileOperation>(tile: Bf16Tile, operation: O) {
            operation.run(tile);
        }
        // SAFETY: `pairs` exists, so the instructions are there.
        unsafe { run(self, operation) }
    }
    #[inline(always)]
    fn lane(self, first: f32, second: f32) -> f32 {
        f32::from_bits(bf16_bits(first) | bf16_bits(second) << 16)
    }
    #[inline(always)]
    fn lanes(self, from: &[f32]) -> [f32; 8] {
        self.pairs.pairs(from)
    }
    #[inline(always)]
    fn pair_up(self, first: &[f32], second: &[f32], to: &mut [f32]) {
        for (i, (first, to)) in first.chunks(16).zip(to.chunks_mut(16)).enumerate() {
            self.pairs.pair_up(first, second.get(i * 16..).unwrap_or(&[]), to);
        }
    }
    #[inline(always)]
    fn transpose(self, block: &[[f32; 8]; 4], to: &mut [f32], stride: usize) {
        self.pairs.base().transpose(block, to, stride);
    }
    fn pack_rows(self, a: MatrixRef<'_>, part: Part, panels: &mut [f32]) {
        self.enter(PackPanels::<12> { m: a, part, panels });
    }
    fn pack_columns(self, b: MatrixRef<'_>, part: Part, panels: &mut [f32]) {
        self.enter(PackPanels::<32> { m: b, part, panels });
    }
    #[inline(always)]
    fn multiply(self, a: &[f32], b: &[f32], out: &mut [f32; MAX_TILE]) {
        let (pairs, simd) = (self.pairs, self.pairs.base());
        let mut sums = [[simd.splat(0.0); 2]; 12];
        for (a, b) in a.chunks_exact(12).zip(b.chunks_exact(32)) {
            let columns = [simd.load(b), simd.load(&b[16..])];
            for r in 0..12 {
                let row = simd.splat(a[r]);
                sums[r][0] = pairs.dot_pairs(sums[r][0], row, columns[0]);
                sums[r][1] = pairs.dot_pairs(sums[r][1], row, columns[1]);
            }
        }
        for r in 0..12 {
            simd.store(sums[r][0], &mut out[r * 32..]);
            simd.store(sums[r][1], &mut out[r * 32 + 16..]);
        }
    }
}

/// The upper 16 bits of `value` rounded to nearest, ties to even; a NaN stays one.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn bf16_bits(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1))) >> 16;
    if bits & 0x7fff_ffff > 0x7f80_0000 { bits >> 16 | 0x40 } else { rounded }
}

/// Packs a part of a matrix into panels of `W` of its rows: lane `r` of step `s` of panel `p` is row `p · W + r`; rows
/// that are missing are zero.
struct PackPanels<'a, const W: usize> {
    m: MatrixRef<'a>,
    part: Part,
    panels: &'a mut [f32],
}

impl<const W: usize> TileOperation for PackPanels<'_, W> {
    #[inline(always)]
    fn run<T: Tile>(self, tile: T) {
        let steps = self.part.depth.div_ceil(T::PER_LANE);
        if self.m.row_stride == 1 {
            self.side_by_side(tile, steps);
            return;
        }
        let PackPanels { m, part, panels } = self;
        for (index, panel) in panels.chunks_exact_mut(steps * W).enumerate() {
            let first = part.first + index * W;
            let count = W.min(part.first + part.count - first);
            let start = first * m.row_stride + part.from * m.col_stride;
            let mut done = 0;
            if m.col_stride == 1 {
                // Depth is contiguous: four rows are transposed at a time.
                while done + 4 <= count {
                    transpose_rows(tile, &m, start + done * m.row_stride, part.depth, W, &mut panel[done..]);
                    done += 4;
                }
            }
            for (s, out) in panel.chunks_exact_mut(W).enumerate() {
                let k = s * T::PER_LANE;
                for r in done..count {
                    let at = start + r * m.row_stride + k * m.col_stride;
                    out[r] = lane_at(tile, &m, at, k, part.depth);
                }
                out[count..].fill(0.0);
            }
        }
    }
}

impl<const W: usize> PackPanels<'_, W> {
    /// For rows that lie side by side. All panels advance together, so that memory is read in its order.
    #[inline(always)]
    fn side_by_side<T: Tile>(self, tile: T, steps: usize) {
        let PackPanels { m, part, panels } = self;
        // A task's panels may end before the part does.
        let count = part.count.min(panels.len() / steps);
        for s in 0..steps {
            let k = s * T::PER_LANE;
            let start = part.first + (part.from + k) * m.col_stride;
            let x = &m.data[start..start + count];
            let y = if T::PER_LANE == 2 && k + 1 < part.depth { &m.data[start + m.col_stride..][..count] } else { &[] };
            for (panel, lanes) in panels.chunks_exact_mut(steps * W).enumerate() {
                let out = &mut lanes[s * W..(s + 1) * W];
                let first = panel * W;
                if first + W <= count {
                    // A size known when compiling.
                    let second = y.get(first..first + W).unwrap_or(&[]);
                    tile.pair_up(&x[first..first + W], second, out);
                } else {
                    let (there, missing) = out.split_at_mut(count - first);
                    tile.pair_up(&x[first..], y.get(first..).unwrap_or(&[]), there);
                    missing.fill(0.0);
                }
            }
        }
    }
}

/// The lane of element `at`, which is `k` deep.
#[inline(always)]
fn lane_at<T: Tile>(tile: T, m: &MatrixRef<'_>, at: usize, k: usize, depth: usize) -> f32 {
    let second = if T::PER_LANE == 2 && k + 1 < depth { m.data[at + m.col_stride] } else { 0.0 };
    tile.lane(m.data[at], second)
}

/// Four rows of contiguous depth, the first from `start`: lane `r` of step `s` goes to `to[s · stride + r]`.
#[inline(always)]
fn transpose_rows<T: Tile>(tile: T, m: &MatrixRef<'_>, start: usize, depth: usize, stride: usize, to: &mut [f32]) {
    const STEPS: usize = 8;
    let block_depth = STEPS * T::PER_LANE;
    let rows: [&[f32]; 4] = [
        &m.data[start..][..depth],
        &m.data[start + m.row_stride..][..depth],
        &m.data[start + 2 * m.row_stride..][..depth],
        &m.data[start + 3 * m.row_stride..][..depth],
    ];
    let mut k = 0;
    while k + block_depth <= depth {
        let block = [
            tile.lanes(&rows[0][k..]),
            tile.lanes(&rows[1][k..]),
            tile.lanes(&rows[2][k..]),
            tile.lanes(&rows[3][k..]),
        ];
        tile.transpose(&block, &mut to[k / T::PER_LANE * stride..], stride);
        k += block_depth;
    }
    while k < depth {
        for r in 0..4 {
            to[k / T::PER_LANE * stride + r] = lane_at(tile, m, start + r * m.row_stride + k, k, depth);
        }
        k += T::PER_LANE;
    }
}

/// C's block `rows` × `columns` from packed panels.
struct MultiplyBlock<'a> {
    a: &'a [f32],
    b: &'a [f32],
    steps: usize,
    rows: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
    c: &'a SharedSlice<'a, f32>,
    c_width: usize,
    accumulate: bool,
}

impl TileOperation for MultiplyBlock<'_> {
    #[inline(always)]
    fn run<T: Tile>(self, tile: T) {
        let mut out = [0.0f32; MAX_TILE];
        for (j, b) in self.b.chunks_exact(self.steps * T::COLUMNS).enumerate() {
            let column = self.columns.start + j * T::COLUMNS;
            let width = T::COLUMNS.min(self.columns.end - column);
            for (i, a) in self.a.chunks_exact(self.steps * T::ROWS).enumerate() {
                tile.multiply(a, b, &mut out);
                let row = self.rows.start + i * T::ROWS;
                let height = T::ROWS.min(self.rows.end - row);
                for r in 0..height {
                    // SAFETY: tasks have disjoint blocks of C.
                    let to = unsafe { self.c.range((row + r) * self.c_width + column, width) };
                    let from = &out[r * T::COLUMNS..][..width];
                    if self.accumulate {
                        to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
                    } else {
                        to.copy_from_slice(from);
                    }
                }
            }
        }
    }
}

thread_local! {
    /// Memory for the panels of A (one set a working thread) and of B (the calling thread), kept between products.
    static PANELS_A: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    static PANELS_B: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Runs `code` with `len` elements of a thread's memory that start at a cache line.
pub(crate) fn with_panels<R>(
    memory: &'static std::thread::LocalKey<Cell<Vec<f32>>>,
    len: usize,
    code: impl FnOnce(&mut [f32]) -> R,
) -> R {
    const LINE: usize = 64;
    // Taken out, so that a product within a product gets memory of its own.
    let mut vector = memory.take();
    let wanted = len + LINE / size_of::<f32>();
    if vector.len() < wanted {
        vector.resize(wanted, 0.0);
    }
    let offset = vector.as_ptr().align_offset(LINE).min(wanted - len);
    let result = code(&mut vector[offset..offset + len]);
    memory.set(vector);
    result
}

/// Bytes that the panels of a blocked product `[rows, depth]` by `[depth, columns]` take at most, those of all threads
/// together; they are kept for the next product.
pub(crate) fn panel_bytes(rows: usize, columns: usize, depth: usize, threads: usize) -> usize {
    let depth = depth.min(DEPTH);
    let of_a = threads * rows.min(TASK_ROWS).next_multiple_of(MAX_TILE_ROWS) * depth;
    let of_b = columns.min(BLOCK_COLUMNS).next_multiple_of(MAX_TILE_COLUMNS) * depth;
    (of_a + of_b) * size_of::<f32>()
}

/// The blocked product; sizes are checked.
fn product<T: Tile, B: Columns>(
    tile: T,
    pool: &ThreadPool,
    a: MatrixRef<'_>,
    b: B,
    c: &mut [f32],
    accumulate: bool,
    finish: impl Fn(&mut [f32], usize) + Sync,
) {
    let (m, n, k) = (a.rows, b.columns(), a.cols);
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !accumulate {
            c.fill(0.0);
        }
        c.chunks_exact_mut(n).for_each(|row| finish(row, 0));
        return;
    }
    let shared = SharedSlice::new(c);
    // Equal shares of the depth, no short one at the end.
    let depth_blocks = k.div_ceil(DEPTH * T::PER_LANE);
    let depth = k.div_ceil(depth_blocks).next_multiple_of(T::PER_LANE);
    let row_blocks = m.div_ceil(TASK_ROWS);
    let rows_a_task = m.div_ceil(row_blocks).next_multiple_of(T::ROWS);
    let row_tasks = m.div_ceil(rows_a_task);
    for column in (0..n).step_by(BLOCK_COLUMNS) {
        let columns = column..n.min(column + BLOCK_COLUMNS);
        let panels = columns.len().div_ceil(T::COLUMNS);
        for from in (0..k).step_by(depth) {
            let depth = depth.min(k - from);
            let steps = depth.div_ceil(T::PER_LANE);
            let panel = steps * T::COLUMNS;
            with_panels(&PANELS_B, panels * panel, |packed_b| {
                let panels_a_task = panels.div_ceil(4 * pool.threads()).max(1);
                pool.run_chunks(packed_b, panels_a_task * panel, |task, packed| {
                    let first = columns.start + task * panels_a_task * T::COLUMNS;
                    b.pack(tile, Part { first, count: columns.end - first, from, depth }, packed);
                });
                let packed_b = &*packed_b;
                // Enough tasks that no thread waits long for the last one.
                let wanted = if pool.threads() == 1 { 1 } else { 4 * pool.threads() };
                let column_tasks = wanted.div_ceil(row_tasks).min(panels);
                let panels_a_task = panels.div_ceil(column_tasks);
                let column_tasks = panels.div_ceil(panels_a_task);
                pool.run(row_tasks * column_tasks, |task| {
                    let first_row = task / column_tasks * rows_a_task;
                    let rows = first_row..m.min(first_row + rows_a_task);
                    let first_panel = task % column_tasks * panels_a_task;
                    let last_panel = panels.min(first_panel + panels_a_task);
                    let task_columns = columns.start + first_panel * T::COLUMNS
                        ..columns.end.min(columns.start + last_panel * T::COLUMNS);
                    let lanes = rows.len().div_ceil(T::ROWS) * T::ROWS * steps;
                    with_panels(&PANELS_A, lanes, |packed_a| {
                        tile.pack_rows(a, Part { first: rows.start, count: rows.len(), from, depth }, packed_a);
                        tile.enter(MultiplyBlock {
                            a: packed_a,
                            b: &packed_b[first_panel * panel..last_panel * panel],
                            steps,
                            rows: rows.clone(),
                            columns: task_columns.clone(),
                            c: &shared,
                            c_width: n,
                            accumulate: accumulate || from > 0,
                        });
                    });
                    if from + depth == k {
                        for row in rows {
                            // SAFETY: tasks have disjoint blocks of C.
                            let piece = unsafe { shared.range(row * n + task_columns.start, task_columns.len()) };
                            finish(piece, task_columns.start);
                        }
                    }
                });
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn random(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
        (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    /// Element (r, c) in f64.
    fn at(m: MatrixRef<'_>, r: usize, c: usize) -> f64 {
        f64::from(m.data[r * m.row_stride + c * m.col_stride])
    }

    /// The largest error of `c` against the f64 product plus `before`.
    fn worst(a: MatrixRef<'_>, b: MatrixRef<'_>, before: f64, c: &[f32]) -> f64 {
        let mut worst = 0.0f64;
        for r in 0..a.rows {
            for n in 0..b.cols {
                let exact = before + (0..a.cols).map(|k| at(a, r, k) * at(b, k, n)).sum::<f64>();
                worst = worst.max((exact - f64::from(c[r * b.cols + n])).abs());
            }
        }
        worst
    }

    #[test]
    fn matches_the_definition_at_every_level() {
        let seed = 7;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // Odd ones, and ones that cross each block: 192 rows, 384 and 768 of depth, 1536 columns.
        let sizes =
            [(1, 1, 1), (5, 7, 3), (12, 32, 16), (25, 65, 33), (197, 9, 20), (6, 33, 401), (3, 5, 801), (2, 1601, 9)];
        for threads in [1, 3] {
            let pool = ThreadPool::new(Some(threads));
            for level in Level::all() {
                for (m, n, k) in sizes {
                    for layout in 0..5 {
                        // Room for a row stride three longer than the row, or for columns two apart.
                        let (x, y) = (
                            random(&mut rng, m.max(k) * (m.max(k) + 3) * 2),
                            random(&mut rng, n.max(k) * (n.max(k) + 3) * 2),
                        );
                        let a = match layout {
                            0 | 1 => MatrixRef::new(&x, m, k, k + 3, 1),
                            2 | 3 => MatrixRef::new(&x, m, k, 1, m + 3),
                            _ => MatrixRef::new(&x, m, k, 2 * k, 2),
                        }
                        .expect("a");
                        let b = match layout {
                            0 | 2 => MatrixRef::new(&y, k, n, n, 1),
                            1 | 3 => MatrixRef::new(&y, k, n, 1, k),
                            _ => MatrixRef::new(&y, k, n, 2, 2 * k),
                        }
                        .expect("b");
                        for (precision, allowed) in
                            [(Precision::F32, 1e-4), (Precision::Bf16, 0.01 * (k as f64).sqrt())]
                        {
                            for accumulate in [false, true] {
                                let mut c = vec![0.5; m * n];
                                gemm_at(level, &pool, a, b, &mut c, accumulate, precision).expect("sizes match");
                                let error = worst(a, b, if accumulate { 0.5 } else { 0.0 }, &c);
                                assert!(
                                    error < allowed,
                                    "{level:?} {m}x{n}x{k} layout {layout} {precision:?} seed {seed}: {error}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn bf16_rounds_to_nearest_even() {
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        for _ in 0..10_000 {
            let value = f32::from_bits(rng.random());
            let (ours, half) = (bf16_bits(value) as u16, half::bf16::from_f32(value));
            assert!(ours == half.to_bits() || value.is_nan() && half::bf16::from_bits(ours).is_nan(), "{value}");
        }
    }

    #[test]
    fn no_depth_gives_zeros() {
        let pool = ThreadPool::new(Some(1));
        let (a, b) = (MatrixRef::row_major(&[], 2, 0).expect("a"), MatrixRef::row_major(&[], 0, 2).expect("b"));
        let mut c = [1.0; 4];
        gemm(&pool, a, b, &mut c, true, Precision::F32).expect("sizes match");
        assert_eq!(c, [1.0; 4]);
        gemm(&pool, a, b, &mut c, false, Precision::F32).expect("sizes match");
        assert_eq!(c, [0.0; 4]);
    }

    #[test]
    fn wrong_sizes_are_errors() {
        let pool = ThreadPool::new(Some(1));
        let data = [0.0; 12];
        assert!(MatrixRef::new(&data, 3, 4, 4, 1).is_ok());
        assert!(MatrixRef::new(&data, 3, 4, 5, 1).is_err());
        assert!(MatrixRef::new(&data, usize::MAX, 2, usize::MAX, 1).is_err());
        let a = MatrixRef::row_major(&data, 3, 4).expect("fits");
        assert!(gemm(&pool, a, a, &mut [0.0; 9], false, Precision::F32).is_err());
        assert!(gemm(&pool, a, a.transposed(), &mut [0.0; 8], false, Precision::F32).is_err());
        assert!(gemm(&pool, a, a.transposed(), &mut [0.0; 9], false, Precision::F32).is_ok());
    }
}
