//! `report.html` of a run: its curves, and what the model said before and after.

use super::samples::{self, Sample};
use super::settings::GrpoArgs;
use crate::train::checkpoint::write_atomically;
use crate::train::curves::{RunLog, chart};
use std::fmt::Write as _;
use std::path::Path;

/// A chart: its title and the keys of `metrics.jsonl` in it.
const CHARTS: [(&str, &[&str]); 9] = [
    ("Reward", &["reward"]),
    ("Reward by part", &["format", "accuracy", "explanation", "groundedness"]),
    ("Divergence from the model before training (KL)", &["kl"]),
    ("Tokens a completion", &["length"]),
    ("Entropy a token", &["entropy"]),
    ("Groups whose rewards are all equal; truncated completions", &["flat_groups", "truncated"]),
    ("Against the cheats", &["distinct_2", "naming_share", "one_sentence_share", "repeated_share", "cue_accuracy"]),
    ("Log-probabilities: trainer against rollout", &["log_prob_difference", "log_prob_difference_max"]),
    ("Norm of the gradient", &["norm"]),
];

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222;\
background:#fff}svg{max-width:100%;height:auto}table{border-collapse:collapse;width:100%}td,th{border:1px solid #ccc;\
padding:.4em .6em;vertical-align:top;text-align:left}.charts{display:grid;grid-template-columns:repeat(auto-fit,\
minmax(420px,1fr));gap:1em}small{color:#666}";

/// Writes the page.
pub(super) fn write(folder: &Path, log: &RunLog, args: &GrpoArgs) -> anyhow::Result<()> {
    let mut page = String::new();
    let title = format!("Reward fine-tuning of {}", args.model.display());
    write!(
        page,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{0}</title><style>{STYLE}</style><h1>{0}</h1>",
        escape(&title)
    )?;
    let last = log.lines().last();
    if let Some(last) = last {
        let shown = |key: &str| last.get(key).and_then(serde_json::Value::as_f64).unwrap_or(0.0);
        write!(
            page,
            "<p>Step {}: reward {:.3} (format {:.3}, accuracy {:.3}, explanation {:.3}), {:.0} tokens/s drawn, {:.0} \
             tokens/s trained.</p>",
            shown("step"),
            shown("reward"),
            shown("format"),
            shown("accuracy"),
            shown("explanation"),
            shown("rollout_tokens_per_s"),
            shown("train_tokens_per_s")
        )?;
    }
    page.push_str("<div class=\"charts\">");
    for (title, keys) in CHARTS {
        let curves: Vec<(&str, Vec<(f64, f64)>)> =
            keys.iter().map(|&key| (key, log.curve(key))).filter(|(_, curve)| !curve.is_empty()).collect();
        if !curves.is_empty() {
            write!(page, "<figure>{}</figure>", chart(title, &curves)?)?;
        }
    }
    page.push_str("</div><h2>Before and after</h2><table><tr><th>Clip<th>Before<th>After</tr>");
    let (before, after) = (samples::read(&folder.join(samples::BEFORE)), samples::read(&folder.join(samples::AFTER)));
    for (index, sample) in before.iter().enumerate() {
        write!(
            page,
            "<tr><td>{}<br><small>{}</small><td>{}<td>{}</tr>",
            escape(&sample.label),
            escape(&sample.id),
            cell(Some(sample)),
            cell(after.get(index))
        )?;
    }
    page.push_str("</table>");
    Ok(write_atomically(&folder.join("report.html"), page.as_bytes())?)
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

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
