//! Two nodes with the same engine on one veth, and TCP between them.

use std::{
    fs,
    process::{Child, Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{
    report::{Better, Measured},
    support::{
        Engine, Lab, Node, PORT, peer_line,
        relay::{Impairment, Relay},
        run, until,
    },
};

/// The MTU of the tunnel devices, as everybody's default is.
const MTU: u32 = 1420;

pub(super) struct Pair {
    pub(super) name: &'static str,
    pub(super) engine: Engine,
    lab: Lab,
    server: Option<Child>,
    /// What is between the nodes.
    relay: Option<Relay>,
}

impl Pair {
    /// Two nodes that have shaken hands.
    pub(super) fn new(name: &'static str, engine: &Engine) -> Result<Self> {
        let mut pair = Self::apart(name, engine)?;
        pair.join()
            .and_then(|()| pair.serve())
            .with_context(|| format!("setting up {name}"))?;
        Ok(pair)
    }

    /// Two nodes with a bad network between them.
    pub(super) fn impaired(name: &'static str, engine: &Engine, impairment: Impairment) -> Result<Self> {
        let mut pair = Self::apart(name, engine)?;
        pair.relay = Some(Relay::start(&pair.lab, impairment)?);
        Relay::mesh(&pair.lab)?;
        pair.serve().with_context(|| format!("setting up {name}"))?;
        Ok(pair)
    }

    /// Two nodes that know nothing of each other.
    fn apart(name: &'static str, engine: &Engine) -> Result<Self> {
        Ok(Self {
            name,
            engine: engine.clone(),
            lab: Lab::new([engine.clone(), engine.clone()])?,
            server: None,
            relay: None,
        })
    }

    pub(super) fn sender(&self) -> &Node {
        &self.lab.nodes[0]
    }

    pub(super) fn receiver(&self) -> &Node {
        &self.lab.nodes[1]
    }

    fn join(&self) -> Result<()> {
        let (a, b) = (self.sender(), self.receiver());
        a.namespace.ip(&format!(
            "link add direct0 type veth peer name direct0 netns {}",
            b.namespace.name()
        ))?;
        for (node, other) in [(a, b), (b, a)] {
            node.namespace
                .ip(&format!("addr add 198.51.100.{}/24 dev direct0", node.number))?;
            node.namespace.ip("link set direct0 up")?;
            node.namespace
                .ip(&format!("link set {} mtu {MTU}", node.device))?;
            node.set_device()?;
            let [v4, v6] = other.prefixes();
            node.must_set(&format!(
                "{}endpoint=198.51.100.{}:{PORT}\nallowed_ip={v4}\nallowed_ip={v6}\n",
                peer_line(&other.key),
                other.number
            ))?;
        }
        Ok(())
    }

    /// Shakes hands and starts the server of the measurements.
    fn serve(&mut self) -> Result<()> {
        let (a, b) = (self.sender(), self.receiver());
        super::support::traffic::ping(a, b.inner_v4(), 56)?;
        let mut server = Command::new("ip");
        server.args(["netns", "exec", b.namespace.name(), "iperf3", "-s"]);
        server.stdin(Stdio::null()).stdout(Stdio::null());
        self.server = Some(server.spawn().context("iperf3 cannot be started")?);
        let pid = self.server.as_ref().map_or(0, Child::id);
        // Port 5201, state LISTEN, of the server's namespace.
        until("iperf3 listens", || {
            let table = fs::read_to_string(format!("/proc/{pid}/net/tcp6"))?;
            Ok(table
                .lines()
                .any(|line| line.contains(":1451 ") && line.contains(" 0A ")))
        })
    }

    /// What `iperf3` measures: bits a second received, over both directions, and the engines' CPU time.
    pub(super) fn tcp(
        &self,
        name: &'static str,
        seconds: u64,
        options: &[&str],
        cpu_name: Option<&'static str>,
    ) -> Result<Vec<Measured>> {
        let (cpu, others, start) = (self.cpu_seconds()?, busy_seconds()?, Instant::now());
        let end = self.iperf(seconds, options)?;
        let (cpu, others) = (self.cpu_seconds()? - cpu, busy_seconds()? - others);
        let elapsed = start.elapsed().as_secs_f64();
        let number = |value: &Value, key: &str| value[key].as_f64().unwrap_or(0.0);
        let received = |what: &str| number(&end["end"]["sum_received"], what);
        let reverse = |what: &str| number(&end["end"]["sum_received_bidir_reverse"], what);
        let bits = received("bits_per_second") + reverse("bits_per_second");
        ensure!(bits > 0.0, "iperf3 says that nothing arrived: {}", end["error"]);
        let gigabytes = (received("bytes") + reverse("bytes")) / 1e9;
        let usage = &end["end"]["cpu_utilization_percent"];
        let load = (number(usage, "host_total") + number(usage, "remote_total")) / 100.0 * seconds as f64;
        let foreign = ((others - cpu - load) / elapsed).max(0.0);
        let mut measured = vec![Measured::new(name, "Gb/s", Better::More, bits / 1e9).beside(foreign)];
        if let Some(name) = cpu_name {
            measured.push(Measured::new(name, "s/GB", Better::Less, cpu / gigabytes));
        }
        Ok(measured)
    }

    pub(super) fn iperf(&self, seconds: u64, options: &[&str]) -> Result<Value> {
        let (seconds, address) = (seconds.to_string(), self.receiver().inner_v4().to_string());
        let mut arguments = vec!["netns", "exec", self.sender().namespace.name(), "iperf3"];
        arguments.extend(["-J", "-c", &address, "-t", &seconds]);
        arguments.extend(options);
        let output = run("ip", arguments)?;
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Round-trip times while a TCP stream flows the same way.
    pub(super) fn ping_under_load(&self, seconds: u64) -> Result<Vec<Measured>> {
        let address = self.receiver().inner_v4().to_string();
        let count = (seconds * 10).saturating_sub(5).max(5).to_string();
        let namespace = self.sender().namespace.name();
        std::thread::scope(|scope| {
            let stream = scope.spawn(|| self.iperf(seconds, &[]));
            let arguments = [
                "netns", "exec", namespace, "ping", "-q", "-i", "0.1", "-c", &count, &address,
            ];
            let output = run("ip", arguments)?;
            stream
                .join()
                .map_err(|_| anyhow::anyhow!("the thread of iperf3 panicked"))??;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            // rtt min/avg/max/mdev = 0.040/0.050/0.060/0.010 ms
            let average = text
                .rsplit_once(" = ")
                .and_then(|(_, figures)| figures.split('/').nth(1)?.parse().ok())
                .with_context(|| format!("ping said: {text}"))?;
            Ok(vec![Measured::new(
                "ping_under_load_ms",
                "ms",
                Better::Less,
                average,
            )])
        })
    }

    /// Checksum and segmentation offloads of the underlay.
    pub(super) fn set_offloads(&self, on: bool) -> Result<()> {
        let state = if on { "on" } else { "off" };
        for node in &self.lab.nodes {
            let mut arguments = vec!["netns", "exec", node.namespace.name(), "ethtool", "-K", "direct0"];
            for feature in ["tx", "sg", "tso", "gso", "gro", "tx-udp-segmentation"] {
                arguments.extend([feature, state]);
            }
            run("ip", arguments)?;
        }
        Ok(())
    }

    /// The larger engine's memory at its highest.
    pub(super) fn peak_memory(&self) -> Result<Measured> {
        let mut peak: f64 = 0.0;
        for node in &self.lab.nodes {
            let status = fs::read_to_string(format!("/proc/{}/status", node.pid()))?;
            let kib: f64 = status
                .lines()
                .find_map(|line| {
                    line.strip_prefix("VmHWM:")?
                        .trim()
                        .strip_suffix(" kB")?
                        .parse()
                        .ok()
                })
                .context("no VmHWM")?;
            peak = peak.max(kib / 1024.0);
        }
        Ok(Measured::new("peak_rss_mib", "MiB", Better::Less, peak))
    }

    /// The processes of both engines.
    pub(super) fn processes(&self) -> String {
        let pids: Vec<_> = self.lab.nodes.iter().map(|node| node.pid().to_string()).collect();
        pids.join(",")
    }

    /// CPU time of both engines so far.
    fn cpu_seconds(&self) -> Result<f64> {
        let mut nanoseconds = 0u64;
        for node in &self.lab.nodes {
            for task in fs::read_dir(format!("/proc/{}/task", node.pid()))? {
                let text = fs::read_to_string(task?.path().join("schedstat"))?;
                nanoseconds += text.split(' ').next().unwrap_or_default().parse::<u64>()?;
            }
        }
        Ok(nanoseconds as f64 / 1e9)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
        }
        if let Some(relay) = self.relay.take() {
            let _ = relay.finish();
        }
    }
}

/// CPU time of the whole machine so far: user, nice, system, interrupts.
fn busy_seconds() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    let figures: Vec<u64> = text
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .filter_map(|figure| figure.parse().ok())
        .collect();
    ensure!(figures.len() > 6, "/proc/stat: {text}");
    // Ticks are a hundredth of a second on every architecture (USER_HZ).
    Ok((figures[0] + figures[1] + figures[2] + figures[5] + figures[6]) as f64 / 100.0)
}
