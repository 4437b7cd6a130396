//! `candor-tools reward`: the rewards of completions in a file.

use std::io::BufRead;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use candor::device::Choice;
use candor::message::say;
use candor::verify::{Emotion, Verifier};
use candor::with_device;
use candor_kernels::Device;
use clap::Args;
use serde_json::Value;

use super::conduct::Conduct;
use super::settings::RewardSettings;
use super::{Paid, Rewards, Scorer, emotion_of, open_verifier};
use crate::dataset::kind;
use crate::workers;

/// `candor-tools reward`
#[derive(Args)]
pub struct RewardArgs {
    /// The verifier's folder.
    #[arg(long)]
    pub verifier: PathBuf,
    /// JSON lines with `completion` and `label`; other fields are left alone.
    #[arg(long)]
    pub input: PathBuf,
    /// Print one JSON object a line of the input, in its order, in place of a summary.
    #[arg(long)]
    pub json: bool,
    /// How completions are paid.
    #[command(flatten)]
    pub settings: RewardSettings,
    /// Threads, each with a verifier of its own over the same mapped weights.
    #[arg(long, default_value_t = 2)]
    pub threads: usize,
    /// Where the verifier computes: auto (a GPU if one can be used, else the processor), cpu, cuda or cuda:N.
    #[arg(long, default_value_t = Choice::Auto)]
    pub device: Choice,
}

/// A completion and the true emotion.
#[derive(Debug)]
struct Line {
    completion: String,
    emotion: Emotion,
}

/// Runs `candor-tools reward`.
pub fn run(args: &RewardArgs) -> anyhow::Result<()> {
    ensure!(args.threads > 0, "--threads must be at least 1");
    args.settings.check()?;
    let weights = args.settings.weights();
    let file = std::fs::File::open(&args.input).with_context(|| format!("cannot read {}", args.input.display()))?;
    let lines = read(std::io::BufReader::new(file), &args.input)?;
    let rewards = with_device!(args.device.open(Some(1))?, device => pay_on(&device, args, &lines))?;
    if args.json {
        for rewards in rewards {
            if !say(serde_json::to_string(&Paid::new(rewards, &weights))?)? {
                break;
            }
        }
        return Ok(());
    }
    let mean = |part: &dyn Fn(&Rewards) -> f32| {
        rewards.iter().map(|rewards| f64::from(part(rewards))).sum::<f64>() / rewards.len().max(1) as f64
    };
    let conduct = Conduct::measure(lines.iter().zip(&rewards).map(|(line, own)| (&*line.completion, own, None)));
    for (name, value) in [
        ("format", mean(&|rewards| rewards.format)),
        ("accuracy", mean(&|rewards| rewards.accuracy)),
        ("explanation", mean(&|rewards| rewards.explanation)),
        ("reward", mean(&|rewards| rewards.total(&weights))),
        ("distinct-1", conduct.distinct_1),
        ("distinct-2", conduct.distinct_2),
        ("sentences that name an emotion", conduct.naming_share),
        ("sentences a rationale", conduct.sentences),
        ("words a rationale", conduct.words),
        ("rationales of one sentence", conduct.one_sentence_share),
        ("rationales that are another's", conduct.repeated_share),
    ] {
        say(format_args!("{name:32} {value:8.4}"))?;
    }
    say(format_args!("{:32} {:>8}", "completions", rewards.len()))?;
    Ok(())
}

fn pay_on<D: Device>(device: &D, args: &RewardArgs, lines: &[Line]) -> anyhow::Result<Vec<Rewards>> {
    let open = || Ok(Scorer::new(open_verifier(&args.verifier, device.clone())?, args.settings.guard));
    let score = |scorer: &mut Scorer<Verifier<D>>, index: usize| {
        let line = &lines[index];
        let scored = scorer.score(&line.completion, line.emotion, None);
        scored.with_context(|| format!("{}:{}", args.input.display(), index + 1))
    };
    workers::run(lines.len(), args.threads, "completions", open, score)
}

/// Reads the file. The first line that cannot be used is the error.
fn read(file: impl BufRead, path: &Path) -> anyhow::Result<Vec<Line>> {
    let mut lines = Vec::new();
    for (index, line) in file.lines().enumerate() {
        let place = || format!("{}:{}", path.display(), index + 1);
        let line = line.with_context(place)?;
        match parse(&line) {
            Ok(line) => lines.push(line),
            Err(reason) => bail!("{}: {reason}", place()),
        }
    }
    ensure!(!lines.is_empty(), "{}: there is no line in it", path.display());
    Ok(lines)
}

fn parse(line: &str) -> Result<Line, String> {
    const FORM: &str = r#"a line is {"completion": "<think>…</think><answer>…</answer>", "label": "sad"}"#;
    if line.trim().is_empty() {
        return Err("the line is empty; delete it".into());
    }
    let value: Value = serde_json::from_str(line).map_err(|error| format!("no JSON ({error}); {FORM}"))?;
    let fields = value.as_object().ok_or_else(|| format!("{}, not an object; {FORM}", kind(&value)))?;
    let text = |name: &str| match fields.get(name) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("`{name}` is {}, not a text; {FORM}", kind(other))),
        None => Err(format!("there is no `{name}`; {FORM}")),
    };
    Ok(Line { completion: text("completion")?.clone(), emotion: emotion_of(text("label")?)? })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn lines_are_read_in_order() {
        let text =
            "{\"completion\": \"a\", \"label\": \" Angry\", \"id\": 7}\n{\"label\":\"neutral\",\"completion\":\"\"}";
        let lines = read(text.as_bytes(), Path::new("f")).unwrap();
        let read: Vec<_> = lines.iter().map(|line| (&*line.completion, line.emotion)).collect();
        assert_eq!(read, [("a", Emotion::Anger), ("", Emotion::Neutral)]);
    }

    #[test]
    fn bad_lines_are_named() {
        let good = r#"{"completion": "a", "label": "sad"}"#;
        for (bad, said) in [
            ("", "f:2: the line is empty; delete it"),
            ("{", "f:2: no JSON"),
            ("[]", "f:2: a list, not an object"),
            (r#"{"label": "sad"}"#, "f:2: there is no `completion`"),
            (r#"{"completion": "a"}"#, "f:2: there is no `label`"),
            (r#"{"completion": ["a"], "label": "sad"}"#, "f:2: `completion` is a list, not a text"),
            (r#"{"completion": "a", "label": 3}"#, "f:2: `label` is a number, not a text"),
            (
                r#"{"completion": "a", "label": "calm"}"#,
                "f:2: the label \"calm\" names no emotion; there are happiness",
            ),
        ] {
            let error = read(format!("{good}\n{bad}\n{good}").as_bytes(), Path::new("f")).unwrap_err().to_string();
            assert!(error.starts_with(said), "{error}");
        }
        assert!(read("".as_bytes(), Path::new("f")).unwrap_err().to_string().contains("no line"));
        assert!(read(&b"\xff\xfe\n"[..], Path::new("f")).is_err());
    }
}
