//! BERT and RoBERTa sequence classifiers, as `BertForSequenceClassification` and
//! `RobertaForSequenceClassification` lay them out: the network of the verifier.

use std::path::Path;

use candor_kernels::{Activation, Device};

use super::ModelError;
use super::bert::Bert;
use super::checkpoint::OpenCheckpoint;
use super::config::ClassifierConfig;
use super::layers::{Bias, Linear, Loader, loading};
use super::rows::allocate;
use crate::weights::{Checkpoint, Inventory};

/// A classifier with the buffers of its forward pass.
pub struct Classifier<D: Device> {
    device: D,
    labels: Vec<String>,
    bert: Bert<D>,
    dense: Linear<D>,
    output: Linear<D>,
    pooled: D::Buffer,
    scores: D::Buffer,
    logits: Vec<f32>,
}

impl<D: Device> Classifier<D> {
    /// Opens a folder with config.json and weights.
    pub fn open(folder: &Path, device: D) -> Result<Self, ModelError> {
        Self::open_by(folder, device, Checkpoint::open)
    }

    /// As [`Classifier::open`], without reading a weight: for a device that computes nothing
    /// ([`candor_kernels::cpu::PlanDevice`]).
    pub fn open_headers(folder: &Path, device: D) -> Result<Self, ModelError> {
        Self::open_by(folder, device, Checkpoint::open_headers)
    }

    fn open_by(folder: &Path, device: D, open: OpenCheckpoint) -> Result<Self, ModelError> {
        let config = ClassifierConfig::read(folder)?;
        let checkpoint = open(folder)?;
        let inventory = Inventory::new(&checkpoint);
        let root = Loader::new(&device, inventory.part(""));
        let (width, labels) = (config.encoder.width, config.labels.len());
        // BERT pools inside the encoder and has one layer behind it; RoBERTa has both layers in its head.
        let roberta = config.encoder.padding.is_some();
        let (encoder, dense, output) = match roberta {
            true => ("roberta", "classifier.dense", "classifier.out_proj"),
            false => ("bert", "bert.pooler.dense", "classifier"),
        };
        let (bert, dense, output) = loading(&device, checkpoint.tensor_bytes(""), || {
            let bert = Bert::load(&device, &root.under(encoder), &config.encoder)?;
            let dense = root.linear(dense, width, width, Bias::Each)?;
            Ok((bert, dense, root.linear(output, width, labels, Bias::Each)?))
        })?;
        let classifier = Classifier {
            bert,
            dense,
            output,
            pooled: allocate(&device, &[width])?,
            scores: allocate(&device, &[labels])?,
            logits: vec![0.0; labels],
            labels: config.labels,
            device: device.clone(),
        };
        inventory.finish(|name| {
            name.ends_with("embeddings.position_ids") || name.starts_with("roberta.pooler.") && roberta
        })?;
        Ok(classifier)
    }

    /// The labels, in the order of the logits.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// Rows of the table of words.
    pub fn vocabulary(&self) -> usize {
        self.bert.vocabulary()
    }

    /// The longest text, in ids, that can be read.
    pub fn capacity(&self) -> usize {
        self.bert.capacity()
    }

    /// Ids of one text with its special ids → logits `[labels]`.
    pub fn logits(&mut self, ids: &[u32]) -> Result<&[f32], ModelError> {
        let states = self.bert.forward(&self.device, ids)?;
        self.dense.forward(&self.device, states, 1, Activation::Tanh, &mut self.pooled)?;
        self.output.forward(&self.device, &self.pooled, 1, Activation::Identity, &mut self.scores)?;
        self.device.read(&self.scores, 0, &mut self.logits)?;
        Ok(&self.logits)
    }

    /// Ids of one text → the probability of each label on its own (sigmoid), `[labels]`.
    pub fn probabilities(&mut self, ids: &[u32]) -> Result<Vec<f32>, ModelError> {
        Ok(self.logits(ids)?.iter().copied().map(probability).collect())
    }
}

/// The sigmoid of a logit.
pub(crate) fn probability(logit: f32) -> f32 {
    1.0 / (1.0 + (-logit).exp())
}
