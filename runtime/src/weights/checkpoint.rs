//! The tensors of a model folder: one file, or shards with an index.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candor_kernels::scales::ScaleError;
use candor_kernels::tensor::{Keeper, TensorError};
use candor_kernels::{DType, HostTensor, Scales};
use serde::Deserialize;

use super::header::{self, Entry, Pairs};
use super::mapping::{Mapping, read_text};
use super::{WeightsError, quantisation};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The largest index that is read; the one of a 7B model has 60 kB.
const INDEX_LIMIT: u64 = 100_000_000;

struct File {
    path: PathBuf,
    mapping: Arc<Mapping>,
}

impl File {
    fn bytes(&self) -> &[u8] {
        (*self.mapping).as_ref()
    }
}

/// What opening reads besides the headers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Read {
    /// Scales of quantised weights: they are checked, and those of rows copied.
    Scales,
    /// Nothing: scales of rows are ones.
    Nothing,
}

/// Pages of mapped files that can be let go of.
pub(crate) struct Pages(Vec<(Arc<Mapping>, Range<usize>)>);

impl Pages {
    /// Lets the pages go that were brought in. They come back when they are used.
    pub(crate) fn let_go(&self) {
        self.0.iter().for_each(|(mapping, range)| mapping.let_go(range.clone()));
    }
}

struct Located {
    file: usize,
    entry: Entry,
    /// Scales of a quantised weight, checked.
    scales: Option<Scales>,
}

/// Mapped files with checked headers.
pub struct Checkpoint {
    folder: PathBuf,
    files: Vec<File>,
    tensors: BTreeMap<String, Located>,
}

/// A tensor of any element type, for inputs that are no weights.
#[derive(Debug, Clone, Copy)]
pub struct Raw<'a> {
    /// The element type as the header writes it.
    pub dtype: &'a str,
    /// The shape.
    pub shape: &'a [usize],
    /// The bytes, little-endian, at any alignment.
    pub bytes: &'a [u8],
}

#[derive(Deserialize)]
struct Index {
    weight_map: Pairs<String>,
}

impl Checkpoint {
    /// Maps the weights of a model folder: `model.safetensors`, or else the shards that
    /// `model.safetensors.index.json` names. Reads headers and row scales only.
    pub fn open(folder: &Path) -> Result<Self, WeightsError> {
        Self::open_reading(folder, Read::Scales)
    }

    /// As [`Checkpoint::open`], of headers alone: for questions of size. Its weights are not to be computed with.
    pub fn open_headers(folder: &Path) -> Result<Self, WeightsError> {
        Self::open_reading(folder, Read::Nothing)
    }

    fn open_reading(folder: &Path, read: Read) -> Result<Self, WeightsError> {
        let single = folder.join(SINGLE);
        if single.exists() {
            return Self::open_files(folder, vec![single])?.join_quantised(read);
        }
        let index = folder.join(INDEX);
        if !index.exists() {
            return Err(WeightsError::NoWeights { folder: folder.to_owned() });
        }
        Self::open_index(folder, &index, read)
    }

    /// Maps one safetensors file.
    pub fn open_file(path: &Path) -> Result<Self, WeightsError> {
        Self::open_files(path.parent().unwrap_or(Path::new("")), vec![path.to_owned()])?.join_quantised(Read::Scales)
    }

    fn open_index(folder: &Path, index: &Path, read: Read) -> Result<Self, WeightsError> {
        let text = read_text(index, INDEX_LIMIT)?;
        let Index { weight_map: Pairs(pairs) } = serde_json::from_slice(&text)
            .map_err(|e| WeightsError::Index { file: index.to_owned(), reason: e.to_string() })?;
        let mut listed: BTreeMap<String, String> = BTreeMap::new();
        let mut shards: Vec<PathBuf> = Vec::new();
        for (tensor, shard) in pairs {
            let plain = Path::new(&shard).file_name().is_some_and(|n| n == shard.as_str());
            if !plain || shard.contains('\\') {
                return Err(WeightsError::ShardPath { file: index.to_owned(), tensor, shard });
            }
            let path = folder.join(&shard);
            if !shards.contains(&path) {
                if !path.exists() {
                    return Err(WeightsError::ShardMissing { file: index.to_owned(), tensor, shard: path });
                }
                shards.push(path);
            }
            if listed.contains_key(&tensor) {
                return Err(WeightsError::Duplicate { file: index.to_owned(), tensor });
            }
            listed.insert(tensor, shard);
        }
        if shards.is_empty() {
            return Err(WeightsError::Index { file: index.to_owned(), reason: "weight_map is empty".into() });
        }
        let checkpoint = Self::open_files(folder, shards)?;
        for (tensor, shard) in &listed {
            let path = folder.join(shard);
            match checkpoint.tensors.get(tensor) {
                Some(located) if checkpoint.files[located.file].path == path => {}
                _ => {
                    let reason = "the index says that it lies here, and it does not";
                    return Err(WeightsError::ShardMismatch { file: path, tensor: tensor.clone(), reason });
                }
            }
        }
        if let Some((tensor, located)) = checkpoint.tensors.iter().find(|(name, _)| !listed.contains_key(*name)) {
            let file = checkpoint.files[located.file].path.clone();
            return Err(WeightsError::ShardMismatch {
                file,
                tensor: tensor.clone(),
                reason: "the index does not name it",
            });
        }
        checkpoint.join_quantised(read)
    }

    fn open_files(folder: &Path, paths: Vec<PathBuf>) -> Result<Self, WeightsError> {
        let mut files = Vec::with_capacity(paths.len());
        let mut tensors: BTreeMap<String, Located> = BTreeMap::new();
        for path in paths {
            let mapping = Mapping::open(&path)?;
            for entry in header::read(&path, (*mapping).as_ref())? {
                if tensors.contains_key(&entry.name) {
                    let reason = "another shard holds it too";
                    return Err(WeightsError::ShardMismatch { file: path, tensor: entry.name, reason });
                }
                tensors.insert(entry.name.clone(), Located { file: files.len(), entry, scales: None });
            }
            files.push(File { path, mapping });
        }
        Ok(Checkpoint { folder: folder.to_owned(), files, tensors })
    }

    /// Puts the tensors that a quantised weight is stored as together.
    fn join_quantised(mut self, read: Read) -> Result<Self, WeightsError> {
        for quantisation::Packed { entry, parts: [codes, shape] } in quantisation::packed(&self)? {
            self.tensors.remove(&shape);
            if let Some(Located { file, .. }) = self.tensors.remove(&codes) {
                self.tensors.insert(entry.name.clone(), Located { file, entry, scales: None });
            }
        }
        for (name, scales) in quantisation::pair_scales(&self, read)? {
            if let Some(weight) = self.tensors.get_mut(&name) {
                weight.scales = Some(scales);
            }
        }
        // Pages that were read for a look come with many neighbours; parts that are never used would keep them.
        self.files.iter().for_each(|file| file.mapping.let_go(0..file.bytes().len()));
        Ok(self)
    }

    /// The folder of the files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The mapped files.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|f| f.path.as_path())
    }

    /// Bytes of address space that the mappings take. Memory is taken page by page, when a weight is first used.
    pub fn mapped_bytes(&self) -> usize {
        self.files.iter().map(|f| f.bytes().len()).sum()
    }

    /// Bytes of the tensors whose names start with `prefix`, each at a multiple of 256 as in a GPU's memory.
    pub(crate) fn tensor_bytes(&self, prefix: &str) -> usize {
        let under = self.tensors.range(prefix.to_owned()..).take_while(|(name, _)| name.starts_with(prefix));
        under.map(|(_, tensor)| tensor.entry.len.next_multiple_of(256)).sum()
    }

    /// Every tensor's name, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether the tensor is there.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Whether any tensor's name starts with `prefix`.
    pub fn any_under(&self, prefix: &str) -> bool {
        self.tensors.range(prefix.to_owned()..).next().is_some_and(|(name, _)| name.starts_with(prefix))
    }

    /// The pages of the tensors whose names start with `prefix`.
    pub(crate) fn pages(&self, prefix: &str) -> Pages {
        let under = self.tensors.range(prefix.to_owned()..).take_while(|(name, _)| name.starts_with(prefix));
        let pages = under.map(|(_, Located { file, entry, .. })| {
            (self.files[*file].mapping.clone(), entry.start..entry.start + entry.len)
        });
        Pages(pages.collect())
    }

    /// The file that holds a tensor, or the folder where there is no such tensor.
    pub fn file_of(&self, name: &str) -> &Path {
        self.tensors.get(name).map_or(&self.folder, |t| &self.files[t.file].path)
    }

    /// A tensor as it lies there, of any type.
    pub fn raw(&self, name: &str) -> Result<Raw<'_>, WeightsError> {
        let Located { file, entry, .. } = self.located(name)?;
        // The header check has shown that the range lies in the file.
        let bytes = &self.files[*file].bytes()[entry.start..entry.start + entry.len];
        Ok(Raw { dtype: &entry.dtype, shape: &entry.shape, bytes })
    }

    /// A weight as a view of the mapping.
    pub fn tensor(&self, name: &str) -> Result<HostTensor, WeightsError> {
        let Located { file, entry, scales } = self.located(name)?;
        let File { path, mapping } = &self.files[*file];
        let dtype = match entry.dtype.as_str() {
            "F32" => DType::F32,
            "F16" => DType::F16,
            "BF16" => DType::BF16,
            "I8" => DType::I8,
            quantisation::FOUR_BITS => DType::I4,
            other => {
                return Err(WeightsError::WrongType {
                    file: path.clone(),
                    tensor: name.to_owned(),
                    dtype: other.to_owned(),
                });
            }
        };
        HostTensor::new(mapping.clone(), entry.start, entry.len, dtype, entry.shape.clone(), scales.clone()).map_err(
            |source| match source {
                TensorError::Misaligned { dtype } => {
                    WeightsError::Misaligned { file: path.clone(), tensor: name.to_owned(), dtype: dtype.to_string() }
                }
                source => WeightsError::View { file: path.clone(), tensor: name.to_owned(), source: Box::new(source) },
            },
        )
    }

    /// Where a tensor lies.
    pub(super) fn entry(&self, name: &str) -> Result<&Entry, WeightsError> {
        Ok(&self.located(name)?.entry)
    }

    /// A tensor as the scales of groups, a view of the mapping.
    pub(super) fn scales(
        &self,
        name: &str,
        dtype: DType,
        group: usize,
        rows: usize,
        per_row: usize,
    ) -> Result<Scales, ScaleError> {
        let Some(Located { file, entry, .. }) = self.tensors.get(name) else {
            return Err(ScaleError::Bytes(dtype));
        };
        Scales::groups(self.files[*file].mapping.clone(), entry.start, dtype, group, rows, per_row)
    }

    fn located(&self, name: &str) -> Result<&Located, WeightsError> {
        self.tensors
            .get(name)
            .ok_or_else(|| WeightsError::Missing { folder: self.folder.clone(), tensor: name.to_owned() })
    }
}
