//! `report.html` of a run: what it says in words, its curves, and what else there is to show.

use crate::train::checkpoint::write_atomically;
use crate::train::curves::{RunLog, chart};
use std::fmt::Write as _;
use std::path::Path;

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222;\
background:#fff}svg{max-width:100%;height:auto}table{border-collapse:collapse;width:100%}td,th{border:1px solid #ccc;\
padding:.4em .6em;vertical-align:top;text-align:left}.charts{display:grid;grid-template-columns:repeat(auto-fit,\
minmax(420px,1fr));gap:1em}small{color:#666}";

/// A chart: its title and the keys of `metrics.jsonl` in it.
pub type Chart = (&'static str, &'static [&'static str]);

/// Writes the page into a run's folder. `title` and `words` are plain text, `rest` is HTML.
pub fn write(
    folder: &Path,
    log: &RunLog,
    title: &str,
    words: &[String],
    charts: &[Chart],
    rest: &str,
) -> anyhow::Result<()> {
    let mut page = String::new();
    write!(
        page,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{0}</title><style>{STYLE}</style><h1>{0}</h1>",
        escape(title)
    )?;
    for words in words {
        write!(page, "<p>{}</p>", escape(words))?;
    }
    page.push_str("<div class=\"charts\">");
    for (title, keys) in charts {
        let curves: Vec<(&str, Vec<(f64, f64)>)> =
            keys.iter().map(|&key| (key, log.curve(key))).filter(|(_, curve)| !curve.is_empty()).collect();
        if !curves.is_empty() {
            write!(page, "<figure>{}</figure>", chart(title, &curves)?)?;
        }
    }
    write!(page, "</div>{rest}")?;
    Ok(write_atomically(&folder.join("report.html"), page.as_bytes())?)
}

/// Text within HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Mean of a measure over all steps; none without any.
pub fn mean(log: &RunLog, key: &str) -> Option<f64> {
    let curve = log.curve(key);
    let sum: f64 = curve.iter().map(|point| point.1).sum();
    (!curve.is_empty()).then(|| sum / curve.len() as f64)
}
