//! Data sets of clips and labels for reward fine-tuning and evaluation: the published JSON lists, JSONL with columns, and
//! the label files of DFEW, MAFW and EMER, which [`labels`] turns into either. [`features`] keeps what the vision tower
//! makes of each clip.

mod entry;
pub mod extractor;
pub mod features;
pub mod labels;
pub mod prepare;
mod problem;

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use candor::verify::Emotion;
use serde_json::Value;

use crate::data::faces::{Faces, FacesError};
use crate::data::rationale::Cue;
use entry::Entry;
pub(crate) use entry::kind;
pub(crate) use extractor::pictures_of;
pub use extractor::{ClipError, Extractor};
pub use features::{ClipFeatures, FeatureCache};
pub use problem::{Problem, ProblemKind, Problems};

/// Files larger than this are something else than a list of clips.
const MOST_BYTES: u64 = 1 << 30;

/// One clip with its label.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// The entry's `id`, or else its clip as it is written there.
    pub id: String,
    /// Entry in the file, from 1.
    pub line: usize,
    /// What there is to see.
    pub media: Media,
    /// The instruction, without places for pictures and sound; `None` for the model's own.
    pub prompt: Option<String>,
    /// The label as it is spelled in the file.
    pub label: String,
    /// The emotion that the label names.
    pub emotion: Emotion,
    /// The text between `<think>` and `</think>`, where the file has one.
    pub rationale: Option<String>,
}

/// What an item shows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Media {
    /// A video file, or a folder with a clip's pictures.
    Clip(PathBuf),
    /// A photograph of a faces file, written `FILE.safetensors#PART/ROW`.
    Photograph {
        /// The faces file.
        file: PathBuf,
        /// Part of it.
        part: String,
        /// Row of the part, from 0.
        row: usize,
    },
}

impl fmt::Display for Media {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Media::Clip(path) => write!(f, "{}", path.display()),
            Media::Photograph { file, part, row } => write!(f, "{}#{part}/{row}", file.display()),
        }
    }
}

impl Media {
    /// Reads a reference; a relative path is one from `root`.
    fn parse(reference: &str, root: &Path) -> Result<Media, String> {
        const FACES: &str = ".safetensors";
        match reference.rsplit_once('#') {
            Some((file, place)) if file.ends_with(FACES) => {
                let (part, row) = place.rsplit_once('/').unwrap_or_default();
                let row = row.parse().map_err(|_| format!("{reference:?} is not FILE{FACES}#PART/ROW"))?;
                Ok(Media::Photograph { file: root.join(file), part: part.to_owned(), row })
            }
            _ if reference.ends_with(FACES) => {
                Err(format!("{reference:?} names no photograph; write #PART/ROW behind it"))
            }
            _ => Ok(Media::Clip(root.join(reference))),
        }
    }
}

/// Faces files, each part read once and shared by all threads. Clones share what is read.
#[derive(Clone, Default)]
pub struct FacesFiles(Arc<Mutex<FacesParts>>);

/// Parts by file and name. A part that cannot be read is not tried again.
type FacesParts = HashMap<(PathBuf, String), Result<Arc<Faces>, Arc<FacesError>>>;

impl FacesFiles {
    /// One part of a faces file.
    pub fn part(&self, file: &Path, part: &str) -> Result<Arc<Faces>, Arc<FacesError>> {
        // What a thread that panicked has left is whole: a part goes in when it is read.
        let mut parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (file.to_path_buf(), part.to_owned());
        parts.entry(key).or_insert_with(|| Faces::open(file, part).map(Arc::new).map_err(Arc::new)).clone()
    }
}

impl fmt::Debug for FacesFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FacesFiles")
    }
}

/// Why a data set cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file is too large to be a list of clips.
    #[error("{path} is larger than {MOST_BYTES} bytes; give a JSON list or JSONL of clips", path = path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file is no JSON list.
    #[error("{path} is no JSON list, or a damaged one: {source}", path = path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// There is no entry.
    #[error("{path} has no entry", path = path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Some entries cannot be used.
    #[error("{path}: {} of {total} entries cannot be used (--skip-bad goes on without them): {problems}", problems.0.len(), path = path.display())]
    Bad {
        /// The file.
        path: PathBuf,
        /// Entries in it.
        total: usize,
        /// What is wrong.
        problems: Problems,
    },
    /// Bad entries were to be skipped, and all are bad.
    #[error("{path}: none of {} entries can be used: {problems}", problems.0.len(), path = path.display())]
    NothingLeft {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problems: Problems,
    },
}

/// A data set, read and checked. What its clips hold is looked at when their features are taken, see
/// [`prepare::prepare`].
#[derive(Debug)]
pub struct Dataset {
    /// Entries that can be used, in the order of the file.
    pub items: Vec<Item>,
    /// What was wrong with the others.
    pub problems: Vec<Problem>,
    /// The faces files that the photographs are of.
    pub faces: FacesFiles,
}

impl Dataset {
    /// Reads a JSON list or JSONL. Clips are looked for in `media_root`, or else in the file's folder. Entries that cannot be
    /// used are an error; with `skip_bad` they are left out, which the log says, one line each.
    pub fn open(path: &Path, media_root: Option<&Path>, skip_bad: bool) -> Result<Dataset, DatasetError> {
        let failed = |source| DatasetError::Read { path: path.into(), source };
        if std::fs::metadata(path).map_err(failed)?.len() > MOST_BYTES {
            return Err(DatasetError::TooLarge { path: path.into() });
        }
        let bytes = std::fs::read(path).map_err(failed)?;
        let root = media_root.or(path.parent()).unwrap_or(Path::new(""));
        let dataset = Dataset::parse(path, &bytes, root)?;
        let total = dataset.items.len() + dataset.problems.len();
        match (dataset.problems.is_empty(), dataset.items.is_empty(), skip_bad) {
            (true, true, _) => Err(DatasetError::Empty { path: path.into() }),
            (true, false, _) => Ok(dataset),
            (false, true, true) => {
                Err(DatasetError::NothingLeft { path: path.into(), problems: Problems(dataset.problems) })
            }
            (false, _, false) => {
                Err(DatasetError::Bad { path: path.into(), total, problems: Problems(dataset.problems) })
            }
            (false, false, true) => {
                Problems::warn(&dataset.problems, total);
                Ok(dataset)
            }
        }
    }

    /// Measured cues of an item's photograph; `None` for a clip, or where they could not be measured.
    pub fn cues(&self, item: &Item) -> Option<[f32; Cue::COUNT]> {
        match &item.media {
            Media::Clip(_) => None,
            Media::Photograph { file, part, row } => *self.faces.part(file, part).ok()?.cues.get(*row)?,
        }
    }

    fn parse(path: &Path, bytes: &[u8], root: &Path) -> Result<Dataset, DatasetError> {
        let bytes = without_byte_order_mark(bytes);
        let mut dataset = Dataset { items: Vec::new(), problems: Vec::new(), faces: FacesFiles::default() };
        let mut ids: HashMap<String, usize> = HashMap::new();
        let mut sound = 0;
        for (line, value) in values(path, bytes)? {
            let item = value.map_err(|reason| (ProblemKind::Form, reason)).and_then(|value| {
                let entry = Entry::parse(&value).map_err(|reason| (ProblemKind::Form, reason))?;
                sound += usize::from(entry.sound);
                let id = entry.id.clone();
                let item = dataset.item(entry, line, root)?;
                // Clips may stand in many entries; an id that is given names one.
                match id.map(|id| ids.insert(id, line)) {
                    Some(Some(first)) => {
                        Err((ProblemKind::Duplicate, format!("id {:?} is that of entry {first}", item.id)))
                    }
                    _ => Ok(item),
                }
            });
            match item {
                Ok(item) => dataset.items.push(item),
                Err((kind, reason)) => dataset.problems.push(Problem { file: path.into(), entry: line, kind, reason }),
            }
        }
        if sound > 0 {
            log::warn!("{}: {sound} entries have `audio`; only pictures are looked at", path.display());
        }
        Ok(dataset)
    }

    fn item(&self, entry: Entry, line: usize, root: &Path) -> Result<Item, (ProblemKind, String)> {
        let Some(emotion) = Emotion::fold(&entry.label) else {
            return Err((ProblemKind::Label, format!("label {:?} names no known emotion", entry.label)));
        };
        let media = Media::parse(&entry.video, root).map_err(|reason| (ProblemKind::Form, reason))?;
        match &media {
            Media::Clip(clip) if !clip.exists() => {
                return Err((ProblemKind::Absent, format!("there is no {}", clip.display())));
            }
            Media::Clip(_) => {}
            Media::Photograph { file, part, row } => {
                let faces = self.faces.part(file, part).map_err(|error| (ProblemKind::Absent, error.to_string()))?;
                if *row >= faces.len() {
                    let reason =
                        format!("{} has photographs 0 to {} in {part}, no {row}", file.display(), faces.len() - 1);
                    return Err((ProblemKind::Absent, reason));
                }
            }
        }
        let id = entry.id.unwrap_or(entry.video);
        Ok(Item { id, line, media, prompt: entry.prompt, label: entry.label, emotion, rationale: entry.rationale })
    }
}

/// Entries with their numbers: the elements of a list, or lines that are not blank. A line that is no JSON says why.
#[allow(clippy::type_complexity)]
fn values(path: &Path, bytes: &[u8]) -> Result<Vec<(usize, Result<Value, String>)>, DatasetError> {
    if bytes.trim_ascii_start().first() == Some(&b'[') {
        let list: Vec<Value> =
            serde_json::from_slice(bytes).map_err(|source| DatasetError::Syntax { path: path.into(), source })?;
        return Ok(list.into_iter().enumerate().map(|(i, value)| (i + 1, Ok(value))).collect());
    }
    let lines = bytes.split(|&byte| byte == b'\n').enumerate().filter(|(_, line)| !line.trim_ascii().is_empty());
    let value = |line| serde_json::from_slice(line).map_err(|error| format!("is no JSON: {error}"));
    Ok(lines.map(|(i, line)| (i + 1, value(line))).collect())
}

/// Programs on Windows start UTF-8 with a mark.
fn without_byte_order_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}

#[cfg(test)]
mod tests;
