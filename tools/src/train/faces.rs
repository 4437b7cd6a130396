//! The photographs of faces as the trainers see them: read and checked from a safetensors file, then turned into
//! pixels of the tower's size, exactly for evaluation and jittered for training.

use super::parameters::{ParameterError, read_tensors};
use candle_core::{DType, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Side of a photograph in pixels.
pub const SIDE: usize = 48;
/// Measured cues a photograph.
pub const CUES: usize = 9;
/// Labels a photograph may have.
pub const CLASSES: usize = 7;

/// Why a file of faces was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FacesError {
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] ParameterError),
    /// A tensor is missing, or of another shape or type.
    #[error("{path}: tensor {name} is missing or not of the layout of faces48.safetensors: {reason}")]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A photograph's label is no class.
    #[error("{path}: photograph {index} of part {part} has label {label}; labels run from 0 to 6")]
    Label {
        /// The file.
        path: PathBuf,
        /// The part.
        part: String,
        /// The photograph.
        index: usize,
        /// Its label.
        label: u8,
    },
    /// The part holds no photographs.
    #[error("{path}: part {part} holds no photographs")]
    Empty {
        /// The file.
        path: PathBuf,
        /// The part.
        part: String,
    },
}

/// One part (`train`, `val`, …) of a file of faces.
pub struct Faces {
    images: Vec<u8>,
    /// Label of each photograph.
    pub labels: Vec<u8>,
    /// Cues of each photograph, where they could be measured.
    pub cues: Vec<Option<[f32; CUES]>>,
}

impl Faces {
    /// Reads and checks one part.
    pub fn open(path: &Path, part: &str) -> Result<Self, FacesError> {
        let tensors = read_tensors(path)?;
        let images: Vec<u8> = values(path, &tensors, &format!("{part}.images"), DType::U8, &[SIDE, SIDE])?;
        let labels: Vec<u8> = values(path, &tensors, &format!("{part}.labels"), DType::U8, &[])?;
        let measured: Vec<f32> = values(path, &tensors, &format!("{part}.cues"), DType::F32, &[CUES])?;
        let valid: Vec<u8> = values(path, &tensors, &format!("{part}.cues_valid"), DType::U8, &[])?;
        let count = images.len() / (SIDE * SIDE);
        if count == 0 {
            return Err(FacesError::Empty { path: path.into(), part: part.into() });
        }
        for (name, len) in [("labels", labels.len()), ("cues", measured.len() / CUES), ("cues_valid", valid.len())] {
            if len != count {
                let reason = format!("it has {len} rows, images have {count}");
                return Err(FacesError::Tensor { path: path.into(), name: format!("{part}.{name}"), reason });
            }
        }
        if let Some(index) = labels.iter().position(|label| usize::from(*label) >= CLASSES) {
            return Err(FacesError::Label { path: path.into(), part: part.into(), index, label: labels[index] });
        }
        let cues = measured.chunks_exact(CUES).zip(&valid);
        let cues = cues.map(|(row, valid)| {
            let row: [f32; CUES] = std::array::from_fn(|i| row[i]);
            (*valid == 1 && row.iter().all(|cue| cue.is_finite())).then_some(row)
        });
        Ok(Self { images, labels, cues: cues.collect() })
    }

    /// Photographs.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is none; [`Faces::open`] refuses that.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// A photograph's grey levels, `[48, 48]`.
    pub fn image(&self, index: usize) -> &[u8] {
        &self.images[index * SIDE * SIDE..][..SIDE * SIDE]
    }
}

fn values<T: candle_core::WithDType>(
    path: &Path,
    tensors: &HashMap<String, Tensor>,
    name: &str,
    dtype: DType,
    inner: &[usize],
) -> Result<Vec<T>, FacesError> {
    let refuse = |reason: String| FacesError::Tensor { path: path.into(), name: name.into(), reason };
    let tensor = tensors.get(name).ok_or_else(|| refuse("there is no such tensor".into()))?;
    if tensor.dtype() != dtype {
        return Err(refuse(format!("its type is {:?}, not {dtype:?}", tensor.dtype())));
    }
    if tensor.dims().len() != inner.len() + 1 || tensor.dims()[1..] != *inner {
        return Err(refuse(format!("its shape is {:?}, not [n, {inner:?}]", tensor.dims())));
    }
    tensor.flatten_all().and_then(|flat| flat.to_vec1()).map_err(|error| refuse(error.to_string()))
}

/// Keys' cubic convolution with a = -0.5, as Pillow's bicubic filter.
fn bicubic(x: f32) -> f32 {
    let x = x.abs();
    if x < 1.0 {
        (1.5 * x - 2.5) * x * x + 1.0
    } else if x < 2.0 {
        ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    } else {
        0.0
    }
}

/// Enlarges photographs to `side` pixels as Pillow's bicubic resize does.
pub struct Enlarger {
    side: usize,
    /// First source pixel and the weights of each output pixel.
    taps: Vec<(usize, Vec<f32>)>,
}

impl Enlarger {
    /// For outputs of `side` by `side` pixels, `side` at least 48.
    pub fn new(side: usize) -> Self {
        let scale = SIDE as f32 / side as f32;
        let taps = (0..side).map(|i| {
            let centre = (i as f32 + 0.5) * scale;
            let first = ((centre - 2.0 + 0.5).max(0.0)) as usize;
            let last = ((centre + 2.0 + 0.5) as usize).min(SIDE);
            let weights: Vec<f32> = (first..last).map(|j| bicubic(j as f32 + 0.5 - centre)).collect();
            let total: f32 = weights.iter().sum();
            (first, weights.into_iter().map(|weight| weight / total).collect())
        });
        Self { side, taps: taps.collect() }
    }

    /// image `[48, 48]` → out `[side, side]`, in SigLIP's scale (x/255 - 0.5)/0.5.
    pub fn exact(&self, image: &[u8], out: &mut [f32]) {
        // Pillow goes along rows first and rounds to whole grey levels after each direction.
        let round = |value: f32| value.round().clamp(0.0, 255.0);
        let mut rows = vec![0.0; SIDE * self.side];
        for (source, row) in image.chunks_exact(SIDE).zip(rows.chunks_exact_mut(self.side)) {
            for (value, (first, weights)) in row.iter_mut().zip(&self.taps) {
                *value = round(weights.iter().zip(&source[*first..]).map(|(w, x)| w * f32::from(*x)).sum());
            }
        }
        for (out, (first, weights)) in out.chunks_exact_mut(self.side).zip(&self.taps) {
            out.fill(0.0);
            for (j, weight) in weights.iter().enumerate() {
                let row = &rows[(first + j) * self.side..][..self.side];
                out.iter_mut().zip(row).for_each(|(o, x)| *o += weight * x);
            }
            out.iter_mut().for_each(|o| *o = round(*o) / 127.5 - 1.0);
        }
    }

    /// As [`Enlarger::exact`], but turned, shifted, zoomed, mirrored and lit at random.
    pub fn jittered(&self, image: &[u8], jitter: &Jitter, out: &mut [f32]) {
        let (sin, cos) = jitter.angle.sin_cos();
        let middle = SIDE as f32 / 2.0;
        let scale = SIDE as f32 / self.side as f32 / jitter.zoom;
        let mirror = if jitter.mirrored { -1.0 } else { 1.0 };
        let half = self.side as f32 / 2.0;
        let mean = image.iter().map(|x| f32::from(*x)).sum::<f32>() / image.len() as f32;
        for (row, out) in out.chunks_exact_mut(self.side).enumerate() {
            let y = (row as f32 + 0.5 - half) * scale;
            for (column, out) in out.iter_mut().enumerate() {
                let x = (column as f32 + 0.5 - half) * scale * mirror;
                let value = sample(
                    image,
                    cos * x - sin * y + middle + jitter.shift[0],
                    sin * x + cos * y + middle + jitter.shift[1],
                );
                let value = (value - mean) * jitter.contrast + mean + jitter.brightness;
                *out = value.clamp(0.0, 255.0) / 127.5 - 1.0;
            }
        }
    }
}

/// Bicubic sample at (x, y) in pixels; the border is repeated outwards.
fn sample(image: &[u8], x: f32, y: f32) -> f32 {
    let (left, top) = ((x - 0.5).floor(), (y - 0.5).floor());
    let weights =
        |at: f32, first: f32| -> [f32; 4] { std::array::from_fn(|j| bicubic(first - 1.0 + j as f32 + 0.5 - at)) };
    let (across, down) = (weights(x, left), weights(y, top));
    let clamp = |first: f32, j: usize| (first - 1.0 + j as f32).clamp(0.0, (SIDE - 1) as f32) as usize;
    let columns: [usize; 4] = std::array::from_fn(|j| clamp(left, j));
    let mut total = 0.0;
    for (j, weight) in down.iter().enumerate() {
        let row = &image[clamp(top, j) * SIDE..][..SIDE];
        let line: f32 = (0..4).map(|i| across[i] * f32::from(row[columns[i]])).sum();
        total += weight * line;
    }
    total
}

/// One random change of a photograph.
#[derive(Clone, Copy, Debug)]
pub struct Jitter {
    angle: f32,
    zoom: f32,
    shift: [f32; 2],
    mirrored: bool,
    contrast: f32,
    brightness: f32,
}

impl Jitter {
    /// The change of photograph `index` in pass `pass`: the same for the same seed, whatever was drawn before.
    pub fn draw(seed: u64, pass: u64, index: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ (pass << 40) ^ ((index as u64) << 1));
        Self {
            angle: rng.random_range(-0.16..0.16),
            zoom: rng.random_range(0.9..1.12),
            shift: [rng.random_range(-3.0..3.0), rng.random_range(-3.0..3.0)],
            mirrored: rng.random_bool(0.5),
            contrast: rng.random_range(0.8..1.25),
            brightness: rng.random_range(-20.0..20.0),
        }
    }
}
