//! Fills a safetensors file from a seed, a chunk of a tensor at a time.

use std::path::Path;

use half::f16;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;

use super::storage::{Fill, Record};
use crate::tensor_file::{Declared, TensorFile, order};

/// Values that are made at once.
const CHUNK: usize = 1 << 18;

/// Writes the tensors, filled from the seed, and returns the file's size in bytes.
pub(super) fn write(path: &Path, mut records: Vec<Record>, seed: u64) -> anyhow::Result<u64> {
    records.sort_by(|a, b| order(&a.declared(), &b.declared()));
    let mut file = TensorFile::create(path, records.iter().map(Record::declared).collect())?;
    let mut chunk = Vec::new();
    for (stream, record) in records.iter().enumerate() {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(stream as u64);
        record.write(&mut random, &mut chunk, &mut file)?;
    }
    file.finish()
}

impl Record {
    fn values(&self) -> usize {
        self.shape.iter().product()
    }

    fn declared(&self) -> Declared {
        Declared { name: self.name.clone(), dtype: self.dtype, shape: self.shape.clone() }
    }

    fn write(&self, random: &mut ChaCha8Rng, chunk: &mut Vec<u8>, file: &mut TensorFile) -> anyhow::Result<()> {
        let mut left = self.values();
        while left > 0 {
            let count = left.min(CHUNK);
            chunk.clear();
            match self.fill {
                Fill::Numbers(numbers) => chunk.extend(numbers.iter().flat_map(|&n| (n as i64).to_le_bytes())),
                Fill::Words | Fill::Bytes => {
                    chunk.resize(count * self.dtype.bitsize() / 8, 0);
                    random.fill_bytes(chunk);
                    if self.fill == Fill::Bytes {
                        // -128 has no opposite and is not used.
                        chunk.iter_mut().filter(|byte| **byte == 0x80).for_each(|byte| *byte = 0x81);
                    }
                }
                Fill::Between(low, high) => {
                    let mut value = || low + (high - low) * (random.next_u32() >> 8) as f32 / (1 << 24) as f32;
                    match self.dtype {
                        Dtype::F16 => chunk.extend((0..count).flat_map(|_| f16::from_f32(value()).to_le_bytes())),
                        _ => chunk.extend((0..count).flat_map(|_| value().to_le_bytes())),
                    }
                }
            }
            file.write(&self.name, chunk)?;
            left -= count;
        }
        Ok(())
    }
}
