//! Text to token ids and back, from the files of a model folder: `tokenizer.json`, or `vocab.json` and `merges.txt`
//! (byte-level BPE of Qwen2 or RoBERTa), or `vocab.txt` (BERT's word pieces). Also the exact bytes of every token, which
//! the output grammar is built on.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tokenizers::{AddedToken, DecoderWrapper, ModelWrapper, PreTokenizerWrapper};

use super::automaton::TAGS;
use super::token_table::TokenTable;

/// Larger files are refused unread; the largest published tokenizers are a tenth of this.
const MAX_FILE_BYTES: u64 = 256 << 20;
/// Token ids must stay below this; it bounds the memory a hostile vocabulary can ask for.
const MAX_TOKEN_ID: u32 = 1 << 22;
/// The token that ends a turn in ChatML prompts, which the model family uses.
const CHATML_END: &str = "<|im_end|>";
/// How Qwen2 cuts text into pieces before byte pairs are merged (its `tokenizer.json` holds the same expression).
const QWEN2_PIECES: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Added tokens of Qwen2 where the folder names none, in the order of their ids behind the vocabulary.
const QWEN2_ADDED: [&str; 3] = ["<|endoftext|>", "<|im_start|>", CHATML_END];

/// Why a tokenizer could not be opened or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The folder holds no tokenizer.
    #[error("{}: no tokenizer.json, no vocab.json with merges.txt and no vocab.txt", folder.display())]
    Missing {
        /// The folder.
        folder: PathBuf,
    },
    /// A file could not be read.
    #[error("{}: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is no regular file or larger than any tokenizer.
    #[error("{}: not a regular file of at most {MAX_FILE_BYTES} bytes", file.display())]
    File {
        /// The file.
        file: PathBuf,
    },
    /// A file does not hold what it should.
    #[error("{}: {reason}", file.display())]
    Content {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A line of merges.txt is not two tokens of the vocabulary.
    #[error("{}: line {line} is not two tokens with one space between", file.display())]
    Merge {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// The files ask for something Candor does not do.
    #[error("{}: {what} is not supported", file.display())]
    Unsupported {
        /// The file.
        file: PathBuf,
        /// What.
        what: &'static str,
    },
    /// An added token cannot have the id that the folder gives it.
    #[error("{}: the added token {token:?} would get id {found}, not {expected}; ids before it are missing", file.display())]
    AddedToken {
        /// The file.
        file: PathBuf,
        /// The token.
        token: String,
        /// Id in the file.
        expected: u32,
        /// Id it would get.
        found: u32,
    },
    /// No token ends the turn.
    #[error("{}: neither {CHATML_END} nor eos_token nor eos_token_id names a token that ends the turn", folder.display())]
    NoEndOfTurn {
        /// The folder.
        folder: PathBuf,
    },
    /// A text could not be encoded.
    #[error("the text could not be tokenised: {reason}")]
    Encode {
        /// Why.
        reason: String,
    },
}

/// What a token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// Part of ordinary text.
    Text,
    /// Added to the vocabulary behind the model's own tokens, as text.
    Added,
    /// Steers the model (turns, padding) and is never text.
    Special,
}

/// A tokenizer, with the bytes of each of its tokens.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// By id; `None` where the ids have a gap.
    tokens: Vec<Option<(TokenKind, Vec<u8>)>>,
    end_of_turn: Option<u32>,
    folder: PathBuf,
    config: Map<String, Value>,
}

impl Tokenizer {
    /// Opens the tokenizer of a model folder.
    pub fn open(folder: &Path) -> Result<Tokenizer, TokenizerError> {
        let config_file = folder.join("tokenizer_config.json");
        let config = read_object(&config_file)?.unwrap_or_default();
        let (file, definition) = definition(folder, &config)?;
        let content = |reason: String| TokenizerError::Content { file: file.clone(), reason };
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(&definition)).map_err(content)?;
        drop(definition);
        // Texts are cut to what the model takes by the caller; a tokenizer's own settings are those of its training.
        inner.with_padding(None);
        guarded(|| inner.with_truncation(None).map(|_| ())).map_err(content)?;
        if let ModelWrapper::BPE(model) = inner.get_model()
            && model.dropout.is_some_and(|dropout| dropout > 0.0)
        {
            return Err(TokenizerError::Unsupported { file, what: "dropout of merges" });
        }
        add_tokens(&mut inner, folder, &config_file, &config)?;
        let tokens = spellings(&inner, &file)?;
        let end_of_turn = end_of_turn(&inner, folder, &config)?;
        Ok(Tokenizer { inner, tokens, end_of_turn, folder: folder.to_path_buf(), config })
    }

    /// The ids of a text. Special tokens spelled in it are recognised; none are put around it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode_with(text, false)
    }

    /// The ids of a text with the special tokens a classifier expects around it (`[CLS] … [SEP]`, `<s> … </s>`), at
    /// most `limit` (at least 2) of them; what is too long loses its end, not the closing token.
    pub fn encode_sequence(&self, text: &str, limit: usize) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = self.encode_with(text, true)?;
        if ids.len() > limit
            && let Some(&last) = ids.last()
        {
            ids.truncate(limit.saturating_sub(1));
            ids.push(last);
        }
        Ok(ids)
    }

    fn encode_with(&self, text: &str, around: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding =
            guarded(|| self.inner.encode_fast(text, around)).map_err(|reason| TokenizerError::Encode { reason })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of ids, special tokens left out. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut detokenizer = Detokenizer::default();
        let mut text = String::new();
        for &id in ids {
            if self.kind(id) != Some(TokenKind::Special) {
                text.push_str(&detokenizer.push(self.token_bytes(id)));
            }
        }
        text.push_str(&detokenizer.finish());
        text
    }

    /// One more than the greatest id.
    pub fn vocabulary(&self) -> usize {
        self.tokens.len()
    }

    /// The bytes that a token adds to a text; empty for ids that are no token. Word pieces of BERT have no bytes of
    /// their own: whether a space goes before them depends on their neighbours.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        match self.tokens.get(id as usize) {
            Some(Some((_, bytes))) => bytes,
            _ => &[],
        }
    }

    /// What a token is for; `None` for ids that are no token.
    pub fn kind(&self, id: u32) -> Option<TokenKind> {
        self.tokens.get(id as usize)?.as_ref().map(|(kind, _)| *kind)
    }

    /// The id of a token by its name in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token that ends a turn: `<|im_end|>` where there is one, else `eos_token` of tokenizer_config.json, else
    /// `eos_token_id` of generation_config.json or config.json.
    pub fn end_of_turn(&self) -> Result<u32, TokenizerError> {
        self.end_of_turn.ok_or_else(|| TokenizerError::NoEndOfTurn { folder: self.folder.clone() })
    }

    /// The tokens that generation may write with a model of `vocabulary` output rows: all text tokens, and added ones
    /// only where they spell a tag of the output format, as an encoder would then write that tag with them.
    pub fn token_table(&self, vocabulary: usize) -> Result<TokenTable, TokenizerError> {
        let end_of_turn = self.end_of_turn()?;
        let writable = (0u32..).zip(&self.tokens).filter_map(|(id, token)| {
            let (kind, bytes) = token.as_ref()?;
            let is_tag = TAGS.iter().any(|tag| tag.as_bytes() == bytes);
            (*kind == TokenKind::Text || is_tag).then_some((id, bytes))
        });
        Ok(TokenTable::new(vocabulary, end_of_turn, writable))
    }

    /// The tokenizer's settings, for the chat template.
    pub(crate) fn config(&self) -> &Map<String, Value> {
        &self.config
    }
}

/// Puts the bytes of tokens together to text as they come, holding back characters that are not whole yet.
#[derive(Debug, Clone, Default)]
pub struct Detokenizer {
    pending: Vec<u8>,
}

impl Detokenizer {
    /// Adds a token's bytes; returns the characters that are now whole. Bytes that can no longer become UTF-8 give one
    /// U+FFFD for each broken sequence.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut taken = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            taken += chunk.valid().len();
            let broken = chunk.invalid();
            let may_go_on = taken + broken.len() == self.pending.len()
                && std::str::from_utf8(broken).is_err_and(|error| error.error_len().is_none());
            if !broken.is_empty() && !may_go_on {
                text.push(char::REPLACEMENT_CHARACTER);
                taken += broken.len();
            }
        }
        self.pending.drain(..taken);
        text
    }

    /// Ends the text: what is still held back becomes U+FFFD.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }
}

/// Runs a call into the tokenizers crate; its panics on malformed definitions become errors.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the definition is malformed".to_string()),
    }
}

/// Reads a file of a model folder; `None` if there is none.
pub(crate) fn read_file(file: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    let read = |source| TokenizerError::Read { file: file.to_path_buf(), source };
    let metadata = match std::fs::metadata(file) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(read(error)),
    };
    if !metadata.is_file() || metadata.len() > MAX_FILE_BYTES {
        return Err(TokenizerError::File { file: file.to_path_buf() });
    }
    std::fs::read(file).map(Some).map_err(read)
}

/// Reads a text file; `None` if there is none.
pub(crate) fn read_text(file: &Path) -> Result<Option<String>, TokenizerError> {
    let text = read_file(file)?.map(String::from_utf8).transpose();
    text.map_err(|error| TokenizerError::Content { file: file.to_path_buf(), reason: error.to_string() })
}

/// Reads a JSON object; `None` if there is no such file.
pub(crate) fn read_object(file: &Path) -> Result<Option<Map<String, Value>>, TokenizerError> {
    let Some(bytes) = read_file(file)? else { return Ok(None) };
    let object = serde_json::from_slice(&bytes);
    object.map(Some).map_err(|error| TokenizerError::Content { file: file.to_path_buf(), reason: error.to_string() })
}

/// The folder's tokenizer in the form of `tokenizer.json`, and the file to name in errors.
fn definition(folder: &Path, config: &Map<String, Value>) -> Result<(PathBuf, Vec<u8>), TokenizerError> {
    let file = folder.join("tokenizer.json");
    if let Some(bytes) = read_file(&file)? {
        return Ok((file, bytes));
    }
    let (vocab_file, merges_file) = (folder.join("vocab.json"), folder.join("merges.txt"));
    if let (Some(vocab), Some(merges)) = (read_object(&vocab_file)?, read_text(&merges_file)?) {
        let merges = parse_merges(&merges_file, &merges)?;
        let definition =
            if is_roberta(folder, config)? { roberta(&vocab_file, vocab, merges)? } else { qwen2(vocab, merges) };
        return Ok((vocab_file, definition.to_string().into_bytes()));
    }
    let words_file = folder.join("vocab.txt");
    if let Some(words) = read_text(&words_file)? {
        let definition = bert(&words_file, &words, config)?;
        return Ok((words_file, definition.to_string().into_bytes()));
    }
    Err(TokenizerError::Missing { folder: folder.to_path_buf() })
}

fn parse_merges(file: &Path, text: &str) -> Result<Vec<Value>, TokenizerError> {
    let mut merges = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.starts_with("#version") || line.is_empty() {
            continue;
        }
        match line.split_once(' ') {
            Some((left, right)) if !left.is_empty() && !right.is_empty() && !right.contains(' ') => {
                merges.push(json!([left, right]));
            }
            _ => return Err(TokenizerError::Merge { file: file.to_path_buf(), line: index + 1 }),
        }
    }
    Ok(merges)
}

/// Whether `vocab.json` and `merges.txt` are RoBERTa's rather than Qwen2's: both families use these file names.
fn is_roberta(folder: &Path, config: &Map<String, Value>) -> Result<bool, TokenizerError> {
    if let Some(class) = config.get("tokenizer_class").and_then(Value::as_str) {
        return Ok(class.starts_with("Roberta"));
    }
    let model = read_object(&folder.join("config.json"))?.unwrap_or_default();
    Ok(model.get("model_type").and_then(Value::as_str) == Some("roberta"))
}

fn byte_level() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false})
}

fn qwen2(vocab: Map<String, Value>, merges: Vec<Value>) -> Value {
    json!({
        "version": "1.0",
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": QWEN2_PIECES}, "behavior": "Isolated", "invert": false},
            byte_level(),
        ]},
        "post_processor": byte_level(),
        "decoder": byte_level(),
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    })
}

fn roberta(file: &Path, vocab: Map<String, Value>, merges: Vec<Value>) -> Result<Value, TokenizerError> {
    let id = |token: &str| {
        let reason = || format!("RoBERTa's token {token} is missing");
        vocab
            .get(token)
            .and_then(Value::as_u64)
            .ok_or_else(|| TokenizerError::Content { file: file.to_path_buf(), reason: reason() })
    };
    let mut added = Vec::new();
    for token in ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] {
        added.push(json!({
            "id": id(token)?, "content": token, "single_word": false, "lstrip": token == "<mask>", "rstrip": false,
            "normalized": false, "special": true,
        }));
    }
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    Ok(json!({
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": level,
        "post_processor": {
            "type": "RobertaProcessing", "sep": ["</s>", id("</s>")?], "cls": ["<s>", id("<s>")?],
            "trim_offsets": true, "add_prefix_space": false,
        },
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": "<unk>"},
    }))
}

fn bert(file: &Path, words: &str, config: &Map<String, Value>) -> Result<Value, TokenizerError> {
    let vocab: BTreeMap<&str, usize> =
        words.lines().enumerate().map(|(id, word)| (word.trim_end_matches('\r'), id)).collect();
    let id = |token: &str| {
        let reason = || format!("BERT's token {token} is missing");
        vocab.get(token).copied().ok_or_else(|| TokenizerError::Content { file: file.to_path_buf(), reason: reason() })
    };
    let mut added = Vec::new();
    for token in ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] {
        added.push(json!({
            "id": id(token)?, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }));
    }
    let flag = |name: &str| config.get(name).and_then(Value::as_bool);
    Ok(json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {
            "type": "BertNormalizer", "clean_text": true,
            "handle_chinese_chars": flag("tokenize_chinese_chars").unwrap_or(true),
            "strip_accents": flag("strip_accents"), "lowercase": flag("do_lower_case").unwrap_or(true),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "BertProcessing", "sep": ["[SEP]", id("[SEP]")?], "cls": ["[CLS]", id("[CLS]")?],
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {
            "type": "WordPiece", "vocab": vocab, "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        },
    }))
}

/// Adds the tokens that `tokenizer_config.json` or `added_tokens.json` name and the tokenizer does not have yet, with
/// exactly the ids they are given there.
fn add_tokens(
    inner: &mut tokenizers::Tokenizer,
    folder: &Path,
    config_file: &Path,
    config: &Map<String, Value>,
) -> Result<(), TokenizerError> {
    let added_file = folder.join("added_tokens.json");
    let mut file = config_file.to_path_buf();
    let mut wanted: BTreeMap<u32, AddedToken> = BTreeMap::new();
    if let Some(Value::Object(entries)) = config.get("added_tokens_decoder") {
        for (id, entry) in entries {
            let content = |reason| TokenizerError::Content { file: config_file.to_path_buf(), reason };
            let id: u32 = id.parse().map_err(|_| content(format!("added_tokens_decoder: {id:?} is no token id")))?;
            let text = entry.get("content").and_then(Value::as_str);
            let text = text.ok_or_else(|| content(format!("added_tokens_decoder: token {id} has no content")))?;
            let flag = |name: &str| entry.get(name).and_then(Value::as_bool).unwrap_or(false);
            let token = AddedToken::from(text, flag("special"))
                .single_word(flag("single_word"))
                .lstrip(flag("lstrip"))
                .rstrip(flag("rstrip"))
                .normalized(flag("normalized"));
            wanted.insert(id, token);
        }
    } else if let Some(entries) = read_object(&added_file)? {
        file = added_file;
        for (text, id) in entries {
            let reason = || format!("{text:?} has no token id");
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let id = id.ok_or_else(|| TokenizerError::Content { file: file.clone(), reason: reason() })?;
            wanted.insert(id, AddedToken::from(text, true));
        }
    } else if !folder.join("tokenizer.json").exists() && folder.join("merges.txt").exists() {
        let known = inner.get_vocab_size(true) as u32;
        let is_roberta = inner.token_to_id("<mask>").is_some();
        if !is_roberta {
            wanted = (known..).zip(QWEN2_ADDED.map(|text| AddedToken::from(text, true))).collect();
        }
    }
    wanted.retain(|_, token| {
        let known = inner.token_to_id(&token.content);
        let is_added = known.is_some_and(|id| inner.get_added_vocabulary().simple_id_to_token(id).is_some());
        !is_added
    });
    let tokens: Vec<AddedToken> = wanted.values().cloned().collect();
    guarded(|| Ok(inner.add_tokens(&tokens)))
        .map_err(|reason| TokenizerError::Content { file: file.clone(), reason })?;
    for (expected, token) in wanted {
        let found = inner.token_to_id(&token.content).unwrap_or(u32::MAX);
        if found != expected {
            return Err(TokenizerError::AddedToken { file, token: token.content, expected, found });
        }
    }
    Ok(())
}

/// How the names of tokens in the vocabulary stand for bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Alphabet {
    /// Every byte has a character of its own (GPT-2's byte-level alphabet).
    ByteLevel,
    /// Names are text, `▁` is a space and `<0xNN>` a byte (SentencePiece's conventions).
    SentencePiece,
    /// Names are text.
    Plain,
    /// What a token adds depends on its neighbours.
    WordPiece,
}

fn alphabet(inner: &tokenizers::Tokenizer, file: &Path) -> Result<Alphabet, TokenizerError> {
    let unsupported = |what| TokenizerError::Unsupported { file: file.to_path_buf(), what };
    match inner.get_model() {
        ModelWrapper::WordPiece(_) => return Ok(Alphabet::WordPiece),
        ModelWrapper::BPE(model) => {
            let marked = |mark: &Option<String>| mark.as_ref().is_some_and(|mark| !mark.is_empty());
            if marked(&model.continuing_subword_prefix) || marked(&model.end_of_word_suffix) {
                return Err(unsupported("byte-pair encoding with word prefixes or suffixes"));
            }
        }
        ModelWrapper::WordLevel(_) => return Err(unsupported("a word-level model")),
        ModelWrapper::Unigram(_) => return Err(unsupported("a unigram model")),
    }
    let decoders = match inner.get_decoder() {
        Some(DecoderWrapper::Sequence(sequence)) => sequence.get_decoders(),
        Some(decoder) => std::slice::from_ref(decoder),
        None => &[],
    };
    let pieces = match inner.get_pre_tokenizer() {
        Some(PreTokenizerWrapper::Sequence(sequence)) => sequence.as_ref(),
        Some(pieces) => std::slice::from_ref(pieces),
        None => &[],
    };
    let level = decoders.iter().any(|decoder| matches!(decoder, DecoderWrapper::ByteLevel(_)))
        || pieces.iter().any(|pieces| matches!(pieces, PreTokenizerWrapper::ByteLevel(_)));
    let sentence_piece = decoders.iter().any(|decoder| {
        matches!(decoder, DecoderWrapper::Metaspace(_) | DecoderWrapper::ByteFallback(_) | DecoderWrapper::Replace(_))
    });
    Ok(match (level, sentence_piece) {
        (true, _) => Alphabet::ByteLevel,
        (false, true) => Alphabet::SentencePiece,
        (false, false) => Alphabet::Plain,
    })
}

type Spellings = Vec<Option<(TokenKind, Vec<u8>)>>;

/// Kind and bytes of every token, by id.
fn spellings(inner: &tokenizers::Tokenizer, file: &Path) -> Result<Spellings, TokenizerError> {
    let content = |reason| TokenizerError::Content { file: file.to_path_buf(), reason };
    let alphabet = alphabet(inner, file)?;
    let own = inner.get_vocab(false);
    let added = inner.get_added_tokens_decoder();
    let greatest = own.values().copied().chain(added.keys().copied()).max();
    let greatest = greatest.ok_or_else(|| content("the vocabulary is empty".to_string()))?;
    if greatest >= MAX_TOKEN_ID {
        return Err(content(format!("token id {greatest} is greater than any vocabulary (limit {MAX_TOKEN_ID})")));
    }
    let mut tokens: Spellings = vec![None; greatest as usize + 1];
    for (id, token) in added {
        let kind = if token.special { TokenKind::Special } else { TokenKind::Added };
        tokens[id as usize] = Some((kind, token.content.into_bytes()));
    }
    let mut named = vec![false; tokens.len()];
    for (name, id) in own {
        if std::mem::replace(&mut named[id as usize], true) {
            return Err(content(format!("two tokens have the id {id}")));
        }
        if tokens[id as usize].is_none() {
            tokens[id as usize] = Some((TokenKind::Text, spelling(alphabet, &name)));
        }
    }
    Ok(tokens)
}

fn spelling(alphabet: Alphabet, name: &str) -> Vec<u8> {
    match alphabet {
        // A name outside the alphabet stands for itself, as in the tokenizers library's decoder.
        Alphabet::ByteLevel => {
            name.chars().map(byte_of).collect::<Option<Vec<u8>>>().unwrap_or_else(|| name.as_bytes().to_vec())
        }
        Alphabet::SentencePiece => {
            let byte = name.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
            match byte.filter(|digits| digits.len() == 2).and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
                Some(byte) => vec![byte],
                None => name.replace('▁', " ").into_bytes(),
            }
        }
        Alphabet::Plain => name.as_bytes().to_vec(),
        Alphabet::WordPiece => Vec::new(),
    }
}

/// The byte that a character of GPT-2's byte-level alphabet stands for: printable Latin-1 characters for themselves,
/// the other bytes, in order, for the characters from U+0100.
fn byte_of(character: char) -> Option<u8> {
    let stands_for_itself = |byte: u8| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let code = u32::from(character);
    match u8::try_from(code) {
        Ok(byte) => stands_for_itself(byte).then_some(byte),
        Err(_) => (0..=255u8).filter(|&byte| !stands_for_itself(byte)).nth((code - 0x100) as usize),
    }
}

fn end_of_turn(
    inner: &tokenizers::Tokenizer,
    folder: &Path,
    config: &Map<String, Value>,
) -> Result<Option<u32>, TokenizerError> {
    if let Some(id) = inner.token_to_id(CHATML_END) {
        return Ok(Some(id));
    }
    if let Some(id) = config.get("eos_token").and_then(token_text).and_then(|token| inner.token_to_id(token)) {
        return Ok(Some(id));
    }
    for name in ["generation_config.json", "config.json"] {
        let settings = read_object(&folder.join(name))?.unwrap_or_default();
        let id = match settings.get("eos_token_id") {
            Some(Value::Array(ids)) => ids.first().and_then(Value::as_u64),
            Some(id) => id.as_u64(),
            None => None,
        };
        if let Some(id) = id.and_then(|id| u32::try_from(id).ok()).filter(|&id| inner.id_to_token(id).is_some()) {
            return Ok(Some(id));
        }
    }
    Ok(None)
}

/// The text of a token in a settings file: a string, or an object with its `content`.
pub(crate) fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/text").join(name)
    }

    fn open(name: &str) -> Tokenizer {
        Tokenizer::open(&fixture(name)).expect("the fixture is sound")
    }

    fn golden(family: &str) -> Value {
        let golden = read_object(&fixture("golden.json")).expect("the golden file is JSON").expect("and exists");
        golden.get(family).expect("the family is in the golden file").clone()
    }

    /// The texts of a family with the ids that transformers gives them.
    fn encodings(family: &str) -> Vec<(String, Vec<u32>)> {
        serde_json::from_value(golden(family)["encodings"].clone()).expect("the golden file is well formed")
    }

    #[test]
    fn ids_are_those_of_transformers() {
        for folder in ["qwen2_parts", "qwen2_json"] {
            let tokenizer = open(folder);
            for (text, ids) in encodings("qwen2") {
                assert_eq!(tokenizer.encode(&text).expect("any text encodes"), ids, "{folder}: {text:?}");
            }
        }
        for (folder, family) in [("roberta_parts", "roberta"), ("bert_vocab", "bert")] {
            let tokenizer = open(folder);
            for (text, ids) in encodings(family) {
                let encoded = tokenizer.encode_sequence(&text, 1000).expect("any text encodes");
                assert_eq!(encoded, ids, "{folder}: {text:?}");
                let short = tokenizer.encode_sequence(&text, 4).expect("any text encodes");
                let expected = if ids.len() > 4 { [&ids[..3], &ids[ids.len() - 1..]].concat() } else { ids };
                assert_eq!(short, expected, "{folder}: {text:?}");
            }
        }
    }

    #[test]
    fn bytes_of_tokens_are_exact() {
        for folder in ["qwen2_parts", "qwen2_json"] {
            let tokenizer = open(folder);
            let golden = golden("qwen2");
            let expected: Vec<String> = serde_json::from_value(golden["bytes"].clone()).expect("well formed");
            let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
            for (id, expected) in (0u32..).zip(&expected) {
                assert_eq!(hex(tokenizer.token_bytes(id)), *expected, "{folder}: token {id}");
                assert_eq!(tokenizer.kind(id), Some(TokenKind::Text));
            }
            assert_eq!(tokenizer.vocabulary(), expected.len() + 3);
            let end = tokenizer.end_of_turn().expect("the fixture has one");
            assert_eq!(end as usize, expected.len() + 2);
            assert_eq!(tokenizer.kind(end), Some(TokenKind::Special));
            assert_eq!(tokenizer.token_id("<|im_end|>"), Some(end));
            let decoded: Vec<String> = serde_json::from_value(golden["decoded"].clone()).expect("well formed");
            for ((text, ids), decoded) in encodings("qwen2").iter().zip(decoded) {
                assert_eq!(tokenizer.decode(ids), decoded, "{text:?}");
            }
            let table = tokenizer.token_table(tokenizer.vocabulary()).expect("the fixture has an end of turn");
            assert!(((end - 2)..=end).all(|id| table.bytes(id).is_empty()), "special tokens are never written");
            assert_eq!(table.bytes(40), tokenizer.token_bytes(40));
        }
    }

    #[test]
    fn alphabets_are_undone() {
        for byte in 0..=255u8 {
            let characters = (0..=0x143u32).filter_map(char::from_u32);
            let own: Vec<char> = characters.filter(|&character| byte_of(character) == Some(byte)).collect();
            assert_eq!(own.len(), 1, "{byte}");
        }
        assert_eq!(spelling(Alphabet::ByteLevel, "ĠaĊ"), b" a\n");
        assert_eq!(spelling(Alphabet::ByteLevel, "日本"), "日本".as_bytes());
        assert_eq!(spelling(Alphabet::SentencePiece, "▁a"), b" a");
        assert_eq!(spelling(Alphabet::SentencePiece, "<0xE6>"), b"\xE6");
        assert_eq!(spelling(Alphabet::Plain, "▁a"), "▁a".as_bytes());
    }

    #[test]
    fn text_comes_in_whole_characters() {
        let text = "a é 日本 😀\u{FFFD}!";
        for size in 1..6 {
            let mut detokenizer = Detokenizer::default();
            let mut whole = String::new();
            for bytes in text.as_bytes().chunks(size) {
                whole.push_str(&detokenizer.push(bytes));
                assert!(text.starts_with(&whole));
            }
            assert_eq!(whole + &detokenizer.finish(), text);
        }
        for broken in [&b"a\xFFb"[..], b"\xE6\x97", b"\xE6\x97a", b"\xF0\x9F\x98", b"\xC3\xC3\xA9", b"\x80\x80"] {
            let mut detokenizer = Detokenizer::default();
            let text: String = broken.iter().map(|&byte| detokenizer.push(&[byte])).collect();
            assert_eq!(text + &detokenizer.finish(), String::from_utf8_lossy(broken), "{broken:?}");
        }
    }

    #[test]
    fn tags_that_are_tokens_may_be_written() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        for name in ["vocab.json", "merges.txt"] {
            fs::copy(fixture("qwen2_parts").join(name), folder.path().join(name)).expect("files can be copied");
        }
        let bare = Tokenizer::open(folder.path()).expect("Qwen2's own special tokens are taken");
        let first = bare.token_id("<|endoftext|>").expect("Qwen2's own special tokens are taken");
        let names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "<tool>"];
        let added: Map<String, Value> = (first..).zip(names).map(|(id, name)| (name.to_string(), json!(id))).collect();
        fs::write(folder.path().join("added_tokens.json"), json!(added).to_string()).expect("files can be written");
        let tokenizer = Tokenizer::open(folder.path()).expect("the tokens follow the vocabulary");
        let table = tokenizer.token_table(first as usize + 5).expect("it has an end of turn");
        assert_eq!(table.bytes(first + 3), b"<think>");
        assert_eq!(table.bytes(first + 4), b"");
        assert_eq!(tokenizer.encode("<think>").expect("any text encodes"), [first + 3]);
        fs::write(folder.path().join("added_tokens.json"), json!({"<x>": first + 7}).to_string()).expect("writable");
        let error = Tokenizer::open(folder.path()).expect_err("the id leaves a gap");
        assert!(matches!(error, TokenizerError::AddedToken { .. }), "{error}");
    }

    #[test]
    fn hostile_files_are_errors() {
        let sound = fs::read_to_string(fixture("qwen2_json/tokenizer.json")).expect("the fixture is there");
        let vocab = r#"{"a": 0, "b": 1, "ab": 2}"#;
        let cases: [(&str, &[(&str, &str)]); 19] = [
            ("nothing", &[]),
            ("vocab without merges", &[("vocab.json", vocab)]),
            ("not JSON", &[("tokenizer.json", "{")]),
            ("cut short", &[("tokenizer.json", &sound[..sound.len() / 2])]),
            ("no model", &[("tokenizer.json", r#"{"version": "1.0", "added_tokens": []}"#)]),
            ("deep", &[("tokenizer.json", &"[".repeat(100_000))]),
            ("huge id", &[("vocab.json", r#"{"a": 4294967295}"#), ("merges.txt", "")]),
            ("negative id", &[("vocab.json", r#"{"a": -1}"#), ("merges.txt", "")]),
            ("same id", &[("vocab.json", r#"{"a": 0, "b": 0}"#), ("merges.txt", "")]),
            ("no words", &[("vocab.txt", "")]),
            ("no [SEP]", &[("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[MASK]")]),
            ("one token", &[("vocab.json", vocab), ("merges.txt", "#version: 0.2\nab")]),
            ("three tokens", &[("vocab.json", vocab), ("merges.txt", "a b c")]),
            ("unknown token", &[("vocab.json", vocab), ("merges.txt", "a c")]),
            ("no result", &[("vocab.json", vocab), ("merges.txt", "b a")]),
            ("config is a list", &[("vocab.json", vocab), ("merges.txt", "a b"), ("tokenizer_config.json", "[]")]),
            (
                "added token without id",
                &[
                    ("vocab.json", vocab),
                    ("merges.txt", "a b"),
                    ("tokenizer_config.json", r#"{"added_tokens_decoder": {"x": {"content": "y"}}}"#),
                ],
            ),
            (
                "prefix longer than a token",
                &[(
                    "tokenizer.json",
                    r#"{"version": "1.0", "model": {"type": "BPE", "continuing_subword_prefix": "____",
                        "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}"#,
                )],
            ),
            (
                "unigram",
                &[(
                    "tokenizer.json",
                    r#"{"version": "1.0", "model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}}"#,
                )],
            ),
        ];
        for (case, files) in cases {
            let folder = tempfile::tempdir().expect("a folder can be made");
            for (name, text) in files {
                fs::write(folder.path().join(name), text).expect("files can be written");
            }
            let error = Tokenizer::open(folder.path()).err();
            assert!(error.is_some(), "{case} was read");
        }
        let folder = tempfile::tempdir().expect("a folder can be made");
        fs::create_dir(folder.path().join("tokenizer.json")).expect("a folder can be made");
        assert!(matches!(Tokenizer::open(folder.path()), Err(TokenizerError::File { .. })));
    }
}
