//! Weights on the GPU, as kernels take them.

use cudarc::driver::DeviceRepr;

use super::CudaDevice;
use super::driver::failed;
use super::layers::rounding;
use super::residence::Place;
use crate::device::{Result, Rounding};
use crate::tensor::{DType, HostTensor};

/// `Weight` of cuda/common.cuh.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct WeightArgument {
    data: u64,
    scales: u64,
    row_bytes: i64,
    rows: i32,
    depth: i32,
    kind: i32,
    scale_kind: i32,
    group_shift: i32,
    scales_per_row: i32,
}

// SAFETY: plain numbers, laid out as the kernels' struct of the same fields.
unsafe impl DeviceRepr for WeightArgument {}

/// A weight that the GPU reads; views of its rows share that.
#[derive(Clone, Debug)]
pub struct CudaWeight {
    /// The elements as they are stored, and the scales where there are any.
    data: Place,
    scales: Option<Place>,
    argument: WeightArgument,
    rows: usize,
    depth: usize,
    dtype: DType,
}

/// The kernels' number of a type.
fn number(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 2,
        DType::I8 => 3,
        DType::I4 => 4,
    }
}

impl CudaWeight {
    /// Finds a weight its place where the GPU reads it.
    pub(super) fn place(device: &CudaDevice, tensor: &HostTensor) -> Result<Self> {
        const OP: &str = "weight";
        let (rows, depth, dtype) = (tensor.rows(), tensor.row_len(), tensor.dtype());
        let row_bytes = dtype.row_bytes(depth).unwrap_or(0);
        let ((bytes, range), gpu) = (tensor.kept(), &device.inner.gpu);
        let len = range.len();
        let data = device.residence().place(gpu, bytes, range).map_err(failed(OP, len))?;
        if rows > 1 && depth > 1 && rounding(dtype) == Rounding::None {
            device.residence().count_plain(len);
        }
        let mut argument = WeightArgument {
            data: data.address(),
            row_bytes: row_bytes as i64,
            rows: device.small(OP, "rows", rows)?,
            depth: device.small(OP, "elements of a row", depth)?,
            kind: number(dtype),
            ..WeightArgument::default()
        };
        let scales = match tensor.scales() {
            None => None,
            Some(scales) => {
                let (place, len, kind) = match scales.kept() {
                    Some((bytes, range, kind)) => {
                        let len = range.len();
                        (device.residence().place(gpu, bytes, range), len, kind)
                    }
                    None => {
                        let rows = scales.of_rows().unwrap_or(&[]);
                        let bytes: Vec<u8> = rows.iter().flat_map(|scale| scale.to_le_bytes()).collect();
                        (device.residence().upload(gpu, &bytes), bytes.len(), DType::F32)
                    }
                };
                let place = place.map_err(failed(OP, len))?;
                argument.scales = place.address();
                argument.scale_kind = number(kind);
                // Groups are powers of two; every element of a row is in the first of 2³¹.
                argument.group_shift = scales.group().map_or(31, |group| group.trailing_zeros() as i32);
                argument.scales_per_row = device.small(OP, "scales of a row", scales.per_row())?;
                Some(place)
            }
        };
        Ok(CudaWeight { data, scales, argument, rows, depth, dtype })
    }

    /// Rows `first .. first + count`, which there must be.
    pub(super) fn view(&self, first: usize, count: usize) -> Self {
        let mut view = self.clone();
        let scale_bytes = if view.argument.scale_kind == number(DType::F32) { 4 } else { 2 };
        view.argument.data += (first * view.argument.row_bytes as usize) as u64;
        if view.scales.is_some() {
            view.argument.scales += (first * view.argument.scales_per_row as usize * scale_bytes) as u64;
        }
        (view.rows, view.argument.rows) = (count, count as i32);
        view
    }

    /// As kernels take it. The memory lives as long as this.
    pub(super) fn argument(&self) -> WeightArgument {
        debug_assert!(self.argument.data >= self.data.address());
        self.argument
    }

    /// Whether layers of these weights can be computed of one x at once.
    pub(super) fn goes_with(&self, other: &CudaWeight) -> bool {
        let like =
            |weight: &CudaWeight| (weight.dtype.is_scaled().then_some((weight.dtype, weight.chunk())), weight.depth);
        like(self) == like(other)
    }

    /// Elements, 128 at most, that have one scale, of a weight that has scales.
    pub(super) fn chunk(&self) -> usize {
        if self.argument.scales_per_row > 1 { 1 << self.argument.group_shift.min(7) } else { 128 }
    }

    /// Whether every row begins at a multiple of 16 bytes.
    pub(super) fn is_aligned(&self) -> bool {
        self.argument.data.is_multiple_of(16) && (self.argument.row_bytes as u64).is_multiple_of(16)
    }

    /// The first dimension.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub(super) fn depth(&self) -> usize {
        self.depth
    }

    /// All elements.
    pub(super) fn elements(&self) -> usize {
        self.rows * self.depth
    }

    /// How elements are stored.
    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }
}
