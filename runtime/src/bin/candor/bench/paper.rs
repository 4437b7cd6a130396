//! `candor bench --model-of BOARD`: what each stage should take on a board, from the bytes, operations and launches of the kernels
//! that would run, and the board's figures. Nothing is computed, and no GPU is needed.

use anyhow::{Result, anyhow};
use candor::manifest::Manifest;
use candor::message::say;
use candor::model::{Classifier, Model};
use candor_kernels::cuda::ledger::{Assumptions, BOARDS, Board, Books, Entry, LedgerDevice};
use serde::Serialize;

use super::stages::{self, Decoding, Prompt, SentenceReader, Window};
use super::{Bench, prompts};
use crate::folders;

/// Seconds from one launch to the next where a graph holds them all.
const GRAPH_LAUNCH_S: f64 = 1.5e-6;

#[derive(Serialize)]
struct Report {
    model: String,
    board: &'static str,
    bandwidth_gb_s: f64,
    assumed_bandwidth_share: f64,
    assumed_arithmetic_share: f64,
    assumed_launch_us: f64,
    assumed_meeting_us: f64,
    stages: Vec<Stage>,
    /// Published decoding speed of another engine, of a model about as large.
    published_tokens_s: Option<f64>,
}

#[derive(Serialize)]
struct Stage {
    stage: &'static str,
    count: usize,
    unit: &'static str,
    launches: u64,
    mb: f64,
    gop: f64,
    ms: f64,
    per_s: f64,
    /// Time that reading at the board's whole bandwidth would take, as a share of that.
    read_roof_percent: f64,
    kernels: Vec<Kernel>,
}

#[derive(Serialize)]
struct Kernel {
    kernel: &'static str,
    launches: u64,
    mb: f64,
    ms: f64,
}

/// The board of this name.
pub(super) fn board(name: &str) -> Result<Board> {
    let known = || BOARDS.map(|board| board.name).join(", ");
    BOARDS.into_iter().find(|board| board.name == name).ok_or_else(|| anyhow!("no board {name}; known are {}", known()))
}

pub(super) fn run(arguments: &Bench, board: Board) -> Result<()> {
    let report = predict(arguments, board, Assumptions::default())?;
    if arguments.json {
        return Ok(say(serde_json::to_string(&report)?).map(drop)?);
    }
    print(&report, arguments, board)
}

fn predict(arguments: &Bench, board: Board, assumptions: Assumptions) -> Result<Report> {
    let folder = folders::model(arguments.model.clone())?;
    let manifest = Manifest::open(&folder)?;
    let device = LedgerDevice::new(board, assumptions);
    let mut model = Model::open_headers(&folder, device.clone())?;
    let verifier = arguments.verifier.clone().or_else(|| manifest.verifier_folder());
    let mut found = Vec::new();
    let mut book = |stage, count, unit, books: Books| found.push(Stage::new(stage, count, unit, &books, board));
    let config = model.config().clone();

    let mut window = Window::new(&model)?;
    device.take();
    window.see(&mut model)?;
    let vision = device.take();
    window.project(&mut model)?;
    let projector = device.take();
    book("vision", config.frames, "frames", vision.clone());
    book("projector", config.frames, "frames", projector.clone());
    if let Some(audio) = &config.audio {
        let mut sound = stages::Sound::new(&model, audio)?;
        device.take();
        sound.hear(&mut model)?;
        book("audio", stages::SOUND_S, "seconds", device.take());
    }
    let mut prefill = Books::default();
    for mut prompt in prompts(arguments, &model)? {
        device.take();
        Prompt::read(&mut prompt)?;
        prefill = device.take();
        book("prefill", prompt.len(), "tokens", prefill.clone());
    }
    let positions = arguments.positions.map_or(stages::window_prompt(&config), |positions| positions as usize);
    let mut decoding = Decoding::new(&model, positions, 1)?;
    device.take();
    decoding.write_some(1)?;
    let token = device.take();
    book("decode", 1, "tokens", token.clone());
    let mut read = Books::default();
    if let Some(folder) = verifier {
        let mut reader = SentenceReader::new(&folder, Classifier::open_headers(&folder, device.clone())?)?;
        device.take();
        reader.read()?;
        read = device.take();
        book("verifier", reader.sentences(), "sentences", read.clone());
    }
    let mut whole = Books::default();
    let tokens = arguments.tokens as usize;
    for (books, times) in [(vision, 1), (projector, 1), (prefill, 1), (token, tokens), (read, 1)] {
        for _ in 0..times {
            whole.add(&books);
        }
    }
    book("window", 1, "window", whole);
    Ok(Report {
        model: format!("{} {}", manifest.model.name, manifest.model.version),
        board: board.title,
        bandwidth_gb_s: board.bandwidth_gb_s,
        assumed_bandwidth_share: assumptions.bandwidth,
        assumed_arithmetic_share: assumptions.arithmetic,
        assumed_launch_us: assumptions.launch_s * 1e6,
        assumed_meeting_us: assumptions.meeting_s * 1e6,
        stages: found,
        published_tokens_s: board.published,
    })
}

impl Stage {
    fn new(stage: &'static str, count: usize, unit: &'static str, books: &Books, board: Board) -> Self {
        let Entry { launches, bytes, byte_operations, float_operations, seconds } = books.total();
        let kernel = |(&kernel, entry): (&&'static str, &Entry)| Kernel {
            kernel,
            launches: entry.launches,
            mb: entry.bytes / 1e6,
            ms: entry.seconds * 1e3,
        };
        let mut kernels: Vec<Kernel> = books.0.iter().map(kernel).collect();
        kernels.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        Stage {
            stage,
            count,
            unit,
            launches,
            mb: bytes / 1e6,
            gop: (byte_operations + float_operations) / 1e9,
            ms: seconds * 1e3,
            per_s: count as f64 / seconds,
            read_roof_percent: 100.0 * bytes / (board.bandwidth_gb_s * 1e9) / seconds,
            kernels,
        }
    }
}

fn print(report: &Report, arguments: &Bench, board: Board) -> Result<()> {
    say(format_args!("{} on {}, on paper", report.model, report.board))?;
    for stage in &report.stages {
        say(format_args!(
            "  {:<10} {:>9.2} ms   {:.1} {}/s, {} launches, {:.1} MB, {:.1} GOP, {:.0} % of the read roof",
            stage.stage,
            stage.ms,
            stage.per_s,
            stage.unit,
            stage.launches,
            stage.mb,
            stage.gop,
            stage.read_roof_percent
        ))?;
        if stage.stage == "decode" {
            for kernel in &stage.kernels {
                let Kernel { kernel, launches, mb, ms } = kernel;
                say(format_args!("    {kernel:<16} {ms:>8.3} ms   {launches} launches, {mb:.2} MB"))?;
            }
        }
    }
    let graph = Assumptions { launch_s: GRAPH_LAUNCH_S, ..Assumptions::default() };
    let decode = |report: &Report| report.stages.iter().find(|stage| stage.stage == "decode").map(|stage| stage.per_s);
    if let Some(speed) = decode(&predict(arguments, board, graph)?) {
        say(format_args!(
            "  with each token's launches in a graph, {:.1} us apart: {speed:.1} tokens/s",
            GRAPH_LAUNCH_S * 1e6
        ))?;
    }
    if let Some(speed) = report.published_tokens_s {
        say(format_args!(
            "  published: {speed} tokens/s (TensorRT-Edge-LLM 0.10, Qwen3-0.6B in 4 bits, 2048 positions)"
        ))?;
    }
    say(format_args!(
        "  assumed: kernels that read come to {:.0} % of {} GB/s, those that compute to {:.0} % of the board's operations, launches are {:.1} us apart, and the blocks of a launch meet in {:.1} us",
        100.0 * report.assumed_bandwidth_share,
        report.bandwidth_gb_s,
        100.0 * report.assumed_arithmetic_share,
        report.assumed_launch_us,
        report.assumed_meeting_us
    ))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boards_have_names_and_others_are_refused() {
        assert_eq!(board("agx-orin").expect("it is known").capability, (8, 7));
        let error = board("nano").map(|board| board.name).expect_err("it is not known");
        assert!(error.to_string().contains("orin-nano"), "{error}");
    }
}
