//! How sure a preference is: intervals by drawing pairs anew, Wilson's interval of a share, and the sign test.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::eval::bootstrap;
pub use crate::eval::bootstrap::Interval;

/// Standard deviations on either side that hold 95 % of a normal distribution.
const NORMAL_95: f64 = 1.959_963_984_540_054;
/// A statistic that is undefined for more than this share of the draws has no interval.
const MOST_UNDEFINED: f64 = 0.05;

/// 95 % interval of a statistic of units, by drawing as many of them anew with replacement, `draws` times; the ends are
/// percentiles. `None` for less than two units, or where the statistic is mostly undefined.
pub fn redrawn<U: Copy>(
    units: &[U],
    draws: usize,
    seed: u64,
    statistic: impl Fn(&[U]) -> Option<f64>,
) -> Option<Interval> {
    if units.len() < 2 {
        return None;
    }
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let mut drawn = units.to_vec();
    let values: Vec<f64> = (0..draws)
        .filter_map(|_| {
            drawn.iter_mut().for_each(|unit| *unit = units[generator.random_range(0..units.len())]);
            statistic(&drawn)
        })
        .collect();
    if values.is_empty() || (draws - values.len()) as f64 > MOST_UNDEFINED * draws as f64 {
        return None;
    }
    bootstrap::interval(values)
}

/// Wilson's 95 % interval of the share `of / all`. `None` without any.
pub fn wilson(of: usize, all: usize) -> Option<Interval> {
    if all == 0 {
        return None;
    }
    let (n, z2) = (all as f64, NORMAL_95 * NORMAL_95);
    let share = of as f64 / n;
    let middle = (share + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = NORMAL_95 / (1.0 + z2 / n) * (share * (1.0 - share) / n + z2 / (4.0 * n * n)).sqrt();
    Some([(middle - half).max(0.0), (middle + half).min(1.0)])
}

/// Two-sided exact sign test: how often a fair coin, thrown `for_a + for_b` times, falls as unevenly or more. 1 without
/// a throw.
pub fn sign_test(for_a: usize, for_b: usize) -> f64 {
    let (n, least) = (for_a + for_b, for_a.min(for_b));
    // Logarithms, as 2ⁿ leaves the range of numbers for more than a thousand pairs.
    let mut ln_ways = 0.0_f64;
    let mut below = 0.0;
    for k in 0..=least {
        if k > 0 {
            ln_ways += ((n - k + 1) as f64 / k as f64).ln();
        }
        below += (ln_ways - n as f64 * std::f64::consts::LN_2).exp();
    }
    (2.0 * below).min(1.0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-4
    }

    #[test]
    fn sign_tests_by_hand() {
        assert_eq!((sign_test(0, 0), sign_test(3, 3), sign_test(1, 0)), (1.0, 1.0, 1.0));
        // 2 · (1 + 5) / 32 and 2 / 1024.
        assert!(near(sign_test(1, 4), 0.375) && near(sign_test(4, 1), 0.375));
        assert!((sign_test(10, 0) - 2.0 / 1024.0).abs() < 1e-12);
        let many = sign_test(2400, 2600);
        // Normal approximation with continuity correction: z = 199 / √5000 = 2.814.
        assert!((many - 0.00489).abs() < 5e-5, "{many}");
    }

    #[test]
    fn wilson_intervals_of_textbooks() {
        let [low, high] = wilson(8, 10).unwrap();
        assert!(near(low, 0.4902) && near(high, 0.9433), "{low} {high}");
        let [low, high] = wilson(0, 10).unwrap();
        assert!(low == 0.0 && near(high, 0.2775), "{low} {high}");
        assert_eq!(wilson(0, 0), None);
    }

    #[test]
    fn bootstrap_intervals() {
        let mean = |units: &[f64]| Some(units.iter().sum::<f64>() / units.len() as f64);
        let units: Vec<f64> = (0..400).map(|i| f64::from(i % 2)).collect();
        let [low, high] = redrawn(&units, 4000, 1, mean).unwrap();
        // Mean 0.5, standard error 0.025.
        assert!((low - 0.451).abs() < 0.005 && (high - 0.549).abs() < 0.005, "{low} {high}");
        assert_eq!(redrawn(&units, 100, 2, mean), redrawn(&units, 100, 2, mean));
        assert_ne!(redrawn(&units, 100, 2, mean), redrawn(&units, 100, 3, mean));
        assert_eq!(redrawn(&units[..1], 100, 1, mean), None);
        assert_eq!(redrawn(&units, 100, 1, |_| None), None);
    }
}
