//! The rule of CiliumNetworkPolicy and CiliumClusterwideNetworkPolicy, member by member.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::l7::{FqdnSelector, L7Rules};

/// Defines an object of optional members.
macro_rules! object {
    ($(#[$doc:meta])* $name:ident { $($(#[$member_doc:meta])* $member:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
        #[serde(rename_all = "camelCase", deny_unknown_fields)]
        pub struct $name {
            $(
                $(#[$member_doc])*
                #[serde(default, skip_serializing_if = "Option::is_none")]
                pub $member: Option<$type>,
            )*
        }
    };
}

/// A selector over labels. Keys may carry a source: `k8s:app`, `reserved:host`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LabelSelector {
    /// Labels with their values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub match_labels: Option<BTreeMap<String, String>>,
    /// Further requirements.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub match_expressions: Option<Vec<LabelSelectorRequirement>>,
}

/// One requirement on a label.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LabelSelectorRequirement {
    /// The label's key.
    pub key: String,
    /// `In`, `NotIn`, `Exists` or `DoesNotExist`.
    pub operator: String,
    /// Values, for `In` and `NotIn`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub values: Option<Vec<String>>,
}

object! {
    /// A rule: whom it selects, and what these may receive and send.
    PolicyRule {
        /// Selects pods.
        endpoint_selector: LabelSelector,
        /// Selects nodes (host policy); only in CiliumClusterwideNetworkPolicy.
        node_selector: LabelSelector,
        /// What may come in.
        ingress: Vec<IngressRule>,
        /// What may not come in, whatever else allows it.
        ingress_deny: Vec<IngressDenyRule>,
        /// What may go out.
        egress: Vec<EgressRule>,
        /// What may not go out, whatever else allows it.
        egress_deny: Vec<EgressDenyRule>,
        /// Whether the rule puts what it selects in default deny; true where it has a section for the direction.
        enable_default_deny: EnableDefaultDeny,
        /// Labels of the rule.
        labels: Vec<RuleLabel>,
        /// A text for people.
        description: String,
        /// What is written into flow logs.
        log: Log,
    }
}

object! {
    /// Default deny per direction.
    EnableDefaultDeny {
        /// For ingress.
        ingress: bool,
        /// For egress.
        egress: bool,
    }
}

object! {
    /// What is written into flow logs.
    Log {
        /// The text.
        value: String,
    }
}

object! {
    /// A label of a rule.
    RuleLabel {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// The source.
        source: String,
    }
}

object! {
    /// Who may come in, and to which ports.
    IngressRule {
        /// Endpoints by labels.
        from_endpoints: Vec<LabelSelector>,
        /// Groups of peers: world, cluster, host and so on.
        from_entities: Vec<String>,
        /// Prefixes of the world.
        #[serde(rename = "fromCIDR")]
        from_cidr: Vec<String>,
        /// Prefixes of the world with exceptions.
        #[serde(rename = "fromCIDRSet")]
        from_cidr_set: Vec<CidrRule>,
        /// Nodes by labels.
        from_nodes: Vec<LabelSelector>,
        /// Ports.
        to_ports: Vec<PortRule>,
        /// ICMP messages; not with ports.
        icmps: Vec<IcmpRule>,
        /// Kept, not enforced.
        #[schemars(schema_with = "super::crd::any_list")]
        from_groups: Value,
        /// Kept, not enforced.
        #[schemars(schema_with = "super::crd::any_object")]
        authentication: Value,
    }
}

object! {
    /// Who may not come in, and to which ports.
    IngressDenyRule {
        /// Endpoints by labels.
        from_endpoints: Vec<LabelSelector>,
        /// Groups of peers: world, cluster, host and so on.
        from_entities: Vec<String>,
        /// Prefixes of the world.
        #[serde(rename = "fromCIDR")]
        from_cidr: Vec<String>,
        /// Prefixes of the world with exceptions.
        #[serde(rename = "fromCIDRSet")]
        from_cidr_set: Vec<CidrRule>,
        /// Nodes by labels.
        from_nodes: Vec<LabelSelector>,
        /// Ports; no layer-7 rules.
        to_ports: Vec<PortRule>,
        /// ICMP messages; not with ports.
        icmps: Vec<IcmpRule>,
        /// Kept, not enforced.
        #[schemars(schema_with = "super::crd::any_list")]
        from_groups: Value,
    }
}

object! {
    /// Whom endpoints may open connections to, and on which ports.
    EgressRule {
        /// Endpoints by labels.
        to_endpoints: Vec<LabelSelector>,
        /// Groups of peers: world, cluster, host and so on.
        to_entities: Vec<String>,
        /// Prefixes of the world.
        #[serde(rename = "toCIDR")]
        to_cidr: Vec<String>,
        /// Prefixes of the world with exceptions.
        #[serde(rename = "toCIDRSet")]
        to_cidr_set: Vec<CidrRule>,
        /// Nodes by labels.
        to_nodes: Vec<LabelSelector>,
        /// Addresses by their DNS names.
        #[serde(rename = "toFQDNs")]
        to_fqdns: Vec<FqdnSelector>,
        /// Services.
        to_services: Vec<Service>,
        /// Ports.
        to_ports: Vec<PortRule>,
        /// ICMP messages; not with ports.
        icmps: Vec<IcmpRule>,
        /// Kept, not enforced.
        #[schemars(schema_with = "super::crd::any_list")]
        to_groups: Value,
        /// Kept, not enforced.
        #[schemars(schema_with = "super::crd::any_object")]
        authentication: Value,
    }
}

object! {
    /// Whom endpoints may not open connections to, and on which ports.
    EgressDenyRule {
        /// Endpoints by labels.
        to_endpoints: Vec<LabelSelector>,
        /// Groups of peers: world, cluster, host and so on.
        to_entities: Vec<String>,
        /// Prefixes of the world.
        #[serde(rename = "toCIDR")]
        to_cidr: Vec<String>,
        /// Prefixes of the world with exceptions.
        #[serde(rename = "toCIDRSet")]
        to_cidr_set: Vec<CidrRule>,
        /// Nodes by labels.
        to_nodes: Vec<LabelSelector>,
        /// Services.
        to_services: Vec<Service>,
        /// Ports; no layer-7 rules.
        to_ports: Vec<PortRule>,
        /// ICMP messages; not with ports.
        icmps: Vec<IcmpRule>,
        /// Kept, not enforced.
        #[schemars(schema_with = "super::crd::any_list")]
        to_groups: Value,
    }
}

object! {
    /// A prefix, or a CiliumCIDRGroup, less exceptions. Exactly one of `cidr` and `cidrGroupRef`.
    CidrRule {
        /// The prefix.
        cidr: String,
        /// Name of a CiliumCIDRGroup.
        cidr_group_ref: String,
        /// Prefixes inside that do not count.
        except: Vec<String>,
    }
}

object! {
    /// Services, by name or by labels.
    Service {
        /// By name.
        k8s_service: K8sServiceNamespace,
        /// By labels.
        k8s_service_selector: K8sServiceSelectorNamespace,
    }
}

object! {
    /// A Service by name.
    K8sServiceNamespace {
        /// Its name.
        service_name: String,
        /// Its namespace.
        namespace: String,
    }
}

object! {
    /// Services by labels.
    K8sServiceSelectorNamespace {
        /// The labels.
        selector: LabelSelector,
        /// Their namespace.
        namespace: String,
    }
}

object! {
    /// Ports, and what is allowed on them above layer 4.
    PortRule {
        /// The ports, at most 40.
        #[schemars(length(max = 40))]
        ports: Vec<PortProtocol>,
        /// What is allowed on them.
        rules: L7Rules,
        /// Kept, not enforced.
        server_names: Vec<String>,
        /// Kept, not enforced.
        #[serde(rename = "terminatingTLS")]
        #[schemars(schema_with = "super::crd::any_object")]
        terminating_tls: Value,
        /// Kept, not enforced.
        #[serde(rename = "originatingTLS")]
        #[schemars(schema_with = "super::crd::any_object")]
        originating_tls: Value,
        /// Kept, not enforced.
        #[schemars(schema_with = "super::crd::any_object")]
        listener: Value,
    }
}

object! {
    /// A port or a range of them.
    PortProtocol {
        /// A number, or the name of a port; `0` is every port.
        port: String,
        /// The last port of a range that starts at `port`.
        #[schemars(range(min = 0, max = 65535))]
        end_port: i32,
        /// `TCP`, `UDP`, `SCTP`, `ICMP`, `ICMPv6` or `ANY` (the default).
        #[schemars(schema_with = "super::crd::protocol")]
        protocol: String,
    }
}

object! {
    /// ICMP messages.
    IcmpRule {
        /// The messages, at most 40.
        #[schemars(length(max = 40))]
        fields: Vec<IcmpField>,
    }
}

object! {
    /// One ICMP message.
    IcmpField {
        /// `IPv4` (the default) or `IPv6`.
        #[schemars(schema_with = "super::crd::family")]
        family: String,
        /// A number, or a name such as `EchoRequest`.
        #[serde(rename = "type")]
        #[schemars(schema_with = "super::crd::int_or_string")]
        kind: IcmpType,
    }
}

/// The type of an ICMP message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum IcmpType {
    /// By number.
    Number(i64),
    /// By name, or a number in a string.
    Name(String),
}
