//! All parameters of a model in one flat slice, with a plan that says which tensor lies where. Gradients and
//! optimiser state use the same plan, so that they are slices too.

use candle_core::{DType, Device, Tensor};
use candor::weights::Checkpoint;
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Why parameters could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ParameterError {
    /// The file cannot be opened, or is no safetensors file.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: candle_core::Error,
    },
    /// A tensor is missing, or cannot be read as f32.
    #[error("{path}: tensor {name}: {source}")]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The cause.
        source: candle_core::Error,
    },
    /// A tensor has another shape than the configuration asks for.
    #[error("{path}: tensor {name} has shape {actual:?}, the configuration asks for {expected:?}")]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Shape asked for.
        expected: Vec<usize>,
        /// Shape there is.
        actual: Vec<usize>,
    },
    /// A tensor holds infinities or NaN.
    #[error("{path}: tensor {name} holds a value that is not finite")]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
}

/// How a tensor is treated by the optimiser.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Treatment {
    /// Whether weight decay applies (matrices: yes; norms, biases and positions: no).
    pub decay: bool,
    /// Factor on the learning rate.
    pub rate: f32,
}

/// One tensor's place.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Name in the checkpoint.
    pub name: String,
    /// Shape in the checkpoint.
    pub shape: Vec<usize>,
    /// Place in the flat slice.
    pub range: Range<usize>,
    /// Treatment by the optimiser.
    pub treatment: Treatment,
}

/// Which tensor lies where.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    entries: Vec<Entry>,
    len: usize,
}

impl Plan {
    /// Appends a tensor and returns its place.
    pub fn add(&mut self, name: impl Into<String>, shape: &[usize], treatment: Treatment) -> Range<usize> {
        let range = self.len..self.len + shape.iter().product::<usize>();
        self.len = range.end;
        self.entries.push(Entry { name: name.into(), shape: shape.to_vec(), range: range.clone(), treatment });
        range
    }

    /// Lets a tensor decay.
    pub fn decay(&mut self, name: &str) {
        self.entries.iter_mut().filter(|entry| entry.name == name).for_each(|entry| entry.treatment.decay = true);
    }

    /// Elements of all tensors.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The tensors in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Lowers the rate of matrices whose values are smaller than those of a common layer, and of their biases, in
    /// proportion: Adam's steps have one size, which would wreck weights that a folded layer scale has made small.
    pub fn scale_rates(&mut self, values: &[f32], wanted: impl Fn(&str) -> bool) {
        /// Deviation of a common layer's weights.
        const COMMON: f32 = 0.02;
        let mut factors = HashMap::new();
        for entry in self.entries.iter().filter(|entry| entry.shape.len() > 1) {
            let squares: f32 = values[entry.range.clone()].iter().map(|value| value * value).sum();
            let deviation = (squares / entry.range.len() as f32).sqrt();
            factors.insert(entry.name.trim_end_matches(".weight").to_owned(), (deviation / COMMON).clamp(0.05, 1.0));
        }
        for entry in self.entries.iter_mut().filter(|entry| wanted(&entry.name)) {
            let layer = entry.name.trim_end_matches(".weight").trim_end_matches(".bias");
            entry.treatment.rate *= factors.get(layer).copied().unwrap_or(1.0);
        }
    }

    /// Fills `values` from a safetensors file with the tensors that `wanted` accepts, under the names it gives.
    pub fn load(
        &self,
        path: &Path,
        values: &mut [f32],
        wanted: impl Fn(&str) -> Option<String>,
    ) -> Result<(), ParameterError> {
        let tensors = read_tensors(path)?;
        for entry in &self.entries {
            let Some(name) = wanted(&entry.name) else { continue };
            let tensor = |source| ParameterError::Tensor { path: path.into(), name: name.clone(), source };
            let Some(stored) = tensors.get(&name) else {
                return Err(tensor(candle_core::Error::Msg("it is missing".into())));
            };
            if stored.dims() != entry.shape {
                let (expected, actual) = (entry.shape.clone(), stored.dims().to_vec());
                return Err(ParameterError::Shape { path: path.into(), name, expected, actual });
            }
            let flat = stored.to_dtype(DType::F32).and_then(|t| t.flatten_all()).and_then(|t| t.to_vec1::<f32>());
            let flat = flat.map_err(tensor)?;
            if !flat.iter().all(|value| value.is_finite()) {
                return Err(ParameterError::NotFinite { path: path.into(), name });
            }
            values[entry.range.clone()].copy_from_slice(&flat);
        }
        Ok(())
    }

    /// As [`Plan::load`], from a checkpoint of any of the types that weights are stored in.
    pub fn fill(
        &self,
        checkpoint: &Checkpoint,
        values: &mut [f32],
        wanted: impl Fn(&str) -> Option<String>,
    ) -> anyhow::Result<()> {
        for entry in &self.entries {
            let Some(name) = wanted(&entry.name) else { continue };
            let tensor = checkpoint.tensor(&name)?;
            let path = || checkpoint.file_of(&name).to_path_buf();
            if tensor.shape() != entry.shape {
                let (expected, actual) = (entry.shape.clone(), tensor.shape().to_vec());
                return Err(ParameterError::Shape { path: path(), name, expected, actual }.into());
            }
            let own = tensor.to_f32();
            if !own.iter().all(|value| value.is_finite()) {
                return Err(ParameterError::NotFinite { path: path(), name }.into());
            }
            values[entry.range.clone()].copy_from_slice(&own);
        }
        Ok(())
    }

    /// The tensors that `wanted` accepts, under the names it gives, in `dtype`.
    pub fn tensors(
        &self,
        values: &[f32],
        dtype: DType,
        wanted: impl Fn(&str) -> Option<String>,
    ) -> candle_core::Result<HashMap<String, Tensor>> {
        let mut tensors = HashMap::new();
        for entry in &self.entries {
            if let Some(name) = wanted(&entry.name) {
                let data = values[entry.range.clone()].to_vec();
                let tensor = Tensor::from_vec(data, entry.shape.as_slice(), &Device::Cpu)?.to_dtype(dtype)?;
                tensors.insert(name, tensor);
            }
        }
        Ok(tensors)
    }
}

/// All tensors of a safetensors file.
pub fn read_tensors(path: &Path) -> Result<HashMap<String, Tensor>, ParameterError> {
    candle_core::safetensors::load(path, &Device::Cpu)
        .map_err(|source| ParameterError::File { path: path.into(), source })
}

/// Two slices of one buffer at once: `first` must lie before `second`.
pub fn two<'a>(values: &'a mut [f32], first: &Range<usize>, second: &Range<usize>) -> (&'a mut [f32], &'a mut [f32]) {
    let (head, tail) = values.split_at_mut(second.start);
    (&mut head[first.clone()], &mut tail[..second.len()])
}

/// Compares gradients with finite differences of `loss`, along a random direction within each tensor, so that every
/// element counts.
#[cfg(test)]
pub(crate) fn check_gradients(plan: &Plan, values: &mut [f32], gradients: &[f32], mut loss: impl FnMut(&[f32]) -> f64) {
    use rand::{Rng, SeedableRng};
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(23);
    for entry in plan.entries() {
        let direction: Vec<f32> = (0..entry.range.len()).map(|_| rng.random_range(-1.0..1.0)).collect();
        let length = direction.iter().map(|d| d * d).sum::<f32>().sqrt();
        let kept = values[entry.range.clone()].to_vec();
        let mut at = |shift: f32| {
            for ((value, kept), d) in values[entry.range.clone()].iter_mut().zip(&kept).zip(&direction) {
                *value = kept + shift * d / length;
            }
            loss(values)
        };
        let step = 4e-3;
        let slope = (at(step) - at(-step)) / f64::from(2.0 * step);
        values[entry.range.clone()].copy_from_slice(&kept);
        let along = gradients[entry.range.clone()].iter().zip(&direction).map(|(g, d)| g * d / length).sum::<f32>();
        let error = (slope - f64::from(along)).abs();
        assert!(error < 2e-3 + 0.02 * slope.abs(), "{}: {along} against {slope}", entry.name);
    }
}
