//! Every operation of the CPU device, on every instruction set, against its definition.
#![allow(missing_docs)]

mod suite;

use candor_kernels::cpu::CpuDevice;
use candor_kernels::{Activation, Device};
use suite::{TYPES, test};

/// Every device of this machine.
fn devices() -> Vec<CpuDevice> {
    let devices: Vec<CpuDevice> = CpuDevice::levels()
        .into_iter()
        .filter_map(|level| CpuDevice::with_level(Some(3), level))
        .map(CpuDevice::exact)
        .collect();
    assert!(!devices.is_empty());
    devices
}

macro_rules! on_every_level {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            devices().iter().for_each(suite::$name);
        }
    )*};
}

on_every_level! {
    buffers embed linear norms activations elementwise positions softmax_rows rope attention unfold depthwise groups
    bilinear log_mel several_at_once pictures
}

macro_rules! choices {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            suite::choice::$name(&CpuDevice::new(Some(1)));
        }
    )*};
}

choices! { choices equal_logits shares_of_a_large_vocabulary choices_refuse }

/// To the bit where activations are not rounded, and elsewhere for views that begin and end at multiples of 16 rows: the last
/// few rows of a product of bytes are summed another way than those that come in fours.
#[test]
fn rows_of_a_weight_are_a_weight() {
    let in_bytes = CpuDevice::levels().into_iter().filter_map(|level| CpuDevice::with_level(Some(3), level));
    let whole_blocks = &[(0, 150), (0, 16), (16, 64), (112, 38), (144, 6)][..];
    let any = &[(0, 150), (0, 1), (149, 1), (17, 70), (8, 64)][..];
    let exact = devices().into_iter().map(|device| (device, any));
    for (device, views) in exact.chain(in_bytes.map(|device| (device, whole_blocks))) {
        let mut t = test(&device);
        for dtype in TYPES {
            let (outputs, depth) = (150, 192);
            let (weight, _) = t.weight(dtype, &[outputs, depth]);
            for rows in [1, 3, 40] {
                let x = t.numbers(rows * depth);
                let x = t.buffer(&x);
                let product = |weight: &_, outputs: usize| {
                    let (mut out, mut values) = (t.output(rows * outputs), vec![0.0; rows * outputs]);
                    device.linear(&x, rows, weight, None, Activation::Identity, &mut out).expect("fits");
                    device.read(&out, 0, &mut values).expect("long enough");
                    values
                };
                let whole = product(&weight, outputs);
                for &(first, count) in views {
                    let view = device.weight_rows(&weight, first, count).expect("they are there");
                    let expected: Vec<f32> =
                        whole.chunks_exact(outputs).flat_map(|row| row[first..first + count].to_vec()).collect();
                    assert_eq!(product(&view, count), expected, "{dtype} {rows} {first} {count} {}", device.describe());
                }
            }
            for (first, count) in [(0, 151), (150, 1), (usize::MAX, 1), (1, usize::MAX)] {
                assert!(device.weight_rows(&weight, first, count).is_err(), "{first} {count}");
            }
        }
    }
}
