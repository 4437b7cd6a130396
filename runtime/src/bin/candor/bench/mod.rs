//! `candor bench`: how long every stage of a model takes on this machine, and how near it comes to what memory and
//! arithmetic can give. Works on any model folder: pictures, sound and tokens are random, as speed does not depend on
//! them.
//!
//! Each stage ([`stages`]) is run once to fill caches and take buffers, then timed again and again ([`figures`]); what a
//! run reads and computes follows from the model's sizes ([`work`]).

mod figures;
mod paper;
mod print;
mod stages;
mod work;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use candor::device::{Choice, gpu_memory};
use candor::manifest::Manifest;
use candor::message::say;
use candor::model::{Classifier, Model};
use candor::watch::Plan;
use candor::with_device;
use candor_kernels::Device;
use candor_kernels::cpu::{CpuDevice, PlanDevice, measure_arithmetic, measure_read_bandwidth};
use candor_kernels::cuda::CudaDevice;
use clap::ValueEnum;

use crate::{folders, machine, memory};
use figures::{Figures, Measured, Report, Times};
use stages::{Decoding, Prompt, SentenceReader, Window};
use work::{Bytes, Work};

/// Larger than the caches of the processors this runs on.
const ROOF_BYTES: usize = 256 << 20;

/// Time every stage of a model and the whole window.
#[derive(clap::Args)]
pub(crate) struct Bench {
    /// Folder of the model; else $CANDOR_MODEL, else models/default here or above the program.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Folder of the verifier; else the one that the model names, if it names one.
    #[arg(long, value_name = "DIR")]
    verifier: Option<PathBuf>,
    /// Stages to time, parted by commas; all that the model has if not given.
    #[arg(long, value_name = "STAGES", value_delimiter = ',')]
    stages: Vec<Stage>,
    /// Where to compute: auto (a GPU if one can be used, else the processor), cpu, cuda or cuda:N.
    #[arg(long, default_value_t = Choice::Auto)]
    device: Choice,
    /// Threads of the processor; one for each core if not given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Runs of each stage to time; every figure is the median over them.
    #[arg(long, alias = "runs", value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    repeat: u32,
    /// Tokens to write in each run of decode and window.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    tokens: u32,
    /// Positions in the cache when decode starts; a window's prompt if not given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    positions: Option<u32>,
    /// Lengths of the prompts that prefill reads, parted by commas; a window's prompt if not given.
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    prompt: Vec<u32>,
    /// Say what each stage should take on a board, from what its kernels read and compute; no GPU is needed.
    #[arg(long, value_name = "BOARD")]
    model_of: Option<String>,
    /// Print one JSON object, with the time of every single run.
    #[arg(long)]
    json: bool,
    /// Go on where there is too little memory for the stages.
    #[arg(long)]
    ignore_memory: bool,
}

/// What is timed on its own.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stage {
    /// The vision tower over a window's frames.
    Vision,
    /// The vision projector.
    Projector,
    /// The audio tower and its projector over 30 seconds.
    Audio,
    /// The decoder over a prompt.
    Prefill,
    /// The decoder, token by token.
    Decode,
    /// The verifier over a rationale's sentences.
    Verifier,
    /// Vision, projector, prefill, decode and verifier one after the other.
    Window,
}

pub(crate) fn run(arguments: Bench) -> Result<()> {
    if let Some(board) = &arguments.model_of {
        return paper::run(&arguments, paper::board(board)?);
    }
    let report = measure(&arguments)?;
    if arguments.json {
        say(serde_json::to_string(&report)?)?;
    } else {
        print::print(&report)?;
    }
    Ok(())
}

/// A device and what its memory and arithmetic give.
trait Measurable: Device {
    /// Threads, where it has some.
    fn threads(&self) -> Option<usize>;
    /// The device on paper, to plan memory with.
    fn on_paper(&self) -> PlanDevice;
    /// Whether there is memory for what is planned.
    fn check(&self, plan: &Plan) -> Result<()>;
    /// GB/s and GFLOP/s.
    fn roofs(&self) -> Result<(f64, f64)>;
}

impl Measurable for CpuDevice {
    fn threads(&self) -> Option<usize> {
        Some(self.pool().threads())
    }

    fn on_paper(&self) -> PlanDevice {
        PlanDevice::new(self.clone())
    }

    fn check(&self, plan: &Plan) -> Result<()> {
        Ok(plan.check(machine::memory_available())?)
    }

    fn roofs(&self) -> Result<(f64, f64)> {
        Ok((measure_read_bandwidth(self.pool(), ROOF_BYTES), measure_arithmetic(self.pool())))
    }
}

impl Measurable for CudaDevice {
    fn threads(&self) -> Option<usize> {
        None
    }

    fn on_paper(&self) -> PlanDevice {
        PlanDevice::of_gpu(CpuDevice::new(Some(1)))
    }

    fn check(&self, plan: &Plan) -> Result<()> {
        Ok(plan.check_with_gpu(machine::memory_available(), gpu_memory(self)?)?)
    }

    fn roofs(&self) -> Result<(f64, f64)> {
        Ok((self.measure_read_bandwidth(ROOF_BYTES)?, self.measure_arithmetic()?))
    }
}

fn measure(arguments: &Bench) -> Result<Report> {
    let device = arguments.device.open(arguments.threads.map(usize::from))?;
    with_device!(device, device => measure_on(&device, arguments))
}

fn measure_on<D: Measurable>(device: &D, arguments: &Bench) -> Result<Report> {
    let folder = folders::model(arguments.model.clone())?;
    let manifest = Manifest::open(&folder)?;
    let repeat = arguments.repeat as usize;

    let verifier = arguments.verifier.clone().or_else(|| manifest.verifier_folder());
    let verifier = verifier.filter(|_| arguments.needs_verifier());
    let plan = arguments.plan(&folder, verifier.as_deref(), device.on_paper())?;
    if !arguments.ignore_memory {
        device.check(&plan)?;
    }

    let mut opening = Times::default();
    // Where one stage alone is asked for, the time to open the model is no matter.
    for _ in 1..if arguments.stages.is_empty() { repeat } else { 1 } {
        // It goes before the next one comes: a GPU need not have room for two.
        opening.time(|| Model::open(&folder, device.clone()))?;
    }
    let mut model = opening.time(|| Model::open(&folder, device.clone()))?;
    let mut verifier = match &verifier {
        Some(folder) => Some(SentenceReader::new(folder, Classifier::open(folder, device.clone())?)?),
        None => None,
    };
    let stages = arguments.choose(model.config().audio.is_some(), verifier.is_some())?;
    let bytes = Bytes::read(&folder, model.config())?;

    let mapped = Work { bytes: Some(model.mapped_bytes() as f64), operations: None };
    let mut measured = vec![opening.measured("open", Figures::of(1, "model"), mapped)];
    for stage in stages {
        stage.measure(arguments, &mut model, verifier.as_mut(), &bytes, &mut measured)?;
    }
    // Before the roofs are measured, which takes a large buffer.
    let peak_rss_mb = memory::bytes("VmHWM").map(|bytes| bytes as f64 / 1e6);
    let (read_roof_gb_s, compute_roof_gflop_s) = device.roofs()?;
    let mut report = Report {
        model: format!("{} {}", manifest.model.name, manifest.model.version),
        device: device.describe(),
        threads: device.threads(),
        repeat: arguments.repeat,
        stages: measured,
        read_roof_gb_s,
        compute_roof_gflop_s,
        peak_rss_mb,
        planned_mb: plan.total() as f64 / 1e6,
        planned_gpu_mb: plan.held().gpu as f64 / 1e6,
    };
    report.hold_against_roofs();
    Ok(report)
}

impl Bench {
    fn needs_verifier(&self) -> bool {
        self.stages.is_empty() || self.stages.iter().any(|stage| matches!(stage, Stage::Verifier | Stage::Window))
    }

    /// What the stages take of memory: each is run once on paper.
    fn plan(&self, folder: &Path, verifier: Option<&Path>, device: PlanDevice) -> Result<Plan> {
        let mut model = Model::open_headers(folder, device.clone())?;
        let mut verifier = match verifier {
            Some(folder) => Some(SentenceReader::new(folder, Classifier::open_headers(folder, device.clone())?)?),
            None => None,
        };
        for stage in self.choose(model.config().audio.is_some(), verifier.is_some())? {
            stage.run_once(self, &mut model, verifier.as_mut())?;
        }
        Ok(Plan::of_device(&device, model.host_bytes()))
    }

    /// The stages asked for; else all that there are.
    fn choose(&self, audio: bool, verifier: bool) -> Result<Vec<Stage>> {
        if self.stages.contains(&Stage::Audio) && !audio {
            bail!("the model has no audio tower; leave audio out of --stages");
        }
        if self.stages.contains(&Stage::Verifier) && !verifier {
            bail!("the model's manifest names no verifier; name one with --verifier, or leave it out of --stages");
        }
        if !self.stages.is_empty() {
            return Ok(self.stages.clone());
        }
        let there = |stage: &Stage| match stage {
            Stage::Audio => audio,
            Stage::Verifier => verifier,
            _ => true,
        };
        Ok(Stage::value_variants().iter().copied().filter(there).collect())
    }
}

impl Stage {
    /// What [`Stage::measure`] runs, once.
    fn run_once<D: Device>(
        self,
        arguments: &Bench,
        model: &mut Model<D>,
        verifier: Option<&mut SentenceReader<D>>,
    ) -> Result<()> {
        // The second token shows all that writing takes.
        const TOKENS: usize = 2;
        let tokens = arguments.tokens as usize;
        let window_prompt = stages::window_prompt(model.config());
        match self {
            Stage::Vision => Window::new(model)?.see(model),
            Stage::Projector => {
                let mut window = Window::new(model)?;
                window.see(model)?;
                window.project(model)
            }
            Stage::Audio => {
                let Some(audio) = model.config().audio.clone() else { return Ok(()) };
                stages::Sound::new(model, &audio)?.hear(model)
            }
            Stage::Prefill => prompts(arguments, model)?.iter_mut().try_for_each(Prompt::read),
            Stage::Decode => {
                let positions = arguments.positions.map_or(window_prompt, |positions| positions as usize);
                Decoding::new(model, positions, tokens)?.write_some(TOKENS)
            }
            Stage::Verifier => verifier.map_or(Ok(()), SentenceReader::read),
            Stage::Window => {
                let mut window = Window::new(model)?;
                let mut decoding = Decoding::empty(model, window_prompt, tokens)?;
                window.see(model)?;
                window.project(model)?;
                decoding.start(&window)?;
                decoding.write_some(TOKENS)?;
                verifier.map_or(Ok(()), SentenceReader::read)
            }
        }
    }

    fn measure<D: Device>(
        self,
        arguments: &Bench,
        model: &mut Model<D>,
        verifier: Option<&mut SentenceReader<D>>,
        bytes: &Bytes,
        measured: &mut Vec<Measured>,
    ) -> Result<()> {
        let (repeat, tokens) = (arguments.repeat as usize, arguments.tokens as usize);
        let config = model.config().clone();
        let window_prompt = stages::window_prompt(&config);
        match self {
            Stage::Vision => {
                let mut window = Window::new(model)?;
                let times = Times::of(repeat, || window.see(model))?;
                measured.push(times.measured(
                    "vision",
                    Figures::of(config.frames, "frames"),
                    work::vision(&config, bytes),
                ));
            }
            Stage::Projector => {
                let mut window = Window::new(model)?;
                window.see(model)?;
                let times = Times::of(repeat, || window.project(model))?;
                let work = Work { bytes: bytes.projector, operations: None };
                measured.push(times.measured("projector", Figures::of(config.frames, "frames"), work));
            }
            Stage::Audio => {
                let Some(audio) = &config.audio else { return Ok(()) };
                let mut sound = stages::Sound::new(model, audio)?;
                let times = Times::of(repeat, || sound.hear(model))?;
                let work = work::audio(audio, config.decoder.width, bytes);
                measured.push(times.measured("audio", Figures::of(stages::SOUND_S, "seconds"), work));
            }
            Stage::Prefill => {
                for mut prompt in prompts(arguments, model)? {
                    let times = Times::of(repeat, || prompt.read())?;
                    let work = work::prefill(&config.decoder, prompt.len(), bytes);
                    measured.push(times.measured("prefill", Figures::of(prompt.len(), "tokens"), work));
                }
            }
            Stage::Decode => {
                let positions = arguments.positions.map_or(window_prompt, |positions| positions as usize);
                let mut decoding = Decoding::new(model, positions, tokens)?;
                let times = Times::of_prepared(repeat, &mut decoding, Decoding::rewind, Decoding::write)?;
                let work = work::decode(&config.decoder, positions, tokens, decoding.cache_bytes(), bytes);
                let figures = Figures { positions: Some(positions), ..Figures::of(tokens, "tokens") };
                measured.push(times.measured("decode", figures, work));
            }
            Stage::Verifier => {
                let Some(verifier) = verifier else { return Ok(()) };
                let times = Times::of(repeat, || verifier.read())?;
                measured.push(times.measured(
                    "verifier",
                    Figures::of(verifier.sentences(), "sentences"),
                    verifier.work(),
                ));
            }
            Stage::Window => {
                let mut window = Window::new(model)?;
                let mut decoding = Decoding::empty(model, window_prompt, tokens)?;
                let mut verifier = verifier;
                let times = Times::of(repeat, || {
                    window.see(model)?;
                    window.project(model)?;
                    decoding.start(&window)?;
                    decoding.write()?;
                    verifier.as_mut().map_or(Ok(()), |verifier| verifier.read())
                })?;
                measured.push(times.measured("window", Figures::of(1, "window"), Work::default()));
            }
        }
        Ok(())
    }
}

/// The prompts that prefill reads.
fn prompts<D: Device>(arguments: &Bench, model: &Model<D>) -> Result<Vec<Prompt<D>>> {
    match &arguments.prompt[..] {
        [] => Ok(vec![Prompt::window(model)?]),
        lengths => lengths.iter().map(|&length| Prompt::text(model, length as usize)).collect(),
    }
}
