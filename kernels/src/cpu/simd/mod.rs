//! The instruction sets: one small vector trait that every kernel is written over once.
//!
//! A value of a set's type ([`x86::Avx2`] and the like) exists only after the processor was asked, so the type is the
//! proof that its instructions are there. [`Level::run`] compiles an [`Operation`] once per instruction set.

pub(crate) mod integer;
mod level;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
mod neon_integer;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;
#[cfg(target_arch = "x86_64")]
mod x86_integer;

pub(crate) use level::{LEVEL_VARIABLE, Level};
pub(crate) use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::Avx512Bf16;

/// How far ahead weights are fetched: what a core reads in the time that the memory takes to answer, and some more.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 8192;

/// Has the memory fetch the line `AHEAD` bytes behind the start of `from`, if there is anything, for one use: weights that
/// are read once a token only push others out of the caches. On x86-64 alone, where it was measured to help.
#[inline(always)]
pub(crate) fn fetch_ahead<T>(from: &[T]) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction, and it takes any address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_NTA, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_NTA>(from.as_ptr().cast::<i8>().wrapping_add(AHEAD));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = from;
}

/// Work that can be compiled for every instruction set.
pub(crate) trait Operation {
    type Output;
    /// Must be `#[inline(always)]`, as everything hot that it calls, to be compiled with the set's features.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Vectors of f32 of one instruction set.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    type Vector: Copy;
    /// What the set is called in print.
    const NAME: &'static str;
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
    /// `sums[r][v] += a[r] · b[v]`
    #[inline(always)]
    fn add_products<const R: usize, const V: usize>(
        self,
        sums: &mut [[Self::Vector; V]; R],
        a: &[f32; R],
        b: [Self::Vector; V],
    ) {
        for r in 0..R {
            let a = self.splat(a[r]);
            for v in 0..V {
                sums[r][v] = self.mul_add(a, b[v], sums[r][v]);
            }
        }
    }
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
    /// The sum of each vector's lanes.
    #[inline(always)]
    fn sums<const N: usize>(self, vectors: [Self::Vector; N]) -> [f32; N] {
        let mut sums = [0.0; N];
        for (sum, vector) in sums.iter_mut().zip(vectors) {
            *sum = self.sum(vector);
        }
        sums
    }
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
