//! The Emotional Rationale Verifier: sentences, labels, reward and verdict.
//!
//! Takes the rationale that [`crate::text`] generated and says of each sentence which emotion a reader would take from
//! it, and of the whole whether it supports the label. The trainer, the evaluation and the command line all call
//! this code, so there is one definition of the reward. Source: "Emotion-Coherent Reasoning for Multimodal LLMs via
//! Emotional Rationale Verifier" (arXiv 2510.23506).

pub mod classifier;
pub mod emotions;
pub mod reading;
pub mod reward;
#[cfg(test)]
pub(crate) mod scripted;
pub mod sentences;
pub mod verdict;
pub mod verifier;

pub use classifier::{SentenceClassifier, VerifierError};
pub use emotions::{Emotion, GoEmotion};
pub use reading::read_labels;
pub use sentences::split_sentences;
pub use verdict::{Assessment, Reading, Sentence, Verdict, assess};
pub use verifier::Verifier;
