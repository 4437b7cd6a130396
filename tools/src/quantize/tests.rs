#![allow(clippy::unwrap_used)]
use std::path::Path;

use candor::model::{LanguageModel, Model, Piece};
use candor::weights::Checkpoint;
use candor_kernels::Device;
use candor_kernels::cpu::CpuDevice;
use clap::Parser;
use safetensors::SafeTensors;
use serde_json::Value;

use super::observe::{Known, Observer};
use super::*;
use crate::synthesize::tests::tiny_folder;

#[derive(Parser)]
struct CommandLine {
    #[command(flatten)]
    args: QuantizeArgs,
}

fn parse(model: &Path, output: &Path, more: &str) -> Result<QuantizeArgs, clap::Error> {
    let words = ["quantize", "--model", model.to_str().unwrap(), "--output", output.to_str().unwrap()];
    let words = words.into_iter().chain(more.split(' ').filter(|word| !word.is_empty()));
    CommandLine::try_parse_from(words).map(|line| line.args)
}

fn quantise(model: &Path, output: &Path, more: &str) -> anyhow::Result<()> {
    run(&parse(model, output, more)?)
}

/// Logits behind a prompt and a window of frames, computed exactly.
fn logits(folder: &Path) -> Vec<f32> {
    logits_on(folder, CpuDevice::new(Some(1)).exact())
}

fn logits_on<D: Device>(folder: &Path, device: D) -> Vec<f32> {
    let mut model = Model::open(folder, device).unwrap();
    let side = model.config().vision.image;
    let frames: Vec<Vec<u8>> =
        (0..2).map(|frame| (0..side * side * 3).map(|i| (i * 7 + frame * 50) as u8).collect()).collect();
    let frames: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
    let (mut features, mut video) = (model.rows().unwrap(), model.rows().unwrap());
    model.vision_features_rgb(&frames, &mut features).unwrap();
    let gate = model.gate(&[1, 2, 3]).unwrap();
    model.video_tokens(&features, gate, &mut video).unwrap();
    let mut session = model.session(32).unwrap();
    session.start(&[Piece::Rows(&video), Piece::Tokens(&[1, 2, 130])]).unwrap();
    session.append(&[5]).unwrap();
    session.logits().unwrap().to_vec()
}

/// A folder with the values that a quantised one's stand for, in f32.
fn widened(folder: &Path) -> tempfile::TempDir {
    let wide = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(folder).unwrap();
    let names: Vec<&str> = checkpoint.names().filter(|name| !name.ends_with("_scale")).collect();
    let contents: Vec<Vec<u8>> = names
        .iter()
        .map(|name| checkpoint.tensor(name).unwrap().to_f32().iter().flat_map(|v| v.to_le_bytes()).collect())
        .collect();
    let views = names.iter().zip(&contents).map(|(name, bytes)| {
        let shape = checkpoint.raw(name).unwrap().shape.to_vec();
        (*name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &wide.path().join("model.safetensors")).unwrap();
    let mut config: Value = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    config.as_object_mut().unwrap().remove("quantization_config");
    std::fs::write(wide.path().join("config.json"), config.to_string()).unwrap();
    wide
}

/// Every format, over a model in which no width is a multiple of 128 and some are none of 32.
#[test]
fn a_quantised_folder_opens_and_computes_as_its_values_do() {
    for (source, options) in [
        ("f32", "--weights int4"),
        ("f16", "--weights int4 --group 64"),
        ("f16", "--weights int4 --group 128 --keep embed_tokens=int8"),
        ("f16", "--weights int4 --group row --keep lm_head=int4,vision=int8:32"),
        ("f16", "--weights int8"),
        ("int8", "--weights int8 --group 32 --keep layers.0=f16"),
        ("int4", "--weights int4 --keep mlp=int8"),
    ] {
        let (model, out) = (tiny_folder(source), tempfile::tempdir().unwrap());
        let out = out.path().join("out");
        quantise(model.path(), &out, options).unwrap();
        let (own, wide) = (logits(&out), logits(widened(&out).path()));
        let most = wide.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        let worst = own.iter().zip(&wide).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(worst <= 2e-5 * most, "{options}: {worst} of {most}");
        candor::manifest::Manifest::open(&out).unwrap().check_files().unwrap();
        assert!(!out.with_file_name(".out.part").exists());
    }
}

#[test]
fn formats_are_named_in_the_configuration() {
    let (model, out) = (tiny_folder("f16"), tempfile::tempdir().unwrap());
    let out = out.path().join("out");
    quantise(model.path(), &out, "--weights int4 --keep lm_head=int8,vision=int8,model.layers.1.mlp=f16").unwrap();
    let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
    let quantisation = &config["quantization_config"];
    assert_eq!(quantisation["format"], "mixed-precision");
    let targets = |group: &str| -> Vec<String> {
        serde_json::from_value(quantisation["config_groups"][group]["targets"].clone()).unwrap()
    };
    assert_eq!(quantisation["config_groups"]["group_0"]["format"], "pack-quantized");
    assert_eq!(quantisation["config_groups"]["group_1"]["format"], "int-quantized");
    let (four, eight) = (targets("group_0"), targets("group_1"));
    assert!(four.contains(&r"re:^model\.layers\.\d+\.self_attn\.q_proj$".to_owned()), "{four:?}");
    assert!(four.contains(&"model.layers.0.mlp.up_proj".to_owned()), "{four:?}");
    assert!(eight.contains(&"model.embed_tokens".to_owned()), "{eight:?}");
    let bytes = std::fs::read(out.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let dtype = |name: &str| format!("{:?}", file.tensor(name).unwrap().dtype());
    assert_eq!(dtype("model.layers.1.mlp.up_proj.weight"), "F16");
    assert_eq!(dtype("model.layers.0.mlp.up_proj.weight_packed"), "I32");
    assert_eq!(dtype("model.embed_tokens.weight"), "I8");
    assert_eq!(dtype("model.norm.weight"), "F16");
}

#[test]
fn bytes_of_rows_stay_what_they_are() {
    let (model, out) = (tiny_folder("int8"), tempfile::tempdir().unwrap());
    let out = out.path().join("out");
    quantise(model.path(), &out, "--weights int8 --keep embed_tokens=int8").unwrap();
    let (before, after) = (Checkpoint::open(model.path()).unwrap(), Checkpoint::open(&out).unwrap());
    for name in before.names().filter(|name| !name.ends_with("_scale")) {
        let (before, after) = (before.tensor(name).unwrap().to_f32(), after.tensor(name).unwrap().to_f32());
        assert!(stored::relative_error(&after, &before) < 1e-2, "{name}");
    }
}

#[test]
fn an_observer_sees_inputs_and_exchanges_weights() {
    let (model, place) = (tiny_folder("f16"), tempfile::tempdir().unwrap());
    let out = place.path().join("out");
    quantise(model.path(), &out, "--weights int4").unwrap();
    let (before, after) = (Checkpoint::open(model.path()).unwrap(), Checkpoint::open(&out).unwrap());
    let names: Vec<&str> = before.names().filter(|name| after.tensor(name).unwrap().dtype().is_scaled()).collect();
    let place = |wanted: &str| names.iter().position(|name| *name == wanted).unwrap();
    let observer = |exchange: bool| {
        let known = names.iter().map(|name| Known {
            tensor: before.tensor(name).unwrap(),
            replacement: exchange.then(|| after.tensor(name).unwrap()),
            wanted: true,
        });
        Observer::new(CpuDevice::new(Some(1)).exact(), known.collect())
    };
    let plain = observer(false);
    assert_eq!(logits_on(model.path(), plain.clone()), logits(model.path()));
    assert_eq!(logits_on(model.path(), observer(true)), logits(&out));

    // The prompt's three tokens and two frames of four, and the one that is appended.
    let [gate, up] = ["gate", "up"].map(|name| place(&format!("model.layers.0.mlp.{name}_proj.weight")));
    let inputs = plain.inputs(gate).unwrap();
    assert_eq!((inputs.rows, inputs.sums.len()), (2 * 4 + 3 + 1, 96 * 96));
    assert_eq!(plain.inputs(up).unwrap(), inputs, "layers of one input share its sums");
    for i in 0..96 {
        assert!(inputs.sums[i * 96 + i] >= 0.0);
        (0..i).for_each(|j| assert!((inputs.sums[i * 96 + j] - inputs.sums[j * 96 + i]).abs() < 1e-3));
    }
    let order = plain.order();
    let first = |name: &str| order.iter().position(|&index| names[index].contains(name)).unwrap();
    assert!(first("vision_tower") < first("mm_projector") && first("model.layers.0.") < first("model.layers.1."));
    assert!(!order.iter().any(|&index| names[index].contains("audio")), "no sound was heard");
}

#[test]
fn wrong_requests_are_named_and_leave_nothing() {
    let (model, place) = (tiny_folder("f16"), tempfile::tempdir().unwrap());
    let out = place.path().join("out");
    for (options, said) in [
        ("--weights int3", "int4"),
        ("--weights int4 --group 48", "32, 64, 128 or row"),
        ("--weights int4 --keep lm_head", "NAME=FORMAT"),
        ("--weights int4 --keep ears=int8", "--keep ears"),
        ("--weights int4 --keep vision=f16,projector=f16,bert=f16,decoder=f16,audio=f16", "no matrix"),
        ("--weights int4 --method gptq", "--calibrate"),
        ("--weights int4 --threads 0", "--threads"),
        ("--weights int4 --limit 0", "--limit"),
        ("--weights int4 --calibrate nowhere.json", "nowhere.json"),
        ("--weights int4 --per-layer", "--evaluate"),
    ] {
        let error = format!("{:#}", quantise(model.path(), &out, options).unwrap_err());
        assert!(error.contains(said), "{options}: {error}");
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0, "{options}");
    }
    std::fs::create_dir(&out).unwrap();
    quantise(model.path(), &out, "--weights int4").unwrap();
    let again = quantise(model.path(), &out, "--weights int4").unwrap_err();
    assert!(again.to_string().contains("--output"), "{again}");
    assert!(quantise(&place.path().join("none"), &place.path().join("x"), "--weights int4").is_err());
}

#[test]
fn what_is_not_finite_is_refused() {
    let (model, place) = (tiny_folder("f32"), tempfile::tempdir().unwrap());
    let path = model.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let error = format!("{:#}", quantise(model.path(), &place.path().join("out"), "--weights int4").unwrap_err());
    assert!(error.contains("finite"), "{error}");
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0);
}

#[test]
fn where_data_comes_from() {
    for (text, path, part) in [
        ("a/faces.safetensors#train", "a/faces.safetensors", Some("train")),
        ("faces.safetensors", "faces.safetensors", Some("val")),
        ("list.json", "list.json", None),
        ("odd#name.json", "odd#name.json", None),
    ] {
        let data = Data::parse(text, "val");
        assert_eq!((data.path.to_str().unwrap(), data.part.as_deref()), (path, part));
    }
}
