//! Makes and aborts KeyRotations for an operator at the local socket.

use std::path::PathBuf;

use kube::{
    Api, Client,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
};
use serde_json::json;
use warren_crds::{
    KeyRotation, KeyRotationSpec, NodeChoice, RotationPace, RotationSchedule, StragglerPolicy,
};
use warren_keyd_api::proto::RotateKeysRequest;

use super::object::parse;
use crate::{
    files,
    source::parse::valid_name,
    store::{MANAGER, is_code},
};

/// Finished requests that are kept in a folder.
const KEPT: usize = 100;

/// Where KeyRotations are made.
#[derive(Clone)]
pub(crate) enum Maker {
    /// In the API.
    Kubernetes(Client),
    /// As manifests in a folder of keyd's own, which is read like the operator's.
    Folder(PathBuf),
}

/// Why a rotation was not made, or not aborted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unmade {
    #[error("the rotation is refused: {0}")]
    Invalid(String),
    #[error("there is a KeyRotation {0} already: choose another name")]
    Exists(String),
    #[error("there is no KeyRotation {0}")]
    Unknown(String),
    #[error("KeyRotation {0} is not one that was made here: set `abort: true` in its manifest")]
    Foreign(String),
    #[error("cannot store the KeyRotation: {0}")]
    Store(String),
}

fn stored(error: impl std::fmt::Display) -> Unmade {
    Unmade::Store(error.to_string())
}

impl Maker {
    /// Makes a rotation; returns its name. `unix_ms`: now.
    pub(crate) async fn create(&self, request: RotateKeysRequest, unix_ms: u64) -> Result<String, Unmade> {
        let object = object(request, unix_ms)?;
        // As it will be read: what is wrong with it is said here, not later in a status.
        parse(&object).map_err(Unmade::Invalid)?;
        let name = object.metadata.name.clone().unwrap_or_default();
        match self {
            Self::Kubernetes(client) => {
                let params = PostParams {
                    field_manager: Some(MANAGER.into()),
                    ..PostParams::default()
                };
                let api: Api<KeyRotation> = Api::all(client.clone());
                match api.create(&params, &object).await {
                    Ok(_) => Ok(name),
                    Err(error) if is_code(&error, 409) => Err(Unmade::Exists(name)),
                    Err(kube::Error::Api(status)) if status.code == 422 => {
                        Err(Unmade::Invalid(status.message))
                    }
                    Err(error) => Err(stored(error)),
                }
            }
            Self::Folder(folder) => {
                let path = folder.join(format!("{name}.yaml"));
                if path.exists() {
                    return Err(Unmade::Exists(name));
                }
                let text = serde_saphyr::to_string(&object).map_err(stored)?;
                files::replace(&path, text.as_bytes()).map_err(stored)?;
                Ok(name)
            }
        }
    }

    /// Asks a rotation to stop.
    pub(crate) async fn abort(&self, name: &str) -> Result<(), Unmade> {
        valid_name(name).map_err(Unmade::Invalid)?;
        match self {
            Self::Kubernetes(client) => {
                let api: Api<KeyRotation> = Api::all(client.clone());
                let patch = json!({"spec": {"abort": true}});
                match api
                    .patch(name, &PatchParams::default(), &Patch::Merge(&patch))
                    .await
                {
                    Ok(_) => Ok(()),
                    Err(error) if is_code(&error, 404) => Err(Unmade::Unknown(name.into())),
                    Err(error) => Err(stored(error)),
                }
            }
            Self::Folder(folder) => {
                let path = folder.join(format!("{name}.yaml"));
                let text = files::read(&path).map_err(stored)?;
                let text = text.ok_or_else(|| Unmade::Foreign(name.into()))?;
                let mut object: KeyRotation = serde_saphyr::from_str(&text).map_err(stored)?;
                object.spec.abort = true;
                let text = serde_saphyr::to_string(&object).map_err(stored)?;
                files::replace(&path, text.as_bytes()).map_err(stored)
            }
        }
    }

    /// Removes the oldest of the made ones that are over; `is_over` by name.
    pub(crate) fn tidy(&self, is_over: impl Fn(&str) -> bool) -> std::io::Result<()> {
        let Self::Folder(folder) = self else {
            return Ok(());
        };
        let mut found = vec![];
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            let name = entry.file_name().into_string().unwrap_or_default();
            if let Some(name) = name.strip_suffix(".yaml").filter(|name| is_over(name)) {
                found.push((entry.metadata()?.modified()?, folder.join(format!("{name}.yaml"))));
            }
        }
        found.sort();
        let surplus = found.len().saturating_sub(KEPT);
        found
            .into_iter()
            .take(surplus)
            .try_for_each(|(_, path)| files::remove(&path))
    }
}

fn object(request: RotateKeysRequest, unix_ms: u64) -> Result<KeyRotation, Unmade> {
    let RotateKeysRequest {
        name,
        nodes,
        match_labels,
        all,
        reason,
        pace,
        stragglers,
        every,
    } = request;
    let chosen = !nodes.is_empty() || !match_labels.is_empty();
    if chosen == all {
        return Err(Unmade::Invalid(
            "name nodes or labels, or say that all are meant: one of the two".into(),
        ));
    }
    let usual = RotationPace::default();
    let pace = pace.unwrap_or_default();
    let or = |value: u32, usual: u32| if value == 0 { usual } else { value };
    let spec = KeyRotationSpec {
        nodes: chosen.then(|| NodeChoice {
            names: nodes,
            match_labels: match_labels.into_iter().collect(),
        }),
        reason,
        pace: RotationPace {
            concurrency: match pace.concurrency.as_str() {
                "" => usual.concurrency,
                given => given.to_owned(),
            },
            jitter_seconds: pace.jitter_seconds,
            drain_seconds: or(pace.drain_seconds, usual.drain_seconds),
            deadline_seconds: or(pace.deadline_seconds, usual.deadline_seconds),
        },
        stragglers: match stragglers.as_str() {
            "" | "Wait" => StragglerPolicy::Wait,
            "Leave" => StragglerPolicy::Leave,
            "Revoke" => StragglerPolicy::Revoke,
            other => {
                return Err(Unmade::Invalid(format!(
                    "stragglers {other:?} is none of Wait, Leave, Revoke"
                )));
            }
        },
        schedule: (!every.is_empty()).then_some(RotationSchedule { every }),
        abort: false,
    };
    let name = match name.is_empty() {
        true => format!("rotate-{unix_ms}"),
        false => name,
    };
    let mut object = KeyRotation::new(&name, spec);
    let created = i64::try_from(unix_ms)
        .ok()
        .and_then(|ms| k8s_openapi::jiff::Timestamp::from_millisecond(ms).ok());
    object.metadata = ObjectMeta {
        name: Some(name),
        creation_timestamp: created.map(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time),
        ..ObjectMeta::default()
    };
    Ok(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> RotateKeysRequest {
        RotateKeysRequest {
            all: true,
            ..RotateKeysRequest::default()
        }
    }

    #[tokio::test]
    async fn rotations_are_made_as_manifests_and_aborted_there() {
        let folder = tempfile::tempdir().unwrap();
        let maker = Maker::Folder(folder.path().to_owned());
        let name = maker.create(all(), 1_700_000_000_123).await.unwrap();
        assert_eq!(name, "rotate-1700000000123");
        let named = RotateKeysRequest {
            name: name.clone(),
            ..all()
        };
        assert!(matches!(
            maker.create(named, 5).await,
            Err(Unmade::Exists(taken)) if taken == name
        ));
        let read = || {
            let text = std::fs::read_to_string(folder.path().join(format!("{name}.yaml"))).unwrap();
            parse(&serde_saphyr::from_str(&text).unwrap()).unwrap()
        };
        assert!(!read().spec.abort);
        maker.abort(&name).await.unwrap();
        assert!(read().spec.abort);
        assert_eq!(read().created, 1_700_000_000_000, "whole seconds");
        assert!(matches!(maker.abort("other").await, Err(Unmade::Foreign(_))));
        maker.tidy(|_| true).unwrap();
        assert!(read().spec.abort, "the newest are kept");
    }

    #[tokio::test]
    async fn nobody_rotates_everything_by_an_oversight() {
        let folder = tempfile::tempdir().unwrap();
        let maker = Maker::Folder(folder.path().to_owned());
        let none = RotateKeysRequest::default();
        let both = RotateKeysRequest {
            nodes: vec!["a".into()],
            ..all()
        };
        let typo = RotateKeysRequest {
            stragglers: "wait".into(),
            ..all()
        };
        let escape = RotateKeysRequest {
            name: "../x".into(),
            ..all()
        };
        for bad in [none, both, typo, escape] {
            assert!(matches!(maker.create(bad, 5).await, Err(Unmade::Invalid(_))));
        }
    }
}
