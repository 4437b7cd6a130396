//! `candor-tools train sft`: trains the projector, the gate and the decoder on rationales and answers, behind a vision
//! tower that stays as it is. First the tower's features are computed and kept; then each step splits its batch over
//! threads that do not meet before the update. At the end the whole model is written in the published layout.

use super::checkpoint;
use super::curves::RunLog;
use super::decoder::DecoderSize;
use super::export::{self, Export};
use super::faces::{CUES, Faces};
use super::features::{Features, FrozenTower, Standard};
use super::gate_text::InstructionEncoder;
use super::optimiser::AdamW;
use super::products::TrainDevice;
use super::schedule::{Decay, Schedule};
use super::student::{LossWeights, Losses, Prompt, Share, Student, StudentBuffers, StudentSize, Tokens};
use super::tower::{Order, stop_on_interrupt};
use super::tuning::course::RunLock;
use crate::data::cold_start::{Description, Sample};
use crate::files;
use anyhow::{Context, anyhow, bail, ensure};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde_json::json;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokenizers::Tokenizer;

/// Samples a worker takes at a time.
const MICRO_BATCH: usize = 8;
/// Steps over which the rate rises.
const WARM_UP: u64 = 100;
/// Largest norm of a step's gradient.
const CLIP: f32 = 1.0;
/// Steps between two validations.
const VALIDATE_EVERY: u64 = 200;
/// Time between two checkpoints.
const SAVE_EVERY: Duration = Duration::from_secs(120);

/// Which share of the rationales to train on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// Every rationale names the right emotion.
    Clean,
    /// A third of them name a wrong one: the starting point of reward fine-tuning.
    Noisy,
}

/// Arguments of `candor-tools train sft`.
#[derive(clap::Args, Debug)]
pub struct SftArgs {
    /// Faces, laid out as faces48.safetensors (parts `train` and `val`).
    #[arg(long)]
    pub faces: PathBuf,
    /// Folder that `candor-tools data faces` wrote.
    #[arg(long)]
    pub data: PathBuf,
    /// Folder of the tuned tower, config.json and model.safetensors in SiglipVisionModel's layout; or that of a model,
    /// to train behind the tower that it has.
    #[arg(long)]
    pub tower: PathBuf,
    /// Folder of the run; the model ends up in its `model`. A run cut off goes on from its last checkpoint.
    #[arg(long)]
    pub out: PathBuf,
    /// Folder for the tower's features, which other runs can share; the run's own by default.
    #[arg(long)]
    pub features: Option<PathBuf>,
    /// Share of the rationales.
    #[arg(long, value_enum, default_value_t = Part::Clean)]
    pub part: Part,
    /// Views of each photograph: as it is, then changed at random.
    #[arg(long, default_value_t = 1)]
    pub views: usize,
    /// Layers of the tower to use; all by default.
    #[arg(long)]
    pub tower_layers: Option<usize>,
    /// Photographs to train on, from the first; all by default.
    #[arg(long)]
    pub limit: Option<usize>,
    /// Frames of a clip.
    #[arg(long, default_value_t = 4)]
    pub frames: usize,
    /// Width of the decoder.
    #[arg(long, default_value_t = 192)]
    pub width: usize,
    /// Layers of the decoder.
    #[arg(long, default_value_t = 4)]
    pub layers: usize,
    /// Query heads of the decoder.
    #[arg(long, default_value_t = 3)]
    pub heads: usize,
    /// Key and value heads of the decoder.
    #[arg(long, default_value_t = 1)]
    pub key_heads: usize,
    /// Width of a head.
    #[arg(long, default_value_t = 64)]
    pub head_dim: usize,
    /// Width of the decoder's feed-forward branch.
    #[arg(long, default_value_t = 512)]
    pub hidden: usize,
    /// Passes over the photographs.
    #[arg(long, default_value_t = 2.0)]
    pub passes: f64,
    /// Samples a step.
    #[arg(long, default_value_t = 32)]
    pub batch: usize,
    /// Learning rate at its peak.
    #[arg(long, default_value_t = 1e-3)]
    pub rate: f32,
    /// Weight decay.
    #[arg(long, default_value_t = 0.05)]
    pub weight_decay: f32,
    /// Weight of a label's token beside one of the rationale.
    #[arg(long, default_value_t = 4.0)]
    pub label_weight: f32,
    /// Weight of a token that says nothing could be made out, said of photographs without measured cues: less than 1
    /// lets the model say it only where it sees little.
    #[arg(long, default_value_t = 0.2)]
    pub unmeasured_weight: f32,
    /// Weight of the fast answer's loss.
    #[arg(long, default_value_t = 0.5)]
    pub fast_weight: f32,
    /// Weight of the loss of a head on the mean video token, which only helps training.
    #[arg(long, default_value_t = 0.5)]
    pub helper_weight: f32,
    /// Noise on the features, as a share of their spread.
    #[arg(long, default_value_t = 0.1)]
    pub noise: f32,
    /// Seed of orders, noise and starting values.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Threads, each with its share of every batch. The result depends on it in the last digits.
    #[arg(long, default_value_t = 2)]
    pub threads: usize,
    /// Where the large products are computed.
    #[command(flatten)]
    pub device: TrainDevice,
    /// Photographs of the validation part that are measured during training.
    #[arg(long, default_value_t = 512)]
    pub validate: usize,
    /// Stop after this many steps, as if cut off (for tests and timings).
    #[arg(long)]
    pub stop_after: Option<u64>,
    /// Name in the model's manifest.
    #[arg(long, default_value = "candor-default")]
    pub name: String,
}

impl SftArgs {
    fn check(&self) -> anyhow::Result<()> {
        let within = |name: &str, value: usize, least: usize, most: usize| {
            ensure!((least..=most).contains(&value), "--{name} must lie between {least} and {most}, not {value}");
            Ok(())
        };
        within("views", self.views, 1, 16)?;
        within("frames", self.frames, 1, 64)?;
        within("width", self.width, 1, 4096)?;
        within("layers", self.layers, 1, 64)?;
        within("heads", self.heads, 1, 64)?;
        within("key-heads", self.key_heads, 1, self.heads)?;
        within("head-dim", self.head_dim, 2, 256)?;
        within("hidden", self.hidden, 1, 16_384)?;
        within("batch", self.batch, 1, 4096)?;
        within("threads", self.threads, 1, self.batch)?;
        ensure!(self.passes > 0.0 && self.passes < 1000.0, "--passes must be above 0");
        ensure!(
            self.label_weight > 0.0 && self.label_weight != 1.0,
            "--label-weight must be above 0 and different from 1, the weight of other tokens"
        );
        ensure!(
            self.unmeasured_weight >= 0.0 && self.unmeasured_weight != self.label_weight,
            "--unmeasured-weight must be 0 or above and different from --label-weight"
        );
        Ok(())
    }
}

/// The rationales of a data folder, by photograph.
struct Rationales {
    description: Description,
    /// `[stills, variants]`.
    samples: Vec<Sample>,
    tokens: Vec<Tokens>,
}

impl Rationales {
    fn open(args: &SftArgs) -> anyhow::Result<(Self, Prompt)> {
        let path = args.data.join("data.json");
        let text = std::fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
        let description: Description = serde_json::from_str(&text).with_context(|| format!("{}", path.display()))?;
        let digest = files::sha256(&args.faces)?;
        ensure!(
            description.faces_sha256 == digest,
            "{} was made from other faces than {}; run `candor-tools data faces` again",
            args.data.display(),
            args.faces.display()
        );
        let path = args.data.join("tokenizer.json");
        let tokenizer = Tokenizer::from_file(&path).map_err(|e| anyhow!("{}: {e}", path.display()))?;
        let prompt = Prompt::new(tokenizer, &description.instruction, args.label_weight, args.unmeasured_weight)?;
        let path = args.data.join(match args.part {
            Part::Clean => "clean.jsonl",
            Part::Noisy => "noisy.jsonl",
        });
        let file = File::open(&path).with_context(|| format!("{}", path.display()))?;
        let mut samples: Vec<Sample> = Vec::new();
        for (number, line) in BufReader::new(file).lines().enumerate() {
            let place = || format!("{}, line {}", path.display(), number + 1);
            let sample: Sample = serde_json::from_str(&line.with_context(place)?).with_context(place)?;
            let expected = number / description.variants.max(1);
            ensure!(sample.still == expected, "{}: photograph {} where {expected} belongs", place(), sample.still);
            samples.push(sample);
        }
        let expected = description.stills * description.variants;
        ensure!(
            expected > 0 && samples.len() == expected,
            "{} has {} lines, data.json says {expected}; run `candor-tools data faces` again",
            path.display(),
            samples.len()
        );
        let tokens: anyhow::Result<Vec<Tokens>> =
            samples.par_iter().map(|sample| prompt.tokens(&sample.rationale, &sample.label)).collect();
        Ok((Self { description, samples, tokens: tokens? }, prompt))
    }

    fn of(&self, still: usize, variant: usize) -> usize {
        still * self.description.variants + variant % self.description.variants
    }
}

/// One sample of a batch: where its tokens are, and which views its frames show.
struct Drawn {
    still: usize,
    sample: usize,
    views: Vec<usize>,
    clip: Vec<usize>,
    noise_seed: u64,
}

/// The sample of photograph `still` in pass `pass`: the same whatever was drawn before.
fn draw(args: &SftArgs, rationales: &Rationales, pass: u64, still: usize) -> Drawn {
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed ^ (pass << 40) ^ ((still as u64) << 1) ^ 1);
    let first = (pass as usize + still) % args.views;
    // Half of the clips stand still, the others change between two views.
    let views =
        if args.views > 1 && rng.random_bool(0.5) { vec![first, (first + 1) % args.views] } else { vec![first] };
    let clip = (0..args.frames).map(|_| rng.random_range(0..views.len())).collect();
    Drawn { still, sample: rationales.of(still, pass as usize), views, clip, noise_seed: rng.random() }
}

/// Everything that stays the same during a run.
struct Setting<'a> {
    args: &'a SftArgs,
    student: Student,
    prompt: Prompt,
    state: Vec<f32>,
    rationales: Rationales,
    train: Faces,
    features: Features,
    standard: Standard,
    weights: LossWeights,
}

impl Setting<'_> {
    /// One worker's part of a step.
    fn part(
        &self,
        values: &[f32],
        gradients: &mut [f32],
        drawn: &[Drawn],
        sums: (f32, f32),
        worker: &mut StudentBuffers,
    ) -> anyhow::Result<Losses> {
        let size = self.student.size.grid * self.student.size.grid * self.student.size.channels;
        let mut losses = Losses::default();
        for drawn in drawn.chunks(MICRO_BATCH) {
            let mut features = Vec::new();
            let mut clips = Vec::new();
            for one in drawn {
                let base = features.len() / size;
                let mut rng = ChaCha8Rng::seed_from_u64(one.noise_seed);
                for &view in &one.views {
                    let start = features.len();
                    features.resize(start + size, 0.0);
                    let own = &mut features[start..];
                    self.features.read(view, one.still, own)?;
                    self.standard.apply(own);
                    add_noise(own, self.args.noise, &mut rng);
                }
                clips.push(one.clip.iter().map(|frame| base + frame).collect());
            }
            let tokens: Vec<&Tokens> = drawn.iter().map(|one| &self.rationales.tokens[one.sample]).collect();
            let labels: Vec<u8> = drawn.iter().map(|one| self.train.labels[one.still]).collect();
            let cues: Vec<Option<[f32; CUES]>> = drawn.iter().map(|one| self.train.cues[one.still]).collect();
            let share = Share {
                features: &features,
                clips: &clips,
                tokens: &tokens,
                labels: &labels,
                cues: &cues,
                full_weight: sums.0,
                fast_weight: sums.1,
                batch: self.args.batch,
            };
            let (prompt, state) = (&self.prompt, &self.state);
            losses = losses + self.student.step(values, gradients, prompt, state, &share, self.weights, worker);
        }
        Ok(losses)
    }
}

/// Uniform noise of `share` times the spread of the features.
fn add_noise(features: &mut [f32], share: f32, rng: &mut impl Rng) {
    if share > 0.0 {
        let squares: f32 = super::ops::sum(features.iter().map(|x| x * x));
        let spread = share * (3.0 * squares / features.len() as f32).sqrt();
        features.iter_mut().for_each(|x| *x += rng.random_range(-spread..spread));
    }
}

/// Runs `candor-tools train sft`.
pub fn run(args: &SftArgs) -> anyhow::Result<()> {
    args.check()?;
    let products = args.device.choose(false)?;
    let tower = FrozenTower::open(&args.tower, args.tower_layers)?;
    let (rationales, prompt) = Rationales::open(args)?;
    let train = Faces::open(&args.faces, &rationales.description.part)?;
    let val = Faces::open(&args.faces, "val")?;
    ensure!(train.len() == rationales.description.stills, "data.json is of another part of the faces");
    let _lock = RunLock::take(&args.out)?;
    let instruction = rationales.description.instruction.clone();
    let encoder = InstructionEncoder::new(&instruction, args.seed);
    let size = StudentSize {
        decoder: DecoderSize {
            width: args.width,
            layers: args.layers,
            heads: args.heads,
            key_heads: args.key_heads,
            head_dim: args.head_dim,
            hidden: args.hidden,
            vocabulary: prompt.vocabulary(),
            theta: 1e4,
            eps: 1e-6,
            tied: true,
        },
        channels: tower.config().hidden_size,
        grid: tower.grid(),
        frames: args.frames,
    };
    let student = Student::new(size, encoder.width())?;

    let stop = stop_on_interrupt();
    let folder = args.features.as_ref().unwrap_or(&args.out);
    std::fs::create_dir_all(folder).with_context(|| format!("{}", folder.display()))?;
    let stills = args.limit.unwrap_or(train.len()).clamp(1, train.len());
    let seeds: Vec<Vec<u64>> = (1..args.views)
        .map(|view| (0..stills).map(|still| rationales.samples[rationales.of(still, view)].jitter_seed).collect())
        .collect();
    let measured = args.validate.clamp(1, val.len());
    let val_features = Features::open(folder, &tower, &val, "val", measured, &[], args.threads, stop)?;
    let features = Features::open(folder, &tower, &train, "train", stills, &seeds, args.threads, stop)?;

    let recipe = format!(
        "sft {:?} {:?} views {} photographs {stills} passes {} batch {} rate {} decay {} weights {} {} {} {} noise {} \
         seed {} threads {} data {}{products}",
        args.part,
        size,
        args.views,
        args.passes,
        args.batch,
        args.rate,
        args.weight_decay,
        args.label_weight,
        args.unmeasured_weight,
        args.fast_weight,
        args.helper_weight,
        args.noise,
        args.seed,
        args.threads,
        rationales.description.seed,
    );
    let total = ((args.passes * stills as f64 / args.batch as f64).round() as u64).max(1);
    let schedule = Schedule { peak: args.rate, warm_up: WARM_UP.min(total / 10 + 1), total, decay: Decay::Cosine };
    let mut values = student.initial(args.seed);
    let mut optimiser = AdamW::new(&student.plan, args.weight_decay);
    let state_path = args.out.join("state.safetensors");
    checkpoint::resume(&state_path, &recipe, &mut values, &mut optimiser)?;
    let weights = LossWeights { label: args.label_weight, fast: args.fast_weight, helper: args.helper_weight };
    let state = encoder.state(&instruction)?;
    let standard = features.standard(size.channels)?;
    let setting = Setting { args, student, prompt, state, rationales, train, features, standard, weights };

    let mut log = RunLog::open(&args.out, optimiser.steps, total)?;
    log.say(&format!("{} parameters, {total} steps, {} done", setting.student.plan.len(), optimiser.steps));
    let mut workers: Vec<StudentBuffers> = (0..args.threads).map(|_| StudentBuffers::default()).collect();
    let mut gradients = vec![vec![0.0; setting.student.plan.len()]; args.threads];
    let mut order = Order::new(args.seed, stills);
    let mut saved = Instant::now();
    while optimiser.steps < total {
        let step = optimiser.steps;
        let started = Instant::now();
        let drawn: Vec<Drawn> = (0..args.batch as u64)
            .map(|i| {
                let (pass, still) = order.at(step * args.batch as u64 + i);
                draw(args, &setting.rationales, pass, still)
            })
            .collect();
        let sum = |part: fn(&Tokens) -> &[(u32, f32)]| -> f32 {
            drawn.iter().flat_map(|one| part(&setting.rationales.tokens[one.sample])).map(|token| token.1).sum()
        };
        let sums = (sum(|tokens| &tokens.full), sum(|tokens| &tokens.fast));
        let losses: anyhow::Result<Vec<Losses>> = workers
            .par_iter_mut()
            .zip(gradients.par_iter_mut())
            .zip(drawn.par_chunks(args.batch.div_ceil(args.threads)))
            .map(|((worker, gradients), drawn)| setting.part(&values, gradients, drawn, sums, worker))
            .collect();
        let losses = losses?.into_iter().fold(Losses::default(), |a, b| a + b);
        let rate = schedule.rate(step);
        let norm = optimiser.step(&mut values, &mut gradients, rate, CLIP);
        ensure!(norm.is_finite(), "step {step}: the gradient is not finite; a lower --rate may help");
        let step = optimiser.steps;
        let speed = args.batch as f64 / started.elapsed().as_secs_f64();
        let share = |i: usize| losses.right[i] as f64 / losses.seen[i].max(1) as f64;
        let loss = losses.text + losses.helper;
        log.write(
            step,
            json!({"loss": loss, "text_loss": losses.text, "helper_loss": losses.helper, "label_accuracy": share(0),
                "fast_label_accuracy": share(1), "helper_accuracy": losses.helper_right as f64 / args.batch as f64,
                "rate": rate, "norm": norm, "samples_per_s": speed}),
        )?;
        log.show(step, format!("loss {loss:.3} {speed:.1} samples/s"));
        if step.is_multiple_of(20) || step == 1 {
            log.say(&format!(
                "step {step}/{total} loss {:.3} + {:.3} label {:.2} fast {:.2} helper {:.2} norm {norm:.2} {speed:.1}/s",
                losses.text,
                losses.helper,
                share(0),
                share(1),
                losses.helper_right as f64 / args.batch as f64
            ));
        }
        if step.is_multiple_of(VALIDATE_EVERY) || step == total {
            let (fast, helper) =
                validate(&setting, &values, &val, &val_features, measured, &mut workers, &mut gradients)?;
            log.write(step, json!({"val_n": measured, "val_fast_accuracy": fast, "val_helper_accuracy": helper}))?;
            log.say(&format!("step {step}/{total}: validation fast answer {fast:.4} helper {helper:.4}"));
            log.draw("sft", &["val_fast_accuracy", "val_helper_accuracy"])?;
        }
        let cut = stop.load(Ordering::Relaxed) || args.stop_after.is_some_and(|stop| step >= stop);
        if saved.elapsed() > SAVE_EVERY || cut || step == total {
            checkpoint::save(&state_path, &recipe, &values, &optimiser)?;
            saved = Instant::now();
        }
        if cut && step < total {
            bail!("stopped at step {step} of {total}; the same command goes on from there");
        }
    }
    let report = export::write(&Export {
        folder: &args.out.join("model"),
        name: &args.name,
        student: &setting.student,
        values: &values,
        standard: &setting.standard,
        tower: &tower,
        encoder: &encoder,
        prompt: &setting.prompt,
        data: &args.data,
        description: &setting.rationales.description,
    })?;
    log.say(&report);
    Ok(())
}

/// Share of photographs whose fast answer, and whose helping head, is right, through the training's own forward pass.
#[allow(clippy::too_many_arguments)]
fn validate(
    setting: &Setting,
    values: &[f32],
    val: &Faces,
    features: &Features,
    count: usize,
    workers: &mut [StudentBuffers],
    gradients: &mut [Vec<f32>],
) -> anyhow::Result<(f64, f64)> {
    let student = &setting.student;
    let size = student.size.grid * student.size.grid * student.size.channels;
    let labels = &setting.rationales.description.labels;
    let answers: anyhow::Result<Vec<Tokens>> = labels.iter().map(|label| setting.prompt.tokens("", label)).collect();
    let answers = answers?;
    let indices: Vec<usize> = (0..count).collect();
    let share = count.div_ceil(workers.len());
    let results: anyhow::Result<Vec<Losses>> = workers
        .par_iter_mut()
        .zip(gradients.par_iter_mut())
        .zip(indices.par_chunks(share))
        .map(|((worker, unused), indices)| {
            let mut losses = Losses::default();
            for indices in indices.chunks(MICRO_BATCH) {
                let mut pixels = vec![0.0; indices.len() * size];
                for (out, &index) in pixels.chunks_exact_mut(size).zip(indices) {
                    features.read(0, index, out)?;
                    setting.standard.apply(out);
                }
                let clips: Vec<Vec<usize>> = (0..indices.len()).map(|i| vec![i; student.size.frames]).collect();
                let tokens: Vec<&Tokens> = indices.iter().map(|&i| &answers[usize::from(val.labels[i])]).collect();
                let own: Vec<u8> = indices.iter().map(|&i| val.labels[i]).collect();
                let share = Share {
                    features: &pixels,
                    clips: &clips,
                    tokens: &tokens,
                    labels: &own,
                    cues: &vec![None; indices.len()],
                    full_weight: 1.0,
                    fast_weight: 1.0,
                    batch: 1,
                };
                let (prompt, state) = (&setting.prompt, &setting.state);
                losses = losses + student.step(values, unused, prompt, state, &share, setting.weights, worker);
            }
            unused.fill(0.0);
            Ok(losses)
        })
        .collect();
    let losses = results?.into_iter().fold(Losses::default(), |a, b| a + b);
    Ok((losses.right[1] as f64 / losses.seen[1].max(1) as f64, losses.helper_right as f64 / count as f64))
}
