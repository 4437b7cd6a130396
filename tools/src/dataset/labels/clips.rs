//! Where the clips of a data set lie. Authors number them with or without leading zeros, in one folder or several, as video
//! files or as folders of pictures.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::{Path, PathBuf};

use super::super::extractor::pictures_of;
use super::{Fault, LabelFileError, ProblemKind};

/// What a video file's name ends in.
const VIDEOS: [&str; 7] = ["mp4", "avi", "mov", "mkv", "webm", "m4v", "mpg"];

/// Folders within the folder are searched to this depth.
const MOST_DEPTH: usize = 6;

/// Clips by key, see [`key`].
#[derive(Debug)]
pub(super) struct Clips {
    folder: PathBuf,
    /// One path, or the first two of several.
    found: HashMap<String, (PathBuf, Option<PathBuf>)>,
}

impl Clips {
    /// Searches a folder for clips.
    pub(super) fn find(folder: &Path) -> Result<Clips, LabelFileError> {
        let mut clips = Clips { folder: folder.into(), found: HashMap::new() };
        clips.search(folder, 0).map_err(|source| LabelFileError::Read { path: folder.into(), source })?;
        Ok(clips)
    }

    fn search(&mut self, folder: &Path, depth: usize) -> std::io::Result<()> {
        let mut paths =
            std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
        paths.sort_unstable();
        for path in paths {
            if path.is_dir() {
                if !pictures_of(&path)?.is_empty() {
                    self.add(path);
                } else if depth < MOST_DEPTH {
                    self.search(&path, depth + 1)?;
                }
            } else if has_video_extension(&path) {
                self.add(path);
            }
        }
        Ok(())
    }

    fn add(&mut self, path: PathBuf) {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return };
        match self.found.entry(key(name)) {
            Entry::Vacant(place) => _ = place.insert((path, None)),
            Entry::Occupied(mut place) => _ = place.get_mut().1.get_or_insert(path),
        }
    }

    /// The clip that a label file names, with its key.
    pub(super) fn get(&self, name: &str) -> Result<(String, &Path), Fault> {
        let key = key(name);
        match self.found.get(&key) {
            Some((path, None)) => Ok((key, path)),
            Some((path, Some(other))) => {
                let reason =
                    format!("clip {name:?} is both {} and {}; name one folder", path.display(), other.display());
                Err((ProblemKind::Absent, reason))
            }
            None => Err((ProblemKind::Absent, format!("there is no clip {name:?} in {}", self.folder.display()))),
        }
    }
}

/// What is the same for all spellings of a clip's name: no folders, no ending, no zeros before a number.
pub(super) fn key(name: &str) -> String {
    let name = name.trim();
    let name = name.rsplit(['/', '\\']).next().unwrap_or(name);
    let stem = match name.rsplit_once('.') {
        Some((stem, extension)) if VIDEOS.contains(&extension.to_ascii_lowercase().as_str()) => stem,
        _ => name,
    };
    let number = !stem.is_empty() && stem.bytes().all(|byte| byte.is_ascii_digit());
    match stem.trim_start_matches('0') {
        "" if number => "0".to_owned(),
        digits if number => digits.to_owned(),
        _ => stem.to_owned(),
    }
}

fn has_video_extension(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    VIDEOS.contains(&extension.to_ascii_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn spellings_of_a_name() {
        for name in ["7", "00007", "7.mp4", "00007.AVI", " part_3/7.mp4", "a\\07"] {
            assert_eq!(key(name), "7", "{name}");
        }
        for (name, expected) in
            [("000", "0"), ("", ""), ("..", ".."), ("sample_0012.avi", "sample_0012"), ("7.5", "7.5")]
        {
            assert_eq!(key(name), expected);
        }
    }

    #[test]
    fn clips_are_found_in_folders_and_as_folders() {
        let folder = tempfile::tempdir().unwrap();
        let make = |path: &str| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x").unwrap();
        };
        ["part_1/1.mp4", "part_2/00002.avi", "00003/10.jpg", "00003/9.jpg", "4.mp4", "b/004.mp4", "5.txt"]
            .into_iter()
            .for_each(make);
        let clips = Clips::find(folder.path()).unwrap();
        assert!(clips.get("00001").unwrap().1.ends_with("part_1/1.mp4"));
        assert!(clips.get("2.mp4").unwrap().1.ends_with("part_2/00002.avi"));
        let pictures = pictures_of(clips.get("3").unwrap().1).unwrap();
        assert!(pictures[0].ends_with("9.jpg") && pictures[1].ends_with("10.jpg"));
        assert!(clips.get("4").unwrap_err().1.contains("is both"));
        for absent in ["5", "../../etc/passwd", "", "\0"] {
            assert!(clips.get(absent).unwrap_err().1.contains("there is no clip"), "{absent:?}");
        }
        assert!(Clips::find(&folder.path().join("no")).unwrap_err().to_string().contains("cannot read"));
    }
}
