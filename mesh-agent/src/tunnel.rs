//! The tunnel process: running it, starting it, noticing its death.

use std::{
    fs::OpenOptions,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::mpsc,
};
use warren_wireguard::{
    Userspace,
    engine::{self, EngineConfig, Implementation},
};

use crate::{
    cli::{Engine, RunOptions, TunnelMode, TunnelOptions},
    files::make_private_dir,
    runner::Input,
};

/// How often a tunnel that is not there yet is asked for.
const POLL: Duration = Duration::from_millis(50);
/// How often the connection that watches the tunnel says something.
const KEEP_OPEN: Duration = Duration::from_secs(10);
/// How long a started tunnel may take to answer before another one is started.
const START_TIME: Duration = Duration::from_secs(5);

/// `mesh-agent tunnel`.
pub(crate) fn main(options: &TunnelOptions) -> ExitCode {
    if options.detach {
        // Fails only for a process that leads a group already: a signal to its starter's group does not reach it.
        let _ = nix::unistd::setsid();
    }
    let config = EngineConfig {
        run_dir: options.run_dir.clone(),
        implementation: match options.engine {
            Engine::Warren => Implementation::Warren,
            Engine::Boringtun => Implementation::Boringtun,
        },
        linger: options.linger,
        clock_file: options.clock_file.clone(),
        ..EngineConfig::default()
    };
    match engine::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-agent tunnel: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Sees to it that a tunnel runs, and says when one begins to.
pub(crate) fn supervise(options: &RunOptions, inputs: mpsc::UnboundedSender<Input>) {
    let (run_dir, mode) = (options.wireguard_dir.clone(), options.tunnel);
    let clock_file = options.state_dir.join("tunnel-clock");
    tokio::spawn(async move {
        loop {
            ensure(&run_dir, &clock_file, mode).await;
            if inputs.send(Input::TunnelStarted).is_err() {
                return;
            }
            ended(&run_dir).await;
            if Userspace::new(&run_dir).ping().await.is_ok() {
                tracing::info!("another tunnel process has taken over, with all sessions");
                continue;
            }
            tracing::error!("the tunnel process is gone: traffic between nodes pauses");
            if inputs.send(Input::Network).is_err() {
                return;
            }
        }
    });
}

/// Returns when a tunnel answers.
async fn ensure(run_dir: &Path, clock_file: &Path, mode: TunnelMode) {
    let driver = Userspace::new(run_dir);
    let mut said = false;
    loop {
        if driver.ping().await.is_ok() {
            tracing::info!("the tunnel process runs");
            return;
        }
        match mode {
            TunnelMode::Spawn => {
                if let Err(error) = spawn(run_dir, clock_file) {
                    tracing::error!(error = %format!("{error:#}"), "the tunnel process cannot be started");
                }
            }
            TunnelMode::External if !said => {
                tracing::info!(directory = %run_dir.display(), "waiting for the tunnel process");
                said = true;
            }
            TunnelMode::External => {}
        }
        let patience = tokio::time::Instant::now() + START_TIME;
        while driver.ping().await.is_err() && tokio::time::Instant::now() < patience {
            tokio::time::sleep(POLL).await;
        }
    }
}

/// Starts the tunnel in a session of its own, so that it outlives this agent.
fn spawn(run_dir: &Path, clock_file: &Path) -> Result<()> {
    make_private_dir(run_dir)?;
    let path = run_dir.join("tunnel.log");
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut child = Command::new(program)
        .arg("tunnel")
        .arg("--detach")
        .arg("--run-dir")
        .arg(run_dir)
        .arg("--clock-file")
        .arg(clock_file)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot start the tunnel process")?;
    tracing::info!(pid = child.id(), log = %path.display(), "tunnel process started");
    // Somebody has to collect it when it ends before the agent does.
    std::thread::Builder::new()
        .name("tunnel-reaper".into())
        .spawn(move || {
            if let Ok(status) = child.wait() {
                tracing::warn!(%status, "the tunnel process ended");
            }
        })?;
    Ok(())
}

/// Returns when the tunnel is gone: its end of an open connection closes with it.
async fn ended(run_dir: &Path) {
    let Ok(mut stream) = UnixStream::connect(run_dir.join(engine::ENGINE_SOCKET)).await else {
        return;
    };
    let mut answer = [0; 256];
    loop {
        match tokio::time::timeout(KEEP_OPEN, stream.read(&mut answer)).await {
            Ok(Ok(1..)) => {}
            Ok(Ok(0) | Err(_)) => return,
            // The engine closes connections that say nothing.
            Err(_) => {
                if stream.write_all(b"ping\n").await.is_err() {
                    return;
                }
            }
        }
    }
}
