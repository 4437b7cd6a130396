//! Sequences of launches that nothing comes between, on a GPU that several threads share. Launches of a stream run one after the other,
//! whoever made them; but no operation may use memory that another one still needs between two of its launches, and what is replayed
//! may not come between them either.

use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::{self, ThreadId};

/// A lock that a thread can take again while it has it.
#[derive(Debug, Default)]
pub(super) struct Sequences {
    /// Who has it, and how often.
    owner: Mutex<Option<(ThreadId, usize)>>,
    given_back: Condvar,
}

/// Given back when dropped.
pub(super) struct Sequence<'a>(&'a Sequences);

impl Sequences {
    pub(super) fn take(&self) -> Sequence<'_> {
        let own = thread::current().id();
        let owner = self.owner.lock().unwrap_or_else(PoisonError::into_inner);
        let others = |owner: &mut Option<(ThreadId, usize)>| owner.is_some_and(|(thread, _)| thread != own);
        let mut owner = self.given_back.wait_while(owner, others).unwrap_or_else(PoisonError::into_inner);
        *owner = Some((own, owner.map_or(0, |(_, times)| times) + 1));
        Sequence(self)
    }
}

impl Drop for Sequence<'_> {
    fn drop(&mut self) {
        let mut owner = self.0.owner.lock().unwrap_or_else(PoisonError::into_inner);
        *owner = owner.filter(|&(_, times)| times > 1).map(|(thread, times)| (thread, times - 1));
        if owner.is_none() {
            self.0.given_back.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn one_thread_at_a_time_and_again_within() {
        let (sequences, inside, most) = (Sequences::default(), AtomicU32::new(0), AtomicU32::new(0));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let _turn = sequences.take();
                        most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        drop(sequences.take());
                        thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(most.into_inner(), 1);
        assert_eq!(sequences.owner.into_inner().ok(), Some(None));
    }
}
