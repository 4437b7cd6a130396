//! The prompt: the checkpoint's own chat template around one user turn, cut at the places where the video and audio
//! tokens go.
//!
//! Templates are code from a downloaded folder. They run with bounded steps, memory and recursion, and see nothing but
//! the messages and the names of the special tokens.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind};
use serde::Serialize;
use serde_json::Value;

use super::tokenizer::{Tokenizer, TokenizerError, read_object, read_text, token_text};

/// Where the video's tokens go.
const VIDEO: &str = "<video>";
/// Where the audio's tokens go.
const AUDIO: &str = "<audio>";
/// Used where the folder has no template: plain ChatML, without a system turn.
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}\
                      {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
/// The longest published templates have about 20 000 bytes.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;
/// Steps a template may take; it also bounds the memory it may ask for, to about 64 bytes a step.
const FUEL: u64 = 1_000_000;
/// Nested calls a template may make.
const RECURSION: usize = 100;

/// Why there is no prompt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// A file could not be read, or a text not be tokenised.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The template is not one.
    #[error("{}: {reason}", file.display())]
    Template {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The template failed on these messages.
    #[error("{}: the chat template failed: {reason}", file.display())]
    Render {
        /// The file.
        file: PathBuf,
        /// Why.
        reason: String,
    },
    /// The instruction holds the name of a place.
    #[error("the instruction holds {place}, which marks where frames or sound go; leave it out")]
    Instruction {
        /// The place.
        place: &'static str,
    },
    /// The template lost or doubled a place.
    #[error("{}: the chat template writes {place} {count} times; it must be there once", file.display())]
    Place {
        /// The file.
        file: PathBuf,
        /// The place.
        place: &'static str,
        /// How often it is there.
        count: usize,
    },
}

/// A turn of the conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// `user`, `assistant` or `system`.
    pub role: &'a str,
    /// What was said.
    pub content: &'a str,
}

/// A stretch of the prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PromptPiece {
    /// Token ids.
    Text(Vec<u32>),
    /// The video's embeddings go here.
    Video,
    /// The audio's embeddings go here.
    Audio,
}

/// A chat template, ready to render.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    file: PathBuf,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// The template of a model folder: `chat_template.jinja`, else `chat_template` of tokenizer_config.json (a string,
    /// or a list of named ones, of which `default` is taken), else plain ChatML without a system turn.
    pub fn open(folder: &Path, tokenizer: &Tokenizer) -> Result<ChatTemplate, TemplateError> {
        let config = tokenizer.config();
        let special = |name: &str| config.get(name).and_then(token_text).unwrap_or_default().to_string();
        let (file, source) = source(folder)?;
        let environment = environment(source)
            .map_err(|error| TemplateError::Template { file: file.clone(), reason: full(&error) })?;
        Ok(ChatTemplate { environment, file, bos_token: special("bos_token"), eos_token: special("eos_token") })
    }

    /// The conversation as text, ending where the assistant is to speak.
    pub fn render(&self, messages: &[Message<'_>]) -> Result<String, TemplateError> {
        let turns = messages
            .iter()
            .map(|message| minijinja::Value::from_pairs([("role", message.role), ("content", message.content)]));
        let turns: minijinja::Value = turns.collect();
        let rendered = self.environment.get_template(TEMPLATE).and_then(|template| {
            template.render(minijinja::context! {
                messages => turns,
                add_generation_prompt => true,
                bos_token => self.bos_token.clone(),
                eos_token => self.eos_token.clone(),
            })
        });
        rendered.map_err(|error| TemplateError::Render { file: self.file.clone(), reason: full(&error) })
    }

    /// The prompt of one user turn: `<vi_start><video><vi_end>\n`, with `audio` then `<au_start><audio><au_end>\n`, then
    /// the instruction. The text between the places is tokenised piece by piece, as the model family was trained.
    pub fn prompt(
        &self,
        tokenizer: &Tokenizer,
        instruction: &str,
        audio: bool,
    ) -> Result<Vec<PromptPiece>, TemplateError> {
        if let Some(place) = [VIDEO, AUDIO].into_iter().find(|place| instruction.contains(place)) {
            return Err(TemplateError::Instruction { place });
        }
        let sound = if audio { "<au_start><audio><au_end>\n" } else { "" };
        let content = format!("<vi_start><video><vi_end>\n{sound}{instruction}");
        let text = self.render(&[Message { role: "user", content: &content }])?;
        for (place, expected) in [(VIDEO, 1), (AUDIO, usize::from(audio))] {
            let count = text.matches(place).count();
            if count != expected {
                return Err(TemplateError::Place { file: self.file.clone(), place, count });
            }
        }
        let mut pieces = Vec::new();
        let add_text = |pieces: &mut Vec<PromptPiece>, text: &str| {
            let ids = tokenizer.encode(text)?;
            if !ids.is_empty() {
                pieces.push(PromptPiece::Text(ids));
            }
            Ok::<(), TemplateError>(())
        };
        for (index, text) in text.split(VIDEO).enumerate() {
            if index > 0 {
                pieces.push(PromptPiece::Video);
            }
            for (index, text) in text.split(AUDIO).enumerate() {
                if index > 0 {
                    pieces.push(PromptPiece::Audio);
                }
                add_text(&mut pieces, text)?;
            }
        }
        Ok(pieces)
    }
}

/// The template's name in its environment.
const TEMPLATE: &str = "chat_template";

/// The file that holds the template, and its text.
fn source(folder: &Path) -> Result<(PathBuf, String), TemplateError> {
    let file = folder.join("chat_template.jinja");
    if let Some(text) = read_text(&file)? {
        return checked(file, text);
    }
    let file = folder.join("tokenizer_config.json");
    let config = read_object(&file)?.unwrap_or_default();
    let reason = match config.get("chat_template") {
        None | Some(Value::Null) => return Ok((file, CHATML.to_string())),
        Some(Value::String(text)) => return checked(file, text.clone()),
        Some(Value::Array(named)) => {
            let default = named.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"));
            match default.and_then(|entry| entry.get("template")?.as_str()) {
                Some(text) => return checked(file, text.to_string()),
                None => "chat_template names no template \"default\"",
            }
        }
        Some(_) => "chat_template is neither a text nor a list of named texts",
    };
    Err(TemplateError::Template { file, reason: reason.to_string() })
}

fn checked(file: PathBuf, text: String) -> Result<(PathBuf, String), TemplateError> {
    if text.len() > MAX_TEMPLATE_BYTES {
        let reason = format!("the chat template has {} bytes; at most {MAX_TEMPLATE_BYTES} are read", text.len());
        return Err(TemplateError::Template { file, reason });
    }
    Ok((file, text))
}

/// The surroundings that Hugging Face gives chat templates.
fn environment(source: String) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    let syntax = minijinja::syntax::SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    environment.set_syntax(syntax);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(RECURSION);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| date(SystemTime::now(), &format));
    environment.add_filter("tojson", tojson);
    environment.add_template_owned(TEMPLATE, without_generation_blocks(&source))?;
    Ok(environment)
}

/// Turns `{% generation %}` blocks, which mark the assistant's text for training, into blocks that always hold.
fn without_generation_blocks(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let (before, block) = (&rest[..start], &rest[start..start + length]);
        text.push_str(before);
        let word = block[2..].trim_matches(['-', '+', ' ', '\t', '\n', '\r']);
        match word {
            "generation" => text.push_str(&block.replace(word, "if true")),
            "endgeneration" => text.push_str(&block.replace(word, "endif")),
            _ => text.push_str(block),
        }
        rest = &rest[start + length..];
    }
    text.push_str(rest);
    text
}

/// An error with all its causes.
fn full(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False)` writes it: unlike minijinja's own filter it escapes nothing
/// for HTML and puts a space behind commas and colons.
fn tojson(value: minijinja::Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut json = Vec::new();
    let written = match indent {
        Some(width) => {
            let indent = " ".repeat(width.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, formatter))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, PythonFormatter)),
    };
    let failed = |reason: String| Error::new(ErrorKind::InvalidOperation, reason);
    written.map_err(|error| failed(error.to_string()))?;
    String::from_utf8(json).map_err(|error| failed(error.to_string()))
}

/// `json.dumps`'s separators.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// A date in UTC by `strftime`'s letters, those that chat templates use.
fn date(time: SystemTime, format: &str) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_date(days);
    let mut text = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            text.push(letter);
            continue;
        }
        match letters.next() {
            Some('Y') => text.push_str(&year.to_string()),
            Some('y') => text.push_str(&format!("{:02}", year % 100)),
            Some('m') => text.push_str(&format!("{month:02}")),
            Some('d') => text.push_str(&format!("{day:02}")),
            Some('B') => text.push_str(MONTHS[month as usize - 1]),
            Some('b') => text.push_str(&MONTHS[month as usize - 1][..3]),
            Some('A') => text.push_str(DAYS[(days % 7) as usize]),
            Some('a') => text.push_str(&DAYS[(days % 7) as usize][..3]),
            Some('H') => text.push_str(&format!("{:02}", second / 3600)),
            Some('M') => text.push_str(&format!("{:02}", second / 60 % 60)),
            Some('S') => text.push_str(&format!("{:02}", second % 60)),
            Some('%') => text.push('%'),
            other => {
                let letter = other.map(String::from).unwrap_or_default();
                return Err(Error::new(ErrorKind::InvalidOperation, format!("strftime_now: %{letter} is not known")));
            }
        }
    }
    Ok(text)
}

/// Year, month and day of the Gregorian calendar, `days` after 1970-01-01.
fn civil_date(days: u64) -> (u64, u64, u64) {
    let is_leap = |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    // 400 years have 146 097 days; what is left is walked.
    let mut year = 1970 + days / 146_097 * 400;
    let mut left = days % 146_097;
    while left >= 365 + u64::from(is_leap(year)) {
        left -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while left >= lengths[month] {
        left -= lengths[month];
        month += 1;
    }
    (year, month as u64 + 1, left + 1)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::*;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/text").join(name)
    }

    fn tokenizer() -> Tokenizer {
        Tokenizer::open(&fixture("qwen2_parts")).expect("the fixture is sound")
    }

    fn golden() -> serde_json::Map<String, Value> {
        read_object(&fixture("golden.json")).expect("the golden file is JSON").expect("and exists")
    }

    fn with_template(text: &str) -> Result<ChatTemplate, TemplateError> {
        let folder = tempfile::tempdir().expect("a folder can be made");
        fs::write(folder.path().join("chat_template.jinja"), text).expect("files can be written");
        ChatTemplate::open(folder.path(), &tokenizer())
    }

    #[test]
    fn templates_render_as_in_transformers() {
        for case in golden()["templates"].as_array().expect("the golden file is well formed") {
            let text = |value: &Value| value.as_str().expect("the golden file is well formed").to_string();
            let turns: Vec<(String, String)> = case["messages"]
                .as_array()
                .expect("the golden file is well formed")
                .iter()
                .map(|turn| (text(&turn["role"]), text(&turn["content"])))
                .collect();
            let messages: Vec<Message<'_>> = turns.iter().map(|(role, content)| Message { role, content }).collect();
            let template = with_template(&text(&case["template"])).expect("the template is sound");
            assert_eq!(template.render(&messages).expect("the template renders"), text(&case["text"]));
        }
    }

    #[test]
    fn prompts_are_cut_and_tokenised_as_in_transformers() {
        let tokenizer = tokenizer();
        let template = ChatTemplate::open(&fixture("qwen2_parts"), &tokenizer).expect("the fixture is sound");
        let golden = golden();
        let prompts = &golden["prompts"];
        let instruction = prompts["instruction"].as_str().expect("the golden file is well formed");
        for (audio, name) in [(true, "with_audio"), (false, "without_audio")] {
            let expected: Vec<PromptPiece> = prompts[name]
                .as_array()
                .expect("the golden file is well formed")
                .iter()
                .map(|piece| match piece.as_str() {
                    Some("video") => PromptPiece::Video,
                    Some(_) => PromptPiece::Audio,
                    None => PromptPiece::Text(serde_json::from_value(piece.clone()).expect("ids")),
                })
                .collect();
            let pieces = template.prompt(&tokenizer, instruction, audio).expect("the instruction is sound");
            assert_eq!(pieces, expected);
        }
        let error = template.prompt(&tokenizer, "look at <video>", false).expect_err("the place is taken");
        assert!(matches!(error, TemplateError::Instruction { place: "<video>" }));
    }

    #[test]
    fn the_template_is_found_where_checkpoints_put_it() {
        let tokenizer = tokenizer();
        let messages = [Message { role: "user", content: "hi" }];
        let folder = tempfile::tempdir().expect("a folder can be made");
        let rendered = || ChatTemplate::open(folder.path(), &tokenizer).and_then(|template| template.render(&messages));
        let chatml = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(rendered().expect("the default renders"), chatml);
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).expect("files can be written");
        write("tokenizer_config.json", r#"{"chat_template": null}"#);
        assert_eq!(rendered().expect("the default renders"), chatml);
        write("tokenizer_config.json", r#"{"chat_template": "text {{ messages[0].content }}"}"#);
        assert_eq!(rendered().expect("the template renders"), "text hi");
        let named = r#"{"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]}"#;
        write("tokenizer_config.json", named);
        assert_eq!(rendered().expect("the template renders"), "d");
        write("tokenizer_config.json", r#"{"chat_template": [{"name": "tools", "template": "t"}]}"#);
        assert!(matches!(rendered(), Err(TemplateError::Template { .. })));
        write("tokenizer_config.json", r#"{"chat_template": 5}"#);
        assert!(matches!(rendered(), Err(TemplateError::Template { .. })));
        write("chat_template.jinja", "own {{ eos_token }}\n");
        assert_eq!(rendered().expect("the template renders"), "own <|im_end|>");
    }

    #[test]
    fn hostile_templates_are_errors() {
        let messages = [Message { role: "user", content: "hi" }];
        let doubling = format!(
            "{{% set ns = namespace(x='xxxxxxxx') %}}{}{{{{ ns.x | length }}}}",
            "{% set ns.x = ns.x ~ ns.x %}".repeat(60)
        );
        let nested = "{% if true %}".repeat(5000);
        let brackets = format!("{{{{ {}1{} }}}}", "(".repeat(20_000), ")".repeat(20_000));
        let large = "x".repeat(MAX_TEMPLATE_BYTES + 1);
        for (case, text) in [
            ("syntax", "{% for %}"),
            ("unclosed", "{{ 'a"),
            ("endless", "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"),
            ("recursion", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
            ("doubling", &doubling),
            ("repeated", "{{ 'x' * 99999999999 }}"),
            ("repeated within bounds", "{% for i in range(9999) %}{% set x = 'x' * 99999999 %}{% endfor %}"),
            ("nested", &nested),
            ("brackets", &brackets),
            ("refused", "{{ raise_exception('only one turn, please') }}"),
            ("include", "{% include '/etc/passwd' %}"),
            ("unknown method", "{{ messages[0].content.format_map({}) }}"),
            ("unknown date", "{{ strftime_now('%Q') }}"),
            ("large", &large),
        ] {
            let result = with_template(text).and_then(|template| template.render(&messages));
            let error = result.err().unwrap_or_else(|| panic!("{case} was rendered"));
            assert!(case != "refused" || error.to_string().contains("only one turn, please"), "{error}");
        }
        let tokenizer = tokenizer();
        for text in
            ["no place", "{{ messages[0].content }}{{ messages[0].content }}", "<audio>{{ messages[0].content }}"]
        {
            let template = with_template(text).expect("the template is sound");
            let error = template.prompt(&tokenizer, "hi", false).expect_err("a place is lost or doubled");
            assert!(matches!(error, TemplateError::Place { .. }), "{error}");
        }
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, "Thursday 01 January 1970 00:00:00"),
            (951_782_400, "Tuesday 29 February 2000 00:00:00"),
            (1_709_251_199, "Thursday 29 February 2024 23:59:59"),
            (4_107_542_400, "Monday 01 March 2100 00:00:00"),
            (253_402_300_799, "Friday 31 December 9999 23:59:59"),
        ] {
            let time = UNIX_EPOCH + Duration::from_secs(seconds);
            assert_eq!(date(time, "%A %d %B %Y %H:%M:%S").expect("the letters are known"), expected);
        }
        let time = UNIX_EPOCH + Duration::from_secs(1_709_251_199);
        assert_eq!(date(time, "%a %b %y %m 100%%").expect("the letters are known"), "Thu Feb 24 02 100%");
    }
}
