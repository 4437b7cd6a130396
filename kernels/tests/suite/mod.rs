//! Every operation of a device against its definition, written here naively in f64, over types and odd shapes.
#![allow(dead_code)] // not every test uses all of it

pub(crate) mod attention;
pub(crate) mod choice;
pub(crate) mod decoder;
pub(crate) mod pictures;

#[allow(unused_imports)] // as above
pub(crate) use pictures::pictures;

use candor_kernels::{
    Activation, AttentionShape, CacheType, DType, Device, DeviceError, HostTensor, Rounding, Scales, Unfold,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

const SEED: u64 = 20_240_607;
pub(crate) const TYPES: [DType; 5] = [DType::F32, DType::F16, DType::BF16, DType::I8, DType::I4];
const ACTIVATIONS: [Activation; 7] = Activation::ALL;

/// Error allowed, relative to the size of the values.
const ALLOWED: f64 = 2e-6;

/// What an operation is tested with: a device, and numbers that are the same for every device.
pub(crate) struct Test<'a, D: Device> {
    device: &'a D,
    random: ChaCha8Rng,
}

impl<D: Device> Test<'_, D> {
    pub(crate) fn numbers(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.random.random_range(-2.0..2.0)).collect()
    }

    /// A buffer longer than its values, as buffers may be.
    pub(crate) fn buffer(&self, values: &[f32]) -> D::Buffer {
        let mut buffer = self.device.allocate(values.len() + 5).expect("memory");
        self.device.write(values, &mut buffer, 0).expect("fits");
        buffer
    }

    /// An output of `len` elements with a mark behind that must stay.
    pub(crate) fn output(&self, len: usize) -> D::Buffer {
        self.buffer(&[vec![f32::NAN; len], vec![MARK]].concat())
    }

    /// A weight of the type, and the values it stands for.
    pub(crate) fn weight(&mut self, dtype: DType, shape: &[usize]) -> (D::Weight, Vec<f64>) {
        let tensor = stored(&self.numbers(shape.iter().product()), dtype, shape);
        let values = tensor.to_f32().into_iter().map(f64::from).collect();
        (self.device.weight(&tensor).expect("a good tensor"), values)
    }

    /// The first elements of a buffer against what they should be, and the mark behind them if there is one.
    fn check(&self, what: &str, buffer: &D::Buffer, expected: &[f64]) {
        self.check_sums(what, buffer, expected, 1.0);
    }

    /// [`Test::check`] for values that are what remains of sums of about `size`.
    fn check_sums(&self, what: &str, buffer: &D::Buffer, expected: &[f64], size: f64) {
        let mut values = vec![0.0; expected.len()];
        self.device.read(buffer, 0, &mut values).expect("long enough");
        let size = expected.iter().fold(size, |size, v| size.max(v.abs()));
        for (i, (&value, &expected)) in values.iter().zip(expected).enumerate() {
            let error = (f64::from(value) - expected).abs() / size;
            assert!(
                error < ALLOWED,
                "{}, {what}, seed {SEED}: element {i} is {value}, not {expected}",
                self.device.describe()
            );
        }
    }

    fn check_output(&self, what: &str, buffer: &D::Buffer, expected: &[f64]) {
        self.check(what, buffer, expected);
        self.check_mark(what, buffer, expected.len());
    }

    /// Nothing was written behind the first `len` elements of an output.
    fn check_mark(&self, what: &str, buffer: &D::Buffer, len: usize) {
        let mut mark = [0.0];
        self.device.read(buffer, len, &mut mark).expect("long enough");
        assert_eq!(mark[0], MARK, "{}, {what}: wrote behind its output", self.device.describe());
    }
}

const MARK: f32 = 12_345.0;

pub(crate) fn test<D: Device>(device: &D) -> Test<'_, D> {
    Test { device, random: ChaCha8Rng::seed_from_u64(SEED) }
}

/// A tensor in the middle of bytes, aligned as a file mapping's are.
fn tensor(bytes: Vec<u8>, dtype: DType, shape: &[usize], scales: Option<Scales>) -> HostTensor {
    let mut padded = vec![0; bytes.len() + 8];
    let start = padded.as_ptr().align_offset(8);
    padded[start..start + bytes.len()].copy_from_slice(&bytes);
    HostTensor::new(Arc::new(padded), start, bytes.len(), dtype, shape.to_vec(), scales).expect("a good tensor")
}

pub(crate) fn stored(values: &[f32], dtype: DType, shape: &[usize]) -> HostTensor {
    match dtype {
        DType::F32 => HostTensor::from_f32(values, shape).expect("a good tensor"),
        DType::F16 => {
            let bytes = values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect();
            tensor(bytes, dtype, shape, None)
        }
        DType::BF16 => {
            let bytes = values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
            tensor(bytes, dtype, shape, None)
        }
        DType::I8 => {
            let bytes = values.iter().map(|&v| (v * 63.0) as i8 as u8).collect();
            let scales: Vec<f32> = (0..shape[0]).map(|row| (1.0 + row as f32 / 7.0) / 63.0).collect();
            tensor(bytes, dtype, shape, Some(Scales::rows(scales)))
        }
        _ => {
            let (rows, depth) = (shape[0], shape[1..].iter().product::<usize>());
            let mut bytes = vec![0u8; rows * depth.div_ceil(8) * 4];
            for (i, &v) in values.iter().enumerate() {
                let (row, at) = (i / depth, i % depth);
                bytes[row * depth.div_ceil(8) * 4 + at / 2] |=
                    ((v * 3.5) as i8 + 8) as u8 * if at % 2 == 0 { 1 } else { 16 };
            }
            let scales = (0..rows * depth.div_ceil(32)).map(|i| (1.0 + i as f32 / 7.0) / 3.5).collect();
            let scales = Scales::groups_from_f32(scales, 32, rows).expect("a good group");
            tensor(bytes, dtype, shape, Some(scales))
        }
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

/// Φ by its series, since the standard library has no erf.
fn normal_distribution(x: f64) -> f64 {
    if x.abs() > 7.0 {
        return if x > 0.0 { 1.0 } else { 0.0 };
    }
    let (mut term, mut sum, mut n) = (x, x, 1.0);
    while term.abs() > 1e-18 * sum.abs() {
        n += 2.0;
        term *= x * x / n;
        sum += term;
    }
    0.5 + sum * (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

fn activation(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Gelu => x * normal_distribution(x),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Activation::Tanh => x.tanh(),
        Activation::Relu => x.max(0.0),
        _ => x,
    }
}

fn softmax(row: &mut [f64]) {
    let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    row.iter_mut().for_each(|v| *v = (*v - largest).exp());
    let sum: f64 = row.iter().sum();
    row.iter_mut().for_each(|v| *v /= sum);
}

pub(crate) fn buffers<D: Device>(device: &D) {
    let mut t = test(device);
    let values = t.numbers(9);
    let mut a = device.allocate(9).expect("memory");
    t.check("allocate", &a, &[0.0; 9]);
    assert_eq!(device.len(&a), 9);
    device.write(&values[..4], &mut a, 5).expect("fits");
    let mut b = device.allocate(4).expect("memory");
    device.copy(&a, 6, &mut b, 1, 3).expect("fits");
    t.check("copy", &b, &wide(&[0.0, values[1], values[2], values[3]]));
    assert!(device.write(&values, &mut a, 1).is_err());
    assert!(device.write(&values, &mut a, usize::MAX).is_err());
    assert!(device.copy(&a, 7, &mut b, 0, 3).is_err());
    assert!(device.copy(&a, 0, &mut b, 2, 3).is_err());
    assert!(device.read(&b, 1, &mut [0.0; 4]).is_err());
    let too_much = device.allocate(usize::MAX / 8);
    assert!(matches!(too_much, Err(DeviceError::OutOfMemory { .. } | DeviceError::GpuOutOfMemory { .. })));
}

pub(crate) fn embed<D: Device>(device: &D) {
    let mut t = test(device);
    for dtype in TYPES {
        let (table, values) = t.weight(dtype, &[7, 37]);
        let ids = [3, 0, 6, 3];
        let mut out = t.output(2 + 4 * 37);
        device.write(&[0.5, 0.5], &mut out, 0).expect("fits");
        device.embed(&table, &ids, &mut out, 2).expect("fits");
        let rows = ids.iter().flat_map(|&id| values[id as usize * 37..][..37].to_vec());
        t.check_output(&format!("embed {dtype}"), &out, &[0.5, 0.5].into_iter().chain(rows).collect::<Vec<_>>());
        assert!(device.embed(&table, &[7], &mut out, 0).is_err());
        assert!(device.embed(&table, &ids, &mut out, 9).is_err());
    }
}

pub(crate) fn linear<D: Device>(device: &D) {
    linear_of(device, &TYPES);
}

/// Layers of weights that are stored as these types.
pub(crate) fn linear_of<D: Device>(device: &D, types: &[DType]) {
    let mut t = test(device);
    let shapes = [
        (1, 1, 1),
        (1, 64, 96),
        (1, 131, 70),
        (2, 9, 5),
        (3, 33, 40),
        (7, 17, 100),
        (8, 6, 64),
        (9, 40, 33),
        (33, 5, 390),
        (50, 70, 401),
        (0, 4, 4),
    ];
    for (index, (rows, outputs, depth)) in shapes.into_iter().enumerate() {
        for &dtype in types {
            let x = t.numbers(rows * depth);
            // A convolution's weight has more dimensions.
            let (weight, w) = t.weight(dtype, &[outputs, depth, 1]);
            let (bias, b) = t.weight(TYPES[index % 3], &[outputs]);
            for (with_bias, function) in [(false, Activation::Identity), (true, ACTIVATIONS[index % 7])] {
                let mut out = t.output(rows * outputs);
                let bias = with_bias.then_some(&bias);
                device.linear(&t.buffer(&x), rows, &weight, bias, function, &mut out).expect("fits");
                let expected: Vec<f64> = (0..rows * outputs)
                    .map(|i| {
                        let (r, o) = (i / outputs, i % outputs);
                        let dot: f64 = (0..depth).map(|k| f64::from(x[r * depth + k]) * w[o * depth + k]).sum();
                        activation(function, dot + if with_bias { b[o] } else { 0.0 })
                    })
                    .collect();
                let what = format!("linear {rows}x{outputs}x{depth} {dtype} {function:?}");
                t.check_sums(&what, &out, &expected, (depth as f64).sqrt());
                t.check_mark(&what, &out, expected.len());
            }
        }
    }
    let (weight, _) = t.weight(DType::F32, &[4, 6]);
    let (bias, _) = t.weight(DType::F32, &[5]);
    let x = t.buffer(&[0.0; 6]);
    let mut out = t.buffer(&[0.0; 4]);
    assert!(device.linear(&x, 1, &weight, Some(&bias), Activation::Identity, &mut out).is_err());
    assert!(device.linear(&x, 2, &weight, None, Activation::Identity, &mut out).is_err());
    assert!(device.linear(&x, usize::MAX, &weight, None, Activation::Identity, &mut out).is_err());
    let mut out = device.allocate(3).expect("memory");
    assert!(device.linear(&x, 1, &weight, None, Activation::Identity, &mut out).is_err());
}

pub(crate) fn norms<D: Device>(device: &D) {
    let mut t = test(device);
    for (rows, width) in [(1, 1), (3, 5), (2, 64), (40, 771)] {
        for dtype in TYPES {
            let x: Vec<f32> = t.numbers(rows * width).iter().map(|v| v + 3.0).collect();
            let ((weight, w), (bias, b)) = (t.weight(dtype, &[width]), t.weight(dtype, &[width]));
            let (mut layer, mut rms) = (Vec::new(), Vec::new());
            for row in wide(&x).chunks_exact(width) {
                let mean = row.iter().sum::<f64>() / width as f64;
                let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / width as f64;
                let square = row.iter().map(|v| v * v).sum::<f64>() / width as f64;
                layer.extend((0..width).map(|i| (row[i] - mean) / (variance + 1e-5).sqrt() * w[i] + b[i]));
                rms.extend((0..width).map(|i| row[i] / (square + 1e-6).sqrt() * w[i]));
            }
            let x = t.buffer(&x);
            let mut out = t.output(rows * width);
            device.layer_norm(&x, rows, &weight, &bias, 1e-5, &mut out).expect("fits");
            t.check_output(&format!("layer_norm {rows}x{width} {dtype}"), &out, &layer);
            let mut out = t.output(rows * width);
            device.rms_norm(&x, rows, &weight, 1e-6, &mut out).expect("fits");
            t.check_output(&format!("rms_norm {rows}x{width} {dtype}"), &out, &rms);
            assert!(device.rms_norm(&x, rows + 7, &weight, 1e-6, &mut out).is_err());
            assert!(device.layer_norm(&x, rows + 7, &weight, &bias, 1e-5, &mut out).is_err());
        }
    }
    let ((weight, _), (bias, _)) = (t.weight(DType::F32, &[4]), t.weight(DType::F32, &[3]));
    let mut out = t.output(4);
    assert!(device.layer_norm(&t.buffer(&[0.0; 4]), 1, &weight, &bias, 1e-5, &mut out).is_err());
}

pub(crate) fn activations<D: Device>(device: &D) {
    let t = test(device);
    // Over the whole range, both sides of every switch of formula.
    let x: Vec<f32> = (-2000..=2000).map(|i| i as f32 * 0.005).chain([-100.0, 100.0, -1e-6, 88.0, 0.0]).collect();
    for function in ACTIVATIONS {
        let mut buffer = t.buffer(&x);
        device.activate(function, &mut buffer, x.len()).expect("fits");
        let mut values = vec![0.0; x.len()];
        device.read(&buffer, 0, &mut values).expect("long enough");
        for (&x, value) in x.iter().zip(values) {
            let expected = activation(function, f64::from(x));
            let error = (f64::from(value) - expected).abs() / expected.abs().max(1.0);
            assert!(error < 5e-7, "{}, {function:?}({x}) is {value}, not {expected}", device.describe());
        }
        assert!(device.activate(function, &mut buffer, x.len() + 6).is_err());
    }
    let mut buffer = t.buffer(&[f32::NAN; 20]);
    for function in ACTIVATIONS {
        device.activate(function, &mut buffer, 20).expect("fits");
        let mut values = [0.0; 20];
        device.read(&buffer, 0, &mut values).expect("long enough");
        assert!(values.iter().all(|v| v.is_nan()), "{function:?} hides NaN");
    }
}

pub(crate) fn elementwise<D: Device>(device: &D) {
    let mut t = test(device);
    for len in [0, 1, 19, 40_000] {
        let (x, y, z) = (t.numbers(len), t.numbers(len), t.numbers(len));
        let pairs = || x.iter().zip(&y).map(|(&x, &y)| (f64::from(x), f64::from(y)));
        let mut out = t.output(len);
        device.write(&x, &mut out, 0).expect("fits");
        device.add(&mut out, &t.buffer(&y), len).expect("fits");
        t.check_output("add", &out, &pairs().map(|(x, y)| x + y).collect::<Vec<_>>());
        device.write(&x, &mut out, 0).expect("fits");
        device.multiply(&mut out, &t.buffer(&y), len).expect("fits");
        t.check_output("multiply", &out, &pairs().map(|(x, y)| x * y).collect::<Vec<_>>());
        let (x, y, z) = (t.buffer(&x), t.buffer(&y), t.buffer(&z));
        device.weighted_sum(&[&x, &y, &z, &x], &[0.5, -2.0, 0.0, 1.0], len, &mut out).expect("fits");
        t.check_output("weighted_sum", &out, &pairs().map(|(x, y)| 1.5 * x - 2.0 * y).collect::<Vec<_>>());
        assert!(device.weighted_sum(&[&x], &[], len, &mut out).is_err());
        assert!(device.weighted_sum(&[&x], &[1.0], len + 6, &mut out).is_err());
        assert!(device.add(&mut out, &y, len + 6).is_err());
        assert!(device.multiply(&mut out, &y, len + 6).is_err());
    }
}

pub(crate) fn positions<D: Device>(device: &D) {
    let mut t = test(device);
    for dtype in TYPES {
        let (table, values) = t.weight(dtype, &[5, 33]);
        for (rows, first) in [(1, 0), (3, 4), (600, 2), (4, usize::MAX)] {
            let x = t.numbers(rows * 33);
            let mut out = t.output(rows * 33);
            device.write(&x, &mut out, 0).expect("fits");
            device.add_positions(&mut out, rows, &table, first).expect("fits");
            let row = |r: usize| (first % 5 + r) % 5;
            let expected: Vec<f64> =
                (0..rows * 33).map(|i| f64::from(x[i]) + values[row(i / 33) * 33 + i % 33]).collect();
            t.check_output(&format!("add_positions {dtype} {rows} from {first}"), &out, &expected);
            assert!(device.add_positions(&mut out, rows + 1, &table, first).is_err());
        }
    }
}

pub(crate) fn softmax_rows<D: Device>(device: &D) {
    let mut t = test(device);
    for (rows, width) in [(1, 1), (3, 7), (5, 16), (2, 1000), (0, 4), (3, 0)] {
        let x: Vec<f32> = t.numbers(rows * width).iter().map(|v| v * 30.0).collect();
        let mut expected = wide(&x);
        expected.chunks_exact_mut(width.max(1)).for_each(softmax);
        let mut out = t.output(rows * width);
        device.softmax(&t.buffer(&x), rows, width, &mut out).expect("fits");
        t.check_output(&format!("softmax {rows}x{width}"), &out, &expected);
    }
    // A masked place has no weight, and large scores do not overflow.
    let mut out = t.output(3);
    device.softmax(&t.buffer(&[1e30, f32::NEG_INFINITY, 1e30]), 1, 3, &mut out).expect("fits");
    t.check_output("softmax of a masked row", &out, &[0.5, 0.0, 0.5]);
    assert!(device.softmax(&t.buffer(&[0.0; 4]), 5, 2, &mut out).is_err());
    assert!(device.softmax(&t.buffer(&[0.0; 4]), usize::MAX, 2, &mut out).is_err());
}

pub(crate) fn rope<D: Device>(device: &D) {
    let mut t = test(device);
    for (rows, heads, head_dim, first) in [(1, 1, 2, 0), (3, 2, 64, 5), (40, 7, 10, 1000), (2, 1, 64, 30_000)] {
        let theta = 1e6f32;
        let x = t.numbers(rows * heads * head_dim);
        let mut out = t.output(x.len());
        device.write(&x, &mut out, 0).expect("fits");
        device.rope(&mut out, rows, heads, head_dim, first, theta).expect("fits");
        let mut expected = wide(&x);
        for (i, head) in expected.chunks_exact_mut(head_dim).enumerate() {
            for j in 0..head_dim / 2 {
                // The definition of transformers: frequency and angle are f32.
                let power = f64::from(theta).powf(f64::from((2 * j) as f32 / head_dim as f32)) as f32;
                let angle = f64::from((first + i / heads) as f32 * (1.0 / power));
                let (a, b) = (head[j], head[j + head_dim / 2]);
                head[j] = a * angle.cos() - b * angle.sin();
                head[j + head_dim / 2] = b * angle.cos() + a * angle.sin();
            }
        }
        t.check_output(&format!("rope {rows}x{heads}x{head_dim} from {first}"), &out, &expected);
    }
    let mut x = t.buffer(&[0.0; 6]);
    assert!(device.rope(&mut x, 1, 2, 3, 0, 1e4).is_err());
    assert!(device.rope(&mut x, 2, 3, 2, 0, 1e4).is_err());
    assert!(device.rope(&mut x, 1, 3, 2, usize::MAX, 1e4).is_err());
}

pub(crate) fn attention<D: Device>(device: &D) {
    let mut t = test(device);
    let shapes: [attention::Sizes; 9] = [
        (1, 1, 1, 1, 1, 1, false),
        (1, 1, 37, 4, 2, 16, true),
        (2, 3, 21, 3, 3, 20, false),
        (2, 9, 9, 2, 1, 33, true),
        (3, 5, 12, 6, 2, 8, true),
        (1, 130, 140, 2, 2, 72, true),
        (2, 197, 197, 1, 1, 64, false),
        (1, 64, 65, 6, 6, 64, false),
        (0, 2, 2, 1, 1, 4, false),
    ];
    for sizes in shapes {
        let shape = attention::shape(sizes, Rounding::None);
        let AttentionShape { batch, queries, keys, heads, key_heads, head_dim, causal, scale, .. } = shape;
        let q = t.numbers(batch * queries * heads * head_dim);
        // Caches longer than they are filled.
        let (k, v) = (
            t.numbers((batch * keys + 2) * key_heads * head_dim),
            t.numbers((batch * keys + 2) * key_heads * head_dim),
        );
        let mut expected = vec![0.0; q.len()];
        for b in 0..batch {
            for h in 0..heads {
                let key_at = |key: usize| ((b * keys + key) * key_heads + h / (heads / key_heads)) * head_dim;
                for i in 0..queries {
                    let at = ((b * queries + i) * heads + h) * head_dim;
                    let seen = if causal { keys - queries + i + 1 } else { keys };
                    let mut scores: Vec<f64> = (0..seen)
                        .map(|key| {
                            (0..head_dim).map(|d| f64::from(q[at + d]) * f64::from(k[key_at(key) + d])).sum::<f64>()
                                * f64::from(scale)
                        })
                        .collect();
                    softmax(&mut scores);
                    for d in 0..head_dim {
                        expected[at + d] = (0..seen).map(|key| scores[key] * f64::from(v[key_at(key) + d])).sum();
                    }
                }
            }
        }
        let mut out = t.output(q.len());
        device.attention(&t.buffer(&q), &t.buffer(&k), &t.buffer(&v), shape, &mut out).expect("fits");
        t.check_output(&format!("{shape:?}"), &out, &expected);
    }
    let good = AttentionShape {
        batch: 1,
        queries: 2,
        keys: 3,
        heads: 2,
        key_heads: 1,
        head_dim: 4,
        causal: true,
        scale: 0.5,
        rounding: Rounding::None,
    };
    let (q, k) = (t.buffer(&[0.0; 16]), t.buffer(&[0.0; 12]));
    let mut out = t.output(16);
    let mut run = |shape| device.attention(&q, &k, &k, shape, &mut out);
    assert!(run(good).is_ok());
    assert!(run(AttentionShape { queries: 9, ..good }).is_err());
    assert!(run(AttentionShape { keys: 9, ..good }).is_err());
    assert!(run(AttentionShape { keys: 0, causal: false, ..good }).is_err());
    assert!(run(AttentionShape { keys: 1, ..good }).is_err());
    assert!(run(AttentionShape { heads: 2, key_heads: 0, ..good }).is_err());
    assert!(run(AttentionShape { heads: 1, key_heads: 2, keys: 1, causal: false, ..good }).is_err());
    assert!(run(AttentionShape { batch: usize::MAX, ..good }).is_err());
}

pub(crate) fn unfold<D: Device>(device: &D) {
    let mut t = test(device);
    let cases = [
        // A patch embedding, Whisper's convolution, an odd volume, and a kernel as large as the input.
        Unfold {
            size: [1, 28, 28],
            channels: 3,
            kernel: [1, 14, 14],
            stride: [1, 14, 14],
            pad_before: [0; 3],
            pad_after: [0; 3],
        },
        Unfold {
            size: [1, 1, 31],
            channels: 80,
            kernel: [1, 1, 3],
            stride: [1, 1, 2],
            pad_before: [0, 0, 1],
            pad_after: [0, 0, 1],
        },
        Unfold {
            size: [5, 7, 6],
            channels: 5,
            kernel: [2, 2, 3],
            stride: [2, 2, 1],
            pad_before: [1, 0, 2],
            pad_after: [0, 1, 3],
        },
        Unfold {
            size: [2, 3, 4],
            channels: 1,
            kernel: [2, 3, 4],
            stride: [9, 9, 9],
            pad_before: [0; 3],
            pad_after: [0; 3],
        },
    ];
    for unfold in cases {
        let x = t.numbers(unfold.size.iter().product::<usize>() * unfold.channels);
        let mut expected = Vec::new();
        let output = unfold.output();
        let each =
            |n: [usize; 3]| (0..n[0]).flat_map(move |a| (0..n[1]).flat_map(move |b| (0..n[2]).map(move |c| [a, b, c])));
        for position in each(output) {
            for channel in 0..unfold.channels {
                for element in each(unfold.kernel) {
                    let at: [isize; 3] = std::array::from_fn(|i| {
                        (position[i] * unfold.stride[i] + element[i]) as isize - unfold.pad_before[i] as isize
                    });
                    let inside = (0..3).all(|i| at[i] >= 0 && at[i] < unfold.size[i] as isize);
                    expected.push(if inside {
                        let index =
                            (at[0] as usize * unfold.size[1] + at[1] as usize) * unfold.size[2] + at[2] as usize;
                        f64::from(x[index * unfold.channels + channel])
                    } else {
                        0.0
                    });
                }
            }
        }
        assert_eq!(expected.len(), output.iter().product::<usize>() * unfold.column());
        let mut out = t.output(expected.len());
        device.unfold(&t.buffer(&x), unfold, &mut out).expect("fits");
        t.check_output(&format!("{unfold:?}"), &out, &expected);
    }
    let good = cases[3];
    let x = t.buffer(&[0.0; 24]);
    let mut out = t.output(24);
    let mut run = |unfold| device.unfold(&x, unfold, &mut out);
    assert!(run(good).is_ok());
    assert!(run(Unfold { stride: [1, 0, 1], ..good }).is_err());
    assert!(run(Unfold { kernel: [2, 0, 4], ..good }).is_err());
    assert!(run(Unfold { kernel: [3, 3, 4], ..good }).is_err());
    assert!(run(Unfold { size: [2, 3, 5], ..good }).is_err());
    assert!(run(Unfold { pad_after: [usize::MAX, 0, 0], ..good }).is_err());
    assert!(run(Unfold { pad_after: [40, 0, 0], stride: [1, 1, 1], ..good }).is_err());
    assert!(run(Unfold { channels: usize::MAX, ..good }).is_err());
}

pub(crate) fn depthwise<D: Device>(device: &D) {
    let mut t = test(device);
    for (size, channels) in [([1, 1, 1], 1), ([2, 5, 4], 19), ([1, 8, 8], 64), ([3, 1, 6], 33)] {
        for (dtype, with_bias) in TYPES.into_iter().zip([true, false, true, false]) {
            let [frames, height, width] = size;
            let x = t.numbers(frames * height * width * channels);
            let (weight, w) = t.weight(dtype, &[channels, 1, 3, 3]);
            let (bias, b) = t.weight(dtype, &[channels]);
            let expected: Vec<f64> = (0..x.len())
                .map(|i| {
                    let (c, column) = (i % channels, i / channels % width);
                    let (row, frame) = (i / channels / width % height, i / channels / width / height);
                    let mut sum = if with_bias { b[c] } else { 0.0 };
                    for tap in 0..9 {
                        let (r, l) = ((row + tap / 3).wrapping_sub(1), (column + tap % 3).wrapping_sub(1));
                        if r < height && l < width {
                            let from = ((frame * height + r) * width + l) * channels + c;
                            sum += f64::from(x[from]) * w[c * 9 + tap];
                        }
                    }
                    sum
                })
                .collect();
            let mut out = t.output(x.len());
            let bias = with_bias.then_some(&bias);
            device.depthwise3x3(&t.buffer(&x), size, &weight, bias, &mut out).expect("fits");
            t.check_output(&format!("depthwise3x3 {size:?}x{channels} {dtype}"), &out, &expected);
            let longer = [frames + 9, height, width];
            assert!(device.depthwise3x3(&t.buffer(&x), longer, &weight, bias, &mut out).is_err());
        }
    }
    let (weight, _) = t.weight(DType::F32, &[2, 1, 3, 2]);
    let mut out = t.output(8);
    assert!(device.depthwise3x3(&t.buffer(&[0.0; 8]), [1, 2, 2], &weight, None, &mut out).is_err());
}

pub(crate) fn groups<D: Device>(device: &D) {
    let mut t = test(device);
    for (groups, per_group, width) in [(1, 1, 1), (3, 5, 17), (2, 700, 40), (0, 3, 3), (2, 3, 0)] {
        let (x, factor) = (t.numbers(groups * per_group * width), t.numbers(groups * width));
        let mean: Vec<f64> = (0..groups * width)
            .map(|i| {
                let at = |r: usize| (i / width * per_group + r) * width + i % width;
                (0..per_group).map(|r| f64::from(x[at(r)])).sum::<f64>() / per_group as f64
            })
            .collect();
        let mut out = t.output(groups * width);
        device.mean_rows(&t.buffer(&x), groups, per_group, width, &mut out).expect("fits");
        t.check_output(&format!("mean_rows {groups}x{per_group}x{width}"), &out, &mean);
        let scaled: Vec<f64> = (0..x.len())
            .map(|i| f64::from(x[i]) * f64::from(factor[i / width / per_group * width + i % width]))
            .collect();
        let mut out = t.output(x.len());
        device.write(&x, &mut out, 0).expect("fits");
        device.scale_groups(&mut out, groups, per_group, width, &t.buffer(&factor)).expect("fits");
        t.check_output(&format!("scale_groups {groups}x{per_group}x{width}"), &out, &scaled);
    }
    let (x, mut out) = (t.buffer(&[0.0; 12]), t.output(12));
    assert!(device.mean_rows(&x, 2, 0, 3, &mut out).is_err());
    assert!(device.mean_rows(&x, 2, 20, 3, &mut out).is_err());
    assert!(device.scale_groups(&mut out, 9, 2, 3, &x).is_err());
    assert!(device.scale_groups(&mut out, usize::MAX, 2, 3, &x).is_err());
}

pub(crate) fn bilinear<D: Device>(device: &D) {
    let mut t = test(device);
    for (frames, from, to, channels) in
        [(1, (1, 1), (3, 2), 1), (2, (5, 7), (5, 7), 3), (1, (8, 8), (5, 3), 33), (2, (3, 4), (10, 9), 5)]
    {
        let x = t.numbers(frames * from.0 * from.1 * channels);
        // Positions in f32, as in torch; they decide which pixels are mixed.
        let source = |i: usize, from: usize, to: usize| {
            let position = (from as f32 / to as f32 * (i as f32 + 0.5) - 0.5).max(0.0);
            let first = position as usize;
            (first, (first + 1).min(from - 1), f64::from(position) - first as f64)
        };
        let mut expected = Vec::new();
        for frame in 0..frames {
            for row in 0..to.0 {
                for column in 0..to.1 {
                    let (top, bottom, down) = source(row, from.0, to.0);
                    let (left, right, across) = source(column, from.1, to.1);
                    for c in 0..channels {
                        let at = |r: usize, l: usize| f64::from(x[((frame * from.0 + r) * from.1 + l) * channels + c]);
                        let upper = at(top, left) * (1.0 - across) + at(top, right) * across;
                        let lower = at(bottom, left) * (1.0 - across) + at(bottom, right) * across;
                        expected.push(upper * (1.0 - down) + lower * down);
                    }
                }
            }
        }
        let mut out = t.output(expected.len());
        device.bilinear(&t.buffer(&x), frames, from, to, channels, &mut out).expect("fits");
        t.check_output(&format!("bilinear {from:?} to {to:?} x{channels}"), &out, &expected);
        assert!(device.bilinear(&t.buffer(&x), frames + 5, from, to, channels, &mut out).is_err());
    }
    let (x, mut out) = (t.buffer(&[0.0; 4]), t.output(4));
    assert!(device.bilinear(&x, 1, (0, 2), (2, 2), 1, &mut out).is_err());
    assert!(device.bilinear(&x, 1, (2, 2), (4, 4), 1, &mut out).is_err());
}

pub(crate) fn log_mel<D: Device>(device: &D) {
    let mut t = test(device);
    for (rows, width) in [(0, 3), (3, 0), (1, 1), (3, 7), (40, 201), (300, 402)] {
        let x = t.numbers(rows * 2 * width);
        let mut out = t.output(rows * width);
        device.power(&t.buffer(&x), rows, width, &mut out).expect("fits");
        let size = |row: &[f64]| (0..width).map(|i| row[i].powi(2) + row[width + i].powi(2)).collect::<Vec<_>>();
        let expected: Vec<f64> = wide(&x).chunks_exact(2 * width.max(1)).flat_map(size).collect();
        t.check_output(&format!("power {rows}x{width}"), &out, &expected);

        // Over many orders of ten, and nothing at all.
        for orders in [1.0, 6.0, -20.0] {
            let power = |v: f32| 10f32.powf(v * orders as f32).min(1e30) * if v == 0.0 { 0.0 } else { 1.0 };
            let x: Vec<f32> = t.numbers(rows * width).into_iter().map(power).collect();
            device.write(&x, &mut out, 0).expect("fits");
            device.log_mel(&mut out, x.len()).expect("fits");
            let decades: Vec<f64> = wide(&x).iter().map(|x| x.max(1e-10).log10()).collect();
            let most = decades.iter().copied().fold(-10.0, f64::max);
            let expected: Vec<f64> = decades.iter().map(|value| (value.max(most - 8.0) + 4.0) / 4.0).collect();
            t.check_output(&format!("log_mel of {rows}x{width}, {orders}"), &out, &expected);
        }
    }
    let mut out = t.buffer(&[0.0; 4]);
    device.log_mel(&mut out, 4).expect("fits");
    t.check("log_mel of silence", &out, &[-1.5; 4]);
    device.write(&[f32::NAN, 100.0, -1.0, -f32::NAN], &mut out, 0).expect("fits");
    device.log_mel(&mut out, 4).expect("fits");
    let mut values = [0.0; 4];
    device.read(&out, 0, &mut values).expect("long enough");
    assert!(values[0].is_nan() && values[3].is_nan(), "log_mel hides NaN");
    assert_eq!(values[1..3], [1.5, -0.5]);
    assert!(device.log_mel(&mut out, 10).is_err());
    let x = t.buffer(&[0.0; 12]);
    assert!(device.power(&x, 1, 6, &mut t.output(6)).is_ok());
    assert!(device.power(&x, 1, 9, &mut t.output(9)).is_err());
    assert!(device.power(&x, 2, 4, &mut t.buffer(&[])).is_err());
    assert!(device.power(&x, usize::MAX, 2, &mut out).is_err());
}

/// Operations that are several others at once, against those.
pub(crate) fn several_at_once<D: Device>(device: &D) {
    let mut t = test(device);
    let read = |buffer: &D::Buffer, len: usize| {
        let mut values = vec![0.0; len];
        device.read(buffer, 0, &mut values).expect("long enough");
        wide(&values)
    };
    for (rows, outputs, depth) in [(1, 6, 64), (3, 33, 40), (8, 17, 100), (20, 70, 131)] {
        for dtype in TYPES {
            let (x, start) = (t.numbers(rows * depth), t.numbers(rows * outputs));
            let ((a, _), (b, _)) = (t.weight(dtype, &[outputs, depth]), t.weight(dtype, &[outputs, depth]));
            let (bias, _) = t.weight(DType::F32, &[outputs]);
            let (x, len) = (t.buffer(&x), rows * outputs);
            let (mut one, mut two, mut scratch) = (t.output(len), t.output(len), t.output(len));
            device.linear(&x, rows, &a, Some(&bias), Activation::Identity, &mut one).expect("fits");
            let expected: Vec<f64> = read(&one, len).iter().zip(wide(&start)).map(|(a, b)| a + b).collect();
            device.write(&start, &mut one, 0).expect("fits");
            device.linear_add(&x, rows, &a, Some(&bias), len, &mut scratch, &mut one).expect("fits");
            t.check_sums(&format!("linear_add {rows}x{outputs}x{depth} {dtype}"), &one, &expected, 10.0);
            t.check_mark("linear_add", &one, len);

            device.linear(&x, rows, &a, None, Activation::Silu, &mut one).expect("fits");
            device.linear(&x, rows, &b, None, Activation::Identity, &mut two).expect("fits");
            let expected: Vec<f64> = read(&one, len).iter().zip(read(&two, len)).map(|(a, b)| a * b).collect();
            device.linear_gated(&x, rows, &a, &b, Activation::Silu, len, &mut scratch, &mut one).expect("fits");
            t.check_sums(&format!("linear_gated {rows}x{outputs}x{depth} {dtype}"), &one, &expected, 10.0);
            t.check_mark("linear_gated", &one, len);
            assert!(device.linear_add(&x, rows + 1, &a, None, len, &mut scratch, &mut one).is_err());
            assert!(device.linear_gated(&x, rows + 1, &a, &b, Activation::Silu, len, &mut scratch, &mut one).is_err());
        }
    }
    let (heads, key_heads, head_dim, theta) = (6, 2, 20, 1e4);
    for kind in [CacheType::F32, CacheType::F16, CacheType::I8] {
        let caches = || device.cache(kind, 40, key_heads, head_dim).expect("memory");
        let (mut cache, mut other) = (caches(), caches());
        for (first, rows) in [(0, 19), (19, 1), (20, 3)] {
            let width = [heads, key_heads].map(|heads| rows * heads * head_dim);
            let (q, k, v) = (t.numbers(width[0]), t.numbers(width[1]), t.numbers(width[1]));
            let v = t.buffer(&v);
            let (mut q1, mut k1, mut q2, mut k2) = (t.buffer(&q), t.buffer(&k), t.buffer(&q), t.buffer(&k));
            device.rope(&mut q1, rows, heads, head_dim, first, theta).expect("fits");
            device.rope(&mut k1, rows, key_heads, head_dim, first, theta).expect("fits");
            device.cache_write(&k1, &v, rows, &mut cache, first).expect("fits");
            let heads_of = [heads, key_heads];
            device
                .rope_and_write(&mut q2, &mut k2, &v, rows, heads_of, head_dim, &mut other, first, theta)
                .expect("fits");
            t.check("rope_and_write", &q2, &read(&q1, width[0]));
            let shape = AttentionShape {
                batch: 1,
                queries: rows,
                keys: first + rows,
                heads,
                key_heads,
                head_dim,
                causal: true,
                scale: 0.2,
                rounding: Rounding::None,
            };
            let (mut one, mut two) = (t.output(width[0]), t.output(width[0]));
            device.cache_attention(&q1, &cache, shape, &mut one).expect("fits");
            device.cache_attention(&q2, &other, shape, &mut two).expect("fits");
            t.check(&format!("a cache of {kind:?} from {first}"), &two, &read(&one, width[0]));
            let mut write = |rows, first| {
                device.rope_and_write(&mut q2, &mut k2, &v, rows, heads_of, head_dim, &mut other, first, theta)
            };
            assert!(write(rows, 1000).is_err());
            assert!(write(rows + 1, 0).is_err());
        }
    }
}
