//! What the kernel's own tests of WireGuard put a tunnel through (`tools/testing/selftests/wireguard/netns.sh`).
//!
//! Each scenario runs between two ends of one kind, between two of different kinds, and with boringtun's sessions in our
//! engine. Of which kinds says `WARREN_SCENARIO_ENGINES`, two of `warren`, `wireguard-go`, `boringtun`, `kernel`; in the
//! virtual machine it is `kernel,warren`. What is asked of the first end is asked of the first kind.

mod keys;
mod places;
mod prefixes;
mod routes;
use crate::support::Engine;
use anyhow::{Context as _, Result, bail};
use keys::{low_order_keys, private_key};
use places::{another_namespace, nat_with_timeouts, roaming};
use prefixes::{many_prefixes, overlapping_prefixes};
use routes::{both_families, padding, routing_loops, tunnel_in_tunnel};

/// Who is at the ends.
#[derive(Clone, Copy)]
enum Ends {
    Alike,
    Mixed,
    Boringtun,
}

impl Ends {
    fn engines(self) -> Result<[Engine; 2]> {
        let kinds = std::env::var("WARREN_SCENARIO_ENGINES").unwrap_or("warren,wireguard-go".into());
        let (first, second) = kinds.split_once(',').context("two kinds are wanted")?;
        Ok(match self {
            Self::Alike => [kind(first)?, kind(first)?],
            Self::Mixed => [kind(first)?, kind(second)?],
            Self::Boringtun => [Engine::warren_boringtun(), Engine::warren()],
        })
    }
}

fn kind(name: &str) -> Result<Engine> {
    Ok(match name {
        "warren" => Engine::warren(),
        "boringtun" => Engine::warren_boringtun(),
        "wireguard-go" => Engine::WireguardGo,
        "kernel" => Engine::Kernel,
        _ => bail!("there is no kind {name}"),
    })
}

/// A module of tests for each scenario.
macro_rules! scenarios {
    ($($name:ident)+) => {
        $(mod $name {
            use super::{Ends, Result};

            #[test]
            fn alike() -> Result<()> {
                super::$name(Ends::Alike.engines()?)
            }

            #[test]
            fn mixed() -> Result<()> {
                super::$name(Ends::Mixed.engines()?)
            }

            #[test]
            fn boringtun() -> Result<()> {
                super::$name(Ends::Boringtun.engines()?)
            }
        })+
    };
}

scenarios! {
    both_families roaming overlapping_prefixes private_key nat_with_timeouts padding low_order_keys many_prefixes
    tunnel_in_tunnel routing_loops another_namespace
}
