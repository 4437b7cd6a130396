//! One thread's models: from an item of the data to its record.

use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Context;
use candor::media::Fit;
use candor::observation::{Observation, Probabilities};
use candor::text::{HeadRows, Sampling};
use candor::verify::Emotion;
use candor::watch::{WatchSettings, Watcher};
use candor_kernels::Device;

use super::EvalArgs;
use super::record::{Judged, Record, TokenCounts};
use crate::dataset::extractor::ClipError;
use crate::dataset::{Dataset, Extractor, FeatureCache, Item};
use crate::judge::{Lexicon, verifier};

/// Sentences whose reading a thread remembers, some 15 MB.
const REMEMBERED: usize = 60_000;

/// Completions that are the same with fewer rows of the output head as with all.
#[derive(Default)]
pub(super) struct Unchanged {
    same: AtomicUsize,
    all: AtomicUsize,
}

impl Unchanged {
    fn count(&self, all_rows: &Observation, fewer: &Observation) {
        let best =
            |observation: &Observation| observation.probabilities.as_ref().and_then(|p| p.best()).map(str::to_owned);
        let same = all_rows.rationale == fewer.rationale && best(all_rows) == best(fewer);
        self.all.fetch_add(1, Ordering::Relaxed);
        self.same.fetch_add(usize::from(same), Ordering::Relaxed);
    }

    pub(super) fn print(&self, rows: HeadRows) {
        let (same, all) = (self.same.load(Ordering::Relaxed), self.all.load(Ordering::Relaxed));
        if all > 0 {
            let share = 100.0 * same as f64 / all as f64;
            eprintln!("--head-rows {rows}: {same} of {all} completions ({share:.1} %) are those of all rows");
        }
    }
}

/// What became of an item.
pub(super) enum Outcome {
    /// It was evaluated.
    Read(Box<Record>),
    /// Its clip cannot be used.
    Broken(String),
}

/// One thread's models.
pub(super) struct Reader<'a, D: Device> {
    watcher: Watcher<D>,
    /// The same with all rows of the output head, where the other has fewer.
    all_rows: Option<Watcher<D>>,
    unchanged: &'a Unchanged,
    own_instruction: String,
    extractor: Extractor<D>,
    cache: Option<&'a FeatureCache>,
    lexicon: Lexicon,
    emotions: Vec<Emotion>,
}

impl<'a, D: Device> Reader<'a, D> {
    pub(super) fn open(
        args: &EvalArgs,
        data: &Dataset,
        cache: Option<&'a FeatureCache>,
        unchanged: &'a Unchanged,
        device: &D,
    ) -> anyhow::Result<Reader<'a, D>> {
        let model = args.model()?;
        let sampling = Sampling { temperature: args.temperature, top_p: args.top_p, seed: args.seed };
        // The extractor finds faces; the watcher takes what the tower made of them.
        let watcher = |head_rows| {
            let fit = Some(Fit::Stretch);
            let settings = WatchSettings { policy: args.policy, sampling, fit, head_rows, ..WatchSettings::default() };
            let opened = Watcher::open(model, args.verifier.as_deref(), device.clone(), settings)?;
            let mut watcher = opened.remembering(REMEMBERED);
            if let Some(adapter) = &args.adapter {
                watcher.adapt(adapter)?;
            }
            anyhow::Ok(watcher)
        };
        let all_rows = (args.head_rows != HeadRows::All).then(|| watcher(HeadRows::All)).transpose()?;
        let watcher = watcher(args.head_rows)?;
        Ok(Reader {
            emotions: watcher.manifest().emotions(),
            own_instruction: watcher.manifest().model.instruction.clone(),
            watcher,
            all_rows,
            unchanged,
            extractor: Extractor::open(model, data.faces.clone(), device.clone())?,
            cache,
            lexicon: Lexicon::new(),
        })
    }

    /// Evaluates an item, the `place`th of the evaluation; without `answers` it only looks whether the clip can be used.
    pub(super) fn read(&mut self, item: &Item, place: usize, answers: bool) -> anyhow::Result<Outcome> {
        let features = match self.cache {
            Some(cache) => cache.get(&mut self.extractor, &item.media),
            None => self.extractor.extract(&item.media),
        };
        let features = match features {
            Ok(features) => features,
            // As in use: where no face is seen no emotion is claimed, and the answer is missing.
            Err(ClipError::NoFace { .. }) => return Ok(Outcome::Read(Box::new(unanswered(item)))),
            Err(error) if error.is_of_the_clip() => return Ok(Outcome::Broken(error.to_string())),
            Err(error) => return Err(error.into()),
        };
        if !answers {
            return Ok(Outcome::Read(Box::new(unanswered(item))));
        }
        let instruction = item.prompt.as_ref().unwrap_or(&self.own_instruction);
        let look = |watcher: &mut Watcher<D>| {
            watcher.ask(instruction)?;
            watcher.observe_features(&item.id, place as u64, &features.every_frame())
        };
        let observation = look(&mut self.watcher)?;
        if let Some(all_rows) = &mut self.all_rows {
            self.unchanged.count(&look(all_rows)?, &observation);
        }
        Ok(Outcome::Read(Box::new(self.judge(item, observation)?)))
    }

    fn judge(&mut self, item: &Item, observation: Observation) -> anyhow::Result<Record> {
        let best = |probabilities: &Option<Probabilities>| {
            probabilities.as_ref().and_then(|p| p.best()).and_then(Emotion::fold)
        };
        let read = match &observation.rationale {
            // The verifier remembers the sentences, which it has read for the verdict.
            Some(rationale) => Judged {
                verifier: verifier::judge(self.watcher.verifier(), rationale, &self.emotions)?,
                lexicon: self.lexicon.judge(rationale, &self.emotions),
            },
            None => Judged::default(),
        };
        let count = |tokens: usize| u32::try_from(tokens).context("more tokens than can be counted");
        Ok(Record {
            answer: best(&observation.probabilities),
            fast: best(&observation.fast_probabilities),
            read,
            rationale: observation.rationale,
            sentences: observation.sentences,
            verdict: observation.verdict,
            withheld: observation.policy.withheld,
            tokens: TokenCounts {
                completion: count(observation.tokens.generated)?,
                extra: count(observation.tokens.extra)?,
            },
            ..unanswered(item)
        })
    }
}

fn unanswered(item: &Item) -> Record {
    Record {
        id: item.id.clone(),
        truth: item.emotion,
        answer: None,
        fast: None,
        read: Judged::default(),
        rationale: None,
        sentences: Vec::new(),
        verdict: candor::verify::Verdict::Empty,
        withheld: false,
        tokens: TokenCounts::default(),
        cues: None,
    }
}
