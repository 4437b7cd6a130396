//! `candor-tools rate`: people compare two explanations of the same clip without knowing whose they are. [`explanations`]
//! are read and put into [`pairs`], the [`server`] shows them with their [`clips`] and keeps [`votes`], and the
//! [`report`] says which were preferred ([`preference`]) and how far raters agree ([`agreement`]).

pub mod agreement;
pub mod clips;
pub mod explanations;
pub mod pairs;
pub mod preference;
pub mod report;
pub mod server;
pub mod votes;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Mutex;

use anyhow::{anyhow, bail, ensure};
use clap::{Args, Subcommand};

use crate::dataset::Dataset;
use crate::http;
use clips::{Clips, Listed};
use pairs::{Draw, Pairs};
use report::ReportArgs;
use server::{Rating, check_name};
use votes::{Header, VERSION, Votes};

/// Seeds that are drawn stay below this, so that any program that reads the file of votes reads them exactly.
const SEEDS: u64 = 1 << 53;

/// `candor-tools rate`
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct RateArgs {
    #[command(subcommand)]
    command: Option<RateCommand>,
    #[command(flatten)]
    serve: Option<ServeArgs>,
}

/// What else there is to do.
#[derive(Subcommand)]
enum RateCommand {
    /// Say what the votes are: preferences with intervals, and how far raters agree.
    Report(ReportArgs),
}

/// The page.
#[derive(Args)]
pub struct ServeArgs {
    /// Explanations of one model, as `candor-tools eval --records` writes them.
    #[arg(long, required = true)]
    pub a: PathBuf,
    /// Explanations of the same clips by another.
    #[arg(long, required = true)]
    pub b: PathBuf,
    /// The clips: a JSON list or JSONL. Explanations of clips that are not in it are left out.
    #[arg(long, required_unless_present = "faces", conflicts_with = "faces")]
    pub data: Option<PathBuf>,
    /// Where the clips are; by default the list's folder.
    #[arg(long, requires = "data")]
    pub media_root: Option<PathBuf>,
    /// Go on without the entries of the list that cannot be used.
    #[arg(long, requires = "data")]
    pub skip_bad: bool,
    /// Photographs of a faces file instead of a list.
    #[arg(long)]
    pub faces: Option<PathBuf>,
    /// Part of the faces file.
    #[arg(long, default_value = "val")]
    pub part: String,
    /// File that every vote is added to at once; it is begun where it is not there.
    #[arg(long, default_value = "votes.jsonl")]
    pub votes: PathBuf,
    /// The one who votes; by default the page asks, and several people may vote at a time.
    #[arg(long)]
    pub rater: Option<String>,
    /// Take only so many pairs, the same ones for every rater.
    #[arg(long)]
    pub limit: Option<usize>,
    /// Seed of the order and of what stands first. By default it is drawn when the file of votes is begun, and kept in it.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Where to listen; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:8001")]
    pub address: SocketAddr,
    /// Let other machines in, without any access control.
    #[arg(long)]
    pub public: bool,
}

/// Runs `candor-tools rate`.
pub fn run(args: &RateArgs) -> anyhow::Result<()> {
    match (&args.command, &args.serve) {
        (Some(RateCommand::Report(args)), _) => report::run(args),
        (None, Some(args)) => http::serve(args.address, args.public, open(args)?.router()),
        (None, None) => bail!("--a, --b and --data are needed"),
    }
}

/// Reads everything and opens the file of votes.
pub fn open(args: &ServeArgs) -> anyhow::Result<Rating> {
    let rater = match &args.rater {
        Some(name) => {
            let checked = check_name(name).map_err(|reason| anyhow!("--rater {name:?} {reason}"))?;
            Some(checked.to_owned())
        }
        None => None,
    };
    ensure!(args.limit != Some(0), "--limit must be at least 1");
    let listed = match (&args.data, &args.faces) {
        (Some(list), _) => Listed::of_list(Dataset::open(list, args.media_root.as_deref(), args.skip_bad)?),
        (None, Some(faces)) => Listed::of_faces(faces, &args.part)?,
        (None, None) => bail!("give the clips with --data or --faces"),
    };
    let mut pairs = Pairs::new(explanations::read(&args.a)?, explanations::read(&args.b)?, |id| listed.has(id));
    let header = Header {
        version: VERSION,
        a: args.a.display().to_string(),
        b: args.b.display().to_string(),
        seed: args.seed.unwrap_or_else(drawn_seed),
        digest: pairs.digest(),
        pairs: pairs.list.len(),
        identical: pairs.identical,
        silent: pairs.silent,
        unpaired: pairs.unpaired,
        without_clip: pairs.without_clip,
    };
    tell_what_is_left_out(args, &header)?;
    let votes = Votes::open(&args.votes, header, args.seed)?;
    pairs.limit(args.limit.unwrap_or(usize::MAX));
    let draw = Draw { seed: votes.header.seed };
    let clips = Clips::new(listed, &pairs.list, draw)?;
    Ok(Rating { pairs: pairs.list, clips, draw, rater, public: args.public, votes: Mutex::new(votes) })
}

fn tell_what_is_left_out(args: &ServeArgs, header: &Header) -> anyhow::Result<()> {
    let left_out = header.left_out();
    let (a, b) = (args.a.display(), args.b.display());
    ensure!(header.pairs > 0, "{a} and {b} have no pair to compare; left out: {left_out}");
    if !left_out.is_empty() {
        log::warn!("{} pairs to compare; left out: {left_out}", header.pairs);
    }
    Ok(())
}

/// A seed that nobody knows. The standard library draws the keys of its hash tables from the system, and this from them.
fn drawn_seed() -> u64 {
    RandomState::new().build_hasher().finish() % SEEDS
}

#[cfg(test)]
mod tests;
