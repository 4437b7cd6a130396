//! `candor watch`: says for each window of a source which emotion it shows and why.

use std::io::{self, IsTerminal, stdout};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use candor::device::Choice;
use candor::media::{Source, SourceOptions, Windows};
use candor::message::say;
use candor::metrics;
use candor::observation::Observation;
use candor::text::{HeadRows, Sampling};
use candor::watch::{AnyWatcher, Order, Policy, Report, Reuse, WatchSettings};
use clap::Args;

use crate::{folders, machine, plan, terminal};

/// Exit status of a program that an interrupt ended.
const INTERRUPTED: i32 = 130;

#[derive(Args)]
pub(crate) struct WatchArgs {
    /// A file, v4l2:/dev/video0, rtsp://…, test, or gst:<pipeline>.
    source: String,
    /// Folder of the model; else $CANDOR_MODEL, else models/default here or above the program.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Folder of the verifier; else the one that the model names, else as --model with default-verifier.
    #[arg(long, value_name = "DIR")]
    verifier: Option<PathBuf>,
    /// Adapter beside the model: a PEFT folder, or that of a reward fine-tuning run.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Print a JSON line for each window (docs/observation.schema.json).
    #[arg(long)]
    json: bool,
    /// Also write a page with frames, chart and rationales.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// What to do about rationales that are not verified: annotate, retry:N, guide:N or withhold.
    #[arg(long, default_value_t = Policy::Annotate)]
    policy: Policy,
    /// Seed of the random numbers.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Warmth of the writing; 0 always takes the most probable token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Share of the probability that is drawn from, where it is warm.
    #[arg(long, default_value_t = 0.9)]
    top_p: f32,
    /// Length of a window in seconds; else the model's.
    #[arg(long, value_name = "S")]
    window: Option<f64>,
    /// Seconds from one window's start to the next's; else the model's.
    #[arg(long, value_name = "S")]
    step: Option<f64>,
    /// Where windows overlap, show a frame of the last one again in the place of its neighbour, and cut a face that hardly
    /// moves out at the same place, so that less is to be computed. Can change an answer.
    #[arg(long)]
    steady: bool,
    /// What is not computed again from window to window: all, none, or a list of gate, prefix, frames, projector, forced.
    #[arg(long, default_value_t = Reuse::ALL, value_name = "LIST")]
    reuse: Reuse,
    /// Rows of the output head that are computed: all, language (tokens of other scripts than the labels' and Latin are
    /// never written), or a number of rows. Fewer are faster with a large vocabulary, and can change an answer.
    #[arg(long, default_value_t = HeadRows::All, value_name = "ROWS")]
    head_rows: HeadRows,
    /// Keep counters in this file, in Prometheus' text format (as for the node exporter's textfile collector).
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// Where to compute: auto (a GPU if one can be used, else the processor), cpu, cuda or cuda:N.
    #[arg(long, default_value_t = Choice::Auto)]
    device: Choice,
    /// Threads of the processor; one for each core if not given.
    #[arg(long)]
    threads: Option<usize>,
    /// Go on where `candor plan` says that there is too little memory.
    #[arg(long)]
    ignore_memory: bool,
}

pub(crate) fn run(args: WatchArgs) -> Result<()> {
    let stop = stop_on_interrupt()?;
    let folder = folders::model(args.model.clone())?;
    let verifier = plan::verifier(&folder, args.verifier.clone())?;
    let sampling = Sampling { temperature: args.temperature, top_p: args.top_p, seed: args.seed };
    let settings = WatchSettings {
        policy: args.policy,
        sampling,
        fit: None,
        reuse: args.reuse,
        steady: args.steady,
        head_rows: args.head_rows,
    };
    let available: fn() -> Option<u64> = machine::memory_available;
    let mut watcher = AnyWatcher::open(Order {
        model: folder,
        verifier,
        adapter: args.adapter,
        settings,
        device: args.device,
        threads: args.threads,
        available: (!args.ignore_memory).then_some(available),
    })?;
    let mut windows = watcher.windows(args.window, args.step)?;
    windows.steady = args.steady;
    let mut source = Source::open(&args.source, SourceOptions::default())?;
    source.stop_with(Arc::clone(&stop));
    let name = source.name();

    let mut report = args.html.map(Report::create).transpose()?;
    let output = Output { json: args.json, colour: terminal::colour(stdout().is_terminal()), metrics: args.metrics };
    output.count()?;
    let watched = watch(&mut watcher, &name, Windows::new(source, windows), &output, report.as_mut(), &stop);
    // The page keeps what was seen before a failure.
    let finished = report.map(Report::finish).transpose();
    watched?;
    finished?;
    Ok(())
}

/// Prints an observation for each window, until the source ends, nobody reads any more, or an interrupt came.
fn watch(
    watcher: &mut AnyWatcher,
    source: &str,
    windows: Windows,
    output: &Output,
    mut report: Option<&mut Report>,
    stop: &AtomicBool,
) -> Result<()> {
    for window in windows {
        let window = window?;
        let observation = watcher.observe(source, &window)?;
        output.count()?;
        if let Some(report) = &mut report {
            report.push(&observation, &window.frames)?;
        }
        if !output.print(&observation).context("standard output")? || stop.load(Ordering::SeqCst) {
            break;
        }
    }
    Ok(())
}

/// The first interrupt ends the run after the window at hand; the second ends it at once.
fn stop_on_interrupt() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if asked.swap(true, Ordering::SeqCst) {
            std::process::exit(INTERRUPTED);
        }
    })
    .context("interrupts cannot be caught")?;
    Ok(stop)
}

struct Output {
    json: bool,
    colour: bool,
    metrics: Option<PathBuf>,
}

impl Output {
    /// Writes the counters, where they are wanted.
    fn count(&self) -> Result<()> {
        match &self.metrics {
            Some(path) => metrics::write(path).with_context(|| path.display().to_string()),
            None => Ok(()),
        }
    }

    /// Prints an observation; see [`say`].
    fn print(&self, observation: &Observation) -> io::Result<bool> {
        match self.json {
            true => say(serde_json::to_string(observation)?),
            false => say(terminal::line(observation, self.colour)),
        }
    }
}
