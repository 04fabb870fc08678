//! `warren keys`: which keys there are, new ones, the end of some, and whether both ends of every pair agree.

mod audit;
mod list;
mod progress;
mod revoke;
mod rotate;
mod rotations;
mod signing;
mod view;

use clap::Subcommand;

use crate::args::Target;

pub(crate) use progress::bar;
pub(crate) use rotations::under_way;
pub(crate) use view::Rotation;

#[derive(Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// The keys of every node: generation, state, age.
    ///
    /// A key is `active` (everybody sends with it), `next` (published and being verified) or `former` (only received with,
    /// about to be destroyed). HELD: the agent has the private half. Also lists what was revoked and which agents have
    /// not removed it yet. Exits with 1 where a node has no key or does not hold its active one.
    #[command(
        after_help = "Examples:\n  warren keys list\n  warren keys list node1 node2\n  warren keys list -o json | jq '.nodes[] | {node, active}'"
    )]
    List(list::ListOptions),
    /// Gives nodes new keys, without losing a packet.
    ///
    /// Creates a KeyRotation. Each node makes a new key beside its old one; all its pairs verify it with a handshake; then
    /// they move to it one by one; when nothing arrives on the old key any more, it is destroyed. Until all pairs are
    /// verified everything can be taken back; a deadline or a crash leaves the old keys working.
    ///
    /// With --wait exits with 0 where all nodes have new keys at the end, else with 1.
    #[command(
        after_help = "Examples:\n  warren keys rotate --all --wait\n  warren keys rotate --node node3 --reason 'disk was replaced' --wait\n  \
                      warren keys rotate --selector topology.kubernetes.io/zone=a --concurrency 25%\n  \
                      warren keys rotate --all --every 30d --name monthly"
    )]
    Rotate(rotate::RotateOptions),
    /// Rotations with their progress, the oldest first.
    ///
    /// Exits with 1 where one of them has failed.
    #[command(after_help = "Examples:\n  warren keys rotations\n  warren keys rotations monthly -o json")]
    Rotations(rotations::RotationsOptions),
    /// Stops a rotation.
    ///
    /// Begins nothing new. Nodes whose new key is not in use yet keep the old one; the others are finished.
    #[command(after_help = "Examples:\n  warren keys abort monthly")]
    Abort(rotations::AbortOptions),
    /// Removes a node's keys everywhere, for ever.
    ///
    /// For a node that is lost or no longer trusted: every agent drops its keys within seconds, and they are never
    /// accepted again. Its pods are cut off from those of other nodes. The node comes back only as a new Node
    /// object (stand-alone: with a new join token), with a new key. Does the same as deleting the Node.
    ///
    /// Waits until every agent has removed the keys; exits with 1 where some have not within --timeout.
    #[command(
        after_help = "Examples:\n  warren keys revoke node3 --reason 'stolen disk'\n  warren keys revoke node3 --timeout 0   do not wait"
    )]
    Revoke(revoke::RevokeOptions),
    /// Do both ends of every pair hold the same keys, and who disagrees?
    ///
    /// Compares what the two agents of every pair report with each other and with the directory, and whether they send on a
    /// path whose handshake is fresh. Exits with 1 where a pair disagrees. During a rotation a pair has more than one
    /// path: each is named by its two generations, and * marks the one that is sent on.
    #[command(
        after_help = "Examples:\n  warren keys audit\n  warren keys audit --node node3\n  warren keys audit --disagreeing -o json"
    )]
    Audit(audit::AuditOptions),
    /// The key that keyd signs snapshots and MeshNodes with, and those before it.
    ///
    /// Exits with 1 where an agent does not follow the last one yet.
    #[command(after_help = "Examples:\n  warren keys signing\n  warren keys signing -o json")]
    Signing(signing::SigningOptions),
    /// Has keyd sign with a new key.
    ///
    /// The old key vouches for the new one, so that all agents follow by themselves, also those that are away now; whatever
    /// the old one signs afterwards is worth nothing. Nothing else changes: traffic and the nodes' own keys stay.
    ///
    /// Waits until every agent follows and all MeshNodes are signed anew; exits with 1 where that takes longer than --timeout.
    #[command(
        after_help = "Examples:\n  warren keys rotate-signing\n  warren keys rotate-signing --timeout 0   do not wait"
    )]
    RotateSigning(signing::RotateSigningOptions),
}

pub(crate) async fn run(target: &Target, command: &KeysCommand) -> anyhow::Result<bool> {
    match command {
        KeysCommand::List(options) => list::run(target, options).await,
        KeysCommand::Rotate(options) => rotate::run(target, options).await,
        KeysCommand::Rotations(options) => rotations::run(target, options).await,
        KeysCommand::Abort(options) => rotations::abort(target, options).await,
        KeysCommand::Revoke(options) => revoke::run(target, options).await,
        KeysCommand::Audit(options) => audit::run(target, options).await,
        KeysCommand::Signing(options) => signing::run(target, options).await,
        KeysCommand::RotateSigning(options) => signing::rotate(target, options).await,
    }
}
