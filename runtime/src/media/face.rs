//! Finds the face that a window is about and the square to cut around it, held steady over the window.
//!
//! The detector is SeetaFace's funnel-structured cascade through the `rustface` crate (see docs/faces.md for the choice). It
//! looks at a small grey copy of each frame. Between the window's frames the largest face is followed by overlap, and
//! the median of its boxes is the window's box, so that the cut neither jumps nor breathes.

use std::borrow::Borrow;

use super::frame::{Frame, FrameError};
use super::resize::{Square, luma, resize_bicubic};

/// The detector's weights, part of the program.
const DETECTOR: &[u8] = include_bytes!("../../../models/face/seeta_fd_frontal_v1.0.bin");

/// Longer side of the picture that the detector looks at; larger frames are reduced to it.
const WORK_SIDE: usize = 320;

/// Frames with a longer side below this are enlarged to it.
const SMALLEST_WORK_SIDE: usize = 160;

/// Side of the detector's own window; pictures with a smaller side hold no face for it.
const DETECTOR_SIDE: usize = 40;

/// Smallest face looked for, in pixels of the reduced picture.
const SMALLEST_FACE: u32 = 30;

/// Score from which a detection counts as a face.
const SCORE_THRESHOLD: f64 = 2.0;

/// Overlap (intersection over union) from which two boxes in neighbouring frames are the same face.
const SAME_FACE: f32 = 0.25;

/// Share of a window's frames in which the face must be found.
const FOUND_SHARE: f64 = 0.25;

/// A face in a picture, in pixels of that picture; it may reach over the picture's edge.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FaceBox {
    /// Left edge.
    pub x: f32,
    /// Upper edge.
    pub y: f32,
    /// Width.
    pub width: f32,
    /// Height.
    pub height: f32,
    /// The detector's score; larger is surer.
    pub score: f32,
}

impl FaceBox {
    fn area(&self) -> f32 {
        self.width * self.height
    }

    /// Intersection over union, 0 to 1.
    fn overlap(&self, other: &Self) -> f32 {
        let shared =
            |a: f32, a_length: f32, b: f32, b_length: f32| ((a + a_length).min(b + b_length) - a.max(b)).max(0.0);
        let both =
            shared(self.x, self.width, other.x, other.width) * shared(self.y, self.height, other.y, other.height);
        both / (self.area() + other.area() - both).max(f32::MIN_POSITIVE)
    }

    fn scaled(&self, x_scale: f32, y_scale: f32) -> Self {
        Self {
            x: self.x * x_scale,
            y: self.y * y_scale,
            width: self.width * x_scale,
            height: self.height * y_scale,
            score: self.score,
        }
    }
}

/// The face that a window is about.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WindowFace {
    /// Median box over the frames, in shares of the frame's width and height (frames may differ in size).
    relative: FaceBox,
    /// In how many of the window's frames it was found.
    pub found_in: usize,
    /// The most faces seen in one of the window's frames.
    pub people: usize,
}

impl WindowFace {
    /// The face's box in the pixels of one of the window's frames. The same place in every frame, also in those where the
    /// detector missed it. The score is the median score.
    pub fn in_frame(&self, frame: &Frame) -> FaceBox {
        self.relative.scaled(frame.width as f32, frame.height as f32)
    }
}

/// How the square is laid around a face.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FaceCrop {
    /// Share of the box's side added on each side; negative cuts tighter.
    pub margin: f32,
    /// How far the square's middle lies below the box's middle, in shares of the box's side.
    pub shift: f32,
}

impl Default for FaceCrop {
    /// Lands eyes and mouth where they are in FER2013's 48-pixel photographs (measured, see docs/faces.md).
    fn default() -> Self {
        Self { margin: 0.0, shift: 0.0 }
    }
}

/// A face crop out of range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum FaceError {
    /// The margin or the shift.
    #[error("{name} = {value}: give a share from {least} to {most}")]
    Crop {
        /// The manifest's key.
        name: &'static str,
        /// As given.
        value: f32,
        /// Least value.
        least: f32,
        /// Largest value.
        most: f32,
    },
    /// The detector's weights cannot be read.
    #[error("the face detector's weights are damaged: {0}; build again from a clean checkout")]
    Detector(String),
    /// A frame whose buffer does not fit its size.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

impl FaceCrop {
    /// A crop with the manifest's `face_margin` (-0.4 to 1) and `face_shift` (-0.5 to 0.5).
    pub fn new(margin: f32, shift: f32) -> Result<Self, FaceError> {
        for (name, value, least, most) in [("face_margin", margin, -0.4, 1.0), ("face_shift", shift, -0.5, 0.5)] {
            if !(least..=most).contains(&value) {
                return Err(FaceError::Crop { name, value, least, most });
            }
        }
        Ok(Self { margin, shift })
    }

    /// The square around a face. It may reach over the frame's edge, where the edge's pixels are repeated.
    pub fn square(&self, face: &FaceBox) -> Square {
        let box_side = face.width.max(face.height);
        let side = (box_side * (1.0 + 2.0 * self.margin)).round().max(1.0);
        let left = face.x + (face.width - side) / 2.0;
        let top = face.y + (face.height - side) / 2.0 + self.shift * box_side;
        Square { x: left.round() as i64, y: top.round() as i64, side: side as usize }
    }

    /// One square a frame for the window's face, in the order of `frames`.
    pub fn squares<F: Borrow<Frame>>(&self, face: &WindowFace, frames: &[F]) -> Vec<Square> {
        frames.iter().map(|frame| self.square(&face.in_frame(frame.borrow()))).collect()
    }
}

/// Finds faces. Stays on the thread that made it.
pub struct FaceDetector {
    detector: Box<dyn rustface::Detector>,
}

impl FaceDetector {
    /// Loads the built-in detector.
    pub fn new() -> Result<Self, FaceError> {
        let model = rustface::read_model(DETECTOR).map_err(|error| FaceError::Detector(error.to_string()))?;
        let mut detector = rustface::create_detector_with_model(model);
        detector.set_min_face_size(SMALLEST_FACE);
        detector.set_score_thresh(SCORE_THRESHOLD);
        detector.set_pyramid_scale_factor(0.8);
        detector.set_slide_window_step(4, 4);
        Ok(Self { detector })
    }

    /// All faces of a frame, largest first.
    pub fn detect(&mut self, frame: &Frame) -> Result<Vec<FaceBox>, FaceError> {
        frame.check()?;
        let longer = frame.width.max(frame.height);
        let scale = longer.clamp(SMALLEST_WORK_SIDE, WORK_SIDE) as f64 / longer as f64;
        let side = |length: usize| ((length as f64 * scale).round() as usize).max(1);
        let (width, height) = (side(frame.width), side(frame.height));
        if width.min(height) < DETECTOR_SIDE {
            return Ok(Vec::new());
        }
        let grey = resize_bicubic::<1>(&luma(&frame.rgb), (frame.width, frame.height), (width, height));
        let image = rustface::ImageData::new(&grey, width as u32, height as u32);
        let mut faces: Vec<FaceBox> = self.detector.detect(&image).iter().map(to_box).collect();
        for face in &mut faces {
            *face = face.scaled(frame.width as f32 / width as f32, frame.height as f32 / height as f32);
        }
        faces.sort_by(|a, b| b.area().total_cmp(&a.area()));
        Ok(faces)
    }

    /// The largest face of a window, followed through its frames. `None` where there is none, or where it shows in fewer
    /// than a quarter of the frames.
    pub fn find<F: Borrow<Frame>>(&mut self, frames: &[F]) -> Result<Option<WindowFace>, FaceError> {
        let mut found = Vec::with_capacity(frames.len());
        for frame in frames {
            let frame = frame.borrow();
            let faces = self.detect(frame)?;
            let relative = |face: &FaceBox| face.scaled(1.0 / frame.width as f32, 1.0 / frame.height as f32);
            found.push(faces.iter().map(relative).collect::<Vec<_>>());
        }
        Ok(follow_largest(&found))
    }
}

fn to_box(info: &rustface::FaceInfo) -> FaceBox {
    let rectangle = info.bbox();
    FaceBox {
        x: rectangle.x() as f32,
        y: rectangle.y() as f32,
        width: rectangle.width() as f32,
        height: rectangle.height() as f32,
        score: info.score() as f32,
    }
}

/// Follows the largest face of all frames forwards and backwards by overlap, and takes the median of its boxes.
fn follow_largest(found: &[Vec<FaceBox>]) -> Option<WindowFace> {
    let largest = |faces: &[FaceBox]| faces.iter().copied().max_by(|a, b| a.area().total_cmp(&b.area()));
    let (start, first) = found
        .iter()
        .enumerate()
        .filter_map(|(i, faces)| Some((i, largest(faces)?)))
        .max_by(|(_, a), (_, b)| a.area().total_cmp(&b.area()))?;
    let mut track = vec![first];
    let mut follow = |frames: &mut dyn Iterator<Item = &Vec<FaceBox>>| {
        let mut last = first;
        for faces in frames {
            let next = faces.iter().copied().max_by(|a, b| a.overlap(&last).total_cmp(&b.overlap(&last)));
            if let Some(next) = next.filter(|next| next.overlap(&last) >= SAME_FACE) {
                track.push(next);
                last = next;
            }
        }
    };
    follow(&mut found[start + 1..].iter());
    follow(&mut found[..start].iter().rev());
    if (track.len() as f64) < found.len() as f64 * FOUND_SHARE {
        return None;
    }
    let middle = |value: fn(&FaceBox) -> f32| median(track.iter().map(value).collect());
    // The median of middles and sides, not of edges: a face that moves keeps its size.
    let (width, height) = (middle(|face| face.width), middle(|face| face.height));
    Some(WindowFace {
        relative: FaceBox {
            x: middle(|face| face.x + face.width / 2.0) - width / 2.0,
            y: middle(|face| face.y + face.height / 2.0) - height / 2.0,
            width,
            height,
            score: middle(|face| face.score),
        },
        found_in: track.len(),
        people: found.iter().map(Vec::len).max().unwrap_or(0),
    })
}

/// Median of at least one value; of an even number, the mean of the middle two.
fn median(mut values: Vec<f32>) -> f32 {
    values.sort_by(f32::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}
