//! General matrix product, for training and for layers with many rows.
//!
//! The scheme is that of Goto and van de Geijn (2008): both operands are copied into panels that lie in memory in the
//! order the innermost loop reads them, cut so that they stay in the caches, and a register tile of C is built from
//! them. Any strides are taken; packing makes them the same.

use crate::cpu::pool::{SharedSlice, ThreadPool};
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::Avx512Bf16;
use crate::cpu::simd::{Level, Operation, Simd};
use crate::device::{DeviceError, Result};
use std::cell::Cell;

/// Depth of a panel in packed lanes: a panel of B then takes half of a 1 MiB level-2 cache at most, and the models'
/// widths are mostly multiples of it.
const DEPTH: usize = 384;
/// Rows of A a task packs and works through, a multiple of every tile's rows: 192 · `DEPTH` · 4 bytes stay in level 2.
const TASK_ROWS: usize = 192;
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
    let expected = a.rows.checked_mul(b.cols).unwrap_or(usize::MAX);
    if c.len() != expected {
        return Err(DeviceError::Size { op: "gemm", what: "C", expected, actual: c.len() });
    }
    match (level, precision) {
        #[cfg(target_arch = "x86_64")]
        (Level::Avx512(simd), precision) => match Avx512Bf16::new() {
            Some(pairs) if precision == Precision::Bf16 => product(Bf16Tile { pairs }, pool, a, b, c, accumulate),
            _ => product(F32Tile::<_, 12, 2, 32> { simd }, pool, a, b, c, accumulate),
        },
        #[cfg(target_arch = "x86_64")]
        (Level::Avx2(simd), _) => product(F32Tile::<_, 6, 2, 16> { simd }, pool, a, b, c, accumulate),
        (Level::Portable(simd), _) => product(F32Tile::<_, PORTABLE_ROWS, 1, 8> { simd }, pool, a, b, c, accumulate),
    }
    Ok(())
}

/// NEON has 32 registers, SSE2 has 16.
const PORTABLE_ROWS: usize = if cfg!(target_arch = "aarch64") { 8 } else { 4 };

/// The innermost product: a register tile of C from a panel of A and a panel of B.
///
/// A panel holds, for each step of depth, one packed lane (four bytes) for each row of the tile; lanes hold one f32 or
/// two bf16 that follow each other in depth. bf16 pairs travel as the bits of an f32.
trait Tile: Copy + Send + Sync {
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
    /// Panels of `ROWS` rows of a part of A.
    fn pack_rows(self, a: MatrixRef<'_>, part: Part, panels: &mut [f32]);
    /// Panels of `COLUMNS` rows of a part of B's transpose.
    fn pack_columns(self, b: MatrixRef<'_>, part: Part, panels: &mut [f32]);
    /// `out[r · COLUMNS + c] = Σ a · b` over the panels' depth.
    fn multiply(self, a: &[f32], b: &[f32], out: &mut [f32; MAX_TILE]);
}

/// Elements of the largest tile.
const MAX_TILE: usize = 12 * 32;

/// Rows `first .. first + count` and columns `from .. from + depth` of a matrix.
#[derive(Clone, Copy)]
struct Part {
    first: usize,
    count: usize,
    from: usize,
    depth: usize,
}

trait TileOperation {
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
        for (a, b) in a.chunks_exact(R).zip(b.chunks_exact(N)) {
            let mut columns = [simd.splat(0.0); V];
            for v in 0..V {
                columns[v] = simd.load(&b[v * S::LANES..]);
            }
            for r in 0..R {
                let row = simd.splat(a[r]);
                for v in 0..V {
                    sums[r][v] = simd.mul_add(row, columns[v], sums[r][v]);
                }
            }
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
#[inline(always)]
fn bf16_bits(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1))) >> 16;
    if bits & 0x7fff_ffff > 0x7f80_0000 { bits >> 16 | 0x40 } else { rounded }
}

/// Packs a part of `m` of at most `W` rows into a panel: lane `r` of step `s` is row `first + r`; rows that are missing
/// are zero.
#[inline(always)]
fn pack_panel<T: Tile, const W: usize>(tile: T, m: MatrixRef<'_>, part: Part, panel: &mut [f32]) {
    let Part { first, count, from, depth } = part;
    let start = first * m.row_stride + from * m.col_stride;
    if count == W && m.row_stride == 1 {
        // Rows lie side by side: each step is a copy.
        for (s, out) in panel.chunks_exact_mut(W).enumerate() {
            let k = s * T::PER_LANE;
            let x: &[f32] = &m.data[start + k * m.col_stride..][..W];
            if T::PER_LANE == 1 {
                out.copy_from_slice(x);
            } else if k + 1 < depth {
                let y = &m.data[start + (k + 1) * m.col_stride..][..W];
                for r in 0..W {
                    out[r] = tile.lane(x[r], y[r]);
                }
            } else {
                for r in 0..W {
                    out[r] = tile.lane(x[r], 0.0);
                }
            }
        }
    } else if count == W && m.col_stride == 1 {
        // Depth is contiguous: transpose blocks of eight lanes a row.
        const BLOCK: usize = 8;
        let whole = depth / (BLOCK * T::PER_LANE);
        for block in 0..whole {
            let mut lanes = [[0.0f32; BLOCK]; W];
            for r in 0..W {
                let at = start + r * m.row_stride + block * BLOCK * T::PER_LANE;
                let row = &m.data[at..][..BLOCK * T::PER_LANE];
                for i in 0..BLOCK {
                    lanes[r][i] = tile.lane(row[i * T::PER_LANE], row[(i + 1) * T::PER_LANE - 1]);
                }
            }
            let out = &mut panel[block * BLOCK * W..][..BLOCK * W];
            for i in 0..BLOCK {
                for r in 0..W {
                    out[i * W + r] = lanes[r][i];
                }
            }
        }
        pack_any::<T, W>(tile, m, part, whole * BLOCK, panel);
    } else {
        pack_any::<T, W>(tile, m, part, 0, panel);
    }
}

/// [`pack_panel`] for any strides, edges included, from step `step` on.
#[inline(always)]
fn pack_any<T: Tile, const W: usize>(tile: T, m: MatrixRef<'_>, part: Part, step: usize, panel: &mut [f32]) {
    let Part { first, count, from, depth } = part;
    let start = first * m.row_stride + from * m.col_stride;
    for (s, out) in panel.chunks_exact_mut(W).enumerate().skip(step) {
        let k = s * T::PER_LANE;
        for (r, lane) in out.iter_mut().enumerate() {
            *lane = if r < count {
                let at = start + r * m.row_stride + k * m.col_stride;
                let second = if T::PER_LANE == 2 && k + 1 < depth { m.data[at + m.col_stride] } else { 0.0 };
                tile.lane(m.data[at], second)
            } else {
                0.0
            };
        }
    }
}

/// Packs panels of `W` rows each of `m`; all panels are of `steps · W` lanes.
struct PackPanels<'a, const W: usize> {
    m: MatrixRef<'a>,
    part: Part,
    panels: &'a mut [f32],
}

impl<const W: usize> TileOperation for PackPanels<'_, W> {
    #[inline(always)]
    fn run<T: Tile>(self, tile: T) {
        let Part { first, count, from, depth } = self.part;
        let steps = depth.div_ceil(T::PER_LANE);
        for (index, panel) in self.panels.chunks_exact_mut(steps * W).enumerate() {
            let done = index * W;
            let part = Part { first: first + done, count: W.min(count - done), from, depth };
            pack_panel::<T, W>(tile, self.m, part, panel);
        }
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
fn with_panels<R>(
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

/// The blocked product; sizes are checked.
fn product<T: Tile>(tile: T, pool: &ThreadPool, a: MatrixRef<'_>, b: MatrixRef<'_>, c: &mut [f32], accumulate: bool) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !accumulate {
            c.fill(0.0);
        }
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
                    tile.pack_columns(b.transposed(), Part { first, count: columns.end - first, from, depth }, packed);
                });
                let packed_b = &*packed_b;
                // Enough tasks that no thread waits long for the last one.
                let column_tasks = (4 * pool.threads()).div_ceil(row_tasks).min(panels);
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
        let sizes = [(1, 1, 1), (5, 7, 3), (12, 32, 16), (13, 33, 17), (50, 65, 401), (197, 100, 385), (3, 1601, 9)];
        for threads in [1, 3] {
            let pool = ThreadPool::new(Some(threads));
            for level in ["portable", "avx2", "avx512"].into_iter().filter_map(Level::named) {
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
