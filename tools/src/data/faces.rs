//! The labelled face photographs a user downloads: one safetensors file with a part for training and one for
//! validation. Everything is checked here, so that what stands behind may index freely.

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

use super::rationale::Cue;

/// Why a faces file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FacesError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file is no sound safetensors file.
    #[error("{path} is no sound safetensors file: {source}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: safetensors::SafeTensorError,
    },
    /// A tensor is not there, so the part is misspelt or the file is of another data set.
    #[error("{path} has no tensor {tensor}; parts in it: {parts}")]
    Missing {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Prefixes that have images.
        parts: String,
    },
    /// A tensor has another element type or shape than it must have.
    #[error("{path}: {tensor} is {actual}, expected {expected}")]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What it is.
        actual: String,
        /// What it must be.
        expected: String,
    },
    /// The metadata that names classes and cues is absent or does not hold what is needed.
    #[error("{path}: metadata `{key}` {reason}")]
    Metadata {
        /// The file.
        path: PathBuf,
        /// The entry.
        key: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A value is outside its range.
    #[error("{path}: {tensor}, row {row}: {reason}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The photograph.
        row: usize,
        /// What is wrong.
        reason: String,
    },
}

/// One part (`train`, `val`, …) of a faces file.
#[derive(Debug)]
pub struct Faces {
    /// Names of the classes, in the order of the labels.
    pub classes: Vec<String>,
    /// Pixels of a side.
    pub side: usize,
    /// Class of each photograph, always below `classes.len()`.
    pub labels: Vec<u8>,
    /// Measured cues of each photograph in the order of [`Cue::ALL`], or nothing where they could not be measured.
    pub cues: Vec<Option<[f32; Cue::COUNT]>>,
    images: Vec<u8>,
}

impl Faces {
    /// Reads `PART.images` u8 `[n, side, side]`, `PART.labels` u8 `[n]`, `PART.cues` f32 `[n, cues]` and
    /// `PART.cues_valid` u8 `[n]`; the metadata names `classes` and `cues`.
    pub fn open(path: &Path, part: &str) -> Result<Faces, FacesError> {
        let bytes = std::fs::read(path).map_err(|source| FacesError::Read { path: path.into(), source })?;
        Faces::parse(path, &bytes, part)
    }

    fn parse(path: &Path, bytes: &[u8], part: &str) -> Result<Faces, FacesError> {
        let format = |source| FacesError::Format { path: path.into(), source };
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(format)?;
        let file = SafeTensors::deserialize(bytes).map_err(format)?;
        let list = |key: &'static str| {
            let text = header.metadata().as_ref().and_then(|m| m.get(key)).ok_or_else(|| FacesError::Metadata {
                path: path.into(),
                key,
                reason: "is missing".into(),
            })?;
            Ok(text.split(',').map(|name| name.trim().to_string()).collect::<Vec<_>>())
        };
        let (classes, cue_names) = (list("classes")?, list("cues")?);
        if classes.len() > usize::from(u8::MAX) || classes.iter().any(String::is_empty) {
            let reason = format!("must name 1 to 255 classes, not {classes:?}");
            return Err(FacesError::Metadata { path: path.into(), key: "classes", reason });
        }
        let mut columns = [0; Cue::COUNT];
        for (cue, column) in Cue::ALL.into_iter().zip(&mut columns) {
            *column = cue_names.iter().position(|name| name == cue.name()).ok_or_else(|| FacesError::Metadata {
                path: path.into(),
                key: "cues",
                reason: format!("does not name {}", cue.name()),
            })?;
        }

        let tensor = |name: &str, dtype: Dtype, shape: &[Option<usize>]| {
            let full = format!("{part}.{name}");
            let view = file.tensor(&full).map_err(|_| FacesError::Missing {
                path: path.into(),
                tensor: full.clone(),
                parts: parts(&file),
            })?;
            let fits = view.dtype() == dtype
                && view.shape().len() == shape.len()
                && view.shape().iter().zip(shape).all(|(&have, want)| want.is_none_or(|w| w == have));
            if !fits {
                let wanted: Vec<String> = shape.iter().map(|d| d.map_or("n".into(), |d| d.to_string())).collect();
                return Err(FacesError::Shape {
                    path: path.into(),
                    tensor: full,
                    actual: format!("{:?}{:?}", view.dtype(), view.shape()),
                    expected: format!("{dtype:?}[{}]", wanted.join(", ")),
                });
            }
            Ok(view)
        };
        let images = tensor("images", Dtype::U8, &[None, None, None])?;
        let (n, side) = (images.shape()[0], images.shape()[1]);
        let images = tensor("images", Dtype::U8, &[Some(n), Some(side), Some(side)])?;
        if n == 0 || side == 0 {
            return Err(FacesError::Shape {
                path: path.into(),
                tensor: format!("{part}.images"),
                actual: format!("U8[{n}, {side}, {side}]"),
                expected: "at least one photograph of at least one pixel".into(),
            });
        }
        let labels = tensor("labels", Dtype::U8, &[Some(n)])?;
        let values = tensor("cues", Dtype::F32, &[Some(n), Some(cue_names.len())])?;
        let valid = tensor("cues_valid", Dtype::U8, &[Some(n)])?;

        let bad = |name: &str, row, reason: String| FacesError::Value {
            path: path.into(),
            tensor: format!("{part}.{name}"),
            row,
            reason,
        };
        let labels = labels.data().to_vec();
        if let Some(row) = labels.iter().position(|&l| usize::from(l) >= classes.len()) {
            return Err(bad("labels", row, format!("label {} of {} classes", labels[row], classes.len())));
        }
        let mut cues = Vec::with_capacity(n);
        let rows = values.data().chunks_exact(4 * cue_names.len());
        for (row, (line, &valid)) in rows.zip(valid.data()).enumerate() {
            let at = |c: usize| f32::from_le_bytes([line[4 * c], line[4 * c + 1], line[4 * c + 2], line[4 * c + 3]]);
            cues.push(match valid {
                0 => None,
                1 => Some(columns.map(at)),
                other => return Err(bad("cues_valid", row, format!("{other} is neither 0 nor 1"))),
            });
            if cues[row].is_some_and(|c| c.iter().any(|v| !v.is_finite())) {
                return Err(bad("cues", row, "a cue marked valid is not finite".into()));
            }
        }
        Ok(Faces { classes, side, labels, cues, images: images.data().to_vec() })
    }

    /// Photographs.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is no photograph (never so for an opened file).
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Grey values of one photograph, `[side, side]`. `index` is below [`Faces::len`].
    pub fn image(&self, index: usize) -> &[u8] {
        let size = self.side * self.side;
        &self.images[index * size..(index + 1) * size]
    }

    /// The class name of one photograph.
    pub fn label(&self, index: usize) -> &str {
        &self.classes[usize::from(self.labels[index])]
    }
}

fn parts(file: &SafeTensors<'_>) -> String {
    let mut parts: Vec<&str> = file.names().into_iter().filter_map(|n| n.strip_suffix(".images")).collect();
    parts.sort_unstable();
    if parts.is_empty() { "none".into() } else { parts.join(", ") }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::HashMap;

    use safetensors::tensor::TensorView;

    use super::*;

    /// A faces file as bytes, each tensor of the part `val` replaceable by another.
    pub(crate) fn file(n: usize, change: &[(&str, Dtype, Vec<usize>, Vec<u8>)], meta: &[(&str, &str)]) -> Vec<u8> {
        let cues: Vec<u8> = (0..n * 9).flat_map(|i| (i as f32 * 0.1 - 1.0).to_le_bytes()).collect();
        let mut tensors = vec![
            ("val.images", Dtype::U8, vec![n, 4, 4], (0..n * 16).map(|i| i as u8).collect::<Vec<u8>>()),
            ("val.labels", Dtype::U8, vec![n], (0..n).map(|i| (i % 7) as u8).collect()),
            ("val.cues", Dtype::F32, vec![n, 9], cues),
            ("val.cues_valid", Dtype::U8, vec![n], (0..n).map(|i| (i % 2) as u8).collect()),
        ];
        for (name, dtype, shape, data) in change {
            tensors.retain(|t| t.0 != *name);
            if !shape.is_empty() {
                tensors.push((name, *dtype, shape.clone(), data.clone()));
            }
        }
        let names: Vec<&str> = Cue::ALL.iter().map(|c| c.name()).collect();
        let mut metadata = HashMap::from([
            ("classes".to_string(), "angry,disgust,fear,happy,neutral,sad,surprise".to_string()),
            ("cues".to_string(), names.join(",")),
        ]);
        for (key, value) in meta {
            metadata.insert(key.to_string(), value.to_string());
        }
        let views: Vec<_> = tensors
            .iter()
            .map(|(name, dtype, shape, data)| (*name, TensorView::new(*dtype, shape.clone(), data).unwrap()))
            .collect();
        safetensors::serialize(views, Some(metadata)).unwrap()
    }

    fn parse(bytes: &[u8]) -> Result<Faces, FacesError> {
        Faces::parse(Path::new("f.safetensors"), bytes, "val")
    }

    #[test]
    fn reads_a_part() {
        let faces = parse(&file(5, &[], &[])).unwrap();
        assert_eq!((faces.len(), faces.side, faces.label(3)), (5, 4, "happy"));
        assert_eq!(faces.image(1), (16..32).collect::<Vec<u8>>());
        assert_eq!(faces.cues[0], None);
        assert!((faces.cues[1].unwrap()[2] - 0.1).abs() < 1e-6);
    }

    #[test]
    fn cues_follow_the_names_in_the_metadata() {
        let names: Vec<&str> = Cue::ALL.iter().rev().map(|c| c.name()).collect();
        let faces = parse(&file(2, &[], &[("cues", &names.join(","))])).unwrap();
        assert!((faces.cues[1].unwrap()[8] - (-0.1)).abs() < 1e-6);
    }

    #[test]
    fn broken_files_are_errors_that_name_the_tensor() {
        let cases: Vec<(Vec<u8>, &str)> = vec![
            (file(3, &[("val.labels", Dtype::F32, vec![3], vec![0; 12])], &[]), "val.labels is F32[3]"),
            (file(3, &[("val.labels", Dtype::U8, vec![2], vec![0; 2])], &[]), "val.labels is U8[2]"),
            (file(3, &[("val.images", Dtype::U8, vec![3, 4, 5], vec![0; 60])], &[]), "val.images is U8[3, 4, 5]"),
            (file(3, &[("val.images", Dtype::U8, vec![48], vec![0; 48])], &[]), "val.images is U8[48]"),
            (file(3, &[("val.images", Dtype::U8, vec![0, 4, 4], vec![])], &[]), "at least one photograph"),
            (file(3, &[("val.cues", Dtype::F32, vec![3, 8], vec![0; 96])], &[]), "val.cues is F32[3, 8]"),
            (file(3, &[("val.cues_valid", Dtype::U8, vec![], vec![])], &[]), "no tensor val.cues_valid"),
            (file(3, &[("val.labels", Dtype::U8, vec![3], vec![0, 7, 0])], &[]), "label 7 of 7 classes"),
            (file(3, &[("val.cues_valid", Dtype::U8, vec![3], vec![0, 1, 2])], &[]), "neither 0 nor 1"),
            (file(3, &[("val.cues", Dtype::F32, vec![3, 9], vec![0xff; 108])], &[]), "not finite"),
            (file(3, &[], &[("cues", "brow_gap")]), "does not name inner_brow_height"),
            (file(3, &[], &[("classes", "")]), "must name 1 to 255"),
            (b"not safetensors at all".to_vec(), "no sound safetensors"),
            (Vec::new(), "no sound safetensors"),
            (u64::MAX.to_le_bytes().to_vec(), "no sound safetensors"),
        ];
        for (bytes, message) in cases {
            let error = parse(&bytes).unwrap_err().to_string();
            assert!(error.contains(message), "{error:?} lacks {message:?}");
        }
        let whole = file(3, &[], &[]);
        for cut in [1, 8, 9, whole.len() / 2, whole.len() - 1] {
            parse(&whole[..cut]).unwrap_err();
        }
        let error = Faces::parse(Path::new("f"), &whole, "test").unwrap_err().to_string();
        assert!(error.contains("parts in it: val"), "{error}");
        assert!(Faces::open(Path::new("/nonexistent/f"), "val").unwrap_err().to_string().contains("/nonexistent/f"));
    }
}
