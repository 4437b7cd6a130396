//! Emotion labels and how their spellings fold, and GoEmotions' 28 labels that the verifier reads.
//!
//! Data sets spell one emotion in two ways ("angry" in DFEW, "anger" in MAFW); [`Emotion::fold`] makes them one. Each
//! emotion has the GoEmotions label that a supporting sentence must carry.

use serde::{Deserialize, Serialize};

/// Labels of GoEmotions, in the order of their ids.
pub const GO_EMOTIONS: [&str; 28] = [
    "admiration",
    "amusement",
    "anger",
    "annoyance",
    "approval",
    "caring",
    "confusion",
    "curiosity",
    "desire",
    "disappointment",
    "disapproval",
    "disgust",
    "embarrassment",
    "excitement",
    "fear",
    "gratitude",
    "grief",
    "joy",
    "love",
    "nervousness",
    "optimism",
    "pride",
    "realization",
    "relief",
    "remorse",
    "sadness",
    "surprise",
    "neutral",
];

/// One of GoEmotions' 28 labels; written as its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "&'static str")]
pub struct GoEmotion(u8);

impl GoEmotion {
    /// The label of sentences that name no emotion.
    pub const NEUTRAL: GoEmotion = GoEmotion(27);

    /// The label with this id; `None` above 27.
    pub fn from_id(id: usize) -> Option<Self> {
        (id < GO_EMOTIONS.len()).then_some(Self(id as u8))
    }

    /// The label with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        GO_EMOTIONS.iter().position(|&known| known == name).and_then(Self::from_id)
    }

    /// Place in [`GO_EMOTIONS`] and in the verifier's output.
    pub fn id(self) -> usize {
        usize::from(self.0)
    }

    /// Name in [`GO_EMOTIONS`].
    pub fn name(self) -> &'static str {
        GO_EMOTIONS[self.id()]
    }
}

impl From<GoEmotion> for &'static str {
    fn from(label: GoEmotion) -> Self {
        label.name()
    }
}

impl TryFrom<String> for GoEmotion {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        Self::from_name(&name).ok_or_else(|| format!("{name:?} is not a GoEmotions label"))
    }
}

/// An emotion that a label can name: DFEW's seven and MAFW's eleven.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Emotion {
    /// happy, happiness
    Happiness,
    /// angry, anger
    Anger,
    /// disgust
    Disgust,
    /// fear
    Fear,
    /// sad, sadness
    Sadness,
    /// surprise
    Surprise,
    /// neutral
    Neutral,
    /// anxious, anxiety
    Anxiety,
    /// helpless, helplessness
    Helplessness,
    /// disappointed, disappointment
    Disappointment,
    /// contemptuous, contempt
    Contempt,
}

/// Emotion, its spellings, and the id in [`GO_EMOTIONS`] of sentences that support it.
const TABLE: [(Emotion, &[&str], u8); 11] = [
    (Emotion::Happiness, &["happiness", "happy"], 17),
    (Emotion::Anger, &["anger", "angry"], 2),
    (Emotion::Disgust, &["disgust"], 11),
    (Emotion::Fear, &["fear"], 14),
    (Emotion::Sadness, &["sadness", "sad"], 25),
    (Emotion::Surprise, &["surprise"], 26),
    (Emotion::Neutral, &["neutral"], 27),
    (Emotion::Anxiety, &["anxiety", "anxious"], 19),
    (Emotion::Helplessness, &["helplessness", "helpless"], 16),
    (Emotion::Disappointment, &["disappointment", "disappointed"], 9),
    (Emotion::Contempt, &["contempt", "contemptuous"], 10),
];

impl Emotion {
    /// Every emotion.
    pub fn all() -> impl Iterator<Item = Emotion> {
        TABLE.iter().map(|row| row.0)
    }

    /// Folds a label's spelling: white space around it and upper case do not matter.
    pub fn fold(label: &str) -> Option<Emotion> {
        let label = label.trim().to_lowercase();
        TABLE.iter().find(|row| row.1.contains(&label.as_str())).map(|row| row.0)
    }

    /// The noun: "anger", not "angry".
    pub fn name(self) -> &'static str {
        TABLE[self as usize].1[0]
    }

    /// The label that a sentence must carry to support this emotion.
    pub fn go_emotion(self) -> GoEmotion {
        GoEmotion(TABLE[self as usize].2)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_table_lies_in_the_order_of_the_enum() {
        for (index, row) in TABLE.iter().enumerate() {
            assert_eq!(row.0 as usize, index);
            assert_eq!(Emotion::fold(row.0.name()), Some(row.0));
        }
    }

    #[test]
    fn spellings_fold() {
        for (one, other) in [
            ("angry", "anger"),
            ("sad", "Sadness"),
            (" happy\n", "happiness"),
            ("ANXIOUS", "anxiety"),
            ("helpless", "helplessness"),
            ("disappointed", "disappointment"),
            ("contemptuous", "contempt"),
        ] {
            assert!(Emotion::fold(one).is_some(), "{one}");
            assert_eq!(Emotion::fold(one), Emotion::fold(other), "{one} {other}");
        }
        for label in ["", "calm", "anger.", "happy sad", "sad\0"] {
            assert_eq!(Emotion::fold(label), None, "{label:?}");
        }
    }

    #[test]
    fn emotions_map_to_the_papers_ids() {
        let expected = [
            ("happiness", "joy"),
            ("anger", "anger"),
            ("disgust", "disgust"),
            ("fear", "fear"),
            ("sadness", "sadness"),
            ("surprise", "surprise"),
            ("neutral", "neutral"),
            ("anxiety", "nervousness"),
            ("helplessness", "grief"),
            ("disappointment", "disappointment"),
            ("contempt", "disapproval"),
        ];
        assert_eq!(expected.len(), Emotion::all().count());
        for (emotion, label) in expected {
            assert_eq!(Emotion::fold(emotion).unwrap().go_emotion().name(), label);
        }
    }

    #[test]
    fn go_emotions_by_id_and_name() {
        for (id, name) in GO_EMOTIONS.iter().enumerate() {
            assert_eq!(GoEmotion::from_id(id), GoEmotion::from_name(name));
        }
        assert_eq!(GoEmotion::from_id(27), Some(GoEmotion::NEUTRAL));
        assert_eq!(GoEmotion::from_id(28), None);
        assert_eq!(serde_json::to_string(&GoEmotion::NEUTRAL).unwrap(), "\"neutral\"");
        assert!(serde_json::from_str::<GoEmotion>("\"happy\"").is_err());
    }
}
