//! Pixels to RGB, and the part of them that is looked at.

use std::borrow::Cow;

use super::{Cut, Format, Outside, Pixels, yuv};

/// A cut of a checked picture, packed RGB `[cut height, cut width, 3]`.
pub(super) fn rgb<'a>(pixels: &Pixels<'a>, cut: &Cut) -> Cow<'a, [u8]> {
    let (width, height) = (pixels.width, pixels.height);
    let whole = Cut { outside: cut.outside, ..Cut::whole(width, height) };
    if let Format::Rgb { data, pitch } = pixels.format
        && *cut == whole
        && pitch == 3 * width
    {
        return Cow::Borrowed(&data[..3 * width * height]);
    }
    let fill = match cut.outside {
        Outside::Edge => None,
        Outside::Colour(value) => Some(value),
    };
    let mut rgb = vec![fill.unwrap_or(0); 3 * cut.width * cut.height];
    // What of a row lies within the picture.
    let inside = |start: i64, length: usize, size: usize| {
        let clamped = |at: i64| at.clamp(0, size as i64);
        clamped(start) as usize..clamped(start.saturating_add(length as i64)) as usize
    };
    let columns = inside(cut.x, cut.width, width);
    let before = if columns.is_empty() { 0 } else { (columns.start as i64).saturating_sub(cut.x) as usize };
    for (i, out) in rgb.chunks_exact_mut(3 * cut.width).enumerate() {
        let y = cut.y.saturating_add(i as i64);
        if fill.is_some() && !(0..height as i64).contains(&y) {
            continue;
        }
        let y = y.clamp(0, height as i64 - 1) as usize;
        if !columns.is_empty() {
            row(pixels, y, columns.start, &mut out[3 * before..][..3 * columns.len()]);
        }
        if fill.is_none() {
            repeat_edge(pixels, y, cut.x, before..before + columns.len(), out);
        }
    }
    Cow::Owned(rgb)
}

/// What lies left and right of `filled`, of one row.
fn repeat_edge(pixels: &Pixels<'_>, y: usize, x: i64, filled: std::ops::Range<usize>, out: &mut [u8]) {
    let out = out.as_chunks_mut::<3>().0;
    if filled.is_empty() {
        let mut pixel = [0; 3];
        row(pixels, y, if x < 0 { 0 } else { pixels.width - 1 }, &mut pixel);
        return out.fill(pixel);
    }
    let (left, right) = (out[filled.start], out[filled.end - 1]);
    out[..filled.start].fill(left);
    out[filled.end..].fill(right);
}

/// Pixels `first ..` of row `y` as RGB, as many as there is room for.
fn row(pixels: &Pixels<'_>, y: usize, first: usize, out: &mut [u8]) {
    let (plane, colour) = pixels.planes();
    let line = plane.at(y);
    match (pixels.format, colour) {
        (Format::Nv12 { yuv, .. }, Some(colour)) => {
            let beside = if y % 2 == 1 { (y / 2 + 1).min(colour.rows - 1) } else { (y / 2).saturating_sub(1) };
            yuv::row(line, [colour.at(y / 2), colour.at(beside)], yuv, first, out);
        }
        (Format::Rgba { .. }, _) => {
            let from = line.as_chunks::<4>().0[first..].iter();
            out.as_chunks_mut::<3>().0.iter_mut().zip(from).for_each(|(out, pixel)| out.copy_from_slice(&pixel[..3]));
        }
        _ => out.copy_from_slice(&line[3 * first..][..out.len()]),
    }
}
