//! Accepts connections: TLS 1.3, then HTTP/1.1.
//!
//! Invariant: nobody holds anything for long without saying something: handshake, headers and requests
//! have their time, and the number of connections is bounded, also for each address.

use super::gate::Connection;
use crate::service::Msa;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;

const MAX_CONNECTIONS: usize = 512;
const MAX_PER_ADDRESS: usize = 128;
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
const HEADERS_LIMIT: Duration = Duration::from_secs(15);
const MAX_HEADER_BYTES: usize = 32 << 10;
/// How long requests may still take when the server stops.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);
/// After a failure to accept (out of descriptors), so that it is no busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connections of each address.
#[derive(Default)]
struct Counts(Mutex<BTreeMap<IpAddr, usize>>);

/// One connection in the count; leaves it when it goes.
struct Counted {
    counts: Arc<Counts>,
    address: IpAddr,
}

impl Counts {
    fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Counted> {
        let mut counts = self.0.lock();
        let count = counts.entry(address).or_default();
        if *count >= MAX_PER_ADDRESS {
            return None;
        }
        *count += 1;
        let counts = self.clone();
        Some(Counted { counts, address })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut counts = self.counts.0.lock();
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

/// Serves until `stop` says so, then lets the requests that run come to their end.
pub async fn serve(listener: TcpListener, msa: Arc<Msa>, mut stop: watch::Receiver<bool>) {
    let router = super::router(msa.clone());
    let counts = Arc::new(Counts::default());
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => break,
        };
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // The same address, however it was written.
        let address = from.ip().to_canonical();
        let Some(counted) = counts.enter(address) else {
            tracing::debug!(%address, "{MAX_PER_ADDRESS} connections from one address: no more");
            continue;
        };
        let (msa, router, stop) = (msa.clone(), router.clone(), stop.clone());
        tokio::spawn(async move {
            if let Err(error) = connection(stream, address, &msa, router, stop).await {
                tracing::debug!(%address, "a connection ended: {error:#}");
            }
            drop((counted, place));
        });
    }
    drop(listener);
    let all = u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX);
    if tokio::time::timeout(DRAIN_LIMIT, places.acquire_many(all))
        .await
        .is_err()
    {
        tracing::warn!("some requests did not come to their end in time");
    }
}

async fn connection(
    stream: TcpStream,
    address: IpAddr,
    msa: &Msa,
    router: axum::Router,
    mut stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let acceptor = TlsAcceptor::from(msa.tls.config());
    let stream = tokio::time::timeout(HANDSHAKE_LIMIT, acceptor.accept(stream)).await??;
    let peer = tls::peer_of(stream.get_ref().1)?.map(Arc::new);
    let connection = Connection { address, peer };
    let service = TowerToHyperService::new(router.layer(axum::Extension(connection)));
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEADERS_LIMIT)
        .max_buf_size(MAX_HEADER_BYTES);
    let mut serving = std::pin::pin!(http.serve_connection(TokioIo::new(stream), service));
    tokio::select! {
        served = serving.as_mut() => return Ok(served?),
        _ = stop.wait_for(|stop| *stop) => serving.as_mut().graceful_shutdown(),
    }
    Ok(serving.await?)
}
