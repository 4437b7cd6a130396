//! Writes the quantised folder, tensor by tensor, beside its place, and moves it there when it is whole.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::Value;

use super::format;
use super::plan::{Entry, Source, Storage};
use super::stored::{Integers, Stored};
use crate::folder;
use crate::tensor_file::TensorFile;

/// What a published checkpoint in shards has beside them; the copy is one file.
const INDEX: &str = "model.safetensors.index.json";
/// Keys of config.json that name a tower's folder by a path from the model's.
const TOWERS: [&str; 3] = ["mm_vision_tower", "mm_audio_tower", "mm_bert_model"];

/// Writes the folder. `round` gives the whole numbers of a matrix of these values. Returns the size of the weights'
/// file.
pub(super) fn write(
    source: &Source,
    plan: &[Entry],
    output: &Path,
    mut round: impl FnMut(&Entry, &[f32]) -> anyhow::Result<Integers>,
) -> anyhow::Result<u64> {
    folder::check_empty(output, "--output")?;
    let part = beside(output)?;
    let failed = |path: &Path| format!("{}", path.display());
    if part.exists() {
        std::fs::remove_dir_all(&part).with_context(|| failed(&part))?;
    }
    std::fs::create_dir_all(&part).with_context(|| failed(&part))?;
    let written = write_part(source, plan, &part, output, &mut round);
    let moved = written.and_then(|written| {
        if output.exists() {
            std::fs::remove_dir(output).with_context(|| failed(output))?;
        }
        std::fs::rename(&part, output).with_context(|| failed(output))?;
        Ok(written)
    });
    if moved.is_err() {
        // What is left of it is of no use. That this may fail too changes nothing.
        let _ = std::fs::remove_dir_all(&part);
    }
    moved
}

/// The place where a folder is written.
fn beside(output: &Path) -> anyhow::Result<PathBuf> {
    let name = output.file_name().with_context(|| format!("--output {} names no folder", output.display()))?;
    let mut part = OsString::from(".");
    part.push(name);
    part.push(".part");
    Ok(output.with_file_name(part))
}

fn write_part(
    source: &Source,
    plan: &[Entry],
    part: &Path,
    output: &Path,
    round: &mut impl FnMut(&Entry, &[f32]) -> anyhow::Result<Integers>,
) -> anyhow::Result<u64> {
    let mut replaced: Vec<PathBuf> = source.checkpoint.files().map(Path::to_path_buf).collect();
    replaced.extend([source.folder.join(INDEX), source.folder.join("config.json")]);
    folder::copy_files(&source.folder, part, &replaced)?;
    let config = config(source, plan)?;
    let text = format!("{}\n", serde_json::to_string_pretty(&config)?);
    let path = part.join("config.json");
    std::fs::write(&path, text).with_context(|| format!("{}", path.display()))?;

    let tensors = plan.iter().flat_map(Entry::declared).collect();
    let mut file = TensorFile::create(&part.join("model.safetensors"), tensors)?;
    for entry in plan {
        match entry.storage {
            Storage::Same(_) => file.write(&entry.name, source.checkpoint.raw(&entry.name)?.bytes)?,
            Storage::F16 => file.write(&entry.name, &source.halves(&entry.name)?)?,
            Storage::Integers(_) => {
                let values = source.values(&entry.name)?;
                let integers = round(entry, &values)?;
                for record in Stored::Integers(integers).records(&entry.name, &entry.shape) {
                    file.write(&record.name, &record.bytes)?;
                }
            }
        }
    }
    let bytes = file.finish()?;
    folder::copy_manifest(&source.folder, part, output)?;
    Ok(bytes)
}

/// config.json with the formats of this plan.
fn config(source: &Source, plan: &[Entry]) -> anyhow::Result<Value> {
    let mut config = source.config.clone();
    let fields = config.as_object_mut().context("config.json is no object")?;
    let modules = plan.iter().filter(|entry| entry.matrix).map(|entry| (entry.module(), entry.scheme()));
    match format::config_of(modules) {
        Some(quantisation) => drop(fields.insert("quantization_config".to_owned(), quantisation)),
        None => drop(fields.shift_remove("quantization_config")),
    }
    // The folder of a tower that does not lie in the model's is not copied; its path is to lead there all the same.
    for key in TOWERS {
        let Some(named) = fields.get(key).and_then(Value::as_str).filter(|named| !named.is_empty()) else { continue };
        let Ok(tower) = source.folder.join(named).canonicalize() else { continue };
        if !source.folder.canonicalize().is_ok_and(|folder| tower.starts_with(folder)) {
            let tower = tower.to_str().with_context(|| format!("{} is no UTF-8", tower.display()))?;
            fields.insert(key.to_owned(), tower.into());
        }
    }
    Ok(config)
}
