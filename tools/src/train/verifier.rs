//! `candor-tools train verifier`: tunes a pretrained sentence encoder (BERT) to read GoEmotions' 28 labels out of a
//! sentence, on that data set and on sentences of rationales. The result is a folder in the layout of Hugging Face's
//! `BertForSequenceClassification`.

use super::checkpoint;
use super::curves::RunLog;
use super::encoder::{Affine, BERT_NAMES, Encoder, EncoderBuffers, EncoderSize, NormPlace, Sequences};
use super::export;
use super::ops;
use super::optimiser::AdamW;
use super::parameters::{Plan, Treatment, read_tensors};
use super::products::TrainDevice;
use super::schedule::{Decay, Schedule};
use super::tower::stop_on_interrupt;
use crate::quantize::stored::{self, Stored};
use crate::sentences::{LABELS, Labelled, above, agreement, by_rule, macro_f1, read_sentences};
use anyhow::{Context, bail, ensure};
use candor::verify::emotions::GO_EMOTIONS;
use candor::verify::reading::THRESHOLD;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::json;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokenizers::Tokenizer;

/// Sentences a step.
const BATCH: usize = 32;
/// Sentences that are sorted by length together before they are cut into batches.
const POOL: usize = 64 * BATCH;
/// Factor on the learning rate of the pooler's and the head's parameters.
const HEAD_RATE: f32 = 10.0;
/// Share of the steps over which the rate rises.
const WARM_UP: f64 = 0.05;
/// Dropout within the encoder and before the head.
const DROPOUT: f32 = 0.1;
/// Largest norm of a step's gradient.
const CLIP: f32 = 1.0;
/// Sentences of a validation that a worker takes at a time.
const READ_AT_ONCE: usize = 32;
/// Time between two checkpoints.
const SAVE_EVERY: Duration = Duration::from_secs(180);

/// Arguments of `candor-tools train verifier`.
#[derive(clap::Args, Debug)]
pub struct VerifierArgs {
    /// Training sentences: text, comma-separated label ids and an id, with tabs between (GoEmotions' train.tsv).
    #[arg(long, required = true)]
    tsv: Vec<PathBuf>,
    /// More training sentences of the same form: sentences of rationales, from `candor-tools data faces`.
    #[arg(long)]
    sentences: Vec<PathBuf>,
    /// Sentences to validate on after each pass (GoEmotions' dev.tsv).
    #[arg(long)]
    dev: PathBuf,
    /// Held-back sentences of rationales to validate on after each pass.
    #[arg(long)]
    held_out: Option<PathBuf>,
    /// Folder of the pretrained encoder: config.json, tokenizer.json, model.safetensors in BertModel's layout.
    #[arg(long)]
    base: PathBuf,
    /// Folder of the run; the tuned verifier ends up in its `verifier`. A run cut off goes on from its last checkpoint.
    #[arg(long)]
    out: PathBuf,
    /// Passes over the training sentences.
    #[arg(long, default_value_t = 3)]
    passes: u64,
    /// Learning rate of the encoder at its peak; the head's is ten times that.
    #[arg(long, default_value_t = 1e-4)]
    rate: f32,
    /// Factor on the learning rate of the word vectors. Where those of words in the training sentences stay, words
    /// that are in none of them keep their place among their like.
    #[arg(long, default_value_t = 0.0)]
    words_rate: f32,
    /// Weight decay.
    #[arg(long, default_value_t = 0.01)]
    weight_decay: f32,
    /// Most word pieces of a sentence.
    #[arg(long, default_value_t = 48)]
    pieces: usize,
    /// Share of the training sentences kept back to choose the threshold on.
    #[arg(long, default_value_t = 0.05)]
    hold: f64,
    /// Seed of the order, of dropout and of the head.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Threads, each with its share of every batch. The result depends on it in the last digits.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    #[command(flatten)]
    device: TrainDevice,
    /// Stop after this many steps, as if cut off (for tests and timings).
    #[arg(long)]
    stop_after: Option<u64>,
}

/// What is read of config.json.
#[derive(Clone, Debug, Deserialize)]
struct BertConfig {
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    type_vocab_size: usize,
    hidden_act: String,
    layer_norm_eps: f64,
    #[serde(default)]
    pad_token_id: u32,
}

/// The encoder and its head: places of all parameters, and the sizes.
struct Verifier {
    config: BertConfig,
    plan: Plan,
    words: Range<usize>,
    positions: Range<usize>,
    types: Range<usize>,
    norm: Affine,
    encoder: Encoder,
    pooler: Affine,
    head: Affine,
}

/// A sentence ready for the encoder.
struct Example {
    ids: Vec<u32>,
    labels: [bool; LABELS],
}

/// Buffers of one worker.
#[derive(Default)]
struct Worker {
    ids: Vec<u32>,
    visible: Vec<usize>,
    summed: Vec<f32>,
    embedded: Vec<f32>,
    statistics: Vec<f32>,
    encoder: EncoderBuffers,
    first: Vec<f32>,
    pooled: Vec<f32>,
    dropped: Vec<f32>,
    logits: Vec<f32>,
    gradient: Vec<f32>,
    pooled_gradient: Vec<f32>,
    first_gradient: Vec<f32>,
}

impl Verifier {
    fn new(config: BertConfig, words_rate: f32) -> anyhow::Result<Self> {
        ensure!(config.hidden_act == "gelu", "hidden_act is {:?}; only \"gelu\" can be trained", config.hidden_act);
        let sizes =
            [config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size];
        let tables = [config.vocab_size, config.max_position_embeddings, config.type_vocab_size];
        ensure!(
            sizes.iter().all(|size| (1..=65_536).contains(size)) && tables.iter().all(|n| (1..=1_000_000).contains(n)),
            "a size is zero or beyond reason: {config:?}"
        );
        let (width, heads) = (config.hidden_size, config.num_attention_heads);
        ensure!(width % heads == 0, "hidden_size is not divisible by the number of heads");
        let mut plan = Plan::default();
        let table = Treatment { decay: false, rate: 1.0 };
        let name = |part: &str| format!("bert.embeddings.{part}.weight");
        let slow = Treatment { rate: words_rate, ..table };
        let words = plan.add(name("word_embeddings"), &[config.vocab_size, width], slow);
        let positions = plan.add(name("position_embeddings"), &[config.max_position_embeddings, width], table);
        let types = plan.add(name("token_type_embeddings"), &[config.type_vocab_size, width], table);
        let norm = Affine::norm(&mut plan, "bert.embeddings.LayerNorm", width, 1.0);
        let size = EncoderSize {
            width,
            heads,
            hidden: config.intermediate_size,
            layers: config.num_hidden_layers,
            eps: config.layer_norm_eps as f32,
            norm: NormPlace::After,
        };
        let encoder = Encoder::new(&mut plan, "bert.encoder.layer", &BERT_NAMES, size, |_| 1.0);
        let pooler = Affine::projection(&mut plan, "bert.pooler.dense", width, width, 1.0);
        let head = Affine::projection(&mut plan, "classifier", LABELS, width, HEAD_RATE);
        Ok(Self { config, plan, words, positions, types, norm, encoder, pooler, head })
    }

    /// Parameters from the base's file; the head starts small and random, as the pooler does where the base has none
    /// (then `false` is returned beside).
    fn initial(&self, base: &Path, seed: u64) -> anyhow::Result<(Vec<f32>, bool)> {
        let tensors = read_tensors(base)?;
        let prefixed = tensors.contains_key("bert.embeddings.word_embeddings.weight");
        let stored = |name: &str| if prefixed { name.to_owned() } else { name.replacen("bert.", "", 1) };
        let pooled = tensors.contains_key(&stored("bert.pooler.dense.weight"));
        let mut values = vec![0.0; self.plan.len()];
        self.plan.load(base, &mut values, |name| {
            let of_base = name.starts_with("bert.") && (pooled || !name.starts_with("bert.pooler."));
            of_base.then(|| stored(name))
        })?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut fill = |range: &Range<usize>| {
            values[range.clone()].iter_mut().for_each(|value| *value = rng.random_range(-0.035..0.035));
        };
        fill(&self.head.weight);
        if !pooled {
            fill(&self.pooler.weight);
        }
        Ok((values, pooled))
    }

    /// Lets the head start at how often each label occurs, so that the first steps need not learn that.
    fn start_at_frequencies(&self, values: &mut [f32], examples: &[Labelled]) {
        let biases = values[self.head.bias.clone()].iter_mut();
        biases.zip(frequencies(examples)).for_each(|(bias, frequency)| *bias = logit(frequency));
    }

    /// Logits of the sentences, in `worker.logits` `[sentences, 28]`. With `dropout`, as in training.
    fn forward(&self, values: &[f32], examples: &[&Example], dropout: Option<u32>, worker: &mut Worker) {
        let width = self.config.hidden_size;
        let tokens = examples.iter().map(|example| example.ids.len()).max().unwrap_or(1);
        let rows = tokens * examples.len();
        worker.ids.clear();
        worker.visible.clear();
        for example in examples {
            worker.ids.extend_from_slice(&example.ids);
            worker.ids.resize(worker.visible.len() * tokens + tokens, self.config.pad_token_id);
            worker.visible.push(example.ids.len());
        }
        worker.summed.resize(rows * width, 0.0);
        ops::embed(&values[self.words.clone()], width, &worker.ids, &mut worker.summed);
        let kind = &values[self.types.start..][..width];
        let positions = &values[self.positions.clone()];
        for (index, row) in worker.summed.chunks_exact_mut(width).enumerate() {
            let position = &positions[index % tokens * width..][..width];
            for ((x, p), k) in row.iter_mut().zip(position).zip(kind) {
                *x += p + k;
            }
        }
        worker.embedded.resize(rows * width, 0.0);
        worker.statistics.resize(rows * 2, 0.0);
        let eps = self.config.layer_norm_eps as f32;
        self.norm.layer_norm(values, &worker.summed, eps, &mut worker.embedded, &mut worker.statistics);
        if let Some(seed) = dropout {
            ops::dropout(&mut worker.embedded, DROPOUT, seed.wrapping_mul(64).wrapping_add(62));
        }
        worker.encoder.dropout = dropout.map(|seed| (DROPOUT, seed));
        let sequences = Sequences { tokens, visible: &worker.visible };
        self.encoder.forward(values, &worker.embedded, sequences, &mut worker.encoder);
        worker.first.clear();
        for sentence in worker.encoder.output()[..rows * width].chunks_exact(tokens * width) {
            worker.first.extend_from_slice(&sentence[..width]);
        }
        worker.pooled.resize(examples.len() * width, 0.0);
        self.pooler.linear(values, &worker.first, examples.len(), &mut worker.pooled);
        worker.pooled.iter_mut().for_each(|x| *x = x.tanh());
        worker.dropped.clear();
        worker.dropped.extend_from_slice(&worker.pooled);
        if let Some(seed) = dropout {
            ops::dropout(&mut worker.dropped, DROPOUT, seed.wrapping_mul(64).wrapping_add(63));
        }
        worker.logits.resize(examples.len() * LABELS, 0.0);
        self.head.linear(values, &worker.dropped, examples.len(), &mut worker.logits);
    }

    /// Backward from the gradients that stand in `worker.logits`; adds to `gradients`.
    fn backward(&self, values: &[f32], gradients: &mut [f32], dropout: Option<u32>, worker: &mut Worker) {
        let width = self.config.hidden_size;
        let count = worker.visible.len();
        let tokens = worker.ids.len() / count;
        worker.pooled_gradient.resize(count * width, 0.0);
        worker.first_gradient.resize(count * width, 0.0);
        let (pooled, first) = (&mut worker.pooled_gradient, &mut worker.first_gradient);
        self.head.linear_backward(values, gradients, &worker.dropped, count, &worker.logits, Some(pooled));
        if let Some(seed) = dropout {
            ops::dropout(pooled, DROPOUT, seed.wrapping_mul(64).wrapping_add(63));
        }
        pooled.iter_mut().zip(&worker.pooled).for_each(|(g, x)| *g *= 1.0 - x * x);
        self.pooler.linear_backward(values, gradients, &worker.first, count, pooled, Some(first));
        worker.gradient.clear();
        worker.gradient.resize(count * tokens * width, 0.0);
        for (to, from) in worker.gradient.chunks_exact_mut(tokens * width).zip(first.chunks_exact(width)) {
            to[..width].copy_from_slice(from);
        }
        let sequences = Sequences { tokens, visible: &worker.visible };
        let gradient = &mut worker.gradient;
        self.encoder.backward(values, gradients, &worker.embedded, sequences, &mut worker.encoder, gradient);
        if let Some(seed) = dropout {
            ops::dropout(gradient, DROPOUT, seed.wrapping_mul(64).wrapping_add(62));
        }
        let mut inner = vec![0.0; gradient.len()];
        let (summed, statistics) = (&worker.summed, &worker.statistics);
        self.norm.layer_norm_backward(values, gradients, summed, statistics, gradient, &mut inner);
        ops::embed_backward(width, &worker.ids, &inner, &mut gradients[self.words.clone()]);
        let (positions, kinds) = (self.positions.start, self.types.start);
        for (index, row) in inner.chunks_exact(width).enumerate() {
            for start in [positions + index % tokens * width, kinds] {
                gradients[start..][..width].iter_mut().zip(row).for_each(|(sum, g)| *sum += g);
            }
        }
    }

    /// Probabilities of the labels for each sentence.
    fn read(&self, values: &[f32], examples: &[Example], workers: &mut [Worker]) -> Vec<[f32; LABELS]> {
        // By length, so that little of a batch is padding.
        let mut order: Vec<usize> = (0..examples.len()).collect();
        order.sort_by_key(|index| examples[*index].ids.len());
        let chunks: Vec<&[usize]> = order.chunks(READ_AT_ONCE).collect();
        let threads = workers.len();
        let read: Vec<Vec<(usize, [f32; LABELS])>> = workers
            .par_iter_mut()
            .enumerate()
            .map(|(first, worker)| {
                let mut read = Vec::new();
                for indices in chunks.iter().skip(first).step_by(threads) {
                    let batch: Vec<&Example> = indices.iter().map(|index| &examples[*index]).collect();
                    self.forward(values, &batch, None, worker);
                    for (index, logits) in indices.iter().zip(worker.logits.chunks_exact(LABELS)) {
                        read.push((*index, std::array::from_fn(|i| 1.0 / (1.0 + (-logits[i]).exp()))));
                    }
                }
                read
            })
            .collect();
        let mut probabilities = vec![[0.0; LABELS]; examples.len()];
        for (index, row) in read.into_iter().flatten() {
            probabilities[index] = row;
        }
        probabilities
    }
}

fn right(examples: &[Example]) -> Vec<[bool; LABELS]> {
    examples.iter().map(|example| example.labels).collect()
}

/// The threshold with the best macro-F1, among hundredths.
fn best_threshold(probabilities: &[[f32; LABELS]], right: &[[bool; LABELS]]) -> f32 {
    let thresholds = (5..=60).map(|hundredths| hundredths as f32 / 100.0);
    let scored = thresholds.map(|threshold| (threshold, macro_f1(&above(probabilities, threshold), right)));
    scored.fold((0.5, -1.0), |best, candidate| if candidate.1 > best.1 { candidate } else { best }).0
}

/// How often each label occurs, kept off 0 and 1.
fn frequencies(sentences: &[Labelled]) -> [f32; LABELS] {
    std::array::from_fn(|label| {
        let count = sentences.iter().filter(|sentence| sentence.labels[label]).count();
        (count as f32 + 1.0) / (sentences.len() as f32 + 2.0)
    })
}

fn logit(probability: f32) -> f32 {
    let probability = probability.clamp(1e-6, 1.0 - 1e-6);
    (probability / (1.0 - probability)).ln()
}

/// Shifts of the head's biases after which each label is read, above the paper's threshold, about as often as it
/// occurs in the training part: rare labels else hardly ever pass a threshold that suits the common ones. How much
/// more often than it occurs a label should be read is what gives the best macro-F1 on the part kept back.
fn calibration(read: &[[f32; LABELS]], right: &[[bool; LABELS]], frequencies: &[f32; LABELS]) -> [f32; LABELS] {
    let mut best = ([0.0; LABELS], macro_f1(&above(read, THRESHOLD), right));
    for factor in [0.7, 0.85, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0] {
        let shifts: [f32; LABELS] = std::array::from_fn(|label| {
            let mut logits: Vec<f32> = read.iter().map(|row| logit(row[label])).collect();
            logits.sort_by(|a, b| b.total_cmp(a));
            let wanted = (factor * frequencies[label] * read.len() as f32).min((logits.len() - 1) as f32);
            let (rank, share) = (wanted as usize, wanted.fract());
            let next = logits[(rank + 1).min(logits.len() - 1)];
            logit(THRESHOLD) - (logits[rank] * (1.0 - share) + next * share)
        });
        let shifted = |row: &[f32; LABELS]| std::array::from_fn(|i| logit(row[i]) + shifts[i] > logit(THRESHOLD));
        let score = macro_f1(&read.iter().map(shifted).collect::<Vec<_>>(), right);
        if score > best.1 {
            best = (shifts, score);
        }
    }
    best.0
}

/// What a verifier is validated on.
struct Sets {
    /// Kept back from the training part.
    held_back: Vec<Example>,
    /// The data set's own.
    dev: Vec<Example>,
    /// Sentences of rationales in wordings that training does not have.
    held_out: Vec<Example>,
}

/// Figures of one validation.
struct Validation {
    /// Threshold with the best macro-F1 on the part kept back.
    threshold: f32,
    /// That macro-F1, and the paper rule's, in the mean.
    held_back: f64,
    /// On the dev part, at the threshold.
    plain: f64,
    /// On the dev part, by the paper's rule.
    paper: f64,
    /// Held-out sentences that are read as meant.
    agreement: f64,
}

impl Validation {
    fn json(&self) -> serde_json::Value {
        json!({"dev_macro_f1": self.plain, "dev_macro_f1_paper_rule": self.paper, "threshold": self.threshold,
            "held_out_agreement": self.agreement})
    }
}

impl std::fmt::Display for Validation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "dev macro-F1 {:.4} at {:.2}, {:.4} by the paper's rule; rationale sentences read as meant {:.4}",
            self.plain, self.threshold, self.paper, self.agreement
        )
    }
}

fn validate(verifier: &Verifier, values: &[f32], sets: &Sets, workers: &mut [Worker]) -> anyhow::Result<Validation> {
    let (held_back, meant) = (verifier.read(values, &sets.held_back, workers), right(&sets.held_back));
    let threshold = best_threshold(&held_back, &meant);
    let kept = (macro_f1(&above(&held_back, threshold), &meant) + macro_f1(&by_rule(&held_back)?, &meant)) / 2.0;
    let (dev, right_dev) = (verifier.read(values, &sets.dev, workers), right(&sets.dev));
    let held_out = by_rule(&verifier.read(values, &sets.held_out, workers))?;
    Ok(Validation {
        threshold,
        held_back: kept,
        plain: macro_f1(&above(&dev, threshold), &right_dev),
        paper: macro_f1(&by_rule(&dev)?, &right_dev),
        agreement: agreement(&held_out, &right(&sets.held_out)),
    })
}

fn examples(tokenizer: &Tokenizer, sentences: &[Labelled], pieces: usize) -> anyhow::Result<Vec<Example>> {
    sentences
        .par_iter()
        .map(|sentence| {
            let encoding =
                tokenizer.encode(sentence.text.as_str(), true).map_err(|error| anyhow::anyhow!("{error}"))?;
            let mut ids = encoding.get_ids().to_vec();
            if ids.len() > pieces {
                // The last piece is the separator: it stays.
                let last = ids[ids.len() - 1];
                ids.truncate(pieces);
                ids[pieces - 1] = last;
            }
            Ok(Example { ids, labels: sentence.labels })
        })
        .collect()
}

/// The batches of one pass: sentences of like length together, batches in random order.
fn batches(examples: &[Example], seed: u64, pass: u64) -> Vec<Vec<usize>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ (pass << 32));
    let mut order: Vec<usize> = (0..examples.len()).collect();
    order.shuffle(&mut rng);
    for pool in order.chunks_mut(POOL) {
        pool.sort_by_key(|index| examples[*index].ids.len());
    }
    let mut batches: Vec<Vec<usize>> = order.chunks_exact(BATCH).map(<[usize]>::to_vec).collect();
    batches.shuffle(&mut rng);
    batches
}

/// Runs `candor-tools train verifier`.
pub fn run(args: &VerifierArgs) -> anyhow::Result<()> {
    ensure!((1..=BATCH).contains(&args.threads), "--threads must lie between 1 and {BATCH}");
    ensure!(args.passes > 0, "--passes must be at least 1");
    ensure!((0.0..=10.0).contains(&args.words_rate), "--words-rate must lie between 0 and 10");
    ensure!((0.0..0.5).contains(&args.hold), "--hold must lie between 0 and 0.5");
    let config_path = args.base.join("config.json");
    let text = std::fs::read_to_string(&config_path).with_context(|| format!("{}", config_path.display()))?;
    let config: BertConfig = serde_json::from_str(&text).with_context(|| format!("{}", config_path.display()))?;
    ensure!(
        (8..=config.max_position_embeddings).contains(&args.pieces),
        "--pieces must lie between 8 and the base's positions"
    );
    let verifier = Verifier::new(config, args.words_rate).with_context(|| format!("{}", config_path.display()))?;
    let tokenizer_path = args.base.join("tokenizer.json");
    let mut tokenizer = Tokenizer::from_file(&tokenizer_path)
        .map_err(|error| anyhow::anyhow!("{}: {error}", tokenizer_path.display()))?;
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| anyhow::anyhow!("{error}"))?;
    ensure!(
        tokenizer.get_vocab_size(true) <= verifier.config.vocab_size,
        "the tokenizer has more pieces than the base"
    );

    let mut sentences = Vec::new();
    for path in &args.tsv {
        sentences.extend(read_sentences(path)?);
    }
    let held_back = ((sentences.len() as f64 * args.hold) as usize).max(1);
    let frequencies = frequencies(&sentences);
    sentences.shuffle(&mut ChaCha8Rng::seed_from_u64(args.seed));
    let held_back = sentences.split_off(sentences.len() - held_back);
    for path in &args.sentences {
        sentences.extend(read_sentences(path)?);
    }
    let train = examples(&tokenizer, &sentences, args.pieces)?;
    let held_back = examples(&tokenizer, &held_back, args.pieces)?;
    let dev = examples(&tokenizer, &read_sentences(&args.dev)?, args.pieces)?;
    let held_out = match &args.held_out {
        Some(path) => examples(&tokenizer, &read_sentences(path)?, args.pieces)?,
        None => Vec::new(),
    };
    let sets = Sets { held_back, dev, held_out };
    let a_pass = (train.len() / BATCH) as u64;
    ensure!(a_pass > 0, "fewer sentences than one batch of {BATCH}");
    let total = a_pass * args.passes;
    std::fs::create_dir_all(&args.out).with_context(|| format!("{}", args.out.display()))?;
    let products = args.device.choose(false)?;
    let recipe = format!(
        "verifier passes {} rate {} words {} decay {} pieces {} hold {} seed {} threads {} sentences {}{products}",
        args.passes,
        args.rate,
        args.words_rate,
        args.weight_decay,
        args.pieces,
        args.hold,
        args.seed,
        args.threads,
        train.len()
    );
    let warm_up = ((total as f64 * WARM_UP) as u64).max(1);
    let schedule = Schedule { peak: args.rate, warm_up, total, decay: Decay::Linear };
    let (mut values, pooled) = verifier.initial(&args.base.join("model.safetensors"), args.seed)?;
    let mut optimiser = AdamW::new(&verifier.plan, args.weight_decay);
    let state = args.out.join("state.safetensors");
    verifier.start_at_frequencies(&mut values, &sentences);
    checkpoint::resume(&state, &recipe, &mut values, &mut optimiser)?;
    let stop = stop_on_interrupt();
    let mut log = RunLog::open(&args.out, optimiser.steps, total)?;
    log.say(&format!(
        "{} parameters, {} sentences, {total} steps, {} done; the pooler is {}",
        verifier.plan.len(),
        train.len(),
        optimiser.steps,
        if pooled { "the base's" } else { "new: the base has none" }
    ));
    let mut workers: Vec<Worker> = (0..args.threads).map(|_| Worker::default()).collect();
    let mut gradients = vec![vec![0.0; verifier.plan.len()]; args.threads];
    let mut saved = Instant::now();
    let mut last = None;
    for pass in optimiser.steps / a_pass..args.passes {
        let batches = batches(&train, args.seed, pass);
        for batch in batches.iter().skip((optimiser.steps - pass * a_pass) as usize) {
            let step = optimiser.steps;
            let started = Instant::now();
            let share = BATCH.div_ceil(args.threads);
            let loss: f64 = workers
                .par_iter_mut()
                .zip(gradients.par_iter_mut())
                .zip(batch.par_chunks(share))
                .enumerate()
                .map(|(index, ((worker, gradients), indices))| {
                    let examples: Vec<&Example> = indices.iter().map(|index| &train[*index]).collect();
                    let dropout = Some((step as u32).wrapping_mul(64).wrapping_add(index as u32));
                    verifier.forward(&values, &examples, dropout, worker);
                    let mut loss = 0.0;
                    for (example, logits) in examples.iter().zip(worker.logits.chunks_exact_mut(LABELS)) {
                        for (logit, label) in logits.iter_mut().zip(example.labels) {
                            let (term, gradient) = ops::binary_cross_entropy(*logit, f32::from(u8::from(label)));
                            loss += f64::from(term) / (BATCH * LABELS) as f64;
                            *logit = gradient / (BATCH * LABELS) as f32;
                        }
                    }
                    verifier.backward(&values, gradients, dropout, worker);
                    loss
                })
                .sum();
            let rate = schedule.rate(step);
            let norm = optimiser.step(&mut values, &mut gradients, rate, CLIP);
            ensure!(norm.is_finite(), "step {step}: the gradient is not finite; a lower --rate may help");
            let step = optimiser.steps;
            let speed = BATCH as f64 / started.elapsed().as_secs_f64();
            log.write(step, json!({"loss": loss, "rate": rate, "norm": norm, "sentences_per_s": speed}))?;
            log.show(step, format!("loss {loss:.4} {speed:.0} sentences/s"));
            if step.is_multiple_of(100) {
                log.say(&format!("step {step}/{total} loss {loss:.4} norm {norm:.3} {speed:.0}/s"));
            }
            let cut = stop.load(Ordering::Relaxed) || args.stop_after.is_some_and(|stop| step >= stop);
            if saved.elapsed() > SAVE_EVERY || cut || step == total {
                checkpoint::save(&state, &recipe, &values, &optimiser)?;
                saved = Instant::now();
            }
            if cut && step < total {
                bail!("stopped at step {step} of {total}; the same command goes on from there");
            }
        }
        let validation = validate(&verifier, &values, &sets, &mut workers)?;
        log.write(optimiser.steps, validation.json())?;
        log.say(&format!("pass {}: {validation}", pass + 1));
        log.draw("verifier", &["dev_macro_f1", "dev_macro_f1_paper_rule", "held_out_agreement"])?;
        last = Some(validation);
    }
    let plain = match last {
        Some(validation) => validation,
        None => validate(&verifier, &values, &sets, &mut workers)?, // all passes were done before
    };
    log.say(&format!("as trained: {plain}"));
    let trained = values.clone();
    let read = verifier.read(&values, &sets.held_back, &mut workers);
    let shifts = calibration(&read, &right(&sets.held_back), &frequencies);
    values[verifier.head.bias.clone()].iter_mut().zip(shifts).for_each(|(bias, shift)| *bias += shift);
    let calibrated = validate(&verifier, &values, &sets, &mut workers)?;
    log.say(&format!("calibrated: {calibrated}"));
    // Judged by the part kept back from training, never by the sentences that the figures are given for.
    let better = calibrated.held_back >= plain.held_back;
    let (values, validation) = if better { (values, calibrated) } else { (trained, plain) };
    log.write(optimiser.steps, validation.json())?;
    log.draw("verifier", &["dev_macro_f1", "dev_macro_f1_paper_rule", "held_out_agreement"])?;
    let threshold = validation.threshold;
    let folder = args.out.join("verifier");
    write_verifier(&verifier, &values, threshold, &tokenizer_path, &folder)?;
    log.say(&format!("wrote {}", folder.display()));
    Ok(())
}

/// The tuned verifier as a folder that Candor opens: matrices and word vectors as int8 rows, all else in f16.
fn write_verifier(
    verifier: &Verifier,
    values: &[f32],
    threshold: f32,
    tokenizer: &Path,
    folder: &Path,
) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)?;
    let mut records = Vec::new();
    for entry in verifier.plan.entries() {
        let kind = if entry.range == verifier.words { "words.weight" } else { &entry.name };
        let stored = Stored::new(kind, &entry.shape, &values[entry.range.clone()]);
        records.extend(stored.records(&entry.name, &entry.shape));
    }
    checkpoint::write_atomically(&folder.join("model.safetensors"), &export::file_of(&records)?)?;
    let config = &verifier.config;
    let id2label: serde_json::Map<String, serde_json::Value> =
        GO_EMOTIONS.iter().enumerate().map(|(id, name)| (id.to_string(), json!(name))).collect();
    let label2id: serde_json::Map<String, serde_json::Value> =
        GO_EMOTIONS.iter().enumerate().map(|(id, name)| ((*name).to_owned(), json!(id))).collect();
    let config = json!({
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "problem_type": "multi_label_classification",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": config.type_vocab_size,
        "position_embedding_type": "absolute",
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": "float16",
        "quantization_config": stored::config(),
        "id2label": id2label,
        "label2id": label2id,
    });
    checkpoint::write_atomically(&folder.join("config.json"), serde_json::to_string_pretty(&config)?.as_bytes())?;
    checkpoint::write_atomically(&folder.join("tokenizer.json"), &std::fs::read(tokenizer)?)?;
    let manifest = format!(
        "[model]\nname = \"candor-default-verifier\"\nversion = \"1\"\n\
         licence = \"Apache-2.0, as the encoder and the sentences it was tuned from\"\n\n\
         [verifier]\nthreshold = {threshold:.2}\n"
    );
    checkpoint::write_atomically(&folder.join("candor.toml"), manifest.as_bytes())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::train::parameters::check_gradients;
    use candor::model::Classifier;
    use candor_kernels::cpu::CpuDevice;

    fn config() -> BertConfig {
        BertConfig {
            hidden_size: 12,
            num_hidden_layers: 2,
            num_attention_heads: 3,
            intermediate_size: 20,
            vocab_size: 30,
            max_position_embeddings: 16,
            type_vocab_size: 2,
            hidden_act: "gelu".into(),
            layer_norm_eps: 1e-12,
            pad_token_id: 0,
        }
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let verifier = Verifier::new(config(), 1.0).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        let mut values: Vec<f32> = (0..verifier.plan.len()).map(|_| rng.random_range(-0.5..0.5)).collect();
        let mut labels = [false; LABELS];
        labels[3] = true;
        let examples =
            [Example { ids: vec![1, 5, 9, 2], labels }, Example { ids: vec![1, 7, 2], labels: [false; LABELS] }];
        let examples: Vec<&Example> = examples.iter().collect();
        let mut worker = Worker::default();
        let loss = |values: &[f32], worker: &mut Worker| {
            verifier.forward(values, &examples, Some(4), worker);
            let mut loss = 0.0;
            for (example, logits) in examples.iter().zip(worker.logits.chunks_exact_mut(LABELS)) {
                for (logit, label) in logits.iter_mut().zip(example.labels) {
                    let (term, gradient) = ops::binary_cross_entropy(*logit, f32::from(u8::from(label)));
                    loss += f64::from(term) / 8.0;
                    *logit = gradient / 8.0;
                }
            }
            loss
        };
        loss(&values, &mut worker);
        let mut gradients = vec![0.0; values.len()];
        verifier.backward(&values, &mut gradients, Some(4), &mut worker);
        check_gradients(&verifier.plan, &mut values, &gradients, |values| loss(values, &mut worker));
    }

    #[test]
    fn the_training_forward_pass_is_the_runtimes() {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = folder.path().join("words.json");
        std::fs::write(&tokenizer, "{}").unwrap();
        // Wide enough that matrices are stored as int8 rows.
        let config = BertConfig { hidden_size: 72, vocab_size: 60, ..config() };
        let verifier = Verifier::new(config, 1.0).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        let mut values: Vec<f32> = (0..verifier.plan.len()).map(|_| rng.random_range(-0.3..0.3)).collect();
        for entry in verifier.plan.entries() {
            let own = &mut values[entry.range.clone()];
            let kind = if entry.range == verifier.words { "words.weight" } else { &entry.name };
            own.copy_from_slice(&Stored::new(kind, &entry.shape, own).values());
        }
        let written = folder.path().join("verifier");
        write_verifier(&verifier, &values, 0.25, &tokenizer, &written).unwrap();
        let mut classifier = Classifier::open(&written, CpuDevice::new(Some(1)).exact()).unwrap();
        assert_eq!(classifier.labels(), GO_EMOTIONS);
        let ids = [vec![1, 5, 9, 2], vec![1, 7, 40, 59, 3, 2]];
        let examples = ids.each_ref().map(|ids| Example { ids: ids.clone(), labels: [false; LABELS] });
        let mut worker = Worker::default();
        verifier.forward(&values, &examples.each_ref(), None, &mut worker);
        for (ids, trained) in ids.iter().zip(worker.logits.chunks_exact(LABELS)) {
            let run = classifier.logits(ids).unwrap();
            assert!(run.iter().zip(trained).all(|(a, b)| (a - b).abs() < 1e-3), "{run:?} {trained:?}");
        }
        let manifest = candor::manifest::Manifest::open(&written).unwrap();
        assert_eq!(manifest.verifier.threshold, Some(0.25));
    }

    #[test]
    fn calibration_lets_rare_labels_pass() {
        // Label 4 occurs twice in ten, its probabilities rank right but lie below the threshold.
        let mut read = vec![[0.001; LABELS]; 10];
        let mut right = vec![[false; LABELS]; 10];
        for (row, probability) in [0.06, 0.05, 0.01, 0.009, 0.008, 0.007, 0.006, 0.005, 0.004, 0.003].iter().enumerate()
        {
            read[row][4] = *probability;
            right[row][4] = row < 2;
        }
        let mut frequencies = [1e-6; LABELS];
        frequencies[4] = 0.2;
        let shifts = calibration(&read, &right, &frequencies);
        let passes: Vec<bool> = read.iter().map(|row| logit(row[4]) + shifts[4] > logit(THRESHOLD)).collect();
        assert_eq!(passes, right.iter().map(|row| row[4]).collect::<Vec<_>>());
    }

    #[test]
    fn the_threshold_separates() {
        let mut probabilities = vec![[0.0; LABELS]; 2];
        let mut right = vec![[false; LABELS]; 2];
        (probabilities[0][2], probabilities[1][2], right[0][2]) = (0.31, 0.24, true);
        let threshold = best_threshold(&probabilities, &right);
        assert!((0.24..0.31).contains(&threshold), "{threshold}");
    }

    #[test]
    fn every_pass_holds_each_sentence_once() {
        let example = |length: usize| Example { ids: vec![1; length], labels: [false; LABELS] };
        let all: Vec<Example> = (0..3 * BATCH).map(|i| example(2 + i % 7)).collect();
        let mut seen: Vec<usize> = batches(&all, 1, 0).concat();
        assert_ne!(batches(&all, 1, 0), batches(&all, 1, 1));
        seen.sort_unstable();
        assert_eq!(seen, (0..3 * BATCH).collect::<Vec<_>>());
    }
}
