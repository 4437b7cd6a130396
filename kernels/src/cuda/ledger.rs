//! The CUDA device on paper: it takes the same calls as [`super::CudaDevice`], computes nothing, and keeps books of every launch
//! that device would make on a board: bytes, operations, and the time that follows from what the board gives (Williams, Waterman
//! and Patterson 2009, the roofline model).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::attention::flash_width;
use super::layers::{self, FEW_ROWS, LAYERS};
use crate::choice::{self, Allowed, Choice};
use crate::device::{
    Activation, AttentionShape, CacheType, DecoderBuffers, DecoderLayer, Device, DeviceError, Result, Rounding, Unfold,
};
use crate::pixels::Picture;
use crate::tensor::{DType, HostTensor};

/// A board's figures, dense (without sparsity), from its maker's data sheets.
#[derive(Clone, Copy, Debug)]
pub struct Board {
    /// As `candor bench --model-of` takes it.
    pub name: &'static str,
    /// What it is called, with the power mode that the figures are of.
    pub title: &'static str,
    /// Compute capability.
    pub capability: (i32, i32),
    /// 10⁹ bytes a second.
    pub bandwidth_gb_s: f64,
    /// 10¹² operations a second on bytes: tensor cores, or dp4a where kernels have nothing better (sm_72).
    pub bytes_tops: f64,
    /// 10¹² operations a second in f32.
    pub f32_tflops: f64,
    /// Decoding speed of the best published engine with int4 weights, tokens/s, and of what; see docs/performance.md.
    pub published: Option<f64>,
}

/// The boards that are known.
pub const BOARDS: [Board; 6] = [
    Board {
        name: "orin-nano",
        title: "Jetson Orin Nano Super 8 GB, 25 W",
        capability: (8, 7),
        bandwidth_gb_s: 102.0,
        bytes_tops: 33.0,
        f32_tflops: 2.1,
        published: Some(61.0),
    },
    Board {
        name: "orin-nx",
        title: "Jetson Orin NX 16 GB, 25 W",
        capability: (8, 7),
        bandwidth_gb_s: 102.0,
        bytes_tops: 30.0,
        f32_tflops: 1.9,
        published: Some(98.9),
    },
    Board {
        name: "agx-orin",
        title: "Jetson AGX Orin 64 GB, MAXN",
        capability: (8, 7),
        bandwidth_gb_s: 205.0,
        bytes_tops: 85.0,
        f32_tflops: 5.3,
        published: Some(162.5),
    },
    Board {
        name: "agx-xavier",
        title: "Jetson AGX Xavier 32 GB, MAXN",
        capability: (7, 2),
        bandwidth_gb_s: 136.5,
        bytes_tops: 5.6,
        f32_tflops: 1.4,
        published: None,
    },
    Board {
        name: "thor",
        title: "Jetson AGX Thor T5000, MAXN",
        capability: (11, 0),
        bandwidth_gb_s: 273.0,
        bytes_tops: 517.0,
        f32_tflops: 8.0,
        published: Some(253.0),
    },
    Board {
        name: "h100",
        title: "H100 SXM 80 GB",
        capability: (9, 0),
        bandwidth_gb_s: 3350.0,
        bytes_tops: 1979.0,
        f32_tflops: 67.0,
        published: None,
    },
];

/// What a board's figures are taken to come to in use.
#[derive(Clone, Copy, Debug)]
pub struct Assumptions {
    /// Share of the bandwidth that a kernel that reads alone comes to.
    pub bandwidth: f64,
    /// Share of the operations a second that a large product comes to.
    pub arithmetic: f64,
    /// Seconds from one launch to the next: a kernel that does nothing takes as long.
    pub launch_s: f64,
    /// Seconds that the blocks of a launch take to meet.
    pub meeting_s: f64,
}

impl Default for Assumptions {
    fn default() -> Self {
        Assumptions { bandwidth: 0.8, arithmetic: 0.4, launch_s: 4e-6, meeting_s: 1.5e-6 }
    }
}

/// What the launches of one kernel come to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Entry {
    /// Launches.
    pub launches: u64,
    /// Bytes read and written.
    pub bytes: f64,
    /// Operations on bytes; those in f16 count double.
    pub byte_operations: f64,
    /// Operations in f32.
    pub float_operations: f64,
    /// Seconds.
    pub seconds: f64,
}

impl Entry {
    fn add(&mut self, other: &Entry) {
        self.launches += other.launches;
        self.bytes += other.bytes;
        self.byte_operations += other.byte_operations;
        self.float_operations += other.float_operations;
        self.seconds += other.seconds;
    }
}

/// The books, by kernel.
#[derive(Clone, Debug, Default)]
pub struct Books(pub BTreeMap<&'static str, Entry>);

impl Books {
    /// Everything of other books too.
    pub fn add(&mut self, other: &Books) {
        for (kernel, entry) in &other.0 {
            self.0.entry(kernel).or_default().add(entry);
        }
    }

    /// All kernels together.
    pub fn total(&self) -> Entry {
        self.0.values().fold(Entry::default(), |mut total, entry| {
            total.add(entry);
            total
        })
    }
}

/// The CUDA device on paper; clones keep the same books.
#[derive(Clone, Debug)]
pub struct LedgerDevice {
    board: Board,
    assumptions: Assumptions,
    books: Arc<Mutex<Books>>,
    /// The position that decoder layers are for, which is told once for all of them.
    position: Arc<Mutex<Option<usize>>>,
}

/// A buffer that is not there.
#[derive(Debug)]
pub struct LedgerBuffer(usize);

/// A cache that is not there.
#[derive(Debug)]
pub struct LedgerCache(CacheType, usize);

/// A weight that is looked at and not read.
#[derive(Clone, Debug)]
pub struct LedgerWeight(HostTensor);

impl LedgerWeight {
    fn outputs(&self) -> usize {
        self.0.rows()
    }

    /// Bytes of elements and scales.
    fn bytes(&self) -> f64 {
        let scales = self.0.scales().map_or(0, |scales| {
            let size = scales.of_groups().map_or(4, |(_, dtype)| dtype.row_bytes(1).unwrap_or(4));
            scales.per_row() * self.0.rows() * size
        });
        (self.0.bytes().len() + scales) as f64
    }
}

const F32: f64 = 4.0;

impl LedgerDevice {
    /// Keeps books of what would run on a board.
    pub fn new(board: Board, assumptions: Assumptions) -> Self {
        LedgerDevice { board, assumptions, books: Arc::default(), position: Arc::default() }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        // Sums are whole whoever panicked.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The books, which begin anew.
    pub fn take(&self) -> Books {
        std::mem::take(&mut *self.books())
    }

    /// Whether the kernels of tensor cores run there.
    fn has_tensor_cores(&self) -> bool {
        self.board.capability.0 >= 8
    }

    /// Books a launch.
    fn launch(&self, kernel: &'static str, bytes: f64, byte_operations: f64, float_operations: f64) {
        self.launch_with_meetings(kernel, bytes, byte_operations, float_operations, 0);
    }

    /// Books a launch whose blocks wait for each other so often.
    fn launch_with_meetings(
        &self,
        kernel: &'static str,
        bytes: f64,
        byte_operations: f64,
        float_operations: f64,
        meetings: u32,
    ) {
        let Assumptions { bandwidth, arithmetic, launch_s, meeting_s } = self.assumptions;
        let read = bytes / (self.board.bandwidth_gb_s * 1e9 * bandwidth);
        let computed = byte_operations / (self.board.bytes_tops * 1e12 * arithmetic)
            + float_operations / (self.board.f32_tflops * 1e12 * arithmetic);
        let seconds = (read.max(computed) + f64::from(meetings) * meeting_s).max(launch_s);
        let entry = Entry { launches: 1, bytes, byte_operations, float_operations, seconds };
        self.books().0.entry(kernel).or_default().add(&entry);
    }

    /// An element-wise kernel over `len` elements, with so many buffers read or written.
    fn elementwise(&self, kernel: &'static str, len: usize, buffers: usize) {
        if len > 0 {
            self.launch(kernel, F32 * (len * buffers) as f64, 0.0, len as f64);
        }
    }

    /// Layers of one x in one launch, and the rounding of x where their products are of bytes.
    fn layers(&self, rows: usize, weights: &[&LedgerWeight], outs: usize) {
        let Some(first) = weights.first().filter(|_| rows > 0) else { return };
        let depth = first.0.row_len();
        let outputs: usize = weights.iter().map(|weight| weight.outputs()).sum();
        let operations = 2.0 * rows as f64 * depth as f64 * outputs as f64;
        let stored: f64 = weights.iter().map(|weight| weight.bytes()).sum();
        let out = F32 * rows as f64 * outs as f64;
        let x = (rows * depth) as f64;
        let (kernel, byte_operations, float_operations, read) = match first.0.dtype() {
            DType::I4 | DType::I8 => {
                self.launch("quantise", F32 * x + x, 0.0, 2.0 * x);
                let four = first.0.dtype() == DType::I4;
                let kernel = match (rows <= FEW_ROWS, four) {
                    (true, true) => "matvec_i4",
                    (true, false) => "matvec_i8",
                    (false, true) => "matmul_i4",
                    (false, false) => "matmul_i8",
                };
                (kernel, operations, 0.0, x)
            }
            DType::F16 if rows > FEW_ROWS && self.has_tensor_cores() => {
                self.launch("to_half", F32 * x + 2.0 * x, 0.0, x);
                ("matmul_f16", 2.0 * operations, 0.0, 2.0 * x)
            }
            _ => (if rows <= FEW_ROWS { "float_matvec" } else { "float_matmul" }, 0.0, operations, F32 * x),
        };
        self.launch(kernel, stored + read + out, byte_operations, float_operations);
    }

    /// What keys are for tensor cores, where they can do this: f16 is multiplied at half the speed of bytes, and values are f16.
    fn attend(&self, kernel: &'static str, shape: &AttentionShape, key_bytes: f64, rounding: Rounding, in_cache: bool) {
        let AttentionShape { batch, queries, keys, heads, key_heads, head_dim, causal, .. } = *shape;
        let seen = if causal { keys as f64 - (queries as f64 - 1.0) / 2.0 } else { keys as f64 };
        let operations = 4.0 * (batch * queries * heads * head_dim) as f64 * seen;
        let own = 2.0 * F32 * (batch * queries * heads * head_dim) as f64;
        let cached = batch as f64 * keys as f64 * key_heads as f64 * key_bytes;
        let padded = operations * (flash_width(head_dim, in_cache) as f64 / head_dim as f64);
        match rounding {
            Rounding::Halves if queries > 1 && self.has_tensor_cores() => {
                self.launch("flash", own + cached, 2.0 * padded, 0.0)
            }
            Rounding::Bytes if queries > 1 && self.has_tensor_cores() => {
                self.launch("flash", own + cached, 1.5 * padded, 0.0)
            }
            _ => self.launch(kernel, own + cached, 0.0, operations),
        }
    }
}

impl Device for LedgerDevice {
    type Buffer = LedgerBuffer;
    type Cache = LedgerCache;
    type Weight = LedgerWeight;
    type Replay = ();

    fn describe(&self) -> String {
        format!("{}, on paper", self.board.title)
    }

    fn allocate(&self, len: usize) -> Result<LedgerBuffer> {
        Ok(LedgerBuffer(len))
    }

    fn len(&self, buffer: &LedgerBuffer) -> usize {
        buffer.0
    }

    fn write(&self, _: &[f32], _: &mut LedgerBuffer, _: usize) -> Result<()> {
        Ok(())
    }

    fn read(&self, _: &LedgerBuffer, _: usize, out: &mut [f32]) -> Result<()> {
        out.fill(0.0);
        Ok(())
    }

    fn copy(&self, _: &LedgerBuffer, _: usize, _: &mut LedgerBuffer, _: usize, len: usize) -> Result<()> {
        self.elementwise("copy", len, 2);
        Ok(())
    }

    fn weight(&self, tensor: &HostTensor) -> Result<LedgerWeight> {
        Ok(LedgerWeight(tensor.clone()))
    }

    fn weight_rows(&self, weight: &LedgerWeight, first: usize, count: usize) -> Result<LedgerWeight> {
        let reason = || format!("rows from {first} on, {count} of them, of a weight of {}", weight.0.rows());
        let view = weight.0.rows_view(first, count);
        view.map(LedgerWeight).ok_or_else(|| DeviceError::Argument { op: "weight_rows", reason: reason() })
    }

    fn embed(&self, table: &LedgerWeight, ids: &[u32], _: &mut LedgerBuffer, _: usize) -> Result<()> {
        ids.chunks(64).for_each(|ids| self.elementwise("embed", ids.len() * table.0.row_len(), 2));
        Ok(())
    }

    fn linear(
        &self,
        _: &LedgerBuffer,
        rows: usize,
        weight: &LedgerWeight,
        _: Option<&LedgerWeight>,
        _: Activation,
        _: &mut LedgerBuffer,
    ) -> Result<()> {
        self.layers(rows, &[weight], weight.outputs());
        Ok(())
    }

    fn linear_each(
        &self,
        x: &LedgerBuffer,
        rows: usize,
        layers: &[(&LedgerWeight, Option<&LedgerWeight>, Activation)],
        outs: &mut [&mut LedgerBuffer],
    ) -> Result<()> {
        let weights: Vec<&LedgerWeight> = layers.iter().map(|layer| layer.0).collect();
        let like = |weight: &LedgerWeight| (weight.0.dtype(), weight.0.row_len());
        if weights.len() > LAYERS || weights.iter().any(|weight| like(weight) != like(weights[0])) {
            for (&(weight, bias, activation), out) in layers.iter().zip(outs) {
                self.linear(x, rows, weight, bias, activation, out)?;
            }
            return Ok(());
        }
        self.layers(rows, &weights, weights.iter().map(|weight| weight.outputs()).sum());
        Ok(())
    }

    fn linear_add(
        &self,
        _: &LedgerBuffer,
        rows: usize,
        weight: &LedgerWeight,
        _: Option<&LedgerWeight>,
        _: usize,
        _: &mut LedgerBuffer,
        _: &mut LedgerBuffer,
    ) -> Result<()> {
        self.layers(rows, &[weight], 2 * weight.outputs());
        Ok(())
    }

    fn linear_gated(
        &self,
        _: &LedgerBuffer,
        rows: usize,
        gate: &LedgerWeight,
        up: &LedgerWeight,
        _: Activation,
        len: usize,
        _: &mut LedgerBuffer,
        _: &mut LedgerBuffer,
    ) -> Result<()> {
        if rows <= FEW_ROWS && gate.0.dtype().is_scaled() && gate.0.dtype() == up.0.dtype() {
            self.layers(rows, &[gate, up], gate.outputs());
        } else {
            self.layers(rows, &[gate, up], gate.outputs() + up.outputs());
            self.elementwise("multiply", len, 3);
        }
        Ok(())
    }

    fn layer_norm(
        &self,
        _: &LedgerBuffer,
        rows: usize,
        weight: &LedgerWeight,
        _: &LedgerWeight,
        _: f32,
        _: &mut LedgerBuffer,
    ) -> Result<()> {
        self.elementwise("layer_norm", rows * weight.0.elements(), 2);
        Ok(())
    }

    fn rms_norm(
        &self,
        _: &LedgerBuffer,
        rows: usize,
        weight: &LedgerWeight,
        _: f32,
        _: &mut LedgerBuffer,
    ) -> Result<()> {
        self.elementwise("rms_norm", rows * weight.0.elements(), 2);
        Ok(())
    }

    fn activate(&self, _: Activation, _: &mut LedgerBuffer, len: usize) -> Result<()> {
        self.elementwise("activate", len, 2);
        Ok(())
    }

    fn add(&self, _: &mut LedgerBuffer, _: &LedgerBuffer, len: usize) -> Result<()> {
        self.elementwise("add", len, 3);
        Ok(())
    }

    fn multiply(&self, _: &mut LedgerBuffer, _: &LedgerBuffer, len: usize) -> Result<()> {
        self.elementwise("multiply", len, 3);
        Ok(())
    }

    fn add_positions(&self, _: &mut LedgerBuffer, rows: usize, table: &LedgerWeight, _: usize) -> Result<()> {
        self.elementwise("add_positions", rows * table.0.row_len(), 3);
        Ok(())
    }

    fn softmax(&self, _: &LedgerBuffer, rows: usize, width: usize, _: &mut LedgerBuffer) -> Result<()> {
        self.elementwise("softmax", rows * width, 2);
        Ok(())
    }

    fn rope(&self, _: &mut LedgerBuffer, rows: usize, heads: usize, width: usize, _: usize, _: f32) -> Result<()> {
        self.elementwise("rope", rows * heads * width, 2);
        Ok(())
    }

    fn attention(
        &self,
        _: &LedgerBuffer,
        _: &LedgerBuffer,
        _: &LedgerBuffer,
        shape: AttentionShape,
        _: &mut LedgerBuffer,
    ) -> Result<()> {
        let AttentionShape { batch, queries, keys, key_heads, head_dim, rounding, .. } = shape;
        let mut key_bytes = 2.0 * F32 * head_dim as f64;
        if rounding == Rounding::Bytes && queries > 1 && self.has_tensor_cores() {
            // The keys once as bytes with a scale, and the values.
            let code_bytes = head_dim as f64 + F32;
            let each = (batch * keys * key_heads) as f64;
            self.launch("round_keys", each * (F32 * head_dim as f64 + code_bytes), 0.0, 3.0 * each * head_dim as f64);
            key_bytes = code_bytes + F32 * head_dim as f64;
        }
        self.attend("attention", &shape, key_bytes, rounding, false);
        Ok(())
    }

    fn rounding(&self, weight: &LedgerWeight) -> Rounding {
        layers::rounding(weight.0.dtype())
    }

    fn cache(&self, kind: CacheType, _: usize, key_heads: usize, _: usize) -> Result<LedgerCache> {
        Ok(LedgerCache(kind, key_heads))
    }

    fn cache_write(
        &self,
        _: &LedgerBuffer,
        _: &LedgerBuffer,
        rows: usize,
        cache: &mut LedgerCache,
        _: usize,
    ) -> Result<()> {
        self.elementwise("cache_write", rows * cache.1, 4);
        Ok(())
    }

    fn rope_and_write(
        &self,
        _: &mut LedgerBuffer,
        _: &mut LedgerBuffer,
        _: &LedgerBuffer,
        rows: usize,
        heads: [usize; 2],
        head_dim: usize,
        _: &mut LedgerCache,
        _: usize,
        _: f32,
    ) -> Result<()> {
        self.elementwise("rope_write", rows * (heads[0] + 2 * heads[1]) * head_dim, 2);
        Ok(())
    }

    fn cache_copy(&self, _: &LedgerCache, _: &mut LedgerCache, _: usize) -> Result<()> {
        Ok(())
    }

    fn cache_attention(
        &self,
        _: &LedgerBuffer,
        cache: &LedgerCache,
        shape: AttentionShape,
        _: &mut LedgerBuffer,
    ) -> Result<()> {
        let bytes = cache.0.position_bytes(1, shape.head_dim) as f64;
        let rounding = match cache.0 {
            CacheType::F32 => Rounding::None,
            CacheType::F16 => Rounding::Halves,
            CacheType::I8 => Rounding::Bytes,
        };
        self.attend("cache_attention", &shape, bytes, rounding, true);
        Ok(())
    }

    fn decoder_layer(
        &self,
        layer: &DecoderLayer<'_, LedgerWeight>,
        _: DecoderBuffers<'_, LedgerBuffer>,
        cache: &mut LedgerCache,
        position: usize,
    ) -> Result<bool> {
        let weights = layer.projections.map(|(weight, _)| weight);
        let weights: Vec<&LedgerWeight> =
            weights.into_iter().chain([layer.output, layer.gate, layer.up, layer.down]).collect();
        let dtype = layer.output.0.dtype();
        if !dtype.is_scaled() || weights.iter().any(|weight| weight.0.dtype() != dtype) || cache.0 != CacheType::I8 {
            return Ok(false);
        }
        let before = self.position.lock().unwrap_or_else(PoisonError::into_inner).replace(position);
        if before != Some(position) {
            self.launch("set_position", F32, 0.0, 0.0);
        }
        let stored: f64 = weights.iter().map(|weight| weight.bytes()).sum();
        let elements: f64 = weights.iter().map(|weight| weight.0.elements() as f64).sum();
        let cached = (position + 1) as f64 * (cache.1 * cache.0.position_bytes(1, layer.head_dim)) as f64;
        // What each step leaves to the next is small, and stays in the GPU's cache.
        let steps = F32 * 2.0 * weights.iter().map(|weight| weight.outputs() as f64).sum::<f64>();
        let attended = 4.0 * ((position + 1) * layer.heads[0] * layer.head_dim) as f64;
        let kernel = if dtype == DType::I4 { "decoder_layer_i4" } else { "decoder_layer_i8" };
        self.launch_with_meetings(kernel, stored + cached + steps, 2.0 * elements, attended, 4);
        Ok(true)
    }

    fn unfold(&self, _: &LedgerBuffer, unfold: Unfold, _: &mut LedgerBuffer) -> Result<()> {
        self.elementwise("unfold", unfold.output().iter().product::<usize>() * unfold.column(), 2);
        Ok(())
    }

    fn picture_patches(&self, picture: &Picture<'_>, patch: usize, _: &mut LedgerBuffer, _: usize) -> Result<()> {
        let side = |side: usize| (3 * side * side) as f64;
        let (cut, out) = (picture.cut, F32 * side(picture.side / patch.max(1) * patch));
        let bytes = (4 * cut.width * cut.height) as f64;
        match picture.between() {
            Some(detail) => {
                self.launch("picture_patches", bytes + side(detail), 0.0, 0.0);
                self.launch("picture_patches", side(detail) + out, 0.0, 0.0);
            }
            None => self.launch("picture_patches", bytes + out, 0.0, 0.0),
        }
        Ok(())
    }

    fn depthwise3x3(
        &self,
        _: &LedgerBuffer,
        size: [usize; 3],
        weight: &LedgerWeight,
        _: Option<&LedgerWeight>,
        _: &mut LedgerBuffer,
    ) -> Result<()> {
        self.elementwise("depthwise3x3", size.iter().product::<usize>() * weight.outputs(), 2);
        Ok(())
    }

    fn mean_rows(
        &self,
        _: &LedgerBuffer,
        groups: usize,
        rows: usize,
        width: usize,
        _: &mut LedgerBuffer,
    ) -> Result<()> {
        self.elementwise("mean_rows", groups * rows * width, 1);
        Ok(())
    }

    fn scale_groups(
        &self,
        _: &mut LedgerBuffer,
        groups: usize,
        rows: usize,
        width: usize,
        _: &LedgerBuffer,
    ) -> Result<()> {
        self.elementwise("scale_groups", groups * rows * width, 2);
        Ok(())
    }

    fn bilinear(
        &self,
        _: &LedgerBuffer,
        frames: usize,
        _: (usize, usize),
        to: (usize, usize),
        channels: usize,
        _: &mut LedgerBuffer,
    ) -> Result<()> {
        self.elementwise("bilinear", frames * to.0 * to.1 * channels, 2);
        Ok(())
    }

    fn weighted_sum(&self, parts: &[&LedgerBuffer], _: &[f32], len: usize, _: &mut LedgerBuffer) -> Result<()> {
        self.elementwise("weighted_sum", len, parts.len() + 1);
        Ok(())
    }

    fn power(&self, _: &LedgerBuffer, rows: usize, width: usize, _: &mut LedgerBuffer) -> Result<()> {
        self.elementwise("power", rows * width, 3);
        Ok(())
    }

    fn log_mel(&self, _: &mut LedgerBuffer, len: usize) -> Result<()> {
        self.elementwise("log_mel_most", len, 1);
        self.elementwise("log_mel", len, 2);
        Ok(())
    }

    fn choose(
        &self,
        _: &LedgerBuffer,
        vocabulary: usize,
        allowed: Allowed<'_>,
        forbidden: &[u32],
        choice: Choice,
    ) -> Result<u32> {
        let words = match allowed {
            Allowed::Ids(ids) => ids.len(),
            Allowed::Bits(bits) => 2 * bits.len(),
        };
        let bytes = F32 * (vocabulary + words) as f64;
        self.launch("choose_most", bytes, 0.0, vocabulary as f64);
        if let Choice::Drawn { top_p, .. } = choice {
            // An exponential is some twenty operations.
            self.launch(
                if top_p < 1.0 { "choose_nucleus" } else { "choose_any" },
                bytes,
                0.0,
                20.0 * vocabulary as f64,
            );
        }
        choice::any(allowed, forbidden)
    }
}
