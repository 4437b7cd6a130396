//! What a model says of a few fixed prompts before and after training.

use super::Run;
use crate::train::checkpoint::write_atomically;
use crate::train::policy::Policy;
use candor_kernels::Device;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Samples before the first step.
pub(super) const BEFORE: &str = "samples-before.json";
/// Samples after the last.
pub(super) const AFTER: &str = "samples-after.json";
/// Prompts that are asked.
const PROMPTS: usize = 12;
/// Seed of the samples.
const SEED: u64 = 77;

/// One completion with its rewards.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Sample {
    pub(super) id: String,
    pub(super) label: String,
    pub(super) completion: String,
    pub(super) format: f32,
    pub(super) accuracy: f32,
    pub(super) explanation: f32,
}

/// Draws and writes them. The prompts are spread over the data.
pub(super) fn write<D: Device>(run: &mut Run<'_, D>, policy: &Policy, path: &Path) -> anyhow::Result<()> {
    let all = run.data.items.len();
    let count = PROMPTS.min(all);
    let items: Vec<usize> = (0..count).map(|i| i * all / count).collect();
    let shares = run.roll_out(policy, &items, SEED)?;
    let samples: Vec<Sample> = shares
        .iter()
        .flatten()
        .filter_map(|group| {
            let (item, reward) = (&run.data.items[group.item], group.rewards.first()?);
            Some(Sample {
                id: item.id.clone(),
                label: item.label.clone(),
                completion: group.texts.first()?.clone(),
                format: reward.format,
                accuracy: reward.accuracy,
                explanation: reward.explanation,
            })
        })
        .collect();
    Ok(write_atomically(path, serde_json::to_string_pretty(&samples)?.as_bytes())?)
}

/// Reads them back; none where there are none yet.
pub(super) fn read(path: &Path) -> Vec<Sample> {
    std::fs::read_to_string(path).ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
}
