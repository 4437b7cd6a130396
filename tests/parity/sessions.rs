//! Decoder sessions: runs, roll-back, reuse, and inputs that do not fit.

use candor::model::{DecodeError, LanguageModel, Model, ModelError, Piece, Rows, Session};
use candor_kernels::choice::choose;
use candor_kernels::cpu::CpuDevice;
use candor_kernels::{Allowed, Choice, Device};

use super::weights::{Case, uniform, write_folder};
use super::{device, relative_error};

/// Equal but for the order of summation.
const CLOSE: f64 = 1e-5;

fn open() -> Model<CpuDevice> {
    open_on(device())
}

fn open_on<D: Device>(device: D) -> Model<D> {
    let case = Case::load("even");
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_folder(folder.path(), &case.config("tied.f32"), &case.tensors("tied.f32"));
    Model::open(folder.path(), device).expect("the model opens")
}

fn ids(count: usize) -> Vec<u32> {
    uniform("session", count).map(|v| ((v + 1.0) * 48.0) as u32).collect()
}

fn start(session: &mut Session<CpuDevice>, ids: &[u32]) -> Vec<f32> {
    session.start(&[Piece::Tokens(ids)]).expect("the prompt fits");
    logits(session)
}

fn logits(session: &mut Session<CpuDevice>) -> Vec<f32> {
    session.logits().expect("they are there").to_vec()
}

/// The logits behind more tokens.
fn append(session: &mut Session<CpuDevice>, ids: &[u32]) -> Vec<f32> {
    session.append(ids).expect("it fits");
    logits(session)
}

#[test]
fn long_prompts_go_in_runs() {
    let model = open();
    let text = ids(300);
    let mut whole = model.session(300).expect("a session");
    let expected = start(&mut whole, &text);
    let mut single = model.session(300).expect("a session");
    start(&mut single, &text[..1]);
    for token in &text[1..] {
        single.append(&[*token]).expect("it fits");
    }
    assert_eq!(single.position(), 300);
    assert!(relative_error(&logits(&mut single), &expected) < CLOSE);
    let mut mixed = model.session(300).expect("a session");
    start(&mut mixed, &text[..7]);
    assert!(relative_error(&append(&mut mixed, &text[7..]), &expected) < CLOSE);
    let all = whole.all_logits().expect("held");
    assert!(relative_error(&single.all_logits().expect("held"), &all) < CLOSE);
    assert!(relative_error(&all[299 * 97..], &expected) < CLOSE);
}

#[test]
fn roll_back_restores_the_logits() {
    let model = open();
    let text = ids(40);
    let mut session = model.session(40).expect("a session");
    let before = start(&mut session, &text[..20]);
    let first = append(&mut session, &text[20..30]);
    session.truncate(20).expect("it is held");
    assert_eq!((session.position(), logits(&mut session)), (20, before));
    let other = append(&mut session, &text[30..]);
    assert!(relative_error(&other, &first) > CLOSE, "other tokens give other logits");
    session.truncate(20).expect("it is held");
    assert_eq!(append(&mut session, &text[20..30]), first);
    session.truncate(30).expect("nothing to forget");
    assert_eq!(logits(&mut session), first);
    for bad in [0, 31, usize::MAX] {
        assert!(matches!(session.truncate(bad), Err(DecodeError::Truncate { held: 30, .. })));
    }
}

#[test]
fn a_session_is_used_again() {
    let model = open();
    let text = ids(30);
    let mut session = model.session(30).expect("a session");
    let first = start(&mut session, &text[..10]);
    start(&mut session, &text);
    assert_eq!(start(&mut session, &text[..10]), first);
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let model = open();
    let text = ids(12);
    let mut session = model.session(10).expect("a session");
    let before = start(&mut session, &text[..8]);
    assert!(matches!(session.append(&text[..3]), Err(DecodeError::Full { capacity: 10, needed: 11 })));
    assert!(matches!(session.append(&[]), Err(DecodeError::NoTokens)));
    assert!(matches!(session.append(&[5, 97]), Err(DecodeError::Token { id: 97, vocabulary: 97 })));
    assert_eq!((session.position(), logits(&mut session)), (8, before));
    assert!(matches!(
        session.start(&[Piece::Tokens(&text)]),
        Err(ModelError::Decode(DecodeError::Full { needed: 12, .. }))
    ));
    assert!(matches!(session.start(&[]), Err(ModelError::Input { what: "prompt", .. })));
    for capacity in [0, 4097, usize::MAX] {
        assert!(matches!(model.session(capacity), Err(ModelError::Input { .. })), "{capacity}");
    }
}

#[test]
fn inputs_of_other_sizes_are_refused() {
    let mut model = open();
    let mut rows = model.rows().expect("a buffer");
    for count in [0, 1, 3 * 34 * 34 + 1] {
        assert!(
            matches!(model.vision_features(&vec![0.0; count], &mut rows), Err(ModelError::Input { .. })),
            "{count}"
        );
    }
    assert!(model.vision_features_rgb(&[], &mut rows).is_err());
    assert!(model.vision_features_rgb(&[&[0; 7]], &mut rows).is_err());
    assert!(matches!(model.audio_states(&[0.0; 5], &mut rows), Err(ModelError::Input { what: "mel", .. })));
    for ids in [&[][..], &[60], &[1; 513]] {
        assert!(matches!(model.gate(ids), Err(ModelError::Input { what: "text", .. })));
    }
    let features = model.rows().expect("a buffer");
    assert!(model.video_tokens(&features, [1.0, 0.0, 0.0], &mut rows).is_err(), "no frames");
    let mut session = model.session(20).expect("a session");
    model.vision_features(&[0.5; 3 * 34 * 34], &mut rows).expect("one frame");
    assert!(
        matches!(session.start(&[Piece::Rows(&rows)]), Err(ModelError::Input { what: "prompt", .. })),
        "too narrow"
    );
}

#[test]
fn bytes_and_normalised_pixels_give_the_same_features() {
    let mut model = open();
    let bytes: Vec<u8> = uniform("bytes", 3 * 34 * 34).map(|v| ((v + 1.0) * 127.9) as u8).collect();
    let planes: Vec<f32> =
        (0..3).flat_map(|c| bytes[c..].iter().step_by(3).map(|&v| (f32::from(v) / 255.0 - 0.5) / 0.5)).collect();
    let (mut from_bytes, mut from_planes) = (model.rows().expect("a buffer"), model.rows().expect("a buffer"));
    model.vision_features_rgb(&[&bytes], &mut from_bytes).expect("one frame");
    model.vision_features(&planes, &mut from_planes).expect("one frame");
    assert_eq!((from_bytes.rows(), from_bytes.width()), (16, 32));
    let host = |rows: &candor::model::Rows<CpuDevice>| rows.to_host(model.device()).expect("read");
    assert_eq!(host(&from_bytes), host(&from_planes));
}

#[test]
fn equal_frames_have_the_features_that_each_has_alone() {
    let mut model = open();
    let frame = |name: &str| uniform(name, 3 * 34 * 34).map(|v| v as f32).collect::<Vec<f32>>();
    let (a, b, c) = (frame("a"), frame("b"), frame("c"));
    let host = |model: &mut Model<CpuDevice>, frames: &[&Vec<f32>]| {
        let mut rows = model.rows().expect("a buffer");
        model
            .vision_features(&frames.iter().copied().flatten().copied().collect::<Vec<f32>>(), &mut rows)
            .expect("frames");
        rows.to_host(model.device()).expect("read")
    };
    let [alone_a, alone_b, alone_c] = [&a, &b, &c].map(|frame| host(&mut model, &[frame]));
    for _ in 0..2 {
        let together = host(&mut model, &[&b, &a, &b, &c, &a]);
        let expected = [&*alone_b, &*alone_a, &*alone_b, &*alone_c, &*alone_a].concat();
        assert!(relative_error(&together, &expected) < CLOSE);
        let size = alone_a.len();
        let place = |i: usize| &together[i * size..][..size];
        assert!(place(0) == place(2) && place(1) == place(4) && place(0) != place(1) && place(1) != place(3));
    }
    assert_eq!(host(&mut model, &[&c; 4]), alone_c.repeat(4));
}

/// The logits that `start` gives, and those that `start_again` gives behind another prompt; and positions it read.
fn again(model: &Model<CpuDevice>, before: &[Piece<'_, CpuDevice>], prompt: &[Piece<'_, CpuDevice>]) -> (f64, u64) {
    let mut session = model.session(400).expect("a session");
    session.start(prompt).expect("the prompt fits");
    let plain = logits(&mut session);
    session.start(before).expect("the prompt fits");
    session.append(&[3, 4, 5]).expect("it fits");
    let read = session.reading().positions;
    session.start_again(prompt).expect("the prompt fits");
    let found = logits(&mut session);
    let read = session.reading().positions - read;
    assert_eq!(session.position(), prompt.iter().map(Piece::len).sum::<usize>());
    // What follows is the same too.
    let behind = append(&mut session, &[7, 8]);
    session.start(prompt).expect("the prompt fits");
    let error = relative_error(&behind, &append(&mut session, &[7, 8]));
    (relative_error(&found, &plain).max(error), read)
}

#[test]
fn what_a_prompt_shares_with_the_last_one_is_not_read_again() {
    let model = open();
    let text = ids(300);
    let changed: Vec<u32> = text.iter().enumerate().map(|(i, &id)| if i == 140 { (id + 1) % 97 } else { id }).collect();
    let tokens = Piece::Tokens;
    for (before, prompt, expected) in [
        (&text[..300], &text[..300], 0),
        (&text[..300], &text[..200], 0),
        (&text[..200], &text[..300], 100),
        (&changed[..300], &text[..300], 160),
        (&text[20..40], &text[..20], 20),
        // Too little to keep.
        (&text[..15], &text[..40], 40),
    ] {
        let (error, read) = again(&model, &[tokens(before)], &[tokens(prompt)]);
        assert_eq!(read, expected);
        assert!(error < CLOSE, "{error:.1e}");
    }
}

#[test]
fn rows_are_read_again_as_soon_as_they_are_written() {
    let model = open();
    let width = model.config().decoder.width;
    let values: Vec<f32> = uniform("rows", 20 * width).map(|v| v as f32).collect();
    let mut rows = model.rows().expect("a buffer");
    rows.write(model.device(), &values, width).expect("whole rows");
    let text = ids(60);
    fn prompt<'a>(text: &'a [u32], rows: &'a Rows<CpuDevice>) -> [Piece<'a, CpuDevice>; 3] {
        [Piece::Tokens(&text[..30]), Piece::Rows(rows), Piece::Tokens(&text[30..])]
    }
    let mut session = model.session(110).expect("a session");
    session.start(&prompt(&text, &rows)).expect("it fits");
    let first = logits(&mut session);
    let read = |session: &mut Session<CpuDevice>, rows: &Rows<CpuDevice>| {
        let before = session.reading().positions;
        session.start_again(&prompt(&text, rows)).expect("it fits");
        (session.reading().positions - before, logits(session))
    };
    assert_eq!(read(&mut session, &rows), (0, first.clone()));
    rows.write(model.device(), &values, width).expect("whole rows");
    let (positions, found) = read(&mut session, &rows);
    assert_eq!(positions, 50);
    assert!(relative_error(&found, &first) < CLOSE);
    let other: Vec<f32> = values.iter().map(|value| -value).collect();
    rows.write(model.device(), &other, width).expect("whole rows");
    let (positions, found) = read(&mut session, &rows);
    assert_eq!(positions, 50);
    assert!(relative_error(&found, &first) > CLOSE, "other rows give other logits");
}

#[test]
fn projected_frames_are_those_of_the_whole_window() {
    for (name, variant) in [("even", "tied.f32"), ("wide", "f32")] {
        let case = Case::load(name);
        let variants = case.variants();
        let variant = variants.iter().find(|known| *known == variant).unwrap_or(&variants[0]);
        let folder = tempfile::tempdir().expect("a temporary folder");
        write_folder(folder.path(), &case.config(variant), &case.tensors(variant));
        let mut model = Model::open(folder.path(), device()).expect("the model opens");
        let (patches, width) = (model.config().vision.patches(), model.config().vision.width);
        let frame =
            |key: u64| uniform(&format!("frame {key}"), patches * width).map(|v| v as f32).collect::<Vec<f32>>();
        let (mut states, mut plain, mut kept): (Rows<_>, Rows<_>, Rows<_>) =
            [(); 3].map(|()| model.rows().expect("a buffer")).into();
        let gate = [0.2, 0.5, 0.3];
        let mut worst: f64 = 0.0;
        // Sliding, still, jumping, equal frames, backwards, another number of frames.
        let windows: [&[u64]; 9] = [
            &[0, 1, 2, 3],
            &[1, 2, 3, 4],
            &[1, 2, 3, 4],
            &[3, 4, 5, 6],
            &[6, 6, 6, 6],
            &[6, 5, 6, 7],
            &[7, 6, 5, 6],
            &[5, 6, 7],
            &[6, 7, 8, 9],
        ];
        for keys in windows {
            let values: Vec<f32> = keys.iter().flat_map(|&key| frame(key)).collect();
            let device = model.device().clone();
            states.write(&device, &values, width).expect("whole rows");
            model.video_tokens(&states, gate, &mut plain).expect("the projector runs");
            model.video_tokens_again(&states, keys, gate, &mut kept).expect("the projector runs");
            let error = relative_error(&kept.to_host(&device).expect("read"), &plain.to_host(&device).expect("read"));
            assert!(error < CLOSE, "{name} {keys:?}: {error:.1e}");
            worst = worst.max(error);
        }
        println!("{name}: largest relative error {worst:.1e}");
        assert!(model.video_tokens_again(&states, &[1], gate, &mut kept).is_err(), "a name for each frame");
    }
}

#[test]
fn a_restricted_head_gives_the_same_logits_for_what_it_has() {
    let model = open();
    let text = ids(20);
    let mut session = model.session(40).expect("a session");
    let whole = start(&mut session, &text);
    for tokens in [&[0][..], &[96], &[3, 4, 50, 95], &(0..97).collect::<Vec<u32>>()] {
        session.restrict_head(Some(tokens)).expect("they are tokens");
        // The second time too, though what is between its parts is not written again.
        for _ in 0..2 {
            let logits = start(&mut session, &text);
            assert_eq!(logits.len(), whole.len());
            for (id, (&logit, &whole)) in (0u32..).zip(logits.iter().zip(&whole)) {
                assert_eq!(logit, if tokens.contains(&id) { whole } else { f32::MIN }, "{id} of {tokens:?}");
            }
        }
        let best = tokens
            .iter()
            .copied()
            .fold(tokens[0], |best, id| if whole[id as usize] > whole[best as usize] { id } else { best });
        let all: Vec<u32> = (0..97).collect();
        let chosen = session.choose(Allowed::Ids(&all), &[], Choice::Greedy).expect("there are logits");
        assert_eq!(chosen, best, "of {tokens:?}");
    }
    session.restrict_head(None).expect("all rows");
    assert_eq!(start(&mut session, &text), whole);
    for tokens in [&[][..], &[97], &[4, 3], &[5, 5]] {
        assert!(session.restrict_head(Some(tokens)).is_err(), "{tokens:?}");
    }
}

/// What a session chooses on its device is what its logits say, of all tokens and with a head of some.
pub(super) fn check_choices_on<D: Device>(device: D) {
    let model = open_on(device);
    let text = ids(30);
    let mut session = model.session(40).expect("a session");
    let all: Vec<u32> = (0..97).collect();
    for head in [None, Some(&[3, 4, 50, 95][..]), None] {
        session.restrict_head(head).expect("they are tokens");
        session.start(&[Piece::Tokens(&text)]).expect("it fits");
        for number in 0..8u32 {
            let drawn = |top_p| Choice::Drawn { temperature: 0.8, top_p, point: (f64::from(number) + 0.3) / 8.0 };
            for choice in [Choice::Greedy, drawn(1.0), drawn(0.9)] {
                for allowed in [&all[..], &[0, 4, 5, 50], &[7]] {
                    let chosen = session.choose(Allowed::Ids(allowed), &[50], choice).expect("there are logits");
                    let logits = session.logits().expect("they are there");
                    let expected = choose(logits, Allowed::Ids(allowed), &[50], choice, &mut Vec::new());
                    assert_eq!(Ok(chosen), expected, "{head:?} {choice:?} of {allowed:?}");
                }
            }
            session.append(&[number]).expect("it fits");
        }
    }
}

#[test]
fn a_session_chooses_what_its_logits_say() {
    check_choices_on(device());
}
