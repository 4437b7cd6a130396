//! `--device`: where a model is computed, as every program of Candor takes it.

use std::fmt;
use std::str::FromStr;

use crate::metrics::Fallback;
use crate::watch::GpuMemory;
use candor_kernels::DeviceError;
use candor_kernels::cpu::CpuDevice;
use candor_kernels::cuda::{CudaDevice, CudaError};

/// What `--device` names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// A GPU if one can be used, else the processor.
    Auto,
    /// The processor.
    Cpu,
    /// The GPU of this number, or an error.
    Cuda(usize),
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "auto" => Ok(Choice::Auto),
            None if text == "cpu" => Ok(Choice::Cpu),
            None if text == "cuda" => Ok(Choice::Cuda(0)),
            Some(("cuda", number)) => {
                number.parse().map(Choice::Cuda).map_err(|_| format!("{number} is not the number of a GPU"))
            }
            _ => Err("known are auto, cpu, cuda and cuda:N".to_owned()),
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Choice::Auto => f.write_str("auto"),
            Choice::Cpu => f.write_str("cpu"),
            Choice::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

/// A device that was opened. [`with_device!`](crate::with_device) runs code on whichever it is.
#[derive(Clone, Debug)]
pub enum Chosen {
    /// The processor.
    Cpu(CpuDevice),
    /// A GPU.
    Cuda(CudaDevice),
}

/// Why the device that was asked for cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("--device {choice}")]
pub struct ChoiceError {
    /// What was asked for.
    pub choice: Choice,
    /// What is the matter with it.
    pub source: CudaError,
}

impl Chosen {
    /// The same with activations in f32 everywhere.
    pub fn exact(self) -> Chosen {
        match self {
            Chosen::Cpu(device) => Chosen::Cpu(device.exact()),
            Chosen::Cuda(device) => Chosen::Cuda(device.exact()),
        }
    }
}

impl Choice {
    /// Opens the device; the processor with `threads` threads (see [`CpuDevice::new`]). That `auto` takes the processor is
    /// counted ([`metrics`](crate::metrics)), and why goes to the log, once.
    ///
    /// # Errors
    /// Where a GPU is asked for by its number and cannot be used.
    pub fn open(self, threads: Option<usize>) -> Result<Chosen, ChoiceError> {
        let cpu = || Chosen::Cpu(CpuDevice::new(threads));
        match self {
            Choice::Cpu => Ok(cpu()),
            Choice::Cuda(number) => {
                CudaDevice::open(number).map(Chosen::Cuda).map_err(|source| ChoiceError { choice: self, source })
            }
            Choice::Auto => match CudaDevice::open(0) {
                Ok(device) => Ok(Chosen::Cuda(device)),
                Err(error) => {
                    Fallback::from(&error).count();
                    // Who has no GPU need not hear of it each time.
                    let usual = matches!(error, CudaError::NoDriver | CudaError::NoDevice { .. });
                    let level = if usual { log::Level::Info } else { log::Level::Warn };
                    log::log!(level, "{error}: the processor computes");
                    Ok(cpu())
                }
            },
        }
    }
}

/// What a GPU has of memory.
///
/// # Errors
/// What the driver says.
pub fn gpu_memory(device: &CudaDevice) -> Result<GpuMemory, DeviceError> {
    let (free, total) = device.memory()?;
    Ok(GpuMemory { free: free as u64, total: total as u64, shared: device.is_integrated() })
}

/// Runs `$body` with the device in a [`Chosen`](crate::device::Chosen), whichever it is.
#[macro_export]
macro_rules! with_device {
    ($chosen:expr, $device:ident => $body:expr) => {
        match $chosen {
            $crate::device::Chosen::Cpu($device) => $body,
            $crate::device::Chosen::Cuda($device) => $body,
        }
    };
}
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (text, choice) in
            [("auto", Choice::Auto), ("cpu", Choice::Cpu), ("cuda", Choice::Cuda(0)), ("cuda:3", Choice::Cuda(3))]
        {
            assert_eq!(text.parse(), Ok(choice));
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0"] {
            assert!(text.parse::<Choice>().is_err(), "{text}");
        }
    }
}
