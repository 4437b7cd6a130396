//! What the system says of this process's memory.

/// A figure of /proc/self/status in bytes, such as `VmHWM`, the most that was resident at once; Linux alone tells.
pub(crate) fn bytes(figure: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(figure)?.strip_prefix(':'))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
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
