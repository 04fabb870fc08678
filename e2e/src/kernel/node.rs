//! A node of which only the programs and their maps exist.

use std::{
    net::IpAddr,
    path::Path,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result, ensure};
use ipnet::IpNet;
use warren_abi::MarkCodec;
use warren_bpf::{
    AttachMode, Config, Datapath, Endpoint, Owner, OwnerKind, Role,
    testing::{TestAnswer, TestPacket},
};

/// The programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// At the pod with this index.
    FromPod(u16),
    /// At the pod with this index.
    ToPod(u16),
    /// At the tunnel.
    TunIn,
    /// At the tunnel.
    TunEg,
    /// At the uplink.
    BarrierIn,
    /// At the uplink.
    BarrierOut,
    /// At the sockets of the host.
    ToHost,
}

impl Hook {
    /// Name of the program.
    pub fn name(self) -> &'static str {
        match self {
            Self::FromPod(_) => "from_pod",
            Self::ToPod(_) => "to_pod",
            Self::TunIn => "tun_in",
            Self::TunEg => "tun_eg",
            Self::BarrierIn => "barrier_in",
            Self::BarrierOut => "barrier_out",
            Self::ToHost => "to_host",
        }
    }
}

/// Where a packet came in, and its mark.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// The device that it came in by; 0 = made on this host.
    pub ingress_ifindex: u32,
    /// Its mark.
    pub mark: u32,
}

/// A node with pods 1 to `n`, a tunnel and an uplink. Its devices are never up: nothing but test runs meets a program.
#[derive(Debug)]
pub struct Node {
    /// The programs and maps.
    pub datapath: Datapath,
    /// How marks are written.
    pub marks: MarkCodec,
    pods: Vec<u32>,
    /// The tunnel's device.
    pub tunnel: u32,
    /// The uplink.
    pub uplink: u32,
}

/// Mask of the marks.
const MARK_MASK: u32 = 0x3f7f;
/// Where pods live.
const POD_POOLS: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/48"];
/// Where services live.
const SERVICES: [&str; 2] = ["10.96.0.0/16", "fd00:10:96::/112"];

impl Node {
    /// Makes devices for pods in the namespace of the calling thread, and loads the programs.
    pub fn new(pins: &Path, pods: u16) -> Result<Self> {
        let prefixes = |list: [&str; 2]| {
            list.map(|text| text.parse::<IpNet>().expect("is a prefix"))
                .to_vec()
        };
        let mut datapath = Datapath::open(&Config {
            pin_dir: pins.join("warren"),
            mark_mask: MARK_MASK,
            pod_pools: prefixes(POD_POOLS),
            attach: AttachMode::Auto,
            encryption: true,
            service_cidrs: prefixes(SERVICES),
            node_ports: (30_000, 32_767),
            wireguard_ports: (51_871, 51_874),
        })?;
        // Two devices per veth, and no more than both ends are needed for.
        let mut devices = Vec::new();
        for _ in 0..(pods + 3) / 2 {
            devices.extend(veth()?);
        }
        let (tunnel, uplink) = (devices[0], devices[1]);
        datapath.attach(tunnel, Role::Tunnel { slot: 0 })?;
        datapath.attach(uplink, Role::Barrier)?;
        Ok(Self {
            datapath,
            marks: MarkCodec::new(MARK_MASK).context("the mask has too few bits")?,
            pods: devices.split_off(2),
            tunnel,
            uplink,
        })
    }

    /// Device of a pod, by its index (1 and up).
    pub fn device(&self, index: u16) -> u32 {
        self.pods[usize::from(index) - 1]
    }

    /// MAC address of a pod.
    pub fn mac(index: u16) -> [u8; 6] {
        let [high, low] = index.to_be_bytes();
        [0x0a, 0x58, 0, 0, high, low]
    }

    /// Mark of what a pod sent, egress not judged yet.
    pub fn unjudged(&self, index: u16) -> u32 {
        self.marks.encode(index)
    }

    /// Mark of what a pod sent, egress judged.
    pub fn judged(&self, index: u16) -> u32 {
        self.marks.encode(warren_abi::judged(index))
    }

    /// Mark of what the tunnel decrypted.
    pub fn decrypted(&self) -> u32 {
        self.marks.encode(warren_abi::TUNNEL_MARK)
    }

    /// Sets a pod of this node, with itself as the owner of its addresses.
    pub fn set_pod(&mut self, index: u16, addresses: &[IpAddr], identity: u32) -> Result<()> {
        for address in addresses {
            self.own(*address, OwnerKind::LocalPod, 0, identity)?;
        }
        self.datapath.set_endpoint(&Endpoint {
            ifindex: self.device(index),
            index,
            mac: Self::mac(index),
            addresses: addresses.to_vec(),
            identity,
        })?;
        Ok(())
    }

    /// Says who owns an address. Node 0 is this one.
    pub fn own(&mut self, address: IpAddr, kind: OwnerKind, node: u16, identity: u32) -> Result<()> {
        let owner = Owner { kind, node, identity };
        Ok(self.datapath.set_owner(address.into(), owner)?)
    }

    /// Runs a program once.
    pub fn run(&self, hook: Hook, frame: &[u8], seen: Seen) -> Result<TestAnswer> {
        self.repeat(hook, frame, seen, 1)
    }

    /// Runs a program some times on the same packet.
    pub fn repeat(&self, hook: Hook, frame: &[u8], seen: Seen, repeat: u32) -> Result<TestAnswer> {
        let ifindex = match hook {
            Hook::FromPod(index) | Hook::ToPod(index) => self.device(index),
            Hook::TunIn | Hook::TunEg => self.tunnel,
            Hook::BarrierIn | Hook::BarrierOut => self.uplink,
            // What a socket gets is on the device that it came in by.
            Hook::ToHost if seen.ingress_ifindex != 0 => seen.ingress_ifindex,
            Hook::ToHost => 1,
        };
        let packet = TestPacket {
            frame,
            ifindex,
            ingress_ifindex: seen.ingress_ifindex,
            mark: seen.mark,
            repeat,
        };
        Ok(self.datapath.test_run(hook.name(), &packet)?)
    }
}

/// Makes a pair of devices and returns their numbers.
fn veth() -> Result<[u32; 2]> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let names = [format!("dev{number}a"), format!("dev{number}b")];
    let words = [
        "link", "add", &names[0], "type", "veth", "peer", "name", &names[1],
    ];
    let output = Command::new("ip")
        .args(words)
        .output()
        .context("cannot run ip (iproute2)")?;
    ensure!(
        output.status.success(),
        "cannot make a veth: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let index = |name: &String| nix::net::if_::if_nametoindex(name.as_str()).context("the veth is gone");
    Ok([index(&names[0])?, index(&names[1])?])
}
