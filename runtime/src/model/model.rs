//! A model folder, opened and ready.

use std::path::Path;
use std::sync::Arc;

use candor_kernels::Device;
use candor_kernels::pixels::Picture;

use super::audio::AudioTower;
use super::checkpoint::{AUDIO, BERT, OpenCheckpoint, Tower, VISION, finish_main, finish_tower};
use super::config::ModelConfig;
use super::decoder::{Decoder, Session};
use super::gate::{BRANCHES, Gate};
use super::layers::{Loader, loading};
use super::projector::Projector;
use super::vision::VisionTower;
use super::{Adapter, Batch, ModelError, Rows};
use crate::weights::{Checkpoint, Inventory, Pages};

/// All parts of a model. Its buffers are taken on first use and kept; results go into [`Rows`] that the caller keeps.
pub struct Model<D: Device> {
    device: D,
    config: ModelConfig,
    vision: VisionTower<D>,
    projector: Projector<D>,
    gate: Gate<D>,
    /// The gate's encoder in the mapped files. A watched stream asks one instruction, and needs it once.
    gate_pages: Pages,
    audio: Option<AudioTower<D>>,
    decoder: Arc<Decoder<D>>,
    /// The same with the adapter.
    adapted: Arc<Decoder<D>>,
    mapped_bytes: usize,
}

/// How much the parts before the decoder have computed since the model was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Instructions read by the gate.
    pub gate_runs: u64,
    /// Frames through the vision tower.
    pub frames_encoded: u64,
    /// Frames through the projector's first stages.
    pub frames_staged: u64,
    /// Frames through the rest of the projector.
    pub frames_projected: u64,
}

impl<D: Device> Model<D> {
    /// Opens a model folder in the published layout. Weights are mapped, and every tensor's name, type and shape is
    /// checked; on the CPU nothing is copied.
    pub fn open(folder: &Path, device: D) -> Result<Self, ModelError> {
        Self::open_by(folder, device, Checkpoint::open)
    }

    /// As [`Model::open`], without reading a weight: for a device that computes nothing
    /// ([`candor_kernels::cpu::PlanDevice`]).
    pub fn open_headers(folder: &Path, device: D) -> Result<Self, ModelError> {
        Self::open_by(folder, device, Checkpoint::open_headers)
    }

    fn open_by(folder: &Path, device: D, open: OpenCheckpoint) -> Result<Self, ModelError> {
        let config = ModelConfig::read(folder)?;
        let main = open(folder)?;
        let find = |inside, folder: Option<&Path>, prefixes: &[&'static str]| {
            Tower::find(&main, inside, folder, prefixes, open)
        };
        let vision_tower = find(VISION, config.vision_folder.as_deref(), &["vision_model."])?;
        let bert_tower = find(BERT, config.bert_folder.as_deref(), &["bert."])?;
        let audio_tower = match config.audio {
            Some(_) => find(AUDIO, config.audio_folder.as_deref(), &["model.encoder.", "encoder."])?,
            None => None,
        };
        let gate_pages = match &bert_tower {
            Some(tower) => tower.checkpoint.pages(tower.prefix),
            None => main.pages(BERT),
        };

        let inventory = Inventory::new(&main);
        let separate = [&vision_tower, &bert_tower, &audio_tower];
        let inventories = separate.map(|t| t.as_ref().map(|t| (Inventory::new(&t.checkpoint), t)));
        let part = |index: usize, inside: &str| {
            Loader::new(
                &device,
                match &inventories[index] {
                    Some((inventory, tower)) => inventory.part(tower.prefix),
                    None => inventory.part(inside),
                },
            )
        };
        let root = Loader::new(&device, inventory.part(""));
        let inside = root.under("model");

        let towers = separate.into_iter().flatten().map(|tower| tower.checkpoint.tensor_bytes(tower.prefix));
        let bytes = main.tensor_bytes("") + towers.sum::<usize>();
        let (vision, projector, gate, audio, decoder) = loading(&device, bytes, || {
            let vision = VisionTower::load(&device, &part(0, VISION), &config.vision)?;
            let projector_part = inside.under("mm_projector");
            let width = config.decoder.width;
            let projector = Projector::load(&device, &projector_part, config.projector, &config.vision, width)?;
            let gate = Gate::load(&device, &part(1, BERT), &inside.under("bert_gate"), &config.bert)?;
            let audio = match &config.audio {
                Some(audio) => {
                    let projector = inside.under("audio_projector");
                    Some(AudioTower::load(&device, &part(2, AUDIO), &projector, audio, width)?)
                }
                None => None,
            };
            let decoder = Arc::new(Decoder::load(&device, &root, &config.decoder)?);
            Ok((vision, projector, gate, audio, decoder))
        })?;

        finish_main(&inventory, &config)?;
        for (inventory, tower) in inventories.iter().flatten() {
            finish_tower(inventory, tower, &config)?;
        }
        let towers: usize = separate.iter().filter_map(|t| t.as_ref()).map(|t| t.checkpoint.mapped_bytes()).sum();
        let mapped_bytes = main.mapped_bytes() + towers;
        let adapted = decoder.clone();
        let device = device.clone();
        Ok(Model { vision, projector, gate, gate_pages, audio, decoder, adapted, config, mapped_bytes, device })
    }

    /// The sizes.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Bytes of the mapped weight files.
    pub fn mapped_bytes(&self) -> usize {
        self.mapped_bytes
    }

    /// Bytes of host memory, beside the device's, that the parts before the decoder keep between windows.
    pub fn host_bytes(&self) -> usize {
        self.vision.host_bytes()
    }

    /// No rows yet, to be filled by the calls below.
    pub fn rows(&self) -> Result<Rows<D>, ModelError> {
        Rows::empty(&self.device)
    }

    /// Normalised frames `[frames, 3, side, side]` → patch states `[frames · patches, vision width]`.
    pub fn vision_features(&mut self, pixels: &[f32], out: &mut Rows<D>) -> Result<(), ModelError> {
        self.vision.forward(&self.device, pixels, out)
    }

    /// Frames as packed 8-bit RGB `[side, side, 3]`, already of the model's size → as [`Self::vision_features`].
    pub fn vision_features_rgb(&mut self, frames: &[&[u8]], out: &mut Rows<D>) -> Result<(), ModelError> {
        self.vision.forward_rgb(&self.device, frames, out)
    }

    /// Camera pixels → as [`Self::vision_features`]. Format, cut and scaling are the device's work, with the same bytes in the
    /// end as [`Picture::rgb`] gives; [`Preprocess::of_pixels`](crate::media::Preprocess::of_pixels) says how they are made.
    pub fn vision_features_of(&mut self, pictures: &[Picture<'_>], out: &mut Rows<D>) -> Result<(), ModelError> {
        self.vision.forward_pictures(&self.device, pictures, out)
    }

    /// Word-piece ids of the instruction, with `[CLS]` and `[SEP]` → weights of the branches video, body and face.
    /// Computed once for an instruction; the encoder's pages are let go of behind it.
    pub fn gate(&mut self, instruction_ids: &[u32]) -> Result<[f32; BRANCHES], ModelError> {
        let runs = self.gate.runs;
        let weights = self.gate.forward(&self.device, instruction_ids)?;
        if self.gate.runs > runs {
            self.gate_pages.let_go();
        }
        Ok(weights)
    }

    /// Patch states of a window's frames → video tokens `[frames · tokens a frame, decoder width]`.
    pub fn video_tokens(
        &mut self,
        features: &Rows<D>,
        gate: [f32; BRANCHES],
        out: &mut Rows<D>,
    ) -> Result<(), ModelError> {
        let tokens = self.projector.forward(&self.device, features)?;
        self.projector.mix(&self.device, tokens, gate, out)
    }

    /// As [`Self::video_tokens`], computing only what the last call did not: `features` `[frames · patches, vision width]`,
    /// `keys` `[frames]` name the window's frames, and equal keys in this call and the last one must be equal states. What
    /// that is of a frame depends on it and the one before it.
    ///
    /// # Errors
    /// [`ModelError::Input`] where features are no whole frames or keys are not as many, and what the device says.
    pub fn video_tokens_again(
        &mut self,
        features: &Rows<D>,
        keys: &[u64],
        gate: [f32; BRANCHES],
        out: &mut Rows<D>,
    ) -> Result<(), ModelError> {
        let tokens = self.projector.forward_again(&self.device, features, keys)?;
        self.projector.mix(&self.device, tokens, gate, out)
    }

    /// Has the next call of [`Self::gate`] read its instruction even if it is the last one again.
    pub fn forget_gate(&mut self) {
        self.gate.forget();
    }

    /// How much the parts before the decoder have computed.
    pub fn counts(&self) -> Counts {
        let [frames_staged, frames_projected] = self.projector.counts();
        Counts { gate_runs: self.gate.runs, frames_encoded: self.vision.encoded, frames_staged, frames_projected }
    }

    /// The projector's branches video, body and face of a window on the host, each `[tokens, decoder width]`.
    pub fn branches(&mut self, features: &Rows<D>) -> Result<[Vec<f32>; BRANCHES], ModelError> {
        let tokens = self.projector.forward(&self.device, features)?;
        let branch = |i| self.projector.branch(&self.device, i, tokens);
        Ok([branch(0)?, branch(1)?, branch(2)?])
    }

    /// Log-mel features `[mels, 2 · positions]` → states `[positions, audio width]`.
    pub fn audio_states(&mut self, mel: &[f32], out: &mut Rows<D>) -> Result<(), ModelError> {
        self.audio.as_mut().ok_or_else(no_audio)?.states(&self.device, mel, out)
    }

    /// Mono samples from -1 to 1, 16 000 a second → as [`Self::audio_states`]. They are followed by silence or cut to `320 ·
    /// positions` (30 s of Whisper's 1500), and their log-mel features stay on the device.
    ///
    /// # Errors
    /// [`ModelError::Input`] for no samples, one that is no number, and one far from -1 to 1.
    pub fn audio_states_of(&mut self, samples: &[f32], out: &mut Rows<D>) -> Result<(), ModelError> {
        self.audio.as_mut().ok_or_else(no_audio)?.states_of(&self.device, samples, out)
    }

    /// The log-mel features of samples, `[mels, 2 · positions]`, as [`Self::audio_states_of`] makes them.
    ///
    /// # Errors
    /// The same.
    pub fn log_mel(&mut self, samples: &[f32]) -> Result<Vec<f32>, ModelError> {
        self.audio.as_mut().ok_or_else(no_audio)?.log_mel(&self.device, samples)
    }

    /// Audio states → audio tokens `[positions / 3, decoder width]`.
    pub fn audio_tokens(&mut self, states: &Rows<D>, out: &mut Rows<D>) -> Result<(), ModelError> {
        self.audio.as_mut().ok_or_else(no_audio)?.project(&self.device, states, out)
    }

    /// Puts an adapter beside the decoder's weights, in place of the last one: sessions made from now on have it.
    /// `None` takes it off. Nothing of the checkpoint changes or is copied.
    pub fn adapt(&mut self, adapter: Option<&Adapter>) -> Result<(), ModelError> {
        self.adapted = match adapter {
            Some(adapter) => Arc::new(self.decoder.adapted(adapter)?),
            None => self.decoder.clone(),
        };
        Ok(())
    }

    /// Room for `slots` sequences of up to `capacity` positions that are continued side by side.
    pub fn batch(&self, slots: usize, capacity: usize) -> Result<Batch<D>, ModelError> {
        Batch::new(self.adapted.clone(), slots, capacity)
    }

    /// A decoder session with room for `capacity` positions. It outlives the model, and one is enough for many prompts.
    pub fn session(&self, capacity: usize) -> Result<Session<D>, ModelError> {
        Session::new(self.adapted.clone(), capacity)
    }
}

fn no_audio() -> ModelError {
    ModelError::input("audio", "this model has no audio tower")
}
