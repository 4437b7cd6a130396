//! NV12 to RGB, to the byte as GStreamer's `videoconvert` 1.22 does it: bilinear colours, then products of 16 bits.

/// What the numbers of an NV12 picture stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Yuv {
    /// The colours.
    pub matrix: Matrix,
    /// Where colour samples are.
    pub site: ChromaSite,
}

/// From brightness and colour differences to RGB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Matrix {
    /// ITU-R BT.601 in limited range (brightness from 16 to 235).
    Bt601,
    /// ITU-R BT.709 in limited range.
    Bt709,
    /// BT.601 in full range, as JPEG has it, and cameras that send JPEG.
    Full,
}

/// Where a colour sample is among its four pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChromaSite {
    /// In their middle.
    Middle,
    /// Between the two on the left (MPEG-2 and what came after).
    Left,
}

impl Yuv {
    /// What a picture of this height is where nobody says, as GStreamer has it: BT.601 and samples in the middle up to 576
    /// rows, BT.709 and samples on the left above.
    pub fn of_height(height: usize) -> Self {
        if height <= 576 {
            Yuv { matrix: Matrix::Bt601, site: ChromaSite::Middle }
        } else {
            Yuv { matrix: Matrix::Bt709, site: ChromaSite::Left }
        }
    }
}

/// Factors in 256ths: of brightness for all, of Cr for red, of Cb for blue, of Cb and Cr for green.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gains {
    pub(crate) luma: i32,
    pub(crate) red: i32,
    pub(crate) blue: i32,
    pub(crate) green: [i32; 2],
}

impl Matrix {
    pub(crate) fn gains(self) -> Gains {
        match self {
            Matrix::Bt601 => Gains { luma: 298, red: 409, blue: 516, green: [-100, -208] },
            Matrix::Bt709 => Gains { luma: 298, red: 459, blue: 541, green: [-55, -136] },
            Matrix::Full => Gains { luma: 256, red: 359, blue: 454, green: [-88, -183] },
        }
    }
}

impl Gains {
    /// One pixel.
    #[inline]
    fn rgb(&self, luma: u8, blue: u8, red: u8) -> [u8; 3] {
        // A byte less 128, twice in the two bytes of a number, so that 127 comes out as nearly one half of 2¹⁶.
        let wide = |byte: u8| (i32::from(byte) - 128) * 256 + i32::from(byte ^ 128);
        let part = |value: i32, gain: i32| (value * gain) >> 16;
        let byte = |value: i32| (value.clamp(-128, 127) + 128) as u8;
        let (blue, red) = (wide(blue), wide(red));
        let luma = part(wide(luma), self.luma);
        [
            byte(luma + part(red, self.red)),
            byte(luma + part(blue, self.green[0]) + part(red, self.green[1])),
            byte(luma + part(blue, self.blue)),
        ]
    }
}

/// `(3a + b) / 4`, rounded: what is a quarter of the way from a to b.
#[inline]
fn near(a: u8, b: u8) -> u8 {
    ((3 * u32::from(a) + u32::from(b) + 2) >> 2) as u8
}

/// A row of NV12 as RGB: `luma` and its colours, the row of colours that it lies in and the next nearest one. Pixels
/// `first ..` are written, as many as there is room for.
pub(super) fn row(luma: &[u8], colours: [&[u8]; 2], yuv: Yuv, first: usize, out: &mut [u8]) {
    let (gains, last) = (yuv.matrix.gains(), luma.len() / 2 - 1);
    for (x, out) in (first..).zip(out.as_chunks_mut::<3>().0) {
        let at = x / 2;
        let beside = if x % 2 == 1 { (at + 1).min(last) } else { at.saturating_sub(1) };
        // First along the row, then between rows, each rounded.
        let along = |row: &[u8], part: usize| {
            let (here, there) = (row[2 * at + part], row[2 * beside + part]);
            match yuv.site {
                ChromaSite::Middle => near(here, there),
                ChromaSite::Left if x % 2 == 0 => here,
                ChromaSite::Left => ((u32::from(here) + u32::from(there) + 1) >> 1) as u8,
            }
        };
        let [blue, red] = [0, 1].map(|part| near(along(colours[0], part), along(colours[1], part)));
        *out = gains.rgb(luma[x], blue, red);
    }
}
