//! What the system says of the machine: processor, cores, memory. Linux alone tells most of it.

use std::fs;
use std::path::{Path, PathBuf};

/// The processor's name.
pub(crate) fn processor() -> Option<String> {
    processor_of(&fs::read_to_string("/proc/cpuinfo").ok()?)
}

fn processor_of(cpuinfo: &str) -> Option<String> {
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name))?;
        line.split_once(':').map(|(_, value)| value.trim())
    };
    if let Some(name) = field("model name") {
        return Some(name.to_string());
    }
    // ARM gives numbers: those of the cores that Candor is likely to meet.
    let (implementer, part) = (field("CPU implementer")?, field("CPU part")?);
    let name = match (implementer, part) {
        ("0x41", "0xd03") => "Cortex-A53",
        ("0x41", "0xd05") => "Cortex-A55",
        ("0x41", "0xd07") => "Cortex-A57",
        ("0x41", "0xd08") => "Cortex-A72",
        ("0x41", "0xd0b") => "Cortex-A76",
        ("0x41", "0xd0c") => "Neoverse N1",
        ("0x41", "0xd40") => "Neoverse V1",
        ("0x41", "0xd42") => "Cortex-A78AE",
        ("0x41", "0xd83") => "Neoverse V3AE",
        ("0x4e", "0x004") => "NVIDIA Carmel",
        _ => return Some(format!("ARM implementer {implementer} part {part}")),
    };
    Some(name.to_string())
}

/// The board's name, where the firmware gives one, as Jetsons and Raspberry Pis do.
pub(crate) fn board() -> Option<String> {
    let name = fs::read_to_string("/proc/device-tree/model").ok()?;
    Some(name.trim_end_matches('\0').trim().to_string()).filter(|name| !name.is_empty())
}

/// A figure of /proc/meminfo in bytes, such as `MemAvailable`.
pub(crate) fn memory(figure: &str) -> Option<u64> {
    kilobytes(&fs::read_to_string("/proc/meminfo").ok()?, figure)
}

/// A figure of a file of lines like `VmHWM:   123 kB`, in bytes.
pub(crate) fn kilobytes(text: &str, figure: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(figure)?.strip_prefix(':'))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

/// How many cores' time the process's control group may take, where it is limited.
pub(crate) fn cpu_quota() -> Option<f64> {
    limits("cpu.max").filter_map(|text| quota(&text)).min_by(f64::total_cmp)
}

/// "max 100000", or the microseconds of every so many that may be used.
fn quota(text: &str) -> Option<f64> {
    let (share, period) = text.trim().split_once(' ')?;
    Some(share.parse::<f64>().ok()? / period.parse::<f64>().ok().filter(|period| *period > 0.0)?)
}

/// How many bytes the process's control group may hold, where it is limited.
pub(crate) fn memory_limit() -> Option<u64> {
    limits("memory.max").filter_map(|text| text.trim().parse().ok()).min()
}

/// How many bytes this process can still take: what the system has available, or what its control group leaves of its
/// limit where that is less. `None` where the system does not say.
pub(crate) fn memory_available() -> Option<u64> {
    let rooms = control_groups().into_iter().filter_map(|group| {
        let read = |file: &str| fs::read_to_string(group.join(file)).ok();
        room(&read("memory.max")?, &read("memory.current")?, &read("memory.stat")?)
    });
    rooms.chain(memory("MemAvailable")).min()
}

/// What a control group leaves of its limit, pages of files that nobody used for a while among it: the system drops them
/// first.
fn room(limit: &str, used: &str, stat: &str) -> Option<u64> {
    let [limit, used] = [limit, used].map(|number| number.trim().parse::<u64>().ok());
    let droppable = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.trim().parse().ok());
    Some(limit?.saturating_sub(used?.saturating_sub(droppable.unwrap_or(0))))
}

/// A file of the process's control group and of those above it.
fn limits(file: &'static str) -> impl Iterator<Item = String> {
    control_groups().into_iter().filter_map(move |folder| fs::read_to_string(folder.join(file)).ok())
}

/// Folders of the process's control group (version 2) and of those above it.
fn control_groups() -> Vec<PathBuf> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = groups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").trim_start_matches('/');
    let root = Path::new("/sys/fs/cgroup");
    root.join(own).ancestors().take_while(|folder| folder.starts_with(root)).map(Path::to_path_buf).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_have_names() {
        assert_eq!(
            processor_of("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\n").as_deref(),
            Some("Some CPU @ 3 GHz")
        );
        let arm = |part: &str| processor_of(&format!("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: {part}\n"));
        assert_eq!(arm("0xd42").as_deref(), Some("Cortex-A78AE"));
        assert_eq!(arm("0xfff").as_deref(), Some("ARM implementer 0x41 part 0xfff"));
        assert_eq!(processor_of(""), None);
    }

    #[test]
    fn figures_and_quotas() {
        assert_eq!(kilobytes("MemTotal:  12 kB\nMemAvailable:    5 kB\n", "MemAvailable"), Some(5 * 1024));
        assert_eq!(kilobytes("MemTotal:  12 kB\n", "MemAvailable"), None);
        assert_eq!(quota("150000 100000\n"), Some(1.5));
        assert_eq!(quota("max 100000\n"), None);
        assert_eq!(quota("1 0"), None);
    }

    #[test]
    fn what_a_control_group_leaves() {
        assert_eq!(room("1000\n", "700\n", "anon 5\ninactive_file 200\n"), Some(500));
        assert_eq!(room("1000\n", "1700\n", "inactive_file 200\n"), Some(0));
        assert_eq!(room("1000\n", "100\n", ""), Some(900));
        assert_eq!(room("max\n", "700\n", "inactive_file 200\n"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_tells_the_memory() {
        assert!(memory("MemTotal").zip(memory("MemAvailable")).is_some_and(|(total, available)| total >= available));
    }
}
