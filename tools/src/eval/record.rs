//! What a model made of one clip or photograph, and the JSON lines that keep it.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use candor::verify::{Emotion, Sentence, Verdict};
use serde::{Deserialize, Serialize};

/// Lines longer than this are no records.
const LONGEST_LINE: u64 = 1 << 20;

/// More records than this are those of no evaluation that fits into memory.
const MOST_RECORDS: usize = 10_000_000;

/// What the model made of one clip or photograph.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The entry's id in the data; of a faces file, PART/ROW.
    pub id: String,
    /// The right emotion.
    #[serde(with = "name")]
    pub truth: Emotion,
    /// The answer after the rationale.
    #[serde(with = "name::option")]
    pub answer: Option<Emotion>,
    /// The fast answer.
    #[serde(with = "name::option")]
    pub fast: Option<Emotion>,
    /// What the judges read out of the rationale.
    pub read: Judged,
    /// The rationale; none where nothing was said, or where the policy withholds it.
    pub rationale: Option<String>,
    /// The rationale's sentences as the verifier reads them, held against the label that the model shows.
    pub sentences: Vec<Sentence>,
    /// Whether the rationale bears out that label.
    pub verdict: Verdict,
    /// Whether the policy kept the rationale back.
    pub withheld: bool,
    /// What was written.
    pub tokens: TokenCounts,
    /// The cues that the rationale states, where cues were measured.
    pub cues: Option<CueCounts>,
}

/// What each judge reads out of a rationale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judged {
    /// See [`crate::judge::verifier`].
    #[serde(with = "name::option")]
    pub verifier: Option<Emotion>,
    /// See [`crate::judge::lexicon`].
    #[serde(with = "name::option")]
    pub lexicon: Option<Emotion>,
}

/// Tokens of a completion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenCounts {
    /// Those of the completion.
    pub completion: u32,
    /// Those that the policy threw away.
    pub extra: u32,
}

/// Cues that a rationale states of a measured face.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CueCounts {
    /// How many it states.
    pub stated: u32,
    /// How many of them the measurement bears out.
    pub right: u32,
    /// How many of them the measurement of another photograph bears out.
    pub right_by_chance: u32,
}

impl Record {
    /// Whether the answer is right.
    pub fn is_right(&self) -> bool {
        self.answer == Some(self.truth)
    }

    /// Whether the completion was of the right form: a rationale, withheld or not, and an answer.
    pub fn is_readable(&self) -> bool {
        (self.rationale.is_some() || self.withheld) && self.answer.is_some()
    }
}

/// Why records cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordsError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A line is no record.
    #[error("{path}, line {line}: {reason}; records are written by `candor-tools eval --records FILE`", path = path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// There is no record.
    #[error("{path} has no record", path = path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// Writes records, one line each.
pub fn write(out: &mut impl Write, records: &[Record]) -> std::io::Result<()> {
    for record in records {
        serde_json::to_writer(&mut *out, record)?;
        out.write_all(b"\n")?;
    }
    out.flush()
}

/// Reads records back. Ids stand once each.
pub fn read(path: &Path) -> Result<Vec<Record>, RecordsError> {
    let failed = |source| RecordsError::Read { path: path.into(), source };
    let mut reader = BufReader::new(File::open(path).map_err(failed)?);
    let mut records = Vec::new();
    let mut ids = HashSet::new();
    let mut bytes = Vec::new();
    for line in 1.. {
        let wrong = |reason: String| RecordsError::Line { path: path.into(), line, reason };
        bytes.clear();
        let read = (&mut reader).take(LONGEST_LINE).read_until(b'\n', &mut bytes).map_err(failed)?;
        if read == 0 {
            break;
        }
        if read as u64 == LONGEST_LINE {
            return Err(wrong(format!("is longer than {LONGEST_LINE} bytes")));
        }
        if bytes.trim_ascii().is_empty() {
            continue;
        }
        let record: Record = serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))?;
        record.check().map_err(wrong)?;
        if !ids.insert(record.id.clone()) {
            return Err(wrong(format!("id {:?} stands twice", record.id)));
        }
        if records.len() == MOST_RECORDS {
            return Err(wrong(format!("there are more than {MOST_RECORDS} records")));
        }
        records.push(record);
    }
    match records.is_empty() {
        true => Err(RecordsError::Empty { path: path.into() }),
        false => Ok(records),
    }
}

impl Record {
    /// What no evaluation writes.
    fn check(&self) -> Result<(), String> {
        if let Some(CueCounts { stated, right, right_by_chance }) = self.cues
            && (right > stated || right_by_chance > stated)
        {
            return Err(format!("`cues` says that {right} and {right_by_chance} of {stated} are right"));
        }
        if self.rationale.is_none() && (self.read != Judged::default() || !self.sentences.is_empty()) {
            return Err("has readings and no rationale".into());
        }
        Ok(())
    }
}

/// Emotions as their names.
mod name {
    use candor::verify::Emotion;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(emotion: &Emotion, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(emotion.name())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Emotion, D::Error> {
        let name = String::deserialize(deserializer)?;
        Emotion::fold(&name).ok_or_else(|| D::Error::custom(format!("{name:?} is no known emotion")))
    }

    pub(super) mod option {
        use super::*;

        pub(crate) fn serialize<S: Serializer>(emotion: &Option<Emotion>, serializer: S) -> Result<S::Ok, S::Error> {
            match emotion {
                Some(emotion) => serializer.serialize_str(emotion.name()),
                None => serializer.serialize_none(),
            }
        }

        pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Emotion>, D::Error> {
            let name = Option::<String>::deserialize(deserializer)?;
            let fold = |name: String| {
                Emotion::fold(&name).ok_or_else(|| D::Error::custom(format!("{name:?} is no known emotion")))
            };
            name.map(fold).transpose()
        }
    }
}
