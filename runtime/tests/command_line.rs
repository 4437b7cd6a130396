//! The command line as a user runs it, over a small random model: what it prints, that it repeats itself, how it ends,
//! and what it says when something is wrong.
#![cfg(feature = "media")]

#[path = "../../tests/parity/weights.rs"]
#[allow(dead_code)] // the parity tests use the rest
mod weights;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use candor::observation::Observation;
use candor::text::Tokenizer;
use candor::verify::emotions::GO_EMOTIONS;
use candor::weights::Checkpoint;
use serde_json::{Value, json};
use weights::{Case, Stored, Tensors, uniform, write_folder, write_tensors};

/// Four seconds of pictures without a face, as fast as they can be read.
const PICTURES: &str =
    "gst:videotestsrc num-buffers=40 pattern=ball ! video/x-raw,format=RGB,width=64,height=48,framerate=10/1";

/// A model and a verifier in a temporary folder.
struct Models {
    folder: tempfile::TempDir,
}

impl Models {
    /// Random weights; `manifest` is the model's candor.toml.
    fn new(manifest: &str) -> Models {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let models = Models { folder };
        let (model, gate, verifier) = (models.model(), models.model().join("bert-base-uncased"), models.verifier());

        copy_tokenizer("qwen2_parts", &model);
        copy_tokenizer("bert_vocab", &gate);
        let case = Case::load("even");
        let mut config = case.config("untied.f32");
        let mut tensors = case.tensors("untied.f32");
        let words = vocabulary(&model);
        config["vocab_size"] = words.into();
        grow(&mut tensors, "model.embed_tokens.weight", words);
        grow(&mut tensors, "lm_head.weight", words);
        let words = vocabulary(&gate);
        config["bert_config"]["vocab_size"] = words.into();
        grow(&mut tensors, "model.bert_model.embeddings.word_embeddings.weight", words);
        write_folder(&model, &config, &tensors);
        std::fs::write(model.join("candor.toml"), manifest).expect("the folder can be written");

        copy_tokenizer("bert_vocab", &verifier);
        let case = Case::load("bert");
        let mut config = case.config("untied.f32");
        let mut tensors = case.tensors("untied.f32");
        let words = vocabulary(&verifier);
        config["vocab_size"] = words.into();
        grow(&mut tensors, "bert.embeddings.word_embeddings.weight", words);
        config["id2label"] = GO_EMOTIONS.iter().enumerate().map(|(id, name)| (id.to_string(), json!(name))).collect();
        write_folder(&verifier, &config, &tensors);
        models
    }

    /// A model that takes whole pictures and names its verifier.
    fn plain() -> Models {
        Models::new("[model]\nname = 'random'\nmax_new_tokens = 48\nverifier = '../verifier'\n")
    }

    fn model(&self) -> PathBuf {
        self.folder.path().join("model")
    }

    fn verifier(&self) -> PathBuf {
        self.folder.path().join("verifier")
    }

    /// `candor watch` with this model, up to the source.
    fn watch(&self, arguments: &[&str]) -> Command {
        let mut command = candor();
        command.args(["watch", "--json", "--threads", "1", "--window", "1", "--step", "1", "--model"]);
        command.arg(self.model()).args(arguments);
        command
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/text")
}

fn copy_tokenizer(fixture: &str, folder: &Path) {
    std::fs::create_dir_all(folder).expect("the folder can be made");
    for file in std::fs::read_dir(fixtures().join(fixture)).expect("the fixture is there") {
        let file = file.expect("the fixture can be listed");
        std::fs::copy(file.path(), folder.join(file.file_name())).expect("the fixture can be copied");
    }
}

fn vocabulary(folder: &Path) -> usize {
    Tokenizer::open(folder).expect("the tokenizer opens").vocabulary()
}

/// Gives a table of tokens `rows` random rows.
fn grow(tensors: &mut Tensors, name: &str, rows: usize) {
    let width = tensors[name].shape[1];
    let values: Vec<f32> = uniform(name, rows * width).map(|value| value as f32).collect();
    tensors.insert(name.to_string(), Stored::f32(&[rows, width], &values));
}

fn candor() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_candor"));
    command.env_remove("CANDOR_MODEL").env_remove("CANDOR_VERIFIER").env("RUST_LOG", "error");
    command
}

fn run(command: &mut Command) -> Output {
    command.output().expect("candor runs")
}

/// The lines of a run that must succeed.
fn lines(command: &mut Command) -> Vec<Value> {
    let output = run(command);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    read_lines(&output.stdout)
}

fn read_lines(text: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(text).expect("UTF-8");
    text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

/// What a run that must fail says of it.
fn failure(command: &mut Command) -> String {
    let output = run(command);
    assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr).expect("UTF-8")
}

/// What a run that failed said of it.
fn failure_of(output: &Output) -> String {
    assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn without_times(mut lines: Vec<Value>) -> Vec<Value> {
    for line in &mut lines {
        line.as_object_mut().expect("an object").remove("times").expect("times");
    }
    lines
}

#[test]
fn lines_follow_the_schema_and_repeat_themselves() {
    let models = Models::plain();
    let schema = serde_json::from_str(include_str!("../../docs/observation.schema.json")).expect("JSON");
    let schema = jsonschema::validator_for(&schema).expect("a schema");
    for policy in ["annotate", "retry:1", "guide:1", "withhold"] {
        let arguments = ["--policy", policy, "--seed", "7", "--temperature", "0.8", PICTURES];
        let first = lines(&mut models.watch(&arguments));
        assert_eq!(first.len(), 4, "{policy}");
        for (index, line) in first.iter().enumerate() {
            if let Err(error) = schema.validate(line) {
                panic!("{policy}: {error} at {} in {line}", error.instance_path);
            }
            let observation: Observation = serde_json::from_value(line.clone()).expect("an observation");
            assert_eq!(observation.window.index, index as u64);
            assert_eq!(observation.seed, 7 + index as u64);
            let sum: f64 = observation.probabilities.expect("a label").0.iter().map(|entry| entry.1).sum();
            assert!((sum - 1.0).abs() < 1e-6, "{sum}");
            assert_eq!(observation.policy.withheld, observation.rationale.is_none(), "{policy}");
            assert_eq!(observation.policy.resampled > 0, observation.tokens.extra > 0, "{policy}");
        }
        assert_eq!(without_times(first), without_times(lines(&mut models.watch(&arguments))), "{policy}");
    }
}

#[test]
fn trace_writes_what_the_stages_give() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name);
    let trace = |arguments: &[(&str, &str)], out: &str| {
        let mut command = candor();
        command.arg("trace").arg("--out").arg(path(out));
        for (option, name) in arguments {
            command.arg(option).arg(path(name));
        }
        command
    };
    let outputs = |out: &str| {
        let tensors = Checkpoint::open_file(&path(out)).expect("the outputs open");
        tensors
            .names()
            .map(|name| (name.to_owned(), tensors.raw(name).expect("a tensor").shape.to_vec()))
            .collect::<Vec<_>>()
    };
    let (model, verifier) = (Case::load("even"), Case::load("bert"));
    write_folder(&path("model"), &model.config("tied.f16"), &model.tensors("tied.f16"));
    write_folder(&path("verifier"), &verifier.config("untied.f32"), &verifier.tensors("untied.f32"));
    write_tensors(&path("whole"), &model.inputs());
    write_tensors(&path("text"), &Tensors::from([("in.ids".to_owned(), Stored::i64(&[2, 5, 3]))]));
    let mut both = model.inputs();
    both.insert("in.ids".to_owned(), Stored::i64(&[2, 5, 3]));
    write_tensors(&path("both"), &both);

    assert!(run(&mut trace(&[("--model", "model"), ("--inputs", "whole")], "out")).status.success());
    let goldens = Checkpoint::open_file(&model.goldens()).expect("the goldens open");
    let told = outputs("out");
    assert_eq!(told.len(), goldens.names().filter(|name| name.starts_with("tied.f16/")).count());
    for (name, shape) in told {
        assert_eq!(shape, goldens.raw(&format!("tied.f16/{name}")).expect("a golden").shape, "{name}");
    }
    assert!(run(&mut trace(&[("--verifier", "verifier"), ("--inputs", "text")], "logits")).status.success());
    assert_eq!(outputs("logits"), [("out.logits".to_owned(), vec![28])]);

    // Nobody reads what it prints: the result is written all the same.
    let mut unread = trace(&[("--model", "model"), ("--inputs", "whole")], "quiet")
        .stdout(Stdio::piped())
        .spawn()
        .expect("candor runs");
    drop(unread.stdout.take());
    assert!(unread.wait().expect("it ends").success());
    assert_eq!(outputs("quiet"), outputs("out"));

    let all = [("--model", "model"), ("--verifier", "verifier"), ("--inputs", "both")];
    assert!(failure_of(&run(&mut trace(&all, "unused"))).contains("out.logits would be written by both"));
    let none = [("--verifier", "verifier"), ("--inputs", "whole")];
    assert!(failure_of(&run(&mut trace(&none, "unused"))).contains("in.ids"));
    let wrong = [("--model", "verifier"), ("--inputs", "whole")];
    assert!(failure_of(&run(&mut trace(&wrong, "unused"))).contains("config.json"));
    assert!(!path("unused").exists());
}

#[test]
fn another_seed_gives_another_rationale() {
    let models = Models::plain();
    let run = |seed| lines(&mut models.watch(&["--seed", seed, "--temperature", "1", PICTURES]));
    assert_ne!(run("1")[0]["rationale"], run("2")[0]["rationale"]);
}

#[test]
fn no_face_no_emotion() {
    let models = Models::new("[model]\nmax_new_tokens = 48\nverifier = '../verifier'\n[input]\nfit = 'face'\n");
    let lines = lines(&mut models.watch(&[PICTURES]));
    assert_eq!(lines.len(), 4);
    for line in lines {
        let told = ["label", "probabilities", "fast_probabilities", "rationale"];
        assert!(told.iter().all(|key| line[key].is_null()), "{line}");
        assert_eq!((&line["faces"], &line["sentences"], &line["verdict"]), (&json!([]), &json!([]), &json!("empty")));
    }
}

#[test]
fn a_terminal_line_for_each_window_and_a_page() {
    let models = Models::plain();
    let page = models.folder.path().join("page.html");
    let mut command = candor();
    command.args(["watch", "--threads", "1", "--window", "2", "--step", "2", "--model"]).arg(models.model());
    let output = run(command.arg("--html").arg(&page).arg(PICTURES));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert_eq!(text.lines().count(), 2, "{text}");
    assert!(!text.contains('\x1b'), "colour belongs to terminals");
    let page = std::fs::read_to_string(page).expect("the page is there");
    assert!(page.trim_end().ends_with("</html>"));
}

#[test]
fn a_source_that_breaks_leaves_its_lines() {
    let models = Models::plain();
    let broken = format!("{PICTURES} ! identity error-after=25");
    let output = run(&mut models.watch(&[&broken]));
    assert_eq!(output.status.code(), Some(1));
    assert!(!output.stderr.is_empty());
    let lines = read_lines(&output.stdout);
    assert!((2..4).contains(&lines.len()), "{} lines", lines.len());
}

/// Starts watching a stream without an end, and waits for the first line.
fn start_endless(models: &Models) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut command = models.watch(&["test"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("candor starts");
    let mut reader = BufReader::new(child.stdout.take().expect("it is piped"));
    let mut line = String::new();
    reader.read_line(&mut line).expect("a line");
    if line.is_empty() {
        let output = child.wait_with_output().expect("it ends");
        panic!("it ended: {}", String::from_utf8_lossy(&output.stderr));
    }
    serde_json::from_str::<Observation>(&line).expect("an observation");
    (child, reader)
}

#[test]
fn a_reader_that_goes_away_ends_the_run() {
    let models = Models::plain();
    let (child, reader) = start_endless(&models);
    drop(reader);
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success());
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn an_interrupt_ends_the_run_after_a_whole_line() {
    let models = Models::plain();
    let (mut child, mut reader) = start_endless(&models);
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill runs");
    assert!(sent.success());
    let mut rest = Vec::new();
    std::io::Read::read_to_end(&mut reader, &mut rest).expect("the lines end");
    assert!(child.wait().expect("it ends").success());
    assert!(rest.is_empty() || rest.ends_with(b"\n"));
    read_lines(&rest);
}

/// A live source that never gives a frame is not waited for any longer once the user has had enough.
#[test]
fn an_interrupt_ends_the_wait_for_a_silent_source() {
    let models = Models::plain();
    let silent = "gst:appsrc is-live=true format=time ! video/x-raw,format=RGB,width=8,height=8,framerate=1/1";
    let mut command = models.watch(&[silent]);
    command.env("RUST_LOG", "debug").stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("candor runs");
    let mut log = BufReader::new(child.stderr.take().expect("piped")).lines();
    assert!(log.by_ref().any(|line| line.expect("UTF-8").contains("opened gst:")), "it never waited");
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill runs");
    assert!(sent.success());
    let rest: Vec<String> = log.map(|line| line.expect("UTF-8")).collect();
    assert!(child.wait().expect("it ends").success(), "it waited until the source was given up: {rest:?}");
}

#[test]
fn watch_says_what_is_wrong() {
    let models = Models::plain();
    let absent = models.folder.path().join("absent");
    let absent = absent.to_str().expect("UTF-8");
    assert!(failure(&mut models.watch(&["absent.mp4"])).contains("absent.mp4"));
    assert!(failure(candor().args(["watch", "--model", absent, "test"])).contains("--model"));
    assert!(failure(candor().env("CANDOR_MODEL", absent).args(["watch", "test"])).contains("CANDOR_MODEL"));
    assert!(failure(&mut models.watch(&["--policy", "retry", "test"])).contains("guide:N"));
    assert!(failure(&mut models.watch(&["--temperature=-1", PICTURES])).contains("temperature"));
    assert!(failure(&mut models.watch(&["--top-p", "0", PICTURES])).contains("top_p"));
    assert!(failure(&mut models.watch(&["--verifier", absent, "test"])).contains("--verifier"));
    assert!(failure(&mut models.watch(&["--html", "/nowhere/page.html", PICTURES])).contains("/nowhere/page.html"));
    for (text, said) in [
        ("[model]\nnaem = 'x'", "naem"),
        ("[model]\nverifier = 'nowhere'", "nowhere"),
        ("[model]\nverifier = '../verifier'\nmax_new_tokens = 2", "2"),
        ("[model]\nverifier = '.'", "model_type"),
    ] {
        std::fs::write(models.model().join("candor.toml"), text).expect("the folder can be written");
        let error = failure(&mut models.watch(&[PICTURES]));
        assert!(error.contains(said), "{text}: {error}");
    }
}

/// Runs `candor verify` over a text.
fn verify(models: &Models, arguments: &[&str], text: &[u8]) -> Output {
    let mut command = candor();
    command.arg("verify").arg("--verifier").arg(models.verifier()).args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("candor starts");
    child.stdin.take().expect("it is piped").write_all(text).expect("the text is taken");
    child.wait_with_output().expect("it ends")
}

#[test]
fn verify_reads_any_text() {
    let models = Models::plain();
    let completion = "<think>She is angry. The brows are low.</think>\n<answer>angry</answer>";
    for text in [completion, "She is angry. The brows are low.\n"] {
        let output = verify(&models, &["--emotion", "angry", "--json"], text.as_bytes());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let [line] = read_lines(&output.stdout).try_into().expect("one object");
        assert_eq!(line["emotion"], "anger");
        assert_eq!(line["sentences"][0]["text"], "She is angry.");
        assert_eq!(line["sentences"].as_array().map(Vec::len), Some(2));
        assert_eq!(line["verifier"]["sha256"].as_str().map(str::len), Some(64));
        assert!(line["reward"].is_number() && line["verdict"].is_string());
    }
    let output = verify(&models, &["--emotion", "fear", "--json"], b"");
    let [line] = read_lines(&output.stdout).try_into().expect("one object");
    assert_eq!((&line["verdict"], &line["reward"]), (&json!("empty"), &json!(0.0)));
    let output = verify(&models, &["--emotion", "fear"], b"One. Two.");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert_eq!(text.lines().count(), 3, "{text}");

    for (emotion, text, said) in
        [("calm", &b"One."[..], "happiness"), ("fear", b"<think>One.", "think tag"), ("fear", b"\xff", "UTF-8")]
    {
        let output = verify(&models, &["--emotion", emotion], text);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && output.stdout.is_empty() && error.contains(said), "{error}");
    }
}

#[test]
fn a_models_files_are_sealed_and_checked() {
    let models = Models::plain();
    let model = models.model();
    let verify = || run(candor().args(["model", "verify"]).arg(&model));
    assert!(!verify().status.success(), "nothing is listed yet");
    let sealed = run(candor().args(["model", "seal"]).arg(&model));
    assert!(sealed.status.success());
    let checked = verify();
    assert!(checked.status.success());
    assert_eq!(checked.stdout, sealed.stdout);
    // The identity in the lines is the one that was checked.
    let line = lines(&mut models.watch(&[PICTURES])).remove(0);
    let identity = line["model"]["sha256"].as_str().expect("a digest");
    assert!(String::from_utf8_lossy(&checked.stdout).contains(identity));
    std::fs::write(model.join("tokenizer_config.json"), "{}").expect("the folder can be written");
    let changed = verify();
    assert!(!changed.status.success());
    assert!(String::from_utf8_lossy(&changed.stderr).contains("tokenizer_config.json"));
}
