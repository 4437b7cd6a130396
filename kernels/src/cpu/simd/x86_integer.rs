//! Byte products of AVX2, AVX-VNNI and AVX-512 VNNI.

use super::integer::{Integer, IntegerOperation, Tiles};
use super::x86::{Avx2, Avx512};
use std::arch::x86_64::*;

/// [`Avx2`] and the byte products of AVX-VNNI.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AvxVnni(Avx2);

impl AvxVnni {
    pub(crate) fn new() -> Option<Self> {
        Avx2::new().filter(|_| is_x86_feature_detected!("avxvnni")).map(AvxVnni)
    }

    /// The set that it extends.
    pub(crate) fn base(self) -> Avx2 {
        self.0
    }
}

/// [`Avx512`] and its byte products.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512Vnni(Avx512);

impl Avx512Vnni {
    pub(crate) fn new() -> Option<Self> {
        Avx512::new().filter(|_| is_x86_feature_detected!("avx512vnni")).map(Avx512Vnni)
    }

    /// The set that it extends.
    pub(crate) fn base(self) -> Avx512 {
        self.0
    }
}

/// What AVX2 and AVX-VNNI share.
macro_rules! bytes_of_256_bits {
    () => {
        type Float = Avx2;
        type Bytes = __m256i;
        type Sums = __m256i;

        #[inline(always)]
        fn bytes(self, from: &[u8]) -> __m256i {
            // SAFETY: `self` exists, so the instructions are there; the slicing checked the length.
            unsafe { _mm256_loadu_si256(from[..32].as_ptr().cast()) }
        }
        #[inline(always)]
        fn splat_bytes(self, from: &[i8]) -> __m256i {
            let from = &from[..4];
            // SAFETY: `self` exists, so the instructions are there.
            unsafe {
                _mm256_set1_epi32(i32::from_ne_bytes([from[0] as u8, from[1] as u8, from[2] as u8, from[3] as u8]))
            }
        }
        #[inline(always)]
        fn nibbles(self, from: &[u8]) -> [__m256i; 2] {
            let both = self.bytes(from);
            // SAFETY: `self` exists, so the instructions are there.
            unsafe {
                let low = _mm256_set1_epi8(15);
                [_mm256_and_si256(both, low), _mm256_and_si256(_mm256_srli_epi16::<4>(both), low)]
            }
        }
        #[inline(always)]
        fn load_sums(self, from: &[i32]) -> __m256i {
            // SAFETY: `self` exists, so the instructions are there; the slicing checked the length.
            unsafe { _mm256_loadu_si256(from[..8].as_ptr().cast()) }
        }
        #[inline(always)]
        fn splat_sum(self, value: i32) -> __m256i {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm256_set1_epi32(value) }
        }
        #[inline(always)]
        fn to_float(self, sums: __m256i) -> __m256 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe { _mm256_cvtepi32_ps(sums) }
        }
        #[inline(always)]
        fn spread(self, from: &[f32], each: usize) -> __m256 {
            // SAFETY: `self` exists, so the instructions are there.
            unsafe {
                if each >= 8 {
                    _mm256_set1_ps(from[0])
                } else {
                    let from = &from[..2];
                    _mm256_set_m128(_mm_set1_ps(from[1]), _mm_set1_ps(from[0]))
                }
            }
        }
    };
}

impl Integer for Avx2 {
    const NAME: &'static str = "AVX2";
    const OFFSET8: i32 = 0;
    bytes_of_256_bits!();

    #[inline(always)]
    fn enter<O: IntegerOperation>(self, operation: O) -> O::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn run<O: IntegerOperation>(set: Avx2, operation: O) -> O::Output {
            operation.run(set)
        }
        // SAFETY: `self` exists, so the instructions are there.
        unsafe { run(self, operation) }
    }
    #[inline(always)]
    fn float(self) -> Avx2 {
        self
    }
    #[inline(always)]
    fn codes8(self, from: &[u8]) -> __m256i {
        self.bytes(from)
    }
    #[inline(always)]
    fn dot4(self, sum: __m256i, codes: __m256i, activations: __m256i) -> __m256i {
        // SAFETY: `self` exists, so the instructions are there. 2 · 15 · 127 fits in 16 bits.
        unsafe {
            let pairs = _mm256_maddubs_epi16(codes, activations);
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
    #[inline(always)]
    fn dot8(self, sum: __m256i, codes: __m256i, activations: __m256i) -> __m256i {
        // The product of unsigned by signed bytes: the sign goes over to the activation. 2 · 128 · 127 fits in 16 bits.
        // SAFETY: `self` exists, so the instructions are there.
        unsafe {
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(activations, codes));
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
}

impl Integer for AvxVnni {
    const NAME: &'static str = "AVX-VNNI";
    const OFFSET8: i32 = 128;
    bytes_of_256_bits!();

    #[inline(always)]
    fn enter<O: IntegerOperation>(self, operation: O) -> O::Output {
        #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
        fn run<O: IntegerOperation>(set: AvxVnni, operation: O) -> O::Output {
            operation.run(set)
        }
        // SAFETY: `self` exists, so the instructions are there.
        unsafe { run(self, operation) }
    }
    #[inline(always)]
    fn float(self) -> Avx2 {
        self.0
    }
    #[inline(always)]
    fn codes8(self, from: &[u8]) -> __m256i {
        // SAFETY: `self` exists, so the instructions are there.
        unsafe { _mm256_xor_si256(self.bytes(from), _mm256_set1_epi8(-128)) }
    }
    #[inline(always)]
    fn dot4(self, sum: __m256i, codes: __m256i, activations: __m256i) -> __m256i {
        // SAFETY: `self` exists, so the instructions are there.
        unsafe { _mm256_dpbusd_avx_epi32(sum, codes, activations) }
    }
    #[inline(always)]
    fn dot8(self, sum: __m256i, codes: __m256i, activations: __m256i) -> __m256i {
        self.dot4(sum, codes, activations)
    }
}

impl Integer for Avx512Vnni {
    const NAME: &'static str = "AVX-512 VNNI";
    type Float = Avx512;
    type Bytes = __m512i;
    type Sums = __m512i;
    const OFFSET8: i32 = 128;

    #[inline(always)]
    fn tiles<T: Tiles>(self, work: T) {
        // 14 sums of integers and 14 of f32, two vectors of codes, one of activations.
        work.run::<Self, 7>(self);
    }

    #[inline(always)]
    fn enter<O: IntegerOperation>(self, operation: O) -> O::Output {
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        fn run<O: IntegerOperation>(set: Avx512Vnni, operation: O) -> O::Output {
            operation.run(set)
        }
        // SAFETY: `self` exists, so the instructions are there.
        unsafe { run(self, operation) }
    }
    #[inline(always)]
    fn float(self) -> Avx512 {
        self.0
    }
    #[inline(always)]
    fn bytes(self, from: &[u8]) -> __m512i {
        // SAFETY: `self` exists, so the instructions are there; the slicing checked the length.
        unsafe { _mm512_loadu_si512(from[..64].as_ptr().cast()) }
    }
    #[inline(always)]
    fn splat_bytes(self, from: &[i8]) -> __m512i {
        let from = &from[..4];
        // SAFETY: `self` exists, so the instructions are there.
        unsafe { _mm512_set1_epi32(i32::from_ne_bytes([from[0] as u8, from[1] as u8, from[2] as u8, from[3] as u8])) }
    }
    #[inline(always)]
    fn codes8(self, from: &[u8]) -> __m512i {
        // SAFETY: `self` exists, so the instructions are there.
        unsafe { _mm512_xor_si512(self.bytes(from), _mm512_set1_epi8(-128)) }
    }
    #[inline(always)]
    fn nibbles(self, from: &[u8]) -> [__m512i; 2] {
        let both = self.bytes(from);
        // SAFETY: `self` exists, so the instructions are there.
        unsafe {
            let low = _mm512_set1_epi8(15);
            [_mm512_and_si512(both, low), _mm512_and_si512(_mm512_srli_epi16::<4>(both), low)]
        }
    }
    #[inline(always)]
    fn load_sums(self, from: &[i32]) -> __m512i {
        // SAFETY: `self` exists, so the instructions are there; the slicing checked the length.
        unsafe { _mm512_loadu_si512(from[..16].as_ptr().cast()) }
    }
    #[inline(always)]
    fn splat_sum(self, value: i32) -> __m512i {
        // SAFETY: `self` exists, so the instructions are there.
        unsafe { _mm512_set1_epi32(value) }
    }
    #[inline(always)]
    fn dot4(self, sum: __m512i, codes: __m512i, activations: __m512i) -> __m512i {
        // SAFETY: `self` exists, so the instructions are there.
        unsafe { _mm512_dpbusd_epi32(sum, codes, activations) }
    }
    #[inline(always)]
    fn dot8(self, sum: __m512i, codes: __m512i, activations: __m512i) -> __m512i {
        self.dot4(sum, codes, activations)
    }
    #[inline(always)]
    fn to_float(self, sums: __m512i) -> __m512 {
        // SAFETY: `self` exists, so the instructions are there.
        unsafe { _mm512_cvtepi32_ps(sums) }
    }
    #[inline(always)]
    fn spread(self, from: &[f32], each: usize) -> __m512 {
        // SAFETY: `self` exists, so the instructions are there; the slicing checked the lengths.
        unsafe {
            match each {
                4 => {
                    let places = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
                    let four = _mm512_castps128_ps512(_mm_loadu_ps(from[..4].as_ptr()));
                    _mm512_permutexvar_ps(places, four)
                }
                8 => {
                    let from = &from[..2];
                    _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(from[0]), _mm512_set1_ps(from[1]))
                }
                _ => _mm512_set1_ps(from[0]),
            }
        }
    }
    #[inline(always)]
    fn spread_halves(self, from: &[u16], each: usize) -> __m512 {
        // SAFETY: `self` exists, so the instructions are there; the slicing checked the lengths.
        unsafe {
            match each {
                4 => {
                    let places = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
                    let four = _mm_cvtph_ps(_mm_loadl_epi64(from[..4].as_ptr().cast()));
                    _mm512_permutexvar_ps(places, _mm512_castps128_ps512(four))
                }
                8 => {
                    let places = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
                    let two = _mm_cvtph_ps(_mm_loadu_si32(from[..2].as_ptr().cast()));
                    _mm512_permutexvar_ps(places, _mm512_castps128_ps512(two))
                }
                _ => {
                    let one = _mm_cvtph_ps(_mm_loadu_si16(from[..1].as_ptr().cast()));
                    _mm512_broadcastss_ps(one)
                }
            }
        }
    }
}
