//! CustomResourceDefinitions with full schemas.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::core::schema::{OptionalEnum, OptionalIntOrString, StructuralSchemaRewriter};
use schemars::{
    JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings, json_schema, transform::AddNullable,
};
use serde_json::{Value, json};

use super::{
    object::{CiliumCIDRGroupSpec, GROUP, PolicyStatus, VERSION},
    spec::PolicyRule,
};

/// The definitions of all objects of this module. Not part of what an installation creates: a cluster that
/// runs Cilium has its own.
///
/// # Panics
///
/// Only on a schema that Kubernetes' types cannot hold, which a test rules out.
pub fn all() -> Vec<CustomResourceDefinition> {
    let policy = json!({
        "type": "object",
        "properties": {
            "spec": schema::<PolicyRule>(),
            "specs": {"type": "array", "items": schema::<PolicyRule>(), "nullable": true},
            "status": schema::<PolicyStatus>(),
        },
    });
    let columns = json!([
        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
        {"name": "Valid", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Valid')].status"},
    ]);
    let group = json!({
        "type": "object",
        "required": ["spec"],
        "properties": {"spec": schema::<CiliumCIDRGroupSpec>()},
    });
    [
        definition(
            (
                "CiliumNetworkPolicy",
                "ciliumnetworkpolicy",
                "ciliumnetworkpolicies",
            ),
            "Namespaced",
            json!(["cnp", "ciliumnp"]),
            (&policy, &columns, true),
        ),
        definition(
            (
                "CiliumClusterwideNetworkPolicy",
                "ciliumclusterwidenetworkpolicy",
                "ciliumclusterwidenetworkpolicies",
            ),
            "Cluster",
            json!(["ccnp"]),
            (&policy, &columns, true),
        ),
        definition(
            ("CiliumCIDRGroup", "ciliumcidrgroup", "ciliumcidrgroups"),
            "Cluster",
            json!(["ccg"]),
            (&group, &json!([]), false),
        ),
    ]
    .into_iter()
    .map(|value| serde_json::from_value(value).expect("the definition is well formed"))
    .collect()
}

fn definition(
    (kind, singular, plural): (&str, &str, &str),
    scope: &str,
    short: Value,
    (schema, columns, status): (&Value, &Value, bool),
) -> Value {
    let mut version = json!({
        "name": VERSION,
        "served": true,
        "storage": true,
        "schema": {"openAPIV3Schema": schema},
        "additionalPrinterColumns": columns,
    });
    if status {
        version["subresources"] = json!({"status": {}});
    }
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.{GROUP}")},
        "spec": {
            "group": GROUP,
            "scope": scope,
            "names": {
                "kind": kind,
                "listKind": format!("{kind}List"),
                "singular": singular,
                "plural": plural,
                "shortNames": short,
                "categories": ["cilium", "ciliumpolicy"],
            },
            "versions": [version],
        },
    })
}

/// The structural schema of a type.
fn schema<T: JsonSchema>() -> Value {
    let generator = SchemaSettings::openapi3()
        .with(|settings| {
            settings.inline_subschemas = true;
            settings.meta_schema = None;
        })
        .with_transform(AddNullable::default())
        .with_transform(StructuralSchemaRewriter)
        .with_transform(OptionalEnum)
        .with_transform(OptionalIntOrString)
        .into_generator();
    let mut schema = generator.into_root_schema_for::<T>().to_value();
    adapt(&mut schema);
    schema
}

/// Kubernetes refuses `additionalProperties` beside `properties`, and titles are noise.
fn adapt(schema: &mut Value) {
    match schema {
        Value::Object(members) => {
            if members.contains_key("properties") {
                members.remove("additionalProperties");
            }
            if members.get("title").is_some_and(Value::is_string) {
                members.remove("title");
            }
            members.values_mut().for_each(adapt);
        }
        Value::Array(items) => items.iter_mut().for_each(adapt),
        _ => {}
    }
}

pub(super) fn any_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "object", "x-kubernetes-preserve-unknown-fields": true, "nullable": true})
}

pub(super) fn any_list(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "items": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
        "nullable": true
    })
}

pub(super) fn int_or_string(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}]})
}

pub(super) fn protocol(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "enum": ["TCP", "UDP", "SCTP", "ICMP", "ICMPv6", "ANY"]})
}

pub(super) fn family(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "enum": ["IPv4", "IPv6"]})
}

pub(super) fn conditions(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "required": ["type", "status"],
            "properties": {
                "type": {"type": "string"},
                "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
                "reason": {"type": "string"},
                "message": {"type": "string"},
                "observedGeneration": {"type": "integer", "format": "int64"},
                "lastTransitionTime": {"type": "string", "format": "date-time"}
            }
        }
    })
}
