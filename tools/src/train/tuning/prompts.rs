//! From a data set's item to the parts of its prompt: tokens of the text, and rows of what the model's towers and
//! projector make of the clip, which are not trained.

use crate::dataset::{Extractor, FacesFiles, FeatureCache, Item};
use crate::train::policy::PromptPart;
use anyhow::Context;
use candor::manifest::Manifest;
use candor::model::{Model, ModelConfig, Rows};
use candor::text::{ChatTemplate, PromptPiece, Tokenizer};
use candor_kernels::Device;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// A prompt's text and the gate's weights for it.
struct Instruction {
    pieces: Vec<PromptPiece>,
    gate: [f32; 3],
}

/// A model, with what turns items into prompts. One a thread; the weights are mapped, so that threads share them.
pub struct Prompts<D: Device> {
    /// The model.
    pub model: Model<D>,
    /// The decoder's tokenizer.
    pub tokenizer: Tokenizer,
    /// The video tokens of the last prompt; free for other rows as wide as the decoder.
    pub video: Rows<D>,
    features: Rows<D>,
    folder: PathBuf,
    gate_tokenizer: Tokenizer,
    template: ChatTemplate,
    own_instruction: String,
    instructions: HashMap<String, Instruction>,
}

impl<D: Device> Prompts<D> {
    /// Opens a model folder for one thread.
    pub fn open(folder: &Path, manifest: &Manifest, device: D) -> anyhow::Result<Prompts<D>> {
        let model = Model::open(folder, device)?;
        let tokenizer = Tokenizer::open(folder)?;
        let gate_folder = model.config().bert_folder.clone();
        let gate_folder =
            gate_folder.with_context(|| format!("{}: no folder with the gate's tokenizer", folder.display()))?;
        Ok(Prompts {
            features: model.rows()?,
            video: model.rows()?,
            folder: folder.to_path_buf(),
            template: ChatTemplate::open(folder, &tokenizer)?,
            gate_tokenizer: Tokenizer::open(&gate_folder)?,
            own_instruction: manifest.model.instruction.clone(),
            instructions: HashMap::new(),
            tokenizer,
            model,
        })
    }

    /// For features that are not in the cache after all. It has to stay on one thread, which the prompts need not.
    pub fn extractor(&self, faces: FacesFiles) -> anyhow::Result<Extractor<D>> {
        Ok(Extractor::open(&self.folder, faces, self.model.device().clone())?)
    }

    /// The parts of an item's prompt.
    pub fn parts(
        &mut self,
        item: &Item,
        cache: &FeatureCache,
        extractor: &mut Extractor<D>,
    ) -> anyhow::Result<Vec<PromptPart>> {
        let text = item.prompt.as_ref().unwrap_or(&self.own_instruction);
        if !self.instructions.contains_key(text) {
            let ids = self.gate_tokenizer.encode_sequence(text, self.model.config().bert.positions)?;
            let pieces = self.template.prompt(&self.tokenizer, text, false)?;
            let gate = self.model.gate(&ids)?;
            self.instructions.insert(text.clone(), Instruction { pieces, gate });
        }
        let instruction = &self.instructions[text];
        let features = cache.get(extractor, &item.media)?;
        let width = self.model.config().vision.width;
        let device = self.model.device().clone();
        self.features.write(&device, &features.every_frame(), width)?;
        self.model.video_tokens(&self.features, instruction.gate, &mut self.video)?;
        let mut parts = Vec::new();
        for piece in &instruction.pieces {
            parts.push(match piece {
                PromptPiece::Text(ids) => PromptPart::Tokens(ids.clone()),
                PromptPiece::Video | PromptPiece::Audio => PromptPart::Rows(self.video.to_host(&device)?),
            });
        }
        Ok(parts)
    }
}

/// How long prompts are, without looking at a clip.
pub struct Lengths {
    /// Positions of a clip's tokens.
    video: usize,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    own_instruction: String,
    known: HashMap<Option<String>, usize>,
}

impl Lengths {
    /// For a model folder.
    pub fn open(folder: &Path) -> anyhow::Result<Lengths> {
        let config = ModelConfig::read(folder)?;
        let tokenizer = Tokenizer::open(folder)?;
        Ok(Lengths {
            video: config.frames * config.tokens_a_frame(),
            template: ChatTemplate::open(folder, &tokenizer)?,
            own_instruction: Manifest::open(folder)?.model.instruction,
            known: HashMap::new(),
            tokenizer,
        })
    }

    /// Positions of an item's prompt.
    pub fn of(&mut self, item: &Item) -> anyhow::Result<usize> {
        if let Some(known) = self.known.get(&item.prompt) {
            return Ok(*known);
        }
        let instruction = item.prompt.as_ref().unwrap_or(&self.own_instruction);
        let pieces = self.template.prompt(&self.tokenizer, instruction, false).with_context(|| describe(item))?;
        let text = pieces.iter().map(|piece| if let PromptPiece::Text(ids) = piece { ids.len() } else { 0 });
        let all = self.video + text.sum::<usize>();
        self.known.insert(item.prompt.clone(), all);
        Ok(all)
    }

    /// Positions of the longest of some items' prompts.
    pub fn longest(&mut self, items: &[Item]) -> anyhow::Result<usize> {
        items.iter().try_fold(0, |most, item| Ok(most.max(self.of(item)?)))
    }
}

/// How an item is called in a message: its entry in the data and its id.
pub fn describe(item: &Item) -> String {
    format!("entry {} ({})", item.line, item.id)
}
