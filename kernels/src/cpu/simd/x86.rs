//! AVX2 and AVX-512.

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

    /// The set that it extends.
    pub(crate) fn base(self) -> Avx2 {
        Avx2(())
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
    const NAME: &'static str = "AVX2";
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
    fn sums<const N: usize>(self, vectors: [__m256; N]) -> [f32; N] {
        let mut sums = [0.0; N];
        let (sums_of_4, sums_of_1) = sums.as_chunks_mut::<4>();
        let (by_4, by_1) = vectors.as_chunks::<4>();
        for (sums, v) in sums_of_4.iter_mut().zip(by_4) {
            // SAFETY: `self` exists, so the instructions are there; four sums are 128 bits.
            unsafe {
                let both = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
                let four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps::<1>(both));
                _mm_storeu_ps(sums.as_mut_ptr(), four);
            }
        }
        for (sum, vector) in sums_of_1.iter_mut().zip(by_1) {
            *sum = self.sum(*vector);
        }
        sums
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
    const NAME: &'static str = "AVX-512";
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
    fn sums<const N: usize>(self, vectors: [__m512; N]) -> [f32; N] {
        let mut halves = [self.base().splat(0.0); N];
        for (half, vector) in halves.iter_mut().zip(vectors) {
            // SAFETY: `self` exists, so the instructions are there.
            *half = unsafe { _mm256_add_ps(_mm512_castps512_ps256(vector), _mm512_extractf32x8_ps::<1>(vector)) };
        }
        self.base().sums(halves)
    }
    #[inline(always)]
    fn largest(self, a: __m512) -> f32 {
        // SAFETY: `self` exists, so the instructions are there.
        unsafe { _mm512_reduce_max_ps(a) }
    }
}
