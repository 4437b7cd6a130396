//! Options that reward fine-tuning and supervised tuning have in common.

use crate::train::lora::{LoraSettings, Module};
use crate::train::products::TrainDevice;
use anyhow::{Context, ensure};
use candor::device::{Choice, Chosen};
use std::path::PathBuf;
use std::time::Duration;

/// What is trained on what, and where the run goes.
#[derive(clap::Args, Clone, Debug)]
pub struct InputArgs {
    /// Folder of the model to start from.
    #[arg(long)]
    pub model: PathBuf,
    /// Clips and labels: a JSON list or JSONL (docs/datasets.md).
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
}

impl InputArgs {
    /// The folder of the features.
    pub fn features(&self) -> PathBuf {
        self.features.clone().unwrap_or_else(|| self.out.join("features"))
    }
}

/// Which weights are trained, and how.
#[derive(clap::Args, Clone, Debug)]
pub struct TuningArgs {
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

    /// Seed of everything that is drawn.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Threads, each with its share of a step. The result depends on it in the last digits.
    #[arg(long, default_value_t = 2)]
    pub threads: usize,
    /// Where the runtime computes, rollouts included: auto (a GPU if one can be used, else the processor), cpu, cuda or
    /// cuda:N. A GPU holds each thread's model.
    #[arg(long, default_value_t = Choice::Auto)]
    pub device: Choice,
    /// Where training computes.
    #[command(flatten)]
    pub training: TrainDevice,
    /// Seconds between two checkpoints; 0 writes one after every step.
    #[arg(long, default_value_t = 60.0)]
    pub save_every: f64,
    /// Stop after this many steps, as if interrupted (for tests and timings).
    #[arg(long)]
    pub stop_after: Option<u64>,
}

impl TuningArgs {
    /// Refuses what makes no sense, naming the option; a step has `pieces` to share out.
    pub fn check(&self, pieces: usize) -> anyhow::Result<()> {
        within("threads", self.threads, 1, pieces).context("each thread takes at least one prompt a step")?;
        within("rank", self.rank, 1, 4096)?;
        positive("max-norm", self.max_norm)?;
        not_negative("weight-decay", self.weight_decay)?;
        ensure!(self.alpha.is_finite() && self.alpha > 0.0, "--alpha must be above 0, not {}", self.alpha);
        let seconds = self.save_every;
        ensure!((0.0..=1e9).contains(&seconds), "--save-every must be 0 or more seconds, not {seconds}");
        self.lora().map(|_| ())
    }

    /// Opens the devices: that of the runtime, and what of both belongs to the recipe, as it changes the last digits.
    pub fn open_devices(&self) -> anyhow::Result<(Chosen, String)> {
        let products = self.training.choose(self.f32)?;
        let chosen = self.device.open(Some(1))?;
        let runtime = if matches!(chosen, Chosen::Cuda(_)) { " runtime on a GPU" } else { "" };
        Ok((chosen, format!("{runtime}{products}")))
    }

    /// Time between two checkpoints.
    pub fn save_every(&self) -> Duration {
        Duration::try_from_secs_f64(self.save_every).unwrap_or(Duration::MAX)
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
}

/// Whether a number lies within its bounds.
pub fn within(name: &str, value: usize, least: usize, most: usize) -> anyhow::Result<()> {
    ensure!((least..=most).contains(&value), "--{name} must lie between {least} and {most}, not {value}");
    Ok(())
}

/// Whether a number is above 0.
pub fn positive(name: &str, value: f32) -> anyhow::Result<()> {
    ensure!(value.is_finite() && value > 0.0, "--{name} must be above 0, not {value}");
    Ok(())
}

/// Whether a number is 0 or above.
pub fn not_negative(name: &str, value: f32) -> anyhow::Result<()> {
    ensure!(value.is_finite() && value >= 0.0, "--{name} must be 0 or above, not {value}");
    Ok(())
}
