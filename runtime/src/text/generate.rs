//! Generation held to the output grammar, a token at a time, with checkpoints to roll back to, so that a policy can
//! verify a sentence the moment it ends and have it written again.

use super::automaton::{ANSWER_OPEN, Phase, THINK_CLOSE, THINK_OPEN};
use super::grammar::{Grammar, GrammarError, Mask, State, parse};
use super::labels::{LabelError, LabelProbabilities, LabelScorer, LabelSearch};
use super::sampling::{Sampler, SamplingError};
use crate::model::{DecodeError, LanguageModel};

/// Why generation could not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// The decoder failed.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// No token could be chosen.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// The cache has no room for the shortest completion.
    #[error(transparent)]
    Grammar(#[from] GrammarError),
    /// Grammar and model do not belong together.
    #[error("the grammar is over {grammar} tokens, the model's output head has {model}")]
    Vocabulary {
        /// Tokens of the grammar.
        grammar: usize,
        /// Rows of the output head.
        model: usize,
    },
    /// The checkpoint's text has been rolled back.
    #[error("the checkpoint at token {tokens} is no longer part of the text")]
    Checkpoint {
        /// Tokens before the checkpoint.
        tokens: usize,
    },
    /// The labels could not be scored.
    #[error(transparent)]
    Labels(#[from] LabelError),
    /// The label's place has not been written yet.
    #[error("the text has not come to `<answer>` yet; label probabilities after the rationale need it")]
    NoAnswerYet,
    /// The grammar let through a text it should not have; a fault of Candor.
    #[error("the completion {text:?} does not have the output format; please report this")]
    Format {
        /// The text.
        text: String,
    },
}

/// One token written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// The token.
    pub token: u32,
    /// The grammar left no other choice, so nothing was drawn.
    pub forced: bool,
    /// The part of the completion the text has come to.
    pub phase: Phase,
}

/// A place in the text to roll back to. Rolling back to an earlier place voids it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    tokens: usize,
    bytes: usize,
}

/// A stretch of text kept to be put back after a rollback.
#[derive(Debug, Clone)]
pub struct Passage {
    from: Checkpoint,
    written: Vec<Written>,
    state: State,
    finished: bool,
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model closed the rationale by itself.
    Natural,
    /// The budget ran short within the rationale and narrowed what could be written.
    Budget,
}

/// A whole completion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// `<think>…</think>\n<answer>…</answer>`.
    pub text: String,
    /// The text between the think tags.
    pub rationale: String,
    /// The label.
    pub label: String,
    /// Index of the label in the grammar's label set.
    pub label_index: usize,
    /// The tokens, the end of the turn included.
    pub tokens: Vec<u32>,
    /// How many of `tokens` the grammar forced.
    pub forced_tokens: usize,
    /// Tokens written altogether, those rolled back included.
    pub tokens_written: usize,
    /// Why it ended.
    pub finish: FinishReason,
}

/// A token of the text, with what it takes to come back to the place before it.
#[derive(Debug, Clone, Copy)]
struct Written {
    token: u32,
    forced: bool,
    state_before: State,
    bytes_before: usize,
}

/// Writes one completion behind the prompt that a model's cache holds.
///
/// Tokens are appended to the cache only when logits are needed, so runs of forced tokens cost one call.
#[derive(Debug)]
pub struct Generator<'a, M: LanguageModel + ?Sized> {
    model: &'a mut M,
    grammar: &'a Grammar,
    sampler: Sampler,
    budget: usize,
    /// Positions of the prompt.
    prompt: usize,
    /// How many of `written` are in the cache.
    cached: usize,
    written: Vec<Written>,
    state: State,
    text: Vec<u8>,
    finished: bool,
    /// Tokens not to be chosen again, by their place.
    bans: Vec<(usize, u32)>,
    tokens_written: usize,
}

impl<'a, M: LanguageModel + ?Sized> Generator<'a, M> {
    /// Starts the assistant's turn behind the prompt in the cache, which must hold at least one position. The budget is
    /// the grammar's `max_new_tokens`, or what the cache has room for where that is less.
    pub fn new(model: &'a mut M, grammar: &'a Grammar, sampler: Sampler) -> Result<Self, GenerateError> {
        if grammar.table().vocabulary() != model.vocabulary() {
            let (grammar, model) = (grammar.table().vocabulary(), model.vocabulary());
            return Err(GenerateError::Vocabulary { grammar, model });
        }
        let prompt = model.position();
        // The end of the turn is never appended.
        let room = model.capacity().saturating_sub(prompt).saturating_add(1);
        let budget = grammar.max_new_tokens().min(room);
        if budget < grammar.minimum() {
            return Err(GrammarError::Budget { budget, minimum: grammar.minimum() }.into());
        }
        Ok(Generator {
            model,
            grammar,
            sampler,
            budget,
            prompt,
            cached: 0,
            written: Vec::new(),
            state: grammar.start(),
            text: Vec::new(),
            finished: false,
            bans: Vec::new(),
            tokens_written: 0,
        })
    }

    /// Writes the next token. `None` once the turn has ended.
    pub fn step(&mut self) -> Result<Option<Step>, GenerateError> {
        if self.finished {
            return Ok(None);
        }
        let place = self.written.len();
        let mask = self.grammar.mask(self.state, self.budget - place);
        let banned: Vec<u32> = self.bans.iter().filter(|ban| ban.0 == place).map(|ban| ban.1).collect();
        let only = only_choice(&mask, &banned);
        let token = match only {
            Some(token) => token,
            None => {
                self.fill_cache(place)?;
                self.sampler.choose(self.model.logits(), &mask, &banned)?
            }
        };
        let forced = only.is_some();
        self.written.push(Written { token, forced, state_before: self.state, bytes_before: self.text.len() });
        self.tokens_written += 1;
        if token == self.grammar.table().end_of_turn() {
            self.finished = true;
        } else {
            self.state = self.grammar.advance(self.state, token).ok_or(SamplingError::NothingAllowed)?;
            self.text.extend_from_slice(self.grammar.table().bytes(token));
        }
        Ok(Some(Step { token, forced, phase: self.phase() }))
    }

    /// Brings the cache to hold the first `tokens` tokens of the text behind the prompt, and no more.
    fn fill_cache(&mut self, tokens: usize) -> Result<(), DecodeError> {
        if self.cached > tokens {
            self.model.truncate(self.prompt + tokens)?;
        } else if self.cached < tokens {
            let missing: Vec<u32> = self.written[self.cached..tokens].iter().map(|written| written.token).collect();
            self.model.append(&missing)?;
        }
        self.cached = tokens;
        Ok(())
    }

    /// The text so far, without a character that is not whole yet.
    pub fn text(&self) -> &str {
        valid_prefix(&self.text)
    }

    /// The rationale so far, without its tags; empty before it begins. The beginning of a closing tag is left out as
    /// long as it may become one.
    pub fn rationale(&self) -> &str {
        let Some(rationale) = self.text().strip_prefix(THINK_OPEN) else { return "" };
        if let Some((rationale, _)) = rationale.split_once(THINK_CLOSE) {
            return rationale;
        }
        let begun = (1..THINK_CLOSE.len()).rev().find(|&length| rationale.ends_with(&THINK_CLOSE[..length]));
        &rationale[..rationale.len() - begun.unwrap_or(0)]
    }

    /// The part of the completion the text has come to.
    pub fn phase(&self) -> Phase {
        self.grammar.phase(self.state)
    }

    /// Tokens of the text so far.
    pub fn tokens(&self) -> usize {
        self.written.len()
    }

    /// Tokens written altogether, those rolled back included.
    pub fn tokens_written(&self) -> usize {
        self.tokens_written
    }

    /// Tokens that may still be written.
    pub fn remaining(&self) -> usize {
        self.budget - self.written.len()
    }

    /// Whether the turn has ended.
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// Marks this place to come back to.
    pub fn checkpoint(&self) -> Checkpoint {
        Checkpoint { tokens: self.written.len(), bytes: self.text.len() }
    }

    /// Goes back to a checkpoint: text, grammar, cache and budget are as they were; the random numbers go on, so the text
    /// may be drawn differently. With `ban`, the token that followed the checkpoint is not chosen there again, until a
    /// rollback to an earlier place. Returns whether the next token can differ from the one rolled back: with `ban`,
    /// false (and no ban) if no other token is allowed there.
    pub fn rollback(&mut self, checkpoint: &Checkpoint, ban: bool) -> Result<bool, GenerateError> {
        let place = checkpoint.tokens;
        if place == self.written.len() && checkpoint.bytes == self.text.len() {
            return Ok(true);
        }
        let Some(&first) = self.written.get(place).filter(|first| first.bytes_before == checkpoint.bytes) else {
            return Err(GenerateError::Checkpoint { tokens: place });
        };
        if self.cached > place {
            self.fill_cache(place)?;
        }
        self.written.truncate(place);
        self.text.truncate(first.bytes_before);
        self.state = first.state_before;
        self.finished = false;
        self.bans.retain(|ban| ban.0 <= place);
        let mask = self.grammar.mask(self.state, self.budget - place);
        let banned = self.bans.iter().filter(|ban| ban.0 == place).count();
        let other = mask.count() > banned + 1;
        if ban && other {
            self.bans.push((place, first.token));
        }
        Ok(other)
    }

    /// The text behind a checkpoint.
    pub fn passage(&self, from: &Checkpoint) -> Result<Passage, GenerateError> {
        let written = self.written.get(from.tokens..).ok_or(GenerateError::Checkpoint { tokens: from.tokens })?;
        Ok(Passage { from: *from, written: written.to_vec(), state: self.state, finished: self.finished })
    }

    /// Puts a passage back after a rollback to where it began. Its tokens are not counted as written again.
    pub fn restore(&mut self, passage: &Passage) -> Result<(), GenerateError> {
        if self.checkpoint() != passage.from {
            return Err(GenerateError::Checkpoint { tokens: passage.from.tokens });
        }
        let table = self.grammar.table();
        for written in passage.written.iter().filter(|written| written.token != table.end_of_turn()) {
            self.text.extend_from_slice(table.bytes(written.token));
        }
        self.written.extend_from_slice(&passage.written);
        (self.state, self.finished) = (passage.state, passage.finished);
        Ok(())
    }

    /// How probable each label is behind the rationale written, as the model alone (without the grammar) has it. Needs
    /// the text to have come past `<answer>`; the text stays as it is.
    ///
    /// The labels are scored from the last token boundary before the end of `<answer>`, and the rest of the tag is part
    /// of what is spelled: a tokenizer whose tokens join the tag's `>` to a label's first letters is read right.
    pub fn label_probabilities(
        &mut self,
        scorer: &LabelScorer,
        search: &LabelSearch,
    ) -> Result<LabelProbabilities, GenerateError> {
        if !matches!(self.phase(), Phase::Label | Phase::Complete) {
            return Err(GenerateError::NoAnswerYet);
        }
        let close = find(&self.text, THINK_CLOSE).ok_or(GenerateError::NoAnswerYet)?;
        let open = close + find(&self.text[close..], ANSWER_OPEN).ok_or(GenerateError::NoAnswerYet)?;
        let end = open + ANSWER_OPEN.len();
        let starts = self.written.iter().map(|written| written.bytes_before);
        let ends = starts.chain([self.text.len()]);
        let boundaries: Vec<(usize, usize)> = ends.enumerate().filter(|&(_, byte)| byte <= end).collect();
        let within = boundaries.iter().rev().find(|&&(_, byte)| byte < end).copied().unwrap_or((0, 0));
        let at_end = boundaries.iter().find(|&&(_, byte)| byte == end).copied();
        let (tokens, byte) = if within.1 > open { within } else { at_end.unwrap_or(within) };
        self.fill_cache(tokens)?;
        Ok(scorer.score(self.model, &self.text[byte..end], search)?)
    }

    /// Writes on to the end of the turn.
    pub fn run(&mut self) -> Result<(), GenerateError> {
        while self.step()?.is_some() {}
        Ok(())
    }

    /// Writes on to the end of the turn and hands over the completion.
    pub fn finish(mut self) -> Result<Completion, GenerateError> {
        self.run()?;
        let format = |text: &[u8]| GenerateError::Format { text: String::from_utf8_lossy(text).into_owned() };
        let text = std::str::from_utf8(&self.text).map_err(|_| format(&self.text))?;
        let (rationale, label) = parse(text).ok_or_else(|| format(&self.text))?;
        let labels = self.grammar.labels();
        let label_index = labels.iter().position(|known| known == label).ok_or_else(|| format(&self.text))?;
        let narrowed = self.written.iter().enumerate().any(|(place, written)| {
            self.grammar.phase(written.state_before) == Phase::Rationale && self.grammar.is_narrow(self.budget - place)
        });
        Ok(Completion {
            text: text.to_string(),
            rationale: rationale.to_string(),
            label: label.to_string(),
            label_index,
            tokens: self.written.iter().map(|written| written.token).collect(),
            forced_tokens: self.written.iter().filter(|written| written.forced).count(),
            tokens_written: self.tokens_written,
            finish: if narrowed { FinishReason::Budget } else { FinishReason::Natural },
        })
    }
}

/// The token, if it is the only one allowed.
fn only_choice(mask: &Mask, banned: &[u32]) -> Option<u32> {
    if mask.count() > banned.len() + 1 {
        return None;
    }
    let mut allowed = mask.iter().filter(|id| !banned.contains(id));
    let first = allowed.next()?;
    allowed.next().is_none().then_some(first)
}

fn find(text: &[u8], pattern: &str) -> Option<usize> {
    text.windows(pattern.len()).position(|window| window == pattern.as_bytes())
}

/// The longest beginning that is valid UTF-8.
fn valid_prefix(bytes: &[u8]) -> &str {
    match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or(""),
    }
}
