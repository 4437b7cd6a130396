//! Choosing a token from logits: greedy, or by temperature and top-p with a seeded generator.
//!
//! Equal logits, settings and seed give equal tokens on every machine: probabilities are formed in `f64` from additions
//! and multiplications in a fixed order alone, and random numbers come from ChaCha.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::grammar::Mask;

/// Exponents below this are taken for impossible: even 100 000 such tokens together are less likely than the smallest
/// random number, and most of a large vocabulary need not be computed.
const NEGLIGIBLE: f64 = -50.0;

/// Why no token could be chosen.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SamplingError {
    /// A setting outside its range.
    #[error("{setting} is {value}; it must be {range}")]
    Setting {
        /// The setting.
        setting: &'static str,
        /// Its value.
        value: f32,
        /// What it may be.
        range: &'static str,
    },
    /// The model's output is not a number.
    #[error("the logit of token {id} is {value}; the weights or a kernel are at fault")]
    NotFinite {
        /// The token.
        id: usize,
        /// Its logit.
        value: f32,
    },
    /// The logits are not those of the vocabulary.
    #[error("{logits} logits for a vocabulary of {vocabulary}")]
    Length {
        /// Logits given.
        logits: usize,
        /// Logits expected.
        vocabulary: usize,
    },
    /// Every token is forbidden.
    #[error("no token is allowed")]
    NothingAllowed,
}

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

    /// Chooses one of the allowed tokens by their `logits` `[vocabulary]`. Of equally probable tokens the lower id comes
    /// first. `forbidden` tokens are not chosen even where the mask allows them.
    pub fn choose(&mut self, logits: &[f32], mask: &Mask, forbidden: &[u32]) -> Result<u32, SamplingError> {
        check_finite(logits)?;
        let allowed = mask.iter().filter(|id| !forbidden.contains(id));
        let logit = |id: u32| logits.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY);
        self.candidates.clear();
        if self.settings.temperature == 0.0 {
            let mut best = None;
            for id in allowed {
                if best.is_none_or(|(_, greatest)| logit(id) > greatest) {
                    best = Some((id, logit(id)));
                }
            }
            return best.map(|(id, _)| id).ok_or(SamplingError::NothingAllowed);
        }
        self.candidates.extend(allowed.map(|id| (id, f64::from(logit(id)))));
        let greatest = self.candidates.iter().map(|&(_, logit)| logit).fold(f64::NEG_INFINITY, f64::max);
        let temperature = f64::from(self.settings.temperature);
        let mut total = 0.0;
        for (_, weight) in &mut self.candidates {
            let exponent = (*weight - greatest) / temperature;
            *weight = if exponent < NEGLIGIBLE { 0.0 } else { exponential(exponent) };
            total += *weight;
        }
        if self.settings.top_p < 1.0 {
            total = keep_nucleus(&mut self.candidates, total, f64::from(self.settings.top_p));
        }
        // 53 random bits: every multiple of 2^-53 below 1.
        let point = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * total;
        let mut passed = 0.0;
        for &(id, weight) in &self.candidates {
            passed += weight;
            if point < passed {
                return Ok(id);
            }
        }
        // Rounding can leave the point a hair behind the last weight.
        self.candidates.last().map(|&(id, _)| id).ok_or(SamplingError::NothingAllowed)
    }
}

/// Keeps the most probable candidates that together reach `top_p` of `total`; returns what they add up to.
fn keep_nucleus(candidates: &mut Vec<(u32, f64)>, total: f64, top_p: f64) -> f64 {
    // Candidates below this share add up to less than 1 - top_p, so none of them is in the nucleus: most of a large
    // vocabulary need not be sorted.
    let negligible = total * (1.0 - top_p) / candidates.len() as f64;
    candidates.retain(|&(_, weight)| weight >= negligible);
    candidates.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let mut kept = 0.0;
    let mut count = 0;
    for &(_, weight) in candidates.iter() {
        kept += weight;
        count += 1;
        if kept >= total * top_p {
            break;
        }
    }
    candidates.truncate(count);
    kept
}

/// Refuses logits that are not numbers.
pub(crate) fn check_finite(logits: &[f32]) -> Result<(), SamplingError> {
    match logits.iter().position(|logit| !logit.is_finite()) {
        Some(id) => Err(SamplingError::NotFinite { id, value: logits[id] }),
        None => Ok(()),
    }
}

/// Coefficients of the exponential series, 1/0! to 1/14!: for arguments up to ln(2) / 2 the rest is below 1e-17.
const SERIES: [f64; 15] = {
    let mut series = [1.0; 15];
    let mut term = 1;
    while term < series.len() {
        series[term] = series[term - 1] / term as f64;
        term += 1;
    }
    series
};

/// e to the power of `x`, for `x` at most 0, to about 1e-15 of its value. The standard library's differs between
/// platforms in the last bit; this one, made of exactly rounded operations alone, does not.
pub(crate) fn exponential(x: f64) -> f64 {
    // ln 2 in two parts, the first with trailing zeros, so that a multiple of it is exact (as fdlibm splits it).
    const LN_2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    // Below this the result is not a normal number and cannot matter.
    if x < -700.0 {
        return 0.0;
    }
    let power = (x * std::f64::consts::LOG2_E).round();
    let rest = (x - power * LN_2_HIGH) - power * LN_2_LOW;
    let sum = SERIES.iter().rev().fold(0.0, |sum, coefficient| sum * rest + coefficient);
    sum * f64::from_bits(((1023 + power as i64) as u64) << 52)
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
    fn exponential_is_exact_to_the_last_digits() {
        for step in 0..70_000 {
            let x = -f64::from(step) / 100.0;
            let (ours, theirs) = (exponential(x), x.exp());
            assert!((ours - theirs).abs() <= 2e-15 * theirs, "{x}: {ours} {theirs}");
        }
        assert_eq!(exponential(0.0), 1.0);
        assert_eq!(exponential(-1e9), 0.0);
        assert_eq!(exponential(f64::NEG_INFINITY), 0.0);
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
    fn the_nucleus_is_the_one_of_a_full_sort() {
        let mut random = ChaCha8Rng::seed_from_u64(3);
        for _ in 0..200 {
            let weights: Vec<f64> = (0..50).map(|_| exponential(-f64::from(random.next_u32() % 12))).collect();
            let total: f64 = weights.iter().sum();
            let top_p = f64::from(random.next_u32() % 99 + 1) / 100.0;
            let mut kept: Vec<(u32, f64)> = (0u32..).zip(weights.iter().copied()).collect();
            let mut expected = kept.clone();
            expected.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let mut sum = 0.0;
            let mut count = 0;
            while sum < total * top_p {
                sum += expected[count].1;
                count += 1;
            }
            keep_nucleus(&mut kept, total, top_p);
            assert_eq!(kept, expected[..count], "top_p {top_p}");
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
