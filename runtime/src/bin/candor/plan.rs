//! `candor plan`: what `candor watch` will take of memory, before anything is loaded.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Result, bail};
use candor::manifest::Manifest;
use candor::message::say;
use candor::watch::{Pictures, Plan};
use serde::Serialize;

use crate::{folders, machine};
use candor::device::{Choice, Chosen, gpu_memory};

/// Say what watching with a model takes of memory, by part, without loading it.
#[derive(clap::Args)]
pub(crate) struct PlanArgs {
    /// Folder of the model; else $CANDOR_MODEL, else models/default here or above the program.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Folder of the verifier; else the one that the model names, else as --model with default-verifier.
    #[arg(long, value_name = "DIR")]
    verifier: Option<PathBuf>,
    /// The source's pictures, in pixels.
    #[arg(long, value_name = "WIDTHxHEIGHT", default_value = "1280x720")]
    picture: Size,
    /// The source's pictures a second.
    #[arg(long, value_name = "N", default_value_t = 30.0)]
    rate: f64,
    /// Where to compute: auto (a GPU if one can be used, else the processor), cpu, cuda or cuda:N.
    #[arg(long, default_value_t = Choice::Auto)]
    device: Choice,
    /// Threads of the processor; one for each core if not given.
    #[arg(long)]
    threads: Option<usize>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy)]
struct Size {
    width: usize,
    height: usize,
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let side = |text: &str| text.parse().ok().filter(|side| (1..=candor::media::Frame::MAX_SIDE).contains(side));
        let sides = text.split_once('x').and_then(|(width, height)| Some((side(width)?, side(height)?)));
        sides.map(|(width, height)| Size { width, height }).ok_or_else(|| "give it as 1280x720".to_string())
    }
}

#[derive(Serialize)]
struct Report {
    model: PathBuf,
    verifier: PathBuf,
    parts: Vec<Line>,
    total: Line,
    /// What this process could take; null where the system does not say.
    available_mb: Option<f64>,
    /// The GPU's memory, where one computes.
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<Gpu>,
}

#[derive(Serialize)]
struct Gpu {
    total_mb: f64,
    free_mb: f64,
    /// Whether it is the processor's: what the GPU takes is then taken of what is available.
    shared: bool,
}

#[derive(Serialize)]
struct Line {
    part: &'static str,
    /// Pages of mapped files, which the system may drop and read again.
    file_mb: f64,
    /// Everything else.
    anonymous_mb: f64,
    mb: f64,
    /// What a GPU holds beside that, where one computes.
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_mb: Option<f64>,
}

pub(crate) fn run(arguments: PlanArgs) -> Result<()> {
    let Size { width, height } = arguments.picture;
    if !(arguments.rate > 0.0 && arguments.rate <= 1000.0) {
        bail!("--rate is {}; give pictures a second, up to 1000", arguments.rate);
    }
    let model = folders::model(arguments.model)?;
    let verifier = verifier(&model, arguments.verifier)?;
    let pictures = Pictures { width, height, rate: arguments.rate };
    let (plan, gpu) = match arguments.device.open(arguments.threads)? {
        Chosen::Cpu(device) => (Plan::new(&model, &verifier, device, pictures)?, None),
        Chosen::Cuda(device) => (Plan::on_gpu(&model, &verifier, pictures)?, Some(gpu_memory(&device)?)),
    };
    let line = |part, held: candor_kernels::cpu::Held| Line {
        part,
        file_mb: megabytes(held.mapped),
        anonymous_mb: megabytes(held.owned),
        mb: megabytes(held.total()),
        gpu_mb: gpu.map(|_| megabytes(held.gpu)),
    };
    let report = Report {
        parts: plan.parts.iter().map(|part| line(part.name, part.held)).collect(),
        total: line("total", plan.held()),
        available_mb: machine::memory_available().map(megabytes),
        gpu: gpu.map(|gpu| Gpu { total_mb: megabytes(gpu.total), free_mb: megabytes(gpu.free), shared: gpu.shared }),
        model,
        verifier,
    };
    say(if arguments.json { serde_json::to_string(&report)? } else { table(&report)? })?;
    Ok(())
}

/// The verifier that is named, else the one that the model names, else the default.
pub(crate) fn verifier(model: &Path, named: Option<PathBuf>) -> Result<PathBuf> {
    match (&named, Manifest::open(model)?.verifier_folder()) {
        (None, Some(folder)) => Ok(folder),
        _ => folders::verifier(named),
    }
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

fn table(report: &Report) -> Result<String> {
    let of_gpu = |text: String| if report.gpu.is_some() { format!(" {text:>8}") } else { String::new() };
    let mut text = format!("{:<35} {:>8} {:>8} {:>8}{}", "MB", "file", "other", "both", of_gpu("GPU".to_owned()));
    for Line { part, file_mb, anonymous_mb, mb, gpu_mb } in report.parts.iter().chain([&report.total]) {
        let gpu = of_gpu(gpu_mb.map_or(String::new(), |mb| format!("{mb:.1}")));
        write!(text, "\n{part:<35} {file_mb:>8.1} {anonymous_mb:>8.1} {mb:>8.1}{gpu}")?;
    }
    if let Some(available) = report.available_mb {
        let free = match &report.gpu {
            Some(gpu) if gpu.shared => "the same".to_owned(),
            Some(gpu) => format!("{:.1}", gpu.free_mb),
            None => String::new(),
        };
        write!(text, "\n{:<35} {:>8} {:>8} {available:>8.1}{}", "available", "", "", of_gpu(free))?;
    }
    Ok(text)
}
