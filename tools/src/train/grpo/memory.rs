//! What a run needs of memory at its peak, computed from shapes alone.

use super::settings::GrpoArgs;
use super::worker::SLOTS;
use crate::train::decoder::{Decoder, DecoderSize};
use crate::train::parameters::Plan;
use crate::train::policy::size_of;
use candor::manifest::Manifest;
use candor::message::say;
use candor::model::ModelConfig;
use candor::text::{ChatTemplate, PromptPiece, Tokenizer};
use candor::weights::Checkpoint;
use std::path::Path;

/// Text of a prompt where the folder has no tokenizer to count it with.
const TEXT_TOKENS: usize = 64;
/// The program itself: code, tokenizers, the face detector, the allocator's slack.
const PROGRAM: usize = 40 << 20;
/// Packed panels of the matrix products and the activations of towers, projector and verifier, a thread.
const THREAD: usize = 24 << 20;

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
    /// Whether activations are computed anew.
    pub checkpointing: bool,
    /// Bytes of the mapped weights, the verifier's included.
    pub mapped: usize,
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

    let copies = if shapes.full { 1 } else { 1 + threads };
    vec![
        ("weights of the decoder in f32", parameters * F32 * (1 + usize::from(shapes.keeps_reference))),
        ("weights as they are stored, mapped", shapes.mapped),
        ("what is trained: gradients, moments, what the rollouts see", trained * F32 * (threads + 3 + copies)),
        ("writing a checkpoint", trained * F32 * 6),
        ("rollouts: key-value caches and logits", threads * (rollouts + features) * F32),
        ("training: activations and logits", threads * training * F32),
        ("the program", PROGRAM + threads * THREAD),
    ]
}

/// The shapes of a run, from the model's folder.
pub fn shapes(args: &GrpoArgs, max_new_tokens: usize, verifier: Option<&Path>) -> anyhow::Result<Shapes> {
    let config = ModelConfig::read(&args.model)?;
    let decoder = size_of(&config.decoder);
    let mut plan = Plan::default();
    let built = Decoder::new(&mut plan, decoder, 1);
    let lora = args.lora()?;
    let full = lora.is_none();
    let trained = match lora {
        Some(settings) => built.with_lora(settings).lora().map_or(0, |lora| lora.plan.len()),
        None => plan.len(),
    };
    let mapped = |folder: &Path| Checkpoint::open(folder).map_or(0, |checkpoint| checkpoint.mapped_bytes());
    Ok(Shapes {
        decoder,
        prompt: config.frames * config.tokens_a_frame() + text_tokens(&args.model),
        new_tokens: max_new_tokens,
        group: args.group,
        prompts: args.prompts,
        threads: args.threads,
        trained,
        parameters: plan.len(),
        full,
        keeps_reference: full && args.beta > 0.0,
        checkpointing: args.checkpointing,
        mapped: mapped(&args.model) + verifier.map_or(0, mapped),
    })
}

/// Tokens of a prompt's text.
fn text_tokens(folder: &Path) -> usize {
    let count = || {
        let tokenizer = Tokenizer::open(folder).ok()?;
        let instruction = Manifest::open(folder).ok()?.model.instruction;
        let prompt = ChatTemplate::open(folder, &tokenizer).ok()?.prompt(&tokenizer, &instruction, false).ok()?;
        let of = |piece: &PromptPiece| if let PromptPiece::Text(ids) = piece { ids.len() } else { 0 };
        Some(prompt.iter().map(of).sum())
    };
    count().unwrap_or(TEXT_TOKENS)
}

/// Prints the plan.
pub fn print(args: &GrpoArgs, max_new_tokens: usize, verifier: Option<&Path>) -> anyhow::Result<()> {
    let shapes = shapes(args, max_new_tokens, verifier)?;
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
    let parts = parts(&shapes);
    for (part, bytes) in &parts {
        say(format_args!("{part:58} {:10.1} MB", megabytes(*bytes)))?;
    }
    let total: usize = parts.iter().map(|part| part.1).sum();
    say(format_args!("{:58} {:10.1} MB", "peak", megabytes(total)))?;
    Ok(())
}

/// The most memory that this process has had resident, in bytes.
pub fn peak() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()? * 1024)
}
