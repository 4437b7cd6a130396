//! Times of runs, and the figures that follow from them.

use std::time::Instant;

use anyhow::Result;
use serde::Serialize;

use super::work::Work;
use crate::memory;

/// Everything that was measured.
#[derive(Serialize)]
pub(super) struct Report {
    pub(super) model: String,
    pub(super) device: String,
    /// Null on a GPU.
    pub(super) threads: Option<usize>,
    pub(super) repeat: u32,
    pub(super) stages: Vec<Measured>,
    /// How fast memory was read.
    pub(super) read_roof_gb_s: f64,
    /// How fast f32 were multiplied and added.
    pub(super) compute_roof_gflop_s: f64,
    pub(super) peak_rss_mb: Option<f64>,
    /// What it was to be, before anything was loaded.
    pub(super) planned_mb: f64,
    /// The same of a GPU's.
    pub(super) planned_gpu_mb: f64,
}

/// What a run of a stage makes.
pub(super) struct Figures {
    pub(super) count: usize,
    pub(super) unit: &'static str,
    pub(super) positions: Option<usize>,
}

impl Figures {
    pub(super) fn of(count: usize, unit: &'static str) -> Self {
        Figures { count, unit, positions: None }
    }
}

/// A stage's figures. What has no meaning for it is null.
#[derive(Serialize)]
pub(super) struct Measured {
    pub(super) stage: &'static str,
    /// The median over the runs, and the shortest and the longest.
    pub(super) ms: f64,
    pub(super) spread_ms: [f64; 2],
    /// Every run.
    pub(super) runs_ms: Vec<f64>,
    /// Things that a run makes or reads.
    pub(super) count: usize,
    pub(super) unit: &'static str,
    pub(super) per_s: f64,
    /// Positions in the cache when a run starts.
    pub(super) positions: Option<usize>,
    /// Megabytes of weights and cache that a run reads, at the size they are stored in.
    pub(super) mb: Option<f64>,
    pub(super) gb_s: Option<f64>,
    /// Share of the speed at which memory was read. Only decode reads its weights again and again.
    pub(super) read_roof_percent: Option<f64>,
    pub(super) gflop: Option<f64>,
    pub(super) gflop_s: Option<f64>,
    /// Share of the speed at which f32 were multiplied and added; products of bytes can be above it.
    pub(super) compute_roof_percent: Option<f64>,
    /// Resident memory behind the runs.
    pub(super) rss_mb: Option<f64>,
}

impl Report {
    /// Fills in the shares of the roofs.
    pub(super) fn hold_against_roofs(&mut self) {
        let (read, compute) = (self.read_roof_gb_s, self.compute_roof_gflop_s);
        for stage in &mut self.stages {
            match stage.stage {
                "decode" => stage.read_roof_percent = stage.gb_s.map(|speed| 100.0 * speed / read),
                _ => stage.compute_roof_percent = stage.gflop_s.map(|speed| 100.0 * speed / compute),
            }
        }
    }
}

/// How long something took, time after time, in milliseconds.
#[derive(Default)]
pub(super) struct Times(Vec<f64>);

impl Times {
    /// Runs `work` once untimed, to fill caches and take buffers, then `repeat` times.
    pub(super) fn of(repeat: usize, mut work: impl FnMut() -> Result<()>) -> Result<Self> {
        Self::of_prepared(repeat, &mut (), |()| Ok(()), |()| work())
    }

    /// As [`Self::of`], with something untimed before each run.
    pub(super) fn of_prepared<T>(
        repeat: usize,
        state: &mut T,
        mut prepare: impl FnMut(&mut T) -> Result<()>,
        mut work: impl FnMut(&mut T) -> Result<()>,
    ) -> Result<Self> {
        prepare(state)?;
        work(state)?;
        let mut times = Times::default();
        for _ in 0..repeat {
            prepare(state)?;
            times.time(|| work(state))?;
        }
        Ok(times)
    }

    pub(super) fn time<T, E>(&mut self, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let start = Instant::now();
        let result = work();
        self.0.push(start.elapsed().as_secs_f64() * 1e3);
        result
    }

    pub(super) fn measured(self, stage: &'static str, figures: Figures, work: Work) -> Measured {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let ms = median(&sorted);
        let per_s = |amount: f64| amount * 1e3 / ms;
        Measured {
            stage,
            ms,
            spread_ms: [sorted.first().copied().unwrap_or_default(), sorted.last().copied().unwrap_or_default()],
            runs_ms: self.0,
            count: figures.count,
            unit: figures.unit,
            per_s: per_s(figures.count as f64),
            positions: figures.positions,
            mb: work.bytes.map(|bytes| bytes / 1e6),
            gb_s: work.bytes.map(|bytes| per_s(bytes / 1e9)),
            read_roof_percent: None,
            gflop: work.operations.map(|operations| operations / 1e9),
            gflop_s: work.operations.map(|operations| per_s(operations / 1e9)),
            compute_roof_percent: None,
            rss_mb: memory::bytes("VmRSS").map(|bytes| bytes as f64 / 1e6),
        }
    }
}

/// The middle of sorted times; never 0, as speeds are divided by it.
fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    let median = match sorted {
        [] => 0.0,
        _ if sorted.len().is_multiple_of(2) => (sorted[middle - 1] + sorted[middle]) / 2.0,
        _ => sorted[middle],
    };
    median.max(1e-6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_times_is_positive() {
        assert_eq!(median(&[1.0, 3.0, 5.0]), 3.0);
        assert_eq!(median(&[1.0, 3.0]), 2.0);
        assert!(median(&[]) > 0.0);
    }

    #[test]
    fn figures_follow_from_times_and_work() {
        let work = Work { bytes: Some(4e6), operations: Some(8e9) };
        let measured = Times(vec![4.0, 1.0, 2.0]).measured("decode", Figures::of(10, "tokens"), work);
        assert_eq!((measured.ms, measured.spread_ms, measured.per_s), (2.0, [1.0, 4.0], 5000.0));
        assert_eq!((measured.mb, measured.gb_s, measured.gflop_s), (Some(4.0), Some(2.0), Some(4000.0)));
        assert_eq!(measured.runs_ms, [4.0, 1.0, 2.0]);
        let mut report = Report {
            model: String::new(),
            device: String::new(),
            threads: Some(1),
            repeat: 3,
            stages: vec![measured],
            read_roof_gb_s: 8.0,
            compute_roof_gflop_s: 1.0,
            peak_rss_mb: None,
            planned_mb: 1.0,
            planned_gpu_mb: 0.0,
        };
        report.hold_against_roofs();
        assert_eq!(report.stages[0].read_roof_percent, Some(25.0));
        assert_eq!(report.stages[0].compute_roof_percent, None);
    }

    #[test]
    fn the_first_run_is_not_timed() {
        let mut log = Vec::new();
        let prepare = |log: &mut Vec<char>| {
            log.push('p');
            Ok(())
        };
        let work = |log: &mut Vec<char>| {
            log.push('w');
            Ok(())
        };
        let times = Times::of_prepared(2, &mut log, prepare, work).expect("nothing fails");
        assert_eq!((times.0.len(), log.iter().collect::<String>()), (2, "pwpwpw".to_owned()));
    }
}
