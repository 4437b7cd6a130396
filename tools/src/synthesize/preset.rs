//! The sizes of published models, as their config.json states them.

use anyhow::bail;
use serde_json::{Value, json};

/// The `model_type` of a verifier's folder.
pub(super) const CLASSIFIER: &str = "roberta";
/// Labels of the published verifier (GoEmotions).
const LABELS: usize = 28;

/// A published model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Preset {
    /// HumanOmni 0.5B: SigLIP base, BERT base, Qwen2 0.5B.
    #[value(name = "humanomni-0.5b")]
    HumanOmni,
    /// The verifier: RoBERTa base with a classification head.
    VerifierBase,
}

impl Preset {
    pub(super) fn name(self) -> &'static str {
        match self {
            Preset::HumanOmni => "humanomni-0.5b",
            Preset::VerifierBase => "verifier-base",
        }
    }

    /// config.json, with the audio tower's sizes if it is wanted.
    pub(super) fn config(self, audio: bool) -> anyhow::Result<Value> {
        match (self, audio) {
            (Preset::HumanOmni, audio) => {
                let mut config = human_omni();
                if audio {
                    config["audio_config"] = whisper_large_v3();
                    config["mm_audio_projector_type"] = "mlp2x_gelu".into();
                }
                Ok(config)
            }
            (Preset::VerifierBase, false) => Ok(verifier_base()),
            (Preset::VerifierBase, true) => bail!("a verifier has no audio tower; leave out --audio"),
        }
    }
}

fn human_omni() -> Value {
    json!({
        "model_type": "HumanOmni_qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 4864, "vocab_size": 151_936,
        "rope_theta": 1e6, "rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 32768,
        "tie_word_embeddings": true, "num_frames": 8, "mm_hidden_size": 768,
        "mm_projector_type": "all_in_one_small", "mm_vision_select_layer": -2, "mm_use_x_start_end": true,
        "vision_config": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
            "intermediate_size": 3072, "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh"},
        "bert_config": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
            "intermediate_size": 3072, "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2},
    })
}

fn whisper_large_v3() -> Value {
    json!({"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120,
        "num_mel_bins": 128, "max_source_positions": 1500, "activation_function": "gelu"})
}

fn verifier_base() -> Value {
    let labels: serde_json::Map<String, Value> =
        (0..LABELS).map(|label| (label.to_string(), format!("label {label}").into())).collect();
    json!({
        "model_type": CLASSIFIER, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
        "pad_token_id": 1, "layer_norm_eps": 1e-5, "id2label": labels,
    })
}
