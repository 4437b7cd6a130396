//! `candor-tools train grpo`: reward fine-tuning of a model's decoder. Each step draws groups of completions with the
//! runtime, pays them with the verifier, and moves the weights towards those that were better than their group.
//!
//! What a step draws follows from the seed and the step alone, so a run that is cut off goes on from its checkpoint to
//! the same result, bit for bit.

pub mod memory;
pub mod objective;
mod report;
mod samples;
pub mod settings;
#[cfg(test)]
mod tests;
pub mod worker;

use super::checkpoint;
use super::curves::RunLog;
use super::ops;
use super::optimiser::AdamW;
use super::policy::Policy;
use super::tower::{Order, stop_on_interrupt};
use crate::dataset::prepare::prepare;
use crate::dataset::{Dataset, FeatureCache};
use crate::files;
use crate::merge;
use crate::reward::conduct::Conduct;
use anyhow::{Context, bail, ensure};
use candor::manifest::Manifest;
use candor::model::adapter::WEIGHTS_FILE;
use objective::{Objective, advantages, is_flat};
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use settings::GrpoArgs;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use worker::{Counts, Group, Sums, Worker};

/// Time between two checkpoints.
const SAVE_EVERY: Duration = Duration::from_secs(60);
/// Steps between two lines on the screen.
const SAY_EVERY: u64 = 10;

/// Runs `candor-tools train grpo`.
pub fn run(args: &GrpoArgs) -> anyhow::Result<()> {
    args.check()?;
    ops::set_exact(args.f32);
    let manifest = Manifest::open(&args.model)?;
    let max_new_tokens = args.max_new_tokens(&manifest);
    let objective = args.objective(max_new_tokens);
    let verifier = args.verifier.clone().or(manifest.verifier_folder());
    if args.plan {
        return memory::print(args, max_new_tokens, verifier.as_deref());
    }
    let verifier = verifier.context("the model names no verifier; give one with --verifier")?;
    let mut data = Dataset::open(&args.data, args.media_root.as_deref(), args.skip_bad)?;
    std::fs::create_dir_all(&args.out).with_context(|| format!("{}", args.out.display()))?;
    let folder = args.features.clone().unwrap_or_else(|| args.out.join("features"));
    let cache = FeatureCache::open(&folder, &args.model)?;
    prepare(&mut data, &args.data, &cache, &args.model, args.threads, args.skip_bad)?;

    let mut policy = Policy::open(&args.model, args.lora()?, args.beta > 0.0, args.seed)?;
    let mut optimiser = AdamW::new(policy.plan(), args.weight_decay);
    let steps = args.steps.unwrap_or((args.passes * data.items.len() as f64 / args.prompts as f64).ceil() as u64);
    let updates = steps * args.iterations;
    let recipe = args.recipe(&manifest.identity()?, &files::sha256(&args.data)?, max_new_tokens, steps);
    let state = args.out.join("state.safetensors");
    checkpoint::resume(&state, &recipe, policy.trained_mut(), &mut optimiser)?;
    let done = optimiser.steps / args.iterations;

    let mut run = Run {
        args,
        objective,
        max_new_tokens,
        order: Order::new(args.seed, data.items.len()),
        workers: (0..args.threads).map(|_| Worker::open(args, &manifest, &verifier)).collect::<anyhow::Result<_>>()?,
        gradients: vec![vec![0.0; policy.plan().len()]; args.threads],
        data,
        cache,
    };
    let mut log = RunLog::open(&args.out, done, steps)?;
    log.say(&format!(
        "{} trained parameters, {} prompts, {steps} steps, {done} done",
        policy.plan().len(),
        run.data.items.len()
    ));
    if done == 0 {
        samples::write(&mut run, &policy, &args.out.join(samples::BEFORE))?;
    }
    let stop = stop_on_interrupt();
    let schedule = args.schedule(updates);
    let mut saved = Instant::now();
    let mut step = done;
    while step < steps {
        let line = run.step(step, &mut policy, &mut optimiser, |update| schedule.rate(update))?;
        step += 1;
        log.show(step, summary(&line));
        if step.is_multiple_of(SAY_EVERY) || step == 1 || step == steps {
            log.say(&format!("step {step}/{steps} {}", summary(&line)));
        }
        log.write(step, Value::Object(line))?;
        let cut = stop.load(Ordering::Relaxed) || args.stop_after.is_some_and(|stop| step >= stop);
        if saved.elapsed() > SAVE_EVERY || cut || step == steps {
            checkpoint::save(&state, &recipe, policy.trained(), &optimiser)?;
            write_result(args, &policy)?;
            report::write(&args.out, &log, args)?;
            saved = Instant::now();
        }
        if cut && step < steps {
            bail!("stopped at step {step} of {steps}; the same command goes on from there");
        }
    }
    write_result(args, &policy)?;
    samples::write(&mut run, &policy, &args.out.join(samples::AFTER))?;
    let planned: usize =
        memory::parts(&memory::shapes(args, max_new_tokens, Some(&verifier))?).iter().map(|p| p.1).sum();
    if let Some(peak) = memory::peak() {
        log.say(&format!("peak memory {} MB, planned {} MB", peak / 1_000_000, planned / 1_000_000));
    }
    report::write(&args.out, &log, args)?;
    log.say(&format!(
        "wrote {} and report.html",
        args.out.join(if args.full { "model" } else { WEIGHTS_FILE }).display()
    ));
    Ok(())
}

/// Writes what has been trained: a PEFT folder, or with `--full` a model folder.
fn write_result(args: &GrpoArgs, policy: &Policy) -> anyhow::Result<()> {
    if !args.full {
        return policy.write_factors(&args.out, &args.model.display().to_string());
    }
    let trained = policy.tensors().map(|(name, _, values)| (name.to_owned(), values.to_vec())).collect();
    merge::write(&args.model, &args.out.join("model"), trained).map(|_| ())
}

/// Everything that stays over a run's steps.
struct Run<'a> {
    args: &'a GrpoArgs,
    objective: Objective,
    max_new_tokens: usize,
    order: Order,
    data: Dataset,
    cache: FeatureCache,
    workers: Vec<Worker>,
    gradients: Vec<Vec<f32>>,
}

impl Run<'_> {
    /// Rollouts of items with the policy as it is, a share on each thread, in the order of the items.
    fn roll_out(&mut self, policy: &Policy, items: &[usize], seed: u64) -> anyhow::Result<Vec<Vec<Group>>> {
        let adapter = policy.adapter()?;
        let (args, data, cache, max_new_tokens) = (self.args, &self.data, &self.cache, self.max_new_tokens);
        let share = items.len().div_ceil(self.workers.len());
        let draw = |(worker, items): (&mut Worker, &[usize])| {
            worker.adapt(&adapter)?;
            let seed = |item: usize, one: usize| mixed(seed, (item * args.group + one) as u64);
            worker.roll_out(args, max_new_tokens, data, items, cache, seed)
        };
        self.workers.par_iter_mut().zip(items.par_chunks(share)).map(draw).collect()
    }

    /// One step: rollouts, rewards, and `iterations` updates. Returns what there is to log.
    fn step(
        &mut self,
        step: u64,
        policy: &mut Policy,
        optimiser: &mut AdamW,
        rate: impl Fn(u64) -> f32,
    ) -> anyhow::Result<Map<String, Value>> {
        let (args, objective) = (self.args, self.objective);
        let first = step * args.prompts as u64;
        let items: Vec<usize> = (0..args.prompts as u64).map(|i| self.order.at(first + i).1).collect();
        let started = Instant::now();
        let mut shares = self.roll_out(policy, &items, mixed(args.seed, step + 1))?;
        let drawing = started.elapsed().as_secs_f64();

        let totals: Vec<Vec<f32>> = shares.iter().flatten().map(|group| group.totals.clone()).collect();
        let weighed = advantages(&totals, args.scale);
        let counted = |group: &Group| !(args.drop_flat && is_flat(&group.totals));
        let counts = Counts::of(shares.iter().flatten().filter(|group| counted(group)), &objective);
        let mut line = self.measure(&shares, &totals);
        let learning = Instant::now();
        let (mut sums, mut norm) = (Sums::default(), 0.0);
        for _ in 0..args.iterations {
            sums = Sums::default();
            if counts.completions > 0 {
                let starts: Vec<usize> = shares
                    .iter()
                    .scan(0, |start, share| {
                        let own = *start;
                        *start += share.len();
                        Some(own)
                    })
                    .collect();
                let policy = &*policy;
                type Part<'a> = (((&'a mut Worker, &'a mut Vec<f32>), &'a mut Vec<Group>), usize);
                let learn = |(((worker, gradients), share), start): Part<'_>| {
                    let mut sums = Sums::default();
                    for (index, group) in share.iter_mut().enumerate().filter(|(_, group)| counted(group)) {
                        let advantages = &weighed[start + index];
                        sums.add(&worker.learn(policy, &objective, group, advantages, counts, gradients)?);
                    }
                    Ok(sums)
                };
                let parts: anyhow::Result<Vec<Sums>> = self
                    .workers
                    .par_iter_mut()
                    .zip(self.gradients.par_iter_mut())
                    .zip(shares.par_iter_mut())
                    .zip(starts)
                    .map(learn)
                    .collect();
                parts?.iter().for_each(|part| sums.add(part));
            }
            ensure!(sums.loss.is_finite(), "step {}: the loss is {}; a lower --rate may help", step + 1, sums.loss);
            let rate = rate(optimiser.steps);
            norm = optimiser.step(policy.trained_mut(), &mut self.gradients, rate, args.max_norm);
            ensure!(norm.is_finite(), "step {}: the gradient is not finite; a lower --rate may help", step + 1);
            line.insert("rate".into(), json!(rate));
        }
        let learning = learning.elapsed().as_secs_f64();
        let drawn: usize = shares.iter().flatten().flat_map(|group| &group.rollouts).map(|one| one.tokens.len()).sum();
        let of_tokens = |sum: f64| sum / sums.tokens.max(1) as f64;
        for (key, value) in [
            ("loss", sums.loss),
            ("norm", f64::from(norm)),
            ("kl", of_tokens(sums.divergence)),
            ("entropy", of_tokens(sums.entropy)),
            ("clipped", of_tokens(sums.clipped as f64)),
            ("log_prob_difference", of_tokens(sums.mismatch)),
            ("log_prob_difference_max", sums.worst_mismatch),
            ("importance", of_tokens(sums.importance)),
            ("rollout_tokens_per_s", drawn as f64 / drawing),
            ("train_tokens_per_s", (sums.rows as u64 * args.iterations) as f64 / learning),
        ] {
            line.insert(key.into(), json!(value));
        }
        Ok(line)
    }

    /// What the rollouts of a step say.
    fn measure(&self, shares: &[Vec<Group>], totals: &[Vec<f32>]) -> Map<String, Value> {
        let groups: Vec<&Group> = shares.iter().flatten().collect();
        let rollouts: Vec<_> = groups.iter().flat_map(|group| &group.rollouts).collect();
        let n = rollouts.len().max(1) as f64;
        let rewards = || groups.iter().flat_map(|group| &group.rewards);
        let mean = |sum: f64| json!(sum / n);
        let grounded: Vec<f64> = rewards().filter_map(|reward| reward.groundedness).map(f64::from).collect();
        let total = |value: f32| f64::from(value);
        let mut line = Map::new();
        line.insert("reward".into(), mean(totals.iter().flatten().copied().map(total).sum()));
        line.insert("format".into(), mean(rewards().map(|reward| total(reward.format)).sum()));
        line.insert("accuracy".into(), mean(rewards().map(|reward| total(reward.accuracy)).sum()));
        line.insert("explanation".into(), mean(rewards().map(|reward| total(reward.explanation)).sum()));
        if !grounded.is_empty() {
            line.insert("groundedness".into(), json!(grounded.iter().sum::<f64>() / grounded.len() as f64));
        }
        let flat = totals.iter().filter(|group| is_flat(group)).count();
        line.insert("flat_groups".into(), json!(flat as f64 / totals.len().max(1) as f64));
        line.insert("length".into(), mean(rollouts.iter().map(|one| one.tokens.len() as f64).sum()));
        let truncated = rollouts.iter().filter(|one| !one.finished).count();
        line.insert("truncated".into(), mean(truncated as f64));
        let completions = groups.iter().flat_map(|group| {
            let cues = self.data.cues(&self.data.items[group.item]);
            group.texts.iter().zip(&group.rewards).map(move |(text, reward)| (text.as_str(), reward, cues))
        });
        if let Ok(Value::Object(conduct)) = serde_json::to_value(Conduct::measure(completions)) {
            line.extend(conduct);
        }
        line
    }
}

fn summary(line: &Map<String, Value>) -> String {
    let part =
        |(key, short): (&str, &str)| line.get(key).and_then(Value::as_f64).map(|value| format!("{short} {value:.3}"));
    let parts = [
        ("reward", "reward"),
        ("format", "format"),
        ("accuracy", "accuracy"),
        ("explanation", "explanation"),
        ("kl", "KL"),
        ("entropy", "entropy"),
        ("length", "length"),
        ("flat_groups", "flat"),
    ];
    let speed = |key: &str| line.get(key).and_then(Value::as_f64).unwrap_or(0.0);
    let (drawn, trained) = (speed("rollout_tokens_per_s"), speed("train_tokens_per_s"));
    let text: Vec<String> = parts.into_iter().filter_map(part).collect();
    format!("{} {drawn:.0}+{trained:.0} tokens/s", text.join(" "))
}

/// A seed from a seed and a number (SplitMix64's finaliser over both).
fn mixed(seed: u64, number: u64) -> u64 {
    let mut bits = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    bits = (bits ^ bits >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ bits >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ bits >> 31
}

/// Whether a folder holds an adapter of a run.
pub fn has_adapter(folder: &Path) -> bool {
    folder.join(WEIGHTS_FILE).is_file()
}
