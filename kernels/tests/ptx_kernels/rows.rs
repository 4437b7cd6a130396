//! Norms, softmax and rotary positions.

use crate::machine::{Grid, Int, Machine, Size, arguments, wide};
use crate::weight::TYPES;

const THREADS: usize = 128;

pub(crate) fn norms(machine: &mut Machine) {
    let (rows, eps) = (3, 1e-5);
    for (width, kind) in [1, 5, 130, 300].into_iter().flat_map(|width| TYPES.map(|kind| (width, kind))) {
        // A norm's weight lies as one column, or as one row.
        let shape = if width == 5 { (width, 1) } else { (1, width) };
        let (weight, bias) = (machine.weight(kind, shape.0, shape.1), machine.weight(kind, shape.0, shape.1));
        let x: Vec<f32> = machine.numbers(rows * width).iter().map(|x| x + 3.0).collect();
        let at = machine.floats(&x);
        let (layer, rms) = (machine.output(4 * x.len()), machine.output(4 * x.len()));
        let (of_weight, of_bias) = (weight.argument.clone(), bias.argument.clone());
        let arguments = arguments![at, Int(width), of_weight, of_bias, eps as f32, layer];
        machine.run(["norm", "layer_norm"], Grid([rows, 1, 1], THREADS, 0), arguments);
        let arguments = arguments![at, Int(width), weight.argument.clone(), eps as f32, rms];
        machine.run(["norm", "rms_norm"], Grid([rows, 1, 1], THREADS, 0), arguments);

        let (mut of_layer, mut of_rms) = (Vec::new(), Vec::new());
        for row in wide(&x).chunks_exact(width) {
            let mean_of = |of: &dyn Fn(f64) -> f64| row.iter().map(|&x| of(x)).sum::<f64>() / width as f64;
            let mean = mean_of(&|x| x);
            let deviation = (mean_of(&|x| (x - mean).powi(2)) + eps).sqrt();
            let size = (mean_of(&|x| x * x) + eps).sqrt();
            let with = row.iter().zip(weight.values.iter().zip(&bias.values));
            of_layer.extend(with.map(|(x, (w, b))| (x - mean) / deviation * w + b));
            of_rms.extend(row.iter().zip(&weight.values).map(|(x, w)| x / size * w));
        }
        machine.check(&format!("layer norm {width} {kind:?}"), layer, &of_layer, 5e-6);
        machine.check(&format!("RMS norm {width} {kind:?}"), rms, &of_rms, 5e-6);
    }
}

pub(crate) fn softmax(machine: &mut Machine) {
    for width in [1, 7, 128, 301] {
        let x: Vec<f32> = machine.numbers(3 * width).iter().map(|x| 8.0 * x).collect();
        let (at, out) = (machine.floats(&x), machine.output(4 * x.len()));
        machine.run(["norm", "softmax"], Grid([3, 1, 1], THREADS, 0), arguments![at, Int(width), out]);
        let expected: Vec<f64> = wide(&x).chunks_exact(width).flat_map(softmax_of).collect();
        machine.check(&format!("softmax {width}"), out, &expected, 2e-6);
    }
}

pub(crate) fn softmax_of(row: &[f64]) -> Vec<f64> {
    let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = row.iter().map(|x| (x - most).exp()).sum();
    row.iter().map(|x| (x - most).exp() / total).collect()
}

/// Frequencies of a head's pairs.
pub(crate) fn frequencies(pairs: usize) -> Vec<f32> {
    (0..pairs).map(|pair| 1e4f32.powf(-(pair as f32) / pairs as f32)).collect()
}

/// A head turned to a position.
pub(crate) fn turned(head: &[f32], position: usize, frequencies: &[f32]) -> Vec<f64> {
    let pairs = frequencies.len();
    let element = |i: usize| {
        // The angle is a number of f32, which is large for large positions.
        let (sine, cosine) = f64::from(position as f32 * frequencies[i % pairs]).sin_cos();
        let x = |i: usize| f64::from(head[i]);
        if i < pairs { x(i) * cosine - x(i + pairs) * sine } else { x(i) * cosine + x(i - pairs) * sine }
    };
    (0..2 * pairs).map(element).collect()
}

pub(crate) fn rope(machine: &mut Machine) {
    for (rows, heads, pairs, first) in [(1, 1, 1, 0), (3, 2, 10, 7), (5, 3, 33, 32_000), (2, 1, 4, 99_990)] {
        let (x, frequencies) = (machine.numbers(rows * heads * 2 * pairs), frequencies(pairs));
        let (at, of) = (machine.floats(&x), machine.floats(&frequencies));
        let arguments = arguments![at, Size(rows), Int(heads), Int(pairs), Int(first), of];
        machine.run(["position", "rope"], Grid::each(rows * pairs, THREADS), arguments);
        let heads_of_x = x.chunks_exact(2 * pairs).enumerate();
        let expected = heads_of_x.flat_map(|(i, head)| turned(head, first + i / heads, &frequencies));
        machine.check(&format!("rope from {first}"), at, &expected.collect::<Vec<_>>(), 1e-6);
    }
}
