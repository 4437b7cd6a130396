//! The CUDA device: hand-written kernels (cuda/*.cu), launched one after another on one stream.
//!
//! This file checks sizes and launches; what runs on the GPU is in cuda/.

/// Launches kernel `$kernel` with arguments that are its own, in number and type.
macro_rules! run {
    ($device:expr, $op:expr, $kernel:ident, $grid:expr, $($argument:expr),+ $(,)?) => {{
        let inner = &*$device.inner;
        // SAFETY: each call stands beside the sizes it was checked for, and names the kernel's arguments in their order; the
        // memory is kept by buffers, weights and caches, which give it back in the order of the stream.
        unsafe { launch(&inner.gpu, $op, &inner.kernels.$kernel, $grid, [$(Argument::new(&$argument)),+]) }
    }};
}

/// Structs that kernels take, laid out as theirs.
macro_rules! arguments {
    ($($(#[$about:meta])* $name:ident { $($field:ident: $kind:ty),* $(,)? })*) => {$(
        $(#[$about])*
        #[derive(Clone, Copy, Debug)]
        #[repr(C)]
        struct $name { $($field: $kind),* }
        // SAFETY: plain numbers, laid out as the kernels' struct of the same fields.
        unsafe impl DeviceRepr for $name {}
        // All bytes are read where launches are compared (replay.rs): there are none between fields.
        const _: () = assert!(size_of::<$name>() == 0 $(+ size_of::<$kind>())*);
    )*};
}

pub(crate) mod arena;
pub(crate) mod attention;
mod cache;
mod compile;
mod decoder;
mod driver;
pub mod images;
mod launch;
pub(crate) mod layers;
pub mod ledger;
mod mel;
pub(crate) mod pixels;
mod replay;
mod residence;
mod roof;
mod sample;
mod self_test;
mod sequence;
mod weight;

pub use cache::CudaCache;
pub use compile::CompileError;
pub use driver::{CudaError, Found, missing_library};
pub use replay::CudaReplay;
pub use weight::CudaWeight;

use cudarc::driver::DeviceRepr;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::check;
use crate::choice::{Allowed, Choice};
use crate::device::{
    Activation, AttentionShape, CacheType, DecoderBuffers, DecoderLayer, Device, DeviceError, Result, Rounding, Unfold,
    rope_frequencies,
};
use crate::pixels::Picture;
use crate::tensor::HostTensor;
use arena::Memory;
use driver::{Gpu, failed};
use launch::{Argument, Grid, Kernels, launch};
use layers::{Layer, Scratch};
use residence::Residence;
use sequence::{Sequence, Sequences};
use weight::WeightArgument;

/// Keys whose mean stands for that of all, as in the CPU's caches.
const MEAN_OF: usize = 16;

/// A GPU as a device; clones share it.
#[derive(Clone, Debug)]
pub struct CudaDevice {
    inner: Arc<Inner>,
    exact: bool,
}

#[derive(Debug)]
struct Inner {
    gpu: Gpu,
    kernels: Kernels,
    sequences: Sequences,
    frequencies: Mutex<Frequencies>,
    /// Activations as bytes.
    scratch: Mutex<Scratch>,
    parts: Mutex<attention::Parts>,
    decoder: Mutex<decoder::Meeting>,
    pictures: Mutex<pixels::Kept>,
    choosing: Mutex<sample::Choosing>,
    mel: Mutex<mel::Parts>,
    weights: Mutex<Residence>,
}

/// Frequencies of rotary positions by head width and bits of theta.
type Frequencies = HashMap<(usize, u32), Arc<Memory<f32>>>;

/// f32 activations on the GPU.
#[derive(Debug)]
pub struct CudaBuffer {
    data: Memory<f32>,
    len: usize,
}

arguments! {
    /// `Ids` of cuda/elementwise.cu.
    Ids { id: [u32; 64] }
    /// `Parts` of cuda/elementwise.cu.
    Parts { part: [u64; 8], weight: [f32; 8] }
    /// `Unfold` of cuda/convolution.cu.
    UnfoldArgument {
        size: [i32; 3], kernel: [i32; 3], stride: [i32; 3], pad_before: [i32; 3], output: [i32; 3], channels: i32,
    }
    /// `Turn` of cuda/cache.cu.
    Turn { heads: i32, key_heads: i32, pairs: i32, first: i32, frequencies: u64 }
}

/// The address of element `offset` of memory.
fn address<T: DeviceRepr>(memory: &Memory<T>, offset: usize) -> u64 {
    memory.address(offset)
}

/// `len` zeros; an error where the count overflowed or there is no memory.
fn zeros<T: DeviceRepr + cudarc::driver::ValidAsZeroBits>(
    device: &CudaDevice,
    op: &'static str,
    len: Option<usize>,
) -> Result<Memory<T>> {
    let too_many = DeviceError::OutOfMemory { bytes: usize::MAX };
    let bytes = len.and_then(|len| len.checked_mul(size_of::<T>())).filter(|&bytes| bytes <= isize::MAX as usize);
    let (Some(len), Some(bytes)) = (len, bytes) else { return Err(too_many) };
    let mut memory = Memory::new(&device.inner.gpu.stream, len).map_err(failed(op, bytes))?;
    memory.clear().map_err(failed(op, bytes))?;
    Ok(memory)
}

/// The kernels' number of an activation.
fn code(activation: Activation) -> i32 {
    match activation {
        Activation::Identity => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
        Activation::Silu => 3,
        Activation::Sigmoid => 4,
        Activation::Tanh => 5,
        Activation::Relu => 6,
    }
}

impl CudaDevice {
    /// Opens GPU number `ordinal` with kernels that `image` gives by the names of the files of cuda/, as cubins or PTX.
    ///
    /// # Errors
    /// Those of [`CudaDevice::all`], [`CudaError::OutOfMemory`], and what `image` or the driver says of an image.
    pub fn with_images(
        ordinal: usize,
        image: impl Fn(&str) -> std::result::Result<Vec<u8>, CudaError>,
    ) -> std::result::Result<Self, CudaError> {
        Self::with_gpu(driver::open(ordinal)?, &image)
    }

    fn with_gpu(gpu: Gpu, image: &launch::Images<'_>) -> std::result::Result<Self, CudaError> {
        let kernels = Kernels::load(&gpu, image)?;
        let inner = Inner {
            gpu,
            kernels,
            frequencies: Mutex::default(),
            sequences: Sequences::default(),
            scratch: Mutex::default(),
            parts: Mutex::default(),
            decoder: Mutex::default(),
            pictures: Mutex::default(),
            choosing: Mutex::default(),
            mel: Mutex::default(),
            weights: Mutex::default(),
        };
        Ok(CudaDevice { inner: Arc::new(inner), exact: false })
    }

    /// The same with activations in f32 everywhere: slower, and exact but for the rounding of sums. Otherwise activations are
    /// rounded to bytes where weights are quantised.
    pub fn exact(mut self) -> Self {
        self.exact = true;
        self
    }

    /// Every GPU that the driver names.
    ///
    /// # Errors
    /// [`CudaError::NoDriver`], [`CudaError::DriverTooOld`] or [`CudaError::NoDevice`], or what else the driver says.
    pub fn all() -> std::result::Result<Vec<Found>, CudaError> {
        driver::all()
    }

    /// Opens GPU number `ordinal` with the kernels of this program, or with kernels that are compiled for it here, and runs each
    /// once ([`CudaDevice::self_test`]).
    ///
    /// # Errors
    /// Those of [`CudaDevice::with_images`] and of the self-test; [`CudaError::Architecture`] where there are no kernels for the
    /// GPU and none can be made.
    pub fn open(ordinal: usize) -> std::result::Result<Self, CudaError> {
        let gpu = driver::open(ordinal)?;
        if let Some(architecture) = images::find(gpu.capability) {
            log::info!("{}: the kernels for {architecture} of this program", gpu.name);
            return Self::with_gpu(gpu, &|family| Ok(images::cubin(architecture, family)?))?.tested();
        }
        let compiler = compile::Compiler::find(gpu.capability, gpu.driver).map_err(|error| {
            let built = images::architectures().iter().map(|number| format!("sm_{number}")).collect::<Vec<_>>();
            CudaError::Architecture {
                name: gpu.name.clone(),
                capability: gpu.capability,
                built: if built.is_empty() { "no GPU".to_owned() } else { built.join(", ") },
                hint: format!("they cannot be made here: {error}; `make cuda` builds a program with all of them"),
            }
        })?;
        Self::with_gpu(gpu, &|family| Ok(compiler.image(family)?))?.tested()
    }

    fn tested(self) -> std::result::Result<Self, CudaError> {
        self.self_test()?;
        Ok(self)
    }

    /// The names of the files of cuda/ that kernels come from.
    pub fn families() -> &'static [&'static str] {
        launch::FAMILIES
    }

    /// `value` as kernels count.
    fn small(&self, op: &'static str, what: &str, value: usize) -> Result<i32> {
        let reason = || format!("{value} {what} are more than kernels count");
        i32::try_from(value).map_err(|_| DeviceError::Argument { op, reason: reason() })
    }

    /// Values on the GPU.
    fn upload<T: DeviceRepr>(&self, op: &'static str, values: &[T]) -> Result<Memory<T>> {
        let bytes = size_of_val(values);
        let mut memory = Memory::new(&self.inner.gpu.stream, values.len()).map_err(failed(op, bytes))?;
        memory.write(0, values).map_err(failed(op, bytes))?;
        Ok(memory)
    }

    /// The weights' places. One that a thread panicked over holds no half of a weight.
    fn residence(&self) -> MutexGuard<'_, Residence> {
        self.inner.weights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The frequencies of rotary positions, `[head_dim / 2]`.
    /// Launches of other threads that share memory with this one come when it is dropped.
    fn sequence(&self) -> Sequence<'_> {
        self.inner.sequences.take()
    }

    fn frequencies(&self, head_dim: usize, theta: f32) -> Result<Arc<Memory<f32>>> {
        let mut known = self.inner.frequencies.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(frequencies) = known.get(&(head_dim, theta.to_bits())) {
            return Ok(frequencies.clone());
        }
        let values: Vec<f32> = rope_frequencies(head_dim, theta).collect();
        let data = Arc::new(self.upload("rope", &values)?);
        known.insert((head_dim, theta.to_bits()), data.clone());
        Ok(data)
    }

    /// A bias of `outputs` elements, or none.
    fn bias(&self, op: &'static str, bias: Option<&CudaWeight>, outputs: usize) -> Result<WeightArgument> {
        let Some(bias) = bias else { return Ok(WeightArgument::default()) };
        check::exactly(op, "bias", bias.elements(), &[outputs])?;
        Ok(bias.argument())
    }
}

impl Device for CudaDevice {
    type Buffer = CudaBuffer;
    type Weight = CudaWeight;
    type Cache = CudaCache;
    type Replay = CudaReplay;

    fn replay(&self, replay: &mut CudaReplay, operations: impl FnOnce() -> Result<()>) -> Result<()> {
        replay::replay(&self.inner.gpu, replay, operations, |position| {
            let sequence = self.sequence();
            if position.is_some() {
                decoder::forget_position(self);
            }
            sequence
        })
    }

    fn describe(&self) -> String {
        let Gpu { name, capability: (major, minor), driver, integrated, .. } = &self.inner.gpu;
        let memory = if *integrated { ", memory shared with the processor" } else { "" };
        let exact = if self.exact { ", exact" } else { "" };
        format!("{name} (sm_{major}{minor}{memory}){exact}, CUDA {}.{} driver", driver / 1000, driver % 1000 / 10)
    }

    fn allocate(&self, len: usize) -> Result<CudaBuffer> {
        Ok(CudaBuffer { data: zeros(self, "allocate", Some(len))?, len })
    }

    fn len(&self, buffer: &CudaBuffer) -> usize {
        buffer.len
    }

    fn write(&self, data: &[f32], to: &mut CudaBuffer, offset: usize) -> Result<()> {
        check::range("write", "to", to.len, offset, data.len())?;
        replay::refuse(&self.inner.gpu, "write")?;
        if data.is_empty() {
            return Ok(());
        }
        to.data.write(offset, data).map_err(failed("write", 0))
    }

    fn read(&self, from: &CudaBuffer, offset: usize, out: &mut [f32]) -> Result<()> {
        check::range("read", "from", from.len, offset, out.len())?;
        replay::refuse(&self.inner.gpu, "read")?;
        if out.is_empty() {
            return Ok(());
        }
        from.data.read(offset, out).map_err(failed("read", 0))
    }

    fn wait(&self) -> Result<()> {
        replay::refuse(&self.inner.gpu, "wait")?;
        self.inner.gpu.stream.synchronize().map_err(failed("wait", 0))
    }

    fn copy(
        &self,
        from: &CudaBuffer,
        from_offset: usize,
        to: &mut CudaBuffer,
        to_offset: usize,
        len: usize,
    ) -> Result<()> {
        check::range("copy", "from", from.len, from_offset, len)?;
        check::range("copy", "to", to.len, to_offset, len)?;
        run!(self, "copy", copy, Grid::each(len), address(&from.data, from_offset), address(&to.data, to_offset), len)
    }

    fn loading(&self, bytes: usize) {
        self.residence().begin(&self.inner.gpu, bytes);
    }

    fn loaded(&self) -> Result<()> {
        self.residence().end(&self.inner.gpu).map_err(failed("loaded", 0))
    }

    fn weight(&self, tensor: &HostTensor) -> Result<CudaWeight> {
        CudaWeight::place(self, tensor)
    }

    fn weight_rows(&self, weight: &CudaWeight, first: usize, count: usize) -> Result<CudaWeight> {
        let rows = weight.rows();
        check::argument("weight_rows", first.checked_add(count).is_some_and(|end| end <= rows), || {
            format!("rows from {first} on, {count} of them, of a weight of {rows}")
        })?;
        Ok(weight.view(first, count))
    }

    fn embed(&self, table: &CudaWeight, ids: &[u32], out: &mut CudaBuffer, offset: usize) -> Result<()> {
        let (rows, width) = (table.rows(), table.depth());
        for &id in ids {
            check::argument("embed", (id as usize) < rows, || format!("id {id} in a table of {rows} rows"))?;
        }
        let len = check::at_least("embed", "out", usize::MAX, &[ids.len(), width])?;
        check::range("embed", "out", out.len, offset, len)?;
        let mut to = offset;
        for ids in ids.chunks(64) {
            let mut argument = Ids { id: [0; 64] };
            argument.id[..ids.len()].copy_from_slice(ids);
            let (count, out) = (ids.len() as i32, address(&out.data, to));
            run!(self, "embed", embed, Grid::each(ids.len() * width), table.argument(), argument, count, out)?;
            to += ids.len() * width;
        }
        Ok(())
    }

    fn linear(
        &self,
        x: &CudaBuffer,
        rows: usize,
        weight: &CudaWeight,
        bias: Option<&CudaWeight>,
        activation: Activation,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        let (outputs, depth) = (weight.rows(), weight.depth());
        check::at_least("linear", "x", x.len, &[rows, depth])?;
        let len = check::at_least("linear", "out", out.len, &[rows, outputs])?;
        let bias = self.bias("linear", bias, outputs)?;
        if !self.exact {
            return layers::linear(self, x, rows, &[Layer::new(weight, bias, activation, out)]);
        }
        let grid = Grid::blocks([len.div_ceil(128), 1, 1], 128);
        let (x, out) = (address(&x.data, 0), address(&out.data, 0));
        run!(self, "linear", linear, grid, x, rows, weight.argument(), bias, code(activation), out)
    }

    fn linear_each(
        &self,
        x: &CudaBuffer,
        rows: usize,
        layers: &[(&CudaWeight, Option<&CudaWeight>, Activation)],
        outs: &mut [&mut CudaBuffer],
    ) -> Result<()> {
        const OP: &str = "linear_each";
        let first = layers.first().map(|layer| layer.0);
        let together = |weight: &CudaWeight| !self.exact && first.is_some_and(|first| first.goes_with(weight));
        if layers.len() > layers::LAYERS || outs.len() < layers.len() || !layers.iter().all(|layer| together(layer.0)) {
            for (&(weight, bias, activation), out) in layers.iter().zip(outs) {
                self.linear(x, rows, weight, bias, activation, out)?;
            }
            return Ok(());
        }
        check::at_least(OP, "x", x.len, &[rows, first.map_or(0, CudaWeight::depth)])?;
        let mut ready = [Layer::default(); layers::LAYERS];
        for ((&(weight, bias, activation), out), ready) in layers.iter().zip(outs).zip(&mut ready) {
            check::at_least(OP, "out", out.len, &[rows, weight.rows()])?;
            *ready = Layer::new(weight, self.bias(OP, bias, weight.rows())?, activation, out);
        }
        layers::linear(self, x, rows, &ready[..layers.len()])
    }

    fn linear_add(
        &self,
        y: &CudaBuffer,
        rows: usize,
        weight: &CudaWeight,
        bias: Option<&CudaWeight>,
        len: usize,
        scratch: &mut CudaBuffer,
        x: &mut CudaBuffer,
    ) -> Result<()> {
        const OP: &str = "linear_add";
        let (outputs, depth) = (weight.rows(), weight.depth());
        check::at_least(OP, "y", y.len, &[rows, depth])?;
        check::exactly(OP, "the output", len, &[rows, outputs])?;
        check::at_least(OP, "x", x.len, &[len])?;
        if self.exact {
            self.linear(y, rows, weight, bias, Activation::Identity, scratch)?;
            return self.add(x, scratch, len);
        }
        let layer = Layer::new(weight, self.bias(OP, bias, outputs)?, Activation::Identity, x).added();
        layers::linear(self, y, rows, &[layer])
    }

    fn linear_gated(
        &self,
        x: &CudaBuffer,
        rows: usize,
        gate: &CudaWeight,
        up: &CudaWeight,
        activation: Activation,
        len: usize,
        scratch: &mut CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        const OP: &str = "linear_gated";
        check::at_least(OP, "x", x.len, &[rows, gate.depth()])?;
        check::exactly(OP, "the output", len, &[rows, gate.rows()])?;
        check::at_least(OP, "out", out.len, &[len])?;
        if self.exact || !layers::is_gated_at_once(rows, gate, up) {
            let layers = [(gate, None, activation), (up, None, Activation::Identity)];
            self.linear_each(x, rows, &layers, &mut [&mut *out, &mut *scratch])?;
            return self.multiply(out, scratch, len);
        }
        let none = WeightArgument::default();
        let up = Layer::new(up, none, Activation::Identity, scratch);
        layers::gated(self, x, rows, [Layer::new(gate, none, activation, out), up])
    }

    fn layer_norm(
        &self,
        x: &CudaBuffer,
        rows: usize,
        weight: &CudaWeight,
        bias: &CudaWeight,
        eps: f32,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        let width = weight.elements();
        check::exactly("layer_norm", "bias", bias.elements(), &[width])?;
        let len = check::at_least("layer_norm", "x", x.len, &[rows, width])?;
        check::at_least("layer_norm", "out", out.len, &[len])?;
        let (x, out, width) = (address(&x.data, 0), address(&out.data, 0), self.small("layer_norm", "columns", width)?);
        let grid = Grid::blocks([rows, 1, 1], 128);
        run!(self, "layer_norm", layer_norm, grid, x, width, weight.argument(), bias.argument(), eps, out)
    }

    fn rms_norm(&self, x: &CudaBuffer, rows: usize, weight: &CudaWeight, eps: f32, out: &mut CudaBuffer) -> Result<()> {
        let width = weight.elements();
        let len = check::at_least("rms_norm", "x", x.len, &[rows, width])?;
        check::at_least("rms_norm", "out", out.len, &[len])?;
        let (x, out, width) = (address(&x.data, 0), address(&out.data, 0), self.small("rms_norm", "columns", width)?);
        run!(self, "rms_norm", rms_norm, Grid::blocks([rows, 1, 1], 128), x, width, weight.argument(), eps, out)
    }

    fn activate(&self, activation: Activation, x: &mut CudaBuffer, len: usize) -> Result<()> {
        check::at_least("activate", "x", x.len, &[len])?;
        run!(self, "activate", activate, Grid::each(len), address(&x.data, 0), len, code(activation))
    }

    fn add(&self, x: &mut CudaBuffer, y: &CudaBuffer, len: usize) -> Result<()> {
        check::at_least("add", "x", x.len, &[len])?;
        check::at_least("add", "y", y.len, &[len])?;
        run!(self, "add", add, Grid::each(len), address(&x.data, 0), address(&y.data, 0), len)
    }

    fn multiply(&self, x: &mut CudaBuffer, y: &CudaBuffer, len: usize) -> Result<()> {
        check::at_least("multiply", "x", x.len, &[len])?;
        check::at_least("multiply", "y", y.len, &[len])?;
        run!(self, "multiply", multiply, Grid::each(len), address(&x.data, 0), address(&y.data, 0), len)
    }

    fn add_positions(&self, x: &mut CudaBuffer, rows: usize, table: &CudaWeight, first: usize) -> Result<()> {
        let (table_rows, width) = (table.rows(), table.depth());
        let len = check::at_least("add_positions", "x", x.len, &[rows, width])?;
        check::argument("add_positions", len == 0 || table_rows > 0, || "the table has no rows".to_owned())?;
        let first = self.small("add_positions", "rows", first.checked_rem(table_rows).unwrap_or(0))?;
        run!(self, "add_positions", add_positions, Grid::each(len), address(&x.data, 0), len, table.argument(), first)
    }

    fn softmax(&self, x: &CudaBuffer, rows: usize, width: usize, out: &mut CudaBuffer) -> Result<()> {
        let len = check::at_least("softmax", "x", x.len, &[rows, width])?;
        check::at_least("softmax", "out", out.len, &[len])?;
        let (x, out, columns) = (address(&x.data, 0), address(&out.data, 0), self.small("softmax", "columns", width)?);
        let rows = if width == 0 { 0 } else { rows };
        run!(self, "softmax", softmax, Grid::blocks([rows, 1, 1], 128), x, columns, out)
    }

    fn rope(
        &self,
        x: &mut CudaBuffer,
        rows: usize,
        heads: usize,
        head_dim: usize,
        first: usize,
        theta: f32,
    ) -> Result<()> {
        const OP: &str = "rope";
        check::at_least(OP, "x", x.len, &[rows, heads, head_dim])?;
        check::argument(OP, head_dim.is_multiple_of(2), || format!("head width {head_dim} is odd"))?;
        let end = first.checked_add(rows).filter(|&end| i32::try_from(end).is_ok());
        check::argument(OP, end.is_some(), || format!("position {first} is too large"))?;
        let frequencies = self.frequencies(head_dim, theta)?;
        let grid = Grid::blocks([(rows * head_dim / 2).div_ceil(128), 1, 1], 128);
        let (x, frequencies) = (address(&x.data, 0), address(&frequencies, 0));
        let (heads, pairs) = (self.small(OP, "heads", heads)?, self.small(OP, "pairs", head_dim / 2)?);
        run!(self, OP, rope, grid, x, rows, heads, pairs, first as i32, frequencies)
    }

    fn attention(
        &self,
        q: &CudaBuffer,
        k: &CudaBuffer,
        v: &CudaBuffer,
        shape: AttentionShape,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        const OP: &str = "attention";
        let AttentionShape { batch, queries, keys, heads, key_heads, head_dim, .. } = shape;
        let q_len = check::at_least(OP, "q", q.len, &[batch, queries, heads, head_dim])?;
        let k_len = check::at_least(OP, "k", k.len, &[batch, keys, key_heads, head_dim])?;
        check::at_least(OP, "v", v.len, &[k_len])?;
        check::at_least(OP, "out", out.len, &[q_len])?;
        if q_len == 0 {
            return Ok(());
        }
        check::attention(OP, &shape)?;
        attention::attention(self, [q, k, v], shape, out)
    }

    fn rounding(&self, weight: &CudaWeight) -> Rounding {
        if self.exact { Rounding::None } else { layers::rounding(weight.dtype()) }
    }

    fn cache(&self, kind: CacheType, capacity: usize, key_heads: usize, head_dim: usize) -> Result<CudaCache> {
        check::argument("cache", head_dim <= attention::WIDEST_HEAD, || {
            format!("heads of {head_dim} are too wide; {} is the most", attention::WIDEST_HEAD)
        })?;
        CudaCache::new(self, kind, capacity, key_heads, head_dim)
    }

    fn cache_write(
        &self,
        k: &CudaBuffer,
        v: &CudaBuffer,
        rows: usize,
        cache: &mut CudaCache,
        first: usize,
    ) -> Result<()> {
        const OP: &str = "cache_write";
        let len = check::at_least(OP, "k", k.len, &[rows, cache.width()])?;
        check::at_least(OP, "v", v.len, &[len])?;
        check::range(OP, "the cache", cache.capacity, first, rows)?;
        let (k, v) = (address(&k.data, 0), address(&v.data, 0));
        let heads = self.small(OP, "key heads", cache.key_heads)?;
        let capacity = self.small(OP, "positions", cache.capacity)?;
        let (width, first) = (cache.head_dim as i32, first as i32);
        let [keys, values] = cache.elements();
        match cache.kind {
            CacheType::F32 => {
                let grid = Grid::each(len);
                run!(self, OP, cache_write_f32, grid, k, v, rows, heads, width, capacity, first, keys, values)
            }
            CacheType::F16 => {
                let grid = Grid::each(len);
                run!(self, OP, cache_write_f16, grid, k, v, rows, heads, width, capacity, first, keys, values)
            }
            CacheType::I8 => {
                let grid = Grid::blocks([rows, cache.key_heads, 1], 32);
                let (averaged, mean) = (rows.min(MEAN_OF) as i32, cache.mean());
                let [key_scales, value_scales] = cache.scales();
                run!(
                    self,
                    OP,
                    cache_write_i8,
                    grid,
                    k,
                    v,
                    heads,
                    width,
                    capacity,
                    first,
                    averaged,
                    mean,
                    keys,
                    key_scales,
                    values,
                    value_scales,
                )
            }
        }
    }

    fn rope_and_write(
        &self,
        q: &mut CudaBuffer,
        k: &mut CudaBuffer,
        v: &CudaBuffer,
        rows: usize,
        heads: [usize; 2],
        head_dim: usize,
        cache: &mut CudaCache,
        first: usize,
        theta: f32,
    ) -> Result<()> {
        const OP: &str = "rope_and_write";
        check::at_least(OP, "q", q.len, &[rows, heads[0], head_dim])?;
        let len = check::at_least(OP, "k", k.len, &[rows, heads[1], head_dim])?;
        check::at_least(OP, "v", v.len, &[len])?;
        check::range(OP, "the cache", cache.capacity, first, rows)?;
        check::argument(OP, head_dim.is_multiple_of(2), || format!("head width {head_dim} is odd"))?;
        check::argument(OP, (cache.key_heads, cache.head_dim) == (heads[1], head_dim), || {
            format!("{} key heads {head_dim} wide are not what the cache holds", heads[1])
        })?;
        let capacity = self.small(OP, "positions", cache.capacity)?;
        let frequencies = self.frequencies(head_dim, theta)?;
        let turn = Turn {
            heads: self.small(OP, "heads", heads[0])?,
            key_heads: self.small(OP, "key heads", heads[1])?,
            pairs: self.small(OP, "pairs", head_dim / 2)?,
            first: first as i32,
            frequencies: address(&frequencies, 0),
        };
        let grid = Grid::blocks([rows, heads[0] + heads[1], 1], 32);
        let [q, k, v] = [&q.data, &k.data, &v.data].map(|slice| address(slice, 0));
        let [keys, values] = cache.elements();
        match cache.kind {
            CacheType::F32 => run!(self, OP, rope_write_f32, grid, q, k, v, turn, capacity, keys, values),
            CacheType::F16 => run!(self, OP, rope_write_f16, grid, q, k, v, turn, capacity, keys, values),
            CacheType::I8 => {
                let (averaged, mean) = (rows.min(MEAN_OF) as i32, cache.mean());
                let [of_keys, of_values] = cache.scales();
                run!(
                    self,
                    OP,
                    rope_write_i8,
                    grid,
                    q,
                    k,
                    v,
                    turn,
                    capacity,
                    averaged,
                    mean,
                    keys,
                    of_keys,
                    values,
                    of_values
                )
            }
        }
    }

    fn cache_copy(&self, from: &CudaCache, to: &mut CudaCache, positions: usize) -> Result<()> {
        const OP: &str = "cache_copy";
        let fits = from.is_like(to) && positions <= from.capacity.min(to.capacity);
        check::argument(OP, fits, || {
            format!("{positions} positions do not fit, or the caches are not of one type, heads and width")
        })?;
        replay::refuse(&self.inner.gpu, OP)?;
        let (heads, of_from, of_to) = (from.key_heads, from.capacity, to.capacity);
        for part in from.parts(to) {
            let (len, of_from, of_to) = if part.whole { (1, 1, 1) } else { (positions, of_from, of_to) };
            if len * part.position == 0 {
                continue;
            }
            for head in 0..heads {
                let [from, to] = [of_from, of_to].map(|positions| head * positions * part.position);
                part.from.copy(from, part.to, to, len * part.position).map_err(failed(OP, 0))?;
            }
        }
        Ok(())
    }

    fn cache_attention(
        &self,
        q: &CudaBuffer,
        cache: &CudaCache,
        shape: AttentionShape,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        const OP: &str = "cache_attention";
        let AttentionShape { batch, queries, keys, heads, key_heads, head_dim, .. } = shape;
        let q_len = check::at_least(OP, "q", q.len, &[queries, heads, head_dim])?;
        check::at_least(OP, "out", out.len, &[q_len])?;
        check::range(OP, "the cache", cache.capacity, 0, keys)?;
        if q_len == 0 {
            return Ok(());
        }
        check::attention(OP, &shape)?;
        let fits = batch == 1 && (cache.key_heads, cache.head_dim) == (key_heads, head_dim);
        check::argument(OP, fits, || {
            format!("{batch} sequences of {key_heads} key heads {head_dim} wide are not what the cache holds")
        })?;
        attention::cache_attention(self, q, cache, shape, out)
    }

    fn decoder_layer(
        &self,
        layer: &DecoderLayer<'_, CudaWeight>,
        buffers: DecoderBuffers<'_, CudaBuffer>,
        cache: &mut CudaCache,
        position: usize,
    ) -> Result<bool> {
        decoder::layer(self, layer, buffers, cache, position)
    }

    fn unfold(&self, x: &CudaBuffer, unfold: Unfold, out: &mut CudaBuffer) -> Result<()> {
        const OP: &str = "unfold";
        let output = check::unfold(&unfold)?;
        let ([t, h, w], [kt, kh, kw]) = (unfold.size, unfold.kernel);
        check::at_least(OP, "x", x.len, &[t, h, w, unfold.channels])?;
        let dims = [output[0], output[1], output[2], unfold.channels, kt, kh, kw];
        let len = check::at_least(OP, "out", out.len, &dims)?;
        let three = |values: [usize; 3]| -> Result<[i32; 3]> {
            let [a, b, c] = values.map(|value| self.small(OP, "elements of an axis", value));
            Ok([a?, b?, c?])
        };
        let argument = UnfoldArgument {
            size: three(unfold.size)?,
            kernel: three(unfold.kernel)?,
            // A step larger than the input is taken once.
            stride: three(unfold.stride)?,
            pad_before: three(unfold.pad_before)?,
            output: three(output)?,
            channels: self.small(OP, "channels", unfold.channels)?,
        };
        run!(self, OP, unfold, Grid::each(len), address(&x.data, 0), argument, len, address(&out.data, 0))
    }

    fn makes_pictures(&self) -> bool {
        true
    }

    fn picture_patches(&self, picture: &Picture<'_>, patch: usize, out: &mut CudaBuffer, offset: usize) -> Result<()> {
        check::picture(picture, patch, out.len, offset)?;
        pixels::patches(self, picture, patch, address(&out.data, offset))
    }

    fn depthwise3x3(
        &self,
        x: &CudaBuffer,
        size: [usize; 3],
        weight: &CudaWeight,
        bias: Option<&CudaWeight>,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        const OP: &str = "depthwise3x3";
        let channels = weight.rows();
        check::exactly(OP, "weight", weight.depth(), &[3, 3])?;
        let bias = self.bias(OP, bias, channels)?;
        let len = check::at_least(OP, "x", x.len, &[size[0], size[1], size[2], channels])?;
        check::at_least(OP, "out", out.len, &[len])?;
        let (height, width) = (self.small(OP, "rows", size[1])?, self.small(OP, "columns", size[2])?);
        let (x, out, channels) = (address(&x.data, 0), address(&out.data, 0), self.small(OP, "channels", channels)?);
        run!(self, OP, depthwise3x3, Grid::each(len), x, len, height, width, channels, weight.argument(), bias, out)
    }

    fn mean_rows(
        &self,
        x: &CudaBuffer,
        groups: usize,
        per_group: usize,
        width: usize,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        const OP: &str = "mean_rows";
        check::argument(OP, per_group > 0, || "the mean of no rows".to_owned())?;
        check::at_least(OP, "x", x.len, &[groups, per_group, width])?;
        let len = check::at_least(OP, "out", out.len, &[groups, width])?;
        let (x, out) = (address(&x.data, 0), address(&out.data, 0));
        let (per_group, width) = (self.small(OP, "rows", per_group)?, self.small(OP, "columns", width)?);
        run!(self, OP, mean_rows, Grid::each(len), x, groups, per_group, width, out)
    }

    fn scale_groups(
        &self,
        x: &mut CudaBuffer,
        groups: usize,
        per_group: usize,
        width: usize,
        factor: &CudaBuffer,
    ) -> Result<()> {
        const OP: &str = "scale_groups";
        let len = check::at_least(OP, "x", x.len, &[groups, per_group, width])?;
        check::at_least(OP, "factor", factor.len, &[groups, width])?;
        let (x, factor) = (address(&x.data, 0), address(&factor.data, 0));
        let (per_group, width) = (self.small(OP, "rows", per_group)?, self.small(OP, "columns", width)?);
        run!(self, OP, scale_groups, Grid::each(len), x, len, per_group, width, factor)
    }

    fn bilinear(
        &self,
        x: &CudaBuffer,
        frames: usize,
        from: (usize, usize),
        to: (usize, usize),
        channels: usize,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        const OP: &str = "bilinear";
        check::at_least(OP, "x", x.len, &[frames, from.0, from.1, channels])?;
        let len = check::at_least(OP, "out", out.len, &[frames, to.0, to.1, channels])?;
        check::argument(OP, len == 0 || (from.0 > 0 && from.1 > 0), || "the input is empty".to_owned())?;
        let size = |value| self.small(OP, "rows or columns", value);
        let (height, width, to_height, to_width) = (size(from.0)?, size(from.1)?, size(to.0)?, size(to.1)?);
        let (x, out, channels) = (address(&x.data, 0), address(&out.data, 0), size(channels)?);
        run!(self, OP, bilinear, Grid::each(len), x, len, height, width, to_height, to_width, channels, out)
    }

    fn weighted_sum(&self, parts: &[&CudaBuffer], weights: &[f32], len: usize, out: &mut CudaBuffer) -> Result<()> {
        const OP: &str = "weighted_sum";
        check::argument(OP, parts.len() == weights.len(), || {
            format!("{} parts and {} weights", parts.len(), weights.len())
        })?;
        for part in parts {
            check::at_least(OP, "a part", part.len, &[len])?;
        }
        check::at_least(OP, "out", out.len, &[len])?;
        let mut add_to = 0i32;
        // No parts make zeros.
        let pieces = parts.len().div_ceil(8).max(1);
        for piece in 0..pieces {
            let mut argument = Parts { part: [0; 8], weight: [0.0; 8] };
            let mut count = 0i32;
            for (part, weight) in parts.iter().zip(weights).skip(8 * piece).take(8) {
                argument.part[count as usize] = address(&part.data, 0);
                argument.weight[count as usize] = *weight;
                count += 1;
            }
            run!(self, OP, weighted_sum, Grid::each(len), argument, count, len, add_to, address(&out.data, 0))?;
            add_to = 1;
        }
        Ok(())
    }

    fn power(&self, x: &CudaBuffer, rows: usize, width: usize, out: &mut CudaBuffer) -> Result<()> {
        const OP: &str = "power";
        check::at_least(OP, "x", x.len, &[rows, 2, width])?;
        let len = check::at_least(OP, "out", out.len, &[rows, width])?;
        let (x, out, width) = (address(&x.data, 0), address(&out.data, 0), self.small(OP, "columns", width)?);
        run!(self, OP, power, Grid::each(len), x, len, width, out)
    }

    fn log_mel(&self, x: &mut CudaBuffer, len: usize) -> Result<()> {
        check::at_least("log_mel", "x", x.len, &[len])?;
        mel::log_mel(self, address(&x.data, 0), len)
    }

    fn choose(
        &self,
        logits: &CudaBuffer,
        vocabulary: usize,
        allowed: Allowed<'_>,
        forbidden: &[u32],
        choice: Choice,
    ) -> Result<u32> {
        sample::choose(self, logits, vocabulary, allowed, forbidden, choice)
    }
}
