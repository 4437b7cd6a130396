//! What a model folder holds, and how each tensor of it is to be stored.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use candor::model::config::ClassifierConfig;
use candor::model::{Classifier, Model, ModelConfig};
use candor::weights::Checkpoint;
use candor_kernels::cpu::CpuDevice;
use half::f16;
use safetensors::Dtype;
use serde_json::Value;

use super::format::Scheme;
use super::keep::{Rules, TABLE};
use super::stored::{declared, is_linear};
use crate::tensor_file::Declared;

/// What a folder holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A model that sees.
    Model,
    /// A verifier.
    Verifier,
}

/// A model folder that is read.
pub(super) struct Source {
    pub(super) folder: PathBuf,
    pub(super) kind: Kind,
    pub(super) checkpoint: Checkpoint,
    /// config.json.
    pub(super) config: Value,
    /// Whether the embedding table is the output head too.
    tied: bool,
}

/// A tensor of the folder, and how it is to be stored.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) storage: Storage,
    /// Whether it is the matrix of a module that `quantization_config` could name.
    pub(super) matrix: bool,
}

/// How a tensor is stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Storage {
    /// As in the source.
    Same(Dtype),
    /// Rounded to f16.
    F16,
    /// As whole numbers with scales.
    Integers(Scheme),
}

impl Source {
    /// Opens a folder and checks that the runtime does.
    pub(super) fn open(folder: &Path) -> anyhow::Result<Source> {
        let path = folder.join("config.json");
        let text = std::fs::read(&path).with_context(|| format!("{}", path.display()))?;
        let config: Value = serde_json::from_slice(&text).with_context(|| format!("{}", path.display()))?;
        let device = CpuDevice::new(Some(1));
        let kind = match config["model_type"].as_str() {
            Some("bert" | "roberta") => Kind::Verifier,
            _ => Kind::Model,
        };
        let tied = match kind {
            Kind::Verifier => {
                ClassifierConfig::read(folder)?;
                Classifier::open(folder, device)?;
                false
            }
            Kind::Model => {
                Model::open(folder, device)?;
                ModelConfig::read(folder)?.decoder.tied
            }
        };
        Ok(Source { folder: folder.to_owned(), kind, checkpoint: Checkpoint::open(folder)?, config, tied })
    }

    /// Whether anything in it is stored as whole numbers, which have been rounded already.
    pub(super) fn is_quantised(&self) -> bool {
        self.names().any(|name| self.checkpoint.tensor(name).is_ok_and(|tensor| tensor.dtype().is_scaled()))
    }

    /// Every tensor but scales, which are read with what they scale.
    fn names(&self) -> impl Iterator<Item = &str> + Clone {
        let names: Vec<&str> = self.checkpoint.names().collect();
        let is_scale = |name: &str| {
            let scaled = |weight| self.checkpoint.tensor(weight).is_ok_and(|tensor| tensor.dtype().is_scaled());
            name.strip_suffix("_scale").is_some_and(scaled)
        };
        names.into_iter().filter(move |name| !is_scale(name))
    }

    /// How every tensor is to be stored.
    pub(super) fn plan(&self, rules: &Rules) -> anyhow::Result<Vec<Entry>> {
        rules.check(self.names(), self.tied)?;
        let entry = |name: &str| -> anyhow::Result<Entry> {
            let raw = self.checkpoint.raw(name)?;
            let linear = is_linear(name, raw.shape);
            let storage = match (rules.of(name, linear, self.tied), raw.dtype) {
                (Some(scheme), _) => Storage::Integers(scheme.fitting(raw.shape[1])),
                (None, "F32" | "I8" | "I4") => Storage::F16,
                (None, other) => Storage::Same(dtype(name, other)?),
            };
            let matrix =
                raw.shape.len() == 2 && name.ends_with(".weight") && (name == TABLE || !name.contains("embed"));
            Ok(Entry { name: name.to_owned(), shape: raw.shape.to_vec(), storage, matrix })
        };
        self.names().map(entry).collect()
    }

    /// The values of a tensor, all of them finite.
    pub(super) fn values(&self, name: &str) -> anyhow::Result<Vec<f32>> {
        let values = self.checkpoint.tensor(name)?.to_f32();
        let wrong = values.iter().position(|value| !value.is_finite());
        if let Some(index) = wrong {
            let file = self.checkpoint.file_of(name).display();
            anyhow::bail!("{file}: element {index} of {name} is {}; only finite numbers can be stored", values[index]);
        }
        Ok(values)
    }

    /// The bytes of a tensor in f16.
    pub(super) fn halves(&self, name: &str) -> anyhow::Result<Vec<u8>> {
        let values = self.values(name)?;
        let most = values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        ensure!(f16::from_f32(most).is_finite(), "{name} has the value {most}, which is too large for f16");
        Ok(values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect())
    }
}

fn dtype(name: &str, text: &str) -> anyhow::Result<Dtype> {
    let parsed = serde_json::from_value(Value::from(text));
    parsed.with_context(|| format!("{name} is of type {text}, which cannot be copied"))
}

impl Entry {
    /// The tensors that it will be in the file.
    pub(super) fn declared(&self) -> Vec<Declared> {
        let one = |dtype| vec![Declared { name: self.name.clone(), dtype, shape: self.shape.clone() }];
        match self.storage {
            Storage::Same(dtype) => one(dtype),
            Storage::F16 => one(Dtype::F16),
            Storage::Integers(scheme) => {
                let declared = declared(&self.name, self.shape[0], self.shape[1], scheme).into_iter();
                declared.map(|(name, dtype, shape)| Declared { name, dtype, shape }).collect()
            }
        }
    }

    /// The format, where it is one of whole numbers.
    pub(super) fn scheme(&self) -> Option<Scheme> {
        match self.storage {
            Storage::Integers(scheme) => Some(scheme),
            _ => None,
        }
    }

    /// The module that the matrix is of.
    pub(super) fn module(&self) -> &str {
        self.name.strip_suffix(".weight").unwrap_or(&self.name)
    }
}
