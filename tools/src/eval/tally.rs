//! Measures as quotients of counts: every record is a row of small numbers, and each measure is a function of the sum of
//! some rows. So the same few lines give a measure of all records, of a bootstrap's resample, and of two evaluations
//! with some of their records exchanged.

use candor::verify::{Emotion, Verdict};

use super::record::Record;

/// Emotions there are.
pub(super) const EMOTIONS: usize = 11;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Column {
    Records,
    Right,
    FastRight,
    Readable,
    ReadRight,
    ReadAnswer,
    BothRight,
    LexiconRight,
    LexiconAnswer,
    LexiconBothRight,
    CuesStated,
    CuesRight,
    CuesRightByChance,
    Verified,
    Withheld,
    Tokens,
    ExtraTokens,
}

const COLUMNS: usize = Column::ExtraTokens as usize + 1;

/// The counts of one record.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    class: usize,
    counts: [u32; COLUMNS],
}

impl Row {
    pub(super) fn of(record: &Record) -> Row {
        let judged = |read: Option<Emotion>| {
            let right = read == Some(record.truth);
            [right, read.is_some() && read == record.answer, right && record.is_right()].map(u32::from)
        };
        let ([right, answer, both], [lexicon_right, lexicon_answer, lexicon_both]) =
            (judged(record.read.verifier), judged(record.read.lexicon));
        let cues = record.cues.unwrap_or_default();
        let mut counts = [0; COLUMNS];
        for (column, count) in [
            (Column::Records, 1),
            (Column::Right, record.is_right().into()),
            (Column::FastRight, (record.fast == Some(record.truth)).into()),
            (Column::Readable, record.is_readable().into()),
            (Column::ReadRight, right),
            (Column::ReadAnswer, answer),
            (Column::BothRight, both),
            (Column::LexiconRight, lexicon_right),
            (Column::LexiconAnswer, lexicon_answer),
            (Column::LexiconBothRight, lexicon_both),
            (Column::CuesStated, cues.stated),
            (Column::CuesRight, cues.right),
            (Column::CuesRightByChance, cues.right_by_chance),
            (Column::Verified, (record.verdict == Verdict::Verified).into()),
            (Column::Withheld, record.withheld.into()),
            (Column::Tokens, record.tokens.completion),
            (Column::ExtraTokens, record.tokens.extra),
        ] {
            counts[column as usize] = count;
        }
        Row { class: record.truth as usize, counts }
    }
}

/// Sums over records.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Tally {
    counts: [u64; COLUMNS],
    /// Records of each class, and how many of them were answered rightly.
    classes: [[u64; 2]; EMOTIONS],
}

impl Tally {
    pub(super) fn of<'r>(rows: impl IntoIterator<Item = &'r Row>) -> Tally {
        let mut tally = Tally::default();
        rows.into_iter().for_each(|row| tally.add(row));
        tally
    }

    pub(super) fn add(&mut self, row: &Row) {
        self.counts.iter_mut().zip(&row.counts).for_each(|(sum, &count)| *sum += u64::from(count));
        let class = &mut self.classes[row.class];
        class[0] += 1;
        class[1] += u64::from(row.counts[Column::Right as usize]);
    }

    fn share(&self, part: Column, whole: Column) -> Option<f64> {
        quotient(self.counts[part as usize], self.counts[whole as usize])
    }

    /// Cues stated of measured faces.
    pub(super) fn cues_stated(&self) -> u64 {
        self.counts[Column::CuesStated as usize]
    }

    /// Share of a class that was answered rightly; `None` where there is no record of it.
    pub(super) fn recall(&self, class: Emotion) -> Option<f64> {
        self.recall_of(class as usize)
    }

    fn recall_of(&self, class: usize) -> Option<f64> {
        let [all, right] = self.classes[class];
        quotient(right, all)
    }
}

fn quotient(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// What is measured, in the order in which it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Measure {
    /// Share of answers after the rationale that are right.
    War,
    /// Mean over the classes of that share.
    Uar,
    /// Share of fast answers that are right.
    FastLabelAccuracy,
    /// Share of completions with a rationale and an answer.
    Readable,
    /// Share of rationales in which the verifier reads the right emotion.
    Eea,
    /// Share in which it reads the emotion answered.
    Epc,
    /// Share where both are right.
    Fcr,
    /// Share of rationales in which the lexicon reads the right emotion.
    LexiconEea,
    /// Share in which it reads the emotion answered.
    LexiconEpc,
    /// Share where both are right.
    LexiconFcr,
    /// Share of stated cues that the measurement bears out.
    CueAccuracy,
    /// Share that the measurement of another photograph bears out.
    CueAccuracyShuffled,
    /// Share of verdicts that are *verified*.
    VerifiedShare,
    /// Share of rationales that the policy kept back.
    WithheldShare,
    /// Tokens of a completion.
    Tokens,
    /// Tokens that the policy threw away, a completion.
    ExtraTokens,
}

impl Measure {
    /// Every measure.
    pub const ALL: [Measure; 16] = [
        Measure::War,
        Measure::Uar,
        Measure::FastLabelAccuracy,
        Measure::Readable,
        Measure::Eea,
        Measure::Epc,
        Measure::Fcr,
        Measure::LexiconEea,
        Measure::LexiconEpc,
        Measure::LexiconFcr,
        Measure::CueAccuracy,
        Measure::CueAccuracyShuffled,
        Measure::VerifiedShare,
        Measure::WithheldShare,
        Measure::Tokens,
        Measure::ExtraTokens,
    ];

    /// The key in JSON, of intervals and comparisons.
    pub fn key(self) -> &'static str {
        match self {
            Measure::War => "war",
            Measure::Uar => "uar",
            Measure::FastLabelAccuracy => "fast_label_accuracy",
            Measure::Readable => "readable",
            Measure::Eea => "eea",
            Measure::Epc => "epc",
            Measure::Fcr => "fcr",
            Measure::LexiconEea => "lexicon_eea",
            Measure::LexiconEpc => "lexicon_epc",
            Measure::LexiconFcr => "lexicon_fcr",
            Measure::CueAccuracy => "cue_accuracy",
            Measure::CueAccuracyShuffled => "cue_accuracy_shuffled",
            Measure::VerifiedShare => "verified_share",
            Measure::WithheldShare => "withheld_share",
            Measure::Tokens => "tokens",
            Measure::ExtraTokens => "extra_tokens",
        }
    }

    /// What it is, for people.
    pub fn title(self) -> &'static str {
        match self {
            Measure::War => "label right after the rationale (WAR)",
            Measure::Uar => "mean recall of the classes (UAR)",
            Measure::FastLabelAccuracy => "label right in the fast answer",
            Measure::Readable => "readable",
            Measure::Eea => "rationale names the right emotion (EEA)",
            Measure::Epc => "rationale and label agree (EPC)",
            Measure::Fcr => "both right (FCR)",
            Measure::LexiconEea => "EEA by the lexicon",
            Measure::LexiconEpc => "EPC by the lexicon",
            Measure::LexiconFcr => "FCR by the lexicon",
            Measure::CueAccuracy => "stated cues borne out",
            Measure::CueAccuracyShuffled => "stated cues borne out by another face",
            Measure::VerifiedShare => "verdict verified",
            Measure::WithheldShare => "rationale withheld",
            Measure::Tokens => "tokens a completion",
            Measure::ExtraTokens => "tokens thrown away by the policy",
        }
    }

    /// Its value over some records; `None` where there is nothing that it could be a share of.
    pub(super) fn value(self, tally: &Tally) -> Option<f64> {
        let (part, whole) = match self {
            Measure::Uar => {
                let (sum, classes) = (0..EMOTIONS)
                    .filter_map(|class| tally.recall_of(class))
                    .fold((0.0, 0), |(sum, classes), recall| (sum + recall, classes + 1));
                return (classes > 0).then(|| sum / f64::from(classes));
            }
            Measure::CueAccuracy => (Column::CuesRight, Column::CuesStated),
            Measure::CueAccuracyShuffled => (Column::CuesRightByChance, Column::CuesStated),
            one => (one.column(), Column::Records),
        };
        tally.share(part, whole)
    }

    /// Whether it is true or not of each record by itself.
    pub(super) fn is_of_each_record(self) -> bool {
        !matches!(
            self,
            Measure::Uar | Measure::CueAccuracy | Measure::CueAccuracyShuffled | Measure::Tokens | Measure::ExtraTokens
        )
    }

    /// Of how many records it is true in `a` alone and in `b` alone, where it is of each record.
    pub(super) fn discordant(self, a: &[Row], b: &[Row]) -> [u64; 2] {
        let column = self.column() as usize;
        let mut only = [0; 2];
        for (a, b) in a.iter().zip(b) {
            match (a.counts[column] > 0, b.counts[column] > 0) {
                (true, false) => only[0] += 1,
                (false, true) => only[1] += 1,
                _ => {}
            }
        }
        only
    }

    /// What it takes the mean of, where it is a mean over records.
    fn column(self) -> Column {
        match self {
            Measure::War | Measure::Uar => Column::Right,
            Measure::FastLabelAccuracy => Column::FastRight,
            Measure::Readable => Column::Readable,
            Measure::Eea => Column::ReadRight,
            Measure::Epc => Column::ReadAnswer,
            Measure::Fcr => Column::BothRight,
            Measure::LexiconEea => Column::LexiconRight,
            Measure::LexiconEpc => Column::LexiconAnswer,
            Measure::LexiconFcr => Column::LexiconBothRight,
            Measure::CueAccuracy => Column::CuesRight,
            Measure::CueAccuracyShuffled => Column::CuesRightByChance,
            Measure::VerifiedShare => Column::Verified,
            Measure::WithheldShare => Column::Withheld,
            Measure::Tokens => Column::Tokens,
            Measure::ExtraTokens => Column::ExtraTokens,
        }
    }
}
