//! Rounding to the narrow formats, exactly. Sums and products are first made in f64 and rounded to odd there: f64 has
//! more than two bits more than any of these formats, so that rounding a second time gives the right result.

use super::instruction::{Rounding, Type};
use half::{bf16, f16};

/// A binary format by its bits.
#[derive(Clone, Copy)]
struct Format {
    mantissa: u32,
    exponent: u32,
    nan: u64,
}

impl Format {
    fn of(ty: Type) -> Self {
        match ty {
            Type::F16 => Self { mantissa: 10, exponent: 5, nan: 0x7fff },
            Type::Bf16 => Self { mantissa: 7, exponent: 8, nan: 0x7fff },
            _ => Self { mantissa: 23, exponent: 8, nan: 0x7fff_ffff },
        }
    }

    fn infinity(self) -> u64 {
        ((1 << self.exponent) - 1) << self.mantissa
    }

    fn sign(self) -> u64 {
        1 << (self.mantissa + self.exponent)
    }

    /// The exponent of the smallest normal number.
    fn smallest(self) -> i32 {
        2 - (1 << (self.exponent - 1))
    }
}

/// The number that the bits of an f16, bf16, f32 or f64 stand for.
pub(super) fn widen(ty: Type, bits: u64) -> f64 {
    match ty {
        Type::F16 => f16::from_bits(bits as u16).to_f64(),
        Type::Bf16 => bf16::from_bits(bits as u16).to_f64(),
        Type::F32 => f64::from(f32::from_bits(bits as u32)),
        _ => f64::from_bits(bits),
    }
}

/// The bits of `x` in f16, bf16, f32 or f64.
pub(super) fn narrow(ty: Type, x: f64, rounding: Rounding) -> u64 {
    if ty == Type::F64 {
        return if x.is_nan() { 0x7fff_ffff_ffff_ffff } else { x.to_bits() };
    }
    let format = Format::of(ty);
    if x.is_nan() {
        return format.nan;
    }
    let sign = if x.is_sign_negative() { format.sign() } else { 0 };
    if x.is_infinite() {
        return sign | format.infinity();
    }
    sign | magnitude(format, x.abs(), away(rounding, x.is_sign_negative()))
}

/// What becomes of a magnitude between two numbers.
#[derive(Clone, Copy, PartialEq)]
enum Step {
    Nearest,
    Down,
    Up,
}

fn away(rounding: Rounding, negative: bool) -> Step {
    match (rounding, negative) {
        (Rounding::Nearest, _) => Step::Nearest,
        (Rounding::Zero, _) | (Rounding::Down, false) | (Rounding::Up, true) => Step::Down,
        (Rounding::Down, true) | (Rounding::Up, false) => Step::Up,
    }
}

fn magnitude(format: Format, x: f64, step: Step) -> u64 {
    if x == 0.0 {
        return 0;
    }
    let bits = x.to_bits();
    let biased = (bits >> 52) as i32;
    // A subnormal f64 lies far below every format: its own bits are enough to know that it is not zero.
    let (mantissa, exponent) = (bits & ((1 << 52) - 1) | u64::from(biased > 0) << 52, biased.max(1) - 1023);
    let smallest = format.smallest();
    let shift = (52 - format.mantissa as i32 + (smallest - exponent).max(0)).min(63) as u32;
    let (kept, rest, half) = (mantissa >> shift, mantissa & ((1 << shift) - 1), 1 << (shift - 1));
    let up = match step {
        Step::Nearest => rest > half || rest == half && kept & 1 == 1,
        Step::Down => false,
        Step::Up => rest > 0,
    };
    // The implicit bit of `kept` adds one to the exponent, and so does a carry.
    let value = ((i64::from((exponent - smallest).max(0)) << format.mantissa) as u64) + kept + u64::from(up);
    match value >= format.infinity() {
        true if step == Step::Down => format.infinity() - 1,
        true => format.infinity(),
        false => value,
    }
}

/// `a * b + c`, where the product is exact in f64, rounded to odd.
pub(super) fn fma_to_odd(a: f64, b: f64, c: f64) -> f64 {
    let product = a * b;
    let sum = product + c;
    if !sum.is_finite() {
        return sum;
    }
    let back = sum - product;
    let error = (product - (sum - back)) + (c - back);
    to_odd(sum, error)
}

/// The odd neighbour of `sum` on the side of `error`, if there is an error and `sum` is even.
fn to_odd(sum: f64, error: f64) -> f64 {
    match error {
        _ if sum.to_bits() & 1 == 1 || error == 0.0 => sum,
        _ if error > 0.0 => sum.next_up(),
        _ => sum.next_down(),
    }
}

/// An integer as f64, rounded to odd.
pub(super) fn integer_to_odd(value: i128) -> f64 {
    let nearest = value as f64;
    to_odd(nearest, (value - nearest as i128) as f64)
}

/// A subnormal f16, bf16, f32 or f64 becomes a zero of its sign.
pub(super) fn flush(ty: Type, bits: u64) -> u64 {
    let (mantissa, exponent) = match ty {
        Type::F64 => (52, 11),
        _ => (Format::of(ty).mantissa, Format::of(ty).exponent),
    };
    let sign = bits & 1 << (mantissa + exponent);
    if bits >> mantissa & ((1 << exponent) - 1) == 0 { sign } else { bits }
}
