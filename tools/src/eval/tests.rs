#![allow(clippy::unwrap_used)]
use std::fs;

use candor::verify::{Sentence, Verdict};
use clap::Parser;
use serde_json::Value;

use super::record::{Judged, TokenCounts};
use super::tally::{Row, Tally};
use super::*;
use crate::data::faces::tests::file as faces_file;

pub(super) fn record(id: usize, truth: &str, answer: &str, read: &str, rationale: &str) -> Record {
    let said = !rationale.is_empty();
    Record {
        id: format!("val/{id}"),
        truth: Emotion::fold(truth).unwrap(),
        answer: Emotion::fold(answer),
        fast: Emotion::fold("happy"),
        read: Judged { verifier: Emotion::fold(read), lexicon: said.then_some(Emotion::Neutral) },
        rationale: said.then(|| rationale.to_owned()),
        sentences: Vec::new(),
        verdict: if read == answer && said { Verdict::Verified } else { Verdict::Contradicted },
        withheld: false,
        tokens: TokenCounts { completion: 30, extra: 0 },
        cues: None,
    }
}

fn four() -> Vec<Record> {
    vec![
        record(0, "happy", "happy", "happy", "The mouth is open. They look happy."),
        record(1, "happy", "happy", "sad", "The mouth is closed. They look sad."),
        record(2, "sad", "happy", "sad", "The eyes are wide open."),
        record(3, "angry", "", "", ""),
    ]
}

fn with_open_mouth() -> [f32; Cue::COUNT] {
    let mut cues = [0.0; Cue::COUNT];
    cues[Cue::MouthOpening as usize] = 1.0;
    cues
}

#[test]
fn metrics_follow_their_definitions() {
    let mut records = four();
    count_cues(&mut records, &[Some(with_open_mouth()), Some(with_open_mouth()), None, None]);
    let metrics = measure(&records, "annotate");
    assert_eq!((metrics.n, metrics.cues_stated), (4, 2));
    assert_eq!((metrics.label_accuracy, metrics.war, metrics.fast_label_accuracy), (0.5, 0.5, 0.5));
    assert!((metrics.uar - 1.0 / 3.0).abs() < 1e-9);
    let recall = |class: &str| metrics.recall[Emotion::fold(class).unwrap().name()];
    assert_eq!((recall("happy"), recall("sad"), metrics.recall.len()), (1.0, 0.0, 3));
    assert_eq!((metrics.readable, metrics.eea, metrics.epc, metrics.fcr), (0.75, 0.5, 0.25, 0.25));
    assert_eq!((metrics.lexicon.eea, metrics.lexicon.epc, metrics.lexicon.fcr), (0.0, 0.0, 0.0));
    // "open" is right of both, "closed" of neither, whichever face is asked.
    assert_eq!((metrics.cue_accuracy, metrics.cue_accuracy_shuffled), (Some(0.5), Some(0.5)));
    assert_eq!((metrics.verified_share, metrics.withheld_share), (0.25, 0.0));
    assert_eq!((metrics.tokens.completion, metrics.tokens.extra), (30.0, 0.0));
    assert_eq!(metrics.confusion.labels, ["happiness", "anger", "sadness"]);
    assert_eq!(metrics.confusion.rows, [[2, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]);
    assert_eq!((metrics.conduct.words, metrics.conduct.repeated_share), (19.0 / 3.0, 0.0));

    let metrics = measure(&four(), "annotate");
    assert_eq!((metrics.cue_accuracy, metrics.cues_stated), (None, 0));
    assert!(!metrics.intervals.contains_key("cue_accuracy"), "{:?}", metrics.intervals);
}

#[test]
fn a_withheld_rationale_is_readable_and_names_nothing() {
    let mut record = record(0, "sad", "sad", "", "");
    record.withheld = true;
    let metrics = measure(&[record], "withhold");
    assert_eq!((metrics.readable, metrics.withheld_share, metrics.eea, metrics.epc), (1.0, 1.0, 0.0, 0.0));
}

/// Scripts read these keys, and the first eleven since the first version.
#[test]
fn the_keys_in_json() {
    let mut records = four();
    count_cues(&mut records, &[Some(with_open_mouth()), None, None, None]);
    let json = serde_json::to_value(measure(&records, "guide:4")).unwrap();
    for key in [
        "n",
        "label_accuracy",
        "fast_label_accuracy",
        "uar",
        "recall",
        "readable",
        "eea",
        "epc",
        "fcr",
        "cue_accuracy",
        "cue_accuracy_shuffled",
        "war",
        "intervals",
        "confusion",
        "tokens",
        "verified_share",
        "policy",
        "lexicon",
        "distinct_1",
        "distinct_2",
        "naming_share",
        "sentences",
        "words",
        "one_sentence_share",
        "repeated_share",
    ] {
        assert!(!json[key].is_null(), "{key} in {json}");
    }
    for key in ["war", "uar", "eea", "epc", "fcr", "readable", "cue_accuracy", "fast_label_accuracy", "lexicon_eea"] {
        let ends = [0, 1].map(|end| json["intervals"][key][end].as_f64().unwrap());
        let value = metric(&json, key);
        assert!(ends[0] <= value && value <= ends[1], "{key} {value} {ends:?}");
    }
    assert_eq!(json["policy"], "guide:4");
    assert!(json["lexicon"]["epc"].is_number());
    assert!(json["tokens"]["completion"].is_number() && json["tokens"]["extra"].is_number());
}

fn metric(json: &serde_json::Value, key: &str) -> f64 {
    key.strip_prefix("lexicon_").map_or(&json[key], |own| &json["lexicon"][own]).as_f64().unwrap()
}

#[test]
fn the_control_tells_looking_from_guessing() {
    // Every second mouth is open, and each rationale says rightly which.
    let cues: Vec<_> = (0..200)
        .map(|i| {
            let mut cues = [0.0; Cue::COUNT];
            cues[Cue::MouthOpening as usize] = if i % 2 == 0 { 1.0 } else { -1.0 };
            Some(cues)
        })
        .collect();
    let says = |i: usize| if i.is_multiple_of(2) { "The mouth is open." } else { "The mouth is closed." };
    let mut records: Vec<Record> = (0..200).map(|i| record(i, "sad", "sad", "sad", says(i))).collect();
    count_cues(&mut records, &cues);
    let metrics = measure(&records, "annotate");
    assert_eq!(metrics.cue_accuracy, Some(1.0));
    assert!((metrics.cue_accuracy_shuffled.unwrap() - 0.5).abs() < 0.12, "{metrics:?}");
}

fn item(id: &str, line: usize) -> Item {
    Item {
        id: id.into(),
        line,
        media: Media::Clip("a.mp4".into()),
        prompt: None,
        label: "sad".into(),
        emotion: Emotion::Sadness,
        rationale: None,
    }
}

#[test]
fn ids_are_made_to_stand_once() {
    let mut items = [item("a.mp4", 1), item("b.mp4", 2), item("a.mp4", 3)];
    make_unique(&mut items);
    assert_eq!(items.map(|item| item.id), ["a.mp4 (entry 1)", "b.mp4", "a.mp4 (entry 3)"]);
}

#[test]
fn a_limit_is_spread_over_the_data() {
    let items: Vec<Item> = (0..10).map(|i| item("a", i)).collect();
    let lines = |limit| spread(items.clone(), limit).iter().map(|item| item.line).collect::<Vec<_>>();
    assert_eq!(lines(3), [0, 3, 6]);
    assert_eq!(lines(99), (0..10).collect::<Vec<_>>());
    assert_eq!(lines(1), [0]);
}

#[test]
fn records_come_back_as_they_were() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("records.jsonl");
    let mut records = four();
    count_cues(&mut records, &[Some(with_open_mouth()), None, None, None]);
    let mut bytes = Vec::new();
    record::write(&mut bytes, &records).unwrap();
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(record::read(&path).unwrap(), records);
}

#[test]
fn hostile_records_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("records.jsonl");
    let mut good = Vec::new();
    record::write(&mut good, &four()[..1]).unwrap();
    let good = String::from_utf8(good).unwrap();
    let with = |from: &str, to: &str| {
        assert!(good.contains(from), "{from} in {good}");
        good.replacen(from, to, 1)
    };
    for (text, message) in [
        ("".to_owned(), "has no record"),
        ("\n \n".to_owned(), "has no record"),
        ("{}".to_owned(), "line 1: missing field `id`"),
        ("[1, 2]".to_owned(), "line 1"),
        (format!("{good}{good}"), "line 2: id \"val/0\" stands twice"),
        (format!("{good}\n{{\"id\""), "line 3"),
        (with("\"truth\":\"happiness\"", "\"truth\":\"bored\""), "\"bored\" is no known emotion"),
        (with("\"answer\":\"happiness\"", "\"answer\":7"), "line 1"),
        (with("\"completion\":30", "\"completion\":-1"), "line 1"),
        (with("\"completion\":30", "\"completion\":1e400"), "line 1"),
        (with("\"completion\":30", "\"completion\":99999999999"), "line 1"),
        (with("\"verdict\":\"verified\"", "\"verdict\":\"perhaps\""), "perhaps"),
        (with("\"cues\":null", "\"cues\":{\"stated\":1,\"right\":2,\"right_by_chance\":0}"), "2 and 0 of 1"),
        (with("\"rationale\":\"The mouth is open. They look happy.\"", "\"rationale\":null"), "no rationale"),
        (format!("{}{good}", "[".repeat(200_000)), "line 1"),
        ("x".repeat(2 << 20), "longer than"),
    ] {
        std::fs::write(&path, &text).unwrap();
        let error = record::read(&path).unwrap_err().to_string();
        assert!(error.contains(message), "{error:?} lacks {message:?}");
    }
    std::fs::write(&path, b"\xff\xfe{}").unwrap();
    assert!(record::read(&path).unwrap_err().to_string().contains("line 1"));
    let error = record::read(&folder.path().join("none")).unwrap_err().to_string();
    assert!(error.contains("cannot read"), "{error}");
    std::fs::write(&path, good.as_bytes()).unwrap();
    assert_eq!(record::read(&path).unwrap().len(), 1);
}

/// What numpy, scipy and statsmodels say; see tests/fixtures/make_stats.py.
fn golden() -> Value {
    serde_json::from_str(include_str!("../../../tests/fixtures/stats.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

/// The two evaluations in the golden file.
fn golden_runs(golden: &Value) -> [Vec<Record>; 2] {
    let column = |key: &str| numbers(&golden[key]);
    let (truth, stated, cues_right) = (column("truth"), column("stated"), column("cues_right"));
    let classes: Vec<Emotion> = Emotion::all().collect();
    ["a", "b"].map(|run| {
        let (right, tokens) = (column(&format!("right_{run}")), column(&format!("tokens_{run}")));
        let one = |i: usize| {
            let class = truth[i] as usize;
            let answer = if right[i] > 0.0 { class } else { (class + 1) % 7 };
            let mut record = record(i, classes[class].name(), classes[answer].name(), "sad", "A reason.");
            record.tokens.completion = tokens[i] as u32;
            let (stated, right) = (stated[i] as u32, cues_right[i] as u32);
            record.cues = Some(CueCounts { stated, right, right_by_chance: 0 });
            record
        };
        (0..truth.len()).map(one).collect()
    })
}

fn assert_near(actual: [f64; 2], expected: &Value, tolerance: f64, what: &str) {
    let expected = numbers(expected);
    let near = actual.iter().zip(&expected).all(|(actual, expected)| (actual - expected).abs() <= tolerance);
    assert!(near, "{what}: {actual:?}, expected {expected:?}");
}

#[test]
fn mcnemars_exact_test_is_that_of_statsmodels() {
    for case in golden()["mcnemar"].as_array().unwrap() {
        let [only_a, only_b] = ["only_a", "only_b"].map(|key| case[key].as_u64().unwrap());
        let (p, expected) = (paired::mcnemar(only_a, only_b), case["p"].as_f64().unwrap());
        assert!((p - expected).abs() <= 1e-9 * expected, "{only_a} {only_b}: {p}, expected {expected}");
    }
}

#[test]
fn percentiles_are_those_of_numpy() {
    for case in golden()["percentiles"].as_array().unwrap() {
        let interval = bootstrap::interval(numbers(&case["values"])).unwrap();
        assert_near(interval, &case["interval"], 1e-12, "percentiles");
    }
    assert_eq!(bootstrap::interval(Vec::new()), None);
}

/// Both draw at random, so they agree to what the fewer resamples leave open.
#[test]
fn bootstrap_intervals_are_those_of_scipy() {
    let golden = golden();
    let runs = golden_runs(&golden);
    let metrics = measure(&runs[0], "annotate");
    let comparison = compare::compare(["a", "b"], &runs);
    for key in ["war", "uar", "cue_accuracy"] {
        assert_near(metrics.intervals[key], &golden["bootstrap"][key], 0.006, key);
        assert_near(comparison.measures[key].pair.a_interval, &golden["bootstrap"][key], 0.006, key);
    }
    for key in ["war", "uar"] {
        let expected = &golden["bootstrap"][format!("{key}_difference")];
        assert_near(comparison.measures[key].pair.interval, expected, 0.004, key);
    }
    // Resampled alike, whatever is drawn: another call gives the same to the last bit.
    assert_eq!(measure(&runs[0], "annotate"), metrics);
}

#[test]
fn exchange_tests_are_those_of_scipy() {
    let golden = golden();
    let comparison = compare::compare(["a", "b"], &golden_runs(&golden));
    for key in ["uar", "tokens"] {
        let (p, expected) = (comparison.measures[key].test.p(), golden["exchange"][key].as_f64().unwrap());
        // Three standard errors of a share of 9999.
        let open = 3.0 * (expected * (1.0 - expected) / 9999.0).sqrt();
        assert!((p - expected).abs() <= open, "{key}: {p}, expected {expected} ± {open}");
    }
    assert_eq!(comparison.measures["extra_tokens"].test.p(), 1.0, "no difference at all");
}

#[test]
fn two_evaluations_side_by_side() {
    let mut second = four();
    second[2].answer = Some(Emotion::Sadness);
    second[1].read.verifier = Some(Emotion::Happiness);
    second[0].tokens.extra = 8;
    let comparison = compare::compare(["one", "other"], &[four(), second.clone()]);
    let war = &comparison.measures["war"];
    assert_eq!((war.pair.a, war.pair.b, war.pair.difference), (0.5, 0.75, 0.25));
    assert_eq!(war.test, compare::Test::Mcnemar { only_a: 0, only_b: 1, p: 1.0 });
    let epc = &comparison.measures["epc"];
    assert_eq!(epc.test, compare::Test::Mcnemar { only_a: 0, only_b: 2, p: 0.5 });
    assert_eq!(comparison.measures["extra_tokens"].pair.difference, 2.0);
    assert_eq!(comparison.recall["sadness"].difference, 1.0);
    assert!(!comparison.measures.contains_key("cue_accuracy"), "no cues were measured");
    let json = serde_json::to_value(&comparison).unwrap();
    assert_eq!((&json["n"], &json["measures"]["epc"]["test"]), (&4.into(), &"mcnemar".into()));
    assert_eq!(json["measures"]["uar"]["test"], "exchange");
}

#[test]
fn only_evaluations_of_the_same_data_are_compared() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, records: &[Record]| {
        let path = folder.path().join(name);
        super::write(&path, |out| record::write(out, records)).unwrap();
        path
    };
    let a = file("a", &four());
    let error = |records: &[Record]| format!("{:#}", compare::read(&a, &file("b", records)).unwrap_err());

    let mut backwards = four();
    backwards.reverse();
    let [first, second] = compare::read(&a, &file("b", &backwards)).unwrap();
    assert_eq!(first, second, "the second comes in the order of the first");

    assert!(error(&four()[..3]).contains("1 are in the first only: val/3"), "{}", error(&four()[..3]));
    let mut more = four();
    more.push(record(9, "sad", "sad", "sad", "A reason."));
    assert!(error(&more).contains("1 are in the second only: val/9"), "{}", error(&more));
    let mut other = four();
    other[1].truth = Emotion::Fear;
    assert!(error(&other).contains("\"val/1\" is happiness in the first and fear in the second"), "{}", error(&other));
}

#[test]
fn the_page_holds_whatever_is_said() {
    let mut records = four();
    let hostile = "</script><script>alert(1)</script><!-- \u{2028} & \" '";
    records[0].sentences =
        vec![Sentence { text: hostile.into(), labels: vec![Emotion::Happiness.go_emotion()], supports: Some(true) }];
    records[1].id = hostile.into();
    let metrics = measure(&records, hostile);
    let run = || page::Run { name: hostile, metrics: &metrics, records: &records };
    let pictures = HashMap::from([("val/0".to_owned(), page::png(&[7; 16], 4).unwrap())]);
    let comparison = compare::compare([hostile, "b"], &[records.clone(), records.clone()]);
    for (runs, comparison) in [(vec![run()], None), (vec![run(), run()], Some(&comparison))] {
        let mut bytes = Vec::new();
        page::write(&mut bytes, &runs, comparison, &pictures).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        assert_eq!(text.matches("</script>").count(), 2, "its own two");
        assert!(!text.contains("alert(1)</script>") && !text.contains("<!--"));
        assert!(!text.contains("http://") && !text.contains("https://"));
        let (_, data) = text.split_once("id=\"data\">").unwrap();
        let rows: Vec<Value> = serde_json::from_str(data.split_once("</script>").unwrap().0).unwrap();
        assert_eq!(rows.len(), 4);
        assert_eq!(rows[0]["r"].as_array().unwrap().len(), runs.len());
        assert_eq!(rows[0]["r"][0]["s"][0][0], hostile);
        assert_eq!((&rows[1]["i"], &rows[3]["r"][0]["a"]), (&hostile.into(), &Value::Null));
        assert!(rows[0]["p"].is_string() && rows[1]["p"].is_null());
        // A chart for the measures, one for the classes, and what was answered for what.
        assert_eq!(text.matches("<svg").count(), if runs.len() > 1 { 5 } else { 3 });
    }
}

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: EvalArgs,
}

fn parse(arguments: &[&str]) -> Result<EvalArgs, String> {
    let cli = Cli::try_parse_from([&["eval"], arguments].concat());
    cli.map(|cli| cli.args).map_err(|error| error.to_string())
}

#[test]
fn what_is_evaluated_is_named_once() {
    for arguments in [
        &["--model", "m"][..],
        &["--data", "d"],
        &["--model", "m", "--data", "d", "--faces", "f"],
        &["--compare", "a"],
        &["--compare", "a", "b", "--model", "m"],
        &["--compare", "a", "b", "--data", "d"],
        &["--model", "m", "--data", "d", "--policy", "retry:0"],
    ] {
        assert!(parse(arguments).is_err(), "{arguments:?}");
    }
    assert!(parse(&["--model", "m", "--data", "d"]).is_ok());
    assert!(parse(&["--model", "m", "--faces", "f"]).is_ok());
    assert!(parse(&["--compare", "a", "b", "--html", "c.html"]).is_ok());
}

fn default_model() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/default").display().to_string()
}

/// A folder with five photographs, a list of them and one of three, a clip without a face and a broken one.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("faces.safetensors"), faces_file(5, &[], &[])).unwrap();
    let line = |row: usize, more: &str| {
        let label = ["angry", "disgust", "fear", "happy", "neutral"][row];
        format!(
            "{{\"id\": \"val/{row}\", \"video\": \"faces.safetensors#val/{row}\", \"solution\": \"{label}\"{more}}}\n"
        )
    };
    let lines: String = (0..5).map(|row| line(row, "")).collect();
    fs::write(at("all.jsonl"), &lines).unwrap();
    fs::write(at("asked.jsonl"), line(1, ", \"prompt\": \"<video>\\nWhat does this person feel?\"")).unwrap();
    fs::create_dir(at("black")).unwrap();
    fs::write(at("black/1.png"), page::png(&[0; 64 * 64], 64).unwrap()).unwrap();
    fs::write(at("broken.mp4"), "no video").unwrap();
    fs::write(at("damaged.mp4"), "").unwrap();
    let clip = |video: &str| format!("{{\"video\": \"{video}\", \"solution\": \"sad\"}}\n");
    fs::write(at("faceless.jsonl"), clip("black")).unwrap();
    fs::write(at("broken.jsonl"), [clip("broken.mp4"), line(0, ""), clip("damaged.mp4")].concat()).unwrap();
    folder
}

fn evaluated(folder: &Path, arguments: &[&str]) -> anyhow::Result<Vec<Record>> {
    let model = default_model();
    let named: Vec<String> =
        arguments.iter().map(|argument| argument.replace("HERE", &folder.display().to_string())).collect();
    let mut all = vec!["--model", &model];
    all.extend(named.iter().map(String::as_str));
    let args = parse(&all).unwrap();
    evaluate(&args, &args.dataset()?)
}

#[test]
fn photographs_and_lists_of_them_are_evaluated_alike_with_and_without_features() {
    let folder = folder();
    let faces = evaluated(folder.path(), &["--faces", "HERE/faces.safetensors"]).unwrap();
    assert_eq!(faces.len(), 5);
    for (row, record) in faces.iter().enumerate() {
        assert_eq!((record.id.clone(), record.is_readable()), (format!("val/{row}"), true));
        assert_eq!(record.cues.is_some(), row % 2 == 1);
        assert!(record.tokens.completion > 0 && record.read.lexicon.is_some() && !record.sentences.is_empty());
        let joined: Vec<&str> = record.sentences.iter().map(|sentence| sentence.text.as_str()).collect();
        assert_eq!(record.rationale.as_deref(), Some(joined.join(" ").as_str()));
    }
    assert_eq!(evaluated(folder.path(), &["--data", "HERE/all.jsonl", "--threads", "1"]).unwrap(), faces);
    let cached = ["--data", "HERE/all.jsonl", "--features", "HERE/features"];
    let first = evaluated(folder.path(), &cached).unwrap();
    assert_eq!(fs::read_dir(folder.path().join("features")).unwrap().count(), 5);
    assert_eq!(evaluated(folder.path(), &cached).unwrap(), first, "computed and read features are the same");
}

#[test]
fn clips_behind_the_tower_are_seen_as_windows_are() {
    use candor::media::{Fit, Frame, Window};
    use candor::watch::{WatchSettings, Watcher};
    let folder = folder();
    let record = &evaluated(folder.path(), &["--faces", "HERE/faces.safetensors"]).unwrap()[0];
    let settings = WatchSettings { fit: Some(Fit::Stretch), ..WatchSettings::default() };
    let device = candor_kernels::cpu::CpuDevice::new(Some(1));
    let mut watcher = Watcher::open(Path::new(&default_model()), None, device, settings).unwrap();
    let frames = watcher.model().config().frames;
    let faces = crate::data::faces::Faces::open(&folder.path().join("faces.safetensors"), "val").unwrap();
    let rgb = faces.image(0).iter().flat_map(|&grey| [grey; 3]).collect();
    let frame = std::sync::Arc::new(Frame::from_rgb(rgb, 4, 4).unwrap());
    let window = Window {
        index: 0,
        start_s: 0.0,
        end_s: 1.0,
        start_monotonic_s: 0.0,
        end_monotonic_s: 0.0,
        start_wall: std::time::SystemTime::UNIX_EPOCH,
        end_wall: std::time::SystemTime::UNIX_EPOCH,
        frame_count: frames,
        frames: vec![frame; frames],
    };
    let observation = watcher.observe("photograph", &window).unwrap();
    assert_eq!((&observation.rationale, &observation.sentences), (&record.rationale, &record.sentences));
    let error = watcher.observe_features("photograph", 0, &[0.0; 7]).unwrap_err().to_string();
    assert!(error.contains("7 values are not the"), "{error}");
}

#[test]
fn another_instruction_is_asked_until_the_next() {
    use candor::watch::{WatchSettings, Watcher};
    let device = candor_kernels::cpu::CpuDevice::new(Some(1));
    let mut watcher = Watcher::open(Path::new(&default_model()), None, device, WatchSettings::default()).unwrap();
    let own = watcher.manifest().model.instruction.clone();
    let config = watcher.model().config();
    let features = vec![0.5; config.frames * config.vision.patches() * config.vision.width];
    let mut observed = |instruction: &str| {
        watcher.ask(instruction).unwrap();
        let observation = watcher.observe_features("clip", 0, &features).unwrap();
        (observation.tokens.prompt, observation.fast_probabilities, observation.rationale)
    };
    let first = observed(&own);
    // Longer than the room that was made for the manifest's.
    let long = observed(&"What does this person feel? ".repeat(20));
    assert!(long.0 > first.0 + 100 && long.1 != first.1, "{long:?} {first:?}");
    assert_eq!(observed(&own), first);
}

#[test]
fn an_entrys_own_prompt_is_asked() {
    let folder = folder();
    let asked = evaluated(folder.path(), &["--data", "HERE/asked.jsonl"]).unwrap();
    assert!(asked[0].is_readable());
    // The model cannot take this one, so it was asked.
    let endless = "Why? ".repeat(2000);
    let text = fs::read_to_string(folder.path().join("asked.jsonl")).unwrap();
    fs::write(folder.path().join("endless.jsonl"), text.replace("What does this person feel?", &endless)).unwrap();
    let error = evaluated(folder.path(), &["--data", "HERE/endless.jsonl"]).unwrap_err().to_string();
    assert!(error.contains("entry 1 (val/1)"), "{error}");
}

#[test]
fn policies_and_seeds_reach_the_runtime() {
    let folder = folder();
    let warm = ["--data", "HERE/all.jsonl", "--temperature", "1.5", "--top-p", "1"];
    let [one, same, other] =
        ["3", "3", "4"].map(|seed| evaluated(folder.path(), &[&warm[..], &["--seed", seed]].concat()).unwrap());
    assert_eq!(one, same);
    assert_ne!(one, other);
    let kept = evaluated(folder.path(), &[&warm[..], &["--policy", "withhold"]].concat()).unwrap();
    for record in kept {
        assert_eq!(record.withheld, record.verdict != Verdict::Verified);
        assert_eq!(record.rationale.is_none(), record.withheld);
        assert!(record.is_readable());
    }
}

#[cfg(feature = "media")]
#[test]
fn a_clip_without_a_face_is_unanswered_and_a_broken_one_is_an_error() {
    let folder = folder();
    let [faceless] = evaluated(folder.path(), &["--data", "HERE/faceless.jsonl"]).unwrap().try_into().unwrap();
    assert_eq!((faceless.answer, faceless.is_readable(), faceless.verdict), (None, false, Verdict::Empty));
    for more in [&[][..], &["--features", "HERE/features"], &["--threads", "1"]] {
        let arguments = [&["--data", "HERE/broken.jsonl"], more].concat();
        let error = evaluated(folder.path(), &arguments).unwrap_err().to_string();
        assert!(error.contains("2 of 3 entries cannot be used (--skip-bad"), "{error}");
        assert!(
            error.contains("2 broken clips") && error.contains("entry 1:") && error.contains("entry 3:"),
            "{error}"
        );
    }
    let left = evaluated(folder.path(), &["--data", "HERE/broken.jsonl", "--skip-bad"]).unwrap();
    assert_eq!(left.iter().map(|record| record.id.as_str()).collect::<Vec<_>>(), ["val/0"]);
    fs::write(folder.path().join("one.jsonl"), "{\"video\": \"broken.mp4\", \"solution\": \"sad\"}").unwrap();
    let error = evaluated(folder.path(), &["--data", "HERE/one.jsonl", "--skip-bad"]).unwrap_err().to_string();
    assert!(error.contains("none of 1 entries can be used"), "{error}");
}

#[test]
fn pictures_go_first_to_what_disagrees() {
    let folder = folder();
    let args = parse(&["--model", "m", "--data", &folder.path().join("all.jsonl").display().to_string()]).unwrap();
    let data = args.dataset().unwrap();
    let records: Vec<Record> = data
        .items
        .iter()
        .enumerate()
        .map(|(place, item)| {
            let read = if place == 3 { "sad" } else { item.emotion.name() };
            let mut record = record(place, item.emotion.name(), item.emotion.name(), read, "A reason.");
            record.read.lexicon = Some(item.emotion);
            record
        })
        .collect();
    let shown = |most| {
        let mut ids: Vec<String> = pictures(&data, &records, most).unwrap().into_keys().collect();
        ids.sort();
        ids
    };
    assert_eq!(shown(0), Vec::<String>::new());
    assert_eq!(shown(1), ["val/3"]);
    assert_eq!(shown(99).len(), 5);
}

#[test]
fn measures_are_sums_over_rows() {
    let rows: Vec<Row> = four().iter().map(Row::of).collect();
    let tally = Tally::of(&rows);
    for measure in Measure::ALL {
        let value = measure.value(&tally);
        assert_eq!(value.is_none(), measure.key().starts_with("cue_"), "{measure:?} {value:?}");
        assert_eq!(measure.value(&Tally::default()), None, "{measure:?} of nothing");
    }
    let keys: std::collections::BTreeSet<&str> = Measure::ALL.iter().map(|measure| measure.key()).collect();
    assert_eq!(keys.len(), Measure::ALL.len());
}
