//! What is allocated once everything is warm. The numeric path allocates nothing: pictures through the vision tower, the
//! gate and the projector, the prompt, tokens chosen under the grammar, and sentences through the verifier's network. A
//! whole window allocates a bounded number of times but for the face detector, and no more memory is held after sixty
//! windows than after the clip's first two showings.
//!
//! A test binary of its own: the allocator counts for the whole process, and nothing else may run in it.
#![cfg(feature = "media")]
#![allow(unsafe_code)] // an allocator that counts can be written in no other way

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};

use candor::manifest::Manifest;
use candor::media::{Fit, Source, SourceOptions, Window, Windows};
use candor::model::{Classifier, LanguageModel, Model, Piece};
use candor::text::{Grammar, Sampler, Sampling, Tokenizer};
use candor::watch::{WatchSettings, Watcher};
use candor_kernels::cpu::CpuDevice;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static LIVE: AtomicI64 = AtomicI64::new(0);

struct Counting;

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        LIVE.fetch_add(layout.size() as i64, Relaxed);
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size() as i64, Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        LIVE.fetch_add(size as i64 - layout.size() as i64, Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Windows until everything is warm, and windows that are then counted.
const WARM: usize = 10;
const COUNTED: usize = 50;

/// What a whole window may allocate beside the numeric path where no faces are looked for (760 times are seen once every
/// sentence was read before, and 1 300 until then):
/// - the observation: its strings, probabilities and sentences;
/// - the tokenizer crate: some tens for every sentence that the verifier has not read before;
/// - label scoring: the tree of what the labels spell, and a list of tokens for every branch of its search;
/// - the completion's text and tokens, and the scaled picture of every frame.
///
/// The face detector crate makes pyramids and lists of boxes for every frame, some 20 000 times a window.
const A_WINDOW: u64 = 2000;
/// Bytes by which what is held may differ between two windows: sentences of another length, and those that the verifier
/// remembers, some 250 bytes each.
const SLACK: i64 = 64 << 10;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The windows of the demo's clip, read before anything is counted.
fn windows(watcher: &Watcher<CpuDevice>) -> Vec<Window> {
    let clip = root().join("demo/sad-to-happy.mp4");
    let source = Source::open(clip.to_str().expect("UTF-8"), SourceOptions::default()).expect("the clip opens");
    let settings = watcher.windows(None, None).expect("settings in range");
    Windows::new(source, settings).map(|window| window.expect("the clip is sound")).collect()
}

/// Allocations while `code` runs.
fn allocations(code: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.load(Relaxed);
    code();
    ALLOCATIONS.load(Relaxed) - before
}

// One test, as two at once would count each other's.
#[test]
fn the_steady_state() {
    the_numeric_path_allocates_nothing();
    whole_windows_hold_no_more(Fit::Stretch, Some(A_WINDOW));
    whole_windows_hold_no_more(Fit::Face, None);
}

fn the_numeric_path_allocates_nothing() {
    // One thread: which of several first needs memory of its own for a task is chance.
    let (folder, device) = (root().join("models/default"), CpuDevice::new(Some(1)));
    let manifest = Manifest::open(&folder).expect("the manifest");
    let mut model = Model::open(&folder, device.clone()).expect("the default model opens");
    let mut verifier = Classifier::open(&manifest.verifier_folder().expect("a verifier"), device).expect("it opens");
    let tokenizer = Tokenizer::open(&folder).expect("the tokenizer");
    let config = model.config().clone();
    let table = Arc::new(tokenizer.token_table(config.decoder.vocabulary).expect("a table"));
    let grammar = Grammar::new(table, &manifest.model.labels, 64).expect("a grammar");
    let ids = tokenizer.encode(&manifest.model.instruction).expect("ids");
    let gate_ids: Vec<u32> = (0..12).collect();
    let [mut features, mut video] = [(); 2].map(|()| model.rows().expect("rows"));
    let mut session = model.session(400).expect("a session");

    let frame = 3 * config.vision.image * config.vision.image;
    let mut pixels = vec![0.0_f32; config.frames * frame];
    let mut keys: Vec<u64> = (0..config.frames as u64).collect();
    let warm = Sampling { temperature: 1.0, top_p: 0.9, seed: 1 };
    let mut samplers = [Sampling::GREEDY, warm].map(|sampling| Sampler::new(sampling).expect("in range"));
    // A mask is made when the grammar first comes to a state with so many tokens left, and kept: no part of the steady state.
    let mut for_masks = 0;
    let mut window = |number: usize| {
        // A new last frame, as in a stream whose windows overlap; every third window is all new.
        pixels.rotate_left(frame);
        keys.rotate_left(1);
        for (index, key) in keys.iter_mut().enumerate() {
            if index + 1 == config.frames || number.is_multiple_of(3) {
                *key = (number * config.frames + index) as u64 + 100;
                pixels[index * frame..(index + 1) * frame].fill((*key as f32).sin());
            }
        }
        model.vision_features(&pixels, &mut features).expect("the vision tower");
        model.forget_gate();
        let gate = model.gate(&gate_ids).expect("the gate");
        model.video_tokens_again(&features, &keys, gate, &mut video).expect("the projector");
        session.start_again(&[Piece::Tokens(&ids), Piece::Rows(&video), Piece::Tokens(&ids)]).expect("the prompt");
        let (prompt, mut written) = (session.position(), 0);
        for sampler in &mut samplers {
            session.truncate(prompt).expect("the prompt is there");
            let mut state = grammar.start();
            for remaining in (1..=grammar.max_new_tokens()).rev() {
                let before = ALLOCATIONS.load(Relaxed);
                let mask = grammar.mask(state, remaining);
                for_masks += ALLOCATIONS.load(Relaxed) - before;
                let token = session.choose(mask.allowed(), &[], sampler.draw()).expect("a token");
                let Some(next) = grammar.advance(state, token) else { break };
                state = next;
                session.append(&[token]).expect("room");
                written += 1;
            }
        }
        assert!(written > 20, "{written} tokens");
        for length in [8, 20, 33] {
            verifier.logits(&[ids[0] % 64; 33][..length]).expect("the verifier");
        }
        std::mem::take(&mut for_masks)
    };
    for number in 0..WARM {
        window(number);
    }
    let mut counted = Vec::with_capacity(COUNTED);
    for number in 0..COUNTED {
        let mut for_masks = 0;
        let all = allocations(|| for_masks = window(WARM + number));
        counted.push(all - for_masks);
    }
    assert_eq!(counted, vec![0; COUNTED], "allocations of each window");
}

fn whole_windows_hold_no_more(fit: Fit, allocated: Option<u64>) {
    let settings = WatchSettings { fit: Some(fit), ..WatchSettings::default() };
    let mut watcher = Watcher::open(&root().join("models/default"), None, CpuDevice::new(Some(2)), settings);
    let watcher = watcher.as_mut().expect("the default model opens");
    let windows = windows(watcher);
    let mut live = Vec::with_capacity(WARM + COUNTED);
    let mut most = 0;
    for (number, window) in windows.iter().cycle().take(WARM + COUNTED).enumerate() {
        let counted = allocations(|| drop(watcher.observe("clip", window).expect("the window can be read")));
        if number >= WARM {
            most = most.max(counted);
        }
        live.push(LIVE.load(Relaxed));
    }
    println!("{fit:?}: {most} allocations in a window at most; bytes held: {live:?}");
    assert!(allocated.is_none_or(|bound| most <= bound), "{most} allocations in a window");
    // The clip begins anew: its second and its fourth showing are compared.
    let (early, late) = (live[windows.len()..2 * windows.len()].iter().max(), live[3 * windows.len()..].iter().max());
    let grown = late.zip(early).map(|(late, early)| late - early).expect("windows");
    assert!(grown <= SLACK, "{grown} bytes more are held after {} windows", WARM + COUNTED);
}
