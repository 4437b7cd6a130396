//! The CPU device: a thread pool, and kernels written once over the vectors of AVX-512, AVX2 or the build's target.
//!
//! This file checks sizes and hands each operation to the file of its family.

mod arithmetic;
mod attention;
mod bandwidth;
mod cache;
mod convolution;
mod elementwise;
pub mod gemm;
mod linear;
mod math;
mod mel;
mod norm;
mod plan;
pub mod pool;
mod position;
mod quantised;
mod report;
mod simd;
mod stored;

pub use arithmetic::measure_arithmetic;
pub use bandwidth::measure_read_bandwidth;
pub use cache::CpuCache;
pub use plan::{Held, PlanBuffer, PlanDevice, PlanWeight};
pub use report::KernelReport;

use crate::check;
use crate::choice::{self, Allowed, Choice};
use crate::device::{Activation, AttentionShape, CacheType, Device, DeviceError, Result, Rounding, Unfold};
use crate::pixels::{self, Picture};
use crate::tensor::{DType, HostTensor};
use pool::ThreadPool;
use simd::Level;
use std::borrow::Cow;
use std::sync::{Arc, Mutex};
use stored::{small, values};

/// The CPU as a device; clones share the threads.
#[derive(Clone, Debug)]
pub struct CpuDevice {
    pool: ThreadPool,
    /// A pool of the calling thread alone, for products within a task.
    serial: ThreadPool,
    level: Level,
    exact: bool,
    /// What choosing a token works in; one that comes while another is at it takes memory of its own.
    candidates: Arc<Mutex<Vec<(u32, f64)>>>,
}

/// f32 activations in memory.
#[derive(Debug)]
pub struct CpuBuffer(Vec<f32>);

/// A weight in memory or in a mapped file.
#[derive(Clone, Debug)]
pub struct CpuWeight(HostTensor);

impl CpuDevice {
    /// A device that uses `threads` threads (`None`: one for each core this process may use) and the best instruction
    /// set of the processor, or the one that the environment variable `CANDOR_CPU` names.
    pub fn new(threads: Option<usize>) -> Self {
        Self::at(threads, Level::chosen())
    }

    /// A device that uses the instruction set `level` (one of [`CpuDevice::levels`]).
    pub fn with_level(threads: Option<usize>, level: &str) -> Option<Self> {
        Level::named(level).map(|level| Self::at(threads, level))
    }

    fn at(threads: Option<usize>, level: Level) -> Self {
        CpuDevice {
            pool: ThreadPool::new(threads),
            serial: ThreadPool::new(Some(1)),
            level,
            exact: false,
            candidates: Arc::default(),
        }
    }

    /// The same with activations in f32 everywhere: slower where weights are quantised, and exact but for the rounding
    /// of sums. Otherwise activations are rounded to bytes there.
    pub fn exact(mut self) -> Self {
        self.exact = true;
        self
    }

    /// The instruction sets that this processor has, as `CANDOR_CPU` and [`CpuDevice::with_level`] take them, best last.
    pub fn levels() -> Vec<&'static str> {
        Level::all().map(Level::name).collect()
    }

    /// The weight as codes, if it is quantised and activations are to be.
    fn codes<'a>(&self, weight: &'a CpuWeight) -> Option<quantised::Codes<'a>> {
        if self.exact { None } else { quantised::Codes::of(&weight.0) }
    }

    /// The threads, for work beside the operations of a model.
    pub fn pool(&self) -> &ThreadPool {
        &self.pool
    }
}

/// Memory for `len` elements, or an error where the system has none.
fn zeros<T: Copy + Default>(len: usize) -> Result<Vec<T>> {
    let mut data = Vec::new();
    data.try_reserve_exact(len).map_err(|_| DeviceError::OutOfMemory { bytes: len.saturating_mul(size_of::<T>()) })?;
    data.resize(len, T::default());
    Ok(data)
}

/// Whether a weight is copied as f32 when it is loaded: norms and biases are read in f32 again and again, and take next to
/// nothing.
fn is_widened(tensor: &HostTensor) -> bool {
    const SMALL: usize = 64 * 1024;
    tensor.dtype() != DType::F32 && !tensor.dtype().is_scaled() && tensor.elements() <= SMALL
}

/// A bias of `outputs` elements as f32.
fn bias_of<'a>(op: &'static str, bias: Option<&'a CpuWeight>, outputs: usize) -> Result<Option<Cow<'a, [f32]>>> {
    let Some(bias) = bias else { return Ok(None) };
    check::exactly(op, "bias", bias.0.elements(), &[outputs])?;
    Ok(Some(small(&bias.0)))
}

impl Device for CpuDevice {
    type Buffer = CpuBuffer;
    type Weight = CpuWeight;
    type Replay = ();
    type Cache = CpuCache;

    fn describe(&self) -> String {
        let exact = if self.exact { ", exact" } else { "" };
        format!("CPU, {} kernels{exact}, {} threads", self.level.name(), self.pool.threads())
    }

    fn allocate(&self, len: usize) -> Result<CpuBuffer> {
        Ok(CpuBuffer(zeros(len)?))
    }

    fn len(&self, buffer: &CpuBuffer) -> usize {
        buffer.0.len()
    }

    fn write(&self, data: &[f32], to: &mut CpuBuffer, offset: usize) -> Result<()> {
        let end = check::range("write", "to", to.0.len(), offset, data.len())?;
        to.0[offset..end].copy_from_slice(data);
        Ok(())
    }

    fn read(&self, from: &CpuBuffer, offset: usize, out: &mut [f32]) -> Result<()> {
        let end = check::range("read", "from", from.0.len(), offset, out.len())?;
        out.copy_from_slice(&from.0[offset..end]);
        Ok(())
    }

    fn copy(
        &self,
        from: &CpuBuffer,
        from_offset: usize,
        to: &mut CpuBuffer,
        to_offset: usize,
        len: usize,
    ) -> Result<()> {
        let from_end = check::range("copy", "from", from.0.len(), from_offset, len)?;
        let to_end = check::range("copy", "to", to.0.len(), to_offset, len)?;
        to.0[to_offset..to_end].copy_from_slice(&from.0[from_offset..from_end]);
        Ok(())
    }

    fn weight(&self, tensor: &HostTensor) -> Result<CpuWeight> {
        if !is_widened(tensor) {
            return Ok(CpuWeight(tensor.clone()));
        }
        let wide = HostTensor::from_f32(&tensor.to_f32(), tensor.shape());
        Ok(CpuWeight(wide.unwrap_or_else(|_| tensor.clone())))
    }

    fn weight_rows(&self, weight: &CpuWeight, first: usize, count: usize) -> Result<CpuWeight> {
        let rows = weight.0.rows();
        let reason = || format!("rows from {first} on, {count} of them, of a weight of {rows}");
        let view = weight.0.rows_view(first, count);
        view.map(CpuWeight).ok_or_else(|| DeviceError::Argument { op: "weight_rows", reason: reason() })
    }

    fn embed(&self, table: &CpuWeight, ids: &[u32], out: &mut CpuBuffer, offset: usize) -> Result<()> {
        let (rows, width) = (table.0.rows(), table.0.row_len());
        for &id in ids {
            check::argument("embed", (id as usize) < rows, || format!("id {id} in a table of {rows} rows"))?;
        }
        let len = check::at_least("embed", "out", usize::MAX, &[ids.len(), width])?;
        let end = check::range("embed", "out", out.0.len(), offset, len)?;
        position::embed(self.level, values(&table.0), width, ids, &mut out.0[offset..end]);
        Ok(())
    }

    fn linear(
        &self,
        x: &CpuBuffer,
        rows: usize,
        weight: &CpuWeight,
        bias: Option<&CpuWeight>,
        activation: Activation,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        let (outputs, depth) = (weight.0.rows(), weight.0.row_len());
        let x_len = check::at_least("linear", "x", x.0.len(), &[rows, depth])?;
        let out_len = check::at_least("linear", "out", out.0.len(), &[rows, outputs])?;
        let bias = bias_of("linear", bias, outputs)?;
        let (x, out) = (&x.0[..x_len], &mut out.0[..out_len]);
        if let Some(codes) = self.codes(weight) {
            let layer = quantised::Layer::new(codes, bias.as_deref(), activation, out);
            quantised::linear(self.level, &self.pool, x, rows, &[layer]);
            return Ok(());
        }
        let layer = linear::Layer { weight: values(&weight.0), outputs, depth, bias: bias.as_deref(), activation };
        linear::linear(self.level, &self.pool, x, rows, layer, out)
    }

    fn linear_each(
        &self,
        x: &CpuBuffer,
        rows: usize,
        layers: &[(&CpuWeight, Option<&CpuWeight>, Activation)],
        outs: &mut [&mut CpuBuffer],
    ) -> Result<()> {
        const SEVERAL: usize = 3;
        let first = layers.first().and_then(|layer| self.codes(layer.0));
        let together = |weight| first.zip(self.codes(weight)).is_some_and(|(first, other)| first.goes_with(&other));
        if layers.len() > SEVERAL || !layers.iter().all(|layer| together(layer.0)) {
            for (&(weight, bias, activation), out) in layers.iter().zip(outs) {
                self.linear(x, rows, weight, bias, activation, out)?;
            }
            return Ok(());
        }
        let depth = first.map_or(0, |codes| codes.depth());
        let x_len = check::at_least("linear_each", "x", x.0.len(), &[rows, depth])?;
        let mut biases: [Option<Cow<'_, [f32]>>; SEVERAL] = Default::default();
        for (&(weight, bias, _), kept) in layers.iter().zip(&mut biases) {
            *kept = bias_of("linear_each", bias, weight.0.rows())?;
        }
        let mut ready: [Option<quantised::Layer<'_>>; SEVERAL] = Default::default();
        for (((&(weight, _, activation), bias), out), ready) in layers.iter().zip(&biases).zip(outs).zip(&mut ready) {
            let len = check::at_least("linear_each", "out", out.0.len(), &[rows, weight.0.rows()])?;
            let out = &mut out.0[..len];
            *ready = self.codes(weight).map(|codes| quantised::Layer::new(codes, bias.as_deref(), activation, out));
        }
        let run = |layers: &[quantised::Layer<'_>]| {
            quantised::linear(self.level, &self.pool, &x.0[..x_len], rows, layers);
        };
        match ready {
            [Some(a), Some(b), Some(c)] => run(&[a, b, c]),
            [Some(a), Some(b), None] => run(&[a, b]),
            [Some(a), ..] => run(&[a]),
            _ => {}
        }
        Ok(())
    }

    fn layer_norm(
        &self,
        x: &CpuBuffer,
        rows: usize,
        weight: &CpuWeight,
        bias: &CpuWeight,
        eps: f32,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        let width = weight.0.elements();
        check::exactly("layer_norm", "bias", bias.0.elements(), &[width])?;
        let len = check::at_least("layer_norm", "x", x.0.len(), &[rows, width])?;
        check::at_least("layer_norm", "out", out.0.len(), &[len])?;
        let (weight, bias) = (small(&weight.0), small(&bias.0));
        norm::layer_norm(self.level, &self.pool, &x.0[..len], &weight, &bias, eps, &mut out.0[..len]);
        Ok(())
    }

    fn rms_norm(&self, x: &CpuBuffer, rows: usize, weight: &CpuWeight, eps: f32, out: &mut CpuBuffer) -> Result<()> {
        let len = check::at_least("rms_norm", "x", x.0.len(), &[rows, weight.0.elements()])?;
        check::at_least("rms_norm", "out", out.0.len(), &[len])?;
        norm::rms_norm(self.level, &self.pool, &x.0[..len], &small(&weight.0), eps, &mut out.0[..len]);
        Ok(())
    }

    fn activate(&self, activation: Activation, x: &mut CpuBuffer, len: usize) -> Result<()> {
        check::at_least("activate", "x", x.0.len(), &[len])?;
        elementwise::activate(self.level, &self.pool, activation, &mut x.0[..len]);
        Ok(())
    }

    fn add(&self, x: &mut CpuBuffer, y: &CpuBuffer, len: usize) -> Result<()> {
        check::at_least("add", "x", x.0.len(), &[len])?;
        check::at_least("add", "y", y.0.len(), &[len])?;
        elementwise::add(self.level, &self.pool, &mut x.0[..len], &y.0);
        Ok(())
    }

    fn multiply(&self, x: &mut CpuBuffer, y: &CpuBuffer, len: usize) -> Result<()> {
        check::at_least("multiply", "x", x.0.len(), &[len])?;
        check::at_least("multiply", "y", y.0.len(), &[len])?;
        elementwise::multiply(self.level, &self.pool, &mut x.0[..len], &y.0);
        Ok(())
    }

    fn add_positions(&self, x: &mut CpuBuffer, rows: usize, table: &CpuWeight, first: usize) -> Result<()> {
        let (table_rows, width) = (table.0.rows(), table.0.row_len());
        let len = check::at_least("add_positions", "x", x.0.len(), &[rows, width])?;
        check::argument("add_positions", len == 0 || table_rows > 0, || "the table has no rows".to_owned())?;
        let x = &mut x.0[..len];
        position::add_positions(self.level, &self.pool, x, values(&table.0), table_rows, width, first);
        Ok(())
    }

    fn softmax(&self, x: &CpuBuffer, rows: usize, width: usize, out: &mut CpuBuffer) -> Result<()> {
        let len = check::at_least("softmax", "x", x.0.len(), &[rows, width])?;
        check::at_least("softmax", "out", out.0.len(), &[len])?;
        norm::softmax(self.level, &self.pool, &x.0[..len], width, &mut out.0[..len]);
        Ok(())
    }

    fn rope(
        &self,
        x: &mut CpuBuffer,
        rows: usize,
        heads: usize,
        head_dim: usize,
        first: usize,
        theta: f32,
    ) -> Result<()> {
        let len = check::at_least("rope", "x", x.0.len(), &[rows, heads, head_dim])?;
        check::argument("rope", head_dim.is_multiple_of(2), || format!("head width {head_dim} is odd"))?;
        check::argument("rope", first.checked_add(rows).is_some(), || format!("position {first} is too large"))?;
        position::rope(&self.pool, &mut x.0[..len], heads, head_dim, first, theta);
        Ok(())
    }

    fn attention(
        &self,
        q: &CpuBuffer,
        k: &CpuBuffer,
        v: &CpuBuffer,
        shape: AttentionShape,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        let AttentionShape { batch, queries, keys, heads, key_heads, head_dim, .. } = shape;
        let q_len = check::at_least("attention", "q", q.0.len(), &[batch, queries, heads, head_dim])?;
        let k_len = check::at_least("attention", "k", k.0.len(), &[batch, keys, key_heads, head_dim])?;
        check::at_least("attention", "v", v.0.len(), &[k_len])?;
        check::at_least("attention", "out", out.0.len(), &[q_len])?;
        if q_len == 0 {
            return Ok(());
        }
        check::attention("attention", &shape)?;
        let (q, k, v, out) = (&q.0[..q_len], &k.0[..k_len], &v.0[..k_len], &mut out.0[..q_len]);
        if shape.rounding == Rounding::Bytes && !self.exact && head_dim <= quantised::attention::WIDEST_HEAD {
            quantised::attention::attention(
                self.level,
                &self.pool,
                quantised::attention::Inputs { q, k, v, shape },
                out,
            );
            return Ok(());
        }
        let strides = attention::Strides { key: key_heads * head_dim, head: head_dim };
        attention::attention(self.level, &self.pool, &self.serial, attention::Inputs { q, k, v, strides, shape }, out)
    }

    fn rounding(&self, weight: &CpuWeight) -> Rounding {
        if self.codes(weight).is_some() { Rounding::Bytes } else { Rounding::None }
    }

    fn cache(&self, kind: CacheType, capacity: usize, key_heads: usize, head_dim: usize) -> Result<CpuCache> {
        let wide = kind == CacheType::I8 && head_dim > quantised::attention::WIDEST_HEAD;
        check::argument("cache", !wide, || {
            format!("heads of {head_dim} are too wide for bytes; {} is the most", quantised::attention::WIDEST_HEAD)
        })?;
        CpuCache::new(kind, capacity, key_heads, head_dim)
    }

    fn cache_write(&self, k: &CpuBuffer, v: &CpuBuffer, rows: usize, cache: &mut CpuCache, first: usize) -> Result<()> {
        let len = check::at_least("cache_write", "k", k.0.len(), &[rows, cache.width()])?;
        check::at_least("cache_write", "v", v.0.len(), &[len])?;
        check::range("cache_write", "the cache", cache.capacity(), first, rows)?;
        cache.write(&k.0, &v.0, rows, first);
        Ok(())
    }

    fn cache_copy(&self, from: &CpuCache, to: &mut CpuCache, positions: usize) -> Result<()> {
        let copied = to.copy_from(from, positions);
        check::argument("cache_copy", copied, || {
            format!("{positions} positions do not fit, or the caches are not of one type, heads and width")
        })
    }

    fn cache_attention(
        &self,
        q: &CpuBuffer,
        cache: &CpuCache,
        shape: AttentionShape,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        let AttentionShape { batch, queries, keys, heads, key_heads, head_dim, .. } = shape;
        let q_len = check::at_least("cache_attention", "q", q.0.len(), &[queries, heads, head_dim])?;
        check::at_least("cache_attention", "out", out.0.len(), &[q_len])?;
        check::range("cache_attention", "the cache", cache.capacity(), 0, keys)?;
        if q_len == 0 {
            return Ok(());
        }
        check::attention("cache_attention", &shape)?;
        check::argument("cache_attention", batch == 1 && cache.is_of(key_heads, head_dim), || {
            format!("{batch} sequences of {key_heads} key heads {head_dim} wide are not what the cache holds")
        })?;
        cache.attention(self.level, &self.pool, &self.serial, &q.0[..q_len], shape, &mut out.0[..q_len])
    }

    fn unfold(&self, x: &CpuBuffer, unfold: Unfold, out: &mut CpuBuffer) -> Result<()> {
        let output = check::unfold(&unfold)?;
        let ([t, h, w], [kt, kh, kw]) = (unfold.size, unfold.kernel);
        check::at_least("unfold", "x", x.0.len(), &[t, h, w, unfold.channels])?;
        let dims = [output[0], output[1], output[2], unfold.channels, kt, kh, kw];
        let len = check::at_least("unfold", "out", out.0.len(), &dims)?;
        convolution::unfold(&self.pool, &x.0, unfold, output, &mut out.0[..len]);
        Ok(())
    }

    fn picture_patches(&self, picture: &Picture<'_>, patch: usize, out: &mut CpuBuffer, offset: usize) -> Result<()> {
        let (across, end) = check::picture(picture, patch, out.0.len(), offset)?;
        let rgb = match picture.as_is() {
            Some(rgb) => Cow::Borrowed(rgb),
            None => Cow::Owned(picture.rgb()?),
        };
        let line = across * 3 * patch * patch;
        self.pool.run_chunks(&mut out.0[offset..end], line, |index, columns| {
            pixels::unfold(&rgb, picture.side, patch, index * across, columns);
        });
        Ok(())
    }

    fn depthwise3x3(
        &self,
        x: &CpuBuffer,
        size: [usize; 3],
        weight: &CpuWeight,
        bias: Option<&CpuWeight>,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        let channels = weight.0.rows();
        check::exactly("depthwise3x3", "weight", weight.0.row_len(), &[3, 3])?;
        let bias = bias_of("depthwise3x3", bias, channels)?;
        let len = check::at_least("depthwise3x3", "x", x.0.len(), &[size[0], size[1], size[2], channels])?;
        check::at_least("depthwise3x3", "out", out.0.len(), &[len])?;
        let (x, out) = (&x.0[..len], &mut out.0[..len]);
        convolution::depthwise3x3(self.level, &self.pool, x, size, &small(&weight.0), bias.as_deref(), out);
        Ok(())
    }

    fn mean_rows(
        &self,
        x: &CpuBuffer,
        groups: usize,
        per_group: usize,
        width: usize,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        check::argument("mean_rows", per_group > 0, || "the mean of no rows".to_owned())?;
        check::at_least("mean_rows", "x", x.0.len(), &[groups, per_group, width])?;
        let len = check::at_least("mean_rows", "out", out.0.len(), &[groups, width])?;
        elementwise::mean_rows(self.level, &self.pool, &x.0, per_group, width, &mut out.0[..len]);
        Ok(())
    }

    fn scale_groups(
        &self,
        x: &mut CpuBuffer,
        groups: usize,
        per_group: usize,
        width: usize,
        factor: &CpuBuffer,
    ) -> Result<()> {
        let len = check::at_least("scale_groups", "x", x.0.len(), &[groups, per_group, width])?;
        check::at_least("scale_groups", "factor", factor.0.len(), &[groups, width])?;
        elementwise::scale_groups(self.level, &self.pool, &mut x.0[..len], per_group, width, &factor.0);
        Ok(())
    }

    fn bilinear(
        &self,
        x: &CpuBuffer,
        frames: usize,
        from: (usize, usize),
        to: (usize, usize),
        channels: usize,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        check::at_least("bilinear", "x", x.0.len(), &[frames, from.0, from.1, channels])?;
        let len = check::at_least("bilinear", "out", out.0.len(), &[frames, to.0, to.1, channels])?;
        check::argument("bilinear", len == 0 || (from.0 > 0 && from.1 > 0), || "the input is empty".to_owned())?;
        convolution::bilinear(self.level, &self.pool, &x.0, from, to, channels, &mut out.0[..len]);
        Ok(())
    }

    fn weighted_sum(&self, parts: &[&CpuBuffer], weights: &[f32], len: usize, out: &mut CpuBuffer) -> Result<()> {
        check::argument("weighted_sum", parts.len() == weights.len(), || {
            format!("{} parts and {} weights", parts.len(), weights.len())
        })?;
        for part in parts {
            check::at_least("weighted_sum", "a part", part.0.len(), &[len])?;
        }
        check::at_least("weighted_sum", "out", out.0.len(), &[len])?;
        elementwise::weighted_sum(self.level, &self.pool, parts, weights, &mut out.0[..len]);
        Ok(())
    }

    fn power(&self, x: &CpuBuffer, rows: usize, width: usize, out: &mut CpuBuffer) -> Result<()> {
        let x_len = check::at_least("power", "x", x.0.len(), &[rows, 2, width])?;
        let len = check::at_least("power", "out", out.0.len(), &[rows, width])?;
        mel::power(&self.pool, &x.0[..x_len], width, &mut out.0[..len]);
        Ok(())
    }

    fn log_mel(&self, x: &mut CpuBuffer, len: usize) -> Result<()> {
        check::at_least("log_mel", "x", x.0.len(), &[len])?;
        mel::log_mel(&self.pool, &mut x.0[..len]);
        Ok(())
    }

    fn choose(
        &self,
        logits: &CpuBuffer,
        vocabulary: usize,
        allowed: Allowed<'_>,
        forbidden: &[u32],
        choice: Choice,
    ) -> Result<u32> {
        check::at_least("choose", "logits", logits.0.len(), &[vocabulary])?;
        let (mut shared, mut own) = (self.candidates.try_lock(), Vec::new());
        let candidates = shared.as_deref_mut().unwrap_or(&mut own);
        Ok(choice::choose(&logits.0[..vocabulary], allowed, forbidden, choice, candidates)?)
    }
}
