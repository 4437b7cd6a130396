//! What there is to see of each pair: a video as its file is, in ranges so that browsers can seek; pictures as their files
//! are; photographs of faces files as PNG. A request names a clip by its token, never by a path.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::Context;
use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::pairs::{Draw, Pair};
use super::server::Refusal;
use crate::dataset::{Dataset, FacesFiles, Media, pictures_of};
use crate::eval::{make_unique, photographs};

/// Pictures of a folder that are shown, spread over all of them.
const MOST_PICTURES: usize = 12;
/// Most of a file that one answer to a range holds; browsers then ask for the next. It bounds the memory taken.
const MOST_OF_RANGE: u64 = 1 << 20;
/// Files larger than this are served in ranges only.
const MOST_WHOLE: u64 = 64 << 20;
/// Endings of pictures, with their types.
const PICTURES: [(&str, &str); 7] = [
    ("png", "image/png"),
    ("jpg", "image/jpeg"),
    ("jpeg", "image/jpeg"),
    ("bmp", "image/bmp"),
    ("gif", "image/gif"),
    ("webp", "image/webp"),
    ("avif", "image/avif"),
];
/// Endings of videos, with the types under which browsers play them: QuickTime's files are MP4's forebears.
const VIDEOS: [(&str, &str); 7] = [
    ("mp4", "video/mp4"),
    ("m4v", "video/mp4"),
    ("mov", "video/mp4"),
    ("webm", "video/webm"),
    ("mkv", "video/x-matroska"),
    ("ogv", "video/ogg"),
    ("avi", "video/x-msvideo"),
];

/// How the page shows a clip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// One video.
    Video,
    /// One picture or more.
    Pictures,
}

/// A clip as the page gets it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Shown {
    kind: Kind,
    sources: Vec<String>,
}

/// The clips by the tokens that name them towards the page.
#[derive(Debug)]
pub struct Clips {
    draw: Draw,
    clips: HashMap<String, Clip>,
    faces: FacesFiles,
}

#[derive(Debug)]
enum Clip {
    Photograph { file: PathBuf, part: String, row: usize },
    Video(PathBuf),
    Pictures(Vec<PathBuf>),
}

/// The media of a data set by their ids.
#[derive(Debug, Default)]
pub struct Listed {
    media: HashMap<String, Media>,
    faces: FacesFiles,
}

impl Listed {
    /// The clips of a list, under the ids that `candor-tools eval` gives them.
    pub fn of_list(mut dataset: Dataset) -> Listed {
        make_unique(&mut dataset.items);
        let media = dataset.items.into_iter().map(|item| (item.id, item.media)).collect();
        Listed { media, faces: dataset.faces }
    }

    /// The photographs of one part of a faces file.
    pub fn of_faces(file: &Path, part: &str) -> anyhow::Result<Listed> {
        let mut listed = Listed::of_list(photographs(file, part)?);
        let rows: Vec<(String, Media)> = listed
            .media
            .values()
            // Records of before there were ids name the row alone.
            .filter_map(|media| match media {
                Media::Photograph { row, .. } => Some((row.to_string(), media.clone())),
                Media::Clip(_) => None,
            })
            .collect();
        listed.media.extend(rows);
        Ok(listed)
    }

    /// Whether there is a clip of this id.
    pub fn has(&self, id: &str) -> bool {
        self.media.contains_key(id)
    }
}

impl Clips {
    /// Looks at what kind of clip each pair is of.
    pub fn new(listed: Listed, pairs: &[Pair], draw: Draw) -> anyhow::Result<Clips> {
        let mut clips = HashMap::new();
        for pair in pairs {
            let media = listed.media.get(&pair.id).with_context(|| format!("there is no clip {:?}", pair.id))?;
            let clip = match media.clone() {
                Media::Photograph { file, part, row } => Clip::Photograph { file, part, row },
                Media::Clip(path) if path.is_dir() => {
                    let failed = || format!("cannot read {}", path.display());
                    Clip::Pictures(spread(pictures_of(&path).with_context(failed)?))
                }
                Media::Clip(path) if content_type(&path).starts_with("image/") => Clip::Pictures(vec![path]),
                Media::Clip(path) => Clip::Video(path),
            };
            clips.insert(draw.clip_token(&pair.id), clip);
        }
        Ok(Clips { draw, clips, faces: listed.faces })
    }

    /// How a pair's clip is shown.
    pub fn shown(&self, pair: &Pair) -> Shown {
        let token = self.draw.clip_token(&pair.id);
        let (kind, count) = match self.clips.get(&token) {
            Some(Clip::Video(_)) => (Kind::Video, 1),
            Some(Clip::Photograph { .. }) => (Kind::Pictures, 1),
            Some(Clip::Pictures(pictures)) => (Kind::Pictures, pictures.len()),
            None => (Kind::Pictures, 0),
        };
        Shown { kind, sources: (0..count).map(|number| format!("/clips/{token}/{number}")).collect() }
    }

    /// The video, or a picture of the clip.
    pub fn serve(&self, token: &str, number: usize, headers: &HeaderMap) -> Result<Response, Refusal> {
        let absent = || Refusal(StatusCode::NOT_FOUND, format!("there is no clip {token}/{number}; reload the page"));
        match (self.clips.get(token).ok_or_else(absent)?, number) {
            (Clip::Photograph { file, part, row }, 0) => self.photograph(file, part, *row),
            (Clip::Video(path), 0) => serve_file(path, headers),
            (Clip::Pictures(pictures), number) => serve_file(pictures.get(number).ok_or_else(absent)?, headers),
            _ => Err(absent()),
        }
    }

    fn photograph(&self, file: &Path, part: &str, row: usize) -> Result<Response, Refusal> {
        let failed = |error: String| {
            log::warn!("{}#{part}/{row} cannot be shown: {error}", file.display());
            Refusal(StatusCode::INTERNAL_SERVER_ERROR, "the photograph cannot be shown; see the program's log".into())
        };
        let faces = self.faces.part(file, part).map_err(|error| failed(error.to_string()))?;
        if row >= faces.len() {
            return Err(failed(format!("there are {} photographs", faces.len())));
        }
        let png = grey_png(faces.image(row), faces.side).map_err(|error| failed(error.to_string()))?;
        Ok(([(header::CONTENT_TYPE, "image/png")], png).into_response())
    }
}

/// At most [`MOST_PICTURES`], spread evenly, the first and the last among them.
fn spread(pictures: Vec<PathBuf>) -> Vec<PathBuf> {
    let (all, most) = (pictures.len(), MOST_PICTURES);
    if all <= most {
        return pictures;
    }
    (0..most).map(|place| pictures[place * (all - 1) / (most - 1)].clone()).collect()
}

/// Grey levels `[side, side]` as a PNG file.
fn grey_png(grey: &[u8], side: usize) -> Result<Vec<u8>, png::EncodingError> {
    let mut file = Vec::new();
    let side = u32::try_from(side).map_err(|_| png::EncodingError::LimitsExceeded)?;
    let mut encoder = png::Encoder::new(&mut file, side, side);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(grey)?;
    writer.finish()?;
    Ok(file)
}

fn content_type(path: &Path) -> &'static str {
    let ending = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let known = PICTURES.iter().chain(&VIDEOS).find(|(known, _)| *known == ending);
    known.map_or("application/octet-stream", |(_, content_type)| content_type)
}

/// A file, or the range of it that is asked for.
fn serve_file(path: &Path, headers: &HeaderMap) -> Result<Response, Refusal> {
    let failed = |error: std::io::Error| {
        log::warn!("cannot read {}: {error}", path.display());
        // The path is the owner's business; the page learns what kind of failure it is.
        Refusal(StatusCode::NOT_FOUND, format!("the clip cannot be read: {}", error.kind()))
    };
    let mut file = File::open(path).map_err(failed)?;
    let len = file.metadata().map_err(failed)?.len();
    let asked = headers.get(header::RANGE).and_then(|range| range.to_str().ok()).and_then(|range| parse(range, len));
    let common: [(HeaderName, String); 2] =
        [(header::CONTENT_TYPE, content_type(path).to_owned()), (header::ACCEPT_RANGES, "bytes".to_owned())];
    match asked {
        Some(Asked::Outside) => {
            let range = [(header::CONTENT_RANGE, format!("bytes */{len}"))];
            Ok((StatusCode::RANGE_NOT_SATISFIABLE, range, Body::empty()).into_response())
        }
        Some(Asked::Range { first, last }) => {
            let last = last.min(first.saturating_add(MOST_OF_RANGE - 1));
            file.seek(SeekFrom::Start(first)).map_err(failed)?;
            let mut bytes = Vec::new();
            file.take(last - first + 1).read_to_end(&mut bytes).map_err(failed)?;
            if bytes.is_empty() {
                return Err(failed(std::io::ErrorKind::UnexpectedEof.into()));
            }
            let last = first + bytes.len() as u64 - 1;
            let range = [(header::CONTENT_RANGE, format!("bytes {first}-{last}/{len}"))];
            Ok((StatusCode::PARTIAL_CONTENT, common, range, bytes).into_response())
        }
        None if len > MOST_WHOLE => Err(Refusal(
            StatusCode::BAD_REQUEST,
            format!("the clip has {len} bytes; ask for a range of at most {MOST_OF_RANGE}"),
        )),
        None => {
            let mut bytes = Vec::new();
            file.take(MOST_WHOLE).read_to_end(&mut bytes).map_err(failed)?;
            Ok((common, bytes).into_response())
        }
    }
}

/// A range that was asked for.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    /// Bytes `first` to `last`, both within the file.
    Range { first: u64, last: u64 },
    /// Nothing of the file.
    Outside,
}

/// Reads a `Range` header. `None` for what is no single range of bytes: such a header counts for nothing.
fn parse(range: &str, len: u64) -> Option<Asked> {
    let (first, last) = range.trim().strip_prefix("bytes=")?.split_once('-')?;
    let number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u64>().ok())?;
    let (first, last) = match (first, last) {
        ("", count) => (len.saturating_sub(number(count)?), len.checked_sub(1)),
        (first, "") => (number(first)?, len.checked_sub(1)),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return None;
            }
            (first, len.checked_sub(1).map(|end| last.min(end)))
        }
    };
    match last {
        Some(last) if first <= last => Some(Asked::Range { first, last }),
        _ => Some(Asked::Outside),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn ranges() {
        let range = |first, last| Some(Asked::Range { first, last });
        for (header, expected) in [
            ("bytes=0-", range(0, 99)),
            ("bytes=0-9", range(0, 9)),
            ("bytes=90-900", range(90, 99)),
            ("bytes=99-", range(99, 99)),
            ("bytes=-10", range(90, 99)),
            ("bytes=-1000", range(0, 99)),
            ("bytes=100-", Some(Asked::Outside)),
            ("bytes=100-200", Some(Asked::Outside)),
            ("bytes=-0", Some(Asked::Outside)),
            ("bytes=9-3", None),
            ("bytes=0-1,5-6", None),
            ("bytes=a-", None),
            ("bytes=-", None),
            ("bytes=+1-2", None),
            ("bytes=99999999999999999999-", None),
            ("lines=0-1", None),
        ] {
            assert_eq!(parse(header, 100), expected, "{header}");
        }
        assert_eq!(parse("bytes=0-", 0), Some(Asked::Outside));
    }

    #[test]
    fn pictures_are_spread_over_the_clip() {
        let pictures = |count: usize| (0..count).map(|i| PathBuf::from(i.to_string())).collect::<Vec<_>>();
        assert_eq!(spread(pictures(MOST_PICTURES)), pictures(MOST_PICTURES));
        let few = spread(pictures(100));
        assert_eq!(few.len(), MOST_PICTURES);
        assert_eq!((few[0].to_str(), few[MOST_PICTURES - 1].to_str()), (Some("0"), Some("99")));
        assert!(few.windows(2).all(|two| two[0] != two[1]));
    }

    #[test]
    fn photographs_become_png() {
        let grey: Vec<u8> = (0..64).map(|i| i * 3).collect();
        let file = grey_png(&grey, 8).unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().unwrap();
        let mut read = vec![0; 64];
        let info = reader.next_frame(&mut read).unwrap();
        assert_eq!((info.width, info.height, info.color_type), (8, 8, png::ColorType::Grayscale));
        assert_eq!(read, grey);
    }
}
