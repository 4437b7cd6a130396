//! docs/cuda-kernels.md: what every kernel takes on every target. `make cuda-table` writes it; the test holds what the
//! compilers give against it, and lets no kernel spill registers.

mod cubin;
mod occupancy;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use cubin::Kernel;
use occupancy::Limits;

/// What build.rs compiled, and what is said to it.
mod built {
    #![allow(dead_code)]
    include!(concat!(env!("OUT_DIR"), "/cuda_images.rs"));
    include!(concat!(env!("OUT_DIR"), "/cuda_logs.rs"));
}

const REWRITE: &str = "make cuda-table";

const INTRODUCTION: &str = "\
# What the CUDA kernels take

Written by `make cuda-table` from what the compilers give; `make cuda-proof` fails where a kernel takes more than stands here,
or spills registers to memory.

| column | |
| --- | --- |
| registers | a thread |
| shared | bytes of shared memory a block; behind `+`, what the launch adds where the source says how much |
| stack, spilled | bytes a thread in local memory; bytes of stores and loads for want of registers |
| instructions | of the kernel, 16 bytes each, those that fill up its end too |
| threads | the most a block may have (`__launch_bounds__`) |
| blocks, warps | that a multiprocessor holds at once with that many threads, by registers, shared memory and its own limits |

sm_72 is Jetson Xavier, sm_87 Jetson Orin, sm_110 Jetson Thor; sm_89 and sm_90 are Ada and Hopper cards. Code for the first
four is made by NVRTC 12.6, for Thor by NVRTC 13.0.

## Bytes of machine code

As they lie in the program, packed, and what the GPU is given.

";

const HEAD: &str = "\
| kernel | GPU | registers | shared | stack | spilled | instructions | threads | blocks | warps |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |";

/// The kernels of the built program by file, name and architecture.
type Table = BTreeMap<(String, String, u32), Kernel>;

fn unpack(packed: &[u8]) -> Vec<u8> {
    miniz_oxide::inflate::decompress_to_vec_zlib(packed).expect("what build.rs packed")
}

fn table() -> Table {
    let mut table = Table::new();
    for (&(architecture, family, packed), &(_, _, log)) in built::IMAGES.iter().zip(built::LOGS) {
        for (name, kernel) in cubin::kernels(&unpack(packed), log) {
            table.insert((family.to_owned(), name, architecture), kernel);
        }
    }
    table
}

/// Bytes of shared memory that launches add, where `EXPORT(name)` says so: `// 4096 bytes of dynamic shared memory`.
fn dynamic() -> BTreeMap<String, u32> {
    let mut dynamic = BTreeMap::new();
    for (_, packed) in built::FAMILIES {
        let text = String::from_utf8(unpack(packed)).expect("text");
        for line in text.lines() {
            let Some((name, said)) = line.strip_prefix("EXPORT(").and_then(|rest| rest.split_once(')')) else {
                continue;
            };
            let bytes =
                said.trim().strip_prefix("// ").and_then(|said| said.strip_suffix(" bytes of dynamic shared memory"));
            if let Some(bytes) = bytes {
                dynamic.insert(name.to_owned(), bytes.parse().expect("a number of bytes"));
            }
        }
    }
    dynamic
}

fn render(table: &Table) -> String {
    let mut text = INTRODUCTION.to_owned();
    sizes(&mut text);
    let dynamic = dynamic();
    let mut last = "";
    for ((family, name, architecture), kernel) in table {
        if family != last {
            let _ = writeln!(text, "\n## {family}\n\n{HEAD}");
            last = family;
        }
        let Kernel { registers, shared, stack, spilled, instructions, threads } = *kernel;
        let added = dynamic.get(name).copied();
        let limits = Limits::of(*architecture);
        let blocks = limits.blocks(threads, registers, shared + added.unwrap_or(0));
        let (warps, most) = (blocks * threads.div_ceil(32), limits.warps);
        let added = added.map(|bytes| format!(" + {bytes}")).unwrap_or_default();
        let _ = writeln!(
            text,
            "| {name} | sm_{architecture} | {registers} | {shared}{added} | {stack} | {spilled} | {instructions} | {threads} \
             | {blocks} | {warps} of {most} |"
        );
    }
    text
}

fn sizes(text: &mut String) {
    let mut architectures: Vec<u32> = built::IMAGES.iter().map(|(architecture, ..)| *architecture).collect();
    architectures.sort();
    architectures.dedup();
    text.push_str("| file |");
    for architecture in &architectures {
        let _ = write!(text, " sm_{architecture} |");
    }
    let _ = writeln!(text, "\n| --- |{}", " ---: |".repeat(architectures.len()));
    let mut sums = vec![(0, 0); architectures.len()];
    for (family, _) in built::FAMILIES {
        let _ = write!(text, "| {family} |");
        for (architecture, sum) in architectures.iter().zip(&mut sums) {
            let image = built::IMAGES.iter().find(|(other, name, _)| other == architecture && name == family);
            let packed = image.expect("every file for every target").2;
            let whole = unpack(packed).len();
            *sum = (sum.0 + packed.len(), sum.1 + whole);
            let _ = write!(text, " {} of {whole} |", packed.len());
        }
        text.push('\n');
    }
    text.push_str("| all |");
    for (packed, whole) in sums {
        let _ = write!(text, " {packed} of {whole} |");
    }
    text.push('\n');
}

fn file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cuda-kernels.md")
}

/// The numbers of the rows of kernels that must not grow, by kernel and GPU.
fn rows(text: &str) -> BTreeMap<String, Vec<(&'static str, u32)>> {
    let columns = ["registers", "shared memory", "stack", "spilled bytes", "instructions"];
    let mut rows = BTreeMap::new();
    for line in text.lines() {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        if cells.len() != 10 || !cells[1].starts_with("sm_") {
            continue;
        }
        let sum = |cell: &str| cell.split('+').map(|part| part.trim().parse::<u32>().unwrap_or(u32::MAX)).sum();
        let numbers = columns.into_iter().zip(cells[2..].iter().map(|cell| sum(cell))).collect();
        rows.insert(format!("{} for {}", cells[0], cells[1]), numbers);
    }
    rows
}

/// What is worse in `new` than in `old`.
fn worse(old: &str, new: &str) -> Vec<String> {
    let (old, mut found) = (rows(old), Vec::new());
    for (kernel, numbers) in rows(new) {
        for (before, now) in old.get(&kernel).into_iter().flatten().zip(&numbers) {
            if now.1 > before.1 {
                found.push(format!("{kernel}: {} {} instead of {}", now.1, now.0, before.1));
            }
        }
    }
    found
}

#[cfg_attr(not(cuda_compilers), ignore = "needs the CUDA compilers: make cuda-proof")]
#[test]
fn kernels_take_no_more_than_the_documentation_says() {
    let table = table();
    let text = render(&table);
    if std::env::var_os("CANDOR_WRITE_TABLE").is_some() {
        std::fs::write(file(), &text).expect("docs can be written");
    }
    let spilled: Vec<_> = table.iter().filter(|(_, kernel)| kernel.spilled > 0).map(|(name, _)| name).collect();
    assert!(spilled.is_empty(), "registers are spilled to memory by {spilled:?}");
    let committed = std::fs::read_to_string(file()).unwrap_or_default();
    let worse = worse(&committed, &text);
    assert!(worse.is_empty(), "worse than docs/cuda-kernels.md:\n{}\nIf that must be: {REWRITE}", worse.join("\n"));
    assert!(
        committed == text,
        "docs/cuda-kernels.md is not what the compilers give (nothing is worse). Run: {REWRITE}"
    );
}

#[cfg_attr(not(cuda_compilers), ignore = "needs the CUDA compilers: make cuda-proof")]
#[test]
fn every_kernel_is_there_for_every_target() {
    let table = table();
    let mut targets: BTreeMap<&String, Vec<u32>> = BTreeMap::new();
    for (_, name, architecture) in table.keys() {
        targets.entry(name).or_default().push(*architecture);
    }
    for (name, mut architectures) in targets {
        architectures.sort();
        assert_eq!(architectures, [72, 87, 89, 90, 110], "{name}");
    }
}

#[test]
fn a_worse_row_is_found() {
    let row = |registers, shared, instructions| {
        format!("| a | sm_87 | {registers} | {shared} | 0 | 0 | {instructions} | 256 | 6 | 48 of 48 |\n")
    };
    assert_eq!(worse(&row(40, "16", 100), &row(40, "16", 100)), [""; 0]);
    assert_eq!(worse(&row(40, "16 + 64", 100), &row(39, "80", 90)), [""; 0]);
    assert_eq!(
        worse(&row(40, "16 + 64", 100), &row(41, "16 + 65", 99)),
        ["a for sm_87: 41 registers instead of 40", "a for sm_87: 81 shared memory instead of 80"]
    );
    // A new kernel is not worse than none, but the file is another.
    assert_eq!(worse("", &row(40, "16", 100)), [""; 0]);
}
