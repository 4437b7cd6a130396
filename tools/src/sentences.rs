//! Sentences with GoEmotions' labels, and how well labels that were read fit those they have: one definition for training
//! a verifier and for measuring it.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use candor::verify::emotions::GO_EMOTIONS;
use candor::verify::read_labels;

/// Labels of GoEmotions.
pub const LABELS: usize = GO_EMOTIONS.len();

/// Why a line of sentences was refused.
#[derive(Debug, thiserror::Error)]
#[error("{path}, line {line}: {reason}; a line is TEXT<tab>LABEL,…<tab>ID with label ids from 0 to 27")]
pub struct SentenceError {
    path: PathBuf,
    line: usize,
    reason: String,
}

/// A sentence and its labels.
#[derive(Clone, Debug, PartialEq)]
pub struct Labelled {
    /// The sentence.
    pub text: String,
    /// Which of GoEmotions' labels it has.
    pub labels: [bool; LABELS],
}

/// Reads sentences from a file of GoEmotions' form.
///
/// # Errors
/// [`SentenceError`] naming the first line that is not of that form; the file system's own.
pub fn read_sentences(path: &Path) -> anyhow::Result<Vec<Labelled>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    let mut sentences = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.is_empty()) {
        let refuse = |reason: String| SentenceError { path: path.into(), line: index + 1, reason };
        let mut columns = line.split('\t');
        let (Some(text), Some(ids)) = (columns.next(), columns.next()) else {
            bail!(refuse("no tab between the text and its labels".into()));
        };
        let mut labels = [false; LABELS];
        for id in ids.split(',') {
            let id = id.trim();
            let slot = id.parse::<usize>().ok().and_then(|id| labels.get_mut(id));
            *slot.ok_or_else(|| refuse(format!("{id:?} is no label id from 0 to 27")))? = true;
        }
        sentences.push(Labelled { text: text.to_owned(), labels });
    }
    ensure!(!sentences.is_empty(), "{} holds no sentences", path.display());
    Ok(sentences)
}

/// Mean over the labels of F1, given what was read and what is right. A label that is neither read nor right counts 0.
pub fn macro_f1(read: &[[bool; LABELS]], right: &[[bool; LABELS]]) -> f64 {
    let scores = (0..LABELS).map(|label| {
        let both = read.iter().zip(right).filter(|(a, b)| a[label] && b[label]).count() as f64;
        let either = read.iter().filter(|a| a[label]).count() + right.iter().filter(|b| b[label]).count();
        if either == 0 { 0.0 } else { 2.0 * both / either as f64 }
    });
    scores.sum::<f64>() / LABELS as f64
}

/// Labels with a probability above a threshold.
pub fn above(probabilities: &[[f32; LABELS]], threshold: f32) -> Vec<[bool; LABELS]> {
    probabilities.iter().map(|row| row.map(|probability| probability > threshold)).collect()
}

/// Labels by the paper's rule (arXiv 2510.23506): above 0.1, at most two, else the most probable.
///
/// # Errors
/// A probability that is not one.
pub fn by_rule(probabilities: &[[f32; LABELS]]) -> anyhow::Result<Vec<[bool; LABELS]>> {
    let rows = probabilities.iter().map(|row| {
        let mut labels = [false; LABELS];
        for label in read_labels(row)? {
            labels[label.id()] = true;
        }
        Ok(labels)
    });
    rows.collect()
}

/// Share of sentences that are read as meant: those that name an emotion have its label, or one of its labels, among
/// theirs; neutral ones have no other.
pub fn agreement(read: &[[bool; LABELS]], meant: &[[bool; LABELS]]) -> f64 {
    const NEUTRAL: usize = LABELS - 1;
    let agree = |(read, meant): (&[bool; LABELS], &[bool; LABELS])| {
        if meant[NEUTRAL] { read == meant } else { (0..LABELS).any(|label| read[label] && meant[label]) }
    };
    read.iter().zip(meant).filter(|pair| agree(*pair)).count() as f64 / read.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn macro_f1_is_the_mean_over_all_labels() {
        let mut read = vec![[false; LABELS]; 4];
        let mut right = read.clone();
        // Label 0: two of three right ones are read, one too many. Label 1: all right. The other 26: none.
        for (row, a, b) in [(0, true, true), (1, true, true), (2, true, false), (3, false, true)] {
            read[row][0] = a;
            right[row][0] = b;
        }
        read[0][1] = true;
        right[0][1] = true;
        assert!((macro_f1(&read, &right) - (2.0 / 3.0 + 1.0) / 28.0).abs() < 1e-12);
    }

    #[test]
    fn a_neutral_sentence_has_no_other_label() {
        let labels = |ids: &[usize]| std::array::from_fn::<_, LABELS, _>(|id| ids.contains(&id));
        let read = [labels(&[27]), labels(&[27, 2]), labels(&[17, 2]), labels(&[2])];
        let meant = [labels(&[27]), labels(&[27]), labels(&[17]), labels(&[17])];
        assert!((agreement(&read, &meant) - 0.5).abs() < 1e-12);
    }

    #[test]
    fn sentences_of_another_form_are_refused_by_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sentences.tsv");
        for (text, wanted) in [
            ("fine\t3,4\tx\nno labels\n", "sentences.tsv, line 2: no tab between the text and its labels"),
            ("fine\t28\tx\n", "line 1: \"28\" is no label id from 0 to 27"),
            ("a\t-1,3", "\"-1\" is no label id from 0 to 27"),
            ("fine\tjoy\tx\n", "\"joy\" is no label id"),
            ("fine\t\tx\n", "\"\" is no label id"),
            ("\n", "holds no sentences"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = read_sentences(&path).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
        std::fs::write(&path, "Not bad.\t4,17\tid\n").unwrap();
        let read = read_sentences(&path).unwrap();
        assert!(read[0].labels[4] && read[0].labels[17] && read[0].text == "Not bad.");
        std::fs::write(&path, "a\t1, 2\tx\nb\t3\n").unwrap();
        let ids = |row: &Labelled| (0..LABELS).filter(|&id| row.labels[id]).collect::<Vec<_>>();
        let read: Vec<_> = read_sentences(&path).unwrap().iter().map(|row| (row.text.clone(), ids(row))).collect();
        assert_eq!(read, [("a".to_owned(), vec![1, 2]), ("b".to_owned(), vec![3])]);
    }
}
