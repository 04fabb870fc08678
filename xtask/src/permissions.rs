//! What Warren's parts may do in a cluster: `charts/warren/PERMISSIONS.md` lists every rule of the rendered chart with its reason.
//! A rule without a line, a line without a rule, or a line without a reason fails the check.

use std::{collections::BTreeMap, fs};

use anyhow::{Context as _, Result, bail, ensure};

use crate::paths;

const FILE: &str = "charts/warren/PERMISSIONS.md";

/// Compares the rendered chart with the list.
pub(crate) fn check(rendered: &str) -> Result<()> {
    let path = paths::root().join(FILE);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {FILE}"))?;
    let listed = listed(&text)?;
    let granted = granted(rendered)?;
    let mut faults = Vec::new();
    for rule in &granted {
        if !listed.contains_key(rule) {
            faults.push(format!("not listed: {rule}"));
        }
    }
    for (rule, reason) in &listed {
        if !granted.contains(rule) {
            faults.push(format!("listed, but not granted: {rule}"));
        }
        if reason.split_whitespace().count() < 3 {
            faults.push(format!("without a reason: {rule}"));
        }
    }
    if !faults.is_empty() {
        bail!(
            "{FILE} and the chart differ: review what changed, then write it down there\n  {}",
            faults.join("\n  ")
        );
    }
    println!("chart: {} rules, all listed with their reason", granted.len());
    Ok(())
}

/// The rows of the tables: all cells but the last one are the rule, the last one is the reason.
fn listed(text: &str) -> Result<BTreeMap<String, String>> {
    let mut rows = BTreeMap::new();
    for line in text.lines() {
        let Some(inner) = line
            .trim()
            .strip_prefix('|')
            .and_then(|line| line.strip_suffix('|'))
        else {
            continue;
        };
        let cells: Vec<_> = inner
            .split('|')
            .map(|cell| cell.trim().replace('`', ""))
            .collect();
        if cells[0] == "role" || cells[0].starts_with("---") {
            continue;
        }
        let Some((reason, rule)) = cells.split_last() else {
            continue;
        };
        ensure!(rule.len() == 5, "{FILE}: this row has not six cells: {line}");
        let again = rows.insert(rule.join(" | "), reason.clone());
        ensure!(again.is_none(), "{FILE}: listed twice: {}", rule.join(" | "));
    }
    Ok(rows)
}

/// Every rule of every role, and every binding, in the form of [`listed`]. Rules are written in one way in the templates: lists in
/// brackets, a key per line.
fn granted(rendered: &str) -> Result<Vec<String>> {
    let mut rules = Vec::new();
    for document in rendered.split("\n---") {
        let field = |name: &str| {
            let line = document.lines().find_map(|line| line.strip_prefix(name));
            line.map(|rest| rest.trim().trim_matches('"').to_owned())
        };
        let kind = field("kind:").unwrap_or_default();
        let name = field("  name:").unwrap_or_default();
        let place = field("  namespace:").unwrap_or_else(|| "cluster".to_owned());
        match kind.as_str() {
            "ClusterRole" | "Role" => {
                let role = format!("{name} ({place})");
                rules.extend(rules_of(document, &role)?);
            }
            "ClusterRoleBinding" | "RoleBinding" => {
                let role = field("roleRef:").context("a binding without roleRef in one line")?;
                let subjects: Vec<_> = document
                    .lines()
                    .filter_map(|line| line.trim().strip_prefix("- {kind: "))
                    .map(|subject| subject.trim_end_matches('}').to_owned())
                    .collect();
                ensure!(
                    !subjects.is_empty(),
                    "{kind} {name} has no subject in the usual form"
                );
                let role = role
                    .rsplit("name: ")
                    .next()
                    .unwrap_or_default()
                    .trim_end_matches('}');
                rules.push(format!(
                    "{role} ({place}) | binding | {} | - | -",
                    subjects.join(", ")
                ));
            }
            _ => {}
        }
    }
    ensure!(!rules.is_empty(), "the chart grants nothing: is it rendered?");
    Ok(rules)
}

fn rules_of(document: &str, role: &str) -> Result<Vec<String>> {
    let mut rules: Vec<[String; 4]> = Vec::new();
    for line in document.lines() {
        let begins = line.starts_with("  - ");
        let Some((key, list)) = line
            .trim_start_matches("  - ")
            .trim()
            .split_once(": [")
            .map(|(key, rest)| (key, rest.trim_end_matches(']')))
        else {
            continue;
        };
        if begins {
            rules.push(["", "-", "", ""].map(str::to_owned));
        }
        let cell = match key {
            "apiGroups" => 0,
            "resourceNames" => 1,
            "resources" => 2,
            "verbs" => 3,
            other => bail!("{role}: a rule has {other}, which this check does not know"),
        };
        let list = if list == "\"\"" { "core" } else { list };
        let rule = rules
            .last_mut()
            .with_context(|| format!("{role}: {line} belongs to no rule"))?;
        rule[cell] = list.to_owned();
    }
    let whole = rules.iter().all(|rule| rule.iter().all(|cell| !cell.is_empty()));
    ensure!(
        whole && !rules.is_empty(),
        "{role}: a rule is not whole: {rules:?}"
    );
    let line = |[group, names, resources, verbs]: &[String; 4]| {
        format!("{role} | {group} | {resources} | {names} | {verbs}")
    };
    Ok(rules.iter().map(line).collect())
}

#[cfg(test)]
mod tests {
    use super::{granted, listed};

    const RENDERED: &str = "\
kind: ClusterRole
metadata:
  name: a
rules:
  # why
  - apiGroups: [\"\"]
    resources: [nodes, pods]
    verbs: [get]
  - apiGroups: [x.dev]
    resources: [things]
    resourceNames: [one]
    verbs: [get, update]
---
kind: RoleBinding
metadata:
  name: a
  namespace: n
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: a}
subjects:
  - {kind: ServiceAccount, name: s, namespace: n}
---
kind: ConfigMap
";

    #[test]
    fn rules_and_bindings_are_found_and_odd_ones_are_errors() {
        let rules = granted(RENDERED).unwrap();
        assert_eq!(
            rules,
            [
                "a (cluster) | core | nodes, pods | - | get",
                "a (cluster) | x.dev | things | one | get, update",
                "a (n) | binding | ServiceAccount, name: s, namespace: n | - | -",
            ]
        );
        assert!(granted(&RENDERED.replace("verbs: [get]", "nonResourceURLs: [/metrics]")).is_err());
        assert!(granted(&RENDERED.replace("    verbs: [get]\n", "")).is_err());
        assert!(granted("kind: ConfigMap\n").is_err());
    }

    #[test]
    fn rows_have_six_cells() {
        let rows = listed(
            "| role | g | r | n | v | why |\n|---|---|---|---|---|---|\n| `a` | `b` | c | - | e | f g h |\n",
        );
        assert_eq!(rows.unwrap()["a | b | c | - | e"], "f g h");
        assert!(listed("| a | b | c |\n").is_err());
    }
}
