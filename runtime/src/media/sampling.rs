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
    /// Takes a frame that the last window showed in the place of its neighbour: the rule's rounding shifts by a frame from
    /// window to window, and frames that are shown again need not be computed again. Off by default, as it is not the
    /// rule to the letter.
    pub steady: bool,
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
        Ok(Self { frames, window_s, step_s, buffer_bytes: Self::DEFAULT_BUFFER_BYTES, steady: false })
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
    /// Numbers of the pictures that the last window showed.
    shown: Vec<u64>,
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
            shown: Vec::new(),
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
        let wanted = sample_indices(self.stamps.len(), self.settings.frames).into_iter();
        let picked = wanted.filter_map(|index| self.pick(self.first_number + index as u64));
        let (shown, frames) = picked.map(|(number, frame)| (*number, Arc::clone(frame))).unzip();
        let span = (start_s, end_s.unwrap_or(start_s + self.settings.window_s));
        let index = self.origin_index + self.open;
        self.ready.push_back(make_window(index, span, (*first, *last), self.stamps.len(), frames));
        self.seen = self.first_number + self.stamps.len() as u64;
        self.given = true;
        self.shown = shown;
    }

    /// The picture to show for frame `number`.
    fn pick(&self, number: u64) -> Option<&(u64, Arc<Frame>)> {
        // So far apart that no two wanted frames have the same neighbour.
        let sparse = self.stamps.len() >= 4 * self.settings.frames;
        let again = self.shown.iter().filter(|_| self.settings.steady && sparse);
        let again = again.copied().find(|shown| shown.abs_diff(number) <= 1);
        self.nearest(again.unwrap_or(number))
    }

    /// The kept picture nearest to frame `number`.
    fn nearest(&self, number: u64) -> Option<&(u64, Arc<Frame>)> {
        let after = self.kept.partition_point(|(kept, _)| *kept < number);
        let candidates = [after.checked_sub(1), Some(after)].into_iter().flatten().filter_map(|i| self.kept.get(i));
        candidates.min_by_key(|(kept, _)| kept.abs_diff(number))
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Duration;

    use super::*;

    /// A source of tiny frames at given times, which ends or fails.
    struct Script {
        frames: std::vec::IntoIter<f64>,
        number: u8,
        fails: bool,
        live: bool,
        pace: Duration,
    }

    fn script(times: impl IntoIterator<Item = f64>) -> Script {
        let frames = times.into_iter().collect::<Vec<_>>().into_iter();
        Script { frames, number: 0, fails: false, live: false, pace: Duration::ZERO }
    }

    fn at_rate(frames: usize, per_second: f64) -> Script {
        script((0..frames).map(|i| i as f64 / per_second))
    }

    impl Iterator for Script {
        type Item = Result<Frame, MediaError>;

        fn next(&mut self) -> Option<Self::Item> {
            std::thread::sleep(self.pace);
            let Some(pts_s) = self.frames.next() else {
                return std::mem::take(&mut self.fails)
                    .then(|| Err(MediaError::NoVideoTrack { source_name: "script".into() }));
            };
            let mut frame = Frame::from_rgb(vec![self.number; 3], 1, 1).unwrap();
            (frame.pts_s, frame.monotonic_s) = (pts_s, pts_s + 100.0);
            self.number = self.number.wrapping_add(1);
            Some(Ok(frame))
        }
    }

    impl FrameSource for Script {
        fn is_live(&self) -> bool {
            self.live
        }
    }

    /// Start, end, count and the numbers of the sampled frames of each window.
    fn summary(windows: Windows) -> Vec<(f64, f64, usize, Vec<u8>)> {
        let brief = |window: Window| {
            let numbers = window.frames.iter().map(|frame| frame.rgb[0]).collect();
            (window.start_s, window.end_s, window.frame_count, numbers)
        };
        windows.map(|window| brief(window.unwrap())).collect()
    }

    fn windows(source: Script, frames: usize, window_s: f64, step_s: f64) -> Windows {
        Windows::new(source, WindowSettings::new(frames, window_s, step_s).unwrap())
    }

    #[test]
    fn the_indices_are_those_of_the_published_rule() {
        let cases: [(usize, usize, &[usize]); 12] = [
            (9, 8, &[1, 2, 3, 4, 5, 6, 7, 8]),
            (16, 8, &[1, 3, 5, 7, 8, 10, 12, 14]),
            (17, 8, &[1, 3, 5, 7, 9, 11, 13, 15]),
            (100, 8, &[6, 19, 31, 43, 56, 68, 80, 93]),
            (473, 4, &[59, 177, 295, 413]),
            (41, 8, &[3, 8, 13, 18, 23, 28, 33, 38]),
            (5, 4, &[1, 2, 3, 4]),
            (4, 4, &[0, 1, 2, 3]),
            (3, 4, &[0, 1, 2]),
            (1, 1, &[0]),
            (2, 1, &[1]),
            (0, 4, &[]),
        ];
        for (frame_count, wanted, indices) in cases {
            assert_eq!(sample_indices(frame_count, wanted), indices, "{frame_count} frames, {wanted} wanted");
        }
    }

    #[test]
    fn windows_step_through_media_time() {
        // 35 frames at 10 a second: three whole windows, and a last one of the frames from 2 s on.
        let got = summary(windows(at_rate(35, 10.0), 4, 2.0, 1.0));
        let indices = |first: u8, count: usize| -> Vec<u8> {
            sample_indices(count, 4).into_iter().map(|i| first + i as u8).collect()
        };
        assert_eq!(got.len(), 3);
        assert_eq!(got[0], (0.0, 2.0, 20, indices(0, 20)));
        assert_eq!(got[1], (1.0, 3.0, 20, indices(10, 20)));
        assert_eq!((got[2].0, got[2].2, &got[2].3), (2.0, 15, &indices(20, 15)));
        assert!((got[2].1 - 3.5).abs() < 1e-9);
    }

    #[test]
    fn the_last_window_is_given_only_where_it_shows_something_new_in_full() {
        // A clip that ends with a window has no other one behind it.
        assert_eq!(summary(windows(at_rate(20, 10.0), 4, 2.0, 1.0)).len(), 1);
        // A clip shorter than a window is one window, however few its frames.
        assert_eq!(summary(windows(at_rate(2, 10.0), 4, 2.0, 1.0)), [(0.0, 0.2, 2, vec![0, 1])]);
        assert_eq!(summary(windows(at_rate(1, 10.0), 4, 2.0, 1.0)), [(0.0, 2.0, 1, vec![0])]);
        assert_eq!(summary(windows(at_rate(0, 10.0), 4, 2.0, 1.0)), []);
        // A rest too short for four frames is not padded with black but left out; one that is long enough is given.
        assert_eq!(summary(windows(at_rate(23, 10.0), 4, 2.0, 2.0)).len(), 1);
        assert_eq!(summary(windows(at_rate(24, 10.0), 4, 2.0, 2.0)).len(), 2);
    }

    #[test]
    fn gaps_jitter_and_restarts_of_time() {
        // Windows that lie in a gap of the stream are skipped, at once even where it is a long one.
        let times = (0..20).map(|i| f64::from(i) * 0.1).chain((0..20).map(|i| 1e9 + f64::from(i) * 0.1));
        let got: Vec<Window> = windows(script(times), 4, 1.0, 1.0).map(Result::unwrap).collect();
        assert_eq!(got.iter().map(|window| window.frame_count).collect::<Vec<_>>(), [10, 10, 10, 10]);
        assert_eq!((got[1].index, got[2].index), (1, 1_000_000_000));
        // A small step back does not disturb the order; a large one starts anew, and no frame is lost.
        let jitter = [0.0, 0.1, 0.3, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];
        assert_eq!(summary(windows(script(jitter), 2, 1.0, 1.0))[0].2, 10);
        let restart = [5.0, 5.5, 6.0, 6.5, 0.0, 0.5, 1.0, 1.5].into_iter();
        let got: Vec<Window> = windows(script(restart), 2, 2.0, 1.0).map(Result::unwrap).collect();
        assert_eq!(got.iter().map(|window| window.frame_count).collect::<Vec<_>>(), [4, 4]);
        assert_eq!((got[0].start_s, got[1].start_s), (5.0, 0.0));
        assert!(got[1].index > got[0].index);
        // Between windows that do not touch, frames are left out.
        let got = summary(windows(at_rate(60, 10.0), 2, 1.0, 2.5));
        assert_eq!(
            got.iter().map(|window| (window.0, window.2)).collect::<Vec<_>>(),
            [(0.0, 10), (2.5, 10), (5.0, 10)]
        );
    }

    #[test]
    fn steady_windows_show_frames_again() {
        let shown = |steady| {
            let mut settings = WindowSettings::new(4, 2.0, 1.0).unwrap();
            settings.steady = steady;
            summary(Windows::new(at_rate(240, 24.0), settings))
        };
        let (plain, steady) = (shown(false), shown(true));
        assert_eq!(plain[0], steady[0]);
        let again = |windows: &[(f64, f64, usize, Vec<u8>)]| -> usize {
            windows.windows(2).map(|pair| pair[1].3.iter().filter(|number| pair[0].3.contains(number)).count()).sum()
        };
        assert_eq!((again(&plain), again(&steady)), (0, 2 * (steady.len() - 1)));
        for (plain, steady) in plain.iter().zip(&steady) {
            assert_eq!((plain.0, plain.1, plain.2), (steady.0, steady.1, steady.2));
            assert!(plain.3.iter().zip(&steady.3).all(|(a, b)| a.abs_diff(*b) <= 1), "{plain:?} {steady:?}");
            assert!(steady.3.is_sorted_by(|a, b| a < b));
        }
        // Where frames are few, each is shown once.
        let mut settings = WindowSettings::new(4, 0.5, 0.1).unwrap();
        settings.steady = true;
        assert_eq!(
            summary(Windows::new(at_rate(12, 10.0), settings)),
            summary(windows(at_rate(12, 10.0), 4, 0.5, 0.1))
        );
    }

    #[test]
    fn memory_is_bounded_and_the_sample_stays_close() {
        let mut settings = WindowSettings::new(4, 100.0, 100.0).unwrap();
        settings.buffer_bytes = 3 * 40;
        let mut builder = WindowBuilder::new(settings);
        for frame in at_rate(200, 2.0) {
            builder.push(frame.unwrap());
            assert!(builder.kept_bytes <= 3 * 40 && builder.kept.len() <= 40, "{} kept", builder.kept.len());
            assert_eq!(builder.kept_bytes, 3 * builder.kept.len());
        }
        builder.finish();
        let window = builder.ready.pop_front().unwrap();
        assert_eq!(window.frame_count, 200);
        for (frame, index) in window.frames.iter().zip(sample_indices(200, 4)) {
            assert!((i64::from(frame.rgb[0]) - index as i64).abs() <= 4, "{} for {index}", frame.rgb[0]);
        }
    }

    #[test]
    fn an_error_comes_after_the_frames_before_it() {
        for live in [false, true] {
            let source = Script { fails: true, live, ..at_rate(20, 10.0) };
            let mut windows = windows(source, 4, 2.0, 2.0);
            assert_eq!(windows.next().unwrap().unwrap().frame_count, 20);
            assert!(matches!(windows.next(), Some(Err(MediaError::NoVideoTrack { .. }))));
            assert!(windows.next().is_none() && windows.next().is_none());
        }
    }

    #[test]
    fn a_live_reader_gets_the_newest_window_and_a_file_reader_every_one() {
        let live = Script { live: true, pace: Duration::from_millis(1), ..at_rate(100, 10.0) };
        let mut late = windows(live, 2, 1.0, 1.0);
        let Inner::Latest(slot) = &late.inner else { panic!("a live source is read on its own thread") };
        while !slot.lock().ended {
            std::thread::sleep(Duration::from_millis(1));
        }
        let newest = late.next().unwrap().unwrap();
        assert_eq!((newest.index, newest.start_s, newest.frame_count), (9, 9.0, 10));
        assert!((newest.start_monotonic_s - 109.0).abs() < 1e-9 && (newest.end_monotonic_s - 109.9).abs() < 1e-9);
        assert!(late.next().is_none());
        assert_eq!(summary(windows(at_rate(100, 10.0), 2, 1.0, 1.0)).len(), 10);
    }

    #[test]
    fn a_whole_clip_is_one_exact_window() {
        let window = sample_clip(|| Ok(at_rate(100, 10.0)), 8).unwrap().unwrap();
        assert_eq!(window.frames.iter().map(|frame| frame.rgb[0]).collect::<Vec<_>>(), [6, 19, 31, 43, 56, 68, 80, 93]);
        assert_eq!((window.frame_count, window.start_s), (100, 0.0));
        assert!((window.end_s - 10.0).abs() < 1e-9);
        assert!(sample_clip(|| Ok(at_rate(0, 10.0)), 8).unwrap().is_none());
        assert!(sample_clip(|| Ok(Script { fails: true, ..at_rate(3, 10.0) }), 8).is_err());
    }

    #[test]
    fn settings_out_of_range_are_errors() {
        assert_eq!(WindowSettings::new(0, 1.0, 1.0), Err(SettingsError::Frames { frames: 0 }));
        assert_eq!(WindowSettings::new(1025, 1.0, 1.0), Err(SettingsError::Frames { frames: 1025 }));
        for seconds in [f64::NAN, f64::INFINITY, -1.0, 0.0, 1e-9, 3601.0] {
            assert!(WindowSettings::new(4, seconds, 1.0).is_err() && WindowSettings::new(4, 1.0, seconds).is_err());
        }
    }
}
