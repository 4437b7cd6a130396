//! What the media stage hands over: pictures with their times, windows of pictures, and the errors of a source.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// One picture of a source at the source's own size.
#[derive(Debug, Clone, PartialEq)]
pub struct Frame {
    /// Pixels `[height, width, 3]`, red, green, blue, 8 bits each, rows tightly packed.
    pub rgb: Vec<u8>,
    /// Pixels in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Media time in seconds: the position in a file, the time since a live source started.
    pub pts_s: f64,
    /// When the decoder gave the frame out, in seconds of the system's monotonic clock.
    pub monotonic_s: f64,
    /// When the decoder gave the frame out, in wall time.
    pub wall: SystemTime,
}

/// Pixels that do not make a picture.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A width or height of zero, or one that no picture has.
    #[error("a picture of {width}x{height} pixels: sides from 1 to {max} are read")]
    Size {
        /// Pixels in a row.
        width: usize,
        /// Rows.
        height: usize,
        /// Largest side accepted.
        max: usize,
    },
    /// The buffer does not hold exactly width x height x 3 bytes.
    #[error("a picture of {width}x{height} pixels needs {expected} bytes of RGB, not {got}")]
    Length {
        /// Pixels in a row.
        width: usize,
        /// Rows.
        height: usize,
        /// Bytes that the size asks for.
        expected: usize,
        /// Bytes given.
        got: usize,
    },
}

impl Frame {
    /// Largest width and height read; keeps a broken header from asking for all memory.
    pub const MAX_SIDE: usize = 16_384;

    /// A picture from packed RGB pixels `[height, width, 3]`, with all its times at zero.
    pub fn from_rgb(rgb: Vec<u8>, width: usize, height: usize) -> Result<Self, FrameError> {
        check_picture(rgb.len(), width, height)?;
        Ok(Self { rgb, width, height, pts_s: 0.0, monotonic_s: 0.0, wall: SystemTime::UNIX_EPOCH })
    }

    /// Whether the pixel buffer has the size that width and height say.
    pub fn check(&self) -> Result<(), FrameError> {
        check_picture(self.rgb.len(), self.width, self.height)
    }
}

pub(super) fn check_picture(bytes: usize, width: usize, height: usize) -> Result<(), FrameError> {
    let max = Frame::MAX_SIDE;
    if !(1..=max).contains(&width) || !(1..=max).contains(&height) {
        return Err(FrameError::Size { width, height, max });
    }
    let expected = width * height * 3;
    if bytes != expected {
        return Err(FrameError::Length { width, height, expected, got: bytes });
    }
    Ok(())
}

/// The pictures of a stretch of media time, sampled down to what the model looks at.
#[derive(Debug, Clone)]
pub struct Window {
    /// Number of the window in its stream, from 0; a gap tells that a live stream skipped windows.
    pub index: u64,
    /// Media time at which the window starts, in seconds.
    pub start_s: f64,
    /// Media time at which the window ends (exclusive), in seconds.
    pub end_s: f64,
    /// Monotonic time of the window's first frame, in seconds.
    pub start_monotonic_s: f64,
    /// Monotonic time of the window's last frame, in seconds.
    pub end_monotonic_s: f64,
    /// Wall time of the window's first frame.
    pub start_wall: SystemTime,
    /// Wall time of the window's last frame.
    pub end_wall: SystemTime,
    /// How many frames the source gave in this stretch.
    pub frame_count: usize,
    /// The sampled frames, oldest first: the asked number, or all there are where the source gave fewer.
    pub frames: Vec<Arc<Frame>>,
}

/// A stream of frames. `None` is the true end of the stream; after it, and after an error, nothing more comes.
pub trait FrameSource: Iterator<Item = Result<Frame, MediaError>> + Send {
    /// Whether frames come at the pace of the world (cameras) and not at the pace of the reader (files).
    fn is_live(&self) -> bool;
}

/// What can go wrong between a source's name and its last frame.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MediaError {
    /// The source's name is not of a form that is known.
    #[error(
        "cannot read the source {spec:?}: {reason}; give a file, v4l2:/dev/video0, rtsp://…, test or gst:<pipeline>"
    )]
    BadSource {
        /// The name as given.
        spec: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The file cannot be opened.
    #[error("cannot read the file {path}: {error}", path = path.display())]
    UnreadableFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        error: std::io::Error,
    },
    /// A directory, a pipe or another thing that is not a file.
    #[error("{path} is not a regular file; give a video file", path = path.display())]
    NotAFile {
        /// What was given.
        path: PathBuf,
    },
    /// The file's content is of no known media type.
    #[error("{source_name} is not a media file: {detail}")]
    NotMedia {
        /// The source.
        source_name: String,
        /// What GStreamer said.
        detail: String,
    },
    /// There is media, but no video in it.
    #[error("{source_name} has no video track; give a source with pictures in it")]
    NoVideoTrack {
        /// The source.
        source_name: String,
    },
    /// No decoder is installed for the video's codec.
    #[error("{source_name}: no decoder for {codec} is installed; {hint}")]
    MissingDecoder {
        /// The source.
        source_name: String,
        /// The codec, as GStreamer names it.
        codec: String,
        /// What to install.
        hint: String,
    },
    /// A GStreamer element that the pipeline needs is not installed, or does not exist.
    #[error("the GStreamer element {element:?} does not exist here; {hint}")]
    MissingElement {
        /// The element.
        element: String,
        /// What to install or to correct.
        hint: String,
    },
    /// The stream ended properly without one frame.
    #[error("{source_name} ended without one frame; the video track is empty")]
    NoFrames {
        /// The source.
        source_name: String,
    },
    /// There is no such camera.
    #[error("there is no camera {device}; look at /dev/video* for those that are plugged in")]
    DeviceAbsent {
        /// The device.
        device: String,
    },
    /// The camera is there but does not deliver.
    #[error(
        "the camera {device} cannot be used: {detail}; is it in use elsewhere, and may this user read it (group video)?"
    )]
    DeviceFailed {
        /// The device.
        device: String,
        /// What GStreamer said.
        detail: String,
    },
    /// The network camera cannot be reached, refuses, or does not answer.
    #[error("cannot reach {url}: {detail}; check address, port, user and password, and that the camera is on")]
    Unreachable {
        /// The address, without user and password.
        url: String,
        /// What GStreamer said, or how long was waited.
        detail: String,
    },
    /// The text behind `gst:` is not a pipeline.
    #[error(
        "the pipeline {pipeline:?} cannot be built: {detail}; it must end in video, without a sink: one is appended"
    )]
    BadPipeline {
        /// The text as given.
        pipeline: String,
        /// What GStreamer said.
        detail: String,
    },
    /// No frame came in time. This is not the end of the stream.
    #[error("{source_name} gave no frame for {waited:?} though it did not end; is it stuck, or too slow?")]
    Stalled {
        /// The source.
        source_name: String,
        /// How long was waited.
        waited: Duration,
    },
    /// The stream broke: a damaged file, a lost connection, an unplugged camera.
    #[error("{source_name} broke after {frames} frames: {detail}")]
    Broken {
        /// The source.
        source_name: String,
        /// Frames delivered before.
        frames: u64,
        /// What GStreamer said.
        detail: String,
    },
    /// A frame is not a picture that can be read.
    #[error("{source_name} gave a frame that cannot be read: {error}")]
    BadFrame {
        /// The source.
        source_name: String,
        /// What is wrong with it.
        #[source]
        error: FrameError,
    },
    /// GStreamer itself cannot be started.
    #[error("GStreamer does not start: {detail}; install gstreamer1.0-plugins-base and gstreamer1.0-plugins-good")]
    GStreamer {
        /// What GStreamer said.
        detail: String,
    },
}
