//! `cargo xtask bench policy`: how long it takes from a change of a policy to the new verdict on the wire.
//!
//! A client sends a datagram every millisecond to a pod on another node; one policy allows and forbids it in turn, among
//! a thousand others. A change's time runs from just before the request to the API server until the first datagram that
//! arrives, or the last one that did: sender, receiver and this program read one clock. It so includes the API server's
//! own work, which is also reported alone (`accepted_*`: until its answer).

use std::{
    io::{BufRead as _, BufReader, Read as _},
    path::PathBuf,
    process::Stdio,
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;
use serde_json::{Value, json};

use super::{Cluster, Options, Workload, api::Api, pod::AppPod};
use crate::{
    app::stamps::now,
    lab::{Process, wait::wait_until},
};

/// How long nothing must arrive until a denial counts as complete. Datagrams come every millisecond.
const SILENCE: Duration = Duration::from_millis(250);
/// How long a change may take at all.
const LIMIT: Duration = Duration::from_secs(10);
/// Namespaces that the other policies are spread over.
const NAMESPACES: usize = 20;
/// The path of a namespace's policies.
const KIND: &str = "ciliumnetworkpolicies";
/// Where the receiver listens.
const PORT: u16 = 9999;

/// What `warren-cluster bench-policy` takes.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// How many changes to measure.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(2..))]
    pub changes: u32,
    /// How many policies there are.
    #[arg(long, default_value_t = 1000)]
    pub policies: usize,
    /// Write the figures to this file.
    #[arg(long)]
    pub json: Option<PathBuf>,
}

/// The figures, milliseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    /// Half of the changes took at most this long.
    pub p50_ms: f64,
    /// 99 of a hundred.
    pub p99_ms: f64,
    /// The slowest.
    pub max_ms: f64,
    /// The API server's part, half of the changes.
    pub accepted_p50_ms: f64,
    /// 99 of a hundred.
    pub accepted_p99_ms: f64,
    /// How many were measured.
    pub changes: u32,
    /// How many policies there were.
    pub policies: usize,
}

/// Starts a cluster, measures, prints and writes the figures.
pub fn run(args: &BenchArgs) -> Result<()> {
    let cluster = Cluster::start(Options {
        verbose: true,
        ..Options::default()
    })?;
    cluster.install(&[])?;
    let figures = measure(&cluster, args)?;
    let text = serde_json::to_string_pretty(&figures)?;
    println!("{text}");
    if let Some(file) = &args.json {
        std::fs::write(file, text + "\n").with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

/// Measures in a cluster where Warren runs.
pub fn measure(cluster: &Cluster, args: &BenchArgs) -> Result<Figures> {
    let api = cluster.api()?;
    let (client, server) = pods(cluster)?;
    let begun = now()?;
    fill(&api, args.policies.saturating_sub(1))?;
    api.create(&collection("bench"), &flip())?;
    wait_until(Duration::from_secs(120), "every policy is valid", || {
        let list = cluster.kubectl(["get", "cnp", "-A", "--no-headers"])?;
        let valid = list.lines().filter(|line| line.ends_with("True")).count();
        ensure!(valid == args.policies, "{valid} of {}", args.policies);
        Ok(())
    })?;
    eprintln!(
        "bench: {} policies loaded and valid after {:.1} s",
        args.policies,
        (now()? - begun).as_secs_f64()
    );
    let mut stamps = Stamps::start(&server)?;
    let address = server.addresses.first().context("no address")?;
    let flow = client.start_flow((*address, PORT).into())?;
    stamps
        .next(LIMIT)?
        .context("nothing arrives before the first change")?;
    let (mut total, mut accepted) = (Vec::new(), Vec::new());
    for change in 0..args.changes {
        let allow = change % 2 == 1;
        let (took, answered) = one(&api, &mut stamps, allow).with_context(|| format!("change {change}"))?;
        total.push(took);
        accepted.push(answered);
    }
    drop(flow);
    total.sort_unstable();
    accepted.sort_unstable();
    Ok(Figures {
        p50_ms: percentile(&total, 50),
        p99_ms: percentile(&total, 99),
        max_ms: percentile(&total, 100),
        accepted_p50_ms: percentile(&accepted, 50),
        accepted_p99_ms: percentile(&accepted, 99),
        changes: args.changes,
        policies: args.policies,
    })
}

/// Changes the policy; returns how long the verdict took and how long the API server.
fn one(api: &Api, stamps: &mut Stamps, allow: bool) -> Result<(Duration, Duration)> {
    let role = if allow { "client" } else { "nobody" };
    let changes = json!({"spec": {"ingress": [{"fromEndpoints": [{"matchLabels": {"role": role}}]}]}});
    stamps.forget();
    let start = now()?;
    api.merge(&format!("{}/flip", collection("bench")), &changes)?;
    let accepted = now()? - start;
    let verdict = if allow {
        stamps
            .next(LIMIT)?
            .context("nothing arrives although it is allowed")?
    } else {
        let mut last = start;
        while let Some(stamp) = stamps.next(SILENCE)? {
            ensure!(
                stamp.saturating_sub(start) < LIMIT,
                "datagrams still arrive although they are forbidden"
            );
            // What was on its way before the change is none of its time.
            last = last.max(stamp);
        }
        last
    };
    Ok((verdict.saturating_sub(start), accepted))
}

/// When datagrams arrived.
struct Stamps {
    arrivals: Receiver<Duration>,
    _process: Process,
}

impl Stamps {
    fn start(pod: &AppPod) -> Result<Self> {
        let app = pod.place.app.display().to_string();
        let mut child = pod
            .place
            .command([app.as_str(), "stamps", "--listen", &format!("[::]:{PORT}")])
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the receiver")?;
        let mut output = BufReader::new(child.stdout.take().context("no pipe")?);
        let process = Process::adopt(child, "the receiver", std::path::Path::new("/dev/null"));
        let mut line = String::new();
        output.read_line(&mut line)?;
        ensure!(
            line.trim() == crate::inside::READY,
            "the receiver does not start: {line}"
        );
        let (send, arrivals) = channel();
        thread::spawn(move || {
            let mut stamp = [0; 8];
            while output.read_exact(&mut stamp).is_ok() {
                if send
                    .send(Duration::from_nanos(u64::from_be_bytes(stamp)))
                    .is_err()
                {
                    return;
                }
            }
        });
        Ok(Self {
            arrivals,
            _process: process,
        })
    }

    /// The next arrival; `None` if there is none for so long.
    fn next(&self, limit: Duration) -> Result<Option<Duration>> {
        match self.arrivals.recv_timeout(limit) {
            Ok(stamp) => Ok(Some(stamp)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("the receiver has ended"),
        }
    }

    /// Drops what has arrived until now.
    fn forget(&mut self) {
        while self.arrivals.try_recv().is_ok() {}
    }
}

/// In milliseconds, to the hundredth.
fn percentile(sorted: &[Duration], percent: usize) -> f64 {
    (crate::bench::percentile(sorted, percent).as_secs_f64() * 1e5).round() / 100.0
}

fn collection(namespace: &str) -> String {
    format!("/apis/cilium.io/v2/namespaces/{namespace}/{KIND}")
}

/// Client and server, on different nodes.
fn pods(cluster: &Cluster) -> Result<(AppPod, AppPod)> {
    let names: Vec<_> = (0..NAMESPACES).map(namespace).chain(["bench".into()]).collect();
    let namespaces: Vec<Value> = names
        .iter()
        .map(|name| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}))
        .collect();
    cluster.apply(&namespaces)?;
    wait_until(
        Duration::from_secs(60),
        "the namespace has its service account",
        || cluster.kubectl(["get", "serviceaccount", "default", "-n", "bench"]),
    )?;
    let pod = |role: &str, node: &str| Workload::new("bench", role, node).label("role", role).manifest();
    cluster.apply(&[pod("client", "node1"), pod("server", "node2")])?;
    cluster.wait_pods(Duration::from_secs(90))?;
    let pods = cluster.app_pods("bench")?;
    let find = |name: &str| {
        let found = pods.iter().find(|pod| pod.name == name);
        found.cloned().with_context(|| format!("no pod {name}"))
    };
    Ok((find("client")?, find("server")?))
}

fn namespace(n: usize) -> String {
    format!("bench-{n}")
}

/// The policy that changes.
fn flip() -> Value {
    policy(
        "flip",
        "server",
        json!([{"fromEndpoints": [{"matchLabels": {"role": "client"}}]}]),
    )
}

/// The others: every tenth for the server itself, the rest for applications elsewhere; with labels, ports and prefixes.
fn fill(api: &Api, count: usize) -> Result<()> {
    const WRITERS: usize = 8;
    thread::scope(|scope| {
        let write = |writer: usize| -> Result<()> {
            for n in (writer..count).step_by(WRITERS) {
                let peers = json!([
                    {
                        "fromEndpoints": [{"matchLabels": {"role": format!("peer-{n}")}}],
                        "toPorts": [{"ports": [{"port": (1000 + n % 500).to_string(), "protocol": "TCP"}]}],
                    },
                    {"fromCIDR": [format!("192.{}.{}.0/24", n / 250, n % 250)]},
                ]);
                let (place, selects) = if n % 10 == 0 {
                    ("bench".to_owned(), "server".to_owned())
                } else {
                    (namespace(n % NAMESPACES), format!("app-{n}"))
                };
                api.create(
                    &collection(&place),
                    &policy(&format!("other-{n}"), &selects, peers),
                )?;
            }
            Ok(())
        };
        let threads: Vec<_> = (0..WRITERS)
            .map(|writer| scope.spawn(move || write(writer)))
            .collect();
        for thread in threads {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a writer panicked"))??;
        }
        Ok(())
    })
}

fn policy(name: &str, selects: &str, ingress: Value) -> Value {
    json!({
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": name},
        "spec": {"endpointSelector": {"matchLabels": {"role": selects}}, "ingress": ingress},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_sorted_values() {
        let values: Vec<_> = (1..=200).map(Duration::from_millis).collect();
        for (percent, wanted) in [(50, 100.0), (99, 198.0), (100, 200.0)] {
            assert!((percentile(&values, percent) - wanted).abs() < 1e-9);
        }
    }
}
