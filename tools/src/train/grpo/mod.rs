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

use super::ops;
use super::optimiser::AdamW;
use super::policy::Policy;
use super::tower::Order;
use super::tuning::course::{Course, Described, Diverged, RunLock};
use super::tuning::{caught, result_name, write_result};
use crate::dataset::prepare::prepare;
use crate::dataset::{Dataset, FeatureCache};
use crate::files;
use crate::reward::conduct::Conduct;
use anyhow::{Context, ensure};
use candor::manifest::Manifest;
use candor::model::adapter::WEIGHTS_FILE;
use candor::with_device;
use candor_kernels::Device;
use objective::{Objective, advantages, is_flat};
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use settings::GrpoArgs;
use std::path::Path;
use std::time::Instant;
use worker::{Counts, Group, Sums, Worker};

/// Runs `candor-tools train grpo`.
pub fn run(args: &GrpoArgs) -> anyhow::Result<()> {
    args.check()?;
    let (input, tuning) = (&args.input, &args.tuning);
    ops::set_exact(tuning.f32);
    let manifest = Manifest::open(&input.model)?;
    let max_new_tokens = args.max_new_tokens(&manifest);
    let verifier = args.verifier.clone().or(manifest.verifier_folder());
    let data = Dataset::open(&input.data, input.media_root.as_deref(), input.skip_bad)?;
    if args.plan {
        return memory::print(&memory::of_rewards(args, &data.items, max_new_tokens, verifier.as_deref())?);
    }
    let verifier = verifier.context("the model names no verifier; give one with --verifier")?;
    let _lock = RunLock::take(&input.out)?;
    let (chosen, devices) = tuning.open_devices()?;
    with_device!(chosen, device => run_on(&device, &devices, args, data, &manifest, &verifier))
}

fn run_on<D: Device>(
    device: &D,
    devices: &str,
    args: &GrpoArgs,
    mut data: Dataset,
    manifest: &Manifest,
    verifier: &Path,
) -> anyhow::Result<()> {
    let (input, tuning) = (&args.input, &args.tuning);
    let max_new_tokens = args.max_new_tokens(manifest);
    // Before the clips are looked at, which takes long.
    let workers: Vec<Worker<D>> = (0..tuning.threads)
        .map(|_| Worker::open(args, manifest, verifier, device.clone()))
        .collect::<anyhow::Result<_>>()?;
    let cache = FeatureCache::open(&input.features(), &input.model)?;
    prepare(&mut data, &input.data, &cache, &input.model, tuning.threads, input.skip_bad, device)?;

    let mut policy = Policy::open(&input.model, tuning.lora()?, args.beta > 0.0, tuning.seed)?;
    policy.decoder.set_temperature(args.temperature);
    let mut optimiser = AdamW::new(policy.plan(), tuning.weight_decay);
    let steps = args.steps(data.items.len());
    let about = json!({
        "command": "train grpo",
        "model": input.model,
        "verifier": verifier,
        "verifier_sha256": Manifest::open(verifier)?.identity()?,
        "data": input.data,
        "entries": data.items.len(),
    });
    let described = Described {
        recipe: args.recipe(&manifest.identity()?, &files::sha256(&input.data)?, max_new_tokens, steps) + devices,
        about,
        steps,
        updates: args.iterations,
    };
    let mut course = Course::open(&input.out, tuning, described, &mut policy, &mut optimiser)?;
    course.log.say(&format!(
        "{} trained parameters, {} prompts, {steps} steps, {} done",
        policy.plan().len(),
        data.items.len(),
        course.done
    ));
    let mut run = Run {
        args,
        objective: args.objective(max_new_tokens),
        max_new_tokens,
        order: Order::new(tuning.seed, data.items.len()),
        workers,
        gradients: vec![vec![0.0; policy.plan().len()]; tuning.threads],
        data,
        cache,
    };
    if course.done == 0 {
        samples::write(&mut run, &policy, &input.out.join(samples::BEFORE))?;
    }
    let schedule = args.schedule(steps * args.iterations);
    course.go(
        &mut policy,
        &mut optimiser,
        |step, policy, optimiser| run.step(step, policy, optimiser, |update| schedule.rate(update)),
        summary,
        |policy, log, ends| {
            write_result(input, tuning, policy, ends)?;
            report::write(args, log)
        },
    )?;
    write_result(input, tuning, &policy, true)?;
    samples::write(&mut run, &policy, &input.out.join(samples::AFTER))?;
    report::write(args, &course.log)?;
    let shapes = memory::of_rewards(args, &run.data.items, max_new_tokens, Some(verifier))?;
    course.log.say(&memory::peak_in_words(&shapes));
    if let Some(speeds) = report::speeds(&course.log) {
        course.log.say(&speeds);
    }
    course.log.say(&format!("wrote {} and report.html", input.out.join(result_name(tuning)).display()));
    Ok(())
}

/// Everything that stays over a run's steps.
struct Run<'a, D: Device> {
    args: &'a GrpoArgs,
    objective: Objective,
    max_new_tokens: usize,
    order: Order,
    data: Dataset,
    cache: FeatureCache,
    workers: Vec<Worker<D>>,
    gradients: Vec<Vec<f32>>,
}

impl<D: Device> Run<'_, D> {
    /// Rollouts of items with the policy as it is, a share on each thread, in the order of the items.
    fn roll_out(&mut self, policy: &Policy, items: &[usize], seed: u64) -> anyhow::Result<Vec<Vec<Group>>> {
        let adapter = policy.adapter()?;
        let (args, data, cache, max_new_tokens) = (self.args, &self.data, &self.cache, self.max_new_tokens);
        let share = items.len().div_ceil(self.workers.len());
        let draw = |(worker, items): (&mut Worker<D>, &[usize])| {
            caught(|| {
                worker.adapt(&adapter)?;
                let seed = |item: usize, one: usize| mixed(seed, (item * args.group + one) as u64);
                worker.roll_out(args, max_new_tokens, data, items, cache, seed)
            })
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
        let mut shares = self.roll_out(policy, &items, mixed(args.tuning.seed, step + 1))?;
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
                type Part<'a, D> = (((&'a mut Worker<D>, &'a mut Vec<f32>), &'a mut Vec<Group>), usize);
                let learn = |(((worker, gradients), share), start): Part<'_, D>| {
                    caught(|| {
                        let mut sums = Sums::default();
                        for (index, group) in share.iter_mut().enumerate().filter(|(_, group)| counted(group)) {
                            let advantages = &weighed[start + index];
                            sums.add(&worker.learn(policy, &objective, group, advantages, counts, gradients)?);
                        }
                        Ok(sums)
                    })
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
            ensure!(sums.loss.is_finite(), Diverged(format!("the loss is {}", sums.loss)));
            let rate = rate(optimiser.steps);
            norm = optimiser.step(policy.trained_mut(), &mut self.gradients, rate, args.tuning.max_norm);
            ensure!(norm.is_finite(), Diverged("the gradient is not finite".into()));
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
