//! What supervised fine-tuning trains, as one: projector, gate, decoder, and a head that only helps training. From
//! samples to losses and gradients for one worker's share of a batch.

use super::decoder::{Decoder, DecoderBuffers, DecoderSize, Gradients, Target, Weights};
use super::encoder::Affine;
use super::faces::{CLASSES, CUES};
use super::features::Standard;
use super::layers::{Tree, accumulate, fit};
use super::ops;
use super::parameters::Plan;
use super::projector::{Projector, ProjectorBuffers};
use crate::data::cold_start;
use crate::data::rationale;
use crate::data::tokenizer::{END_OF_TEXT, TURN_END, TURN_START};
use anyhow::{Context, anyhow, ensure};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::ops::Range;
use tokenizers::Tokenizer;

/// Longest sequence, video tokens included.
const POSITIONS: usize = 1024;
/// Width of the gate's hidden layer.
const GATE: usize = 64;
/// Weight of a token of the answer's closing tag, of which little can be learnt.
const CLOSING: f32 = 0.1;

/// Sizes that a user may choose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StudentSize {
    /// The decoder.
    pub decoder: DecoderSize,
    /// Channels of the tower's features.
    pub channels: usize,
    /// Patches of a side.
    pub grid: usize,
    /// Frames of a clip.
    pub frames: usize,
}

/// Weights of the losses.
#[derive(Clone, Copy, Debug)]
pub struct LossWeights {
    /// A token of the label beside one of the rationale.
    pub label: f32,
    /// The fast answer beside the rationale with its answer.
    pub fast: f32,
    /// The helping head beside it.
    pub helper: f32,
}

/// Tokens of a prompt and of how it goes on, for one photograph and one rationale.
#[derive(Clone, Debug, PartialEq)]
pub struct Tokens {
    /// The rationale with its answer and the end of the turn; a weight each.
    pub full: Vec<(u32, f32)>,
    /// The fast answer: given up to the label, then to be predicted; a weight each.
    pub fast: Vec<(u32, f32)>,
}

/// The tokenizer and the fixed parts of every prompt.
pub struct Prompt {
    tokenizer: Tokenizer,
    before: Vec<u32>,
    after: Vec<u32>,
    turn_end: u32,
    end_of_text: u32,
    label_weight: f32,
    unmeasured_weight: f32,
}

impl Prompt {
    /// Reads tokenizer.json; `label_weight` is that of a label's token, `unmeasured_weight` that of a token of the
    /// sentence that says that nothing could be made out.
    pub fn new(
        tokenizer: Tokenizer,
        instruction: &str,
        label_weight: f32,
        unmeasured_weight: f32,
    ) -> anyhow::Result<Self> {
        let id = |token: &str| tokenizer.token_to_id(token).with_context(|| format!("the tokenizer has no {token}"));
        let (turn_end, end_of_text) = (id(TURN_END)?, id(END_OF_TEXT)?);
        let (before, after) = (vec![], vec![]);
        let mut prompt = Self { before, after, turn_end, end_of_text, label_weight, unmeasured_weight, tokenizer };
        prompt.before = prompt.ids(&format!("{TURN_START}user\n<vi_start>"))?;
        prompt.after = prompt.ids(&format!("<vi_end>\n{instruction}{TURN_END}\n{TURN_START}assistant\n"))?;
        Ok(prompt)
    }

    fn encode(&self, text: &str) -> anyhow::Result<tokenizers::Encoding> {
        self.tokenizer.encode(text, false).map_err(|e| anyhow!("tokenizing {text:?}: {e}"))
    }

    fn ids(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        Ok(self.encode(text)?.get_ids().to_vec())
    }

    /// Rows of the embedding that are needed.
    pub fn vocabulary(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// Ids before and behind the video tokens.
    pub fn around(&self) -> (&[u32], &[u32]) {
        (&self.before, &self.after)
    }

    /// Ids of the end of a turn and the end of a text.
    pub fn ends(&self) -> (u32, u32) {
        (self.turn_end, self.end_of_text)
    }

    /// Tokens with their weights: before the label that of the byte where a token starts, then the label's own, then
    /// little.
    fn weighed(&self, text: &str, label: &str, plain: impl Fn(usize) -> f32) -> anyhow::Result<Vec<(u32, f32)>> {
        const OPEN: &str = "<answer>";
        let start = text.rfind(OPEN).map_or(0, |at| at + OPEN.len());
        let encoding = self.encode(text)?;
        let ids = encoding.get_ids().iter().zip(encoding.get_offsets());
        let mut tokens: Vec<(u32, f32)> = ids
            .map(|(&id, &(from, to))| {
                let weight = match (to <= start, from >= start + label.len()) {
                    (true, _) => plain(from),
                    (_, true) => CLOSING,
                    _ => self.label_weight,
                };
                (id, weight)
            })
            .collect();
        tokens.push((self.turn_end, CLOSING));
        Ok(tokens)
    }

    /// Tokens of a sample.
    pub fn tokens(&self, rationale: &str, label: &str) -> anyhow::Result<Tokens> {
        let text = cold_start::completion(rationale, label);
        let start = text.find(rationale).unwrap_or(0);
        let unmeasured = start..start + rationale::unmeasured_start(rationale);
        let weight = |byte| if unmeasured.contains(&byte) { self.unmeasured_weight } else { 1.0 };
        let full = self.weighed(&text, label, weight)?;
        let fast = self.weighed(&format!("<answer>{label}</answer>"), label, |_| 0.0)?;
        Ok(Tokens { full, fast })
    }
}

/// The parameters and what they belong to.
pub struct Student {
    /// Sizes.
    pub size: StudentSize,
    /// Which tensor lies where. Names below `model.` are the published ones.
    pub plan: Plan,
    projector: Projector,
    decoder: Decoder,
    helper: Affine,
}

/// Buffers of one worker.
#[derive(Default)]
pub struct StudentBuffers {
    projector: ProjectorBuffers,
    decoder: DecoderBuffers,
    x: Vec<f32>,
    x_gradient: Vec<f32>,
    tokens_gradient: Vec<f32>,
}

/// One worker's share of a batch.
pub struct Share<'a> {
    /// Features of the distinct frames, `[frames, patches, channels]`.
    pub features: &'a [f32],
    /// Frames of each sample's clip.
    pub clips: &'a [Vec<usize>],
    /// Tokens of each sample.
    pub tokens: &'a [&'a Tokens],
    /// Class of each sample.
    pub labels: &'a [u8],
    /// Measured cues of each sample.
    pub cues: &'a [Option<[f32; CUES]>],
    /// Sum of the rationale's weights over the whole batch.
    pub full_weight: f32,
    /// Sum of the fast answer's weights over the whole batch.
    pub fast_weight: f32,
    /// Samples of the whole batch.
    pub batch: usize,
}

/// Sums over a share.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Losses {
    /// Of the rationale with its answer, and of the fast answer, together.
    pub text: f64,
    /// Of the helping head.
    pub helper: f64,
    /// Tokens of labels that were the likeliest: after the rationale, in the fast answer.
    pub right: [usize; 2],
    /// Tokens of labels.
    pub seen: [usize; 2],
    /// Samples that the helping head gets right.
    pub helper_right: usize,
}

impl std::ops::Add for Losses {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let pair = |a: [usize; 2], b: [usize; 2]| [a[0] + b[0], a[1] + b[1]];
        Self {
            text: self.text + other.text,
            helper: self.helper + other.helper,
            right: pair(self.right, other.right),
            seen: pair(self.seen, other.seen),
            helper_right: self.helper_right + other.helper_right,
        }
    }
}

/// Where the parts of each sequence lie.
struct Layout {
    trees: Vec<Tree>,
    starts: Vec<usize>,
    rows: usize,
}

impl Student {
    /// Lays out all parameters.
    pub fn new(size: StudentSize, state: usize) -> anyhow::Result<Self> {
        let d = size.decoder;
        ensure!(size.grid.is_multiple_of(2) && size.grid > 0, "the tower's grid of patches must have an even side");
        ensure!(
            d.heads > 0 && d.key_heads > 0 && d.heads.is_multiple_of(d.key_heads) && d.head_dim.is_multiple_of(2),
            "heads must be a multiple of key heads, and a head's width even"
        );
        let mut plan = Plan::default();
        let projector = Projector::new(&mut plan, size.channels, d.width, size.grid, state, GATE);
        let decoder = Decoder::new(&mut plan, d, POSITIONS);
        let helper = Affine::projection(&mut plan, "helper", CLASSES + CUES, d.width, 1.0);
        Ok(Self { size, plan, projector, decoder, helper })
    }

    /// Starting values: every projection keeps the size of what goes through it, branches of the residual stream
    /// start small.
    pub fn initial(&self, seed: u64) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut values = vec![0.0; self.plan.len()];
        let deep = 1.0 / (2.0 * self.size.decoder.layers as f32).sqrt();
        for entry in self.plan.entries() {
            let own = &mut values[entry.range.clone()];
            let outputs = entry.shape[0];
            match entry.shape.len() {
                1 if entry.name.ends_with(".weight") => own.fill(1.0),
                1 => {}
                _ => {
                    let gain = match entry.name.as_str() {
                        name if name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight") => deep,
                        name if name.contains("embed_tokens") => 0.05 * (self.size.decoder.width as f32).sqrt(),
                        _ => 1.0,
                    };
                    let spread = gain * (3.0 * outputs as f32 / own.len() as f32).sqrt();
                    own.iter_mut().for_each(|v| *v = rng.random_range(-spread..spread));
                }
            }
        }
        values
    }

    fn lay_out(&self, prompt: &Prompt, tokens: &[&Tokens], frames: usize) -> Layout {
        let shared = prompt.before.len() + self.projector.tokens(frames) + prompt.after.len();
        let mut layout = Layout { trees: vec![], starts: vec![], rows: 0 };
        for tokens in tokens {
            // The last token of each continuation is predicted, not read.
            let tree = Tree { shared, branches: vec![tokens.full.len() - 1, tokens.fast.len() - 1] };
            layout.starts.push(layout.rows);
            layout.rows += tree.rows();
            layout.trees.push(tree);
        }
        layout
    }

    /// Ids of the rows that are text, and the rows that are video tokens.
    fn rows<'a>(
        &self,
        prompt: &'a Prompt,
        tokens: &'a Tokens,
        tree: &Tree,
    ) -> (impl Iterator<Item = (usize, u32)> + use<'a>, Range<usize>) {
        let (shared, second) = (tree.shared, tree.start(1));
        let video = prompt.before.len()..shared - prompt.after.len();
        let before = prompt.before.iter().copied().enumerate();
        let after = prompt.after.iter().copied().enumerate().map(move |(i, id)| (shared - prompt.after.len() + i, id));
        let full = tokens.full[..tokens.full.len() - 1].iter().enumerate().map(move |(i, t)| (shared + i, t.0));
        let fast = tokens.fast[..tokens.fast.len() - 1].iter().enumerate().map(move |(i, t)| (second + i, t.0));
        (before.chain(after).chain(full).chain(fast), video)
    }

    /// Video tokens and the decoder's last states for a share.
    fn forward(
        &self,
        values: &[f32],
        prompt: &Prompt,
        state: &[f32],
        share: &Share,
        buffers: &mut StudentBuffers,
    ) -> Layout {
        let width = self.size.decoder.width;
        let frames = self.size.frames;
        self.projector.forward(values, share.features, share.clips, state, &mut buffers.projector);
        let layout = self.lay_out(prompt, share.tokens, frames);
        let x = fit(&mut buffers.x, layout.rows * width);
        let clip = self.projector.tokens(frames) * width;
        let table = &values[self.decoder.embedding.clone()];
        for (index, (tree, &start)) in layout.trees.iter().zip(&layout.starts).enumerate() {
            let x = &mut x[start * width..];
            let (text, video) = self.rows(prompt, share.tokens[index], tree);
            for (row, id) in text {
                x[row * width..][..width].copy_from_slice(&table[id as usize * width..][..width]);
            }
            let video_tokens = &buffers.projector.tokens()[index * clip..][..clip];
            x[video.start * width..video.end * width].copy_from_slice(video_tokens);
        }
        self.decoder.forward(Weights::base(values), x, &layout.trees, &mut buffers.decoder);
        layout
    }

    /// Losses of a share; adds to `gradients`.
    #[allow(clippy::too_many_arguments)]
    pub fn step(
        &self,
        values: &[f32],
        gradients: &mut [f32],
        prompt: &Prompt,
        state: &[f32],
        share: &Share,
        weights: LossWeights,
        buffers: &mut StudentBuffers,
    ) -> Losses {
        let width = self.size.decoder.width;
        let layout = self.forward(values, prompt, state, share, buffers);
        let (targets, kinds) = self.targets(&layout, share, prompt, weights);
        let x_gradient = fit(&mut buffers.x_gradient, layout.rows * width);
        let (weights_of, sums) = (Weights::base(values), Gradients { base: Some(&mut *gradients), low_rank: None });
        let (text, right) =
            self.decoder.backward(weights_of, sums, &layout.trees, &targets, &mut buffers.decoder, x_gradient);
        let mut losses = Losses { text, ..Losses::default() };
        for (kind, right) in kinds.iter().zip(right) {
            if let Some(kind) = *kind {
                losses.seen[kind] += 1;
                losses.right[kind] += usize::from(right);
            }
        }

        let clip = self.projector.tokens(self.size.frames) * width;
        let tokens_gradient = fit(&mut buffers.tokens_gradient, share.clips.len() * clip);
        let table = &mut gradients[self.decoder.embedding.clone()];
        for (index, (tree, &start)) in layout.trees.iter().zip(&layout.starts).enumerate() {
            let x_gradient = &x_gradient[start * width..];
            let (text, video) = self.rows(prompt, share.tokens[index], tree);
            for (row, id) in text {
                accumulate(&mut table[id as usize * width..][..width], &x_gradient[row * width..][..width]);
            }
            let video = &x_gradient[video.start * width..video.end * width];
            tokens_gradient[index * clip..][..clip].copy_from_slice(video);
        }
        self.help(values, gradients, share, weights.helper, buffers, &mut losses);
        let tokens_gradient = &buffers.tokens_gradient[..share.clips.len() * clip];
        let projector = &mut buffers.projector;
        self.projector.backward(values, gradients, share.features, share.clips, state, tokens_gradient, projector);
        losses
    }

    /// Everything to predict in a share, and for a label's token whether it stands after the rationale (0) or in the
    /// fast answer (1).
    fn targets(
        &self,
        layout: &Layout,
        share: &Share,
        prompt: &Prompt,
        weights: LossWeights,
    ) -> (Vec<Target>, Vec<Option<usize>>) {
        let (mut targets, mut kinds) = (Vec::new(), Vec::new());
        for ((tree, start), tokens) in layout.trees.iter().zip(&layout.starts).zip(share.tokens) {
            let parts = [
                (tree.shared, &tokens.full, 1.0 / share.full_weight),
                (tree.start(1), &tokens.fast, weights.fast / share.fast_weight),
            ];
            for (kind, (first, tokens, factor)) in parts.into_iter().enumerate() {
                for (i, &(id, weight)) in tokens.iter().enumerate() {
                    if weight > 0.0 && (i > 0 || kind == 0) {
                        targets.push(Target { row: start + first + i - 1, id, weight: weight * factor });
                        kinds.push((weight == prompt.label_weight).then_some(kind));
                    }
                }
            }
        }
        (targets, kinds)
    }

    /// The helping head: class and cues from the mean video token. Adds its gradient to that of the video tokens.
    fn help(
        &self,
        values: &[f32],
        gradients: &mut [f32],
        share: &Share,
        weight: f32,
        buffers: &mut StudentBuffers,
        losses: &mut Losses,
    ) {
        let (width, count) = (self.size.decoder.width, self.projector.tokens(self.size.frames));
        let samples = share.clips.len();
        let mut means = vec![0.0; samples * width];
        for (mean, tokens) in means.chunks_exact_mut(width).zip(buffers.projector.tokens().chunks_exact(count * width))
        {
            tokens.chunks_exact(width).for_each(|token| accumulate(mean, token));
            mean.iter_mut().for_each(|m| *m /= count as f32);
        }
        let mut out = vec![0.0; samples * (CLASSES + CUES)];
        self.helper.linear(values, &means, samples, &mut out);
        let scale = weight / share.batch as f32;
        for (index, out) in out.chunks_exact_mut(CLASSES + CUES).enumerate() {
            let (logits, cues) = out.split_at_mut(CLASSES);
            let target = usize::from(share.labels[index]);
            losses.helper_right += usize::from(logits.iter().all(|&l| l <= logits[target]));
            losses.helper += f64::from(ops::cross_entropy(logits, target, 0.1, scale));
            match &share.cues[index] {
                None => cues.fill(0.0),
                Some(measured) => {
                    for (cue, measured) in cues.iter_mut().zip(measured) {
                        let (loss, gradient) = ops::smooth_l1(*cue - measured);
                        losses.helper += f64::from(loss * scale / CUES as f32);
                        *cue = gradient * scale / CUES as f32;
                    }
                }
            }
        }
        let mut mean_gradient = vec![0.0; samples * width];
        self.helper.linear_backward(values, gradients, &means, samples, &out, Some(&mut mean_gradient));
        let tokens = buffers.tokens_gradient.chunks_exact_mut(count * width);
        for (tokens, mean) in tokens.zip(mean_gradient.chunks_exact(width)) {
            for token in tokens.chunks_exact_mut(width) {
                token.iter_mut().zip(mean).for_each(|(g, m)| *g += m / count as f32);
            }
        }
    }

    /// Logits after every row of each sample's rationale and answer that predicts one of its tokens,
    /// `[tokens, vocabulary]` a sample; and those of the fast answer behind.
    pub fn logits(
        &self,
        values: &[f32],
        prompt: &Prompt,
        state: &[f32],
        share: &Share,
        buffers: &mut StudentBuffers,
    ) -> Vec<Vec<f32>> {
        let layout = self.forward(values, prompt, state, share, buffers);
        let mut out = Vec::new();
        for ((tree, start), tokens) in layout.trees.iter().zip(&layout.starts).zip(share.tokens) {
            let full = (0..tokens.full.len()).map(|i| start + tree.shared + i - 1);
            let fast = (1..tokens.fast.len()).map(|i| start + tree.start(1) + i - 1);
            let rows: Vec<usize> = full.chain(fast).collect();
            out.push(self.decoder.logits(Weights::base(values), &rows, &mut buffers.decoder).to_vec());
        }
        out
    }

    /// The video tokens of the last share, `[clips, tokens, width]`.
    pub fn video_tokens<'a>(&self, buffers: &'a StudentBuffers) -> &'a [f32] {
        buffers.projector.tokens()
    }

    /// The tensors that a model folder needs, under their published names, shapes and order, for features that are not
    /// multiplied with the standard's factors.
    pub fn tensors(&self, values: &[f32], standard: &Standard) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let entries = self.plan.entries().iter().filter(|entry| entry.name.starts_with("model."));
        entries
            .map(|entry| {
                let mut own = values[entry.range.clone()].to_vec();
                if Projector::reads_features(&entry.name) {
                    for row in own.chunks_exact_mut(standard.factor.len()) {
                        row.iter_mut().zip(&standard.factor).for_each(|(weight, factor)| *weight *= factor);
                    }
                }
                let (shape, own) = Projector::checkpoint_layout(&entry.name, &entry.shape, &own);
                (entry.name.clone(), shape, own)
            })
            .collect()
    }
}
