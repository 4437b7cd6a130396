//! The file of votes: a first line that says what is compared, then a line a vote, only ever appended to. A vote is on
//! the disk before its rater sees the next pair, so that neither a crash of the program nor of the machine loses one.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};

use super::pairs::Side;

/// Form of the file.
pub const VERSION: u32 = 1;
/// How much of a line that was cut off is quoted.
const QUOTED: usize = 80;

/// What a rater is asked of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Question {
    /// Which explanation fits the face better.
    Fits,
    /// Which is more coherent.
    Coherent,
}

impl Question {
    /// Both, in the order in which they are asked.
    pub const ALL: [Question; 2] = [Question::Fits, Question::Coherent];
}

/// An answer, as it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// The explanation of the first file.
    A,
    /// Neither is better.
    Tie,
    /// The explanation of the second file.
    B,
}

/// The first line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Form of the file.
    pub version: u32,
    /// The first file of explanations, as it was given.
    pub a: String,
    /// The second.
    pub b: String,
    /// Where the draws come from.
    pub seed: u64,
    /// Digest of all pairs.
    pub digest: String,
    /// Pairs that can be shown.
    pub pairs: usize,
    /// Pairs left out because both say the same.
    pub identical: usize,
    /// Pairs left out because one has no rationale or both have none.
    pub silent: usize,
    /// Ids that stand in one file alone.
    pub unpaired: usize,
    /// Pairs left out because there is no such clip.
    pub without_clip: usize,
}

impl Header {
    /// What was left out and why; empty where nothing was.
    pub fn left_out(&self) -> String {
        let reasons = [
            (self.identical, "the same in both files"),
            (self.silent, "without a rationale"),
            (self.unpaired, "in one file alone"),
            (self.without_clip, "without a clip"),
        ];
        let reasons = reasons.iter().filter(|(count, _)| *count > 0);
        reasons.map(|(count, why)| format!("{count} {why}")).collect::<Vec<_>>().join(", ")
    }
}

/// A vote, or the withdrawal of one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Vote {
    /// Who.
    pub rater: String,
    /// The pair's key.
    pub pair: String,
    /// The clip's id, for people who read the file.
    pub id: String,
    /// What was asked.
    pub question: Question,
    /// The answer; `None` withdraws the one before. A line without it is no withdrawal.
    #[serde(deserialize_with = "Option::deserialize")]
    pub choice: Option<Choice>,
    /// The explanation that was shown first.
    pub first: Side,
    /// When, in seconds since 1970.
    pub time_s: f64,
}

impl Vote {
    /// Seconds since 1970, in thousandths.
    pub fn now() -> f64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        since.as_millis() as f64 / 1000.0
    }
}

/// A rater's question about a pair.
type Place = (String, String, Question);

/// The votes that stand, after all withdrawals.
#[derive(Clone, Debug, Default)]
pub struct Standing {
    votes: HashMap<Place, Vote>,
    /// Places in the order of their votes, by rater.
    history: HashMap<String, Vec<(String, Question)>>,
}

impl Standing {
    fn take(&mut self, vote: Vote) {
        let history = self.history.entry(vote.rater.clone()).or_default();
        history.retain(|(pair, question)| (pair, *question) != (&vote.pair, vote.question));
        let place = (vote.rater.clone(), vote.pair.clone(), vote.question);
        if vote.choice.is_some() {
            history.push((vote.pair.clone(), vote.question));
            self.votes.insert(place, vote);
        } else {
            self.votes.remove(&place);
        }
    }

    /// A rater's vote.
    pub fn get(&self, rater: &str, pair: &str, question: Question) -> Option<&Vote> {
        self.votes.get(&(rater.to_owned(), pair.to_owned(), question))
    }

    /// The places of a rater's votes, the latest first.
    pub fn latest(&self, rater: &str) -> impl Iterator<Item = (&str, Question)> {
        let history = self.history.get(rater).map(Vec::as_slice).unwrap_or_default();
        history.iter().rev().map(|(pair, question)| (pair.as_str(), *question))
    }

    /// All votes, in no order.
    pub fn all(&self) -> impl Iterator<Item = &Vote> {
        self.votes.values()
    }
}

/// A file of votes as it was read.
#[derive(Debug)]
pub struct Kept {
    /// The first line; `None` where the file is empty.
    pub header: Option<Header>,
    /// What stands.
    pub standing: Standing,
    /// Bytes of whole lines.
    whole: u64,
    /// What stands behind them: the beginning of a line that a crash cut short.
    pub torn: Option<String>,
    /// Whether the last line is whole but for its end.
    unended: bool,
}

/// Reads a file of votes. A last line that a crash cut short was never confirmed to its rater: it is no vote. Any other
/// line that cannot be read is an error.
pub fn read(path: &Path) -> anyhow::Result<Kept> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut kept = Kept { header: None, standing: Standing::default(), whole: 0, torn: None, unended: false };
    for (index, line) in bytes.split_inclusive(|&byte| byte == b'\n').enumerate() {
        let ended = line.ends_with(b"\n");
        let result = if line.trim_ascii().is_empty() && index > 0 {
            Ok(())
        } else if index == 0 {
            serde_json::from_slice(line).map(|header: Header| kept.header = Some(header))
        } else {
            serde_json::from_slice(line).map(|vote: Vote| kept.standing.take(vote))
        };
        match result {
            Ok(()) => {
                kept.whole += line.len() as u64;
                kept.unended = !ended;
            }
            Err(_) if !ended => kept.torn = Some(quote(line)),
            Err(error) if index == 0 => bail!("{} is no file of votes: {error}", path.display()),
            Err(error) => bail!("{}, line {}, is no vote: {error}", path.display(), index + 1),
        }
    }
    if let Some(header) = &kept.header {
        let version = header.version;
        ensure!(version == VERSION, "{} is of form {version}; this program reads {VERSION}", path.display());
    }
    Ok(kept)
}

/// A torn line as it may stand in a message.
fn quote(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let short: String = text.chars().take(QUOTED).collect();
    format!("{short:?}{}", if short.len() < text.len() { " …" } else { "" })
}

/// A file of votes that is being added to. No other process can open it meanwhile.
#[derive(Debug)]
pub struct Votes {
    path: PathBuf,
    file: File,
    /// Bytes that are safe.
    len: u64,
    /// Whether something that is no whole line may stand behind them.
    torn: bool,
    /// The first line.
    pub header: Header,
    /// What stands.
    pub standing: Standing,
}

impl Votes {
    /// Opens a file of votes, or begins one with `header`. `seed` is what was asked for; otherwise that of the file
    /// counts, or the header's for a new one.
    ///
    /// # Errors
    /// The file cannot be used, is in use, or is of other explanations or another seed.
    pub fn open(path: &Path, header: Header, seed: Option<u64>) -> anyhow::Result<Votes> {
        let failed = || format!("cannot write {}", path.display());
        let is_new = !path.exists();
        let file = OpenOptions::new().read(true).append(true).create(true).open(path).with_context(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                bail!("{} is in use by another candor-tools rate; end that first", path.display())
            }
            // Not every file system has locks.
            Err(TryLockError::Error(error)) => log::warn!("{} cannot be locked: {error}", path.display()),
        }
        if is_new {
            sync_folder(path).with_context(failed)?;
        }
        let kept = read(path)?;
        let mut votes =
            Votes { path: path.into(), file, len: kept.whole, torn: false, header, standing: kept.standing };
        if let Some(torn) = kept.torn {
            let kept = votes.standing.votes.len();
            log::warn!(
                "{}: the last line was cut short, so its vote was never confirmed; it is taken out, {kept} votes stand. \
                 It read {torn}",
                path.display()
            );
            votes.file.set_len(votes.len).and_then(|()| votes.file.sync_all()).with_context(failed)?;
        }
        if kept.unended {
            votes.write(b"\n").with_context(failed)?;
        }
        match kept.header {
            None => {
                let line = serde_json::to_string(&votes.header)?;
                votes.write(format!("{line}\n").as_bytes()).with_context(failed)?;
            }
            Some(header) => {
                if header.digest != votes.header.digest {
                    bail!(
                        "{} holds votes on other pairs, of {} and {}; give another file to --votes",
                        path.display(),
                        header.a,
                        header.b
                    );
                }
                if let Some(seed) = seed.filter(|&seed| seed != header.seed) {
                    bail!(
                        "{} was begun with seed {}, not {seed}; leave --seed out, or give another file to --votes",
                        path.display(),
                        header.seed
                    );
                }
                votes.header = header;
            }
        }
        Ok(votes)
    }

    /// Puts a vote on the disk, then counts it. After an error nothing of it is kept.
    pub fn add(&mut self, vote: Vote) -> io::Result<()> {
        let line = serde_json::to_string(&vote)?;
        self.write(format!("{line}\n").as_bytes())?;
        self.standing.take(vote);
        Ok(())
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if self.torn {
            self.file.set_len(self.len)?;
            self.torn = false;
        }
        let written = self.file.write_all(line).and_then(|()| self.file.sync_data());
        match written {
            Ok(()) => self.len += line.len() as u64,
            Err(_) => self.torn = self.file.set_len(self.len).is_err(),
        }
        written
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A new file is there after a crash only once its folder's entry is on the disk.
fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    pub(in crate::rate) fn header() -> Header {
        Header {
            version: VERSION,
            a: "plain.jsonl".into(),
            b: "tuned.jsonl".into(),
            seed: 3,
            digest: "d".into(),
            pairs: 4,
            identical: 1,
            silent: 0,
            unpaired: 0,
            without_clip: 0,
        }
    }

    pub(in crate::rate) fn vote(rater: &str, pair: &str, question: Question, choice: Option<Choice>) -> Vote {
        Vote { rater: rater.into(), pair: pair.into(), id: pair.into(), question, choice, first: Side::B, time_s: 1.5 }
    }

    fn choice(votes: &Votes, pair: &str) -> Option<Choice> {
        votes.standing.get("anna", pair, Question::Fits).and_then(|vote| vote.choice)
    }

    fn fits(pair: &str, choice: Choice) -> Vote {
        vote("anna", pair, Question::Fits, Some(choice))
    }

    #[test]
    fn votes_are_there_again_and_withdrawn_ones_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("votes.jsonl");
        let mut votes = Votes::open(&path, header(), None).unwrap();
        votes.add(fits("1", Choice::A)).unwrap();
        votes.add(fits("2", Choice::Tie)).unwrap();
        votes.add(vote("anna", "2", Question::Coherent, Some(Choice::B))).unwrap();
        votes.add(vote("anna", "2", Question::Fits, None)).unwrap();
        votes.add(vote("ben", "1", Question::Fits, Some(Choice::B))).unwrap();
        // What is added is on the disk at once, not when the file is closed.
        assert_eq!(read(&path).unwrap().standing.all().count(), 3);
        assert!(Votes::open(&path, header(), None).unwrap_err().to_string().contains("in use by another"));
        drop(votes);

        let mut votes = Votes::open(&path, Header { seed: 9, ..header() }, None).unwrap();
        assert_eq!(votes.header.seed, 3);
        assert_eq!((choice(&votes, "1"), choice(&votes, "2")), (Some(Choice::A), None));
        let latest: Vec<_> = votes.standing.latest("anna").collect();
        assert_eq!(latest, [("2", Question::Coherent), ("1", Question::Fits)]);
        votes.add(fits("2", Choice::B)).unwrap();
        drop(votes);
        assert_eq!(choice(&Votes::open(&path, header(), Some(3)).unwrap(), "2"), Some(Choice::B));
    }

    #[test]
    fn other_explanations_or_another_seed_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("votes.jsonl");
        drop(Votes::open(&path, header(), None).unwrap());
        let before = std::fs::read(&path).unwrap();
        let other = Header { digest: "e".into(), ..header() };
        let error = Votes::open(&path, other, None).unwrap_err().to_string();
        assert!(error.contains("of plain.jsonl and tuned.jsonl"), "{error}");
        let error = Votes::open(&path, header(), Some(4)).unwrap_err().to_string();
        assert!(error.contains("seed 3, not 4"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }

    #[test]
    fn wherever_a_crash_cuts_the_file_whole_votes_stay() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("votes.jsonl");
        let mut votes = Votes::open(&path, header(), None).unwrap();
        votes.add(fits("1", Choice::A)).unwrap();
        votes.add(fits("ü2", Choice::B)).unwrap();
        drop(votes);
        let whole = std::fs::read(&path).unwrap();
        let ends: Vec<usize> = (0..whole.len()).filter(|&i| whole[i] == b'\n').collect();
        for cut in 0..=whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let mut votes = Votes::open(&path, header(), None).unwrap();
            // A line that lacks nothing but its end is whole.
            let lines = ends.iter().filter(|&&end| cut >= end).count();
            assert_eq!(votes.standing.all().count(), lines.saturating_sub(1), "cut at {cut}");
            votes.add(fits("3", Choice::Tie)).unwrap();
            drop(votes);
            let kept = read(&path).unwrap();
            assert_eq!((kept.torn, kept.standing.all().count()), (None, lines.saturating_sub(1) + 1), "cut at {cut}");
        }
        // A disk that lost power may leave zeros.
        std::fs::write(&path, [whole.as_slice(), &[0; 512]].concat()).unwrap();
        assert!(read(&path).unwrap().torn.unwrap().starts_with("\"\\0"));
        assert_eq!(Votes::open(&path, header(), None).unwrap().standing.all().count(), 2);
    }

    #[test]
    fn a_damaged_line_within_is_named_and_nothing_is_changed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("votes.jsonl");
        let mut votes = Votes::open(&path, header(), None).unwrap();
        votes.add(fits("1", Choice::A)).unwrap();
        drop(votes);
        let damaged = std::fs::read_to_string(&path).unwrap() + "{\"rater\": \"anna\"\n{}\n";
        std::fs::write(&path, &damaged).unwrap();
        let error = Votes::open(&path, header(), None).unwrap_err().to_string();
        assert!(error.contains("line 3, is no vote"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), damaged);
        std::fs::write(&path, "{\"id\": 1, \"rationale\": \"x\"}\n").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("is no file of votes"));
        std::fs::write(&path, serde_json::to_string(&Header { version: 2, ..header() }).unwrap()).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("is of form 2"));
    }

    #[test]
    fn a_vote_that_cannot_be_written_is_not_counted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("votes.jsonl");
        let mut votes = Votes::open(&path, header(), None).unwrap();
        votes.add(fits("1", Choice::A)).unwrap();
        // As on a full disk: part of a line is there, and no more can be written, nor cut.
        let good = std::mem::replace(&mut votes.file, File::open(&path).unwrap());
        let mut tail = OpenOptions::new().append(true).open(&path).unwrap();
        tail.write_all(b"{\"rater\": \"an").unwrap();
        assert!(votes.add(fits("2", Choice::A)).is_err());
        assert_eq!((choice(&votes, "1"), choice(&votes, "2")), (Some(Choice::A), None));
        votes.file = good;
        votes.add(fits("2", Choice::B)).unwrap();
        let kept = read(&path).unwrap();
        assert_eq!((kept.torn, kept.standing.all().count()), (None, 2));
    }
}
