//! What verification needs of a model: the 28 GoEmotions probabilities of a sentence.

use std::path::PathBuf;

use crate::manifest::ManifestError;
use crate::model::ModelError;
use crate::text::TokenizerError;

/// Why a sentence could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifierError {
    /// The model gave something that is not a probability.
    #[error("the verifier gave {label} a probability of {value}; its weights are damaged")]
    Probability {
        /// Name of the GoEmotions label.
        label: &'static str,
        /// What came out.
        value: f32,
    },
    /// The network could not be opened or run.
    #[error("verifier: {0}")]
    Model(#[from] Box<ModelError>),
    /// The tokenizer could not be opened or used.
    #[error("verifier: {0}")]
    Tokenizer(#[from] Box<TokenizerError>),
    /// The manifest cannot be used.
    #[error("verifier: {0}")]
    Manifest(#[from] ManifestError),
    /// The network's labels are not GoEmotions'.
    #[error("{folder}: id2label in config.json has no {label:?}; a verifier has GoEmotions' 28 labels", folder = folder.display())]
    Labels {
        /// The verifier's folder.
        folder: PathBuf,
        /// The label it lacks.
        label: &'static str,
    },
    /// The model answered for more or fewer sentences than it was given.
    #[error("the verifier was given {expected} sentences and answered for {actual}")]
    Count {
        /// Sentences given.
        expected: usize,
        /// Answers.
        actual: usize,
    },
}

/// Reads the emotion out of sentences.
pub trait SentenceClassifier {
    /// GoEmotions probabilities (sigmoid, multi-label) of each sentence: `[sentences, 28]`.
    fn classify(&mut self, sentences: &[&str]) -> Result<Vec<[f32; 28]>, VerifierError>;
}

impl<C: SentenceClassifier + ?Sized> SentenceClassifier for &mut C {
    fn classify(&mut self, sentences: &[&str]) -> Result<Vec<[f32; 28]>, VerifierError> {
        (**self).classify(sentences)
    }
}
