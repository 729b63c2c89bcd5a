//! An estimate, on the high side, of what the CEL rules cost in the API server. The server refuses a definition with
//! a rule that exceeds its limit. With the estimate, tests without a server see how near a rule comes.
//!
//! The cost of a rule is the cost of one evaluation, times how often its place can occur: once for each item of all
//! lists and maps around it (`childContext` and `getExpressionCost`, pkg/apis/apiextensions/validation of
//! apiextensions-apiserver). A value without a bound counts as long as a request can be. The costs of operators and
//! functions are those of cel-go (checker/cost.go) and of Kubernetes' library (pkg/cel/library/cost.go of apiserver),
//! rounded up.

use super::crds;
use cel::Program;
use cel::common::ast::{CallExpr, ComprehensionExpr, Expr, LiteralValue, operators};
use serde_json::{Value, json};

/// `StaticEstimatedCostLimit`, pkg/apis/apiextensions/validation/validation.go.
const LIMIT_OF_RULE: u64 = 10_000_000;
/// `StaticEstimatedCRDCostLimit`, ibid.
const LIMIT_OF_CRD: u64 = 100_000_000;
/// `MaxRequestSizeBytes`, pkg/apis/cel/config.go of apiserver: no value is longer, and no list has more items.
const UNBOUNDED: u64 = 3 * 1024 * 1024;
/// Rules may use an eighth of a limit: our estimate and the server's may differ, and later versions may count
/// otherwise.
const SHARE: u64 = 8;

/// A CEL rule and its place.
pub(super) struct Rule<'a> {
    /// The schema of `self`.
    pub(super) schema: &'a Value,
    /// The text of the rule.
    pub(super) text: &'a str,
    /// How often its place can occur in one object.
    times: u64,
}

/// All rules of a CustomResourceDefinition.
pub(super) fn rules(crd: &Value) -> Vec<Rule<'_>> {
    let mut found = Vec::new();
    for version in crd["spec"]["versions"].as_array().into_iter().flatten() {
        collect(&version["schema"]["openAPIV3Schema"], 1, &mut found);
    }
    found
}

fn collect<'a>(schema: &'a Value, times: u64, found: &mut Vec<Rule<'a>>) {
    for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
        found.push(Rule { schema, text: rule["rule"].as_str().expect("a rule's text"), times });
    }
    for property in schema["properties"].as_object().into_iter().flatten() {
        collect(property.1, times, found);
    }
    for inner in ["items", "additionalProperties"].iter().filter_map(|name| schema.get(name)) {
        collect(inner, times.saturating_mul(size(schema)), found);
    }
}

/// The size of a value: of a text in bytes, of a list or map in entries.
fn size(schema: &Value) -> u64 {
    let bound = |name: &str| schema[name].as_u64().unwrap_or(UNBOUNDED);
    match schema["type"].as_str() {
        // A character has four bytes at most.
        Some("string") if schema["maxLength"].is_u64() => bound("maxLength") * 4,
        Some("string") => {
            let longest = schema["enum"].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::len).max();
            longest.map_or(UNBOUNDED, |length| length as u64)
        }
        Some("array") => bound("maxItems"),
        Some("object") if schema.get("additionalProperties").is_some() => bound("maxProperties"),
        _ => 1,
    }
}

/// The names in scope of an expression, with their schemas.
type Names<'a> = Vec<(String, Option<&'a Value>)>;

impl Rule<'_> {
    /// An upper estimate of the cost in the API server.
    fn cost(&self) -> u64 {
        let program = Program::compile(self.text).unwrap_or_else(|e| panic!("{}: {e}", self.text));
        let names = vec![("self".to_owned(), Some(self.schema))];
        cost(&program.expression().expr, &names).saturating_mul(self.times)
    }
}

/// The schema of the result of an expression, if it is a part of the object.
fn part_of<'a>(expression: &Expr, names: &Names<'a>) -> Option<&'a Value> {
    match expression {
        Expr::Ident(name) => names.iter().rev().find(|(known, _)| known == name)?.1,
        Expr::Select(select) => part_of(&select.operand.expr, names)?["properties"].get(&select.field),
        Expr::Call(call) if call.func_name == operators::INDEX => {
            let of = part_of(&call.args.first()?.expr, names)?;
            of.get("items").or(of.get("additionalProperties"))
        }
        _ => None,
    }
}

/// The size of the result of an expression.
fn length(expression: &Expr, names: &Names<'_>) -> u64 {
    match expression {
        Expr::Literal(LiteralValue::String(text)) => text.inner().len() as u64,
        Expr::Literal(_) => 1,
        Expr::List(list) => list.elements.len() as u64,
        // Booleans and numbers. Names that are no part of the object are the accumulators of loops.
        Expr::Call(call) if call.func_name != operators::INDEX && call.func_name != operators::CONDITIONAL => 1,
        Expr::Comprehension(_) => 1,
        Expr::Select(select) if select.test => 1,
        Expr::Ident(name) if name.starts_with('@') => 1,
        other => part_of(other, names).map_or(UNBOUNDED, size),
    }
}

fn cost(expression: &Expr, names: &Names<'_>) -> u64 {
    match expression {
        Expr::Literal(_) => 1,
        Expr::Ident(_) => 1,
        Expr::Select(select) => 2 + cost(&select.operand.expr, names),
        Expr::List(list) => 10 + list.elements.iter().map(|e| cost(&e.expr, names)).sum::<u64>(),
        Expr::Call(call) => {
            let parts = call.target.as_deref().into_iter().chain(&call.args);
            parts.map(|part| cost(&part.expr, names)).sum::<u64>() + 1 + of_call(call, names)
        }
        Expr::Comprehension(walk) => of_walk(walk, names),
        other => panic!("the estimate does not know {other:?}; add its cost here"),
    }
}

/// The cost of a function, without that of its arguments.
fn of_call(call: &CallExpr, names: &Names<'_>) -> u64 {
    let lengths: Vec<u64> =
        call.target.as_deref().into_iter().chain(&call.args).map(|part| length(&part.expr, names)).collect();
    let tenth = |n: u64| n.div_ceil(10).max(1);
    match (call.func_name.as_str(), lengths.as_slice()) {
        (operators::EQUALS | operators::NOT_EQUALS, [a, b]) => tenth(*a.max(b)),
        (operators::IN, [element, list]) => list.saturating_mul(tenth(*element)),
        ("contains", [text, part]) => tenth(*text).saturating_mul(tenth(*part)),
        ("startsWith" | "endsWith", [_, part]) => tenth(*part),
        ("matches", [text, pattern]) => tenth(*text).saturating_mul(pattern.div_ceil(4).max(1)),
        (
            "size"
            | operators::CONDITIONAL
            | operators::LOGICAL_AND
            | operators::LOGICAL_OR
            | operators::LOGICAL_NOT
            | operators::ADD
            | operators::GREATER
            | operators::GREATER_EQUALS
            | operators::LESS
            | operators::LESS_EQUALS
            | operators::INDEX
            | operators::NOT_STRICTLY_FALSE,
            _,
        ) => 1,
        (other, _) => panic!("the estimate does not know the function {other}; add its cost here"),
    }
}

fn of_walk(walk: &ComprehensionExpr, names: &Names<'_>) -> u64 {
    let list = part_of(&walk.iter_range.expr, names);
    // In a loop over a map the name is a key, which has no bound.
    let item = list.and_then(|list| list.get("items"));
    let mut inside = names.clone();
    inside.push((walk.iter_var.clone(), item));
    inside.push((walk.accu_var.clone(), None));
    let once = cost(&walk.loop_cond.expr, &inside).saturating_add(cost(&walk.loop_step.expr, &inside));
    let all = length(&walk.iter_range.expr, names).saturating_mul(once);
    let rest =
        cost(&walk.iter_range.expr, names) + cost(&walk.accu_init.expr, &inside) + cost(&walk.result.expr, &inside);
    all.saturating_add(rest)
}

fn definitions() -> Vec<Value> {
    serde_saphyr::from_multiple(&crds::yaml().unwrap()).unwrap()
}

#[test]
fn no_rule_comes_near_the_limit_of_the_api_server() {
    for crd in definitions() {
        let name = crd["metadata"]["name"].as_str().unwrap();
        let mut sum = 0;
        for rule in rules(&crd) {
            let cost = rule.cost();
            println!("{name}: {cost:>9} {}", rule.text);
            assert!(
                cost <= LIMIT_OF_RULE / SHARE,
                "{name}: {cost} for {}; bound the lists and texts that it looks at, and those that it stands in",
                rule.text
            );
            sum += cost;
        }
        assert!(sum <= LIMIT_OF_CRD / SHARE, "{name}: {sum} in all");
    }
}

/// The first rule about `except`, as it once was. Servers refused it as 1.42 times too expensive.
#[test]
fn a_rule_that_a_server_rejected_is_found() {
    let mut crd = definitions().into_iter().find(|crd| crd["spec"]["names"]["kind"] == "EgressPolicy").unwrap();
    let block = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/egress/items/properties/to/items\
                 /properties/ipBlock";
    let walk = "!has(self.except) || self.except.all(e, e.contains(':') == self.cidr.contains(':'))";
    crd.pointer_mut(block).unwrap()["x-kubernetes-validations"] = json!([{"rule": walk}]);
    let of_walk = |crd: &Value| rules(crd).into_iter().find(|rule| rule.text == walk).unwrap().cost();
    let cost = of_walk(&crd);
    assert!((14_210_000..30_000_000).contains(&cost), "{cost}");
    // With fewer exceptions servers accepted it.
    crd.pointer_mut(block).unwrap()["properties"]["except"]["maxItems"] = 16.into();
    assert!(of_walk(&crd) < cost * 7 / 10);
    // Without a bound on one of the lists around it.
    crd.pointer_mut(block.trim_end_matches("/items/properties/ipBlock"))
        .unwrap()
        .as_object_mut()
        .unwrap()
        .remove("maxItems");
    assert!(of_walk(&crd) > 1000 * cost);
}
