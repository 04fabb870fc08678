//! Routes, rules, devices, MTU and events, each in a namespace of its own.

mod common;

use std::process::Command;

use common::{in_namespace, ip};
use futures::StreamExt as _;
use warren_net::{Error, Family, LinkConfig, LinkEvent, LinkKind, Net, Route, RouteKind, Rule};

fn route(table: u32, destination: &str, kind: RouteKind, metric: u32) -> Route {
    Route {
        table,
        destination: destination.parse().expect("prefix"),
        kind,
        metric,
    }
}

fn desired(ifindex: u32) -> Vec<Route> {
    let via = |src: &str| RouteKind::Via {
        ifindex,
        src: Some(src.parse().expect("address")),
    };
    vec![
        route(4151, "10.244.2.0/24", via("192.0.2.1"), 0),
        route(4151, "10.244.2.0/24", RouteKind::Blackhole, 4_000_000_000),
        route(4151, "10.244.1.0/24", RouteKind::Throw, 0),
        route(4151, "10.244.0.0/16", RouteKind::Blackhole, 4_000_000_001),
        route(254, "10.244.1.0/24", RouteKind::Blackhole, 4_000_000_000),
        route(4152, "192.0.2.2/32", RouteKind::Via { ifindex, src: None }, 0),
        route(4151, "fd00:10:244:2::/64", via("2001:db8::1"), 0),
        route(4151, "fd00:10:244:2::/64", RouteKind::Blackhole, 4_000_000_000),
        route(4151, "fd00:10:244:1::/64", RouteKind::Throw, 0),
        route(254, "fd00:10:244:1::/64", RouteKind::Blackhole, 4_000_000_000),
        route(4152, "2001:db8::2/128", RouteKind::Via { ifindex, src: None }, 0),
    ]
}

async fn node() -> (Net, u32) {
    ip("link add eth0 type veth peer name far");
    ip("addr add 192.0.2.1/24 dev eth0");
    ip("addr add 2001:db8::1/64 dev eth0 nodad");
    ip("link set eth0 up");
    ip("link set far up");
    let net = Net::open().await.expect("netlink");
    let tunnel = net.ensure_tun("warren0").await.expect("tun");
    let config = LinkConfig {
        up: Some(true),
        quiet: true,
        ..LinkConfig::default()
    };
    net.configure_link(tunnel, &config).await.expect("configure");
    (net, tunnel)
}

#[test]
fn routes_are_made_once_and_only_ours_are_removed() {
    in_namespace(async || {
        let (net, tunnel) = node().await;
        ip("route add 10.9.0.0/24 dev eth0 table 4151");
        ip("route add blackhole 10.8.0.0/24 proto 142 table 4151");
        let desired = desired(tunnel);
        let changes = net.apply_routes(&desired).await.expect("apply");
        assert!(changes.failed.is_empty(), "{:?}", changes.failed);
        assert_eq!(changes.added.len(), desired.len());
        assert!(
            net.apply_routes(&desired).await.expect("apply").is_empty(),
            "the second time changes nothing"
        );

        let changes = net.apply_routes(&desired[..1]).await.expect("apply");
        assert_eq!(changes.removed.len(), desired.len() - 1, "{changes:?}");
        assert_eq!(net.routes().await.expect("routes"), desired[..1]);
        let foreign = ip("route show table 4151");
        assert!(
            foreign.contains("10.9.0.0/24 dev eth0") && foreign.contains("blackhole 10.8.0.0/24"),
            "{foreign}"
        );
        assert!(ip("route show").contains("192.0.2.0/24 dev eth0"));
    });
}

#[test]
fn routes_are_replaced_in_place() {
    in_namespace(async || {
        let (net, tunnel) = node().await;
        net.apply_routes(&desired(tunnel)).await.expect("apply");
        let second = net.ensure_tun("warren1").await.expect("tun");
        let config = LinkConfig {
            up: Some(true),
            quiet: true,
            ..LinkConfig::default()
        };
        net.configure_link(second, &config).await.expect("configure");
        // Another device, another source, and a remote prefix that becomes this node's own.
        let mut changed = desired(second);
        changed[0].kind = RouteKind::Throw;
        changed[6].kind = RouteKind::Throw;
        changed[8].kind = RouteKind::Via {
            ifindex: second,
            src: None,
        };
        let changes = net.apply_routes(&changed).await.expect("apply");
        assert!(
            changes.failed.is_empty() && changes.added.is_empty() && changes.removed.is_empty(),
            "{changes:?}"
        );
        assert_eq!(changes.replaced.len(), 5, "{changes:?}");
        assert!(net.apply_routes(&changed).await.expect("apply").is_empty());
        assert_eq!(
            net.routes().await.expect("routes").len(),
            changed.len(),
            "nothing was left behind"
        );
    });
}

#[test]
fn a_refused_route_does_not_keep_the_others_back() {
    in_namespace(async || {
        let (net, tunnel) = node().await;
        ip("route add 10.7.0.0/24 dev eth0 table 4151");
        let foreign = route(4151, "10.7.0.0/24", RouteKind::Blackhole, 0);
        let no_source = RouteKind::Via {
            ifindex: tunnel,
            src: Some("203.0.113.9".parse().expect("address")),
        };
        let no_source = route(4151, "10.244.3.0/24", no_source, 0);
        let good = route(
            4151,
            "10.244.4.0/24",
            RouteKind::Via {
                ifindex: tunnel,
                src: None,
            },
            0,
        );
        let changes = net
            .apply_routes(&[foreign, no_source, good.clone()])
            .await
            .expect("apply");
        assert_eq!(changes.added, [good]);
        let errors: Vec<_> = changes.failed.iter().map(|(_, error)| error.errno()).collect();
        assert_eq!(errors, [Some(libc::EEXIST), Some(libc::EINVAL)]);
        assert!(
            ip("route show table 4151").contains("10.7.0.0/24 dev eth0"),
            "not ours: left alone"
        );
    });
}

#[test]
fn rules_are_made_once_and_only_ours_are_removed() {
    in_namespace(async || {
        let net = Net::open().await.expect("netlink");
        ip("rule add pref 90 from 10.5.0.0/24 lookup 4151");
        let rule = |family, priority, from: Option<&str>, table| Rule {
            family,
            priority,
            from: from.map(|net| net.parse().expect("prefix")),
            to: None,
            table,
        };
        let desired = [
            rule(Family::V4, 90, None, 4151),
            rule(Family::V4, 91, Some("10.244.1.0/24"), 4152),
            rule(Family::V6, 90, None, 4151),
            rule(Family::V6, 91, Some("fd00:10:244:1::/64"), 4152),
        ];
        let changes = net.apply_rules(&desired).await.expect("apply");
        assert!(changes.failed.is_empty(), "{:?}", changes.failed);
        assert_eq!(changes.added.len(), 4);
        assert!(net.apply_rules(&desired).await.expect("apply").is_empty());
        let changes = net.apply_rules(&desired[..1]).await.expect("apply");
        assert_eq!(changes.removed.len(), 3);
        assert_eq!(net.rules().await.expect("rules"), desired[..1]);
        let rules = ip("rule show");
        assert!(rules.contains("from 10.5.0.0/24 lookup 4151"), "{rules}");
        assert!(rules.contains("from all lookup main"), "{rules}");
    });
}

#[test]
fn the_tunnel_device_is_kept_and_configured_once() {
    in_namespace(async || {
        let net = Net::open().await.expect("netlink");
        let ifindex = net.ensure_tun("warren0").await.expect("tun");
        assert_eq!(net.ensure_tun("warren0").await.expect("tun"), ifindex);
        let link = net.link_by_name("warren0").await.expect("links").expect("there");
        assert_eq!(
            (link.kind.clone(), link.up, link.arphrd, link.txqueuelen),
            (LinkKind::Tun, false, 65534, 10_000)
        );
        let config = LinkConfig {
            mtu: Some(1412),
            up: Some(true),
            link_address: Some("169.254.41.51".parse().expect("address")),
            rp_filter: Some(2),
            quiet: true,
            ..LinkConfig::default()
        };
        assert!(net.configure_link(ifindex, &config).await.expect("configure"));
        assert!(
            !net.configure_link(ifindex, &config).await.expect("configure"),
            "the second time changes nothing"
        );
        let link = net.link_by_name("warren0").await.expect("links").expect("there");
        assert!(link.up && link.mtu == 1412 && !link.multicast, "{link:?}");
        let addresses = ip("addr show dev warren0");
        assert!(
            addresses.contains("inet 169.254.41.51/32 scope link"),
            "{addresses}"
        );
        assert!(
            !addresses.contains("inet6"),
            "no address of the kernel's making: {addresses}"
        );
        assert_eq!(
            warren_net::sysctl("net/ipv4/conf/warren0/rp_filter").expect("sysctl"),
            "2"
        );

        net.delete_link(ifindex).await.expect("delete");
        net.delete_link(ifindex)
            .await
            .expect("deleting twice is no error");
        assert!(matches!(
            net.configure_link(ifindex, &config).await,
            Err(Error::NoSuchLink(_))
        ));
    });
}

#[test]
fn a_foreign_device_of_our_name_is_refused() {
    in_namespace(async || {
        let net = Net::open().await.expect("netlink");
        ip("link add warren0 type bridge");
        let error = net
            .ensure_tun("warren0")
            .await
            .expect_err("a bridge is no TUN device");
        assert_eq!(
            error.to_string(),
            "the device warren0 is of kind bridge, not tun: remove it or give it another name"
        );
        assert!(matches!(net.ensure_tun("a/b").await, Err(Error::BadName(_))));
    });
}

#[test]
fn the_wireguard_probe_leaves_nothing_behind() {
    in_namespace(async || {
        let net = Net::open().await.expect("netlink");
        let has = net.kernel_has_wireguard().await.expect("probe");
        assert_eq!(net.links().await.expect("links").len(), 1, "only loopback");
        // Either the kernel makes a device, or says what it lacks; both ways agree with the probe.
        assert_eq!(net.ensure_wireguard("warren0").await.is_ok(), has);
    });
}

#[test]
fn the_underlay_decides_the_mtu() {
    in_namespace(async || {
        let (net, _) = node().await;
        ip("link set eth0 mtu 1450");
        ip("route add 198.51.100.0/24 via 192.0.2.9 mtu 1400");
        let address = |text: &str| text.parse().expect("address");
        let found = net
            .underlay_mtu(&[address("192.0.2.2"), address("203.0.113.1")])
            .await
            .expect("look up");
        assert_eq!((found.mtu, found.ipv6), (Some(1450), false));
        assert_eq!(found.unreachable, [address("203.0.113.1")]);
        assert_eq!(found.tunnel(), Some(1450 - 68));
        let eth0 = net
            .link_by_name("eth0")
            .await
            .expect("links")
            .expect("there")
            .ifindex;
        assert_eq!(found.devices, [(eth0, 1450)].into());
        let found = net
            .underlay_mtu(&[address("198.51.100.1"), address("2001:db8::2")])
            .await
            .expect("look up");
        assert_eq!((found.mtu, found.tunnel()), (Some(1400), Some(1400 - 88)));
        assert_eq!(net.underlay_mtu(&[]).await.expect("look up").tunnel(), None);
    });
}

#[test]
fn changes_are_reported() {
    in_namespace(async || {
        let (net, tunnel) = node().await;
        net.apply_routes(&desired(tunnel)).await.expect("apply");
        let mut events = net.watch().expect("watch");
        ip("link add br0 type bridge");
        let appeared = events
            .by_ref()
            .filter_map(async |event| match event {
                LinkEvent::Changed(link) if link.name == "br0" => Some(link),
                _ => None,
            })
            .boxed_local()
            .next()
            .await
            .expect("event");
        assert_eq!(appeared.kind, LinkKind::Bridge);

        let until = async |events: &mut (dyn futures::Stream<Item = LinkEvent> + Unpin),
                           wanted: LinkEvent| {
            let mut seen = Vec::new();
            loop {
                let event = events.next().await.expect("the stream goes on");
                if event == wanted {
                    return seen;
                }
                seen.push(event);
            }
        };
        let eth0 = net
            .link_by_name("eth0")
            .await
            .expect("links")
            .expect("there")
            .ifindex;
        ip("addr add 192.0.2.77/24 dev eth0");
        until(
            &mut events,
            LinkEvent::AddressAdded(eth0, "192.0.2.77/24".parse().expect("prefix")),
        )
        .await;
        ip("addr del 192.0.2.77/24 dev eth0");
        until(
            &mut events,
            LinkEvent::AddressRemoved(eth0, "192.0.2.77/24".parse().expect("prefix")),
        )
        .await;
        ip("route flush table 4151");
        until(&mut events, LinkEvent::RoutingChanged).await;

        // A port that leaves its bridge is not gone.
        let far = net
            .link_by_name("far")
            .await
            .expect("links")
            .expect("there")
            .ifindex;
        ip("link set far master br0");
        ip("link set far nomaster");
        ip("link del br0");
        let seen = until(&mut events, LinkEvent::Removed(appeared.ifindex)).await;
        assert!(!seen.contains(&LinkEvent::Removed(far)), "{seen:?}");
        ip("link del eth0");
        until(&mut events, LinkEvent::Removed(far)).await;
    });
}

#[test]
fn lost_events_are_reported() {
    in_namespace(async || {
        let net = Net::open().await.expect("netlink");
        let mut events = net.watch().expect("watch");
        let script: String = (0..4000)
            .map(|n| format!("addr add 10.1.{}.{}/32 dev lo\n", n / 250, n % 250))
            .collect();
        let file = std::env::temp_dir().join(format!("warren-net-batch-{}", std::process::id()));
        std::fs::write(&file, script).expect("write");
        // Nobody reads the socket meanwhile: this blocks the only thread.
        let status = Command::new("ip").arg("-batch").arg(&file).status().expect("ip");
        std::fs::remove_file(&file).expect("remove");
        assert!(status.success());
        while events.next().await.expect("the stream goes on") != LinkEvent::Resync {}
        ip("addr add 10.9.9.9/32 dev lo");
        let last = LinkEvent::AddressAdded(1, "10.9.9.9/32".parse().expect("prefix"));
        while events.next().await.expect("the stream goes on") != last {}
    });
}
