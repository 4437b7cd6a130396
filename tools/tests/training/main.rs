//! The trainings as a user runs them, in processes of their own: killed, interrupted, short of space, with damaged
//! models; and what they take of memory against what they plan.
#![allow(clippy::unwrap_used)]

mod failures;
mod kill;
mod memory;

use candor_tools::data::rationale::Cue;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;
use tempfile::TempDir;

const LABELS: [&str; 7] = ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"];
const PHOTOGRAPHS: usize = 12;

/// A model's folder of the repository.
fn models(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models").join(name)
}

/// A folder with photographs and the lists of them: `rewards.jsonl` with labels, `tuning.json` with rationales.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Place {
        let place = Place { folder: tempfile::tempdir().unwrap() };
        write_faces(&place.path("faces.safetensors"));
        let rewards: Vec<String> = (0..PHOTOGRAPHS)
            .map(|row| json!({"video": reference(row), "solution": LABELS[row % 7]}).to_string())
            .collect();
        fs::write(place.path("rewards.jsonl"), rewards.join("\n")).unwrap();
        let tuning: Vec<Value> = (0..PHOTOGRAPHS)
            .map(|row| {
                let label = LABELS[row % 7];
                let answer = format!("<think>The mouth is open. It looks {label}.</think>\n<answer>{label}</answer>");
                let question = json!({"from": "human", "value": "<video>\n<audio>\nWhich emotion is it?"});
                json!({"video": reference(row), "conversations": [question, {"from": "gpt", "value": answer}]})
            })
            .collect();
        fs::write(place.path("tuning.json"), Value::Array(tuning).to_string()).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A reward fine-tuning of six small steps that changes the weights in each, with a checkpoint after every one.
    fn grpo(&self, out: &str) -> Command {
        self.grpo_with(out, &["--rate", "1e-3", "--steps", "6"])
    }

    /// The same with another rate and other steps.
    fn grpo_with(&self, out: &str, options: &[&str]) -> Command {
        let mut command = self.train("grpo", "rewards.jsonl", out);
        command.args(["--prompts", "2", "--group", "4", "--max-new-tokens", "80", "--temperature", "1.2"]);
        command.args(["--groundedness-weight", "1", "--save-every", "0"]).args(options);
        command
    }

    /// A supervised tuning of eight small steps.
    fn tune(&self, out: &str) -> Command {
        let mut command = self.train("tune", "tuning.json", out);
        command.args(["--batch", "4", "--steps", "8", "--save-every", "0"]);
        command
    }

    fn train(&self, what: &str, data: &str, out: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_candor-tools"));
        command.args(["train", what]);
        for (option, path) in [
            ("--model", models("default")),
            ("--data", self.path(data)),
            ("--out", self.path(out)),
            ("--features", self.path("features")),
        ] {
            command.arg(option).arg(path);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// What a run has come to: its trained weights, its measurements but for timings, and its samples.
    fn result(&self, out: &str) -> RunResult {
        let folder = self.path(out);
        let read = |name: &str| fs::read(folder.join(name)).ok();
        let weights = read("adapter_model.safetensors").or(read("model/model.safetensors")).unwrap();
        let lines = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
        assert!(lines.ends_with('\n'));
        let measurements = lines.lines().map(|line| {
            let mut line: Map<String, Value> = serde_json::from_str(line).unwrap();
            line.retain(|key, _| !key.ends_with("_per_s"));
            line
        });
        let parts = [parts(&folder), parts(&folder.join("model"))].concat();
        assert!(parts.is_empty(), "left behind: {parts:?}");
        RunResult {
            weights,
            measurements: measurements.collect(),
            samples: [read("samples-before.json"), read("samples-after.json")],
        }
    }

    /// Steps of the last checkpoint; 0 without one.
    fn kept(&self, out: &str) -> u64 {
        let Ok(bytes) = fs::read(self.path(out).join("state.safetensors")) else { return 0 };
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        header.metadata().as_ref().unwrap()["steps"].parse().unwrap()
    }
}

#[derive(PartialEq)]
struct RunResult {
    weights: Vec<u8>,
    measurements: Vec<Map<String, Value>>,
    samples: [Option<Vec<u8>>; 2],
}

impl RunResult {
    fn expect(&self, other: &RunResult, what: &str) {
        let (a, b) = (&self.measurements, &other.measurements);
        assert_eq!(a.len(), b.len(), "{what}: steps");
        for (a, b) in a.iter().zip(b) {
            assert_eq!(a, b, "{what}");
        }
        assert!(self.samples == other.samples, "{what}: the samples differ");
        assert!(self.weights == other.weights, "{what}: the weights differ");
    }
}

fn reference(row: usize) -> String {
    format!("faces.safetensors#train/{row}")
}

/// Random photographs with labels and cues.
fn write_faces(path: &Path) {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let images: Vec<u8> = (0..PHOTOGRAPHS * 48 * 48).map(|_| rng.random()).collect();
    let cues: Vec<u8> = (0..PHOTOGRAPHS * 9).flat_map(|_| rng.random_range(-2.0f32..2.0).to_le_bytes()).collect();
    let labels: Vec<u8> = (0..PHOTOGRAPHS).map(|row| (row % 7) as u8).collect();
    let tensors = [
        ("train.images", Dtype::U8, vec![PHOTOGRAPHS, 48, 48], images),
        ("train.labels", Dtype::U8, vec![PHOTOGRAPHS], labels),
        ("train.cues", Dtype::F32, vec![PHOTOGRAPHS, 9], cues),
        ("train.cues_valid", Dtype::U8, vec![PHOTOGRAPHS], vec![1; PHOTOGRAPHS]),
    ];
    let names: Vec<&str> = Cue::ALL.iter().map(|cue| cue.name()).collect();
    let about = HashMap::from([("classes".to_owned(), LABELS.join(",")), ("cues".to_owned(), names.join(","))]);
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(path, safetensors::serialize(views, Some(about)).unwrap()).unwrap();
}

/// The files in a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).map_or_else(|_| Vec::new(), |entries| entries.map(|entry| entry.unwrap().path()).collect())
}

/// Files in a folder that are being written.
fn parts(folder: &Path) -> Vec<PathBuf> {
    files(folder).into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "part")).collect()
}

/// Copies a folder.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

/// Runs to the end, which must be a good one.
fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = said(&output);
    assert!(output.status.success(), "{said}");
    said
}

/// Runs to the end, which must have this exit code. The last line is the message.
fn fail(command: &mut Command, code: i32) -> String {
    let output = command.output().unwrap();
    let said = said(&output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    let last = said.lines().last().unwrap().to_owned();
    assert!(last.starts_with("candor-tools: "), "{said}");
    last
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until something is so, or the process has ended.
fn wait_until(child: &mut Child, so: impl Fn() -> bool) {
    while child.try_wait().unwrap().is_none() && !so() {
        std::thread::sleep(Duration::from_micros(300));
    }
}

/// Lines of a run's log so far.
fn lines(out: &Path) -> usize {
    fs::read(out.join("metrics.jsonl")).map_or(0, |bytes| bytes.iter().filter(|&&byte| byte == b'\n').count())
}

/// Sends a signal by name.
fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([format!("-{name}"), child.id().to_string()]).status().unwrap().success());
}
