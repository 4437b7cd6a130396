//! A file as memory. The only unsafe code of the runtime.

use std::fs::{File, Metadata};
use std::io::Read;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use candor_kernels::tensor::Keeper;
use memmap2::Mmap;

use super::WeightsError;

/// A whole file, mapped read-only: touching a byte brings in its page, nothing is copied.
pub(crate) struct Mapping(Mmap);

impl Mapping {
    /// Maps a plain file that is not empty. Threads that open the same model share the mapping: the system counts the
    /// pages of two mappings of one file twice, and so would a plan of memory have to.
    pub(super) fn open(path: &Path) -> Result<Arc<Self>, WeightsError> {
        static OPEN: Mutex<Vec<(Identity, Weak<Mapping>)>> = Mutex::new(Vec::new());
        let io = |source| WeightsError::Io { file: path.to_owned(), source };
        let file = open_plain(path)?;
        let identity = identity(&file.metadata().map_err(io)?);
        // What a thread that panicked has left is whole: an entry goes in when its file is mapped.
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|(_, mapping)| mapping.strong_count() > 0);
        let shared = open.iter().find(|(known, _)| identity.is_some() && *known == identity);
        if let Some(mapping) = shared.and_then(|(_, mapping)| mapping.upgrade()) {
            return Ok(mapping);
        }
        let mapping = Arc::new(Mapping::of(&file, path)?);
        open.push((identity, Arc::downgrade(&mapping)));
        Ok(mapping)
    }

    fn of(file: &File, path: &Path) -> Result<Self, WeightsError> {
        let io = |source| WeightsError::Io { file: path.to_owned(), source };
        let bytes = file.metadata().map_err(io)?.len();
        if bytes < 8 {
            return Err(WeightsError::Truncated { file: path.to_owned(), needed: 8, actual: bytes });
        }
        // SAFETY: the mapping is read-only and private. Another process that shortens the file while it is mapped can
        // stop this one (SIGBUS); models are installed by replacing files, never by writing into them.
        let map = unsafe { Mmap::map(file) }.map_err(io)?;
        Ok(Mapping(map))
    }
}

/// A file and its content: device, inode, length, and the time of the last change in seconds and nanoseconds. `None` where
/// the system does not say.
type Identity = Option<(u64, u64, u64, i64, i64)>;

#[cfg(unix)]
fn identity(about: &Metadata) -> Identity {
    use std::os::unix::fs::MetadataExt;
    Some((about.dev(), about.ino(), about.size(), about.mtime(), about.mtime_nsec()))
}

#[cfg(not(unix))]
fn identity(_: &Metadata) -> Identity {
    None
}

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Keeper for Mapping {
    fn is_mapping(&self) -> bool {
        true
    }

    /// Lets go of the pages that `range` touches. They are read from the file again when they are used.
    fn let_go(&self, range: Range<usize>) {
        #[cfg(unix)]
        {
            let end = range.end.min(self.0.len());
            let (start, len) = (range.start.min(end), end.saturating_sub(range.start));
            // SAFETY: the mapping is read-only and of a file, so a page that comes back holds what it held. The range lies in
            // the mapping.
            let advised = unsafe { self.0.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, len) };
            if let Err(error) = advised {
                log::debug!("pages stay where they are: {error}");
            }
        }
        #[cfg(not(unix))]
        let _ = range;
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_file_is_mapped_once_and_another_of_its_name_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        std::fs::write(&path, b"12345678").unwrap();
        let first = Mapping::open(&path).unwrap();
        assert!(cfg!(not(unix)) || Arc::ptr_eq(&first, &Mapping::open(&path).unwrap()));
        let next = folder.path().join("next");
        std::fs::write(&next, b"87654321").unwrap();
        std::fs::rename(&next, &path).unwrap();
        let second = Mapping::open(&path).unwrap();
        assert_eq!(((*first).as_ref(), (*second).as_ref()), (&b"12345678"[..], &b"87654321"[..]));
    }
}
