//! Log-mel features of samples, against transformers' WhisperFeatureExtractor, and the audio tower on them. The goldens are made by
//! tests/fixtures/make_mel.py.

use candor::model::mel::LogMel;
use candor::model::trace::{Output, Values, trace_model};
use candor::model::{Model, ModelError};
use candor::weights::Checkpoint;
use candor_kernels::Device;
use candor_kernels::cpu::CpuDevice;

use super::device;
use super::weights::{Case, Stored, fixtures, write_folder, write_tensors};

/// Largest error of a value; they lie between -1.5 and 1.5.
const ALLOWED: f32 = 1e-4;
/// Bits of the noise that are shifted away.
const LOUDNESS: [u32; 6] = [0, 15, 3, 9, 20, 12];

/// As make_mel.py has them.
fn samples(count: u32) -> Vec<f32> {
    let (mut phase, mut step) = (0u32, 40_000_000u32);
    let sample = |i: u32| {
        phase = phase.wrapping_add(step);
        step += 60_000;
        let wave = (phase >> 17) as i32;
        let wave = (wave.min((1 << 15) - 1 - wave) - (1 << 13)).div_euclid(2);
        let noise = ((i.wrapping_mul(2_654_435_761) ^ phase).wrapping_mul(0x85EB_CA6B) >> 18) as i32;
        let part = i / 1600;
        let noise = (noise - (1 << 13)) >> LOUDNESS[part as usize % 6];
        if part % 7 == 6 { 0.0 } else { (wave * i32::from(part % 3 != 1) + noise) as f32 / 32768.0 }
    };
    (0..count).map(sample).collect()
}

pub(crate) fn check_goldens_on<D: Device>(device: &D) {
    let goldens = Checkpoint::open_file(&fixtures().join("mel.safetensors")).expect("the goldens open");
    for (name, mels, count) in [("80 mels, 11000 samples", 80, 11_000), ("128 mels, 20000 samples", 128, 20_000)] {
        let columns = 100;
        let golden = goldens.tensor(name).expect("a golden").to_f32();
        let mut log_mel = LogMel::new(device, mels, columns).expect("good sizes");
        let [mut one, mut two, mut out] = [(); 3].map(|()| device.allocate(0).expect("nothing"));
        let mut values = vec![0.0; columns * mels];
        // What the last sound has left in buffers is not heard in the next.
        for samples in [vec![0.9; 16_000], samples(count)] {
            log_mel.compute(device, &samples, [&mut one, &mut two], &mut out).expect("good samples");
            device.read(&out, 0, &mut values).expect("that long");
        }
        // Of the columns every other one is stored, by band.
        let found = (0..golden.len()).map(|i| values[i % (columns / 2) * 2 * mels + i / (columns / 2)]);
        let worst = found.zip(&golden).map(|(a, b)| (a - b).abs()).fold(0.0, |a: f32, b| if a > b { a } else { b });
        println!("{name}: {worst:.1e}, {}", device.describe());
        assert!(worst <= ALLOWED, "{name}, {}: {worst}", device.describe());
    }
}

#[test]
fn features_are_those_of_transformers() {
    check_goldens_on(&device());
    check_goldens_on(&CpuDevice::new(Some(1)));
}

#[test]
fn what_is_no_sound_is_refused() {
    let device = device();
    for (mels, columns) in [(0, 100), (202, 100), (usize::MAX, 100), (80, 0), (80, 1), (80, usize::MAX)] {
        assert!(LogMel::new(&device, mels, columns).is_err(), "{mels} {columns}");
    }
    let mut log_mel = LogMel::new(&device, 201, 2).expect("few columns");
    let [mut one, mut two, mut out] = [(); 3].map(|()| device.allocate(0).expect("nothing"));
    let mut hear = |samples: &[f32]| {
        log_mel.compute(&device, samples, [&mut one, &mut two], &mut out)?;
        let mut values = vec![0.0; 2 * 201];
        device.read(&out, 0, &mut values)?;
        Ok::<_, ModelError>(values)
    };
    assert!(hear(&[]).expect_err("no sound").to_string().contains("samples: there are none"));
    for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -1e13] {
        let error = hear(&[0.0, 0.5, wrong, 0.0]).expect_err("no sound").to_string();
        assert!(error.contains("samples: sample 2 is"), "{error}");
    }
    // As loud as may be, and the least there is; the samples that are left out may be anything but no number.
    for samples in [vec![1e12; 320], vec![f32::MIN_POSITIVE; 9], vec![-0.0], vec![-1.0; 5000]] {
        assert!(hear(&samples).expect("sound").iter().all(|value| value.is_finite()));
    }
    assert!(hear(&[0.0; 400]).expect("silence").iter().all(|&value| value == -1.5));
}

fn trace<D: Device>(model: &mut Model<D>, case: &Case, given: &[(&str, Stored)]) -> Result<Vec<Output>, ModelError> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut inputs = case.inputs();
    inputs.retain(|name, _| name != "in.mel");
    inputs.extend(given.iter().map(|(name, stored)| ((*name).to_owned(), stored.clone())));
    let file = folder.path().join("inputs.safetensors");
    write_tensors(&file, &inputs);
    trace_model(model, &Checkpoint::open_file(&file).expect("the inputs open"), 2)
}

/// A model hears in samples what it hears in their log-mel features.
pub(crate) fn check_model_on<D: Device>(device: &D) {
    let (case, folder) = (Case::load("even"), tempfile::tempdir().expect("a temporary folder"));
    write_folder(folder.path(), &case.config("untied.f32"), &case.tensors("untied.f32"));
    let mut model = Model::open(folder.path(), device.clone()).expect("the model opens");
    let samples = samples(1500);
    let of_samples = trace(&mut model, &case, &[("in.samples", Stored::f32(&[1500], &samples))]).expect("it hears");
    let Some(Output { shape, values: Values::F32(mel), .. }) = of_samples.iter().find(|out| out.name == "out.mel")
    else {
        panic!("the log-mel features")
    };
    let mut of_mel = trace(&mut model, &case, &[("in.mel", Stored::f32(shape, mel))]).expect("it hears");
    let at = of_samples.iter().position(|output| output.name == "out.mel").expect("found above");
    of_mel.insert(at, of_samples[at].clone());
    assert_eq!(of_samples, of_mel);

    let wrong =
        |model: &mut Model<D>, given: &[(&str, Stored)]| trace(model, &case, given).expect_err("no sound").to_string();
    let both = [("in.samples", Stored::f32(&[1500], &samples)), ("in.mel", Stored::f32(shape, mel))];
    assert!(wrong(&mut model, &both).contains("in.samples: in.mel is there too"));
    let error = wrong(&mut model, &[("in.samples", Stored::f32(&[2, 750], &samples))]);
    assert!(error.contains("in.samples: shape [2, 750]"), "{error}");
    let error = wrong(&mut model, &[("in.samples", Stored::f32(&[1], &[f32::NAN]))]);
    assert!(error.contains("sample 0 is NaN"), "{error}");
    assert!(wrong(&mut model, &[("in.samples", Stored::i64(&[1]))]).contains("F32 is needed"));
}

#[test]
fn a_model_hears_samples() {
    check_model_on(&device());
}
