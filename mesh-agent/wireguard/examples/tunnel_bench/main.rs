//! Measures the tunnel engine beside those of others: `cargo xtask bench tunnel`.
//!
//! Every implementation has a pair of namespaces of its own, joined by a veth; all pairs exist at the same time, and a
//! round measures each of them in turn, so that what the machine does besides is spread over all. Figures are medians
//! over the rounds; a ratio is the median of the ratios within the rounds. Both ends and the load run on this machine.

mod cipher;
mod flood;
mod impaired;
mod latency;
mod life;
mod load;
mod pair;
mod peers;
mod report;
#[path = "../../tests/support/mod.rs"]
mod support;

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use nix::sys::signal::{SigSet, Signal};
use pair::Pair;
use report::{Measured, Report};
use support::Engine;
use warren_wireguard::engine::{self, EngineConfig, Implementation};

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,
    /// How often everything is measured.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long a TCP measurement takes.
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// Which tests; all by default.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Test>,
    /// Against whom.
    #[arg(long, value_enum, value_delimiter = ',', num_args = 0.., default_values_t = [Other::WireguardGo, Other::BoringtunCli, Other::GotatunCli])]
    peers: Vec<Other>,
    /// Against another build of this program, to see what a change gains.
    #[arg(long, value_name = "FILE")]
    against: Option<PathBuf>,
    /// Which of this project's engines is "ours".
    #[arg(long, default_value_t)]
    engine: Implementation,
    /// Record a profile of our engine during one TCP stream with `perf`, here, and nothing else.
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// Where the figures go, as JSON.
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

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Other {
    WireguardGo,
    BoringtunCli,
    GotatunCli,
    /// This project's engine with boringtun's sessions.
    OursBoringtun,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Test {
    /// One TCP stream, with CPU time.
    TcpOne,
    /// The other way round.
    TcpOneReverse,
    /// Eight streams.
    TcpEight,
    /// One stream each way at once.
    TcpBothWays,
    /// One stream with the veth's offloads off.
    TcpOneOffloadsOff,
    /// Datagrams of 64 bytes a second without loss.
    Udp64,
    /// Datagrams of 1,300 bytes a second without loss.
    Udp1300,
    /// Datagrams of the Internet's sizes a second without loss.
    UdpImix,
    /// Round trips while one TCP stream flows.
    Ping,
    /// Requests and answers over TCP and UDP, idle and beside a stream.
    Latency,
    /// Memory of idle peers.
    IdlePeers,
    /// From the start of the process to the first packet.
    Start,
    /// 500 peers that shake hands at once.
    Handshakes,
    /// Throughput and handshakes in a flood of handshakes.
    Flood,
    /// TCP through a network of 20 ms that loses datagrams.
    Impaired,
    /// Our engine only: an upgrade and a kill under 10,000 packets a second.
    Replace,
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
        .map_err(anyhow::Error::from),
        None => bench(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench tunnel: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(arguments: &Arguments) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "network namespaces need root; run it as root"
    );
    ensure!(
        arguments.rounds > 0 && arguments.seconds > 0,
        "at least one round and one second"
    );
    let interrupted = watch_signals()?;
    let ours = |implementation: Implementation| -> Result<Engine> {
        let arguments = vec!["engine".into(), implementation.to_string()];
        Ok(Engine::Warren(std::env::current_exe()?, arguments))
    };
    let mut pairs = vec![Pair::new("ours", &ours(arguments.engine)?)?];
    for other in &arguments.peers {
        pairs.push(match other {
            Other::WireguardGo => Pair::new("wireguard-go", &Engine::WireguardGo)?,
            Other::BoringtunCli => Pair::new("boringtun-cli", &Engine::BoringtunCli)?,
            Other::GotatunCli => Pair::new("gotatun-cli", &Engine::GotatunCli)?,
            Other::OursBoringtun => Pair::new("ours-boringtun", &ours(Implementation::Boringtun)?)?,
        });
    }
    if let Some(program) = &arguments.against {
        let words = vec!["engine".into(), arguments.engine.to_string()];
        pairs.push(Pair::new(
            "before",
            &Engine::Warren(program.canonicalize()?, words),
        )?);
    }
    if let Some(path) = &arguments.profile {
        return profile(&pairs[0], path, arguments.seconds);
    }
    let names = pairs.iter().map(|pair| pair.name).collect();
    let mut report = Report::new(arguments.rounds, names, cipher::bound());
    for round in 0..arguments.rounds {
        for test in Test::value_variants() {
            if !arguments.only.is_empty() && !arguments.only.contains(test) {
                continue;
            }
            for (place, pair) in pairs.iter().enumerate() {
                if interrupted.load(Ordering::Relaxed) {
                    bail!("interrupted");
                }
                let measured = run(*test, pair, round, arguments.seconds)
                    .with_context(|| format!("{} in round {}", pair.name, round + 1))?;
                report.add(round, place, measured);
            }
        }
        for (place, pair) in pairs.iter().enumerate() {
            report.add(round, place, vec![pair.peak_memory()?]);
        }
        eprintln!("round {} of {}", round + 1, arguments.rounds);
    }
    print!("{}", report.table());
    if let Some(path) = &arguments.json {
        let text = serde_json::to_string_pretty(&report.json())?;
        std::fs::write(path, text + "\n").with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// `perf record` of both engines while a stream flows; by the CPU's clock, which every machine has.
fn profile(pair: &Pair, path: &Path, seconds: u64) -> Result<()> {
    let mut perf = Command::new("perf")
        .args([
            "record",
            "-e",
            "cpu-clock",
            "-F",
            "999",
            "-g",
            "-p",
            &pair.processes(),
            "-o",
        ])
        .arg(path)
        .args(["--", "sleep", &seconds.to_string()])
        .spawn()
        .context("perf cannot be started; install it")?;
    let streamed = pair.tcp("tcp_one", seconds + 1, &[], None);
    let recorded = perf.wait()?;
    streamed?;
    ensure!(recorded.success(), "perf failed: {recorded}");
    println!("perf report -i {}", path.display());
    Ok(())
}

fn run(test: Test, pair: &Pair, round: usize, seconds: u64) -> Result<Vec<Measured>> {
    match test {
        Test::TcpOne => pair.tcp("tcp_one", seconds, &[], Some("cpu_seconds_per_gb")),
        Test::TcpOneReverse => pair.tcp("tcp_one_reverse", seconds, &["-R"], None),
        Test::TcpEight => pair.tcp("tcp_eight", seconds, &["-P", "8"], None),
        Test::TcpBothWays => pair.tcp("tcp_both_ways", seconds, &["--bidir"], None),
        Test::TcpOneOffloadsOff => {
            pair.set_offloads(false)?;
            let measured = pair.tcp(
                "tcp_one_offloads_off",
                seconds,
                &[],
                Some("cpu_seconds_per_gb_offloads_off"),
            );
            pair.set_offloads(true)?;
            measured
        }
        Test::Udp64 => load::lossfree(pair, "udp_64_lossfree", &[64]),
        Test::Udp1300 => load::lossfree(pair, "udp_1300_lossfree", &[1300]),
        Test::UdpImix => load::lossfree(pair, "udp_imix_lossfree", load::IMIX),
        Test::Ping => pair.ping_under_load(seconds),
        Test::Latency => latency::measure(pair, seconds),
        Test::IdlePeers => peers::memory(&pair.engine),
        Test::Start => life::start(&pair.engine),
        Test::Handshakes => peers::handshakes(&pair.engine),
        Test::Flood => flood::measure(pair, seconds),
        Test::Impaired => impaired::measure(pair.name, &pair.engine, round, seconds),
        Test::Replace if matches!(pair.engine, Engine::Warren(..)) => life::replace(&pair.engine),
        Test::Replace => Ok(Vec::new()),
    }
}

/// Becomes true at the first SIGINT or SIGTERM, so that namespaces are removed.
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
