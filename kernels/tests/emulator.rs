//! The emulator of CUDA, by its own test program (cuda/host/selftest.cu): kernels without a bug give the right results
//! in every order of threads, plain and under the sanitizers, and each planted bug is found.
#![cfg(not(target_feature = "crt-static"))] // those are cross builds, whose programs the host's compiler cannot make
#![allow(missing_docs)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Orders in which the threads of a block take their turns: ascending, descending, two random ones.
const ORDERS: [&str; 4] = ["0", "reverse", "7", "1234"];

/// The test program, built with further flags of the compiler.
struct Program {
    path: PathBuf,
    /// The thread sanitizer of older compilers cannot work with the address layout of newer kernels.
    fixed_layout: bool,
}

impl Program {
    fn build(name: &str, flags: &[&str]) -> Self {
        let cuda = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("selftest-{name}"));
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
        let mut command = Command::new(&compiler);
        command.args("-std=c++17 -O2 -g1 -pthread -ffp-contract=off -Wall -Wextra -Werror".split(' ')).args(flags);
        command.arg("-I").arg(&cuda).arg("-I").arg(cuda.join("host")).args(["-include", "cuda_host.h", "-x", "c++"]);
        command.arg(cuda.join("host/selftest.cu")).arg(cuda.join("host/cuda_host.cpp")).arg("-o").arg(&path);
        let output = command.output().unwrap_or_else(|error| {
            panic!("the C++ compiler {compiler} could not be run ({error}): scripts/setup.sh installs g++, or set CXX")
        });
        assert!(output.status.success(), "{compiler}:\n{}", text(&output));
        let mut program = Self { path, fixed_layout: false };
        program.fixed_layout = text(&program.run(&["bugs"])).contains("unexpected memory mapping");
        program
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.run_with(arguments, "1")
    }

    /// `threads`: those of the operating system that blocks are spread over.
    fn run_with(&self, arguments: &[&str], threads: &str) -> Output {
        let mut command = Command::new(if self.fixed_layout { Path::new("setarch") } else { &self.path });
        if self.fixed_layout {
            command.arg("--addr-no-randomize").arg(&self.path);
        }
        command.args(arguments).env("CUDA_HOST_THREADS", threads);
        // Without these the thread sanitizer sleeps for a second at the end, and goes on after a race.
        command.env("TSAN_OPTIONS", "atexit_sleep_ms=0 halt_on_error=1");
        command.env("UBSAN_OPTIONS", "halt_on_error=1 print_stacktrace=0");
        command.output().unwrap_or_else(|error| panic!("{}: {error}", self.path.display()))
    }

    fn passes_clean(&self) {
        for order in ORDERS {
            let output = self.run(&["clean", order]);
            assert!(output.status.success(), "order {order}:\n{}", text(&output));
        }
    }

    /// Each bug ends the program with its message, in every order of threads.
    fn finds(&self, bugs: &[(&str, &str)]) {
        for (bug, message) in bugs {
            for order in ORDERS {
                let output = self.run(&["bug", bug, order]);
                let text = text(&output);
                assert!(!output.status.success(), "{bug} in order {order} was not found:\n{text}");
                assert!(text.contains(message), "{bug} in order {order} gave no `{message}`:\n{text}");
            }
        }
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// What every build finds: bugs that make a wrong result in each order, and bugs that the emulator itself sees.
const ALWAYS: [(&str, &str); 19] = [
    ("missing-barrier", "WRONG: reduce"),
    ("missing-second-barrier", "WRONG: rotate"),
    ("missing-tile-barrier", "WRONG: attention"),
    ("missing-syncwarp", "WRONG: reverse_warp"),
    ("missing-wait", "WRONG: multiply_halves"),
    ("missing-wait-in-pipeline", "WRONG: attention"),
    ("uncommitted-copy", "WRONG: multiply_halves"),
    ("wrong-fragment-f16", "WRONG: multiply_halves"),
    ("wrong-fragment-s8", "WRONG: multiply_bytes"),
    ("divergent-barrier", "threads of one block wait at different __syncthreads (barrier divergence)"),
    ("return-before-barrier", "waits at __syncthreads, but threads of the block have returned (barrier divergence)"),
    ("outside-mask", "lane 0 shuffles from lane 16, which is not in the mask 0000ffff"),
    ("mask-mismatch", "with different masks (mask mismatch)"),
    ("missing-lane", "deadlock: lanes of its mask never come"),
    ("not-cooperative", "deadlock: waits for another block, and none is running (is the launch cooperative?)"),
    ("dynamic-overrun", "access to byte 384 of dynamic shared memory, of which the launch has 384"),
    ("dynamic-underrun", "wrote to byte -4 of dynamic shared memory, of which the launch has 384"),
    ("misaligned-copy", "cp_async16, source: the address"),
    ("stack-overflow", "stack overflow: a thread of the emulator has"),
];

#[test]
fn plain() {
    let program = Program::build("plain", &[]);
    program.passes_clean();
    for order in ORDERS {
        let output = program.run_with(&["clean", order], "2");
        assert!(output.status.success(), "two threads, order {order}:\n{}", text(&output));
    }
    program.finds(&ALWAYS);
    program.finds(&[("not-shared", "ldmatrix: 16 bytes at"), ("static-overrun", "WRONG: reduce")]);

    // The message names the kernel, the block, the thread and the line, and says where the others are.
    let output = text(&program.run(&["bug", "missing-lane", "0"]));
    assert!(output.contains("cuda: kernel masks, block (0,0,0), thread (0,0,0), selftest.cu:"), "{output}");
    assert!(output.contains("thread 5 waits at __syncthreads, selftest.cu:"), "{output}");

    let listed = text(&program.run(&["bugs"]));
    for bug in listed.lines().filter(|bug| *bug != "global-overrun") {
        let known = ALWAYS.iter().any(|(name, _)| *name == bug) || ["not-shared", "static-overrun"].contains(&bug);
        assert!(known, "no test asks for {bug}");
    }
}

#[test]
fn address_and_undefined_behaviour_sanitizers() {
    let mut flags = vec!["-fsanitize=address,undefined"];
    // The second way to convert halves.
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("f16c") {
        flags.push("-mf16c");
    }
    let program = Program::build("address", &flags);
    program.passes_clean();
    program.finds(&ALWAYS);
    program.finds(&[
        ("static-overrun", "runtime error: index 39 out of bounds for type 'float [32]'"),
        ("global-overrun", "AddressSanitizer: heap-buffer-overflow"),
    ]);
}

#[test]
fn thread_sanitizer() {
    let program = Program::build("thread", &["-fsanitize=thread"]);
    program.passes_clean();
    for bug in ["missing-barrier", "missing-second-barrier", "missing-tile-barrier", "missing-syncwarp"] {
        program.finds(&[(bug, "ThreadSanitizer: data race")]);
    }
    // Both lines of the race.
    let output = text(&program.run(&["bug", "missing-barrier", "0"]));
    let lines = output.lines().filter(|line| line.contains("#0 ") && line.contains("selftest.cu:")).count();
    assert!(lines >= 2, "{output}");
}
