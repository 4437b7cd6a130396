//! Who read which tensor: every one is asked for with its shape, and those nobody asked for are reported.

use std::cell::RefCell;
use std::collections::HashSet;

use candor_kernels::HostTensor;

use super::{Checkpoint, WeightsError, quantisation};

/// How many names an error lists.
const NAMED: usize = 8;

/// A checkpoint while a model is built from it.
pub struct Inventory<'a> {
    checkpoint: &'a Checkpoint,
    taken: RefCell<HashSet<String>>,
}

impl<'a> Inventory<'a> {
    /// Nothing read so far.
    pub fn new(checkpoint: &'a Checkpoint) -> Self {
        Inventory { checkpoint, taken: RefCell::default() }
    }

    /// The tensors whose names start with `prefix` (empty: all).
    pub fn part(&self, prefix: &str) -> Part<'_> {
        Part { inventory: self, prefix: prefix.to_owned() }
    }

    /// Refuses the checkpoint if it holds tensors that were neither read nor are `unneeded` by their names.
    pub fn finish(&self, unneeded: impl Fn(&str) -> bool) -> Result<(), WeightsError> {
        let taken = self.taken.borrow();
        let left =
            |name: &&str| !taken.contains(*name) && !quantisation::is_scale(self.checkpoint, name) && !unneeded(name);
        let count = self.checkpoint.names().filter(left).count();
        if count == 0 {
            return Ok(());
        }
        let tensors = self.checkpoint.names().filter(left).take(NAMED).map(str::to_owned).collect();
        Err(WeightsError::Unexpected { folder: self.checkpoint.folder().to_owned(), count, tensors })
    }
}

/// The tensors of one part of a model, by the names they have inside it.
#[derive(Clone)]
pub struct Part<'a> {
    inventory: &'a Inventory<'a>,
    prefix: String,
}

impl<'a> Part<'a> {
    /// The part inside this one that is called `name`: `name.` is added to the prefix.
    pub fn under(&self, name: &str) -> Part<'a> {
        Part { inventory: self.inventory, prefix: format!("{}{name}.", self.prefix) }
    }

    /// Whether the tensor is there.
    pub fn has(&self, name: &str) -> bool {
        self.inventory.checkpoint.contains(&self.resolve(name))
    }

    /// The shape of a tensor, for the few sizes that config.json does not give.
    pub fn shape(&self, name: &str) -> Result<&'a [usize], WeightsError> {
        Ok(self.inventory.checkpoint.raw(&self.resolve(name))?.shape)
    }

    /// A tensor of the given shape, as a view of the mapping.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<HostTensor, WeightsError> {
        let checkpoint = self.inventory.checkpoint;
        let full = self.resolve(name);
        let actual = checkpoint.raw(&full)?.shape;
        if actual != shape {
            return Err(WeightsError::Shape {
                file: checkpoint.file_of(&full).to_owned(),
                tensor: full,
                expected: shape.to_vec(),
                actual: actual.to_vec(),
            });
        }
        let tensor = checkpoint.tensor(&full)?;
        self.inventory.taken.borrow_mut().insert(full);
        Ok(tensor)
    }

    /// The full name; BERT checkpoints from before PyTorch spell a layer norm's weight and bias `gamma` and `beta`.
    fn resolve(&self, name: &str) -> String {
        let full = format!("{}{name}", self.prefix);
        if self.inventory.checkpoint.contains(&full) {
            return full;
        }
        let old = match full.rsplit_once("LayerNorm.") {
            Some((before, "weight")) => format!("{before}LayerNorm.gamma"),
            Some((before, "bias")) => format!("{before}LayerNorm.beta"),
            _ => return full,
        };
        if self.inventory.checkpoint.contains(&old) { old } else { full }
    }
}
