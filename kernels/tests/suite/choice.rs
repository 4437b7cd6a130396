//! Choosing a token, against its definition by a full sort.

use candor_kernels::{Allowed, Choice, ChoiceError, Device, DeviceError};
use rand::{Rng, RngCore};

use super::test;

/// How near to a border a point may lie for the token on its other side to be chosen, as a share of all.
const BORDER: f64 = 1e-6;

/// The candidates as they are laid, each with where it ends, and all as a share of what is kept.
struct Laid(Vec<(u32, f64)>);

impl Laid {
    fn new(logits: &[f32], allowed: &[u32], temperature: f32, top_p: f64) -> Laid {
        let logit = |id: u32| f64::from(logits[id as usize]);
        let greatest = allowed.iter().map(|&id| logit(id)).fold(f64::NEG_INFINITY, f64::max);
        let weight = |&id: &u32| (id, ((logit(id) - greatest) / f64::from(temperature)).exp());
        let mut laid: Vec<(u32, f64)> = allowed.iter().map(weight).collect();
        let total: f64 = laid.iter().map(|(_, weight)| weight).sum();
        if top_p < 1.0 {
            laid.sort_by(|a, b| logit(b.0).total_cmp(&logit(a.0)).then(a.0.cmp(&b.0)));
            let mut sum = 0.0;
            let reached = laid.iter().position(|(_, weight)| {
                sum += weight;
                sum >= total * top_p
            });
            laid.truncate(reached.map_or(laid.len(), |last| last + 1));
        }
        let kept: f64 = laid.iter().map(|(_, weight)| weight).sum();
        let mut end = 0.0;
        for (_, weight) in &mut laid {
            end += *weight / kept;
            *weight = end;
        }
        Laid(laid)
    }

    fn at(&self, point: f64) -> usize {
        self.0.iter().position(|&(_, end)| point < end).unwrap_or(self.0.len() - 1)
    }
}

/// The tokens that may be chosen: those that lie within [`BORDER`] of the point, whether a nucleus ends a hair earlier or
/// later. The first is the one by the definition.
fn expected(logits: &[f32], allowed: &[u32], temperature: f32, top_p: f32, point: f64) -> Vec<u32> {
    let exact = Laid::new(logits, allowed, temperature, f64::from(top_p));
    let mut tokens = vec![exact.0[exact.at(point)].0];
    for share in [-BORDER, 0.0, BORDER] {
        let top_p = if top_p < 1.0 { (f64::from(top_p) + share).min(1.0 - 1e-12) } else { 1.0 };
        let laid = Laid::new(logits, allowed, temperature, top_p);
        tokens.extend(laid.0[laid.at(point - BORDER)..=laid.at(point + BORDER)].iter().map(|&(id, _)| id));
    }
    tokens
}

/// Bits for ids below `vocabulary`.
fn bits(ids: &[u32], vocabulary: usize) -> Vec<u64> {
    let mut bits = vec![0; vocabulary.div_ceil(64)];
    ids.iter().for_each(|&id| bits[id as usize / 64] |= 1 << (id % 64));
    bits
}

/// Both ways to say what is allowed, in turn, some of it forbidden again.
pub(crate) fn choices<D: Device>(device: &D) {
    let mut t = test(device);
    let (mut draws, mut beside) = (0, 0);
    for (number, vocabulary) in [1, 7, 64, 97, 1000, 4096, 4097, 9001].into_iter().enumerate() {
        let logits: Vec<f32> = t.numbers(vocabulary).iter().map(|value| value * [1.0, 6.0][number % 2]).collect();
        // What lies behind the vocabulary is not looked at.
        let buffer = t.buffer(&[&logits[..], &[f32::NAN]].concat());
        for share in [1.0, 0.5, 0.01] {
            let mut ids: Vec<u32> = (0..vocabulary as u32).filter(|_| t.random.random_bool(share)).collect();
            if ids.is_empty() {
                ids.push(t.random.random_range(0..vocabulary as u32));
            }
            let words = bits(&ids, vocabulary);
            let forbidden: Vec<u32> = ids.iter().copied().filter(|_| t.random.random_bool(0.001)).collect();
            let forbidden = if forbidden.len() < ids.len() { forbidden } else { Vec::new() };
            let left: Vec<u32> = ids.iter().copied().filter(|id| !forbidden.contains(id)).collect();
            let choose = |choice, listed| {
                let allowed = if listed { Allowed::Ids(&ids) } else { Allowed::Bits(&words) };
                let chosen = device.choose(&buffer, vocabulary, allowed, &forbidden, choice);
                chosen.unwrap_or_else(|error| panic!("{vocabulary} {choice:?}: {error}"))
            };
            let logit = |id: u32| logits[id as usize];
            let best = left.iter().copied().reduce(|best, id| if logit(id) > logit(best) { id } else { best });
            for listed in [true, false] {
                assert_eq!(Some(choose(Choice::Greedy, listed)), best, "{vocabulary}, {share} allowed, {listed}");
            }
            for (temperature, top_p) in
                [(1.0, 1.0), (1.0, 0.9), (0.7, 0.3), (2.0, 0.999), (0.1, 1.0), (0.1, 0.95), (100.0, 0.5), (1e-30, 0.9)]
            {
                let point = (t.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
                let chosen = choose(Choice::Drawn { temperature, top_p, point }, draws % 2 == 0);
                let expected = expected(&logits, &left, temperature, top_p, point);
                let what = format!("{vocabulary}, {share} allowed, temperature {temperature}, top-p {top_p}, {point}");
                assert!(expected.contains(&chosen), "{what}: {chosen}, not {}", expected[0]);
                draws += 1;
                beside += usize::from(chosen != expected[0]);
            }
        }
    }
    assert!(beside <= 1, "{beside} of {draws} on the other side of a border: that should be one in some thousands");
}

/// Points in the middle of shares, and equal logits: the token is that of the definition, always.
pub(crate) fn equal_logits<D: Device>(device: &D) {
    let t = test(device);
    let all = |count: usize| -> Vec<u32> { (0..count as u32).collect() };
    let draw = |logits: &[f32], top_p, point| {
        let choice = Choice::Drawn { temperature: 1.0, top_p, point };
        device.choose(&t.buffer(logits), logits.len(), Allowed::Ids(&all(logits.len())), &[], choice)
    };
    for count in [1usize, 2, 8, 10, 5000] {
        for (top_p, kept) in [(1.0, count), (0.5, count.div_ceil(2)), (1e-30, 1)] {
            for place in [0, kept / 2, kept - 1] {
                let point = (place as f64 + 0.5) / kept as f64;
                let chosen = draw(&vec![-3.25; count], top_p, point).expect("a token");
                assert_eq!(chosen as usize, place, "{count} equal ones, top-p {top_p}, at {point}");
            }
        }
    }
    // Zeros of both signs are equal, and the greatest come first.
    let logits = [-0.0, 0.0, 1.0, -0.0, f32::MIN, 1.0];
    let weights = [1f64.exp(), 1f64.exp(), 1.0, 1.0, 1.0];
    let total: f64 = weights.iter().sum();
    for (place, id) in [2, 5, 0, 1, 3].into_iter().enumerate() {
        let point = (weights[..place].iter().sum::<f64>() + 0.5 * weights[place]) / total;
        assert_eq!(draw(&logits, 0.999_999, point).expect("a token"), id);
    }
    let greedy = |logits: &[f32]| {
        device.choose(&t.buffer(logits), logits.len(), Allowed::Bits(&[!0 >> (64 - logits.len())]), &[], Choice::Greedy)
    };
    assert_eq!(greedy(&[-0.0, 0.0]).expect("a token"), 0);
    assert_eq!(greedy(&[-7.0, -6.0, f32::MIN, -6.0]).expect("a token"), 1);
    assert_eq!(greedy(&[f32::MIN; 3]).expect("a token"), 0);
    // Differences that f32 has no number for.
    assert_eq!(greedy(&[f32::MIN, f32::MAX]).expect("a token"), 1);
    for top_p in [0.9, 1.0] {
        assert_eq!(draw(&[f32::MIN, f32::MAX], top_p, 0.999).expect("a token"), 1);
    }
}

/// A vocabulary as large as models have: shares of the tokens that are chosen.
pub(crate) fn shares_of_a_large_vocabulary<D: Device>(device: &D) {
    let mut t = test(device);
    let vocabulary = 151_936;
    let mut logits: Vec<f32> = t.numbers(vocabulary).iter().map(|value| 3.0 * value - 8.0).collect();
    let likely = [(70u32, 8.0), (100_001, 7.5), (151_935, 7.0)];
    likely.iter().for_each(|&(id, logit)| logits[id as usize] = logit);
    let (buffer, words) = (t.buffer(&logits), vec![!0u64; vocabulary / 64]);
    let left: Vec<u32> = (0..vocabulary as u32).collect();
    for top_p in [1.0, 0.9] {
        let mut counts = [0u32; 3];
        let laid = Laid::new(&logits, &left, 1.0, f64::from(top_p));
        for draw in 0..20 {
            // Points that are spread evenly.
            let point = (f64::from(draw) + 0.5) / 20.0;
            let choice = Choice::Drawn { temperature: 1.0, top_p, point };
            let chosen = device.choose(&buffer, vocabulary, Allowed::Bits(&words), &[], choice).expect("a token");
            assert_eq!(chosen, laid.0[laid.at(point)].0, "top-p {top_p} at {point}");
            if let Some(place) = likely.iter().position(|&(id, _)| id == chosen) {
                counts[place] += 1;
            }
        }
        assert!(counts[0] >= counts[1] && counts[1] >= counts[2] && counts[2] > 0, "{counts:?}");
    }
    assert_eq!(device.choose(&buffer, vocabulary, Allowed::Bits(&words), &[70], Choice::Greedy).expect("one"), 100_001);
}

/// What makes no sense is an error of its own, and leaves the device as it was.
pub(crate) fn choices_refuse<D: Device>(device: &D) {
    let t = test(device);
    let good = Choice::Drawn { temperature: 1.0, top_p: 0.9, point: 0.5 };
    let every = [Choice::Greedy, good, Choice::Drawn { temperature: 1.0, top_p: 1.0, point: 0.5 }];
    let error = |result: Result<u32, DeviceError>| match result {
        Err(DeviceError::Choice(error)) => error,
        other => panic!("{other:?}"),
    };
    let logits: Vec<f32> = (0..5000).map(|id| (id % 91) as f32).collect();
    let (sound, vocabulary) = (t.buffer(&logits), logits.len());
    let ids = [3u32, 70, 4999];
    for choice in every {
        for (id, value) in [(0, f32::NAN), (4098, f32::INFINITY), (4999, f32::NEG_INFINITY)] {
            let mut broken = logits.clone();
            (broken[id], broken[4999]) = (value, f32::NAN);
            let value = broken[id];
            for allowed in [&ids[..], &[]] {
                // Whatever is allowed.
                let found = error(device.choose(&t.buffer(&broken), vocabulary, Allowed::Ids(allowed), &[], choice));
                let ChoiceError::NotFinite { id: found, value: logit } = found else { panic!("{found:?}") };
                assert!(found == id && (logit == value || (logit.is_nan() && value.is_nan())), "{found} {logit}");
            }
        }
        for (allowed, forbidden) in [
            (Allowed::Ids(&[]), &[][..]),
            (Allowed::Ids(&ids), &ids),
            (Allowed::Bits(&[]), &[]),
            (Allowed::Bits(&[0, 0]), &[]),
            (Allowed::Bits(&[0, 1 << 6]), &[70, 5, 90_000]),
        ] {
            let found = error(device.choose(&sound, vocabulary, allowed, forbidden, choice));
            assert_eq!(found, ChoiceError::NothingAllowed);
        }
        assert_eq!(error(device.choose(&sound, 0, Allowed::Ids(&[]), &[], choice)), ChoiceError::NothingAllowed);
        for (allowed, id) in
            [(&[3, 5000][..], 5000), (&[u32::MAX], u32::MAX), (&[70, 3], 3), (&[3, 3], 3), (&[4, 2, 9], 2)]
        {
            let found = error(device.choose(&sound, vocabulary, Allowed::Ids(allowed), &[], choice));
            assert_eq!(found, ChoiceError::Allowed { id, vocabulary });
        }
        let beyond = vec![!0u64; vocabulary.div_ceil(64)];
        let found = error(device.choose(&sound, vocabulary, Allowed::Bits(&beyond), &[], choice));
        assert_eq!(found, ChoiceError::Allowed { id: 5000, vocabulary });
        let short = device.choose(&sound, device.len(&sound) + 1, Allowed::Ids(&ids), &[], choice);
        assert!(matches!(short, Err(DeviceError::Size { .. })), "{short:?}");
        // 4999 is 85, 70 is 70, 3 is 3.
        let chosen = device.choose(&sound, vocabulary, Allowed::Ids(&ids), &[], choice).expect("all is well again");
        assert_eq!(chosen, 4999);
    }
    let settings = [
        (0.0, 0.9, 0.5),
        (-1.0, 0.9, 0.5),
        (f32::NAN, 0.9, 0.5),
        (f32::INFINITY, 0.9, 0.5),
        (1.0, 0.0, 0.5),
        (1.0, 1.1, 0.5),
        (1.0, f32::NAN, 0.5),
        (1.0, 0.9, 1.0),
        (1.0, 0.9, -0.1),
        (1.0, 0.9, f64::NAN),
    ];
    for (temperature, top_p, point) in settings {
        let choice = Choice::Drawn { temperature, top_p, point };
        let found = error(device.choose(&sound, vocabulary, Allowed::Ids(&ids), &[], choice));
        assert!(matches!(found, ChoiceError::Setting { .. }), "{choice:?}: {found:?}");
    }
}
