//! The rewards of reward fine-tuning: format, accuracy and explanation.
//!
//! The same code pays the trainer, answers the reward server and scores the evaluation.

use super::classifier::{SentenceClassifier, VerifierError};
use super::emotions::{Emotion, GoEmotion};
use super::sentences::{answer_of, rationale_of};
use super::verdict::read_sentences;

/// 1 when the whole completion is `<think>…</think>\s*<answer>…</answer>`, otherwise 0.
pub fn format_reward(completion: &str) -> f32 {
    let inner = completion.strip_prefix("<think>").and_then(|rest| rest.strip_suffix("</answer>"));
    let closed = inner.is_some_and(|inner| {
        inner.match_indices("</think>").any(|(at, tag)| inner[at + tag.len()..].trim_start().starts_with("<answer>"))
    });
    f32::from(u8::from(closed))
}

/// 1 when the completion's answer folds to the emotion, otherwise 0 (also without a readable answer).
pub fn accuracy_reward(completion: &str, emotion: Emotion) -> f32 {
    f32::from(u8::from(answer_of(completion).and_then(Emotion::fold) == Some(emotion)))
}

/// The explanation reward of a completion given the true emotion: the share of its rationale's sentences that carry
/// the emotion's label. 0 without a rationale.
pub fn explanation_reward(
    completion: &str,
    emotion: Emotion,
    classifier: &mut impl SentenceClassifier,
) -> Result<f32, VerifierError> {
    let Some(rationale) = rationale_of(completion) else { return Ok(0.0) };
    let readings = read_sentences(rationale, classifier)?;
    let labels: Vec<_> = readings.into_iter().map(|reading| reading.labels).collect();
    Ok(explanation_reward_of_labels(&labels, emotion))
}

/// The explanation reward from the labels of each sentence. With m sentences that contain the emotion's label, n in
/// all, and k not exactly {neutral}: m/n for neutral, otherwise m/k, or 0 where k = 0 (and 0 without sentences).
pub fn explanation_reward_of_labels(sentences: &[Vec<GoEmotion>], emotion: Emotion) -> f32 {
    let supporting = sentences.iter().filter(|labels| labels.contains(&emotion.go_emotion())).count();
    let counted = match emotion {
        Emotion::Neutral => sentences.len(),
        _ => sentences.iter().filter(|labels| labels.as_slice() != [GoEmotion::NEUTRAL]).count(),
    };
    if counted == 0 { 0.0 } else { supporting as f32 / counted as f32 }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::verify::scripted::Keywords;

    #[test]
    fn format() {
        for good in [
            "<think>a</think>\n<answer>sad</answer>",
            "<think></think><answer></answer>",
            "<think>a</think> \t\n<answer>b</answer>",
            "<think>a</think> b</think>\n<answer>c</answer>",
            "<think>é\n</think>\u{2003}<answer>笑</answer>",
        ] {
            assert_eq!(format_reward(good), 1.0, "{good}");
        }
        for bad in [
            "",
            "<think>",
            "</answer>",
            "<think></answer>",
            "<think>a</think><answer>b",
            "<think>a<answer>b</answer>",
            " <think>a</think><answer>b</answer>",
            "<think>a</think><answer>b</answer>\n",
            "<think>a</think>, <answer>b</answer>",
            "<answer>b</answer><think>a</think>",
            "<think>a</think><answer></answer",
        ] {
            assert_eq!(format_reward(bad), 0.0, "{bad}");
        }
    }

    #[test]
    fn accuracy() {
        assert_eq!(accuracy_reward("<think>a</think><answer> Happy </answer>", Emotion::Happiness), 1.0);
        assert_eq!(accuracy_reward("<answer>sadness</answer>", Emotion::Sadness), 1.0);
        assert_eq!(accuracy_reward("<answer>sadness</answer>", Emotion::Happiness), 0.0);
        assert_eq!(accuracy_reward("happy", Emotion::Happiness), 0.0);
        assert_eq!(accuracy_reward("<answer>happy", Emotion::Happiness), 0.0);
        assert_eq!(accuracy_reward("<answer>gleeful</answer>", Emotion::Happiness), 0.0);
    }

    #[test]
    fn explanation() {
        let reward = |text: &str, emotion| explanation_reward(text, emotion, &mut Keywords::default()).unwrap();
        let text = "<think>A cue. It is joy. Joy! It is anger.</think>\n<answer>happy</answer>";
        assert_eq!(reward(text, Emotion::Happiness), 2.0 / 3.0);
        assert_eq!(reward(text, Emotion::Anger), 1.0 / 3.0);
        assert_eq!(reward(text, Emotion::Fear), 0.0);
        assert_eq!(reward(text, Emotion::Neutral), 1.0 / 4.0);
        assert_eq!(reward("<think>A cue. Another.</think>", Emotion::Neutral), 1.0);
        assert_eq!(reward("<think>A cue. Another.</think>", Emotion::Fear), 0.0, "k = 0");
        assert_eq!(reward("<think> </think>", Emotion::Neutral), 0.0);
        assert_eq!(reward("<think>It is joy.", Emotion::Happiness), 0.0, "unclosed");
        assert_eq!(reward("It is joy.", Emotion::Happiness), 0.0, "no tags");
        // Neutral beside another label is not exactly {neutral}, and yet it contains neutral.
        assert_eq!(reward("<think>Neutral joy. A cue.</think>", Emotion::Neutral), 1.0);
        assert_eq!(reward("<think>Neutral joy. A cue.</think>", Emotion::Happiness), 1.0);
    }
}
