//! A decoder layer of one position in one launch (cuda/decoder.cu).

use cudarc::driver::{DeviceRepr, sys};
use std::collections::HashMap;
use std::sync::PoisonError;

use super::arena::Memory;
use super::launch::{Argument, Grid, launch};
use super::layers::{self, BLOCK, FEW_ROWS, Layer, Layers, grown};
use super::weight::WeightArgument;
use super::{CudaBuffer, CudaCache, CudaDevice, CudaWeight, address, attention, replay};
use crate::check;
use crate::device::{Activation, CacheType, DecoderBuffers, DecoderLayer, DeviceError, Result};
use crate::tensor::DType;

const OP: &str = "decoder_layer";
const THREADS: u32 = 128;
/// Blocks of a multiprocessor, which together have enough loads under way; more make meetings longer.
const BLOCKS: usize = 4;
/// What every launch may have of dynamic shared memory beside what the kernel itself takes.
const MOST_SHARED: usize = 32 << 10;

/// Where blocks of a launch meet, and how many of them a GPU holds.
#[derive(Debug, Default)]
pub(super) struct Meeting {
    arrived: Option<Memory<u32>>,
    /// The position that launches take, on the GPU, and what it is if that is known here.
    position: Option<Memory<i32>>,
    known: Option<usize>,
    /// By type of weights and bytes of dynamic shared memory.
    blocks: HashMap<(DType, usize), usize>,
}

arguments! {
    /// `DecoderLayer` of cuda/decoder.cu.
    LayerArgument {
        attention: Layers,
        output: Layers,
        gated: Layers,
        down: Layers,
        norms: [WeightArgument; 2],
        x: u64,
        attended: u64,
        elements: [u64; 2],
        scales: [u64; 2],
        mean: u64,
        partial: u64,
        counters: u64,
        arrived: u64,
        frequencies: u64,
        position: u64,
        heads: i32,
        key_heads: i32,
        pairs: i32,
        capacity: i32,
        blocks: i32,
        scale: f32,
        eps: f32,
        end: i32,
    }
}

/// The type of all seven weights, if cuda/decoder.cu is for this layer and cache.
fn type_of(layer: &DecoderLayer<'_, CudaWeight>, cache: &CudaCache) -> Option<DType> {
    let dtype = layer.output.dtype();
    let weights = layer.projections.map(|(weight, _)| weight);
    let like = weights.into_iter().chain([layer.gate, layer.up, layer.down]).all(|weight| weight.dtype() == dtype);
    let [heads, key_heads] = layer.heads;
    let group = heads.checked_div(key_heads)?;
    let fits = attention::is_decoded(group, layer.head_dim) && cache.kind == CacheType::I8;
    (like && fits && dtype.is_scaled() && group * key_heads == heads).then_some(dtype)
}

/// [`crate::Device::decoder_layer`].
pub(super) fn layer(
    device: &CudaDevice,
    layer: &DecoderLayer<'_, CudaWeight>,
    buffers: DecoderBuffers<'_, CudaBuffer>,
    cache: &mut CudaCache,
    position: usize,
) -> Result<bool> {
    let Some(dtype) = type_of(layer, cache).filter(|_| !device.exact) else { return Ok(false) };
    let deepest = layer.output.depth().max(layer.down.depth()).max(layer.gate.depth());
    let blocks = deepest.div_ceil(BLOCK);
    let shared = blocks * (BLOCK + size_of::<f32>());
    if shared > MOST_SHARED {
        return Ok(false);
    }
    let argument = argument(device, layer, buffers, cache, position, blocks)?;
    let _sequence = device.sequence();
    let mut meeting = device.inner.decoder.lock().unwrap_or_else(PoisonError::into_inner);
    let count = blocks_at_once(device, &mut meeting, dtype, shared)?;
    let arrived = address(grown(device, &mut meeting.arrived, Some(1))?, 0);
    let at = set_position(device, &mut meeting, position)?;
    let argument = LayerArgument { arrived, position: at, ..argument };
    let grid = Grid { shared, cooperative: true, ..Grid::blocks([count, 1, 1], THREADS) };
    match dtype {
        DType::I4 => run!(device, OP, decoder_layer_i4, grid, argument)?,
        _ => run!(device, OP, decoder_layer_i8, grid, argument)?,
    }
    Ok(true)
}

/// What the kernel takes, with sizes checked, but for what [`Meeting`] holds.
fn argument(
    device: &CudaDevice,
    layer: &DecoderLayer<'_, CudaWeight>,
    buffers: DecoderBuffers<'_, CudaBuffer>,
    cache: &CudaCache,
    position: usize,
    blocks: usize,
) -> Result<LayerArgument> {
    let DecoderBuffers { x, query, key, value, attended, gate } = buffers;
    let ([heads, key_heads], width) = (layer.heads, layer.output.rows());
    let [of_query, of_key] = [heads, key_heads].map(|heads| heads * layer.head_dim);
    check::at_least(OP, "x", x.len, &[width])?;
    check::at_least(OP, "attended", attended.len, &[of_query])?;
    check::range(OP, "the cache", cache.capacity, position, 1)?;
    check::argument(OP, (cache.key_heads, cache.head_dim) == (key_heads, layer.head_dim), || {
        format!("{key_heads} key heads {} wide are not what the cache holds", layer.head_dim)
    })?;
    let matrix = |what, weight: &CudaWeight, rows, depth| {
        check::exactly(OP, what, weight.rows(), &[rows])?;
        check::exactly(OP, what, weight.depth(), &[depth])
    };
    let mut projections = [Layer::default(); 3];
    let outs = [(query, of_query), (key, of_key), (value, of_key)];
    for ((to, (weight, bias)), (out, outputs)) in projections.iter_mut().zip(layer.projections).zip(outs) {
        matrix("a projection", weight, outputs, width)?;
        check::at_least(OP, "a projection's buffer", out.len, &[outputs])?;
        *to = Layer::new(weight, device.bias(OP, bias, outputs)?, Activation::Identity, out);
    }
    let mlp = layer.gate.rows();
    matrix("output", layer.output, width, of_query)?;
    matrix("gate", layer.gate, mlp, width)?;
    matrix("up", layer.up, mlp, width)?;
    matrix("down", layer.down, width, mlp)?;
    check::at_least(OP, "gate's buffer", gate.len, &[mlp])?;
    check::exactly(OP, "a norm", layer.attention_norm.elements(), &[width])?;
    check::exactly(OP, "a norm", layer.mlp_norm.elements(), &[width])?;
    let arranged = |layers: &[Layer], gated| Ok::<_, DeviceError>(layers::arranged(device, FEW_ROWS, layers, gated)?.0);
    let none = WeightArgument::default();
    let gates = [(layer.gate, Activation::Silu), (layer.up, Activation::Identity)];
    let gates = gates.map(|(weight, activation)| Layer::new(weight, none, activation, gate));
    let [partial, counters] = attention::parts(device, cache, heads)?;
    let frequencies = device.frequencies(layer.head_dim, layer.theta)?;
    Ok(LayerArgument {
        attention: arranged(&projections, false)?,
        output: arranged(&[Layer::new(layer.output, none, Activation::Identity, x).added()], false)?,
        gated: arranged(&gates, true)?,
        down: arranged(&[Layer::new(layer.down, none, Activation::Identity, x).added()], false)?,
        norms: [layer.attention_norm.argument(), layer.mlp_norm.argument()],
        x: address(&x.data, 0),
        attended: address(&attended.data, 0),
        elements: cache.elements(),
        scales: cache.scales(),
        mean: cache.mean(),
        partial,
        counters,
        arrived: 0,
        frequencies: address(&frequencies, 0),
        position: 0,
        heads: device.small(OP, "heads", heads)?,
        key_heads: device.small(OP, "key heads", key_heads)?,
        pairs: device.small(OP, "pairs", layer.head_dim / 2)?,
        capacity: device.small(OP, "positions", cache.capacity)?,
        blocks: device.small(OP, "blocks", blocks)?,
        scale: layer.scale,
        eps: layer.eps,
        end: 0,
    })
}

/// What is replayed sets the position itself.
pub(super) fn forget_position(device: &CudaDevice) {
    device.inner.decoder.lock().unwrap_or_else(PoisonError::into_inner).known = None;
}

/// Where the position stands on the GPU, which becomes `position` if it is not that already.
fn set_position(device: &CudaDevice, meeting: &mut Meeting, position: usize) -> Result<u64> {
    let to = address(grown(device, &mut meeting.position, Some(1))?, 0);
    let gpu = &device.inner.gpu;
    // A run that is replayed sets it itself, and what it is on the GPU meanwhile is another matter.
    let set = replay::position(gpu, |set| set.replace(position)).unwrap_or_else(|| meeting.known.replace(position));
    if set != Some(position) {
        run!(device, OP, set_position, Grid::blocks([1, 1, 1], 32), to, position as i32)?;
    }
    Ok(to)
}

/// Blocks that the GPU holds at once, and that are enough.
fn blocks_at_once(device: &CudaDevice, meeting: &mut Meeting, dtype: DType, shared: usize) -> Result<usize> {
    use sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    if let Some(&blocks) = meeting.blocks.get(&(dtype, shared)) {
        return Ok(blocks);
    }
    let (gpu, kernels) = (&device.inner.gpu, &device.inner.kernels);
    let kernel = if dtype == DType::I4 { &kernels.decoder_layer_i4 } else { &kernels.decoder_layer_i8 };
    let failed = super::failed;
    let processors = gpu.context.attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).map_err(failed(OP, 0))?;
    let each = kernel.occupancy_max_active_blocks_per_multiprocessor(THREADS, shared, None).map_err(failed(OP, 0))?;
    let blocks = processors.max(1) as usize * (each as usize).clamp(1, BLOCKS);
    log::debug!("decoder layers of {dtype} in {blocks} blocks");
    meeting.blocks.insert((dtype, shared), blocks);
    Ok(blocks)
}
