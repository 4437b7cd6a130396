//! The kernels of cuda/*.cu as NVIDIA's compiler makes them, inline assembly and all, run by the interpreter of `ptx/` on
//! small odd shapes, and compared with their definitions in f64. Outputs hold nothing before, and buffers are as long as
//! they must be: the interpreter reports what is read without being written, accesses outside, and shared memory that no
//! barrier protects.
#![allow(missing_docs)]

#[path = "../../build/nvrtc.rs"]
mod nvrtc;
#[path = "../../build/plan.rs"]
mod plan;
#[path = "../ptx/mod.rs"]
mod ptx;

mod attention;
mod cache;
mod elementwise;
mod layers;
mod machine;
mod roof;
mod rows;
mod volume;
mod weight;

use machine::Machine;
use std::collections::BTreeSet;

/// Makes a test of each function, which must run the kernels named beside it on every architecture.
macro_rules! tests {
    ($($module:ident::$test:ident: $($kernel:ident)*;)*) => {
        const COVERED: &[&str] = &[$($(stringify!($kernel),)*)*];
        $(
            #[cfg_attr(not(cuda_compilers), ignore = "needs the CUDA compilers: make cuda-proof")]
            #[test]
            fn $test() {
                run(stringify!($test), &[$(stringify!($kernel)),*], $module::$test);
            }
        )*
    };
}

tests! {
    attention::decode: decode_f16 decode_i8;
    attention::attention: attention_f32 attention_f16 attention_i8;
    cache::cache_write: cache_write_f32 cache_write_f16 cache_write_i8;
    cache::rope_write: rope_write_f32 rope_write_f16 rope_write_i8;
    elementwise::activate: activate;
    elementwise::sums_and_products: add multiply weighted_sum mean_rows scale_groups;
    elementwise::tables: add_positions embed;
    layers::quantise: quantise;
    layers::few_rows: quantise matvec_i4_1 matvec_i4_8 matvec_i8_1 matvec_i8_8;
    layers::several_layers: quantise matvec_i4_1 matvec_i4_8 matvec_i8_1 matvec_i8_8;
    layers::gated: quantise matvec_i4_1 matvec_i4_8 matvec_i8_1 matvec_i8_8;
    layers::many_rows_of_four_bits: quantise matmul_i4;
    layers::many_rows_of_bytes: quantise matmul_i8;
    layers::several_layers_of_many_rows: quantise matmul_i4 matmul_i8;
    layers::floats: float_matvec_1 float_matvec_8 float_matmul;
    layers::definition: linear;
    roof::roofs: read_all multiply_all;
    rows::norms: layer_norm rms_norm;
    rows::softmax: softmax;
    rows::rope: rope;
    volume::convolutions: unfold depthwise3x3;
    volume::bilinear: bilinear;
}

fn run(test: &str, kernels: &[&str], function: fn(&mut Machine)) {
    for architecture in machine::ARCHITECTURES {
        let mut machine = Machine::new(architecture);
        function(&mut machine);
        let missing: Vec<_> = kernels.iter().filter(|kernel| !machine.has_run(kernel)).collect();
        assert!(missing.is_empty(), "{test} does not run {missing:?}");
        println!("{test}, compute_{architecture}: {machine}");
    }
}

#[test]
fn every_kernel_is_covered() {
    let exported: BTreeSet<String> = machine::sources().families.iter().flat_map(|(_, text)| exported(text)).collect();
    assert!(!exported.is_empty());
    let covered: BTreeSet<String> = COVERED.iter().map(|&kernel| kernel.to_owned()).collect();
    assert_eq!(exported, covered, "the kernels of cuda/*.cu, and those of this test");
    let launched: BTreeSet<String> = launched().into_iter().map(|(_, kernel)| kernel).collect();
    assert_eq!(launched, covered, "the kernels of src/cuda/launch.rs, and those of this test");
}

#[cfg_attr(not(cuda_compilers), ignore = "needs the CUDA compilers: make cuda-proof")]
#[test]
fn every_kernel_is_exported() {
    for (family, text) in machine::sources().families {
        for architecture in machine::ARCHITECTURES {
            let module = machine::module(&family, architecture);
            let compiled: BTreeSet<String> = module.kernels().into_iter().map(str::to_owned).collect();
            assert_eq!(compiled, exported(&text), "{family}.cu for compute_{architecture}");
        }
        let named = launched().into_iter().filter(|(of, _)| *of == family).map(|(_, kernel)| kernel).collect();
        assert_eq!(exported(&text), named, "{family} in src/cuda/launch.rs");
    }
}

/// The kernels that a file exports: by EXPORT(kernel), or by a macro that holds this and takes the kernel's name first.
fn exported(text: &str) -> BTreeSet<String> {
    let kernel = |line: &str| {
        let (name, arguments) = line.split_once('(')?;
        let is_macro = !name.is_empty() && name.chars().all(|letter| letter.is_ascii_uppercase());
        let end = arguments.find([',', ')'])?;
        is_macro.then(|| arguments[..end].to_owned())
    };
    text.lines().filter_map(kernel).collect()
}

/// Families and kernels that the device launches, as src/cuda/launch.rs lists them.
fn launched() -> Vec<(String, String)> {
    let text = include_str!("../../src/cuda/launch.rs");
    let list =
        text.split_once("\nkernels! {\n").and_then(|(_, rest)| rest.split_once("\n}")).map_or("", |(list, _)| list);
    let lines = list.lines().filter_map(|line| line.trim().trim_end_matches(';').split_once(": "));
    lines
        .flat_map(|(family, kernels)| kernels.split(' ').map(|kernel| (family.to_owned(), kernel.to_owned())))
        .collect()
}
