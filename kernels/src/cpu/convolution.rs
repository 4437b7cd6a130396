//! Operations on channels-last pictures and volumes: unfold, depthwise convolution, bilinear resize.

use crate::cpu::elementwise::{GRAIN, chunk_rows};
use crate::cpu::gemm::with_panels;
use crate::cpu::pool::ThreadPool;
use crate::cpu::simd::{Level, Operation, Simd};
use crate::device::Unfold;
use std::cell::Cell;

thread_local! {
    /// A depthwise kernel by tap.
    static TAPS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Columns of a convolution; `output` is the unfold's checked output size.
pub(crate) fn unfold(pool: &ThreadPool, x: &[f32], unfold: Unfold, output: [usize; 3], out: &mut [f32]) {
    if out.is_empty() {
        return;
    }
    let Unfold { size, channels, kernel, stride, pad_before, .. } = unfold;
    let volume = kernel[0] * kernel[1] * kernel[2];
    let column = channels * volume;
    let rows = chunk_rows(pool, out.len() / column, column);
    // Where a kernel element reads on an axis, if not in the padding.
    let source = |axis: usize, at: usize, element: usize| {
        (at * stride[axis] + element).checked_sub(pad_before[axis]).filter(|&position| position < size[axis])
    };
    pool.run_chunks(out, rows * column, |index, piece| {
        for (r, column) in piece.chunks_exact_mut(column).enumerate() {
            let position = index * rows + r;
            let (t, rest) = (position / (output[1] * output[2]), position % (output[1] * output[2]));
            let (h, w) = (rest / output[2], rest % output[2]);
            for element in 0..volume {
                let (kt, rest) = (element / (kernel[1] * kernel[2]), element % (kernel[1] * kernel[2]));
                let (kh, kw) = (rest / kernel[2], rest % kernel[2]);
                let places = column.iter_mut().skip(element).step_by(volume);
                match (source(0, t, kt), source(1, h, kh), source(2, w, kw)) {
                    (Some(t), Some(h), Some(w)) => {
                        let from = &x[((t * size[1] + h) * size[2] + w) * channels..][..channels];
                        places.zip(from).for_each(|(to, from)| *to = *from);
                    }
                    _ => places.for_each(|to| *to = 0.0),
                }
            }
        }
    });
}

/// Depthwise 3×3 convolution with one zero around: x and out `[frames, height, width, channels]`, weight
/// `[channels, 9]`.
pub(crate) fn depthwise3x3(
    level: Level,
    pool: &ThreadPool,
    x: &[f32],
    [_, height, width]: [usize; 3],
    weight: &[f32],
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    if out.is_empty() {
        return;
    }
    let channels = weight.len() / 9;
    let line = width * channels;
    let lines = (GRAIN / 8 / line).max(1);
    // By tap, so that the channels of a tap are contiguous as those of a pixel are.
    with_panels(&TAPS, 9 * channels, |taps| {
        for (tap, taps) in taps.chunks_exact_mut(channels).enumerate() {
            taps.iter_mut().zip(weight.iter().skip(tap).step_by(9)).for_each(|(to, from)| *to = *from);
        }
        let taps = &*taps;
        pool.run_chunks(out, lines * line, |index, piece| {
            for (l, out) in piece.chunks_exact_mut(line).enumerate() {
                let (frame, h) = ((index * lines + l) / height, (index * lines + l) % height);
                for (w, out) in out.chunks_exact_mut(channels).enumerate() {
                    match bias {
                        Some(bias) => out.copy_from_slice(bias),
                        None => out.fill(0.0),
                    }
                    for tap in 0..9 {
                        let (from_h, from_w) = ((h + tap / 3).wrapping_sub(1), (w + tap % 3).wrapping_sub(1));
                        if from_h < height && from_w < width {
                            let x = &x[((frame * height + from_h) * width + from_w) * channels..][..channels];
                            level.run(AddProduct { out, x, factor: &taps[tap * channels..][..channels] });
                        }
                    }
                }
            }
        });
    });
}

/// `out += x · factor`
struct AddProduct<'a> {
    out: &'a mut [f32],
    x: &'a [f32],
    factor: &'a [f32],
}

impl Operation for AddProduct<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        self.out.iter_mut().zip(self.x).zip(self.factor).for_each(|((out, x), factor)| *out += x * factor);
    }
}

/// The two source positions of target position `i` on an axis and the share of the second, as in torch.
fn source(from: usize, to: usize, i: usize) -> (usize, usize, f32) {
    let step = from as f32 / to as f32;
    let position = (step * (i as f32 + 0.5) - 0.5).max(0.0);
    let first = (position as usize).min(from - 1);
    (first, (first + 1).min(from - 1), position - first as f32)
}

/// Bilinear resize of `[frames, from.0, from.1, channels]` to `[frames, to.0, to.1, channels]`; `from` is not empty.
pub(crate) fn bilinear(
    level: Level,
    pool: &ThreadPool,
    x: &[f32],
    from: (usize, usize),
    to: (usize, usize),
    channels: usize,
    out: &mut [f32],
) {
    if out.is_empty() {
        return;
    }
    pool.run_chunks(out, to.1 * channels, |line, out| {
        let frame = &x[line / to.0 * from.0 * from.1 * channels..];
        let (top, bottom, down) = source(from.0, to.0, line % to.0);
        for (column, out) in out.chunks_exact_mut(channels).enumerate() {
            let (left, right, across) = source(from.1, to.1, column);
            let pixel = |row: usize, column: usize| &frame[(row * from.1 + column) * channels..][..channels];
            level.run(Blend {
                corners: [pixel(top, left), pixel(top, right), pixel(bottom, left), pixel(bottom, right)],
                down,
                across,
                out,
            });
        }
    });
}

struct Blend<'a> {
    corners: [&'a [f32]; 4],
    down: f32,
    across: f32,
    out: &'a mut [f32],
}

impl Operation for Blend<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let [a, b, c, d] = self.corners;
        let pixels = a.iter().zip(b).zip(c.iter().zip(d));
        for (out, ((a, b), (c, d))) in self.out.iter_mut().zip(pixels) {
            let top = a * (1.0 - self.across) + b * self.across;
            let bottom = c * (1.0 - self.across) + d * self.across;
            *out = top * (1.0 - self.down) + bottom * self.down;
        }
    }
}
