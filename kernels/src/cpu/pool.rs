//! The thread pool of the CPU device: threads that sleep until an operation has tasks for them.
//!
//! Every task is claimed on its own through a counter, so a thread that the system took off its core delays nothing
//! but the task it holds. The calling thread works too; a pool of one thread is the calling thread alone.

use std::any::Any;
use std::cell::UnsafeCell;
use std::fmt;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread looks for work (or for the end of a job) before it sleeps. Operations of one token follow each
/// other within this time; waking a sleeping thread takes about as long.
const SPIN: Duration = Duration::from_micros(60);
/// Looks between two looks at the clock.
const LOOKS: usize = 32;
/// Time of jobs after which it is judged whether all threads were of use: some of the system's time slices.
const JUDGED: Duration = Duration::from_millis(20);
/// How long a job is then done by one thread fewer; four times as long each time that trying again shows nothing better.
const PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Ranges that the tasks of a job are cut into at most: each thread begins with one of its own, and so with tasks that
/// follow each other.
const RANGES: usize = 16;
/// Jobs that can be under way at once. A caller that finds no place does its tasks alone.
const PLACES: usize = 16;

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
    crowd: Crowd,
    places: [Place; PLACES],
    /// Grows with every job, so that a waiting thread sees new work.
    posted: AtomicUsize,
    /// Workers that sleep, or are about to.
    sleeping: AtomicUsize,
    asleep: Mutex<()>,
    work: Condvar,
    stop: AtomicBool,
}

/// How many threads take part. A worker whose core somebody else took holds up every job by a time slice, so that two
/// threads may get less done than one: then one fewer takes part, for a while.
struct Crowd {
    began: Instant,
    threads: usize,
    active: AtomicUsize,
    /// Since the last judgement, nanoseconds that callers worked in jobs, and that they lost by waiting for others.
    worked: AtomicU64,
    lost: AtomicU64,
    /// When to try with one more, in nanoseconds from `began`.
    again: AtomicU64,
    /// How long the last pause was meant to be, in nanoseconds.
    pause: AtomicU64,
}

impl Crowd {
    fn new(threads: usize) -> Self {
        let zero = || AtomicU64::new(0);
        let (began, active, pause) = (Instant::now(), AtomicUsize::new(threads), AtomicU64::new(nanoseconds(PAUSE)));
        Crowd { began, threads, active, worked: zero(), lost: zero(), again: zero(), pause }
    }

    fn now(&self) -> u64 {
        nanoseconds(self.began.elapsed())
    }

    /// Threads that take part in the next job.
    fn active(&self) -> usize {
        let active = self.active.load(Ordering::Relaxed);
        if active == self.threads || self.now() < self.again.load(Ordering::Relaxed) {
            return active;
        }
        self.again.store(self.now() + self.pause.load(Ordering::Relaxed), Ordering::Relaxed);
        self.active.store(active + 1, Ordering::Relaxed);
        active + 1
    }

    /// A job of `active` threads kept its caller at work for `worked`, and then waiting for `waited`.
    fn report(&self, active: usize, worked: Duration, waited: Duration) {
        let add = |sum: &AtomicU64, time: u64| sum.fetch_add(time, Ordering::Relaxed) + time;
        // One thread fewer would work n / (n - 1) times as long, and wait for nobody.
        let lost = add(&self.lost, nanoseconds(waited).saturating_mul(active as u64 - 1));
        let worked = add(&self.worked, nanoseconds(worked));
        if worked + lost < nanoseconds(JUDGED) {
            return;
        }
        self.worked.store(0, Ordering::Relaxed);
        self.lost.store(0, Ordering::Relaxed);
        // Where cores are taken, the caller's is too, and half of what seems work was none.
        if lost <= worked / 2 {
            return;
        }
        let now = self.now();
        let calm = now.saturating_sub(self.again.load(Ordering::Relaxed)) > nanoseconds(LONGEST_PAUSE);
        let pause = if calm { nanoseconds(PAUSE) } else { 4 * self.pause.load(Ordering::Relaxed) };
        let pause = pause.min(nanoseconds(LONGEST_PAUSE));
        self.pause.store(pause, Ordering::Relaxed);
        self.again.store(now + pause, Ordering::Relaxed);
        let active = self.active.load(Ordering::Relaxed);
        self.active.store(active.saturating_sub(1).max(1), Ordering::Relaxed);
    }
}

fn nanoseconds(time: Duration) -> u64 {
    time.as_nanos() as u64
}

type Task = *const (dyn Fn(usize) + Sync + 'static);

/// Room for a job. It is used again and again, so that a job takes no memory.
#[derive(Default)]
struct Place {
    /// Whether somebody has it.
    taken: AtomicBool,
    /// Whether workers may come in. `job` is written only while it is not open and nobody is inside.
    open: AtomicBool,
    /// Workers below this number may.
    wanted: AtomicUsize,
    /// Workers that came in and did not leave yet.
    inside: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    /// The next task of each range.
    next: [Next; RANGES],
    done: AtomicUsize,
    /// Whether the caller sleeps until the last task is done and the last worker left.
    waiting: AtomicBool,
    asleep: Mutex<()>,
    all_done: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// A counter in a cache line of its own.
#[derive(Default)]
#[repr(align(64))]
struct Next(AtomicUsize);

#[derive(Clone, Copy)]
struct Job {
    /// The caller's closure, which lives until the place is given back.
    task: Task,
    tasks: usize,
    ranges: usize,
}

impl Job {
    /// Where a range begins; the one behind the last is the end.
    fn start(&self, range: usize) -> usize {
        self.tasks * range / self.ranges
    }
}

// SAFETY: `job` is the only part that is not `Sync`. Its caller alone writes it, before the place opens and after the last
// worker left; the closure behind the pointer is `Sync`.
unsafe impl Send for Place {}
// SAFETY: as above.
unsafe impl Sync for Place {}

/// A lock whose data stays right when a holder panics.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looks until `there` is true, for a short time; whether it was.
fn spin_until(there: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..LOOKS {
            if there() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > SPIN {
            return false;
        }
    }
}

impl Place {
    /// Whether there may be something to do for worker `home`.
    fn wants(&self, home: usize) -> bool {
        self.open.load(Ordering::SeqCst) && home < self.wanted.load(Ordering::SeqCst)
    }

    /// Claims and does tasks of a job until none is left, those of range `home` first.
    fn work(&self, job: Job, home: usize) {
        for range in (0..job.ranges).map(|i| (home + i) % job.ranges) {
            let end = job.start(range + 1);
            loop {
                let index = self.next[range].0.fetch_add(1, Ordering::Relaxed);
                if index >= end {
                    break;
                }
                // SAFETY: this task is claimed and not yet counted in `done`, so `run` has not returned and the closure
                // it borrows is alive.
                let task = unsafe { &*job.task };
                if let Err(payload) = catch_unwind(AssertUnwindSafe(|| task(index))) {
                    lock(&self.panic).get_or_insert(payload);
                }
                self.done.fetch_add(1, Ordering::AcqRel);
            }
        }
        // Nobody needs to come in any more.
        self.open.store(false, Ordering::SeqCst);
    }

    /// A worker's visit: comes in if the place is open, works, leaves.
    fn visit(&self, home: usize) {
        self.inside.fetch_add(1, Ordering::SeqCst);
        // Seen open after coming in, the place cannot be given back before this worker leaves: its caller closes it
        // first and waits until nobody is inside.
        if self.open.load(Ordering::SeqCst) {
            // SAFETY: see above; the opening made the caller's write visible.
            if let Some(job) = unsafe { *self.job.get() } {
                self.work(job, home);
            }
        }
        self.inside.fetch_sub(1, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) {
            drop(lock(&self.asleep));
            self.all_done.notify_all();
        }
    }

    /// Waits until every task is done and every worker left.
    fn wait(&self, tasks: usize) {
        let over = || self.done.load(Ordering::Acquire) == tasks && self.inside.load(Ordering::SeqCst) == 0;
        if spin_until(over) {
            return;
        }
        let mut asleep = lock(&self.asleep);
        self.waiting.store(true, Ordering::SeqCst);
        while !over() {
            asleep = self.all_done.wait(asleep).unwrap_or_else(PoisonError::into_inner);
        }
        self.waiting.store(false, Ordering::SeqCst);
    }
}

impl Shared {
    /// A worker's life: do what is posted, look shortly for more, sleep.
    fn serve(&self, home: usize) {
        loop {
            let seen = self.posted.load(Ordering::SeqCst);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            let mut found = false;
            for place in self.places.iter().filter(|place| place.wants(home)) {
                place.visit(home);
                found = true;
            }
            let is_new = || self.posted.load(Ordering::SeqCst) != seen;
            if found || spin_until(is_new) {
                continue;
            }
            let mut asleep = lock(&self.asleep);
            self.sleeping.fetch_add(1, Ordering::SeqCst);
            while !is_new() && !self.stop.load(Ordering::SeqCst) {
                asleep = self.work.wait(asleep).unwrap_or_else(PoisonError::into_inner);
            }
            self.sleeping.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Tells the workers of a job. All that sleep wake, as one alone may not be wanted.
    fn post(&self) {
        self.posted.fetch_add(1, Ordering::SeqCst);
        let sleeping = self.sleeping.load(Ordering::SeqCst);
        if sleeping > 0 {
            drop(lock(&self.asleep));
            self.work.notify_all();
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
            crowd: Crowd::new(wanted),
            places: Default::default(),
            posted: AtomicUsize::new(0),
            sleeping: AtomicUsize::new(0),
            asleep: Mutex::new(()),
            work: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let mut handles = Vec::new();
        for index in 1..wanted {
            let shared = Arc::clone(&shared);
            match std::thread::Builder::new().name(format!("candor-cpu-{index}")).spawn(move || shared.serve(index)) {
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
        let shared = &self.workers.shared;
        let free = |place: &&Place| !place.taken.load(Ordering::Relaxed) && !place.taken.swap(true, Ordering::Acquire);
        let active = shared.crowd.active().min(tasks);
        let place = match active > 1 {
            true => shared.places.iter().find(free),
            false => None,
        };
        let Some(place) = place else {
            (0..tasks).for_each(task);
            return;
        };
        let borrowed: &(dyn Fn(usize) + Sync) = &task;
        // SAFETY: only the lifetime changes. Workers call the closure for claimed, uncounted tasks only, and this
        // function does not return (nor unwind) before all tasks are counted.
        let task: Task = unsafe { std::mem::transmute(borrowed) };
        let job = Job { task, tasks, ranges: active.min(RANGES) };
        // SAFETY: the place is this caller's, closed, and nobody is inside: so its last caller left it.
        unsafe { *place.job.get() = Some(job) };
        for (range, next) in place.next.iter().enumerate().take(job.ranges) {
            next.0.store(job.start(range), Ordering::Relaxed);
        }
        place.done.store(0, Ordering::Relaxed);
        place.wanted.store(active, Ordering::SeqCst);
        place.open.store(true, Ordering::SeqCst);
        let begun = Instant::now();
        shared.post();
        place.work(job, 0);
        let worked = begun.elapsed();
        place.wait(tasks);
        shared.crowd.report(active, worked, begun.elapsed() - worked);
        let payload = lock(&place.panic).take();
        place.taken.store(false, Ordering::Release);
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
            let _asleep = lock(&self.shared.asleep);
            self.shared.stop.store(true, Ordering::SeqCst);
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
    fn threads_that_are_waited_for_take_no_part() {
        let milliseconds = Duration::from_millis;
        let crowd = Crowd::new(2);
        // A core that is gone for a time slice now and then is still worth having.
        for _ in 0..50 {
            crowd.report(2, milliseconds(7), milliseconds(3));
            assert_eq!(crowd.active(), 2);
        }
        for _ in 0..5 {
            crowd.report(2, milliseconds(1), milliseconds(3));
        }
        assert_eq!(crowd.active(), 1);
        // It is tried again; a pause is longer each time.
        let pause = crowd.pause.load(Ordering::Relaxed);
        crowd.again.store(0, Ordering::Relaxed);
        assert_eq!(crowd.active(), 2);
        for _ in 0..5 {
            crowd.report(2, milliseconds(1), milliseconds(3));
        }
        assert_eq!(crowd.active(), 1);
        assert!(crowd.pause.load(Ordering::Relaxed) > pause);
        // Of many threads one goes at a time, also where a job has but few tasks.
        let crowd = Crowd::new(8);
        for _ in 0..12 {
            crowd.report(2, milliseconds(1), milliseconds(3));
        }
        assert_eq!(crowd.active(), 6);
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
