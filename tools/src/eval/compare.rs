//! `candor-tools eval --compare A B`: the records of two evaluations of the same data side by side, with the differences,
//! their intervals, and paired tests.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::Path;

use anyhow::{Context, ensure};
use candor::message::say;
use candor::verify::Emotion;
use serde::Serialize;

use super::bootstrap::{Interval, interval, resample};
use super::flips::Flips;
use super::paired::{exchange, mcnemar};
use super::record::{self, Record};
use super::tally::{Measure, Row, Tally};

/// Ids that a message gives of many.
const NAMED: usize = 3;

/// Two evaluations of the same data.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The file of the first.
    pub a: String,
    /// The file of the second.
    pub b: String,
    /// Records of each.
    pub n: usize,
    /// Of how many records the two say something else.
    pub flips: Flips,
    /// By [`Measure::key`]; without those that are not defined of both.
    pub measures: BTreeMap<&'static str, Difference>,
    /// Recall of each class.
    pub recall: BTreeMap<&'static str, Pair>,
}

/// A measure of both.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Pair {
    /// Of the first.
    pub a: f64,
    /// 95 % interval.
    pub a_interval: Interval,
    /// Of the second.
    pub b: f64,
    /// 95 % interval.
    pub b_interval: Interval,
    /// The second's less the first's.
    pub difference: f64,
    /// 95 % interval, records drawn in pairs.
    pub interval: Interval,
}

/// A measure of both, tested.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The measure.
    #[serde(flatten)]
    pub pair: Pair,
    /// Whether it is no more than chance.
    #[serde(flatten)]
    pub test: Test,
}

/// A paired test.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "test", rename_all = "lowercase")]
pub enum Test {
    /// McNemar's exact test.
    Mcnemar {
        /// Records of which it is so in the first alone.
        only_a: u64,
        /// Records of which it is so in the second alone.
        only_b: u64,
        /// Two-sided.
        p: f64,
    },
    /// Random exchange.
    Exchange {
        /// Two-sided.
        p: f64,
    },
}

impl Test {
    /// Its two-sided p.
    pub fn p(&self) -> f64 {
        match self {
            Test::Mcnemar { p, .. } | Test::Exchange { p } => *p,
        }
    }
}

/// Reads two files of records, the second in the order of the first.
pub fn read(a: &Path, b: &Path) -> anyhow::Result<[Vec<Record>; 2]> {
    let (first, second) = (record::read(a)?, record::read(b)?);
    let second = in_order(&first, second)
        .with_context(|| format!("{} and {} are not evaluations of the same data", a.display(), b.display()))?;
    Ok([first, second])
}

/// The second's records in the order of the first's.
fn in_order(first: &[Record], second: Vec<Record>) -> anyhow::Result<Vec<Record>> {
    let mut others: HashMap<String, Record> = second.into_iter().map(|record| (record.id.clone(), record)).collect();
    let (mut ordered, mut absent) = (Vec::with_capacity(first.len()), Vec::new());
    for record in first {
        match others.remove(&record.id) {
            Some(other) => {
                ensure!(
                    other.truth == record.truth,
                    "{:?} is {} in the first and {} in the second",
                    record.id,
                    record.truth.name(),
                    other.truth.name()
                );
                ordered.push(other);
            }
            None => absent.push(record.id.as_str()),
        }
    }
    ensure!(absent.is_empty(), "{} are in the first only: {}", absent.len(), some_of(&absent));
    let mut left: Vec<&str> = others.keys().map(String::as_str).collect();
    left.sort_unstable();
    ensure!(left.is_empty(), "{} are in the second only: {}", left.len(), some_of(&left));
    Ok(ordered)
}

fn some_of(ids: &[&str]) -> String {
    let more = if ids.len() > NAMED { ", …" } else { "" };
    format!("{}{more}", ids[..ids.len().min(NAMED)].join(", "))
}

/// Compares records that belong together by their place. `names` are those of the two.
pub fn compare(names: [&str; 2], records: &[Vec<Record>; 2]) -> Comparison {
    let [a, b] = [&records[0], &records[1]].map(|records| records.iter().map(Row::of).collect::<Vec<Row>>());
    let resamples = resample(a.len(), |index, (first, second): &mut (Tally, Tally)| {
        first.add(&a[index]);
        second.add(&b[index]);
    });
    let (whole_a, whole_b) = (Tally::of(&a), Tally::of(&b));
    let pair = |value: &dyn Fn(&Tally) -> Option<f64>| {
        let (a, b) = (value(&whole_a)?, value(&whole_b)?);
        let values: Vec<(f64, f64)> = resamples.iter().filter_map(|(a, b)| Some((value(a)?, value(b)?))).collect();
        let of = |value: &dyn Fn(&(f64, f64)) -> f64| interval(values.iter().map(value).collect());
        Some(Pair {
            a,
            a_interval: of(&|pair| pair.0)?,
            b,
            b_interval: of(&|pair| pair.1)?,
            difference: b - a,
            interval: of(&|pair| pair.1 - pair.0)?,
        })
    };
    let drawn: Vec<Measure> = Measure::ALL.into_iter().filter(|measure| !measure.is_of_each_record()).collect();
    let exchanged: HashMap<&str, Option<f64>> =
        drawn.iter().map(|measure| measure.key()).zip(exchange(&a, &b, &drawn)).collect();
    let test = |measure: Measure| match exchanged.get(measure.key()) {
        Some(p) => Some(Test::Exchange { p: (*p)? }),
        None => {
            let [only_a, only_b] = measure.discordant(&a, &b);
            Some(Test::Mcnemar { only_a, only_b, p: mcnemar(only_a, only_b) })
        }
    };
    let measures = Measure::ALL.into_iter().filter_map(|measure| {
        Some((measure.key(), Difference { pair: pair(&|tally| measure.value(tally))?, test: test(measure)? }))
    });
    let recall = Emotion::all().filter_map(|class| Some((class.name(), pair(&|tally| tally.recall(class))?)));
    Comparison {
        a: names[0].to_owned(),
        b: names[1].to_owned(),
        n: a.len(),
        flips: Flips::between(&records[0], &records[1]),
        measures: measures.collect(),
        recall: recall.collect(),
    }
}

/// Prints a table.
pub(super) fn print(comparison: &Comparison) -> io::Result<()> {
    say(format_args!("A  {}\nB  {}\nentries  {}\n", comparison.a, comparison.b, comparison.n))?;
    let name = "";
    say(format_args!("{name:42} {:>9} {:>9} {:>9}  95 % of B - A        p", "A", "B", "B - A"))?;
    let line = |name: &str, pair: &Pair, p: &str| {
        let [low, high] = pair.interval;
        let (a, b, difference) = (pair.a, pair.b, pair.difference);
        say(format_args!("{name:42} {a:>9.4} {b:>9.4} {difference:>+9.4}  [{low:+.4}, {high:+.4}]  {p}"))
    };
    for measure in Measure::ALL {
        if let Some(found) = comparison.measures.get(measure.key()) {
            let test = match found.test {
                Test::Mcnemar { only_a, only_b, p } => format!("{}  (A alone {only_a}, B alone {only_b})", shown(p)),
                Test::Exchange { p } => shown(p),
            };
            line(measure.title(), &found.pair, &test)?;
        }
    }
    for (emotion, pair) in &comparison.recall {
        line(&format!("  right of those that are {emotion}"), pair, "")?;
    }
    let flips = &comparison.flips;
    for (name, count) in [
        ("fast answers that differ", flips.fast),
        ("answers after the rationale that differ", flips.after),
        ("verdicts that differ", flips.verdict),
        ("rationales that differ", flips.rationale),
    ] {
        say(format_args!("{name:42} {count:>9}    {:.2} %", 100.0 * flips.share(count)))?;
    }
    say("\np: McNemar's exact test where numbers stand behind it, else random exchange").map(drop)
}

/// A p to read.
pub(super) fn shown(p: f64) -> String {
    if p < 1e-4 { format!("{p:.1e}") } else { format!("{p:.4}") }
}
