//! What generation needs of a decoder: append tokens, read logits, roll back.

use candor_kernels::DeviceError;
use candor_kernels::choice::{self, Allowed, Choice};

/// Why a decoder could not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The key-value cache has no room left.
    #[error("the key-value cache holds {capacity} positions; {needed} are needed")]
    Full {
        /// Positions the cache was made for.
        capacity: usize,
        /// Positions needed.
        needed: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {vocabulary}")]
    Token {
        /// The id.
        id: u32,
        /// Rows of the embedding table.
        vocabulary: usize,
    },
    /// Nothing was given to append.
    #[error("no tokens to append; at least one is needed")]
    NoTokens,
    /// A roll-back to where the cache never was, or to before its first position.
    #[error("cannot roll back to position {position}; the cache holds {held}, and keeps at least 1")]
    Truncate {
        /// The position asked for.
        position: usize,
        /// Positions in the cache.
        held: usize,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// A decoder with a key-value cache that already holds the prompt.
pub trait LanguageModel {
    /// Rows of the output head, and so the length of every logits slice.
    fn vocabulary(&self) -> usize;
    /// Positions in the cache.
    fn position(&self) -> usize;
    /// Positions the cache can hold.
    fn capacity(&self) -> usize;
    /// Appends tokens, at least one. The logits become those after the last of them.
    fn append(&mut self, tokens: &[u32]) -> Result<(), DecodeError>;
    /// The logits `[vocabulary]` after the last position in the cache, as the call that put it there left them.
    /// After [`LanguageModel::truncate`] they are recomputed by the implementation or restored. They are copied to the host
    /// when they are asked for.
    fn logits(&mut self) -> Result<&[f32], DecodeError>;
    /// Chooses one of the allowed tokens by the logits after the last position ([`choice::choose`]), which need not leave the
    /// device for that. `forbidden` tokens are not chosen even where they are allowed.
    fn choose(&mut self, allowed: Allowed<'_>, forbidden: &[u32], choice: Choice) -> Result<u32, DecodeError> {
        let chosen = choice::choose(self.logits()?, allowed, forbidden, choice, &mut Vec::new());
        Ok(chosen.map_err(DeviceError::from)?)
    }
    /// Forgets everything behind `position` (rolls the cache back). The logits become those after
    /// `position - 1`; an implementation may recompute that one position.
    fn truncate(&mut self, position: usize) -> Result<(), DecodeError>;
}
