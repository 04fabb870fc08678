//! The nft tables and the forward chains, with real packets between private namespaces.

mod common;

use std::{net::UdpSocket, time::Duration};

use common::{Namespace, in_namespace, ip, nft, run, source, sysctl};
use warren_net::{Counter, ForwardTool, Net, NftConfig, nft as tables};

/// A node (the calling thread) with a pod, a far end behind the tunnel and another one behind the underlay. A veth
/// stands in for the tunnel: nft only looks at its name.
struct Node {
    net: Net,
    pod: Namespace,
    tunnel: Namespace,
    outside: Namespace,
    config: NftConfig,
}

const POD: &str = "10.244.1.5";
const POD6: &str = "fd00:10:244:1::5";
const REMOTE_POD: &str = "10.244.2.5";
const REMOTE_POD6: &str = "fd00:10:244:2::5";
const NODE: &str = "192.0.2.1";
const NODE6: &str = "2001:db8::1";

impl Node {
    async fn new() -> Self {
        sysctl("net/ipv4/ip_forward", "1");
        sysctl("net/ipv6/conf/all/forwarding", "1");
        let net = Net::open().await.expect("netlink");
        let (pod, tunnel, outside) = (Namespace::new(), Namespace::new(), Namespace::new());
        connect("vethpod", &pod);
        connect("warren0", &tunnel);
        connect("eth0", &outside);
        pod_side(&pod);
        far_side(&tunnel);
        far_side(&outside);
        ip(&format!("addr add {NODE}/24 dev eth0"));
        ip(&format!("addr add {NODE6}/64 dev eth0 nodad"));
        ip("addr add 10.244.1.1/32 dev vethpod");
        ip("addr add fd00:10:244:1::1/128 dev vethpod nodad");
        ip("addr add 169.254.41.51/32 dev warren0 scope link");
        outside.ip("addr add 192.0.2.2/24 dev peer");
        outside.ip("addr add 2001:db8::2/64 dev peer nodad");
        ip(&format!("route add {POD}/32 dev vethpod"));
        ip(&format!("route add {POD6}/128 dev vethpod"));
        let safe = [net
            .link_by_name("vethpod")
            .await
            .expect("links")
            .expect("there")
            .ifindex]
        .into();
        let config = NftConfig {
            tunnels: (0..4).map(|n| format!("warren{n}")).collect(),
            safe,
            pods: ["10.244.0.0/16", "fd00:10:244::/48"]
                .map(|net| net.parse().expect("prefix"))
                .into(),
            nodes: [NODE, "192.0.2.2", NODE6, "2001:db8::2"]
                .map(|a| a.parse().expect("address"))
                .into(),
            source_v4: Some(NODE.parse().expect("address")),
            source_v6: Some(NODE6.parse().expect("address")),
            mark_mask: 0x3f7f,
            tunnel_mark: 0x2000,
            masquerade_mark: tables::KUBE_PROXY_MARK,
            barrier: true,
        };
        Self {
            net,
            pod,
            tunnel,
            outside,
            config,
        }
    }

    /// Sends the remote pods' prefixes to a device.
    fn route_remote_pods(device: &str) {
        ip(&format!("route replace 10.244.2.0/24 dev {device} src {NODE}"));
        ip(&format!(
            "route replace fd00:10:244:2::/64 dev {device} src {NODE6}"
        ));
    }

    async fn counters(&self) -> [u64; 2] {
        let counters = self.net.nft_counters().await.expect("counters").expect("tables");
        [tables::CLEAR_OUT, tables::FORGED_IN].map(|name| packets(&counters, name))
    }
}

fn packets(counters: &[Counter], name: &str) -> u64 {
    counters
        .iter()
        .find(|counter| counter.name == name)
        .expect("counter")
        .packets
}

/// A veth `name` whose other end is `peer` in the namespace; no neighbour discovery is needed across it.
fn connect(name: &str, namespace: &Namespace) {
    ip(&format!("link add {name} type veth peer name peer"));
    namespace.take("peer");
    sysctl(&format!("net/ipv6/conf/{name}/accept_dad"), "0");
    namespace.run(|| {
        sysctl("net/ipv6/conf/peer/accept_dad", "0");
        ip("link set peer up");
    });
    ip(&format!("link set {name} up"));
    sysctl(&format!("net/ipv4/conf/{name}/proxy_arp"), "1");
    sysctl(&format!("net/ipv6/conf/{name}/proxy_ndp"), "1");
}

fn pod_side(pod: &Namespace) {
    pod.ip(&format!("addr add {POD}/32 dev peer"));
    pod.ip(&format!("addr add {POD6}/128 dev peer nodad"));
    pod.ip("route add 10.244.1.1/32 dev peer");
    pod.ip("route add fd00:10:244:1::1/128 dev peer");
    pod.ip("route add default via 10.244.1.1");
    pod.ip("route add default via fd00:10:244:1::1");
}

/// Answers for every remote pod.
fn far_side(far: &Namespace) {
    far.ip(&format!("addr add {REMOTE_POD}/32 dev lo"));
    far.ip(&format!("addr add {REMOTE_POD6}/128 dev lo nodad"));
    far.ip(&format!("addr add {REMOTE_POD6}/128 dev peer nodad"));
    far.ip("route add default dev peer");
    far.ip("route add default dev peer metric 1 via inet6 fe80::1 onlink");
}

fn sockets(pod: &Namespace, far: &Namespace) -> [(UdpSocket, UdpSocket, String); 2] {
    [
        (
            pod.udp(&format!("{POD}:0")),
            far.udp(&format!("{REMOTE_POD}:7000")),
            format!("{REMOTE_POD}:7000"),
        ),
        (
            pod.udp(&format!("[{POD6}]:0")),
            far.udp(&format!("[{REMOTE_POD6}]:7000")),
            format!("[{REMOTE_POD6}]:7000"),
        ),
    ]
}

/// Nothing waits in the socket.
fn assert_silent(socket: &UdpSocket) {
    socket
        .set_read_timeout(Some(Duration::from_millis(1)))
        .expect("timeout");
    assert!(socket.recv_from(&mut [0; 16]).is_err(), "something arrived");
    socket
        .set_read_timeout(Some(Duration::from_secs(5)))
        .expect("timeout");
}

const MASQUERADE: &str = "table inet cni { chain post { type nat hook postrouting priority srcnat; \
                          ip saddr 10.244.1.0/24 masquerade; ip6 saddr fd00:10:244:1::/64 masquerade; }; }";

#[test]
fn masquerade_leaves_mesh_traffic_alone() {
    in_namespace(async || {
        let node = Node::new().await;
        Node::route_remote_pods("warren0");
        nft(MASQUERADE);
        for (from, to, address) in &sockets(&node.pod, &node.tunnel) {
            let seen = source(from, to, address);
            assert_ne!(
                seen,
                from.local_addr().expect("address").ip(),
                "the masquerade works without our chain"
            );
        }
        node.net.apply_nft(&node.config).await.expect("apply");
        for (from, to, address) in &sockets(&node.pod, &node.tunnel) {
            assert_eq!(
                source(from, to, address),
                from.local_addr().expect("address").ip()
            );
        }
        // To the outside world it still happens.
        let (from, to) = (
            node.pod.udp(&format!("{POD}:0")),
            node.outside.udp("192.0.2.2:7001"),
        );
        let config = NftConfig {
            nodes: vec![NODE.parse().expect("address")],
            ..node.config.clone()
        };
        node.net.apply_nft(&config).await.expect("apply");
        assert_eq!(source(&from, &to, "192.0.2.2:7001").to_string(), NODE);
    });
}

#[test]
fn what_kube_proxy_marks_gets_the_nodes_own_address() {
    in_namespace(async || {
        let node = Node::new().await;
        Node::route_remote_pods("warren0");
        nft("table inet kube-proxy { \
               chain forward { type filter hook forward priority filter; meta mark set meta mark or 0x4000; }; \
               chain post { type nat hook postrouting priority srcnat; meta mark & 0x4000 != 0 masquerade; }; }");
        node.net.apply_nft(&node.config).await.expect("apply");
        for ((from, to, address), wanted) in sockets(&node.pod, &node.tunnel).iter().zip([NODE, NODE6]) {
            assert_eq!(source(from, to, address).to_string(), wanted);
        }
    });
}

#[test]
fn mesh_traffic_never_leaves_in_clear() {
    in_namespace(async || {
        let node = Node::new().await;
        Node::route_remote_pods("eth0");
        for (from, to, address) in &sockets(&node.pod, &node.outside) {
            source(from, to, address);
        }
        node.net.apply_nft(&node.config).await.expect("apply");
        // Masquerade would hide the pod behind the node's address.
        nft(MASQUERADE);
        for (from, to, address) in &sockets(&node.pod, &node.outside) {
            from.send_to(b"x", address).expect("send");
            assert_silent(to);
        }
        // From the host, and from the pod to a node.
        let to = node.outside.udp(&format!("{REMOTE_POD}:7002"));
        let host = common::udp(&format!("{NODE}:0"));
        assert!(
            host.send_to(b"x", format!("{REMOTE_POD}:7002")).is_err(),
            "a local sender is told"
        );
        assert_silent(&to);
        let (from, to) = (
            node.pod.udp(&format!("{POD}:0")),
            node.outside.udp("192.0.2.2:7003"),
        );
        from.send_to(b"x", "192.0.2.2:7003").expect("send");
        assert_silent(&to);
        assert_eq!(node.counters().await, [4, 0]);

        // Counters live through an update, and a device that becomes safe lets traffic through.
        let mut safe = node.config.clone();
        safe.safe.insert(
            node.net
                .link_by_name("eth0")
                .await
                .expect("links")
                .expect("there")
                .ifindex,
        );
        node.net.apply_nft(&safe).await.expect("apply");
        assert_eq!(node.counters().await, [4, 0]);
        source(&from, &to, "192.0.2.2:7003");
        node.net
            .apply_nft(&NftConfig {
                barrier: false,
                ..node.config.clone()
            })
            .await
            .expect("apply");
        source(&from, &to, "192.0.2.2:7003");
    });
}

#[test]
fn forged_sources_from_outside_are_dropped() {
    in_namespace(async || {
        let node = Node::new().await;
        let claims = |port: u16| {
            [
                (
                    node.outside.udp(&format!("{REMOTE_POD}:0")),
                    format!("{NODE}:{port}"),
                ),
                (
                    node.outside.udp(&format!("[{REMOTE_POD6}]:0")),
                    format!("[{NODE6}]:{port}"),
                ),
                (node.outside.udp("192.0.2.2:0"), format!("{POD}:{port}")),
            ]
        };
        node.outside.ip(&format!("route replace {POD}/32 via {NODE}"));
        let receivers = |port: u16| {
            let host = |address: &str| common::udp(&format!("{address}:{port}"));
            [
                host(NODE),
                host(&format!("[{NODE6}]")),
                node.pod.udp(&format!("{POD}:{port}")),
            ]
        };
        sysctl("net/ipv4/conf/all/rp_filter", "0");
        sysctl("net/ipv4/conf/eth0/rp_filter", "0");
        for ((from, address), to) in claims(7100).iter().zip(&receivers(7100)) {
            source(from, to, address);
        }
        node.net.apply_nft(&node.config).await.expect("apply");
        for ((from, address), to) in claims(7101).iter().zip(&receivers(7101)) {
            from.send_to(b"x", address).expect("send");
            assert_silent(to);
        }
        assert_eq!(node.counters().await, [0, 3]);
    });
}

#[test]
fn a_bridge_port_is_watched_too() {
    in_namespace(async || {
        let node = Node::new().await;
        // A pod on a bridge, and the underlay's device as another port of it.
        let (pod, outside) = (Namespace::new(), Namespace::new());
        ip("link add cni0 type bridge");
        ip("link set cni0 up");
        for (name, namespace, address) in [
            ("vethb", &pod, "10.244.1.6/16"),
            ("eth1", &outside, "10.244.2.6/16"),
        ] {
            connect(name, namespace);
            ip(&format!("link set {name} master cni0"));
            namespace.ip(&format!("addr add {address} dev peer"));
        }
        let (from, to) = (pod.udp("10.244.1.6:0"), outside.udp("10.244.2.6:7200"));
        source(&from, &to, "10.244.2.6:7200");
        let mut config = node.config.clone();
        for name in ["vethb", "cni0"] {
            config.safe.insert(
                node.net
                    .link_by_name(name)
                    .await
                    .expect("links")
                    .expect("there")
                    .ifindex,
            );
        }
        node.net.apply_nft(&config).await.expect("apply");
        from.send_to(b"x", "10.244.2.6:7200").expect("send");
        assert_silent(&to);
        let counters = node.net.nft_counters().await.expect("counters").expect("tables");
        assert_eq!(packets(&counters, tables::CLEAR_BRIDGE), 1);
    });
}

#[test]
fn tables_are_removed_without_a_trace() {
    in_namespace(async || {
        let node = Node::new().await;
        assert_eq!(node.net.nft_counters().await.expect("counters"), None);
        nft("table inet other { chain c { type filter hook input priority 0; }; }");
        let before = run("nft", &["list", "ruleset"]);
        node.net.remove_nft().await.expect("absent tables are no error");
        node.net.apply_nft(&node.config).await.expect("apply");
        node.net.apply_nft(&node.config).await.expect("apply");
        assert_eq!(
            node.net
                .nft_counters()
                .await
                .expect("counters")
                .map(|counters| counters.len()),
            Some(3)
        );
        // A table of another shape, as another version may have left it, is replaced.
        node.net.remove_nft().await.expect("remove");
        nft("table inet warren { chain in { type filter hook input priority 0; }; counter clear_out { }; }");
        node.net.apply_nft(&node.config).await.expect("replace");
        node.net.remove_nft().await.expect("remove");
        assert_eq!(run("nft", &["list", "ruleset"]), before);
    });
}

#[test]
fn a_forward_policy_of_iptables_is_overcome() {
    in_namespace(async || {
        let node = Node::new().await;
        Node::route_remote_pods("warren0");
        assert_eq!(node.net.forward_policy().await.expect("policy"), []);
        for tool in ["iptables-nft", "ip6tables-nft"] {
            run(tool, &["-P", "FORWARD", "DROP"]);
        }
        for (from, to, address) in &sockets(&node.pod, &node.tunnel) {
            from.send_to(b"x", address).expect("send");
            assert_silent(to);
        }
        let blocks = node.net.allow_forward().await.expect("allow");
        assert_eq!(blocks.len(), 2, "{blocks:?}");
        assert!(
            blocks
                .iter()
                .all(|block| block.tool == ForwardTool::IptablesNft && block.chain == "FORWARD")
        );
        assert_eq!(
            blocks[0].to_string(),
            "chain FORWARD of table ip filter (iptables-nft)"
        );
        for (from, to, address) in &sockets(&node.pod, &node.tunnel) {
            source(from, to, address);
        }
        assert_eq!(
            node.net.allow_forward().await.expect("allow"),
            [],
            "the second time changes nothing"
        );
        // The tool that owns the chain still understands it.
        let listing = run("iptables-nft", &["-S", "FORWARD"]);
        assert!(
            listing.contains("-A FORWARD -i warren+ -m comment --comment warren -j ACCEPT"),
            "{listing}"
        );
        node.net.revoke_forward().await.expect("revoke");
        node.net
            .revoke_forward()
            .await
            .expect("revoking twice is no error");
        assert_eq!(run("iptables-nft", &["-S", "FORWARD"]).trim(), "-P FORWARD DROP");
    });
}

#[test]
fn a_forward_policy_of_nft_is_overcome() {
    in_namespace(async || {
        let node = Node::new().await;
        Node::route_remote_pods("warren0");
        nft(
            "table inet fire-wall { chain drops { type filter hook forward priority 10; policy drop; }; \
             chain rejects { type filter hook forward priority 20; ct state established accept; reject; }; }",
        );
        let blocks = node.net.forward_policy().await.expect("policy");
        let names: Vec<_> = blocks
            .iter()
            .map(|block| (block.tool, block.chain.as_str()))
            .collect();
        assert_eq!(
            names,
            [(ForwardTool::Nft, "drops"), (ForwardTool::Nft, "rejects")]
        );
        assert_eq!(node.net.allow_forward().await.expect("allow"), blocks);
        for (from, to, address) in &sockets(&node.pod, &node.tunnel) {
            source(from, to, address);
        }
        assert_eq!(node.net.forward_policy().await.expect("policy"), []);
        node.net.revoke_forward().await.expect("revoke");
        assert_eq!(node.net.forward_policy().await.expect("policy"), blocks);
    });
}

#[test]
fn a_forward_policy_of_legacy_iptables_is_overcome() {
    in_namespace(async || {
        let node = Node::new().await;
        Node::route_remote_pods("warren0");
        for tool in ["iptables-legacy", "ip6tables-legacy"] {
            run(tool, &["-P", "FORWARD", "DROP"]);
        }
        let blocks = node.net.allow_forward().await.expect("allow");
        let legacy = |block: &warren_net::ForwardBlock| block.tool == ForwardTool::IptablesLegacy;
        assert!(blocks.len() == 2 && blocks.iter().all(legacy), "{blocks:?}");
        for (from, to, address) in &sockets(&node.pod, &node.tunnel) {
            source(from, to, address);
        }
        assert_eq!(
            node.net.allow_forward().await.expect("allow"),
            [],
            "the second time changes nothing"
        );
        node.net.revoke_forward().await.expect("revoke");
        assert_eq!(
            run("iptables-legacy", &["-S", "FORWARD"]).trim(),
            "-P FORWARD DROP"
        );
        assert_eq!(node.net.forward_policy().await.expect("policy"), blocks);
    });
}
