//! The node agent: wiring only.

mod adopt;
mod cli;
mod clock;
mod cni;
mod config;
mod files;
mod keyd;
mod keys;
mod machine;
mod metrics;
mod policy;
mod psk;
mod query;
mod runner;
mod server;
mod status;
mod tunnel;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let arguments = cli::Cli::parse();
    arguments.init_logging();
    // Private keys must not end up in a core dump, nor be read by a debugger without privileges.
    if let Err(error) = nix::sys::prctl::set_dumpable(false) {
        tracing::warn!(%error, "core dumps cannot be switched off");
    }
    match arguments.command {
        cli::Command::Run(options) => runner::main(options),
        cli::Command::Tunnel(options) => tunnel::main(&options),
        cli::Command::Encrypt(cli::Encrypt::Status(options)) => status::encrypt_main(&options),
        cli::Command::Status(options) => status::agent_main(&options),
        cli::Command::Endpoints(options) => policy::endpoints_main(&options),
        cli::Command::Policy(options) => policy::policy_main(&options),
        cli::Command::Conntrack(options) => policy::conntrack_main(&options),
        cli::Command::Events(options) => policy::events_main(&options),
    }
}
