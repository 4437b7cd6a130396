//! `candor-tools data mafw`: MAFW's lists (`single/…/set_N/train.txt`: clip and label, perhaps with a Chinese and an English
//! description behind tabs) and its sheet `single-set.xlsx`, which numbers the labels in the column `single_label`.

use std::collections::HashMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use calamine::{Data, Range, Reader, Xlsx};
use clap::Args;

use super::super::without_byte_order_mark;
use super::clips::key;
use super::table::read;
use super::{ConvertArgs, Fault, LabelFileError, ProblemKind, Row, Rows, convert, rationale};

/// Labels 1 to 11 of the sheet.
const LABELS: [&str; 11] = [
    "anger",
    "disgust",
    "fear",
    "happiness",
    "neutral",
    "sadness",
    "surprise",
    "contempt",
    "anxiety",
    "helplessness",
    "disappointment",
];

/// The sheet's column of labels.
const LABEL: &str = "single_label";

/// Names of the sheet's column of clips.
const CLIPS: [&str; 2] = ["clip", "name"];

/// Rows at the top of a sheet among which the names are looked for: a title may stand above them.
const TITLES: usize = 3;

/// `candor-tools data mafw`
#[derive(Args)]
pub struct MafwArgs {
    /// MAFW's labels of single emotions: train.txt or test.txt of a set, or single-set.xlsx.
    #[arg(long)]
    pub labels: PathBuf,
    /// Take the English descriptions of this file as rationales: descriptive_text.xlsx, or a list that has them.
    #[arg(long)]
    pub captions: Option<PathBuf>,
    /// Where the clips are and what to write.
    #[command(flatten)]
    pub convert: ConvertArgs,
}

/// Runs `candor-tools data mafw`.
pub fn run(args: &MafwArgs) -> anyhow::Result<()> {
    convert(&args.labels, rows(&args.labels, args.captions.as_deref())?, &args.convert)
}

pub(super) fn rows(path: &Path, captions: Option<&Path>) -> Result<Rows, LabelFileError> {
    let mut rows = match is_workbook(path) {
        true => sheet_rows(path, &first_sheet(path)?)?,
        false => list_rows(&read(path)?),
    };
    let Some(captions) = captions else { return Ok(rows) };
    let captions = read_captions(captions)?;
    for (_, row) in &mut rows {
        let described = row.as_ref().ok().and_then(|row| captions.get(&key(&row.clip)));
        match described.map(|caption| rationale(caption)) {
            None => {} // neutral clips have no description
            Some(Err(fault)) => *row = Err(fault),
            Some(Ok(text)) => {
                if let Ok(row) = row {
                    row.rationale = Some(text);
                }
            }
        }
    }
    Ok(rows)
}

fn is_workbook(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("xlsx"))
}

/// Rows of a list: clip and label, divided by white space.
fn list_rows(bytes: &[u8]) -> Rows {
    let row = |line: &[u8]| {
        let text = String::from_utf8_lossy(line);
        let mut words = text.split_whitespace();
        match (words.next(), words.next()) {
            (Some(clip), Some(label)) => {
                Ok(Row { clip: clip.to_owned(), label: single(label)?.to_owned(), rationale: None })
            }
            _ => Err((ProblemKind::Form, format!("{:?} is no clip with a label", text.trim()))),
        }
    };
    lines(bytes).map(|(number, line)| (number, row(line))).collect()
}

/// Lines that are not blank, by number.
fn lines(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let lines = without_byte_order_mark(bytes).split(|&byte| byte == b'\n').enumerate();
    lines.map(|(i, line)| (i + 1, line)).filter(|(_, line)| !line.trim_ascii().is_empty())
}

/// A label that is one of MAFW's.
fn single(label: &str) -> Result<&str, Fault> {
    if LABELS.contains(&label) {
        return Ok(label);
    }
    let several = label.contains(['_', ',']);
    let hint = if several { "; of several emotions none can be the answer, give the single set" } else { "" };
    Err((ProblemKind::Label, format!("label {label:?} is none of MAFW's{hint}")))
}

/// The first sheet of a workbook.
fn first_sheet(path: &Path) -> Result<Range<Data>, LabelFileError> {
    let wrong = |reason: String| LabelFileError::Workbook { path: path.into(), reason };
    let mut book = Xlsx::new(Cursor::new(read(path)?)).map_err(|error| wrong(error.to_string()))?;
    match book.worksheet_range_at(0) {
        Some(sheet) => sheet.map_err(|error| wrong(error.to_string())),
        None => Err(wrong("it has no sheet".into())),
    }
}

/// Rows of the sheet with numbered labels.
fn sheet_rows(path: &Path, sheet: &Range<Data>) -> Result<Rows, LabelFileError> {
    let place = |row: &[Data], names: &[&str]| {
        row.iter().position(|cell| names.iter().any(|name| text_of(cell).eq_ignore_ascii_case(name)))
    };
    let titles = sheet.rows().take(TITLES).enumerate();
    let found =
        titles.filter_map(|(at, row)| Some((at, place(row, &CLIPS).unwrap_or(0), place(row, &[LABEL])?))).next();
    let Some((header, clip, label)) = found else {
        let found = sheet.rows().next().unwrap_or_default().iter().map(text_of).collect();
        return Err(LabelFileError::Column { path: path.into(), wanted: LABEL.into(), found });
    };
    let top = sheet.start().map_or(0, |(row, _)| row as usize) + 1;
    let rows = sheet.rows().enumerate().skip(header + 1).filter(|(_, row)| row.iter().any(|cell| *cell != Data::Empty));
    let row = |row: &[Data]| {
        let clip = text_of(&row[clip]);
        if clip.is_empty() {
            return Err((ProblemKind::Form, "names no clip".into()));
        }
        Ok(Row { clip, label: numbered(&row[label])?.to_owned(), rationale: None })
    };
    Ok(rows.map(|(number, cells)| (top + number, row(cells))).collect())
}

/// The label with the number in a cell.
fn numbered(cell: &Data) -> Result<&'static str, Fault> {
    let text = text_of(cell);
    match text.parse::<usize>() {
        Ok(number) if (1..=LABELS.len()).contains(&number) => Ok(LABELS[number - 1]),
        _ => Err((ProblemKind::Label, format!("label {text:?} is not one of MAFW's 1 to {}", LABELS.len()))),
    }
}

/// A cell as text; whole numbers without a point.
fn text_of(cell: &Data) -> String {
    match cell {
        Data::String(text) => text.trim().to_owned(),
        Data::Empty => String::new(),
        // Debug spells the largest numbers in few characters.
        Data::Float(number) if number.fract() != 0.0 || number.abs() > 1e9 => format!("{number:?}"),
        other => other.to_string(),
    }
}

/// The English description of each clip.
fn read_captions(path: &Path) -> Result<HashMap<String, String>, LabelFileError> {
    if is_workbook(path) {
        // Without a row of names: clip, Chinese, English.
        let sheet = first_sheet(path)?;
        let caption = |row: &[Data]| Some((key(&text_of(row.first()?)), text_of(row.get(2)?)));
        return Ok(sheet.rows().filter_map(caption).filter(|(_, text)| !text.is_empty()).collect());
    }
    let bytes = read(path)?;
    let caption = |(_, line): (usize, &[u8])| {
        // The Chinese may be of any encoding, the English behind it is ASCII.
        let line = String::from_utf8_lossy(line).replace("<br>", "\t");
        let fields: Vec<&str> = line.split('\t').map(str::trim).filter(|field| !field.is_empty()).collect();
        let clip = fields.first()?.split_whitespace().next()?;
        // Clip and label may be divided by blanks, so that they are one field.
        match fields.as_slice() {
            [_, .., _, english] => Some((key(clip), (*english).to_owned())),
            _ => None,
        }
    };
    Ok(lines(&bytes).filter_map(caption).collect())
}
