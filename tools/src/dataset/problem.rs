//! What is wrong with single entries of a data set: collected, listed and counted, never passed over in silence.

use std::fmt;
use std::path::PathBuf;

/// Problems that a message spells out; of more it gives the number.
const LISTED: usize = 50;

/// What an entry's fault is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum ProblemKind {
    /// The entry is not of a form that is read.
    Form,
    /// The label names no emotion, or more than one.
    Label,
    /// The id stands twice.
    Duplicate,
    /// The clip or photograph is not there.
    Absent,
    /// The clip is there and cannot be used.
    Broken,
}

impl ProblemKind {
    const ALL: [ProblemKind; 5] = [Self::Form, Self::Label, Self::Duplicate, Self::Absent, Self::Broken];

    fn counted(self, count: usize) -> String {
        let (one, many) = match self {
            Self::Form => ("entry of no known form", "entries of no known form"),
            Self::Label => ("label that is none", "labels that are none"),
            Self::Duplicate => ("id given twice", "ids given twice"),
            Self::Absent => ("absent file", "absent files"),
            Self::Broken => ("broken clip", "broken clips"),
        };
        format!("{count} {}", if count == 1 { one } else { many })
    }
}

/// Something wrong with one entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file with the entry.
    pub file: PathBuf,
    /// Entry in it, from 1: a line, an element of a list or a row of a table.
    pub entry: usize,
    /// What it is about.
    pub kind: ProblemKind,
    /// What is wrong.
    pub reason: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, entry {}: {}", self.file.display(), self.entry, self.reason)
    }
}

/// Problems as a message: how many of which kind, then each on a line of its own.
#[derive(Debug)]
pub struct Problems(pub Vec<Problem>);

impl Problems {
    /// How many there are of each kind: "2 absent files, 1 broken clip".
    pub fn counts(problems: &[Problem]) -> String {
        let count = |kind| problems.iter().filter(|problem| problem.kind == kind).count();
        let counted = ProblemKind::ALL.into_iter().map(|kind| (kind, count(kind))).filter(|(_, count)| *count > 0);
        counted.map(|(kind, count)| kind.counted(count)).collect::<Vec<_>>().join(", ")
    }

    /// Says on the log which entries are left out of `total`, and why. Nothing to say without problems.
    pub fn warn(problems: &[Problem], total: usize) {
        if problems.is_empty() {
            return;
        }
        log::warn!("{} of {total} entries are skipped: {}", problems.len(), Self::counts(problems));
        problems.iter().for_each(|problem| log::warn!("skipped {problem}"));
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Self::counts(&self.0))?;
        for problem in self.0.iter().take(LISTED) {
            write!(f, "\n  {problem}")?;
        }
        match self.0.len().saturating_sub(LISTED) {
            0 => Ok(()),
            more => write!(f, "\n  and {more} more"),
        }
    }
}
