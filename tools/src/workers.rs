//! Spreads independent pieces of work over threads that each hold a model of their own; weights are mapped files, so
//! that costs little memory.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};

/// Does pieces `0..count` and returns their results in order. Each thread calls `open` once and `work` for every piece
/// it takes. The first error ends all. Progress goes to the error stream.
pub fn run<S, T: Send>(
    count: usize,
    threads: usize,
    what: &str,
    open: impl Fn() -> anyhow::Result<S> + Sync,
    work: impl Fn(&mut S, usize) -> anyhow::Result<T> + Sync,
) -> anyhow::Result<Vec<T>> {
    let bar = ProgressBar::new(count as u64);
    bar.set_style(ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} {per_sec} left {eta}")?);
    bar.set_message(what.to_owned());
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let results: Mutex<Vec<(usize, T)>> = Mutex::new(Vec::with_capacity(count));
    let thread = || -> anyhow::Result<()> {
        let mut state = open()?;
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count || stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            let result = work(&mut state, index)?;
            results.lock().map_err(|_| anyhow::anyhow!("a worker failed"))?.push((index, result));
            bar.inc(1);
            // Without a terminal there is no bar.
            if bar.is_hidden() && bar.position().is_multiple_of((count as u64).div_ceil(20)) {
                eprintln!("{what}: {} of {count}", bar.position());
            }
        }
    };
    let outcomes: Vec<anyhow::Result<()>> = std::thread::scope(|scope| {
        let guarded = || thread().inspect_err(|_| stop.store(true, Ordering::Relaxed));
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(guarded)).collect();
        handles
            .into_iter()
            .map(|handle| handle.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a worker panicked"))))
            .collect()
    });
    bar.finish_and_clear();
    outcomes.into_iter().collect::<anyhow::Result<Vec<()>>>()?;
    let mut results = results.into_inner().ok().context("a worker failed")?;
    results.sort_by_key(|(index, _)| *index);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn results_come_in_order_and_errors_end_all() {
        let squares = run(100, 3, "", || Ok(2), |power, i| Ok(i.pow(*power))).unwrap();
        assert_eq!(squares, (0..100).map(|i| i * i).collect::<Vec<_>>());
        let failing = |(): &mut (), i: usize| if i == 5 { anyhow::bail!("five") } else { Ok(i) };
        assert_eq!(run(100, 3, "", || Ok(()), failing).unwrap_err().to_string(), "five");
        assert_eq!(run(3, 2, "", || anyhow::bail!("shut"), failing).unwrap_err().to_string(), "shut");
        assert_eq!(run(0, 2, "", || Ok(()), failing).unwrap(), Vec::<usize>::new());
    }
}
