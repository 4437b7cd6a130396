//! Camera pixels to patches: formats, cuts and passes pixel by pixel; scaling is Pillow's, which the runtime's goldens hold.

use candor_kernels::pixels::resample::resize_bicubic;
use candor_kernels::pixels::{
    ChromaSite, Cut, Format, Matrix, Outside, Picture, PictureError, Pixels, Yuv, luma, normalisation,
};
use candor_kernels::{Device, DeviceError};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{SEED, test};

/// Which format, without its bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Rgb,
    Rgba,
    Nv12(Matrix, ChromaSite),
}

/// Bytes of a picture, with more behind each row than it has.
pub(crate) struct Stored {
    kind: Kind,
    size: (usize, usize),
    pitch: usize,
    data: Vec<u8>,
    chroma: Vec<u8>,
}

impl Stored {
    pub(crate) fn new(random: &mut ChaCha8Rng, kind: Kind, size: (usize, usize), padding: usize) -> Self {
        let bytes = match kind {
            Kind::Rgb => 3,
            Kind::Rgba => 4,
            Kind::Nv12(..) => 1,
        };
        let pitch = bytes * size.0 + padding;
        let mut some = |len: usize| (0..len).map(|_| random.random()).collect::<Vec<u8>>();
        // The last row ends with its last pixel.
        let data = some(pitch * size.1 - padding);
        let chroma = some((pitch * (size.1 / 2)).saturating_sub(padding));
        Stored { kind, size, pitch, data, chroma }
    }

    pub(crate) fn pixels(&self) -> Pixels<'_> {
        let (data, pitch) = (&self.data[..], self.pitch);
        let format = match self.kind {
            Kind::Rgb => Format::Rgb { data, pitch },
            Kind::Rgba => Format::Rgba { data, pitch },
            Kind::Nv12(matrix, site) => {
                let yuv = Yuv { matrix, site };
                Format::Nv12 { luma: data, luma_pitch: pitch, chroma: &self.chroma, chroma_pitch: pitch, yuv }
            }
        };
        Pixels { width: self.size.0, height: self.size.1, format }
    }

    /// A pixel of the picture.
    fn at(&self, x: usize, y: usize) -> [u8; 3] {
        match self.kind {
            Kind::Rgb => std::array::from_fn(|c| self.data[y * self.pitch + 3 * x + c]),
            Kind::Rgba => std::array::from_fn(|c| self.data[y * self.pitch + 4 * x + c]),
            Kind::Nv12(matrix, site) => {
                let sample = |column: i64, row: i64, part: usize| {
                    let column = column.clamp(0, self.size.0 as i64 / 2 - 1) as usize;
                    let row = row.clamp(0, self.size.1 as i64 / 2 - 1) as usize;
                    i32::from(self.chroma[row * self.pitch + 2 * column + part])
                };
                let (column, row) = (x as i64 / 2, y as i64 / 2);
                let (beside, above) = (column + 2 * (x as i64 % 2) - 1, row + 2 * (y as i64 % 2) - 1);
                let colour = |part: usize| {
                    let along = |row: i64| {
                        let (own, other) = (sample(column, row, part), sample(beside, row, part));
                        match (site, x % 2) {
                            (ChromaSite::Left, 0) => own,
                            (ChromaSite::Left, _) => (own + other + 1) / 2,
                            (ChromaSite::Middle, _) => (3 * own + other + 2) / 4,
                        }
                    };
                    (3 * along(row) + along(above) + 2) / 4
                };
                let factors = match matrix {
                    Matrix::Bt601 => [298, 409, -100, -208, 516],
                    Matrix::Bt709 => [298, 459, -55, -136, 541],
                    Matrix::Full => [256, 359, -88, -183, 454],
                };
                let numbers = [i32::from(self.data[y * self.pitch + x]), colour(0), colour(1)];
                let [bright, blue, red] = numbers.map(|byte| (byte - 128) * 256 + (byte + 128) % 256);
                let part = |value: i32, factor: usize| (value * factors[factor]).div_euclid(65_536);
                let sums = [part(red, 1), part(blue, 2) + part(red, 3), part(blue, 4)];
                sums.map(|sum| (128 + part(bright, 0) + sum).clamp(0, 255) as u8)
            }
        }
    }

    /// What a picture of these bytes is, `[side, side, 3]`.
    pub(crate) fn expected(&self, picture: &Picture<'_>) -> Vec<u8> {
        let Cut { x, y, width, height, outside } = picture.cut;
        let mut rgb = Vec::new();
        for at in 0..width * height {
            let wanted = (x.saturating_add((at % width) as i64), y.saturating_add((at / width) as i64));
            let nearest = (wanted.0.clamp(0, self.size.0 as i64 - 1), wanted.1.clamp(0, self.size.1 as i64 - 1));
            rgb.extend(match outside {
                Outside::Colour(value) if wanted != nearest => [value; 3],
                _ => self.at(nearest.0 as usize, nearest.1 as usize),
            });
        }
        if picture.grey {
            rgb = luma(&rgb).into_iter().flat_map(|value| [value; 3]).collect();
        }
        let mut size = (width, height);
        for side in picture.detail.into_iter().chain([picture.side]) {
            rgb = resize_bicubic::<3>(&rgb, size, (side, side));
            size = (side, side);
        }
        rgb
    }
}

/// The columns of a picture's patches.
pub(crate) fn columns(rgb: &[u8], side: usize, patch: usize) -> Vec<f32> {
    let (scale, across) = (normalisation(), side / patch);
    let mut columns = Vec::new();
    for position in 0..across * across {
        let (top, left) = (position / across * patch, position % across * patch);
        for c in 0..3 {
            for at in 0..patch * patch {
                let (y, x) = (top + at / patch, left + at % patch);
                columns.push(scale[usize::from(rgb[(y * side + x) * 3 + c])]);
            }
        }
    }
    columns
}

/// A picture's bytes, cut, grey, detail, side and patch.
pub(crate) struct Case {
    pub(crate) stored: Stored,
    cut: Cut,
    grey: bool,
    detail: Option<usize>,
    side: usize,
    pub(crate) patch: usize,
}

impl Case {
    pub(crate) fn picture(&self) -> Picture<'_> {
        let &Case { ref stored, cut, grey, detail, side, .. } = self;
        Picture { pixels: stored.pixels(), cut, grey, detail, side }
    }

    pub(crate) fn name(&self) -> String {
        let Case { stored: Stored { kind, size, pitch, .. }, cut, grey, detail, side, patch } = self;
        format!("{kind:?} {size:?} pitch {pitch}, {cut:?}, grey {grey}, detail {detail:?}, {side} in {patch}")
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let mut random = ChaCha8Rng::seed_from_u64(SEED);
    let sd = Kind::Nv12(Matrix::Bt601, ChromaSite::Middle);
    let hd = Kind::Nv12(Matrix::Bt709, ChromaSite::Left);
    let full = Kind::Nv12(Matrix::Full, ChromaSite::Middle);
    let edge = |x, y, width, height| Cut { x, y, width, height, outside: Outside::Edge };
    let grey_127 = |x, y, width, height| Cut { x, y, width, height, outside: Outside::Colour(127) };
    let mut case = |kind, size, padding, cut, grey, detail, side, patch| {
        let stored = Stored::new(&mut random, kind, size, padding);
        Case { stored, cut, grey, detail, side, patch }
    };
    vec![
        // As it is, packed and not, with patches that leave pixels over.
        case(Kind::Rgb, (28, 28), 0, edge(0, 0, 28, 28), false, None, 28, 14),
        case(Kind::Rgb, (19, 19), 5, edge(0, 0, 19, 19), false, None, 19, 4),
        case(Kind::Rgba, (16, 16), 0, edge(0, 0, 16, 16), true, Some(16), 16, 16),
        // One pixel, of one and of many.
        case(Kind::Rgb, (1, 1), 0, edge(0, 0, 1, 1), false, None, 5, 2),
        case(Kind::Rgba, (37, 23), 3, edge(0, 0, 37, 23), false, None, 1, 1),
        case(sd, (2, 2), 1, edge(0, 0, 2, 2), false, None, 3, 3),
        // Larger and smaller, five times and more, each format.
        case(Kind::Rgb, (13, 17), 1, edge(0, 0, 13, 17), false, None, 24, 8),
        case(Kind::Rgba, (90, 85), 7, edge(0, 0, 90, 85), false, None, 17, 5),
        case(sd, (88, 90), 13, edge(0, 0, 88, 90), false, None, 18, 6),
        case(hd, (64, 46), 0, edge(0, 0, 64, 46), true, None, 20, 7),
        case(full, (30, 46), 2, edge(0, 0, 30, 46), false, None, 31, 10),
        // Columns before rows.
        case(Kind::Rgb, (24, 120), 0, edge(0, 0, 24, 120), false, None, 18, 6),
        case(hd, (24, 130), 4, edge(0, 0, 24, 130), false, None, 22, 11),
        // Cuts within, over each edge, around, beside and far away.
        case(Kind::Rgb, (40, 30), 2, edge(7, 5, 21, 21), true, Some(10), 16, 8),
        case(sd, (40, 30), 6, edge(-9, -3, 25, 25), false, Some(12), 30, 15),
        case(hd, (40, 30), 6, edge(33, 21, 20, 20), false, None, 14, 7),
        case(sd, (40, 30), 0, edge(11, 13, 5, 5), false, None, 16, 8),
        case(Kind::Rgba, (20, 12), 9, grey_127(0, -4, 20, 20), false, None, 24, 12),
        case(Kind::Rgb, (12, 21), 0, grey_127(-4, 0, 21, 21), true, Some(9), 14, 7),
        case(Kind::Rgb, (5, 4), 1, edge(i64::MAX, i64::MIN, 3, 3), false, None, 4, 2),
        case(sd, (6, 4), 1, edge(-40, 2, 9, 9), false, None, 4, 2),
        case(Kind::Rgba, (5, 4), 1, grey_127(i64::MIN, i64::MAX, 3, 3), false, None, 4, 2),
    ]
}

pub(crate) fn pictures<D: Device>(device: &D) {
    let t = test(device);
    for case in cases() {
        let (picture, what) = (case.picture(), format!("{}, {}", device.describe(), case.name()));
        let rgb = case.stored.expected(&picture);
        assert!(picture.rgb().expect("a good picture") == rgb, "{what}: the definition");
        let expected = columns(&rgb, case.side, case.patch);
        let mut out = t.output(3 + expected.len());
        device.picture_patches(&picture, case.patch, &mut out, 3).expect("fits");
        let mut values = vec![0.0; 3 + expected.len()];
        device.read(&out, 0, &mut values).expect("long enough");
        assert!(values[..3].iter().all(|value| value.is_nan()), "{what}: wrote before its output");
        let wrong = values[3..].iter().zip(&expected).position(|(value, expected)| value != expected);
        assert_eq!(wrong, None, "{what}: an element that differs");
        t.check_mark(&what, &out, 3 + expected.len());
        assert!(device.picture_patches(&picture, case.patch, &mut out, 10).is_err(), "{what}: no room");
        assert!(device.picture_patches(&picture, case.patch, &mut out, usize::MAX).is_err());
    }
    refused(device);
}

fn refused<D: Device>(device: &D) {
    let mut out = device.allocate(48).expect("memory");
    let mut error = |picture: Picture<'_>, patch: usize| match device.picture_patches(&picture, patch, &mut out, 0) {
        Err(DeviceError::Picture(error)) => {
            assert!(picture.rgb().err().is_none_or(|own| own == error));
            error
        }
        other => panic!("{other:?}"),
    };
    let bytes = [7; 48];
    let good = Picture::of_rgb(&bytes, 4);
    for patch in [0, 5, usize::MAX] {
        assert!(matches!(error(good, patch), PictureError::Side { most: 4, .. }));
    }
    for side in [0, 4097, usize::MAX] {
        assert!(matches!(error(Picture { side, ..good }, 4), PictureError::Side { .. }));
        assert!(matches!(error(Picture { detail: Some(side), ..good }, 4), PictureError::Side { .. }));
        let size = side.saturating_mul(16);
        for cut in [Cut { width: size, ..good.cut }, Cut { height: size, ..good.cut }] {
            assert!(matches!(error(Picture { cut, ..good }, 4), PictureError::Side { .. }));
        }
        for pixels in [Pixels { width: size, ..good.pixels }, Pixels { height: size, ..good.pixels }] {
            assert!(matches!(error(Picture { pixels, ..good }, 4), PictureError::Side { .. }));
        }
    }
    fn of(format: Format<'_>, width: usize, height: usize) -> Pixels<'_> {
        Pixels { width, height, format }
    }
    let data = &bytes[..];
    let short = |expected, actual| PictureError::Short { what: "RGB", expected, actual };
    let rgb = |data, pitch| Format::Rgb { data, pitch };
    for (format, expected) in [
        (rgb(&data[..47], 12), short(48, 47)),
        (rgb(data, 13), short(51, 48)),
        (rgb(&[], 12), short(48, 0)),
        (rgb(data, 11), PictureError::Pitch { what: "RGB", pitch: 11, row: 12 }),
        (rgb(data, usize::MAX), PictureError::Pitch { what: "RGB", pitch: usize::MAX, row: 12 }),
        (Format::Rgba { data, pitch: 15 }, PictureError::Pitch { what: "RGBA", pitch: 15, row: 16 }),
        (Format::Rgba { data, pitch: 16 }, PictureError::Short { what: "RGBA", expected: 64, actual: 48 }),
    ] {
        assert_eq!(error(Picture { pixels: of(format, 4, 4), ..good }, 4), expected);
    }
    let yuv = Yuv::of_height(4);
    let nv12 = |luma, luma_pitch, chroma, chroma_pitch| Format::Nv12 { luma, luma_pitch, chroma, chroma_pitch, yuv };
    let whole = nv12(data, 4, data, 4);
    for (width, height) in [(3, 4), (4, 3), (1, 1)] {
        let pixels = of(whole, width, height);
        assert_eq!(error(Picture { pixels, ..good }, 4), PictureError::Odd { width, height });
    }
    for (format, expected) in [
        (nv12(&data[..15], 4, data, 4), PictureError::Short { what: "brightness", expected: 16, actual: 15 }),
        (nv12(data, 4, &data[..7], 4), PictureError::Short { what: "colour", expected: 8, actual: 7 }),
        (nv12(data, 3, data, 4), PictureError::Pitch { what: "brightness", pitch: 3, row: 4 }),
        (nv12(data, 4, data, 3), PictureError::Pitch { what: "colour", pitch: 3, row: 4 }),
    ] {
        assert_eq!(error(Picture { pixels: of(format, 4, 4), ..good }, 4), expected);
    }
    device.picture_patches(&Picture { pixels: of(whole, 4, 4), ..good }, 4, &mut out, 0).expect("a good picture");
}
