//! Arithmetic on the bits of registers, by the PTX ISA.

use super::instruction::{Binary, Comparison, Convert, Mode, RoundToInteger, Rounding, Ternary, Test, Type, Unary};
use super::round::{flush, fma_to_odd, integer_to_odd, narrow, widen};

pub(super) fn mask(bits: u32) -> u64 {
    u64::MAX >> (64 - bits)
}

/// The value with its sign.
pub(super) fn signed(value: u64, bits: u32) -> i64 {
    (value << (64 - bits)) as i64 >> (64 - bits)
}

/// Applies `f` to both halves of a pair.
fn halves(half: Type, f: impl Fn(Type, [u64; 3]) -> u64, [a, b, c]: [u64; 3]) -> u64 {
    let low = f(half, [a & 0xffff, b & 0xffff, c & 0xffff]);
    low | f(half, [a >> 16, b >> 16, c >> 16]) << 16
}

// ---- Floating point

/// Operands as an instruction with this mode takes them.
fn operand(ty: Type, mode: Mode, bits: u64) -> u64 {
    if mode.ftz { flush(ty, bits) } else { bits }
}

/// A result in its format, as an instruction with this mode gives it.
fn finish(ty: Type, mode: Mode, bits: u64) -> u64 {
    let bits = if mode.ftz { flush(ty, bits) } else { bits };
    if !mode.saturate && !mode.relu {
        return bits;
    }
    let x = widen(ty, bits);
    match x {
        _ if mode.saturate && x.is_nan() => 0,
        _ if mode.saturate => narrow(ty, x.clamp(0.0, 1.0) + 0.0, Rounding::Nearest),
        _ if x <= 0.0 => 0,
        _ => bits,
    }
}

fn f32_bits(x: f32) -> u64 {
    if x.is_nan() { 0x7fff_ffff } else { u64::from(x.to_bits()) }
}

fn float_fma(ty: Type, mode: Mode, [a, b, c]: [u64; 3]) -> u64 {
    if let Some(half) = ty.half() {
        return halves(half, |ty, parts| float_fma(ty, mode, parts), [a, b, c]);
    }
    let [a, b, c] = [a, b, c].map(|bits| operand(ty, mode, bits));
    let bits = match (ty, mode.rounding) {
        (Type::F32, Rounding::Nearest) => {
            let [a, b, c] = [a, b, c].map(|bits| f32::from_bits(bits as u32));
            f32_bits(a.mul_add(b, c))
        }
        (Type::F64, _) => narrow(ty, widen(ty, a).mul_add(widen(ty, b), widen(ty, c)), Rounding::Nearest),
        _ => narrow(ty, fma_to_odd(widen(ty, a), widen(ty, b), widen(ty, c)), mode.rounding),
    };
    finish(ty, mode, bits)
}

fn float_binary(op: Binary, ty: Type, mode: Mode, a: u64, b: u64) -> u64 {
    if let Some(half) = ty.half() {
        return halves(half, |ty, [a, b, _]| float_binary(op, ty, mode, a, b), [a, b, 0]);
    }
    let (a, b) = (operand(ty, mode, a), operand(ty, mode, b));
    let bits = match (op, ty, mode.rounding) {
        (Binary::Min | Binary::Max, ..) => extreme(op, ty, mode, a, b),
        (_, Type::F32, Rounding::Nearest) => f32_bits(nearest(op, mode, a, b)),
        (Binary::Add, Type::F64, _) => narrow(ty, widen(ty, a) + widen(ty, b), Rounding::Nearest),
        (Binary::Sub, Type::F64, _) => narrow(ty, widen(ty, a) - widen(ty, b), Rounding::Nearest),
        (Binary::Mul, Type::F64, _) => narrow(ty, widen(ty, a) * widen(ty, b), Rounding::Nearest),
        (Binary::Add, ..) => narrow(ty, fma_to_odd(widen(ty, a), 1.0, widen(ty, b)), mode.rounding),
        (Binary::Sub, ..) => narrow(ty, fma_to_odd(widen(ty, b), -1.0, widen(ty, a)), mode.rounding),
        (Binary::Mul, ..) => narrow(ty, widen(ty, a) * widen(ty, b), mode.rounding),
        _ => narrow(ty, widen(ty, a) / widen(ty, b), Rounding::Nearest),
    };
    finish(ty, mode, bits)
}

fn nearest(op: Binary, mode: Mode, a: u64, b: u64) -> f32 {
    let (a, b) = (f32::from_bits(a as u32), f32::from_bits(b as u32));
    match op {
        Binary::Add => a + b,
        Binary::Sub => a - b,
        Binary::Mul => a * b,
        // Out of the range of the approximation.
        _ if mode.approximate && b.is_finite() && b.abs() > 2f32.powi(126) => {
            if a.is_infinite() {
                f32::NAN
            } else {
                0.0f32.copysign(a * b.signum())
            }
        }
        _ => a / b,
    }
}

/// The smaller or larger; of a number and a NaN the number, of two zeros the one of the right sign.
fn extreme(op: Binary, ty: Type, mode: Mode, a: u64, b: u64) -> u64 {
    let (x, y) = (widen(ty, a), widen(ty, b));
    if x.is_nan() || y.is_nan() {
        return match (mode.nan, x.is_nan(), y.is_nan()) {
            (false, true, false) => b,
            (false, false, true) => a,
            _ => narrow(ty, f64::NAN, Rounding::Nearest),
        };
    }
    let a_is_less = x < y || x == y && x.is_sign_negative();
    if a_is_less == (op == Binary::Min) { a } else { b }
}

fn float_unary(op: Unary, ty: Type, mode: Mode, a: u64) -> u64 {
    if let Some(half) = ty.half() {
        return halves(half, |ty, [a, ..]| float_unary(op, ty, mode, a), [a, 0, 0]);
    }
    let a = operand(ty, mode, a);
    let x = widen(ty, a);
    let y = match op {
        Unary::Abs => return a & mask(ty.bits() - 1),
        Unary::Neg => return a ^ 1 << (ty.bits() - 1),
        // Of f64 there is only a coarse approximation, whose low half is zero.
        Unary::Reciprocal if ty == Type::F64 && mode.approximate => {
            return narrow(ty, 1.0 / x, Rounding::Nearest) & !0xffff_ffff;
        }
        Unary::ReciprocalSqrt if ty == Type::F64 => {
            return narrow(ty, 1.0 / x.sqrt(), Rounding::Nearest) & !0xffff_ffff;
        }
        Unary::Reciprocal => 1.0 / x,
        Unary::Sqrt => x.sqrt(),
        Unary::ReciprocalSqrt => 1.0 / x.sqrt(),
        Unary::Exp2 => x.exp2(),
        Unary::Log2 => x.log2(),
        Unary::Sin => x.sin(),
        Unary::Cos => x.cos(),
        _ => x.tanh(),
    };
    finish(ty, mode, narrow(ty, y, Rounding::Nearest))
}

// ---- Integers and all together

pub(super) fn unary(op: Unary, ty: Type, mode: Mode, a: u64) -> u64 {
    if ty.float() {
        return float_unary(op, ty, mode, a);
    }
    let bits = ty.bits();
    let a = a & mask(bits);
    let value = match op {
        Unary::Abs => signed(a, bits).unsigned_abs(),
        Unary::Neg => a.wrapping_neg(),
        Unary::CNot => u64::from(a == 0),
        Unary::PopCount => u64::from(a.count_ones()),
        Unary::LeadingZeros => u64::from(a.leading_zeros() - (64 - bits)),
        Unary::ReverseBits => a.reverse_bits() >> (64 - bits),
        Unary::FindHighest | Unary::FindShiftAmount => return find(op, ty, a),
        _ => !a,
    };
    value & mask(bits)
}

fn find(op: Unary, ty: Type, a: u64) -> u64 {
    let bits = ty.bits();
    let a = if ty.signed() && signed(a, bits) < 0 { !a & mask(bits) } else { a };
    match a.checked_ilog2() {
        None => 0xffff_ffff,
        Some(place) if op == Unary::FindHighest => u64::from(place),
        Some(place) => u64::from(bits - 1 - place),
    }
}

/// Both operands with their signs, if the type has one.
fn integers(ty: Type, a: u64, b: u64) -> (i128, i128) {
    let bits = ty.bits();
    match ty.signed() {
        true => (signed(a, bits).into(), signed(b, bits).into()),
        false => ((a & mask(bits)).into(), (b & mask(bits)).into()),
    }
}

#[inline]
pub(super) fn binary(op: Binary, ty: Type, mode: Mode, a: u64, b: u64) -> u64 {
    if ty.float() {
        return match op {
            Binary::CopySign => a & 1 << (ty.bits() - 1) | b & mask(ty.bits() - 1),
            _ => float_binary(op, ty, mode, a, b),
        };
    }
    let bits = ty.bits();
    let value = match op {
        Binary::Add if mode.saturate => saturated(ty, integers(ty, a, b).0 + integers(ty, a, b).1),
        Binary::Sub if mode.saturate => saturated(ty, integers(ty, a, b).0 - integers(ty, a, b).1),
        Binary::Add => a.wrapping_add(b),
        Binary::Sub => a.wrapping_sub(b),
        Binary::Mul => a.wrapping_mul(b),
        Binary::MulHigh => high(ty, a, b),
        Binary::MulWide if ty.signed() => {
            return (signed(a, bits).wrapping_mul(signed(b, bits)) as u64) & mask(2 * bits);
        }
        Binary::MulWide => return (a & mask(bits)).wrapping_mul(b & mask(bits)),
        Binary::Min | Binary::Max => {
            let (x, y) = integers(ty, a, b);
            if (x < y) == (op == Binary::Min) { a } else { b }
        }
        Binary::And => a & b,
        Binary::Or => a | b,
        Binary::Xor => a ^ b,
        Binary::ShiftLeft => shift_left(a, b, bits),
        _ if ty.signed() => (signed(a, bits) >> (b & 0xffff_ffff).min(u64::from(bits - 1))) as u64,
        _ => shift_right(a & mask(bits), b),
    };
    value & mask(bits)
}

/// The high half of a product.
fn high(ty: Type, a: u64, b: u64) -> u64 {
    let (a, b) = integers(ty, a, b);
    // Of two 64-bit numbers without signs, the product fills all 128 bits.
    ((a as u128).wrapping_mul(b as u128) >> ty.bits()) as u64
}

fn shift_left(a: u64, b: u64, bits: u32) -> u64 {
    let b = b & 0xffff_ffff;
    if b < u64::from(bits) { a << b } else { 0 }
}

fn shift_right(a: u64, b: u64) -> u64 {
    let b = b & 0xffff_ffff;
    if b < 64 { a >> b } else { 0 }
}

fn saturated(ty: Type, value: i128) -> u64 {
    let (least, most) = limits(ty);
    value.clamp(least, most) as u64
}

fn limits(ty: Type) -> (i128, i128) {
    let bits = ty.bits();
    if ty.signed() { (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) } else { (0, (1 << bits) - 1) }
}

/// `None` where the divisor is zero: the result is not defined.
pub(super) fn divide(ty: Type, remainder: bool, a: u64, b: u64) -> Option<u64> {
    let (a, b) = integers(ty, a, b);
    let value = if remainder { a.checked_rem(b)? } else { a.checked_div(b)? };
    Some(value as u64 & mask(ty.bits()))
}

pub(super) fn ternary(op: Ternary, ty: Type, mode: Mode, a: u64, b: u64, c: u64) -> u64 {
    let bits = ty.bits();
    let value = match op {
        Ternary::Fma => return float_fma(ty, mode, [a, b, c]),
        Ternary::MadWide => return binary(Binary::MulWide, ty, mode, a, b).wrapping_add(c) & mask(2 * bits),
        Ternary::MadLow => a.wrapping_mul(b).wrapping_add(c),
        Ternary::MadHigh => high(ty, a, b).wrapping_add(c),
        Ternary::Sad => {
            let (a, b) = integers(ty, a, b);
            ((a - b).unsigned_abs() as u64).wrapping_add(c)
        }
        Ternary::Permute => permute(a, b, c),
        Ternary::FunnelLeft { wrap } => ((a & mask(32) | b << 32) << funnel(wrap, c)) >> 32,
        Ternary::FunnelRight { wrap } => (a & mask(32) | b << 32) >> funnel(wrap, c),
        Ternary::ExtractBits => extract(ty, a, b, c),
        Ternary::Logic(table) => logic(table, a, b, c),
        Ternary::Dot4 { signed_a, signed_b } => {
            let products = (0..4).map(|at| part(a, 8, at, signed_a) * part(b, 8, at, signed_b));
            (products.sum::<i64>() as u64).wrapping_add(c)
        }
        Ternary::Dot2 { signed_a, signed_b, high } => {
            let from = if high { 2 } else { 0 };
            let products = (0..2).map(|at| part(a, 16, at, signed_a) * part(b, 8, from + at, signed_b));
            (products.sum::<i64>() as u64).wrapping_add(c)
        }
        // The masks of bytes that `c` would accumulate into do not occur without `.add`.
        Ternary::AbsDiff4 => {
            (0..4).fold(0, |all, at| all | (part(a, 8, at, false) - part(b, 8, at, false)).unsigned_abs() << (8 * at))
        }
    };
    value & mask(bits)
}

/// Element `at` of packed numbers of `bits` bits.
fn part(value: u64, bits: u32, at: u32, with_sign: bool) -> i64 {
    let element = value >> (bits * at) & mask(bits);
    if with_sign { signed(element, bits) } else { element as i64 }
}

fn funnel(wrap: bool, c: u64) -> u64 {
    let c = c & 0xffff_ffff;
    if wrap { c & 31 } else { c.min(32) }
}

/// Each four bits of `c` choose a byte of `b:a`, or eight copies of its sign.
fn permute(a: u64, b: u64, c: u64) -> u64 {
    let bytes = a & mask(32) | b << 32;
    (0..4).fold(0, |all, at| {
        let chosen = c >> (4 * at) & 0xf;
        let byte = bytes >> (8 * (chosen & 7)) & 0xff;
        let byte = if chosen & 8 == 0 { byte } else { 0xff * (byte >> 7) };
        all | byte << (8 * at)
    })
}

fn extract(ty: Type, a: u64, start: u64, len: u64) -> u64 {
    let (bits, start, len) = (u64::from(ty.bits()), start & 0xff, len & 0xff);
    let a = a & mask(ty.bits());
    // Bits beyond the top are copies of the sign: that of the last bit of the field which the value has.
    let sign = match len {
        0 => 0,
        _ if ty.signed() => a >> (start + len - 1).min(bits - 1) & 1,
        _ => 0,
    };
    (0..bits).fold(0, |value, at| {
        let bit = if at < len && start + at < bits { a >> (start + at) & 1 } else { sign };
        value | bit << at
    })
}

pub(super) fn insert(ty: Type, a: u64, b: u64, start: u64, len: u64) -> u64 {
    let (bits, start, len) = (u64::from(ty.bits()), start & 0xff, len & 0xff);
    (0..len).take_while(|at| start + at < bits).fold(b, |value, at| {
        let place = start + at;
        value & !(1 << place) | (a >> at & 1) << place
    })
}

fn logic(table: u8, a: u64, b: u64, c: u64) -> u64 {
    (0..8u64).filter(|row| table >> row & 1 == 1).fold(0, |value, row| {
        let term = |set: u64, x: u64| if row & set == 0 { !x } else { x };
        value | term(4, a) & term(2, b) & term(1, c)
    })
}

#[inline]
pub(super) fn compare(comparison: Comparison, unordered: bool, ty: Type, ftz: bool, a: u64, b: u64) -> bool {
    if !ty.float() {
        let bits = ty.bits();
        let (a, b) = match ty.signed() {
            true => (signed(a, bits) ^ i64::MIN, signed(b, bits) ^ i64::MIN),
            false => ((a & mask(bits)) as i64, (b & mask(bits)) as i64),
        };
        return ordered(comparison, a as u64, b as u64);
    }
    let mode = Mode { ftz, ..Mode::default() };
    let (a, b) = (widen(ty, operand(ty, mode, a)), widen(ty, operand(ty, mode, b)));
    match (comparison, a.is_nan() || b.is_nan()) {
        (Comparison::Number, nan) => !nan,
        (Comparison::Nan, nan) => nan,
        (_, true) => unordered,
        (_, false) => ordered(comparison, a, b),
    }
}

fn ordered<T: PartialOrd>(comparison: Comparison, a: T, b: T) -> bool {
    match comparison {
        Comparison::Eq => a == b,
        Comparison::Lt => a < b,
        Comparison::Le => a <= b,
        Comparison::Gt => a > b,
        Comparison::Ge => a >= b,
        _ => a != b,
    }
}

pub(super) fn test(kind: Test, ty: Type, a: u64) -> bool {
    let x = widen(ty, a);
    let zero = a & mask(ty.bits() - 1) == 0;
    let subnormal = !zero && flush(ty, a) & mask(ty.bits() - 1) == 0;
    match kind {
        Test::Finite => x.is_finite(),
        Test::Infinite => x.is_infinite(),
        Test::Number => !x.is_nan(),
        Test::NotANumber => x.is_nan(),
        Test::Normal => x.is_finite() && !zero && !subnormal,
        Test::Subnormal => subnormal,
    }
}

// ---- Conversion

pub(super) fn convert(convert: &Convert, a: u64) -> u64 {
    let Convert { to, from, mode, integer, width } = *convert;
    match (from.float(), to.float()) {
        (false, false) => {
            let value = integers(from, a, 0).0;
            extend(to, width, if mode.saturate { saturated(to, value) } else { value as u64 })
        }
        (false, true) => {
            let value = integers(from, a, 0).0;
            let bits = match (to, mode.rounding) {
                (Type::F64, _) => (value as f64).to_bits(),
                _ => narrow(to, integer_to_odd(value), mode.rounding),
            };
            finish(to, mode, bits)
        }
        (true, false) => extend(to, width, float_to_integer(to, from, mode, integer, a)),
        (true, true) => {
            let mode_in = Mode { ftz: mode.ftz && from == Type::F32, ..mode };
            let x = widen(from, operand(from, mode_in, a));
            let x = integer.map_or(x, |rounding| to_integer(x, rounding));
            let mode_out = Mode { ftz: mode.ftz && to == Type::F32, ..mode };
            finish(to, mode_out, narrow(to, x, mode.rounding))
        }
    }
}

/// Fills a register wider than the type.
fn extend(ty: Type, width: u32, value: u64) -> u64 {
    let value = if ty.signed() { signed(value, ty.bits()) as u64 } else { value & mask(ty.bits()) };
    value & mask(width)
}

fn to_integer(x: f64, rounding: RoundToInteger) -> f64 {
    match rounding {
        RoundToInteger::Nearest => x.round_ties_even(),
        RoundToInteger::Zero => x.trunc(),
        RoundToInteger::Down => x.floor(),
        RoundToInteger::Up => x.ceil(),
    }
}

/// Numbers out of range become the nearest that is in it; NaN becomes zero, or the lowest number where one side is
/// 64 bits wide.
fn float_to_integer(to: Type, from: Type, mode: Mode, integer: Option<RoundToInteger>, a: u64) -> u64 {
    let x = widen(from, operand(from, mode, a));
    if x.is_nan() {
        return if from == Type::F64 || to.bits() == 64 { 1 << (to.bits() - 1) } else { 0 };
    }
    saturated(to, to_integer(x, integer.unwrap_or(RoundToInteger::Zero)) as i128)
}

/// Two f32 as a pair of halves.
pub(super) fn convert_pair(half: Type, mode: Mode, high: u64, low: u64) -> u64 {
    let one = |bits| finish(half, mode, narrow(half, widen(Type::F32, bits), mode.rounding));
    one(high) << 16 | one(low)
}
