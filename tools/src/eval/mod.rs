//! `candor-tools eval`: what a model makes of labelled clips or photographs, through the runtime and as it would be in
//! use: the metrics of the paper (arXiv 2510.23506) by two judges and, where cues were measured, whether the rationale
//! says what is there.
//!
//! A model answers twice: at once, and after its rationale. Both are measured; wherever one answer is meant (WAR, UAR, EPC,
//! FCR, confusion) it is the one after the rationale, whichever the model's manifest shows. The runtime holds completions
//! to the output format, so an answer is missing only where no face is seen.

pub mod bootstrap;
pub mod compare;
pub mod flips;
pub mod metrics;
mod page;
pub mod paired;
mod reader;
pub mod record;
pub mod tally;

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, ensure};
use candor::device::Choice;
use candor::manifest::Manifest;
use candor::message::say;
use candor::text::HeadRows;
use candor::verify::Emotion;
use candor::watch::Policy;
use candor::with_device;
use candor_kernels::Device;
use clap::Args;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::data::rationale::{Cue, claim_is_right, cue_claims};
use crate::dataset::{Dataset, DatasetError, FacesFiles, FeatureCache, Item, Media, Problem, ProblemKind, Problems};
use crate::workers;
use metrics::{Metrics, measure};
use reader::{Outcome, Reader, Unchanged};
use record::{CueCounts, Record};
use tally::Measure;

/// Seed of the order in which photographs get each other's cues.
const SHUFFLE_SEED: u64 = 1;

/// The page that is written by default.
const PAGE: &str = "eval.html";

/// `candor-tools eval`
#[derive(Args)]
pub struct EvalArgs {
    /// The model's folder.
    #[arg(long, value_name = "DIR", required_unless_present = "compare")]
    pub model: Option<PathBuf>,
    /// Labelled clips or photographs: a JSON list as it is published, or JSONL.
    #[arg(long, value_name = "FILE", required_unless_present_any = ["faces", "compare"], conflicts_with = "faces")]
    pub data: Option<PathBuf>,
    /// Labelled faces, laid out as faces48.safetensors, in the place of --data.
    #[arg(long, value_name = "FILE")]
    pub faces: Option<PathBuf>,
    /// Part of the faces file.
    #[arg(long, default_value = "val")]
    pub part: String,
    /// Adapter beside the model: a PEFT folder, or that of a reward fine-tuning run.
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// The verifier's folder; by default the one that the model names.
    #[arg(long, value_name = "DIR")]
    pub verifier: Option<PathBuf>,
    /// Folder that the data's paths start from; by default that of the data.
    #[arg(long, value_name = "DIR")]
    pub media_root: Option<PathBuf>,
    /// Folder of vision features, as `data features` and `train grpo` keep them; clips that are not in it are added.
    #[arg(long, value_name = "DIR")]
    pub features: Option<PathBuf>,
    /// Leave out entries that cannot be used, and say which; otherwise they are an error.
    #[arg(long)]
    pub skip_bad: bool,
    /// What to do about rationales that are not verified: annotate, retry:N, guide:N or withhold.
    #[arg(long, default_value_t = Policy::Annotate)]
    pub policy: Policy,
    /// Seed of the random numbers; each entry adds its place.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Warmth of the writing; 0 always takes the most probable token.
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Share of the probability that is drawn from, where it is warm.
    #[arg(long, default_value_t = 0.9)]
    pub top_p: f32,
    /// Rows of the output head that are computed: all, language or a number, as of `candor watch`. Every entry is then
    /// answered with all rows too, and the share of completions that come out the same is printed.
    #[arg(long, default_value_t = HeadRows::All, value_name = "ROWS")]
    pub head_rows: HeadRows,
    /// Take only so many entries, spread over the data.
    #[arg(long)]
    pub limit: Option<usize>,
    /// End with one JSON object instead of a table.
    #[arg(long)]
    pub json: bool,
    /// Also write one JSON line for each entry to this file.
    #[arg(long, value_name = "FILE")]
    pub records: Option<PathBuf>,
    /// Page with charts and every rationale; by default eval.html where --data is given, else none.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Photographs that the page shows at most, those of entries with a disagreement first.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub pictures: usize,
    /// Threads, each with a model of its own over the same mapped weights.
    #[arg(long, default_value_t = 2)]
    pub threads: usize,
    /// Where the model computes: auto (a GPU if one can be used, else the processor), cpu, cuda or cuda:N. A GPU holds each
    /// thread's model.
    #[arg(long, default_value_t = Choice::Auto)]
    pub device: Choice,
    /// Compute with activations in f32 where weights are quantised, in place of rounding them to bytes as in use.
    #[arg(long)]
    pub exact: bool,
    /// Hold the records of two evaluations of the same data against each other, in the place of evaluating.
    #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with_all = ["model", "data", "faces", "records"])]
    pub compare: Option<Vec<PathBuf>>,
}

impl EvalArgs {
    fn model(&self) -> anyhow::Result<&Path> {
        self.model.as_deref().context("--model DIR names the model to evaluate")
    }

    /// The data, with ids that stand once each.
    fn dataset(&self) -> anyhow::Result<Dataset> {
        let mut data = match (&self.data, &self.faces) {
            (Some(list), _) => Dataset::open(list, self.media_root.as_deref(), self.skip_bad)?,
            (None, Some(faces)) => photographs(faces, &self.part)?,
            (None, None) => anyhow::bail!("--data FILE names what to evaluate on"),
        };
        make_unique(&mut data.items);
        Ok(data)
    }

    /// The data within the limit.
    fn limited(&self) -> anyhow::Result<Dataset> {
        let mut data = self.dataset()?;
        if let Some(limit) = self.limit {
            ensure!(limit > 0, "--limit must be at least 1");
            data.items = spread(std::mem::take(&mut data.items), limit);
        }
        Ok(data)
    }
}

/// Runs `candor-tools eval`.
pub fn run(args: &EvalArgs) -> anyhow::Result<()> {
    if let Some([a, b]) = args.compare.as_deref() {
        return run_comparison(args, a, b);
    }
    ensure!(args.threads > 0, "--threads must be at least 1");
    let html = args.html.clone().or(args.data.as_ref().map(|_| PathBuf::from(PAGE)));
    // A place that cannot be written to shows now, not after the work.
    html.iter().chain(&args.records).try_for_each(|path| check_writable(path))?;
    let data = args.limited()?;
    let model = args.model()?;
    warn_of_unknown_labels(model, &data.items)?;
    let records = evaluate(args, &data)?;
    if let Some(path) = &args.records {
        write(path, |out| record::write(out, &records))?;
    }
    let metrics = measure(&records, &args.policy.to_string());
    if let Some(path) = &html {
        let pictures = pictures(&data, &records, args.pictures)?;
        let name = args
            .adapter
            .as_ref()
            .map_or(model.display().to_string(), |adapter| format!("{} with {}", model.display(), adapter.display()));
        let run = page::Run { name: &name, metrics: &metrics, records: &records };
        write(path, |out| page::write(out, &[run], None, &pictures))?;
    }
    if args.json {
        say(serde_json::to_string(&metrics)?)?;
    } else {
        print(&metrics)?;
    }
    Ok(())
}

/// What a model makes of each entry of the data.
pub(crate) fn records(args: &EvalArgs) -> anyhow::Result<Vec<Record>> {
    evaluate(args, &args.limited()?)
}

/// `--compare A B`
fn run_comparison(args: &EvalArgs, a: &Path, b: &Path) -> anyhow::Result<()> {
    args.html.iter().try_for_each(|path| check_writable(path))?;
    let records = compare::read(a, b)?;
    let names = [a, b].map(|path| path.display().to_string());
    let comparison = compare::compare([&names[0], &names[1]], &records);
    if let Some(path) = &args.html {
        let metrics = [measure(&records[0], ""), measure(&records[1], "")];
        let run = |i: usize| page::Run { name: &names[i], metrics: &metrics[i], records: &records[i] };
        write(path, |out| page::write(out, &[run(0), run(1)], Some(&comparison), &HashMap::new()))?;
    }
    if args.json {
        say(serde_json::to_string(&comparison)?)?;
    } else {
        compare::print(&comparison)?;
    }
    Ok(())
}

fn check_writable(path: &Path) -> anyhow::Result<()> {
    let opened = OpenOptions::new().create(true).write(true).truncate(false).open(path);
    opened.map(drop).with_context(|| format!("cannot write {}", path.display()))
}

fn write(path: &Path, content: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> anyhow::Result<()> {
    let written = File::create(path).and_then(|file| content(&mut BufWriter::new(file)));
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// Photographs as PNG files by the ids of their records: at most `most`, first those where anything disagrees.
fn pictures(data: &Dataset, records: &[Record], most: usize) -> anyhow::Result<HashMap<String, Vec<u8>>> {
    let agrees = |record: &&Record| {
        let read = record.read;
        record.is_right() && read.verifier == record.answer && read.lexicon == record.answer
    };
    let items: HashMap<&str, &Item> = data.items.iter().map(|item| (item.id.as_str(), item)).collect();
    let (agreeing, disagreeing): (Vec<&Record>, Vec<&Record>) = records.iter().partition(agrees);
    let mut pictures = HashMap::new();
    for record in disagreeing.into_iter().chain(agreeing) {
        let Some(Media::Photograph { file, part, row }) = items.get(record.id.as_str()).map(|item| &item.media) else {
            continue;
        };
        if pictures.len() >= most {
            break;
        }
        let faces = data.faces.part(file, part)?;
        pictures.insert(record.id.clone(), page::png(faces.image(*row), faces.side)?);
    }
    Ok(pictures)
}

/// Every photograph of a part of a faces file.
pub(crate) fn photographs(file: &Path, part: &str) -> anyhow::Result<Dataset> {
    let files = FacesFiles::default();
    let faces = files.part(file, part)?;
    let fold = |class: &String| {
        Emotion::fold(class).with_context(|| format!("{}: class {class:?} is no known emotion", file.display()))
    };
    let classes = faces.classes.iter().map(fold).collect::<anyhow::Result<Vec<Emotion>>>()?;
    let item = |(row, &label): (usize, &u8)| Item {
        id: format!("{part}/{row}"),
        line: row + 1,
        media: Media::Photograph { file: file.into(), part: part.into(), row },
        prompt: None,
        label: faces.classes[usize::from(label)].clone(),
        emotion: classes[usize::from(label)],
        rationale: None,
    };
    let items = faces.labels.iter().enumerate().map(item).collect();
    Ok(Dataset { items, problems: Vec::new(), faces: files })
}

/// An id that is a clip's path may stand in many entries; records are told apart by their ids.
pub(crate) fn make_unique(items: &mut [Item]) {
    let mut times: HashMap<String, usize> = HashMap::new();
    items.iter().for_each(|item| *times.entry(item.id.clone()).or_default() += 1);
    for item in items {
        if times.get(&item.id).is_some_and(|&times| times > 1) {
            item.id = format!("{} (entry {})", item.id, item.line);
        }
    }
}

/// At most `limit` items, evenly from all of them.
pub(crate) fn spread(items: Vec<Item>, limit: usize) -> Vec<Item> {
    let (all, count) = (items.len(), limit.min(items.len()));
    let mut taken = (0..count).map(|i| i * all / count).peekable();
    items.into_iter().enumerate().filter(|(i, _)| taken.next_if_eq(i).is_some()).map(|(_, item)| item).collect()
}

/// A model cannot answer with what is none of its labels.
fn warn_of_unknown_labels(model: &Path, items: &[Item]) -> anyhow::Result<()> {
    let known = Manifest::open(model)?.emotions();
    let mut unknown: BTreeMap<&str, usize> = BTreeMap::new();
    for item in items.iter().filter(|item| !known.contains(&item.emotion)) {
        *unknown.entry(item.emotion.name()).or_default() += 1;
    }
    if !unknown.is_empty() {
        let counts: Vec<String> = unknown.iter().map(|(name, count)| format!("{name} {count}")).collect();
        log::warn!("entries whose label the model does not have can only be answered wrongly: {}", counts.join(", "));
    }
    Ok(())
}

/// A record for each item, in their order.
fn evaluate(args: &EvalArgs, data: &Dataset) -> anyhow::Result<Vec<Record>> {
    let chosen = args.device.open(Some(1))?;
    let chosen = if args.exact { chosen.exact() } else { chosen };
    with_device!(chosen, device => evaluate_on(&device, args, data))
}

fn evaluate_on<D: Device>(device: &D, args: &EvalArgs, data: &Dataset) -> anyhow::Result<Vec<Record>> {
    let cache =
        args.features.as_deref().map(|folder| FeatureCache::open(folder, args.model()?).map_err(anyhow::Error::from));
    let cache = cache.transpose()?;
    // Behind a broken clip that ends it all, the others are only looked at, so that the message can name every one.
    let lost = AtomicBool::new(false);
    let work = |reader: &mut Reader<'_, D>, place: usize| {
        let item = &data.items[place];
        let outcome = reader
            .read(item, place, !lost.load(Ordering::Relaxed))
            .with_context(|| format!("entry {} ({})", item.line, item.id))?;
        if matches!(outcome, Outcome::Broken(_)) && !args.skip_bad {
            lost.store(true, Ordering::Relaxed);
        }
        Ok(outcome)
    };
    let unchanged = Unchanged::default();
    let open = || Reader::open(args, data, cache.as_ref(), &unchanged, device);
    let outcomes = workers::run(data.items.len(), args.threads, "entries", open, work)?;
    unchanged.print(args.head_rows);
    let path = args.data.as_ref().or(args.faces.as_ref()).cloned().unwrap_or_default();
    let (mut records, mut cues, mut broken) = (Vec::new(), Vec::new(), Vec::new());
    for (item, outcome) in data.items.iter().zip(outcomes) {
        match outcome {
            Outcome::Read(record) => {
                records.push(*record);
                cues.push(data.cues(item));
            }
            Outcome::Broken(reason) => {
                broken.push(Problem { file: path.clone(), entry: item.line, kind: ProblemKind::Broken, reason });
            }
        }
    }
    let total = data.items.len() + data.problems.len();
    if records.is_empty() {
        return Err(DatasetError::NothingLeft { path, problems: Problems(broken) }.into());
    }
    if !broken.is_empty() && !args.skip_bad {
        return Err(DatasetError::Bad { path, total, problems: Problems(broken) }.into());
    }
    Problems::warn(&broken, total);
    count_cues(&mut records, &cues);
    Ok(records)
}

/// Holds the stated cues of measured photographs against their own measurement and, as a control, against that of another
/// photograph, chosen by chance.
fn count_cues(records: &mut [Record], cues: &[Option<[f32; Cue::COUNT]>]) {
    let measured = records.iter_mut().zip(cues).filter_map(|(record, cues)| Some((record, cues.as_ref()?)));
    let mut circle: Vec<(&mut Record, &[f32; Cue::COUNT])> = measured.collect();
    circle.shuffle(&mut ChaCha8Rng::seed_from_u64(SHUFFLE_SEED));
    let others: Vec<&[f32; Cue::COUNT]> = (0..circle.len()).map(|place| circle[(place + 1) % circle.len()].1).collect();
    for ((record, own), other) in circle.into_iter().zip(others) {
        let claims = cue_claims(record.rationale.as_deref().unwrap_or_default());
        let right = |cues| claims.iter().filter(|&&claim| claim_is_right(claim, cues)).count() as u32;
        record.cues = Some(CueCounts { stated: claims.len() as u32, right: right(own), right_by_chance: right(other) });
    }
}

fn print(metrics: &Metrics) -> io::Result<()> {
    let line = |name: &str, value: &str| say(format_args!("{name:42} {value}"));
    let with_interval = |value: f64, interval: Option<&[f64; 2]>| match interval {
        Some([low, high]) => format!("{value:.4}  [{low:.4}, {high:.4}]"),
        None => format!("{value:.4}"),
    };
    line("entries", &metrics.n.to_string())?;
    line("policy", &metrics.policy)?;
    for measure in Measure::ALL {
        let shown = metrics
            .value(measure)
            .map_or("none stated".to_owned(), |value| with_interval(value, metrics.intervals.get(measure.key())));
        line(measure.title(), &shown)?;
    }
    line("stated cues of measured faces", &metrics.cues_stated.to_string())?;
    let conduct = &metrics.conduct;
    for (name, value) in [
        ("different words, share", conduct.distinct_1),
        ("different pairs of words, share", conduct.distinct_2),
        ("sentences that name an emotion", conduct.naming_share),
        ("sentences a rationale", conduct.sentences),
        ("words a rationale", conduct.words),
        ("rationales of one sentence", conduct.one_sentence_share),
        ("rationales that stand more than once", conduct.repeated_share),
    ] {
        line(name, &format!("{value:.4}"))?;
    }
    for (emotion, &share) in &metrics.recall {
        let shown = with_interval(share, metrics.recall_intervals.get(emotion));
        line(&format!("  right of those that are {emotion}"), &shown)?;
    }
    let confusion = &metrics.confusion;
    say(format_args!("\n{:>14}  answered", "truth"))?;
    let columns: String =
        confusion.labels.iter().chain(&["none"]).map(|label| format!("{:>9}", short(label))).collect();
    say(format_args!("{:>14}{columns}", ""))?;
    for (label, row) in confusion.labels.iter().zip(&confusion.rows) {
        let cells: String = row.iter().map(|count| format!("{count:>9}")).collect();
        say(format_args!("{label:>14}{cells}"))?;
    }
    Ok(())
}

/// A label that fits a column.
fn short(label: &str) -> &str {
    label.get(..8).unwrap_or(label)
}

#[cfg(test)]
mod tests;
