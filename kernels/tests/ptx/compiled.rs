//! What NVIDIA's compiler makes of CUDA C++ and of the inline assembly in cuda/ptx.cuh, executed and held against
//! Rust. Errors planted in that assembly, of the kind that compile, must be caught.

use crate::nvrtc::Nvrtc;
use crate::ptx::{Arg, Error, Fault, Memory, Module};
use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::{Path, PathBuf};
use std::time::Instant;

const ARCHITECTURES: [u32; 2] = [72, 87];
const NUMBERS: &str = include_str!("cuda/numbers.cu");
const THREADS: &str = include_str!("cuda/threads.cu");
const MATRICES: &str = include_str!("cuda/matrices.cu");

fn compiler() -> Nvrtc {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = std::env::var_os("CANDOR_CUDA_COMPILERS").map_or(package.join("../.tools"), PathBuf::from);
    Nvrtc::open(&folder.join("cuda126")).unwrap_or_else(|error| panic!("{error}; scripts/setup-cuda.sh installs it"))
}

fn header() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda/ptx.cuh");
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn ptx_of(source: &str, header: String, architecture: u32) -> String {
    let option = format!("--gpu-architecture=compute_{architecture}");
    let compiled = compiler().compile("test.cu", source, &[("ptx.cuh".to_owned(), header)], &[&option]);
    compiled.unwrap_or_else(|error| panic!("{error}")).ptx
}

fn module(source: &str, architecture: u32) -> Module {
    Module::parse(&ptx_of(source, header(), architecture)).unwrap_or_else(|error| panic!("sm_{architecture}: {error}"))
}

trait Bytes {
    fn bytes(&self) -> Vec<u8>;
}

macro_rules! bytes {
    ($($number:ty),*) => {
        $(impl Bytes for [$number] {
            fn bytes(&self) -> Vec<u8> {
                self.iter().flat_map(|number| number.to_le_bytes()).collect()
            }
        })*
    };
}
bytes!(f32, i32, i8, f16);

#[track_caller]
fn launch(module: &Module, memory: &mut Memory, kernel: &str, blocks: [u32; 2], threads: [u32; 2], arguments: &[Arg]) {
    launch_shared(module, memory, kernel, blocks, threads, 0, arguments).unwrap_or_else(|error| panic!("{error}"));
}

fn launch_shared(
    module: &Module,
    memory: &mut Memory,
    kernel: &str,
    blocks: [u32; 2],
    threads: [u32; 2],
    shared: usize,
    arguments: &[Arg],
) -> Result<(), Error> {
    let (blocks, threads) = ([blocks[0], blocks[1], 1], [threads[0], threads[1], 1]);
    let start = Instant::now();
    let statistics = module.launch(memory, kernel, blocks, threads, shared, arguments)?;
    assert!(statistics.instructions > 0);
    let millions = statistics.instructions as f64 / 1e6;
    println!(
        "{kernel}: {millions:.3} million instructions, {:.0} million a second",
        millions / start.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Runs one of the kernels of numbers.cu and returns its rows.
fn rows<T: Clone>(
    module: &Module,
    kernel: &str,
    (x, y): (Vec<u8>, Vec<u8>),
    (n, count): (usize, usize),
    read: impl Fn(&[u8]) -> Vec<T>,
) -> Vec<Vec<T>> {
    let mut memory = Memory::new();
    let size = x.len() / n;
    let (x, y, out) = (memory.add(&x), memory.add(&y), memory.add_unwritten(size * n * count));
    let arguments = [Arg::U64(x), Arg::U64(y), Arg::U64(out), Arg::U32(n as u32)];
    launch(module, &mut memory, kernel, [n.div_ceil(64) as u32, 1], [64, 1], &arguments);
    assert_eq!(memory.first_unwritten(out), None, "{kernel}: fewer results than the table has");
    read(memory.bytes(out)).chunks_exact(n).map(<[T]>::to_vec).collect()
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn i32s(bytes: &[u8]) -> Vec<i32> {
    f32s(bytes).into_iter().map(|x| x.to_bits() as i32).collect()
}

fn u16s(bytes: &[u8]) -> Vec<u16> {
    bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect()
}

/// By Simpson's rule.
fn erf(x: f64) -> f64 {
    let (steps, f) = (2000, |t: f64| (-t * t).exp());
    let h = x / f64::from(steps);
    let inner = (1..steps).map(|i| f(h * f64::from(i)) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum::<f64>();
    (f(0.0) + inner + f(x)) * h / 3.0 * 2.0 / std::f64::consts::PI.sqrt()
}

fn numbers(seed: u64, n: usize, size: f32) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-size..size)).collect()
}

/// CUDA's functions in f32 against those of f64: a few units in the last place, or what the fast ones promise.
#[cfg_attr(not(cuda_compilers), ignore = "needs the CUDA compilers: make cuda-proof")]
#[test]
fn functions_of_cuda() {
    type Function = fn(f64, f64) -> f64;
    let functions: [(&str, Function, f64); 21] = [
        ("expf", |a, _| a.exp(), 3e-7),
        ("__expf", |a, _| a.exp(), 2e-6),
        ("exp2f", |a, _| a.exp2(), 3e-7),
        ("logf", |a, _| a.abs().ln(), 3e-7),
        ("__logf", |a, _| a.abs().ln(), 1e-6),
        ("log1pf", |a, _| a.abs().ln_1p(), 3e-7),
        ("expm1f", |a, _| a.exp_m1(), 3e-7),
        ("erff", |a, _| erf(a), 3e-7),
        ("tanhf", |a, _| a.tanh(), 3e-7),
        ("sqrtf", |a, _| a.abs().sqrt(), 6e-8),
        ("rsqrtf", |a, _| 1.0 / a.abs().sqrt(), 2e-7),
        ("a / b", |a, b| a / b, 6e-8),
        ("1 / a", |a, _| 1.0 / a, 6e-8),
        ("__fdividef", |a, b| a / b, 2e-7),
        ("powf", |a, _| a.abs().powf(f64::from(0.7f32)), 6e-7),
        ("sinf", |a, _| a.sin(), 3e-7),
        ("cosf", |a, _| a.cos(), 3e-7),
        ("__sinf", |a, _| a.sin(), 1e-6),
        ("fmodf", |a, _| a % f64::from(1.7f32), 6e-8),
        ("silu", |a, _| a / (1.0 + (-a).exp()), 5e-6),
        ("gelu", |a, _| 0.5 * a * (1.0 + erf(a * std::f64::consts::FRAC_1_SQRT_2)), 5e-6),
    ];
    let (x, y) = (numbers(1, 500, 10.0), numbers(2, 500, 10.0));
    for architecture in ARCHITECTURES {
        let module = module(NUMBERS, architecture);
        let table = rows(&module, "functions", (x.bytes(), y.bytes()), (500, functions.len()), f32s);
        for ((name, function, tolerance), row) in functions.iter().zip(table) {
            for ((a, b), value) in x.iter().zip(&y).zip(row) {
                let expected = function(f64::from(*a), f64::from(*b));
                // Near a zero of the function, the error is that of numbers around one.
                let error = (f64::from(value) - expected).abs() / expected.abs().max(0.05);
                assert!(error <= *tolerance, "sm_{architecture} {name}({a}, {b}): {value}, expected {expected}");
            }
        }
    }
}

#[cfg_attr(not(cuda_compilers), ignore = "needs the CUDA compilers: make cuda-proof")]
#[test]
fn exact_arithmetic_of_cuda() {
    type Function = fn(f32, f32) -> f32;
    let functions: [(&str, Function); 20] = [
        ("a + b", |a, b| a + b),
        ("a b - 1.5", |a, b| a.mul_add(b, -1.5)),
        ("fmaxf", f32::max),
        ("fminf", f32::min),
        ("rintf", |a, _| a.round_ties_even()),
        ("floorf", |a, _| a.floor()),
        ("ceilf", |a, _| a.ceil()),
        ("truncf", |a, _| a.trunc()),
        ("copysignf", f32::copysign),
        ("fmaf", |a, b| a.mul_add(b, a)),
        ("__frcp_rn", |a, _| 1.0 / a),
        ("__fsqrt_rn", |a, _| a.abs().sqrt()),
        ("__saturatef", |a, _| a.clamp(0.0, 1.0)),
        ("__float2int_rn", |a, _| a.round_ties_even() as i32 as f32),
        ("int", |a, _| a as i32 as f32),
        ("unsigned", |a, _| a.abs() as u32 as f32),
        ("bits", |a, _| -a),
        ("double", |a, b| (f64::from(a) / f64::from(b)) as f32),
        ("signed char", |a, _| f32::from(a as i32 as i8)),
        ("isfinite", |_, _| 2.0),
    ];
    let (x, y) = (numbers(3, 500, 300.0), numbers(4, 500, 3.0));
    for architecture in ARCHITECTURES {
        let module = module(NUMBERS, architecture);
        let table = rows(&module, "exact", (x.bytes(), y.bytes()), (500, functions.len()), f32s);
        for ((name, function), row) in functions.iter().zip(table) {
            for ((a, b), value) in x.iter().zip(&y).zip(row) {
                assert_eq!(value, function(*a, *b), "sm_{architecture} {name}({a}, {b})");
            }
        }
    }
}

#[cfg_attr(not(cuda_compilers), ignore = "needs the CUDA compilers: make cuda-proof")]
#[test]
fn integers_of_cuda() {
    type Function = fn(i32, i32) -> i32;
    let functions: [(&str, Function); 28] = [
        ("a / b", |a, b| a / b),
        ("a % b", |a, b| a % b),
        ("p / q", |a, b| (a as u32 / b as u32) as i32),
        ("p % q", |a, b| (a as u32 % b as u32) as i32),
        ("a / 7", |a, _| a / 7),
        ("p % 10", |a, _| (a as u32 % 10) as i32),
        ("a >> b", |a, b| a >> (b & 31)),
        ("p >> b", |a, b| (a as u32 >> (b & 31)) as i32),
        ("a << b", |a, b| a << (b & 31)),
        ("min", |a, b| a.min(b)),
        ("max", |a, b| (a as u32).max(b as u32) as i32),
        ("abs", |a, _| a.abs()),
        ("popc", |a, _| a.count_ones() as i32),
        ("clz", |a, _| a.leading_zeros() as i32),
        ("ffs", |a, _| a.trailing_zeros() as i32 + 1),
        ("brev", |a, _| a.reverse_bits()),
        ("byte_perm", |a, b| {
            let bytes = [a.to_le_bytes(), b.to_le_bytes()].concat();
            i32::from_le_bytes([bytes[5], bytes[1], bytes[7], bytes[3]])
        }),
        ("mulhi", |a, b| ((i64::from(a) * i64::from(b)) >> 32) as i32),
        ("product", |a, b| ((i64::from(a) * i64::from(b)) >> 20) as i32),
        ("remainder", |a, b| (u64::from(a as u32) * u64::from(b as u32) % 1_000_003) as i32),
        ("quotient", |a, b| ((i64::from(a) << 20) / i64::from(b)) as i32),
        ("bytes", |a, b| i32::from(a as i8) + i32::from(b as u8)),
        ("field", |a, _| a << 20 >> 28),
        ("logic", |a, b| (a & b) | (!a & 0x0f0f_0f0f) ^ b),
        ("funnel", |a, b| (b << 9) | (a as u32 >> 23) as i32),
        ("dp4a", |a, b| {
            let products = a.to_le_bytes().into_iter().zip(b.to_le_bytes()).map(|(a, b)| (a as i8, b as i8));
            17 + products.map(|(a, b)| i32::from(a) * i32::from(b)).sum::<i32>()
        }),
        ("and", |a, b| if a < b && a as u32 > b as u32 { 3 } else { 4 }),
        ("signs", |a, b| i32::from(a > 0) + i32::from(b > 0) * 2),
    ];
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let x: Vec<i32> = (0..500).map(|at| rng.random::<i32>() >> (at % 20)).collect();
    let y: Vec<i32> = (0..500).map(|at| (rng.random::<i32>() >> (at % 17)) | 1).collect();
    for architecture in ARCHITECTURES {
        let module = module(NUMBERS, architecture);
        let table = rows(&module, "integers", (x.bytes(), y.bytes()), (500, functions.len()), i32s);
        for ((name, function), row) in functions.iter().zip(table) {
            for ((a, b), value) in x.iter().zip(&y).zip(row) {
                assert_eq!(value, function(*a, *b), "sm_{architecture} {name}({a}, {b})");
            }
        }
    }
}

#[cfg_attr(not(cuda_compilers), ignore = "needs the CUDA compilers: make cuda-proof")]
#[test]
fn halves_of_cuda() {
    // Products and sums of halves are exact in f64, and so is the fused product for numbers of this size.
    type Function = fn(f64, f64) -> u16;
    let functions: [(&str, Function); 11] = [
        ("add", |a, b| to_f16(a + b)),
        ("mul", |a, b| to_f16(a * b)),
        ("fma", |a, b| to_f16(a.mul_add(b, a))),
        ("add2", |a, b| to_f16(a + b)),
        ("mul2", |a, b| to_f16(b * a)),
        ("fma2", |a, b| to_f16(b.mul_add(a, b))),
        ("from float", |a, _| f16::from_f32(a as f32 * 1.37).to_bits()),
        ("from floats", |_, b| f16::from_f32(b as f32 + 0.1).to_bits()),
        ("max", |a, b| to_f16(a.max(b))),
        ("bf16", |a, _| bf16::from_f32(a as f32).to_bits()),
        ("bf16 product", |a, _| bf16::from_f32(bf16::from_f32(a as f32).to_f32() * 3.0).to_bits()),
    ];
    let of = |seed| numbers(seed, 500, 8.0).into_iter().map(f16::from_f32).collect::<Vec<_>>();
    let (x, y) = (of(6), of(7));
    for architecture in ARCHITECTURES {
        let module = module(NUMBERS, architecture);
        let table = rows(&module, "halves", (x.bytes(), y.bytes()), (500, functions.len()), u16s);
        for ((name, function), row) in functions.iter().zip(table) {
            for ((a, b), value) in x.iter().zip(&y).zip(row) {
                assert_eq!(value, function(a.to_f64(), b.to_f64()), "sm_{architecture} {name}({a}, {b})");
            }
        }
    }
}

/// The nearest half, found by trying: independent of how the interpreter rounds.
fn to_f16(x: f64) -> u16 {
    let near = f16::from_f32(x as f32).to_bits();
    let all = [near.wrapping_sub(1), near, near.wrapping_add(1)];
    let distance = |bits: &u16| {
        let y = f16::from_bits(*bits).to_f64();
        if y.is_nan() { f64::INFINITY } else { (y - x).abs() }
    };
    // Of two at the same distance, the even one.
    all.into_iter().min_by(|a, b| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1)))).unwrap_or(near)
}

#[cfg_attr(not(cuda_compilers), ignore = "needs the CUDA compilers: make cuda-proof")]
#[test]
fn blocks_of_cuda() {
    for architecture in ARCHITECTURES {
        let module = module(THREADS, architecture);
        let x: Vec<f32> = (0..10_003).map(|at| (at % 7) as f32).collect();
        let mut memory = Memory::new();
        let (input, out) = (memory.add(&x.bytes()), memory.add(&[0; 4]));
        let arguments = [Arg::U64(input), Arg::U64(out), Arg::U32(x.len() as u32)];
        launch(&module, &mut memory, "reduce", [4, 1], [256, 1], &arguments);
        assert_eq!(memory.f32s(out), [x.iter().sum::<f32>()], "sm_{architecture}");

        let n = 48;
        let (a, b) = (numbers(8, n * n, 1.0), numbers(9, n * n, 1.0));
        let (a_at, b_at, c) = (memory.add(&a.bytes()), memory.add(&b.bytes()), memory.add_unwritten(4 * n * n));
        let arguments = [Arg::U64(a_at), Arg::U64(b_at), Arg::U64(c), Arg::U32(n as u32)];
        launch(&module, &mut memory, "product", [3, 3], [16, 16], &arguments);
        for (at, value) in memory.f32s(c).into_iter().enumerate() {
            let sum = (0..n).fold(0f32, |sum, k| a[at / n * n + k].mul_add(b[k * n + at % n], sum));
            assert_eq!(value, sum, "sm_{architecture} {at}");
        }

        let (n, x) = (100, numbers(10, 300, 5.0));
        let (input, out) = (memory.add(&x.bytes()), memory.add_unwritten(1200));
        let arguments = [Arg::U64(input), Arg::U64(out), Arg::U32(n as u32)];
        launch_shared(&module, &mut memory, "softmax", [3, 1], [32, 1], 4 * n, &arguments).unwrap();
        for (row, values) in x.chunks_exact(n).zip(memory.f32s(out).chunks_exact(n)) {
            let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
            for (x, value) in row.iter().zip(values) {
                assert!((f64::from(*value) - f64::from(*x).exp() / sum).abs() < 1e-7);
            }
        }
        let short = launch_shared(&module, &mut memory, "softmax", [3, 1], [32, 1], 4 * n - 4, &arguments).unwrap_err();
        assert!(matches!(short.fault(), Some(Fault::OutOfBounds { .. })), "{short}");
    }
}

#[cfg_attr(not(cuda_compilers), ignore = "needs the CUDA compilers: make cuda-proof")]
#[test]
fn structures_calls_tables_and_atomics_of_cuda() {
    let table = [1f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.5];
    let (terms, scale, small, middle, offsets) = (11, 0.5f32, -7i8, 300i16, [0.5f32, 1.0, 1.5, 2.0, 2.5]);
    let values = numbers(11, 16, 10.0);
    for architecture in ARCHITECTURES {
        let module = module(THREADS, architecture);
        let mut memory = Memory::new();
        let of_values = memory.add(&values.bytes());
        let mut settings = Vec::new();
        settings.extend(i32::to_le_bytes(terms));
        settings.extend(scale.to_le_bytes());
        settings.extend(of_values.to_le_bytes());
        settings.extend(small.to_le_bytes());
        settings.push(0);
        settings.extend(middle.to_le_bytes());
        settings.extend(offsets.bytes());
        for which in 0..7 {
            let (out, counts) = (memory.add_unwritten(4 * 64), memory.add(&[0; 4 * 71]));
            let arguments = [Arg::Bytes(settings.clone()), Arg::U64(out), Arg::U64(counts), Arg::I32(which)];
            launch(&module, &mut memory, "mixture", [1, 1], [64, 1], &arguments);
            for (i, value) in memory.f32s(out).into_iter().enumerate() {
                let x = values[(i * which as usize) & 15] * scale * 0.01;
                let sum = (0..terms).fold(0f32, |sum, at| sum.mul_add(x, table[at as usize & 7]));
                let y = sum + offsets[i % 5] + f32::from(small) + f32::from(middle);
                let expected = [y + 1.0, y * 2.0, y - 3.0, y * y, -y, y + i as f32, 0.0][which as usize];
                assert!(
                    (value - expected).abs() <= expected.abs() * 1e-6,
                    "sm_{architecture} {which} {i}: {value} {expected}"
                );
            }
            let counts: Vec<i32> = memory.words(counts).into_iter().map(|word| word as i32).collect();
            let counter = 5 + 64 * (which + 1);
            assert_eq!(counts[..7], [64, 63, -63, -1, 77, 1, counter], "sm_{architecture} {which}");
            assert_eq!(counts[7..], [22; 64]);
        }
    }
}

#[cfg_attr(not(cuda_compilers), ignore = "needs the CUDA compilers: make cuda-proof")]
#[test]
fn warps_of_cuda() {
    let x: Vec<i32> = (0..64).map(|at| at * 37 % 101).collect();
    for architecture in ARCHITECTURES {
        let module = module(THREADS, architecture);
        let mut memory = Memory::new();
        let (input, out) = (memory.add(&x.bytes()), memory.add_unwritten(4 * 64 * 12));
        launch(&module, &mut memory, "lanes", [1, 1], [64, 1], &[Arg::U64(input), Arg::U64(out)]);
        let words = memory.words(out);
        for (i, row) in words.chunks_exact(12).enumerate() {
            let (lane, warp) = (i % 32, &x[i / 32 * 32..][..32]);
            let moved = |lane: usize| if lane < 15 { warp[lane + 1] } else { warp[lane] };
            let ballot = (0..32).fold(0u32, |all, at| all | u32::from(warp[at] > 50) << at);
            let expected = [
                warp[3],
                warp[lane ^ 5],
                if lane >= 2 { warp[lane - 2] } else { warp[lane] },
                if lane < 25 { warp[lane + 7] } else { warp[lane] },
                warp[lane / 16 * 16 + lane * 3 % 16],
                warp[lane ^ 1],
                ballot as i32,
                i32::from(warp.iter().any(|x| *x > 98)) + 2,
                moved(lane),
                moved(lane ^ 1),
                moved(lane ^ 16),
                x[lane / 4 * 4..][..4].iter().sum(),
            ];
            assert_eq!(row, expected.map(|x| x as u32), "sm_{architecture} thread {i}");
        }
    }
}

/// What differs from Rust in the results of matrices.cu.
fn check_matrices(module: &Module) -> Result<(), String> {
    let said = |error: Error| error.to_string();
    let mut memory = Memory::new();
    let (m, n, k) = (40, 20, 48);
    // Small whole numbers, so that every sum is exact.
    let mut rng = ChaCha8Rng::seed_from_u64(12);
    let mut whole = |len: usize| (0..len).map(|_| rng.random_range(-8i8..=8)).collect::<Vec<_>>();
    let halves = |numbers: &[i8]| numbers.iter().map(|x| f16::from_f32(f32::from(*x))).collect::<Vec<_>>().bytes();
    let differs = |name: &str, values: &[f32], expected: &dyn Fn(usize) -> i32| {
        let wrong = values.iter().enumerate().find(|(at, value)| **value != expected(*at) as f32);
        wrong.map_or(Ok(()), |(at, value)| Err(format!("{name}, element {at}: {value}, expected {}", expected(at))))
    };

    let (a, b) = (whole(m * k), whole(n * k));
    let (a_at, b_at, c) = (memory.add(&halves(&a)), memory.add(&halves(&b)), memory.add_unwritten(4 * m * n));
    let sizes = [m, n, k].map(|size| Arg::U32(size as u32));
    let arguments = [vec![Arg::U64(a_at), Arg::U64(b_at), Arg::U64(c)], sizes.to_vec()].concat();
    launch_shared(module, &mut memory, "product_f16", [3, 3], [32, 1], 0, &arguments).map_err(said)?;
    let sum = |at: usize| (0..k).map(|l| i32::from(a[at / n * k + l]) * i32::from(b[at % n * k + l])).sum::<i32>();
    differs("product_f16", &memory.f32s(c), &sum)?;

    let (a, b) = (whole(256), whole(128));
    let (a_at, b_at, c) = (memory.add(&halves(&a)), memory.add(&halves(&b)), memory.add_unwritten(4 * 128));
    let arguments = [a_at, b_at, c].map(Arg::U64);
    launch_shared(module, &mut memory, "product_turned", [1, 1], [32, 1], 0, &arguments).map_err(said)?;
    let sum = |at: usize| {
        let (row, column) = (at / 8, at % 8);
        let products = (0..16).map(|l| i32::from(a[l * 16 + row]) * i32::from(b[l * 8 + column]));
        products.sum::<i32>() + 1 + (row / 8 * 2 + column % 2) as i32
    };
    differs("product_turned", &memory.f32s(c), &sum)?;

    let (m, n, k) = (32, 16, 96);
    let (a, b) = (whole(m * k), whole(n * k));
    let (a_at, b_at, c) = (memory.add(&a.bytes()), memory.add(&b.bytes()), memory.add_unwritten(4 * m * n));
    let arguments = [Arg::U64(a_at), Arg::U64(b_at), Arg::U64(c), Arg::U32(n as u32), Arg::U32(k as u32)];
    launch_shared(module, &mut memory, "product_s8", [2, 2], [32, 1], 0, &arguments).map_err(said)?;
    let sum = |at: usize| {
        let (row, column) = (at / n, at % n);
        let products = (0..k).map(|l| i32::from(a[row * k + l]) * i32::from(b[column * k + l]));
        products.sum::<i32>() + 1000 * (1 + row / 8 % 2 * 2 + column % 2) as i32
    };
    let values: Vec<f32> = memory.words(c).into_iter().map(|word| word as i32 as f32).collect();
    differs("product_s8", &values, &sum)
}

#[cfg_attr(not(cuda_compilers), ignore = "needs the CUDA compilers: make cuda-proof")]
#[test]
fn matrices_of_cuda() {
    check_matrices(&module(MATRICES, 87)).unwrap();
    assert!(module(MATRICES, 72).kernels().is_empty());
}

/// Errors that compile. Each changes the header or the kernels at one place.
#[cfg_attr(not(cuda_compilers), ignore = "needs the CUDA compilers: make cuda-proof")]
#[test]
fn planted_errors_are_caught() {
    let errors = [
        ("rows of A swapped", "{%4, %5, %6, %7}", "{%5, %4, %6, %7}"),
        ("halves of A swapped", "{%4, %5, %6, %7}", "{%4, %6, %5, %7}"),
        ("registers of B swapped", "{%8, %9}", "{%9, %8}"),
        ("results swapped", "{%0, %1, %2, %3}, {%4", "{%1, %0, %2, %3}, {%4"),
        ("the sum not passed on", "\"{%0, %1, %2, %3};\"", "\"{%0, %1, %2, %2};\""),
        ("halves as bf16", "f32.f16.f16.f32", "f32.bf16.bf16.f32"),
        ("bytes without sign", "s32.s8.s8.s32", "s32.u8.s8.s32"),
        ("matrices in the wrong order", "x4.shared.b16 {%0, %1, %2, %3}", "x4.shared.b16 {%0, %2, %1, %3}"),
        ("two matrices in the wrong order", "x2.shared.b16 {%0, %1}", "x2.shared.b16 {%1, %0}"),
        ("transposed without need", "m8n8.x4.shared", "m8n8.x4.trans.shared"),
        ("not transposed", "m8n8.x2.trans.shared", "m8n8.x2.shared"),
        ("four, not transposed", "m8n8.x4.trans.shared", "m8n8.x4.shared"),
        ("copy of a part", "[%0], [%1], 16, %2", "[%0], [%1], 8, %2"),
        ("copy of everything", "ok ? 16 : 0", "16"),
        ("copy of nothing", "ok ? 16 : 0", "ok ? 0 : 16"),
        ("a generic address", "(uint32_t)__cvta_generic_to_shared(pointer)", "(uint32_t)(uint64_t)pointer"),
        ("waits for one group less", "cp.async.wait_group %0;", "cp.async.wait_group 2;"),
        ("groups without an end", "cp.async.commit_group;", ""),
        ("no wait", "cp_async_wait<1>();", ""),
        ("no barrier after the copy", "wait<1>();\n        __syncthreads();", "wait<1>();"),
        ("no barrier before the next copy", "fb);\n        __syncthreads();", "fb);"),
        ("a wrong row for a lane", "[lane % 16][lane / 16 * 8]", "[lane / 2][lane % 2 * 8]"),
        ("a wrong row for B", "[lane % 8][lane / 8 % 2 * 8]", "[lane % 8][0]"),
    ];
    for (name, from, to) in errors {
        let (header, source) = (header(), MATRICES.to_owned());
        assert!(header.contains(from) || source.contains(from), "{name}: `{from}` is not there any more");
        let ptx = ptx_of(&source.replace(from, to), header.replace(from, to), 87);
        let result = match Module::parse(&ptx) {
            Ok(module) => check_matrices(&module),
            Err(error) => Err(error.to_string()),
        };
        println!("{name}: {}", result.as_ref().err().map_or("NOT CAUGHT", |error| error));
        assert!(result.is_err(), "{name}: not caught");
    }
}
