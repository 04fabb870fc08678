//! Needs root, and fails without.

use super::*;

fn seed() -> u64 {
    let seed = std::env::var("WARREN_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(20_260_102);
    println!("WARREN_SEED={seed}");
    seed
}

#[test]
fn the_loaded_programs_and_the_oracle_agree() {
    let outcome = run(20_000, seed(), |_| ()).unwrap();
    for mismatch in &outcome.shown {
        println!("{mismatch}");
    }
    assert_eq!((outcome.mismatches, outcome.report.pairs), (0, 20_000));
    let allowed = outcome.report.allowed;
    assert!(
        (4_000..16_000).contains(&allowed),
        "{allowed} allowed: one answer is too rare to test anything"
    );
}

#[test]
fn spoiled_maps_are_noticed() {
    let tampers: [(&str, Tamper); 8] = [
        ("denials are lost", |datapath| {
            for (key, value) in datapath.policy_contents()?.verdicts {
                if !value.allow {
                    datapath.remove_policy_verdict(key)?;
                }
            }
            Ok(())
        }),
        ("the host's exception is lost", |datapath| {
            for key in datapath.policy_contents()?.verdicts.into_keys() {
                if key.kind == PolicyPeerKind::Identity && key.id == 1 {
                    datapath.remove_policy_verdict(key)?;
                }
            }
            Ok(())
        }),
        ("single ports are lost", |datapath| {
            for key in datapath.policy_contents()?.ports.into_keys() {
                if key.length == 24 {
                    datapath.remove_policy_port(key)?;
                }
            }
            Ok(())
        }),
        ("narrow prefixes are lost", |datapath| {
            for (table, prefix) in datapath.policy_contents()?.cidrs.into_keys() {
                if prefix.prefix_len() >= 16 {
                    datapath.remove_policy_cidr(table, prefix)?;
                }
            }
            Ok(())
        }),
        ("nothing leaves under a policy", |datapath| {
            change_endpoints(datapath, |policy| policy.egress_open = true)
        }),
        ("nothing enters under a policy", |datapath| {
            change_endpoints(datapath, |policy| policy.ingress_open = true)
        }),
        ("nothing is enforced", |datapath| {
            change_endpoints(datapath, |policy| policy.audit = true)
        }),
        ("marks name somebody else", |datapath| {
            for mut endpoint in datapath.endpoints()? {
                endpoint.identity += 1;
                datapath.set_endpoint(&endpoint)?;
            }
            Ok(())
        }),
    ];
    private(|pins| {
        let mut run = Run::new(pins, seed())?;
        // That there is one is enough.
        run.appetite = Appetite { enough: 1, shown: 0 };
        for (what, tamper) in tampers {
            run.tamper = tamper;
            let outcome = run.compare(8_000, |_| ())?;
            println!("{what}: {} mismatches", outcome.mismatches);
            assert!(outcome.mismatches > 0, "{what}, and nobody noticed");
        }
        Ok(())
    })
    .unwrap();
}

fn change_endpoints(datapath: &mut Datapath, change: fn(&mut PolicyEndpoint)) -> Result<()> {
    for (index, mut policy) in datapath.policy_contents()?.endpoints {
        change(&mut policy);
        datapath.set_policy_endpoint(index, policy)?;
    }
    Ok(())
}
