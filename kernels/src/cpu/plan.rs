//! The CPU device on paper: it takes the same calls as [`CpuDevice`], computes nothing, and counts the memory that the CPU
//! device would hold. A model that is opened and run on it shows what it takes before a weight is read.
//!
//! Counted are buffers and caches, copies of weights, the memory that products keep between calls, and the pages of mapped
//! weights that an operation would touch. Of a GPU, which has all of those in its own memory, that memory is counted instead.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::cache::CpuCache;
use super::gemm::panel_bytes;
use super::linear::DOT_ROWS;
use super::{CpuDevice, CpuWeight, is_widened};
use crate::choice::{self, Allowed, Choice};
use crate::cuda::CudaCache;
use crate::cuda::arena::ALIGNMENT;
use crate::cuda::attention::{parts_bytes, rounded_keys};
use crate::cuda::layers::{rounding, scratch_bytes};
use crate::cuda::pixels::picture_bytes;
use crate::device::{Activation, AttentionShape, CacheType, Device, DeviceError, Result, Rounding, Unfold};
use crate::pixels::Picture;
use crate::tensor::HostTensor;

/// A page fault on a mapped file brings in the pages around it, as far as they are in the page cache: Linux maps 64 kB at
/// once (`fault_around_bytes`).
const BLOCK: usize = 64 << 10;

/// Bytes that a row of activations takes as bytes, for each of its elements: codes, and for each 128 of them a scale and
/// seven sums.
const QUANTISED_ELEMENT: f64 = 1.0 + (4.0 + 28.0) / 128.0;

/// A GPU's driver gives memory in pieces of so many bytes.
const PIECE: usize = 512;

/// The CPU device on paper; clones count together.
#[derive(Clone, Debug)]
pub struct PlanDevice {
    cpu: CpuDevice,
    /// Whether what a GPU would hold is counted.
    gpu: bool,
    tally: Arc<Mutex<Tally>>,
}

/// Bytes that the CPU device would hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Pages of mapped files. The system may drop them and read them again.
    pub mapped: u64,
    /// Buffers, caches, copies of weights, and what products keep between calls.
    pub owned: u64,
    /// The same and all weights, in a GPU's memory.
    pub gpu: u64,
}

impl Held {
    /// The first two together: the process's memory.
    pub fn total(self) -> u64 {
        self.mapped + self.owned
    }
}

#[derive(Debug, Default)]
struct Tally {
    /// Buffers, caches and copies that there are.
    live: usize,
    /// The same in a GPU's memory, weights among them.
    on_gpu: usize,
    /// Activations as bytes, their scales, and parts of an attention in a GPU's memory: the most that one operation needed.
    scratch: [usize; 2],
    /// The same of what pictures are made of.
    pictures: usize,
    parts: usize,
    /// Panels and bytes of activations: the most that one product needed.
    panels: usize,
    quantised: usize,
    /// Numbers of the blocks of address space that were touched.
    touched: BTreeSet<usize>,
    most: Held,
}

impl Tally {
    fn held(&self) -> Held {
        let owned = self.live + self.panels + self.quantised;
        let gpu = self.on_gpu + self.scratch[0] + self.scratch[1] + self.parts + self.pictures;
        Held { mapped: (self.touched.len() * BLOCK) as u64, owned: owned as u64, gpu: gpu as u64 }
    }

    fn need_scratch(&mut self, bytes: [usize; 2]) {
        self.scratch = [0, 1].map(|i| self.scratch[i].max(bytes[i]));
    }

    /// Bytes that there are in a GPU's memory, or in the process's.
    fn live_in(&mut self, gpu: bool) -> &mut usize {
        if gpu { &mut self.on_gpu } else { &mut self.live }
    }

    fn touch(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            let first = bytes.as_ptr() as usize;
            self.touched.extend(first / BLOCK..=(first + bytes.len() - 1) / BLOCK);
        }
    }

    /// Remembers what is held, if it is more than ever.
    fn note(&mut self) {
        let held = self.held();
        if (held.total(), held.gpu) > (self.most.total(), self.most.gpu) {
            self.most = held;
        }
    }
}

/// Memory that would be taken; given back when it is dropped.
#[derive(Debug)]
pub struct PlanBuffer {
    /// Elements of a buffer.
    len: usize,
    bytes: usize,
    gpu: bool,
    tally: Arc<Mutex<Tally>>,
}

impl Drop for PlanBuffer {
    fn drop(&mut self) {
        *lock(&self.tally).live_in(self.gpu) -= self.bytes;
    }
}

/// A weight and, where the CPU device would make one, its copy.
#[derive(Clone, Debug)]
pub struct PlanWeight {
    weight: CpuWeight,
    /// Scales that were copied, and the whole weight where it is widened.
    copy: Option<Arc<PlanBuffer>>,
}

fn lock(tally: &Mutex<Tally>) -> MutexGuard<'_, Tally> {
    // Sums are whole whoever panicked.
    tally.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PlanDevice {
    /// Counts what `cpu` would hold.
    pub fn new(cpu: CpuDevice) -> Self {
        PlanDevice { cpu, gpu: false, tally: Arc::default() }
    }

    /// Counts what a GPU would hold that computes in place of `cpu`.
    pub fn of_gpu(cpu: CpuDevice) -> Self {
        PlanDevice { gpu: true, ..Self::new(cpu) }
    }

    /// Whether it counts for a GPU.
    pub fn is_of_gpu(&self) -> bool {
        self.gpu
    }

    /// What would be held now.
    pub fn held(&self) -> Held {
        lock(&self.tally).held()
    }

    /// The most that would have been held at once.
    pub fn most(&self) -> Held {
        let mut tally = lock(&self.tally);
        tally.note();
        tally.most
    }

    /// Runs `code` and forgets the pages of weights that it touched: their owner lets go of them behind it.
    pub fn passing<R>(&self, code: impl FnOnce() -> R) -> R {
        let before = lock(&self.tally).touched.clone();
        let result = code();
        let mut tally = lock(&self.tally);
        tally.note();
        tally.touched = before;
        result
    }

    fn take(&self, len: usize, bytes: usize) -> PlanBuffer {
        let bytes = if self.gpu { bytes.next_multiple_of(PIECE) } else { bytes };
        let mut tally = lock(&self.tally);
        *tally.live_in(self.gpu) += bytes;
        tally.note();
        PlanBuffer { len, bytes, gpu: self.gpu, tally: self.tally.clone() }
    }

    /// A weight in a GPU's arenas.
    fn upload(&self, tensor: &HostTensor) -> PlanBuffer {
        let scales = tensor.scales().map_or(0, |scales| match (scales.of_groups(), scales.of_rows()) {
            (Some((bytes, _)), _) => bytes.len(),
            (None, rows) => rows.map_or(0, size_of_val),
        });
        let bytes = [tensor.bytes().len(), scales].map(|bytes| bytes.next_multiple_of(ALIGNMENT)).iter().sum();
        let mut tally = lock(&self.tally);
        *tally.live_in(true) += bytes;
        tally.note();
        PlanBuffer { len: tensor.elements(), bytes, gpu: true, tally: self.tally.clone() }
    }

    /// An operation reads all of some weights.
    fn read_weights<'a>(&self, weights: impl IntoIterator<Item = &'a PlanWeight>) {
        if self.gpu {
            return;
        }
        let mut tally = lock(&self.tally);
        for PlanWeight { weight, copy } in weights {
            if copy.is_some() && is_widened(&weight.0) {
                continue;
            }
            tally.touch(weight.0.bytes());
            if let Some((scales, _)) = weight.0.scales().and_then(|scales| scales.of_groups()) {
                tally.touch(scales);
            }
        }
        tally.note();
    }

    /// An operation reads some rows of a table.
    fn read_rows(&self, table: &PlanWeight, rows: impl Iterator<Item = usize>) {
        if self.gpu || table.copy.is_some() && is_widened(&table.weight.0) {
            return;
        }
        let mut tally = lock(&self.tally);
        for row in rows {
            if let Some(view) = table.weight.0.rows_view(row, 1) {
                tally.touch(view.bytes());
            }
        }
    }

    /// A product of `rows` rows of x with a weight keeps memory for the next.
    fn keep_for_product(&self, rows: usize, weight: &PlanWeight) {
        let (outputs, depth) = (weight.weight.0.rows(), weight.weight.0.row_len());
        let mut tally = lock(&self.tally);
        if self.gpu {
            tally.need_scratch(scratch_bytes(weight.weight.0.dtype(), rows, depth));
            return;
        }
        if self.cpu.rounding(&weight.weight) == Rounding::Bytes {
            tally.quantised = tally.quantised.max((rows as f64 * depth as f64 * QUANTISED_ELEMENT) as usize);
        } else if rows > DOT_ROWS {
            tally.panels = tally.panels.max(panel_bytes(rows, outputs, depth, self.cpu.pool().threads()));
        }
    }
}

impl Device for PlanDevice {
    type Buffer = PlanBuffer;
    type Cache = PlanBuffer;
    type Weight = PlanWeight;
    type Replay = ();

    fn describe(&self) -> String {
        format!("{}, on paper", self.cpu.describe())
    }

    fn allocate(&self, len: usize) -> Result<PlanBuffer> {
        let bytes = len.checked_mul(size_of::<f32>()).ok_or(DeviceError::OutOfMemory { bytes: usize::MAX })?;
        Ok(self.take(len, bytes))
    }

    fn len(&self, buffer: &PlanBuffer) -> usize {
        buffer.len
    }

    fn write(&self, _: &[f32], _: &mut PlanBuffer, _: usize) -> Result<()> {
        Ok(())
    }

    fn read(&self, _: &PlanBuffer, _: usize, out: &mut [f32]) -> Result<()> {
        out.fill(0.0);
        Ok(())
    }

    fn copy(&self, _: &PlanBuffer, _: usize, _: &mut PlanBuffer, _: usize, _: usize) -> Result<()> {
        Ok(())
    }

    fn weight(&self, tensor: &HostTensor) -> Result<PlanWeight> {
        if self.gpu {
            let copy = Arc::new(self.upload(tensor));
            return Ok(PlanWeight { weight: CpuWeight(tensor.clone()), copy: Some(copy) });
        }
        let copied = match tensor.scales().and_then(|scales| scales.of_rows()) {
            Some(scales) => scales.len(),
            None if is_widened(tensor) => tensor.elements(),
            None => 0,
        };
        let copy = (copied > 0).then(|| Arc::new(self.take(copied, copied * size_of::<f32>())));
        Ok(PlanWeight { weight: CpuWeight(tensor.clone()), copy })
    }

    fn weight_rows(&self, weight: &PlanWeight, first: usize, count: usize) -> Result<PlanWeight> {
        Ok(PlanWeight { weight: self.cpu.weight_rows(&weight.weight, first, count)?, copy: weight.copy.clone() })
    }

    fn embed(&self, table: &PlanWeight, ids: &[u32], _: &mut PlanBuffer, _: usize) -> Result<()> {
        self.read_rows(table, ids.iter().map(|&id| id as usize));
        Ok(())
    }

    fn linear(
        &self,
        _: &PlanBuffer,
        rows: usize,
        weight: &PlanWeight,
        bias: Option<&PlanWeight>,
        _: Activation,
        _: &mut PlanBuffer,
    ) -> Result<()> {
        self.keep_for_product(rows, weight);
        self.read_weights([weight].into_iter().chain(bias));
        Ok(())
    }

    fn layer_norm(
        &self,
        _: &PlanBuffer,
        _: usize,
        weight: &PlanWeight,
        bias: &PlanWeight,
        _: f32,
        _: &mut PlanBuffer,
    ) -> Result<()> {
        self.read_weights([weight, bias]);
        Ok(())
    }

    fn rms_norm(&self, _: &PlanBuffer, _: usize, weight: &PlanWeight, _: f32, _: &mut PlanBuffer) -> Result<()> {
        self.read_weights([weight]);
        Ok(())
    }

    fn activate(&self, _: Activation, _: &mut PlanBuffer, _: usize) -> Result<()> {
        Ok(())
    }

    fn add(&self, _: &mut PlanBuffer, _: &PlanBuffer, _: usize) -> Result<()> {
        Ok(())
    }

    fn multiply(&self, _: &mut PlanBuffer, _: &PlanBuffer, _: usize) -> Result<()> {
        Ok(())
    }

    fn add_positions(&self, _: &mut PlanBuffer, rows: usize, table: &PlanWeight, first: usize) -> Result<()> {
        let all = table.weight.0.rows();
        self.read_rows(table, (first..first + rows.min(all)).map(|row| row % all.max(1)));
        Ok(())
    }

    fn softmax(&self, _: &PlanBuffer, _: usize, _: usize, _: &mut PlanBuffer) -> Result<()> {
        Ok(())
    }

    fn rope(&self, _: &mut PlanBuffer, _: usize, _: usize, _: usize, _: usize, _: f32) -> Result<()> {
        Ok(())
    }

    fn attention(
        &self,
        _: &PlanBuffer,
        _: &PlanBuffer,
        _: &PlanBuffer,
        shape: AttentionShape,
        _: &mut PlanBuffer,
    ) -> Result<()> {
        if self.gpu && shape.rounding == Rounding::Bytes && shape.queries > 1 {
            let [elements, scales] = rounded_keys(&shape).unwrap_or([usize::MAX; 2]);
            let mut tally = lock(&self.tally);
            tally.need_scratch([elements, scales.saturating_mul(size_of::<f32>())]);
            tally.note();
        }
        Ok(())
    }

    fn rounding(&self, weight: &PlanWeight) -> Rounding {
        if self.gpu { rounding(weight.weight.0.dtype()) } else { self.cpu.rounding(&weight.weight) }
    }

    fn cache(&self, kind: CacheType, capacity: usize, key_heads: usize, head_dim: usize) -> Result<PlanBuffer> {
        let of_cpu = CpuCache::bytes(kind, capacity, key_heads, head_dim)?;
        let bytes = if self.gpu { CudaCache::bytes(kind, capacity, key_heads, head_dim) } else { of_cpu };
        Ok(self.take(capacity, bytes))
    }

    fn cache_write(&self, _: &PlanBuffer, _: &PlanBuffer, _: usize, _: &mut PlanBuffer, _: usize) -> Result<()> {
        Ok(())
    }

    fn cache_copy(&self, _: &PlanBuffer, _: &mut PlanBuffer, _: usize) -> Result<()> {
        Ok(())
    }

    fn cache_attention(
        &self,
        _: &PlanBuffer,
        cache: &PlanBuffer,
        shape: AttentionShape,
        _: &mut PlanBuffer,
    ) -> Result<()> {
        if self.gpu && shape.queries == 1 {
            let mut tally = lock(&self.tally);
            tally.parts = tally.parts.max(parts_bytes(cache.len, shape.heads, shape.head_dim));
            tally.note();
        }
        Ok(())
    }

    fn unfold(&self, _: &PlanBuffer, _: Unfold, _: &mut PlanBuffer) -> Result<()> {
        Ok(())
    }

    fn makes_pictures(&self) -> bool {
        self.gpu
    }

    fn picture_patches(&self, picture: &Picture<'_>, _: usize, _: &mut PlanBuffer, _: usize) -> Result<()> {
        if self.gpu {
            let mut tally = lock(&self.tally);
            tally.pictures = tally.pictures.max(picture_bytes(picture));
            tally.note();
        }
        Ok(())
    }

    fn depthwise3x3(
        &self,
        _: &PlanBuffer,
        _: [usize; 3],
        weight: &PlanWeight,
        bias: Option<&PlanWeight>,
        _: &mut PlanBuffer,
    ) -> Result<()> {
        self.read_weights([weight].into_iter().chain(bias));
        Ok(())
    }

    fn mean_rows(&self, _: &PlanBuffer, _: usize, _: usize, _: usize, _: &mut PlanBuffer) -> Result<()> {
        Ok(())
    }

    fn scale_groups(&self, _: &mut PlanBuffer, _: usize, _: usize, _: usize, _: &PlanBuffer) -> Result<()> {
        Ok(())
    }

    fn bilinear(
        &self,
        _: &PlanBuffer,
        _: usize,
        _: (usize, usize),
        _: (usize, usize),
        _: usize,
        _: &mut PlanBuffer,
    ) -> Result<()> {
        Ok(())
    }

    fn weighted_sum(&self, _: &[&PlanBuffer], _: &[f32], _: usize, _: &mut PlanBuffer) -> Result<()> {
        Ok(())
    }

    fn power(&self, _: &PlanBuffer, _: usize, _: usize, _: &mut PlanBuffer) -> Result<()> {
        Ok(())
    }

    fn log_mel(&self, _: &mut PlanBuffer, _: usize) -> Result<()> {
        Ok(())
    }

    fn choose(&self, _: &PlanBuffer, _: usize, allowed: Allowed<'_>, forbidden: &[u32], _: Choice) -> Result<u32> {
        choice::any(allowed, forbidden)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_the_device_would_hold() {
        let plan = PlanDevice::new(CpuDevice::new(Some(1)));
        let mut buffer = plan.allocate(1000).expect("a buffer");
        let other = plan.allocate(500).expect("a buffer");
        assert_eq!((plan.held(), plan.len(&buffer)), (Held { owned: 6000, ..Held::default() }, 1000));
        drop(other);
        buffer = plan.allocate(2000).expect("a longer one"); // before the shorter one is gone
        assert_eq!((plan.held().owned, plan.most().owned, plan.len(&buffer)), (8000, 12000, 2000));

        let weight = HostTensor::from_f32(&[0.0; 64], &[8, 8]).expect("a weight");
        let weight = plan.weight(&weight).expect("a weight");
        assert_eq!(plan.held().mapped, 0, "nothing is touched before it is used");
        let mut out = plan.allocate(0).expect("a buffer");
        let linear = |out: &mut PlanBuffer| plan.linear(&buffer, 1, &weight, None, Activation::Identity, out);
        plan.passing(|| linear(&mut out)).expect("a product");
        assert_eq!(plan.held().mapped, 0);
        linear(&mut out).expect("a product");
        assert!((1..=2).contains(&(plan.held().mapped / BLOCK as u64)));
    }

    #[test]
    fn of_a_gpu_its_memory_is_counted() {
        let plan = PlanDevice::of_gpu(CpuDevice::new(Some(1)));
        let x = plan.allocate(200).expect("a buffer");
        assert_eq!(plan.held(), Held { gpu: 1024, ..Held::default() });
        let weight = HostTensor::from_f32(&[0.0; 65], &[5, 13]).expect("a weight");
        let weight = plan.weight(&weight).expect("a weight");
        let view = plan.weight_rows(&weight, 1, 2).expect("rows");
        drop(weight);
        plan.linear(&x, 1, &view, None, Activation::Identity, &mut plan.allocate(0).expect("none")).expect("a product");
        assert_eq!(plan.held(), Held { gpu: 1024 + 512, ..Held::default() });
        let _cache = plan.cache(CacheType::F16, 100, 2, 64).expect("a cache");
        assert_eq!(plan.held().gpu, 1024 + 512 + 2 * 2 * 100 * 128);
        drop((x, view));
        assert_eq!(plan.held().gpu, 2 * 2 * 100 * 128);
        assert_eq!(plan.most().gpu, 1024 + 512 + 2 * 2 * 100 * 128);
    }

    #[test]
    fn caches_are_as_large_as_they_are_counted() {
        for kind in [CacheType::F32, CacheType::F16, CacheType::I8] {
            let cache = CpuCache::new(kind, 70, 2, 64).expect("a cache");
            let bytes = CpuCache::bytes(kind, 70, 2, 64).expect("a size");
            assert_eq!(cache.held(), bytes, "{kind:?}");
        }
    }

    #[test]
    fn small_halves_are_widened_and_large_ones_are_not() {
        let plan = PlanDevice::new(CpuDevice::new(Some(1)));
        for (elements, copied) in [(64, 256), (100_000, 0)] {
            let bytes: crate::tensor::Bytes = Arc::new(vec![0_u8; 2 * elements]);
            let half = HostTensor::new(bytes, 0, 2 * elements, crate::DType::F16, vec![elements], None);
            let _kept = plan.weight(&half.expect("halves")).expect("a weight");
            assert_eq!(plan.held().owned, copied);
        }
    }
}
