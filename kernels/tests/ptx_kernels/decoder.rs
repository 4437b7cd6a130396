//! A decoder layer at once against its steps, which are tested by themselves.

use crate::layers::{BLOCK, Layer, WARPS, arranged};
use crate::machine::{Fields, Grid, Int, Machine, Size, arguments};
use crate::rows::frequencies;
use crate::weight::{Type, Weight};

const THREADS: usize = 32 * WARPS;
const EPS: f32 = 1e-5;

struct Sizes {
    width: usize,
    mlp: usize,
    group: usize,
    key_heads: usize,
    head_dim: usize,
    /// Of the new key and value; as many are in the cache.
    position: usize,
    blocks: usize,
}

/// Weights and where they are written.
struct Weights {
    attention_norm: Weight,
    mlp_norm: Weight,
    projections: [Layer; 3],
    output: Layer,
    gate: Layer,
    up: Layer,
    down: Layer,
    frequencies: u64,
    scale: f32,
}

/// A sequence's cache and the buffers of a position.
struct Work {
    x: u64,
    projected: [u64; 3],
    attended: u64,
    gate: u64,
    mean: u64,
    codes: [u64; 2],
    scales: [u64; 2],
    partial: u64,
    counters: u64,
}

impl Weights {
    fn random(machine: &mut Machine, kind: Type, sizes: &Sizes) -> Self {
        let Sizes { width, mlp, group, key_heads, head_dim, .. } = *sizes;
        let mut matrix = |rows, depth| {
            let group = if kind == Type::I4 { Some(32) } else { None };
            machine.weight_of(kind, rows, depth, group, Type::F16, 0)
        };
        let projections = [group * key_heads, key_heads, key_heads].map(|heads| matrix(heads * head_dim, width));
        let output = Layer::new(matrix(width, group * key_heads * head_dim)).added();
        let gate = Layer::new(matrix(mlp, width)).activation(3);
        let (up, down) = (Layer::new(matrix(mlp, width)), Layer::new(matrix(width, mlp)).added());
        let projections = projections.map(|weight| {
            let bias = machine.weight(Type::F16, 1, weight.rows);
            Layer::new(weight).bias(bias)
        });
        Weights {
            attention_norm: machine.weight(Type::F32, 1, width),
            mlp_norm: machine.weight(Type::F16, width, 1),
            projections,
            output,
            gate,
            up,
            down,
            frequencies: machine.floats(&frequencies(head_dim / 2)),
            scale: 0.2,
        }
    }
}

impl Sizes {
    fn capacity(&self) -> usize {
        self.position + 3
    }

    fn chunks(&self) -> usize {
        (self.position + 1).div_ceil(128)
    }

    /// The same buffers twice, with what a cache holds.
    fn work(&self, machine: &mut Machine) -> [Work; 2] {
        let Sizes { width, mlp, group, key_heads, head_dim, .. } = *self;
        let x = machine.numbers(width);
        let cached = key_heads * self.capacity();
        let (keys, values) = (machine.random_bytes(cached * head_dim), machine.random_bytes(cached * head_dim));
        let scales: Vec<f32> = machine.numbers(2 * cached).iter().map(|scale| 0.01 + 0.001 * scale).collect();
        let mean = machine.numbers(key_heads * head_dim);
        let queries = group * key_heads * head_dim;
        [(); 2].map(|()| Work {
            x: machine.floats(&x),
            projected: [queries, key_heads * head_dim, key_heads * head_dim].map(|len| machine.output(4 * len)),
            attended: machine.output(4 * queries),
            gate: machine.output(4 * mlp),
            mean: machine.floats(&mean),
            codes: [machine.bytes(&keys), machine.bytes(&values)],
            scales: [machine.floats(&scales[..cached]), machine.floats(&scales[cached..])],
            partial: machine.output(4 * self.chunks() * group * key_heads * (head_dim + 2)),
            counters: machine.bytes(&vec![0; 4 * key_heads]),
        })
    }

    fn turn(&self, weights: &Weights) -> Fields {
        let Sizes { group, key_heads, head_dim, position, .. } = *self;
        Fields::default().ints(&[group * key_heads, key_heads, head_dim / 2, position]).word(weights.frequencies)
    }
}

fn at_once(machine: &mut Machine, kind: Type, sizes: &Sizes, weights: &Weights, work: &Work) {
    let Sizes { width, mlp, group, key_heads, head_dim, position, blocks } = *sizes;
    let layers = |layers: &[(&Layer, u64)], gated| arranged(layers, 1, gated).0;
    let [q, k, v] = work.projected;
    let [of_q, of_k, of_v] = &weights.projections;
    let most = width.max(mlp).max(group * key_heads * head_dim).div_ceil(BLOCK);
    let arrived = machine.bytes(&[0; 4]);
    let words = [work.x, work.attended, work.codes[0], work.codes[1], work.scales[0], work.scales[1], work.mean];
    let argument = Fields::default()
        .then(&layers(&[(of_q, q), (of_k, k), (of_v, v)], false))
        .then(&layers(&[(&weights.output, work.x)], false))
        .then(&layers(&[(&weights.gate, work.gate), (&weights.up, work.gate)], true))
        .then(&layers(&[(&weights.down, work.x)], false))
        .then(&weights.attention_norm.argument)
        .then(&weights.mlp_norm.argument);
    let argument = words.into_iter().fold(argument, Fields::word);
    let at = machine.output(4);
    machine.run(["decoder", "set_position"], Grid([1, 1, 1], 32, 0), arguments![at, Int(position)]);
    let words = [work.partial, work.counters, arrived, weights.frequencies, at];
    let argument = words.into_iter().fold(argument, Fields::word);
    let argument = argument.ints(&[group * key_heads, key_heads, head_dim / 2, sizes.capacity(), most]);
    let argument = argument.float(weights.scale).float(EPS).filled(8);
    let kernel = if kind == Type::I4 { "decoder_layer_i4" } else { "decoder_layer_i8" };
    let grid = Grid([blocks, 1, 1], THREADS, most * (BLOCK + 4));
    machine.run_cooperative(["decoder", kernel], grid, arguments![argument]);
    // Every meeting of the blocks turns the highest bit.
    assert_eq!(machine.read_words(arrived), [0], "where blocks meet");
}

/// `quantise` and `matvec` over what `depth` floats at `x` make of layers.
fn step(machine: &mut Machine, kind: Type, x: u64, depth: usize, layers: &[(&Layer, u64)], gated: bool) {
    let blocks = depth.div_ceil(BLOCK);
    let (codes, scales) = (machine.output(blocks * BLOCK), machine.output(4 * blocks));
    let words = usize::from(kind == Type::I4);
    let quantise = arguments![x, Size(blocks), Int(blocks), Int(depth), Int(words), codes, scales];
    machine.run(["quantise", "quantise"], Grid([blocks.div_ceil(4), 1, 1], THREADS, 0), quantise);
    let (argument, tasks) = arranged(layers, 1, gated);
    let kernel = if kind == Type::I4 { "matvec_i4_1" } else { "matvec_i8_1" };
    let arguments = arguments![codes, scales, Int(1), Int(blocks), argument];
    machine.run(["matvec", kernel], Grid([tasks.div_ceil(WARPS), 1, 1], THREADS, 0), arguments);
}

fn in_steps(machine: &mut Machine, kind: Type, sizes: &Sizes, weights: &Weights, work: &Work) {
    let Sizes { width, mlp, group, key_heads, head_dim, position, .. } = *sizes;
    let normed = |machine: &mut Machine, weight: &Weight| {
        let out = machine.output(4 * width);
        let arguments = arguments![work.x, Int(width), weight.argument.clone(), EPS, out];
        machine.run(["norm", "rms_norm"], Grid([1, 1, 1], 128, 0), arguments);
        out
    };
    let [q, k, v] = work.projected;
    let [of_q, of_k, of_v] = &weights.projections;
    let x = normed(machine, &weights.attention_norm);
    step(machine, kind, x, width, &[(of_q, q), (of_k, k), (of_v, v)], false);
    let (capacity, heads) = (Int(sizes.capacity()), group * key_heads);
    let ([keys, values], [key_scales, value_scales]) = (work.codes, work.scales);
    let turn = sizes.turn(weights);
    let arguments = arguments![q, k, v, turn, capacity, Int(1), work.mean, keys, key_scales, values, value_scales];
    machine.run(["cache", "rope_write_i8"], Grid([1, heads + key_heads, 1], 32, 0), arguments);
    let shape = Fields::default()
        .ints(&[position + 1, group, head_dim])
        .word((sizes.capacity() * head_dim) as u64)
        .float(weights.scale)
        .filled(8);
    let (partial, counters) = (work.partial, work.counters);
    let arguments = arguments![q, keys, values, key_scales, value_scales, shape, partial, counters, work.attended];
    machine.run(["decode", "decode_i8"], Grid([sizes.chunks(), key_heads, 1], 128, 0), arguments);
    step(machine, kind, work.attended, heads * head_dim, &[(&weights.output, work.x)], false);
    let x = normed(machine, &weights.mlp_norm);
    step(machine, kind, x, width, &[(&weights.gate, work.gate), (&weights.up, work.gate)], true);
    step(machine, kind, work.gate, mlp, &[(&weights.down, work.x)], false);
}

pub(crate) fn layer(machine: &mut Machine) {
    for (width, mlp, group, key_heads, head_dim, position, blocks) in [
        (40, 33, 1, 1, 4, 0, 1),
        (64, 96, 2, 1, 16, 1, 3),
        (70, 130, 3, 2, 20, 130, 3),
        (160, 64, 7, 2, 64, 5, 2),
        (130, 40, 1, 2, 128, 127, 4),
    ] {
        for kind in [Type::I4, Type::I8] {
            let sizes = Sizes { width, mlp, group, key_heads, head_dim, position, blocks };
            let weights = Weights::random(machine, kind, &sizes);
            let [ours, theirs] = sizes.work(machine);
            at_once(machine, kind, &sizes, &weights, &ours);
            in_steps(machine, kind, &sizes, &weights, &theirs);
            let what = format!("width {width}, {kind:?}, position {position}");
            let near = |machine: &Machine, part: &str, ours: u64, theirs: u64| {
                let expected = crate::machine::wide(&machine.read_floats(theirs));
                machine.check(&format!("{what}: {part}"), ours, &expected, 2e-6);
            };
            assert_eq!(machine.read(ours.codes[0]), machine.read(theirs.codes[0]), "{what}: keys");
            assert_eq!(machine.read(ours.codes[1]), machine.read(theirs.codes[1]), "{what}: values");
            assert_eq!(machine.read_words(ours.counters), vec![0; key_heads], "{what}: counters");
            for part in 0..2 {
                near(machine, "scales", ours.scales[part], theirs.scales[part]);
            }
            near(machine, "the mean", ours.mean, theirs.mean);
            near(machine, "attended", ours.attended, theirs.attended);
            near(machine, "gate", ours.gate, theirs.gate);
            near(machine, "x", ours.x, theirs.x);
        }
    }
}
