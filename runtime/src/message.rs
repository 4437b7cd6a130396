//! What a command line says.

use std::error::Error;
use std::fmt::{Debug, Display};
use std::io::{self, Write};
use std::process::ExitCode;

/// Prints a line and flushes it, so that a reader has it at once and a failure loses none. False where nobody reads any
/// more, which is no error: `candor … | head -1` is done when `head` is.
///
/// # Errors
/// What the system says of standard output, such as a full disk.
pub fn say(line: impl Display) -> io::Result<bool> {
    let text = format!("{line}\n");
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error),
    }
}

/// The exit code of a program, after saying on standard error what went wrong, if anything did.
pub fn exit_code<E>(program: &str, result: Result<(), E>) -> ExitCode
where
    E: AsRef<dyn Error + Send + Sync> + Debug,
{
    let Err(error) = result else { return ExitCode::SUCCESS };
    eprintln!("{program}: {}", one_line(error.as_ref()));
    log::debug!("{error:?}");
    ExitCode::FAILURE
}

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
