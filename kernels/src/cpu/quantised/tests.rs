use super::*;
use crate::scales::Scales;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// A weight of random codes, the extremes among them, and random scales of one of the types they are stored as.
fn weight(rng: &mut ChaCha8Rng, dtype: DType, outputs: usize, depth: usize, group: Option<usize>) -> HostTensor {
    let row_bytes = dtype.row_bytes(depth).expect("small");
    let bytes: Vec<u8> = (0..outputs * row_bytes)
        .map(|_| match rng.random_range(0..8) {
            0 => 0x80,
            1 => 0x7f,
            _ => rng.random(),
        })
        .collect();
    let mut scale = || half::f16::from_f32(rng.random_range(0.001..0.01)).to_f32();
    let scales = match group {
        None => Scales::rows((0..outputs).map(|_| scale()).collect::<Vec<_>>()),
        Some(group) => {
            let per_row = depth.div_ceil(group);
            let values: Vec<f32> = (0..outputs * per_row).map(|_| scale()).collect();
            match outputs % 3 {
                0 => Scales::groups_from_f32(values, group, outputs).expect("a good group"),
                kind => {
                    let (stored, bits): (DType, Vec<u16>) = match kind {
                        1 => (DType::F16, values.iter().map(|&v| half::f16::from_f32(v).to_bits()).collect()),
                        _ => (DType::BF16, values.iter().map(|&v| half::bf16::from_f32(v).to_bits()).collect()),
                    };
                    // As bytes of an aligned allocation.
                    let singles: Vec<f32> = bits
                        .chunks(2)
                        .map(|b| f32::from_bits(u32::from(b[0]) | u32::from(b.get(1).copied().unwrap_or(0)) << 16))
                        .collect();
                    let bytes = crate::tensor::owned_f32(singles);
                    Scales::groups(bytes, 0, stored, group, outputs, per_row).expect("a good group")
                }
            }
        }
    };
    let len = bytes.len();
    HostTensor::new(Arc::new(bytes), 0, len, dtype, vec![outputs, depth], Some(scales)).expect("a good weight")
}

/// Activations with outliers, a block of zeros where there is room, and tiny values.
fn activations(rng: &mut ChaCha8Rng, rows: usize, depth: usize) -> Vec<f32> {
    let mut x: Vec<f32> = (0..rows * depth)
        .map(|_| match rng.random_range(0..50) {
            0 => rng.random_range(-100.0..100.0),
            1 => 0.0,
            _ => rng.random_range(-1.0..1.0),
        })
        .collect();
    for row in x.chunks_exact_mut(depth) {
        if depth > 2 * BLOCK {
            row[BLOCK..2 * BLOCK].fill(0.0);
        }
    }
    x
}

#[test]
fn every_level_shape_and_type_matches_the_definition() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let shapes =
        [(1, 1), (3, 7), (4, 32), (5, 96), (49, 128), (48, 129), (17, 200), (96, 256), (50, 333), (7, 896), (131, 300)];
    for (outputs, depth) in shapes {
        for dtype in [DType::I4, DType::I8] {
            for group in [None, Some(32), Some(64), Some(128)] {
                let tensor = weight(&mut rng, dtype, outputs, depth, group);
                for rows in [1, 2, 5, DOT_ROWS, DOT_ROWS + 1, 19, 300] {
                    if rows == 300 && depth != 200 {
                        continue;
                    }
                    let x = activations(&mut rng, rows, depth);
                    let expected = plain::linear(&x, rows, &tensor);
                    let most = expected.iter().fold(1e-3, |most: f64, v| most.max(v.abs()));
                    for threads in [1, 3] {
                        let pool = ThreadPool::new(Some(threads));
                        for level in Level::all() {
                            let codes = Codes::of(&tensor).expect("integers");
                            let mut out = vec![f32::NAN; rows * outputs];
                            linear(level, &pool, &x, rows, &[Layer::new(codes, None, Activation::Identity, &mut out)]);
                            for (i, (out, expected)) in out.iter().zip(&expected).enumerate() {
                                let error = (f64::from(*out) - expected).abs() / most;
                                let about = format!("{level:?} {dtype} {group:?} {rows}x{outputs}x{depth} at {i}");
                                assert!(error < 2e-6, "{about}: {out} is not {expected}");
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn bias_and_activation_come_after_the_product() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for rows in [1, 20] {
        let tensor = weight(&mut rng, DType::I4, 60, 64, Some(32));
        let x = activations(&mut rng, rows, 64);
        let bias: Vec<f32> = (0..60).map(|_| rng.random_range(-9.0..9.0)).collect();
        let expected = plain::linear(&x, rows, &tensor);
        for level in Level::all() {
            let pool = ThreadPool::new(Some(2));
            let mut out = vec![0.0; rows * 60];
            let codes = Codes::of(&tensor).expect("integers");
            linear(level, &pool, &x, rows, &[Layer::new(codes, Some(&bias), Activation::Relu, &mut out)]);
            for (i, out) in out.iter().enumerate() {
                let expected = (expected[i] + f64::from(bias[i % 60])).max(0.0);
                assert!((f64::from(*out) - expected).abs() < 1e-4, "{level:?}: {out} is not {expected}");
            }
        }
    }
}

#[test]
fn what_is_no_number_stays_none() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let tensor = weight(&mut rng, DType::I8, 5, 300, Some(64));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for rows in [2, 12] {
            for level in Level::all() {
                let mut x = activations(&mut rng, rows, 300);
                x[299] = bad;
                let mut out = vec![0.0; rows * 5];
                let codes = Codes::of(&tensor).expect("integers");
                let layer = Layer::new(codes, None, Activation::Identity, &mut out);
                linear(level, &ThreadPool::new(Some(1)), &x, rows, &[layer]);
                assert!(out[..5].iter().all(|v| v.is_nan()), "{level:?} {bad}: {out:?}");
                assert!(out[5..].iter().all(|v| v.is_finite()), "{level:?} {bad}: {out:?}");
            }
        }
    }
}
