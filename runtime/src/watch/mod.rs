//! Puts the stages together: a window in, an observation out.
