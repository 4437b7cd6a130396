//! What a user decides about a reward fine-tuning.

use super::objective::{Normalisation, Objective, Scale};
use crate::reward::Weights;
use crate::reward::settings::RewardSettings;
use crate::train::schedule::{Decay, Schedule};
use crate::train::tuning::settings::{InputArgs, TuningArgs, not_negative, positive, within};
use anyhow::{Context, ensure};
use candor::manifest::Manifest;
use std::path::PathBuf;

/// Learning rate of the factors where none is given.
const LORA_RATE: f32 = 1e-4;
/// Learning rate of all weights where none is given, as the paper has it.
const FULL_RATE: f32 = 1e-6;

/// Arguments of `candor-tools train grpo`.
#[derive(clap::Args, Clone, Debug)]
pub struct GrpoArgs {
    /// What is trained on what, and where the run goes.
    #[command(flatten)]
    pub input: InputArgs,
    /// Folder of the verifier that pays the explanation reward; by default the one that the model names.
    #[arg(long)]
    pub verifier: Option<PathBuf>,
    /// Print what the run needs of memory, computed from shapes, and stop.
    #[arg(long)]
    pub plan: bool,

    /// What completions are paid.
    #[command(flatten)]
    pub rewards: RewardSettings,
    /// Weight of the groundedness reward, paid where cues were measured.
    #[arg(long, default_value_t = 0.0)]
    pub groundedness_weight: f32,
    /// Completions of a prompt.
    #[arg(long, default_value_t = 4)]
    pub group: usize,
    /// Prompts a step. Their gradients are added up a prompt at a time, so memory does not grow with them.
    #[arg(long, default_value_t = 8)]
    pub prompts: usize,
    /// Passes over the data.
    #[arg(long, default_value_t = 2.0)]
    pub passes: f64,
    /// Steps, in place of passes.
    #[arg(long)]
    pub steps: Option<u64>,
    /// Updates with one set of rollouts.
    #[arg(long, default_value_t = 1)]
    pub iterations: u64,
    /// Most tokens of a completion; by default as the model's manifest says.
    #[arg(long)]
    pub max_new_tokens: Option<usize>,
    /// Temperature of the rollouts.
    #[arg(long, default_value_t = 1.0)]
    pub temperature: f32,

    /// Coefficient of the divergence from the model before training; 0 does without it.
    #[arg(long, default_value_t = 0.04)]
    pub beta: f32,
    /// How far a ratio may fall below 1 before it is clipped.
    #[arg(long, default_value_t = 0.2)]
    pub clip_low: f32,
    /// How far it may rise above 1; as --clip-low by default (DAPO: 0.28).
    #[arg(long)]
    pub clip_high: Option<f32>,
    /// What advantages are divided by.
    #[arg(long, value_enum, default_value_t = Scale::Group)]
    pub scale: Scale,
    /// How the losses of tokens become one.
    #[arg(long, value_enum, default_value_t = Normalisation::Completion)]
    pub normalisation: Normalisation,
    /// Leave out groups whose rewards are all equal.
    #[arg(long)]
    pub drop_flat: bool,
    /// Leave out completions that ran into the budget.
    #[arg(long)]
    pub drop_truncated: bool,
    /// Largest weight that corrects for rollouts by other kernels or rounded weights; 0 corrects nothing.
    #[arg(long, default_value_t = 2.0)]
    pub importance_cap: f32,

    /// Learning rate at its peak; 1e-4 for factors, 1e-6 for all weights.
    #[arg(long)]
    pub rate: Option<f32>,
    /// Way down of the learning rate.
    #[arg(long, value_enum, default_value_t = Decay::Constant)]
    pub schedule: Decay,
    /// Steps over which the rate rises.
    #[arg(long, default_value_t = 0)]
    pub warm_up: u64,
    /// Which weights are trained, and how.
    #[command(flatten)]
    pub tuning: TuningArgs,
}

impl GrpoArgs {
    /// Refuses what makes no sense, naming the option.
    pub fn check(&self) -> anyhow::Result<()> {
        within("group", self.group, 2, 1024).context("a group is what completions are compared within")?;
        within("prompts", self.prompts, 1, 65_536)?;
        within("max-new-tokens", self.max_new_tokens.unwrap_or(1), 1, 1 << 20)?;
        self.tuning.check(self.prompts)?;
        self.rewards.check()?;
        ensure!(self.iterations > 0, "--iterations must be at least 1");
        ensure!(self.passes > 0.0 && self.passes < 1e6, "--passes must be above 0");
        ensure!(self.steps != Some(0), "--steps must be at least 1");
        for (name, value) in [
            ("temperature", self.temperature),
            ("clip-low", self.clip_low),
            ("clip-high", self.clip_high()),
            ("rate", self.rate()),
        ] {
            positive(name, value)?;
        }
        ensure!(self.clip_low <= 1.0, "--clip-low must be at most 1, not {}", self.clip_low);
        for (name, value) in [
            ("beta", self.beta),
            ("importance-cap", self.importance_cap),
            ("groundedness-weight", self.groundedness_weight),
        ] {
            not_negative(name, value)?;
        }
        Ok(())
    }

    fn clip_high(&self) -> f32 {
        self.clip_high.unwrap_or(self.clip_low)
    }

    /// Steps over so many entries.
    pub fn steps(&self, entries: usize) -> u64 {
        self.steps.unwrap_or((self.passes * entries as f64 / self.prompts as f64).ceil() as u64)
    }

    /// Learning rate at its peak.
    pub fn rate(&self) -> f32 {
        self.rate.unwrap_or(if self.tuning.full { FULL_RATE } else { LORA_RATE })
    }

    /// Most tokens of a completion.
    pub fn max_new_tokens(&self, manifest: &Manifest) -> usize {
        self.max_new_tokens.unwrap_or(manifest.model.max_new_tokens)
    }

    /// The switches of the objective.
    pub fn objective(&self, max_new_tokens: usize) -> Objective {
        Objective {
            clip_low: self.clip_low,
            clip_high: self.clip_high(),
            beta: self.beta,
            scale: self.scale,
            normalisation: self.normalisation,
            drop_flat: self.drop_flat,
            drop_truncated: self.drop_truncated,
            importance_cap: self.importance_cap,
            max_new_tokens,
        }
    }

    /// The weights of the rewards.
    pub fn weights(&self) -> Weights {
        Weights { groundedness: self.groundedness_weight, ..self.rewards.weights() }
    }

    /// The learning rate over `total` updates.
    pub fn schedule(&self, total: u64) -> Schedule {
        Schedule { peak: self.rate(), warm_up: self.warm_up, total, decay: self.schedule }
    }

    /// Everything that decides the result, for the checkpoint.
    pub fn recipe(&self, model: &str, data: &str, max_new_tokens: usize, total: u64) -> String {
        format!(
            "grpo model {model} data {data} rewards {:?} guard {} group {} prompts {} steps {total} iterations {} tokens \
             {max_new_tokens} temperature {} {:?} lora {:?} {:?} decay {} norm {} f32 {} seed {} threads {}",
            self.weights(),
            self.rewards.guard,
            self.group,
            self.prompts,
            self.iterations,
            self.temperature,
            self.objective(max_new_tokens),
            self.tuning.lora().ok().flatten(),
            self.schedule(total),
            self.tuning.weight_decay,
            self.tuning.max_norm,
            self.tuning.f32,
            self.tuning.seed,
            self.tuning.threads
        )
    }
}
