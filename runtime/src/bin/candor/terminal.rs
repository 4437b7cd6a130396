//! How observations look on a terminal.

#[cfg(feature = "media")]
use candor::observation::Observation;
use candor::verify::{Sentence, Verdict};

/// Whether to colour what goes to a terminal; `NO_COLOR` forbids it.
pub(crate) fn colour(is_terminal: bool) -> bool {
    is_terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

fn paint(text: &str, code: &str, colour: bool) -> String {
    if colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
}

/// Text without control characters, which could steer the terminal.
fn printable(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { ' ' } else { character }).collect()
}

/// A sentence behind its mark: ✓ supports the label, ✗ names another emotion, · names none.
pub(crate) fn sentence(sentence: &Sentence, colour: bool) -> String {
    let (mark, code) = match sentence.supports {
        Some(true) => ("✓", "32"),
        Some(false) => ("✗", "31"),
        None => ("·", "2"),
    };
    format!("{} {}", paint(mark, code, colour), printable(&sentence.text))
}

/// The verdict's name.
pub(crate) fn verdict(verdict: Verdict, colour: bool) -> String {
    let code = match verdict {
        Verdict::Verified => "1;32",
        Verdict::Mixed => "1;33",
        Verdict::Contradicted => "1;31",
        Verdict::Empty => "2",
    };
    paint(verdict.name(), code, colour)
}

/// A window on one line: time, emotion, probability, the rationale with a mark for each sentence, verdict.
#[cfg(feature = "media")] // only what watches prints windows
pub(crate) fn line(observation: &Observation, colour: bool) -> String {
    let time = format!("{:7.2}–{:<7.2}", observation.window.start_s, observation.window.end_s);
    let Some(label) = &observation.label else { return format!("{time} {}", paint("no face", "2", colour)) };
    let probability = observation.label_probability().unwrap_or(0.0);
    let emotion = paint(&format!("{label:<9}"), "1", colour);
    let reason = if observation.policy.withheld {
        "(reason withheld)".to_string()
    } else {
        observation.sentences.iter().map(|one| sentence(one, colour)).collect::<Vec<_>>().join(" ")
    };
    format!("{time} {emotion} {probability:.2}  {reason}  [{}]", verdict(observation.verdict, colour))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_and_control_characters() {
        let text = "It is joy.\x1b[2J".to_string();
        let mut one = Sentence { text, labels: Vec::new(), supports: Some(true) };
        assert_eq!(sentence(&one, false), "✓ It is joy. [2J");
        assert_eq!(sentence(&one, true), "\x1b[32m✓\x1b[0m It is joy. [2J");
        one.supports = Some(false);
        assert!(sentence(&one, false).starts_with('✗'));
        one.supports = None;
        assert!(sentence(&one, false).starts_with('·'));
        assert_eq!(verdict(Verdict::Mixed, false), "mixed");
        assert!(!colour(false));
    }
}
