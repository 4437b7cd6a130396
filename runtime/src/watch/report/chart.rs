//! The report's chart: the probability of every label over time, after the rationale and as the fast answer, as SVG
//! with no script; what stands under the pointer comes from `<title>` elements.

use std::fmt::Write as _;

use super::page::escape;

/// Lines take their colour and dash from the style sheet's classes `c0` to `c7`, then start anew.
pub(super) const COLOURS: usize = 8;
/// More windows than this are drawn thinned out: a line cannot show more on a screen.
const MAX_POINTS: usize = 600;

const WIDTH: f64 = 960.0;
const LEFT: f64 = 44.0;
const RIGHT: f64 = 104.0;
const PANEL_HEIGHT: f64 = 150.0;
const PANEL_TOPS: [f64; 2] = [26.0, 214.0];
const PANEL_NAMES: [&str; 2] = ["After the rationale", "Fast answer, before the rationale"];
const RIBBON_TOP: f64 = 392.0;
const RIBBON_HEIGHT: f64 = 16.0;
const HEIGHT: f64 = 440.0;

/// What the chart needs of a window.
#[derive(Clone, Debug)]
pub(super) struct Point {
    /// Media time in seconds.
    pub(super) start_s: f64,
    /// Media time in seconds.
    pub(super) end_s: f64,
    /// The answer, `None` without a face.
    pub(super) label: Option<String>,
    /// Probabilities after the rationale and of the fast answer, each in the order of the labels; empty without a face.
    pub(super) probabilities: [Vec<f64>; 2],
}

/// Draws the chart; `labels` are the names of the lines. Empty where there is nothing to draw.
pub(super) fn draw(labels: &[String], points: &[Point]) -> String {
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return String::new() };
    if labels.is_empty() {
        return String::new();
    }
    let thinned: Vec<&Point> = points.iter().step_by(points.len().div_ceil(MAX_POINTS)).collect();
    let (from, to) = (first.start_s, last.end_s.max(first.start_s + 1e-3));
    let x = |seconds: f64| LEFT + (seconds - from) / (to - from) * (WIDTH - LEFT - RIGHT);

    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"Probability of each emotion over time\">\n"
    );
    for (panel, (top, name)) in PANEL_TOPS.into_iter().zip(PANEL_NAMES).enumerate() {
        draw_panel(&mut svg, labels, &thinned, panel, top, name, &x);
    }
    draw_ribbon(&mut svg, labels, &thinned, &x);
    draw_time_axis(&mut svg, from, to, &x);
    draw_hover(&mut svg, labels, &thinned, &x);
    svg.push_str("</svg>\n");
    svg
}

fn middle(point: &Point) -> f64 {
    (point.start_s + point.end_s) / 2.0
}

fn draw_panel(
    svg: &mut String,
    labels: &[String],
    points: &[&Point],
    panel: usize,
    top: f64,
    name: &str,
    x: &impl Fn(f64) -> f64,
) {
    let y = |probability: f64| top + PANEL_HEIGHT * (1.0 - probability.clamp(0.0, 1.0));
    let _ = writeln!(svg, "<text class=\"name\" x=\"{LEFT}\" y=\"{}\">{name}</text>", top - 10.0);
    for share in [0.0, 0.5, 1.0] {
        let _ = writeln!(
            svg,
            "<path class=\"grid\" d=\"M{LEFT} {0:.1}H{1}\"/><text class=\"tick end\" x=\"{2}\" y=\"{3:.1}\">{share:.1}</text>",
            y(share),
            WIDTH - RIGHT,
            LEFT - 8.0,
            y(share) + 4.0
        );
    }
    for (index, label) in labels.iter().enumerate() {
        // A window with no face interrupts the line; a lone point still shows as a dot.
        let mut path = String::new();
        let mut dots = String::new();
        let value = |position: usize| points.get(position)?.probabilities[panel].get(index).copied();
        for (position, point) in points.iter().enumerate() {
            let Some(probability) = value(position) else { continue };
            let before = position.checked_sub(1).and_then(value);
            let pen = if before.is_some() { 'L' } else { 'M' };
            let (x, y) = (x(middle(point)), y(probability));
            let _ = write!(path, "{pen}{x:.1} {y:.1}");
            if before.is_none() && value(position + 1).is_none() {
                let _ = write!(dots, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>");
            }
        }
        let _ = writeln!(
            svg,
            "<g class=\"line c{}\"><title>{}</title><path d=\"{path}\"/>{dots}</g>",
            index % COLOURS,
            escape(label)
        );
    }
    // The lines' names at their right ends, pushed apart so that none covers another.
    let mut ends: Vec<(f64, usize)> = labels
        .iter()
        .enumerate()
        .filter_map(|(index, _)| {
            points.iter().rev().find_map(|point| point.probabilities[panel].get(index)).map(|p| (y(*p), index))
        })
        .collect();
    ends.sort_by(|a, b| a.0.total_cmp(&b.0));
    let step = (PANEL_HEIGHT / ends.len().max(1) as f64).min(15.0);
    let mut lowest = top + PANEL_HEIGHT + 4.0 - step * (ends.len() as f64 - 1.0);
    let mut free = top + 4.0;
    for (wanted, index) in ends {
        let at = (wanted + 4.0).min(lowest).max(free);
        let _ = writeln!(
            svg,
            "<g class=\"key c{}\"><circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\"/><text x=\"{:.1}\" y=\"{at:.1}\">{}</text></g>",
            index % COLOURS,
            WIDTH - RIGHT + 12.0,
            at - 4.0,
            WIDTH - RIGHT + 21.0,
            escape(&labels[index])
        );
        free = at + step;
        lowest += step;
    }
}

/// One field a window in its label's colour.
fn draw_ribbon(svg: &mut String, labels: &[String], points: &[&Point], x: &impl Fn(f64) -> f64) {
    let _ = writeln!(svg, "<text class=\"tick end\" x=\"{}\" y=\"{}\">label</text>", LEFT - 8.0, RIBBON_TOP + 12.0);
    for (position, point) in points.iter().enumerate() {
        let (start, end) = field(points, position, x);
        let class = match point.label.as_ref().and_then(|label| labels.iter().position(|name| name == label)) {
            Some(index) => format!("c{}", index % COLOURS),
            None => "none".to_string(),
        };
        let _ = writeln!(
            svg,
            "<rect class=\"ribbon {class}\" x=\"{start:.1}\" y=\"{RIBBON_TOP}\" width=\"{:.1}\" height=\"{RIBBON_HEIGHT}\"/>",
            (end - start - 1.0).max(1.0)
        );
    }
}

/// The horizontal field that belongs to a window: half way to its neighbours, as windows may overlap.
fn field(points: &[&Point], position: usize, x: &impl Fn(f64) -> f64) -> (f64, f64) {
    let here = middle(points[position]);
    let start = match position.checked_sub(1).and_then(|before| points.get(before)) {
        Some(before) => (middle(before) + here) / 2.0,
        None => points[position].start_s,
    };
    let end = match points.get(position + 1) {
        Some(after) => (here + middle(after)) / 2.0,
        None => points[position].end_s,
    };
    (x(start), x(end))
}

fn draw_time_axis(svg: &mut String, from: f64, to: f64, x: &impl Fn(f64) -> f64) {
    let steps = [1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0, 1800.0, 3600.0];
    let step = steps.into_iter().find(|step| (to - from) / step <= 18.0).unwrap_or((to - from) / 12.0);
    let mut tick = (from / step).ceil() * step;
    while tick <= to {
        let _ = writeln!(
            svg,
            "<text class=\"tick middle\" x=\"{:.1}\" y=\"{}\">{tick:.0} s</text>",
            x(tick),
            RIBBON_TOP + RIBBON_HEIGHT + 18.0
        );
        tick += step;
    }
}

/// Invisible fields over both panels that link to the window and say every probability of it.
fn draw_hover(svg: &mut String, labels: &[String], points: &[&Point], x: &impl Fn(f64) -> f64) {
    for (position, point) in points.iter().enumerate() {
        let (start, end) = field(points, position, x);
        let mut title = format!("{:.1} to {:.1} s: ", point.start_s, point.end_s);
        title.push_str(point.label.as_deref().unwrap_or("no face"));
        for (index, label) in labels.iter().enumerate() {
            if let [Some(after), Some(fast)] = [0, 1].map(|panel: usize| point.probabilities[panel].get(index)) {
                let _ = write!(title, "\n{label}: {after:.3} after, {fast:.3} fast");
            }
        }
        let _ = writeln!(
            svg,
            "<rect class=\"hover\" x=\"{start:.1}\" y=\"{}\" width=\"{:.1}\" height=\"{:.1}\"><title>{}</title></rect>",
            PANEL_TOPS[0],
            (end - start).max(1.0),
            RIBBON_TOP + RIBBON_HEIGHT - PANEL_TOPS[0],
            escape(&title)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(second: f64, label: Option<&str>, after: &[f64]) -> Point {
        Point {
            start_s: second,
            end_s: second + 2.0,
            label: label.map(str::to_string),
            probabilities: [after.to_vec(), after.iter().rev().copied().collect()],
        }
    }

    fn labels() -> Vec<String> {
        vec!["sad".into(), "happy".into()]
    }

    #[test]
    fn draws_a_line_per_label_and_panel_with_gaps_where_no_face_was() {
        let points = [
            point(0.0, Some("sad"), &[0.9, 0.1]),
            point(1.0, Some("sad"), &[0.8, 0.2]),
            point(2.0, None, &[]),
            point(3.0, Some("happy"), &[0.1, 0.9]),
        ];
        let svg = draw(&labels(), &points);
        assert_eq!(svg.matches("class=\"line ").count(), 4);
        let first = svg.split("class=\"line c0\"").nth(1).expect("a line");
        let path = &first[..first.find("</g>").expect("closed")];
        assert_eq!((path.matches('M').count(), path.matches('L').count()), (2, 1), "{path}");
        assert_eq!(path.matches("<circle").count(), 1, "the lone last point is a dot: {path}");
        assert_eq!(svg.matches("class=\"ribbon none\"").count(), 1);
        assert!(svg.contains("sad: 0.900 after, 0.100 fast"), "{svg}");
    }

    #[test]
    fn draws_nothing_from_nothing_and_stays_finite() {
        assert_eq!(draw(&labels(), &[]), "");
        assert_eq!(draw(&[], &[point(0.0, None, &[])]), "");
        let mut still = point(5.0, Some("sad"), &[f64::NAN, 2.0]);
        still.end_s = 5.0;
        let svg = draw(&labels(), &[still]);
        assert!(!svg.contains("inf"), "{svg}");
    }

    #[test]
    fn thins_out_long_recordings() {
        let points: Vec<Point> = (0..100_000).map(|n| point(f64::from(n), Some("sad"), &[0.5, 0.5])).collect();
        let svg = draw(&labels(), &points);
        assert!(svg.matches("class=\"hover\"").count() <= MAX_POINTS);
        assert!(svg.len() < 400_000, "{}", svg.len());
    }

    #[test]
    fn label_names_are_escaped() {
        let svg = draw(&["<b>\"&".into()], &[point(0.0, Some("<b>\"&"), &[0.5])]);
        assert!(!svg.contains("<b>"));
        assert!(svg.contains("&lt;b&gt;&quot;&amp;"));
    }
}
