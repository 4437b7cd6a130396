//! The model family on the CUDA device, on the stand-in driver, against PyTorch: the same goldens, and the same tokens.

use candor::model::{DecodeError, LanguageModel, Model, ModelError, Piece, Rows, Session};
use candor_kernels::cpu::{CpuDevice, PlanDevice};
use candor_kernels::cuda::CudaError;
use candor_kernels::{Device, DeviceError};

use super::weights::{Case, uniform, write_folder};
use super::{check_classifier_on, check_every_variant_on, stand_in};

#[test]
fn small_projector_tied_and_untied_in_every_type() {
    check_every_variant_on(&stand_in::device().exact(), "even");
}

#[test]
fn equal_widths_last_state_one_key_head() {
    check_every_variant_on(&stand_in::device().exact(), "same");
}

#[test]
fn large_projector_on_an_odd_grid() {
    check_every_variant_on(&stand_in::device().exact(), "wide");
}

#[test]
fn classifiers() {
    check_classifier_on(&stand_in::device().exact(), "bert");
    check_classifier_on(&stand_in::device().exact(), "roberta");
}

#[test]
fn a_session_chooses_what_its_logits_say() {
    super::sessions::check_choices_on(stand_in::device().exact());
    super::sessions::check_choices_on(stand_in::device());
}

#[test]
fn sound() {
    super::sound::check_goldens_on(&stand_in::device());
    super::sound::check_goldens_on(&stand_in::device().exact());
    super::sound::check_model_on(&stand_in::device());
}

/// What is kept from window to window.
struct Kept<D: Device> {
    features: Rows<D>,
    video: Rows<D>,
    session: Session<D>,
}

impl<D: Device> Kept<D> {
    fn new(model: &Model<D>) -> Self {
        Self::try_new(model).expect("buffers")
    }

    fn try_new(model: &Model<D>) -> Result<Self, ModelError> {
        Ok(Kept { features: model.rows()?, video: model.rows()?, session: model.session(250)? })
    }
}

/// Everything that a window is put through; `seed` tells one from another.
fn window<D: Device>(model: &mut Model<D>, kept: &mut Kept<D>, seed: u32) {
    try_window(model, kept, seed).expect("a window");
}

/// As above, and the logits behind it.
fn try_window<D: Device>(model: &mut Model<D>, kept: &mut Kept<D>, seed: u32) -> Result<Vec<f32>, ModelError> {
    let Kept { features, video, session } = kept;
    let (frames, side) = (model.config().frames, model.config().vision.image);
    let pixels: Vec<f32> = uniform(&format!("window {seed}"), frames * 3 * side * side).map(|v| v as f32).collect();
    model.vision_features(&pixels, features)?;
    let gate = model.gate(&[5, 6 + seed, 7])?;
    model.video_tokens(features, gate, video)?;
    let text: Vec<u32> = (0..40).map(|i| (seed + 3 * i) % 97).collect();
    session.start_again(&[Piece::Tokens(&text[..9]), Piece::Rows(video), Piece::Tokens(&text)])?;
    let prompt = session.position();
    for token in 0..12 {
        session.append(&[token])?;
    }
    session.truncate(prompt + 3)?;
    session.append(&[1, 2])?;
    Ok(session.logits()?.to_vec())
}

/// The folder of a case's model.
fn folder(case: &'static str, variant: &str) -> tempfile::TempDir {
    let (case, folder) = (Case::load(case), tempfile::tempdir().expect("a temporary folder"));
    write_folder(folder.path(), &case.config(variant), &case.tensors(variant));
    folder
}

/// Each in a process of its own, on the stand-in.
mod alone {
    use super::*;

    #[test]
    fn a_second_window_allocates_nothing() {
        stand_in::alone("cuda::alone::a_second_window_allocates_nothing", "", false, || {
            for variant in Case::load("even").variants() {
                let (folder, device) = (folder("even", &variant), stand_in::device());
                let mut model = Model::open(folder.path(), device).expect("the model opens");
                assert_eq!(stand_in::counts().host, 0, "pinned memory is for loading");
                let mut kept = Kept::new(&model);
                window(&mut model, &mut kept, 0);
                let before = stand_in::counts();
                for seed in 1..4 {
                    window(&mut model, &mut kept, seed);
                }
                let now = stand_in::counts();
                assert_eq!((now.made, now.used), (before.made, before.used), "{variant}");
                drop((model, kept));
                assert_eq!(stand_in::counts().device, 0, "{variant}: everything is given back");
            }
        });
    }

    /// What a plan counts of the GPU's memory for everything beside the weights, and what is taken then.
    #[test]
    fn the_gpus_memory_is_what_is_planned() {
        stand_in::alone("cuda::alone::the_gpus_memory_is_what_is_planned", "", false, || {
            for variant in Case::load("even").variants() {
                let folder = folder("even", &variant);
                let mut model = Model::open(folder.path(), stand_in::device()).expect("the model opens");
                let loaded = stand_in::counts().used;
                let mut kept = Kept::new(&model);
                window(&mut model, &mut kept, 0);
                let taken = stand_in::counts().used - loaded;

                let paper = PlanDevice::of_gpu(CpuDevice::new(Some(1)));
                let mut model = Model::open_headers(folder.path(), paper.clone()).expect("the model opens");
                let weights = paper.held().gpu;
                assert!(
                    weights < loaded && weights > 0,
                    "{variant}: {weights} bytes of weights planned, {loaded} taken"
                );
                let mut kept = Kept::new(&model);
                window(&mut model, &mut kept, 0);
                let planned = paper.held().gpu - weights;
                println!("{variant}: {planned} bytes planned, {taken} taken");
                assert!(
                    taken <= planned && planned < taken + taken / 20 + 100_000,
                    "{variant}: {planned}, {taken} taken"
                );
                assert_eq!(paper.held().owned + paper.held().mapped, 0, "{variant}: all of it is the GPU's");
            }
        });
    }

    /// A model that is opened and put through a window: its logits and how much that took, or the first error. What there was no
    /// memory for is tried again.
    fn attempt(folder: &std::path::Path) -> Result<(Vec<f32>, stand_in::Progress), String> {
        let typed = |error: &ModelError| {
            let of_device = match error {
                ModelError::Device(source) | ModelError::Upload { source, .. } => Some(source),
                ModelError::Decode(DecodeError::Device(source)) => Some(source),
                _ => None,
            };
            match of_device {
                Some(DeviceError::GpuOutOfMemory { .. }) => "OutOfMemory".to_owned(),
                Some(DeviceError::Cuda { source: CudaError::Kernel(_), .. }) => "Kernel".to_owned(),
                Some(DeviceError::Cuda { source: CudaError::Lost(_), .. }) => "Lost".to_owned(),
                _ => format!("another error: {error:?}"),
            }
        };
        let device = match stand_in::open() {
            Ok(device) => device,
            Err(CudaError::OutOfMemory) => return Err("OutOfMemory".into()),
            Err(CudaError::Kernel(_)) => return Err("Kernel".into()),
            Err(CudaError::Lost(_)) => return Err("Lost".into()),
            Err(error) => return Err(format!("another error: {error:?}")),
        };
        let mut model = Model::open(folder, device).map_err(|error| typed(&error))?;
        let mut kept = Kept::try_new(&model).map_err(|error| typed(&error))?;
        match try_window(&mut model, &mut kept, 0) {
            Ok(logits) => Ok((logits, stand_in::progress())),
            Err(error) if typed(&error) == "OutOfMemory" => {
                let logits = try_window(&mut model, &mut kept, 0).map_err(|error| format!("again: {error:?}"))?;
                Err(format!("OutOfMemory, then {logits:?}"))
            }
            Err(error) => Err(typed(&error)),
        }
    }

    /// Wherever the GPU fails while a model is opened and decodes, also within a run that is replayed: an error that says so, and all of
    /// its memory is given back.
    #[test]
    fn a_model_survives_a_gpu_that_fails_anywhere() {
        let said = stand_in::alone("cuda::alone::a_model_survives_a_gpu_that_fails_anywhere", "", false, || {
            // A call that never ends is a failure too.
            let (alive, watched) = std::sync::mpsc::channel::<()>();
            std::thread::spawn(move || {
                use std::sync::mpsc::RecvTimeoutError::Timeout;
                while watched.recv_timeout(std::time::Duration::from_secs(120)) != Err(Timeout) {}
                eprintln!("nothing happens any more");
                std::process::abort();
            });
            let folder = folder("even", "tied.int8");
            let (logits, progress) = attempt(folder.path()).expect("nothing fails");
            let (mut points, mut in_windows) = (0, 0);
            for (state, expected, count) in [
                ("fail-launch", "Kernel", progress.launches),
                ("lost-launch", "Lost", progress.launches),
                ("lost-at", "Lost", progress.calls),
                ("fail-memory", "OutOfMemory", progress.allocations),
            ] {
                // About thirty points, of every phase of a token's replay.
                let step = (count / 30).max(1) | 1;
                for at in (1..=count).step_by(step as usize) {
                    alive.send(()).expect("somebody watches");
                    stand_in::begin(&format!("{state}={at}"));
                    let found = match attempt(folder.path()) {
                        // An arena that finds no room may be made smaller.
                        Ok((found, _)) if state == "fail-memory" => {
                            assert_eq!(found, logits, "{state}={at}");
                            expected.to_owned()
                        }
                        Ok(_) => panic!("{state}={at} does not fail"),
                        Err(found) => found,
                    };
                    let again = format!("OutOfMemory, then {logits:?}");
                    assert!(
                        found == expected || (expected == "OutOfMemory" && found == again),
                        "{state}={at}: {found}"
                    );
                    points += 1;
                    in_windows += usize::from(found == again);
                    let counts = stand_in::counts();
                    let left = (counts.device, counts.host, counts.registered);
                    assert_eq!(left, (0, 0, 0), "{state}={at}: {found}: device, pinned and registered memory left");
                }
            }
            println!(
                "{progress:?}; {points} points, {in_windows} of them without memory in a window, which was done again"
            );
            stand_in::begin("");
            assert_eq!(attempt(folder.path()).expect("as if nothing had been").0, logits);
        });
        println!("{}", said.lines().find(|line| line.contains("points")).unwrap_or_default());
    }
}
