//! How weights are stored in a model folder: matrices as whole numbers with scales, as compressed-tensors lays them down
//! (`int-quantized`, a byte a value; `pack-quantized`, eight values a word), all else in f16.

use std::sync::Arc;

use candor_kernels::{DType, HostTensor, Scales};
use half::f16;
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::Value;

use super::format::{self, Bits, Scheme};

/// Smaller matrices stay in f16: their scales and errors would cost more than they save.
const SMALLEST: usize = 4096;
/// Values that a word holds.
const A_WORD: usize = 8;
/// Shares of the largest scale that are tried for four bits, where clipping the outermost values lessens the error of
/// all others by more.
const SHRINKS: [f32; 13] = [1.0, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85, 0.825, 0.8, 0.775, 0.75, 0.725, 0.7];

/// A tensor as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub enum Stored {
    /// Rounded to f16.
    F16(Vec<f16>),
    /// Whole numbers with scales.
    Integers(Integers),
}

/// A matrix of whole numbers: `value = code · scale` of its group.
#[derive(Clone, Debug, PartialEq)]
pub struct Integers {
    /// The format.
    pub scheme: Scheme,
    /// Values of a row.
    pub columns: usize,
    /// Row-major numbers.
    pub codes: Vec<i8>,
    /// Row-major scales, each a number of the type that it is stored in.
    pub scales: Vec<f32>,
}

/// A stored tensor on its way to a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Its name.
    pub name: String,
    /// Its type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Whether a tensor of this name and shape is the matrix of a linear layer that is worth storing as whole numbers.
pub fn is_linear(name: &str, shape: &[usize]) -> bool {
    let large = shape.iter().product::<usize>() >= SMALLEST;
    shape.len() == 2 && large && name.ends_with(".weight") && !name.contains("embed")
}

impl Stored {
    /// Stores a tensor as training does: matrices of linear layers as int8 rows, embeddings, convolutions, norms and
    /// biases in f16.
    pub fn new(name: &str, shape: &[usize], values: &[f32]) -> Stored {
        match is_linear(name, shape) {
            true => Stored::Integers(Integers::nearest(values, shape[1], Scheme::INT8_ROWS, None)),
            false => Stored::F16(values.iter().map(|&v| f16::from_f32(v)).collect()),
        }
    }

    /// The values that a reader gets.
    pub fn values(&self) -> Vec<f32> {
        match self {
            Stored::F16(values) => values.iter().map(|v| v.to_f32()).collect(),
            Stored::Integers(integers) => integers.values(),
        }
    }

    /// Root mean square of the error against `values`, relative to that of the values.
    pub fn error(&self, values: &[f32]) -> f64 {
        relative_error(&self.values(), values)
    }

    /// The one to three tensors that it is in a file.
    pub fn records(&self, name: &str, shape: &[usize]) -> Vec<Record> {
        match self {
            Stored::F16(values) => {
                let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                vec![Record { name: name.to_owned(), dtype: Dtype::F16, shape: shape.to_vec(), bytes }]
            }
            Stored::Integers(integers) => integers.records(name),
        }
    }
}

/// Root mean square of the difference, relative to that of `values`.
pub fn relative_error(stored: &[f32], values: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = stored.iter().zip(values).map(|(a, b)| square(a - b)).sum();
    let norm: f64 = values.iter().map(|&v| square(v)).sum();
    if norm > 0.0 { (error / norm).sqrt() } else { 0.0 }
}

/// The type of a row's scales. Where there is one they cost nothing, and f16 would round those of small values coarsely.
fn scale_dtype(per_row: usize) -> Dtype {
    if per_row == 1 { Dtype::F32 } else { Dtype::F16 }
}

/// A scale as it is read back.
pub fn stored_scale(scale: f32, per_row: usize) -> f32 {
    match scale_dtype(per_row) {
        Dtype::F32 => scale,
        _ => f16::from_f32(scale).clamp(f16::MIN_POSITIVE_SUBNORMAL, f16::MAX).to_f32(),
    }
}

/// The whole number that is nearest to a value.
pub fn code(value: f32, scale: f32, bits: Bits) -> i8 {
    (value / scale).round().clamp(bits.smallest().into(), bits.largest().into()) as i8
}

/// The scale of a group of values. Of four bits it is the one of some with the least square error, each column's error
/// weighed by `importance`.
pub fn scale(values: &[f32], importance: Option<&[f32]>, bits: Bits, per_row: usize) -> f32 {
    let largest = values.iter().fold(0.0f32, |most, v| most.max(v.abs()));
    if largest == 0.0 {
        return 1.0; // of zeros any is right, but it must be above zero
    }
    let outermost = largest / f32::from(bits.largest());
    if bits == Bits::Eight {
        return stored_scale(outermost, per_row);
    }
    let error = |scale: f32| -> f32 {
        let error = |value: f32| value - f32::from(code(value, scale, bits)) * scale;
        match importance {
            None => values.iter().map(|&value| error(value).powi(2)).sum(),
            Some(weights) => values.iter().zip(weights).map(|(&value, weight)| weight * error(value).powi(2)).sum(),
        }
    };
    let candidates = SHRINKS.map(|shrink| stored_scale(outermost * shrink, per_row));
    let best = candidates.into_iter().map(|scale| (scale, error(scale))).min_by(|a, b| a.1.total_cmp(&b.1));
    best.map_or(outermost, |(scale, _)| scale)
}

impl Integers {
    /// Rounds a matrix with rows of `columns` finite values, each value by itself.
    pub fn nearest(values: &[f32], columns: usize, scheme: Scheme, importance: Option<&[f32]>) -> Integers {
        let Scheme { bits, group } = scheme;
        let size = group.size().unwrap_or(columns).max(1);
        let per_row = group.per_row(columns);
        let mut codes = vec![0i8; values.len()];
        let mut scales = vec![1.0; values.len() / columns.max(1) * per_row];
        let rows = values.par_chunks_exact(columns.max(1)).zip(codes.par_chunks_exact_mut(columns.max(1)));
        rows.zip(scales.par_chunks_exact_mut(per_row)).for_each(|((values, codes), scales)| {
            for (index, (values, codes)) in values.chunks(size).zip(codes.chunks_mut(size)).enumerate() {
                let importance = importance.map(|weights| &weights[index * size..][..values.len()]);
                let scale = scale(values, importance, bits, per_row);
                values.iter().zip(codes).for_each(|(&value, code)| *code = self::code(value, scale, bits));
                scales[index] = scale;
            }
        });
        Integers { scheme, columns, codes, scales }
    }

    /// Scales of a row.
    pub fn per_row(&self) -> usize {
        self.scheme.group.per_row(self.columns)
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.scales.len() / self.per_row()
    }

    /// The values that a reader gets.
    pub fn values(&self) -> Vec<f32> {
        let size = self.scheme.group.size().unwrap_or(self.columns).max(1);
        let rows = self.codes.chunks_exact(self.columns.max(1)).zip(self.scales.chunks_exact(self.per_row()));
        let groups = rows.flat_map(|(codes, scales)| codes.chunks(size).zip(scales));
        groups.flat_map(|(codes, scale)| codes.iter().map(move |&code| f32::from(code) * scale)).collect()
    }

    /// The numbers as they lie in a file.
    pub fn bytes(&self) -> Vec<u8> {
        match self.scheme.bits {
            Bits::Eight => self.codes.iter().map(|&code| code as u8).collect(),
            // Rows begin at words; what is behind their end is zero.
            Bits::Four => {
                let words = self.codes.chunks(self.columns.max(1)).flat_map(|row| row.chunks(A_WORD));
                let word = |codes: &[i8]| -> u32 {
                    codes.iter().enumerate().map(|(i, &code)| ((i32::from(code) + 8) as u32) << (4 * i)).sum()
                };
                words.flat_map(|codes| word(codes).to_le_bytes()).collect()
            }
        }
    }

    /// The scales as they lie in a file.
    pub fn scale_bytes(&self) -> Vec<u8> {
        match scale_dtype(self.per_row()) {
            Dtype::F32 => self.scales.iter().flat_map(|scale| scale.to_le_bytes()).collect(),
            _ => self.scales.iter().flat_map(|&scale| f16::from_f32(scale).to_le_bytes()).collect(),
        }
    }

    /// The matrix for kernels.
    pub fn host_tensor(&self) -> anyhow::Result<HostTensor> {
        let (rows, per_row) = (self.rows(), self.per_row());
        let scales = match self.scheme.group.size() {
            Some(size) if per_row > 1 => {
                Scales::groups(Arc::new(self.scale_bytes()), 0, DType::F16, size, rows, per_row)?
            }
            _ => Scales::rows(self.scales.clone()),
        };
        let dtype = if self.scheme.bits == Bits::Four { DType::I4 } else { DType::I8 };
        let bytes = self.bytes();
        let len = bytes.len();
        Ok(HostTensor::new(Arc::new(bytes), 0, len, dtype, vec![rows, self.columns], Some(scales))?)
    }

    fn records(&self, name: &str) -> Vec<Record> {
        let (rows, columns) = (self.rows(), self.columns);
        let contents = [self.bytes(), self.scale_bytes(), shape_bytes(rows, columns)];
        let declared = declared(name, rows, columns, self.scheme).into_iter().zip(contents);
        declared.map(|((name, dtype, shape), bytes)| Record { name, dtype, shape, bytes }).collect()
    }
}

/// `weight_shape`, which words leave open.
fn shape_bytes(rows: usize, columns: usize) -> Vec<u8> {
    [rows, columns].into_iter().flat_map(|size| (size as i64).to_le_bytes()).collect()
}

/// Names, types and shapes of the tensors that a matrix is in a file: numbers, scales and, of packed ones, the shape.
pub fn declared(name: &str, rows: usize, columns: usize, scheme: Scheme) -> Vec<(String, Dtype, Vec<usize>)> {
    let per_row = scheme.group.per_row(columns);
    let scales = (format!("{name}_scale"), scale_dtype(per_row), vec![rows, per_row]);
    match scheme.bits {
        Bits::Eight => vec![(name.to_owned(), Dtype::I8, vec![rows, columns]), scales],
        Bits::Four => vec![
            (format!("{name}_packed"), Dtype::I32, vec![rows, columns.div_ceil(A_WORD)]),
            scales,
            (format!("{name}_shape"), Dtype::I64, vec![2]),
        ],
    }
}

/// `quantization_config` of config.json where every tensor is stored by [`Stored::new`].
pub fn config() -> Value {
    format::config(vec![Scheme::INT8_ROWS.config(&["Linear".to_owned()])]).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::format::Group;
    use super::*;

    fn random(count: usize, seed: u64) -> Vec<f32> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        (0..count).map(|_| (0..6).map(|_| random.random_range(-0.1f32..0.1)).sum()).collect()
    }

    #[test]
    fn rows_have_their_own_scale() {
        let mut values: Vec<f32> = (0..4096).map(|i| ((i * 37) % 255) as f32 / 127.0 - 1.0).collect();
        values[2048..].iter_mut().for_each(|v| *v *= 1e-4);
        let stored = Stored::new("a.weight", &[2, 2048], &values);
        assert!(matches!(&stored, Stored::Integers(integers) if integers.scales.len() == 2));
        for (a, b) in stored.values().iter().zip(&values) {
            assert!((a - b).abs() <= 0.5 / 127.0 * if b.abs() > 2e-4 { 1.0 } else { 1.0001e-4 } + 1e-7, "{a} {b}");
        }
        assert!(stored.error(&values) < 0.006);
        let zeros = Stored::new("a.weight", &[2, 2048], &[0.0; 4096]);
        assert_eq!(zeros.values(), [0.0; 4096]);
    }

    #[test]
    fn embeddings_norms_and_convolutions_stay_f16() {
        for (name, shape) in
            [("embed_tokens.weight", vec![64, 64]), ("n.weight", vec![4096]), ("c.weight", vec![64, 64, 1])]
        {
            assert!(matches!(Stored::new(name, &shape, &[0.5; 4096]), Stored::F16(_)), "{name}");
        }
    }

    /// What the kernels read of the bytes is what was meant, for every format and for odd sizes.
    #[test]
    fn kernels_read_the_same_values() {
        for bits in [Bits::Four, Bits::Eight] {
            for group in [Group::Row, Group::Of(32), Group::Of(64), Group::Of(128)] {
                for (rows, columns) in [(1, 1), (3, 7), (5, 33), (2, 129), (4, 896), (1, 130)] {
                    let values = random(rows * columns, 1);
                    let integers = Integers::nearest(&values, columns, Scheme { bits, group }, None);
                    let tensor = integers.host_tensor().unwrap();
                    assert_eq!(tensor.to_f32(), integers.values(), "{bits:?} {group:?} {rows} {columns}");
                    let most = if bits == Bits::Four { 0.2 } else { 0.015 };
                    assert!(relative_error(&integers.values(), &values) < most);
                }
            }
        }
    }

    #[test]
    fn clipping_never_makes_the_error_greater() {
        let mut values = random(64 * 128, 2);
        values.iter_mut().step_by(97).for_each(|value| *value *= 4.0);
        let scheme = Scheme { bits: Bits::Four, group: Group::Of(32) };
        let own = relative_error(&Integers::nearest(&values, 128, scheme, None).values(), &values);
        let plain: Vec<f32> = values
            .chunks(32)
            .flat_map(|group| {
                let largest = group.iter().fold(0.0f32, |most, v| most.max(v.abs()));
                let scale = stored_scale(largest / 7.0, 4);
                group.iter().map(move |&value| f32::from(code(value, scale, Bits::Four)) * scale)
            })
            .collect();
        assert!(own < 0.97 * relative_error(&plain, &values));
    }

    #[test]
    fn tiny_and_zero_groups_have_a_scale_above_zero() {
        let mut values = vec![0.0; 96];
        values[32..64].fill(1e-9);
        values[64] = 1.0;
        let scheme = Scheme { bits: Bits::Four, group: Group::Of(32) };
        let integers = Integers::nearest(&values, 96, scheme, None);
        assert!(integers.scales.iter().all(|&scale| scale > 0.0));
        assert_eq!(integers.codes[..64], [0; 64]);
        assert_eq!(integers.codes[64], 7);
    }

    #[test]
    fn words_are_laid_down_row_by_row() {
        let integers = Integers {
            scheme: Scheme { bits: Bits::Four, group: Group::Row },
            columns: 9,
            codes: vec![-8, -7, 0, 1, 2, 3, 4, 7, 5, 0, 0, 0, 0, 0, 0, 0, 0, -1],
            scales: vec![1.0, 0.5],
        };
        let words: Vec<u32> = integers.bytes().as_chunks::<4>().0.iter().map(|&b| u32::from_le_bytes(b)).collect();
        assert_eq!(words, [0xfcba_9810, 0xd, 0x8888_8888, 0x7]);
        let records = Stored::Integers(integers).records("a.weight", &[2, 9]);
        let names: Vec<&str> = records.iter().map(|record| record.name.as_str()).collect();
        assert_eq!(names, ["a.weight_packed", "a.weight_scale", "a.weight_shape"]);
        assert_eq!((records[0].shape.as_slice(), records[1].shape.as_slice()), (&[2, 2][..], &[2, 1][..]));
        assert_eq!(records[2].bytes, [2i64.to_le_bytes(), 9i64.to_le_bytes()].concat());
    }
}
