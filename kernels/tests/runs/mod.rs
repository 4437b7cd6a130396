//! The tests of this program once more, in processes of their own: with the threads of a block in other orders, as for an older GPU,
//! under the compiler's sanitizers, and with errors planted in the kernels. What takes long is ignored; scripts/cuda-proof.sh runs it.

mod planted;

use std::path::Path;
use std::process::Command;

use super::stand_in;

/// Tests that start processes themselves, with a stand-in of their own.
const STARTERS: [&str; 2] = ["runs::", "a_wrong_gpu_fails_its_own_test"];

/// Flags of stand-ins. Compute capability 7.2 has no tensor cores, and no copies in the background.
const PLAIN: &str = "";
const ADDRESS: &str = "-fsanitize=address,undefined";
const THREAD: &str = "-fsanitize=thread";
const OLDER: &str = "-DCUDA_HOST_ARCH=720";
const OLDER_ADDRESS: &str = "-DCUDA_HOST_ARCH=720 -fsanitize=address,undefined";
const OLDER_THREAD: &str = "-DCUDA_HOST_ARCH=720 -fsanitize=thread";

/// What takes too long under the thread sanitizer, whose barriers take the square of a block's threads. Small ones run the same kernels.
const LARGE: [&str; 3] =
    ["caches_are_near_the_definition_however_they_are_filled", "choices", "shares_of_a_large_vocabulary"];

/// Tests of this program on a stand-in.
struct Run<'a> {
    /// What the stand-in was built with, and where it lies.
    flags: &'a str,
    folder: &'a Path,
    /// Of the threads of a block: CUDA_HOST_ORDER.
    order: &'a str,
    /// Names of tests; all of them if empty.
    tests: &'a [&'a str],
}

impl Run<'_> {
    /// Whether all went well, and what was said.
    fn result(&self) -> (bool, String) {
        let program = std::env::current_exe().expect("this program");
        // The thread sanitizer of older compilers cannot work with the address layout of newer kernels. It must not be loaded into
        // the program that sees to that.
        let threads = self.flags.contains(THREAD);
        let mut command = Command::new(if threads { "setarch" } else { "env" });
        if threads {
            command.args(["--addr-no-randomize", "env"]);
            command.arg(format!("LD_PRELOAD={}", library("libtsan.so")));
        }
        if self.flags.contains(ADDRESS) {
            command.arg(format!("LD_PRELOAD={}:{}", library("libasan.so"), library("libubsan.so")));
        }
        command.arg(program);
        match self.tests {
            [] => command.args(STARTERS.iter().flat_map(|starter| ["--skip", starter])),
            tests => command.arg("--exact").args(tests),
        };
        command.env(stand_in::BUILT, self.folder).env("CUDA_HOST_ORDER", self.order).env_remove("CANDOR_TEST_GPU");
        command.env("CUDA_STANDIN", if self.flags.contains(OLDER) { "capability=7.2" } else { "" });
        // Without these the sanitizers look for leaks of the test runner, sleep at the end, report what the standard library does, and
        // go on after an error.
        command.env("ASAN_OPTIONS", "detect_leaks=0");
        command.env("UBSAN_OPTIONS", "halt_on_error=1 print_stacktrace=1");
        command.env("TSAN_OPTIONS", "atexit_sleep_ms=0 halt_on_error=1 ignore_noninstrumented_modules=1");
        let output = command.output().expect("it starts");
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.success(), said)
    }

    /// All go well, and none is missing.
    fn passes(&self) {
        let (well, said) = self.result();
        let count = if self.tests.is_empty() { all().len() } else { self.tests.len() };
        let what = format!("{}, order {}, {:?}", self.flags, self.order, self.tests);
        assert!(
            well && said.contains(&format!("test result: ok. {count} passed; 0 failed; 0 ignored")),
            "{what}: {said}"
        );
        println!("{what}: {count} tests passed");
    }
}

/// Every test but those that start processes.
fn all() -> Vec<String> {
    let list =
        Command::new(std::env::current_exe().expect("this program")).args(["--list", "--format", "terse"]).output();
    let names = String::from_utf8(list.expect("it starts").stdout).expect("names");
    let tests = names.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned);
    tests.filter(|name| !STARTERS.iter().any(|starter| name.contains(starter))).collect()
}

/// Where the compiler has a library of its own.
fn library(name: &str) -> String {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
    let output = Command::new(&compiler).arg(format!("-print-file-name={name}")).output().expect("the C++ compiler");
    let path = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert!(Path::new(&path).is_absolute(), "{compiler} comes without {name}");
    path
}

fn passes(flags: &str, order: &str) {
    let folder = &stand_in::build(flags);
    if !flags.contains(THREAD) {
        return Run { flags, folder, order, tests: &[] }.passes();
    }
    let all = all();
    assert!(LARGE.iter().all(|large| all.iter().any(|name| name == large)), "{all:?}");
    // Each in a process of its own, where it has no more threads than it needs.
    for name in all.iter().filter(|name| !LARGE.contains(&name.as_str())) {
        Run { flags, folder, order, tests: &[name.as_str()] }.passes();
    }
}

/// Makes a test of each, of all tests of this program.
macro_rules! of_all {
    ($($(#[$attribute:meta])* $name:ident: $flags:ident, $order:literal;)*) => {$(
        $(#[$attribute])*
        #[test]
        fn $name() {
            passes($flags, $order);
        }
    )*};
}

of_all! {
    reverse_order: PLAIN, "reverse";
    random_order: PLAIN, "7";
    older_gpu: OLDER, "0";
    #[ignore = "takes minutes: make cuda-proof"] another_random_order: PLAIN, "1234";
    #[ignore = "takes minutes: make cuda-proof"] older_gpu_in_reverse_order: OLDER, "reverse";
    #[ignore = "takes minutes: make cuda-proof"] older_gpu_in_random_order: OLDER, "7";
    #[ignore = "takes minutes: make cuda-proof"] address_sanitizer: ADDRESS, "0";
    #[ignore = "takes minutes: make cuda-proof"] address_sanitizer_in_random_order: ADDRESS, "7";
    #[ignore = "takes minutes: make cuda-proof"] address_sanitizer_for_an_older_gpu: OLDER_ADDRESS, "0";
    #[ignore = "takes minutes: make cuda-proof"] thread_sanitizer: THREAD, "0";
    #[ignore = "takes minutes: make cuda-proof"] thread_sanitizer_in_random_order: THREAD, "7";
    #[ignore = "takes minutes: make cuda-proof"] thread_sanitizer_for_an_older_gpu: OLDER_THREAD, "0";
}
