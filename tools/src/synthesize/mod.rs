//! `candor-tools synthesize`: a model folder of a published size with random weights. Speed and memory do not depend on
//! the values, so they can be measured where the real weights may not be.
//!
//! The preset is a config.json (`preset`); what a folder with it must hold is listed (`layout`), each tensor laid
//! down as asked for (`storage`), and the file filled from a seed, tensor by tensor (`file`).

mod file;
mod layout;
mod preset;
mod storage;
#[cfg(test)]
pub(crate) mod tests;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use candor::manifest::{self, Manifest, ModelSection};
use candor::message::say;
use candor::model::config::{ClassifierConfig, ModelConfig};
use serde_json::Value;

use layout::Part;
use preset::Preset;
use storage::{Storage, Weights};

use crate::quantize::INT4_GROUP;
use crate::quantize::format::Group;

/// `candor-tools synthesize`
#[derive(clap::Args)]
pub struct SynthesizeArgs {
    /// The model whose sizes to take.
    #[arg(long)]
    preset: Preset,
    /// How the matrices of linear layers are stored.
    #[arg(long)]
    weights: Weights,
    /// Values that share a scale: 32, 64, 128, or row for a whole row. If not given, 32 for int4 and row for int8.
    #[arg(long, value_parser = Group::parse)]
    group: Option<Group>,
    /// How the embedding table, which is the output head too, is stored; int8 if not given and --weights is int8 or int4.
    #[arg(long)]
    head: Option<Weights>,
    /// Parts that --weights is for, parted by commas; the others' layers are f16. All if not given.
    #[arg(long, value_delimiter = ',', value_name = "PARTS")]
    parts: Vec<Part>,
    /// Add the audio tower, Whisper-large-v3's encoder.
    #[arg(long)]
    audio: bool,
    /// Where the random values start from: the same seed gives the same files.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Folder to write; it must not exist, or be empty.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
}

/// Runs `candor-tools synthesize`.
pub fn run(args: &SynthesizeArgs) -> anyhow::Result<()> {
    let storage = args.storage()?;
    let config = args.preset.config(args.audio)?;
    let bytes = write(&args.output, args.preset.name(), config, &storage, args.seed)?;
    say(format_args!("{}: {:.1} MB of random weights", args.output.display(), bytes as f64 / 1e6))?;
    Ok(())
}

impl SynthesizeArgs {
    fn storage(&self) -> anyhow::Result<Storage> {
        let scaled = matches!(self.weights, Weights::Int8 | Weights::Int4);
        let group = match (self.group, self.weights) {
            (Some(_), Weights::F32 | Weights::F16) => {
                bail!("--group is for int8 and int4; leave it out, or change --weights")
            }
            (Some(group), _) => group,
            (None, Weights::Int4) => INT4_GROUP,
            _ => Group::Row,
        };
        if self.parts.contains(&Part::Audio) && !self.audio {
            bail!("--parts names audio, but without --audio the model has no audio tower");
        }
        let head = self.head.unwrap_or(if scaled { Weights::Int8 } else { self.weights });
        Ok(Storage { weights: self.weights, group, head, parts: self.parts.clone() })
    }
}

/// Writes the folder and returns the size of its weights in bytes.
fn write(folder: &Path, name: &str, mut config: Value, storage: &Storage, seed: u64) -> anyhow::Result<u64> {
    crate::folder::check_empty(folder, "--output")?;
    std::fs::create_dir_all(folder).with_context(|| format!("{}", folder.display()))?;
    if let Some(quantisation) = storage.config() {
        config["quantization_config"] = quantisation;
    }
    let path = folder.join("config.json");
    let text = format!("{}\n", serde_json::to_string_pretty(&config)?);
    std::fs::write(&path, text).with_context(|| format!("{}", path.display()))?;
    // What a folder must hold follows from the sizes as the runtime reads them.
    let entries = match config["model_type"] == preset::CLASSIFIER {
        true => layout::classifier(&ClassifierConfig::read(folder)?),
        false => layout::model(&ModelConfig::read(folder)?),
    };
    let records = entries.iter().flat_map(|entry| storage.records(entry)).collect();
    let bytes = file::write(&folder.join("model.safetensors"), records, seed)?;
    let mut manifest = Manifest::default();
    manifest.model = ModelSection {
        name: format!("{name} with random weights"),
        version: "0".into(),
        licence: "random numbers, free of any; they know nothing".into(),
        ..ModelSection::default()
    };
    let path = folder.join(manifest::FILE_NAME);
    std::fs::write(&path, toml::to_string_pretty(&manifest)?).with_context(|| format!("{}", path.display()))?;
    Ok(bytes)
}
