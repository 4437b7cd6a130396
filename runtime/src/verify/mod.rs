//! The Emotional Rationale Verifier: sentences, labels, reward and verdict.
