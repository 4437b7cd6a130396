//! `candor trace`: the stages of a model on given tensors.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use candor::message::say;
use candor::model::trace::{Output, Values, trace_classifier, trace_model};
use candor::model::{Adapter, Classifier, Model};
use candor::weights::Checkpoint;
use candor_kernels::cpu::CpuDevice;
use clap::Args;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::memory;

/// Run the stages of a model on given tensors and write what each gives (for porting and bug reports).
///
/// The input holds any of in.pixel_values, in.samples or in.mel, in.bert_ids and in.prompt_ids; stages without input are left out.
#[derive(Args)]
pub(crate) struct Trace {
    /// Model folder.
    #[arg(long, required_unless_present = "verifier")]
    model: Option<PathBuf>,
    /// Verifier folder: classifies in.ids and writes out.logits.
    #[arg(long)]
    verifier: Option<PathBuf>,
    /// Adapter beside the model (PEFT folder).
    #[arg(long, requires = "model")]
    adapter: Option<PathBuf>,
    /// Safetensors file with the inputs.
    #[arg(long)]
    inputs: PathBuf,
    /// Safetensors file to write.
    #[arg(long)]
    out: PathBuf,
    /// Tokens to generate greedily behind the prompt.
    #[arg(long, default_value_t = 8)]
    new_tokens: usize,
    /// Threads (default: one a core).
    #[arg(long)]
    threads: Option<usize>,
}

pub(crate) fn run(args: &Trace) -> anyhow::Result<()> {
    let device = CpuDevice::new(args.threads).exact();
    let inputs = Checkpoint::open_file(&args.inputs)?;
    let mut outputs = Vec::new();
    if let Some(folder) = &args.model {
        let start = Instant::now();
        let mut model = Model::open(folder, device.clone())?;
        if let Some(adapter) = &args.adapter {
            model.adapt(Some(&Adapter::open(adapter)?))?;
        }
        let opened = start.elapsed().as_secs_f64() * 1e3;
        say(format_args!("opened in {opened:.1} ms, {} MB mapped; {}", model.mapped_bytes() / 1_000_000, resident()))?;
        let start = Instant::now();
        outputs.extend(trace_model(&mut model, &inputs, args.new_tokens)?);
        say(format_args!("ran in {:.2} s; {}", start.elapsed().as_secs_f64(), resident()))?;
    }
    if let Some(folder) = &args.verifier {
        let classified = trace_classifier(&mut Classifier::open(folder, device)?, &inputs)?;
        if let Some(twice) = classified.iter().find(|output| outputs.iter().any(|other| other.name == output.name)) {
            anyhow::bail!("{} would be written by both --model and --verifier: trace them one by one", twice.name);
        }
        outputs.extend(classified);
    }
    write(&outputs, &args.out)
}

fn write(outputs: &[Output], path: &Path) -> anyhow::Result<()> {
    let bytes: Vec<Vec<u8>> = outputs.iter().map(Output::bytes).collect();
    let mut views = Vec::new();
    for (output, bytes) in outputs.iter().zip(&bytes) {
        let dtype = match output.values {
            Values::F32(_) => Dtype::F32,
            Values::I64(_) => Dtype::I64,
        };
        say(format_args!("{:20} {dtype:?}{:?}", output.name, output.shape))?;
        views.push((output.name, TensorView::new(dtype, output.shape.clone(), bytes)?));
    }
    safetensors::serialize_to_file(views, None, path).with_context(|| format!("cannot write {}", path.display()))
}

/// Resident memory: own pages, pages of mapped files, and the peak of both.
fn resident() -> String {
    let figures = [("RssAnon", "own"), ("RssFile", "of files"), ("VmHWM", "peak")].map(|(figure, name)| {
        memory::bytes(figure)
            .map_or_else(|| format!("{name} unknown"), |bytes| format!("{} MB {name}", bytes / 1_000_000))
    });
    format!("resident: {}", figures.join(", "))
}
