//! The Qwen2 decoder and its sessions: a key-value cache, the buffers of the forward pass, and roll-back.

use std::sync::Arc;

use candor_kernels::{Activation, AttentionShape, Device, DeviceError};

use super::config::DecoderConfig;
use super::layers::{Bias, Linear, Loader};
use super::rows::allocate;
use super::{DecodeError, LanguageModel, ModelError, Rows};

/// Positions that are computed at once. Longer inputs go through in runs of this length, which bounds the buffers.
const RUN: usize = 128;
/// Positions whose logits are computed at once where all are wanted; vocabularies are large.
const HEAD_RUN: usize = 32;

struct Layer<D: Device> {
    attention_norm: D::Weight,
    query: Linear<D>,
    key: Linear<D>,
    value: Linear<D>,
    output: Linear<D>,
    mlp_norm: D::Weight,
    gate: Linear<D>,
    up: Linear<D>,
    down: Linear<D>,
}

/// The decoder's weights, shared by its sessions.
pub struct Decoder<D: Device> {
    device: D,
    config: DecoderConfig,
    embedding: D::Weight,
    layers: Vec<Layer<D>>,
    norm: D::Weight,
    head: D::Weight,
}

impl<D: Device> Decoder<D> {
    pub(super) fn load(device: &D, root: &Loader<'_, D>, config: &DecoderConfig) -> Result<Self, ModelError> {
        let DecoderConfig { width, vocabulary, mlp, .. } = *config;
        let (queries, keys) = (config.heads * config.head_dim, config.key_heads * config.head_dim);
        let model = root.under("model");
        let embedding = model.weight("embed_tokens.weight", &[vocabulary, width])?;
        let numbered = model.under("layers");
        let mut layers = Vec::new();
        for i in 0..config.layers {
            let l = numbered.under(&i.to_string());
            layers.push(Layer {
                attention_norm: l.weight("input_layernorm.weight", &[width])?,
                query: l.linear("self_attn.q_proj", width, queries, Bias::Each)?,
                key: l.linear("self_attn.k_proj", width, keys, Bias::Each)?,
                value: l.linear("self_attn.v_proj", width, keys, Bias::Each)?,
                output: l.linear("self_attn.o_proj", queries, width, Bias::None)?,
                mlp_norm: l.weight("post_attention_layernorm.weight", &[width])?,
                gate: l.linear("mlp.gate_proj", width, mlp, Bias::None)?,
                up: l.linear("mlp.up_proj", width, mlp, Bias::None)?,
                down: l.linear("mlp.down_proj", mlp, width, Bias::None)?,
            });
        }
        let norm = model.weight("norm.weight", &[width])?;
        let head = match config.tied {
            true => embedding.clone(),
            false => root.weight("lm_head.weight", &[vocabulary, width])?,
        };
        Ok(Decoder { device: device.clone(), config: config.clone(), embedding, layers, norm, head })
    }
}

/// A piece of a prompt.
#[derive(Clone, Copy)]
pub enum Piece<'a, D: Device> {
    /// Token ids.
    Tokens(&'a [u32]),
    /// Embeddings in place of tokens: video or audio tokens, `[n, decoder width]`.
    Rows(&'a Rows<D>),
}

impl<D: Device> Piece<'_, D> {
    /// Positions the piece takes.
    pub fn len(&self) -> usize {
        match self {
            Piece::Tokens(ids) => ids.len(),
            Piece::Rows(rows) => rows.rows(),
        }
    }

    /// Whether it takes none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One sequence in a key-value cache. All memory is taken when the session is made; prompts reuse it.
pub struct Session<D: Device> {
    decoder: Arc<Decoder<D>>,
    capacity: usize,
    position: usize,
    keys: Vec<D::Buffer>,
    values: Vec<D::Buffer>,
    /// The last layer's normed state of every position, from which its logits can be had again.
    states: D::Buffer,
    work: Work<D>,
    last: D::Buffer,
    head_out: D::Buffer,
    logits: Vec<f32>,
}

/// Buffers of a run of positions.
struct Work<D: Device> {
    x: D::Buffer,
    normed: D::Buffer,
    query: D::Buffer,
    key: D::Buffer,
    value: D::Buffer,
    attended: D::Buffer,
    gate: D::Buffer,
    up: D::Buffer,
}

impl<D: Device> Session<D> {
    /// An empty session with room for `capacity` positions, at most what the model was made for.
    pub(super) fn new(decoder: Arc<Decoder<D>>, capacity: usize) -> Result<Self, ModelError> {
        let DecoderConfig { width, layers, head_dim, heads, key_heads, mlp, vocabulary, positions, .. } =
            decoder.config;
        if capacity == 0 || capacity > positions {
            let reason = format!("{capacity}; between 1 and max_position_embeddings {positions} are possible");
            return Err(ModelError::input("session capacity", reason));
        }
        let device = decoder.device.clone();
        let cache =
            || (0..layers).map(|_| allocate(&device, &[capacity, key_heads, head_dim])).collect::<Result<_, _>>();
        let run = capacity.min(RUN);
        let of = |width: usize| allocate(&device, &[run, width]);
        Ok(Session {
            capacity,
            position: 0,
            keys: cache()?,
            values: cache()?,
            states: allocate(&device, &[capacity, width])?,
            work: Work {
                x: of(width)?,
                normed: of(width)?,
                query: of(heads * head_dim)?,
                key: of(key_heads * head_dim)?,
                value: of(key_heads * head_dim)?,
                attended: of(heads * head_dim)?,
                gate: of(mlp)?,
                up: of(mlp)?,
            },
            last: allocate(&device, &[width])?,
            head_out: allocate(&device, &[vocabulary])?,
            logits: vec![0.0; vocabulary],
            decoder,
        })
    }

    /// Forgets everything and reads a prompt. Afterwards [`LanguageModel::logits`] are those behind its last position.
    pub fn start(&mut self, pieces: &[Piece<'_, D>]) -> Result<&[f32], ModelError> {
        self.position = 0;
        let width = self.decoder.config.width;
        let needed: usize = pieces.iter().map(Piece::len).sum();
        if needed == 0 {
            return Err(ModelError::input("prompt", "it is empty"));
        }
        if needed > self.capacity {
            return Err(DecodeError::Full { capacity: self.capacity, needed }.into());
        }
        let mut filled = 0;
        for piece in pieces {
            if let Piece::Rows(rows) = piece
                && rows.width() != width
            {
                let reason = format!("embeddings are {} wide, the decoder is {width}", rows.width());
                return Err(ModelError::input("prompt", reason));
            }
            let mut done = 0;
            while done < piece.len() {
                let n = (piece.len() - done).min(self.run() - filled);
                match piece {
                    Piece::Tokens(ids) => self.embed(&ids[done..done + n], filled)?,
                    Piece::Rows(rows) => {
                        let device = &self.decoder.device;
                        device.copy(&rows.buffer, done * width, &mut self.work.x, filled * width, n * width)?;
                    }
                }
                (done, filled) = (done + n, filled + n);
                if filled == self.run() {
                    self.forward(filled)?;
                    filled = 0;
                }
            }
        }
        if filled > 0 {
            self.forward(filled)?;
        }
        self.compute_logits()?;
        Ok(&self.logits)
    }

    /// The logits behind each of the positions in the cache, `[positions, vocabulary]`. For comparisons: it takes
    /// memory of its own.
    pub fn all_logits(&self) -> Result<Vec<f32>, ModelError> {
        let Decoder { device, config, head, .. } = &*self.decoder;
        let DecoderConfig { width, vocabulary, .. } = *config;
        let mut states = allocate(device, &[HEAD_RUN, width])?;
        let mut scores = allocate(device, &[HEAD_RUN, vocabulary])?;
        let mut logits = vec![0.0; self.position * vocabulary];
        for (i, out) in logits.chunks_mut(HEAD_RUN * vocabulary).enumerate() {
            let rows = out.len() / vocabulary;
            device.copy(&self.states, i * HEAD_RUN * width, &mut states, 0, rows * width)?;
            device.linear(&states, rows, head, None, Activation::Identity, &mut scores)?;
            device.read(&scores, 0, out)?;
        }
        Ok(logits)
    }

    /// What the decoder reads for a prompt, `[positions, width]`, on the host.
    pub fn embeddings(&mut self, pieces: &[Piece<'_, D>]) -> Result<Vec<f32>, ModelError> {
        let width = self.decoder.config.width;
        let mut out = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Tokens(ids) => {
                    for ids in ids.chunks(self.run()) {
                        self.embed(ids, 0)?;
                        let start = out.len();
                        out.resize(start + ids.len() * width, 0.0);
                        self.decoder.device.read(&self.work.x, 0, &mut out[start..])?;
                    }
                }
                Piece::Rows(rows) => out.extend(rows.to_host(&self.decoder.device)?),
            }
        }
        Ok(out)
    }

    /// Positions that one forward pass takes at most.
    fn run(&self) -> usize {
        self.capacity.min(RUN)
    }

    /// Puts embeddings of tokens into row `row` and those behind it.
    fn embed(&mut self, ids: &[u32], row: usize) -> Result<(), DecodeError> {
        let Decoder { device, config, embedding, .. } = &*self.decoder;
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= config.vocabulary) {
            return Err(DecodeError::Token { id, vocabulary: config.vocabulary });
        }
        device.embed(embedding, ids, &mut self.work.x, row * config.width)?;
        Ok(())
    }

    /// Runs the first `rows` rows of `work.x` through every layer, behind what is in the cache.
    fn forward(&mut self, rows: usize) -> Result<(), DeviceError> {
        let Decoder { device, config, layers, norm, .. } = &*self.decoder;
        let DecoderConfig { width, heads, key_heads, head_dim, mlp, theta, eps, .. } = *config;
        let Work { x, normed, query, key, value, attended, gate, up } = &mut self.work;
        let (position, identity) = (self.position, Activation::Identity);
        let key_width = key_heads * head_dim;
        let shape = AttentionShape {
            batch: 1,
            queries: rows,
            keys: position + rows,
            heads,
            key_heads,
            head_dim,
            causal: true,
            scale: 1.0 / (head_dim as f32).sqrt(),
        };
        for ((layer, keys), values) in layers.iter().zip(&mut self.keys).zip(&mut self.values) {
            device.rms_norm(x, rows, &layer.attention_norm, eps, normed)?;
            layer.query.forward(device, normed, rows, identity, query)?;
            layer.key.forward(device, normed, rows, identity, key)?;
            layer.value.forward(device, normed, rows, identity, value)?;
            device.rope(query, rows, heads, head_dim, position, theta)?;
            device.rope(key, rows, key_heads, head_dim, position, theta)?;
            device.copy(key, 0, keys, position * key_width, rows * key_width)?;
            device.copy(value, 0, values, position * key_width, rows * key_width)?;
            device.attention(query, keys, values, shape, attended)?;
            layer.output.forward(device, attended, rows, identity, normed)?;
            device.add(x, normed, rows * width)?;
            device.rms_norm(x, rows, &layer.mlp_norm, eps, normed)?;
            layer.gate.forward(device, normed, rows, Activation::Silu, gate)?;
            layer.up.forward(device, normed, rows, identity, up)?;
            device.multiply(gate, up, rows * mlp)?;
            layer.down.forward(device, gate, rows, identity, normed)?;
            device.add(x, normed, rows * width)?;
        }
        device.rms_norm(x, rows, norm, eps, normed)?;
        device.copy(normed, 0, &mut self.states, position * width, rows * width)?;
        self.position += rows;
        Ok(())
    }

    /// The output head over the state of the last position.
    fn compute_logits(&mut self) -> Result<(), DeviceError> {
        let Decoder { device, config, head, .. } = &*self.decoder;
        device.copy(&self.states, (self.position - 1) * config.width, &mut self.last, 0, config.width)?;
        device.linear(&self.last, 1, head, None, Activation::Identity, &mut self.head_out)?;
        device.read(&self.head_out, 0, &mut self.logits)
    }
}

impl<D: Device> LanguageModel for Session<D> {
    fn vocabulary(&self) -> usize {
        self.logits.len()
    }

    fn position(&self) -> usize {
        self.position
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn append(&mut self, tokens: &[u32]) -> Result<&[f32], DecodeError> {
        let needed = self.position.saturating_add(tokens.len());
        if tokens.is_empty() {
            return Err(DecodeError::NoTokens);
        }
        if needed > self.capacity {
            return Err(DecodeError::Full { capacity: self.capacity, needed });
        }
        let vocabulary = self.vocabulary();
        if let Some(&id) = tokens.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(DecodeError::Token { id, vocabulary });
        }
        for ids in tokens.chunks(self.run()) {
            self.embed(ids, 0)?;
            self.forward(ids.len())?;
        }
        self.compute_logits()?;
        Ok(&self.logits)
    }

    fn logits(&self) -> &[f32] {
        &self.logits
    }

    fn truncate(&mut self, position: usize) -> Result<(), DecodeError> {
        if position == 0 || position > self.position {
            return Err(DecodeError::Truncate { position, held: self.position });
        }
        if position < self.position {
            self.position = position;
            self.compute_logits()?;
        }
        Ok(())
    }
}
