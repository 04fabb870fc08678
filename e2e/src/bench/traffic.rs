//! Goodput and requests through the lab, with policy and without, in turn: the machine's moods meet both.

use std::{
    cell::Cell,
    io::Write as _,
    net::{IpAddr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    app::{
        ask::Protocol,
        wire::{ECHO, read_block, write_block},
    },
    lab::{
        Lab, LabOptions, PORT, Place, Pod, PodSpec, policies,
        process::{NET, Process},
        wait::{wait_for, wait_until},
    },
};

/// Where `iperf3` listens.
const IPERF: u16 = 5201;
/// Bytes of a request, and of its answer.
const REQUEST: usize = 100;
/// Until a policy is in force, or gone.
const PATIENCE: Duration = Duration::from_secs(60);

/// Goodput and requests, policy on over policy off; of each the best quarter of its rounds.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Traffic {
    /// One TCP stream between pods of two nodes, through the tunnel.
    pub goodput_ratio: f64,
    /// Requests and answers in turn, on one TCP connection, between pods of two nodes.
    pub rr_ratio: f64,
    /// The same between pods of one node, where nothing else costs.
    pub local_goodput_ratio: f64,
    /// The same between pods of one node.
    pub local_rr_ratio: f64,
    /// Mbit/s between two nodes with policy.
    pub goodput_mbps: f64,
    /// Requests per second between two nodes with policy.
    pub requests_per_second: f64,
}

pub(super) fn measure(rounds: u32, seconds: u32) -> Result<Traffic> {
    let mut found = Traffic::default();
    let options = LabOptions {
        nodes: 2,
        ..LabOptions::default()
    };
    Lab::run(options, |lab| {
        found = Scene::new(lab)?.measure(rounds, seconds)?;
        Ok(())
    })?;
    Ok(found)
}

struct Scene<'a> {
    lab: &'a Lab,
    /// The policies are there.
    applied: Cell<bool>,
    server: Pod,
    far: Pod,
    near: Pod,
    enemy: Pod,
    tool: String,
    _iperf: Process,
}

/// What one round found.
#[derive(Debug, Clone, Copy, Default)]
struct Found {
    goodput: f64,
    requests: f64,
    local_goodput: f64,
    local_requests: f64,
}

impl<'a> Scene<'a> {
    fn new(lab: &'a Lab) -> Result<Self> {
        let pod = |name: &str, app: &str, node| {
            lab.add_pod(PodSpec {
                labels: [("app".to_owned(), app.to_owned())].into(),
                ..PodSpec::new(name, node)
            })
        };
        let server = pod("server", "server", 1)?;
        let iperf = network(&server).spawn(
            ["iperf3", "-s", "-p", &IPERF.to_string()],
            &lab.dir().join("logs/iperf3.log"),
        )?;
        let tool = std::env::current_exe().context("who am I?")?;
        Ok(Self {
            far: pod("far", "client", 2)?,
            near: pod("near", "client", 1)?,
            enemy: pod("enemy", "enemy", 2)?,
            server,
            lab,
            applied: Cell::new(false),
            tool: tool.display().to_string(),
            _iperf: iperf,
        })
    }

    fn measure(&self, rounds: u32, seconds: u32) -> Result<Traffic> {
        let (mut on, mut off) = (Vec::new(), Vec::new());
        for round in 0..rounds {
            // First this, then that; and the other way.
            for policy in [round % 2 == 0, round % 2 != 0] {
                self.switch(policy)?;
                let found = self.round(seconds)?;
                eprintln!(
                    "bench bpf: policy {}: {found:?}",
                    if policy { "on" } else { "off" }
                );
                if policy { &mut on } else { &mut off }.push(found);
            }
        }
        let ratio = |of: fn(&Found) -> f64| best(&on, of) / best(&off, of);
        Ok(Traffic {
            goodput_ratio: ratio(|found| found.goodput),
            rr_ratio: ratio(|found| found.requests),
            local_goodput_ratio: ratio(|found| found.local_goodput),
            local_rr_ratio: ratio(|found| found.local_requests),
            goodput_mbps: best(&on, |found| found.goodput),
            requests_per_second: best(&on, |found| found.requests),
        })
    }

    /// Puts the policies in force or takes them away; whether they are shows by who is kept out.
    fn switch(&self, on: bool) -> Result<()> {
        for policy in objects() {
            if on {
                self.lab.manifests().apply(&policy)?;
            } else if self.applied.get() {
                self.lab.manifests().withdraw(&policy)?;
            }
        }
        self.applied.set(on);
        let server = self.address();
        let what = if on {
            "policies are in force"
        } else {
            "policies are gone"
        };
        wait_for(PATIENCE, what, || {
            self.enemy.ask(Protocol::Udp, server, 10).is_ok() != on
        })?;
        for client in [&self.far, &self.near] {
            wait_until(PATIENCE, "clients are let in", || {
                client.ask(Protocol::Udp, server, 10)
            })?;
        }
        Ok(())
    }

    fn round(&self, seconds: u32) -> Result<Found> {
        Ok(Found {
            goodput: self.goodput(&self.far, seconds)?,
            requests: self.requests(&self.far, seconds)?,
            local_goodput: self.goodput(&self.near, seconds)?,
            local_requests: self.requests(&self.near, seconds)?,
        })
    }

    fn address(&self) -> IpAddr {
        self.server.addresses()[0]
    }

    /// Mbit/s.
    fn goodput(&self, client: &Pod, seconds: u32) -> Result<f64> {
        let (address, port, seconds) = (self.address().to_string(), IPERF.to_string(), seconds.to_string());
        let words = [
            "iperf3", "-J", "-c", &address, "-p", &port, "-t", &seconds, "-O", "1",
        ];
        let report: Value = serde_json::from_str(&network(client).run(words)?)?;
        let bits = report["end"]["sum_received"]["bits_per_second"]
            .as_f64()
            .context("iperf3 reports no rate")?;
        ensure!(bits > 0.0, "nothing arrived");
        Ok(bits / 1e6)
    }

    /// Requests per second.
    fn requests(&self, client: &Pod, seconds: u32) -> Result<f64> {
        let to = SocketAddr::new(self.address(), PORT).to_string();
        let seconds = seconds.to_string();
        let words = [&self.tool, "rounds", "--to", &to, "--seconds", &seconds];
        network(client)
            .run(words)?
            .trim()
            .parse()
            .context("the client prints no rate")
    }
}

/// The mean of the best quarter: whatever else runs on the machine only takes away.
fn best(rounds: &[Found], of: fn(&Found) -> f64) -> f64 {
    let mut values: Vec<f64> = rounds.iter().map(of).collect();
    values.sort_by(|a, b| b.total_cmp(a));
    values.truncate(rounds.len().div_ceil(4));
    values.iter().sum::<f64>() / values.len() as f64
}

/// A pod's network with the machine's files.
fn network(pod: &Pod) -> Place {
    Place {
        kinds: NET,
        ..pod.place()
    }
}

/// Default deny both ways, and what the clients need.
fn objects() -> Vec<Value> {
    let ports: Vec<Value> = [PORT, IPERF]
        .into_iter()
        .flat_map(|port| {
            policies::ports(port)[0]["ports"]
                .as_array()
                .cloned()
                .unwrap_or_default()
        })
        .collect();
    let mut objects = policies::default_deny("default");
    objects.push(json!({
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"namespace": "default", "name": "clients"},
        "specs": [
            {
                "endpointSelector": policies::app("client"),
                "egress": [{"toEndpoints": [policies::app("server")], "toPorts": [{"ports": ports}]}],
            },
            {
                "endpointSelector": policies::app("server"),
                "ingress": [{"fromEndpoints": [policies::app("client")], "toPorts": [{"ports": ports}]}],
            },
        ],
    }));
    objects
}

/// What `warren-bench rounds` takes.
#[derive(Debug, clap::Args)]
pub struct RoundsArgs {
    /// Whom: the server of a pod.
    #[arg(long)]
    pub to: SocketAddr,
    /// For how long.
    #[arg(long)]
    pub seconds: u32,
}

/// Asks and waits for the answer, again and again on one connection; returns how often in a second.
pub fn rounds(args: &RoundsArgs) -> Result<f64> {
    let limit = Duration::from_secs(10);
    let mut stream = TcpStream::connect_timeout(&args.to, limit)
        .with_context(|| format!("cannot connect to {}", args.to))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(limit))?;
    let mut request = ECHO.to_vec();
    write_block(&mut request, &[7; REQUEST])?;
    let (start, length) = (Instant::now(), Duration::from_secs(args.seconds.into()));
    let mut count = 0_u32;
    while start.elapsed() < length {
        stream.write_all(&request).context("cannot send")?;
        read_block(&mut stream).context("no answer")?;
        read_block(&mut stream).context("the answer broke off")?;
        count += 1;
    }
    Ok(f64::from(count) / start.elapsed().as_secs_f64())
}
