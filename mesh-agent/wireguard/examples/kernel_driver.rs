//! The driver of the kernel's WireGuard against the kernel's WireGuard.
//!
//! An example and not a test, because most machines' kernels have none: `cargo xtask vm --only driver` runs it in a
//! virtual machine. Exits non-zero when a check fails, and when the kernel has no WireGuard. Needs root.

#[path = "../tests/support/mod.rs"]
mod support;

use std::{
    collections::BTreeSet,
    future::Future,
    net::IpAddr,
    process::ExitCode,
    time::{Instant, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use ipnet::IpNet;
use support::{
    Engine, Lab, Node, PORT,
    changes::{changes, peer, settings, v4, v6},
    key, public,
    traffic::{Flow, join, tcp_echo, udp_echo, within},
    until,
};
use tokio::runtime::{Handle, Runtime};
use warren_model::PublicKey;
use warren_wireguard::{DeviceChange, DeviceError, DeviceState, Fake, Kernel, WgDevice, kernel_available};

/// Datagrams a second of each flow: what an emulated machine manages.
const RATE: u64 = 100;
const BYTES: usize = 200;
const DEVICE: &str = "warren0";

type Check = fn(&Runtime) -> Result<()>;

const CHECKS: &[(&str, Check)] = &[
    ("traffic_in_both_families_over_both_underlays", traffic),
    ("the_kernel_agrees_with_the_fake", agrees),
    ("changes_under_traffic_lose_nothing", changes_under_traffic),
    ("a_prefix_moves_between_peers", prefix_moves),
    ("foreign_peers_stay", foreign_peers),
    ("a_large_device_is_read_whole", large),
    ("errors_say_what_is_wrong", errors),
];

fn main() -> ExitCode {
    let runtime = Runtime::new().expect("a runtime");
    if !runtime.block_on(kernel_available()) {
        eprintln!("this kernel has no WireGuard: run it by `cargo xtask vm --only driver`");
        return ExitCode::FAILURE;
    }
    let wanted: Vec<_> = std::env::args().skip(1).collect();
    let mut failed = 0;
    for (name, check) in CHECKS {
        if !wanted.is_empty() && !wanted.iter().any(|wanted| name.contains(wanted.as_str())) {
            continue;
        }
        let start = Instant::now();
        match check(&runtime) {
            Ok(()) => println!("{name} ... ok ({:.1} s)", start.elapsed().as_secs_f64()),
            Err(error) => {
                println!("{name} ... FAILED: {error:#}");
                failed += 1;
            }
        }
    }
    println!("{failed} failed");
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// A driver in a node's namespace: its socket stays where it was made.
fn driver(runtime: &Runtime, node: &Node) -> Result<Kernel> {
    let handle: Handle = runtime.handle().clone();
    join(within(node, move || {
        let _entered = handle.enter();
        Ok(Kernel::connect()?)
    }))
}

fn add(other: &PublicKey, prefix: IpNet) -> DeviceChange {
    DeviceChange::AddAllowedIp {
        public_key: *other,
        prefix,
    }
}

fn remove(other: &PublicKey, prefix: IpNet) -> DeviceChange {
    DeviceChange::RemoveAllowedIp {
        public_key: *other,
        prefix,
    }
}

fn set_peer(public_key: PublicKey, endpoint: Option<&str>) -> Result<DeviceChange> {
    Ok(DeviceChange::SetPeer {
        public_key,
        pre_shared_key: None,
        endpoint: endpoint.map(str::parse).transpose()?,
        keepalive_seconds: 25,
    })
}

/// All that makes a node a member of the mesh.
fn wanted(node: &Node, lab: &Lab, outer_v6: bool) -> Result<Vec<DeviceChange>> {
    let mut changes = vec![DeviceChange::SetDevice {
        private_key: node.key.clone(),
        listen_port: PORT,
    }];
    for other in lab.nodes.iter().filter(|other| other.number != node.number) {
        let public_key = public(&other.key);
        changes.push(set_peer(public_key, Some(&other.outer(outer_v6)))?);
        changes.extend(other.prefixes().map(|prefix| add(&public_key, prefix)));
    }
    Ok(changes)
}

/// Nodes with kernel devices, configured by the driver alone; a driver for each.
fn mesh(runtime: &Runtime, count: usize, outer_v6: bool) -> Result<(Lab, Vec<Kernel>)> {
    let lab = Lab::new(std::iter::repeat_n(Engine::Kernel, count))?;
    let mut drivers = Vec::new();
    for node in &lab.nodes {
        let driver = driver(runtime, node)?;
        runtime.block_on(driver.apply(DEVICE, &wanted(node, &lab, outer_v6)?))?;
        drivers.push(driver);
    }
    Ok((lab, drivers))
}

/// What [`wanted`] makes of a device that had nothing.
fn desired(runtime: &Runtime, changes: &[DeviceChange]) -> Result<DeviceState> {
    let fake = Fake::new();
    fake.add_device(DEVICE);
    runtime.block_on(async {
        fake.apply(DEVICE, changes).await?;
        Ok(settings(fake.dump(DEVICE).await?))
    })
}

fn dump(runtime: &Runtime, driver: &Kernel) -> Result<DeviceState> {
    Ok(runtime.block_on(driver.dump(DEVICE))?)
}

fn same(found: DeviceState, wanted: &DeviceState) -> Result<()> {
    let found = settings(found);
    ensure!(
        found == *wanted,
        "the device has {found:#?}, wanted is {wanted:#?}"
    );
    Ok(())
}

fn traffic(runtime: &Runtime) -> Result<()> {
    for outer_v6 in [false, true] {
        let (lab, drivers) = mesh(runtime, 2, outer_v6)?;
        let before = SystemTime::now();
        let (a, b) = (&lab.nodes[0], &lab.nodes[1]);
        for (from, to) in [(a, b), (b, a)] {
            for address in [to.inner_v4(), to.inner_v6()] {
                udp_echo(from, to, address, 1300)?;
                tcp_echo(from, to, address, 200_000)?;
            }
        }
        for (node, driver) in lab.nodes.iter().zip(&drivers) {
            let state = dump(runtime, driver)?;
            let peer = &state.peers[0];
            ensure!(peer.last_handshake.is_some_and(|at| at >= before), "{peer:?}");
            ensure!(
                peer.received_bytes > 400_000 && peer.sent_bytes > 400_000,
                "{peer:?}"
            );
            same(state, &desired(runtime, &wanted(node, &lab, outer_v6)?)?)?;
            // Once more is no change.
            runtime.block_on(driver.apply(DEVICE, &wanted(node, &lab, outer_v6)?))?;
            same(
                dump(runtime, driver)?,
                &desired(runtime, &wanted(node, &lab, outer_v6)?)?,
            )?;
        }
        runtime.block_on(drivers[0].apply(DEVICE, &[DeviceChange::Clear]))?;
        let state = dump(runtime, &drivers[0])?;
        ensure!(state.peers.is_empty() && state.public_key.is_none(), "{state:?}");
    }
    Ok(())
}

fn agrees(runtime: &Runtime) -> Result<()> {
    let lab = Lab::new([Engine::Kernel])?;
    let (kernel, fake) = (driver(runtime, &lab.nodes[0])?, Fake::new());
    fake.add_device(DEVICE);
    let changes = changes(800);
    runtime.block_on(async {
        for part in changes.chunks(100) {
            fake.apply(DEVICE, part).await?;
            // Twice is the same as once, for each change on its own and for many in one call.
            for change in part {
                kernel.apply(DEVICE, std::slice::from_ref(change)).await?;
                kernel.apply(DEVICE, std::slice::from_ref(change)).await?;
            }
            let wanted = settings(fake.dump(DEVICE).await?);
            same(kernel.dump(DEVICE).await?, &wanted)?;
        }
        let wanted = settings(fake.dump(DEVICE).await?);
        ensure!(!wanted.peers.is_empty());
        kernel.apply(DEVICE, &[DeviceChange::Clear]).await?;
        kernel.apply(DEVICE, &changes).await?;
        same(kernel.dump(DEVICE).await?, &wanted)
    })
}

/// Flows in both directions and families; none of their datagrams may be lost while `work` runs.
fn under_traffic(a: &Node, b: &Node, work: impl FnOnce(&dyn Fn() -> u64) -> Result<()>) -> Result<()> {
    let mut flows = Vec::new();
    for (from, to) in [(a, b), (b, a)] {
        for address in [to.inner_v4(), to.inner_v6()] {
            flows.push(Flow::start(from, to, address, RATE, BYTES)?);
        }
    }
    until("every flow arrives", || {
        Ok(flows.iter().all(|flow| flow.received() > 10))
    })?;
    let received = || flows.iter().map(Flow::received).min().unwrap_or_default();
    let worked = work(&received);
    for flow in flows {
        let name = flow.name.clone();
        let figures = flow.finish()?;
        ensure!(
            figures.lost == 0 && figures.duplicated == 0,
            "{name}: {figures:?}"
        );
        println!("    {name}: {} sent, 0 lost", figures.sent);
    }
    worked
}

fn changes_under_traffic(runtime: &Runtime) -> Result<()> {
    let (lab, drivers) = mesh(runtime, 2, true)?;
    let (a, b) = (&lab.nodes[0], &lab.nodes[1]);
    let (other, stranger) = (public(&b.key), peer(7));
    let [own_v4, own_v6] = b.prefixes();
    let wanted = desired(runtime, &wanted(a, &lab, true)?)?;
    under_traffic(a, b, |received| {
        let (mut rounds, start) = (0_u32, received());
        while rounds < 20 || received() < start + 200 {
            // Beside, inside and around what the flows use; another peer comes and goes.
            let churn = [
                add(&other, v4(rounds % 64, 24)),
                add(&other, v6(rounds % 32 + 100)),
                add(&other, "10.2.128.0/17".parse()?),
                add(&other, "fd00::/16".parse()?),
                add(&other, own_v4),
                add(&other, own_v6),
                set_peer(stranger, None)?,
                add(&stranger, v4(rounds % 64 + 200, 24)),
                set_peer(other, None)?,
                remove(&other, v4(rounds % 64, 24)),
                remove(&other, v6(rounds % 32 + 100)),
                remove(&other, "10.2.128.0/17".parse()?),
                remove(&stranger, v4(rounds % 64 + 200, 24)),
                remove(&stranger, own_v4),
                remove(&other, "fd00::/16".parse()?),
                DeviceChange::RemovePeer(stranger),
                DeviceChange::RemovePeer(stranger),
            ];
            runtime.block_on(drivers[0].apply(DEVICE, &churn))?;
            rounds += 1;
        }
        println!("    {rounds} rounds of 17 changes");
        Ok(())
    })?;
    same(dump(runtime, &drivers[0])?, &wanted)
}

fn prefix_moves(runtime: &Runtime) -> Result<()> {
    let (lab, drivers) = mesh(runtime, 3, false)?;
    let [a, b, c] = &lab.nodes[..] else {
        anyhow::bail!("three nodes are wanted")
    };
    let (first, second) = (public(&b.key), public(&c.key));
    let moving: [IpAddr; 2] = [[10, 77, 0, 1].into(), "fd77::1".parse()?];
    let prefixes: [IpNet; 2] = ["10.77.0.0/16".parse()?, "fd77::/32".parse()?];
    for node in [b, c] {
        for address in moving {
            node.namespace.ip(&format!("addr add {address} dev lo"))?;
        }
    }
    a.namespace.ip("-6 route add fd77::/32 dev warren0")?;
    under_traffic(a, b, |_| {
        for _ in 0..3 {
            for (owner, node, loser) in [(&first, b, &second), (&second, c, &first)] {
                let moves = prefixes.map(|prefix| add(owner, prefix));
                runtime.block_on(drivers[0].apply(DEVICE, &moves))?;
                // The one who has lost it is asked to give it back: nothing happens.
                let late = prefixes.map(|prefix| remove(loser, prefix));
                runtime.block_on(drivers[0].apply(DEVICE, &late))?;
                for address in moving {
                    udp_echo(a, node, address, 100)
                        .with_context(|| format!("{address} at node {}", node.number))?;
                }
                for peer in dump(runtime, &drivers[0])?.peers {
                    let has = prefixes.iter().all(|prefix| peer.allowed_ips.contains(prefix));
                    let some = prefixes.iter().any(|prefix| peer.allowed_ips.contains(prefix));
                    let owns = peer.public_key == *owner;
                    ensure!(has == owns && some == owns, "{peer:?}");
                }
            }
        }
        Ok(())
    })
}

fn foreign_peers(runtime: &Runtime) -> Result<()> {
    let (lab, drivers) = mesh(runtime, 2, true)?;
    let (a, driver) = (&lab.nodes[0], &drivers[0]);
    let foreign = public(&key());
    let text = foreign.to_string();
    let ips = "198.51.100.0/24,2001:db8:9::/48";
    let script = format!(
        "wg genpsk | wg set {DEVICE} peer {text} preshared-key /dev/stdin allowed-ips {ips} endpoint 192.0.2.200:9"
    );
    a.exec(&["sh", "-c", &script])?;
    let secrets = || -> Result<String> {
        Ok(String::from_utf8(
            a.exec(&["wg", "show", DEVICE, "preshared-keys"])?.stdout,
        )?)
    };
    let before = (secrets()?, dump(runtime, driver)?);
    ensure!(before.1.peers.len() == 2 && before.1.peers.iter().any(|peer| peer.public_key == foreign));
    let churn = [
        set_peer(peer(1), None)?,
        add(&peer(1), v4(9, 24)),
        add(&peer(2), v4(10, 24)),
        remove(&public(&lab.nodes[1].key), "198.51.100.0/24".parse()?),
        remove(&peer(1), v4(9, 24)),
        DeviceChange::RemovePeer(peer(1)),
        DeviceChange::RemovePeer(peer(2)),
    ];
    runtime.block_on(driver.apply(DEVICE, &churn))?;
    runtime.block_on(driver.apply(DEVICE, &wanted(a, &lab, true)?))?;
    ensure!(secrets()? == before.0, "a pre-shared key changed");
    same(dump(runtime, driver)?, &settings(before.1))
}

fn large(runtime: &Runtime) -> Result<()> {
    let lab = Lab::new([Engine::Kernel])?;
    let driver = driver(runtime, &lab.nodes[0])?;
    let mut changes = vec![DeviceChange::SetDevice {
        private_key: key(),
        listen_port: PORT,
    }];
    for n in 0..500 {
        changes.push(set_peer(peer(n), None)?);
        changes.extend([add(&peer(n), v4(n, 24)), add(&peer(n), v6(n))]);
    }
    // One peer that no message can hold.
    let many: BTreeSet<IpNet> = (0..3000).map(|n| v4(1000 + n, 32)).collect();
    changes.extend(many.iter().map(|prefix| add(&peer(3), *prefix)));
    let wanted = desired(runtime, &changes)?;
    runtime.block_on(driver.apply(DEVICE, &changes))?;
    same(dump(runtime, &driver)?, &wanted)
}

/// The error of something that must fail.
fn error_of<T>(
    runtime: &Runtime,
    future: impl Future<Output = Result<T, DeviceError>>,
) -> Result<DeviceError> {
    let error = runtime.block_on(future).err();
    error.context("it succeeded")
}

fn errors(runtime: &Runtime) -> Result<()> {
    let lab = Lab::new([Engine::Kernel])?;
    let node = &lab.nodes[0];
    let driver = driver(runtime, node)?;
    let clear = [DeviceChange::Clear];
    let absent = error_of(runtime, driver.apply("warren9", &clear))?;
    ensure!(matches!(absent, DeviceError::Absent(_)), "{absent}");
    let wrong = error_of(runtime, driver.dump("eth0"))?;
    ensure!(wrong.to_string().contains("not a WireGuard device"), "{wrong}");
    // The device is up, so that the port is bound at once.
    let taken = join(within(node, || Ok(std::net::UdpSocket::bind("[::]:51999")?)))?;
    let change = [DeviceChange::SetDevice {
        private_key: key(),
        listen_port: 51999,
    }];
    let busy = error_of(runtime, driver.apply(DEVICE, &change))?;
    ensure!(busy.to_string().contains("port is in use"), "{busy}");
    drop(taken);
    Ok(runtime.block_on(driver.apply(DEVICE, &change))?)
}
