//! How the tensors of a model are laid down: plain, or as compressed-tensors stores them (`int-quantized`: a byte a
//! value; `pack-quantized`: eight 4-bit values a word).

use safetensors::Dtype;
use serde_json::Value;

use crate::quantize::format::{self, Bits, Group, Scheme};
use crate::quantize::stored::declared;

use super::layout::{Entry, Part, Role};

/// Matrices of fewer values stay in f16, as in folders that Candor's own training writes.
const SMALLEST: usize = 4096;
/// Standard deviation of whole numbers that are equally likely: of -8 to 7, and of -127 to 127.
const INT4_DEVIATION: f32 = 4.61;
const INT8_DEVIATION: f32 = 73.6;
/// Standard deviation of what is neither a matrix nor around one: tables and biases.
const SMALL: f32 = 0.02;

/// How matrices are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Weights {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// A byte a value.
    Int8,
    /// Four bits a value.
    Int4,
}

/// How a model is stored.
#[derive(Clone, Debug)]
pub(super) struct Storage {
    /// The linear layers of `parts`.
    pub(super) weights: Weights,
    /// Values that share a scale.
    pub(super) group: Group,
    /// The embedding table.
    pub(super) head: Weights,
    /// Empty for all.
    pub(super) parts: Vec<Part>,
}

/// What a tensor is filled with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Fill {
    /// Floating-point numbers that are equally likely between these.
    Between(f32, f32),
    /// Bytes of -127 to 127.
    Bytes,
    /// Words of eight 4-bit values.
    Words,
    /// Two whole numbers.
    Numbers([usize; 2]),
}

/// A tensor of the file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Record {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) fill: Fill,
}

impl Storage {
    /// The one to three tensors that a weight is stored as.
    pub(super) fn records(&self, entry: &Entry) -> Vec<Record> {
        let Entry { name, shape, role, .. } = entry;
        let inputs: usize = shape.iter().skip(1).product();
        // Keeps the deviation of what passes through a layer.
        let deviation = match role {
            Role::Linear | Role::Convolution => 1.0 / (inputs.max(1) as f32).sqrt(),
            Role::Table | Role::Head | Role::Norm | Role::Bias => SMALL,
        };
        let record = |name: String, dtype, shape: Vec<usize>, fill| Record { name, dtype, shape, fill };
        let weights = self.of(entry);
        match weights {
            Weights::F32 | Weights::F16 => {
                let dtype = if weights == Weights::F32 { Dtype::F32 } else { Dtype::F16 };
                let middle = if *role == Role::Norm { 1.0 } else { 0.0 };
                // The deviation of numbers between -r and r is r/√3.
                let reach = deviation * 3f32.sqrt();
                vec![record(name.clone(), dtype, shape.clone(), Fill::Between(middle - reach, middle + reach))]
            }
            Weights::Int8 | Weights::Int4 => {
                let (rows, columns) = (shape[0], inputs);
                let head = *role == Role::Head;
                let scheme = self.scheme(weights, head);
                let values = if weights == Weights::Int8 { INT8_DEVIATION } else { INT4_DEVIATION };
                let scale = deviation / values;
                let records = declared(name, rows, columns, scheme).into_iter();
                let fill = |dtype| match dtype {
                    Dtype::I8 => Fill::Bytes,
                    Dtype::I32 => Fill::Words,
                    Dtype::I64 => Fill::Numbers([rows, columns]),
                    _ => Fill::Between(0.8 * scale, 1.2 * scale),
                };
                records.map(|(name, dtype, shape)| record(name, dtype, shape, fill(dtype))).collect()
            }
        }
    }

    /// The format of matrices in whole numbers; the head's bytes have a scale a row.
    fn scheme(&self, weights: Weights, head: bool) -> Scheme {
        match weights {
            Weights::Int8 if head => Scheme::INT8_ROWS,
            Weights::Int8 => Scheme { bits: Bits::Eight, group: self.group },
            _ => Scheme { bits: Bits::Four, group: self.group },
        }
    }

    fn of(&self, entry: &Entry) -> Weights {
        let plain = if self.weights == Weights::F32 { Weights::F32 } else { Weights::F16 };
        match entry.role {
            Role::Head => self.head,
            Role::Linear if entry.shape.iter().product::<usize>() < SMALLEST => plain,
            Role::Linear if self.parts.is_empty() || self.parts.contains(&entry.part) => self.weights,
            Role::Linear => Weights::F16,
            Role::Convolution | Role::Table | Role::Norm | Role::Bias => plain,
        }
    }

    /// `quantization_config` of config.json, where anything is quantised.
    pub(super) fn config(&self) -> Option<Value> {
        let targets: Vec<String> = match self.parts.is_empty() {
            true => vec!["Linear".to_owned()],
            false => self.parts.iter().flat_map(|part| part.prefixes()).map(|prefix| below(prefix)).collect(),
        };
        let group = |weights: Weights, head: bool, targets: Vec<String>| {
            let integers = matches!(weights, Weights::Int8 | Weights::Int4);
            integers.then(|| self.scheme(weights, head).config(&targets))
        };
        let layers = group(self.weights, false, targets);
        let head = group(self.head, true, vec![below("model.embed_tokens"), below("lm_head")]);
        format::config(layers.into_iter().chain(head).collect())
    }
}

/// The modules whose names start so, as compressed-tensors writes it.
fn below(prefix: &str) -> String {
    format!("re:^{}.*", prefix.replace('.', "\\."))
}
