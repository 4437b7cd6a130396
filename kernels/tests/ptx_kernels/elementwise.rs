//! Operations on each element by itself.

use crate::machine::{Fields, Grid, Int, Machine, Size, arguments, wide};
use crate::weight::TYPES;

pub(crate) const ACTIVATIONS: usize = 7;

/// Φ by its series.
fn normal_distribution(x: f64) -> f64 {
    if x.abs() > 7.0 {
        return if x > 0.0 { 1.0 } else { 0.0 };
    }
    let (mut term, mut sum, mut n) = (x, x, 1.0);
    while term.abs() > 1e-18 * sum.abs() {
        n += 2.0;
        term *= x * x / n;
        sum += term;
    }
    0.5 + sum * (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

/// Activation number `kind` of cuda/common.cuh.
pub(crate) fn activation(kind: usize, x: f64) -> f64 {
    match kind {
        1 => x * normal_distribution(x),
        2 => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
        3 => x / (1.0 + (-x).exp()),
        4 => 1.0 / (1.0 + (-x).exp()),
        5 => x.tanh(),
        6 => x.max(0.0),
        _ => x,
    }
}

pub(crate) fn activate(machine: &mut Machine) {
    let mut values = machine.numbers(299);
    values.iter_mut().skip(100).for_each(|value| *value *= 4.0);
    values.extend([0.0, -0.0, 30.0, -30.0, 90.0, -90.0]);
    for kind in 0..ACTIVATIONS {
        let x = machine.floats(&values);
        let grid = Grid::each(values.len(), 256);
        machine.run(["elementwise", "activate"], grid, arguments![x, Size(values.len()), Int(kind)]);
        // Relative to each value's own size.
        for (&value, found) in values.iter().zip(machine.read_floats(x)) {
            let expected = activation(kind, f64::from(value));
            let error = (f64::from(found) - expected).abs() / expected.abs().max(1.0);
            assert!(error < 1e-6, "activation {kind} of {value} is {found}, not {expected}");
        }
    }
    // What is no number stays none.
    let x = machine.floats(&[f32::NAN]);
    for kind in 0..ACTIVATIONS {
        machine.run(["elementwise", "activate"], Grid::each(1, 256), arguments![x, Size(1), Int(kind)]);
        assert!(machine.read_floats(x)[0].is_nan(), "activation {kind} makes a number of none");
    }
}

pub(crate) fn sums_and_products(machine: &mut Machine) {
    let len = 301;
    let (x, y) = (machine.numbers(len), machine.numbers(len));
    let both = |of: fn(f64, f64) -> f64| -> Vec<f64> {
        x.iter().zip(&y).map(|(&x, &y)| of(f64::from(x), f64::from(y))).collect()
    };
    let (x_at, y_at) = (machine.floats(&x), machine.floats(&y));
    machine.run(["elementwise", "add"], Grid::each(len, 256), arguments![x_at, y_at, Size(len)]);
    machine.check("add", x_at, &both(|x, y| x + y), 1e-7);
    let to = machine.output(4 * len);
    machine.run(["elementwise", "copy"], Grid::each(len, 256), arguments![y_at, to, Size(len)]);
    machine.check("copy", to, &crate::machine::wide(&y), 0.0);
    let x_at = machine.floats(&x);
    machine.run(["elementwise", "multiply"], Grid::each(len, 256), arguments![x_at, y_at, Size(len)]);
    machine.check("multiply", x_at, &both(|x, y| x * y), 1e-7);

    let parts: Vec<Vec<f32>> = (0..8).map(|_| machine.numbers(len)).collect();
    let weights = machine.numbers(8);
    let addresses: Vec<u64> = parts.iter().map(|part| machine.floats(part)).collect();
    for (count, add_to) in [(0, 0), (1, 1), (3, 0), (8, 1)] {
        // What is behind the last part is not looked at.
        let at = |part: usize| if part < count { addresses[part] } else { 0 };
        let argument = (0..8).fold(Fields::default(), |fields, part| fields.word(at(part)));
        let argument = weights.iter().fold(argument, |fields, &weight| fields.float(weight));
        let out = if add_to == 1 { machine.floats(&y) } else { machine.output(4 * len) };
        let grid = Grid::each(len, 256);
        let arguments = arguments![argument, Int(count), Size(len), Int(add_to), out];
        machine.run(["elementwise", "weighted_sum"], grid, arguments);
        let sum = |i: usize| {
            let parts = parts.iter().zip(&weights).take(count);
            f64::from(y[i]) * add_to as f64 + parts.map(|(part, &w)| f64::from(w) * f64::from(part[i])).sum::<f64>()
        };
        machine.check(&format!("{count} parts"), out, &(0..len).map(sum).collect::<Vec<_>>(), 1e-6);
    }

    let (groups, per_group, width) = (3, 7, 13);
    let x = machine.numbers(groups * per_group * width);
    let (x_at, out) = (machine.floats(&x), machine.output(4 * groups * width));
    let arguments = arguments![x_at, Size(groups), Int(per_group), Int(width), out];
    machine.run(["elementwise", "mean_rows"], Grid::each(groups * width, 256), arguments);
    let mean = |i: usize| {
        let row = |row: usize| f64::from(x[(i / width * per_group + row) * width + i % width]);
        (0..per_group).map(row).sum::<f64>() / per_group as f64
    };
    let means: Vec<f64> = (0..groups * width).map(mean).collect();
    machine.check("means", out, &means, 1e-6);
    let arguments = arguments![x_at, Size(x.len()), Int(per_group), Int(width), out];
    machine.run(["elementwise", "scale_groups"], Grid::each(x.len(), 256), arguments);
    let scaled = |(i, &x): (usize, &f32)| f64::from(x) * means[i / width / per_group * width + i % width];
    machine.check("scaled groups", x_at, &x.iter().enumerate().map(scaled).collect::<Vec<_>>(), 1e-6);
}

pub(crate) fn tables(machine: &mut Machine) {
    let (rows, width, first) = (5, 37, 2);
    for kind in TYPES {
        let table = machine.weight(kind, 4, width);
        let x = machine.numbers(rows * width);
        let (x_at, len) = (machine.floats(&x), rows * width);
        let arguments = arguments![x_at, Size(len), table.argument.clone(), Int(first)];
        machine.run(["elementwise", "add_positions"], Grid::each(len, 256), arguments);
        let added = wide(&x).into_iter().enumerate().map(|(i, x)| x + table.values[(i + first * width) % (4 * width)]);
        machine.check(&format!("positions of {kind:?}"), x_at, &added.collect::<Vec<_>>(), 1e-6);

        let mut ids = vec![3, 0, 1, 1, 2];
        ids.resize(64, 99);
        let (argument, out) = (Fields::default().ints(&ids), machine.output(4 * len));
        let arguments = arguments![table.argument.clone(), argument, Int(rows), out];
        machine.run(["elementwise", "embed"], Grid::each(len, 256), arguments);
        let expected: Vec<f64> =
            ids[..rows].iter().flat_map(|id| table.values[id * width..][..width].to_vec()).collect();
        machine.check(&format!("table of {kind:?}"), out, &expected, 1e-6);
    }
}
