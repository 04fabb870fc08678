//! Whom the agent believes, and as whom it speaks.

use std::{fs, io, path::Path};

use warren_keyd_api::{
    proto,
    snapshot::{Followed, RootChain, RootError},
    tls::{self, ClientIdentity, Trust},
    token::JoinToken,
};
use zeroize::Zeroizing;

use warren_agent_api::RootStatus;

use super::{Client, FromKeyd};
use crate::{
    config::Config,
    files::{StateDir, write_private},
};

const CA: &str = "ca.crt";
const ROOTS: &str = "snapshot-roots";
const CLIENT_CERTIFICATE: &str = "client.crt.der";
const CLIENT_KEY: &str = "client.key.der";
const ADDRESSES: &str = "keyd-addresses";
/// How many addresses are remembered.
const MOST_ADDRESSES: usize = 8;

/// What a session needs.
#[derive(Debug)]
pub(super) struct Material {
    pub(super) trust: Trust,
    pub(super) roots: RootChain,
    /// Stand-alone; a projected token otherwise.
    pub(super) identity: Option<ClientIdentity>,
}

/// How what is mounted, and what `keyd` names, differ from what is pinned.
#[derive(Debug, Default)]
pub(crate) struct TrustFaults {
    mounted: Option<String>,
    keyd: Option<String>,
    said: Option<String>,
}

impl Client {
    /// The trust material; a sentence where it is not there yet. Stand-alone it is got with the join token.
    pub(super) async fn trust(&mut self) -> Result<Material, String> {
        let own = self.state.trust();
        if let Some(mounted) = &self.config.options.trust_dir {
            let fault = pin_mounted(mounted, &own)?;
            self.trust_faults.mounted = fault;
            self.say_trust_faults();
            let (trust, roots) = read(&own)?;
            return Ok(Material {
                trust,
                roots,
                identity: None,
            });
        }
        if !own.join(CLIENT_CERTIFICATE).exists() {
            self.enroll(&own).await?;
        }
        let (trust, roots) = read(&own)?;
        let certificate_der = read_file(&own.join(CLIENT_CERTIFICATE))?;
        let key_der = Zeroizing::new(read_file(&own.join(CLIENT_KEY))?);
        Ok(Material {
            trust,
            roots,
            identity: Some(ClientIdentity {
                certificate_der,
                key_der,
            }),
        })
    }

    /// `keyd` is who it was, or is not.
    pub(super) fn say_keyd_fault(&mut self, fault: Option<String>) {
        self.trust_faults.keyd = fault;
        self.say_trust_faults();
    }

    fn say_trust_faults(&mut self) {
        let TrustFaults { mounted, keyd, said } = &mut self.trust_faults;
        let fault = mounted.clone().or_else(|| keyd.clone());
        if *said != fault {
            if let Some(fault) = &fault {
                tracing::error!("{fault}");
            }
            said.clone_from(&fault);
            let _ = self.events.send(FromKeyd::Trust { fault });
        }
    }

    pub(super) fn say_root(&self, material: &Material) {
        let _ = self.events.send(FromKeyd::Root(status_of(&material.roots)));
    }

    /// `keyd` names the roots of its cluster: those after the pinned one are believed and pinned, on disk first.
    pub(super) fn follow(&mut self, roots: proto::Roots, material: &mut Material) -> Result<(), String> {
        let own = self.state.trust();
        let followed = RootChain::parse(roots.roots).and_then(|offered| material.roots.follow(offered));
        let roots = match followed {
            Ok(Followed::Further(roots)) => roots,
            Ok(Followed::Same) => return Ok(()),
            Err(error) => {
                let fault = not_followed(&error, &own);
                self.say_keyd_fault(Some(fault.clone()));
                return Err(fault);
            }
        };
        write_private(&own.join(ROOTS), roots.to_text().as_bytes()).map_err(|error| format!("{error:#}"))?;
        let newest = roots.newest();
        tracing::info!(
            generation = newest.generation,
            root = %newest.key.to_base64(),
            "keyd signs with a new key, which the one before vouches for"
        );
        if let Some(directory) = &mut self.directory {
            directory.set_root(newest.key);
        }
        material.roots = roots;
        self.say_root(material);
        Ok(())
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
                    write(ROOTS, enrolment.roots.to_text().as_bytes())?;
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

/// What to do where the pinned root is not reached.
fn not_followed(error: &RootError, own: &Path) -> String {
    match error {
        RootError::Older { offered, pinned } => format!(
            "keyd signs with snapshot root {offered}, but this node has pinned root {pinned} already: an old backup of keyd's \
             signing key was restored, restore the newest one"
        ),
        RootError::Other { .. } => format!(
            "keyd's chain of snapshot roots is refused: {error}; if keyd's keys were replaced on purpose, remove {} and restart \
             this agent, else somebody plays keyd",
            own.display()
        ),
        RootError::Empty | RootError::TooLong | RootError::Link(_) | RootError::Text(_) => {
            format!("keyd's chain of snapshot roots is refused: {error}")
        }
    }
}

fn status_of(roots: &RootChain) -> RootStatus {
    RootStatus {
        generation: roots.newest().generation,
        key: roots.newest().key.to_base64(),
    }
}

/// The snapshot roots that are known at start, to read the snapshot on disk with: those of the last run, else the mounted
/// ones.
pub(crate) fn snapshot_roots(config: &Config, state: &StateDir) -> Option<(RootChain, RootStatus)> {
    let own = state.trust();
    if let Some(mounted) = &config.options.trust_dir
        && let Err(reason) = pin_mounted(mounted, &own)
    {
        tracing::debug!(%reason, "the mounted trust is not there yet");
    }
    let text = fs::read_to_string(own.join(ROOTS)).ok()?;
    RootChain::from_text(&text)
        .inspect_err(|error| tracing::warn!(%error, "the kept snapshot roots are not usable"))
        .ok()
        .map(|roots| {
            let status = status_of(&roots);
            (roots, status)
        })
}

/// What is mounted is believed once, and kept: the mount may be gone when the node boots without its API server, and whoever
/// may write a ConfigMap must not be able to play `keyd`. Later only roots that the pinned one vouches for are taken from it.
/// Returns what differs from what is pinned.
fn pin_mounted(mounted: &Path, own: &Path) -> Result<Option<String>, String> {
    let there = |name: &str| match fs::read_to_string(mounted.join(name)) {
        Ok(content) => Ok(Some(content)),
        Err(_) if own.join(name).exists() => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(format!(
            "waiting for {}: keyd makes it",
            mounted.join(name).display()
        )),
        Err(error) => Err(format!("cannot read {}: {error}", mounted.join(name).display())),
    };
    let pin = |name: &str, content: &str| {
        write_private(&own.join(name), content.as_bytes()).map_err(|error| format!("{error:#}"))
    };
    let refused = |what: &str| {
        format!(
            "{} {what}: this node stays with what it has pinned; if keyd's keys were replaced on purpose, remove {} and \
             restart this agent, else find out who has changed it",
            mounted.display(),
            own.display()
        )
    };
    let (ca, roots) = (there(CA)?, there(ROOTS)?);
    let mut fault = None;
    if let Some(ca) = ca {
        match fs::read_to_string(own.join(CA)) {
            Ok(pinned) if pinned.trim() == ca.trim() => {}
            Ok(_) => fault = Some(refused("names another CA")),
            Err(_) => pin(CA, &ca)?,
        }
    }
    let Some(roots) = roots else { return Ok(fault) };
    let mounted_roots =
        RootChain::from_text(&roots).map_err(|error| format!("{}: {error}", mounted.join(ROOTS).display()));
    let pinned = fs::read_to_string(own.join(ROOTS));
    match pinned.map(|text| RootChain::from_text(&text)) {
        Ok(Ok(pinned)) => match mounted_roots.map(|roots| pinned.follow(roots)) {
            Ok(Ok(Followed::Further(roots))) => pin(ROOTS, &roots.to_text())?,
            // The ConfigMap is written after the stream has told.
            Ok(Ok(Followed::Same) | Err(RootError::Older { .. })) => {}
            Ok(Err(error)) => fault = Some(refused(&format!("names other snapshot roots ({error})"))),
            Err(error) => fault = Some(error),
        },
        Ok(Err(error)) => return Err(format!("{}: {error}", own.join(ROOTS).display())),
        Err(_) => pin(ROOTS, &mounted_roots?.to_text())?,
    }
    Ok(fault)
}

fn read(own: &Path) -> Result<(Trust, RootChain), String> {
    let text = |name: &str| -> Result<String, String> {
        let path = own.join(name);
        fs::read_to_string(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))
    };
    let trust = Trust::from_pem(&text(CA)?).map_err(|error| error.to_string())?;
    let roots = RootChain::from_text(&text(ROOTS)?)
        .map_err(|error| format!("{}: {error}", own.join(ROOTS).display()))?;
    Ok((trust, roots))
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
    use warren_keyd_api::snapshot::ManifestSigner;

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

    fn chain() -> (RootChain, ManifestSigner) {
        let signer = ManifestSigner::generate().unwrap();
        (RootChain::first(&signer, 0), signer)
    }

    /// A state folder, and a mount with these roots and the CA `x`.
    fn folders(roots: &RootChain) -> (tempfile::TempDir, StateDir, std::path::PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::open(&directory.path().join("state")).unwrap();
        let mounted = directory.path().join("mounted");
        assert!(
            pin_mounted(&mounted, &state.trust())
                .unwrap_err()
                .starts_with("waiting for")
        );
        fs::create_dir(&mounted).unwrap();
        fs::write(mounted.join(CA), "x").unwrap();
        fs::write(mounted.join(ROOTS), roots.to_text()).unwrap();
        assert_eq!(pin_mounted(&mounted, &state.trust()), Ok(None));
        (directory, state, mounted)
    }

    fn pinned(state: &StateDir) -> RootChain {
        RootChain::from_text(&fs::read_to_string(state.trust().join(ROOTS)).unwrap()).unwrap()
    }

    #[test]
    fn a_mount_that_vanished_leaves_its_copy() {
        let (_directory, state, mounted) = folders(&chain().0);
        fs::remove_dir_all(&mounted).unwrap();
        assert_eq!(pin_mounted(&mounted, &state.trust()), Ok(None));
        assert_eq!(fs::read_to_string(state.trust().join(CA)).unwrap(), "x");
    }

    #[test]
    fn a_mount_may_go_on_but_not_change() {
        let (first, signer) = chain();
        let (_directory, state, mounted) = folders(&first);
        let next = ManifestSigner::generate().unwrap();
        let second = first.with(&signer, next.root(), 1).unwrap();
        fs::write(mounted.join(ROOTS), second.to_text()).unwrap();
        assert_eq!(pin_mounted(&mounted, &state.trust()), Ok(None));
        assert_eq!(pinned(&state), second);
        // An older one is late, not wrong.
        fs::write(mounted.join(ROOTS), first.to_text()).unwrap();
        assert_eq!(pin_mounted(&mounted, &state.trust()), Ok(None));

        fs::write(mounted.join(ROOTS), chain().0.to_text()).unwrap();
        let fault = pin_mounted(&mounted, &state.trust()).unwrap().unwrap();
        assert!(
            fault.contains("other snapshot roots") && fault.contains("remove"),
            "{fault}"
        );
        fs::write(mounted.join(ROOTS), "nonsense").unwrap();
        assert!(pin_mounted(&mounted, &state.trust()).unwrap().is_some());
        fs::write(mounted.join(ROOTS), second.to_text()).unwrap();
        fs::write(mounted.join(CA), "y").unwrap();
        let fault = pin_mounted(&mounted, &state.trust()).unwrap().unwrap();
        assert!(fault.contains("another CA"), "{fault}");
        assert_eq!(pinned(&state), second);
        assert_eq!(fs::read_to_string(state.trust().join(CA)).unwrap(), "x");
    }
}
