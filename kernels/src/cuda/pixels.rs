//! Camera pixels: what of them is uploaded, and the tables that scale them.

use cudarc::driver::DeviceRepr;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, PoisonError};

use super::arena::Memory;
use super::driver::failed;
use super::launch::{Argument, Grid, launch};
use super::layers::grown;
use super::{CudaDevice, address, replay};
use crate::device::{DeviceError, Result};
use crate::pixels::resample::{Axis, columns_first};
use crate::pixels::{Cut, Format, Gains, Outside, Picture, Pixels, Plane};

const OP: &str = "picture_patches";
/// Pixels of a side of a block of cuda/pixels.cu.
const TILE: usize = 16;
/// Tables that are kept. A face that comes nearer has a cut of another size in each frame.
const TABLES: usize = 64;

/// What is kept from picture to picture.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// A camera's pixels.
    pixels: Option<Memory<u8>>,
    /// What lies between two scalings.
    between: Option<Memory<u8>>,
    tables: HashMap<(usize, usize), Arc<Table>>,
}

/// An axis on the GPU: where each position begins, how many inputs it has, and their weights, one behind the other.
#[derive(Debug)]
struct Table {
    data: Memory<i32>,
    taps: i32,
    size: usize,
}

arguments! {
    /// `Camera` of cuda/pixels.cu.
    Camera {
        data: u64, colour: u64,
        format: i32, width: i32, height: i32, top: i32, pitch: i32, colour_top: i32, colour_pitch: i32,
        x: i32, y: i32, outside: i32, grey: i32, left: i32,
        luma: i32, red: i32, blue: i32, green: [i32; 2], end: i32,
    }
    /// `Axis` of cuda/pixels.cu.
    AxisArgument { first: u64, count: u64, weights: u64, taps: i32, size: i32 }
}

impl Table {
    fn new(device: &CudaDevice, axis: &Axis) -> Result<Self> {
        // Positions and counts of the axis of a checked picture are small.
        let small = |values: &[usize]| values.iter().map(|&value| value as i32).collect::<Vec<_>>();
        let data = [small(&axis.first), small(&axis.count), axis.weights.clone()].concat();
        Ok(Table { data: device.upload(OP, &data)?, taps: axis.taps as i32, size: axis.first.len() })
    }

    fn argument(&self) -> AxisArgument {
        AxisArgument {
            first: address(&self.data, 0),
            count: address(&self.data, self.size),
            weights: address(&self.data, 2 * self.size),
            taps: self.taps,
            size: self.size as i32,
        }
    }
}

/// The table of an axis.
fn table(
    device: &CudaDevice,
    tables: &mut HashMap<(usize, usize), Arc<Table>>,
    input: usize,
    output: usize,
) -> Result<Arc<Table>> {
    if let Some(table) = tables.get(&(input, output)) {
        return Ok(table.clone());
    }
    if tables.len() >= TABLES {
        tables.clear();
    }
    let table = Arc::new(Table::new(device, &Axis::of(input, output))?);
    tables.insert((input, output), table.clone());
    Ok(table)
}

/// Bytes that a picture's pixels take, and what lies between two scalings of it; at most.
pub(crate) fn picture_bytes(picture: &Picture<'_>) -> usize {
    let pixels = match picture.pixels.format {
        Format::Rgb { data, .. } | Format::Rgba { data, .. } => data.len(),
        Format::Nv12 { luma, chroma, .. } => luma.len() + chroma.len(),
    };
    pixels + picture.between().map_or(0, |side| 3 * side * side)
}

/// Patches of a checked picture, which `out` has room for.
pub(super) fn patches(device: &CudaDevice, picture: &Picture<'_>, patch: usize, out: u64) -> Result<()> {
    replay::refuse(&device.inner.gpu, OP)?;
    let mut kept = device.inner.pictures.lock().unwrap_or_else(PoisonError::into_inner);
    let Kept { pixels, between, tables } = &mut *kept;
    let camera = upload(device, picture, pixels)?;
    let cut = (picture.cut.width, picture.cut.height);
    let Some(middle) = picture.between() else {
        return scale(device, tables, camera, cut, picture.side, patch, out);
    };
    let to = address(grown(device, between, Some(3 * middle * middle))?, 0);
    scale(device, tables, camera, cut, middle, 0, to)?;
    let size = middle as i32;
    let small = Camera { data: to, format: 0, width: size, height: size, top: 0, pitch: 3 * size, ..camera };
    let small = Camera { x: 0, y: 0, outside: -1, grey: 0, ..small };
    scale(device, tables, small, (middle, middle), picture.side, patch, out)
}

/// A picture of a side, as patches, or as bytes where `patch` is 0.
fn scale(
    device: &CudaDevice,
    tables: &mut HashMap<(usize, usize), Arc<Table>>,
    camera: Camera,
    cut: (usize, usize),
    side: usize,
    patch: usize,
    out: u64,
) -> Result<()> {
    let across = table(device, tables, cut.0, side)?;
    let down = table(device, tables, cut.1, side)?;
    let rows_first = !columns_first(cut, (side, side));
    let (one, two) = if rows_first { (across, down) } else { (down, across) };
    let tiles = side.div_ceil(TILE);
    let grid = Grid::blocks([tiles, tiles, 1], (TILE * TILE) as u32);
    let (one, two, patch) = (one.argument(), two.argument(), patch as i32);
    run!(device, OP, picture_patches, grid, camera, one, two, i32::from(rows_first), patch, out, out)
}

/// The rows that a cut reads, of `size`.
fn rows(start: i64, length: usize, size: usize) -> Range<usize> {
    let last = size as i64 - 1;
    let within = |at: i64| at.clamp(0, last) as usize;
    within(start)..within(start.saturating_add(length as i64 - 1)) + 1
}

/// Uploads the rows that the cut reads.
fn upload(device: &CudaDevice, picture: &Picture<'_>, kept: &mut Option<Memory<u8>>) -> Result<Camera> {
    let Picture { pixels: Pixels { width, height, format }, cut, grey, .. } = *picture;
    let Cut { x, y, outside, .. } = cut;
    let (plane, colour) = picture.pixels.planes();
    let lines = rows(y, cut.height, height);
    // Each row of colours is mixed with one beside it.
    let colour_lines = (lines.start / 2).saturating_sub(1)..(lines.end.div_ceil(2) + 1).min(height / 2);
    let bytes = |plane: &Plane<'_>, lines: &Range<usize>| (lines.len() - 1) * plane.pitch + plane.row;
    let first = bytes(&plane, &lines);
    let second = colour.map_or(0, |colour| bytes(&colour, &colour_lines));
    grown(device, kept, Some(first + second))?;
    let Some(to) = kept else { return Err(DeviceError::OutOfMemory { bytes: first + second }) };
    let parts = [(Some(plane), &lines, 0..first), (colour, &colour_lines, first..first + second)];
    for (plane, lines, place) in parts {
        let Some(plane) = plane else { continue };
        let from = &plane.data[lines.start * plane.pitch..][..place.len()];
        to.write(place.start, from).map_err(failed(OP, 0))?;
    }

    let (number, yuv) = match format {
        Format::Rgb { .. } => (0, None),
        Format::Rgba { .. } => (1, None),
        Format::Nv12 { yuv, .. } => (2, Some(yuv)),
    };
    let gains = yuv.map_or(Gains { luma: 0, red: 0, blue: 0, green: [0; 2] }, |yuv| yuv.matrix.gains());
    // A cut beside the picture sees what one that touches it sees.
    let place = |at: i64, length: usize, size: usize| at.clamp(-(length as i64), size as i64) as i32;
    Ok(Camera {
        data: address(to, 0),
        colour: address(to, first),
        format: number,
        width: width as i32,
        height: height as i32,
        top: lines.start as i32,
        pitch: plane.pitch as i32,
        colour_top: colour_lines.start as i32,
        colour_pitch: colour.map_or(0, |colour| colour.pitch as i32),
        x: place(x, cut.width, width),
        y: place(y, cut.height, height),
        outside: match outside {
            Outside::Edge => -1,
            Outside::Colour(value) => i32::from(value),
        },
        grey: i32::from(grey),
        left: i32::from(yuv.is_some_and(|yuv| yuv.site == crate::pixels::ChromaSite::Left)),
        luma: gains.luma,
        red: gains.red,
        blue: gains.blue,
        green: gains.green,
        end: 0,
    })
}
