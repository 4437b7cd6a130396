//! What a user decides about a supervised tuning.

use crate::train::schedule::{Decay, Schedule};
use crate::train::tuning::settings::{InputArgs, TuningArgs, positive, within};
use anyhow::ensure;

/// Learning rate of the factors where none is given.
const LORA_RATE: f32 = 1e-4;
/// Learning rate of all weights where none is given, as the paper has it.
const FULL_RATE: f32 = 2e-5;

/// Arguments of `candor-tools train tune`.
#[derive(clap::Args, Clone, Debug)]
pub struct TuneArgs {
    /// What is trained on what, and where the run goes.
    #[command(flatten)]
    pub input: InputArgs,
    /// Print what the run needs of memory, computed from shapes, and stop.
    #[arg(long)]
    pub plan: bool,

    /// Entries a step. Their gradients are added up an entry at a time, so memory does not grow with them.
    #[arg(long, default_value_t = 16)]
    pub batch: usize,
    /// Passes over the data.
    #[arg(long, default_value_t = 10.0)]
    pub passes: f64,
    /// Steps, in place of passes.
    #[arg(long)]
    pub steps: Option<u64>,

    /// Learning rate at its peak; 1e-4 for factors, 2e-5 for all weights.
    #[arg(long)]
    pub rate: Option<f32>,
    /// Way down of the learning rate.
    #[arg(long, value_enum, default_value_t = Decay::Cosine)]
    pub schedule: Decay,
    /// Share of the steps over which the rate rises.
    #[arg(long, default_value_t = 0.03)]
    pub warm_up: f64,
    /// Which weights are trained, and how.
    #[command(flatten)]
    pub tuning: TuningArgs,
}

impl TuneArgs {
    /// Refuses what makes no sense, naming the option.
    pub fn check(&self) -> anyhow::Result<()> {
        within("batch", self.batch, 1, 65_536)?;
        self.tuning.check(self.batch)?;
        ensure!(self.passes > 0.0 && self.passes < 1e6, "--passes must be above 0");
        ensure!(self.steps != Some(0), "--steps must be at least 1");
        ensure!((0.0..=1.0).contains(&self.warm_up), "--warm-up is a share of the steps: 0 to 1, not {}", self.warm_up);
        positive("rate", self.rate())
    }

    /// Learning rate at its peak.
    pub fn rate(&self) -> f32 {
        self.rate.unwrap_or(if self.tuning.full { FULL_RATE } else { LORA_RATE })
    }

    /// Steps over so many entries.
    pub fn steps(&self, entries: usize) -> u64 {
        self.steps.unwrap_or((self.passes * entries as f64 / self.batch as f64).ceil() as u64)
    }

    /// The learning rate over `total` steps; the warm-up is rounded up, as transformers does.
    pub fn schedule(&self, total: u64) -> Schedule {
        let warm_up = (self.warm_up * total as f64).ceil() as u64;
        Schedule { peak: self.rate(), warm_up, total, decay: self.schedule }
    }

    /// Everything that decides the result, for the checkpoint.
    pub fn recipe(&self, model: &str, data: &str, total: u64) -> String {
        let tuning = &self.tuning;
        format!(
            "tune model {model} data {data} batch {} steps {total} lora {:?} {:?} decay {} norm {} f32 {} seed {} threads {}",
            self.batch,
            tuning.lora().ok().flatten(),
            self.schedule(total),
            tuning.weight_decay,
            tuning.max_norm,
            tuning.f32,
            tuning.seed,
            tuning.threads
        )
    }
}
