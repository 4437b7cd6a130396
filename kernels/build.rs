//! Compiles the CUDA kernels for every target and packs them for src/cuda/images.rs. It needs NVIDIA's compiler as a
//! library (scripts/setup-cuda.sh), no GPU, no driver and no network; without the compiler it leaves the kernels out.
//!
//! CANDOR_CUDA=all makes anything that is missing an error, CANDOR_CUDA=none leaves all kernels out without a word, and
//! CANDOR_CUDA_COMPILERS names another folder than .tools for the compilers.

#[path = "build/nvrtc.rs"]
mod nvrtc;
#[path = "build/plan.rs"]
mod plan;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::{env, fs, io};

use nvrtc::Nvrtc;
use plan::{Sources, TARGETS, Target};

/// zlib's level.
const LEVEL: u8 = 9;
/// Has the compiler tell each kernel's registers, shared memory and spills.
const FIGURES: &str = "--ptxas-options=-v";

fn main() {
    if let Err(error) = run() {
        // Only the first line of a cargo message is shown as such.
        println!("cargo::error=the CUDA kernels: {}", error.lines().next().unwrap_or_default());
        eprintln!("{error}");
        std::process::exit(1);
    }
}

fn run() -> Result<(), String> {
    let package = folder("CARGO_MANIFEST_DIR")?;
    let out = folder("OUT_DIR")?;
    let compilers = plan::compilers(&package);
    watch(&compilers);

    let sources = Sources::read(&package.join("cuda")).map_err(|error| format!("kernels/cuda: {error}"))?;
    let (opened, left_out) = open(&compilers)?;
    let jobs = jobs(&sources, &opened);
    let cubins = out.join("cubins");
    fs::create_dir_all(&cubins).map_err(|error| format!("{}: {error}", cubins.display()))?;
    compile(&jobs, &cubins)?;
    write_tables(&out, &sources, &jobs, &left_out).map_err(|error| format!("{}: {error}", out.display()))?;
    // A build without the compilers does not cost the next one with them its results.
    if left_out.is_empty() {
        clean(&jobs, &cubins);
    }
    // Tests that need the compilers are ignored, with a word, unless all of them are there.
    println!("cargo::rustc-check-cfg=cfg(cuda_compilers)");
    if left_out.is_empty() {
        println!("cargo::rustc-cfg=cuda_compilers");
    }
    Ok(())
}

fn folder(variable: &str) -> Result<PathBuf, String> {
    env::var_os(variable).map(PathBuf::from).ok_or_else(|| format!("{variable} is not set: cargo runs this"))
}

/// Tells cargo what the result depends on.
fn watch(compilers: &Path) {
    for variable in ["CANDOR_CUDA", "CANDOR_CUDA_COMPILERS"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    // The folder, so that a new file is seen; scripts/setup-cuda.sh touches it when it has fetched a compiler.
    for path in ["build.rs", "build", "cuda"] {
        println!("cargo::rerun-if-changed={path}");
    }
    // A file that is not there would make every build a new one.
    for compiler in TARGETS.map(|target| target.compiler).iter().collect::<BTreeSet<_>>() {
        let list = compilers.join(compiler).join("list.txt");
        if list.exists() {
            println!("cargo::rerun-if-changed={}", list.display());
        }
    }
}

type Opened = BTreeMap<&'static str, Nvrtc>;
type LeftOut = Vec<(String, String)>;

/// Opens the compilers; the targets without one, with the reason.
fn open(folder: &Path) -> Result<(Opened, LeftOut), String> {
    let wish = env::var("CANDOR_CUDA").unwrap_or_default();
    let (mut opened, mut left_out) = (BTreeMap::new(), Vec::new());
    if wish == "none" {
        let reason = "this program was built with CANDOR_CUDA=none";
        left_out.extend(TARGETS.iter().map(|target| (target.name(), reason.to_owned())));
        return Ok((opened, left_out));
    }
    if !["", "all"].contains(&wish.as_str()) {
        return Err(format!("CANDOR_CUDA is {wish:?}; it can be \"all\" or \"none\""));
    }
    for target in &TARGETS {
        if opened.contains_key(target.compiler) {
            continue;
        }
        match Nvrtc::open(&folder.join(target.compiler)) {
            Ok(nvrtc) => drop(opened.insert(target.compiler, nvrtc)),
            Err(error) if wish == "all" => return Err(format!("{}: {error}. Run: make cuda", target.name())),
            Err(_) => left_out.push((target.name(), "this program was built without the compiler for it".to_owned())),
        }
    }
    if !left_out.is_empty() {
        let names: Vec<&str> = left_out.iter().map(|(name, _)| name.as_str()).collect();
        println!("cargo::warning=left out: the GPU kernels for {}. To add them: make cuda", names.join(", "));
    }
    Ok((opened, left_out))
}

/// A family for a target.
struct Job<'a> {
    target: Target,
    family: &'a str,
    text: &'a str,
    headers: Vec<(String, String)>,
    nvrtc: &'a Nvrtc,
    /// Its files below cubins/, named by all that went into it: with `.z` the packed cubin, with `.log` the compiler's words.
    file: String,
}

fn jobs<'a>(sources: &'a Sources, opened: &'a Opened) -> Vec<Job<'a>> {
    let mut jobs = Vec::new();
    for target in TARGETS {
        let Some(nvrtc) = opened.get(target.compiler) else { continue };
        for (family, text) in &sources.families {
            let headers = sources.needed(text);
            let mut hash = DefaultHasher::new();
            (nvrtc.version(), nvrtc::OPTIONS, FIGURES, target.architecture, LEVEL, text, &headers).hash(&mut hash);
            let file = format!("{family}-{}-{:016x}", target.name(), hash.finish());
            jobs.push(Job { target, family, text, headers, nvrtc, file });
        }
    }
    jobs
}

/// Compiles what is not in `folder` yet, on every core that cargo grants.
fn compile(jobs: &[Job<'_>], folder: &Path) -> Result<(), String> {
    let mut missing: Vec<&Job<'_>> = jobs.iter().filter(|job| !folder.join(job.packed()).exists()).collect();
    // Taken from the end: the longest first.
    missing.sort_by_key(|job| job.text.len());
    let workers = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1).min(missing.len());
    let (missing, failed) = (Mutex::new(missing), Mutex::new(None));
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(job) = lock(&missing).pop() {
                    if let Err(error) = job.run(folder) {
                        // One is enough: the other targets' would say the same.
                        lock(&missing).clear();
                        *lock(&failed) = Some(error);
                    }
                }
            });
        }
    });
    let failed = lock(&failed).take();
    failed.map_or(Ok(()), Err)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Job<'_> {
    fn packed(&self) -> String {
        format!("{}.z", self.file)
    }

    fn log(&self) -> String {
        format!("{}.log", self.file)
    }

    fn run(&self, folder: &Path) -> Result<(), String> {
        let compiled = self
            .nvrtc
            .compile(&format!("{}.cu", self.family), self.text, &self.headers, &[&self.target.option(), FIGURES])
            .map_err(|error| format!("{error}\n(for {})", self.target.name()))?;
        let packed = miniz_oxide::deflate::compress_to_vec_zlib(&compiled.cubin, LEVEL);
        // The cubin comes last, and whole or not at all, as its being there says that both are right.
        let part = folder.join(format!("{}.part", self.file));
        fs::write(folder.join(self.log()), compiled.log)
            .and_then(|()| fs::write(&part, packed))
            .and_then(|()| fs::rename(&part, folder.join(self.packed())))
            .map_err(|error| format!("{}: {error}", part.display()))
    }
}

/// Removes what earlier builds left in `folder`.
fn clean(jobs: &[Job<'_>], folder: &Path) {
    let used: BTreeSet<OsString> = jobs.iter().flat_map(|job| [job.packed().into(), job.log().into()]).collect();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if !used.contains(&entry.file_name()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Writes the tables that src/cuda/images.rs and tests/cuda_table include.
fn write_tables(out: &Path, sources: &Sources, jobs: &[Job<'_>], left_out: &LeftOut) -> io::Result<()> {
    let mut table = String::from("pub(super) static IMAGES: &[(u32, &str, &[u8])] = &[\n");
    let mut logs = String::from("pub(super) static LOGS: &[(u32, &str, &str)] = &[\n");
    for job in jobs {
        let (architecture, family) = (job.target.architecture, job.family);
        let packed = include("include_bytes", &format!("cubins/{}", job.packed()));
        let _ = writeln!(table, "    ({architecture}, {family:?}, {packed}),");
        let log = include("include_str", &format!("cubins/{}", job.log()));
        let _ = writeln!(logs, "    ({architecture}, {family:?}, {log}),");
    }
    logs.push_str("];\n");
    let _ = writeln!(table, "];\npub(super) static LEFT_OUT: &[(&str, &str)] = &{left_out:?};");
    for (name, files) in [("FAMILIES", &sources.families), ("HEADERS", &sources.headers)] {
        let _ = writeln!(table, "pub(super) static {name}: &[(&str, &[u8])] = &[");
        for (file, text) in files {
            let path = format!("{}-{file}.z", name.to_lowercase());
            fs::write(out.join(&path), miniz_oxide::deflate::compress_to_vec_zlib(text.as_bytes(), LEVEL))?;
            let _ = writeln!(table, "    ({file:?}, {}),", include("include_bytes", &path));
        }
        table.push_str("];\n");
    }
    fs::write(out.join("cuda_logs.rs"), logs)?;
    fs::write(out.join("cuda_images.rs"), table)
}

fn include(how: &str, path: &str) -> String {
    format!("{how}!(concat!(env!(\"OUT_DIR\"), \"/{path}\"))")
}
