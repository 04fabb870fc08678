//! KeyRotation -> what the core is asked for. The API server refuses most of what is refused here (CEL in the CRD); a manifest
//! folder has no API server.

use std::collections::BTreeSet;

use kube::api::ApiResource;
use warren_crds::{KeyRotation, NodeChoice, RotationPace, StragglerPolicy};
use warren_keyd_core::{
    RotationObject, SourceEvent,
    rotation::{Concurrency, Pace, RotationSpec, Selection, Stragglers},
};

use crate::source::{
    feed::Feed,
    follow::Kind,
    parse::{Fault, valid_name},
};

/// A reason is for people; longer ones are not read by any.
const MAX_REASON: usize = 256;

/// How objects of the API become events.
pub(crate) fn kind() -> (ApiResource, Kind<KeyRotation>) {
    let kind = Kind {
        name: "KeyRotation",
        upsert: Box::new(|object| parse(object).map(SourceEvent::RotationUpsert).map(Feed::Event)),
        delete: Box::new(|(_, name)| Feed::Event(SourceEvent::RotationDelete(name))),
    };
    (ApiResource::erase::<KeyRotation>(&()), kind)
}

/// Reads an object; the fault is a sentence without its subject.
pub(crate) fn parse(object: &KeyRotation) -> Result<RotationObject, Fault> {
    let name = object.metadata.name.clone().ok_or("metadata.name is missing")?;
    valid_name(&name)?;
    let spec = &object.spec;
    if spec.reason.chars().count() > MAX_REASON {
        return Err(format!("reason has more than {MAX_REASON} characters"));
    }
    let every_seconds = match &spec.schedule {
        None => None,
        Some(schedule) => Some(schedule.seconds().ok_or_else(|| {
            format!(
                "schedule.every {:?} is not a number of hours or days, like 12h or 30d",
                schedule.every
            )
        })?),
    };
    let created = object.metadata.creation_timestamp.as_ref();
    Ok(RotationObject {
        uid: object.metadata.uid.clone().unwrap_or_else(|| name.clone()),
        generation: object.metadata.generation.unwrap_or_default(),
        created: created
            .and_then(|time| u64::try_from(time.0.as_millisecond()).ok())
            .unwrap_or_default(),
        reason: spec.reason.clone(),
        every: spec
            .schedule
            .as_ref()
            .map(|schedule| schedule.every.clone())
            .unwrap_or_default(),
        spec: RotationSpec {
            selection: selection(spec.nodes.as_ref())?,
            pace: pace(&spec.pace)?,
            stragglers: match spec.stragglers {
                StragglerPolicy::Wait => Stragglers::Wait,
                StragglerPolicy::Leave => Stragglers::Leave,
                StragglerPolicy::Revoke => Stragglers::Revoke,
            },
            abort: spec.abort,
            every_seconds,
        },
        name,
    })
}

fn selection(choice: Option<&NodeChoice>) -> Result<Selection, Fault> {
    let Some(choice) = choice else {
        return Ok(Selection::default());
    };
    // The core takes an empty choice for all.
    if choice.names.is_empty() && choice.match_labels.is_empty() {
        return Err("nodes names neither nodes nor labels: leave it out for all of them".into());
    }
    let mut names = BTreeSet::new();
    for name in &choice.names {
        valid_name(name)?;
        names.insert(name.as_str().into());
    }
    Ok(Selection {
        names,
        labels: choice.match_labels.clone(),
    })
}

fn pace(pace: &RotationPace) -> Result<Pace, Fault> {
    let within = |name: &str, value: u32, least: u32, most: u32| match (least..=most).contains(&value) {
        true => Ok(u64::from(value) * 1000),
        false => Err(format!("pace.{name} {value} is not between {least} and {most}")),
    };
    let pace = Pace {
        concurrency: concurrency(&pace.concurrency)?,
        jitter_ms: within("jitterSeconds", pace.jitter_seconds, 0, 3600)?,
        drain_ms: within("drainSeconds", pace.drain_seconds, 1, 600)?,
        deadline_ms: within("deadlineSeconds", pace.deadline_seconds, 30, 86_400)?,
    };
    match pace.deadline_ms >= 2 * pace.drain_ms {
        true => Ok(pace),
        false => Err("pace.deadlineSeconds must be at least twice pace.drainSeconds".into()),
    }
}

fn concurrency(text: &str) -> Result<Concurrency, Fault> {
    let parsed = match text.strip_suffix('%') {
        Some(share) => share
            .parse()
            .ok()
            .filter(|share| (1..=100).contains(share))
            .map(Concurrency::Percent),
        None => text
            .parse()
            .ok()
            .filter(|nodes| (1..=999_999).contains(nodes))
            .map(Concurrency::Nodes),
    };
    parsed.ok_or_else(|| {
        format!("pace.concurrency {text:?} is neither a number from 1 nor a share from 1% to 100%")
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(spec: Value) -> Result<RotationObject, Fault> {
        let object = json!({
            "apiVersion": "warren.dev/v1alpha1", "kind": "KeyRotation",
            "metadata": {"name": "spring", "creationTimestamp": "2026-03-20T12:00:00Z"},
            "spec": spec,
        });
        parse(&serde_json::from_value(object).unwrap())
    }

    #[test]
    fn an_empty_spec_is_everybody_at_the_usual_pace() {
        let object = read(json!({})).unwrap();
        assert_eq!(object.spec, RotationSpec::default());
        assert_eq!(
            (object.uid.as_str(), object.created),
            ("spring", 1_774_008_000_000)
        );
    }

    #[test]
    fn everything_is_read() {
        let object = read(json!({
            "nodes": {"names": ["a", "b"], "matchLabels": {"zone": "x"}},
            "reason": "yearly",
            "pace": {"concurrency": "3", "jitterSeconds": 5, "drainSeconds": 1, "deadlineSeconds": 30},
            "stragglers": "Leave",
            "schedule": {"every": "30d"},
            "abort": true
        }))
        .unwrap();
        let spec = &object.spec;
        assert_eq!(spec.selection.names.len(), 2);
        assert_eq!(spec.selection.labels["zone"], "x");
        assert_eq!(
            spec.pace,
            Pace {
                concurrency: Concurrency::Nodes(3),
                jitter_ms: 5000,
                drain_ms: 1000,
                deadline_ms: 30_000
            }
        );
        assert_eq!(spec.every_seconds, Some(2_592_000));
        assert!(spec.abort && spec.stragglers == Stragglers::Leave);
    }

    #[test]
    fn what_an_api_server_would_refuse_is_refused() {
        for (spec, word) in [
            (json!({"nodes": {}}), "nodes"),
            (json!({"nodes": {"names": ["../x"]}}), "name"),
            (json!({"pace": {"concurrency": "0"}}), "concurrency"),
            (json!({"pace": {"concurrency": "101%"}}), "concurrency"),
            (json!({"pace": {"concurrency": "many"}}), "concurrency"),
            (json!({"pace": {"drainSeconds": 0}}), "drainSeconds"),
            (
                json!({"pace": {"drainSeconds": 100, "deadlineSeconds": 199}}),
                "twice",
            ),
            (json!({"pace": {"deadlineSeconds": 29}}), "deadlineSeconds"),
            (json!({"pace": {"jitterSeconds": 3601}}), "jitterSeconds"),
            (json!({"schedule": {"every": "1w"}}), "schedule"),
            (json!({"reason": "x".repeat(257)}), "reason"),
        ] {
            let fault = read(spec.clone()).unwrap_err();
            assert!(fault.contains(word), "{spec}: {fault}");
        }
    }
}
