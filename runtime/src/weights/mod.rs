//! Memory-mapped safetensors, checked before use.
//!
//! [`Checkpoint::open`] maps a model folder's files and checks their headers; [`Part`] hands a stage of the model its
//! tensors as views of the mapping; [`Inventory::finish`] refuses a file with tensors that nobody read. What is
//! missing is an error: no weight is ever filled in.

mod checkpoint;
mod error;
mod header;
mod inventory;
mod mapping;
mod quantisation;
#[cfg(test)]
mod tests;

pub(crate) use checkpoint::Pages;
pub use checkpoint::{Checkpoint, Raw};
pub use error::WeightsError;
pub use inventory::{Inventory, Part};
pub(crate) use mapping::read_text;
pub use quantisation::check_quantisation;
