//! Log-mel features of sound as transformers' `WhisperFeatureExtractor` computes them (Radford et al. 2022), by products with two
//! matrices in f32: a windowed Fourier transform, and mel bands of equal area (Slaney's Auditory Toolbox, 1998).

use std::f64::consts::TAU;

use candor_kernels::{Activation, Device, HostTensor, Unfold};

use super::ModelError;
use super::layers::loading;
use super::rows::{elements, grow};

/// Samples a second.
pub const RATE: usize = 16_000;
/// Samples of a window, and from one to the next.
const WINDOW: usize = 400;
const STEP: usize = 160;
/// Frequencies from 0 to half the rate.
const BINS: usize = WINDOW / 2 + 1;
/// Samples beyond this are not those of sound from -1 to 1, and their powers might leave f32.
const LOUDEST: f32 = 1e12;

/// Computes log-mel features of a fixed length of sound.
pub struct LogMel<D: Device> {
    columns: usize,
    /// `[2 · BINS, WINDOW]`: cosines, then sines.
    transform: D::Weight,
    /// `[mels, BINS]`
    bands: D::Weight,
    mels: usize,
    padded: Vec<f32>,
}

impl<D: Device> LogMel<D> {
    /// For `columns` columns of `mels` bands, one column each 10 ms.
    ///
    /// # Errors
    /// [`ModelError::Input`] for no bands, more bands than frequencies, and less than two columns; [`ModelError::Overflow`] for more
    /// columns than can be addressed; what the device says.
    pub fn new(device: &D, mels: usize, columns: usize) -> Result<Self, ModelError> {
        if !(1..=BINS).contains(&mels) {
            return Err(ModelError::input("mel", format!("{mels} bands, 1 to {BINS} can be computed")));
        }
        if columns < 2 {
            return Err(ModelError::input("mel", format!("{columns} columns, at least 2 are needed")));
        }
        elements(&[columns, 2 * BINS])?;
        let bytes = size_of::<f32>() * (2 * BINS * WINDOW + mels * BINS);
        let place = |tensor: &'static str, values: &[f32], width: usize| {
            let stored = HostTensor::from_f32(values, &[values.len() / width, width])
                .map_err(|error| ModelError::input(tensor, error.to_string()))?;
            device.weight(&stored).map_err(|source| ModelError::Upload { tensor: tensor.to_owned(), source })
        };
        let (transform, bands) = loading(device, bytes, || {
            Ok((place("Fourier transform", &transform(), WINDOW)?, place("mel bands", &bands(mels), BINS)?))
        })?;
        Ok(LogMel { columns, transform, bands, mels, padded: Vec::new() })
    }

    /// Mono samples from -1 to 1, 16 000 a second, of any length → out `[columns, mels]`. Sound that is shorter is followed by
    /// silence, what is longer is left out. `scratch` and out grow to what is needed.
    ///
    /// # Errors
    /// [`ModelError::Input`] for no samples, and for one that is no number or far from -1 to 1; what the device says.
    pub fn compute(
        &mut self,
        device: &D,
        samples: &[f32],
        scratch: [&mut D::Buffer; 2],
        out: &mut D::Buffer,
    ) -> Result<(), ModelError> {
        let LogMel { columns, mels, .. } = *self;
        if samples.is_empty() {
            return Err(ModelError::input("samples", "there are none"));
        }
        if let Some(at) = samples.iter().position(|sample| sample.is_nan() || sample.abs() > LOUDEST) {
            return Err(ModelError::input("samples", format!("sample {at} is {}, -1 to 1 is needed", samples[at])));
        }
        let [one, two] = scratch;
        grow(device, one, &[columns, WINDOW])?;
        grow(device, two, &[columns, 2 * BINS])?;
        grow(device, out, &[columns, mels])?;
        // Half a window beyond both ends is the sound mirrored, as far as columns reach.
        let (length, padded) = ((columns * STEP) as i64, (columns - 1) * STEP + WINDOW);
        let mirrored = |at: i64| (length - 1 - (length - 1 - at.abs()).abs()) as usize;
        let sample = |at: i64| samples.get(mirrored(at)).copied().unwrap_or(0.0);
        self.padded.clear();
        self.padded.extend((0..padded as i64).map(|at| sample(at - (WINDOW / 2) as i64)));
        let windows = Unfold {
            size: [1, 1, padded],
            channels: 1,
            kernel: [1, 1, WINDOW],
            stride: [1, 1, STEP],
            pad_before: [0; 3],
            pad_after: [0; 3],
        };
        device.write(&self.padded, two, 0)?;
        device.unfold(two, windows, one)?;
        device.linear(one, columns, &self.transform, None, Activation::Identity, two)?;
        device.power(two, columns, BINS, one)?;
        device.linear(one, columns, &self.bands, None, Activation::Identity, out)?;
        Ok(device.log_mel(out, columns * mels)?)
    }
}

/// Cosines and sines of each frequency over Hann's periodic window.
fn transform() -> Vec<f32> {
    let turn = |part: usize| TAU * (part % WINDOW) as f64 / WINDOW as f64;
    let element =
        |wave: fn(f64) -> f64, bin: usize, at: usize| (wave(turn(bin * at)) * (0.5 - 0.5 * turn(at).cos())) as f32;
    let rows = |wave| (0..BINS).flat_map(move |bin| (0..WINDOW).map(move |at| element(wave, bin, at)));
    rows(f64::cos).chain(rows(f64::sin)).collect()
}

/// Triangles over the frequencies `[mels, BINS]`, each from the middle of the one before to that of the one behind, of equal area.
fn bands(mels: usize) -> Vec<f32> {
    let half = RATE as f64 / 2.0;
    let edge = |i: usize| hertz(mel(half) * i as f64 / (mels + 1) as f64);
    let band = |m: usize| {
        let [low, middle, high] = [edge(m), edge(m + 1), edge(m + 2)];
        (0..BINS).map(move |bin| {
            let frequency = half * bin as f64 / (BINS - 1) as f64;
            let height = ((frequency - low) / (middle - low)).min((high - frequency) / (high - middle));
            (height.max(0.0) * 2.0 / (high - low)) as f32
        })
    };
    (0..mels).flat_map(band).collect()
}

/// Slaney's scale: even up to 1000 Hz, which is 15, and 27 from there to 6400.
fn mel(hertz: f64) -> f64 {
    if hertz < 1000.0 { hertz * 3.0 / 200.0 } else { 15.0 + (hertz / 1000.0).ln() * 27.0 / 6.4f64.ln() }
}

fn hertz(mel: f64) -> f64 {
    if mel < 15.0 { mel * 200.0 / 3.0 } else { 1000.0 * ((mel - 15.0) * 6.4f64.ln() / 27.0).exp() }
}
