//! Attention over bytes and over caches against its definition in f64, over inputs that make it hard:
//! channels far from zero, long contexts, one key that takes nearly all.

use candor_kernels::{AttentionShape, CacheType, Device, Rounding};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Queries, keys and values of one or more sequences.
pub(crate) struct Input {
    pub(crate) shape: AttentionShape,
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Hardness {
    Plain,
    /// Every key has two channels far from zero, as Qwen2's have.
    Outliers,
    /// One key takes nearly all of the weight.
    Dominant,
    /// All keys are equal, so that every weight is.
    Equal,
}

pub(crate) fn input(seed: u64, hardness: Hardness, shape: AttentionShape) -> Input {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let AttentionShape { batch, queries, keys, heads, key_heads, head_dim, .. } = shape;
    let mut numbers = |len: usize| (0..len).map(|_| rng.random_range(-1.0f32..1.0)).collect::<Vec<_>>();
    let q = numbers(batch * queries * heads * head_dim);
    let mut k = numbers(batch * keys * key_heads * head_dim);
    let v = numbers(batch * keys * key_heads * head_dim);
    for (at, key) in k.chunks_exact_mut(head_dim).enumerate() {
        match hardness {
            Hardness::Plain => {}
            Hardness::Outliers => {
                key[0] += 40.0;
                key[head_dim - 1] -= 25.0;
            }
            Hardness::Dominant if at / key_heads == keys / 2 => {
                key.iter_mut().zip(&q).for_each(|(key, q)| *key = 6.0 * q.signum());
            }
            Hardness::Dominant => key.iter_mut().for_each(|key| *key *= 0.2),
            Hardness::Equal => key.fill(0.3),
        }
    }
    Input { shape, q, k, v }
}

/// The definition, and the largest value.
pub(crate) fn expected(input: &Input) -> (Vec<f64>, f64) {
    let AttentionShape { batch, queries, keys, heads, key_heads, head_dim, causal, scale, .. } = input.shape;
    let mut out = Vec::new();
    for b in 0..batch {
        for i in 0..queries {
            for h in 0..heads {
                let q = &input.q[((b * queries + i) * heads + h) * head_dim..][..head_dim];
                let of = |j: usize| ((b * keys + j) * key_heads + h / (heads / key_heads)) * head_dim;
                let seen = if causal { keys - queries + i + 1 } else { keys };
                let score = |j: usize| {
                    let k = &input.k[of(j)..][..head_dim];
                    q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() * f64::from(scale)
                };
                let scores: Vec<f64> = (0..seen).map(score).collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for d in 0..head_dim {
                    let value = |j: usize| f64::from(input.v[of(j) + d]);
                    out.push((0..seen).map(|j| weights[j] * value(j)).sum::<f64>() / sum);
                }
            }
        }
    }
    (out, 1.0)
}

pub(crate) fn buffer<D: Device>(device: &D, values: &[f32]) -> D::Buffer {
    let mut buffer = device.allocate(values.len()).expect("memory");
    device.write(values, &mut buffer, 0).expect("it fits");
    buffer
}

pub(crate) fn worst<D: Device>(device: &D, out: &D::Buffer, expected: &[f64]) -> f64 {
    let mut values = vec![0.0; expected.len()];
    device.read(out, 0, &mut values).expect("it fits");
    values.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max)
}

/// What rounding to bytes may cost where values lie within ±1. A key's bytes are off by up to 1/254 of its largest element,
/// a query's likewise: with 64 channels that is an error of some hundredths in a score, and as much, relatively, in a weight.
pub(crate) const ALLOWED: f64 = 0.03;

/// Of an attention: batch, queries, keys, heads, key heads, width of a head, and whether it is causal.
pub(crate) type Sizes = (usize, usize, usize, usize, usize, usize, bool);

pub(crate) fn shape(
    (batch, queries, keys, heads, key_heads, head_dim, causal): Sizes,
    rounding: Rounding,
) -> AttentionShape {
    let scale = 1.0 / (head_dim as f32).sqrt();
    AttentionShape { batch, queries, keys, heads, key_heads, head_dim, causal, scale, rounding }
}

pub(crate) const SHAPES: [Sizes; 11] = [
    (1, 1, 1, 2, 1, 64, true),
    (1, 1, 37, 14, 2, 64, true),
    (1, 1, 1500, 14, 2, 64, true),
    (1, 40, 300, 14, 2, 64, true),
    (1, 130, 130, 4, 4, 64, true),
    (3, 36, 36, 6, 6, 64, false),
    (2, 50, 50, 2, 2, 32, false),
    (1, 9, 33, 3, 1, 20, true),
    (1, 5, 7, 2, 2, 7, false),
    (2, 70, 70, 2, 1, 100, true),
    (1, 50, 70, 2, 2, 72, false),
];

pub(crate) fn caches_are_near_the_definition_however_they_are_filled<D: Device>(device: &D) {
    for (number, sizes) in SHAPES.into_iter().enumerate() {
        let shape = shape(sizes, Rounding::None);
        let AttentionShape { batch, keys, key_heads, head_dim, .. } = shape;
        if batch > 1 {
            continue;
        }
        let width = key_heads * head_dim;
        for hardness in [Hardness::Plain, Hardness::Outliers, Hardness::Dominant, Hardness::Equal] {
            let input = input(100 + number as u64, hardness, shape);
            let (expected, size) = expected(&input);
            let q = buffer(device, &input.q);
            for (kind, allowed) in [(CacheType::F32, 2e-5), (CacheType::F16, 4e-3), (CacheType::I8, ALLOWED)] {
                for step in [1, 5, keys] {
                    let mut cache = device.cache(kind, keys + 3, key_heads, head_dim).expect("memory");
                    // What an earlier sequence left is forgotten.
                    let old = buffer(device, &vec![9.0; width]);
                    device.cache_write(&old, &old, 1, &mut cache, 0).expect("it fits");
                    for first in (0..keys).step_by(step) {
                        let rows = step.min(keys - first);
                        let part = first * width..(first + rows) * width;
                        let (k, v) = (buffer(device, &input.k[part.clone()]), buffer(device, &input.v[part]));
                        device.cache_write(&k, &v, rows, &mut cache, first).expect("it fits");
                    }
                    let mut copy = device.cache(kind, keys, key_heads, head_dim).expect("memory");
                    device.cache_copy(&cache, &mut copy, keys).expect("alike");
                    for cache in [&cache, &copy] {
                        let mut out = device.allocate(expected.len()).expect("memory");
                        device.cache_attention(&q, cache, shape, &mut out).expect("a good shape");
                        let error = worst(device, &out, &expected) / size;
                        let about = format!("{} {kind:?} {hardness:?} by {step} {shape:?}", device.describe());
                        assert!(error < allowed, "{about}: {error}");
                    }
                }
            }
        }
    }
}

pub(crate) fn caches_refuse_what_they_cannot_hold<D: Device>(device: &D) {
    let cache = |kind, capacity, heads, width| device.cache(kind, capacity, heads, width).expect("memory");
    let mut bytes = cache(CacheType::I8, 20, 2, 8);
    let row = buffer(device, &[0.5; 16]);
    assert!(device.cache_write(&row, &row, 1, &mut bytes, 0).is_ok());
    assert!(device.cache_write(&row, &row, 2, &mut bytes, 0).is_err());
    assert!(device.cache_write(&row, &row, 1, &mut bytes, 1000).is_err());
    assert!(device.cache_write(&row, &row, 1, &mut bytes, usize::MAX).is_err());
    assert!(device.cache_copy(&cache(CacheType::F32, 20, 2, 8), &mut bytes, 1).is_err());
    assert!(device.cache_copy(&cache(CacheType::I8, 20, 1, 16), &mut bytes, 1).is_err());
    assert!(device.cache_copy(&cache(CacheType::I8, 2000, 2, 8), &mut bytes, 1000).is_err());
    assert!(device.cache(CacheType::I8, 1, 1, 100_000).is_err());
    assert!(device.cache(CacheType::F32, usize::MAX, 2, 8).is_err());
    let good = AttentionShape {
        batch: 1,
        queries: 1,
        keys: 1,
        heads: 2,
        key_heads: 2,
        head_dim: 8,
        causal: true,
        scale: 1.0,
        rounding: Rounding::None,
    };
    let run = |shape| device.cache_attention(&row, &bytes, shape, &mut buffer(device, &[0.0; 16]));
    assert!(run(good).is_ok());
    assert!(run(AttentionShape { batch: 2, ..good }).is_err());
    assert!(run(AttentionShape { keys: 0, causal: false, ..good }).is_err());
    assert!(run(AttentionShape { keys: 1000, ..good }).is_err());
    assert!(run(AttentionShape { queries: 2, ..good }).is_err());
    assert!(run(AttentionShape { key_heads: 1, ..good }).is_err());
    assert!(run(AttentionShape { heads: 1, head_dim: 16, key_heads: 1, ..good }).is_err());
}

/// Attention whose queries and keys may be rounded.
pub(crate) fn rounded_attention_is_near_the_definition<D: Device>(device: &D) {
    for (number, sizes) in SHAPES.into_iter().enumerate() {
        for hardness in [Hardness::Plain, Hardness::Outliers, Hardness::Dominant, Hardness::Equal] {
            for (rounding, allowed) in [(Rounding::None, 2e-5), (Rounding::Halves, 4e-3), (Rounding::Bytes, ALLOWED)] {
                let shape = shape(sizes, rounding);
                let input = input(number as u64, hardness, shape);
                let (expected, size) = expected(&input);
                let (q, k, v) = (buffer(device, &input.q), buffer(device, &input.k), buffer(device, &input.v));
                let mut out = device.allocate(expected.len()).expect("memory");
                device.attention(&q, &k, &v, shape, &mut out).expect("a good shape");
                let error = worst(device, &out, &expected) / size;
                assert!(error < allowed, "{} {hardness:?} {shape:?}: {error}", device.describe());
            }
        }
    }
}
