//! Opens files, cameras and pipelines with GStreamer and yields their [`Frame`]s, at the source's own size and rate.
//!
//! Every source becomes `… ! videoconvert ! video/x-raw,format=RGB ! appsink`. From files no frame is lost: the pipeline waits
//! while its queue of four frames is full. From live sources only the newest frame is held. Every wait has an end:
//! a source that neither gives a frame nor ends is reported as [`MediaError::Stalled`].

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use gstreamer as gst;
use gstreamer::prelude::*;
use gstreamer_app::AppSink;
use gstreamer_video::prelude::*;
use gstreamer_video::{VideoFrameRef, VideoInfo};

use super::frame::{Frame, FrameError, FrameSource, MediaError};

/// What a source's name says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceSpec {
    /// A video (or picture) file.
    File(PathBuf),
    /// A Video4Linux camera: its device, as `/dev/video0`.
    V4l2(String),
    /// A network camera: its `rtsp://` address.
    Rtsp(String),
    /// A moving test picture in which there is no face.
    Test,
    /// A GStreamer pipeline that ends in video, without a sink.
    Pipeline(String),
}

impl SourceSpec {
    /// Reads a source's name: `v4l2:/dev/video0`, `rtsp://…`, `test`, `gst:<pipeline>`, else the path of a file.
    pub fn parse(spec: &str) -> Result<Self, MediaError> {
        let bad = |reason: &str| MediaError::BadSource { spec: redact(spec), reason: reason.into() };
        let lower = spec.to_ascii_lowercase();
        if spec.contains('\0') {
            Err(bad("it holds a zero byte"))
        } else if spec.trim().is_empty() {
            Err(bad("it is empty"))
        } else if spec == "test" {
            Ok(Self::Test)
        } else if let Some(device) = spec.strip_prefix("v4l2:") {
            if device.starts_with('/') { Ok(Self::V4l2(device.into())) } else { Err(bad("no device after v4l2:")) }
        } else if let Some(pipeline) = spec.strip_prefix("gst:") {
            let pipeline = pipeline.trim().trim_end_matches('!').trim_end();
            if pipeline.is_empty() { Err(bad("no pipeline after gst:")) } else { Ok(Self::Pipeline(pipeline.into())) }
        } else if lower.starts_with("rtsp://") || lower.starts_with("rtsps://") {
            Ok(Self::Rtsp(spec.into()))
        } else if lower.split_once("://").is_some_and(|(scheme, _)| scheme.bytes().all(|b| b.is_ascii_alphanumeric())) {
            Err(bad("of addresses only rtsp:// is known (others can be read with gst:uridecodebin uri=…)"))
        } else {
            Ok(Self::File(spec.into()))
        }
    }

    /// The name for people and logs, without passwords.
    fn name(&self) -> String {
        match self {
            Self::File(path) => path.display().to_string(),
            Self::V4l2(device) => format!("v4l2:{device}"),
            Self::Rtsp(url) => redact(url),
            Self::Test => "test".into(),
            Self::Pipeline(text) => format!("gst:{text}"),
        }
    }
}

/// An address without its user and password.
fn redact(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.into() };
    let authority = rest.split('/').next().unwrap_or_default();
    match authority.rfind('@') {
        Some(at) => format!("{scheme}://{}", &rest[at + 1..]),
        None => url.into(),
    }
}

/// How long to wait for a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceOptions {
    /// Longest wait for a frame of a file.
    pub file_timeout: Duration,
    /// Longest wait for a frame of a live source, the first one included.
    pub live_timeout: Duration,
}

impl Default for SourceOptions {
    fn default() -> Self {
        // A file may lie on a slow disk and be decoded on a busy machine; a camera that is silent for seconds is gone.
        Self { file_timeout: Duration::from_secs(30), live_timeout: Duration::from_secs(10) }
    }
}

/// Frames held between the decoder and the reader of a file.
const FILE_QUEUE: u32 = 4;

/// How often a wait for a frame looks at the pipeline's errors.
const LOOK: gst::ClockTime = gst::ClockTime::from_mseconds(50);

/// The tail of every pipeline.
const TAIL: &str = "videoconvert ! video/x-raw,format=RGB ! appsink name=candor_sink sync=false";

/// What a camera is asked for: a picture of moderate size at a usable rate, raw or JPEG; whatever it has, if it has none.
const CAMERA_CAPS: &str = "video/x-raw,width=[160,1280],height=[120,960],framerate=[10/1,60/1]; \
                           image/jpeg,width=[160,1280],height=[120,960],framerate=[10/1,60/1]; video/x-raw; image/jpeg";

/// An open source; iterates over its frames.
///
/// The iterator ends at the true end of the stream. An error comes after the frames that were decoded before it, and
/// nothing comes after an error.
pub struct Source {
    spec: SourceSpec,
    pipeline: gst::Pipeline,
    sink: AppSink,
    bus: gst::Bus,
    clock: gst::Clock,
    live: bool,
    timeout: Duration,
    /// Entry of the conversion behind a decoder that finds its streams while running.
    entry: Option<gst::Pad>,
    /// Set when such a decoder has found all its streams.
    streams_known: Arc<AtomicBool>,
    missing: Vec<Missing>,
    failed: Option<MediaError>,
    finished: bool,
    stop: Arc<AtomicBool>,
    frames: u64,
    next_pts_s: f64,
}

/// A plugin that GStreamer said is missing.
#[derive(Debug, Clone)]
struct Missing {
    /// The format, as a caps name: "video/x-h265".
    format: String,
    /// What GStreamer calls it: "H.265 (Main Profile) decoder".
    name: String,
}

impl Source {
    /// Opens a source by its name, see [`SourceSpec::parse`].
    pub fn open(spec: &str, options: SourceOptions) -> Result<Self, MediaError> {
        Self::open_spec(SourceSpec::parse(spec)?, options)
    }

    /// Opens a source.
    pub fn open_spec(spec: SourceSpec, options: SourceOptions) -> Result<Self, MediaError> {
        gst::init().map_err(|error| MediaError::GStreamer { detail: error.to_string() })?;
        let pipeline = build(&spec, options)?;
        let broken = |detail: &str| MediaError::GStreamer { detail: detail.into() };
        let sink = pipeline.by_name("candor_sink").and_then(|sink| sink.downcast::<AppSink>().ok());
        let sink = sink.ok_or_else(|| broken("the pipeline has no appsink"))?;
        let bus = pipeline.bus().ok_or_else(|| broken("the pipeline has no bus"))?;
        let streams_known = Arc::new(AtomicBool::new(false));
        let entry = pipeline.by_name("candor_entry").and_then(|element| element.static_pad("sink"));
        if let (Some(decoder), Some(entry)) = (pipeline.by_name("candor_decoder"), &entry) {
            link_first_video(&decoder, entry, &streams_known);
        }
        let mut source = Self {
            live: !matches!(spec, SourceSpec::File(_)),
            timeout: options.live_timeout,
            spec,
            sink,
            bus,
            clock: gst::SystemClock::obtain(),
            entry,
            streams_known,
            missing: Vec::new(),
            failed: None,
            finished: false,
            stop: Arc::default(),
            frames: 0,
            next_pts_s: 0.0,
            pipeline,
        };
        if matches!(source.spec, SourceSpec::Pipeline(_)) {
            source.live = source.is_pipeline_live(options.live_timeout)?;
        }
        source.sink.set_drop(source.live);
        source.sink.set_max_buffers(if source.live { 1 } else { FILE_QUEUE });
        if !source.live {
            source.timeout = options.file_timeout;
        }
        if source.pipeline.set_state(gst::State::Playing).is_err() {
            return Err(source.start_failure());
        }
        log::debug!("opened {} (live: {})", source.spec.name(), source.live);
        Ok(source)
    }

    /// The source's name for people, without passwords.
    pub fn name(&self) -> String {
        self.spec.name()
    }

    /// Ends the source, even while it waits for a frame, once `stop` is set: as if the stream had ended.
    pub fn stop_with(&mut self, stop: Arc<AtomicBool>) {
        self.stop = stop;
    }

    /// Whether the pipeline of a `gst:` source is live: GStreamer tells when it is paused.
    fn is_pipeline_live(&mut self, timeout: Duration) -> Result<bool, MediaError> {
        let failed = |source: &mut Self| Err(source.start_failure());
        match self.pipeline.set_state(gst::State::Paused) {
            Err(_) => failed(self),
            Ok(gst::StateChangeSuccess::NoPreroll) => Ok(true),
            Ok(gst::StateChangeSuccess::Success) => Ok(false),
            Ok(gst::StateChangeSuccess::Async) => {
                let wait = gst::ClockTime::try_from(timeout).unwrap_or(gst::ClockTime::SECOND);
                match self.pipeline.state(wait).0 {
                    Err(_) => failed(self),
                    Ok(change) => Ok(change == gst::StateChangeSuccess::NoPreroll),
                }
            }
        }
    }

    /// The error of a pipeline that does not start.
    fn start_failure(&mut self) -> MediaError {
        self.bus_error().unwrap_or_else(|| self.failure("the pipeline does not start".into()))
    }

    /// Takes the pipeline's messages and gives the first error among them.
    fn bus_error(&mut self) -> Option<MediaError> {
        while let Some(message) = self.bus.pop() {
            match message.view() {
                gst::MessageView::Element(element) => self.missing.extend(element.structure().and_then(read_missing)),
                gst::MessageView::Error(error) => {
                    // The messages about missing plugins may come just behind the error.
                    while let Some(later) = self.bus.pop_filtered(&[gst::MessageType::Element]) {
                        self.missing.extend(later.structure().and_then(read_missing));
                    }
                    return Some(self.describe(&error.error()));
                }
                _ => {}
            }
        }
        None
    }

    fn describe(&self, error: &gst::glib::Error) -> MediaError {
        let source_name = self.spec.name();
        let detail = error.message().to_string();
        let no_type = error.matches(gst::StreamError::TypeNotFound) || error.matches(gst::StreamError::WrongType);
        let no_codec = error.matches(gst::StreamError::CodecNotFound)
            || error.matches(gst::CoreError::MissingPlugin)
            || error.matches(gst::StreamError::NotImplemented);
        if self.frames == 0 && no_type {
            MediaError::NotMedia { source_name, detail }
        } else if self.frames == 0 && (no_codec && self.entry.is_some() || self.knows_no_video()) {
            self.no_video()
        } else {
            self.failure(detail)
        }
    }

    /// Whether all streams are known and none is video that can be decoded.
    fn knows_no_video(&self) -> bool {
        self.streams_known.load(Ordering::SeqCst) && self.entry.as_ref().is_some_and(|entry| !entry.is_linked())
    }

    /// The error of a source whose streams are known and hold no video that can be decoded.
    fn no_video(&self) -> MediaError {
        let source_name = self.spec.name();
        match self.missing.iter().find(|missing| !is_other_track(&missing.format)) {
            Some(missing) => MediaError::MissingDecoder {
                source_name,
                codec: format!("{} ({})", missing.name, missing.format),
                hint: decoder_hint(&missing.format),
            },
            None => MediaError::NoVideoTrack { source_name },
        }
    }

    /// The error of a source that GStreamer gave up on.
    fn failure(&self, detail: String) -> MediaError {
        match &self.spec {
            SourceSpec::Rtsp(url) if self.frames == 0 => MediaError::Unreachable { url: redact(url), detail },
            SourceSpec::V4l2(device) if self.frames == 0 => MediaError::DeviceFailed { device: device.clone(), detail },
            spec => MediaError::Broken { source_name: spec.name(), frames: self.frames, detail },
        }
    }

    /// The next sample's frame, waiting at most `wait` for it.
    fn pull(&mut self, wait: gst::ClockTime) -> Option<Result<Frame, MediaError>> {
        let sample = self.sink.try_pull_sample(wait)?;
        let frame = self.read(&sample);
        match &frame {
            Ok(_) => self.frames += 1,
            Err(_) => self.finished = true,
        }
        Some(frame)
    }

    /// Copies a sample's picture out, row by row: rows of RGB are padded to a multiple of four bytes in GStreamer.
    fn read(&mut self, sample: &gst::SampleRef) -> Result<Frame, MediaError> {
        let broken = |detail: &str| self.failure(detail.into());
        let buffer = sample.buffer().ok_or_else(|| broken("a sample without a buffer"))?;
        let caps = sample.caps().ok_or_else(|| broken("a sample without a format"))?;
        let info = VideoInfo::from_caps(caps).map_err(|error| broken(&error.to_string()))?;
        let (width, height) = (info.width() as usize, info.height() as usize);
        let max = Frame::MAX_SIDE;
        if !(1..=max).contains(&width) || !(1..=max).contains(&height) {
            let error = FrameError::Size { width, height, max };
            return Err(MediaError::BadFrame { source_name: self.spec.name(), error });
        }
        let picture = VideoFrameRef::from_buffer_ref_readable(buffer, &info)
            .map_err(|_| broken("a buffer that cannot be read as a picture"))?;
        let stride = picture.plane_stride()[0].unsigned_abs() as usize;
        let data = picture.plane_data(0).map_err(|_| broken("a buffer without pixels"))?;
        let row = width * 3;
        if stride < row || data.len() < stride * (height - 1) + row {
            return Err(broken("a buffer smaller than its picture"));
        }
        let mut rgb = Vec::with_capacity(row * height);
        for line in data.chunks(stride).take(height) {
            rgb.extend_from_slice(&line[..row]);
        }
        let pts_s = self.media_time(sample, buffer);
        self.next_pts_s = pts_s + frame_duration_s(buffer, &info);
        Ok(Frame { rgb, width, height, pts_s, monotonic_s: seconds(self.clock.time()), wall: SystemTime::now() })
    }

    /// Media time of a buffer; one without a time stamp follows its predecessor.
    fn media_time(&self, sample: &gst::SampleRef, buffer: &gst::BufferRef) -> f64 {
        let stream_time = buffer.pts().and_then(|pts| {
            let segment = sample.segment()?.downcast_ref::<gst::ClockTime>()?;
            segment.to_stream_time(pts)
        });
        stream_time.map_or(self.next_pts_s, seconds)
    }
}

impl Iterator for Source {
    type Item = Result<Frame, MediaError>;

    fn next(&mut self) -> Option<Self::Item> {
        let start = Instant::now();
        while !self.finished {
            if self.stop.load(Ordering::SeqCst) {
                self.finished = true;
                return None;
            }
            let wait = if self.failed.is_some() { gst::ClockTime::ZERO } else { LOOK };
            if let Some(frame) = self.pull(wait) {
                return Some(frame);
            }
            if let Some(error) = self.failed.take() {
                self.finished = true;
                return Some(Err(error));
            }
            // Read before the messages: an error that caused the end was posted before it.
            let ended = self.sink.is_eos();
            let no_video = self.knows_no_video();
            self.failed = self.bus_error();
            if self.failed.is_some() {
                continue; // frames that came before the error go first
            }
            self.failed = if no_video {
                Some(self.no_video())
            } else if ended {
                self.finished = true;
                let source_name = self.spec.name();
                return (self.frames == 0).then_some(Err(MediaError::NoFrames { source_name }));
            } else if start.elapsed() >= self.timeout {
                Some(self.silence())
            } else {
                None
            };
        }
        None
    }
}

impl Source {
    /// The error of a source that gave nothing for as long as may be waited.
    fn silence(&self) -> MediaError {
        let waited = self.timeout;
        match &self.spec {
            SourceSpec::Rtsp(url) if self.frames == 0 => {
                MediaError::Unreachable { url: redact(url), detail: format!("no picture for {waited:?}") }
            }
            spec => MediaError::Stalled { source_name: spec.name(), waited },
        }
    }
}

impl FrameSource for Source {
    fn is_live(&self) -> bool {
        self.live
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        if self.pipeline.set_state(gst::State::Null).is_err() {
            log::warn!("{} did not close properly", self.spec.name());
        }
    }
}

fn seconds(time: gst::ClockTime) -> f64 {
    time.nseconds() as f64 * 1e-9
}

/// How long a frame is shown, by its buffer or by the stream's rate; 0 where neither says.
fn frame_duration_s(buffer: &gst::BufferRef, info: &VideoInfo) -> f64 {
    let rate = info.fps();
    match buffer.duration() {
        Some(duration) => seconds(duration),
        None if rate.numer() > 0 => f64::from(rate.denom()) / f64::from(rate.numer()),
        None => 0.0,
    }
}

/// Builds the pipeline of a source, not yet started.
fn build(spec: &SourceSpec, options: SourceOptions) -> Result<gst::Pipeline, MediaError> {
    // Jetson's decoders give out memory of the graphics unit, which only nvvidconv copies out of it.
    let (stop_at, copy_out) = match gst::ElementFactory::find("nvvidconv") {
        Some(_) => ("caps=video/x-raw(ANY)", "nvvidconv ! video/x-raw ! "),
        None => ("", ""),
    };
    let newest = "queue leaky=downstream max-size-buffers=1 max-size-bytes=0 max-size-time=0";
    // videoflip turns pictures upright by the orientation that the file's tags tell.
    let behind = |entry: &str| format!("{entry} name=candor_entry ! {copy_out}videoflip video-direction=auto ! {TAIL}");
    let decoder = |element: &str| format!("{element} name=candor_decoder {stop_at}");
    let text = match spec {
        SourceSpec::File(_) => format!("{} {}", decoder("uridecodebin"), behind("queue max-size-buffers=2")),
        SourceSpec::Rtsp(_) => format!("{} {}", decoder("uridecodebin"), behind(newest)),
        SourceSpec::V4l2(_) => format!(
            "v4l2src name=candor_camera do-timestamp=true ! capsfilter name=candor_caps ! {} {}",
            decoder("decodebin"),
            behind(newest)
        ),
        SourceSpec::Test => {
            format!("videotestsrc is-live=true ! video/x-raw,width=640,height=480,framerate=30/1 ! {newest} ! {TAIL}")
        }
        SourceSpec::Pipeline(text) => format!("{text} ! {TAIL}"),
    };
    if let SourceSpec::File(path) = spec {
        check_file(path)?;
    }
    if let SourceSpec::V4l2(device) = spec
        && !Path::new(device).exists()
    {
        return Err(MediaError::DeviceAbsent { device: device.clone() });
    }
    let element = gst::parse::launch(&text).map_err(|error| parse_error(spec, &text, &error))?;
    let not_a_pipeline =
        |_| MediaError::BadPipeline { pipeline: text.clone(), detail: "it is one element only".into() };
    let pipeline = element.downcast::<gst::Pipeline>().map_err(not_a_pipeline)?;
    let part = |name: &str| {
        let detail = format!("the pipeline has no {name}");
        pipeline.by_name(name).ok_or(MediaError::GStreamer { detail })
    };
    match spec {
        SourceSpec::File(path) => part("candor_decoder")?.set_property("uri", file_uri(path)?),
        SourceSpec::Rtsp(url) => {
            let decoder = part("candor_decoder")?;
            decoder.set_property("uri", url);
            let timeout_us = u64::try_from(options.live_timeout.as_micros()).unwrap_or(u64::MAX);
            decoder.connect("source-setup", false, move |values| {
                let camera = values.get(1).and_then(|value| value.get::<gst::Element>().ok())?;
                for (name, value) in [("latency", "100"), ("drop-on-latency", "true"), ("protocols", "tcp")] {
                    if camera.find_property(name).is_some() {
                        camera.set_property_from_str(name, value);
                    }
                }
                if camera.find_property("tcp-timeout").is_some() {
                    camera.set_property("tcp-timeout", timeout_us);
                }
                None
            });
        }
        SourceSpec::V4l2(device) => {
            part("candor_camera")?.set_property("device", device);
            part("candor_caps")?.set_property_from_str("caps", CAMERA_CAPS);
        }
        SourceSpec::Test | SourceSpec::Pipeline(_) => {}
    }
    Ok(pipeline)
}

/// Links the first video stream that a decoder finds to `entry`, and notes when it has found all its streams.
fn link_first_video(decoder: &gst::Element, entry: &gst::Pad, streams_known: &Arc<AtomicBool>) {
    // Sound and subtitles stay as they are: decoding them is work for nothing, and their decoders may be missing.
    decoder.connect("autoplug-continue", false, |values| {
        let caps = values.get(2).and_then(|value| value.get::<gst::Caps>().ok());
        let other = caps.and_then(|caps| caps.structure(0).map(|format| is_other_track(format.name())));
        Some((!other.unwrap_or(false)).to_value())
    });
    let video_entry = entry.clone();
    decoder.connect_pad_added(move |_, pad| {
        let caps = pad.current_caps().unwrap_or_else(|| pad.query_caps(None));
        let is_video = caps.structure(0).is_some_and(|format| format.name() == "video/x-raw");
        if is_video && !video_entry.is_linked() && pad.link(&video_entry).is_err() {
            log::warn!("a video stream of format {caps} cannot be linked");
        }
    });
    let known = Arc::clone(streams_known);
    decoder.connect_no_more_pads(move |_| known.store(true, Ordering::SeqCst));
}

/// Refuses what is not a readable file, before GStreamer could hang on it.
fn check_file(path: &Path) -> Result<(), MediaError> {
    let unreadable = |error| MediaError::UnreadableFile { path: path.into(), error };
    if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(MediaError::NotAFile { path: path.into() });
    }
    std::fs::File::open(path).map_err(unreadable)?;
    Ok(())
}

fn file_uri(path: &Path) -> Result<String, MediaError> {
    let absolute =
        std::path::absolute(path).map_err(|error| MediaError::UnreadableFile { path: path.into(), error })?;
    let uri = gst::glib::filename_to_uri(&absolute, None);
    let bad =
        |error: gst::glib::Error| MediaError::BadSource { spec: path.display().to_string(), reason: error.to_string() };
    Ok(uri.map_err(bad)?.to_string())
}

/// The error of a pipeline text that GStreamer cannot build.
fn parse_error(spec: &SourceSpec, text: &str, error: &gst::glib::Error) -> MediaError {
    let detail = error.message().to_string();
    if error.matches(gst::ParseError::NoSuchElement) {
        let element = detail.split('"').nth(1).unwrap_or(&detail).to_string();
        let hint = match (spec, element.as_str()) {
            (SourceSpec::Pipeline(_), _) => {
                "correct its name, or find and install its package (apt-cache search gstreamer1.0)"
            }
            (_, "v4l2src" | "videoflip") => "install gstreamer1.0-plugins-good",
            _ => "install gstreamer1.0-plugins-base",
        };
        return MediaError::MissingElement { element, hint: hint.into() };
    }
    let pipeline = match spec {
        SourceSpec::Pipeline(text) => text,
        _ => text,
    };
    MediaError::BadPipeline { pipeline: pipeline.to_string(), detail }
}

/// Reads GStreamer's message about a missing plugin.
fn read_missing(structure: &gst::StructureRef) -> Option<Missing> {
    if structure.name() != "missing-plugin" {
        return None;
    }
    let name = structure.get::<String>("name").unwrap_or_else(|_| "an unnamed format".into());
    let format = match structure.get::<gst::Caps>("detail") {
        Ok(caps) => caps.structure(0).map(|format| match format.get::<String>("media") {
            Ok(media) if format.name() == "application/x-rtp" => format!("{media}/x-rtp"),
            _ => format.name().to_string(),
        }),
        Err(_) => structure.get::<String>("detail").ok(),
    };
    Some(Missing { format: format.unwrap_or_default(), name })
}

/// Whether a format is that of sound, subtitles or other tracks beside the video.
fn is_other_track(format: &str) -> bool {
    ["audio/", "text/", "subpicture/", "subtitle/", "meta/", "closedcaption/"]
        .iter()
        .any(|kind| format.starts_with(kind))
}

/// Which Debian package holds the decoder of a format.
fn decoder_hint(format: &str) -> String {
    let package = match format {
        "video/x-theora" | "application/ogg" => "gstreamer1.0-plugins-base",
        "video/x-vp8" | "video/x-vp9" | "image/jpeg" | "image/png" | "rtsp" | "video/x-rtp" | "video/quicktime" => {
            "gstreamer1.0-plugins-good"
        }
        "video/x-av1" | "image/webp" => "gstreamer1.0-plugins-bad",
        _ => "gstreamer1.0-libav (or gstreamer1.0-plugins-bad)",
    };
    format!("install {package}")
}
