//! The verifier as a judge: it adds up, over the sentences that name any emotion, the probability of each label's
//! emotion, and takes the largest sum. A rationale without such a sentence is read as neutral.

use candor::verify::{Emotion, GoEmotion, SentenceClassifier, VerifierError, read_labels, split_sentences};

/// The emotion, of those given, that a rationale names. `None` where it names none and neutral is not among them.
pub fn judge(
    verifier: &mut impl SentenceClassifier,
    rationale: &str,
    emotions: &[Emotion],
) -> Result<Option<Emotion>, VerifierError> {
    let mut sums = vec![0.0; emotions.len()];
    let mut named = false;
    for probabilities in verifier.classify(&split_sentences(rationale))? {
        if read_labels(&probabilities)? == [GoEmotion::NEUTRAL] {
            continue;
        }
        named = true;
        for (sum, emotion) in sums.iter_mut().zip(emotions) {
            *sum += probabilities[emotion.go_emotion().id()];
        }
    }
    let neutral = emotions.iter().copied().find(|emotion| emotion.go_emotion() == GoEmotion::NEUTRAL);
    let best = (0..sums.len()).reduce(|best, i| if sums[i] > sums[best] { i } else { best });
    Ok(if named { best.map(|i| emotions[i]) } else { neutral })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Reads joy into sentences with "glad" and sadness, less surely, into those with "blue".
    struct Words;

    impl SentenceClassifier for Words {
        fn classify(&mut self, sentences: &[&str]) -> Result<Vec<[f32; 28]>, VerifierError> {
            let read = |sentence: &&str| {
                let mut probabilities = [0.01; 28];
                let (id, p) = match sentence {
                    s if s.contains("glad") => (17, 0.8),
                    s if s.contains("blue") => (25, 0.5),
                    _ => (27, 0.9),
                };
                probabilities[id] = p;
                probabilities
            };
            Ok(sentences.iter().map(read).collect())
        }
    }

    #[test]
    fn the_judge_adds_up_what_the_sentences_name() {
        let emotions: Vec<Emotion> = ["happy", "neutral", "sad"].iter().filter_map(|l| Emotion::fold(l)).collect();
        for (rationale, emotion) in [
            ("The brows rise. They are glad.", Some("happy")),
            ("They are glad. They are blue. So blue.", Some("sad")),
            ("The brows rise.", Some("neutral")),
            ("", Some("neutral")),
        ] {
            let read = judge(&mut Words, rationale, &emotions).unwrap();
            assert_eq!(read, emotion.and_then(Emotion::fold), "{rationale:?}");
        }
        assert_eq!(judge(&mut Words, "Nothing.", &emotions[..1]).unwrap(), None);
    }
}
