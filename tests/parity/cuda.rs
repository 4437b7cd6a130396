//! The model family on the CUDA device, on the stand-in driver, against PyTorch: the same goldens, and the same tokens.

use candor::model::{LanguageModel, Model, Piece, Rows, Session};
use candor_kernels::Device;
use candor_kernels::cpu::{CpuDevice, PlanDevice};

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

/// What is kept from window to window.
struct Kept<D: Device> {
    features: Rows<D>,
    video: Rows<D>,
    session: Session<D>,
}

impl<D: Device> Kept<D> {
    fn new(model: &Model<D>) -> Self {
        let rows = || model.rows().expect("a buffer");
        Kept { features: rows(), video: rows(), session: model.session(250).expect("a session") }
    }
}

/// Everything that a window is put through; `seed` tells one from another.
fn window<D: Device>(model: &mut Model<D>, kept: &mut Kept<D>, seed: u32) {
    let Kept { features, video, session } = kept;
    let (frames, side) = (model.config().frames, model.config().vision.image);
    let pixels: Vec<f32> = uniform(&format!("window {seed}"), frames * 3 * side * side).map(|v| v as f32).collect();
    model.vision_features(&pixels, features).expect("frames");
    let gate = model.gate(&[5, 6 + seed, 7]).expect("an instruction");
    model.video_tokens(features, gate, video).expect("features");
    let text: Vec<u32> = (0..40).map(|i| (seed + 3 * i) % 97).collect();
    session.start_again(&[Piece::Tokens(&text[..9]), Piece::Rows(video), Piece::Tokens(&text)]).expect("it fits");
    let prompt = session.position();
    for token in 0..12 {
        session.append(&[token]).expect("it fits");
    }
    session.truncate(prompt + 3).expect("it is held");
    session.append(&[1, 2]).expect("it fits");
}

/// The folder of a case's model.
fn folder(case: &'static str, variant: &str) -> tempfile::TempDir {
    let (case, folder) = (Case::load(case), tempfile::tempdir().expect("a temporary folder"));
    write_folder(folder.path(), &case.config(variant), &case.tensors(variant));
    folder
}

#[test]
fn a_second_window_allocates_nothing() {
    stand_in::alone("cuda::a_second_window_allocates_nothing", "", false, || {
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
    stand_in::alone("cuda::the_gpus_memory_is_what_is_planned", "", false, || {
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
            assert!(weights < loaded && weights > 0, "{variant}: {weights} bytes of weights planned, {loaded} taken");
            let mut kept = Kept::new(&model);
            window(&mut model, &mut kept, 0);
            let planned = paper.held().gpu - weights;
            println!("{variant}: {planned} bytes planned, {taken} taken");
            assert!(taken <= planned && planned < taken + taken / 20 + 100_000, "{variant}: {planned}, {taken} taken");
            assert_eq!(paper.held().owned + paper.held().mapped, 0, "{variant}: all of it is the GPU's");
        }
    });
}
