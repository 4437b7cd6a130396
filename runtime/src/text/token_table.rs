//! What every token of the vocabulary spells, as a byte trie laid flat in depth-first order, so that the grammar and the
//! label search visit only tokens that can still fit.

use std::ops::Range;

/// States of a walk that need no memory of their own: one more than the bytes of the longest token.
const FEW: usize = 136;

/// One byte of the trie. A node's subtree is the run of nodes behind it, up to `skip`.
#[derive(Debug, Clone, Copy)]
struct Node {
    byte: u8,
    depth: u32,
    /// Index of the first node behind this one's subtree.
    skip: u32,
    /// End, in `TokenTable::sorted`, of the tokens that end at this node; they begin where the node before ends.
    tokens_end: u32,
}

/// The tokens a generation may write, with the bytes of each, and the token that ends the turn.
#[derive(Debug, Clone)]
pub struct TokenTable {
    vocabulary: usize,
    end_of_turn: u32,
    /// Bytes of all tokens, one behind the other.
    bytes: Vec<u8>,
    /// Where each token's bytes lie; empty for tokens that may never be written.
    spans: Vec<(u32, u32)>,
    nodes: Vec<Node>,
    sorted: Vec<u32>,
    deepest: usize,
}

impl TokenTable {
    /// A table of the tokens with ids below `vocabulary`, the rows of the model's output head.
    ///
    /// `tokens` are the ids that may be written as text, with their bytes. Ids that are given twice keep the first
    /// spelling; ids outside the vocabulary, empty spellings and `end_of_turn` itself are left out, as none of them
    /// can add text.
    pub fn new<B: AsRef<[u8]>>(
        vocabulary: usize,
        end_of_turn: u32,
        tokens: impl IntoIterator<Item = (u32, B)>,
    ) -> TokenTable {
        let mut bytes = Vec::new();
        let mut spans = vec![(0u32, 0u32); vocabulary];
        let mut sorted = Vec::new();
        for (id, spelling) in tokens {
            let spelling = spelling.as_ref();
            let Some(span) = spans.get_mut(id as usize) else { continue };
            let end = bytes.len() + spelling.len();
            if spelling.is_empty() || id == end_of_turn || span.1 > 0 || end > u32::MAX as usize {
                continue;
            }
            *span = (bytes.len() as u32, end as u32);
            bytes.extend_from_slice(spelling);
            sorted.push(id);
        }
        let spelling = |id: u32| {
            let (start, end) = spans[id as usize];
            &bytes[start as usize..end as usize]
        };
        sorted.sort_by(|&a, &b| spelling(a).cmp(spelling(b)).then(a.cmp(&b)));

        let mut nodes: Vec<Node> = Vec::new();
        let mut open: Vec<usize> = Vec::new();
        for (index, &id) in sorted.iter().enumerate() {
            let text = spelling(id);
            let shared = open.iter().zip(text).take_while(|&(&node, &byte)| nodes[node].byte == byte).count();
            for node in open.drain(shared..) {
                nodes[node].skip = nodes.len() as u32;
            }
            for (depth, &byte) in text.iter().enumerate().skip(shared) {
                open.push(nodes.len());
                nodes.push(Node { byte, depth: depth as u32, skip: 0, tokens_end: index as u32 });
            }
            // Equal spellings share the node; it is the last one made, so the range stays contiguous.
            if let Some(node) = nodes.last_mut() {
                node.tokens_end = index as u32 + 1;
            }
        }
        let total = nodes.len() as u32;
        for node in open {
            nodes[node].skip = total;
        }
        let deepest = nodes.iter().map(|node| node.depth as usize + 1).max().unwrap_or(0);
        TokenTable { vocabulary, end_of_turn, bytes, spans, nodes, sorted, deepest }
    }

    /// The same with only some of the tokens to be written.
    pub fn only(&self, tokens: &[u32]) -> TokenTable {
        TokenTable::new(self.vocabulary, self.end_of_turn, tokens.iter().map(|&id| (id, self.bytes(id))))
    }

    /// Rows of the model's output head.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// The token that ends the assistant's turn.
    pub fn end_of_turn(&self) -> u32 {
        self.end_of_turn
    }

    /// The bytes a token spells; empty for tokens that may never be written.
    pub fn bytes(&self, id: u32) -> &[u8] {
        match self.spans.get(id as usize) {
            Some(&(start, end)) => &self.bytes[start as usize..end as usize],
            None => &[],
        }
    }

    /// Visits every token whose bytes lead from `start` through `step` without meeting `None`, with the state
    /// reached, in order of spelling.
    pub fn walk<S: Copy>(&self, start: S, step: impl Fn(S, u8) -> Option<S>, mut visit: impl FnMut(u32, S)) {
        // Few tokens are longer, and few vocabularies have one that is.
        let (mut few, mut many) = ([start; FEW], Vec::new());
        let states = if self.deepest < FEW {
            &mut few[..]
        } else {
            many.resize(self.deepest + 1, start);
            &mut many[..]
        };
        let mut index = 0;
        while let Some(node) = self.nodes.get(index) {
            let depth = node.depth as usize;
            match step(states[depth], node.byte) {
                None => index = node.skip as usize,
                Some(state) => {
                    states[depth + 1] = state;
                    for &id in &self.sorted[self.tokens_at(index)] {
                        visit(id, state);
                    }
                    index += 1;
                }
            }
        }
    }

    fn tokens_at(&self, index: usize) -> Range<usize> {
        let start = if index == 0 { 0 } else { self.nodes[index - 1].tokens_end };
        start as usize..self.nodes[index].tokens_end as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn walk_visits_exactly_the_tokens_that_fit() {
        let tokens: [(u32, &[u8]); 9] =
            [(0, b"a"), (1, b"ab"), (2, b"abc"), (3, b"b"), (4, b"ab"), (5, b""), (6, b"zz"), (7, b"end"), (99, b"a")];
        let table = TokenTable::new(8, 7, tokens);
        // The state is how many bytes of "abcd" have been read.
        let mut seen = Vec::new();
        table.walk(0usize, |at, byte| (b"abcd".get(at) == Some(&byte)).then_some(at + 1), |id, at| seen.push((id, at)));
        assert_eq!(seen, [(0, 1), (1, 2), (4, 2), (2, 3)]);
        let mut all = Vec::new();
        table.walk((), |(), _| Some(()), |id, ()| all.push(id));
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 4, 6]);
        assert_eq!(table.bytes(2), b"abc");
        assert_eq!(table.bytes(7), b"", "the end of the turn spells nothing");
        assert_eq!(table.bytes(99), b"");
        let empty = TokenTable::new(0, 0, std::iter::empty::<(u32, &[u8])>());
        empty.walk((), |(), _| Some(()), |_, ()| panic!("an empty table has no tokens"));
    }
}
