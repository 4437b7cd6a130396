//! Pairs of explanations of the same clip, and the draws that keep a rater from knowing which is whose: which of the two
//! is shown first and in which order pairs come are drawn anew for each rater, from a seed that the page never sees.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::explanations::{Entry, Explanation};
use crate::files::hexadecimal;

/// Bytes of a digest that stand for it: enough that no two of a data set are ever the same.
const KEY_BYTES: usize = 12;

/// Two explanations of one clip.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The clip's id.
    pub id: String,
    /// What names the pair in the file of votes: a digest of the id and both explanations, so that no vote is ever
    /// counted for texts that its rater has not read.
    pub key: String,
    /// The explanation of the first file.
    pub a: Explanation,
    /// The explanation of the second file.
    pub b: Explanation,
}

/// The pairs to be shown, and how many could not be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pairs {
    /// Pairs, in the order of their keys, which is as good as random.
    pub list: Vec<Pair>,
    /// Pairs left out because both say the same.
    pub identical: usize,
    /// Pairs left out because one has no rationale or both have none.
    pub silent: usize,
    /// Ids that stand in one file alone.
    pub unpaired: usize,
    /// Pairs left out because there is no such clip.
    pub without_clip: usize,
}

/// Which explanation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// That of the first file.
    A,
    /// That of the second file.
    B,
}

impl Pairs {
    /// Pairs what the files say of the clips that `has_clip` knows.
    pub fn new(a: Vec<Entry>, b: Vec<Entry>, has_clip: impl Fn(&str) -> bool) -> Pairs {
        let mut pairs = Pairs::default();
        let mut others: HashMap<String, Option<Explanation>> = b.into_iter().collect();
        for (id, a) in a {
            match (a, others.remove(&id)) {
                (_, None) => pairs.unpaired += 1,
                (None, _) | (_, Some(None)) => pairs.silent += 1,
                (Some(a), Some(Some(b))) if same(&a, &b) => pairs.identical += 1,
                _ if !has_clip(&id) => pairs.without_clip += 1,
                (Some(a), Some(Some(b))) => {
                    let key = short(&[b"pair", id.as_bytes(), &digest_of(&a), &digest_of(&b)]);
                    pairs.list.push(Pair { id, key, a, b });
                }
            }
        }
        pairs.unpaired += others.len();
        pairs.list.sort_by(|one, other| one.key.cmp(&other.key));
        pairs
    }

    /// Digest of all pairs: files of votes on the same pairs can be counted together.
    pub fn digest(&self) -> String {
        short(&self.list.iter().map(|pair| pair.key.as_bytes()).collect::<Vec<_>>())
    }

    /// Keeps the first so many; the same ones for every rater and on every machine.
    pub fn limit(&mut self, most: usize) {
        self.list.truncate(most);
    }

    /// The ids of the clips.
    pub fn ids(&self) -> HashSet<&str> {
        self.list.iter().map(|pair| pair.id.as_str()).collect()
    }
}

/// The draws of one file of votes.
#[derive(Clone, Copy, Debug)]
pub struct Draw {
    /// Where they come from. It stands in the file of votes, so that they are the same after a restart.
    pub seed: u64,
}

impl Draw {
    /// Places of the pairs in the order in which a rater gets them.
    pub fn order(&self, rater: &str, pairs: &[Pair]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..pairs.len()).collect();
        order.sort_by_cached_key(|&place| self.digest(&[b"order", rater.as_bytes(), pairs[place].key.as_bytes()]));
        order
    }

    /// The explanation that a rater is shown first.
    pub fn first(&self, rater: &str, pair: &Pair) -> Side {
        match self.digest(&[b"first", rater.as_bytes(), pair.key.as_bytes()])[0] & 1 {
            0 => Side::A,
            _ => Side::B,
        }
    }

    /// What names a pair towards the page: its key is made of both texts in their order, and would tell one who has
    /// the texts which is whose.
    pub fn token(&self, pair: &Pair) -> String {
        hexadecimal(&self.digest(&[b"token", pair.key.as_bytes()])[..KEY_BYTES])
    }

    /// What names a clip towards the page; its file name may hold its label.
    pub fn clip_token(&self, id: &str) -> String {
        hexadecimal(&self.digest(&[b"clip", id.as_bytes()])[..KEY_BYTES])
    }

    fn digest(&self, parts: &[&[u8]]) -> [u8; 32] {
        let seed = self.seed.to_le_bytes();
        digest(std::iter::once(seed.as_slice()).chain(parts.iter().copied()))
    }
}

fn same(a: &Explanation, b: &Explanation) -> bool {
    a.answer == b.answer && a.text.split_whitespace().eq(b.text.split_whitespace())
}

fn digest_of(explanation: &Explanation) -> [u8; 32] {
    let answer = explanation.answer.as_deref();
    let known = [u8::from(answer.is_some())];
    digest([explanation.text.as_bytes(), known.as_slice(), answer.unwrap_or_default().as_bytes()])
}

fn short(parts: &[&[u8]]) -> String {
    hexadecimal(&digest(parts.iter().copied())[..KEY_BYTES])
}

/// Digest of parts, each with its length before it, so that no two lists of parts run into the same bytes.
fn digest<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: &str, text: &str) -> Entry {
        (id.to_owned(), (!text.is_empty()).then(|| Explanation { text: text.to_owned(), answer: None }))
    }

    fn many(count: usize) -> Pairs {
        let side = |name: &str| (0..count).map(|i| entry(&i.to_string(), &format!("{name} {i}"))).collect();
        Pairs::new(side("a"), side("b"), |_| true)
    }

    #[test]
    fn what_cannot_be_compared_is_counted() {
        let a = vec![entry("1", "x"), entry("2", "x  y"), entry("3", ""), entry("4", "x"), entry("5", "x")];
        let b = vec![entry("6", "x"), entry("5", "z"), entry("4", ""), entry("2", "x\ny"), entry("7", "x")];
        let pairs = Pairs::new(a.clone(), b.clone(), |_| true);
        assert_eq!(pairs.ids(), HashSet::from(["5"]));
        assert_eq!((pairs.identical, pairs.silent, pairs.unpaired, pairs.without_clip), (1, 1, 4, 0));
        let pairs = Pairs::new(a, b, |_| false);
        assert_eq!((pairs.list.len(), pairs.without_clip), (0, 1));
    }

    #[test]
    fn the_same_text_with_another_answer_is_another_explanation() {
        let with = |answer: Option<&str>| {
            vec![("1".to_owned(), Some(Explanation { text: "x".into(), answer: answer.map(str::to_owned) }))]
        };
        assert_eq!(Pairs::new(with(Some("sad")), with(Some("happy")), |_| true).list.len(), 1);
        assert_eq!(Pairs::new(with(None), with(Some("")), |_| true).list.len(), 1);
        assert_eq!(Pairs::new(with(Some("sad")), with(Some("sad")), |_| true).identical, 1);
    }

    #[test]
    fn keys_hold_to_the_texts_and_to_which_is_whose() {
        let one = Pairs::new(vec![entry("1", "x")], vec![entry("1", "y")], |_| true);
        let turned = Pairs::new(vec![entry("1", "y")], vec![entry("1", "x")], |_| true);
        let other = Pairs::new(vec![entry("1", "x")], vec![entry("1", "z")], |_| true);
        assert_ne!(one.list[0].key, turned.list[0].key);
        assert_ne!(one.list[0].key, other.list[0].key);
        assert_ne!(one.digest(), turned.digest());
        let (mut few, all) = (many(9), many(9));
        few.limit(4);
        assert_eq!(few.list, all.list[..4]);
    }

    #[test]
    fn raters_differ_in_order_and_sides_and_each_keeps_its_own() {
        let pairs = many(200).list;
        let draw = Draw { seed: 5 };
        let mut order = draw.order("anna", &pairs);
        assert_eq!(order, draw.order("anna", &pairs));
        assert_ne!(order, draw.order("ben", &pairs));
        assert_ne!(order, Draw { seed: 6 }.order("anna", &pairs));
        order.sort_unstable();
        assert_eq!(order, (0..200).collect::<Vec<_>>());

        let sides = |draw: Draw, rater: &str| pairs.iter().map(|pair| draw.first(rater, pair)).collect::<Vec<_>>();
        let anna = sides(draw, "anna");
        let a_first = anna.iter().filter(|&&side| side == Side::A).count();
        // 100 expected; outside these bounds with a probability of less than one in a million.
        assert!((65..=135).contains(&a_first), "{a_first}");
        assert_ne!(anna, sides(draw, "ben"));
        assert_ne!(anna, sides(Draw { seed: 6 }, "anna"));
        assert_ne!(draw.token(&pairs[0]), pairs[0].key);
        assert_ne!(draw.token(&pairs[0]), Draw { seed: 6 }.token(&pairs[0]));
    }
}
