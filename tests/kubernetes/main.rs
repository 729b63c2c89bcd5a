//! Egret with Kubernetes as the source of cluster state: a real API server and etcd, under the rights of
//! `install/rbac.yaml`. Needs root.

mod acceptance;
mod admission;
mod allocations;
mod api_server;
mod away;
mod basics;
mod burst;
mod changes;
mod convert;
mod current;
mod failover;
mod fields;
mod kubectl_egret;
mod kubelet;
mod leaders;
mod metrics;
mod proxy;
mod refusals;
mod services;
mod taint;
mod tokens;

use lab::Lab;
use serde_json::Value;
use std::time::Duration;

/// How long a short operation may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A condition of a policy, `shop/visitors`: its status, reason and message.
fn condition(lab: &Lab, policy: &str, type_: &str) -> Option<(String, String, String)> {
    let (namespace, name) = policy.split_once('/').expect("namespace/name");
    condition_of(&lab.api().egret(&format!("namespaces/{namespace}/egresspolicies/{name}")), type_)
}

/// The same, of an object that has been read.
fn condition_of(object: &Value, type_: &str) -> Option<(String, String, String)> {
    let all = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let found = all.into_iter().find(|c| c["type"] == type_)?;
    let text = |field: &str| found[field].as_str().unwrap_or_default().to_owned();
    Some((text("status"), text("reason"), text("message")))
}

/// The allocations of all gateways at one moment.
fn allocations(lab: &Lab) -> Vec<Value> {
    let list = lab.api().egret("egressgateways");
    let each = list["items"].as_array().cloned().unwrap_or_default().into_iter();
    each.flat_map(|g| g["status"]["allocations"].as_array().cloned().unwrap_or_default()).collect()
}

/// The objects of a YAML file.
fn documents(text: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}
