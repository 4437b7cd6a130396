//! Byte products of NEON: plain, with the dot products of ARMv8.2, and with the matrix products of ARMv8.6.

#![allow(clippy::needless_range_loop)] // several register tiles run by one index

use super::integer::{Integer, IntegerOperation};
use super::neon::Neon;
use std::arch::aarch64::*;
use std::arch::asm;

/// [`Neon`] and dot products of four bytes (Cortex-A55, A76 and later).
#[derive(Clone, Copy, Debug)]
pub(crate) struct NeonDot(Neon);

impl NeonDot {
    pub(crate) fn new() -> Option<Self> {
        Neon::new().filter(|_| std::arch::is_aarch64_feature_detected!("dotprod")).map(NeonDot)
    }

    /// The set that it extends.
    pub(crate) fn base(self) -> Neon {
        self.0
    }

    /// Per lane, `sum + Σ a · b` of its four bytes.
    #[inline(always)]
    fn dot(self, mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        // The intrinsic is not stable.
        // SAFETY: `self` exists, so the instruction is there.
        unsafe {
            asm!(".arch_extension dotprod", "sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b",
                sum = inlateout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
                options(pure, nomem, nostack, preserves_flags));
        }
        sum
    }
}

/// [`NeonDot`] and products of 2×8 by 8×2 bytes (Neoverse V1, Cortex-A710 and later).
#[derive(Clone, Copy, Debug)]
pub(crate) struct NeonI8mm(NeonDot);

impl NeonI8mm {
    pub(crate) fn new() -> Option<Self> {
        NeonDot::new().filter(|_| std::arch::is_aarch64_feature_detected!("i8mm")).map(NeonI8mm)
    }

    /// The set that it extends.
    pub(crate) fn base(self) -> NeonDot {
        self.0
    }

    /// Adds the product of two rows of a, eight bytes each, with two of b: row 0 with both of b's, then row 1.
    #[inline(always)]
    fn multiply(self, mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        // The intrinsic is not stable.
        // SAFETY: `self` exists, so the instruction is there.
        unsafe {
            asm!(".arch_extension i8mm", "smmla {sum:v}.4s, {a:v}.16b, {b:v}.16b",
                sum = inlateout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
                options(pure, nomem, nostack, preserves_flags));
        }
        sum
    }
}

/// What the sets share.
macro_rules! bytes_of_two_registers {
    () => {
        type Float = Neon;
        type Bytes = [int8x16_t; 2];
        type Sums = [int32x4_t; 2];
        const OFFSET8: i32 = 0;

        #[inline(always)]
        fn bytes(self, from: &[u8]) -> Self::Bytes {
            let from: *const i8 = from[..32].as_ptr().cast();
            // SAFETY: `self` exists, so the instructions are there; the slicing checked the length.
            unsafe { [vld1q_s8(from), vld1q_s8(from.add(16))] }
        }
        #[inline(always)]
        fn splat_bytes(self, from: &[i8]) -> Self::Bytes {
            let from = &from[..4];
            let four = i32::from_ne_bytes([from[0] as u8, from[1] as u8, from[2] as u8, from[3] as u8]);
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { [vreinterpretq_s8_s32(vdupq_n_s32(four)); 2] }
        }
        #[inline(always)]
        fn codes8(self, from: &[u8]) -> Self::Bytes {
            self.bytes(from)
        }
        #[inline(always)]
        fn nibbles(self, from: &[u8]) -> [Self::Bytes; 2] {
            let from = from[..32].as_ptr();
            // SAFETY: `self` exists, so the instructions are there; the slicing checked the length.
            unsafe {
                let both = [vld1q_u8(from), vld1q_u8(from.add(16))];
                let low = |bytes| vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
                let high = |bytes| vreinterpretq_s8_u8(vshrq_n_u8::<4>(bytes));
                [[low(both[0]), low(both[1])], [high(both[0]), high(both[1])]]
            }
        }
        #[inline(always)]
        fn load_sums(self, from: &[i32]) -> Self::Sums {
            let from = from[..8].as_ptr();
            // SAFETY: `self` exists, so the instructions are there; the slicing checked the length.
            unsafe { [vld1q_s32(from), vld1q_s32(from.add(4))] }
        }
        #[inline(always)]
        fn splat_sum(self, value: i32) -> Self::Sums {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { [vdupq_n_s32(value); 2] }
        }
        #[inline(always)]
        fn to_float(self, sums: Self::Sums) -> [float32x4_t; 2] {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { [vcvtq_f32_s32(sums[0]), vcvtq_f32_s32(sums[1])] }
        }
        #[inline(always)]
        fn spread(self, from: &[f32], each: usize) -> [float32x4_t; 2] {
            let second = if each >= 8 { from[0] } else { from[1] };
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { [vdupq_n_f32(from[0]), vdupq_n_f32(second)] }
        }
        #[inline(always)]
        fn spread_halves(self, from: &[u16], each: usize) -> [float32x4_t; 2] {
            let second = if each >= 8 { from[0] } else { from[1] };
            // SAFETY: `self` exists, so the instructions are there.
            unsafe {
                let wide = self.float().widen(vcreate_u16(u64::from(from[0]) | u64::from(second) << 16));
                [vdupq_laneq_f32::<0>(wide), vdupq_laneq_f32::<1>(wide)]
            }
        }
    };
}

impl Integer for Neon {
    const NAME: &'static str = "NEON";
    bytes_of_two_registers!();

    #[inline(always)]
    fn enter<O: IntegerOperation>(self, operation: O) -> O::Output {
        // The instructions are part of the target.
        operation.run(self)
    }
    #[inline(always)]
    fn float(self) -> Neon {
        self
    }
    #[inline(always)]
    fn dot4(self, sum: Self::Sums, codes: Self::Bytes, activations: Self::Bytes) -> Self::Sums {
        self.dot8(sum, codes, activations)
    }
    #[inline(always)]
    fn dot8(self, sum: Self::Sums, codes: Self::Bytes, activations: Self::Bytes) -> Self::Sums {
        // SAFETY: `self` exists, so the instructions are there. 2 · 128 · 127 fits in 16 bits.
        unsafe {
            let dot = |sum, a, b| {
                let (low, high) = (vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
                vpadalq_s16(sum, vpaddq_s16(low, high))
            };
            [dot(sum[0], codes[0], activations[0]), dot(sum[1], codes[1], activations[1])]
        }
    }
}

impl Integer for NeonDot {
    const NAME: &'static str = "NEON dotprod";
    bytes_of_two_registers!();

    #[inline(always)]
    fn enter<O: IntegerOperation>(self, operation: O) -> O::Output {
        #[target_feature(enable = "dotprod")]
        fn run<O: IntegerOperation>(set: NeonDot, operation: O) -> O::Output {
            operation.run(set)
        }
        // SAFETY: `self` exists, so the instructions are there.
        unsafe { run(self, operation) }
    }
    #[inline(always)]
    fn float(self) -> Neon {
        self.0
    }
    #[inline(always)]
    fn dot4(self, sum: Self::Sums, codes: Self::Bytes, activations: Self::Bytes) -> Self::Sums {
        self.dot8(sum, codes, activations)
    }
    #[inline(always)]
    fn dot8(self, sum: Self::Sums, codes: Self::Bytes, activations: Self::Bytes) -> Self::Sums {
        [self.dot(sum[0], codes[0], activations[0]), self.dot(sum[1], codes[1], activations[1])]
    }
}

impl Integer for NeonI8mm {
    const NAME: &'static str = "NEON i8mm, dotprod where rows are few";
    bytes_of_two_registers!();
    const TOGETHER: usize = 8;

    #[inline(always)]
    fn enter<O: IntegerOperation>(self, operation: O) -> O::Output {
        #[target_feature(enable = "dotprod,i8mm")]
        fn run<O: IntegerOperation>(set: NeonI8mm, operation: O) -> O::Output {
            operation.run(set)
        }
        // SAFETY: `self` exists, so the instructions are there.
        unsafe { run(self, operation) }
    }
    #[inline(always)]
    fn float(self) -> Neon {
        self.0.base()
    }
    #[inline(always)]
    fn dot4(self, sum: Self::Sums, codes: Self::Bytes, activations: Self::Bytes) -> Self::Sums {
        self.0.dot4(sum, codes, activations)
    }
    #[inline(always)]
    fn dot8(self, sum: Self::Sums, codes: Self::Bytes, activations: Self::Bytes) -> Self::Sums {
        self.0.dot8(sum, codes, activations)
    }
    #[inline(always)]
    fn tile<const BITS: usize, const D: usize, const R: usize, const V: usize>(
        self,
        starts: [i32; R],
        panel: &[u8],
        x: [&[i8; D]; R],
    ) -> [[Self::Sums; V]; R] {
        const { assert!(R.is_multiple_of(2), "rows come in pairs") };
        // Until the end the sums of rows r and r + 1 are blocks of two rows by two outputs: the vector's first four
        // outputs at r, its last four at r + 1.
        let mut sums = [[self.splat_sum(0); V]; R];
        for (u, panel) in panel.chunks_exact(V * 64).enumerate().take(D / 8) {
            let mut codes = [[self.splat_bytes(&[0; 4]); 2]; V];
            for v in 0..V {
                codes[v] = [self.bytes(&panel[v * 64..]), self.bytes(&panel[v * 64 + 32..])];
            }
            for r in (0..R).step_by(2) {
                let (first, second) = (&x[r][8 * u..8 * u + 8], &x[r + 1][8 * u..8 * u + 8]);
                // SAFETY: `self` exists, so the instructions are there; the slicing checked the lengths.
                let x = unsafe { vcombine_s8(vld1_s8(first.as_ptr()), vld1_s8(second.as_ptr())) };
                for v in 0..V {
                    for i in 0..4 {
                        let sum = &mut sums[r + i / 2][v][i % 2];
                        *sum = self.multiply(*sum, x, codes[v][i / 2][i % 2]);
                    }
                }
            }
        }
        for r in (0..R).step_by(2) {
            for v in 0..V {
                // SAFETY: `self` exists, so the instructions are there; both sides of the casts are 128 bits.
                unsafe {
                    let blocks = [sums[r][v], sums[r + 1][v]].map(|pair| pair.map(|sum| vreinterpretq_s64_s32(sum)));
                    let first = blocks.map(|pair| vreinterpretq_s32_s64(vzip1q_s64(pair[0], pair[1])));
                    let second = blocks.map(|pair| vreinterpretq_s32_s64(vzip2q_s64(pair[0], pair[1])));
                    sums[r][v] = first.map(|sum| vaddq_s32(sum, vdupq_n_s32(starts[r])));
                    sums[r + 1][v] = second.map(|sum| vaddq_s32(sum, vdupq_n_s32(starts[r + 1])));
                }
            }
        }
        sums
    }
}
