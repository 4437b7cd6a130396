//! The thread pool of the CPU device: threads that sleep until an operation has tasks for them.
//!
//! Every task is claimed on its own through a counter, so a thread that the system took off its core delays nothing
//! but the task it holds. The calling thread works too; a pool of one thread is the calling thread alone.

use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread looks for work (or for the end of a job) before it sleeps. Operations of one layer follow each
/// other within this time; waking a sleeping thread takes about as long.
const SPIN: Duration = Duration::from_micros(5);

/// A handle on a set of worker threads; clones share the threads, which end with the last handle.
#[derive(Clone)]
pub struct ThreadPool {
    workers: Arc<Workers>,
}

struct Workers {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Jobs that may have unclaimed tasks, oldest first.
    jobs: Mutex<Vec<Arc<Job>>>,
    work: Condvar,
    /// Grows with every job, so that a spinning thread sees new work without the lock.
    posted: AtomicUsize,
    stop: AtomicBool,
}

struct Job {
    /// The caller's closure. Called only between a claim below `tasks` and the count in `done`, and the caller
    /// stays in [`ThreadPool::run`] until every task is counted.
    task: *const (dyn Fn(usize) + Sync + 'static),
    tasks: usize,
    next: AtomicUsize,
    done: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    finished: Mutex<bool>,
    all_done: Condvar,
}

// SAFETY: the closure behind the pointer is `Sync`, and it outlives every call (see `Job::task`).
unsafe impl Send for Job {}
// SAFETY: as above.
unsafe impl Sync for Job {}

/// A lock whose data stays right when a holder panics.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Job {
    fn has_unclaimed(&self) -> bool {
        self.next.load(Ordering::Relaxed) < self.tasks
    }

    /// Claims and does tasks until none is left.
    fn work(&self) {
        loop {
            if !self.has_unclaimed() {
                return;
            }
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.tasks {
                return;
            }
            // SAFETY: this task is claimed and not yet counted in `done`, so `run` has not returned and the closure
            // it borrows is alive.
            let task = unsafe { &*self.task };
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| task(index))) {
                lock(&self.panic).get_or_insert(payload);
            }
            if self.done.fetch_add(1, Ordering::AcqRel) + 1 == self.tasks {
                *lock(&self.finished) = true;
                self.all_done.notify_all();
            }
        }
    }

    fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire) == self.tasks
    }

    /// Waits until every task is counted.
    fn wait(&self) {
        let start = Instant::now();
        while !self.is_done() {
            if start.elapsed() < SPIN {
                std::hint::spin_loop();
                continue;
            }
            let mut finished = lock(&self.finished);
            while !*finished {
                finished = self.all_done.wait(finished).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl Shared {
    /// A worker's life: do what is posted, spin shortly, sleep.
    fn serve(&self) {
        let mut seen = self.posted.load(Ordering::Acquire);
        loop {
            let job = {
                let mut jobs = lock(&self.jobs);
                loop {
                    if self.stop.load(Ordering::Relaxed) {
                        return;
                    }
                    if let Some(job) = jobs.iter().find(|job| job.has_unclaimed()) {
                        break Arc::clone(job);
                    }
                    jobs = self.work.wait(jobs).unwrap_or_else(PoisonError::into_inner);
                }
            };
            job.work();
            drop(job);
            let start = Instant::now();
            while start.elapsed() < SPIN {
                let posted = self.posted.load(Ordering::Acquire);
                if posted != seen {
                    seen = posted;
                    break;
                }
                std::hint::spin_loop();
            }
        }
    }
}

impl ThreadPool {
    /// A pool in which `threads` threads work, the calling one among them; `None` takes one for each core that the
    /// system lets this process use.
    pub fn new(threads: Option<usize>) -> Self {
        let wanted =
            threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get)).max(1);
        let shared = Arc::new(Shared {
            jobs: Mutex::new(Vec::new()),
            work: Condvar::new(),
            posted: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        });
        let mut handles = Vec::new();
        for index in 1..wanted {
            let shared = Arc::clone(&shared);
            match std::thread::Builder::new().name(format!("candor-cpu-{index}")).spawn(move || shared.serve()) {
                Ok(handle) => handles.push(handle),
                Err(error) => {
                    log::warn!("thread pool: {index} of {wanted} threads only: {error}");
                    break;
                }
            }
        }
        ThreadPool { workers: Arc::new(Workers { shared, handles }) }
    }

    /// Threads that work on a job, the calling one among them.
    pub fn threads(&self) -> usize {
        self.workers.handles.len() + 1
    }

    /// Calls `task(i)` for every `i` below `tasks`, in any order, on any of the threads, and returns when all are
    /// done. May be called from several threads, and from within a task.
    ///
    /// # Panics
    /// When a task panics, with the first panic's payload, after every task that was begun ended.
    pub fn run<F: Fn(usize) + Sync>(&self, tasks: usize, task: F) {
        if tasks <= 1 || self.threads() == 1 {
            (0..tasks).for_each(task);
            return;
        }
        let borrowed: &(dyn Fn(usize) + Sync) = &task;
        // SAFETY: only the lifetime changes. `Job::work` calls the closure for claimed, uncounted tasks only, and this
        // function does not return (nor unwind) before all tasks are counted.
        let task: *const (dyn Fn(usize) + Sync + 'static) = unsafe { std::mem::transmute(borrowed) };
        let job = Arc::new(Job {
            task,
            tasks,
            next: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            panic: Mutex::new(None),
            finished: Mutex::new(false),
            all_done: Condvar::new(),
        });
        let shared = &self.workers.shared;
        lock(&shared.jobs).push(Arc::clone(&job));
        shared.posted.fetch_add(1, Ordering::Release);
        if tasks > self.workers.handles.len() {
            shared.work.notify_all();
        } else {
            (1..tasks).for_each(|_| shared.work.notify_one());
        }
        job.work();
        lock(&shared.jobs).retain(|other| !Arc::ptr_eq(other, &job));
        job.wait();
        let payload = lock(&job.panic).take();
        if let Some(payload) = payload {
            resume_unwind(payload);
        }
    }

    /// Cuts `data` into pieces of `chunk` elements (the last may be shorter) and calls `task(index, piece)` for each.
    ///
    /// # Panics
    /// As [`ThreadPool::run`], and when `chunk` is 0.
    pub fn run_chunks<T: Send, F: Fn(usize, &mut [T]) + Sync>(&self, data: &mut [T], chunk: usize, task: F) {
        let len = data.len();
        let shared = SharedSlice::new(data);
        self.run(len.div_ceil(chunk), |index| {
            let start = index * chunk;
            // SAFETY: pieces of different indices do not overlap, and each index is run once.
            let piece = unsafe { shared.range(start, chunk.min(len - start)) };
            task(index, piece);
        });
    }
}

impl fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ThreadPool({})", self.threads())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        {
            // Under the lock, so that no worker is between its look at `stop` and its sleep.
            let _jobs = lock(&self.shared.jobs);
            self.shared.stop.store(true, Ordering::Relaxed);
        }
        self.shared.work.notify_all();
        for handle in self.handles.drain(..) {
            // Workers catch every panic of a task, so there is no error to pass on.
            let _ = handle.join();
        }
    }
}

/// A slice that several tasks write to, each in its own places.
pub(crate) struct SharedSlice<'a, T> {
    start: *mut T,
    len: usize,
    borrowed: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `range`, whose callers promise ranges that do not overlap; `T: Send` moves between threads.
unsafe impl<T: Send> Send for SharedSlice<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        SharedSlice { start: slice.as_mut_ptr(), len: slice.len(), borrowed: PhantomData }
    }

    /// The elements `start .. start + len`.
    ///
    /// # Safety
    /// No two ranges that are in use at the same time overlap.
    ///
    /// # Panics
    /// When the range leaves the slice.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)] // disjointness is the caller's promise
    pub(crate) unsafe fn range(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "range outside of the slice");
        // SAFETY: inside the borrowed slice (checked above), and not aliased (the caller's promise).
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let pool = ThreadPool::new(Some(threads));
            for tasks in [0, 1, 2, 7, 1000] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, |i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn chunks_cover_the_slice() {
        let pool = ThreadPool::new(Some(3));
        let mut data = vec![0usize; 103];
        pool.run_chunks(&mut data, 10, |index, piece| piece.fill(index + 1));
        assert!(data.iter().enumerate().all(|(i, &v)| v == i / 10 + 1));
    }

    #[test]
    fn jobs_nest_and_run_side_by_side() {
        let pool = ThreadPool::new(Some(3));
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    pool.run(20, |_| {
                        pool.run(10, |_| {
                            total.fetch_add(1, Ordering::Relaxed);
                        });
                    });
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 20 * 10);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = ThreadPool::new(Some(2));
        let done = AtomicUsize::new(0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(50, |i| {
                assert!(i != 31, "task 31");
                done.fetch_add(1, Ordering::Relaxed);
            });
        }));
        let payload = result.expect_err("the panic is passed on");
        assert!(payload.downcast_ref::<&str>().is_some_and(|message| message.contains("task 31")));
        assert_eq!(done.load(Ordering::Relaxed), 49);
        pool.run(8, |_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.into_inner(), 57);
    }
}
