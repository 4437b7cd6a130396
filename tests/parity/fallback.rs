//! The default model on a GPU says what it says on the processor, and where `auto` took a GPU and it fails, the processor goes on
//! with the same window. On the stand-in driver.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use candor::device::{Choice, Chosen};
use candor::media::{Fit, Frame, Source, SourceOptions, Window, Windows};
use candor::metrics::Fallback;
use candor::watch::{AnyWatcher, Order, WatchSettings};
use candor_kernels::cpu::CpuDevice;
use serde_json::Value;

use super::stand_in;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn order(device: Choice) -> Order {
    let models = root().join("models");
    Order {
        model: models.join("default"),
        verifier: models.join("default-verifier"),
        adapter: None,
        // The frames show no face.
        settings: WatchSettings { fit: Some(Fit::Stretch), ..WatchSettings::default() },
        device,
        threads: Some(2),
        available: None,
    }
}

fn window(index: u64) -> Window {
    let frame = |number: usize| {
        let rgb = (0..40 * 30 * 3).map(|at| (at * (number + 3) + 7 * index as usize) as u8).collect();
        Arc::new(Frame::from_rgb(rgb, 40, 30).expect("a good frame"))
    };
    Window {
        index,
        start_s: index as f64,
        end_s: index as f64 + 1.0,
        start_monotonic_s: 0.0,
        end_monotonic_s: 0.0,
        start_wall: SystemTime::UNIX_EPOCH,
        end_wall: SystemTime::UNIX_EPOCH,
        frame_count: 1,
        frames: vec![frame(1)],
    }
}

/// What is said of windows, without the times.
fn observe(watcher: &mut AnyWatcher, windows: &[Window]) -> anyhow::Result<Vec<Value>> {
    let mut said = Vec::new();
    for window in windows {
        let mut value = serde_json::to_value(watcher.observe("test", window)?)?;
        value.as_object_mut().expect("an object").remove("times");
        said.push(value);
    }
    Ok(said)
}

/// What is said of two windows.
fn watch(device: Chosen, order: Order) -> anyhow::Result<Vec<Value>> {
    let mut watcher = AnyWatcher::open_on(device, order)?;
    watcher.windows(None, None)?;
    observe(&mut watcher, &[window(0), window(1)])
}

/// The layers of this model differ in depth, and faces are cut out and scaled on the GPU.
#[test]
fn a_gpu_says_what_the_processor_says() {
    stand_in::alone("fallback::a_gpu_says_what_the_processor_says", "", false, || {
        let clip = root().join("demo/sad-to-happy.mp4");
        let of = |device| {
            let order = Order { settings: WatchSettings::default(), ..order(Choice::Auto) };
            let mut watcher = AnyWatcher::open_on(device, order).expect("the model opens");
            let settings = watcher.windows(None, None).expect("the model's own");
            let source = Source::open(clip.to_str().expect("UTF-8"), SourceOptions::default()).expect("the clip opens");
            let windows: Vec<_> = Windows::new(source, settings).take(2).map(|window| window.expect("sound")).collect();
            observe(&mut watcher, &windows).expect("the model watches")
        };
        let [on_cpu, on_gpu] = [Chosen::Cpu(CpuDevice::new(Some(2))), Chosen::Cuda(stand_in::device())].map(of);
        for (mut expected, mut found) in on_cpu.into_iter().zip(on_gpu) {
            for name in ["probabilities", "fast_probabilities"] {
                let take = |of: &mut Value| of.as_object_mut().expect("an object").remove(name).expect(name);
                let (expected, found) = (take(&mut expected), take(&mut found));
                for (label, expected) in expected.as_object().expect("an object") {
                    let apart = found[label].as_f64().expect(label) - expected.as_f64().expect(label);
                    assert!(apart.abs() < 0.01, "{name} of {label}: {found}, not {expected}");
                }
            }
            assert_eq!(found, expected);
        }
    });
}

#[test]
fn the_processor_goes_on() {
    stand_in::alone("fallback::the_processor_goes_on", "", false, || {
        let expected = watch(Chosen::Cpu(CpuDevice::new(Some(2))), order(Choice::Auto)).expect("the processor works");
        assert_eq!(expected.len(), 2);
        let on_gpu = || Chosen::Cuda(stand_in::device());
        for (state, fallback) in [
            // While the model is opened.
            ("fail-memory=3", Fallback::Memory),
            ("lost-at=150", Fallback::Lost),
            // In the first window.
            ("fail-launch=2", Fallback::Kernel),
            ("lost-launch=4", Fallback::Lost),
        ] {
            let before = fallback.counted();
            stand_in::begin(state);
            let error = watch(on_gpu(), order(Choice::Cuda(0))).expect_err(state);
            assert_eq!(fallback.counted(), before, "{state}: {error}");
            stand_in::begin(state);
            let found = watch(on_gpu(), order(Choice::Auto)).unwrap_or_else(|error| panic!("{state}: {error}"));
            assert_eq!(found, expected, "{state}");
            assert_eq!(fallback.counted(), before + 1, "{state}: {error}");
            let counts = stand_in::counts();
            assert_eq!((counts.device, counts.host, counts.registered), (0, 0, 0), "{state}: memory is left");
        }
        // No room, known beforehand.
        stand_in::begin("");
        let little = || Order { available: Some(|| Some(1 << 20)), ..order(Choice::Auto) };
        let before = Fallback::Memory.counted();
        let error = watch(on_gpu(), little()).expect_err("nor has the processor");
        assert!(error.to_string().contains("MB of memory are needed and 1 MB are available"), "{error}");
        assert_eq!(Fallback::Memory.counted(), before + 1);
        // What is wrong with the model is wrong everywhere, and said once.
        let wrong = Order { adapter: Some("no such folder".into()), ..order(Choice::Auto) };
        let error = watch(on_gpu(), wrong).expect_err("there is no such folder").to_string();
        assert!(error.contains("no such folder"), "{error}");
        assert_eq!(Fallback::Memory.counted(), before + 1);
    });
}
