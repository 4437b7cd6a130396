//! From the verifier's 28 probabilities of a sentence to the sentence's labels.

use super::classifier::VerifierError;
use super::emotions::{GO_EMOTIONS, GoEmotion};

/// A label is read out of a sentence above this probability (the verifier's paper).
pub const THRESHOLD: f32 = 0.1;

/// Most labels that one sentence keeps.
const MOST_LABELS: usize = 2;

/// The labels of a sentence, most probable first: all above [`THRESHOLD`]; if none, the most probable one; if more than
/// two, the top two. Among equals the lower id goes first.
///
/// # Errors
///
/// [`VerifierError::Probability`] where a value is not within 0 to 1.
pub fn read_labels(probabilities: &[f32; 28]) -> Result<Vec<GoEmotion>, VerifierError> {
    for (name, &value) in GO_EMOTIONS.iter().zip(probabilities) {
        if !(0.0..=1.0).contains(&value) {
            return Err(VerifierError::Probability { label: name, value });
        }
    }
    let mut labels: Vec<GoEmotion> = (0..probabilities.len()).filter_map(GoEmotion::from_id).collect();
    labels.sort_by(|a, b| probabilities[b.id()].total_cmp(&probabilities[a.id()])); // stable: lower id first
    let above = labels.iter().filter(|label| probabilities[label.id()] > THRESHOLD).count();
    labels.truncate(above.clamp(1, MOST_LABELS));
    Ok(labels)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn labels(given: &[(usize, f32)]) -> Vec<usize> {
        let mut probabilities = [0.01; 28];
        for &(id, value) in given {
            probabilities[id] = value;
        }
        read_labels(&probabilities).unwrap().into_iter().map(GoEmotion::id).collect()
    }

    #[test]
    fn threshold_rule() {
        assert_eq!(labels(&[(5, 0.11)]), [5]);
        assert_eq!(labels(&[(5, 0.2), (3, 0.9)]), [3, 5]);
        assert_eq!(labels(&[(5, 0.2), (3, 0.9), (27, 0.5)]), [3, 27]);
        assert_eq!(labels(&[(9, 0.05)]), [9], "none above: the best");
        assert_eq!(labels(&[(9, 0.1), (4, 0.05)]), [9], "exactly 0.1 is not above; it is the best");
        assert_eq!(labels(&[(4, 0.1), (9, 0.100_001)]), [9]);
    }

    #[test]
    fn ties_go_to_the_lower_id() {
        assert_eq!(labels(&[]), [0]);
        assert_eq!(labels(&[(20, 0.5), (7, 0.5), (13, 0.5)]), [7, 13]);
        assert_eq!(labels(&[(0, 0.0), (1, -0.0)]), [2]);
    }

    #[test]
    fn values_that_are_no_probabilities() {
        for value in [f32::NAN, f32::INFINITY, -0.5, 1.5] {
            let mut probabilities = [0.2; 28];
            probabilities[14] = value;
            let error = read_labels(&probabilities).unwrap_err();
            assert!(error.to_string().contains("fear"), "{error}");
        }
    }
}
