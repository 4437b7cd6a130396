//! Pillow's antialiased bicubic on 8-bit pictures, to the last bit (`Image.resize(..., BICUBIC)`): two passes, weights in 22-bit
//! fixed point, 8-bit values between the passes.

/// Bits behind the point of a weight: 32 less 8 for the value and 2 for the sum's overshoot.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// One half, which the sum starts with so that cutting the fraction off rounds.
const ROUNDING: i32 = 1 << (PRECISION_BITS - 1);

/// Half-width of the bicubic kernel in source pixels at scale 1.
const BICUBIC_SUPPORT: f64 = 2.0;

/// Bicubic kernel with a = -0.5 (Keys).
fn bicubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

/// The weights of one axis: output position `i` is the sum over `weights[i * taps..][..count[i]]` times the inputs from
/// `first[i]` on.
#[derive(Clone, Debug)]
pub struct Axis {
    /// The most weights that a position has.
    pub taps: usize,
    /// The first input of each position.
    pub first: Vec<usize>,
    /// Inputs of each position.
    pub count: Vec<usize>,
    /// Weights in 2²²ths, `taps` for each position.
    pub weights: Vec<i32>,
}

impl Axis {
    fn new(input: usize, output: usize) -> Self {
        let scale = input as f64 / output as f64;
        // Scaling down widens the kernel so that every source pixel counts (the antialiasing); scaling up keeps it.
        let filter_scale = scale.max(1.0);
        let support = BICUBIC_SUPPORT * filter_scale;
        let taps = support.ceil() as usize * 2 + 1;
        let mut axis = Self {
            taps,
            first: Vec::with_capacity(output),
            count: Vec::with_capacity(output),
            weights: vec![0; output * taps],
        };
        let mut row = vec![0.0; taps];
        for i in 0..output {
            let center = (i as f64 + 0.5) * scale;
            // `as usize` cuts towards zero and takes a negative to zero, as the definition's cast and clamp do.
            let first = (center - support + 0.5) as usize;
            let end = ((center + support + 0.5) as usize).min(input);
            let count = end - first;
            let mut sum = 0.0;
            for (k, weight) in row[..count].iter_mut().enumerate() {
                *weight = bicubic(((k + first) as f64 - center + 0.5) * (1.0 / filter_scale));
                sum += *weight;
            }
            for (fixed, weight) in axis.weights[i * taps..].iter_mut().zip(&row[..count]) {
                let weight = if sum == 0.0 { *weight } else { weight / sum };
                let scaled = weight * f64::from(1u32 << PRECISION_BITS);
                *fixed = (if weight < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32;
            }
            axis.first.push(first);
            axis.count.push(count);
        }
        axis
    }

    /// From `input` positions to `output`, neither of them zero. Where nothing is scaled each is itself: what leaving the pass out
    /// comes to.
    pub fn of(input: usize, output: usize) -> Self {
        if input != output {
            return Self::new(input, output);
        }
        let (first, weights) = ((0..output).collect(), vec![1 << PRECISION_BITS; output]);
        Axis { taps: 1, first, count: vec![1; output], weights }
    }

    /// Weights of output position `i`, and the first input they apply to.
    fn at(&self, i: usize) -> (usize, &[i32]) {
        (self.first[i], &self.weights[i * self.taps..][..self.count[i]])
    }
}

fn to_u8(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// Scales every row: `[height, width, CHANNELS]` to `[height, out_width, CHANNELS]`.
fn resize_rows<const CHANNELS: usize>(pixels: &[u8], width: usize, out_width: usize) -> Vec<u8> {
    if width == out_width {
        return pixels.to_vec();
    }
    let axis = Axis::new(width, out_width);
    let height = pixels.len() / (width * CHANNELS);
    let mut out = vec![0u8; out_width * height * CHANNELS];
    for (source, target) in pixels.chunks_exact(width * CHANNELS).zip(out.chunks_exact_mut(out_width * CHANNELS)) {
        for (x, pixel) in target.chunks_exact_mut(CHANNELS).enumerate() {
            let (first, weights) = axis.at(x);
            let mut sums = [ROUNDING; CHANNELS];
            for (weight, value) in weights.iter().zip(source[first * CHANNELS..].chunks_exact(CHANNELS)) {
                for (sum, value) in sums.iter_mut().zip(value) {
                    *sum += weight * i32::from(*value);
                }
            }
            for (value, sum) in pixel.iter_mut().zip(sums) {
                *value = to_u8(sum);
            }
        }
    }
    out
}

/// Scales every column: `[height, row_bytes]` to `[out_height, row_bytes]`.
fn resize_columns(pixels: &[u8], row_bytes: usize, out_height: usize) -> Vec<u8> {
    let height = pixels.len() / row_bytes;
    if height == out_height {
        return pixels.to_vec();
    }
    let axis = Axis::new(height, out_height);
    let mut out = vec![0u8; row_bytes * out_height];
    let mut sums = vec![ROUNDING; row_bytes];
    for (y, target) in out.chunks_exact_mut(row_bytes).enumerate() {
        let (first, weights) = axis.at(y);
        sums.fill(ROUNDING);
        for (weight, source) in weights.iter().zip(pixels[first * row_bytes..].chunks_exact(row_bytes)) {
            for (sum, value) in sums.iter_mut().zip(source) {
                *sum += weight * i32::from(*value);
            }
        }
        for (value, sum) in target.iter_mut().zip(&sums) {
            *value = to_u8(*sum);
        }
    }
    out
}

/// Whether columns are scaled before rows, which shows in the last bit. Pillow 13 does so where the height shrinks by more than
/// twice what the width does; older versions always did rows first (but for pictures a hundred times as high as wide).
pub fn columns_first((width, height): (usize, usize), (out_width, out_height): (usize, usize)) -> bool {
    let shrinks = |from: usize, to: usize| from as i64 - to as i64;
    shrinks(height, out_height) > (2 * shrinks(width, out_width)).max(0)
}

/// Scales a picture `[height, width, CHANNELS]` to `[out_height, out_width, CHANNELS]` exactly as Pillow's BICUBIC does.
/// `pixels` must hold `width * height * CHANNELS` bytes, and no side may be zero.
pub fn resize_bicubic<const CHANNELS: usize>(
    pixels: &[u8],
    (width, height): (usize, usize),
    (out_width, out_height): (usize, usize),
) -> Vec<u8> {
    if columns_first((width, height), (out_width, out_height)) {
        let columns = resize_columns(pixels, width * CHANNELS, out_height);
        resize_rows::<CHANNELS>(&columns, width, out_width)
    } else {
        let rows = resize_rows::<CHANNELS>(pixels, width, out_width);
        resize_columns(&rows, out_width * CHANNELS, out_height)
    }
}
