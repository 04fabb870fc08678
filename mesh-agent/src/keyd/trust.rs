//! Whom the agent believes, and as whom it speaks.

use std::{fs, io, path::Path};

use warren_keyd_api::{
    snapshot::SnapshotRoot,
    tls::{self, ClientIdentity, Trust},
    token::JoinToken,
};
use zeroize::Zeroizing;

use super::Client;
use crate::{
    config::Config,
    files::{StateDir, write_private},
};

const CA: &str = "ca.crt";
const ROOT: &str = "snapshot-root.pub";
const CLIENT_CERTIFICATE: &str = "client.crt.der";
const CLIENT_KEY: &str = "client.key.der";
const ADDRESSES: &str = "keyd-addresses";
/// How many addresses are remembered.
const MOST_ADDRESSES: usize = 8;

/// What a session needs.
#[derive(Debug)]
pub(super) struct Material {
    pub(super) trust: Trust,
    pub(super) root: SnapshotRoot,
    /// Stand-alone; a projected token otherwise.
    pub(super) identity: Option<ClientIdentity>,
}

impl Client {
    /// The trust material; a sentence where it is not there yet. Stand-alone it is got with the join token.
    pub(super) async fn trust(&mut self) -> Result<Material, String> {
        let own = self.state.trust();
        if let Some(mounted) = &self.config.options.trust_dir {
            copy_mounted(mounted, &own)?;
            let (trust, root) = read(&own)?;
            return Ok(Material {
                trust,
                root,
                identity: None,
            });
        }
        if !own.join(CLIENT_CERTIFICATE).exists() {
            self.enroll(&own).await?;
        }
        let (trust, root) = read(&own)?;
        let certificate_der = read_file(&own.join(CLIENT_CERTIFICATE))?;
        let key_der = Zeroizing::new(read_file(&own.join(CLIENT_KEY))?);
        Ok(Material {
            trust,
            root,
            identity: Some(ClientIdentity {
                certificate_der,
                key_der,
            }),
        })
    }

    async fn enroll(&self, own: &Path) -> Result<(), String> {
        let file = self.config.options.join_token_file.as_ref().ok_or_else(|| {
            "this node has not joined: name a join token with --join-token-file (keyd token create makes one)".to_owned()
        })?;
        let text = fs::read_to_string(file)
            .map(Zeroizing::new)
            .map_err(|error| format!("cannot read the join token {}: {error}", file.display()))?;
        let token: JoinToken = text
            .parse()
            .map_err(|error| format!("{}: {error}", file.display()))?;
        if *token.node() != self.config.node {
            return Err(format!(
                "the join token is for node {}, not for {}: make one with keyd token create {}",
                token.node(),
                self.config.node,
                self.config.node
            ));
        }
        let mut last = "no address of keyd is known: name it with --keyd".to_owned();
        for address in self.addresses() {
            match tls::enroll(&address, &token).await {
                Ok(enrolment) => {
                    let write = |name: &str, content: &[u8]| {
                        write_private(&own.join(name), content).map_err(|error| format!("{error:#}"))
                    };
                    write(CA, pem(&enrolment.ca_der).as_bytes())?;
                    write(ROOT, enrolment.snapshot_root.to_base64().as_bytes())?;
                    write(CLIENT_KEY, &enrolment.identity.key_der)?;
                    // Last: its being there says that all is.
                    write(CLIENT_CERTIFICATE, &enrolment.identity.certificate_der)?;
                    tracing::info!(%address, "this node has joined");
                    return Ok(());
                }
                Err(error) => last = error.to_string(),
            }
        }
        Err(last)
    }
}

/// The snapshot root that is known at start, to read the snapshot on disk with: the mounted one, else that of the
/// last run.
pub(crate) fn snapshot_root(config: &Config, state: &StateDir) -> Option<SnapshotRoot> {
    let own = state.trust();
    if let Some(mounted) = &config.options.trust_dir
        && let Err(reason) = copy_mounted(mounted, &own)
    {
        tracing::debug!(%reason, "the mounted trust is not there yet");
    }
    let text = fs::read_to_string(own.join(ROOT)).ok()?;
    SnapshotRoot::from_base64(&text)
        .inspect_err(|error| tracing::warn!(%error, "the kept snapshot root is not usable"))
        .ok()
}

/// The mount may be gone when the node boots without its API server: keep a copy.
fn copy_mounted(mounted: &Path, own: &Path) -> Result<(), String> {
    for name in [CA, ROOT] {
        let target = own.join(name);
        match fs::read(mounted.join(name)) {
            Ok(content) if fs::read(&target).is_ok_and(|kept| kept == content) => {}
            Ok(content) => write_private(&target, &content).map_err(|error| format!("{error:#}"))?,
            Err(_) if target.exists() => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(format!(
                    "waiting for {}: keyd makes it",
                    mounted.join(name).display()
                ));
            }
            Err(error) => return Err(format!("cannot read {}: {error}", mounted.join(name).display())),
        }
    }
    Ok(())
}

fn read(own: &Path) -> Result<(Trust, SnapshotRoot), String> {
    let text = |name: &str| -> Result<String, String> {
        let path = own.join(name);
        fs::read_to_string(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))
    };
    let trust = Trust::from_pem(&text(CA)?).map_err(|error| error.to_string())?;
    let root = SnapshotRoot::from_base64(&text(ROOT)?).map_err(|error| error.to_string())?;
    Ok((trust, root))
}

fn read_file(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
}

fn pem(der: &[u8]) -> String {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let text = STANDARD.encode(der);
    let mut out = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        out.extend(line.iter().copied().map(char::from));
        out.push('\n');
    }
    out + "-----END CERTIFICATE-----\n"
}

/// Addresses at which `keyd` was reached before.
pub(super) fn known_addresses(state: &StateDir) -> Vec<String> {
    let text = fs::read_to_string(state.trust().join(ADDRESSES)).unwrap_or_default();
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Remembers addresses, the newest first.
pub(super) fn remember_addresses(state: &StateDir, addresses: &[String]) {
    let before = known_addresses(state);
    let mut all = addresses.to_vec();
    all.extend(
        before
            .iter()
            .filter(|address| !addresses.contains(address))
            .cloned(),
    );
    all.truncate(MOST_ADDRESSES);
    if all != before
        && let Err(error) = write_private(&state.trust().join(ADDRESSES), (all.join("\n") + "\n").as_bytes())
    {
        tracing::warn!(error = %format!("{error:#}"), "the addresses of keyd cannot be kept");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_kept_newest_first_without_repetition() {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::open(directory.path()).unwrap();
        remember_addresses(&state, &["a:1".into()]);
        remember_addresses(&state, &["b:1".into(), "a:1".into()]);
        remember_addresses(&state, &["c:1".into()]);
        assert_eq!(known_addresses(&state), ["c:1", "b:1", "a:1"]);
    }

    #[test]
    fn a_mount_that_vanished_leaves_its_copy() {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::open(&directory.path().join("state")).unwrap();
        let mounted = directory.path().join("mounted");
        assert!(
            copy_mounted(&mounted, &state.trust())
                .unwrap_err()
                .starts_with("waiting for")
        );
        fs::create_dir(&mounted).unwrap();
        fs::write(mounted.join(CA), "x").unwrap();
        fs::write(mounted.join(ROOT), SnapshotRoot::from_bytes([1; 32]).to_base64()).unwrap();
        copy_mounted(&mounted, &state.trust()).unwrap();
        fs::remove_dir_all(&mounted).unwrap();
        copy_mounted(&mounted, &state.trust()).unwrap();
        assert_eq!(fs::read_to_string(state.trust().join(CA)).unwrap(), "x");
    }
}
