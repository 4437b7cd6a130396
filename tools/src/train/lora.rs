//! Low-rank factors beside a decoder's projections (LoRA, Hu et al. 2021), named and stored as PEFT does.

use super::checkpoint::write_atomically;
use super::parameters::{Plan, Treatment};
use anyhow::Context;
use candor::model::Adapter;
use candor::model::adapter::{self, AdapterError};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize};
use serde_json::json;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

/// A projection of a layer that factors can stand beside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Module {
    /// Queries.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
    /// The attention's output.
    Output,
    /// The gate of the feed-forward branch.
    Gate,
    /// Its up projection.
    Up,
    /// Its down projection.
    Down,
}

impl Module {
    /// All of them.
    pub const ALL: [Module; 7] =
        [Module::Query, Module::Key, Module::Value, Module::Output, Module::Gate, Module::Up, Module::Down];

    /// Its name as PEFT's `target_modules` has it.
    pub fn name(self) -> &'static str {
        match self {
            Module::Query => "q_proj",
            Module::Key => "k_proj",
            Module::Value => "v_proj",
            Module::Output => "o_proj",
            Module::Gate => "gate_proj",
            Module::Up => "up_proj",
            Module::Down => "down_proj",
        }
    }

    /// The module called so.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|module| module.name() == name)
    }

    fn path(self, layer: usize) -> String {
        let part = if matches!(self, Module::Gate | Module::Up | Module::Down) { "mlp" } else { "self_attn" };
        format!("model.layers.{layer}.{part}.{}", self.name())
    }
}

/// Which factors there are.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraSettings {
    /// Rank of each pair.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Scale by 1/√rank in place of 1/rank (Kalajdzievski 2023).
    pub stabilised: bool,
    /// Projections that get factors.
    pub modules: Vec<Module>,
}

/// The places of one projection's factors.
#[derive(Clone, Debug)]
pub struct Pair {
    /// `[rank, inputs]`
    pub a: Range<usize>,
    /// `[outputs, rank]`
    pub b: Range<usize>,
    /// Rank.
    pub rank: usize,
    /// Outputs.
    pub outputs: usize,
    /// First of the outputs within a merged projection.
    pub offset: usize,
}

/// All factors of a decoder.
#[derive(Clone)]
pub struct Lora {
    /// Settings.
    pub settings: LoraSettings,
    /// Which factor lies where, under PEFT's names.
    pub plan: Plan,
    /// The path of each module with its factors.
    modules: Vec<(String, Pair)>,
}

impl Lora {
    pub(super) fn new(settings: LoraSettings) -> Self {
        Lora { settings, plan: Plan::default(), modules: Vec::new() }
    }

    /// Adds the factors of a module, if the settings name it.
    pub(super) fn beside(
        &mut self,
        layer: usize,
        module: Module,
        inputs: usize,
        outputs: usize,
        offset: usize,
    ) -> Option<Pair> {
        if !self.settings.modules.contains(&module) {
            return None;
        }
        let (rank, path) = (self.settings.rank, module.path(layer));
        let treatment = Treatment { decay: true, rate: 1.0 };
        let mut add = |factor: &str, shape: [usize; 2]| {
            self.plan.add(format!("{}{path}.lora_{factor}.weight", adapter::PREFIX), &shape, treatment)
        };
        let (a, b) = (add("A", [rank, inputs]), add("B", [outputs, rank]));
        let pair = Pair { a, b, rank, outputs, offset };
        self.modules.push((path, pair.clone()));
        Some(pair)
    }

    /// Factor on B·A.
    pub fn scale(&self) -> f32 {
        adapter::scale(self.settings.alpha, self.settings.rank, self.settings.stabilised)
    }

    /// Starting values: A uniform within ±1/√inputs (Kaiming with √5, as PEFT has it), B zero.
    pub fn initial(&self, seed: u64) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut values = vec![0.0; self.plan.len()];
        for (_, Pair { a, rank, .. }) in &self.modules {
            let bound = (*rank as f32 / a.len() as f32).sqrt();
            values[a.clone()].iter_mut().for_each(|value| *value = rng.random_range(-bound..bound));
        }
        values
    }

    /// The factors for the runtime.
    pub fn adapter(&self, values: &[f32]) -> Result<Adapter, AdapterError> {
        let mut adapter = Adapter::in_memory("the adapter in training");
        for (path, Pair { a, b, rank, .. }) in &self.modules {
            adapter.insert(path, *rank, &values[a.clone()], &values[b.clone()], self.scale())?;
        }
        Ok(adapter)
    }

    /// Writes a PEFT folder: adapter_model.safetensors in f32 and adapter_config.json. Each file is replaced as a whole.
    pub fn write(&self, folder: &Path, values: &[f32], base: &str) -> anyhow::Result<()> {
        let entries = self.plan.entries();
        let bytes: Vec<Vec<u8>> = entries
            .iter()
            .map(|entry| values[entry.range.clone()].iter().flat_map(|value| value.to_le_bytes()).collect())
            .collect();
        let views: Result<Vec<_>, _> = entries
            .iter()
            .zip(&bytes)
            .map(|(entry, bytes)| {
                TensorView::new(Dtype::F32, entry.shape.clone(), bytes).map(|view| (entry.name.as_str(), view))
            })
            .collect();
        let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        std::fs::create_dir_all(folder).with_context(|| format!("{}", folder.display()))?;
        write_atomically(&folder.join(adapter::WEIGHTS_FILE), &serialize(views?, Some(about))?)?;
        let LoraSettings { rank, alpha, stabilised, modules } = &self.settings;
        let targets: Vec<&str> = modules.iter().map(|module| module.name()).collect();
        let config = json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
            "lora_alpha": alpha, "use_rslora": stabilised, "lora_dropout": 0.0, "bias": "none",
            "target_modules": targets, "modules_to_save": null, "fan_in_fan_out": false, "use_dora": false,
            "inference_mode": true, "init_lora_weights": true, "rank_pattern": {}, "alpha_pattern": {},
        });
        let text = format!("{}\n", serde_json::to_string_pretty(&config)?);
        Ok(write_atomically(&folder.join(adapter::CONFIG_FILE), text.as_bytes())?)
    }
}
