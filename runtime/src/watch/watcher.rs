//! A model, its verifier and a policy, opened and ready to say what a window shows.

use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use candor_kernels::Device;

use super::frames::Frames;
use super::policy::{Policy, PolicyError, Task, write_reason};
use super::reuse::{Reuse, Work};
use crate::manifest::{Manifest, ManifestError};
use crate::media::face::{FaceDetector, FaceError, WindowFace};
use crate::media::resize::{Preprocess, PreprocessError};
use crate::media::sampling::SettingsError;
use crate::media::{FaceCrop, Fit, Frame, Window, WindowSettings};
use crate::model::gate::BRANCHES;
use crate::model::{Adapter, LanguageModel, Model, ModelConfig, ModelError, Piece, Reading, Rows, Session};
use crate::observation::{
    Face, Identity, Observation, PolicyRecord, Probabilities, Span, StageTimes, Times, Tokens, VERSION, WindowSpan,
};
use crate::text::automaton::ANSWER_OPEN;
use crate::text::labels::LabelError;
use crate::text::{
    ChatTemplate, Grammar, GrammarError, HeadRows, LabelScorer, LabelSearch, PromptPiece, Sampler, Sampling,
    SamplingError, TemplateError, Tokenizer, TokenizerError,
};
use crate::verify::{Emotion, SentenceClassifier, Verdict, Verifier, VerifierError};

/// Places in the key-value cache beyond the prompt and the completion, for spelling labels behind it.
const SPELLING_ROOM: usize = 64;

/// Why a window cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WatchError {
    /// The model's manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer, of the decoder or of the instruction gate.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The label set or the token budget.
    #[error("{folder}: {source}", folder = folder.display())]
    Grammar {
        /// The model's folder.
        folder: PathBuf,
        /// What is wrong with them.
        source: GrammarError,
    },
    /// How tokens are to be chosen.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// The verifier.
    #[error(transparent)]
    Verifier(#[from] VerifierError),
    /// The model does not say which verifier reads its rationales.
    #[error("{folder}: candor.toml has no model.verifier; name a verifier with --verifier", folder = folder.display())]
    NoVerifier {
        /// The model's folder.
        folder: PathBuf,
    },
    /// The instruction gate's tokenizer is not there.
    #[error("{folder}: no folder with the tokenizer of the instruction gate's BERT (mm_bert_model in config.json)", folder = folder.display())]
    NoGateTokenizer {
        /// The model's folder.
        folder: PathBuf,
    },
    /// The face detector.
    #[error(transparent)]
    Face(#[from] FaceError),
    /// The frames do not fit the model.
    #[error(transparent)]
    Pixels(#[from] PreprocessError),
    /// The labels could not be scored.
    #[error(transparent)]
    Labels(#[from] LabelError),
    /// The rationale could not be written or read.
    #[error(transparent)]
    Policy(#[from] PolicyError),
}

/// What a user decides.
#[derive(Clone, Copy, Debug)]
pub struct WatchSettings {
    /// What is done about rationales that are not verified.
    pub policy: Policy,
    /// How tokens are chosen; the seed is the run's, each window adds its number.
    pub sampling: Sampling,
    /// How a frame becomes a square, where it is not to be as the manifest says.
    pub fit: Option<Fit>,
    /// What is not computed again from window to window.
    pub reuse: Reuse,
    /// Cuts the face out where the last window did if it has hardly moved, so that frames that are shown again need not be
    /// computed again. Off by default, as it is not what the model's manifest says to the letter.
    pub steady: bool,
    /// Rows of the output head that are computed. Fewer than all can change an answer.
    pub head_rows: HeadRows,
}

impl Default for WatchSettings {
    fn default() -> Self {
        WatchSettings {
            policy: Policy::Annotate,
            sampling: Sampling::GREEDY,
            fit: None,
            reuse: Reuse::ALL,
            steady: false,
            head_rows: HeadRows::All,
        }
    }
}

/// Reads windows, one after the other.
pub struct Watcher<D: Device> {
    settings: WatchSettings,
    manifest: Manifest,
    identity: Identity,
    emotions: Vec<Emotion>,
    model: Model<D>,
    session: Session<D>,
    features: Rows<D>,
    /// The pictures whose states `features` holds.
    frames: Frames<D>,
    video: Rows<D>,
    /// The pictures and the gate that `video` was made of, where they have names.
    video_of: Option<(Vec<u64>, [f32; BRANCHES])>,
    frames_searched: u64,
    /// What sessions read that are gone.
    read_before: Reading,
    /// Work that the log knows of.
    logged: Work,
    /// Tokens that may be written, where not all may.
    tokens: Option<Vec<u32>>,
    tokenizer: Tokenizer,
    gate_tokenizer: Tokenizer,
    template: ChatTemplate,
    instruction: String,
    prompt: Vec<PromptPiece>,
    gate_ids: Vec<u32>,
    answer_opening: Vec<u32>,
    grammar: Grammar,
    scorer: LabelScorer,
    preprocess: Preprocess,
    /// Where the fit is the face.
    faces: Option<(FaceDetector, FaceCrop)>,
    /// Where the last face was cut out.
    last_face: Option<WindowFace>,
    verifier: Verifier<D>,
    verifier_identity: Identity,
}

impl<D: Device> Watcher<D> {
    /// Opens a model's folder, and its verifier's: `verifier`, or the one that the model's manifest names.
    pub fn open(
        folder: &Path,
        verifier: Option<&Path>,
        device: D,
        settings: WatchSettings,
    ) -> Result<Watcher<D>, WatchError> {
        Sampler::new(settings.sampling)?; // a setting out of range shows now, not at the first window
        let manifest = Manifest::open(folder)?;
        let verifier = match verifier {
            Some(verifier) => verifier.to_path_buf(),
            None => manifest.verifier_folder().ok_or_else(|| WatchError::NoVerifier { folder: folder.into() })?,
        };
        let verifier = Verifier::open(&verifier, device.clone())?;
        let model = Model::open(folder, device)?;
        let config = model.config();

        let tokenizer = Tokenizer::open(folder)?;
        let instruction = manifest.model.instruction.clone();
        let template = ChatTemplate::open(folder, &tokenizer)?;
        let prompt = template.prompt(&tokenizer, &instruction, false)?;
        let gate_folder = config.bert_folder.clone();
        let gate_folder = gate_folder.ok_or_else(|| WatchError::NoGateTokenizer { folder: folder.into() })?;
        let gate_tokenizer = Tokenizer::open(&gate_folder)?;
        let gate_ids = gate_tokenizer.encode_sequence(&instruction, config.bert.positions)?;

        let table = tokenizer.token_table(config.decoder.vocabulary)?;
        let (labels, max_new_tokens) = (&manifest.model.labels, manifest.model.max_new_tokens);
        let tokens = settings.head_rows.tokens(&table, labels, &instruction);
        let table = std::sync::Arc::new(match &tokens {
            Some(tokens) => table.only(tokens),
            None => table,
        });
        let grammar_error = |source| WatchError::Grammar { folder: folder.into(), source };
        let grammar = Grammar::new(table.clone(), labels, max_new_tokens).map_err(grammar_error)?;
        let scorer = LabelScorer::new(table, labels).map_err(grammar_error)?;

        let mut session = model.session(capacity(config, text_tokens(&prompt), max_new_tokens))?;
        let Rooms { features, frames, video } = Rooms::new(&model)?;
        session.restrict_head(tokens.as_deref())?;

        let input = &manifest.input;
        let fit = settings.fit.unwrap_or(input.fit);
        let faces = match fit {
            Fit::Face => Some((FaceDetector::new()?, FaceCrop::new(input.face_margin, input.face_shift)?)),
            _ => None,
        };
        let side = config.vision.image;
        Ok(Watcher {
            settings,
            identity: manifest.identity_record()?,
            emotions: manifest.emotions(),
            preprocess: Preprocess { side, fit, detail: input.detail, grey: input.grey },
            features,
            frames,
            video,
            video_of: None,
            frames_searched: 0,
            read_before: Reading::default(),
            logged: Work::default(),
            tokens,
            answer_opening: tokenizer.encode(ANSWER_OPEN)?,
            verifier_identity: verifier.identity()?,
            session,
            model,
            tokenizer,
            gate_tokenizer,
            template,
            instruction,
            prompt,
            gate_ids,
            grammar,
            scorer,
            faces,
            last_face: None,
            verifier,
            manifest,
        })
    }

    /// Puts an adapter beside the model's decoder: a PEFT folder, or that of a reward fine-tuning run. Observations name
    /// it from now on.
    pub fn adapt(&mut self, folder: &Path) -> Result<(), WatchError> {
        let adapter = Adapter::open(folder).map_err(ModelError::from)?;
        self.model.adapt(Some(&adapter))?;
        self.renew_session(self.session.capacity())?;
        self.identity.adapter = Some(adapter.digest().to_owned());
        Ok(())
    }

    /// Asks another instruction than the manifest's from now on. Without the places for pictures and sound, which the
    /// chat template puts before it.
    pub fn ask(&mut self, instruction: &str) -> Result<(), WatchError> {
        if instruction == self.instruction {
            return Ok(());
        }
        let config = self.model.config();
        let prompt = self.template.prompt(&self.tokenizer, instruction, false)?;
        let gate_ids = self.gate_tokenizer.encode_sequence(instruction, config.bert.positions)?;
        let needed = capacity(config, text_tokens(&prompt), self.manifest.model.max_new_tokens);
        if self.session.capacity() < needed {
            self.renew_session(needed)?;
        }
        (self.prompt, self.gate_ids, self.instruction) = (prompt, gate_ids, instruction.to_owned());
        Ok(())
    }

    fn renew_session(&mut self, capacity: usize) -> Result<(), ModelError> {
        let mut session = self.model.session(capacity)?;
        session.restrict_head(self.tokens.as_deref())?;
        self.read_before = self.decoder_read();
        self.session = session;
        Ok(())
    }

    fn decoder_read(&self) -> Reading {
        let (before, now) = (self.read_before, self.session.reading());
        Reading { positions: before.positions + now.positions, passes: before.passes + now.passes }
    }

    /// Work done since the watcher was opened.
    pub fn work(&self) -> Work {
        let frames_searched = self.frames_searched + self.frames.frames_searched;
        Work { frames_searched, model: self.model.counts(), decoder: self.decoder_read() }
    }

    fn log_work(&mut self, window: u64) {
        let work = self.work();
        let logged = std::mem::replace(&mut self.logged, work);
        log::debug!(
            "window {window}: {} frames searched for faces, {} encoded, {} and {} through the projector's halves; {} \
             positions read in {} passes",
            work.frames_searched - logged.frames_searched,
            work.model.frames_encoded - logged.model.frames_encoded,
            work.model.frames_staged - logged.model.frames_staged,
            work.model.frames_projected - logged.model.frames_projected,
            work.decoder.positions - logged.decoder.positions,
            work.decoder.passes - logged.decoder.passes,
        );
    }

    /// Has the verifier remember the readings of more sentences, see [`Verifier::remembering`].
    pub fn remembering(mut self, sentences: usize) -> Self {
        self.verifier = self.verifier.remembering(sentences);
        self
    }

    /// The verifier, for who wants to read further sentences with it.
    pub fn verifier(&mut self) -> &mut impl SentenceClassifier {
        &mut self.verifier
    }

    /// The model's manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The model.
    pub fn model(&self) -> &Model<D> {
        &self.model
    }

    /// How a stream is to be cut for this model; `None` takes the manifest's times.
    pub fn windows(&self, window_s: Option<f64>, step_s: Option<f64>) -> Result<WindowSettings, SettingsError> {
        let input = &self.manifest.input;
        WindowSettings::new(
            self.model.config().frames,
            window_s.unwrap_or(input.window_s),
            step_s.unwrap_or(input.step_s),
        )
    }

    /// Says what a window shows. `source` is named in the observation.
    pub fn observe(&mut self, source: &str, window: &Window) -> Result<Observation, WatchError> {
        let started = Instant::now();
        let mut lap = Lap(started);
        let mut times = StageTimes::default();
        let mut observation = self.nothing_seen(source, window);

        let squares = match &mut self.faces {
            None => Vec::new(),
            Some((detector, crop)) => {
                let found = match self.settings.reuse.frames {
                    true => self.frames.find(detector, &window.frames)?,
                    false => {
                        self.frames_searched += window.frames.len() as u64;
                        detector.find(&window.frames)?
                    }
                };
                let Some(face) = found else {
                    times.pixels = lap.take();
                    times.total = milliseconds(started);
                    observation.times.stages_ms = times;
                    return Ok(observation);
                };
                let face = match &self.last_face {
                    Some(last) if self.settings.steady => face.steadied(last),
                    _ => face,
                };
                self.last_face = Some(face);
                observation.faces =
                    window.frames.iter().enumerate().map(|(i, frame)| face_in(i, &face, frame)).collect();
                crop.squares(&face, &window.frames)
            }
        };
        let keys = if self.settings.reuse.frames {
            times.pixels = lap.take();
            let Watcher { frames, model, preprocess, features, .. } = self;
            let keys = frames.features(model, preprocess, &window.frames, &squares, features)?;
            let pictures_ms = frames.pictures_time.as_secs_f64() * 1e3;
            times.pixels += pictures_ms;
            times.vision = (lap.take() - pictures_ms).max(0.0);
            Some(keys)
        } else {
            let frames = self.model.config().frames;
            let pictures = self.preprocess.pictures(&window.frames, &squares, frames)?;
            times.pixels = lap.take();
            let pictures: Vec<&[u8]> = pictures.iter().map(Vec::as_slice).collect();
            self.model.vision_features_rgb(&pictures, &mut self.features)?;
            None
        };
        self.explain(observation, keys, times, started, lap)
    }

    /// As [`observe`](Self::observe), of a clip that the vision tower has seen already: `features` are its states,
    /// `[frames · patches, vision width]`, of as many frames as the model takes. The clip counts as window `index`.
    pub fn observe_features(&mut self, source: &str, index: u64, features: &[f32]) -> Result<Observation, WatchError> {
        let started = Instant::now();
        let config = self.model.config();
        let (frames, width) = (config.frames, config.vision.width);
        let expected = frames * config.vision.patches() * width;
        if features.len() != expected {
            let reason = format!("{} values are not the {expected} of {frames} frames", features.len());
            return Err(ModelError::Input { what: "features", reason }.into());
        }
        let window = Window {
            index,
            start_s: 0.0,
            end_s: 0.0,
            start_monotonic_s: 0.0,
            end_monotonic_s: 0.0,
            start_wall: SystemTime::UNIX_EPOCH,
            end_wall: SystemTime::UNIX_EPOCH,
            frame_count: frames,
            frames: Vec::new(),
        };
        let mut observation = self.nothing_seen(source, &window);
        observation.window.frames = frames;
        let device = self.model.device().clone();
        self.frames.forget();
        self.features.write(&device, features, width)?;
        self.explain(observation, None, StageTimes::default(), started, Lap(started))
    }

    /// Everything behind the vision tower, whose states are in `self.features`; `keys` name the pictures they are of.
    fn explain(
        &mut self,
        mut observation: Observation,
        keys: Option<Vec<u64>>,
        mut times: StageTimes,
        started: Instant,
        mut lap: Lap,
    ) -> Result<Observation, WatchError> {
        let reuse = self.settings.reuse;
        if !reuse.gate {
            self.model.forget_gate();
        }
        let gate = self.model.gate(&self.gate_ids)?;
        let of = keys.filter(|_| reuse.projector).map(|keys| (keys, gate));
        if of.is_none() || self.video_of != of {
            self.video_of = None;
            match &of {
                Some((keys, gate)) => {
                    self.model.video_tokens_again(&self.features, keys, *gate, &mut self.video)?;
                }
                None => self.model.video_tokens(&self.features, gate, &mut self.video)?,
            }
            self.video_of = of;
        }
        times.vision += lap.take();

        let pieces: Vec<Piece<'_, D>> = self
            .prompt
            .iter()
            .map(|piece| match piece {
                PromptPiece::Text(ids) => Piece::Tokens(ids),
                // The prompt was asked for without a place for sound.
                PromptPiece::Video | PromptPiece::Audio => Piece::Rows(&self.video),
            })
            .collect();
        match reuse.prefix {
            true => self.session.start_again(&pieces)?,
            false => self.session.start(&pieces)?,
        }
        times.prefill = lap.take();

        let search = LabelSearch::default();
        let fast = self.scorer.score_fast(&mut self.session, &self.answer_opening, &search)?;
        times.probabilities = lap.take();

        let prompt = self.session.position();
        let sampling = Sampling { seed: observation.seed, ..self.settings.sampling };
        let answer = self.manifest.model.answer;
        let (grammar, scorer, emotions) = (&self.grammar, &self.scorer, self.emotions.as_slice());
        let task = Task { grammar, scorer, search, emotions, fast: &fast, answer, sampling, forced: reuse.forced };
        let reason = write_reason(self.settings.policy, &task, &mut self.session, &mut self.verifier)?;
        let after_ms = reason.probabilities_time.as_secs_f64() * 1e3;
        times.verify = reason.verify_time.as_secs_f64() * 1e3;
        times.decode = (lap.take() - times.verify - after_ms).max(0.0);
        times.probabilities += after_ms;

        let labels = self.grammar.labels();
        observation.label = Some(labels[reason.label].clone());
        observation.probabilities = Some(Probabilities::new(labels, &reason.after.probabilities));
        observation.fast_probabilities = Some(Probabilities::new(labels, &fast.probabilities));
        observation.verdict = reason.assessment.verdict;
        if !reason.record.withheld {
            observation.rationale = Some(reason.completion.rationale);
            observation.sentences = reason.assessment.sentences;
        }
        observation.policy = reason.record;
        let generated = reason.completion.tokens.len();
        observation.tokens = Tokens { prompt, generated, extra: reason.extra_tokens };
        times.total = milliseconds(started);
        observation.times.stages_ms = times;
        self.log_work(observation.window.index);
        Ok(observation)
    }

    /// The observation of a window without a face.
    fn nothing_seen(&self, source: &str, window: &Window) -> Observation {
        let seed = self.settings.sampling.seed.wrapping_add(window.index);
        Observation {
            version: VERSION,
            source: source.to_string(),
            window: WindowSpan {
                index: window.index,
                start_s: window.start_s,
                end_s: window.end_s,
                frames: window.frames.len(),
            },
            faces: Vec::new(),
            label: None,
            answer: self.manifest.model.answer,
            probabilities: None,
            fast_probabilities: None,
            rationale: None,
            sentences: Vec::new(),
            verdict: Verdict::Empty,
            policy: PolicyRecord::of(self.settings.policy.name(), self.settings.policy.n()),
            model: self.identity.clone(),
            verifier: self.verifier_identity.clone(),
            seed,
            tokens: Tokens::default(),
            times: Times {
                monotonic: Span { start_s: window.start_monotonic_s, end_s: window.end_monotonic_s },
                wall: Span::of_wall(window.start_wall, window.end_wall),
                stages_ms: StageTimes::default(),
            },
        }
    }
}

/// The device's memory that a watcher keeps for windows, beside the model's own and the session's.
pub(super) struct Rooms<D: Device> {
    pub(super) features: Rows<D>,
    pub(super) frames: Frames<D>,
    pub(super) video: Rows<D>,
}

impl<D: Device> Rooms<D> {
    pub(super) fn new(model: &Model<D>) -> Result<Self, WatchError> {
        let config = model.config();
        let states = config.frames * config.vision.patches();
        Ok(Rooms {
            features: Rows::with_room(model.device(), states, config.vision.width)?,
            frames: Frames::new(model)?,
            video: model.rows()?,
        })
    }
}

fn text_tokens(prompt: &[PromptPiece]) -> usize {
    prompt.iter().map(|piece| if let PromptPiece::Text(ids) = piece { ids.len() } else { 0 }).sum()
}

/// Positions that a prompt with so many text tokens and one video, and what is written behind it, take.
pub(super) fn capacity(config: &ModelConfig, text_tokens: usize, max_new_tokens: usize) -> usize {
    let prompt = config.frames * config.tokens_a_frame() + text_tokens;
    (prompt + max_new_tokens + SPELLING_ROOM).min(config.decoder.positions)
}

fn face_in(index: usize, face: &WindowFace, frame: &Frame) -> Face {
    let found = face.in_frame(frame);
    Face { frame: index, x: found.x, y: found.y, width: found.width, height: found.height, score: found.score }
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Times stages that follow one another.
struct Lap(Instant);

impl Lap {
    /// Milliseconds since the last stage ended.
    fn take(&mut self) -> f64 {
        let spent = milliseconds(self.0);
        self.0 = Instant::now();
        spent
    }
}
