//! `candor doctor`: it says what was chosen, obeys `CANDOR_CPU`, and finds what is missing.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn doctor(cpu: Option<&str>, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_candor"));
    command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("..")).env("RUST_LOG", "error");
    for variable in ["CANDOR_MODEL", "CANDOR_VERIFIER", "CANDOR_CPU"] {
        command.env_remove(variable);
    }
    if let Some(cpu) = cpu {
        command.env("CANDOR_CPU", cpu);
    }
    command.arg("doctor").args(arguments).output().expect("candor runs")
}

/// The report of a run that ends with this exit code.
fn report(code: i32, cpu: Option<&str>, arguments: &[&str]) -> Value {
    let output = doctor(cpu, &[&["--json"], arguments].concat());
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{cpu:?} {arguments:?}: {said}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn strings(list: &Value) -> Vec<&str> {
    list.as_array().expect("a list").iter().map(|value| value.as_str().expect("a string")).collect()
}

#[test]
fn a_good_machine_is_ready() {
    let report = report(0, None, &["--threads", "1"]);
    assert_eq!(report["ready"], true, "{report}");
    assert!(strings(&report["problems"]).is_empty());
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(report["threads"]["used"], 1);
    assert!(report["threads"]["allowed"].as_u64() >= Some(1));
    assert!(report["memory"]["read_gb_s"].as_f64() > Some(0.0));
    let levels = strings(&report["kernels"]["levels"]);
    assert_eq!(report["kernels"]["level"].as_str(), levels.last().copied());
    assert_eq!(report["kernels"]["forced"], false);
    for kind in ["model", "verifier"] {
        assert_eq!(report[kind]["as_listed"], true, "{report}");
        assert_eq!(report[kind]["sha256"].as_str().map(str::len), Some(64));
    }
    #[cfg(feature = "media")]
    assert!(report["media"]["version"].as_str().is_some_and(|version| version.starts_with("GStreamer")));
}

#[test]
fn candor_cpu_forces_every_level() {
    for level in strings(&report(0, None, &[])["kernels"]["levels"]) {
        let kernels = &report(0, Some(level), &[])["kernels"];
        assert_eq!(kernels["level"], level);
        assert_eq!((&kernels["forced"], &kernels["candor_cpu"]), (&Value::from(true), &Value::from(level)));
        let expected = match level {
            "portable" => ("plain Rust", "plain Rust"),
            "avx2" => ("AVX2", "AVX2"),
            "avxvnni" => ("AVX2", "AVX-VNNI"),
            "avx512" => ("AVX-512", "AVX2"),
            "avx512vnni" => ("AVX-512", "AVX-512 VNNI"),
            "neon" => ("NEON", "NEON"),
            "dotprod" => ("NEON", "NEON dotprod"),
            "i8mm" => ("NEON", "NEON i8mm, dotprod where rows are few"),
            other => panic!("{other} is a new level"),
        };
        assert_eq!((kernels["f32"].as_str(), kernels["int8"].as_str()), (Some(expected.0), Some(expected.1)));
        assert_eq!(kernels["int8"], kernels["int4"]);
    }
}

#[test]
fn an_unknown_level_is_remarked_and_left() {
    let report = report(0, Some("mmx"), &[]);
    assert_eq!(report["kernels"]["level"].as_str(), strings(&report["kernels"]["levels"]).last().copied());
    let remarks = strings(&report["remarks"]);
    assert!(remarks.iter().any(|remark| remark.contains("CANDOR_CPU=mmx")), "{remarks:?}");
}

#[test]
fn what_is_missing_is_named_and_ends_with_1() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let empty = folder.path().to_str().expect("UTF-8");
    let verdict = report(1, None, &["--model", empty]);
    assert_eq!(verdict["ready"], false);
    assert!(strings(&verdict["problems"]).iter().any(|problem| problem.contains("config.json")), "{verdict}");

    let nowhere = format!("{empty}/nowhere");
    let verdict = report(1, None, &["--model", &nowhere]);
    assert!(strings(&verdict["problems"]).iter().any(|problem| problem.contains("--model")), "{verdict}");
    assert_eq!(verdict["model"], Value::Null);

    let listed = format!("[files]\n\"model.safetensors\" = \"{}\"\n", "0".repeat(64));
    std::fs::write(folder.path().join("candor.toml"), listed).expect("the folder can be written");
    let verdict = report(1, None, &["--model", empty]);
    assert_eq!(verdict["model"]["as_listed"], false);
    assert!(strings(&verdict["problems"]).iter().any(|problem| problem.contains("model is incomplete")), "{verdict}");
}

#[test]
fn people_read_lines() {
    let output = doctor(None, &[]);
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    for start in ["candor ", "processor ", "kernels ", "threads ", "memory ", "GPU ", "model ", "verifier ", "ready "] {
        assert!(text.lines().any(|line| line.starts_with(start)), "no {start} in {text}");
    }
    let output = doctor(None, &["--model", "/nowhere"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("\nPROBLEM "));
}
