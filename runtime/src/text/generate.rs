//! Generation held to the output grammar, a token at a time, with checkpoints to roll back to, so that a policy can
//! verify a sentence the moment it ends and have it written again.

use candor_kernels::DeviceError;

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
    Decode(DecodeError),
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

impl From<DecodeError> for GenerateError {
    fn from(error: DecodeError) -> Self {
        match error {
            DecodeError::Device(DeviceError::Choice(error)) => GenerateError::Sampling(error),
            error => GenerateError::Decode(error),
        }
    }
}

/// One token written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// The token.
    pub token: u32,
    /// The grammar left no other text, so the model was not asked.
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
/// Where the grammar leaves the text no choice (tags, the rest of a label that is decided), the longest token that fits is
/// written without asking the model: that is how tokenizers spell, and how models learn to. Tokens are appended to the cache
/// only when logits are needed, so a run of forced tokens costs no pass of its own.
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
    /// Tokens on their way into the cache.
    missing: Vec<u32>,
    state: State,
    text: Vec<u8>,
    finished: bool,
    /// Whether the model is asked for every token, and reads every token by itself.
    asking: bool,
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
            written: Vec::with_capacity(budget),
            missing: Vec::with_capacity(budget),
            state: grammar.start(),
            text: Vec::new(),
            finished: false,
            asking: false,
            bans: Vec::new(),
            tokens_written: 0,
        })
    }

    /// Asks the model for every token that is not the only one allowed, and has it read every token by itself: the plain
    /// way, which forced tokens are held against.
    pub fn asking(mut self) -> Self {
        self.asking = true;
        self
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
        let spelled = match only {
            None if banned.is_empty() && !self.asking => self.grammar.spelling(self.state, &mask),
            _ => None,
        };
        let token = match (only, spelled) {
            (Some(token), _) => token,
            (None, Some(token)) => {
                self.sampler.pass();
                token
            }
            (None, None) => {
                self.fill_cache(place)?;
                self.model.choose(mask.allowed(), &banned, self.sampler.draw())?
            }
        };
        let forced = only.or(spelled).is_some();
        self.written.push(Written { token, forced, state_before: self.state, bytes_before: self.text.len() });
        self.tokens_written += 1;
        if token == self.grammar.table().end_of_turn() {
            self.finished = true;
        } else {
            self.state = self.grammar.advance(self.state, token).ok_or(SamplingError::NothingAllowed)?;
            self.text.extend_from_slice(self.grammar.table().bytes(token));
            if self.asking {
                self.fill_cache(place + 1)?;
            }
        }
        Ok(Some(Step { token, forced, phase: self.phase() }))
    }

    /// Brings the cache to hold the first `tokens` tokens of the text behind the prompt, and no more.
    fn fill_cache(&mut self, tokens: usize) -> Result<(), DecodeError> {
        if self.cached > tokens {
            self.model.truncate(self.prompt + tokens)?;
        } else if self.cached < tokens {
            self.missing.clear();
            self.missing.extend(self.written[self.cached..tokens].iter().map(|written| written.token));
            self.model.append(&self.missing)?;
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

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::text::automaton::TAGS;
    use crate::text::sampling::Sampling;
    use crate::text::token_table::TokenTable;
    use crate::text::tokenizer::Tokenizer;
    use crate::text::toy::{STRADDLING, ToyModel, labels, table, table_with_bytes};

    fn sampler(temperature: f32, seed: u64) -> Sampler {
        Sampler::new(Sampling { temperature, top_p: 0.95, seed }).expect("the settings are in range")
    }

    /// A tokenizer of whole characters.
    fn characters() -> Arc<TokenTable> {
        let all: Vec<String> = " \n</>.!abcdefghijklmnopqrstuvwxyzéß悲しい😀".chars().map(String::from).collect();
        table(&all.iter().map(String::as_bytes).collect::<Vec<_>>())
    }

    fn trained() -> Arc<TokenTable> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/text/qwen2_json");
        let tokenizer = Tokenizer::open(&folder).expect("the fixture is sound");
        Arc::new(tokenizer.token_table(tokenizer.vocabulary() + 5).expect("the fixture has an end of turn"))
    }

    fn tables() -> [Arc<TokenTable>; 4] {
        [table_with_bytes(&[]), table_with_bytes(&STRADDLING), characters(), trained()]
    }

    /// Checks a completion against the definition, by strings alone.
    fn check(completion: &Completion, grammar: &Grammar, budget: usize) {
        let text = format!("<think>{}</think>\n<answer>{}</answer>", completion.rationale, completion.label);
        assert_eq!(completion.text, text);
        assert!(!completion.rationale.trim().is_empty(), "{text:?}");
        assert!(!TAGS.iter().any(|tag| completion.rationale.contains(tag)), "{text:?}");
        assert_eq!(grammar.labels()[completion.label_index], completion.label);
        assert!(completion.tokens.len() <= budget, "{} tokens of {budget}", completion.tokens.len());
        let (end, written) = completion.tokens.split_last().expect("a completion has tokens");
        assert_eq!(*end, grammar.table().end_of_turn());
        let bytes: Vec<u8> = written.iter().flat_map(|&id| grammar.table().bytes(id).to_vec()).collect();
        assert_eq!(bytes, text.as_bytes());
        assert!(completion.forced_tokens <= completion.tokens.len());
    }

    #[test]
    fn every_completion_has_the_format_and_ends_in_time() {
        let labels = labels();
        for (kind, table) in tables().into_iter().enumerate() {
            let minimum = Grammar::new(Arc::clone(&table), &labels, 500).expect("the table can close").minimum();
            for budget in [minimum, minimum + 1, minimum + 7, 120] {
                let grammar = Grammar::new(Arc::clone(&table), &labels, budget).expect("the budget is enough");
                for seed in 0..12 {
                    let spread = [0.0, 1.0, 20.0][seed as usize % 3];
                    let mut model = ToyModel::random(table.vocabulary(), 500, seed, spread);
                    let temperature = if seed % 4 == 0 { 0.0 } else { 1.0 };
                    let generator = Generator::new(&mut model, &grammar, sampler(temperature, seed));
                    let completion = generator.and_then(Generator::finish);
                    let completion = completion.unwrap_or_else(|error| panic!("table {kind}, seed {seed}: {error}"));
                    check(&completion, &grammar, budget);
                    assert_eq!(completion.tokens_written, completion.tokens.len());
                }
            }
        }
    }

    #[test]
    fn wilful_models_are_held_to_the_format() {
        let labels = labels();
        let table = table_with_bytes(&STRADDLING);
        let vocabulary = table.vocabulary();
        let grammar = Grammar::new(Arc::clone(&table), &labels, 80).expect("the budget is enough");
        let wants = |id: u32| {
            ToyModel::new(vocabulary, 200, &[0], move |_| {
                (0..vocabulary as u32).map(|other| if other == id { 30.0 } else { 0.0 }).collect()
            })
        };
        // The end of the turn, a letter, the begin of a tag, tokens over every border.
        let favourites = [table.end_of_turn(), u32::from(b'a'), u32::from(b'<'), u32::from(b' '), 0xE6];
        for id in favourites.into_iter().chain(256..table.end_of_turn()) {
            for temperature in [0.0, 1.0] {
                let mut model = wants(id);
                let generator = Generator::new(&mut model, &grammar, sampler(temperature, u64::from(id)));
                let completion = generator.and_then(Generator::finish).expect("any logits give a completion");
                check(&completion, &grammar, 80);
            }
        }
        let mut never_closes = wants(u32::from(b'a'));
        let generator = Generator::new(&mut never_closes, &grammar, sampler(0.0, 0));
        let completion = generator.and_then(Generator::finish).expect("any logits give a completion");
        assert_eq!(completion.finish, FinishReason::Budget);
        assert_eq!(completion.tokens.len(), 80);
    }

    /// A model that writes one text, byte by byte.
    fn scripted(table: &TokenTable, text: &'static [u8]) -> ToyModel {
        let vocabulary = table.vocabulary();
        ToyModel::new(vocabulary, 500, &[0, 0], move |cache| {
            let next = text.get(cache.len() - 2).map_or(vocabulary - 1, |&byte| usize::from(byte));
            (0..vocabulary).map(|id| if id == next { 20.0 } else { 0.0 }).collect()
        })
    }

    #[test]
    fn what_the_model_wants_is_written_where_the_grammar_lets_it() {
        let text = "<think>The eyes are wide. Öh, fear? a < b.</think>\n<answer>angry man</answer>";
        let table = table_with_bytes(&[]);
        let grammar = Grammar::new(Arc::clone(&table), &labels(), 500).expect("the budget is enough");
        let mut model = scripted(&table, text.as_bytes());
        let mut generator = Generator::new(&mut model, &grammar, sampler(0.0, 0)).expect("the model fits");
        let mut rationales = Vec::new();
        while let Some(step) = generator.step().expect("the model is sound") {
            assert!(text.starts_with(generator.text()), "{:?}", generator.text());
            if step.phase == Phase::Rationale {
                rationales.push(generator.rationale().to_string());
            }
        }
        assert!(rationales.iter().all(|rationale| "The eyes are wide. Öh, fear? a < b.".starts_with(rationale)));
        let completion = generator.finish().expect("the turn has ended");
        assert_eq!(completion.text, text);
        assert_eq!(completion.finish, FinishReason::Natural);
        // All of `<think>`, then `/think>\n<answer>` behind `<`, `er` of no other label, `</answer>` and the end.
        assert!(completion.forced_tokens > 30, "{}", completion.forced_tokens);
        assert!(model.appends <= completion.tokens.len() - 30, "{} calls", model.appends);
        assert_eq!(model.cache().len(), model.position());
    }

    /// A model that spells as tokenizers do: of the tokens that begin its text it takes the longest.
    fn spelling(table: &Arc<TokenTable>, text: &'static [u8]) -> ToyModel {
        let own = Arc::clone(table);
        ToyModel::new(table.vocabulary(), 500, &[0, 0], move |cache| {
            let written: usize = cache[2..].iter().map(|&id| own.bytes(id).len()).sum();
            let rest = &text[written.min(text.len())..];
            (0..own.vocabulary() as u32)
                .map(|id| match own.bytes(id) {
                    b"" => {
                        if id == own.end_of_turn() && rest.is_empty() {
                            20.0
                        } else {
                            0.0
                        }
                    }
                    bytes => {
                        if rest.starts_with(bytes) {
                            20.0 * bytes.len() as f32
                        } else {
                            -5.0
                        }
                    }
                })
                .collect()
        })
    }

    #[test]
    fn forced_tokens_are_those_that_the_model_would_write_and_cost_no_pass() {
        let text = "<think>the eyes are wide. fear!</think>\n<answer>angry man</answer>";
        for table in tables() {
            let grammar = Grammar::new(Arc::clone(&table), &labels(), 500).expect("the budget is enough");
            for temperature in [0.0, 0.3] {
                let mut asked = spelling(&table, text.as_bytes());
                let generator = Generator::new(&mut asked, &grammar, sampler(temperature, 3)).expect("the model fits");
                let plain = generator.asking().finish().expect("the model is sound");
                let mut model = spelling(&table, text.as_bytes());
                let generator = Generator::new(&mut model, &grammar, sampler(temperature, 3)).expect("the model fits");
                let completion = generator.finish().expect("the model is sound");
                assert_eq!(completion.tokens, plain.tokens);
                if temperature == 0.0 {
                    assert_eq!(completion.text, text);
                }
                assert_eq!(asked.appends, plain.tokens.len() - 1, "one pass a token");
                assert!(completion.forced_tokens > 0);
                // Each of the others is one pass at most; tags and the label's tail are read along with the next.
                assert!(model.appends <= completion.tokens.len() - completion.forced_tokens);
                assert!(model.position() < asked.position(), "what follows the last choice is not read");
            }
        }
    }

    #[test]
    fn rolling_back_restores_everything() {
        let table = table_with_bytes(&STRADDLING);
        let grammar = Grammar::new(Arc::clone(&table), &labels(), 90).expect("the budget is enough");
        for seed in 0..20u64 {
            let mut plain = ToyModel::random(table.vocabulary(), 200, seed, 4.0);
            let generator = Generator::new(&mut plain, &grammar, sampler(0.0, 0)).expect("the model fits");
            let expected = generator.finish().expect("the model is sound");

            let mut model = ToyModel::random(table.vocabulary(), 200, seed, 4.0);
            let mut generator = Generator::new(&mut model, &grammar, sampler(0.0, 0)).expect("the model fits");
            let begin = generator.checkpoint();
            while generator.phase() != Phase::Rationale {
                generator.step().expect("the model is sound");
            }
            let place = generator.tokens();
            let middle = generator.checkpoint();
            let (text, remaining) = (generator.text().to_string(), generator.remaining());
            generator.run().expect("the model is sound");
            let after = generator.checkpoint();
            let first = generator.written[place].token;

            // Without a ban a greedy model writes the same again.
            assert!(generator.rollback(&middle, false).expect("the checkpoint is part of the text"));
            assert_eq!((generator.text(), generator.remaining()), (text.as_str(), remaining));
            generator.run().expect("the model is sound");
            assert_eq!(generator.checkpoint(), after);

            // With one it cannot, and the next ban adds to the first.
            let mut banned = vec![first];
            while generator.rollback(&middle, true).expect("the checkpoint is part of the text") {
                generator.step().expect("the model is sound");
                let token = generator.written[place].token;
                assert!(!banned.contains(&token), "{token} was banned");
                banned.push(token);
                if banned.len() > 5 {
                    break;
                }
            }
            generator.run().expect("the model is sound");
            assert!(generator.tokens_written() > generator.tokens());

            // Going back to the start forgets the later bans.
            generator.rollback(&begin, false).expect("the checkpoint is part of the text");
            assert!(
                matches!(generator.rollback(&middle, false), Err(GenerateError::Checkpoint { tokens }) if tokens == place)
            );
            let completion = generator.finish().expect("the model is sound");
            assert_eq!((&completion.text, &completion.tokens), (&expected.text, &expected.tokens));
            check(&completion, &grammar, 90);
            let held = model.position() - 1;
            assert_eq!(model.cache()[1..], completion.tokens[..held], "seed {seed}");
        }
    }

    #[test]
    fn the_cache_bounds_the_budget() {
        let table = table_with_bytes(&[]);
        let grammar = Grammar::new(Arc::clone(&table), &labels(), 500).expect("the budget is enough");
        let minimum = grammar.minimum();
        for capacity in [minimum, minimum + 9] {
            let mut model = ToyModel::random(table.vocabulary(), capacity, 1, 1.0);
            let generator = Generator::new(&mut model, &grammar, sampler(1.0, 1)).expect("the cache is enough");
            check(&generator.finish().expect("the cache is enough"), &grammar, capacity);
        }
        let mut model = ToyModel::random(table.vocabulary(), minimum - 1, 1, 1.0);
        let error = Generator::new(&mut model, &grammar, sampler(1.0, 1)).err().expect("the cache is too small");
        assert!(matches!(error, GenerateError::Grammar(GrammarError::Budget { .. })), "{error}");
        let mut model = ToyModel::random(table.vocabulary() + 1, 500, 1, 1.0);
        let error = Generator::new(&mut model, &grammar, sampler(1.0, 1)).err().expect("the vocabularies differ");
        assert!(matches!(error, GenerateError::Vocabulary { .. }), "{error}");
        let mut model = ToyModel::new(table.vocabulary(), 500, &[0], move |_| vec![f32::NAN; 257]);
        let broken = Generator::new(&mut model, &grammar, sampler(1.0, 1)).and_then(Generator::finish);
        let error = broken.expect_err("the logits are no numbers");
        assert!(matches!(error, GenerateError::Sampling(SamplingError::NotFinite { .. })), "{error}");
    }

    #[test]
    fn label_probabilities_leave_the_text_as_it_is() {
        for table in [table_with_bytes(&[]), table_with_bytes(&STRADDLING), trained()] {
            let grammar = Grammar::new(Arc::clone(&table), &labels(), 90).expect("the budget is enough");
            let scorer = LabelScorer::new(Arc::clone(&table), &labels()).expect("the labels are sound");
            for seed in 0..4u64 {
                let mut model = ToyModel::random(table.vocabulary(), 200, seed, 2.0);
                let mut generator = Generator::new(&mut model, &grammar, sampler(1.0, seed)).expect("the model fits");
                let search = LabelSearch::default();
                let early = generator.label_probabilities(&scorer, &search);
                assert!(matches!(early, Err(GenerateError::NoAnswerYet)));
                generator.run().expect("the model is sound");
                let text = generator.text().to_string();
                let scored = generator.label_probabilities(&scorer, &search).expect("the labels can be spelled");
                let again = generator.label_probabilities(&scorer, &search).expect("the labels can be spelled");
                assert_eq!(scored, again);
                assert!((scored.probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-12);
                let completion = generator.finish().expect("the turn has ended");
                assert_eq!(completion.text, text);
                // The cache was left where the labels were scored from: at a token's end before that of the tag.
                let tag = text.find("<answer>").expect("the format") + "<answer>".len();
                let held: usize = model.cache()[1..].iter().map(|&id| table.bytes(id).len()).sum();
                assert!(held < tag, "{held} {tag}");
                assert_eq!(model.cache()[1..], completion.tokens[..model.cache().len() - 1]);
            }
        }
    }
}
