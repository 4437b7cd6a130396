//! What a process that watches holds in memory at its peak, by part, known before a weight is read.
//!
//! The model's parts are not calculated here: they are opened on [`PlanDevice`], which computes nothing, and a window is put
//! through them by the code that does so in earnest. What is beside the device (tokenizers, frames, the program) is
//! estimated by the constants below, each measured.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use candor_kernels::cpu::{CpuDevice, Held, PlanDevice};

use super::watcher::{Rooms, WatchError, capacity};
use crate::manifest::Manifest;
#[cfg(feature = "media")]
use crate::media::WindowSettings;
use crate::media::resize::{Preprocess, Square};
use crate::media::{Fit, Frame};
use crate::model::{Classifier, LanguageModel, Model, ModelError, Piece};

/// Text tokens of a prompt beside the instruction's: the chat template's.
const TEMPLATE_TOKENS: usize = 32;
/// Bytes of a text that a token stands for, at least.
const BYTES_A_TOKEN: usize = 3;
/// Word pieces of a long sentence, for the verifier.
const SENTENCE: usize = 64;
/// Different words that a stream's rationales come to have. Rows of a table of words lie pages apart, so that a small table
/// is resident as a whole then.
const WORDS: usize = 1024;

/// The program, its heap, and the libraries it is linked with.
const PROGRAM: Held = Held { mapped: 9_500_000, owned: 3_000_000, gpu: 0 };
/// A tokenizer, and the tables made of it, for each byte of its files.
const TOKENIZER: u64 = 20;
/// The face detector and the pictures it makes smaller.
const FACES: Held = Held { mapped: 0, owned: 8_000_000, gpu: 0 };
/// GStreamer with its list of plugins and a decoder, without frames.
#[cfg(feature = "media")]
const GSTREAMER: Held = Held { mapped: 45_000_000, owned: 12_000_000, gpu: 0 };
/// Pictures of RGB that are on their way, and as many of a decoder's (half the size) that it keeps.
#[cfg(feature = "media")]
const PICTURES_ON_THE_WAY: u64 = 8;

/// Why there is no plan, or none that can be kept to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The model, the verifier or a manifest is at fault.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// There is less memory than the plan needs.
    #[error(
        "{need:.0} MB of memory are needed and {available:.0} MB are available, {shortfall:.0} MB too few (candor plan says \
         what for); end other programs, take a smaller model, store its weights in fewer bits (candor-tools quantize), or \
         go on with --ignore-memory",
        need = megabytes(*need), available = megabytes(*available), shortfall = megabytes(need.saturating_sub(*available))
    )]
    Short {
        /// Bytes needed.
        need: u64,
        /// Bytes available.
        available: u64,
    },
    /// The GPU has less memory free than the plan needs of it.
    #[error(
        "{need:.0} MB of the GPU's memory are needed and {free:.0} MB are free, {shortfall:.0} MB too few (candor plan says \
         what for); end what else uses the GPU, take a smaller model, store its weights in fewer bits (candor-tools \
         quantize), or go on with --ignore-memory",
        need = megabytes(*need), free = megabytes(*free), shortfall = megabytes(need.saturating_sub(*free))
    )]
    ShortOnGpu {
        /// Bytes needed.
        need: u64,
        /// Bytes free.
        free: u64,
    },
}

/// A GPU's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuMemory {
    /// Bytes that nobody uses.
    pub free: u64,
    /// All bytes.
    pub total: u64,
    /// Whether it is the processor's memory.
    pub shared: bool,
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// The pictures of a source.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pictures {
    /// Pixels in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Pictures a second.
    pub rate: f64,
}

impl Default for Pictures {
    /// What cameras mostly give.
    fn default() -> Self {
        Pictures { width: 1280, height: 720, rate: 30.0 }
    }
}

/// A part of a plan, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// What for.
    pub name: &'static str,
    /// What is held.
    pub held: Held,
}

/// The memory of a process that watches, by part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The parts; together they are the peak.
    pub parts: Vec<Part>,
}

impl Plan {
    /// The plan of [`Watcher::open`](super::Watcher::open) with these folders and of its windows. Reads manifests,
    /// configurations and headers.
    ///
    /// # Errors
    /// Those of opening the folders, but for what only the weights' bytes or the tokenizers would show.
    pub fn new(folder: &Path, verifier: &Path, device: CpuDevice, pictures: Pictures) -> Result<Plan, PlanError> {
        Ok(Self::of(folder, verifier, PlanDevice::new(device), pictures)?)
    }

    /// As [`Plan::new`], where a GPU computes: its memory is counted beside the process's. What its driver takes itself is
    /// not known, and gone already from what is free when the GPU is open.
    ///
    /// # Errors
    /// Those of [`Plan::new`].
    pub fn on_gpu(folder: &Path, verifier: &Path, pictures: Pictures) -> Result<Plan, PlanError> {
        Ok(Self::of(folder, verifier, PlanDevice::of_gpu(CpuDevice::new(Some(1))), pictures)?)
    }

    fn of(folder: &Path, verifier: &Path, device: PlanDevice, pictures: Pictures) -> Result<Plan, WatchError> {
        let manifest = Manifest::open(folder)?;
        let mut parts = Parts { device, last: Held::default(), parts: Vec::new() };
        let mut model = Model::open_headers(folder, parts.device.clone())?;
        let mut classifier = Classifier::open_headers(verifier, parts.device.clone())?;
        parts.add("copies of small weights and scales", 0);

        let config = model.config().clone();
        let text = TEMPLATE_TOKENS + manifest.model.instruction.len().div_ceil(BYTES_A_TOKEN);
        let positions = capacity(&config, text, manifest.model.max_new_tokens);
        let mut session = model.session(positions)?;
        parts.add("decoder", session.host_bytes());
        parts.split("decoder", "key-value cache", (session.position_bytes() * positions) as u64);
        let Rooms { mut features, mut frames, mut video } = Rooms::new(&model)?;

        let input = &manifest.input;
        let preprocess =
            Preprocess { side: config.vision.image, fit: input.fit, detail: input.detail, grey: input.grey };
        let (shown, squares) = pictures_that_differ(config.frames)?;
        let squares = if input.fit == Fit::Face { &squares[..] } else { &[] };
        let keys = frames.features(&mut model, &preprocess, &shown, squares, &mut features)?;
        parts.add("vision", model.host_bytes() + frames.host_bytes());

        // The gate's weights are let go of behind it, and are not there when the decoder's are.
        let gate_ids = vec![0; text.min(config.bert.positions)];
        let device = parts.device.clone();
        let gate = device.passing(|| model.gate(&gate_ids))?;
        parts.add("gate, without its weights", 0);

        model.video_tokens_again(&features, &keys, gate, &mut video)?;
        parts.add("projector", 0);

        let ids = vec![0; text.max(1)];
        session.start_again(&[Piece::Tokens(&ids), Piece::Rows(&video)])?;
        session.append(&[0]).map_err(ModelError::from)?;
        let words = spread(config.decoder.vocabulary);
        session.embeddings(&[Piece::Tokens(&words)])?;
        parts.add("decoder", 0);

        for words in spread(classifier.vocabulary()).chunks(SENTENCE.min(classifier.capacity())) {
            classifier.logits(words)?;
        }
        parts.add("verifier", 0);

        let folders = [Some(folder), config.bert_folder.as_deref(), Some(verifier)];
        let files: u64 = folders.into_iter().flatten().map(tokenizer_bytes).sum();
        parts.push("tokenizers and grammar", Held { owned: TOKENIZER * files, ..Held::default() });
        if input.fit == Fit::Face {
            parts.push("face detector", FACES);
        }
        #[cfg(feature = "media")]
        {
            let settings = WindowSettings::new(config.frames, input.window_s, input.step_s);
            let owned = settings.map_or(0, |settings| pictures.held_bytes(&settings));
            parts.push("frames", Held { owned, ..Held::default() });
            parts.push("GStreamer", GSTREAMER);
        }
        #[cfg(not(feature = "media"))]
        let _ = pictures;
        parts.push("program", PROGRAM);
        Ok(Plan { parts: parts.parts })
    }

    /// A plan of what a device would hold at most, and the program.
    pub fn of_device(device: &PlanDevice, host_bytes: usize) -> Plan {
        let most = device.most();
        let held = Held { owned: most.owned + host_bytes as u64, ..most };
        Plan { parts: vec![Part { name: "stages", held }, Part { name: "program", held: PROGRAM }] }
    }

    /// All parts together.
    pub fn held(&self) -> Held {
        let sum = |of: fn(Held) -> u64| self.parts.iter().map(|part| of(part.held)).sum();
        Held { mapped: sum(|held| held.mapped), owned: sum(|held| held.owned), gpu: sum(|held| held.gpu) }
    }

    /// Bytes of all parts together.
    pub fn total(&self) -> u64 {
        self.held().total()
    }

    /// Whether so many bytes suffice; they do where nobody knows how many there are.
    ///
    /// # Errors
    /// [`PlanError::Short`] where they do not.
    pub fn check(&self, available: Option<u64>) -> Result<(), PlanError> {
        match available {
            Some(available) if available < self.total() => Err(PlanError::Short { need: self.total(), available }),
            _ => Ok(()),
        }
    }
}

impl Plan {
    /// Whether the process's memory suffices, as in [`Plan::check`], and a GPU's. Where they are one, it is for both together.
    ///
    /// # Errors
    /// [`PlanError::Short`] or [`PlanError::ShortOnGpu`] where they do not.
    pub fn check_with_gpu(&self, available: Option<u64>, gpu: GpuMemory) -> Result<(), PlanError> {
        let need = self.held().gpu;
        if gpu.shared {
            // What is free does not count pages that the system would give up.
            let (need, available) = (self.total() + need, available.unwrap_or(gpu.free));
            return if available < need { Err(PlanError::Short { need, available }) } else { Ok(()) };
        }
        self.check(available)?;
        if gpu.free < need { Err(PlanError::ShortOnGpu { need, free: gpu.free }) } else { Ok(()) }
    }
}

/// Parts that follow from one another: each is what the device holds more than before.
struct Parts {
    device: PlanDevice,
    last: Held,
    parts: Vec<Part>,
}

impl Parts {
    /// What the device holds more than at the last call, and bytes of the host's.
    fn add(&mut self, name: &'static str, host_bytes: usize) {
        let now = self.device.held();
        let held = Held {
            mapped: now.mapped - self.last.mapped,
            owned: now.owned - self.last.owned + host_bytes as u64,
            gpu: now.gpu - self.last.gpu,
        };
        self.last = now;
        self.push(name, held);
    }

    /// Gives some of a part's own bytes a name of their own.
    fn split(&mut self, name: &'static str, of: &'static str, bytes: u64) {
        let of_gpu = self.device.is_of_gpu();
        let split =
            if of_gpu { Held { gpu: bytes, ..Held::default() } } else { Held { owned: bytes, ..Held::default() } };
        for Part { held, .. } in self.parts.iter_mut().filter(|part| part.name == name) {
            (held.owned, held.gpu) = (held.owned - split.owned, held.gpu - split.gpu);
        }
        self.push(of, split);
    }

    /// Adds to a part, or a new one.
    fn push(&mut self, name: &'static str, held: Held) {
        match self.parts.iter_mut().find(|part| part.name == name) {
            Some(part) => {
                part.held.mapped += held.mapped;
                part.held.owned += held.owned;
                part.held.gpu += held.gpu;
            }
            None => self.parts.push(Part { name, held }),
        }
    }
}

impl Pictures {
    /// Bytes of the pictures that are held while a window fills, and on their way to it.
    #[cfg(feature = "media")]
    fn held_bytes(&self, settings: &WindowSettings) -> u64 {
        let picture = (self.width * self.height * 3) as u64;
        let window = (settings.window_s * self.rate).ceil() as u64 + 1;
        let fewest = (4 * settings.frames) as u64;
        let kept = window.min((settings.buffer_bytes as u64 / picture.max(1)).max(fewest));
        // A decoder's pictures are in YUV 4:2:0, half as large.
        picture * (kept + PICTURES_ON_THE_WAY) + picture / 2 * PICTURES_ON_THE_WAY
    }
}

/// Small pictures of which no two are equal, and a square in each.
fn pictures_that_differ(count: usize) -> Result<(Vec<Arc<Frame>>, Vec<Square>), WatchError> {
    let frame = |index: usize| {
        let [low, high, ..] = index.to_le_bytes();
        let rgb = [[low; 3], [high; 3]].concat();
        Frame { rgb, width: 2, height: 1, pts_s: 0.0, monotonic_s: 0.0, wall: std::time::SystemTime::UNIX_EPOCH }
    };
    let frames = (0..count).map(|index| Arc::new(frame(index))).collect();
    Ok((frames, vec![Square { x: 0, y: 0, side: 2 }; count]))
}

/// Ids all over a vocabulary.
fn spread(vocabulary: usize) -> Vec<u32> {
    let count = WORDS.min(vocabulary);
    (0..count).map(|index| (index * vocabulary / count) as u32).collect()
}

/// Bytes of the files that a folder's tokenizer is read from.
fn tokenizer_bytes(folder: &Path) -> u64 {
    let size = |name: &str| fs::metadata(folder.join(name)).map_or(0, |file| file.len());
    match size("tokenizer.json") {
        0 => ["vocab.json", "merges.txt", "vocab.txt"].map(size).iter().sum(),
        json => json,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::path::PathBuf;

    use super::*;

    fn models() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../models")
    }

    fn plan(pictures: Pictures) -> Plan {
        let device = CpuDevice::new(Some(2));
        Plan::new(&models().join("default"), &models().join("default-verifier"), device, pictures).unwrap()
    }

    #[test]
    fn too_little_memory_is_refused_with_what_is_missing() {
        let plan = plan(Pictures::default());
        let need = plan.total();
        assert!(plan.check(None).is_ok(), "nobody knows");
        assert!(plan.check(Some(need)).is_ok());
        let error = plan.check(Some(need - 20_000_000)).unwrap_err();
        assert!(matches!(error, PlanError::Short { available, .. } if available == need - 20_000_000));
        let text = error.to_string();
        let need = format!("{:.0} MB of memory are needed", megabytes(need));
        for said in [need.as_str(), "20 MB too few", "candor-tools quantize", "--ignore-memory"] {
            assert!(text.contains(said), "{said:?} is not in {text:?}");
        }
    }

    #[test]
    fn a_gpu_holds_what_is_computed_with_and_shares_it_where_it_is_integrated() {
        let cpu = plan(Pictures::default());
        let plan = Plan::on_gpu(&models().join("default"), &models().join("default-verifier"), Pictures::default());
        let plan = plan.unwrap();
        let (host, gpu) = (plan.total(), plan.held().gpu);
        let file = |name: &str| fs::metadata(models().join(name).join("model.safetensors")).unwrap().len();
        let stored = file("default") + file("default-verifier");
        assert!(gpu > stored && gpu < stored + cpu.held().owned, "{gpu} bytes, {stored} stored");
        assert!(host < cpu.total() - stored / 2, "{host} bytes beside a GPU, {} without", cpu.total());
        assert_eq!(gpu, plan.parts.iter().map(|part| part.held.gpu).sum::<u64>());
        assert!(plan.parts.iter().any(|part| part.name == "key-value cache" && part.held.gpu > 0));

        let on = |free, shared| GpuMemory { free, total: 1 << 40, shared };
        assert!(plan.check_with_gpu(Some(host), on(gpu, false)).is_ok());
        assert!(plan.check_with_gpu(None, on(gpu, false)).is_ok());
        let error = plan.check_with_gpu(Some(host - 1), on(gpu, false)).unwrap_err();
        assert!(matches!(error, PlanError::Short { .. }));
        let error = plan.check_with_gpu(Some(host), on(gpu - 20_000_000, false)).unwrap_err();
        assert!(matches!(error, PlanError::ShortOnGpu { need, .. } if need == gpu));
        let text = error.to_string();
        for said in ["MB of the GPU's memory are needed", "20 MB too few", "--ignore-memory"] {
            assert!(text.contains(said), "{said:?} is not in {text:?}");
        }
        // One memory is counted once, by what the system says of it; what the driver calls free leaves the page cache out.
        assert!(plan.check_with_gpu(Some(host + gpu), on(0, true)).is_ok());
        assert!(plan.check_with_gpu(None, on(host + gpu, true)).is_ok());
        let error = plan.check_with_gpu(Some(host + gpu - 1), on(1 << 40, true)).unwrap_err();
        assert!(matches!(error, PlanError::Short { need, .. } if need == host + gpu));
    }

    #[test]
    fn parts_are_of_the_size_of_their_files_and_pictures() {
        let plan = plan(Pictures { width: 640, height: 360, rate: 24.0 });
        let part = |name: &str| plan.parts.iter().find(|part| part.name == name).unwrap().held;
        let file = |name: &str| fs::metadata(models().join(name).join("model.safetensors")).unwrap().len();
        let of_model: u64 = ["vision", "projector", "decoder"].map(|name| part(name).mapped).iter().sum();
        for (planned, stored) in [(of_model, file("default")), (part("verifier").mapped, file("default-verifier"))] {
            // Row scales are copied, and the gate's weights are not kept; pages are larger than tensors.
            assert!(planned.abs_diff(stored) < stored / 10, "{planned} of {stored}");
        }
        #[cfg(feature = "media")]
        assert!(part("frames").owned > 49 * 640 * 360 * 3);
        assert_eq!(plan.total(), plan.parts.iter().map(|part| part.held.total()).sum::<u64>());
    }

    #[test]
    fn folders_that_are_no_models_are_errors() {
        let device = CpuDevice::new(Some(1));
        let error = Plan::new(&models().join("face"), &models().join("default-verifier"), device, Pictures::default());
        assert!(matches!(error, Err(PlanError::Watch(WatchError::Model(_)))));
    }
}
