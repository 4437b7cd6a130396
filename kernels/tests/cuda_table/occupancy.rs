//! How many blocks of a kernel a multiprocessor holds at once.

/// Registers of a multiprocessor; one number for all these architectures.
const REGISTERS: u32 = 64 << 10;
/// Registers are given to a warp in portions of this many.
const PORTION: u32 = 256;
/// Warps are spread over this many schedulers, each with its share of the registers.
const SCHEDULERS: u32 = 4;

/// A multiprocessor's limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) warps: u32,
    pub(super) blocks: u32,
    /// Bytes of shared memory.
    pub(super) shared: u32,
    /// Bytes of it that each block loses to the system.
    pub(super) reserved: u32,
    /// It is given in portions of this many bytes.
    pub(super) portion: u32,
}

impl Limits {
    /// Those of an architecture: 87 for sm_87.
    pub(super) fn of(architecture: u32) -> Limits {
        let (warps, blocks, kib) = match architecture {
            72 => return Limits { warps: 64, blocks: 32, shared: 96 << 10, reserved: 0, portion: 256 },
            87 => (48, 16, 164),
            89 => (48, 24, 100),
            90 => (64, 32, 228),
            110 => (48, 24, 228),
            other => panic!("what are the limits of sm_{other}?"),
        };
        Limits { warps, blocks, shared: kib << 10, reserved: 1 << 10, portion: 128 }
    }

    /// Blocks that fit, by what they need (the formula of NVIDIA's occupancy calculator).
    pub(super) fn blocks(&self, threads: u32, registers: u32, shared: u32) -> u32 {
        let warps = threads.div_ceil(32);
        let by_warps = self.warps / warps;
        let portions = (registers * 32).next_multiple_of(PORTION);
        let by_registers = REGISTERS / SCHEDULERS / portions * SCHEDULERS / warps;
        let shared = (shared + self.reserved).next_multiple_of(self.portion);
        let by_shared = self.shared.checked_div(shared).unwrap_or(u32::MAX);
        self.blocks.min(by_warps).min(by_registers).min(by_shared)
    }
}

#[test]
fn each_limit_limits() {
    let orin = Limits::of(87);
    // Blocks; warps; registers (64 · 32 a warp: 8 warps a scheduler); shared memory with the system's share.
    assert_eq!(orin.blocks(32, 16, 0), 16);
    assert_eq!(orin.blocks(256, 32, 0), 6);
    assert_eq!(orin.blocks(256, 64, 0), 4);
    assert_eq!(orin.blocks(128, 16, 48 << 10), 3);
    // Registers are rounded up to 256 a warp: 65 a thread count as 72.
    assert_eq!(orin.blocks(256, 65, 0), 3);
    assert_eq!(orin.blocks(64, 255, 0), 4);
    // Xavier loses no shared memory to the system.
    assert_eq!(Limits::of(72).blocks(128, 16, 48 << 10), 2);
    assert_eq!(Limits::of(72).blocks(128, 16, 0), 16);
}
