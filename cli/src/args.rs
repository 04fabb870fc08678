//! Command line.

use std::{ffi::OsString, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum, error::ErrorKind};

use crate::{endpoint::EndpointCommand, identity::IdentityCommand, keys::KeysCommand, policy::PolicyCommand};

/// Shows how the encrypted mesh of a Kubernetes cluster is doing, and changes its keys.
///
/// Every command exits with 0 when all is well, 1 when something is wrong, and 2 when the command line is.
#[derive(Debug, Parser)]
#[command(name = "warren", version, after_help = EXAMPLES, propagate_version = false, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) target: Target,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "\
Examples:
  warren encrypt status             is all traffic between nodes encrypted?
  warren status --wait              wait until everything is up, at most five minutes
  warren status -o json             the same for a program
  warren keys rotate --all --wait   new keys for all nodes, without losing a packet
  warren keys audit                 do both ends of every pair hold the same keys?
  warren policy get                 which policies are there, and are they valid?
  warren policy trace --from demo/web --to demo/db --port 5432
                                    why does this connection pass, or not?
  warren endpoint list              where is policy enforced?
  warren completion bash >/etc/bash_completion.d/warren";

/// Which cluster.
#[derive(Debug, Clone, Args)]
pub(crate) struct Target {
    /// Ask this keyd, without Kubernetes [default: /run/warren/keyd.sock where it exists].
    #[arg(long, global = true, value_name = "PATH", conflicts_with_all = ["kubeconfig", "context"])]
    pub(crate) keyd_socket: Option<PathBuf>,
    /// The kubeconfig file [default: $KUBECONFIG, then ~/.kube/config].
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig file [default: its current one].
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) context: Option<String>,
    /// The namespace that Warren is installed in.
    #[arg(
        long,
        short,
        global = true,
        value_name = "NAME",
        default_value = "kube-system"
    )]
    pub(crate) namespace: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Encryption between the nodes.
    #[command(subcommand)]
    Encrypt(EncryptCommand),
    /// WireGuard keys: list, rotate, revoke, audit.
    #[command(subcommand)]
    Keys(KeysCommand),
    /// Network policies.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Identities: the numbers that policy knows pods by.
    #[command(subcommand)]
    Identity(IdentityCommand),
    /// Endpoints: pods and hosts, with what is enforced there.
    #[command(subcommand)]
    Endpoint(EndpointCommand),
    /// Connects its streams with keyd's local socket.
    #[command(hide = true)]
    KeydTunnel,
    /// Are all parts of Warren up?
    ///
    /// Lists keyd, the agents and the tunnels with what is wanted, ready and available, the pods they manage and the
    /// images they run, and everything that they complain about.
    #[command(
        after_help = "Examples:\n  warren status\n  warren status --wait --timeout 2m\n  warren status -o json"
    )]
    Status(StatusOptions),
    /// Versions of this program, of keyd and of the agents.
    Version(OutputOptions),
    /// Prints the completion script of a shell.
    #[command(
        after_help = "Examples:\n  source <(warren completion bash)\n  warren completion fish >~/.config/fish/completions/warren.fish"
    )]
    Completion {
        /// The shell.
        shell: ShellName,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum EncryptCommand {
    /// Is all traffic between nodes encrypted?
    ///
    /// For every pair of nodes both ends must have the other's current key and a fresh handshake (within 180 s).
    /// Shows what is exempt from encryption, what was dropped, and why, and how far a rotation of keys is.
    #[command(
        after_help = "Examples:\n  warren encrypt status\n  warren encrypt status -o json | jq .problems"
    )]
    Status(OutputOptions),
}

#[derive(Debug, Clone, Args)]
pub(crate) struct OutputOptions {
    /// Output format.
    #[arg(long, short, value_enum, default_value_t = Format::Text)]
    pub(crate) output: Format,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct StatusOptions {
    #[command(flatten)]
    pub(crate) output: OutputOptions,
    /// Wait until all is well.
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long to wait at most: 90, 90s, 5m, 1h.
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = duration, requires = "wait")]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum ShellName {
    Bash,
    Zsh,
    Fish,
}

impl From<ShellName> for clap_complete::Shell {
    fn from(shell: ShellName) -> Self {
        match shell {
            ShellName::Bash => Self::Bash,
            ShellName::Zsh => Self::Zsh,
            ShellName::Fish => Self::Fish,
        }
    }
}

pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit {
        "" | "s" => Some(1),
        "m" => Some(60),
        "h" => Some(3600),
        _ => None,
    };
    let seconds = factor.and_then(|factor: u64| number.parse::<u64>().ok()?.checked_mul(factor));
    seconds
        .map(Duration::from_secs)
        .ok_or_else(|| "write seconds, or a number with s, m or h".to_owned())
}

/// Parses the command line. Help goes to standard output; a mistake is one sentence, and code 2.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Cli, ExitCode> {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let mut command = Cli::command();
    // As a plugin of kubectl the help should say what the user typed.
    let plugin = arguments
        .first()
        .is_some_and(|name| name.to_string_lossy().ends_with("kubectl-warren"));
    if plugin {
        command = command.bin_name("kubectl warren");
    }
    let parsed = command
        .try_get_matches_from(arguments)
        .and_then(|matches| Cli::from_arg_matches(&matches));
    parsed.map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            ExitCode::from(2)
        }
        _ => {
            eprintln!(
                "warren: {}; see warren --help",
                sentence(&error.render().to_string())
            );
            ExitCode::from(2)
        }
    })
}

/// The first paragraph of a message, on one line.
fn sentence(message: &str) -> String {
    let paragraph = message
        .trim_start_matches("error: ")
        .split("\n\n")
        .next()
        .unwrap_or_default();
    paragraph.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations() {
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for bad in ["", "m", "2d", "-1", "1.5m", "99999999999999999999h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn mistakes_are_one_sentence() {
        let text = "error: unexpected argument '--x' found\n\nUsage: warren\n";
        assert_eq!(sentence(text), "unexpected argument '--x' found");
        let text = "error: the following required arguments were not provided:\n  <SHELL>\n\nUsage: w\n";
        assert_eq!(
            sentence(text),
            "the following required arguments were not provided: <SHELL>"
        );
    }
}
