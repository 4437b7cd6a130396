//! Every size of a model, from its config.json and those of its towers' folders.
//!
//! All values are checked here, so that the stages can compute with them: sizes lie between 1 and a limit far above
//! any real model's, widths divide by heads, and the branches of the projector give equally many tokens.

use std::path::{Path, PathBuf};

use candor_kernels::Activation;
use serde_json::{Map, Value};

use crate::weights::{WeightsError, check_quantisation, read_text};

/// The largest config.json that is read; real ones have a few kB.
const CONFIG_LIMIT: u64 = 16_000_000;
/// The largest size that is believed (vocabularies of 7B models have 150 thousand).
const SIZE_LIMIT: usize = 1 << 24;
/// The most frames a model may take.
const FRAMES_LIMIT: usize = 1024;
const CONFIG: &str = "config.json";

/// Why a configuration cannot be used. Each variant names the file and the key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read, or asks for a quantisation that is not supported.
    #[error(transparent)]
    File(#[from] WeightsError),
    /// The file is not JSON.
    #[error("{}: {reason}", .file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// A key that has no default is absent.
    #[error("{}: {key} is missing", .file.display())]
    Missing {
        /// The file.
        file: PathBuf,
        /// The key, with the objects it lies in.
        key: String,
    },
    /// A value that is of the wrong kind, or out of range.
    #[error("{}: {key} is {value}, but must be {expected}", .file.display())]
    Value {
        /// The file.
        file: PathBuf,
        /// The key, with the objects it lies in.
        key: String,
        /// The value.
        value: String,
        /// What it must be.
        expected: String,
    },
    /// A tower is neither in the checkpoint nor in a folder of its own.
    #[error("{}: {key} names {}, which is no folder, and the checkpoint does not say the tower's sizes ({section}); put the tower's folder there, or add {section}", .file.display(), .folder.display())]
    NoTower {
        /// The file.
        file: PathBuf,
        /// The key that names the tower's folder.
        key: &'static str,
        /// The folder.
        folder: PathBuf,
        /// The object of config.json that would give the sizes.
        section: &'static str,
    },
}

/// Sizes of the SigLIP tower.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct VisionConfig {
    /// Width of a state.
    pub width: usize,
    /// Layers of the tower.
    pub layers: usize,
    /// Layers that are computed: those before the selected hidden state.
    pub used_layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Inner width of a layer's MLP.
    pub mlp: usize,
    /// Side of a frame in pixels.
    pub image: usize,
    /// Side of a patch in pixels.
    pub patch: usize,
    /// Layer norms' epsilon.
    pub eps: f32,
    /// The MLP's activation.
    pub activation: Activation,
}

impl VisionConfig {
    /// Patches along a side.
    pub fn side(&self) -> usize {
        self.image / self.patch
    }

    /// Patches of a frame.
    pub fn patches(&self) -> usize {
        self.side() * self.side()
    }
}

/// The two published vision projectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProjectorKind {
    /// `all_in_one_small`: stages of two blocks, for an even patch grid.
    Small,
    /// `all_in_one`: stages of four blocks, one zero around in space, for an odd patch grid.
    Large,
}

impl ProjectorKind {
    /// Blocks of a stage.
    pub fn depth(self) -> usize {
        match self {
            ProjectorKind::Small => 2,
            ProjectorKind::Large => 4,
        }
    }

    /// Zeros around a frame before the convolution.
    pub fn padding(self) -> usize {
        match self {
            ProjectorKind::Small => 0,
            ProjectorKind::Large => 1,
        }
    }

    /// Tokens along a side behind a grid of `side` patches.
    pub fn reduced(self, side: usize) -> usize {
        (side + 2 * self.padding()) / 2
    }
}

/// Sizes of a BERT or RoBERTa encoder.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct BertConfig {
    /// Width of a state.
    pub width: usize,
    /// Layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Inner width of a layer's MLP.
    pub mlp: usize,
    /// Rows of the word table.
    pub vocabulary: usize,
    /// Rows of the position table.
    pub positions: usize,
    /// Rows of the token type table.
    pub types: usize,
    /// Layer norms' epsilon.
    pub eps: f32,
    /// The MLP's activation.
    pub activation: Activation,
    /// RoBERTa: the padding's id, behind which positions start. BERT: none, positions start at 0.
    pub padding: Option<u32>,
}

/// Sizes of the Whisper encoder.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct AudioConfig {
    /// Width of a state.
    pub width: usize,
    /// Layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Inner width of a layer's MLP.
    pub mlp: usize,
    /// Mel bands.
    pub mels: usize,
    /// States of the 30 seconds that the encoder reads.
    pub positions: usize,
    /// The MLP's and the convolutions' activation.
    pub activation: Activation,
}

/// Sizes of the Qwen2 decoder.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct DecoderConfig {
    /// Width of a state.
    pub width: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub key_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Inner width of a layer's MLP.
    pub mlp: usize,
    /// Rows of the embedding table.
    pub vocabulary: usize,
    /// Positions the model was made for.
    pub positions: usize,
    /// Base of the rotary positions.
    pub theta: f32,
    /// RMS norms' epsilon.
    pub eps: f32,
    /// Whether the output head is the embedding table.
    pub tied: bool,
}

impl DecoderConfig {
    /// Factor on q·k.
    pub fn attention_scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// Sizes of a sequence classifier.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ClassifierConfig {
    /// The encoder.
    pub encoder: BertConfig,
    /// The labels in the order of the logits.
    pub labels: Vec<String>,
}

/// Everything config.json says about a model.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// Frames the model was trained on.
    pub frames: usize,
    /// The vision tower.
    pub vision: VisionConfig,
    /// The vision projector.
    pub projector: ProjectorKind,
    /// The gate's BERT.
    pub bert: BertConfig,
    /// The audio tower, where the model has one.
    pub audio: Option<AudioConfig>,
    /// The decoder.
    pub decoder: DecoderConfig,
    /// `mm_vision_tower`'s folder, if it is there.
    pub vision_folder: Option<PathBuf>,
    /// `mm_audio_tower`'s folder, if it is there.
    pub audio_folder: Option<PathBuf>,
    /// The folder of the gate's BERT with its tokenizer, if it is there.
    pub bert_folder: Option<PathBuf>,
}

impl ModelConfig {
    /// Video tokens a frame.
    pub fn tokens_a_frame(&self) -> usize {
        self.projector.reduced(self.vision.side()).pow(2)
    }

    /// Reads config.json of a model folder, and those of its towers' folders.
    pub fn read(folder: &Path) -> Result<Self, ConfigError> {
        let document = Document::read(folder)?;
        let root = document.root()?;
        check_quantisation(&document.file, &document.value)?;
        if root.text("model_type")? != "HumanOmni_qwen2" {
            return Err(root.wrong("model_type", "\"HumanOmni_qwen2\""));
        }
        let decoder = decoder(&root)?;
        let frames = root.size("num_frames", None)?;
        if frames > FRAMES_LIMIT {
            return Err(root.wrong("num_frames", &format!("at most {FRAMES_LIMIT}")));
        }

        let vision_folder = tower_folder(folder, &root, "mm_vision_tower")?;
        let mut vision = match tower(&root, "vision_config", "mm_vision_tower", folder, vision_folder.as_deref())? {
            Tower::Section(section) => vision(&section, false)?,
            Tower::Folder(document) => {
                let root = document.root()?;
                // A whole SiglipModel keeps the tower's sizes in an object of their own.
                match root.section("vision_config")? {
                    Some(section) => vision(&section, true)?,
                    None => vision(&root, true)?,
                }
            }
        };
        vision.used_layers = used_layers(&root, vision.layers)?;
        if root.has("mm_hidden_size") && root.size("mm_hidden_size", None)? != vision.width {
            return Err(root.wrong("mm_hidden_size", &format!("the vision tower's width {}", vision.width)));
        }
        let projector = match root.text("mm_projector_type")? {
            "all_in_one_small" => ProjectorKind::Small,
            "all_in_one" => ProjectorKind::Large,
            _ => return Err(root.wrong("mm_projector_type", "\"all_in_one_small\" or \"all_in_one\"")),
        };
        let side = vision.side();
        if side < 2 || projector.reduced(side) != side.div_ceil(2) {
            let expected = format!(
                "a projector for a grid of {side} x {side} patches (all_in_one_small: even grids, all_in_one: odd ones)"
            );
            return Err(root.wrong("mm_projector_type", &expected));
        }

        let has_audio = root.section("audio_config")?.is_some() || root.has("mm_audio_tower");
        let audio_folder = tower_folder(folder, &root, "mm_audio_tower")?;
        let audio = if has_audio {
            if root.has("mm_audio_projector_type") && root.text("mm_audio_projector_type")? != "mlp2x_gelu" {
                return Err(root.wrong("mm_audio_projector_type", "\"mlp2x_gelu\""));
            }
            Some(match tower(&root, "audio_config", "mm_audio_tower", folder, audio_folder.as_deref())? {
                Tower::Section(section) => audio(&section)?,
                Tower::Folder(document) => audio(&document.root()?)?,
            })
        } else {
            None
        };

        let bert_folder = match tower_folder(folder, &root, "mm_bert_model")? {
            Some(named) => Some(named),
            None => ["bert-base-uncased", "bert"].iter().map(|n| folder.join(n)).find(|f| f.is_dir()),
        };
        let bert = match tower(&root, "bert_config", "mm_bert_model", folder, bert_folder.as_deref())? {
            Tower::Section(section) => bert(&section, None)?,
            Tower::Folder(document) => bert(&document.root()?, None)?,
        };
        Ok(ModelConfig { frames, vision, projector, bert, audio, decoder, vision_folder, audio_folder, bert_folder })
    }
}

impl ClassifierConfig {
    /// Reads config.json of a `BertForSequenceClassification` or `RobertaForSequenceClassification` folder.
    pub fn read(folder: &Path) -> Result<Self, ConfigError> {
        let document = Document::read(folder)?;
        let root = document.root()?;
        check_quantisation(&document.file, &document.value)?;
        let padding = match root.text("model_type")? {
            "bert" => None,
            "roberta" => Some(root.index("pad_token_id", 1)?),
            _ => return Err(root.wrong("model_type", "\"bert\" or \"roberta\"")),
        };
        let encoder = bert(&root, padding)?;
        if padding.is_some_and(|p| p as usize + 1 >= encoder.positions) {
            return Err(root.wrong("pad_token_id", "less than max_position_embeddings - 1"));
        }
        let labels = root.section("id2label")?.ok_or_else(|| root.missing("id2label"))?;
        let count = labels.values.len();
        if count == 0 || count > SIZE_LIMIT {
            return Err(root.wrong("id2label", "an object of labels"));
        }
        let labels = (0..count).map(|i| labels.text(&i.to_string()).map(str::to_owned)).collect::<Result<_, _>>()?;
        Ok(ClassifierConfig { encoder, labels })
    }
}

/// A parsed config.json.
struct Document {
    file: PathBuf,
    value: Value,
}

impl Document {
    fn read(folder: &Path) -> Result<Self, ConfigError> {
        let file = folder.join(CONFIG);
        let text = read_text(&file, CONFIG_LIMIT)?;
        let value = serde_json::from_slice(&text)
            .map_err(|e| ConfigError::Json { file: file.clone(), reason: e.to_string() })?;
        Ok(Document { file, value })
    }

    fn root(&self) -> Result<Section<'_>, ConfigError> {
        let values = self
            .value
            .as_object()
            .ok_or_else(|| ConfigError::Json { file: self.file.clone(), reason: "no JSON object".into() })?;
        Ok(Section { file: &self.file, prefix: String::new(), values })
    }
}

/// An object of a config.json.
struct Section<'a> {
    file: &'a Path,
    /// The objects it lies in, each with a dot behind it.
    prefix: String,
    values: &'a Map<String, Value>,
}

impl<'a> Section<'a> {
    /// A value; `null` counts as absent.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.values.get(key).filter(|v| !v.is_null())
    }

    fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    fn missing(&self, key: &str) -> ConfigError {
        ConfigError::Missing { file: self.file.to_owned(), key: format!("{}{key}", self.prefix) }
    }

    fn wrong(&self, key: &str, expected: &str) -> ConfigError {
        ConfigError::Value {
            file: self.file.to_owned(),
            key: format!("{}{key}", self.prefix),
            value: self
                .values
                .get(key)
                .map_or_else(|| "absent".to_owned(), |v| v.to_string().chars().take(80).collect()),
            expected: expected.to_owned(),
        }
    }

    /// A whole number from 1 to [`SIZE_LIMIT`].
    fn size(&self, key: &str, default: Option<usize>) -> Result<usize, ConfigError> {
        let Some(value) = self.get(key) else { return default.ok_or_else(|| self.missing(key)) };
        let size = value.as_u64().and_then(|v| usize::try_from(v).ok()).filter(|v| (1..=SIZE_LIMIT).contains(v));
        size.ok_or_else(|| self.wrong(key, &format!("a whole number from 1 to {SIZE_LIMIT}")))
    }

    /// A whole number from 0 to [`SIZE_LIMIT`].
    fn index(&self, key: &str, default: u32) -> Result<u32, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(default) };
        let index = value.as_u64().and_then(|v| u32::try_from(v).ok()).filter(|&v| v as usize <= SIZE_LIMIT);
        index.ok_or_else(|| self.wrong(key, &format!("a whole number from 0 to {SIZE_LIMIT}")))
    }

    /// A finite number above zero.
    fn positive(&self, key: &str, default: Option<f32>) -> Result<f32, ConfigError> {
        let Some(value) = self.get(key) else { return default.ok_or_else(|| self.missing(key)) };
        let number = value.as_f64().map(|v| v as f32).filter(|v| v.is_finite() && *v > 0.0);
        number.ok_or_else(|| self.wrong(key, "a number above zero"))
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.wrong(key, "true or false"))
    }

    fn text(&self, key: &str) -> Result<&'a str, ConfigError> {
        let value = self.get(key).ok_or_else(|| self.missing(key))?;
        value.as_str().ok_or_else(|| self.wrong(key, "a text"))
    }

    fn section(&self, key: &str) -> Result<Option<Section<'a>>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let values = value.as_object().ok_or_else(|| self.wrong(key, "an object"))?;
        Ok(Some(Section { file: self.file, prefix: format!("{}{key}.", self.prefix), values }))
    }

    fn activation(&self, key: &str, default: Activation) -> Result<Activation, ConfigError> {
        if !self.has(key) {
            return Ok(default);
        }
        Ok(match self.text(key)? {
            "gelu" => Activation::Gelu,
            "gelu_pytorch_tanh" | "gelu_new" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            "silu" => Activation::Silu,
            _ => return Err(self.wrong(key, "gelu, gelu_pytorch_tanh, gelu_new, relu or silu")),
        })
    }

    /// Heads that divide a width.
    fn heads(&self, key: &str, default: Option<usize>, width: usize) -> Result<usize, ConfigError> {
        let heads = self.size(key, default)?;
        if !width.is_multiple_of(heads) {
            return Err(self.wrong(key, &format!("a divisor of the width {width}")));
        }
        Ok(heads)
    }
}

/// Where a tower's sizes stand.
enum Tower<'a> {
    /// In an object of the model's own config.json.
    Section(Section<'a>),
    /// In the tower's folder.
    Folder(Document),
}

/// The model's own object comes first, then the folder's config.json.
fn tower<'a>(
    root: &Section<'a>,
    section: &'static str,
    key: &'static str,
    folder: &Path,
    tower: Option<&Path>,
) -> Result<Tower<'a>, ConfigError> {
    if let Some(section) = root.section(section)? {
        return Ok(Tower::Section(section));
    }
    match tower {
        Some(tower) => Ok(Tower::Folder(Document::read(tower)?)),
        None if root.has(key) => {
            Err(ConfigError::NoTower { file: root.file.to_owned(), key, folder: folder.join(root.text(key)?), section })
        }
        None => Err(root.missing(section)),
    }
}

/// The folder that a key names, relative to the model's; none where the key is absent or no folder is there.
fn tower_folder(folder: &Path, root: &Section<'_>, key: &str) -> Result<Option<PathBuf>, ConfigError> {
    if !root.has(key) {
        return Ok(None);
    }
    let named = root.text(key)?;
    Ok(Some(folder.join(named)).filter(|f| !named.is_empty() && f.is_dir()))
}

/// Layers before the hidden state that `mm_vision_select_layer` names, counted as transformers does: 0 is the
/// embeddings, -1 the output of the last layer.
fn used_layers(root: &Section<'_>, layers: usize) -> Result<usize, ConfigError> {
    const KEY: &str = "mm_vision_select_layer";
    let value = root.get(KEY).ok_or_else(|| root.missing(KEY))?;
    let selected = value.as_i64().and_then(|v| {
        let index = if v < 0 { v.checked_add(layers as i64 + 1)? } else { v };
        usize::try_from(index).ok().filter(|&i| i <= layers)
    });
    selected.ok_or_else(|| root.wrong(KEY, &format!("one of the {} hidden states of the vision tower", layers + 1)))
}

/// `folder`: keys that a SigLIP folder leaves out have the values of transformers' SiglipVisionConfig, whose files
/// hold only what differs from them.
fn vision(section: &Section<'_>, folder: bool) -> Result<VisionConfig, ConfigError> {
    let default = |value: usize| folder.then_some(value);
    let width = section.size("hidden_size", default(768))?;
    let layers = section.size("num_hidden_layers", default(12))?;
    let image = section.size("image_size", default(224))?;
    let patch = section.size("patch_size", default(16))?;
    if patch > image {
        return Err(section.wrong("patch_size", &format!("at most the image_size {image}")));
    }
    if section.size("num_channels", Some(3))? != 3 {
        return Err(section.wrong("num_channels", "3"));
    }
    Ok(VisionConfig {
        width,
        layers,
        used_layers: layers,
        heads: section.heads("num_attention_heads", default(12), width)?,
        mlp: section.size("intermediate_size", default(3072))?,
        image,
        patch,
        eps: section.positive("layer_norm_eps", Some(1e-6))?,
        activation: section.activation("hidden_act", Activation::GeluTanh)?,
    })
}

fn audio(section: &Section<'_>) -> Result<AudioConfig, ConfigError> {
    let width = section.size("d_model", None)?;
    let positions = section.size("max_source_positions", None)?;
    if positions < 3 {
        return Err(section.wrong("max_source_positions", "at least 3, the states of one audio token"));
    }
    Ok(AudioConfig {
        width,
        layers: section.size("encoder_layers", None)?,
        heads: section.heads("encoder_attention_heads", None, width)?,
        mlp: section.size("encoder_ffn_dim", None)?,
        mels: section.size("num_mel_bins", None)?,
        positions,
        activation: section.activation("activation_function", Activation::Gelu)?,
    })
}

fn bert(section: &Section<'_>, padding: Option<u32>) -> Result<BertConfig, ConfigError> {
    let width = section.size("hidden_size", None)?;
    if section.has("position_embedding_type") && section.text("position_embedding_type")? != "absolute" {
        return Err(section.wrong("position_embedding_type", "\"absolute\""));
    }
    Ok(BertConfig {
        width,
        layers: section.size("num_hidden_layers", None)?,
        heads: section.heads("num_attention_heads", None, width)?,
        mlp: section.size("intermediate_size", None)?,
        vocabulary: section.size("vocab_size", None)?,
        positions: section.size("max_position_embeddings", Some(512))?,
        types: section.size("type_vocab_size", Some(2))?,
        eps: section.positive("layer_norm_eps", Some(1e-12))?,
        activation: section.activation("hidden_act", Activation::Gelu)?,
        padding,
    })
}

fn decoder(root: &Section<'_>) -> Result<DecoderConfig, ConfigError> {
    let width = root.size("hidden_size", None)?;
    let heads = root.size("num_attention_heads", None)?;
    let key_heads = root.size("num_key_value_heads", Some(heads))?;
    if !heads.is_multiple_of(key_heads) {
        return Err(root.wrong("num_key_value_heads", &format!("a divisor of num_attention_heads {heads}")));
    }
    let head_dim = match root.has("head_dim") {
        true => root.size("head_dim", None)?,
        false => width / root.heads("num_attention_heads", None, width)?,
    };
    if !head_dim.is_multiple_of(2) {
        let key = if root.has("head_dim") { "head_dim" } else { "num_attention_heads" };
        return Err(root.wrong(key, &format!("such that a head's width is even; it is {head_dim}")));
    }
    if root.flag("use_sliding_window", false)? {
        return Err(root.wrong("use_sliding_window", "false"));
    }
    if root.has("hidden_act") && root.text("hidden_act")? != "silu" {
        return Err(root.wrong("hidden_act", "\"silu\""));
    }
    Ok(DecoderConfig {
        width,
        layers: root.size("num_hidden_layers", None)?,
        heads,
        key_heads,
        head_dim,
        mlp: root.size("intermediate_size", None)?,
        vocabulary: root.size("vocab_size", None)?,
        positions: root.size("max_position_embeddings", None)?,
        theta: theta(root)?,
        eps: root.positive("rms_norm_eps", None)?,
        tied: root.flag("tie_word_embeddings", false)?,
    })
}

/// The base of the rotary positions; newer files keep it in `rope_parameters`. Scaled variants are not read.
fn theta(root: &Section<'_>) -> Result<f32, ConfigError> {
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(section) = root.section(key)? else { continue };
        for kind in ["rope_type", "type"] {
            if section.has(kind) && section.text(kind)? != "default" {
                return Err(section.wrong(kind, "\"default\""));
            }
        }
        if section.has("rope_theta") {
            return section.positive("rope_theta", None);
        }
    }
    root.positive("rope_theta", None)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;

    fn model() -> Value {
        json!({
            "model_type": "HumanOmni_qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
            "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151_936, "rope_theta": 1e6,
            "rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 32768, "num_frames": 8,
            "mm_hidden_size": 768, "mm_projector_type": "all_in_one_small", "mm_vision_select_layer": -2,
            "mm_audio_projector_type": "mlp2x_gelu",
            "vision_config": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                "intermediate_size": 3072, "image_size": 224, "patch_size": 16},
            "audio_config": {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20,
                "encoder_ffn_dim": 5120, "num_mel_bins": 128, "max_source_positions": 1500},
            "bert_config": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                "intermediate_size": 3072, "vocab_size": 30522},
        })
    }

    fn read(config: &str) -> Result<ModelConfig, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(CONFIG), config).unwrap();
        ModelConfig::read(folder.path())
    }

    /// Reads the configuration with the value at `key` (objects parted by dots) replaced.
    fn with(key: &str, value: Value) -> Result<ModelConfig, ConfigError> {
        let mut config = model();
        match key.rsplit_once('.') {
            Some((object, last)) => config[object][last] = value,
            None => config[key] = value,
        }
        read(&config.to_string())
    }

    #[test]
    fn the_published_sizes() {
        let config = read(&model().to_string()).unwrap();
        assert_eq!((config.vision.used_layers, config.vision.patches(), config.tokens_a_frame()), (11, 196, 49));
        assert_eq!((config.decoder.head_dim, config.decoder.tied), (64, false));
        assert_eq!((config.bert.positions, config.bert.types, config.bert.eps), (512, 2, 1e-12));
        assert_eq!(config.vision.activation, Activation::GeluTanh);
        let sizes = [("vision_config.image_size", 384), ("vision_config.patch_size", 14)];
        let mut large = model();
        for (key, value) in sizes {
            large["vision_config"][key.split('.').next_back().unwrap()] = value.into();
        }
        large["mm_projector_type"] = "all_in_one".into();
        let config = read(&large.to_string()).unwrap();
        assert_eq!((config.vision.patches(), config.tokens_a_frame()), (729, 196));
    }

    #[test]
    fn sizes_that_no_model_has_are_named() {
        let sizes = [
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "vocab_size",
            "max_position_embeddings",
            "num_frames",
            "vision_config.hidden_size",
            "vision_config.num_hidden_layers",
            "vision_config.num_attention_heads",
            "vision_config.image_size",
            "vision_config.patch_size",
            "vision_config.intermediate_size",
            "audio_config.d_model",
            "audio_config.encoder_layers",
            "audio_config.num_mel_bins",
            "audio_config.max_source_positions",
            "bert_config.hidden_size",
            "bert_config.vocab_size",
            "bert_config.max_position_embeddings",
        ];
        for key in sizes {
            for bad in [json!(0), json!(-1), json!(1.5), json!(u64::MAX), json!(1 << 25), json!("8"), json!([8])] {
                let error = with(key, bad.clone()).err().unwrap_or_else(|| panic!("{key} = {bad} was taken"));
                assert!(matches!(&error, ConfigError::Value { key: k, .. } if k == key), "{key} = {bad}: {error}");
            }
        }
        for key in ["hidden_size", "vocab_size", "num_frames", "vision_config.patch_size", "audio_config.d_model"] {
            let error = with(key, Value::Null).unwrap_err();
            assert!(matches!(&error, ConfigError::Missing { key: k, .. } if k == key), "{error}");
        }
    }

    #[test]
    fn values_that_do_not_fit_each_other_are_named() {
        for (key, value, named) in [
            ("num_attention_heads", json!(13), "num_key_value_heads"),
            ("num_attention_heads", json!(896), "num_attention_heads"),
            ("num_key_value_heads", json!(3), "num_key_value_heads"),
            ("head_dim", json!(63), "head_dim"),
            ("vision_config.num_attention_heads", json!(7), "vision_config.num_attention_heads"),
            ("audio_config.encoder_attention_heads", json!(3), "audio_config.encoder_attention_heads"),
            ("bert_config.num_attention_heads", json!(5), "bert_config.num_attention_heads"),
            ("vision_config.patch_size", json!(225), "vision_config.patch_size"),
            ("vision_config.patch_size", json!(224), "mm_projector_type"),
            ("vision_config.image_size", json!(240), "mm_projector_type"),
            ("vision_config.num_channels", json!(1), "vision_config.num_channels"),
            ("vision_config.hidden_act", json!("quick_gelu"), "vision_config.hidden_act"),
            ("vision_config.layer_norm_eps", json!(0), "vision_config.layer_norm_eps"),
            ("vision_config.layer_norm_eps", json!(1e300), "vision_config.layer_norm_eps"),
            ("mm_projector_type", json!("all_in_one"), "mm_projector_type"),
            ("mm_projector_type", json!("linear"), "mm_projector_type"),
            ("mm_hidden_size", json!(769), "mm_hidden_size"),
            ("mm_vision_select_layer", json!(-14), "mm_vision_select_layer"),
            ("mm_vision_select_layer", json!(13), "mm_vision_select_layer"),
            ("mm_vision_select_layer", json!(i64::MIN), "mm_vision_select_layer"),
            ("mm_audio_projector_type", json!("linear"), "mm_audio_projector_type"),
            ("audio_config.max_source_positions", json!(2), "audio_config.max_source_positions"),
            ("num_frames", json!(1025), "num_frames"),
            ("model_type", json!("llama"), "model_type"),
            ("hidden_act", json!("gelu"), "hidden_act"),
            ("rope_theta", json!(-1), "rope_theta"),
            ("rope_scaling", json!({"type": "yarn"}), "rope_scaling.type"),
            ("rope_parameters", json!({"rope_theta": "x"}), "rope_parameters.rope_theta"),
            ("use_sliding_window", json!(true), "use_sliding_window"),
            ("tie_word_embeddings", json!("yes"), "tie_word_embeddings"),
            ("vision_config", json!(3), "vision_config"),
            ("bert_config.position_embedding_type", json!("relative_key"), "bert_config.position_embedding_type"),
        ] {
            let error = with(key, value.clone()).err().unwrap_or_else(|| panic!("{key} = {value} was taken"));
            assert!(matches!(&error, ConfigError::Value { key: k, .. } if k == named), "{key} = {value}: {error}");
        }
    }

    #[test]
    fn selected_states_are_counted_as_transformers_does() {
        for (value, used) in [(-1, 12), (-2, 11), (-13, 0), (0, 0), (12, 12)] {
            assert_eq!(with("mm_vision_select_layer", value.into()).unwrap().vision.used_layers, used);
        }
    }

    #[test]
    fn rotary_base_in_either_place() {
        let mut config = model();
        config.as_object_mut().unwrap().remove("rope_theta");
        assert!(
            matches!(read(&config.to_string()).unwrap_err(), ConfigError::Missing { key, .. } if key == "rope_theta")
        );
        config["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 5e5});
        assert_eq!(read(&config.to_string()).unwrap().decoder.theta, 5e5);
    }

    #[test]
    fn towers_whose_sizes_nobody_gives() {
        let error = with("bert_config", Value::Null).unwrap_err();
        assert!(matches!(&error, ConfigError::Missing { key, .. } if key == "bert_config"), "{error}");
        let mut config = model();
        config["vision_config"] = Value::Null;
        config["mm_vision_tower"] = "siglip".into();
        let text = read(&config.to_string()).unwrap_err().to_string();
        assert!(text.contains("mm_vision_tower") && text.contains("vision_config"), "{text}");
    }

    #[test]
    fn files_that_are_no_configuration() {
        for text in ["", "{", "[]", "3", "\u{0}"] {
            assert!(matches!(read(text).unwrap_err(), ConfigError::Json { .. }), "{text:?}");
        }
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(ModelConfig::read(folder.path()).unwrap_err(), ConfigError::File(WeightsError::Io { .. })));
        std::fs::File::create(folder.path().join(CONFIG)).unwrap().set_len(CONFIG_LIMIT + 1).unwrap();
        assert!(matches!(
            ModelConfig::read(folder.path()).unwrap_err(),
            ConfigError::File(WeightsError::TooLarge { .. })
        ));
    }

    #[test]
    fn classifiers() {
        let read = |change: &dyn Fn(&mut Value)| {
            let mut config = json!({"model_type": "roberta", "hidden_size": 768, "num_hidden_layers": 12,
                "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 50265,
                "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1,
                "id2label": {"0": "admiration", "1": "amusement"}});
            change(&mut config);
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join(CONFIG), config.to_string()).unwrap();
            ClassifierConfig::read(folder.path())
        };
        let config = read(&|_| ()).unwrap();
        assert_eq!((config.labels, config.encoder.padding), (vec!["admiration".into(), "amusement".into()], Some(1)));
        assert_eq!(read(&|c| c["model_type"] = "bert".into()).unwrap().encoder.padding, None);
        for (key, value, named) in [
            ("model_type", json!("gpt2"), "model_type"),
            ("pad_token_id", json!(513), "pad_token_id"),
            ("pad_token_id", json!(-1), "pad_token_id"),
            ("id2label", json!({}), "id2label"),
            ("id2label", json!(["a"]), "id2label"),
            ("id2label", json!({"0": 7}), "id2label.0"),
        ] {
            let error = read(&|c| c[key] = value.clone()).unwrap_err();
            assert!(matches!(&error, ConfigError::Value { key: k, .. } if k == named), "{key} = {value}: {error}");
        }
        let error = read(&|c| c["id2label"] = json!({"0": "a", "2": "b"})).unwrap_err();
        assert!(matches!(&error, ConfigError::Missing { key, .. } if key == "id2label.1"), "{error}");
    }
}
