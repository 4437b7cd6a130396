//! What the system says of this process's memory.

/// A figure of /proc/self/status in bytes, such as `VmHWM`, the most that was resident at once; Linux alone tells.
pub(crate) fn bytes(figure: &str) -> Option<u64> {
    crate::machine::kilobytes(&std::fs::read_to_string("/proc/self/status").ok()?, figure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_tells_the_peak_memory() {
        assert!(bytes("VmHWM").is_some_and(|bytes| bytes > 1_000_000));
    }
}
