//! The header of a safetensors file: a length, then a JSON object of names, types, shapes and byte ranges.
//!
//! Everything in it is somebody else's claim. Nothing is believed before it is checked against the file's size, and
//! no memory is reserved by what it says.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::WeightsError;

/// The largest header that is read, as in the safetensors library.
const HEADER_LIMIT: u64 = 100_000_000;
/// The length before the header.
const LENGTH_BYTES: u64 = 8;
/// Free-text entries of the header that are no tensor.
const METADATA: &str = "__metadata__";

/// Where a tensor lies in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) name: String,
    /// The element type as written.
    pub(super) dtype: String,
    pub(super) shape: Vec<usize>,
    /// First byte, from the start of the file.
    pub(super) start: usize,
    /// Bytes.
    pub(super) len: usize,
}

#[derive(Deserialize)]
struct Claim {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// An object with its keys in the order of the file, repeated ones included.
pub(super) struct Pairs<T>(pub(super) Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Pairs<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Each<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Each<T> {
            type Value = Pairs<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs<T>, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Each(std::marker::PhantomData))
    }
}

/// What stands behind a key: a tensor or the metadata.
enum Item {
    Tensor(Claim),
    Metadata,
}

/// The header's object, told apart by key while it is read.
struct Items(Vec<(String, Item)>);

impl<'de> Deserialize<'de> for Items {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Each;
        impl<'de> Visitor<'de> for Each {
            type Value = Items;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Items, A::Error> {
                let mut items = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    let item = if key == METADATA {
                        map.next_value::<Pairs<String>>()?;
                        Item::Metadata
                    } else {
                        Item::Tensor(map.next_value()?)
                    };
                    items.push((key, item));
                }
                Ok(Items(items))
            }
        }
        deserializer.deserialize_map(Each)
    }
}

/// Bytes an element of a type takes, for the types that take whole bytes.
fn element_size(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" => 1,
        "U16" | "I16" | "F16" | "BF16" => 2,
        "U32" | "I32" | "F32" => 4,
        "U64" | "I64" | "F64" | "C64" => 8,
        _ => return None,
    })
}

/// Reads and checks the header of `file`, whose whole content is `bytes`. The tensors come back in the order of
/// their data, and cover it without overlap or hole.
pub(super) fn read(file: &Path, bytes: &[u8]) -> Result<Vec<Entry>, WeightsError> {
    let actual = bytes.len() as u64;
    let truncated = |needed| WeightsError::Truncated { file: file.to_owned(), needed, actual };
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or_else(|| truncated(LENGTH_BYTES))?;
    let length = u64::from_le_bytes(*length);
    if length > HEADER_LIMIT {
        return Err(WeightsError::HeaderSize { file: file.to_owned(), bytes: length, limit: HEADER_LIMIT });
    }
    let text = rest.get(..length as usize).ok_or_else(|| truncated(LENGTH_BYTES + length))?;
    let bad = |reason: String| WeightsError::Header { file: file.to_owned(), reason };
    let Items(items) = serde_json::from_slice(text).map_err(|e| bad(e.to_string()))?;

    let data_start = LENGTH_BYTES + length;
    let available = actual - data_start;
    let mut seen = HashSet::new();
    for (name, _) in &items {
        if !seen.insert(name.as_str()) {
            return Err(WeightsError::Duplicate { file: file.to_owned(), tensor: name.clone() });
        }
    }
    let mut entries = Vec::new();
    for (name, item) in items {
        let Item::Tensor(claim) = item else { continue };
        entries.push(check(file, name, claim, data_start, available)?);
    }
    entries.sort_by_key(|e| (e.start, e.len));

    let mut end = data_start as usize;
    let mut previous: Option<&Entry> = None;
    for entry in &entries {
        if entry.start < end {
            return Err(WeightsError::Overlap {
                file: file.to_owned(),
                first: previous.map(|e| e.name.clone()).unwrap_or_default(),
                second: entry.name.clone(),
            });
        }
        if entry.start > end {
            return Err(hole(file, end, entry.start));
        }
        end += entry.len;
        previous = Some(entry);
    }
    if end != bytes.len() {
        return Err(hole(file, end, bytes.len()));
    }
    Ok(entries)
}

fn hole(file: &Path, start: usize, end: usize) -> WeightsError {
    WeightsError::Hole { file: file.to_owned(), start: start as u64, end: end as u64 }
}

fn check(file: &Path, name: String, claim: Claim, data_start: u64, available: u64) -> Result<Entry, WeightsError> {
    let Claim { dtype, shape, data_offsets: (start, end) } = claim;
    let Some(size) = element_size(&dtype) else {
        return Err(WeightsError::UnknownType { file: file.to_owned(), tensor: name, dtype });
    };
    let dimensions: Option<Vec<usize>> = shape.iter().map(|&d| usize::try_from(d).ok()).collect();
    let needed = shape.iter().try_fold(size, |n, &d| n.checked_mul(d));
    let (Some(dimensions), Some(needed)) = (dimensions, needed) else {
        return Err(WeightsError::Overflow { file: file.to_owned(), tensor: name, dtype, shape });
    };
    if end > available || end.checked_sub(start) != Some(needed) {
        return Err(WeightsError::Range { file: file.to_owned(), tensor: name, start, end, needed, available });
    }
    // Both fit in memory: they lie inside a mapped file.
    Ok(Entry { name, dtype, shape: dimensions, start: (data_start + start) as usize, len: needed as usize })
}
