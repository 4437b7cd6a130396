//! One entry of a data set's JSON: the published lists' conversations, or columns `prompt`, `solution` and `video`.

use candor::verify::reward::format_reward;
use candor::verify::sentences::{answer_of, rationale_of};
use serde_json::{Map, Value};

/// What stands for pictures and sound in a prompt; the model puts its own in their place.
const PLACES: [&str; 2] = ["<video>", "<audio>"];

/// An entry as it is written, before its label is folded and its clip looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) id: Option<String>,
    pub(super) video: String,
    pub(super) prompt: Option<String>,
    pub(super) label: String,
    pub(super) rationale: Option<String>,
    /// Whether the entry names sound beside the pictures.
    pub(super) sound: bool,
}

impl Entry {
    /// Reads an entry; the error says what of it is not as it must be.
    pub(super) fn parse(value: &Value) -> Result<Entry, String> {
        let Value::Object(fields) = value else {
            return Err(format!("is {}, not an object", kind(value)));
        };
        let (prompt, solution) = match (fields.get("conversations"), fields.get("solution")) {
            (Some(turns), _) => conversation(turns)?,
            (None, Some(solution)) => {
                let prompt = fields.get("prompt").filter(|prompt| !prompt.is_null()).map(prompt_text).transpose()?;
                (prompt, text(solution, "solution")?)
            }
            (None, None) => return Err("has neither `conversations` nor `solution`".into()),
        };
        let (rationale, label) = parse_solution(&solution)?;
        let video = fields.get("video").ok_or("has no `video`")?;
        let video = text(video, "video")?;
        if video.is_empty() || video.contains('\0') {
            return Err(format!("`video` is {video:?}, which is no path"));
        }
        Ok(Entry {
            id: id(fields)?,
            video,
            prompt: prompt.map(|prompt| without_places(&prompt)).filter(|prompt| !prompt.is_empty()),
            label,
            rationale,
            sound: fields.get("audio").is_some_and(|audio| !audio.is_null()),
        })
    }

    /// The entry as the published lists have it.
    pub(super) fn to_conversation(&self) -> Value {
        let prompt = match &self.prompt {
            Some(prompt) => format!("{}\n{prompt}", PLACES[0]),
            None => PLACES[0].to_owned(),
        };
        let turns = [("human", prompt), ("gpt", self.solution())];
        let turns = turns.map(|(from, value)| serde_json::json!({"from": from, "value": value}));
        serde_json::json!({"video": self.video, "conversations": turns})
    }

    /// The entry as columns.
    pub(super) fn to_columns(&self) -> Value {
        let mut columns = Map::from_iter([("video".to_owned(), Value::from(self.video.as_str()))]);
        columns.extend(self.prompt.as_deref().map(|prompt| ("prompt".to_owned(), Value::from(prompt))));
        columns.insert("solution".to_owned(), self.solution().into());
        Value::Object(columns)
    }

    fn solution(&self) -> String {
        match &self.rationale {
            Some(rationale) => format!("<think>{rationale}</think>\n<answer>{}</answer>", self.label),
            None => self.label.clone(),
        }
    }
}

/// Rationale and label of a solution: a label, a label in tags, or a whole completion.
fn parse_solution(solution: &str) -> Result<(Option<String>, String), String> {
    let solution = solution.trim();
    let tagged = ["<think>", "</think>", "<answer>", "</answer>"].iter().any(|tag| solution.contains(tag));
    let (rationale, label) = match (rationale_of(solution), answer_of(solution)) {
        (Some(rationale), Some(label)) if format_reward(solution) == 1.0 => (Some(rationale.trim()), label),
        (None, Some(label)) if solution == format!("<answer>{label}</answer>") => (None, label),
        _ if !tagged => (None, solution),
        _ => return Err("the answer is neither a label nor <think>…</think><answer>…</answer>".into()),
    };
    if rationale.is_some_and(|rationale| rationale.is_empty() || rationale.contains('<')) {
        return Err("the rationale is empty or holds tags".into());
    }
    Ok((rationale.map(str::to_owned), label.trim().to_owned()))
}

/// The question and the answer of a conversation of two turns.
fn conversation(turns: &Value) -> Result<(Option<String>, String), String> {
    let Value::Array(turns) = turns else {
        return Err(format!("`conversations` is {}, not a list", kind(turns)));
    };
    let [question, answer] = turns.as_slice() else {
        return Err(format!("the conversation has {} turns, not 2", turns.len()));
    };
    let value = |turn: &Value, from: &str| {
        let speaker = turn.get("from").and_then(Value::as_str);
        let value = turn.get("value").and_then(Value::as_str);
        match (speaker, value) {
            (Some(speaker), Some(value)) if speaker == from => Ok(value.to_owned()),
            _ => Err(format!("a turn is not {{\"from\": \"{from}\", \"value\": \"…\"}}")),
        }
    };
    Ok((Some(value(question, "human")?), value(answer, "gpt")?))
}

/// The text of a `prompt`: a text, or messages of which the only one is the user's, a text or parts of it.
fn prompt_text(prompt: &Value) -> Result<String, String> {
    if let Value::String(text) = prompt {
        return Ok(text.clone());
    }
    let wrong = || "`prompt` is neither a text nor a list of one message of the user".to_owned();
    let [message] = prompt.as_array().ok_or_else(wrong)?.as_slice() else {
        return Err(wrong());
    };
    if message.get("role").and_then(Value::as_str) != Some("user") {
        return Err(wrong());
    }
    match message.get("content") {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) => {
            let texts = parts.iter().filter(|part| part.get("type").and_then(Value::as_str) == Some("text"));
            let texts: Option<Vec<&str>> = texts.map(|part| part.get("text")?.as_str()).collect();
            texts.map(|texts| texts.join("\n")).ok_or_else(wrong)
        }
        _ => Err(wrong()),
    }
}

fn without_places(prompt: &str) -> String {
    PLACES.iter().fold(prompt.to_owned(), |prompt, place| prompt.replace(place, "")).trim().to_owned()
}

/// Data sets number their entries or name them.
fn id(fields: &Map<String, Value>) -> Result<Option<String>, String> {
    match fields.get("id") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(id)) if !id.trim().is_empty() => Ok(Some(id.clone())),
        Some(Value::Number(id)) => Ok(Some(id.to_string())),
        Some(other) => Err(format!("`id` is {}, neither a text nor a number", kind(other))),
    }
}

fn text(value: &Value, field: &str) -> Result<String, String> {
    value.as_str().map(str::to_owned).ok_or_else(|| format!("`{field}` is {}, not a text", kind(value)))
}

/// What a JSON value is, for messages.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(text) if text.trim().is_empty() => "an empty text",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    #[test]
    fn the_published_forms() {
        let turns = |answer: &str| {
            json!({"video": "a/1.mp4", "conversations": [
                {"from": "human", "value": "<video>\n<audio>\nWhich emotion?"}, {"from": "gpt", "value": answer}]})
        };
        let reward = Entry::parse(&turns("sad")).unwrap();
        assert_eq!(reward.prompt.as_deref(), Some("Which emotion?"));
        assert_eq!((reward.video.as_str(), reward.label.as_str(), &reward.rationale), ("a/1.mp4", "sad", &None));
        let tuning = Entry::parse(&turns("<think>He weeps.</think>\n<answer>sad</answer>")).unwrap();
        assert_eq!((tuning.label.as_str(), tuning.rationale.as_deref()), ("sad", Some("He weeps.")));
        assert_eq!(Entry::parse(&tuning.to_conversation()).unwrap(), tuning);
        assert_eq!(Entry::parse(&tuning.to_columns()).unwrap(), tuning);
        assert_eq!(Entry::parse(&reward.to_columns()).unwrap(), reward);
    }

    #[test]
    fn columns() {
        let entry = Entry::parse(&json!({"id": 7, "video": "1.mp4", "audio": "1.wav", "solution": " fear "})).unwrap();
        assert_eq!((entry.id.as_deref(), entry.label.as_str(), entry.sound), (Some("7"), "fear", true));
        assert_eq!(entry.prompt, None);
        let parts = json!([{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which?"}]}]);
        for prompt in [json!("<video>Which?"), json!([{"role": "user", "content": "Which?"}]), parts] {
            let value = json!({"video": "1.mp4", "prompt": prompt, "solution": "<answer> sad </answer>"});
            let entry = Entry::parse(&value).unwrap();
            assert_eq!((entry.prompt.as_deref(), entry.label.as_str()), (Some("Which?"), "sad"), "{value}");
        }
        assert_eq!(
            Entry::parse(&json!({"video": "1", "prompt": "<video>\n<audio>", "solution": "x"})).unwrap().prompt,
            None
        );
    }

    #[test]
    fn what_is_of_another_form_says_why() {
        let good = json!({"from": "human", "value": ""});
        for (value, reason) in [
            (json!(3), "is a number, not an object"),
            (json!({}), "neither `conversations` nor `solution`"),
            (json!({"solution": "sad"}), "no `video`"),
            (json!({"solution": 3, "video": "1"}), "`solution` is a number"),
            (json!({"solution": "sad", "video": ["1"]}), "`video` is a list"),
            (json!({"solution": "sad", "video": "a\0b"}), "no path"),
            (json!({"solution": "sad", "video": ""}), "no path"),
            (json!({"solution": "sad", "video": "1", "id": []}), "`id` is a list"),
            (json!({"solution": "sad", "video": "1", "id": "  "}), "`id` is an empty text"),
            (json!({"solution": "sad", "video": "1", "prompt": 1e308}), "neither a text nor a list"),
            (json!({"solution": "sad", "video": "1", "prompt": []}), "neither a text nor a list"),
            (json!({"solution": "sad", "video": "1", "prompt": [{"role": "system", "content": "x"}]}), "of the user"),
            (json!({"solution": "<think>a</think>", "video": "1"}), "neither a label nor"),
            (json!({"solution": "<think>a</think> sad", "video": "1"}), "neither a label nor"),
            (json!({"solution": "a <answer>sad</answer>", "video": "1"}), "neither a label nor"),
            (json!({"solution": "<think></think><answer>sad</answer>", "video": "1"}), "rationale is empty"),
            (json!({"solution": "<think>a<think>b</think><answer>sad</answer>", "video": "1"}), "holds tags"),
            (json!({"conversations": "sad", "video": "1"}), "`conversations` is a text"),
            (json!({"conversations": [], "video": "1"}), "0 turns"),
            (json!({"conversations": [good, good], "video": "1"}), "\"from\": \"gpt\""),
            (json!({"conversations": [{"from": "human"}, 3], "video": "1"}), "\"from\": \"human\""),
        ] {
            let error = Entry::parse(&value).unwrap_err();
            assert!(error.contains(reason), "{value}: {error}");
        }
    }
}
