//! Which tokens a model may write: with a large vocabulary of many languages the output head is a good part of a token's
//! work, and most of its rows are of scripts that no answer needs.

use std::fmt;
use std::str::FromStr;

use super::automaton::{ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN};
use super::token_table::TokenTable;

/// The rows of the output head that are computed. What the others stand for cannot be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HeadRows {
    /// All of them: the model as it is.
    #[default]
    All,
    /// Tokens of Latin letters, digits and punctuation, and of the scripts that labels and instruction are written in.
    Language,
    /// The first so many of the vocabulary, which byte-pair tokenizers number by how early they were joined, and so about
    /// by how often they are used.
    First(usize),
}

/// Not a choice of rows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no choice of rows; there are all, language, and a number of rows from 1")]
pub struct ParseHeadRowsError(String);

impl FromStr for HeadRows {
    type Err = ParseHeadRowsError;

    fn from_str(text: &str) -> Result<Self, ParseHeadRowsError> {
        match text {
            "all" => Ok(HeadRows::All),
            "language" => Ok(HeadRows::Language),
            number => match number.parse() {
                Ok(count) if count > 0 => Ok(HeadRows::First(count)),
                _ => Err(ParseHeadRowsError(text.to_owned())),
            },
        }
    }
}

impl fmt::Display for HeadRows {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        match self {
            HeadRows::All => formatter.write_str("all"),
            HeadRows::Language => formatter.write_str("language"),
            HeadRows::First(count) => write!(formatter, "{count}"),
        }
    }
}

impl HeadRows {
    /// The tokens that may be written, ascending; `None` where all may. Whatever the choice, the end of the turn, every
    /// single byte, and all pieces of tags and labels are among them, so that every answer can be spelled.
    pub fn tokens(self, table: &TokenTable, labels: &[String], instruction: &str) -> Option<Vec<u32>> {
        let used: Vec<Script> = labels.iter().map(String::as_str).chain([instruction]).flat_map(scripts).collect();
        let in_choice = |id: u32, bytes: &[u8]| match self {
            HeadRows::All => true,
            HeadRows::First(count) => (id as usize) < count,
            HeadRows::Language => std::str::from_utf8(bytes)
                .is_ok_and(|text| scripts(text).all(|script| script == Script::Latin || used.contains(&script))),
        };
        if self == HeadRows::All {
            return None;
        }
        let fixed: Vec<String> = labels
            .iter()
            .map(|label| format!("{label}{ANSWER_CLOSE}"))
            .chain([THINK_OPEN.to_owned(), format!("{THINK_CLOSE}\n{ANSWER_OPEN}")])
            .collect();
        let in_fixed =
            |bytes: &[u8]| fixed.iter().any(|text| text.as_bytes().windows(bytes.len()).any(|piece| piece == bytes));
        let may = |&id: &u32| {
            let bytes = table.bytes(id);
            id == table.end_of_turn()
                || bytes.len() == 1
                || (!bytes.is_empty() && (in_choice(id, bytes) || in_fixed(bytes)))
        };
        Some((0u32..).take(table.vocabulary()).filter(may).collect())
    }
}

/// Writing systems, as far as large vocabularies have many tokens of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Script {
    /// Latin letters, and what goes with every script: digits, punctuation, white space, currencies.
    Latin,
    Greek,
    Cyrillic,
    Hebrew,
    Arabic,
    Indic,
    Thai,
    Korean,
    /// Han, Kana, and their punctuation.
    ChineseJapanese,
    Other,
}

fn scripts(text: &str) -> impl Iterator<Item = Script> + '_ {
    text.chars().map(|character| match u32::from(character) {
        0..=0x24F | 0x1E00..=0x1EFF | 0x2000..=0x20CF => Script::Latin,
        0x370..=0x3FF | 0x1F00..=0x1FFF => Script::Greek,
        0x400..=0x52F => Script::Cyrillic,
        0x590..=0x5FF => Script::Hebrew,
        0x600..=0x77F | 0xFB50..=0xFDFF | 0xFE70..=0xFEFF => Script::Arabic,
        0x900..=0xDFF => Script::Indic,
        0xE00..=0xEFF => Script::Thai,
        0x1100..=0x11FF | 0x3130..=0x318F | 0xAC00..=0xD7AF => Script::Korean,
        0x2E80..=0x312F | 0x31F0..=0x9FFF | 0xF900..=0xFAFF | 0xFF00..=0xFFEF | 0x2_0000..=0x3_FFFF => {
            Script::ChineseJapanese
        }
        _ => Script::Other,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::text::grammar::Grammar;
    use crate::text::toy::{labels, table_with_bytes};

    #[test]
    fn choices_are_read_and_written() {
        for choice in [HeadRows::All, HeadRows::Language, HeadRows::First(1000)] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        for text in ["", "0", "-1", "none", "1.5", "Language"] {
            assert!(text.parse::<HeadRows>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn the_language_is_that_of_labels_and_instruction() {
        let extra: [&[u8]; 8] = [
            b"face",
            "é".as_bytes(),
            "лицо".as_bytes(),
            "脸".as_bytes(),
            "悲し".as_bytes(),
            "🙂".as_bytes(),
            "“".as_bytes(),
            b"\xE6\x82",
        ];
        let table = table_with_bytes(&extra);
        let written = |labels: &[&str], instruction| {
            let labels: Vec<String> = labels.iter().map(ToString::to_string).collect();
            let tokens = HeadRows::Language.tokens(&table, &labels, instruction).unwrap();
            assert!((0..256).all(|byte| tokens.contains(&byte)) && tokens.contains(&table.end_of_turn()));
            tokens.iter().filter(|&&id| id >= 256).count() - 1
        };
        assert_eq!(written(&["sad"], "Which emotion?"), 3);
        assert_eq!(written(&["sad"], "Какая эмоция?"), 4);
        assert_eq!(
            written(&["悲しい"], "Which emotion?"),
            6,
            "Han, and the piece of a label that is no whole character"
        );
        assert_eq!(HeadRows::All.tokens(&table, &[], ""), None);
        assert_eq!(HeadRows::First(300).tokens(&table, &[], "").unwrap().len(), table.vocabulary());
        assert_eq!(HeadRows::First(1).tokens(&table, &["face".into()], "").unwrap().len(), 258);
    }

    #[test]
    fn every_answer_can_still_be_spelled() {
        let table = table_with_bytes(&[]);
        for choice in [HeadRows::Language, HeadRows::First(1)] {
            let tokens = choice.tokens(&table, &labels(), "").unwrap();
            let whole = Grammar::new(table.clone(), &labels(), 500).unwrap();
            let fewer = Grammar::new(table.only(&tokens).into(), &labels(), 500).unwrap();
            assert_eq!(fewer.minimum(), whole.minimum());
        }
    }
}
