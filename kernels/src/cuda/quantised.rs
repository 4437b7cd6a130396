//! Linear layers over quantised weights: activations become bytes, once for all layers of one x.

use cudarc::driver::{CudaSlice, DeviceRepr};
use std::sync::PoisonError;

use super::launch::{Argument, Grid, launch};
use super::weight::WeightArgument;
use super::{CudaBuffer, CudaDevice, CudaWeight, address, code, zeros};
use crate::device::{Activation, DeviceError, Result};
use crate::tensor::DType;

/// Layers of one launch.
pub(super) const LAYERS: usize = 3;
/// Activations that share a scale.
const BLOCK: usize = 128;
/// Up to this many rows, weights are read once each, by warps of their own.
const FEW_ROWS: usize = 8;
/// Outputs of a warp and warps of a block of cuda/matvec.cu.
const OUTPUTS: usize = 2;
const WARPS: usize = 4;
/// Rows and outputs of a block of cuda/matmul.cu, and what its stages take of shared memory.
const TILE: usize = 64;
const STAGES: usize = 3;
const STAGE_BYTES: [usize; 2] = [TILE * (64 + 16) + TILE * (32 + 16), 2 * TILE * (64 + 16)];

/// Memory for activations as bytes. It grows to the most that was ever needed.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    codes: Option<CudaSlice<i8>>,
    scales: Option<CudaSlice<f32>>,
}

/// A layer and where its output goes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Layer {
    argument: LayerArgument,
    outputs: usize,
    depth: usize,
    chunk: usize,
    four: bool,
}

/// `Layer` of cuda/quantised.cuh.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct LayerArgument {
    weight: WeightArgument,
    bias: WeightArgument,
    out: u64,
    kind: i32,
    tasks: i32,
    aligned: i32,
}

/// `Layers` of cuda/quantised.cuh.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Layers {
    layer: [LayerArgument; LAYERS],
    count: i32,
}

// SAFETY: plain numbers, laid out as the kernels' struct of the same fields.
unsafe impl DeviceRepr for Layers {}

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
        };
        Layer {
            argument,
            outputs: weight.rows(),
            depth: weight.depth(),
            chunk: weight.chunk(),
            four: weight.dtype() == DType::I4,
        }
    }
}

/// A slice of at least `len` elements; what stood there may be lost.
fn grown<'a, T: DeviceRepr + cudarc::driver::ValidAsZeroBits>(
    device: &CudaDevice,
    slice: &'a mut Option<CudaSlice<T>>,
    len: Option<usize>,
) -> Result<&'a CudaSlice<T>> {
    let enough = slice.as_ref().zip(len).is_some_and(|(slice, len)| slice.len() >= len);
    if !enough {
        // Given back first: there may be no room for both.
        *slice = None;
        *slice = Some(zeros(device, "linear", len)?);
    }
    slice.as_ref().ok_or(DeviceError::OutOfMemory { bytes: 0 })
}

/// What layers of weights that go with each other make of x `[rows, depth]`.
pub(super) fn linear(device: &CudaDevice, x: &CudaBuffer, rows: usize, layers: &[Layer]) -> Result<()> {
    const OP: &str = "linear";
    let Some(&Layer { depth, chunk, four, .. }) = layers.first() else { return Ok(()) };
    if rows == 0 {
        return Ok(());
    }
    let blocks = depth.div_ceil(BLOCK);
    let count = rows.checked_mul(blocks);
    let mut scratch = device.inner.scratch.lock().unwrap_or_else(PoisonError::into_inner);
    let Scratch { codes, scales } = &mut *scratch;
    let codes = grown(device, codes, count.and_then(|count| count.checked_mul(BLOCK)))?;
    let scales = grown(device, scales, count)?;
    let (codes, scales) = (address(codes, 0), address(scales, 0));
    let count = rows * blocks;
    let [rows_argument, blocks_argument, depth_argument] =
        [(rows, "rows"), (blocks, "blocks"), (depth, "columns")].map(|(value, what)| device.small(OP, what, value));
    let (rows_argument, blocks_argument, depth_argument) = (rows_argument?, blocks_argument?, depth_argument?);
    let grid = Grid::blocks([count.div_ceil(128 / 32), 1, 1], 128);
    let words = i32::from(four);
    run!(
        device,
        OP,
        quantise,
        grid,
        address(&x.data, 0),
        count,
        blocks_argument,
        depth_argument,
        words,
        codes,
        scales
    )?;

    let few = rows <= FEW_ROWS;
    let mut argument = Layers::default();
    let mut tasks = 0;
    for (layer, argument) in layers.iter().zip(&mut argument.layer) {
        let own = if few { layer.outputs.div_ceil(OUTPUTS) } else { layer.outputs.div_ceil(TILE) };
        *argument = layer.argument;
        argument.tasks = device.small(OP, "outputs", own)?;
        tasks += own;
    }
    argument.count = layers.len() as i32;
    if few {
        let grid = Grid::blocks([tasks.div_ceil(WARPS), 1, 1], 32 * WARPS as u32);
        let (rows, blocks) = (rows_argument, blocks_argument);
        return match (four, rows) {
            (true, 1) => run!(device, OP, matvec_i4_1, grid, codes, scales, rows, blocks, argument),
            (true, _) => run!(device, OP, matvec_i4_8, grid, codes, scales, rows, blocks, argument),
            (false, 1) => run!(device, OP, matvec_i8_1, grid, codes, scales, rows, blocks, argument),
            (false, _) => run!(device, OP, matvec_i8_8, grid, codes, scales, rows, blocks, argument),
        };
    }
    let shared = STAGES * STAGE_BYTES[usize::from(!four)];
    let grid = Grid { blocks: [tasks, rows.div_ceil(TILE), 1], threads: 128, shared };
    let chunk = chunk as i32;
    if four {
        run!(device, OP, matmul_i4, grid, codes, scales, rows_argument, blocks_argument, chunk, argument)
    } else {
        run!(device, OP, matmul_i8, grid, codes, scales, rows_argument, blocks_argument, chunk, argument)
    }
}
