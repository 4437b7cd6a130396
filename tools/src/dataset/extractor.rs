//! From a clip or a photograph to what the vision tower makes of it, by the steps of [`candor::watch::Watcher`]: frames
//! sampled over the whole clip, the face found and cut where the model wants that, pixels, states.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candor::manifest::{Manifest, ManifestError};
use candor::media::face::FaceError;
use candor::media::resize::{PixelLayout, PreprocessError};
use candor::media::{FaceCrop, FaceDetector, Fit, Frame, FrameError, MediaError, Preprocess};
use candor::model::{Model, ModelError, Rows};
use candor::weights::WeightsError;
use candor_kernels::Device;
use sha2::{Digest, Sha256};

use super::{ClipFeatures, FacesFiles, Media};
use crate::data::faces::{Faces, FacesError};

/// Why there are no features of a clip.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClipError {
    /// The faces file cannot be used.
    #[error("{0}")]
    Faces(Arc<FacesError>),
    /// The faces file has no such photograph.
    #[error("{media}: the part has {len} photographs")]
    Row {
        /// The photograph.
        media: Media,
        /// Photographs in the part.
        len: usize,
    },
    /// The clip cannot be read.
    #[error("cannot read {path}: {source}", path = path.display())]
    Read {
        /// The clip.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The clip cannot be decoded.
    #[error(transparent)]
    Decode(#[from] MediaError),
    /// There is no picture in the clip.
    #[error("{path} has no picture", path = path.display())]
    NoFrames {
        /// The clip.
        path: PathBuf,
    },
    /// The model looks at faces, and the clip shows none.
    #[error("{path}: no face is seen in it, and the model looks at faces only", path = path.display())]
    NoFace {
        /// The clip.
        path: PathBuf,
    },
    /// The pictures do not fit the model.
    #[error("{media}: {source}")]
    Pixels {
        /// The clip.
        media: Media,
        /// Why.
        source: PreprocessError,
    },
    /// A photograph is no picture.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The states are not finite, or too large for the cache.
    #[error(
        "{media}: the vision tower's states are not finite numbers of half precision; are the model's weights whole?"
    )]
    NotFinite {
        /// The clip.
        media: Media,
    },
    /// The program cannot decode clips.
    #[error("{path}: this candor-tools is built without GStreamer and reads photographs of faces files only", path = path.display())]
    NoDecoder {
        /// The clip.
        path: PathBuf,
    },
    /// The model's manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The model's weights.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The face detector.
    #[error(transparent)]
    Face(#[from] FaceError),
    /// The cache cannot be read or written.
    #[error("cache {path}: {source}", path = path.display())]
    Cache {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
}

impl ClipError {
    /// Whether the clip is at fault, and another clip may do: not so where the model, the cache or what is installed is.
    pub fn is_of_the_clip(&self) -> bool {
        match self {
            ClipError::Decode(error) => !matches!(
                error,
                MediaError::MissingDecoder { .. } | MediaError::MissingElement { .. } | MediaError::GStreamer { .. }
            ),
            ClipError::Faces(_)
            | ClipError::Row { .. }
            | ClipError::Read { .. }
            | ClipError::NoFrames { .. }
            | ClipError::NoFace { .. }
            | ClipError::Pixels { .. }
            | ClipError::Frame(_) => true,
            _ => false,
        }
    }
}

/// Pictures of a clip: at most as many as the model takes, oldest first.
type Frames = Vec<Arc<Frame>>;

/// A model that looks at clips, one a thread.
pub struct Extractor<D: Device> {
    model: Model<D>,
    states: Rows<D>,
    faces: FacesFiles,
    /// How the frames of a clip become pixels.
    clip: Preprocess,
    /// How a photograph becomes pixels: it is cut to the face already.
    photograph: Preprocess,
    /// Where a clip is cut to the face.
    face: Option<(FaceDetector, FaceCrop)>,
}

impl<D: Device> Extractor<D> {
    /// Opens a model's folder, for one thread. `faces` are those of the data set.
    pub fn open(folder: &Path, faces: FacesFiles, device: D) -> Result<Self, ClipError> {
        let input = Manifest::open(folder)?.input;
        let model = Model::open(folder, device)?;
        let side = model.config().vision.image;
        let clip = Preprocess { side, fit: input.fit, detail: input.detail, grey: input.grey };
        let face = match input.fit {
            Fit::Face => Some((FaceDetector::new()?, FaceCrop::new(input.face_margin, input.face_shift)?)),
            _ => None,
        };
        let photograph = Preprocess { fit: Fit::Stretch, ..clip };
        Ok(Extractor { states: model.rows()?, model, faces, clip, photograph, face })
    }

    /// Frames that the model takes of a clip.
    pub fn frames(&self) -> usize {
        self.model.config().frames
    }

    /// Elements of a picture's features, `patches · width`.
    pub fn size(&self) -> usize {
        let vision = &self.model.config().vision;
        vision.patches() * vision.width
    }

    /// What the vision tower makes of a clip, computed.
    pub fn extract(&mut self, media: &Media) -> Result<ClipFeatures, ClipError> {
        let (pixels, frames) = self.pixels(media)?;
        self.model.vision_features(&pixels, &mut self.states)?;
        let distinct = self.states.to_host(self.model.device())?;
        Ok(ClipFeatures { distinct, frames })
    }

    /// A clip as the vision tower takes it: its distinct pictures, `[pictures, 3, side, side]`, and the picture of each
    /// frame.
    pub fn pixels(&mut self, media: &Media) -> Result<(Vec<f32>, Vec<usize>), ClipError> {
        let wanted = self.frames();
        let pixels = |source| ClipError::Pixels { media: media.clone(), source };
        Ok(match media {
            Media::Photograph { file, part, row } => {
                let (faces, row) = (self.faces.part(file, part).map_err(ClipError::Faces)?, *row);
                let grey = photograph(&faces, media, row)?;
                let rgb = grey.iter().flat_map(|&grey| [grey; 3]).collect();
                let photograph = Frame::from_rgb(rgb, faces.side, faces.side)?;
                let pixels =
                    self.photograph.pixels(&[photograph], &[], 1, PixelLayout::ChannelsFirst).map_err(pixels)?;
                (pixels, vec![0; wanted])
            }
            Media::Clip(path) => {
                let frames = self.decode(path)?;
                let squares = match &mut self.face {
                    None => Vec::new(),
                    Some((detector, crop)) => match detector.find(&frames)? {
                        Some(face) => crop.squares(&face, &frames),
                        None => return Err(ClipError::NoFace { path: path.clone() }),
                    },
                };
                // Missing frames are black; one black picture stands for all of them.
                let distinct = wanted.min(frames.len() + 1);
                let pixels =
                    self.clip.pixels(&frames, &squares, distinct, PixelLayout::ChannelsFirst).map_err(pixels)?;
                (pixels, (0..wanted).map(|frame| frame.min(distinct - 1)).collect())
            }
        })
    }

    /// Digest of what a photograph shows.
    pub(super) fn photograph_digest(&self, media: &Media) -> Result<Option<[u8; 32]>, ClipError> {
        let Media::Photograph { file, part, row } = media else { return Ok(None) };
        let faces = self.faces.part(file, part).map_err(ClipError::Faces)?;
        Ok(Some(Sha256::digest(photograph(&faces, media, *row)?).into()))
    }

    /// The frames of a clip that the model looks at; never none.
    #[cfg(feature = "media")]
    fn decode(&self, path: &Path) -> Result<Frames, ClipError> {
        use candor::media::{Source, SourceOptions, SourceSpec, sample_clip, sample_indices};
        let open = |path: &Path| Source::open_spec(SourceSpec::File(path.into()), SourceOptions::default());
        let none = || ClipError::NoFrames { path: path.into() };
        if !path.is_dir() {
            return sample_clip(|| open(path), self.frames())?.map(|window| window.frames).ok_or_else(none);
        }
        let pictures = pictures_of(path).map_err(|source| ClipError::Read { path: path.into(), source })?;
        if pictures.is_empty() {
            return Err(none());
        }
        let sampled = sample_indices(pictures.len(), self.frames()).into_iter();
        sampled.map(|i| Ok(Arc::new(open(&pictures[i])?.next().ok_or_else(none)??))).collect()
    }

    #[cfg(not(feature = "media"))]
    fn decode(&self, path: &Path) -> Result<Frames, ClipError> {
        Err(ClipError::NoDecoder { path: path.into() })
    }
}

/// The pictures of a folder in the order of the numbers in their names: "2.jpg" goes before "10.jpg".
pub(crate) fn pictures_of(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut pictures = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        if ["jpg", "jpeg", "png", "bmp"].contains(&extension.to_ascii_lowercase().as_str()) {
            pictures.push(path);
        }
    }
    pictures.sort_by_cached_key(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let digits: String =
            name.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
        (digits.parse::<u64>().unwrap_or(0), name)
    });
    Ok(pictures)
}

/// Grey values of a photograph, `[side, side]`.
fn photograph<'f>(faces: &'f Faces, media: &Media, row: usize) -> Result<&'f [u8], ClipError> {
    if row >= faces.len() {
        return Err(ClipError::Row { media: media.clone(), len: faces.len() });
    }
    Ok(faces.image(row))
}
