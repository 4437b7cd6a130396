//! Where weights may lie, and what a wrong one is called.

use std::path::Path;

use candor::model::trace::trace_model;
use candor::model::{Model, ModelError};
use candor::weights::{Checkpoint, WeightsError};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::weights::{Case, Stored, Tensors, write_folder, write_tensors};
use super::{check, device, trace};

const VISION: &str = "model.vision_tower.vision_tower.vision_model.";
const AUDIO: &str = "model.audio_tower.audio_tower.encoder.";
const BERT: &str = "model.bert_model.";
const VARIANT: &str = "untied.f32";

fn temporary() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// Takes the tensors under a prefix out, without it.
fn split(tensors: &mut Tensors, prefix: &str) -> Tensors {
    let taken: Vec<String> = tensors.keys().filter(|n| n.starts_with(prefix)).cloned().collect();
    taken.into_iter().map(|n| (n[prefix.len()..].to_owned(), tensors.remove(&n).expect("it was listed"))).collect()
}

fn renamed(tensors: Tensors, rename: impl Fn(&str) -> String) -> Tensors {
    tensors.into_iter().map(|(name, t)| (rename(&name), t)).collect()
}

/// Writes the towers as their original checkpoints: whole models, with halves that are of no use here.
fn write_towers(folder: &Path, config: &Value, [vision, audio, bert]: [Tensors; 3]) {
    let unused = Stored::f32(&[1], &[0.5]);
    let mut siglip = renamed(vision, |n| format!("vision_model.{n}"));
    siglip.insert("text_model.final_layer_norm.bias".into(), unused.clone());
    siglip.insert("logit_scale".into(), unused.clone());
    let siglip_config = json!({"model_type": "siglip", "vision_config": config["vision_config"]});
    write_folder(&folder.join("vision"), &siglip_config, &siglip);
    let mut whisper = renamed(audio, |n| format!("model.encoder.{n}"));
    whisper.insert("model.decoder.layer_norm.bias".into(), unused.clone());
    write_folder(&folder.join("audio"), &config["audio_config"], &whisper);
    let mut old = renamed(bert, |n| {
        format!("bert.{}", n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"))
    });
    old.insert("cls.predictions.bias".into(), unused);
    write_folder(&folder.join("bert-base-uncased"), &config["bert_config"], &old);
}

#[test]
fn towers_in_their_own_folders() {
    let case = Case::load("even");
    let folder = temporary();
    let mut config = case.config(VARIANT);
    let mut tensors = case.tensors(VARIANT);
    let towers = [VISION, AUDIO, BERT].map(|prefix| split(&mut tensors, prefix));
    write_towers(folder.path(), &config, towers);
    for section in ["vision_config", "audio_config", "bert_config"] {
        config.as_object_mut().expect("an object").remove(section);
    }
    write_folder(folder.path(), &config, &tensors);
    check(&case, VARIANT, &trace(&case, folder.path()));
    let model = Model::open(folder.path(), device()).expect("the model opens");
    assert_eq!(model.config().bert_folder.as_deref(), Some(folder.path().join("bert-base-uncased").as_path()));

    std::fs::remove_dir_all(folder.path().join("audio")).expect("it is there");
    let error = Model::open(folder.path(), device()).err().expect("a tower is missing").to_string();
    assert!(error.contains("mm_audio_tower") && error.contains("audio_config"), "{error}");
}

#[test]
fn the_tuned_towers_win_over_the_originals() {
    let case = Case::load("even");
    let folder = temporary();
    let (config, tensors) = (case.config(VARIANT), case.tensors(VARIANT));
    let originals = [VISION, AUDIO, BERT].map(|prefix| {
        let mut tower = split(&mut tensors.clone(), prefix);
        for tensor in tower.values_mut() {
            tensor.bytes.fill(0);
        }
        tower
    });
    write_towers(folder.path(), &config, originals);
    write_folder(folder.path(), &config, &tensors);
    check(&case, VARIANT, &trace(&case, folder.path()));
}

#[test]
fn shards_with_an_index() {
    let case = Case::load("even");
    let folder = temporary();
    let tensors = case.tensors("untied.int8");
    let mut shards = [Tensors::new(), Tensors::new()];
    let mut map = serde_json::Map::new();
    for (i, (name, tensor)) in tensors.into_iter().enumerate() {
        map.insert(name.clone(), format!("model-{}.safetensors", i % 2).into());
        shards[i % 2].insert(name, tensor);
    }
    for (i, shard) in shards.iter().enumerate() {
        write_tensors(&folder.path().join(format!("model-{i}.safetensors")), shard);
    }
    let write =
        |name: &str, value: Value| std::fs::write(folder.path().join(name), value.to_string()).expect("written");
    write("config.json", case.config("untied.int8"));
    write("model.safetensors.index.json", json!({"weight_map": map}));
    check(&case, "untied.int8", &trace(&case, folder.path()));
}

#[test]
fn what_lies_behind_the_selected_state_may_be_absent() {
    let case = Case::load("even");
    let folder = temporary();
    let mut tensors = case.tensors(VARIANT);
    for unneeded in ["encoder.layers.2.", "head.", "post_layernorm."] {
        assert!(!split(&mut tensors, &format!("{VISION}{unneeded}")).is_empty());
    }
    split(&mut tensors, &format!("{BERT}pooler."));
    write_folder(folder.path(), &case.config(VARIANT), &tensors);
    check(&case, VARIANT, &trace(&case, folder.path()));
}

#[test]
fn a_model_without_sound() {
    let case = Case::load("even");
    let folder = temporary();
    let mut config = case.config(VARIANT);
    let mut tensors = case.tensors(VARIANT);
    for key in ["mm_audio_tower", "audio_config"] {
        config.as_object_mut().expect("an object").remove(key);
    }
    write_folder(folder.path(), &config, &tensors);
    let error = Model::open(folder.path(), device()).err().expect("tensors of a tower that config.json denies");
    assert!(error.to_string().contains("model.audio_"), "{error}");

    split(&mut tensors, "model.audio_");
    write_folder(folder.path(), &config, &tensors);
    let mut model = Model::open(folder.path(), device()).expect("the model opens");
    let inputs = folder.path().join("inputs.safetensors");
    let mut given = case.inputs();
    write_tensors(&inputs, &given);
    let open = || Checkpoint::open_file(&inputs).expect("the inputs open");
    let error = trace_model(&mut model, &open(), 1).expect_err("sound for a model without").to_string();
    assert!(error.contains("no audio tower"), "{error}");
    given.remove("in.mel");
    write_tensors(&inputs, &given);
    let error = trace_model(&mut model, &open(), 1).expect_err("the prompt names the audio").to_string();
    assert!(error.contains("in.prompt_ids") && error.contains("audio"), "{error}");
}

/// Opens the model after a change to its tensors.
fn open_changed(change: impl FnOnce(&mut Tensors)) -> ModelError {
    let case = Case::load("even");
    let folder = temporary();
    let mut tensors = case.tensors(VARIANT);
    change(&mut tensors);
    write_folder(folder.path(), &case.config(VARIANT), &tensors);
    Model::open(folder.path(), device()).err().expect("the model must be refused")
}

#[test]
fn every_tensor_is_needed() {
    let case = Case::load("even");
    let folder = temporary();
    let tensors = case.tensors(VARIANT);
    let unneeded =
        ["vision_model.encoder.layers.2.", "vision_model.head.", "vision_model.post_layernorm.", "bert_model.pooler."];
    for name in tensors.keys().filter(|n| !unneeded.iter().any(|u| n.contains(u))) {
        let mut rest = tensors.clone();
        rest.remove(name);
        write_folder(folder.path(), &case.config(VARIANT), &rest);
        let error = Model::open(folder.path(), device()).err().expect("a tensor is missing");
        assert!(
            matches!(&error, ModelError::Weights(WeightsError::Missing { tensor, .. }) if tensor == name),
            "{name}: {error}"
        );
    }
}

#[test]
fn wrong_tensors_are_named() {
    let error = open_changed(|t| drop(t.insert("model.layers.7.mlp.up_proj.weight".into(), Stored::f32(&[1], &[0.0]))));
    assert!(matches!(&error, ModelError::Weights(WeightsError::Unexpected { count: 1, .. })), "{error}");
    assert!(error.to_string().contains("model.layers.7.mlp.up_proj.weight"), "{error}");

    let norm = "model.layers.1.input_layernorm.weight";
    let error = open_changed(|t| drop(t.insert(norm.into(), Stored::f32(&[41], &[0.0; 41]))));
    assert!(matches!(&error, ModelError::Weights(WeightsError::Shape { tensor, .. }) if tensor == norm), "{error}");

    let error = open_changed(|t| {
        let stored = t.get_mut(norm).expect("it is in the model");
        *stored = Stored { dtype: safetensors::Dtype::I32, ..stored.clone() };
    });
    assert!(matches!(&error, ModelError::Weights(WeightsError::WrongType { tensor, .. }) if tensor == norm), "{error}");

    let query = "model.layers.0.self_attn.q_proj.weight";
    let error = open_changed(|t| {
        t.insert(query.into(), Stored { dtype: safetensors::Dtype::I8, shape: vec![40, 40], bytes: vec![1; 1600] });
        t.insert(format!("{query}_scale"), Stored::f32(&[40, 1], &[f32::NAN; 40]));
    });
    assert!(matches!(&error, ModelError::Weights(WeightsError::ScaleValue { row: 0, .. })), "{error}");

    let gate = "model.bert_gate.0.weight";
    let error = open_changed(|t| drop(t.insert(gate.into(), Stored::f32(&[0, 24], &[]))));
    assert!(matches!(&error, ModelError::Weights(WeightsError::Shape { tensor, .. }) if tensor == gate), "{error}");
}
