//! What the frozen vision tower makes of each clip, computed once and kept: a folder with a file a clip, named by what the
//! result depends on. A file appears whole or not at all, and is checked whenever it is read.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use candor::manifest::Manifest;
use candor::media::Fit;
use candor::model::ModelConfig;
use candor::weights::Checkpoint;
use candor_kernels::Device;
use half::f16;
use half::slice::HalfFloatSliceExt;
use sha2::{Digest, Sha256};

use super::Media;
use super::extractor::{ClipError, Extractor, pictures_of};
use crate::files;

/// First bytes of a file, with the version of its layout and of the steps that lead to what it holds.
const MAGIC: &[u8; 8] = b"candorF1";

/// Bytes of the checksum at a file's end.
const CHECKSUM: usize = 32;

/// A part of a file that is older was left behind by a run that was killed.
const ABANDONED: Duration = Duration::from_secs(3600);

/// Features of a clip's frames. Frames that show the same picture share its features.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipFeatures {
    /// States of each distinct picture, `[pictures, patches · width]`.
    pub distinct: Vec<f32>,
    /// The picture of each frame that the model takes.
    pub frames: Vec<usize>,
}

impl ClipFeatures {
    /// Distinct pictures.
    pub fn pictures(&self) -> usize {
        self.frames.iter().max().map_or(0, |last| last + 1)
    }

    /// Elements of a picture's features, `patches · width`.
    pub fn size(&self) -> usize {
        self.distinct.len() / self.pictures().max(1)
    }

    /// Features of every frame, `[frames, patches · width]`, as [`candor::model::Model::video_tokens`] takes them.
    pub fn every_frame(&self) -> Vec<f32> {
        let size = self.size();
        self.frames.iter().flat_map(|&picture| &self.distinct[picture * size..(picture + 1) * size]).copied().collect()
    }
}

/// A clip's digest, and the length and time of the file that it was taken of.
type KnownDigest = (u64, Option<SystemTime>, [u8; 32]);

/// A folder of features. One serves all threads, and several processes may share the folder.
pub struct FeatureCache {
    folder: PathBuf,
    /// Digest of all that the features depend on but the clip.
    model: [u8; 32],
    /// Whether clips are seen in another way than photographs, see [`Extractor`].
    fit: Fit,
    size: usize,
    frames: usize,
    digests: Mutex<HashMap<PathBuf, KnownDigest>>,
    computed: AtomicUsize,
    damaged: AtomicUsize,
}

impl FeatureCache {
    /// Opens the folder, made if it is not there, for the vision tower of a model's folder.
    pub fn open(folder: &Path, model_folder: &Path) -> Result<FeatureCache, ClipError> {
        let failed = |source| ClipError::Cache { path: folder.into(), source };
        fs::create_dir_all(folder).map_err(failed)?;
        remove_abandoned(folder).map_err(failed)?;
        let manifest = Manifest::open(model_folder)?;
        let config = ModelConfig::read(model_folder).map_err(candor::model::ModelError::from)?;
        let mut hash = Sha256::new();
        hash.update(MAGIC);
        hash.update(format!("{:?} {}", config.vision, config.frames));
        // Windows are cut from streams; a clip is one, whatever their length.
        let input = candor::manifest::InputSection { window_s: 0.0, step_s: 0.0, ..manifest.input.clone() };
        hash.update(format!("{input:?}"));
        hash_vision_tower(&mut hash, model_folder, config.vision_folder.as_deref())?;
        Ok(FeatureCache {
            folder: folder.to_path_buf(),
            model: hash.finalize().into(),
            fit: manifest.input.fit,
            size: config.vision.patches() * config.vision.width,
            frames: config.frames,
            digests: Mutex::default(),
            computed: AtomicUsize::new(0),
            damaged: AtomicUsize::new(0),
        })
    }

    /// Features of a clip, from the folder or else computed and kept. They are rounded to half precision either way, so that
    /// a first run sees what a later one does.
    pub fn get<D: Device>(&self, extractor: &mut Extractor<D>, media: &Media) -> Result<ClipFeatures, ClipError> {
        let path = self.file(extractor, media)?;
        match fs::read(&path) {
            Ok(bytes) => match decode(&bytes, self.size, self.frames) {
                Ok(features) => return Ok(features),
                Err(reason) => {
                    log::warn!("{} is damaged ({reason}); {media} is looked at again", path.display());
                    self.damaged.fetch_add(1, Ordering::Relaxed);
                }
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(ClipError::Cache { path, source }),
        }
        let mut features = extractor.extract(media)?;
        self.computed.fetch_add(1, Ordering::Relaxed);
        for value in &mut features.distinct {
            *value = f16::from_f32(*value).to_f32();
        }
        if !features.distinct.iter().all(|value| value.is_finite()) {
            return Err(ClipError::NotFinite { media: media.clone() });
        }
        write_whole(&path, &encode(&features)).map_err(|source| ClipError::Cache { path, source })?;
        Ok(features)
    }

    /// Clips whose features were computed, and not read.
    pub fn computed(&self) -> usize {
        self.computed.load(Ordering::Relaxed)
    }

    /// Damaged files that were found and replaced.
    pub fn damaged(&self) -> usize {
        self.damaged.load(Ordering::Relaxed)
    }

    /// The file of a clip.
    fn file<D: Device>(&self, extractor: &Extractor<D>, media: &Media) -> Result<PathBuf, ClipError> {
        let mut hash = Sha256::new();
        hash.update(self.model);
        match (media, extractor.photograph_digest(media)?) {
            (Media::Clip(path), _) => {
                let digest = self.digest(path).map_err(|source| ClipError::Read { path: path.clone(), source })?;
                hash.update(format!("{:?}", self.fit));
                hash.update(digest);
            }
            // Cut to the face already, a photograph is fitted in another way.
            (Media::Photograph { .. }, digest) => {
                hash.update("photograph");
                hash.update(digest.unwrap_or_default());
            }
        }
        Ok(self.folder.join(files::hexadecimal(&hash.finalize())).with_extension("features"))
    }

    /// Digest of a clip's content. A file is read once, and again when its length or time is another.
    fn digest(&self, path: &Path) -> io::Result<[u8; 32]> {
        let about = fs::metadata(path)?;
        if about.is_dir() {
            let mut hash = Sha256::new();
            for picture in pictures_of(path)? {
                hash.update(Sha256::digest(fs::read(picture)?));
            }
            return Ok(hash.finalize().into());
        }
        let stamp = (about.len(), about.modified().ok());
        let known = |digests: &HashMap<PathBuf, KnownDigest>| {
            digests.get(path).filter(|known| (known.0, known.1) == stamp).map(|known| known.2)
        };
        if let Some(digest) = known(&self.digests.lock().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(digest);
        }
        let mut hash = Sha256::new();
        io::copy(&mut File::open(path)?, &mut HashWriter(&mut hash))?;
        let digest = hash.finalize().into();
        let mut digests = self.digests.lock().unwrap_or_else(PoisonError::into_inner);
        digests.insert(path.to_path_buf(), (stamp.0, stamp.1, digest));
        Ok(digest)
    }
}

/// Hashes names, types, shapes and bytes of the vision tower's tensors, wherever they lie.
fn hash_vision_tower(hash: &mut Sha256, model: &Path, separate: Option<&Path>) -> Result<(), ClipError> {
    const INSIDE: &str = "model.vision_tower.";
    const SEPARATE: &str = "vision_model.";
    let main = Checkpoint::open(model)?;
    let (checkpoint, prefix) = match separate {
        Some(folder) if !main.any_under(INSIDE) => (Checkpoint::open(folder)?, SEPARATE),
        _ => (main, INSIDE),
    };
    // A folder may hold the tower alone, its tensors without a prefix.
    let prefix = if checkpoint.any_under(prefix) { prefix } else { "" };
    for name in checkpoint.names().filter(|name| name.starts_with(prefix)) {
        let tensor = checkpoint.raw(name)?;
        hash.update(format!("\n{name} {} {:?} ", tensor.dtype, tensor.shape));
        hash.update(tensor.bytes);
    }
    Ok(())
}

/// A file's bytes: magic; numbers of pictures, of elements a picture and of frames; the picture of each frame; the states in
/// half precision; SHA-256 of all that. Numbers are 32 bits, little-endian.
fn encode(features: &ClipFeatures) -> Vec<u8> {
    let numbers = [features.pictures(), features.size(), features.frames.len()];
    let mut bytes = MAGIC.to_vec();
    bytes.extend(numbers.iter().chain(&features.frames).flat_map(|&number| (number as u32).to_le_bytes()));
    bytes.extend(features.distinct.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()));
    let checksum = Sha256::digest(&bytes);
    bytes.extend(checksum);
    bytes
}

/// Reads what [`encode`] wrote for clips of `wanted` frames, `size` elements a picture.
fn decode(bytes: &[u8], size: usize, wanted: usize) -> Result<ClipFeatures, &'static str> {
    let (bytes, checksum) =
        bytes.split_at_checked(bytes.len().wrapping_sub(CHECKSUM)).ok_or("it is shorter than its checksum")?;
    if Sha256::digest(bytes).as_slice() != checksum {
        return Err("its checksum is wrong");
    }
    // What follows was written so. It is checked all the same: nothing here may read beyond an end.
    let body = bytes.strip_prefix(MAGIC).ok_or("it is of another version")?;
    let number = |index: usize| -> Result<usize, &'static str> {
        let bytes = body.get(4 * index..4 * index + 4).ok_or("it is too short")?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize)
    };
    let [pictures, elements, frames] = [number(0)?, number(1)?, number(2)?];
    if elements != size || frames != wanted || !(1..=wanted).contains(&pictures) {
        return Err("it is of another model");
    }
    let frames = (0..frames).map(|frame| number(3 + frame)).collect::<Result<Vec<usize>, _>>()?;
    let states = &body[4 * (3 + frames.len())..];
    if states.len() != 2 * pictures * size || frames.iter().max() != Some(&(pictures - 1)) {
        return Err("its length is wrong");
    }
    let states: Vec<f16> = states.chunks_exact(2).map(|half| f16::from_le_bytes([half[0], half[1]])).collect();
    Ok(ClipFeatures { distinct: states.to_f32_vec(), frames })
}

/// Writes a file so that it is there whole or not at all, whatever happens meanwhile and whoever writes it too.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    static WRITTEN: AtomicUsize = AtomicUsize::new(0);
    let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
    let part = path.with_extension(format!("{}-{number}.part", std::process::id()));
    let create = || match (File::create(&part), path.parent()) {
        // Somebody has tidied up in the midst of a run.
        (Err(error), Some(folder)) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(folder)?;
            File::create(&part)
        }
        (file, _) => file,
    };
    let written = create()
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&part, path));
    if written.is_err() {
        // A full disk must not be left fuller. That this may fail too changes nothing.
        let _ = fs::remove_file(&part);
    }
    written
}

/// Removes parts of files that killed runs have left.
fn remove_abandoned(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let old = |about: fs::Metadata| about.modified().ok()?.elapsed().ok().map(|age| age > ABANDONED);
        let part = path.extension().is_some_and(|extension| extension == "part");
        if part && fs::metadata(&path).ok().and_then(old) == Some(true) {
            // Another run may have been quicker.
            let _ = fs::remove_file(&path);
        }
    }
    Ok(())
}

/// Passes what is written on to a hash.
struct HashWriter<'h>(&'h mut Sha256);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candor::media::{PixelLayout, Preprocess};
    use candor::model::Model;
    use candor_kernels::cpu::CpuDevice;

    use super::super::FacesFiles;
    use super::*;
    use crate::data::faces::tests::file as faces_file;

    fn default_model() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/default")
    }

    /// A folder with a faces file, and its photographs.
    fn photographs() -> (tempfile::TempDir, Vec<Media>) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("faces.safetensors");
        fs::write(&file, faces_file(3, &[], &[])).unwrap();
        let photographs = (0..4).map(|row| Media::Photograph { file: file.clone(), part: "val".into(), row });
        (folder, photographs.collect())
    }

    /// The only file of features in a folder.
    fn only_file(folder: &Path) -> PathBuf {
        let files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(files.len(), 1, "{files:?}");
        files[0].clone()
    }

    #[test]
    fn features_are_kept_and_damage_is_seen() {
        let (folder, media) = photographs();
        let cache_folder = folder.path().join("cache");
        let open = || FeatureCache::open(&cache_folder, &default_model()).unwrap();
        let mut extractor = Extractor::open(&default_model(), FacesFiles::default(), CpuDevice::new(Some(1))).unwrap();
        let first = open();
        let features = first.get(&mut extractor, &media[0]).unwrap();
        assert_eq!((features.pictures(), features.size()), (1, extractor.size()));
        assert_eq!(features.frames, vec![0; extractor.frames()]);
        assert_eq!(first.get(&mut extractor, &media[0]).unwrap(), features);
        let second = open();
        assert_eq!(second.get(&mut extractor, &media[0]).unwrap(), features);
        assert_eq!((first.computed(), second.computed()), (1, 0));

        let path = only_file(&cache_folder);
        let whole = fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        flipped[100] ^= 1;
        for damaged in
            [&b""[..], &whole[..31], &whole[..whole.len() - 1], &flipped, b"candorF1 and no more than these words"]
        {
            fs::write(&path, damaged).unwrap();
            let cache = open();
            assert_eq!(cache.get(&mut extractor, &media[0]).unwrap(), features);
            assert_eq!((cache.computed(), cache.damaged()), (1, 1));
            assert_eq!(fs::read(&path).unwrap(), whole, "the damaged file is replaced");
        }
        first.get(&mut extractor, &media[1]).unwrap();
        assert_eq!(fs::read_dir(&cache_folder).unwrap().count(), 2, "another photograph has a file of its own");
        let absent = first.get(&mut extractor, &media[3]).unwrap_err();
        assert!(absent.is_of_the_clip() && absent.to_string().contains("val/3"), "{absent}");
    }

    #[test]
    fn the_runtime_sees_the_same() {
        let (folder, media) = photographs();
        let mut extractor = Extractor::open(&default_model(), FacesFiles::default(), CpuDevice::new(Some(1))).unwrap();
        let features = extractor.extract(&media[2]).unwrap();
        // As candor-tools eval shows a photograph: a window of the same picture over and over.
        let input = Manifest::open(&default_model()).unwrap().input;
        let mut model = Model::open(&default_model(), CpuDevice::new(Some(1))).unwrap();
        let (side, frames) = (model.config().vision.image, model.config().frames);
        let faces = crate::data::faces::Faces::open(&folder.path().join("faces.safetensors"), "val").unwrap();
        let rgb: Vec<u8> = faces.image(2).iter().flat_map(|&grey| [grey; 3]).collect();
        let window = vec![candor::media::Frame::from_rgb(rgb, 4, 4).unwrap(); frames];
        let preprocess = Preprocess { side, fit: Fit::Stretch, detail: input.detail, grey: input.grey };
        let pixels = preprocess.pixels(&window, &[], frames, PixelLayout::ChannelsFirst).unwrap();
        let mut states = model.rows().unwrap();
        model.vision_features(&pixels, &mut states).unwrap();
        let expected = states.to_host(model.device()).unwrap();
        assert_eq!(features.every_frame().len(), expected.len());
        let largest = expected.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
        let worst = features.every_frame().iter().zip(&expected).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(worst <= 1e-5 * largest, "{worst} of {largest}");

        // And they go back into the model.
        let (mut direct, mut kept) = (model.rows().unwrap(), model.rows().unwrap());
        model.video_tokens(&states, [0.2, 0.3, 0.5], &mut direct).unwrap();
        let width = model.config().vision.width;
        let device = model.device().clone();
        states.write(&device, &features.every_frame(), width).unwrap();
        model.video_tokens(&states, [0.2, 0.3, 0.5], &mut kept).unwrap();
        let (direct, kept) = (direct.to_host(&device).unwrap(), kept.to_host(&device).unwrap());
        let largest = direct.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
        let worst = direct.iter().zip(&kept).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(worst <= 1e-4 * largest && largest > 0.0, "{worst} of {largest}");
        assert!(states.write(&device, &[0.0; 5], 2).is_err() && states.write(&device, &[], 0).is_err());
    }

    #[cfg(feature = "media")]
    #[test]
    fn clips_of_video_and_of_pictures() {
        let folder = tempfile::tempdir().unwrap();
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo");
        let pictures = folder.path().join("00001");
        fs::create_dir(&pictures).unwrap();
        for name in ["9.png", "10.png"] {
            fs::copy(demo.join("astronaut.png"), pictures.join(name)).unwrap();
        }
        let cache = FeatureCache::open(&folder.path().join("cache"), &default_model()).unwrap();
        let mut extractor = Extractor::open(&default_model(), FacesFiles::default(), CpuDevice::new(Some(1))).unwrap();
        let features = cache.get(&mut extractor, &Media::Clip(pictures.clone())).unwrap();
        assert_eq!(features.frames, [0, 1, 2, 2], "a black picture stands for the missing frames");
        let size = features.size();
        assert_eq!(features.distinct[..size], features.distinct[size..2 * size], "both show the same");
        assert_ne!(features.distinct[..size], features.distinct[2 * size..]);
        assert_eq!(features.every_frame()[3 * size..], features.distinct[2 * size..]);

        let video = cache.get(&mut extractor, &Media::Clip(demo.join("sad-to-happy.mp4"))).unwrap();
        assert_eq!(video.frames, [0, 1, 2, 3]);
        assert_eq!(cache.get(&mut extractor, &Media::Clip(demo.join("sad-to-happy.mp4"))).unwrap(), video);
        assert_eq!(cache.computed(), 2);

        // A clip that is changed is another clip.
        fs::copy(demo.join("astronaut.png"), pictures.join("11.png")).unwrap();
        assert_eq!(cache.get(&mut extractor, &Media::Clip(pictures)).unwrap().frames, [0, 1, 2, 3]);
        assert_eq!(cache.computed(), 3);

        let broken = folder.path().join("broken.mp4");
        fs::write(&broken, "this is no video").unwrap();
        let empty = folder.path().join("empty");
        fs::create_dir(&empty).unwrap();
        for (path, reason) in
            [(broken, "not a media file"), (empty, "has no picture"), ("/no/such.mp4".into(), "such.mp4")]
        {
            let error = cache.get(&mut extractor, &Media::Clip(path)).unwrap_err();
            assert!(error.is_of_the_clip() && error.to_string().contains(reason), "{error}");
        }
        assert_eq!(fs::read_dir(folder.path().join("cache")).unwrap().count(), 3, "nothing half is left");
    }

    #[test]
    fn what_the_features_depend_on_names_their_file() {
        let (folder, media) = photographs();
        let model = folder.path().join("model");
        fs::create_dir(&model).unwrap();
        for name in ["config.json", "candor.toml", "model.safetensors"] {
            fs::copy(default_model().join(name), model.join(name)).unwrap();
        }
        let extractor = Extractor::open(&default_model(), FacesFiles::default(), CpuDevice::new(Some(1))).unwrap();
        let name = || {
            let cache = FeatureCache::open(&folder.path().join("cache"), &model).unwrap();
            cache.file(&extractor, &media[0]).unwrap()
        };
        let change = |file: &str, from: &str, to: &str| {
            let path = model.join(file);
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.contains(from));
            fs::write(&path, text.replace(from, to)).unwrap();
        };
        let first = name();
        change("candor.toml", "window_s = 2.0", "window_s = 3.0");
        change("candor.toml", "name = \"candor-default\"", "name = \"another\"");
        assert_eq!(name(), first, "windows are not cut here, and a name changes nothing");
        change("candor.toml", "detail = 48", "detail = 24");
        let detail = name();
        change("config.json", "\"num_frames\": 4", "\"num_frames\": 6");
        let frames = name();
        let path = model.join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let header = 8 + usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
        let names: serde_json::Value = serde_json::from_slice(&bytes[8..header]).unwrap();
        let bias = |name: &str| header + names[name]["data_offsets"][0].as_u64().unwrap() as usize;
        bytes[bias("model.norm.weight")] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert_eq!(name(), frames, "the decoder is of no account");
        let last = "model.vision_tower.vision_tower.vision_model.encoder.layers.10.layer_norm1.weight";
        bytes[bias(last)] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let all = [first, detail, frames, name()];
        assert!((0..4).all(|i| (0..i).all(|j| all[i] != all[j])), "{all:?}");
    }

    #[test]
    fn a_crash_while_writing_leaves_no_half_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.features");
        write_whole(&path, b"one").unwrap();
        write_whole(&path, b"two").unwrap();
        assert_eq!(fs::read(only_file(folder.path())).unwrap(), b"two");
        // As a run that was killed leaves it: young parts may be another run's, old ones go.
        let (young, old) = (folder.path().join("b.1-0.part"), folder.path().join("c.2-0.part"));
        fs::write(&young, "half").unwrap();
        fs::write(&old, "half").unwrap();
        let long_ago = SystemTime::now() - 2 * ABANDONED;
        File::options().write(true).open(&old).unwrap().set_modified(long_ago).unwrap();
        remove_abandoned(folder.path()).unwrap();
        assert!(young.exists() && !old.exists() && path.exists());
        fs::remove_file(&young).unwrap();
        // A place that cannot be written to (as on a full disk) keeps what is there and gathers nothing.
        fs::create_dir(folder.path().join("d.features")).unwrap();
        fs::write(folder.path().join("d.features/x"), "").unwrap();
        assert!(write_whole(&folder.path().join("d.features"), b"three").is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn files_of_any_bytes_are_refused() {
        let features = ClipFeatures { distinct: vec![0.5, -1.0, 2.0, 65504.0], frames: vec![0, 1, 1] };
        let whole = encode(&features);
        assert_eq!(decode(&whole, 2, 3).unwrap(), features);
        for (size, frames) in [(1, 3), (4, 3), (2, 2), (2, 4)] {
            assert!(decode(&whole, size, frames).is_err());
        }
        for place in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[place] ^= 0x80;
            assert!(decode(&bytes, 2, 3).is_err(), "byte {place}");
            assert!(decode(&whole[..place], 2, 3).is_err(), "cut at {place}");
            // Also where the checksum is right.
            let end = bytes.len() - CHECKSUM;
            if place < 32 {
                let checksum = Sha256::digest(&bytes[..end]);
                bytes[end..].copy_from_slice(&checksum);
                assert!(decode(&bytes, 2, 3).is_err(), "byte {place}, checksum right");
            }
        }
    }
}
