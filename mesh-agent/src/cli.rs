//! The command line.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

/// Warren's node agent.
#[derive(Debug, Parser)]
#[command(name = "mesh-agent", version, about, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the agent of this node.
    Run(Box<RunOptions>),
    /// Run the userspace WireGuard engine.
    Tunnel(TunnelOptions),
    /// About encryption.
    #[command(subcommand)]
    Encrypt(Encrypt),
    /// State of this node's agent.
    Status(StatusOptions),
    /// Pods of this node, and what policy enforces on them.
    Endpoints(StatusOptions),
    /// Policies of this node's pods and of its host, as they are compiled.
    Policy(PolicyOptions),
    /// Tracked flows.
    Conntrack(ListOptions),
    /// What policy allowed and dropped last.
    Events(ListOptions),
}

/// `mesh-agent encrypt`.
#[derive(Debug, Subcommand)]
pub(crate) enum Encrypt {
    /// What this node's encryption really is; exit code 1 where it differs from what is wanted.
    Status(StatusOptions),
}

/// `mesh-agent run`.
#[derive(Debug, Clone, Args)]
pub(crate) struct RunOptions {
    /// Settings of the cluster, the same file for keyd and all agents.
    #[arg(long, default_value = "/etc/warren/cluster.yaml")]
    pub(crate) config: PathBuf,
    /// Name of this node, as the Node object has it.
    #[arg(long, env = "NODE_NAME")]
    pub(crate) node_name: String,
    /// Where keyd listens: HOST:PORT, several separated by commas.
    #[arg(long, value_delimiter = ',', value_parser = host_and_port, env = "WARREN_KEYD")]
    pub(crate) keyd: Vec<String>,
    /// Keys, last good snapshot, endpoints.
    #[arg(long, default_value = "/var/lib/warren/agent")]
    pub(crate) state_dir: PathBuf,
    /// Where the agent's socket is.
    #[arg(long, default_value = "/run/warren")]
    pub(crate) run_dir: PathBuf,
    /// Where the tunnel's sockets are.
    #[arg(long, default_value = "/run/wireguard")]
    pub(crate) wireguard_dir: PathBuf,
    /// Where eBPF maps and links are pinned; must be on a bpffs.
    #[arg(long, default_value = "/sys/fs/bpf/warren")]
    pub(crate) bpffs: PathBuf,
    /// The node's cgroup (version 2), the root of everything that has sockets of the host. Default: where cgroup2 is
    /// mounted.
    #[arg(long)]
    pub(crate) cgroup: Option<PathBuf>,
    /// Most tracked flows of one pod; new ones beyond are dropped and reported.
    #[arg(long, default_value_t = 32_768, value_parser = clap::value_parser!(u32).range(16..=1_000_000))]
    pub(crate) flows_per_pod: u32,
    /// Stand-alone: a file with a join token, needed once.
    #[arg(long)]
    pub(crate) join_token_file: Option<PathBuf>,
    /// Kubernetes: the projected service-account token.
    #[arg(long)]
    pub(crate) token_file: Option<PathBuf>,
    /// Kubernetes: the mounted ConfigMap warren-trust.
    #[arg(long)]
    pub(crate) trust_dir: Option<PathBuf>,
    /// Where metrics and health are served.
    #[arg(long, default_value = "[::]:9962")]
    pub(crate) metrics: SocketAddr,
    /// Who runs the tunnel process.
    #[arg(long, value_enum, default_value_t = TunnelMode::Spawn)]
    pub(crate) tunnel: TunnelMode,
    /// Where named network namespaces of pods are, to find pods that are older than the agent.
    #[arg(long, default_value = "/run/netns")]
    pub(crate) netns_dir: PathBuf,
}

/// Who runs the tunnel process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TunnelMode {
    /// The agent starts it, and adopts one that runs already.
    Spawn,
    /// Somebody else does; the agent waits for its socket.
    External,
}

/// `mesh-agent tunnel`.
#[derive(Debug, Clone, Args)]
pub(crate) struct TunnelOptions {
    /// Where its sockets are.
    #[arg(long, default_value = "/run/wireguard")]
    pub(crate) run_dir: PathBuf,
    /// Which engine.
    #[arg(long, value_enum, default_value_t = Engine::Warren)]
    pub(crate) engine: Engine,
    /// Keeps what the timestamps of handshakes have reached, so that a clock that is set back does not lock this node out.
    #[arg(long)]
    pub(crate) clock_file: Option<PathBuf>,
    /// Begin a session of its own, so that it outlives whoever started it.
    #[arg(long, hide = true)]
    pub(crate) detach: bool,
    /// Stay, idle, after a newer tunnel has taken over, until told to end: for supervisors that would start it again.
    #[arg(long)]
    pub(crate) linger: bool,
}

/// The engines there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Engine {
    /// Warren's own handshake and sessions.
    Warren,
    /// boringtun's handshake and sessions.
    Boringtun,
}

/// Options of the status commands.
#[derive(Debug, Clone, Args)]
pub(crate) struct StatusOptions {
    /// Also what is of interest when it is slow: offloads of the tunnel process.
    #[arg(short, long)]
    pub(crate) verbose: bool,
    /// How to print.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    pub(crate) output: Output,
    /// The agent's socket.
    #[arg(long, default_value = "/run/warren/agent.sock")]
    pub(crate) socket: PathBuf,
}

/// `mesh-agent policy`.
#[derive(Debug, Clone, Args)]
pub(crate) struct PolicyOptions {
    /// `get`, the only thing there is to do.
    #[arg(value_parser = ["get"], hide = true)]
    pub(crate) verb: Option<String>,
    /// Only this endpoint: its number (0 is the host), or NAMESPACE/POD.
    #[arg(long)]
    pub(crate) endpoint: Option<Selected>,
    #[command(flatten)]
    pub(crate) common: StatusOptions,
}

/// `mesh-agent conntrack` and `mesh-agent events`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ListOptions {
    /// Only this endpoint: its number (0 is the host), or NAMESPACE/POD.
    #[arg(long)]
    pub(crate) endpoint: Option<Selected>,
    /// At most so many.
    #[arg(long, default_value_t = 1000)]
    pub(crate) limit: u32,
    #[command(flatten)]
    pub(crate) common: StatusOptions,
}

/// An endpoint by number or by pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Selected {
    /// Its number.
    Index(u16),
    /// Namespace and name of the pod.
    Pod(String, String),
}

impl std::str::FromStr for Selected {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(index) = text.parse() {
            return Ok(Self::Index(index));
        }
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
                Ok(Self::Pod(namespace.into(), name.into()))
            }
            _ => Err(format!(
                "{text:?} is neither the number of an endpoint nor NAMESPACE/POD"
            )),
        }
    }
}

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

impl Cli {
    /// Logs go to stderr; `RUST_LOG` chooses, info is the default.
    pub(crate) fn init_logging(&self) {
        let filter = EnvFilter::builder()
            .with_default_directive(LevelFilter::INFO.into())
            .from_env_lossy();
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .with_ansi(false)
            .init();
    }
}

/// `HOST:PORT`, where an IPv6 address stands in brackets.
fn host_and_port(text: &str) -> Result<String, String> {
    let wrong = || format!("{text:?} is not HOST:PORT (write an IPv6 address in brackets)");
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let bare = host.contains(':') && !(host.starts_with('[') && host.ends_with(']'));
    if host.is_empty() || bare || port.parse::<u16>().map_or(true, |port| port == 0) {
        return Err(wrong());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn addresses_need_host_and_port() {
        for good in ["10.0.0.1:4250", "keyd.example:1", "[fd00::1]:4250"] {
            assert_eq!(host_and_port(good).as_deref(), Ok(good));
        }
        for bad in [
            "",
            "host",
            ":4250",
            "host:",
            "host:0",
            "host:65536",
            "fd00::1:4250",
        ] {
            assert!(host_and_port(bad).is_err(), "{bad}");
        }
    }
}
