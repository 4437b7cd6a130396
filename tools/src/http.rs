//! What the reward server and the rating page share: an address on this machine, and an end that leaves no request
//! without its answer.

use std::net::SocketAddr;

use anyhow::{Context, ensure};
use axum::Router;
use candor::message::say;
use tokio::net::TcpListener;

/// Serves `router` until the process is interrupted or told to end; requests that have begun are answered first. The
/// line `listening on http://ADDRESS` on standard output says when it is ready, and which port was free where `address`
/// asks for port 0. Addresses that other machines reach need `public`.
pub fn serve(address: SocketAddr, public: bool, router: Router) -> anyhow::Result<()> {
    ensure!(
        public || address.ip().is_loopback(),
        "{address} can be reached from other machines; --public allows that, without any access control"
    );
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
        say(format_args!("listening on http://{}", listener.local_addr()?))?;
        axum::serve(listener, router).with_graceful_shutdown(told_to_end()).await?;
        Ok(())
    })
}

/// Comes back when the process is interrupted or told to end.
async fn told_to_end() {
    let interrupted = tokio::signal::ctrl_c();
    #[cfg(unix)]
    {
        if let Ok(mut told) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            tokio::select! { _ = interrupted => {}, _ = told.recv() => {} }
            return;
        }
    }
    // Without the handler there is nothing to wait for but the end of the process.
    let _ = interrupted.await;
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
