//! Policy objects as users write them: those of scenario B, and the small ones that many tests need.

use serde_json::{Value, json};

/// A CiliumNetworkPolicy.
pub fn cnp(namespace: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"namespace": namespace, "name": name},
        "spec": spec,
    })
}

/// A CiliumClusterwideNetworkPolicy.
pub fn ccnp(name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumClusterwideNetworkPolicy",
        "metadata": {"name": name},
        "spec": spec,
    })
}

/// A Kubernetes NetworkPolicy.
pub fn knp(namespace: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": namespace, "name": name},
        "spec": spec,
    })
}

/// Pods with a label `app`.
pub fn app(name: &str) -> Value {
    json!({"matchLabels": {"app": name}})
}

/// `toPorts` of one port, over TCP and UDP: the lab's servers speak both.
pub fn ports(port: u16) -> Value {
    let port = port.to_string();
    json!([{"ports": [{"port": port, "protocol": "TCP"}, {"port": port, "protocol": "UDP"}]}])
}

/// Default deny in both directions for a namespace, as scenario B has it: two objects.
pub fn default_deny(namespace: &str) -> Vec<Value> {
    vec![
        cnp(
            namespace,
            "default-deny-ingress",
            json!({"endpointSelector": {}, "ingress": [{}]}),
        ),
        cnp(
            namespace,
            "default-deny-egress",
            json!({"endpointSelector": {}, "egress": [{}]}),
        ),
    ]
}

/// DNS for a namespace.
pub fn allow_dns(namespace: &str) -> Value {
    cnp(
        namespace,
        "allow-dns",
        json!({
            "endpointSelector": {},
            "egress": [{
                "toEndpoints": [{"matchLabels": {
                    "k8s:io.kubernetes.pod.namespace": "kube-system",
                    "k8s:k8s-app": "kube-dns",
                }}],
                "toPorts": ports(53),
            }],
        }),
    )
}

/// Both ends of one allowed connection: egress of pods `from`, ingress of pods `to`, in one object of one namespace.
pub fn allow(namespace: &str, from: &str, to: &str, port: u16) -> Value {
    json!({
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"namespace": namespace, "name": format!("{from}-to-{to}")},
        "specs": [
            {
                "endpointSelector": app(from),
                "egress": [{"toEndpoints": [app(to)], "toPorts": ports(port)}],
            },
            {
                "endpointSelector": app(to),
                "ingress": [{"fromEndpoints": [app(from)], "toPorts": ports(port)}],
            },
        ],
    })
}

/// The allow rules of scenario B: DNS, the whole namespace to the frontend, frontend to api, api to db.
pub fn scenario_b(namespace: &str) -> Vec<Value> {
    vec![
        allow_dns(namespace),
        cnp(
            namespace,
            "namespace-to-frontend",
            json!({
                "endpointSelector": {},
                "egress": [{"toEndpoints": [app("frontend")], "toPorts": ports(8080)}],
            }),
        ),
        cnp(
            namespace,
            "frontend",
            json!({
                "endpointSelector": app("frontend"),
                "ingress": [{"fromEndpoints": [{}], "toPorts": ports(8080)}],
            }),
        ),
        allow(namespace, "frontend", "api", 5000),
        allow(namespace, "api", "db", 6379),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_object_is_valid() {
        let mut objects = default_deny("demo");
        objects.extend(scenario_b("demo"));
        for object in objects {
            let checked = warren_crds::cilium::check(&object, "lab");
            assert!(checked.is_ok(), "{object}: {checked:?}");
        }
    }
}
