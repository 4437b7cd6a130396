//! Errors in the kernels, which the tests or a sanitizer must find.

use std::path::Path;

use super::{ADDRESS, Run, THREAD, stand_in};

/// An error that compiles.
struct Planted {
    /// The file it is in, and the kernels that are compiled with it where that is a header.
    file: &'static str,
    kernels: &'static str,
    /// What stands there, once, and what is put in its place.
    from: &'static str,
    to: &'static str,
    /// The test that is to fail, and what is said then.
    test: &'static str,
    says: &'static str,
}

const fn planted(file: &'static str, [from, to]: [&'static str; 2], test: &'static str, says: &'static str) -> Planted {
    Planted { file, kernels: file, from, to, test, says }
}

const IN_PLAIN: &[Planted] = &[
    // Results that are wrong.
    planted("attention.cu", ["    __syncthreads();\n    int seen", "    int seen"], "attention", "panicked"),
    planted("matmul.cu", ["#endif\n        __syncthreads();", "#endif"], QUANTISED, "element"),
    planted("matmul.cu", ["cp_async_wait<STAGES - 2>", "cp_async_wait<STAGES - 1>"], QUANTISED, "element"),
    planted(
        "matmul.cu",
        ["odd_values(second) : even_values(second)", "odd_values(first) : even_values(first)"],
        QUANTISED,
        "element",
    ),
    planted("half.cu", ["cp_async_wait<STAGES - 2>", "cp_async_wait<STAGES - 1>"], "layers_in_f16", ": NaN, not"),
    planted("half.cu", ["x[i], weight[j])", "x[i], weight[j ^ 1])"], "layers_in_f16", "row 0"),
    planted("flash.cu", ["ldmatrix_x4_trans(both", "ldmatrix_x4(both"], FILLED, "panicked"),
    planted(
        "decoder.cu",
        ["    grid_barrier(layer.arrived);\n    attend(layer);", "    attend(layer);"],
        "decoder_layers_at_once_are_their_steps",
        "panicked",
    ),
    // What the emulator itself sees.
    planted(
        "attention.cu",
        [
            "i < width; i += THREADS) query[i] = q[at + i] * shape.scale;",
            "i < width + 4; i += THREADS) query[i] = i < width ? q[at + i] * shape.scale : 0.0f;",
        ],
        "attention",
        "of dynamic shared memory, of which the launch has",
    ),
    planted(
        "norm.cu",
        [
            "    float factor = 1.0f / block_sum(sum, parts);\n",
            "    float factor = 1.0f / block_sum(sum, parts);\n    if (threadIdx.x == 0) out[width + 900] = 0.0f;\n",
        ],
        "softmax_rows",
        "which is not memory",
    ),
    planted(
        "norm.cu",
        [
            "out[i] = x[i] * factor * flat_at(weight, i);\n",
            "out[i] = x[i] * factor * flat_at(weight, i);\n    if (threadIdx.x == 0) out[width] = 0.0f;\n",
        ],
        "norms",
        "wrote behind its output",
    ),
    planted(
        "float.cu",
        [
            "        }\n        __syncthreads();\n#pragma",
            "        }\n        if (threadIdx.x < 64) __syncthreads();\n#pragma",
        ],
        "layers_in_f32_and_bf16",
        "barrier divergence",
    ),
];

const QUANTISED: &str = "quantised_layers_are_those_of_the_cpu";
const ROUNDED: &str = "rounded_attention_is_near_the_definition";
const FILLED: &str = "caches_are_near_the_definition_however_they_are_filled";

const UNDER_THE_ADDRESS_SANITIZER: &[Planted] = &[
    planted(
        "attention.cu",
        ["weights[threadIdx.x] = v_scales", "weights[threadIdx.x + 1] = v_scales"],
        "attention",
        "index 128 out of bounds for type 'float [128]'",
    ),
    planted(
        "float.cu",
        [
            "of_weight[at + i][own] = values[i];",
            "(&of_weight[0][0])[(at + i) * (TILE + 4) + own + (own == 63 ? 8 : 0)] = values[i];",
        ],
        "layers_in_f32_and_bf16",
        "with insufficient space for an object of type 'float'",
    ),
];

const RACE: &str = "ThreadSanitizer: data race";

const UNDER_THE_THREAD_SANITIZER: &[Planted] = &[
    planted("attention.cu", ["    __syncthreads();\n    int seen", "    int seen"], "attention", RACE),
    planted("attention.cu", ["        __syncthreads();\n        int count", "        int count"], "attention", RACE),
    Planted {
        file: "decode.cuh",
        kernels: "decode.cu",
        from: "halves[threadIdx.x] = sum;\n        __syncthreads();",
        to: "halves[threadIdx.x] = sum;",
        test: "a_good_gpu_passes_its_own_test",
        says: RACE,
    },
    planted(
        "decoder.cu",
        ["    __syncthreads();\n    const float *q", "    const float *q"],
        "decoder_layers_at_once_are_their_steps",
        RACE,
    ),
    planted("flash.cu", ["        __syncthreads();\n    }\n#pragma", "    }\n#pragma"], ROUNDED, RACE),
    planted("cache.cu", ["    __syncthreads();\n    scales +=", "    scales +="], ROUNDED, RACE),
    planted("matmul.cu", ["#endif\n        __syncthreads();", "#endif"], QUANTISED, RACE),
    planted(
        "half.cu",
        ["        cp_async_wait<STAGES - 2>();\n        __syncthreads();", "        cp_async_wait<STAGES - 2>();"],
        "layers_in_f16",
        RACE,
    ),
    planted(
        "float.cu",
        ["        }\n        __syncthreads();\n    }\n", "        }\n    }\n"],
        "layers_in_f32_and_bf16",
        RACE,
    ),
    Planted {
        file: "common.cuh",
        kernels: "norm.cu",
        from: "    __syncthreads();\n    return sum;",
        to: "    return sum;",
        test: "norms",
        says: RACE,
    },
    planted(
        "pixels.cu",
        ["        }\n        __syncthreads();\n        for (int at", "        }\n        for (int at"],
        "pictures",
        RACE,
    ),
    planted(
        "sample.cu",
        [
            "    Found found = {search.at, search.before, search.weight, total};\n    __syncthreads();",
            "    Found found = {search.at, search.before, search.weight, total};",
        ],
        "equal_logits",
        RACE,
    ),
];

/// Each is found: the test fails, in every order of threads, with what is said.
fn found(name: &str, flags: &str, list: &[Planted]) {
    let objects = stand_in::build(flags);
    let cuda = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let mut missed = Vec::new();
    // What a test that failed has left.
    let _ = std::fs::remove_dir_all(&folder);
    for (i, Planted { file, kernels, from, to, test, says }) in list.iter().enumerate() {
        let folder = folder.join(i.to_string());
        std::fs::create_dir_all(&folder).expect("a folder");
        let text = std::fs::read_to_string(cuda.join(file)).expect("a file of cuda/");
        assert_eq!(text.matches(from).count(), 1, "{file}: {from:?} is not there once");
        std::fs::copy(cuda.join(kernels), folder.join(kernels)).expect("a file of cuda/");
        std::fs::write(folder.join(file), text.replace(from, to)).expect("a folder of ours");
        let source = folder.join(kernels);
        let variables = [("CUDA_STANDIN_SOURCES", source.as_os_str()), ("CUDA_STANDIN_OBJECTS", objects.as_os_str())];
        stand_in::script(&folder, flags, &variables);
        for order in ["0", "reverse", "7"] {
            let (well, said) = Run { flags, folder: &folder, order, tests: &[test] }.result();
            let what = format!("{file}, {to:?} in place of {from:?}, order {order}");
            if well || !said.contains(says) {
                missed.push(format!("{what}: no {says:?}: {said}"));
            }
            println!("{what}: {}", said.lines().find(|line| line.contains(says)).unwrap_or_default());
        }
    }
    std::fs::remove_dir_all(&folder).expect("a folder of ours");
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

#[test]
fn errors_are_found() {
    found("planted-plain", "", IN_PLAIN);
}

#[ignore = "takes minutes: make cuda-proof"]
#[test]
fn errors_are_found_by_the_address_sanitizer() {
    found("planted-address", ADDRESS, UNDER_THE_ADDRESS_SANITIZER);
}

#[ignore = "takes minutes: make cuda-proof"]
#[test]
fn errors_are_found_by_the_thread_sanitizer() {
    found("planted-thread", THREAD, UNDER_THE_THREAD_SANITIZER);
}
