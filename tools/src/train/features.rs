//! Frozen features of the vision tower, computed once and kept in a file: what everything behind the tower is trained
//! on. The file is written in order and its end noted after each stretch, so that a run cut off goes on from there.

use super::checkpoint::write_atomically;
use super::faces::{Faces, Jitter};
use super::tower::{Geometry, Tower, TowerConfig, Worker, only_safetensors};
use crate::files;
use crate::quantize::stored::Stored;
use anyhow::{Context, ensure};
use candor::weights::Checkpoint;
use half::f16;
use half::slice::HalfFloatSliceExt;
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// Pictures a thread takes at a time.
const MICRO_BATCH: usize = 16;
/// Pictures between two notes of how far the file goes.
const STRETCH: usize = 1024;
/// Photographs whose features give mean and spread.
const SURVEYED: usize = 2048;

/// What names of the tower's tensors start with in a whole model.
const IN_A_MODEL: &str = "model.vision_tower.vision_tower.";

/// A tower that stays as it is, rounded to what the model folder will hold.
pub struct FrozenTower {
    tower: Tower,
    geometry: Geometry,
    values: Vec<f32>,
    digest: String,
}

impl FrozenTower {
    /// Opens a folder with config.json and model.safetensors (or one other .safetensors file) in SiglipVisionModel's
    /// layout, or that of a whole model, and keeps the tower's first `layers` layers, all of them by default.
    pub fn open(folder: &Path, layers: Option<usize>) -> anyhow::Result<Self> {
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
        let mut config: Value = serde_json::from_str(&text).with_context(|| format!("{}", path.display()))?;
        let whole_model = config.get_mut("vision_config").map(Value::take);
        let prefix = if whole_model.is_some() { IN_A_MODEL } else { "" };
        let config: TowerConfig =
            serde_json::from_value(whole_model.unwrap_or(config)).with_context(|| format!("{}", path.display()))?;
        let layers = layers.unwrap_or(config.num_hidden_layers);
        let side = config.image_size;
        let tower = Tower::new(config, layers, 1.0).with_context(|| format!("{}", path.display()))?;
        let checkpoint = match folder.join("model.safetensors") {
            path if path.is_file() => Checkpoint::open_file(&path)?,
            _ => Checkpoint::open_file(&only_safetensors(folder)?)?,
        };
        let mut values = vec![0.0; tower.plan.len()];
        tower.plan.fill(&checkpoint, &mut values, |name| exported(name).then(|| format!("{prefix}{name}")))?;
        let mut hash = Sha256::new();
        for entry in tower.plan.entries().iter().filter(|entry| exported(&entry.name)) {
            let own = &mut values[entry.range.clone()];
            own.copy_from_slice(&Stored::new(&entry.name, &entry.shape, own).values());
            own.iter().for_each(|value| hash.update(value.to_le_bytes()));
        }
        let geometry = Geometry::new(&tower.config, side)?;
        ensure!(geometry.patches().is_multiple_of(4), "the tower's grid of patches must have an even side");
        Ok(Self { tower, geometry, values, digest: files::hexadecimal(&hash.finalize()) })
    }

    /// Sizes of the tower.
    pub fn config(&self) -> &TowerConfig {
        &self.tower.config
    }

    /// Patches of a side.
    pub fn grid(&self) -> usize {
        self.geometry.patches().isqrt()
    }

    /// Elements of a picture's features, `[patches, width]`.
    pub fn size(&self) -> usize {
        self.geometry.patches() * self.tower.config.hidden_size
    }

    /// The tensors that a model folder needs, with names below `vision_model.`, shapes and values. The last layer adds
    /// its feed-forward branch to the states that are the features, so its bias takes the standard's mean off them.
    pub fn tensors(&self, standard: &Standard) -> impl Iterator<Item = (&str, &[usize], Vec<f32>)> {
        let last = format!("vision_model.encoder.layers.{}.mlp.fc2.bias", self.tower.config.num_hidden_layers - 1);
        let entries = self.tower.plan.entries().iter().filter(|entry| exported(&entry.name));
        entries.map(move |entry| {
            let mut values = self.values[entry.range.clone()].to_vec();
            if entry.name == last {
                values.iter_mut().zip(&standard.mean).for_each(|(bias, mean)| *bias -= mean);
            }
            (entry.name.as_str(), entry.shape.as_slice(), values)
        })
    }

    /// Pixels `[pictures, side, side]` in SigLIP's scale → features `[pictures, patches, width]`.
    pub fn forward(&self, pixels: &[f32], worker: &mut TowerWorker) -> Vec<f32> {
        let count = pixels.len() / (self.geometry_side() * self.geometry_side());
        worker.0.pixels.clear();
        worker.0.pixels.extend_from_slice(pixels);
        self.tower.forward(&self.values, &self.geometry, count, &mut worker.0);
        worker.0.encoder.output()[..count * self.size()].to_vec()
    }

    fn geometry_side(&self) -> usize {
        self.tower.config.image_size
    }

    /// Pixels of a photograph as it is, or changed.
    pub fn pixels(&self, image: &[u8], jitter: Option<&Jitter>) -> Vec<f32> {
        let mut out = vec![0.0; self.geometry_side() * self.geometry_side()];
        match jitter {
            None => self.geometry.enlarger.exact(image, &mut out),
            Some(jitter) => self.geometry.enlarger.jittered(image, jitter, &mut out),
        }
        out
    }
}

/// Buffers of one thread.
#[derive(Default)]
pub struct TowerWorker(Worker);

fn exported(name: &str) -> bool {
    name.starts_with("vision_model.") && !name.contains("post_layernorm")
}

/// Mean and reciprocal spread of each channel. A tower's states have a large part in common and differ little from
/// picture to picture; what is trained behind it sees them standardised. [`super::export`] folds this into the weights
/// on both sides, so a model folder needs to know nothing of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Standard {
    /// What is taken off.
    pub mean: Vec<f32>,
    /// What the rest is multiplied with.
    pub factor: Vec<f32>,
}

impl Standard {
    /// Standardises features `[…, channels]` in place.
    pub fn apply(&self, features: &mut [f32]) {
        for row in features.chunks_exact_mut(self.mean.len()) {
            for ((x, mean), factor) in row.iter_mut().zip(&self.mean).zip(&self.factor) {
                *x = (*x - mean) * factor;
            }
        }
    }
}

/// What a file of features holds: of each view how many pictures, and which seeds they were changed with. A run that
/// wants fewer views than there are takes the first ones.
#[derive(Debug, Default, PartialEq)]
struct Views(Vec<(usize, String)>);

impl Views {
    /// Reads a note; none, or one that is not to be understood, says that nothing is done.
    fn read(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let line = |line: &str| line.split_once(' ').and_then(|(n, seeds)| Some((n.parse().ok()?, seeds.to_owned())));
        Views(text.lines().map(line).collect::<Option<Vec<_>>>().unwrap_or_default())
    }

    fn text(&self) -> String {
        self.0.iter().map(|(done, seeds)| format!("{done} {seeds}\n")).collect()
    }

    /// Pictures from the first on that are of use.
    fn usable(&self, stills: usize, seeds: &[Vec<u64>]) -> usize {
        let mut done = 0;
        for (view, (count, digest)) in self.0.iter().take(seeds.len() + 1).enumerate() {
            if *digest != seeds_digest(view, seeds) {
                break;
            }
            done += count.min(&stills);
            if *count < stills {
                break;
            }
        }
        done
    }

    /// Notes that the first `done` pictures are there.
    fn note(&mut self, done: usize, stills: usize, seeds: &[Vec<u64>]) {
        self.0 = (0..done.div_ceil(stills))
            .map(|view| (stills.min(done - view * stills), seeds_digest(view, seeds)))
            .collect();
    }
}

/// Names the seeds of a view; the first has none.
fn seeds_digest(view: usize, seeds: &[Vec<u64>]) -> String {
    let mut hash = Sha256::new();
    let own = view.checked_sub(1).and_then(|index| seeds.get(index));
    own.into_iter().flatten().for_each(|seed| hash.update(seed.to_le_bytes()));
    files::hexadecimal(&hash.finalize())[..16].to_owned()
}

/// Features on disk, `[views, stills, patches, width]` in f16.
pub struct Features {
    file: File,
    size: usize,
    stills: usize,
}

impl Features {
    /// Opens the file in `folder`, computing what it lacks. View 0 is the photograph as it is; in a later view a
    /// photograph is changed as its seed in `seeds` says (one list a view).
    #[allow(clippy::too_many_arguments)]
    pub fn open(
        folder: &Path,
        tower: &FrozenTower,
        faces: &Faces,
        name: &str,
        stills: usize,
        seeds: &[Vec<u64>],
        threads: usize,
        stop: &AtomicBool,
    ) -> anyhow::Result<Self> {
        let views = seeds.len() + 1;
        let mut hash = Sha256::new();
        hash.update(&tower.digest);
        hash.update((stills as u64).to_le_bytes());
        for index in 0..stills {
            hash.update(faces.image(index));
        }
        let key = &files::hexadecimal(&hash.finalize())[..16];
        let path = folder.join(format!("features-{name}-{key}.f16"));
        let note = path.with_extension("done");
        let size = tower.size();
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .with_context(|| format!("{}", path.display()))?;
        let whole = (file.metadata()?.len() / (size as u64 * 2)) as usize;
        let mut known = Views::read(&note);
        let mut done = known.usable(stills, seeds).min(whole);
        file.seek(SeekFrom::Start((done * size * 2) as u64))?;

        let total = views * stills;
        let bar = ProgressBar::new(total as u64);
        bar.set_style(ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} {elapsed} left {eta}")?);
        bar.set_message(format!("features {name}"));
        let mut workers: Vec<TowerWorker> = (0..threads).map(|_| TowerWorker::default()).collect();
        while done < total {
            bar.set_position(done as u64);
            let end = total.min(done + STRETCH);
            let places: Vec<usize> = (done..end).collect();
            let share = places.len().div_ceil(threads);
            let parts: Vec<Vec<f16>> = workers
                .par_iter_mut()
                .zip(places.par_chunks(share))
                .map(|(worker, places)| {
                    let mut out = Vec::with_capacity(places.len() * size);
                    for places in places.chunks(MICRO_BATCH) {
                        let pixels: Vec<f32> = places
                            .iter()
                            .flat_map(|&place| {
                                let (view, still) = (place / stills, place % stills);
                                let jitter = (view > 0).then(|| Jitter::draw(seeds[view - 1][still], 0, still));
                                tower.pixels(faces.image(still), jitter.as_ref())
                            })
                            .collect();
                        out.extend(tower.forward(&pixels, worker).into_iter().map(f16::from_f32));
                    }
                    out
                })
                .collect();
            for part in parts {
                let bytes: Vec<u8> = part.iter().flat_map(|value| value.to_le_bytes()).collect();
                file.write_all(&bytes).with_context(|| format!("{}", path.display()))?;
            }
            file.sync_data()?;
            done = end;
            known.note(done, stills, seeds);
            write_atomically(&note, known.text().as_bytes())?;
            ensure!(
                !stop.load(Ordering::Relaxed),
                "stopped after {done} of {total} features; the same command goes on"
            );
        }
        bar.finish_and_clear();
        Ok(Self { file, size, stills })
    }

    /// Mean and spread of each of `channels` channels over the first photographs as they are.
    pub fn standard(&self, channels: usize) -> anyhow::Result<Standard> {
        let (mut sums, mut squares) = (vec![0.0f64; channels], vec![0.0f64; channels]);
        let mut features = vec![0.0; self.size];
        let stills = self.stills.min(SURVEYED);
        for still in 0..stills {
            self.read(0, still, &mut features)?;
            for row in features.chunks_exact(channels) {
                for ((sum, square), &x) in sums.iter_mut().zip(&mut squares).zip(row) {
                    *sum += f64::from(x);
                    *square += f64::from(x) * f64::from(x);
                }
            }
        }
        let count = (stills * self.size / channels) as f64;
        let mean: Vec<f64> = sums.iter().map(|sum| sum / count).collect();
        let factor = squares.iter().zip(&mean).map(|(square, mean)| {
            // A channel that never moves is left alone.
            let variance = square / count - mean * mean;
            if variance > 1e-8 { (1.0 / variance.sqrt()) as f32 } else { 1.0 }
        });
        Ok(Standard { factor: factor.collect(), mean: mean.iter().map(|&m| m as f32).collect() })
    }

    /// Reads one picture's features, `[patches, width]`.
    pub fn read(&self, view: usize, still: usize, out: &mut [f32]) -> anyhow::Result<()> {
        let mut bytes = vec![0; self.size * 2];
        self.file.read_exact_at(&mut bytes, ((view * self.stills + still) * self.size * 2) as u64)?;
        let halves: Vec<f16> = bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect();
        halves.convert_to_f32_slice(out);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_says_which_views_are_of_use() {
        let seeds = [vec![1, 2, 3, 4], vec![5, 6, 7, 8]];
        let mut views = Views::default();
        views.note(3, 4, &seeds);
        assert_eq!(views.usable(4, &seeds), 3);
        views.note(6, 4, &seeds);
        assert_eq!(views.usable(4, &seeds), 6);
        assert_eq!(views.usable(4, &seeds[..0]), 4, "fewer views are a beginning of more");
        assert_eq!(views.usable(4, &[vec![9, 9, 9, 9]]), 4, "a view with other seeds is done anew");
        views.note(12, 4, &seeds);
        assert_eq!(views.usable(4, &seeds), 12);
        views.note(3, 4, &seeds);
        assert_eq!(views.usable(4, &seeds), 3);
        assert_eq!(Views::read(Path::new("no such folder/note")), Views::default());
    }
}
