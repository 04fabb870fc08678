//! Attaching to real devices in private namespaces, and traffic through them.

use std::{
    io,
    net::UdpSocket,
    path::Path as FilePath,
    time::{Duration, Instant},
};

use super::{
    config, connect_pod, dropped, ip,
    isolation::{Peer, command, ifindex, ip as ip_command, isolated},
    open_policies, pod, set_owners,
};
use warren_abi::VERSION;

use crate::{AttachMode, Attachment, Config, Datapath, Error, Path, Role};

const PATIENCE: Duration = Duration::from_secs(10);

fn with(pins: &FilePath, attach: AttachMode) -> Config {
    Config {
        attach,
        ..config(pins)
    }
}

/// Runs a test with TCX and with clsact.
fn both_modes(test: fn(&FilePath, AttachMode)) {
    for mode in [AttachMode::Tcx, AttachMode::Clsact] {
        isolated(move |pins| test(pins, mode));
    }
}

fn attachment(ifindex: u32, role: Role, healthy: bool) -> Attachment {
    Attachment {
        ifindex,
        role,
        healthy,
    }
}

/// Sends from the pod until the host has it, or somebody counts a drop.
fn pod_to_host(peer: &Peer, source: &str, destination: &str, mut dropped: impl FnMut() -> bool) -> bool {
    let receiver = UdpSocket::bind((destination, 0)).expect("binds");
    receiver.set_nonblocking(true).expect("sets an option");
    let target = receiver.local_addr().expect("is bound");
    let source = source.to_owned();
    await_either(
        || {
            peer.run({
                let source = source.clone();
                move || send(&source, target)
            })
        },
        || receives(&receiver),
        &mut dropped,
    )
}

/// Sends from the host until the pod has it, or somebody counts a drop.
fn host_to_pod(peer: &Peer, destination: &str, mut dropped: impl FnMut() -> bool) -> bool {
    let address = destination.to_owned();
    let receiver = peer.run(move || {
        let receiver = UdpSocket::bind((address.as_str(), 0)).expect("binds");
        receiver.set_nonblocking(true).expect("sets an option");
        receiver
    });
    let target = receiver.local_addr().expect("is bound");
    let any = if destination.contains(':') {
        "::"
    } else {
        "0.0.0.0"
    };
    await_either(|| send(any, target), || receives(&receiver), &mut dropped)
}

fn send(source: &str, target: std::net::SocketAddr) {
    // Errors are the neighbour's answers to packets before; what counts is what arrives.
    drop(
        UdpSocket::bind((source, 0))
            .expect("binds")
            .send_to(b"warren", target),
    );
}

fn receives(socket: &UdpSocket) -> bool {
    match socket.recv(&mut [0; 16]) {
        Ok(_) => true,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
        Err(error) => panic!("{error}"),
    }
}

fn await_either(
    mut act: impl FnMut(),
    mut first: impl FnMut() -> bool,
    mut second: impl FnMut() -> bool,
) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        act();
        for _ in 0..20 {
            if first() {
                return true;
            }
            if second() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    panic!("neither arrived nor was counted as dropped");
}

#[test]
fn a_pods_traffic() {
    both_modes(|pins, mode| {
        let peer = connect_pod();
        let device = ifindex("pod0");
        let mut datapath = Datapath::open(&with(pins, mode)).unwrap();
        datapath.attach(device, Role::Pod).unwrap();
        assert_eq!(
            datapath.attached().unwrap(),
            [attachment(device, Role::Pod, true)]
        );
        let counted = counter(&datapath, "unknown-endpoint");
        assert!(
            !pod_to_host(&peer, "10.244.1.2", "10.244.1.1", counted),
            "unknown pods are cut off"
        );
        datapath.set_endpoint(&pod(device)).unwrap();
        open_policies(&mut datapath);
        let never = || false;
        assert!(pod_to_host(&peer, "10.244.1.2", "10.244.1.1", never));
        assert!(
            pod_to_host(&peer, "fd00:10:244:1::2", "fd00:10:244:1::1", never),
            "with neighbour discovery"
        );
        assert!(host_to_pod(&peer, "10.244.1.2", never));
        assert!(host_to_pod(&peer, "fd00:10:244:1::2", never));
        let spoofed = counter(&datapath, "spoofed-address");
        assert!(
            !pod_to_host(&peer, "10.244.1.66", "10.244.1.1", spoofed),
            "an address that is not its own"
        );
        drop(datapath);
        assert!(
            pod_to_host(&peer, "10.244.1.2", "10.244.1.1", never),
            "with nobody there"
        );
        let mut datapath = Datapath::open(&with(pins, mode)).unwrap();
        assert_eq!(
            datapath.attached().unwrap(),
            [attachment(device, Role::Pod, true)],
            "adopted"
        );
        assert_eq!(datapath.endpoints().unwrap(), [pod(device)], "adopted");
        datapath.remove_endpoint(device).unwrap();
        let counted = counter(&datapath, "unknown-endpoint");
        assert!(
            !host_to_pod(&peer, "10.244.1.2", counted),
            "a pod that is gone gets nothing"
        );
    });
}

/// Tells whether more packets were dropped for a reason than when it was made.
fn counter<'a>(datapath: &'a Datapath, reason: &'a str) -> impl FnMut() -> bool + 'a {
    let before = dropped(datapath, reason);
    move || dropped(datapath, reason) > before
}

#[test]
fn roles_are_exchanged_in_place() {
    both_modes(|pins, mode| {
        let mut datapath = Datapath::open(&with(pins, mode)).unwrap();
        ip_command("link add veth0 type veth peer name veth1");
        let device = ifindex("veth0");
        for role in [Role::Barrier, Role::Tunnel { slot: 2 }, Role::Pod, Role::Barrier] {
            datapath.attach(device, role).unwrap();
            datapath.attach(device, role).unwrap();
            assert_eq!(datapath.attached().unwrap(), [attachment(device, role, true)]);
        }
        datapath.detach(device).unwrap();
        datapath.detach(device).unwrap();
        assert_eq!(datapath.attached().unwrap(), []);
    });
}

#[test]
fn modes_replace_each_other() {
    isolated(|pins| {
        ip_command("link add veth0 type veth peer name veth1");
        let device = ifindex("veth0");
        for mode in [AttachMode::Clsact, AttachMode::Tcx, AttachMode::Clsact] {
            let mut datapath = Datapath::open(&with(pins, mode)).unwrap();
            datapath.attach(device, Role::Barrier).unwrap();
            assert_eq!(
                datapath.attached().unwrap(),
                [attachment(device, Role::Barrier, true)]
            );
            let links = std::fs::read_dir(pins.join("warren/links")).unwrap().count();
            let expected = if mode == AttachMode::Tcx { 3 } else { 1 };
            assert_eq!(links, expected, "{mode:?}: the tracer, and the links of TCX");
        }
    });
}

#[test]
fn a_deleted_device() {
    both_modes(|pins, mode| {
        let mut datapath = Datapath::open(&with(pins, mode)).unwrap();
        ip_command("link add veth0 index 1234 type veth peer name veth1");
        datapath.attach(1234, Role::Barrier).unwrap();
        ip_command("link del veth0");
        assert_eq!(
            datapath.attached().unwrap(),
            [attachment(1234, Role::Barrier, false)]
        );
        assert!(matches!(
            datapath.attach(1234, Role::Barrier),
            Err(Error::NoDevice(1234))
        ));
        ip_command("link add veth0 index 1234 type veth peer name veth1");
        assert_eq!(
            datapath.attached().unwrap(),
            [attachment(1234, Role::Barrier, false)],
            "severed"
        );
        datapath.attach(1234, Role::Barrier).unwrap();
        assert_eq!(
            datapath.attached().unwrap(),
            [attachment(1234, Role::Barrier, true)]
        );
        ip_command("link del veth0");
        datapath.detach(1234).unwrap();
        assert_eq!(datapath.attached().unwrap(), []);
    });
}

/// A program of somebody else, pinned.
fn foreign_program(pins: &FilePath) -> (Datapath, String) {
    // Any program would do: one of ours with maps of its own.
    let foreign = Datapath::open(&Config {
        pin_dir: pins.join("foreign"),
        ..config(pins)
    })
    .unwrap();
    let path = pins.join("foreign/program");
    crate::sys::pin(foreign.programs.fd("tun_in").unwrap(), &path).unwrap();
    (foreign, path.display().to_string())
}

#[test]
fn a_foreign_program_in_front_is_overtaken() {
    isolated(|pins| {
        let mut datapath = Datapath::open(&with(pins, AttachMode::Tcx)).unwrap();
        ip_command("link add veth0 type veth peer name veth1");
        let device = ifindex("veth0");
        datapath.attach(device, Role::Barrier).unwrap();
        let (foreign, _) = foreign_program(pins);
        let program = foreign.programs.fd("tun_in").unwrap();
        let _link = crate::sys::tcx_attach(program, device, crate::sys::Direction::Ingress).unwrap();
        assert_eq!(
            datapath.attached().unwrap(),
            [attachment(device, Role::Barrier, false)]
        );
        datapath.attach(device, Role::Barrier).unwrap();
        assert_eq!(
            datapath.attached().unwrap(),
            [attachment(device, Role::Barrier, true)]
        );
        // The kernel takes a link that nobody holds away a little later.
        let links = || crate::sys::tcx_links(device, crate::sys::Direction::Ingress).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while links().len() > 2 && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(links().len(), 2, "ours once, and the foreign one");
    });
}

#[test]
fn a_foreign_filter_in_front_is_overtaken() {
    isolated(|pins| {
        let mut datapath = Datapath::open(&with(pins, AttachMode::Clsact)).unwrap();
        ip_command("link add veth0 type veth peer name veth1");
        let device = ifindex("veth0");
        let (_foreign, program) = foreign_program(pins);
        command("tc", "qdisc add dev veth0 clsact");
        for preference in [1, 10] {
            let filter = format!("pref {preference} bpf direct-action object-pinned {program}");
            command("tc", &format!("filter add dev veth0 ingress {filter}"));
            datapath.attach(device, Role::Barrier).unwrap();
            assert_eq!(
                datapath.attached().unwrap(),
                [attachment(device, Role::Barrier, true)]
            );
        }
        let filter = format!("pref 1 bpf direct-action object-pinned {program}");
        command("tc", &format!("filter add dev veth0 ingress {filter}"));
        assert_eq!(
            datapath.attached().unwrap(),
            [attachment(device, Role::Barrier, false)]
        );
        datapath.attach(device, Role::Barrier).unwrap();
        assert_eq!(
            datapath.attached().unwrap(),
            [attachment(device, Role::Barrier, true)]
        );
        datapath.detach(device).unwrap();
        let shown = std::process::Command::new("tc")
            .args(["filter", "show", "dev", "veth0", "ingress"])
            .output();
        let shown = String::from_utf8(shown.unwrap().stdout).unwrap();
        assert!(
            shown.contains("program:[") || shown.contains("tun_in"),
            "the others stay: {shown}"
        );
        assert!(!shown.contains("warren_"), "{shown}");
    });
}

#[test]
fn what_is_refused() {
    isolated(|pins| {
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        assert!(matches!(
            datapath.attach(4321, Role::Barrier),
            Err(Error::NoDevice(4321))
        ));
        ip_command("tuntap add dev tun9 mode tun");
        let tun = ifindex("tun9");
        datapath.attach(tun, Role::Barrier).unwrap();
        assert!(
            matches!(datapath.attach(tun, Role::Pod), Err(Error::Invalid(_))),
            "no Ethernet"
        );
        assert!(matches!(
            datapath.attach(tun, Role::Tunnel { slot: 8 }),
            Err(Error::Invalid(_))
        ));
        datapath.set_endpoint(&pod(7)).unwrap();
        let error = datapath.set_endpoint(&pod(8)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "endpoint index 5 of device 8 is in use by device 7"
        );
        datapath.remove_endpoint(7).unwrap();
        datapath.set_endpoint(&pod(8)).unwrap();
        datapath.remove_endpoint(9).unwrap();
        datapath.remove_path(3).unwrap();
        datapath.remove_node_address(ip("192.168.0.9")).unwrap();
        datapath.remove_owner("10.0.0.0/8".parse().unwrap()).unwrap();
        let no_bpffs = Config {
            pin_dir: "/proc/sys".into(),
            ..config(pins)
        };
        assert!(matches!(Datapath::open(&no_bpffs), Err(Error::NotBpffs(_))));
        let narrow = Config {
            mark_mask: 0xfff,
            ..config(pins)
        };
        assert!(matches!(Datapath::open(&narrow), Err(Error::Invalid(_))));
    });
}

#[test]
fn what_is_set_is_read_back() {
    isolated(|pins| {
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        set_owners(&mut datapath);
        let owners = datapath.owners().unwrap();
        assert_eq!(owners.len(), 8);
        datapath.remove_owner("10.244.2.0/24".parse().unwrap()).unwrap();
        assert_eq!(datapath.owners().unwrap().len(), 7);
        let path = Path {
            ifindex: 9,
            receive_slots: 0b11,
        };
        datapath.set_path(65_535, path).unwrap();
        datapath.set_path(1, path).unwrap();
        assert_eq!(datapath.paths().unwrap(), [(1, path), (65_535, path)]);
        datapath.set_node_address(ip("fd00::1"), true).unwrap();
        datapath.set_node_address(ip("10.0.0.1"), false).unwrap();
        let nodes = datapath.node_addresses().unwrap();
        assert_eq!(
            nodes
                .iter()
                .map(|node| (node.address, node.own))
                .collect::<Vec<_>>(),
            [(ip("10.0.0.1"), false), (ip("fd00::1"), true)]
        );
    });
}

#[test]
fn as_many_entries_as_promised() {
    isolated(|pins| {
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        for index in 1..=crate::MAX_ENDPOINT_INDEX {
            datapath
                .set_endpoint(&crate::Endpoint {
                    index,
                    ..pod(u32::from(index))
                })
                .unwrap();
        }
        assert_eq!(datapath.endpoints().unwrap().len(), 4095);
        let owner = crate::Owner {
            kind: crate::OwnerKind::RemotePod,
            node: 7,
            identity: 0,
        };
        for number in 0..=u16::MAX {
            let [high, low] = number.to_be_bytes();
            let prefix = ipnet::Ipv4Net::new([10, high, low, 1].into(), 32).unwrap();
            datapath.set_owner(prefix.into(), owner).unwrap();
        }
        assert_eq!(datapath.owners().unwrap().len(), 65_536);
    });
}

/// Maps of another version are left to the links that use them, and go with the last of these.
#[test]
fn maps_of_another_version() {
    isolated(|pins| {
        ip_command("link add veth0 type veth peer name veth1");
        let device = ifindex("veth0");
        let mut old = Datapath::open(&config(pins)).unwrap();
        old.attach(device, Role::Barrier).unwrap();
        drop(old);
        let directory = pins.join("warren");
        std::fs::rename(directory.join(format!("v{VERSION}")), directory.join("v0")).unwrap();
        let mut new = Datapath::open(&config(pins)).unwrap();
        assert_eq!(
            new.attached().unwrap(),
            [attachment(device, Role::Barrier, false)],
            "still the old programs"
        );
        assert!(directory.join("v0").exists(), "the old programs use them");
        new.attach(device, Role::Barrier).unwrap();
        assert_eq!(new.attached().unwrap(), [attachment(device, Role::Barrier, true)]);
        assert!(!directory.join("v0").exists());
    });
}
