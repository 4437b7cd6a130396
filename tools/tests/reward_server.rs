//! The reward server as trainers meet it: over sockets, many at a time, and with requests that nobody should send.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use candor::verify::{Emotion, SentenceClassifier, Verifier, VerifierError};
use candor_kernels::cpu::CpuDevice;
use candor_tools::reward::completion::END_TOKENS;
use candor_tools::reward::pool::Pool;
use candor_tools::reward::server::{BODY_LIMIT, Limits, router};
use candor_tools::reward::{Paid, Scorer, Weights};
use serde_json::{Value, json};

const WEIGHTS: Weights = Weights { format: 1.0, accuracy: 1.0, explanation: 1.0, groundedness: 0.0 };
const PROMPT: &str = "<|im_start|>user\nWhich emotion, and why?<|im_end|>\n<|im_start|>assistant\n";

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A kept connection.
struct Client(BufReader<TcpStream>);

/// Status, headers in lower case, and body.
type Answer = (u16, HashMap<String, String>, Vec<u8>);

impl Client {
    fn connect(address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        Client(BufReader::new(stream))
    }

    fn send(&mut self, head: &str, body: &[u8]) {
        let stream = self.0.get_mut();
        // The server may have answered and closed already; what it said is still there to read.
        let _ = stream.write_all(&[format!("{head}\r\nHost: test\r\n").as_bytes(), body].concat());
    }

    fn read(&mut self) -> Answer {
        let mut line = || {
            let mut line = String::new();
            self.0.read_line(&mut line).unwrap();
            line.trim_end().to_owned()
        };
        let status = line();
        let status = status.split(' ').nth(1).unwrap_or_else(|| panic!("no answer but {status:?}")).parse().unwrap();
        let mut headers = HashMap::new();
        loop {
            let line = line();
            let Some((name, value)) = line.split_once(": ") else { break };
            headers.insert(name.to_lowercase(), value.to_owned());
        }
        let mut body = vec![0; headers["content-length"].parse().unwrap()];
        self.0.read_exact(&mut body).unwrap();
        (status, headers, body)
    }

    fn ask(&mut self, method: &str, path: &str, body: &[u8]) -> Answer {
        let head = format!("{method} {path} HTTP/1.1\r\nContent-Length: {}", body.len());
        self.send(&head, &[b"\r\n", body].concat());
        self.read()
    }

    fn post(&mut self, path: &str, body: &Value) -> (u16, Value) {
        let (status, _, body) = self.ask("POST", path, body.to_string().as_bytes());
        (status, serde_json::from_slice(&body).unwrap())
    }

    /// A counter of GET /metrics.
    fn metric(&mut self, name: &str) -> u64 {
        let (status, _, body) = self.ask("GET", "/metrics", b"");
        assert_eq!(status, 200);
        let text = String::from_utf8(body).unwrap();
        let start = format!("candor_reward_{name} ");
        text.lines().find_map(|line| line.strip_prefix(&start)).unwrap().parse().unwrap()
    }
}

/// The program itself over the default verifier.
struct Program {
    child: Child,
    address: SocketAddr,
}

impl Program {
    fn start(options: &[&str]) -> Program {
        let mut child = Command::new(env!("CARGO_BIN_EXE_candor-tools"))
            .args(["reward-server", "--address", "127.0.0.1:0", "--threads", "2", "--verifier"])
            .arg(repository().join("models/default-verifier"))
            .args(options)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://").unwrap().parse().unwrap();
        Program { child, address }
    }

    fn tell_to_end(&self) {
        let kill = Command::new("kill").arg(self.child.id().to_string()).stderr(Stdio::null()).status();
        assert!(kill.is_ok());
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Completions good and bad, each with a label.
fn samples() -> Vec<(String, &'static str)> {
    let cues = ["The corners of the mouth turn down.", "The brows are drawn together.", "The eyes are wide open."];
    let conclusions = [
        ("He is happy and full of joy!", "happy"),
        ("She feels deep sadness.", "sadness"),
        ("This is anger, pure anger.", " Angry"),
        ("They are scared, in fear.", "fear"),
        ("Nothing much can be made out.", "neutral"),
    ];
    let mut samples = Vec::new();
    for (i, (own, label)) in conclusions.into_iter().enumerate() {
        let (cue, other, wrong) = (cues[i % 3], conclusions[(i + 1) % 5].0, conclusions[(i + 2) % 5].1);
        for (rationale, answer) in [
            (own.to_owned(), label),
            (format!("{cue} {own}"), label),
            (format!("{cue} {own} {other}"), wrong),
            (format!("{other} {other} {own}"), label),
            (format!("{cue} {other}"), label),
        ] {
            samples.push((format!("<think>{rationale}</think>\n<answer>{answer}</answer>"), label));
        }
        samples.push((format!("{own} <answer>{label}</answer>\n"), label));
    }
    samples.push((String::new(), "sad"));
    samples.push(("<think>Unfinished. And".into(), "happy"));
    samples
}

fn paid_directly(guard: bool) -> Vec<Paid> {
    let verifier = Verifier::open(&repository().join("models/default-verifier"), CpuDevice::new(Some(1))).unwrap();
    let mut scorer = Scorer::new(verifier, guard);
    let pay = |(completion, label): &(String, &str)| {
        Paid::new(scorer.score(completion, Emotion::fold(label).unwrap(), None).unwrap(), &WEIGHTS)
    };
    samples().iter().map(pay).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
}

/// Asks for some samples on one of the two routes and holds the answer against what the scorer says.
fn ask_and_check(client: &mut Client, plain: bool, chosen: &[usize], samples: &[(String, &str)], expected: &[Paid]) {
    let labels: Vec<&str> = chosen.iter().map(|&i| samples[i].1).collect();
    let paid: Vec<&Paid> = chosen.iter().map(|&i| &expected[i]).collect();
    let of = |part: fn(&Paid) -> f32| paid.iter().map(|own| part(own)).collect::<Vec<f32>>();
    if plain {
        let completions: Vec<&str> = chosen.iter().map(|&i| &*samples[i].0).collect();
        let (status, answer) = client.post("/reward", &json!({"completions": completions, "labels": labels}));
        assert_eq!(status, 200, "{answer}");
        let rewards = answer["rewards"].as_array().unwrap();
        assert_eq!(rewards.len(), chosen.len());
        for (own, paid) in rewards.iter().zip(&paid) {
            assert_eq!(own["sentences"], json!(paid.sentences));
            assert_eq!(floats(&json!([own["format"], own["reward"]])), [paid.format, paid.reward]);
            assert_eq!(floats(&json!([own["accuracy"], own["explanation"]])), [paid.accuracy, paid.explanation]);
        }
    } else {
        let ends = ["<|im_end|>", "", "<|im_end|>\n<|endoftext|>"];
        let query = |&i: &usize| format!("{PROMPT}{}{}", samples[i].0, ends[i % 3]);
        let queries: Vec<String> = chosen.iter().map(query).collect();
        let body = json!({"query": queries, "prompts": vec![PROMPT; chosen.len()], "labels": labels});
        let (status, answer) = client.post("/get_reward", &body);
        assert_eq!(status, 200, "{answer}");
        assert_eq!(floats(&answer["rewards"]), of(|own| own.reward));
        assert_eq!(floats(&answer["scores"]), of(|own| own.reward / 3.0));
        assert_eq!(floats(&answer["extra_logs"]["format"]), of(|own| own.format));
        assert_eq!(floats(&answer["extra_logs"]["accuracy"]), of(|own| own.accuracy));
        assert_eq!(floats(&answer["extra_logs"]["explanation"]), of(|own| own.explanation));
    }
}

#[test]
fn ten_thousand_requests_of_32_connections_are_all_answered_and_right() {
    const CONNECTIONS: usize = 32;
    const REQUESTS: usize = 10_000;
    let (samples, expected) = (samples(), paid_directly(false));
    let different: std::collections::HashSet<String> = expected.iter().map(|paid| format!("{paid:?}")).collect();
    assert!(different.len() > 10, "the samples tell right answers from wrong ones");
    let program = Program::start(&[]);
    let ask = |connection: usize| {
        let (mut client, mut asked) = (Client::connect(program.address), 0);
        for request in (connection..REQUESTS).step_by(CONNECTIONS) {
            let chosen: Vec<usize> =
                (0..1 + request % 4).map(|i| (request * 7 + i * 11 + connection) % samples.len()).collect();
            ask_and_check(&mut client, request.is_multiple_of(3), &chosen, &samples, &expected);
            asked += chosen.len();
        }
        asked
    };
    let ask = &ask;
    let asked: usize = std::thread::scope(|scope| {
        let connections: Vec<_> = (0..CONNECTIONS).map(|one| scope.spawn(move || ask(one))).collect();
        connections.into_iter().map(|one| one.join().unwrap()).sum()
    });
    let mut client = Client::connect(program.address);
    assert_eq!(client.metric("requests_paid_total"), REQUESTS as u64);
    assert_eq!(client.metric("completions_total"), asked as u64);
    assert_eq!(client.metric("requests_refused_total") + client.metric("requests_failed_total"), 0);
    assert_eq!(client.metric("requests_inside") + client.metric("requests_waiting"), 0);
}

#[test]
fn the_program_answers_what_has_begun_before_it_ends() {
    let mut program = Program::start(&["--guard", "--explanation-weight", "2"]);
    let mut watching = Client::connect(program.address);
    let (status, _, health) = watching.ask("GET", "/health", b"");
    let health: Value = serde_json::from_slice(&health).unwrap();
    assert_eq!(
        (status, &health["guard"], &health["verifier"]["name"]),
        (200, &json!(true), &json!("candor-default-verifier"))
    );
    // Long enough that the end is asked for in the middle of it; right in any case.
    let sentences: String = (0..300).map(|i| format!("The brow is {i} millimetres high. ")).collect();
    let completion = format!("<think>{sentences}</think><answer>happy</answer>");
    let address = program.address;
    let answer = std::thread::spawn(move || {
        Client::connect(address).post("/reward", &json!({"completions": [completion], "labels": ["happy"]}))
    });
    while watching.metric("requests_inside") + watching.metric("requests_paid_total") == 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    program.tell_to_end();
    let (status, answer) = answer.join().unwrap();
    assert_eq!((status, answer["rewards"][0]["sentences"].as_array().unwrap().len()), (200, 300));
    drop(watching);
    assert!(program.child.wait().unwrap().success());
}

#[test]
fn the_second_time_it_is_told_the_program_ends_at_once() {
    let mut program = Program::start(&[]);
    // A head that never comes whole is a request that has begun.
    let mut unfinished = Client::connect(program.address);
    unfinished.send("POST /reward HTTP/1.1", b"Content-Le");
    // Signals that come too close become one.
    while program.child.try_wait().unwrap().is_none() {
        program.tell_to_end();
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(program.child.wait().unwrap().success());
}

#[test]
fn trainers_in_python_get_their_rewards() {
    let program = Program::start(&[]);
    let tests = Command::new("python3")
        .arg("test_candor_reward.py")
        .current_dir(repository().join("tools/integrations"))
        .env("CANDOR_REWARD_URL", format!("http://{}", program.address))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .expect("this test needs python3");
    assert!(tests.status.success(), "{}", String::from_utf8_lossy(&tests.stderr));
}

#[test]
fn files_are_paid_as_requests_are() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("completions.jsonl");
    let lines: Vec<String> = samples()
        .into_iter()
        .map(|(completion, label)| json!({"completion": completion, "label": label}).to_string())
        .collect();
    std::fs::write(&file, lines.join("\n")).unwrap();
    let run = |options: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_candor-tools"))
            .args(["reward", "--verifier"])
            .arg(repository().join("models/default-verifier"))
            .arg("--input")
            .arg(&file)
            .args(options)
            .output()
            .unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    for (options, guard) in [(vec!["--json"], false), (vec!["--json", "--guard"], true)] {
        let expected: String =
            paid_directly(guard).iter().map(|paid| serde_json::to_string(paid).unwrap() + "\n").collect();
        assert_eq!(run(&options).1, expected);
    }
    assert_ne!(run(&["--json"]).1, run(&["--json", "--guard"]).1);
    let (good, table, _) = run(&["--accuracy-weight", "0.5"]);
    assert!(
        good && table.contains("explanation") && table.contains("completions                            32"),
        "{table}"
    );

    std::fs::write(&file, format!("{}\n{{\"completion\": 3}}", lines[0])).unwrap();
    let (good, printed, error) = run(&["--json"]);
    assert!(!good && printed.is_empty() && error.contains("completions.jsonl:2: `completion` is a number"), "{error}");
    assert!(run(&["--format-weight", "NaN"]).2.contains("--format-weight must be 0 or above"));
}

/// Says joy where a sentence says so, otherwise neutral. Fails, panics and waits on request.
struct Scripted(Option<mpsc::Receiver<()>>);

impl SentenceClassifier for Scripted {
    fn classify(&mut self, sentences: &[&str]) -> Result<Vec<[f32; 28]>, VerifierError> {
        let any = |word: &str| sentences.iter().any(|sentence| sentence.contains(word));
        if any("wait") {
            // Nobody lets go of it when a test is over.
            let _ = self.0.as_ref().map(mpsc::Receiver::recv);
        }
        assert!(!any("panic"), "a panic, as the test wants it");
        let of = |sentence: &&str| {
            let mut one = [0.0; 28];
            one[if sentence.contains("joy") { 17 } else { 27 }] = if sentence.contains("damaged") { 7.0 } else { 0.9 };
            one
        };
        Ok(sentences.iter().map(of).collect())
    }
}

/// A server in this process over a scripted classifier, which waits for what is sent.
fn scripted(queue: usize, timeout: Duration) -> (SocketAddr, mpsc::Sender<()>) {
    let (release, gate) = mpsc::channel();
    let gate = Mutex::new(Some(gate));
    let open =
        move || -> anyhow::Result<Box<dyn SentenceClassifier>> { Ok(Box::new(Scripted(gate.lock().unwrap().take()))) };
    let pool = Pool::start(1, false, Arc::new(open)).unwrap();
    let router = router(pool, WEIGHTS, &["<stop>".to_owned()], Limits { queue, timeout }, json!({}));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            axum::serve(tokio::net::TcpListener::from_std(listener).unwrap(), router).await.unwrap();
        });
    });
    (address, release)
}

fn completions(sentence: &str) -> Value {
    json!({"completions": [format!("<think>A cue. {sentence}</think><answer>happy</answer><stop>")], "labels": ["happy"]})
}

/// The server is still there, and right. One with a short time-out may run into it on a busy machine.
fn check_health(address: SocketAddr) {
    let ask = || Client::connect(address).post("/reward", &completions("It is joy."));
    let (status, answer) = (0..100).map(|_| ask()).find(|(status, _)| ![408, 504].contains(status)).unwrap();
    assert_eq!((status, answer["rewards"][0]["reward"].as_f64()), (200, Some(3.0)), "{answer}");
}

#[test]
fn wrong_requests_get_reasons() {
    let (address, _release) = scripted(8, Duration::from_secs(60));
    let good = json!({"query": [format!("{PROMPT}x")], "prompts": [PROMPT], "labels": ["sad"]});
    let with = |field: &str, value: Value| {
        let mut body = good.clone();
        body[field] = value;
        body.to_string()
    };
    let without = |field: &str| {
        let mut body = good.clone();
        body.as_object_mut().unwrap().remove(field);
        body.to_string()
    };
    let deep = "[".repeat(100_000);
    let long_label = with("labels", json!(["x".repeat(100_000)]));
    let cases: Vec<(&str, String, u16, &str)> = vec![
        ("/get_reward", String::new(), 400, "the body is no JSON"),
        ("/get_reward", "{\"query\": [".into(), 400, "the body is no JSON"),
        ("/get_reward", deep, 400, "recursion limit"),
        ("/get_reward", "[]".into(), 422, "the body is a list, not an object"),
        ("/get_reward", "\"\u{0}\"".into(), 400, "the body is no JSON"),
        ("/get_reward", without("query"), 422, "there is no `query`"),
        ("/get_reward", without("prompts"), 422, "there is no `prompts`"),
        ("/get_reward", without("labels"), 422, "--data.label_key"),
        ("/get_reward", with("query", json!("x")), 422, "`query` is a text, not a list of texts"),
        ("/get_reward", with("query", json!([7])), 422, "query[0] is a number, not a text"),
        ("/get_reward", with("labels", json!([null])), 422, "labels[0] is null, not a text; OpenRLHF"),
        ("/get_reward", with("labels", json!(["sad", "sad"])), 422, "`query` has 1, `prompts` has 1, `labels` has 2"),
        ("/get_reward", with("labels", json!(["calm"])), 422, "labels[0]: the label \"calm\" names no emotion"),
        ("/get_reward", long_label, 422, "labels[0]: the label \"xxx"),
        (
            "/get_reward",
            with("prompts", json!(["Another prompt, and a long one."])),
            422,
            "query[0] does not hold the end",
        ),
        ("/reward", good.to_string(), 422, "there is no `completions`"),
        (
            "/reward",
            json!({"completions": ["a", {}], "labels": ["sad"]}).to_string(),
            422,
            "completions[1] is an object",
        ),
        ("/reward", json!({"completions": ["a"], "labels": []}).to_string(), 422, "`labels` has 0"),
        ("/rewards", String::new(), 404, "POST /get_reward"),
    ];
    let count = cases.len() as u64;
    // One connection for all: a refusal does not cost it.
    let mut client = Client::connect(address);
    for (path, body, expected, reason) in cases {
        let (status, _, answer) = client.ask("POST", path, body.as_bytes());
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        let said = answer["error"].as_str().unwrap();
        assert!(status == expected && said.contains(reason) && said.len() < 1000, "{path}: {status} {said}");
    }
    let (status, _, answer) = client.ask("POST", "/reward", b"{\"completions\": [\"\xff\"], \"labels\": [\"sad\"]}");
    assert_eq!(status, 400, "{}", String::from_utf8_lossy(&answer));
    for (method, path) in [("GET", "/reward"), ("POST", "/health"), ("DELETE", "/get_reward")] {
        assert_eq!(client.ask(method, path, b"").0, 405, "{method} {path}");
    }
    // The refusals of the router itself are not the rewards' to count.
    assert_eq!(client.metric("requests_refused_total"), count);
    check_health(address);
}

#[test]
fn empty_lists_and_odd_texts_are_fine() {
    let (address, _release) = scripted(8, Duration::from_secs(60));
    let mut client = Client::connect(address);
    let empty = json!({"query": [], "prompts": [], "labels": [], "metas": {"unknown": "fields"}});
    let (status, answer) = client.post("/get_reward", &empty);
    assert_eq!((status, &answer["rewards"], &answer["extra_logs"]["format"]), (200, &json!([]), &json!([])));
    for text in ["\u{0}", "<think></think>", "\u{202e}\u{feff}", &"<think>".repeat(1000), "<think>\"Oh. </think>"] {
        let (status, answer) = client.post("/reward", &json!({"completions": [text], "labels": ["sad"]}));
        assert_eq!((status, answer["rewards"][0]["reward"].as_f64()), (200, Some(0.0)), "{text:?}: {answer}");
    }
    // The end tokens that are known from the start, and the one that the user named.
    for end in END_TOKENS.into_iter().chain(["<stop>"]) {
        let text = format!("<think>It is joy.</think><answer>happy</answer>{end}");
        let (_, answer) = client.post("/reward", &json!({"completions": [text], "labels": ["happy"]}));
        assert_eq!(answer["rewards"][0]["reward"].as_f64(), Some(3.0), "{end}");
    }
}

#[test]
fn bodies_that_are_too_long_or_never_come() {
    let (address, _release) = scripted(8, Duration::from_secs(60));
    let (status, _, body) = {
        let mut client = Client::connect(address);
        client.send(&format!("POST /reward HTTP/1.1\r\nContent-Length: {}", BODY_LIMIT + 1), b"\r\n{");
        client.read()
    };
    assert_eq!(status, 413);
    assert!(String::from_utf8(body).unwrap().contains("send fewer completions"));
    let mut client = Client::connect(address);
    let chunk = format!("{:x}\r\n{}\r\n", BODY_LIMIT + 1, " ".repeat(BODY_LIMIT + 1));
    client.send("POST /reward HTTP/1.1\r\nTransfer-Encoding: chunked", format!("\r\n{chunk}0\r\n\r\n").as_bytes());
    assert_eq!(client.read().0, 413);
    let (hasty, _release) = scripted(8, Duration::from_millis(300));
    let mut client = Client::connect(hasty);
    client.send("POST /reward HTTP/1.1\r\nContent-Length: 100", b"\r\n{\"completions\": ");
    assert_eq!(client.read().0, 408);
    check_health(hasty);
    // Gone in the middle of a request, and in the middle of its head.
    Client::connect(address).send("POST /reward HTTP/1.1\r\nContent-Length: 100", b"\r\n{");
    Client::connect(address).send("POST /reward HTTP", b"");
    // No HTTP at all.
    let mut client = Client::connect(address);
    client.send("\u{16}\u{3}\u{1} nonsense", b"\r\n\r\n");
    let mut answer = Vec::new();
    let _ = client.0.read_to_end(&mut answer);
    assert!(String::from_utf8_lossy(&answer).starts_with("HTTP/1.1 400"), "{answer:?}");
    check_health(address);
}

#[test]
fn a_verifier_that_fails_or_panics_is_a_500_and_no_end() {
    let (address, _release) = scripted(8, Duration::from_secs(60));
    let mut client = Client::connect(address);
    for (sentence, reason) in [("damaged joy", "weights are damaged"), ("panic", "panicked"), ("panic", "panicked")] {
        let (status, answer) = client.post("/reward", &completions(sentence));
        assert_eq!(status, 500);
        assert!(answer["error"].as_str().unwrap().contains(reason), "{answer}");
        check_health(address);
    }
    assert_eq!(client.metric("requests_failed_total"), 3);
}

#[test]
fn a_full_queue_refuses_and_keeps_what_is_inside() {
    let (address, release) = scripted(3, Duration::from_secs(60));
    let mut watching = Client::connect(address);
    let inside: Vec<_> = (0..3)
        .map(|i| {
            let body = completions(&format!("wait {i} joy"));
            std::thread::spawn(move || Client::connect(address).post("/reward", &body))
        })
        .collect();
    while watching.metric("requests_inside") < 3 {
        std::thread::sleep(Duration::from_millis(5));
    }
    let body = completions("It is joy.").to_string();
    let (status, headers, _) = Client::connect(address).ask("POST", "/reward", body.as_bytes());
    assert_eq!((status, &*headers["retry-after"]), (503, "1"));
    drop(release);
    for answer in inside {
        let (status, answer) = answer.join().unwrap();
        assert_eq!((status, answer["rewards"][0]["reward"].as_f64()), (200, Some(3.0)));
    }
    check_health(address);
}

#[test]
fn a_verifier_that_takes_too_long_is_a_504() {
    let (address, release) = scripted(8, Duration::from_millis(300));
    let (status, answer) = Client::connect(address).post("/reward", &completions("wait"));
    assert_eq!((status, answer["error"].as_str()), (504, Some("the verifier did not come to it within 0.3 s")));
    // One that has given up is not worked on: the thread is free for the next as soon as it is let go.
    drop(release);
    check_health(address);
}
