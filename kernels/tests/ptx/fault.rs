//! What can go wrong, in words that lead to the place.

use super::instruction::Space;
use std::fmt;

/// What a kernel did wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// An access outside every buffer or variable.
    OutOfBounds { space: Space, address: u64, bytes: usize, note: String },
    /// An address that is not a multiple of the size of the access.
    Misaligned { space: Space, address: u64, bytes: usize },
    /// A write to constant memory.
    ReadOnly { address: u64 },
    /// A register was used before anything was written to it.
    UnwrittenRegister(String),
    /// Memory was read before anything was written to it.
    UnwrittenMemory { space: Space, address: u64, bytes: usize },
    /// Shared memory was used while a copy to it was under way.
    InFlight { address: u64, write: bool },
    /// Shared memory is used by two threads, by one to write, without a barrier between them.
    Race { address: u64, other: u16 },
    /// Threads wait at different barriers, or some wait for others that will not come.
    BarrierDivergence(String),
    /// An instruction of the whole warp was reached by a part of it.
    WarpDivergence(String),
    /// A lane executes an instruction whose mask of lanes does not hold it.
    NotInMask { lane: u32, mask: u32 },
    /// A value was taken from a lane that does not take part.
    InactiveLane { lane: u32, mask: u32 },
    /// An integer was divided by zero.
    DivisionByZero,
    /// An index into a table of branches that is too large.
    BranchIndex { index: u64, targets: usize },
    /// A trap or a failed assertion.
    Trap,
    /// A thread sleeps until something comes to pass that nobody brings about.
    Asleep,
    /// A thread executed more instructions than the limit.
    EndlessLoop { limit: u64 },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfBounds { space, address, bytes, note } => {
                write!(f, "access of {bytes} bytes outside {space} memory, at {address:#x} ({note})")
            }
            Self::Misaligned { space, address, bytes } => {
                write!(f, "access of {bytes} bytes of {space} memory at {address:#x}, which is no multiple of {bytes}")
            }
            Self::ReadOnly { address } => write!(f, "write to constant memory, at {address:#x}"),
            Self::UnwrittenRegister(name) => write!(f, "register {name} is read but was never written"),
            Self::UnwrittenMemory { space, address, bytes } => {
                write!(f, "read of {bytes} bytes of {space} memory at {address:#x} that were never written")
            }
            Self::InFlight { address, write } => {
                let what = if *write { "write to" } else { "read of" };
                write!(f, "{what} shared memory at {address:#x} while an asynchronous copy to it is under way")
            }
            Self::Race { address, other } => {
                write!(
                    f,
                    "no barrier lies between this use of shared memory at {address:#x} and that by thread {other}"
                )
            }
            Self::BarrierDivergence(note) | Self::WarpDivergence(note) => f.write_str(note),
            Self::NotInMask { lane, mask } => {
                write!(f, "lane {lane} executes this but is not in its mask {mask:#010x}")
            }
            Self::InactiveLane { lane, mask } => {
                write!(f, "the value of lane {lane} is taken, which is not among the lanes {mask:#010x} that take part")
            }
            Self::DivisionByZero => f.write_str("an integer is divided by zero"),
            Self::BranchIndex { index, targets } => write!(f, "branch {index} of {targets}"),
            Self::Trap => f.write_str("trap, or a failed assertion"),
            Self::Asleep => f.write_str("it waits for what another block does not do (is the launch cooperative?)"),
            Self::EndlessLoop { limit } => write!(f, "more than {limit} instructions: an endless loop?"),
        }
    }
}

/// Why a text was not accepted, a kernel not started, or stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The text is not PTX that is understood here.
    Parse { line: u32, token: String, message: String },
    /// The module has no such kernel.
    NoKernel(String),
    /// The launch does not fit the kernel.
    Launch { kernel: String, message: String },
    /// The kernel did something wrong.
    Fault(Box<Located>),
}

/// A fault and where it happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// The kernel's name.
    pub kernel: String,
    /// The line of the PTX text, from one.
    pub line: u32,
    /// What stands there.
    pub text: String,
    /// The block's index.
    pub block: [u32; 3],
    /// The thread's index in the block.
    pub thread: [u32; 3],
    /// What went wrong.
    pub fault: Fault,
}

impl Error {
    pub(super) fn parse(line: u32, token: &str, message: impl Into<String>) -> Self {
        Self::Parse { line, token: token.to_owned(), message: message.into() }
    }

    /// What a kernel did wrong, if that is the error.
    pub fn fault(&self) -> Option<&Fault> {
        match self {
            Self::Fault(located) => Some(&located.fault),
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Parse { line, token, message } => write!(f, "PTX line {line}, at `{token}`: {message}"),
            Self::NoKernel(name) => write!(f, "the module has no kernel `{name}`"),
            Self::Launch { kernel, message } => write!(f, "launch of `{kernel}`: {message}"),
            Self::Fault(at) => write!(
                f,
                "kernel `{}`, block {:?}, thread {:?}, PTX line {} `{}`: {}",
                at.kernel, at.block, at.thread, at.line, at.text, at.fault
            ),
        }
    }
}

impl std::error::Error for Error {}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Generic => "generic",
            Self::Global => "global",
            Self::Const => "constant",
            Self::Shared => "shared",
            Self::Local => "local",
            Self::Param => "parameter",
        })
    }
}
