//! Rollouts on the CUDA device, on the stand-in driver, token for token those of the processor: with an adapter in single
//! precision and without, beside weights of every type.

use std::path::Path;

use candor::model::{Adapter, Model, Piece, Session};
use candor::text::rollout::{Rollout, RolloutError, RolloutSettings, roll_out};
use candor_kernels::Device;

use super::stand_in;
use super::weights::{Case, uniform, write_folder};

const RANK: usize = 3;

/// Factors beside every projection of every layer.
fn adapter<D: Device>(model: &Model<D>) -> Adapter {
    let decoder = &model.config().decoder;
    let (queries, keys) = (decoder.heads * decoder.head_dim, decoder.key_heads * decoder.head_dim);
    let mut adapter = Adapter::in_memory("a test");
    for layer in 0..decoder.layers {
        for (module, outputs, inputs) in [
            ("self_attn.q_proj", queries, decoder.width),
            ("self_attn.k_proj", keys, decoder.width),
            ("self_attn.v_proj", keys, decoder.width),
            ("self_attn.o_proj", decoder.width, queries),
            ("mlp.gate_proj", decoder.mlp, decoder.width),
            ("mlp.up_proj", decoder.mlp, decoder.width),
            ("mlp.down_proj", decoder.width, decoder.mlp),
        ] {
            let module = format!("model.layers.{layer}.{module}");
            let values = |half: &str, count| -> Vec<f32> {
                uniform(&format!("{module} {half}"), count).map(|value| value as f32 * 0.3).collect()
            };
            let (a, b) = (values("a", RANK * inputs), values("b", outputs * RANK));
            adapter.insert(&module, RANK, &a, &b, 1.0).expect("factors of the right sizes");
        }
    }
    adapter
}

/// Two prompts, four continuations of each.
fn rollouts<D: Device>(device: D, folder: &Path, with_adapter: bool, temperature: f32) -> Vec<Vec<Rollout>> {
    let mut model = Model::open(folder, device).expect("the model opens");
    if with_adapter {
        let adapter = adapter(&model);
        model.adapt(Some(&adapter)).expect("it fits");
    }
    let settings = RolloutSettings { group: 4, max_new_tokens: 10, temperature, end_of_turn: 5 };
    let (mut session, mut batch) = (model.session(40).expect("a session"), model.batch(8, 40).expect("slots"));
    let prompts = [vec![3, 17, 60, 41, 8], (0..23).map(|i| i * 4 + 1).collect::<Vec<u32>>()];
    let read = |session: &mut Session<D>, prompt: usize| -> Result<(), RolloutError> {
        session.start(&[Piece::Tokens(&prompts[prompt])])?;
        Ok(())
    };
    roll_out(settings, &mut session, &mut batch, prompts.len(), read, |prompt, one| (prompt * 10 + one) as u64)
        .expect("they are drawn")
}

fn check(variant: &str, name: &'static str) {
    let case = Case::load(name);
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_folder(folder.path(), &case.config(variant), &case.tensors(variant));
    let mut seen = Vec::new();
    for with_adapter in [false, true] {
        // So cold that always the likeliest token is drawn, and warm.
        for temperature in [1e-4, 1.0] {
            let ours = rollouts(stand_in::device().exact(), folder.path(), with_adapter, temperature);
            let expected = rollouts(super::device(), folder.path(), with_adapter, temperature);
            let about = format!("{name} {variant} adapter {with_adapter} temperature {temperature}");
            let tokens = |all: &[Vec<Rollout>]| -> Vec<(Vec<u32>, bool)> {
                all.iter().flatten().map(|one| (one.tokens.clone(), one.finished)).collect()
            };
            assert_eq!(tokens(&ours), tokens(&expected), "{about}");
            let log_probs = |all: &[Vec<Rollout>]| all.iter().flatten().flat_map(|one| one.log_probs.clone()).collect();
            let (ours, theirs): (Vec<f32>, Vec<f32>) = (log_probs(&ours), log_probs(&expected));
            // Cold, what logits differ by is divided by the temperature too.
            let close = 1e-3 / temperature.min(1.0);
            assert!(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < close), "{about}: {ours:?} {theirs:?}");
            let group: Vec<&Vec<u32>> = expected[0].iter().map(|one| &one.tokens).collect();
            assert_eq!(group.iter().all(|one| *one == group[0]), temperature < 0.1, "{about}: {group:?}");
            seen.push(tokens(&expected));
        }
    }
    assert!(seen[0] != seen[2] && seen[1] != seen[3], "the adapter changes what is said");
}

#[test]
fn beside_f32() {
    check("untied.f32", "even");
}

#[test]
fn beside_other_types() {
    let case = Case::load("even");
    for variant in case.variants().iter().filter(|variant| !variant.ends_with(".f32")) {
        check(variant, "even");
    }
}

#[test]
fn with_one_key_head() {
    check("untied.f32", "same");
}
