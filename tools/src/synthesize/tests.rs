#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use candor::model::{Classifier, LanguageModel, Model, Piece};
use candor_kernels::cpu::CpuDevice;
use clap::Parser;
use safetensors::SafeTensors;
use serde_json::json;

use super::*;

/// A model of the family in which every size is another.
fn tiny() -> Value {
    json!({
        "model_type": "HumanOmni_qwen2", "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 160, "vocab_size": 131,
        "rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "tie_word_embeddings": true,
        "num_frames": 2, "mm_projector_type": "all_in_one_small", "mm_vision_select_layer": -2,
        "vision_config": {"hidden_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
            "intermediate_size": 144, "image_size": 32, "patch_size": 8},
        "bert_config": {"hidden_size": 72, "num_hidden_layers": 1, "num_attention_heads": 4,
            "intermediate_size": 136, "vocab_size": 47, "max_position_embeddings": 24, "type_vocab_size": 2},
        "audio_config": {"d_model": 88, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 152,
            "num_mel_bins": 20, "max_source_positions": 30},
    })
}

fn storage(weights: Weights, group: Group, head: Weights) -> Storage {
    Storage { weights, group, head, parts: Vec::new() }
}

fn synthesize(config: Value, storage: &Storage) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "tiny", config, storage, 1).unwrap();
    folder
}

/// A small model in which every size is another, for other tests.
pub(crate) fn tiny_folder(weights: &str) -> tempfile::TempDir {
    let weights = <Weights as clap::ValueEnum>::from_str(weights, false).unwrap();
    let group = if weights == Weights::Int4 { Group::Of(32) } else { Group::Row };
    synthesize(tiny(), &storage(weights, group, weights))
}

/// Runs every part, and checks that what comes out is finite and not all the same.
fn run_all_parts(folder: &Path) {
    let check = |what: &str, values: &[f32]| {
        let largest = values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        assert!(values.iter().all(|value| value.is_finite()), "{what} is not finite");
        assert!((1e-6..1e4).contains(&largest), "{what} is at most {largest}");
    };
    let mut model = Model::open(folder, CpuDevice::new(Some(1))).unwrap();
    let frames: Vec<Vec<u8>> = (0..2).map(|frame| vec![100 * frame; 32 * 32 * 3]).collect();
    let frames: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
    let (mut features, mut video) = (model.rows().unwrap(), model.rows().unwrap());
    model.vision_features_rgb(&frames, &mut features).unwrap();
    check("vision", &features.to_host(model.device()).unwrap());
    let gate = model.gate(&[1, 2, 3]).unwrap();
    check("gate", &gate);
    model.video_tokens(&features, gate, &mut video).unwrap();
    check("projector", &video.to_host(model.device()).unwrap());
    if model.config().audio.is_some() {
        let (mut states, mut sound) = (model.rows().unwrap(), model.rows().unwrap());
        model.audio_states(&[0.5; 20 * 60], &mut states).unwrap();
        model.audio_tokens(&states, &mut sound).unwrap();
        check("audio", &sound.to_host(model.device()).unwrap());
    }
    let mut session = model.session(32).unwrap();
    session.start(&[Piece::Rows(&video), Piece::Tokens(&[1, 2, 130])]).unwrap();
    session.append(&[5]).unwrap();
    check("decoder", session.logits().unwrap());
}

#[test]
fn synthesized_folders_open_and_compute() {
    for storage in [
        storage(Weights::F32, Group::Row, Weights::F32),
        storage(Weights::F16, Group::Row, Weights::F16),
        storage(Weights::Int8, Group::Row, Weights::Int8),
        storage(Weights::Int8, Group::Row, Weights::F16),
        storage(Weights::Int8, Group::Of(32), Weights::Int8),
        storage(Weights::Int4, Group::Of(32), Weights::Int8),
        storage(Weights::Int4, Group::Row, Weights::Int4),
        Storage { parts: vec![Part::Decoder], ..storage(Weights::Int4, Group::Of(64), Weights::F16) },
    ] {
        run_all_parts(synthesize(tiny(), &storage).path());
    }
    let mut silent = tiny();
    silent.as_object_mut().unwrap().remove("audio_config");
    run_all_parts(synthesize(silent, &storage(Weights::F16, Group::Row, Weights::F16)).path());
}

#[test]
fn synthesized_verifiers_open_and_compute() {
    let config = json!({"model_type": "roberta", "hidden_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 136, "vocab_size": 47, "max_position_embeddings": 24, "type_vocab_size": 1,
        "pad_token_id": 1, "id2label": {"0": "a", "1": "b"}});
    let folder = synthesize(config, &storage(Weights::Int8, Group::Row, Weights::Int8));
    let mut classifier = Classifier::open(folder.path(), CpuDevice::new(Some(1))).unwrap();
    assert!(classifier.logits(&[3, 4, 5]).unwrap().iter().all(|logit| logit.is_finite()));
}

#[test]
fn packed_weights_are_laid_down_as_compressed_tensors_does() {
    let storage = storage(Weights::Int4, Group::Of(32), Weights::Int8);
    let folder = synthesize(tiny(), &storage);
    let bytes = std::fs::read(folder.path().join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let stored: BTreeMap<String, (String, Vec<usize>)> = file
        .iter()
        .map(|(name, tensor)| (name.to_owned(), (format!("{:?}", tensor.dtype()), tensor.shape().to_vec())))
        .collect();
    let down = "model.layers.1.mlp.down_proj.weight";
    assert_eq!(stored[&format!("{down}_packed")], ("I32".into(), vec![96, 20]));
    assert_eq!(stored[&format!("{down}_scale")], ("F16".into(), vec![96, 5]));
    assert_eq!(stored[&format!("{down}_shape")], ("I64".into(), vec![2]));
    assert!(!stored.contains_key(down));
    let shape = file.tensor(&format!("{down}_shape")).unwrap();
    assert_eq!(shape.data(), [96i64.to_le_bytes(), 160i64.to_le_bytes()].concat());
    assert_eq!(stored["model.embed_tokens.weight"], ("I8".into(), vec![131, 96]));
    assert_eq!(stored["model.embed_tokens.weight_scale"], ("F32".into(), vec![131, 1]));
    assert!(!file.tensor("model.embed_tokens.weight").unwrap().data().contains(&0x80));
    assert_eq!(stored["model.norm.weight"].0, "F16");
    // Each of the sixteen values is as likely as the others.
    let mut counts = [0usize; 16];
    for byte in file.tensor(&format!("{down}_packed")).unwrap().data() {
        counts[usize::from(byte & 15)] += 1;
        counts[usize::from(byte >> 4)] += 1;
    }
    let expected = 96 * 160 / 16;
    assert!(counts.iter().all(|&count| count.abs_diff(expected) < expected / 4), "{counts:?}");
    let config: Value = serde_json::from_slice(&std::fs::read(folder.path().join("config.json")).unwrap()).unwrap();
    let quantisation = &config["quantization_config"];
    assert_eq!(quantisation["format"], "mixed-precision");
    assert_eq!(quantisation["config_groups"]["group_0"]["format"], "pack-quantized");
    assert_eq!(quantisation["config_groups"]["group_0"]["weights"]["group_size"], 32);
    assert_eq!(quantisation["config_groups"]["group_1"]["weights"]["num_bits"], 8);
}

#[test]
fn the_same_seed_gives_the_same_file() {
    let read = |seed| {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "tiny", tiny(), &storage(Weights::Int8, Group::Row, Weights::F16), seed).unwrap();
        std::fs::read(folder.path().join("model.safetensors")).unwrap()
    };
    let first = read(1);
    assert!(first == read(1) && first != read(2));
}

#[test]
fn presets_have_the_published_number_of_weights() {
    let count = |entries: Vec<layout::Entry>| -> usize {
        entries.iter().map(|entry| entry.shape.iter().product::<usize>()).sum()
    };
    let read = |preset: Preset, audio| {
        let folder = tempfile::tempdir().unwrap();
        let config = preset.config(audio).unwrap();
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        folder
    };
    let model = layout::model(&ModelConfig::read(read(Preset::HumanOmni, true).path()).unwrap());
    let decoder = model.iter().filter(|entry| entry.part == Part::Decoder).cloned().collect();
    assert_eq!(count(decoder), 494_032_768);
    let tower = model.iter().filter(|entry| entry.name.starts_with("model.audio_tower.")).cloned().collect();
    assert_eq!(count(tower), 636_968_960);
    let verifier = ClassifierConfig::read(read(Preset::VerifierBase, false).path()).unwrap();
    assert_eq!(count(layout::classifier(&verifier)), 124_667_164);
    assert!(Preset::VerifierBase.config(true).is_err());
}

#[derive(Parser)]
struct CommandLine {
    #[command(flatten)]
    args: SynthesizeArgs,
}

#[test]
fn wrong_requests_are_named() {
    let parse = |more: &str| {
        let words = format!("synthesize --preset humanomni-0.5b --output x {more}");
        CommandLine::try_parse_from(words.split(' ')).map(|line| line.args)
    };
    let int4 = parse("--weights int4").unwrap().storage().unwrap();
    assert_eq!((int4.group, int4.head), (Group::Of(32), Weights::Int8));
    let int4 = parse("--weights int4 --group row --head int4 --parts vision,decoder").unwrap().storage().unwrap();
    assert_eq!((int4.group, int4.head, int4.parts.len()), (Group::Row, Weights::Int4, 2));
    assert_eq!(parse("--weights f32").unwrap().storage().unwrap().head, Weights::F32);
    for (words, said) in [
        ("--weights int4 --group 48", "32, 64, 128 or row"),
        ("--weights int3", "int4"),
        ("--weights int8 --parts ears", "vision"),
    ] {
        assert!(parse(words).err().unwrap().to_string().contains(said), "{words}");
    }
    for (words, said) in [("--weights f16 --group 32", "--group"), ("--weights int8 --parts audio", "--audio")] {
        assert!(parse(words).unwrap().storage().unwrap_err().to_string().contains(said), "{words}");
    }
    let folder = synthesize(tiny(), &storage(Weights::F16, Group::Row, Weights::F16));
    let again = write(folder.path(), "tiny", tiny(), &storage(Weights::F16, Group::Row, Weights::F16), 1);
    assert!(again.unwrap_err().to_string().contains("--output"));
}
