//! Whether a rationale supports its label, sentence by sentence and as a whole.
//!
//! A sentence *names an emotion* when its labels are not exactly {neutral}; it *supports* the label when its labels
//! contain the label's emotion. Under a neutral label a neutral sentence therefore supports; under any other it is
//! silent.

use serde::{Deserialize, Serialize};

use super::classifier::{SentenceClassifier, VerifierError};
use super::emotions::{Emotion, GoEmotion};
use super::reading::read_labels;
use super::sentences::split_sentences;

/// A sentence of a rationale and what the verifier reads in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sentence {
    /// The sentence.
    pub text: String,
    /// One or two GoEmotions labels, most probable first.
    pub labels: Vec<GoEmotion>,
    /// Whether it supports the label; `None` where it names no emotion.
    pub supports: Option<bool>,
}

/// What a rationale is worth as a reason for its label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// At least one sentence supports the label, and every sentence that names an emotion does.
    Verified,
    /// Some sentences support the label, others name another emotion.
    Mixed,
    /// Sentences name emotions and none supports the label.
    Contradicted,
    /// There is no text, or no sentence of it names an emotion: nothing that could be verified.
    Empty,
}

impl Verdict {
    /// The word in observations.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Verified => "verified",
            Verdict::Mixed => "mixed",
            Verdict::Contradicted => "contradicted",
            Verdict::Empty => "empty",
        }
    }

    /// The verdict over sentences that have been read against one label.
    pub fn over(sentences: &[Sentence]) -> Verdict {
        let supporting = sentences.iter().filter(|sentence| sentence.supports == Some(true)).count();
        let against = sentences.iter().filter(|sentence| sentence.supports == Some(false)).count();
        match (supporting, against) {
            (0, 0) => Verdict::Empty,
            (0, _) => Verdict::Contradicted,
            (_, 0) => Verdict::Verified,
            _ => Verdict::Mixed,
        }
    }
}

/// A sentence as the verifier read it, before it is held against a label.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// The sentence.
    pub text: String,
    /// One or two labels, most probable first.
    pub labels: Vec<GoEmotion>,
    /// The probability of every label, by its id.
    pub probabilities: [f32; 28],
}

/// A rationale read against a label.
#[derive(Clone, Debug, PartialEq)]
pub struct Assessment {
    /// Its sentences in order.
    pub sentences: Vec<Sentence>,
    /// The verdict over them.
    pub verdict: Verdict,
}

impl Assessment {
    /// Holds the readings of a rationale's sentences against a label's emotion.
    pub fn new(readings: Vec<Reading>, emotion: Emotion) -> Assessment {
        let sentence = |Reading { text, labels, .. }| Sentence { supports: supports(&labels, emotion), text, labels };
        let sentences: Vec<Sentence> = readings.into_iter().map(sentence).collect();
        Assessment { verdict: Verdict::over(&sentences), sentences }
    }
}

/// Whether a sentence with these labels supports the emotion; `None` where it names no emotion.
pub fn supports(labels: &[GoEmotion], emotion: Emotion) -> Option<bool> {
    if labels.contains(&emotion.go_emotion()) {
        Some(true)
    } else if labels == [GoEmotion::NEUTRAL] {
        None
    } else {
        Some(false)
    }
}

/// Reads the sentences of `rationale` (the text between the think tags, or any text) against a label's emotion.
pub fn assess(
    rationale: &str,
    emotion: Emotion,
    classifier: &mut impl SentenceClassifier,
) -> Result<Assessment, VerifierError> {
    Ok(Assessment::new(read_sentences(rationale, classifier)?, emotion))
}

/// The sentences of a text and their labels.
pub fn read_sentences(text: &str, classifier: &mut impl SentenceClassifier) -> Result<Vec<Reading>, VerifierError> {
    let sentences = split_sentences(text);
    if sentences.is_empty() {
        return Ok(Vec::new());
    }
    let probabilities = classifier.classify(&sentences)?;
    if probabilities.len() != sentences.len() {
        return Err(VerifierError::Count { expected: sentences.len(), actual: probabilities.len() });
    }
    let read = |(text, probabilities): (&str, [f32; 28])| {
        Ok(Reading { text: text.to_string(), labels: read_labels(&probabilities)?, probabilities })
    };
    sentences.into_iter().zip(probabilities).map(read).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::verify::scripted::Keywords;

    fn verdict(rationale: &str, emotion: Emotion) -> (Verdict, Vec<Option<bool>>) {
        let assessment = assess(rationale, emotion, &mut Keywords::default()).unwrap();
        (assessment.verdict, assessment.sentences.iter().map(|sentence| sentence.supports).collect())
    }

    #[test]
    fn verdicts_of_an_emotion() {
        use Emotion::Sadness;
        assert_eq!(verdict("A cue. It is sadness.", Sadness), (Verdict::Verified, vec![None, Some(true)]));
        assert_eq!(verdict("It is sadness. It is joy.", Sadness), (Verdict::Mixed, vec![Some(true), Some(false)]));
        assert_eq!(verdict("A cue. It is joy.", Sadness), (Verdict::Contradicted, vec![None, Some(false)]));
        assert_eq!(verdict("A cue. Another cue.", Sadness), (Verdict::Empty, vec![None, None]));
        assert_eq!(verdict(" ", Sadness), (Verdict::Empty, vec![]));
        // Two labels, one of them the emotion: the sentence supports.
        assert_eq!(verdict("It is sadness or joy.", Sadness), (Verdict::Verified, vec![Some(true)]));
        assert_eq!(verdict("Neutral with sadness.", Sadness), (Verdict::Verified, vec![Some(true)]));
        assert_eq!(verdict("Neutral with joy.", Sadness), (Verdict::Contradicted, vec![Some(false)]));
    }

    #[test]
    fn verdicts_of_neutral() {
        use Emotion::Neutral;
        assert_eq!(verdict("A cue. Another.", Neutral), (Verdict::Verified, vec![Some(true), Some(true)]));
        assert_eq!(verdict("A cue. It is joy.", Neutral), (Verdict::Mixed, vec![Some(true), Some(false)]));
        assert_eq!(verdict("It is joy.", Neutral), (Verdict::Contradicted, vec![Some(false)]));
        assert_eq!(verdict("Neutral with joy.", Neutral), (Verdict::Verified, vec![Some(true)]));
        assert_eq!(verdict("", Neutral), (Verdict::Empty, vec![]));
    }

    #[test]
    fn a_classifier_that_loses_sentences_is_an_error() {
        struct Silent;
        impl SentenceClassifier for Silent {
            fn classify(&mut self, _: &[&str]) -> Result<Vec<[f32; 28]>, VerifierError> {
                Ok(Vec::new())
            }
        }
        let error = assess("One. Two.", Emotion::Fear, &mut Silent).unwrap_err();
        assert!(matches!(error, VerifierError::Count { expected: 2, actual: 0 }));
        assert!(assess("", Emotion::Fear, &mut Silent).is_ok(), "no sentence, nothing to ask");
    }
}
