//! The previous plugin's result (`prevResult`), as far as the plugin needs it. Version 0.3 differs from later ones
//! only in a field that is ignored (`ips[].version`).

use crate::protocol::{CniError, codes};
use serde::Deserialize;
use serde_json::value::RawValue;
use std::net::IpAddr;

/// The pod's part of a `prevResult`.
#[derive(Debug, PartialEq, Eq)]
pub struct PodSide {
    /// The pod's addresses, each once.
    pub addresses: Vec<IpAddr>,
    /// The names of the interfaces inside the pod.
    pub interfaces: Vec<String>,
}

#[derive(Deserialize)]
struct PrevResult {
    interfaces: Option<Vec<Interface>>,
    ips: Option<Vec<Ip>>,
}

#[derive(Deserialize)]
struct Interface {
    #[serde(default)]
    name: String,
    /// The interface's network namespace; empty or absent for the host's.
    sandbox: Option<String>,
}

#[derive(Deserialize)]
struct Ip {
    address: String,
    interface: Option<i64>,
}

impl Interface {
    fn is_pods(&self) -> bool {
        self.sandbox.as_ref().is_some_and(|s| !s.is_empty())
    }
}

impl PodSide {
    /// Reads a `prevResult`.
    ///
    /// # Errors
    /// The JSON is no CNI result, or has no address.
    pub fn read(previous: Option<&RawValue>) -> Result<Self, CniError> {
        let previous = previous.ok_or_else(|| {
            CniError::new(
                codes::INVALID_CONFIGURATION,
                "no prevResult in the configuration",
                "chain egret-cni after the plugin that gives the pod its interface",
            )
        })?;
        let result: PrevResult = serde_json::from_str(previous.get())
            .map_err(|e| CniError::new(codes::DECODE, format!("prevResult in the configuration: {e}"), ""))?;
        let interfaces = result.interfaces.unwrap_or_default();
        let mut all = Vec::new();
        for (at, ip) in result.ips.unwrap_or_default().into_iter().enumerate() {
            let text = ip.address.split('/').next().unwrap_or_default();
            let address: IpAddr = text.parse().map_err(|_| {
                let msg = format!("prevResult in the configuration: ips[{at}].address {:?} is no address", ip.address);
                CniError::new(codes::DECODE, msg, "it should read like 10.1.2.3/24 or fd00::3/64")
            })?;
            let interface = ip.interface.map(|i| usize::try_from(i).ok().and_then(|i| interfaces.get(i)));
            all.push((address.to_canonical(), interface.map(|i| i.is_some_and(Interface::is_pods))));
        }
        // Calico and others name only the host end, or make the addresses point to it: then all addresses are the
        // pod's.
        let pods_are_named = all.iter().any(|(_, of_pod)| *of_pod == Some(true));
        let mut addresses: Vec<IpAddr> = Vec::new();
        for (address, of_pod) in all {
            if (!pods_are_named || of_pod != Some(false)) && !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        if addresses.is_empty() {
            return Err(CniError::new(
                codes::INVALID_CONFIGURATION,
                "prevResult in the configuration has no address (ips)",
                "chain egret-cni in the network that gives the pod its address",
            ));
        }
        let interfaces = interfaces.into_iter().filter(Interface::is_pods).map(|i| i.name).collect();
        Ok(PodSide { addresses, interfaces })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<PodSide, CniError> {
        PodSide::read(Some(&RawValue::from_string(text.to_owned()).unwrap()))
    }

    fn addresses(text: &str) -> Vec<String> {
        read(text).unwrap().addresses.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_bridge_plugins_result() {
        let text = r#"{"cniVersion": "1.0.0", "interfaces": [{"name": "cni0", "mac": "x"}, {"name": "veth1"},
            {"name": "eth0", "sandbox": "/run/netns/x"}],
            "ips": [{"interface": 2, "address": "10.1.0.5/24", "gateway": "10.1.0.1"},
                    {"interface": 2, "address": "fd00:0::5/64"}], "dns": {}}"#;
        assert_eq!(addresses(text), ["10.1.0.5", "fd00::5"]);
        assert_eq!(read(text).unwrap().interfaces, ["eth0"]);
    }

    #[test]
    fn the_format_of_0_3_1() {
        assert_eq!(addresses(r#"{"ips": [{"version": "4", "address": "10.1.0.5/24"}]}"#), ["10.1.0.5"]);
    }

    #[test]
    fn a_result_that_names_only_the_hosts_end() {
        let text = r#"{"interfaces": [{"name": "cali12"}], "ips": [{"interface": 0, "address": "10.1.0.5/32"}]}"#;
        assert_eq!(addresses(text), ["10.1.0.5"]);
    }

    #[test]
    fn the_hosts_own_addresses_are_left_out() {
        let text = r#"{"interfaces": [{"name": "cni0"}, {"name": "eth0", "sandbox": "/n"}],
            "ips": [{"interface": 0, "address": "10.1.0.1/24"}, {"interface": 1, "address": "10.1.0.5/24"},
                    {"address": "10.1.0.6"}, {"interface": 1, "address": "10.1.0.5/24"}]}"#;
        assert_eq!(addresses(text), ["10.1.0.5", "10.1.0.6"]);
    }

    #[test]
    fn invalid_results_are_rejected() {
        let code = |text| read(text).unwrap_err().code;
        for text in ["5", "[]", r#"{"ips": 5}"#, r#"{"ips": [{}]}"#, r#"{"ips": [{"address": "x/24"}]}"#] {
            assert_eq!(code(text), codes::DECODE, "{text}");
        }
        for text in ["{}", r#"{"ips": []}"#, r#"{"ips": null, "interfaces": [{"name": "eth0", "sandbox": "/n"}]}"#] {
            assert_eq!(code(text), codes::INVALID_CONFIGURATION, "{text}");
        }
        assert_eq!(PodSide::read(None).unwrap_err().code, codes::INVALID_CONFIGURATION);
    }
}
