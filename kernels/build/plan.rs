//! What is compiled, for which GPUs and by which compilers. build.rs and tests take this file in by `#[path]`.
#![allow(dead_code, unreachable_pub)] // Each of them uses a part of it.

use std::path::{Path, PathBuf};
use std::{fs, io};

/// An architecture that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Compute capability as one number: 87 for 8.7.
    pub architecture: u32,
    /// The folder of its compiler, as scripts/setup-cuda.sh names it.
    pub compiler: &'static str,
}

/// Every target. Each is compiled by the oldest toolkit that knows it, as a cubin runs on drivers of its toolkit's major
/// version or a later one. CUDA 13 knows Xavier no longer, CUDA 12 does not know Thor yet.
pub const TARGETS: [Target; 5] = [
    Target { architecture: 72, compiler: "cuda126" },  // Jetson Xavier
    Target { architecture: 87, compiler: "cuda126" },  // Jetson Orin
    Target { architecture: 89, compiler: "cuda126" },  // Ada: RTX 40, L4, L40
    Target { architecture: 90, compiler: "cuda126" },  // Hopper: H100, H200
    Target { architecture: 110, compiler: "cuda130" }, // Jetson Thor
];

impl Target {
    /// `sm_87`.
    pub fn name(&self) -> String {
        format!("sm_{}", self.architecture)
    }

    /// The compiler's option for machine code.
    pub fn option(&self) -> String {
        format!("--gpu-architecture=sm_{}", self.architecture)
    }
}

/// The folder that holds the compilers' folders: what CANDOR_CUDA_COMPILERS says, else .tools of the workspace.
pub fn compilers(package: &Path) -> PathBuf {
    match std::env::var_os("CANDOR_CUDA_COMPILERS") {
        Some(folder) if !folder.is_empty() => PathBuf::from(folder),
        _ => package.join("../.tools"),
    }
}

/// The kernels' sources, each list sorted by name.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// Name without `.cu`, and text.
    pub families: Vec<(String, String)>,
    /// Name as it is included, and text.
    pub headers: Vec<(String, String)>,
}

impl Sources {
    /// Reads every .cu and .cuh file of a folder, which need not exist.
    pub fn read(folder: &Path) -> io::Result<Sources> {
        let mut sources = Sources::default();
        if !folder.exists() {
            return Ok(sources);
        }
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let (Some(name), Some(stem)) = (path.file_name(), path.file_stem()) else { continue };
            let (name, stem) = (name.to_string_lossy().into_owned(), stem.to_string_lossy().into_owned());
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("cu") => sources.families.push((stem, fs::read_to_string(&path)?)),
                Some("cuh") => sources.headers.push((name, fs::read_to_string(&path)?)),
                _ => {}
            }
        }
        sources.families.sort();
        sources.headers.sort();
        Ok(sources)
    }

    /// The headers that `text` includes, and those that they include.
    pub fn needed(&self, text: &str) -> Vec<(String, String)> {
        let mut needed: Vec<(String, String)> = Vec::new();
        let mut texts = vec![text];
        while let Some(text) = texts.pop() {
            let included = text.lines().filter_map(|line| line.trim().strip_prefix("#include \"")?.strip_suffix('"'));
            for name in included {
                let header = self.headers.iter().find(|(header, _)| header == name);
                if let Some(header) = header.filter(|header| !needed.contains(header)) {
                    texts.push(&header.1);
                    needed.push(header.clone());
                }
            }
        }
        needed.sort();
        needed
    }
}
