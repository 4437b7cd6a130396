//! A watcher on whichever device is to be had. Where `auto` takes a GPU and that fails, the processor goes on, with the same window.

use std::error::Error;
use std::path::PathBuf;

use candor_kernels::Device;
use candor_kernels::cpu::CpuDevice;
use candor_kernels::cuda::{CudaDevice, CudaError};

use super::plan::{Pictures, Plan, PlanError};
use super::watcher::{WatchError, WatchSettings, Watcher};
use crate::device::{Choice, ChoiceError, Chosen, gpu_memory};
use crate::media::sampling::SettingsError;
use crate::media::{Window, WindowSettings};
use crate::message::one_line;
use crate::metrics::Fallback;
use crate::observation::Observation;

/// What is to watch, and where.
#[derive(Clone, Debug)]
pub struct Order {
    /// Folder of the model.
    pub model: PathBuf,
    /// Folder of the verifier.
    pub verifier: PathBuf,
    /// Folder of an adapter beside the model.
    pub adapter: Option<PathBuf>,
    /// What a user decides.
    pub settings: WatchSettings,
    /// The device.
    pub device: Choice,
    /// Threads of the processor.
    pub threads: Option<usize>,
    /// Says how much memory may be taken, where the plan is to be held against it.
    pub available: Option<fn() -> Option<u64>>,
}

/// Why there is no watcher, or no observation.
#[derive(Debug, thiserror::Error)]
pub enum AnyWatcherError {
    /// The device.
    #[error(transparent)]
    Choice(#[from] ChoiceError),
    /// There is no room.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The times of windows.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// Anything else.
    #[error(transparent)]
    Watch(#[from] WatchError),
}

/// A [`Watcher`] on a device.
pub struct AnyWatcher {
    order: Order,
    /// None where the GPU failed, and nothing could be opened in its place yet.
    on: Option<On>,
}

enum On {
    Cpu(Box<Watcher<CpuDevice>>),
    Cuda(Box<Watcher<CudaDevice>>),
}

impl AnyWatcher {
    /// Opens the device, the model, its verifier and adapter.
    ///
    /// # Errors
    /// Where the device that was asked for cannot be had, there is too little memory, or as [`Watcher::open`].
    pub fn open(order: Order) -> Result<AnyWatcher, AnyWatcherError> {
        let device = order.device.open(order.threads)?;
        AnyWatcher::open_on(device, order)
    }

    /// The same on a device that is open.
    ///
    /// # Errors
    /// As [`AnyWatcher::open`].
    pub fn open_on(device: Chosen, order: Order) -> Result<AnyWatcher, AnyWatcherError> {
        let on = match device {
            Chosen::Cpu(device) => order.on_cpu(device)?,
            Chosen::Cuda(device) => order.on_gpu(device).or_else(|error| order.without_gpu(error))?,
        };
        Ok(AnyWatcher { order, on: Some(on) })
    }

    /// As [`Watcher::windows`].
    ///
    /// # Errors
    /// Times that make no windows; and as [`AnyWatcher::observe`].
    pub fn windows(&mut self, window_s: Option<f64>, step_s: Option<f64>) -> Result<WindowSettings, AnyWatcherError> {
        Ok(match self.on()? {
            On::Cpu(watcher) => watcher.windows(window_s, step_s)?,
            On::Cuda(watcher) => watcher.windows(window_s, step_s)?,
        })
    }

    /// As [`Watcher::observe`].
    ///
    /// # Errors
    /// The same, and those of [`AnyWatcher::open`] where the processor has to take a GPU's place and cannot.
    pub fn observe(&mut self, source: &str, window: &Window) -> Result<Observation, AnyWatcherError> {
        let error = match self.on()? {
            On::Cpu(watcher) => return Ok(watcher.observe(source, window)?),
            On::Cuda(watcher) => match watcher.observe(source, window) {
                Ok(observation) => return Ok(observation),
                Err(error) => AnyWatcherError::from(error),
            },
        };
        if self.order.goes_on_without(&error).is_none() {
            return Err(error);
        }
        // First: its memory may be the processor's.
        self.on = None;
        self.on = Some(self.order.without_gpu(error)?);
        self.observe(source, window)
    }

    fn on(&mut self) -> Result<&mut On, AnyWatcherError> {
        let on = match self.on.take() {
            Some(on) => on,
            None => self.order.on_cpu(CpuDevice::new(self.order.threads))?,
        };
        Ok(self.on.insert(on))
    }
}

impl Order {
    fn on_cpu(&self, device: CpuDevice) -> Result<On, AnyWatcherError> {
        if let Some(available) = self.available {
            Plan::new(&self.model, &self.verifier, device.clone(), Pictures::default())?.check(available())?;
        }
        Ok(On::Cpu(self.watcher(device)?))
    }

    fn on_gpu(&self, device: CudaDevice) -> Result<On, AnyWatcherError> {
        if let Some(available) = self.available {
            let plan = Plan::on_gpu(&self.model, &self.verifier, Pictures::default())?;
            let free = gpu_memory(&device).map_err(|error| WatchError::Model(error.into()))?;
            plan.check_with_gpu(available(), free)?;
        }
        Ok(On::Cuda(self.watcher(device)?))
    }

    fn watcher<D: Device>(&self, device: D) -> Result<Box<Watcher<D>>, WatchError> {
        let mut watcher = Watcher::open(&self.model, Some(&self.verifier), device, self.settings)?;
        if let Some(adapter) = &self.adapter {
            watcher.adapt(adapter)?;
        }
        Ok(Box::new(watcher))
    }

    /// Why the processor is to take the GPU's place, where it may and the error is the GPU's.
    fn goes_on_without(&self, error: &(dyn Error + 'static)) -> Option<Fallback> {
        if self.device == Choice::Auto { of_the_gpu(error) } else { None }
    }

    /// On the processor, where it is to take the GPU's place.
    fn without_gpu(&self, error: AnyWatcherError) -> Result<On, AnyWatcherError> {
        let Some(fallback) = self.goes_on_without(&error) else { return Err(error) };
        fallback.count();
        log::warn!("{}: the processor goes on", one_line(&error));
        self.on_cpu(CpuDevice::new(self.threads))
    }
}

/// What failed on the GPU, if that is why.
fn of_the_gpu(error: &(dyn Error + 'static)) -> Option<Fallback> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<CudaError>() {
            return Some(error.into());
        }
        if let Some(AnyWatcherError::Plan(PlanError::Short { .. } | PlanError::ShortOnGpu { .. })) =
            error.downcast_ref()
        {
            return Some(Fallback::Memory);
        }
        cause = error.source();
    }
    None
}
