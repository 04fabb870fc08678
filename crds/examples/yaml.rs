//! Prints every custom resource definition as YAML documents, Warren's own first and then the policy kinds that are
//! installed on request; `cargo xtask generate` writes them to files.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for definition in warren_crds::all().into_iter().chain(warren_crds::cilium::all()) {
        // Through a value, so that fields come in one order and absent ones are left out.
        let value = serde_json::to_value(&definition)?;
        println!("---\n{}", serde_saphyr::to_string(&value)?.trim_end());
    }
    Ok(())
}
