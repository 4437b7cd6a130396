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
        serde_json::from_str(&candor(&["bench", "--repeat", "2", "--tokens", "4", "--json"])).expect("JSON");
    let positive = |figure: Option<&Value>| figure.and_then(Value::as_f64).is_some_and(|v| v.is_finite() && v > 0.0);
    for figure in ["read_roof_gb_s", "compute_roof_gflop_s", "peak_rss_mb"] {
        assert!(positive(report.get(figure)), "{figure} in {report}");
    }
    for (name, more) in [
        ("open", &["mb"][..]),
        ("vision", &["gflop_s", "compute_roof_percent"]),
        ("projector", &["gb_s"]),
        ("prefill", &["gflop_s", "compute_roof_percent"]),
        ("decode", &["positions", "gb_s", "read_roof_percent"]),
        ("verifier", &["gflop_s"]),
        ("window", &[]),
    ] {
        let stages = report["stages"].as_array().expect("stages");
        let stage = stages.iter().find(|stage| stage["stage"] == name).expect(name);
        for figure in ["ms", "count", "per_s", "rss_mb"].iter().chain(more) {
            assert!(positive(stage.get(figure)), "{figure} of {stage}");
        }
        assert_eq!(stage["runs_ms"].as_array().map(Vec::len), Some(2), "{stage}");
    }
}

#[test]
fn the_benchmark_times_what_is_asked_for() {
    let asked = "bench --stages prefill,decode --prompt 7,130 --positions 20 --repeat 1 --tokens 2 --json --threads 1";
    let report: Value = serde_json::from_str(&candor(&asked.split(' ').collect::<Vec<_>>())).expect("JSON");
    let stages = report["stages"].as_array().expect("stages").iter();
    let found: Vec<_> = stages.map(|s| (s["stage"].as_str().unwrap_or_default(), s["count"].as_u64())).collect();
    assert_eq!(found, [("open", Some(1)), ("prefill", Some(7)), ("prefill", Some(130)), ("decode", Some(2))]);
    assert_eq!((&report["stages"][3]["positions"], &report["threads"]), (&20.into(), &1.into()));
}
