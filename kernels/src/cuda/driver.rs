//! The driver: opening a GPU, and what can be wrong with it.
//!
//! `cudarc` opens libcuda when it is first called, and panics where there is none or where a function is missing. So
//! both are looked at before, and nothing of `cudarc` is called until every function that is used is known to be there.

use cudarc::driver::{CudaContext, CudaStream, DriverError, sys};
use std::sync::Arc;

use crate::device::DeviceError;

/// Why no GPU can be used, or why it can be used no longer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// There is no libcuda.
    #[error("there is no CUDA driver (libcuda was not found)")]
    NoDriver,
    /// libcuda has not all that is needed.
    #[error("the CUDA driver is too old: it has no {function}; CUDA {needed} or later is needed")]
    DriverTooOld {
        /// The first function that is missing, or `cuDriverGetVersion`'s answer.
        function: String,
        /// The version of CUDA that the kernels were built with.
        needed: &'static str,
    },
    /// There is a driver and no GPU, or none of this number.
    #[error("the CUDA driver finds no GPU of number {ordinal}")]
    NoDevice {
        /// The number that was asked for.
        ordinal: usize,
    },
    /// This program has no kernels for the GPU, and none could be made.
    #[error("there are no kernels for {name} (compute capability {}.{}): this program has them for {built}, and {hint}",
        .capability.0, .capability.1)]
    Architecture {
        /// The GPU.
        name: String,
        /// Its compute capability.
        capability: (i32, i32),
        /// What there are kernels for.
        built: String,
        /// Why none could be made, and what to do.
        hint: String,
    },
    /// The GPU has no memory left.
    #[error("the GPU has no memory left")]
    OutOfMemory,
    /// A kernel failed. The context cannot be used any more, nor can any other of this process.
    #[error("a kernel failed on the GPU ({0}); the program has to be started again")]
    Kernel(String),
    /// The GPU is gone.
    #[error("the GPU was lost ({0}); look at the kernel's log (dmesg), then start the program again")]
    Lost(String),
    /// The kernels inside this program cannot be had.
    #[error(transparent)]
    Image(#[from] super::images::ImageError),
    /// The kernels could not be compiled for the GPU.
    #[error(transparent)]
    Compile(#[from] super::CompileError),
    /// The GPU does not compute what the CPU does.
    #[error(
        "the GPU failed the test of its kernels: {what}; it is not used. Please report this with the output of candor doctor"
    )]
    SelfTest {
        /// The operation that differs, or its error.
        what: String,
    },
    /// Anything else the driver says.
    #[error("the CUDA driver says {0}")]
    Driver(String),
}

impl From<DriverError> for CudaError {
    fn from(error: DriverError) -> Self {
        use sys::cudaError_enum as code;
        let name = format!("{:?}", error.0);
        match error.0 {
            code::CUDA_ERROR_OUT_OF_MEMORY => CudaError::OutOfMemory,
            code::CUDA_ERROR_LAUNCH_FAILED
            | code::CUDA_ERROR_ILLEGAL_ADDRESS
            | code::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | code::CUDA_ERROR_MISALIGNED_ADDRESS
            | code::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | code::CUDA_ERROR_INVALID_PC
            | code::CUDA_ERROR_HARDWARE_STACK_ERROR
            | code::CUDA_ERROR_ASSERT
            | code::CUDA_ERROR_LAUNCH_TIMEOUT => CudaError::Kernel(name),
            code::CUDA_ERROR_DEVICE_UNAVAILABLE
            | code::CUDA_ERROR_ECC_UNCORRECTABLE
            | code::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | code::CUDA_ERROR_DEINITIALIZED => CudaError::Lost(name),
            _ => CudaError::Driver(name),
        }
    }
}

/// An error of the driver as that of an operation that asked for `bytes`.
pub(super) fn failed(op: &'static str, bytes: usize) -> impl FnOnce(DriverError) -> DeviceError {
    move |error| match CudaError::from(error) {
        source @ CudaError::OutOfMemory => DeviceError::GpuOutOfMemory { bytes, source },
        source => DeviceError::Cuda { op, source },
    }
}

/// The version that `cudarc` and the kernels are built for; drivers of the same major version run them.
const NEEDED: &str = "12.0";
const NEEDED_NUMBER: i32 = 12_000;

/// Every function of the driver that is called, by `cudarc` or by us.
const FUNCTIONS: [&str; 45] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuCtxGetCurrent",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemHostRegister_v2",
    "cuMemHostGetDevicePointer_v2",
    "cuMemHostUnregister",
    "cuMemsetD8Async",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemGetInfo_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuEventDestroy_v2",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuLaunchKernel",
    "cuLaunchCooperativeKernel",
    "cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags",
    "cuGraphCreate",
    "cuGraphAddKernelNode_v2",
    "cuGraphKernelNodeSetAttribute",
    "cuGraphInstantiateWithFlags",
    "cuGraphExecKernelNodeSetParams_v2",
    "cuGraphLaunch",
    "cuGraphExecDestroy",
    "cuGraphDestroy",
    "cuGetErrorString",
];

/// A GPU, opened.
#[derive(Debug)]
pub(super) struct Gpu {
    pub(super) context: Arc<CudaContext>,
    pub(super) stream: Arc<CudaStream>,
    pub(super) name: String,
    pub(super) capability: (i32, i32),
    /// As the driver counts: 12 060 for CUDA 12.6.
    pub(super) driver: i32,
    /// Whether it shares its memory with the processor.
    pub(super) integrated: bool,
    /// Whether it may be able to read the processor's memory where a file is mapped.
    pub(super) maps: bool,
}

/// Opens GPU number `ordinal`.
pub(super) fn open(ordinal: usize) -> Result<Gpu, CudaError> {
    check_driver()?;
    if let Err(error) = cudarc::driver::result::init() {
        return Err(no_device(error, ordinal));
    }
    let driver = driver_version()?;
    if driver < NEEDED_NUMBER {
        let function = format!("more than CUDA {}.{}", driver / 1000, driver % 1000 / 10);
        return Err(CudaError::DriverTooOld { function, needed: NEEDED });
    }
    let count = CudaContext::device_count().map_err(|error| no_device(error, ordinal))?;
    if usize::try_from(count).is_ok_and(|count| ordinal >= count) {
        return Err(CudaError::NoDevice { ordinal });
    }
    let context = CudaContext::new(ordinal).map_err(|error| no_device(error, ordinal))?;
    // SAFETY: every operation goes to the one stream made below, which keeps their order, so that no events are needed.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream()?;
    use sys::CUdevice_attribute_enum as attribute;
    let has = |what| context.attribute(what).map(|value| value > 0);
    let integrated = has(attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED)?;
    let maps = integrated
        && has(attribute::CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY)?
        && has(attribute::CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED)?
        && has(attribute::CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED)?;
    let (name, capability) = (context.name()?, context.compute_capability()?);
    Ok(Gpu { context, stream, name, capability, driver, integrated, maps })
}

/// A GPU that the driver names.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its number.
    pub ordinal: usize,
    /// What its maker calls it.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Bytes of memory.
    pub memory: usize,
}

/// Every GPU that the driver names.
pub(super) fn all() -> Result<Vec<Found>, CudaError> {
    use cudarc::driver::result::{device, init};
    use sys::CUdevice_attribute_enum as attribute;
    check_driver()?;
    init().map_err(|error| no_device(error, 0))?;
    let count = device::get_count().map_err(|error| no_device(error, 0))?;
    let find = |ordinal: i32| -> Result<Found, CudaError> {
        let device = device::get(ordinal)?;
        // SAFETY: the device is one of those that were counted.
        let (major, minor, memory) = unsafe {
            (
                device::get_attribute(device, attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                device::get_attribute(device, attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
                device::total_mem(device)?,
            )
        };
        let name = device::get_name(device)?;
        Ok(Found { ordinal: ordinal as usize, name, capability: (major, minor), memory })
    };
    (0..count).map(find).collect()
}

fn no_device(error: DriverError, ordinal: usize) -> CudaError {
    use sys::cudaError_enum as code;
    match error.0 {
        code::CUDA_ERROR_NO_DEVICE | code::CUDA_ERROR_INVALID_DEVICE => CudaError::NoDevice { ordinal },
        _ => error.into(),
    }
}

/// Whether libcuda is there with every function that is called.
fn check_driver() -> Result<(), CudaError> {
    // SAFETY: loading the driver runs its initialisers, which is what it is for; a library of this name is the driver.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    // SAFETY: as above; it is there, so this does not panic.
    let library = unsafe { sys::culib() };
    for function in FUNCTIONS {
        // SAFETY: the function is looked up and not called.
        if unsafe { library.get::<unsafe extern "C" fn()>(function.as_bytes()) }.is_err() {
            return Err(CudaError::DriverTooOld { function: function.to_owned(), needed: NEEDED });
        }
    }
    Ok(())
}

/// The first of these libraries of CUDA (as "cublas") that cannot be opened here.
pub fn missing_library(names: &[&'static str]) -> Option<&'static str> {
    let is_there = |name: &str| {
        // SAFETY: loading a library of CUDA runs its initialisers, which is what it is for.
        cudarc::get_lib_name_candidates(name).iter().any(|file| unsafe { libloading::Library::new(file) }.is_ok())
    };
    names.iter().copied().find(|name| !is_there(name))
}

fn driver_version() -> Result<i32, CudaError> {
    let mut version = 0;
    // SAFETY: the function is there, and writes to the number it is given.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result()?;
    Ok(version)
}
