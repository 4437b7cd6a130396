//! Cameras and files in, windows of frames out.
