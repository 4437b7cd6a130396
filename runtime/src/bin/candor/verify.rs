//! `candor verify`: reads any text as a rationale and says whether it supports an emotion.

use std::io::{IsTerminal, Read, stdin, stdout};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use candor::device::Choice;
use candor::message::say;
use candor::verify::reward::explanation_reward_of_labels;
use candor::verify::sentences::rationale_of;
use candor::verify::verdict::read_sentences;
use candor::verify::{Assessment, Emotion, GoEmotion, Verifier};
use candor::with_device;
use candor_kernels::Device;
use clap::Args;
use serde_json::json;

use crate::folders;
use crate::terminal;

/// A rationale is a paragraph; more than this is something else.
const MOST_BYTES: u64 = 16 << 20;

#[derive(Args)]
pub(crate) struct VerifyArgs {
    /// The emotion that the text is to give a reason for, such as anger or happy.
    #[arg(long, value_parser = parse_emotion)]
    emotion: Emotion,
    /// Folder of the verifier; else $CANDOR_VERIFIER, else models/default-verifier.
    #[arg(long, value_name = "DIR")]
    verifier: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Where to compute: auto (a GPU if one can be used, else the processor), cpu, cuda or cuda:N.
    #[arg(long, default_value_t = Choice::Auto)]
    device: Choice,
    /// Threads of the processor; one for each core if not given.
    #[arg(long)]
    threads: Option<usize>,
}

fn parse_emotion(label: &str) -> Result<Emotion, String> {
    let known = || Emotion::all().map(Emotion::name).collect::<Vec<_>>().join(", ");
    Emotion::fold(label).ok_or_else(|| format!("known are {}", known()))
}

pub(crate) fn run(args: VerifyArgs) -> Result<()> {
    let folder = folders::verifier(args.verifier.clone())?;
    let text = read_input()?;
    let rationale = inside_tags(&text)?;
    with_device!(args.device.open(args.threads)?, device => verify(Verifier::open(&folder, device)?, rationale, &args))
}

fn verify<D: Device>(mut verifier: Verifier<D>, rationale: &str, args: &VerifyArgs) -> Result<()> {
    let readings = read_sentences(rationale, &mut verifier)?;
    let labels: Vec<Vec<GoEmotion>> = readings.iter().map(|reading| reading.labels.clone()).collect();
    let reward = explanation_reward_of_labels(&labels, args.emotion);
    let Assessment { sentences, verdict } = Assessment::new(readings, args.emotion);
    if args.json {
        let line = json!({
            "emotion": args.emotion.name(),
            "sentences": sentences,
            "verdict": verdict,
            "reward": reward,
            "verifier": verifier.identity()?,
        });
        say(line)?;
    } else {
        let colour = terminal::colour(stdout().is_terminal());
        for sentence in &sentences {
            let names: Vec<&str> = sentence.labels.iter().map(|label| label.name()).collect();
            say(format_args!("{}  ({})", terminal::sentence(sentence, colour), names.join(", ")))?;
        }
        let verdict = terminal::verdict(verdict, colour);
        say(format_args!("{verdict} for {}, reward {reward:.2}", args.emotion.name()))?;
    }
    Ok(())
}

fn read_input() -> Result<String> {
    let mut bytes = Vec::new();
    stdin().lock().take(MOST_BYTES + 1).read_to_end(&mut bytes).context("standard input")?;
    if bytes.len() as u64 > MOST_BYTES {
        bail!("standard input holds more than {MOST_BYTES} bytes; give one rationale");
    }
    String::from_utf8(bytes).map_err(|error| anyhow!("standard input is not UTF-8: {error}"))
}

/// The text between the think tags, or all of a text without any.
fn inside_tags(text: &str) -> Result<&str> {
    match rationale_of(text) {
        Some(rationale) => Ok(rationale),
        None if text.contains("<think>") || text.contains("</think>") => {
            bail!("the text has one think tag without its partner; close it or leave both out")
        }
        None => Ok(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_come_in_pairs_or_not_at_all() {
        assert_eq!(inside_tags("Plain.").expect("plain text"), "Plain.");
        assert_eq!(inside_tags("<think>In.</think>\n<answer>sad</answer>").expect("a completion"), "In.");
        for text in ["<think>In.", "In.</think>", "</think>In.<think>"] {
            assert!(inside_tags(text).is_err(), "{text}");
        }
    }
}
