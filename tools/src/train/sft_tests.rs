//! The whole chain on a data set made here: rationales, features, a few steps, the model folder, and the runtime
//! reading it.
#![allow(clippy::unwrap_used)]

use super::checkpoint::write_tensors;
use super::features::{FrozenTower, Standard, TowerWorker};
use super::gate_text::InstructionEncoder;
use super::gradient_check::random;
use super::products::TrainDevice;
use super::sft::{Part, SftArgs, run};
use super::student::{Prompt, Share, Student, StudentBuffers, StudentSize};
use crate::data::cold_start::{self, FacesArgs, INSTRUCTION};
use crate::data::rationale::Cue;
use crate::quantize::stored::Stored;
use candle_core::{Device, Tensor};
use candor::device::Choice;
use candor::manifest::Manifest;
use candor::model::{LanguageModel, Model, Piece};
use candor::text::{Generator, Grammar, PromptPiece, Sampler, Sampling};
use candor_kernels::cpu::CpuDevice;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokenizers::Tokenizer;

const STILLS: usize = 24;
const SIDE: usize = 56;

/// Random photographs with labels and cues, `train` and `val`.
fn write_faces(path: &Path) {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut tensors = Vec::new();
    for part in ["train", "val"] {
        let images: Vec<u8> = (0..STILLS * 48 * 48).map(|_| rng.random()).collect();
        let cues: Vec<u8> = random(STILLS * 9, 2.0, &mut rng).iter().flat_map(|v| v.to_le_bytes()).collect();
        tensors.push((format!("{part}.images"), Dtype::U8, vec![STILLS, 48, 48], images));
        tensors.push((format!("{part}.labels"), Dtype::U8, vec![STILLS], (0..STILLS).map(|i| (i % 7) as u8).collect()));
        tensors.push((format!("{part}.cues"), Dtype::F32, vec![STILLS, 9], cues));
        let valid = (0..STILLS).map(|i| u8::from(i % 3 != 0)).collect();
        tensors.push((format!("{part}.cues_valid"), Dtype::U8, vec![STILLS], valid));
    }
    let names: Vec<&str> = Cue::ALL.iter().map(|cue| cue.name()).collect();
    let about = HashMap::from([
        ("classes".to_owned(), "angry,disgust,fear,happy,neutral,sad,surprise".to_owned()),
        ("cues".to_owned(), names.join(",")),
    ]);
    let views = tensors.iter().map(|(n, d, s, b)| (n.as_str(), TensorView::new(*d, s.clone(), b).unwrap()));
    fs::write(path, safetensors::serialize(views, Some(about)).unwrap()).unwrap();
}

/// A tower of two layers on a 4×4 grid with random weights.
fn write_tower(folder: &Path) {
    let (width, hidden) = (16, 24);
    let mut shapes = vec![
        ("embeddings.patch_embedding.weight".to_owned(), vec![width, 3, 14, 14]),
        ("embeddings.patch_embedding.bias".to_owned(), vec![width]),
        ("embeddings.position_embedding.weight".to_owned(), vec![16, width]),
    ];
    for layer in 0..2 {
        let mut add =
            |name: &str, shape: &[usize]| shapes.push((format!("encoder.layers.{layer}.{name}"), shape.to_vec()));
        for name in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"] {
            add(&format!("{name}.weight"), &[width, width]);
            add(&format!("{name}.bias"), &[width]);
        }
        for name in ["layer_norm1.weight", "layer_norm1.bias", "layer_norm2.weight", "layer_norm2.bias", "mlp.fc2.bias"]
        {
            add(name, &[width]);
        }
        add("mlp.fc1.weight", &[hidden, width]);
        add("mlp.fc1.bias", &[hidden]);
        add("mlp.fc2.weight", &[width, hidden]);
    }
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let tensors: HashMap<String, Tensor> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let len: usize = shape.iter().product();
            let scale = 1.5 / (len as f32 / shape[0] as f32).sqrt();
            let tensor = Tensor::from_vec(random(len, scale, &mut rng), shape, &Device::Cpu).unwrap();
            (format!("vision_model.{name}"), tensor)
        })
        .collect();
    fs::create_dir_all(folder).unwrap();
    write_tensors(&folder.join("model.safetensors"), &tensors).unwrap();
    let config = serde_json::json!({"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": hidden, "image_size": SIDE, "patch_size": 14, "hidden_act": "gelu",
        "layer_norm_eps": 1e-6});
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

fn prepare(folder: &Path) -> SftArgs {
    let (faces, data, tower) = (folder.join("faces.safetensors"), folder.join("data"), folder.join("tower"));
    write_faces(&faces);
    write_tower(&tower);
    cold_start::run(&FacesArgs {
        faces: faces.clone(),
        out: data.clone(),
        seed: 5,
        part: "train".into(),
        variants: 2,
        vocabulary: 400,
        sentences: 10,
    })
    .unwrap();
    SftArgs {
        faces,
        data,
        tower,
        out: folder.join("run"),
        features: Some(folder.join("features")),
        part: Part::Clean,
        views: 2,
        tower_layers: None,
        limit: None,
        frames: 3,
        width: 16,
        layers: 2,
        heads: 2,
        key_heads: 1,
        head_dim: 8,
        hidden: 40,
        passes: 1.0,
        batch: 6,
        rate: 3e-3,
        weight_decay: 0.05,
        label_weight: 4.0,
        unmeasured_weight: 0.2,
        fast_weight: 0.5,
        helper_weight: 0.5,
        noise: 0.1,
        seed: 9,
        threads: 2,
        device: TrainDevice { train_device: Choice::Cpu },
        validate: 8,
        stop_after: None,
        name: "test".into(),
    }
}

fn steps(out: &Path) -> Vec<String> {
    fs::read_to_string(out.join("metrics.jsonl")).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn a_run_cut_off_ends_where_a_whole_one_does() {
    let folder = tempfile::tempdir().unwrap();
    let mut args = prepare(folder.path());
    run(&args).unwrap();
    let whole = fs::read(args.out.join("model/model.safetensors")).unwrap();
    assert_eq!(steps(&args.out).iter().filter(|line| line.contains("\"loss\"")).count(), 4);
    assert!(args.out.join("curves.svg").is_file());

    args.out = folder.path().join("cut");
    // Other features too: their file is computed anew, and cut off in the midst.
    args.features = None;
    args.stop_after = Some(2);
    let error = run(&args).unwrap_err().to_string();
    assert!(error.contains("stopped at step 2 of 4"), "{error}");
    assert!(!args.out.join("model").exists());
    args.stop_after = None;
    run(&args).unwrap();
    assert!(fs::read(args.out.join("model/model.safetensors")).unwrap() == whole, "the models differ");

    // Another recipe does not go on from this state.
    args.rate = 1e-3;
    let error = run(&args).unwrap_err().to_string();
    assert!(error.contains("no state of this training"), "{error}");
}

#[test]
fn features_cut_off_are_completed() {
    let folder = tempfile::tempdir().unwrap();
    let args = prepare(folder.path());
    run(&args).unwrap();
    let store = args.features.unwrap();
    let find = |ending: &str| -> PathBuf {
        let entries = fs::read_dir(&store).unwrap().map(|entry| entry.unwrap().path());
        entries
            .into_iter()
            .find(|p| p.to_string_lossy().contains("train") && p.to_string_lossy().ends_with(ending))
            .unwrap()
    };
    let whole = fs::read(find(".f16")).unwrap();
    let note = fs::read_to_string(find(".done")).unwrap();
    assert_eq!(note.lines().filter(|line| line.starts_with("24 ")).count(), 2, "{note}");
    // Cut off behind the note, as by a full disk: the note is not believed.
    fs::write(find(".f16"), &whole[..whole.len() / 2]).unwrap();
    let again = SftArgs { out: folder.path().join("again"), features: Some(store.clone()), ..prepare(folder.path()) };
    run(&again).unwrap();
    assert!(fs::read(find(".f16")).unwrap() == whole);
}

#[test]
fn broken_data_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let args = prepare(folder.path());
    let clean = args.data.join("clean.jsonl");
    let text = fs::read_to_string(&clean).unwrap();
    let cases = [
        (text.lines().take(10).collect::<Vec<_>>().join("\n"), "has 10 lines, data.json says 48"),
        (text.replacen("{\"still\":0", "{\"still\":9", 1), "photograph 9 where 0 belongs"),
        (text.replacen('{', "[", 1), "line 1"),
        (String::new(), "has 0 lines"),
    ];
    for (broken, message) in cases {
        fs::write(&clean, broken).unwrap();
        let error = format!("{:#}", run(&args).unwrap_err());
        assert!(error.contains(message), "{error:?} lacks {message:?}");
    }
    fs::write(&clean, text).unwrap();
    let bytes = fs::read(&args.faces).unwrap();
    let mut other = bytes.clone();
    *other.last_mut().unwrap() ^= 1;
    fs::write(&args.faces, other).unwrap();
    let error = run(&args).unwrap_err().to_string();
    assert!(error.contains("made from other faces"), "{error}");
    fs::write(&args.faces, bytes).unwrap();
    for args in
        [SftArgs { views: 0, ..prepare(folder.path()) }, SftArgs { label_weight: 1.0, ..prepare(folder.path()) }]
    {
        run(&args).unwrap_err();
    }
}

/// The training's forward pass is the runtime's, from pixels to logits, on weights that are random everywhere.
#[test]
fn the_training_forward_pass_is_the_runtimes() {
    let folder = tempfile::tempdir().unwrap();
    let args = prepare(folder.path());
    let tower = FrozenTower::open(&args.tower, None).unwrap();
    let tokenizer = Tokenizer::from_file(args.data.join("tokenizer.json")).unwrap();
    let prompt = Prompt::new(tokenizer, INSTRUCTION, 4.0, 0.2).unwrap();
    let encoder = InstructionEncoder::new(INSTRUCTION, 9);
    let size = StudentSize {
        decoder: super::decoder::DecoderSize {
            // Wide enough that some matrices are stored as int8 rows.
            width: 64,
            layers: 2,
            heads: 3,
            key_heads: 1,
            head_dim: 16,
            hidden: 80,
            vocabulary: prompt.vocabulary(),
            theta: 1e4,
            eps: 1e-6,
            tied: true,
        },
        channels: tower.config().hidden_size,
        grid: tower.grid(),
        frames: 3,
    };
    let student = Student::new(size, encoder.width()).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let mut values = student.initial(6);
    for entry in student.plan.entries() {
        let own = &mut values[entry.range.clone()];
        own.iter_mut().for_each(|v| *v += rng.random_range(-0.05..0.05));
        own.copy_from_slice(&Stored::new(&entry.name, &entry.shape, own).values());
    }
    // Factors that round nothing: they are folded into weights that are rounded already.
    let standard =
        Standard { mean: random(16, 0.5, &mut rng), factor: (0..16).map(|i| [0.5, 1.0, 2.0, 4.0][i % 4]).collect() };
    let description: cold_start::Description =
        serde_json::from_str(&fs::read_to_string(args.data.join("data.json")).unwrap()).unwrap();
    let model = folder.path().join("model");
    super::export::write(&super::export::Export {
        folder: &model,
        name: "test",
        student: &student,
        values: &values,
        standard: &standard,
        tower: &tower,
        encoder: &encoder,
        prompt: &prompt,
        data: &args.data,
        description: &description,
    })
    .unwrap();

    let pixels = random(3 * SIDE * SIDE, 1.0, &mut rng);
    let mut features = tower.forward(&pixels, &mut TowerWorker::default());
    standard.apply(&mut features);
    let tokens = prompt.tokens("The mouth is open. They look happy.", "happy").unwrap();
    let state = encoder.state(INSTRUCTION).unwrap();
    let share = Share {
        features: &features,
        clips: &[vec![0, 1, 2]],
        tokens: &[&tokens],
        labels: &[3],
        cues: &[None],
        full_weight: 1.0,
        fast_weight: 1.0,
        batch: 1,
    };
    let mut buffers = StudentBuffers::default();
    let logits = student.logits(&values, &prompt, &state, &share, &mut buffers).remove(0);

    let device = CpuDevice::new(Some(1)).exact();
    let mut runtime = Model::open(&model, device.clone()).unwrap();
    let close = |name: &str, ours: &[f32], theirs: &[f32]| {
        assert_eq!(ours.len(), theirs.len(), "{name}");
        let scale = theirs.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        let worst = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
        assert!(worst < 1e-3 * scale, "{name}: differs by {worst} of {scale}");
    };
    // Grey pictures: three equal channels.
    let channels: Vec<f32> = pixels.chunks_exact(SIDE * SIDE).flat_map(|p| p.repeat(3)).collect();
    let mut patches = runtime.rows().unwrap();
    runtime.vision_features(&channels, &mut patches).unwrap();
    let mut theirs = patches.to_host(&device).unwrap();
    Standard { mean: vec![0.0; 16], factor: standard.factor.clone() }.apply(&mut theirs);
    close("features", &features, &theirs);
    let pieces = Tokenizer::from_file(model.join("bert/tokenizer.json")).unwrap();
    let gate = runtime.gate(pieces.encode(INSTRUCTION, true).unwrap().get_ids()).unwrap();
    let mut video = runtime.rows().unwrap();
    runtime.video_tokens(&patches, gate, &mut video).unwrap();
    close("video tokens", student.video_tokens(&buffers), &video.to_host(&device).unwrap());
    let mut session = runtime.session(200).unwrap();
    let (before, after) = prompt.around();
    let prompt_pieces = [Piece::Tokens(before), Piece::Rows(&video), Piece::Tokens(after)];
    let vocabulary = size.decoder.vocabulary;
    session.start(&prompt_pieces).unwrap();
    let mut expected = session.logits().unwrap().to_vec();
    for &(id, _) in &tokens.full[..tokens.full.len() - 1] {
        session.append(&[id]).unwrap();
        expected.extend_from_slice(session.logits().unwrap());
    }
    session.start(&prompt_pieces).unwrap();
    for &(id, _) in &tokens.fast[..tokens.fast.len() - 1] {
        session.append(&[id]).unwrap();
        expected.extend_from_slice(session.logits().unwrap());
    }
    assert_eq!(expected.len(), (tokens.full.len() + tokens.fast.len() - 1) * vocabulary);
    close("logits", &logits, &expected);

    // The runtime's own tokenizer and chat template make the prompt that was trained on, and its generation from it is
    // readable.
    let text = candor::text::Tokenizer::open(&model).unwrap();
    let template = candor::text::ChatTemplate::open(&model, &text).unwrap();
    let expected = [PromptPiece::Text(before.to_vec()), PromptPiece::Video, PromptPiece::Text(after.to_vec())];
    assert_eq!(template.prompt(&text, INSTRUCTION, false).unwrap(), expected);
    let table = Arc::new(text.token_table(vocabulary).unwrap());
    let manifest = Manifest::open(&model).unwrap();
    manifest.check_files().unwrap();
    let grammar = Grammar::new(table, &manifest.model.labels, 60).unwrap();
    session.start(&prompt_pieces).unwrap();
    let sampler = Sampler::new(Sampling::GREEDY).unwrap();
    let completion = Generator::new(&mut session, &grammar, sampler).unwrap().finish().unwrap();
    assert!(description.labels.contains(&completion.label), "{completion:?}");
}
