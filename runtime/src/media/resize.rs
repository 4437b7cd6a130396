//! Turns the frames of a window into the vision tower's pixels: fit to a square, scale as Pillow does, normalise.
//!
//! The scaling is Pillow's antialiased bicubic on 8-bit pictures to the last bit (`Image.resize(..., BICUBIC)`), because that is
//! what the models were trained behind: two passes, weights in 22-bit fixed point, 8-bit values between the passes.

use std::borrow::Borrow;

use super::frame::{Frame, FrameError};

/// Bits behind the point of a weight: 32 less 8 for the value and 2 for the sum's overshoot.
const PRECISION_BITS: u32 = 32 - 8 - 2;

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

/// Scales a picture `[height, width, CHANNELS]` to `[out_height, out_width, CHANNELS]` exactly as Pillow's BICUBIC does.
/// `pixels` must hold `width * height * CHANNELS` bytes, and no side may be zero.
pub(crate) fn resize_bicubic<const CHANNELS: usize>(
    pixels: &[u8],
    (width, height): (usize, usize),
    (out_width, out_height): (usize, usize),
) -> Vec<u8> {
    let half = 1i32 << (PRECISION_BITS - 1);
    let rows = if width == out_width {
        pixels.to_vec()
    } else {
        let axis = Axis::new(width, out_width);
        let mut out = vec![0u8; out_width * height * CHANNELS];
        for (source, target) in pixels.chunks_exact(width * CHANNELS).zip(out.chunks_exact_mut(out_width * CHANNELS)) {
            for (x, pixel) in target.chunks_exact_mut(CHANNELS).enumerate() {
                let (first, weights) = axis.at(x);
                let mut sums = [half; CHANNELS];
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
    };
    if height == out_height {
        return rows;
    }
    let axis = Axis::new(height, out_height);
    let row_bytes = out_width * CHANNELS;
    let mut out = vec![0u8; row_bytes * out_height];
    let mut sums = vec![half; row_bytes];
    for (y, target) in out.chunks_exact_mut(row_bytes).enumerate() {
        let (first, weights) = axis.at(y);
        sums.fill(half);
        for (weight, source) in weights.iter().zip(rows[first * row_bytes..].chunks_exact(row_bytes)) {
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

    /// The square picture that the model sees of a frame: RGB `[side, side, 3]`. `square` is the cut of `fit = "face"`.
    pub fn picture(&self, frame: &Frame, square: Option<Square>) -> Result<Vec<u8>, PreprocessError> {
        for (name, side) in [("side", self.side), ("detail", self.detail.unwrap_or(1))] {
            if !(1..=Self::MAX_SIDE).contains(&side) {
                return Err(PreprocessError::Side { name, side });
            }
        }
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

    /// The vision tower's input of a window: `wanted` pictures in the given layout, normalised to -1..1. Where there are
    /// fewer frames, black pictures follow. `squares` holds one cut a frame where the fit is `face`, else it is not read.
    pub fn pixels<F: Borrow<Frame>>(
        &self,
        frames: &[F],
        squares: &[Square],
        wanted: usize,
        layout: PixelLayout,
    ) -> Result<Vec<f32>, PreprocessError> {
        if frames.len() > wanted {
            return Err(PreprocessError::Frames { got: frames.len(), wanted });
        }
        if self.fit == Fit::Face && squares.len() != frames.len() {
            return Err(PreprocessError::Squares { frames: frames.len(), squares: squares.len() });
        }
        let scale = normalisation();
        let picture_length = self.side.saturating_mul(self.side).saturating_mul(3);
        let mut pixels = Vec::new();
        for (i, frame) in frames.iter().enumerate() {
            let rgb = self.picture(frame.borrow(), squares.get(i).copied())?;
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
        if self.side > Self::MAX_SIDE {
            return Err(PreprocessError::Side { name: "side", side: self.side });
        }
        pixels.resize(wanted * picture_length, scale[0]);
        Ok(pixels)
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
