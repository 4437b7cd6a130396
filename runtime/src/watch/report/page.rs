//! The report's markup: what stands before the windows, a window, what stands after them.

use std::fmt::Write as _;

use super::chart::COLOURS;
use crate::manifest::Answer;
use crate::observation::{Identity, Observation};
use crate::verify::Sentence;

/// Nothing but the page's own style and pictures may load or run, whatever a rationale or a file name holds.
const CONTENT_POLICY: &str = "default-src 'none'; img-src data:; style-src 'unsafe-inline'";

/// Text as it may stand between tags and in quoted attributes.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // Control characters are no valid HTML, and a NUL would end up as a replacement character anyway.
            control if control.is_control() && !control.is_ascii_whitespace() => escaped.push('\u{fffd}'),
            other => escaped.push(other),
        }
    }
    escaped
}

/// The start of the page, up to and with the opened `main`.
pub(super) fn start() -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{CONTENT_POLICY}\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>Candor</title>\n\
         <style>\n{}</style>\n</head>\n<body>\n<main>\n",
        include_str!("page.css")
    )
}

/// The page's head, known with the first observation: source, models, policy and the legend.
pub(super) fn head(first: &Observation) -> String {
    let policy = match first.policy.n {
        Some(n) => format!("{}({n})", first.policy.name),
        None => first.policy.name.clone(),
    };
    format!(
        "<header>\n<h1>Candor: {}</h1>\n<p>Model {} · verifier {} · policy {}</p>\n\
         <p>Sentences as the verifier reads them: <mark class=\"supports\">✓ supports the label</mark> \
         <mark class=\"contradicts\">✗ names another emotion</mark> \
         <mark class=\"silent\">· names none</mark></p>\n</header>\n",
        escape(&first.source),
        identity(&first.model),
        identity(&first.verifier),
        escape(&policy),
    )
}

fn identity(identity: &Identity) -> String {
    let short: String = identity.sha256.chars().take(12).collect();
    format!(
        "{} {} (<span title=\"sha256 {}\">{}</span>)",
        escape(&identity.name),
        escape(&identity.version),
        escape(&identity.sha256),
        escape(&short)
    )
}

/// A window. `pictures` are data addresses; `None` stands for pictures left out to keep the page small.
pub(super) fn window(observation: &Observation, pictures: Option<&[String]>) -> String {
    let index = observation.window.index;
    let (start_s, end_s) = (observation.window.start_s, observation.window.end_s);
    let mut html = format!("<article id=\"w{index}\">\n<div class=\"frames\">");
    for (number, address) in pictures.unwrap_or_default().iter().enumerate() {
        let _ = write!(html, "<img src=\"{address}\" alt=\"Frame {} of the window\">", number + 1);
    }
    if pictures.is_none() {
        html.push_str("<p>No picture: the page has as many as it can hold.</p>");
    }
    html.push_str("</div>\n<div>\n");

    let Some(label) = &observation.label else {
        let _ = writeln!(html, "<h2 class=\"label\">{start_s:.1} to {end_s:.1} s: no face, no emotion claimed</h2>");
        html.push_str("</div>\n</article>\n");
        return html;
    };
    let colour = observation
        .probabilities
        .as_ref()
        .and_then(|probabilities| probabilities.0.iter().position(|(name, _)| name == label))
        .map_or(String::new(), |position| format!(" c{}", position % COLOURS));
    let verdict = observation.verdict.name();
    let deciding = match observation.answer {
        Answer::Fast => &observation.fast_probabilities,
        Answer::After => &observation.probabilities,
    };
    let probability = deciding
        .as_ref()
        .and_then(|probabilities| probabilities.of(label))
        .map_or(String::new(), |value| format!(", {:.0} %", value * 100.0));
    let _ = writeln!(
        html,
        "<h2 class=\"label{colour}\">{start_s:.1} to {end_s:.1} s: {}{probability} \
         <span class=\"verdict {verdict}\">{verdict}</span></h2>",
        escape(label)
    );
    if observation.policy.withheld {
        html.push_str("<p class=\"rationale\">The reason is withheld.</p>\n");
    } else {
        html.push_str("<p class=\"rationale\">");
        for read in &observation.sentences {
            html.push_str(&sentence(read));
        }
        html.push_str("</p>\n");
    }
    let fast = observation
        .fast_probabilities
        .as_ref()
        .and_then(|fast| fast.best().map(|best| (best, fast.of(best).unwrap_or_default())))
        .map_or(String::new(), |(best, value)| format!("Fast answer {} ({:.0} %) · ", escape(best), value * 100.0));
    let tokens = &observation.tokens;
    let _ = writeln!(
        html,
        "<p class=\"facts\">{fast}{} tokens, {} more by the policy, {} written again · {:.0} ms</p>\n</div>\n</article>",
        tokens.generated, tokens.extra, observation.policy.resampled, observation.times.stages_ms.total
    );
    html
}

/// A sentence in the colour of what the verifier reads in it, its labels behind it; never by colour alone.
fn sentence(sentence: &Sentence) -> String {
    let (class, sign) = match sentence.supports {
        Some(true) => ("supports", '✓'),
        Some(false) => ("contradicts", '✗'),
        None => ("silent", '·'),
    };
    let labels: Vec<&str> = sentence.labels.iter().map(|label| label.name()).collect();
    format!("<mark class=\"{class}\">{sign} {} <small>{}</small></mark> ", escape(&sentence.text), labels.join(", "))
}

/// The end of the page: the chart, which the style sheet shows above the windows.
pub(super) fn end(chart: &str) -> String {
    let chart = if chart.is_empty() {
        "<p>No window was seen.</p>\n".to_string()
    } else {
        format!(
            "<section class=\"chart\">\n<h2>Emotion over time</h2>\n<div class=\"scroll\">\n{chart}</div>\n</section>\n"
        )
    };
    format!("{chart}</main>\n</body>\n</html>\n")
}
