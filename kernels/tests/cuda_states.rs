//! What becomes of a driver or a GPU that is not as it should be: each an error of its own, and never a panic.
#![allow(missing_docs)]
#![cfg(not(target_feature = "crt-static"))] // those are cross builds, whose programs the host's compiler cannot make

mod stand_in;

use std::process::Command;

use candor_kernels::cuda::CudaError;
use candor_kernels::{Activation, Device, DeviceError, HostTensor};

/// What a child process is told to do; without it a test is the parent of such processes.
const CHILD: &str = "CANDOR_TEST_STATE";

/// Opens the GPU, takes memory, computes, and computes again behind a failure.
fn attempt() -> String {
    let device = match stand_in::open() {
        Ok(device) => device,
        Err(error) => return format!("not opened: {} | {error}", kind(&error)),
    };
    let weight = HostTensor::from_f32(&[2.0; 4], &[2, 2]).expect("a good tensor");
    let compute = || -> Result<Vec<f32>, DeviceError> {
        let weight = device.weight(&weight)?;
        let (mut x, mut out) = (device.allocate(2)?, device.allocate(2)?);
        device.write(&[1.0, 3.0], &mut x, 0)?;
        device.linear(&x, 1, &weight, None, Activation::Identity, &mut out)?;
        let mut values = vec![0.0; 2];
        device.read(&out, 0, &mut values)?;
        Ok(values)
    };
    let say = |result: Result<Vec<f32>, DeviceError>| match result {
        Ok(values) => format!("{values:?}"),
        Err(DeviceError::GpuOutOfMemory { .. }) => "no memory".to_owned(),
        Err(DeviceError::Cuda { op, source }) => format!("{op}: {} | {source}", kind(&source)),
        Err(error) => format!("{error}"),
    };
    let large = device.allocate(100_000).map(|_| Vec::new());
    format!("large {}; first {}; second {}", say(large), say(compute()), say(compute()))
}

fn kind(error: &CudaError) -> &'static str {
    match error {
        CudaError::NoDriver => "NoDriver",
        CudaError::DriverTooOld { .. } => "DriverTooOld",
        CudaError::NoDevice { .. } => "NoDevice",
        CudaError::Architecture { .. } => "Architecture",
        CudaError::OutOfMemory => "OutOfMemory",
        CudaError::Kernel(_) => "Kernel",
        CudaError::Lost(_) => "Lost",
        _ => "Driver",
    }
}

/// In a process of its own: what `attempt` comes to in the state that CUDA_STANDIN names.
fn outcome(state: &str) -> String {
    let program = std::env::current_exe().expect("this program");
    let output = Command::new(program)
        .args(["--exact", "a_good_driver_computes", "--nocapture", "--test-threads=1"])
        .env(CHILD, "1")
        .env("CUDA_STANDIN", state)
        .output()
        .expect("it starts");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let found = said.lines().find_map(|line| line.split_once("outcome: ")).map(|(_, outcome)| outcome.to_owned());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!errors.contains("panicked"), "{state}: {errors}");
    found.unwrap_or_else(|| panic!("{state}: {said}{errors}"))
}

#[test]
fn a_good_driver_computes() {
    if std::env::var_os(CHILD).is_some() {
        println!("\noutcome: {}", attempt());
        return;
    }
    assert_eq!(outcome(""), "large []; first [8.0, 8.0]; second [8.0, 8.0]");
}

#[test]
fn every_state_has_its_error() {
    for (state, expected) in [
        ("no-device", vec!["not opened: NoDevice"]),
        ("old-driver", vec!["not opened: DriverTooOld", "CUDA 11.0"]),
        ("missing-symbol=cuLaunchKernel", vec!["not opened: DriverTooOld", "cuLaunchKernel"]),
        ("missing-symbol=cuInit", vec!["not opened: DriverTooOld", "cuInit"]),
        ("missing-symbol=cuMemHostRegister_v2", vec!["not opened: DriverTooOld", "cuMemHostRegister_v2"]),
        ("missing-symbol=cuEventRecord", vec!["not opened: DriverTooOld", "cuEventRecord"]),
        // A driver without pools would do.
        ("missing-symbol=cuMemAllocAsync", vec!["large []", "second [8.0, 8.0]"]),
        ("memory=200000", vec!["large no memory", "first [8.0, 8.0]", "second [8.0, 8.0]"]),
        ("fail-launch=1", vec!["first", "Kernel", "second", "Kernel"]),
        ("fail-launch=2", vec!["first [8.0, 8.0]", "second", "Kernel", "started again"]),
        ("integrated=1", vec!["large []", "second [8.0, 8.0]"]),
    ] {
        let outcome = outcome(state);
        assert!(expected.iter().all(|expected| outcome.contains(expected)), "{state}: {outcome}");
    }
}

/// Whenever the GPU goes, the caller gets an error that says so.
#[test]
fn a_gpu_can_be_lost_at_any_call() {
    let mut lost = 0;
    for call in (1..120).step_by(7) {
        let outcome = outcome(&format!("lost-at={call}"));
        lost += usize::from(outcome.contains("Lost"));
        assert!(outcome.contains("Lost") || outcome.ends_with("second [8.0, 8.0]"), "{call}: {outcome}");
    }
    assert!(lost > 3, "{lost}");
}
