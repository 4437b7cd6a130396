//! Which frames the model sees: the N frames of a clip, and windows of a stream. Frames come from a
//! [`FrameSource`], windows go on to faces and pixels.
//!
//! A window is a clip of its own: its frames are sampled by the same rule as a whole clip's. Windows start at the
//! stream's first frame and then every `step_s` seconds of media time. At the end of a stream the open, shorter window is
//! given too if it is the only one, or if it holds a frame that no window held and enough frames to need no black ones.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::frame::{Frame, FrameSource, MediaError, Window};

/// The frames at which a clip of `frame_count` frames is sampled for a model that takes `wanted`: the middles of equal
/// segments, `round(segment * i + segment / 2 + 1e-6)` with `segment = (frame_count - 1) / wanted`, rounded half to even.
///
/// A clip with fewer frames gives them all; the missing ones are black pictures.
pub fn sample_indices(frame_count: usize, wanted: usize) -> Vec<usize> {
    if frame_count <= wanted {
        return (0..frame_count).collect();
    }
    let segment = (frame_count - 1) as f64 / wanted as f64;
    (0..wanted).map(|i| (segment * i as f64 + segment / 2.0 + 1e-6).round_ties_even() as usize).collect()
}

/// Reads a whole clip as one window of at most `wanted` frames. The clip is opened and decoded twice, first to count and
/// then to pick, so that memory never holds more than the picked frames. `None` where the source has no frame.
pub fn sample_clip<S: FrameSource>(
    mut open: impl FnMut() -> Result<S, MediaError>,
    wanted: usize,
) -> Result<Option<Window>, MediaError> {
    let mut frame_count = 0;
    for frame in open()? {
        frame?;
        frame_count += 1;
    }
    let mut indices = sample_indices(frame_count, wanted).into_iter().peekable();
    let mut frames = Vec::new();
    let mut ends: Option<(Stamp, Stamp)> = None;
    for (number, frame) in open()?.enumerate() {
        let frame = frame?;
        let stamp = Stamp::of(&frame);
        ends = Some((ends.map_or(stamp, |(first, _)| first), stamp));
        if indices.next_if_eq(&number).is_some() {
            frames.push(Arc::new(frame));
        }
    }
    Ok(ends.map(|(first, last)| {
        let interval = (last.pts_s - first.pts_s) / (frame_count.max(2) - 1) as f64;
        make_window(0, (first.pts_s, last.pts_s + interval), (first, last), frame_count, frames)
    }))
}

/// How a stream is cut into windows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WindowSettings {
    /// Frames that the model takes, 1 to 1024.
    pub frames: usize,
    /// Length of a window in seconds of media time, 0.05 to 3600.
    pub window_s: f64,
    /// From the start of a window to the start of the next, in seconds, 0.05 to 3600.
    pub step_s: f64,
    /// Bytes of pictures to hold at most while a window fills. Beyond it every second picture is let go (never fewer than
    /// twice `frames` are kept), and a sampled frame is then the nearest that was kept.
    pub buffer_bytes: usize,
}

impl WindowSettings {
    /// Pictures held at most by default: two seconds of 30 frames of 1280x720 fit whole.
    pub const DEFAULT_BUFFER_BYTES: usize = 192 << 20;

    /// Windows of `window_s` seconds every `step_s` seconds, `frames` pictures each.
    pub fn new(frames: usize, window_s: f64, step_s: f64) -> Result<Self, SettingsError> {
        if !(1..=1024).contains(&frames) {
            return Err(SettingsError::Frames { frames });
        }
        for (name, seconds) in [("window_s", window_s), ("step_s", step_s)] {
            if !(0.05..=3600.0).contains(&seconds) {
                return Err(SettingsError::Seconds { name, seconds });
            }
        }
        Ok(Self { frames, window_s, step_s, buffer_bytes: Self::DEFAULT_BUFFER_BYTES })
    }
}

/// Window settings out of range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SettingsError {
    /// The number of frames.
    #[error("{frames} frames a window: give 1 to 1024")]
    Frames {
        /// As given.
        frames: usize,
    },
    /// A length of time.
    #[error("{name} = {seconds}: give 0.05 to 3600 seconds")]
    Seconds {
        /// The setting.
        name: &'static str,
        /// As given.
        seconds: f64,
    },
}

/// A frame's times without its pixels.
#[derive(Debug, Clone, Copy)]
struct Stamp {
    pts_s: f64,
    monotonic_s: f64,
    wall: SystemTime,
}

impl Stamp {
    fn of(frame: &Frame) -> Self {
        Self { pts_s: frame.pts_s, monotonic_s: frame.monotonic_s, wall: frame.wall }
    }
}

fn make_window(
    index: u64,
    (start_s, end_s): (f64, f64),
    (first, last): (Stamp, Stamp),
    frame_count: usize,
    frames: Vec<Arc<Frame>>,
) -> Window {
    Window {
        index,
        start_s,
        end_s,
        start_monotonic_s: first.monotonic_s,
        end_monotonic_s: last.monotonic_s,
        start_wall: first.wall,
        end_wall: last.wall,
        frame_count,
        frames,
    }
}

/// Gathers frames and closes windows. Knows the times of every frame of the open window, so that sampling is exact, and
/// holds the pictures themselves within the byte budget.
#[derive(Debug)]
struct WindowBuilder {
    settings: WindowSettings,
    /// Media time of window `origin_index`; `None` before the first frame.
    origin: Option<f64>,
    /// Number of the window that starts at `origin`.
    origin_index: u64,
    /// The open window, counted from `origin`.
    open: u64,
    /// Times of the frames from the open window's start on; the first is frame `first_number` of the stream.
    stamps: VecDeque<Stamp>,
    first_number: u64,
    /// Pictures that were kept of those frames, with their numbers in the stream.
    kept: VecDeque<(u64, Arc<Frame>)>,
    kept_bytes: usize,
    /// Of this many pictures one is kept.
    stride: u64,
    /// Frames before this number were in a window already.
    seen: u64,
    /// Whether a window was given since `origin`.
    given: bool,
    /// Media time of the newest frame.
    newest_s: Option<f64>,
    ready: VecDeque<Window>,
}

/// A step back in media time by more than this many seconds starts the windows anew (a stream that was restarted);
/// a smaller one is jitter.
const RESTART_S: f64 = 0.5;

impl WindowBuilder {
    fn new(settings: WindowSettings) -> Self {
        Self {
            settings,
            origin: None,
            origin_index: 0,
            open: 0,
            stamps: VecDeque::new(),
            first_number: 0,
            kept: VecDeque::new(),
            kept_bytes: 0,
            stride: 1,
            seen: 0,
            given: false,
            newest_s: None,
            ready: VecDeque::new(),
        }
    }

    fn push(&mut self, frame: Frame) {
        let mut stamp = Stamp::of(&frame);
        if let Some(newest_s) = self.newest_s {
            if stamp.pts_s < newest_s - RESTART_S {
                self.finish();
            } else {
                stamp.pts_s = stamp.pts_s.max(newest_s);
            }
        }
        self.newest_s = Some(stamp.pts_s);
        let origin = *self.origin.get_or_insert(stamp.pts_s);
        let WindowSettings { window_s, step_s, .. } = self.settings;
        while stamp.pts_s >= origin + self.open as f64 * step_s + window_s {
            self.close(None);
            self.open += 1;
            self.let_go(origin + self.open as f64 * step_s);
            if self.stamps.is_empty() {
                // Nothing is left of the past: go straight to the first window that can hold this frame.
                let passed = ((stamp.pts_s - origin - window_s) / step_s).floor();
                self.open = self.open.max(passed as u64);
                if origin + self.open as f64 * step_s + window_s <= stamp.pts_s {
                    self.open += 1;
                }
                break;
            }
        }
        if stamp.pts_s < origin + self.open as f64 * step_s {
            self.first_number += 1; // between windows
            return;
        }
        let number = self.first_number + self.stamps.len() as u64;
        self.stamps.push_back(stamp);
        if number.is_multiple_of(self.stride) {
            self.kept_bytes += frame.rgb.len();
            self.kept.push_back((number, Arc::new(frame)));
            self.thin();
        }
    }

    /// Lets every second picture go while there are too many bytes of them.
    fn thin(&mut self) {
        while self.kept_bytes > self.settings.buffer_bytes && self.kept.len() >= 4 * self.settings.frames {
            self.stride *= 2;
            let stride = self.stride;
            self.kept.retain(|(number, _)| number.is_multiple_of(stride));
            self.kept_bytes = self.kept.iter().map(|(_, frame)| frame.rgb.len()).sum();
        }
    }

    /// Lets go what lies before `start_s`.
    fn let_go(&mut self, start_s: f64) {
        let old = self.stamps.partition_point(|stamp| stamp.pts_s < start_s);
        self.stamps.drain(..old);
        self.first_number += old as u64;
        while self.kept.front().is_some_and(|(number, _)| *number < self.first_number) {
            if let Some((_, frame)) = self.kept.pop_front() {
                self.kept_bytes -= frame.rgb.len();
            }
        }
    }

    /// Gives out the open window, which holds all the frames there are; `end_s` where it ends early.
    fn close(&mut self, end_s: Option<f64>) {
        let (Some(origin), Some(first), Some(last)) = (self.origin, self.stamps.front(), self.stamps.back()) else {
            return;
        };
        let start_s = origin + self.open as f64 * self.settings.step_s;
        let frames: Vec<Arc<Frame>> = sample_indices(self.stamps.len(), self.settings.frames)
            .into_iter()
            .filter_map(|index| self.nearest(self.first_number + index as u64))
            .collect();
        let span = (start_s, end_s.unwrap_or(start_s + self.settings.window_s));
        let index = self.origin_index + self.open;
        self.ready.push_back(make_window(index, span, (*first, *last), self.stamps.len(), frames));
        self.seen = self.first_number + self.stamps.len() as u64;
        self.given = true;
    }

    /// The kept picture nearest to frame `number`.
    fn nearest(&self, number: u64) -> Option<Arc<Frame>> {
        let after = self.kept.partition_point(|(kept, _)| *kept < number);
        let candidates = [after.checked_sub(1), Some(after)].into_iter().flatten().filter_map(|i| self.kept.get(i));
        candidates.min_by_key(|(kept, _)| kept.abs_diff(number)).map(|(_, frame)| Arc::clone(frame))
    }

    /// The stream ended, or starts anew: gives the last, shorter window out by the rule above and forgets all frames.
    fn finish(&mut self) {
        let count = self.stamps.len();
        let end_number = self.first_number + count as u64;
        let new = end_number > self.seen;
        if let (Some(origin), Some(first), Some(last)) = (self.origin, self.stamps.front(), self.stamps.back())
            && new
            && (!self.given || count >= self.settings.frames)
        {
            let start_s = origin + self.open as f64 * self.settings.step_s;
            let full = start_s + self.settings.window_s;
            let end_s = match count {
                1 => full,
                _ => full.min(last.pts_s + (last.pts_s - first.pts_s) / (count - 1) as f64),
            };
            self.close(Some(end_s));
            self.open += 1;
        }
        self.let_go(f64::INFINITY);
        self.origin_index += self.open;
        (self.origin, self.open, self.given) = (None, 0, false);
    }
}

/// The windows of a source, oldest first.
///
/// From a file no frame is lost, however slow the reader. From a live source frames are gathered on a thread of their own
/// while the reader works, and the reader always gets the newest whole window: windows it had no time for are skipped,
/// which shows as a gap in [`Window::index`]. An error comes after the windows that were complete before it.
pub struct Windows {
    inner: Inner,
}

enum Inner {
    Lossless { source: Box<dyn FrameSource>, builder: Box<WindowBuilder>, failed: Option<MediaError>, ended: bool },
    Latest(Arc<LatestSlot>),
}

impl Windows {
    /// Cuts `source` into windows; starts the gathering thread where the source is live.
    pub fn new(source: impl FrameSource + 'static, settings: WindowSettings) -> Self {
        let builder = WindowBuilder::new(settings);
        if !source.is_live() {
            let (source, builder) = (Box::new(source), Box::new(builder));
            return Self { inner: Inner::Lossless { source, builder, failed: None, ended: false } };
        }
        let slot = Arc::new(LatestSlot::default());
        let filling = Arc::clone(&slot);
        std::thread::spawn(move || gather(source, builder, &filling));
        Self { inner: Inner::Latest(slot) }
    }
}

impl Iterator for Windows {
    type Item = Result<Window, MediaError>;

    fn next(&mut self) -> Option<Self::Item> {
        match &mut self.inner {
            Inner::Lossless { source, builder, failed, ended } => loop {
                if let Some(window) = builder.ready.pop_front() {
                    return Some(Ok(window));
                }
                if *ended {
                    return failed.take().map(Err);
                }
                match source.next() {
                    Some(Ok(frame)) => builder.push(frame),
                    end => {
                        *failed = end.and_then(Result::err);
                        *ended = true;
                        builder.finish();
                    }
                }
            },
            Inner::Latest(slot) => slot.take(),
        }
    }
}

impl Drop for Windows {
    fn drop(&mut self) {
        if let Inner::Latest(slot) = &self.inner {
            slot.lock().reader_gone = true;
        }
    }
}

/// Where the gathering thread leaves the newest window for the reader.
#[derive(Default)]
struct LatestSlot {
    state: Mutex<SlotState>,
    changed: Condvar,
}

#[derive(Default)]
struct SlotState {
    window: Option<Window>,
    failed: Option<MediaError>,
    ended: bool,
    reader_gone: bool,
}

impl LatestSlot {
    fn lock(&self) -> MutexGuard<'_, SlotState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Option<Result<Window, MediaError>> {
        let mut state = self.lock();
        loop {
            if let Some(window) = state.window.take() {
                return Some(Ok(window));
            }
            if state.ended {
                return state.failed.take().map(Err);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Ends the wait of the reader however the gathering thread ends.
struct EndOnDrop<'a>(&'a LatestSlot);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}

fn gather(source: impl FrameSource, mut builder: WindowBuilder, slot: &LatestSlot) {
    let _end = EndOnDrop(slot);
    for frame in source {
        let failed = match frame {
            Ok(frame) => {
                builder.push(frame);
                None
            }
            Err(error) => Some(error),
        };
        let mut state = slot.lock();
        if state.reader_gone {
            return;
        }
        if let Some(window) = builder.ready.drain(..).next_back() {
            state.window = Some(window);
            slot.changed.notify_all();
        }
        if failed.is_some() {
            state.failed = failed;
            break;
        }
    }
    builder.finish();
    if let Some(window) = builder.ready.pop_back() {
        slot.lock().window = Some(window);
    }
}
