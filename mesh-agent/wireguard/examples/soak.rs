//! Numbered datagrams both ways, over both families, for long enough that keys change several times.
//!
//! `soak --seconds 600 --rate 1000 --json FILE`: two engines in namespaces of their own, four flows. Exits non-zero
//! when a datagram is lost or arrives twice, or when keys did not change as often as they must. Needs root.

#[path = "../tests/support/mod.rs"]
mod support;

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use nix::sys::signal::{SigSet, Signal};
use serde_json::{Value, json};
use support::{
    Engine, Lab, Node,
    traffic::{Figures, Flow, ping},
};
use warren_wireguard::engine::{self, EngineConfig, Implementation};

/// Seconds from one key to the next: REKEY_AFTER_TIME of WireGuard, and some for timers and retries.
const KEY_LIFE: u64 = 130;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,
    /// How long traffic flows.
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Datagrams a second of each of the four flows.
    #[arg(long, default_value_t = 1000)]
    rate: u64,
    /// Bytes of a datagram.
    #[arg(long, default_value_t = 200)]
    bytes: usize,
    /// Which of this project's engines.
    #[arg(long, default_value_t)]
    engine: Implementation,
    /// Who is at the other end.
    #[arg(long, value_enum, default_value_t = Other::Warren)]
    peer: Other,
    /// Where the figures go.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Role {
    /// The engine of a node: how this program starts itself.
    #[command(hide = true)]
    Engine {
        implementation: Implementation,
        run_dir: PathBuf,
        devices: Vec<String>,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Other {
    Warren,
    WireguardGo,
    Boringtun,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.role {
        Some(Role::Engine {
            implementation,
            run_dir,
            devices,
        }) => engine::run(EngineConfig {
            run_dir,
            devices,
            implementation,
            linger: false,
            clock_file: None,
        })
        .map(|()| true)
        .map_err(anyhow::Error::from),
        None => soak(&arguments),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn soak(arguments: &Arguments) -> Result<bool> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "network namespaces need root; run it as root"
    );
    let interrupted = watch_signals()?;
    let own = || -> Result<Engine> {
        let engine = vec!["engine".into(), arguments.engine.to_string()];
        Ok(Engine::Warren(std::env::current_exe()?, engine))
    };
    let other = match arguments.peer {
        Other::Warren => own()?,
        Other::WireguardGo => Engine::WireguardGo,
        Other::Boringtun => Engine::BoringtunCli,
    };
    let lab = Lab::new([own()?, other])?;
    lab.mesh(true)?;
    let (a, b) = (&lab.nodes[0], &lab.nodes[1]);
    // The first handshake is no part of the measurement.
    ping(a, b.inner_v4(), 56)?;
    let before = handshakes(a)?;

    let mut flows = Vec::new();
    for (from, to) in [(a, b), (b, a)] {
        for address in [to.inner_v4(), to.inner_v6()] {
            flows.push(Flow::start(from, to, address, arguments.rate, arguments.bytes)?);
        }
    }
    let start = Instant::now();
    let length = Duration::from_secs(arguments.seconds);
    let mut told = start;
    while start.elapsed() < length && !interrupted.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(100));
        if told.elapsed() > Duration::from_secs(30) {
            told = Instant::now();
            let (sent, received) = flows
                .iter()
                .fold((0, 0), |sum, flow| (sum.0 + flow.sent(), sum.1 + flow.received()));
            let rekeys = handshakes(a)? - before;
            eprintln!(
                "soak: {:>4} s, {sent} sent, {received} received, {rekeys} rekeys",
                start.elapsed().as_secs()
            );
        }
    }
    let seconds = start.elapsed().as_secs();
    let rekeys = handshakes(a)? - before;
    let mut total = Figures::default();
    let mut list = Vec::new();
    for flow in flows {
        let name = flow.name.clone();
        let figures = flow.finish()?;
        list.push(report(&name, figures));
        total.sent += figures.sent;
        total.lost += figures.lost;
        total.duplicated += figures.duplicated;
        total.reordered += figures.reordered;
    }
    let expected = seconds / KEY_LIFE;
    let passed = total.sent > 0 && total.lost == 0 && total.duplicated == 0 && rekeys >= expected;
    let mut figures = report("total", total);
    figures["seconds"] = seconds.into();
    figures["rekeys"] = rekeys.into();
    figures["rekeys_expected"] = expected.into();
    figures["flows"] = list.into();
    figures["drops"] = drops(&lab)?;
    figures["passed"] = passed.into();
    let text = serde_json::to_string_pretty(&figures)?;
    println!("{text}");
    if let Some(path) = &arguments.json {
        std::fs::write(path, text + "\n").with_context(|| path.display().to_string())?;
    }
    Ok(passed)
}

fn report(name: &str, figures: Figures) -> Value {
    let Figures {
        sent,
        lost,
        duplicated,
        reordered,
    } = figures;
    json!({ "name": name, "sent": sent, "lost": lost, "duplicated": duplicated, "reordered": reordered })
}

fn handshakes(node: &Node) -> Result<u64> {
    node.handshakes()
}

/// What our engines dropped, where it is not nothing.
fn drops(lab: &Lab) -> Result<Value> {
    let mut drops = serde_json::Map::new();
    for node in lab
        .nodes
        .iter()
        .filter(|node| matches!(node.engine, Engine::Warren(..)))
    {
        let stats = node.control(&format!("stats {}", node.device))?;
        let Some(reasons) = stats["drops"].as_object() else {
            continue;
        };
        let some = reasons.iter().filter(|(_, count)| count.as_u64() != Some(0));
        drops.insert(
            node.number.to_string(),
            some.map(|(name, count)| (name.clone(), count.clone())).collect(),
        );
    }
    Ok(drops.into())
}

/// Becomes true at the first SIGINT or SIGTERM, so that namespaces are removed and figures printed.
fn watch_signals() -> Result<Arc<AtomicBool>> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            flag.store(true, Ordering::Relaxed);
        }
    });
    Ok(interrupted)
}
