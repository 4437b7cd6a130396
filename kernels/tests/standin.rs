//! The stand-in for CUDA's driver library (cuda/host/libcuda.cpp), through cudarc as the device uses it: copies,
//! launches, graphs, events, and each state that the environment can put it in.
#![cfg(not(target_feature = "crt-static"))] // those are cross builds, and cannot load a library
#![allow(missing_docs)]

use std::ffi::{CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DeviceRepr, DriverError, LaunchConfig, PushKernelArg, result,
};
use cudarc::nvrtc::Ptx;

unsafe extern "C" {
    fn dlopen(name: *const c_char, flags: c_int) -> *mut c_void;
}

/// Builds the library, once a process; the script builds only what changed.
fn library() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("standin");
        let output = Command::new(root.join("scripts/cuda-standin.sh"))
            .arg(&out)
            .arg("-DSELFTEST_KERNELS_ONLY")
            .env("CUDA_STANDIN_SOURCES", "host/selftest.cu")
            .output()
            .unwrap_or_else(|error| panic!("scripts/cuda-standin.sh: {error}"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        out.join("libcuda.so.1")
    })
}

/// Runs a test in a process of its own, with the stand-in loaded in the state that `environment` asks for. True: it
/// ended well. The text is what it printed.
fn run_alone(test: &str, environment: &[(&str, &str)], body: impl FnOnce()) -> (bool, String) {
    const CHILD: &str = "CANDOR_STANDIN_CHILD";
    const DONE: &str = "this test is done";
    if std::env::var(CHILD).is_ok_and(|name| name == test) {
        let path = CString::new(std::env::var("CANDOR_STANDIN_LIBRARY").expect("set by the parent")).expect("a path");
        // SAFETY: loads a library that this test built. Where it is loaded, cudarc finds it by its name.
        let handle = unsafe { dlopen(path.as_ptr(), 2) };
        assert!(!handle.is_null(), "{path:?} cannot be loaded");
        body();
        println!("{DONE}");
        // Not back to the test, which may have more to do in other processes.
        std::process::exit(0);
    }
    let program = std::env::current_exe().expect("a path");
    let mut command = Command::new(program);
    command.args(["--exact", test, "--nocapture", "--test-threads", "1"]);
    for variable in ["CUDA_STANDIN", "CUDA_STANDIN_LAZY", "CUDA_HOST_ORDER", "CUDA_HOST_THREADS"] {
        command.env_remove(variable);
    }
    command.env(CHILD, test).env("CANDOR_STANDIN_LIBRARY", library()).envs(environment.iter().copied());
    let output = command.output().expect("this program runs");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    (output.status.success() && text.contains(DONE), text.into_owned())
}

/// The same, for a test that must end well.
fn alone(test: &str, environment: &[(&str, &str)], body: impl FnOnce()) {
    let (passed, text) = run_alone(test, environment, body);
    assert!(passed, "{environment:?}:\n{text}");
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Pair {
    first: i32,
    second: f32,
}
// SAFETY: plain numbers, laid out as the kernel's struct is.
unsafe impl DeviceRepr for Pair {}

struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    module: Arc<cudarc::driver::CudaModule>,
}

impl Gpu {
    fn open() -> Result<Self, DriverError> {
        let context = CudaContext::new(0)?;
        // SAFETY: these tests order the work of their streams themselves.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream()?;
        let module = context.load_module(Ptx::from_binary(b"cuda stand-in\0".to_vec()))?;
        Ok(Self { context, stream, module })
    }

    fn function(&self, name: &str) -> CudaFunction {
        self.module.load_function(name).expect("a kernel of selftest.cu")
    }

    /// out[1 + 2 i] = i * factor + 0.5, for i below `n`.
    fn fill(&self, out: &mut CudaSlice<f32>, n: i32, factor: f32) -> Result<(), DriverError> {
        let function = self.function("fill_numbers");
        let config = LaunchConfig { grid_dim: (2, 1, 1), block_dim: (16, 1, 1), shared_mem_bytes: 0 };
        let (step, offset, pair) = (2u32, 1usize, Pair { first: 2, second: 0.25 });
        let mut launch = self.stream.launch_builder(&function);
        launch.arg(out).arg(&n).arg(&step).arg(&factor).arg(&offset).arg(&pair);
        // SAFETY: the arguments are those of the kernel; an overrun is what the stand-in is there to find.
        unsafe { launch.launch(config) }.map(drop)
    }
}

fn filled(n: usize, factor: f32) -> Vec<f32> {
    (0..20).map(|at| if at % 2 == 1 && at / 2 < n { (at / 2) as f32 * factor + 0.5 } else { 0.0 }).collect()
}

#[test]
fn launches_with_every_kind_of_argument() {
    for order in ["0", "reverse", "5"] {
        for threads in ["1", "2"] {
            alone(
                "launches_with_every_kind_of_argument",
                &[("CUDA_HOST_ORDER", order), ("CUDA_HOST_THREADS", threads)],
                || {
                    let gpu = Gpu::open().expect("a device");
                    assert_eq!(gpu.context.compute_capability(), Ok((8, 7)));
                    let mut out = gpu.stream.alloc_zeros::<f32>(20).expect("memory");
                    gpu.fill(&mut out, 9, 3.0).expect("a launch");
                    assert_eq!(gpu.stream.clone_dtoh(&out).expect("a copy"), filled(9, 3.0));
                },
            );
        }
    }
}

#[test]
fn memory_is_strict() {
    alone("memory_is_strict", &[], || {
        let gpu = Gpu::open().expect("a device");
        let invalid = Err(DriverError(CUresult::CUDA_ERROR_INVALID_VALUE));
        // SAFETY: addresses are used as the driver gave them, or must be refused.
        unsafe {
            let memory = result::malloc_sync(100).expect("memory");
            let mut bytes = [0u8; 100];
            result::memcpy_dtoh_sync(&mut bytes, memory).expect("inside");
            assert_eq!(bytes, [0xff; 100], "fresh memory");
            result::memcpy_htod_sync(memory + 4, &[1u8; 96]).expect("inside");
            assert_eq!(result::memcpy_htod_sync(memory + 4, &[1u8; 97]), invalid);
            assert_eq!(result::memcpy_htod_sync(memory - 1, &[1u8; 4]), invalid);
            assert_eq!(result::memcpy_dtoh_sync(&mut bytes, memory + 1), invalid);
            assert_eq!(result::memset_d8_sync(memory, 0, 101), invalid);
            assert_eq!(result::free_sync(memory + 4), invalid);
            result::free_sync(memory).expect("its own");
            assert_eq!(result::free_sync(memory), invalid, "freed twice");
            assert_eq!(result::memcpy_htod_sync(memory, &[1u8; 4]), invalid, "freed");
            // Another thread has no context until it takes one.
            let there = std::thread::spawn(|| result::malloc_sync(100)).join().expect("no panic");
            assert_eq!(there, Err(DriverError(CUresult::CUDA_ERROR_INVALID_CONTEXT)));
        }
        // SAFETY: written before it is read.
        let mut pinned = unsafe { gpu.context.alloc_pinned_with_flags::<u32>(50, 0) }.expect("pinned memory");
        pinned.as_mut_slice().expect("idle").fill(7);
        let device = gpu.stream.clone_htod(&pinned).expect("a copy");
        assert_eq!(gpu.stream.clone_dtoh(&device).expect("a copy"), [7; 50]);
    });
}

#[test]
fn graphs_are_captured_replayed_and_changed() {
    for lazy in ["0", "1"] {
        alone("graphs_are_captured_replayed_and_changed", &[("CUDA_STANDIN_LAZY", lazy)], || {
            let gpu = Gpu::open().expect("a device");
            let stream = &gpu.stream;
            let mut out = stream.alloc_zeros::<f32>(20).expect("memory");
            let flags = sys::CUgraphInstantiate_flags(0);
            stream.synchronize().expect("idle");
            stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).expect("a capture");
            stream.memset_zeros(&mut out).expect("captured");
            gpu.fill(&mut out, 3, 1.0).expect("captured");
            let graph = stream.end_capture(flags).expect("a graph").expect("a graph");
            assert_eq!(stream.clone_dtoh(&out).expect("a copy"), [0.0; 20], "a capture does nothing");
            stream.memcpy_htod(&[9.0; 20], &mut out).expect("a copy");
            graph.launch().expect("a launch");
            assert_eq!(stream.clone_dtoh(&out).expect("a copy"), filled(3, 1.0));

            // Another factor and another number, in the instantiated graph.
            let (address, n, step, factor) = (device_address(&out, stream), 5i32, 2u32, 4.0f32);
            let (offset, pair) = (1usize, Pair { first: 2, second: 0.25 });
            let mut pointers = [
                (&raw const address).cast::<c_void>().cast_mut(),
                (&raw const n).cast::<c_void>().cast_mut(),
                (&raw const step).cast::<c_void>().cast_mut(),
                (&raw const factor).cast::<c_void>().cast_mut(),
                (&raw const offset).cast::<c_void>().cast_mut(),
                (&raw const pair).cast::<c_void>().cast_mut(),
            ];
            // SAFETY: the graph lives, the structures are filled by the driver, the arguments are the kernel's.
            unsafe {
                let mut nodes = [std::ptr::null_mut(); 8];
                let mut count = nodes.len();
                sys::cuGraphGetNodes(graph.cu_graph(), nodes.as_mut_ptr(), &mut count).result().expect("nodes");
                assert_eq!(count, 2);
                let mut parameters = std::mem::zeroed();
                sys::cuGraphKernelNodeGetParams_v2(nodes[1], &mut parameters).result().expect("a kernel");
                assert_eq!((parameters.gridDimX, parameters.blockDimX), (2, 16));
                parameters.kernelParams = pointers.as_mut_ptr();
                sys::cuGraphExecKernelNodeSetParams_v2(graph.cu_graph_exec(), nodes[1], &parameters)
                    .result()
                    .expect("the same kernel");
            }
            graph.launch().expect("a launch");
            assert_eq!(stream.clone_dtoh(&out).expect("a copy"), filled(5, 4.0));

            // What would wait ends the capture, as on a device.
            stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL).expect("a capture");
            assert_eq!(stream.synchronize(), Err(DriverError(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)));
            let ended = stream.end_capture(flags).map(|graph| graph.is_some());
            assert_eq!(ended, Err(DriverError(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)));
        });
    }
}

fn device_address(memory: &CudaSlice<f32>, stream: &CudaStream) -> sys::CUdeviceptr {
    use cudarc::driver::DevicePtr;
    memory.device_ptr(stream).0
}

#[test]
fn a_lazy_stream_waits_to_be_waited_for() {
    alone("a_lazy_stream_waits_to_be_waited_for", &[("CUDA_STANDIN_LAZY", "1")], || {
        let gpu = Gpu::open().expect("a device");
        let other = gpu.context.new_stream().expect("a stream");
        let mut out = gpu.stream.alloc_zeros::<f32>(20).expect("memory");
        // SAFETY: written by the copies below before it is read.
        let mut pinned = unsafe { gpu.context.alloc_pinned_with_flags::<f32>(20, 0) }.expect("pinned memory");
        pinned.as_mut_slice().expect("idle").fill(-1.0);
        let host = pinned.as_mut_ptr().expect("idle");
        let copy = |stream: &CudaStream, out: &CudaSlice<f32>| {
            let from = device_address(out, stream);
            // SAFETY: both hold 20 numbers until this test ends.
            unsafe { sys::cuMemcpyDtoHAsync_v2(host.cast(), from, 80, stream.cu_stream()) }.result().expect("a copy");
        };
        // SAFETY: as above.
        let first = || unsafe { host.add(1).read_volatile() };
        gpu.fill(&mut out, 3, 1.0).expect("a launch");
        let done = gpu.stream.record_event(None).expect("an event");
        copy(&other, &out);
        assert_eq!(first(), -1.0, "nobody has waited");
        other.synchronize().expect("a copy");
        assert!(first().is_nan(), "the other stream did not wait: it sees fresh memory");
        assert_eq!(done.try_is_complete(), Ok(false));
        other.wait(&done).expect("an event");
        copy(&other, &out);
        assert!(first().is_nan());
        other.synchronize().expect("a copy");
        assert_eq!(first(), 0.5, "waiting for one stream runs what it depends on");
        assert_eq!(done.try_is_complete(), Ok(true));
    });
}

#[test]
fn launches_are_checked() {
    alone("launches_are_checked", &[], || {
        let gpu = Gpu::open().expect("a device");
        let function = gpu.function("use_shared");
        let mut out = gpu.stream.alloc_zeros::<i32>(1).expect("memory");
        let mut run = |threads: u32, bytes: u32| {
            let words = (bytes / 4) as i32;
            let config = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: bytes };
            // SAFETY: the arguments are those of the kernel.
            unsafe { gpu.stream.launch_builder(&function).arg(&mut out).arg(&words).launch(config) }.map(drop)
        };
        let invalid = Err(DriverError(CUresult::CUDA_ERROR_INVALID_VALUE));
        assert_eq!(run(64, 48 << 10), Ok(()));
        assert_eq!(run(1025, 4), invalid, "too many threads");
        assert_eq!(run(64, 100 << 10), invalid, "more than 48 KiB have to be asked for");
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        assert_eq!(function.set_attribute(attribute, 164 << 10), invalid, "more than the device has");
        function.set_attribute(attribute, 163 << 10).expect("all the device has");
        assert_eq!(run(64, 163 << 10), Ok(()));
        assert_eq!(gpu.stream.clone_dtoh(&out), Ok(vec![(163 << 8) - 1]));

        let missing = gpu.module.load_function("no_such_kernel").err();
        assert_eq!(missing, Some(DriverError(CUresult::CUDA_ERROR_NOT_FOUND)));
        let image = |bytes: &[u8]| gpu.context.load_module(Ptx::from_binary(bytes.to_vec())).err().map(|error| error.0);
        assert_eq!(image(b"nothing of that kind"), Some(CUresult::CUDA_ERROR_INVALID_IMAGE));
        assert_eq!(image(b"// PTX\n.version 8.5\n\0"), None);
        assert_eq!(image(&cubin(87)), None);
        assert_eq!(image(&cubin(80)), None);
        assert_eq!(image(&cubin(89)), Some(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU));
        assert_eq!(image(&cubin(72)), Some(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU));
    });
}

/// The header of a cubin.
fn cubin(architecture: u8) -> Vec<u8> {
    let mut header = vec![0; 64];
    header[..9].copy_from_slice(b"\x7fELF\x02\x01\x01\x33\x07");
    header[18] = 190;
    header[48] = architecture;
    header
}

/// What lies between a kernel that reads past its buffer and a result that looks right.
#[test]
fn a_kernel_outside_of_its_memory_ends_the_process() {
    let name = "a_kernel_outside_of_its_memory_ends_the_process";
    let (passed, text) = run_alone(name, &[], || {
        let gpu = Gpu::open().expect("a device");
        let (x, n) = (gpu.stream.clone_htod(&[1.0f32; 256]).expect("memory"), 257i32);
        let mut out = gpu.stream.alloc_zeros::<f32>(1).expect("memory");
        let config = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (32, 1, 1), shared_mem_bytes: 0 };
        let function = gpu.function("sum_numbers");
        // SAFETY: reads one number too many, which the stand-in must catch.
        unsafe { gpu.stream.launch_builder(&function).arg(&x).arg(&mut out).arg(&n).launch(config) }.expect("caught");
    });
    assert!(!passed, "{text}");
    assert!(text.contains("cuda: kernel sum_numbers, block (0,0,0), thread (0,0,0)"), "{text}");
    assert!(text.contains("is not memory"), "{text}");
}

#[test]
fn no_device() {
    alone("no_device", &[("CUDA_STANDIN", "no-device")], || {
        assert_eq!(Gpu::open().err(), Some(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)));
        assert_eq!(CudaContext::device_count(), Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)));
    });
}

#[test]
fn old_driver() {
    alone("old_driver", &[("CUDA_STANDIN", "old-driver")], || {
        let mut version = 0;
        // SAFETY: writes one number.
        unsafe { sys::cuDriverGetVersion(&mut version) }.result().expect("a version");
        assert_eq!(version, 11000);
    });
}

/// cudarc panics at a function that the library lacks, at its first use; that can be caught.
#[test]
fn missing_symbol() {
    alone("missing_symbol", &[("CUDA_STANDIN", "missing-symbol=cuModuleLoadData")], || {
        let context = CudaContext::new(0).expect("all that this needs is there");
        let image = || Ptx::from_binary(b"cuda stand-in\0".to_vec());
        let panic = catch_unwind(AssertUnwindSafe(|| context.load_module(image()).map(drop))).expect_err("a panic");
        let message = panic.downcast_ref::<String>().map_or("", String::as_str);
        assert!(message.contains("cuModuleLoadData"), "{message}");
        assert_eq!(context.synchronize(), Ok(()), "the others still work");
    });
}

#[test]
fn another_capability() {
    alone("another_capability", &[("CUDA_STANDIN", "capability=7.5")], || {
        let context = CudaContext::new(0).expect("a device");
        assert_eq!(context.compute_capability(), Ok((7, 5)));
        assert!(context.load_module(Ptx::from_binary(cubin(72))).is_ok());
        let newer = context.load_module(Ptx::from_binary(cubin(87))).err();
        assert_eq!(newer, Some(DriverError(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU)));
    });
}

#[test]
fn little_memory() {
    alone("little_memory", &[("CUDA_STANDIN", "memory=100000")], || {
        let gpu = Gpu::open().expect("a device");
        let first = gpu.stream.alloc_zeros::<u8>(60000).expect("there is room");
        assert_eq!(gpu.context.mem_get_info(), Ok((40000, 100000)));
        let second = gpu.stream.alloc_zeros::<u8>(60000).err();
        assert_eq!(second, Some(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)));
        drop(first);
        assert!(gpu.stream.alloc_zeros::<u8>(60000).is_ok(), "not sticky");
    });
}

#[test]
fn a_launch_that_fails() {
    for lazy in ["0", "1"] {
        let environment = [("CUDA_STANDIN", "fail-launch=2"), ("CUDA_STANDIN_LAZY", lazy)];
        alone("a_launch_that_fails", &environment, || {
            let gpu = Gpu::open().expect("a device");
            let failed = DriverError(CUresult::CUDA_ERROR_LAUNCH_FAILED);
            let mut out = gpu.stream.alloc_zeros::<f32>(20).expect("memory");
            assert_eq!(gpu.fill(&mut out, 3, 1.0), Ok(()));
            let second = gpu.fill(&mut out, 3, 1.0).and_then(|()| gpu.stream.synchronize());
            assert_eq!(second, Err(failed));
            assert_eq!(gpu.stream.clone_dtoh(&out).err(), Some(failed), "everything after it fails too");
            assert_eq!(gpu.context.synchronize(), Err(failed));
        });
    }
}

#[test]
fn a_device_that_is_lost() {
    alone("a_device_that_is_lost", &[("CUDA_STANDIN", "lost-at=40")], || {
        let gpu = Gpu::open().expect("a device");
        let lost = DriverError(CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE);
        let error = (0..40).find_map(|_| gpu.stream.clone_htod(&[1u8; 4]).err());
        assert_eq!(error, Some(lost));
        assert_eq!(gpu.context.synchronize(), Err(lost));
        assert!(format!("{lost:?}").contains("CUDA_ERROR_DEVICE_UNAVAILABLE"), "its name is told after that too");
    });
}

/// What a GPU would fail at, and the stand-in would come to the right result with.
#[test]
fn a_kernel_is_not_given_the_hosts_memory() {
    let name = "a_kernel_is_not_given_the_hosts_memory";
    let (passed, text) = run_alone(name, &[("CUDA_STANDIN", "integrated=1")], || {
        let gpu = Gpu::open().expect("a device");
        let numbers = vec![2.0f32; 64];
        let (address, n) = (numbers.as_ptr() as u64, 64i32);
        let mut out = gpu.stream.alloc_zeros::<f32>(1).expect("memory");
        let config = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (32, 1, 1), shared_mem_bytes: 0 };
        let function = gpu.function("sum_numbers");
        // SAFETY: the numbers were not registered, which the stand-in must see.
        unsafe { gpu.stream.launch_builder(&function).arg(&address).arg(&mut out).arg(&n).launch(config) }
            .expect("seen");
    });
    assert!(!passed && text.contains("kernel sum_numbers is given the address"), "{text}");
}

#[test]
fn a_board_that_shares_memory() {
    for state in ["integrated=0", "integrated=1"] {
        alone("a_board_that_shares_memory", &[("CUDA_STANDIN", state)], || {
            let shares = std::env::var("CUDA_STANDIN").is_ok_and(|state| state == "integrated=1");
            let gpu = Gpu::open().expect("a device");
            let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED;
            assert_eq!(gpu.context.attribute(attribute), Ok(i32::from(shares)));
            let numbers = vec![2.0f32; 64];
            let memory = numbers.as_ptr().cast::<c_void>().cast_mut();
            let (map, bytes) = (sys::CU_MEMHOSTREGISTER_DEVICEMAP, 256);
            // SAFETY: the numbers live until the memory is unregistered, and nobody writes to them.
            unsafe {
                let registered = sys::cuMemHostRegister_v2(memory, bytes, map);
                if !shares {
                    assert_eq!(registered, CUresult::CUDA_ERROR_NOT_SUPPORTED);
                    return;
                }
                registered.result().expect("registered");
                let twice = sys::cuMemHostRegister_v2(memory, bytes, map);
                assert_eq!(twice, CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
                let mut address = 0;
                sys::cuMemHostGetDevicePointer_v2(&mut address, memory, 0).result().expect("an address");
                let mut out = gpu.stream.alloc_zeros::<f32>(1).expect("memory");
                let (function, n) = (gpu.function("sum_numbers"), 64i32);
                let config = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (32, 1, 1), shared_mem_bytes: 0 };
                gpu.stream
                    .launch_builder(&function)
                    .arg(&address)
                    .arg(&mut out)
                    .arg(&n)
                    .launch(config)
                    .expect("a launch");
                assert_eq!(gpu.stream.clone_dtoh(&out), Ok(vec![128.0]));
                sys::cuMemHostUnregister(memory).result().expect("unregistered");
                let again = sys::cuMemHostUnregister(memory);
                assert_eq!(again, CUresult::CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
            }
        });
    }
}
