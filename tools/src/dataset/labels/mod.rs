//! Label files as the authors of a data set give them, brought into the form that [`Dataset::open`](super::Dataset) reads:
//! each row's clip is looked for, each label spelled, and what cannot be used is listed.

mod clips;
pub mod dfew;
pub mod emer;
pub mod mafw;
mod table;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use candor::message::say;
use candor::verify::Emotion;
use clap::Args;

use super::entry::Entry;
use super::{DatasetError, Problem, ProblemKind, Problems};
use clips::Clips;

/// Why a label file cannot be read at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabelFileError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}", path = path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file is too large for a list of labels.
    #[error("{path} is larger than {} bytes; is it a label file?", table::MOST_BYTES, path = path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// A column is not there.
    #[error("{path} has no column {wanted}; its first row is {found:?}", path = path.display())]
    Column {
        /// The file.
        path: PathBuf,
        /// Names of the column that are known.
        wanted: String,
        /// The first row.
        found: Vec<String>,
    },
    /// The workbook is damaged or has no sheet.
    #[error("{path} is no workbook that can be read: {reason}", path = path.display())]
    Workbook {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// What the commands for label files have in common.
#[derive(Args, Clone, Debug)]
pub struct ConvertArgs {
    /// Folder with the clips; they are looked for in the folders in it too, by name without leading zeros.
    #[arg(long)]
    pub clips: PathBuf,
    /// File to write: .json for a list as it is published, .jsonl for lines with columns.
    #[arg(long)]
    pub out: PathBuf,
    /// Question to put with each clip; without it the model's own is asked.
    #[arg(long)]
    pub prompt: Option<String>,
    /// Leave out rows that cannot be used, and say which; otherwise they are an error.
    #[arg(long)]
    pub skip_bad: bool,
}

/// A row of a label file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    clip: String,
    label: String,
    rationale: Option<String>,
}

/// Rows by their place in the file, or why they cannot be used.
type Rows = Vec<(usize, Result<Row, Fault>)>;

type Fault = (ProblemKind, String);

/// Looks for the clips of `rows` and writes the data set.
fn convert(labels: &Path, rows: Rows, args: &ConvertArgs) -> anyhow::Result<()> {
    let lines = match args.out.extension().and_then(|extension| extension.to_str()) {
        Some("jsonl") => true,
        Some("json") => false,
        _ => anyhow::bail!("--out {}: the name must end in .json or .jsonl", args.out.display()),
    };
    ensure!(!args.prompt.as_ref().is_some_and(|prompt| prompt.trim().is_empty()), "--prompt is empty");
    let total = rows.len();
    let (entries, problems) = entries(labels, rows, args)?;
    let path = || labels.to_path_buf();
    if total == 0 {
        return Err(DatasetError::Empty { path: path() }.into());
    }
    if entries.is_empty() {
        return Err(DatasetError::NothingLeft { path: path(), problems: Problems(problems) }.into());
    }
    if !problems.is_empty() && !args.skip_bad {
        return Err(DatasetError::Bad { path: path(), total, problems: Problems(problems) }.into());
    }
    Problems::warn(&problems, total);
    let text = if lines {
        entries.iter().map(|entry| format!("{}\n", entry.to_columns())).collect()
    } else {
        let list: Vec<_> = entries.iter().map(Entry::to_conversation).collect();
        serde_json::to_string_pretty(&list)?
    };
    write(&args.out, text.as_bytes()).with_context(|| format!("cannot write {}", args.out.display()))?;
    report(&entries, &problems, &args.out)
}

fn entries(labels: &Path, rows: Rows, args: &ConvertArgs) -> anyhow::Result<(Vec<Entry>, Vec<Problem>)> {
    let clips = Clips::find(&args.clips)?;
    let folder = args.out.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
    let folder = folder.canonicalize().with_context(|| format!("cannot write into {}", folder.display()))?;
    let (mut entries, mut problems) = (Vec::new(), Vec::new());
    let mut seen: HashMap<String, usize> = HashMap::new();
    for (place, row) in rows {
        let entry = row.and_then(|row| {
            if Emotion::fold(&row.label).is_none() {
                return Err((ProblemKind::Label, format!("label {:?} names no known emotion", row.label)));
            }
            let (key, clip) = clips.get(&row.clip)?;
            if let Some(first) = seen.insert(key, place) {
                return Err((ProblemKind::Duplicate, format!("clip {:?} is that of entry {first}", row.clip)));
            }
            let video = reference(clip, &folder)?;
            let prompt = args.prompt.clone();
            Ok(Entry { video, prompt, label: row.label, rationale: row.rationale, ..Entry::default() })
        });
        match entry {
            Ok(entry) => entries.push(entry),
            Err((kind, reason)) => problems.push(Problem { file: labels.into(), entry: place, kind, reason }),
        }
    }
    Ok((entries, problems))
}

/// How the written file names a clip: from its own folder where the clip lies below it, so that both can be moved.
fn reference(clip: &Path, folder: &Path) -> Result<String, Fault> {
    let clip = clip.canonicalize().map_err(|error| (ProblemKind::Absent, format!("{}: {error}", clip.display())))?;
    let short = clip.strip_prefix(folder).unwrap_or(&clip);
    let text = short.to_str().ok_or_else(|| (ProblemKind::Form, format!("the path {short:?} is no UTF-8")))?;
    Ok(text.to_owned())
}

fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let part = path.with_extension("part");
    File::create(&part).and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))?;
    fs::rename(&part, path)
}

fn report(entries: &[Entry], problems: &[Problem], out: &Path) -> anyhow::Result<()> {
    let mut labels: BTreeMap<&str, usize> = BTreeMap::new();
    for entry in entries {
        *labels.entry(&entry.label).or_default() += 1;
    }
    let labels: Vec<String> = labels.iter().map(|(label, count)| format!("{label} {count}")).collect();
    let reasoned = entries.iter().filter(|entry| entry.rationale.is_some()).count();
    say(format_args!("{} clips in {}: {}", entries.len(), out.display(), labels.join(", ")))?;
    say(format_args!("with a rationale: {reasoned}"))?;
    if !problems.is_empty() {
        say(format_args!("skipped: {} ({})", problems.len(), Problems::counts(problems)))?;
    }
    Ok(())
}

/// A rationale on one line, or why it cannot be one.
fn rationale(text: &str) -> Result<String, Fault> {
    let fault = |reason: &str| Err((ProblemKind::Form, format!("the rationale {reason}")));
    if text.contains('\u{fffd}') {
        return fault("is no UTF-8");
    }
    if text.contains(['<', '\0']) {
        return fault("holds tags or zero bytes");
    }
    match text.split_whitespace().collect::<Vec<_>>().join(" ") {
        text if text.is_empty() => fault("is empty"),
        text => Ok(text),
    }
}

#[cfg(test)]
mod tests;
