//! Choosing a token from logits: greedy, or by temperature and top-p at a point that was drawn. This is the definition that
//! every device follows, and what the CPU does.
//!
//! Equal logits, settings and points give equal tokens on every machine: probabilities are formed in `f64` from additions and
//! multiplications in a fixed order alone. A GPU forms them in another way, to some 10⁻⁷ of the whole; it chooses another token
//! only where the point lies as near to the border between two.

use crate::device::{DeviceError, Result as DeviceResult};

/// Exponents below this are taken for impossible: even 100 000 such tokens together are less likely than the smallest
/// random number, and most of a large vocabulary need not be computed.
const NEGLIGIBLE: f64 = -50.0;

/// Why no token could be chosen.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ChoiceError {
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
    /// A token is allowed that there is not, or twice.
    #[error("token {id} is not one of a vocabulary of {vocabulary}, or does not come behind the one before it")]
    Allowed {
        /// The token.
        id: u32,
        /// Tokens that there are.
        vocabulary: usize,
    },
    /// Every token is forbidden.
    #[error("no token is allowed")]
    NothingAllowed,
}

/// The tokens that may be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowed<'a> {
    /// These ids, ascending.
    Ids(&'a [u32]),
    /// Those whose bit is set: bit `id % 64` of word `id / 64`.
    Bits(&'a [u64]),
}

impl<'a> Allowed<'a> {
    /// The ids, ascending.
    pub fn iter(self) -> AllowedIds<'a> {
        match self {
            Allowed::Ids(ids) => AllowedIds { few: ids.iter(), bits: &[], word: 0, first: 0 },
            Allowed::Bits(bits) => {
                let (&word, bits) = bits.split_first().unwrap_or((&0, &[]));
                AllowedIds { few: [].iter(), bits, word, first: 0 }
            }
        }
    }

    /// Refuses ids that are not ascending, or not below `vocabulary`.
    pub(crate) fn check(self, vocabulary: usize) -> Result<(), ChoiceError> {
        let wrong = |id: u32| Err(ChoiceError::Allowed { id, vocabulary });
        match self {
            Allowed::Ids(ids) => {
                if let Some(pair) = ids.windows(2).find(|pair| pair[0] >= pair[1]) {
                    return wrong(pair[1]);
                }
                ids.last().filter(|&&last| last as usize >= vocabulary).map_or(Ok(()), |&last| wrong(last))
            }
            Allowed::Bits(bits) => {
                let whole = vocabulary / 64;
                for (number, &word) in bits.iter().enumerate().skip(whole) {
                    let outside = if number == whole { word >> (vocabulary % 64) << (vocabulary % 64) } else { word };
                    if outside != 0 {
                        return wrong((number * 64) as u32 + outside.trailing_zeros());
                    }
                }
                Ok(())
            }
        }
    }
}

/// The ids that [`Allowed`] allows, ascending.
#[derive(Debug, Clone)]
pub struct AllowedIds<'a> {
    few: std::slice::Iter<'a, u32>,
    /// Words of bits behind `word`.
    bits: &'a [u64],
    /// Bits not handed out yet, of the ids from `first` on.
    word: u64,
    first: u32,
}

impl Iterator for AllowedIds<'_> {
    type Item = u32;

    #[inline]
    fn next(&mut self) -> Option<u32> {
        while self.word == 0 {
            let Some((&word, bits)) = self.bits.split_first() else { return self.few.next().copied() };
            (self.word, self.bits) = (word, bits);
            self.first += 64;
        }
        let bit = self.word.trailing_zeros();
        self.word &= self.word - 1;
        Some(self.first + bit)
    }
}

/// How a token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Choice {
    /// The most probable; of equally probable ones, the lowest id.
    Greedy,
    /// The one in whose share of the probabilities a point lies. They are laid one behind the other by their ids or, with a
    /// top-p below 1, the most probable first and equally probable ones by their ids.
    Drawn {
        /// Divides the logits; above 0.
        temperature: f32,
        /// Keeps the fewest tokens whose probabilities together reach this; 1 keeps all.
        top_p: f32,
        /// Where the token lies: at least 0, and below 1. 53 bits of it count.
        point: f64,
    },
}

impl Choice {
    /// Refuses settings outside their ranges.
    pub(crate) fn check(self) -> Result<(), ChoiceError> {
        let Choice::Drawn { temperature, top_p, point } = self else { return Ok(()) };
        let wrong = |setting, value, range| Err(ChoiceError::Setting { setting, value, range });
        if !(temperature.is_finite() && temperature > 0.0) {
            return wrong("temperature", temperature, "a number above 0");
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return wrong("top_p", top_p, "above 0 and at most 1");
        }
        if !(0.0..1.0).contains(&point) {
            return wrong("the point", point as f32, "at least 0 and below 1");
        }
        Ok(())
    }
}

/// Chooses one of the allowed tokens by their `logits` `[vocabulary]`. `forbidden` tokens are not chosen even where they are
/// allowed. `candidates` is memory to work in.
///
/// # Errors
/// [`ChoiceError::Setting`] and [`ChoiceError::Allowed`] for what makes no sense, [`ChoiceError::NotFinite`] where any logit is
/// no number, [`ChoiceError::NothingAllowed`].
pub fn choose(
    logits: &[f32],
    allowed: Allowed<'_>,
    forbidden: &[u32],
    choice: Choice,
    candidates: &mut Vec<(u32, f64)>,
) -> Result<u32, ChoiceError> {
    choice.check()?;
    allowed.check(logits.len())?;
    check_finite(logits)?;
    let allowed = allowed.iter().filter(|id| !forbidden.contains(id));
    let logit = |id: u32| logits.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY);
    let Choice::Drawn { temperature, top_p, point } = choice else {
        let mut best = None;
        for id in allowed {
            if best.is_none_or(|(_, greatest)| logit(id) > greatest) {
                best = Some((id, logit(id)));
            }
        }
        return best.map(|(id, _)| id).ok_or(ChoiceError::NothingAllowed);
    };
    candidates.clear();
    candidates.extend(allowed.map(|id| (id, f64::from(logit(id)))));
    let greatest = candidates.iter().map(|&(_, logit)| logit).fold(f64::NEG_INFINITY, f64::max);
    let temperature = f64::from(temperature);
    let mut total = 0.0;
    for (_, weight) in candidates.iter_mut() {
        let exponent = (*weight - greatest) / temperature;
        *weight = if exponent < NEGLIGIBLE { 0.0 } else { exponential(exponent) };
        total += *weight;
    }
    if top_p < 1.0 {
        total = keep_nucleus(candidates, total, f64::from(top_p));
    }
    let point = point * total;
    let mut passed = 0.0;
    for &(id, weight) in candidates.iter() {
        passed += weight;
        if point < passed {
            return Ok(id);
        }
    }
    // Rounding can leave the point a hair behind the last weight.
    candidates.last().map(|&(id, _)| id).ok_or(ChoiceError::NothingAllowed)
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
pub fn check_finite(logits: &[f32]) -> Result<(), ChoiceError> {
    // Stretches without a way out in their middle, of which compilers make vector instructions.
    let broken = |logits: &[f32]| logits.iter().fold(false, |broken, logit| broken | !logit.is_finite());
    if !logits.chunks(512).any(broken) {
        return Ok(());
    }
    match logits.iter().position(|logit| !logit.is_finite()) {
        Some(id) => Err(ChoiceError::NotFinite { id, value: logits[id] }),
        None => Ok(()),
    }
}

/// For devices on paper: some token that is allowed.
pub(crate) fn any(allowed: Allowed<'_>, forbidden: &[u32]) -> DeviceResult<u32> {
    let first = allowed.iter().find(|id| !forbidden.contains(id));
    first.ok_or(DeviceError::Choice(ChoiceError::NothingAllowed))
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
pub fn exponential(x: f64) -> f64 {
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
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::RngCore;

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
    fn what_is_allowed_is_of_the_vocabulary() {
        for (allowed, vocabulary, wrong) in [
            (Allowed::Ids(&[0, 3, 6]), 7, None),
            (Allowed::Ids(&[0, 3, 6]), 6, Some(6)),
            (Allowed::Ids(&[0, 3, 3]), 7, Some(3)),
            (Allowed::Ids(&[4, 3, 6]), 7, Some(3)),
            (Allowed::Ids(&[]), 0, None),
            (Allowed::Bits(&[]), 70, None),
            (Allowed::Bits(&[!0, 0b11_1111]), 70, None),
            (Allowed::Bits(&[!0, 0b111_1111]), 70, Some(70)),
            (Allowed::Bits(&[!0, 0, 1 << 5]), 70, Some(133)),
            (Allowed::Bits(&[!0, 0]), 64, None),
            (Allowed::Bits(&[!0, 1]), 64, Some(64)),
        ] {
            let error = wrong.map(|id| ChoiceError::Allowed { id, vocabulary });
            assert_eq!(allowed.check(vocabulary).err(), error, "{allowed:?} of {vocabulary}");
        }
    }
}
