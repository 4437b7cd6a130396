//! Judges: each reads the emotion out of a rationale alone, for the metrics that hold rationales against labels
//! (arXiv 2510.23506 has a hosted chat model do so).
//!
//! The [`verifier`] is the model whose readings reward fine-tuning pays for, so a model may learn to please it. The
//! [`lexicon`] is the control: word lists that no training ever sees.

pub mod lexicon;
pub mod verifier;

pub use lexicon::Lexicon;
