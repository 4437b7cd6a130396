//! A run that is killed or interrupted, at any moment and as often as may be, comes to the result of one that is not.

use super::{Place, fail, lines, parts, signal, succeed, wait_until};
use candor::weights::Checkpoint;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, SystemTime};

/// Kills a run again and again, each time after it has come further than before, until it is through.
fn kill_until_done(place: &Place, out: &str, command: impl Fn() -> Command, steps: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let folder = place.path(out);
    let mut kills = 0;
    loop {
        let (kept, begun) = (place.kept(out), SystemTime::now());
        let mut child = command().spawn().unwrap();
        // In the midst of writing a file, or somewhere in the step behind the next checkpoint.
        let writing = rng.random_bool(0.5);
        let young = |part: &PathBuf| fs::metadata(part).and_then(|about| about.modified()).is_ok_and(|at| at > begun);
        wait_until(&mut child, || {
            // Every fourth time it must come further, so that there is an end.
            place.kept(out) > kept || (writing && kills % 4 != 3 && parts(&folder).iter().any(young))
        });
        if !writing {
            std::thread::sleep(Duration::from_millis(rng.random_range(0..250)));
        }
        child.kill().unwrap();
        if child.wait().unwrap().success() {
            break;
        }
        kills += 1;
        assert!(kills < 200, "it comes no further than step {}", place.kept(out));
        if place.kept(out) == steps {
            succeed(&mut command());
            break;
        }
    }
    assert!(kills > 0, "never killed");
}

#[test]
fn reward_fine_tuning_killed_at_any_moment() {
    let place = Place::new();
    let said = succeed(&mut place.grpo("whole"));
    assert!(said.contains("peak memory") && said.contains("training"), "{said}");
    let whole = place.result("whole");
    assert_eq!(whole.measurements.len(), 6);
    assert!(whole.measurements.iter().any(|line| line["norm"].as_f64().unwrap() > 1e-3), "nothing was learnt");
    let factors = Checkpoint::open_file(&place.path("whole/adapter_model.safetensors")).unwrap();
    let b = factors.tensor("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight").unwrap().to_f32();
    assert!(b.iter().any(|value| *value != 0.0), "nothing was learnt");

    kill_until_done(&place, "killed", || place.grpo("killed"), 6);
    place.result("killed").expect(&whole, "killed");
    // Once more, with nothing left to do.
    succeed(&mut place.grpo("killed"));
    place.result("killed").expect(&whole, "run again");
}

#[test]
fn what_a_kill_leaves_in_the_midst_of_writing_is_of_no_harm() {
    let place = Place::new();
    succeed(&mut place.grpo("whole"));
    let out = place.path("cut");
    fail(place.grpo("cut").args(["--stop-after", "3"]), 130);
    // Parts of files, a part of a line, and lines of steps that the checkpoint does not know.
    for name in ["state.part", "adapter_model.part", "metrics.part", "report.part", "run.part"] {
        fs::write(out.join(name), b"half of something").unwrap();
    }
    let mut log = fs::OpenOptions::new().append(true).open(out.join("metrics.jsonl")).unwrap();
    log.write_all(b"{\"step\":4,\"reward\":9.0}\n{\"step\":5,\"rew").unwrap();
    drop(log);
    succeed(&mut place.grpo("cut"));
    place.result("cut").expect(&place.result("whole"), "cut");
}

#[test]
fn an_interrupt_stops_behind_a_step() {
    let place = Place::new();
    // More steps than are done before the signal arrives, however slow this test is beside the run.
    let run = |out: &str, options: &[&str]| {
        let mut command = place.grpo_with(out, &["--rate", "1e-3", "--steps", "2000"]);
        command.args(options);
        command
    };
    let mut child = run("interrupted", &[]).spawn().unwrap();
    wait_until(&mut child, || lines(&place.path("interrupted")) > 0);
    signal(&child, "INT");
    let output = child.wait_with_output().unwrap();
    let said = super::said(&output);
    assert_eq!(output.status.code(), Some(130), "{said}");
    let kept = place.kept("interrupted");
    assert!(kept > 0 && kept < 2000, "{kept}");
    let message = format!("candor-tools: stopped at step {kept} of 2000; the same command goes on from there");
    assert_eq!(said.lines().last(), Some(message.as_str()));
    assert_eq!(lines(&place.path("interrupted")) as u64, kept);
    let end = (kept + 2).to_string();
    for out in ["interrupted", "whole"] {
        fail(&mut run(out, &["--stop-after", &end]), 130);
    }
    place.result("interrupted").expect(&place.result("whole"), "interrupted");
}

#[test]
fn supervised_tuning_killed_at_any_moment() {
    let place = Place::new();
    for options in [&["--full", "--rate", "1e-4"][..], &["--checkpointing"]] {
        let kind = options[0].trim_start_matches('-');
        let (whole, killed) = (format!("whole-{kind}"), format!("killed-{kind}"));
        succeed(place.tune(&whole).args(options));
        let result = place.result(&whole);
        let loss = |step: usize| result.measurements[step]["loss"].as_f64().unwrap();
        assert!(loss(7) < 0.97 * loss(0), "{} {}", loss(0), loss(7));
        let command = || {
            let mut command = place.tune(&killed);
            command.args(options);
            command
        };
        kill_until_done(&place, &killed, command, 8);
        place.result(&killed).expect(&result, kind);
    }
}

#[test]
fn one_process_a_folder() {
    let place = Place::new();
    let mut first = place.tune("run").spawn().unwrap();
    wait_until(&mut first, || lines(&place.path("run")) > 0);
    let message = fail(&mut place.tune("run"), 1);
    assert!(message.contains(&format!("is in use by process {}", first.id())), "{message}");
    let output = first.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", super::said(&output));
    assert_eq!(lines(&place.path("run")), 8);
}
