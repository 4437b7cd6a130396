//! Quantised weights as compressed-tensors lays them down: `int-quantized` (`X.weight` I8) and `pack-quantized` with four
//! bits (`X.weight_packed` I32, `X.weight_shape`), both with `X.weight_scale`, one a row or one a group of a row.

use std::path::Path;

use candor_kernels::scales::GROUPS;
use candor_kernels::{DType, Scales};
use half::{bf16, f16};
use serde_json::Value;

use super::checkpoint::Read;
use super::header::Entry;
use super::{Checkpoint, Raw, WeightsError};

const SCALE: &str = "_scale";
const PACKED: &str = "_packed";
const SHAPE: &str = "_shape";
/// The type under which packed 4-bit weights are known.
pub(super) const FOUR_BITS: &str = "I4";

/// A packed weight: what it is called, where it lies, and the names of the two tensors it is made of.
pub(super) struct Packed {
    pub(super) entry: Entry,
    pub(super) parts: [String; 2],
}

/// Every packed weight, as an entry of type [`FOUR_BITS`] and of the weight's own shape.
pub(super) fn packed(checkpoint: &Checkpoint) -> Result<Vec<Packed>, WeightsError> {
    let names = checkpoint.names().filter(|name| name.ends_with(PACKED));
    names.map(|name| packed_weight(checkpoint, name)).collect()
}

fn packed_weight(checkpoint: &Checkpoint, packed: &str) -> Result<Packed, WeightsError> {
    let refuse = |reason: String| {
        let file = checkpoint.file_of(packed).to_owned();
        Err(WeightsError::Packed { file, tensor: packed.to_owned(), reason })
    };
    let name = packed.trim_end_matches(PACKED).to_owned();
    let shape_name = format!("{name}{SHAPE}");
    if checkpoint.contains(&name) {
        return refuse(format!("{name} is there too"));
    }
    if !checkpoint.contains(&shape_name) {
        return refuse(format!("{shape_name} is missing"));
    }
    let stored = checkpoint.entry(packed)?;
    let Some(shape) = integers(checkpoint.raw(&shape_name)?) else {
        return refuse(format!("{shape_name} is not two I64 or I32 numbers"));
    };
    let [rows, columns] = shape;
    let words = columns.div_ceil(8);
    if stored.dtype != "I32" || stored.shape != [rows, words] {
        return refuse(format!(
            "it is {}{:?}; four-bit weights of shape {shape:?} are I32[{rows}, {words}] (eight bits are read as int-quantized only)",
            stored.dtype, stored.shape
        ));
    }
    let entry = Entry { name, dtype: FOUR_BITS.to_owned(), shape: shape.to_vec(), ..stored.clone() };
    Ok(Packed { entry, parts: [packed.to_owned(), shape_name] })
}

/// The two numbers of a shape.
fn integers(raw: Raw<'_>) -> Option<[usize; 2]> {
    let numbers: Vec<i64> = match raw.dtype {
        "I64" => raw.bytes.as_chunks::<8>().0.iter().map(|&b| i64::from_le_bytes(b)).collect(),
        "I32" => raw.bytes.as_chunks::<4>().0.iter().map(|&b| i32::from_le_bytes(b).into()).collect(),
        _ => return None,
    };
    let [rows, columns] = numbers[..] else { return None };
    Some([usize::try_from(rows).ok()?, usize::try_from(columns).ok()?])
}

fn is_quantised(checkpoint: &Checkpoint, weight: &str) -> bool {
    checkpoint.raw(weight).is_ok_and(|raw| raw.dtype == "I8" || raw.dtype == FOUR_BITS)
}

/// Every quantised weight's name with its scales, checked if they are read.
pub(super) fn pair_scales(checkpoint: &Checkpoint, read: Read) -> Result<Vec<(String, Scales)>, WeightsError> {
    let mut pairs = Vec::new();
    for name in checkpoint.names() {
        let file = || checkpoint.file_of(name).to_owned();
        if is_quantised(checkpoint, name) {
            let scale = format!("{name}{SCALE}");
            if !checkpoint.contains(&scale) {
                return Err(WeightsError::ScaleMissing { file: file(), tensor: name.to_owned() });
            }
            let shape = checkpoint.raw(name)?.shape;
            let rows = shape.first().copied().unwrap_or(1);
            let columns = shape.get(1..).map_or(1, |rest| rest.iter().product());
            pairs.push((name.to_owned(), read_scales(checkpoint, &scale, rows, columns, read)?));
        } else if let Some(weight) = name.strip_suffix(SCALE)
            && weight.ends_with(".weight")
            && !is_quantised(checkpoint, weight)
        {
            return Err(WeightsError::ScaleUnused { file: file(), tensor: name.to_owned() });
        }
    }
    Ok(pairs)
}

/// Whether a tensor is the scale of a quantised weight, which is read with its weight.
pub(super) fn is_scale(checkpoint: &Checkpoint, name: &str) -> bool {
    let weight = name.strip_suffix(SCALE).filter(|w| checkpoint.contains(w));
    weight.is_some_and(|w| is_quantised(checkpoint, w))
}

/// The scales of a weight `[rows, columns]`: one a row, which are copied as f32, or one for each group of a size that the
/// number of scales tells, which stay where they are.
fn read_scales(
    checkpoint: &Checkpoint,
    tensor: &str,
    rows: usize,
    columns: usize,
    read: Read,
) -> Result<Scales, WeightsError> {
    let file = || checkpoint.file_of(tensor).to_owned();
    let raw = checkpoint.raw(tensor)?;
    let refuse = || {
        Err(WeightsError::ScaleShape {
            file: file(),
            tensor: tensor.to_owned(),
            dtype: raw.dtype.to_owned(),
            actual: raw.shape.to_vec(),
            rows,
            columns,
        })
    };
    let dtype = match raw.dtype {
        "F32" => DType::F32,
        "F16" => DType::F16,
        "BF16" => DType::BF16,
        _ => return refuse(),
    };
    let per_row = match *raw.shape {
        [stored] if stored == rows => 1,
        [stored, per_row] if stored == rows => per_row,
        _ => return refuse(),
    };
    let group = GROUPS.into_iter().find(|&group| columns.div_ceil(group) == per_row);
    let scales = match group {
        // A weight of one group a row is one with a scale a row.
        _ if per_row == 1 && read == Read::Nothing => Scales::rows(vec![1.0; rows]),
        _ if per_row == 1 => {
            let values: Vec<f32> = numbers(raw.bytes, dtype).collect();
            Scales::rows(values)
        }
        Some(group) => match checkpoint.scales(tensor, dtype, group, rows, per_row) {
            Ok(scales) => scales,
            Err(_) => {
                return Err(WeightsError::Misaligned {
                    file: file(),
                    tensor: tensor.to_owned(),
                    dtype: dtype.to_string(),
                });
            }
        },
        None => return refuse(),
    };
    if read == Read::Nothing {
        return Ok(scales);
    }
    // A group of tiny weights may have a scale that f16 rounds to zero.
    let sound = |value: f32| value.is_finite() && (value > 0.0 || value == 0.0 && per_row > 1);
    if let Some((at, value)) = numbers(raw.bytes, dtype).enumerate().find(|&(_, value)| !sound(value)) {
        let row = at / per_row;
        return Err(WeightsError::ScaleValue { file: file(), tensor: tensor.to_owned(), row, value });
    }
    Ok(scales)
}

/// Stored numbers as f32.
fn numbers(bytes: &[u8], dtype: DType) -> Box<dyn Iterator<Item = f32> + '_> {
    let twos = bytes.as_chunks::<2>().0.iter();
    match dtype {
        DType::F16 => Box::new(twos.map(|&b| f16::from_le_bytes(b).to_f32())),
        DType::BF16 => Box::new(twos.map(|&b| bf16::from_le_bytes(b).to_f32())),
        _ => Box::new(bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b))),
    }
}

/// Checks that config.json's `quantization_config`, where there is one, is a scheme that is read here.
pub fn check_quantisation(file: &Path, config: &Value) -> Result<(), WeightsError> {
    let quantisation = &config["quantization_config"];
    if quantisation.is_null() {
        return Ok(());
    }
    let refuse = |reason: String| Err(WeightsError::Quantisation { file: file.to_owned(), reason });
    if quantisation["quant_method"] != "compressed-tensors" {
        return refuse(format!("quant_method is {}", quantisation["quant_method"]));
    }
    let Some(groups) = quantisation["config_groups"].as_object() else {
        return refuse("config_groups is no object".into());
    };
    for (name, group) in groups {
        let weights = &group["weights"];
        let format = match &group["format"] {
            Value::Null => &quantisation["format"],
            own => own,
        };
        let bits = match format.as_str() {
            Some("int-quantized") => 8,
            Some("pack-quantized") => 4,
            _ => return refuse(format!("the format of config_groups.{name} is {format}")),
        };
        for (key, value) in [("num_bits", Value::from(bits)), ("type", "int".into()), ("symmetric", true.into())] {
            if weights[key] != value {
                return refuse(format!("config_groups.{name}.weights.{key} is {}, in {format}", weights[key]));
            }
        }
        match (weights["strategy"].as_str(), weights["group_size"].as_u64()) {
            (Some("channel"), _) => {}
            (Some("group"), Some(size)) if GROUPS.iter().any(|&group| group as u64 == size) => {}
            (Some("group"), size) => {
                let size = size.map_or("missing".to_owned(), |size| size.to_string());
                return refuse(format!("config_groups.{name}.weights.group_size is {size}"));
            }
            _ => return refuse(format!("config_groups.{name}.weights.strategy is {}", weights["strategy"])),
        }
        if !group["input_activations"].is_null() {
            return refuse(format!("config_groups.{name}.input_activations are quantised"));
        }
    }
    Ok(())
}
