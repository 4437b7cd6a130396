//! `candor-tools data faces`: from labelled faces with measured cues to what the decoder, the verifier and the
//! tokenizer are trained on. The clean and the noisy share are kept apart in two files.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::faces::Faces;
use super::hasty;
use super::rationale::{self, Bank, Claim, Emotion};
use super::tokenizer;

/// The question the default model is asked. Short, since every training sequence carries it.
pub const INSTRUCTION: &str = "Which emotion does the face show, and why?";

/// Share of the noisy part whose rationale names a wrong emotion, see [`hasty`].
const WRONG_SHARE: f64 = 1.0 / 3.0;

/// Part of the faces file that models are measured on.
const VALIDATION: &str = "val";

/// How often each sentence that is said as it stands is among the verifier's.
const FIXED_TIMES: usize = 8;

/// Sentences an emotion for testing the verifier.
const HELD_OUT_EACH: usize = 145;

/// `candor-tools data faces`
#[derive(Args)]
pub struct FacesArgs {
    /// The faces: safetensors with PART.images, PART.labels, PART.cues, PART.cues_valid.
    #[arg(long)]
    pub faces: PathBuf,
    /// Folder to write to; made if it is not there.
    #[arg(long)]
    pub out: PathBuf,
    /// Seed of everything random.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Part of the file to take.
    #[arg(long, default_value = "train")]
    pub part: String,
    /// Rationales a photograph, each worded anew.
    #[arg(long, default_value_t = 3)]
    pub variants: usize,
    /// Entries of the tokenizer.
    #[arg(long, default_value_t = 1024)]
    pub vocabulary: usize,
    /// Sentences an emotion for training the verifier.
    #[arg(long, default_value_t = 1400)]
    pub sentences: usize,
}

/// One line of `clean.jsonl` and `noisy.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Row of the photograph in its part.
    pub still: usize,
    /// The right answer, as the data set spells it.
    pub label: String,
    /// The label whose emotion the rationale names: in the noisy part it is sometimes another one.
    pub named: String,
    /// The text between `<think>` and `</think>`.
    pub rationale: String,
    /// Seed of the jitter, zoom and light with which the still becomes a clip.
    pub jitter_seed: u64,
}

/// `data.json`: what the other files were made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// SHA-256 of the faces file.
    pub faces_sha256: String,
    /// Part of it.
    pub part: String,
    /// Photographs in the part.
    pub stills: usize,
    /// Rationales a photograph.
    pub variants: usize,
    /// Seed.
    pub seed: u64,
    /// The labels, in the order of the data set.
    pub labels: Vec<String>,
    /// The question asked.
    pub instruction: String,
}

/// Runs `candor-tools data faces`.
pub fn run(args: &FacesArgs) -> anyhow::Result<()> {
    ensure!(args.variants > 0, "--variants must be at least 1");
    ensure!((262..=65_536).contains(&args.vocabulary), "--vocabulary must be within 262 ..= 65536");
    let faces = Faces::open(&args.faces, &args.part)?;
    let emotions = emotions_of(&faces.classes)?;
    fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;

    let clean = samples(&faces, &emotions, args, false);
    let noisy = samples(&faces, &emotions, args, true);
    write_lines(&args.out.join("clean.jsonl"), clean.iter().map(serde_json::to_string))?;
    write_lines(&args.out.join("noisy.jsonl"), noisy.iter().map(serde_json::to_string))?;

    for (set, name, each) in [
        (Sentences::Train, "train", args.sentences),
        (Sentences::HeldOut, "heldout", HELD_OUT_EACH),
        (Sentences::HeldOutWords, "heldout-words", HELD_OUT_EACH),
    ] {
        let path = args.out.join(format!("sentences-{name}.tsv"));
        let rows = sentences(set, each, args.seed);
        let lines = rows.iter().enumerate().map(|(i, (text, id))| Ok(format!("{text}\t{id}\t{name}-{i:05}")));
        write_lines(&path, lines)?;
    }

    let prompts = |part: &str, faces: &Faces| {
        let name = args.faces.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let lines = faces.labels.iter().enumerate().map(|(row, &label)| {
            serde_json::to_string(
                &json!({"video": format!("{name}#{part}/{row}"), "solution": faces.classes[usize::from(label)]}),
            )
        });
        write_lines(&args.out.join(format!("prompts-{part}.jsonl")), lines.collect::<Vec<_>>())
    };
    prompts(&args.part, &faces)?;
    // Those to measure with, where the file has them.
    if args.part != VALIDATION
        && let Ok(validation) = Faces::open(&args.faces, VALIDATION)
    {
        prompts(VALIDATION, &validation)?;
    }

    let answers = faces.classes.iter().map(|label| completion("", label));
    let texts: Vec<String> = clean
        .iter()
        .map(|s| format!("user\n<vi_start><vi_end>\n{INSTRUCTION}\nassistant\n{}", completion(&s.rationale, &s.label)))
        .chain(answers)
        .collect();
    let tokenizer = tokenizer::train(texts.iter().map(String::as_str), args.vocabulary)?;
    let json = tokenizer.to_string(true).map_err(|e| anyhow::anyhow!("writing the tokenizer: {e}"))?;
    write_lines(&args.out.join("tokenizer.json"), [Ok(json)])?;
    write_lines(&args.out.join("chat_template.jinja"), [Ok(tokenizer::CHAT_TEMPLATE.to_string())])?;
    let description = Description {
        faces_sha256: crate::files::sha256(&args.faces)?,
        part: args.part.clone(),
        stills: faces.len(),
        variants: args.variants,
        seed: args.seed,
        labels: faces.classes.clone(),
        instruction: INSTRUCTION.into(),
    };
    write_lines(&args.out.join("data.json"), [serde_json::to_string_pretty(&description)])
}

/// The whole assistant turn for a rationale and an answer.
pub fn completion(rationale: &str, label: &str) -> String {
    format!("<think>{rationale}</think>\n<answer>{label}</answer>")
}

fn emotions_of(classes: &[String]) -> anyhow::Result<Vec<Emotion>> {
    classes
        .iter()
        .map(|class| match Emotion::from_label(class) {
            Some(emotion) => Ok(emotion),
            None => bail!("class {class:?} is none of the emotions that rationales can name"),
        })
        .collect()
}

fn samples(faces: &Faces, emotions: &[Emotion], args: &FacesArgs, noisy: bool) -> Vec<Sample> {
    let name = if noisy { "noisy" } else { "clean" };
    let bar = progress(faces.len() as u64, &format!("{name} rationales"));
    let mut samples = Vec::with_capacity(faces.len() * args.variants);
    let hasty = match noisy {
        true => hasty::readings(&faces.labels, faces.classes.len(), &faces.cues, WRONG_SHARE),
        false => vec![None; faces.len()],
    };
    for (still, hasty) in hasty.into_iter().enumerate() {
        let named = hasty.unwrap_or(usize::from(faces.labels[still]));
        for variant in 0..args.variants {
            // A stream of its own for every rationale: the order and number of others do not change it.
            let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
            rng.set_stream(((still * args.variants + variant) * 2 + usize::from(noisy)) as u64);
            samples.push(Sample {
                still,
                label: faces.label(still).to_string(),
                named: faces.classes[named].clone(),
                rationale: rationale::rationale(&mut rng, Bank::Train, faces.cues[still].as_ref(), emotions[named]),
                // Within 2^53, so that every JSON reader keeps it whole.
                jitter_seed: rng.random::<u64>() >> 11,
            });
        }
        bar.inc(1);
    }
    bar.finish();
    samples
}

/// What sentences for the verifier are for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sentences {
    /// To learn.
    Train,
    /// To test: no wording is learnt, the emotion words are.
    HeldOut,
    /// To test: neither wording nor emotion word is learnt.
    HeldOutWords,
}

/// Sentences with the GoEmotions id a verifier must read in them: `each` an emotion (fewer where a bank has not so
/// many), neutral ones included, and, but for those of new words, as many that only state cues. Those to learn have half
/// as many about a scene besides. Cues and scenes are neutral. They differ, but for the few that are always said in the
/// same words: those are to be known for certain.
fn sentences(set: Sentences, each: usize, seed: u64) -> Vec<(String, u32)> {
    let bank = if set == Sentences::Train { Bank::Train } else { Bank::HeldOut };
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(u64::MAX - set as u64);
    let mut seen = HashSet::new();
    let mut rows = Vec::new();
    let mut fill = |wanted: usize, make: &mut dyn FnMut() -> (String, u32)| {
        let mut found = 0;
        // A bank is finite: after so many draws nothing new is left to find.
        for _ in 0..wanted * 40 {
            if found == wanted {
                break;
            }
            let (text, id) = make();
            if seen.insert(text.clone()) {
                rows.push((text, id));
                found += 1;
            }
        }
    };
    for emotion in Emotion::ALL {
        fill(each, &mut || {
            let text = match set {
                Sentences::Train => rationale::reading_sentence(&mut rng, emotion),
                Sentences::HeldOut => rationale::reworded_sentence(&mut rng, emotion),
                Sentences::HeldOutWords => rationale::emotion_sentence(&mut rng, bank, emotion),
            };
            (text, emotion.goemotions_id())
        });
    }
    let neutral = Emotion::Neutral.goemotions_id();
    fill(if set == Sentences::HeldOutWords { 0 } else { each }, &mut || {
        let count = rng.random_range(0..=20).min(2);
        let mut claims: Vec<(Claim, f32)> = Vec::new();
        while claims.len() < count {
            let claim = rationale::any_claim(&mut rng);
            if claims.iter().all(|other| other.0.0 != claim.0.0) {
                claims.push(claim);
            }
        }
        let text = match (count, rng.random_bool(0.5)) {
            (0, true) => rationale::unmeasured_sentence(&mut rng, bank),
            _ => rationale::cue_sentence(&mut rng, bank, &claims),
        };
        (text, neutral)
    });
    if set == Sentences::Train {
        fill(each / 2, &mut || (rationale::scene_sentence(&mut rng), neutral));
        for (text, emotion) in rationale::fixed_sentences() {
            rows.extend(std::iter::repeat_n((text.to_owned(), emotion.goemotions_id()), FIXED_TIMES));
        }
    }
    rows.shuffle(&mut rng);
    rows
}

fn progress(len: u64, what: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:24} {bar:32} {pos}/{len} {eta}");
    ProgressBar::new(len)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_message(what.to_string())
}

/// Writes lines beside the file and renames: a file that is there is whole.
fn write_lines(path: &Path, lines: impl IntoIterator<Item = serde_json::Result<String>>) -> anyhow::Result<()> {
    let part = path.with_extension("part");
    let failed = || format!("cannot write {}", part.display());
    let mut out = BufWriter::new(File::create(&part).with_context(failed)?);
    for line in lines {
        writeln!(out, "{}", line?).with_context(failed)?;
    }
    out.into_inner().map_err(|e| e.into_error()).and_then(|f| f.sync_all()).with_context(failed)?;
    fs::rename(&part, path).with_context(|| format!("cannot rename {} to {}", part.display(), path.display()))
}
