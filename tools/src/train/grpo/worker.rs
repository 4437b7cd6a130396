//! One thread's share of a step: rollouts by the runtime, their rewards, and the gradients of its groups.

use super::objective::{Objective, Token};
use super::settings::GrpoArgs;
use crate::dataset::{Dataset, FeatureCache};
use crate::reward::{Rewards, Scorer, Weights};
use crate::train::policy::{Continued, Policy, PolicyBuffers, PromptPart, length};
use crate::train::tuning::prompts::{Prompts, describe};
use anyhow::{Context, ensure};
use candor::manifest::Manifest;
use candor::model::{Adapter, Batch, LanguageModel, Piece, Session};
use candor::text::rollout::{Rollout, RolloutSettings, roll_out};
use candor::verify::Verifier;
use candor_kernels::Device;
use std::path::Path;

/// Sequences that a thread continues side by side, about.
pub(super) const SLOTS: usize = 64;

/// Sentences whose reading a thread remembers, some 30 MB.
pub(super) const REMEMBERED: usize = 1 << 17;

/// A thread's models and buffers.
pub struct Worker<D: Device> {
    prompts: Prompts<D>,
    sequences: Option<(Session<D>, Batch<D>)>,
    scorer: Scorer<Verifier<D>>,
    buffers: PolicyBuffers,
}

/// A prompt with its completions, on its way from the rollout to the gradient.
pub struct Group {
    /// The item's place in the data.
    pub item: usize,
    /// The prompt and the completions' tokens.
    pub continued: Continued,
    /// The rollouts.
    pub rollouts: Vec<Rollout>,
    /// The completions as text.
    pub texts: Vec<String>,
    /// Their rewards.
    pub rewards: Vec<Rewards>,
    /// The weighted sums of them.
    pub totals: Vec<f32>,
    /// Log-probabilities when the rollouts were drawn, as the trainer has them; filled by the first update.
    old: Vec<Vec<f32>>,
    /// Log-probabilities in the reference model, where the objective wants them.
    reference: Vec<Vec<f32>>,
}

/// What an update's losses of some groups add up to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sums {
    /// Loss.
    pub loss: f64,
    /// Tokens that were trained on.
    pub tokens: usize,
    /// Divergence from the reference, over tokens.
    pub divergence: f64,
    /// Entropy, over tokens.
    pub entropy: f64,
    /// Tokens whose ratio was clipped.
    pub clipped: usize,
    /// Difference between the trainer's and the rollout's log-probabilities, over tokens.
    pub mismatch: f64,
    /// The largest of them.
    pub worst_mismatch: f64,
    /// Correcting weights, over tokens.
    pub importance: f64,
    /// Rows that went through the decoder.
    pub rows: usize,
}

impl Sums {
    /// Adds others.
    pub fn add(&mut self, other: &Sums) {
        self.loss += other.loss;
        self.tokens += other.tokens;
        self.divergence += other.divergence;
        self.entropy += other.entropy;
        self.clipped += other.clipped;
        self.mismatch += other.mismatch;
        self.worst_mismatch = self.worst_mismatch.max(other.worst_mismatch);
        self.importance += other.importance;
        self.rows += other.rows;
    }
}

/// What the losses of a step are divided by.
#[derive(Clone, Copy, Debug)]
pub struct Counts {
    /// Completions, those left out for their length included.
    pub completions: usize,
    /// Tokens that are trained on.
    pub tokens: usize,
}

impl Counts {
    /// Those of some groups.
    pub fn of<'a>(groups: impl Iterator<Item = &'a Group>, objective: &Objective) -> Counts {
        let mut counts = Counts { completions: 0, tokens: 0 };
        for group in groups {
            counts.completions += group.rollouts.len();
            let kept = group.rollouts.iter().enumerate().filter(|(i, _)| group.counts(*i, objective));
            counts.tokens += kept.map(|(_, one)| one.tokens.len()).sum::<usize>();
        }
        counts
    }
}

impl<D: Device> Worker<D> {
    /// Opens the model and its verifier for one thread; the weights are mapped, so that threads share them.
    pub fn open(args: &GrpoArgs, manifest: &Manifest, verifier: &Path, device: D) -> anyhow::Result<Worker<D>> {
        let mut buffers = PolicyBuffers::default();
        buffers.decoder.checkpointing = args.tuning.checkpointing;
        Ok(Worker {
            prompts: Prompts::open(&args.input.model, manifest, device.clone())?,
            sequences: None,
            scorer: Scorer::new(Verifier::open(verifier, device)?.remembering(REMEMBERED), args.rewards.guard),
            buffers,
        })
    }

    /// Uses what the trainer has come to from now on.
    pub fn adapt(&mut self, adapter: &Adapter) -> anyhow::Result<()> {
        self.prompts.model.adapt(Some(adapter))?;
        if let Some((session, batch)) = &mut self.sequences {
            *session = self.prompts.model.session(session.capacity())?;
            batch.follow(session)?;
        }
        Ok(())
    }

    /// Rollouts of some items, rewarded. `seed(item, completion)` gives each its random numbers.
    pub fn roll_out(
        &mut self,
        args: &GrpoArgs,
        max_new_tokens: usize,
        data: &Dataset,
        items: &[usize],
        cache: &FeatureCache,
        seed: impl Fn(usize, usize) -> u64,
    ) -> anyhow::Result<Vec<Group>> {
        let settings = RolloutSettings {
            group: args.group,
            max_new_tokens,
            temperature: args.temperature,
            end_of_turn: self.prompts.tokenizer.end_of_turn()?,
        };
        let weights = args.weights();
        let mut extractor = self.prompts.extractor(data.faces.clone())?;
        let mut groups = Vec::with_capacity(items.len());
        for items in items.chunks((SLOTS / args.group).max(1)) {
            let prompts: Vec<Vec<PromptPart>> = items
                .iter()
                .map(|&item| {
                    let item = &data.items[item];
                    self.prompts.parts(item, cache, &mut extractor).with_context(|| describe(item))
                })
                .collect::<anyhow::Result<_>>()?;
            let drawn = self.continue_all(settings, items, &prompts, &seed)?;
            for ((&item, prompt), rollouts) in items.iter().zip(prompts).zip(drawn) {
                let group = self.reward(data, item, prompt, rollouts, &weights);
                groups.push(group.with_context(|| describe(&data.items[item]))?);
            }
        }
        Ok(groups)
    }

    fn continue_all(
        &mut self,
        settings: RolloutSettings,
        items: &[usize],
        prompts: &[Vec<PromptPart>],
        seed: impl Fn(usize, usize) -> u64,
    ) -> anyhow::Result<Vec<Vec<Rollout>>> {
        let model = &self.prompts.model;
        let width = model.config().decoder.width;
        let needed = prompts.iter().map(|prompt| length(prompt, width)).max().unwrap_or(0) + settings.max_new_tokens;
        let slots = items.len() * settings.group;
        if self.sequences.as_ref().is_none_or(|(_, batch)| batch.capacity() < needed || batch.slots() < slots) {
            let positions = model.config().decoder.positions;
            ensure!(
                needed <= positions,
                "prompt and completion take up to {needed} positions, the model was made for {positions}; lower \
                 --max-new-tokens"
            );
            // Never smaller than before, and never both at once.
            let before = self.sequences.take().map_or((0, 0), |(_, batch)| (batch.capacity(), batch.slots()));
            let (needed, slots) = (needed.max(before.0), slots.max(before.1));
            self.sequences = Some((model.session(needed)?, model.batch(slots, needed)?));
        }
        let Some((session, batch)) = &mut self.sequences else { return Ok(Vec::new()) };
        let (device, video) = (self.prompts.model.device().clone(), &mut self.prompts.video);
        let read = |session: &mut Session<D>, prompt: usize| -> anyhow::Result<()> {
            for part in &prompts[prompt] {
                if let PromptPart::Rows(rows) = part {
                    video.write(&device, rows, width)?;
                }
            }
            let pieces: Vec<Piece<'_, D>> = prompts[prompt]
                .iter()
                .map(|part| match part {
                    PromptPart::Tokens(ids) => Piece::Tokens(ids),
                    PromptPart::Rows(_) => Piece::Rows(video),
                })
                .collect();
            session.start(&pieces)?;
            Ok(())
        };
        roll_out::<_, anyhow::Error>(settings, session, batch, prompts.len(), read, |prompt, one| {
            seed(items[prompt], one)
        })
    }

    fn reward(
        &mut self,
        data: &Dataset,
        item: usize,
        prompt: Vec<PromptPart>,
        rollouts: Vec<Rollout>,
        weights: &Weights,
    ) -> anyhow::Result<Group> {
        let own = &data.items[item];
        let cues = data.cues(own);
        let (mut texts, mut rewards, mut totals) = (Vec::new(), Vec::new(), Vec::new());
        for rollout in &rollouts {
            let written = rollout.tokens.len() - usize::from(rollout.finished);
            let text = self.prompts.tokenizer.decode(&rollout.tokens[..written]);
            let reward = self.scorer.score(&text, own.emotion, cues.as_ref())?;
            let total = reward.total(weights);
            ensure!(total.is_finite(), "the reward of {text:?} is {total}; the verifier's weights are damaged");
            texts.push(text);
            rewards.push(reward);
            totals.push(total);
        }
        let completions = rollouts.iter().map(|rollout| rollout.tokens.clone()).collect();
        let continued = Continued { prompt, completions };
        Ok(Group { item, continued, rollouts, texts, rewards, totals, old: Vec::new(), reference: Vec::new() })
    }

    /// Adds the gradients of a group to `gradients`.
    pub fn learn(
        &mut self,
        policy: &Policy,
        objective: &Objective,
        group: &mut Group,
        advantages: &[f32],
        counts: Counts,
        gradients: &mut [f32],
    ) -> anyhow::Result<Sums> {
        group.learn(policy, objective, advantages, counts, gradients, &mut self.buffers)
    }
}

impl Group {
    /// A group whose rollouts come from elsewhere.
    pub fn given(prompt: Vec<PromptPart>, rollouts: Vec<Rollout>, totals: Vec<f32>) -> Group {
        let completions = rollouts.iter().map(|rollout| rollout.tokens.clone()).collect();
        let continued = Continued { prompt, completions };
        let (texts, rewards) = (Vec::new(), Vec::new());
        Group { item: 0, continued, rollouts, texts, rewards, totals, old: Vec::new(), reference: Vec::new() }
    }

    /// Whether a completion is trained on.
    pub fn counts(&self, completion: usize, objective: &Objective) -> bool {
        self.rollouts[completion].finished || !objective.drop_truncated
    }

    /// Adds the gradients of the group's losses to `gradients`; see [`Objective`].
    pub fn learn(
        &mut self,
        policy: &Policy,
        objective: &Objective,
        advantages: &[f32],
        counts: Counts,
        gradients: &mut [f32],
        buffers: &mut PolicyBuffers,
    ) -> anyhow::Result<Sums> {
        let plain = |all: Vec<Vec<(f32, f32)>>| -> Vec<Vec<f32>> {
            all.into_iter().map(|tokens| tokens.into_iter().map(|token| token.0).collect()).collect()
        };
        if objective.beta > 0.0 && self.reference.is_empty() {
            self.reference = plain(policy.log_probabilities(policy.reference(), &self.continued, buffers)?);
        }
        let now = policy.log_probabilities(policy.weights(), &self.continued, buffers)?;
        if self.old.is_empty() {
            self.old = plain(now.clone());
        }
        let mut sums = Sums::default();
        let mut slopes = Vec::with_capacity(now.len());
        for (index, (tokens, rollout)) in now.iter().zip(&self.rollouts).enumerate() {
            if !self.counts(index, objective) {
                slopes.push(vec![0.0; tokens.len()]);
                continue;
            }
            let factor = objective.factor(tokens.len(), counts.completions, counts.tokens);
            let mut own = Vec::with_capacity(tokens.len());
            for (place, &(log_prob, entropy)) in tokens.iter().enumerate() {
                let token = Token {
                    log_prob,
                    old: self.old[index][place],
                    reference: self.reference.get(index).map(|reference| reference[place]),
                    drawn: rollout.log_probs[place],
                };
                let out = objective.token(token, advantages[index]);
                let mismatch = f64::from((token.old - token.drawn).abs());
                own.push(out.slope * factor);
                sums.loss += f64::from(out.loss * factor);
                sums.divergence += f64::from(out.divergence);
                sums.entropy += f64::from(entropy);
                sums.clipped += usize::from(out.clipped);
                sums.mismatch += mismatch;
                sums.worst_mismatch = sums.worst_mismatch.max(mismatch);
                sums.importance += f64::from(objective.importance(token));
            }
            sums.tokens += tokens.len();
            slopes.push(own);
        }
        sums.rows = self.continued.completions.iter().map(Vec::len).sum();
        policy.backward(&self.continued, &slopes, gradients, buffers)?;
        Ok(sums)
    }
}
