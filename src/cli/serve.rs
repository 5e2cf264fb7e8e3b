//! `longhaul serve` and `longhaul execute`: the database, the API and the executor put together, until a signal.

use std::{ffi::OsString, io, net::SocketAddr, path::PathBuf};

use tokio::{
    net::TcpListener,
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;

use super::database::{self, Held, absolute};
use crate::{
    api::{self, metrics::Metrics},
    config, executor,
    store::{self, Store},
    webhooks,
};

/// Connections of one process for small transactions, and for bytes.
const CONNECTIONS: u32 = 16;
const BULK_CONNECTIONS: u32 = 12;

/// Why a server role could not start, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "--listen {0} can be reached from other hosts, and nobody needs a key yet: make one with `longhaul keys create`, \
         listen on 127.0.0.1, or pass --open-to-all where a network or a proxy keeps strangers out"
    )]
    OpenToAll(SocketAddr),
    #[error("--listen {address}: {source}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("--metrics {address}: {source}")]
    Metrics { address: SocketAddr, source: io::Error },
    #[error("--data {path}: {source}")]
    Data { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Database(#[from] database::Error),
    #[error("the store: {}", database::one_line(.0))]
    Store(#[from] store::Error),
    #[error("the executor: {0}")]
    Executor(#[from] executor::Error),
    #[error("the system refused: {0}")]
    System(#[from] io::Error),
}

/// Serves the API until SIGTERM or an interrupt. `path` is where Postgres' programs are looked for first.
pub fn run(args: &config::Serve, path: OsString) -> Result<(), Error> {
    let data = &args.places.data;
    std::fs::create_dir_all(data).map_err(|source| Error::Data { path: data.clone(), source })?;
    let runtime = Runtime::new()?;
    let stop = runtime.block_on(async { stop_on_signals() })?;
    let database = Held::open(&args.database, data, path)?;
    let served = runtime.block_on(serve(args, database.url(), stop));
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    database.close();
    served
}

/// Executes jobs until SIGTERM or an interrupt.
pub fn execute(args: &config::Execute) -> Result<(), Error> {
    let runtime = Runtime::new()?;
    runtime.block_on(async {
        let stop = stop_on_signals()?;
        let store = Store::connect(&store_settings(&args.places, args.database_url.clone())).await?;
        let settings = executor_settings(&args.places, &args.executor)?;
        executor::run(store.clone(), settings, stop).await?;
        store.close().await;
        Ok(())
    })
}

async fn serve(args: &config::Serve, database_url: String, stop: CancellationToken) -> Result<(), Error> {
    let store = Store::connect(&store_settings(&args.places, database_url)).await?;
    store.migrate().await?;
    let closed = args.require_keys || args.open_to_all || args.listen.ip().is_loopback();
    if !closed && !store.has_keys().await? {
        return Err(Error::OpenToAll(args.listen));
    }
    let listener =
        TcpListener::bind(args.listen).await.map_err(|source| Error::Listen { address: args.listen, source })?;
    let address = listener.local_addr()?;
    // Whoever started us with port 0 learns the address from this line.
    tracing::info!(%address, "serving on http://{address}");
    let metrics = Metrics::default();
    let settings = api::Settings {
        max_upload_bytes: args.max_upload_bytes,
        metrics: metrics.clone(),
        require_keys: args.require_keys,
    };
    let watched = watched(args.metrics, store.clone(), metrics, stop.clone()).await?;
    // Whatever ends first takes the other one with it.
    let api = async {
        let ended = api::serve(listener, store.clone(), settings, stop.clone()).await;
        stop.cancel();
        ended
    };
    let executor = async {
        if args.no_executor {
            return Ok(());
        }
        let settings = executor_settings(&args.places, &args.executor)?;
        let ended = executor::run(store.clone(), settings, stop.clone()).await;
        stop.cancel();
        ended.map_err(Error::from)
    };
    let (api, executor, watched, ()) = tokio::join!(api, executor, watched, webhooks::run(store.clone(), stop.clone()));
    store.close().await;
    api?;
    watched?;
    executor
}

/// Binds the address for metrics, if there is to be one; what it gives answers there until the stop.
async fn watched(
    address: Option<SocketAddr>,
    store: Store,
    metrics: Metrics,
    stop: CancellationToken,
) -> Result<impl Future<Output = io::Result<()>>, Error> {
    let listener = match address {
        None => None,
        Some(address) => {
            let listener = TcpListener::bind(address).await.map_err(|source| Error::Metrics { address, source })?;
            let address = listener.local_addr()?;
            tracing::info!(%address, "metrics on http://{address}/metrics");
            Some(listener)
        }
    };
    Ok(async move {
        match listener {
            None => Ok(()),
            Some(listener) => api::metrics::serve(listener, store, metrics, stop).await,
        }
    })
}

/// Cancelled by SIGTERM or an interrupt. A second signal ends the process at once.
fn stop_on_signals() -> io::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let token = stop.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if token.is_cancelled() {
                std::process::exit(130);
            }
            tracing::info!("stopping: requests and trainers under way get a while to end");
            token.cancel();
        }
    });
    Ok(stop)
}

fn store_settings(places: &config::Places, database_url: String) -> store::Settings {
    store::Settings {
        database_url,
        max_connections: CONNECTIONS,
        max_bulk_connections: BULK_CONNECTIONS,
        weights_folder: absolute(places.weights.as_deref().unwrap_or(&places.data.join("weights"))),
    }
}

fn executor_settings(places: &config::Places, args: &config::Executor) -> io::Result<executor::Settings> {
    Ok(executor::Settings {
        program: std::env::current_exe()?,
        work_folder: absolute(&places.data.join("work")),
        models_folder: absolute(places.models.as_deref().unwrap_or(&places.data.join("models"))),
        hub: hub_settings(&args.hub),
        lease: args.lease,
        grace: args.grace,
        memory: args.sizes.memory,
        device_memory: args.sizes.device_memory,
        libraries: args.devices.libraries.iter().map(|folder| absolute(folder)).collect(),
        machine_file: absolute(&args.devices.machine_file(&places.data)),
        look: args.machine_timeout,
        address: args.address.clone().unwrap_or_else(own_name),
    })
}

fn hub_settings(args: &config::Hub) -> executor::HubSettings {
    let home = || args.hf_home.clone().unwrap_or_else(|| args.home.join(".cache/huggingface"));
    executor::HubSettings {
        endpoint: args.hub_endpoint.clone(),
        token: args.hub_token.clone().filter(|token| !token.is_empty()),
        cache: absolute(&args.hub_cache.clone().unwrap_or_else(|| home().join("hub"))),
        fetch: !args.no_fetch,
    }
}

fn own_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
