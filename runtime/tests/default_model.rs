//! The default model over the demo's clip, as a user runs it.
#![cfg(feature = "media")]

use std::path::{Path, PathBuf};
use std::process::Command;

use candor::observation::Observation;
use candor::verify::Emotion;
use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The standard output of a run in the repository's folder that must succeed.
fn candor(arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_candor"));
    command.env_remove("CANDOR_MODEL").env_remove("CANDOR_VERIFIER").current_dir(root());
    let output = command.args(arguments).output().expect("candor runs");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn watch(arguments: &[&str]) -> Vec<Value> {
    let text = candor(&[&["watch", "--json", "demo/sad-to-happy.mp4"], arguments].concat());
    text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

/// Sadness or another emotion that a crying face may be taken for.
fn distressed(emotion: Emotion) -> bool {
    matches!(emotion, Emotion::Sadness | Emotion::Fear | Emotion::Disgust | Emotion::Anger)
}

#[test]
fn the_clip_goes_from_distress_to_happiness() {
    let schema = serde_json::from_str(include_str!("../../docs/observation.schema.json")).expect("JSON");
    let schema = jsonschema::validator_for(&schema).expect("a schema");
    let lines = watch(&[]);
    assert!(lines.len() >= 15, "{} windows", lines.len());
    let mut emotions = Vec::new();
    for line in &lines {
        if let Err(error) = schema.validate(line) {
            panic!("{error} at {} in {line}", error.instance_path);
        }
        let observation: Observation = serde_json::from_value(line.clone()).expect("an observation");
        let label = observation.label.expect("there is a face in every window of the clip");
        emotions.push(Emotion::fold(&label).expect("a known emotion"));
    }
    let third = emotions.len() / 3;
    let (first, last) = (&emotions[..third], &emotions[emotions.len() - third..]);
    let count = |part: &[Emotion], is: fn(Emotion) -> bool| part.iter().filter(|emotion| is(**emotion)).count();
    assert!(2 * count(first, distressed) > third, "first third: {first:?}");
    assert!(2 * count(last, |emotion| emotion == Emotion::Happiness) > third, "last third: {last:?}");
}

#[test]
fn every_policy_repeats_itself() {
    for policy in ["retry:2", "guide:2"] {
        let [mut first, mut second] = [(); 2].map(|()| watch(&["--policy", policy, "--step", "4"]));
        for line in first.iter_mut().chain(&mut second) {
            line.as_object_mut().expect("an object").remove("times").expect("times");
        }
        assert_eq!(first, second, "{policy}");
    }
}

#[test]
fn the_models_are_sealed_and_small() {
    let mut bytes = 0;
    for folder in ["models/default", "models/default-verifier"] {
        assert!(candor(&["model", "verify", folder]).contains("sha256"));
        let files = std::fs::read_dir(root().join(folder)).expect("the folder can be listed");
        bytes += files.map(|file| file.and_then(|file| file.metadata()).expect("a file").len()).sum::<u64>();
        assert!(root().join(folder).join("README.md").is_file(), "{folder} has no card");
    }
    assert!(bytes <= 60_000_000, "{bytes} bytes");
}

#[test]
fn the_benchmark_gives_every_figure() {
    let report: Value =
        serde_json::from_str(&candor(&["bench", "--runs", "1", "--tokens", "4", "--json"])).expect("JSON");
    for figure in [
        "/open/ms",
        "/vision/frames_per_s",
        "/projector/ms",
        "/prefill/tokens_per_s",
        "/decode/tokens_per_s",
        "/decode/gb_s",
        "/decode/read_roof_percent",
        "/verifier/sentences_per_s",
        "/window/ms",
        "/read_roof_gb_s",
        "/peak_rss_mb",
    ] {
        let value = report.pointer(figure).and_then(Value::as_f64);
        assert!(value.is_some_and(|value| value.is_finite() && value > 0.0), "{figure} is {value:?} in {report}");
    }
}
