//! What is done about rationales that their verifier does not bear out.
//!
//! Stands between [`crate::text`], which writes a completion, and [`crate::verify`], which reads it. *Guide* is verified
//! decoding: each sentence is read the moment it ends, and one that contradicts the fast answer is rolled back in the
//! key-value cache and written again, so a wrong turn costs a sentence and not a completion.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use crate::manifest::Answer;
use crate::model::LanguageModel;
use crate::observation::PolicyRecord;
use crate::text::automaton::THINK_OPEN;
use crate::text::{
    Checkpoint, Completion, GenerateError, Generator, Grammar, LabelProbabilities, LabelScorer, LabelSearch, Passage,
    Phase, Sampler, Sampling,
};
use crate::verify::reward::explanation_reward_of_labels;
use crate::verify::sentences::{finished_sentence, split_sentences};
use crate::verify::verdict::{read_sentences, supports};
use crate::verify::{Assessment, Emotion, Reading, SentenceClassifier, Verdict, VerifierError};

/// Most times that `retry` and `guide` write anything again.
const MOST_AGAIN: usize = 64;

/// A completion that is sampled again is drawn at least this warm: at 0 it would come out the same.
const RETRY_TEMPERATURE: f32 = 0.7;

/// What to do about a rationale that is not verified.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Give it with its verdict.
    #[default]
    Annotate,
    /// Write the completion again, at most this often, until one is verified; give the best.
    Retry(usize),
    /// Write each sentence that contradicts the fast answer again, at most this often; keep the least bad.
    Guide(usize),
    /// Keep it back and give the label alone.
    Withhold,
}

/// Not the name of a policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a policy; there are annotate, retry:N, guide:N (N from 1 to {MOST_AGAIN}) and withhold")]
pub struct ParsePolicyError(String);

impl FromStr for Policy {
    type Err = ParsePolicyError;

    fn from_str(text: &str) -> Result<Self, ParsePolicyError> {
        let again = |n: &str| n.parse().ok().filter(|n| (1..=MOST_AGAIN).contains(n));
        let policy = match text.split_once(':') {
            None if text == "annotate" => Some(Policy::Annotate),
            None if text == "withhold" => Some(Policy::Withhold),
            Some(("retry", n)) => again(n).map(Policy::Retry),
            Some(("guide", n)) => again(n).map(Policy::Guide),
            _ => None,
        };
        policy.ok_or_else(|| ParsePolicyError(text.to_string()))
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        match self.n() {
            Some(n) => write!(formatter, "{}:{n}", self.name()),
            None => formatter.write_str(self.name()),
        }
    }
}

impl Policy {
    /// Its name in observations.
    pub fn name(self) -> &'static str {
        match self {
            Policy::Annotate => "annotate",
            Policy::Retry(_) => "retry",
            Policy::Guide(_) => "guide",
            Policy::Withhold => "withhold",
        }
    }

    /// Its number in observations.
    pub fn n(self) -> Option<usize> {
        match self {
            Policy::Retry(n) | Policy::Guide(n) => Some(n),
            Policy::Annotate | Policy::Withhold => None,
        }
    }
}

/// Why no reason could be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// Generation failed.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// Verification failed.
    #[error(transparent)]
    Verifier(#[from] VerifierError),
}

/// Everything but the models that a completion depends on.
#[derive(Clone, Copy)]
pub struct Task<'a> {
    /// The output format.
    pub grammar: &'a Grammar,
    /// Scores the grammar's labels.
    pub scorer: &'a LabelScorer,
    /// How far to look for labels' spellings.
    pub search: LabelSearch,
    /// The emotion of each of the grammar's labels.
    pub emotions: &'a [Emotion],
    /// The probabilities before the rationale.
    pub fast: &'a LabelProbabilities,
    /// Which probabilities decide the label.
    pub answer: Answer,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Whether tokens that the output format leaves no choice of are written without asking the model.
    pub forced: bool,
}

/// A completion, verified.
#[derive(Debug)]
pub struct Reason {
    /// What was written in the end.
    pub completion: Completion,
    /// The probabilities after the rationale.
    pub after: LabelProbabilities,
    /// Index of the label in the grammar's label set.
    pub label: usize,
    /// The rationale held against that label.
    pub assessment: Assessment,
    /// What the policy did.
    pub record: PolicyRecord,
    /// Tokens written and thrown away.
    pub extra_tokens: usize,
    /// Time spent on reading sentences.
    pub verify_time: Duration,
    /// Time spent on the probabilities after the rationale.
    pub probabilities_time: Duration,
}

/// Writes a completion behind the prompt in the model's cache, reads its sentences, and applies the policy. The cache
/// keeps what was written.
pub fn write_reason<M: LanguageModel + ?Sized>(
    policy: Policy,
    task: &Task<'_>,
    model: &mut M,
    verifier: &mut impl SentenceClassifier,
) -> Result<Reason, PolicyError> {
    let mut verifier = Timed { inner: verifier, spent: Duration::ZERO };
    let prompt = model.position();
    let mut best = attempt(policy, task, task.sampling, model, &mut verifier)?;
    let (mut resampled, mut written, mut probabilities_time) =
        (best.resampled, best.completion.tokens_written, best.probabilities_time);
    if let Policy::Retry(n) = policy {
        while best.assessment.verdict != Verdict::Verified && resampled < n {
            resampled += 1;
            model.truncate(prompt).map_err(GenerateError::from)?;
            let Sampling { temperature, top_p, seed } = task.sampling;
            // The golden ratio's bits keep the attempts of one seed apart from the first attempts of its neighbours.
            let seed = seed.wrapping_add((resampled as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
            let sampling = Sampling { temperature: temperature.max(RETRY_TEMPERATURE), top_p, seed };
            let other = attempt(policy, task, sampling, model, &mut verifier)?;
            written += other.completion.tokens_written;
            probabilities_time += other.probabilities_time;
            if other.worth() > best.worth() {
                best = other;
            }
        }
    }
    let withheld = policy == Policy::Withhold && best.assessment.verdict != Verdict::Verified;
    Ok(Reason {
        extra_tokens: written - best.completion.tokens.len(),
        completion: best.completion,
        after: best.after,
        label: best.label,
        assessment: best.assessment,
        record: PolicyRecord { resampled, withheld, ..PolicyRecord::of(policy.name(), policy.n()) },
        verify_time: verifier.spent,
        probabilities_time,
    })
}

/// One completion and what it is worth.
struct Attempt {
    completion: Completion,
    after: LabelProbabilities,
    label: usize,
    assessment: Assessment,
    reward: f32,
    resampled: usize,
    probabilities_time: Duration,
}

impl Attempt {
    /// Higher is better: by the verdict (no reason is better than a contradicting one), then by the explanation reward.
    fn worth(&self) -> (u8, f32) {
        let verdict = match self.assessment.verdict {
            Verdict::Verified => 3,
            Verdict::Mixed => 2,
            Verdict::Empty => 1,
            Verdict::Contradicted => 0,
        };
        (verdict, self.reward)
    }
}

fn attempt<M: LanguageModel + ?Sized>(
    policy: Policy,
    task: &Task<'_>,
    sampling: Sampling,
    model: &mut M,
    verifier: &mut impl SentenceClassifier,
) -> Result<Attempt, PolicyError> {
    let sampler = Sampler::new(sampling).map_err(GenerateError::from)?;
    let mut generator = Generator::new(model, task.grammar, sampler)?;
    if !task.forced {
        generator = generator.asking();
    }
    let guided = match policy {
        Policy::Guide(n) => {
            let emotion = task.emotions[task.fast.best()];
            Some(Guide::new(&generator, emotion, n, sampling.temperature == 0.0).run(&mut generator, verifier)?)
        }
        _ => None,
    };
    while !matches!(generator.phase(), Phase::Label | Phase::Complete) && generator.step()?.is_some() {}
    let scoring = Instant::now();
    let after = generator.label_probabilities(task.scorer, &task.search)?;
    let probabilities_time = scoring.elapsed();
    let completion = generator.finish()?;
    let (mut readings, resampled) = guided.unwrap_or_default();
    // A unit written again may run into the sentence before it, which then is another than the one that was read.
    if !readings.iter().map(|reading| reading.text.as_str()).eq(split_sentences(&completion.rationale)) {
        readings = read_sentences(&completion.rationale, verifier)?;
    }
    let label = match task.answer {
        Answer::Fast => task.fast.best(),
        Answer::After => after.best(),
    };
    let emotion = task.emotions[label];
    let labels: Vec<_> = readings.iter().map(|reading| reading.labels.clone()).collect();
    let reward = explanation_reward_of_labels(&labels, emotion);
    let assessment = Assessment::new(readings, emotion);
    Ok(Attempt { completion, after, label, assessment, reward, resampled, probabilities_time })
}

/// A token border in the rationale.
#[derive(Clone)]
struct Mark {
    /// Bytes of the rationale before it.
    length: usize,
    checkpoint: Checkpoint,
}

impl Mark {
    fn here<M: LanguageModel + ?Sized>(generator: &Generator<'_, M>) -> Mark {
        Mark { length: generator.rationale().len(), checkpoint: generator.checkpoint() }
    }
}

/// Where a unit ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// At one of its marks.
    Mark(usize),
    /// With the rationale.
    Rationale,
}

/// A unit that contradicts, kept in case no other is better.
struct Candidate {
    badness: f32,
    passage: Passage,
    marks: Vec<Mark>,
    end: End,
    readings: Vec<Reading>,
}

/// Verified decoding. It goes by *units*: stretches of the rationale from one token border at a sentence's end to the
/// next. With nearly every tokenizer a unit is a sentence; where a token reaches over the end of one, it holds the next
/// sentence as well.
struct Guide {
    emotion: Emotion,
    /// Most times that a unit is written again.
    n: usize,
    /// Whether a unit must begin with another token to come out differently.
    greedy: bool,
    /// Token borders of the unit being written; the first is its beginning.
    marks: Vec<Mark>,
    tries: usize,
    best: Option<Candidate>,
    resampled: usize,
    readings: Vec<Reading>,
}

impl Guide {
    fn new<M: LanguageModel + ?Sized>(generator: &Generator<'_, M>, emotion: Emotion, n: usize, greedy: bool) -> Guide {
        let marks = vec![Mark::here(generator)];
        Guide { emotion, n, greedy, marks, tries: 0, best: None, resampled: 0, readings: Vec::new() }
    }

    /// Writes the rationale to its end. Gives the readings of its sentences, and how often one was written again.
    fn run<M: LanguageModel + ?Sized>(
        mut self,
        generator: &mut Generator<'_, M>,
        verifier: &mut impl SentenceClassifier,
    ) -> Result<(Vec<Reading>, usize), PolicyError> {
        loop {
            let Some((mut end, unit)) = self.unit(generator) else {
                self.step(generator)?;
                continue;
            };
            let mut readings = read_sentences(unit, verifier)?;
            if let Some(badness) = self.badness(&readings) {
                let passage = generator.passage(&self.marks[0].checkpoint)?;
                let candidate = Candidate { badness, passage, marks: self.marks.clone(), end, readings };
                let best = match self.best.take() {
                    Some(best) if best.badness <= badness => best,
                    _ => candidate,
                };
                if self.try_again(generator)? {
                    self.best = Some(best);
                    continue;
                }
                // Nothing better will come.
                generator.restore(&best.passage)?;
                (self.marks, end, readings) = (best.marks, best.end, best.readings);
            }
            self.readings.extend(readings);
            (self.tries, self.best) = (0, None);
            match end {
                End::Mark(index) => drop(self.marks.drain(..index)),
                End::Rationale => return Ok((self.readings, self.resampled)),
            }
        }
    }

    /// Writes a token and marks the border behind it.
    fn step<M: LanguageModel + ?Sized>(&mut self, generator: &mut Generator<'_, M>) -> Result<(), GenerateError> {
        generator.step()?;
        if generator.text().len() <= THINK_OPEN.len() {
            self.marks.clear(); // the first unit begins behind the tag
        }
        self.marks.push(Mark::here(generator));
        Ok(())
    }

    /// The unit, if it has ended: its end and its text.
    fn unit<'g, M: LanguageModel + ?Sized>(&self, generator: &'g Generator<'_, M>) -> Option<(End, &'g str)> {
        let start = self.marks.first().map_or(0, |mark| mark.length);
        let text = &generator.rationale()[start..];
        let mut read = 0;
        while let Some(length) = finished_sentence(&text[read..]) {
            let sentence_end = read + text[read..read + length].trim_end().len();
            read += length;
            let behind = |mark: &Mark| (start + sentence_end..=start + read).contains(&mark.length);
            if let Some(index) = self.marks.iter().position(behind) {
                return Some((End::Mark(index), &text[..self.marks[index].length - start]));
            }
        }
        let ended = !matches!(generator.phase(), Phase::Opening | Phase::Rationale);
        ended.then_some((End::Rationale, text))
    }

    /// How far a unit's sentences are from the label; `None` where none contradicts it.
    fn badness(&self, readings: &[Reading]) -> Option<f32> {
        let against = readings.iter().filter(|reading| supports(&reading.labels, self.emotion) == Some(false));
        against.map(|reading| 1.0 - reading.probabilities[self.emotion.go_emotion().id()]).reduce(|sum, one| sum + one)
    }

    /// Rolls the unit back. False where it has been written often enough, or would only come out the same.
    fn try_again<M: LanguageModel + ?Sized>(
        &mut self,
        generator: &mut Generator<'_, M>,
    ) -> Result<bool, GenerateError> {
        let again = self.tries < self.n;
        // A warm model is drawn from again as it is, which keeps its distribution; a greedy one is sent another way.
        let another = generator.rollback(&self.marks[0].checkpoint, again && self.greedy)?;
        self.marks.truncate(1);
        let again = again && (another || !self.greedy);
        if again {
            self.tries += 1;
            self.resampled += 1;
        }
        Ok(again)
    }
}

/// A classifier whose time is counted.
struct Timed<'a, C> {
    inner: &'a mut C,
    spent: Duration,
}

impl<C: SentenceClassifier> SentenceClassifier for Timed<'_, C> {
    fn classify(&mut self, sentences: &[&str]) -> Result<Vec<[f32; 28]>, VerifierError> {
        let start = Instant::now();
        let read = self.inner.classify(sentences);
        self.spent += start.elapsed();
        read
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use super::*;
    use crate::text::TokenTable;
    use crate::text::toy::ToyModel;
    use crate::verify::assess;
    use crate::verify::scripted::Keywords;

    /// Whole words, so that tests read as text. The last id ends the turn.
    const WORDS: [&str; 21] = [
        "<think>",
        "</think>",
        "\n<answer>",
        "</answer>",
        "happy",
        "sad",
        "A",
        " cue",
        ".",
        " It",
        " So",
        " Truly",
        " is",
        " joy",
        " sadness",
        " anger",
        " fear",
        " and",
        ". It",
        "!",
        " \"",
    ];
    const END: u32 = WORDS.len() as u32;
    const PROMPT: [u32; 2] = [END, END];
    const LIKELY: f32 = 9.0;

    fn text_of(tokens: &[u32]) -> String {
        tokens.iter().filter_map(|&token| WORDS.get(token as usize)).copied().collect()
    }

    /// A model that goes on as `choices` says of the text so far: words, the best first, each a step less likely.
    fn model(choices: impl Fn(&str) -> &'static [&'static str] + 'static) -> ToyModel {
        ToyModel::new(WORDS.len() + 1, 200, &PROMPT, move |cache| {
            let mut logits = vec![-LIKELY; WORDS.len() + 1];
            for (rank, word) in choices(&text_of(cache)).iter().enumerate() {
                logits[WORDS.iter().position(|known| known == word).unwrap()] = LIKELY - 3.0 * rank as f32;
            }
            logits
        })
    }

    struct Setting {
        grammar: Grammar,
        scorer: LabelScorer,
        fast: LabelProbabilities,
    }

    impl Setting {
        /// The fast answer is sad.
        fn new(max_new_tokens: usize) -> Setting {
            let tokens = (0..).zip(WORDS.iter().map(|word| word.as_bytes()));
            let table = Arc::new(TokenTable::new(WORDS.len() + 1, END, tokens));
            let labels = ["happy".to_string(), "sad".to_string()];
            Setting {
                grammar: Grammar::new(table.clone(), &labels, max_new_tokens).unwrap(),
                scorer: LabelScorer::new(table, &labels).unwrap(),
                fast: LabelProbabilities { probabilities: vec![0.25, 0.75], mass: 1.0, unexplored: 0.0, steps: 1 },
            }
        }

        fn task(&self, temperature: f32, seed: u64) -> Task<'_> {
            Task {
                grammar: &self.grammar,
                scorer: &self.scorer,
                search: LabelSearch::default(),
                emotions: &[Emotion::Happiness, Emotion::Sadness],
                fast: &self.fast,
                answer: Answer::After,
                sampling: Sampling { temperature, top_p: 1.0, seed },
                forced: true,
            }
        }

        fn run(&self, policy: Policy, temperature: f32, seed: u64, model: &mut ToyModel) -> Reason {
            write_reason(policy, &self.task(temperature, seed), model, &mut Keywords::default()).unwrap()
        }
    }

    /// "A cue." and then, in order of liking, "It is anger.", "So is sadness."; the answer is sad.
    fn wrong_then_right(text: &str) -> &'static [&'static str] {
        match text {
            "" => &["<think>"],
            _ if text.ends_with("<think>") => &["A"],
            _ if text.ends_with('A') => &[" cue"],
            _ if text.ends_with("cue") => &["."],
            _ if text.ends_with("cue.") => &[" It", " So"],
            _ if text.ends_with(" It") || text.ends_with(" So") => &[" is"],
            _ if text.ends_with(" It is") => &[" anger"],
            _ if text.ends_with(" So is") => &[" sadness"],
            _ if text.ends_with("anger") || text.ends_with("sadness") => &["."],
            _ if text.ends_with("</think>") => &["\n<answer>"],
            _ if text.ends_with("<answer>") => &["sad", "happy"],
            _ if text.ends_with("sad") => &["</answer>"],
            _ => &["</think>"],
        }
    }

    #[test]
    fn policies_are_read_and_written() {
        for (text, policy) in [
            ("annotate", Policy::Annotate),
            ("retry:3", Policy::Retry(3)),
            ("guide:64", Policy::Guide(64)),
            ("withhold", Policy::Withhold),
        ] {
            assert_eq!(text.parse(), Ok(policy));
            assert_eq!(policy.to_string(), text);
        }
        for text in [
            "",
            "retry",
            "retry:",
            "retry:0",
            "guide:65",
            "guide:-1",
            "guide:99999999999999999999",
            "annotate:1",
            "none",
        ] {
            assert!(text.parse::<Policy>().is_err(), "{text}");
        }
    }

    #[test]
    fn annotate_and_withhold_write_once() {
        let setting = Setting::new(40);
        let annotated = setting.run(Policy::Annotate, 0.0, 0, &mut model(wrong_then_right));
        assert_eq!(annotated.completion.text, "<think>A cue. It is anger.</think>\n<answer>sad</answer>");
        assert_eq!((annotated.label, annotated.assessment.verdict), (1, Verdict::Contradicted));
        assert_eq!((annotated.extra_tokens, annotated.record.resampled, annotated.record.withheld), (0, 0, false));
        let withheld = setting.run(Policy::Withhold, 0.0, 0, &mut model(wrong_then_right));
        assert!(withheld.record.withheld);
        assert_eq!(withheld.completion, annotated.completion);
        let right = |text: &str| -> &'static [&'static str] {
            if text.ends_with("cue.") { &[" So"] } else { wrong_then_right(text) }
        };
        assert!(!setting.run(Policy::Withhold, 0.0, 0, &mut model(right)).record.withheld);
    }

    /// After a rollback everything goes on as if the sentence had never been.
    #[test]
    fn a_contradicting_sentence_leaves_no_trace() {
        let setting = Setting::new(40);
        let mut guided_model = model(wrong_then_right);
        let guided = setting.run(Policy::Guide(2), 0.0, 0, &mut guided_model);
        assert_eq!(guided.completion.text, "<think>A cue. So is sadness.</think>\n<answer>sad</answer>");
        assert_eq!(guided.assessment.verdict, Verdict::Verified);
        assert_eq!(guided.record, PolicyRecord { resampled: 1, ..PolicyRecord::of("guide", Some(2)) });
        // " It is anger." and the closing tag that showed where the sentence ends.
        assert_eq!(guided.extra_tokens, 5);

        let mut innocent_model = model(|text| if text.ends_with("cue.") { &[" So"] } else { wrong_then_right(text) });
        let innocent = setting.run(Policy::Annotate, 0.0, 0, &mut innocent_model);
        assert_eq!(guided.completion.tokens, innocent.completion.tokens);
        assert_eq!(guided_model.cache(), innocent_model.cache());
        let logits =
            [&mut guided_model, &mut innocent_model].map(|model| model.logits().expect("it has them").to_vec());
        assert_eq!(logits[0], logits[1]);
        assert_eq!(guided.assessment, innocent.assessment);
    }

    #[test]
    fn the_first_sentence_can_contradict() {
        let choices = |text: &str| -> &'static [&'static str] {
            match text {
                _ if text.ends_with("<think>") => &[" It", " So"],
                _ if text.ends_with("anger.") => &[" So"],
                _ => wrong_then_right(text),
            }
        };
        let reason = Setting::new(40).run(Policy::Guide(1), 0.0, 0, &mut model(choices));
        assert_eq!(reason.completion.rationale, " So is sadness.");
        // " It is anger." and the " So" that showed where the sentence ends.
        assert_eq!((reason.extra_tokens, reason.record.resampled), (5, 1));
    }

    /// Reads anger, joy and fear, each with a different rest of sadness.
    struct Shades;

    impl SentenceClassifier for Shades {
        fn classify(&mut self, sentences: &[&str]) -> Result<Vec<[f32; 28]>, VerifierError> {
            let mut read = Keywords::default().classify(sentences)?;
            for (sentence, probabilities) in sentences.iter().zip(&mut read) {
                for (word, rest) in [("anger", 0.02), ("joy", 0.08), ("fear", 0.05)] {
                    if sentence.contains(word) {
                        probabilities[Emotion::Sadness.go_emotion().id()] = rest;
                    }
                }
            }
            Ok(read)
        }
    }

    #[test]
    fn when_tries_run_out_the_least_bad_stays() {
        let choices = |text: &str| -> &'static [&'static str] {
            match text {
                _ if text.ends_with("cue.") => &[" It", " So", " Truly"],
                _ if text.ends_with(" It is") => &[" anger"],
                _ if text.ends_with(" So is") => &[" joy"],
                _ if text.ends_with(" Truly is") => &[" fear"],
                _ if text.ends_with(" Truly") => &[" is"],
                _ if text.ends_with("joy") || text.ends_with("fear") => &["."],
                _ => wrong_then_right(text),
            }
        };
        let setting = Setting::new(60);
        let run = |n| write_reason(Policy::Guide(n), &setting.task(0.0, 0), &mut model(choices), &mut Shades).unwrap();
        let reason = run(2);
        assert_eq!(reason.completion.rationale, "A cue. So is joy.");
        assert_eq!((reason.record.resampled, reason.extra_tokens), (2, 10));
        assert_eq!(reason.assessment.verdict, Verdict::Contradicted);
        let reason = run(1);
        assert_eq!(reason.completion.rationale, "A cue. So is joy.");
        assert_eq!((reason.record.resampled, reason.extra_tokens), (1, 5));
    }

    #[test]
    fn a_sentence_cut_off_by_the_budget_is_read_too() {
        let choices = |text: &str| -> &'static [&'static str] {
            match text {
                _ if text.ends_with("<think>") => &["A"],
                _ if text.ends_with('A') => &[" anger"],
                _ if text.ends_with("anger") => &[" and"],
                _ if text.ends_with("and") => &[" anger"],
                _ => wrong_then_right(text),
            }
        };
        let reason = Setting::new(12).run(Policy::Guide(1), 0.0, 0, &mut model(choices));
        assert!(reason.completion.text.ends_with("</think>\n<answer>sad</answer>"), "{}", reason.completion.text);
        assert_eq!(reason.record.resampled, 1);
        assert_eq!(reason.assessment.sentences.len(), 1);
        assert!(reason.completion.tokens.len() <= 12);
    }

    /// ". It" ends one sentence and begins the next: both are one unit, and no sentence goes unread.
    #[test]
    fn tokens_that_reach_over_a_sentences_end() {
        let choices = |text: &str| -> &'static [&'static str] {
            match text {
                _ if text.ends_with("<think>") => &["A", " So"],
                _ if text.ends_with("cue") => &[". It"],
                _ => wrong_then_right(text),
            }
        };
        let reason = Setting::new(40).run(Policy::Guide(1), 0.0, 0, &mut model(choices));
        assert_eq!(reason.completion.rationale, " So is sadness.");
        assert_eq!(reason.record.resampled, 1);
    }

    #[test]
    fn retry_keeps_the_best_and_counts_the_rest() {
        // Anger or sadness, as the random numbers have it.
        let choices = |text: &str| -> &'static [&'static str] {
            if text.ends_with("cue.") { &[" It"] } else { wrong_then_right(text) }
        };
        let fair = || {
            ToyModel::new(WORDS.len() + 1, 200, &PROMPT, move |cache| {
                let text = text_of(cache);
                let mut logits = vec![-90.0; WORDS.len() + 1];
                let words: &[&str] = if text.ends_with(" is") { &[" anger", " sadness"] } else { &choices(&text)[..1] };
                for word in words {
                    logits[WORDS.iter().position(|known| known == word).unwrap()] = LIKELY;
                }
                logits
            })
        };
        let setting = Setting::new(40);
        let mut resampled = Vec::new();
        for seed in 0..20 {
            let reason = setting.run(Policy::Retry(2), 1.0, seed, &mut fair());
            let again = setting.run(Policy::Retry(2), 1.0, seed, &mut fair());
            assert_eq!((&reason.completion, &reason.record), (&again.completion, &again.record), "seed {seed}");
            assert_eq!(reason.extra_tokens, reason.record.resampled * reason.completion.tokens.len(), "seed {seed}");
            let verified = reason.assessment.verdict == Verdict::Verified;
            assert!(verified || reason.record.resampled == 2, "seed {seed}");
            resampled.push(reason.record.resampled);
        }
        assert!((0..=2).all(|count| resampled.contains(&count)), "{resampled:?}");
        // Greedy attempts are warmed up, or they would all be the same.
        let reasons = (0..20).map(|seed| setting.run(Policy::Retry(8), 0.0, seed, &mut fair()));
        assert!(reasons.into_iter().all(|reason| reason.assessment.verdict == Verdict::Verified));
    }

    /// Over random models: completions stay readable, the sentences read one by one are those of the whole, tokens add
    /// up, and a seed repeats itself.
    #[test]
    fn random_models_keep_the_promises() {
        let setting = Setting::new(48);
        let mut rewritten = 0;
        for seed in 0..60 {
            for (policy, temperature) in [(Policy::Guide(2), 1.0), (Policy::Guide(3), 0.0), (Policy::Retry(2), 0.5)] {
                let run = || {
                    let mut toy = ToyModel::random(WORDS.len() + 1, 200, seed, 3.0);
                    setting.run(policy, temperature, seed, &mut toy)
                };
                let reason = run();
                let Completion { text, rationale, label, tokens, .. } = &reason.completion;
                assert_eq!(*text, format!("<think>{rationale}</think>\n<answer>{label}</answer>"));
                assert_eq!(text_of(tokens), *text);
                let emotion = setting.task(0.0, 0).emotions[reason.label];
                let whole = assess(rationale, emotion, &mut Keywords::default()).unwrap();
                assert_eq!(reason.assessment, whole, "seed {seed} {policy}: {rationale:?}");
                assert_eq!(reason.extra_tokens > 0, reason.record.resampled > 0, "seed {seed} {policy}");
                let again = run();
                assert_eq!((again.completion, again.extra_tokens), (reason.completion, reason.extra_tokens));
                rewritten += reason.record.resampled;
            }
        }
        assert!(rewritten > 100, "only {rewritten} sentences and completions were written again");
    }
}
