//! What Candor says about a window: one versioned record, a line of JSON each.
//!
//! `docs/observation.schema.json` describes the lines; a test holds the two together. Equal input, model, settings and
//! seed give byte-identical lines but for `times`, which holds everything that the clock decides.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::manifest::Answer;
use crate::verify::{Sentence, Verdict};

/// Version of the record; it grows when a field changes its meaning or goes away.
pub const VERSION: u32 = 1;

/// What Candor says about a window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Observation {
    /// [`VERSION`].
    pub version: u32,
    /// The source as it was named, without user and password.
    pub source: String,
    /// The stretch of media time.
    pub window: WindowSpan,
    /// The face in each sampled frame that has one; empty where no face was looked for or none was found.
    pub faces: Vec<Face>,
    /// The emotion; `None` where a face was looked for and none was found.
    pub label: Option<String>,
    /// Which of the two probabilities decided the label.
    pub answer: Answer,
    /// Probability of each label after the rationale; `None` without a label.
    pub probabilities: Option<Probabilities>,
    /// Probability of each label before the rationale, when the model answers at once; `None` without a label.
    pub fast_probabilities: Option<Probabilities>,
    /// The reason the model gave; `None` without a label and where the policy withholds it.
    pub rationale: Option<String>,
    /// The rationale's sentences, read by the verifier.
    pub sentences: Vec<Sentence>,
    /// Whether the rationale supports the label. Stated also where the rationale is withheld.
    pub verdict: Verdict,
    /// What was done about rationales that are not verified.
    pub policy: PolicyRecord,
    /// The model.
    pub model: Identity,
    /// The verifier.
    pub verifier: Identity,
    /// Seed of the window's random numbers: the run's seed plus the window's number.
    pub seed: u64,
    /// Tokens of the window.
    pub tokens: Tokens,
    /// Everything that the clock decides.
    pub times: Times,
}

impl Observation {
    /// The probability of the label, from the probabilities that decided it.
    pub fn label_probability(&self) -> Option<f64> {
        let deciding = match self.answer {
            Answer::Fast => &self.fast_probabilities,
            Answer::After => &self.probabilities,
        };
        deciding.as_ref()?.of(self.label.as_deref()?)
    }
}

/// A stretch of media time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowSpan {
    /// Number of the window in its stream, from 0.
    pub index: u64,
    /// First moment, in seconds of media time.
    pub start_s: f64,
    /// End, in seconds of media time.
    pub end_s: f64,
    /// Frames that the model saw.
    pub frames: usize,
}

/// A face in a frame, in pixels of that frame.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Face {
    /// Which of the window's sampled frames, from 0.
    pub frame: usize,
    /// Left edge.
    pub x: f32,
    /// Upper edge.
    pub y: f32,
    /// Width.
    pub width: f32,
    /// Height.
    pub height: f32,
    /// The detector's score; higher is surer.
    pub score: f32,
}

/// A probability for each label, in the order of the model's label set; in JSON an object.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Probabilities(pub Vec<(String, f64)>);

impl Probabilities {
    /// One probability for each label.
    pub fn new(labels: &[String], values: &[f64]) -> Probabilities {
        Probabilities(labels.iter().cloned().zip(values.iter().copied()).collect())
    }

    /// The probability of a label.
    pub fn of(&self, label: &str) -> Option<f64> {
        self.0.iter().find(|entry| entry.0 == label).map(|entry| entry.1)
    }

    /// The most probable label, the first of equals.
    pub fn best(&self) -> Option<&str> {
        let best = self.0.iter().reduce(|best, entry| if entry.1 > best.1 { entry } else { best });
        best.map(|entry| entry.0.as_str())
    }
}

impl Serialize for Probabilities {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(label, probability)| (label, probability)))
    }
}

impl<'de> Deserialize<'de> for Probabilities {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Probabilities;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("an object of labels and probabilities")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Probabilities, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Probabilities(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// What was done about rationales that are not verified, and how often.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyRecord {
    /// annotate, retry, guide or withhold.
    pub name: String,
    /// Most times that a completion (retry) or a sentence (guide) is written again.
    pub n: Option<usize>,
    /// How often a completion or a sentence was written again. Its tokens are in [`Tokens::extra`].
    pub resampled: usize,
    /// Whether the rationale was kept back.
    pub withheld: bool,
}

impl PolicyRecord {
    /// A policy that has done nothing yet.
    pub fn of(name: &str, n: Option<usize>) -> PolicyRecord {
        PolicyRecord { name: name.to_string(), n, resampled: 0, withheld: false }
    }
}

/// Which model it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Name in its manifest.
    pub name: String,
    /// Version in its manifest.
    pub version: String,
    /// sha256 over its files.
    pub sha256: String,
    /// sha256 of the adapter's weights, where one stands beside it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
}

/// Tokens of a window.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tokens {
    /// Positions of the prompt, those of the pictures included.
    pub prompt: usize,
    /// Tokens of the completion.
    pub generated: usize,
    /// Tokens written and thrown away by the policy: what it cost.
    pub extra: usize,
}

/// Everything that the clock decides.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Times {
    /// The window on the system's monotonic clock.
    pub monotonic: Span,
    /// The window in wall time, in seconds since 1970-01-01T00:00:00Z.
    pub wall: Span,
    /// What each stage took.
    pub stages_ms: StageTimes,
}

/// A stretch of a clock.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Span {
    /// First moment, in seconds.
    pub start_s: f64,
    /// Last moment, in seconds.
    pub end_s: f64,
}

impl Span {
    /// A stretch of wall time.
    pub fn of_wall(start: SystemTime, end: SystemTime) -> Span {
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        Span { start_s: seconds(start), end_s: seconds(end) }
    }
}

/// Milliseconds that each stage of a window took.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageTimes {
    /// Finding and cutting the face, resizing.
    pub pixels: f64,
    /// Vision tower and projector.
    pub vision: f64,
    /// The prompt through the decoder.
    pub prefill: f64,
    /// Probabilities before and after the rationale.
    pub probabilities: f64,
    /// Writing the rationale, without the verifier's share.
    pub decode: f64,
    /// Reading sentences.
    pub verify: f64,
    /// All of it.
    pub total: f64,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::verify::{Emotion, GoEmotion};
    use serde_json::{Value, json};

    fn schema() -> jsonschema::Validator {
        let schema = include_str!("../../docs/observation.schema.json");
        let schema = serde_json::from_str(schema).unwrap();
        jsonschema::meta::validate(&schema).unwrap();
        jsonschema::validator_for(&schema).unwrap()
    }

    fn observation() -> Observation {
        let labels = ["happy".to_string(), "sad".to_string()];
        let identity =
            |name: &str| Identity { name: name.into(), version: "1".into(), sha256: "0f".repeat(32), adapter: None };
        Observation {
            version: VERSION,
            source: "clip.mp4".into(),
            window: WindowSpan { index: 3, start_s: 1.5, end_s: 3.5, frames: 4 },
            faces: vec![Face { frame: 0, x: -3.0, y: 10.5, width: 80.0, height: 80.0, score: 12.5 }],
            label: Some("sad".into()),
            answer: Answer::After,
            probabilities: Some(Probabilities::new(&labels, &[0.25, 0.75])),
            fast_probabilities: Some(Probabilities::new(&labels, &[0.5, 0.5])),
            rationale: Some("The corners of the lips turn down. “Sad”, I would say.".into()),
            sentences: vec![
                Sentence {
                    text: "The corners of the lips turn down.".into(),
                    labels: vec![GoEmotion::NEUTRAL],
                    supports: None,
                },
                Sentence {
                    text: "“Sad”, I would say.".into(),
                    labels: vec![Emotion::Sadness.go_emotion(), GoEmotion::NEUTRAL],
                    supports: Some(true),
                },
            ],
            verdict: Verdict::Verified,
            policy: PolicyRecord { name: "guide".into(), n: Some(3), resampled: 1, withheld: false },
            model: identity("candor-default"),
            verifier: identity("candor-verifier"),
            seed: u64::MAX,
            tokens: Tokens { prompt: 90, generated: 40, extra: 12 },
            times: Times {
                monotonic: Span { start_s: 10.0, end_s: 12.0 },
                wall: Span::of_wall(UNIX_EPOCH, UNIX_EPOCH + std::time::Duration::from_millis(1500)),
                stages_ms: StageTimes { total: 512.5, ..StageTimes::default() },
            },
        }
    }

    fn faceless() -> Observation {
        Observation {
            faces: Vec::new(),
            label: None,
            probabilities: None,
            fast_probabilities: None,
            rationale: None,
            sentences: Vec::new(),
            verdict: Verdict::Empty,
            policy: PolicyRecord { name: "annotate".into(), n: None, resampled: 0, withheld: false },
            ..observation()
        }
    }

    #[test]
    fn lines_are_as_the_schema_says() {
        let schema = schema();
        for observation in [observation(), faceless()] {
            let line = serde_json::to_string(&observation).unwrap();
            let value: Value = serde_json::from_str(&line).unwrap();
            if let Err(error) = schema.validate(&value) {
                panic!("{error} at {} in {line}", error.instance_path);
            }
            assert_eq!(serde_json::from_str::<Observation>(&line).unwrap(), observation);
            assert!(!line.contains('\n'));
        }
    }

    #[test]
    fn scripts_find_the_keys_they_were_promised() {
        let value = serde_json::to_value(observation()).unwrap();
        assert_eq!(value["window"]["start_s"], 1.5);
        assert_eq!(value["window"]["end_s"], 3.5);
        assert_eq!(value["faces"][0]["width"], 80.0);
        assert_eq!(value["label"], "sad");
        assert_eq!(value["probabilities"], json!({"happy": 0.25, "sad": 0.75}));
        assert_eq!(value["fast_probabilities"]["sad"], 0.5);
        assert!(value["rationale"].as_str().unwrap().starts_with("The corners"));
        assert_eq!(value["sentences"][0]["labels"], json!(["neutral"]));
        assert_eq!(value["sentences"][0]["supports"], Value::Null);
        assert_eq!(value["sentences"][1]["supports"], true);
        assert_eq!(value["verdict"], "verified");
    }

    /// Every change of a good line that makes it wrong is refused, by the schema and by the type.
    #[test]
    fn the_schema_refuses_wrong_lines() {
        let schema = schema();
        let good = serde_json::to_value(observation()).unwrap();
        for key in good.as_object().unwrap().keys() {
            let mut value = good.clone();
            value.as_object_mut().unwrap().remove(key);
            assert!(!schema.is_valid(&value), "without {key}");
        }
        let wrong = [
            ("/version", json!(2)),
            ("/source", json!(null)),
            ("/window/start_s", json!("1.5")),
            ("/window/index", json!(-1)),
            ("/faces", json!(null)),
            ("/faces/0/width", json!(-1.0)),
            ("/label", json!("")),
            ("/label", json!(1)),
            ("/answer", json!("both")),
            ("/probabilities", json!({"sad": 1.5})),
            ("/probabilities", json!([0.5, 0.5])),
            ("/fast_probabilities", json!({"sad": "0.5"})),
            ("/sentences/0/labels", json!([])),
            ("/sentences/0/labels", json!(["joy", "love", "anger"])),
            ("/sentences/0/labels", json!(["happy"])),
            ("/sentences/0/supports", json!("yes")),
            ("/verdict", json!("Verified")),
            ("/policy/name", json!("none")),
            ("/policy/n", json!(0)),
            ("/policy/withheld", json!(null)),
            ("/model/sha256", json!("0f")),
            ("/verifier", json!(null)),
            ("/seed", json!(0.5)),
            ("/tokens/extra", json!(-1)),
            ("/times/wall", json!("2026-01-01")),
            ("/times/stages_ms/total", json!(-1.0)),
        ];
        for (pointer, replacement) in wrong {
            let mut value = good.clone();
            *value.pointer_mut(pointer).unwrap() = replacement.clone();
            assert!(!schema.is_valid(&value), "{pointer} = {replacement}");
        }
        for pointer in ["", "/window", "/faces/0", "/sentences/0", "/policy", "/model", "/tokens", "/times"] {
            let mut value = good.clone();
            value.pointer_mut(pointer).unwrap().as_object_mut().unwrap().insert("other".into(), json!(1));
            assert!(!schema.is_valid(&value), "a key too many in {pointer}");
            assert!(serde_json::from_value::<Observation>(value).is_err(), "a key too many in {pointer}");
        }
        // A label without probabilities, and an emotion claimed without a face to see it in.
        for key in ["probabilities", "fast_probabilities"] {
            let mut value = good.clone();
            value[key] = Value::Null;
            assert!(!schema.is_valid(&value), "a label without {key}");
        }
        let mut value = serde_json::to_value(faceless()).unwrap();
        value["rationale"] = json!("Sad.");
        assert!(!schema.is_valid(&value), "a rationale without a label");
    }

    #[test]
    fn the_labels_probability_is_the_one_that_decided() {
        let after = observation();
        assert_eq!(after.label_probability(), Some(0.75));
        assert_eq!(Observation { answer: Answer::Fast, ..after }.label_probability(), Some(0.5));
        assert_eq!(faceless().label_probability(), None);
    }

    #[test]
    fn probabilities_keep_their_order() {
        let probabilities: Probabilities = serde_json::from_str(r#"{"sad": 0.2, "happy": 0.4, "fear": 0.4}"#).unwrap();
        assert_eq!(probabilities.best(), Some("happy"));
        assert_eq!(probabilities.of("sad"), Some(0.2));
        assert_eq!(probabilities.of("joy"), None);
        assert_eq!(serde_json::to_string(&probabilities).unwrap(), r#"{"sad":0.2,"happy":0.4,"fear":0.4}"#);
        assert_eq!(Probabilities::default().best(), None);
    }
}
