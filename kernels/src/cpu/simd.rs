//! The instruction sets: one small vector trait that every kernel is written over once.
//!
//! A value of [`Avx2`], [`Avx512`] or [`Avx512Bf16`] exists only after the processor was asked, so the type is the
//! proof that its instructions are there. [`Level::run`] compiles an [`Operation`] once per instruction set.

use std::sync::OnceLock;

/// Work that can be compiled for every instruction set.
pub(crate) trait Operation {
    type Output;
    /// Must be `#[inline(always)]`, as everything hot that it calls, to be compiled with the set's features.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Vectors of f32 of one instruction set.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    type Vector: Copy;
    /// f32 a vector.
    const LANES: usize;

    /// Runs code with the instruction set switched on.
    fn enter<O: Operation>(self, operation: O) -> O::Output;
    fn splat(self, value: f32) -> Self::Vector;
    /// The first [`Simd::LANES`] elements.
    fn load(self, from: &[f32]) -> Self::Vector;
    /// To the first [`Simd::LANES`] elements.
    fn store(self, vector: Self::Vector, to: &mut [f32]);
    /// a · b + c
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// IEEE half precision, as f32.
    fn load_f16(self, from: &[u16]) -> Self::Vector;
    /// Upper halves of singles, as f32.
    fn load_bf16(self, from: &[u16]) -> Self::Vector;
    /// Signed bytes, as f32.
    fn load_i8(self, from: &[i8]) -> Self::Vector;
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// The larger; `b` where either is NaN.
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// The smaller; `b` where either is NaN.
    fn min(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::Vector) -> Self::Vector;
    /// a · 2ⁿ for integral n within ±252.
    fn scale(self, a: Self::Vector, n: Self::Vector) -> Self::Vector;
    fn abs(self, a: Self::Vector) -> Self::Vector;
    /// The size of `a` with the sign of `b`.
    fn copy_sign(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `yes` where a < b, else `no`.
    fn if_less(self, a: Self::Vector, b: Self::Vector, yes: Self::Vector, no: Self::Vector) -> Self::Vector;
    /// `to[i · stride + r] = block[r][i]`: four rows to the places of columns.
    #[inline(always)]
    fn transpose(self, block: &[[f32; 8]; 4], to: &mut [f32], stride: usize) {
        for i in 0..8 {
            to[i * stride..i * stride + 4].copy_from_slice(&[block[0][i], block[1][i], block[2][i], block[3][i]]);
        }
    }
    /// Sum of the lanes.
    fn sum(self, a: Self::Vector) -> f32;
    /// Largest of the lanes.
    fn largest(self, a: Self::Vector) -> f32;

    /// Up to [`Simd::LANES`] elements, `fill` in the lanes behind them.
    #[inline(always)]
    fn load_part(self, from: &[f32], fill: f32) -> Self::Vector {
        let mut padded = [fill; MAX_LANES];
        padded[..from.len()].copy_from_slice(from);
        self.load(&padded)
    }
    /// The first lanes, as many as `to` holds.
    #[inline(always)]
    fn store_part(self, vector: Self::Vector, to: &mut [f32]) {
        let mut padded = [0.0; MAX_LANES];
        self.store(vector, &mut padded);
        to.copy_from_slice(&padded[..to.len()]);
    }
}

/// Lanes of the widest vector.
pub(crate) const MAX_LANES: usize = 16;

/// Plain Rust, eight lanes wide so that the compiler fills the vectors of the target it builds for (SSE2, NEON).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

const PORTABLE_LANES: usize = 8;

impl Simd for Portable {
    type Vector = [f32; PORTABLE_LANES];
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
fn f16_to_f32(half: u16) -> f32 {
    let bits = u32::from(half);
    // The exponent's bias differs by 112; multiplying does the subnormals too.
    let size = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((112 + 127) << 23);
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(size.to_bits() | special | (bits & 0x8000) << 16)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Operation, Simd};
    use std::arch::x86_64::*;

    /// AVX2, FMA and F16C.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Avx2(());

    /// The AVX-512 of Skylake servers and Zen 4, and all of [`Avx2`].
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Avx512(());

    /// [`Avx512`] and products of bf16 pairs.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Avx512Bf16(Avx512);

    impl Avx2 {
        pub(crate) fn new() -> Option<Self> {
            (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c"))
                .then_some(Avx2(()))
        }
    }

    impl Avx512 {
        pub(crate) fn new() -> Option<Self> {
            Avx2::new()?;
            (is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl"))
            .then_some(Avx512(()))
        }
    }

    impl Avx512Bf16 {
        pub(crate) fn new() -> Option<Self> {
            Avx512::new().filter(|_| is_x86_feature_detected!("avx512bf16")).map(Avx512Bf16)
        }

        /// The set that it extends.
        #[inline(always)]
        pub(crate) fn base(self) -> Avx512 {
            self.0
        }

        /// Eight lanes of pairs from sixteen elements, rounded to nearest, ties to even.
        #[inline(always)]
        pub(crate) fn pairs(self, from: &[f32]) -> [f32; 8] {
            let mut lanes = [0.0; 8];
            // SAFETY: `self` exists, so the instructions are there; the slicing checked the length, and both sides of
            // the store and of the cast are 256 bits.
            unsafe {
                let rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from[..16].as_ptr()));
                let bits = std::mem::transmute::<__m256bh, __m256i>(rounded);
                _mm256_storeu_si256(lanes.as_mut_ptr().cast(), bits);
            }
            lanes
        }

        /// Up to sixteen lanes of pairs: the lower halves from `x`, the upper ones from `y` or, where that is shorter,
        /// zero; rounded to nearest, ties to even.
        #[inline(always)]
        pub(crate) fn pair_up(self, x: &[f32], y: &[f32], to: &mut [f32]) {
            let mask = |len: usize| ((1u32 << len.min(16)) - 1) as __mmask16;
            let to = &mut to[..x.len().min(16)];
            // SAFETY: `self` exists, so the instructions are there; the masks leave out what is behind the slices, and
            // both sides of the casts are 256 bits.
            unsafe {
                let x = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask(x.len()), x.as_ptr()));
                let y = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask(y.len()), y.as_ptr()));
                let low = _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(x));
                let high = _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(y));
                let pairs = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
                _mm512_mask_storeu_ps(to.as_mut_ptr(), mask(to.len()), _mm512_castsi512_ps(pairs));
            }
        }

        /// Per lane: `sum + a.low · b.low + a.high · b.high` of bf16 pairs, in f32.
        #[inline(always)]
        pub(crate) fn dot_pairs(self, sum: __m512, a: __m512, b: __m512) -> __m512 {
            // SAFETY: `self` exists, so the instructions are there; the casts only reinterpret 512 bits.
            unsafe {
                _mm512_dpbf16_ps(
                    sum,
                    std::mem::transmute::<__m512, __m512bh>(a),
                    std::mem::transmute::<__m512, __m512bh>(b),
                )
            }
        }
    }

    impl Simd for Avx2 {
        type Vector = __m256;
        const LANES: usize = 8;

        #[inline(always)]
        fn enter<O: Operation>(self, operation: O) -> O::Output {
            #[target_feature(enable = "avx2,fma,f16c")]
            fn run<O: Operation>(simd: Avx2, operation: O) -> O::Output {
                operation.run(simd)
            }
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { run(self, operation) }
        }
        #[inline(always)]
        fn splat(self, value: f32) -> __m256 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm256_set1_ps(value) }
        }
        #[inline(always)]
        fn load(self, from: &[f32]) -> __m256 {
            // SAFETY: `self` exists, so the instructions are there; the slicing checked the length.
            unsafe { _mm256_loadu_ps(from[..8].as_ptr()) }
        }
        #[inline(always)]
        fn store(self, vector: __m256, to: &mut [f32]) {
            // SAFETY: as in `load`.
            unsafe { _mm256_storeu_ps(to[..8].as_mut_ptr(), vector) }
        }
        #[inline(always)]
        fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn load_f16(self, from: &[u16]) -> __m256 {
            // SAFETY: `self` exists, so the instructions are there; the slicing checked the length.
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from[..8].as_ptr().cast())) }
        }
        #[inline(always)]
        fn load_bf16(self, from: &[u16]) -> __m256 {
            // SAFETY: `self` exists, so the instructions are there; the slicing checked the length.
            unsafe {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from[..8].as_ptr().cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        fn load_i8(self, from: &[i8]) -> __m256 {
            // SAFETY: `self` exists, so the instructions are there; the slicing checked the length.
            unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from[..8].as_ptr().cast()))) }
        }
        #[inline(always)]
        fn add(self, a: __m256, b: __m256) -> __m256 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        fn sub(self, a: __m256, b: __m256) -> __m256 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm256_sub_ps(a, b) }
        }
        #[inline(always)]
        fn mul(self, a: __m256, b: __m256) -> __m256 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm256_mul_ps(a, b) }
        }
        #[inline(always)]
        fn div(self, a: __m256, b: __m256) -> __m256 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm256_div_ps(a, b) }
        }
        #[inline(always)]
        fn max(self, a: __m256, b: __m256) -> __m256 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm256_max_ps(a, b) }
        }
        #[inline(always)]
        fn min(self, a: __m256, b: __m256) -> __m256 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm256_min_ps(a, b) }
        }
        #[inline(always)]
        fn round(self, a: __m256) -> __m256 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
        }
        #[inline(always)]
        fn scale(self, a: __m256, n: __m256) -> __m256 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe {
                // In two steps, since 2ⁿ itself may be outside of the range.
                let bias = _mm256_set1_epi32(127);
                let whole = _mm256_cvtps_epi32(n);
                let half = _mm256_srai_epi32::<1>(whole);
                let low = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
                let high = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias));
                _mm256_mul_ps(_mm256_mul_ps(a, _mm256_castsi256_ps(low)), _mm256_castsi256_ps(high))
            }
        }
        #[inline(always)]
        fn abs(self, a: __m256) -> __m256 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), a) }
        }
        #[inline(always)]
        fn copy_sign(self, a: __m256, b: __m256) -> __m256 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe {
                let sign = _mm256_set1_ps(-0.0);
                _mm256_or_ps(_mm256_andnot_ps(sign, a), _mm256_and_ps(sign, b))
            }
        }
        #[inline(always)]
        fn if_less(self, a: __m256, b: __m256, yes: __m256, no: __m256) -> __m256 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)) }
        }
        #[inline(always)]
        fn transpose(self, block: &[[f32; 8]; 4], to: &mut [f32], stride: usize) {
            let to = &mut to[..7 * stride + 4];
            // SAFETY: `self` exists, so the instructions are there; the slicing checked the last and furthest store.
            unsafe {
                let rows: [__m256; 4] = [
                    _mm256_loadu_ps(block[0].as_ptr()),
                    _mm256_loadu_ps(block[1].as_ptr()),
                    _mm256_loadu_ps(block[2].as_ptr()),
                    _mm256_loadu_ps(block[3].as_ptr()),
                ];
                let (low01, high01) = (_mm256_unpacklo_ps(rows[0], rows[1]), _mm256_unpackhi_ps(rows[0], rows[1]));
                let (low23, high23) = (_mm256_unpacklo_ps(rows[2], rows[3]), _mm256_unpackhi_ps(rows[2], rows[3]));
                // Column i in the lower half, column i + 4 in the upper one.
                let columns = [
                    _mm256_shuffle_ps::<0x44>(low01, low23),
                    _mm256_shuffle_ps::<0xee>(low01, low23),
                    _mm256_shuffle_ps::<0x44>(high01, high23),
                    _mm256_shuffle_ps::<0xee>(high01, high23),
                ];
                let to = to.as_mut_ptr();
                for (i, column) in columns.into_iter().enumerate() {
                    _mm_storeu_ps(to.add(i * stride), _mm256_castps256_ps128(column));
                    _mm_storeu_ps(to.add((i + 4) * stride), _mm256_extractf128_ps::<1>(column));
                }
            }
        }
        #[inline(always)]
        fn sum(self, a: __m256) -> f32 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe {
                let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
                let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
                _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
            }
        }
        #[inline(always)]
        fn largest(self, a: __m256) -> f32 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe {
                let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
                let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
                _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
            }
        }
    }

    impl Simd for Avx512 {
        type Vector = __m512;
        const LANES: usize = 16;

        #[inline(always)]
        fn enter<O: Operation>(self, operation: O) -> O::Output {
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
            fn run<O: Operation>(simd: Avx512, operation: O) -> O::Output {
                operation.run(simd)
            }
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { run(self, operation) }
        }
        #[inline(always)]
        fn splat(self, value: f32) -> __m512 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm512_set1_ps(value) }
        }
        #[inline(always)]
        fn load(self, from: &[f32]) -> __m512 {
            // SAFETY: `self` exists, so the instructions are there; the slicing checked the length.
            unsafe { _mm512_loadu_ps(from[..16].as_ptr()) }
        }
        #[inline(always)]
        fn store(self, vector: __m512, to: &mut [f32]) {
            // SAFETY: as in `load`.
            unsafe { _mm512_storeu_ps(to[..16].as_mut_ptr(), vector) }
        }
        #[inline(always)]
        fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn load_f16(self, from: &[u16]) -> __m512 {
            // SAFETY: `self` exists, so the instructions are there; the slicing checked the length.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from[..16].as_ptr().cast())) }
        }
        #[inline(always)]
        fn load_bf16(self, from: &[u16]) -> __m512 {
            // SAFETY: `self` exists, so the instructions are there; the slicing checked the length.
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from[..16].as_ptr().cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        fn load_i8(self, from: &[i8]) -> __m512 {
            // SAFETY: `self` exists, so the instructions are there; the slicing checked the length.
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from[..16].as_ptr().cast()))) }
        }
        #[inline(always)]
        fn add(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        fn sub(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        fn mul(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        fn div(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm512_div_ps(a, b) }
        }
        #[inline(always)]
        fn max(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        fn min(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm512_min_ps(a, b) }
        }
        #[inline(always)]
        fn round(self, a: __m512) -> __m512 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
        }
        #[inline(always)]
        fn scale(self, a: __m512, n: __m512) -> __m512 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm512_scalef_ps(a, n) }
        }
        #[inline(always)]
        fn abs(self, a: __m512) -> __m512 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm512_abs_ps(a) }
        }
        #[inline(always)]
        fn copy_sign(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe {
                let sign = _mm512_set1_ps(-0.0);
                _mm512_or_ps(_mm512_andnot_ps(sign, a), _mm512_and_ps(sign, b))
            }
        }
        #[inline(always)]
        fn if_less(self, a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), no, yes) }
        }
        #[inline(always)]
        fn transpose(self, block: &[[f32; 8]; 4], to: &mut [f32], stride: usize) {
            Avx2(()).transpose(block, to, stride);
        }
        #[inline(always)]
        fn sum(self, a: __m512) -> f32 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm512_reduce_add_ps(a) }
        }
        #[inline(always)]
        fn largest(self, a: __m512) -> f32 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm512_reduce_max_ps(a) }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512, Avx512Bf16};

/// The instruction set that kernels are run with.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Level {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

impl Level {
    /// Its name, as `CANDOR_CPU` takes it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Level::Portable(_) => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(_) => "avx512",
        }
    }

    /// The level of this name, if the processor has it: `portable`, `avx2` or `avx512`.
    pub(crate) fn named(name: &str) -> Option<Self> {
        match name {
            "portable" => Some(Level::Portable(Portable)),
            #[cfg(target_arch = "x86_64")]
            "avx2" => Avx2::new().map(Level::Avx2),
            #[cfg(target_arch = "x86_64")]
            "avx512" => Avx512::new().map(Level::Avx512),
            _ => None,
        }
    }

    /// The best level of this processor, or the one that the environment variable `CANDOR_CPU` names. Asked once.
    pub(crate) fn chosen() -> Self {
        static CHOSEN: OnceLock<Level> = OnceLock::new();
        *CHOSEN.get_or_init(|| {
            if let Ok(name) = std::env::var("CANDOR_CPU") {
                match Level::named(&name) {
                    Some(level) => return level,
                    None => log::warn!("CANDOR_CPU={name}: not a level of this processor (portable, avx2, avx512)"),
                }
            }
            let best = ["avx512", "avx2"].into_iter().find_map(Level::named);
            if best.is_none() && cfg!(not(target_arch = "aarch64")) {
                log::warn!("this processor has no AVX2: the slow portable kernels are used");
            }
            best.unwrap_or(Level::Portable(Portable))
        })
    }

    #[inline]
    pub(crate) fn run<O: Operation>(self, operation: O) -> O::Output {
        match self {
            Level::Portable(simd) => simd.enter(operation),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(simd) => simd.enter(operation),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(simd) => simd.enter(operation),
        }
    }
}
