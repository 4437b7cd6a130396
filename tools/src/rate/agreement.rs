//! Krippendorff's alpha: how far raters agree beyond what votes thrown together at random would. Follows K. Krippendorff,
//! "Content Analysis: An Introduction to Its Methodology", by way of the matrix of coincidences; any number of raters,
//! votes may be missing.

use serde::Serialize;

/// Answers: A, tie, B.
pub const ANSWERS: usize = 3;
/// How many raters gave each answer to one pair, in the order A, tie, B.
pub type Counts = [u32; ANSWERS];

/// What counts as how far apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Answers are the same or they are not.
    Nominal,
    /// A is nearer to a tie than to B.
    Ordinal,
}

/// Why there is no alpha.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Undefined {
    /// No pair has votes of two raters.
    NoPairWithTwoVotes,
    /// All answers are the same, so that agreement by chance would be whole as well.
    AllAnswersTheSame,
}

impl std::fmt::Display for Undefined {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Undefined::NoPairWithTwoVotes => "no pair has votes of two raters",
            Undefined::AllAnswersTheSame => "all answers to pairs with two votes are the same",
        })
    }
}

/// Alpha over pairs: 1 where raters always agree, 0 where they agree as by chance, below 0 where less than that. Pairs
/// with one vote or none count for nothing.
pub fn alpha(pairs: &[Counts], scale: Scale) -> Result<f64, Undefined> {
    let mut coincidences = [[0.0; ANSWERS]; ANSWERS];
    for counts in pairs {
        let votes: u32 = counts.iter().sum();
        if votes < 2 {
            continue;
        }
        for (one, row) in coincidences.iter_mut().enumerate() {
            for (other, cell) in row.iter_mut().enumerate() {
                // Every vote meets every other vote on the pair.
                let others = counts[other] - u32::from(one == other && counts[other] > 0);
                *cell += f64::from(counts[one]) * f64::from(others) / f64::from(votes - 1);
            }
        }
    }
    let totals = coincidences.map(|row| row.iter().sum::<f64>());
    let all: f64 = totals.iter().sum();
    if all == 0.0 {
        return Err(Undefined::NoPairWithTwoVotes);
    }
    let (mut observed, mut expected) = (0.0, 0.0);
    for one in 0..ANSWERS {
        for other in 0..one {
            let distance = distance(&totals, other, one, scale);
            observed += coincidences[one][other] * distance;
            expected += totals[one] * totals[other] * distance;
        }
    }
    if expected == 0.0 {
        return Err(Undefined::AllAnswersTheSame);
    }
    Ok(1.0 - (all - 1.0) * observed / expected)
}

/// Squared distance of two answers, `low` before `high`.
fn distance(totals: &[f64; ANSWERS], low: usize, high: usize, scale: Scale) -> f64 {
    match scale {
        Scale::Nominal => 1.0,
        Scale::Ordinal => {
            let between: f64 = totals[low..=high].iter().sum();
            (between - (totals[low] + totals[high]) / 2.0).powi(2)
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Case {
        name: String,
        /// Votes by rater, then by pair.
        votes: Vec<Vec<Option<usize>>>,
        nominal: f64,
        ordinal: f64,
    }

    #[test]
    fn as_another_implementation_has_it() {
        let golden = include_str!("../../../tests/fixtures/agreement.json");
        let cases: Vec<Case> = serde_json::from_str(golden).unwrap();
        assert!(cases.len() > 10);
        for case in cases {
            let mut pairs = vec![[0; ANSWERS]; case.votes[0].len()];
            for rater in &case.votes {
                for (pair, vote) in pairs.iter_mut().zip(rater) {
                    vote.iter().for_each(|&vote| pair[vote] += 1);
                }
            }
            for (scale, expected) in [(Scale::Nominal, case.nominal), (Scale::Ordinal, case.ordinal)] {
                let ours = alpha(&pairs, scale).unwrap();
                assert!((ours - expected).abs() < 1e-9, "{}, {scale:?}: {ours}, not {expected}", case.name);
            }
        }
    }

    #[test]
    fn where_it_is_undefined_it_is_no_number() {
        for scale in [Scale::Nominal, Scale::Ordinal] {
            assert_eq!(alpha(&[], scale), Err(Undefined::NoPairWithTwoVotes));
            // One rater only, however many pairs.
            assert_eq!(alpha(&[[1, 0, 0], [0, 1, 0], [0, 0, 1]], scale), Err(Undefined::NoPairWithTwoVotes));
            assert_eq!(alpha(&[[2, 0, 0], [3, 0, 0], [0, 0, 1]], scale), Err(Undefined::AllAnswersTheSame));
            assert_eq!(alpha(&[[2, 0, 0], [0, 0, 2]], scale), Ok(1.0));
        }
    }
}
