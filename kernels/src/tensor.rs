//! Weights as they lie in a file: bytes that somebody keeps alive, an element type and a shape.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::scales::{ScaleError, Scales};

/// Element type of a stored weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    BF16,
    /// Signed bytes with [`Scales`].
    I8,
    /// Four-bit values -8 ..= 7 with [`Scales`], as compressed-tensors packs them: eight a little-endian 32-bit word,
    /// the first in the lowest bits, each stored as value + 8. Rows begin at words.
    I4,
}

impl DType {
    /// Bytes that a row of `elements` takes.
    pub fn row_bytes(self, elements: usize) -> Option<usize> {
        match self {
            DType::F32 => elements.checked_mul(4),
            DType::F16 | DType::BF16 => elements.checked_mul(2),
            DType::I8 => Some(elements),
            DType::I4 => elements.div_ceil(8).checked_mul(4),
        }
    }

    /// What the address of the first byte must be a multiple of.
    pub fn alignment(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::I8 | DType::I4 => 1,
        }
    }

    /// Whether values are integers that are multiplied by [`Scales`].
    pub fn is_scaled(self) -> bool {
        matches!(self, DType::I8 | DType::I4)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::I8 => "I8",
            DType::I4 => "I4",
        })
    }
}

/// Somebody who keeps bytes where they are (a file mapping, a vector).
pub trait Keeper: AsRef<[u8]> + Send + Sync {
    /// Whether the bytes are a mapped file: they begin at a page, and nothing else lies in their pages.
    fn is_mapping(&self) -> bool {
        false
    }

    /// Nobody reads `range` of the bytes for now: pages that would be read from a file again may go.
    fn let_go(&self, range: Range<usize>) {
        let _ = range;
    }
}

impl Keeper for Vec<u8> {}

/// Bytes that stay where they are for as long as this is held.
pub type Bytes = Arc<dyn Keeper>;

/// A stored weight: a view of somebody's bytes, never a copy. Row-major, little-endian.
#[derive(Clone)]
pub struct HostTensor {
    bytes: Bytes,
    start: usize,
    len: usize,
    dtype: DType,
    shape: Vec<usize>,
    scales: Option<Scales>,
}

/// Why bytes cannot be a tensor.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TensorError {
    /// The shape's element count or byte size does not fit in memory addresses.
    #[error("shape {0:?} is too large to address")]
    Overflow(Vec<usize>),
    /// The range leaves the bytes, or is not as long as the shape needs.
    #[error("shape {shape:?} of {dtype} needs {expected} bytes, the range has {actual}")]
    Size {
        /// The shape asked for.
        shape: Vec<usize>,
        /// The element type.
        dtype: DType,
        /// Bytes the shape needs.
        expected: usize,
        /// Bytes there are.
        actual: usize,
    },
    /// The first byte is not at a multiple of the element size.
    #[error("the data starts at an address that is no multiple of {dtype}'s {size} bytes", size = .dtype.alignment())]
    Misaligned {
        /// The element type.
        dtype: DType,
    },
    /// Integers without scales, or other values with them.
    #[error("{dtype} of shape {shape:?} {}", if .dtype.is_scaled() { "has no scales" } else { "has scales" })]
    Scaled {
        /// The shape.
        shape: Vec<usize>,
        /// The element type.
        dtype: DType,
    },
    /// Scales that are not those of the shape.
    #[error("shape {shape:?} of {dtype}: {source}")]
    Scales {
        /// The shape.
        shape: Vec<usize>,
        /// The element type.
        dtype: DType,
        /// What is wrong with them.
        source: ScaleError,
    },
}

impl HostTensor {
    /// A view of `bytes[start..start + len]` as `shape` elements of `dtype`.
    ///
    /// `scales` must be given for the integer types and for nothing else.
    pub fn new(
        bytes: Bytes,
        start: usize,
        len: usize,
        dtype: DType,
        shape: Vec<usize>,
        scales: Option<Scales>,
    ) -> Result<Self, TensorError> {
        let overflow = || TensorError::Overflow(shape.clone());
        let (rows, rest) = shape.split_first().map_or((1, &[][..]), |(&rows, rest)| (rows, rest));
        let row_len = rest.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or_else(overflow)?;
        rows.checked_mul(row_len).ok_or_else(overflow)?;
        let expected = dtype.row_bytes(row_len).and_then(|row| row.checked_mul(rows)).ok_or_else(overflow)?;
        let whole = (*bytes).as_ref();
        let actual = start.checked_add(len).and_then(|end| whole.get(start..end)).map_or(0, <[u8]>::len);
        if actual != len || len != expected {
            return Err(TensorError::Size { shape, dtype, expected, actual });
        }
        if !(whole.as_ptr() as usize + start).is_multiple_of(dtype.alignment()) {
            return Err(TensorError::Misaligned { dtype });
        }
        match &scales {
            given if given.is_some() != dtype.is_scaled() => return Err(TensorError::Scaled { shape, dtype }),
            Some(scales) => {
                if let Err(source) = scales.check(rows, row_len) {
                    return Err(TensorError::Scales { shape, dtype, source });
                }
            }
            None => {}
        }
        Ok(HostTensor { bytes, start, len, dtype, shape, scales })
    }

    /// A tensor that owns f32 values (tests, and weights derived from stored ones when loading).
    pub fn from_f32(values: &[f32], shape: &[usize]) -> Result<Self, TensorError> {
        let bytes = owned_f32(values.to_vec());
        Self::new(bytes, 0, values.len() * 4, DType::F32, shape.to_vec(), None)
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The shape, outermost dimension first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Rows: the first dimension (1 for a scalar).
    pub fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Elements a row: everything behind the first dimension.
    pub fn row_len(&self) -> usize {
        self.shape.get(1..).map_or(1, |rest| rest.iter().product())
    }

    /// A view of rows `first .. first + count`, where there are so many.
    pub fn rows_view(&self, first: usize, count: usize) -> Option<Self> {
        let row_bytes = self.dtype.row_bytes(self.row_len())?;
        first.checked_add(count).filter(|&end| end <= self.rows() && !self.shape.is_empty())?;
        let mut view = self.clone();
        (view.start, view.len) = (self.start + first * row_bytes, count * row_bytes);
        view.shape[0] = count;
        view.scales = self.scales.as_ref().map(|scales| scales.rows_view(first, count));
        Some(view)
    }

    /// The raw bytes, aligned for the element type.
    pub fn bytes(&self) -> &[u8] {
        &(*self.bytes).as_ref()[self.start..self.start + self.len]
    }

    /// Whose bytes these are, and where in them they lie.
    pub(crate) fn kept(&self) -> (&Bytes, Range<usize>) {
        (&self.bytes, self.start..self.start + self.len)
    }

    /// What the integers of [`DType::I8`] and [`DType::I4`] are multiplied by.
    pub fn scales(&self) -> Option<&Scales> {
        self.scales.as_ref()
    }

    /// Every element as f32 (a copy; for small tensors and tests).
    pub fn to_f32(&self) -> Vec<f32> {
        let b = self.bytes();
        match self.dtype {
            DType::F32 => b.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect(),
            DType::F16 => b.chunks_exact(2).map(|c| half::f16::from_le_bytes([c[0], c[1]]).to_f32()).collect(),
            DType::BF16 => b.chunks_exact(2).map(|c| half::bf16::from_le_bytes([c[0], c[1]]).to_f32()).collect(),
            DType::I8 | DType::I4 => {
                let mut values = vec![0.0; self.elements()];
                let depth = self.row_len();
                let row_bytes = self.dtype.row_bytes(depth).unwrap_or(0);
                for (row, out) in values.chunks_exact_mut(depth.max(1)).enumerate() {
                    let codes = &b[row * row_bytes..][..row_bytes];
                    for (i, out) in out.iter_mut().enumerate() {
                        let code = match self.dtype {
                            DType::I8 => f32::from(codes[i] as i8),
                            _ => f32::from(codes[i / 2] >> (4 * (i % 2)) & 15) - 8.0,
                        };
                        *out = code * self.scales.as_ref().map_or(1.0, |scales| scales.of(row, i));
                    }
                }
                values
            }
        }
    }
}

/// f32 values as the bytes of a tensor, aligned for them.
pub(crate) fn owned_f32(values: Vec<f32>) -> Bytes {
    struct Owned(Vec<f32>);
    impl AsRef<[u8]> for Owned {
        fn as_ref(&self) -> &[u8] {
            // SAFETY: any f32 is four initialised bytes; u8 has no alignment to keep.
            unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * 4) }
        }
    }
    impl Keeper for Owned {}
    Arc::new(Owned(values))
}

impl fmt::Debug for HostTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)
    }
}
