//! `candor-tools rate report`: what the votes say.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use candor::message::say;
use clap::Args;
use serde::Serialize;

use super::agreement::{ANSWERS, Counts, Scale, Undefined, alpha};
use super::pairs::Side;
use super::preference::{Interval, redrawn, sign_test, wilson};
use super::votes::{self, Choice, Header, Question, Standing, Vote};

/// `candor-tools rate report`
#[derive(Args)]
pub struct ReportArgs {
    /// Files of votes on the same pairs, each of raters of its own.
    #[arg(required = true)]
    pub votes: Vec<PathBuf>,
    /// End with one JSON object instead of a table.
    #[arg(long)]
    pub json: bool,
    /// How often pairs are drawn anew for the intervals.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    pub draws: u32,
    /// Seed of these draws.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// A share with its interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Share {
    /// The share.
    pub share: f64,
    /// 95 % interval over pairs; none for less than two pairs.
    pub interval: Option<Interval>,
}

/// Pairs as their raters see them together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Decided {
    /// Pairs where more votes are for A than for B.
    pub a: usize,
    /// Pairs where as many are for either.
    pub even: usize,
    /// Pairs where more votes are for B.
    pub b: usize,
    /// B's share of the pairs that are not even.
    pub share_b: Option<f64>,
    /// Wilson's 95 % interval of it.
    pub wilson: Option<Interval>,
    /// Two-sided sign test over the pairs that are not even.
    pub sign_test_p: f64,
}

/// Krippendorff's alpha.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Alpha {
    /// The coefficient; none where it is undefined.
    pub alpha: Option<f64>,
    /// 95 % interval over pairs.
    pub interval: Option<Interval>,
}

/// What was answered to one question.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answers {
    /// Votes.
    pub votes: usize,
    /// Pairs with a vote.
    pub pairs: usize,
    /// Votes for A, ties and votes for B.
    pub counts: Counts,
    /// Share of the votes for A; none without votes, as the following.
    pub a: Option<Share>,
    /// Share of ties.
    pub tie: Option<Share>,
    /// Share of the votes for B.
    pub b: Option<Share>,
    /// B's share less A's.
    pub b_less_a: Option<Share>,
    /// By pairs instead of votes.
    pub decided: Decided,
    /// Pairs with votes of two raters or more.
    pub shared_pairs: usize,
    /// Alpha of answers that are the same or not.
    pub alpha_nominal: Alpha,
    /// Alpha with A < tie < B.
    pub alpha_ordinal: Alpha,
    /// Why there is no alpha.
    pub alpha_undefined: Option<Undefined>,
}

/// What one rater did.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RaterSummary {
    /// Votes on whether an explanation fits.
    pub fits: usize,
    /// Votes on coherence.
    pub coherent: usize,
    /// Share of ties.
    pub ties: f64,
    /// Share of the other votes that went to what was shown first; about a half where place does not matter.
    pub first: Option<f64>,
}

/// The whole report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The first file of explanations.
    pub a: String,
    /// The second.
    pub b: String,
    /// Pairs that could be shown.
    pub pairs: usize,
    /// Pairs left out because both say the same.
    pub identical: usize,
    /// Pairs left out because one has no rationale or both have none.
    pub silent: usize,
    /// Ids that stand in one file alone.
    pub unpaired: usize,
    /// Pairs left out because there is no such clip.
    pub without_clip: usize,
    /// The same in words, for the table.
    #[serde(skip)]
    left_out: String,
    /// Raters by name.
    pub raters: BTreeMap<String, RaterSummary>,
    /// Which fits the face better.
    pub fits: Answers,
    /// Which is more coherent.
    pub coherent: Answers,
    /// Draws of the intervals.
    pub draws: u32,
    /// Their seed.
    pub seed: u64,
}

/// Runs `candor-tools rate report`.
pub fn run(args: &ReportArgs) -> anyhow::Result<()> {
    let (header, votes) = gather(&args.votes)?;
    let report = report(&header, &votes, args.draws, args.seed);
    if args.json {
        say(serde_json::to_string(&report)?)?;
        return Ok(());
    }
    for line in lines(&report) {
        say(line)?;
    }
    Ok(())
}

/// The votes of all files, which must be on the same pairs.
fn gather(paths: &[PathBuf]) -> anyhow::Result<(Header, Vec<Vote>)> {
    let mut first: Option<Header> = None;
    let mut all = Vec::new();
    let mut file_of: HashMap<String, usize> = HashMap::new();
    for (number, path) in paths.iter().enumerate() {
        let kept = votes::read(path)?;
        if let Some(torn) = kept.torn {
            log::warn!("{}: the last line was cut short and is no vote; it reads {torn}", path.display());
        }
        let header = kept.header.with_context(|| format!("{} is empty", path.display()))?;
        if let Some(first) = &first
            && first.digest != header.digest
        {
            bail!("{} holds votes on other pairs than {}", path.display(), paths[0].display());
        }
        first.get_or_insert(header);
        for rater in raters(&kept.standing) {
            if let Some(other) = file_of.insert(rater.clone(), number) {
                let other = paths[other].display();
                bail!("rater {rater:?} is in {other} and in {}; two people need two names", path.display());
            }
        }
        all.extend(kept.standing.all().cloned());
    }
    let header = first.context("no file of votes was given")?;
    ensure!(!all.is_empty(), "there is no vote yet");
    Ok((header, all))
}

fn raters(standing: &Standing) -> BTreeSet<String> {
    standing.all().map(|vote| vote.rater.clone()).collect()
}

fn report(header: &Header, votes: &[Vote], draws: u32, seed: u64) -> Report {
    let mut raters: BTreeMap<String, RaterSummary> = BTreeMap::new();
    for name in votes.iter().map(|vote| &vote.rater) {
        if !raters.contains_key(name) {
            raters.insert(name.clone(), summary(votes.iter().filter(|vote| vote.rater == *name)));
        }
    }
    Report {
        a: header.a.clone(),
        b: header.b.clone(),
        pairs: header.pairs,
        identical: header.identical,
        silent: header.silent,
        unpaired: header.unpaired,
        without_clip: header.without_clip,
        left_out: header.left_out(),
        raters,
        fits: answers(votes, Question::Fits, draws, seed),
        coherent: answers(votes, Question::Coherent, draws, seed),
        draws,
        seed,
    }
}

fn summary<'v>(votes: impl Iterator<Item = &'v Vote>) -> RaterSummary {
    let mut summary = RaterSummary::default();
    let (mut ties, mut first, mut second) = (0_usize, 0_usize, 0_usize);
    for vote in votes {
        match vote.question {
            Question::Fits => summary.fits += 1,
            Question::Coherent => summary.coherent += 1,
        }
        match (vote.choice, vote.first) {
            (Some(Choice::Tie) | None, _) => ties += 1,
            (Some(Choice::A), Side::A) | (Some(Choice::B), Side::B) => first += 1,
            _ => second += 1,
        }
    }
    summary.ties = ties as f64 / (ties + first + second).max(1) as f64;
    summary.first = (first + second > 0).then(|| first as f64 / (first + second) as f64);
    summary
}

fn answers(votes: &[Vote], question: Question, draws: u32, seed: u64) -> Answers {
    // In the order of the keys, so that the same votes give the same intervals.
    let mut by_pair: BTreeMap<&str, Counts> = BTreeMap::new();
    for vote in votes.iter().filter(|vote| vote.question == question) {
        if let Some(choice) = vote.choice {
            by_pair.entry(&vote.pair).or_default()[choice as usize] += 1;
        }
    }
    let pairs: Vec<Counts> = by_pair.into_values().collect();
    let sum = |pairs: &[Counts]| {
        pairs.iter().fold([0; ANSWERS], |sum, pair| std::array::from_fn(|answer| sum[answer] + pair[answer]))
    };
    let interval = |statistic: &dyn Fn(&[Counts]) -> Option<f64>| redrawn(&pairs, draws as usize, seed, statistic);
    let share = |of: &dyn Fn(&Counts) -> f64| {
        let statistic = |pairs: &[Counts]| {
            let counts = sum(pairs);
            let all: u32 = counts.iter().sum();
            (all > 0).then(|| of(&counts) / f64::from(all))
        };
        Some(Share { share: statistic(&pairs)?, interval: interval(&statistic) })
    };
    let agreement = |scale: Scale| {
        let alpha = |pairs: &[Counts]| alpha(pairs, scale).ok();
        let value = alpha(&pairs);
        Alpha { alpha: value, interval: value.and_then(|_| interval(&alpha)) }
    };
    let counts = sum(&pairs);
    Answers {
        votes: counts.iter().sum::<u32>() as usize,
        pairs: pairs.len(),
        counts,
        a: share(&|counts| f64::from(counts[Choice::A as usize])),
        tie: share(&|counts| f64::from(counts[Choice::Tie as usize])),
        b: share(&|counts| f64::from(counts[Choice::B as usize])),
        b_less_a: share(&|counts| f64::from(counts[Choice::B as usize]) - f64::from(counts[Choice::A as usize])),
        decided: decided(&pairs),
        shared_pairs: pairs.iter().filter(|pair| pair.iter().sum::<u32>() > 1).count(),
        alpha_nominal: agreement(Scale::Nominal),
        alpha_ordinal: agreement(Scale::Ordinal),
        alpha_undefined: alpha(&pairs, Scale::Nominal).err(),
    }
}

fn decided(pairs: &[Counts]) -> Decided {
    let count = |order: std::cmp::Ordering| {
        pairs.iter().filter(|pair| pair[Choice::A as usize].cmp(&pair[Choice::B as usize]) == order).count()
    };
    let (a, even, b) =
        (count(std::cmp::Ordering::Greater), count(std::cmp::Ordering::Equal), count(std::cmp::Ordering::Less));
    let share_b = (a + b > 0).then(|| b as f64 / (a + b) as f64);
    Decided { a, even, b, share_b, wilson: wilson(b, a + b), sign_test_p: sign_test(a, b) }
}

fn lines(report: &Report) -> Vec<String> {
    let mut lines = vec![format!("A  {}", report.a), format!("B  {}", report.b)];
    let left_out = match report.left_out.as_str() {
        "" => String::new(),
        left_out => format!("; left out: {left_out}"),
    };
    lines.push(format!("{} pairs{left_out}", report.pairs));
    for (name, rater) in &report.raters {
        let first = rater.first.map_or("none".to_owned(), percent);
        lines.push(format!(
            "rater {name}: {} votes on fit, {} on coherence; {} ties; of the others {first} for what stood first",
            rater.fits,
            rater.coherent,
            percent(rater.ties)
        ));
    }
    for (title, answers) in [("fits the face better", &report.fits), ("is more coherent", &report.coherent)] {
        lines.push(String::new());
        lines.push(format!("Which {title}: {} votes on {} pairs", answers.votes, answers.pairs));
        for (name, share) in [("A", answers.a), ("tie", answers.tie), ("B", answers.b), ("B less A", answers.b_less_a)]
        {
            if let Some(share) = share {
                lines.push(format!("  {name:10} {}{}", percent(share.share), interval(share.interval, percent)));
            }
        }
        let decided = &answers.decided;
        let share = decided.share_b.map_or(String::new(), |share| {
            format!("; B in {}{} of those decided", percent(share), interval(decided.wilson, percent))
        });
        lines.push(format!("  by pairs   A {}, even {}, B {}{share}", decided.a, decided.even, decided.b));
        lines.push(format!("  sign test  p = {}", p_value(decided.sign_test_p)));
        lines.push(match answers.alpha_undefined {
            Some(why) => format!("  agreement  Krippendorff's alpha is undefined: {why}"),
            None => format!(
                "  agreement  Krippendorff's alpha {} nominal, {} ordinal (A < tie < B), over {} pairs",
                coefficient(&answers.alpha_nominal),
                coefficient(&answers.alpha_ordinal),
                answers.shared_pairs
            ),
        });
    }
    lines.push(String::new());
    lines.push(format!(
        "In brackets: 95 % intervals, over pairs drawn anew {} times (seed {}); of those decided, Wilson's.",
        report.draws, report.seed
    ));
    lines
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn coefficient(alpha: &Alpha) -> String {
    let number = |value: f64| format!("{value:.3}");
    alpha.alpha.map_or("undefined".to_owned(), |value| format!("{value:.3}{}", interval(alpha.interval, number)))
}

fn interval(interval: Option<Interval>, number: impl Fn(f64) -> String) -> String {
    interval.map_or(String::new(), |[low, high]| format!(" ({} to {})", number(low), number(high)))
}

fn p_value(p: f64) -> String {
    if p < 1e-4 { format!("{p:.1e}") } else { format!("{p:.4}") }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Write as _;

    use super::super::votes::tests::{header, vote};
    use super::*;

    const A: Option<Choice> = Some(Choice::A);
    const TIE: Option<Choice> = Some(Choice::Tie);
    const B: Option<Choice> = Some(Choice::B);

    #[test]
    fn counted_by_hand() {
        let of = |rater: &str, choices: [Option<Choice>; 4]| {
            let pair = |(place, choice): (usize, _)| vote(rater, &place.to_string(), Question::Fits, choice);
            choices.into_iter().enumerate().map(pair).collect::<Vec<_>>()
        };
        let mut votes = of("anna", [A, B, B, TIE]);
        votes.extend(of("ben", [B, B, TIE, TIE]));
        votes.push(vote("ben", "3", Question::Coherent, B));
        let report = report(&header(), &votes, 200, 1);
        let fits = &report.fits;
        assert_eq!((fits.votes, fits.pairs, fits.counts, fits.shared_pairs), (8, 4, [1, 3, 4], 4));
        let shares = [fits.a, fits.tie, fits.b, fits.b_less_a].map(|share| share.unwrap().share);
        assert_eq!(shares, [0.125, 0.375, 0.5, 0.375]);
        let [low, high] = fits.b.unwrap().interval.unwrap();
        assert!((0.0..0.5).contains(&low) && high > 0.5 && high <= 1.0, "{low} {high}");
        // Pair 0: one each; pairs 1 and 2: B; pair 3: two ties.
        assert_eq!((fits.decided.a, fits.decided.even, fits.decided.b), (0, 2, 2));
        assert_eq!((fits.decided.share_b, fits.decided.sign_test_p), (Some(1.0), 0.5));
        // Coincidences: A-B 1, B-B 2, B-tie 1, tie-tie 2, and mirrored: n = 8, of them 1 A, 3 tie, 4 B.
        // Observed 2/8·2, expected 2·(3 + 4 + 12)/(8·7); alpha = 1 - 7·2/19.
        assert!((fits.alpha_nominal.alpha.unwrap() - (1.0 - 14.0 / 19.0)).abs() < 1e-12);
        assert_eq!(fits.alpha_undefined, None);

        // One rater and one pair: no agreement, no interval.
        let coherent = &report.coherent;
        assert_eq!((coherent.alpha_nominal.alpha, coherent.b.unwrap().interval), (None, None));
        assert_eq!(coherent.alpha_undefined, Some(Undefined::NoPairWithTwoVotes));
        // All were shown B first.
        let anna = &report.raters["anna"];
        assert_eq!((anna.fits, anna.coherent, anna.ties), (4, 0, 0.25));
        assert!((anna.first.unwrap() - 2.0 / 3.0).abs() < 1e-12);

        let text = lines(&report).join("\n");
        for part in [
            "A  plain.jsonl",
            "4 pairs; left out: 1 the same in both files",
            "rater anna: 4 votes on fit, 0 on coherence; 25.0 % ties; of the others 66.7 % for what stood first",
            "Which fits the face better: 8 votes on 4 pairs\n  A          12.5 % (",
            "  by pairs   A 0, even 2, B 2; B in 100.0 % (34.2 % to 100.0 %) of those decided",
            "  sign test  p = 0.5000\n  agreement  Krippendorff's alpha 0.263",
            "alpha is undefined: no pair has votes of two raters",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }

    #[test]
    fn files_of_several_machines_are_counted_together() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, header: Header, votes: &[Vote]| {
            let path = folder.path().join(name);
            let mut file = std::fs::File::create(&path).unwrap();
            writeln!(file, "{}", serde_json::to_string(&header).unwrap()).unwrap();
            votes.iter().for_each(|vote| writeln!(file, "{}", serde_json::to_string(vote).unwrap()).unwrap());
            path
        };
        let anna = write("1", header(), &[vote("anna", "1", Question::Fits, A)]);
        let ben = write("2", Header { seed: 77, ..header() }, &[vote("ben", "1", Question::Fits, B)]);
        let (_, votes) = gather(&[anna.clone(), ben]).unwrap();
        assert_eq!(votes.len(), 2);
        let again = write("3", header(), &[vote("anna", "2", Question::Fits, A)]);
        let error = gather(&[anna.clone(), again]).unwrap_err().to_string();
        assert!(error.contains("rater \"anna\" is in"), "{error}");
        let other = write("4", Header { digest: "other".into(), ..header() }, &[]);
        let error = gather(&[anna, other]).unwrap_err().to_string();
        assert!(error.contains("on other pairs"), "{error}");
        let none = write("5", header(), &[]);
        assert!(gather(&[none]).unwrap_err().to_string().contains("no vote yet"));
    }
}
