//! `candor-tools reward-server`: the rewards over HTTP, for trainers that run elsewhere. One route speaks as OpenRLHF's
//! remote reward models do, one is plain.
//!
//! A request that finds the threads busy waits its turn up to the time-out: trainers give up after a few refusals and go
//! on without the reward. Only where more requests than `--queue` are inside is one refused, with 503, before its body is
//! read; so neither their number nor their bytes can grow without bound.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::ensure;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequest, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use candor::device::Choice;
use candor::verify::{SentenceClassifier, Verifier};
use candor::with_device;
use candor_kernels::cpu::CpuDevice;
use clap::Args;
use serde_json::{Map, Value, json};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

use super::completion::{END_TOKENS, completion_of, without_end_tokens};
use super::pool::{Open, Pool, Task};
use super::settings::RewardSettings;
use super::{Paid, Weights, emotion_of, open_verifier};
use crate::dataset::kind;
use crate::http;

/// Largest body, in bytes: some thousand completions.
pub const BODY_LIMIT: usize = 4 << 20;
/// Bodies that are held at a time, in KiB; what comes beyond waits before it is read.
const BODIES_KIB: usize = 256 << 10;
/// Seconds after which a refused client should ask again.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// `candor-tools reward-server`
#[derive(Args)]
pub struct RewardServerArgs {
    /// The verifier's folder.
    #[arg(long)]
    pub verifier: PathBuf,
    /// Address and port; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:8000")]
    pub address: SocketAddr,
    /// Allow an address that other machines reach. There is no access control.
    #[arg(long)]
    pub public: bool,
    /// How completions are paid.
    #[command(flatten)]
    pub settings: RewardSettings,
    /// Threads, each with a verifier of its own over the same mapped weights; one a core by default.
    #[arg(long)]
    pub threads: Option<usize>,
    /// Where the verifier computes: auto (a GPU if one can be used, else the processor), cpu, cuda or cuda:N.
    #[arg(long, default_value_t = Choice::Auto)]
    pub device: Choice,
    /// Most requests inside at a time; further ones are refused with 503.
    #[arg(long, default_value_t = 1024)]
    pub queue: usize,
    /// Seconds after which a request that has not been answered is given up.
    #[arg(long, default_value_t = 120)]
    pub timeout: u64,
    /// A special token that ends the model's turn, beside those of the usual families; may be given several times.
    #[arg(long)]
    pub end_token: Vec<String>,
}

/// What bounds a server.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Most requests inside at a time.
    pub queue: usize,
    /// Time a request may take.
    pub timeout: Duration,
}

/// What requests share.
struct Server {
    pool: Pool,
    places: Semaphore,
    /// KiB of bodies.
    bodies: Semaphore,
    limits: Limits,
    weights: Weights,
    end_tokens: Vec<String>,
    about: Value,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    paid: AtomicU64,
    completions: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
}

/// Runs `candor-tools reward-server`.
pub fn run(args: &RewardServerArgs) -> anyhow::Result<()> {
    ensure!((1..=100_000).contains(&args.queue), "--queue must lie between 1 and 100000, not {}", args.queue);
    ensure!(
        (1..=86_400).contains(&args.timeout),
        "--timeout must lie between 1 and 86400 seconds, not {}",
        args.timeout
    );
    args.settings.check()?;
    let weights = args.settings.weights();
    let folder = args.verifier.clone();
    let chosen = args.device.open(Some(1))?;
    let verifier = Verifier::open(&folder, CpuDevice::new(Some(1)))?.identity()?;
    let open = move || -> anyhow::Result<Box<dyn SentenceClassifier>> {
        with_device!(chosen.clone(), device => Ok(Box::new(open_verifier(&folder, device)?)))
    };
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.unwrap_or_else(cores);
    let about = json!({
        "status": "ok",
        "verifier": verifier,
        "weights": {"format": weights.format, "accuracy": weights.accuracy, "explanation": weights.explanation},
        "guard": args.settings.guard,
        "threads": threads,
    });
    let pool = Pool::start(threads, args.settings.guard, Arc::new(open) as Arc<Open>)?;
    let limits = Limits { queue: args.queue, timeout: Duration::from_secs(args.timeout) };
    http::serve(args.address, args.public, router(pool, weights, &args.end_token, limits, about))
}

/// The routes. `end_tokens` are known beside [`END_TOKENS`]; `about` is what `GET /health` says.
pub fn router(pool: Pool, weights: Weights, end_tokens: &[String], limits: Limits, about: Value) -> Router {
    let end_tokens = END_TOKENS.iter().map(ToString::to_string).chain(end_tokens.iter().cloned()).collect();
    let server = Server {
        pool,
        places: Semaphore::new(limits.queue),
        bodies: Semaphore::new(BODIES_KIB),
        limits,
        weights,
        end_tokens,
        about,
        counts: Counts::default(),
    };
    Router::new()
        .route("/get_reward", post(get_reward))
        .route("/reward", post(reward))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .fallback(async || Refusal::new(StatusCode::NOT_FOUND, ROUTES))
        .method_not_allowed_fallback(async || Refusal::new(StatusCode::METHOD_NOT_ALLOWED, ROUTES))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(Arc::new(server))
}

const ROUTES: &str = "there are POST /get_reward, POST /reward, GET /health and GET /metrics";

/// A request that gets no rewards.
struct Refusal {
    status: StatusCode,
    reason: String,
}

impl Refusal {
    fn new(status: StatusCode, reason: impl Into<String>) -> Refusal {
        Refusal { status, reason: reason.into() }
    }

    /// The request can be read and does not say what it must.
    fn wrong(reason: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, reason)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(json!({"error": self.reason}))).into_response();
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER);
        }
        response
    }
}

/// As OpenRLHF asks and wants it answered. `scores` lie between 0 and 1, for its dynamic filtering.
async fn get_reward(State(server): State<Arc<Server>>, request: Request) -> Response {
    let answer = |paid: &[Paid], weights: &Weights| {
        let most = weights.format + weights.accuracy + weights.explanation;
        let list = |part: &dyn Fn(&Paid) -> f32| paid.iter().map(part).collect::<Vec<f32>>();
        json!({
            "rewards": list(&|own| own.reward),
            "scores": list(&|own| if most > 0.0 { own.reward / most } else { 0.0 }),
            "extra_logs": {
                "format": list(&|own| own.format),
                "accuracy": list(&|own| own.accuracy),
                "explanation": list(&|own| own.explanation),
            },
        })
    };
    server.answer(request, queries, answer).await
}

/// The plain route: completions and labels in, the parts of each completion's reward out.
async fn reward(State(server): State<Arc<Server>>, request: Request) -> Response {
    server.answer(request, completions, |paid, _| json!({"rewards": paid})).await
}

async fn health(State(server): State<Arc<Server>>) -> Json<Value> {
    Json(server.about.clone())
}

/// Counters in Prometheus' text format.
async fn metrics(State(server): State<Arc<Server>>) -> String {
    let counts = &server.counts;
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let inside = server.limits.queue - server.places.available_permits();
    [
        ("requests_paid_total", "counter", read(&counts.paid)),
        ("requests_refused_total", "counter", read(&counts.refused)),
        ("requests_failed_total", "counter", read(&counts.failed)),
        ("completions_total", "counter", read(&counts.completions)),
        ("requests_inside", "gauge", inside as u64),
        ("requests_waiting", "gauge", server.pool.waiting() as u64),
    ]
    .map(|(name, kind, value)| format!("# TYPE candor_reward_{name} {kind}\ncandor_reward_{name} {value}\n"))
    .concat()
        + &candor::metrics::text()
}

impl Server {
    /// Answers a request and counts it; what is not paid is said on the log, with the reason.
    async fn answer(
        &self,
        request: Request,
        parse: impl FnOnce(&Map<String, Value>, &[String]) -> Result<Vec<Task>, Refusal>,
        answer: impl FnOnce(&[Paid], &Weights) -> Value,
    ) -> Response {
        let path = request.uri().path().to_owned();
        match self.pay(request, parse).await {
            Ok(paid) => {
                self.counts.paid.fetch_add(1, Ordering::Relaxed);
                self.counts.completions.fetch_add(paid.len() as u64, Ordering::Relaxed);
                Json(answer(&paid, &self.weights)).into_response()
            }
            Err(refusal) => {
                let failed = refusal.status.is_server_error() && refusal.status != StatusCode::SERVICE_UNAVAILABLE;
                let counter = if failed { &self.counts.failed } else { &self.counts.refused };
                counter.fetch_add(1, Ordering::Relaxed);
                log::warn!("{path}: {}: {}", refusal.status.as_u16(), refusal.reason);
                refusal.into_response()
            }
        }
    }

    async fn pay(
        &self,
        request: Request,
        parse: impl FnOnce(&Map<String, Value>, &[String]) -> Result<Vec<Task>, Refusal>,
    ) -> Result<Vec<Paid>, Refusal> {
        let deadline = Instant::now() + self.limits.timeout;
        let full = || Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "too many requests wait; ask again in a second");
        let _place = self.places.try_acquire().map_err(|_| full())?;
        let length = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        let length: usize = length.unwrap_or(BODY_LIMIT);
        if length > BODY_LIMIT {
            return Err(too_long());
        }
        let room = self.bodies.acquire_many(length.div_ceil(1024) as u32);
        let _room = timeout_at(deadline, room).await.ok().and_then(Result::ok).ok_or_else(full)?;
        let body = timeout_at(deadline, Bytes::from_request(request, &())).await;
        let body = body.map_err(|_| Refusal::new(StatusCode::REQUEST_TIMEOUT, "the body did not come in time"))?;
        let body = body.map_err(|rejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => too_long(),
            status => Refusal::new(status, rejection.body_text()),
        })?;
        let value: Value = serde_json::from_slice(&body)
            .map_err(|error| Refusal::new(StatusCode::BAD_REQUEST, format!("the body is no JSON: {error}")))?;
        drop(body);
        let fields =
            value.as_object().ok_or_else(|| Refusal::wrong(format!("the body is {}, not an object", kind(&value))))?;
        let tasks = parse(fields, &self.end_tokens)?;
        drop(value);
        let outcome = timeout_at(deadline, self.pool.submit(tasks)).await.map_err(|_| {
            let seconds = self.limits.timeout.as_secs_f64();
            Refusal::new(StatusCode::GATEWAY_TIMEOUT, format!("the verifier did not come to it within {seconds} s"))
        })?;
        let failed = |reason: String| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, reason);
        let rewards = outcome.map_err(|_| failed("the thread that had this request ended".into()))?.map_err(failed)?;
        Ok(rewards.into_iter().map(|rewards| Paid::new(rewards, &self.weights)).collect())
    }
}

fn too_long() -> Refusal {
    let reason = format!("the body is longer than {BODY_LIMIT} bytes; send fewer completions at a time");
    Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, reason)
}

/// The tasks of a body of `POST /get_reward`.
fn queries(fields: &Map<String, Value>, end_tokens: &[String]) -> Result<Vec<Task>, Refusal> {
    let queries = texts(fields, "query", "")?;
    let prompts = texts(fields, "prompts", "")?;
    let labels = texts(fields, "labels", "; OpenRLHF sends them with --data.label_key")?;
    of_one_length(&[("query", queries.len()), ("prompts", prompts.len()), ("labels", labels.len())])?;
    let task = |(index, ((query, prompt), label)): (usize, ((&str, &str), &str))| {
        let completion = completion_of(query, prompt, end_tokens).ok_or_else(|| {
            Refusal::wrong(format!(
                "query[{index}] does not hold the end of prompts[{index}], so that the completion cannot be told from it"
            ))
        })?;
        task(completion, label, index)
    };
    queries.into_iter().zip(prompts).zip(labels).enumerate().map(task).collect()
}

/// The tasks of a body of `POST /reward`.
fn completions(fields: &Map<String, Value>, end_tokens: &[String]) -> Result<Vec<Task>, Refusal> {
    let completions = texts(fields, "completions", "")?;
    let labels = texts(fields, "labels", "")?;
    of_one_length(&[("completions", completions.len()), ("labels", labels.len())])?;
    let task = |(index, (text, label)): (usize, (&str, &str))| task(without_end_tokens(text, end_tokens), label, index);
    completions.into_iter().zip(labels).enumerate().map(task).collect()
}

fn task(completion: &str, label: &str, index: usize) -> Result<Task, Refusal> {
    let emotion = emotion_of(label).map_err(|reason| Refusal::wrong(format!("labels[{index}]: {reason}")))?;
    Ok(Task { completion: completion.to_owned(), emotion })
}

/// The texts of a list; `hint` helps where one is none.
fn texts<'v>(fields: &'v Map<String, Value>, name: &str, hint: &str) -> Result<Vec<&'v str>, Refusal> {
    let value = fields.get(name).ok_or_else(|| Refusal::wrong(format!("there is no `{name}`{hint}")))?;
    let wrong = || Refusal::wrong(format!("`{name}` is {}, not a list of texts{hint}", kind(value)));
    let one = |(index, value): (usize, &'v Value)| {
        value.as_str().ok_or_else(|| Refusal::wrong(format!("{name}[{index}] is {}, not a text{hint}", kind(value))))
    };
    value.as_array().ok_or_else(wrong)?.iter().enumerate().map(one).collect()
}

fn of_one_length(lists: &[(&str, usize)]) -> Result<(), Refusal> {
    if lists.windows(2).all(|pair| pair[0].1 == pair[1].1) {
        return Ok(());
    }
    let lengths: Vec<String> = lists.iter().map(|(name, length)| format!("`{name}` has {length}")).collect();
    Err(Refusal::wrong(format!("the lists must be of one length: {}", lengths.join(", "))))
}
