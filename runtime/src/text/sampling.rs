//! Choosing a token from logits: greedy, or by temperature and top-p with a seeded generator.
//!
//! Equal logits, settings and seed give equal tokens on every machine: random numbers come from ChaCha, and what is made of
//! them is defined in [`candor_kernels::choice`].

use candor_kernels::Choice;
use candor_kernels::choice::choose;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::grammar::Mask;

pub use candor_kernels::ChoiceError as SamplingError;

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most probable token.
    pub temperature: f32,
    /// Keeps the fewest tokens whose probabilities together reach this; 1 keeps all.
    pub top_p: f32,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Sampling {
    /// The most probable token, always.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0, seed: 0 };
}

/// Chooses tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    settings: Sampling,
    random: ChaCha8Rng,
    /// Reused between tokens: candidate ids with their weights.
    candidates: Vec<(u32, f64)>,
}

impl Sampler {
    /// Checks the settings: temperature finite and at least 0, top-p above 0 and at most 1.
    pub fn new(settings: Sampling) -> Result<Sampler, SamplingError> {
        let Sampling { temperature, top_p, seed } = settings;
        if !(temperature.is_finite() && temperature >= 0.0) {
            let range = "a number from 0 up";
            return Err(SamplingError::Setting { setting: "temperature", value: temperature, range });
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(SamplingError::Setting { setting: "top_p", value: top_p, range: "above 0 and at most 1" });
        }
        Ok(Sampler { settings, random: ChaCha8Rng::seed_from_u64(seed), candidates: Vec::new() })
    }

    /// Lets a choice go by that needs none: what is drawn afterwards is as if it had been made.
    pub(super) fn pass(&mut self) {
        if self.settings.temperature != 0.0 {
            self.random.next_u64();
        }
    }

    /// How the next token is chosen; draws a number where one is needed.
    pub fn draw(&mut self) -> Choice {
        let Sampling { temperature, top_p, .. } = self.settings;
        if temperature == 0.0 {
            return Choice::Greedy;
        }
        // 53 random bits: every multiple of 2^-53 below 1.
        let point = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        Choice::Drawn { temperature, top_p, point }
    }

    /// Chooses one of the allowed tokens by their `logits` `[vocabulary]`. Of equally probable tokens the lower id comes
    /// first. `forbidden` tokens are not chosen even where the mask allows them.
    pub fn choose(&mut self, logits: &[f32], mask: &Mask, forbidden: &[u32]) -> Result<u32, SamplingError> {
        let choice = self.draw();
        choose(logits, mask.allowed(), forbidden, choice, &mut self.candidates)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(temperature: f32, top_p: f32, seed: u64) -> Sampler {
        Sampler::new(Sampling { temperature, top_p, seed }).expect("the settings are in range")
    }

    fn all(vocabulary: u32) -> Mask {
        Mask::Few((0..vocabulary).collect())
    }

    #[test]
    fn greedy_takes_the_first_of_the_greatest_that_is_allowed() {
        let logits = [1.0, 5.0, 3.0, 5.0, 9.0];
        let mut greedy = sampler(0.0, 1.0, 0);
        assert_eq!(greedy.choose(&logits, &all(5), &[]), Ok(4));
        assert_eq!(greedy.choose(&logits, &all(5), &[4]), Ok(1));
        assert_eq!(greedy.choose(&logits, &Mask::Few(vec![0, 2]), &[]), Ok(2));
        let bits = Mask::Many { bits: vec![0b1001], count: 2 };
        assert_eq!(greedy.choose(&logits, &bits, &[]), Ok(3));
        assert_eq!(greedy.choose(&logits, &Mask::Few(vec![2]), &[2]), Err(SamplingError::NothingAllowed));
    }

    #[test]
    fn shares_follow_the_probabilities() {
        let logits = [0.5f32.ln(), 0.3f32.ln(), 0.2f32.ln()];
        for (temperature, top_p, expected) in [
            (1.0, 1.0, [0.5, 0.3, 0.2]),
            (1.0, 0.7, [0.625, 0.375, 0.0]),
            (1.0, 0.4, [1.0, 0.0, 0.0]),
            (0.5, 1.0, [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38]),
        ] {
            let mut sampler = sampler(temperature, top_p, 7);
            let mut counts = [0.0f64; 3];
            for _ in 0..20_000 {
                counts[sampler.choose(&logits, &all(3), &[]).expect("the logits are finite") as usize] +=
                    1.0 / 20_000.0;
            }
            for (count, expected) in counts.iter().zip(expected) {
                assert!((count - expected).abs() < 0.015, "{temperature} {top_p}: {counts:?}");
                assert!(expected > 0.0 || *count == 0.0, "{temperature} {top_p}: {counts:?}");
            }
        }
    }

    #[test]
    fn a_seed_gives_the_same_tokens_for_ever() {
        let logits: Vec<f32> = (0..40u16).map(|id| f32::from(id * 37 % 40) / 8.0).collect();
        let mut sampler = sampler(0.9, 0.95, 42);
        let drawn: Vec<u32> =
            (0..16).map(|_| sampler.choose(&logits, &all(40), &[]).expect("the logits are finite")).collect();
        assert_eq!(drawn, [16, 19, 28, 29, 1, 14, 1, 17, 30, 14, 15, 5, 6, 2, 3, 14]);
    }

    #[test]
    fn what_is_no_number_is_refused() {
        let mut sampler = sampler(1.0, 0.9, 0);
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = sampler.choose(&[0.0, value], &Mask::Few(vec![0]), &[]).expect_err("not finite");
            assert!(matches!(error, SamplingError::NotFinite { id: 1, .. }), "{error}");
        }
        for (temperature, top_p) in [(-1.0, 1.0), (f32::NAN, 1.0), (1.0, 0.0), (1.0, 1.1), (1.0, f32::NAN)] {
            assert!(Sampler::new(Sampling { temperature, top_p, seed: 0 }).is_err(), "{temperature} {top_p}");
        }
    }
}
