//! Linear layers, several of one x in one launch. Where weights are quantised, activations become bytes, once for all.

use cudarc::driver::DeviceRepr;
use std::sync::PoisonError;

use super::arena::Memory;
use super::launch::{Argument, Grid, launch};
use super::weight::WeightArgument;
use super::{CudaBuffer, CudaDevice, CudaWeight, address, code, zeros};
use crate::device::{Activation, DeviceError, Result, Rounding};
use crate::tensor::DType;

const OP: &str = "linear";
/// Layers of one launch.
pub(super) const LAYERS: usize = 3;
/// Activations that share a scale.
pub(super) const BLOCK: usize = 128;
/// Up to this many rows, weights are read once each, by warps of their own.
pub(super) const FEW_ROWS: usize = 8;
/// Outputs of a warp and warps of a block of cuda/matvec.cu and cuda/float.cu.
const OUTPUTS: usize = 2;
const WARPS: usize = 4;
/// Rows and outputs of a block of cuda/matmul.cu and cuda/float.cu, and what the first's stages take of shared memory.
const TILE: usize = 64;
const STAGES: usize = 3;
const STAGE_BYTES: [usize; 2] = [TILE * (64 + 16) + TILE * (32 + 16), 2 * TILE * (64 + 16)];

/// What activations become for products with a weight of this type.
pub(crate) fn rounding(dtype: DType) -> Rounding {
    match dtype {
        DType::F16 => Rounding::Halves,
        _ if dtype.is_scaled() => Rounding::Bytes,
        _ => Rounding::None,
    }
}

/// Memory for activations as bytes. It grows to the most that was ever needed.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    codes: Option<Memory<i8>>,
    scales: Option<Memory<f32>>,
}

/// Bytes of codes and of scales of a [`Scratch`] that is large enough for `rows` rows of `depth` activations, of a weight of
/// such a type.
pub(crate) fn scratch_bytes(dtype: DType, rows: usize, depth: usize) -> [usize; 2] {
    let (blocks, scales) = match dtype {
        DType::F16 if rows > FEW_ROWS => (depth.div_ceil(BLOCK / 2), 1),
        _ if dtype.is_scaled() => (depth.div_ceil(BLOCK), depth.div_ceil(BLOCK)),
        _ => (0, 0),
    };
    [blocks * BLOCK, scales * size_of::<f32>()].map(|bytes| rows.saturating_mul(bytes))
}

/// Addresses of memory for codes and for scales, until the next operation that needs some: it is for a [`Sequence`](super::sequence::Sequence).
pub(super) fn scratch(device: &CudaDevice, codes: Option<usize>, scales: Option<usize>) -> Result<[u64; 2]> {
    let mut scratch = device.inner.scratch.lock().unwrap_or_else(PoisonError::into_inner);
    let Scratch { codes: of_codes, scales: of_scales } = &mut *scratch;
    Ok([address(grown(device, of_codes, codes)?, 0), address(grown(device, of_scales, scales)?, 0)])
}

/// Bytes of `rows` rows of `blocks` blocks.
fn of_blocks(rows: usize, blocks: usize) -> Option<usize> {
    rows.checked_mul(blocks).and_then(|count| count.checked_mul(BLOCK))
}

/// A layer and where its output goes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Layer {
    argument: LayerArgument,
    outputs: usize,
    depth: usize,
    chunk: usize,
    stored: Stored,
}

/// Which kernels a weight has.
#[derive(Clone, Copy, Debug, Default)]
enum Stored {
    #[default]
    Float,
    Half,
    Four,
    Eight,
}

/// `Layer` of cuda/layers.cuh.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct LayerArgument {
    weight: WeightArgument,
    bias: WeightArgument,
    out: u64,
    kind: i32,
    tasks: i32,
    aligned: i32,
    add: i32,
}

/// `Layers` of cuda/layers.cuh.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Layers {
    layer: [LayerArgument; LAYERS],
    count: i32,
    gated: i32,
}

// SAFETY: plain numbers, laid out as the kernels' struct of the same fields.
unsafe impl DeviceRepr for Layers {}
// No bytes between fields, as in `arguments!`.
const _: () = assert!(size_of::<Layers>() == LAYERS * (2 * size_of::<WeightArgument>() + 8 + 4 * 4) + 2 * 4);

impl Layer {
    /// `out` has as many elements as rows times outputs, `bias` none or as many as outputs.
    pub(super) fn new(weight: &CudaWeight, bias: WeightArgument, activation: Activation, out: &mut CudaBuffer) -> Self {
        let argument = LayerArgument {
            weight: weight.argument(),
            bias,
            out: address(&out.data, 0),
            kind: code(activation),
            tasks: 0,
            aligned: i32::from(weight.is_aligned()),
            add: 0,
        };
        Layer {
            argument,
            outputs: weight.rows(),
            depth: weight.depth(),
            chunk: weight.chunk(),
            stored: match weight.dtype() {
                DType::I4 => Stored::Four,
                DType::I8 => Stored::Eight,
                DType::F16 => Stored::Half,
                _ => Stored::Float,
            },
        }
    }
}

impl Layer {
    /// The same, added to what is in its output.
    pub(super) fn added(mut self) -> Self {
        self.argument.add = 1;
        self
    }
}

/// A slice of at least `len` elements; what stood there may be lost. A new one holds zeros.
pub(super) fn grown<'a, T: DeviceRepr + cudarc::driver::ValidAsZeroBits>(
    device: &CudaDevice,
    slice: &'a mut Option<Memory<T>>,
    len: Option<usize>,
) -> Result<&'a Memory<T>> {
    let enough = slice.as_ref().zip(len).is_some_and(|(slice, len)| slice.len() >= len);
    if !enough {
        // Given back first: there may be no room for both.
        *slice = None;
        *slice = Some(zeros(device, OP, len)?);
    }
    slice.as_ref().ok_or(DeviceError::OutOfMemory { bytes: 0 })
}

/// What layers of weights that go with each other make of x `[rows, depth]`.
pub(super) fn linear(device: &CudaDevice, x: &CudaBuffer, rows: usize, layers: &[Layer]) -> Result<()> {
    compute(device, x, rows, layers, false)
}

/// Whether [`gated`] does this.
pub(super) fn is_gated_at_once(rows: usize, gate: &CudaWeight, up: &CudaWeight) -> bool {
    rows <= FEW_ROWS && gate.dtype().is_scaled() && gate.goes_with(up) && gate.rows() == up.rows()
}

/// The first layer's output, its activation on it, times the second's, in the first's out.
pub(super) fn gated(device: &CudaDevice, x: &CudaBuffer, rows: usize, layers: [Layer; 2]) -> Result<()> {
    compute(device, x, rows, &layers, true)
}

/// The layers as kernels take them, and how many warps (for few rows) or blocks they are shared out to. `gated`: see [`gated`].
pub(super) fn arranged(device: &CudaDevice, rows: usize, layers: &[Layer], gated: bool) -> Result<(Layers, usize)> {
    let mut argument = Layers { gated: i32::from(gated), count: layers.len() as i32, ..Layers::default() };
    let mut tasks = 0;
    for (layer, argument) in layers.iter().zip(&mut argument.layer) {
        let own = layer.outputs.div_ceil(if rows <= FEW_ROWS { OUTPUTS } else { TILE });
        *argument = layer.argument;
        argument.tasks = device.small(OP, "outputs", own)?;
        tasks += own;
    }
    if let (true, Some(first)) = (gated, layers.first()) {
        // A warp takes an output of both.
        (tasks, argument.count) = (first.outputs, 1);
        argument.layer[0].tasks = device.small(OP, "outputs", tasks)?;
    }
    Ok((argument, tasks))
}

fn compute(device: &CudaDevice, x: &CudaBuffer, rows: usize, layers: &[Layer], gated: bool) -> Result<()> {
    let Some(&Layer { stored, .. }) = layers.first() else { return Ok(()) };
    let (argument, tasks) = arranged(device, rows, layers, gated)?;
    let grid = if rows <= FEW_ROWS {
        Grid::blocks([if rows == 0 { 0 } else { tasks.div_ceil(WARPS) }, 1, 1], 32 * WARPS as u32)
    } else {
        Grid::blocks([tasks, rows.div_ceil(TILE), 1], 128)
    };
    // Few blocks of a weight's rows are no work for tensor cores, and before sm_80 there are none of this kind.
    let tensor_cores = rows > FEW_ROWS && device.inner.gpu.capability.0 >= 8;
    let halves = layers.iter().all(|layer| matches!(layer.stored, Stored::Half));
    match stored {
        Stored::Half if tensor_cores && halves => of_halves(device, x, rows, layers, grid, argument),
        Stored::Float | Stored::Half => {
            let (x, count) = (address(&x.data, 0), device.small(OP, "rows", rows)?);
            match rows {
                0 | 1 => run!(device, OP, float_matvec_1, grid, x, count, argument),
                2..=FEW_ROWS => run!(device, OP, float_matvec_8, grid, x, count, argument),
                _ => run!(device, OP, float_matmul, grid, x, count, argument),
            }
        }
        Stored::Four => of_bytes(device, x, rows, layers, grid, argument, true),
        Stored::Eight => of_bytes(device, x, rows, layers, grid, argument, false),
    }
}

/// [`linear`] of layers in f16 over many rows: x becomes f16 too.
fn of_halves(
    device: &CudaDevice,
    x: &CudaBuffer,
    rows: usize,
    layers: &[Layer],
    grid: Grid,
    argument: Layers,
) -> Result<()> {
    let Some(&Layer { depth, .. }) = layers.first() else { return Ok(()) };
    let blocks = depth.div_ceil(BLOCK / 2);
    let _sequence = device.sequence();
    let [halves, scales] = scratch(device, of_blocks(rows, blocks), Some(rows))?;
    let (x, depth) = (address(&x.data, 0), device.small(OP, "columns", depth)?);
    let (total, blocks) = (device.small(OP, "rows", rows)?, device.small(OP, "blocks", blocks)?);
    run!(device, OP, to_half, Grid::blocks([rows, 1, 1], 128), x, blocks, depth, halves, scales)?;
    let grid = Grid { shared: STAGES * STAGE_BYTES[1], ..grid };
    run!(device, OP, matmul_f16, grid, halves, scales, total, blocks, argument)
}

/// [`linear`] of quantised layers.
fn of_bytes(
    device: &CudaDevice,
    x: &CudaBuffer,
    rows: usize,
    layers: &[Layer],
    grid: Grid,
    argument: Layers,
    four: bool,
) -> Result<()> {
    let Some(&Layer { depth, chunk, .. }) = layers.first().filter(|_| rows > 0) else { return Ok(()) };
    let blocks = depth.div_ceil(BLOCK);
    let count = rows.checked_mul(blocks).ok_or(DeviceError::OutOfMemory { bytes: usize::MAX })?;
    let _sequence = device.sequence();
    let [codes, scales] = scratch(device, of_blocks(rows, blocks), Some(count))?;
    let (depth, words) = (device.small(OP, "columns", depth)?, i32::from(four));
    let (total, blocks) = (device.small(OP, "rows", rows)?, device.small(OP, "blocks", blocks)?);
    let quantise_grid = Grid::blocks([count.div_ceil(128 / 32), 1, 1], 128);
    run!(device, OP, quantise, quantise_grid, address(&x.data, 0), count, blocks, depth, words, codes, scales)?;
    if rows <= FEW_ROWS {
        return match (four, rows) {
            (true, 1) => run!(device, OP, matvec_i4_1, grid, codes, scales, total, blocks, argument),
            (true, _) => run!(device, OP, matvec_i4_8, grid, codes, scales, total, blocks, argument),
            (false, 1) => run!(device, OP, matvec_i8_1, grid, codes, scales, total, blocks, argument),
            (false, _) => run!(device, OP, matvec_i8_8, grid, codes, scales, total, blocks, argument),
        };
    }
    let grid = Grid { shared: STAGES * STAGE_BYTES[usize::from(!four)], ..grid };
    let chunk = chunk as i32;
    if four {
        run!(device, OP, matmul_i4, grid, codes, scales, total, blocks, chunk, argument)
    } else {
        run!(device, OP, matmul_i8, grid, codes, scales, total, blocks, chunk, argument)
    }
}
