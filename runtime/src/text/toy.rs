//! A language model for tests: logits are any function of the tokens so far.

use super::token_table::TokenTable;
use crate::model::{DecodeError, LanguageModel};

type Rule = Box<dyn Fn(&[u32]) -> Vec<f32>>;

/// A model whose logits a closure makes of all tokens in the cache.
pub(crate) struct ToyModel {
    rule: Rule,
    vocabulary: usize,
    capacity: usize,
    cache: Vec<u32>,
    logits: Vec<f32>,
    /// Calls of `append`.
    pub(crate) appends: usize,
}

impl ToyModel {
    /// A model with `prompt` in its cache.
    pub(crate) fn new(
        vocabulary: usize,
        capacity: usize,
        prompt: &[u32],
        rule: impl Fn(&[u32]) -> Vec<f32> + 'static,
    ) -> ToyModel {
        let logits = rule(prompt);
        ToyModel { rule: Box::new(rule), vocabulary, capacity, cache: prompt.to_vec(), logits, appends: 0 }
    }

    /// Logits that look random but depend on the whole text alone, spread over about `spread` either way.
    pub(crate) fn random(vocabulary: usize, capacity: usize, seed: u64, spread: f32) -> ToyModel {
        ToyModel::new(vocabulary, capacity, &[0], move |cache| {
            let mut state = cache.iter().fold(seed ^ 0x9E37_79B9_7F4A_7C15, |state, &token| {
                (state ^ u64::from(token).wrapping_add(1)).wrapping_mul(0x0000_0100_0000_01B3).rotate_left(29)
            });
            (0..vocabulary)
                .map(|_| {
                    // splitmix64
                    state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
                    let mut mixed = state;
                    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
                    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
                    mixed ^= mixed >> 31;
                    ((mixed >> 40) as f32 / (1u64 << 24) as f32 * 2.0 - 1.0) * spread
                })
                .collect()
        })
    }

    /// The tokens in the cache.
    pub(crate) fn cache(&self) -> &[u32] {
        &self.cache
    }
}

impl LanguageModel for ToyModel {
    fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    fn position(&self) -> usize {
        self.cache.len()
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn append(&mut self, tokens: &[u32]) -> Result<(), DecodeError> {
        assert!(!tokens.is_empty(), "append needs a token");
        self.appends += 1;
        let needed = self.cache.len() + tokens.len();
        if needed > self.capacity {
            return Err(DecodeError::Full { capacity: self.capacity, needed });
        }
        if let Some(&id) = tokens.iter().find(|&&id| id as usize >= self.vocabulary) {
            return Err(DecodeError::Token { id, vocabulary: self.vocabulary });
        }
        self.cache.extend_from_slice(tokens);
        self.logits = (self.rule)(&self.cache);
        Ok(())
    }

    fn logits(&mut self) -> Result<&[f32], DecodeError> {
        Ok(&self.logits)
    }

    fn truncate(&mut self, position: usize) -> Result<(), DecodeError> {
        assert!(position <= self.cache.len() && position > 0, "truncate to {position} of {}", self.cache.len());
        self.cache.truncate(position);
        self.logits = (self.rule)(&self.cache);
        Ok(())
    }
}

/// A token table over these spellings, each single byte besides, and last the token that ends the turn.
pub(crate) fn table_with_bytes(extra: &[&[u8]]) -> std::sync::Arc<TokenTable> {
    let bytes: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).collect();
    table(&bytes.iter().map(Vec::as_slice).chain(extra.iter().copied()).collect::<Vec<_>>())
}

/// A token table over exactly these spellings, and last the token that ends the turn.
pub(crate) fn table(tokens: &[&[u8]]) -> std::sync::Arc<TokenTable> {
    let end_of_turn = tokens.len() as u32;
    std::sync::Arc::new(TokenTable::new(tokens.len() + 1, end_of_turn, (0u32..).zip(tokens)))
}

/// Tokens that cross every border of the output format, and halves of characters.
pub(crate) const STRADDLING: [&[u8]; 24] = [
    b"<think>The",
    b"<th",
    b"ink>",
    b"k> ",
    b" face",
    b".</",
    b".</think>\n<answer>s",
    b"think>\n<an",
    b"</think",
    b">\n<",
    b"answer",
    b"swer>h",
    b"appy</",
    b">ha",
    b"ang",
    b"er</answer>",
    b"ry man<",
    b"sad",
    b"ness",
    b"\xE6\x82",
    b"\xB2\xE3\x81",
    b"\x97\xE3\x81\x84</",
    b"</answer>",
    b"<|im_end|>",
];

/// Labels that are prefixes of each other, share beginnings, or are not ASCII.
pub(crate) fn labels() -> Vec<String> {
    ["happy", "sad", "sadness", "anger", "angry man", "悲しい"].map(String::from).to_vec()
}
