//! Device buffers that grow to what is needed and are then kept.

use std::sync::atomic::{AtomicU64, Ordering};

use candor_kernels::Device;

use super::ModelError;

/// A matrix `[rows, width]` on the device. It keeps its memory from use to use.
pub struct Rows<D: Device> {
    pub(super) buffer: D::Buffer,
    rows: usize,
    width: usize,
    stamp: u64,
}

/// The stamp of the next rows that are filled.
static NEXT_STAMP: AtomicU64 = AtomicU64::new(1);

impl<D: Device> Rows<D> {
    /// No rows yet.
    pub fn empty(device: &D) -> Result<Self, ModelError> {
        Ok(Rows { buffer: device.allocate(0)?, rows: 0, width: 0, stamp: 0 })
    }

    /// Rows there are.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Names the contents: it changes whenever they may, and no two contents of a process share it.
    pub(super) fn stamp(&self) -> u64 {
        self.stamp
    }

    /// No rows yet, with memory for `[rows, width]`; an error where the device has not so much.
    pub fn with_room(device: &D, rows: usize, width: usize) -> Result<Self, ModelError> {
        Ok(Rows { buffer: allocate(device, &[rows, width])?, rows: 0, width: 0, stamp: 0 })
    }

    /// Becomes `[rows, width]`, rows of others one behind the other: `parts` are (from `[…, width]`, its first row, rows).
    ///
    /// # Errors
    /// [`ModelError::Input`] where a part is of another width or leaves its rows, and what the device says.
    pub fn gather(&mut self, device: &D, width: usize, parts: &[(&Rows<D>, usize, usize)]) -> Result<(), ModelError> {
        self.resize(device, parts.iter().map(|part| part.2).sum(), width)?;
        let mut to = 0;
        for &(from, first, rows) in parts {
            if from.width != width || first.checked_add(rows).is_none_or(|end| end > from.rows) {
                let reason = format!("{rows} rows from {first} of {} by {}, {width} wide", from.rows, from.width);
                return Err(ModelError::input("rows", reason));
            }
            device.copy(&from.buffer, first * width, &mut self.buffer, to * width, rows * width)?;
            to += rows;
        }
        Ok(())
    }

    /// A copy on the host, `[rows, width]`.
    pub fn to_host(&self, device: &D) -> Result<Vec<f32>, ModelError> {
        let mut out = vec![0.0; self.rows * self.width];
        device.read(&self.buffer, 0, &mut out)?;
        Ok(out)
    }

    /// Takes `values`, `[rows, width]`, in the place of what stood there.
    pub fn write(&mut self, device: &D, values: &[f32], width: usize) -> Result<(), ModelError> {
        if width == 0 || !values.len().is_multiple_of(width) {
            return Err(ModelError::input("rows", format!("{} values are no rows of {width}", values.len())));
        }
        self.resize(device, values.len() / width, width)?;
        Ok(device.write(values, &mut self.buffer, 0)?)
    }

    /// Makes room for `rows · width`; what stood there is lost.
    pub(super) fn resize(&mut self, device: &D, rows: usize, width: usize) -> Result<(), ModelError> {
        grow(device, &mut self.buffer, &[rows, width])?;
        (self.rows, self.width) = (rows, width);
        self.stamp = NEXT_STAMP.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Replaces a buffer that is shorter than the product of `sizes`.
pub(super) fn grow<D: Device>(device: &D, buffer: &mut D::Buffer, sizes: &[usize]) -> Result<(), ModelError> {
    let elements = elements(sizes)?;
    if device.len(buffer) < elements {
        *buffer = device.allocate(elements)?;
    }
    Ok(())
}

/// A new buffer of the product of `sizes`.
pub(super) fn allocate<D: Device>(device: &D, sizes: &[usize]) -> Result<D::Buffer, ModelError> {
    Ok(device.allocate(elements(sizes)?)?)
}

/// The product of `sizes`, if so many elements can be addressed.
pub(super) fn elements(sizes: &[usize]) -> Result<usize, ModelError> {
    sizes
        .iter()
        .try_fold(1_usize, |n, &s| n.checked_mul(s))
        .filter(|n| n.checked_mul(size_of::<f32>()).is_some())
        .ok_or_else(|| ModelError::Overflow(sizes.to_vec()))
}
