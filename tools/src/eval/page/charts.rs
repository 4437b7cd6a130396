//! The page's charts as SVG, in the colours of its style sheet. Numbers stand beside every mark, so nothing is told by
//! colour alone.

use std::fmt::Write as _;

use super::escape;
use crate::eval::bootstrap::Interval;
use crate::eval::metrics::Confusion;

/// Width of a chart, in its own units.
const WIDTH: f64 = 700.0;
/// Where the bars begin: labels stand before it.
const LEFT: f64 = 275.0;
/// Where they end: values stand behind it.
const RIGHT: f64 = 515.0;
/// Height of a bar with its space.
const STEP: f64 = 20.0;
/// Space between rows.
const GAP: f64 = 8.0;

/// A row of bars.
pub(super) struct Bars {
    pub(super) label: String,
    /// Value and interval of each evaluation.
    pub(super) values: Vec<(f64, Option<Interval>)>,
}

/// Horizontal bars from 0 to 1 with whiskers, one colour for each evaluation.
pub(super) fn bars(rows: &[Bars]) -> String {
    let series = rows.iter().map(|row| row.values.len()).max().unwrap_or(0).max(1);
    let row_height = series as f64 * STEP + GAP;
    let height = rows.len() as f64 * row_height + 22.0;
    let mut svg = open(height);
    let x = |value: f64| LEFT + value.clamp(0.0, 1.0) * (RIGHT - LEFT);
    for tick in [0.0, 0.25, 0.5, 0.75, 1.0] {
        grid_line(&mut svg, x(tick), height - 18.0, &format!("{tick}"));
    }
    for (index, row) in rows.iter().enumerate() {
        let top = index as f64 * row_height;
        label(&mut svg, &row.label, top + row_height / 2.0);
        for (run, (value, interval)) in row.values.iter().enumerate() {
            let y = top + GAP / 2.0 + run as f64 * STEP;
            let middle = y + STEP / 2.0;
            let _ = write!(
                svg,
                "<rect class=\"bar run{run}\" x=\"{LEFT}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"2\"/>",
                y + 3.0,
                x(*value) - LEFT,
                STEP - 6.0
            );
            let mut text = format!("{value:.3}");
            if let Some([low, high]) = interval {
                whisker(&mut svg, x(*low), x(*high), middle);
                let _ = write!(text, "  [{low:.3}, {high:.3}]");
            }
            let _ = write!(svg, "<text x=\"{}\" y=\"{:.1}\">{text}</text>", RIGHT + 8.0, middle + 4.0);
        }
    }
    svg + "</svg>\n"
}

/// A row of a chart of differences.
pub(super) struct Gap {
    pub(super) label: String,
    pub(super) value: f64,
    pub(super) interval: Interval,
    pub(super) note: String,
}

/// Differences around zero with whiskers.
pub(super) fn differences(rows: &[Gap]) -> String {
    let ends = rows.iter().flat_map(|row| [row.value.abs(), row.interval[0].abs(), row.interval[1].abs()]);
    let reach = ends.fold(0.01, f64::max);
    let height = rows.len() as f64 * (STEP + GAP) + 22.0;
    let mut svg = open(height);
    let x = |value: f64| LEFT + (value / reach + 1.0) / 2.0 * (RIGHT - LEFT);
    for tick in [-reach, 0.0, reach] {
        grid_line(&mut svg, x(tick), height - 18.0, &if tick == 0.0 { "0".into() } else { format!("{tick:+.3}") });
    }
    for (index, row) in rows.iter().enumerate() {
        let middle = index as f64 * (STEP + GAP) + (STEP + GAP) / 2.0;
        label(&mut svg, &row.label, middle);
        whisker(&mut svg, x(row.interval[0]), x(row.interval[1]), middle);
        let _ = write!(svg, "<circle class=\"run1\" cx=\"{:.1}\" cy=\"{middle:.1}\" r=\"5\"/>", x(row.value));
        let _ = write!(
            svg,
            "<text x=\"{}\" y=\"{:.1}\">{:+.3}  {}</text>",
            RIGHT + 8.0,
            middle + 4.0,
            row.value,
            escape(&row.note)
        );
    }
    svg + "</svg>\n"
}

/// The confusion matrix: rows are the truth, columns the answers, shaded by share of the row.
pub(super) fn confusion(confusion: &Confusion) -> String {
    const NAME: f64 = 110.0;
    const CELL: f64 = 30.0;
    const LETTER: f64 = 6.5;
    let columns = confusion.labels.len() + 1;
    let width = (WIDTH - NAME) / columns as f64;
    let height = confusion.labels.len() as f64 * CELL + 40.0;
    let mut svg = open(height);
    for (column, name) in confusion.labels.iter().chain(&["none"]).enumerate() {
        let (x, fits) = (NAME + (column as f64 + 0.5) * width, (width / LETTER) as usize);
        let short = name.get(..fits).unwrap_or(name);
        let _ = write!(
            svg,
            "<text class=\"middle soft\" x=\"{x:.1}\" y=\"14\">{}<title>answered {}</title></text>",
            escape(short),
            escape(name)
        );
    }
    for (row, (truth, counts)) in confusion.labels.iter().zip(&confusion.rows).enumerate() {
        let y = 22.0 + row as f64 * CELL;
        let _ = write!(
            svg,
            "<text class=\"end\" x=\"{}\" y=\"{:.1}\">{}</text>",
            NAME - 8.0,
            y + CELL / 2.0 + 4.0,
            escape(truth)
        );
        let all = counts.iter().sum::<usize>().max(1) as f64;
        for (column, &count) in counts.iter().enumerate() {
            let (x, share) = (NAME + column as f64 * width, count as f64 / all);
            let class = if column == row { "hit" } else { "miss" };
            let name = confusion.labels.get(column).unwrap_or(&"none");
            let _ = write!(
                svg,
                "<g><title>{} answered {}: {count} ({:.1} %)</title><rect class=\"cell\" x=\"{x:.1}\" y=\"{y:.1}\" \
                 width=\"{:.1}\" height=\"{:.1}\"/><rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" \
                 width=\"{:.1}\" height=\"{:.1}\" fill-opacity=\"{:.3}\"/><text class=\"middle\" x=\"{:.1}\" \
                 y=\"{:.1}\">{count}</text></g>",
                escape(truth),
                escape(name),
                share * 100.0,
                width - 2.0,
                CELL - 2.0,
                width - 2.0,
                CELL - 2.0,
                share,
                x + width / 2.0 - 1.0,
                y + CELL / 2.0 + 3.0
            );
        }
    }
    svg + "</svg>\n"
}

fn open(height: f64) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\">")
}

fn grid_line(svg: &mut String, x: f64, bottom: f64, text: &str) {
    let _ = write!(
        svg,
        "<path class=\"grid\" d=\"M{x:.1} 0V{bottom:.1}\"/><text class=\"middle soft\" x=\"{x:.1}\" \
         y=\"{:.1}\">{text}</text>",
        bottom + 14.0
    );
}

fn label(svg: &mut String, text: &str, middle: f64) {
    let _ = write!(svg, "<text class=\"end\" x=\"{}\" y=\"{:.1}\">{}</text>", LEFT - 8.0, middle + 4.0, escape(text));
}

fn whisker(svg: &mut String, low: f64, high: f64, middle: f64) {
    let (top, bottom) = (middle - 4.0, middle + 4.0);
    let _ = write!(
        svg,
        "<path class=\"whisker\" d=\"M{low:.1} {top:.1}V{bottom:.1}M{low:.1} {middle:.1}H{high:.1}M{high:.1} \
         {top:.1}V{bottom:.1}\"/>"
    );
}
