//! The core's progress <-> the status of a KeyRotation. The two ways must agree: a new leader goes on from the status.

use k8s_openapi::jiff::Timestamp;
use warren_crds::{
    Condition, KeyRotationStatus, PlannedNode, RotationCounts, RotationException as Exception,
};
use warren_keyd_core::{
    RotationObject,
    rotation::{Counts, Outcome, Planned, Progress, RotationPhase, Standing},
};

/// The name of a phase.
pub(crate) fn phase_name(phase: RotationPhase) -> &'static str {
    match phase {
        RotationPhase::Pending => "Pending",
        RotationPhase::Running => "Running",
        RotationPhase::Succeeded => "Succeeded",
        RotationPhase::Failed => "Failed",
        RotationPhase::Aborted => "Aborted",
    }
}

fn phase(name: &str) -> RotationPhase {
    match name {
        "Running" => RotationPhase::Running,
        "Succeeded" => RotationPhase::Succeeded,
        "Failed" => RotationPhase::Failed,
        "Aborted" => RotationPhase::Aborted,
        _ => RotationPhase::Pending,
    }
}

/// What a status says of the progress. keyd alone writes statuses; one that says nothing is one of a rotation that has not
/// begun.
pub(crate) fn progress(status: &KeyRotationStatus) -> Progress {
    let seconds = |time: &Option<String>| {
        let time = time.as_ref().and_then(|text| text.parse::<Timestamp>().ok());
        time.and_then(|time| u64::try_from(time.as_second()).ok())
            .unwrap_or_default()
    };
    let plan = status.plan.iter().map(|planned| {
        let exception = status
            .exceptions
            .iter()
            .find(|exception| exception.node == planned.node);
        let planned_node = Planned {
            uid: planned.node_uid.as_str().into(),
            from: planned.generation,
            outcome: exception.and_then(outcome),
        };
        (planned.node.as_str().into(), planned_node)
    });
    Progress {
        phase: phase(&status.phase),
        run: status.run,
        started: seconds(&status.started_at),
        completed: seconds(&status.completed_at),
        plan: plan.collect(),
    }
}

fn outcome(exception: &Exception) -> Option<Outcome> {
    match exception.reason.as_str() {
        "Failed" => Some(Outcome::Failed(exception.message.clone())),
        "Stalled" => Some(Outcome::Stalled(exception.message.clone())),
        "Aborted" => Some(Outcome::Aborted),
        "Gone" => Some(Outcome::Gone),
        _ => None,
    }
}

/// (reason, message) of an outcome.
pub(crate) fn exception_of(outcome: &Outcome) -> (&'static str, String) {
    match outcome {
        Outcome::Failed(sentence) => ("Failed", sentence.clone()),
        Outcome::Stalled(sentence) => ("Stalled", sentence.clone()),
        Outcome::Aborted => ("Aborted", "it keeps its key".into()),
        Outcome::Gone => ("Gone", "the node was deleted or revoked".into()),
    }
}

/// The status to show.
pub(crate) fn status(
    object: &RotationObject,
    standing: &Standing<'_>,
    old: Option<&KeyRotationStatus>,
    now: Timestamp,
) -> KeyRotationStatus {
    let Standing {
        progress,
        counts,
        nodes,
    } = standing;
    let time = |seconds: u64| {
        let seconds = i64::try_from(seconds).ok().filter(|seconds| *seconds > 0)?;
        Timestamp::from_second(seconds).ok().map(|time| time.to_string())
    };
    let exceptions = progress.plan.iter().filter_map(|(node, planned)| {
        let (reason, message) = exception_of(planned.outcome.as_ref()?);
        Some(Exception {
            node: node.to_string(),
            reason: reason.into(),
            message,
        })
    });
    let plan = progress.plan.iter().map(|(node, planned)| PlannedNode {
        node: node.to_string(),
        node_uid: planned.uid.to_string(),
        generation: planned.from,
    });
    KeyRotationStatus {
        phase: phase_name(progress.phase).into(),
        observed_generation: object.generation,
        run: progress.run,
        started_at: time(progress.started),
        completed_at: time(progress.completed),
        counts: shown(counts),
        waiting_for: waiting_for(nodes.iter().filter_map(|(_, _, peer)| *peer)),
        exceptions: exceptions.collect(),
        plan: plan.collect(),
        conditions: conditions(progress, counts, old, now),
    }
}

/// The node that all who wait wait for, where it is one.
pub(crate) fn waiting_for<'a>(mut peers: impl Iterator<Item = &'a warren_model::NodeName>) -> Option<String> {
    let first = peers.next()?;
    peers.all(|peer| peer == first).then(|| first.to_string())
}

fn shown(counts: &Counts) -> RotationCounts {
    let Counts {
        total,
        pending,
        preparing,
        verifying,
        switching,
        draining,
        retiring,
        done,
        failed,
        gone,
    } = *counts;
    RotationCounts {
        total,
        pending,
        moving: preparing + verifying + switching + draining + retiring,
        preparing,
        verifying,
        switching,
        draining,
        retiring,
        done,
        failed,
        gone,
    }
}

fn conditions(
    progress: &Progress,
    counts: &Counts,
    old: Option<&KeyRotationStatus>,
    now: Timestamp,
) -> Vec<Condition> {
    let phase = phase_name(progress.phase);
    let running = progress.phase == RotationPhase::Running;
    let first = progress.plan.values().find_map(|planned| {
        let (_, message) = exception_of(planned.outcome.as_ref().filter(|one| **one != Outcome::Gone)?);
        Some(message)
    });
    let done = format!("{} of {} nodes have new keys", counts.done, counts.total);
    let (degraded, why) = match &first {
        Some(_) => ("True", "NodesKeptTheirKeys"),
        None => ("False", "NoExceptions"),
    };
    let bool_text = |value: bool| if value { "True" } else { "False" };
    [
        ("Progressing", bool_text(running), phase, done.clone()),
        (
            "Complete",
            bool_text(progress.phase == RotationPhase::Succeeded),
            phase,
            done,
        ),
        ("Degraded", degraded, why, first.unwrap_or_default()),
    ]
    .into_iter()
    .map(|(type_, status, reason, message)| {
        let same = old.and_then(|old| {
            let mut conditions = old.conditions.iter();
            conditions.find(|one| one.type_ == type_ && one.status == status)
        });
        // Whole seconds, as all conditions have.
        let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
        Condition {
            type_: type_.into(),
            status: status.into(),
            reason: reason.into(),
            message,
            last_transition_time: same
                .map_or_else(|| now.to_string(), |same| same.last_transition_time.clone()),
        }
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use warren_keyd_core::rotation::RotationSpec;
    use warren_model::NodeName;

    use super::*;

    fn planned(from: u64, outcome: Option<Outcome>) -> Planned {
        Planned {
            uid: format!("u{from}").as_str().into(),
            from,
            outcome,
        }
    }

    #[test]
    fn a_new_leader_reads_what_the_old_one_knew() {
        let object = RotationObject {
            name: "r".into(),
            uid: "u".into(),
            generation: 3,
            created: 0,
            reason: String::new(),
            every: String::new(),
            spec: RotationSpec::default(),
        };
        let name = |text: &str| NodeName::from(text);
        for phase in [
            RotationPhase::Pending,
            RotationPhase::Running,
            RotationPhase::Succeeded,
            RotationPhase::Failed,
            RotationPhase::Aborted,
        ] {
            let known = Progress {
                phase,
                run: 2,
                started: 1_700_000_000,
                completed: if phase.is_over() { 1_700_000_100 } else { 0 },
                plan: [
                    (name("a"), planned(1, None)),
                    (name("b"), planned(2, Some(Outcome::Failed("why".into())))),
                    (name("c"), planned(3, Some(Outcome::Stalled("who".into())))),
                    (name("d"), planned(4, Some(Outcome::Aborted))),
                    (name("e"), planned(5, Some(Outcome::Gone))),
                ]
                .into(),
            };
            let standing = Standing {
                progress: &known,
                counts: Counts::default(),
                nodes: vec![],
            };
            let at = |seconds| Timestamp::from_second(seconds).unwrap();
            let shown = status(&object, &standing, None, at(100));
            let text = serde_json::to_string(&shown).unwrap();
            let stored: KeyRotationStatus = serde_json::from_str(&text).unwrap();
            assert_eq!(progress(&stored), known);
            assert_eq!(shown.observed_generation, 3);
            assert_eq!(status(&object, &standing, Some(&shown), at(900)), shown);
        }
        assert_eq!(progress(&KeyRotationStatus::default()), Progress::default());
    }
}
