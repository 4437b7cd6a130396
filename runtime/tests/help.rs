//! The command line explains itself, and takes a wrong one for what it is.

use std::path::Path;
use std::process::{Command, Output};

fn candor(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_candor"));
    command.env_remove("CANDOR_MODEL").env_remove("CANDOR_VERIFIER");
    command.args(arguments).output().expect("candor runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// What a run that must fail with this exit code says; it prints no result, and panics nowhere.
fn failure(code: i32, arguments: &[&str]) -> String {
    let output = candor(arguments);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    assert!(output.stdout.is_empty() && !said.contains("panicked"), "{arguments:?}: {said}");
    said
}

/// The commands that a help text lists.
fn commands(help: &str) -> Vec<String> {
    let listed = help.split("Commands:\n").nth(1).unwrap_or_default();
    let lines = listed.lines().take_while(|line| line.starts_with("  "));
    lines.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help").map(str::to_string).collect()
}

#[test]
fn every_command_and_every_option_is_explained() {
    let help = candor(&["--help"]);
    assert!(help.status.success());
    let names = commands(&text(&help.stdout));
    for expected in ["verify", "model", "trace", "plan", "bench", "doctor"] {
        assert!(names.iter().any(|name| name == expected), "{expected} is not among {names:?}");
    }
    assert_eq!(names.iter().any(|name| name == "watch"), cfg!(feature = "media"));
    for name in names {
        let output = candor(&[&name, "--help"]);
        let help = text(&output.stdout);
        assert!(output.status.success(), "{name}");
        let about = help.lines().next().unwrap_or_default();
        assert!(about.len() > 20 && !about.starts_with("Usage"), "{name} does not say what it does: {help}");
        // An option's explanation stands behind it or, in the long form, on the next line.
        let lines: Vec<&str> = help.lines().collect();
        for (index, line) in lines.iter().enumerate().filter(|(_, line)| line.trim_start().starts_with('-')) {
            let behind = line.trim_start().split("  ").nth(1).is_some();
            let below = lines.get(index + 1).is_some_and(|next| next.starts_with("          "));
            assert!(behind || below, "{name}: no word about {line}");
        }
    }
}

#[test]
fn the_version_is_the_workspaces() {
    assert_eq!(text(&candor(&["--version"]).stdout).trim(), format!("candor {}", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_wrong_command_line_ends_with_2() {
    assert!(failure(2, &[]).contains("Usage"));
    assert!(failure(2, &["wacth"]).contains("wacth"));
    assert!(failure(2, &["verify", "--emotion", "calm"]).contains("happiness"));
    assert!(failure(2, &["bench", "--repeat", "0"]).contains("--repeat"));
    assert!(failure(2, &["bench", "--stages", "decode,hearing"]).contains("prefill"));
    assert!(failure(2, &["bench", "--prompt", "128,0"]).contains("--prompt"));
    assert!(failure(2, &["bench", "--positions", "-1"]).contains("-1"));
    assert!(failure(2, &["bench", "--threads", "0"]).contains("--threads"));
    assert!(failure(2, &["bench", "--tokens", "many"]).contains("--tokens"));
    assert!(failure(2, &["trace", "--model", "x"]).contains("--inputs"));
    assert!(failure(2, &["model"]).contains("seal"));
}

#[test]
fn a_benchmark_that_the_model_is_not_made_for_is_refused() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/default");
    let model = model.to_str().expect("UTF-8");
    let bench = |more: &[&str]| failure(1, &[&["bench", "--repeat", "1", "--model", model], more].concat());
    assert!(bench(&["--stages", "audio"]).contains("no audio tower"));
    assert!(bench(&["--stages", "decode", "--positions", "1000", "--tokens", "25"]).contains("1024 positions"));
    assert!(bench(&["--stages", "prefill", "--prompt", "2000"]).contains("--prompt"));
    assert!(bench(&["--stages", "verifier", "--verifier", "nowhere"]).contains("nowhere"));
}

#[test]
fn a_folder_that_is_no_model_is_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().to_str().expect("UTF-8");
    assert!(failure(1, &["bench", "--model", "nowhere"]).contains("nowhere"));
    assert!(failure(1, &["model", "verify", "nowhere"]).contains("nowhere"));
    let inputs = Path::new(path).join("in.safetensors");
    std::fs::write(&inputs, b"\x08\0\0\0\0\0\0\0{}      ").expect("the folder can be written");
    let inputs = inputs.to_str().expect("UTF-8");
    for config in [None, Some("{"), Some("{}"), Some("[]"), Some("{\"model_type\": \"llama\"}")] {
        if let Some(config) = config {
            std::fs::write(folder.path().join("config.json"), config).expect("the folder can be written");
        }
        for arguments in [
            &["bench", "--model", path][..],
            &["trace", "--model", path, "--inputs", inputs, "--out", "unused.safetensors"],
        ] {
            let said = failure(1, arguments);
            assert!(said.contains("config.json"), "{config:?}: {said}");
        }
    }
}
