#![allow(clippy::unwrap_used)]
use std::fs;

use tempfile::TempDir;

use super::*;
use crate::data::faces::tests::file as faces_file;

/// A folder with two clips, a faces file with five photographs in the part `val`, and a data set.
fn folder(data: impl AsRef<[u8]>) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("clips")).unwrap();
    for name in ["clips/1.mp4", "clips/2.mp4"] {
        fs::write(folder.path().join(name), name).unwrap();
    }
    fs::write(folder.path().join("faces.safetensors"), faces_file(5, &[], &[])).unwrap();
    let path = folder.path().join("data.json");
    fs::write(&path, data).unwrap();
    (folder, path)
}

fn problems(data: impl AsRef<[u8]>) -> Vec<(usize, ProblemKind, String)> {
    let (_folder, path) = folder(data);
    match Dataset::open(&path, None, false).unwrap_err() {
        DatasetError::Bad { problems, .. } => {
            assert!(problems.0.iter().all(|problem| problem.file == path));
            problems.0.into_iter().map(|problem| (problem.entry, problem.kind, problem.reason)).collect()
        }
        other => panic!("{other}"),
    }
}

#[test]
fn lines_and_lists_are_read_alike() {
    let columns = r#"{"video": "clips/1.mp4", "prompt": "<video>Which?", "solution": "Happy"}"#;
    let turns = r#"{"video": "clips/2.mp4", "conversations": [{"from": "human", "value": "<video>\n<audio>\nWhich?"},
        {"from": "gpt", "value": "<think>He frowns.</think>\n<answer>angry</answer>"}]}"#;
    let list = format!("\u{feff} [{columns},\r\n{turns}]");
    let lines = format!("\u{feff}\n{columns}\r\n\n  {}\r\n", turns.replace('\n', " "));
    for (data, numbers) in [(list, [1, 2]), (lines, [2, 4])] {
        let (folder, path) = folder(&data);
        let dataset = Dataset::open(&path, None, false).unwrap();
        assert_eq!(dataset.problems, []);
        let [first, second] = dataset.items.as_slice() else { panic!("{:?}", dataset.items) };
        assert_eq!([first.line, second.line], numbers);
        assert_eq!(
            (first.id.as_str(), first.label.as_str(), first.rationale.as_deref()),
            ("clips/1.mp4", "Happy", None)
        );
        assert_eq!(first.media, Media::Clip(folder.path().join("clips/1.mp4")));
        assert_eq!((first.emotion, second.emotion), (Emotion::Happiness, Emotion::Anger));
        assert_eq!((first.prompt.as_deref(), second.prompt.as_deref()), (Some("Which?"), Some("Which?")));
        assert_eq!(second.rationale.as_deref(), Some("He frowns."));
        assert_eq!(dataset.cues(first), None);
    }
}

#[test]
fn photographs_have_cues() {
    let lines = [1, 2, 4].map(|row| format!(r#"{{"video": "faces.safetensors#val/{row}", "solution": "sad"}}"#));
    let (folder, path) = folder(lines.join("\n"));
    let dataset = Dataset::open(&path, None, false).unwrap();
    let file = folder.path().join("faces.safetensors");
    assert_eq!(dataset.items[2].media, Media::Photograph { file: file.clone(), part: "val".into(), row: 4 });
    assert_eq!(dataset.items[2].media.to_string(), format!("{}#val/4", file.display()));
    assert!((dataset.cues(&dataset.items[0]).unwrap()[2] - 0.1).abs() < 1e-6);
    assert_eq!(dataset.cues(&dataset.items[1]), None, "every second photograph is measured");
    // Read once and shared.
    let again = dataset.faces.clone();
    assert!(Arc::ptr_eq(&dataset.faces.part(&file, "val").unwrap(), &again.part(&file, "val").unwrap()));
}

#[test]
fn clips_are_looked_for_in_the_media_root() {
    let (folder, path) = folder(r#"[{"video": "1.mp4", "solution": "sad"}]"#);
    assert_eq!(Dataset::open(&path, Some(&folder.path().join("clips")), false).unwrap().items.len(), 1);
    let error = Dataset::open(&path, None, false).unwrap_err().to_string();
    assert!(error.contains("1 absent file") && error.contains("entry 1: there is no"), "{error}");
    // A path out of the folder is the user's to give; what is not there is named.
    let outside = problems(r#"{"video": "../../no/such.mp4", "solution": "sad"}"#);
    assert!(outside[0].2.contains("../../no/such.mp4"), "{outside:?}");
}

#[test]
fn every_bad_entry_is_listed() {
    use ProblemKind::{Absent, Duplicate, Form, Label};
    let lines: Vec<(&str, Option<(ProblemKind, &str)>)> = vec![
        (r#"{"id": "a", "video": "clips/1.mp4", "solution": "sad"}"#, None),
        (r#"{"id": "a", "video": "clips/2.mp4", "solution": "sad"}"#, Some((Duplicate, "entry 1"))),
        (r#"{"video": "clips/1.mp4", "solution": "sad"}"#, None),
        (r#"{"video": "clips/1.mp4", "solution": "happy"}"#, None),
        (r#"{"video": "clips/3.mp4", "solution": "sad"}"#, Some((Absent, "clips/3.mp4"))),
        (r#"{"video": "clips/1.mp4", "solution": "bored"}"#, Some((Label, "\"bored\""))),
        (r#"{"video": "clips/1.mp4", "solution": "sad\u0000"}"#, Some((Label, "no known emotion"))),
        (r#"{"video": "clips/1.mp4\u0000", "solution": "sad"}"#, Some((Form, "no path"))),
        (r#"{"video": "faces.safetensors", "solution": "sad"}"#, Some((Form, "names no photograph"))),
        (r#"{"video": "faces.safetensors#val/x", "solution": "sad"}"#, Some((Form, "#PART/ROW"))),
        (r#"{"video": "faces.safetensors#val/99999999999999999999", "solution": "sad"}"#, Some((Form, "#PART/ROW"))),
        (r#"{"video": "faces.safetensors#val/5", "solution": "sad"}"#, Some((Absent, "0 to 4 in val, no 5"))),
        (r#"{"video": "faces.safetensors#test/0", "solution": "sad"}"#, Some((Absent, "parts in it: val"))),
        (r#"{"video": "other.safetensors#val/0", "solution": "sad"}"#, Some((Absent, "other.safetensors"))),
        (r#"{"video": "clips/1.mp4", "solution": 1e999}"#, Some((Form, "out of range"))),
        (r#"{"video": "clips/1.mp4", "solution": 12345678901234567890123}"#, Some((Form, "a number"))),
        (r#"{"video": "clips/1.mp4", "solution": "sad""#, Some((Form, "is no JSON"))),
        ("\"\u{0}\"", Some((Form, "is no JSON"))),
        ("nonsense", Some((Form, "is no JSON"))),
        ("null", Some((Form, "is null"))),
    ];
    let text: Vec<&str> = lines.iter().map(|line| line.0).collect();
    let mut bytes = text.join("\n").into_bytes();
    bytes.extend(b"\n{\"video\": \"\xff\xfe\"}\n");
    let found = problems(&bytes);
    let mut expected: Vec<_> = lines.iter().enumerate().filter_map(|(i, line)| Some((i + 1, line.1?))).collect();
    expected.push((lines.len() + 1, (Form, "is no JSON")));
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for ((entry, kind, reason), (line, (expected, part))) in found.iter().zip(expected) {
        assert_eq!((*entry, *kind), (line, expected), "{reason}");
        assert!(reason.contains(part), "{reason:?} lacks {part:?}");
    }

    let (_folder, path) = folder(&bytes);
    let dataset = Dataset::open(&path, None, true).unwrap();
    assert_eq!((dataset.items.len(), dataset.problems.len()), (3, found.len()));
    assert_eq!(
        Problems::counts(&dataset.problems),
        "11 entries of no known form, 2 labels that are none, 1 id given twice, 4 absent files"
    );
}

#[test]
fn a_message_lists_no_more_than_can_be_read() {
    let problem = |entry| Problem { file: "d.json".into(), entry, kind: ProblemKind::Absent, reason: "gone".into() };
    let text = Problems((1..=60).map(problem).collect()).to_string();
    assert!(text.starts_with("60 absent files\n  d.json, entry 1: gone\n"), "{text}");
    assert!(text.ends_with("entry 50: gone\n  and 10 more"), "{text}");
}

#[test]
fn files_that_are_no_data_set() {
    let error = |data: &[u8], skip_bad| {
        let (_folder, path) = folder(data);
        Dataset::open(&path, None, skip_bad).unwrap_err().to_string()
    };
    let whole = br#"[{"video": "clips/1.mp4", "solution": "sad"}, {"video": "clips/2.mp4", "solution": "sad"}]"#;
    for cut in 1..whole.len() {
        assert!(error(&whole[..cut], true).contains("a damaged one"), "cut at {cut}");
    }
    for empty in [&b""[..], b"[]", b" [ ] ", b"\n\r\n", b"\xef\xbb\xbf"] {
        assert!(error(empty, true).contains("has no entry"), "{empty:?}");
    }
    assert!(error(&[b"[".repeat(100_000), b"]".repeat(100_000)].concat(), true).contains("recursion limit"));
    assert!(error(b"[{\"video\": \"\xff\"}]", true).contains("a damaged one"));
    for data in [&b"\x00\x01\x02"[..], b"{}", b"3\n4", b"\xff\xfe[\x00"] {
        assert!(error(data, false).contains("--skip-bad"), "{data:?}");
        assert!(error(data, true).contains("none of"), "{data:?}");
    }
    let (folder, _) = folder("");
    assert!(Dataset::open(&folder.path().join("no.json"), None, true).unwrap_err().to_string().contains("no.json"));
    assert!(Dataset::open(folder.path(), None, true).unwrap_err().to_string().contains("cannot read"));
}
