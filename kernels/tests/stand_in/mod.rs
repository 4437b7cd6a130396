//! The CUDA device on the stand-in driver: the kernels run on the processor, everything above them is what a GPU would see.
#![allow(dead_code)] // not every test uses all of it

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use candor_kernels::cuda::{CudaDevice, CudaError};

/// Builds the stand-in driver, where it is not there yet, and gives the folder it lies in. CUDA_STANDIN_FLAGS are more flags for
/// the compiler: another architecture, or sanitizers.
pub(crate) fn folder() -> PathBuf {
    // Tests of every crate of the workspace use this.
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let flags = std::env::var("CUDA_STANDIN_FLAGS").unwrap_or_default();
    let name = format!("stand-in{}", flags.replace(|c: char| !c.is_ascii_alphanumeric(), "-"));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let mut command = Command::new(root.join("scripts/cuda-standin.sh"));
    let built = command.arg(&folder).args(flags.split_whitespace()).output().expect("sh");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    folder
}

/// Makes the stand-in the driver of this process. The driver that is looked for later is the one that is loaded.
pub(crate) fn load() {
    static LOADED: OnceLock<()> = OnceLock::new();
    LOADED.get_or_init(|| {
        let path = folder().join("libcuda.so.1");
        // SAFETY: its initialisers only make tables of its own.
        let library = unsafe { libloading::Library::new(path) }.expect("the library that was just built");
        // For as long as the process runs.
        std::mem::forget(library);
    });
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
