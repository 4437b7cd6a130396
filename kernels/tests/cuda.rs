//! Every operation of the CUDA device, on the stand-in driver, against its definition and against the CPU device.
#![allow(missing_docs)]
#![cfg(not(target_feature = "crt-static"))] // those are cross builds, whose programs the host's compiler cannot make

mod stand_in;
mod suite;

use candor_kernels::cpu::CpuDevice;
use candor_kernels::{Activation, DType, Device, HostTensor, Scales};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The definitions alone, then what is used for speed.
macro_rules! on_the_gpu {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            suite::$name(&stand_in::device().exact());
        }
    )*};
}

on_the_gpu! {
    buffers embed linear norms activations elementwise positions softmax_rows rope attention unfold depthwise groups
    bilinear several_at_once
}

#[test]
fn caches_are_near_the_definition_however_they_are_filled() {
    suite::attention::caches_are_near_the_definition_however_they_are_filled(&stand_in::device());
}

#[test]
fn rounded_attention_is_near_the_definition() {
    suite::attention::rounded_attention_is_near_the_definition(&stand_in::device());
}

#[test]
fn caches_refuse_what_they_cannot_hold() {
    suite::attention::caches_refuse_what_they_cannot_hold(&stand_in::device());
}

macro_rules! choices {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            suite::choice::$name(&stand_in::device());
        }
    )*};
}

choices! { choices equal_logits shares_of_a_large_vocabulary choices_refuse }

/// As above, by the kernels that are used for speed.
#[test]
fn several_at_once_and_fast() {
    suite::several_at_once(&stand_in::device());
}

/// Products of activations in f32, whatever rows a weight is read in.
#[test]
fn layers_in_f32_f16_and_bf16() {
    suite::linear_of(&stand_in::device(), &[DType::F32, DType::F16, DType::BF16]);
}

/// Four- or eight-bit codes with scales for each `group` elements of a row, or for all of it.
fn quantised(random: &mut ChaCha8Rng, dtype: DType, rows: usize, depth: usize, group: Option<usize>) -> HostTensor {
    let bytes: Vec<u8> = (0..rows * dtype.row_bytes(depth).expect("small")).map(|_| random.random()).collect();
    let count = rows * group.map_or(1, |group| depth.div_ceil(group));
    let scales: Vec<f32> = (0..count).map(|_| random.random_range(0.01..0.03)).collect();
    let scales = match group {
        Some(group) => Scales::groups_from_f32(scales, group, rows).expect("a good group"),
        None => Scales::rows(scales),
    };
    let len = bytes.len();
    HostTensor::new(std::sync::Arc::new(bytes), 0, len, dtype, vec![rows, depth], Some(scales)).expect("a good tensor")
}

fn read<D: Device>(device: &D, buffer: &D::Buffer, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    device.read(buffer, 0, &mut values).expect("long enough");
    values
}

/// Activations become the same bytes as on the CPU, and products of integers are exact, so that only the rounding of f32 sums
/// differs. Views begin at odd addresses.
#[test]
fn quantised_layers_are_those_of_the_cpu() {
    let (gpu, cpu) = (stand_in::device(), CpuDevice::with_level(Some(1), "portable").expect("it is always there"));
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let shapes =
        [(1, 5, 128), (1, 33, 40), (2, 7, 896), (5, 70, 131), (8, 9, 257), (9, 65, 96), (40, 130, 320), (70, 3, 33)];
    for (rows, outputs, depth) in shapes {
        for (dtype, group) in [
            (DType::I4, Some(32)),
            (DType::I4, Some(64)),
            (DType::I4, Some(128)),
            (DType::I4, None),
            (DType::I8, Some(32)),
            (DType::I8, None),
        ] {
            let tensors = [outputs + 3, outputs].map(|rows| quantised(&mut random, dtype, rows, depth, group));
            let bias = HostTensor::from_f32(&vec![0.5; outputs], &[outputs]).expect("a good tensor");
            let x: Vec<f32> = (0..rows * depth).map(|_| random.random_range(-1.0..1.0)).collect();
            let of_gpu = both(&gpu, &x, rows, &tensors, &bias, outputs);
            let of_cpu = both(&cpu, &x, rows, &tensors, &bias, outputs);
            for (kernel, (ours, theirs)) in of_gpu.iter().zip(&of_cpu).enumerate() {
                let size = theirs.iter().fold(1.0f32, |size, value| size.max(value.abs()));
                for (i, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                    let what = format!("{rows}x{outputs}x{depth} {dtype} {group:?} layer {kernel} element {i}");
                    assert!((ours - theirs).abs() < 1e-5 * size, "{what}: {ours}, not {theirs}");
                }
            }
        }
    }
}

/// A layer of some rows of the first weight and one of the second, computed at once, and the two as a gated pair.
fn both<D: Device>(
    device: &D,
    x: &[f32],
    rows: usize,
    tensors: &[HostTensor; 2],
    bias: &HostTensor,
    outputs: usize,
) -> [Vec<f32>; 3] {
    let mut input = device.allocate(x.len()).expect("memory");
    device.write(x, &mut input, 0).expect("fits");
    let [first, second] = [&tensors[0], &tensors[1]].map(|tensor| device.weight(tensor).expect("a good tensor"));
    let first = device.weight_rows(&first, 3, outputs).expect("they are there");
    let bias = device.weight(bias).expect("a good tensor");
    let len = rows * outputs;
    let [mut a, mut b, mut c] = [(); 3].map(|()| device.allocate(len).expect("memory"));
    let layers = [(&first, Some(&bias), Activation::GeluTanh), (&second, None, Activation::Identity)];
    device.linear_each(&input, rows, &layers, &mut [&mut a, &mut b]).expect("fits");
    let at_once = [read(device, &a, len), read(device, &b, len)];
    device.linear_gated(&input, rows, &first, &second, Activation::Silu, len, &mut a, &mut c).expect("fits");
    let [a, b] = at_once;
    [a, b, read(device, &c, len)]
}

#[test]
fn a_good_gpu_passes_its_own_test() {
    stand_in::device().self_test().expect("the kernels are right");
}

/// Kernels that are compiled wrongly: a norm without its root.
#[test]
fn a_wrong_gpu_fails_its_own_test() {
    if std::env::var_os("CANDOR_TEST_GPU").is_some() {
        println!("the GPU at hand cannot be made a wrong one");
        return;
    }
    let child = std::process::Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "a_good_gpu_passes_its_own_test"])
        .env("CUDA_STANDIN_FLAGS", "-Dsqrtf=fabsf")
        .output()
        .expect("it starts");
    let said = String::from_utf8_lossy(&child.stdout).into_owned() + &String::from_utf8_lossy(&child.stderr);
    assert!(!child.status.success() && said.contains("SelfTest { what: \"layer norm\" }"), "{said}");
}
