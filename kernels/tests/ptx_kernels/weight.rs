//! Stored weights, as `Weight` of cuda/common.cuh, and the values that they stand for.

use crate::machine::{Fields, Machine, halves, le_bytes};
use half::{bf16, f16};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Type {
    F32,
    F16,
    Bf16,
    I8,
    I4,
}

pub(crate) const TYPES: [Type; 5] = [Type::F32, Type::F16, Type::Bf16, Type::I8, Type::I4];

/// Elements of a group; none: a scale for each row.
pub(crate) const GROUPS: [Option<usize>; 4] = [Some(32), Some(64), Some(128), None];

/// A weight in the memory of a machine.
#[derive(Clone, Debug)]
pub(crate) struct Weight {
    pub(crate) kind: Type,
    pub(crate) rows: usize,
    pub(crate) depth: usize,
    /// Elements that share a scale, 128 at most.
    pub(crate) chunk: usize,
    pub(crate) aligned: bool,
    pub(crate) values: Vec<f64>,
    pub(crate) argument: Fields,
}

/// No weight: a bias that is not there.
pub(crate) fn none() -> Fields {
    Fields::default().word(0).word(0).word(0).ints(&[0; 6])
}

/// Floats of a type as bytes, and what they became.
fn stored(kind: Type, values: &[f32]) -> (Vec<u8>, Vec<f64>) {
    let became = |narrow: fn(f32) -> f32| values.iter().map(|&value| f64::from(narrow(value))).collect();
    match kind {
        Type::F16 => (halves(values), became(|value| f16::from_f32(value).to_f32())),
        Type::Bf16 => {
            let bytes = values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect();
            (bytes, became(|value| bf16::from_f32(value).to_f32()))
        }
        _ => (le_bytes(values), became(|value| value)),
    }
}

impl Machine {
    /// A weight of random elements, with the usual scales.
    pub(crate) fn weight(&mut self, kind: Type, rows: usize, depth: usize) -> Weight {
        let group = if kind == Type::I4 { Some(32) } else { None };
        self.weight_of(kind, rows, depth, group, Type::F32, 0)
    }

    /// A weight of random elements, with scales of a type for groups or rows. It is a view from row `first` on of one that
    /// has more.
    pub(crate) fn weight_of(
        &mut self,
        kind: Type,
        rows: usize,
        depth: usize,
        group: Option<usize>,
        scale_kind: Type,
        first: usize,
    ) -> Weight {
        let all = first + rows;
        let per_row = group.map_or(1, |group| depth.div_ceil(group));
        // Sums are to be of a size at which activations are curved.
        let most = if kind == Type::I8 { 4096.0 } else { 256.0 };
        let scales: Vec<f32> = self.numbers(all * per_row).iter().map(|scale| (scale + 3.0) / most).collect();
        let (scale_bytes, scales) = stored(scale_kind, &scales);
        let scale = |row: usize, at: usize| scales[row * per_row + group.map_or(0, |group| at / group)];
        let (bytes, codes): (Vec<u8>, Vec<f64>) = match kind {
            Type::I8 => {
                let bytes = self.random_bytes(all * depth);
                let values = bytes.iter().map(|&byte| f64::from(byte as i8)).collect();
                (bytes, values)
            }
            Type::I4 => {
                // What fills up the last word of a row is not to count: it is random too.
                let row_bytes = depth.div_ceil(8) * 4;
                let bytes = self.random_bytes(all * row_bytes);
                let code = |i: usize| {
                    let (row, at) = (i / depth, i % depth);
                    f64::from(bytes[row * row_bytes + at / 2] >> (at % 2 * 4) & 15) - 8.0
                };
                let values = (0..all * depth).map(code).collect();
                (bytes, values)
            }
            _ => stored(kind, &self.numbers(all * depth)),
        };
        let is_scaled = matches!(kind, Type::I8 | Type::I4);
        let factor = |i: usize| if is_scaled { scale(i / depth, i % depth) } else { 1.0 };
        let values = codes.iter().enumerate().skip(first * depth).map(|(i, code)| code * factor(i)).collect();
        let row_bytes = bytes.len() / all;
        let data = self.bytes(&bytes) + (first * row_bytes) as u64;
        let (scales_at, group_shift) = if is_scaled {
            let start = self.bytes(&scale_bytes);
            (
                start + (first * scale_bytes.len() / all) as u64,
                group.map_or(31, |group| group.trailing_zeros() as usize),
            )
        } else {
            (0, 0)
        };
        let ints = [rows, depth, kind as usize, scale_kind as usize, group_shift, if is_scaled { per_row } else { 0 }];
        Weight {
            kind,
            rows,
            depth,
            chunk: group.filter(|_| per_row > 1).unwrap_or(128),
            aligned: data.is_multiple_of(16) && row_bytes.is_multiple_of(16),
            values,
            argument: Fields::default().word(data).word(scales_at).word(row_bytes as u64).ints(&ints),
        }
    }
}
