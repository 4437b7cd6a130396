//! Linear layers: of quantised weights over activations that are rounded to bytes, and of floats.

use crate::elementwise::{ACTIVATIONS, activation};
use crate::machine::{Fields, Grid, Int, Machine, Size, arguments, wide};
use crate::weight::{self, GROUPS, TYPES, Type, Weight};

/// Activations that share a scale.
pub(crate) const BLOCK: usize = 128;
/// Outputs of a warp, warps of a block, and rows and outputs of a tile.
const OUTPUTS: usize = 2;
pub(crate) const WARPS: usize = 4;
const TILE: usize = 64;
/// Up to this many rows, warps take outputs of their own.
const FEW_ROWS: usize = 8;

/// A linear layer of cuda/layers.cuh.
pub(crate) struct Layer {
    weight: Weight,
    bias: Option<Weight>,
    kind: usize,
    add: bool,
}

impl Layer {
    pub(crate) fn new(weight: Weight) -> Self {
        Layer { weight, bias: None, kind: 0, add: false }
    }

    pub(crate) fn bias(mut self, bias: Weight) -> Self {
        self.bias = Some(bias);
        self
    }

    pub(crate) fn activation(mut self, kind: usize) -> Self {
        self.kind = kind;
        self
    }

    pub(crate) fn added(mut self) -> Self {
        self.add = true;
        self
    }

    fn argument(&self, out: u64, tasks: usize) -> Fields {
        let bias = self.bias.as_ref().map_or(weight::none(), |bias| bias.argument.clone());
        let ints = [self.kind, tasks, usize::from(self.weight.aligned), usize::from(self.add)];
        Fields::default().then(&self.weight.argument).then(&bias).word(out).ints(&ints)
    }

    /// activation(x · weightᵀ + bias), added to what was there; and the size of the sums, which errors are relative to.
    fn of(&self, x: &[f64], rows: usize, before: &[f32]) -> (Vec<f64>, f64) {
        let Weight { rows: outputs, depth, ref values, .. } = self.weight;
        let mut size = 0f64;
        let mut output = |i: usize| {
            let (row, output) = (&x[i / outputs * depth..][..depth], i % outputs);
            let products = row.iter().zip(&values[output * depth..]).map(|(x, w)| x * w);
            size = size.max(products.clone().map(|product| product * product).sum::<f64>().sqrt());
            let bias = self.bias.as_ref().map_or(0.0, |bias| bias.values[output]);
            activation(self.kind, products.sum::<f64>() + bias) + if self.add { f64::from(before[i]) } else { 0.0 }
        };
        let values = (0..rows * outputs).map(&mut output).collect();
        (values, size)
    }
}

/// The launch of layers: their structure, tasks, where the outputs go and what was there.
struct Launch {
    layers: Fields,
    tasks: usize,
    outs: Vec<(u64, Vec<f32>)>,
}

fn launch(machine: &mut Machine, layers: &[Layer], rows: usize, gated: bool) -> Launch {
    let mut outs = Vec::new();
    for layer in layers {
        let before = machine.numbers(rows * layer.weight.rows);
        let out = if layer.add { machine.floats(&before) } else { machine.output(4 * before.len()) };
        outs.push((out, before));
    }
    let with_outs: Vec<(&Layer, u64)> = layers.iter().zip(&outs).map(|(layer, (out, _))| (layer, *out)).collect();
    let (layers, tasks) = arranged(&with_outs, rows, gated);
    Launch { layers, tasks, outs }
}

/// `Layers` of cuda/layers.cuh for layers and their outputs, and how many tasks they are.
pub(crate) fn arranged(layers: &[(&Layer, u64)], rows: usize, gated: bool) -> (Fields, usize) {
    let (mut all, mut total) = (Fields::default(), 0);
    for (layer, out) in layers {
        let per_task = if rows > FEW_ROWS { TILE } else { OUTPUTS };
        let tasks = if gated { layer.weight.rows } else { layer.weight.rows.div_ceil(per_task) };
        all = all.then(&layer.argument(*out, tasks));
        total += tasks;
    }
    // What is behind the last layer is not looked at.
    let nothing = Fields::default().then(&weight::none()).then(&weight::none()).word(0).ints(&[0; 4]);
    all = (layers.len()..3).fold(all, |all, _| all.then(&nothing));
    let (count, tasks) = if gated { (1, layers[0].0.weight.rows) } else { (layers.len(), total) };
    (all.ints(&[count, usize::from(gated)]), tasks)
}

fn grid(tasks: usize, rows: usize) -> [usize; 3] {
    if rows > FEW_ROWS { [tasks, rows.div_ceil(TILE), 1] } else { [tasks.div_ceil(WARPS), 1, 1] }
}

/// Activations as bytes, with the scale of each block, as `quantise` makes them.
fn rounded(x: &[f32], depth: usize) -> (Vec<i8>, Vec<f32>) {
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for block in x.chunks_exact(depth).flat_map(|row| row.chunks(BLOCK)) {
        let largest = block.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let factor = if largest > 1e-30 { 127.0 / largest } else { 0.0 };
        codes.extend(block.iter().map(|x| (x * factor).round_ties_even() as i8));
        codes.resize(codes.len().next_multiple_of(BLOCK), 0);
        scales.push(largest / 127.0);
    }
    (codes, scales)
}

/// Runs `quantise` over x `[rows, depth]` and compares; the addresses of codes and scales, and the values they stand for.
fn quantised(machine: &mut Machine, x: &[f32], rows: usize, depth: usize, words: bool) -> (u64, u64, Vec<f64>) {
    let blocks = depth.div_ceil(BLOCK);
    let count = rows * blocks;
    let (at, codes, scales) = (machine.floats(x), machine.output(count * BLOCK), machine.output(4 * count));
    let arguments = arguments![at, Size(count), Int(blocks), Int(depth), Int(usize::from(words)), codes, scales];
    machine.run(["quantise", "quantise"], Grid([count.div_ceil(4), 1, 1], 128, 0), arguments);

    let (of_codes, of_scales) = rounded(x, depth);
    let mut ordered = of_codes.clone();
    if words {
        for (to, from) in ordered.chunks_exact_mut(8).zip(of_codes.chunks_exact(8)) {
            to.copy_from_slice(&[0, 2, 4, 6, 1, 3, 5, 7].map(|i| from[i]));
        }
    }
    let found: Vec<i8> = machine.read(codes).iter().map(|&byte| byte as i8).collect();
    let wrong = found.iter().zip(&ordered).position(|(found, expected)| found != expected);
    assert_eq!(wrong, None, "the first wrong code of {rows} rows, {depth} deep");
    assert_eq!(machine.read_floats(scales), of_scales);
    let value = |i: usize| {
        let at = i / depth * blocks * BLOCK + i % depth;
        f64::from(of_codes[at]) * f64::from(of_scales[at / BLOCK])
    };
    (codes, scales, (0..rows * depth).map(value).collect())
}

pub(crate) fn quantise(machine: &mut Machine) {
    for (rows, depth) in [(1, 1), (3, 40), (2, 131), (5, 320), (9, 128)] {
        let mut x = machine.numbers(rows * depth);
        if rows == 3 {
            // Nothing, next to nothing, and ties.
            x[..40].fill(0.0);
            x[40..80].fill(1e-31);
            x[80..].iter_mut().enumerate().for_each(|(i, x)| *x = (i as f32 - 20.5).min(127.0));
            x[80] = 127.0;
        }
        for words in [false, true] {
            quantised(machine, &x, rows, depth, words);
        }
    }
    // Infinity and what is no number make a scale that is none, of their own block alone.
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = machine.numbers(300);
        x[130] = bad;
        let (at, codes, scales) = (machine.floats(&x), machine.output(3 * BLOCK), machine.output(12));
        let arguments = arguments![at, Size(3), Int(3), Int(300), Int(1), codes, scales];
        machine.run(["quantise", "quantise"], Grid([1, 1, 1], 128, 0), arguments);
        assert_eq!(
            machine.read_floats(scales).iter().map(|scale| scale.is_nan()).collect::<Vec<_>>(),
            [false, true, false]
        );
        assert_eq!(machine.read(codes)[BLOCK..2 * BLOCK], [0; BLOCK]);
    }
}

/// Quantised layers of one x, in one launch, and what each should make of it.
fn of_bytes(machine: &mut Machine, what: &str, rows: usize, layers: &[Layer], gated: bool) {
    let Weight { kind, depth, chunk, .. } = layers[0].weight;
    let x = machine.numbers(rows * depth);
    let (codes, scales, values) = quantised(machine, &x, rows, depth, kind == Type::I4);
    let launch = launch(machine, layers, rows, gated);
    let (blocks, argument) = (depth.div_ceil(BLOCK), launch.layers.clone());
    let size = if kind == Type::I4 { "i4" } else { "i8" };
    if rows > FEW_ROWS {
        let stage = TILE * (64 + 16) + TILE * (if kind == Type::I4 { 32 } else { 64 } + 16);
        let arguments = arguments![codes, scales, Int(rows), Int(blocks), Int(chunk), argument];
        machine.run(["matmul", &format!("matmul_{size}")], Grid(grid(launch.tasks, rows), 128, 3 * stage), arguments);
    } else {
        let kernel = format!("matvec_{size}_{}", if rows == 1 { 1 } else { 8 });
        let arguments = arguments![codes, scales, Int(rows), Int(blocks), argument];
        machine.run(["matvec", &kernel], Grid(grid(launch.tasks, rows), 32 * WARPS, 0), arguments);
    }
    let mut expected: Vec<(Vec<f64>, f64)> =
        layers.iter().zip(&launch.outs).map(|(layer, (_, before))| layer.of(&values, rows, before)).collect();
    if gated {
        let (factors, size) = expected.remove(1);
        expected[0].0.iter_mut().zip(factors).for_each(|(value, factor)| *value *= factor);
        expected[0].1 *= size;
    }
    for (index, ((expected, sums), (out, _))) in expected.iter().zip(&launch.outs).enumerate() {
        machine.check_sums(&format!("{what}, {rows} rows, layer {index} of {size}"), *out, expected, *sums);
    }
}

const QUANTISED: [Type; 2] = [Type::I4, Type::I8];
const SCALES: [Type; 3] = [Type::F16, Type::F32, Type::Bf16];
/// Rows of weights that begin at multiples of 16 bytes, and others; the last takes several pieces a lane.
const DEPTHS: [usize; 6] = [1, 40, 96, 131, 320, 1100];

pub(crate) fn few_rows(machine: &mut Machine) {
    for kind in QUANTISED {
        for (index, depth) in DEPTHS.into_iter().enumerate() {
            for (at, group) in GROUPS.into_iter().enumerate() {
                let (scale, outputs) = (SCALES[(index + at) % 3], [13, 7, 8, 1][at]);
                for rows in [1, [2, 3, 8, 5][(index + at) % 4]] {
                    let weight = machine.weight_of(kind, outputs, depth, group, scale, index % 2);
                    let bias = machine.weight(TYPES[index % 5], outputs, 1);
                    let layer = Layer::new(weight).bias(bias).activation((index + at) % ACTIVATIONS);
                    let layer = if at == 1 { layer.added() } else { layer };
                    of_bytes(machine, &format!("depth {depth}, groups {group:?}"), rows, &[layer], false);
                }
            }
        }
    }
}

pub(crate) fn several_layers(machine: &mut Machine) {
    for (kind, rows) in QUANTISED.into_iter().flat_map(|kind| [1, 6].map(|rows| (kind, rows))) {
        for (depth, outputs) in [(96, [5, 9, 4]), (131, [1, 22, 3])] {
            let [a, b, c] = outputs.map(|outputs| machine.weight_of(kind, outputs, depth, Some(32), Type::F16, 0));
            let [bias, other] = [outputs[0], outputs[2]].map(|outputs| machine.weight(Type::F16, 1, outputs));
            let layers = [
                Layer::new(a).bias(bias).activation(3),
                Layer::new(b).added(),
                Layer::new(c).bias(other).activation(2).added(),
            ];
            of_bytes(machine, "three layers", rows, &layers, false);
            of_bytes(machine, "two layers", rows, &layers[..2], false);
        }
    }
}

pub(crate) fn gated(machine: &mut Machine) {
    for (kind, rows) in QUANTISED.into_iter().flat_map(|kind| [1, 2, 8].map(|rows| (kind, rows))) {
        for (depth, group) in [(40, Some(32)), (320, Some(64)), (131, None)] {
            // The second begins in the middle of another one.
            let [gate, up] = [0, 3].map(|first| machine.weight_of(kind, 11, depth, group, Type::F16, first));
            of_bytes(machine, "gated", rows, &[Layer::new(gate).activation(3), Layer::new(up)], true);
        }
    }
}

fn many_rows(machine: &mut Machine, kind: Type) {
    for (index, depth) in [40, 96, 131, 320, 32, 1].into_iter().enumerate() {
        for (at, group) in GROUPS.into_iter().enumerate() {
            let rows = [9, 65, 70, 64][(index + at) % 4];
            let outputs = [70, 5, 64, 33][(index + at / 2) % 4];
            let weight = machine.weight_of(kind, outputs, depth, group, SCALES[(index + at) % 3], at % 2);
            let layer = Layer::new(weight).activation((index + at) % ACTIVATIONS);
            let bias = machine.weight(TYPES[index % 5], outputs, 1);
            let layer = if at == 1 { layer.added() } else { layer.bias(bias) };
            of_bytes(machine, &format!("depth {depth}, groups {group:?}, {outputs} outputs"), rows, &[layer], false);
        }
    }
}

pub(crate) fn many_rows_of_four_bits(machine: &mut Machine) {
    many_rows(machine, Type::I4);
}

pub(crate) fn many_rows_of_bytes(machine: &mut Machine) {
    many_rows(machine, Type::I8);
}

pub(crate) fn several_layers_of_many_rows(machine: &mut Machine) {
    for kind in QUANTISED {
        let [a, b, c] = [65, 3, 64].map(|outputs| machine.weight_of(kind, outputs, 200, Some(64), Type::F32, 0));
        let bias = machine.weight(Type::F32, 1, 65);
        let layers = [Layer::new(a).bias(bias).activation(1), Layer::new(b).added(), Layer::new(c).activation(6)];
        of_bytes(machine, "three layers", 10, &layers, false);
    }
}

pub(crate) fn floats(machine: &mut Machine) {
    for (index, depth) in [1, 40, 77, 320].into_iter().enumerate() {
        for (at, kind) in [Type::F32, Type::F16, Type::Bf16].into_iter().enumerate() {
            for rows in [1, [2, 5, 8][at], [9, 65, 70][(at + index) % 3]] {
                let [a, b, c] = [70, 9, 4].map(|outputs| machine.weight_of(kind, outputs, depth, None, kind, at % 2));
                let bias = machine.weight(TYPES[index], 1, 70);
                let layers = [Layer::new(a).bias(bias).activation(at), Layer::new(b).added(), Layer::new(c)];
                let layers = &layers[..1 + index % 3];
                let x = machine.numbers(rows * depth);
                let (x_at, launch) = (machine.floats(&x), launch(machine, layers, rows, false));
                let kernel = match rows {
                    1 => "float_matvec_1",
                    2..=FEW_ROWS => "float_matvec_8",
                    _ => "float_matmul",
                };
                let grid = Grid(grid(launch.tasks, rows), 128, 0);
                machine.run(["float", kernel], grid, arguments![x_at, Int(rows), launch.layers.clone()]);
                for (layer, (out, before)) in layers.iter().zip(&launch.outs) {
                    let what = format!("{kernel}, {rows} rows of {depth}, {kind:?}");
                    let (expected, size) = layer.of(&wide(&x), rows, before);
                    machine.check_sums(&what, *out, &expected, size);
                }
            }
        }
    }
}

/// What `to_half` makes of a row, as the values that it stands for, and the scale.
fn to_half(row: &[f32]) -> (Vec<f64>, f32) {
    let largest = row.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let factor = if largest < 1e-30 { 1.0 } else { 2f32.powi(13 - largest.log2().floor() as i32) };
    let value = |x: &f32| f64::from(half::f16::from_f32(x * factor).to_f32()) / f64::from(factor);
    (row.iter().map(value).collect(), 1.0 / factor)
}

pub(crate) fn halves(machine: &mut Machine) {
    for (index, depth) in [1, 40, 77, 320, 96].into_iter().enumerate() {
        for (at, rows) in [9, 65, 130].into_iter().enumerate() {
            let [a, b] = [70, 9].map(|outputs| machine.weight_of(Type::F16, outputs, depth, None, Type::F16, at % 2));
            let bias = machine.weight(Type::F16, 1, 70);
            let layers = [Layer::new(a).bias(bias).activation(index), Layer::new(b).added()];
            let mut x = machine.numbers(rows * depth);
            // Nothing, and what f16 does not hold.
            x[..depth].fill(0.0);
            x[depth..2 * depth].iter_mut().for_each(|x| *x *= 1e6);
            x[2 * depth..3 * depth].iter_mut().for_each(|x| *x *= 1e-8);
            let blocks = depth.div_ceil(64);
            let (x_at, launch) = (machine.floats(&x), launch(machine, &layers, rows, false));
            let (halves, scales) = (machine.output(2 * rows * blocks * 64), machine.output(4 * rows));
            let arguments = arguments![x_at, Int(blocks), Int(depth), halves, scales];
            machine.run(["half", "to_half"], Grid([rows, 1, 1], 128, 0), arguments);
            let (values, factors): (Vec<_>, Vec<_>) = x.chunks_exact(depth).map(to_half).unzip();
            assert_eq!(machine.read_floats(scales), factors, "{rows} rows of {depth}");
            let grid = Grid(grid(launch.tasks, rows), 128, 30720);
            let arguments = arguments![halves, scales, Int(rows), Int(blocks), launch.layers.clone()];
            machine.run(["half", "matmul_f16"], grid, arguments);
            if machine.architecture < 80 {
                // Nothing: the device does not launch it there.
                continue;
            }
            for (layer, (out, before)) in layers.iter().zip(&launch.outs) {
                let (expected, size) = layer.of(&values.concat(), rows, before);
                machine.check_sums(&format!("{rows} rows of {depth} in halves"), *out, &expected, size);
            }
        }
    }
}

pub(crate) fn definition(machine: &mut Machine) {
    for (index, (rows, outputs, depth)) in [(1, 1, 1), (3, 33, 40), (9, 5, 131), (2, 70, 70)].into_iter().enumerate() {
        for (at, kind) in TYPES.into_iter().enumerate() {
            let weight = machine.weight(kind, outputs, depth);
            let mut layer = Layer::new(weight).activation((index + at) % ACTIVATIONS);
            if index % 2 == 0 {
                layer = layer.bias(machine.weight(kind, outputs, 1));
            }
            let x = machine.numbers(rows * depth);
            let (x_at, out) = (machine.floats(&x), machine.output(4 * rows * outputs));
            let bias = layer.bias.as_ref().map_or(weight::none(), |bias| bias.argument.clone());
            let of_weight = layer.weight.argument.clone();
            let arguments = arguments![x_at, Size(rows), of_weight, bias, Int(layer.kind), out];
            machine.run(["linear", "linear"], Grid::each(rows * outputs, 128), arguments);
            let (expected, size) = layer.of(&wide(&x), rows, &[]);
            machine.check_sums(&format!("{outputs} outputs of {kind:?}"), out, &expected, size);
        }
    }
}
