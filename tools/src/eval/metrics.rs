//! All that is said of an evaluation, as one JSON object.

use std::collections::BTreeMap;

use candor::verify::Emotion;
use serde::Serialize;

use super::bootstrap::{Interval, intervals};
use super::record::Record;
use super::tally::{Measure, Row, Tally};
use crate::reward::Rewards;
use crate::reward::conduct::Conduct;

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Metrics {
    /// Clips or photographs.
    pub n: usize,
    /// Share answered rightly after the rationale.
    pub label_accuracy: f64,
    /// The same under the paper's name.
    pub war: f64,
    /// Share answered rightly before it.
    pub fast_label_accuracy: f64,
    /// Mean over the classes of the share answered rightly after the rationale.
    pub uar: f64,
    /// That share for each class.
    pub recall: BTreeMap<&'static str, f64>,
    /// Share of completions with a rationale and an answer.
    pub readable: f64,
    /// Share of rationales in which the verifier reads the right emotion.
    pub eea: f64,
    /// Share of rationales in which the verifier reads the emotion answered after them.
    pub epc: f64,
    /// Share where rationale and answer are both right.
    pub fcr: f64,
    /// The same three by the judge that trains nothing.
    pub lexicon: JudgeMetrics,
    /// Share of stated cues that the measurement bears out; none where nothing was stated.
    pub cue_accuracy: Option<f64>,
    /// The same against the cues of another photograph: what saying the usual would get.
    pub cue_accuracy_shuffled: Option<f64>,
    /// Cues stated of measured faces.
    pub cues_stated: u64,
    /// Share of observations whose verdict is *verified*.
    pub verified_share: f64,
    /// Share of rationales that the policy kept back.
    pub withheld_share: f64,
    /// What was done about rationales that are not verified.
    pub policy: String,
    /// Tokens, means over the completions.
    pub tokens: MeanTokens,
    /// How rationales behave, against the obvious cheats; the cue accuracy stands above, with its interval.
    #[serde(flatten)]
    pub conduct: Conduct,
    /// 95 % intervals by the bootstrap, by [`Measure::key`].
    pub intervals: BTreeMap<&'static str, Interval>,
    /// The same of `recall`.
    pub recall_intervals: BTreeMap<&'static str, Interval>,
    /// What was answered for what.
    pub confusion: Confusion,
}

impl Metrics {
    /// A measure; none where there is nothing that it could be a share of.
    pub fn value(&self, measure: Measure) -> Option<f64> {
        match measure {
            Measure::War => Some(self.war),
            Measure::Uar => Some(self.uar),
            Measure::FastLabelAccuracy => Some(self.fast_label_accuracy),
            Measure::Readable => Some(self.readable),
            Measure::Eea => Some(self.eea),
            Measure::Epc => Some(self.epc),
            Measure::Fcr => Some(self.fcr),
            Measure::LexiconEea => Some(self.lexicon.eea),
            Measure::LexiconEpc => Some(self.lexicon.epc),
            Measure::LexiconFcr => Some(self.lexicon.fcr),
            Measure::CueAccuracy => self.cue_accuracy,
            Measure::CueAccuracyShuffled => self.cue_accuracy_shuffled,
            Measure::VerifiedShare => Some(self.verified_share),
            Measure::WithheldShare => Some(self.withheld_share),
            Measure::Tokens => Some(self.tokens.completion),
            Measure::ExtraTokens => Some(self.tokens.extra),
        }
    }
}

/// What a judge finds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct JudgeMetrics {
    /// Share of rationales that name the right emotion.
    pub eea: f64,
    /// Share of rationales that name the emotion answered.
    pub epc: f64,
    /// Share where rationale and answer are both right.
    pub fcr: f64,
}

/// Mean numbers of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct MeanTokens {
    /// Of a completion.
    pub completion: f64,
    /// Written and thrown away by the policy.
    pub extra: f64,
}

/// Counts of answers by truth.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Confusion {
    /// Emotions that are right or were answered.
    pub labels: Vec<&'static str>,
    /// For each of them as the truth, how often each was answered, and last how often none was.
    pub rows: Vec<Vec<usize>>,
}

/// All metrics of some records.
pub fn measure(records: &[Record], policy: &str) -> Metrics {
    let rows: Vec<Row> = records.iter().map(Row::of).collect();
    let tally = Tally::of(&rows);
    let share = |measure: Measure| measure.value(&tally).unwrap_or(0.0);
    let intervals = intervals(&rows);
    Metrics {
        n: records.len(),
        label_accuracy: share(Measure::War),
        war: share(Measure::War),
        fast_label_accuracy: share(Measure::FastLabelAccuracy),
        uar: share(Measure::Uar),
        recall: Emotion::all().filter_map(|class| Some((class.name(), tally.recall(class)?))).collect(),
        readable: share(Measure::Readable),
        eea: share(Measure::Eea),
        epc: share(Measure::Epc),
        fcr: share(Measure::Fcr),
        lexicon: JudgeMetrics {
            eea: share(Measure::LexiconEea),
            epc: share(Measure::LexiconEpc),
            fcr: share(Measure::LexiconFcr),
        },
        cue_accuracy: Measure::CueAccuracy.value(&tally),
        cue_accuracy_shuffled: Measure::CueAccuracyShuffled.value(&tally),
        cues_stated: tally.cues_stated(),
        verified_share: share(Measure::VerifiedShare),
        withheld_share: share(Measure::WithheldShare),
        policy: policy.to_owned(),
        tokens: MeanTokens { completion: share(Measure::Tokens), extra: share(Measure::ExtraTokens) },
        conduct: conduct(records),
        intervals: intervals.measures,
        recall_intervals: intervals.recall,
        confusion: confusion(records),
    }
}

/// How the rationales behave that were given.
fn conduct(records: &[Record]) -> Conduct {
    let completions: Vec<(String, Rewards)> = records
        .iter()
        .filter_map(|record| {
            let completion = format!("<think>{}</think>", record.rationale.as_ref()?);
            let labels = record.sentences.iter().map(|sentence| sentence.labels.clone()).collect();
            // Only the readings are looked at.
            Some((completion, Rewards { format: 0.0, accuracy: 0.0, explanation: 0.0, groundedness: None, labels }))
        })
        .collect();
    Conduct::measure(completions.iter().map(|(text, rewards)| (text.as_str(), rewards, None)))
}

fn confusion(records: &[Record]) -> Confusion {
    let occurs =
        |emotion: &Emotion| records.iter().any(|record| record.truth == *emotion || record.answer == Some(*emotion));
    let labels: Vec<Emotion> = Emotion::all().filter(occurs).collect();
    let mut rows = vec![vec![0; labels.len() + 1]; labels.len()];
    for record in records {
        let place = |emotion: Emotion| labels.iter().position(|&label| label == emotion);
        let answered = record.answer.and_then(place).unwrap_or(labels.len());
        if let Some(truth) = place(record.truth) {
            rows[truth][answered] += 1;
        }
    }
    Confusion { labels: labels.into_iter().map(Emotion::name).collect(), rows }
}
