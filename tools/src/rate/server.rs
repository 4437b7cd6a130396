//! The page and what it talks to. It is told what stands first and what second, never which file either is of, and it
//! cannot work that out: tokens and draws come from the seed, which stays here.
//!
//! The votes are guarded against other pages in the same browser: requests to a server on this machine must name this
//! machine (a foreign name that resolves to it is refused), and votes must come from the page itself.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::clips::{Clips, Shown};
use super::pairs::{Draw, Pair, Side};
use super::votes::{Choice, Question, Vote, Votes};

/// No vote is longer.
const MOST_BODY: usize = 4096;
/// Characters of a rater's name.
const MOST_NAME: usize = 60;
/// The page loads nothing but what this server has, whatever an explanation says.
const CONTENT_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
    media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Why a request is refused.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal(pub StatusCode, pub String);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(json!({"error": self.1}))).into_response()
    }
}

fn refuse<T>(status: StatusCode, reason: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal(status, reason.into()))
}

/// What is served.
pub struct Rating {
    /// The pairs that are shown.
    pub pairs: Vec<Pair>,
    /// Their clips.
    pub clips: Clips,
    /// The draws.
    pub draw: Draw,
    /// The only rater; otherwise the page asks for the name.
    pub rater: Option<String>,
    /// Whether other machines are let in, under whatever name they know this one by.
    pub public: bool,
    /// Where votes go.
    pub votes: Mutex<Votes>,
}

/// Where the page shows an explanation, or that neither is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Place {
    First,
    Tie,
    Second,
}

impl Place {
    fn choice(self, first: Side) -> Choice {
        match (self, first) {
            (Place::Tie, _) => Choice::Tie,
            (Place::First, Side::A) | (Place::Second, Side::B) => Choice::A,
            (Place::First, Side::B) | (Place::Second, Side::A) => Choice::B,
        }
    }

    fn of(choice: Choice, first: Side) -> Place {
        match (choice, first) {
            (Choice::Tie, _) => Place::Tie,
            (Choice::A, Side::A) | (Choice::B, Side::B) => Place::First,
            (Choice::A, Side::B) | (Choice::B, Side::A) => Place::Second,
        }
    }
}

/// What the page shows. No field may depend on which file an explanation is of.
#[derive(Serialize)]
struct Page {
    rater: Option<String>,
    /// Whether the rater may be another one.
    named_here: bool,
    pairs: usize,
    done: usize,
    /// The vote that can be taken back.
    last: Option<Last>,
    pair: Option<ShownPair>,
}

#[derive(Serialize)]
struct Last {
    pair: String,
    question: Question,
}

#[derive(Serialize)]
struct ShownPair {
    token: String,
    question: Question,
    answers: HashMap<Question, Place>,
    first: ShownExplanation,
    second: ShownExplanation,
    clip: Shown,
}

#[derive(Serialize)]
struct ShownExplanation {
    text: String,
    answer: Option<String>,
}

#[derive(Deserialize)]
struct WhoAsks {
    rater: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VoteRequest {
    rater: Option<String>,
    pair: String,
    question: Question,
    choice: Place,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UndoRequest {
    rater: Option<String>,
    pair: String,
    question: Question,
}

impl Rating {
    /// All routes with their guards.
    pub fn router(self) -> Router {
        let rating = Arc::new(self);
        let file = |content_type: &'static str, text: &'static str| {
            get(move || async move { ([(header::CONTENT_TYPE, content_type)], text) })
        };
        Router::new()
            .route("/", file("text/html; charset=utf-8", include_str!("page.html")))
            .route("/page.css", file("text/css; charset=utf-8", include_str!("page.css")))
            .route("/page.js", file("text/javascript; charset=utf-8", include_str!("page.js")))
            .route("/icon.svg", file("image/svg+xml", include_str!("icon.svg")))
            .route("/api/state", get(state))
            .route("/api/vote", post(vote))
            .route("/api/undo", post(undo))
            .route("/clips/{token}/{number}", get(clip))
            .fallback(|| async { Refusal(StatusCode::NOT_FOUND, "there is no such page".into()) })
            .layer(DefaultBodyLimit::max(MOST_BODY))
            .layer(from_fn_with_state(rating.clone(), guard))
            .with_state(rating)
    }

    fn name(&self, asked: Option<String>) -> Result<Option<String>, Refusal> {
        let name = asked.as_deref().map(str::trim).filter(|name| !name.is_empty());
        match (&self.rater, name) {
            (Some(only), Some(name)) if only != name => {
                refuse(StatusCode::FORBIDDEN, format!("this page is for {only:?} alone (--rater); reload it"))
            }
            (Some(only), _) => Ok(Some(only.clone())),
            (None, name) => name.map(|name| check_name(name).map(str::to_owned)).transpose().map_err(|reason| {
                Refusal(StatusCode::UNPROCESSABLE_ENTITY, format!("the name {name:?} {reason}; give another"))
            }),
        }
    }

    fn named(&self, asked: Option<String>) -> Result<String, Refusal> {
        match self.name(asked)? {
            Some(name) => Ok(name),
            None => refuse(StatusCode::UNPROCESSABLE_ENTITY, "`rater` is missing: who votes?"),
        }
    }

    fn pair(&self, token: &str) -> Result<&Pair, Refusal> {
        // Only as many hashes as there are pairs; nothing that needs an index.
        self.pairs.iter().find(|pair| self.draw.token(pair) == token).ok_or_else(|| {
            Refusal(StatusCode::NOT_FOUND, format!("there is no pair {token:?}; reload the page to go on"))
        })
    }

    fn page(&self, rater: Option<&str>, votes: &Votes) -> Page {
        let mut page = Page {
            rater: rater.map(str::to_owned),
            named_here: self.rater.is_none(),
            pairs: self.pairs.len(),
            done: 0,
            last: None,
            pair: None,
        };
        let Some(rater) = rater else { return page };
        for place in self.draw.order(rater, &self.pairs) {
            let pair = &self.pairs[place];
            let open = |&question: &Question| votes.standing.get(rater, &pair.key, question).is_none();
            match Question::ALL.into_iter().find(open) {
                None => page.done += 1,
                Some(question) if page.pair.is_none() => page.pair = Some(self.shown(rater, pair, question, votes)),
                Some(_) => {}
            }
        }
        // Votes on pairs that --limit leaves out now would not be asked for again.
        page.last = votes.standing.latest(rater).find_map(|(key, question)| {
            let pair = self.pairs.iter().find(|pair| pair.key == key)?;
            Some(Last { pair: self.draw.token(pair), question })
        });
        page
    }

    fn shown(&self, rater: &str, pair: &Pair, question: Question, votes: &Votes) -> ShownPair {
        let first = self.draw.first(rater, pair);
        let (one, two) = match first {
            Side::A => (&pair.a, &pair.b),
            Side::B => (&pair.b, &pair.a),
        };
        let shown = |explanation: &super::explanations::Explanation| ShownExplanation {
            text: explanation.text.clone(),
            answer: explanation.answer.clone(),
        };
        let answer = |question| {
            let choice = votes.standing.get(rater, &pair.key, question)?.choice?;
            Some((question, Place::of(choice, first)))
        };
        ShownPair {
            token: self.draw.token(pair),
            question,
            answers: Question::ALL.into_iter().filter_map(answer).collect(),
            first: shown(one),
            second: shown(two),
            clip: self.clips.shown(pair),
        }
    }

    fn vote(&self, request: VoteRequest) -> Result<Page, Refusal> {
        let rater = self.named(request.rater)?;
        let pair = self.pair(&request.pair)?;
        let first = self.draw.first(&rater, pair);
        let choice = request.choice.choice(first);
        let mut votes = self.votes.lock().unwrap_or_else(PoisonError::into_inner);
        match votes.standing.get(&rater, &pair.key, request.question) {
            // The answer to the first request was lost on its way, and the page asks again.
            Some(vote) if vote.choice == Some(choice) => {}
            Some(_) => {
                return refuse(
                    StatusCode::CONFLICT,
                    "this question was answered already; take that answer back (undo) to change it",
                );
            }
            None => self.add(&mut votes, &rater, pair, request.question, Some(choice))?,
        }
        Ok(self.page(Some(&rater), &votes))
    }

    fn undo(&self, request: UndoRequest) -> Result<Page, Refusal> {
        let rater = self.named(request.rater)?;
        let pair = self.pair(&request.pair)?;
        let mut votes = self.votes.lock().unwrap_or_else(PoisonError::into_inner);
        if votes.standing.get(&rater, &pair.key, request.question).is_some() {
            self.add(&mut votes, &rater, pair, request.question, None)?;
        }
        Ok(self.page(Some(&rater), &votes))
    }

    fn add(
        &self,
        votes: &mut Votes,
        rater: &str,
        pair: &Pair,
        question: Question,
        choice: Option<Choice>,
    ) -> Result<(), Refusal> {
        let vote = Vote {
            rater: rater.to_owned(),
            pair: pair.key.clone(),
            id: pair.id.clone(),
            question,
            choice,
            first: self.draw.first(rater, pair),
            time_s: Vote::now(),
        };
        votes.add(vote).map_err(|error| {
            log::error!("cannot write {}: {error}; the vote is not kept", votes.path().display());
            Refusal(StatusCode::INSUFFICIENT_STORAGE, format!("the vote could not be saved: {error}"))
        })
    }
}

/// The name as it is kept.
pub fn check_name(name: &str) -> Result<&str, String> {
    let name = name.trim();
    match name.chars().count() {
        0 => Err("is empty".into()),
        1..=MOST_NAME if name.chars().any(char::is_control) => Err("holds control characters".into()),
        1..=MOST_NAME => Ok(name),
        count => Err(format!("has {count} characters, more than {MOST_NAME}")),
    }
}

async fn state(State(rating): State<Arc<Rating>>, Query(who): Query<WhoAsks>) -> Result<Json<Page>, Refusal> {
    let rater = rating.name(who.rater)?;
    let votes = rating.votes.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(Json(rating.page(rater.as_deref(), &votes)))
}

async fn vote(State(rating): State<Arc<Rating>>, headers: HeaderMap, body: Bytes) -> Result<Json<Page>, Refusal> {
    let request = read(&headers, &body)?;
    waiting(move || rating.vote(request)).await.map(Json)
}

async fn undo(State(rating): State<Arc<Rating>>, headers: HeaderMap, body: Bytes) -> Result<Json<Page>, Refusal> {
    let request = read(&headers, &body)?;
    waiting(move || rating.undo(request)).await.map(Json)
}

async fn clip(
    State(rating): State<Arc<Rating>>,
    Path((token, number)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    // What is no number names no picture either.
    let number = number.parse().unwrap_or(usize::MAX);
    waiting(move || rating.clips.serve(&token, number, &headers)).await
}

/// Does what waits for the disk beside the threads that answer.
async fn waiting<T: Send + 'static>(work: impl FnOnce() -> Result<T, Refusal> + Send + 'static) -> Result<T, Refusal> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => {
            log::error!("a request failed: {error}");
            refuse(StatusCode::INTERNAL_SERVER_ERROR, "the server failed; see its log")
        }
    }
}

/// Reads a body of JSON. Its type must be said: pages of other origins cannot say it without being asked for leave first.
fn read<T: DeserializeOwned>(headers: &HeaderMap, body: &[u8]) -> Result<T, Refusal> {
    let said = headers.get(header::CONTENT_TYPE).and_then(|said| said.to_str().ok()).unwrap_or_default();
    if said.split(';').next().unwrap_or_default().trim() != "application/json" {
        return refuse(StatusCode::UNSUPPORTED_MEDIA_TYPE, format!("content-type is {said:?}, not application/json"));
    }
    serde_json::from_slice(body)
        .map_err(|error| Refusal(StatusCode::UNPROCESSABLE_ENTITY, format!("the request cannot be read: {error}")))
}

/// Refuses what does not come from the page, and tells browsers what the page may do.
async fn guard(State(rating): State<Arc<Rating>>, request: Request, next: Next) -> Response {
    let is_media = request.uri().path().starts_with("/clips/");
    let mut response = match check_sender(request.method(), request.headers(), rating.public) {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    };
    let response_is_clip = response.status().is_success();
    let headers = response.headers_mut();
    // A clip stays as it is; everything else changes with each vote.
    let cache = if is_media && response_is_clip { "private, max-age=3600" } else { "no-store" };
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, CONTENT_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, cache),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
    response
}

fn check_sender(method: &Method, headers: &HeaderMap, public: bool) -> Result<(), Refusal> {
    let text = |name: header::HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or_default());
    let host = text(header::HOST).unwrap_or_default();
    if !public && !is_this_machine(host) {
        return refuse(
            StatusCode::MISDIRECTED_REQUEST,
            format!("{host:?} is not a name of this machine; open the address that the program has printed"),
        );
    }
    if method == Method::GET || method == Method::HEAD {
        return Ok(());
    }
    match text(header::ORIGIN) {
        Some(origin) if origin.split_once("://").map(|(_, origin)| origin) != Some(host) => {
            refuse(StatusCode::FORBIDDEN, format!("the request comes from {origin:?}, not from the page at {host:?}"))
        }
        _ => Ok(()),
    }
}

/// Whether a `Host` header names the loopback interface.
fn is_this_machine(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else { return false };
    let name = authority.host().trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}
