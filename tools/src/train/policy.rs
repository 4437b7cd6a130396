//! A decoder in training, with the prompts and completions that it is trained on: from log-probabilities of tokens to
//! gradients by them. What stands before the decoder (towers, projector, gate) stays as it is, so its tokens come as
//! rows.

use super::decoder::{Decoder, DecoderBuffers, DecoderSize, Gradients, Target, Weights};
use super::layers::{Tree, accumulate, fit};
use super::lora::LoraSettings;
use super::parameters::Plan;
use super::products::{self, Kept};
use anyhow::{Context, ensure};
use candor::model::config::DecoderConfig;
use candor::model::{Adapter, ModelConfig};
use candor::weights::Checkpoint;
use std::path::Path;

/// A piece of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum PromptPart {
    /// Token ids.
    Tokens(Vec<u32>),
    /// Embeddings in place of tokens, `[n, width]`.
    Rows(Vec<f32>),
}

/// Positions of a prompt for a decoder of this width.
pub fn length(prompt: &[PromptPart], width: usize) -> usize {
    let positions = |part: &PromptPart| match part {
        PromptPart::Tokens(ids) => ids.len(),
        PromptPart::Rows(rows) => rows.len() / width,
    };
    prompt.iter().map(positions).sum()
}

/// A prompt and its completions, each at least one token.
#[derive(Clone, Debug, PartialEq)]
pub struct Continued {
    /// The prompt's pieces.
    pub prompt: Vec<PromptPart>,
    /// The completions' tokens.
    pub completions: Vec<Vec<u32>>,
}

/// Buffers of one worker.
#[derive(Default)]
pub struct PolicyBuffers {
    /// The decoder's.
    pub decoder: DecoderBuffers,
    x: Vec<f32>,
    x_gradient: Vec<f32>,
}

/// A decoder whose factors, or all of whose weights, are trained.
pub struct Policy {
    /// The decoder.
    pub decoder: Decoder,
    /// Which of its tensors lies where.
    base_plan: Plan,
    /// Lets a GPU hold the decoder's values, where only factors are trained. Ends before they do.
    _kept: Option<Kept>,
    base: Vec<f32>,
    /// The factors' values; empty where all weights are trained.
    factors: Vec<f32>,
    /// The weights as they were, where all are trained and the reference model is asked for.
    before: Option<Vec<f32>>,
}

/// The trainer's sizes of a decoder.
pub(super) fn size_of(config: &DecoderConfig) -> DecoderSize {
    let DecoderConfig { width, layers, heads, key_heads, head_dim, mlp, vocabulary, theta, eps, tied, .. } = *config;
    DecoderSize { width, layers, heads, key_heads, head_dim, hidden: mlp, vocabulary, theta, eps, tied }
}

impl Policy {
    /// Reads the decoder of a model folder, widened to f32. With `lora` factors beside it are trained, drawn from
    /// `seed`; without, all its weights, and with `keep_reference` the weights as they were are kept for comparison.
    pub fn open(folder: &Path, lora: Option<LoraSettings>, keep_reference: bool, seed: u64) -> anyhow::Result<Self> {
        let config = ModelConfig::read(folder)?.decoder;
        let checkpoint = Checkpoint::open(folder)?;
        Self::read(size_of(&config), config.positions, &checkpoint, lora, keep_reference, seed)
    }

    /// As [`Policy::open`], from a checkpoint with a decoder of these sizes.
    pub fn read(
        size: DecoderSize,
        positions: usize,
        checkpoint: &Checkpoint,
        lora: Option<LoraSettings>,
        keep_reference: bool,
        seed: u64,
    ) -> anyhow::Result<Self> {
        let mut base_plan = Plan::default();
        let mut decoder = Decoder::new(&mut base_plan, size, positions);
        // As transformers' trainer has it: all but norms and biases decay.
        base_plan.decay("model.embed_tokens.weight");
        let mut base = vec![0.0; base_plan.len()];
        base_plan.fill(checkpoint, &mut base, |name| Some(name.to_owned()))?;
        let mut factors = Vec::new();
        if let Some(settings) = lora {
            decoder = decoder.with_lora(settings);
            factors = decoder.lora().map(|lora| lora.initial(seed)).unwrap_or_default();
        }
        let before = (keep_reference && decoder.lora().is_none()).then(|| base.clone());
        let kept = decoder.lora().is_some().then(|| products::keep(&base));
        Ok(Policy { decoder, base_plan, _kept: kept, base, factors, before })
    }

    /// The trained tensors.
    pub fn plan(&self) -> &Plan {
        self.decoder.lora().map_or(&self.base_plan, |lora| &lora.plan)
    }

    /// Their values.
    pub fn trained(&self) -> &[f32] {
        if self.decoder.lora().is_some() { &self.factors } else { &self.base }
    }

    /// Their values, to be changed.
    pub fn trained_mut(&mut self) -> &mut [f32] {
        if self.decoder.lora().is_some() { &mut self.factors } else { &mut self.base }
    }

    /// The model in training.
    pub fn weights(&self) -> Weights<'_> {
        Weights { base: &self.base, low_rank: self.decoder.lora().map(|_| self.factors.as_slice()) }
    }

    /// The model before training: the same weights without the factors, or the copy that was kept.
    pub fn reference(&self) -> Weights<'_> {
        Weights::base(self.before.as_deref().unwrap_or(&self.base))
    }

    /// What was trained, for the runtime.
    pub fn adapter(&self) -> anyhow::Result<Adapter> {
        if let Some(lora) = self.decoder.lora() {
            return Ok(lora.adapter(&self.factors)?);
        }
        let mut adapter = Adapter::in_memory("the weights in training");
        for entry in self.base_plan.entries() {
            adapter.replace(&entry.name, &entry.shape, &self.base[entry.range.clone()])?;
        }
        Ok(adapter)
    }

    /// The decoder's tensors as they stand, for a file.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize], &[f32])> {
        let entries = self.base_plan.entries().iter();
        entries.map(|entry| (entry.name.as_str(), entry.shape.as_slice(), &self.base[entry.range.clone()]))
    }

    fn layout(&self, continued: &Continued) -> anyhow::Result<(Tree, Vec<Target>)> {
        let shared = length(&continued.prompt, self.decoder.size.width);
        ensure!(shared > 0, "the prompt is empty");
        ensure!(continued.completions.iter().all(|tokens| !tokens.is_empty()), "a completion is empty");
        // The last token of a completion is predicted, not read.
        let tree = Tree { shared, branches: continued.completions.iter().map(|tokens| tokens.len() - 1).collect() };
        let mut targets = Vec::new();
        for (branch, tokens) in continued.completions.iter().enumerate() {
            let start = tree.start(branch);
            for (index, &id) in tokens.iter().enumerate() {
                let row = if index == 0 { shared - 1 } else { start + index - 1 };
                targets.push(Target { row, id, weight: 0.0 });
            }
        }
        let vocabulary = self.decoder.size.vocabulary;
        let prompt_ids = continued.prompt.iter().flat_map(|part| match part {
            PromptPart::Tokens(ids) => ids.as_slice(),
            PromptPart::Rows(_) => &[],
        });
        let mut ids = prompt_ids.chain(continued.completions.iter().flatten());
        let outside = ids.find(|&&id| id as usize >= vocabulary);
        ensure!(outside.is_none(), "token id {outside:?} is outside the vocabulary of {vocabulary}");
        Ok((tree, targets))
    }

    /// Calls `row(row, id)` for each row that is a token's embedding.
    fn tokens(&self, continued: &Continued, mut row: impl FnMut(usize, usize)) {
        let mut place = 0;
        for part in &continued.prompt {
            match part {
                PromptPart::Tokens(ids) => {
                    ids.iter().enumerate().for_each(|(i, &id)| row(place + i, id as usize));
                    place += ids.len();
                }
                PromptPart::Rows(rows) => place += rows.len() / self.decoder.size.width,
            }
        }
        for tokens in &continued.completions {
            let read = &tokens[..tokens.len() - 1];
            read.iter().enumerate().for_each(|(i, &id)| row(place + i, id as usize));
            place += read.len();
        }
    }

    /// Log-probability of each completion's tokens and the entropy of what could stand there, `[completions][tokens]`.
    pub fn log_probabilities(
        &self,
        weights: Weights<'_>,
        continued: &Continued,
        buffers: &mut PolicyBuffers,
    ) -> anyhow::Result<Vec<Vec<(f32, f32)>>> {
        let width = self.decoder.size.width;
        let (tree, targets) = self.layout(continued)?;
        let x = fit(&mut buffers.x, tree.rows() * width);
        let table = &weights.base[self.decoder.embedding.clone()];
        self.tokens(continued, |row, id| x[row * width..][..width].copy_from_slice(&table[id * width..][..width]));
        let mut place = 0;
        for part in &continued.prompt {
            match part {
                PromptPart::Tokens(ids) => place += ids.len() * width,
                PromptPart::Rows(rows) => {
                    x[place..][..rows.len()].copy_from_slice(rows);
                    place += rows.len();
                }
            }
        }
        self.decoder.forward(weights, x, &[tree], &mut buffers.decoder);
        let mut all = self.decoder.log_probabilities(weights, &targets, &mut buffers.decoder).into_iter();
        Ok(continued.completions.iter().map(|tokens| all.by_ref().take(tokens.len()).collect()).collect())
    }

    /// Adds to `gradients` those of a loss whose derivatives by the log-probabilities are `slopes`
    /// (`[completions][tokens]`), after [`Policy::log_probabilities`] of the model in training. Returns how many of the
    /// tokens with a slope were the likeliest.
    pub fn backward(
        &self,
        continued: &Continued,
        slopes: &[Vec<f32>],
        gradients: &mut [f32],
        buffers: &mut PolicyBuffers,
    ) -> anyhow::Result<usize> {
        let width = self.decoder.size.width;
        let (tree, mut targets) = self.layout(continued)?;
        let slopes = slopes.iter().flatten();
        // A target's loss is its weight times the negative log-probability.
        targets.iter_mut().zip(slopes).for_each(|(target, slope)| target.weight = -slope);
        targets.retain(|target| target.weight != 0.0);
        let x_gradient = fit(&mut buffers.x_gradient, tree.rows() * width);
        let trees = [tree];
        let decoder = &mut buffers.decoder;
        let right;
        if self.decoder.lora().is_some() {
            let sums = Gradients { base: None, low_rank: Some(gradients) };
            (_, right) = self.decoder.backward(self.weights(), sums, &trees, &targets, decoder, x_gradient);
        } else {
            let sums = Gradients { base: Some(&mut *gradients), low_rank: None };
            (_, right) = self.decoder.backward(self.weights(), sums, &trees, &targets, decoder, x_gradient);
            let table = &mut gradients[self.decoder.embedding.clone()];
            self.tokens(continued, |row, id| {
                accumulate(&mut table[id * width..][..width], &x_gradient[row * width..][..width]);
            });
        }
        Ok(right.into_iter().filter(|right| *right).count())
    }

    /// Writes what was trained into `folder`: the factors as a PEFT folder for the model `base`.
    pub fn write_factors(&self, folder: &Path, base: &str) -> anyhow::Result<()> {
        let lora = self.decoder.lora().context("there are no factors")?;
        lora.write(folder, &self.factors, base)
    }
}
