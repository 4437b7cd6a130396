//! A file as memory. The only unsafe code of the runtime.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use memmap2::Mmap;

use super::WeightsError;

/// A whole file, mapped read-only: touching a byte brings in its page, nothing is copied.
pub(super) struct Mapping(Mmap);

impl Mapping {
    /// Maps a plain file that is not empty.
    pub(super) fn open(path: &Path) -> Result<Self, WeightsError> {
        let io = |source| WeightsError::Io { file: path.to_owned(), source };
        let file = open_plain(path)?;
        let bytes = file.metadata().map_err(io)?.len();
        if bytes < 8 {
            return Err(WeightsError::Truncated { file: path.to_owned(), needed: 8, actual: bytes });
        }
        // SAFETY: the mapping is read-only and private. Another process that shortens the file while it is mapped can
        // stop this one (SIGBUS); models are installed by replacing files, never by writing into them.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Ok(Mapping(map))
    }
}

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Reads a text file of at most `limit` bytes.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<Vec<u8>, WeightsError> {
    let io = |source| WeightsError::Io { file: path.to_owned(), source };
    let file = open_plain(path)?;
    let mut text = Vec::new();
    let bytes = file.take(limit + 1).read_to_end(&mut text).map_err(io)? as u64;
    if bytes > limit {
        return Err(WeightsError::TooLarge { file: path.to_owned(), bytes, limit });
    }
    Ok(text)
}

/// Opens a plain file. Looks before it opens, because opening a named pipe waits for its writer.
fn open_plain(path: &Path) -> Result<File, WeightsError> {
    let io = |source| WeightsError::Io { file: path.to_owned(), source };
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(WeightsError::NotAFile { file: path.to_owned() });
    }
    File::open(path).map_err(io)
}
