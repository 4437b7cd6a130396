//! With the feature `cuda`: candle's kernels ask the linker for CUDA's runtime. It gets the static one under that name, so
//! that the program starts where there is no CUDA at all.

use std::env::var_os;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let named = ["CUDA_HOME", "CUDA_PATH"];
    named.iter().for_each(|name| println!("cargo:rerun-if-env-changed={name}"));
    let roots = named.iter().filter_map(var_os).map(PathBuf::from);
    let usual = ["../.tools/nvcc130/nvidia/cu13", "/usr/local/cuda", "/opt/cuda"].map(PathBuf::from);
    let folders = ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "targets/aarch64-linux/lib"];
    let found = roots
        .chain(usual)
        .flat_map(|root| folders.map(|folder| root.join(folder).join("libcudart_static.a")))
        .find(|library| library.exists());
    let Some(library) = found else {
        println!("cargo:warning=no libcudart_static.a of CUDA: name the toolkit's folder in CUDA_HOME");
        return;
    };
    let Some(out) = var_os("OUT_DIR") else { return };
    let own = Path::new(&out).join("libcudart.a");
    match std::fs::copy(&library, &own) {
        Ok(_) => println!("cargo:rustc-link-search=native={}", Path::new(&out).display()),
        Err(error) => println!("cargo:warning=cannot copy {}: {error}", library.display()),
    }
}
