//! Cuts a rationale into sentences, and a completion into its rationale and its answer.
//!
//! A sentence ends after `.`, `!` or `?` followed by white space, outside double quotes. That is the whole rule of
//! the verifier's paper, so "e.g. the brows" is cut after "e.g." and "3.5" is not cut at all. Straight and curly
//! quotes count; they pair up in order, and a last one without a partner is an ordinary character, so that a forgotten
//! quote does not swallow the rest of the text.

/// The sentences of a text, in order, without the white space around them. Text after the last full stop is a sentence
/// too; text of white space alone has none.
pub fn split_sentences(text: &str) -> Vec<&str> {
    let quotes = text.chars().filter(|&c| is_quote(c)).count();
    let paired = quotes - quotes % 2;
    let mut sentences = Vec::new();
    let (mut start, mut seen) = (0, 0);
    let mut characters = text.char_indices().peekable();
    while let Some((at, character)) = characters.next() {
        if is_quote(character) {
            seen += 1;
        }
        let quoted = seen < paired && seen % 2 == 1;
        let end = at + character.len_utf8();
        if !quoted && ends_sentence(character) && characters.peek().is_some_and(|(_, next)| next.is_whitespace()) {
            sentences.push(&text[start..end]);
            start = end;
        }
    }
    sentences.push(&text[start..]);
    sentences.into_iter().map(str::trim).filter(|sentence| !sentence.is_empty()).collect()
}

/// Byte length of the first sentence of a text that is still growing, with the white space that ended it; `None` while
/// it is unfinished. An open quote counts as open here: its partner may still come.
pub fn finished_sentence(text: &str) -> Option<usize> {
    let mut quoted = false;
    let mut ended = false;
    for (at, character) in text.char_indices() {
        if ended && character.is_whitespace() {
            return Some(at + character.len_utf8());
        }
        quoted ^= is_quote(character);
        ended = !quoted && ends_sentence(character);
    }
    None
}

/// The text between the first `<think>` and the `</think>` that follows it; `None` where a tag is missing.
pub fn rationale_of(completion: &str) -> Option<&str> {
    between(completion, "<think>", "</think>")
}

/// The text between the first `<answer>` and the `</answer>` that follows it; `None` where a tag is missing.
pub fn answer_of(completion: &str) -> Option<&str> {
    between(completion, "<answer>", "</answer>")
}

fn between<'t>(text: &'t str, open: &str, close: &str) -> Option<&'t str> {
    let (_, rest) = text.split_once(open)?;
    Some(rest.split_once(close)?.0)
}

fn ends_sentence(character: char) -> bool {
    matches!(character, '.' | '!' | '?')
}

fn is_quote(character: char) -> bool {
    matches!(character, '"' | '“' | '”' | '„')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_after_full_stops_before_white_space() {
        assert_eq!(split_sentences("One. Two! Three?\nFour"), ["One.", "Two!", "Three?", "Four"]);
        assert_eq!(split_sentences("Well... maybe?! Yes."), ["Well...", "maybe?!", "Yes."]);
        assert_eq!(split_sentences("A score of 3.5 out of 4.0.\u{a0}Then"), ["A score of 3.5 out of 4.0.", "Then"]);
    }

    #[test]
    fn empty_text_has_no_sentences() {
        assert!(split_sentences("").is_empty());
        assert!(split_sentences(" \n\t\u{3000}").is_empty());
    }

    /// The paper's rule has no exception for abbreviations.
    #[test]
    fn abbreviations_are_cut() {
        assert_eq!(split_sentences("Mr. Smith frowns, e.g. at me."), ["Mr.", "Smith frowns, e.g.", "at me."]);
    }

    #[test]
    fn nothing_is_cut_inside_double_quotes() {
        assert_eq!(
            split_sentences(r#"She says "No. Never! Go." and turns. He waits."#),
            [r#"She says "No. Never! Go." and turns."#, "He waits."]
        );
        assert_eq!(
            split_sentences("She says “No. Never.” softly. He waits."),
            ["She says “No. Never.” softly.", "He waits."]
        );
        // The stop before a closing quote is not followed by white space, so the sentence goes on.
        assert_eq!(split_sentences(r#"He shouts "Stop!" She runs. End"#), [r#"He shouts "Stop!" She runs."#, "End"]);
        assert_eq!(split_sentences("'Stop. Now.' is not double quoted."), ["'Stop.", "Now.' is not double quoted."]);
    }

    #[test]
    fn an_unpaired_quote_is_ordinary() {
        assert_eq!(split_sentences(r#"A "b. c" d. An 5" e. F."#), [r#"A "b. c" d."#, r#"An 5" e."#, "F."]);
        assert_eq!(split_sentences(r#"" One. Two."#), [r#"" One."#, "Two."]);
    }

    #[test]
    fn unicode_text_is_cut_at_character_borders() {
        assert_eq!(split_sentences("Ça va… 笑顔です. 👩‍🦰 smiles.\u{2003}é"), ["Ça va… 笑顔です.", "👩‍🦰 smiles.", "é"]);
        assert_eq!(split_sentences("笑顔。悲しい。"), ["笑顔。悲しい。"]);
    }

    #[test]
    fn growing_text_finishes_where_the_whole_is_cut() {
        let text = r#"One is "a. b" here.  Two. Three"#;
        let mut rest = text;
        let mut found = Vec::new();
        while let Some(length) = finished_sentence(rest) {
            found.push(rest[..length].trim());
            rest = &rest[length..];
        }
        found.push(rest.trim());
        assert_eq!(found, split_sentences(text));
        for end in text.char_indices().map(|(at, _)| at).take_while(|&at| at <= 19) {
            assert_eq!(finished_sentence(&text[..end]), None, "{end}");
        }
        assert_eq!(finished_sentence(&text[..20]), Some(20));
    }

    #[test]
    fn tags() {
        assert_eq!(rationale_of("<think>a</think>\n<answer>b</answer>"), Some("a"));
        assert_eq!(answer_of("<think>a</think>\n<answer>b</answer>"), Some("b"));
        assert_eq!(rationale_of("<think>a"), None);
        assert_eq!(rationale_of("a</think>"), None);
        assert_eq!(rationale_of("</think>a<think>"), None);
        assert_eq!(rationale_of("<think></think>"), Some(""));
        assert_eq!(answer_of("<answer>sad"), None);
    }
}
