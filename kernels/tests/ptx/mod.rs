//! An interpreter of PTX, for tests: it executes what NVIDIA's compiler made of a kernel, inline assembly included, on
//! a machine without a GPU, and reports what a GPU would let pass: accesses outside buffers, values that were never
//! written, shared memory that is read while a copy to it is under way or that no barrier protects, threads that do not
//! meet.
//!
//! ```text
//! let module = ptx::Module::parse(&text)?;
//! let mut memory = ptx::Memory::new();
//! let y = memory.add(&bytes);
//! module.launch(&mut memory, "scale", [4, 1, 1], [256, 1, 1], 0, &[Arg::U64(y), Arg::F32(2.0)])?;
//! memory.f32s(y)
//! ```
//!
//! It follows the PTX ISA document alone, not what a kernel means to say. `lex` splits the text, `parse` reads
//! declarations, `decode` makes typed instructions; `execute` runs blocks, `thread` what a thread does on its own,
//! `arithmetic`, `round` and `matrix` hold the meaning of the instructions, `memory` and `race` check accesses.
#![allow(dead_code, unreachable_pub, unused_imports)] // Each test that takes this in uses a part of it.

mod arithmetic;
mod decode;
mod execute;
mod fault;
mod instruction;
mod lex;
mod matrix;
mod memory;
mod parse;
mod race;
mod round;
mod thread;

pub use fault::{Error, Fault, Located};
pub use instruction::Space;
pub use memory::Memory;

use execute::{Block, Place, Stopped};
use instruction::{Function, SharedVariable};
use memory::Scratch;
use parse::Parsed;
use race::Races;
use std::sync::atomic::{AtomicU64, Ordering};
use thread::{Machine, Thread};

/// Instructions that a thread may execute, unless [`Module::limit`] says otherwise.
const LIMIT: u64 = 50_000_000;
/// How often a thread may sleep before it is taken to wait for ever.
const MOST_NAPS: u32 = 10_000;
/// Bytes between variables in shared memory, which belong to none.
const SHARED_GAP: usize = 64;

/// A kernel's argument.
#[derive(Clone, Debug, PartialEq)]
pub enum Arg {
    U64(u64),
    I64(i64),
    U32(u32),
    I32(i32),
    F32(f32),
    /// A structure, as it lies in memory.
    Bytes(Vec<u8>),
}

impl Arg {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::U64(value) => value.to_le_bytes().to_vec(),
            Self::I64(value) => value.to_le_bytes().to_vec(),
            Self::U32(value) => value.to_le_bytes().to_vec(),
            Self::I32(value) => value.to_le_bytes().to_vec(),
            Self::F32(value) => value.to_le_bytes().to_vec(),
            Self::Bytes(bytes) => bytes.clone(),
        }
    }
}

/// What a launch did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Instructions of all threads.
    pub instructions: u64,
}

/// A block that is not running.
struct Resting {
    /// None before it begins.
    threads: Option<Vec<Thread>>,
    shared: Scratch,
    races: Option<Races>,
}

impl Default for Resting {
    fn default() -> Self {
        Self { threads: None, shared: Scratch::new(Space::Shared), races: None }
    }
}

/// A parsed PTX text.
#[derive(Clone, Debug)]
pub struct Module {
    parsed: Parsed,
    lines: Vec<String>,
    number: u64,
    limit: u64,
    races: bool,
}

impl Module {
    /// Parses a text; an error names the line and what is not understood.
    pub fn parse(text: &str) -> Result<Self, Error> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let lines = text.lines().map(|line| line.trim().to_owned()).collect();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Ok(Self { parsed: parse::parse(text)?, lines, number, limit: LIMIT, races: true })
    }

    /// Sets how many instructions a thread may execute.
    pub fn limit(mut self, limit: u64) -> Self {
        self.limit = limit;
        self
    }

    /// Passes over accesses to shared memory that no barrier orders.
    pub fn allow_races(mut self) -> Self {
        self.races = false;
        self
    }

    /// The names of the kernels.
    pub fn kernels(&self) -> Vec<&str> {
        self.parsed.functions.iter().filter(|function| function.entry).map(|function| function.name.as_str()).collect()
    }

    /// Runs a kernel over `blocks` blocks of `threads` threads, block after block.
    pub fn launch(
        &self,
        memory: &mut Memory,
        kernel: &str,
        blocks: [u32; 3],
        threads: [u32; 3],
        dynamic_shared: usize,
        arguments: &[Arg],
    ) -> Result<Statistics, Error> {
        self.run(memory, kernel, [blocks, threads], dynamic_shared, arguments, false)
    }

    /// Runs a kernel over blocks that are there all at once and can wait for each other.
    pub fn launch_cooperative(
        &self,
        memory: &mut Memory,
        kernel: &str,
        blocks: [u32; 3],
        threads: [u32; 3],
        dynamic_shared: usize,
        arguments: &[Arg],
    ) -> Result<Statistics, Error> {
        self.run(memory, kernel, [blocks, threads], dynamic_shared, arguments, true)
    }

    fn run(
        &self,
        memory: &mut Memory,
        kernel: &str,
        [blocks, threads]: [[u32; 3]; 2],
        dynamic_shared: usize,
        arguments: &[Arg],
        cooperative: bool,
    ) -> Result<Statistics, Error> {
        let named = |function: &Function| function.entry && function.defined && function.name == kernel;
        let index = self.parsed.functions.iter().position(named).ok_or_else(|| Error::NoKernel(kernel.to_owned()))?;
        let function = &self.parsed.functions[index];
        check_size(function, blocks, threads)?;
        let arguments = pack(function, arguments)?;
        let variables = self.parsed.globals.iter().map(|variable| (variable.bytes.as_slice(), variable.constant));
        let global_addresses = memory.module(self.number, variables);
        let (shared, shared_addresses) = self.shared(index, dynamic_shared);
        let of_block = || Resting { threads: None, shared: shared.clone(), races: self.races.then(Races::default) };
        let places = (0..blocks.iter().product()).map(|number| {
            let block = [number % blocks[0], number / blocks[0] % blocks[1], number / blocks[0] / blocks[1]];
            Place { blocks, block, threads, dynamic_shared: dynamic_shared as u32 }
        });
        let mut statistics = Statistics::default();
        // Runs a block as far as it goes; true at its end.
        let mut go_on = |place: Place, resting: &mut Resting, last: bool| -> Result<bool, Error> {
            let Resting { shared, races, threads } = std::mem::take(resting);
            let mut machine = Machine {
                functions: &self.parsed.functions,
                memory: &mut *memory,
                shared,
                races,
                arguments: &arguments,
                shared_addresses: &shared_addresses,
                global_addresses: &global_addresses,
                limit: self.limit,
            };
            let mut block = match threads {
                None => Block::new(&mut machine, index, place),
                Some(threads) => Block::resume(&mut machine, threads),
            };
            let ran = match block.run() {
                Ok(false) if last => Err(block.asleep()),
                ran => ran,
            };
            let threads = block.pause();
            let finished = ran.map_err(|stopped| self.located(kernel, place.block, stopped))?;
            if finished {
                statistics.instructions += threads.iter().map(|thread| thread.steps).sum::<u64>();
            }
            *resting = Resting { threads: Some(threads), shared: machine.shared, races: machine.races };
            Ok(finished)
        };
        if !cooperative {
            for place in places {
                let mut resting = of_block();
                for nap in 0.. {
                    if go_on(place, &mut resting, nap == MOST_NAPS)? {
                        break;
                    }
                }
            }
            return Ok(statistics);
        }
        let mut present: Vec<(Place, Resting)> = places.map(|place| (place, of_block())).collect();
        let mut rounds = 0;
        while !present.is_empty() {
            let before = present.len();
            let mut left = Vec::with_capacity(before);
            for (place, mut resting) in present {
                if !go_on(place, &mut resting, rounds == MOST_NAPS)? {
                    left.push((place, resting));
                }
            }
            rounds += 1;
            present = left;
        }
        Ok(statistics)
    }

    fn located(&self, kernel: &str, block: [u32; 3], stopped: Stopped) -> Error {
        let code = &self.parsed.functions[stopped.function].code;
        // Past the end of a function is its return.
        let line = code.get(stopped.at).or(code.last()).map_or(0, |instruction| instruction.line);
        let text = self.lines.get((line as usize).wrapping_sub(1)).cloned().unwrap_or_default();
        let kernel = kernel.to_owned();
        Error::Fault(Box::new(Located { kernel, line, text, block, thread: stopped.thread, fault: stopped.fault }))
    }

    /// Shared memory of a block of this kernel, and the addresses of its variables, with gaps between them.
    fn shared(&self, kernel: usize, dynamic: usize) -> (Scratch, Vec<u64>) {
        let mut memory = Scratch::new(Space::Shared);
        let mut addresses = vec![0; self.parsed.shared.len()];
        let mut end = 0usize;
        let mut place = |variable: &SharedVariable, bytes: usize, memory: &mut Scratch| {
            // Aligned as declared and not better, so that an access which needs more is noticed.
            let at = end.next_multiple_of(2 * variable.align) + variable.align;
            memory.open(at..at + bytes);
            end = at + bytes + SHARED_GAP;
            at as u64
        };
        for (address, variable) in addresses.iter_mut().zip(&self.parsed.shared) {
            if let Some(bytes) = variable.bytes
                && self.uses(kernel, variable)
            {
                *address = place(variable, bytes, &mut memory);
            }
        }
        // Every array without a size is the same one.
        let aligned = self.parsed.shared.iter().filter(|variable| variable.bytes.is_none()).max_by_key(|v| v.align);
        let start = aligned.map_or(0, |variable| place(variable, dynamic, &mut memory));
        for (address, variable) in addresses.iter_mut().zip(&self.parsed.shared) {
            if variable.bytes.is_none() {
                *address = start;
            }
        }
        (memory, addresses)
    }

    /// Variables of other kernels are not there.
    fn uses(&self, kernel: usize, variable: &SharedVariable) -> bool {
        variable.owner.is_none_or(|owner| owner == kernel || !self.parsed.functions[owner].entry)
    }
}

fn check_size(function: &Function, blocks: [u32; 3], threads: [u32; 3]) -> Result<(), Error> {
    let error = |message: String| Err(Error::Launch { kernel: function.name.clone(), message });
    let count = threads.iter().map(|threads| u64::from(*threads)).product::<u64>();
    let most = function.most_threads.unwrap_or(1024).min(1024);
    if count == 0 || blocks.contains(&0) {
        return error(format!("{blocks:?} blocks of {threads:?} threads are none"));
    }
    if count > most || threads[2] > 64 {
        return error(format!("{threads:?} threads, more than {most}"));
    }
    if blocks[1] > 65535 || blocks[2] > 65535 || blocks[0] > i32::MAX as u32 {
        return error(format!("{blocks:?} blocks"));
    }
    Ok(())
}

/// The arguments as the kernel's parameters lie.
fn pack(function: &Function, arguments: &[Arg]) -> Result<Vec<u8>, Error> {
    let error = |message: String| Err(Error::Launch { kernel: function.name.clone(), message });
    if arguments.len() != function.parameters.len() {
        return error(format!("{} arguments for {} parameters", arguments.len(), function.parameters.len()));
    }
    let mut packed = vec![0; function.parameter_bytes];
    for (at, (argument, parameter)) in arguments.iter().zip(&function.parameters).enumerate() {
        let bytes = argument.bytes();
        if bytes.len() != parameter.bytes {
            return error(format!("argument {at} has {} bytes, the parameter {}", bytes.len(), parameter.bytes));
        }
        packed[parameter.offset..][..bytes.len()].copy_from_slice(&bytes);
    }
    Ok(packed)
}
