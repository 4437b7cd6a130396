//! Finds accesses to one byte of shared memory that nothing orders: by two threads, one of them a write, without a
//! barrier between them. The threads of a block run one after another here, so that a missing barrier need not show
//! in a result.

use super::fault::Fault;

const NOBODY: u16 = u16::MAX;

/// Who did something, and after how many barriers.
#[derive(Clone, Copy)]
struct Mark {
    thread: u16,
    atomic: bool,
    /// Barriers of the block, and of the thread's warp.
    block: u32,
    warp: u32,
}

impl Default for Mark {
    fn default() -> Self {
        Self { thread: NOBODY, atomic: false, block: 0, warp: 0 }
    }
}

/// The last accesses to a byte.
#[derive(Clone, Copy, Default)]
struct Accesses {
    write: Mark,
    read: Mark,
    /// The read of another thread before that.
    earlier_read: Mark,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Atomic,
}

/// The accesses to the shared memory of a block.
#[derive(Default)]
pub(super) struct Races {
    block: u32,
    warps: Vec<u32>,
    bytes: Vec<Accesses>,
}

impl Races {
    /// All threads have met, or a new block starts.
    pub(super) fn block_barrier(&mut self) {
        self.block += 1;
    }

    /// The lanes of a warp have met.
    pub(super) fn warp_barrier(&mut self, warp: usize) {
        self.reach(warp);
        self.warps[warp] += 1;
    }

    fn reach(&mut self, warp: usize) {
        if self.warps.len() <= warp {
            self.warps.resize(warp + 1, 0);
        }
    }

    /// Notes an access, and says so if nothing orders it and an earlier one.
    pub(super) fn access(&mut self, kind: Kind, thread: u16, address: u64, len: usize) -> Result<(), Fault> {
        let warp = usize::from(thread / 32);
        self.reach(warp);
        let end = address as usize + len;
        if self.bytes.len() < end {
            self.bytes.resize(end, Accesses::default());
        }
        let mark = Mark { thread, atomic: kind == Kind::Atomic, block: self.block, warp: self.warps[warp] };
        for (at, byte) in self.bytes[address as usize..end].iter_mut().enumerate() {
            let against = match kind {
                Kind::Read => [byte.write, Mark::default(), Mark::default()],
                _ => [byte.write, byte.read, byte.earlier_read],
            };
            if let Some(other) = against.into_iter().find(|other| unordered(*other, mark)) {
                return Err(Fault::Race { address: address + at as u64, other: other.thread });
            }
            if kind != Kind::Read {
                byte.write = mark;
            } else if byte.read.thread == thread {
                byte.read = mark;
            } else {
                (byte.earlier_read, byte.read) = (byte.read, mark);
            }
        }
        Ok(())
    }
}

fn unordered(earlier: Mark, now: Mark) -> bool {
    let met_in_warp = earlier.thread / 32 == now.thread / 32 && earlier.warp < now.warp;
    earlier.thread != NOBODY
        && earlier.thread != now.thread
        && earlier.block == now.block
        && !met_in_warp
        && !(earlier.atomic && now.atomic)
}
