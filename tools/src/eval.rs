//! `candor-tools eval`: what a model makes of labelled photographs, through the runtime and as it would be in use: the
//! metrics of the paper and, where cues were measured, whether the rationale says what is there.
//!
//! The paper's judge, who reads an emotion out of a rationale, is here the verifier: it adds up, over the sentences
//! that name any emotion, the probability of each label's emotion, and takes the largest sum. A rationale without such
//! a sentence is read as neutral.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context, ensure};
use candor::media::{Fit, Frame, Window};
use candor::message::say;
use candor::verify::{Emotion, GoEmotion, SentenceClassifier, Verifier, read_labels, split_sentences};
use candor::watch::{WatchSettings, Watcher};
use candor_kernels::cpu::CpuDevice;
use clap::Args;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use serde_json::{Value, json};

use crate::data::faces::Faces;
use crate::data::rationale::{Cue, claim_is_right, cue_claims};
use crate::workers;

/// Seed of the order in which pictures get each other's cues.
const SHUFFLE_SEED: u64 = 1;

/// `candor-tools eval`
#[derive(Args)]
pub struct EvalArgs {
    /// The model's folder.
    #[arg(long)]
    pub model: PathBuf,
    /// The verifier's folder; by default the one that the model names.
    #[arg(long)]
    pub verifier: Option<PathBuf>,
    /// Labelled faces, laid out as faces48.safetensors.
    #[arg(long)]
    pub faces: PathBuf,
    /// Part of the file.
    #[arg(long, default_value = "val")]
    pub part: String,
    /// Take only so many photographs, spread over the part.
    #[arg(long)]
    pub limit: Option<usize>,
    /// End with one JSON object instead of a table.
    #[arg(long)]
    pub json: bool,
    /// Also write one JSON line a photograph to this file.
    #[arg(long)]
    pub records: Option<PathBuf>,
    /// Threads, each with a model of its own over the same mapped weights.
    #[arg(long, default_value_t = 2)]
    pub threads: usize,
}

/// What the model made of one photograph.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Row of the photograph.
    pub photograph: usize,
    /// The right emotion.
    pub truth: Emotion,
    /// The answer after the rationale.
    pub answer: Option<Emotion>,
    /// The fast answer.
    pub fast: Option<Emotion>,
    /// What the judge reads out of the rationale.
    pub read: Option<Emotion>,
    /// The rationale.
    pub rationale: Option<String>,
}

impl Record {
    fn json(&self) -> Value {
        let name = |emotion: Option<Emotion>| emotion.map(Emotion::name);
        json!({"photograph": self.photograph, "truth": self.truth.name(), "answer": name(self.answer),
            "fast": name(self.fast), "read": name(self.read), "rationale": self.rationale})
    }
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Metrics {
    /// Photographs.
    pub n: usize,
    /// Share answered rightly after the rationale.
    pub label_accuracy: f64,
    /// Share answered rightly before it.
    pub fast_label_accuracy: f64,
    /// Mean over the classes of the share answered rightly after the rationale.
    pub uar: f64,
    /// That share for each class.
    pub recall: BTreeMap<&'static str, f64>,
    /// Share of completions with a rationale and an answer.
    pub readable: f64,
    /// Share of rationales that name the right emotion.
    pub eea: f64,
    /// Share of rationales that name the emotion answered.
    pub epc: f64,
    /// Share where rationale and answer are both right.
    pub fcr: f64,
    /// Share of stated cues that the measurement bears out; none where nothing was stated.
    pub cue_accuracy: Option<f64>,
    /// The same against the cues of another photograph: what saying the usual would get.
    pub cue_accuracy_shuffled: Option<f64>,
}

/// One thread's models.
struct Reader {
    watcher: Watcher<CpuDevice>,
    judge: Verifier<CpuDevice>,
    emotions: Vec<Emotion>,
}

/// Runs `candor-tools eval`.
pub fn run(args: &EvalArgs) -> anyhow::Result<()> {
    ensure!(args.threads > 0, "--threads must be at least 1");
    let faces = Faces::open(&args.faces, &args.part)?;
    let truths = emotions(&faces, &args.faces)?;
    let count = args.limit.unwrap_or(faces.len()).clamp(1, faces.len());
    let indices: Vec<usize> = (0..count).map(|i| i * faces.len() / count).collect();
    let work = |reader: &mut Reader, place: usize| {
        let index = indices[place];
        reader.read(&faces, index, truths[index]).with_context(|| format!("photograph {index}"))
    };
    let records = workers::run(count, args.threads, "photographs", || Reader::open(args), work)?;
    if let Some(path) = &args.records {
        let failed = || format!("cannot write {}", path.display());
        let mut out = BufWriter::new(File::create(path).with_context(failed)?);
        for record in &records {
            writeln!(out, "{}", record.json()).with_context(failed)?;
        }
        out.flush().with_context(failed)?;
    }
    let (metrics, claims) = measure(&records, &faces.cues);
    if args.json {
        say(serde_json::to_string(&metrics)?)?;
    } else {
        print(&metrics, claims)?;
    }
    Ok(())
}

/// The emotion of each photograph.
fn emotions(faces: &Faces, path: &Path) -> anyhow::Result<Vec<Emotion>> {
    let classes: anyhow::Result<Vec<Emotion>> = faces
        .classes
        .iter()
        .map(|c| Emotion::fold(c).with_context(|| format!("{}: class {c:?} is no known emotion", path.display())))
        .collect();
    let classes = classes?;
    Ok(faces.labels.iter().map(|&label| classes[usize::from(label)]).collect())
}

impl Reader {
    fn open(args: &EvalArgs) -> anyhow::Result<Reader> {
        // The photographs are cut to the face already, so the model's own way of finding one is not asked for; its
        // other steps (detail, colour) are.
        let settings = WatchSettings { fit: Some(Fit::Stretch), ..WatchSettings::default() };
        let device = || CpuDevice::new(Some(1));
        let watcher = Watcher::open(&args.model, args.verifier.as_deref(), device(), settings)?;
        let named = watcher.manifest().verifier_folder();
        let folder =
            args.verifier.clone().or(named).context("the model names no verifier; give one with --verifier")?;
        let judge = Verifier::open(&folder, device())?;
        Ok(Reader { emotions: watcher.manifest().emotions(), watcher, judge })
    }

    fn read(&mut self, faces: &Faces, index: usize, truth: Emotion) -> anyhow::Result<Record> {
        let frames = self.watcher.model().config().frames;
        let observation = self.watcher.observe("photograph", &still(faces, index, frames))?;
        let best = |probabilities: &Option<candor::observation::Probabilities>| {
            probabilities.as_ref().and_then(|p| p.best()).and_then(Emotion::fold)
        };
        let read = match &observation.rationale {
            Some(rationale) => judge(&mut self.judge, rationale, &self.emotions)?,
            None => None,
        };
        Ok(Record {
            photograph: index,
            truth,
            answer: best(&observation.probabilities),
            fast: best(&observation.fast_probabilities),
            read,
            rationale: observation.rationale,
        })
    }
}

/// A window whose every frame is the photograph.
fn still(faces: &Faces, index: usize, frames: usize) -> Window {
    let frame = Arc::new(Frame {
        rgb: faces.image(index).iter().flat_map(|&grey| [grey; 3]).collect(),
        width: faces.side,
        height: faces.side,
        pts_s: 0.0,
        monotonic_s: 0.0,
        wall: SystemTime::UNIX_EPOCH,
    });
    Window {
        index: 0,
        start_s: 0.0,
        end_s: 1.0,
        start_monotonic_s: 0.0,
        end_monotonic_s: 0.0,
        start_wall: SystemTime::UNIX_EPOCH,
        end_wall: SystemTime::UNIX_EPOCH,
        frame_count: frames,
        frames: vec![frame; frames],
    }
}

/// The emotion, of those given, that a rationale names.
pub fn judge(
    verifier: &mut impl SentenceClassifier,
    rationale: &str,
    emotions: &[Emotion],
) -> anyhow::Result<Option<Emotion>> {
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

/// All metrics, and how many claims were made of measured faces. `cues` are those of the whole part.
fn measure(records: &[Record], cues: &[Option<[f32; Cue::COUNT]>]) -> (Metrics, usize) {
    let n = records.len();
    let share = |is: &dyn Fn(&Record) -> bool| records.iter().filter(|r| is(r)).count() as f64 / n.max(1) as f64;
    let right = |r: &Record| r.answer == Some(r.truth);
    let recall: BTreeMap<&str, f64> = Emotion::all()
        .filter_map(|emotion| {
            let of: Vec<&Record> = records.iter().filter(|r| r.truth == emotion).collect();
            let found = of.iter().filter(|r| right(r)).count();
            (!of.is_empty()).then(|| (emotion.name(), found as f64 / of.len() as f64))
        })
        .collect();

    // Measured photographs in a random circle: each is also held against the cues of the next.
    let mut circle: Vec<(&Record, &[f32; Cue::COUNT])> =
        records.iter().filter_map(|r| Some((r, cues.get(r.photograph)?.as_ref()?))).collect();
    circle.shuffle(&mut ChaCha8Rng::seed_from_u64(SHUFFLE_SEED));
    let (mut claims, mut borne_out, mut by_chance) = (0, 0, 0);
    for (place, (record, own)) in circle.iter().enumerate() {
        let other = circle[(place + 1) % circle.len()].1;
        for claim in cue_claims(record.rationale.as_deref().unwrap_or_default()) {
            claims += 1;
            borne_out += usize::from(claim_is_right(claim, own));
            by_chance += usize::from(claim_is_right(claim, other));
        }
    }
    let of_claims = |count: usize| (claims > 0).then(|| count as f64 / claims as f64);
    let metrics = Metrics {
        n,
        label_accuracy: share(&right),
        fast_label_accuracy: share(&|r| r.fast == Some(r.truth)),
        uar: recall.values().sum::<f64>() / recall.len().max(1) as f64,
        recall,
        readable: share(&|r| r.rationale.is_some() && r.answer.is_some()),
        eea: share(&|r| r.read == Some(r.truth)),
        epc: share(&|r| r.read.is_some() && r.read == r.answer),
        fcr: share(&|r| right(r) && r.read == Some(r.truth)),
        cue_accuracy: of_claims(borne_out),
        cue_accuracy_shuffled: of_claims(by_chance),
    };
    (metrics, claims)
}

fn print(metrics: &Metrics, claims: usize) -> io::Result<()> {
    let cue = |value: Option<f64>| value.map_or("none stated".to_owned(), |v| format!("{v:.4}"));
    for (name, value) in [
        ("photographs", metrics.n.to_string()),
        ("label right after the rationale (WAR)", format!("{:.4}", metrics.label_accuracy)),
        ("label right in the fast answer", format!("{:.4}", metrics.fast_label_accuracy)),
        ("mean recall of the classes (UAR)", format!("{:.4}", metrics.uar)),
        ("readable", format!("{:.4}", metrics.readable)),
        ("rationale names the right emotion (EEA)", format!("{:.4}", metrics.eea)),
        ("rationale and label agree (EPC)", format!("{:.4}", metrics.epc)),
        ("both right (FCR)", format!("{:.4}", metrics.fcr)),
        ("stated cues of measured faces", claims.to_string()),
        ("of them borne out", cue(metrics.cue_accuracy)),
        ("of them borne out by another face", cue(metrics.cue_accuracy_shuffled)),
    ] {
        say(format_args!("{name:42} {value}"))?;
    }
    for (emotion, share) in &metrics.recall {
        say(format_args!("  right of those that are {emotion:17} {share:.4}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candor::verify::VerifierError;

    use super::*;

    fn record(photograph: usize, truth: &str, answer: &str, read: &str, rationale: &str) -> Record {
        Record {
            photograph,
            truth: Emotion::fold(truth).unwrap(),
            answer: Emotion::fold(answer),
            fast: Emotion::fold("happy"),
            read: Emotion::fold(read),
            rationale: (!rationale.is_empty()).then(|| rationale.to_owned()),
        }
    }

    #[test]
    fn metrics_follow_their_definitions() {
        let records = [
            record(0, "happy", "happy", "happy", "The mouth is open. They look happy."),
            record(1, "happy", "happy", "sad", "The mouth is closed. They look sad."),
            record(2, "sad", "happy", "sad", "The eyes are wide open."),
            record(3, "angry", "", "", ""),
        ];
        let mut cues = vec![None; 4];
        let mut open = [0.0; Cue::COUNT];
        open[Cue::MouthOpening as usize] = 1.0;
        cues[0] = Some(open);
        cues[1] = Some(open);
        let (metrics, claims) = measure(&records, &cues);
        assert_eq!((metrics.n, claims), (4, 2));
        assert_eq!((metrics.label_accuracy, metrics.fast_label_accuracy), (0.5, 0.5));
        assert!((metrics.uar - 1.0 / 3.0).abs() < 1e-9);
        let recall = |class: &str| metrics.recall[Emotion::fold(class).unwrap().name()];
        assert_eq!((recall("happy"), recall("sad"), metrics.recall.len()), (1.0, 0.0, 3));
        assert_eq!((metrics.readable, metrics.eea, metrics.epc, metrics.fcr), (0.75, 0.5, 0.25, 0.25));
        // "open" is right of both, "closed" of neither, whichever face is asked.
        assert_eq!((metrics.cue_accuracy, metrics.cue_accuracy_shuffled), (Some(0.5), Some(0.5)));
        let (metrics, _) = measure(&records, &[None; 4]);
        assert_eq!(metrics.cue_accuracy, None);
    }

    #[test]
    fn the_control_tells_looking_from_guessing() {
        // Every second mouth is open, and each rationale says rightly which.
        let cues: Vec<_> = (0..200)
            .map(|i| {
                let mut cues = [0.0; Cue::COUNT];
                cues[Cue::MouthOpening as usize] = if i % 2 == 0 { 1.0 } else { -1.0 };
                Some(cues)
            })
            .collect();
        let says = |i: usize| if i.is_multiple_of(2) { "The mouth is open." } else { "The mouth is closed." };
        let records: Vec<Record> = (0..200).map(|i| record(i, "sad", "sad", "sad", says(i))).collect();
        let (metrics, _) = measure(&records, &cues);
        assert_eq!(metrics.cue_accuracy, Some(1.0));
        assert!((metrics.cue_accuracy_shuffled.unwrap() - 0.5).abs() < 0.12, "{metrics:?}");
    }

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
