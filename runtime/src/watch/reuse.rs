//! What is not computed again where the answer is known: each mechanism with its switch, and counts of the work done.

use std::fmt;
use std::str::FromStr;

use crate::model::{Counts, Reading};

/// What is reused from window to window. All but `forced` give the answers that computing everything anew gives, but for
/// the order of summation on devices with another way for few rows than for many; see docs/performance.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reuse {
    /// The instruction gate's weights, until the instruction changes.
    pub gate: bool,
    /// Keys and values of what the prompt begins with, as far as it is that of the last window.
    pub prefix: bool,
    /// What the face detector and the vision tower made of a frame that was in the last window too.
    pub frames: bool,
    /// What the projector made of such a frame; without `frames` there are none.
    pub projector: bool,
    /// Tokens that the output format leaves no choice of are written without asking the model.
    pub forced: bool,
}

impl Reuse {
    /// Everything.
    pub const ALL: Reuse = Reuse { gate: true, prefix: true, frames: true, projector: true, forced: true };
    /// Nothing.
    pub const NONE: Reuse = Reuse { gate: false, prefix: false, frames: false, projector: false, forced: false };

    /// The switches by their names.
    fn switches(&mut self) -> [(&'static str, &mut bool); 5] {
        let Reuse { gate, prefix, frames, projector, forced } = self;
        [("gate", gate), ("prefix", prefix), ("frames", frames), ("projector", projector), ("forced", forced)]
    }
}

impl Default for Reuse {
    fn default() -> Self {
        Reuse::ALL
    }
}

/// Not a list of things that can be reused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} cannot be reused; there are all, none, and lists of gate, prefix, frames, projector and forced")]
pub struct ParseReuseError(String);

impl FromStr for Reuse {
    type Err = ParseReuseError;

    fn from_str(text: &str) -> Result<Self, ParseReuseError> {
        match text {
            "all" => return Ok(Reuse::ALL),
            "none" => return Ok(Reuse::NONE),
            _ => {}
        }
        let mut reuse = Reuse::NONE;
        for name in text.split(',') {
            let mut switches = reuse.switches().into_iter();
            let (_, on) =
                switches.find(|switch| switch.0 == name.trim()).ok_or_else(|| ParseReuseError(name.to_owned()))?;
            *on = true;
        }
        Ok(reuse)
    }
}

impl fmt::Display for Reuse {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        match *self {
            Reuse::ALL => formatter.write_str("all"),
            Reuse::NONE => formatter.write_str("none"),
            mut some => {
                let on = some.switches().into_iter().filter(|switch| *switch.1).map(|switch| switch.0);
                formatter.write_str(&on.collect::<Vec<_>>().join(","))
            }
        }
    }
}

/// Work done since a model was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Frames that faces were looked for in.
    pub frames_searched: u64,
    /// What the parts before the decoder computed.
    pub model: Counts,
    /// What the decoder read.
    pub decoder: Reading,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn lists_are_read_and_written() {
        for text in ["all", "none", "gate", "prefix,forced", "gate,frames,projector"] {
            assert_eq!(text.parse::<Reuse>().unwrap().to_string(), text);
        }
        assert_eq!("forced, gate,prefix,projector,frames".parse::<Reuse>().unwrap(), Reuse::ALL);
        for text in ["", "gates", "gate,", "all,gate", "Gate"] {
            assert!(text.parse::<Reuse>().is_err(), "{text:?}");
        }
    }
}
