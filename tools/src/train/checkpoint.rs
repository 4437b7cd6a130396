//! A training's state on disk: parameters, optimiser moments and the step, in one file that is replaced as a whole,
//! so that a run cut off at any moment goes on from the last one to the same result.

use super::optimiser::AdamW;
use candle_core::Tensor;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Why a state could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The file system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is no state of this training.
    #[error(
        "{path} is no state of this training ({reason}); remove it to start anew, or use the arguments it was made with"
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
}

/// Writes `bytes` to `path` so that a reader sees the old file or the new one, never a part.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let part = path.with_extension("part");
    let fail = |source| CheckpointError::Io { path: path.into(), source };
    let mut file = File::create(&part).map_err(fail)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(fail)?;
    fs::rename(&part, path).map_err(fail)
}

/// Writes the state; `recipe` names the arguments that decide the result.
pub fn save(path: &Path, recipe: &str, values: &[f32], optimiser: &AdamW) -> Result<(), CheckpointError> {
    let bytes = [values, &optimiser.first, &optimiser.second].map(|slice| {
        let bytes: Vec<u8> = slice.iter().flat_map(|value| value.to_le_bytes()).collect();
        bytes
    });
    let foreign =
        |error: safetensors::SafeTensorError| CheckpointError::Foreign { path: path.into(), reason: error.to_string() };
    let mut views = Vec::new();
    for (name, data) in ["values", "first", "second"].into_iter().zip(&bytes) {
        views.push((name, TensorView::new(Dtype::F32, vec![data.len() / 4], data).map_err(foreign)?));
    }
    let about = HashMap::from([("recipe".into(), recipe.into()), ("steps".into(), optimiser.steps.to_string())]);
    write_atomically(path, &safetensors::serialize(views, Some(about)).map_err(foreign)?)
}

/// Reads a state that [`save`] wrote with the same recipe. Returns `false` when there is none.
pub fn resume(path: &Path, recipe: &str, values: &mut [f32], optimiser: &mut AdamW) -> Result<bool, CheckpointError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(CheckpointError::Io { path: path.into(), source }),
    };
    let foreign = |reason: String| CheckpointError::Foreign { path: path.into(), reason };
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| foreign(error.to_string()))?;
    let about = header.metadata().as_ref().ok_or_else(|| foreign("it has no description".into()))?;
    let written = about.get("recipe").map_or("", String::as_str);
    if written != recipe {
        return Err(foreign(format!("it was made with {written:?}, this run has {recipe:?}")));
    }
    let steps = about.get("steps").and_then(|steps| steps.parse().ok());
    let steps = steps.ok_or_else(|| foreign("it has no step".into()))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| foreign(error.to_string()))?;
    for (name, slice) in
        [("values", values), ("first", &mut optimiser.first[..]), ("second", &mut optimiser.second[..])]
    {
        let tensor = tensors.tensor(name).map_err(|error| foreign(error.to_string()))?;
        if tensor.dtype() != Dtype::F32 || tensor.data().len() != slice.len() * 4 {
            return Err(foreign(format!("{name} is not {} numbers", slice.len())));
        }
        for (value, bytes) in slice.iter_mut().zip(tensor.data().as_chunks::<4>().0) {
            *value = f32::from_le_bytes(*bytes);
        }
    }
    optimiser.steps = steps;
    Ok(true)
}

/// Writes tensors as a safetensors file, as a whole.
pub fn write_tensors(path: &Path, tensors: &HashMap<String, Tensor>) -> anyhow::Result<()> {
    let part = path.with_extension("part");
    candle_core::safetensors::save(tensors, &part)?;
    fs::rename(&part, path)?;
    Ok(())
}
