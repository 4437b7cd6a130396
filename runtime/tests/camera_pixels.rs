//! Pixels as GStreamer's elements give them: NV12 becomes the RGB that its own `videoconvert` makes, and the pictures of both
//! are equal, on every device that can be had here.
#![cfg(feature = "media")]
#![allow(clippy::unwrap_used)]

use candor::media::{Fit, Preprocess, Square};
use candor_kernels::pixels::{ChromaSite, Cut, Format, Matrix, Pixels, Yuv};
use gstreamer as gst;
use gstreamer::prelude::*;
use gstreamer_app::AppSink;
use gstreamer_video::prelude::*;
use gstreamer_video::{VideoFrameRef, VideoInfo};

/// A picture as it came: planes and their pitches.
struct Picture {
    size: (usize, usize),
    planes: Vec<(Vec<u8>, usize)>,
}

impl Picture {
    fn of(sink: &AppSink) -> Self {
        let sample = sink.try_pull_sample(gst::ClockTime::from_seconds(60)).unwrap();
        let info = VideoInfo::from_caps(sample.caps().unwrap()).unwrap();
        let frame = VideoFrameRef::from_buffer_ref_readable(sample.buffer().unwrap(), &info).unwrap();
        let plane = |i: u32| (frame.plane_data(i).unwrap().to_vec(), frame.plane_stride()[i as usize] as usize);
        let size = (info.width() as usize, info.height() as usize);
        Picture { size, planes: (0..frame.n_planes()).map(plane).collect() }
    }

    fn pixels<'a>(&'a self, format: impl Fn(&'a [(Vec<u8>, usize)]) -> Format<'a>) -> Pixels<'a> {
        Pixels { width: self.size.0, height: self.size.1, format: format(&self.planes) }
    }

    fn nv12(&self, yuv: Yuv) -> Pixels<'_> {
        self.pixels(|planes| {
            let [(luma, luma_pitch), (chroma, chroma_pitch)] = planes else { panic!("two planes") };
            Format::Nv12 { luma, luma_pitch: *luma_pitch, chroma, chroma_pitch: *chroma_pitch, yuv }
        })
    }

    fn rgb(&self) -> Pixels<'_> {
        self.pixels(|planes| Format::Rgb { data: &planes[0].0, pitch: planes[0].1 })
    }

    fn rgba(&self) -> Pixels<'_> {
        self.pixels(|planes| Format::Rgba { data: &planes[0].0, pitch: planes[0].1 })
    }
}

/// A picture of a test pattern in NV12, and what `videoconvert` makes of it in RGB and RGBA.
fn formats(pattern: &str, (width, height): (u32, u32), colorimetry: Option<&str>) -> [Picture; 3] {
    gst::init().unwrap();
    let colorimetry = colorimetry.map_or(String::new(), |name| format!(",colorimetry={name}"));
    let sink = "appsink sync=false name";
    let pipeline = gst::parse::launch(&format!(
        "videotestsrc num-buffers=1 pattern={pattern} \
         ! video/x-raw,format=NV12,width={width},height={height}{colorimetry} ! tee name=camera \
         camera. ! queue ! {sink}=nv12 \
         camera. ! queue ! videoconvert ! video/x-raw,format=RGB ! {sink}=rgb \
         camera. ! queue ! videoconvert ! video/x-raw,format=RGBA ! {sink}=rgba",
    ));
    let pipeline = pipeline.unwrap().downcast::<gst::Pipeline>().unwrap();
    pipeline.set_state(gst::State::Playing).unwrap();
    let picture = |name| Picture::of(&pipeline.by_name(name).unwrap().downcast::<AppSink>().unwrap());
    let pictures = ["nv12", "rgb", "rgba"].map(picture);
    pipeline.set_state(gst::State::Null).unwrap();
    pictures
}

/// Sizes whose rows are padded and not, patterns of all colours at once, and every matrix. The greatest difference is none.
#[test]
fn nv12_is_the_rgb_of_videoconvert() {
    let (middle, left) = (ChromaSite::Middle, ChromaSite::Left);
    for (size, colorimetry, yuv) in [
        ((322, 242), None, Yuv { matrix: Matrix::Bt601, site: middle }),
        ((62, 576), None, Yuv { matrix: Matrix::Bt601, site: middle }),
        ((2, 2), None, Yuv { matrix: Matrix::Bt601, site: middle }),
        ((62, 578), None, Yuv { matrix: Matrix::Bt709, site: left }),
        ((1278, 718), None, Yuv { matrix: Matrix::Bt709, site: left }),
        ((322, 242), Some("bt709"), Yuv { matrix: Matrix::Bt709, site: middle }),
        ((322, 242), Some("1:4:0:0"), Yuv { matrix: Matrix::Full, site: middle }),
    ] {
        if colorimetry.is_none() {
            assert_eq!(Yuv::of_height(size.1 as usize), yuv);
        }
        for pattern in ["snow", "smpte", "gamut", "zone-plate kx2=20 ky2=20 kt=1"] {
            let [nv12, rgb, rgba] = formats(pattern, size, colorimetry);
            let whole = Cut::whole(size.0 as usize, size.1 as usize);
            let ours = nv12.nv12(yuv).cut(&whole).unwrap();
            for (name, theirs) in [("RGB", rgb.rgb()), ("RGBA", rgba.rgba())] {
                let theirs = theirs.cut(&whole).unwrap();
                let greatest = ours.iter().zip(&theirs).map(|(a, b)| a.abs_diff(*b)).max();
                println!("{pattern}, {size:?}, {colorimetry:?}: to {name} differs by {greatest:?} at most");
                assert_eq!(greatest, Some(0), "{pattern}, {size:?}, {colorimetry:?}, {name}");
            }
        }
    }
}

/// What the watch path makes of frames in RGB, and what comes of the camera's own pixels.
#[test]
fn pictures_of_camera_pixels_are_those_of_frames() {
    let [nv12, rgb, rgba] = formats("smpte", (322, 242), None);
    let face = Square { x: 200, y: -11, side: 131 };
    for (fit, square) in [(Fit::Stretch, None), (Fit::Pad, None), (Fit::Face, Some(face))] {
        for (grey, detail) in [(false, None), (true, Some(48))] {
            let preprocess = Preprocess { side: 96, fit, detail, grey };
            let [a, b, c] = [nv12.nv12(Yuv::of_height(242)), rgb.rgb(), rgba.rgba()]
                .map(|pixels| preprocess.of_pixels(pixels, square).unwrap().rgb().unwrap());
            assert!(a == b && b == c, "{preprocess:?}");
            assert!(a.iter().any(|&byte| byte != a[0]));
        }
    }
}
