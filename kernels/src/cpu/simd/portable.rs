//! Plain Rust.

use super::{Operation, Simd};

/// Plain Rust, eight lanes wide so that the compiler fills the vectors of the target it builds for (SSE2, NEON).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

const PORTABLE_LANES: usize = 8;

impl Simd for Portable {
    type Vector = [f32; PORTABLE_LANES];
    const NAME: &'static str = "plain Rust";
    const LANES: usize = PORTABLE_LANES;

    #[inline(always)]
    fn enter<O: Operation>(self, operation: O) -> O::Output {
        operation.run(self)
    }
    #[inline(always)]
    fn splat(self, value: f32) -> Self::Vector {
        [value; PORTABLE_LANES]
    }
    #[inline(always)]
    fn load(self, from: &[f32]) -> Self::Vector {
        let mut vector = [0.0; PORTABLE_LANES];
        vector.copy_from_slice(&from[..PORTABLE_LANES]);
        vector
    }
    #[inline(always)]
    fn store(self, vector: Self::Vector, to: &mut [f32]) {
        to[..PORTABLE_LANES].copy_from_slice(&vector);
    }
    #[inline(always)]
    fn mul_add(self, a: Self::Vector, b: Self::Vector, mut c: Self::Vector) -> Self::Vector {
        for i in 0..PORTABLE_LANES {
            // Without the instruction, `f32::mul_add` is a slow library call.
            c[i] = if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
                a[i].mul_add(b[i], c[i])
            } else {
                a[i] * b[i] + c[i]
            };
        }
        c
    }
    #[inline(always)]
    fn load_f16(self, from: &[u16]) -> Self::Vector {
        let from = &from[..PORTABLE_LANES];
        std::array::from_fn(|i| f16_to_f32(from[i]))
    }
    #[inline(always)]
    fn load_bf16(self, from: &[u16]) -> Self::Vector {
        let from = &from[..PORTABLE_LANES];
        std::array::from_fn(|i| f32::from_bits(u32::from(from[i]) << 16))
    }
    #[inline(always)]
    fn load_i8(self, from: &[i8]) -> Self::Vector {
        let from = &from[..PORTABLE_LANES];
        std::array::from_fn(|i| f32::from(from[i]))
    }
    #[inline(always)]
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        std::array::from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        std::array::from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn copy_sign(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        std::array::from_fn(|i| a[i].copysign(b[i]))
    }
    #[inline(always)]
    fn round(self, a: Self::Vector) -> Self::Vector {
        // Adding 1.5 · 2²³ leaves no room for a fraction; SSE2 has no rounding instruction.
        const SHIFT: f32 = 12_582_912.0;
        std::array::from_fn(|i| (a[i] + SHIFT) - SHIFT)
    }
    #[inline(always)]
    fn scale(self, a: Self::Vector, n: Self::Vector) -> Self::Vector {
        std::array::from_fn(|i| {
            // In two steps, since 2ⁿ itself may be outside of the range.
            let whole = n[i] as i32;
            let half = whole >> 1;
            a[i] * power_of_two(half) * power_of_two(whole - half)
        })
    }
    #[inline(always)]
    fn abs(self, a: Self::Vector) -> Self::Vector {
        std::array::from_fn(|i| a[i].abs())
    }
    #[inline(always)]
    fn if_less(self, a: Self::Vector, b: Self::Vector, yes: Self::Vector, no: Self::Vector) -> Self::Vector {
        std::array::from_fn(|i| if a[i] < b[i] { yes[i] } else { no[i] })
    }
    #[inline(always)]
    fn sum(self, a: Self::Vector) -> f32 {
        ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))
    }
    #[inline(always)]
    fn largest(self, a: Self::Vector) -> f32 {
        a.iter().fold(f32::NEG_INFINITY, |largest, &v| if v > largest { v } else { largest })
    }
}

/// 2ⁿ for n in -126..=127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

/// A half as f32, without a branch so that it vectorises.
#[inline(always)]
pub(super) fn f16_to_f32(half: u16) -> f32 {
    let bits = u32::from(half);
    // The exponent's bias differs by 112; multiplying does the subnormals too.
    let size = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((112 + 127) << 23);
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(size.to_bits() | special | (bits & 0x8000) << 16)
}
