//! Tokens in, tokens out: tokenizer, chat template, sampling, the output grammar, label probabilities, generation.
//!
//! [`template`] makes the prompt's pieces, [`generate`] draws tokens from a
//! [`LanguageModel`](crate::model::LanguageModel) held to the [`grammar`], [`labels`] reads how probable each label is.

pub mod automaton;
pub mod generate;
pub mod grammar;
pub mod head_rows;
pub mod labels;
pub mod rollout;
pub mod sampling;
pub mod template;
pub mod token_table;
pub mod tokenizer;
#[cfg(test)]
pub(crate) mod toy;

pub use automaton::Phase;
pub use generate::{Checkpoint, Completion, FinishReason, GenerateError, Generator, Passage, Step};
pub use grammar::{AllowedIds, Grammar, GrammarError, Mask};
pub use head_rows::{HeadRows, ParseHeadRowsError};
pub use labels::{LabelProbabilities, LabelScorer, LabelSearch};
pub use sampling::{Sampler, Sampling, SamplingError};
pub use template::{ChatTemplate, Message, PromptPiece, TemplateError};
pub use token_table::TokenTable;
pub use tokenizer::{Detokenizer, Tokenizer, TokenizerError};
