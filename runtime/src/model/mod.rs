//! The model family: towers, projectors, gate and decoder, written once over `Device`.
