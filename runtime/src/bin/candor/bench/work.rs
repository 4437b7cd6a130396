//! What a run of a stage reads and computes, from the sizes of the model. A multiplication and an addition count as two
//! operations; normalisations and activations are left out.

use std::path::Path;

use anyhow::Result;
use candor::model::config::{AudioConfig, BertConfig, ClassifierConfig, DecoderConfig, ModelConfig};
use candor::weights::Checkpoint;

/// Width of the audio tower's convolutions.
const AUDIO_KERNEL: usize = 3;
/// Mel columns of an audio state, and audio states of an audio token.
const COLUMNS_A_STATE: usize = 2;
const STATES_A_TOKEN: usize = 3;

/// What one run takes, where it is known.
#[derive(Clone, Copy, Default)]
pub(super) struct Work {
    /// Bytes that have to be read, at the size they are stored in.
    pub(super) bytes: Option<f64>,
    pub(super) operations: Option<f64>,
}

/// Stored bytes of a model's parts; none for a tower that lies in a folder of its own.
pub(super) struct Bytes {
    vision: Option<f64>,
    pub(super) projector: Option<f64>,
    audio: Option<f64>,
    decoder: f64,
}

impl Bytes {
    pub(super) fn read(folder: &Path, config: &ModelConfig) -> Result<Self> {
        let checkpoint = Checkpoint::open(folder)?;
        let head = if config.decoder.tied { "model.embed_tokens." } else { "lm_head." };
        let layer = |name: &str| -> Option<usize> {
            name.split_once("vision_model.encoder.layers.")?.1.split('.').next()?.parse().ok()
        };
        let mut bytes = [0usize; 4];
        for name in checkpoint.names() {
            let starts = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
            let part = if starts(&["model.vision_tower."]) {
                // Layers behind the selected one are not computed.
                if layer(name).is_some_and(|layer| layer >= config.vision.used_layers) {
                    continue;
                }
                0
            } else if starts(&["model.mm_projector."]) {
                1
            } else if starts(&["model.audio_tower.", "model.audio_projector."]) {
                2
            } else if starts(&[head, "model.layers.", "model.norm."]) {
                3
            } else {
                continue;
            };
            bytes[part] += checkpoint.raw(name)?.bytes.len();
        }
        let [vision, projector, audio, decoder] = bytes.map(|bytes| bytes as f64);
        let there = |bytes: f64| Some(bytes).filter(|&bytes| bytes > 0.0);
        Ok(Bytes { vision: there(vision), projector: there(projector), audio: there(audio), decoder })
    }

    /// Of a verifier's folder, without its tables, of which a text reads a few rows.
    pub(super) fn of_verifier(folder: &Path) -> Result<f64> {
        let checkpoint = Checkpoint::open(folder)?;
        let mut bytes = 0;
        for name in checkpoint.names().filter(|name| !name.contains(".embeddings.")) {
            bytes += checkpoint.raw(name)?.bytes.len();
        }
        Ok(bytes as f64)
    }
}

pub(super) fn vision(config: &ModelConfig, bytes: &Bytes) -> Work {
    let vision = &config.vision;
    let (frames, patches) = (config.frames as f64, vision.patches() as f64);
    let patch = linear(3 * vision.patch * vision.patch, vision.width);
    let layers = vision.used_layers as f64 * encoder_layer(vision.width, vision.mlp, patches);
    Work { bytes: bytes.vision, operations: Some(frames * patches * (patch + layers)) }
}

/// 30 seconds of sound.
pub(super) fn audio(config: &AudioConfig, decoder_width: usize, bytes: &Bytes) -> Work {
    let AudioConfig { width, mels, positions, .. } = *config;
    let states = positions as f64;
    let first = (COLUMNS_A_STATE * positions) as f64 * linear(AUDIO_KERNEL * mels, width);
    let second = states * linear(AUDIO_KERNEL * width, width);
    let layers = states * config.layers as f64 * encoder_layer(width, config.mlp, states);
    let tokens = (positions / STATES_A_TOKEN) as f64;
    let projector = tokens * (linear(width, decoder_width) + linear(decoder_width, decoder_width));
    Work { bytes: bytes.audio, operations: Some(first + second + layers + projector) }
}

/// A prompt of `length` tokens, and the logits behind its last.
pub(super) fn prefill(config: &DecoderConfig, length: usize, bytes: &Bytes) -> Work {
    let tokens = length as f64;
    // A token attends to those before it and to itself.
    let layers = config.layers as f64 * decoder_layer(config, (tokens + 1.0) / 2.0);
    let head = linear(config.width, config.vocabulary);
    Work { bytes: Some(bytes.decoder), operations: Some(tokens * layers + head) }
}

/// `tokens` tokens, one by one, behind `positions` others. `cache` are the bytes of the cache that they read in all.
pub(super) fn decode(config: &DecoderConfig, positions: usize, tokens: usize, cache: f64, bytes: &Bytes) -> Work {
    let count = tokens as f64;
    let keys = positions as f64 + (count + 1.0) / 2.0;
    let token = config.layers as f64 * decoder_layer(config, keys) + linear(config.width, config.vocabulary);
    Work { bytes: Some(count * bytes.decoder + cache), operations: Some(count * token) }
}

/// `sentences` texts of `length` ids.
pub(super) fn verifier(config: &ClassifierConfig, sentences: usize, length: usize, bytes: f64) -> Work {
    let BertConfig { width, mlp, layers, .. } = config.encoder;
    let (count, ids) = (sentences as f64, length as f64);
    let encoder = ids * layers as f64 * encoder_layer(width, mlp, ids);
    let head = linear(width, width) + linear(width, config.labels.len());
    Work { bytes: Some(count * bytes), operations: Some(count * (encoder + head)) }
}

fn linear(from: usize, to: usize) -> f64 {
    2.0 * from as f64 * to as f64
}

/// One row of a layer that attends to `keys` rows.
fn encoder_layer(width: usize, mlp: usize, keys: f64) -> f64 {
    4.0 * linear(width, width) + 2.0 * linear(width, mlp) + 4.0 * keys * width as f64
}

fn decoder_layer(config: &DecoderConfig, keys: f64) -> f64 {
    let DecoderConfig { width, mlp, .. } = *config;
    let (queries, key_width) = (config.heads * config.head_dim, config.key_heads * config.head_dim);
    let attention = 2.0 * linear(width, queries) + 2.0 * linear(width, key_width) + 4.0 * keys * queries as f64;
    attention + 3.0 * linear(width, mlp)
}
