//! Explanations as they lie in a file: JSON lines with `id`, `rationale` and, where there is one, `answer`, which is what
//! `candor-tools eval --records` writes.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use serde_json::Value;

/// What a model says of one clip.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The rationale, without space around it.
    pub text: String,
    /// The emotion answered.
    pub answer: Option<String>,
}

/// One line: the clip's id, and `None` where the model gave no rationale.
pub type Entry = (String, Option<Explanation>);

/// Reads a file of explanations, in the order of its lines.
///
/// # Errors
/// The file cannot be read, has no line, or a line is not as it must be: the message names it.
pub fn read(path: &Path) -> anyhow::Result<Vec<Entry>> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut lines_of: HashMap<String, usize> = HashMap::new();
    let mut entries = Vec::new();
    for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
        if line.trim_ascii().is_empty() {
            continue;
        }
        let number = index + 1;
        let entry = parse(line).with_context(|| format!("{}, line {number}", path.display()))?;
        if let Some(first) = lines_of.insert(entry.0.clone(), number) {
            bail!("{}, line {number}: id {:?} is that of line {first} already", path.display(), entry.0);
        }
        entries.push(entry);
    }
    if entries.is_empty() {
        bail!("{} has no line; give what `candor-tools eval --records` writes", path.display());
    }
    Ok(entries)
}

fn parse(line: &[u8]) -> anyhow::Result<Entry> {
    let value: Value = serde_json::from_slice(line).context("is no JSON")?;
    // Records of before there were ids name the row of a photograph.
    let id = value.get("id").or_else(|| value.get("photograph")).context("has neither `id` nor `photograph`")?;
    let id = match id {
        Value::String(id) if !id.trim().is_empty() => id.clone(),
        Value::Number(id) => id.to_string(),
        other => bail!("`id` is {other}, neither a text nor a number"),
    };
    let text = |field: &str| match value.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.trim().to_owned()).filter(|text| !text.is_empty())),
        Some(other) => Err(anyhow!("`{field}` is {other}, not a text")),
    };
    // A file of something else would otherwise pass for one without a single rationale.
    value.get("rationale").context("has no `rationale`")?;
    let answer = text("answer")?;
    Ok((id, text("rationale")?.map(|text| Explanation { text, answer })))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn read_text(text: &str) -> anyhow::Result<Vec<Entry>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn records_of_either_form() {
        let entries = read_text(
            "{\"id\": \"x/1.mp4\", \"rationale\": \" Calm. \\n\", \"answer\": \"neutral\"}\n\n\
             {\"photograph\": 7, \"rationale\": null, \"answer\": null}\r\n{\"id\": 8, \"rationale\": \"Sad.\"}",
        )
        .unwrap();
        let explanation =
            |text: &str, answer: Option<&str>| Explanation { text: text.into(), answer: answer.map(str::to_owned) };
        assert_eq!(
            entries,
            [
                ("x/1.mp4".to_owned(), Some(explanation("Calm.", Some("neutral")))),
                ("7".to_owned(), None),
                ("8".to_owned(), Some(explanation("Sad.", None))),
            ]
        );
    }

    #[test]
    fn what_is_no_record_names_its_line() {
        let good = "{\"id\": 1, \"rationale\": \"x\"}\n";
        for (line, reason) in [
            ("{", "is no JSON"),
            ("3", "neither `id` nor `photograph`"),
            ("{\"rationale\": \"x\"}", "neither `id` nor `photograph`"),
            ("{\"id\": [], \"rationale\": \"x\"}", "`id` is []"),
            ("{\"id\": \" \", \"rationale\": \"x\"}", "`id` is \" \""),
            ("{\"id\": 2}", "has no `rationale`"),
            ("{\"id\": 2, \"rationale\": 5}", "`rationale` is 5"),
            ("{\"id\": 2, \"rationale\": \"x\", \"answer\": {}}", "`answer` is {}"),
            ("{\"id\": 1, \"rationale\": \"y\"}", "id \"1\" is that of line 1"),
        ] {
            let error = format!("{:#}", read_text(&format!("{good}{line}")).unwrap_err());
            assert!(error.contains("line 2") && error.contains(reason), "{line}: {error}");
        }
        assert!(read_text("\n \n").unwrap_err().to_string().contains("has no line"));
    }
}
