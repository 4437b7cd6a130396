//! Low-rank adapters of the decoder (LoRA, Hu et al. 2021) in PEFT's folder format: `adapter_config.json` and
//! `adapter_model.safetensors`. They stand beside the mapped weights and leave them as they are:
//! `y = W·x + scale · B·(A·x)`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candor_kernels::HostTensor;
use candor_kernels::tensor::TensorError;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::weights::{Checkpoint, WeightsError, read_text};

/// The two files of an adapter.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Its tensors.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// What PEFT puts before every module's name.
pub const PREFIX: &str = "base_model.model.";
/// The largest adapter_config.json that is read; real ones have 1 kB.
const CONFIG_LIMIT: u64 = 1_000_000;

/// Why an adapter cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// A file is absent or no sound safetensors file.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The configuration is not JSON.
    #[error("{}: {reason}", .file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// A setting that is absent, wrong, or not supported.
    #[error("{}: {key} is {value}; {expected}", .file.display())]
    Setting {
        /// The file.
        file: PathBuf,
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it must be.
        expected: &'static str,
    },
    /// A tensor whose name is not a LoRA factor of a decoder's layer.
    #[error("{}: {tensor} is no LoRA factor (base_model.model.MODULE.lora_A.weight or .lora_B.weight)", .file.display())]
    Name {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// One factor without the other.
    #[error("{}: {module} has one of lora_A and lora_B only", .file.display())]
    Half {
        /// The file.
        file: PathBuf,
        /// The module.
        module: String,
    },
    /// The factors have other shapes than rank and module ask for.
    #[error("{from}: {module}: lora_A {a:?} and lora_B {b:?} do not fit {reason}")]
    Shape {
        /// The file, or where the factors come from.
        from: String,
        /// The module.
        module: String,
        /// Shape of A.
        a: Vec<usize>,
        /// Shape of B.
        b: Vec<usize>,
        /// What they do not fit.
        reason: String,
    },
    /// A factor holds infinities or NaN.
    #[error("{from}: {module}: a factor holds a value that is not finite")]
    NotFinite {
        /// The file, or where the factors come from.
        from: String,
        /// The module.
        module: String,
    },
    /// The model has no such module.
    #[error("{from}: the model has no {module} that an adapter could stand beside; was it trained on another model?")]
    Module {
        /// The file, or where the factors come from.
        from: String,
        /// The module.
        module: String,
    },
    /// The file holds nothing.
    #[error("{}: no factors in it", .file.display())]
    Empty {
        /// The file.
        file: PathBuf,
    },
    /// Factors in memory that are no tensors.
    #[error("{module}: {source}")]
    Tensor {
        /// The module.
        module: String,
        /// What is wrong.
        source: TensorError,
    },
}

/// The factors of one linear layer.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// `[rank, in]`
    pub a: HostTensor,
    /// `[out, rank]`, the scale already in it.
    pub b: HostTensor,
}

impl LowRank {
    fn new(from: &str, module: &str, a: &HostTensor, b: &HostTensor, scale: f32) -> Result<Self, AdapterError> {
        let (&[rank, inputs], &[outputs, other]) = (a.shape(), b.shape()) else {
            return Err(shape_error(from, module, a, b, "matrices"));
        };
        if rank != other || rank == 0 {
            return Err(shape_error(from, module, a, b, "one rank"));
        }
        // Factors are small: they are kept in f32, and B takes the scale with it.
        let (left, mut right) = (a.to_f32(), b.to_f32());
        right.iter_mut().for_each(|value| *value *= scale);
        if !left.iter().chain(&right).all(|value| value.is_finite()) {
            return Err(AdapterError::NotFinite { from: from.into(), module: module.into() });
        }
        let tensor = |values: &[f32], shape: &[usize]| {
            HostTensor::from_f32(values, shape)
                .map_err(|source| AdapterError::Tensor { module: module.to_owned(), source })
        };
        Ok(LowRank { a: tensor(&left, &[rank, inputs])?, b: tensor(&right, &[outputs, rank])? })
    }

    /// Rank of the factors.
    pub fn rank(&self) -> usize {
        self.a.rows()
    }
}

fn shape_error(from: &str, module: &str, a: &HostTensor, b: &HostTensor, reason: &str) -> AdapterError {
    let (a, b) = (a.shape().to_vec(), b.shape().to_vec());
    AdapterError::Shape { from: from.into(), module: module.into(), a, b, reason: reason.into() }
}

/// Factors by the name of their module (`model.layers.0.self_attn.q_proj`), and whole tensors that stand in place of
/// the checkpoint's.
#[derive(Clone, Debug, Default)]
pub struct Adapter {
    from: String,
    /// sha256 of the weights' file; empty in memory.
    digest: String,
    factors: BTreeMap<String, LowRank>,
    replaced: BTreeMap<String, HostTensor>,
}

impl Adapter {
    /// Reads a folder as PEFT writes it for plain LoRA (rank-stabilised or not). What would change the result and is
    /// not supported is an error, never ignored.
    pub fn open(folder: &Path) -> Result<Self, AdapterError> {
        let config = Config::read(&folder.join(CONFIG_FILE))?;
        let file = folder.join(WEIGHTS_FILE);
        let checkpoint = Checkpoint::open_file(&file)?;
        let mut pairs: BTreeMap<String, [Option<HostTensor>; 2]> = BTreeMap::new();
        for name in checkpoint.names() {
            let inner = name.strip_prefix(PREFIX);
            let half = |suffix: &str| inner.and_then(|inner| inner.strip_suffix(suffix));
            let (module, place) = match (half(".lora_A.weight"), half(".lora_B.weight")) {
                (Some(module), _) => (module, 0),
                (_, Some(module)) => (module, 1),
                _ => return Err(AdapterError::Name { file, tensor: name.to_owned() }),
            };
            pairs.entry(module.to_owned()).or_default()[place] = Some(checkpoint.tensor(name)?);
        }
        if pairs.is_empty() {
            return Err(AdapterError::Empty { file });
        }
        let from = file.display().to_string();
        let mut factors = BTreeMap::new();
        for (module, pair) in pairs {
            let [Some(a), Some(b)] = pair else {
                return Err(AdapterError::Half { file, module });
            };
            let low_rank = LowRank::new(&from, &module, &a, &b, config.scale)?;
            if low_rank.rank() != config.rank {
                return Err(shape_error(&from, &module, &a, &b, &format!("r = {} of {CONFIG_FILE}", config.rank)));
            }
            factors.insert(module, low_rank);
        }
        let digest = sha256(&file)?;
        Ok(Adapter { from, digest, factors, replaced: BTreeMap::new() })
    }

    /// No factors yet, for a trainer that keeps them in memory; `from` stands in errors.
    pub fn in_memory(from: impl Into<String>) -> Self {
        Adapter { from: from.into(), ..Adapter::default() }
    }

    /// Adds a module's factors: a `[rank, in]`, b `[out, rank]`.
    pub fn insert(&mut self, module: &str, rank: usize, a: &[f32], b: &[f32], scale: f32) -> Result<(), AdapterError> {
        let rank = rank.max(1);
        let tensor = |values: &[f32], shape: &[usize]| {
            HostTensor::from_f32(values, shape)
                .map_err(|source| AdapterError::Tensor { module: module.to_owned(), source })
        };
        let (a, b) = (tensor(a, &[rank, a.len() / rank])?, tensor(b, &[b.len() / rank, rank])?);
        self.factors.insert(module.to_owned(), LowRank::new(&self.from, module, &a, &b, scale)?);
        Ok(())
    }

    /// Puts a whole tensor of the decoder, by its name in the checkpoint, in place of the checkpoint's.
    pub fn replace(&mut self, name: &str, shape: &[usize], values: &[f32]) -> Result<(), AdapterError> {
        let tensor = HostTensor::from_f32(values, shape)
            .map_err(|source| AdapterError::Tensor { module: name.to_owned(), source })?;
        self.replaced.insert(name.to_owned(), tensor);
        Ok(())
    }

    /// sha256 of the file of its weights, in lower-case hexadecimal; empty where it was never in a file.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Where it comes from, for messages.
    pub fn from(&self) -> &str {
        &self.from
    }

    /// The factors, by the name of their module.
    pub fn factors(&self) -> impl Iterator<Item = (&str, &LowRank)> {
        self.factors.iter().map(|(module, low_rank)| (module.as_str(), low_rank))
    }

    /// The factors beside a linear layer `[outputs, inputs]`.
    pub(super) fn beside(&self, module: &str, inputs: usize, outputs: usize) -> Result<Option<&LowRank>, AdapterError> {
        let Some(low_rank) = self.factors.get(module) else { return Ok(None) };
        if (low_rank.a.row_len(), low_rank.b.rows()) != (inputs, outputs) {
            let reason = format!("the layer of {outputs} outputs and {inputs} inputs");
            return Err(shape_error(&self.from, module, &low_rank.a, &low_rank.b, &reason));
        }
        Ok(Some(low_rank))
    }

    /// The tensor in place of the checkpoint's.
    pub(super) fn replacement(&self, name: &str) -> Option<&HostTensor> {
        self.replaced.get(name)
    }

    /// Refuses factors and tensors that are not among the modules of the model.
    pub(super) fn finish(&self, known: impl Fn(&str) -> bool) -> Result<(), AdapterError> {
        match self.factors.keys().chain(self.replaced.keys()).find(|module| !known(module)) {
            Some(module) => Err(AdapterError::Module { from: self.from.clone(), module: module.clone() }),
            None => Ok(()),
        }
    }
}

fn sha256(file: &Path) -> Result<String, AdapterError> {
    let bytes = std::fs::read(file).map_err(|source| WeightsError::Io { file: file.to_owned(), source })?;
    Ok(Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect())
}

/// What adapter_config.json decides.
struct Config {
    rank: usize,
    scale: f32,
}

impl Config {
    fn read(file: &Path) -> Result<Self, AdapterError> {
        let text = read_text(file, CONFIG_LIMIT)?;
        let json = |reason: String| AdapterError::Json { file: file.to_owned(), reason };
        let value: Value = serde_json::from_slice(&text).map_err(|e| json(e.to_string()))?;
        let values = value.as_object().ok_or_else(|| json("no JSON object".into()))?;
        let wrong = |key: &'static str, expected: &'static str| AdapterError::Setting {
            file: file.to_owned(),
            key,
            value: values.get(key).map_or_else(|| "absent".into(), |v| v.to_string().chars().take(80).collect()),
            expected,
        };
        if values.get("peft_type").and_then(Value::as_str) != Some("LORA") {
            return Err(wrong("peft_type", "only \"LORA\" is supported"));
        }
        for key in ["use_dora", "fan_in_fan_out", "lora_bias", "alora_invocation_tokens", "use_qalora"] {
            if !is_unset(values, key) {
                return Err(wrong(key, "it changes what is computed and is not supported; train without it"));
            }
        }
        for key in ["modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices", "target_parameters"]
        {
            if !is_unset(values, key) {
                return Err(wrong(key, "it is not supported; fold the adapter in with its own tools, or leave it out"));
            }
        }
        if !matches!(values.get("bias").and_then(Value::as_str), None | Some("none")) {
            return Err(wrong("bias", "only \"none\" is supported"));
        }
        let rank = values.get("r").and_then(Value::as_u64).filter(|r| (1..=65_536).contains(r));
        let rank = rank.ok_or_else(|| wrong("r", "it must be a whole number from 1 to 65536"))? as usize;
        let alpha = values.get("lora_alpha").and_then(Value::as_f64).filter(|alpha| alpha.is_finite());
        let alpha = alpha.ok_or_else(|| wrong("lora_alpha", "it must be a number"))?;
        let stabilised = match values.get("use_rslora") {
            None | Some(Value::Null) => false,
            Some(value) => value.as_bool().ok_or_else(|| wrong("use_rslora", "it must be true or false"))?,
        };
        Ok(Config { rank, scale: scale(alpha, rank, stabilised) })
    }
}

/// Factor on B·A: alpha / r, or alpha / √r where it is rank-stabilised (Kalajdzievski 2023).
pub fn scale(alpha: f64, rank: usize, stabilised: bool) -> f32 {
    let rank = rank as f64;
    (alpha / if stabilised { rank.sqrt() } else { rank }) as f32
}

/// Whether a setting is as if it were not there.
fn is_unset(values: &Map<String, Value>, key: &str) -> bool {
    match values.get(key) {
        None | Some(Value::Null | Value::Bool(false)) => true,
        Some(Value::Array(list)) => list.is_empty(),
        Some(Value::Object(map)) => map.is_empty(),
        Some(_) => false,
    }
}
