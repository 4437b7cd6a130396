//! What a command line says of an error.

use std::error::Error;

/// An error and its causes in one line, outermost first. A cause that the message before it quotes already is left out.
pub fn one_line(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
        cause = error.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[derive(Debug, thiserror::Error)]
    enum Outer {
        #[error("cannot read f: {0}")]
        Quoting(#[source] io::Error),
        #[error("cannot read f")]
        Bare(#[source] io::Error),
    }

    #[test]
    fn each_cause_is_said_once() {
        let cause = || io::Error::other("gone");
        for error in [Outer::Quoting(cause()), Outer::Bare(cause())] {
            assert_eq!(one_line(&error), "cannot read f: gone");
        }
    }
}
