//! Every operation of the CUDA device, on the stand-in driver, against its definition and against the CPU device.
#![allow(missing_docs)]
#![cfg(not(target_feature = "crt-static"))] // those are cross builds, whose programs the host's compiler cannot make

mod runs;
mod stand_in;
mod suite;

use candor_kernels::cpu::CpuDevice;
use candor_kernels::cuda::{CudaBuffer, CudaDevice};
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
    bilinear log_mel several_at_once pictures
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
fn layers_in_f32_and_bf16() {
    suite::linear_of(&stand_in::device(), &[DType::F32, DType::BF16]);
}

/// Many rows are rounded to f16 for weights in f16, few are not: near to the definition, whatever the size of a row.
#[test]
fn layers_in_f16() {
    let device = stand_in::device();
    let mut random = ChaCha8Rng::seed_from_u64(6);
    for (rows, outputs, depth) in [(1, 33, 40), (8, 9, 131), (9, 70, 131), (65, 40, 320), (130, 5, 96)] {
        let of_weight = |_| half::f16::from_f32(random.random_range(-1.0..1.0f32));
        let weight: Vec<half::f16> = (0..outputs * depth).map(of_weight).collect();
        let bytes: Vec<u8> = weight.iter().flat_map(|value| value.to_le_bytes()).collect();
        let len = bytes.len();
        let tensor =
            HostTensor::new(std::sync::Arc::new(bytes), 0, len, DType::F16, vec![outputs, depth], None).expect("good");
        let stored = device.weight(&tensor).expect("a good tensor");
        let size = |row: usize| [1.0, 1e7, 1e-9][row % 3];
        let x: Vec<f32> = (0..rows * depth).map(|i| size(i / depth) * random.random_range(-1.0..1.0f32)).collect();
        let (mut input, mut out) =
            (device.allocate(x.len()).expect("memory"), device.allocate(rows * outputs).expect("memory"));
        device.write(&x, &mut input, 0).expect("fits");
        device.linear(&input, rows, &stored, None, Activation::Identity, &mut out).expect("fits");
        for (i, found) in read(&device, &out, rows * outputs).into_iter().enumerate() {
            let (row, output) = (i / outputs, i % outputs);
            let products = (0..depth).map(|j| x[row * depth + j] * weight[output * depth + j].to_f32());
            let expected: f32 = products.sum();
            let allowed = 2e-3 * size(row) * (depth as f32).sqrt();
            assert!((found - expected).abs() < allowed, "{rows}x{outputs}x{depth}, row {row}: {found}, not {expected}");
        }
    }
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
fn decoder_layers_at_once_are_their_steps() {
    suite::decoder::at_once_is_in_steps(&stand_in::device());
}

#[test]
fn decoder_layers_that_cannot_be_taken_at_once_are_refused() {
    suite::decoder::others_are_refused(&stand_in::device());
}

/// Runs that are repeated: with other numbers and buffers, with another number of launches, after an error, and beside what other
/// threads and runs do.
#[test]
fn what_is_replayed_is_what_is_done() {
    let (device, mut replay) = (stand_in::device(), <CudaDevice as Device>::Replay::default());
    let mut random = ChaCha8Rng::seed_from_u64(9);
    let weight = device.weight(&quantised(&mut random, DType::I4, 40, 64, Some(32))).expect("a good tensor");
    let table =
        HostTensor::from_f32(&(0..640).map(|i| i as f32).collect::<Vec<_>>(), &[10, 64]).expect("a good tensor");
    let table = device.weight(&table).expect("a good tensor");
    let run = |x: &mut CudaBuffer, out: &mut CudaBuffer, id: u32, twice: bool| {
        device.embed(&table, &[id], x, 0)?;
        // Another kernel, in a run that is as long.
        if id == 3 {
            device.activate(Activation::Tanh, x, 64)?
        } else {
            device.add_positions(x, 1, &table, 1)?
        }
        device.linear(x, 1, &weight, None, Activation::Gelu, out)?;
        if twice { device.linear(x, 1, &weight, None, Activation::Identity, out) } else { Ok(()) }
    };
    let buffers = || [64, 40].map(|len| device.allocate(len).expect("memory"));
    let [mut x, mut expected] = buffers();
    let [mut a, mut b] = [buffers(), buffers()];
    for (turn, (id, twice)) in
        [(1, false), (1, false), (7, false), (2, true), (3, true), (3, false)].into_iter().enumerate()
    {
        let [x_of_run, out] = if turn % 3 == 2 { &mut b } else { &mut a };
        run(&mut x, &mut expected, id, twice).expect("good sizes");
        device.replay(&mut replay, || run(x_of_run, out, id, twice)).expect("it can be replayed");
        assert_eq!(read(&device, out, 40), read(&device, &expected, 40), "turn {turn}");
    }
    let [x_of_run, out] = &mut a;
    let before = read(&device, out, 40);
    let refused = device.replay(&mut replay, || {
        run(x_of_run, out, 4, false)?;
        device.wait()
    });
    assert!(refused.expect_err("it waits").to_string().contains("cannot be a part of what is replayed"));
    let wrong = device.replay(&mut replay, || run(x_of_run, out, 10, false));
    assert!(wrong.expect_err("there is no such row").to_string().contains("id 10"));
    // Of the runs that failed nothing was done, and the next is whole.
    assert_eq!(read(&device, out, 40), before);
    let other = std::thread::scope(|scope| {
        device
            .replay(&mut replay, || {
                run(x_of_run, out, 5, false)?;
                scope.spawn(|| run(&mut x, &mut expected, 5, false)).join().expect("no panic")
            })
            .map(|()| read(&device, out, 40))
    });
    assert_eq!(other.expect("good sizes"), read(&device, &expected, 40));
    device.replay(&mut replay, || Ok(())).expect("nothing is little");
}

/// Memory that is let go of while a run is recorded is that of launches before.
#[test]
fn memory_goes_behind_what_is_replayed() {
    let mut random = ChaCha8Rng::seed_from_u64(10);
    let sizes = [(3usize, 90), (70, 200), (90, 700)];
    let tensors = sizes.map(|(outputs, depth)| quantised(&mut random, DType::I8, outputs, depth, None));
    let compute = |device: &CudaDevice, replayed: bool| {
        let weights = [0, 1, 2].map(|i| device.weight(&tensors[i]).expect("a good tensor"));
        let x: Vec<f32> = (0..20 * 700).map(|i| (i % 37) as f32 - 18.0).collect();
        let x = suite::attention::buffer(device, &x);
        let mut outs = sizes.map(|(outputs, _)| device.allocate(20 * outputs).expect("memory"));
        let mut run = || {
            // What the bytes of activations take grows with each.
            for (weight, out) in weights.iter().zip(&mut outs) {
                device.linear(&x, 20, weight, None, Activation::Identity, out)?;
            }
            let mut gone = device.allocate(90)?;
            device.copy(&x, 0, &mut gone, 0, 60)?;
            device.add(&mut outs[0], &gone, 60)
        };
        match replayed {
            false => run().expect("good sizes"),
            true => device.replay(&mut Default::default(), run).expect("good sizes"),
        }
        outs.each_ref().map(|out| read(device, out, 60))
    };
    let expected = compute(&stand_in::device(), false);
    assert_eq!(compute(&stand_in::device(), true), expected);
}

/// Operations of several threads that use the same memory of the device, some of them replayed.
#[test]
fn threads_share_a_gpu() {
    let device = stand_in::device();
    let mut random = ChaCha8Rng::seed_from_u64(11);
    let weight = device.weight(&quantised(&mut random, DType::I8, 5, 300, None)).expect("a good tensor");
    let compute = |thread: usize, replay: Option<&mut <CudaDevice as Device>::Replay>| {
        let x: Vec<f32> = (0..300).map(|i| ((i * (thread + 2)) % 23) as f32 - 11.0).collect();
        let (x, mut out) = (suite::attention::buffer(&device, &x), device.allocate(5).expect("memory"));
        let mut run = || device.linear(&x, 1, &weight, None, Activation::Identity, &mut out);
        match replay {
            None => run().expect("good sizes"),
            Some(replay) => device.replay(replay, run).expect("good sizes"),
        }
        read(&device, &out, 5)
    };
    let expected: Vec<_> = (0..4).map(|thread| compute(thread, None)).collect();
    std::thread::scope(|scope| {
        for (thread, expected) in expected.iter().enumerate() {
            let compute = &compute;
            scope.spawn(move || {
                let mut replay = Default::default();
                for turn in 0..40 {
                    let replay = (thread % 2 == 1).then_some(&mut replay);
                    assert_eq!(compute(thread, replay), *expected, "thread {thread}, turn {turn}");
                }
            });
        }
    });
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
