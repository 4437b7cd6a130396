//! Choosing a token.

use crate::machine::{Fields, Grid, Int, Machine, arguments};

const THREADS: usize = 1024;
/// Candidates of a block.
const SHARE: usize = 4096;
/// Bytes of the kernels' state, and its word where the outcome begins.
const STATE: usize = 48;
const OUTCOME: usize = 8;

/// Logits and candidates as they lie in memory.
struct Choosing {
    logits: Vec<f32>,
    at: u64,
    /// Ascending.
    ids: Vec<u32>,
    candidates: Fields,
    count: usize,
    state: u64,
}

impl Choosing {
    /// Candidates are the ids that `allowed` says, as ids or as bits.
    fn new(machine: &mut Machine, logits: Vec<f32>, listed: bool, allowed: impl Fn(u32) -> bool) -> Self {
        let ids: Vec<u32> = (0..logits.len() as u32).filter(|&id| allowed(id)).collect();
        let mut words = ids.clone();
        if !listed {
            words = vec![0; logits.len().div_ceil(32)];
            ids.iter().for_each(|&id| words[id as usize / 32] |= 1 << (id % 32));
        }
        let count = if listed { ids.len() } else { logits.len() };
        let words = machine.bytes(&words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>());
        let candidates = Fields::default().word(words).ints(&[count, usize::from(listed)]);
        let (at, state) = (machine.floats(&logits), machine.bytes(&[0; STATE]));
        Choosing { logits, at, ids, candidates, count, state }
    }

    /// What choose_most finds: outcome, id and logit.
    fn most(&self, machine: &mut Machine) -> [u32; 3] {
        let vocabulary = self.logits.len();
        let arguments = arguments![self.at, Int(vocabulary), self.candidates.clone(), self.state];
        machine.run(["sample", "choose_most"], Grid([vocabulary.div_ceil(SHARE), 1, 1], THREADS, 0), arguments);
        self.outcome(machine)
    }

    /// The outcome; all else is zero again.
    fn outcome(&self, machine: &Machine) -> [u32; 3] {
        let words = machine.read_words(self.state);
        assert_eq!(words[..OUTCOME], [0; OUTCOME], "the state behind a choice");
        [words[OUTCOME], words[OUTCOME + 1], words[OUTCOME + 2]]
    }

    /// The token that is drawn, behind choose_most.
    fn drawn(&self, machine: &mut Machine, temperature: f32, top_p: f64, point: f64) -> u32 {
        let whole = 2f64.powi(64);
        let (exact, bits) = (1.0 / f64::from(temperature), |n: usize| (usize::BITS - n.leading_zeros()) as usize);
        let vocabulary = self.logits.len();
        let reach = ((vocabulary as f64 / (1.0 - top_p)).ln() + 0.01) * f64::from(temperature);
        let draw = Fields::default()
            .word((point * whole) as u64)
            .word((top_p * whole) as u64)
            .float(exact as f32)
            .float((exact - f64::from(exact as f32)) as f32)
            .float(reach as f32)
            .float(2f32.powi(62 - bits(vocabulary) as i32))
            .ints(&[bits(vocabulary - 1).max(1)])
            .filled(8);
        let grid = Grid([self.count.div_ceil(SHARE), 1, 1], THREADS, 0);
        let list = machine.output(8 * vocabulary);
        let kernel = if top_p < 1.0 { "choose_nucleus" } else { "choose_any" };
        machine.run(["sample", kernel], grid, arguments![self.at, self.candidates.clone(), draw, self.state, list]);
        self.outcome(machine)[1]
    }

    /// The token by the definition, and how near the point is to a border.
    fn expected(&self, temperature: f32, top_p: f64, point: f64) -> (u32, f64) {
        let logit = |id: u32| f64::from(self.logits[id as usize]);
        let most = self.ids.iter().map(|&id| logit(id)).fold(f64::NEG_INFINITY, f64::max);
        let weight = |id: u32| ((logit(id) - most) / f64::from(temperature)).exp();
        let (mut order, mut total) = (self.ids.clone(), self.ids.iter().map(|&id| weight(id)).sum::<f64>());
        if top_p < 1.0 {
            order.sort_by(|&a, &b| logit(b).total_cmp(&logit(a)).then(a.cmp(&b)));
            let (mut kept, mut count) = (0.0, 0);
            while kept < total * top_p {
                kept += weight(order[count]);
                count += 1;
            }
            order.truncate(count);
            total = kept;
        }
        let mut end = 0.0;
        for id in order {
            let begin = end;
            end += weight(id) / total;
            if point < end {
                return (id, (point - begin).min(end - point));
            }
        }
        panic!("the point {point} lies behind everything");
    }
}

pub(crate) fn most(machine: &mut Machine) {
    for (vocabulary, listed) in [(1, true), (77, false), (5001, true), (8193, false)] {
        let logits = machine.numbers(vocabulary);
        let allowed = |id: u32| id.is_multiple_of(3);
        let choosing = Choosing::new(machine, logits.clone(), listed, allowed);
        let logit = |id: u32| logits[id as usize];
        let best = choosing.ids.iter().copied().reduce(|best, id| if logit(id) > logit(best) { id } else { best });
        let best = best.expect("one is allowed");
        assert_eq!(choosing.most(machine), [0, best, logit(best).to_bits()], "{vocabulary}");
        // The first of equal ones, whatever the sign of zero.
        let zeros = (0..vocabulary).map(|id| if id % 2 == 0 { -0.0 } else { 0.0 }).collect();
        let choosing = Choosing::new(machine, zeros, listed, allowed);
        assert_eq!(choosing.most(machine)[..2], [0, 0], "{vocabulary}");
        assert_eq!(Choosing::new(machine, logits.clone(), listed, |_| false).most(machine)[0], 2, "nothing allowed");
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut logits = logits.clone();
            let id = vocabulary / 2;
            (logits[vocabulary - 1], logits[id]) = (f32::NAN, broken);
            let found = Choosing::new(machine, logits, listed, allowed).most(machine);
            assert_eq!(found, [1, id as u32, broken.to_bits()], "{vocabulary}");
        }
    }
}

/// Points spread over the whole; those at a border are left out.
fn drawn(machine: &mut Machine, choosing: &Choosing, temperature: f32, top_p: f64, points: usize) {
    choosing.most(machine);
    for number in 0..points {
        let point = (number as f64 + 0.37) / points as f64;
        let (expected, apart) = choosing.expected(temperature, top_p, point);
        if apart > 1e-6 {
            let found = choosing.drawn(machine, temperature, top_p, point);
            assert_eq!(found, expected, "of {}, temperature {temperature}, top-p {top_p}", choosing.logits.len());
        }
    }
}

pub(crate) fn any(machine: &mut Machine) {
    for (vocabulary, listed, temperature) in [(1, true, 1.0), (77, false, 0.7), (5001, true, 0.2), (8193, false, 1.0)] {
        let logits = machine.numbers(vocabulary);
        let choosing = Choosing::new(machine, logits, listed, |id| id % 3 != 1);
        drawn(machine, &choosing, temperature, 1.0, 5);
    }
}

pub(crate) fn nucleus(machine: &mut Machine) {
    for (vocabulary, listed, temperature) in [(1, true, 1.0), (77, false, 0.7), (5001, true, 0.2), (8193, false, 0.1)] {
        let logits = machine.numbers(vocabulary);
        let choosing = Choosing::new(machine, logits, listed, |id| id % 3 != 1);
        for top_p in [0.5, 0.9375] {
            drawn(machine, &choosing, temperature, top_p, 4);
        }
    }
    // Equal ones go by their ids.
    let choosing = Choosing::new(machine, vec![1.5; 600], false, |_| true);
    drawn(machine, &choosing, 1.0, 0.5, 7);
}
