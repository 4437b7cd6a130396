//! `candor-tools data dfew`: DFEW's `EmoLabel_DataSplit/…/set_N.csv`, columns `video_name` and `label`.

use std::path::{Path, PathBuf};

use clap::Args;

use super::table::Table;
use super::{ConvertArgs, Fault, LabelFileError, ProblemKind, Row, Rows, convert};

/// Labels 1 to 7, as the published lists spell them.
const LABELS: [&str; 7] = ["happy", "sad", "neutral", "angry", "surprise", "disgust", "fear"];

/// `candor-tools data dfew`
#[derive(Args)]
pub struct DfewArgs {
    /// A set of DFEW's data split, such as train(single-labeled)/set_1.csv.
    #[arg(long)]
    pub labels: PathBuf,
    /// Where the clips are and what to write.
    #[command(flatten)]
    pub convert: ConvertArgs,
}

/// Runs `candor-tools data dfew`.
pub fn run(args: &DfewArgs) -> anyhow::Result<()> {
    convert(&args.labels, rows(&args.labels)?, &args.convert)
}

pub(super) fn rows(path: &Path) -> Result<Rows, LabelFileError> {
    let table = Table::open(path)?;
    let (clip, label) = (table.column(&["video_name"])?, table.column(&["label"])?);
    let row = |fields: Vec<String>| {
        Ok(Row { clip: fields[clip].trim().to_owned(), label: spelled(&fields[label])?.to_owned(), rationale: None })
    };
    Ok(table.rows.into_iter().map(|(line, fields)| (line, fields.and_then(row))).collect())
}

fn spelled(label: &str) -> Result<&'static str, Fault> {
    match label.trim().parse::<usize>() {
        Ok(0) => Err((ProblemKind::Label, "label 0: its judges agreed on no single emotion".into())),
        Ok(number) if number <= LABELS.len() => Ok(LABELS[number - 1]),
        _ => Err((ProblemKind::Label, format!("label {label:?} is not one of DFEW's 1 to {}", LABELS.len()))),
    }
}
