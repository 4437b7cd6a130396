//! Turns the frames of a window into the vision tower's pixels: fit to a square, scale as Pillow does, normalise.
//!
//! The scaling is Pillow's antialiased bicubic on 8-bit pictures to the last bit (`Image.resize(..., BICUBIC)`), because that is
//! what the models were trained behind. Its arithmetic, and that of formats, cuts and grey, is in
//! [`candor_kernels::pixels`], from where devices have it too. The goldens are Pillow 13's.

use std::borrow::Borrow;

use candor_kernels::pixels::resample::resize_bicubic;
use candor_kernels::pixels::{Cut, Outside, Picture, PictureError, Pixels, normalisation};

use super::frame::{Frame, FrameError};

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
    /// As a part of a picture.
    pub fn cut(self) -> Cut {
        Cut { x: self.x, y: self.y, width: self.side, height: self.side, outside: Outside::Edge }
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
    /// Pixels that cannot be read.
    #[error(transparent)]
    Picture(#[from] PictureError),
}

impl Preprocess {
    /// Largest input side of a tower.
    pub const MAX_SIDE: usize = Picture::MAX_SIDE;

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
        Ok(self.of_frame(frame, square)?.rgb()?)
    }

    /// The same, to be made where it is wanted: see [`Self::of_pixels`].
    pub fn of_frame<'a>(&self, frame: &'a Frame, square: Option<Square>) -> Result<Picture<'a>, PreprocessError> {
        self.check()?;
        frame.check()?;
        self.of_pixels(Pixels::rgb(&frame.rgb, frame.width, frame.height), square)
    }

    /// The same of pixels in any format that is read, to be made where they are wanted: here by [`Picture::rgb`], or by a device
    /// ([`Model::vision_features_of`](crate::model::Model::vision_features_of)).
    pub fn of_pixels<'a>(&self, pixels: Pixels<'a>, square: Option<Square>) -> Result<Picture<'a>, PreprocessError> {
        self.check()?;
        let Pixels { width, height, .. } = pixels;
        let cut = match (self.fit, square) {
            (Fit::Stretch, _) => Cut::whole(width, height),
            (Fit::Pad, _) => in_the_middle(width, height),
            (Fit::Face, None) => return Err(PreprocessError::Squares { frames: 1, squares: 0 }),
            (Fit::Face, Some(square)) => {
                let side = square.side;
                if side == 0 || side > width.max(height).saturating_mul(4) {
                    return Err(PreprocessError::Square { side, width, height });
                }
                square.cut()
            }
        };
        let Preprocess { side, detail, grey, .. } = *self;
        Ok(Picture { pixels, cut, grey, detail, side })
    }

    /// The pictures of a window, each as [`Preprocess::picture`]: black ones follow where there are fewer frames than
    /// `wanted`. `squares` holds one cut a frame where the fit is `face`, else it is not read.
    pub fn pictures<F: Borrow<Frame>>(
        &self,
        frames: &[F],
        squares: &[Square],
        wanted: usize,
    ) -> Result<Vec<Vec<u8>>, PreprocessError> {
        self.check_window(frames, squares, wanted)?;
        let seen = frames.iter().enumerate();
        let mut pictures: Vec<Vec<u8>> =
            seen.map(|(i, frame)| self.picture(frame.borrow(), squares.get(i).copied())).collect::<Result<_, _>>()?;
        pictures.resize(wanted, vec![0; self.side * self.side * 3]);
        Ok(pictures)
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
        let pictures = self.pictures(frames, squares, wanted)?;
        let mut pixels = Vec::with_capacity(wanted.saturating_mul(self.side * self.side * 3));
        pictures.iter().for_each(|picture| append_pixels(picture, layout, &mut pixels));
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

/// A frame in the middle of a square of colour 127.
fn in_the_middle(width: usize, height: usize) -> Cut {
    let side = width.max(height);
    let before = |length: usize| -(((side - length) / 2) as i64);
    Cut { x: before(width), y: before(height), width: side, height: side, outside: Outside::Colour(127) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeMap;

    use candor_kernels::pixels::luma;
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
        let pixels = Pixels::rgb(&frame.rgb, 3, 3);
        let reds = |square: Square| pixels.cut(&square.cut()).unwrap().into_iter().step_by(3).collect::<Vec<u8>>();
        assert_eq!(reds(Square { x: 1, y: 1, side: 2 }), [12, 15, 21, 24]);
        assert_eq!(reds(Square { x: -1, y: -1, side: 3 }), [0, 0, 3, 0, 0, 3, 9, 9, 12]);
        assert_eq!(reds(Square { x: 2, y: 2, side: 2 }), [24; 4]);
        assert_eq!(reds(Square { x: i64::MAX, y: i64::MIN, side: 1 }), [6]);
    }

    #[test]
    fn the_face_fit_scales_the_cut_alone() {
        let frame = Frame::from_rgb(picture(40, 30, 2), 40, 30).unwrap();
        let square = Square { x: 4, y: 6, side: 20 };
        let cut = Pixels::rgb(&frame.rgb, 40, 30).cut(&square.cut()).unwrap();
        let cut = Frame::from_rgb(cut, 20, 20).unwrap();
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
