//! `candor-tools data emer`: EMER's reasons for an emotion as rationales. Its first version (`gt-eng.csv`) has columns
//! `names`, `emotions`, `subtitles` and `reasons`; its second (`final-EMER-reason.csv`) has `name`, `chinese` and `english`, and
//! the emotions come from MER2023's own label file.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use clap::Args;

use super::clips::key;
use super::table::Table;
use super::{ConvertArgs, LabelFileError, ProblemKind, Row, Rows, convert, rationale};

const CLIPS: [&str; 2] = ["names", "name"];
const EMOTIONS: [&str; 4] = ["emotions", "emotion", "discrete", "label"];
const REASONS: [&str; 3] = ["reasons", "reason", "english"];

/// MER2023 names worry where the published lists say "anxious"; of the known emotions it is the nearest.
const WORRY: [(&str, &str); 2] = [("worried", "anxious"), ("worry", "anxious")];

/// `candor-tools data emer`
#[derive(Args)]
pub struct EmerArgs {
    /// EMER's reasons: gt-eng.csv or final-EMER-reason.csv.
    #[arg(long)]
    pub reasons: PathBuf,
    /// The clips' emotions where the reasons come without: MER2023's label file, a csv with the columns name and discrete.
    #[arg(long)]
    pub labels: Option<PathBuf>,
    /// Where the clips are and what to write.
    #[command(flatten)]
    pub convert: ConvertArgs,
}

/// Runs `candor-tools data emer`.
pub fn run(args: &EmerArgs) -> anyhow::Result<()> {
    convert(&args.reasons, rows(&args.reasons, args.labels.as_deref())?, &args.convert)
}

pub(super) fn rows(path: &Path, labels: Option<&Path>) -> Result<Rows, LabelFileError> {
    let table = Table::open(path)?;
    let (clip, reason) = (table.column(&CLIPS)?, table.column(&REASONS)?);
    let (own, known) = match labels {
        Some(labels) => (None, emotions(labels)?),
        None => (Some(table.column(&EMOTIONS)?), HashMap::new()),
    };
    let row = |fields: Vec<String>| {
        let clip = fields[clip].trim().to_owned();
        let label = match own {
            Some(own) => fields[own].trim(),
            None => {
                known.get(&key(&clip)).ok_or_else(|| (ProblemKind::Label, format!("clip {clip:?} has no label")))?
            }
        };
        let label = WORRY.into_iter().find(|(name, _)| *name == label).map_or(label, |(_, spelled)| spelled).to_owned();
        Ok(Row { rationale: Some(rationale(&fields[reason])?), clip, label })
    };
    Ok(table.rows.into_iter().map(|(line, fields)| (line, fields.and_then(row))).collect())
}

/// The emotion of each clip of a label file. A row that is damaged is missed where a clip needs it.
fn emotions(path: &Path) -> Result<HashMap<String, String>, LabelFileError> {
    let table = Table::open(path)?;
    let (clip, emotion) = (table.column(&CLIPS)?, table.column(&EMOTIONS)?);
    let rows = table.rows.into_iter().filter_map(|(_, fields)| fields.ok());
    Ok(rows.map(|fields| (key(&fields[clip]), fields[emotion].trim().to_owned())).collect())
}
