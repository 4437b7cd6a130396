//! Turns the frames of a window into the vision tower's pixels: fit to a square, scale as Pillow does, normalise.
//!
//! The scaling is Pillow's antialiased bicubic on 8-bit pictures to the last bit (`Image.resize(..., BICUBIC)`), because that is
//! what the models were trained behind: two passes, weights in 22-bit fixed point, 8-bit values between the passes.
//! The goldens are Pillow 13's.

use std::borrow::Borrow;

use super::frame::{Frame, FrameError};

/// Bits behind the point of a weight: 32 less 8 for the value and 2 for the sum's overshoot.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// One half, which the sum starts with so that cutting the fraction off rounds.
const ROUNDING: i32 = 1 << (PRECISION_BITS - 1);

/// Half-width of the bicubic kernel in source pixels at scale 1.
const BICUBIC_SUPPORT: f64 = 2.0;

/// Bicubic kernel with a = -0.5 (Keys).
fn bicubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

/// The weights of one axis: output position `i` is the sum over `weights[i * taps..][..count[i]]` times the inputs from
/// `first[i]` on.
struct Axis {
    taps: usize,
    first: Vec<usize>,
    count: Vec<usize>,
    weights: Vec<i32>,
}

impl Axis {
    fn new(input: usize, output: usize) -> Self {
        let scale = input as f64 / output as f64;
        // Scaling down widens the kernel so that every source pixel counts (the antialiasing); scaling up keeps it.
        let filter_scale = scale.max(1.0);
        let support = BICUBIC_SUPPORT * filter_scale;
        let taps = support.ceil() as usize * 2 + 1;
        let mut axis = Self {
            taps,
            first: Vec::with_capacity(output),
            count: Vec::with_capacity(output),
            weights: vec![0; output * taps],
        };
        let mut row = vec![0.0; taps];
        for i in 0..output {
            let center = (i as f64 + 0.5) * scale;
            // `as usize` cuts towards zero and takes a negative to zero, as the definition's cast and clamp do.
            let first = (center - support + 0.5) as usize;
            let end = ((center + support + 0.5) as usize).min(input);
            let count = end - first;
            let mut sum = 0.0;
            for (k, weight) in row[..count].iter_mut().enumerate() {
                *weight = bicubic(((k + first) as f64 - center + 0.5) * (1.0 / filter_scale));
                sum += *weight;
            }
            for (fixed, weight) in axis.weights[i * taps..].iter_mut().zip(&row[..count]) {
                let weight = if sum == 0.0 { *weight } else { weight / sum };
                let scaled = weight * f64::from(1u32 << PRECISION_BITS);
                *fixed = (if weight < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32;
            }
            axis.first.push(first);
            axis.count.push(count);
        }
        axis
    }

    /// Weights of output position `i`, and the first input they apply to.
    fn at(&self, i: usize) -> (usize, &[i32]) {
        (self.first[i], &self.weights[i * self.taps..][..self.count[i]])
    }
}

fn to_u8(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// Scales every row: `[height, width, CHANNELS]` to `[height, out_width, CHANNELS]`.
fn resize_rows<const CHANNELS: usize>(pixels: &[u8], width: usize, out_width: usize) -> Vec<u8> {
    if width == out_width {
        return pixels.to_vec();
    }
    let axis = Axis::new(width, out_width);
    let height = pixels.len() / (width * CHANNELS);
    let mut out = vec![0u8; out_width * height * CHANNELS];
    for (source, target) in pixels.chunks_exact(width * CHANNELS).zip(out.chunks_exact_mut(out_width * CHANNELS)) {
        for (x, pixel) in target.chunks_exact_mut(CHANNELS).enumerate() {
            let (first, weights) = axis.at(x);
            let mut sums = [ROUNDING; CHANNELS];
            for (weight, value) in weights.iter().zip(source[first * CHANNELS..].chunks_exact(CHANNELS)) {
                for (sum, value) in sums.iter_mut().zip(value) {
                    *sum += weight * i32::from(*value);
                }
            }
            for (value, sum) in pixel.iter_mut().zip(sums) {
                *value = to_u8(sum);
            }
        }
    }
    out
}

/// Scales every column: `[height, row_bytes]` to `[out_height, row_bytes]`.
fn resize_columns(pixels: &[u8], row_bytes: usize, out_height: usize) -> Vec<u8> {
    let height = pixels.len() / row_bytes;
    if height == out_height {
        return pixels.to_vec();
    }
    let axis = Axis::new(height, out_height);
    let mut out = vec![0u8; row_bytes * out_height];
    let mut sums = vec![ROUNDING; row_bytes];
    for (y, target) in out.chunks_exact_mut(row_bytes).enumerate() {
        let (first, weights) = axis.at(y);
        sums.fill(ROUNDING);
        for (weight, source) in weights.iter().zip(pixels[first * row_bytes..].chunks_exact(row_bytes)) {
            for (sum, value) in sums.iter_mut().zip(source) {
                *sum += weight * i32::from(*value);
            }
        }
        for (value, sum) in target.iter_mut().zip(&sums) {
            *value = to_u8(*sum);
        }
    }
    out
}

/// Scales a picture `[height, width, CHANNELS]` to `[out_height, out_width, CHANNELS]` exactly as Pillow's BICUBIC does.
/// `pixels` must hold `width * height * CHANNELS` bytes, and no side may be zero.
pub(crate) fn resize_bicubic<const CHANNELS: usize>(
    pixels: &[u8],
    (width, height): (usize, usize),
    (out_width, out_height): (usize, usize),
) -> Vec<u8> {
    // The order of the passes shows in the last bit. Pillow 13 does columns first where the height shrinks by more than
    // twice what the width does; older versions always did rows first (but for pictures a hundred times as high as wide).
    let shrinks = |from: usize, to: usize| from as i64 - to as i64;
    let columns_first = shrinks(height, out_height) > (2 * shrinks(width, out_width)).max(0);
    if columns_first {
        let columns = resize_columns(pixels, width * CHANNELS, out_height);
        resize_rows::<CHANNELS>(&columns, width, out_width)
    } else {
        let rows = resize_rows::<CHANNELS>(pixels, width, out_width);
        resize_columns(&rows, out_width * CHANNELS, out_height)
    }
}

/// Scales RGB pixels `[height, width, 3]` to `[out_height, out_width, 3]`, bit-exact with Pillow's antialiased bicubic.
pub fn resize_rgb(
    rgb: &[u8],
    (width, height): (usize, usize),
    (out_width, out_height): (usize, usize),
) -> Result<Vec<u8>, FrameError> {
    super::frame::check_picture(rgb.len(), width, height)?;
    super::frame::check_picture(out_width.saturating_mul(out_height).saturating_mul(3), out_width, out_height)?;
    Ok(resize_bicubic::<3>(rgb, (width, height), (out_width, out_height)))
}

/// The brightness of RGB pixels, one byte each, exactly as Pillow's conversion to mode "L" (ITU-R BT.601 luma).
pub fn luma(rgb: &[u8]) -> Vec<u8> {
    let pixel = |p: &[u8]| {
        ((19_595 * u32::from(p[0]) + 38_470 * u32::from(p[1]) + 7_471 * u32::from(p[2]) + 0x8000) >> 16) as u8
    };
    rgb.chunks_exact(3).map(pixel).collect()
}

/// How a frame becomes a square.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Fit {
    /// The whole frame, its sides scaled differently (the published inference).
    Stretch,
    /// The whole frame in the middle of a square of the mean colour 127 (the published training).
    Pad,
    /// The square that is cut around a face, see [`super::face`].
    Face,
}

/// A square of a frame, in its pixels. Where it reaches over the frame's edge, the edge's pixels are repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Square {
    /// Left edge.
    pub x: i64,
    /// Upper edge.
    pub y: i64,
    /// Width and height, at least 1.
    pub side: usize,
}

impl Square {
    /// Cuts the square out of a frame: RGB pixels `[side, side, 3]`.
    pub fn cut(&self, frame: &Frame) -> Vec<u8> {
        let inside =
            |start: i64, i: usize, length: usize| start.saturating_add(i as i64).clamp(0, length as i64 - 1) as usize;
        let mut rgb = Vec::with_capacity(self.side * self.side * 3);
        for row in 0..self.side {
            let line = &frame.rgb[inside(self.y, row, frame.height) * frame.width * 3..][..frame.width * 3];
            for column in 0..self.side {
                rgb.extend_from_slice(&line[inside(self.x, column, frame.width) * 3..][..3]);
            }
        }
        rgb
    }
}

/// The order of the pixel tensor's axes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PixelLayout {
    /// `[frames, side, side, 3]`
    ChannelsLast,
    /// `[frames, 3, side, side]`
    ChannelsFirst,
}

/// What must be known to turn frames into pixels; comes from the model's manifest and configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preprocess {
    /// Side of the tower's square input, in pixels.
    pub side: usize,
    /// How a frame becomes a square.
    pub fit: Fit,
    /// The square is first reduced to this side, for a model trained on small photographs.
    pub detail: Option<usize>,
    /// Colour is dropped first.
    pub grey: bool,
}

/// Why frames cannot be turned into pixels.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PreprocessError {
    /// A side of zero, or one far beyond every vision tower.
    #[error("{name} = {side}: a picture side from 1 to {max} is needed", max = Preprocess::MAX_SIDE)]
    Side {
        /// The setting.
        name: &'static str,
        /// As given.
        side: usize,
    },
    /// More frames than the model takes.
    #[error("{got} frames for a model that takes {wanted}; sample them first")]
    Frames {
        /// Frames given.
        got: usize,
        /// Frames that the model takes.
        wanted: usize,
    },
    /// The fit is `face` and no square was given for a frame.
    #[error("fit = \"face\" needs a face square for each of {frames} frames, not {squares}")]
    Squares {
        /// Frames given.
        frames: usize,
        /// Squares given.
        squares: usize,
    },
    /// A square of side 0, or far larger than its frame.
    #[error("a face square of side {side} in a frame of {width}x{height}")]
    Square {
        /// Its side.
        side: usize,
        /// The frame's width.
        width: usize,
        /// The frame's height.
        height: usize,
    },
    /// A frame whose buffer does not fit its size.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

impl Preprocess {
    /// Largest input side of a tower.
    pub const MAX_SIDE: usize = 4096;

    fn check(&self) -> Result<(), PreprocessError> {
        for (name, side) in [("side", self.side), ("detail", self.detail.unwrap_or(1))] {
            if !(1..=Self::MAX_SIDE).contains(&side) {
                return Err(PreprocessError::Side { name, side });
            }
        }
        Ok(())
    }

    /// The square picture that the model sees of a frame: RGB `[side, side, 3]`. `square` is the cut of `fit = "face"`.
    pub fn picture(&self, frame: &Frame, square: Option<Square>) -> Result<Vec<u8>, PreprocessError> {
        self.check()?;
        frame.check()?;
        let (mut rgb, mut size) = match (self.fit, square) {
            (Fit::Stretch, _) => (frame.rgb.clone(), (frame.width, frame.height)),
            (Fit::Pad, _) => {
                let side = frame.width.max(frame.height);
                (pad_to_square(frame, side), (side, side))
            }
            (Fit::Face, None) => return Err(PreprocessError::Squares { frames: 1, squares: 0 }),
            (Fit::Face, Some(square)) => {
                let (side, width, height) = (square.side, frame.width, frame.height);
                if side == 0 || side > 4 * width.max(height) {
                    return Err(PreprocessError::Square { side, width, height });
                }
                (square.cut(frame), (side, side))
            }
        };
        if self.grey {
            rgb = luma(&rgb).into_iter().flat_map(|value| [value; 3]).collect();
        }
        for side in self.detail.into_iter().chain([self.side]) {
            rgb = resize_bicubic::<3>(&rgb, size, (side, side));
            size = (side, side);
        }
        Ok(rgb)
    }

    /// Whether the settings are in range, and frames and squares are as many as they must be.
    pub(crate) fn check_window<F>(
        &self,
        frames: &[F],
        squares: &[Square],
        wanted: usize,
    ) -> Result<(), PreprocessError> {
        self.check()?;
        if frames.len() > wanted {
            return Err(PreprocessError::Frames { got: frames.len(), wanted });
        }
        if self.fit == Fit::Face && squares.len() != frames.len() {
            return Err(PreprocessError::Squares { frames: frames.len(), squares: squares.len() });
        }
        Ok(())
    }

    /// The vision tower's input of a window: `wanted` pictures in the given layout, normalised to -1..1. Where there are
    /// fewer frames, black pictures follow. `squares` holds one cut a frame where the fit is `face`, else it is not read.
    pub fn pixels<F: Borrow<Frame>>(
        &self,
        frames: &[F],
        squares: &[Square],
        wanted: usize,
        layout: PixelLayout,
    ) -> Result<Vec<f32>, PreprocessError> {
        self.check_window(frames, squares, wanted)?;
        let mut pixels = Vec::new();
        for (i, frame) in frames.iter().enumerate() {
            append_pixels(&self.picture(frame.borrow(), squares.get(i).copied())?, layout, &mut pixels);
        }
        let picture_length = self.side * self.side * 3;
        pixels.resize(wanted * picture_length, normalisation()[0]);
        Ok(pixels)
    }
}

/// Appends a picture of [`Preprocess::picture`], bytes `[side, side, 3]`, as the vision tower's input: as many values in
/// `layout`, normalised to -1..1.
pub fn append_pixels(rgb: &[u8], layout: PixelLayout, pixels: &mut Vec<f32>) {
    let scale = normalisation();
    let value = |byte: &u8| scale[usize::from(*byte)];
    match layout {
        PixelLayout::ChannelsLast => pixels.extend(rgb.iter().map(value)),
        PixelLayout::ChannelsFirst => {
            for channel in 0..3 {
                pixels.extend(rgb.iter().skip(channel).step_by(3).map(value));
            }
        }
    }
}

/// What each byte becomes: x / 255, then (x - 0.5) / 0.5, rounded as the published image processor rounds.
fn normalisation() -> [f32; 256] {
    std::array::from_fn(|byte| ((byte as f64 * (1.0 / 255.0)) as f32 - 0.5) / 0.5)
}

/// Puts a frame in the middle of a square of colour 127: RGB `[side, side, 3]`.
fn pad_to_square(frame: &Frame, side: usize) -> Vec<u8> {
    let mut rgb = vec![127; side * side * 3];
    let (left, top) = ((side - frame.width) / 2, (side - frame.height) / 2);
    for (line, target) in frame.rgb.chunks_exact(frame.width * 3).zip(rgb.chunks_exact_mut(side * 3).skip(top)) {
        target[left * 3..][..line.len()].copy_from_slice(line);
    }
    rgb
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeMap;

    use sha2::{Digest, Sha256};

    use super::*;

    /// Made by tests/fixtures/make_resize.py with Pillow.
    const GOLDENS: &str = include_str!("../../../tests/fixtures/resize.txt");

    /// The same pictures as the script's.
    fn picture(width: usize, height: usize, seed: u64) -> Vec<u8> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
        let mut rgb = Vec::new();
        for y in 0..height {
            for x in 0..width {
                for c in 0..3 {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let kinds = [(state >> 56) as usize, 255 * ((x + y + c) % 2), (3 * x + 5 * y + 40 * c) % 256];
                    rgb.push(kinds[(x / 5 + y / 3 + seed as usize) % 3] as u8);
                }
            }
        }
        rgb
    }

    fn hex(bytes: impl AsRef<[u8]>) -> String {
        bytes.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn every_golden_of_pillow_to_the_last_bit() {
        let mut done = BTreeMap::new();
        for line in GOLDENS.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let n = |i: usize| words[i].parse::<usize>().unwrap();
            let (got, want) = match words[0] {
                kind @ ("resize" | "full") => {
                    let input = picture(n(1), n(2), n(5) as u64);
                    let out = resize_rgb(&input, (n(1), n(2)), (n(3), n(4))).unwrap();
                    (if kind == "full" { hex(out) } else { hex(Sha256::digest(out)) }, words[6])
                }
                "grey" => (hex(Sha256::digest(luma(&picture(n(1), n(2), n(3) as u64)))), words[4]),
                "pixels" => {
                    let preprocess = Preprocess {
                        side: n(5),
                        fit: if words[1] == "pad" { Fit::Pad } else { Fit::Stretch },
                        detail: Some(n(6)).filter(|side| *side > 0),
                        grey: words[2] == "grey",
                    };
                    let frame = Frame::from_rgb(picture(n(3), n(4), n(7) as u64), n(3), n(4)).unwrap();
                    let pixels = preprocess.pixels(&[frame], &[], 1, PixelLayout::ChannelsFirst).unwrap();
                    let bytes: Vec<u8> = pixels.iter().flat_map(|value| value.to_le_bytes()).collect();
                    (hex(Sha256::digest(bytes)), words[8])
                }
                other => panic!("unknown golden {other}"),
            };
            assert_eq!(got, want, "{line}");
            *done.entry(words[0]).or_insert(0) += 1;
        }
        assert_eq!(done, BTreeMap::from([("full", 3), ("grey", 5), ("pixels", 20), ("resize", 28)]));
    }

    #[test]
    fn the_layouts_hold_the_same_values_and_missing_frames_are_black() {
        let frame = Frame::from_rgb(picture(6, 4, 1), 6, 4).unwrap();
        let preprocess = Preprocess { side: 5, fit: Fit::Stretch, detail: None, grey: false };
        let first = preprocess.pixels(&[&frame], &[], 3, PixelLayout::ChannelsFirst).unwrap();
        let last = preprocess.pixels(&[&frame], &[], 3, PixelLayout::ChannelsLast).unwrap();
        assert_eq!((first.len(), last.len()), (3 * 75, 3 * 75));
        for (i, value) in last[..75].iter().enumerate() {
            assert_eq!(*value, first[(i % 3) * 25 + i / 3]);
        }
        assert!(first[75..].iter().chain(&last[75..]).all(|value| *value == -1.0));
        assert!(first[..75].iter().any(|value| *value > 0.0));
    }

    #[test]
    fn a_square_over_the_edge_repeats_the_edge() {
        let frame = Frame::from_rgb((0..27).collect(), 3, 3).unwrap();
        let reds = |square: Square| square.cut(&frame).into_iter().step_by(3).collect::<Vec<u8>>();
        assert_eq!(reds(Square { x: 1, y: 1, side: 2 }), [12, 15, 21, 24]);
        assert_eq!(reds(Square { x: -1, y: -1, side: 3 }), [0, 0, 3, 0, 0, 3, 9, 9, 12]);
        assert_eq!(reds(Square { x: 2, y: 2, side: 2 }), [24; 4]);
        assert_eq!(reds(Square { x: i64::MAX, y: i64::MIN, side: 1 }), [6]);
    }

    #[test]
    fn the_face_fit_scales_the_cut_alone() {
        let frame = Frame::from_rgb(picture(40, 30, 2), 40, 30).unwrap();
        let square = Square { x: 4, y: 6, side: 20 };
        let cut = Frame::from_rgb(square.cut(&frame), 20, 20).unwrap();
        let face = Preprocess { side: 16, fit: Fit::Face, detail: Some(10), grey: true };
        let whole = Preprocess { fit: Fit::Stretch, ..face };
        assert_eq!(face.picture(&frame, Some(square)).unwrap(), whole.picture(&cut, None).unwrap());
    }

    #[test]
    fn what_cannot_be_done_is_an_error() {
        let frame = Frame::from_rgb(vec![0; 12], 2, 2).unwrap();
        let good = Preprocess { side: 4, fit: Fit::Stretch, detail: None, grey: false };
        let pixels = |preprocess: Preprocess, frames: &[Frame], squares: &[Square], wanted| {
            preprocess.pixels(frames, squares, wanted, PixelLayout::ChannelsLast).unwrap_err()
        };
        let one = std::slice::from_ref(&frame);
        let face = Preprocess { fit: Fit::Face, ..good };
        assert_eq!(pixels(good, one, &[], 0), PreprocessError::Frames { got: 1, wanted: 0 });
        assert_eq!(pixels(face, one, &[], 1), PreprocessError::Squares { frames: 1, squares: 0 });
        for side in [0, usize::MAX] {
            assert_eq!(pixels(Preprocess { side, ..good }, one, &[], 1), PreprocessError::Side { name: "side", side });
            assert_eq!(pixels(Preprocess { side, ..good }, &[], &[], 1), PreprocessError::Side { name: "side", side });
            let detail = Preprocess { detail: Some(side), ..good };
            assert_eq!(pixels(detail, one, &[], 1), PreprocessError::Side { name: "detail", side });
            let square = [Square { x: 0, y: 0, side }];
            assert!(matches!(pixels(face, one, &square, 1), PreprocessError::Square { .. }));
        }
        let short = Frame { rgb: vec![0; 11], ..frame.clone() };
        let length = FrameError::Length { width: 2, height: 2, expected: 12, got: 11 };
        assert_eq!(pixels(good, &[short], &[], 1), PreprocessError::Frame(length));
        assert!(resize_rgb(&[], (0, 4), (2, 2)).is_err());
        assert!(resize_rgb(&[0; 12], (2, 2), (0, 2)).is_err());
        assert!(resize_rgb(&[0; 12], (2, 2), (usize::MAX, 2)).is_err());
        assert!(Frame::from_rgb(Vec::new(), usize::MAX, usize::MAX).is_err());
    }
}
