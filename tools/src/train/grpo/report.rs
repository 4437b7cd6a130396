//! `report.html` of a reward fine-tuning: its curves, and what the model said before and after.

use super::samples::{self, Sample};
use super::settings::GrpoArgs;
use crate::train::curves::RunLog;
use crate::train::tuning::report::{self, Chart, escape, mean};
use std::fmt::Write as _;

const CHARTS: [Chart; 10] = [
    ("Reward", &["reward"]),
    ("Reward by part", &["format", "accuracy", "explanation", "groundedness"]),
    ("Divergence from the model before training (KL)", &["kl"]),
    ("Tokens a completion", &["length"]),
    ("Entropy a token", &["entropy"]),
    ("Groups whose rewards are all equal; truncated completions", &["flat_groups", "truncated"]),
    ("Against the cheats", &["distinct_2", "naming_share", "one_sentence_share", "repeated_share", "cue_accuracy"]),
    ("Log-probabilities: trainer against rollout", &["log_prob_difference", "log_prob_difference_max"]),
    ("Norm of the gradient", &["norm"]),
    ("Tokens a second", &["rollout_tokens_per_s", "train_tokens_per_s"]),
];

/// Writes the page.
pub(super) fn write(args: &GrpoArgs, log: &RunLog) -> anyhow::Result<()> {
    let folder = &args.input.out;
    let mut words = Vec::new();
    if let Some(last) = log.lines().last() {
        let shown = |key: &str| last.get(key).and_then(serde_json::Value::as_f64).unwrap_or(0.0);
        words.push(format!(
            "Step {}: reward {:.3} (format {:.3}, accuracy {:.3}, explanation {:.3}).",
            shown("step"),
            shown("reward"),
            shown("format"),
            shown("accuracy"),
            shown("explanation")
        ));
    }
    words.extend(speeds(log));
    let mut rest = String::from("<h2>Before and after</h2><table><tr><th>Clip<th>Before<th>After</tr>");
    let (before, after) = (samples::read(&folder.join(samples::BEFORE)), samples::read(&folder.join(samples::AFTER)));
    for (index, sample) in before.iter().enumerate() {
        write!(
            rest,
            "<tr><td>{}<br><small>{}</small><td>{}<td>{}</tr>",
            escape(&sample.label),
            escape(&sample.id),
            cell(Some(sample)),
            cell(after.get(index))
        )?;
    }
    rest.push_str("</table>");
    let title = format!("Reward fine-tuning of {}", args.input.model.display());
    report::write(folder, log, &title, &words, &CHARTS, &rest)
}

/// Speed over all steps, in words.
pub(super) fn speeds(log: &RunLog) -> Option<String> {
    let (drawn, trained) = (mean(log, "rollout_tokens_per_s")?, mean(log, "train_tokens_per_s")?);
    Some(format!("Rollouts {drawn:.0} tokens/s, training {trained:.0} tokens/s, means over the steps."))
}

fn cell(sample: Option<&Sample>) -> String {
    sample.map_or_else(
        || "<small>not yet</small>".to_owned(),
        |sample| {
            format!(
                "{}<br><small>format {} · accuracy {} · explanation {:.2}</small>",
                escape(&sample.completion),
                sample.format,
                sample.accuracy,
                sample.explanation
            )
        },
    )
}
