//! One thread: its registers, frames and copies, and the instructions that it executes on its own.

use super::arithmetic::{binary, compare, convert, convert_pair, divide, insert, mask, signed, ternary, test, unary};
use super::fault::Fault;
use super::instruction::{
    Access, Address, AsyncCopy, Atomic, AtomicOp, Binary, Call, Carry, Compare, Function, Mode, Op, Preset, Reg, Space,
    Type,
};
use super::memory::{Memory, Scratch, number, resolve, window};
use super::race::{Kind, Races};
use std::collections::VecDeque;

/// What the threads of a block share.
pub(super) struct Machine<'a> {
    pub(super) functions: &'a [Function],
    pub(super) memory: &'a mut Memory,
    pub(super) shared: Scratch,
    /// `None`: races are not looked for.
    pub(super) races: Option<Races>,
    /// The kernel's arguments.
    pub(super) arguments: &'a [u8],
    /// Addresses of the module's variables.
    pub(super) shared_addresses: &'a [u64],
    pub(super) global_addresses: &'a [u64],
    /// Instructions that a thread may execute.
    pub(super) limit: u64,
}

impl Machine<'_> {
    #[inline]
    fn note(&mut self, kind: Kind, thread: u16, address: u64, len: usize) -> Result<(), Fault> {
        // What lies outside is found by the access itself.
        match &mut self.races {
            Some(races) if self.shared.holds(address, len) => races.access(kind, thread, address, len),
            _ => Ok(()),
        }
    }

    #[inline]
    fn read_shared(&mut self, thread: u16, address: u64, len: usize) -> Result<&[u8], Fault> {
        self.note(Kind::Read, thread, address, len)?;
        self.shared.read(address, len)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Ready,
    /// At an instruction that others must reach too.
    Waiting,
    /// Until all others have gone as far as they can.
    Asleep,
    Exited,
}

/// A function that is being executed.
#[derive(Clone, Copy, Debug)]
struct Frame {
    function: usize,
    /// Where to go on in the caller.
    back: usize,
    /// Where its registers and its local memory start.
    registers: usize,
    local: usize,
}

/// A copy under way: the address in shared memory and the data.
type Copy = (u64, Vec<u8>);

pub(super) struct Thread {
    pub(super) state: State,
    /// The next instruction of the function.
    pub(super) at: usize,
    pub(super) index: [u32; 3],
    /// Its place in the block, as one number.
    number: u16,
    pub(super) steps: u64,
    frame: Frame,
    callers: Vec<Frame>,
    values: Vec<u64>,
    written: Vec<bool>,
    local: Scratch,
    /// The carry flag, once something has set it.
    carry: Option<bool>,
    open_copies: Vec<Copy>,
    groups: VecDeque<Vec<Copy>>,
}

impl Thread {
    /// A thread at the start of a kernel. `special` gives the values of special registers.
    pub(super) fn new(
        machine: &Machine<'_>,
        kernel: usize,
        (index, number): ([u32; 3], u32),
        special: impl Fn(super::instruction::Special) -> u64,
    ) -> Self {
        let frame = Frame { function: kernel, back: 0, registers: 0, local: 0 };
        let mut thread = Self {
            state: State::Ready,
            at: 0,
            index,
            number: number as u16,
            steps: 0,
            frame,
            callers: Vec::new(),
            values: Vec::new(),
            written: Vec::new(),
            local: Scratch::new(Space::Local),
            carry: None,
            open_copies: Vec::new(),
            groups: VecDeque::new(),
        };
        thread.enter(machine, frame);
        let registers = &machine.functions[kernel].registers;
        for (register, value) in registers.iter().zip(&mut thread.values) {
            if let Some(Preset::Special(name)) = register.preset {
                *value = special(name);
            }
        }
        thread
    }

    pub(super) fn function(&self) -> usize {
        self.frame.function
    }

    /// How deep in calls.
    pub(super) fn depth(&self) -> usize {
        self.callers.len()
    }

    /// Makes registers and local memory for a function.
    fn enter(&mut self, machine: &Machine<'_>, frame: Frame) {
        let function = &machine.functions[frame.function];
        for register in &function.registers {
            let value = match register.preset {
                None | Some(Preset::Special(_)) => 0,
                Some(Preset::Constant(value)) => value,
                Some(Preset::Shared(variable)) => machine.shared_addresses[variable],
                Some(Preset::Global(variable)) => machine.global_addresses[variable],
                Some(Preset::Frame(offset)) => (frame.local + offset) as u64,
            };
            self.values.push(value);
            self.written.push(register.preset.is_some());
        }
        self.local.open(frame.local..frame.local + function.frame_bytes);
        self.frame = frame;
        self.at = 0;
    }

    // ---- Registers

    #[inline(always)]
    pub(super) fn get(&self, register: Reg) -> Result<u64, Reg> {
        let at = self.frame.registers + register as usize;
        if self.written[at] { Ok(self.values[at]) } else { Err(register) }
    }

    #[inline(always)]
    pub(super) fn set(&mut self, register: Reg, value: u64) {
        let at = self.frame.registers + register as usize;
        self.values[at] = value;
        self.written[at] = true;
    }

    /// Copies a register; what was never written stays so, as a copy is no use of a value.
    #[inline(always)]
    fn copy(&mut self, d: Reg, a: Reg) {
        let (d, a) = (self.frame.registers + d as usize, self.frame.registers + a as usize);
        self.values[d] = self.values[a];
        self.written[d] = self.written[a];
    }

    fn forget(&mut self, register: Reg) {
        self.written[self.frame.registers + register as usize] = false;
    }

    // ---- Execution

    /// Executes until the thread exits, sleeps, or reaches an instruction that others must reach too.
    pub(super) fn run(&mut self, machine: &mut Machine<'_>) -> Result<(), Fault> {
        let functions = machine.functions;
        'frame: loop {
            let function = &functions[self.frame.function];
            let code = function.code.as_slice();
            let fault = |register: Reg| Fault::UnwrittenRegister(function.registers[register as usize].name.clone());
            loop {
                self.steps += 1;
                if self.steps > machine.limit {
                    return Err(Fault::EndlessLoop { limit: machine.limit });
                }
                // The end of a function is a return.
                let Some(instruction) = code.get(self.at) else {
                    if self.leave(machine) { continue 'frame } else { return Ok(()) }
                };
                if let Some((predicate, negated)) = instruction.guard
                    && (self.get(predicate).map_err(fault)? != 0) == negated
                {
                    self.at += 1;
                    continue;
                }
                match &instruction.op {
                    Op::Branch { target } => self.at = *target,
                    Op::BranchIndexed { index, targets } => {
                        let index = self.get(*index).map_err(fault)?;
                        let target = targets.get(index as usize);
                        self.at = *target.ok_or(Fault::BranchIndex { index, targets: targets.len() })?;
                    }
                    Op::Collective(_) => {
                        self.state = State::Waiting;
                        return Ok(());
                    }
                    Op::Sleep => {
                        self.at += 1;
                        self.state = State::Asleep;
                        return Ok(());
                    }
                    Op::Call(call) => {
                        self.call(machine, call);
                        continue 'frame;
                    }
                    Op::Return if self.leave(machine) => continue 'frame,
                    Op::Return | Op::Exit => {
                        self.state = State::Exited;
                        return Ok(());
                    }
                    op => {
                        self.simple(machine, op).map_err(|stop| match stop {
                            Stop::Unwritten(register) => fault(register),
                            Stop::Fault(fault) => fault,
                        })?;
                        self.at += 1;
                    }
                }
            }
        }
    }

    fn call(&mut self, machine: &mut Machine<'_>, call: &Call) {
        let local = (self.frame.local + machine.functions[self.frame.function].frame_bytes).next_multiple_of(16);
        let frame = Frame { function: call.function, back: self.at + 1, registers: self.values.len(), local };
        let caller = self.frame;
        self.callers.push(caller);
        self.enter(machine, frame);
        for ((from, bytes), parameter) in call.arguments.iter().zip(&machine.functions[call.function].parameters) {
            let len = parameter.bytes.min(*bytes);
            self.local.copy_within(caller.local + from, frame.local + parameter.offset, len);
        }
    }

    /// Goes back to the caller; false, and exited, if there is none.
    fn leave(&mut self, machine: &Machine<'_>) -> bool {
        let Some(caller) = self.callers.pop() else {
            self.state = State::Exited;
            return false;
        };
        let (from, back) = (self.frame, self.frame.back);
        if let Op::Call(call) = &machine.functions[caller.function].code[back - 1].op {
            for ((to, bytes), result) in call.results.iter().zip(&machine.functions[from.function].results) {
                let len = result.bytes.min(*bytes);
                self.local.copy_within(from.local + result.offset, caller.local + to, len);
            }
        }
        self.values.truncate(from.registers);
        self.written.truncate(from.registers);
        self.local.close(from.local);
        (self.frame, self.at) = (caller, back);
        true
    }

    #[inline(always)]
    fn simple(&mut self, machine: &mut Machine<'_>, op: &Op) -> Result<(), Stop> {
        match *op {
            Op::Move { d, a } => self.copy(d, a),
            Op::Binary { op, ty, mode, d, a, b } => {
                let value = binary(op, ty, mode, self.get(a)?, self.get(b)?);
                self.set(d, value);
            }
            Op::Ternary { op, ty, mode, d, a, b, c } => {
                let value = ternary(op, ty, mode, self.get(a)?, self.get(b)?, self.get(c)?);
                self.set(d, value);
            }
            Op::Load(ref access) => self.load(machine, access)?,
            Op::Store(ref access) => self.store(machine, access)?,
            Op::SetPredicate { ref compare, p, q } => {
                let (plain, inverse) = self.compare(compare)?;
                self.set(p, plain.into());
                if let Some(q) = q {
                    self.set(q, inverse.into());
                }
            }
            Op::Convert { ref convert, d, a } => {
                let value = self::convert(convert, self.get(a)?);
                self.set(d, value);
            }
            Op::Unary { op, ty, mode, d, a } => {
                let value = unary(op, ty, mode, self.get(a)?);
                self.set(d, value);
            }
            Op::Select { d, a, b, p } => {
                let chosen = if self.get(p)? != 0 { a } else { b };
                self.copy(d, chosen);
            }
            _ => self.rare(machine, op)?,
        }
        Ok(())
    }

    fn rare(&mut self, machine: &mut Machine<'_>, op: &Op) -> Result<(), Stop> {
        match *op {
            Op::Carry(ref carry) => self.carry(carry)?,
            Op::Pack { d, width, ref parts } => self.pack(d, width, parts),
            Op::Unpack { a, width, ref parts } => self.unpack(a, width, parts),
            Op::InsertBits { ty, d, a, b, start, len } => {
                let value = insert(ty, self.get(a)?, self.get(b)?, self.get(start)?, self.get(len)?);
                self.set(d, value);
            }
            Op::Divide { ty, remainder, d, a, b } => {
                let value = divide(ty, remainder, self.get(a)?, self.get(b)?).ok_or(Fault::DivisionByZero)?;
                self.set(d, value);
            }
            Op::Set { ref compare, to, d } => {
                let value = self.set_value(compare, to)?;
                self.set(d, value);
            }
            Op::Test { kind, ty, p, a } => {
                let value = test(kind, ty, self.get(a)?);
                self.set(p, value.into());
            }
            Op::SelectSign { ty, d, a, b, c } => {
                let c = self.get(c)?;
                let first = match ty {
                    Type::F32 => f32::from_bits(c as u32) >= 0.0,
                    _ => signed(c, 32) >= 0,
                };
                self.copy(d, if first { a } else { b });
            }
            Op::ConvertPair { half, mode, d, high, low } => {
                let value = convert_pair(half, mode, self.get(high)?, self.get(low)?);
                self.set(d, value);
            }
            Op::Window { space, to_space, d, a } => {
                let a = self.get(a)?;
                self.set(d, if to_space { a.wrapping_sub(window(space)) } else { a.wrapping_add(window(space)) });
            }
            Op::IsSpace { space, p, a } => {
                let (found, _) = resolve(self.get(a)?);
                let same = found == space || found == Space::Global && space == Space::Const;
                self.set(p, same.into());
            }
            Op::Clock { d } => self.set(d, self.steps),
            Op::Atomic(ref atomic) => self.atomic(machine, atomic)?,
            Op::AsyncCopy(ref copy) => self.start_copy(machine, copy)?,
            Op::AsyncCommit => self.groups.push_back(std::mem::take(&mut self.open_copies)),
            Op::AsyncWait { pending } => self.wait(machine, pending)?,
            Op::Trap => return Err(Fault::Trap.into()),
            _ => {}
        }
        Ok(())
    }

    fn carry(&mut self, carry: &Carry) -> Result<(), Stop> {
        let Carry { op, ty, takes, leaves, d, a, b, c } = *carry;
        let bits = ty.bits();
        let taken = match (takes, self.carry) {
            (false, _) => 0,
            (true, Some(carry)) => i128::from(carry),
            (true, None) => return Err(Fault::UnwrittenRegister("CC.CF".to_owned()).into()),
        };
        let (a, b, c) = (self.get(a)?, self.get(b)?, self.get(c)?);
        let exact = match op {
            Binary::Add => i128::from(a) + i128::from(b) + taken,
            Binary::Sub => i128::from(a) - i128::from(b) - taken,
            _ => i128::from(binary(op, ty, Mode::default(), a, b)) + i128::from(c) + taken,
        };
        // A difference below zero borrows.
        if leaves {
            self.carry = Some(exact >> bits != 0);
        }
        self.set(d, exact as u64 & mask(bits));
        Ok(())
    }

    /// A pair or more of registers as one. Where a part was never written, the whole counts as never written.
    fn pack(&mut self, d: Reg, width: u32, parts: &[Reg]) {
        let packed = parts.iter().rev().try_fold(0, |all, part| {
            let part = self.get(*part).ok()?;
            Some(if width < 64 { all << width | part } else { part })
        });
        match packed {
            Some(value) => self.set(d, value),
            None => self.forget(d),
        }
    }

    fn unpack(&mut self, a: Reg, width: u32, parts: &[Reg]) {
        let value = self.get(a);
        for (at, part) in parts.iter().enumerate() {
            match value {
                Ok(value) => self.set(*part, value >> (width * at as u32) & mask(width)),
                Err(_) => self.forget(*part),
            }
        }
    }

    /// The result and, of a comparison with a second predicate, its inverse.
    #[inline]
    fn compare(&self, c: &Compare) -> Result<(bool, bool), Stop> {
        let plain = compare(c.comparison, c.unordered, c.ty, c.ftz, self.get(c.a)?, self.get(c.b)?);
        let Some((op, register, negated)) = c.combine else { return Ok((plain, !plain)) };
        let other = u64::from((self.get(register)? != 0) != negated);
        let with = |value: bool| binary(op, Type::Pred, Mode::default(), value.into(), other) != 0;
        Ok((with(plain), with(!plain)))
    }

    /// `set`: ones, or the number one, where the comparison holds; each half of a pair on its own.
    fn set_value(&self, compare: &Compare, to: Type) -> Result<u64, Stop> {
        let one = |to: Type| match to {
            Type::F32 => 0x3f80_0000,
            Type::F16 => 0x3c00,
            Type::Bf16 => 0x3f80,
            _ => mask(to.bits()),
        };
        let Some(half) = compare.ty.half() else {
            return Ok(if self.compare(compare)?.0 { one(to) } else { 0 });
        };
        let (a, b) = (self.get(compare.a)?, self.get(compare.b)?);
        let of = |shift: u32| {
            let (a, b) = (a >> shift & 0xffff, b >> shift & 0xffff);
            let holds = self::compare(compare.comparison, compare.unordered, half, compare.ftz, a, b);
            let value = to.half().map_or(0xffff, one);
            if holds { value << shift } else { 0 }
        };
        Ok(of(0) | of(16))
    }

    // ---- Memory

    #[inline(always)]
    fn effective(&self, address: &Address) -> Result<(Space, u64), Reg> {
        let value = self.get(address.base)?.wrapping_add(address.offset as u64);
        let value = if address.narrow { value & mask(32) } else { value };
        Ok(if address.space == Space::Generic { resolve(value) } else { (address.space, value) })
    }

    /// The 16 bytes in shared memory that a matrix instruction names.
    pub(super) fn read_row(&self, machine: &mut Machine<'_>, address: &Address) -> Result<[u8; 16], Stop> {
        match self.effective(address)? {
            (Space::Shared, address) => {
                let mut row = [0; 16];
                row.copy_from_slice(machine.read_shared(self.number, address, 16)?);
                Ok(row)
            }
            (space, address) => {
                let note = "an address in shared memory is needed".to_owned();
                Err(Fault::OutOfBounds { space, address, bytes: 16, note }.into())
            }
        }
    }

    #[inline(always)]
    fn load(&mut self, machine: &mut Machine<'_>, access: &Access) -> Result<(), Stop> {
        let (space, address) = self.effective(&access.address)?;
        let (size, count) = (access.ty.bytes(), usize::from(access.count));
        let bytes = match space {
            Space::Shared => machine.read_shared(self.number, address, size * count)?,
            Space::Local => self.local.read(address, size * count)?,
            Space::Param => argument(machine.arguments, address, size * count)?,
            _ => machine.memory.read(address, size * count)?,
        };
        let mut values = [0; 4];
        for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(size)) {
            *value = number(bytes);
        }
        for (register, value) in access.registers.into_iter().zip(values).take(count) {
            let value = if access.ty.signed() { signed(value, access.ty.bits()) as u64 } else { value };
            self.set(register, value & mask(access.width));
        }
        Ok(())
    }

    #[inline(always)]
    fn store(&mut self, machine: &mut Machine<'_>, access: &Access) -> Result<(), Stop> {
        let (space, address) = self.effective(&access.address)?;
        let (size, count) = (access.ty.bytes(), usize::from(access.count));
        let mut values = [0; 4];
        for (value, register) in values.iter_mut().zip(access.registers).take(count) {
            *value = self.get(register)?;
        }
        let bytes = match space {
            Space::Shared => {
                machine.note(Kind::Write, self.number, address, size * count)?;
                machine.shared.write(address, size * count)?
            }
            Space::Local => self.local.write(address, size * count)?,
            Space::Param | Space::Const => return Err(Fault::ReadOnly { address }.into()),
            _ => machine.memory.write(address, size * count)?,
        };
        for (value, bytes) in values.iter().zip(bytes.chunks_exact_mut(size)) {
            bytes.copy_from_slice(&value.to_le_bytes()[..size]);
        }
        Ok(())
    }

    fn atomic(&mut self, machine: &mut Machine<'_>, atomic: &Atomic) -> Result<(), Stop> {
        let (space, address) = self.effective(&atomic.address)?;
        let (b, c) = (self.get(atomic.b)?, self.get(atomic.c)?);
        let size = atomic.ty.bytes();
        let old = match space {
            Space::Shared => number(machine.shared.read(address, size)?),
            _ => number(machine.memory.read(address, size)?),
        };
        let new = match atomic.op {
            AtomicOp::Arithmetic(op) => {
                // In global memory, f32 sums have no subnormals; in shared memory they have.
                let ftz = atomic.ty == Type::F32 && space != Space::Shared;
                binary(op, atomic.ty, Mode { ftz, ..Mode::default() }, old, b)
            }
            AtomicOp::Exchange => b,
            AtomicOp::CompareSwap if old == b => c,
            AtomicOp::CompareSwap => old,
            AtomicOp::Increment if old >= b => 0,
            AtomicOp::Increment => old + 1,
            AtomicOp::Decrement if old == 0 || old > b => b,
            AtomicOp::Decrement => old - 1,
        };
        let bytes = match space {
            Space::Shared => {
                machine.note(Kind::Atomic, self.number, address, size)?;
                machine.shared.write(address, size)?
            }
            Space::Local | Space::Param | Space::Const => return Err(Fault::ReadOnly { address }.into()),
            _ => machine.memory.write(address, size)?,
        };
        bytes.copy_from_slice(&new.to_le_bytes()[..size]);
        if let Some(result) = atomic.result {
            self.set(result, old);
        }
        Ok(())
    }

    // ---- Asynchronous copies

    /// Reads the source now and delivers it at the wait: between them the target holds nothing that may be read.
    fn start_copy(&mut self, machine: &mut Machine<'_>, copy: &AsyncCopy) -> Result<(), Stop> {
        let (_, to) = self.effective(&copy.to)?;
        let (_, from) = self.effective(&copy.from)?;
        let len = match copy.source_bytes {
            Some(register) => (self.get(register)? as usize).min(copy.bytes),
            None => copy.bytes,
        };
        let mut data = vec![0; copy.bytes];
        if len > 0 && !from.is_multiple_of(copy.bytes as u64) {
            return Err(Fault::Misaligned { space: Space::Global, address: from, bytes: copy.bytes }.into());
        }
        for (at, byte) in data[..len].iter_mut().enumerate() {
            *byte = machine.memory.read(from + at as u64, 1)?[0];
        }
        machine.shared.start_copy(to, copy.bytes)?;
        machine.note(Kind::Write, self.number, to, copy.bytes)?;
        self.open_copies.push((to, data));
        Ok(())
    }

    fn wait(&mut self, machine: &mut Machine<'_>, pending: Option<usize>) -> Result<(), Fault> {
        if pending.is_none() {
            self.groups.push_back(std::mem::take(&mut self.open_copies));
        }
        while self.groups.len() > pending.unwrap_or(0) {
            for (to, data) in self.groups.pop_front().unwrap_or_default() {
                machine.shared.end_copy(to, &data);
                machine.note(Kind::Write, self.number, to, data.len())?;
            }
        }
        Ok(())
    }
}

fn argument(arguments: &[u8], address: u64, len: usize) -> Result<&[u8], Fault> {
    let range = address as usize..(address as usize).saturating_add(len);
    let note = format!("of {} bytes of arguments", arguments.len());
    arguments.get(range).ok_or(Fault::OutOfBounds { space: Space::Param, address, bytes: len, note })
}

/// Why a thread cannot go on.
pub(super) enum Stop {
    /// A register that is read and was never written.
    Unwritten(Reg),
    Fault(Fault),
}

impl From<Reg> for Stop {
    fn from(register: Reg) -> Self {
        Self::Unwritten(register)
    }
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}
