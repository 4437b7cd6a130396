//! Writes a trained model as a folder in the published layout, so that nothing in the runtime is special to it.

use super::checkpoint::write_atomically;
use super::features::{FrozenTower, Standard};
use super::gate_text::InstructionEncoder;
use super::student::{Prompt, Student};
use crate::data::cold_start::Description;
use crate::data::tokenizer::{CHAT_TEMPLATE, END_OF_TEXT, TURN_END};
use crate::quantize::stored::{self, Record, Stored};
use anyhow::Context;
use candor::manifest::{Answer, InputSection, Manifest, ModelSection};
use candor::media::Fit;
use safetensors::tensor::TensorView;
use safetensors::{SafeTensorError, serialize};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;

/// Room for a rationale and an answer, with a wide margin.
const MAX_NEW_TOKENS: usize = 160;

/// A model to write.
pub struct Export<'a> {
    /// Where to.
    pub folder: &'a Path,
    /// Name in the manifest.
    pub name: &'a str,
    /// Projector, gate and decoder.
    pub student: &'a Student,
    /// Their values.
    pub values: &'a [f32],
    /// How they want the tower's features.
    pub standard: &'a Standard,
    /// The tower.
    pub tower: &'a FrozenTower,
    /// The gate's BERT.
    pub encoder: &'a InstructionEncoder,
    /// The tokenizer's special tokens.
    pub prompt: &'a Prompt,
    /// Folder with the tokenizer.
    pub data: &'a Path,
    /// Labels and instruction.
    pub description: &'a Description,
}

/// Writes the folder and says how large it is and what the rounding of weights cost.
pub fn write(model: &Export<'_>) -> anyhow::Result<String> {
    std::fs::create_dir_all(model.folder.join("bert")).with_context(|| format!("{}", model.folder.display()))?;
    let mut records = Vec::new();
    let (mut worst, mut largest) = (0.0f64, String::new());
    let mut add = |name: String, shape: &[usize], values: &[f32]| {
        let stored = Stored::new(&name, shape, values);
        let error = stored.error(values);
        if error > worst {
            (worst, largest) = (error, name.clone());
        }
        records.extend(stored.records(&name, shape));
    };
    for (name, shape, values) in model.tower.tensors(model.standard) {
        add(format!("model.vision_tower.vision_tower.{name}"), shape, &values);
    }
    for (name, shape, values) in model.student.tensors(model.values, model.standard) {
        add(name, &shape, &values);
    }
    for entry in model.encoder.plan.entries() {
        add(entry.name.clone(), &entry.shape, &model.encoder.values[entry.range.clone()]);
    }
    let weights = file_of(&records)?;
    let put = |name: &str, bytes: &[u8]| write_atomically(&model.folder.join(name), bytes);
    put("model.safetensors", &weights)?;
    put("config.json", pretty(&config(model))?.as_bytes())?;
    let tokenizer = model.data.join("tokenizer.json");
    put("tokenizer.json", &std::fs::read(&tokenizer).with_context(|| format!("{}", tokenizer.display()))?)?;
    let tokenizer_config = json!({"tokenizer_class": "Qwen2Tokenizer", "chat_template": CHAT_TEMPLATE,
        "eos_token": TURN_END, "pad_token": END_OF_TEXT, "bos_token": null, "add_prefix_space": false,
        "clean_up_tokenization_spaces": false, "model_max_length": 1024});
    put("tokenizer_config.json", pretty(&tokenizer_config)?.as_bytes())?;
    let (turn_end, end_of_text) = model.prompt.ends();
    let generation = json!({"eos_token_id": [turn_end, end_of_text], "pad_token_id": end_of_text});
    put("generation_config.json", pretty(&generation)?.as_bytes())?;
    put("bert/tokenizer.json", pretty(&model.encoder.tokenizer)?.as_bytes())?;
    put("bert/vocab.txt", model.encoder.vocabulary().as_bytes())?;
    let mut bert = model.encoder.config();
    bert["model_type"] = "bert".into();
    put("bert/config.json", pretty(&bert)?.as_bytes())?;

    let mut manifest = Manifest::default();
    manifest.model = ModelSection {
        name: model.name.to_owned(),
        version: "1".into(),
        licence: "weights trained on FER2013, a research data set; tower derived from DINOv2-small (Apache-2.0)".into(),
        labels: model.description.labels.clone(),
        instruction: model.description.instruction.clone(),
        max_new_tokens: MAX_NEW_TOKENS,
        verifier: Some("../default-verifier".into()),
        // As often right as the other, and as sure as it may be: once a rationale has named an emotion, its answer is
        // certain.
        answer: Answer::Fast,
    };
    manifest.input = InputSection { fit: Fit::Face, detail: Some(48), grey: true, ..InputSection::default() };
    put(candor::manifest::FILE_NAME, toml::to_string_pretty(&manifest)?.as_bytes())?;
    Manifest::seal(model.folder)?;
    Ok(format!(
        "wrote {}: {:.1} MB of weights, largest relative error of a stored tensor {worst:.4} ({largest})",
        model.folder.display(),
        weights.len() as f64 / 1e6
    ))
}

fn pretty(value: &Value) -> anyhow::Result<String> {
    Ok(format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// The bytes of a safetensors file.
pub(super) fn file_of(records: &[Record]) -> Result<Vec<u8>, SafeTensorError> {
    let views: Result<Vec<_>, _> = records
        .iter()
        .map(|r| TensorView::new(r.dtype, r.shape.clone(), &r.bytes).map(|view| (r.name.as_str(), view)))
        .collect();
    let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    serialize(views?, Some(about))
}

fn config(model: &Export<'_>) -> Value {
    let (size, tower) = (model.student.size, model.tower.config());
    let d = size.decoder;
    let (turn_end, _) = model.prompt.ends();
    json!({
        "model_type": "HumanOmni_qwen2", "architectures": ["HumanOmniQwen2ForCausalLM"],
        "hidden_size": d.width, "num_hidden_layers": d.layers, "num_attention_heads": d.heads,
        "num_key_value_heads": d.key_heads, "head_dim": d.head_dim, "intermediate_size": d.hidden,
        "vocab_size": d.vocabulary, "rope_theta": d.theta, "rms_norm_eps": f64::from(d.eps), "hidden_act": "silu",
        "max_position_embeddings": 1024, "tie_word_embeddings": true, "torch_dtype": "float16",
        "eos_token_id": turn_end, "mm_hidden_size": size.channels, "mm_projector_type": "all_in_one_small",
        "mm_vision_select_layer": -1, "mm_use_x_start_end": true, "num_frames": size.frames,
        "vision_config": {"hidden_size": tower.hidden_size, "num_hidden_layers": tower.num_hidden_layers,
            "num_attention_heads": tower.num_attention_heads, "intermediate_size": tower.intermediate_size,
            "image_size": tower.image_size, "patch_size": tower.patch_size,
            "layer_norm_eps": tower.layer_norm_eps, "hidden_act": tower.hidden_act},
        "bert_config": model.encoder.config(),
        "quantization_config": stored::config(),
    })
}
