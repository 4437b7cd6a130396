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
}

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
