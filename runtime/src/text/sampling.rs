//! Choosing a token from logits: greedy, or by temperature and top-p with a seeded generator.
//!
//! Equal logits, settings and seed give equal tokens on every machine: probabilities are formed in `f64` from additions
//! and multiplications in a fixed order alone, and random numbers come from ChaCha.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::grammar::Mask;

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
            *weight = exponential((*weight - greatest) / temperature);
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
    candidates.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
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
    // |rest| <= ln(2) / 2: fourteen terms of the series leave less than 1e-17.
    let mut sum = 1.0;
    for term in (1..=14).rev() {
        sum = 1.0 + rest / f64::from(term) * sum;
    }
    sum * f64::from_bits(((1023 + power as i64) as u64) << 52)
}
