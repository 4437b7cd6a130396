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
mod decoder;
mod elementwise;
mod layers;
mod machine;
mod mel;
mod pictures;
mod roof;
mod rows;
mod sample;
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
    attention::flash: flash_f32_64 flash_f32_96 flash_f32_128 flash_keys_i8_64 flash_keys_i8_96 flash_keys_i8_128 flash_f16_64 flash_f16_128 flash_i8_64 flash_i8_128;
    cache::cache_write: cache_write_f32 cache_write_f16 cache_write_i8;
    cache::round_keys: round_keys;
    cache::rope_write: rope_write_f32 rope_write_f16 rope_write_i8;
    decoder::layer: decoder_layer_i4 decoder_layer_i8 set_position;
    elementwise::activate: activate;
    elementwise::sums_and_products: copy add multiply weighted_sum mean_rows scale_groups;
    elementwise::tables: add_positions embed;
    layers::quantise: quantise;
    layers::few_rows: quantise matvec_i4_1 matvec_i4_8 matvec_i8_1 matvec_i8_8;
    layers::several_layers: quantise matvec_i4_1 matvec_i4_8 matvec_i8_1 matvec_i8_8;
    layers::gated: quantise matvec_i4_1 matvec_i4_8 matvec_i8_1 matvec_i8_8;
    layers::many_rows_of_four_bits: quantise matmul_i4;
    layers::many_rows_of_bytes: quantise matmul_i8;
    layers::several_layers_of_many_rows: quantise matmul_i4 matmul_i8;
    layers::floats: float_matvec_1 float_matvec_8 float_matmul;
    layers::halves: to_half matmul_f16;
    layers::definition: linear;
    mel::log_mel: power log_mel_most log_mel;
    pictures::patches: picture_patches;
    roof::roofs: read_all multiply_all;
    rows::norms: layer_norm rms_norm;
    rows::softmax: softmax;
    rows::rope: rope;
    sample::most: choose_most;
    sample::any: choose_most choose_any;
    sample::nucleus: choose_most choose_nucleus;
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

/// An error that compiles, at one place of a kernel or of what it includes: the test that is to find it, the file, the
/// architecture, what stands there and what is put in its place.
type Planted = (fn(&mut Machine), &'static str, u32, &'static str, &'static str);

const IN_QUANTISED_LAYERS: &[Planted] = &[
    (layers::quantise, "quantise", 87, "__float2int_rn(", "__float2int_rz("),
    (layers::quantise, "quantise", 72, "own, 1)", "own, 2)"),
    (layers::few_rows, "matvec", 72, "if (first + output < layer.weight.rows)", ""),
    (layers::few_rows, "matvec", 87, "if (at < weight.row_bytes)", ""),
    (layers::gated, "matvec", 87, "if (task >= layer.tasks) return;", ""),
    (layers::many_rows_of_bytes, "matmul", 87, "#endif\n        __syncthreads();", "#endif"),
    (layers::many_rows_of_bytes, "matmul", 72, "#endif\n        __syncthreads();", "#endif"),
    (layers::many_rows_of_bytes, "matmul", 87, "cp_async_wait<STAGES - 2>", "cp_async_wait<STAGES - 1>"),
    (layers::many_rows_of_bytes, "matmul", 87, "weight[i + 1][1] = two[3]", "weight[i + 1][1] = two[2]"),
    (layers::many_rows_of_four_bits, "matmul", 87, "sums[i][j] = 0;", ""),
    (layers::many_rows_of_four_bits, "matmul", 72, "if (at >= weight.depth) at =", "if (false) at ="),
];

const IN_OTHERS: &[Planted] = &[
    (layers::floats, "float", 72, "        }\n        __syncthreads();\n    }\n", "        }\n    }\n"),
    (attention::decode, "decode", 87, "counters + key_head, 1);\n    __syncthreads();", "counters + key_head, 1);"),
    (attention::decode, "decode", 72, "if (threadIdx.x == 0) counters[key_head] = 0;", ""),
    (
        attention::decode,
        "decode",
        87,
        "halves[threadIdx.x] = sum;\n        __syncthreads();",
        "halves[threadIdx.x] = sum;",
    ),
    (attention::attention, "attention", 87, "    __syncthreads();\n    return most;", "    return most;"),
    (rows::norms, "norm", 72, "    __syncthreads();\n    return sum;", "    return sum;"),
    (attention::flash, "flash", 87, "ldmatrix_x4_trans(both", "ldmatrix_x4(both"),
    (attention::flash, "flash", 87, "        __syncthreads();\n    }\n#pragma", "    }\n#pragma"),
    (attention::flash, "flash", 87, "sums[part][2] *= faded[1]", "sums[part][2] *= faded[0]"),
    (decoder::layer, "decoder", 87, "    grid_barrier(layer.arrived);\n    attend(layer);", "    attend(layer);"),
    (decoder::layer, "decoder", 72, "    grid_barrier(layer.arrived);\n    const", "    const"),
    (decoder::layer, "decoder", 87, "gridDim.x - 1)", "gridDim.x)"),
    (decoder::layer, "decoder", 72, "    __syncthreads();\n    const float *q", "    const float *q"),
    (
        cache::round_keys,
        "cache",
        72,
        "    __syncthreads();\n    if ((int)threadIdx.x < head_dim)",
        "    if ((int)threadIdx.x < head_dim)",
    ),
    (attention::flash, "flash", 87, "* shape.key_heads + key_head) * scales", "* shape.heads + key_head) * scales"),
    (attention::flash, "flash", 87, "factor[i / 2] * tile.scales[column])", "factor[i % 2] * tile.scales[column])"),
    (layers::halves, "half", 87, "mma_f16(sums[i][j], x[i], weight[j])", "mma_f16(sums[i][j], x[i], weight[j ^ 1])"),
    (layers::halves, "half", 87, "(13 - exponent", "(15 - exponent"),
    (
        pictures::patches,
        "pixels",
        87,
        "        }\n        __syncthreads();\n        for (int at",
        "        }\n        for (int at",
    ),
    (pictures::patches, "pixels", 72, "(x % 2 ? 2 : 4)", "4"),
    (mel::log_mel, "mel", 87, "parts[blockIdx.x] = most", "parts[0] = most"),
    (cache::rope_write, "cache", 87, "turn.first + row, turn", "turn.first, turn"),
    (sample::most, "sample", 72, "state->broken = 0;\n    state->done = 0;", "state->broken = 0;"),
    (sample::most, "sample", 87, "__float_as_uint(x + 0.0f)", "__float_as_uint(x)"),
    (
        sample::any,
        "sample",
        87,
        "__umul64hi(draw.point, total_of(own, search)) + 1",
        "__umul64hi(draw.point, total_of(own, search)) + total_of(own, search) / 9",
    ),
    (sample::nucleus, "sample", 72, "(draw.share * total != 0)", "total / 9"),
    (
        sample::nucleus,
        "sample",
        87,
        "(unsigned)__popc(together));\n        }\n        in = in && !same;",
        "(unsigned)__popc(together));\n        }",
    ),
    (
        sample::any,
        "sample",
        87,
        "    Found found = {search.at, search.before, search.weight, total};\n    __syncthreads();",
        "    Found found = {search.at, search.before, search.weight, total};",
    ),
];

#[cfg_attr(not(cuda_compilers), ignore = "needs the CUDA compilers: make cuda-proof")]
#[test]
fn errors_planted_in_quantised_layers_are_caught() {
    IN_QUANTISED_LAYERS.iter().for_each(caught);
}

#[cfg_attr(not(cuda_compilers), ignore = "needs the CUDA compilers: make cuda-proof")]
#[test]
fn errors_planted_in_others_are_caught() {
    IN_OTHERS.iter().for_each(caught);
}

fn caught(&(test, family, architecture, from, to): &Planted) {
    let mut machine = Machine::new(architecture).planted(family, from, to);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(&mut machine)));
    let said = result.expect_err(&format!("{family}.cu, {to:?} in place of {from:?}: not caught"));
    println!("{family}.cu, {to:?} in place of {from:?}: {}", said.downcast_ref::<String>().map_or("", String::as_str));
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

/// The kernels that a file exports: by EXPORT(kernel), by itself or in a macro whose first argument makes the name.
fn exported(text: &str) -> BTreeSet<String> {
    let call = |line: &str| -> Option<(String, String)> {
        let (name, arguments) = line.split_once('(')?;
        let is_macro = !name.is_empty() && name.chars().all(|letter| letter == '_' || letter.is_ascii_uppercase());
        let end = arguments.find([',', ')'])?;
        is_macro.then(|| (name.to_owned(), arguments[..end].to_owned()))
    };
    let (mut kernels, mut patterns) = (BTreeSet::new(), Vec::new());
    let mut defined = None;
    for line in text.lines() {
        if let Some(definition) = line.strip_prefix("#define ") {
            defined = call(definition);
        }
        let exports = call(line.trim()).filter(|(name, _)| name == "EXPORT");
        match (&defined, exports, call(line)) {
            (Some((name, parameter)), Some((_, kernel)), _) => patterns.push((name.clone(), parameter.clone(), kernel)),
            (None, Some((_, kernel)), _) => drop(kernels.insert(kernel)),
            (None, None, Some((name, argument))) => {
                for (_, parameter, kernel) in patterns.iter().filter(|(of, ..)| *of == name) {
                    kernels.insert(kernel.replace(&format!("##{parameter}"), &argument).replace(parameter, &argument));
                }
            }
            _ => {}
        }
        defined = defined.filter(|_| line.ends_with('\\'));
    }
    kernels
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
