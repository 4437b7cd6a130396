//! `candor plan` says what `candor watch` and `candor bench` then take.
#![cfg(all(feature = "media", target_os = "linux"))]

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

fn candor(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_candor"));
    command.env_remove("CANDOR_MODEL").env_remove("CANDOR_VERIFIER");
    command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("..")).args(arguments);
    command
}

fn json(arguments: &[&str]) -> Value {
    let output = candor(arguments).output().expect("candor runs");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// The most memory that a run held, in MB: the largest VmHWM of its status as long as there is one.
fn watched_mb(arguments: &[&str]) -> f64 {
    let mut child = candor(arguments).stdout(Stdio::null()).spawn().expect("candor runs");
    let status = format!("/proc/{}/status", child.id());
    let mut most = 0.0_f64;
    while child.try_wait().expect("it can be waited for").is_none() {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")?.strip_suffix("kB")?.trim().parse().ok());
        most = most.max(line.unwrap_or(0.0) * 1024.0 / 1e6);
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(child.wait().expect("it ended").success(), "{arguments:?}");
    most
}

#[track_caller]
fn assert_within(measured: f64, planned: f64) {
    println!("{measured:.1} MB measured, {planned:.1} MB planned");
    assert!((measured - planned).abs() <= planned / 10.0, "{measured:.1} MB measured, {planned:.1} MB planned");
}

#[test]
fn watching_the_clip_takes_what_is_planned() {
    let plan = json(&["plan", "--picture", "640x360", "--rate", "24", "--threads", "2", "--json"]);
    let planned = plan["total"]["mb"].as_f64().expect("a figure");
    assert_within(watched_mb(&["watch", "--json", "--threads", "2", "demo/sad-to-happy.mp4"]), planned);
}

#[test]
fn the_stages_take_what_is_planned() {
    let report = json(&["bench", "--repeat", "1", "--tokens", "16", "--threads", "2", "--json"]);
    let figure = |name: &str| report[name].as_f64().expect("a figure");
    assert_within(figure("peak_rss_mb"), figure("planned_mb"));
}

#[test]
fn the_parts_are_listed_and_add_up() {
    let plan = json(&["plan", "--json"]);
    let parts = plan["parts"].as_array().expect("parts");
    for kind in ["file_mb", "anonymous_mb", "mb"] {
        let sum: f64 = parts.iter().map(|part| part[kind].as_f64().expect("a figure")).sum();
        assert!((sum - plan["total"][kind].as_f64().expect("a figure")).abs() < 1e-6, "{kind}");
    }
    assert!(plan["available_mb"].as_f64().is_some_and(|mb| mb > 0.0));
    let output = candor(&["plan"]).output().expect("candor runs");
    let table = String::from_utf8(output.stdout).expect("UTF-8");
    for part in parts {
        let name = part["part"].as_str().expect("a name");
        assert!(table.lines().any(|line| line.starts_with(name)), "{name} is not in {table}");
    }
}

#[test]
fn pictures_of_no_size_are_refused() {
    for size in ["640", "0x360", "640x", "640x360x3", "99999x1"] {
        assert_eq!(
            candor(&["plan", "--picture", size]).output().expect("candor runs").status.code(),
            Some(2),
            "{size}"
        );
    }
}
