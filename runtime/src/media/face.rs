//! Finds the face that a window is about and the square to cut around it, held steady over the window.
//!
//! The detector is SeetaFace's funnel-structured cascade through the `rustface` crate (see docs/faces.md for the choice). It
//! looks at a small grey copy of each frame. Between the window's frames the largest face is followed by overlap, and
//! the median of its boxes is the window's box, so that the cut neither jumps nor breathes.

use std::borrow::Borrow;

use candor_kernels::pixels::luma;
use candor_kernels::pixels::resample::resize_bicubic;

use super::frame::{Frame, FrameError};
use super::resize::Square;

/// The detector's weights, part of the program.
const DETECTOR: &[u8] = include_bytes!("../../../models/face/seeta_fd_frontal_v1.0.bin");

/// Longer side of the picture that the detector looks at; larger frames are reduced to it.
const WORK_SIDE: usize = 240;

/// Frames with a longer side below this are enlarged to it.
const SMALLEST_WORK_SIDE: usize = 160;

/// Side of the detector's own window; pictures with a smaller side hold no face for it.
const DETECTOR_SIDE: usize = 40;

/// Smallest face looked for, in pixels of the reduced picture.
const SMALLEST_FACE: u32 = 26;

/// Score from which a detection counts as a face.
const SCORE_THRESHOLD: f64 = 2.0;

/// Overlap (intersection over union) from which two boxes in neighbouring frames are the same face.
const SAME_FACE: f32 = 0.25;

/// Overlap with the last window's box from which that may stand for the new one: about what the detector's own jitter is.
const STILL_FACE: f32 = 0.85;

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
    /// The same face where the last window's was, if it has hardly moved since.
    pub(crate) fn steadied(self, last: &WindowFace) -> WindowFace {
        if self.relative.overlap(&last.relative) < STILL_FACE {
            return self;
        }
        WindowFace { relative: FaceBox { score: self.relative.score, ..last.relative }, ..self }
    }

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
        Self { margin: 0.045, shift: 0.0 }
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
        let found: Vec<_> = frames.iter().map(|frame| self.look(frame.borrow())).collect::<Result<_, _>>()?;
        Ok(follow_largest(&found))
    }

    /// The faces of a frame in shares of its width and height, for [`follow_largest`].
    pub(crate) fn look(&mut self, frame: &Frame) -> Result<Vec<FaceBox>, FaceError> {
        let faces = self.detect(frame)?;
        Ok(faces.iter().map(|face| face.scaled(1.0 / frame.width as f32, 1.0 / frame.height as f32)).collect())
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
pub(crate) fn follow_largest<F: Borrow<[FaceBox]>>(found: &[F]) -> Option<WindowFace> {
    let largest = |faces: &[FaceBox]| faces.iter().copied().max_by(|a, b| a.area().total_cmp(&b.area()));
    let (start, first) = found
        .iter()
        .enumerate()
        .filter_map(|(i, faces)| Some((i, largest(faces.borrow())?)))
        .max_by(|(_, a), (_, b)| a.area().total_cmp(&b.area()))?;
    let mut track = vec![first];
    let mut follow = |frames: &mut dyn Iterator<Item = &F>| {
        let mut last = first;
        for faces in frames {
            let next = faces.borrow().iter().copied().max_by(|a, b| a.overlap(&last).total_cmp(&b.overlap(&last)));
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
        people: found.iter().map(|faces| faces.borrow().len()).max().unwrap_or(0),
    })
}

/// Median of at least one value; of an even number, the mean of the middle two.
fn median(mut values: Vec<f32>) -> f32 {
    values.sort_by(f32::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn face(x: f32, y: f32, side: f32) -> FaceBox {
        FaceBox { x, y, width: side, height: side, score: 5.0 }
    }

    /// A photograph of a face, 96 pixels wide, made by tests/fixtures/make_face.py.
    fn portrait() -> Frame {
        let decoder = png::Decoder::new(std::io::Cursor::new(include_bytes!("../../../tests/fixtures/portrait.png")));
        let mut reader = decoder.read_info().unwrap();
        let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut rgb).unwrap();
        Frame::from_rgb(rgb, info.width as usize, info.height as usize).unwrap()
    }

    /// `count` bytes of noise.
    fn noise(count: usize) -> Vec<u8> {
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn a_face_is_found_where_it_is_and_none_in_noise() {
        let mut detector = FaceDetector::new().unwrap();
        let portrait = portrait();
        let faces = detector.detect(&portrait).unwrap();
        assert_eq!(faces.len(), 1, "{faces:?}");
        let middle = (faces[0].x + faces[0].width / 2.0, faces[0].y + faces[0].height / 2.0);
        assert!((40.0..56.0).contains(&middle.0) && (40.0..56.0).contains(&middle.1), "{faces:?}");
        let found = detector.find(&[portrait.clone(), portrait.clone()]).unwrap().unwrap();
        assert_eq!((found.found_in, found.people), (2, 1));
        let empty = Frame::from_rgb(noise(160 * 120 * 3), 160, 120).unwrap();
        assert_eq!(detector.find(&[empty.clone(), empty]).unwrap(), None);
        assert_eq!(detector.find::<Frame>(&[]).unwrap(), None);
    }

    #[test]
    fn frames_of_any_shape_are_searched() {
        let mut detector = FaceDetector::new().unwrap();
        for (width, height) in [(1, 1), (1, 500), (3000, 2), (39, 41), (40, 40), (41, 39), (700, 90), (161, 320)] {
            for rgb in [noise(width * height * 3), vec![0; width * height * 3], vec![255; width * height * 3]] {
                let frame = Frame::from_rgb(rgb, width, height).unwrap();
                assert_eq!(detector.detect(&frame).unwrap(), [], "{width}x{height}");
            }
        }
        let short = Frame { rgb: vec![0; 5], ..Frame::from_rgb(vec![0; 3], 1, 1).unwrap() };
        assert!(matches!(detector.detect(&short), Err(FaceError::Frame(FrameError::Length { .. }))));
    }

    #[test]
    fn the_window_box_follows_one_face_and_is_its_median() {
        // The large face is followed where it moves; the small one beside it and a frame without faces change nothing.
        let small = face(0.0, 0.0, 0.1);
        let found = vec![
            vec![face(0.5, 0.5, 0.3), small],
            vec![small, face(0.52, 0.5, 0.32)],
            vec![small],
            vec![face(0.56, 0.5, 0.3), small],
            vec![],
        ];
        let window = follow_largest(&found).unwrap();
        assert_eq!((window.found_in, window.people), (3, 2));
        assert!((window.relative.width - 0.3).abs() < 1e-6);
        assert!((window.relative.x + 0.15 - 0.68).abs() < 1e-6, "{window:?}");
        // Seen in less than a quarter of the frames it is no face of the window.
        let mut rare = vec![vec![]; 5];
        rare[2] = vec![face(0.5, 0.5, 0.3)];
        assert_eq!(follow_largest(&rare), None);
        assert!(follow_largest(&rare[1..]).is_some());
    }

    #[test]
    fn the_square_stays_the_same_in_frames_of_another_size() {
        let window = follow_largest(&[vec![face(0.25, 0.5, 0.5)]]).unwrap();
        let crop = FaceCrop::new(0.1, 0.05).unwrap();
        let frames = [(80, 80), (160, 160)].map(|(w, h)| Frame::from_rgb(vec![0; w * h * 3], w, h).unwrap());
        let squares = crop.squares(&window, &frames);
        assert_eq!(squares, [Square { x: 16, y: 38, side: 48 }, Square { x: 32, y: 76, side: 96 }]);
        assert_eq!(FaceCrop::new(0.0, 0.0).unwrap().square(&face(0.0, 0.0, 0.0)).side, 1);
        for (margin, shift) in [(f32::NAN, 0.0), (-0.5, 0.0), (2.0, 0.0), (0.0, 0.6), (0.0, f32::INFINITY)] {
            assert!(matches!(FaceCrop::new(margin, shift), Err(FaceError::Crop { .. })), "{margin} {shift}");
        }
    }
}
