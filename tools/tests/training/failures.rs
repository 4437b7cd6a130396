//! What goes wrong in mid-run is said in one line that names the step and the cause, and the run goes on from its last
//! checkpoint once that is put right, to the result of a run that nothing happened to.

use super::{PHOTOGRAPHS, Place, copy, fail, lines, models, succeed, wait_until};
use safetensors::SafeTensors;
use serde_json::json;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// The same command with files of at most `blocks` blocks of 512 bytes, as on a disk that is nearly full.
fn limited(command: &Command, blocks: usize) -> Command {
    let mut shell = Command::new("sh");
    // Without a handler the system would end the process instead of telling it.
    shell.args(["-c", &format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"")]);
    shell.arg(command.get_program()).args(command.get_args());
    shell.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    shell
}

#[test]
fn no_space_for_the_checkpoint() {
    let place = Place::new();
    succeed(&mut place.grpo("whole"));
    fail(place.grpo("run").args(["--stop-after", "2"]), 130);
    let before = fs::read(place.path("run/state.safetensors")).unwrap();
    let message = fail(&mut limited(&place.grpo("run"), 2000), 1);
    for part in
        ["step 3 could not be kept", "from step 2, with nothing before it lost", "state.safetensors", "too large"]
    {
        assert!(message.contains(part), "{part:?} in {message}");
    }
    assert!(fs::read(place.path("run/state.safetensors")).unwrap() == before, "the last checkpoint stays");
    assert!(!place.path("run/state.part").exists(), "a full disk is left no fuller");
    // Nor for the log: room for the files that are there, and none for what comes.
    let message = fail(&mut limited(&place.grpo("run"), 0), 1);
    assert!(message.contains("samples") || message.contains("metrics.jsonl") || message.contains("state"), "{message}");
    succeed(&mut place.grpo("run"));
    place.result("run").expect(&place.result("whole"), "after the disk was full");
}

/// Fills a tensor of a file with 0xff bytes: not a number in any of the float types.
fn poison(file: &Path, tensor: &str) {
    let mut bytes = fs::read(file).unwrap();
    let place = {
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let data = tensors.tensor(tensor).unwrap().data();
        let start = data.as_ptr() as usize - bytes.as_ptr() as usize;
        start..start + data.len()
    };
    bytes[place].fill(0xff);
    fs::write(file, bytes).unwrap();
}

#[test]
fn a_verifier_that_breaks() {
    let place = Place::new();
    let verifier = place.path("verifier");
    copy(&models("default-verifier"), &verifier);
    let grpo = |out: &str| {
        let mut command = place.grpo(out);
        command.arg("--verifier").arg(&verifier);
        command
    };
    succeed(&mut grpo("whole"));
    fail(grpo("run").args(["--stop-after", "2"]), 130);

    // Its weights are not numbers: a reward would not be one either.
    poison(&verifier.join("model.safetensors"), "classifier.bias");
    let message = fail(&mut grpo("run"), 1);
    for part in ["step 3: entry ", "faces.safetensors#train/", "its weights are damaged", "from step 2"] {
        assert!(message.contains(part), "{part:?} in {message}");
    }
    assert_eq!(place.kept("run"), 2);

    // Cut off, and gone.
    let weights = fs::read(models("default-verifier").join("model.safetensors")).unwrap();
    fs::remove_file(verifier.join("model.safetensors")).unwrap();
    let message = fail(&mut grpo("run"), 1);
    assert!(message.contains("verifier") && message.contains("model.safetensors"), "{message}");
    fs::write(verifier.join("model.safetensors"), &weights[..weights.len() / 2]).unwrap();
    let message = fail(&mut grpo("run"), 1);
    assert!(message.contains("verifier/model.safetensors"), "{message}");

    // Another one in its place.
    fs::write(verifier.join("model.safetensors"), &weights).unwrap();
    let manifest = fs::read_to_string(verifier.join("candor.toml")).unwrap();
    let digest = manifest.split('"').find(|part| part.len() == 64 && part.bytes().all(|b| b.is_ascii_hexdigit()));
    fs::write(verifier.join("candor.toml"), manifest.replace(digest.unwrap(), &"0".repeat(64))).unwrap();
    let message = fail(&mut grpo("run"), 1);
    assert!(message.contains("the run began with verifier_sha256"), "{message}");

    fs::write(verifier.join("candor.toml"), manifest).unwrap();
    succeed(&mut grpo("run"));
    place.result("run").expect(&place.result("whole"), "with the verifier whole again");
}

#[test]
fn numbers_that_overflow() {
    let place = Place::new();
    let message = fail(&mut place.grpo_with("run", &["--rate", "1e30", "--steps", "6"]), 1);
    assert!(message.contains("step 2: "), "{message}");
    assert!(message.contains("a lower --rate and another --out"), "{message}");
    assert!(message.contains("the checkpoint of step 1 stays as it is"), "{message}");
    assert_eq!((place.kept("run"), lines(&place.path("run"))), (1, 1));
    let message = fail(place.tune("tune").args(["--full", "--rate", "1e30", "--warm-up", "0"]), 1);
    assert!(message.contains("step 2: ") && message.contains("a lower --rate"), "{message}");
    assert!(message.contains("loss is") || message.contains("not finite"), "{message}");
    assert_eq!(place.kept("tune"), 1);
    // A lower rate is another run.
    let message = fail(place.tune("tune").args(["--full", "--rate", "1e-5", "--warm-up", "0"]), 1);
    assert!(message.contains("is no state of this training") && message.contains("1e-5"), "{message}");
}

#[test]
fn features_that_vanish_are_taken_anew() {
    let place = Place::new();
    succeed(&mut place.grpo("whole"));
    let mut child = place.grpo("run").spawn().unwrap();
    wait_until(&mut child, || lines(&place.path("run")) > 0);
    fs::remove_dir_all(place.path("features")).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", super::said(&output));
    place.result("run").expect(&place.result("whole"), "with features taken anew");
}

#[cfg(feature = "media")]
#[test]
fn a_clip_that_vanishes() {
    let place = Place::new();
    let clip = place.path("clip");
    fs::create_dir(&clip).unwrap();
    let portrait = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/portrait.png");
    fs::copy(&portrait, clip.join("1.png")).unwrap();
    let entry =
        json!({"id": "the portrait", "video": "clip", "solution": "<think>She smiles.</think><answer>happy</answer>"});
    fs::write(place.path("tuning.json"), entry.to_string()).unwrap();
    let tune = |out: &str, options: &[&str]| {
        let mut command = place.train("tune", "tuning.json", out);
        command
            .args(["--batch", "1", "--threads", "1", "--steps", "5000", "--schedule", "constant", "--save-every", "0"])
            .args(options);
        command
    };
    let mut child = tune("run", &[]).spawn().unwrap();
    wait_until(&mut child, || place.kept("run") > 1);
    fs::rename(&clip, place.path("elsewhere")).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = super::said(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let message = said.lines().last().unwrap();
    let kept = place.kept("run");
    for part in [format!("step {}: entry 1 (the portrait)", kept + 1), "clip".into(), format!("from step {kept}")] {
        assert!(message.contains(&part), "{part:?} in {message}");
    }
    // As long as it is away nothing runs; when it is back, the run goes on.
    let output = tune("run", &[]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(super::said(&output).contains("there is no"), "{}", super::said(&output));
    fs::rename(place.path("elsewhere"), &clip).unwrap();
    let end = (kept + 2).to_string();
    for out in ["run", "whole"] {
        fail(&mut tune(out, &["--stop-after", &end]), 130);
    }
    place.result("run").expect(&place.result("whole"), "with the clip back");
}

#[test]
fn entries_without_a_rationale_and_those_too_long() {
    let place = Place::new();
    let list = fs::read_to_string(place.path("tuning.json")).unwrap();
    let mut list: Vec<serde_json::Value> = serde_json::from_str(&list).unwrap();
    list[2]["conversations"][1]["value"] = json!("sad");
    let endless = "Endless words. ".repeat(400);
    list[4]["conversations"][1]["value"] = json!(format!("<think>{endless}</think>\n<answer>sad</answer>"));
    fs::write(place.path("tuning.json"), json!(list).to_string()).unwrap();
    let output = place.tune("run").output().unwrap();
    let said = super::said(&output);
    assert_eq!(output.status.code(), Some(1));
    for part in ["2 of 12 entries", "entry 3: has no rationale", "entry 5: takes ", "the model was made for 1024"] {
        assert!(said.contains(part), "{part:?} in {said}");
    }
    let said = succeed(place.tune("run").arg("--skip-bad"));
    assert!(said.contains(&format!("{} entries, 8 steps", PHOTOGRAPHS - 2)), "{said}");
}
