//! What a cubin, which is an ELF file, and the words of the compiler beside it tell of each kernel.

use std::collections::BTreeMap;

/// A number of the compiler's record of a kernel: the most threads a block (`__launch_bounds__`).
const MAX_THREADS: u8 = 5;
/// Records of this kind carry their length; all others are four bytes long.
const SIZED: u8 = 4;
/// Bytes an instruction, since Volta.
const INSTRUCTION: u64 = 16;

/// One kernel for one architecture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Kernel {
    /// Registers a thread.
    pub(super) registers: u32,
    /// Bytes of shared memory that the source asks for.
    pub(super) shared: u32,
    /// Bytes of local memory a thread.
    pub(super) stack: u32,
    /// Bytes of spill stores and loads.
    pub(super) spilled: u32,
    /// Instructions, with those that fill up the end.
    pub(super) instructions: u32,
    /// The most threads a block.
    pub(super) threads: u32,
}

/// The kernels of a cubin by name.
pub(super) fn kernels(cubin: &[u8], log: &str) -> BTreeMap<String, Kernel> {
    let mut kernels = BTreeMap::new();
    let sections = sections(cubin);
    for (name, bytes) in &sections {
        let Some(kernel) = name.strip_prefix(".text.") else { continue };
        let mut figures = figures(log, kernel);
        figures.instructions = (bytes.len() as u64 / INSTRUCTION) as u32;
        let info = sections.iter().find(|(name, _)| name.strip_prefix(".nv.info.") == Some(kernel));
        figures.threads = info.and_then(|(_, info)| threads(info)).unwrap_or(1024);
        kernels.insert(kernel.to_owned(), figures);
    }
    kernels
}

/// What the log says of a kernel:
///
/// ```text
/// ptxas info    : Compiling entry function 'softmax' for 'sm_87'
/// ptxas info    : Function properties for softmax
/// ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
/// ptxas info    : Used 40 registers, used 1 barriers, 16 bytes smem, 376 bytes cmem[0]
/// ```
fn figures(log: &str, kernel: &str) -> Kernel {
    let begin = format!("Compiling entry function '{kernel}'");
    let part = log.split("Compiling entry function").find(|part| part.trim_start().starts_with(&format!("'{kernel}'")));
    let part = part.unwrap_or_else(|| panic!("the compiler's log has no {begin:?}:\n{log}"));
    let number =
        |what: &str| before(part, what).unwrap_or_else(|| panic!("the log of {kernel} has no {what:?}:\n{part}"));
    Kernel {
        registers: number(" registers"),
        shared: before(part, " bytes smem").unwrap_or(0),
        stack: number(" bytes stack frame"),
        spilled: number(" bytes spill stores") + number(" bytes spill loads"),
        ..Kernel::default()
    }
}

/// The number that stands before `what`.
fn before(text: &str, what: &str) -> Option<u32> {
    let head = &text[..text.find(what)?];
    let start = head.rfind(|character: char| !character.is_ascii_digit()).map_or(0, |at| at + 1);
    head[start..].parse().ok()
}

/// Name and bytes of each section.
fn sections(elf: &[u8]) -> Vec<(String, &[u8])> {
    assert!(elf.starts_with(b"\x7fELF\x02\x01"), "a cubin is a little-endian 64-bit ELF file");
    let headers = u64_at(elf, 40) as usize;
    let count = usize::from(u16_at(elf, 60));
    let header = |index: usize| headers + 64 * index;
    let bytes = |header: usize| {
        // Sections of kind 8 have a size and no bytes.
        if u32_at(elf, header + 4) == 8 {
            return &elf[..0];
        }
        let (start, len) = (u64_at(elf, header + 24) as usize, u64_at(elf, header + 32) as usize);
        &elf[start..start + len]
    };
    let names = bytes(header(usize::from(u16_at(elf, 62))));
    let name = |header: usize| {
        let name = &names[u32_at(elf, header) as usize..];
        let end = name.iter().position(|&byte| byte == 0).expect("an end of the name");
        String::from_utf8_lossy(&name[..end]).into_owned()
    };
    (0..count).map(|index| (name(header(index)), bytes(header(index)))).collect()
}

/// The most threads a block, of a kernel's records.
fn threads(mut info: &[u8]) -> Option<u32> {
    while info.len() >= 4 {
        let len = if info[0] == SIZED { 4 + usize::from(u16_at(info, 2)) } else { 4 };
        if info[0] == SIZED && info[1] == MAX_THREADS {
            return Some(u32_at(info, 4) * u32_at(info, 8) * u32_at(info, 12));
        }
        info = info.get(len..)?;
    }
    None
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[test]
fn the_log_is_read() {
    let log = "ptxas info    : 4 bytes gmem\nptxas info    : Compiling entry function 'ab' for 'sm_87'\n\
        ptxas info    : Function properties for ab\n\
        ptxas         .     16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n\
        ptxas info    : Used 40 registers, used 1 barriers, 376 bytes cmem[0]\n\
        ptxas info    : Compiling entry function 'a' for 'sm_87'\n\
        ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
        ptxas info    : Used 9 registers, used 1 barriers, 1040 bytes smem, 376 bytes cmem[0]";
    assert_eq!(figures(log, "ab"), Kernel { registers: 40, stack: 16, spilled: 12, ..Kernel::default() });
    assert_eq!(figures(log, "a"), Kernel { registers: 9, shared: 1040, ..Kernel::default() });
}
