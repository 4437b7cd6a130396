//! The report of a run as one self-contained HTML page: frames, the emotion over time, every rationale with its
//! sentences coloured by what the verifier read in them. Stands behind the observations, beside the JSON lines.
//!
//! The page is written window by window to `FILE.part`, which browsers show as it is, so a crash loses nothing;
//! [`Report::finish`] adds the chart and gives it its name.

mod chart;
mod page;
mod picture;

use std::borrow::Borrow;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use crate::media::Frame;
use crate::observation::{Observation, Probabilities};
use chart::Point;
use picture::Picture;

/// Pictures stop when they fill this many bytes, so that a page stays quick to open.
const PICTURE_BUDGET: usize = 1_700_000;
/// At most so many pictures of a window.
const PICTURES_A_WINDOW: usize = 4;

/// Why a report could not be written.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The page could not be created, written or renamed.
    #[error("{path}: the report cannot be written: {source}")]
    Write {
        /// The file at fault.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A picture could not be encoded.
    #[error("a frame of window {window} cannot be written as a picture: {source}")]
    Picture {
        /// Number of the window.
        window: u64,
        /// What the encoder said.
        source: png::EncodingError,
    },
}

/// A report being written.
#[derive(Debug)]
pub struct Report {
    path: PathBuf,
    part: PathBuf,
    file: File,
    labels: Vec<String>,
    points: Vec<Point>,
    picture_bytes: usize,
    finished: bool,
}

impl Report {
    /// Starts a page that [`finish`](Self::finish) will put at `path`; until then an older file there stays.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self, ReportError> {
        let path = path.into();
        let mut part = path.clone().into_os_string();
        part.push(".part");
        let part = PathBuf::from(part);
        let file = File::create(&part).map_err(|source| ReportError::Write { path: part.clone(), source })?;
        let mut report =
            Self { path, part, file, labels: Vec::new(), points: Vec::new(), picture_bytes: 0, finished: false };
        report.write(&page::start())?;
        Ok(report)
    }

    /// Adds a window. `frames` are those the model saw, in the order that `observation.faces` counts them.
    pub fn push<F: Borrow<Frame>>(&mut self, observation: &Observation, frames: &[F]) -> Result<(), ReportError> {
        let mut html = String::new();
        if self.points.is_empty() {
            html.push_str(&page::head(observation));
        }
        let pictures = self.pictures(observation, frames)?;
        html.push_str(&page::window(observation, pictures.as_deref()));
        self.write(&html)?;
        self.note(observation);
        Ok(())
    }

    /// Adds the chart, closes the page and puts it in its place.
    pub fn finish(mut self) -> Result<(), ReportError> {
        self.close()
    }

    /// Where the page will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The window's pictures as data addresses; `None` once the budget is spent.
    fn pictures<F: Borrow<Frame>>(
        &mut self,
        observation: &Observation,
        frames: &[F],
    ) -> Result<Option<Vec<String>>, ReportError> {
        if self.picture_bytes >= PICTURE_BUDGET {
            return Ok(None);
        }
        let mut addresses = Vec::new();
        let chosen = frames.len().div_ceil(PICTURES_A_WINDOW).max(1);
        for (index, frame) in frames.iter().enumerate().step_by(chosen) {
            let frame: &Frame = frame.borrow();
            let Some(mut picture) = Picture::thumbnail(&frame.rgb, frame.width, frame.height) else { continue };
            for face in observation.faces.iter().filter(|face| face.frame == index) {
                picture.draw_box([face.x, face.y, face.width, face.height], frame.width);
            }
            let address = picture
                .data_address()
                .map_err(|source| ReportError::Picture { window: observation.window.index, source })?;
            self.picture_bytes += address.len();
            addresses.push(address);
        }
        Ok(Some(addresses))
    }

    /// Keeps what the chart will need.
    fn note(&mut self, observation: &Observation) {
        let both = [&observation.probabilities, &observation.fast_probabilities];
        for (label, _) in both.into_iter().flatten().flat_map(|probabilities| &probabilities.0) {
            if !self.labels.contains(label) {
                self.labels.push(label.clone());
            }
        }
        let values = |probabilities: &Option<Probabilities>| match probabilities {
            Some(known) => self.labels.iter().map(|label| known.of(label).unwrap_or_default()).collect(),
            None => Vec::new(),
        };
        self.points.push(Point {
            start_s: observation.window.start_s,
            end_s: observation.window.end_s,
            label: observation.label.clone(),
            probabilities: both.map(values),
        });
    }

    fn write(&mut self, html: &str) -> Result<(), ReportError> {
        self.file.write_all(html.as_bytes()).map_err(|source| ReportError::Write { path: self.part.clone(), source })
    }

    fn close(&mut self) -> Result<(), ReportError> {
        self.finished = true;
        self.write(&page::end(&chart::draw(&self.labels, &self.points)))?;
        let part = &self.part;
        self.file.sync_all().map_err(|source| ReportError::Write { path: part.clone(), source })?;
        fs::rename(part, &self.path).map_err(|source| ReportError::Write { path: self.path.clone(), source })
    }
}

impl Drop for Report {
    /// A run that ends early, by an error further up, still gets its page.
    fn drop(&mut self) {
        if !self.finished
            && let Err(error) = self.close()
        {
            log::warn!("{error}");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::manifest::Answer;
    use crate::observation::{Face, Identity, PolicyRecord, Times, Tokens, VERSION, WindowSpan};
    use crate::verify::{Emotion, GoEmotion, Sentence, Verdict};

    const LABELS: [&str; 7] = ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"];

    fn observation(index: u64) -> Observation {
        let labels = LABELS.map(str::to_string);
        let share = index as f64 / 16.0;
        let after = [0.02, 0.02, 0.06, 0.85 * share, 0.04, 0.85 * (1.0 - share), 0.01];
        let identity =
            |name: &str| Identity { name: name.into(), version: "1".into(), sha256: "0f".repeat(32), adapter: None };
        let sentence =
            |text: &str, label: GoEmotion, supports| Sentence { text: text.to_string(), labels: vec![label], supports };
        Observation {
            version: VERSION,
            source: "clip.mp4".into(),
            window: WindowSpan { index, start_s: index as f64, end_s: index as f64 + 2.0, frames: 2 },
            faces: vec![Face { frame: 1, x: 100.0, y: 60.0, width: 90.0, height: 90.0, score: 9.0 }],
            label: Some(if share < 0.5 { "sad" } else { "happy" }.into()),
            answer: Answer::After,
            probabilities: Some(Probabilities::new(&labels, &after)),
            fast_probabilities: Some(Probabilities::new(&labels, &after.map(|p| p * 0.8 + 0.02))),
            rationale: Some("The corners of the lips turn down. She seems sad. She may be angry.".into()),
            sentences: vec![
                sentence("The corners of the lips turn down.", GoEmotion::NEUTRAL, None),
                sentence("She seems sad.", Emotion::Sadness.go_emotion(), Some(true)),
                sentence("She may be angry.", Emotion::Anger.go_emotion(), Some(false)),
            ],
            verdict: Verdict::Mixed,
            policy: PolicyRecord { name: "guide".into(), n: Some(3), resampled: 1, withheld: false },
            model: identity("candor-default"),
            verifier: identity("candor-verifier"),
            seed: 7,
            tokens: Tokens { prompt: 90, generated: 40, extra: 12 },
            times: Times::default(),
        }
    }

    fn frame(seed: usize) -> Frame {
        let rgb = (0..320 * 180 * 3).map(|at| (at * 7 + at / 960 * 13 + seed * 31) as u8 & 0x7f).collect();
        Frame::from_rgb(rgb, 320, 180).unwrap()
    }

    fn written(report: Report) -> String {
        let path = report.path().to_path_buf();
        report.finish().unwrap();
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn a_page_holds_pictures_chart_sentences_and_nothing_from_outside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("demo.html");
        let mut report = Report::create(&path).unwrap();
        for index in 0..3 {
            report.push(&observation(index), &[frame(1), frame(2)]).unwrap();
        }
        assert!(!path.exists() && folder.path().join("demo.html.part").exists());
        let page = written(report);
        assert!(!folder.path().join("demo.html.part").exists());
        assert_eq!(page.matches("src=\"data:image/png;base64,").count(), 6);
        assert_eq!(page.matches("<svg").count(), 1);
        assert!(page.contains("<mark class=\"supports\">✓ She seems sad. <small>sadness</small></mark>"));
        assert!(page.contains("<mark class=\"contradicts\">✗ She may be angry. <small>anger</small></mark>"));
        assert!(page.contains("<mark class=\"silent\">· The corners of the lips turn down."));
        assert!(page.contains("policy guide(3)"));
        for outside in ["http://", "https://", "url(", "<script", "<link", "@import"] {
            assert!(!page.contains(outside), "{outside}");
        }
    }

    #[test]
    fn text_from_outside_stays_text() {
        let hostile = "<script>alert(1)</script><img src=x onerror='a'>\"&\0";
        let mut seen = observation(0);
        seen.source = hostile.into();
        seen.label = Some(hostile.into());
        seen.probabilities = Some(Probabilities(vec![(hostile.into(), 1.0)]));
        seen.fast_probabilities = seen.probabilities.clone();
        seen.sentences[0].text = hostile.into();
        seen.policy.name = hostile.into();
        for identity in [&mut seen.model, &mut seen.verifier] {
            *identity =
                Identity { name: hostile.into(), version: hostile.into(), sha256: hostile.into(), adapter: None };
        }
        let folder = tempfile::tempdir().unwrap();
        let mut report = Report::create(folder.path().join("page.html")).unwrap();
        report.push::<Frame>(&seen, &[]).unwrap();
        let page = written(report);
        assert!(!page.contains("<script") && !page.contains("<img") && !page.contains('\0'));
        assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;&lt;img src=x onerror=&#39;a&#39;&gt;&quot;&amp;"));
    }

    #[test]
    fn without_a_face_no_emotion_is_claimed_and_withheld_reasons_stay_out() {
        let mut faceless = observation(0);
        faceless.label = None;
        faceless.probabilities = None;
        faceless.fast_probabilities = None;
        faceless.sentences.clear();
        faceless.faces.clear();
        let mut withheld = observation(1);
        withheld.policy.withheld = true;
        withheld.rationale = None;
        let folder = tempfile::tempdir().unwrap();
        let mut report = Report::create(folder.path().join("page.html")).unwrap();
        report.push(&faceless, &[frame(1)]).unwrap();
        report.push(&withheld, &[frame(1)]).unwrap();
        let page = written(report);
        assert!(page.contains("no face, no emotion claimed"));
        assert!(page.contains("The reason is withheld.") && !page.contains("She seems sad."));
    }

    #[test]
    fn a_run_that_ends_early_leaves_a_whole_page_and_a_crash_a_readable_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("page.html");
        let mut report = Report::create(&path).unwrap();
        report.push(&observation(0), &[frame(1)]).unwrap();
        let part = fs::read_to_string(folder.path().join("page.html.part")).unwrap();
        assert!(part.contains("She seems sad."), "what was pushed is on disk");
        drop(report);
        let page = fs::read_to_string(&path).unwrap();
        assert!(page.starts_with(&part) && page.ends_with("</html>\n") && page.contains("<svg"));
    }

    #[test]
    fn pictures_stop_at_the_budget_and_windows_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let mut report = Report::create(folder.path().join("page.html")).unwrap();
        report.picture_bytes = PICTURE_BUDGET - 1;
        report.push(&observation(0), &vec![frame(1); 9]).unwrap();
        report.push(&observation(1), &[frame(1)]).unwrap();
        let page = written(report);
        assert_eq!(page.matches("<img").count(), 3, "every third of nine frames");
        assert_eq!(page.matches("<article").count(), 2);
        assert!(page.contains("as many as it can hold"));
    }

    #[test]
    fn no_window_and_no_folder() {
        let folder = tempfile::tempdir().unwrap();
        let page = written(Report::create(folder.path().join("page.html")).unwrap());
        assert!(page.contains("No window was seen."));
        let error = Report::create(folder.path().join("absent/page.html")).unwrap_err().to_string();
        assert!(error.contains("page.html.part") && error.contains("cannot be written"), "{error}");
    }
}
