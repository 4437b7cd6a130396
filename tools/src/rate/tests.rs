//! The server over HTTP, as a browser and as others would speak to it.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;

use serde_json::{Value, json};

use super::votes::{self, Choice, Question};
use super::*;

/// A server of its own for each test, over a folder with explanations and clips.
struct Served {
    folder: tempfile::TempDir,
    runtime: Option<tokio::runtime::Runtime>,
    address: SocketAddr,
}

struct Answer {
    status: u16,
    headers: HashMap<String, String>,
    body: Vec<u8>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn reason(&self) -> String {
        self.json()["error"].as_str().unwrap().to_owned()
    }
}

const PAIRS: usize = 6;
/// With it, each of the files stands first in some pairs of Anna's. Long enough that it stands nowhere by chance.
const SEED: u64 = 7_305_118_294_407;

impl Served {
    fn new() -> Served {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::create_dir(path("strip")).unwrap();
        for (name, bytes) in [("1.png", b"one".as_slice()), ("2.png", b"two"), ("notes.txt", b"private")] {
            std::fs::write(path("strip").join(name), bytes).unwrap();
        }
        let video: Vec<u8> = (0..3_000_000_u32).map(|i| (i / 1000) as u8).collect();
        std::fs::write(path("happy-secret.mp4"), video).unwrap();
        let clips = ["happy-secret.mp4", "strip"];
        let lines = |line: &dyn Fn(usize) -> Value| (0..PAIRS).map(|i| format!("{}\n", line(i))).collect::<String>();
        let data = lines(&|i| json!({"id": format!("reel-{i}"), "video": clips[i % 2], "solution": "happy"}));
        std::fs::write(path("data.jsonl"), data).unwrap();
        for side in ["kestrel", "wagtail"] {
            let records = lines(
                &|i| json!({"id": format!("reel-{i}"), "rationale": format!("{side} words {i}"), "answer": "happy"}),
            );
            std::fs::write(path(&format!("{side}.jsonl")), records).unwrap();
        }
        let mut served = Served { folder, runtime: None, address: ([127, 0, 0, 1], 0).into() };
        served.start(None);
        served
    }

    fn args(&self, rater: Option<&str>) -> ServeArgs {
        let path = |name: &str| self.folder.path().join(name);
        ServeArgs {
            a: path("kestrel.jsonl"),
            b: path("wagtail.jsonl"),
            data: Some(path("data.jsonl")),
            media_root: None,
            skip_bad: false,
            faces: None,
            part: "val".into(),
            votes: path("votes.jsonl"),
            rater: rater.map(str::to_owned),
            limit: None,
            seed: Some(SEED),
            address: self.address,
            public: false,
        }
    }

    fn start(&mut self, rater: Option<&str>) {
        // Ends the server before and lets go of its file of votes.
        self.runtime = None;
        let router = open(&self.args(rater)).unwrap().router();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        self.address = listener.local_addr().unwrap();
        runtime.spawn(async move { axum::serve(listener, router).await });
        self.runtime = Some(runtime);
    }

    fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let mut connection = TcpStream::connect(self.address).unwrap();
        let host = self.address.to_string();
        let mut all = vec![("host", host.as_str()), ("connection", "close")];
        for &(name, value) in headers {
            all.retain(|(other, _)| *other != name);
            all.push((name, value));
        }
        let head: String = all.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let length = body.len();
        // A server that refuses a long body may have answered before it is all sent.
        let _ = write!(connection, "{method} {path} HTTP/1.1\r\n{head}content-length: {length}\r\n\r\n{body}");
        let mut bytes = Vec::new();
        connection.read_to_end(&mut bytes).unwrap();
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let header = |line: &str| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned()));
        Answer { status, headers: lines.filter_map(header).collect(), body: bytes[end + 4..].to_vec() }
    }

    fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], "")
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, &[("content-type", "application/json")], &body.to_string())
    }

    fn state(&self, rater: &str) -> Value {
        let answer = self.get(&format!("/api/state?rater={rater}"));
        assert_eq!(answer.status, 200);
        answer.json()
    }

    fn kept(&self) -> votes::Kept {
        votes::read(&self.folder.path().join("votes.jsonl")).unwrap()
    }
}

fn vote_for(state: &Value, choice: &str) -> Value {
    let pair = &state["pair"];
    json!({"rater": state["rater"], "pair": pair["token"], "question": pair["question"], "choice": choice})
}

#[test]
fn votes_are_kept_under_the_model_that_was_meant_and_the_page_goes_on() {
    let mut served = Served::new();
    assert_eq!(served.get("/api/state").json()["rater"], Value::Null);
    let mut meant = HashMap::new();
    for vote in 0..2 * PAIRS {
        if vote == 5 {
            served.start(None);
        }
        let state = served.state("anna");
        assert_eq!(state["done"], vote / 2);
        let pair = &state["pair"];
        assert_eq!(pair["question"], ["fits", "coherent"][vote % 2]);
        // The rater likes what "wagtail" wrote fits better, and finds all as coherent.
        let wagtail = if pair["first"]["text"].as_str().unwrap().starts_with("wagtail") { "first" } else { "second" };
        let choice = if vote % 2 == 0 { wagtail } else { "tie" };
        *meant.entry(choice).or_insert(0) += 1;
        let next = served.post("/api/vote", &vote_for(&state, choice));
        assert_eq!(next.status, 200);
        assert_eq!(served.kept().standing.all().count(), vote + 1);
        // The answer to a vote is the state that a reload gets.
        assert_eq!(next.json(), served.state("anna"));
    }
    assert_eq!(served.state("anna")["pair"], Value::Null);
    assert!(meant["first"] > 0 && meant["second"] > 0, "{meant:?}: the seed draws one side only");
    for vote in served.kept().standing.all() {
        let expected = if vote.question == Question::Fits { Choice::B } else { Choice::Tie };
        assert_eq!(vote.choice, Some(expected));
    }
    assert_eq!(served.state("ben")["done"], 0);
}

#[test]
fn undo_and_repeated_requests() {
    let served = Served::new();
    let state = served.state("anna");
    assert_eq!(state["last"], Value::Null);
    let vote = vote_for(&state, "first");
    let next = served.post("/api/vote", &vote).json();
    // An answer that was lost on its way: the same again is no second vote, something else is refused.
    assert_eq!(served.post("/api/vote", &vote).json(), next);
    let other = served.post("/api/vote", &vote_for(&state, "second"));
    assert_eq!((other.status, served.kept().standing.all().count()), (409, 1));
    assert!(other.reason().contains("answered already"));
    assert_eq!(next["pair"]["answers"], json!({"fits": "first"}));
    assert_eq!(next["last"], json!({"pair": state["pair"]["token"], "question": "fits"}));

    let undo = json!({"rater": "anna", "pair": next["last"]["pair"], "question": "fits"});
    assert_eq!(served.post("/api/undo", &undo).json(), state);
    assert_eq!(served.post("/api/undo", &undo).json(), state);
    let kept = served.kept();
    assert_eq!(kept.standing.all().count(), 0);
    assert_eq!(std::fs::read_to_string(served.folder.path().join("votes.jsonl")).unwrap().lines().count(), 3);
}

#[test]
fn nothing_that_is_served_tells_whose_an_explanation_is() {
    let served = Served::new();
    let mut seen = String::new();
    for path in ["/", "/page.js", "/page.css", "/icon.svg", "/api/state"] {
        let answer = served.get(path);
        assert_eq!(answer.status, 200, "{path}");
        seen += &format!("{:?}{}", answer.headers, String::from_utf8(answer.body).unwrap());
    }
    let mut firsts = Vec::new();
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    loop {
        let state = served.state("anna");
        let pair = &state["pair"];
        if pair.is_null() {
            break;
        }
        // All that could tell is the texts themselves.
        let mut blind = state.clone();
        firsts.push(pair["first"]["text"].as_str().unwrap().starts_with("kestrel"));
        assert_eq!(keys(&state), ["rater", "named_here", "pairs", "done", "last", "pair"]);
        assert_eq!(keys(pair), ["token", "question", "answers", "first", "second", "clip"]);
        assert_eq!(keys(&pair["first"]), ["text", "answer"]);
        assert_eq!(keys(&pair["second"]), keys(&pair["first"]));
        blind["pair"]["first"]["text"] = "".into();
        blind["pair"]["second"]["text"] = "".into();
        seen += &blind.to_string();
        let source = pair["clip"]["sources"][0].as_str().unwrap();
        seen += &format!("{:?}", served.get(source).headers);
        served.post("/api/vote", &vote_for(&state, "first"));
    }
    assert!(firsts.contains(&true) && firsts.contains(&false), "{firsts:?}");
    let kept = served.kept();
    let header = kept.header.unwrap();
    let folder = served.folder.path().display().to_string();
    // File names may hold labels or name the models; keys and seed would give the order away.
    for secret in
        ["kestrel", "wagtail", "secret", "reel-", "data.jsonl", &folder, &header.seed.to_string(), &header.digest]
    {
        assert!(!seen.contains(secret), "{secret:?} is told");
    }
    for vote in kept.standing.all() {
        assert!(!seen.contains(&vote.pair), "a key is told");
    }
}

#[test]
fn two_raters_differ_in_what_stands_first_and_in_the_order() {
    let served = Served::new();
    let orders = ["anna", "ben", "cleo", "dora"].map(|rater| {
        let mut order = Vec::new();
        loop {
            let state = served.state(rater);
            if state["pair"].is_null() {
                return order;
            }
            if state["pair"]["question"] == "fits" {
                order.push(state["pair"]["first"]["text"].clone());
            }
            served.post("/api/vote", &vote_for(&state, "tie"));
        }
    });
    assert!(orders.iter().all(|order| order.len() == PAIRS));
    assert!(orders[1..].iter().any(|order| *order != orders[0]));
}

#[test]
fn what_is_no_vote_is_refused_with_a_reason() {
    let served = Served::new();
    let good = vote_for(&served.state("anna"), "first");
    let with = |field: &str, value: Value| {
        let mut changed = good.clone();
        changed[field] = value;
        changed.to_string()
    };
    let kind = ("content-type", "application/json");
    let origin = format!("http://{}", served.address);
    let long = with("pair", "x".repeat(5000).into());
    let cases = [
        (404, "there is no pair \"zz\"", vec![kind], with("pair", "zz".into())),
        (422, "cannot be read", vec![kind], with("choice", "a".into())),
        (422, "cannot be read", vec![kind], with("question", "both".into())),
        (422, "cannot be read", vec![kind], with("seed", 1.into())),
        (422, "cannot be read", vec![kind], "{".into()),
        (422, "`rater` is missing", vec![kind], with("rater", Value::Null)),
        (422, "more than 60", vec![kind], with("rater", "x".repeat(61).into())),
        (422, "control characters", vec![kind], with("rater", "a\nb".into())),
        (415, "not application/json", vec![("content-type", "text/plain")], good.to_string()),
        (403, "not from the page", vec![kind, ("origin", "http://evil.example")], good.to_string()),
        (403, "not from the page", vec![kind, ("origin", "null")], good.to_string()),
        (421, "not a name of this machine", vec![kind, ("host", "evil.example:8001")], good.to_string()),
        (421, "not a name of this machine", vec![kind, ("host", "192.0.2.1")], good.to_string()),
    ];
    for (status, reason, headers, body) in cases {
        let answer = served.send("POST", "/api/vote", &headers, &body);
        assert_eq!(answer.status, status, "{body}");
        assert!(answer.reason().contains(reason), "{body}: {}", answer.reason());
    }
    assert_eq!(served.send("POST", "/api/vote", &[kind], &long).status, 413);
    assert_eq!(served.send("GET", "/", &[("host", "evil.example")], "").status, 421);
    assert_eq!(served.get("/clips/../votes.jsonl").status, 404);
    assert_eq!(served.get("/votes.jsonl").status, 404);
    assert_eq!(served.get("/clips/zz/0").status, 404);
    assert_eq!(served.kept().standing.all().count(), 0);
    for headers in [vec![kind, ("origin", origin.as_str())], vec![kind, ("host", "localhost:8001")]] {
        assert_eq!(served.send("POST", "/api/vote", &headers, &good.to_string()).status, 200);
    }
    assert_eq!(served.kept().standing.all().count(), 1);
}

#[test]
fn only_the_rater_that_was_named_may_vote() {
    let mut served = Served::new();
    served.start(Some("Anna B."));
    let state = served.get("/api/state").json();
    assert_eq!((&state["rater"], &state["named_here"]), (&json!("Anna B."), &json!(false)));
    let mut vote = vote_for(&state, "second");
    vote["rater"] = "ben".into();
    let answer = served.post("/api/vote", &vote);
    assert_eq!(answer.status, 403);
    assert!(answer.reason().contains("for \"Anna B.\" alone"));
    vote.as_object_mut().unwrap().remove("rater");
    assert_eq!(served.post("/api/vote", &vote).status, 200);
    assert_eq!(served.kept().standing.all().next().unwrap().rater, "Anna B.");
}

#[test]
fn clips_are_served_whole_and_in_ranges() {
    let served = Served::new();
    let mut sources = HashMap::new();
    loop {
        let state = served.state("anna");
        let clip = &state["pair"]["clip"];
        let Some(kind) = clip["kind"].as_str() else { break };
        sources.insert(kind.to_owned(), clip["sources"].clone());
        served.post("/api/vote", &vote_for(&state, "tie"));
    }
    let pictures = sources["pictures"].as_array().unwrap();
    assert_eq!(pictures.len(), 2);
    let second = served.get(pictures[1].as_str().unwrap());
    assert_eq!((second.status, second.body.as_slice()), (200, b"two".as_slice()));
    assert_eq!(second.headers["content-type"], "image/png");

    let video = sources["video"][0].as_str().unwrap();
    let original = std::fs::read(served.folder.path().join("happy-secret.mp4")).unwrap();
    let whole = served.get(video);
    assert_eq!((whole.status, whole.body == original), (200, true));
    assert_eq!(
        (whole.headers["content-type"].as_str(), whole.headers["accept-ranges"].as_str()),
        ("video/mp4", "bytes")
    );
    // Put together from the pieces that a browser gets when it asks for everything.
    let mut joined = Vec::new();
    while joined.len() < original.len() {
        let piece = served.send("GET", video, &[("range", &format!("bytes={}-", joined.len()))], "");
        let last = joined.len() + piece.body.len() - 1;
        let range = format!("bytes {}-{last}/{}", joined.len(), original.len());
        assert_eq!((piece.status, &piece.headers["content-range"]), (206, &range));
        assert!(!piece.body.is_empty());
        joined.extend(piece.body);
    }
    assert!(joined == original);
    let tail = served.send("GET", video, &[("range", "bytes=-5")], "");
    assert_eq!(tail.body, original[original.len() - 5..]);
    let outside = served.send("GET", video, &[("range", "bytes=3000000-")], "");
    assert_eq!((outside.status, outside.headers["content-range"].as_str()), (416, "bytes */3000000"));
    std::fs::remove_file(served.folder.path().join("happy-secret.mp4")).unwrap();
    let gone = served.get(video);
    assert_eq!((gone.status, gone.headers["cache-control"].as_str()), (404, "no-store"));
    assert!(gone.reason().contains("cannot be read"));
}

#[test]
fn every_answer_tells_browsers_to_keep_to_the_page() {
    let served = Served::new();
    for path in ["/", "/api/state", "/nowhere"] {
        let headers = served.get(path).headers;
        assert!(headers["content-security-policy"].starts_with("default-src 'none'; script-src 'self'"), "{path}");
        assert_eq!(headers["x-content-type-options"], "nosniff");
        assert_eq!(headers["cross-origin-resource-policy"], "same-origin");
        assert_eq!(headers["cache-control"], "no-store");
    }
    let page = served.get("/").body;
    let page = String::from_utf8(page).unwrap();
    // Nothing of another machine, nothing inline that the policy would block.
    assert!(!page.contains("//") && !page.contains("<style") && !page.contains(" style=") && !page.contains("onclick"));
}

#[test]
fn what_cannot_be_served_is_said_at_the_start() {
    let served = Served::new();
    let path = |name: &str| served.folder.path().join(name);
    let fails = |args: ServeArgs| match open(&args) {
        Ok(_) => panic!("it opened"),
        Err(error) => format!("{error:#}"),
    };
    let other = |change: &dyn Fn(&mut ServeArgs)| {
        let mut args = served.args(None);
        args.votes = path("other.jsonl");
        change(&mut args);
        fails(args)
    };
    assert!(fails(served.args(None)).contains("in use by another"));
    assert!(other(&|args| args.rater = Some(" ".into())).contains("--rater \" \" is empty"));
    assert!(other(&|args| args.limit = Some(0)).contains("--limit"));
    assert!(other(&|args| args.b = path("kestrel.jsonl")).contains("left out: 6 the same in both files"));
    assert!(other(&|args| args.a = path("absent.jsonl")).contains("cannot read"));
    assert!(other(&|args| args.data = Some(path("kestrel.jsonl"))).contains("cannot be used"));
    std::fs::write(path("one.jsonl"), "{\"id\": \"x\", \"video\": \"strip\", \"solution\": \"sad\"}").unwrap();
    assert!(other(&|args| args.data = Some(path("one.jsonl"))).contains("6 without a clip"));
    assert!(!Path::new(&path("other.jsonl")).exists());
}

#[test]
fn the_command_line() {
    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: RateArgs,
    }
    use clap::Parser as _;
    let parse =
        |line: &str| Cli::try_parse_from(line.split(' ')).map(|cli| cli.args).map_err(|error| error.to_string());
    let args = parse("rate --a 1 --b 2 --data 3").unwrap();
    assert!(args.command.is_none() && args.serve.is_some());
    assert!(parse("rate --a 1 --b 2 --faces 3 --part test").is_ok());
    let Some(RateCommand::Report(report)) = parse("rate report votes.jsonl more.jsonl --json").unwrap().command else {
        panic!("no report");
    };
    assert_eq!(report.votes.len(), 2);
    for wrong in
        ["rate", "rate --a 1 --b 2", "rate --a 1 --data 3", "rate --a 1 --b 2 --data 3 --faces 4", "rate report"]
    {
        assert!(parse(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn photographs_are_found_under_the_ids_of_records_new_and_old() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("faces"), crate::data::faces::tests::file(3, &[], &[])).unwrap();
    let listed = Listed::of_faces(&path("faces"), "val").unwrap();
    let entry = |id: &str, text: &str| {
        let explanation = explanations::Explanation { text: text.into(), answer: None };
        (id.to_owned(), Some(explanation))
    };
    let entries = |text: &str| vec![entry("val/1", text), entry("2", text), entry("3", text), entry("test/0", text)];
    let pairs = Pairs::new(entries("x"), entries("y"), |id| listed.has(id));
    assert_eq!(pairs.ids(), std::collections::HashSet::from(["val/1", "2"]));
    assert_eq!(pairs.without_clip, 2);
    let draw = Draw { seed: 1 };
    let clips = Clips::new(listed, &pairs.list, draw).unwrap();
    for id in ["val/1", "2"] {
        let answer = clips.serve(&draw.clip_token(id), 0, &axum::http::HeaderMap::new()).unwrap();
        assert_eq!(answer.headers()["content-type"], "image/png");
        assert!(clips.serve(&draw.clip_token(id), 1, &axum::http::HeaderMap::new()).is_err());
    }
}
