//! Where weights lie: in arenas, uploaded once, or in the mapped file itself where the GPU shares the processor's memory.

use cudarc::driver::{CudaEvent, CudaStream, DriverError, result, sys};
use std::ffi::c_void;
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Weak};

use super::arena::{ALIGNMENT, Arenas, Memory, Part};
use super::driver::Gpu;
use crate::tensor::Bytes;

/// Bytes of each half of the ring that weights are uploaded through.
const HALF: usize = 8_000_000;
/// What the GPU reads in one piece. Weights of a mapped file that lie elsewhere would be read byte by byte.
const PIECE: u64 = 16;
/// Tensors smaller than this leave their pages alone: they share them with others that are still to come.
const PAGES: usize = 64 << 10;
/// The smallest page of any system.
const PAGE: usize = 4096;

/// Where a tensor's bytes lie, kept for as long as this is.
#[derive(Clone, Debug)]
pub(super) enum Place {
    Arena(Part<Memory<u8>>),
    Mapping { mapping: Arc<Registration>, offset: usize },
}

impl Place {
    /// The address of the first byte.
    pub(super) fn address(&self) -> u64 {
        match self {
            Place::Arena(part) => part.arena.address(part.offset),
            Place::Mapping { mapping, offset } => mapping.pointer + *offset as u64,
        }
    }
}

/// The weights of a GPU, and what it takes to bring them there.
#[derive(Debug, Default)]
pub(super) struct Residence {
    arenas: Arenas<Memory<u8>>,
    /// Mapped files that the GPU reads, by their first byte.
    mappings: Vec<(usize, Weak<Registration>)>,
    /// Whether a file could not be registered: no other is tried then.
    refused: bool,
    /// Loads that are under way.
    loads: usize,
    /// Bytes still to come that may lie in mapped files.
    expected: usize,
    ring: Option<Ring>,
    /// Whether there is no pinned memory for a ring.
    unpinned: bool,
    uploaded: usize,
    mapped: usize,
    /// Those of matrices that tensor cores do not multiply.
    plain: usize,
}

impl Residence {
    /// A load begins, of `bytes` bytes.
    pub(super) fn begin(&mut self, gpu: &Gpu, bytes: usize) {
        if self.loads == 0 {
            self.arenas.settle();
            (self.uploaded, self.mapped, self.plain, self.expected) = (0, 0, 0, 0);
        }
        self.loads += 1;
        match gpu.maps && !self.refused {
            true => self.expected = self.expected.saturating_add(bytes),
            false => self.arenas.expect(bytes),
        }
    }

    /// A load ends. With the last one the ring goes, when everything has been copied.
    pub(super) fn end(&mut self, gpu: &Gpu) -> Result<(), DriverError> {
        self.loads = self.loads.saturating_sub(1);
        if self.loads > 0 {
            return Ok(());
        }
        let (pinned, arenas) = (self.ring.take().map(|_| 2 * HALF), self.arenas.settle());
        let copied = gpu.stream.synchronize();
        let megabytes = |bytes: usize| bytes as f64 / 1e6;
        if self.mapped > 0 {
            log::info!("weights: {:.0} MB of the mapped file are used where they lie", megabytes(self.mapped));
        }
        if self.uploaded > 0 {
            let through =
                pinned.map_or(String::new(), |bytes| format!(" through {:.0} MB of pinned memory", megabytes(bytes)));
            let uploaded = megabytes(self.uploaded);
            let plural = if arenas == 1 { "" } else { "s" };
            log::info!("weights: {uploaded:.0} MB uploaded{through}, in {arenas} new arena{plural}");
        }
        // Small matrices in f32 are in most models.
        if gpu.capability.0 >= 8 && self.plain > (self.uploaded + self.mapped) / 4 {
            log::warn!(
                "weights: {:.0} MB are in f32 or bf16, which prompts and towers multiply without tensor cores, and slowly: \
                 candor-tools quantize stores them in bytes",
                megabytes(self.plain)
            );
        }
        copied
    }

    /// A matrix comes that tensor cores do not multiply.
    pub(super) fn count_plain(&mut self, bytes: usize) {
        self.plain += bytes;
    }

    /// Bytes of somebody's, who may let go of them if they are uploaded.
    pub(super) fn place(&mut self, gpu: &Gpu, bytes: &Bytes, range: Range<usize>) -> Result<Place, DriverError> {
        if let Some(place) = self.find(gpu, bytes, &range) {
            return Ok(place);
        }
        let place = self.upload(gpu, &(**bytes).as_ref()[range.clone()])?;
        if range.len() >= PAGES {
            bytes.let_go(range);
        }
        Ok(place)
    }

    /// Bytes that may be gone when this returns.
    pub(super) fn upload(&mut self, gpu: &Gpu, bytes: &[u8]) -> Result<Place, DriverError> {
        let part = self.arenas.take(bytes.len(), |size| Memory::new(&gpu.stream, size))?;
        let to = part.arena.address(part.offset);
        self.uploaded += bytes.len();
        match self.ring(gpu) {
            Some(ring) => ring.copy(gpu, to, bytes)?,
            None if bytes.is_empty() => {}
            None => {
                gpu.context.bind_to_thread()?;
                // SAFETY: the part has room for the bytes, and they live until the stream is done below.
                unsafe { result::memcpy_htod_async(to, bytes, gpu.stream.cu_stream()) }?;
                gpu.stream.synchronize()?;
            }
        }
        Ok(Place::Arena(part))
    }

    /// A place in a mapped file, where the GPU can read it there.
    fn find(&mut self, gpu: &Gpu, bytes: &Bytes, range: &Range<usize>) -> Option<Place> {
        if !gpu.maps || self.refused || !bytes.is_mapping() || range.is_empty() {
            return None;
        }
        self.expected = self.expected.saturating_sub(range.len().next_multiple_of(ALIGNMENT));
        let first = (**bytes).as_ref().as_ptr() as usize;
        self.mappings.retain(|(_, mapping)| mapping.strong_count() > 0);
        let known = self.mappings.iter().find(|(known, _)| *known == first);
        let mapping = match known.and_then(|(_, mapping)| mapping.upgrade()) {
            Some(mapping) => mapping,
            None => match Registration::new(gpu, bytes) {
                Ok(mapping) => {
                    let mapping = Arc::new(mapping);
                    self.mappings.push((first, Arc::downgrade(&mapping)));
                    mapping
                }
                Err(error) => {
                    log::info!("the driver does not take the weights' mapped file ({error}): they are uploaded");
                    self.refused = true;
                    let expected = std::mem::take(&mut self.expected);
                    self.arenas.expect(expected.saturating_add(range.len()));
                    return None;
                }
            },
        };
        let place = Place::Mapping { mapping, offset: range.start };
        if !place.address().is_multiple_of(PIECE) {
            return None;
        }
        self.mapped += range.len();
        Some(place)
    }

    /// The ring, while something is loaded and there is pinned memory.
    fn ring(&mut self, gpu: &Gpu) -> Option<&mut Ring> {
        if self.loads == 0 || self.unpinned {
            return None;
        }
        if self.ring.is_none() {
            match Ring::new(gpu) {
                Ok(ring) => self.ring = Some(ring),
                Err(error) => {
                    log::info!("there is no pinned memory ({error}): weights are uploaded without");
                    self.unpinned = true;
                }
            }
        }
        self.ring.as_mut()
    }
}

/// A mapped file that the GPU may read.
pub(super) struct Registration {
    /// Where the GPU sees the first byte.
    pointer: u64,
    bytes: Bytes,
    stream: Arc<CudaStream>,
}

impl Registration {
    fn new(gpu: &Gpu, bytes: &Bytes) -> Result<Self, DriverError> {
        let whole = (**bytes).as_ref();
        let host: *mut c_void = whole.as_ptr().cast_mut().cast();
        let flags = sys::CU_MEMHOSTREGISTER_READ_ONLY | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        gpu.context.bind_to_thread()?;
        // SAFETY: these are whole pages of a mapping, which `bytes` keeps until they are unregistered; the GPU only reads them.
        unsafe { sys::cuMemHostRegister_v2(host, whole.len().next_multiple_of(PAGE), flags) }.result()?;
        let mut registration = Registration { pointer: 0, bytes: bytes.clone(), stream: gpu.stream.clone() };
        // SAFETY: the memory has just been registered for this.
        unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut registration.pointer, host, 0) }.result()?;
        Ok(registration)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let host: *mut c_void = (*self.bytes).as_ref().as_ptr().cast_mut().cast();
        // Kernels that are under way may read it.
        let waited = self.stream.context().bind_to_thread().and_then(|()| self.stream.synchronize());
        // SAFETY: it was registered in `new`, and this is its only owner.
        let gone = unsafe { sys::cuMemHostUnregister(host) }.result();
        if let Err(error) = waited.and(gone) {
            log::debug!("a mapped file was not unregistered: {error}");
        }
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration").field("pointer", &self.pointer).finish_non_exhaustive()
    }
}

/// Pinned memory in two halves: while the GPU copies from one, the processor fills the other from the page cache.
#[derive(Debug)]
struct Ring {
    halves: [Half; 2],
    current: usize,
    /// Bytes of the current half that are filled.
    filled: usize,
}

#[derive(Debug)]
struct Half {
    memory: Pinned,
    /// Behind the last copy from it.
    copied: CudaEvent,
}

impl Ring {
    fn new(gpu: &Gpu) -> Result<Self, DriverError> {
        let half =
            || Ok::<_, DriverError>(Half { memory: Pinned::new(gpu, HALF)?, copied: gpu.context.new_event(None)? });
        Ok(Ring { halves: [half()?, half()?], current: 0, filled: 0 })
    }

    /// Copies to the GPU's memory at `to`, which has room. The copy is in the stream's order, and `bytes` have been read.
    fn copy(&mut self, gpu: &Gpu, to: u64, bytes: &[u8]) -> Result<(), DriverError> {
        gpu.context.bind_to_thread()?;
        let mut done = 0;
        while done < bytes.len() {
            if self.filled >= HALF {
                self.halves[self.current].copied.record(&gpu.stream)?;
                (self.current, self.filled) = (1 - self.current, 0);
                // One that was never recorded is over.
                self.halves[self.current].copied.synchronize()?;
            }
            let count = (bytes.len() - done).min(HALF - self.filled);
            let piece = self.halves[self.current].memory.fill(self.filled, &bytes[done..done + count]);
            // SAFETY: there is room at `to`. The piece is not written again before the event behind this copy is over, and its
            // memory is given back when the stream is done.
            unsafe { result::memcpy_htod_async(to + done as u64, piece, gpu.stream.cu_stream()) }?;
            done += count;
            self.filled = (self.filled + count).next_multiple_of(ALIGNMENT);
        }
        Ok(())
    }
}

/// The host's memory that a GPU copies from in the background.
#[derive(Debug)]
struct Pinned {
    pointer: NonNull<u8>,
    len: usize,
    stream: Arc<CudaStream>,
}

// SAFETY: plain memory with one owner; the driver takes it back from any thread.
unsafe impl Send for Pinned {}

impl Pinned {
    fn new(gpu: &Gpu, len: usize) -> Result<Self, DriverError> {
        gpu.context.bind_to_thread()?;
        // SAFETY: nobody reads the memory before it is written.
        let pointer = unsafe { result::malloc_host(len, 0) }?;
        let none = DriverError(sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY);
        Ok(Pinned { pointer: NonNull::new(pointer.cast()).ok_or(none)?, len, stream: gpu.stream.clone() })
    }

    /// Puts bytes at `offset`, as far as there is room, and gives them as they lie there.
    fn fill(&mut self, offset: usize, bytes: &[u8]) -> &[u8] {
        let offset = offset.min(self.len);
        let len = bytes.len().min(self.len - offset);
        // SAFETY: the range lies in the allocation, which is this one's alone, and is written before it is a slice.
        unsafe {
            let to = self.pointer.add(offset).as_ptr();
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, len);
            std::slice::from_raw_parts(to, len)
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let waited = self.stream.context().bind_to_thread().and_then(|()| self.stream.synchronize());
        // SAFETY: the allocation was made in `new`, and this is its only owner.
        let freed = unsafe { result::free_host(self.pointer.as_ptr().cast()) };
        if let Err(error) = waited.and(freed) {
            log::debug!("pinned memory was not given back: {error}");
        }
    }
}
