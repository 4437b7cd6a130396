//! Camera pixels to patches, and to bytes.

use crate::machine::{Fields, Grid, Int, Machine, arguments};
use candor_kernels::pixels::resample::{Axis, columns_first};
use candor_kernels::pixels::{ChromaSite, Cut, Format, Matrix, Outside, Picture, Pixels, Yuv, normalisation};

const TILE: usize = 16;

/// A size of a picture, its cut's place and size, side and patch; 0 makes bytes.
type Shape = ([usize; 2], [i64; 2], [usize; 2], usize, usize);

pub(crate) fn patches(machine: &mut Machine) {
    let (sd, hd) = ((Matrix::Bt601, ChromaSite::Middle), (Matrix::Bt709, ChromaSite::Left));
    let edge = Outside::Edge;
    one(machine, "RGB as it is", None, 3, ([18, 18], [0, 0], [18, 18], 18, 5), edge, false);
    one(machine, "RGB, smaller", None, 3, ([40, 37], [-3, 2], [43, 43], 17, 4), edge, true);
    one(machine, "RGBA, larger", None, 4, ([7, 5], [0, -1], [7, 7], 20, 10), Outside::Colour(127), false);
    one(machine, "RGBA to bytes", None, 4, ([9, 6], [2, 1], [5, 5], 7, 0), edge, true);
    one(machine, "NV12, columns first", Some(sd), 1, ([10, 80], [0, 0], [10, 80], 9, 3), edge, false);
    one(machine, "NV12 beyond its edges", Some(hd), 1, ([14, 12], [5, 7], [19, 19], 11, 5), edge, false);
}

#[allow(clippy::too_many_arguments)] // what a picture is
fn one(
    machine: &mut Machine,
    what: &str,
    colours: Option<(Matrix, ChromaSite)>,
    bytes: usize,
    (size, place, of, side, patch): Shape,
    outside: Outside,
    grey: bool,
) {
    let ([width, height], [x, y]) = (size, place);
    let pitch = bytes * width + 3;
    let (data, chroma) = (machine.random_bytes(pitch * height - 3), machine.random_bytes(pitch * (height / 2) - 3));
    let format = match colours {
        Some((matrix, site)) => {
            let yuv = Yuv { matrix, site };
            Format::Nv12 { luma: &data, luma_pitch: pitch, chroma: &chroma, chroma_pitch: pitch, yuv }
        }
        None if bytes == 4 => Format::Rgba { data: &data, pitch },
        None => Format::Rgb { data: &data, pitch },
    };
    let cut = Cut { x, y, width: of[0], height: of[1], outside };
    let picture = Picture { pixels: Pixels { width, height, format }, cut, grey, detail: None, side };
    let expected = picture.rgb().unwrap_or_else(|error| panic!("{what}: {error}"));

    let gains = match colours.map(|colours| colours.0) {
        None => [0; 5],
        Some(Matrix::Bt601) => [298, 409, 516, -100, -208],
        Some(_) => [298, 459, 541, -55, -136],
    };
    // Numbers below zero as those of 2³² more; only the lower half of each is taken.
    let numbers = |values: &[i64]| values.iter().map(|&value| value as usize).collect::<Vec<usize>>();
    let number = if colours.is_some() { 2 } else { bytes - 3 };
    let filler = match outside {
        Outside::Edge => -1,
        Outside::Colour(value) => i64::from(value),
    };
    let left = colours.is_some_and(|colours| colours.1 == ChromaSite::Left);
    let (at, of_chroma) = (machine.bytes(&data), machine.bytes(&chroma));
    let camera = Fields::default()
        .word(at)
        .word(of_chroma)
        .ints(&[number, width, height, 0, pitch, 0, pitch])
        .ints(&numbers(&[x, y, filler, i64::from(grey), i64::from(left)]))
        .ints(&numbers(&gains))
        .filled(8);
    let rows_first = !columns_first((of[0], of[1]), (side, side));
    let [one, two] = if rows_first { of } else { [of[1], of[0]] }.map(|input| axis(machine, input, side));
    // Of bytes, where there are no patches, all pixels.
    let (floats, whole) = match side.checked_div(patch) {
        Some(patches) => ((patches * patch).pow(2) * 3, 0),
        None => (0, side * side * 3),
    };
    let [floats, whole] = [4 * floats, whole].map(|bytes| if bytes > 0 { machine.output(bytes) } else { 0 });
    let tiles = side.div_ceil(TILE);
    machine.run(
        ["pixels", "picture_patches"],
        Grid([tiles, tiles, 1], TILE * TILE, 0),
        arguments![camera, one, two, Int(usize::from(rows_first)), Int(patch), floats, whole],
    );
    if patch == 0 {
        assert_eq!(machine.read(whole), expected, "{what}");
        return;
    }
    let (scale, across) = (normalisation(), side / patch);
    let value = |i: usize| {
        let (position, c, row, column) =
            (i / (3 * patch * patch), i / (patch * patch) % 3, i / patch % patch, i % patch);
        let (y, x) = (position / across * patch + row, position % across * patch + column);
        f64::from(scale[usize::from(expected[(y * side + x) * 3 + c])])
    };
    machine.check(what, floats, &(0..across * across * 3 * patch * patch).map(value).collect::<Vec<_>>(), 0.0);
}

/// The table of an axis, as cuda/pixels.cu takes it.
fn axis(machine: &mut Machine, input: usize, output: usize) -> Fields {
    let Axis { taps, first, count, weights } = Axis::of(input, output);
    let mut words = |values: Vec<i32>| {
        let bytes: Vec<u8> = values.into_iter().flat_map(i32::to_le_bytes).collect();
        machine.bytes(&bytes)
    };
    let small = |values: Vec<usize>| values.into_iter().map(|value| value as i32).collect::<Vec<_>>();
    let tables = [words(small(first)), words(small(count)), words(weights)];
    tables.into_iter().fold(Fields::default(), Fields::word).ints(&[taps, output])
}
