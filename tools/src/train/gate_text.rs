//! The small BERT that reads the instruction for the gate. Its weights are drawn once and stay; the instruction is a
//! constant of the model, so its state is one too, and the gate behind it is what is trained.

use super::encoder::{Affine, BERT_NAMES, Encoder, EncoderBuffers, EncoderSize, NormPlace, Sequences};
use super::parameters::{Plan, Treatment};
use crate::quantize::stored::Stored;
use anyhow::anyhow;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};
use std::ops::Range;
use tokenizers::Tokenizer;

const WIDTH: usize = 64;
const LAYERS: usize = 2;
const HEADS: usize = 2;
const HIDDEN: usize = 128;
const POSITIONS: usize = 512;
const EPS: f32 = 1e-12;
const SPECIAL: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];

/// The encoder, its weights and its word-piece tokenizer.
pub struct InstructionEncoder {
    /// Which tensor lies where, under the names of the published checkpoints.
    pub plan: Plan,
    /// The weights, already rounded to what a model folder holds.
    pub values: Vec<f32>,
    /// tokenizer.json of the word pieces.
    pub tokenizer: Value,
    pieces: Vec<String>,
    words: Range<usize>,
    positions: Range<usize>,
    types: Range<usize>,
    norm: Affine,
    encoder: Encoder,
}

impl InstructionEncoder {
    /// Draws the weights with a seed; every word of `instruction` becomes a word piece beside the letters.
    pub fn new(instruction: &str, seed: u64) -> Self {
        let pieces = word_pieces(instruction);
        let mut plan = Plan::default();
        let still = Treatment { decay: false, rate: 0.0 };
        let name = |part: &str| format!("model.bert_model.embeddings.{part}");
        let words = plan.add(name("word_embeddings.weight"), &[pieces.len(), WIDTH], still);
        let positions = plan.add(name("position_embeddings.weight"), &[POSITIONS, WIDTH], still);
        let types = plan.add(name("token_type_embeddings.weight"), &[2, WIDTH], still);
        let norm = Affine::norm(&mut plan, &name("LayerNorm"), WIDTH, 0.0);
        let size = EncoderSize {
            width: WIDTH,
            heads: HEADS,
            hidden: HIDDEN,
            layers: LAYERS,
            eps: EPS,
            norm: NormPlace::After,
        };
        let encoder = Encoder::new(&mut plan, "model.bert_model.encoder.layer", &BERT_NAMES, size, |_| 0.0);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut values = vec![0.0; plan.len()];
        for entry in plan.entries() {
            let own = &mut values[entry.range.clone()];
            match entry.shape.len() {
                1 if entry.name.ends_with("LayerNorm.weight") => own.fill(1.0),
                1 => {}
                _ => own.iter_mut().for_each(|v| *v = rng.random_range(-0.15..0.15)),
            }
            own.copy_from_slice(&Stored::new(&entry.name, &entry.shape, own).values());
        }
        let tokenizer = tokenizer_json(&pieces);
        Self { plan, values, tokenizer, pieces, words, positions, types, norm, encoder }
    }

    /// `bert_config` of config.json.
    pub fn config(&self) -> Value {
        json!({"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
            "intermediate_size": HIDDEN, "vocab_size": self.pieces.len(), "max_position_embeddings": POSITIONS,
            "type_vocab_size": 2, "layer_norm_eps": EPS, "hidden_act": "gelu"})
    }

    /// vocab.txt: one piece a line.
    pub fn vocabulary(&self) -> String {
        self.pieces.iter().map(|piece| format!("{piece}\n")).collect()
    }

    /// The state of `[CLS]` over the instruction, `[width]`.
    pub fn state(&self, instruction: &str) -> anyhow::Result<Vec<f32>> {
        let failed = |e: tokenizers::Error| anyhow!("the instruction's word pieces: {e}");
        let tokenizer: Tokenizer = self.tokenizer.to_string().parse().map_err(failed)?;
        let ids = tokenizer.encode(instruction, true).map_err(failed)?.get_ids().to_vec();
        let table = |range: &Range<usize>, row: usize| &self.values[range.start + row * WIDTH..][..WIDTH];
        let mut x = Vec::with_capacity(ids.len() * WIDTH);
        for (position, id) in ids.iter().take(POSITIONS).enumerate() {
            let (word, place) = (table(&self.words, *id as usize), table(&self.positions, position));
            x.extend(word.iter().zip(place).zip(table(&self.types, 0)).map(|((w, p), t)| w + p + t));
        }
        let rows = x.len() / WIDTH;
        let mut normal = vec![0.0; x.len()];
        self.norm.layer_norm(&self.values, &x, EPS, &mut normal, &mut vec![0.0; 2 * rows]);
        let mut buffers = EncoderBuffers::default();
        self.encoder.forward(&self.values, &normal, Sequences { tokens: rows, visible: &[rows] }, &mut buffers);
        Ok(buffers.output()[..WIDTH].to_vec())
    }

    /// Elements of a state.
    pub fn width(&self) -> usize {
        WIDTH
    }
}

/// Special pieces, the instruction's words, and every printable ASCII letter alone and as a continuation.
fn word_pieces(instruction: &str) -> Vec<String> {
    let mut pieces: Vec<String> = SPECIAL.map(String::from).to_vec();
    let letters = ('!'..='~').filter(|c| !c.is_ascii_uppercase());
    for letter in letters {
        pieces.push(letter.to_string());
        if letter.is_ascii_alphanumeric() {
            pieces.push(format!("##{letter}"));
        }
    }
    for word in instruction.to_lowercase().split(|c: char| !c.is_alphanumeric()).filter(|w| w.len() > 1) {
        if !pieces.iter().any(|piece| piece == word) {
            pieces.push(word.to_owned());
        }
    }
    pieces
}

fn tokenizer_json(pieces: &[String]) -> Value {
    let vocabulary: Map<String, Value> = pieces.iter().enumerate().map(|(id, p)| (p.clone(), id.into())).collect();
    let added: Vec<Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    let special = |id: usize| json!({"SpecialToken": {"id": SPECIAL[id], "type_id": 0}});
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let token = |id: usize| json!({"id": SPECIAL[id], "ids": [id], "tokens": [SPECIAL[id]]});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [special(2), sequence("A"), special(3)],
            "pair": [special(2), sequence("A"), special(3), sequence("B"), special(3)],
            "special_tokens": {SPECIAL[2]: token(2), SPECIAL[3]: token(3)}},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": SPECIAL[1], "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocabulary},
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_state_follows_the_instruction_alone() {
        let instruction = "Which emotion does the face show, and why?";
        let encoder = InstructionEncoder::new(instruction, 7);
        let state = encoder.state(instruction).unwrap();
        assert_eq!(state, InstructionEncoder::new(instruction, 7).state(instruction).unwrap());
        assert_ne!(state, encoder.state("Say something else!").unwrap());
        assert!(state.iter().all(|v| v.is_finite()));
        let tokenizer: Tokenizer = encoder.tokenizer.to_string().parse().unwrap();
        let tokens = tokenizer.encode("Which Emotion?", true).unwrap().get_tokens().to_vec();
        assert_eq!(tokens, ["[CLS]", "which", "emotion", "?", "[SEP]"]);
    }
}
