//! NEON, which every 64-bit ARM processor has.

use super::{Operation, Simd};
use std::arch::aarch64::*;
use std::arch::asm;

/// NEON. Vectors are pairs of registers: eight lanes, as the packing of panels has them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(());

impl Neon {
    pub(crate) fn new() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Neon(()))
    }

    /// IEEE halves as f32.
    #[inline(always)]
    pub(super) fn widen(self, halves: uint16x4_t) -> float32x4_t {
        let wide;
        // The intrinsic takes a type that is not stable.
        // SAFETY: `self` exists, so the instruction is there.
        unsafe {
            asm!("fcvtl {wide:v}.4s, {halves:v}.4h", wide = lateout(vreg) wide, halves = in(vreg) halves,
                options(pure, nomem, nostack, preserves_flags));
        }
        wide
    }
}

/// An instruction on both halves of its operands.
macro_rules! both {
    ($instruction:ident, $($operand:ident),+) => {
        // SAFETY: the set's value exists, so the instructions are there.
        unsafe { [$instruction($($operand[0]),+), $instruction($($operand[1]),+)] }
    };
}

impl Simd for Neon {
    type Vector = [float32x4_t; 2];
    const NAME: &'static str = "NEON";
    const LANES: usize = 8;

    #[inline(always)]
    fn enter<O: Operation>(self, operation: O) -> O::Output {
        // The instructions are part of the target.
        operation.run(self)
    }
    #[inline(always)]
    fn splat(self, value: f32) -> Self::Vector {
        // SAFETY: `self` exists, so the instructions are there.
        unsafe { [vdupq_n_f32(value); 2] }
    }
    #[inline(always)]
    fn load(self, from: &[f32]) -> Self::Vector {
        let from = from[..8].as_ptr();
        // SAFETY: `self` exists, so the instructions are there; the slicing checked the length.
        unsafe { [vld1q_f32(from), vld1q_f32(from.add(4))] }
    }
    #[inline(always)]
    fn store(self, vector: Self::Vector, to: &mut [f32]) {
        let to = to[..8].as_mut_ptr();
        // SAFETY: as in `load`.
        unsafe {
            vst1q_f32(to, vector[0]);
            vst1q_f32(to.add(4), vector[1]);
        }
    }
    #[inline(always)]
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
        both!(vfmaq_f32, c, a, b)
    }
    #[inline(always)]
    fn add_products<const R: usize, const V: usize>(
        self,
        sums: &mut [[Self::Vector; V]; R],
        a: &[f32; R],
        b: [Self::Vector; V],
    ) {
        // The multiplication takes its factor from a lane: no instruction is spent on spreading it.
        let (by_4, by_1) = a.as_chunks::<4>();
        for (i, a) in by_4.iter().enumerate() {
            // SAFETY: `self` exists, so the instructions are there; four f32 are a register.
            unsafe {
                let a = vld1q_f32(a.as_ptr());
                for v in 0..V {
                    for half in 0..2 {
                        let b = b[v][half];
                        let sum = |r: usize| sums[4 * i + r][v][half];
                        let new = [
                            vfmaq_laneq_f32::<0>(sum(0), b, a),
                            vfmaq_laneq_f32::<1>(sum(1), b, a),
                            vfmaq_laneq_f32::<2>(sum(2), b, a),
                            vfmaq_laneq_f32::<3>(sum(3), b, a),
                        ];
                        for r in 0..4 {
                            sums[4 * i + r][v][half] = new[r];
                        }
                    }
                }
            }
        }
        for (sums, &a) in sums[R / 4 * 4..].iter_mut().zip(by_1) {
            for v in 0..V {
                sums[v] = self.mul_add(self.splat(a), b[v], sums[v]);
            }
        }
    }
    #[inline(always)]
    fn load_f16(self, from: &[u16]) -> Self::Vector {
        // SAFETY: `self` exists, so the instructions are there; the slicing checked the length.
        let halves = unsafe { vld1q_u16(from[..8].as_ptr()) };
        let high;
        // The intrinsic takes a type that is not stable.
        // SAFETY: `self` exists, so the instruction is there.
        unsafe {
            asm!("fcvtl2 {high:v}.4s, {halves:v}.8h", high = lateout(vreg) high, halves = in(vreg) halves,
                options(pure, nomem, nostack, preserves_flags));
        }
        // SAFETY: as above.
        [self.widen(unsafe { vget_low_u16(halves) }), high]
    }
    #[inline(always)]
    fn load_bf16(self, from: &[u16]) -> Self::Vector {
        // SAFETY: `self` exists, so the instructions are there; the slicing checked the length.
        unsafe {
            let halves = vld1q_u16(from[..8].as_ptr());
            let (low, high) = (vshll_n_u16::<16>(vget_low_u16(halves)), vshll_high_n_u16::<16>(halves));
            [vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high)]
        }
    }
    #[inline(always)]
    fn load_i8(self, from: &[i8]) -> Self::Vector {
        // SAFETY: `self` exists, so the instructions are there; the slicing checked the length.
        unsafe {
            let wide = vmovl_s8(vld1_s8(from[..8].as_ptr()));
            [vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))]
        }
    }
    #[inline(always)]
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        both!(vaddq_f32, a, b)
    }
    #[inline(always)]
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        both!(vsubq_f32, a, b)
    }
    #[inline(always)]
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        both!(vmulq_f32, a, b)
    }
    #[inline(always)]
    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        both!(vdivq_f32, a, b)
    }
    #[inline(always)]
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        // The instruction of that name gives NaN where either is NaN.
        self.if_less(b, a, a, b)
    }
    #[inline(always)]
    fn min(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        self.if_less(a, b, a, b)
    }
    #[inline(always)]
    fn round(self, a: Self::Vector) -> Self::Vector {
        both!(vrndnq_f32, a)
    }
    #[inline(always)]
    fn scale(self, a: Self::Vector, n: Self::Vector) -> Self::Vector {
        // SAFETY: `self` exists, so the instructions are there.
        unsafe {
            // In two steps, since 2ⁿ itself may be outside of the range.
            let scaled = |a, n| {
                let bias = vdupq_n_s32(127);
                let whole = vcvtq_s32_f32(n);
                let half = vshrq_n_s32::<1>(whole);
                let low = vshlq_n_s32::<23>(vaddq_s32(half, bias));
                let high = vshlq_n_s32::<23>(vaddq_s32(vsubq_s32(whole, half), bias));
                vmulq_f32(vmulq_f32(a, vreinterpretq_f32_s32(low)), vreinterpretq_f32_s32(high))
            };
            [scaled(a[0], n[0]), scaled(a[1], n[1])]
        }
    }
    #[inline(always)]
    fn abs(self, a: Self::Vector) -> Self::Vector {
        both!(vabsq_f32, a)
    }
    #[inline(always)]
    fn copy_sign(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        // SAFETY: `self` exists, so the instructions are there.
        let sign = unsafe { [vdupq_n_u32(1 << 31); 2] };
        both!(vbslq_f32, sign, b, a)
    }
    #[inline(always)]
    fn if_less(self, a: Self::Vector, b: Self::Vector, yes: Self::Vector, no: Self::Vector) -> Self::Vector {
        let less = both!(vcltq_f32, a, b);
        both!(vbslq_f32, less, yes, no)
    }
    #[inline(always)]
    fn transpose(self, block: &[[f32; 8]; 4], to: &mut [f32], stride: usize) {
        let to = &mut to[..7 * stride + 4];
        for half in 0..2 {
            // SAFETY: `self` exists, so the instructions are there; the slicing checked the last and furthest store,
            // and both sides of the casts are 128 bits.
            unsafe {
                let row = |r: usize| vld1q_f32(block[r][4 * half..].as_ptr());
                let doubles = |a: float32x4_t| vreinterpretq_f64_f32(a);
                let singles = |a: float64x2_t| vreinterpretq_f32_f64(a);
                let (even01, odd01) = (vtrn1q_f32(row(0), row(1)), vtrn2q_f32(row(0), row(1)));
                let (even23, odd23) = (vtrn1q_f32(row(2), row(3)), vtrn2q_f32(row(2), row(3)));
                let columns = [
                    singles(vzip1q_f64(doubles(even01), doubles(even23))),
                    singles(vzip1q_f64(doubles(odd01), doubles(odd23))),
                    singles(vzip2q_f64(doubles(even01), doubles(even23))),
                    singles(vzip2q_f64(doubles(odd01), doubles(odd23))),
                ];
                for (i, column) in columns.into_iter().enumerate() {
                    vst1q_f32(to.as_mut_ptr().add((4 * half + i) * stride), column);
                }
            }
        }
    }
    #[inline(always)]
    fn sum(self, a: Self::Vector) -> f32 {
        // SAFETY: `self` exists, so the instructions are there.
        unsafe { vaddvq_f32(vaddq_f32(a[0], a[1])) }
    }
    #[inline(always)]
    fn sums<const N: usize>(self, vectors: [Self::Vector; N]) -> [f32; N] {
        let mut sums = [0.0; N];
        let (sums_of_4, sums_of_1) = sums.as_chunks_mut::<4>();
        let (by_4, by_1) = vectors.as_chunks::<4>();
        for (sums, v) in sums_of_4.iter_mut().zip(by_4) {
            // SAFETY: `self` exists, so the instructions are there; four sums are a register.
            unsafe {
                let halves = |v: Self::Vector| vaddq_f32(v[0], v[1]);
                let first = vpaddq_f32(halves(v[0]), halves(v[1]));
                let second = vpaddq_f32(halves(v[2]), halves(v[3]));
                vst1q_f32(sums.as_mut_ptr(), vpaddq_f32(first, second));
            }
        }
        for (sum, vector) in sums_of_1.iter_mut().zip(by_1) {
            *sum = self.sum(*vector);
        }
        sums
    }
    #[inline(always)]
    fn largest(self, a: Self::Vector) -> f32 {
        // SAFETY: `self` exists, so the instructions are there. These leave a NaN out.
        unsafe { vmaxnmvq_f32(vmaxnmq_f32(a[0], a[1])) }
    }
}
