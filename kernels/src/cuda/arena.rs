//! The GPU's memory: plain allocations, and arenas that the weights of a model share.
//!
//! Everything is taken by `cuMemAlloc`, nothing by the allocator that goes with a stream: its pool keeps what is given back,
//! and on boards it takes the processor's memory with it.

use cudarc::driver::{CudaStream, DeviceRepr, DriverError, result, sys};
use std::marker::PhantomData;
use std::sync::{Arc, Weak};

use super::replay;

/// The largest arena: boards that share memory with the processor refuse larger allocations long before it is used up.
pub(super) const LARGEST: usize = 256 << 20;
/// The smallest that is asked for where nobody said how much will come; drivers give no less anyway.
const SMALLEST: usize = 2 << 20;
/// Where parts begin, as `cuMemAlloc`'s allocations do.
pub(crate) const ALIGNMENT: usize = 256;

/// Elements in the GPU's memory, given back when dropped. An empty one is no allocation.
#[derive(Debug)]
pub(super) struct Memory<T> {
    pointer: u64,
    len: usize,
    stream: Arc<CudaStream>,
    kind: PhantomData<T>,
}

impl<T: DeviceRepr> Memory<T> {
    /// `len` elements of any value; their bytes are no more than `isize::MAX`.
    pub(super) fn new(stream: &Arc<CudaStream>, len: usize) -> Result<Self, DriverError> {
        let mut memory = Memory { pointer: 0, len, stream: stream.clone(), kind: PhantomData };
        if len > 0 {
            stream.context().bind_to_thread()?;
            // SAFETY: the function is there, its context is current, and nobody reads the memory before it is written.
            memory.pointer = unsafe { result::malloc_sync(len * size_of::<T>()) }?;
        }
        Ok(memory)
    }

    /// Zeros, in the order of the stream.
    pub(super) fn clear(&mut self) -> Result<(), DriverError> {
        if self.len == 0 {
            return Ok(());
        }
        self.stream.context().bind_to_thread()?;
        // SAFETY: these are the bytes of the allocation, and any T the kernels take may be zero bytes.
        unsafe { result::memset_d8_async(self.pointer, 0, self.len * size_of::<T>(), self.stream.cu_stream()) }
    }

    /// Elements.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The address of an element.
    pub(super) fn address(&self, offset: usize) -> u64 {
        debug_assert!(offset <= self.len);
        self.pointer + (offset * size_of::<T>()) as u64
    }

    /// `self[offset ..] = values`; they have been read when this returns. There must be room for them.
    pub(super) fn write(&mut self, offset: usize, values: &[T]) -> Result<(), DriverError> {
        debug_assert!(offset + values.len() <= self.len);
        if !values.is_empty() {
            self.stream.context().bind_to_thread()?;
            let to = self.address(offset);
            // SAFETY: the caller has checked the range, and the values live until the stream is done below.
            unsafe { result::memcpy_htod_async(to, values, self.stream.cu_stream()) }?;
        }
        self.stream.synchronize()
    }

    /// `values = self[offset ..]`, which there must be.
    pub(super) fn read(&self, offset: usize, values: &mut [T]) -> Result<(), DriverError> {
        debug_assert!(offset + values.len() <= self.len);
        if !values.is_empty() {
            self.stream.context().bind_to_thread()?;
            // SAFETY: as in `write`.
            unsafe { result::memcpy_dtoh_async(values, self.address(offset), self.stream.cu_stream()) }?;
        }
        self.stream.synchronize()
    }

    /// `to[to_offset ..] = self[offset .. offset + len]`, in the order of the stream. Both ranges must be there.
    pub(super) fn copy(
        &self,
        offset: usize,
        to: &mut Memory<T>,
        to_offset: usize,
        len: usize,
    ) -> Result<(), DriverError> {
        debug_assert!(offset + len <= self.len && to_offset + len <= to.len);
        if len == 0 {
            return Ok(());
        }
        self.stream.context().bind_to_thread()?;
        let (from, to, bytes) = (self.address(offset), to.address(to_offset), len * size_of::<T>());
        // SAFETY: the caller has checked both ranges. `Drop` waits for the stream.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) }
    }
}

impl<T> Drop for Memory<T> {
    fn drop(&mut self) {
        let given_back = GivenBack { pointer: self.pointer, stream: self.stream.clone() };
        // Launches that are recorded may use it later than this.
        replay::keep(given_back);
    }
}

/// Memory that nobody refers to any more.
#[derive(Debug)]
pub(super) struct GivenBack {
    pointer: u64,
    stream: Arc<CudaStream>,
}

impl Drop for GivenBack {
    fn drop(&mut self) {
        if self.pointer == 0 {
            return;
        }
        // Kernels that are under way may use it.
        let waited = self.stream.context().bind_to_thread().and_then(|()| self.stream.synchronize());
        // SAFETY: the allocation was made in `new`, and this is its only owner.
        let freed = unsafe { result::free_sync(self.pointer) };
        if let Err(error) = waited.and(freed) {
            // A GPU that is lost has lost its memory too.
            log::debug!("memory of the GPU was not given back: {error}");
        }
    }
}

/// Allocations that parts are cut from.
#[derive(Debug)]
pub(super) struct Arenas<M> {
    open: Vec<Open<M>>,
    /// Bytes that are still to come.
    expected: usize,
    /// Allocations made since this was last asked.
    made: usize,
}

/// An arena, for as long as a part of it lives.
#[derive(Debug)]
struct Open<M> {
    memory: Weak<M>,
    bytes: usize,
    used: usize,
}

/// Bytes of an arena, which lives as long as they do.
#[derive(Debug)]
pub(super) struct Part<M> {
    pub(super) arena: Arc<M>,
    /// Where in it they begin.
    pub(super) offset: usize,
}

// By hand, as M need not be Clone or Default.
impl<M> Clone for Part<M> {
    fn clone(&self) -> Self {
        Part { arena: self.arena.clone(), offset: self.offset }
    }
}

impl<M> Default for Arenas<M> {
    fn default() -> Self {
        Arenas { open: Vec::new(), expected: 0, made: 0 }
    }
}

impl<M> Arenas<M> {
    /// So many bytes more will be taken, each part at a multiple of [`ALIGNMENT`]: the next arenas are made for them.
    pub(super) fn expect(&mut self, bytes: usize) {
        self.expected = self.expected.saturating_add(bytes);
    }

    /// Nothing more is expected. Gives the number of allocations made since this was last called.
    pub(super) fn settle(&mut self) -> usize {
        self.expected = 0;
        std::mem::take(&mut self.made)
    }

    /// `bytes` bytes in the first arena that has room, else in one that `allocate` makes.
    pub(super) fn take(
        &mut self,
        bytes: usize,
        mut allocate: impl FnMut(usize) -> Result<M, DriverError>,
    ) -> Result<Part<M>, DriverError> {
        let Some(bytes) = bytes.max(1).checked_next_multiple_of(ALIGNMENT) else {
            return Err(DriverError(sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY));
        };
        self.open.retain(|open| open.memory.strong_count() > 0);
        let expected = self.expected;
        self.expected = expected.saturating_sub(bytes);
        for open in &mut self.open {
            if open.bytes - open.used >= bytes
                && let Some(arena) = open.memory.upgrade()
            {
                open.used += bytes;
                return Ok(Part { arena, offset: open.used - bytes });
            }
        }
        if bytes > LARGEST {
            log::info!("a tensor of {} MB is an allocation of its own: kernels read it as one", bytes / 1_000_000);
        }
        let mut size = expected.clamp(SMALLEST, LARGEST).max(bytes);
        let memory = loop {
            match allocate(size) {
                // Less in one piece may still be had.
                Err(DriverError(sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY)) if size > bytes => {
                    size = (size / 2).next_multiple_of(ALIGNMENT).max(bytes);
                }
                made => break made?,
            }
        };
        self.made += 1;
        let arena = Arc::new(memory);
        self.open.push(Open { memory: Arc::downgrade(&arena), bytes: size, used: bytes });
        Ok(Part { arena, offset: 0 })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const MB: usize = 1 << 20;

    /// Allocations are their sizes here.
    fn made(size: usize) -> Result<usize, DriverError> {
        Ok(size)
    }

    #[test]
    fn parts_lie_behind_each_other_at_multiples_of_256() {
        let mut arenas = Arenas::default();
        let parts: Vec<_> = [1, 256, 300, 0, 7].iter().map(|&bytes| arenas.take(bytes, made).unwrap()).collect();
        assert_eq!(parts.iter().map(|part| part.offset).collect::<Vec<_>>(), [0, 256, 512, 1024, 1280]);
        assert!(parts.iter().all(|part| Arc::ptr_eq(&part.arena, &parts[0].arena)) && *parts[0].arena == SMALLEST);
    }

    #[test]
    fn arenas_are_as_large_as_what_is_expected_and_never_larger_than_the_largest() {
        let mut arenas = Arenas::default();
        arenas.expect(290 * MB);
        let parts: Vec<_> = (0..29).map(|_| arenas.take(10 * MB, made).unwrap()).collect();
        // 25 parts of 10 MB in the first, and no more than the others in the second.
        assert_eq!((*parts[0].arena, *parts[28].arena), (256 * MB, 40 * MB));
        assert_eq!((arenas.settle(), arenas.settle()), (2, 0));
    }

    #[test]
    fn a_tensor_larger_than_an_arena_has_one_of_its_own() {
        let mut arenas = Arenas::default();
        let part = arenas.take(300 * MB + 1, made).unwrap();
        assert_eq!((*part.arena, part.offset), (300 * MB + 256, 0));
        let next = arenas.take(1, made).unwrap();
        assert!(!Arc::ptr_eq(&part.arena, &next.arena), "it is full");
    }

    #[test]
    fn what_is_refused_is_asked_for_in_smaller_pieces() {
        let mut arenas = Arenas::default();
        arenas.expect(200 * MB);
        let mut asked = Vec::new();
        let at_most = |most: usize| {
            move |size: usize| match size <= most {
                true => Ok(size),
                false => Err(DriverError(sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY)),
            }
        };
        let part = arenas.take(30 * MB, |size| {
            asked.push(size / MB);
            at_most(40 * MB)(size)
        });
        assert_eq!(*part.unwrap().arena, 30 * MB);
        assert_eq!(asked, [200, 100, 50, 30]);
        assert!(arenas.take(50 * MB, at_most(40 * MB)).is_err());
        assert!(arenas.take(usize::MAX, made).is_err());
    }

    #[test]
    fn an_arena_goes_with_its_last_part_and_not_before() {
        let mut arenas = Arenas::default();
        let first = arenas.take(1, made).unwrap();
        let second = arenas.take(1, made).unwrap();
        let arena = Arc::downgrade(&first.arena);
        drop(first);
        assert_eq!(arena.strong_count(), 1);
        drop(second);
        assert_eq!(arena.strong_count(), 0);
        assert_eq!(arenas.take(1, made).unwrap().offset, 0, "a new one");
        assert_eq!(arenas.settle(), 2);
    }
}
