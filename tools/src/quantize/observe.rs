//! A device that computes as another one does, and looks at what goes into some of the layers: `x · xᵀ` summed over all
//! inputs, which is what a calibrated rounding needs to know of them. It can also put other weights in the place of some.
//!
//! A weight is recognised by its bytes, so that models need not know of it.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candor_kernels::cpu::gemm::{MatrixRef, Precision, gemm};
use candor_kernels::cpu::{CpuBuffer, CpuCache, CpuDevice, CpuWeight};
use candor_kernels::device::Result;
use candor_kernels::pixels::Picture;
use candor_kernels::{Activation, Allowed, AttentionShape, CacheType, Choice, Device, HostTensor, Rounding, Unfold};

/// `Σ x · xᵀ` over the inputs of a layer, `[inputs, inputs]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Inputs {
    /// Inputs that were added up.
    pub(super) rows: usize,
    /// The sums, row-major.
    pub(super) sums: Vec<f32>,
}

/// The device.
#[derive(Clone)]
pub(super) struct Observer {
    inner: CpuDevice,
    shared: Arc<Shared>,
}

struct Shared {
    weights: Vec<Known>,
    state: Mutex<State>,
}

/// A weight to recognise.
pub(super) struct Known {
    /// As it lies in the model.
    pub(super) tensor: HostTensor,
    /// What is put in its place.
    pub(super) replacement: Option<HostTensor>,
    /// Whether its inputs are added up.
    pub(super) wanted: bool,
}

#[derive(Default)]
struct State {
    taken: HashSet<usize>,
    /// Weights in the order in which they were first used.
    order: Vec<usize>,
    inputs: HashMap<usize, Inputs>,
    /// Weights that have the same inputs as another one.
    same: HashMap<usize, usize>,
}

/// A weight, and which of the known ones it is.
#[derive(Clone)]
pub(super) struct Weight {
    weight: CpuWeight,
    index: Option<usize>,
}

impl Observer {
    pub(super) fn new(inner: CpuDevice, weights: Vec<Known>) -> Observer {
        Observer { inner, shared: Arc::new(Shared { weights, state: Mutex::default() }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What a thread that panicked has left is added up as far as it came.
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The weights that were used, in the order of their first use.
    pub(super) fn order(&self) -> Vec<usize> {
        self.state().order.clone()
    }

    /// What went into a weight, if that was wanted and it was used.
    pub(super) fn inputs(&self, index: usize) -> Option<Inputs> {
        let state = self.state();
        let owner = state.same.get(&index).copied().unwrap_or(index);
        state.inputs.get(&owner).cloned()
    }

    /// Notes that these weights are multiplied by the same x.
    fn look(&self, x: &CpuBuffer, rows: usize, weights: &[&Weight]) -> Result<()> {
        let mut wanted: Option<(usize, usize)> = None;
        let mut state = self.state();
        for weight in weights {
            let Some(index) = weight.index else { continue };
            if !state.order.contains(&index) {
                state.order.push(index);
            }
            let known = &self.shared.weights[index];
            if known.wanted {
                let (owner, _) = *wanted.get_or_insert((index, known.tensor.row_len()));
                if owner != index {
                    state.same.insert(index, owner);
                }
            }
        }
        let Some((owner, width)) = wanted else { return Ok(()) };
        let mut values = vec![0.0; rows * width];
        self.inner.read(x, 0, &mut values)?;
        let inputs = state.inputs.entry(owner).or_default();
        inputs.rows += rows;
        inputs.sums.resize(width * width, 0.0);
        let x = MatrixRef::row_major(&values, rows, width)?;
        gemm(self.inner.pool(), x.transposed(), x, &mut inputs.sums, true, Precision::F32)
    }
}

impl Device for Observer {
    type Buffer = CpuBuffer;
    type Cache = CpuCache;
    type Weight = Weight;
    type Replay = ();

    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn weight(&self, tensor: &HostTensor) -> Result<Weight> {
        let mut state = self.state();
        let is = |index: &usize| {
            let known = &self.shared.weights[*index].tensor;
            !state.taken.contains(index)
                && known.shape() == tensor.shape()
                && known.dtype() == tensor.dtype()
                && known.bytes() == tensor.bytes()
        };
        let index = (0..self.shared.weights.len()).find(is);
        state.taken.extend(index);
        let replacement = index.and_then(|index| self.shared.weights[index].replacement.as_ref());
        Ok(Weight { weight: self.inner.weight(replacement.unwrap_or(tensor))?, index })
    }

    fn weight_rows(&self, weight: &Weight, first: usize, count: usize) -> Result<Weight> {
        // Rows of a weight see what the whole weight sees, which is looked at once.
        Ok(Weight { weight: self.inner.weight_rows(&weight.weight, first, count)?, index: None })
    }

    fn linear(
        &self,
        x: &CpuBuffer,
        rows: usize,
        weight: &Weight,
        bias: Option<&Weight>,
        activation: Activation,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        self.look(x, rows, &[weight])?;
        self.inner.linear(x, rows, &weight.weight, bias.map(|bias| &bias.weight), activation, out)
    }

    fn linear_each(
        &self,
        x: &CpuBuffer,
        rows: usize,
        layers: &[(&Weight, Option<&Weight>, Activation)],
        outs: &mut [&mut CpuBuffer],
    ) -> Result<()> {
        let weights: Vec<&Weight> = layers.iter().map(|layer| layer.0).collect();
        self.look(x, rows, &weights)?;
        let own: Vec<(&CpuWeight, Option<&CpuWeight>, Activation)> = layers
            .iter()
            .map(|(weight, bias, activation)| (&weight.weight, bias.map(|bias| &bias.weight), *activation))
            .collect();
        self.inner.linear_each(x, rows, &own, outs)
    }

    fn allocate(&self, len: usize) -> Result<CpuBuffer> {
        self.inner.allocate(len)
    }
    fn choose(
        &self,
        logits: &CpuBuffer,
        vocabulary: usize,
        allowed: Allowed<'_>,
        forbidden: &[u32],
        choice: Choice,
    ) -> Result<u32> {
        self.inner.choose(logits, vocabulary, allowed, forbidden, choice)
    }
    fn len(&self, buffer: &CpuBuffer) -> usize {
        self.inner.len(buffer)
    }
    fn write(&self, data: &[f32], to: &mut CpuBuffer, offset: usize) -> Result<()> {
        self.inner.write(data, to, offset)
    }
    fn read(&self, from: &CpuBuffer, offset: usize, out: &mut [f32]) -> Result<()> {
        self.inner.read(from, offset, out)
    }
    fn copy(&self, from: &CpuBuffer, at: usize, to: &mut CpuBuffer, to_at: usize, len: usize) -> Result<()> {
        self.inner.copy(from, at, to, to_at, len)
    }
    fn embed(&self, table: &Weight, ids: &[u32], out: &mut CpuBuffer, offset: usize) -> Result<()> {
        self.inner.embed(&table.weight, ids, out, offset)
    }
    fn layer_norm(
        &self,
        x: &CpuBuffer,
        rows: usize,
        weight: &Weight,
        bias: &Weight,
        eps: f32,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        self.inner.layer_norm(x, rows, &weight.weight, &bias.weight, eps, out)
    }
    fn rms_norm(&self, x: &CpuBuffer, rows: usize, weight: &Weight, eps: f32, out: &mut CpuBuffer) -> Result<()> {
        self.inner.rms_norm(x, rows, &weight.weight, eps, out)
    }
    fn activate(&self, activation: Activation, x: &mut CpuBuffer, len: usize) -> Result<()> {
        self.inner.activate(activation, x, len)
    }
    fn add(&self, x: &mut CpuBuffer, y: &CpuBuffer, len: usize) -> Result<()> {
        self.inner.add(x, y, len)
    }
    fn multiply(&self, x: &mut CpuBuffer, y: &CpuBuffer, len: usize) -> Result<()> {
        self.inner.multiply(x, y, len)
    }
    fn add_positions(&self, x: &mut CpuBuffer, rows: usize, table: &Weight, first: usize) -> Result<()> {
        self.inner.add_positions(x, rows, &table.weight, first)
    }
    fn softmax(&self, x: &CpuBuffer, rows: usize, width: usize, out: &mut CpuBuffer) -> Result<()> {
        self.inner.softmax(x, rows, width, out)
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
        self.inner.rope(x, rows, heads, head_dim, first, theta)
    }
    fn attention(
        &self,
        q: &CpuBuffer,
        k: &CpuBuffer,
        v: &CpuBuffer,
        shape: AttentionShape,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        self.inner.attention(q, k, v, shape, out)
    }
    fn rounding(&self, weight: &Weight) -> Rounding {
        self.inner.rounding(&weight.weight)
    }
    fn cache(&self, kind: CacheType, capacity: usize, key_heads: usize, head_dim: usize) -> Result<CpuCache> {
        self.inner.cache(kind, capacity, key_heads, head_dim)
    }
    fn cache_write(&self, k: &CpuBuffer, v: &CpuBuffer, rows: usize, cache: &mut CpuCache, first: usize) -> Result<()> {
        self.inner.cache_write(k, v, rows, cache, first)
    }
    fn cache_copy(&self, from: &CpuCache, to: &mut CpuCache, positions: usize) -> Result<()> {
        self.inner.cache_copy(from, to, positions)
    }
    fn cache_attention(
        &self,
        q: &CpuBuffer,
        cache: &CpuCache,
        shape: AttentionShape,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        self.inner.cache_attention(q, cache, shape, out)
    }
    fn unfold(&self, x: &CpuBuffer, unfold: Unfold, out: &mut CpuBuffer) -> Result<()> {
        self.inner.unfold(x, unfold, out)
    }
    fn picture_patches(&self, picture: &Picture<'_>, patch: usize, out: &mut CpuBuffer, offset: usize) -> Result<()> {
        self.inner.picture_patches(picture, patch, out, offset)
    }
    fn depthwise3x3(
        &self,
        x: &CpuBuffer,
        size: [usize; 3],
        weight: &Weight,
        bias: Option<&Weight>,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        self.inner.depthwise3x3(x, size, &weight.weight, bias.map(|bias| &bias.weight), out)
    }
    fn mean_rows(&self, x: &CpuBuffer, groups: usize, each: usize, width: usize, out: &mut CpuBuffer) -> Result<()> {
        self.inner.mean_rows(x, groups, each, width, out)
    }
    fn scale_groups(
        &self,
        x: &mut CpuBuffer,
        groups: usize,
        per_group: usize,
        width: usize,
        factor: &CpuBuffer,
    ) -> Result<()> {
        self.inner.scale_groups(x, groups, per_group, width, factor)
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
        self.inner.bilinear(x, frames, from, to, channels, out)
    }
    fn weighted_sum(&self, parts: &[&CpuBuffer], weights: &[f32], len: usize, out: &mut CpuBuffer) -> Result<()> {
        self.inner.weighted_sum(parts, weights, len, out)
    }
    fn power(&self, x: &CpuBuffer, rows: usize, width: usize, out: &mut CpuBuffer) -> Result<()> {
        self.inner.power(x, rows, width, out)
    }
    fn log_mel(&self, x: &mut CpuBuffer, len: usize) -> Result<()> {
        self.inner.log_mel(x, len)
    }
}
