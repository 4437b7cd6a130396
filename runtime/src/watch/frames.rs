//! What is kept of the last window's frames. A stream's windows overlap, and hand the same frame on; what the face detector
//! saw in it and what the vision tower made of it is found again here by the frame and the square that was cut out of
//! it, or by the picture itself.
//!
//! A frame is known by its allocation, whose address a weak reference keeps from being used again; its pixels are let
//! go. Memory is bounded by the frames of one window.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use candor_kernels::Device;
use candor_kernels::pixels::Picture;

use super::WatchError;
use crate::media::face::{FaceDetector, FaceError, WindowFace, follow_largest};
use crate::media::{FaceBox, Frame, Preprocess, Square};
use crate::model::{Model, Rows};

/// A pixel in RGB.
const BLACK: [u8; 3] = [0; 3];

/// A frame that was looked at, and the faces found in it.
struct Searched {
    frame: Weak<Frame>,
    faces: Arc<[FaceBox]>,
}

/// A picture that went through the vision tower.
#[derive(Clone)]
struct Seen {
    /// None for the black pictures that fill a window up.
    frame: Option<Weak<Frame>>,
    square: Option<Square>,
    /// Its bytes, where they were made before the device.
    picture: Option<Arc<[u8]>>,
    /// Names the picture.
    key: u64,
}

impl Seen {
    fn is(&self, frame: Option<&Arc<Frame>>, square: Option<Square>) -> bool {
        let same_frame = match (&self.frame, frame) {
            (Some(own), Some(other)) => std::ptr::eq(own.as_ptr(), Arc::as_ptr(other)),
            (None, None) => true,
            _ => false,
        };
        same_frame && self.square == square
    }
}

/// What is kept of the last window's frames.
pub(super) struct Frames<D: Device> {
    searched: Vec<Searched>,
    /// The last window's pictures in their order; their states are in the rows that [`Frames::features`] filled.
    seen: Vec<Seen>,
    next_key: u64,
    fresh: Rows<D>,
    assembled: Rows<D>,
    /// Frames that faces were looked for in.
    pub(super) frames_searched: u64,
    /// Time that the last call of [`Frames::features`] spent on cutting and scaling pictures.
    pub(super) pictures_time: Duration,
}

impl<D: Device> Frames<D> {
    /// Nothing is kept yet. Takes the memory for a window of `frames` pictures.
    pub(super) fn new(model: &Model<D>) -> Result<Self, WatchError> {
        let config = model.config();
        let room = || Rows::with_room(model.device(), config.frames * config.vision.patches(), config.vision.width);
        Ok(Frames {
            searched: Vec::new(),
            seen: Vec::new(),
            next_key: 0,
            fresh: room()?,
            assembled: room()?,
            frames_searched: 0,
            pictures_time: Duration::ZERO,
        })
    }

    /// Bytes of host memory, beside the device's.
    pub(super) fn host_bytes(&self) -> usize {
        self.seen.iter().filter_map(|seen| seen.picture.as_ref()).map(|picture| picture.len()).sum()
    }

    /// Forgets the pictures: their states are no longer where [`Frames::features`] put them.
    pub(super) fn forget(&mut self) {
        self.seen.clear();
    }

    /// As [`FaceDetector::find`], looking only at frames that were not in the last window.
    pub(super) fn find(
        &mut self,
        detector: &mut FaceDetector,
        frames: &[Arc<Frame>],
    ) -> Result<Option<WindowFace>, FaceError> {
        let mut searched: Vec<Searched> = Vec::with_capacity(frames.len());
        for frame in frames {
            let known = self.searched.iter().chain(&searched);
            let faces = known
                .filter(|known| std::ptr::eq(known.frame.as_ptr(), Arc::as_ptr(frame)))
                .map(|known| Arc::clone(&known.faces))
                .next();
            let faces = match faces {
                Some(faces) => faces,
                None => {
                    self.frames_searched += 1;
                    detector.look(frame)?.into()
                }
            };
            searched.push(Searched { frame: Arc::downgrade(frame), faces });
        }
        self.searched = searched;
        Ok(follow_largest(&self.searched.iter().map(|searched| &searched.faces[..]).collect::<Vec<_>>()))
    }

    /// The vision tower's states of a window's frames, `[frames · patches, vision width]`, and a name of each picture:
    /// equal names are equal pictures. `features` holds what the last call put there; only pictures that the last
    /// window did not have go through the tower.
    pub(super) fn features(
        &mut self,
        model: &mut Model<D>,
        preprocess: &Preprocess,
        frames: &[Arc<Frame>],
        squares: &[Square],
        features: &mut Rows<D>,
    ) -> Result<Vec<u64>, WatchError> {
        let (wanted, patches, width) = {
            let config = model.config();
            (config.frames, config.vision.patches(), config.vision.width)
        };
        preprocess.check_window(frames, squares, wanted)?;
        let started = Instant::now();
        // What fails on the way leaves nothing behind.
        let last = std::mem::take(&mut self.seen);
        let mut seen: Vec<Seen> = Vec::with_capacity(wanted);
        // Where each picture's states are: a place of the last window, or one of the fresh.
        let mut from: Vec<Result<usize, usize>> = Vec::with_capacity(wanted);
        // Places of pictures that are new, and what a device makes pictures of, by place.
        let mut fresh: Vec<usize> = Vec::new();
        let mut to_make: Vec<Option<Picture<'_>>> = vec![None; wanted];
        let on_device = model.device().makes_pictures();
        for place in 0..wanted {
            let (frame, square) = (frames.get(place), squares.get(place).copied());
            if let Some(old) = last.iter().position(|last| last.is(frame, square)) {
                seen.push(last[old].clone());
                from.push(Ok(old));
                continue;
            }
            let picture: Option<Arc<[u8]>> = match frame {
                _ if on_device => None,
                Some(frame) => Some(preprocess.picture(frame, square)?.into()),
                None => Some(vec![0; preprocess.side * preprocess.side * 3].into()),
            };
            if on_device {
                to_make[place] = Some(match frame {
                    Some(frame) => preprocess.of_frame(frame, square)?,
                    None => Picture { side: preprocess.side, ..Picture::of_rgb(&BLACK, 1) },
                });
            }
            let new = |key, picture| Seen { frame: frame.map(Arc::downgrade), square, picture, key };
            let like = |other: &Seen| picture.is_some() && other.picture == picture;
            if let Some(old) = last.iter().position(like) {
                seen.push(new(last[old].key, picture));
                from.push(Ok(old));
            } else if let Some(twin) =
                (0..place).find(|&other| like(&seen[other]) || (on_device && to_make[other] == to_make[place]))
            {
                seen.push(new(seen[twin].key, picture));
                from.push(from[twin]);
            } else {
                from.push(Err(fresh.len()));
                fresh.push(place);
                seen.push(new(self.next_key, picture));
                self.next_key += 1;
            }
        }
        self.pictures_time = started.elapsed();
        if !fresh.is_empty() {
            let of_place = |&place: &usize| match (&to_make[place], &seen[place].picture) {
                (Some(picture), _) => Some(*picture),
                (None, Some(bytes)) => Some(Picture::of_rgb(bytes, preprocess.side)),
                (None, None) => None,
            };
            let pictures: Vec<Picture<'_>> = fresh.iter().filter_map(of_place).collect();
            model.vision_features_of(&pictures, &mut self.fresh)?;
        }
        let unmoved = from.iter().enumerate().all(|(place, from)| *from == Ok(place));
        if !unmoved {
            let parts: Vec<_> = from
                .iter()
                .map(|from| match *from {
                    Ok(old) => (&*features, old * patches, patches),
                    Err(new) => (&self.fresh, new * patches, patches),
                })
                .collect();
            self.assembled.gather(model.device(), width, &parts)?;
            std::mem::swap(&mut self.assembled, features);
        }
        let keys = seen.iter().map(|seen| seen.key).collect();
        self.seen = seen;
        Ok(keys)
    }
}
