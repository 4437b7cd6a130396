//! Gradients against finite differences, for the tests of every layer.

use super::parameters::Plan;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Uniform values within ±`scale`.
pub(crate) fn random(len: usize, scale: f32, rng: &mut impl Rng) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-scale..scale)).collect()
}

/// Holds `gradients` of every tensor of the plan, along a random direction each, against the slope of `loss`.
pub(crate) fn check(plan: &Plan, values: &mut [f32], gradients: &[f32], mut loss: impl FnMut(&[f32]) -> f64) {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    for entry in plan.entries() {
        let direction = random(entry.range.len(), 1.0, &mut rng);
        let length = direction.iter().map(|d| d * d).sum::<f32>().sqrt();
        let along: f32 = gradients[entry.range.clone()].iter().zip(&direction).map(|(g, d)| g * d / length).sum();
        let kept = values[entry.range.clone()].to_vec();
        let mut at = |shift: f32, values: &mut [f32]| {
            for ((value, kept), d) in values[entry.range.clone()].iter_mut().zip(&kept).zip(&direction) {
                *value = kept + shift * d / length;
            }
            loss(values)
        };
        let step = 4e-3;
        let slope = (at(step, values) - at(-step, values)) / f64::from(2.0 * step);
        values[entry.range.clone()].copy_from_slice(&kept);
        let error = (slope - f64::from(along)).abs();
        assert!(error < 2e-3 + 0.02 * slope.abs(), "{}: {along} against {slope}", entry.name);
    }
}
