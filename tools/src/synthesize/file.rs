//! Writes a safetensors file tensor by tensor, so that no more than a chunk of it is ever in memory.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, ensure};
use half::f16;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::storage::{Fill, Record};

/// Values that are made at once.
const CHUNK: usize = 1 << 18;
/// What the data's place in the file is a multiple of, so that its pages' tensors begin at cache lines.
const ALIGNMENT: usize = 64;

/// Writes the tensors, filled from the seed, and returns the file's size in bytes.
pub(super) fn write(path: &Path, mut records: Vec<Record>, seed: u64) -> anyhow::Result<u64> {
    // The widest types first: without gaps, everything lies at multiples of its own size then.
    records.sort_by(|a, b| size(b.dtype).cmp(&size(a.dtype)).then_with(|| a.name.cmp(&b.name)));
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut end = 0u64;
    for record in &records {
        let start = end;
        end += record.bytes();
        let dtype = serde_json::to_value(record.dtype)?;
        let entry = json!({"dtype": dtype, "shape": record.shape, "data_offsets": [start, end]});
        ensure!(header.insert(record.name.clone(), entry).is_none(), "{} is laid down twice", record.name);
    }
    let mut text = Value::Object(header).to_string();
    let length = size_of::<u64>() + text.len();
    text.extend(std::iter::repeat_n(' ', length.next_multiple_of(ALIGNMENT) - length));
    let write = || -> io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(&(text.len() as u64).to_le_bytes())?;
        file.write_all(text.as_bytes())?;
        let mut chunk = Vec::new();
        for (stream, record) in records.iter().enumerate() {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(stream as u64);
            record.write(&mut random, &mut chunk, &mut file)?;
        }
        file.sync_all()
    };
    write().with_context(|| format!("{}", path.display()))?;
    Ok((size_of::<u64>() + text.len()) as u64 + end)
}

/// Bytes of a value.
fn size(dtype: Dtype) -> usize {
    match dtype {
        Dtype::I64 => 8,
        Dtype::F32 | Dtype::I32 => 4,
        Dtype::F16 => 2,
        // Of the others, only bytes are laid down.
        _ => 1,
    }
}

impl Record {
    fn values(&self) -> usize {
        self.shape.iter().product()
    }

    fn bytes(&self) -> u64 {
        (self.values() * size(self.dtype)) as u64
    }

    fn write(&self, random: &mut ChaCha8Rng, chunk: &mut Vec<u8>, file: &mut File) -> io::Result<()> {
        let mut left = self.values();
        while left > 0 {
            let count = left.min(CHUNK);
            chunk.clear();
            match self.fill {
                Fill::Numbers(numbers) => chunk.extend(numbers.iter().flat_map(|&n| (n as i64).to_le_bytes())),
                Fill::Words | Fill::Bytes => {
                    chunk.resize(count * size(self.dtype), 0);
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
            file.write_all(chunk)?;
            left -= count;
        }
        Ok(())
    }
}
