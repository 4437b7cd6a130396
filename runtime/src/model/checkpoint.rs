//! Where each part of a model lies: inside the checkpoint, or in a folder with the original tower.
//!
//! A tower inside the checkpoint is the one that was tuned with the decoder, so it wins over a folder.

use std::path::Path;

use super::ModelError;
use super::config::ModelConfig;
use crate::weights::{Checkpoint, Inventory, WeightsError};

pub(super) const VISION: &str = "model.vision_tower.vision_tower.vision_model.";
pub(super) const AUDIO: &str = "model.audio_tower.audio_tower.encoder.";
pub(super) const BERT: &str = "model.bert_model.";

/// How a folder's weights are opened.
pub(super) type OpenCheckpoint = fn(&Path) -> Result<Checkpoint, WeightsError>;

/// Opened files of a tower that is not in the checkpoint, and where in them it lies.
pub(super) struct Tower {
    pub(super) checkpoint: Checkpoint,
    pub(super) prefix: &'static str,
}

impl Tower {
    /// Opens the tower's folder if the checkpoint has nothing under `inside`. The prefix is the first of `prefixes`
    /// under which the folder has tensors.
    pub(super) fn find(
        main: &Checkpoint,
        inside: &str,
        folder: Option<&Path>,
        prefixes: &[&'static str],
        open: OpenCheckpoint,
    ) -> Result<Option<Self>, ModelError> {
        if main.any_under(inside) {
            return Ok(None);
        }
        let Some(folder) = folder else {
            let tensor = format!("{inside}*");
            return Err(WeightsError::Missing { folder: main.folder().to_owned(), tensor }.into());
        };
        let checkpoint = open(folder)?;
        let prefix = prefixes.iter().find(|p| checkpoint.any_under(p)).copied().unwrap_or_default();
        Ok(Some(Tower { checkpoint, prefix }))
    }
}

/// Refuses tensors of the checkpoint that no stage has read, but for those known to be of no use.
pub(super) fn finish_main(inventory: &Inventory<'_>, config: &ModelConfig) -> Result<(), WeightsError> {
    inventory.finish(|name| {
        let rotary = name.strip_prefix("model.layers.").is_some_and(|n| n.ends_with(".rotary_emb.inv_freq"));
        rotary
            || config.decoder.tied && name == "lm_head.weight"
            || name.strip_prefix(VISION).is_some_and(|n| unneeded_vision(n, config))
            || name.strip_prefix(BERT).is_some_and(unneeded_bert)
    })
}

/// As [`finish_main`], for the folder of an original tower: a whole model's other half may lie there too.
pub(super) fn finish_tower(inventory: &Inventory<'_>, tower: &Tower, config: &ModelConfig) -> Result<(), WeightsError> {
    inventory.finish(|name| {
        if let Some(inside) = name.strip_prefix(tower.prefix)
            && (unneeded_vision(inside, config) || unneeded_bert(inside))
        {
            return true;
        }
        const OTHER_HALVES: [&str; 7] =
            ["text_model.", "logit_scale", "logit_bias", "model.decoder.", "decoder.", "proj_out.", "cls."];
        OTHER_HALVES.iter().any(|other| name.starts_with(other))
    })
}

/// The tower's own pooling head, and what lies behind the selected layer.
fn unneeded_vision(name: &str, config: &ModelConfig) -> bool {
    let layer = name.strip_prefix("encoder.layers.").and_then(|n| n.split('.').next()).and_then(|n| n.parse().ok());
    name.starts_with("head.")
        || name.starts_with("post_layernorm.")
        || name == "embeddings.position_ids"
        || layer.is_some_and(|i: usize| (config.vision.used_layers..config.vision.layers).contains(&i))
}

fn unneeded_bert(name: &str) -> bool {
    name.starts_with("pooler.") || name == "embeddings.position_ids"
}
