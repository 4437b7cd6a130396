//! Sources from end to end: clips built with GStreamer in a temporary folder are read back, and everything that can be wrong
//! with a source is tried.
#![cfg(feature = "media")]
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use candor::media::{
    FaceDetector, Frame, FrameSource, MediaError, Source, SourceOptions, WindowSettings, Windows, sample_clip,
};
use gstreamer as gst;
use gstreamer::prelude::*;
use tempfile::TempDir;

/// Runs a pipeline to its end.
fn run(pipeline: &str) {
    gst::init().unwrap();
    let pipeline = gst::parse::launch(pipeline).unwrap();
    pipeline.set_state(gst::State::Playing).unwrap();
    let ends = [gst::MessageType::Eos, gst::MessageType::Error];
    let message = pipeline.bus().unwrap().timed_pop_filtered(gst::ClockTime::from_seconds(120), &ends);
    pipeline.set_state(gst::State::Null).unwrap();
    let message = message.unwrap();
    assert_eq!(message.type_(), gst::MessageType::Eos, "{message:?}");
}

/// A clip in a temporary folder: `video` is everything before the file.
fn clip(name: &str, video: &str) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    run(&format!("{video} ! filesink location={}", path.display()));
    (folder, path)
}

fn patient() -> SourceOptions {
    SourceOptions { file_timeout: Duration::from_secs(100), live_timeout: Duration::from_secs(100) }
}

fn hasty() -> SourceOptions {
    SourceOptions { file_timeout: Duration::from_millis(700), live_timeout: Duration::from_millis(700) }
}

fn open(path: &Path) -> Source {
    Source::open(path.to_str().unwrap(), patient()).unwrap()
}

fn read_all(path: &Path) -> Vec<Frame> {
    open(path).map(Result::unwrap).collect()
}

/// How many frames a source gives before its error, and the error, whether it fails at once or later.
fn failure(spec: &str, options: SourceOptions) -> (usize, MediaError) {
    let mut source = match Source::open(spec, options) {
        Ok(source) => source,
        Err(error) => return (0, error),
    };
    let mut frames = 0;
    loop {
        match source.next() {
            Some(Ok(_)) => frames += 1,
            Some(Err(error)) => {
                assert!(source.next().is_none(), "nothing comes after an error");
                return (frames, error);
            }
            None => panic!("{spec} ended without an error"),
        }
    }
}

fn file_failure(path: &Path) -> (usize, MediaError) {
    failure(path.to_str().unwrap(), patient())
}

#[test]
fn files_are_lossless_and_keep_their_times() {
    let source = "videotestsrc num-buffers=45 pattern=ball ! video/x-raw,framerate=25/1,width=94";
    for (name, rest) in [("a.ogv", "height=61 ! theoraenc ! oggmux"), ("b.mp4", "height=62 ! x264enc ! mp4mux")] {
        let (_folder, path) = clip(name, &format!("{source},{rest}"));
        let mut source = open(&path);
        assert!(!source.is_live());
        let first = source.next().unwrap().unwrap();
        std::thread::sleep(Duration::from_millis(200)); // a slow reader loses nothing
        let frames: Vec<Frame> = std::iter::once(first).chain(source.map(Result::unwrap)).collect();
        assert_eq!(frames.len(), 45, "{name}");
        for (i, frame) in frames.iter().enumerate() {
            assert!((frame.pts_s - i as f64 / 25.0).abs() < 1e-3, "{name}: frame {i} at {}", frame.pts_s);
            assert_eq!((frame.width, frame.check()), (94, Ok(())));
        }
        assert!(frames.windows(2).all(|pair| pair[0].monotonic_s <= pair[1].monotonic_s));
        assert!(frames[44].monotonic_s - frames[0].monotonic_s >= 0.2);
    }
}

#[test]
fn pixels_of_any_width_are_exact() {
    // RGB rows are padded to four bytes inside GStreamer; a picture file shows whether the padding is taken off.
    let folder = tempfile::tempdir().unwrap();
    for (width, height) in [(16u32, 2u32), (17, 3), (18, 5), (19, 1), (33, 31)] {
        let rgb: Vec<u8> = (0..width * height * 3).map(|i| (i * 37 % 251) as u8).collect();
        let path = folder.path().join(format!("{width}.png"));
        let mut encoder = png::Encoder::new(std::fs::File::create(&path).unwrap(), width, height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.write_header().unwrap().write_image_data(&rgb).unwrap();
        let frames = read_all(&path);
        assert_eq!(frames.len(), 1);
        assert_eq!((frames[0].width, frames[0].height), (width as usize, height as usize));
        assert_eq!(frames[0].rgb, rgb, "{width}x{height}");
        assert_eq!(frames[0].pts_s, 0.0);
    }
}

#[test]
fn colours_come_back() {
    for (pattern, expected) in [("red", [255, 0, 0]), ("green", [0, 255, 0]), ("blue", [0, 0, 255])] {
        let source = format!("videotestsrc num-buffers=2 pattern={pattern} ! video/x-raw,width=64,height=48");
        let (_folder, path) = clip("a.mp4", &format!("{source} ! x264enc quantizer=1 pass=quant ! mp4mux"));
        for frame in read_all(&path) {
            let pixel = &frame.rgb[(24 * 64 + 32) * 3..][..3];
            let near = pixel.iter().zip(expected).all(|(got, want): (&u8, u8)| got.abs_diff(want) <= 8);
            assert!(near, "{pattern}: {pixel:?}");
        }
    }
}

#[test]
fn a_turned_picture_is_set_upright() {
    let source = "videotestsrc num-buffers=3 ! video/x-raw,width=64,height=32 ! x264enc ! mp4mux";
    let (_folder, path) = clip("a.mp4", source);
    assert!(read_all(&path).iter().all(|frame| (frame.width, frame.height) == (64, 32)));
    // The matrix of the track header says how the picture is turned; this is a quarter turn.
    let mut bytes = std::fs::read(&path).unwrap();
    let matrix = bytes.windows(4).position(|four| four == b"tkhd").unwrap() + 4 + 40;
    let turned = [0u32, 0x1_0000, 0, 0xFFFF_0000, 0, 0, 32 << 16, 0, 0x4000_0000];
    for (place, value) in bytes[matrix..].chunks_exact_mut(4).zip(turned) {
        place.copy_from_slice(&value.to_be_bytes());
    }
    std::fs::write(&path, bytes).unwrap();
    let frames = read_all(&path);
    assert!(frames.iter().all(|frame| (frame.width, frame.height) == (32, 64)));
    assert_eq!(frames.len(), 3);
}

#[test]
fn the_size_may_change_in_mid_stream() {
    let part = |width, height| format!("videotestsrc num-buffers=5 ! video/x-raw,width={width},height={height} ! c.");
    let pipeline = format!("gst:{} {} concat name=c", part(64, 48), part(33, 21));
    let frames: Vec<Frame> = Source::open(&pipeline, patient()).unwrap().map(Result::unwrap).collect();
    let sizes: Vec<_> = frames.iter().map(|frame| (frame.width, frame.height)).collect();
    assert_eq!(sizes, [[(64, 48); 5], [(33, 21); 5]].concat());
    assert!(frames.iter().all(|frame| frame.check().is_ok()));
}

#[test]
fn the_sound_of_a_file_is_left_alone() {
    let sound = "audiotestsrc num-buffers=60 ! audioconvert ! vorbisenc ! queue ! m.";
    let video = "videotestsrc num-buffers=20 ! video/x-raw,width=32,height=32 ! theoraenc ! queue ! m. oggmux name=m";
    let (_folder, path) = clip("a.ogv", &format!("{sound} {video}"));
    assert_eq!(read_all(&path).len(), 20);
}

#[test]
fn files_that_are_no_video_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    assert!(matches!(file_failure(&folder.path().join("absent.mp4")).1, MediaError::UnreadableFile { .. }));
    assert!(matches!(file_failure(folder.path()).1, MediaError::NotAFile { .. }));
    let text = b"Not a film. ".repeat(500);
    for (name, bytes) in [("empty.mp4", &b""[..]), ("text.mp4", &text), ("bytes.mp4", &[0x81; 9000])] {
        let (_, error) = file_failure(&write(name, bytes));
        assert!(matches!(error, MediaError::NotMedia { .. }), "{name}: {error}");
    }
    for (name, sound) in [
        ("sound.ogg", "audiotestsrc num-buffers=5 ! audioconvert ! vorbisenc ! oggmux"),
        ("sound.wav", "audiotestsrc num-buffers=5 ! wavenc"),
    ] {
        let (_folder, path) = clip(name, sound);
        let (_, error) = file_failure(&path);
        assert!(matches!(error, MediaError::NoVideoTrack { .. }), "{name}: {error}");
    }
}

#[test]
fn a_missing_decoder_is_named() {
    // The codec's name in the file is changed into one that nobody has.
    let video = "videotestsrc num-buffers=5 ! video/x-raw,width=32,height=32 ! x264enc ! mp4mux";
    let (_folder, path) = clip("a.mp4", video);
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.windows(4).rposition(|four| four == b"avc1").unwrap();
    bytes[at..at + 4].copy_from_slice(b"zq9x");
    std::fs::write(&path, bytes).unwrap();
    let (frames, error) = file_failure(&path);
    let MediaError::MissingDecoder { codec, hint, .. } = &error else { panic!("{error}") };
    assert_eq!(frames, 0);
    assert!(codec.contains("zq9x") && hint.contains("gstreamer1.0-"), "{error}");
}

#[test]
fn a_damaged_file_ends_or_fails_but_never_hangs() {
    let video = "videotestsrc num-buffers=40 ! video/x-raw,width=64,height=64";
    let (_folder, path) = clip("a.mp4", &format!("{video} ! x264enc ! mp4mux faststart=true"));
    let whole = std::fs::read(&path).unwrap();
    for (cut, most) in [(whole.len() / 2, 39), (whole.len() - 10, 40), (100, 0), (30, 0)] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let options = SourceOptions { file_timeout: Duration::from_secs(10), ..patient() };
        let results: Vec<_> = match Source::open(path.to_str().unwrap(), options) {
            Ok(source) => source.collect(),
            Err(error) => vec![Err(error)],
        };
        let frames = results.iter().filter(|result| result.is_ok()).count();
        assert!(frames <= most, "{frames} frames of {cut} bytes");
        assert!(frames > 0 || results.iter().any(Result::is_err), "no frame and no error from {cut} bytes");
    }
    let (_folder, path) = clip("b.ogv", &format!("{video} ! theoraenc ! oggmux"));
    let mut noisy = std::fs::read(&path).unwrap();
    let half = noisy.len() / 2;
    for byte in noisy[half..].iter_mut().step_by(7) {
        *byte ^= 0x5A;
    }
    std::fs::write(&path, noisy).unwrap();
    assert!(open(&path).filter(Result::is_ok).count() < 40);
}

#[test]
fn an_error_in_mid_stream_comes_after_the_frames() {
    let pipeline = "gst:videotestsrc num-buffers=20 ! video/x-raw,width=32,height=32 ! identity error-after=11";
    let (frames, error) = failure(pipeline, patient());
    assert!((9..=11).contains(&frames), "{frames}");
    assert!(matches!(error, MediaError::Broken { .. }), "{error}");
}

#[test]
fn a_stream_without_frames_says_so() {
    let (_, error) = failure("gst:videotestsrc num-buffers=0", patient());
    assert!(matches!(error, MediaError::NoFrames { .. }), "{error}");
}

#[test]
fn silence_is_not_the_end() {
    let silent = "gst:appsrc caps=video/x-raw,format=RGB,width=8,height=8,framerate=5/1";
    for pipeline in [silent, "gst:appsrc is-live=true"] {
        let (frames, error) = failure(pipeline, hasty());
        assert!(frames == 0 && matches!(error, MediaError::Stalled { .. }), "{pipeline}: {error}");
    }
}

#[test]
fn names_and_pipelines_that_cannot_be_used_are_explained() {
    for spec in ["", " ", "v4l2:", "v4l2:video0", "gst:", "gst: ! ", "ftp://here/a.mp4", "a\0b"] {
        let (_, error) = failure(spec, hasty());
        assert!(matches!(error, MediaError::BadSource { .. }), "{spec:?}: {error}");
    }
    for pipeline in ["gst:videotestsrc ! (", "gst:videotestsrc ! fakesink", "gst:videotestsrc no-such-property=1"] {
        let (_, error) = failure(pipeline, hasty());
        assert!(matches!(error, MediaError::BadPipeline { .. }), "{pipeline}: {error}");
    }
    let (_, error) = failure("gst:videotestsrc ! nosuchelement", hasty());
    assert!(matches!(&error, MediaError::MissingElement { element, .. } if element == "nosuchelement"), "{error}");
    // Sound cannot be made a picture.
    let (_, error) = failure("gst:audiotestsrc", hasty());
    assert!(matches!(error, MediaError::BadPipeline { .. } | MediaError::Broken { .. }), "{error}");
    let (_, error) = failure("gst:filesrc location=/nonexistent/a.mp4 ! decodebin", patient());
    assert!(matches!(error, MediaError::Broken { frames: 0, .. }), "{error}");
}

#[test]
fn cameras_that_are_not_there_say_so() {
    let (_, error) = failure("v4l2:/dev/video-that-is-not-there", hasty());
    assert!(matches!(&error, MediaError::DeviceAbsent { device } if device.ends_with("not-there")), "{error}");
    let (_, error) = failure("v4l2:/dev/null", hasty());
    assert!(matches!(error, MediaError::DeviceFailed { .. }), "{error}");
}

#[test]
fn a_network_camera_that_is_away_is_reported_without_its_password() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed_port = closed.local_addr().unwrap().port();
    drop(closed);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    for port in [closed_port, silent.local_addr().unwrap().port()] {
        let (frames, error) = failure(&format!("rtsp://user:secret@127.0.0.1:{port}/camera"), hasty());
        let told = error.to_string();
        assert!(frames == 0 && matches!(error, MediaError::Unreachable { .. }), "{told}");
        assert!(told.contains("/camera") && !told.contains("secret"), "{told}");
    }
}

/// The RTP packets of a JPEG stream of 40 pictures.
fn jpeg_packets() -> Vec<Vec<u8>> {
    gst::init().unwrap();
    let text = "videotestsrc num-buffers=40 ! video/x-raw,format=I420,width=64,height=48,framerate=20/1 ! jpegenc ! rtpjpegpay ! \
                appsink name=out sync=false";
    let pipeline = gst::parse::launch(text).unwrap().downcast::<gst::Pipeline>().unwrap();
    let sink = pipeline.by_name("out").unwrap().downcast::<gstreamer_app::AppSink>().unwrap();
    pipeline.set_state(gst::State::Playing).unwrap();
    let mut packets = Vec::new();
    while let Ok(sample) = sink.pull_sample() {
        packets.push(sample.buffer().unwrap().map_readable().unwrap().to_vec());
    }
    pipeline.set_state(gst::State::Null).unwrap();
    assert!(packets.len() >= 40);
    packets
}

/// A network camera for one client: answers RTSP and sends the packets inside the same connection.
fn serve_rtsp(listener: &TcpListener, packets: &[Vec<u8>]) -> std::io::Result<()> {
    let (mut stream, _) = listener.accept()?;
    let mut received = Vec::new();
    loop {
        let mut chunk = [0; 4096];
        let count = stream.read(&mut chunk)?;
        if count == 0 {
            return Ok(());
        }
        received.extend_from_slice(&chunk[..count]);
        while let Some(end) = received.windows(4).position(|four| four == b"\r\n\r\n") {
            let request = String::from_utf8_lossy(&received[..end]).into_owned();
            received.drain(..end + 4);
            answer(&mut stream, &request, packets)?;
        }
    }
}

fn answer(stream: &mut TcpStream, request: &str, packets: &[Vec<u8>]) -> std::io::Result<()> {
    let header = |name: &str| request.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
    let sequence = header("CSeq:");
    let sdp = "v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=camera\r\nc=IN IP4 0.0.0.0\r\nt=0 0\r\nm=video 0 RTP/AVP 26\r\n\
               a=rtpmap:26 JPEG/90000\r\na=control:track1\r\n";
    let (more, body) = match request.split(' ').next().unwrap_or_default() {
        "OPTIONS" => ("Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n".to_string(), ""),
        "DESCRIBE" => (format!("Content-Type: application/sdp\r\nContent-Length: {}\r\n", sdp.len()), sdp),
        "SETUP" => (format!("Transport: {}\r\nSession: 1\r\n", header("Transport:")), ""),
        _ => ("Session: 1\r\n".to_string(), ""),
    };
    write!(stream, "RTSP/1.0 200 OK\r\nCSeq: {sequence}\r\n{more}\r\n{body}")?;
    if request.starts_with("PLAY ") {
        for packet in packets {
            let length = (packet.len() as u16).to_be_bytes();
            stream.write_all(&[b'$', 0, length[0], length[1]])?;
            stream.write_all(packet)?;
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    Ok(())
}

#[test]
fn a_network_camera_is_read() {
    let packets = jpeg_packets();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || serve_rtsp(&listener, &packets));
    let mut source = Source::open(&format!("rtsp://127.0.0.1:{port}/camera"), patient()).unwrap();
    assert!(source.is_live());
    let first = source.next().unwrap().unwrap();
    let second = source.next().unwrap().unwrap();
    assert_eq!((first.width, first.height, first.check()), (64, 48, Ok(())));
    assert!(second.pts_s > first.pts_s);
}

#[test]
fn a_live_source_gives_the_newest_frame() {
    for spec in ["test", "gst:videotestsrc is-live=true ! video/x-raw,width=64,height=48,framerate=50/1"] {
        let mut source = Source::open(spec, patient()).unwrap();
        assert!(source.is_live(), "{spec}");
        let first = source.next().unwrap().unwrap();
        std::thread::sleep(Duration::from_millis(600));
        source.next().unwrap().unwrap(); // the one that was waiting
        let later = source.next().unwrap().unwrap();
        assert!(later.pts_s - first.pts_s > 0.3, "{spec}: {} after {}", later.pts_s, first.pts_s);
    }
}

#[test]
fn windows_of_a_live_source() {
    let source = Source::open("test", patient()).unwrap();
    let mut windows = Windows::new(source, WindowSettings::new(2, 0.3, 0.3).unwrap());
    let (first, second) = (windows.next().unwrap().unwrap(), windows.next().unwrap().unwrap());
    assert!(second.index > first.index && second.start_s >= first.end_s - 1e-9);
    assert!(!first.frames.is_empty() && (first.end_s - first.start_s - 0.3).abs() < 1e-9);
    assert_eq!(FaceDetector::new().unwrap().find(&first.frames).unwrap(), None);
}

#[test]
fn the_demo_clip_shows_one_face_in_every_window() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../demo/sad-to-happy.mp4");
    let mut detector = FaceDetector::new().unwrap();
    let mut count = 0;
    let source = Source::open(path, patient()).unwrap();
    for window in Windows::new(source, WindowSettings::new(4, 2.0, 1.0).unwrap()) {
        let window = window.unwrap();
        let face = detector.find(&window.frames).unwrap().unwrap();
        assert_eq!((window.frames.len(), face.found_in, face.people), (4, 4, 1), "from {} s", window.start_s);
        let face = face.in_frame(&window.frames[0]);
        assert!((200.0..300.0).contains(&face.width), "{face:?}");
        count += 1;
    }
    assert_eq!(count, 19);
    let clip = sample_clip(|| Source::open(path, patient()), 8).unwrap().unwrap();
    assert_eq!((clip.frame_count, clip.frames.len()), (472, 8));
}
