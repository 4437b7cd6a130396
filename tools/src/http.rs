//! What the reward server and the rating page share: an address on this machine, and an end that leaves no request
//! without its answer.

use std::net::SocketAddr;

use anyhow::{Context, ensure};
use axum::Router;
use candor::message::say;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Serves `router` until the process is interrupted or told to end; requests that have begun are answered first, unless
/// it is told a second time: a request whose head never comes whole would be waited for without end. The line
/// `listening on http://ADDRESS` on standard output says when it is ready, and which port was free where `address` asks
/// for port 0. Addresses that other machines reach need `public`.
pub fn serve(address: SocketAddr, public: bool, router: Router) -> anyhow::Result<()> {
    ensure!(
        public || address.ip().is_loopback(),
        "{address} can be reached from other machines; --public allows that, without any access control"
    );
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
        let told = times_told_to_end()?;
        let times = |least: u32| {
            let mut told = told.clone();
            // The sender never goes away before the runtime does.
            async move { drop(told.wait_for(|times| *times >= least).await) }
        };
        say(format_args!("listening on http://{}", listener.local_addr()?))?;
        tokio::select! {
            ended = axum::serve(listener, router).with_graceful_shutdown(times(1)).into_future() => ended?,
            () = times(2) => log::warn!("told to end twice; what had begun is left unanswered"),
        }
        Ok(())
    })
}

/// How often the process has been interrupted or told to end since this was called.
fn times_told_to_end() -> anyhow::Result<watch::Receiver<u32>> {
    let (times, told) = watch::channel(0);
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let (mut interrupts, mut ends) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        tokio::spawn(async move {
            loop {
                tokio::select! { _ = interrupts.recv() => {}, _ = ends.recv() => {} }
                times.send_modify(|times| *times += 1);
            }
        });
    }
    #[cfg(not(unix))]
    tokio::spawn(async move {
        while tokio::signal::ctrl_c().await.is_ok() {
            times.send_modify(|times| *times += 1);
        }
    });
    Ok(told)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn other_machines_are_let_in_on_request_only() {
        let error = serve("192.0.2.1:80".parse().unwrap(), false, Router::new()).unwrap_err().to_string();
        assert!(error.contains("--public"), "{error}");
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let error = serve(taken.local_addr().unwrap(), false, Router::new()).unwrap_err();
        assert!(error.to_string().starts_with("cannot listen on 127.0.0.1:"), "{error}");
    }
}
