//! `candor-tools quantize`: stores a model's matrices as whole numbers of four or eight bits, and measures what that does.
//!
//! What is stored how follows from the options (`format`, `keep`, `plan`). A matrix is rounded value by value
//! (`stored`), or with a view to what goes into its layer: prompts of the task (`samples`) run through the model on a
//! device that looks at inputs (`observe`, `calibrate`), and each column's error is made up for by the others (`gptq`,
//! with `factor`). The folder is written tensor by tensor (`output`), and compared with the model it came from
//! (`measure`, `report`).

mod calibrate;
mod factor;
pub mod format;
mod gptq;
mod keep;
mod measure;
mod observe;
mod output;
mod plan;
mod report;
mod samples;
pub mod stored;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use candor::device::Choice;
use candor::message::say;
use candor::with_device;
use candor_kernels::Device;
use candor_kernels::cpu::CpuDevice;

use crate::folder;
use calibrate::{Calibrated, Calibration};
use format::{Bits, Group, Scheme};
use keep::{Keep, Rules};
use measure::{Exchanged, Folder, Logits};
use plan::{Entry, Kind, Source};
use report::{Layer, Report};
use samples::{Data, Sample};
use stored::Integers;

/// Values of an int4 group where none is named: as many as a block of GGUF's Q4_0 has.
pub const INT4_GROUP: Group = Group::Of(32);

/// What `--weights` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Weights {
    /// A byte a value.
    Int8,
    /// Four bits a value.
    Int4,
}

/// How matrices are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Method {
    /// Every value by itself.
    Nearest,
    /// With a view to the inputs (arXiv 2210.17323).
    Gptq,
}

/// `candor-tools quantize`
#[derive(clap::Args)]
pub struct QuantizeArgs {
    /// Folder of the model, or of a verifier.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder to write; it must not exist, or be empty.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// How the matrices of linear layers are stored.
    #[arg(long)]
    weights: Weights,
    /// Values that share a scale: 32, 64, 128, or row for a whole row. If not given, 32 for int4 and row for int8.
    #[arg(long, value_parser = Group::parse)]
    group: Option<Group>,
    /// What is stored in another way, parted by commas: a part (vision, projector, bert, audio, decoder), a tensor, or parts
    /// of tensors' names from dot to dot (layers.0, mlp.down_proj, with * for anything); and f16, int8 or int4, or
    /// int4:64 with a group. Of several about a tensor the last one holds. The embedding table and the output head are f16 if
    /// not named.
    #[arg(long, value_delimiter = ',', value_name = "NAME=FORMAT", value_parser = Keep::parse)]
    keep: Vec<Keep>,
    /// Prompts to calibrate with: a list of clips, or a part of a faces file as FILE.safetensors#train.
    #[arg(long, value_name = "FILE")]
    calibrate: Option<String>,
    /// How int4 matrices are rounded; gptq if --calibrate is given, else nearest. int8 is always nearest.
    #[arg(long)]
    method: Option<Method>,
    /// Prompts that are taken of --calibrate, spread over it.
    #[arg(long, value_name = "N", default_value_t = 64)]
    samples: usize,
    /// Rounds of calibration. In each the model is run with what the ones before have rounded.
    #[arg(long, value_name = "N", default_value_t = 8)]
    rounds: usize,
    /// Measure what has changed on these clips or photographs, as FILE.safetensors#val: logits, labels and verdicts.
    #[arg(long, value_name = "FILE")]
    evaluate: Option<String>,
    /// Take only so many entries of --evaluate, spread over it.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Entries of --evaluate whose logits are compared.
    #[arg(long, value_name = "N", default_value_t = 64)]
    logits: usize,
    /// Also compare the logits with each matrix alone exchanged; for small models.
    #[arg(long, requires = "evaluate")]
    per_layer: bool,
    /// Write what was measured to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Where --evaluate computes: auto (a GPU if one can be used, else the processor), cpu, cuda or cuda:N. Rounding and
    /// --per-layer stay on the processor.
    #[arg(long, default_value_t = Choice::Auto)]
    device: Choice,
}

impl QuantizeArgs {
    fn rules(&self) -> Rules {
        let (bits, group) = match self.weights {
            Weights::Int8 => (Bits::Eight, Group::Row),
            Weights::Int4 => (Bits::Four, INT4_GROUP),
        };
        Rules { weights: Scheme { bits, group: self.group.unwrap_or(group) }, keep: self.keep.clone() }
    }

    /// The method, and whether the options go together.
    fn method(&self) -> anyhow::Result<Method> {
        for (option, value) in [("threads", self.threads), ("samples", self.samples), ("rounds", self.rounds)] {
            ensure!(value > 0, "--{option} must be at least 1");
        }
        ensure!(self.limit != Some(0) && self.logits > 0, "--limit and --logits must be at least 1");
        match (self.method, &self.calibrate) {
            (Some(Method::Gptq), None) => {
                bail!("--method gptq needs prompts to calibrate with; name them with --calibrate")
            }
            (Some(method), _) => Ok(method),
            (None, Some(_)) => Ok(Method::Gptq),
            (None, None) => Ok(Method::Nearest),
        }
    }
}

/// Runs `candor-tools quantize`.
pub fn run(args: &QuantizeArgs) -> anyhow::Result<()> {
    folder::check_empty(&args.output, "--output")?;
    let method = args.method()?;
    let source = Source::open(&args.model)?;
    if source.kind == Kind::Verifier && (args.calibrate.is_some() || args.evaluate.is_some()) {
        bail!(
            "--calibrate and --evaluate are for models that see; measure a verifier with `candor-tools eval-verifier`"
        );
    }
    if source.is_quantised() {
        say("the model's weights are whole numbers already; they are widened and rounded again")?;
    }
    let plan = source.plan(&args.rules())?;
    ensure!(plan.iter().any(|entry| entry.scheme().is_some()), "no matrix is to be stored as whole numbers");
    let odd = plan.iter().filter(|entry| entry.scheme().is_some_and(|scheme| !scheme.fits(entry.shape[1]))).count();
    if odd > 0 {
        say(format_args!(
            "{odd} matrices have rows that are no whole number of groups: other programs may not read them"
        ))?;
    }
    let mut calibrated = match &args.calibrate {
        Some(file) => {
            let data = Data::parse(file, "train");
            let exact = CpuDevice::new(Some(1)).exact();
            let samples = samples::read(&args.model, &data, args.samples, args.threads, &exact)?;
            let gptq = method == Method::Gptq;
            let calibration = Calibration { samples: &samples, gptq, rounds: args.rounds, threads: args.threads };
            calibrate::calibrate(&source, &plan, &calibration)?
        }
        None => HashMap::new(),
    };
    let mut layers = Vec::new();
    let bytes = output::write(&source, &plan, &args.output, |entry, values| {
        let Calibrated { integers, output_error } = calibrated.remove(&entry.name).unwrap_or_else(|| {
            let scheme = entry.scheme().unwrap_or(Scheme::INT8_ROWS);
            Calibrated { integers: Integers::nearest(values, entry.shape[1], scheme, None), output_error: None }
        });
        layers.push(Layer::new(entry, &integers, values, output_error));
        Ok(integers)
    })?;
    Source::open(&args.output).context("the folder that was written does not open")?;
    let mut report = Report::new(&args.model, &args.output, source.checkpoint.mapped_bytes() as u64, bytes, layers);
    say(report.sizes())?;
    if let Some(file) = &args.evaluate {
        let data = Data::parse(file, "val");
        let count = args.limit.map_or(args.logits, |limit| limit.min(args.logits));
        let in_use = args.device.open(Some(1))?;
        with_device!(in_use.clone().exact(), exact => {
            let samples = samples::read(&args.model, &data, count, args.threads, &exact)?;
            if args.per_layer {
                compare_layers(args, &source, &plan, &samples, &mut report)?;
            }
            report.logits_exact = Some(logits(args, &samples, &exact, &exact)?);
            report.logits = Some(with_device!(in_use, device => logits(args, &samples, &exact, &device)?));
        });
        report.flips = Some(measure::flips(&args.model, &args.output, &data, args.limit, args.threads, args.device)?);
    }
    report.print(&candor::manifest::Manifest::open(&args.model)?)?;
    if let Some(path) = &args.report {
        let text = format!("{}\n", serde_json::to_string_pretty(&report)?);
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The logits of what was written on a device beside those of the model, computed exactly.
fn logits<E: Device, D: Device>(
    args: &QuantizeArgs,
    samples: &[Sample],
    exact: &E,
    device: &D,
) -> anyhow::Result<Logits> {
    let second = Folder { folder: &args.output, device: device.clone() };
    measure::logits(&args.model, &second, samples, args.threads, "prompts", exact)
}

/// What each matrix alone does to the logits.
fn compare_layers(
    args: &QuantizeArgs,
    source: &Source,
    plan: &[Entry],
    samples: &[Sample],
    report: &mut Report,
) -> anyhow::Result<()> {
    let exact = CpuDevice::new(Some(1)).exact();
    let written = candor::weights::Checkpoint::open(&args.output)?;
    for entry in plan.iter().filter(|entry| entry.scheme().is_some()) {
        let (tensor, replacement) = (source.checkpoint.tensor(&entry.name)?, written.tensor(&entry.name)?);
        let second = Exchanged { folder: &args.model, tensor, replacement };
        let logits = measure::logits(&args.model, &second, samples, args.threads, entry.module(), &exact)?;
        if let Some(layer) = report.layers.iter_mut().find(|layer| layer.name == entry.module()) {
            layer.kl = Some(logits.kl);
        }
    }
    Ok(())
}
