//! The drivers behind [`WgDevice`]: the engine's must do what the fake's does.

use std::{
    io,
    time::{Duration, SystemTime},
};

use crate::support::{
    self, Engine, Lab,
    changes::{changes, peer, settings, v4, v6},
    public,
    traffic::{ping, within},
};
use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use warren_wireguard::{DeviceChange, DeviceError, DeviceState, Failure, Fake, Userspace, WgDevice};

#[tokio::test]
async fn the_engine_agrees_with_the_fake() -> Result<()> {
    let lab = Lab::new([Engine::warren()])?;
    let (engine, fake) = (Userspace::new(lab.nodes[0].run_dir()), Fake::new());
    fake.add_device("warren0");
    let changes = changes(2000);
    for part in changes.chunks(250) {
        // Twice is the same as once, for each change on its own.
        for change in part {
            fake.apply("warren0", std::slice::from_ref(change)).await?;
            fake.apply("warren0", std::slice::from_ref(change)).await?;
        }
        engine.apply("warren0", part).await?;
        ensure!(settings(engine.dump("warren0").await?) == settings(fake.dump("warren0").await?));
    }
    ensure!(!engine.dump("warren0").await?.peers.is_empty());
    for driver_state in [clear(&engine).await?, clear(&fake).await?] {
        ensure!(driver_state.peers.is_empty() && driver_state.public_key.is_none());
    }
    Ok(())
}

async fn clear(device: &impl WgDevice) -> Result<DeviceState> {
    device.apply("warren0", &[DeviceChange::Clear]).await?;
    Ok(device.dump("warren0").await?)
}

#[tokio::test]
async fn a_thousand_peers_in_one_call() -> Result<()> {
    let lab = Lab::new([Engine::warren()])?;
    let engine = Userspace::new(lab.nodes[0].run_dir());
    let mut changes = vec![DeviceChange::SetDevice {
        private_key: lab.nodes[0].key.clone(),
        listen_port: support::PORT,
    }];
    for n in 0..1000 {
        changes.push(DeviceChange::SetPeer {
            public_key: peer(n),
            pre_shared_key: None,
            endpoint: None,
            keepalive_seconds: 0,
        });
        for prefix in [v4(n, 24), v6(n)] {
            changes.push(DeviceChange::AddAllowedIp {
                public_key: peer(n),
                prefix,
            });
        }
    }
    engine.apply("warren0", &changes).await?;
    let state = engine.dump("warren0").await?;
    ensure!(state.public_key == Some(public(&lab.nodes[0].key)) && state.listen_port == support::PORT);
    ensure!(state.peers.len() == 1000 && state.peers.iter().all(|peer| peer.allowed_ips.len() == 2));
    Ok(())
}

#[tokio::test]
async fn handshakes_and_traffic_are_reported() -> Result<()> {
    let lab = Lab::new([Engine::warren(), Engine::warren()])?;
    lab.mesh(true)?;
    let (a, b) = (&lab.nodes[0], &lab.nodes[1]);
    let before = SystemTime::now() - Duration::from_secs(1);
    ping(a, b.inner_v4(), 1000)?;
    for (node, other) in [(a, b), (b, a)] {
        let driver = Userspace::new(node.run_dir());
        // A packet is counted after it was handed on, so the answer may be here before its count.
        let counted = async {
            while driver.stats("warren0").await?.received_packets < 3 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(Duration::from_secs(10), counted).await??;
        let state = driver.dump("warren0").await?;
        let peer = &state.peers[0];
        ensure!(peer.public_key == public(&other.key), "{peer:?}");
        ensure!(peer.endpoint == Some(other.outer(true).parse()?), "{peer:?}");
        ensure!(
            peer.last_handshake
                .is_some_and(|at| at > before && at <= SystemTime::now()),
            "{peer:?}"
        );
        ensure!(peer.received_bytes > 3000 && peer.sent_bytes > 3000, "{peer:?}");
        let stats = driver.stats("warren0").await?;
        ensure!(
            stats.handshakes >= 1 && stats.sent_packets >= 3 && stats.received_packets >= 3,
            "{stats:?}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn errors_say_what_to_do() -> Result<()> {
    let mut lab = Lab::new([Engine::warren()])?;
    let driver = Userspace::new(lab.nodes[0].run_dir());
    driver.ping().await?;
    ensure!(driver.devices().await? == ["warren0"]);
    ensure!(matches!(driver.dump("warren9").await, Err(DeviceError::Absent(name)) if name == "warren9"));
    ensure!(matches!(
        driver.stats("warren9").await,
        Err(DeviceError::Refused { .. })
    ));

    let taken = support::traffic::join(within(&lab.nodes[0], || {
        Ok(std::net::UdpSocket::bind("0.0.0.0:51999")?)
    }))?;
    let change = DeviceChange::SetDevice {
        private_key: support::key(),
        listen_port: 51999,
    };
    let error = driver.apply("warren0", &[change]).await.unwrap_err().to_string();
    ensure!(error.contains("port is in use"), "{error}");
    ensure!(driver.dump("warren0").await?.public_key.is_none());
    drop(taken);

    driver.detach("warren0").await?;
    ensure!(matches!(
        driver.dump("warren0").await,
        Err(DeviceError::Absent(_))
    ));
    driver.attach("warren0").await?;
    driver.rekey("warren0").await?;
    driver.dump("warren0").await?;
    // A dead engine leaves its sockets behind.
    lab.nodes[0].stop(Signal::SIGKILL)?;
    ensure!(matches!(driver.ping().await, Err(DeviceError::Absent(_))));
    ensure!(matches!(
        driver.apply("warren0", &[DeviceChange::Clear]).await,
        Err(DeviceError::Absent(_))
    ));
    Ok(())
}

#[tokio::test]
async fn the_fake_fails_when_told_to() -> Result<()> {
    let fake = Fake::new();
    ensure!(matches!(fake.dump("warren0").await, Err(DeviceError::Absent(_))));
    fake.add_device("warren0");
    let peers: Vec<_> = (0..3)
        .map(|n| DeviceChange::SetPeer {
            public_key: peer(n),
            pre_shared_key: None,
            endpoint: None,
            keepalive_seconds: 0,
        })
        .collect();
    fake.fail_apply(2, Failure::Refused("full".into()));
    ensure!(
        matches!(fake.apply("warren0", &peers).await, Err(DeviceError::Refused { reason, .. }) if reason == "full")
    );
    ensure!(fake.dump("warren0").await?.peers.len() == 2 && fake.take_log().len() == 2);
    fake.fail_dump(Failure::Io(io::ErrorKind::ConnectionReset));
    ensure!(matches!(fake.dump("warren0").await, Err(DeviceError::Io { .. })));
    fake.apply("warren0", &peers).await?;
    let at = SystemTime::now();
    fake.set_handshake("warren0", &peer(1), at);
    fake.set_transfer("warren0", &peer(1), 5, 6);
    fake.roam("warren0", &peer(1), "192.0.2.9:1".parse()?);
    let state = fake.dump("warren0").await?;
    let changed = state
        .peers
        .iter()
        .find(|state| state.public_key == peer(1))
        .unwrap();
    ensure!(changed.last_handshake == Some(at) && (changed.received_bytes, changed.sent_bytes) == (5, 6));
    fake.remove_device("warren0");
    ensure!(matches!(
        fake.apply("warren0", &[]).await,
        Err(DeviceError::Absent(_))
    ));
    Ok(())
}

/// Without WireGuard in the kernel, the kernel's driver says so; with it, an absent device is absent.
#[tokio::test]
async fn the_kernel_driver_tells_an_absent_device_from_an_absent_kernel_module() -> Result<()> {
    let kernel = warren_wireguard::Kernel::connect()?;
    let result = kernel.dump("warren-none").await;
    match warren_wireguard::kernel_available().await {
        true => ensure!(matches!(result, Err(DeviceError::Absent(_))), "{result:?}"),
        false => {
            let error = result.unwrap_err().to_string();
            ensure!(error.contains("has no WireGuard"), "{error}");
        }
    }
    Ok(())
}
