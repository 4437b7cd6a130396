//! The stages' inputs and buffers, filled with random pictures, sound and tokens.

use std::path::Path;

use anyhow::{Result, bail};
use candor::model::config::{AudioConfig, ClassifierConfig, ModelConfig};
use candor::model::{Classifier, LanguageModel, Model, Piece, Rows, Session};
use candor::text::Mask;
use candor_kernels::{Choice, Device};
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::work::{self, Bytes, Work};

/// Text tokens of the prompt, besides those of the pictures: about what an instruction in a chat template takes.
const PROMPT_TEXT_TOKENS: usize = 64;
/// Word pieces of a sentence that the verifier reads.
const SENTENCE_TOKENS: usize = 24;
/// Sentences of a rationale.
const SENTENCES: usize = 4;
/// Seconds of sound that the audio tower hears at once.
pub(super) const SOUND_S: usize = 30;
/// The same random pictures and tokens every time.
const SEED: u64 = 1;

/// Positions that a window's prompt takes: pictures and text.
pub(super) fn window_prompt(config: &ModelConfig) -> usize {
    PROMPT_TEXT_TOKENS + video_tokens(config)
}

fn video_tokens(config: &ModelConfig) -> usize {
    config.frames * config.tokens_a_frame()
}

/// A window's pictures and what becomes of them.
pub(super) struct Window<D: Device> {
    frames: Vec<Vec<u8>>,
    gate: [f32; 3],
    features: Rows<D>,
    video: Rows<D>,
}

impl<D: Device> Window<D> {
    pub(super) fn new(model: &Model<D>) -> Result<Self> {
        let mut random = ChaCha8Rng::seed_from_u64(SEED);
        let config = model.config();
        let frames = (0..config.frames)
            .map(|_| {
                let mut rgb = vec![0; config.vision.image * config.vision.image * 3];
                random.fill_bytes(&mut rgb);
                rgb
            })
            .collect();
        // Equal weights: what the gate would say of an instruction is computed once, not in every window.
        Ok(Window { frames, gate: [1.0 / 3.0; 3], features: model.rows()?, video: model.rows()? })
    }

    pub(super) fn see(&mut self, model: &mut Model<D>) -> Result<()> {
        let frames: Vec<&[u8]> = self.frames.iter().map(Vec::as_slice).collect();
        model.vision_features_rgb(&frames, &mut self.features)?;
        Ok(model.device().wait()?)
    }

    pub(super) fn project(&mut self, model: &mut Model<D>) -> Result<()> {
        model.video_tokens(&self.features, self.gate, &mut self.video)?;
        Ok(model.device().wait()?)
    }
}

/// Log-mel features of as much sound as the audio tower hears.
pub(super) struct Sound<D: Device> {
    mel: Vec<f32>,
    states: Rows<D>,
    tokens: Rows<D>,
}

impl<D: Device> Sound<D> {
    pub(super) fn new(model: &Model<D>, config: &AudioConfig) -> Result<Self> {
        let mut random = ChaCha8Rng::seed_from_u64(SEED);
        let mel = (0..config.mels * 2 * config.positions).map(|_| random.random_range(-1.0..1.0)).collect();
        Ok(Sound { mel, states: model.rows()?, tokens: model.rows()? })
    }

    pub(super) fn hear(&mut self, model: &mut Model<D>) -> Result<()> {
        model.audio_states(&self.mel, &mut self.states)?;
        model.audio_tokens(&self.states, &mut self.tokens)?;
        Ok(model.device().wait()?)
    }
}

/// A prompt to read, and a session to read it in.
pub(super) struct Prompt<D: Device> {
    session: Session<D>,
    /// Embeddings in the place of a window's pictures.
    video: Option<Rows<D>>,
    text: Vec<u32>,
}

impl<D: Device> Prompt<D> {
    /// As a window has it: pictures, then text.
    pub(super) fn window(model: &Model<D>) -> Result<Self> {
        let mut random = ChaCha8Rng::seed_from_u64(SEED);
        let config = model.config();
        let (width, vocabulary) = (config.decoder.width, config.decoder.vocabulary);
        let values: Vec<f32> = (0..video_tokens(config) * width).map(|_| random.random_range(-1.0..1.0)).collect();
        let mut video = model.rows()?;
        video.write(model.device(), &values, width)?;
        let session = session(model, window_prompt(config), 0)?;
        Ok(Prompt { session, video: Some(video), text: random_ids(&mut random, PROMPT_TEXT_TOKENS, vocabulary) })
    }

    /// Text alone.
    pub(super) fn text(model: &Model<D>, length: usize) -> Result<Self> {
        let mut random = ChaCha8Rng::seed_from_u64(SEED);
        let session = session(model, length, 0)?;
        Ok(Prompt { session, video: None, text: random_ids(&mut random, length, model.config().decoder.vocabulary) })
    }

    pub(super) fn len(&self) -> usize {
        self.text.len() + self.video.as_ref().map_or(0, Rows::rows)
    }

    pub(super) fn read(&mut self) -> Result<()> {
        let text = Piece::Tokens(&self.text);
        match &self.video {
            Some(video) => self.session.start(&[Piece::Rows(video), text])?,
            None => self.session.start(&[text])?,
        }
        // Until they are there.
        self.session.logits()?;
        Ok(())
    }
}

/// Tokens to write one by one.
pub(super) struct Decoding<D: Device> {
    session: Session<D>,
    positions: usize,
    text: Vec<u32>,
    written: Vec<u32>,
    /// Every token may be chosen.
    mask: Mask,
}

impl<D: Device> Decoding<D> {
    /// A session with room for `positions` positions, of which none is filled, and `tokens` tokens behind them.
    pub(super) fn empty(model: &Model<D>, positions: usize, tokens: usize) -> Result<Self> {
        let mut random = ChaCha8Rng::seed_from_u64(SEED);
        let session = session(model, positions, tokens)?;
        let mut ids = |count| random_ids(&mut random, count, model.config().decoder.vocabulary);
        let mask = Mask::all(model.config().decoder.vocabulary);
        Ok(Decoding { session, positions, text: ids(PROMPT_TEXT_TOKENS), written: ids(tokens), mask })
    }

    /// A session with `positions` random tokens in the cache.
    pub(super) fn new(model: &Model<D>, positions: usize, tokens: usize) -> Result<Self> {
        let mut decoding = Self::empty(model, positions, tokens)?;
        let mut random = ChaCha8Rng::seed_from_u64(SEED);
        let before = random_ids(&mut random, positions, model.config().decoder.vocabulary);
        decoding.session.start(&[Piece::Tokens(&before)])?;
        Ok(decoding)
    }

    /// Reads a window's prompt.
    pub(super) fn start(&mut self, window: &Window<D>) -> Result<()> {
        self.session.start(&[Piece::Rows(&window.video), Piece::Tokens(&self.text)])?;
        Ok(())
    }

    /// Forgets what was written.
    pub(super) fn rewind(&mut self) -> Result<()> {
        Ok(self.session.truncate(self.positions)?)
    }

    pub(super) fn write(&mut self) -> Result<()> {
        self.write_some(usize::MAX)
    }

    /// At most `count` of the tokens. Behind each the next one is chosen, and left.
    pub(super) fn write_some(&mut self, count: usize) -> Result<()> {
        for id in self.written.iter().take(count) {
            self.session.append(std::slice::from_ref(id))?;
            self.session.choose(self.mask.allowed(), &[], Choice::Greedy)?;
        }
        Ok(())
    }

    /// Bytes of keys and values that the tokens of a run read in all, each its own among them.
    pub(super) fn cache_bytes(&self) -> f64 {
        let written = self.written.len() as f64;
        written * (self.positions as f64 + (written + 1.0) / 2.0) * self.session.position_bytes() as f64
    }
}

fn session<D: Device>(model: &Model<D>, positions: usize, tokens: usize) -> Result<Session<D>> {
    let room = model.config().decoder.positions;
    if positions.saturating_add(tokens) > room {
        let written = if tokens > 0 { format!(" and {tokens} to write") } else { String::new() };
        bail!(
            "the model has {room} positions, and {positions}{written} are asked for: lower --positions, --prompt or --tokens"
        );
    }
    Ok(model.session(positions + tokens)?)
}

/// The verifier and the sentences it is given.
pub(super) struct SentenceReader<D: Device> {
    config: ClassifierConfig,
    classifier: Classifier<D>,
    sentences: Vec<Vec<u32>>,
    bytes: f64,
}

impl<D: Device> SentenceReader<D> {
    /// `classifier` is of `folder`.
    pub(super) fn new(folder: &Path, classifier: Classifier<D>) -> Result<Self> {
        let config = ClassifierConfig::read(folder)?;
        let mut random = ChaCha8Rng::seed_from_u64(SEED);
        let length = SENTENCE_TOKENS.min(classifier.capacity());
        let sentences = (0..SENTENCES).map(|_| random_ids(&mut random, length, config.encoder.vocabulary)).collect();
        Ok(SentenceReader { config, classifier, sentences, bytes: Bytes::of_verifier(folder)? })
    }

    pub(super) fn sentences(&self) -> usize {
        self.sentences.len()
    }

    pub(super) fn read(&mut self) -> Result<()> {
        for sentence in &self.sentences {
            self.classifier.logits(sentence)?;
        }
        Ok(())
    }

    pub(super) fn work(&self) -> Work {
        let length = self.sentences.first().map_or(0, Vec::len);
        work::verifier(&self.config, self.sentences.len(), length, self.bytes)
    }
}

fn random_ids(random: &mut impl Rng, count: usize, vocabulary: usize) -> Vec<u32> {
    (0..count).map(|_| random.random_range(0..vocabulary as u32)).collect()
}
