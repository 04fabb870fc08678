//! Pods that are older than the agent: whose is which veth?

mod common;

use std::{collections::BTreeSet, net::IpAddr, os::unix::fs::symlink, path::PathBuf};

use common::{Namespace, in_namespace, ip, source};
use warren_net::{Net, PodVeth, SeenBy};

fn addresses(texts: &[&str]) -> BTreeSet<IpAddr> {
    texts.iter().map(|text| text.parse().expect("address")).collect()
}

/// A folder of namespaces, as container runtimes keep it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("warren-net-{name}-{}", std::process::id()));
        std::fs::create_dir(&path).expect("folder");
        Self(path)
    }

    fn add(&self, name: &str, namespace: &Namespace) -> PathBuf {
        let path = self.0.join(name);
        symlink(namespace.path(), &path).expect("link");
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// One pod by ptp, with host routes, and one on a bridge, which has been talked to.
fn pods() -> [Namespace; 2] {
    let [routed, bridged] = [Namespace::new(), Namespace::new()];
    for (name, namespace) in [("veth1", &routed), ("veth2", &bridged)] {
        ip(&format!(
            "link add {name} type veth peer name eth0 netns {}",
            namespace.tid()
        ));
        ip(&format!("link set {name} up"));
        namespace.ip("link set eth0 up");
    }
    routed.ip("link set eth0 address 02:00:00:00:00:01");
    routed.ip("addr add 10.244.1.5/32 dev eth0");
    routed.ip("addr add fd00:10:244:1::5/128 dev eth0 nodad");
    ip("route add 10.244.1.5/32 dev veth1");
    ip("route add fd00:10:244:1::5/128 dev veth1");
    ip("link add cni0 type bridge");
    ip("addr add 10.244.1.1/24 dev cni0");
    ip("link set cni0 up");
    ip("link set veth2 master cni0");
    bridged.ip("link set eth0 address 02:00:00:00:00:02");
    bridged.ip("addr add 10.244.1.6/24 dev eth0");
    let (from, to) = (common::udp("10.244.1.1:0"), bridged.udp("10.244.1.6:7000"));
    source(&from, &to, "10.244.1.6:7000");
    [routed, bridged]
}

async fn find(folder: &Folder) -> [PodVeth; 2] {
    let net = Net::open().await.expect("netlink");
    let found = net.pod_veths(&folder.0).await.expect("find");
    let index = async |name: &str| {
        net.link_by_name(name)
            .await
            .expect("links")
            .expect("there")
            .ifindex
    };
    let indexes = [index("veth1").await, index("veth2").await];
    let found: [PodVeth; 2] = found.try_into().expect("two pods");
    assert_eq!([found[0].ifindex, found[1].ifindex], indexes);
    found
}

#[test]
fn by_their_namespaces() {
    in_namespace(async || {
        let [routed, bridged] = pods();
        let folder = Folder::new("by-namespace");
        let paths = [folder.add("cni-1", &routed), folder.add("cni-2", &bridged)];
        // What is no namespace, and a second path to the same one, do no harm.
        std::fs::write(folder.0.join("note"), "x").expect("write");
        folder.add("cni-3", &routed);
        let [first, second] = find(&folder).await;
        assert!(
            matches!(&first.seen_by, SeenBy::Namespace(path) if *path == paths[0] || path.ends_with("cni-3"))
        );
        assert_eq!(first.addresses, addresses(&["10.244.1.5", "fd00:10:244:1::5"]));
        assert_eq!(first.mac, Some([2, 0, 0, 0, 0, 1]));
        assert_eq!(second.seen_by, SeenBy::Namespace(paths[1].clone()));
        assert_eq!(
            (second.mac, second.addresses),
            (Some([2, 0, 0, 0, 0, 2]), addresses(&["10.244.1.6"]))
        );
    });
}

#[test]
fn by_routes_and_bridge_tables() {
    in_namespace(async || {
        let [_routed, _bridged] = pods();
        let folder = Folder::new("by-tables");
        let [first, second] = find(&folder).await;
        assert_eq!(first.seen_by, SeenBy::Route);
        assert_eq!(first.addresses, addresses(&["10.244.1.5", "fd00:10:244:1::5"]));
        assert_eq!(second.seen_by, SeenBy::Bridge);
        assert_eq!(
            (second.mac, second.addresses),
            (Some([2, 0, 0, 0, 0, 2]), addresses(&["10.244.1.6"]))
        );
    });
}

#[test]
fn a_pair_of_other_namespaces_with_both_numbers_alike_is_not_taken() {
    in_namespace(async || {
        let net = Net::open().await.expect("netlink");
        let (far, node, stranger) = (Namespace::new(), Namespace::new(), Namespace::new());
        let pair = |name: &str, peer: &Namespace| {
            format!(
                "link add {name} index 50 type veth peer name eth0 index 60 netns {}",
                peer.tid()
            )
        };
        ip(&pair("uplink", &far));
        node.ip(&pair("veth1", &stranger));
        stranger.ip("addr add 10.244.9.9/32 dev eth0");
        let folder = Folder::new("alike");
        folder.add("cni-1", &stranger);
        assert_eq!(net.pod_veths(&folder.0).await.expect("find"), []);
        // The real other end is recognised.
        far.ip("addr add 10.244.9.8/32 dev eth0");
        folder.add("cni-2", &far);
        let found = net.pod_veths(&folder.0).await.expect("find");
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].addresses, addresses(&["10.244.9.8"]));
    });
}

#[test]
fn a_veth_of_another_namespace_with_the_same_number_is_not_taken() {
    in_namespace(async || {
        let net = Net::open().await.expect("netlink");
        // Two pods of another node whose indexes may be the same as here.
        let (other, stranger) = (Namespace::new(), Namespace::new());
        ip("link add veth1 type veth peer name veth2");
        other.ip(&format!(
            "link add veth1 type veth peer name eth0 netns {}",
            stranger.tid()
        ));
        stranger.ip("addr add 10.244.9.9/32 dev eth0");
        let folder = Folder::new("stranger");
        folder.add("cni-1", &stranger);
        assert_eq!(net.pod_veths(&folder.0).await.expect("find"), []);
    });
}
