//! What an instruction is once it is parsed: every name resolved, every modifier understood.

/// An index into the registers of a function. Constants, addresses of variables and special registers are registers
/// too, set before the function starts, so that an operand is always one index.
pub(super) type Reg = u32;

/// The type suffix of an instruction or a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Type {
    Pred,
    B8,
    B16,
    B32,
    B64,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    F32,
    F64,
}

impl Type {
    pub(super) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "pred" => Self::Pred,
            "b8" => Self::B8,
            "b16" => Self::B16,
            "b32" => Self::B32,
            "b64" => Self::B64,
            "u8" => Self::U8,
            "u16" => Self::U16,
            "u32" => Self::U32,
            "u64" => Self::U64,
            "s8" => Self::S8,
            "s16" => Self::S16,
            "s32" => Self::S32,
            "s64" => Self::S64,
            "f16" => Self::F16,
            "f16x2" => Self::F16x2,
            "bf16" => Self::Bf16,
            "bf16x2" => Self::Bf16x2,
            "f32" => Self::F32,
            "f64" => Self::F64,
            _ => return None,
        })
    }

    pub(super) fn bits(self) -> u32 {
        match self {
            Self::Pred => 1,
            Self::B8 | Self::U8 | Self::S8 => 8,
            Self::B16 | Self::U16 | Self::S16 | Self::F16 | Self::Bf16 => 16,
            Self::B32 | Self::U32 | Self::S32 | Self::F32 | Self::F16x2 | Self::Bf16x2 => 32,
            Self::B64 | Self::U64 | Self::S64 | Self::F64 => 64,
        }
    }

    /// Bytes in memory.
    pub(super) fn bytes(self) -> usize {
        (self.bits() as usize).div_ceil(8)
    }

    pub(super) fn signed(self) -> bool {
        matches!(self, Self::S8 | Self::S16 | Self::S32 | Self::S64)
    }

    pub(super) fn float(self) -> bool {
        matches!(self, Self::F16 | Self::F16x2 | Self::Bf16 | Self::Bf16x2 | Self::F32 | Self::F64)
    }

    /// The type of one half of a packed pair.
    pub(super) fn half(self) -> Option<Self> {
        match self {
            Self::F16x2 => Some(Self::F16),
            Self::Bf16x2 => Some(Self::Bf16),
            _ => None,
        }
    }
}

/// The rounding of a floating-point result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Rounding {
    #[default]
    Nearest,
    Zero,
    Down,
    Up,
}

/// Modifiers of arithmetic.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mode {
    pub(super) rounding: Rounding,
    /// Subnormal operands and results become zero.
    pub(super) ftz: bool,
    pub(super) saturate: bool,
    /// `.NaN` of min and max: a NaN operand makes the result NaN.
    pub(super) nan: bool,
    /// Negative results become zero.
    pub(super) relu: bool,
    /// `.approx` of div, whose range is smaller than that of `.full` and `.rn`.
    pub(super) approximate: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unary {
    Abs,
    Neg,
    Not,
    /// Logical not: one for zero, else zero.
    CNot,
    PopCount,
    LeadingZeros,
    ReverseBits,
    /// The place of the highest bit that is not a copy of the sign; `ShiftAmount` counts from the top.
    FindHighest,
    FindShiftAmount,
    Reciprocal,
    Sqrt,
    ReciprocalSqrt,
    Exp2,
    Log2,
    Sin,
    Cos,
    Tanh,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Binary {
    Add,
    Sub,
    /// The low half of an integer product, or a floating-point product.
    Mul,
    MulHigh,
    /// A product of twice the width of the operands.
    MulWide,
    /// Floating-point division.
    Div,
    Min,
    Max,
    And,
    Or,
    Xor,
    ShiftLeft,
    ShiftRight,
    /// The size of `b` with the sign of `a`.
    CopySign,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ternary {
    Fma,
    MadLow,
    MadHigh,
    MadWide,
    /// `c + |a - b|`.
    Sad,
    /// Bytes of `b:a` chosen by `c`.
    Permute,
    FunnelLeft {
        wrap: bool,
    },
    FunnelRight {
        wrap: bool,
    },
    ExtractBits,
    /// Any function of three bits, as a table.
    Logic(u8),
    /// `c` plus the product of four bytes by four bytes.
    Dot4 {
        signed_a: bool,
        signed_b: bool,
    },
    /// `c` plus the product of two 16-bit numbers by two bytes.
    Dot2 {
        signed_a: bool,
        signed_b: bool,
        high: bool,
    },
    /// The absolute differences of four pairs of bytes.
    AbsDiff4,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Comparison {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    /// Neither is NaN.
    Number,
    /// Either is NaN.
    Nan,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Compare {
    pub(super) comparison: Comparison,
    pub(super) ty: Type,
    pub(super) ftz: bool,
    /// True where either operand is NaN.
    pub(super) unordered: bool,
    /// The result is combined with this predicate.
    pub(super) combine: Option<(Binary, Reg, bool)>,
    pub(super) a: Reg,
    pub(super) b: Reg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RoundToInteger {
    Nearest,
    Zero,
    Down,
    Up,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Convert {
    pub(super) to: Type,
    pub(super) from: Type,
    pub(super) mode: Mode,
    pub(super) integer: Option<RoundToInteger>,
    /// An integer result fills a wider register, with its sign if it has one.
    pub(super) width: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    Generic,
    Global,
    Const,
    Shared,
    Local,
    Param,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Address {
    pub(super) space: Space,
    pub(super) base: Reg,
    pub(super) offset: i64,
    /// The base has 32 bits, and so has the sum.
    pub(super) narrow: bool,
}

/// A load or a store of one to four values.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    pub(super) address: Address,
    pub(super) ty: Type,
    pub(super) count: u8,
    pub(super) registers: [Reg; 4],
    /// Bits of the registers that a load fills.
    pub(super) width: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AtomicOp {
    Arithmetic(Binary),
    Exchange,
    CompareSwap,
    /// `old >= b ? 0 : old + 1`.
    Increment,
    /// `old == 0 || old > b ? b : old - 1`.
    Decrement,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Atomic {
    pub(super) op: AtomicOp,
    pub(super) ty: Type,
    pub(super) address: Address,
    /// `None` for `red`.
    pub(super) result: Option<Reg>,
    pub(super) b: Reg,
    pub(super) c: Reg,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct AsyncCopy {
    pub(super) to: Address,
    pub(super) from: Address,
    pub(super) bytes: usize,
    /// How many bytes are read; the rest are zeros.
    pub(super) source_bytes: Option<Reg>,
}

#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) function: usize,
    /// Where the caller's frame holds arguments and results: offset and size.
    pub(super) arguments: Vec<(usize, usize)>,
    pub(super) results: Vec<(usize, usize)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ShuffleMode {
    Index,
    Up,
    Down,
    Xor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vote {
    All,
    Any,
    Uniform,
    Ballot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BarrierKind {
    Sync,
    Count,
    And,
    Or,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Product {
    F16,
    Bf16,
    Int8 { signed_a: bool, signed_b: bool, saturate: bool },
}

/// `mma.sync` of one of the shapes `m16n8kK`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mma {
    pub(super) product: Product,
    pub(super) k: usize,
    pub(super) d: [Reg; 4],
    pub(super) a: [Reg; 4],
    pub(super) b: [Reg; 2],
    pub(super) c: [Reg; 4],
}

/// An instruction that several threads execute together.
#[derive(Clone, Copy, Debug)]
pub(super) enum Collective {
    Shuffle {
        mode: ShuffleMode,
        d: Reg,
        p: Option<Reg>,
        a: Reg,
        b: Reg,
        c: Reg,
        mask: Reg,
    },
    Vote {
        vote: Vote,
        d: Reg,
        a: Reg,
        negated: bool,
        mask: Reg,
    },
    /// The lanes with the same value; with `all`, none unless every lane has it.
    Match {
        all: bool,
        d: Reg,
        p: Option<Reg>,
        a: Reg,
        mask: Reg,
    },
    Reduce {
        op: Binary,
        ty: Type,
        d: Reg,
        a: Reg,
        mask: Reg,
    },
    WarpBarrier {
        mask: Reg,
    },
    ActiveMask {
        d: Reg,
    },
    LoadMatrix {
        count: u8,
        transposed: bool,
        d: [Reg; 4],
        address: Address,
    },
    Mma(Mma),
    Barrier {
        kind: BarrierKind,
        id: Reg,
        count: Option<Reg>,
        d: Reg,
        a: Reg,
        negated: bool,
    },
}

/// An integer sum, difference or fused product that takes or leaves a carry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Carry {
    /// The product to which `c` is added, or the sum or difference of `a` and `c`.
    pub(super) op: Binary,
    pub(super) ty: Type,
    pub(super) takes: bool,
    pub(super) leaves: bool,
    pub(super) d: Reg,
    pub(super) a: Reg,
    pub(super) b: Reg,
    pub(super) c: Reg,
}

#[derive(Clone, Debug)]
pub(super) enum Op {
    Carry(Box<Carry>),
    Move {
        d: Reg,
        a: Reg,
    },
    /// Registers of equal width side by side, the first lowest.
    Pack {
        d: Reg,
        width: u32,
        parts: Vec<Reg>,
    },
    Unpack {
        a: Reg,
        width: u32,
        parts: Vec<Reg>,
    },
    Unary {
        op: Unary,
        ty: Type,
        mode: Mode,
        d: Reg,
        a: Reg,
    },
    Binary {
        op: Binary,
        ty: Type,
        mode: Mode,
        d: Reg,
        a: Reg,
        b: Reg,
    },
    Ternary {
        op: Ternary,
        ty: Type,
        mode: Mode,
        d: Reg,
        a: Reg,
        b: Reg,
        c: Reg,
    },
    /// `bfi`: the low `len` bits of `a` go into `b` at `start`.
    InsertBits {
        ty: Type,
        d: Reg,
        a: Reg,
        b: Reg,
        start: Reg,
        len: Reg,
    },
    Divide {
        ty: Type,
        remainder: bool,
        d: Reg,
        a: Reg,
        b: Reg,
    },
    SetPredicate {
        compare: Box<Compare>,
        p: Reg,
        q: Option<Reg>,
    },
    Set {
        compare: Box<Compare>,
        to: Type,
        d: Reg,
    },
    /// `testp`: finite, infinite, number, not a number, normal or subnormal.
    Test {
        kind: Test,
        ty: Type,
        p: Reg,
        a: Reg,
    },
    Select {
        d: Reg,
        a: Reg,
        b: Reg,
        p: Reg,
    },
    /// `slct`: `a` if `c >= 0`, else `b`.
    SelectSign {
        ty: Type,
        d: Reg,
        a: Reg,
        b: Reg,
        c: Reg,
    },
    Convert {
        convert: Box<Convert>,
        d: Reg,
        a: Reg,
    },
    /// Two numbers become a pair, the first its upper half.
    ConvertPair {
        half: Type,
        mode: Mode,
        d: Reg,
        high: Reg,
        low: Reg,
    },
    /// Adds or takes off the start of a space's window in the generic space.
    Window {
        space: Space,
        to_space: bool,
        d: Reg,
        a: Reg,
    },
    IsSpace {
        space: Space,
        p: Reg,
        a: Reg,
    },
    Clock {
        d: Reg,
    },
    Load(Box<Access>),
    Store(Box<Access>),
    Atomic(Box<Atomic>),
    AsyncCopy(Box<AsyncCopy>),
    AsyncCommit,
    /// `None`: every copy, also of groups not committed.
    AsyncWait {
        pending: Option<usize>,
    },
    /// Others go first.
    Sleep,
    /// A fence or a hint: nothing to do where one thread runs at a time and memory is in order.
    Fence,
    Branch {
        target: usize,
    },
    BranchIndexed {
        index: Reg,
        targets: Vec<usize>,
    },
    Call(Box<Call>),
    Return,
    Exit,
    Trap,
    Collective(Box<Collective>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Test {
    Finite,
    Infinite,
    Number,
    NotANumber,
    Normal,
    Subnormal,
}

#[derive(Clone, Debug)]
pub(super) struct Instruction {
    pub(super) line: u32,
    /// Executed only where this predicate is true, or false if negated.
    pub(super) guard: Option<(Reg, bool)>,
    pub(super) op: Op,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Special {
    Thread(u8),
    Threads(u8),
    Block(u8),
    Blocks(u8),
    Lane,
    Warp,
    Warps,
    WarpSize,
    /// Lanes at, below or above one's own.
    LaneMask {
        below: bool,
        own: bool,
        above: bool,
    },
    DynamicShared,
}

/// What a register holds before its function starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Preset {
    Constant(u64),
    Special(Special),
    /// The address of a variable of the module in shared memory.
    Shared(usize),
    /// The address of a variable of the module in global or constant memory.
    Global(usize),
    /// An offset into the frame of the function in local memory.
    Frame(usize),
}

#[derive(Clone, Debug)]
pub(super) struct Register {
    pub(super) name: String,
    pub(super) bits: u32,
    pub(super) preset: Option<Preset>,
}

/// A parameter: where it lies, in bytes.
#[derive(Clone, Debug)]
pub(super) struct Parameter {
    pub(super) offset: usize,
    pub(super) bytes: usize,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Function {
    pub(super) name: String,
    pub(super) entry: bool,
    /// It has a body, and not only a declaration.
    pub(super) defined: bool,
    pub(super) code: Vec<Instruction>,
    pub(super) registers: Vec<Register>,
    /// Of a kernel: offsets into the arguments. Of another function: offsets into its frame.
    pub(super) parameters: Vec<Parameter>,
    pub(super) results: Vec<Parameter>,
    pub(super) parameter_bytes: usize,
    pub(super) frame_bytes: usize,
    /// Of `.maxntid` and `.reqntid`.
    pub(super) most_threads: Option<u64>,
}

/// A variable in shared memory.
#[derive(Clone, Debug)]
pub(super) struct SharedVariable {
    /// The function it belongs to; `None` at module scope.
    pub(super) owner: Option<usize>,
    pub(super) align: usize,
    /// `None`: the dynamic shared memory of the launch.
    pub(super) bytes: Option<usize>,
}

/// A variable of module scope in global or constant memory.
#[derive(Clone, Debug)]
pub(super) struct GlobalVariable {
    pub(super) bytes: Vec<u8>,
    pub(super) constant: bool,
}
