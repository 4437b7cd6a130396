//! Attention over bytes and over caches of the CPU device, on every instruction set.
#![allow(missing_docs)]

mod suite;

use candor_kernels::cpu::CpuDevice;
use candor_kernels::{Device, Rounding};
use suite::attention::{ALLOWED, Hardness, SHAPES, buffer, expected, input, shape, worst};

fn devices() -> Vec<CpuDevice> {
    CpuDevice::levels().into_iter().filter_map(|level| CpuDevice::with_level(Some(3), level)).collect()
}

#[test]
fn bytes_are_near_the_definition() {
    for (number, sizes) in SHAPES.into_iter().enumerate() {
        let shape = shape(sizes, Rounding::Bytes);
        for hardness in [Hardness::Plain, Hardness::Outliers, Hardness::Dominant, Hardness::Equal] {
            let input = input(number as u64, hardness, shape);
            let (expected, size) = expected(&input);
            let mut of_levels = Vec::new();
            for device in devices() {
                let (q, k, v) = (buffer(&device, &input.q), buffer(&device, &input.k), buffer(&device, &input.v));
                let mut out = device.allocate(expected.len()).expect("memory");
                device.attention(&q, &k, &v, shape, &mut out).expect("a good shape");
                let error = worst(&device, &out, &expected) / size;
                assert!(error < ALLOWED, "{} {hardness:?} {shape:?}: {error}", device.describe());
                let mut values = vec![0.0; expected.len()];
                device.read(&out, 0, &mut values).expect("it fits");
                of_levels.push(values);
            }
            // The integers are the same on every level, so the levels differ by the rounding of sums only.
            for values in &of_levels[1..] {
                let apart = values.iter().zip(&of_levels[0]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(apart < 1e-4, "{hardness:?} {shape:?}: {apart}");
            }
        }
    }
}

#[test]
fn caches_are_near_the_definition_however_they_are_filled() {
    devices().iter().for_each(suite::attention::caches_are_near_the_definition_however_they_are_filled);
}

#[test]
fn caches_refuse_what_they_cannot_hold() {
    suite::attention::caches_refuse_what_they_cannot_hold(&CpuDevice::new(Some(1)));
}
