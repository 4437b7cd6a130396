//! Times the kernels that take the time of a window, in the shapes of the published 0.5B model, next to the roofs measured
//! first: `cargo bench -p candor-kernels`. Products count a multiplication and an addition as two operations.
#![allow(missing_docs)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use candor_kernels::cpu::{CpuBuffer, CpuDevice, CpuWeight, measure_arithmetic, measure_read_bandwidth};
use candor_kernels::{Activation, AttentionShape, CacheType, DType, Device, HostTensor, Rounding, Scales};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Weights that a decoding benchmark goes through in turn: larger than the caches.
const DECODE_BYTES: usize = 128 << 20;

/// How a weight is stored: its type, and the group that shares a scale.
type Format = (&'static str, DType, Option<usize>);
const FORMATS: [Format; 5] = [
    ("int4 group 32", DType::I4, Some(32)),
    ("int4 group 128", DType::I4, Some(128)),
    ("int8 row", DType::I8, None),
    ("f16", DType::F16, None),
    ("f32", DType::F32, None),
];

/// The decoder's linear layers as (outputs, depth): query, key and value together, gate or up, down.
const DECODER: [(usize, usize); 3] = [(1152, 896), (4864, 896), (896, 4864)];

fn random() -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(1)
}

fn buffer(device: &CpuDevice, len: usize) -> CpuBuffer {
    let mut random = random();
    let values: Vec<f32> = (0..len).map(|_| random.random_range(-1.0..1.0)).collect();
    let mut buffer = device.allocate(len).expect("memory");
    device.write(&values, &mut buffer, 0).expect("as long");
    buffer
}

fn weight(device: &CpuDevice, (_, dtype, group): Format, outputs: usize, depth: usize) -> CpuWeight {
    let mut random = random();
    let len = dtype.row_bytes(depth).expect("a size") * outputs;
    let bytes: Vec<u8> = match dtype {
        // Any bits are a code; those of a float are to be a number.
        DType::I4 | DType::I8 => {
            let mut bytes = vec![0; len];
            random.fill_bytes(&mut bytes);
            bytes
        }
        DType::F16 => {
            (0..len / 2).flat_map(|_| half::f16::from_f32(random.random_range(-0.1..0.1)).to_le_bytes()).collect()
        }
        _ => (0..len / 4).flat_map(|_| random.random_range(-0.1f32..0.1).to_le_bytes()).collect(),
    };
    let scales = dtype.is_scaled().then(|| match group {
        Some(group) => {
            let per_row = depth.div_ceil(group);
            let scales: Vec<u8> = half::f16::from_f32(0.01).to_le_bytes().repeat(outputs * per_row);
            Scales::groups(Arc::new(scales), 0, DType::F16, group, outputs, per_row).expect("sound scales")
        }
        None => Scales::rows(vec![0.01; outputs]),
    });
    let tensor = HostTensor::new(Arc::new(bytes), 0, len, dtype, vec![outputs, depth], scales).expect("a sound tensor");
    device.weight(&tensor).expect("memory")
}

fn group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    group
}

fn roofs(_: &mut Criterion) {
    let device = CpuDevice::new(None);
    println!("{}", device.describe());
    println!(
        "roofs: memory is read at {:.1} GB/s, f32 are multiplied and added at {:.0} GFLOP/s",
        measure_read_bandwidth(device.pool(), 256 << 20),
        measure_arithmetic(device.pool())
    );
}

/// One row: what decoding does. Bytes are those of the weights.
fn decode(criterion: &mut Criterion) {
    let device = CpuDevice::new(None);
    let mut group = group(criterion, "decode");
    for format in FORMATS {
        for (outputs, depth) in DECODER {
            let bytes = format.1.row_bytes(depth).expect("a size") * outputs
                + format.2.map_or(0, |group| outputs * depth.div_ceil(group) * 2);
            let weights: Vec<CpuWeight> =
                (0..DECODE_BYTES.div_ceil(bytes)).map(|_| weight(&device, format, outputs, depth)).collect();
            let x = buffer(&device, depth);
            let mut out = device.allocate(outputs).expect("memory");
            let mut next = (0..weights.len()).cycle();
            group.throughput(Throughput::BytesDecimal(bytes as u64));
            group.bench_function(BenchmarkId::new(format.0, format!("{outputs}x{depth}")), |bencher| {
                bencher.iter(|| {
                    let weight = &weights[next.next().unwrap_or(0)];
                    device.linear(&x, 1, weight, None, Activation::Identity, &mut out).expect("fits");
                    black_box(&out);
                });
            });
        }
    }
    group.finish();
}

/// Many rows: prefill and towers.
fn product(criterion: &mut Criterion) {
    let device = CpuDevice::new(None);
    let mut group = group(criterion, "product");
    // A prompt through gate or up; eight frames through the vision tower's layers; 30 seconds through Whisper's.
    let layers = [
        (512, 4864, 896, Activation::Identity),
        (1568, 3072, 768, Activation::GeluTanh),
        (1568, 768, 3072, Activation::Identity),
        (1500, 5120, 1280, Activation::Gelu),
    ];
    for format in FORMATS {
        for (rows, outputs, depth, activation) in layers {
            let weight = weight(&device, format, outputs, depth);
            let x = buffer(&device, rows * depth);
            let mut out = device.allocate(rows * outputs).expect("memory");
            group.throughput(Throughput::Elements(2 * (rows * outputs * depth) as u64));
            group.bench_function(BenchmarkId::new(format.0, format!("{rows}x{outputs}x{depth}")), |bencher| {
                bencher.iter(|| {
                    device.linear(&x, rows, &weight, None, activation, &mut out).expect("fits");
                    black_box(&out);
                });
            });
        }
    }
    group.finish();
}

/// Attention of the towers, and of decoding and prefill over a cache.
fn attention(criterion: &mut Criterion) {
    let device = CpuDevice::new(None);
    let mut group = group(criterion, "attention");
    let tower = |batch: usize, length: usize, heads: usize, rounding: Rounding| AttentionShape {
        batch,
        queries: length,
        keys: length,
        heads,
        key_heads: heads,
        head_dim: 64,
        causal: false,
        scale: 0.125,
        rounding,
    };
    let operations = |shape: &AttentionShape| {
        let keys = if shape.causal { shape.keys - shape.queries + shape.queries.div_ceil(2) } else { shape.keys };
        4 * (shape.batch * shape.heads * shape.queries * keys * shape.head_dim) as u64
    };
    for (name, batch, length, heads) in [("vision tower", 8, 196, 12), ("Whisper", 1, 1500, 20)] {
        for (rounding, of) in [(Rounding::Bytes, "bytes"), (Rounding::None, "f32")] {
            let shape = tower(batch, length, heads, rounding);
            let [q, k, v] = [(); 3].map(|()| buffer(&device, batch * length * heads * 64));
            let mut out = device.allocate(batch * length * heads * 64).expect("memory");
            group.throughput(Throughput::Elements(operations(&shape)));
            group.bench_function(BenchmarkId::new(name, of), |bencher| {
                bencher.iter(|| {
                    device.attention(&q, &k, &v, shape, &mut out).expect("fits");
                    black_box(&out);
                });
            });
        }
    }
    for (kind, name) in [(CacheType::I8, "int8"), (CacheType::F16, "f16"), (CacheType::F32, "f32")] {
        for (what, queries, keys) in [("decode", 1, 256), ("decode", 1, 1024), ("prefill", 512, 512)] {
            let shape =
                AttentionShape { queries, keys, key_heads: 2, causal: true, ..tower(1, keys, 14, Rounding::None) };
            let mut cache = device.cache(kind, keys, 2, 64).expect("memory");
            let [k, v] = [(); 2].map(|()| buffer(&device, keys * 2 * 64));
            device.cache_write(&k, &v, keys, &mut cache, 0).expect("fits");
            let q = buffer(&device, queries * 14 * 64);
            let mut out = device.allocate(queries * 14 * 64).expect("memory");
            group.throughput(Throughput::Elements(operations(&shape)));
            group.bench_function(BenchmarkId::new(format!("{what} behind {keys}"), name), |bencher| {
                bencher.iter(|| {
                    device.cache_attention(&q, &cache, shape, &mut out).expect("fits");
                    black_box(&out);
                });
            });
        }
    }
    group.finish();
}

/// What goes over the elements of a vision tower's eight frames.
fn elements(criterion: &mut Criterion) {
    let device = CpuDevice::new(None);
    let mut group = group(criterion, "elements");
    let (rows, width) = (1568, 768);
    let norm = device.weight(&HostTensor::from_f32(&vec![1.0; width], &[width]).expect("sound")).expect("memory");
    let x = buffer(&device, rows * width);
    let mut out = device.allocate(rows * width).expect("memory");
    group.throughput(Throughput::Elements((rows * width) as u64));
    group.bench_function("layer norm", |bencher| {
        bencher.iter(|| device.layer_norm(&x, rows, &norm, &norm, 1e-6, &mut out).expect("fits"));
    });
    group.bench_function("RMS norm", |bencher| {
        bencher.iter(|| device.rms_norm(&x, rows, &norm, 1e-6, &mut out).expect("fits"));
    });
    for activation in [Activation::Gelu, Activation::GeluTanh, Activation::Silu] {
        group.bench_function(format!("{activation:?}"), |bencher| {
            bencher.iter(|| device.activate(activation, &mut out, rows * width).expect("fits"));
        });
    }
    group.bench_function("softmax", |bencher| {
        bencher.iter(|| device.softmax(&x, rows, width, &mut out).expect("fits"));
    });
    group.finish();
}

criterion_group!(kernels, roofs, decode, product, attention, elements);
criterion_main!(kernels);
