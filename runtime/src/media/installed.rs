//! What of GStreamer is installed, for `candor doctor`.

use gstreamer as gst;
use serde::Serialize;

use super::frame::MediaError;

/// Elements that sources are made of, and what for; the first ones every source needs.
const ELEMENTS: [(&str, &str, bool); 10] = [
    ("appsink", "every source", true),
    ("videoconvert", "every source", true),
    ("uridecodebin", "files and network cameras", false),
    ("qtdemux", "mp4 files", false),
    ("avdec_h264", "H.264 in software", false),
    ("jpegdec", "cameras that give JPEG", false),
    ("v4l2src", "USB cameras", false),
    ("rtspsrc", "network cameras", false),
    ("nvv4l2decoder", "H.264 on Jetson's decoder", false),
    ("nvarguscamerasrc", "Jetson's CSI cameras", false),
];

/// An element of GStreamer.
#[derive(Clone, Debug, Serialize)]
pub struct Element {
    /// Its name.
    pub name: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// Whether nothing works without it.
    pub needed: bool,
    /// Whether it is installed.
    pub found: bool,
}

/// GStreamer and the elements that sources are made of.
#[derive(Clone, Debug, Serialize)]
pub struct Installed {
    /// Such as "GStreamer 1.22.0".
    pub version: String,
    /// All that matter, installed or not.
    pub elements: Vec<Element>,
}

impl Installed {
    /// Of this machine.
    ///
    /// # Errors
    /// [`MediaError::GStreamer`] where GStreamer does not start.
    pub fn find() -> Result<Self, MediaError> {
        gst::init().map_err(|error| MediaError::GStreamer { detail: error.to_string() })?;
        let element = |(name, purpose, needed)| {
            let found = gst::ElementFactory::find(name).is_some();
            Element { name, purpose, needed, found }
        };
        Ok(Installed { version: gst::version_string().to_string(), elements: ELEMENTS.map(element).into() })
    }
}
