//! The first stage: a camera or a file in, windows of frames out, pixels ready for the vision tower.
//!
//! [`Source`] opens files and cameras and yields [`Frame`]s; [`Windows`] gathers them; [`face`] finds the face that a window is
//! about; [`resize`] cuts, scales and normalises the window's frames. Only the sources need GStreamer (feature `media`);
//! everything behind them is plain Rust.

pub mod face;
mod frame;
#[cfg(feature = "media")]
mod installed;
pub mod resize;
pub mod sampling;
#[cfg(feature = "media")]
pub mod source;

pub use face::{FaceBox, FaceCrop, FaceDetector, WindowFace};
pub use frame::{Frame, FrameError, FrameSource, MediaError, Window};
#[cfg(feature = "media")]
pub use installed::{Element, Installed};
pub use resize::{Fit, PixelLayout, Preprocess, Square};
pub use sampling::{WindowSettings, Windows, sample_clip, sample_indices};
#[cfg(feature = "media")]
pub use source::{Source, SourceOptions, SourceSpec};
