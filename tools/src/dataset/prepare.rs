//! `candor-tools data features`: looks at every clip of a data set once, before a training needs it, and finds the broken
//! ones.

use std::path::{Path, PathBuf};

use anyhow::ensure;
use candor::device::Choice;
use candor::message::say;
use candor::with_device;
use candor_kernels::Device;
use clap::Args;

use super::{Dataset, DatasetError, Extractor, FeatureCache, Problem, ProblemKind, Problems};
use crate::workers;

/// `candor-tools data features`
#[derive(Args)]
pub struct FeaturesArgs {
    /// The model's folder.
    #[arg(long)]
    pub model: PathBuf,
    /// The data set: a JSON list as it is published, or JSONL.
    #[arg(long)]
    pub data: PathBuf,
    /// Folder that the data set's paths start from; by default that of the data set.
    #[arg(long)]
    pub media_root: Option<PathBuf>,
    /// Folder for the features; made if it is not there, and kept for later runs.
    #[arg(long)]
    pub cache: PathBuf,
    /// Threads, each with a model of its own over the same mapped weights.
    #[arg(long, default_value_t = 2)]
    pub threads: usize,
    /// Where the model computes: auto (a GPU if one can be used, else the processor), cpu, cuda or cuda:N.
    #[arg(long, default_value_t = Choice::Auto)]
    pub device: Choice,
    /// Leave out entries that cannot be used, and say which; otherwise they are an error.
    #[arg(long)]
    pub skip_bad: bool,
}

/// Runs `candor-tools data features`.
pub fn run(args: &FeaturesArgs) -> anyhow::Result<()> {
    ensure!(args.threads > 0, "--threads must be at least 1");
    let mut dataset = Dataset::open(&args.data, args.media_root.as_deref(), args.skip_bad)?;
    let cache = FeatureCache::open(&args.cache, &args.model)?;
    with_device!(args.device.open(Some(1))?, device => {
        prepare(&mut dataset, &args.data, &cache, &args.model, args.threads, args.skip_bad, &device)?
    });
    let read = dataset.items.len().saturating_sub(cache.computed());
    say(format_args!(
        "{} clips: {} computed, {read} read from {}",
        dataset.items.len(),
        cache.computed(),
        args.cache.display()
    ))?;
    match (cache.damaged(), dataset.problems.as_slice()) {
        (0, []) => {}
        (damaged, problems) => {
            say(format_args!("damaged files of the cache, made anew: {damaged}"))?;
            say(format_args!("skipped: {} ({})", problems.len(), Problems::counts(problems)))?;
        }
    }
    Ok(())
}

/// Takes the features of all items of a data set with `threads` models, so that later calls of [`FeatureCache::get`] read
/// them. Broken clips are an error that lists them all; with `skip_bad` they leave the data set, which the log says.
pub fn prepare<D: Device>(
    dataset: &mut Dataset,
    path: &Path,
    cache: &FeatureCache,
    model: &Path,
    threads: usize,
    skip_bad: bool,
    device: &D,
) -> anyhow::Result<()> {
    let items = &dataset.items;
    let open = || Ok(Extractor::open(model, dataset.faces.clone(), device.clone())?);
    let look = |extractor: &mut Extractor<D>, place: usize| match cache.get(extractor, &items[place].media) {
        Ok(_) => Ok(None),
        Err(error) if error.is_of_the_clip() => Ok(Some(error.to_string())),
        Err(error) => Err(error.into()),
    };
    let reasons = workers::run(items.len(), threads, "clips", open, look)?;
    let total = dataset.items.len() + dataset.problems.len();
    let mut broken = Vec::new();
    let mut reasons = reasons.into_iter();
    dataset.items.retain(|item| match reasons.next().flatten() {
        None => true,
        Some(reason) => {
            broken.push(Problem { file: path.into(), entry: item.line, kind: ProblemKind::Broken, reason });
            false
        }
    });
    if broken.is_empty() {
        return Ok(());
    }
    if dataset.items.is_empty() {
        return Err(DatasetError::NothingLeft { path: path.into(), problems: Problems(broken) }.into());
    }
    if !skip_bad {
        return Err(DatasetError::Bad { path: path.into(), total, problems: Problems(broken) }.into());
    }
    Problems::warn(&broken, total);
    dataset.problems.extend(broken);
    Ok(())
}
