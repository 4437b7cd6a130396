//! Weights as they lie in the file, widened to f32 a vector at a time while they are used.

use crate::cpu::simd::{Level, MAX_LANES, Operation, Simd};
use crate::scales::Scales;
use crate::tensor::{DType, HostTensor};
use std::borrow::Cow;

/// An element type of stored weights.
///
/// # Safety
/// Every bit pattern is a value.
pub(crate) unsafe trait Stored: Copy + Default + Send + Sync + 'static {
    /// The first [`Simd::LANES`] elements as f32.
    fn load<S: Simd>(simd: S, from: &[Self]) -> S::Vector;

    /// Fewer elements than a vector has, zeros behind.
    #[inline(always)]
    fn load_part<S: Simd>(simd: S, from: &[Self]) -> S::Vector {
        let mut padded = [Self::default(); MAX_LANES];
        padded[..from.len()].copy_from_slice(from);
        Self::load(simd, &padded)
    }
}

// SAFETY: every bit pattern is an f32.
unsafe impl Stored for f32 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[f32]) -> S::Vector {
        simd.load(from)
    }
}

/// The bits of an IEEE half.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub(crate) struct F16(u16);

impl F16 {
    /// The bits of several.
    #[inline(always)]
    pub(crate) fn bits(halves: &[F16]) -> &[u16] {
        // SAFETY: `F16` is transparent over u16.
        unsafe { std::slice::from_raw_parts(halves.as_ptr().cast(), halves.len()) }
    }
}

// SAFETY: every bit pattern is a u16.
unsafe impl Stored for F16 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[F16]) -> S::Vector {
        simd.load_f16(F16::bits(from))
    }
}

/// The upper half of an f32's bits.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub(crate) struct Bf16(u16);

// SAFETY: every bit pattern is a u16.
unsafe impl Stored for Bf16 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[Bf16]) -> S::Vector {
        // SAFETY: `Bf16` is transparent over u16.
        simd.load_bf16(unsafe { std::slice::from_raw_parts(from.as_ptr().cast(), from.len()) })
    }
}

// SAFETY: every bit pattern is an i8.
unsafe impl Stored for i8 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[i8]) -> S::Vector {
        simd.load_i8(from)
    }
}

/// The elements of a weight, typed.
#[derive(Clone, Copy)]
pub(crate) enum Values<'a> {
    F32(&'a [f32]),
    F16(&'a [F16]),
    Bf16(&'a [Bf16]),
    /// Bytes, and one scale a row.
    I8(&'a [i8], &'a [f32]),
    /// Four-bit values, or bytes with a scale a group.
    Codes(&'a HostTensor),
}

/// The elements of `tensor`, not copied.
pub(crate) fn values(tensor: &HostTensor) -> Values<'_> {
    let bytes = tensor.bytes();
    match tensor.dtype() {
        DType::F32 => Values::F32(cast(bytes)),
        DType::F16 => Values::F16(cast(bytes)),
        DType::BF16 => Values::Bf16(cast(bytes)),
        DType::I8 => match tensor.scales().and_then(Scales::of_rows) {
            Some(scales) => Values::I8(cast(bytes), scales),
            None => Values::Codes(tensor),
        },
        DType::I4 => Values::Codes(tensor),
    }
}

/// Bytes that [`HostTensor`] found aligned, as elements.
pub(crate) fn cast<T: Stored>(bytes: &[u8]) -> &[T] {
    // SAFETY: every bit pattern is a value of a stored type.
    let (before, elements, after) = unsafe { bytes.align_to::<T>() };
    debug_assert!(before.is_empty() && after.is_empty());
    elements
}

/// A small weight (a bias, a norm's factors) as f32; copied only when it is stored otherwise.
pub(crate) fn small(tensor: &HostTensor) -> Cow<'_, [f32]> {
    match values(tensor) {
        Values::F32(elements) => Cow::Borrowed(elements),
        _ => Cow::Owned(tensor.to_f32()),
    }
}

/// Elements `from ..` of row `row` of a table of rows of `width` elements, as f32; as many as `to` holds.
pub(crate) fn widen_row(level: Level, table: Values<'_>, row: usize, width: usize, from: usize, to: &mut [f32]) {
    let range = row * width + from..row * width + from + to.len();
    match table {
        Values::F32(elements) => to.copy_from_slice(&elements[range]),
        Values::F16(elements) => widen(level, &elements[range], None, to),
        Values::Bf16(elements) => widen(level, &elements[range], None, to),
        Values::I8(elements, scales) => widen(level, &elements[range], Some(scales[row]), to),
        Values::Codes(tensor) => {
            let Some((codes, scales)) = tensor.dtype().row_bytes(width).zip(tensor.scales()) else { return };
            let codes = &tensor.bytes()[row * codes..][..codes];
            for (to, i) in to.iter_mut().zip(from..) {
                let code = match tensor.dtype() {
                    DType::I4 => f32::from(codes[i / 2] >> (4 * (i % 2)) & 15) - 8.0,
                    _ => f32::from(codes[i] as i8),
                };
                *to = code * scales.of(row, i);
            }
        }
    }
}

/// Scales `first ..` of all scales of a weight as f32; as many as `to` holds.
pub(crate) fn widen_scales(level: Level, bytes: &[u8], dtype: DType, first: usize, to: &mut [f32]) {
    let range = first..first + to.len();
    match dtype {
        DType::F16 => widen(level, &cast::<F16>(bytes)[range], None, to),
        DType::BF16 => widen(level, &cast::<Bf16>(bytes)[range], None, to),
        _ => to.copy_from_slice(&cast::<f32>(bytes)[range]),
    }
}

/// `to = from · scale` in f32, of equal lengths.
fn widen<T: Stored>(level: Level, from: &[T], scale: Option<f32>, to: &mut [f32]) {
    struct Widen<'a, T> {
        from: &'a [T],
        scale: f32,
        to: &'a mut [f32],
    }
    impl<T: Stored> Operation for Widen<'_, T> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            let scale = simd.splat(self.scale);
            let from = self.from.chunks_exact(S::LANES);
            let rest = from.remainder();
            let mut to = self.to.chunks_exact_mut(S::LANES);
            for (from, to) in from.zip(&mut to) {
                simd.store(simd.mul(T::load(simd, from), scale), to);
            }
            let to = to.into_remainder();
            if !to.is_empty() {
                simd.store_part(simd.mul(T::load_part(simd, rest), scale), to);
            }
        }
    }
    level.run(Widen { from, scale: scale.unwrap_or(1.0), to });
}
