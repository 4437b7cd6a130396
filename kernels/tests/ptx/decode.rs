//! Makes a typed instruction of an opcode and its operands. A modifier, type or operand that is not understood is an
//! error that names it: nothing is passed over.

use super::instruction::{
    Access, Address, AsyncCopy, Atomic, AtomicOp, BarrierKind, Binary, Call, Carry, Collective, Compare, Comparison,
    Convert, Mma, Mode, Op, Preset, Product, Reg, RoundToInteger, Rounding, ShuffleMode, Space, Ternary, Test, Type,
    Unary, Vote,
};
use super::parse::{Body, Entity, Operand, Parsed, literal, space, special};

type Result<T, E = String> = std::result::Result<T, E>;

pub(super) fn decode<'a>(
    body: &mut Body<'a>,
    parsed: &Parsed,
    opcode: &'a str,
    operands: &[Operand<'a>],
) -> Result<Op> {
    let mut words = opcode.split('.');
    let base = words.next().unwrap_or("");
    let mut decoder = Decoder { body, parsed, base, modifiers: words.collect(), operands, at: 0 };
    let op = decoder.op()?;
    match (decoder.modifiers.first(), operands.get(decoder.at)) {
        (Some(modifier), _) => Err(format!("modifier `.{modifier}` is not known here")),
        (_, Some(operand)) => Err(format!("operand {operand:?} is too many")),
        _ => Ok(op),
    }
}

struct Decoder<'b, 'a> {
    body: &'b mut Body<'a>,
    parsed: &'b Parsed,
    base: &'a str,
    /// Those that are not understood yet.
    modifiers: Vec<&'a str>,
    operands: &'b [Operand<'a>],
    /// The next operand.
    at: usize,
}

impl<'a> Decoder<'_, 'a> {
    fn op(&mut self) -> Result<Op> {
        match self.base {
            "mov" => self.mov(),
            "add" | "sub" | "mad" if self.modifiers.contains(&"cc") => self.carry(),
            "addc" | "subc" | "madc" => self.carry(),
            "add" => self.sum(Binary::Add),
            "sub" => self.sum(Binary::Sub),
            "mul" => self.mul(),
            "mad" | "fma" => self.mad(),
            "div" => self.div(),
            "rem" => self.divide(true),
            "min" => self.extreme(Binary::Min),
            "max" => self.extreme(Binary::Max),
            "and" => self.plain_binary(Binary::And),
            "or" => self.plain_binary(Binary::Or),
            "xor" => self.plain_binary(Binary::Xor),
            "copysign" => self.plain_binary(Binary::CopySign),
            "shl" => self.shift(Binary::ShiftLeft),
            "shr" => self.shift(Binary::ShiftRight),
            "abs" => self.unary(Unary::Abs),
            "neg" => self.unary(Unary::Neg),
            "not" => self.unary(Unary::Not),
            "cnot" => self.unary(Unary::CNot),
            "brev" => self.unary(Unary::ReverseBits),
            "sqrt" => self.function(Unary::Sqrt),
            "rcp" => self.function(Unary::Reciprocal),
            "rsqrt" => self.function(Unary::ReciprocalSqrt),
            "ex2" => self.function(Unary::Exp2),
            "lg2" => self.function(Unary::Log2),
            "sin" => self.function(Unary::Sin),
            "cos" => self.function(Unary::Cos),
            "tanh" => self.function(Unary::Tanh),
            "popc" => self.count(Unary::PopCount),
            "clz" => self.count(Unary::LeadingZeros),
            "bfind" => {
                let shift = self.take("shiftamt");
                self.count(if shift { Unary::FindShiftAmount } else { Unary::FindHighest })
            }
            "bfe" => self.extract(),
            "bfi" => self.insert(),
            "prmt" => self.ternary(Ternary::Permute, [Type::B32; 3]),
            "lop3" => self.lop3(),
            "shf" => self.funnel(),
            "sad" => {
                let ty = self.peek_type()?;
                self.ternary(Ternary::Sad, [ty; 3])
            }
            "dp4a" | "dp2a" => self.dot(),
            "vabsdiff4" => self.abs_diff4(),
            "setp" => self.setp(),
            "set" => self.set(),
            "testp" => self.testp(),
            "selp" => self.selp(),
            "slct" => self.slct(),
            "cvt" => self.cvt(),
            "cvta" => self.cvta(),
            "isspacep" => self.isspacep(),
            "ld" | "ldu" => self.load(),
            "st" => self.store(),
            "atom" => self.atomic(true),
            "red" => self.atomic(false),
            "cp" => self.copy(),
            "membar" | "fence" => self.fence(),
            "prefetch" | "prefetchu" => self.prefetch(),
            "nanosleep" => {
                self.one_type(&[Type::U32])?;
                self.source(Type::U32)?;
                Ok(Op::Sleep)
            }
            "bra" => self.branch(),
            "brx" => self.branch_indexed(),
            "call" => self.call(),
            "ret" => self.bare(Op::Return),
            "exit" => self.bare(Op::Exit),
            "trap" => Ok(Op::Trap),
            "bar" | "barrier" => self.barrier(),
            "shfl" => self.shuffle(),
            "vote" => self.vote(),
            "match" => self.lane_match(),
            "redux" => self.reduce(),
            "activemask" => {
                self.one_type(&[Type::B32])?;
                let d = self.destination(Type::B32)?;
                Ok(Op::Collective(Box::new(Collective::ActiveMask { d })))
            }
            "ldmatrix" => self.load_matrix(),
            "mma" => self.mma(),
            _ => Err("unknown instruction".to_owned()),
        }
    }

    // ---- Modifiers

    fn take(&mut self, name: &str) -> bool {
        let found = self.modifiers.iter().position(|modifier| *modifier == name);
        found.map(|at| self.modifiers.remove(at)).is_some()
    }

    /// The first of the modifiers, if `f` knows it.
    fn take_known<T>(&mut self, f: impl Fn(&str) -> Option<T>) -> Option<T> {
        let at = self.modifiers.iter().position(|modifier| f(modifier).is_some())?;
        f(self.modifiers.remove(at))
    }

    fn require(&mut self, names: &[&str]) -> Result<()> {
        let missing = names.iter().find(|name| !self.take(name));
        missing.map_or(Ok(()), |name| Err(format!("`.{name}` is missing")))
    }

    fn take_type(&mut self) -> Result<Type> {
        self.take_known(Type::named).ok_or_else(|| "a type is missing".to_owned())
    }

    fn peek_type(&self) -> Result<Type> {
        let mut types = self.modifiers.iter().filter_map(|modifier| Type::named(modifier));
        types.next().ok_or_else(|| "a type is missing".to_owned())
    }

    fn one_type(&mut self, allowed: &[Type]) -> Result<Type> {
        let ty = self.take_type()?;
        if allowed.contains(&ty) { Ok(ty) } else { Err(format!("type {ty:?} is not allowed here")) }
    }

    fn rounding(&mut self) -> Option<Rounding> {
        self.take_known(|name| match name {
            "rn" => Some(Rounding::Nearest),
            "rz" => Some(Rounding::Zero),
            "rm" => Some(Rounding::Down),
            "rp" => Some(Rounding::Up),
            _ => None,
        })
    }

    fn mode(&mut self) -> Mode {
        Mode {
            rounding: self.rounding().unwrap_or_default(),
            ftz: self.take("ftz"),
            saturate: self.take("sat"),
            nan: self.take("NaN"),
            relu: self.take("relu"),
            approximate: false,
        }
    }

    /// Directed rounding of f64 does not occur in kernels and is not implemented.
    fn check_rounding(ty: Type, mode: Mode) -> Result<()> {
        match (ty, mode.rounding) {
            (Type::F64, rounding) if rounding != Rounding::Nearest => Err("f64 is rounded to nearest only".to_owned()),
            _ => Ok(()),
        }
    }

    // ---- Operands

    fn next(&mut self) -> Result<&Operand<'a>> {
        let operand = self.operands.get(self.at).ok_or("an operand is missing")?;
        self.at += 1;
        Ok(operand)
    }

    fn more(&self) -> bool {
        self.at < self.operands.len()
    }

    fn destination(&mut self, ty: Type) -> Result<Reg> {
        match *self.next()? {
            Operand::Name { name, negated: false } => self.target(name, ty),
            ref operand => Err(format!("{operand:?} is no register")),
        }
    }

    fn target(&mut self, name: &str, ty: Type) -> Result<Reg> {
        if name == "_" {
            return Ok(self.body.sink());
        }
        match self.body.find(name) {
            Some(Entity::Register(register)) => {
                self.check_width(register, ty, false)?;
                Ok(register)
            }
            _ => Err(format!("`{name}` is no register")),
        }
    }

    fn check_width(&self, register: Reg, ty: Type, wider: bool) -> Result<()> {
        let register = &self.body.function.registers[register as usize];
        match register.bits == ty.bits() || wider && register.bits > ty.bits() && ty != Type::Pred {
            true => Ok(()),
            false => Err(format!("`{}` has {} bits, not those of {ty:?}", register.name, register.bits)),
        }
    }

    fn source(&mut self, ty: Type) -> Result<Reg> {
        let operand = self.next()?.clone();
        self.value(&operand, ty, false)
    }

    /// A source that may be wider than its type, as stores and conversions take it.
    fn wide_source(&mut self, ty: Type) -> Result<Reg> {
        let operand = self.next()?.clone();
        self.value(&operand, ty, true)
    }

    fn value(&mut self, operand: &Operand<'a>, ty: Type, wider: bool) -> Result<Reg> {
        match *operand {
            Operand::Literal { text, negative } => {
                let value = literal(text, negative, ty)?;
                Ok(self.constant(value))
            }
            Operand::Name { name, negated: false } => {
                if let Some(special) = special(name) {
                    return Ok(self.body.preset(Preset::Special(special), name));
                }
                match self.body.find(name) {
                    Some(Entity::Register(register)) => {
                        self.check_width(register, ty, wider)?;
                        Ok(register)
                    }
                    Some(entity) => self.symbol(name, entity),
                    None => Err(format!("`{name}` is not declared")),
                }
            }
            ref operand => Err(format!("{operand:?} is no value")),
        }
    }

    fn constant(&mut self, value: u64) -> Reg {
        self.body.preset(Preset::Constant(value), "a constant")
    }

    /// The address of a variable.
    fn symbol(&mut self, name: &str, entity: Entity) -> Result<Reg> {
        let preset = match entity {
            Entity::Shared(variable) => Preset::Shared(variable),
            Entity::Global(variable) => Preset::Global(variable),
            Entity::Frame(offset, _) => Preset::Frame(offset),
            Entity::Argument(offset) => Preset::Constant(offset as u64),
            Entity::Register(_) | Entity::Function(_) | Entity::Trap => {
                return Err(format!("the address of `{name}` is not supported"));
            }
        };
        Ok(self.body.preset(preset, name))
    }

    /// A predicate, which may be negated.
    fn predicate(&mut self) -> Result<(Reg, bool)> {
        match self.next()?.clone() {
            Operand::Name { name, negated } => {
                let register = self.value(&Operand::Name { name, negated: false }, Type::Pred, false)?;
                Ok((register, negated))
            }
            operand => Err(format!("{operand:?} is no predicate")),
        }
    }

    /// One or two results, `d|p`.
    fn pair(&mut self, first: Type) -> Result<(Reg, Option<Reg>)> {
        match self.next()?.clone() {
            Operand::Name { name, negated: false } => Ok((self.target(name, first)?, None)),
            Operand::Pair(d, p) => Ok((self.target(d, first)?, Some(self.target(p, Type::Pred)?))),
            operand => Err(format!("{operand:?} is no register")),
        }
    }

    fn address(&mut self, space: Space) -> Result<Address> {
        let Operand::Address { base, offset } = self.next()?.clone() else {
            return Err("an address in brackets is missing".to_owned());
        };
        let mut space = space;
        let base = match *base {
            Operand::Literal { text, negative } => {
                let value = literal(text, negative, Type::B64)?;
                self.constant(value)
            }
            Operand::Name { name, negated: false } => match self.body.find(name) {
                Some(Entity::Register(register)) => self.address_register(register)?,
                Some(entity) => {
                    space = symbol_space(name, entity, space)?;
                    self.symbol(name, entity)?
                }
                None => return Err(format!("`{name}` is not declared")),
            },
            operand => return Err(format!("{operand:?} is no address")),
        };
        let narrow = self.width(base) == 32;
        Ok(Address { space, base, offset, narrow })
    }

    fn address_register(&self, register: Reg) -> Result<Reg> {
        let info = &self.body.function.registers[register as usize];
        match info.bits {
            32 | 64 => Ok(register),
            bits => Err(format!("`{}` of {bits} bits is no address", info.name)),
        }
    }

    /// `{a, b}`, all of one type, or one alone.
    fn vector(&mut self, ty: Type, target: bool, wider: bool) -> Result<Vec<Reg>> {
        let operand = self.next()?.clone();
        let parts = if let Operand::Vector(parts) = operand { parts } else { vec![operand] };
        let of = |part: &Operand<'a>| match (part, target) {
            (Operand::Name { name, negated: false }, true) if wider => self.wide_target(name, ty),
            (Operand::Name { name, negated: false }, true) => self.target(name, ty),
            (_, true) => Err(format!("{part:?} is no register")),
            (_, false) => self.value(part, ty, wider),
        };
        parts.iter().map(of).collect()
    }

    fn wide_target(&mut self, name: &str, ty: Type) -> Result<Reg> {
        match self.body.find(name) {
            Some(Entity::Register(register)) => {
                self.check_width(register, ty, true)?;
                Ok(register)
            }
            _ => self.target(name, ty),
        }
    }

    fn registers<const N: usize>(&mut self, ty: Type, target: bool) -> Result<[Reg; N]> {
        let registers = self.vector(ty, target, false)?;
        registers.try_into().map_err(|registers: Vec<Reg>| format!("{} registers in place of {N}", registers.len()))
    }

    fn width(&self, register: Reg) -> u32 {
        self.body.function.registers[register as usize].bits
    }

    fn bare(&mut self, op: Op) -> Result<Op> {
        self.take("uni");
        Ok(op)
    }

    // ---- Moves

    fn mov(&mut self) -> Result<Op> {
        let ty = self.take_type()?;
        match (self.operands.first(), self.operands.get(1)) {
            (Some(Operand::Vector(_)), _) => {
                let Operand::Vector(parts) = self.next()?.clone() else { return Err("a vector is missing".to_owned()) };
                let width = ty.bits() / parts.len().max(1) as u32;
                let part = sized(width)?;
                let of = |part_of: &Operand<'a>| match part_of {
                    Operand::Name { name, negated: false } => self.target(name, part),
                    _ => Err(format!("{part_of:?} is no register")),
                };
                let parts = parts.iter().map(of).collect::<Result<_>>()?;
                Ok(Op::Unpack { a: self.source(ty)?, width, parts })
            }
            (_, Some(Operand::Vector(parts))) => {
                let (width, d) = (ty.bits() / parts.len().max(1) as u32, self.destination(ty)?);
                Ok(Op::Pack { d, width, parts: self.vector(sized(width)?, false, false)? })
            }
            (_, Some(Operand::Name { name, .. })) if matches!(*name, "%clock" | "%clock64" | "%globaltimer") => {
                self.at += 1;
                let Operand::Name { name, .. } = self.operands[0] else { return Err("no register".to_owned()) };
                self.at += 1;
                Ok(Op::Clock { d: self.target(name, ty)? })
            }
            _ => Ok(Op::Move { d: self.destination(ty)?, a: self.source(ty)? }),
        }
    }

    fn cvta(&mut self) -> Result<Op> {
        let to_space = self.take("to");
        let space = self.take_known(space).ok_or("a state space is missing")?;
        let ty = self.one_type(&[Type::U64, Type::B64])?;
        let (d, a) = (self.destination(ty)?, self.source(ty)?);
        Ok(Op::Window { space, to_space, d, a })
    }

    fn isspacep(&mut self) -> Result<Op> {
        let space = self.take_known(space).ok_or("a state space is missing")?;
        Ok(Op::IsSpace { space, p: self.destination(Type::Pred)?, a: self.source(Type::B64)? })
    }

    // ---- Arithmetic

    fn plain_binary(&mut self, op: Binary) -> Result<Op> {
        let ty = self.take_type()?;
        self.binary_of(op, ty, Mode::default(), [ty; 3])
    }

    fn binary_of(&mut self, op: Binary, ty: Type, mode: Mode, [d, a, b]: [Type; 3]) -> Result<Op> {
        let (d, a, b) = (self.destination(d)?, self.source(a)?, self.source(b)?);
        Ok(Op::Binary { op, ty, mode, d, a, b })
    }

    fn sum(&mut self, op: Binary) -> Result<Op> {
        let (mode, ty) = (self.mode(), self.take_type()?);
        Self::check_rounding(ty, mode)?;
        self.binary_of(op, ty, mode, [ty; 3])
    }

    fn carry(&mut self) -> Result<Op> {
        let leaves = self.take("cc");
        let (takes, low) = (self.base.ends_with('c'), self.take("lo"));
        let op = match &self.base[..3] {
            "add" => Binary::Add,
            "sub" => Binary::Sub,
            _ if low => Binary::Mul,
            _ => Binary::MulHigh,
        };
        let product = matches!(op, Binary::Mul | Binary::MulHigh);
        if product && !low {
            self.require(&["hi"])?;
        }
        let ty = self.one_type(&[Type::U32, Type::S32, Type::U64, Type::S64])?;
        let (d, a, b) = (self.destination(ty)?, self.source(ty)?, self.source(ty)?);
        let c = if product { self.source(ty)? } else { b };
        Ok(Op::Carry(Box::new(Carry { op, ty, takes, leaves, d, a, b, c })))
    }

    fn extreme(&mut self, op: Binary) -> Result<Op> {
        let (mode, ty) = (self.mode(), self.take_type()?);
        self.binary_of(op, ty, mode, [ty; 3])
    }

    fn shift(&mut self, op: Binary) -> Result<Op> {
        let ty = self.take_type()?;
        self.binary_of(op, ty, Mode::default(), [ty, ty, Type::U32])
    }

    fn mul(&mut self) -> Result<Op> {
        if self.peek_type()?.float() {
            return self.sum(Binary::Mul);
        }
        let part = self.part()?;
        let ty = self.take_type()?;
        match part {
            "lo" => self.binary_of(Binary::Mul, ty, Mode::default(), [ty; 3]),
            "hi" => self.binary_of(Binary::MulHigh, ty, Mode::default(), [ty; 3]),
            _ => self.binary_of(Binary::MulWide, ty, Mode::default(), [twice(ty)?, ty, ty]),
        }
    }

    /// Which part of an integer product is meant.
    fn part(&mut self) -> Result<&'static str> {
        let parts = ["lo", "hi", "wide"];
        parts.into_iter().find(|part| self.take(part)).ok_or_else(|| "`.lo`, `.hi` or `.wide` is missing".to_owned())
    }

    fn mad(&mut self) -> Result<Op> {
        if self.peek_type()?.float() {
            let (mode, ty) = (self.mode(), self.take_type()?);
            Self::check_rounding(ty, mode)?;
            return self.ternary_of(Ternary::Fma, ty, mode, [ty; 4]);
        }
        let part = self.part()?;
        let ty = self.take_type()?;
        match part {
            "lo" => self.ternary_of(Ternary::MadLow, ty, Mode::default(), [ty; 4]),
            "hi" => self.ternary_of(Ternary::MadHigh, ty, Mode::default(), [ty; 4]),
            _ => {
                let wide = twice(ty)?;
                self.ternary_of(Ternary::MadWide, ty, Mode::default(), [wide, ty, ty, wide])
            }
        }
    }

    fn ternary_of(&mut self, op: Ternary, ty: Type, mode: Mode, [d, a, b, c]: [Type; 4]) -> Result<Op> {
        let (d, a, b, c) = (self.destination(d)?, self.source(a)?, self.source(b)?, self.source(c)?);
        Ok(Op::Ternary { op, ty, mode, d, a, b, c })
    }

    /// With one type suffix, which is the result's type too.
    fn ternary(&mut self, op: Ternary, [a, b, c]: [Type; 3]) -> Result<Op> {
        let ty = self.take_type()?;
        self.ternary_of(op, ty, Mode::default(), [ty, a, b, c])
    }

    fn div(&mut self) -> Result<Op> {
        if !self.peek_type()?.float() {
            return self.divide(false);
        }
        let approximate = self.take("approx");
        let full = self.take("full");
        let rounding = self.rounding();
        let mode = Mode { approximate, ..self.mode() };
        if !approximate && !full && rounding != Some(Rounding::Nearest) {
            return Err("division is rounded to nearest only".to_owned());
        }
        let ty = self.one_type(&[Type::F32, Type::F64])?;
        self.binary_of(Binary::Div, ty, mode, [ty; 3])
    }

    fn divide(&mut self, remainder: bool) -> Result<Op> {
        let ty = self.take_type()?;
        Ok(Op::Divide { ty, remainder, d: self.destination(ty)?, a: self.source(ty)?, b: self.source(ty)? })
    }

    fn unary(&mut self, op: Unary) -> Result<Op> {
        let (mode, ty) = (self.mode(), self.take_type()?);
        // The sign of a subnormal operand remains; only f32 has the modifier.
        Ok(Op::Unary { op, ty, mode, d: self.destination(ty)?, a: self.source(ty)? })
    }

    fn function(&mut self, op: Unary) -> Result<Op> {
        let approximate = self.take("approx");
        let rounding = self.rounding();
        if !approximate && rounding != Some(Rounding::Nearest) {
            return Err("functions are approximate or rounded to nearest".to_owned());
        }
        let mode = Mode { approximate, ..self.mode() };
        let ty = self.take_type()?;
        Ok(Op::Unary { op, ty, mode, d: self.destination(ty)?, a: self.source(ty)? })
    }

    fn count(&mut self, op: Unary) -> Result<Op> {
        let ty = self.take_type()?;
        Ok(Op::Unary { op, ty, mode: Mode::default(), d: self.destination(Type::U32)?, a: self.source(ty)? })
    }

    fn extract(&mut self) -> Result<Op> {
        let ty = self.peek_type()?;
        self.ternary(Ternary::ExtractBits, [ty, Type::U32, Type::U32])
    }

    fn insert(&mut self) -> Result<Op> {
        let ty = self.one_type(&[Type::B32, Type::B64])?;
        let (d, a, b) = (self.destination(ty)?, self.source(ty)?, self.source(ty)?);
        Ok(Op::InsertBits { ty, d, a, b, start: self.source(Type::U32)?, len: self.source(Type::U32)? })
    }

    fn lop3(&mut self) -> Result<Op> {
        let ty = self.one_type(&[Type::B32])?;
        let Some(Operand::Literal { text, negative: false }) = self.operands.get(4) else {
            return Err("the table is missing".to_owned());
        };
        let table = literal(text, false, Type::B8)? as u8;
        let op = self.ternary_of(Ternary::Logic(table), ty, Mode::default(), [ty; 4])?;
        self.at += 1;
        Ok(op)
    }

    fn funnel(&mut self) -> Result<Op> {
        let left = self.take("l");
        if !left {
            self.require(&["r"])?;
        }
        let wrap = self.take("wrap");
        if !wrap {
            self.require(&["clamp"])?;
        }
        let op = if left { Ternary::FunnelLeft { wrap } } else { Ternary::FunnelRight { wrap } };
        self.ternary(op, [Type::B32; 3])
    }

    fn dot(&mut self) -> Result<Op> {
        let halves = ["lo", "hi"].map(|half| self.base == "dp2a" && self.take(half));
        let types = [self.one_type(&[Type::S32, Type::U32])?, self.one_type(&[Type::S32, Type::U32])?];
        let [signed_a, signed_b] = types.map(Type::signed);
        let op = match (self.base, halves) {
            ("dp4a", _) => Ternary::Dot4 { signed_a, signed_b },
            (_, [true, false] | [false, true]) => Ternary::Dot2 { signed_a, signed_b, high: halves[1] },
            _ => return Err("`.lo` or `.hi` is missing".to_owned()),
        };
        self.ternary_of(op, Type::U32, Mode::default(), [Type::B32; 4])
    }

    fn abs_diff4(&mut self) -> Result<Op> {
        for _ in 0..3 {
            self.one_type(&[Type::U32])?;
        }
        self.ternary_of(Ternary::AbsDiff4, Type::U32, Mode::default(), [Type::U32; 4])
    }

    // ---- Comparison and conversion

    fn comparison(&mut self) -> Result<(Comparison, bool)> {
        let known = |name: &str| {
            Some(match name {
                "eq" => (Comparison::Eq, false),
                "ne" => (Comparison::Ne, false),
                "lt" | "lo" => (Comparison::Lt, false),
                "le" | "ls" => (Comparison::Le, false),
                "gt" | "hi" => (Comparison::Gt, false),
                "ge" | "hs" => (Comparison::Ge, false),
                "equ" => (Comparison::Eq, true),
                "neu" => (Comparison::Ne, true),
                "ltu" => (Comparison::Lt, true),
                "leu" => (Comparison::Le, true),
                "gtu" => (Comparison::Gt, true),
                "geu" => (Comparison::Ge, true),
                "num" => (Comparison::Number, false),
                "nan" => (Comparison::Nan, false),
                _ => return None,
            })
        };
        self.take_known(known).ok_or_else(|| "a comparison is missing".to_owned())
    }

    fn combine(&mut self) -> Option<Binary> {
        self.take_known(|name| match name {
            "and" => Some(Binary::And),
            "or" => Some(Binary::Or),
            "xor" => Some(Binary::Xor),
            _ => None,
        })
    }

    fn compare_of(
        &mut self,
        ty: Type,
        comparison: (Comparison, bool),
        combine: Option<Binary>,
    ) -> Result<Box<Compare>> {
        let ftz = self.take("ftz");
        let (a, b) = (self.source(ty)?, self.source(ty)?);
        let combine = match combine {
            Some(op) => {
                let (register, negated) = self.predicate()?;
                Some((op, register, negated))
            }
            None => None,
        };
        Ok(Box::new(Compare { comparison: comparison.0, unordered: comparison.1, ty, ftz, combine, a, b }))
    }

    fn setp(&mut self) -> Result<Op> {
        let (comparison, combine, ty) = (self.comparison()?, self.combine(), self.take_type()?);
        let (p, q) = match self.next()?.clone() {
            Operand::Name { name, negated: false } => (self.target(name, Type::Pred)?, None),
            Operand::Pair(p, q) => (self.target(p, Type::Pred)?, Some(self.target(q, Type::Pred)?)),
            operand => return Err(format!("{operand:?} is no predicate")),
        };
        Ok(Op::SetPredicate { compare: self.compare_of(ty, comparison, combine)?, p, q })
    }

    fn set(&mut self) -> Result<Op> {
        let (comparison, combine) = (self.comparison()?, self.combine());
        let (to, ty) = (self.take_type()?, self.take_type()?);
        let d = self.destination(to)?;
        Ok(Op::Set { compare: self.compare_of(ty, comparison, combine)?, to, d })
    }

    fn testp(&mut self) -> Result<Op> {
        let known = |name: &str| {
            Some(match name {
                "finite" => Test::Finite,
                "infinite" => Test::Infinite,
                "number" => Test::Number,
                "notanumber" => Test::NotANumber,
                "normal" => Test::Normal,
                "subnormal" => Test::Subnormal,
                _ => return None,
            })
        };
        let kind = self.take_known(known).ok_or("what to test is missing")?;
        let ty = self.one_type(&[Type::F32, Type::F64])?;
        Ok(Op::Test { kind, ty, p: self.destination(Type::Pred)?, a: self.source(ty)? })
    }

    fn selp(&mut self) -> Result<Op> {
        let ty = self.take_type()?;
        let (d, a, b) = (self.destination(ty)?, self.source(ty)?, self.source(ty)?);
        Ok(Op::Select { d, a, b, p: self.source(Type::Pred)? })
    }

    fn slct(&mut self) -> Result<Op> {
        let ty = self.take_type()?;
        let by = self.one_type(&[Type::S32, Type::F32])?;
        let (d, a, b) = (self.destination(ty)?, self.source(ty)?, self.source(ty)?);
        Ok(Op::SelectSign { ty: by, d, a, b, c: self.source(by)? })
    }

    fn cvt(&mut self) -> Result<Op> {
        let integer = self.take_known(|name| match name {
            "rni" => Some(RoundToInteger::Nearest),
            "rzi" => Some(RoundToInteger::Zero),
            "rmi" => Some(RoundToInteger::Down),
            "rpi" => Some(RoundToInteger::Up),
            _ => None,
        });
        let mode = self.mode();
        let (to, from) = (self.take_type()?, self.take_type()?);
        if let Some(half) = to.half() {
            let d = self.destination(to)?;
            return Ok(Op::ConvertPair { half, mode, d, high: self.source(from)?, low: self.source(from)? });
        }
        let Operand::Name { name, negated: false } = *self.next()? else { return Err("no register".to_owned()) };
        // Only an integer may be put into a wider register.
        let d = if to.float() { self.target(name, to)? } else { self.wide_target(name, to)? };
        let a = if from.float() { self.source(from)? } else { self.wide_source(from)? };
        let convert = Box::new(Convert { to, from, mode, integer, width: self.width(d) });
        Ok(Op::Convert { convert, d, a })
    }

    // ---- Memory

    fn space(&mut self) -> Space {
        self.take_known(space).unwrap_or(Space::Generic)
    }

    /// What says how long to keep data in which cache changes no result.
    fn cache_hints(&mut self) {
        for hint in ["ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc"] {
            self.take(hint);
        }
        self.modifiers.retain(|modifier| !modifier.starts_with("L1::") && !modifier.starts_with("L2::"));
    }

    /// One thread runs at a time and memory is in order, so that every order is kept.
    fn memory_order(&mut self) {
        for order in ["weak", "volatile", "relaxed", "acquire", "release", "acq_rel"] {
            self.take(order);
        }
        for scope in ["cta", "gpu", "sys", "cluster"] {
            self.take(scope);
        }
    }

    fn vector_len(&mut self) -> usize {
        match (self.take("v2"), self.take("v4")) {
            (true, _) => 2,
            (_, true) => 4,
            _ => 1,
        }
    }

    fn access(&mut self, load: bool) -> Result<Box<Access>> {
        let hinted = self.modifiers.contains(&"L2::cache_hint");
        self.cache_hints();
        self.memory_order();
        let (space, count, ty) = (self.space(), self.vector_len(), self.take_type()?);
        let (address, values) = if load {
            let values = self.vector(ty, true, true)?;
            (self.address(space)?, values)
        } else {
            (self.address(space)?, self.vector(ty, false, true)?)
        };
        if hinted && self.more() {
            self.source(Type::B64)?;
        }
        if values.len() != count {
            return Err(format!("{} values in place of {count}", values.len()));
        }
        let mut registers = [0; 4];
        registers[..count].copy_from_slice(&values);
        let width = self.width(values[0]);
        if load && values.iter().any(|register| self.width(*register) != width) {
            return Err("registers of different widths".to_owned());
        }
        Ok(Box::new(Access { address, ty, count: count as u8, registers, width }))
    }

    fn load(&mut self) -> Result<Op> {
        Ok(Op::Load(self.access(true)?))
    }

    fn store(&mut self) -> Result<Op> {
        Ok(Op::Store(self.access(false)?))
    }

    fn atomic(&mut self, with_result: bool) -> Result<Op> {
        self.memory_order();
        self.take("noftz");
        let space = self.space();
        let known = |name: &str| {
            Some(match name {
                "add" => AtomicOp::Arithmetic(Binary::Add),
                "min" => AtomicOp::Arithmetic(Binary::Min),
                "max" => AtomicOp::Arithmetic(Binary::Max),
                "and" => AtomicOp::Arithmetic(Binary::And),
                "or" => AtomicOp::Arithmetic(Binary::Or),
                "xor" => AtomicOp::Arithmetic(Binary::Xor),
                "exch" => AtomicOp::Exchange,
                "cas" => AtomicOp::CompareSwap,
                "inc" => AtomicOp::Increment,
                "dec" => AtomicOp::Decrement,
                _ => return None,
            })
        };
        let op = self.take_known(known).ok_or("an operation is missing")?;
        let ty = self.take_type()?;
        let result = if with_result { Some(self.destination(ty)?) } else { None };
        let address = self.address(space)?;
        let b = self.source(ty)?;
        let c = if op == AtomicOp::CompareSwap { self.source(ty)? } else { b };
        Ok(Op::Atomic(Box::new(Atomic { op, ty, address, result, b, c })))
    }

    fn copy(&mut self) -> Result<Op> {
        self.require(&["async"])?;
        if self.take("commit_group") {
            return Ok(Op::AsyncCommit);
        }
        if self.take("wait_all") {
            return Ok(Op::AsyncWait { pending: None });
        }
        if self.take("wait_group") {
            return match *self.next()? {
                Operand::Literal { text, negative: false } => {
                    Ok(Op::AsyncWait { pending: Some(literal(text, false, Type::U32)? as usize) })
                }
                ref operand => Err(format!("{operand:?} is no number of groups")),
            };
        }
        let through_l1 = self.take("ca");
        if !through_l1 {
            self.require(&["cg"])?;
        }
        self.modifiers.retain(|modifier| !matches!(*modifier, "L2::64B" | "L2::128B" | "L2::256B"));
        // The target's space comes first.
        let (to, from) = (self.take_known(space), self.take_known(space));
        if (to, from) != (Some(Space::Shared), Some(Space::Global)) {
            return Err("copies go from global to shared memory".to_owned());
        }
        let (to, from) = (self.address(Space::Shared)?, self.address(Space::Global)?);
        let bytes = match *self.next()? {
            Operand::Literal { text, negative: false } => literal(text, false, Type::U32)? as usize,
            ref operand => return Err(format!("{operand:?} is no size")),
        };
        if !(bytes == 16 || through_l1 && matches!(bytes, 4 | 8)) {
            return Err(format!("copies of {bytes} bytes do not exist"));
        }
        let source_bytes = if self.more() { Some(self.source(Type::U32)?) } else { None };
        Ok(Op::AsyncCopy(Box::new(AsyncCopy { to, from, bytes, source_bytes })))
    }

    fn fence(&mut self) -> Result<Op> {
        let known = ["cta", "gl", "gpu", "sys", "sc", "acq_rel"];
        self.modifiers.retain(|modifier| !known.contains(modifier));
        Ok(Op::Fence)
    }

    fn prefetch(&mut self) -> Result<Op> {
        let space = self.space();
        for level in ["L1", "L2"] {
            self.take(level);
        }
        self.address(space)?;
        Ok(Op::Fence)
    }

    // ---- Control

    fn name(&mut self) -> Result<&'a str> {
        match *self.next()? {
            Operand::Name { name, negated: false } => Ok(name),
            ref operand => Err(format!("{operand:?} is no name")),
        }
    }

    fn branch(&mut self) -> Result<Op> {
        self.take("uni");
        let label = self.name()?;
        self.body.branch(label);
        Ok(Op::Branch { target: usize::MAX })
    }

    fn branch_indexed(&mut self) -> Result<Op> {
        self.require(&["idx"])?;
        self.take("uni");
        let index = self.source(Type::U32)?;
        let table = self.name()?;
        self.body.branch(table);
        Ok(Op::BranchIndexed { index, targets: Vec::new() })
    }

    fn call(&mut self) -> Result<Op> {
        self.take("uni");
        let results = match self.operands.first() {
            Some(Operand::Group(_)) => self.frames()?,
            _ => Vec::new(),
        };
        let name = self.name()?;
        let arguments = if self.more() { self.frames()? } else { Vec::new() };
        let function = match self.body.find(name) {
            Some(Entity::Function(function)) => function,
            Some(Entity::Trap) => return Ok(Op::Trap),
            _ => return Err(format!("`{name}` has no body here")),
        };
        if self.parsed.functions[function].entry {
            return Err(format!("`{name}` is a kernel"));
        }
        Ok(Op::Call(Box::new(Call { function, arguments, results })))
    }

    /// The variables of `(a, b)`, as offsets and sizes.
    fn frames(&mut self) -> Result<Vec<(usize, usize)>> {
        let Operand::Group(names) = self.next()?.clone() else {
            return Err("a list in parentheses is missing".to_owned());
        };
        let of = |operand: &Operand<'a>| match operand {
            Operand::Name { name, negated: false } => match self.body.find(name) {
                Some(Entity::Frame(offset, bytes)) => Ok((offset, bytes)),
                _ => Err(format!("`{name}` is no parameter")),
            },
            _ => Err(format!("{operand:?} is no parameter")),
        };
        names.iter().map(of).collect()
    }

    // ---- Collectives

    fn collective(collective: Collective) -> Result<Op> {
        Ok(Op::Collective(Box::new(collective)))
    }

    fn barrier(&mut self) -> Result<Op> {
        self.take("cta");
        self.take("aligned");
        if self.take("warp") {
            self.require(&["sync"])?;
            return Self::collective(Collective::WarpBarrier { mask: self.source(Type::B32)? });
        }
        if self.take("sync") {
            let id = self.source(Type::U32)?;
            let count = if self.more() { Some(self.source(Type::U32)?) } else { None };
            let d = self.body.sink();
            let kind = BarrierKind::Sync;
            return Self::collective(Collective::Barrier { kind, id, count, d, a: id, negated: false });
        }
        self.require(&["red"])?;
        let known = |name: &str| match name {
            "popc" => Some((BarrierKind::Count, Type::U32)),
            "and" => Some((BarrierKind::And, Type::Pred)),
            "or" => Some((BarrierKind::Or, Type::Pred)),
            _ => None,
        };
        let (kind, ty) = self.take_known(known).ok_or("an operation is missing")?;
        self.one_type(&[ty])?;
        let (d, id) = (self.destination(ty)?, self.source(Type::U32)?);
        let count = if self.operands.len() > 3 { Some(self.source(Type::U32)?) } else { None };
        let (a, negated) = self.predicate()?;
        Self::collective(Collective::Barrier { kind, id, count, d, a, negated })
    }

    fn shuffle(&mut self) -> Result<Op> {
        self.require(&["sync"])?;
        let known = |name: &str| match name {
            "idx" => Some(ShuffleMode::Index),
            "up" => Some(ShuffleMode::Up),
            "down" => Some(ShuffleMode::Down),
            "bfly" => Some(ShuffleMode::Xor),
            _ => None,
        };
        let mode = self.take_known(known).ok_or("a direction is missing")?;
        let ty = self.one_type(&[Type::B32])?;
        let (d, p) = self.pair(ty)?;
        let (a, b, c) = (self.source(ty)?, self.source(ty)?, self.source(ty)?);
        Self::collective(Collective::Shuffle { mode, d, p, a, b, c, mask: self.source(ty)? })
    }

    fn vote(&mut self) -> Result<Op> {
        self.require(&["sync"])?;
        let known = |name: &str| match name {
            "all" => Some(Vote::All),
            "any" => Some(Vote::Any),
            "uni" => Some(Vote::Uniform),
            "ballot" => Some(Vote::Ballot),
            _ => None,
        };
        let vote = self.take_known(known).ok_or("a kind is missing")?;
        let ty = self.one_type(&[if vote == Vote::Ballot { Type::B32 } else { Type::Pred }])?;
        let d = self.destination(ty)?;
        let (a, negated) = self.predicate()?;
        Self::collective(Collective::Vote { vote, d, a, negated, mask: self.source(Type::B32)? })
    }

    fn lane_match(&mut self) -> Result<Op> {
        let all = self.take("all");
        if !all {
            self.require(&["any"])?;
        }
        self.require(&["sync"])?;
        let ty = self.one_type(&[Type::B32, Type::B64])?;
        let (d, p) = self.pair(Type::B32)?;
        let a = self.source(ty)?;
        Self::collective(Collective::Match { all, d, p, a, mask: self.source(Type::B32)? })
    }

    fn reduce(&mut self) -> Result<Op> {
        self.require(&["sync"])?;
        let known = |name: &str| match name {
            "add" => Some(Binary::Add),
            "min" => Some(Binary::Min),
            "max" => Some(Binary::Max),
            "and" => Some(Binary::And),
            "or" => Some(Binary::Or),
            "xor" => Some(Binary::Xor),
            _ => None,
        };
        let op = self.take_known(known).ok_or("an operation is missing")?;
        let ty = self.one_type(&[Type::S32, Type::U32, Type::B32])?;
        let (d, a) = (self.destination(ty)?, self.source(ty)?);
        Self::collective(Collective::Reduce { op, ty, d, a, mask: self.source(Type::B32)? })
    }

    fn load_matrix(&mut self) -> Result<Op> {
        self.require(&["sync", "aligned", "m8n8"])?;
        let counts = [("x1", 1), ("x2", 2), ("x4", 4)];
        let count = counts.into_iter().find(|(name, _)| self.take(name)).map(|(_, count)| count);
        let count: u8 = count.ok_or("`.x1`, `.x2` or `.x4` is missing")?;
        let transposed = self.take("trans");
        let space = self.space();
        if !matches!(space, Space::Shared | Space::Generic) {
            return Err("matrices lie in shared memory".to_owned());
        }
        self.one_type(&[Type::B16])?;
        let registers = self.vector(Type::B32, true, false)?;
        if registers.len() != usize::from(count) {
            return Err(format!("{} registers in place of {count}", registers.len()));
        }
        let mut d = [0; 4];
        d[..registers.len()].copy_from_slice(&registers);
        Self::collective(Collective::LoadMatrix { count, transposed, d, address: self.address(space)? })
    }

    fn mma(&mut self) -> Result<Op> {
        self.require(&["sync", "aligned", "row", "col"])?;
        let shapes = [("m16n8k8", 8), ("m16n8k16", 16), ("m16n8k32", 32)];
        let k = shapes.into_iter().find(|(name, _)| self.take(name)).map(|(_, k)| k);
        let k: usize = k.ok_or("the shape is not known")?;
        let saturate = self.take("satfinite");
        let names: Vec<&str> = std::mem::take(&mut self.modifiers);
        let (product, ty) = match (names.as_slice(), k) {
            (["f32", "f16", "f16", "f32"], 8 | 16) => (Product::F16, Type::F32),
            (["f32", "bf16", "bf16", "f32"], 8 | 16) => (Product::Bf16, Type::F32),
            (["s32", a @ ("s8" | "u8"), b @ ("s8" | "u8"), "s32"], 16 | 32) => {
                (Product::Int8 { signed_a: *a == "s8", signed_b: *b == "s8", saturate }, Type::S32)
            }
            _ => return Err(format!("types {names:?} of this shape are not known")),
        };
        if saturate && ty == Type::F32 {
            return Err("`.satfinite` is for integers".to_owned());
        }
        // With half the depth, A and B fill half the registers.
        let half = k * if ty == Type::F32 { 2 } else { 1 } == 16;
        let d = self.registers(ty, true)?;
        let (a, b) = if half {
            let (a, b) = (self.registers::<2>(Type::B32, false)?, self.registers::<1>(Type::B32, false)?);
            ([a[0], a[1], a[0], a[1]], [b[0], b[0]])
        } else {
            (self.registers(Type::B32, false)?, self.registers(Type::B32, false)?)
        };
        Self::collective(Collective::Mma(Mma { product, k, d, a, b, c: self.registers(ty, false)? }))
    }
}

/// The bit type of a width.
fn sized(bits: u32) -> Result<Type> {
    match bits {
        8 => Ok(Type::B8),
        16 => Ok(Type::B16),
        32 => Ok(Type::B32),
        _ => Err(format!("parts of {bits} bits are not known")),
    }
}

fn twice(ty: Type) -> Result<Type> {
    match ty {
        Type::S16 => Ok(Type::S32),
        Type::U16 => Ok(Type::U32),
        Type::S32 => Ok(Type::S64),
        Type::U32 => Ok(Type::U64),
        _ => Err(format!("nothing is twice as wide as {ty:?}")),
    }
}

/// The space in which a name's address lies; an access must be to that space.
fn symbol_space(name: &str, entity: Entity, space: Space) -> Result<Space> {
    match (entity, space) {
        (Entity::Shared(_), Space::Shared) => Ok(Space::Shared),
        (Entity::Global(_), Space::Global | Space::Const | Space::Generic) => Ok(space),
        (Entity::Argument(_), Space::Param) => Ok(Space::Param),
        (Entity::Frame(..), Space::Local | Space::Param) => Ok(Space::Local),
        _ => Err(format!("`{name}` does not lie in {space} memory")),
    }
}
