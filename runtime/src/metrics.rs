//! What this process counts, for who watches over it: in Prometheus' text format.

use std::fmt::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{fs, io};

use candor_kernels::cuda::CudaError;

/// Why a processor computes in the place of a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallback {
    /// There is no driver for CUDA.
    NoDriver,
    /// The driver is older than what is needed.
    DriverTooOld,
    /// The driver has no GPU.
    NoDevice,
    /// There are no kernels for the GPU.
    NoKernels,
    /// The GPU has too little memory.
    Memory,
    /// A kernel failed.
    Kernel,
    /// The GPU is gone.
    Lost,
    /// The GPU does not compute what the processor does.
    SelfTest,
    /// Anything else the driver says.
    Driver,
}

impl Fallback {
    const ALL: [(Fallback, &str); 9] = [
        (Fallback::NoDriver, "no_driver"),
        (Fallback::DriverTooOld, "driver_too_old"),
        (Fallback::NoDevice, "no_device"),
        (Fallback::NoKernels, "no_kernels"),
        (Fallback::Memory, "memory"),
        (Fallback::Kernel, "kernel"),
        (Fallback::Lost, "lost"),
        (Fallback::SelfTest, "self_test"),
        (Fallback::Driver, "driver"),
    ];

    /// Counts one more.
    pub fn count(self) {
        FALLBACKS[self as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How many there were.
    pub fn counted(self) -> u64 {
        FALLBACKS[self as usize].load(Ordering::Relaxed)
    }
}

impl From<&CudaError> for Fallback {
    fn from(error: &CudaError) -> Self {
        match error {
            CudaError::NoDriver => Fallback::NoDriver,
            CudaError::DriverTooOld { .. } => Fallback::DriverTooOld,
            CudaError::NoDevice { .. } => Fallback::NoDevice,
            CudaError::Architecture { .. } | CudaError::Image(_) | CudaError::Compile(_) => Fallback::NoKernels,
            CudaError::OutOfMemory => Fallback::Memory,
            CudaError::Kernel(_) => Fallback::Kernel,
            CudaError::Lost(_) => Fallback::Lost,
            CudaError::SelfTest { .. } => Fallback::SelfTest,
            _ => Fallback::Driver,
        }
    }
}

static FALLBACKS: [AtomicU64; Fallback::ALL.len()] = [const { AtomicU64::new(0) }; Fallback::ALL.len()];

/// All counters.
pub fn text() -> String {
    let mut text = String::from(
        "# HELP candor_device_fallbacks_total Times that the processor took the place of a GPU.\n\
         # TYPE candor_device_fallbacks_total counter\n",
    );
    for (fallback, reason) in Fallback::ALL {
        let _ = writeln!(text, "candor_device_fallbacks_total{{reason=\"{reason}\"}} {}", fallback.counted());
    }
    text
}

/// Writes all counters to a file, which is never seen half written.
///
/// # Errors
/// What the system says of the file, or of the one beside it that becomes it.
pub fn write(path: &Path) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    fs::write(&beside, text())?;
    fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn counters_have_names() {
        for (at, (fallback, _)) in Fallback::ALL.into_iter().enumerate() {
            assert_eq!(fallback as usize, at);
        }
        let before = Fallback::SelfTest.counted();
        Fallback::SelfTest.count();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("candor.prom");
        write(&path).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let line = format!("candor_device_fallbacks_total{{reason=\"self_test\"}} {}\n", before + 1);
        assert!(text.contains(&line), "{text}");
        assert_eq!(text.lines().count(), 2 + Fallback::ALL.len());
        assert!(write(&folder.path().join("none/candor.prom")).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
