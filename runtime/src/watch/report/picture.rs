//! The small pictures of the report: a frame reduced to thumbnail width, the face box drawn, as a PNG data address.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// Width of a thumbnail in pixels.
const WIDTH: usize = 144;
/// A thumbnail is never taller than this, however tall the frame.
const MAX_HEIGHT: usize = 256;
/// Colour of the face box, and of the dark line around it that keeps it visible on light ground.
const BOX_COLOURS: [[u8; 3]; 2] = [[0x20, 0x20, 0x20], [0xff, 0xd8, 0x3d]];
/// The lowest bits of a colour are noise that a thumbnail does not show and that compresses badly.
const KEPT_BITS: u8 = 0b1111_1100;

/// A box in pixels of the whole frame: left, top, width, height.
pub(super) type FaceBox = [f32; 4];

/// A packed RGB picture, `[height, width, 3]`.
pub(super) struct Picture {
    rgb: Vec<u8>,
    /// Pixels in a row.
    pub(super) width: usize,
    /// Rows.
    pub(super) height: usize,
}

impl Picture {
    /// Reduces an RGB frame `[height, width, 3]` to thumbnail size by averaging areas. `None` where the frame is empty
    /// or shorter than its size says.
    pub(super) fn thumbnail(rgb: &[u8], width: usize, height: usize) -> Option<Self> {
        let bytes = width.checked_mul(height)?.checked_mul(3)?;
        if bytes == 0 || rgb.len() < bytes {
            return None;
        }
        let scale = (WIDTH as f64 / width as f64).min(MAX_HEIGHT as f64 / height as f64).min(1.0);
        let reduced = |side: usize| ((side as f64 * scale).round() as usize).clamp(1, side);
        let (to_width, to_height) = (reduced(width), reduced(height));
        let mut reduced_rgb = Vec::with_capacity(to_width * to_height * 3);
        for y in 0..to_height {
            let rows = y * height / to_height..(y + 1) * height / to_height;
            for x in 0..to_width {
                let columns = x * width / to_width..(x + 1) * width / to_width;
                let count = rows.len() * columns.len();
                let mut sum = [0_usize; 3];
                for row in rows.clone() {
                    let start = (row * width + columns.start) * 3;
                    for pixel in rgb[start..start + columns.len() * 3].chunks_exact(3) {
                        for (sum, value) in sum.iter_mut().zip(pixel) {
                            *sum += usize::from(*value);
                        }
                    }
                }
                reduced_rgb.extend(sum.map(|sum| (sum / count) as u8 & KEPT_BITS));
            }
        }
        Some(Self { rgb: reduced_rgb, width: to_width, height: to_height })
    }

    /// Draws a box given in pixels of a frame `frame_width` wide; parts outside the picture are left out.
    pub(super) fn draw_box(&mut self, face: FaceBox, frame_width: usize) {
        if !face.iter().all(|value| value.is_finite()) {
            return;
        }
        let scale = self.width as f32 / frame_width as f32;
        let [left, top, width, height] = face.map(|value| (value * scale).round() as i64);
        for (inset, colour) in [(-1, BOX_COLOURS[0]), (1, BOX_COLOURS[0]), (0, BOX_COLOURS[1])] {
            let (x0, y0) = (left.saturating_add(inset), top.saturating_add(inset));
            let (x1, y1) =
                (left.saturating_add(width).saturating_sub(inset), top.saturating_add(height).saturating_sub(inset));
            for x in x0.max(0)..=x1.min(self.width as i64 - 1) {
                self.set(x, y0, colour);
                self.set(x, y1, colour);
            }
            for y in y0.max(0)..=y1.min(self.height as i64 - 1) {
                self.set(x0, y, colour);
                self.set(x1, y, colour);
            }
        }
    }

    fn set(&mut self, x: i64, y: i64, colour: [u8; 3]) {
        if let (Ok(x), Ok(y)) = (usize::try_from(x), usize::try_from(y))
            && x < self.width
            && y < self.height
        {
            let start = (y * self.width + x) * 3;
            self.rgb[start..start + 3].copy_from_slice(&colour);
        }
    }

    /// The picture as a `data:` address of a PNG file.
    pub(super) fn data_address(&self) -> Result<String, png::EncodingError> {
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, self.width as u32, self.height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_compression(png::Compression::High);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.rgb)?;
        writer.finish()?;
        Ok(format!("data:image/png;base64,{}", STANDARD.encode(&file)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reduces_by_the_mean_of_each_area() {
        let frame: Vec<u8> =
            (0..WIDTH * 2 * 4).flat_map(|index| [if index % 2 == 0 { 0 } else { 200 }, 40, 255]).collect();
        let picture = Picture::thumbnail(&frame, WIDTH * 2, 4).expect("a frame");
        assert_eq!((picture.width, picture.height), (WIDTH, 2));
        assert!(picture.rgb.chunks_exact(3).all(|pixel| pixel == [100, 40, 252]));
    }

    #[test]
    fn keeps_small_frames_and_bounds_tall_ones() {
        let small = Picture::thumbnail(&[9; 5 * 3 * 3], 5, 3).expect("a frame");
        assert_eq!((small.width, small.height), (5, 3));
        let tall = Picture::thumbnail(&vec![9; 2 * 4000 * 3], 2, 4000).expect("a frame");
        assert_eq!((tall.width, tall.height), (1, MAX_HEIGHT));
    }

    #[test]
    fn refuses_frames_that_are_not_what_they_say() {
        assert!(Picture::thumbnail(&[], 0, 0).is_none());
        assert!(Picture::thumbnail(&[1, 2, 3], 2, 1).is_none());
        assert!(Picture::thumbnail(&[1, 2, 3], usize::MAX, 2).is_none());
    }

    #[test]
    fn draws_boxes_inside_and_survives_any_box() {
        let mut picture = Picture::thumbnail(&[128; 20 * 20 * 3], 20, 20).expect("a frame");
        picture.draw_box([5.0, 6.0, 10.0, 8.0], 20);
        let pixel = |x: usize, y: usize| &picture.rgb[(y * 20 + x) * 3..][..3];
        assert_eq!(pixel(5, 6), BOX_COLOURS[1]);
        assert_eq!(pixel(15, 14), BOX_COLOURS[1]);
        assert_eq!(pixel(10, 10), [128; 3]);
        for wild in
            [[-9.0, -9.0, 1e30, 1e30], [f32::NAN; 4], [f32::MAX, f32::MIN, f32::MAX, 1.0], [30.0, 2.0, 4.0, -8.0]]
        {
            picture.draw_box(wild, 20);
        }
    }

    #[test]
    fn writes_a_png_that_can_be_read_back() {
        let picture = Picture::thumbnail(&[64; 12 * 7 * 3], 12, 7).expect("a frame");
        let address = picture.data_address().expect("encodes");
        let file =
            STANDARD.decode(address.strip_prefix("data:image/png;base64,").expect("an address")).expect("base64");
        let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().expect("a PNG file");
        let mut rgb = vec![0; 12 * 7 * 3];
        reader.next_frame(&mut rgb).expect("a picture");
        assert_eq!(rgb, vec![64; 12 * 7 * 3]);
    }
}
