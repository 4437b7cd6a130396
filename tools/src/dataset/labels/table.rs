//! Tables of text: comma-separated values of any dialect, with names in the first row.

use std::path::{Path, PathBuf};

use super::super::without_byte_order_mark;
use super::{Fault, LabelFileError, ProblemKind};

/// A label file is a few megabytes of text.
pub(super) const MOST_BYTES: u64 = 1 << 28;

/// Delimiters that are looked for in the first row.
const DELIMITERS: [u8; 3] = *b",;\t";

/// Reads a label file whole.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, LabelFileError> {
    let failed = |source| LabelFileError::Read { path: path.into(), source };
    if std::fs::metadata(path).map_err(failed)?.len() > MOST_BYTES {
        return Err(LabelFileError::TooLarge { path: path.into() });
    }
    std::fs::read(path).map_err(failed)
}

/// A table with named columns.
#[derive(Debug)]
pub(super) struct Table {
    path: PathBuf,
    names: Vec<String>,
    /// Rows by line; each has as many fields as there are names.
    pub(super) rows: Vec<(usize, Result<Vec<String>, Fault>)>,
}

impl Table {
    /// Reads a file.
    pub(super) fn open(path: &Path) -> Result<Table, LabelFileError> {
        Ok(Table::parse(path, &read(path)?))
    }

    fn parse(path: &Path, bytes: &[u8]) -> Table {
        let bytes = without_byte_order_mark(bytes);
        let first = bytes.split(|&byte| byte == b'\n').next().unwrap_or_default();
        let count = |delimiter: u8| first.iter().filter(|&&byte| byte == delimiter).count();
        // The last of equals is taken, so the comma goes last.
        let delimiter = DELIMITERS.into_iter().rev().max_by_key(|&delimiter| count(delimiter)).unwrap_or(b',');
        let mut reader =
            csv::ReaderBuilder::new().delimiter(delimiter).flexible(true).has_headers(false).from_reader(bytes);
        let mut table = Table { path: path.into(), names: Vec::new(), rows: Vec::new() };
        for (number, record) in reader.byte_records().enumerate() {
            // Fields of any number and bytes are taken, and the bytes are in memory: there is nothing left to fail.
            let Ok(record) = record else { break };
            let text = |field: &[u8]| String::from_utf8(field.to_vec());
            let fields: Result<Vec<String>, _> = record.iter().map(text).collect();
            if number == 0 {
                table.names = record.iter().map(|name| String::from_utf8_lossy(name).trim().to_owned()).collect();
                continue;
            }
            let line = record.position().map_or(number + 1, |position| position.line() as usize);
            let row = match fields {
                Ok(fields) if fields.len() == table.names.len() => Ok(fields),
                Ok(fields) => Err(format!("has {} columns, the first row {}", fields.len(), table.names.len())),
                Err(_) => Err("is no UTF-8".to_owned()),
            };
            table.rows.push((line, row.map_err(|reason| (ProblemKind::Form, reason))));
        }
        table
    }

    /// Place of the column that has one of the names, whatever their case.
    pub(super) fn column(&self, names: &[&str]) -> Result<usize, LabelFileError> {
        let named = |have: &String| names.iter().any(|name| have.eq_ignore_ascii_case(name));
        self.names.iter().position(named).ok_or_else(|| LabelFileError::Column {
            path: self.path.clone(),
            wanted: names.join(" or "),
            found: self.names.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn dialects() {
        for text in ["a,b\n1,2\n", "\u{feff}A;B\r\n1;2\r\n", "a\tb\n1\t2", "\"a\",\"b\"\n\n\"1\",2\n"] {
            let table = Table::parse(Path::new("t"), text.as_bytes());
            assert_eq!((table.column(&["x", "a"]).unwrap(), table.column(&["b"]).unwrap()), (0, 1), "{text:?}");
            assert_eq!(table.rows.len(), 1);
            assert_eq!(table.rows[0].1.as_ref().unwrap(), &["1", "2"]);
        }
    }

    #[test]
    fn rows_that_are_damaged_are_said_to_be() {
        let table = Table::parse(Path::new("t"), b"a,b\n1\n1,2,3\n\xff,2\n\"1,2\n3,4");
        let reasons: Vec<&str> = table.rows.iter().map(|(_, row)| row.as_ref().unwrap_err().1.as_str()).collect();
        assert_eq!(
            reasons,
            [
                "has 1 columns, the first row 2",
                "has 3 columns, the first row 2",
                "is no UTF-8",
                "has 1 columns, the first row 2"
            ]
        );
        assert_eq!(table.rows.iter().map(|row| row.0).collect::<Vec<_>>(), [2, 3, 4, 5]);
        for empty in [&b""[..], b"\xef\xbb\xbf", b"\n\n"] {
            let table = Table::parse(Path::new("t"), empty);
            assert!(table.rows.is_empty());
            assert!(table.column(&["a"]).unwrap_err().to_string().contains("t has no column a"));
        }
    }
}
