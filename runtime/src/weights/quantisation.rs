//! 8-bit weights: compressed-tensors' `int-quantized`, one scale a row (`X.weight` I8, `X.weight_scale`).

use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use serde_json::Value;

use super::{Checkpoint, Raw, WeightsError};

const SCALE: &str = "_scale";

/// A weight's name and its row scales.
type RowScales = (String, Arc<[f32]>);

/// Every 8-bit weight's name with its row scales, checked.
pub(super) fn pair_scales(checkpoint: &Checkpoint) -> Result<Vec<RowScales>, WeightsError> {
    let mut pairs = Vec::new();
    for name in checkpoint.names() {
        let raw = checkpoint.raw(name)?;
        let file = || checkpoint.file_of(name).to_owned();
        if raw.dtype == "I8" {
            let scale = format!("{name}{SCALE}");
            if !checkpoint.contains(&scale) {
                return Err(WeightsError::ScaleMissing { file: file(), tensor: name.to_owned() });
            }
            let rows = raw.shape.first().copied().unwrap_or(1);
            let scales = read_scales(checkpoint.file_of(&scale), &scale, checkpoint.raw(&scale)?, rows)?;
            pairs.push((name.to_owned(), scales));
        } else if let Some(weight) = name.strip_suffix(SCALE) {
            let of_int8 = checkpoint.contains(weight) && checkpoint.raw(weight)?.dtype == "I8";
            if weight.ends_with(".weight") && !of_int8 {
                return Err(WeightsError::ScaleUnused { file: file(), tensor: name.to_owned() });
            }
        }
    }
    Ok(pairs)
}

/// Whether a tensor is the scale of an 8-bit weight, which is read with its weight.
pub(super) fn is_scale(checkpoint: &Checkpoint, name: &str) -> bool {
    let weight = name.strip_suffix(SCALE).filter(|w| checkpoint.contains(w));
    weight.is_some_and(|w| checkpoint.raw(w).is_ok_and(|raw| raw.dtype == "I8"))
}

fn read_scales(file: &Path, tensor: &str, raw: Raw<'_>, rows: usize) -> Result<Arc<[f32]>, WeightsError> {
    let two = |c: &[u8]| [c[0], c[1]];
    let values: Option<Vec<f32>> = match raw.dtype {
        "F32" => Some(raw.bytes.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect()),
        "F16" => Some(raw.bytes.chunks_exact(2).map(|c| f16::from_le_bytes(two(c)).to_f32()).collect()),
        "BF16" => Some(raw.bytes.chunks_exact(2).map(|c| bf16::from_le_bytes(two(c)).to_f32()).collect()),
        _ => None,
    };
    let one_a_row = raw.shape == [rows, 1] || raw.shape == [rows];
    let Some(values) = values.filter(|_| one_a_row) else {
        return Err(WeightsError::ScaleShape {
            file: file.to_owned(),
            tensor: tensor.to_owned(),
            dtype: raw.dtype.to_owned(),
            actual: raw.shape.to_vec(),
            rows,
        });
    };
    if let Some((row, &value)) = values.iter().enumerate().find(|(_, v)| !(v.is_finite() && **v > 0.0)) {
        return Err(WeightsError::ScaleValue { file: file.to_owned(), tensor: tensor.to_owned(), row, value });
    }
    Ok(values.into())
}

/// Checks that config.json's `quantization_config`, where there is one, is a scheme that is read here.
pub fn check_quantisation(file: &Path, config: &Value) -> Result<(), WeightsError> {
    let quantisation = &config["quantization_config"];
    if quantisation.is_null() {
        return Ok(());
    }
    let refuse = |reason: String| Err(WeightsError::Quantisation { file: file.to_owned(), reason });
    for (key, wanted) in [("quant_method", "compressed-tensors"), ("format", "int-quantized")] {
        if quantisation[key] != wanted {
            return refuse(format!("{key} is {}", quantisation[key]));
        }
    }
    let Some(groups) = quantisation["config_groups"].as_object() else {
        return refuse("config_groups is no object".into());
    };
    for (name, group) in groups {
        let weights = &group["weights"];
        let wanted = [
            ("num_bits", Value::from(8)),
            ("type", "int".into()),
            ("symmetric", true.into()),
            ("strategy", "channel".into()),
        ];
        for (key, value) in wanted {
            if weights[key] != value {
                return refuse(format!("config_groups.{name}.weights.{key} is {}", weights[key]));
            }
        }
        if !group["input_activations"].is_null() {
            return refuse(format!("config_groups.{name}.input_activations are quantised"));
        }
    }
    Ok(())
}
