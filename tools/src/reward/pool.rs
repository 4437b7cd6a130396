//! Threads that pay completions, each with a verifier of its own over the same mapped weights. What waits is taken
//! several requests at a time, so that a sentence that stands in many completions of a group is read once.

use std::collections::{HashMap, HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;

use anyhow::{Context, ensure};
use candor::verify::{Emotion, SentenceClassifier, VerifierError};
use tokio::sync::oneshot;

use super::{Rewards, Scorer, sentences_of};

/// Completions that a thread takes at a time, about.
const BATCH: usize = 64;
/// Sentences that are read between two looks at whether anybody still waits for them.
const SLICE: usize = 64;

/// A completion and the true emotion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// The completion.
    pub completion: String,
    /// The emotion it is held against.
    pub emotion: Emotion,
}

/// The rewards of a request's completions in their order, or why there are none.
pub type Outcome = Result<Vec<Rewards>, String>;

/// Opens a classifier; each thread does.
pub type Open = dyn Fn() -> anyhow::Result<Box<dyn SentenceClassifier>> + Send + Sync;

/// A request on its way.
struct Job {
    tasks: Vec<Task>,
    answer: oneshot::Sender<Outcome>,
}

#[derive(Default)]
struct Waiting {
    jobs: VecDeque<Job>,
    closed: bool,
}

/// What threads and senders share.
#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // The queue is whole whatever a thread did while it held it.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A thread's share of what waits; `None` when it is closed and empty.
    fn take(&self, threads: usize) -> Option<Vec<Job>> {
        let mut waiting = self.waiting();
        while waiting.jobs.is_empty() {
            if waiting.closed {
                return None;
            }
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        let share = waiting.jobs.len().div_ceil(threads);
        let (mut batch, mut completions) = (Vec::new(), 0);
        while batch.len() < share && completions < BATCH {
            let Some(job) = waiting.jobs.pop_front() else { break };
            completions += job.tasks.len();
            batch.push(job);
        }
        Some(batch)
    }
}

/// The threads. Dropped, they answer what waits and end.
pub struct Pool {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts threads once each has its classifier; with `guard` as in [`Scorer::new`].
    pub fn start(threads: usize, guard: bool, open: Arc<Open>) -> anyhow::Result<Pool> {
        ensure!(threads > 0, "--threads must be at least 1");
        let queue = Arc::new(Queue::default());
        let (ready, opened) = mpsc::channel();
        let mut pool = Pool { queue: queue.clone(), threads: Vec::new() };
        for index in 0..threads {
            let (queue, open, ready) = (queue.clone(), open.clone(), ready.clone());
            let work = move || {
                let classifier = match open() {
                    Ok(classifier) => classifier,
                    // Nobody waits for it where another thread's failure has ended the start.
                    Err(error) => return drop(ready.send(Err(error))),
                };
                drop(ready.send(Ok(())));
                let mut worker = Worker { classifier: Some(classifier), open, guard };
                while let Some(batch) = queue.take(threads) {
                    worker.answer(batch);
                }
            };
            let thread = std::thread::Builder::new().name(format!("reward {index}")).spawn(work);
            pool.threads.push(thread.context("cannot start a thread")?);
        }
        drop(ready);
        for _ in 0..threads {
            opened.recv().context("a thread ended before its verifier was open")??;
        }
        Ok(pool)
    }

    /// Puts a request into the queue. The answer is lost only if its thread is.
    pub fn submit(&self, tasks: Vec<Task>) -> oneshot::Receiver<Outcome> {
        let (answer, receiver) = oneshot::channel();
        self.queue.waiting().jobs.push_back(Job { tasks, answer });
        self.queue.changed.notify_one();
        receiver
    }

    /// Requests that no thread has taken yet.
    pub fn waiting(&self) -> usize {
        self.queue.waiting().jobs.len()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.queue.waiting().closed = true;
        self.queue.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A panic has been said on the error stream.
            let _ = thread.join();
        }
    }
}

/// One thread's classifier; `None` after it panicked, until it is opened anew.
struct Worker {
    classifier: Option<Box<dyn SentenceClassifier>>,
    open: Arc<Open>,
    guard: bool,
}

impl Worker {
    /// Answers requests. A failure is the failure of the request that it happened in.
    fn answer(&mut self, batch: Vec<Job>) {
        let outcomes: Vec<Outcome> = match self.read(&batch) {
            Ok(known) => batch.iter().map(|job| self.pay(job, &known)).collect(),
            Err(_) if batch.len() > 1 => return batch.into_iter().for_each(|job| self.answer(vec![job])),
            Err(reason) => batch.iter().map(|_| Err(reason.clone())).collect(),
        };
        for (job, outcome) in batch.into_iter().zip(outcomes) {
            // Whoever asked may have gone.
            let _ = job.answer.send(outcome);
        }
    }

    /// Reads the different sentences of a batch.
    fn read<'b>(&mut self, batch: &'b [Job]) -> Result<HashMap<&'b str, [f32; 28]>, String> {
        self.guarded(|classifier| {
            let tasks = batch.iter().flat_map(|job| &job.tasks);
            let mut seen = HashSet::new();
            let sentences: Vec<&str> = tasks
                .flat_map(|task| sentences_of(&task.completion))
                .filter(|sentence| seen.insert(*sentence))
                .collect();
            let mut known = HashMap::with_capacity(sentences.len());
            for slice in sentences.chunks(SLICE) {
                if batch.iter().all(|job| job.answer.is_closed()) {
                    break;
                }
                let read = classifier.classify(slice)?;
                if read.len() != slice.len() {
                    return Err(VerifierError::Count { expected: slice.len(), actual: read.len() });
                }
                known.extend(slice.iter().copied().zip(read));
            }
            Ok(known)
        })
    }

    fn pay(&mut self, job: &Job, known: &HashMap<&str, [f32; 28]>) -> Outcome {
        if job.answer.is_closed() {
            return Ok(Vec::new());
        }
        let guard = self.guard;
        self.guarded(|classifier| {
            let mut scorer = Scorer::new(Known { known, classifier }, guard);
            job.tasks.iter().map(|task| scorer.score(&task.completion, task.emotion, None)).collect()
        })
    }

    /// Works with the classifier; after a panic, which leaves nobody knows what in it, the next work opens a new one.
    fn guarded<T>(
        &mut self,
        work: impl FnOnce(&mut dyn SentenceClassifier) -> Result<T, VerifierError>,
    ) -> Result<T, String> {
        let mut classifier = match self.classifier.take() {
            Some(classifier) => classifier,
            None => (self.open)().map_err(|error| format!("the verifier could not be opened anew: {error:#}"))?,
        };
        match catch_unwind(AssertUnwindSafe(|| work(&mut *classifier))) {
            Ok(result) => {
                self.classifier = Some(classifier);
                result.map_err(|error| error.to_string())
            }
            Err(_) => Err("the verifier panicked over this request; standard error of the server says where".into()),
        }
    }
}

/// What has been read already, and a classifier for what has not.
struct Known<'k> {
    known: &'k HashMap<&'k str, [f32; 28]>,
    classifier: &'k mut dyn SentenceClassifier,
}

impl SentenceClassifier for Known<'_> {
    fn classify(&mut self, sentences: &[&str]) -> Result<Vec<[f32; 28]>, VerifierError> {
        let known: Option<Vec<[f32; 28]>> =
            sentences.iter().map(|sentence| self.known.get(sentence).copied()).collect();
        known.map_or_else(|| self.classifier.classify(sentences), Ok)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Reads joy in everything; fails, panics, loses sentences and waits on request.
    struct Moody {
        asked: Arc<AtomicUsize>,
        gate: Option<mpsc::Receiver<()>>,
    }

    impl SentenceClassifier for Moody {
        fn classify(&mut self, sentences: &[&str]) -> Result<Vec<[f32; 28]>, VerifierError> {
            self.asked.fetch_add(sentences.len(), Ordering::SeqCst);
            let any = |word: &str| sentences.iter().any(|sentence| sentence.contains(word));
            if any("wait") {
                self.gate.as_ref().unwrap().recv().unwrap();
            }
            assert!(!any("panic"), "a panic, as the test wants it");
            if any("lose") {
                return Ok(Vec::new());
            }
            let of = |sentence: &&str| {
                let mut one = [0.0; 28];
                one[17] = if sentence.contains("damaged") { f32::NAN } else { 0.9 };
                one
            };
            Ok(sentences.iter().map(of).collect())
        }
    }

    fn task(sentence: &str) -> Task {
        let completion = format!("<think>{sentence}</think>\n<answer>happy</answer>");
        Task { completion, emotion: Emotion::Happiness }
    }

    fn pool(threads: usize) -> (Pool, Arc<AtomicUsize>, Arc<AtomicUsize>) {
        let (asked, opened) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (inner, count) = (asked.clone(), opened.clone());
        let open = move || -> anyhow::Result<Box<dyn SentenceClassifier>> {
            count.fetch_add(1, Ordering::SeqCst);
            Ok(Box::new(Moody { asked: inner.clone(), gate: None }))
        };
        (Pool::start(threads, false, Arc::new(open)).unwrap(), asked, opened)
    }

    #[test]
    fn failures_are_answers_and_end_nothing() {
        let (pool, _, opened) = pool(1);
        let ask = |sentence: &str| pool.submit(vec![task("Fine."), task(sentence)]).blocking_recv().unwrap();
        for (sentence, reason) in [("damaged", "joy"), ("panic", "panicked"), ("lose", "0"), ("panic", "panicked")] {
            let error = ask(sentence).unwrap_err();
            assert!(error.contains(reason), "{error}");
            assert_eq!(ask("Good.").unwrap().iter().map(|own| own.explanation).collect::<Vec<_>>(), [1.0, 1.0]);
        }
        assert_eq!(opened.load(Ordering::SeqCst), 3, "anew after each panic");
    }

    #[test]
    fn requests_are_read_together_and_fail_alone() {
        let (release, gate) = mpsc::channel();
        let (gate, asked) = (Mutex::new(Some(gate)), Arc::new(AtomicUsize::new(0)));
        let count = asked.clone();
        let open = move || -> anyhow::Result<Box<dyn SentenceClassifier>> {
            Ok(Box::new(Moody { asked: count.clone(), gate: gate.lock().unwrap().take() }))
        };
        let pool = Pool::start(1, false, Arc::new(open)).unwrap();
        let first = pool.submit(vec![task("wait")]);
        while pool.waiting() > 0 {
            std::thread::yield_now();
        }
        // All of these wait while the first is read, so they are taken together.
        let same: Vec<_> = (0..20).map(|_| pool.submit(vec![task("One. Two."), task("Two.")])).collect();
        release.send(()).unwrap();
        assert_eq!(first.blocking_recv().unwrap().unwrap().len(), 1);
        same.into_iter().for_each(|answer| assert_eq!(answer.blocking_recv().unwrap().unwrap().len(), 2));
        assert_eq!(asked.load(Ordering::SeqCst), 3, "each sentence once");

        let first = pool.submit(vec![task("wait again")]);
        while pool.waiting() > 0 {
            std::thread::yield_now();
        }
        let good = pool.submit(vec![task("Three.")]);
        let bad = pool.submit(vec![task("lose")]);
        let gone = pool.submit(vec![task("Four.")]);
        drop(gone);
        release.send(()).unwrap();
        first.blocking_recv().unwrap().unwrap();
        assert_eq!(good.blocking_recv().unwrap().unwrap().len(), 1);
        bad.blocking_recv().unwrap().unwrap_err();
    }

    #[test]
    fn the_end_answers_what_has_begun() {
        let (pool, ..) = pool(3);
        let answers: Vec<_> = (0..100).map(|i| pool.submit(vec![task(&format!("Sentence {i}."))])).collect();
        drop(pool);
        answers.into_iter().for_each(|answer| assert_eq!(answer.blocking_recv().unwrap().unwrap().len(), 1));
    }

    #[test]
    fn a_verifier_that_does_not_open_is_an_error() {
        let error = Pool::start(2, false, Arc::new(|| anyhow::bail!("no such folder"))).err().unwrap();
        assert_eq!(error.to_string(), "no such folder");
        assert!(Pool::start(0, false, Arc::new(|| anyhow::bail!(""))).is_err());
    }
}
