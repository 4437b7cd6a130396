//! Weights as they lie in a file: bytes that somebody keeps alive, an element type and a shape.

use std::fmt;
use std::sync::Arc;

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
    /// Signed bytes, one f32 scale a row (see [`HostTensor::scales`]).
    I8,
}

impl DType {
    /// Bytes an element takes.
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::I8 => 1,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::I8 => "I8",
        })
    }
}

/// Bytes that stay where they are for as long as this is held (a file mapping, a vector).
pub type Bytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A stored weight: a view of somebody's bytes, never a copy. Row-major, little-endian.
#[derive(Clone)]
pub struct HostTensor {
    bytes: Bytes,
    start: usize,
    len: usize,
    dtype: DType,
    shape: Vec<usize>,
    scales: Option<Arc<[f32]>>,
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
    #[error("the data starts at an address that is no multiple of {dtype}'s {size} bytes", size = .dtype.size())]
    Misaligned {
        /// The element type.
        dtype: DType,
    },
    /// Row scales are missing, superfluous, or not one a row.
    #[error("{dtype} of shape {shape:?} with {scales} row scales")]
    Scales {
        /// The shape.
        shape: Vec<usize>,
        /// The element type.
        dtype: DType,
        /// Scales given.
        scales: usize,
    },
}

impl HostTensor {
    /// A view of `bytes[start..start + len]` as `shape` elements of `dtype`.
    ///
    /// `scales` (one a row, row = first dimension) must be given for [`DType::I8`] and for nothing else.
    pub fn new(
        bytes: Bytes,
        start: usize,
        len: usize,
        dtype: DType,
        shape: Vec<usize>,
        scales: Option<Arc<[f32]>>,
    ) -> Result<Self, TensorError> {
        let expected = shape
            .iter()
            .try_fold(dtype.size(), |n, &d| n.checked_mul(d))
            .ok_or_else(|| TensorError::Overflow(shape.clone()))?;
        let whole = (*bytes).as_ref();
        let actual = start.checked_add(len).and_then(|end| whole.get(start..end)).map_or(0, <[u8]>::len);
        if actual != len || len != expected {
            return Err(TensorError::Size { shape, dtype, expected, actual });
        }
        if !(whole.as_ptr() as usize + start).is_multiple_of(dtype.size()) {
            return Err(TensorError::Misaligned { dtype });
        }
        let rows = shape.first().copied().unwrap_or(1);
        let given = scales.as_ref().map(|s| s.len());
        if given != (dtype == DType::I8).then_some(rows) {
            return Err(TensorError::Scales { shape, dtype, scales: given.unwrap_or(0) });
        }
        Ok(HostTensor { bytes, start, len, dtype, shape, scales })
    }

    /// A tensor that owns f32 values (tests, and weights derived from stored ones when loading).
    pub fn from_f32(values: &[f32], shape: &[usize]) -> Result<Self, TensorError> {
        // Stored as f32 so that the allocation is aligned for them.
        struct Owned(Vec<f32>);
        impl AsRef<[u8]> for Owned {
            fn as_ref(&self) -> &[u8] {
                // SAFETY: any f32 is four initialised bytes; u8 has no alignment to keep.
                unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * 4) }
            }
        }
        Self::new(Arc::new(Owned(values.to_vec())), 0, values.len() * 4, DType::F32, shape.to_vec(), None)
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
        self.len / self.dtype.size()
    }

    /// Rows: the first dimension (1 for a scalar).
    pub fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Elements a row: everything behind the first dimension.
    pub fn row_len(&self) -> usize {
        self.shape.get(1..).map_or(1, |rest| rest.iter().product())
    }

    /// The raw bytes, aligned for the element type.
    pub fn bytes(&self) -> &[u8] {
        &(*self.bytes).as_ref()[self.start..self.start + self.len]
    }

    /// One scale a row, for [`DType::I8`]: value = scale × byte.
    pub fn scales(&self) -> Option<&[f32]> {
        self.scales.as_deref()
    }

    /// Every element as f32 (a copy; for small tensors and tests).
    pub fn to_f32(&self) -> Vec<f32> {
        let b = self.bytes();
        match self.dtype {
            DType::F32 => b.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect(),
            DType::F16 => b.chunks_exact(2).map(|c| half::f16::from_le_bytes([c[0], c[1]]).to_f32()).collect(),
            DType::BF16 => b.chunks_exact(2).map(|c| half::bf16::from_le_bytes([c[0], c[1]]).to_f32()).collect(),
            DType::I8 => {
                let scales = self.scales.as_deref().unwrap_or(&[]);
                b.chunks_exact(self.row_len().max(1))
                    .zip(scales)
                    .flat_map(|(row, s)| row.iter().map(move |&v| f32::from(v as i8) * s))
                    .collect()
            }
        }
    }
}

impl fmt::Debug for HostTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)
    }
}
