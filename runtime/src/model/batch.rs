//! Many sequences continued side by side: what a rollout needs. A prompt is read once by a [`Session`] and copied into
//! as many slots as it is to have continuations; a step then takes one token of each slot through the layers at once,
//! so that the weights are read once for all of them.

use std::sync::Arc;

use candor_kernels::Device;

use super::config::DecoderConfig;
use super::decoder::{Decoder, Session, Work};
use super::rows::allocate;
use super::{DecodeError, LanguageModel, ModelError};

/// One sequence: its length and its caches, one a layer.
struct Slot<D: Device> {
    position: usize,
    caches: Vec<D::Cache>,
}

/// Slots for sequences. All memory is taken when it is made.
pub struct Batch<D: Device> {
    decoder: Arc<Decoder<D>>,
    capacity: usize,
    slots: Vec<Slot<D>>,
    work: Work<D>,
    ids: Vec<u32>,
    /// One row of queries, keys, values, and what is attended to.
    row: [D::Buffer; 4],
    head_out: D::Buffer,
    logits: Vec<f32>,
}

impl<D: Device> Batch<D> {
    pub(super) fn new(decoder: Arc<Decoder<D>>, slots: usize, capacity: usize) -> Result<Self, ModelError> {
        let DecoderConfig { head_dim, heads, key_heads, vocabulary, positions, .. } = *decoder.config();
        if capacity == 0 || capacity > positions || slots == 0 {
            let reason =
                format!("{slots} slots of {capacity} positions; 1 and up of 1 to {positions} positions are possible");
            return Err(ModelError::input("batch", reason));
        }
        let device = decoder.device();
        let slot = || Ok::<_, ModelError>(Slot { position: 0, caches: decoder.caches(capacity)? });
        let row = |heads: usize| allocate(device, &[heads, head_dim]);
        Ok(Batch {
            capacity,
            slots: (0..slots).map(|_| slot()).collect::<Result<_, _>>()?,
            work: decoder.work(slots)?,
            ids: Vec::with_capacity(slots),
            row: [row(heads)?, row(key_heads)?, row(key_heads)?, row(heads)?],
            head_out: allocate(device, &[slots, vocabulary])?,
            logits: vec![0.0; slots * vocabulary],
            decoder,
        })
    }

    /// Sequences there is room for.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Positions a sequence may have.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Rows of the output head.
    pub fn vocabulary(&self) -> usize {
        self.decoder.config().vocabulary
    }

    /// Uses other weights of the same sizes from now on: those of a session with another adapter.
    pub fn follow(&mut self, session: &Session<D>) -> Result<(), ModelError> {
        self.decoder = session.decoder().clone();
        self.work = self.decoder.work(self.slots.len())?;
        Ok(())
    }

    /// Makes a slot a copy of what a session's cache holds.
    pub fn copy_from(&mut self, session: &Session<D>, slot: usize) -> Result<(), ModelError> {
        let slots = self.slots.len();
        let Some(own) = self.slots.get_mut(slot) else {
            return Err(ModelError::input("batch", format!("slot {slot} of {slots}")));
        };
        let position = session.position();
        if position > self.capacity {
            return Err(DecodeError::Full { capacity: self.capacity, needed: position }.into());
        }
        let device = self.decoder.device();
        for (cache, from) in own.caches.iter_mut().zip(session.caches()) {
            device.cache_copy(from, cache, position)?;
        }
        own.position = position;
        Ok(())
    }

    /// Appends one token to each of some different slots (slot, token) and gives the logits behind them,
    /// `[tokens, vocabulary]`.
    pub fn append(&mut self, tokens: &[(usize, u32)]) -> Result<&[f32], ModelError> {
        let DecoderConfig { heads, key_heads, head_dim, theta, .. } = *self.decoder.config();
        for (index, &(slot, _)) in tokens.iter().enumerate() {
            let Some(own) = self.slots.get(slot) else {
                return Err(ModelError::input("batch", format!("slot {slot} of {}", self.slots.len())));
            };
            if own.position == 0 || tokens[..index].iter().any(|other| other.0 == slot) {
                return Err(ModelError::input("batch", format!("slot {slot} has no prompt, or is there twice")));
            }
            if own.position == self.capacity {
                return Err(DecodeError::Full { capacity: self.capacity, needed: own.position + 1 }.into());
            }
        }
        let rows = tokens.len();
        if rows == 0 {
            return Err(DecodeError::NoTokens.into());
        }
        let Batch { decoder, slots, work, ids, row: [one_query, one_key, one_value, one_out], .. } = self;
        ids.clear();
        ids.extend(tokens.iter().map(|token| token.1));
        decoder.embed(ids, work, 0)?;
        let device = decoder.device();
        let (query_width, key_width) = (heads * head_dim, key_heads * head_dim);
        decoder.forward(work, rows, |layer: usize, work: &mut Work<D>| {
            for (row, &(slot, _)) in tokens.iter().enumerate() {
                let Slot { position, caches } = &mut slots[slot];
                let (position, cache) = (*position, &mut caches[layer]);
                device.copy(&work.query, row * query_width, one_query, 0, query_width)?;
                device.copy(&work.key, row * key_width, one_key, 0, key_width)?;
                device.copy(&work.value, row * key_width, one_value, 0, key_width)?;
                let of_heads = [heads, key_heads];
                device.rope_and_write(one_query, one_key, one_value, 1, of_heads, head_dim, cache, position, theta)?;
                device.cache_attention(one_query, cache, decoder.attention(1, position + 1), one_out)?;
                device.copy(one_out, 0, &mut work.attended, row * query_width, query_width)?;
            }
            Ok(())
        })?;
        tokens.iter().for_each(|&(slot, _)| slots[slot].position += 1);
        let vocabulary = decoder.config().vocabulary;
        decoder.logits(&work.normed, rows, &mut self.head_out)?;
        let logits = &mut self.logits[..rows * vocabulary];
        device.read(&self.head_out, 0, logits)?;
        Ok(logits)
    }
}
