//! The instruction gate: BERT reads the instruction, and its `[CLS]` state weighs the three visual branches.

use candor_kernels::{Activation, Device};

use super::ModelError;
use super::bert::Bert;
use super::config::BertConfig;
use super::layers::{Bias, Linear, Loader};
use super::rows::allocate;

/// Branches that are weighed: video, body, face.
pub const BRANCHES: usize = 3;

/// BERT and the two layers behind it. The answer for the last instruction is kept: it is a constant of a prompt.
pub struct Gate<D: Device> {
    bert: Bert<D>,
    layers: [Linear<D>; 2],
    inner: D::Buffer,
    logits: D::Buffer,
    weights: D::Buffer,
    /// Its ids, and the answer if it is known.
    last_ids: Vec<u32>,
    last: Option<[f32; BRANCHES]>,
    /// Instructions read.
    pub(super) runs: u64,
}

impl<D: Device> Gate<D> {
    pub(super) fn load(
        device: &D,
        bert: &Loader<'_, D>,
        gate: &Loader<'_, D>,
        config: &BertConfig,
    ) -> Result<Self, ModelError> {
        // No key of config.json gives the gate's inner width. Where the file's makes no sense, the shape check says so.
        let inner = gate.part().shape("0.weight")?.first().copied().unwrap_or(1).max(1);
        Ok(Gate {
            bert: Bert::load(device, bert, config)?,
            layers: [
                gate.linear("0", config.width, inner, Bias::Each)?,
                gate.linear("2", inner, BRANCHES, Bias::Each)?,
            ],
            inner: allocate(device, &[inner])?,
            logits: allocate(device, &[BRANCHES])?,
            weights: allocate(device, &[BRANCHES])?,
            last_ids: Vec::new(),
            last: None,
            runs: 0,
        })
    }

    /// Reads the next instruction even if it is the last one again.
    pub(super) fn forget(&mut self) {
        self.last = None;
    }

    /// Word-piece ids of the instruction, `[CLS]` first → weights of video, body and face, summing to 1.
    pub(super) fn forward(&mut self, device: &D, ids: &[u32]) -> Result<[f32; BRANCHES], ModelError> {
        if let Some(weights) = self.last.filter(|_| self.last_ids == ids) {
            return Ok(weights);
        }
        self.runs += 1;
        self.last = None;
        let states = self.bert.forward(device, ids)?;
        let [first, second] = &self.layers;
        first.forward(device, states, 1, Activation::Gelu, &mut self.inner)?;
        second.forward(device, &self.inner, 1, Activation::Identity, &mut self.logits)?;
        device.softmax(&self.logits, 1, BRANCHES, &mut self.weights)?;
        let mut weights = [0.0; BRANCHES];
        device.read(&self.weights, 0, &mut weights)?;
        self.last_ids.clear();
        self.last_ids.extend_from_slice(ids);
        self.last = Some(weights);
        Ok(weights)
    }
}
