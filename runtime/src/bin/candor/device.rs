//! `--device`: where a model is computed.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result};
use candor::watch::GpuMemory;
use candor_kernels::cpu::CpuDevice;
use candor_kernels::cuda::{CudaDevice, CudaError};

/// What `--device` names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// A GPU if one can be used, else the processor.
    Auto,
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

/// A device that was opened.
pub(crate) enum Chosen {
    Cpu(CpuDevice),
    Cuda(CudaDevice),
}

impl Choice {
    /// Opens the device. Why `auto` takes the processor goes to the log, once.
    pub(crate) fn open(self, threads: Option<usize>) -> Result<Chosen> {
        let cpu = || Chosen::Cpu(CpuDevice::new(threads));
        match self {
            Choice::Cpu => Ok(cpu()),
            Choice::Cuda(number) => {
                let device = CudaDevice::open(number).with_context(|| format!("--device {self}"))?;
                Ok(Chosen::Cuda(device))
            }
            Choice::Auto => match CudaDevice::open(0) {
                Ok(device) => Ok(Chosen::Cuda(device)),
                Err(error @ (CudaError::NoDriver | CudaError::NoDevice { .. })) => {
                    log::info!("{error}: the processor computes");
                    Ok(cpu())
                }
                Err(error) => {
                    log::warn!("{error}: the processor computes");
                    Ok(cpu())
                }
            },
        }
    }
}

/// What a GPU has of memory.
pub(crate) fn gpu_memory(device: &CudaDevice) -> Result<GpuMemory> {
    let (free, total) = device.memory()?;
    Ok(GpuMemory { free: free as u64, total: total as u64, shared: device.is_integrated() })
}

/// Runs `$body` with the device in `$chosen`, whichever it is.
macro_rules! with_device {
    ($chosen:expr, $device:ident => $body:expr) => {
        match $chosen {
            $crate::device::Chosen::Cpu($device) => $body,
            $crate::device::Chosen::Cuda($device) => $body,
        }
    };
}
pub(crate) use with_device;

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
