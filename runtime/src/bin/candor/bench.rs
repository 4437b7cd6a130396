//! `candor bench`: how long every stage of a model takes on this machine, and how near decoding comes to what the
//! memory can give. Works on any model folder: pictures and tokens are random, as speed does not depend on them.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};
use candor::manifest::Manifest;
use candor::message::say;
use candor::model::config::{ClassifierConfig, ModelConfig};
use candor::model::{Classifier, LanguageModel, Model, Piece, Rows, Session};
use candor::weights::Checkpoint;
use candor_kernels::Device;
use candor_kernels::cpu::{CpuDevice, measure_read_bandwidth};
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::{folders, memory};

/// Text tokens of the prompt, besides those of the pictures: about what an instruction in a chat template takes.
const PROMPT_TEXT_TOKENS: usize = 64;
/// Word pieces of the gate's instruction and of a sentence that the verifier reads.
const SENTENCE_TOKENS: usize = 24;
/// Sentences of a rationale.
const SENTENCES: usize = 4;
/// Larger than the caches of the processors this runs on.
const ROOF_BYTES: usize = 256 << 20;
/// The same random pictures and tokens every time.
const SEED: u64 = 1;

/// Time every stage of a model and the whole window.
#[derive(clap::Args)]
pub(crate) struct Bench {
    /// Folder of the model; else $CANDOR_MODEL, else models/default here or above the program.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Folder of the verifier; else the one that the model names, if it names one.
    #[arg(long, value_name = "DIR")]
    verifier: Option<PathBuf>,
    /// Threads; one for each core if not given.
    #[arg(long)]
    threads: Option<usize>,
    /// Windows to time; every figure is the median over them.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,
    /// Tokens to write in each window.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    tokens: u32,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    model: String,
    device: String,
    threads: usize,
    runs: u32,
    open: Open,
    vision: Vision,
    projector: Stage,
    prefill: Prefill,
    decode: Decode,
    verifier: Option<Verifier>,
    window: Stage,
    read_roof_gb_s: f64,
    peak_rss_mb: Option<f64>,
}

#[derive(Serialize)]
struct Open {
    ms: f64,
    mapped_mb: f64,
}

#[derive(Serialize)]
struct Stage {
    ms: f64,
}

#[derive(Serialize)]
struct Vision {
    ms: f64,
    frames: usize,
    frames_per_s: f64,
}

#[derive(Serialize)]
struct Prefill {
    ms: f64,
    tokens: usize,
    tokens_per_s: f64,
}

#[derive(Serialize)]
struct Decode {
    ms: f64,
    tokens: usize,
    tokens_per_s: f64,
    /// Weights and cache that one token reads.
    mb_per_token: f64,
    gb_s: f64,
    read_roof_percent: f64,
}

#[derive(Serialize)]
struct Verifier {
    ms: f64,
    sentences: usize,
    sentences_per_s: f64,
}

pub(crate) fn run(arguments: Bench) -> Result<()> {
    let report = measure(&arguments)?;
    if arguments.json {
        say(serde_json::to_string(&report)?)?;
    } else {
        print(&report)?;
    }
    Ok(())
}

fn measure(arguments: &Bench) -> Result<Report> {
    let folder = folders::model(arguments.model.clone())?;
    let manifest = Manifest::open(&folder)?;
    let device = CpuDevice::new(arguments.threads);
    let runs = arguments.runs as usize;

    let mut opening = Times::default();
    let mut model = opening.time(|| Model::open(&folder, device.clone()))?;
    for _ in 1..runs {
        model = opening.time(|| Model::open(&folder, device.clone()))?;
    }
    let mut verifier = match arguments.verifier.clone().or_else(|| manifest.verifier_folder()) {
        Some(folder) => Some(SentenceReader::open(&folder, &device)?),
        None => None,
    };
    let mut window = Window::new(&model, arguments.tokens as usize)?;

    let mut stages: [Times; 6] = Default::default();
    // The first window fills caches and takes buffers, and is not counted.
    for counted in [false].into_iter().chain(std::iter::repeat_n(true, runs)) {
        let mut discarded: [Times; 6] = Default::default();
        let [vision, projector, prefill, decode, verify, whole] = if counted { &mut stages } else { &mut discarded };
        whole.time(|| -> Result<()> {
            vision.time(|| window.see(&mut model))?;
            projector.time(|| window.project(&mut model))?;
            prefill.time(|| window.prefill())?;
            decode.time(|| window.decode())?;
            verify.time(|| verifier.as_mut().map_or(Ok(()), SentenceReader::read))
        })?;
    }
    let [vision, projector, prefill, decode, verify, whole] = stages.map(|times| times.median_ms());

    let per_second = |count: usize, ms: f64| count as f64 * 1e3 / ms;
    let bytes_per_token = decoder_bytes(&folder, model.config())? as f64 + window.cache_bytes(model.config());
    let gb_s = bytes_per_token * per_second(window.written.len(), decode) / 1e9;
    // Before the roof is measured, which takes a large buffer of its own.
    let peak_rss_mb = memory::bytes("VmHWM").map(|bytes| bytes as f64 / 1e6);
    let read_roof_gb_s = measure_read_bandwidth(device.pool(), ROOF_BYTES);
    Ok(Report {
        model: format!("{} {}", manifest.model.name, manifest.model.version),
        device: device.describe(),
        threads: device.pool().threads(),
        runs: arguments.runs,
        open: Open { ms: opening.median_ms(), mapped_mb: model.mapped_bytes() as f64 / 1e6 },
        vision: Vision {
            ms: vision,
            frames: window.frames.len(),
            frames_per_s: per_second(window.frames.len(), vision),
        },
        projector: Stage { ms: projector },
        prefill: Prefill {
            ms: prefill,
            tokens: window.prompt_tokens,
            tokens_per_s: per_second(window.prompt_tokens, prefill),
        },
        decode: Decode {
            ms: decode,
            tokens: window.written.len(),
            tokens_per_s: per_second(window.written.len(), decode),
            mb_per_token: bytes_per_token / 1e6,
            gb_s,
            read_roof_percent: 100.0 * gb_s / read_roof_gb_s,
        },
        verifier: verifier.map(|_| Verifier {
            ms: verify,
            sentences: SENTENCES,
            sentences_per_s: per_second(SENTENCES, verify),
        }),
        window: Stage { ms: whole },
        read_roof_gb_s,
        peak_rss_mb,
    })
}

/// A window's inputs and buffers, filled with random pictures and tokens.
struct Window<D: Device> {
    frames: Vec<Vec<u8>>,
    gate: [f32; 3],
    features: Rows<D>,
    video: Rows<D>,
    session: Session<D>,
    prompt: Vec<u32>,
    prompt_tokens: usize,
    written: Vec<u32>,
}

impl<D: Device> Window<D> {
    fn new(model: &Model<D>, tokens: usize) -> Result<Self> {
        let mut random = ChaCha8Rng::seed_from_u64(SEED);
        let config = model.config();
        let frames = (0..config.frames)
            .map(|_| {
                let mut rgb = vec![0; config.vision.image * config.vision.image * 3];
                random.fill_bytes(&mut rgb);
                rgb
            })
            .collect();
        let prompt_tokens = PROMPT_TEXT_TOKENS + config.frames * config.tokens_a_frame();
        let capacity = prompt_tokens + tokens;
        let positions = config.decoder.positions;
        if capacity > positions {
            bail!("the model has {positions} positions, and the prompt takes {prompt_tokens}: --tokens must be lower");
        }
        let mut ids = |count: usize| random_ids(&mut random, count, config.decoder.vocabulary);
        Ok(Self {
            frames,
            // Equal weights: what the gate would say of an instruction is computed once, not in every window.
            gate: [1.0 / 3.0; 3],
            features: model.rows()?,
            video: model.rows()?,
            session: model.session(capacity)?,
            prompt: ids(PROMPT_TEXT_TOKENS),
            prompt_tokens,
            written: ids(tokens),
        })
    }

    fn see(&mut self, model: &mut Model<D>) -> Result<()> {
        let frames: Vec<&[u8]> = self.frames.iter().map(Vec::as_slice).collect();
        Ok(model.vision_features_rgb(&frames, &mut self.features)?)
    }

    fn project(&mut self, model: &mut Model<D>) -> Result<()> {
        Ok(model.video_tokens(&self.features, self.gate, &mut self.video)?)
    }

    fn prefill(&mut self) -> Result<()> {
        self.session.start(&[Piece::Rows(&self.video), Piece::Tokens(&self.prompt)])?;
        Ok(())
    }

    fn decode(&mut self) -> Result<()> {
        for id in &self.written {
            self.session.append(std::slice::from_ref(id))?;
        }
        Ok(())
    }

    /// Bytes of keys and values that a token reads, on average over those written.
    fn cache_bytes(&self, config: &ModelConfig) -> f64 {
        let decoder = &config.decoder;
        let a_position = 2 * decoder.layers * decoder.key_heads * decoder.head_dim * size_of::<f32>();
        (self.prompt_tokens as f64 + self.written.len() as f64 / 2.0) * a_position as f64
    }
}

/// The verifier and the sentences it is given.
struct SentenceReader {
    classifier: Classifier<CpuDevice>,
    sentences: Vec<Vec<u32>>,
}

impl SentenceReader {
    fn open(folder: &Path, device: &CpuDevice) -> Result<Self> {
        let config = ClassifierConfig::read(folder)?;
        let classifier = Classifier::open(folder, device.clone())?;
        let mut random = ChaCha8Rng::seed_from_u64(SEED);
        let length = SENTENCE_TOKENS.min(classifier.capacity());
        let sentences = (0..SENTENCES).map(|_| random_ids(&mut random, length, config.encoder.vocabulary)).collect();
        Ok(Self { classifier, sentences })
    }

    fn read(&mut self) -> Result<()> {
        for sentence in &self.sentences {
            self.classifier.logits(sentence)?;
        }
        Ok(())
    }
}

fn random_ids(random: &mut impl Rng, count: usize, vocabulary: usize) -> Vec<u32> {
    (0..count).map(|_| random.random_range(0..vocabulary as u32)).collect()
}

/// Bytes of weights that every token reads: the layers and the output head.
fn decoder_bytes(folder: &Path, config: &ModelConfig) -> Result<usize> {
    let checkpoint = Checkpoint::open(folder)?;
    let head = if config.decoder.tied { "model.embed_tokens." } else { "lm_head." };
    let mut bytes = 0;
    for name in checkpoint.names() {
        if [head, "model.layers.", "model.norm."].iter().any(|part| name.starts_with(part)) {
            bytes += checkpoint.raw(name)?.bytes.len();
        }
    }
    Ok(bytes)
}

/// How long something took, time after time.
#[derive(Default)]
struct Times(Vec<f64>);

impl Times {
    fn time<T, E>(&mut self, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let start = Instant::now();
        let result = work();
        self.0.push(start.elapsed().as_secs_f64() * 1e3);
        result
    }

    /// The middle time in milliseconds; never 0, as speeds are divided by it.
    fn median_ms(mut self) -> f64 {
        self.0.sort_by(f64::total_cmp);
        self.0.get(self.0.len() / 2).copied().unwrap_or_default().max(1e-6)
    }
}

fn print(report: &Report) -> io::Result<()> {
    say(format_args!("{} on {}, medians of {} windows", report.model, report.device, report.runs))?;
    let row = |name: &str, ms: f64, more: String| say(format_args!("  {name:<10} {ms:>9.2} ms   {more}"));
    row("open", report.open.ms, format!("{:.1} MB mapped", report.open.mapped_mb))?;
    let vision = &report.vision;
    row("vision", vision.ms, format!("{} frames, {:.1} frames/s", vision.frames, vision.frames_per_s))?;
    row("projector", report.projector.ms, String::new())?;
    let prefill = &report.prefill;
    row("prefill", prefill.ms, format!("{} tokens, {:.0} tokens/s", prefill.tokens, prefill.tokens_per_s))?;
    let decode = &report.decode;
    row(
        "decode",
        decode.ms,
        format!(
            "{} tokens, {:.1} tokens/s, {:.2} MB a token, {:.2} GB/s = {:.1} % of the read roof",
            decode.tokens, decode.tokens_per_s, decode.mb_per_token, decode.gb_s, decode.read_roof_percent
        ),
    )?;
    match &report.verifier {
        Some(verifier) => row(
            "verifier",
            verifier.ms,
            format!("{} sentences, {:.1} sentences/s", verifier.sentences, verifier.sentences_per_s),
        ),
        None => say("  verifier           none: the manifest names none, and --verifier was not given"),
    }?;
    row("window", report.window.ms, format!("{:.2} windows/s", 1e3 / report.window.ms))?;
    say(format_args!("  memory reads at {:.1} GB/s (measured now)", report.read_roof_gb_s))?;
    if let Some(peak) = report.peak_rss_mb {
        say(format_args!("  peak memory {peak:.1} MB resident"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_times_is_positive() {
        assert_eq!(Times(vec![5.0, 1.0, 3.0]).median_ms(), 3.0);
        assert!(Times::default().median_ms() > 0.0);
    }
}
