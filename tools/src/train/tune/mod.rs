//! `candor-tools train tune`: supervised tuning of a model's decoder on a list of clips with rationales and answers, the
//! cold start that reward fine-tuning begins from. The towers, the projector and the gate stay as they are.

pub mod settings;

use super::ops;
use super::optimiser::AdamW;
use super::policy::{Continued, Policy, PolicyBuffers, length};
use super::tower::Order;
use super::tuning::course::{Course, Described, Diverged, RunLock};
use super::tuning::prompts::{Lengths, Prompts, describe};
use super::tuning::report::{self, Chart, mean};
use super::tuning::{caught, result_name, write_result};
use crate::dataset::prepare::prepare;
use crate::dataset::{Dataset, DatasetError, FeatureCache, Item, Problem, ProblemKind, Problems};
use crate::files;
use crate::train::curves::RunLog;
use crate::train::grpo::memory;
use anyhow::{Context, ensure};
use candor::manifest::Manifest;
use candor::model::ModelConfig;
use candor::text::Tokenizer;
use candor::with_device;
use candor_kernels::Device;
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use settings::TuneArgs;
use std::collections::HashMap;
use std::time::Instant;

const CHARTS: [Chart; 4] = [
    ("Loss a token", &["loss"]),
    ("Share of tokens that were the likeliest", &["accuracy"]),
    ("Norm of the gradient", &["norm"]),
    ("Tokens a second", &["tokens_per_s"]),
];

/// Runs `candor-tools train tune`.
pub fn run(args: &TuneArgs) -> anyhow::Result<()> {
    args.check()?;
    let (input, tuning) = (&args.input, &args.tuning);
    ops::set_exact(tuning.f32);
    let manifest = Manifest::open(&input.model)?;
    let mut data = Dataset::open(&input.data, input.media_root.as_deref(), input.skip_bad)?;
    let completions = completions(args, &mut data)?;
    let longest = completions.iter().map(Vec::len).max().unwrap_or(1);
    if args.plan {
        return memory::print(&memory::of_tuning(args, &data.items, longest)?);
    }
    let _lock = RunLock::take(&input.out)?;
    let (chosen, devices) = tuning.open_devices()?;
    with_device!(chosen, device => run_on(&device, &devices, args, data, completions, &manifest))
}

fn run_on<D: Device>(
    device: &D,
    devices: &str,
    args: &TuneArgs,
    mut data: Dataset,
    mut completions: Vec<Vec<u32>>,
    manifest: &Manifest,
) -> anyhow::Result<()> {
    let (input, tuning) = (&args.input, &args.tuning);
    let longest = completions.iter().map(Vec::len).max().unwrap_or(1);
    let cache = FeatureCache::open(&input.features(), &input.model)?;
    let before: Vec<usize> = data.items.iter().map(|item| item.line).collect();
    prepare(&mut data, &input.data, &cache, &input.model, tuning.threads, input.skip_bad, device)?;
    // Broken clips have left.
    let mut by_line: HashMap<usize, Vec<u32>> = before.into_iter().zip(completions).collect();
    completions = data.items.iter().filter_map(|item| by_line.remove(&item.line)).collect();

    let mut policy = Policy::open(&input.model, tuning.lora()?, false, tuning.seed)?;
    let mut optimiser = AdamW::new(policy.plan(), tuning.weight_decay);
    let steps = args.steps(data.items.len());
    let about = json!({"command": "train tune", "model": input.model, "data": input.data, "entries": data.items.len()});
    let described = Described {
        recipe: args.recipe(&manifest.identity()?, &files::sha256(&input.data)?, steps) + devices,
        about,
        steps,
        updates: 1,
    };
    let mut course = Course::open(&input.out, tuning, described, &mut policy, &mut optimiser)?;
    course.log.say(&format!(
        "{} trained parameters, {} entries, {steps} steps, {} done",
        policy.plan().len(),
        data.items.len(),
        course.done
    ));
    let open = |_| {
        let mut buffers = PolicyBuffers::default();
        buffers.decoder.checkpointing = tuning.checkpointing;
        Ok(Worker { prompts: Prompts::open(&input.model, manifest, device.clone())?, buffers })
    };
    let mut run = Run {
        order: Order::new(tuning.seed, data.items.len()),
        workers: (0..tuning.threads).map(open).collect::<anyhow::Result<_>>()?,
        gradients: vec![vec![0.0; policy.plan().len()]; tuning.threads],
        args,
        data,
        completions,
        cache,
    };
    let schedule = args.schedule(steps);
    course.go(
        &mut policy,
        &mut optimiser,
        |step, policy, optimiser| run.step(step, policy, optimiser, schedule.rate(step)),
        summary,
        |policy, log, ends| {
            write_result(input, tuning, policy, ends)?;
            write_report(args, log)
        },
    )?;
    write_result(input, tuning, &policy, true)?;
    write_report(args, &course.log)?;
    course.log.say(&memory::peak_in_words(&memory::of_tuning(args, &run.data.items, longest)?));
    if let Some(speed) = speed(&course.log) {
        course.log.say(&speed);
    }
    course.log.say(&format!("wrote {} and report.html", input.out.join(result_name(tuning)).display()));
    Ok(())
}

/// What the model is to say of each item, with the end of its turn. Items without a rationale, and those that are too long
/// for the model, are an error that lists them; with `--skip-bad` they leave the data, which the log says.
fn completions(args: &TuneArgs, data: &mut Dataset) -> anyhow::Result<Vec<Vec<u32>>> {
    let input = &args.input;
    let tokenizer = Tokenizer::open(&input.model)?;
    let end = tokenizer.end_of_turn()?;
    let positions = ModelConfig::read(&input.model)?.decoder.positions;
    let mut lengths = Lengths::open(&input.model)?;
    let mut completion = |item: &Item| -> anyhow::Result<Result<Vec<u32>, String>> {
        let Some(rationale) = &item.rationale else {
            return Ok(Err("has no rationale; tuning takes <think>…</think> with <answer>…</answer>".into()));
        };
        let mut tokens = tokenizer.encode(&format!("<think>{rationale}</think>\n<answer>{}</answer>", item.label))?;
        tokens.push(end);
        let needed = lengths.of(item)? + tokens.len();
        Ok(if needed > positions {
            Err(format!("takes {needed} positions with its prompt, the model was made for {positions}"))
        } else {
            Ok(tokens)
        })
    };
    let (mut sound, mut all, mut bad) = (Vec::new(), Vec::new(), Vec::new());
    let total = data.items.len() + data.problems.len();
    for item in std::mem::take(&mut data.items) {
        match completion(&item)? {
            Ok(tokens) => {
                sound.push(item);
                all.push(tokens);
            }
            Err(reason) => {
                bad.push(Problem { file: input.data.clone(), entry: item.line, kind: ProblemKind::Form, reason })
            }
        }
    }
    data.items = sound;
    if bad.is_empty() {
        return Ok(all);
    }
    if data.items.is_empty() {
        return Err(DatasetError::NothingLeft { path: input.data.clone(), problems: Problems(bad) }.into());
    }
    if !input.skip_bad {
        return Err(DatasetError::Bad { path: input.data.clone(), total, problems: Problems(bad) }.into());
    }
    Problems::warn(&bad, total);
    data.problems.extend(bad);
    Ok(all)
}

/// A thread's model and buffers.
struct Worker<D: Device> {
    prompts: Prompts<D>,
    buffers: PolicyBuffers,
}

/// What a step's losses add up to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sums {
    /// Negative log-probability, by the step's tokens.
    pub loss: f64,
    /// Entropy, over tokens.
    pub entropy: f64,
    /// Tokens that were the likeliest.
    pub right: usize,
    /// Tokens.
    pub tokens: usize,
}

impl Sums {
    /// Adds others.
    pub fn add(&mut self, other: &Sums) {
        self.loss += other.loss;
        self.entropy += other.entropy;
        self.right += other.right;
        self.tokens += other.tokens;
    }
}

/// Adds to `gradients` those of the mean negative log-probability of the completions' tokens, where the whole step has
/// `tokens` of them.
pub fn learn(
    policy: &Policy,
    sample: &Continued,
    tokens: usize,
    gradients: &mut [f32],
    buffers: &mut PolicyBuffers,
) -> anyhow::Result<Sums> {
    let factor = 1.0 / tokens.max(1) as f32;
    let all = policy.log_probabilities(policy.weights(), sample, buffers)?;
    let mut sums = Sums::default();
    for &(log_prob, entropy) in all.iter().flatten() {
        sums.loss -= f64::from(log_prob * factor);
        sums.entropy += f64::from(entropy);
        sums.tokens += 1;
    }
    let slopes: Vec<Vec<f32>> = all.iter().map(|tokens| vec![-factor; tokens.len()]).collect();
    sums.right = policy.backward(sample, &slopes, gradients, buffers)?;
    Ok(sums)
}

/// Everything that stays over a run's steps.
struct Run<'a, D: Device> {
    args: &'a TuneArgs,
    order: Order,
    data: Dataset,
    completions: Vec<Vec<u32>>,
    cache: FeatureCache,
    workers: Vec<Worker<D>>,
    gradients: Vec<Vec<f32>>,
}

impl<D: Device> Run<'_, D> {
    fn step(
        &mut self,
        step: u64,
        policy: &mut Policy,
        optimiser: &mut AdamW,
        rate: f32,
    ) -> anyhow::Result<Map<String, Value>> {
        let (batch, started) = (self.args.batch, Instant::now());
        let first = step * batch as u64;
        let items: Vec<usize> = (0..batch as u64).map(|i| self.order.at(first + i).1).collect();
        let (data, completions, cache) = (&self.data, &self.completions, &self.cache);
        let tokens: usize = items.iter().map(|&item| completions[item].len()).sum();
        let share = items.len().div_ceil(self.workers.len());
        let parts: anyhow::Result<Vec<Sums>> = {
            let policy = &*policy;
            let learn = |((worker, gradients), items): ((&mut Worker<D>, &mut Vec<f32>), &[usize])| {
                caught(|| {
                    let Worker { prompts, buffers } = worker;
                    let mut extractor = prompts.extractor(data.faces.clone())?;
                    let mut sums = Sums::default();
                    for &index in items {
                        let item = &data.items[index];
                        let prompt = prompts.parts(item, cache, &mut extractor).with_context(|| describe(item))?;
                        let positions = length(&prompt, policy.decoder.size.width) + completions[index].len();
                        let most = prompts.model.config().decoder.positions;
                        ensure!(positions <= most, "{}: {positions} positions of {most}", describe(item));
                        let sample = Continued { prompt, completions: vec![completions[index].clone()] };
                        let own = learn(policy, &sample, tokens, gradients, buffers).with_context(|| describe(item))?;
                        sums.add(&own);
                    }
                    Ok(sums)
                })
            };
            self.workers
                .par_iter_mut()
                .zip(self.gradients.par_iter_mut())
                .zip(items.par_chunks(share))
                .map(learn)
                .collect()
        };
        let mut sums = Sums::default();
        parts?.iter().for_each(|part| sums.add(part));
        ensure!(sums.loss.is_finite(), Diverged(format!("the loss is {}", sums.loss)));
        let norm = optimiser.step(policy.trained_mut(), &mut self.gradients, rate, self.args.tuning.max_norm);
        ensure!(norm.is_finite(), Diverged("the gradient is not finite".into()));
        let of_tokens = |sum: f64| sum / sums.tokens.max(1) as f64;
        let mut line = Map::new();
        for (key, value) in [
            ("loss", sums.loss),
            ("accuracy", of_tokens(sums.right as f64)),
            ("entropy", of_tokens(sums.entropy)),
            ("norm", f64::from(norm)),
            ("rate", f64::from(rate)),
            ("tokens", sums.tokens as f64),
            ("tokens_per_s", sums.tokens as f64 / started.elapsed().as_secs_f64()),
        ] {
            line.insert(key.into(), json!(value));
        }
        Ok(line)
    }
}

fn summary(line: &Map<String, Value>) -> String {
    let shown = |key: &str| line.get(key).and_then(Value::as_f64).unwrap_or(0.0);
    format!(
        "loss {:.4} accuracy {:.3} norm {:.3} {:.0} tokens/s",
        shown("loss"),
        shown("accuracy"),
        shown("norm"),
        shown("tokens_per_s")
    )
}

/// Speed over all steps, in words.
fn speed(log: &RunLog) -> Option<String> {
    Some(format!("Training {:.0} tokens/s, mean over the steps.", mean(log, "tokens_per_s")?))
}

fn write_report(args: &TuneArgs, log: &RunLog) -> anyhow::Result<()> {
    let words: Vec<String> =
        log.lines().last().map(|line| format!("Last step: {}.", summary(line))).into_iter().chain(speed(log)).collect();
    let title = format!("Supervised tuning of {}", args.input.model.display());
    report::write(&args.input.out, log, &title, &words, &CHARTS, "")
}
