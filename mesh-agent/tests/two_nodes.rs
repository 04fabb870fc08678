//! Two nodes with nothing but a snapshot on disk: no `keyd`, no API server.

mod support;

use support::{Mesh, eventually};

#[test]
fn pods_talk_through_the_tunnel_with_nothing_but_a_snapshot_on_disk() {
    let mut mesh = Mesh::new(2);
    mesh.start();
    let first = mesh.nodes[0].add_pod(10);
    let second = mesh.nodes[1].add_pod(10);
    for (from, to) in [(&first, &second), (&second, &first)] {
        for address in [&to.v4, &to.v6] {
            eventually(&format!("{} reaches {address}", from.netns), || {
                from.ping(address)
            });
        }
    }
    for node in &mesh.nodes {
        let status = node.encrypt_status();
        assert!(status.enabled, "{:?}", status.mismatches);
        assert_eq!(status.peers.len(), 1);
        assert!(status.peers[0].last_handshake_seconds.is_some());
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
