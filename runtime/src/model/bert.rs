//! BERT and RoBERTa encoders: word-piece ids to one state an id.

use candor_kernels::Device;

use super::ModelError;
use super::config::BertConfig;
use super::encoder::{Encoder, EncoderShape, Names, NormOrder};
use super::layers::{Bias, LayerNorm, Loader};
use super::rows::{allocate, grow};

const NAMES: Names = Names {
    query: "attention.self.query",
    key: "attention.self.key",
    value: "attention.self.value",
    output: "attention.output.dense",
    attention_norm: "attention.output.LayerNorm",
    up: "intermediate.dense",
    down: "output.dense",
    mlp_norm: "output.LayerNorm",
};

/// The encoder with the buffers of its forward pass.
pub struct Bert<D: Device> {
    config: BertConfig,
    words: D::Weight,
    positions: D::Weight,
    types: D::Weight,
    norm: LayerNorm<D>,
    encoder: Encoder<D>,
    indices: Vec<u32>,
    states: D::Buffer,
    summand: D::Buffer,
}

impl<D: Device> Bert<D> {
    pub(super) fn load(device: &D, loader: &Loader<'_, D>, config: &BertConfig) -> Result<Self, ModelError> {
        let embeddings = loader.under("embeddings");
        let width = config.width;
        let shape = EncoderShape {
            width,
            heads: config.heads,
            mlp: config.mlp,
            layers: config.layers,
            eps: config.eps,
            activation: config.activation,
            order: NormOrder::After,
            key_bias: Bias::Each,
        };
        Ok(Bert {
            words: embeddings.weight("word_embeddings.weight", &[config.vocabulary, width])?,
            positions: embeddings.weight("position_embeddings.weight", &[config.positions, width])?,
            types: embeddings.weight("token_type_embeddings.weight", &[config.types, width])?,
            norm: embeddings.layer_norm("LayerNorm", width, config.eps)?,
            encoder: Encoder::load(device, &loader.under("encoder").under("layer"), &NAMES, shape)?,
            config: config.clone(),
            indices: Vec::new(),
            states: allocate(device, &[0])?,
            summand: allocate(device, &[0])?,
        })
    }

    /// Rows of the table of words.
    pub(super) fn vocabulary(&self) -> usize {
        self.config.vocabulary
    }

    /// The longest text that positions suffice for.
    pub(super) fn capacity(&self) -> usize {
        self.config.positions - self.config.padding.map_or(0, |p| p as usize + 1)
    }

    /// Ids of one text → states `[ids, width]`, the first row being that of `[CLS]` or `<s>`.
    pub(super) fn forward(&mut self, device: &D, ids: &[u32]) -> Result<&D::Buffer, ModelError> {
        let (rows, width) = (ids.len(), self.config.width);
        if rows == 0 || rows > self.capacity() {
            let reason = format!("{rows} ids; between 1 and {} are possible", self.capacity());
            return Err(ModelError::input("text", reason));
        }
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.config.vocabulary) {
            let reason = format!("id {id} is outside the vocabulary of {}", self.config.vocabulary);
            return Err(ModelError::input("text", reason));
        }
        grow(device, &mut self.states, &[rows, width])?;
        grow(device, &mut self.summand, &[rows, width])?;
        device.embed(&self.words, ids, &mut self.states, 0)?;
        positions(&mut self.indices, ids, self.config.padding);
        device.embed(&self.positions, &self.indices, &mut self.summand, 0)?;
        device.add(&mut self.states, &self.summand, rows * width)?;
        self.indices.fill(0);
        device.embed(&self.types, &self.indices, &mut self.summand, 0)?;
        device.add(&mut self.states, &self.summand, rows * width)?;
        self.norm.forward(device, &self.states, rows, &mut self.summand)?;
        device.copy(&self.summand, 0, &mut self.states, 0, rows * width)?;
        self.encoder.forward(device, &mut self.states, 1, rows)?;
        Ok(&self.states)
    }
}

/// BERT counts positions from 0. RoBERTa counts those of ids that are no padding, from the padding's id + 1, and
/// leaves padding itself at its id.
fn positions(out: &mut Vec<u32>, ids: &[u32], padding: Option<u32>) {
    out.clear();
    match padding {
        None => out.extend(0..ids.len() as u32),
        Some(padding) => {
            let mut next = padding;
            out.extend(ids.iter().map(|&id| {
                if id == padding {
                    return padding;
                }
                next += 1;
                next
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::positions;

    #[test]
    fn roberta_positions_skip_padding() {
        let mut out = Vec::new();
        positions(&mut out, &[0, 9, 1, 8, 2], Some(1));
        assert_eq!(out, [2, 3, 1, 4, 5]);
        positions(&mut out, &[0, 9, 1], None);
        assert_eq!(out, [0, 1, 2]);
    }
}
