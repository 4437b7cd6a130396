//! A training's state on disk: parameters, optimiser moments and the step, in one file that is replaced as a whole,
//! so that a run cut off at any moment goes on from the last one to the same result.

use super::optimiser::AdamW;
use candle_core::Tensor;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Why a state could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The file system refused.
    #[error("cannot read or write {path}: {source}")]
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
    replace(path, |part| fs::write(part, bytes)).map_err(|source| CheckpointError::Io { path: path.into(), source })
}

/// Lets a file be written under another name, and gives it its own when it is whole and on the disk.
fn replace(path: &Path, write: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let part = path.with_extension("part");
    let written = write(&part)
        .and_then(|()| File::options().write(true).open(&part)?.sync_all())
        .and_then(|()| fs::rename(&part, path));
    match (&written, path.parent()) {
        // A full disk must not be left fuller. That this may fail too changes nothing.
        (Err(_), _) => drop(fs::remove_file(&part)),
        // The new name is on the disk when the folder is; not every system can be asked for that.
        (Ok(()), Some(folder)) => drop(File::open(folder).and_then(|folder| folder.sync_all())),
        (Ok(()), None) => {}
    }
    written
}

/// A header is a few hundred bytes long.
const MOST_HEADER: u64 = 1 << 20;
/// Numbers that are turned into bytes, or back, at a time.
const PIECE: usize = 1 << 14;

/// Writes the state; `recipe` names the arguments that decide the result.
pub fn save(path: &Path, recipe: &str, values: &[f32], optimiser: &AdamW) -> Result<(), CheckpointError> {
    // A safetensors file is its header's length, the header and the numbers. Written here piece by piece: a copy of all
    // of them would make the peak of memory.
    let tensors = [("values", values), ("first", &optimiser.first), ("second", &optimiser.second)];
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"recipe": recipe, "steps": optimiser.steps.to_string()}));
    let mut end = 0;
    for (name, numbers) in tensors {
        let start = end;
        end += 4 * numbers.len();
        header.insert(name.into(), json!({"dtype": "F32", "shape": [numbers.len()], "data_offsets": [start, end]}));
    }
    let mut header = Value::Object(header).to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let write = |part: &Path| {
        let mut file = BufWriter::new(File::create(part)?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        for piece in tensors.iter().flat_map(|(_, numbers)| numbers.chunks(PIECE)) {
            let bytes: Vec<u8> = piece.iter().flat_map(|value| value.to_le_bytes()).collect();
            file.write_all(&bytes)?;
        }
        file.flush()
    };
    replace(path, write).map_err(|source| CheckpointError::Io { path: path.into(), source })
}

/// Reads a state that [`save`] wrote with the same recipe. Returns `false` when there is none.
pub fn resume(path: &Path, recipe: &str, values: &mut [f32], optimiser: &mut AdamW) -> Result<bool, CheckpointError> {
    let io = |source| CheckpointError::Io { path: path.into(), source };
    let mut file = match File::open(path) {
        Ok(file) => BufReader::new(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(io(error)),
    };
    let foreign = |reason: String| CheckpointError::Foreign { path: path.into(), reason };
    let length = file.get_ref().metadata().map_err(io)?.len();
    let mut start = [0; 8];
    let short = |_| foreign("it is too short".into());
    file.read_exact(&mut start).map_err(short)?;
    let (header_length, body) = (u64::from_le_bytes(start), length.saturating_sub(8));
    if header_length > body.min(MOST_HEADER) {
        return Err(foreign("it has no header".into()));
    }
    let mut header = vec![0; header_length as usize];
    file.read_exact(&mut header).map_err(short)?;
    let header: Map<String, Value> = serde_json::from_slice(&header).map_err(|error| foreign(error.to_string()))?;
    let about = |key: &str| header.get("__metadata__").and_then(|about| about.get(key)?.as_str());
    let written = about("recipe").ok_or_else(|| foreign("it has no description".into()))?;
    if written != recipe {
        return Err(foreign(format!("it was made with {written:?}, this run has {recipe:?}")));
    }
    let steps = about("steps").and_then(|steps| steps.parse().ok());
    let steps = steps.ok_or_else(|| foreign("it has no step".into()))?;
    let tensors = [("values", values), ("first", &mut optimiser.first[..]), ("second", &mut optimiser.second[..])];
    if body - header_length != tensors.iter().map(|(_, slice)| 4 * slice.len() as u64).sum::<u64>() {
        return Err(foreign("it is cut off, or of other sizes".into()));
    }
    for (name, slice) in tensors {
        let info = header.get(name).ok_or_else(|| foreign(format!("it has no {name}")))?;
        let offset = |index: usize| info.get("data_offsets").and_then(|offsets| offsets.get(index)?.as_u64());
        let (begin, end) = (offset(0).unwrap_or(u64::MAX), offset(1).unwrap_or(0));
        let long = 4 * slice.len() as u64;
        if info.get("dtype").and_then(Value::as_str) != Some("F32") || end.checked_sub(begin) != Some(long) {
            return Err(foreign(format!("{name} is not {} numbers", slice.len())));
        }
        file.seek(SeekFrom::Start(8 + header_length + begin)).map_err(io)?;
        let mut bytes = vec![0; 4 * PIECE];
        for piece in slice.chunks_mut(PIECE) {
            let bytes = &mut bytes[..4 * piece.len()];
            file.read_exact(bytes).map_err(short)?;
            for (value, bytes) in piece.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
    }
    optimiser.steps = steps;
    Ok(true)
}

/// Writes tensors as a safetensors file, as a whole.
pub fn write_tensors(path: &Path, tensors: &HashMap<String, Tensor>) -> anyhow::Result<()> {
    let write = |part: &Path| candle_core::safetensors::save(tensors, part).map_err(io::Error::other);
    Ok(replace(path, write).map_err(|source| CheckpointError::Io { path: path.into(), source })?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::train::parameters::{Plan, Treatment};

    #[test]
    fn a_state_comes_back_and_damage_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        let mut plan = Plan::default();
        plan.add("w", &[5], Treatment { decay: true, rate: 1.0 });
        let mut optimiser = AdamW::new(&plan, 0.0);
        let mut values = vec![0.5, -1.0, 2.0, f32::MIN_POSITIVE, -0.0];
        for _ in 0..3 {
            optimiser.step(&mut values, &mut [vec![1.0, -2.0, 0.5, 0.0, 1e-20]], 0.1, 1.0);
        }
        save(&path, "recipe", &values, &optimiser).unwrap();
        let (mut other, mut read) = (AdamW::new(&plan, 0.0), vec![0.0; 5]);
        assert!(resume(&path, "recipe", &mut read, &mut other).unwrap());
        assert_eq!((&read, &other.first, &other.second), (&values, &optimiser.first, &optimiser.second));
        assert_eq!(other.steps, 3);
        assert!(!path.with_extension("part").exists());
        let error = resume(&path, "another", &mut read, &mut other).unwrap_err().to_string();
        assert!(error.contains("made with \"recipe\", this run has \"another\""), "{error}");
        let whole = fs::read(&path).unwrap();
        for cut in [0, 4, 60, whole.len() / 2, whole.len() - 1] {
            fs::write(&path, &whole[..cut]).unwrap();
            let error = resume(&path, "recipe", &mut read, &mut other).unwrap_err().to_string();
            assert!(error.contains("is no state of this training"), "{error}");
        }
        // What cannot be written leaves what was there.
        fs::write(&path, &whole).unwrap();
        fs::create_dir(path.with_extension("part")).unwrap();
        let error = save(&path, "recipe", &values, &optimiser).unwrap_err().to_string();
        assert!(error.starts_with(&format!("cannot read or write {}", path.display())), "{error}");
        assert_eq!(fs::read(&path).unwrap(), whole);
    }
}
