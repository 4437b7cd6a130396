//! Splits a PTX text into words and marks of punctuation, each with its line.

use super::Error;

/// A word (`ld.global.f32`, `%r1`, `0f3F800000`), a string with its quotes, or one mark of punctuation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Token<'a> {
    pub(super) text: &'a str,
    /// Counted from one.
    pub(super) line: u32,
}

/// The tokens of a text; comments are dropped.
pub(super) fn tokens(text: &str) -> Result<Vec<Token<'_>>, Error> {
    let mut tokens = Vec::new();
    let (mut at, mut line) = (0, 1);
    while at < text.len() {
        let rest = &text[at..];
        let len = token_len(rest).map_err(|message| Error::parse(line, first_word(rest), message))?;
        let token = &rest[..len];
        if !skipped(token) {
            tokens.push(Token { text: token, line });
        }
        line += token.matches('\n').count() as u32;
        at += len;
    }
    Ok(tokens)
}

fn skipped(token: &str) -> bool {
    token.starts_with(char::is_whitespace) || token.starts_with("//") || token.starts_with("/*")
}

fn first_word(text: &str) -> &str {
    text.split_whitespace().next().unwrap_or("")
}

fn token_len(rest: &str) -> Result<usize, &'static str> {
    let first = rest.chars().next().unwrap_or(' ');
    if first.is_whitespace() {
        return Ok(first.len_utf8());
    }
    if rest.starts_with("//") {
        return Ok(rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return rest.find("*/").map(|end| end + 2).ok_or("a comment without an end");
    }
    if first == '"' {
        return rest[1..].find('"').map(|end| end + 2).ok_or("a string without an end");
    }
    if is_word(first) {
        return Ok(word_len(rest));
    }
    if "{}()[]<>,;:=@!|+-".contains(first) { Ok(1) } else { Err("a character that PTX does not have here") }
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || "_$%.".contains(c)
}

/// A word may hold `::` (`L1::no_allocate`), but a single `:` ends it, as a label does. A directive ends at a second
/// point: `.reg.b32` is two words.
fn word_len(rest: &str) -> usize {
    let directive = rest.starts_with('.');
    let mut len = 0;
    while let Some(c) = rest[len..].chars().next() {
        if directive && len > 0 && c == '.' {
            break;
        } else if is_word(c) {
            len += 1;
        } else if rest[len..].starts_with("::") {
            len += 2;
        } else {
            break;
        }
    }
    len
}
