//! Two nodes, with a `keyd` of the test's own, or with nothing but a snapshot on disk.

mod support;

use support::{Mesh, Pod, eventually, run};
use warren_agent_api::{Attachment, AttachmentKey, Request, Response};
use warren_model::PodRef;
use warren_wireguard::{DeviceChange, Userspace, WgDevice as _};

/// Every pod reaches every other, both families.
fn all_reach_all(pods: &[&Pod]) {
    for from in pods {
        for to in pods.iter().filter(|to| to.netns != from.netns) {
            for address in [&to.v4, &to.v6] {
                eventually(&format!("{} reaches {address}", from.netns), || {
                    from.ping(address)
                });
            }
        }
    }
}

fn refusal(response: Response) -> (String, bool) {
    match response {
        Response::Error { message, retry } => (message, retry),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn pods_talk_through_the_tunnel_and_the_agent_may_die() {
    let mut mesh = Mesh::new(2);
    mesh.start();
    let first = mesh.nodes[0].add_pod(10);
    let second = mesh.nodes[1].add_pod(10);
    all_reach_all(&[&first, &second]);
    for node in &mesh.nodes {
        let status = node.encrypt_status();
        assert!(status.enabled, "{:?}", status.mismatches);
        assert_eq!(status.peers.len(), 1);
        assert!(status.peers[0].last_handshake_seconds.is_some());
        assert!(status.peers[0].pre_shared_key, "{:?}", status.peers);
        // Nothing is configured: a kernel with WireGuard must be used.
        let kernel = std::path::Path::new("/sys/module/wireguard").exists();
        assert_eq!(status.datapath == warren_model::Datapath::Kernel, kernel);
    }

    mesh.nodes[0].kill_agent();
    assert!(
        first.ping(&second.v4) && second.ping(&first.v6),
        "an agent that is gone takes nothing along"
    );
    mesh.nodes[0].start();
    mesh.nodes[0].wait_ready();
    assert!(first.ping(&second.v4) && second.ping(&first.v6));
    let status = mesh.nodes[0].encrypt_status();
    assert!(status.enabled, "{:?}", status.mismatches);
}

#[test]
fn what_breaks_is_repaired() {
    let mut mesh = Mesh::new(2);
    mesh.start();
    let first = mesh.nodes[0].add_pod(10);
    let second = mesh.nodes[1].add_pod(10);
    all_reach_all(&[&first, &second]);
    let node = &mesh.nodes[0];

    node.kill_tunnel();
    all_reach_all(&[&first, &second]);

    run(&format!("ip -n {} link del warren0", node.netns));
    all_reach_all(&[&first, &second]);

    run(&format!("ip -n {} route flush table 4151", node.netns));
    run(&format!("ip -n {} -6 route flush table 4152", node.netns));
    all_reach_all(&[&first, &second]);
    eventually("everything is as wanted", || node.encrypt_status().enabled);

    let peer = node.encrypt_status().peers[0].public_key;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let driver = Userspace::new(node.home.join("wg"));
    // The agent may look by chance, and add it again, before it is asked.
    eventually("the status says what is missing", || {
        runtime
            .block_on(driver.apply("warren0", &[DeviceChange::RemovePeer(peer)]))
            .unwrap();
        let status = node.encrypt_status();
        let lacks = |mismatch: &String| mismatch.contains("lacks the peer of node node2");
        !status.enabled && status.mismatches.iter().any(lacks)
    });
    eventually("the peer is back", || node.encrypt_status().enabled);
    all_reach_all(&[&first, &second]);
}

#[test]
fn an_address_comes_back_while_its_old_pod_terminates() {
    let mut mesh = Mesh::new(2);
    mesh.start();
    let other = mesh.nodes[1].add_pod(10);
    let old = mesh.nodes[0].add_pod(10);
    all_reach_all(&[&old, &other]);
    assert_eq!(
        mesh.nodes[0].ask(&Request::CniDel(old.attachment.key.clone())),
        Response::Done
    );
    let new = mesh.nodes[0].add_pod(10);
    all_reach_all(&[&new, &other]);
    assert_eq!(
        mesh.nodes[0].ask(&Request::CniCheck(new.attachment.clone())),
        Response::Done
    );
    let (message, _) = refusal(mesh.nodes[0].ask(&Request::CniCheck(old.attachment.clone())));
    assert!(message.contains("not known"), "{message}");
    run(&format!("ip netns del {}", old.netns));
    all_reach_all(&[&new, &other]);
    eventually("the old pod is forgotten", || {
        mesh.nodes[0].encrypt_status().enabled
    });
}

#[test]
fn a_pod_that_is_older_than_the_agent_is_adopted() {
    let mut mesh = Mesh::new(2);
    let first = mesh.nodes[0].wire_pod(10);
    // keyd knows the pod, and so who it is: without that it would stay closed.
    let Attachment { pod, addresses, .. } = &first.attachment;
    mesh.keyd.add_pod("node1", pod, addresses);
    mesh.start();
    let second = mesh.nodes[1].add_pod(10);
    all_reach_all(&[&first, &second]);
}

#[test]
fn bad_requests_are_refused_in_one_sentence() {
    let mut mesh = Mesh::without_keyd(1);
    let addresses = ["10.244.1.10", "fd00:10:244:1::10"].map(|address| address.parse().unwrap());
    let known = PodRef {
        namespace: "demo".into(),
        name: "pod10".into(),
        uid: format!("{}p0", mesh.nodes[0].netns),
    };
    mesh.keyd.add_pod("node1", &known, &addresses);
    mesh.save_snapshots();
    mesh.start();
    let node = &mut mesh.nodes[0];
    let pod = node.wire_pod(10);
    assert_eq!(pod.attachment.pod, known);
    let mut stray = pod.attachment.clone();
    stray.addresses = vec!["10.99.0.1".parse().unwrap()];
    let (message, retry) = refusal(node.ask(&Request::CniAdd(stray.clone())));
    assert!(message.contains("podPools") && !retry, "{message}");
    stray.addresses = vec!["10.244.9.1".parse().unwrap()];
    let (message, retry) = refusal(node.ask(&Request::CniAdd(stray.clone())));
    assert!(
        message.contains("outside this node's prefixes") && retry,
        "{message}"
    );
    stray.addresses.clear();
    assert!(!refusal(node.ask(&Request::CniAdd(stray))).1);
    let mut gone = pod.attachment.clone();
    gone.host_ifindex = 4242;
    let (message, _) = refusal(node.ask(&Request::CniAdd(gone)));
    assert!(message.contains("device is gone"), "{message}");

    assert_eq!(node.ask(&Request::CniAdd(pod.attachment.clone())), Response::Done);
    assert_eq!(
        node.ask(&Request::CniAdd(pod.attachment.clone())),
        Response::Done,
        "twice is as once"
    );
    assert_eq!(
        node.ask(&Request::CniGc {
            valid: vec![pod.attachment.key.clone()]
        }),
        Response::Done
    );
    assert_eq!(
        node.ask(&Request::CniCheck(pod.attachment.clone())),
        Response::Done
    );
    assert_eq!(node.ask(&Request::CniGc { valid: vec![] }), Response::Done);
    refusal(node.ask(&Request::CniCheck(pod.attachment.clone())));
    let nobody = AttachmentKey {
        container_id: "nobody".into(),
        ifname: "eth0".into(),
    };
    assert_eq!(node.ask(&Request::CniDel(nobody)), Response::Done);
}
