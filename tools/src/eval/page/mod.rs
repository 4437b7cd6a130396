//! `eval.html`: an evaluation, or two side by side, as one page that needs nothing beside itself. Charts stand in it as
//! they are; the entries lie in it as data, which a small script filters and shows a page at a time.

mod charts;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{self, Write};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::compare::{Comparison, shown};
use super::metrics::Metrics;
use super::record::Record;
use super::tally::Measure;
use charts::{Bars, Gap};

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// An evaluation to show.
pub(super) struct Run<'a> {
    /// What it is of.
    pub(super) name: &'a str,
    pub(super) metrics: &'a Metrics,
    pub(super) records: &'a [Record],
}

/// Writes the page of one evaluation, or of two whose records belong together by their place. `pictures` are PNG files
/// by id.
pub(super) fn write(
    out: &mut impl Write,
    runs: &[Run<'_>],
    comparison: Option<&Comparison>,
    pictures: &HashMap<String, Vec<u8>>,
) -> io::Result<()> {
    // Nothing but the page's own style, script and pictures may load or run, whatever a rationale or an id holds.
    let hash = STANDARD.encode(Sha256::digest(SCRIPT));
    let policy = format!(
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{hash}'; base-uri 'none'; \
         form-action 'none'"
    );
    let title = if comparison.is_some() { "Two evaluations" } else { "Evaluation" };
    write!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{policy}\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>Candor: {title}</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<header>\n<h1>{title}</h1>\n"
    )?;
    for (place, run) in runs.iter().enumerate() {
        let letter = if runs.len() > 1 {
            format!("<b class=\"key run{place}\">{}</b> ", ["A", "B"][place])
        } else {
            String::new()
        };
        let policy = if run.metrics.policy.is_empty() {
            String::new()
        } else {
            format!(" · policy {}", escape(&run.metrics.policy))
        };
        writeln!(out, "<p>{letter}{} · {} entries{policy}</p>", escape(run.name), run.metrics.n)?;
    }
    out.write_all(b"</header>\n")?;
    out.write_all(summary(runs, comparison).as_bytes())?;
    out.write_all(include_bytes!("entries.html"))?;
    out.write_all(b"<script type=\"application/json\" id=\"data\">")?;
    write_data(out, runs, pictures)?;
    write!(out, "</script>\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n")?;
    out.flush()
}

/// A number of the table, with its name.
type Number = (&'static str, fn(&Metrics) -> f64);

/// The charts.
fn summary(runs: &[Run<'_>], comparison: Option<&Comparison>) -> String {
    let mut page = String::from("<div class=\"charts\">\n");
    if let Some(comparison) = comparison {
        let rows: Vec<Gap> = shares()
            .filter_map(|measure| {
                let found = comparison.measures.get(measure.key())?;
                Some(Gap {
                    label: measure.title().to_owned(),
                    value: found.pair.difference,
                    interval: found.pair.interval,
                    note: format!("p {}", shown(found.test.p())),
                })
            })
            .collect();
        section(&mut page, "B less A, with 95 % intervals and paired tests", &charts::differences(&rows));
    }
    let rows: Vec<Bars> = shares()
        .filter_map(|measure| {
            let value =
                |run: &Run<'_>| Some((run.metrics.value(measure)?, run.metrics.intervals.get(measure.key()).copied()));
            let values = runs.iter().map(value).collect::<Option<Vec<_>>>()?;
            Some(Bars { label: measure.title().to_owned(), values })
        })
        .collect();
    section(&mut page, "Measures, with 95 % intervals", &charts::bars(&rows));
    if let Some(first) = runs.first() {
        let rows: Vec<Bars> = first
            .metrics
            .recall
            .keys()
            .map(|&class| {
                let value = |run: &Run<'_>| {
                    let recall = run.metrics.recall.get(class).copied().unwrap_or(0.0);
                    (recall, run.metrics.recall_intervals.get(class).copied())
                };
                Bars { label: class.to_owned(), values: runs.iter().map(value).collect() }
            })
            .collect();
        section(&mut page, "Recall of each class, with 95 % intervals", &charts::bars(&rows));
    }
    for (place, run) in runs.iter().enumerate() {
        let of = if runs.len() > 1 { ["A: truth", "B: truth"][place] } else { "Truth" };
        section(&mut page, &format!("{of} (rows) and answers (columns)"), &charts::confusion(&run.metrics.confusion));
    }
    let mut table = String::from("<table><tbody>\n");
    let numbers: [Number; 9] = [
        ("tokens a completion", |m| m.tokens.completion),
        ("tokens thrown away by the policy", |m| m.tokens.extra),
        ("sentences a rationale", |m| m.conduct.sentences),
        ("words a rationale", |m| m.conduct.words),
        ("share of sentences that name an emotion", |m| m.conduct.naming_share),
        ("share of rationales of one sentence", |m| m.conduct.one_sentence_share),
        ("share of rationales that stand more than once", |m| m.conduct.repeated_share),
        ("different words, share", |m| m.conduct.distinct_1),
        ("different pairs of words, share", |m| m.conduct.distinct_2),
    ];
    for (name, value) in numbers {
        let cells: String = runs.iter().map(|run| format!("<td>{:.3}</td>", value(run.metrics))).collect();
        let _ = writeln!(table, "<tr><th>{name}</th>{cells}</tr>");
    }
    table.push_str("</tbody></table>\n");
    section(&mut page, "What is written", &table);
    page + "</div>\n"
}

fn section(page: &mut String, title: &str, content: &str) {
    let _ = write!(page, "<section>\n<h2>{title}</h2>\n<div class=\"scroll\">\n{content}</div>\n</section>\n");
}

/// Measures that lie within 0 and 1.
fn shares() -> impl Iterator<Item = Measure> {
    Measure::ALL.into_iter().filter(|measure| !matches!(measure, Measure::Tokens | Measure::ExtraTokens))
}

/// The entries as JSON that may stand within a script element: an array with short keys, see page.js.
fn write_data(out: &mut impl Write, runs: &[Run<'_>], pictures: &HashMap<String, Vec<u8>>) -> io::Result<()> {
    out.write_all(b"[")?;
    let records = runs.first().map_or(&[][..], |run| run.records);
    for (place, record) in records.iter().enumerate() {
        let of = |run: &Run<'_>| run.records.get(place).map(entry);
        let mut row = json!({
            "i": record.id,
            "t": record.truth.name(),
            "r": runs.iter().filter_map(of).collect::<Vec<Value>>(),
        });
        if let Some(picture) = pictures.get(&record.id) {
            row["p"] = STANDARD.encode(picture).into();
        }
        // `</script>` and `<!--` would end or change the element.
        let text = row.to_string().replace('<', "\\u003c");
        write!(out, "{}{text}", if place > 0 { ",\n" } else { "" })?;
    }
    out.write_all(b"]")
}

fn entry(record: &Record) -> Value {
    let name = |emotion: Option<candor::verify::Emotion>| emotion.map(candor::verify::Emotion::name);
    let sentences: Vec<Value> = record
        .sentences
        .iter()
        .map(|sentence| {
            let labels: Vec<&str> = sentence.labels.iter().map(|label| label.name()).collect();
            json!([sentence.text, labels.join(", "), sentence.supports])
        })
        .collect();
    json!({
        "a": name(record.answer), "f": name(record.fast), "v": name(record.read.verifier),
        "l": name(record.read.lexicon), "d": record.verdict.name(), "w": record.withheld, "s": sentences,
        "e": record.is_readable(), "n": record.tokens.completion, "x": record.tokens.extra,
        "c": record.cues.map(|cues| [cues.right, cues.stated]),
    })
}

/// Text as it may stand between tags and in quoted attributes.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;").replace('\'', "&#39;")
}

/// A grey picture as a PNG file.
pub(super) fn png(grey: &[u8], side: usize) -> Result<Vec<u8>, png::EncodingError> {
    let mut file = Vec::new();
    let side = u32::try_from(side).unwrap_or(u32::MAX);
    let mut encoder = png::Encoder::new(&mut file, side, side);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::High);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(grey)?;
    writer.finish()?;
    Ok(file)
}
