//! The Qwen2 decoder and its sessions: a key-value cache, the buffers of the forward pass, and roll-back.

use std::sync::Arc;

use candor_kernels::{
    Activation, Allowed, AttentionShape, CacheType, Choice, DecoderBuffers, DecoderLayer, Device, DeviceError,
    HostTensor, Rounding,
};

use super::adapter::{Adapter, AdapterError};
use super::config::DecoderConfig;
use super::head::Head;
use super::held::Held;
use super::layers::{Bias, Linear, Loader};
use super::rows::allocate;
use super::{DecodeError, LanguageModel, ModelError, Rows};

/// Positions that are computed at once. Longer inputs go through in runs of this length, which bounds the buffers.
const RUN: usize = 128;
/// Fewer positions than this are not kept for the next prompt: what a cache of bytes takes off its keys comes from the
/// first keys of a sequence, and must be that of the prompt.
const KEPT: usize = 16;
/// Positions whose logits are computed at once where all are wanted; vocabularies are large.
const HEAD_RUN: usize = 32;

#[derive(Clone)]
struct Layer<D: Device> {
    attention_norm: D::Weight,
    query: Projection<D>,
    key: Projection<D>,
    value: Projection<D>,
    output: Projection<D>,
    mlp_norm: D::Weight,
    gate: Projection<D>,
    up: Projection<D>,
    down: Projection<D>,
}

impl<D: Device> Layer<D> {
    /// The projections with their names below the layer's.
    fn projections(&mut self) -> [(&'static str, &mut Projection<D>); 7] {
        [
            ("self_attn.q_proj", &mut self.query),
            ("self_attn.k_proj", &mut self.key),
            ("self_attn.v_proj", &mut self.value),
            ("self_attn.o_proj", &mut self.output),
            ("mlp.gate_proj", &mut self.gate),
            ("mlp.up_proj", &mut self.up),
            ("mlp.down_proj", &mut self.down),
        ]
    }

    /// The layer for [`Device::decoder_layer`], where no adapter is beside any projection.
    fn whole(&self, config: &DecoderConfig) -> Option<DecoderLayer<'_, D::Weight>> {
        let attending = [&self.query, &self.key, &self.value];
        if attending.iter().any(|projection| projection.low_rank.is_some()) {
            return None;
        }
        Some(DecoderLayer {
            attention_norm: &self.attention_norm,
            projections: attending.map(|projection| {
                let (weight, bias, _) = projection.linear.with(Activation::Identity);
                (weight, bias)
            }),
            output: self.output.plain()?,
            mlp_norm: &self.mlp_norm,
            gate: self.gate.plain()?,
            up: self.up.plain()?,
            down: self.down.plain()?,
            heads: [config.heads, config.key_heads],
            head_dim: config.head_dim,
            eps: config.eps,
            theta: config.theta,
            scale: config.attention_scale(),
        })
    }
}

/// How the positions of a pass see others.
pub(super) trait Mix<D: Device> {
    /// Turns the queries, keys and values of layer `index` into what they attend to.
    fn mix(&mut self, index: usize, work: &mut Work<D>) -> Result<(), DeviceError>;
    /// Takes everything through layer `index` at once; false if that was not possible and nothing was done.
    fn whole_layer(
        &mut self,
        index: usize,
        layer: &DecoderLayer<'_, D::Weight>,
        work: &mut Work<D>,
    ) -> Result<bool, DeviceError> {
        let _ = (index, layer, work);
        Ok(false)
    }
}

impl<D: Device, F: FnMut(usize, &mut Work<D>) -> Result<(), DeviceError>> Mix<D> for F {
    fn mix(&mut self, index: usize, work: &mut Work<D>) -> Result<(), DeviceError> {
        self(index, work)
    }
}

/// The last positions of one sequence.
struct Sequence<'a, D: Device> {
    device: &'a D,
    caches: &'a mut [D::Cache],
    shape: AttentionShape,
    theta: f32,
}

impl<D: Device> Mix<D> for Sequence<'_, D> {
    fn mix(&mut self, index: usize, work: &mut Work<D>) -> Result<(), DeviceError> {
        let (AttentionShape { queries, keys, heads, key_heads, head_dim, .. }, theta) = (self.shape, self.theta);
        let Work { query, key, value, attended, .. } = work;
        let (cache, heads) = (&mut self.caches[index], [heads, key_heads]);
        self.device.rope_and_write(query, key, value, queries, heads, head_dim, cache, keys - queries, theta)?;
        self.device.cache_attention(query, cache, self.shape, attended)
    }

    fn whole_layer(
        &mut self,
        index: usize,
        layer: &DecoderLayer<'_, D::Weight>,
        work: &mut Work<D>,
    ) -> Result<bool, DeviceError> {
        if self.shape.queries != 1 {
            return Ok(false);
        }
        let Work { x, query, key, value, attended, gate, .. } = work;
        let buffers = DecoderBuffers { x, query, key, value, attended, gate };
        self.device.decoder_layer(layer, buffers, &mut self.caches[index], self.shape.keys - 1)
    }
}

/// A linear layer of the decoder and what an adapter puts beside it.
#[derive(Clone)]
struct Projection<D: Device> {
    linear: Linear<D>,
    inputs: usize,
    outputs: usize,
    low_rank: Option<LowRank<D>>,
}

#[derive(Clone)]
struct LowRank<D: Device> {
    rank: usize,
    /// `[rank, in]`
    a: D::Weight,
    /// `[out, rank]`
    b: D::Weight,
}

/// Buffers of the adapters' branches; empty without adapters.
struct LowRankWork<D: Device> {
    inner: D::Buffer,
    branch: D::Buffer,
}

impl<D: Device> Projection<D> {
    /// x `[rows, in]` → out `[rows, out]`.
    fn forward(
        &self,
        device: &D,
        x: &D::Buffer,
        rows: usize,
        activation: Activation,
        work: &mut LowRankWork<D>,
        out: &mut D::Buffer,
    ) -> Result<(), DeviceError> {
        let Some(LowRank { a, b, .. }) = &self.low_rank else {
            return self.linear.forward(device, x, rows, activation, out);
        };
        let (identity, elements) = (Activation::Identity, rows * self.outputs);
        self.linear.forward(device, x, rows, identity, out)?;
        device.linear(x, rows, a, None, identity, &mut work.inner)?;
        device.linear(&work.inner, rows, b, None, identity, &mut work.branch)?;
        device.add(out, &work.branch, elements)?;
        match activation {
            Activation::Identity => Ok(()),
            activation => device.activate(activation, out, elements),
        }
    }

    /// x `[rows, out]` += what comes of y `[rows, in]`.
    fn add(
        &self,
        device: &D,
        y: &D::Buffer,
        rows: usize,
        work: &mut LowRankWork<D>,
        scratch: &mut D::Buffer,
        x: &mut D::Buffer,
    ) -> Result<(), DeviceError> {
        let elements = rows * self.outputs;
        if self.low_rank.is_none() {
            return self.linear.add(device, y, rows, elements, scratch, x);
        }
        self.forward(device, y, rows, Activation::Identity, work, scratch)?;
        device.add(x, scratch, elements)
    }

    /// The weight, where there is nothing else.
    fn plain(&self) -> Option<&D::Weight> {
        match self.linear.with(Activation::Identity) {
            (weight, None, _) if self.low_rank.is_none() => Some(weight),
            _ => None,
        }
    }
}

/// The gated projections of x, `silu(gate) · up`, in the first of outs.
fn forward_gated<D: Device>(
    device: &D,
    x: &D::Buffer,
    rows: usize,
    [gate, up]: [&Projection<D>; 2],
    work: &mut LowRankWork<D>,
    [out, scratch]: [&mut D::Buffer; 2],
) -> Result<(), DeviceError> {
    let elements = rows * gate.outputs;
    if let (Some(gate), Some(up)) = (gate.plain(), up.plain()) {
        return device.linear_gated(x, rows, gate, up, Activation::Silu, elements, scratch, out);
    }
    let each = [(gate, Activation::Silu), (up, Activation::Identity)];
    forward_each(device, x, rows, each, work, [&mut *out, &mut *scratch])?;
    device.multiply(out, scratch, elements)
}

/// Several projections of one x, at once where no adapter is beside any of them.
fn forward_each<D: Device, const N: usize>(
    device: &D,
    x: &D::Buffer,
    rows: usize,
    projections: [(&Projection<D>, Activation); N],
    work: &mut LowRankWork<D>,
    mut outs: [&mut D::Buffer; N],
) -> Result<(), DeviceError> {
    if projections.iter().all(|(projection, _)| projection.low_rank.is_none()) {
        let layers = projections.map(|(projection, activation)| projection.linear.with(activation));
        return device.linear_each(x, rows, &layers, &mut outs);
    }
    for ((projection, activation), out) in projections.into_iter().zip(outs) {
        projection.forward(device, x, rows, activation, work, out)?;
    }
    Ok(())
}

/// The decoder's weights, shared by its sessions.
#[derive(Clone)]
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
            let projection = |name: &str, inputs: usize, outputs: usize, bias: Bias| {
                let linear = l.linear(name, inputs, outputs, bias)?;
                Ok::<_, ModelError>(Projection { linear, inputs, outputs, low_rank: None })
            };
            layers.push(Layer {
                attention_norm: l.weight("input_layernorm.weight", &[width])?,
                query: projection("self_attn.q_proj", width, queries, Bias::Each)?,
                key: projection("self_attn.k_proj", width, keys, Bias::Each)?,
                value: projection("self_attn.v_proj", width, keys, Bias::Each)?,
                output: projection("self_attn.o_proj", queries, width, Bias::None)?,
                mlp_norm: l.weight("post_attention_layernorm.weight", &[width])?,
                gate: projection("mlp.gate_proj", width, mlp, Bias::None)?,
                up: projection("mlp.up_proj", width, mlp, Bias::None)?,
                down: projection("mlp.down_proj", mlp, width, Bias::None)?,
            });
        }
        let norm = model.weight("norm.weight", &[width])?;
        let head = match config.tied {
            true => embedding.clone(),
            false => root.weight("lm_head.weight", &[vocabulary, width])?,
        };
        Ok(Decoder { device: device.clone(), config: config.clone(), embedding, layers, norm, head })
    }

    /// The same weights with an adapter beside them.
    pub(super) fn adapted(&self, adapter: &Adapter) -> Result<Self, ModelError> {
        let mut decoder = self.clone();
        let Decoder { device, config, embedding, layers, norm, head } = &mut decoder;
        let device = &*device;
        let upload = |name: &str, tensor: &HostTensor| {
            device.weight(tensor).map_err(|source| ModelError::Upload { tensor: name.to_owned(), source })
        };
        let known = std::cell::RefCell::new(std::collections::BTreeSet::new());
        let replace = |name: String, shape: &[usize], weight: &mut D::Weight| -> Result<(), ModelError> {
            if let Some(tensor) = adapter.replacement(&name) {
                if tensor.shape() != shape {
                    let reason = format!("{name} is {:?}, the model's is {shape:?}", tensor.shape());
                    return Err(ModelError::input("adapter", reason));
                }
                *weight = upload(&name, tensor)?;
            }
            known.borrow_mut().insert(name);
            Ok(())
        };
        let (width, vocabulary) = (config.width, config.vocabulary);
        replace("model.embed_tokens.weight".into(), &[vocabulary, width], embedding)?;
        replace("model.norm.weight".into(), &[width], norm)?;
        match config.tied {
            true => *head = embedding.clone(),
            false => replace("lm_head.weight".into(), &[vocabulary, width], head)?,
        }
        for (index, layer) in layers.iter_mut().enumerate() {
            let of_layer = |name: &str| format!("model.layers.{index}.{name}");
            replace(of_layer("input_layernorm.weight"), &[width], &mut layer.attention_norm)?;
            replace(of_layer("post_attention_layernorm.weight"), &[width], &mut layer.mlp_norm)?;
            for (name, projection) in layer.projections() {
                let module = of_layer(name);
                let (inputs, outputs) = (projection.inputs, projection.outputs);
                let (weight, bias) = projection.linear.parts();
                replace(format!("{module}.weight"), &[outputs, inputs], weight)?;
                if let Some(bias) = bias {
                    replace(format!("{module}.bias"), &[outputs], bias)?;
                }
                if let Some(low_rank) = adapter.beside(&module, inputs, outputs)? {
                    let (a, b) = (upload(&module, &low_rank.a)?, upload(&module, &low_rank.b)?);
                    projection.low_rank = Some(LowRank { rank: low_rank.rank(), a, b });
                }
                known.borrow_mut().insert(module);
            }
        }
        adapter.finish(|name| known.borrow().contains(name))?;
        Ok(decoder)
    }

    /// Sizes.
    pub(super) fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The device.
    pub(super) fn device(&self) -> &D {
        &self.device
    }

    /// Caches hold what activations are rounded to for products with the weights.
    fn cache_type(&self) -> CacheType {
        let rounding = |layer: &Layer<D>| self.device.rounding(layer.query.linear.with(Activation::Identity).0);
        match self.layers.first().map_or(Rounding::None, rounding) {
            Rounding::None => CacheType::F32,
            Rounding::Halves => CacheType::F16,
            Rounding::Bytes => CacheType::I8,
        }
    }

    /// A cache for each layer.
    pub(super) fn caches(&self, capacity: usize) -> Result<Vec<D::Cache>, ModelError> {
        let DecoderConfig { key_heads, head_dim, .. } = self.config;
        let kind = self.cache_type();
        Ok(self
            .layers
            .iter()
            .map(|_| self.device.cache(kind, capacity, key_heads, head_dim))
            .collect::<Result<_, _>>()?)
    }

    /// What the last `queries` of `keys` positions see.
    pub(super) fn attention(&self, queries: usize, keys: usize) -> AttentionShape {
        let DecoderConfig { heads, key_heads, head_dim, .. } = self.config;
        let scale = self.config.attention_scale();
        AttentionShape {
            batch: 1,
            queries,
            keys,
            heads,
            key_heads,
            head_dim,
            causal: true,
            scale,
            rounding: Rounding::None,
        }
    }

    /// Buffers for `rows` positions at once.
    pub(super) fn work(&self, rows: usize) -> Result<Work<D>, ModelError> {
        let DecoderConfig { width, head_dim, heads, key_heads, mlp, .. } = self.config;
        let projections = || {
            self.layers
                .iter()
                .cloned()
                .flat_map(|mut l| l.projections().map(|(_, p)| (p.low_rank.as_ref().map(|l| l.rank), p.outputs)))
        };
        let rank = projections().filter_map(|(rank, _)| rank).max().unwrap_or(0);
        let outputs = projections().filter(|(rank, _)| rank.is_some()).map(|(_, outputs)| outputs).max().unwrap_or(0);
        let of = |width: usize| allocate(&self.device, &[rows, width]);
        Ok(Work {
            x: of(width)?,
            normed: of(width)?,
            query: of(heads * head_dim)?,
            key: of(key_heads * head_dim)?,
            value: of(key_heads * head_dim)?,
            attended: of(heads * head_dim)?,
            gate: of(mlp)?,
            up: of(mlp)?,
            low_rank: LowRankWork { inner: of(rank)?, branch: of(outputs)? },
        })
    }

    /// Puts embeddings of tokens into row `row` of `work` and those behind it.
    pub(super) fn embed(&self, ids: &[u32], work: &mut Work<D>, row: usize) -> Result<(), DecodeError> {
        let DecoderConfig { width, vocabulary, .. } = self.config;
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(DecodeError::Token { id, vocabulary });
        }
        self.device.embed(&self.embedding, ids, &mut work.x, row * width)?;
        Ok(())
    }

    /// Runs the first `rows` rows of `work` through every layer; the normed last states are in `work.normed` then.
    pub(super) fn forward(&self, work: &mut Work<D>, rows: usize, mut mix: impl Mix<D>) -> Result<(), DeviceError> {
        let Decoder { device, config, layers, norm, .. } = self;
        let eps = config.eps;
        let identity = Activation::Identity;
        for (index, layer) in layers.iter().enumerate() {
            if let Some(whole) = layer.whole(config)
                && mix.whole_layer(index, &whole, work)?
            {
                continue;
            }
            let Work { x, normed, query, key, value, low_rank, .. } = &mut *work;
            device.rms_norm(x, rows, &layer.attention_norm, eps, normed)?;
            let each = [(&layer.query, identity), (&layer.key, identity), (&layer.value, identity)];
            forward_each(device, normed, rows, each, low_rank, [query, key, value])?;
            mix.mix(index, work)?;
            let Work { x, normed, attended, gate, up, low_rank, .. } = &mut *work;
            layer.output.add(device, attended, rows, low_rank, normed, x)?;
            device.rms_norm(x, rows, &layer.mlp_norm, eps, normed)?;
            forward_gated(device, normed, rows, [&layer.gate, &layer.up], low_rank, [gate, up])?;
            layer.down.add(device, gate, rows, low_rank, normed, x)?;
        }
        let Work { x, normed, .. } = work;
        device.rms_norm(x, rows, norm, eps, normed)
    }

    /// Normed states `[rows, width]` → logits `[rows, vocabulary]`.
    pub(super) fn logits(&self, states: &D::Buffer, rows: usize, out: &mut D::Buffer) -> Result<(), DeviceError> {
        self.device.linear(states, rows, &self.head, None, Activation::Identity, out)
    }
}

impl From<AdapterError> for ModelError {
    fn from(error: AdapterError) -> Self {
        ModelError::Adapter(Box::new(error))
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
    /// Keys and values, one cache a layer.
    caches: Vec<D::Cache>,
    /// The last layer's normed state of every position, from which its logits can be had again.
    states: D::Buffer,
    held: Held,
    reading: Reading,
    work: Work<D>,
    /// Passes of one token.
    replay: D::Replay,
    last: D::Buffer,
    /// The logits behind the last position.
    head_out: D::Buffer,
    /// Where only some rows of the output head are computed.
    head: Option<Head<D>>,
    /// The logits on the host, once they were asked for.
    logits: Vec<f32>,
    are_read: bool,
}

/// How much a session has read since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Positions that went through the layers.
    pub positions: u64,
    /// Passes through the layers, of one or more positions each.
    pub passes: u64,
}

/// Buffers of a run of positions.
pub(super) struct Work<D: Device> {
    pub(super) x: D::Buffer,
    pub(super) normed: D::Buffer,
    pub(super) query: D::Buffer,
    pub(super) key: D::Buffer,
    pub(super) value: D::Buffer,
    pub(super) attended: D::Buffer,
    gate: D::Buffer,
    up: D::Buffer,
    low_rank: LowRankWork<D>,
}

impl<D: Device> Session<D> {
    /// An empty session with room for `capacity` positions, at most what the model was made for.
    pub(super) fn new(decoder: Arc<Decoder<D>>, capacity: usize) -> Result<Self, ModelError> {
        let DecoderConfig { width, vocabulary, positions, .. } = decoder.config;
        if capacity == 0 || capacity > positions {
            let reason = format!("{capacity}; between 1 and max_position_embeddings {positions} are possible");
            return Err(ModelError::input("session capacity", reason));
        }
        let device = decoder.device.clone();
        Ok(Session {
            capacity,
            position: 0,
            caches: decoder.caches(capacity)?,
            states: allocate(&device, &[capacity, width])?,
            held: Held::with_capacity(capacity),
            reading: Reading::default(),
            work: decoder.work(capacity.min(RUN))?,
            replay: D::Replay::default(),
            last: allocate(&device, &[width])?,
            head_out: allocate(&device, &[vocabulary])?,
            head: None,
            logits: vec![0.0; vocabulary],
            are_read: true,
            decoder,
        })
    }

    /// Computes only the logits of `tokens` (different, ascending) from the next position on: to the bit what they are
    /// without, while those of all other tokens are the least there is. `None` takes that back.
    ///
    /// # Errors
    /// [`ModelError::Input`] where they are none, not ascending, or not of the vocabulary.
    pub fn restrict_head(&mut self, tokens: Option<&[u32]>) -> Result<(), ModelError> {
        let Decoder { device, config, head, .. } = &*self.decoder;
        self.head = tokens.map(|tokens| Head::new(device, head, config.vocabulary, tokens)).transpose()?;
        Ok(())
    }

    /// Forgets everything and reads a prompt. Afterwards [`LanguageModel::logits`] are those behind its last position.
    pub fn start(&mut self, pieces: &[Piece<'_, D>]) -> Result<(), ModelError> {
        self.forget(0);
        self.read(pieces)
    }

    /// As [`Session::start`], but positions that the prompt begins with and that the cache holds are not read again.
    /// Tokens are held against each other by their ids; [`Rows`] are the same as long as nothing was written to them.
    ///
    /// The logits are those of [`Session::start`] but for the order of summation where a device has another way for few
    /// rows than for many.
    ///
    /// # Errors
    /// Those of [`Session::start`]: no positions, more than the capacity, rows `[n, width]` of another width than the
    /// decoder's.
    pub fn start_again(&mut self, pieces: &[Piece<'_, D>]) -> Result<(), ModelError> {
        let common = self.held.common(pieces).min(self.position);
        self.forget(if common < KEPT { 0 } else { common });
        self.read(pieces)
    }

    /// How much has been read since the session was made.
    pub fn reading(&self) -> Reading {
        self.reading
    }

    /// Forgets the positions from `position` on.
    fn forget(&mut self, position: usize) {
        self.position = position;
        self.held.truncate(position);
    }

    /// Reads a prompt from the end of the cache on.
    fn read(&mut self, pieces: &[Piece<'_, D>]) -> Result<(), ModelError> {
        let width = self.decoder.config.width;
        let needed: usize = pieces.iter().map(Piece::len).sum();
        if needed == 0 {
            return Err(ModelError::input("prompt", "it is empty"));
        }
        if needed > self.capacity {
            return Err(DecodeError::Full { capacity: self.capacity, needed }.into());
        }
        let (mut filled, mut kept) = (0, self.position);
        for piece in pieces {
            if let Piece::Rows(rows) = piece
                && rows.width() != width
            {
                let reason = format!("embeddings are {} wide, the decoder is {width}", rows.width());
                return Err(ModelError::input("prompt", reason));
            }
            let mut done = kept.min(piece.len());
            kept -= done;
            while done < piece.len() {
                // Runs end at the same positions whatever was kept.
                let room = self.run() - self.position % self.run();
                let n = (piece.len() - done).min(room - filled);
                self.held.push(piece, done, n);
                match piece {
                    Piece::Tokens(ids) => self.decoder.embed(&ids[done..done + n], &mut self.work, filled)?,
                    Piece::Rows(rows) => {
                        let device = &self.decoder.device;
                        device.copy(&rows.buffer, done * width, &mut self.work.x, filled * width, n * width)?;
                    }
                }
                (done, filled) = (done + n, filled + n);
                if filled == room {
                    self.forward(filled)?;
                    filled = 0;
                }
            }
        }
        if filled > 0 {
            self.forward(filled)?;
        }
        Ok(self.compute_logits()?)
    }

    /// Bytes of the cache that a position takes, over all layers.
    pub fn position_bytes(&self) -> usize {
        let DecoderConfig { key_heads, head_dim, .. } = self.decoder.config;
        self.caches.len() * self.decoder.cache_type().position_bytes(key_heads, head_dim)
    }

    /// Bytes of host memory, beside the device's.
    pub fn host_bytes(&self) -> usize {
        self.logits.capacity() * size_of::<f32>() + self.held.bytes()
    }

    /// The logits behind each of the positions in the cache, `[positions, vocabulary]`. For comparisons: it takes
    /// memory of its own.
    pub fn all_logits(&self) -> Result<Vec<f32>, ModelError> {
        let Decoder { device, config, .. } = &*self.decoder;
        let DecoderConfig { width, vocabulary, .. } = *config;
        let mut states = allocate(device, &[HEAD_RUN, width])?;
        let mut scores = allocate(device, &[HEAD_RUN, vocabulary])?;
        let mut logits = vec![0.0; self.position * vocabulary];
        for (i, out) in logits.chunks_mut(HEAD_RUN * vocabulary).enumerate() {
            let rows = out.len() / vocabulary;
            device.copy(&self.states, i * HEAD_RUN * width, &mut states, 0, rows * width)?;
            self.decoder.logits(&states, rows, &mut scores)?;
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
                        self.decoder.embed(ids, &mut self.work, 0)?;
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

    /// The weights it runs on.
    pub(super) fn decoder(&self) -> &Arc<Decoder<D>> {
        &self.decoder
    }

    /// The caches, one a layer.
    pub(super) fn caches(&self) -> &[D::Cache] {
        &self.caches
    }

    /// Positions that one forward pass takes at most.
    fn run(&self) -> usize {
        self.capacity.min(RUN)
    }

    /// Runs the first `rows` rows of `work.x` through every layer, behind what is in the cache.
    fn forward(&mut self, rows: usize) -> Result<(), DeviceError> {
        let Session { decoder, work, caches, position, states, .. } = self;
        pass(decoder, work, caches, states, *position, rows)?;
        self.advance(rows);
        Ok(())
    }

    /// Runs one token through every layer and the output head, as what the device replays.
    fn step(&mut self, id: u32) -> Result<(), DeviceError> {
        self.prepare_logits()?;
        let Session { decoder, work, caches, position, states, replay, last, head, head_out, .. } = self;
        decoder.device.replay(replay, || {
            decoder.device.embed(&decoder.embedding, &[id], &mut work.x, 0)?;
            pass(decoder, work, caches, states, *position, 1)?;
            logits(decoder, states, *position, head.as_mut(), last, head_out)
        })?;
        self.advance(1);
        Ok(())
    }

    fn advance(&mut self, rows: usize) {
        self.position += rows;
        self.reading.positions += rows as u64;
        self.reading.passes += 1;
    }

    /// The logits that are on the host are no longer those of the last position.
    fn prepare_logits(&mut self) -> Result<(), DeviceError> {
        self.are_read = false;
        let Session { decoder, head, head_out, logits, .. } = self;
        head.as_mut().map_or(Ok(()), |head| head.prepare(&decoder.device, logits, head_out))
    }

    /// The output head over the state of the last position.
    fn compute_logits(&mut self) -> Result<(), DeviceError> {
        self.prepare_logits()?;
        let Session { decoder, position, states, last, head, head_out, .. } = self;
        logits(decoder, states, *position - 1, head.as_mut(), last, head_out)
    }
}

/// The output head over the state of a position, which `last` has room for.
fn logits<D: Device>(
    decoder: &Decoder<D>,
    states: &D::Buffer,
    position: usize,
    head: Option<&mut Head<D>>,
    last: &mut D::Buffer,
    out: &mut D::Buffer,
) -> Result<(), DeviceError> {
    let Decoder { device, config, .. } = decoder;
    device.copy(states, position * config.width, last, 0, config.width)?;
    match head {
        Some(head) => head.logits(device, last, out),
        None => decoder.logits(last, 1, out),
    }
}

/// Runs the first `rows` rows of `work.x` through every layer, behind `first` positions in the caches; their normed last states go to
/// those rows of `states`.
fn pass<D: Device>(
    decoder: &Decoder<D>,
    work: &mut Work<D>,
    caches: &mut [D::Cache],
    states: &mut D::Buffer,
    first: usize,
    rows: usize,
) -> Result<(), DeviceError> {
    let DecoderConfig { width, theta, .. } = decoder.config;
    let (device, shape) = (&decoder.device, decoder.attention(rows, first + rows));
    decoder.forward(work, rows, Sequence { device, caches, shape, theta })?;
    device.copy(&work.normed, 0, states, first * width, rows * width)
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

    fn append(&mut self, tokens: &[u32]) -> Result<(), DecodeError> {
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
            self.held.truncate(self.position);
            self.held.push_tokens(ids);
            match ids {
                &[id] => self.step(id)?,
                ids => {
                    self.decoder.embed(ids, &mut self.work, 0)?;
                    self.forward(ids.len())?;
                    self.compute_logits()?;
                }
            }
        }
        Ok(())
    }

    fn logits(&mut self) -> Result<&[f32], DecodeError> {
        if !self.are_read {
            self.decoder.device.read(&self.head_out, 0, &mut self.logits)?;
            self.are_read = true;
        }
        Ok(&self.logits)
    }

    fn choose(&mut self, allowed: Allowed<'_>, forbidden: &[u32], choice: Choice) -> Result<u32, DecodeError> {
        let vocabulary = self.vocabulary();
        Ok(self.decoder.device.choose(&self.head_out, vocabulary, allowed, forbidden, choice)?)
    }

    fn truncate(&mut self, position: usize) -> Result<(), DecodeError> {
        if position == 0 || position > self.position {
            return Err(DecodeError::Truncate { position, held: self.position });
        }
        if position < self.position {
            self.forget(position);
            self.compute_logits()?;
        }
        Ok(())
    }
}
