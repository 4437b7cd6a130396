//! Prompts of the task with what is written behind them, from labelled clips or photographs, and a model that reads them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use candor::manifest::Manifest;
use candor::model::{LanguageModel, Model, Piece, Rows, Session};
use candor::text::{ChatTemplate, Generator, Grammar, PromptPiece, Sampler, Sampling, Tokenizer};
use candor_kernels::Device;

use crate::dataset::{ClipFeatures, Dataset, Extractor, Item};
use crate::{eval, workers};

/// A prompt and what is written behind it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sample {
    /// The distinct pictures, `[pictures, 3, side, side]`.
    pixels: Vec<f32>,
    /// The picture of each frame.
    frames: Vec<usize>,
    instruction: String,
    /// The reference: the data's, or what the model itself writes.
    pub(super) completion: Vec<u32>,
}

/// Where samples are taken from: a list of clips, or a part of a faces file, `FILE.safetensors#PART`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Data {
    pub(super) path: PathBuf,
    /// Of a faces file.
    pub(super) part: Option<String>,
}

impl Data {
    /// Reads what the command line says; `part` is taken of a faces file that is named alone.
    pub(super) fn parse(text: &str, part: &str) -> Data {
        const FACES: &str = ".safetensors";
        match text.rsplit_once('#') {
            Some((file, part)) if file.ends_with(FACES) => Data { path: file.into(), part: Some(part.to_owned()) },
            _ => Data { path: text.into(), part: text.ends_with(FACES).then(|| part.to_owned()) },
        }
    }

    fn dataset(&self) -> anyhow::Result<Dataset> {
        match &self.part {
            Some(part) => eval::photographs(&self.path, part),
            None => Ok(Dataset::open(&self.path, None, false)?),
        }
    }
}

/// Samples of so many entries, spread over the data. Where the data has no rationale, the model writes it,
/// on a device that computes exactly.
pub(super) fn read<D: Device>(
    model: &Path,
    data: &Data,
    limit: usize,
    threads: usize,
    exact: &D,
) -> anyhow::Result<Vec<Sample>> {
    let mut dataset = data.dataset()?;
    dataset.items = eval::spread(std::mem::take(&mut dataset.items), limit);
    let manifest = Manifest::open(model)?;
    let open = || {
        let reader = Reader::open(model, exact.clone())?;
        let (labels, most) = (&manifest.model.labels, manifest.model.max_new_tokens);
        let table = Arc::new(reader.tokenizer.token_table(reader.model.config().decoder.vocabulary)?);
        let grammar = Grammar::new(table, labels, most)?;
        Ok((reader, grammar, Extractor::open(model, dataset.faces.clone(), exact.clone())?))
    };
    let work = |(reader, grammar, extractor): &mut (Reader<D>, Grammar, Extractor<D>), place: usize| {
        let item = &dataset.items[place];
        sample(reader, grammar, extractor, item, &manifest)
            .with_context(|| format!("entry {} ({})", item.line, item.id))
    };
    let samples = workers::run(dataset.items.len(), threads, "prompts", open, work)?;
    let samples: Vec<Sample> = samples.into_iter().flatten().collect();
    ensure!(!samples.is_empty(), "{}: no entry can be used", data.path.display());
    Ok(samples)
}

/// The sample of an item; none where no face is seen.
fn sample<D: Device>(
    reader: &mut Reader<D>,
    grammar: &Grammar,
    extractor: &mut Extractor<D>,
    item: &Item,
    manifest: &Manifest,
) -> anyhow::Result<Option<Sample>> {
    let (pixels, frames) = match extractor.pixels(&item.media) {
        Ok(pixels) => pixels,
        Err(error) if error.is_of_the_clip() => {
            log::warn!("entry {} ({}) is left out: {error}", item.line, item.id);
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    let instruction = item.prompt.as_ref().unwrap_or(&manifest.model.instruction).clone();
    let mut sample = Sample { pixels, frames, instruction, completion: Vec::new() };
    sample.completion = match &item.rationale {
        Some(rationale) => {
            let text = format!("<think>{rationale}</think>\n<answer>{}</answer>", item.label);
            let mut ids = reader.tokenizer.encode(&text)?;
            ids.push(reader.tokenizer.end_of_turn()?);
            ids
        }
        None => reader.write(&sample, grammar)?,
    };
    Ok(Some(sample))
}

/// What an instruction becomes.
struct Instruction {
    pieces: Vec<PromptPiece>,
    gate_ids: Vec<u32>,
}

/// A model that reads samples.
pub(super) struct Reader<D: Device> {
    pub(super) model: Model<D>,
    tokenizer: Tokenizer,
    gate_tokenizer: Tokenizer,
    template: ChatTemplate,
    instructions: HashMap<String, Instruction>,
    states: Rows<D>,
    features: Rows<D>,
    video: Rows<D>,
    session: Option<Session<D>>,
}

impl<D: Device> Reader<D> {
    pub(super) fn open(folder: &Path, device: D) -> anyhow::Result<Reader<D>> {
        let model = Model::open(folder, device)?;
        let tokenizer = Tokenizer::open(folder)?;
        let Some(gate_folder) = &model.config().bert_folder else {
            bail!("{}: no folder with the gate's tokenizer", folder.display());
        };
        Ok(Reader {
            gate_tokenizer: Tokenizer::open(gate_folder)?,
            template: ChatTemplate::open(folder, &tokenizer)?,
            instructions: HashMap::new(),
            states: model.rows()?,
            features: model.rows()?,
            video: model.rows()?,
            session: None,
            tokenizer,
            model,
        })
    }

    /// Reads a sample's prompt and these tokens behind it. The session has room for `room` more.
    fn start(&mut self, sample: &Sample, behind: &[u32], room: usize) -> anyhow::Result<&mut Session<D>> {
        let device = self.model.device().clone();
        self.model.vision_features(&sample.pixels, &mut self.states)?;
        let features = ClipFeatures { distinct: self.states.to_host(&device)?, frames: sample.frames.clone() };
        let width = self.states.width();
        self.features.write(&device, &features.every_frame(), width)?;
        if !self.instructions.contains_key(&sample.instruction) {
            let gate_ids =
                self.gate_tokenizer.encode_sequence(&sample.instruction, self.model.config().bert.positions)?;
            let pieces = self.template.prompt(&self.tokenizer, &sample.instruction, false)?;
            self.instructions.insert(sample.instruction.clone(), Instruction { pieces, gate_ids });
        }
        let Instruction { pieces, gate_ids } = &self.instructions[&sample.instruction];
        let gate = self.model.gate(gate_ids)?;
        self.model.video_tokens(&self.features, gate, &mut self.video)?;
        let mut prompt: Vec<Piece<'_, D>> = pieces
            .iter()
            .map(|piece| match piece {
                PromptPiece::Text(ids) => Piece::Tokens(ids),
                PromptPiece::Video | PromptPiece::Audio => Piece::Rows(&self.video),
            })
            .collect();
        if !behind.is_empty() {
            prompt.push(Piece::Tokens(behind));
        }
        let needed = prompt.iter().map(Piece::len).sum::<usize>() + room;
        let capacity = needed.min(self.model.config().decoder.positions);
        if self.session.as_ref().is_none_or(|session| session.capacity() < capacity) {
            self.session = Some(self.model.session(capacity)?);
        }
        let session = self.session.as_mut().context("a session was made")?;
        session.start(&prompt)?;
        Ok(session)
    }

    /// What the model writes, always the likeliest token.
    fn write(&mut self, sample: &Sample, grammar: &Grammar) -> anyhow::Result<Vec<u32>> {
        let session = self.start(sample, &[], grammar.max_new_tokens())?;
        let mut generator = Generator::new(session, grammar, Sampler::new(Sampling::GREEDY)?)?;
        generator.run()?;
        Ok(generator.finish()?.tokens)
    }

    /// Reads a sample to its end.
    pub(super) fn read(&mut self, sample: &Sample) -> anyhow::Result<()> {
        self.start(sample, &sample.completion, 0).map(drop)
    }

    /// Calls `each` with the logits before every token of a sample's completion, and with the token.
    pub(super) fn logits(&mut self, sample: &Sample, mut each: impl FnMut(&[f32], u32)) -> anyhow::Result<()> {
        let session = self.start(sample, &[], sample.completion.len())?;
        for (index, &token) in sample.completion.iter().enumerate() {
            each(session.logits()?, token);
            if index + 1 < sample.completion.len() {
                session.append(&[token])?;
            }
        }
        Ok(())
    }
}
