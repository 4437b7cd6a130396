#![allow(clippy::unwrap_used)]
use candor::verify::Verdict;

use super::record::{Judged, TokenCounts};
use super::*;

pub(super) fn record(id: usize, truth: &str, answer: &str, read: &str, rationale: &str) -> Record {
    let said = !rationale.is_empty();
    Record {
        id: format!("val/{id}"),
        truth: Emotion::fold(truth).unwrap(),
        answer: Emotion::fold(answer),
        fast: Emotion::fold("happy"),
        read: Judged { verifier: Emotion::fold(read), lexicon: said.then_some(Emotion::Neutral) },
        rationale: said.then(|| rationale.to_owned()),
        sentences: Vec::new(),
        verdict: if read == answer && said { Verdict::Verified } else { Verdict::Contradicted },
        withheld: false,
        tokens: TokenCounts { completion: 30, extra: 0 },
        cues: None,
    }
}

fn four() -> Vec<Record> {
    vec![
        record(0, "happy", "happy", "happy", "The mouth is open. They look happy."),
        record(1, "happy", "happy", "sad", "The mouth is closed. They look sad."),
        record(2, "sad", "happy", "sad", "The eyes are wide open."),
        record(3, "angry", "", "", ""),
    ]
}

fn with_open_mouth() -> [f32; Cue::COUNT] {
    let mut cues = [0.0; Cue::COUNT];
    cues[Cue::MouthOpening as usize] = 1.0;
    cues
}

#[test]
fn metrics_follow_their_definitions() {
    let mut records = four();
    count_cues(&mut records, &[Some(with_open_mouth()), Some(with_open_mouth()), None, None]);
    let metrics = measure(&records, "annotate");
    assert_eq!((metrics.n, metrics.cues_stated), (4, 2));
    assert_eq!((metrics.label_accuracy, metrics.war, metrics.fast_label_accuracy), (0.5, 0.5, 0.5));
    assert!((metrics.uar - 1.0 / 3.0).abs() < 1e-9);
    let recall = |class: &str| metrics.recall[Emotion::fold(class).unwrap().name()];
    assert_eq!((recall("happy"), recall("sad"), metrics.recall.len()), (1.0, 0.0, 3));
    assert_eq!((metrics.readable, metrics.eea, metrics.epc, metrics.fcr), (0.75, 0.5, 0.25, 0.25));
    assert_eq!((metrics.lexicon.eea, metrics.lexicon.epc, metrics.lexicon.fcr), (0.0, 0.0, 0.0));
    // "open" is right of both, "closed" of neither, whichever face is asked.
    assert_eq!((metrics.cue_accuracy, metrics.cue_accuracy_shuffled), (Some(0.5), Some(0.5)));
    assert_eq!((metrics.verified_share, metrics.withheld_share), (0.25, 0.0));
    assert_eq!((metrics.tokens.completion, metrics.tokens.extra), (30.0, 0.0));
    assert_eq!(metrics.confusion.labels, ["happiness", "anger", "sadness"]);
    assert_eq!(metrics.confusion.rows, [[2, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]);
    assert_eq!((metrics.conduct.words, metrics.conduct.repeated_share), (19.0 / 3.0, 0.0));

    let metrics = measure(&four(), "annotate");
    assert_eq!((metrics.cue_accuracy, metrics.cues_stated), (None, 0));
    assert!(!metrics.intervals.contains_key("cue_accuracy"), "{:?}", metrics.intervals);
}

#[test]
fn a_withheld_rationale_is_readable_and_names_nothing() {
    let mut record = record(0, "sad", "sad", "", "");
    record.withheld = true;
    let metrics = measure(&[record], "withhold");
    assert_eq!((metrics.readable, metrics.withheld_share, metrics.eea, metrics.epc), (1.0, 1.0, 0.0, 0.0));
}

/// Scripts read these keys, and the first eleven since the first version.
#[test]
fn the_keys_in_json() {
    let mut records = four();
    count_cues(&mut records, &[Some(with_open_mouth()), None, None, None]);
    let json = serde_json::to_value(measure(&records, "guide:4")).unwrap();
    for key in [
        "n",
        "label_accuracy",
        "fast_label_accuracy",
        "uar",
        "recall",
        "readable",
        "eea",
        "epc",
        "fcr",
        "cue_accuracy",
        "cue_accuracy_shuffled",
        "war",
        "intervals",
        "confusion",
        "tokens",
        "verified_share",
        "policy",
        "lexicon",
        "distinct_1",
        "distinct_2",
        "naming_share",
        "sentences",
        "words",
        "one_sentence_share",
        "repeated_share",
    ] {
        assert!(!json[key].is_null(), "{key} in {json}");
    }
    for key in ["war", "uar", "eea", "epc", "fcr", "readable", "cue_accuracy", "fast_label_accuracy", "lexicon_eea"] {
        let ends = [0, 1].map(|end| json["intervals"][key][end].as_f64().unwrap());
        let value = metric(&json, key);
        assert!(ends[0] <= value && value <= ends[1], "{key} {value} {ends:?}");
    }
    assert_eq!(json["policy"], "guide:4");
    assert!(json["lexicon"]["epc"].is_number());
    assert!(json["tokens"]["completion"].is_number() && json["tokens"]["extra"].is_number());
}

fn metric(json: &serde_json::Value, key: &str) -> f64 {
    key.strip_prefix("lexicon_").map_or(&json[key], |own| &json["lexicon"][own]).as_f64().unwrap()
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
    let mut records: Vec<Record> = (0..200).map(|i| record(i, "sad", "sad", "sad", says(i))).collect();
    count_cues(&mut records, &cues);
    let metrics = measure(&records, "annotate");
    assert_eq!(metrics.cue_accuracy, Some(1.0));
    assert!((metrics.cue_accuracy_shuffled.unwrap() - 0.5).abs() < 0.12, "{metrics:?}");
}

fn item(id: &str, line: usize) -> Item {
    Item {
        id: id.into(),
        line,
        media: Media::Clip("a.mp4".into()),
        prompt: None,
        label: "sad".into(),
        emotion: Emotion::Sadness,
        rationale: None,
    }
}

#[test]
fn ids_are_made_to_stand_once() {
    let mut items = [item("a.mp4", 1), item("b.mp4", 2), item("a.mp4", 3)];
    make_unique(&mut items);
    assert_eq!(items.map(|item| item.id), ["a.mp4 (entry 1)", "b.mp4", "a.mp4 (entry 3)"]);
}

#[test]
fn a_limit_is_spread_over_the_data() {
    let items: Vec<Item> = (0..10).map(|i| item("a", i)).collect();
    let lines = |limit| spread(items.clone(), limit).iter().map(|item| item.line).collect::<Vec<_>>();
    assert_eq!(lines(3), [0, 3, 6]);
    assert_eq!(lines(99), (0..10).collect::<Vec<_>>());
    assert_eq!(lines(1), [0]);
}

#[test]
fn records_come_back_as_they_were() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("records.jsonl");
    let mut records = four();
    count_cues(&mut records, &[Some(with_open_mouth()), None, None, None]);
    let mut bytes = Vec::new();
    record::write(&mut bytes, &records).unwrap();
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(record::read(&path).unwrap(), records);
}

#[test]
fn hostile_records_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("records.jsonl");
    let mut good = Vec::new();
    record::write(&mut good, &four()[..1]).unwrap();
    let good = String::from_utf8(good).unwrap();
    let with = |from: &str, to: &str| {
        assert!(good.contains(from), "{from} in {good}");
        good.replacen(from, to, 1)
    };
    for (text, message) in [
        ("".to_owned(), "has no record"),
        ("\n \n".to_owned(), "has no record"),
        ("{}".to_owned(), "line 1: missing field `id`"),
        ("[1, 2]".to_owned(), "line 1"),
        (format!("{good}{good}"), "line 2: id \"val/0\" stands twice"),
        (format!("{good}\n{{\"id\""), "line 3"),
        (with("\"truth\":\"happiness\"", "\"truth\":\"bored\""), "\"bored\" is no known emotion"),
        (with("\"answer\":\"happiness\"", "\"answer\":7"), "line 1"),
        (with("\"completion\":30", "\"completion\":-1"), "line 1"),
        (with("\"completion\":30", "\"completion\":1e400"), "line 1"),
        (with("\"completion\":30", "\"completion\":99999999999"), "line 1"),
        (with("\"verdict\":\"verified\"", "\"verdict\":\"perhaps\""), "perhaps"),
        (with("\"cues\":null", "\"cues\":{\"stated\":1,\"right\":2,\"right_by_chance\":0}"), "2 and 0 of 1"),
        (with("\"rationale\":\"The mouth is open. They look happy.\"", "\"rationale\":null"), "no rationale"),
        (format!("{}{good}", "[".repeat(200_000)), "line 1"),
        ("x".repeat(2 << 20), "longer than"),
    ] {
        std::fs::write(&path, &text).unwrap();
        let error = record::read(&path).unwrap_err().to_string();
        assert!(error.contains(message), "{error:?} lacks {message:?}");
    }
    std::fs::write(&path, b"\xff\xfe{}").unwrap();
    assert!(record::read(&path).unwrap_err().to_string().contains("line 1"));
    let error = record::read(&folder.path().join("none")).unwrap_err().to_string();
    assert!(error.contains("cannot read"), "{error}");
    std::fs::write(&path, good.as_bytes()).unwrap();
    assert_eq!(record::read(&path).unwrap().len(), 1);
}
