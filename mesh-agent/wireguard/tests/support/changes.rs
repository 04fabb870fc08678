//! Changes of devices, the same for every driver.

use ipnet::IpNet;
use warren_model::{PreSharedKey, PublicKey};
use warren_wireguard::{DeviceChange, DeviceState};

pub fn peer(n: u32) -> PublicKey {
    let mut bytes = [9; 32];
    bytes[..4].copy_from_slice(&n.to_le_bytes());
    PublicKey::from_bytes(bytes).unwrap()
}

pub fn v4(n: u32, length: u8) -> IpNet {
    IpNet::new(std::net::Ipv4Addr::from(0x0a00_0000 | n << 8 | 1).into(), length).unwrap()
}

pub fn v6(n: u32) -> IpNet {
    IpNet::new(
        std::net::Ipv6Addr::from(0xfd00_u128 << 112 | u128::from(n) << 64).into(),
        64,
    )
    .unwrap()
}

/// Many changes of every kind, the same every time.
pub fn changes(count: u32) -> Vec<DeviceChange> {
    let mut seed = 0x1234_5678_u32;
    let mut next = |below: u32| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) % below
    };
    let key = super::key();
    let mut changes = vec![DeviceChange::SetDevice {
        private_key: key.clone(),
        listen_port: 51999,
    }];
    for _ in 0..count {
        let public_key = peer(next(20));
        let prefix = if next(2) == 0 {
            v4(next(64), 20 + next(13) as u8)
        } else {
            v6(next(32))
        };
        changes.push(match next(10) {
            0..3 => DeviceChange::SetPeer {
                public_key,
                pre_shared_key: (next(4) == 0)
                    .then(|| PreSharedKey::from_bytes(&[1 + next(3) as u8; 32]))
                    .flatten(),
                endpoint: (next(2) == 0)
                    .then(|| ([192, 0, 2, next(250) as u8], 1 + next(60_000) as u16).into()),
                keepalive_seconds: next(3) as u16 * 1000,
            },
            3..7 => DeviceChange::AddAllowedIp { public_key, prefix },
            7 | 8 => DeviceChange::RemoveAllowedIp { public_key, prefix },
            _ => DeviceChange::RemovePeer(public_key),
        });
    }
    changes.push(DeviceChange::SetDevice {
        private_key: key,
        listen_port: 51998,
    });
    changes
}

/// What two devices must agree on: all but handshakes and traffic.
pub fn settings(mut state: DeviceState) -> DeviceState {
    for peer in &mut state.peers {
        (peer.received_bytes, peer.sent_bytes, peer.last_handshake) = (0, 0, None);
    }
    state
}
