//! What completions are paid: the rewards of [`candor::verify::reward`], weighed, with a guard against rationales that
//! are nothing but a conclusion, and groundedness where cues were measured.

pub mod command;
pub mod completion;
pub mod conduct;
pub mod pool;
pub mod server;
pub mod settings;

use crate::data::rationale::{Cue, claim_is_right, cue_claims};
use candor::verify::reward::{accuracy_reward, explanation_reward_of_labels, format_reward};
use candor::verify::sentences::rationale_of;
use candor::verify::verdict::read_sentences;
use candor::verify::{Emotion, GoEmotion, SentenceClassifier, Verifier, VerifierError, split_sentences};
use candor_kernels::Device;
use serde::Serialize;
use std::path::Path;

/// Weights of the rewards.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weights {
    /// Of the format.
    pub format: f32,
    /// Of the right label.
    pub accuracy: f32,
    /// Of the explanation.
    pub explanation: f32,
    /// Of groundedness.
    pub groundedness: f32,
}

/// The rewards of one completion.
#[derive(Clone, Debug, PartialEq)]
pub struct Rewards {
    /// 1 for a completion of the right form.
    pub format: f32,
    /// 1 for the right label.
    pub accuracy: f32,
    /// Share of sentences that support the right label; 0 where the guard refuses the rationale.
    pub explanation: f32,
    /// Share of the stated cues that were measured so; `None` without measured cues.
    pub groundedness: Option<f32>,
    /// What the verifier reads in each sentence.
    pub labels: Vec<Vec<GoEmotion>>,
}

impl Rewards {
    /// The weighted sum.
    pub fn total(&self, weights: &Weights) -> f32 {
        weights.format * self.format
            + weights.accuracy * self.accuracy
            + weights.explanation * self.explanation
            + weights.groundedness * self.groundedness.unwrap_or(0.0)
    }
}

/// What a completion gets, as both commands print it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Paid {
    /// See [`Rewards::format`].
    pub format: f32,
    /// See [`Rewards::accuracy`].
    pub accuracy: f32,
    /// See [`Rewards::explanation`].
    pub explanation: f32,
    /// The weighted sum.
    pub reward: f32,
    /// What the verifier reads in each sentence of the rationale.
    pub sentences: Vec<Vec<GoEmotion>>,
}

impl Paid {
    /// Rewards with their weighted sum.
    pub fn new(rewards: Rewards, weights: &Weights) -> Paid {
        let reward = rewards.total(weights);
        let Rewards { format, accuracy, explanation, labels: sentences, .. } = rewards;
        Paid { format, accuracy, explanation, reward, sentences }
    }
}

/// Sentences whose reading a thread remembers, some 30 MB: much of what a model says in training it has said before.
const REMEMBERED: usize = 1 << 17;

/// Opens a verifier for one thread that pays completions.
pub fn open_verifier<D: Device>(folder: &Path, device: D) -> Result<Verifier<D>, VerifierError> {
    Ok(Verifier::open(folder, device)?.remembering(REMEMBERED))
}

/// The sentences of a completion that the verifier is asked about.
pub fn sentences_of(completion: &str) -> Vec<&str> {
    split_sentences(rationale_of(completion).unwrap_or_default())
}

/// The emotion that a label names; the error says which labels there are.
pub fn emotion_of(label: &str) -> Result<Emotion, String> {
    Emotion::fold(label).ok_or_else(|| {
        let known: Vec<&str> = Emotion::all().map(Emotion::name).collect();
        let shown: String = label.chars().take(80).collect();
        format!("the label {shown:?} names no emotion; there are {}, and their adjectives", known.join(", "))
    })
}

/// Pays completions.
pub struct Scorer<C: SentenceClassifier> {
    classifier: C,
    guard: bool,
}

impl<C: SentenceClassifier> Scorer<C> {
    /// With `guard`, the explanation reward is paid only for rationales of at least two sentences of which, under any
    /// label but neutral, at least one names no emotion.
    pub fn new(classifier: C, guard: bool) -> Self {
        Scorer { classifier, guard }
    }

    /// The rewards of a completion given the true emotion and the measured cues.
    pub fn score(
        &mut self,
        completion: &str,
        emotion: Emotion,
        cues: Option<&[f32; Cue::COUNT]>,
    ) -> Result<Rewards, VerifierError> {
        let rationale = rationale_of(completion).unwrap_or_default();
        let readings = read_sentences(rationale, &mut self.classifier)?;
        let labels: Vec<Vec<GoEmotion>> = readings.into_iter().map(|reading| reading.labels).collect();
        let passes = !self.guard || is_reasoned(&labels, emotion);
        let groundedness = cues.map(|cues| {
            let claims = cue_claims(rationale);
            let right = claims.iter().filter(|&&claim| claim_is_right(claim, cues)).count();
            if claims.is_empty() { 0.0 } else { right as f32 / claims.len() as f32 }
        });
        Ok(Rewards {
            format: format_reward(completion),
            accuracy: accuracy_reward(completion, emotion),
            explanation: if passes { explanation_reward_of_labels(&labels, emotion) } else { 0.0 },
            groundedness,
            labels,
        })
    }
}

/// Whether a rationale is more than a conclusion.
fn is_reasoned(labels: &[Vec<GoEmotion>], emotion: Emotion) -> bool {
    let observes = labels.iter().any(|labels| labels.as_slice() == [GoEmotion::NEUTRAL]);
    labels.len() >= 2 && (observes || emotion == Emotion::Neutral)
}
