//! Tests of whether two evaluations of the same data differ by more than chance would have it.
//!
//! What is right or wrong of each record is tested by McNemar's exact test over the records where the two differ. All
//! else (means over classes, shares of cues, tokens) is tested by exchanging the two at random, record by record: how
//! often the difference comes out at least as large as it is.

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::tally::{Measure, Row, Tally};

/// Random exchanges.
pub const EXCHANGES: usize = 9999;

/// Seed of the exchanges.
const SEED: u64 = 2;

/// Differences that lie nearer than this are equal; sums in another order differ by less.
const EQUAL: f64 = 1e-12;

/// Two-sided p of McNemar's exact test, where `only_a` records are right in one evaluation alone and `only_b` in the
/// other alone: the probability of a split at least as uneven by tossing a coin for each.
pub fn mcnemar(only_a: u64, only_b: u64) -> f64 {
    let (few, all) = (only_a.min(only_b), only_a + only_b);
    // ln of the binomial coefficient over 2^all, from term to term.
    let mut term = -(all as f64) * std::f64::consts::LN_2;
    let mut tail = 0.0;
    for k in 0..=few {
        tail += term.exp();
        term += ((all - k) as f64).ln() - ((k + 1) as f64).ln();
    }
    (2.0 * tail).min(1.0)
}

/// Two-sided p of some measures by random exchange: (1 + exchanges at least as far apart) / (1 + [`EXCHANGES`]). `None`
/// where a measure is not defined of either. The rows of the two belong together by their place.
pub(super) fn exchange(a: &[Row], b: &[Row], measures: &[Measure]) -> Vec<Option<f64>> {
    let difference = |measure: &Measure, a: &Tally, b: &Tally| Some(measure.value(b)? - measure.value(a)?);
    let (same, different): (Vec<_>, Vec<_>) = a.iter().zip(b).partition(|(a, b)| a == b);
    let equal = Tally::of(same.iter().map(|(a, _)| *a));
    let (whole_a, whole_b) = (Tally::of(a), Tally::of(b));
    let found: Vec<Option<f64>> = measures.iter().map(|measure| difference(measure, &whole_a, &whole_b)).collect();
    let mut as_far = vec![0usize; measures.len()];
    let mut random = ChaCha8Rng::seed_from_u64(SEED);
    for _ in 0..EXCHANGES {
        let (mut one, mut other) = (equal.clone(), equal.clone());
        for stretch in different.chunks(64) {
            let mut bits = random.next_u64();
            for (a, b) in stretch {
                let (to_one, to_other) = if bits & 1 == 0 { (a, b) } else { (b, a) };
                one.add(to_one);
                other.add(to_other);
                bits >>= 1;
            }
        }
        for ((measure, found), as_far) in measures.iter().zip(&found).zip(&mut as_far) {
            // An exchange may leave one side without what the measure is a share of; that is no smaller difference.
            let drawn = difference(measure, &one, &other).map_or(f64::INFINITY, f64::abs);
            *as_far += usize::from(found.is_some_and(|found| drawn >= found.abs() - EQUAL));
        }
    }
    let p = |as_far: usize| (1 + as_far) as f64 / (1 + EXCHANGES) as f64;
    found.iter().zip(as_far).map(|(found, as_far)| found.map(|_| p(as_far))).collect()
}
