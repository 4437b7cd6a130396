//! What a training shows of itself: a progress bar, one JSON line a measurement in `metrics.jsonl`, and the curves
//! as a picture, `curves.svg`.

use super::checkpoint::write_atomically;
use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use plotters::prelude::*;
use serde_json::{Map, Value};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Name of the file of measurements.
const FILE_NAME: &str = "metrics.jsonl";
/// Measurements that one point of a curve averages.
const SMOOTHING: usize = 20;

/// The log of one run.
pub struct RunLog {
    folder: PathBuf,
    file: File,
    bar: ProgressBar,
    lines: Vec<Map<String, Value>>,
}

impl RunLog {
    /// Opens (or, from step `done` of a run cut off, goes on with) the log in a folder.
    pub fn open(folder: &Path, done: u64, total: u64) -> anyhow::Result<Self> {
        let path = folder.join(FILE_NAME);
        let before = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error).with_context(|| format!("{}", path.display())),
        };
        // Steps behind the checkpoint are done again, and a run that was killed may have left a part of a line. What is
        // kept is kept as it was written.
        let mut lines = Vec::new();
        let mut kept = Vec::with_capacity(before.len());
        for line in before.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n") && done > 0) {
            let Ok(parsed) = serde_json::from_slice::<Map<String, Value>>(line) else { continue };
            if parsed.get("step").and_then(Value::as_u64).is_some_and(|step| step <= done) {
                kept.extend_from_slice(line);
                lines.push(parsed);
            }
        }
        if kept != before {
            write_atomically(&path, &kept)?;
        }
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.with_context(|| format!("{}", path.display()))?;
        let bar = ProgressBar::new(total);
        bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} left {eta} {msg}")?);
        bar.set_position(done);
        Ok(Self { folder: folder.into(), file, bar, lines })
    }

    /// Writes one measurement at a step.
    pub fn write(&mut self, step: u64, measurement: Value) -> anyhow::Result<()> {
        let mut line = Map::new();
        line.insert("step".into(), step.into());
        if let Value::Object(map) = measurement {
            line.extend(map);
        }
        // In one piece, so that a run that is killed leaves whole lines behind, but for the last at worst.
        let text = format!("{}\n", Value::Object(line.clone()));
        let written = self.file.write_all(text.as_bytes());
        written.with_context(|| format!("cannot write {}", self.folder.join(FILE_NAME).display()))?;
        self.lines.push(line);
        Ok(())
    }

    /// Waits until all measurements are on the disk.
    pub fn sync(&self) -> anyhow::Result<()> {
        self.file.sync_data().with_context(|| format!("cannot write {}", self.folder.join(FILE_NAME).display()))
    }

    /// What has been measured.
    pub fn lines(&self) -> &[Map<String, Value>] {
        &self.lines
    }

    /// One measure over the steps.
    pub fn curve(&self, key: &str) -> Vec<(f64, f64)> {
        let point = |line: &Map<String, Value>| Some((line.get("step")?.as_f64()?, line.get(key)?.as_f64()?));
        self.lines.iter().filter_map(point).collect()
    }

    /// Moves the bar.
    pub fn show(&self, step: u64, message: String) {
        self.bar.set_position(step);
        self.bar.set_message(message);
    }

    /// Prints a line above the bar; without a terminal, to the error stream.
    pub fn say(&self, message: &str) {
        if self.bar.is_hidden() {
            eprintln!("{message}");
        } else {
            self.bar.println(message);
        }
    }

    /// Draws `curves.svg`: the training loss above, the named validation measures (between 0 and 1) below.
    pub fn draw(&self, title: &str, measures: &[&str]) -> anyhow::Result<()> {
        let losses = smooth(&self.curve("loss"), SMOOTHING);
        let last = self.lines.iter().filter_map(|line| line.get("step")?.as_f64()).fold(1.0, f64::max);
        let top = losses.iter().map(|point| point.1).fold(0.1, f64::max) * 1.05;
        let mut svg = String::new();
        {
            let area = SVGBackend::with_string(&mut svg, (900, 640)).into_drawing_area();
            area.fill(&WHITE)?;
            let (upper, lower) = area.split_vertically(320);
            let mut chart = ChartBuilder::on(&upper)
                .caption(format!("{title}: training loss"), ("sans-serif", 18))
                .margin(10)
                .x_label_area_size(30)
                .y_label_area_size(50)
                .build_cartesian_2d(0.0..last, 0.0..top)?;
            chart.configure_mesh().x_desc("step").draw()?;
            chart.draw_series(LineSeries::new(losses, BLUE.stroke_width(2)))?;
            let mut chart = ChartBuilder::on(&lower)
                .caption("validation", ("sans-serif", 18))
                .margin(10)
                .x_label_area_size(30)
                .y_label_area_size(50)
                .build_cartesian_2d(0.0..last, 0.0..1.0)?;
            chart.configure_mesh().x_desc("step").draw()?;
            for (index, key) in measures.iter().enumerate() {
                let colour = Palette99::pick(index).to_rgba();
                chart
                    .draw_series(LineSeries::new(self.curve(key), colour.stroke_width(2)))?
                    .label(*key)
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
            }
            chart.configure_series_labels().background_style(WHITE).border_style(BLACK).draw()?;
            area.present()?;
        }
        Ok(write_atomically(&self.folder.join("curves.svg"), svg.as_bytes())?)
    }
}

/// Means over stretches of a curve.
fn smooth(curve: &[(f64, f64)], stretch: usize) -> Vec<(f64, f64)> {
    let mean = |chunk: &[(f64, f64)]| {
        let n = chunk.len() as f64;
        (chunk.iter().map(|p| p.0).sum::<f64>() / n, chunk.iter().map(|p| p.1).sum::<f64>() / n)
    };
    curve.chunks(stretch.max(1)).map(mean).collect()
}

/// Points of a curve in a chart, about.
const POINTS: usize = 120;

/// Some curves over the steps as an SVG picture, smoothed where there are many points.
pub fn chart(title: &str, curves: &[(&str, Vec<(f64, f64)>)]) -> anyhow::Result<String> {
    let curves: Vec<(&str, Vec<(f64, f64)>)> =
        curves.iter().map(|(name, curve)| (*name, smooth(curve, curve.len().div_ceil(POINTS)))).collect();
    let points = || curves.iter().flat_map(|(_, curve)| curve);
    let last = points().map(|point| point.0).fold(1.0, f64::max);
    let (low, high) = points().fold((0.0f64, 0.0f64), |(low, high), point| (low.min(point.1), high.max(point.1)));
    let high = if high > low { high + 0.05 * (high - low) } else { low + 1.0 };
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (640, 320)).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 17))
            .margin(8)
            .x_label_area_size(32)
            .y_label_area_size(52)
            .build_cartesian_2d(0.0..last, low..high)?;
        chart.configure_mesh().x_desc("step").light_line_style(WHITE).draw()?;
        for (index, (name, curve)) in curves.iter().enumerate() {
            let colour = Palette99::pick(index).to_rgba();
            chart
                .draw_series(LineSeries::new(curve.iter().copied(), colour.stroke_width(2)))?
                .label(*name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
        }
        if curves.len() > 1 {
            chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
        }
        area.present()?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn a_log_goes_on_behind_the_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        let mut log = RunLog::open(folder.path(), 0, 5).unwrap();
        for step in 1..=4 {
            log.write(step, json!({"loss": 0.1 + 0.2 / step as f64})).unwrap();
        }
        drop(log);
        let whole = fs::read_to_string(&path).unwrap();
        // Killed in the midst of a line, with a checkpoint of step 3.
        fs::write(&path, format!("{whole}{{\"step\":5,\"lo")).unwrap();
        let mut log = RunLog::open(folder.path(), 3, 5).unwrap();
        assert_eq!(log.lines().len(), 3);
        let first_three: String = whole.split_inclusive('\n').take(3).collect();
        assert_eq!(fs::read_to_string(&path).unwrap(), first_three);
        log.write(4, json!({"loss": 0.1 + 0.2 / 4.0})).unwrap();
        log.sync().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), whole, "as if nothing had happened");
        assert_eq!(log.curve("loss").len(), 4);
        // Bytes that are no text, as a crash of the system leaves them, and a whole line without its end.
        fs::write(&path, [whole.as_bytes(), b"\x00\xff\x00\n{\"step\":2}"].concat()).unwrap();
        assert_eq!(RunLog::open(folder.path(), 9, 9).unwrap().lines().len(), 4);
        assert_eq!(fs::read_to_string(&path).unwrap(), whole);
        // Without a checkpoint all begins anew.
        assert!(RunLog::open(folder.path(), 0, 5).unwrap().lines().is_empty());
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
    }
}
