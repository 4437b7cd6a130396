//! What is reused from window to window changes no observation, and saves the work it is there to save.
#![cfg(feature = "media")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candor::media::{Fit, Frame, Source, SourceOptions, Window, Windows};
use candor::model::Model;
use candor::text::{HeadRows, Sampling};
use candor::watch::{Reuse, WatchSettings, Watcher, Work};
use candor_kernels::cpu::CpuDevice;
use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn watcher(settings: WatchSettings) -> Watcher<CpuDevice> {
    let device = CpuDevice::new(Some(2));
    Watcher::open(&root().join("models/default"), None, device, settings).expect("the default model opens")
}

/// The windows of the demo's clip that begin `step` seconds apart.
fn windows(step: f64, most: usize) -> Vec<Window> {
    windows_of(step, most, false)
}

fn windows_of(step: f64, most: usize, steady: bool) -> Vec<Window> {
    let clip = root().join("demo/sad-to-happy.mp4");
    let source = Source::open(clip.to_str().expect("UTF-8"), SourceOptions::default()).expect("the clip opens");
    let mut settings = watcher(WatchSettings::default()).windows(None, Some(step)).expect("settings in range");
    settings.steady = steady;
    Windows::new(source, settings).take(most).map(|window| window.expect("the clip is sound")).collect()
}

/// The observations of windows without their times, and the work they took.
fn observe(settings: WatchSettings, windows: &[Window]) -> (Vec<Value>, Work) {
    let mut watcher = watcher(settings);
    let seen = windows.iter().map(|window| {
        let observation = watcher.observe("clip", window).expect("the window can be read");
        let mut value = serde_json::to_value(observation).expect("JSON");
        value.as_object_mut().expect("an object").remove("times");
        value
    });
    let seen = seen.collect();
    (seen, watcher.work())
}

fn with(reuse: Reuse) -> WatchSettings {
    WatchSettings { reuse, ..WatchSettings::default() }
}

/// The same but for a little in the probabilities.
fn assert_near(seen: &[Value], plain: &[Value], what: &str) {
    assert_eq!(seen.len(), plain.len());
    for (seen, plain) in seen.iter().zip(plain) {
        let [mut seen, mut plain] = [seen, plain].map(|value| value.as_object().expect("an object").clone());
        for name in ["probabilities", "fast_probabilities"] {
            let of = |value: &mut serde_json::Map<String, Value>| value.remove(name).expect("in every observation");
            let (seen, plain) = (of(&mut seen), of(&mut plain));
            for (label, probability) in plain.as_object().expect("an emotion") {
                let difference = seen[label].as_f64().expect("a number") - probability.as_f64().expect("a number");
                assert!(difference.abs() < 1e-6, "{what}: {name} of {label} differ by {difference}");
            }
        }
        assert_eq!(seen, plain, "{what}");
    }
}

/// Everything but what `names` lists.
fn without(names: &str) -> Reuse {
    let off: Reuse = names.parse().expect("names of what can be reused");
    let Reuse { gate, prefix, frames, projector, forced } = off;
    Reuse { gate: !gate, prefix: !prefix, frames: !frames, projector: !projector, forced: !forced }
}

#[test]
fn the_clip_shows_the_same_with_and_without() {
    for (step, most) in [(1.0, usize::MAX), (0.25, 24)] {
        let windows = windows(step, most);
        let (plain, all_work) = observe(with(Reuse::NONE), &windows);
        assert!(plain.len() >= 15 && plain.iter().all(|seen| !seen["label"].is_null()));
        let (reused, work) = observe(with(Reuse::ALL), &windows);
        println!("step {step}, {} windows: {all_work:?} without, {work:?} with", windows.len());
        assert_eq!(plain, reused, "step {step}");
        assert_eq!((all_work.model.gate_runs, work.model.gate_runs), (plain.len() as u64, 1));
        assert!(work.frames_searched <= all_work.frames_searched);
        assert!(work.model.frames_encoded <= all_work.model.frames_encoded);
        assert!(work.model.frames_staged <= all_work.model.frames_staged);
        assert!(work.decoder.positions < all_work.decoder.positions);
        assert!(work.decoder.passes < all_work.decoder.passes);
    }
}

#[test]
fn each_mechanism_alone_changes_nothing() {
    // Windows that share frames, and a still one.
    let mut windows = sliding(4);
    windows.push(Window { index: 4, ..windows[3].clone() });
    let (plain, all_work) = observe(with(Reuse::NONE), &windows);
    for names in ["gate", "frames", "frames,projector", "frames,projector,prefix", "forced"] {
        let (seen, work) = observe(with(names.parse().expect("names")), &windows);
        assert_eq!(seen, plain, "{names}");
        assert_ne!(work, all_work, "{names} saves no work");
    }
    for name in ["gate", "frames", "projector", "prefix", "forced"] {
        let (seen, _) = observe(with(without(name)), &windows);
        assert_eq!(seen, plain, "{name}");
    }
}

#[test]
fn forced_tokens_leave_what_is_drawn_as_it_is() {
    let windows = windows(2.0, 4);
    for seed in 0..3 {
        let sampling = Sampling { temperature: 0.6, top_p: 0.9, seed };
        let settings = |reuse| WatchSettings { sampling, ..with(reuse) };
        let (plain, _) = observe(settings(Reuse::NONE), &windows);
        let (forced, _) = observe(settings(Reuse::ALL), &windows);
        assert_eq!(plain, forced, "seed {seed}");
    }
}

/// Windows over frames of the clip that move on by one frame each.
fn sliding(count: usize) -> Vec<Window> {
    let clip = windows(1.0, usize::MAX);
    let mut frames: Vec<Arc<Frame>> = Vec::new();
    for frame in clip.iter().flat_map(|window| &window.frames) {
        if !frames.iter().any(|known| Arc::ptr_eq(known, frame)) {
            frames.push(Arc::clone(frame));
        }
    }
    let wanted = watcher(WatchSettings::default()).model().config().frames;
    let window = |start: usize| Window {
        index: start as u64,
        frames: frames[start..start + wanted].to_vec(),
        ..clip[0].clone()
    };
    (0..count).map(window).collect()
}

#[test]
fn a_window_that_moves_on_by_one_frame_encodes_one() {
    let windows = sliding(6);
    let settings = |reuse| WatchSettings { fit: Some(Fit::Stretch), ..with(reuse) };
    let (plain, all_work) = observe(settings(Reuse::NONE), &windows);
    let (reused, work) = observe(settings(Reuse::ALL), &windows);
    assert_eq!(reused, plain);
    let frames = windows[0].frames.len() as u64;
    assert_eq!(all_work.model.frames_encoded, 6 * frames);
    assert_eq!(work.model.frames_encoded, frames + 5);
    assert_eq!(work.model.frames_staged, frames + 5);
    // A frame's few tokens are not computed alone, see the projector.
    assert_eq!(work.model.frames_projected, 6 * frames);
}

#[test]
fn a_still_scene_is_seen_once() {
    let mut windows = windows(1.0, 1);
    let other = |index: u64, frames: Vec<Arc<Frame>>| Window { index, frames, ..windows[0].clone() };
    // The same frames again, and equal frames of another decoding.
    let copies = windows[0].frames.iter().map(|frame| Arc::new(Frame::clone(frame))).collect();
    let again = [other(1, windows[0].frames.clone()), other(2, copies)];
    windows.extend(again);
    let (first, once) = observe(with(Reuse::ALL), &windows[..1]);
    let (seen, work) = observe(with(Reuse::ALL), &windows);
    let (plain, _) = observe(with(Reuse::NONE), &windows);
    assert_eq!(seen, plain);
    assert_eq!(seen[0], first[0]);
    assert_eq!(work.model, once.model, "nothing before the decoder is computed again");
    let prompt = first[0]["tokens"]["prompt"].as_u64().expect("a number");
    assert_eq!(work.decoder.positions, 3 * once.decoder.positions - 2 * prompt, "no prompt is read again");
}

#[test]
fn fewer_rows_of_the_head_write_the_same_words() {
    // Every token of the default model's vocabulary is Latin; its labels need few.
    let windows = windows(2.0, 5);
    let (plain, _) = observe(WatchSettings::default(), &windows);
    let (seen, _) = observe(WatchSettings { head_rows: HeadRows::Language, ..WatchSettings::default() }, &windows);
    assert_near(&seen, &plain, "language");
    // With next to no words left, answers still have the format and name a label.
    let (seen, _) = observe(WatchSettings { head_rows: HeadRows::First(300), ..WatchSettings::default() }, &windows);
    assert!(seen.iter().all(|seen| seen["label"].is_string() && seen["rationale"].is_string()));
    assert_ne!(seen, plain);
}

#[test]
fn steady_windows_share_frames() {
    for fit in [None, Some(Fit::Stretch)] {
        let windows = windows_of(1.0, usize::MAX, true);
        let settings = |reuse| WatchSettings { fit, steady: true, ..with(reuse) };
        let (plain, all_work) = observe(settings(Reuse::NONE), &windows);
        let (seen, work) = observe(settings(Reuse::ALL), &windows);
        println!("{fit:?}: {all_work:?} without, {work:?} with");
        assert_eq!(seen, plain);
        let saved = |with: u64, without: u64, share: f64| (with as f64) < (1.0 - share) * without as f64;
        assert!(fit.is_some() || saved(work.frames_searched, all_work.frames_searched, 0.4));
        // A face that moves is cut out elsewhere, and its frames are others then.
        let share = if fit.is_some() { 0.4 } else { 0.1 };
        assert!(saved(work.model.frames_encoded, all_work.model.frames_encoded, share));
        assert!(saved(work.model.frames_staged, all_work.model.frames_staged, share));
    }
}

#[test]
fn frames_that_go_in_runs_have_the_same_states() {
    let folder = root().join("models/default");
    let mut model = Model::open(&folder, CpuDevice::new(Some(2))).expect("the default model opens");
    let frame = 3 * model.config().vision.image.pow(2);
    // More than one run takes, no two of them equal.
    let pixels: Vec<f32> = (0..50 * frame).map(|i| ((i / frame) as f32 + 0.1 * (i % 97) as f32).sin()).collect();
    let mut states = |pixels: &[f32]| {
        let mut rows = model.rows().expect("no rows");
        model.vision_features(pixels, &mut rows).expect("the vision tower");
        rows.to_host(model.device()).expect("the states")
    };
    let together = states(&pixels);
    let alone: Vec<f32> = pixels.chunks(10 * frame).flat_map(&mut states).collect();
    assert!(together == alone);
}
