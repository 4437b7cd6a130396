//! Candor watches people through a camera, says which emotion it sees and why, and presents only a reason it has
//! verified. One module a stage, in the order data flows:
//!
//! [`media`] → [`model`] (over [`weights`]) → [`text`] → [`verify`] → [`watch`] → observations.
#![deny(unsafe_code)]

pub mod device;
pub mod manifest;
pub mod media;
pub mod message;
pub mod metrics;
pub mod model;
pub mod observation;
pub mod text;
pub mod verify;
pub mod watch;
#[allow(unsafe_code)] // maps files
pub mod weights;
