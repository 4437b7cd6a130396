//! What a run needs of memory at its peak, computed from shapes alone.

use super::settings::GrpoArgs;
use super::worker::{REMEMBERED, SLOTS};
use crate::dataset::{Item, Media};
use crate::train::decoder::{Decoder, DecoderSize};
use crate::train::parameters::Plan;
use crate::train::policy::size_of;
use crate::train::tune::settings::TuneArgs;
use crate::train::tuning::prompts::Lengths;
use crate::train::tuning::settings::TuningArgs;
use candor::message::say;
use candor::model::ModelConfig;
use candor::weights::Checkpoint;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// The program itself: code and libraries.
const PROGRAM: usize = 12 << 20;
/// Tokenizers, the face detector, packed panels of the matrix products, and the activations of towers, projector and
/// verifier, a thread.
const THREAD: usize = 14 << 20;

/// A sentence that the verifier remembers: its text, 28 probabilities and their place in a table.
const SENTENCE: usize = 260;
/// Sentences of a completion, about.
const SENTENCES: usize = 4;

/// Sizes that decide what a run needs.
#[derive(Clone, Copy, Debug)]
pub struct Shapes {
    /// The decoder.
    pub decoder: DecoderSize,
    /// Positions of a prompt.
    pub prompt: usize,
    /// Most tokens of a completion.
    pub new_tokens: usize,
    /// Completions of a prompt.
    pub group: usize,
    /// Prompts a step.
    pub prompts: usize,
    /// Threads.
    pub threads: usize,
    /// Parameters that are trained.
    pub trained: usize,
    /// Parameters of the decoder.
    pub parameters: usize,
    /// Whether all weights are trained.
    pub full: bool,
    /// Whether the weights before training are kept beside.
    pub keeps_reference: bool,
    /// Whether completions are drawn.
    pub rollouts: bool,
    /// Whether activations are computed anew.
    pub checkpointing: bool,
    /// Bytes of the mapped weights that are used, the verifier's included.
    pub mapped: usize,
    /// Bytes of the model's weights as they are stored.
    pub model: usize,
    /// Sentences that the verifiers come to remember.
    pub sentences: usize,
    /// Bytes of the faces files that photographs are of.
    pub photographs: usize,
}

/// The parts of the peak: what for, and bytes.
pub fn parts(shapes: &Shapes) -> Vec<(&'static str, usize)> {
    const F32: usize = 4;
    let Shapes { decoder: d, prompt, new_tokens, group, prompts, threads, trained, parameters, .. } = *shapes;
    let (queries, keys) = (d.heads * d.head_dim, d.key_heads * d.head_dim);
    let stride = queries + 2 * keys;
    // Rows of one group in training: the last token of a completion is predicted, not read.
    let branch = new_tokens.saturating_sub(1);
    let rows = prompt + group * branch;
    let scores = prompt * prompt + group * branch * (prompt + branch);
    let layer = rows * (3 * d.width + stride + queries + 3 * d.hidden + 2) + d.heads * scores;
    let kept = if shapes.checkpointing { 1 } else { d.layers };
    let backward = rows * (6 * d.width + 2 * d.hidden + d.hidden.max(queries) + stride)
        + (branch * (prompt + branch)).max(prompt * prompt);
    let targets = group * new_tokens;
    let head = targets.min((1 << 22) / d.vocabulary + 1) * (d.vocabulary + 2 * d.width);
    let training = d.layers * rows * d.width + kept * layer + backward + head + 2 * rows * d.width;

    let slots = (SLOTS / group).max(1).min(prompts.div_ceil(threads)) * group;
    let capacity = prompt + new_tokens;
    let cache = 2 * d.layers * capacity * keys + capacity * d.width;
    let work = |rows: usize| rows * (2 * d.width + 2 * queries + 2 * keys + 2 * d.hidden);
    let rollouts = (slots + 1) * cache + work(slots) + work(capacity.min(128)) + (2 * slots + 2) * d.vocabulary;
    let features = prompts.div_ceil(threads) * prompt * d.width;

    // The rollouts' models hold the last step's weights while the next are made.
    // All weights in training are those of the decoder above.
    let values = usize::from(!shapes.full);
    let copies = 2 + if shapes.full { 0 } else { threads };
    // A model folder is written from copies of its tensors, in f32 and as they are stored, and the file as a whole.
    let writing = if shapes.full { trained * F32 + 2 * shapes.model } else { 2 * trained * F32 };
    vec![
        ("weights of the decoder in f32", parameters * F32 * (1 + usize::from(shapes.keeps_reference))),
        ("weights as they are stored, mapped", shapes.mapped),
        ("what is trained: gradients, moments, what the rollouts see", trained * F32 * (values + threads + 2 + copies)),
        ("writing what has been trained", writing),
        ("rollouts: key-value caches and logits", usize::from(shapes.rollouts) * threads * (rollouts + features) * F32),
        ("training: activations and logits", threads * training * F32),
        ("sentences that the verifiers remember", shapes.sentences * SENTENCE),
        ("photographs", shapes.photographs),
        ("the program", PROGRAM + threads * THREAD),
    ]
}

/// What a run asks for beside its model.
struct Wanted {
    new_tokens: usize,
    group: usize,
    prompts: usize,
    rollouts: bool,
    reference: bool,
    sentences: usize,
}

/// The shapes of a reward fine-tuning.
pub fn of_rewards(
    args: &GrpoArgs,
    items: &[Item],
    max_new_tokens: usize,
    verifier: Option<&Path>,
) -> anyhow::Result<Shapes> {
    let (group, prompts) = (args.group, args.prompts);
    let said = (args.steps(items.len()) as usize).saturating_mul(prompts * group * SENTENCES);
    let wanted = Wanted {
        new_tokens: max_new_tokens,
        group,
        prompts,
        rollouts: true,
        reference: args.beta > 0.0,
        sentences: said.min(args.tuning.threads * REMEMBERED),
    };
    of(&args.input.model, &args.tuning, items, wanted, verifier)
}

/// The shapes of a supervised tuning whose longest completion has `tokens` tokens: no rollouts, no groups, no verifier.
pub fn of_tuning(args: &TuneArgs, items: &[Item], tokens: usize) -> anyhow::Result<Shapes> {
    let wanted =
        Wanted { new_tokens: tokens, group: 1, prompts: args.batch, rollouts: false, reference: false, sentences: 0 };
    of(&args.input.model, &args.tuning, items, wanted, None)
}

fn of(
    model: &Path,
    tuning: &TuningArgs,
    items: &[Item],
    wanted: Wanted,
    verifier: Option<&Path>,
) -> anyhow::Result<Shapes> {
    let config = ModelConfig::read(model)?;
    let decoder = size_of(&config.decoder);
    let mut plan = Plan::default();
    let built = Decoder::new(&mut plan, decoder, 1);
    let lora = tuning.lora()?;
    let full = lora.is_none();
    let trained = match lora {
        Some(settings) => built.with_lora(settings).lora().map_or(0, |lora| lora.plan.len()),
        None => plan.len(),
    };
    let checkpoint = Checkpoint::open(model)?;
    // Sound is not looked at, so its tower's pages never come in.
    let names = checkpoint.names().filter(|name| !name.starts_with("model.audio_"));
    let used: Result<Vec<usize>, _> = names.map(|name| checkpoint.raw(name).map(|raw| raw.bytes.len())).collect();
    let mapped = |folder: &Path| Checkpoint::open(folder).map_or(0, |checkpoint| checkpoint.mapped_bytes());
    let files: HashSet<&PathBuf> = items.iter().filter_map(|item| faces_file(&item.media)).collect();
    Ok(Shapes {
        decoder,
        prompt: Lengths::open(model)?.longest(items)?,
        new_tokens: wanted.new_tokens,
        group: wanted.group,
        prompts: wanted.prompts,
        threads: tuning.threads,
        trained,
        parameters: plan.len(),
        full,
        keeps_reference: full && wanted.reference,
        rollouts: wanted.rollouts,
        checkpointing: tuning.checkpointing,
        mapped: used?.iter().sum::<usize>() + verifier.map_or(0, mapped),
        model: checkpoint.mapped_bytes(),
        sentences: wanted.sentences,
        photographs: files.iter().map(|file| file.metadata().map_or(0, |about| about.len() as usize)).sum(),
    })
}

fn faces_file(media: &Media) -> Option<&PathBuf> {
    match media {
        Media::Photograph { file, .. } => Some(file),
        Media::Clip(_) => None,
    }
}

/// Prints a plan.
pub fn print(shapes: &Shapes) -> anyhow::Result<()> {
    let megabytes = |bytes: usize| bytes as f64 / 1e6;
    say(format_args!(
        "{} prompts of {} positions, {} completions each of up to {} tokens, {} threads, {} of {} parameters trained",
        shapes.prompts,
        shapes.prompt,
        shapes.group,
        shapes.new_tokens,
        shapes.threads,
        shapes.trained,
        shapes.parameters
    ))?;
    for (part, bytes) in &parts(shapes) {
        say(format_args!("{part:58} {:10.1} MB", megabytes(*bytes)))?;
    }
    say(format_args!("{:58} {:10.1} MB", "peak", megabytes(total(shapes))))?;
    Ok(())
}

/// The planned peak, in bytes.
pub fn total(shapes: &Shapes) -> usize {
    parts(shapes).iter().map(|part| part.1).sum()
}

/// The most memory that this process has had resident, in bytes.
pub fn peak() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()? * 1024)
}

/// What the process has taken, beside what was planned.
pub fn peak_in_words(shapes: &Shapes) -> String {
    let planned = total(shapes) / 1_000_000;
    match peak() {
        Some(peak) => format!("peak memory {} MB, planned {planned} MB", peak / 1_000_000),
        None => format!("planned peak memory {planned} MB"),
    }
}
