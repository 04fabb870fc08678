//! `cargo xtask conformance`: cyclonus against the cluster.

use std::{fs, path::PathBuf, process::Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use serde::{Deserialize, Serialize};

use super::{Cluster, Options, tools};

/// What `warren-cluster conformance` takes.
#[derive(Debug, Default, clap::Args)]
pub struct ConformanceArgs {
    /// Only cases with one of these tags (`--list` shows them).
    #[arg(long)]
    pub include: Option<String>,
    /// No cases with one of these tags.
    #[arg(long)]
    pub exclude: Option<String>,
    /// Only the case of this number.
    #[arg(long)]
    pub case: Option<u32>,
    /// Only every so many of the chosen cases.
    #[arg(long)]
    pub every: Option<u32>,
    /// How pods are addressed: service-name, service-ip or pod-ip; as the case says if not given.
    #[arg(long)]
    pub mode: Option<String>,
    /// IPv6 as the cluster's first family, which is the one that cyclonus uses.
    #[arg(long)]
    pub ipv6: bool,
    /// Write the summary to this file.
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Name the chosen cases and run none.
    #[arg(long)]
    pub list: bool,
}

/// What a run says at its end.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Summary {
    /// Cases that ran.
    pub cases: u32,
    /// Of these, those where all probes were as cyclonus' model says.
    pub passed: u32,
    /// The others.
    pub failed: u32,
    /// Changes with a probe of all pairs after each.
    pub steps: u32,
    /// Probes that were only right when repeated.
    pub retried: u32,
    /// The names of the failed cases.
    pub failures: Vec<String>,
}

/// Starts a cluster, runs cyclonus, and fails unless every case passes.
pub fn run(args: &ConformanceArgs) -> Result<()> {
    if args.list {
        let status = std::process::Command::new(tools::path("cyclonus")?)
            .args(flags(args))
            .arg("-list")
            .status()?;
        ensure!(status.success(), "cyclonus: {status}");
        return Ok(());
    }
    let mut cluster = Cluster::start(Options {
        verbose: true,
        ipv6_first: args.ipv6,
        ..Options::default()
    })?;
    let summary = cluster
        .install(&[])
        .and_then(|()| cluster.conformance(args))
        .inspect_err(|_| {
            if let Ok(logs) = cluster.keep_logs() {
                eprintln!("the logs stay in {}", logs.display());
            }
        })?;
    ensure!(
        summary.failed == 0,
        "{} of {} cases failed",
        summary.failed,
        summary.cases
    );
    Ok(())
}

/// What the cluster's kernel can serve.
fn protocols() -> &'static str {
    let sctp = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::empty(),
        SockProtocol::Sctp,
    );
    if sctp.is_ok() { "TCP,UDP,SCTP" } else { "TCP,UDP" }
}

fn flags(args: &ConformanceArgs) -> Vec<String> {
    let mut flags = vec![format!("-protocols={}", protocols())];
    let texts = [
        ("include", &args.include),
        ("exclude", &args.exclude),
        ("mode", &args.mode),
    ];
    flags.extend(
        texts
            .iter()
            .filter_map(|(name, value)| Some(format!("-{name}={}", value.as_ref()?))),
    );
    let numbers = [("case", args.case), ("every", args.every)];
    flags.extend(
        numbers
            .iter()
            .filter_map(|(name, value)| Some(format!("-{name}={}", (*value)?))),
    );
    flags
}

impl Cluster {
    /// Runs cyclonus in a cluster where Warren runs; what it prints goes to our stdout.
    pub fn conformance(&self, args: &ConformanceArgs) -> Result<Summary> {
        let report = self.folder().join("cyclonus.json");
        let config = self.folder().join("pki/admin.conf");
        let mut command = vec![
            tools::path("cyclonus")?,
            format!("-kubeconfig={}", config.display()),
            format!("-json={}", report.display()),
        ];
        command.extend(flags(args));
        let log = fs::File::create(self.folder().join("logs/cyclonus.log"))?;
        let status = self
            .control_place()
            .command(&command)
            .stdout(Stdio::inherit())
            .stderr(log)
            .status()
            .context("cannot run cyclonus")?;
        let Ok(text) = fs::read_to_string(&report) else {
            let log = crate::lab::process::tail(&self.folder().join("logs/cyclonus.log"), 5);
            bail!("cyclonus ended without a summary ({status}): {log}");
        };
        if let Some(file) = &args.json {
            fs::write(file, &text).with_context(|| format!("cannot write {}", file.display()))?;
        }
        serde_json::from_str(&text).context("cyclonus' summary cannot be read")
    }
}
