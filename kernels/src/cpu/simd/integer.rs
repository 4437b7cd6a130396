//! Products of bytes: the part of an instruction set that quantised kernels are written over.
//!
//! Weights are codes: a 4-bit value plus 8 (as it is stored), an 8-bit value plus [`Integer::OFFSET8`]. What the offsets
//! add to a sum is taken off again before it starts, from the sums of the activations.
#![allow(clippy::needless_range_loop)] // several register tiles run by one index

use super::portable::f16_to_f32;
use super::{Portable, Simd};

/// What is added to a 4-bit value: codes are multiplied as they are stored.
pub(crate) const OFFSET4: i32 = 8;

/// Work that can be compiled for every instruction set that multiplies bytes.
pub(crate) trait IntegerOperation {
    type Output;
    /// Must be `#[inline(always)]`, as everything hot that it calls, to be compiled with the set's features.
    fn run<I: Integer>(self, integer: I) -> Self::Output;
}

/// Work over tiles of `R` rows by two vectors of sums.
pub(crate) trait Tiles {
    /// As [`IntegerOperation::run`].
    fn run<I: Integer, const R: usize>(self, integer: I);
}

/// Vectors of bytes of one instruction set: four of them for each f32 of a vector of [`Integer::Float`].
pub(crate) trait Integer: Copy + Send + Sync + 'static {
    /// The set's f32.
    type Float: Simd;
    /// What its byte products are called in print.
    const NAME: &'static str;
    type Bytes: Copy;
    /// i32, one for each four bytes.
    type Sums: Copy;
    /// What is added to an 8-bit value, for sets that multiply unsigned by signed bytes only.
    const OFFSET8: i32;

    /// Runs code with the instruction set switched on.
    fn enter<O: IntegerOperation>(self, operation: O) -> O::Output;
    fn float(self) -> Self::Float;
    /// `4 · LANES` bytes as they are.
    fn bytes(self, from: &[u8]) -> Self::Bytes;
    /// The first four bytes, in every lane.
    fn splat_bytes(self, from: &[i8]) -> Self::Bytes;
    /// Codes of `4 · LANES` signed bytes.
    fn codes8(self, from: &[u8]) -> Self::Bytes;
    /// The lower and the upper halves of `4 · LANES` bytes.
    fn nibbles(self, from: &[u8]) -> [Self::Bytes; 2];
    /// The first lanes.
    fn load_sums(self, from: &[i32]) -> Self::Sums;
    fn splat_sum(self, value: i32) -> Self::Sums;
    /// Per lane, `sum + Σ code · activation` of its four bytes; codes below 16, activations within ±127.
    fn dot4(self, sum: Self::Sums, codes: Self::Bytes, activations: Self::Bytes) -> Self::Sums;
    /// As `dot4`, with codes of 8-bit values.
    fn dot8(self, sum: Self::Sums, codes: Self::Bytes, activations: Self::Bytes) -> Self::Sums;
    /// Bytes of an output that lie together in a panel of the blocked product, 4 or 8.
    const TOGETHER: usize = 4;
    /// Runs work with tiles of as many rows as there are registers for.
    #[inline(always)]
    fn tiles<T: Tiles>(self, work: T) {
        work.run::<Self, 4>(self);
    }
    /// `starts[r] + Σ codes · x[r]` for `R` rows of `D` activations and for `V` vectors of outputs, whose codes of `BITS`
    /// bits lie in a panel `[D / TOGETHER, outputs, TOGETHER]`.
    #[inline(always)]
    fn tile<const BITS: usize, const D: usize, const R: usize, const V: usize>(
        self,
        starts: [i32; R],
        panel: &[u8],
        x: [&[i8; D]; R],
    ) -> [[Self::Sums; V]; R] {
        let vector = 4 * lanes::<Self>();
        let mut sums = [[self.splat_sum(0); V]; R];
        for r in 0..R {
            sums[r] = [self.splat_sum(starts[r]); V];
        }
        // The bound makes it plain that u stays within x.
        for (u, panel) in panel.chunks_exact(V * vector).enumerate().take(D / 4) {
            let mut codes = [self.splat_bytes(&[0; 4]); V];
            for v in 0..V {
                codes[v] = self.bytes(&panel[v * vector..]);
            }
            for r in 0..R {
                let x = self.splat_bytes(&x[r][4 * u..4 * u + 4]);
                for v in 0..V {
                    sums[r][v] =
                        if BITS == 4 { self.dot4(sums[r][v], codes[v], x) } else { self.dot8(sums[r][v], codes[v], x) };
                }
            }
        }
        sums
    }
    fn to_float(self, sums: Self::Sums) -> <Self::Float as Simd>::Vector;
    /// Lane `i` is `from[i / each]`.
    fn spread(self, from: &[f32], each: usize) -> <Self::Float as Simd>::Vector;
    /// As `spread`, of IEEE halves.
    #[inline(always)]
    fn spread_halves(self, from: &[u16], each: usize) -> <Self::Float as Simd>::Vector {
        let mut wide = [0.0; 4];
        let count = lanes::<Self>().div_ceil(each);
        for (wide, half) in wide.iter_mut().zip(&from[..count]) {
            *wide = f16_to_f32(*half);
        }
        self.spread(&wide, each)
    }
}

/// f32 of a vector of the set.
pub(crate) const fn lanes<I: Integer>() -> usize {
    <I::Float as Simd>::LANES
}

const LANES: usize = Portable::LANES;

impl Integer for Portable {
    type Float = Portable;
    const NAME: &'static str = "plain Rust";
    type Bytes = [i8; 4 * LANES];
    type Sums = [i32; LANES];
    const OFFSET8: i32 = 0;

    #[inline(always)]
    fn enter<O: IntegerOperation>(self, operation: O) -> O::Output {
        operation.run(self)
    }
    #[inline(always)]
    fn float(self) -> Portable {
        self
    }
    #[inline(always)]
    fn bytes(self, from: &[u8]) -> Self::Bytes {
        let from = &from[..4 * LANES];
        std::array::from_fn(|i| from[i] as i8)
    }
    #[inline(always)]
    fn splat_bytes(self, from: &[i8]) -> Self::Bytes {
        let from = &from[..4];
        std::array::from_fn(|i| from[i % 4])
    }
    #[inline(always)]
    fn codes8(self, from: &[u8]) -> Self::Bytes {
        self.bytes(from)
    }
    #[inline(always)]
    fn nibbles(self, from: &[u8]) -> [Self::Bytes; 2] {
        let from = &from[..4 * LANES];
        [std::array::from_fn(|i| (from[i] & 15) as i8), std::array::from_fn(|i| (from[i] >> 4) as i8)]
    }
    #[inline(always)]
    fn load_sums(self, from: &[i32]) -> Self::Sums {
        let from = &from[..LANES];
        std::array::from_fn(|i| from[i])
    }
    #[inline(always)]
    fn splat_sum(self, value: i32) -> Self::Sums {
        [value; LANES]
    }
    #[inline(always)]
    fn dot4(self, sum: Self::Sums, codes: Self::Bytes, activations: Self::Bytes) -> Self::Sums {
        self.dot8(sum, codes, activations)
    }
    #[inline(always)]
    fn dot8(self, sum: Self::Sums, codes: Self::Bytes, activations: Self::Bytes) -> Self::Sums {
        std::array::from_fn(|lane| {
            let product = |i: usize| i32::from(codes[4 * lane + i]) * i32::from(activations[4 * lane + i]);
            sum[lane] + product(0) + product(1) + product(2) + product(3)
        })
    }
    #[inline(always)]
    fn to_float(self, sums: Self::Sums) -> [f32; LANES] {
        std::array::from_fn(|i| sums[i] as f32)
    }
    #[inline(always)]
    fn spread(self, from: &[f32], each: usize) -> [f32; LANES] {
        let from = &from[..LANES.div_ceil(each)];
        std::array::from_fn(|i| from[i / each])
    }
}
