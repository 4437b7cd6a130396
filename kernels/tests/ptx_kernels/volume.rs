//! Convolutions and resizing.

use crate::machine::{Fields, Grid, Int, Machine, Size, arguments};
use crate::weight::{self, TYPES};

pub(crate) fn convolutions(machine: &mut Machine) {
    let channels = 5;
    for (size, kernel, stride, pad, output) in [
        ([2, 6, 4], [2, 2, 3], [1, 2, 1], [1, 0, 1], [2, 3, 4]),
        ([1, 5, 7], [1, 3, 2], [1, 1, 3], [0, 1, 0], [1, 4, 2]),
    ] {
        let x = machine.numbers(size.iter().product::<usize>() * channels);
        let len = output.iter().chain(&kernel).product::<usize>() * channels;
        let (at, out) = (machine.floats(&x), machine.output(4 * len));
        let shape = [size, kernel, stride, pad, output].concat();
        let argument = Fields::default().ints(&shape).ints(&[channels]);
        machine.run(["convolution", "unfold"], Grid::each(len, 256), arguments![at, argument, Size(len), out]);
        let column = |i: usize| {
            let [kt, kh, kw] = kernel;
            let element = [i / (kh * kw) % kt, i / kw % kh, i % kw];
            let (channel, left) = (i / (kt * kh * kw) % channels, i / (kt * kh * kw) / channels);
            let position = [left / (output[1] * output[2]), left / output[2] % output[1], left % output[2]];
            let mut from = 0;
            for axis in 0..3 {
                let place = (position[axis] * stride[axis] + element[axis]).checked_sub(pad[axis]);
                let Some(place) = place.filter(|place| *place < size[axis]) else { return 0.0 };
                from = from * size[axis] + place;
            }
            f64::from(x[from * channels + channel])
        };
        machine.check("unfold", out, &(0..len).map(column).collect::<Vec<_>>(), 0.0);
    }

    let [frames, height, width] = [2, 6, 4];
    let x = machine.numbers(frames * height * width * channels);
    let at = machine.floats(&x);
    for kind in TYPES {
        let (weight, bias) = (machine.weight(kind, channels, 9), machine.weight(kind, channels, 1));
        for with_bias in [false, true] {
            let out = machine.output(4 * x.len());
            let of_bias = if with_bias { bias.argument.clone() } else { weight::none() };
            let (of_weight, len) = (weight.argument.clone(), Size(x.len()));
            let arguments = arguments![at, len, Int(height), Int(width), Int(channels), of_weight, of_bias, out];
            machine.run(["convolution", "depthwise3x3"], Grid::each(x.len(), 256), arguments);
            let sum = |i: usize| {
                let (channel, column, row) = (i % channels, i / channels % width, i / channels / width % height);
                let tap = |tap: usize| {
                    let (row, column) = ((row + tap / 3).wrapping_sub(1), (column + tap % 3).wrapping_sub(1));
                    let frame = i / channels / width / height;
                    let from = ((frame * height).wrapping_add(row) * width).wrapping_add(column);
                    let inside = row < height && column < width;
                    if inside {
                        f64::from(x[from * channels + channel]) * weight.values[channel * 9 + tap]
                    } else {
                        0.0
                    }
                };
                (0..9).map(tap).sum::<f64>() + if with_bias { bias.values[channel] } else { 0.0 }
            };
            machine.check(&format!("depthwise of {kind:?}"), out, &(0..x.len()).map(sum).collect::<Vec<_>>(), 2e-6);
        }
    }
}

pub(crate) fn bilinear(machine: &mut Machine) {
    let (frames, channels) = (2, 3);
    for (from, to) in [([6, 4], [9, 3]), ([1, 1], [2, 5]), ([5, 7], [5, 7]), ([9, 2], [4, 11])] {
        let x = machine.numbers(frames * from[0] * from[1] * channels);
        let len = frames * to[0] * to[1] * channels;
        let (at, out) = (machine.floats(&x), machine.output(4 * len));
        let sizes = [from[0], from[1], to[0], to[1], channels].map(Int);
        let [height, width, to_height, to_width, of] = sizes;
        let arguments = arguments![at, Size(len), height, width, to_height, to_width, of, out];
        machine.run(["convolution", "bilinear"], Grid::each(len, 256), arguments);
        let source = |i: usize, axis: usize| {
            let position = (from[axis] as f64 / to[axis] as f64 * (i as f64 + 0.5) - 0.5).max(0.0);
            let first = (position as usize).min(from[axis] - 1);
            (first, (first + 1).min(from[axis] - 1), position - first as f64)
        };
        let value = |i: usize| {
            let (channel, column, row) = (i % channels, i / channels % to[1], i / channels / to[1] % to[0]);
            let frame = i / channels / to[1] / to[0];
            let ((top, bottom, down), (left, right, across)) = (source(row, 0), source(column, 1));
            let x = |row, column| f64::from(x[((frame * from[0] + row) * from[1] + column) * channels + channel]);
            let along = |row| x(row, left) * (1.0 - across) + x(row, right) * across;
            along(top) * (1.0 - down) + along(bottom) * down
        };
        machine.check(&format!("{from:?} to {to:?}"), out, &(0..len).map(value).collect::<Vec<_>>(), 2e-6);
    }
}
