//! The scales of quantised weights: one a row, or one for each group of elements of a row.

use std::ops::Range;
use std::sync::Arc;

use crate::tensor::{Bytes, DType, owned_f32};

/// Group sizes that kernels read.
pub const GROUPS: [usize; 3] = [32, 64, 128];

/// What the integers of a weight are multiplied by.
#[derive(Clone)]
pub struct Scales {
    stored: Stored,
    rows: usize,
}

#[derive(Clone)]
enum Stored {
    Rows(Arc<[f32]>),
    /// `[rows, per_row]`
    Groups {
        bytes: Bytes,
        start: usize,
        dtype: DType,
        group: usize,
        per_row: usize,
    },
}

/// Why scales are not those of a weight.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ScaleError {
    /// A group size that kernels do not read.
    #[error("a scale for each {0} elements; 32, 64, 128 or a whole row are possible")]
    Group(usize),
    /// Another number of scales than the shape needs.
    #[error("{actual_rows} rows of {actual} scales; {rows} rows of {per_row} are needed")]
    Count {
        /// Rows of the weight.
        rows: usize,
        /// Scales a row needs.
        per_row: usize,
        /// Rows there are.
        actual_rows: usize,
        /// Scales a row has.
        actual: usize,
    },
    /// The bytes are too few, of another type than F32, F16 or BF16, or not aligned for it.
    #[error("scales of type {0} do not lie in the bytes given, aligned for the type")]
    Bytes(DType),
}

impl Scales {
    /// One scale a row.
    pub fn rows(scales: impl Into<Arc<[f32]>>) -> Self {
        let scales = scales.into();
        Scales { rows: scales.len(), stored: Stored::Rows(scales) }
    }

    /// A scale for each `group` elements of a row, `[rows, per_row]`, as a view of somebody's bytes. The last group of a
    /// row may be short.
    pub fn groups(
        bytes: Bytes,
        start: usize,
        dtype: DType,
        group: usize,
        rows: usize,
        per_row: usize,
    ) -> Result<Self, ScaleError> {
        if !GROUPS.contains(&group) {
            return Err(ScaleError::Group(group));
        }
        let whole = (*bytes).as_ref();
        let fits = !dtype.is_scaled()
            && rows
                .checked_mul(per_row)
                .and_then(|count| dtype.row_bytes(count))
                .and_then(|len| whole.get(start..start.checked_add(len)?))
                .is_some_and(|bytes| (bytes.as_ptr() as usize).is_multiple_of(dtype.alignment()));
        if !fits {
            return Err(ScaleError::Bytes(dtype));
        }
        Ok(Scales { stored: Stored::Groups { bytes, start, dtype, group, per_row }, rows })
    }

    /// As [`Scales::groups`], of values of one's own.
    pub fn groups_from_f32(values: Vec<f32>, group: usize, rows: usize) -> Result<Self, ScaleError> {
        let per_row = values.len() / rows.max(1);
        Self::groups(owned_f32(values), 0, DType::F32, group, rows, per_row)
    }

    /// Those of rows `first .. first + count`, which there must be.
    pub(crate) fn rows_view(&self, first: usize, count: usize) -> Self {
        let stored = match &self.stored {
            Stored::Rows(scales) => Stored::Rows(scales[first..first + count].into()),
            Stored::Groups { bytes, start, dtype, group, per_row } => Stored::Groups {
                bytes: bytes.clone(),
                start: start + dtype.row_bytes(first * per_row).unwrap_or(0),
                dtype: *dtype,
                group: *group,
                per_row: *per_row,
            },
        };
        Scales { stored, rows: count }
    }

    /// Elements that share a scale, or none if a whole row does.
    pub fn group(&self) -> Option<usize> {
        match &self.stored {
            Stored::Rows(_) => None,
            Stored::Groups { group, .. } => Some(*group),
        }
    }

    /// Scales a row has.
    pub fn per_row(&self) -> usize {
        match &self.stored {
            Stored::Rows(_) => 1,
            Stored::Groups { per_row, .. } => *per_row,
        }
    }

    /// The scale of element `element` of row `row`.
    pub fn of(&self, row: usize, element: usize) -> f32 {
        match &self.stored {
            Stored::Rows(scales) => scales[row],
            Stored::Groups { bytes, start, dtype, group, per_row } => {
                let bytes = &(**bytes).as_ref()[*start..];
                let at = row * per_row + element / group;
                let two = |at: usize| [bytes[2 * at], bytes[2 * at + 1]];
                match dtype {
                    DType::F16 => half::f16::from_le_bytes(two(at)).to_f32(),
                    DType::BF16 => half::bf16::from_le_bytes(two(at)).to_f32(),
                    _ => f32::from_le_bytes(std::array::from_fn(|i| bytes[4 * at + i])),
                }
            }
        }
    }

    /// One scale a row, where it is so.
    pub fn of_rows(&self) -> Option<&[f32]> {
        match &self.stored {
            Stored::Rows(scales) => Some(scales),
            Stored::Groups { .. } => None,
        }
    }

    /// The bytes of all groups' scales and their type, where there are groups.
    pub(crate) fn of_groups(&self) -> Option<(&[u8], DType)> {
        self.kept().map(|(bytes, range, dtype)| (&(**bytes).as_ref()[range], dtype))
    }

    /// Whose bytes the groups' scales are, where in them they lie, and their type, where there are groups.
    pub(crate) fn kept(&self) -> Option<(&Bytes, Range<usize>, DType)> {
        match &self.stored {
            Stored::Rows(_) => None,
            Stored::Groups { bytes, start, dtype, per_row, .. } => {
                let len = dtype.row_bytes(self.rows * per_row).unwrap_or(0);
                Some((bytes, *start..*start + len, *dtype))
            }
        }
    }

    /// Whether these are scales of a weight `[rows, row_len]`.
    pub(crate) fn check(&self, rows: usize, row_len: usize) -> Result<(), ScaleError> {
        let per_row = self.group().map_or(1, |group| row_len.div_ceil(group));
        if self.rows != rows || self.per_row() != per_row {
            return Err(ScaleError::Count { rows, per_row, actual_rows: self.rows, actual: self.per_row() });
        }
        Ok(())
    }
}
