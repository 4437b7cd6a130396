//! What a user decides about a reward fine-tuning.

use super::objective::{Normalisation, Objective, Scale};
use crate::reward::Weights;
use crate::train::lora::{LoraSettings, Module};
use crate::train::schedule::{Decay, Schedule};
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
    /// Folder of the model to start from, after its supervised cold start.
    #[arg(long)]
    pub model: PathBuf,
    /// Folder of the verifier that pays the explanation reward; by default the one that the model names.
    #[arg(long)]
    pub verifier: Option<PathBuf>,
    /// Prompts and labels: a JSON list or JSONL (docs/datasets.md).
    #[arg(long)]
    pub data: PathBuf,
    /// Folder of the run. A run cut off goes on from its last checkpoint, to the same result.
    #[arg(long)]
    pub out: PathBuf,
    /// Folder that relative paths of clips start from; by default that of the data.
    #[arg(long)]
    pub media_root: Option<PathBuf>,
    /// Folder for the clips' vision features, which other runs can share; the run's own by default.
    #[arg(long)]
    pub features: Option<PathBuf>,
    /// Leave out entries and clips that cannot be used, and say which.
    #[arg(long)]
    pub skip_bad: bool,
    /// Print what the run needs of memory, computed from shapes, and stop.
    #[arg(long)]
    pub plan: bool,

    /// Weight of the format reward.
    #[arg(long, default_value_t = 1.0)]
    pub format_weight: f32,
    /// Weight of the accuracy reward.
    #[arg(long, default_value_t = 1.0)]
    pub accuracy_weight: f32,
    /// Weight of the explanation reward.
    #[arg(long, default_value_t = 1.0)]
    pub explanation_weight: f32,
    /// Weight of the groundedness reward, paid where cues were measured.
    #[arg(long, default_value_t = 0.0)]
    pub groundedness_weight: f32,
    /// Pay the explanation reward only to rationales that are more than a conclusion (docs/reward.md).
    #[arg(long)]
    pub guard: bool,

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

    /// Train all weights of the decoder in place of factors beside them; writes a model folder.
    #[arg(long, conflicts_with_all = ["rank", "alpha", "rslora", "targets"])]
    pub full: bool,
    /// Rank of the factors.
    #[arg(long, default_value_t = 16)]
    pub rank: usize,
    /// Numerator of the factors' scale.
    #[arg(long, default_value_t = 32.0)]
    pub alpha: f64,
    /// Scale by 1/sqrt(rank) in place of 1/rank.
    #[arg(long)]
    pub rslora: bool,
    /// Projections that get factors: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; all by default.
    #[arg(long, value_delimiter = ',')]
    pub targets: Vec<String>,

    /// Learning rate at its peak; 1e-4 for factors, 1e-6 for all weights.
    #[arg(long)]
    pub rate: Option<f32>,
    /// Way down of the learning rate.
    #[arg(long, value_enum, default_value_t = Decay::Constant)]
    pub schedule: Decay,
    /// Steps over which the rate rises.
    #[arg(long, default_value_t = 0)]
    pub warm_up: u64,
    /// Weight decay.
    #[arg(long, default_value_t = 0.0)]
    pub weight_decay: f32,
    /// Largest norm of a step's gradient.
    #[arg(long, default_value_t = 1.0)]
    pub max_norm: f32,
    /// Compute activations anew in the backward pass: a third more time, a fraction of the memory.
    #[arg(long)]
    pub checkpointing: bool,
    /// Large products with f32 operands in place of bf16.
    #[arg(long)]
    pub f32: bool,

    /// Seed of orders, rollouts and starting values.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Threads, each with its share of the prompts. The result depends on it in the last digits.
    #[arg(long, default_value_t = 2)]
    pub threads: usize,
    /// Stop after this many steps, as if cut off (for tests and timings).
    #[arg(long)]
    pub stop_after: Option<u64>,
}

impl GrpoArgs {
    /// Refuses what makes no sense, naming the option.
    pub fn check(&self) -> anyhow::Result<()> {
        let within = |name: &str, value: usize, least: usize, most: usize| {
            ensure!((least..=most).contains(&value), "--{name} must lie between {least} and {most}, not {value}");
            Ok(())
        };
        within("group", self.group, 2, 1024).context("a group is what completions are compared within")?;
        within("prompts", self.prompts, 1, 65_536)?;
        within("threads", self.threads, 1, self.prompts).context("each thread takes at least one prompt a step")?;
        within("rank", self.rank, 1, 4096)?;
        ensure!(self.iterations > 0, "--iterations must be at least 1");
        ensure!(self.passes > 0.0 && self.passes < 1e6, "--passes must be above 0");
        ensure!(self.steps != Some(0), "--steps must be at least 1");
        for (name, value) in [
            ("temperature", self.temperature),
            ("max-norm", self.max_norm),
            ("clip-low", self.clip_low),
            ("clip-high", self.clip_high()),
            ("rate", self.rate()),
        ] {
            ensure!(value.is_finite() && value > 0.0, "--{name} must be above 0, not {value}");
        }
        ensure!(self.clip_low <= 1.0, "--clip-low must be at most 1, not {}", self.clip_low);
        for (name, value) in [
            ("beta", self.beta),
            ("importance-cap", self.importance_cap),
            ("weight-decay", self.weight_decay),
            ("format-weight", self.format_weight),
            ("accuracy-weight", self.accuracy_weight),
            ("explanation-weight", self.explanation_weight),
            ("groundedness-weight", self.groundedness_weight),
        ] {
            ensure!(value.is_finite() && value >= 0.0, "--{name} must be 0 or above, not {value}");
        }
        self.lora().map(|_| ())
    }

    fn clip_high(&self) -> f32 {
        self.clip_high.unwrap_or(self.clip_low)
    }

    /// Learning rate at its peak.
    pub fn rate(&self) -> f32 {
        self.rate.unwrap_or(if self.full { FULL_RATE } else { LORA_RATE })
    }

    /// The factors; `None` where all weights are trained.
    pub fn lora(&self) -> anyhow::Result<Option<LoraSettings>> {
        if self.full {
            return Ok(None);
        }
        let module = |name: &String| {
            let known = Module::ALL.map(Module::name).join(", ");
            Module::from_name(name).with_context(|| format!("--targets: {name:?} is none of {known}"))
        };
        let modules = match self.targets.as_slice() {
            [] => Module::ALL.to_vec(),
            names => names.iter().map(module).collect::<anyhow::Result<_>>()?,
        };
        Ok(Some(LoraSettings { rank: self.rank, alpha: self.alpha, stabilised: self.rslora, modules }))
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
        Weights {
            format: self.format_weight,
            accuracy: self.accuracy_weight,
            explanation: self.explanation_weight,
            groundedness: self.groundedness_weight,
        }
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
            self.guard,
            self.group,
            self.prompts,
            self.iterations,
            self.temperature,
            self.objective(max_new_tokens),
            self.lora().ok().flatten(),
            self.schedule(total),
            self.weight_decay,
            self.max_norm,
            self.f32,
            self.seed,
            self.threads
        )
    }
}
