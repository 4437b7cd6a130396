//! Memory in which every access is checked: global buffers far apart, and the shared and local memory of a block, which
//! know of each byte whether it was ever written.

use super::Space;
use super::fault::Fault;
use std::collections::HashMap;
use std::ops::Range;

/// Buffers start at multiples of this, so that no index of 32 bits leads from one into the next.
const SLOT: u64 = 1 << 40;
/// Where a buffer starts in its slot: indices below zero stay inside too.
const START: u64 = 1 << 38;
/// Windows of the other spaces among generic addresses. Their low 32 bits are not zero, so that a generic address
/// where an address of the space belongs is noticed.
pub(super) const SHARED_WINDOW: u64 = 0x0000_0007_5a00_0000;
pub(super) const LOCAL_WINDOW: u64 = 0x0000_0009_7b00_0000;
pub(super) const PARAM_WINDOW: u64 = 0x0000_000b_3c00_0000;
const WINDOW_BYTES: u64 = 1 << 24;

/// The window of a space, if it has one: global and constant addresses are generic ones.
pub(super) fn window(space: Space) -> u64 {
    match space {
        Space::Shared => SHARED_WINDOW,
        Space::Local => LOCAL_WINDOW,
        Space::Param => PARAM_WINDOW,
        Space::Generic | Space::Global | Space::Const => 0,
    }
}

/// The space of a generic address, and the address in it.
pub(super) fn resolve(address: u64) -> (Space, u64) {
    let windowed = [Space::Shared, Space::Local, Space::Param].into_iter().find_map(|space| {
        let offset = address.wrapping_sub(window(space));
        (offset < WINDOW_BYTES).then_some((space, offset))
    });
    windowed.unwrap_or((Space::Global, address))
}

/// Global memory: buffers by their addresses.
#[derive(Debug, Default)]
pub struct Memory {
    buffers: Vec<Buffer>,
    /// Where the variables of a module lie, by its number.
    modules: HashMap<u64, Vec<u64>>,
}

#[derive(Debug)]
struct Buffer {
    bytes: Vec<u8>,
    /// Of a buffer that was added without content: which bytes were written.
    written: Option<Vec<bool>>,
    constant: bool,
}

impl Memory {
    /// Memory without buffers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a buffer with this content and returns its address, aligned as cudaMalloc aligns.
    pub fn add(&mut self, bytes: &[u8]) -> u64 {
        self.push(Buffer { bytes: bytes.to_vec(), written: None, constant: false })
    }

    /// Adds a buffer without content: a byte may be read after it has been written.
    pub fn add_unwritten(&mut self, bytes: usize) -> u64 {
        self.push(Buffer { bytes: vec![0xcd; bytes], written: Some(vec![false; bytes]), constant: false })
    }

    /// The content of the buffer at `address`, which [`Memory::add`] gave.
    pub fn bytes(&self, address: u64) -> &[u8] {
        match self.find(address) {
            Some((buffer, 0)) => &self.buffers[buffer].bytes,
            _ => panic!("no buffer starts at {address:#x}"),
        }
    }

    /// The buffer's numbers, of four bytes each.
    pub fn f32s(&self, address: u64) -> Vec<f32> {
        self.words(address).into_iter().map(f32::from_bits).collect()
    }

    /// The buffer's words, of four bytes each.
    pub fn words(&self, address: u64) -> Vec<u32> {
        self.bytes(address).chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    /// The first byte of the buffer that nothing has written.
    pub fn first_unwritten(&self, address: u64) -> Option<usize> {
        let (buffer, _) = self.find(address)?;
        self.buffers[buffer].written.as_ref()?.iter().position(|written| !written)
    }

    fn push(&mut self, buffer: Buffer) -> u64 {
        self.buffers.push(buffer);
        self.buffers.len() as u64 * SLOT + START
    }

    /// Addresses of the variables of a module; the first launch makes them.
    pub(super) fn module<'a>(&mut self, number: u64, variables: impl Iterator<Item = (&'a [u8], bool)>) -> Vec<u64> {
        if let Some(addresses) = self.modules.get(&number) {
            return addresses.clone();
        }
        let add =
            |(bytes, constant): (&[u8], bool)| self.push(Buffer { bytes: bytes.to_vec(), written: None, constant });
        let addresses: Vec<u64> = variables.map(add).collect();
        self.modules.insert(number, addresses.clone());
        addresses
    }

    /// The buffer in whose slot an address lies, and how far it is from the buffer's start.
    fn find(&self, address: u64) -> Option<(usize, i64)> {
        let buffer = (address / SLOT).checked_sub(1)? as usize;
        (buffer < self.buffers.len()).then_some((buffer, (address % SLOT) as i64 - START as i64))
    }

    #[inline]
    fn place(&self, address: u64, len: usize) -> Result<(usize, Range<usize>), Fault> {
        let outside = |note| Fault::OutOfBounds { space: Space::Global, address, bytes: len, note };
        let Some((buffer, offset)) = self.find(address) else {
            return Err(outside("no buffer is near it".to_owned()));
        };
        let size = self.buffers[buffer].bytes.len();
        if offset < 0 || offset as usize + len > size {
            return Err(outside(format!("byte {offset} of a buffer of {size} bytes")));
        }
        if !address.is_multiple_of(len as u64) {
            return Err(Fault::Misaligned { space: Space::Global, address, bytes: len });
        }
        Ok((buffer, offset as usize..offset as usize + len))
    }

    /// `len` bytes to read; the address must be a multiple of `len`.
    #[inline]
    pub(super) fn read(&self, address: u64, len: usize) -> Result<&[u8], Fault> {
        let (buffer, range) = self.place(address, len)?;
        let buffer = &self.buffers[buffer];
        match &buffer.written {
            Some(written) if written[range.clone()].contains(&false) => {
                Err(Fault::UnwrittenMemory { space: Space::Global, address, bytes: len })
            }
            _ => Ok(&buffer.bytes[range]),
        }
    }

    /// `len` bytes to write.
    #[inline]
    pub(super) fn write(&mut self, address: u64, len: usize) -> Result<&mut [u8], Fault> {
        let (buffer, range) = self.place(address, len)?;
        let buffer = &mut self.buffers[buffer];
        if buffer.constant {
            return Err(Fault::ReadOnly { address });
        }
        if let Some(written) = &mut buffer.written {
            written[range.clone()].fill(true);
        }
        Ok(&mut buffer.bytes[range])
    }
}

/// What is known of a byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// In no variable.
    Outside,
    Unwritten,
    Written,
    /// A copy is under way to it.
    InFlight,
}

/// Shared or local memory.
#[derive(Clone, Debug)]
pub(super) struct Scratch {
    space: Space,
    bytes: Vec<u8>,
    states: Vec<State>,
}

impl Scratch {
    pub(super) fn new(space: Space) -> Self {
        Self { space, bytes: Vec::new(), states: Vec::new() }
    }

    /// Makes a range part of memory, not written.
    pub(super) fn open(&mut self, range: Range<usize>) {
        if self.bytes.len() < range.end {
            self.bytes.resize(range.end, 0xcd);
            self.states.resize(range.end, State::Outside);
        }
        self.states[range].fill(State::Unwritten);
    }

    /// Takes everything from `from` on out of memory.
    pub(super) fn close(&mut self, from: usize) {
        self.bytes.truncate(from);
        self.states.truncate(from);
    }

    /// True if all of it lies in memory, whatever it belongs to.
    #[inline]
    pub(super) fn holds(&self, address: u64, len: usize) -> bool {
        (address as usize).checked_add(len).is_some_and(|end| end <= self.bytes.len())
    }

    #[inline]
    fn place(&self, address: u64, len: usize) -> Result<Range<usize>, Fault> {
        let range = address as usize..(address as usize).saturating_add(len);
        match self.states.get(range.clone()) {
            Some(states) if !states.contains(&State::Outside) => {}
            _ => {
                let note = format!("offset {address}");
                return Err(Fault::OutOfBounds { space: self.space, address, bytes: len, note });
            }
        }
        if !address.is_multiple_of(len as u64) {
            return Err(Fault::Misaligned { space: self.space, address, bytes: len });
        }
        Ok(range)
    }

    #[inline]
    pub(super) fn read(&self, address: u64, len: usize) -> Result<&[u8], Fault> {
        // Nearly always all of it has been written.
        let range = address as usize..(address as usize).saturating_add(len);
        if address.is_multiple_of(len as u64)
            && let Some(states) = self.states.get(range)
            && states.iter().all(|state| *state == State::Written)
        {
            return Ok(&self.bytes[address as usize..][..len]);
        }
        let range = self.place(address, len)?;
        match self.states[range].contains(&State::InFlight) {
            true => Err(Fault::InFlight { address, write: false }),
            false => Err(Fault::UnwrittenMemory { space: self.space, address, bytes: len }),
        }
    }

    #[inline]
    pub(super) fn write(&mut self, address: u64, len: usize) -> Result<&mut [u8], Fault> {
        let range = self.place(address, len)?;
        if self.states[range.clone()].contains(&State::InFlight) {
            return Err(Fault::InFlight { address, write: true });
        }
        self.states[range.clone()].fill(State::Written);
        Ok(&mut self.bytes[range])
    }

    /// Marks the target of a copy that has started.
    pub(super) fn start_copy(&mut self, address: u64, len: usize) -> Result<(), Fault> {
        let range = self.place(address, len)?;
        self.states[range].fill(State::InFlight);
        Ok(())
    }

    /// Delivers a copy.
    pub(super) fn end_copy(&mut self, address: u64, data: &[u8]) {
        let range = address as usize..address as usize + data.len();
        self.states[range.clone()].fill(State::Written);
        self.bytes[range].copy_from_slice(data);
    }

    /// Copies between frames, with what is known of the bytes.
    pub(super) fn copy_within(&mut self, from: usize, to: usize, len: usize) {
        self.bytes.copy_within(from..from + len, to);
        self.states.copy_within(from..from + len, to);
    }
}

/// An unsigned number of up to eight bytes, lowest first.
pub(super) fn number(bytes: &[u8]) -> u64 {
    match *bytes {
        [a] => u64::from(a),
        [a, b] => u64::from(u16::from_le_bytes([a, b])),
        [a, b, c, d] => u64::from(u32::from_le_bytes([a, b, c, d])),
        [a, b, c, d, e, f, g, h] => u64::from_le_bytes([a, b, c, d, e, f, g, h]),
        _ => 0,
    }
}
