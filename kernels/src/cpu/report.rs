//! What runs on this processor and why, for people: `candor doctor` prints it.

use super::simd::integer::{Integer, IntegerOperation};
use super::simd::{LEVEL_VARIABLE, Level, Operation, Simd};

/// The kernels that were chosen for this processor.
#[derive(Clone, Debug)]
pub struct KernelReport {
    /// The level, one of [`CpuDevice::levels`](super::CpuDevice::levels).
    pub level: &'static str,
    /// What the environment variable `CANDOR_CPU` names, if it is set.
    pub asked: Option<String>,
    /// The instructions of f32 kernels: weights in f32, f16 and bf16, and all that is no linear layer.
    pub float: &'static str,
    /// The instructions that multiply quantised weights, of 8 and of 4 bits.
    pub bytes: &'static str,
    /// Features of the processor that matter here and were found.
    pub features: Vec<&'static str>,
}

impl KernelReport {
    /// Of this processor and process.
    pub fn new() -> Self {
        let level = Level::chosen();
        KernelReport {
            level: level.name(),
            asked: std::env::var_os(LEVEL_VARIABLE).map(|name| name.to_string_lossy().into_owned()),
            float: level.run(FloatName),
            bytes: level.run_integer(BytesName),
            features: features(),
        }
    }

    /// Whether `CANDOR_CPU` decided.
    pub fn forced(&self) -> bool {
        self.asked.as_deref() == Some(self.level)
    }
}

impl Default for KernelReport {
    fn default() -> Self {
        Self::new()
    }
}

struct FloatName;

impl Operation for FloatName {
    type Output = &'static str;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> &'static str {
        S::NAME
    }
}

struct BytesName;

impl IntegerOperation for BytesName {
    type Output = &'static str;
    #[inline(always)]
    fn run<I: Integer>(self, _: I) -> &'static str {
        I::NAME
    }
}

fn features() -> Vec<&'static str> {
    macro_rules! found {
        ($is:ident: $($feature:tt)+) => { [$(($feature, std::arch::$is!($feature))),+] };
    }
    #[cfg(target_arch = "x86_64")]
    let all = found!(is_x86_feature_detected: "avx2" "fma" "f16c" "avxvnni" "avx512f" "avx512bw" "avx512dq" "avx512vl"
        "avx512vnni" "avx512bf16");
    #[cfg(target_arch = "aarch64")]
    let all = found!(is_aarch64_feature_detected: "neon" "fp16" "dotprod" "i8mm" "bf16" "sve");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let all: [(&str, bool); 0] = [];
    all.into_iter().filter(|(_, found)| *found).map(|(feature, _)| feature).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_runs() {
        let report = KernelReport::new();
        assert!(Level::NAMES.contains(&report.level));
        assert!(!report.float.is_empty() && !report.bytes.is_empty());
        // Each level above the plain one runs other instructions than that.
        for level in Level::all().skip(1) {
            assert_ne!(level.run(FloatName), "plain Rust");
            assert_ne!(level.run_integer(BytesName), "plain Rust");
        }
    }
}
