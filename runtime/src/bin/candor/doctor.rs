//! `candor doctor`: what this machine gives, which kernels were chosen for it, and whether a window can be processed.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};
use candor::device::Choice;
use candor::manifest::{Manifest, ManifestError};
#[cfg(feature = "media")]
use candor::media::Installed;
use candor::message::{one_line, say};
use candor::watch::{WatchSettings, Watcher};
use candor_kernels::Device;
use candor_kernels::cpu::{CpuDevice, KernelReport, measure_read_bandwidth};
use candor_kernels::cuda::{CudaDevice, CudaError, images};
use serde::Serialize;

use crate::{folders, machine, plan};

/// Larger than the caches of the processors this runs on.
const ROOF_BYTES: u64 = 256 << 20;

/// Say what this machine gives, what was chosen for it, and whether everything is there to watch.
#[derive(clap::Args)]
pub(crate) struct Doctor {
    /// Folder of the model; else $CANDOR_MODEL, else models/default here or above the program.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Folder of the verifier; else the one that the model names, else as --model with default-verifier.
    #[arg(long, value_name = "DIR")]
    verifier: Option<PathBuf>,
    /// Where watching is to compute: auto (a GPU if one can be used, else the processor), cpu, cuda or cuda:N. A GPU that
    /// is named and cannot be used is a problem.
    #[arg(long, default_value_t = Choice::Auto)]
    device: Choice,
    /// Threads of the processor; one for each core if not given.
    #[arg(long)]
    threads: Option<usize>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    processor: Processor,
    kernels: Kernels,
    threads: Threads,
    memory: Memory,
    /// None in a build without cameras and files.
    #[cfg(feature = "media")]
    media: Option<Installed>,
    /// Architectures that this program has kernels for, such as sm_87.
    cubins: Vec<String>,
    /// GPUs that the driver names.
    devices: Vec<Gpu>,
    model: Option<Folder>,
    verifier: Option<Folder>,
    /// How long it takes to open both.
    open_ms: Option<f64>,
    ready: bool,
    /// What keeps a window from being processed, and what to do.
    problems: Vec<String>,
    /// What does not.
    remarks: Vec<String>,
}

#[derive(Serialize)]
struct Gpu {
    number: usize,
    name: String,
    compute_capability: String,
    memory_mb: f64,
    /// What of it nobody uses; none where the GPU cannot be used.
    free_mb: Option<f64>,
    /// Whether every kernel was run on it and computed what the processor does.
    usable: bool,
    /// What it is in use, or why it cannot be used.
    about: String,
}

#[derive(Serialize)]
struct Processor {
    name: Option<String>,
    board: Option<String>,
    architecture: &'static str,
    features: Vec<&'static str>,
}

#[derive(Serialize)]
struct Kernels {
    level: &'static str,
    levels: Vec<&'static str>,
    /// What CANDOR_CPU names, if it is set.
    candor_cpu: Option<String>,
    /// Whether that decided.
    forced: bool,
    f32: &'static str,
    int8: &'static str,
    int4: &'static str,
}

#[derive(Serialize)]
struct Threads {
    used: usize,
    /// Cores that the system lets this process use.
    allowed: usize,
    /// Cores' worth of time that the control group may take.
    quota: Option<f64>,
}

#[derive(Serialize)]
struct Memory {
    total_mb: Option<f64>,
    available_mb: Option<f64>,
    /// The control group's limit.
    limit_mb: Option<f64>,
    read_gb_s: f64,
}

#[derive(Serialize)]
struct Folder {
    folder: PathBuf,
    name: String,
    version: String,
    /// Whether every file has the sha256 of the manifest; none where the manifest lists none.
    as_listed: Option<bool>,
    sha256: Option<String>,
}

/// What was found wrong so far.
#[derive(Default)]
struct Findings {
    problems: Vec<String>,
    remarks: Vec<String>,
}

impl Findings {
    /// The value; where there is none, why.
    fn keep<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.problems.push(one_line(error.as_ref()))).ok()
    }
}

pub(crate) fn run(arguments: &Doctor) -> Result<()> {
    let report = examine(arguments);
    if arguments.json {
        say(serde_json::to_string(&report)?)?;
    } else {
        say(text(&report))?;
    }
    match report.problems.len() {
        0 => Ok(()),
        1 => bail!("a problem stands above"),
        several => bail!("{several} problems stand above"),
    }
}

fn examine(arguments: &Doctor) -> Report {
    let mut found = Findings::default();
    let device = CpuDevice::new(arguments.threads);
    let kernels = kernels(&mut found);
    let memory = memory(&device);
    let devices = gpus(arguments.device, &mut found);
    #[cfg(feature = "media")]
    let media = media(&mut found);
    #[cfg(not(feature = "media"))]
    found.remarks.push("this build has no cameras and files (feature media)".to_string());

    let folder = found.keep(folders::model(arguments.model.clone()));
    let model = folder.as_deref().and_then(|folder| check(folder, &mut found));
    let verifier = match &folder {
        Some(folder) => found.keep(plan::verifier(folder, arguments.verifier.clone())),
        None => None,
    };
    let checked = verifier.as_deref().and_then(|folder| check(folder, &mut found));
    let open_ms = match (&folder, &verifier) {
        (Some(folder), Some(verifier)) => found.keep(open(folder, verifier, &device)),
        _ => None,
    };
    let report = KernelReport::new();
    let allowed = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Report {
        version: env!("CARGO_PKG_VERSION"),
        processor: Processor {
            name: machine::processor(),
            board: machine::board(),
            architecture: std::env::consts::ARCH,
            features: report.features,
        },
        kernels,
        threads: Threads { used: device.pool().threads(), allowed, quota: machine::cpu_quota() },
        memory,
        #[cfg(feature = "media")]
        media,
        cubins: images::architectures().iter().map(|number| format!("sm_{number}")).collect(),
        devices,
        model,
        verifier: checked,
        open_ms,
        ready: found.problems.is_empty(),
        problems: found.problems,
        remarks: found.remarks,
    }
}

fn kernels(found: &mut Findings) -> Kernels {
    let report = KernelReport::new();
    let (forced, levels) = (report.forced(), CpuDevice::levels());
    match &report.asked {
        Some(asked) if !forced => {
            found.remarks.push(format!("CANDOR_CPU={asked} is ignored: this processor has {}", levels.join(", ")));
        }
        _ => {}
    }
    if report.level == "portable" && !forced {
        found
            .remarks
            .push("this processor has no vectors that Candor knows: the slow portable kernels are used".into());
    }
    Kernels {
        level: report.level,
        levels,
        forced,
        candor_cpu: report.asked,
        f32: report.float,
        int8: report.bytes,
        int4: report.bytes,
    }
}

/// Every GPU, and whether it can be used. A GPU that was asked for and cannot be used is a problem, any other a remark.
fn gpus(choice: Choice, found: &mut Findings) -> Vec<Gpu> {
    if choice == Choice::Cpu {
        return Vec::new();
    }
    let all = match CudaDevice::all() {
        Ok(all) => all,
        Err(error) => {
            match (choice, &error) {
                (Choice::Cuda(_), _) => found.problems.push(format!("--device {choice}: {error}")),
                (_, CudaError::NoDriver | CudaError::NoDevice { .. }) => {}
                _ => found.remarks.push(format!("{error}: the processor computes")),
            }
            return Vec::new();
        }
    };
    if let Choice::Cuda(number) = choice
        && number >= all.len()
    {
        found.problems.push(format!("--device {choice}: there are {} GPUs", all.len()));
    }
    all.into_iter()
        .map(|gpu| {
            let (usable, free, about) = match CudaDevice::open(gpu.ordinal) {
                Ok(device) => (true, device.memory().ok(), device.describe()),
                Err(error) => (false, None, error.to_string()),
            };
            if !usable && choice == Choice::Cuda(gpu.ordinal) {
                found.problems.push(format!("--device {choice}: {about}"));
            } else if !usable {
                found.remarks.push(format!("GPU {}: {about}", gpu.ordinal));
            }
            Gpu {
                number: gpu.ordinal,
                name: gpu.name,
                compute_capability: format!("{}.{}", gpu.capability.0, gpu.capability.1),
                memory_mb: gpu.memory as f64 / 1e6,
                free_mb: free.map(|(free, _)| free as f64 / 1e6),
                usable,
                about,
            }
        })
        .collect()
}

fn memory(device: &CpuDevice) -> Memory {
    let mb = |bytes: Option<u64>| bytes.map(|bytes| bytes as f64 / 1e6);
    let room = machine::memory_available().map_or(ROOF_BYTES, |bytes| bytes / 4);
    Memory {
        total_mb: mb(machine::memory("MemTotal")),
        available_mb: mb(machine::memory("MemAvailable")),
        limit_mb: mb(machine::memory_limit()),
        read_gb_s: measure_read_bandwidth(device.pool(), ROOF_BYTES.min(room) as usize),
    }
}

#[cfg(feature = "media")]
fn media(found: &mut Findings) -> Option<Installed> {
    let installed = found.keep(Installed::find().map_err(anyhow::Error::from))?;
    for element in installed.elements.iter().filter(|element| element.needed && !element.found) {
        found.problems.push(format!(
            "GStreamer has no {}, which {} needs; install gstreamer1.0-plugins-base",
            element.name, element.purpose
        ));
    }
    Some(installed)
}

/// What a folder says of itself, and whether its files are those that it lists.
fn check(folder: &Path, found: &mut Findings) -> Option<Folder> {
    let manifest = found.keep(Manifest::open(folder).map_err(anyhow::Error::from))?;
    let as_listed = match manifest.check_files() {
        Ok(()) => Some(true),
        Err(error @ ManifestError::Unsealed { .. }) => {
            found.remarks.push(one_line(&error));
            None
        }
        Err(error) => {
            found.problems.push(one_line(&error));
            Some(false)
        }
    };
    Some(Folder {
        folder: folder.to_path_buf(),
        name: manifest.model.name.clone(),
        version: manifest.model.version.clone(),
        as_listed,
        sha256: manifest.identity().ok().filter(|_| as_listed != Some(false)),
    })
}

/// Opens everything that a window is processed with, and says how long it took.
fn open(model: &Path, verifier: &Path, device: &CpuDevice) -> Result<f64> {
    let start = Instant::now();
    Watcher::open(model, Some(verifier), device.clone(), WatchSettings::default())?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

fn text(report: &Report) -> String {
    let mut lines = Vec::new();
    let mut line = |name: &str, value: String| lines.push(format!("{name:<10} {value}"));
    line("candor", report.version.to_string());
    let processor = &report.processor;
    let name = processor.name.as_deref().unwrap_or("unknown");
    line("processor", format!("{name}, {}: {}", processor.architecture, processor.features.join(" ")));
    if let Some(board) = &processor.board {
        line("board", board.clone());
    }
    let kernels = &report.kernels;
    let why = match (&kernels.candor_cpu, kernels.forced) {
        (Some(_), true) => "forced by CANDOR_CPU".to_string(),
        (Some(asked), false) => format!("the best; CANDOR_CPU={asked} is ignored"),
        (None, _) => "the best".to_string(),
    };
    line("kernels", format!("{} ({why}) of {}", kernels.level, kernels.levels.join(", ")));
    line("", format!("f32 {}; int8 {}; int4 {}", kernels.f32, kernels.int8, kernels.int4));
    let threads = &report.threads;
    let quota =
        threads.quota.map_or(String::new(), |quota| format!("; the control group may take {quota} cores' time"));
    line("threads", format!("{} of {} cores allowed{quota}", threads.used, threads.allowed));
    let memory = &report.memory;
    let mb = |mb: Option<f64>| mb.map_or("unknown".to_string(), |mb| format!("{mb:.0} MB"));
    let limit = memory.limit_mb.map_or(String::new(), |limit| format!(", limit {limit:.0} MB"));
    let (available, total) = (mb(memory.available_mb), mb(memory.total_mb));
    line("memory", format!("{available} available of {total}{limit}; read at {:.1} GB/s", memory.read_gb_s));
    #[cfg(feature = "media")]
    if let Some(media) = &report.media {
        let with = |found| {
            let names: Vec<&str> = media.elements.iter().filter(|e| e.found == found).map(|e| e.name).collect();
            if names.is_empty() { "none".to_string() } else { names.join(" ") }
        };
        line("media", format!("{}: {}; without: {}", media.version, with(true), with(false)));
    }
    let built = match report.cubins.join(" ") {
        none if none.is_empty() => "none: this program was built without CUDA's compilers (make cuda)".to_string(),
        names => format!("{names}; others are compiled where NVRTC is installed"),
    };
    line("cubins", built);
    if report.devices.is_empty() {
        line("GPU", "none".to_string());
    }
    for gpu in &report.devices {
        let state = if gpu.usable { "used" } else { "NOT used" };
        let Gpu { number, name, memory_mb, free_mb, about, .. } = gpu;
        let free = free_mb.map_or(String::new(), |free| format!(", {free:.0} MB free"));
        line("GPU", format!("{number}: {name}, {memory_mb:.0} MB{free}, {state}: {about}"));
    }
    for (kind, folder) in [("model", &report.model), ("verifier", &report.verifier)] {
        let Some(Folder { folder, name, version, as_listed, sha256 }) = folder else { continue };
        let state = match as_listed {
            Some(true) => format!("files are as listed, sha256 {}", sha256.as_deref().unwrap_or("unknown")),
            Some(false) => "files are not as listed".to_string(),
            None => "files are not listed".to_string(),
        };
        line(kind, format!("{name} {version} in {}: {state}", folder.display()));
    }
    if let Some(ms) = report.open_ms {
        line("opened", format!("in {ms:.0} ms"));
    }
    for remark in &report.remarks {
        line("remark", remark.clone());
    }
    for problem in &report.problems {
        line("PROBLEM", problem.clone());
    }
    if report.ready {
        line("ready", "windows can be processed".to_string());
    }
    lines.join("\n")
}
