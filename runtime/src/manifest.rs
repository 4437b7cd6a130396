//! The manifest `candor.toml` beside a model: what it is, which labels and words it was trained with, how it wants its
//! pictures, and the sha256 of every file. Published checkpoints come without one and get the family's defaults.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::media::FaceCrop;
pub use crate::media::Fit;
use crate::observation::Identity;
use crate::verify::Emotion;

/// Name of the manifest in a model's folder.
pub const FILE_NAME: &str = "candor.toml";

/// A manifest is a page of text; a larger file is something else.
const MOST_BYTES: u64 = 1 << 20;

/// Folders within a model's folder are followed to this depth.
const MOST_DEPTH: usize = 8;

/// DFEW's labels, which the published checkpoints answer with.
const DFEW_LABELS: [&str; 7] = ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"];

/// The instruction that the family was trained with (R1-Omni, arXiv 2503.05379); its two spaces are part of it.
const PAPER_INSTRUCTION: &str = "As an emotional recognition expert; throughout the video, which emotion conveyed by the characters is the most obvious to you?  Output the thinking process in <think> </think> and final emotion in <answer> </answer> tags.";

/// Why a manifest, or the files it lists, cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// A file or folder could not be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The manifest is too large to be one.
    #[error("{path} is larger than {MOST_BYTES} bytes; a manifest is a short text", path = path.display())]
    TooLarge {
        /// The manifest.
        path: PathBuf,
    },
    /// Not TOML, an unknown key, or a value of the wrong type.
    #[error("{path}: {source}", path = path.display())]
    Syntax {
        /// The manifest.
        path: PathBuf,
        /// Line, key and reason.
        source: Box<toml::de::Error>,
    },
    /// A value that cannot be.
    #[error("{path}: {key} {reason}", path = path.display())]
    Value {
        /// The manifest.
        path: PathBuf,
        /// The key, with its table.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The manifest has no table of files to check against.
    #[error("{path} has no [files]; `candor model seal` writes them", path = path.display())]
    Unsealed {
        /// The manifest.
        path: PathBuf,
    },
    /// A listed file is not there.
    #[error("{path} is listed in [files] and not there; the model is incomplete", path = path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A file that the manifest does not list.
    #[error("{path} is not listed in [files]; remove it or run `candor model seal`", path = path.display())]
    Unlisted {
        /// The file.
        path: PathBuf,
    },
    /// A file's content is not what the manifest says.
    #[error("{path} has sha256 {actual}, the manifest says {expected}; fetch the file again", path = path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// Digest in the manifest.
        expected: String,
        /// Digest of the file.
        actual: String,
    },
}

/// What a model says of itself.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Manifest {
    /// What the model is.
    pub model: ModelSection,
    /// How it wants its pictures.
    pub input: InputSection,
    /// What a verifier was trained to.
    pub verifier: VerifierSection,
    /// sha256 of every other file in the folder, by path relative to it.
    pub files: BTreeMap<String, String>,
    #[serde(skip)]
    folder: PathBuf,
}

/// `[model]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSection {
    /// Name in observations; without a manifest, that of the folder.
    pub name: String,
    /// Version in observations.
    pub version: String,
    /// Terms under which the weights may be used.
    pub licence: String,
    /// Answers the model may give, spelled as it was trained.
    pub labels: Vec<String>,
    /// Text of the user's turn, behind the pictures.
    pub instruction: String,
    /// Tokens of a whole completion, tags and answer included.
    pub max_new_tokens: usize,
    /// Folder of the verifier, relative to this one.
    pub verifier: Option<PathBuf>,
    /// Which of its two answers the model's label is.
    pub answer: Answer,
}

/// Which probabilities decide the label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// Those before the rationale.
    Fast,
    /// Those after the rationale.
    After,
}

/// `[input]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct InputSection {
    /// How a picture becomes a square.
    pub fit: Fit,
    /// Share of the face's box added on each side, for [`Fit::Face`]; negative cuts tighter.
    pub face_margin: f32,
    /// How far the cut's middle lies below the box's middle, in shares of the box's side.
    pub face_shift: f32,
    /// Side in pixels to which the square is reduced before it is brought to the model's size: the detail of the
    /// pictures the model was trained on.
    pub detail: Option<usize>,
    /// Whether colour is dropped.
    pub grey: bool,
    /// Length of a window in seconds of media time.
    pub window_s: f64,
    /// Time from one window's start to the next's.
    pub step_s: f64,
}

/// `[verifier]`, in a verifier's own manifest
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VerifierSection {
    /// Probability above which its labels are best told apart, chosen on training data. For measuring the verifier:
    /// verdicts and rewards keep to the paper's rule.
    pub threshold: Option<f32>,
}

impl Default for ModelSection {
    fn default() -> Self {
        ModelSection {
            name: String::new(),
            version: "0".to_string(),
            licence: "unknown".to_string(),
            labels: DFEW_LABELS.map(String::from).to_vec(),
            instruction: PAPER_INSTRUCTION.to_string(),
            max_new_tokens: 512,
            verifier: None,
            answer: Answer::After,
        }
    }
}

impl Default for InputSection {
    fn default() -> Self {
        let FaceCrop { margin: face_margin, shift: face_shift } = FaceCrop::default();
        InputSection {
            fit: Fit::Stretch,
            face_margin,
            face_shift,
            detail: None,
            grey: false,
            window_s: 2.0,
            step_s: 1.0,
        }
    }
}

impl Manifest {
    /// Reads the manifest of the model in `folder`; the defaults where there is none.
    pub fn open(folder: &Path) -> Result<Manifest, ManifestError> {
        let path = folder.join(FILE_NAME);
        let text = match File::open(&path) {
            Ok(file) => read_text(file, &path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound && folder.is_dir() => String::new(),
            Err(source) => return Err(ManifestError::Io { path, source }),
        };
        let mut manifest = Manifest::parse(&text, &path)?;
        manifest.folder = folder.to_path_buf();
        if manifest.model.name.is_empty() {
            let folder = folder.canonicalize().map_err(|source| ManifestError::Io { path: folder.into(), source })?;
            manifest.model.name = folder.file_name().unwrap_or(folder.as_os_str()).to_string_lossy().into_owned();
        }
        Ok(manifest)
    }

    /// Reads a manifest's text; `path` is named in errors.
    fn parse(text: &str, path: &Path) -> Result<Manifest, ManifestError> {
        let manifest: Manifest = toml::from_str(text)
            .map_err(|source| ManifestError::Syntax { path: path.to_path_buf(), source: Box::new(source) })?;
        match manifest.fault() {
            Some((key, reason)) => Err(ManifestError::Value { path: path.to_path_buf(), key, reason }),
            None => Ok(manifest),
        }
    }

    /// The first key whose value cannot be, and why.
    fn fault(&self) -> Option<(String, String)> {
        let (model, input) = (&self.model, &self.input);
        let mut spellings: HashMap<Emotion, &str> = HashMap::new();
        for label in &model.labels {
            let key = "model.labels".to_string();
            if label.is_empty() || label.trim() != label {
                return Some((key, format!("has {label:?}; white space does not belong to a label")));
            }
            let Some(emotion) = Emotion::fold(label) else {
                let known: Vec<&str> = Emotion::all().map(Emotion::name).collect();
                let known = known.join(", ");
                return Some((key, format!("has {label:?}, for which no reason could be verified; known are {known}")));
            };
            if let Some(other) = spellings.insert(emotion, label) {
                return Some((key, format!("has {other:?} and {label:?}, which are one emotion")));
            }
        }
        let threshold = self.verifier.threshold;
        let faults = [
            ("model.labels", model.labels.is_empty(), "is empty"),
            ("model.instruction", model.instruction.trim().is_empty(), "is empty"),
            ("model.max_new_tokens", !(1..=65536).contains(&model.max_new_tokens), "is not within 1 to 65536"),
            ("verifier.threshold", threshold.is_some_and(|p| !(0.0..=1.0).contains(&p)), "is not within 0 to 1"),
            ("input.face_margin", !(-0.4..=1.0).contains(&input.face_margin), "is not within -0.4 to 1"),
            ("input.face_shift", !(-0.5..=0.5).contains(&input.face_shift), "is not within -0.5 to 0.5"),
            ("input.detail", input.detail.is_some_and(|side| !(4..=4096).contains(&side)), "is not within 4 to 4096"),
            ("input.window_s", !(0.05..=3600.0).contains(&input.window_s), "is not within 0.05 to 3600"),
            ("input.step_s", !(0.05..=3600.0).contains(&input.step_s), "is not within 0.05 to 3600"),
        ];
        if let Some((key, _, reason)) = faults.into_iter().find(|fault| fault.1) {
            return Some((key.to_string(), reason.to_string()));
        }
        for (name, digest) in &self.files {
            let key = format!("files.{name:?}");
            let inside = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
            if name.is_empty() || !inside {
                return Some((key, "is not a path within the folder".to_string()));
            }
            if digest.len() != 64 || !digest.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
                return Some((key, "is not a sha256 of 64 lower-case hexadecimal digits".to_string()));
            }
        }
        None
    }

    /// The folder that the manifest was read from.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The emotion of each of the labels, in their order.
    pub fn emotions(&self) -> Vec<Emotion> {
        self.model.labels.iter().filter_map(|label| Emotion::fold(label)).collect()
    }

    /// Folder of the verifier that the model names.
    pub fn verifier_folder(&self) -> Option<PathBuf> {
        self.model.verifier.as_ref().map(|verifier| self.folder.join(verifier))
    }

    /// The model's identity: the sha256 of what `sha256sum` prints for its files in the order of their names. Taken from
    /// `[files]`, which [`Manifest::check_files`] holds against the files; computed from them where there is no such table.
    pub fn identity(&self) -> Result<String, ManifestError> {
        let computed;
        let files = if self.files.is_empty() {
            computed = digest_files(&self.folder)?;
            &computed
        } else {
            &self.files
        };
        let mut sha = Sha256::new();
        for (name, digest) in files {
            sha.update(format!("{digest}  {name}\n"));
        }
        Ok(hexadecimal(&sha.finalize()))
    }

    /// Name, version and [`Manifest::identity`], as observations state them.
    pub fn identity_record(&self) -> Result<Identity, ManifestError> {
        let ModelSection { name, version, .. } = &self.model;
        Ok(Identity { name: name.clone(), version: version.clone(), sha256: self.identity()?, adapter: None })
    }

    /// Holds every file in the folder against `[files]`.
    ///
    /// # Errors
    ///
    /// The first file that is missing, not listed, or of another content.
    pub fn check_files(&self) -> Result<(), ManifestError> {
        if self.files.is_empty() {
            return Err(ManifestError::Unsealed { path: self.folder.join(FILE_NAME) });
        }
        let there = list_files(&self.folder)?;
        if let Some(name) = self.files.keys().find(|name| !there.contains(name)) {
            return Err(ManifestError::Missing { path: self.folder.join(name) });
        }
        if let Some(name) = there.iter().find(|name| !self.files.contains_key(*name)) {
            return Err(ManifestError::Unlisted { path: self.folder.join(name) });
        }
        for (name, expected) in &self.files {
            let path = self.folder.join(name);
            let actual = digest_file(&path)?;
            if &actual != expected {
                return Err(ManifestError::Changed { path, expected: expected.clone(), actual });
            }
        }
        Ok(())
    }

    /// Writes the digests of the files now in `folder` into its manifest's `[files]`, leaving the rest of its text alone,
    /// and reads it again. Makes a manifest where there is none.
    pub fn seal(folder: &Path) -> Result<Manifest, ManifestError> {
        let before = Manifest::open(folder)?;
        let path = folder.join(FILE_NAME);
        let io_error = |source| ManifestError::Io { path: path.clone(), source };
        let text = if path.exists() { fs::read_to_string(&path).map_err(io_error)? } else { String::new() };
        let files = digest_files(folder)?;
        let mut sealed = without_files_table(&text);
        if !sealed.is_empty() {
            sealed.push_str("\n\n");
        }
        sealed.push_str("[files]\n");
        for (name, digest) in &files {
            // A JSON string is a TOML basic string.
            sealed.push_str(&format!("{} = \"{digest}\"\n", serde_json::Value::from(name.as_str())));
        }
        let mut expected = Manifest { files, ..before };
        let mut written = Manifest::parse(&sealed, &path)?;
        written.folder = expected.folder.clone();
        if written.model.name.is_empty() {
            written.model.name.clone_from(&expected.model.name);
        }
        if written != expected {
            let reason = "cannot be replaced in this text; make it a plain table at the end".to_string();
            return Err(ManifestError::Value { path, key: "files".to_string(), reason });
        }
        // Written beside and moved into place, so that a crash leaves the old manifest or the new one.
        let beside = folder.join(".candor.toml.new");
        fs::write(&beside, sealed).and_then(|()| fs::rename(&beside, &path)).map_err(io_error)?;
        expected.folder = folder.to_path_buf();
        Ok(expected)
    }
}

/// The manifest's text without its table of files.
fn without_files_table(text: &str) -> String {
    let mut inside = false;
    let mut kept = Vec::new();
    for line in text.lines() {
        if line.trim_start().starts_with('[') {
            inside = line.split('#').next().is_some_and(|header| header.trim() == "[files]");
        }
        if !inside {
            kept.push(line);
        }
    }
    kept.join("\n").trim_end().to_string()
}

fn read_text(file: File, path: &Path) -> Result<String, ManifestError> {
    let mut text = String::new();
    let read = file.take(MOST_BYTES + 1).read_to_string(&mut text);
    let length = read.map_err(|source| ManifestError::Io { path: path.to_path_buf(), source })?;
    if length as u64 > MOST_BYTES {
        return Err(ManifestError::TooLarge { path: path.to_path_buf() });
    }
    Ok(text)
}

/// sha256 of every file in the folder but the manifest and hidden ones.
fn digest_files(folder: &Path) -> Result<BTreeMap<String, String>, ManifestError> {
    list_files(folder)?.into_iter().map(|name| Ok((name.clone(), digest_file(&folder.join(&name))?))).collect()
}

/// Paths of the files in a folder and the folders within it, sorted, with `/` between their parts. The manifest itself
/// and hidden files are left out. Links to files count as files; links to folders are not followed.
fn list_files(folder: &Path) -> Result<Vec<String>, ManifestError> {
    fn walk(folder: &Path, prefix: &str, depth: usize, names: &mut Vec<String>) -> Result<(), ManifestError> {
        let io_error = |source| ManifestError::Io { path: folder.to_path_buf(), source };
        for entry in fs::read_dir(folder).map_err(io_error)? {
            let entry = entry.map_err(io_error)?;
            let Ok(name) = entry.file_name().into_string() else {
                let source = io::Error::new(io::ErrorKind::InvalidData, "the file's name is not UTF-8");
                return Err(ManifestError::Io { path: entry.path(), source });
            };
            if name.starts_with('.') || (depth == 0 && name == FILE_NAME) {
                continue;
            }
            if entry.file_type().map_err(io_error)?.is_dir() {
                if depth + 1 < MOST_DEPTH {
                    walk(&entry.path(), &format!("{prefix}{name}/"), depth + 1, names)?;
                }
            } else if entry.path().is_file() {
                names.push(format!("{prefix}{name}"));
            }
        }
        Ok(())
    }
    let mut names = Vec::new();
    walk(folder, "", 0, &mut names)?;
    names.sort();
    Ok(names)
}

fn digest_file(path: &Path) -> Result<String, ManifestError> {
    let io_error = |source| ManifestError::Io { path: path.to_path_buf(), source };
    let mut file = File::open(path).map_err(io_error)?;
    let mut sha = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hexadecimal(&sha.finalize())),
            Ok(length) => sha.update(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(io_error(source)),
        }
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse(text: &str) -> Result<Manifest, ManifestError> {
        Manifest::parse(text, Path::new("model/candor.toml"))
    }

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        folder
    }

    #[test]
    fn published_checkpoints_need_no_manifest() {
        let folder = folder(&[("config.json", "{}")]);
        let model = folder.path().join("R1-Omni-0.5B");
        fs::create_dir(&model).unwrap();
        let manifest = Manifest::open(&model).unwrap();
        assert_eq!(manifest.model.name, "R1-Omni-0.5B");
        assert_eq!(manifest.model.labels, DFEW_LABELS);
        assert!(manifest.model.instruction.contains("to you?  Output the thinking"));
        assert_eq!((manifest.model.max_new_tokens, manifest.input.fit), (512, Fit::Stretch));
        assert!(Manifest::open(&folder.path().join("absent")).is_err());
        assert!(Manifest::open(&folder.path().join("config.json")).is_err());
    }

    #[test]
    fn every_key_is_read() {
        let manifest = parse(
            "[model]\nname = 'n'\nversion = '2'\nlicence = 'l'\nlabels = ['happy', 'sad']\ninstruction = 'i'\n\
             max_new_tokens = 64\nverifier = '../v'\nanswer = 'fast'\n\
             [input]\nfit = 'face'\nface_margin = 0.3\nface_shift = -0.1\ndetail = 48\ngrey = true\nwindow_s = 4\nstep_s = 0.5\n\
             [verifier]\nthreshold = 0.25\n",
        )
        .unwrap();
        assert_eq!(manifest.emotions(), [Emotion::Happiness, Emotion::Sadness]);
        assert_eq!(manifest.model.answer, Answer::Fast);
        assert_eq!(manifest.verifier.threshold, Some(0.25));
        assert_eq!(
            manifest.input,
            InputSection {
                fit: Fit::Face,
                face_margin: 0.3,
                face_shift: -0.1,
                detail: Some(48),
                grey: true,
                window_s: 4.0,
                step_s: 0.5
            }
        );
        let manifest = Manifest { folder: "models/default".into(), ..manifest };
        assert_eq!(manifest.verifier_folder(), Some("models/default/../v".into()));
    }

    /// Each fault names the file and the key.
    #[test]
    fn faults_name_file_and_key() {
        for (text, key) in [
            ("[model]\nnaem = 'x'", "naem"),
            ("[modle]\nname = 'x'", "modle"),
            ("[model]\nname = 3", "name"),
            ("[model]\nlabels = 'happy'", "labels"),
            ("[model]\nlabels = []", "model.labels"),
            ("[model]\nlabels = ['calm']", "model.labels"),
            ("[model]\nlabels = ['sad', 'sadness']", "model.labels"),
            ("[model]\nlabels = [' sad']", "model.labels"),
            ("[model]\ninstruction = ' '", "model.instruction"),
            ("[model]\nmax_new_tokens = 0", "model.max_new_tokens"),
            ("[model]\nmax_new_tokens = -1", "max_new_tokens"),
            ("[model]\nanswer = 'both'", "answer"),
            ("[verifier]\nthreshold = 1.5", "verifier.threshold"),
            ("[input]\nfit = 'crop'", "fit"),
            ("[input]\nface_margin = nan", "input.face_margin"),
            ("[input]\nface_shift = 2", "input.face_shift"),
            ("[input]\ndetail = 1", "input.detail"),
            ("[input]\nwindow_s = inf", "input.window_s"),
            ("[input]\nstep_s = 0", "input.step_s"),
            ("[files]\n'../model.safetensors' = 'x'", "files.\"../model"),
            ("[files]\n'/etc/passwd' = 'x'", "files.\"/etc"),
            ("[files]\n'a' = 'x'", "files.\"a\""),
            ("[model", "line 1"),
            ("name = 'x'\0", "line 1"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with("model/candor.toml: ") && error.contains(key), "{text}: {error}");
        }
        assert!(parse(&"[".repeat(100_000)).is_err());
        let folder = folder(&[("candor.toml", &"#".repeat(MOST_BYTES as usize + 1))]);
        assert!(matches!(Manifest::open(folder.path()), Err(ManifestError::TooLarge { .. })));
        fs::write(folder.path().join(FILE_NAME), b"\xff\xfe").unwrap();
        assert!(matches!(Manifest::open(folder.path()), Err(ManifestError::Io { .. })));
    }

    #[test]
    fn sealed_files_are_checked() {
        let text = "# kept\n[model]\nname = 'n' # too\n\n[files]\nold = 'not even a digest'\n\n[input]\ngrey = true\n";
        let good = text.replace("not even a digest", &"0".repeat(64));
        let files =
            [("candor.toml", good.as_str()), ("config.json", "abc"), ("tower/model \"1\".bin", ""), (".git", "x")];
        let folder = folder(&files);
        let path = folder.path();
        assert!(matches!(Manifest::open(path).unwrap().check_files(), Err(ManifestError::Missing { .. })));

        let sealed = Manifest::seal(path).unwrap();
        assert_eq!(sealed, Manifest::open(path).unwrap());
        assert_eq!(sealed.files["config.json"], "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(sealed.files.len(), 2);
        assert!(sealed.input.grey);
        sealed.check_files().unwrap();
        let text = fs::read_to_string(path.join(FILE_NAME)).unwrap();
        assert!(text.contains("# kept") && text.contains("# too") && !text.contains("old"), "{text}");
        Manifest::seal(path).unwrap();
        assert_eq!(text, fs::read_to_string(path.join(FILE_NAME)).unwrap(), "sealing again changes nothing");

        fs::write(path.join("extra"), "").unwrap();
        assert!(matches!(sealed.check_files(), Err(ManifestError::Unlisted { .. })));
        fs::remove_file(path.join("extra")).unwrap();
        fs::write(path.join("config.json"), "abd").unwrap();
        let error = sealed.check_files().unwrap_err();
        assert!(matches!(&error, ManifestError::Changed { path, .. } if path.ends_with("config.json")), "{error}");
        fs::remove_file(path.join("config.json")).unwrap();
        assert!(matches!(sealed.check_files(), Err(ManifestError::Missing { .. })));
    }

    #[test]
    fn identity_is_that_of_sha256sum() {
        // printf abc > a; printf '' > b; sha256sum a b | sha256sum
        let expected = "09c7e0b8a02d027d95ec0375a600ed4ad4d6b26a1c93f16d9150cab5fec761a6";
        let folder = folder(&[("a", "abc"), ("b", "")]);
        let unsealed = Manifest::open(folder.path()).unwrap();
        assert!(matches!(unsealed.check_files(), Err(ManifestError::Unsealed { .. })));
        assert_eq!(unsealed.identity().unwrap(), expected);
        assert_eq!(Manifest::seal(folder.path()).unwrap().identity().unwrap(), expected);
    }

    #[test]
    fn a_table_that_cannot_be_replaced_is_left_alone() {
        let digest = "0".repeat(64);
        let text = format!("files = {{ old = '{digest}' }}\n[model]\nname = 'n'\n");
        let folder = folder(&[("candor.toml", &text), ("a", "abc")]);
        assert!(Manifest::seal(folder.path()).is_err());
        assert_eq!(fs::read_to_string(folder.path().join(FILE_NAME)).unwrap(), text);
    }
}
