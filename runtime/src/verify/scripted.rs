//! A classifier for tests: it reads the names of GoEmotions labels that stand in a sentence.

use super::classifier::{SentenceClassifier, VerifierError};
use super::emotions::{GO_EMOTIONS, GoEmotion};

/// Gives 0.9 to each label whose name occurs in the sentence (in any case), and to neutral where none does.
#[derive(Default)]
pub(crate) struct Keywords {
    /// Sentences asked about so far.
    pub(crate) asked: Vec<String>,
}

impl SentenceClassifier for Keywords {
    fn classify(&mut self, sentences: &[&str]) -> Result<Vec<[f32; 28]>, VerifierError> {
        self.asked.extend(sentences.iter().map(ToString::to_string));
        Ok(sentences.iter().map(|sentence| probabilities(&sentence.to_lowercase())).collect())
    }
}

fn probabilities(sentence: &str) -> [f32; 28] {
    let mut result = [0.01; 28];
    for (probability, name) in result.iter_mut().zip(GO_EMOTIONS) {
        if sentence.contains(name) {
            *probability = 0.9;
        }
    }
    if result.iter().all(|&probability| probability < 0.9) {
        result[GoEmotion::NEUTRAL.id()] = 0.9;
    }
    result
}
