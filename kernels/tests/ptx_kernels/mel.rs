//! Log-mel features of sound.

use crate::machine::{Grid, Int, Machine, Size, arguments};

const THREADS: usize = 256;

pub(crate) fn log_mel(machine: &mut Machine) {
    let (rows, width) = (5, 67);
    let len = rows * width;
    let x = machine.numbers(2 * len);
    let (at, out) = (machine.floats(&x), machine.output(4 * len));
    machine.run(["mel", "power"], Grid::each(len, THREADS), arguments![at, Size(len), Int(width), out]);
    let part = |i: usize, part: usize| f64::from(x[(i / width * 2 + part) * width + i % width]);
    let expected: Vec<f64> = (0..len).map(|i| part(i, 0).powi(2) + part(i, 1).powi(2)).collect();
    machine.check("power", out, &expected, 1e-6);

    // Powers of many orders of ten, more than the blocks see at once; then less than is heard.
    for (orders, blocks) in [(6.0, 1), (2.0, 2), (-30.0, 2)] {
        let power = |x: f32| if x < -1.9 { 0.0 } else { 10f32.powf(x.abs() * orders) };
        let x: Vec<f32> = machine.numbers(3 * THREADS + 77).into_iter().map(power).collect();
        let (at, parts, len) = (machine.floats(&x), machine.output(4 * blocks), x.len());
        machine.run(["mel", "log_mel_most"], Grid([blocks, 1, 1], THREADS, 0), arguments![at, Size(len), parts]);
        machine.run(["mel", "log_mel"], Grid::each(len, THREADS), arguments![at, Size(len), parts, Int(blocks)]);
        let decades: Vec<f64> = x.iter().map(|&x| f64::from(x.max(1e-10)).log10()).collect();
        let most = decades.iter().copied().fold(-10.0, f64::max);
        let expected: Vec<f64> = decades.iter().map(|value| (value.max(most - 8.0) + 4.0) / 4.0).collect();
        machine.check(&format!("log-mel, {orders} orders"), at, &expected, 1e-6);
    }
}
