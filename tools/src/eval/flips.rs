//! How often two evaluations of the same data say something else of an entry.

use candor::manifest::Answer;
use serde::Serialize;

use super::record::Record;

/// Entries, and of how many something else is said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Flips {
    /// Entries.
    pub n: usize,
    /// Those whose answer at once is another.
    pub fast: usize,
    /// Those whose answer after the rationale is another.
    pub after: usize,
    /// Those whose verdict is another.
    pub verdict: usize,
    /// Those whose rationale is another, be it by a word.
    pub rationale: usize,
}

impl Flips {
    /// Counts them in records that belong together by their places.
    pub fn between(a: &[Record], b: &[Record]) -> Flips {
        let mut flips = Flips::default();
        for (a, b) in a.iter().zip(b) {
            flips.n += 1;
            flips.fast += usize::from(a.fast != b.fast);
            flips.after += usize::from(a.answer != b.answer);
            flips.verdict += usize::from(a.verdict != b.verdict);
            flips.rationale += usize::from(a.rationale != b.rationale);
        }
        flips
    }

    /// Those whose label shown is another, by what the manifest has shown.
    pub fn shown(&self, answer: Answer) -> usize {
        match answer {
            Answer::Fast => self.fast,
            Answer::After => self.after,
        }
    }

    /// A count as a share of the entries.
    pub fn share(&self, count: usize) -> f64 {
        count as f64 / self.n.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;

    #[test]
    fn every_kind_is_counted_by_itself() {
        let a = [
            record(0, "happy", "happy", "happy", "They look happy."),
            record(1, "sad", "sad", "happy", "They look happy."),
            record(2, "sad", "sad", "sad", "They look sad."),
        ];
        let mut b = a.clone();
        b[1] = record(1, "sad", "happy", "happy", "They look happy.");
        b[2].fast = None;
        b[2].rationale = Some("They are sad.".to_owned());
        let flips = Flips::between(&a, &b);
        assert_eq!(flips, Flips { n: 3, fast: 1, after: 1, verdict: 1, rationale: 1 });
        assert_eq!((flips.shown(Answer::Fast), flips.shown(Answer::After)), (1, 1));
        assert_eq!(Flips::between(&a, &a), Flips { n: 3, ..Flips::default() });
        assert!((flips.share(flips.verdict) - 1.0 / 3.0).abs() < 1e-12);
        assert_eq!(Flips::default().share(0), 0.0);
    }
}
