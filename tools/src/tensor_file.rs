//! Writes a safetensors file tensor by tensor, in any order, so that no more than a piece of it is ever in memory.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

/// What the data's place in the file is a multiple of, so that its pages' tensors begin at cache lines.
const ALIGNMENT: usize = 64;

/// A tensor that a file is to have.
#[derive(Clone, Debug, PartialEq)]
pub struct Declared {
    /// Its name.
    pub name: String,
    /// Its type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl Declared {
    /// Its bytes.
    fn bytes(&self) -> u64 {
        self.shape.iter().map(|&size| size as u64).product::<u64>() * self.dtype.bitsize() as u64 / 8
    }
}

/// Orders tensors as a file has them. Those whose size is a multiple of 64 bytes come first, so that without gaps they
/// begin at one too, where a GPU can read them in place; then the widest types, so that everything lies at multiples of its
/// own size.
pub fn order(a: &Declared, b: &Declared) -> std::cmp::Ordering {
    let rest = |tensor: &Declared| !tensor.bytes().is_multiple_of(ALIGNMENT as u64);
    rest(a).cmp(&rest(b)).then_with(|| b.dtype.bitsize().cmp(&a.dtype.bitsize())).then_with(|| a.name.cmp(&b.name))
}

/// A file that is being written.
pub struct TensorFile {
    path: PathBuf,
    file: File,
    /// Where the next byte of a tensor goes, and where its last one ends.
    places: HashMap<String, (u64, u64)>,
    bytes: u64,
}

impl TensorFile {
    /// Makes a file with room for these tensors.
    pub fn create(path: &Path, mut tensors: Vec<Declared>) -> anyhow::Result<TensorFile> {
        tensors.sort_by(order);
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
        let mut end = 0u64;
        let mut places = HashMap::new();
        for tensor in tensors {
            let start = end;
            end += tensor.bytes();
            let dtype = serde_json::to_value(tensor.dtype)?;
            let entry = json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end]});
            ensure!(header.insert(tensor.name.clone(), entry).is_none(), "{} is laid down twice", tensor.name);
            places.insert(tensor.name, (start, end));
        }
        let mut text = Value::Object(header).to_string();
        let length = size_of::<u64>() + text.len();
        text.extend(std::iter::repeat_n(' ', length.next_multiple_of(ALIGNMENT) - length));
        let create = || -> io::Result<File> {
            let mut file = File::create(path)?;
            file.write_all(&(text.len() as u64).to_le_bytes())?;
            file.write_all(text.as_bytes())?;
            Ok(file)
        };
        let file = create().with_context(|| format!("{}", path.display()))?;
        let data = (size_of::<u64>() + text.len()) as u64;
        places.values_mut().for_each(|(start, end)| (*start, *end) = (*start + data, *end + data));
        Ok(TensorFile { path: path.to_owned(), file, places, bytes: data + end })
    }

    /// Writes bytes of a tensor, behind those that were written of it before.
    pub fn write(&mut self, tensor: &str, bytes: &[u8]) -> anyhow::Result<()> {
        let (next, end) = self.places.get_mut(tensor).with_context(|| format!("{tensor} was not declared"))?;
        ensure!(*next + bytes.len() as u64 <= *end, "{tensor} has more bytes than were declared");
        let written = self.file.seek(SeekFrom::Start(*next)).and_then(|_| self.file.write_all(bytes));
        *next += bytes.len() as u64;
        written.with_context(|| format!("{}", self.path.display()))
    }

    /// Brings the file to the disk, whole, and returns its size in bytes.
    pub fn finish(self) -> anyhow::Result<u64> {
        let open = self.places.iter().find(|(_, (next, end))| next < end);
        ensure!(open.is_none(), "{} was not written to its end", open.map_or("", |(name, _)| name));
        self.file.sync_all().with_context(|| format!("{}", self.path.display()))?;
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use safetensors::SafeTensors;

    #[test]
    fn tensors_of_whole_lines_begin_at_lines_and_others_at_their_elements() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let declared = |name: &str, dtype, shape: &[usize]| Declared { name: name.into(), dtype, shape: shape.into() };
        let tensors = vec![
            declared("a", Dtype::I8, &[3]),
            declared("b", Dtype::F16, &[7]),
            declared("c", Dtype::F32, &[1]),
            declared("d", Dtype::I8, &[8, 16]),
            declared("e", Dtype::F16, &[32]),
        ];
        let file = TensorFile::create(&path, tensors).unwrap();
        let place = |name: &str| file.places[name].0;
        assert!(["d", "e"].iter().all(|name| place(name).is_multiple_of(64)));
        assert!(place("c").is_multiple_of(4) && place("b").is_multiple_of(2));
    }

    #[test]
    fn tensors_come_in_any_order_and_must_be_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let declared = |name: &str, dtype, shape: &[usize]| Declared { name: name.into(), dtype, shape: shape.into() };
        let tensors =
            vec![declared("a", Dtype::I8, &[3]), declared("b", Dtype::F16, &[2, 1]), declared("c", Dtype::F32, &[0])];
        let mut file = TensorFile::create(&path, tensors.clone()).unwrap();
        file.write("b", &[1, 2]).unwrap();
        file.write("a", &[7, 8, 9]).unwrap();
        file.write("b", &[3, 4]).unwrap();
        assert!(file.write("b", &[5]).unwrap_err().to_string().contains("more bytes"));
        assert!(file.write("d", &[5]).unwrap_err().to_string().contains("not declared"));
        let bytes = file.finish().unwrap();
        let read = std::fs::read(&path).unwrap();
        assert_eq!(read.len() as u64, bytes);
        let read = SafeTensors::deserialize(&read).unwrap();
        assert_eq!(
            (read.tensor("a").unwrap().data(), read.tensor("b").unwrap().data()),
            (&[7, 8, 9][..], &[1, 2, 3, 4][..])
        );
        let mut part = TensorFile::create(&path, tensors).unwrap();
        part.write("b", &[1, 2]).unwrap();
        assert!(part.finish().unwrap_err().to_string().contains("to its end"));
        assert!(
            TensorFile::create(&path, vec![declared("a", Dtype::I8, &[1]), declared("a", Dtype::I8, &[1])]).is_err()
        );
    }
}
