//! Runs the threads of a block. Each runs on its own until it reaches an instruction that others must reach too; such
//! an instruction is executed when all of them are there. A thread that sleeps goes on when no other can, those of other
//! blocks included.

use super::arithmetic::binary;
use super::fault::Fault;
use super::instruction::{BarrierKind, Collective, Mode, Op, Reg, ShuffleMode, Special, Vote};
use super::matrix::{Fragments, load_part, multiply};
use super::thread::{Machine, State, Stop, Thread};

/// Where and why a block stopped.
pub(super) struct Stopped {
    pub(super) thread: [u32; 3],
    pub(super) function: usize,
    pub(super) at: usize,
    pub(super) fault: Fault,
}

/// The shape of a launch and the place of a block in it.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) blocks: [u32; 3],
    pub(super) block: [u32; 3],
    pub(super) threads: [u32; 3],
    pub(super) dynamic_shared: u32,
}

pub(super) struct Block<'m, 'a> {
    machine: &'m mut Machine<'a>,
    threads: Vec<Thread>,
}

/// A result or a fault of the thread with this number.
type Result<T> = std::result::Result<T, (usize, Fault)>;

impl<'m, 'a> Block<'m, 'a> {
    pub(super) fn new(machine: &'m mut Machine<'a>, kernel: usize, place: Place) -> Self {
        let [x, y, z] = place.threads;
        let thread = |number: u32| {
            let index = [number % x, number / x % y, number / x / y];
            Thread::new(machine, kernel, (index, number), |special| value(special, place, index, number))
        };
        let threads = (0..x * y * z).map(thread).collect();
        Self { machine, threads }
    }

    /// The same threads later, and what they share.
    pub(super) fn resume(machine: &'m mut Machine<'a>, threads: Vec<Thread>) -> Self {
        Self { machine, threads }
    }

    /// Runs the threads as far as they can go. True: all have exited; else some sleep.
    pub(super) fn run(&mut self) -> std::result::Result<bool, Stopped> {
        for thread in self.threads.iter_mut().filter(|thread| thread.state == State::Asleep) {
            thread.state = State::Ready;
        }
        self.run_all().map_err(|(number, fault)| self.stopped(number, fault))
    }

    /// The threads, to be resumed.
    pub(super) fn pause(self) -> Vec<Thread> {
        self.threads
    }

    /// A thread that sleeps for ever.
    pub(super) fn asleep(&self) -> Stopped {
        let number = self.threads.iter().position(|thread| thread.state == State::Asleep).unwrap_or(0);
        self.stopped(number, Fault::Asleep)
    }

    fn stopped(&self, number: usize, fault: Fault) -> Stopped {
        let thread = &self.threads[number];
        Stopped { thread: thread.index, function: thread.function(), at: thread.at, fault }
    }

    fn run_all(&mut self) -> Result<bool> {
        while self.threads.iter().any(|thread| thread.state != State::Exited) {
            for start in (0..self.threads.len()).step_by(32) {
                self.run_warp(start)?;
            }
            if !self.barrier()? {
                return match self.threads.iter().any(|thread| thread.state == State::Asleep) {
                    true => Ok(false),
                    false => Err(self.stuck()),
                };
            }
        }
        Ok(true)
    }

    /// Runs a warp until all its lanes have exited or wait for other warps.
    fn run_warp(&mut self, start: usize) -> Result<()> {
        let end = self.threads.len().min(start + 32);
        loop {
            for number in start..end {
                if self.threads[number].state == State::Ready {
                    self.threads[number].run(self.machine).map_err(|fault| (number, fault))?;
                }
            }
            let mut progress = false;
            for number in start..end {
                progress |= self.warp_collective(start..end, number)?;
            }
            if !progress && !self.active_mask(start..end)? {
                return Ok(());
            }
        }
    }

    /// The instruction at which a thread waits.
    fn waits_at(&self, number: usize) -> Option<Collective> {
        let thread = &self.threads[number];
        if thread.state != State::Waiting {
            return None;
        }
        match &self.machine.functions[thread.function()].code[thread.at].op {
            Op::Collective(collective) => Some(**collective),
            _ => None,
        }
    }

    fn same_place(&self, a: usize, b: usize) -> bool {
        let (a, b) = (&self.threads[a], &self.threads[b]);
        b.state == State::Waiting && (a.function(), a.at, a.depth()) == (b.function(), b.at, b.depth())
    }

    fn get(&self, number: usize, register: Reg) -> Result<u64> {
        let thread = &self.threads[number];
        thread.get(register).map_err(|register| (number, self.located(number, Stop::Unwritten(register))))
    }

    fn located(&self, number: usize, stop: Stop) -> Fault {
        match stop {
            Stop::Fault(fault) => fault,
            Stop::Unwritten(register) => {
                let function = &self.machine.functions[self.threads[number].function()];
                Fault::UnwrittenRegister(function.registers[register as usize].name.clone())
            }
        }
    }

    fn set(&mut self, number: usize, register: Reg, value: u64) {
        self.threads[number].set(register, value);
    }

    /// Lets these threads go on after the instruction at which they wait.
    fn release(&mut self, numbers: &[usize]) {
        for number in numbers {
            self.threads[*number].state = State::Ready;
            self.threads[*number].at += 1;
        }
    }

    /// Executes the warp's instruction at which this thread waits, if all that it needs are there.
    fn warp_collective(&mut self, warp: std::ops::Range<usize>, number: usize) -> Result<bool> {
        let Some(collective) = self.waits_at(number) else { return Ok(false) };
        let register = match collective {
            Collective::Shuffle { mask, .. }
            | Collective::Vote { mask, .. }
            | Collective::Match { mask, .. }
            | Collective::Reduce { mask, .. }
            | Collective::WarpBarrier { mask } => Some(mask),
            Collective::LoadMatrix { .. } | Collective::Mma(_) => None,
            Collective::ActiveMask { .. } | Collective::Barrier { .. } => return Ok(false),
        };
        let lanes = match register {
            Some(register) => self.get(number, register)? as u32,
            None => self.whole_warp(&warp, number)?,
        };
        let lane = (number - warp.start) as u32;
        if lanes >> lane & 1 == 0 {
            return Err((number, Fault::NotInMask { lane, mask: lanes }));
        }
        let mut numbers = Vec::with_capacity(32);
        for other in warp.clone().filter(|other| lanes >> (other - warp.start) & 1 == 1) {
            if self.threads[other].state == State::Exited {
                continue;
            }
            let same_mask = match register {
                Some(register) if self.same_place(number, other) => self.get(other, register)? as u32 == lanes,
                _ => true,
            };
            if !self.same_place(number, other) || !same_mask {
                return Ok(false);
            }
            numbers.push(other);
        }
        self.execute(collective, warp.start, &numbers)?;
        self.release(&numbers);
        Ok(true)
    }

    /// The mask of an instruction that all 32 lanes must execute.
    fn whole_warp(&self, warp: &std::ops::Range<usize>, number: usize) -> Result<u32> {
        let missing =
            (0..32).find(|lane| self.threads.get(warp.start + lane).is_none_or(|thread| thread.state == State::Exited));
        match missing {
            None => Ok(u32::MAX),
            Some(lane) => {
                let note = format!("an instruction of the whole warp, but lane {lane} does not exist or has exited");
                Err((number, Fault::WarpDivergence(note)))
            }
        }
    }

    /// The lanes that wait at the same `activemask`, when nothing else in the warp can go on: they are those that a
    /// device would find together.
    fn active_mask(&mut self, warp: std::ops::Range<usize>) -> Result<bool> {
        let at_mask = |number: &usize| matches!(self.waits_at(*number), Some(Collective::ActiveMask { .. }));
        let Some(first) = warp.clone().find(at_mask) else { return Ok(false) };
        let numbers: Vec<usize> = warp.clone().filter(|other| self.same_place(first, *other)).collect();
        let lanes = numbers.iter().fold(0u32, |lanes, number| lanes | 1 << (number - warp.start));
        if let Some(Collective::ActiveMask { d }) = self.waits_at(first) {
            numbers.iter().for_each(|number| self.set(*number, d, lanes.into()));
        }
        self.release(&numbers);
        Ok(true)
    }

    fn execute(&mut self, collective: Collective, start: usize, numbers: &[usize]) -> Result<()> {
        match collective {
            Collective::Shuffle { mode, d, p, a, b, c, .. } => self.shuffle(mode, (d, p), [a, b, c], start, numbers),
            Collective::Vote { vote, d, a, negated, .. } => self.vote(vote, d, (a, negated), start, numbers),
            Collective::Match { all, d, p, a, .. } => self.lane_match(all, (d, p), a, start, numbers),
            Collective::Reduce { op, ty, d, a, .. } => {
                let values = numbers.iter().map(|number| self.get(*number, a)).collect::<Result<Vec<_>>>()?;
                let all = values.into_iter().reduce(|x, y| binary(op, ty, Mode::default(), x, y)).unwrap_or(0);
                numbers.iter().for_each(|number| self.set(*number, d, all));
                Ok(())
            }
            Collective::LoadMatrix { .. } => self.load_matrix(collective, numbers),
            Collective::Mma(mma) => {
                let registers = |registers: [Reg; 4], number: usize| -> Result<[u32; 4]> {
                    let mut values = [0; 4];
                    for (value, register) in values.iter_mut().zip(registers) {
                        *value = self.get(number, register)? as u32;
                    }
                    Ok(values)
                };
                let mut lanes = [Fragments::default(); 32];
                for (lane, number) in lanes.iter_mut().zip(numbers) {
                    let [b0, b1, ..] = registers([mma.b[0], mma.b[1], mma.b[0], mma.b[0]], *number)?;
                    *lane = Fragments { a: registers(mma.a, *number)?, b: [b0, b1], c: registers(mma.c, *number)? };
                }
                for (number, values) in numbers.iter().zip(multiply(&mma, &lanes)) {
                    mma.d.iter().zip(values).for_each(|(d, value)| self.set(*number, *d, value.into()));
                }
                Ok(())
            }
            Collective::WarpBarrier { .. } => {
                if let Some(races) = &mut self.machine.races {
                    races.warp_barrier(start / 32);
                }
                Ok(())
            }
            Collective::ActiveMask { .. } | Collective::Barrier { .. } => Ok(()),
        }
    }

    /// By the ISA: `c` holds a clamp and, from bit 8 on, a mask that splits the warp into segments.
    fn shuffle(
        &mut self,
        mode: ShuffleMode,
        (d, p): (Reg, Option<Reg>),
        [a, b, c]: [Reg; 3],
        start: usize,
        numbers: &[usize],
    ) -> Result<()> {
        let mut results = Vec::with_capacity(32);
        let lanes = numbers.iter().fold(0u32, |lanes, number| lanes | 1 << (number - start));
        for number in numbers {
            let lane = (number - start) as i64;
            let (by, c) = ((self.get(*number, b)? & 31) as i64, self.get(*number, c)? as i64);
            let (clamp, segment) = (c & 31, c >> 8 & 31);
            let most = lane & segment | clamp & !segment;
            let least = lane & segment;
            let (from, inside) = match mode {
                ShuffleMode::Up => (lane - by, lane - by >= most),
                ShuffleMode::Down => (lane + by, lane + by <= most),
                ShuffleMode::Xor => (lane ^ by, lane ^ by <= most),
                ShuffleMode::Index => (least | by & !segment, (least | by & !segment) <= most),
            };
            let from = if inside { from } else { lane };
            if lanes >> from & 1 == 0 {
                return Err((*number, Fault::InactiveLane { lane: from as u32, mask: lanes }));
            }
            results.push((self.get(start + from as usize, a)?, inside));
        }
        for (number, (value, inside)) in numbers.iter().zip(results) {
            if let Some(p) = p {
                self.set(*number, p, inside.into());
            }
            self.set(*number, d, value);
        }
        Ok(())
    }

    fn vote(&mut self, vote: Vote, d: Reg, (a, negated): (Reg, bool), start: usize, numbers: &[usize]) -> Result<()> {
        let mut ballot = 0u32;
        for number in numbers {
            ballot |= u32::from((self.get(*number, a)? != 0) != negated) << (number - start);
        }
        let all = numbers.iter().fold(0u32, |lanes, number| lanes | 1 << (number - start));
        let value = match vote {
            Vote::Ballot => ballot.into(),
            Vote::All => u64::from(ballot == all),
            Vote::Any => u64::from(ballot != 0),
            Vote::Uniform => u64::from(ballot == all || ballot == 0),
        };
        numbers.iter().for_each(|number| self.set(*number, d, value));
        Ok(())
    }

    fn lane_match(
        &mut self,
        all: bool,
        (d, p): (Reg, Option<Reg>),
        a: Reg,
        start: usize,
        numbers: &[usize],
    ) -> Result<()> {
        let values = numbers.iter().map(|number| self.get(*number, a)).collect::<Result<Vec<_>>>()?;
        for (number, value) in numbers.iter().zip(&values) {
            let equal = numbers.iter().zip(&values).filter(|(_, other)| *other == value);
            let lanes = equal.fold(0u32, |lanes, (other, _)| lanes | 1 << (other - start));
            let same = lanes.count_ones() as usize == numbers.len();
            self.threads[*number].set(d, if all && !same { 0 } else { lanes.into() });
            if let Some(p) = p {
                self.threads[*number].set(p, same.into());
            }
        }
        Ok(())
    }

    /// Lanes 0 to 7 give the rows of the first matrix, 8 to 15 of the second, and so on.
    fn load_matrix(&mut self, collective: Collective, numbers: &[usize]) -> Result<()> {
        let Collective::LoadMatrix { count, transposed, d, address } = collective else { return Ok(()) };
        let mut rows = [[0; 16]; 32];
        for (row, number) in rows.iter_mut().zip(numbers).take(8 * usize::from(count)) {
            let read = self.threads[*number].read_row(self.machine, &address);
            *row = read.map_err(|stop| (*number, self.located(*number, stop)))?;
        }
        for (lane, number) in numbers.iter().enumerate() {
            for (matrix, d) in d.iter().enumerate().take(count.into()) {
                let part = load_part(&rows[8 * matrix..][..8], lane, transposed);
                self.set(*number, *d, part.into());
            }
        }
        Ok(())
    }

    // ---- Barriers of the block

    /// Lets threads past a barrier that all they need have reached. False if there is none, and a thread is left.
    fn barrier(&mut self) -> Result<bool> {
        let alive: Vec<usize> =
            (0..self.threads.len()).filter(|number| self.threads[*number].state != State::Exited).collect();
        let mut progress = alive.is_empty();
        let mut seen = Vec::new();
        for number in &alive {
            let Some(Collective::Barrier { id, count, .. }) = self.waits_at(*number) else { continue };
            let id = self.get(*number, id)?;
            if seen.contains(&id) {
                continue;
            }
            seen.push(id);
            let count = count.map(|count| self.get(*number, count)).transpose()?;
            progress |= self.pass(*number, id, count, &alive)?;
        }
        Ok(progress)
    }

    fn pass(&mut self, first: usize, id: u64, count: Option<u64>, alive: &[usize]) -> Result<bool> {
        let mut numbers = Vec::new();
        for number in alive {
            let Some(Collective::Barrier { id: other, .. }) = self.waits_at(*number) else { continue };
            if self.get(*number, other)? != id {
                continue;
            }
            if !self.same_place(first, *number) {
                let note = format!(
                    "threads {:?} and {:?} wait at different places of barrier {id}",
                    self.threads[first].index, self.threads[*number].index
                );
                return Err((*number, Fault::BarrierDivergence(note)));
            }
            numbers.push(*number);
        }
        let needed = count.map_or(alive.len(), |count| count as usize);
        if numbers.len() < needed {
            return Ok(false);
        }
        self.reduce_at_barrier(&numbers)?;
        if let Some(races) = &mut self.machine.races {
            races.block_barrier();
        }
        self.release(&numbers);
        Ok(true)
    }

    fn reduce_at_barrier(&mut self, numbers: &[usize]) -> Result<()> {
        let Some(Collective::Barrier { kind, d, a, negated, .. }) = self.waits_at(numbers[0]) else { return Ok(()) };
        if kind == BarrierKind::Sync {
            return Ok(());
        }
        let mut count = 0;
        for number in numbers {
            count += usize::from((self.get(*number, a)? != 0) != negated);
        }
        let value = match kind {
            BarrierKind::Count => count as u64,
            BarrierKind::And => u64::from(count == numbers.len()),
            _ => u64::from(count > 0),
        };
        numbers.iter().for_each(|number| self.set(*number, d, value));
        Ok(())
    }

    /// Nobody can go on: what the first thread that waits is waiting for.
    fn stuck(&self) -> (usize, Fault) {
        let waiting = |number: &usize| self.threads[*number].state == State::Waiting;
        let at_warp =
            |number: &usize| waiting(number) && !matches!(self.waits_at(*number), Some(Collective::Barrier { .. }));
        let threads = 0..self.threads.len();
        let first = threads.clone().find(at_warp).or_else(|| threads.clone().find(waiting)).unwrap_or(0);
        let here = threads.clone().filter(|other| self.same_place(first, *other)).count();
        let exited = threads.clone().filter(|number| self.threads[*number].state == State::Exited).count();
        let elsewhere = self.threads.len() - exited - here;
        let note = format!("{here} threads wait here for others; {elsewhere} wait elsewhere, {exited} have exited");
        match at_warp(&first) {
            true => (first, Fault::WarpDivergence(note)),
            false => (first, Fault::BarrierDivergence(note)),
        }
    }
}

fn value(special: Special, place: Place, index: [u32; 3], number: u32) -> u64 {
    let lane = number % 32;
    let value = match special {
        Special::Thread(axis) => index[usize::from(axis)],
        Special::Threads(axis) => place.threads[usize::from(axis)],
        Special::Block(axis) => place.block[usize::from(axis)],
        Special::Blocks(axis) => place.blocks[usize::from(axis)],
        Special::Lane => lane,
        Special::Warp => number / 32,
        Special::Warps => place.threads.iter().product::<u32>().div_ceil(32),
        Special::WarpSize => 32,
        Special::LaneMask { below, own, above } => {
            let lower = (1u32 << lane) - 1;
            let parts = [(below, lower), (own, 1 << lane), (above, !lower & !(1 << lane))];
            parts.into_iter().filter(|(taken, _)| *taken).fold(0, |all, (_, lanes)| all | lanes)
        }
        Special::DynamicShared => place.dynamic_shared,
    };
    u64::from(value)
}
