//! How the tensors of a model are laid down: plain, or as compressed-tensors stores them (`int-quantized`: a byte a
//! value; `pack-quantized`: eight 4-bit values a word).

use safetensors::Dtype;
use serde_json::{Value, json};

use super::layout::{Entry, Part, Role};

/// Matrices of fewer values stay in f16, as in folders that Candor's own training writes.
const SMALLEST: usize = 4096;
/// Values that a word holds.
const A_WORD: usize = 8;
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
    /// Values that share a scale; a row if none.
    pub(super) group: Option<usize>,
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
                let group = if *role == Role::Head && weights == Weights::Int8 { None } else { self.group };
                let scales = group.map_or(1, |group| columns.div_ceil(group));
                let dtype = if group.is_some() || weights == Weights::Int4 { Dtype::F16 } else { Dtype::F32 };
                let values = if weights == Weights::Int8 { INT8_DEVIATION } else { INT4_DEVIATION };
                let scale = deviation / values;
                let scale =
                    record(format!("{name}_scale"), dtype, vec![rows, scales], Fill::Between(0.8 * scale, 1.2 * scale));
                if weights == Weights::Int8 {
                    return vec![record(name.clone(), Dtype::I8, shape.clone(), Fill::Bytes), scale];
                }
                let words = vec![rows, columns.div_ceil(A_WORD)];
                let numbers = Fill::Numbers([rows, columns]);
                vec![
                    record(format!("{name}_packed"), Dtype::I32, words, Fill::Words),
                    record(format!("{name}_shape"), Dtype::I64, vec![2], numbers),
                    scale,
                ]
            }
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
        let layers = scheme(self.weights, self.group, targets);
        let head_group = if self.head == Weights::Int8 { None } else { self.group };
        let head = scheme(self.head, head_group, vec![below("model.embed_tokens"), below("lm_head")]);
        let schemes: Vec<Value> = layers.into_iter().chain(head).collect();
        let format = match &schemes[..] {
            [] => return None,
            [first, rest @ ..] if rest.iter().all(|other| other["format"] == first["format"]) => {
                first["format"].clone()
            }
            _ => "mixed-precision".into(),
        };
        let groups: serde_json::Map<String, Value> =
            schemes.into_iter().enumerate().map(|(i, scheme)| (format!("group_{i}"), scheme)).collect();
        Some(json!({
            "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
            "config_groups": groups, "ignore": [],
        }))
    }
}

/// The modules whose names start so, as compressed-tensors writes it.
fn below(prefix: &str) -> String {
    format!("re:^{}.*", prefix.replace('.', "\\."))
}

/// One group of `config_groups`; none for what is not quantised.
fn scheme(weights: Weights, group: Option<usize>, targets: Vec<String>) -> Option<Value> {
    let (format, bits) = match weights {
        Weights::Int8 => ("int-quantized", 8),
        Weights::Int4 => ("pack-quantized", 4),
        Weights::F32 | Weights::F16 => return None,
    };
    let strategy = if group.is_some() { "group" } else { "channel" };
    let weights = json!({"num_bits": bits, "type": "int", "symmetric": true, "strategy": strategy,
        "group_size": group, "dynamic": false});
    Some(json!({"targets": targets, "format": format, "weights": weights, "input_activations": null}))
}
