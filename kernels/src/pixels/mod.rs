//! Pictures as cameras and decoders give them, and what becomes of them before the vision tower: a cut, scaled as Pillow does,
//! in bytes.
//!
//! Everything here is integer arithmetic, and every device gives the same bytes. The steps of [`Picture::rgb`], which is the
//! definition: the format's pixels to RGB ([`Yuv`] for NV12), the cut, grey if asked for, and antialiased bicubic scaling with
//! 8-bit values between its two passes ([`resample`]).

mod cut;
pub mod resample;
mod yuv;

pub(crate) use yuv::Gains;
pub use yuv::{ChromaSite, Matrix, Yuv};

use resample::resize_bicubic;

/// Pixels where they lie. A pitch is the bytes from one row to the next, at least those of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format<'a> {
    /// Red, green, blue, a byte each.
    Rgb {
        /// The rows. The last one may end with its last pixel.
        data: &'a [u8],
        /// Bytes from row to row.
        pitch: usize,
    },
    /// Red, green, blue, and a fourth byte that is not read.
    Rgba {
        /// The rows.
        data: &'a [u8],
        /// Bytes from row to row.
        pitch: usize,
    },
    /// A brightness for each pixel, and two colour differences (Cb, Cr) for each square of four. Sides are even.
    Nv12 {
        /// The rows of brightness.
        luma: &'a [u8],
        /// Bytes from row to row of them.
        luma_pitch: usize,
        /// The rows of colour, half as many.
        chroma: &'a [u8],
        /// Bytes from row to row of them.
        chroma_pitch: usize,
        /// What the numbers stand for.
        yuv: Yuv,
    },
}

/// A picture of a camera or decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pixels<'a> {
    /// Pixels in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// The pixels.
    pub format: Format<'a>,
}

/// The part of a picture that is looked at, in its pixels. It may reach over the picture's edges, or lie beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Left edge.
    pub x: i64,
    /// Upper edge.
    pub y: i64,
    /// Pixels in a row, at least 1.
    pub width: usize,
    /// Rows, at least 1.
    pub height: usize,
    /// What there is beyond the picture.
    pub outside: Outside,
}

/// What there is beyond a picture's edges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outside {
    /// The pixels of the edge.
    Edge,
    /// This byte in every colour.
    Colour(u8),
}

/// A square picture for a vision tower, and how it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Picture<'a> {
    /// What it is made of.
    pub pixels: Pixels<'a>,
    /// The part of it.
    pub cut: Cut,
    /// Colour is dropped first.
    pub grey: bool,
    /// The cut is first scaled to this side.
    pub detail: Option<usize>,
    /// Width and height.
    pub side: usize,
}

/// Why there can be no such picture.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PictureError {
    /// A side of zero, or one that no picture has.
    #[error("{what} of {value}: from 1 to {most} can be had")]
    Side {
        /// Which.
        what: &'static str,
        /// As given.
        value: usize,
        /// The most.
        most: usize,
    },
    /// NV12 whose colours are not those of whole squares.
    #[error("a picture of {width}x{height} pixels in NV12, whose sides are even")]
    Odd {
        /// Pixels in a row.
        width: usize,
        /// Rows.
        height: usize,
    },
    /// Rows that would lie in each other.
    #[error("a pitch of {pitch} bytes of {what}, whose rows have {row}")]
    Pitch {
        /// Of what.
        what: &'static str,
        /// As given.
        pitch: usize,
        /// Bytes of a row.
        row: usize,
    },
    /// Fewer bytes than rows and pitch say.
    #[error("{actual} bytes of {what}, {expected} are needed")]
    Short {
        /// Of what.
        what: &'static str,
        /// Bytes needed.
        expected: usize,
        /// Bytes there are.
        actual: usize,
    },
}

/// Rows of bytes: where they lie, and what of each is read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plane<'a> {
    pub(crate) name: &'static str,
    pub(crate) data: &'a [u8],
    pub(crate) pitch: usize,
    pub(crate) row: usize,
    pub(crate) rows: usize,
}

impl<'a> Plane<'a> {
    fn check(&self) -> Result<(), PictureError> {
        let &Plane { name: what, data, pitch, row, rows } = self;
        if pitch < row || pitch > Pixels::MAX_PITCH {
            return Err(PictureError::Pitch { what, pitch, row });
        }
        let expected = pitch.saturating_mul(rows - 1).saturating_add(row);
        if data.len() < expected {
            return Err(PictureError::Short { what, expected, actual: data.len() });
        }
        Ok(())
    }

    /// Row `y` of a plane that was checked.
    pub(crate) fn at(&self, y: usize) -> &'a [u8] {
        &self.data[y * self.pitch..][..self.row]
    }
}

impl<'a> Pixels<'a> {
    /// Largest width and height; keeps sizes and sums within what kernels count.
    pub const MAX_SIDE: usize = 16_384;
    /// Largest pitch.
    pub const MAX_PITCH: usize = 1 << 20;

    /// Packed RGB.
    pub fn rgb(data: &'a [u8], width: usize, height: usize) -> Self {
        Pixels { width, height, format: Format::Rgb { data, pitch: width.saturating_mul(3) } }
    }

    /// The planes of the format; the second is NV12's of colour.
    pub(crate) fn planes(&self) -> (Plane<'a>, Option<Plane<'a>>) {
        let &Pixels { width, height: rows, format } = self;
        match format {
            Format::Rgb { data, pitch } => (Plane { name: "RGB", data, pitch, row: 3 * width, rows }, None),
            Format::Rgba { data, pitch } => (Plane { name: "RGBA", data, pitch, row: 4 * width, rows }, None),
            Format::Nv12 { luma, luma_pitch, chroma, chroma_pitch, .. } => {
                let brightness = Plane { name: "brightness", data: luma, pitch: luma_pitch, row: width, rows };
                let colour = Plane { name: "colour", data: chroma, pitch: chroma_pitch, row: width, rows: rows / 2 };
                (brightness, Some(colour))
            }
        }
    }

    /// A part of the picture, packed RGB `[cut height, cut width, 3]`.
    ///
    /// # Errors
    /// What is wrong with the pixels, or with the cut's sides.
    pub fn cut(&self, cut: &Cut) -> Result<Vec<u8>, PictureError> {
        self.check()?;
        cut.check()?;
        Ok(cut::rgb(self, cut).into_owned())
    }

    fn check(&self) -> Result<(), PictureError> {
        let &Pixels { width, height, format } = self;
        check_side("a width", width, Self::MAX_SIDE)?;
        check_side("a height", height, Self::MAX_SIDE)?;
        if matches!(format, Format::Nv12 { .. }) && (width % 2 != 0 || height % 2 != 0) {
            return Err(PictureError::Odd { width, height });
        }
        let (first, second) = self.planes();
        first.check()?;
        second.map_or(Ok(()), |plane| plane.check())
    }
}

fn check_side(what: &'static str, value: usize, most: usize) -> Result<(), PictureError> {
    if (1..=most).contains(&value) { Ok(()) } else { Err(PictureError::Side { what, value, most }) }
}

impl Cut {
    /// Largest width and height.
    pub const MAX_SIDE: usize = 4 * Pixels::MAX_SIDE;

    /// All of a picture.
    pub fn whole(width: usize, height: usize) -> Self {
        Cut { x: 0, y: 0, width, height, outside: Outside::Edge }
    }

    fn check(&self) -> Result<(), PictureError> {
        check_side("a cut's width", self.width, Self::MAX_SIDE)?;
        check_side("a cut's height", self.height, Self::MAX_SIDE)?;
        // Bytes that can be counted, where addresses have 32 bits.
        check_side("a cut's height", self.height, isize::MAX as usize / 3 / self.width)
    }
}

impl<'a> Picture<'a> {
    /// Largest side.
    pub const MAX_SIDE: usize = 4096;

    /// Packed RGB that has the size already.
    pub fn of_rgb(data: &'a [u8], side: usize) -> Self {
        let (pixels, cut) = (Pixels::rgb(data, side, side), Cut::whole(side, side));
        Picture { pixels, cut, grey: false, detail: None, side }
    }

    /// Whether the pixels are there and the sizes in range.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn check(&self) -> Result<(), PictureError> {
        self.pixels.check()?;
        self.cut.check()?;
        check_side("a side", self.detail.unwrap_or(1), Self::MAX_SIDE)?;
        check_side("a side", self.side, Self::MAX_SIDE)
    }

    /// The picture in packed RGB, `[side, side, 3]`.
    ///
    /// # Errors
    /// Those of [`Picture::check`].
    pub fn rgb(&self) -> Result<Vec<u8>, PictureError> {
        self.check()?;
        let cut = cut::rgb(&self.pixels, &self.cut);
        let size = (self.cut.width, self.cut.height);
        Ok(if self.grey {
            // Of three equal channels one is enough.
            self.scaled::<1>(&luma(&cut), size).into_iter().flat_map(|value| [value; 3]).collect()
        } else {
            self.scaled::<3>(&cut, size)
        })
    }

    fn scaled<const CHANNELS: usize>(&self, pixels: &[u8], size: (usize, usize)) -> Vec<u8> {
        let side = |side| (side, side);
        match self.detail {
            None => resize_bicubic::<CHANNELS>(pixels, size, side(self.side)),
            Some(detail) => {
                let small = resize_bicubic::<CHANNELS>(pixels, size, side(detail));
                resize_bicubic::<CHANNELS>(&small, side(detail), side(self.side))
            }
        }
    }

    /// The side between two scalings, where there are two that change anything.
    pub(crate) fn between(&self) -> Option<usize> {
        self.detail.filter(|&detail| detail != self.side && (detail, detail) != (self.cut.width, self.cut.height))
    }

    /// The picture where it lies, if it is packed RGB that nothing is done to.
    pub(crate) fn as_is(&self) -> Option<&'a [u8]> {
        let &Picture { pixels: Pixels { width, height, format }, cut, grey, detail, side } = self;
        let whole = cut == Cut { outside: cut.outside, ..Cut::whole(width, height) };
        let same = width == side && height == side && detail.is_none_or(|detail| detail == side);
        match format {
            Format::Rgb { data, pitch } if pitch == 3 * width && whole && same && !grey => data.get(..3 * side * side),
            _ => None,
        }
    }
}

/// The brightness of RGB pixels, one byte each, exactly as Pillow's conversion to mode "L" (ITU-R BT.601 luma).
pub fn luma(rgb: &[u8]) -> Vec<u8> {
    let pixel = |p: &[u8]| {
        ((19_595 * u32::from(p[0]) + 38_470 * u32::from(p[1]) + 7_471 * u32::from(p[2]) + 0x8000) >> 16) as u8
    };
    rgb.chunks_exact(3).map(pixel).collect()
}

/// What each byte of a picture is to the vision tower, from -1 to 1: x / 255, then (x - 0.5) / 0.5, rounded as the published
/// image processor rounds.
pub fn normalisation() -> [f32; 256] {
    std::array::from_fn(|byte| ((byte as f64 * (1.0 / 255.0)) as f32 - 0.5) / 0.5)
}

/// Patches of a side, of which the last may leave some pixels over; an error for a patch that the picture has not.
pub(crate) fn patches(side: usize, patch: usize) -> Result<usize, PictureError> {
    check_side("a patch", patch, side)?;
    Ok(side / patch)
}

/// The columns of patches `first ..` of a picture `[side, side, 3]`, `[patches, 3 · patch · patch]` in the order of PyTorch's
/// convolution weights (colour first), normalised.
pub(crate) fn unfold(rgb: &[u8], side: usize, patch: usize, first: usize, columns: &mut [f32]) {
    let (scale, across) = (normalisation(), side / patch);
    for (position, column) in (first..).zip(columns.chunks_exact_mut(3 * patch * patch)) {
        let (top, left) = (position / across * patch, position % across * patch);
        let (red, rest) = column.split_at_mut(patch * patch);
        let (green, blue) = rest.split_at_mut(patch * patch);
        for row in 0..patch {
            let line = &rgb[((top + row) * side + left) * 3..][..3 * patch];
            let place = row * patch..(row + 1) * patch;
            let targets = red[place.clone()].iter_mut().zip(&mut green[place.clone()]).zip(&mut blue[place]);
            for (((red, green), blue), pixel) in targets.zip(line.as_chunks::<3>().0) {
                [*red, *green, *blue] = pixel.map(|byte| scale[usize::from(byte)]);
            }
        }
    }
}
