//! Command line.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use warren_keyd_api::admin::DEFAULT_SOCKET;

/// The key-distribution controller of Warren.
#[derive(Debug, Parser)]
#[command(name = "keyd", version, about)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve agents.
    Run(Box<Run>),
    /// Join tokens of stand-alone mode.
    #[command(subcommand)]
    Token(Token),
    /// The key that signs snapshots and MeshNodes.
    #[command(subcommand)]
    SigningKey(SigningKey),
    /// What keyd knows of the cluster.
    Status {
        /// Output format.
        #[arg(short, long, value_enum, default_value_t = Format::Text)]
        output: Format,
        /// keyd's local socket.
        #[arg(long, default_value = DEFAULT_SOCKET)]
        socket: PathBuf,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Token {
    /// Make a single-use join token for one node.
    Create {
        /// The node's name.
        node: String,
        /// Seconds until it expires; one hour unless given.
        #[arg(long)]
        ttl: Option<u64>,
        /// keyd's local socket.
        #[arg(long, default_value = DEFAULT_SOCKET)]
        socket: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum SigningKey {
    /// Print all of them, the oldest first; the last one signs.
    List {
        /// keyd's local socket.
        #[arg(long, default_value = DEFAULT_SOCKET)]
        socket: PathBuf,
    },
    /// Make a new one, which the old one vouches for. Agents follow by themselves.
    Rotate {
        /// keyd's local socket.
        #[arg(long, default_value = DEFAULT_SOCKET)]
        socket: PathBuf,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SourceKind {
    /// A watched folder of manifests.
    Manifests,
    /// The Kubernetes API.
    Kubernetes,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Run {
    /// The cluster's settings (ClusterConfig), the same file as the agents'.
    #[arg(long)]
    pub(crate) config: PathBuf,
    /// Where Nodes, Namespaces and Pods come from.
    #[arg(long, value_enum)]
    pub(crate) source: SourceKind,
    /// The folder of manifests.
    #[arg(long, required_if_eq("source", "manifests"))]
    pub(crate) manifests: Option<PathBuf>,
    /// Durable state of stand-alone mode.
    #[arg(long, default_value = "/var/lib/warren/keyd")]
    pub(crate) state_dir: PathBuf,
    /// Where agents connect; the port of the configuration unless given.
    #[arg(long)]
    pub(crate) listen: Option<SocketAddr>,
    /// The local socket for `keyd status`, `keyd token` and `warren`.
    #[arg(long, default_value = DEFAULT_SOCKET)]
    pub(crate) admin_socket: PathBuf,
    /// Metrics and health.
    #[arg(long, default_value = "[::]:9964")]
    pub(crate) metrics: SocketAddr,
    /// host:port under which agents reach this keyd; followers send them to the leader's.
    #[arg(long)]
    pub(crate) advertise: Option<String>,
    /// Namespace of keyd's own Lease, Secret and ConfigMap.
    #[arg(long, default_value = "kube-system")]
    pub(crate) namespace: String,
    /// Name of this keyd among its replicas; unique. The host's name unless given.
    #[arg(long)]
    pub(crate) id: Option<String>,
    /// Service account that agents run under: system:serviceaccount:<namespace>:mesh-agent unless given.
    #[arg(long)]
    pub(crate) agent_account: Option<String>,
}
