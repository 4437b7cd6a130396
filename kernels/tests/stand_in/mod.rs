//! The CUDA device on the stand-in driver: the kernels run on the processor, everything above them is what a GPU would see.
#![allow(dead_code)] // not every test uses all of it

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use candor_kernels::cuda::{CudaDevice, CudaError};

/// A folder with a stand-in driver that is not to be built anew.
pub(crate) const BUILT: &str = "CUDA_STANDIN_BUILT";

/// The folder of the stand-in driver of this process. CUDA_STANDIN_FLAGS are more flags for the compiler: another architecture, or
/// sanitizers.
pub(crate) fn folder() -> PathBuf {
    if let Some(built) = std::env::var_os(BUILT) {
        return built.into();
    }
    build(&std::env::var("CUDA_STANDIN_FLAGS").unwrap_or_default())
}

/// Builds a stand-in driver, where it is not there yet, and gives the folder it lies in.
pub(crate) fn build(flags: &str) -> PathBuf {
    let name = format!("stand-in{}", flags.replace(|c: char| !c.is_ascii_alphanumeric(), "-"));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    script(&folder, flags, &[]);
    folder
}

/// Runs the script that builds a stand-in driver, in the environment `variables`.
pub(crate) fn script(folder: &Path, flags: &str, variables: &[(&str, &std::ffi::OsStr)]) {
    // Tests of every crate of the workspace use this.
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let mut command = Command::new(root.join("scripts/cuda-standin.sh"));
    command.arg(folder).args(flags.split_whitespace()).envs(variables.iter().copied());
    let built = command.output().expect("sh");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
}

/// Makes the stand-in the driver of this process. The driver that is looked for later is the one that is loaded.
pub(crate) fn load() -> &'static libloading::Library {
    // For as long as the process runs.
    static LOADED: OnceLock<libloading::Library> = OnceLock::new();
    LOADED.get_or_init(|| {
        let path = folder().join("libcuda.so.1");
        // SAFETY: its initialisers only make tables of its own.
        unsafe { libloading::Library::new(path) }.expect("the library that was just built")
    })
}

/// What the stand-in has allocated: `Counts` of cuda/host/libcuda.cpp.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Counts {
    /// Allocations and registrations so far.
    pub(crate) made: u64,
    /// Those there are: of the device, of pinned memory, and registered.
    pub(crate) device: u64,
    pub(crate) host: u64,
    pub(crate) registered: u64,
    /// Bytes of the device, and the most since this was last asked.
    pub(crate) used: u64,
    pub(crate) most_used: u64,
}

/// What is allocated now in this process, by whatever test.
pub(crate) fn counts() -> Counts {
    let mut counts = Counts::default();
    // SAFETY: the function is the stand-in's, and has this signature.
    unsafe {
        let ask: libloading::Symbol<'_, unsafe extern "C" fn(*mut Counts)> =
            load().get(b"standin_memory").expect("its own");
        ask(&raw mut counts);
    }
    counts
}

/// How far the stand-in is: `Progress` of cuda/host/libcuda.cpp.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Progress {
    pub(crate) calls: u64,
    pub(crate) launches: u64,
    /// Of the device's memory.
    pub(crate) allocations: u64,
}

/// What there was since [`begin`].
pub(crate) fn progress() -> Progress {
    let mut progress = Progress::default();
    // SAFETY: the function is the stand-in's, and has this signature.
    unsafe {
        let ask: libloading::Symbol<'_, unsafe extern "C" fn(*mut Progress)> =
            load().get(b"standin_progress").expect("its own");
        ask(&raw mut progress);
    }
    progress
}

/// Puts the stand-in into another state, as CUDA_STANDIN names them, and counts anew. No device may be open.
pub(crate) fn begin(state: &str) {
    let state = std::ffi::CString::new(state).expect("a text");
    // SAFETY: the function is the stand-in's, and has this signature.
    unsafe {
        let begin: libloading::Symbol<'_, unsafe extern "C" fn(*const std::ffi::c_char)> =
            load().get(b"standin_begin").expect("its own");
        begin(state.as_ptr());
    }
}

/// Runs `body` of test `name` in a process of its own, on the stand-in in the state `state`; gives what it printed.
pub(crate) fn alone(name: &str, state: &str, lazy: bool, body: impl FnOnce()) -> String {
    const CHILD: &str = "CANDOR_TEST_ALONE";
    if std::env::var_os(CHILD).is_some() {
        body();
        println!("\nended well");
        // Not back to the test, which may have more to do in other processes.
        std::process::exit(0);
    }
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(CHILD, name);
    command.env("CUDA_STANDIN", state).env("CUDA_STANDIN_LAZY", if lazy { "1" } else { "0" });
    command.env_remove("CANDOR_TEST_GPU");
    let output = command.output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("ended well"), "{name}, {state}: {said}");
    said
}

/// Opens the GPU of this machine where CANDOR_TEST_GPU is set (scripts/gpu-check.sh), else the stand-in's. It has the kernels itself; this image says so.
pub(crate) fn open() -> Result<CudaDevice, CudaError> {
    if std::env::var_os("CANDOR_TEST_GPU").is_some() {
        return CudaDevice::open(0);
    }
    load();
    CudaDevice::with_images(0, |_| Ok(b"cuda stand-in\0".to_vec()))
}

/// The GPU of [`open`].
pub(crate) fn device() -> CudaDevice {
    open().expect("there is a GPU")
}
