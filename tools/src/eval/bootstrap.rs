//! Percentile intervals by the bootstrap (Efron 1979): what the measures would be of samples drawn anew, with
//! replacement, from the records there are. Records are drawn without regard to their class, as the test data were.

use std::collections::BTreeMap;

use candor::verify::Emotion;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::tally::{Measure, Row, Tally};

/// Resamples.
pub const RESAMPLES: usize = 2000;

/// Seed of the draws.
const SEED: u64 = 1;

/// Share that lies within an interval.
const WITHIN: f64 = 0.95;

/// Lower and upper end.
pub type Interval = [f64; 2];

/// 95 % intervals of all that is measured. What is not defined of the records has none.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Intervals {
    /// Of the measures, by [`Measure::key`].
    pub measures: BTreeMap<&'static str, Interval>,
    /// Of the recall of each class.
    pub recall: BTreeMap<&'static str, Interval>,
}

/// Intervals of one evaluation.
pub(super) fn intervals(rows: &[Row]) -> Intervals {
    let tallies = resample(rows.len(), |index, tally: &mut Tally| tally.add(&rows[index]));
    let of = |value: &dyn Fn(&Tally) -> Option<f64>| interval(tallies.iter().filter_map(value).collect());
    let whole = Tally::of(rows);
    Intervals {
        measures: Measure::ALL
            .into_iter()
            .filter(|measure| measure.value(&whole).is_some())
            .filter_map(|measure| Some((measure.key(), of(&|tally| measure.value(tally))?)))
            .collect(),
        recall: Emotion::all()
            .filter(|&class| whole.recall(class).is_some())
            .filter_map(|class| Some((class.name(), of(&|tally| tally.recall(class))?)))
            .collect(),
    }
}

/// Draws `n` of `n` numbers with replacement, [`RESAMPLES`] times, and has each added to its resample.
pub(super) fn resample<T: Default>(n: usize, mut add: impl FnMut(usize, &mut T)) -> Vec<T> {
    let mut random = ChaCha8Rng::seed_from_u64(SEED);
    let resample = |_| {
        let mut sum = T::default();
        (0..n).for_each(|_| add(random.random_range(0..n), &mut sum));
        sum
    };
    (0..RESAMPLES).map(resample).collect()
}

/// The middle of some values, by the percentiles that numpy gives by default: linear between neighbours.
pub(crate) fn interval(mut values: Vec<f64>) -> Option<Interval> {
    values.sort_by(f64::total_cmp);
    let last = values.len().checked_sub(1)?;
    let at = |share: f64| {
        let place = share * last as f64;
        let (low, high) = (values[place.floor() as usize], values[place.ceil() as usize]);
        low + (high - low) * place.fract()
    };
    Some([at((1.0 - WITHIN) / 2.0), at((1.0 + WITHIN) / 2.0)])
}
