//! The model family against PyTorch: every stage's output, for every way of storing the weights, and every way of
//! laying a model out in folders. The goldens are made by tests/fixtures/make_parity.py.

mod cuda;
mod fallback;
mod layout;
mod rollouts;
mod sessions;
mod sound;
#[path = "../../kernels/tests/stand_in/mod.rs"]
mod stand_in;
mod weights;

use std::path::Path;

use candor::model::trace::{Output, Values, trace_classifier, trace_model};
use candor::model::{Classifier, Model};
use candor::weights::Checkpoint;
use candor_kernels::Device;
use candor_kernels::cpu::CpuDevice;
use weights::{Case, Stored, Tensors, write_folder, write_tensors};

/// Largest error over largest element, for each tensor.
const TOLERANCE: f64 = 2e-4;

fn device() -> CpuDevice {
    CpuDevice::new(Some(2)).exact()
}

/// Traces a model folder on a case's inputs.
fn trace(case: &Case, folder: &Path) -> Vec<Output> {
    trace_on(&device(), case, folder)
}

fn trace_on<D: Device>(device: &D, case: &Case, folder: &Path) -> Vec<Output> {
    let inputs = folder.join("inputs.safetensors");
    write_tensors(&inputs, &case.inputs());
    let mut model = Model::open(folder, device.clone()).expect("the model opens");
    trace_model(&mut model, &Checkpoint::open_file(&inputs).expect("the inputs open"), 8).expect("the model runs")
}

/// Compares outputs with the goldens of a variant.
fn check(case: &Case, variant: &str, outputs: &[Output]) {
    let goldens = Checkpoint::open_file(&case.goldens()).expect("the goldens open");
    let prefix = format!("{variant}/");
    assert_eq!(outputs.len(), goldens.names().filter(|n| n.starts_with(&prefix)).count(), "outputs of {variant}");
    for output in outputs {
        let name = format!("{prefix}{}", output.name);
        let golden = goldens.raw(&name).expect("a golden for each output");
        assert_eq!(output.shape, golden.shape, "{} {name}", case.name);
        match &output.values {
            Values::I64(_) => assert_eq!(output.bytes(), golden.bytes, "{} {name}", case.name),
            Values::F32(values) => {
                let golden = goldens.tensor(&name).expect("a golden in f32").to_f32();
                let error = relative_error(values, &golden);
                assert!(error < TOLERANCE, "{} {name}: relative error {error:.1e}", case.name);
            }
        }
    }
}

/// max|a - b| / max|b|
fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    let largest = b.iter().fold(0.0, |m: f64, &v| m.max(f64::from(v).abs()));
    let worst = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs());
    // A NaN must not pass as the smallest of all.
    worst.fold(0.0, |m: f64, e| if e.is_nan() { f64::INFINITY } else { m.max(e) }) / largest
}

fn check_every_variant(name: &'static str) {
    check_every_variant_on(&device(), name);
}

fn check_every_variant_on<D: Device>(device: &D, name: &'static str) {
    let case = Case::load(name);
    for variant in case.variants() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        write_folder(folder.path(), &case.config(&variant), &case.tensors(&variant));
        check(&case, &variant, &trace_on(device, &case, folder.path()));
    }
}

#[test]
fn small_projector_tied_and_untied_in_every_type() {
    check_every_variant("even");
}

#[test]
fn equal_widths_last_state_one_key_head() {
    check_every_variant("same");
}

#[test]
fn large_projector_on_an_odd_grid() {
    check_every_variant("wide");
}

#[test]
fn a_wrong_weight_is_seen() {
    let case = Case::load("even");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut tensors = case.tensors("untied.f32");
    let norm = tensors.get_mut("model.mm_projector.s2_body.b2.conv2.bn.bias").expect("it is in the model");
    norm.bytes.fill(0);
    write_folder(folder.path(), &case.config("untied.f32"), &tensors);
    let outputs = trace(&case, folder.path());
    let goldens = Checkpoint::open_file(&case.goldens()).expect("the goldens open");
    let error = |name: &str| {
        let output = outputs.iter().find(|o| o.name == name).expect("an output");
        let Values::F32(values) = &output.values else { panic!("{name} is real") };
        relative_error(values, &goldens.tensor(&format!("untied.f32/{name}")).expect("a golden").to_f32())
    };
    assert!(error("out.body") > TOLERANCE);
    assert!(error("out.video") < TOLERANCE);
}

fn check_classifier(name: &'static str) {
    check_classifier_on(&device(), name);
}

fn check_classifier_on<D: Device>(device: &D, name: &'static str) {
    let case = Case::load(name);
    let goldens = Checkpoint::open_file(&case.goldens()).expect("the goldens open");
    for variant in case.variants() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        write_folder(folder.path(), &case.config(&variant), &case.tensors(&variant));
        let mut classifier = Classifier::open(folder.path(), device.clone()).expect("the classifier opens");
        assert_eq!(classifier.labels()[27], "label 27");
        for (i, text) in case.texts().iter().enumerate() {
            let inputs = folder.path().join("inputs.safetensors");
            write_tensors(&inputs, &Tensors::from([("in.ids".to_owned(), Stored::i64(text))]));
            let inputs = Checkpoint::open_file(&inputs).expect("the inputs open");
            let outputs = trace_classifier(&mut classifier, &inputs).expect("the classifier runs");
            let [Output { name: "out.logits", values: Values::F32(logits), .. }] = outputs.as_slice() else {
                panic!("one output, the logits")
            };
            let golden = goldens.tensor(&format!("{variant}/{i}")).expect("a golden").to_f32();
            let error = relative_error(logits, &golden);
            assert!(error < TOLERANCE, "{name} {variant} text {i}: relative error {error:.1e}");
        }
        let too_long = vec![3; classifier.capacity() + 1];
        for bad in [&too_long[..], &[], &[80]] {
            assert!(classifier.logits(bad).is_err(), "{} ids", bad.len());
        }
    }
}

#[test]
fn bert_classifier() {
    check_classifier("bert");
}

#[test]
fn roberta_classifier() {
    check_classifier("roberta");
}
