//! `warren`, also as `kubectl warren`: shows an operator how the mesh is, and fails where it is not as it should be.
//!
//! It asks `keyd` and the Kubernetes API; only `keys rotate`, `keys abort` and `keys revoke` change anything.

mod args;
mod assess;
mod components;
mod encrypt;
mod endpoint;
mod identity;
mod keyd;
mod keys;
mod kubernetes;
mod output;
mod policy;
mod policy_get;
mod policy_yaml;
mod source;
mod status;
mod trace;
mod version;

use std::process::ExitCode;

use clap::CommandFactory as _;

use args::{Cli, Command, EncryptCommand};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = match args::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    let result = match &cli.command {
        Command::Encrypt(EncryptCommand::Status(options)) => encrypt::run(&cli.target, options).await,
        Command::Keys(command) => keys::run(&cli.target, command).await,
        Command::Policy(command) => policy::run(&cli.target, command).await,
        Command::Identity(command) => identity::run(&cli.target, command).await,
        Command::Endpoint(command) => endpoint::run(&cli.target, command).await,
        Command::KeydTunnel => {
            let ended = keyd::tunnel(&cli.target).await;
            if let Err(error) = &ended {
                eprintln!("warren: {error:#}");
            }
            // Standard input cannot be let go of: a thread waits in it.
            std::process::exit(i32::from(ended.is_err()));
        }
        Command::Status(options) => status::run(&cli.target, options).await,
        Command::Version(options) => version::run(&cli.target, options).await,
        Command::Completion { shell } => {
            let shell = clap_complete::Shell::from(*shell);
            clap_complete::generate(shell, &mut Cli::command(), "warren", &mut std::io::stdout());
            Ok(true)
        }
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("warren: {error:#}");
            ExitCode::from(1)
        }
    }
}
