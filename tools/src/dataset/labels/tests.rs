#![allow(clippy::unwrap_used)]
use std::fs;

use tempfile::TempDir;

use super::super::Dataset;
use super::*;

/// A folder with `names` as clips in `clips/`, and arguments that write to `out`.
fn folder(names: &[&str], out: &str) -> (TempDir, ConvertArgs) {
    let folder = tempfile::tempdir().unwrap();
    let clips = folder.path().join("clips");
    fs::create_dir(&clips).unwrap();
    for name in names {
        fs::write(clips.join(name), name).unwrap();
    }
    let out = folder.path().join(out);
    (folder, ConvertArgs { clips, out, prompt: None, skip_bad: false })
}

fn labels(folder: &TempDir, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// Places, kinds and reasons of rows that cannot be used.
fn faults(rows: &Rows) -> Vec<(usize, ProblemKind, &str)> {
    let fault = |(place, row): &'_ (usize, Result<Row, Fault>)| row.as_ref().err().map(|_| *place);
    let places: Vec<usize> = rows.iter().filter_map(fault).collect();
    let reasons = rows.iter().filter_map(|(_, row)| row.as_ref().err());
    places.into_iter().zip(reasons).map(|(place, (kind, reason))| (place, *kind, reason.as_str())).collect()
}

fn good(rows: &Rows) -> Vec<(&str, &str, Option<&str>)> {
    let rows = rows.iter().filter_map(|(_, row)| row.as_ref().ok());
    rows.map(|row| (row.clip.as_str(), row.label.as_str(), row.rationale.as_deref())).collect()
}

#[test]
fn dfew_becomes_a_data_set() {
    let names = ["00001.mp4", "00002.mp4", "00003.avi", "4.mp4", "00005.mp4", "00006.mp4", "12345.mp4"];
    for (out, prompt) in
        [("set.json", Some("Which?")), ("set.jsonl", Some("Which?")), ("set.json", None), ("set.jsonl", None)]
    {
        let (folder, mut args) = folder(&names, out);
        args.prompt = prompt.map(str::to_owned);
        let csv = "\u{feff}video_name,label\r\n1,1\r\n2,2\r\n3,3\r\n00004,4\r\n5,5\r\n6,6\r\n12345,7\r\n";
        let path = labels(&folder, "set_1.csv", csv);
        dfew::run(&dfew::DfewArgs { labels: path, convert: args.clone() }).unwrap();
        let dataset = Dataset::open(&args.out, None, false).unwrap();
        let spelled: Vec<&str> = dataset.items.iter().map(|item| item.label.as_str()).collect();
        assert_eq!(spelled, ["happy", "sad", "neutral", "angry", "surprise", "disgust", "fear"]);
        assert_eq!(dataset.items[2].id, "clips/00003.avi", "from the file's folder, so that both can be moved");
        assert!(dataset.items.iter().all(|item| item.prompt.as_deref() == prompt && item.rationale.is_none()));
    }
}

#[test]
fn rows_that_cannot_be_used_are_listed_and_skipped_only_when_told() {
    let (folder, mut args) = folder(&["1.mp4", "2.mp4"], "set.jsonl");
    let csv = "video_name,label\n1,1\n2,0\n3,1\n1.mp4,2\n2,8\n2,99999999999999999999\n2,\n2\n\0,1\n../2,-1\n2,7\n";
    let path = labels(&folder, "set_1.csv", csv);
    let run = |args: &ConvertArgs| dfew::run(&dfew::DfewArgs { labels: path.clone(), convert: args.clone() });
    let error = run(&args).unwrap_err().to_string();
    for part in [
        "9 of 11 entries",
        "1 entry of no known form, 5 labels that are none, 1 id given twice, 2 absent files",
        "entry 3: label 0: its judges agreed on no single emotion",
        "entry 4: there is no clip \"3\"",
        "entry 5: clip \"1.mp4\" is that of entry 2",
        "entry 6: label \"8\"",
        "entry 9: has 1 columns",
        "entry 10: there is no clip \"\\0\"",
    ] {
        assert!(error.contains(part), "{error} lacks {part:?}");
    }
    assert!(!args.out.exists(), "nothing is written");
    args.skip_bad = true;
    run(&args).unwrap();
    assert_eq!(Dataset::open(&args.out, None, false).unwrap().items.len(), 2);
    assert!(!args.out.with_extension("part").exists());

    let none = labels(&folder, "none.csv", "video_name,label\n9,1\n");
    let error = dfew::run(&dfew::DfewArgs { labels: none, convert: args.clone() }).unwrap_err().to_string();
    assert!(error.contains("none of 1 entries can be used"), "{error}");
    let empty = labels(&folder, "empty.csv", "video_name,label\n");
    assert!(
        dfew::run(&dfew::DfewArgs { labels: empty, convert: args.clone() })
            .unwrap_err()
            .to_string()
            .contains("no entry")
    );
    args.out = folder.path().join("set.txt");
    assert!(run(&args).unwrap_err().to_string().contains("must end in .json or .jsonl"));
}

#[test]
fn dfew_of_another_form() {
    let (folder, _) = folder(&[], "set.json");
    for (bytes, part) in [
        (&b""[..], "no column video_name"),
        (b"1,2\n3,4\n", "no column video_name; its first row is [\"1\", \"2\"]"),
        (b"video_name;emotion\n1;2\n", "no column label"),
        (b"\xff\xfev\0i\0", "no column video_name"),
    ] {
        let error = dfew::rows(&labels(&folder, "set.csv", bytes)).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let odd = dfew::rows(&labels(&folder, "set.csv", b"LABEL;Video_Name\n 3 ;\"7\"\n\"1;2\n")).unwrap();
    assert_eq!(good(&odd), [("7", "neutral", None)]);
    assert_eq!(faults(&odd)[0].0, 3, "an open quote swallows the rest, and the row is too short");
    assert!(dfew::rows(folder.path()).unwrap_err().to_string().contains("cannot read"));
}

#[test]
fn mafw_lists() {
    let (folder, args) = folder(&["00148.mp4", "00149.mp4", "00150.mp4"], "set.json");
    let path = labels(&folder, "train.txt", "\u{feff}00148.mp4 anger\r\n00149.mp4\tneutral\n\n00150.mp4 helplessness");
    mafw::run(&mafw::MafwArgs { labels: path, captions: None, convert: args.clone() }).unwrap();
    let dataset = Dataset::open(&args.out, None, false).unwrap();
    let read: Vec<(&str, Emotion)> = dataset.items.iter().map(|item| (item.id.as_str(), item.emotion)).collect();
    assert_eq!(
        read,
        [
            ("clips/00148.mp4", Emotion::Anger),
            ("clips/00149.mp4", Emotion::Neutral),
            ("clips/00150.mp4", Emotion::Helplessness)
        ]
    );
    let odd = labels(&folder, "odd.txt", b"1.mp4 anger_disgust\n2.mp4\n3.mp4 3\n\0\xff\n4.mp4 fear\n");
    let rows = mafw::rows(&odd, None).unwrap();
    assert_eq!(good(&rows), [("4.mp4", "fear", None)]);
    let faults = faults(&rows);
    assert!(faults[0].2.contains("of several emotions none can be the answer"), "{faults:?}");
    assert_eq!(faults.iter().map(|fault| fault.0).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert!(mafw::rows(&labels(&folder, "empty.txt", ""), None).unwrap().is_empty());
}

#[test]
fn mafw_descriptions_become_rationales() {
    let (folder, _) = folder(&[], "set.json");
    // Chinese in GBK, as the authors' lists have it, and a form with line breaks.
    let list = b"00148.mp4\tanger\t\xd6\xd0\xce\xc4\tA man shouts.  His brows are drawn together.\r\n\
        00149.mp4 sadness <br>\xd6\xd0\xce\xc4<br> A woman weeps.\n00150.mp4\tfear\t\xd6\xd0\tA <b>man</b>\n00151.mp4 neutral\n";
    let path = labels(&folder, "train.txt", list);
    let rows = mafw::rows(&path, Some(&path)).unwrap();
    assert_eq!(
        good(&rows),
        [
            ("00148.mp4", "anger", Some("A man shouts. His brows are drawn together.")),
            ("00149.mp4", "sadness", Some("A woman weeps.")),
            ("00151.mp4", "neutral", None)
        ]
    );
    assert!(faults(&rows)[0].2.contains("holds tags"));
    // Bytes in the place of English that are none.
    let path = labels(&folder, "odd.txt", b"1.mp4\tfear\ta\t\xd6\xd0\n");
    assert!(faults(&mafw::rows(&path, Some(&path)).unwrap())[0].2.contains("no UTF-8"));
}

/// Made by tests/fixtures/make_sheets.py.
fn sheet(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/sheets").join(name)
}

#[test]
fn mafw_sheets() {
    let rows = mafw::rows(&sheet("single-set.xlsx"), None).unwrap();
    assert_eq!(
        good(&rows),
        [("00148.mp4", "anger", None), ("00149.mp4", "disappointment", None), ("00150.mp4", "neutral", None)]
    );
    let faults = faults(&rows);
    let reasons: Vec<(usize, &str)> = faults.iter().map(|fault| (fault.0, fault.2)).collect();
    assert_eq!(
        reasons,
        [
            (5, "label \"0\" is not one of MAFW's 1 to 11"),
            (6, "label \"1,2\" is not one of MAFW's 1 to 11"),
            (7, "label \"2.5\" is not one of MAFW's 1 to 11"),
            (8, "label \"\" is not one of MAFW's 1 to 11"),
            (9, "names no clip"),
            (11, "label \"1e300\" is not one of MAFW's 1 to 11")
        ]
    );
    let rows = mafw::rows(&sheet("single-set.xlsx"), Some(&sheet("descriptive_text.xlsx"))).unwrap();
    assert_eq!(good(&rows)[0], ("00148.mp4", "anger", Some("A man shouts. His brows are drawn together.")));
    assert_eq!(good(&rows)[2], ("00150.mp4", "neutral", None));
    let error = mafw::rows(&sheet("descriptive_text.xlsx"), None).unwrap_err().to_string();
    assert!(error.contains("no column single_label"), "{error}");
}

#[test]
fn damaged_sheets_are_errors() {
    let (folder, _) = folder(&[], "set.json");
    let whole = fs::read(sheet("single-set.xlsx")).unwrap();
    for cut in (0..whole.len()).step_by(97) {
        let path = labels(&folder, "cut.xlsx", &whole[..cut]);
        let error = mafw::rows(&path, None).unwrap_err().to_string();
        assert!(error.contains("cut.xlsx is no workbook"), "cut at {cut}: {error}");
    }
    // Any byte may be wrong: an error, or other rows, but no panic.
    for place in (0..whole.len()).step_by(11) {
        let mut bytes = whole.clone();
        bytes[place] ^= 0x41;
        let _ = mafw::rows(&labels(&folder, "odd.xlsx", bytes), None);
    }
    for bytes in [&b""[..], b"PK\x03\x04", b"00148.mp4 anger\n"] {
        assert!(mafw::rows(&labels(&folder, "no.xlsx", bytes), None).is_err());
    }
}

#[test]
fn emer_first_version() {
    let (folder, args) = folder(&["sample_00000648.mp4", "sample_00001823.avi"], "set.json");
    let csv = "names,emotions,subtitles,reasons\n\
        sample_00000648,angry,Don't talk to me.,\"He roared, with wide eyes. \"\"No!\"\"\n He is angry.\"\n\
        sample_00001823,worried,,He sighs.\n";
    let reasons = labels(&folder, "gt-eng.csv", csv);
    emer::run(&emer::EmerArgs { reasons, labels: None, convert: args.clone() }).unwrap();
    let dataset = Dataset::open(&args.out, None, false).unwrap();
    let [first, second] = dataset.items.as_slice() else { panic!("{:?}", dataset.items) };
    assert_eq!(first.rationale.as_deref(), Some("He roared, with wide eyes. \"No!\" He is angry."));
    assert_eq!((first.emotion, second.emotion), (Emotion::Anger, Emotion::Anxiety));
    assert_eq!((second.label.as_str(), second.id.as_str()), ("anxious", "clips/sample_00001823.avi"));
    let text = fs::read_to_string(&args.out).unwrap();
    assert!(text.contains("<think>He sighs.</think>\\n<answer>anxious</answer>"), "{text}");
}

#[test]
fn emer_second_version_takes_its_labels_from_elsewhere() {
    let (folder, _) = folder(&[], "set.json");
    let csv =
        b"name,chinese,english\ns_1,\xe4\xb8\xad,He smiles.\ns_2,x,He weeps.\ns_3,x,\ns_4,x,<think>\ns_5,\xff,x\n";
    let reasons = labels(&folder, "final-EMER-reason.csv", csv);
    let error = emer::rows(&reasons, None).unwrap_err().to_string();
    assert!(error.contains("no column emotions or emotion or discrete or label"), "{error}");
    let known =
        labels(&folder, "train-label.csv", "name,discrete,valence\ns_1,happy,3.5\ns_3,sad,-1\ns_4,sad,-1\ns_5\n");
    let rows = emer::rows(&reasons, Some(&known)).unwrap();
    assert_eq!(good(&rows), [("s_1", "happy", Some("He smiles."))]);
    let reasons: Vec<&str> = faults(&rows).iter().map(|fault| fault.2).collect();
    assert_eq!(
        reasons,
        [
            "clip \"s_2\" has no label",
            "the rationale is empty",
            "the rationale holds tags or zero bytes",
            "is no UTF-8"
        ]
    );
}
