//! Steps of reward fine-tuning and of supervised tuning against TRL, PEFT and transformers: the same tiny model, data
//! and rollouts must give the same losses, gradients and weights (tests/fixtures/make_grpo.py).
#![allow(clippy::unwrap_used)]

use super::objective::{Normalisation, Objective, Scale, advantages};
use super::worker::{Counts, Group, Sums};
use crate::train::decoder::DecoderSize;
use crate::train::lora::{LoraSettings, Module};
use crate::train::optimiser::AdamW;
use crate::train::policy::{Continued, Policy, PolicyBuffers, PromptPart};
use crate::train::tune;
use candor::text::rollout::Rollout;
use candor::weights::Checkpoint;
use serde_json::Value;
use std::path::PathBuf;

/// Largest difference from the other implementation.
const TOLERANCE: f32 = 1e-4;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/grpo")
}

fn json(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(folder().join(name)).unwrap()).unwrap()
}

fn number(value: &Value) -> f32 {
    value.as_f64().unwrap() as f32
}

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(number).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn close(what: &str, ours: f32, theirs: f32) {
    assert!((ours - theirs).abs() <= TOLERANCE * (1.0 + theirs.abs()), "{what}: {ours}, expected {theirs}");
}

fn all_close(what: &str, ours: &[f32], theirs: &[f32]) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    ours.iter().zip(theirs).enumerate().for_each(|(i, (a, b))| close(&format!("{what} [{i}]"), *a, *b));
}

/// A case's model, optimiser and recorded tensors.
struct Case {
    policy: Policy,
    optimiser: AdamW,
    tensors: Checkpoint,
    settings: Value,
    sample: usize,
}

impl Case {
    fn open(name: &str, case: &Value, sample: usize) -> Case {
        let (settings, config) = (&case["settings"], json("config.json"));
        let size = |key: &str| config[key].as_u64().unwrap() as usize;
        let decoder = DecoderSize {
            width: size("hidden_size"),
            layers: size("num_hidden_layers"),
            heads: size("num_attention_heads"),
            key_heads: size("num_key_value_heads"),
            head_dim: size("hidden_size") / size("num_attention_heads"),
            hidden: size("intermediate_size"),
            vocabulary: size("vocab_size"),
            theta: number(&config["rope_parameters"]["rope_theta"]),
            eps: number(&config["rms_norm_eps"]),
            tied: settings["tied"].as_bool().unwrap(),
        };
        let lora = settings["lora"].as_object().map(|lora| LoraSettings {
            rank: lora["r"].as_u64().unwrap() as usize,
            alpha: lora["lora_alpha"].as_f64().unwrap(),
            stabilised: lora["use_rslora"].as_bool().unwrap(),
            modules: lora["target_modules"]
                .as_array()
                .unwrap()
                .iter()
                .map(|name| Module::from_name(name.as_str().unwrap()).unwrap())
                .collect(),
        });
        let weights = Checkpoint::open(&folder()).unwrap();
        let tensors = Checkpoint::open_file(&folder().join(format!("{name}.safetensors"))).unwrap();
        let has_factors = lora.is_some();
        let mut policy = Policy::read(decoder, 64, &weights, lora, true, 1).unwrap();
        if has_factors {
            let plan = policy.plan().clone();
            for entry in plan.entries() {
                let initial = tensors.tensor(&format!("initial/{}", entry.name)).unwrap();
                assert_eq!(initial.shape(), entry.shape);
                policy.trained_mut()[entry.range.clone()].copy_from_slice(&initial.to_f32());
            }
        }
        let decayed: Vec<&str> =
            case["decayed"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
        for entry in policy.plan().entries() {
            assert_eq!(entry.treatment.decay, decayed.contains(&entry.name.as_str()), "decay of {}", entry.name);
        }
        let optimiser = AdamW::new(policy.plan(), number(&settings["weight_decay"]));
        Case { policy, optimiser, tensors, settings: settings.clone(), sample }
    }

    fn recorded(&self, name: &str) -> Option<Vec<f32>> {
        self.tensors.contains(name).then(|| self.tensors.tensor(name).unwrap().to_f32())
    }

    /// Updates the weights and holds them against the record.
    fn update(&mut self, name: &str, index: usize, step: &Value, gradients: Vec<f32>) {
        let rate = number(&step["learning_rate"]);
        let clip = number(&self.settings["max_grad_norm"]);
        let norm = self.optimiser.step(self.policy.trained_mut(), &mut [gradients], rate, clip);
        close(&format!("{name} step {index} norm"), norm, number(&step["gradient_norm"]));
        let plan = self.policy.plan();
        let mut entries: Vec<_> = plan.entries().iter().collect();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        let trained = self.policy.trained();
        let sampled: Vec<f32> = entries
            .iter()
            .flat_map(|entry| trained[entry.range.clone()].iter().step_by(self.sample))
            .copied()
            .collect();
        all_close(&format!("{name} after step {index}"), &sampled, &self.recorded(&format!("after.{index}")).unwrap());
        if index == self.settings["max_steps"].as_u64().unwrap() as usize {
            for entry in entries {
                if let Some(whole) = self.recorded(&format!("after/{}", entry.name)) {
                    all_close(&entry.name, &trained[entry.range.clone()], &whole);
                }
            }
        }
    }
}

fn objective(settings: &Value) -> (Objective, bool) {
    let loss_type = settings["loss_type"].as_str().unwrap();
    let objective = Objective {
        clip_low: number(&settings["epsilon"]),
        clip_high: number(&settings["epsilon_high"]),
        beta: number(&settings["beta"]),
        scale: match settings["scale_rewards"].as_str().unwrap() {
            "group" => Scale::Group,
            "batch" => Scale::Batch,
            _ => Scale::None,
        },
        normalisation: match loss_type {
            "grpo" => Normalisation::Completion,
            "dr_grpo" => Normalisation::Constant,
            _ => Normalisation::Token,
        },
        drop_flat: false,
        drop_truncated: settings["mask_truncated_completions"].as_bool().unwrap(),
        importance_cap: settings.get("vllm_importance_sampling_clip_max").map_or(0.0, number),
        max_new_tokens: settings["max_completion_length"].as_u64().unwrap() as usize,
    };
    // "bnpo" takes the mean over each micro-batch's tokens, "dapo" over the step's.
    (objective, loss_type == "bnpo")
}

/// One optimiser step of a case: its gradients and sums.
fn step(
    case: &Case,
    (objective, by_micro_batch): (Objective, bool),
    step: &Value,
    groups: &mut [Group],
    weighed: &[f32],
) -> (Vec<f32>, Sums) {
    let mut gradients = vec![0.0; case.policy.plan().len()];
    let mut buffers = PolicyBuffers::default();
    let mut sums = Sums::default();
    let all = Counts::of(groups.iter(), &objective);
    let micro_batches = step["micro"].as_array().unwrap();
    for micro in micro_batches {
        let rows: Vec<usize> = ids(&micro["rows"]).into_iter().map(|row| row as usize).collect();
        let mut counts = all;
        if by_micro_batch {
            counts.tokens = Counts::of(rows.iter().map(|&row| &groups[row]), &objective).tokens * micro_batches.len();
        }
        let mut loss = 0.0;
        for row in rows {
            let own = &weighed[row..=row];
            let part = groups[row].learn(&case.policy, &objective, own, counts, &mut gradients, &mut buffers).unwrap();
            loss += part.loss;
            sums.add(&part);
        }
        close("loss of a micro-batch", loss as f32, number(&micro["loss"]));
    }
    (gradients, sums)
}

#[test]
fn steps_equal_those_of_trl() {
    let cases = json("cases.json");
    let (sample, end) = (cases["sample"].as_u64().unwrap() as usize, cases["eos"].as_u64().unwrap() as u32);
    let mut seen = 0;
    for (name, recorded) in cases["grpo"].as_object().unwrap() {
        if recorded["settings"]["use_bias_correction_kl"].as_bool().unwrap() {
            continue; // the divergence weighed by the ratio, which is another objective
        }
        let mut case = Case::open(name, recorded, sample);
        let (objective, by_micro_batch) = objective(&case.settings);
        let mut groups: Vec<Group> = Vec::new();
        let (mut generation, mut weighed) = (u64::MAX, Vec::new());
        for (index, own) in recorded["steps"].as_array().unwrap().iter().enumerate() {
            let index = index + 1;
            let tokens = |what: &str| case.recorded(&format!("step.{index}.{what}"));
            if own["generation"].as_u64().unwrap() != generation {
                generation = own["generation"].as_u64().unwrap();
                let rollouts = &cases["rollouts"][generation as usize];
                let rewards = numbers(&rollouts["rewards"]);
                let rewards: Vec<Vec<f32>> = rewards.chunks(4).map(<[f32]>::to_vec).collect();
                weighed = advantages(&rewards, objective.scale).concat();
                let mut drawn = tokens("sampling").map(Vec::into_iter);
                let prompts = rollouts["prompts"].as_array().unwrap().iter();
                groups = prompts
                    .zip(rollouts["completions"].as_array().unwrap())
                    .map(|(prompt, completion)| {
                        let completion = ids(completion);
                        let log_probs = match &mut drawn {
                            Some(drawn) => drawn.by_ref().take(completion.len()).collect(),
                            None => vec![0.0; completion.len()],
                        };
                        let finished = completion.last() == Some(&end);
                        let rollout = Rollout { tokens: completion, log_probs, finished };
                        Group::given(vec![PromptPart::Tokens(ids(prompt))], vec![rollout], vec![])
                    })
                    .collect();
            }
            all_close(&format!("{name} advantages"), &weighed, &tokens("advantages").unwrap());
            let (gradients, sums) = step(&case, (objective, by_micro_batch), own, &mut groups, &weighed);
            close(&format!("{name} step {index} loss"), sums.loss as f32, number(&own["loss"]));
            case.update(name, index, own, gradients);
        }
        seen += 1;
    }
    assert!(seen >= 8, "only {seen} cases");
}

/// The completions of a prompt as branches of one sequence give what they give one by one.
#[test]
fn a_group_at_once_equals_its_completions_alone() {
    let cases = json("cases.json");
    let recorded = &cases["grpo"]["lora"];
    let case = Case::open("lora", recorded, 17);
    let objective = objective(&case.settings).0;
    let rollouts = &cases["rollouts"][0];
    let prompt = || vec![PromptPart::Tokens(ids(&rollouts["prompts"][0]))];
    let rollout = |row: usize| {
        let tokens = ids(&rollouts["completions"][row]);
        Rollout { log_probs: vec![0.0; tokens.len()], tokens, finished: true }
    };
    let weighed = [1.0, -0.5, 0.25, -1.0];
    let learn = |groups: &mut [Group], buffers: &mut PolicyBuffers| {
        let counts = Counts { completions: 4, tokens: 20 };
        let mut gradients = vec![0.0; case.policy.plan().len()];
        let mut first = 0;
        for group in groups {
            let own = &weighed[first..first + group.rollouts.len()];
            first += own.len();
            group.learn(&case.policy, &objective, own, counts, &mut gradients, buffers).unwrap();
        }
        gradients
    };
    let mut alone: Vec<Group> = (0..4).map(|row| Group::given(prompt(), vec![rollout(row)], vec![])).collect();
    let alone = learn(&mut alone, &mut PolicyBuffers::default());
    for checkpointing in [false, true] {
        let mut buffers = PolicyBuffers::default();
        buffers.decoder.checkpointing = checkpointing;
        let together = learn(&mut [Group::given(prompt(), (0..4).map(rollout).collect(), vec![])], &mut buffers);
        for (a, b) in together.iter().zip(&alone) {
            assert!((a - b).abs() < 1e-6 + 1e-4 * b.abs(), "{a} {b}");
        }
    }
}

#[test]
fn supervised_steps_equal_those_of_transformers() {
    let cases = json("cases.json");
    let sample = cases["sample"].as_u64().unwrap() as usize;
    for (name, recorded) in cases["sft"].as_object().unwrap() {
        let mut case = Case::open(name, recorded, sample);
        for (index, own) in recorded["steps"].as_array().unwrap().iter().enumerate() {
            let rows = own["micro"].as_array().unwrap().iter().flat_map(|micro| ids(&micro["rows"]));
            let samples: Vec<Continued> = rows
                .map(|row| {
                    let batch = &cases["batches"][row as usize];
                    let prompt = vec![PromptPart::Tokens(ids(&batch["prompt"]))];
                    Continued { prompt, completions: vec![ids(&batch["completion"])] }
                })
                .collect();
            let tokens: usize = samples.iter().map(|sample| sample.completions[0].len()).sum();
            let mut gradients = vec![0.0; case.policy.plan().len()];
            let mut buffers = PolicyBuffers::default();
            let mut sums = tune::Sums::default();
            for sample in &samples {
                sums.add(&tune::learn(&case.policy, sample, tokens, &mut gradients, &mut buffers).unwrap());
            }
            assert_eq!(sums.tokens, tokens);
            let loss = sums.loss as f32;
            close(&format!("{name} step {} loss", index + 1), loss, number(&own["loss"]));
            case.update(name, index + 1, own, gradients);
        }
    }
}
