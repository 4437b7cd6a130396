//! How weights are stored in a model folder: large matrices as int8 rows with one f32 scale each (the convention
//! `int-quantized` of compressed-tensors), all else in f16.

use half::f16;
use serde_json::{Value, json};

/// Smaller matrices stay in f16: their scales and errors would cost more than they save.
const SMALLEST: usize = 4096;

/// A tensor as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub enum Stored {
    /// Rounded to f16.
    F16(Vec<f16>),
    /// `value = byte · scale` of its row.
    I8 {
        /// Row-major bytes.
        bytes: Vec<i8>,
        /// One a row.
        scales: Vec<f32>,
    },
}

impl Stored {
    /// Stores a tensor: matrices of linear layers as int8 rows, embeddings, convolutions, norms and biases in f16.
    pub fn new(name: &str, shape: &[usize], values: &[f32]) -> Stored {
        let linear = shape.len() == 2 && name.ends_with(".weight") && !name.contains("embed");
        if !linear || values.len() < SMALLEST {
            return Stored::F16(values.iter().map(|&v| f16::from_f32(v)).collect());
        }
        int8_rows(values, shape[0])
    }

    /// The values that a reader gets.
    pub fn values(&self) -> Vec<f32> {
        match self {
            Stored::F16(values) => values.iter().map(|v| v.to_f32()).collect(),
            Stored::I8 { bytes, scales } => {
                let width = bytes.len() / scales.len().max(1);
                let rows = bytes.chunks_exact(width.max(1)).zip(scales);
                rows.flat_map(|(row, scale)| row.iter().map(move |&b| f32::from(b) * scale)).collect()
            }
        }
    }

    /// Root mean square of the error against `values`, relative to that of the values.
    pub fn error(&self, values: &[f32]) -> f64 {
        let square = |x: f32| f64::from(x) * f64::from(x);
        let error: f64 = self.values().iter().zip(values).map(|(a, b)| square(a - b)).sum();
        let norm: f64 = values.iter().map(|&v| square(v)).sum();
        if norm > 0.0 { (error / norm).sqrt() } else { 0.0 }
    }
}

/// A matrix of `rows` rows as bytes with one scale a row.
pub fn int8_rows(values: &[f32], rows: usize) -> Stored {
    let mut bytes = Vec::with_capacity(values.len());
    let mut scales = Vec::with_capacity(rows);
    for row in values.chunks_exact((values.len() / rows.max(1)).max(1)) {
        let largest = row.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        // A row of zeros needs some scale above zero.
        let scale = if largest > 0.0 { largest / 127.0 } else { 1.0 };
        bytes.extend(row.iter().map(|v| (v / scale).round().clamp(-127.0, 127.0) as i8));
        scales.push(scale);
    }
    Stored::I8 { bytes, scales }
}

/// `quantization_config` of config.json.
pub fn config() -> Value {
    let weights = json!({"num_bits": 8, "type": "int", "symmetric": true, "strategy": "channel", "dynamic": false});
    json!({
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": null}},
        "ignore": [],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_their_own_scale() {
        let mut values: Vec<f32> = (0..4096).map(|i| ((i * 37) % 255) as f32 / 127.0 - 1.0).collect();
        values[2048..].iter_mut().for_each(|v| *v *= 1e-4);
        let stored = Stored::new("a.weight", &[2, 2048], &values);
        assert!(matches!(&stored, Stored::I8 { scales, .. } if scales.len() == 2));
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
}
