//! The language of a completion as a byte automaton:
//!
//! ```text
//! <think>RATIONALE</think>\n<answer>LABEL</answer>
//! ```
//!
//! `RATIONALE` is valid UTF-8, holds at least one character that is not white space (Unicode `White_Space`), and holds
//! none of the four tags (`<think>`, `</think>`, `<answer>`, `</answer>`, in exactly this spelling) as a substring.
//! `LABEL` is one of the given labels. States are numbered densely; the table has one row of 256 a state.

use std::collections::HashMap;

/// The opening tag of the rationale.
pub const THINK_OPEN: &str = "<think>";
/// The closing tag of the rationale.
pub const THINK_CLOSE: &str = "</think>";
/// The opening tag of the answer.
pub const ANSWER_OPEN: &str = "<answer>";
/// The closing tag of the answer.
pub const ANSWER_CLOSE: &str = "</answer>";
/// What stands between the rationale's closing tag and the label.
pub const BETWEEN: &str = "\n<answer>";
/// All tags; a rationale and a label hold none of them.
pub const TAGS: [&str; 4] = [THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE];

/// Marks a byte that leaves the language.
const DEAD: u16 = u16::MAX;

/// The part of the completion that a text has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Inside `<think>`.
    Opening,
    /// Inside the rationale; this includes a closing tag that has been begun.
    Rationale,
    /// Behind `</think>`, before the label.
    Between,
    /// Inside the label or its closing tag.
    Label,
    /// Behind `</answer>`: only the end of the turn may follow.
    Complete,
}

/// What a state of the automaton remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Memory {
    /// Bytes of `<think>` read.
    Opening(usize),
    Rationale {
        /// A character other than white space has been read.
        content: bool,
        /// The text ends with the first `tag.1` bytes of `TAGS[tag.0]`.
        tag: (usize, usize),
        character: Character,
    },
    /// Bytes of `\n<answer>` read.
    Between(usize),
    /// Node of the label trie.
    Label(usize),
    Complete,
}

/// How much of a UTF-8 character has been read: what is left to read, and, as long as the character may still turn out
/// to be white space and this matters, its bytes so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Character {
    /// Continuation bytes to come.
    left: u8,
    /// Range of the next one.
    low: u8,
    high: u8,
    maybe_white: Option<[u8; 2]>,
}

/// Whether these bytes are one white-space character.
fn is_white(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_ok_and(|text| text.chars().all(char::is_whitespace))
}

/// Whether some white-space character begins with these bytes.
fn may_be_white(first: &[u8]) -> bool {
    // U+0085, U+00A0; U+1680; U+2000..U+205F; U+3000.
    [&b"\xC2"[..], b"\xE1\x9A", b"\xE2\x80", b"\xE2\x81", b"\xE3\x80"].iter().any(|white| white.starts_with(first))
}

/// The byte automaton for one label set.
#[derive(Debug)]
pub(crate) struct Automaton {
    rows: Vec<[u16; 256]>,
    phases: Vec<Phase>,
    complete: u16,
}

impl Automaton {
    /// The state of the empty text.
    pub(crate) const START: u16 = 0;

    /// Builds the automaton. `None` if it needs more states than can be numbered.
    pub(crate) fn new(labels: &[String]) -> Option<Automaton> {
        let trie = LabelTrie::new(labels);
        let mut numbers = HashMap::from([(Memory::Opening(0), Self::START)]);
        let mut memories = vec![Memory::Opening(0)];
        let mut rows = Vec::new();
        while let Some(&memory) = memories.get(rows.len()) {
            let mut row = [DEAD; 256];
            for byte in 0..=255u8 {
                let Some(next) = step(memory, byte, &trie) else { continue };
                let number = match numbers.get(&next) {
                    Some(&number) => number,
                    None => {
                        let number = u16::try_from(memories.len()).ok().filter(|&number| number != DEAD)?;
                        numbers.insert(next, number);
                        memories.push(next);
                        number
                    }
                };
                row[usize::from(byte)] = number;
            }
            rows.push(row);
        }
        let phases = memories
            .iter()
            .map(|memory| match memory {
                Memory::Opening(_) => Phase::Opening,
                Memory::Rationale { .. } => Phase::Rationale,
                Memory::Between(_) => Phase::Between,
                Memory::Label(_) => Phase::Label,
                Memory::Complete => Phase::Complete,
            })
            .collect();
        let complete = numbers.get(&Memory::Complete).copied().unwrap_or(DEAD);
        Some(Automaton { rows, phases, complete })
    }

    /// The state behind `byte`, or `None` where the text would leave the language.
    pub(crate) fn step(&self, state: u16, byte: u8) -> Option<u16> {
        let next = self.rows[usize::from(state)][usize::from(byte)];
        (next != DEAD).then_some(next)
    }

    /// The only byte that may come next, if there is but one.
    pub(crate) fn only_byte(&self, state: u16) -> Option<u8> {
        let mut bytes = (0..=u8::MAX).filter(|&byte| self.step(state, byte).is_some());
        let first = bytes.next()?;
        bytes.next().is_none().then_some(first)
    }

    pub(crate) fn phase(&self, state: u16) -> Phase {
        self.phases[usize::from(state)]
    }

    /// The one state in which the text is complete.
    pub(crate) fn complete(&self) -> u16 {
        self.complete
    }

    /// How many states there are.
    pub(crate) fn states(&self) -> usize {
        self.rows.len()
    }
}

/// Trie of the byte strings `LABEL</answer>`.
struct LabelTrie {
    children: Vec<HashMap<u8, usize>>,
    ends: Vec<bool>,
}

impl LabelTrie {
    fn new(labels: &[String]) -> LabelTrie {
        let mut trie = LabelTrie { children: vec![HashMap::new()], ends: vec![false] };
        for label in labels {
            let mut node = 0;
            for byte in label.bytes().chain(ANSWER_CLOSE.bytes()) {
                let fresh = trie.children.len();
                node = *trie.children[node].entry(byte).or_insert(fresh);
                if node == fresh {
                    trie.children.push(HashMap::new());
                    trie.ends.push(false);
                }
            }
            trie.ends[node] = true;
        }
        trie
    }
}

fn step(memory: Memory, byte: u8, trie: &LabelTrie) -> Option<Memory> {
    const RATIONALE: Memory = Memory::Rationale {
        content: false,
        tag: (0, 0),
        character: Character { left: 0, low: 0, high: 0, maybe_white: None },
    };
    match memory {
        Memory::Opening(read) => literal(THINK_OPEN, read, byte, Memory::Opening, RATIONALE),
        Memory::Between(read) => literal(BETWEEN, read, byte, Memory::Between, Memory::Label(0)),
        Memory::Label(node) => {
            let next = *trie.children[node].get(&byte)?;
            Some(if trie.ends[next] { Memory::Complete } else { Memory::Label(next) })
        }
        Memory::Complete => None,
        Memory::Rationale { content, tag, character } if character.left > 0 => {
            continue_character(content, tag, character, byte)
        }
        Memory::Rationale { content, tag, .. } => rationale(content, tag, byte),
    }
}

fn literal(text: &str, read: usize, byte: u8, more: fn(usize) -> Memory, done: Memory) -> Option<Memory> {
    if text.as_bytes().get(read) != Some(&byte) {
        return None;
    }
    Some(if read + 1 == text.len() { done } else { more(read + 1) })
}

/// The first byte of a character of the rationale.
fn rationale(content: bool, tag: (usize, usize), byte: u8) -> Option<Memory> {
    let whole = Character::default();
    // All tags begin with `<` and hold no other, so a text ends with the beginning of at most one reading of a tag.
    let read = &TAGS[tag.0].as_bytes()[..tag.1];
    let longer = TAGS.iter().position(|candidate| {
        let candidate = candidate.as_bytes();
        candidate.len() > read.len() && candidate.starts_with(read) && candidate[read.len()] == byte
    });
    if let Some(longer) = longer {
        let length = tag.1 + 1;
        if length < TAGS[longer].len() {
            // The first tag with this beginning stands for all of them, so that equal states have one name.
            return Some(Memory::Rationale { content, tag: (longer, length), character: whole });
        }
        return (TAGS[longer] == THINK_CLOSE && content).then_some(Memory::Between(0));
    }
    // What looked like a tag was text, and so content.
    let content = content || tag.1 > 0;
    let character = |left, low, high| {
        let maybe_white = (!content && may_be_white(&[byte])).then_some([byte, 0]);
        let content = content || maybe_white.is_none();
        Some(Memory::Rationale { content, tag: (0, 0), character: Character { left, low, high, maybe_white } })
    };
    match byte {
        b'<' => Some(Memory::Rationale { content, tag: (0, 1), character: whole }),
        0..=0x7F => {
            let content = content || !is_white(&[byte]);
            Some(Memory::Rationale { content, tag: (0, 0), character: whole })
        }
        // Well-formed UTF-8 (Unicode standard, table 3-7).
        0xC2..=0xDF => character(1, 0x80, 0xBF),
        0xE0 => character(2, 0xA0, 0xBF),
        0xE1..=0xEC | 0xEE..=0xEF => character(2, 0x80, 0xBF),
        0xED => character(2, 0x80, 0x9F),
        0xF0 => character(3, 0x90, 0xBF),
        0xF1..=0xF3 => character(3, 0x80, 0xBF),
        0xF4 => character(3, 0x80, 0x8F),
        _ => None,
    }
}

fn continue_character(content: bool, tag: (usize, usize), character: Character, byte: u8) -> Option<Memory> {
    if !(character.low..=character.high).contains(&byte) {
        return None;
    }
    let left = character.left - 1;
    let mut content = content;
    let mut maybe_white = None;
    if let Some(first) = character.maybe_white {
        let (white, read) = match first {
            [lead, 0] if left == 0 => (is_white(&[lead, byte]), [0, 0]),
            [lead, 0] => (may_be_white(&[lead, byte]), [lead, byte]),
            [lead, second] => (is_white(&[lead, second, byte]), [0, 0]),
        };
        content = content || !white;
        maybe_white = (white && left > 0).then_some(read);
    }
    let character = match left {
        0 => Character::default(),
        _ => Character { left, low: 0x80, high: 0xBF, maybe_white },
    };
    Some(Memory::Rationale { content, tag, character })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(automaton: &Automaton, text: &[u8]) -> Option<u16> {
        text.iter().try_fold(Automaton::START, |state, &byte| automaton.step(state, byte))
    }

    fn accepts(automaton: &Automaton, text: &str) -> bool {
        run(automaton, text.as_bytes()) == Some(automaton.complete())
    }

    #[test]
    fn members_are_accepted_and_others_are_not() {
        let labels = ["anger", "angry man", "悲しい"].map(String::from);
        let automaton = Automaton::new(&labels).expect("few states");
        for label in &labels {
            assert!(accepts(&automaton, &format!("<think>a</think>\n<answer>{label}</answer>")));
        }
        for rationale in
            ["é", " é", "<", "<<", "a < b", "<thin", "</thin", "</think</", "<answer", "\u{3000}x", "日本", "\u{2029}."]
        {
            let text = format!("<think>{rationale}</think>\n<answer>anger</answer>");
            assert!(accepts(&automaton, &text), "{text:?}");
        }
        for text in [
            "<think></think>\n<answer>anger</answer>",
            "<think> \n\t</think>\n<answer>anger</answer>",
            "<think>\u{3000}\u{A0}\u{1680}\u{2028}\u{205F}\u{85}</think>\n<answer>anger</answer>",
            "<think>a<think>b</think>\n<answer>anger</answer>",
            "<think>a<answer>b</think>\n<answer>anger</answer>",
            "<think>a</answer>b</think>\n<answer>anger</answer>",
            "<think>a</think><answer>anger</answer>",
            "<think>a</think>\n<answer>angry</answer>",
            "<think>a</think>\n<answer></answer>",
            "<think>a</think>\n<answer>anger</answer>\n",
            " <think>a</think>\n<answer>anger</answer>",
        ] {
            assert!(!accepts(&automaton, text), "{text:?}");
        }
    }

    #[test]
    fn every_white_space_character_is_known() {
        let automaton = Automaton::new(&["x".to_string()]).expect("few states");
        for character in (0..=0x10FFFFu32).filter_map(char::from_u32).filter(|&character| character != '<') {
            let text = format!("<think>{character}</think>\n<answer>x</answer>");
            assert_eq!(accepts(&automaton, &text), !character.is_whitespace(), "{character:?}");
        }
    }

    #[test]
    fn broken_utf8_is_refused_where_it_breaks() {
        let automaton = Automaton::new(&["x".to_string()]).expect("few states");
        let mut text = b"<think>".to_vec();
        let start = text.len();
        // Every sequence of up to three bytes, against the standard library.
        for first in 0..=255u8 {
            for second in [0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xFF] {
                for third in [0x20, 0x80, 0xBF, 0xC0] {
                    text.truncate(start);
                    text.extend([first, second, third]);
                    let broken = match std::str::from_utf8(&text) {
                        Ok(_) => false,
                        Err(error) => error.error_len().is_some(),
                    };
                    assert_eq!(run(&automaton, &text).is_none(), broken, "{first:x} {second:x} {third:x}");
                }
            }
        }
    }
}
