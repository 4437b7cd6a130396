//! How probable each label is as the model's next words, summed over every way the tokens can spell it.
//!
//! A label's probability is that of all token sequences whose text is the label followed by at least the first byte of
//! the closing tag, ending with the first token for which this holds and no other label is possible any more. The
//! model's own probabilities count, over its whole vocabulary. Sequences are followed most probable first until what is
//! left cannot matter; how much that is at most is reported.

use std::collections::HashMap;
use std::sync::Arc;

use candor_kernels::choice::{check_finite, exponential};

use super::automaton::ANSWER_CLOSE;
use super::grammar::{GrammarError, check_labels};
use super::sampling::SamplingError;
use super::token_table::TokenTable;
use crate::model::{DecodeError, LanguageModel};

/// Why labels could not be scored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabelError {
    /// The decoder failed.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The model's output is not a number.
    #[error(transparent)]
    Logits(#[from] SamplingError),
    /// The tokens that begin the answer are unknown.
    #[error("the answer's opening tag has no tokens")]
    NoOpening,
    /// No label has any probability.
    #[error("the model gives none of the labels any probability within {steps} steps")]
    NoLabel {
        /// Model steps taken.
        steps: usize,
    },
}

/// How far to look.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LabelSearch {
    /// Stop when all that is unexplored is at most this share of what was found.
    pub tolerance: f64,
    /// Model steps at most.
    pub max_steps: usize,
}

impl Default for LabelSearch {
    fn default() -> LabelSearch {
        LabelSearch { tolerance: 1e-6, max_steps: 192 }
    }
}

/// How probable each label is.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelProbabilities {
    /// One for each label, in the order of the label set; together 1.
    pub probabilities: Vec<f64>,
    /// Probability of all labels together before they were normalised: how sure the model is to answer with a label.
    pub mass: f64,
    /// Probability of the sequences that were not followed: no label's probability, before it was normalised, can be
    /// greater by more than this.
    pub unexplored: f64,
    /// Model steps taken.
    pub steps: usize,
}

impl LabelProbabilities {
    /// Index of the most probable label, the first of equals.
    pub fn best(&self) -> usize {
        let mut best = 0;
        for (index, probability) in self.probabilities.iter().enumerate() {
            if *probability > self.probabilities[best] {
                best = index;
            }
        }
        best
    }
}

/// Scores the labels of one label set with one vocabulary.
#[derive(Debug, Clone)]
pub struct LabelScorer {
    table: Arc<TokenTable>,
    labels: Vec<String>,
}

impl LabelScorer {
    /// A scorer over the same tokens and labels as the [`Grammar`](super::grammar::Grammar); refuses the same labels.
    pub fn new(table: Arc<TokenTable>, labels: &[String]) -> Result<LabelScorer, GrammarError> {
        check_labels(labels)?;
        Ok(LabelScorer { table, labels: labels.to_vec() })
    }

    /// The labels, in the order of the probabilities.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// The fast answer: how probable each label is when the assistant's turn begins with `<answer>`. The cache holds
    /// the prompt, up to where the assistant begins; `opening` are the tokens of `<answer>`. The cache is as it was
    /// afterwards.
    ///
    /// All but the last of the opening tokens are given to the model and the last one's bytes are spelled with the
    /// label, so that tokens that join the tag's `>` to a label's first letters are read right.
    pub fn score_fast<M: LanguageModel + ?Sized>(
        &self,
        model: &mut M,
        opening: &[u32],
        search: &LabelSearch,
    ) -> Result<LabelProbabilities, LabelError> {
        let prompt = model.position();
        let (&last, first) = opening.split_last().ok_or(LabelError::NoOpening)?;
        let (given, rest) = if first.is_empty() { (opening, &[][..]) } else { (first, self.table.bytes(last)) };
        model.append(given)?;
        let scored = self.score(model, rest, search);
        model.truncate(prompt)?;
        scored
    }

    /// How probable it is that the text goes on with `rest` and then each label. The cache must hold the text before
    /// `rest`, and is as it was afterwards. Places in the cache that the longest label needs should be free; what does
    /// not fit counts as unexplored.
    pub fn score<M: LanguageModel + ?Sized>(
        &self,
        model: &mut M,
        rest: &[u8],
        search: &LabelSearch,
    ) -> Result<LabelProbabilities, LabelError> {
        let start = model.position();
        let mut walk = Walk::new(&self.table, Spellings::new(&self.table, rest, &self.labels));
        let explored = walk.explore(model, start, search);
        if model.position() != start {
            model.truncate(start)?;
        }
        explored?;
        let mass: f64 = walk.found.iter().sum();
        if mass <= 0.0 {
            return Err(LabelError::NoLabel { steps: walk.steps });
        }
        let probabilities = walk.found.iter().map(|found| found / mass).collect();
        Ok(LabelProbabilities { probabilities, mass, unexplored: walk.unexplored, steps: walk.steps })
    }
}

/// A trie of what the labels spell, from the cache's end on: `rest`, the label, the closing tag.
struct Spellings {
    nodes: Vec<SpellingNode>,
    /// For each label, the fewest tokens from each depth of its spelling to where it is decided.
    to_go: Vec<Vec<usize>>,
}

struct SpellingNode {
    children: HashMap<u8, usize>,
    /// Labels whose spelling passes here.
    labels: Vec<usize>,
    depth: usize,
    /// The label that has been given, once this is sure.
    decided: Option<usize>,
}

impl Spellings {
    fn new(table: &TokenTable, rest: &[u8], labels: &[String]) -> Spellings {
        let node = |depth| SpellingNode { children: HashMap::new(), labels: Vec::new(), depth, decided: None };
        let mut nodes = vec![node(0)];
        let mut paths = Vec::new();
        for (index, label) in labels.iter().enumerate() {
            let spelling: Vec<u8> = rest.iter().copied().chain(label.bytes()).chain(ANSWER_CLOSE.bytes()).collect();
            let mut at = 0;
            let mut path = vec![at];
            nodes[at].labels.push(index);
            for &byte in &spelling {
                let fresh = nodes.len();
                let depth = path.len();
                at = *nodes[at].children.entry(byte).or_insert(fresh);
                if at == fresh {
                    nodes.push(node(depth));
                }
                nodes[at].labels.push(index);
                path.push(at);
            }
            paths.push((spelling, path));
        }
        for node in &mut nodes {
            if let &[label] = node.labels.as_slice() {
                node.decided = (node.depth > rest.len() + labels[label].len()).then_some(label);
            }
        }
        let to_go = paths
            .iter()
            .map(|(spelling, path)| {
                let mut to_go = vec![usize::MAX; path.len()];
                for depth in (0..path.len()).rev() {
                    if nodes[path[depth]].decided.is_some() {
                        to_go[depth] = 0;
                        continue;
                    }
                    let mut fewest = usize::MAX;
                    table.walk(
                        depth,
                        |at, byte| (spelling.get(at) == Some(&byte)).then_some(at + 1),
                        |_, at| fewest = fewest.min(to_go[at].saturating_add(1)),
                    );
                    to_go[depth] = fewest;
                }
                to_go
            })
            .collect();
        Spellings { nodes, to_go }
    }

    /// Fewest tokens from a node to where a label is decided; `None` if the label is not spelled through this node or
    /// tokens cannot spell it.
    fn to_go(&self, node: usize, label: usize) -> Option<usize> {
        let node = &self.nodes[node];
        let to_go = *self.to_go[label].get(node.depth)?;
        (node.labels.contains(&label) && to_go != usize::MAX).then_some(to_go)
    }
}

/// A token sequence that has not decided on a label yet.
struct Branch {
    probability: f64,
    tokens: Vec<u32>,
    node: usize,
}

/// The search in progress.
struct Walk<'a> {
    table: &'a TokenTable,
    spellings: Spellings,
    open: Vec<Branch>,
    /// Probability found for each label.
    found: Vec<f64>,
    /// Whether some sequence of each label has been followed to its end.
    reached: Vec<bool>,
    unexplored: f64,
    steps: usize,
}

impl<'a> Walk<'a> {
    fn new(table: &'a TokenTable, spellings: Spellings) -> Walk<'a> {
        let labels = spellings.to_go.len();
        Walk {
            table,
            spellings,
            open: Vec::new(),
            found: vec![0.0; labels],
            reached: vec![false; labels],
            unexplored: 0.0,
            steps: 0,
        }
    }

    fn explore<M: LanguageModel + ?Sized>(
        &mut self,
        model: &mut M,
        start: usize,
        search: &LabelSearch,
    ) -> Result<(), LabelError> {
        // Tokens in the cache behind `start`.
        let mut cached: Vec<u32> = Vec::new();
        self.expand(model.logits()?, &Branch { probability: 1.0, tokens: Vec::new(), node: 0 })?;
        while let Some(index) = self.next_branch(search) {
            let branch = self.open.swap_remove(index);
            if start + branch.tokens.len() > model.capacity() {
                self.unexplored += branch.probability;
                continue;
            }
            let shared = cached.iter().zip(&branch.tokens).take_while(|(a, b)| a == b).count();
            if shared < cached.len() {
                model.truncate(start + shared)?;
            }
            if shared < branch.tokens.len() {
                model.append(&branch.tokens[shared..])?;
            }
            self.steps += 1;
            self.expand(model.logits()?, &branch)?;
            cached = branch.tokens;
        }
        self.unexplored += self.open.iter().map(|branch| branch.probability).sum::<f64>();
        Ok(())
    }

    /// The branch to follow next: the shortest way to a label that has none yet, so that every label gets its say
    /// however early the search ends; then the most probable. `None` when the rest cannot matter.
    fn next_branch(&self, search: &LabelSearch) -> Option<usize> {
        if self.steps >= search.max_steps {
            return None;
        }
        let branches = || self.open.iter().enumerate();
        for label in 0..self.reached.len() {
            if self.reached[label] {
                continue;
            }
            let shortest = branches()
                .filter_map(|(index, branch)| Some((index, branch, self.spellings.to_go(branch.node, label)?)))
                .min_by(|a, b| a.2.cmp(&b.2).then(b.1.probability.total_cmp(&a.1.probability)));
            if let Some((index, _, _)) = shortest {
                return Some(index);
            }
        }
        let left: f64 = self.open.iter().map(|branch| branch.probability).sum();
        if left <= search.tolerance * self.found.iter().sum::<f64>() {
            return None;
        }
        branches()
            .max_by(|a, b| a.1.probability.total_cmp(&b.1.probability).then(b.0.cmp(&a.0)))
            .map(|(index, _)| index)
    }

    /// Adds what each token behind a branch leads to. `logits` `[vocabulary]` are those behind the branch's tokens.
    fn expand(&mut self, logits: &[f32], branch: &Branch) -> Result<(), LabelError> {
        check_finite(logits)?;
        let greatest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let total: f64 = logits.iter().map(|&logit| exponential(f64::from(logit) - greatest)).sum();
        let nodes = &self.spellings.nodes;
        let (open, found, reached) = (&mut self.open, &mut self.found, &mut self.reached);
        self.table.walk(
            branch.node,
            |node, byte| nodes[node].children.get(&byte).copied(),
            |token, node| {
                let Some(&logit) = logits.get(token as usize) else { return };
                let probability = branch.probability * (exponential(f64::from(logit) - greatest) / total);
                if let Some(label) = nodes[node].decided {
                    found[label] += probability;
                    reached[label] = true;
                } else {
                    let tokens = branch.tokens.iter().copied().chain([token]).collect();
                    open.push(Branch { probability, tokens, node });
                }
            },
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::toy::{STRADDLING, ToyModel, labels, table, table_with_bytes};

    /// The definition, by trying every token sequence: probability of each label behind `rest`, not normalised.
    fn brute_force(model: &mut ToyModel, table: &TokenTable, rest: &[u8], labels: &[String]) -> Vec<f64> {
        let mut found = vec![0.0; labels.len()];
        follow(model, table, rest, labels, &mut Vec::new(), 1.0, &mut found);
        found
    }

    fn follow(
        model: &mut ToyModel,
        table: &TokenTable,
        rest: &[u8],
        labels: &[String],
        text: &mut Vec<u8>,
        probability: f64,
        found: &mut [f64],
    ) {
        let logits = model.logits().expect("it has them");
        let logits: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
        let total: f64 = logits.iter().map(|logit| logit.exp()).sum();
        let position = model.position();
        for id in 0..table.vocabulary() as u32 {
            let bytes = table.bytes(id);
            if bytes.is_empty() {
                continue;
            }
            let length = text.len();
            text.extend_from_slice(bytes);
            let probability = probability * logits[id as usize].exp() / total;
            let possible: Vec<usize> = (0..labels.len())
                .filter(|&label| [rest, labels[label].as_bytes(), b"</answer>"].concat().starts_with(text))
                .collect();
            match possible[..] {
                [] => {}
                [label] if text.len() > rest.len() + labels[label].len() => found[label] += probability,
                _ => {
                    model.append(&[id]).expect("the cache is large");
                    follow(model, table, rest, labels, text, probability, found);
                    model.truncate(position).expect("the position is in the cache");
                }
            }
            text.truncate(length);
        }
    }

    fn odd_table() -> Arc<TokenTable> {
        let tokens: [&[u8]; 20] = [
            b">",
            b">s",
            b"s",
            b"a",
            b"d",
            b"sa",
            b"ad",
            b"sad",
            b"ness",
            b"n",
            b"es",
            b"s</",
            b"<",
            b"</answer>",
            b"ness<",
            b"d<",
            b"<x",
            b"x<",
            b"x",
            b"an",
        ];
        table(&tokens)
    }

    #[test]
    fn probabilities_are_those_of_all_spellings() {
        let labels: Vec<String> = ["sad", "sadness", "sad<x", "an"].map(String::from).to_vec();
        let table = odd_table();
        let scorer = LabelScorer::new(Arc::clone(&table), &labels).expect("the labels are sound");
        let everything = LabelSearch { tolerance: 0.0, max_steps: 10_000 };
        for seed in 0..10 {
            for rest in [&b""[..], b">"] {
                let mut model = ToyModel::random(table.vocabulary(), 50, seed, 3.0);
                let expected = brute_force(&mut model, &table, rest, &labels);
                let scored = scorer.score(&mut model, rest, &everything).expect("the labels can be spelled");
                assert_eq!(model.position(), 1, "the cache is as it was");
                assert_eq!(scored.unexplored, 0.0);
                let mass: f64 = expected.iter().sum();
                assert!((scored.mass / mass - 1.0).abs() < 1e-12, "{} {mass}", scored.mass);
                for (found, expected) in scored.probabilities.iter().zip(&expected) {
                    assert!((found - expected / mass).abs() < 1e-12, "{scored:?} {expected}");
                }

                // A search cut short is off by no more than it says.
                for max_steps in 0..25 {
                    let search = LabelSearch { tolerance: 1e-3, max_steps };
                    let Ok(scored) = scorer.score(&mut model, rest, &search) else { continue };
                    assert!(scored.steps <= max_steps);
                    for (found, expected) in scored.probabilities.iter().zip(&expected) {
                        let missing = expected - found * scored.mass;
                        assert!((-1e-12..=scored.unexplored + 1e-12).contains(&missing), "{max_steps}: {missing}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_label_is_heard_within_few_steps() {
        let table = table_with_bytes(&STRADDLING);
        let scorer = LabelScorer::new(Arc::clone(&table), &labels()).expect("the labels are sound");
        let mut model = ToyModel::random(table.vocabulary(), 100, 5, 8.0);
        let search = LabelSearch { tolerance: 1e-6, max_steps: 40 };
        let scored = scorer.score(&mut model, b"", &search).expect("the labels can be spelled");
        assert!(scored.probabilities.iter().all(|&probability| probability > 0.0), "{scored:?}");
        assert!(scored.steps <= 40);
    }

    #[test]
    fn the_fast_answer_is_scored_behind_its_tag() {
        let table = table_with_bytes(&STRADDLING);
        let labels = labels();
        let scorer = LabelScorer::new(Arc::clone(&table), &labels).expect("the labels are sound");
        let search = LabelSearch { tolerance: 1e-4, max_steps: 500 };
        let opening: Vec<u32> = b"<answer>".iter().map(|&byte| u32::from(byte)).collect();
        let mut model = ToyModel::random(table.vocabulary(), 100, 6, 5.0);
        let fast = scorer.score_fast(&mut model, &opening, &search).expect("the labels can be spelled");
        assert_eq!(model.cache(), [0]);
        model.append(&opening[..7]).expect("the cache is large");
        let same = scorer.score(&mut model, b">", &search).expect("the labels can be spelled");
        assert_eq!(fast, same);
        assert_eq!(fast.probabilities[fast.best()], fast.probabilities.iter().copied().fold(0.0, f64::max));
        assert!(matches!(scorer.score_fast(&mut model, &[], &search), Err(LabelError::NoOpening)));
    }

    #[test]
    fn a_sure_model_gives_a_sure_label_in_few_steps() {
        let table = table_with_bytes(&[b"happy", b"</", b"sad", b"anger"]);
        let vocabulary = table.vocabulary();
        let labels: Vec<String> = ["happy", "sad"].map(String::from).to_vec();
        let scorer = LabelScorer::new(Arc::clone(&table), &labels).expect("the labels are sound");
        // Writes `happy` with odds of e^20, then `</`.
        let mut model = ToyModel::new(vocabulary, 100, &[0], move |cache| {
            let next = if cache.len() == 1 { 256 } else { 257 };
            (0..vocabulary).map(|id| if id == next { 20.0 } else { 0.0 }).collect()
        });
        let scored = scorer.score(&mut model, b"", &LabelSearch::default()).expect("the labels can be spelled");
        assert!(scored.probabilities[0] > 0.999_999 && scored.steps <= 4, "{scored:?}");
        assert!(scored.mass > 0.999_99);
    }

    #[test]
    fn what_cannot_be_scored_is_an_error() {
        let table = odd_table();
        assert!(LabelScorer::new(Arc::clone(&table), &[]).is_err());
        let labels = vec!["unspellable".to_string()];
        let scorer = LabelScorer::new(Arc::clone(&table), &labels).expect("the label is sound");
        let mut model = ToyModel::random(table.vocabulary(), 50, 1, 1.0);
        let error = scorer.score(&mut model, b"", &LabelSearch::default()).expect_err("no token spells u");
        assert!(matches!(error, LabelError::NoLabel { .. }), "{error}");
        let scorer = LabelScorer::new(Arc::clone(&table), &["sad".to_string()]).expect("the label is sound");
        let mut model = ToyModel::new(table.vocabulary(), 50, &[0], |_| vec![f32::NAN; 21]);
        let error = scorer.score(&mut model, b"", &LabelSearch::default()).expect_err("the logits are no numbers");
        assert!(matches!(error, LabelError::Logits(_)), "{error}");
        // A full cache leaves branches unexplored and says so.
        let mut model = ToyModel::random(table.vocabulary(), 2, 1, 1.0);
        let scored = scorer.score(&mut model, b"", &LabelSearch::default()).expect("one step fits");
        assert!(scored.unexplored > 0.0 && model.position() == 1);
    }
}
