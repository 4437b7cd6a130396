//! The write side of key-value caches, `[key heads, capacity, head_dim]`.

use crate::machine::{Fields, Grid, Int, Machine, Size, arguments, wide};
use crate::ptx::Arg;
use crate::rows::{frequencies, turned};
use half::f16;

/// What stands in a cache where nothing is written.
const MARK: u8 = 0x5a;
/// Keys whose mean is taken off all.
const MEAN_OF: usize = 16;

/// Keys and values of `rows` positions, `[rows, heads, width]`.
struct Shape {
    rows: usize,
    heads: usize,
    width: usize,
    capacity: usize,
    first: usize,
}

const SHAPES: [Shape; 4] = [
    Shape { rows: 1, heads: 1, width: 2, capacity: 1, first: 0 },
    Shape { rows: 3, heads: 2, width: 20, capacity: 5, first: 0 },
    Shape { rows: 19, heads: 2, width: 64, capacity: 21, first: 0 },
    Shape { rows: 4, heads: 3, width: 70, capacity: 40, first: 30 },
];

impl Shape {
    fn len(&self) -> usize {
        self.rows * self.heads * self.width
    }

    /// The row `[rows, heads]` that a place `[heads, capacity]` of the cache gets; none if it keeps what it has.
    fn source(&self, place: usize) -> Option<usize> {
        let (head, position) = (place / self.capacity, place % self.capacity);
        let row = position.checked_sub(self.first).filter(|row| *row < self.rows)?;
        Some(row * self.heads + head)
    }

    /// Bytes of a cache of elements of `bytes` bytes, nothing written yet.
    fn empty(&self, bytes: usize) -> Vec<u8> {
        vec![MARK; self.heads * self.capacity * bytes]
    }

    /// What a cache holds against rows `[rows, heads]` that were written; all else must be as it was.
    fn check(&self, found: &[u8], bytes: usize, mut check: impl FnMut(usize, &[u8])) {
        for (place, found) in found.chunks_exact(bytes).enumerate() {
            match self.source(place) {
                Some(row) => check(row, found),
                None => assert!(found.iter().all(|byte| *byte == MARK), "place {place} was written"),
            }
        }
    }
}

/// A launch's two caches against keys and values, `[rows, heads, width]`, as f32 or f16.
fn check_floats(machine: &Machine, what: &str, shape: &Shape, size: usize, caches: [u64; 2], expected: [&[f64]; 2]) {
    for (cache, expected) in caches.into_iter().zip(expected) {
        shape.check(machine.read(cache), size * shape.width, |row, bytes| {
            let found: Vec<f32> = match size {
                4 => bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
                _ => bytes.as_chunks::<2>().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect(),
            };
            let allowed = if size == 4 { 1e-6 } else { 6e-4 };
            machine.near(what, &found, &expected[row * shape.width..][..shape.width], allowed);
        });
    }
}

/// The caches of bytes of a launch.
struct Bytes {
    mean: u64,
    /// Codes and scales of keys, then of values.
    codes: [u64; 2],
    scales: [u64; 2],
    kept: Vec<f32>,
}

impl Bytes {
    fn new(machine: &mut Machine, shape: &Shape) -> Self {
        let kept = machine.numbers(shape.heads * shape.width);
        // Position 0 makes a new mean.
        let mean = if shape.first == 0 { machine.output(4 * kept.len()) } else { machine.floats(&kept) };
        let (codes, scales) = (shape.empty(shape.width), shape.empty(4));
        Bytes {
            mean,
            codes: [machine.bytes(&codes), machine.bytes(&codes)],
            scales: [machine.bytes(&scales), machine.bytes(&scales)],
            kept,
        }
    }

    /// Against keys and values `[rows, heads, width]`.
    fn check(&self, machine: &Machine, what: &str, shape: &Shape, [keys, values]: [&[f64]; 2]) {
        let of_row = shape.heads * shape.width;
        let averaged = shape.rows.min(MEAN_OF);
        let mean: Vec<f64> = if shape.first == 0 {
            (0..of_row)
                .map(|i| (0..averaged).map(|row| keys[row * of_row + i]).sum::<f64>() / averaged as f64)
                .collect()
        } else {
            wide(&self.kept)
        };
        machine.check(&format!("{what}: the mean"), self.mean, &mean, 1e-6);
        let centred: Vec<f64> = keys.iter().enumerate().map(|(i, key)| key - mean[i % of_row]).collect();
        for (which, expected) in [&centred[..], values].into_iter().enumerate() {
            let row_of = |row: usize| &expected[row * shape.width..][..shape.width];
            let scale_of = |row: usize| row_of(row).iter().fold(0f64, |most, x| most.max(x.abs())) / 127.0;
            shape.check(machine.read(self.scales[which]), 4, |row, bytes| {
                let scale = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                machine.near(&format!("{what}: a scale"), &[scale], &[scale_of(row)], 1e-5);
            });
            shape.check(machine.read(self.codes[which]), shape.width, |row, codes| {
                for (&code, value) in codes.iter().zip(row_of(row)) {
                    // To nearest, but for the errors of f32.
                    let code = f64::from(code as i8);
                    assert!((value / scale_of(row).max(1e-30) - code).abs() < 0.5002, "{what}: {code} for {value}");
                }
            });
        }
    }
}

/// Keys with a mean of their own in each dimension.
fn keys(machine: &mut Machine, shape: &Shape) -> Vec<f32> {
    let of_row = shape.heads * shape.width;
    machine.numbers(shape.len()).iter().enumerate().map(|(i, x)| x + (i % of_row % 5) as f32).collect()
}

pub(crate) fn cache_write(machine: &mut Machine) {
    for shape in &SHAPES {
        let (k, v) = (keys(machine, shape), machine.numbers(shape.len()));
        let expected = [&wide(&k)[..], &wide(&v)[..]];
        let (k_at, v_at) = (machine.floats(&k), machine.floats(&v));
        let Shape { rows, heads, width, capacity, first, .. } = *shape;
        for (kernel, size) in [("cache_write_f32", 4), ("cache_write_f16", 2)] {
            let empty = shape.empty(size * width);
            let caches = [machine.bytes(&empty), machine.bytes(&empty)];
            let arguments: &[Arg] = arguments![
                k_at,
                v_at,
                Size(rows),
                Int(heads),
                Int(width),
                Int(capacity),
                Int(first),
                caches[0],
                caches[1]
            ];
            machine.run(["cache", kernel], Grid::each(shape.len(), 256), arguments);
            check_floats(machine, kernel, shape, size, caches, expected);
        }
        let bytes = Bytes::new(machine, shape);
        let arguments: &[Arg] = arguments![
            k_at,
            v_at,
            Int(heads),
            Int(width),
            Int(capacity),
            Int(first),
            Int(rows.min(MEAN_OF)),
            bytes.mean,
            bytes.codes[0],
            bytes.scales[0],
            bytes.codes[1],
            bytes.scales[1],
        ];
        machine.run(["cache", "cache_write_i8"], Grid([rows, heads, 1], 32, 0), arguments);
        bytes.check(machine, "cache_write_i8", shape, expected);
    }
}

pub(crate) fn rope_write(machine: &mut Machine) {
    for (shape, group) in SHAPES.iter().zip([1, 3, 2, 2]) {
        let Shape { rows, heads, width, capacity, first, .. } = *shape;
        let (all, frequencies) = (heads * group, frequencies(width / 2));
        let (q, k) = (machine.numbers(rows * all * width), keys(machine, shape));
        let v = machine.numbers(shape.len());
        let turn = |x: &[f32], heads: usize| -> Vec<f64> {
            let heads_of_x = x.chunks_exact(width).enumerate();
            heads_of_x.flat_map(|(i, head)| turned(head, first + i / heads, &frequencies)).collect()
        };
        let (queries, turned_keys, values) = (turn(&q, all), turn(&k, heads), wide(&v));
        let (k_at, v_at, of) = (machine.floats(&k), machine.floats(&v), machine.floats(&frequencies));
        let argument = Fields::default().ints(&[all, heads, width / 2, first]).word(of);
        for (kernel, size) in [("rope_write_f32", 4), ("rope_write_f16", 2)] {
            let (q_at, empty) = (machine.floats(&q), shape.empty(size * width));
            let caches = [machine.bytes(&empty), machine.bytes(&empty)];
            let arguments = arguments![q_at, k_at, v_at, argument.clone(), Int(capacity), caches[0], caches[1]];
            machine.run(["cache", kernel], Grid([rows, all + heads, 1], 32, 0), arguments);
            machine.check(&format!("{kernel}: queries"), q_at, &queries, 1e-6);
            check_floats(machine, kernel, shape, size, caches, [&turned_keys, &values]);
        }
        let (q_at, bytes) = (machine.floats(&q), Bytes::new(machine, shape));
        let arguments: &[Arg] = arguments![
            q_at,
            k_at,
            v_at,
            argument,
            Int(capacity),
            Int(rows.min(MEAN_OF)),
            bytes.mean,
            bytes.codes[0],
            bytes.scales[0],
            bytes.codes[1],
            bytes.scales[1],
        ];
        machine.run(["cache", "rope_write_i8"], Grid([rows, all + heads, 1], 32, 0), arguments);
        machine.check("rope_write_i8: queries", q_at, &queries, 1e-6);
        bytes.check(machine, "rope_write_i8", shape, [&turned_keys, &values]);
        // Keys themselves are not turned in place.
        machine.check("keys", k_at, &wide(&k), 0.0);
    }
}

/// Keys of a buffer as bytes, each head's mean taken off.
pub(crate) fn round_keys(machine: &mut Machine) {
    for (batch, keys, heads, width) in [(1, 1, 1, 1), (2, 9, 3, 20), (1, 70, 2, 72), (2, 17, 1, 128)] {
        let k: Vec<f32> = machine.numbers(batch * keys * heads * width).iter().map(|x| x + 2.0).collect();
        let k_at = machine.floats(&k);
        let (codes, scales) = (machine.output(k.len()), machine.output(4 * batch * keys * heads));
        let arguments: &[Arg] = arguments![k_at, Int(keys), Int(heads), Int(width), codes, scales];
        machine.run(["cache", "round_keys"], Grid([heads, batch, 1], 256, 0), arguments);
        let (codes, scales) = (machine.read(codes), machine.read_floats(scales));
        let place = |sequence: usize, key: usize, head: usize| ((sequence * keys + key) * heads + head) * width;
        for (sequence, head) in (0..batch).flat_map(|sequence| (0..heads).map(move |head| (sequence, head))) {
            let sum = |i: usize| (0..keys).map(|key| f64::from(k[place(sequence, key, head) + i])).sum::<f64>();
            let mean: Vec<f64> = (0..width).map(|i| sum(i) / keys as f64).collect();
            for key in 0..keys {
                let at = place(sequence, key, head);
                let centred: Vec<f64> = mean.iter().enumerate().map(|(i, mean)| f64::from(k[at + i]) - mean).collect();
                let scale = f64::from(scales[(sequence * heads + head) * keys + key]);
                let largest = centred.iter().fold(0f64, |largest, x| largest.max(x.abs()));
                assert!((scale - largest / 127.0).abs() < 1e-6, "{batch} {keys} {heads} {width}: {scale}, {largest}");
                for (i, x) in centred.iter().enumerate() {
                    let found = f64::from(codes[at + i] as i8) * scale;
                    assert!((found - x).abs() <= 0.51 * scale + 1e-6, "{batch} {keys} {heads} {width}: {found}, {x}");
                }
            }
        }
    }
}
