//! The output grammar: which tokens may come next so that every completion reads
//! `<think>RATIONALE</think>\n<answer>LABEL</answer>` and ends within its budget.
//!
//! The [`automaton`](crate::text::automaton) says which bytes may follow; this module lifts it to tokens. A token is
//! allowed exactly if the text with its bytes appended is the beginning of a member of the language that the remaining
//! tokens can still spell. How many tokens that takes is computed once, from every state, over the tokens there are, so
//! it holds for any tokenizer, wherever its tokens cut labels and tags. Masks are made on first use and kept.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use candor_kernels::Allowed;
pub use candor_kernels::AllowedIds;

use super::automaton::{ANSWER_CLOSE, Automaton, Phase, TAGS};
use super::token_table::TokenTable;

/// Bytes of masks that are kept; beyond it they are made anew. The states of one model's grammar need far less.
const MASK_CACHE_BYTES: usize = 64 << 20;
/// Bytes of all labels together; keeps the automaton's states few.
const LABEL_BYTES: usize = 16_384;

/// Why no output grammar could be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GrammarError {
    /// The label set is empty.
    #[error("the label set is empty; name at least one label")]
    NoLabels,
    /// A label that no answer could hold or no reader could tell apart.
    #[error("label {label:?} {fault}")]
    Label {
        /// The label.
        label: String,
        /// What is wrong with it.
        fault: &'static str,
    },
    /// More labels than the automaton has room for.
    #[error("the labels take {bytes} bytes; at most {LABEL_BYTES} are supported")]
    TooManyLabels {
        /// Bytes of all labels together.
        bytes: usize,
    },
    /// The end of the turn is not a token of this vocabulary.
    #[error("the end-of-turn token {id} is outside the vocabulary of {vocabulary}")]
    EndOfTurn {
        /// The token.
        id: u32,
        /// Rows of the output head.
        vocabulary: usize,
    },
    /// The tokens cannot spell any completion.
    #[error(
        "no sequence of this vocabulary's tokens spells a whole completion; it lacks tokens for the tags or labels"
    )]
    CannotClose,
    /// The budget is too small for the shortest completion.
    #[error("{budget} tokens are too few: the shortest completion takes {minimum}; raise max_new_tokens")]
    Budget {
        /// Tokens allowed.
        budget: usize,
        /// Tokens of the shortest completion, the end of the turn included.
        minimum: usize,
    },
}

/// The tokens that may come next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mask {
    /// Few tokens: their ids, ascending.
    Few(Vec<u32>),
    /// Many tokens: one bit for each id of the vocabulary, and how many are set.
    Many {
        /// Bit `id % 64` of word `id / 64`.
        bits: Vec<u64>,
        /// Bits set.
        count: usize,
    },
}

impl Mask {
    /// Every token of a vocabulary.
    pub fn all(vocabulary: usize) -> Mask {
        Mask::new((0u32..).take(vocabulary).collect(), vocabulary)
    }

    fn new(mut ids: Vec<u32>, vocabulary: usize) -> Mask {
        // A bit for each id costs less than 4 bytes for each allowed one.
        if ids.len() * 32 <= vocabulary {
            ids.sort_unstable();
            return Mask::Few(ids);
        }
        let mut bits = vec![0u64; vocabulary.div_ceil(64)];
        for &id in &ids {
            bits[id as usize / 64] |= 1 << (id % 64);
        }
        Mask::Many { bits, count: ids.len() }
    }

    /// How many tokens are allowed; never 0.
    pub fn count(&self) -> usize {
        match self {
            Mask::Few(ids) => ids.len(),
            Mask::Many { count, .. } => *count,
        }
    }

    /// Whether a token is allowed.
    pub fn contains(&self, id: u32) -> bool {
        match self {
            Mask::Few(ids) => ids.binary_search(&id).is_ok(),
            Mask::Many { bits, .. } => bits.get(id as usize / 64).is_some_and(|word| word >> (id % 64) & 1 == 1),
        }
    }

    /// The allowed ids as devices take them.
    pub fn allowed(&self) -> Allowed<'_> {
        match self {
            Mask::Few(ids) => Allowed::Ids(ids),
            Mask::Many { bits, .. } => Allowed::Bits(bits),
        }
    }

    /// The allowed ids, ascending.
    pub fn iter(&self) -> AllowedIds<'_> {
        self.allowed().iter()
    }

    fn bytes(&self) -> usize {
        match self {
            Mask::Few(ids) => ids.len() * 4,
            Mask::Many { bits, .. } => bits.len() * 8,
        }
    }
}

/// Where a text stands in the grammar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct State(u16);

/// The output grammar of one tokenizer and one label set.
#[derive(Debug)]
pub struct Grammar {
    table: Arc<TokenTable>,
    automaton: Automaton,
    labels: Vec<String>,
    max_new_tokens: usize,
    /// Fewest tokens from each state to the end, the end of the turn included; `usize::MAX` where there is no way.
    closing: Vec<usize>,
    /// Greatest of `closing`, the ways that do not end aside. With this room left the budget forbids nothing.
    longest_closing: usize,
    masks: Mutex<MaskCache>,
}

#[derive(Debug, Default)]
struct MaskCache {
    masks: HashMap<(State, usize), Arc<Mask>>,
    bytes: usize,
}

impl Grammar {
    /// The grammar for completions of at most `max_new_tokens` tokens, the end of the turn included.
    pub fn new(table: Arc<TokenTable>, labels: &[String], max_new_tokens: usize) -> Result<Grammar, GrammarError> {
        check_labels(labels)?;
        if table.end_of_turn() as usize >= table.vocabulary() {
            return Err(GrammarError::EndOfTurn { id: table.end_of_turn(), vocabulary: table.vocabulary() });
        }
        let bytes = labels.iter().map(String::len).sum();
        let automaton = Some(bytes)
            .filter(|&bytes| bytes <= LABEL_BYTES)
            .and_then(|_| Automaton::new(labels))
            .ok_or(GrammarError::TooManyLabels { bytes })?;
        let closing = closing_lengths(&automaton, &table);
        let minimum = closing[usize::from(Automaton::START)];
        if minimum == usize::MAX {
            return Err(GrammarError::CannotClose);
        }
        if max_new_tokens < minimum {
            return Err(GrammarError::Budget { budget: max_new_tokens, minimum });
        }
        let longest_closing = closing.iter().copied().filter(|&length| length != usize::MAX).max().unwrap_or(minimum);
        Ok(Grammar {
            table,
            automaton,
            labels: labels.to_vec(),
            max_new_tokens,
            closing,
            longest_closing,
            masks: Mutex::default(),
        })
    }

    /// The tokens the grammar is over.
    pub fn table(&self) -> &Arc<TokenTable> {
        &self.table
    }

    /// The labels an answer may give.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// Most tokens of a completion, the end of the turn included.
    pub fn max_new_tokens(&self) -> usize {
        self.max_new_tokens
    }

    /// Tokens of the shortest completion, the end of the turn included.
    pub fn minimum(&self) -> usize {
        self.closing[usize::from(Automaton::START)]
    }

    /// The state of the empty text.
    pub fn start(&self) -> State {
        State(Automaton::START)
    }

    /// The part of the completion a state is in.
    pub fn phase(&self, state: State) -> Phase {
        self.automaton.phase(state.0)
    }

    /// The state behind a token; `None` if its bytes leave the language.
    pub fn advance(&self, state: State, token: u32) -> Option<State> {
        let bytes = self.table.bytes(token);
        if bytes.is_empty() {
            return None;
        }
        bytes.iter().try_fold(state.0, |state, &byte| self.automaton.step(state, byte)).map(State)
    }

    /// Fewest tokens that end a completion from here, the end of the turn included; `None` where none can.
    pub fn closing_length(&self, state: State) -> Option<usize> {
        Some(self.closing[usize::from(state.0)]).filter(|&length| length != usize::MAX)
    }

    /// Whether `remaining` tokens are so few that they, and not only the language, narrow the choice.
    pub fn is_narrow(&self, remaining: usize) -> bool {
        remaining <= self.longest_closing
    }

    /// The tokens allowed in `state` when `remaining` tokens may still be written. Never empty as long as `remaining`
    /// is at least [`Grammar::closing_length`], and every token allowed keeps it so.
    pub fn mask(&self, state: State, remaining: usize) -> Arc<Mask> {
        let room = remaining.saturating_sub(1).min(self.longest_closing);
        let key = (state, room);
        {
            let cache = self.masks.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(mask) = cache.masks.get(&key) {
                return Arc::clone(mask);
            }
        }
        let mask = Arc::new(self.make_mask(state, room));
        let mut cache = self.masks.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.bytes + mask.bytes() > MASK_CACHE_BYTES {
            *cache = MaskCache::default();
        }
        cache.bytes += mask.bytes();
        cache.masks.insert(key, Arc::clone(&mask));
        mask
    }

    /// Where the text can only go on in one way: the longest of the allowed tokens (of `mask`, that of this state), if all
    /// of its bytes are certain. The other allowed tokens cut the same text elsewhere, which tokenizers do not do.
    pub fn spelling(&self, state: State, mask: &Mask) -> Option<u32> {
        self.automaton.only_byte(state.0)?;
        let bytes = |id: u32| self.table.bytes(id);
        let longest = mask.iter().max_by(|&a, &b| bytes(a).len().cmp(&bytes(b).len()).then(b.cmp(&a)))?;
        let mut at = state.0;
        for &byte in bytes(longest) {
            at = self.automaton.step(at, self.automaton.only_byte(at).filter(|&only| only == byte)?)?;
        }
        (!bytes(longest).is_empty()).then_some(longest)
    }

    fn make_mask(&self, state: State, room: usize) -> Mask {
        if state.0 == self.automaton.complete() {
            return Mask::Few(vec![self.table.end_of_turn()]);
        }
        let mut ids = Vec::new();
        self.table.walk(
            state.0,
            |state, byte| self.automaton.step(state, byte),
            |id, next| {
                if self.closing[usize::from(next)] <= room {
                    ids.push(id);
                }
            },
        );
        Mask::new(ids, self.table.vocabulary())
    }
}

/// Refuses label sets that no answer could hold or no reader could tell apart.
pub(crate) fn check_labels(labels: &[String]) -> Result<(), GrammarError> {
    if labels.is_empty() {
        return Err(GrammarError::NoLabels);
    }
    for (index, label) in labels.iter().enumerate() {
        let fault = if label.is_empty() {
            "is empty"
        } else if label.trim() != label {
            "begins or ends with white space"
        } else if TAGS.iter().any(|tag| label.contains(tag)) {
            "holds a tag of the output format"
        } else if labels[..index].contains(label) {
            "is given twice"
        } else {
            continue;
        };
        return Err(GrammarError::Label { label: label.clone(), fault });
    }
    Ok(())
}

/// Fewest tokens from each state that tokens can reach to the end: breadth first, backwards from the complete text.
fn closing_lengths(automaton: &Automaton, table: &TokenTable) -> Vec<usize> {
    let states = automaton.states();
    let mut before: Vec<Vec<u16>> = vec![Vec::new(); states];
    let mut reached = vec![false; states];
    reached[usize::from(Automaton::START)] = true;
    let mut open = vec![Automaton::START];
    // Which state last noted a successor, so that each edge is noted once.
    let mut noted = vec![None; states];
    while let Some(from) = open.pop() {
        table.walk(
            from,
            |state, byte| automaton.step(state, byte),
            |_, to| {
                let index = usize::from(to);
                if noted[index] != Some(from) {
                    noted[index] = Some(from);
                    before[index].push(from);
                    if !std::mem::replace(&mut reached[index], true) {
                        open.push(to);
                    }
                }
            },
        );
    }
    let mut closing = vec![usize::MAX; states];
    let complete = automaton.complete();
    closing[usize::from(complete)] = 1;
    let mut queue = VecDeque::from([complete]);
    while let Some(to) = queue.pop_front() {
        for &from in &before[usize::from(to)] {
            let length = closing[usize::from(to)] + 1;
            let known = &mut closing[usize::from(from)];
            if *known == usize::MAX {
                *known = length;
                queue.push_back(from);
            }
        }
    }
    closing
}

/// The parts of a complete text: rationale and label. `None` if the text does not have the form.
pub fn parse(text: &str) -> Option<(&str, &str)> {
    let (rationale, answer) = text.strip_prefix("<think>")?.split_once("</think>\n<answer>")?;
    Some((rationale, answer.strip_suffix(ANSWER_CLOSE)?))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::text::toy::{STRADDLING, labels, table, table_with_bytes};

    /// The definition, by strings alone: whether a text begins a member of the language.
    fn begins(text: &[u8], labels: &[String]) -> bool {
        if b"<think>".starts_with(text) {
            return true;
        }
        let Some(body) = text.strip_prefix(b"<think>") else { return false };
        let close = body.windows(8).position(|window| window == b"</think>");
        let rationale = &body[..close.unwrap_or(body.len())];
        let valid = match std::str::from_utf8(rationale) {
            Ok(_) => rationale,
            Err(error) if close.is_none() && error.error_len().is_none() => &rationale[..error.valid_up_to()],
            Err(_) => return false,
        };
        let valid = std::str::from_utf8(valid).expect("checked above");
        if TAGS.iter().any(|tag| valid.contains(tag)) {
            return false;
        }
        let Some(close) = close else { return true };
        let rest = &body[close + 8..];
        let ends = labels.iter().any(|label| format!("\n<answer>{label}</answer>").as_bytes().starts_with(rest));
        ends && !valid.trim().is_empty()
    }

    fn is_complete(text: &[u8], labels: &[String]) -> bool {
        begins(text, labels)
            && labels.iter().any(|label| text.ends_with(format!("\n<answer>{label}</answer>").as_bytes()))
    }

    /// The definition, by trying every token: fewest tokens to the end, up to `limit`.
    fn closing(
        text: &[u8],
        limit: usize,
        tokens: &[&[u8]],
        labels: &[String],
        known: &mut HashMap<(Vec<u8>, usize), bool>,
    ) -> bool {
        if is_complete(text, labels) {
            return limit >= 1;
        }
        if limit < 2 {
            return false;
        }
        if let Some(&known) = known.get(&(text.to_vec(), limit)) {
            return known;
        }
        let closes = tokens.iter().any(|token| {
            let longer = [text, token].concat();
            begins(&longer, labels) && closing(&longer, limit - 1, tokens, labels, known)
        });
        known.insert((text.to_vec(), limit), closes);
        closes
    }

    #[test]
    fn masks_are_exactly_the_definition() {
        let labels = ["x", "xy", "é"].map(String::from);
        let tokens: [&[u8]; 15] = [
            b"<think>",
            b"<think>a",
            b" ",
            b"</think>\n",
            b"<answer>",
            b".</",
            b"think>\n<answer>x",
            b"y",
            b"</answer>",
            b"</",
            b"answer>",
            b"\xC3",
            b"\xA9",
            b"\xA9</answer>",
            b"<",
        ];
        let table = table(&tokens);
        let grammar = Grammar::new(table, &labels, 6).expect("the tokens can close");
        assert_eq!(grammar.minimum(), 5, "<think>a, .</, think>…x, </answer>, end");
        let mut known = HashMap::new();
        let mut open = vec![(Vec::new(), grammar.start(), 6usize)];
        let mut checked = 0;
        while let Some((text, state, remaining)) = open.pop() {
            let mask = grammar.mask(state, remaining);
            for (id, token) in (0u32..).zip(tokens) {
                let longer = [&text[..], token].concat();
                let allowed = begins(&longer, &labels) && closing(&longer, remaining - 1, &tokens, &labels, &mut known);
                let shown = String::from_utf8_lossy(&longer);
                assert_eq!(mask.contains(id), allowed, "{shown:?} with {remaining} left");
                checked += 1;
                if allowed {
                    let next = grammar.advance(state, id).expect("an allowed token advances");
                    open.push((longer, next, remaining - 1));
                }
            }
            assert_eq!(mask.contains(15), is_complete(&text, &labels), "the end of the turn after {text:?}");
        }
        assert!(checked > 500, "only {checked} tokens were checked");
    }

    #[test]
    fn closing_lengths_hold_for_every_table() {
        let labels = labels();
        for table in [table_with_bytes(&[]), table_with_bytes(&STRADDLING)] {
            let grammar = Grammar::new(table, &labels, 500).expect("bytes can spell everything");
            // From any state, always taking a token that keeps the budget ends exactly in time.
            let mut state = grammar.start();
            let mut remaining = grammar.minimum();
            loop {
                let mask = grammar.mask(state, remaining);
                assert!(mask.count() > 0);
                let id = mask.iter().next().expect("a mask is never empty");
                assert!(mask.contains(id));
                remaining -= 1;
                let Some(next) = grammar.advance(state, id) else { break };
                assert_eq!(grammar.closing_length(next), Some(remaining));
                state = next;
            }
            assert_eq!(remaining, 0);
            assert_eq!(grammar.phase(state), Phase::Complete);
        }
    }

    #[test]
    fn masks_list_what_they_contain() {
        for (ids, vocabulary) in
            [(vec![5, 3, 70], 1000usize), ((0..150).step_by(2).collect(), 151), (vec![0, 63, 64], 66)]
        {
            let mask = Mask::new(ids.clone(), vocabulary);
            let mut sorted = ids.clone();
            sorted.sort_unstable();
            assert_eq!(mask.iter().collect::<Vec<_>>(), sorted);
            assert_eq!(mask.count(), ids.len());
            assert!((0..vocabulary as u32 + 200).all(|id| mask.contains(id) == ids.contains(&id)));
        }
    }

    #[test]
    fn what_cannot_be_written_is_refused() {
        let happy = vec!["happy".to_string()];
        let bytes = table_with_bytes(&[]);
        let new = |labels: &[&str]| {
            let labels: Vec<String> = labels.iter().map(ToString::to_string).collect();
            Grammar::new(Arc::clone(&bytes), &labels, 100).err()
        };
        assert_eq!(new(&[]), Some(GrammarError::NoLabels));
        for labels in [&[""][..], &[" x"], &["x\n"], &["x", "x"], &["a</answer>b"], &["<think>"]] {
            assert!(matches!(new(labels), Some(GrammarError::Label { .. })), "{labels:?}");
        }
        let long = "x".repeat(20_000);
        assert!(matches!(new(&[&long]), Some(GrammarError::TooManyLabels { .. })));
        assert_eq!(new(&["a<b", "a", "</answer", "ü 😀"]), None);
        let minimum = "<think>a</think>\n<answer>happy</answer>".len() + 1;
        let small = Grammar::new(Arc::clone(&bytes), &happy, minimum - 1).err();
        assert_eq!(small, Some(GrammarError::Budget { budget: minimum - 1, minimum }));
        let toothless = table(&[b"<think>", b"a", b"</think>\n<answer>", b"sad", b"</answer>"]);
        assert_eq!(Grammar::new(toothless, &happy, 100).err(), Some(GrammarError::CannotClose));
        let outside = Arc::new(TokenTable::new(10, 10, [(0, b"a")]));
        let error = Grammar::new(outside, &happy, 100).err();
        assert_eq!(error, Some(GrammarError::EndOfTurn { id: 10, vocabulary: 10 }));
    }
}
