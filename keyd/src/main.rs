//! `keyd`: the key-distribution controller. A thin shell around `warren-keyd-core`: sources feed it, stores keep its
//! objects, a gRPC service speaks with the agents.
//!
//! This crate decides nothing about keys, addresses or identities; that is the core's.

mod admin;
mod args;
mod auth;
mod client;
mod clock;
mod files;
mod guard;
mod hub;
mod key_writer;
mod keys_service;
mod kubernetes;
mod lag;
mod leader;
mod listener;
mod metrics;
mod node_status;
mod notes;
mod policy_status;
mod publisher;
mod questions;
mod rotations;
mod run;
mod service;
mod session;
mod signing;
mod source;
mod store;
mod token_review;
mod tokens;
mod trust;
mod wire;

use std::process::ExitCode;

use clap::Parser as _;

use crate::args::{Cli, Command, SigningKey, Token};

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(ansi)
        .with_env_filter(filter)
        .init();
    let done = match cli.command {
        Command::Run(args) => run::run(*args).await,
        Command::Token(Token::Create { node, ttl, socket }) => client::create_token(node, ttl, &socket).await,
        Command::SigningKey(SigningKey::List { socket }) => client::signing_keys(&socket).await,
        Command::SigningKey(SigningKey::Rotate { socket }) => client::rotate_signing_key(&socket).await,
        Command::Status { output, socket } => client::status(output, &socket).await,
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("keyd: {error:#}");
            ExitCode::FAILURE
        }
    }
}
