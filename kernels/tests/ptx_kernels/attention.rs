//! Attention: as it is defined, and of one query to a cache.

use crate::machine::{Fields, Grid, Machine, arguments, halves, wide};
use crate::rows::softmax_of;
use half::f16;

const THREADS: usize = 128;
/// Keys of a block of cuda/decode.cu.
const CHUNK: usize = 128;

/// Keys or values `[heads, places, width]` in memory, and what they stand for.
struct Stored {
    at: u64,
    scales: u64,
    values: Vec<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Type {
    F32,
    F16,
    I8,
    /// Keys as bytes, values in f32.
    KeysI8,
}

/// Random elements of a type, `width` that share a scale.
fn stored(machine: &mut Machine, kind: Type, len: usize, width: usize) -> Stored {
    if kind == Type::I8 {
        let codes = machine.random_bytes(len);
        let scales: Vec<f32> = machine.numbers(len / width).iter().map(|scale| (scale + 3.0) / 256.0).collect();
        let value = |(i, &code): (usize, &u8)| f64::from(code as i8) * f64::from(scales[i / width]);
        let values = codes.iter().enumerate().map(value).collect();
        return Stored { at: machine.bytes(&codes), scales: machine.floats(&scales), values };
    }
    let values = machine.numbers(len);
    if kind == Type::F32 {
        return Stored { at: machine.floats(&values), scales: 0, values: wide(&values) };
    }
    let narrow = values.iter().map(|&value| f16::from_f32(value).to_f64()).collect();
    Stored { at: machine.bytes(&halves(&values)), scales: 0, values: narrow }
}

/// softmax(q · keysᵀ · scale) · values; `at` is where the element of key `key` that is `i` wide begins.
fn attend(q: &[f64], keys: usize, scale: f64, [k, v]: [&[f64]; 2], at: impl Fn(usize) -> usize) -> Vec<f64> {
    let dot = |key: usize| q.iter().zip(&k[at(key)..]).map(|(q, k)| q * k).sum::<f64>() * scale;
    let weights = softmax_of(&(0..keys).map(dot).collect::<Vec<_>>());
    (0..q.len()).map(|i| weights.iter().enumerate().map(|(key, weight)| weight * v[at(key) + i]).sum()).collect()
}

/// The query as bytes, as decoding takes it.
fn rounded(q: &[f32]) -> Vec<f64> {
    let largest = q.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let factor = if largest > 1e-30 { 127.0 / largest } else { 0.0 };
    q.iter().map(|x| f64::from((x * factor).round_ties_even()) * f64::from(largest / 127.0)).collect()
}

pub(crate) fn decode(machine: &mut Machine) {
    let scale = 0.3;
    for (keys, capacity, heads, group, width) in [
        (1, 1, 1, 1, 4),
        (128, 140, 2, 2, 32),
        (129, 130, 2, 3, 20),
        (300, 300, 2, 7, 64),
        (257, 400, 1, 16, 128),
        (500, 513, 3, 1, 100),
    ] {
        let chunks = usize::div_ceil(keys, CHUNK);
        let q = machine.numbers(heads * group * width);
        let q_at = machine.floats(&q);
        for kind in [Type::F16, Type::I8] {
            let [k, v] = [0, 1].map(|_| stored(machine, kind, heads * capacity * width, width));
            let out = machine.output(4 * q.len());
            let partial = machine.output(4 * heads * chunks * group * (width + 2));
            let counters = machine.bytes(&vec![0; 4 * heads]);
            let shape = Fields::default().ints(&[keys, group, width]).word((capacity * width) as u64).float(scale);
            let (shape, grid) = (shape.filled(8), Grid([chunks, heads, 1], THREADS, 0));
            if kind == Type::I8 {
                let arguments = arguments![q_at, k.at, v.at, k.scales, v.scales, shape, partial, counters, out];
                machine.run(["decode", "decode_i8"], grid, arguments);
            } else {
                machine.run(
                    ["decode", "decode_f16"],
                    grid,
                    arguments![q_at, k.at, v.at, shape, partial, counters, out],
                );
            }
            let of_head = |(head, q): (usize, &[f32])| {
                let q = if kind == Type::I8 { rounded(q) } else { wide(q) };
                let start = head / group * capacity;
                attend(&q, keys, f64::from(scale), [&k.values, &v.values], |key| (start + key) * width)
            };
            let expected: Vec<f64> = q.chunks_exact(width).enumerate().flat_map(of_head).collect();
            machine.check(&format!("decode {kind:?} of {keys} keys, {group} × {width}"), out, &expected, 1e-5);
            assert_eq!(machine.read_words(counters), vec![0; heads]);
            machine.read(partial);
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    key_heads: usize,
    width: usize,
    causal: bool,
}

impl Shape {
    fn of([batch, queries, keys, heads, key_heads, width]: [usize; 6], causal: bool) -> Self {
        Shape { batch, queries, keys, heads, key_heads, width, causal }
    }
}

/// Runs a kernel and compares; `fast`: by tensor cores, in f16.
fn check(machine: &mut Machine, shape: Shape, kind: Type, in_cache: bool, fast: bool) {
    let Shape { batch, queries, keys, heads, key_heads, width, causal } = shape;
    let scale = 0.3;
    let q = machine.numbers(batch * queries * heads * width);
    let q_at = machine.floats(&q);
    // As buffers lie, [batch, keys, key heads, width], or as caches do, [key heads, capacity, width].
    let capacity = if in_cache { keys + 3 } else { keys };
    let of_keys = if kind == Type::KeysI8 { [Type::I8, Type::F32] } else { [kind; 2] };
    let [mut k, v] = of_keys.map(|kind| stored(machine, kind, batch * key_heads * capacity * width, width));
    if kind == Type::KeysI8 {
        // Their scales lie [batch, key heads, keys].
        let scales = machine.numbers(batch * key_heads * keys);
        let scales: Vec<f32> = scales.iter().map(|scale| (scale + 3.0) / 256.0).collect();
        let codes = machine.random_bytes(batch * key_heads * keys * width);
        (k.at, k.scales) = (machine.bytes(&codes), machine.floats(&scales));
        let of_element = |(i, &code): (usize, &u8)| {
            let (head, key, sequence) =
                (i / width % key_heads, i / width / key_heads % keys, i / width / key_heads / keys);
            f64::from(code as i8) * f64::from(scales[(sequence * key_heads + head) * keys + key])
        };
        k.values = codes.iter().enumerate().map(of_element).collect();
    }
    let row = key_heads * width;
    let strides = if in_cache { [0, capacity * width, width] } else { [keys * row, width, row] };
    let lies = strides.iter().fold(Fields::default(), |fields, &stride| fields.word(stride as u64));
    let ints = [queries, keys, heads, key_heads, width, usize::from(causal)];
    let (argument, out) = (Fields::default().ints(&ints).float(scale), machine.output(4 * q.len()));
    let of_kind = if kind == Type::KeysI8 { "keys_i8".to_owned() } else { format!("{kind:?}").to_lowercase() };
    let (family, kernel, grid) = if fast {
        let wide = match width {
            0..=64 => 64,
            0..=96 if !in_cache => 96,
            _ => 128,
        };
        let grid = Grid([queries.div_ceil(64), heads, batch], THREADS, 0);
        ("flash", format!("flash_{of_kind}_{wide}"), grid)
    } else {
        let grid = Grid([queries, heads, batch], THREADS, 4 * width);
        ("attention", format!("attention_{of_kind}"), grid)
    };
    let arguments = match kind {
        Type::I8 => arguments![q_at, k.at, v.at, k.scales, v.scales, argument, lies, out].to_vec(),
        Type::KeysI8 => arguments![q_at, k.at, v.at, k.scales, argument, lies, out].to_vec(),
        _ => arguments![q_at, k.at, v.at, argument, lies, out].to_vec(),
    };
    machine.run([family, &kernel], grid, &arguments);
    if fast && machine.architecture < 80 {
        // Nothing: the device does not launch it there.
        return;
    }
    let narrow = |values: &[f64]| -> Vec<f64> { values.iter().map(|&value| f16::from_f64(value).to_f64()).collect() };
    let scaled: Vec<f64> = q.iter().map(|q| f64::from(q * scale)).collect();
    let (scaled, k, v) = match (fast, kind) {
        (false, _) => (scaled, k.values, v.values),
        (true, Type::I8 | Type::KeysI8) => {
            let queries = q.chunks_exact(width).flat_map(rounded).map(|q| q * f64::from(scale));
            (queries.collect(), k.values, narrow(&v.values))
        }
        (true, _) => (narrow(&scaled), narrow(&k.values), narrow(&v.values)),
    };
    let of_head = |(i, q): (usize, &[f64])| {
        let (head, query, sequence) = (i % heads, i / heads % queries, i / heads / queries);
        let seen = if causal { keys - queries + query + 1 } else { keys };
        let start = sequence * strides[0] + head / (heads / key_heads) * strides[1];
        attend(q, seen, 1.0, [&k, &v], |key| start + key * strides[2])
    };
    let expected: Vec<f64> = scaled.chunks_exact(width).enumerate().flat_map(of_head).collect();
    // Weights in f16 have 11 bits.
    machine.check(&format!("{kernel}, {shape:?}"), out, &expected, if fast { 5e-4 } else { 1e-5 });
}

pub(crate) fn attention(machine: &mut Machine) {
    for (shape, causal) in [
        ([1, 1, 1, 1, 1, 1], true),
        ([2, 3, 5, 4, 2, 20], false),
        ([1, 3, 5, 2, 2, 16], true),
        ([1, 2, 131, 3, 1, 33], true),
        ([1, 1, 260, 2, 1, 130], false),
    ] {
        let shape = Shape::of(shape, causal);
        check(machine, shape, Type::F32, false, false);
        if shape.batch == 1 {
            [Type::F32, Type::F16, Type::I8].into_iter().for_each(|kind| check(machine, shape, kind, true, false));
        }
    }
}

pub(crate) fn flash(machine: &mut Machine) {
    for (shape, causal) in [
        ([1, 2, 2, 1, 1, 1], true),
        ([2, 65, 70, 2, 1, 20], false),
        ([1, 70, 131, 2, 2, 64], true),
        ([1, 9, 200, 4, 2, 33], true),
        ([1, 65, 65, 1, 1, 128], true),
        ([2, 3, 5, 2, 1, 100], false),
        ([1, 17, 150, 2, 1, 67], true),
    ] {
        let shape = Shape::of(shape, causal);
        [Type::F32, Type::KeysI8].into_iter().for_each(|kind| check(machine, shape, kind, false, true));
        if shape.batch == 1 {
            [Type::F16, Type::I8].into_iter().for_each(|kind| check(machine, shape, kind, true, true));
        }
    }
}
