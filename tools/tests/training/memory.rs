//! The planned peak against what the system has counted, in processes of their own.

use super::{Place, succeed};
use std::process::Command;

/// Largest difference, as a share of the measured peak.
const TOLERANCE: f64 = 0.15;

fn check(name: &str, command: &mut Command) {
    let said = succeed(command);
    let line = said.lines().find(|line| line.contains("peak memory")).unwrap();
    println!("{name}: {line}");
    let numbers: Vec<f64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
    let [measured, planned] = numbers[..] else { panic!("{line}") };
    assert!(measured > 250.0, "{name}: training must take the most of {measured} MB");
    assert!((planned / measured - 1.0).abs() < TOLERANCE, "{name}: {line}");
}

/// Sizes at which what is trained takes the most. At this temperature tokens are drawn nearly evenly, so that nearly all
/// completions run into their budget, which the plan assumes of all.
#[test]
#[cfg(target_os = "linux")]
fn the_planned_peak_is_what_is_taken() {
    let place = Place::new();
    let grpo = |out: &str, options: &[&str]| {
        let mut command = place.train("grpo", "rewards.jsonl", out);
        command.args(["--temperature", "1000", "--save-every", "1000", "--steps", "1"]).args(options);
        command
    };
    check("factors", &mut grpo("a", &["--prompts", "2", "--group", "32", "--max-new-tokens", "64"]));
    let options =
        ["--prompts", "4", "--group", "48", "--max-new-tokens", "72", "--threads", "1", "--full", "--rate", "1e-6"];
    check("all weights", &mut grpo("b", &options));
    let options = ["--prompts", "2", "--group", "64", "--max-new-tokens", "96", "--checkpointing"];
    check("checkpointing", &mut grpo("c", &options));
}
