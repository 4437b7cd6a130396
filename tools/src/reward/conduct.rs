//! How completions behave, against the obvious cheats.

use super::Rewards;
use crate::data::rationale::{Cue, claim_is_right, cue_claims};
use candor::verify::GoEmotion;
use candor::verify::sentences::rationale_of;
use serde::Serialize;
use std::collections::{HashMap, HashSet};

/// Measures over a set of completions.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Conduct {
    /// Different words by words.
    pub distinct_1: f64,
    /// Different pairs of words by pairs of words.
    pub distinct_2: f64,
    /// Share of sentences that name an emotion.
    pub naming_share: f64,
    /// Sentences a rationale.
    pub sentences: f64,
    /// Words a rationale.
    pub words: f64,
    /// Share of rationales of one sentence.
    pub one_sentence_share: f64,
    /// Share of rationales that are another's, word for word.
    pub repeated_share: f64,
    /// Share of stated cues that were measured so; `None`, and not written, where nothing can be held against them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cue_accuracy: Option<f64>,
}

impl Conduct {
    /// Measures completions with their rewards and their photographs' cues.
    pub fn measure<'a>(
        completions: impl IntoIterator<Item = (&'a str, &'a Rewards, Option<[f32; Cue::COUNT]>)>,
    ) -> Conduct {
        let (mut words, mut pairs) = (0usize, 0usize);
        let (mut known_words, mut known_pairs) = (HashSet::new(), HashSet::new());
        let mut times: HashMap<&str, usize> = HashMap::new();
        let (mut n, mut sentences, mut naming, mut single) = (0usize, 0usize, 0usize, 0usize);
        let (mut claims, mut right) = (0usize, 0usize);
        for (completion, rewards, cues) in completions {
            let rationale = rationale_of(completion).unwrap_or_default().trim();
            let own: Vec<&str> = rationale.split_whitespace().collect();
            words += own.len();
            pairs += own.len().saturating_sub(1);
            known_pairs.extend(own.windows(2).map(|pair| (pair[0], pair[1])));
            known_words.extend(own);
            *times.entry(rationale).or_default() += 1;
            n += 1;
            sentences += rewards.labels.len();
            naming += rewards.labels.iter().filter(|labels| labels.as_slice() != [GoEmotion::NEUTRAL]).count();
            single += usize::from(rewards.labels.len() == 1);
            if let Some(cues) = cues {
                let own = cue_claims(rationale);
                claims += own.len();
                right += own.into_iter().filter(|&claim| claim_is_right(claim, &cues)).count();
            }
        }
        let share = |part: usize, whole: usize| part as f64 / whole.max(1) as f64;
        Conduct {
            distinct_1: share(known_words.len(), words),
            distinct_2: share(known_pairs.len(), pairs),
            naming_share: share(naming, sentences),
            sentences: share(sentences, n),
            words: share(words, n),
            one_sentence_share: share(single, n),
            repeated_share: share(times.values().filter(|&&times| times > 1).sum(), n),
            cue_accuracy: (claims > 0).then(|| share(right, claims)),
        }
    }
}
